"""Training of classifiers, from scratch to (nearly) stationary ones, and their accuracy.

With cross-entropy and explicit L2 weight decay w, a stationary point of
(1/n) Σ Lᵢ + (w/2)‖θ‖² satisfies θ = −(1/(w·n)) Σᵢ ∇Lᵢ: the DeepKKT stationarity condition holds
exactly with all λᵢ = 1/(w·n). This is why decay is part of the gradient here and never decoupled.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from dsvlib._progress import progress_bar
from dsvlib._schedule import Schedule, learning_rate_factor
from dsvlib._validation import (
    as_generator,
    as_labels,
    check_choice,
    check_count,
    check_gradients_on,
    check_inputs,
    check_label_range,
    check_number,
    check_same_length,
)
from dsvlib.augmentation import AugmentationConfig, augment
from dsvlib.classifiers.adversarial import AdversarialConfig, attack
from dsvlib.data.datasets import AnySplit, as_split
from dsvlib.data.datasets import Labelled as Labelled
from dsvlib.frozen import as_logits, device_of, evaluation_mode, read_logits
from dsvlib.logits import LossFn, check_scores, cross_entropy, is_feasible, predict


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train a classifier.

    epochs, batch_size
        Passes over the data, and samples per step.
    optimizer
        ``"sgd"`` (with `momentum`) or ``"adam"``; `weight_decay` w enters the gradient as w·θ.
    schedule
        ``"constant"``, ``"cosine"`` to zero, ``"one-cycle"`` (linear up over the first fifth, then
        linear to zero), or ``"halfway"`` (×0.1 once, at half of the steps: the field's protocol).
    augmentation
        Drawn anew for every sample of every batch; None for none.
    adversarial
        Train on images moved against the classifier instead (`AdversarialConfig`); None for none.
    average_epochs
        The weights are the mean over the steps of so many last epochs (Polyak and Juditsky 1992),
        which takes the noise of the batches out of them; 0 for the weights of the last step.
    polish_steps
        Full-batch gradient steps after the epochs, which bring a small network close to a
        stationary point of the regularised loss.
    precision
        Of the forward and backward passes of the epochs: ``"bfloat16"`` takes half as long on large
        networks; weights and updates stay as they are. Processors that would have to emulate it,
        at ten times the time, stay at ``"float32"``. The polish is always in full precision.
    log_every
        Epochs between rows of the history (the last epoch is always logged).
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    augmentation: AugmentationConfig | None = None
    adversarial: AdversarialConfig | None = None
    average_epochs: int = 0
    polish_steps: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: int = 1

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        check_choice("optimizer", self.optimizer, ("sgd", "adam"))
        check_choice("schedule", self.schedule, ("constant", "cosine", "one-cycle", "halfway"))
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("momentum", self.momentum, at_least=0, below=1)
        check_number("weight_decay", self.weight_decay, at_least=0)
        for name in ("epochs", "average_epochs", "polish_steps"):
            check_count(name, getattr(self, name), at_least=0)
        if self.average_epochs > self.epochs:
            raise ValueError(
                f"average_epochs: expected at most epochs={self.epochs}, got "
                f"{self.average_epochs}; average over fewer epochs"
            )
        for name in ("batch_size", "log_every"):
            check_count(name, getattr(self, name))


@torch.enable_grad()
def train(
    model: nn.Module,
    split: AnySplit,
    *,
    config: TrainConfig | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
    on_batch: Callable[[Tensor, Tensor], None] | None = None,
) -> pd.DataFrame:
    """Train `model` in place and return its history (epoch, loss, accuracy, learning_rate).

    Parameters
    ----------
    split
        A `Split` or a `SupportSet` (soft labels are allowed; multipliers are not read), or any
        torch Dataset or DataLoader of (image, label), read into memory once.
    loss_fn
        ``loss_fn(logits, labels) -> [n]``, one loss per sample without reduction; default:
        cross-entropy. With another one, labels are handed on as they are (several per sample, too).
    generator
        A CPU generator for batches and augmentation; default: a fresh one with seed 0.
    on_batch
        Called after each batch with the sample indices and which of them were classified right.

    Raises ValueError for wrong shapes or labels, for a model without gradients, and for a last
    batch of one under batch norm; FloatingPointError when training diverges.
    """
    check_gradients_on()
    config = config or TrainConfig()
    generator = as_generator(generator)
    split = as_split(split)
    inputs, labels = _check_split(split, loss_fn)
    losses_of = loss_fn or cross_entropy
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "model: expected parameters that require grad, got none; "
            "call model.requires_grad_(True)"
        )
    device = device_of(model)
    inputs, labels = inputs.detach().to(device), labels.detach().to(device)
    logits = logits_of(model, inputs[:1])
    if loss_fn is None:
        check_label_range(labels, logits.shape[1])
        check_scores(logits)
    else:
        _check_losses(loss_fn(logits, labels[:1]))
    _check_last_batch(model, inputs, config.batch_size)
    mean, std = getattr(split, "mean", ()), getattr(split, "std", ())
    if config.adversarial is not None and not std:
        raise ValueError(
            "adversarial: expected a split that knows how its pixels were normalised, got one "
            "without mean and std; pass Split(inputs, labels, mean, std)"
        )
    optimizer, scheduler = _optimizer(trained, config, len(inputs))
    averaged = AveragedModel(model, use_buffers=True) if config.average_epochs else None
    rows = []
    half = config.precision == "bfloat16" and computes_bfloat16(device)
    with _fast_layout(model), _training_mode(model, generator.initial_seed()):
        for epoch in progress_bar(range(1, config.epochs + 1), "training"):
            summed = torch.zeros(2, device=device)  # loss and hits, read once per epoch
            used_rate = scheduler.get_last_lr()[0]
            for batch in _batches(len(inputs), config.batch_size, generator):
                x, y = inputs[batch], labels[batch]
                if config.augmentation is not None:
                    x = augment(x, config.augmentation, generator=generator)
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    if config.adversarial is not None:
                        x = attack(model, x, y, config=config.adversarial, mean=mean, std=std,
                                   loss_fn=losses_of, generator=generator)  # fmt: skip
                    logits = as_logits(model(x))
                logits = logits.to(x.dtype)
                losses = losses_of(logits, y)
                optimizer.zero_grad(set_to_none=True)
                losses.mean().backward()
                optimizer.step()
                scheduler.step()
                if averaged is not None and epoch > config.epochs - config.average_epochs:
                    averaged.update_parameters(model)
                hits = is_feasible(logits.detach(), y)
                summed += torch.stack([losses.detach().sum(), hits.sum()])
                if on_batch is not None:
                    on_batch(batch, hits.cpu())
            loss, accuracy = (summed / len(inputs)).tolist()
            _check_finite(loss, epoch, config)
            if epoch % config.log_every == 0 or epoch == config.epochs:
                rows.append((epoch, loss, accuracy, used_rate))
    if averaged is not None:
        model.load_state_dict(averaged.module.state_dict())
    if config.polish_steps:
        _polish(model, trained, inputs, labels, config, losses_of)
    optimizer.zero_grad(set_to_none=True)
    return pd.DataFrame(rows, columns=["epoch", "loss", "accuracy", "learning_rate"])


@torch.enable_grad()
def train_together(
    models: Sequence[nn.Module],
    split: AnySplit,
    *,
    config: TrainConfig,
    generators: Sequence[torch.Generator],
) -> str | None:
    """Train M `models` in place, all in one pass, each as `train` does with its own generator.

    Weights and buffers are stacked, [M, *shape], and vmap reads M batches, [M, b, *sample], at
    once; the optimisers work entry by entry, so that a stack changes nothing. A first pass is held
    against each model by itself. Returns None; or, with nothing changed, in words why these models
    have to be trained one after the other.
    """
    if config.adversarial is not None or config.average_epochs or config.polish_steps:
        return "adversarial images, averages and the polish are for one network alone"
    if config.precision != "float32":
        return "bfloat16 is for one network alone"
    check_gradients_on()
    inputs, labels = _check_split(as_split(split))
    device = device_of(models[0])
    inputs, labels = inputs.detach().to(device), labels.detach().to(device)
    check_scores(logits_of(models[0], inputs[:1]))
    _check_last_batch(models[0], inputs, config.batch_size)

    def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return as_logits(functional_call(models[0], (weights, buffers), (x,)))

    read = vmap(one)  # raises where numbers are drawn inside, as by dropout
    with _training_mode(nn.ModuleList(models), generators[0].initial_seed()):
        try:
            weights, buffers = stack_module_state(list(models))
            if not _reads_alike(read, models, weights, buffers, inputs[: config.batch_size]):
                return "logits or buffers differ from those of each network by itself"
        except Exception as error:  # networks that torch.func cannot transform, or too many
            return " ".join(str(error).split())[:200]
        trained = [value for value in weights.values() if value.requires_grad]
        if not trained:
            return "no parameter requires grad"
        optimizer, scheduler = _optimizer(trained, config, len(inputs))
        for epoch in progress_bar(range(1, config.epochs + 1), "training together"):
            summed = torch.zeros((), device=device)
            orders = [_batches(len(inputs), config.batch_size, own) for own in generators]
            for batches in zip(*orders, strict=True):
                batch = torch.stack(batches)
                x, y = inputs[batch], labels[batch]
                if config.augmentation is not None:
                    x = torch.stack(
                        [
                            augment(own, config.augmentation, generator=generator)
                            for own, generator in zip(x, generators, strict=True)
                        ]
                    )
                logits = read(weights, buffers, x).to(x.dtype).flatten(0, 1)
                losses = cross_entropy(logits, y.flatten(0, 1)).unflatten(0, batch.shape)
                optimizer.zero_grad(set_to_none=True)
                losses.mean(dim=1).sum().backward()
                optimizer.step()
                scheduler.step()
                summed += losses.detach().sum()
            _check_finite(float(summed) / (len(models) * len(inputs)), epoch, config)
    with torch.no_grad():
        for number, model in enumerate(models):
            for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
                value.copy_((weights if name in weights else buffers)[name][number])
    return None


def _reads_alike(
    read: Callable[..., Tensor],
    models: Sequence[nn.Module],
    weights: dict[str, Tensor],
    buffers: dict[str, Tensor],
    x: Tensor,
) -> bool:
    """Whether one pass over stacked networks gives the logits and buffers of each by itself."""
    stacked = {name: value.clone() for name, value in buffers.items()}
    logits = read(weights, stacked, torch.stack([x] * len(models))).detach()
    pairs = []
    for number, model in enumerate(models):
        alone = copy.deepcopy(model)
        with torch.no_grad():
            pairs.append((logits[number], as_logits(alone(x.clone()))))
        pairs += [(stacked[name][number], value) for name, value in alone.named_buffers()]
    return all(
        torch.equal(found, own) or bool((found - own).abs().max() <= 0.01 * own.abs().max())
        for found, own in pairs
    )


def _optimizer(
    trained: list[Any], config: TrainConfig, count: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return the optimiser of `trained` and its schedule over the epochs on `count` samples."""
    optimizer: torch.optim.Optimizer
    decay, rate = config.weight_decay, config.learning_rate
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, rate, momentum=config.momentum, weight_decay=decay)
    else:
        optimizer = torch.optim.Adam(trained, rate, weight_decay=decay)
    steps = config.epochs * math.ceil(count / config.batch_size)
    scheduler = LambdaLR(
        optimizer, lambda step: learning_rate_factor(config.schedule, step / max(steps, 1))
    )
    return optimizer, scheduler


def _check_finite(loss: float, epoch: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training: expected a finite loss, got {loss} in epoch {epoch}; lower the "
            f"learning rate ({config.learning_rate:g}) or check the inputs"
        )


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16, so that it is worth using."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def _fast_layout(model: nn.Module) -> Iterator[None]:
    """Hold the weights channels-last while training, where that is the faster layout.

    Convolutions are up to twice as fast in it on a CPU; group and instance norms are slower and
    lose what the convolutions gain.
    """
    slower = any(isinstance(module, nn.GroupNorm | nn.InstanceNorm2d) for module in model.modules())
    if slower or any(value.ndim > 4 for value in model.parameters()):  # of volumes: another layout
        yield
        return
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextmanager
def _training_mode(model: nn.Module, seed: int) -> Iterator[None]:
    """Turn dropout on, drawn from `seed`; flags and torch's global generator are put back."""
    before = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.train()
            yield
        finally:
            for module, training in before:
                module.training = training


def _polish(
    model: nn.Module,
    trained: list[nn.Parameter],
    inputs: Tensor,
    labels: Tensor,
    config: TrainConfig,
    losses_of: LossFn,
) -> None:
    """Take full-batch gradient steps in evaluation mode; the gradient is summed over batches.

    Heavy momentum, since no noise has to be averaged out any more. (L-BFGS with a line search
    moved away from stationarity on ReLU networks: their gradient jumps.)
    """
    optimizer = torch.optim.SGD(
        trained, config.learning_rate, momentum=0.98, weight_decay=config.weight_decay
    )
    scheduler = LambdaLR(
        optimizer, lambda step: learning_rate_factor("cosine", step / config.polish_steps)
    )
    with _fast_layout(model), evaluation_mode(model):
        for _ in progress_bar(range(config.polish_steps), "polishing"):
            optimizer.zero_grad(set_to_none=True)
            for x, y in zip(
                inputs.split(config.batch_size), labels.split(config.batch_size), strict=True
            ):
                (losses_of(as_logits(model(x)), y).sum() / len(inputs)).backward()
            optimizer.step()
            scheduler.step()
    if not all(bool(torch.isfinite(p).all()) for p in trained):
        raise FloatingPointError(
            f"polishing: expected finite weights, got NaN or infinite ones; lower the learning "
            f"rate ({config.learning_rate:g})"
        )


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    return iter(torch.randperm(count, generator=generator).split(size))


def _check_split(split: Labelled, loss_fn: LossFn | None = None) -> tuple[Tensor, Tensor]:
    inputs = check_inputs(split.inputs)
    labels = as_labels(split.labels) if loss_fn is None else torch.as_tensor(split.labels)
    check_same_length(inputs=len(inputs), labels=len(labels))
    return inputs, labels


def _check_losses(losses: Tensor) -> None:
    if losses.shape != (1,):
        raise ValueError(
            f"loss_fn: expected one loss per sample, [1] for one, got shape {list(losses.shape)}; "
            f"use reduction='none' and sum over what is not the sample"
        )


def _check_last_batch(model: nn.Module, inputs: Tensor, size: int) -> None:
    """Raise ValueError where the last batch is of one sample that batch norm cannot read."""
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if not norms or (len(inputs) % size or size) != 1:
        return
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with _training_mode(model, 0), torch.no_grad():
            functional_call(model, buffers, (inputs[:1],))
    except ValueError as error:
        raise ValueError(
            f"batch_size: expected two samples or more in each batch under batch norm, got one in "
            f"the last ({len(inputs)} samples in batches of {size}); choose another size"
        ) from error


def logits_of(model: nn.Module, inputs: Tensor, *, batch_size: int | None = None) -> Tensor:
    """Return the logits of all `inputs` [n, K], batch by batch, without a graph.

    `batch_size` None: 1,000, or on a CPU as many as its allocator keeps and reuses the memory of.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    if inputs.dtype != like.dtype:
        raise ValueError(
            f"inputs: expected {like.dtype} as the model's parameters, got {inputs.dtype}; move "
            f"one to the other with .to(…)"
        )
    if batch_size is None:
        few = max(8, 65536 // inputs.shape[2:].numel())
        batch_size = few if like.device.type == "cpu" else 1000
    with evaluation_mode(model), torch.no_grad():
        batches = (batch.to(like.device) for batch in inputs.split(batch_size))
        return torch.cat([read_logits(model, {}, batch) for batch in batches])


def accuracy(model: nn.Module, split: AnySplit) -> float:
    """Return the fraction of `split` that the model classifies as labelled, from 0 to 1."""
    inputs, labels = _check_split(as_split(split))
    target = labels.argmax(dim=1) if labels.is_floating_point() else labels
    logits = logits_of(model, inputs)
    check_label_range(labels, max(logits.shape[1], 2))  # one logit separates two classes
    predicted = predict(logits).cpu()
    return float((predicted == target.cpu()).float().mean())
