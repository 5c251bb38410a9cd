"""Augmentation A(x) for the manifold condition (DSV §4.2), for DSA and for retraining.

Drawing the random numbers is kept apart from applying them, so that one draw can be shared by real
and synthetic images (siamese augmentation) or repeated on another set. All geometry of a draw is
one resampling of the image. Windows, which a network reads of a larger canvas, are a draw as well.

Shapes: inputs [n, C, H, W] in normalised units; a draw holds one row per image, or a single row
that all images share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvlib._validation import as_generator, check_number


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Strength of each transformation; 0 leaves it out.

    translate
        Largest shift as a fraction of the image side, in whole pixels.
    crop
        Largest part of the side that a random crop cuts away before it is enlarged again.
    scale
        Zoom factor in x and y, each from U[1/(1+scale), 1+scale].
    rotate
        Largest angle in degrees.
    flip
        Probability of a horizontal flip.
    cutout
        Side of a square of zeros as a fraction of the image side.
    brightness, saturation, contrast
        As in DSA at strength 1: x + (u − ½); x times 2u about the mean over channels; x times
        u + ½ about the image mean; u ~ U[0, 1]. The strength scales the deviation from x.
    noise
        Standard deviation of Gaussian noise.
    fill
        Value in normalised units of pixels that move in from outside. 0 is the mean colour, the
        field's choice; images on a black background want their lowest value.
    reflect
        Let the image mirrored at its edge move in instead of `fill`.
    one_of
        Draw one of the transformations per call instead of all (DSA's strategy).
    """

    translate: float = 0.0
    crop: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    flip: float = 0.0
    cutout: float = 0.0
    brightness: float = 0.0
    saturation: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    fill: float = 0.0
    reflect: bool = False
    one_of: bool = False

    def __post_init__(self) -> None:
        for name in self.strengths():
            check_number(name, getattr(self, name), at_least=0)
        if not math.isfinite(self.fill):
            raise ValueError(f"fill: expected a finite number, got {self.fill!r}; 0 is the mean")
        for name in ("translate", "crop", "flip", "cutout"):
            value = getattr(self, name)
            if value > 1 or (name == "crop" and value == 1):
                raise ValueError(
                    f"{name}: expected a fraction from 0 to 1, got {value!r}; lower it"
                )

    def strengths(self) -> dict[str, float]:
        """Return the strength of each transformation by name."""
        names = (f.name for f in fields(self) if f.name not in ("fill", "reflect", "one_of"))
        return {name: getattr(self, name) for name in names}


# Zhao & Bilen 2021: one of colour, crop, cutout, flip, scale, rotate; no flip for digits
DSA = AugmentationConfig(
    translate=0.125,
    scale=0.2,
    rotate=15.0,
    flip=0.5,
    cutout=0.5,
    brightness=1.0,
    saturation=1.0,
    contrast=1.0,
    one_of=True,
)
COLOUR = ("brightness", "saturation", "contrast")  # DSA's "colour" is these three together


class Draw(NamedTuple):
    """Random numbers of one augmentation; None leaves that part out."""

    affine: Tensor | None = None  # [m, 2, 3], output → input coordinates in [−1, 1]
    brightness: Tensor | None = None  # [m, 1, 1, 1], added
    saturation: Tensor | None = None  # [m, 1, 1, 1], factor about the mean over channels
    contrast: Tensor | None = None  # [m, 1, 1, 1], factor about the image mean
    keep: Tensor | None = None  # [m, 1, H, W], 0 inside the cut-out square
    noise: Tensor | None = None  # [m, C, H, W], added
    fill: float = 0.0  # value of pixels from outside the image
    reflect: bool = False  # or the image mirrored at its edge
    side: int | None = None  # of the square image that results; None: the size that came in

    def rows(self, part: slice) -> Draw:
        """Return the numbers of the images at `part`."""
        drawn: dict[str, Any] = {k: v for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**{name: value[part] for name, value in drawn.items()})


def draw(
    config: AugmentationConfig,
    count: int,
    shape: tuple[int, int, int],
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Draw:
    """Draw the numbers for `count` images of `shape` (C, H, W); `count=1` is shared by all.

    Randomness comes from a CPU generator and moves to `device` afterwards, so that a seed means
    the same everywhere.
    """
    strength = config.strengths()
    if config.one_of:
        groups: list[tuple[str, ...]] = [COLOUR] if any(strength[name] for name in COLOUR) else []
        groups += [(name,) for name in strength if strength[name] and name not in COLOUR]
        if groups:
            chosen = groups[int(torch.randint(len(groups), (), generator=generator))]
            strength = {name: strength[name] if name in chosen else 0.0 for name in strength}

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def put(values: Tensor) -> Tensor:
        return values.to(device, dtype)

    def per_image(values: Tensor) -> Tensor:
        return put(values).view(-1, 1, 1, 1)

    channels, height, width = shape
    affine = brightness = saturation = contrast = keep = noise = None
    if any(strength[name] for name in ("translate", "crop", "scale", "rotate", "flip")):
        affine = put(_affine(strength, (height, width), uniform))
    if strength["brightness"]:
        brightness = per_image(strength["brightness"] * uniform(-0.5, 0.5))
    if strength["saturation"]:  # 2u at strength 1
        saturation = per_image(1 + strength["saturation"] * uniform(-1, 1))
    if strength["contrast"]:  # u + ½ at strength 1
        contrast = per_image(1 + strength["contrast"] * uniform(-0.5, 0.5))
    if strength["cutout"]:
        keep = put(_cutout(strength["cutout"], count, (height, width), generator))
    if strength["noise"]:
        noise = torch.randn(count, channels, height, width, generator=generator)
        noise = put(strength["noise"] * noise)
    return Draw(affine, brightness, saturation, contrast, keep, noise, config.fill, config.reflect)


def _affine(
    strength: dict[str, float], size: tuple[int, int], uniform: Callable[[float, float], Tensor]
) -> Tensor:
    """Return matrices [count, 2, 3] from output to input coordinates, as `affine_grid` wants.

    `uniform(low, high)` draws a number for each image.
    """
    height, width = size
    angle = math.radians(strength["rotate"]) * uniform(-1, 1)
    highest = 1 + strength["scale"]
    window = 1 - strength["crop"] * uniform(0, 1)  # side of the crop that is enlarged
    zoom_x, zoom_y = (window / uniform(1 / highest, highest) for _ in range(2))
    mirror = torch.where(uniform(0, 1) < strength["flip"], -1.0, 1.0)
    # whole pixels: a fractional shift would blur
    shift_x, shift_y = (
        (strength["translate"] * side * uniform(-1, 1)).round() * 2 / side
        + (1 - window) * uniform(-1, 1)
        for side in (width, height)
    )
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack(
        [
            torch.stack([mirror * zoom_x * cosine, -zoom_x * sine, shift_x], dim=1),
            torch.stack([mirror * zoom_y * sine, zoom_y * cosine, shift_y], dim=1),
        ],
        dim=1,
    )


def _cutout(
    fraction: float, count: int, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Return masks [count, 1, H, W] with a square of zeros whose centre lies anywhere."""

    def inside_span(side: int) -> Tensor:
        length = max(1, round(fraction * side))
        from_centre = torch.arange(side) - torch.randint(side, (count, 1), generator=generator)
        return (from_centre >= -(length // 2)) & (from_centre < length - length // 2)

    rows, columns = (inside_span(side) for side in size)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return (~inside).float()


def apply(inputs: Tensor, numbers: Draw) -> Tensor:
    """Return A(x) for a draw made for as many images, or for one that all share."""
    if numbers.brightness is not None:
        inputs = inputs + numbers.brightness
    if numbers.saturation is not None and inputs.shape[1] > 1:  # grey images have no saturation
        mean = inputs.mean(dim=1, keepdim=True)
        inputs = (inputs - mean) * numbers.saturation + mean
    if numbers.contrast is not None:
        mean = inputs.mean(dim=(1, 2, 3), keepdim=True)
        inputs = (inputs - mean) * numbers.contrast + mean
    if numbers.affine is not None:
        affine = numbers.affine.expand(len(inputs), 2, 3)
        size = inputs.shape[2:] if numbers.side is None else (numbers.side, numbers.side)
        grid = F.affine_grid(affine, [*inputs.shape[:2], *size], align_corners=False)
        # grid_sample moves in zeros, so the wanted value is made zero meanwhile
        edge = "reflection" if numbers.reflect else "zeros"
        moved = F.grid_sample(inputs - numbers.fill, grid, padding_mode=edge, align_corners=False)
        inputs = moved + numbers.fill
    if numbers.keep is not None:
        inputs = inputs * numbers.keep
    if numbers.noise is not None:
        inputs = inputs + numbers.noise
    return inputs


def draw_windows(
    side: int,
    count: int,
    size: tuple[int, int],
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Draw:
    """Draw a square part of each of `count` images (H, W), to be read in its place at size `side`.

    Its extent is anything from `side` to the whole, it lies anywhere inside, and half of them are
    mirrored.
    """
    extent = torch.randint(side, min(size) + 1, (count,), generator=generator)
    top, left = (
        (torch.rand(count, generator=generator) * (length - extent + 1)).long() for length in size
    )
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    affine = torch.zeros(count, 2, 3, dtype=torch.float64)
    for row, (start, length) in enumerate(zip((left, top), reversed(size), strict=True)):
        affine[:, row, row] = extent / length
        affine[:, row, 2] = (2 * start + extent) / length - 1
    affine[:, 0, 0] *= mirror
    return Draw(affine.to(device, dtype), reflect=True, side=side)


def augment(inputs: Tensor, config: AugmentationConfig, *, generator: torch.Generator) -> Tensor:
    """Draw anew for every image and apply."""
    channels, height, width = inputs.shape[1:]
    numbers = draw(
        config,
        len(inputs),
        (channels, height, width),
        generator=as_generator(generator),
        device=inputs.device,
        dtype=inputs.dtype,
    )
    return apply(inputs, numbers)
