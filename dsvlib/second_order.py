"""Cheap second derivatives: the operations under a weighted gradient, recorded another way.

The DeepKKT loss differentiates a gradient: g = ∇_θ Σ_i λ_i L(Φ(x_i; θ), y_i) is built with
``create_graph=True``, a distance D(θ, −g) is taken, and D is differentiated in x and λ. PyTorch can
do that for most operations, at a price. Inside ``cheap_double_backward()`` the forward pass is
recorded with formulations whose second derivative costs little more than a first one:

- convolution: ∂O = I ∗ ∂W + ∂I ∗ W and ∂I = ∂W ⋆ O by the ordinary forward and input-gradient
  kernels, in the memory layout the CPU kernels like, and only where somebody asks;
- group and instance normalisation: closed forms whose every term is linear in (v, dy, x), with
  coefficients that need only one sum per channel and sample (``_GroupNormBackward``);
- ReLU: no zeros computed and added for the derivative of its step;
- attention: the math kernel, because the fused ones have no second derivative at all (torch says
  "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented").

Layer norm, pooling and the rest stay native: their second derivatives are already one kernel each.
Values and first derivatives are those of the native operations; the forward pass is the native
kernel in the layout the model came in, so that no ReLU flips by a rounding error. A *third*
derivative through a rewritten operation raises. On CUDA, in half precision, under torch.func
transforms and for transposed, 1-d and 3-d convolutions everything but attention stays native.

Shapes: images [n, c, h, w]; normalised tensors are seen as [n, c, p] with p positions, one row for
each sample and channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
_Sizes = tuple[int, int]


class cheap_double_backward(TorchFunctionMode):  # in lower case, as torch.no_grad
    """Context in which a forward pass is recorded for a cheap double backward.

    Only the forward pass has to run inside; the two backward passes may follow outside.

    >>> with cheap_double_backward():
    ...     loss = (multipliers * F.cross_entropy(model(inputs), labels, reduction="none")).sum()
    >>> gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    """

    def __enter__(self) -> Self:
        # nn.MultiheadAttention reaches the attention kernel from inside a function that this mode
        # is already serving, where it sees no calls. The backend switch reaches it everywhere.
        self._math_attention = sdpa_kernel(SDPBackend.MATH)
        self._math_attention.__enter__()
        return cast(Self, super().__enter__())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        self._math_attention.__exit__(exc_type, exc_value, traceback)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _REWRITTEN.get(func, func)(*args, **(kwargs or {}))


def _rewritable(x: Tensor) -> bool:
    # On CUDA the native kernels and layouts are another story, which we have not measured; in half
    # precision the CPU kernels mix types. Both keep the native operation: right, if not cheap.
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and not torch._C._functorch.peek_interpreter_stack()  # vmap, jvp: no Function of ours
    )


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, compute: Callable[[], Any], *_tensors: Tensor | None) -> Any:
        return compute()

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> Any:
        raise RuntimeError(
            "cheap_double_backward() records two derivatives, and a third was asked for; "
            "run the forward pass outside it"
        )


def _last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's backward compute without a graph, and any derivative of it raise.

    Torch's own ``once_differentiable`` looks at the cotangents only: a derivative that comes in
    through a saved tensor would pass it by and be left out without a word.
    """

    def guarded(ctx: Any, *cotangents: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *cotangents)
        tensors = (*cotangents, *ctx.saved_tensors)
        return _Last.apply(  # type: ignore[no-untyped-call]
            lambda: backward(ctx, *cotangents), *tensors
        )

    return guarded


# Convolution -------------------------------------------------------------------------------------


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with a second derivative made of ordinary convolutions."""
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
        if any(r % 2 for r in reach):  # lopsided: native pads first
            return F.conv2d(x, weight, bias, stride, "same", dilation, groups)
        padding = [r // 2 for r in reach]
    if not _rewritable(x) or x.dim() != 4 or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    shape = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return cast(Tensor, _Conv2d.apply(x, weight, bias, shape))  # type: ignore[no-untyped-call]


def _pair(value: int | Sequence[int]) -> _Sizes:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


_Shape = tuple[_Sizes, _Sizes, _Sizes, int]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape) -> Tensor:
    stride, padding, dilation, groups = shape
    out = _aten.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return cast(Tensor, out)


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, shape: _Shape, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = shape
    grads = _aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, dilation, False, (0, 0), groups, wanted
    )
    return cast(tuple[Tensor | None, Tensor | None, Tensor | None], grads)


def _laid_out_as(model: Tensor, x: Tensor) -> Tensor:
    # Of two layouts the kernels copy the first argument to that of the second; x is the smaller.
    return (
        x.contiguous() if model.is_contiguous() else x.contiguous(memory_format=torch.channels_last)
    )


def _is_asked(ctx: Any, index: int) -> bool:
    """Whether this backward pass will use the gradient of input ``index``.

    ``needs_input_grad`` says only that the input requires one. The first pass asks for ∇_θ alone,
    but x requires grad for the second: without this the first layer would compute ∇_x for nothing,
    as native operations do not.
    """
    if not ctx.needs_input_grad[index]:
        return False
    will_execute = getattr(torch._C, "_will_engine_execute_node", None)
    if will_execute is None:
        return True
    try:
        return bool(will_execute(ctx.next_functions[index][0]))
    except (
        RuntimeError
    ):  # torch declines to answer for a leaf that autograd.grad() was given: asked
        return True


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        # x may be channels-last of our making; the sum runs in the model's own layout, to the same
        # last bit as natively. (A ReLU flipped by a rounding error changes the result by 1e-3.)
        return _convolve(x.contiguous() if weight.is_contiguous() else x, weight, bias, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = (_is_asked(ctx, 0), _is_asked(ctx, 1), ctx.needs_input_grad[2])
        grads = _Conv2dBackward.apply(  # type: ignore[no-untyped-call]
            grad, x, weight, ctx.shape, wanted
        )
        return *grads, None


class _Conv2dBackward(torch.autograd.Function):
    """(grad, x, W) ↦ (∂x, ∂W, ∂b); its cotangents are u, V, s.

    The gradient of ⟨u, ∂x⟩ + ⟨V, ∂W⟩ + ⟨s, ∂b⟩ is, since each term is linear in all it contains,
    x ∗ V + u ∗ W + s for ``grad``, the input gradient at weight V for x, and the weight gradient at
    input u for W. Natively the middle one treats ``grad`` as a kernel the size of an image.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, shape: _Shape, wanted: Sequence[bool]
    ) -> Any:
        ctx.save_for_backward(grad, x, weight)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return _convolve_backward(grad, _laid_out_as(grad, x), weight, shape, wanted)

    @staticmethod
    @_last_derivative
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        grad, x, weight = ctx.saved_tensors
        to_grad: Tensor | None = None
        to_x: Tensor | None = None
        to_weight: Tensor | None = None
        if _is_asked(ctx, 0):
            if v is not None:
                last = torch.channels_last  # the faster layout by far for few input channels
                x_last, v_last = x.contiguous(memory_format=last), v.contiguous(memory_format=last)
                to_grad, s = _convolve(x_last, v_last, s, ctx.shape), None
            if u is not None:
                term = _convolve(u, weight, s, ctx.shape)
                to_grad, s = term if to_grad is None else to_grad.add_(term), None
            if s is not None:
                to_grad = s.view(-1, 1, 1).expand_as(grad)
        if v is not None and _is_asked(ctx, 1):
            x = _laid_out_as(grad, x)
            to_x = _convolve_backward(grad, x, v, ctx.shape, (True, False, False))[0]
        if u is not None and _is_asked(ctx, 2):
            to_weight = _convolve_backward(grad, u, weight, ctx.shape, (False, True, False))[1]
        return to_grad, to_x, to_weight, None, None


# ReLU --------------------------------------------------------------------------------------------


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``, moved to channels-last where it follows a convolution directly.

    From there on to the next convolution (activation, pooling, and the backward of both) that is
    the cheaper layout. After a normalisation it is not: the closed form wants contiguous rows, and
    two changes of layout a pass cost what the pooling gains.
    """
    if inplace or not _rewritable(x):
        return F.relu(x, inplace=inplace)
    if x.dim() == 4 and x.grad_fn is not None and x.grad_fn.name() == "_Conv2dBackward":
        x = x.contiguous(memory_format=torch.channels_last)
    return cast(Tensor, _Relu.apply(x))  # type: ignore[no-untyped-call]


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Detached, since natively the second derivative fills a tensor with the zeros of the step's
        # derivative, and adds it.
        (out,) = ctx.saved_tensors
        return cast(Tensor, _aten.threshold_backward(grad, out.detach(), 0))


# Attention ---------------------------------------------------------------------------------------


def _by_math_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with attention as matrix products and a softmax, [n, heads, t, t] in full.

    The context does this for every call already. Chosen once more at the call itself, it also holds
    inside a model whose forward pass asks for another kernel with an ``sdpa_kernel`` of its own.
    """

    def attend(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return attend


# Normalisation -----------------------------------------------------------------------------------


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm`` with closed-form first and second derivatives."""
    # A channels-last model keeps the native forward (same last bit) and pays for it.
    if not _rewritable(x) or not x.is_contiguous() or x.dim() < 3 or x.numel() == 0:
        return F.group_norm(x, num_groups, weight, bias, eps)
    if x.shape[1] % num_groups:  # let torch say so
        return F.group_norm(x, num_groups, weight, bias, eps)
    out = _GroupNorm.apply(x, weight, bias, num_groups, eps)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``; without running statistics it is group norm, one channel a group."""
    if running_mean is None and running_var is None and use_input_stats and x[0, 0].numel() > 1:
        return _group_norm(x, x.shape[1], weight, bias, eps)
    return F.instance_norm(
        x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> Tensor:
        n, c = x.shape[:2]
        p = x[0, 0].numel()
        out, mean, rstd = _aten.native_group_norm(x, weight, bias, n, c, p, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        grads = _GroupNormBackward.apply(  # type: ignore[no-untyped-call]
            dy.contiguous(), *ctx.saved_tensors
        )
        wanted = ctx.needs_input_grad[:3]
        return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None


def _row_sums(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, with_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Native backward kernel over rows: (∂x, Σ grad·x̂, Σ grad), the sums [n, c] per row.

    The kernel sums its weight gradients over the batch; told that the n·c rows are the channels of
    one sample, it returns them before that sum, and the second derivative needs them so.
    """
    n, c = x.shape[:2]
    gamma = None if gamma is None else gamma.repeat(n)
    dx, dot, total = _aten.native_group_norm_backward(
        grad, x, mean.view(1, -1), rstd.view(1, -1), gamma,
        1, n * c, x[0, 0].numel(), mean.numel(), (with_dx, True, True),
    )  # fmt: skip
    return dx, dot.view(n, c), total.view(n, c)


class _GroupNormBackward(torch.autograd.Function):
    """(dy, x, γ) ↦ (dx, dγ, dβ); its cotangents are v, p, q.

    With x̂ = r(x − μ), h = γ·dy, ⟨·⟩ the mean over a group of m numbers and
    P(h) = r(h − ⟨h⟩ − x̂⟨h x̂⟩), the first derivative is dx = P(h), dγ = Σ dy·x̂, dβ = Σ dy.
    P is self-adjoint, ∂x̂ = P(∂x), ∂r = −r²⟨x̂ ∂x⟩; so ⟨v, dx⟩ + ⟨p, dγ⟩ + ⟨q, dβ⟩ has the gradients

        to dy:  γ P(v) + p x̂ + q
        to x:   P(p dy − r⟨v x̂⟩ h − r⟨h x̂⟩ v) − r² x̂ (⟨v h⟩ − ⟨v⟩⟨h⟩ − ⟨v x̂⟩⟨h x̂⟩)
        to γ:   Σ dy·P(v).

    Written out, each is a sum of v, dy and x̂ with coefficients constant in a row.
    """

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
    ) -> Any:
        dx, dot, total = _row_sums(dy, x, mean, rstd, weight, True)
        ctx.save_for_backward(dy, x, weight, mean, rstd, dot, total)
        return dx, dot.sum(0), total.sum(0)

    @staticmethod
    @_last_derivative
    def backward(ctx: Any, v: Tensor, p: Tensor, q: Tensor) -> Any:
        dy, x, weight, mean, rstd, dy_xhat, dy_sum = ctx.saved_tensors
        given, v = v, v.contiguous()
        n, c = x.shape[:2]
        groups = mean.shape[1]
        m = x.numel() // mean.numel()
        gamma = torch.ones_like(p) if weight is None else weight

        def group_mean(row: Tensor) -> Tensor:  # [n, c] sums of rows -> [n, c] mean of their group
            return (row.view(n, groups, -1).sum(2) / m).repeat_interleave(c // groups, 1)

        mu, r = (t.view(n, groups).repeat_interleave(c // groups, 1) for t in (mean, rstd))
        _, v_xhat, v_sum = _row_sums(v, x, mean, rstd, None, False)
        product = v * dy
        v_dy = product.view(n, c, -1).sum(2)
        mean_v, mean_v_xhat = group_mean(v_sum), group_mean(v_xhat)
        mean_h, mean_h_xhat = group_mean(gamma * dy_sum), group_mean(gamma * dy_xhat)

        def combine(
            out: Tensor, xhat: Tensor, one: Tensor, *terms: tuple[Tensor, Tensor]
        ) -> Tensor:
            # Σ aᵢ tᵢ + xhat·x̂ + one, into `out`, which may be the first t. Memory just freed and
            # taken again costs more (page faults) than the arithmetic, hence the reuse.
            rows = [(a.view(n, c, 1), t.view(n, c, -1)) for a, t in (*terms, (xhat * r, x))]
            flat = torch.mul(*rows[0], out=out.view(n, c, -1))
            for a, t in rows[1:]:
                flat.addcmul_(t, a)
            return flat.add_((one - xhat * r * mu).view(n, c, 1)).view_as(x)

        s = p - r * mean_v_xhat * gamma
        t = r * mean_h_xhat
        to_dy = to_x = to_gamma = None
        if ctx.needs_input_grad[0]:
            to_dy = combine(product, s, q - r * gamma * mean_v, (r * gamma, v))
        if ctx.needs_input_grad[1]:
            spread = group_mean(gamma * v_dy) - mean_v * mean_h - mean_v_xhat * mean_h_xhat
            mean_u = group_mean(s * dy_sum - t * v_sum)
            mean_u_xhat = group_mean(s * dy_xhat - t * v_xhat)
            xhat = -r * (mean_u_xhat + r * spread)
            own = torch.empty_like(x) if given is v else v
            to_x = combine(own, xhat, -r * mean_u, (-r * t, v), (r * s, dy))
        if ctx.needs_input_grad[2]:
            to_gamma = (r * (v_dy - mean_v * dy_sum - mean_v_xhat * dy_xhat)).sum(0)
        return to_dy, to_x, to_gamma, None, None


_REWRITTEN: dict[Any, Callable[..., Any]] = {
    F.conv2d: _conv2d,
    F.relu: _relu,
    torch.relu: _relu,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.scaled_dot_product_attention: _by_math_kernel(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _by_math_kernel(F.multi_head_attention_forward),
}
