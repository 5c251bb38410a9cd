"""Classifiers from torchvision, from one's own code and from files; no network is used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from dsvlib import Classifier, open_classifier
from dsvlib.classifiers.foreign import load_weights
from dsvlib.classifiers.training import logits_of

OWN = {"classes": ["cat", "dog"], "mean": [0.5], "std": [0.25], "shape": (1, 4, 4)}


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 2))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.resnet18()


def test_torchvision_by_name_with_a_local_file(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    before = torch.get_rng_state()
    found = open_classifier("torchvision:resnet18", weights=path)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in resnet.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value)
    assert not found.model.training
    assert found.shape == (3, 224, 224)
    assert (len(found.classes), found.classes[281]) == (1000, "tabby")
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.labels(["tabby", 3]).tolist() == [281, 3]


def test_torchvision_downloads_with_checksum(
    resnet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetched(self: models.WeightsEnum, **options: object) -> dict[str, torch.Tensor]:
        asked.append((str(self), options["check_hash"]))
        return resnet.state_dict()

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", fetched)
    open_classifier("torchvision:resnet18")
    found = open_classifier("torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert asked == [("ResNet18_Weights.IMAGENET1K_V1", True)] * 2
    assert found.name == "ResNet18_Weights.IMAGENET1K_V1"

    def offline(self: models.WeightsEnum, **_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(RuntimeError, match=r"expected to download https.*got: no network; fetch"):
        open_classifier("torchvision:resnet18")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "did you mean 'resnet18'"),
        ("ResNet50_Weight.IMAGENET1K_V2", "expected one of its classifiers"),
        ("ResNet50_Weights.IMAGENET1K_V3", "one of IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, got"),
    ],
)
def test_unknown_torchvision_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_classifier(f"torchvision:{name}")


def test_weights_of_another_architecture(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    with pytest.raises(
        ValueError,
        match=r"expected weights of ResNet, got \[64, 64, 3, 3\] for 'layer1.0.conv1.weight', "
        r"expected \[64, 64, 1, 1\] and \d+ more",
    ):
        open_classifier("torchvision:resnet50", weights=path)


def test_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.safetensors"
    trained = net()
    save_file(trained.state_dict(), path)
    found = open_classifier(net, weights=path, **OWN)
    inputs = torch.randn(2, 1, 4, 4)
    assert torch.equal(found.model(inputs), trained(inputs))
    assert found.classes == ("cat", "dog")
    low, high = found.bounds
    assert (low.tolist(), high.tolist()) == ([-2.0], [2.0])
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    again = open_classifier("mynet:build", weights=path, **OWN)
    assert torch.equal(again.model(inputs), trained(inputs))
    with pytest.raises(ValueError, match="did you mean 'build'"):
        open_classifier("mynet:buidl", weights=path, **OWN)
    with pytest.raises(ValueError, match="module that can be imported"):
        open_classifier("yournet:build", weights=path, **OWN)


def test_empty_files_and_lazy_layers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    path.touch()
    with pytest.raises(ValueError, match=r"own\.pt: expected a file of weights, got an empty one"):
        load_weights(net(), path)
    torch.save(net().state_dict(), path)
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"got '1\.weight' of a lazy layer"):
        load_weights(lazy, path)


def test_wrapped_state_dicts(tmp_path: Path) -> None:
    trained, path = net(), tmp_path / "own.pt"
    parallel = {f"module.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": parallel}, path)
    model = net()
    load_weights(model, path)
    assert torch.equal(model[1].weight, trained[1].weight)


def test_misfits_name_the_first_key_and_change_nothing(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "own.pt"
    before = model[1].weight.clone()
    cases = {
        r"got \[5, 16\] for '1.weight', expected \[3, 16\] and 2 more": net(5).state_dict(),
        r"got no '1.weight'": {k: v for k, v in net().state_dict().items() if k != "1.weight"},
        r"got 'head.bias', which the network lacks": net().state_dict() | {"head.bias": before},
    }
    for message, state in cases.items():
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            load_weights(model, path)
        assert torch.equal(model[1].weight, before)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code ran')",))


def test_no_code_is_run_from_a_file(tmp_path: Path) -> None:
    torch.save({"1.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="cannot be read without running code"):
        load_weights(net(), tmp_path / "trap.pt")
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(net(), tmp_path / "no.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_weights(net(), tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="expected a file of weights"):
        load_weights(net(), tmp_path / "missing.pt")


def test_shipped_ones_bring_all_they_need() -> None:
    found = open_classifier("digits-convnet")
    assert (found.name, found.dataset, found.shape) == ("digits-convnet", "digits", (1, 16, 16))
    with pytest.raises(ValueError, match=r"classes 2, logits 10"):
        open_classifier("digits-convnet", classes=["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.5, 0.5]}, "expected 1 numbers each, one per channel"),
        ({"std": [0.0]}, "std > 0"),
        ({"shape": (4, 4)}, r"expected \(channels, height, width\)"),
        ({"classes": []}, "one name per logit"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(net(), **(OWN | change))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"net: expected mean, std beside the network"):
        open_classifier(net, classes=["a", "b"], shape=(1, 4, 4))
    with pytest.raises(TypeError, match=r"returns a torch.nn.Module, got int"):
        open_classifier(lambda: 3, **OWN)


def test_reading_images_of_another_size_and_normalisation() -> None:
    found = Classifier(net(), **OWN)
    pixels = torch.rand(5, 1, 4, 4)
    wanted = found.model((pixels - 0.5) / 0.25)
    same = found.reading(shape=(1, 4, 4), mean=[0.3], std=[0.1])
    torch.testing.assert_close(same((pixels - 0.3) / 0.1), wanted)
    larger = pixels.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    other = found.reading(shape=(1, 8, 8), mean=[0.3], std=[0.1])
    torch.testing.assert_close(other((larger - 0.3) / 0.1), wanted)
    assert not other.training
    with pytest.raises(ValueError, match="divide by 255"):
        found.reading(shape=(1, 8, 8), mean=[76.5], std=[25.5])
    with pytest.raises(ValueError, match="expected 1 channels, as the classifier reads, got 3"):
        found.reading(shape=(3, 4, 4), mean=[0.3], std=[0.1])


def test_labels_by_name() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = Classifier(network, **(OWN | {"classes": ["tabby cat", "crane", "crane"]}))
    assert found.labels(["tabby cat", " 1", 2]).tolist() == [0, 1, 2]
    for wanted, message in (
        ("taby cat", "got 'taby cat'; did you mean 'tabby cat'"),
        ("crane", "'crane', which several share"),
        (3, "from 0 to 2, got 3"),
        ("-1", "from 0 to 2, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            found.labels([wanted])


# --- nothing about a classifier is believed ------------------------------------------------------


def test_a_string_that_names_a_class_means_it() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    found = Classifier(network, **(OWN | {"classes": ("1", "2", "3", "10")}))
    assert found.labels(["1", "10", " 2", 1, "0"]).tolist() == [0, 3, 1, 1, 0]
    with pytest.raises(TypeError, match=r"got the string '10'; write \['10'\]"):
        found.labels("10")
    years = Classifier(network, **(OWN | {"classes": ("2", "3", "0", "1")}))
    assert years.labels(["0", "1", "2", "3"]).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(
    "classes",
    [
        {1: "dog", 0: "cat"},
        {"0": "cat", "1": "dog"},
        {"dog": 1, "cat": 0},
        iter(["cat", "dog"]),
    ],
)
def test_classes_of_a_dict_are_read_by_number(classes: Any) -> None:
    assert Classifier(net(), **(OWN | {"classes": classes})).classes == ("cat", "dog")


def test_names_that_are_numbers_are_not_mistaken_for_places() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = Classifier(network, **(OWN | {"classes": {"0": 2, "1": 0, "2": 1}}))
    assert found.classes == ("1", "2", "0")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"classes": "cat"}, TypeError, "list of names in the order of the logits, got str 'cat'"),
        ({"classes": {"cat", "dog"}}, TypeError, "got set"),
        ({"classes": None}, TypeError, "got NoneType"),
        ({"classes": {1: "cat", 2: "dog"}}, ValueError, "from 0 to 1, got none for '0'"),
        ({"classes": ["cat"]}, ValueError, "classes 1, logits 2"),
        ({"classes": ["cat", "dog", "bird"]}, ValueError, "classes 3, logits 2"),
        ({"mean": [123.7]}, ValueError, r"pixels in \[0, 1\].*divide by 255"),
        ({"std": [58.4]}, ValueError, "divide by 255"),
        ({"mean": [float("nan")]}, ValueError, r"pixels in \[0, 1\]"),
        ({"std": [float("nan")]}, ValueError, "std > 0"),
        ({"mean": 0.5}, TypeError, "mean: expected a list of numbers, got float 0.5"),
        ({"shape": (1, 4.5, 4)}, TypeError, "shape: expected a list of numbers"),
        ({"std": "1"}, TypeError, "std: expected a list of numbers, got str '1'"),
        ({"shape": (1, 5, 5)}, ValueError, r"the model can read, got \[2, 1, 5, 5\]"),
    ],
)
def test_descriptions_are_held_against_the_network(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Classifier(net(), **(OWN | change))


def test_one_logit_tells_two_classes_apart() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    assert Classifier(network, **OWN).classes == ("cat", "dog")
    with pytest.raises(ValueError, match="classes 3, logits 1"):
        Classifier(network, **(OWN | {"classes": list("abc")}))


class Counting(nn.Module):
    """Counts its forward passes in a buffer, and gives logits of the wrong kind on demand."""

    count: torch.Tensor

    def __init__(self, answer: Callable[[torch.Tensor], object] = lambda logits: logits) -> None:
        super().__init__()
        self.linear, self.answer = nn.Linear(16, 2), answer
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> object:
        self.count += 1
        return self.answer(self.linear(inputs.flatten(1)))


def test_looking_at_a_network_does_not_change_it(untouched: Callable[..., Any]) -> None:
    network = Counting().train()
    with untouched(network):
        Classifier(network, **OWN)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda logits: (logits, None), "got tuple of 2"),
        (lambda logits: {"out": logits}, "got dict with 'out'"),
        (lambda logits: logits.sum(), r"got shape \[\]"),
        (lambda logits: logits[:1], r"got shape \[1, 2\]"),
        (lambda logits: 1 / 0, "got ZeroDivisionError: division by zero"),
    ],
)
def test_other_answers_than_logits(answer: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(Counting(answer), **OWN)


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (lambda logits: SimpleNamespace(logits=logits, features=None), None),
        (lambda logits: {"logits": logits}, None),
        (lambda logits: (None, logits), 1),
        (lambda logits: {"out": logits, "aux": None}, "out"),
        (lambda logits: [[logits]], lambda returned: returned[0][0]),
    ],
)
def test_logits_are_found_or_chosen(answer: Callable[..., object], output: Any) -> None:
    network = Counting(answer)
    found = open_classifier(network, output=output, **OWN)
    inputs = torch.randn(3, 1, 4, 4)
    expected = network.linear(inputs.flatten(1))
    torch.testing.assert_close(logits_of(found.model, inputs), expected.detach())


# --- networks and weights as users have them -----------------------------------------------------


def test_wrappers_are_taken_off() -> None:
    plain = net()
    for wrapped in (
        nn.DataParallel(plain),
        torch.compile(plain),
        nn.DataParallel(torch.compile(plain)),
    ):
        assert Classifier(wrapped, **OWN).model is plain
        assert open_classifier(wrapped, **OWN).model is plain
        assert open_classifier(lambda wrapped=wrapped: wrapped, **OWN).model is plain


def normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))


@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.module."]
)
def test_weights_under_the_names_of_wrappers(
    container: str | None, prefix: str, tmp_path: Path
) -> None:
    trained, model, path = normed(), normed(), tmp_path / "own.pt"
    state = {f"{prefix}{k}": v for k, v in trained.state_dict().items() if "num_batches" not in k}
    torch.save(state if container is None else {"epoch": 3, container: state}, path)
    load_weights(model, path)
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_what_stands_beside_a_lightning_network_is_left_out(tmp_path: Path) -> None:
    trained, model, path = net(), net(), tmp_path / "last.ckpt"
    state = {f"model.{k}": v for k, v in trained.state_dict().items()}
    beside = {"loss.weight": torch.ones(2)}
    torch.save({"state_dict": state | beside, "pytorch-lightning_version": "2"}, path)
    load_weights(model, path)
    assert torch.equal(model[1].weight, trained[1].weight)
    del state["model.1.bias"]
    torch.save({"state_dict": state | beside}, path)
    with pytest.raises(ValueError, match=r"expected weights of Sequential, got no '1.weight'"):
        load_weights(model, path)


def test_a_network_whose_own_names_begin_so_keeps_them(tmp_path: Path) -> None:
    def holder() -> nn.Module:
        return nn.ModuleDict({"model": net(), "net": net()})

    trained, model = holder(), holder()
    torch.save(trained.state_dict(), tmp_path / "own.pt")
    load_weights(model, tmp_path / "own.pt")
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "run git lfs pull"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page; download the file itself"),
        (b"<html><head>404", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["own.pt", "own.safetensors"])
def test_what_a_download_left_in_place_of_weights(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_weights(net(), tmp_path / name)
    with pytest.raises(ValueError, match=message):
        open_classifier(tmp_path / name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('width')", "expected a callable that returns the network, got KeyError"),
        ("raise SystemExit('no GPU')", "got SystemExit: no GPU"),
        ("undefined.attribute", "got NameError"),
        ("return (nn.Linear(16, 2), 'transform')", "returns a torch.nn.Module, got tuple"),
        ("return None", "returns a torch.nn.Module, got NoneType"),
    ],
)
def test_what_a_users_code_may_do(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"usernet{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"from torch import nn\ndef build():\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((ValueError, TypeError), match=message):
        open_classifier(f"{name}:build", **OWN)


def test_modules_that_cannot_be_imported_and_lazy_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nosyntax.py").write_text("def build(:")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    (tmp_path / "lazypart.py").write_text("width = 2")
    (tmp_path / "lazynet.py").write_text(
        "def build():\n    import lazypart\n    from torch import nn\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, lazypart.width))\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    for module, error in (("nosyntax", "SyntaxError"), ("exits", "SystemExit")):
        with pytest.raises(ValueError, match=f"can be imported, got {error}"):
            open_classifier(f"{module}:build", **OWN)
    assert open_classifier("lazynet:build", **OWN).classes == ("cat", "dog")
