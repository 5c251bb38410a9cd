"""Which layer has no second derivative, and what to put in its place.

The DeepKKT loss differentiates a gradient. Where PyTorch cannot, its message names a kernel, not a
layer of the user's model: here every module is tried alone on the input that it gets in the model,
children before parents, and the first that fails is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsvlib.second_order import cheap_double_backward


def explain_failure(model: nn.Module, inputs: Tensor, error: RuntimeError) -> str:
    """Return one sentence on a double backward that raised `error`: the layer, and the fix."""
    name = layer_without_second_derivative(model, inputs)
    reason = " ".join(str(error).split()).rstrip(".")
    if name is None:
        return (
            f"model: expected operations that can be differentiated twice, got one that cannot "
            f"outside of the single layers; look for it in the model's forward (PyTorch says: "
            f"{reason})"
        )
    kind = type(model.get_submodule(name)).__name__
    return (
        f"model: expected layers that can be differentiated twice, got {name or 'the model'} "
        f"({kind}), which cannot; replace it by one written in PyTorch's own operations, without "
        f"once_differentiable and without a fused kernel (PyTorch says: {reason})"
    )


def check_not_severed(value: Tensor) -> None:
    """Raise RuntimeError if a `once_differentiable` function stands in the graph of `value`.

    PyTorch raises there only when it comes by, and `torch.autograd.grad` with named inputs never
    does: the derivative would be left out without a word.
    """
    todo, seen = [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in ("torch::autograd::Error", "DelayedError"):
            raise RuntimeError("a function marked with once_differentiable is differentiated twice")
        todo += [following for following, _ in node.next_functions]


def layer_without_second_derivative(model: nn.Module, inputs: Tensor) -> str | None:
    """Return the name of the innermost module that cannot be differentiated twice, or None.

    `inputs` is what the model reads, [n, …]. The model is left as it was.
    """
    names = {module: name for name, module in model.named_modules()}
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        seen.append((module, args, kwargs))  # called after the forward pass: children come first

    handles = [m.register_forward_hook(remember, with_kwargs=True) for m in names]
    try:
        with cheap_double_backward(), torch.enable_grad():
            model(inputs.detach())
    except RuntimeError:
        return None
    finally:
        for handle in handles:
            handle.remove()
    for module, args, kwargs in seen:
        if not _twice(module, args, kwargs):
            return names[module]
    return None


def _twice(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the module alone can be differentiated twice in its inputs and parameters."""
    args = tuple(_leaf(value) for value in args)
    kwargs = {key: _leaf(value) for key, value in kwargs.items()}
    wanted = [v for v in (*args, *kwargs.values(), *module.parameters()) if _differentiable(v)]
    try:
        with torch.enable_grad():
            with cheap_double_backward():
                out = module(*args, **kwargs)
            first = _grad(_energy(_tensors(out)), wanted, create_graph=True)
            second = _energy(first)
            if second is not None:
                check_not_severed(second)
            _grad(second, wanted, create_graph=False)
    except RuntimeError:
        return False
    return True


def _grad(value: Tensor | None, wanted: list[Tensor], *, create_graph: bool) -> list[Tensor]:
    if value is None or not value.requires_grad or not wanted:
        return []
    return list(
        torch.autograd.grad(value, wanted, create_graph=create_graph, materialize_grads=True)
    )


def _energy(tensors: list[Tensor]) -> Tensor | None:
    """Return Σ t² over all tensors that have a history, so that every derivative depends on all."""
    terms = [t.square().sum() for t in tensors if t.requires_grad]
    return torch.stack(terms).sum() if terms else None


def _tensors(out: Any) -> list[Tensor]:
    items = out if isinstance(out, tuple | list) else [out]
    return [item for item in items if isinstance(item, Tensor) and item.is_floating_point()]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value
