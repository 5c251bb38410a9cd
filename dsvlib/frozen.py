"""A classifier that is read and never changed: Φ(·; θ) with θ frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dsvlib._second_derivatives import twice_differentiable


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Read the model with dropout off and running statistics, then put every flag back.

    Flags are set one by one: `train()` and `eval()` may be overridden and do more.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the model's first parameter lies on (the CPU if it has none)."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def read_logits(model: nn.Module, theta: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return Φ(inputs; θ), [n, K], ready to be differentiated twice. Every model is called here.

    Raises ValueError for a shape that the model cannot read, or an output that is no [n, K].
    """
    try:
        with twice_differentiable():
            logits: Tensor = functional_call(model, dict(theta), (inputs,))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"inputs: expected a shape that the model can read, got {list(inputs.shape)}; "
            f"compare it with the model's input shape (PyTorch says: {error})"
        ) from error
    if logits.ndim != 2 or len(logits) != len(inputs):
        raise ValueError(
            f"model: expected logits [n, K] for {len(inputs)} inputs, got shape "
            f"{list(logits.shape)}; wrap the model so that it returns one row per sample"
        )
    return logits
