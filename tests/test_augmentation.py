"""Augmentation: a draw can be shared and repeated, and each part does what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from dsvlib import DSA, AugmentationConfig, augment
from dsvlib.augmentation import Draw, apply, draw

SHAPE = (3, 16, 16)
EVERYTHING = AugmentationConfig(
    translate=0.2,
    crop=0.3,
    scale=0.2,
    rotate=20.0,
    flip=0.5,
    cutout=0.4,
    brightness=0.8,
    saturation=0.8,
    contrast=0.8,
    noise=0.3,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=seeded(9))


def only(**strength: float) -> AugmentationConfig:
    return AugmentationConfig(**strength)


# --- drawing and applying ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_a_draw_can_be_applied_again(count):
    numbers = draw(EVERYTHING, count, SHAPE, generator=seeded())
    assert torch.equal(apply(images(), numbers), apply(images(), numbers))


def test_a_shared_draw_treats_all_images_alike():
    numbers = draw(EVERYTHING, 1, SHAPE, generator=seeded())
    inputs = images(4)
    together = apply(inputs, numbers)
    for i in range(4):
        assert_close(together[i : i + 1], apply(inputs[i : i + 1], numbers))
    assert torch.equal(apply(inputs[[0, 0]], numbers)[0], together[0])


def test_each_image_has_its_own_draw():
    inputs = images(1).expand(4, *SHAPE)
    for name in AugmentationConfig().strengths():
        config = only(**{name: getattr(EVERYTHING, name)})
        results = augment(inputs, config, generator=seeded(1))
        assert not all(torch.equal(results[0], other) for other in results[1:]), name


def test_augment_is_draw_and_apply():
    numbers = draw(EVERYTHING, 4, SHAPE, generator=seeded(3))
    assert torch.equal(augment(images(), EVERYTHING, generator=seeded(3)), apply(images(), numbers))


def test_seed_fixes_the_result_and_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    first = augment(images(), EVERYTHING, generator=seeded(1))
    assert torch.equal(first, augment(images(), EVERYTHING, generator=seeded(1)))
    assert not torch.equal(first, augment(images(), EVERYTHING, generator=seeded(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_strength_changes_nothing():
    inputs = images()
    assert augment(inputs, AugmentationConfig(), generator=seeded()) is inputs
    assert draw(AugmentationConfig(), 4, SHAPE, generator=seeded()) == Draw(*[None] * 6)
    assert augment(inputs, AugmentationConfig(one_of=True), generator=seeded()) is inputs


def test_dtype_is_kept():
    assert augment(images().double(), EVERYTHING, generator=seeded()).dtype == torch.float64


def test_gradients_flow():
    inputs = images().double().requires_grad_()
    numbers = draw(EVERYTHING, 4, SHAPE, generator=seeded(), dtype=torch.float64)
    (slope,) = torch.autograd.grad(apply(inputs, numbers).square().sum(), inputs)
    assert torch.isfinite(slope).all()
    assert float((slope != 0).double().mean()) > 0.3


# --- geometry ------------------------------------------------------------------------------------


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Zero-filled shift by whole pixels; a negative pad crops."""
    return F.pad(image, (right, -right, down, -down))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 12)])
def test_translation_is_a_zero_filled_shift_by_whole_pixels(shape):
    _, height, width = shape
    inputs = images(12, shape)
    results = augment(inputs, only(translate=0.25), generator=seeded())
    seen = set()
    for image, result in zip(inputs, results, strict=True):
        fits = [
            (down, right)
            for down in range(-height // 4, height // 4 + 1)
            for right in range(-width // 4, width // 4 + 1)
            if torch.allclose(shifted(image, down, right), result, atol=1e-4)
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) > 4


def test_pixels_from_outside_take_the_fill():
    numbers = draw(only(translate=0.5, fill=-0.7), 1, SHAPE, generator=seeded(2))
    moved = apply(torch.full((2, *SHAPE), -0.7), numbers)
    assert_close(moved, torch.full((2, *SHAPE), -0.7))
    inputs = images(2)
    zeros = apply(inputs, numbers._replace(fill=0.0))
    outside = apply(torch.ones_like(inputs), numbers._replace(fill=0.0)) < 0.5
    assert 0 < float(outside.float().mean()) < 1
    assert_close(apply(inputs, numbers), torch.where(outside, -0.7, zeros), atol=1e-4, rtol=0)


def test_fill_must_be_finite():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="fill: expected a finite number"):
            only(fill=value)


def test_flip_with_probability_one_mirrors():
    assert_close(
        augment(images(), only(flip=1.0), generator=seeded()), images().flip(-1), atol=1e-5, rtol=0
    )


def test_flip_probability():
    inputs = images(200, (1, 4, 4))
    results = augment(inputs, only(flip=0.3), generator=seeded())
    flipped = (results - inputs.flip(-1)).abs().amax(dim=(1, 2, 3)) < 1e-5
    kept = (results - inputs).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert bool((flipped ^ kept).all())
    assert 0.2 < float(flipped.float().mean()) < 0.4


def test_rotation_turns_a_disc_into_itself_and_keeps_its_range():
    r = torch.linspace(-1, 1, 33)
    disc = torch.exp(-4 * (r[:, None] ** 2 + r[None] ** 2)).expand(6, 1, 33, 33)
    turned = augment(disc, only(rotate=45.0), generator=seeded())
    assert_close(turned[..., 8:25, 8:25], disc[..., 8:25, 8:25], atol=0.01, rtol=0)
    matrices = draw(only(rotate=30.0), 500, (1, 33, 33), generator=seeded()).affine
    angles = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]).rad2deg()
    assert float(angles.abs().max()) <= 30.001
    assert float(angles.min()) < -25
    assert float(angles.max()) > 25
    identity = matrices[:, :, :2] @ matrices[:, :, :2].mT
    assert_close(identity, torch.eye(2).expand(500, 2, 2), atol=1e-5, rtol=0)


def test_scale_zooms_each_side_within_its_range():
    matrices = draw(only(scale=0.25), 500, SHAPE, generator=seeded()).affine
    for zoom in (1 / matrices[:, 0, 0], 1 / matrices[:, 1, 1]):
        assert 1 / 1.25 - 1e-5 <= float(zoom.min()) < 0.82
        assert 1.22 < float(zoom.max()) <= 1.25 + 1e-5
    assert not torch.equal(matrices[:, 0, 0], matrices[:, 1, 1])
    assert float(matrices[:, [0, 1], [1, 0]].abs().max()) == 0


def test_crop_stays_inside_the_image():
    ones = torch.ones(50, 1, 16, 16)
    cropped = augment(ones, only(crop=0.5), generator=seeded())
    assert_close(cropped[..., 1:-1, 1:-1], torch.ones(50, 1, 14, 14))
    matrices = draw(only(crop=0.5), 500, SHAPE, generator=seeded()).affine
    window, shift = matrices[:, 0, 0], matrices[:, :, 2]
    assert torch.equal(window, matrices[:, 1, 1])
    assert 0.5 <= float(window.min()) < 0.52
    assert float((shift.abs() + window[:, None]).max()) <= 1 + 1e-5


@pytest.mark.parametrize(("fraction", "side"), [(0.5, 8), (0.25, 4), (0.3, 5), (0.05, 1)])
def test_cutout_is_a_square_of_zeros(fraction, side):
    inputs = torch.ones(300, 2, 16, 16)
    holes = augment(inputs, only(cutout=fraction), generator=seeded()) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    holes = holes[:, 0]
    rows, columns = holes.any(dim=2).sum(dim=1), holes.any(dim=1).sum(dim=1)
    assert torch.equal(holes.sum(dim=(1, 2)), rows * columns)
    # whole where it is inside, cut at the border elsewhere
    assert int(rows.max()) == int(columns.max()) == side
    assert int(rows.min()) <= math.ceil(side / 2)
    assert int(holes.sum(dim=(1, 2)).mode().values) == side**2 or side > 4


# --- colours -------------------------------------------------------------------------------------


def test_brightness_adds_one_number():
    difference = augment(images(300), only(brightness=0.6), generator=seeded()) - images(300)
    assert_close(difference, difference[:, :1, :1, :1].expand_as(difference), atol=1e-5, rtol=0)
    shifts = difference[:, 0, 0, 0]
    assert float(shifts.min()) >= -0.3 - 1e-5
    assert float(shifts.max()) <= 0.3 + 1e-5
    assert float(shifts.max() - shifts.min()) > 0.5


def test_contrast_keeps_the_image_mean():
    inputs, results = images(300), augment(images(300), only(contrast=1.0), generator=seeded())
    assert_close(results.mean(dim=(1, 2, 3)), inputs.mean(dim=(1, 2, 3)))
    factor = results.flatten(1).std(dim=1) / inputs.flatten(1).std(dim=1)
    assert 0.5 - 1e-4 <= float(factor.min()) < 0.55
    assert 1.45 < float(factor.max()) <= 1.5 + 1e-4


def test_saturation_keeps_the_channel_mean():
    inputs, results = images(300), augment(images(300), only(saturation=1.0), generator=seeded())
    grey = inputs.mean(dim=1, keepdim=True)
    assert_close(results.mean(dim=1, keepdim=True), grey, atol=1e-5, rtol=0)
    factor = (results - grey).flatten(1).norm(dim=1) / (inputs - grey).flatten(1).norm(dim=1)
    assert 0 <= float(factor.min()) < 0.1
    assert 1.9 < float(factor.max()) <= 2 + 1e-4


def test_grey_images_have_no_saturation():
    inputs = images(4, (1, 8, 8))
    assert torch.equal(augment(inputs, only(saturation=1.0), generator=seeded()), inputs)


def test_noise_has_its_standard_deviation():
    noise = augment(images(40), only(noise=0.3), generator=seeded()) - images(40)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)


# --- one of several, and bad input ---------------------------------------------------------------


def test_one_of_changes_one_group_only():
    parts, groups = ("affine", "brightness", "saturation", "contrast", "keep", "noise"), set()
    for seed in range(80):
        numbers = draw(DSA, 2, SHAPE, generator=seeded(seed))
        used = frozenset(name for name in parts if getattr(numbers, name) is not None)
        assert used in ({"affine"}, {"keep"}, {"brightness", "saturation", "contrast"})
        groups.add(used)
        if used == {"affine"}:
            part = numbers.affine
            moved = bool((part[:, :, 2] != 0).any())
            flipped = bool((part[:, 0, 0] < 0).any())
            turned = bool((part[:, 0, 1] != 0).any())
            zoomed = bool((part[:, 1, 1] != 1).any()) and not turned
            assert moved + flipped + turned + zoomed <= 1
    assert len(groups) == 3


def test_without_one_of_all_are_used():
    numbers = draw(replace(DSA, one_of=False), 2, SHAPE, generator=seeded())
    left_out = {name for name, value in numbers._asdict().items() if value is None}
    assert left_out == {"noise", "side"}


@pytest.mark.parametrize("name", AugmentationConfig().strengths())
def test_bad_strengths_are_refused(name):
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number ≥ 0, got"):
            only(**{name: value})
    with pytest.raises(TypeError, match=f"{name}: expected a number, got str"):
        only(**{name: "0.5"})


@pytest.mark.parametrize(
    ("name", "value"), [("translate", 1.5), ("flip", 1.01), ("cutout", 2.0), ("crop", 1.0)]
)
def test_fractions_end_at_one(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a fraction from 0 to 1, got {value}"):
        only(**{name: value})


def test_mirrored_edges_move_in_where_asked_for():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    config = AugmentationConfig(translate=0.5, reflect=True)
    seen = {float(v) for seed in range(40) for v in moved_once(image, config, seed).flatten()}
    assert seen <= set(range(16)), "no other value than those of the image"
    shifted = moved_once(image, replace(config, reflect=False), 3)
    assert (shifted == 0).sum() > 1, "without it, the fill moves in"


def moved_once(image, config, seed):
    return augment(image, config, generator=torch.Generator().manual_seed(seed)).round(decimals=3)
