"""The layer that cannot be differentiated twice is named, whatever it is wrapped in."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPE, Once, build, delicate
from torch import Tensor, nn

from dsvlib._second_derivatives import explain_failure, layer_without_second_derivative

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


def test_model_is_untouched(untouched):
    model = delicate().eval()
    with untouched(model):
        layer_without_second_derivative(model, INPUTS)
