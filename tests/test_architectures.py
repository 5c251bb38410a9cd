"""Architectures: sizes, shapes, options, and the features before the last layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsvlib import build_model
from dsvlib.classifiers.architectures import ConvNet, embed
from dsvlib.frozen import device_of

COLOUR, GREY = (3, 32, 32), (1, 16, 16)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_convnet_3_has_320010_parameters_and_2048_features():
    model = build_model("convnet", num_classes=10, shape=COLOUR)
    assert parameters(model) == 320_010
    assert embed(model, torch.zeros(2, *COLOUR)).shape == (2, 2048)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 3
    assert all(m.num_groups == m.num_channels for m in norms)


@pytest.mark.parametrize("shape", [COLOUR, GREY])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet", {"width": 8}),
        ("convnet", {"width": 8, "depth": 2, "norm": "batch", "pooling": "max"}),
        ("convnet", {"width": 8, "depth": 4, "norm": "none"}),
        ("resnet18", {}),
        ("vit", {"width": 16, "depth": 1, "heads": 2}),
    ],
)
def test_every_architecture_gives_logits(name, options, shape):
    model = build_model(name, num_classes=7, shape=shape, **options).eval()
    inputs = torch.randn(3, *shape)
    with torch.no_grad():
        logits = model(inputs)
        alone = model(inputs[1:2])
    assert logits.shape == (3, 7)
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-4, atol=1e-5)
    assert float(logits.std(dim=0).min()) > 0  # it looks at its inputs
    assert (model.spec.name, model.spec.num_classes, model.spec.shape) == (name, 7, shape)
    assert model.spec.options == options


def test_a_narrow_resnet_halves_the_image_in_its_stem_and_has_a_quarter_of_the_weights():
    torch.manual_seed(0)
    full, half = (
        build_model("resnet18", num_classes=10, shape=COLOUR, **options)
        for options in ({}, {"width": 32, "stride": 2})
    )
    count = [sum(p.numel() for p in model.parameters()) for model in (full, half)]
    assert 3.9 < count[0] / count[1] < 4.1
    seen = []
    half.layer1.register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert half.eval()(torch.randn(2, *COLOUR)).shape == (2, 10)
    assert seen == [(2, 32, COLOUR[1] // 2, COLOUR[2] // 2)]
    assert half.spec.options == {"width": 32, "stride": 2}


def test_resnet50_keeps_the_resolution_of_small_images():
    with torch.device("meta"):
        model = build_model("resnet50", num_classes=10, shape=COLOUR)
    assert model.conv1.stride == (1, 1)
    assert isinstance(model.maxpool, nn.Identity)
    assert parameters(model) == 23_520_842  # torchvision's 23,528,522 with a 3×3 stem


def test_large_images_keep_torchvisions_stem():
    with torch.device("meta"):
        colour = build_model("resnet18", num_classes=10, shape=(3, 224, 224))
        grey = build_model("resnet18", num_classes=10, shape=(1, 224, 224))
    for model, channels in ((colour, 3), (grey, 1)):
        assert model.conv1.kernel_size == (7, 7)
        assert model.conv1.in_channels == channels
        assert isinstance(model.maxpool, nn.MaxPool2d)


def test_norms_and_pooling_are_as_asked():
    def kinds(**options: object) -> set[type]:
        model = build_model("convnet", num_classes=2, shape=GREY, width=4, **options)
        return {type(m) for m in model.modules()}

    assert nn.BatchNorm2d in kinds(norm="batch")
    assert not {nn.BatchNorm2d, nn.GroupNorm} & kinds(norm="none")
    assert nn.MaxPool2d in kinds(pooling="max")
    assert any(issubclass(kind, nn.AvgPool2d) for kind in kinds(pooling="avg"))


@pytest.mark.parametrize("size", [(8, 12), (9, 8), (8, 7), (2, 2), (80, 80)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_halving_is_average_pooling_also_in_its_derivatives(size, layout):
    halving = build_model("convnet", num_classes=2, shape=(1, 8, 8), width=1, depth=1).features[3]
    x = torch.randn(2, 3, *size).double().contiguous(memory_format=layout).requires_grad_()
    results = []
    for pool in (halving, nn.AvgPool2d(2)):
        out = pool(x)
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        results.append([out, slope, torch.autograd.grad(slope.square().sum(), x)[0]])
    torch.testing.assert_close(*results)


def test_weights_come_from_the_global_seed():
    def weights(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build_model("convnet", num_classes=2, shape=GREY, width=4)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head"), [("convnet", "classifier"), ("resnet18", "fc"), ("vit", "heads.head")]
)
def test_embed_returns_what_the_last_linear_layer_sees(name, head):
    options = {"convnet": {"width": 4}, "resnet18": {}, "vit": {"width": 16, "depth": 1}}[name]
    model = build_model(name, num_classes=5, shape=GREY, **options).eval()
    inputs = torch.randn(3, *GREY, requires_grad=True)
    features = embed(model, inputs)
    layer = model.get_submodule(head)
    torch.testing.assert_close(layer(features), model(inputs))
    (slope,) = torch.autograd.grad(features.square().sum(), inputs)
    assert float(slope.abs().sum()) > 0


def test_embed_leaves_no_hook_behind(untouched):
    model = build_model("convnet", num_classes=5, shape=GREY, width=4)
    with untouched(model):
        embed(model, torch.zeros(2, *GREY))
    with untouched(model), pytest.raises(RuntimeError):
        embed(model, torch.zeros(2, 3, 16, 16))


def test_embed_needs_a_linear_layer():
    with pytest.raises(ValueError, match=r"expected a last linear layer .* got none"):
        embed(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2))


def test_device_of_a_model():
    assert device_of(nn.Flatten()).type == "cpu"
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("convnets", {}, ValueError, "expected one of 'convnet'.*did you mean 'convnet'"),
        ("convnet", {"norm": "layer"}, ValueError, "norm: expected one of 'instance'.*'layer'"),
        ("convnet", {"pooling": "mean"}, ValueError, "pooling: expected one of 'avg', 'max'"),
        ("convnet", {"widht": 8}, TypeError, "expected its documented options.*widht"),
        ("convnet", {"depth": 5}, ValueError, "expected at most 4 blocks.*16×16 images, got 5"),
        ("convnet", {"depth": 0}, ValueError, "depth: expected"),
        ("convnet", {"depth": -1}, ValueError, "depth: expected"),
        ("convnet", {"width": 0}, ValueError, "width: expected"),
        ("convnet", {"num_classes": 0}, ValueError, "expected num_classes ≥ 1.*got 0"),
        ("convnet", {"shape": (16, 16)}, ValueError, r"shape \(C, H, W\), got .*\(16, 16\)"),
        ("convnet", {"shape": (0, 16, 16)}, ValueError, r"got .*\(0, 16, 16\)"),
        ("vit", {"patch": 5}, ValueError, "divided by patch=5, got 16×16"),
        ("vit", {"shape": (1, 16, 12)}, ValueError, "expected square images.*16×12"),
        ("vit", {"norm": "batch"}, TypeError, "expected its documented options"),
    ],
)
def test_bad_options_are_refused(name, arguments, error, message):
    with pytest.raises(error, match=message):
        build_model(name, **{"num_classes": 10, "shape": GREY} | arguments)


def test_convnet_shrinks_uneven_images():
    model = ConvNet(2, (1, 20, 9), width=4, depth=3)
    assert model(torch.zeros(1, 1, 20, 9)).shape == (1, 2)
