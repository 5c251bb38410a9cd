"""Checks at the public border: each error says what was expected, what came and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

ONE_SCORE = (
    "pass a loss_fn for one that tells two classes apart, or let it return "
    "torch.cat([0 * score, score], dim=1)"
)


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError if `value` holds a NaN or an infinity."""
    finite = torch.isfinite(value)
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(
            f"{name}: expected finite numbers, got {bad} NaN or infinite of {value.numel()}; "
            f"drop or repair those entries"
        )


def check_inputs(inputs: object, name: str = "inputs") -> Tensor:
    """Return `inputs` as a finite float tensor [n, …] with n ≥ 1."""
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor [n, C, H, W], got {type(inputs).__name__}; "
            f"convert it with torch.as_tensor"
        )
    if not inputs.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {inputs.dtype}; "
            f"normalise the images first (load_dataset does)"
        )
    if inputs.ndim < 2 or inputs.shape[0] == 0:
        raise ValueError(
            f"{name}: expected at least one sample, shape [n, C, H, W], "
            f"got shape {list(inputs.shape)}; add the batch dimension or some samples"
        )
    check_finite(name, inputs.detach())
    return inputs


def as_labels(labels: Tensor | Sequence[int]) -> Tensor:
    """Return labels as int64 [n] or as float rows [n, K] that sum to 1.

    Accepts a tensor, an array or a plain sequence of class numbers.
    """
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:  # names, None, a set, a dict
            raise TypeError(
                f"labels: expected class numbers from 0, one for each sample, got "
                f"{type(labels).__name__} {str(labels)[:60]}; number the names, e.g. "
                f"[names.index(label) for label in labels]"
            ) from error
    if labels.numel() == 0:
        raise ValueError("labels: expected at least one label, got none; name the classes you want")
    if labels.is_floating_point():
        if labels.ndim != 2:
            raise ValueError(
                f"labels: expected soft labels of shape [n, K], got {list(labels.shape)}; "
                f"hard labels must be int64 [n]"
            )
        check_finite("labels", labels)
        sums = labels.sum(dim=1)
        if bool((labels < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            worst = float(sums[(sums - 1).abs().argmax()])
            raise ValueError(
                f"labels: expected soft labels ≥ 0 with rows that sum to 1, got a row that sums "
                f"to {worst:.4g} (smallest entry {float(labels.min()):.4g}); divide each row by "
                f"its sum"
            )
        return labels
    if labels.dtype == torch.bool or labels.ndim != 1:
        raise ValueError(
            f"labels: expected int64 [n] or float [n, K], got {labels.dtype} "
            f"{list(labels.shape)}; use class numbers or rows of probabilities"
        )
    return labels.to(torch.int64)


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError if labels do not fit a classifier with `num_classes` outputs."""
    if labels.is_floating_point():
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"labels: expected soft labels over the model's {num_classes} classes, got "
                f"{labels.shape[1]} columns; pass one column per class"
            )
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        from_one = lowest == 1 and highest == num_classes
        raise ValueError(
            f"labels: expected class numbers from 0 to {num_classes - 1}, got {wrong}; "
            f"the model has {num_classes} outputs"
            + (f" ({ONE_SCORE})" if num_classes == 1 else "")
            + (": subtract 1 from labels that start at 1" if from_one else "")
        )


def check_same_length(**lengths: int) -> None:
    """Raise ValueError if the named lengths differ."""
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise ValueError(f"expected one entry per sample in each, got {got}; make them equal")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError if `value` is none of `choices`, naming the nearest."""
    options = list(choices)
    if value not in options:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}"
            f"{suggestion(str(value), options)}"
        )


def suggestion(value: str, options: Iterable[str]) -> str:
    """Return '; did you mean …?' for the nearest option, or nothing."""
    import difflib  # rarely needed: only on the way to an error

    near = difflib.get_close_matches(value, list(options), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_number(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise if `value` is no finite number, or lies outside the range given."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name}: expected a number, got {type(value).__name__} {value!r}; pass an int or float"
        )
    inside = (
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not (inside and abs(value) != float("inf")):  # a NaN fails every comparison above
        limits = [f"≥ {at_least:g}" if at_least is not None else f"> {above or 0:g}"]
        limits += [] if below is None else [f"< {below:g}"]
        raise ValueError(
            f"{name}: expected a finite number {' and '.join(limits)}, got {value!r}; choose one "
            f"in range"
        )


def check_count(name: str, value: int, *, at_least: int = 1) -> None:
    """Raise if `value` is no whole number, or lies below `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name}: expected a whole number, got {type(value).__name__} {value!r}; pass an int"
        )
    check_number(name, value, at_least=at_least)


def check_bounds(
    bounds: tuple[Tensor, Tensor] | tuple[float, float] | None, shape: tuple[int, ...], like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return (low, high) as tensors that broadcast over [n, *shape], with `like`'s device, dtype.

    Raises ValueError for other forms than numbers or one per channel, or low ≥ high.
    """
    if bounds is None:
        return None
    try:
        low, high = (torch.as_tensor(b, dtype=like.dtype, device=like.device) for b in bounds)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"bounds: expected a pair (low, high), got {type(bounds).__name__} {bounds!r}; "
            f"Dataset.bounds has the right form"
        ) from error
    for name, bound in (("low", low), ("high", high)):
        check_finite(f"bounds {name}", bound)
        if bound.ndim > 1 or bound.numel() not in (1, shape[0]):
            raise ValueError(
                f"bounds: expected (low, high) as numbers or one per channel [{shape[0]}], got "
                f"{name} of shape {list(bound.shape)}; Dataset.bounds has the right form"
            )
    low, high = (b.reshape(-1, *(1,) * (len(shape) - 1)) for b in (low, high))
    if bool((low >= high).any()):
        raise ValueError("bounds: expected low < high in every channel; swap them")
    return low, high


def as_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return a CPU generator: the one given, or a fresh one with seed 0."""
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        seed = generator if isinstance(generator, int) else 0
        raise TypeError(
            f"generator: expected a torch.Generator on the CPU, got {type(generator).__name__} "
            f"{generator}; pass torch.Generator().manual_seed({seed})"
        )
    return generator


def labels_to(labels: Tensor, target: torch.device | str | torch.dtype) -> Tensor:
    """Return labels on a device, or in a dtype where they are soft: class numbers stay int64."""
    if isinstance(target, torch.dtype) and not labels.is_floating_point():
        return labels
    return labels.to(target)


def check_steps_possible(theta: Tensor) -> None:
    """Raise ValueError for float16, in which Adam's ε is 0 and a slope of 0 gives 0/0."""
    if theta.dtype == torch.float16:
        raise ValueError(
            "model: expected parameters in float32, float64 or bfloat16 to take Adam steps, got "
            "float16, in which they are not finite; convert it with model.float()"
        )


def check_gradients_on() -> None:
    """Raise ValueError under torch.inference_mode, which nothing inside of it can leave."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "expected a place where gradients can be taken, got torch.inference_mode; call this "
            "outside of it (torch.no_grad may stay)"
        )


def check_shaped(named: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a lazy layer's parameters, which have no shape yet."""
    for name, value in named.items():
        if nn.parameter.is_lazy(value):
            raise ValueError(
                f"model: expected parameters that have a shape, got {name!r} of a lazy layer; call "
                f"the model once on a batch of inputs where it is built"
            )


def _check_parameter(name: str, value: Tensor) -> None:
    if value.is_inference():
        raise ValueError(
            f"model: expected parameters that can be differentiated, got {name!r}, made under "
            f"torch.inference_mode; build or load the model outside of it"
        )
    if value.is_complex():
        raise ValueError(
            f"model: expected real parameters, got {value.dtype} in {name!r}; write them as pairs "
            f"of real ones"
        )


def select_params(model: nn.Module, params: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the parameters θ that conditions are taken over, checked against the model.

    `None` means all parameters that require grad; a subset restricts every sum to it.
    """
    named = dict(model.named_parameters())
    check_shaped(named)
    for name, parameter in named.items():
        _check_parameter(name, parameter)
    if params is None:
        chosen: dict[str, Tensor] = {k: p for k, p in named.items() if p.requires_grad}
    else:
        chosen = dict(params)
    if not chosen:
        raise ValueError(
            f"params: expected a model with at least one parameter that requires grad, got "
            f"{len(named)} parameters and none that does; call model.requires_grad_(True) or "
            f"pass params=dict(model.named_parameters())"
        )
    for name, value in chosen.items():
        if name not in named:
            raise ValueError(
                f"params: expected names of the model's parameters, got {name!r}"
                f"{suggestion(name, named)}"
            )
        if value.shape != named[name].shape:
            raise ValueError(
                f"params[{name!r}]: expected shape {list(named[name].shape)}, got "
                f"{list(value.shape)}; take the tensor from dict(model.named_parameters())"
            )
    return chosen
