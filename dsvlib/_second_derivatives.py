"""Second derivatives of anyone's network: what stands in their way, and which layer it is.

The DeepKKT loss differentiates a gradient. PyTorch does that natively for nearly all operations.
The exceptions that have an equal are replaced while a forward pass is recorded; for the others,
PyTorch's message names a kernel and not a layer, so every module is tried alone on the input that
it gets in the model, children before parents, and the first that fails is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode


class twice_differentiable(TorchFunctionMode):  # in lower case, as torch.no_grad
    """Context in which a forward pass is recorded so that it can be differentiated twice.

    Attention becomes matrix products and a softmax: the fused kernels have no second derivative and
    no forward mode. It is done call by call, in this thread alone and whatever kernel the model
    asks for: `torch.nn.attention.sdpa_kernel` would be a switch of the whole process, which two
    overlapping threads leave in the wrong position.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` by its definition, [..., t, d]."""
    if enable_gqa:  # several heads of the query share one of the key
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ value


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``, which is written out where its weights are asked for."""
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    wanted = call.arguments.get("need_weights", True)
    call.arguments["need_weights"] = True
    out, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
    return out, weights if wanted else None


def _hardsigmoid(inputs: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``, whose native backward has no derivative of its own."""
    del inplace  # autograd would need the values that it overwrites
    return (inputs + 3).clamp(0, 6) / 6


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.hardsigmoid: _hardsigmoid,
}


def graph(value: Tensor) -> Iterator[Node]:
    """Yield the nodes that autograd would come by on its way back from `value`."""
    todo, seen = [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def check_not_severed(value: Tensor) -> None:
    """Raise RuntimeError if a `once_differentiable` function stands in the graph of `value`.

    PyTorch raises there only when it comes by, and `torch.autograd.grad` with named inputs never
    does: the derivative would be left out without a word.
    """
    if any(node.name() in ("torch::autograd::Error", "DelayedError") for node in graph(value)):
        raise RuntimeError("a function marked with once_differentiable is differentiated twice")


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


def layer_without_second_derivative(model: nn.Module, inputs: Tensor) -> str | None:
    """Return the name of the innermost module that cannot be differentiated twice, or None.

    `inputs` is what the model reads, [n, …]. The model is left as it was.
    """
    names = {module: name for name, module in model.named_modules()}
    open_calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # leaves of their own now: a layer may write into what it is given
        given = {key: _leaf(value) for key, value in kwargs.items()}
        open_calls.append((module, tuple(map(_leaf, args)), given))

    def leave(*_: Any) -> None:
        seen.append(open_calls.pop())  # children come first

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        with twice_differentiable(), torch.enable_grad():
            model(inputs.detach().clone())
    except Exception:
        return None
    finally:
        for handle in handles:
            handle.remove()
    failing = (names[module] for module, args, kwargs in seen if not _twice(module, args, kwargs))
    return next(failing, None)


def _twice(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the module alone can be differentiated twice in its inputs and parameters."""
    wanted = _with_history([*args, *kwargs.values(), *module.parameters()])
    try:
        with torch.enable_grad():
            with twice_differentiable():
                out = module(*map(_copy, args), **{key: _copy(v) for key, v in kwargs.items()})
            if isinstance(out, Mapping):
                out = list(out.values())
            value = _energy(out if isinstance(out, tuple | list) else [out])
            if value is None or not wanted:
                return True
            first = torch.autograd.grad(value, wanted, create_graph=True, materialize_grads=True)
            value = _energy(first)
            if value is not None:
                check_not_severed(value)
                torch.autograd.grad(value, wanted, materialize_grads=True)
    except RuntimeError:
        return False
    return True


def _energy(values: Sequence[Any]) -> Tensor | None:
    """Return Σ t² over all tensors that have a history, so that every derivative depends on all."""
    terms = [tensor.square().sum() for tensor in _with_history(values)]
    return torch.stack(terms).sum() if terms else None


def _with_history(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
