"""Classifiers in files: the same logits afterwards, and a clear word about every other file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dsvlib import (
    SupportSet,
    _files,
    build_model,
    load_classifier,
    save_classifier,
    synthesize,
)
from dsvlib._files import file_digest, repository_root
from dsvlib.classifiers.files import shipped_digests

SHAPE = (1, 16, 16)
ARCHITECTURES = {
    "convnet": {"width": 4},
    "resnet18": {},
    "vit": {"width": 16, "depth": 1, "heads": 2},
}


def small(**options: object) -> nn.Module:
    return build_model("convnet", num_classes=3, shape=SHAPE, **({"width": 4} | options))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_gives_equal_logits(name, tmp_path, generator, untouched):
    model = build_model(name, num_classes=3, shape=SHAPE, **ARCHITECTURES[name])
    inputs = torch.randn(4, *SHAPE, generator=generator)
    model(inputs)  # moves the running statistics of batch norms
    path = tmp_path / "deep" / "classifier.safetensors"
    with untouched(model):
        save_classifier(path, model, dataset="digits", classes=["a", "b", "ç"], mean=[0.5])
    loaded, metadata = load_classifier(path)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(inputs), model.eval()(inputs))
    assert loaded.spec == model.spec
    assert metadata == {
        "dataset": "digits",
        "classes": ["a", "b", "ç"],
        "mean": [0.5],
        "architecture": name,
        "num_classes": 3,
        "shape": SHAPE,
    }
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm": "none", "pooling": "max"}])
def test_options_are_kept(options, tmp_path):
    save_classifier(tmp_path / "file", small(**options))
    assert load_classifier(tmp_path / "file")[0].spec.options == {"width": 4} | options


def test_a_loaded_classifier_can_be_saved_again(tmp_path):
    save_classifier(tmp_path / "one", small(), seed=1)
    model, metadata = load_classifier(tmp_path / "one")
    save_classifier(tmp_path / "two", model, seed=metadata["seed"])
    again, same = load_classifier(tmp_path / "two")
    assert same == metadata
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_loading_leaves_global_randomness_alone(tmp_path):
    save_classifier(tmp_path / "file", small())
    before = torch.get_rng_state()
    load_classifier(tmp_path / "file")
    assert torch.equal(torch.get_rng_state(), before)


def test_shipped_name_is_looked_up(tmp_path, monkeypatch):
    for module in ("classifiers.files", "_files"):
        monkeypatch.setattr(f"dsvlib.{module}.checkpoints_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    model = small()
    save_classifier(tmp_path / "toys-convnet.safetensors", model)
    loaded, _ = load_classifier("toys-convnet")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    with pytest.raises(FileNotFoundError, match=r"\['toys-convnet'\], got 'toys-resnet'"):
        load_classifier("toys-resnet")
    with pytest.raises(FileNotFoundError):
        load_classifier("only-there")
    save_classifier(tmp_path / "root" / "only-there.safetensors", model)
    assert load_classifier("only-there", root=tmp_path / "root")[1]["shape"] == SHAPE


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_classifier wrote, found none"):
        load_classifier(tmp_path / "none.safetensors")


def test_damaged_file(tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, small())
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:30], b"", b"\x80\x04pickle"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="got a damaged or foreign one"):
            load_classifier(path)


def test_pickles_are_not_read(tmp_path):
    torch.save(small().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="damaged or foreign"):
        load_classifier(tmp_path / "model.pt")


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match=r"expected format 'dsvlib\.classifier\.v1', got None"):
        load_classifier(path)
    SupportSet(torch.zeros(1, 2), [0], torch.ones(1)).save(path)
    with pytest.raises(ValueError, match=r"got 'dsvlib\.support-set\.v1'"):
        load_classifier(path)


def rewrite(path: Path, *, tensors: dict | None = None, **header: str) -> None:
    with safe_open(str(path), framework="pt") as file:
        old = dict(file.metadata())
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors or kept, str(path), metadata=old | header)


def test_file_whose_parts_do_not_fit(tmp_path):
    path = tmp_path / "classifier.safetensors"
    spec = {"name": "convnet", "num_classes": 3, "shape": SHAPE, "options": {}}
    cases = [
        {"tensors": small(width=5).state_dict()},
        {"tensors": {"weight": torch.zeros(3)}},
        {"spec": json.dumps(spec | {"name": "lenet"})},
        {"spec": json.dumps(spec | {"options": {"colour": 1}})},
        {"spec": "{}"},
        {"spec": "not json"},
        {"metadata": "not json"},
    ]
    for case in cases:
        save_classifier(path, small())
        rewrite(path, **case)
        with pytest.raises(ValueError, match="expected weights that fit the architecture") as hit:
            load_classifier(path)
        assert path.name in str(hit.value)
        assert "\n" not in str(hit.value)


def test_model_not_from_build_model(tmp_path):
    with pytest.raises(TypeError, match="expected a classifier from build_model, got Linear"):
        save_classifier(tmp_path / "file", nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_names_are_as_many_as_logits(tmp_path):
    model = build_model("convnet", num_classes=3, shape=(1, 8, 8), width=2, depth=1)
    with pytest.raises(ValueError, match="got classes 2, logits 3"):
        save_classifier(tmp_path / "two.safetensors", model, classes=["a", "b"])
    assert not list(tmp_path.iterdir())


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        save_classifier(tmp_path / "file", small(), mean=torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "classifier.safetensors"
    save_classifier(path, small())
    before = path.read_bytes()

    def half(tensors: object, filename: str, metadata: object = None) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_classifier(path, small())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = small()
    with torch.no_grad():
        model.classifier.bias[1] = torch.nan
    save_classifier(tmp_path / "file", model)
    with pytest.raises(ValueError, match=r"expected finite weights.* in 'classifier\.bias'"):
        load_classifier(tmp_path / "file")


def test_another_file_under_a_shipped_name_is_refused(tmp_path, monkeypatch):
    for module in ("classifiers.files", "_files"):
        monkeypatch.setattr(f"dsvlib.{module}.checkpoints_folder", lambda: tmp_path)
    path = tmp_path / "digits-convnet.safetensors"
    save_classifier(path, small(), dataset="digits")
    for name in ("digits-convnet", path):
        with pytest.raises(ValueError, match=r"expected the shipped classifier \(SHA-256 [0-9a-f]"):
            load_classifier(name)
    other = tmp_path / "elsewhere" / path.name  # one's own file, named by its path
    save_classifier(other, small(), dataset="digits")
    assert load_classifier(other)[1]["dataset"] == "digits"
    path.unlink()
    with pytest.raises(ValueError, match="another file"):
        load_classifier("digits-convnet", root=other.parent)


def test_every_shipped_file_has_its_digest():
    folder = repository_root() / "data" / "checkpoints"
    found = {path.name: file_digest(path) for path in folder.glob("*.safetensors")}
    assert found == shipped_digests()


def test_a_wrapped_classifier_is_saved_under_its_own_names(tmp_path):
    model = small()
    save_classifier(tmp_path / "file", nn.DataParallel(torch.compile(model)))
    assert torch.equal(load_classifier(tmp_path / "file")[0].classifier.bias, model.classifier.bias)


def test_without_a_checkout_what_is_kept_lies_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("dsvlib._files.checkout", lambda: None)
    monkeypatch.setenv("DSV_CACHE", str(tmp_path))
    assert _files.checkpoints_folder() == tmp_path / "checkpoints"
    assert _files.downloads_folder() == tmp_path / "downloads"
    save_classifier(tmp_path / "checkpoints" / "mine.safetensors", small())
    assert load_classifier("mine")[1]["shape"] == SHAPE
    with pytest.raises(FileNotFoundError, match="expected a checkout of the repository; clone it"):
        _files.repository_root()
    monkeypatch.delenv("DSV_CACHE")
    assert _files.checkpoints_folder().parent.name == "dsvlib", "the user's own cache"


def test_synthesis_names_the_weights_that_are_not_finite():
    model = small(norm="batch")
    model.features[1].running_var[0] = torch.nan
    with pytest.raises(ValueError, match=r"finite weights.* in 'features\.1\.running_var'"):
        synthesize(model, [0], SHAPE)
    model = small()
    with torch.no_grad():
        model.features[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite weights.* in 'features\.0\.weight'"):
        synthesize(model, [0], SHAPE)
