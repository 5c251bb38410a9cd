"""The open form of the gradient fit: the same gradients and the same λ as the streaming one."""

from __future__ import annotations

import pytest
import torch
from conftest import build, candidates

from dsvlib import GradientConfig, fit_multipliers, weighted_gradient
from dsvlib.conditions import flatten
from dsvlib.distance import DISTANCES
from dsvlib.trail import multiplier_trail, per_sample_gradients


@pytest.mark.parametrize("kind", ["dense", "conv", "conv-batch"])
def test_gradients_add_up_to_the_weighted_one(kind, untouched):
    model, samples = build(kind), candidates(9)
    with untouched(model):
        gradients, theta = per_sample_gradients(model, samples.inputs, samples.labels, batch_size=4)
    expected = flatten(weighted_gradient(model, samples))
    torch.testing.assert_close(gradients.T @ samples.multipliers, expected)
    torch.testing.assert_close(theta, flatten(dict(model.named_parameters())).detach())


def test_gradients_of_some_parameters():
    model, samples = build("dense"), candidates(5)
    name, value = list(model.named_parameters())[-1]
    gradients, theta = per_sample_gradients(
        model, samples.inputs, samples.labels, params={name: value}
    )
    assert gradients.shape == (5, value.numel())
    torch.testing.assert_close(theta, value.detach().reshape(-1))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("rule", ["clamp", "remove"])
@pytest.mark.parametrize("start", ["equal", "random"])
def test_the_trail_ends_where_the_streaming_fit_does(distance, rule, start):
    model, samples = build("dense"), candidates(12)
    config = GradientConfig(
        steps=40, learning_rate=0.3, distance=distance, negative_multiplier=rule, start=start
    )
    fit = fit_multipliers(
        model, samples.inputs, samples.labels, method="gradient", config=config
    ).samples.multipliers
    path, distances = multiplier_trail(
        *per_sample_gradients(model, samples.inputs, samples.labels), config=config
    )
    assert path.shape == (41, 12)
    assert len(distances) == 41
    assert distances[-1] < distances[0]
    assert bool((path >= 0).all())
    last = path[-1]
    if distance == "cosine":  # blind to the scale, which the streaming fit sets at the end
        last, fit = last / last.norm(), fit / fit.norm()
    torch.testing.assert_close(last, fit, rtol=1e-4, atol=1e-5)


def test_labels_and_lengths_are_checked():
    model, samples = build("dense"), candidates(4)
    with pytest.raises(ValueError, match="labels"):
        per_sample_gradients(model, samples.inputs, samples.labels + 100)
    with pytest.raises(ValueError, match="theta"):
        multiplier_trail(torch.ones(4, 3), torch.ones(5))
