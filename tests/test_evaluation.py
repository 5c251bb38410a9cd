"""Evaluation: fresh networks per seed, real test data, and nothing learnt from the method."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dsvlib import (
    EvaluationConfig,
    SupportSet,
    TrainConfig,
    build_model,
    evaluate,
    evaluation,
    train,
)
from dsvlib.augmentation import DSA
from dsvlib.classifiers.training import logits_of
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


def test_networks_are_fresh(real, test_part):
    options = {"config": SHORT, "seeds": [0, 1]}
    trained = network()
    with pytest.raises(TypeError, match=r"a function that builds .*, got the network Sequential;"):
        evaluate(real, test_part, build_model=trained, **options)
    with pytest.raises(TypeError, match=r"returns a torch.nn.Module, got NoneType;"):
        evaluate(real, test_part, build_model=lambda: None, **options)
    for together in (1, 2):
        with pytest.raises(ValueError, match=r"got the same one again, which has learned already"):
            evaluate(real, test_part, build_model=lambda: trained, together=together, **options)


def test_one_score_and_probabilities_are_told(real, test_part):
    alike = SupportSet(real.inputs, 0 * real.labels, real.multipliers)
    same = replace(test_part, labels=0 * test_part.labels)
    one, two = (nn.Sequential(nn.Flatten(), nn.Linear(256, n), nn.Softmax(1)) for n in (1, 10))
    options = {"config": SHORT, "seeds": [0]}
    with pytest.raises(ValueError, match="got one, of which it is always 0"):
        evaluate(alike, same, build_model=lambda: one, **options)
    with pytest.warns(UserWarning, match="expected logits, got probabilities"):
        evaluate(real, test_part, build_model=lambda: two, **options)


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


def convnet(norm: str = "instance") -> nn.Module:
    return build_model(
        "convnet", num_classes=10, shape=(1, 16, 16), width=4, depth=2, norm=norm
    ).double()


class Counting(nn.Sequential):
    """Counts its calls in a buffer, anew or in place, and writes into its input."""

    def __init__(self, *, anew: bool) -> None:
        super().__init__(nn.Flatten(), nn.Linear(256, 10, dtype=torch.float64))
        self.anew = anew
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.empty(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.anew:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return super().forward(inputs.sub_(0.5))


def frozen_in_part() -> nn.Module:
    model = convnet()
    model.features[0].requires_grad_(False)
    return model


def both_ways(
    samples: SupportSet, test: Split, build: Callable[[], nn.Module], **settings
) -> list[torch.Tensor]:
    """Hold networks trained three at once against the same in turn; return the first's weights."""
    found = []
    for together in (1, 3):
        made: list[nn.Module] = []

        def note(made: list[nn.Module] = made) -> nn.Module:
            made.append(build())
            return made[-1]

        result = evaluate(
            samples, test, build_model=note, seeds=[4, 2, 9, 7, 1], together=together, **settings
        )
        logits = torch.stack([logits_of(model, test.inputs) for model in made])
        states = [model.state_dict() for model in made]
        flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in made]
        found.append((result, logits, states, flags))
    (turn, logits, states, flags), (result, same, again, kept) = found
    torch.testing.assert_close(same, logits, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(again, states, rtol=1e-7, atol=1e-9)
    assert torch.equal(result.accuracies, turn.accuracies)
    assert result.per_class.equals(turn.per_class)
    assert kept == flags
    assert not torch.allclose(logits[0], logits[1])
    return list(states[0].values())


def in_double(split: SupportSet | Split, count: int) -> SupportSet:
    part = split[:count]
    return SupportSet(part.inputs.double(), part.labels, torch.ones(count))


@pytest.fixture
def never_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last group, of two, be trained together, too; nothing may take turns unnoticed."""
    original = evaluation.train_together

    def told(models, *args, **kwargs):
        reason = original(models, *args, **kwargs)
        assert reason is None
        assert len(models) in (2, 3)

    monkeypatch.setattr(evaluation, "train_together", told)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("augmentation", [None, DSA])
@pytest.mark.parametrize("protocol", ["field_protocol", "paper_protocol"])
@pytest.mark.usefixtures("never_in_turn")
def test_networks_trained_together_are_those_trained_in_turn(
    real, test_part, protocol, augmentation, soft
):
    config = getattr(EvaluationConfig, protocol)(epochs=4, augmentation=augmentation)
    config = replace(config, training=replace(config.training, batch_size=8))  # the last one: 6
    samples = in_double(real, 22)
    if soft:
        rows = 0.9 * nn.functional.one_hot(samples.labels, 10) + 0.01
        samples = replace(samples, labels=rows.double())
    before = samples.inputs.clone()
    both_ways(samples, in_double(test_part, 200), convnet, config=config)
    assert torch.equal(samples.inputs, before)


@pytest.mark.parametrize(
    "build", [lambda: convnet("batch"), lambda: Counting(anew=False), frozen_in_part]
)
@pytest.mark.usefixtures("never_in_turn")
def test_buffers_and_frozen_weights_are_as_after_training_in_turn(real, test_part, build):
    state = both_ways(in_double(real, 22), in_double(test_part, 50), build, config=SHORT)
    assert all(torch.isfinite(value).all() for value in state)


def of_two_kinds() -> nn.Module:
    activation = nn.ReLU() if torch.initial_seed() % 2 else nn.Tanh()  # by evaluate's seed
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10), activation).double()


def of_a_batch() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10), nn.BatchNorm1d(10)).double()


class ByValue(nn.Sequential):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs if float(inputs.mean()) > 0 else inputs + 1)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: network(0.5).double(), "random"),
        (lambda: ByValue(nn.Flatten(), nn.Linear(256, 10)).double(), "item"),
        (lambda: Counting(anew=True), "logits or buffers differ"),
        (of_two_kinds, "logits or buffers differ"),
    ],
)
def test_networks_that_cannot_be_stacked_take_turns_and_say_so(real, test_part, build, reason):
    samples, test = in_double(real, 22), in_double(test_part, 50)
    with pytest.warns(UserWarning, match=f"one after the other, as with together=1.*{reason}"):
        both_ways(samples, test, build, config=SHORT)


@pytest.mark.parametrize(
    "change",
    [{"average_epochs": 2}, {"polish_steps": 2}, {"precision": "bfloat16"}],
)
def test_training_of_one_network_alone_takes_turns(real, test_part, change):
    config = EvaluationConfig(training=replace(SHORT.training, epochs=3, **change))
    arguments = {"build_model": network, "config": config, "seeds": [0, 1]}
    with pytest.warns(UserWarning, match="for one network alone"):
        found = evaluate(real[:20], test_part[:50], together=2, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turn = evaluate(real[:20], test_part[:50], **arguments)
    assert torch.equal(found.accuracies, turn.accuracies)


def test_ten_at_most_are_trained_together_on_a_gpu_and_one_on_a_cpu(real, test_part, monkeypatch):
    sizes = []

    def watched(models, *args, **kwargs):
        sizes.append(len(models))
        return "left to the loop"

    monkeypatch.setattr(evaluation, "train_together", watched)
    arguments = {"build_model": network, "seeds": range(13)}
    arguments["config"] = EvaluationConfig(training=TrainConfig(epochs=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # turns are no surprise where nothing was asked for
        plain = evaluate(real[:20], test_part[:50], **arguments)
        assert sizes == []
        monkeypatch.setattr(evaluation, "device_of", lambda model: torch.device("cuda"))
        found = evaluate(real[:20], test_part[:50], **arguments)
    assert sizes == [10, 3]
    assert torch.equal(found.accuracies, plain.accuracies)


def test_training_together_raises_as_training_in_turn_does(real, test_part):
    samples, test = in_double(real, 22), in_double(test_part, 50)
    wild = EvaluationConfig(training=TrainConfig(epochs=20, learning_rate=1e30))
    single = EvaluationConfig(training=TrainConfig(epochs=1, batch_size=7))
    odd: tuple[tuple[type[Exception], str, Callable[[], nn.Module], EvaluationConfig], ...] = (
        (FloatingPointError, "in epoch", convnet, wild),
        (ValueError, "two samples or more", of_a_batch, single),
        (ValueError, "require grad", lambda: convnet().requires_grad_(False), SHORT),
    )
    for kind, message, build, config in odd:
        for together in (None, 2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(kind, match=message):
                    evaluate(samples, test, build_model=build, config=config, together=together)
    for wrong in (0, 2.0):
        with pytest.raises((TypeError, ValueError), match="together"):
            evaluate(samples, test, build_model=convnet, together=wrong)  # type: ignore[arg-type]


def test_a_network_that_does_not_fit_beside_others_takes_turns(real, test_part, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dsvlib.classifiers.training._reads_alike", full)
    samples, test = in_double(real, 22), in_double(test_part, 50)
    with pytest.warns(UserWarning, match="out of memory"):
        both_ways(samples, test, convnet, config=SHORT)
