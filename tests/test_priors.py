"""Priors on x: total variation and squared norm, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from dsvlib import total_variation
from dsvlib.priors import squared_norm


def test_total_variation_of_a_constant_is_zero():
    assert torch.equal(total_variation(torch.full((3, 2, 5, 4), 1.7)), torch.zeros(3))


def test_total_variation_of_a_small_image_by_hand():
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0], [5.0, 0.0, 1.0]])
    # down the columns (2+3) + (1+2) + (1+1), along the rows (1+2) + (0+0) + (5+1)
    assert total_variation(image.view(1, 1, 3, 3)).tolist() == [10 + 9]


def test_total_variation_adds_channels_and_keeps_images_apart(generator):
    inputs = torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    slow = []
    for image in inputs:
        total = 0.0
        for channel in image:
            for r in range(4):
                for s in range(5):
                    total += abs(float(channel[r, s] - channel[r - 1, s])) if r else 0
                    total += abs(float(channel[r, s] - channel[r, s - 1])) if s else 0
        slow.append(total)
    torch.testing.assert_close(total_variation(inputs), torch.tensor(slow, dtype=torch.float64))


def test_total_variation_scales_and_ignores_offsets(generator):
    inputs = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(total_variation(-3 * inputs + 7), 3 * total_variation(inputs))


def test_priors_gradcheck(generator):
    inputs = torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(total_variation, inputs)
    assert gradcheck(squared_norm, inputs)


def test_a_single_pixel_has_no_variation():
    assert total_variation(torch.ones(2, 3, 1, 1)).tolist() == [0, 0]


def test_squared_norm_is_a_mean_over_pixels():
    inputs = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 2.0]]]])
    assert squared_norm(inputs).tolist() == [7.5, 1.0]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"expected images \[n, C, H, W\], got shape \[3, 4\]"),
        (torch.zeros(1, 4, 4), ValueError, r"got shape \[1, 4, 4\]"),
        (torch.zeros(0, 1, 4, 4), ValueError, "expected at least one sample"),
        (torch.full((1, 1, 2, 2), torch.nan), ValueError, "expected finite numbers"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), TypeError, "got torch.uint8"),
        ([[0.0]], TypeError, "got list"),
    ],
)
def test_bad_input(inputs, error, message):
    with pytest.raises(error, match=message):
        total_variation(inputs)
