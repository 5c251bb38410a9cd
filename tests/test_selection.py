"""Selection against slow oracles: every choice is written out as loops over samples."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, build, candidates, delicate
from torch.utils.data import DataLoader, TensorDataset

from dsvlib import (
    HitRecorder,
    Split,
    SupportSet,
    TrainConfig,
    class_means,
    forgetting,
    herding,
    k_center,
    random_subset,
    select,
    train,
)
from dsvlib.classifiers.architectures import embed
from dsvlib.data.datasets import Dataset
from dsvlib.frozen import evaluation_mode
from dsvlib.selection import forgetting_events

COUNT = 24


@pytest.fixture
def split():
    samples = candidates(COUNT)
    return Split(samples.inputs, samples.labels)


def hits_of(count=COUNT, epochs=6):
    return torch.rand(epochs, count, generator=torch.Generator().manual_seed(5)) > 0.4


CHOICES = {
    "random": random_subset,
    "means": class_means,
    "herding": herding,
    "k-center": k_center,
    "forgetting": lambda split, per_class: forgetting(split, per_class, hits=hits_of(len(split))),
}
every = pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)


@every
@pytest.mark.parametrize("per_class", [1, 3])
def test_each_returns_classes_in_order_with_equal_multipliers(choose, per_class, split):
    chosen = choose(split, per_class)
    assert isinstance(chosen, SupportSet)
    assert chosen.labels.tolist() == [c for c in range(CLASSES) for _ in range(per_class)]
    assert chosen.multipliers.tolist() == [1] * len(chosen)
    assert chosen.inputs.dtype == split.inputs.dtype
    if choose is not class_means:
        distances = torch.cdist(chosen.inputs.flatten(1), split.inputs.flatten(1))
        nearest, index = distances.min(dim=1)
        assert float(nearest.max()) < 1e-6
        assert len(set(index.tolist())) == len(chosen)  # without replacement
        assert torch.equal(split.labels[index], chosen.labels)


@every
def test_too_few_samples_are_named(choose, split):
    short = split[torch.nonzero((split.labels != 1) | (torch.arange(COUNT) < 5))[:, 0]]
    assert len(choose(short, 2)) == 6
    with pytest.raises(ValueError, match=r"at least 3 samples of every class, got 2 of class 1"):
        choose(short, 3)
    with pytest.raises(ValueError, match=r"got none of class 1; add the missing class"):
        choose(split[torch.nonzero(split.labels != 1)[:, 0]], 1)
    with pytest.raises(ValueError, match="per_class"):
        choose(split, 0)
    for wrong in (1.5, True):
        with pytest.raises(TypeError, match="whole number"):
            choose(split, wrong)
    with pytest.raises(ValueError, match="class numbers ≥ 0"):
        choose(Split(split.inputs, split.labels - 1), 1)


@every
def test_a_data_set_passes_on_what_it_knows(choose, split):
    data = Dataset("toy", ("a", "b", "c"), (0.5, 0.5), (0.2, 0.2), split, split[:3])
    if choose is CHOICES["forgetting"]:
        chosen = forgetting(data, 2, hits=hits_of())
    else:
        chosen = choose(data, 2)
    assert chosen.classes == ("a", "b", "c")
    assert chosen.std == (0.2, 0.2)
    assert torch.equal(chosen.inputs, choose(split, 2).inputs)
    described = candidates(COUNT).describe(
        Dataset("toy", ("a", "b", "c", "d"), (), (), split, split)
    )
    with pytest.raises(ValueError, match="none of class 3"):  # named, hence wanted
        choose(described, 1)


@every
def test_soft_labels_count_as_their_largest_entry(choose):
    samples = candidates(COUNT, soft=True)
    chosen = choose(samples, 2)
    assert chosen.labels.tolist() == [0, 0, 1, 1, 2, 2]


@every
def test_any_torch_data_set_will_do(choose, split):
    pairs = TensorDataset(split.inputs, split.labels)
    for data in (pairs, DataLoader(pairs, batch_size=7)):
        if choose is CHOICES["forgetting"]:
            chosen = forgetting(data, 2, hits=hits_of())
        else:
            chosen = choose(data, 2)
        assert torch.equal(chosen.inputs, choose(split, 2).inputs)
    for wrong in (None, "digits", 3):
        with pytest.raises(TypeError, match="expected a Split, or a Dataset or DataLoader"):
            forgetting(wrong, 1, hits=hits_of())


# --- by λ ----------------------------------------------------------------------------------------


def test_select_takes_the_largest_multipliers():
    samples = candidates(COUNT)
    chosen = select(samples, 3)
    for label in range(CLASSES):
        own = samples.multipliers[samples.labels == label].sort(descending=True).values
        assert torch.equal(chosen.multipliers[chosen.labels == label], own[:3])


def test_select_keeps_the_order_of_ties():
    inputs = torch.arange(6.0)[:, None]
    samples = SupportSet(inputs, torch.tensor([0, 1] * 3), torch.tensor([1.0, 2, 1, 2, 3, 2]))
    assert select(samples, 2).inputs[:, 0].tolist() == [4, 0, 1, 3]


def test_select_errors():
    samples = candidates(4)
    with pytest.raises(ValueError, match="at least 2 samples of every class, got 1 of class 1"):
        select(samples, 2)
    with pytest.raises(ValueError, match="none of class 0"):
        select(samples[1:3], 1)
    soft = candidates(COUNT, soft=True)
    assert torch.equal(select(soft, 2).hard_labels, torch.tensor([0, 0, 1, 1, 2, 2]))


# --- controls ------------------------------------------------------------------------------------


def test_random_subset_follows_its_generator(split):
    one, same, other = (
        random_subset(split, 2, generator=torch.Generator().manual_seed(seed)).inputs
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert torch.equal(one, random_subset(split, 2).inputs)
    assert not torch.equal(one, other)


def test_class_means(split):
    means = class_means(split)
    for label in range(CLASSES):
        torch.testing.assert_close(means.inputs[label], split.inputs[split.labels == label].mean(0))
    parts = class_means(split, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts.inputs.view(CLASSES, 4, 2, 4, 4).mean(1), means.inputs)
    assert not torch.equal(parts.inputs, class_means(split, 4).inputs)
    every_sample = class_means(split, COUNT // CLASSES)
    torch.testing.assert_close(every_sample.inputs[0], split.inputs[0])


# --- geometry ------------------------------------------------------------------------------------


def test_herding_is_greedy_about_the_mean(split):
    features = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(2))
    chosen = herding(split, 4, features=features)
    expected = []
    for label in range(CLASSES):
        group = torch.nonzero(split.labels == label)[:, 0].tolist()
        mean = features[group].mean(0)
        taken: list[int] = []
        for _ in range(4):
            errors = {
                j: float((features[[*taken, j]].mean(0) - mean).norm())
                for j in group
                if j not in taken
            }
            taken.append(min(errors, key=errors.__getitem__))  # closest, not farthest
        expected += taken
    assert torch.equal(chosen.inputs, split.inputs[expected])


def test_herding_all_samples_meets_the_mean(split):
    everything = herding(split, COUNT // CLASSES)
    torch.testing.assert_close(
        everything.inputs.view(CLASSES, -1, 2, 4, 4).mean(1), class_means(split).inputs
    )


def test_k_center_takes_the_farthest_first(split):
    features = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(2))
    chosen = k_center(split, 4, features=features)
    expected = []
    for label in range(CLASSES):
        group = torch.nonzero(split.labels == label)[:, 0].tolist()
        mean = features[group].mean(0)
        taken = [min(group, key=lambda j: float((features[j] - mean).norm()))]
        while len(taken) < 4:
            rest = [j for j in group if j not in taken]
            taken.append(
                max(
                    rest,
                    key=lambda j: min(float((features[j] - features[i]).norm()) for i in taken),
                )
            )
        expected += taken
    assert torch.equal(chosen.inputs, split.inputs[expected])


def test_k_center_with_duplicates_never_repeats_a_sample():
    split = Split(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    assert len(k_center(split, 4)) == 4
    split = Split(torch.arange(4.0)[:, None] // 2, torch.zeros(4, dtype=torch.int64))
    assert sorted(k_center(split, 4).inputs[:, 0].tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("choose", [herding, k_center])
def test_features_of_a_model(choose, split, untouched):
    model = delicate()
    with untouched(model):
        chosen = choose(split, 3, model=model)
    with torch.no_grad(), evaluation_mode(model):
        features = embed(model, split.inputs)
    assert torch.equal(chosen.inputs, choose(split, 3, features=features).inputs)


@pytest.mark.parametrize("choose", [herding, k_center])
def test_pixels_are_the_default_features(choose, split):
    chosen = choose(split, 3)
    assert torch.equal(chosen.inputs, choose(split, 3, features=split.inputs.flatten(1)).inputs)


@pytest.mark.parametrize("choose", [herding, k_center])
def test_features_that_do_not_fit(choose, split):
    with pytest.raises(ValueError, match="got both"):
        choose(split, 1, features=torch.ones(COUNT, 2), model=build("dense"))
    with pytest.raises(ValueError, match=r"n = 24 samples, got \[3, 2\]"):
        choose(split, 1, features=torch.ones(3, 2))
    with pytest.raises(ValueError, match="finite"):
        choose(split, 1, features=torch.full((COUNT, 2), torch.nan))


# --- history -------------------------------------------------------------------------------------


def test_forgetting_events_by_hand():
    hits = torch.tensor(
        [
            [1, 0, 1, 0, 1],
            [1, 1, 0, 0, 1],
            [1, 0, 1, 0, 1],
            [1, 1, 0, 0, 0],
        ],
        dtype=torch.bool,
    )
    # never forgotten, forgotten once, twice, never learned (all four epochs), once
    assert forgetting_events(hits).tolist() == [0, 1, 2, 4, 1]


def test_forgetting_takes_the_most_forgettable():
    hits = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    split = Split(torch.arange(5.0)[:, None], torch.tensor([0, 0, 0, 1, 1]))
    assert forgetting(split, 2, hits=hits).inputs[:, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "hits",
    [torch.ones(2, COUNT), torch.ones(COUNT, dtype=torch.bool), HitRecorder(COUNT).hits],
    ids=["floats", "one epoch as a row", "no epoch"],
)
def test_forgetting_needs_a_history(hits, split):
    with pytest.raises(ValueError, match="hits: expected bool"):
        forgetting(split, 1, hits=hits)


def test_forgetting_needs_a_history_of_these_samples(split):
    with pytest.raises(ValueError, match="inputs 24, hits 7"):
        forgetting(split, 1, hits=hits_of(7))


def test_recorder_follows_training(split):
    recorder = HitRecorder(COUNT)
    seen = []

    def on_batch(indices, hits):
        seen.append((indices.clone(), hits.clone()))
        recorder(indices, hits)

    model = build("conv")
    train(model, split, config=TrainConfig(epochs=3, batch_size=10), on_batch=on_batch)
    assert recorder.hits.shape == (3, COUNT)
    for number, (indices, hits) in enumerate(seen):
        assert torch.equal(recorder.hits[number // 3][indices], hits)
    assert len(forgetting(split, 2, hits=recorder.hits)) == 6
