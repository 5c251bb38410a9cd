"""Images as pixels, spectrum and layers: round trips, gradients, sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsvlib.parameterisations import (
    KINDS,
    NATURAL_COLOURS,
    Fourier,
    Multiresolution,
    Phase,
    colour_root,
    parameterise,
)

SHAPES = [(3, 8, 8), (1, 8, 8), (3, 6, 10), (3, 7, 5), (4, 4, 4)]


def bounds(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    low = -2 - torch.arange(channels, dtype=dtype).view(-1, 1, 1) / 10
    return low, low + 4.5


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind: str, shape: tuple[int, int, int], **options):
    return parameterise(kind, shape, bounds=bounds(shape[0]), **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["pixels", "fourier", "multiresolution"])
def test_inverting_and_drawing_again_gives_the_image(kind, shape):
    low, high = bounds(shape[0])
    images = low + (high - low) * torch.rand(5, *shape, generator=rng(), dtype=torch.float64)
    images[0], images[1] = low, high  # all black, all white
    written = make(kind, shape)
    again = written.image(written.invert(images))
    assert ((again - images).abs() / (high - low)).max() <= 1e-3
    inner = images[2:].clamp(low + 0.01, high - 0.01)
    torch.testing.assert_close(written.image(written.invert(inner)), inner, atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", ["fourier", "multiresolution", "phase"])
def test_the_valid_range_is_never_left(kind):
    low, high = bounds(3)
    written = make(kind, (3, 8, 8), spread=100.0)
    images = written.image(written.start(4, rng()).double())
    assert (images >= low).all()
    assert (images <= high).all()
    assert images.std() > 1, "a start this wide reaches both ends"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    written = make(kind, (3, 4, 6), spread=0.3)
    leaves = written.start(2, rng()).double().requires_grad_()
    assert torch.autograd.gradcheck(written.image, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_start_and_images_do_not_touch(kind):
    written = make(kind, (3, 4, 4), spread=0.5)
    first, again = (written.start(3, rng(1)) for _ in range(2))
    assert torch.equal(first, again)
    first = first.double()
    alone = written.image(first[1:2])
    torch.testing.assert_close(written.image(first)[1:2], alone)


def test_layers_are_summed_as_by_hand():
    written = make("multiresolution", (1, 4, 4))
    assert isinstance(written, Multiresolution)
    assert written.layers == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]
    layers = [torch.full((1, 1, 1, 1), 0.2), torch.full((1, 1, 2, 2), 0.3), torch.zeros(1, 1, 4, 4)]
    layers = [layer.double() for layer in layers]
    layers[2][0, 0, 1, 2] = 0.4
    low, high = bounds(1)
    unit = ((written.image(torch.cat([p.flatten(1) for p in layers], 1)) - low) / (high - low))[
        0, 0
    ]
    assert float(unit[0, 0]) == pytest.approx((1 + math.tanh(0.5)) / 2)
    assert float(unit[1, 2]) == pytest.approx((1 + math.tanh(0.9)) / 2)


def test_a_spectrum_is_summed_as_by_hand():
    written = make("fourier", (1, 8, 8), decay=1.5)
    assert isinstance(written, Fourier)
    leaf = torch.zeros(1, 1, 8, 5, 2, dtype=torch.float64)
    leaf[0, 0, 0, 2, 0] = 0.7  # two periods along the row, f = 1/4
    low, high = bounds(1)
    unit = ((written.image(leaf.flatten(1)) - low) / (high - low))[0, 0]
    columns = torch.arange(8, dtype=torch.float64)
    wave = 2 * 0.7 * (1 / 4) ** -1.5 * torch.cos(2 * math.pi * 2 * columns / 8) / 8
    torch.testing.assert_close(unit, torch.sigmoid(wave / 4).expand(8, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_phases_keep_the_spectrum_of_natural_images_and_their_own(shape):
    low, high = bounds(shape[0])
    images = low + (high - low) * torch.rand(3, *shape, generator=rng(), dtype=torch.float64)
    written = make("phase", shape, decay=1.4, spread=0.7)
    assert isinstance(written, Phase)
    image = written.image(written.invert(images))
    planes = torch.logit((image - low) / (high - low))
    planes = torch.einsum("dc,nchw->ndhw", torch.linalg.inv(written.colours), planes)
    spectrum = torch.fft.fft2(planes, norm="ortho").abs()  # all of it, not the half that is kept
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in shape[1:])
    frequency = torch.hypot(rows[:, None], columns).clamp(min=1 / max(shape[1:]))
    fixed = frequency**-1.4
    fixed[0, 0] = 0
    fixed *= 0.7 / (fixed**2).mean().sqrt()
    torch.testing.assert_close(spectrum, fixed.expand_as(spectrum), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(planes.var(dim=(2, 3), correction=0).sqrt().mean().item(), 0.7)
    torch.testing.assert_close(written.image(written.invert(image)), image, atol=1e-6, rtol=1e-6)


def test_the_mean_is_scaled_as_the_lowest_frequency():
    written = make("fourier", (1, 8, 8), decay=1.0)
    scale = written._scale()
    assert scale[0, 0] == scale[0, 1] == 8


def test_the_colours_have_the_covariance_of_natural_images():
    root = colour_root()
    product = root @ root.T
    wanted = torch.tensor(NATURAL_COLOURS, dtype=torch.float64)
    torch.testing.assert_close(product / product[0, 0], wanted / wanted[0, 0], atol=1e-6, rtol=0)
    assert float(root.norm(dim=0).max()) == pytest.approx(1)
    assert (root[:, 0] > 0).all(), "the first principal colour is light against dark"


@pytest.mark.parametrize("kind", ["fourier", "multiresolution", "phase"])
def test_what_does_not_fit_is_refused_in_a_sentence(kind):
    with pytest.raises(ValueError, match=r"bounds: expected the valid range .* pass bounds="):
        parameterise(kind, (3, 8, 8))
    with pytest.raises(ValueError, match=r"expected images \(C, H, W\).*use 'pixels'"):
        parameterise(kind, (12,), bounds=bounds(1))
    with pytest.raises(ValueError, match=r"colours: expected a covariance of 1 channels, got 3"):
        make(kind, (1, 8, 8), colours=NATURAL_COLOURS)
    other = make(kind, (3, 4, 4)).start(2, rng())
    with pytest.raises(ValueError, match=r"leaves: expected shape .*; make them with"):
        make(kind, (3, 8, 8)).image(other)


@pytest.mark.parametrize(
    ("covariance", "reason"),
    [
        ([[1.0, 0.5], [0.2, 1.0]], "symmetric"),
        ([[1.0, 0.5]], "symmetric"),
        ([[1.0, 1.0], [1.0, 1.0]], "positive definite"),
    ],
)
def test_a_covariance_that_is_none(covariance, reason):
    with pytest.raises(ValueError, match=reason):
        colour_root(covariance)
