"""A classifier that is read and never changed: Φ(·; θ) with θ frozen.

Networks are other people's: they may write into what they are given, count their calls, return more
than logits, or stand inside a wrapper. `read_logits` is the one door through which they are called.
"""

from __future__ import annotations

import dis
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dsvlib._second_derivatives import twice_differentiable


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Read the model with dropout off and running statistics, then put flags and buffers back.

    Flags are set one by one: `train()` and `eval()` may be overridden and do more. A network that
    counts its calls or observes their range changes buffers even so; they get their values back.
    Raises TypeError for what torch.jit compiled.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model: expected a network in Python, got {name or 'one'} compiled by torch.jit, "
                f"whose weights cannot be replaced; pass the module that it was made from"
            )
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    values = [(b, b.clone()) for _, _, own in modules for b in own.values() if b is not None]
    try:
        for module, _, _ in modules:
            module.training = False
        yield
    finally:
        for module, training, buffers in modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, before in values:
                # a graph may still need the buffer: it is written to only where it changed
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the model's first parameter lies on (the CPU if it has none)."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def read_logits(model: nn.Module, theta: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return Φ(inputs; θ), [n, K], ready to be differentiated twice.

    `theta` has parameters by name (the rest are the model's own). The network gets copies of the
    inputs and of its buffers, and whatever it writes into them is forgotten.

    Raises ValueError for a shape that the model cannot read, ValueError or TypeError for an output
    without logits [n, K]; an error of the network's own passes, with a note on where it came from.
    """
    network, prefix = unwrapped(model)
    state = {name.removeprefix(prefix): value for name, value in theta.items()}
    state |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        with _UNCOMPILED, twice_differentiable():
            output = functional_call(network, state, (inputs.clone(),))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if _is_about_shapes(error):
            raise ValueError(
                f"inputs: expected a shape that the model can read, got {list(inputs.shape)}; "
                f"compare it with the model's input shape (PyTorch says: {error})"
            ) from error
        error.add_note(f"Raised in the model's forward pass, on inputs {list(inputs.shape)}.")
        raise
    logits = as_logits(output)
    if logits.ndim != 2 or len(logits) != len(inputs):
        raise ValueError(
            f"model: expected logits [n, K] for {len(inputs)} inputs, got shape "
            f"{list(logits.shape)}; wrap the model so that it returns one row per sample"
        )
    return logits


def as_logits(output: object) -> Tensor:
    """Return the logits that a forward pass returned: itself, its `.logits` or its "logits"."""
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = found.get("logits", found)
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    kind = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
    if isinstance(found, Mapping):
        kind += f" with {', '.join(map(repr, found)) or 'nothing'}"
    elif isinstance(found, tuple | list):
        kind += f" of {len(found)}"
    raise TypeError(
        f"model: expected a float tensor of logits [n, K], an output with .logits or a mapping "
        f"with 'logits', got {kind}; wrap the model so that it returns the logits alone"
    )


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the network that DataParallel or torch.compile wrapped, and what its names begin with.

    It shares its weights with the wrapper, which puts a prefix before their names.
    """
    prefix = ""
    while True:
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        name = "module" if parallel else "_orig_mod"
        inner = getattr(model, name, None)
        if not isinstance(inner, nn.Module):
            return model, prefix
        model, prefix = inner, f"{prefix}{name}."


class _Uncompiled:
    """Run compiled networks uncompiled: compiled code has no second derivative.

    PyTorch has one switch for the process. The first that enters turns it and the last that leaves
    turns it back, so that overlapping threads leave it as it was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            # where nothing was compiled, the import would take seconds
            if self._stance is None and "torch._dynamo" in sys.modules:
                stance = torch.compiler.set_stance("force_eager")
                stance.__enter__()
                self._stance = stance

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_UNCOMPILED = _Uncompiled()


def _is_about_shapes(error: Exception) -> bool:
    """Whether PyTorch raised this over sizes, and no ``raise`` in the network did."""
    if not isinstance(error, RuntimeError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None:
        raised = trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        if raised:
            return False
    return bool(re.search(r"shape|size|channel|dimension|multipl", str(error)))
