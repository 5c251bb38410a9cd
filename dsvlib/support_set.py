"""A support set {(xᵢ, yᵢ, λᵢ)}: the one value that passes between all stages.

Synthesis, selection and distillation make it, the DeepKKT conditions judge it, evaluation trains
from it without knowing which method it came from.

Shapes: inputs [n, C, H, W] in normalised units, labels int64 [n] or float [n, K] (soft),
multipliers λ [n].
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsvlib._files import atomic_path, read_safetensors
from dsvlib._validation import as_labels, check_finite, check_inputs, check_same_length, labels_to

FORMAT = "dsvlib.support-set.v1"


def as_targets(labels: Tensor | Sequence[int]) -> Tensor:
    """Return labels as `as_labels` does, or as float rows [n, K] of zeros and ones.

    The latter are for networks with several labels at once, which need a `loss_fn`. Rows of ones
    throughout are refused: they tell nothing apart and are a mistake more often than not.
    """
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 2:
        ones = labels == 1
        if bool((ones | (labels == 0)).all()) and not bool(ones.all()):
            return labels
    return as_labels(labels)


class Normalised:
    """Pixels in [0, 1] by x = (pixel − mean) / std, of what knows `mean` and `std` by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest valid pixel in normalised units, each [C]; needs `mean` and `std`."""
        self._check_known("bounds")
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (0 - mean) / std, (1 - mean) / std

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Return images with pixels in [0, 1] from normalised `inputs` [n, C, H, W]."""
        self._check_known("images")
        mean, std = (inputs.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1)

    def _check_known(self, asked: str) -> None:
        if not self.mean:
            raise ValueError(
                f"{asked}: expected a set that knows its normalisation, got none; "
                "call samples.describe(dataset) first"
            )


class Described(Protocol):
    """What a data set says about its pixels and classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the training images in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the training images in [0, 1]."""


@dataclass(frozen=True, eq=False)
class SupportSet(Normalised):
    """Samples with labels and multipliers, and how to turn their pixels back into images.

    Parameters
    ----------
    inputs
        Float [n, C, H, W] (or [n, d] for tabular data), finite, in the data set's normalised units.
    labels
        int64 [n], or float [n, K] with rows that sum to 1; rows of zeros and ones, of whatever sum,
        for a network that gives several labels at once.
    multipliers
        Float [n], λ. Solvers return λ ≥ 0; a negative one is allowed here so that
        `residuals(...).dual` can report it.
    classes, mean, std
        Class names and the normalisation x = (pixel − mean) / std, where known.

    Raises ValueError or TypeError when shapes, types or lengths do not fit or a number is not
    finite.
    """

    inputs: Tensor
    labels: Tensor
    multipliers: Tensor
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_inputs(self.inputs)
        object.__setattr__(self, "labels", as_targets(self.labels))
        if not isinstance(self.multipliers, Tensor) or not self.multipliers.is_floating_point():
            kind = getattr(self.multipliers, "dtype", type(self.multipliers).__name__)
            raise TypeError(
                f"multipliers: expected a float tensor [n], got {kind}; "
                f"use torch.ones(n) where every sample counts the same"
            )
        if self.multipliers.ndim != 1:
            raise ValueError(
                f"multipliers: expected shape [n], got {list(self.multipliers.shape)}; "
                f"there is one λ per sample"
            )
        check_same_length(
            inputs=len(self.inputs), labels=len(self.labels), multipliers=len(self.multipliers)
        )
        check_finite("multipliers", self.multipliers.detach())

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor | slice | int) -> SupportSet:
        """Return the samples at `index` (integer tensor, boolean mask, slice or one number)."""
        if isinstance(index, int):
            position = range(len(self))[index]  # raises IndexError itself, counts from the end
            index = slice(position, position + 1)
        return dataclasses.replace(
            self,
            inputs=self.inputs[index],
            labels=self.labels[index],
            multipliers=self.multipliers[index],
        )

    def to(self, device: torch.device | str | torch.dtype) -> SupportSet:
        """Return the same samples on `device`, or in that dtype (class numbers stay int64)."""
        return dataclasses.replace(
            self,
            inputs=self.inputs.to(device),
            labels=labels_to(self.labels, device),
            multipliers=self.multipliers.to(device),
        )

    def describe(self, data: Described) -> SupportSet:
        """Return the same samples with the class names and normalisation of `data`."""
        return dataclasses.replace(
            self, classes=tuple(data.classes), mean=tuple(data.mean), std=tuple(data.std)
        )

    @property
    def hard_labels(self) -> Tensor:
        """The most probable class of each label, int64 [n]."""
        return self.labels.argmax(dim=1) if self.labels.is_floating_point() else self.labels

    def images(self) -> Tensor:
        """Return pixels in [0, 1], [n, C, H, W]; needs `mean` and `std`."""
        return self.denormalize(self.inputs.detach())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set as safetensors, whole or not at all; the metadata says how to read it."""
        from safetensors.torch import save_file

        metadata = {
            "format": FORMAT,
            "classes": json.dumps(self.classes),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "range": json.dumps([0.0, 1.0] if self.mean else []),
        }
        tensors = {
            name: getattr(self, name).detach().cpu().contiguous()
            for name in ("inputs", "labels", "multipliers")
        }
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SupportSet:
        """Read a set that `save` wrote; a damaged or foreign file raises ValueError."""
        tensors, metadata = read_safetensors(path, FORMAT, "SupportSet.save")
        missing = {"inputs", "labels", "multipliers"} - set(tensors)
        if missing:
            raise ValueError(
                f"{path}: expected inputs, labels and multipliers, got no "
                f"{', '.join(sorted(missing))}; write it again with SupportSet.save"
            )
        try:
            described = {k: tuple(json.loads(metadata[k])) for k in ("classes", "mean", "std")}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected metadata with classes, mean and std, got: {error!r}; "
                f"write it again with SupportSet.save"
            ) from error
        return cls(tensors["inputs"], tensors["labels"], tensors["multipliers"], **described)
