"""Second derivatives: finite differences in float64, and PyTorch's own double backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsvlib import second_order
from dsvlib.second_order import cheap_double_backward


@pytest.fixture(autouse=True)
def _seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def check_derivatives(function: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    def inside(*args: Tensor | None) -> Tensor:
        with cheap_double_backward():
            return function(*args)

    assert gradcheck(inside, inputs, fast_mode=True)
    assert gradgradcheck(inside, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": 1}),
        ((3, 2), {"stride": (2, 1), "padding": (1, 0)}),
        ((3, 3), {"dilation": 2, "padding": 2}),
        ((3, 3), {"groups": 2, "stride": 2}),
        ((3, 1), {"padding": "same", "dilation": (1, 2)}),
        ((2, 3), {"padding": "same"}),  # lopsided: stays native
        ((3, 3), {"padding": "valid"}),
        ((1, 1), {}),
    ],
)
def test_convolution(kernel: tuple[int, int], options: dict[str, Any], bias: bool) -> None:
    x, weight = leaf(2, 4, 5, 4), leaf(4, 4 // options.get("groups", 1), *kernel)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, **options)

    check_derivatives(convolve, x, weight, leaf(4) if bias else None)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (3, 4, 5)])
def test_group_norm(shape: tuple[int, ...], groups: int, affine: bool) -> None:
    weight, bias = (leaf(4), leaf(4)) if affine else (None, None)
    check_derivatives(lambda x, w, b: F.group_norm(x, groups, w, b), leaf(*shape), weight, bias)


def test_instance_norm() -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.instance_norm(x, weight=weight, bias=bias)

    check_derivatives(norm, leaf(2, 3, 3, 2), leaf(3), leaf(3))


def test_layer_norm() -> None:
    check_derivatives(lambda x, w, b: F.layer_norm(x, (4,), w, b), leaf(2, 3, 4), leaf(4), leaf(4))


def test_attention() -> None:
    q, k, v = leaf(1, 2, 3, 4), leaf(1, 2, 3, 4), leaf(1, 2, 3, 4)
    check_derivatives(F.scaled_dot_product_attention, q, k, v)


@pytest.mark.parametrize("training", [True, False])
def test_attention_module(training: bool) -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).train(training)
    check_derivatives(lambda x: layer(x, x, x, need_weights=False)[0], leaf(1, 3, 4))


def convnet(norm: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    blocks: list[nn.Module] = []
    for channels in (3, 8, 8):
        blocks += [nn.Conv2d(channels, 8, 3, padding=1), norm(), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 5)).to(dtype)


def deepkkt_gradient(
    model: nn.Module, context: AbstractContextManager[Any], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 3, 16, 16, generator=generator).to(dtype).requires_grad_()
    multipliers = (torch.rand(6, generator=generator) + 0.5).to(dtype).requires_grad_()
    theta = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    with context:
        logits = functional_call(model, theta, (inputs,))
    losses = F.cross_entropy(logits, torch.arange(6) % 5, reduction="none")
    gradient = grad((multipliers * losses).sum(), list(theta.values()), create_graph=True)
    flat, target = (torch.cat([t.flatten() for t in ts]) for ts in (gradient, theta.values()))
    distance = 1 - F.cosine_similarity(-flat, target.detach(), dim=0)
    return grad(distance, (inputs, multipliers))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"]
)
@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity,
        lambda: nn.GroupNorm(8, 8),
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.InstanceNorm2d(8, affine=True),
        lambda: nn.BatchNorm2d(8).eval(),
    ],
    ids=["none", "instance", "group", "instance-module", "batch"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_as_plain_double_backward(
    norm: Callable[[], nn.Module], dtype: torch.dtype, tolerance: float, layout: torch.memory_format
) -> None:
    model = convnet(norm, dtype).to(memory_format=layout)
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)  # no γ at 1, no β at 0
    expected = deepkkt_gradient(model, nullcontext(), dtype)
    found = deepkkt_gradient(model, cheap_double_backward(), dtype)
    for have, want in zip(found, expected, strict=True):
        assert want.norm() > 0
        assert (have - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.GroupNorm(4, 8)], ids=["none", "group"])
def test_value_to_the_last_bit_and_first_gradient(norm: Callable[[], nn.Module]) -> None:
    model, inputs = convnet(norm, torch.float32), leaf(4, 3, 16, 16, dtype=torch.float32)
    values = list(model.parameters())
    expected = model(inputs)
    with cheap_double_backward():
        found = model(inputs)
    assert torch.equal(found, expected)
    wanted = grad(expected.square().sum(), [inputs, *values])
    for have, want in zip(grad(found.square().sum(), [inputs, *values]), wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_layout_of_the_input_does_not_change_the_sum() -> None:
    layer, inputs = nn.Conv2d(64, 64, 3), leaf(8, 64, 16, 16, dtype=torch.float32)
    with cheap_double_backward():
        found = layer(inputs.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, layer(inputs))


def test_relu() -> None:
    check_derivatives(lambda x: F.relu(x).square(), leaf(3, 4))


def recorded_as(module: nn.Module, inputs: Tensor) -> str:
    return type(module(inputs).grad_fn).__name__


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Conv2d(4, 4, 3), "_Conv2dBackward"),
        (nn.GroupNorm(2, 4), "_GroupNormBackward"),
        (nn.InstanceNorm2d(4), "_GroupNormBackward"),
        (nn.ReLU(), "_ReluBackward"),
    ],
)
def test_modules_are_intercepted_inside_only(module: nn.Module, name: str) -> None:
    inputs = leaf(2, 4, 5, 5, dtype=torch.float32)
    native = recorded_as(module, inputs)
    with cheap_double_backward():
        assert recorded_as(module, inputs) == name
        with cheap_double_backward():
            assert recorded_as(module, inputs) == name
    assert recorded_as(module, inputs) == native != name


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(fails: bool) -> None:
    def switches() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        before, mode = switches(), cheap_double_backward()  # kept: collecting it would restore, too
        try:
            with mode:
                assert switches() == (False, False, True)
                if fails:
                    nn.Conv2d(2, 2, 3)(leaf(1, 5, 4, 4))  # wrong channels
        except RuntimeError:
            assert fails
        assert switches() == before
    assert recorded_as(nn.Conv2d(2, 2, 1), leaf(1, 2, 1, 1).float()) == "ConvolutionBackward0"


def test_first_layer_computes_no_input_gradient_for_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted: list[bool] = []
    original = second_order._convolve_backward

    def spy(*args: Any) -> Any:
        wanted.append(args[-1][0])
        return original(*args)

    monkeypatch.setattr(second_order, "_convolve_backward", spy)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3))
    inputs = leaf(2, 2, 6, 6, dtype=torch.float32)
    with cheap_double_backward():
        loss = model(inputs).square().sum()
    grad(loss, list(model.parameters()), create_graph=True)
    assert wanted == [True, False]  # from the last layer to the first
    wanted.clear()
    grad(loss, [inputs, *model.parameters()])
    assert wanted == [True, True]


@pytest.mark.parametrize("through", ["x", "weight"])
def test_third_derivative_raises(through: str) -> None:
    x, weight = leaf(1, 2, 4, 4), leaf(2, 2, 3, 3)
    with cheap_double_backward():
        loss = F.group_norm(F.conv2d(x, weight), 1).pow(3).sum()
    (first,) = grad(loss, weight, create_graph=True)
    (second,) = grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a third was asked for"):
        grad(second.sum(), {"x": x, "weight": weight}[through])


def test_half_precision_and_unbatched_stay_native() -> None:
    layer = nn.Conv2d(2, 2, 3)
    with cheap_double_backward():
        assert recorded_as(layer, leaf(2, 4, 4).float()) != "_Conv2dBackward"
        half = leaf(1, 2, 4, 4, dtype=torch.bfloat16)
        assert recorded_as(layer.bfloat16(), half) == "ConvolutionBackward0"
        assert recorded_as(nn.GroupNorm(1, 2).bfloat16(), half) == "NativeGroupNormBackward0"


def test_inplace_relu_and_frozen_weights() -> None:
    layer = nn.Conv2d(2, 3, 3).double().requires_grad_(False)
    assert gradgradcheck(
        lambda x: _inside(lambda: nn.ReLU(inplace=True)(layer(x)).square()), leaf(1, 2, 4, 4)
    )


def _inside(function: Callable[[], Tensor]) -> Tensor:
    with cheap_double_backward():
        return function()
