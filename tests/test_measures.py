"""Measures of notebooks: against what can be said without computing them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from companion.measures import (
    draw_of_class,
    evenness,
    nearest_of_class,
    probabilities,
    read_as,
    ssim,
)
from companion.trials import seeded
from dsvlib.data.datasets import Split


def test_shares_count_what_is_read_as_the_target() -> None:
    model = nn.Flatten()  # an image [n, 3, 1, 1] is its own logits
    images = torch.eye(3)[[0, 1, 2, 0]].view(4, 3, 1, 1)
    assert probabilities(model, images).sum(dim=1).allclose(torch.ones(4).double())
    frame, hits = read_as([("a", images)], {"model": model}, torch.tensor([0, 1, 2, 1]))
    assert hits["a", "model"].tolist() == [True, True, True, False]
    (row,) = frame.itertuples()
    assert row.rate == 75
    assert 0 < row.low < 75 < row.high < 100


def test_ssim_knows_an_image_from_its_negative() -> None:
    images = torch.rand(4, 1, 16, 16, generator=seeded(0))
    assert ssim(images, images).allclose(torch.ones(4))
    assert (ssim(images, 1 - images) < 0).all()
    flat = torch.full((1, 3, 8, 8), 0.5)
    assert ssim(flat, flat + 0.1) < 1


def test_the_nearest_and_the_drawn_are_of_the_class_asked_for() -> None:
    inputs = torch.tensor([0.0, 1, 2, 3]).view(4, 1, 1, 1)
    split = Split(inputs, torch.tensor([0, 0, 1, 1]))
    near = nearest_of_class(inputs[[0, 3]], torch.tensor([1, 0]), split)
    assert near.flatten().tolist() == [2, 1]
    drawn = draw_of_class([inputs[:2], inputs[2:]], [1] * 20 + [0] * 20, 0).flatten()
    assert set(drawn[:20].tolist()) == {2, 3}
    assert set(drawn[20:].tolist()) == {0, 1}


def test_a_straight_path_has_even_steps_and_a_corner_leaves_the_line() -> None:
    straight = torch.tensor([[0.0, 0], [1, 0], [2, 0]])
    corner = torch.tensor([[0.0, 0], [1, 1], [2, 0]])
    found = evenness(torch.stack([straight, corner])[..., None, None])
    assert found["jump"].tolist() == pytest.approx([0.5, 0.5**0.5])
    assert found["off the line"].tolist() == pytest.approx([0, 1 / 6], abs=1e-6)
