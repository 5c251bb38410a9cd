"""The layer that cannot be differentiated twice is named, whatever it is wrapped in."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPE, Once, build, delicate
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from dsvlib._second_derivatives import (
    explain_failure,
    layer_without_second_derivative,
    twice_differentiable,
)

INPUTS = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()


class Wrapped(nn.Module):
    """Calls the layer by keyword, and adds a tuple, as transformers' blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build("conv-group")
        self.broken = Once()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.body(inputs), None
        return self.broken(inputs=hidden)


def test_the_innermost_layer_is_named():
    assert layer_without_second_derivative(nn.Sequential(Wrapped(), nn.Tanh()), INPUTS) == (
        "0.broken"
    )
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Tanh(), Once(), Once()))
    assert layer_without_second_derivative(model, INPUTS) == "1.1"


@pytest.mark.parametrize("kind", ["dense", "conv", "conv-group", "conv-batch"])
def test_sound_models_have_none(kind):
    assert layer_without_second_derivative(build(kind), INPUTS) is None


def test_a_model_that_fails_by_itself():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build("dense")

        def forward(self, inputs: Tensor) -> Tensor:
            return Once().forward(self.body(inputs))

    message = explain_failure(Bare(), INPUTS, RuntimeError("no derivative."))
    assert "got the model (Bare), which cannot; replace it" in message
    assert message.endswith("(PyTorch says: no derivative)")


def test_without_a_culprit_it_says_so():
    message = explain_failure(build("dense"), INPUTS, RuntimeError("odd"))
    assert "expected operations that can be differentiated twice" in message


@pytest.mark.parametrize(
    "before",
    [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardsigmoid(inplace=True), nn.Hardswish()],
    ids=str,
)
def test_layers_that_write_into_their_input_are_not_blamed(before):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(32, 5)).double()
    model = nn.Sequential(flat, before, nn.Tanh(), Once(), nn.ReLU(inplace=True))
    assert layer_without_second_derivative(model, INPUTS) == "3"
    assert layer_without_second_derivative(model[:3], INPUTS) is None


def test_a_layer_called_twice_and_one_that_returns_a_mapping():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.broken = nn.ReLU(inplace=True), Once()

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": self.act(self.broken(self.act(inputs * 1.0)))}

    assert layer_without_second_derivative(nn.Sequential(Twice()), INPUTS) == "0.broken"


def test_hardsigmoid_is_torchs_own_and_can_be_differentiated_twice():
    x = torch.linspace(-4, 4, 33).double()
    for layer in (nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), nn.functional.hardsigmoid):
        with twice_differentiable():
            found = layer(x.clone())
        torch.testing.assert_close(found, nn.functional.hardsigmoid(x))
    assert layer_without_second_derivative(nn.Sequential(nn.Hardsigmoid()), INPUTS) is None

    def squared(x: Tensor) -> Tensor:
        with twice_differentiable():
            return nn.functional.hardsigmoid(x).square()

    assert gradgradcheck(squared, torch.tensor([-5.0, -1.0, 0.5, 4.0]).double().requires_grad_())


def test_model_is_untouched(untouched):
    model = delicate().eval()
    with untouched(model):
        layer_without_second_derivative(model, INPUTS)
