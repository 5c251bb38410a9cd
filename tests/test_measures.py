"""Measures of notebooks: against what can be said without computing them."""

from __future__ import annotations

import torch
from torch import nn

from companion.measures import probabilities, read_as, seeded, side_by_side, ssim


def test_the_same_number_gives_the_same_draws() -> None:
    assert torch.rand(3, generator=seeded(4)).equal(torch.rand(3, generator=seeded(4)))


def test_jobs_keep_their_order_in_one_process_and_in_two() -> None:
    jobs = [(7, 2), (9, 4), (5, 5)]
    assert side_by_side(divmod, jobs, 1) == [(3, 1), (2, 1), (1, 0)]
    assert side_by_side(divmod, jobs, 2) == side_by_side(divmod, jobs, 1)


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
