"""How an image is written down while it is optimised: what people can read depends on it.

The papers optimise pixels. Written as a spectrum, or as a sum of layers of several resolutions with
decorrelated colours, the same loss moves large shapes and natural colours first:

    pixels            x = z
    Fourier           u = σ(C · irfft2(s / max(f, 1/side)^d) / 4)        (Olah et al. 2017)
    multi-resolution  u = (1 + tanh(C · Σ_r up_r(P_r))) / 2              (Fort and Whitaker 2025)
    phase             u = σ(C · irfft2(m · e^{iφ})),  m ∝ 1/f^d fixed    (Fel et al. 2023)

with x = low + (high − low)·u inside the valid range, f in cycles per pixel, an orthonormal
transform, bicubic up-sampling, and C a square root of the covariance of natural colours.

Each has `shape`, that of one x, and three functions: `start` draws leaves from noise (on the CPU),
`invert` finds those of given images, and `image` goes from leaves to x, differentiably. Leaves are
one tensor with a row for each image.

Shapes: x [n, C, H, W] in normalised units; leaves [n, C, h, w] (pixels) or [n, D], where s is
[C, H, W//2 + 1, 2] (real and imaginary part), the layers P_r are [C, r, r], one after the other,
and φ is [C, H, W//2 + 1]; low and high broadcast over x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["pixels", "fourier", "multiresolution", "phase"]
KINDS: tuple[str, ...] = get_args(Kind)

# Covariance of red, green and blue in [0, 1] over all training pixels of CIFAR-10
NATURAL_COLOURS = (
    (0.06102492, 0.05482238, 0.05069996),
    (0.05482238, 0.05928501, 0.05780384),
    (0.05069996, 0.05780384, 0.06842820),
)
MARGIN = 5e-4  # how far from black and white an inverted image is kept: there u has no inverse


@dataclass(frozen=True)
class Pixels:
    """x is its own leaf, as in the papers; a smaller one is up-sampled. Noise is N(0, spread²)."""

    shape: tuple[int, ...]
    spread: float = 1.0

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return N(0, spread²) pixels."""
        return self.spread * torch.randn(count, *self.shape, generator=generator)

    def invert(self, inputs: Tensor) -> Tensor:
        """Return a copy of the images."""
        return inputs.detach().clone()

    def image(self, leaves: Tensor) -> Tensor:
        """Return the leaves at full size."""
        if leaves.shape[1:] == self.shape:
            return leaves
        return F.interpolate(leaves, size=self.shape[-2:], mode="bilinear")


@dataclass(frozen=True, eq=False)
class _InRange:
    """What the others share: the shape, the valid range (low, high) and C [C, C]."""

    shape: tuple[int, ...]
    bounds: tuple[Tensor, Tensor]
    colours: Tensor

    def _split(self, leaves: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return the parts of the leaves [n, D], each [n, *shape]."""
        lengths = [math.prod(shape) for shape in shapes]
        if leaves.ndim != 2 or leaves.shape[1] != sum(lengths):
            raise ValueError(
                f"leaves: expected shape [n, {sum(lengths)}] for images {list(self.shape)}, got "
                f"{list(leaves.shape)}; make them with start or invert"
            )
        parts = leaves.split(lengths, dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _to_range(self, unit: Tensor) -> Tensor:
        low, high = self.bounds
        return low + (high - low) * unit

    def _to_unit(self, inputs: Tensor) -> Tensor:
        low, high = self.bounds
        return ((inputs.detach() - low) / (high - low)).clamp(MARGIN, 1 - MARGIN)

    def _mix(self, planes: Tensor, colours: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", colours, planes)


@dataclass(frozen=True, eq=False)
class Fourier(_InRange):
    """A spectrum that is divided by its frequency to the power `decay`, as natural images have it.

    Real and imaginary parts start at N(0, spread²). `spread` is a lever for diversity: at 0.01 all
    images of a class come out alike, at 1 they differ.
    """

    decay: float = 1.0
    spread: float = 0.01

    @property
    def spectrum(self) -> tuple[int, ...]:
        """Shape of one spectrum."""
        channels, height, width = self.shape
        return channels, height, width // 2 + 1, 2

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return spectra of N(0, spread²)."""
        return self.spread * torch.randn(count, math.prod(self.spectrum), generator=generator)

    def invert(self, inputs: Tensor) -> Tensor:
        """Return the spectra of the images; pixels nearer to an end than `MARGIN` move there."""
        planes = self._mix(4 * torch.logit(self._to_unit(inputs)), torch.linalg.inv(self.colours))
        spectrum = torch.fft.rfft2(planes, norm="ortho") / self._scale().to(planes)
        return torch.view_as_real(spectrum).flatten(1)

    def image(self, leaves: Tensor) -> Tensor:
        """Return σ(C · irfft2(s · scale) / 4) in the valid range."""
        (parts,) = self._split(leaves, [self.spectrum])
        spectrum = torch.view_as_complex(parts.contiguous()) * self._scale().to(parts)
        planes = torch.fft.irfft2(spectrum, s=self.shape[1:], norm="ortho")
        return self._to_range(torch.sigmoid(self._mix(planes, self.colours) / 4))

    def _scale(self) -> Tensor:
        """Return 1 / max(f, 1/side)^decay of each coefficient, [H, W//2 + 1]."""
        return _falling(self.shape[1:], self.decay)


@dataclass(frozen=True, eq=False)
class Phase(_InRange):
    """A spectrum whose magnitudes stay those of natural images: only phases φ are free.

    So no picture can hide in high frequencies, and its contrast is that of a photograph throughout.
    `spread` is the standard deviation of the planes before C, at the start as at the end; phases
    start uniform. The mean of a plane is 0. `invert` keeps the phases of an image and gives up its
    magnitudes, so that it does not come back the same.
    """

    decay: float = 1.0
    spread: float = 1.2

    @property
    def phases(self) -> tuple[int, ...]:
        """Shape of the phases of one image."""
        channels, height, width = self.shape
        return channels, height, width // 2 + 1

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return phases of U[0, 2π)."""
        return 2 * math.pi * torch.rand(count, math.prod(self.phases), generator=generator)

    def invert(self, inputs: Tensor) -> Tensor:
        """Return the phases of the images."""
        planes = self._mix(torch.logit(self._to_unit(inputs)), torch.linalg.inv(self.colours))
        return torch.fft.rfft2(planes, norm="ortho").angle().flatten(1)

    def image(self, leaves: Tensor) -> Tensor:
        """Return σ(C · irfft2(m · e^{iφ})) in the valid range."""
        (phases,) = self._split(leaves, [self.phases])
        spectrum = torch.polar(self._magnitude().to(phases).expand_as(phases), phases)
        planes = torch.fft.irfft2(spectrum, s=self.shape[1:], norm="ortho")
        return self._to_range(torch.sigmoid(self._mix(planes, self.colours)))

    def _magnitude(self) -> Tensor:
        """Return m of each coefficient, [H, W//2 + 1]: its planes have variance spread²."""
        height, width = self.shape[1:]
        magnitude = _falling((height, width), self.decay)
        magnitude[0, 0] = 0.0
        twice = torch.full((width // 2 + 1,), 2.0)  # a real transform leaves out the other half
        twice[0] = 1.0
        if width % 2 == 0:
            twice[-1] = 1.0
        power = (twice * magnitude**2).sum() / (height * width)  # Parseval
        return self.spread * magnitude / power.sqrt().clamp(min=torch.finfo(power.dtype).tiny)


def _falling(size: Sequence[int], decay: float) -> Tensor:
    """Return 1 / max(f, 1/side)^decay of each coefficient of a real spectrum, [H, W//2 + 1]."""
    height, width = size
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    frequency = torch.hypot(rows[:, None], columns[None, :])
    return frequency.clamp(min=1 / max(height, width)) ** -decay


@dataclass(frozen=True, eq=False)
class Multiresolution(_InRange):
    """A sum of layers of side 1, 2, 4, … up to the image, each up-sampled to it.

    Layers start at N(0, spread²): 0 suits one image per class, 0.3 many.
    """

    spread: float = 0.0

    @property
    def layers(self) -> list[tuple[int, ...]]:
        """Shape of each layer, coarse to fine."""
        channels, height, width = self.shape
        longest = max(height, width)
        sides = [1]
        while sides[-1] < longest:
            sides.append(min(2 * sides[-1], longest))
        return [
            (channels, max(1, height * side // longest), max(1, width * side // longest))
            for side in sides
        ]

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return layers of N(0, spread²)."""
        length = sum(map(math.prod, self.layers))
        return self.spread * torch.randn(count, length, generator=generator)

    def invert(self, inputs: Tensor) -> Tensor:
        """Return the layers of the images: means at each side, coarse to fine, of what is left."""
        left = self._mix(torch.atanh(2 * self._to_unit(inputs) - 1), torch.linalg.inv(self.colours))
        layers = []
        for shape in self.layers:
            layer = F.adaptive_avg_pool2d(left, (shape[1], shape[2]))
            layers.append(layer.flatten(1))
            left = left - self._up(layer)
        return torch.cat(layers, dim=1)

    def image(self, leaves: Tensor) -> Tensor:
        """Return (1 + tanh(C · Σ up(P))) / 2 in the valid range."""
        layers = self._split(leaves, self.layers)
        planes = torch.stack([self._up(layer) for layer in layers]).sum(dim=0)
        return self._to_range((1 + torch.tanh(self._mix(planes, self.colours))) / 2)

    def _up(self, layer: Tensor) -> Tensor:
        size = self.shape[1:]
        if tuple(layer.shape[2:]) == tuple(size):
            return layer
        return F.interpolate(layer, size=size, mode="bicubic", align_corners=False)


Parameterisation = Pixels | Fourier | Phase | Multiresolution


def colour_root(
    covariance: Sequence[Sequence[float]] | Tensor = NATURAL_COLOURS,
) -> Tensor:
    """Return C with C·Cᵀ proportional to a covariance [C, C] of colours; its longest column is 1.

    Its columns are the principal colours, strongest first: for natural images light and dark, then
    blue against orange, then green against purple. Raises ValueError where a covariance is not
    symmetric or not positive definite.
    """
    matrix = torch.as_tensor(covariance, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.allclose(matrix.T):
        raise ValueError(
            f"colours: expected a symmetric covariance [C, C], got shape {list(matrix.shape)}; "
            f"compute it with torch.cov over the pixels of each channel"
        )
    values, vectors = torch.linalg.eigh(matrix)
    if not values[0] > 0:
        raise ValueError(
            f"colours: expected a positive definite covariance, got an eigenvalue of "
            f"{float(values[0]):.3g}; leave colours out for channels that say the same"
        )
    root = (vectors * values.sqrt()).flip(1)
    root = root * torch.where(root.sum(dim=0) < 0, -1.0, 1.0)  # eigenvectors have no sign
    return root / root.norm(dim=0).max()


def parameterise(
    kind: Kind,
    shape: Sequence[int],
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    spread: float | None = None,
    decay: float = 1.0,
    colours: Sequence[Sequence[float]] | None = None,
) -> Parameterisation:
    """Return the parameterisation of one image of `shape` (C, H, W).

    Parameters
    ----------
    bounds
        Lowest and highest valid value, as tensors that broadcast over [n, C, H, W]; the sigmoid and
        tanh lead to them, so all but ``"pixels"`` need them.
    spread
        Standard deviation of the start; None: 1 for pixels, 0.01 for a spectrum, 0 for layers. Of
        phases that of the picture throughout (before C); None: 1.2.
    decay
        d of the spectrum.
    colours
        Covariance of the colours, [C, C]; None: that of natural images for three channels, no
        mixing for any other number.

    Raises ValueError without bounds where they are needed, and for shapes that are no image.
    """
    size = tuple(int(side) for side in shape)
    given = {} if spread is None else {"spread": spread}
    if kind == "pixels":
        return Pixels(size, **given)
    if len(size) != 3:
        raise ValueError(
            f"parameterisation: expected images (C, H, W) for {kind!r}, got shape {list(size)}; "
            f"use 'pixels'"
        )
    if bounds is None:
        raise ValueError(
            f"bounds: expected the valid range for parameterisation {kind!r}, got None; pass "
            f"bounds=data.bounds, or use 'pixels'"
        )
    if colours is not None or size[0] == 3:
        mixing = colour_root(NATURAL_COLOURS if colours is None else colours).to(bounds[0])
    else:
        mixing = torch.eye(size[0]).to(bounds[0])
    if len(mixing) != size[0]:
        raise ValueError(
            f"colours: expected a covariance of {size[0]} channels, got {len(mixing)}; leave it out"
        )
    if kind == "fourier":
        return Fourier(size, bounds, mixing, decay=decay, **given)
    if kind == "phase":
        return Phase(size, bounds, mixing, decay=decay, **given)
    return Multiresolution(size, bounds, mixing, **given)
