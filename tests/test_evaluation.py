"""Evaluation: fresh networks per seed, real test data, and nothing learnt from the method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dsvlib import EvaluationConfig, SupportSet, TrainConfig, evaluate, evaluation, train
from dsvlib.augmentation import DSA
from dsvlib.data.datasets import Split

SHORT = EvaluationConfig(training=TrainConfig(epochs=10, batch_size=64, learning_rate=0.05))


def network(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(256, 10))


@pytest.fixture
def real(digits) -> SupportSet:
    train = digits.train[:200]
    return SupportSet(train.inputs, train.labels, torch.ones(200))


@pytest.fixture
def test_part(digits) -> Split:
    return digits.test


def test_real_images_teach(real, test_part):
    result = evaluate(real, test_part, build_model=network, config=SHORT, seeds=[0, 1, 2])
    assert result.accuracies.shape == (3,)
    assert float(result.accuracies.min()) > 0.8
    assert result.mean == pytest.approx(float(result.accuracies.mean()))
    assert result.std == pytest.approx(float(result.accuracies.std()))
    assert f"{result.mean:.4f}" in repr(result)


def test_per_class_accuracies_add_up(real, test_part):
    result = evaluate(real, test_part, build_model=network, config=SHORT, seeds=[3, 5])
    frame = result.per_class
    assert list(frame.columns) == ["seed", "class", "accuracy"]
    assert list(frame["seed"]) == [3] * 10 + [5] * 10
    assert list(frame["class"]) == list(range(10)) * 2
    counts = test_part.labels.bincount(minlength=10)
    for seed, overall in zip((3, 5), result.accuracies, strict=True):
        own = torch.tensor(frame.loc[frame["seed"] == seed, "accuracy"].to_numpy())
        assert float((own * counts).sum() / counts.sum()) == pytest.approx(float(overall))


def test_single_seed_has_no_spread(real, test_part):
    result = evaluate(real, test_part, build_model=network, config=SHORT, seeds=[0])
    assert result.accuracies.shape == (1,)
    assert result.std != result.std  # NaN


def test_default_is_five_seeds(real, test_part):
    result = evaluate(real[:20], test_part[:20], build_model=network, config=SHORT)
    assert result.accuracies.shape == (5,)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_seeds_are_reproducible_and_global_randomness_is_restored(real, test_part, dropout):
    def run(seeds: list[int]) -> torch.Tensor:
        return evaluate(
            real, test_part, build_model=lambda: network(dropout), config=SHORT, seeds=seeds
        ).accuracies

    before = torch.get_rng_state()
    first = run([7, 8])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(run([7, 8]), first)
    assert torch.equal(run([8]), first[1:])  # a seed does not depend on those before it


def test_seeds_give_different_networks(real, test_part):
    weights = []

    def build() -> nn.Module:
        model = network()
        weights.append(model[2].weight.detach().clone())
        return model

    evaluate(real[:10], test_part[:10], build_model=build, config=SHORT, seeds=[0, 1, 0])
    assert len(weights) == 3
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_weights_and_batches_come_from_separate_streams(real, test_part, monkeypatch):
    first, batches = [], []

    def build() -> nn.Module:
        first.append(torch.rand(5))
        return network()

    def watched(model, split, *, config, generator):
        batches.append(torch.rand(5, generator=generator))
        return train(model, split, config=config, generator=generator)

    monkeypatch.setattr(evaluation, "train", watched)
    evaluate(real[:20], test_part[:20], build_model=build, config=SHORT, seeds=[3, 4, 3, -1])
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[1])
    for drawn in first:
        assert all(not torch.equal(drawn, other) for other in batches)


def test_shuffled_labels_teach_nothing(real, test_part):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = replace(real, labels=real.labels[order])
    result = evaluate(shuffled, test_part, build_model=network, config=SHORT, seeds=[0, 1, 2])
    assert result.mean < 0.25


def test_multipliers_are_ignored(real, test_part):
    def run(multipliers: torch.Tensor) -> torch.Tensor:
        samples = replace(real, multipliers=multipliers)
        return evaluate(samples, test_part, build_model=network, config=SHORT, seeds=[0]).accuracies

    random = torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(random), run(random.flip(0)))
    assert torch.equal(run(random), run(torch.zeros(200)))


def test_soft_labels_teach(real, test_part):
    soft = replace(real, labels=0.9 * nn.functional.one_hot(real.labels, 10) + 0.01)
    result = evaluate(soft, test_part, build_model=network, config=SHORT, seeds=[0])
    assert result.mean > 0.8


def test_soft_test_labels_count_as_their_largest(real, test_part):
    soft = Split(test_part.inputs, nn.functional.one_hot(test_part.labels, 10).float())
    hard = evaluate(real, test_part, build_model=network, config=SHORT, seeds=[0])
    found = evaluate(real, soft, build_model=network, config=SHORT, seeds=[0])
    assert torch.equal(found.accuracies, hard.accuracies)
    assert found.per_class.equals(hard.per_class)


def test_any_torch_data_set_will_do(real, test_part):
    pairs = TensorDataset(test_part.inputs, test_part.labels)
    expected = evaluate(real, test_part, build_model=network, config=SHORT, seeds=[0])
    for data in (pairs, DataLoader(pairs, batch_size=64)):
        found = evaluate(real, data, build_model=network, config=SHORT, seeds=[0])
        assert torch.equal(found.accuracies, expected.accuracies)
        assert found.per_class.equals(expected.per_class)


def test_data_are_untouched(real, test_part):
    copies = [t.clone() for t in (real.inputs, real.labels, test_part.inputs, test_part.labels)]
    evaluate(real, test_part, build_model=network, config=SHORT, seeds=[0])
    now = (real.inputs, real.labels, test_part.inputs, test_part.labels)
    assert all(torch.equal(a, b) for a, b in zip(copies, now, strict=True))


def test_samples_may_require_grad(real, test_part):
    live = replace(real, inputs=real.inputs.clone().requires_grad_())
    found = evaluate(live, test_part, build_model=network, config=SHORT, seeds=[0])
    plain = evaluate(real, test_part, build_model=network, config=SHORT, seeds=[0])
    assert torch.equal(found.accuracies, plain.accuracies)
    assert live.inputs.grad is None


# --- protocols and bad input ---------------------------------------------------------------------


def test_field_protocol():
    for training in (EvaluationConfig().training, EvaluationConfig.field_protocol().training):
        assert (training.optimizer, training.learning_rate) == ("sgd", 0.01)
        assert (training.momentum, training.weight_decay) == (0.9, 5e-4)
        assert (training.epochs, training.schedule, training.batch_size) == (300, "halfway", 256)
        assert training.augmentation is None
    augmented = EvaluationConfig.field_protocol(epochs=1000, augmentation=DSA).training
    assert (augmented.epochs, augmented.augmentation) == (1000, DSA)


def test_paper_protocol_is_adam_at_1e_4():
    training = EvaluationConfig.paper_protocol(epochs=7).training
    assert (training.optimizer, training.learning_rate, training.epochs) == ("adam", 1e-4, 7)
    assert (training.weight_decay, training.schedule) == (0.0, "constant")


def test_labels_must_fit_the_network(real, test_part):
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(256, 9))

    with pytest.raises(ValueError, match="from 0 to 8, got 9"):
        evaluate(real, test_part, build_model=build, config=SHORT)
    few = real[real.labels < 9]
    with pytest.raises(ValueError, match="from 0 to 8, got 9"):
        evaluate(few, test_part, build_model=build, config=SHORT)


def test_no_seeds_are_refused(real, test_part):
    with pytest.raises(ValueError, match="expected at least one seed, got none"):
        evaluate(real, test_part, build_model=network, config=SHORT, seeds=[])
    with pytest.raises(TypeError, match=r"several whole numbers, got 5; pass range\(5\)"):
        evaluate(real, test_part, build_model=network, config=SHORT, seeds=5)


def test_wrong_test_shapes_are_refused_before_training(real, test_part):
    calls = []

    def build() -> nn.Module:
        calls.append(1)
        return network()

    with pytest.raises(ValueError, match="expected a shape"):
        evaluate(real, Split(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])), build_model=build)
    with pytest.raises(ValueError, match="expected a shape"):
        evaluate(replace(real, inputs=torch.zeros(200, 1, 8, 8)), test_part, build_model=build)
    assert len(calls) == 2


def test_results_differ_from_an_untrained_network(real, test_part):
    idle = EvaluationConfig(training=TrainConfig(epochs=0))
    untrained = evaluate(real, test_part, build_model=network, config=idle, seeds=[0])
    assert untrained.mean < 0.3
