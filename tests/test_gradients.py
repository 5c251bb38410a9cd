"""The products of G against one backward pass per sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Once, build, candidates, sample_gradients

from dsvlib import weighted_gradient
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients, flatten, per_sample_gradients


@pytest.mark.parametrize("kind", ["dense", "conv", "conv-group", "conv-batch"])
def test_products(kind, untouched):
    model, samples = build(kind), candidates(7)
    theta, expected = sample_gradients(model, samples)
    vector = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).double()
    with untouched(model), evaluation_mode(model):
        gradients = SampleGradients(model, samples.inputs, samples.labels, batch_size=3)
        rows = gradients.fill(torch.empty(4, len(theta)).double(), 2)
        total = gradients.weighted_sum(samples.multipliers)
        change = gradients.directional(vector)
        logits = gradients.logits()
        torch.testing.assert_close(logits, model(samples.inputs))
    np.testing.assert_allclose(gradients.theta, theta)
    np.testing.assert_allclose(rows, expected[2:6], atol=1e-14)
    np.testing.assert_allclose(total, samples.multipliers.numpy() @ expected, atol=1e-14)
    np.testing.assert_allclose(change, expected @ vector.numpy(), atol=1e-14)


def test_a_layer_with_a_first_derivative_only_leaves_nothing_out():
    """Derivatives of the gradient in λ would end at it, and Gv lack what lies below."""
    body, samples = build("conv"), candidates(5)
    model = torch.nn.Sequential(body[0], Once(), *body[1:])
    theta, expected = sample_gradients(model, samples)
    vector = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).double()
    with evaluation_mode(model):
        gradients = SampleGradients(model, samples.inputs, samples.labels, batch_size=3)
        with pytest.warns(UserWarning, match="once_differentiable"):
            change = gradients.directional(vector)
    np.testing.assert_allclose(change, expected @ vector.numpy(), atol=1e-14)


def test_products_over_some_of_the_samples():
    model, samples = build("conv"), candidates(7)
    theta, expected = sample_gradients(model, samples)
    index = torch.tensor([5, 0, 3, 6])
    with evaluation_mode(model):
        gradients = SampleGradients(model, samples.inputs, samples.labels, batch_size=3)
        total = gradients.weighted_sum(samples.multipliers, index)
        change = gradients.directional(gradients.theta, index)
    chosen = np.isin(np.arange(7), index)
    weights = np.where(chosen, samples.multipliers.numpy(), 0)
    np.testing.assert_allclose(total, weights @ expected, atol=1e-14)
    np.testing.assert_allclose(change, np.where(chosen, expected @ theta, 0), atol=1e-14)


@pytest.mark.parametrize("memory", [1e-4, 3e-5, 2e-5], ids=["held", "two panels", "many panels"])
def test_gram_matrix_does_not_depend_on_memory(memory):
    model, samples = build("conv"), candidates(17)
    theta, expected = sample_gradients(model, samples)
    gradients = SampleGradients(model, samples.inputs, samples.labels, batch_size=3)
    with evaluation_mode(model):
        gram, projection = gradients.gram(memory)
    np.testing.assert_allclose(gram, expected @ expected.T, rtol=1e-12)
    np.testing.assert_allclose(projection, expected @ theta, rtol=1e-12)


def test_more_samples_than_a_column_block():
    """The Gram matrix is mirrored block by block: look at both sides of a seam."""
    model, samples = build("dense"), candidates(300)
    _, expected = sample_gradients(model, samples)
    gradients = SampleGradients(model, samples.inputs, samples.labels)
    with evaluation_mode(model):
        gram, _ = gradients.gram(1.0)
    np.testing.assert_allclose(gram, expected @ expected.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "conv", "conv-batch"])
def test_gradients_add_up_to_the_weighted_one(kind, untouched):
    model, samples = build(kind), candidates(9)
    with untouched(model):
        gradients, theta = per_sample_gradients(model, samples.inputs, samples.labels, batch_size=4)
    expected = flatten(weighted_gradient(model, samples).values())
    torch.testing.assert_close(gradients.T @ samples.multipliers, expected)
    torch.testing.assert_close(theta, flatten(model.parameters()).detach())


def test_gradients_of_some_parameters():
    model, samples = build("dense"), candidates(5)
    name, value = list(model.named_parameters())[-1]
    gradients, theta = per_sample_gradients(
        model, samples.inputs, samples.labels, params={name: value}
    )
    assert gradients.shape == (5, value.numel())
    torch.testing.assert_close(theta, value.detach().reshape(-1))
    with pytest.raises(ValueError, match="labels"):
        per_sample_gradients(model, samples.inputs, samples.labels + 100)


def test_gradients_that_are_held_give_the_same_products():
    model, samples = build("conv"), candidates(7)
    index = torch.tensor([5, 0, 3])
    with evaluation_mode(model):
        streamed, held = (SampleGradients(model, samples.inputs, samples.labels) for _ in range(2))
        vector = torch.linspace(-1, 1, len(held.theta)).double()
        held.hold(1e-9)  # too little: nothing is held
        assert held._held is None
        held.hold(1.0)
        assert held._held is not None
        for chosen in (None, index):
            torch.testing.assert_close(
                held.weighted_sum(samples.multipliers, chosen),
                streamed.weighted_sum(samples.multipliers, chosen),
            )
            torch.testing.assert_close(
                held.directional(vector, chosen), streamed.directional(vector, chosen)
            )
