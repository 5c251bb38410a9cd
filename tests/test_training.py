"""Training: decay in the gradient, schedules, seeds, the way to a stationary point, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import candidates, delicate
from torch import Tensor, nn

from companion.recipes import equal_multipliers
from dsvlib import SupportSet, TrainConfig, accuracy, residuals, train
from dsvlib._schedule import learning_rate_factor
from dsvlib.augmentation import AugmentationConfig
from dsvlib.classifiers.training import logits_of
from dsvlib.data.datasets import Split


def problem(count: int = 60) -> Split:
    """Three clouds in four dimensions, as float32."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    return Split(torch.randn(count, 4, generator=generator) + 2 * torch.eye(4)[labels], labels)


def linear(*, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


QUICK = TrainConfig(epochs=5, batch_size=16)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle", "halfway"])
def test_loss_decreases_and_history_is_tidy(optimizer, schedule):
    model, split = linear(), problem()
    config = TrainConfig(epochs=12, batch_size=16, optimizer=optimizer, schedule=schedule)
    history = train(model, split, config=config)
    assert list(history.columns) == ["epoch", "loss", "accuracy", "learning_rate"]
    assert list(history["epoch"]) == list(range(1, 13))
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    assert history["accuracy"].iloc[-1] > 0.8
    assert accuracy(model, split) > 0.8
    assert all(p.grad is None for p in model.parameters())


def test_log_every_keeps_the_last_epoch():
    history = train(linear(), problem(), config=TrainConfig(epochs=7, log_every=3))
    assert list(history["epoch"]) == [3, 6, 7]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_averaged_weights_are_the_mean_over_the_steps_of_the_last_epochs(optimizer):
    split, model, iterates = problem(), linear(), []
    base = TrainConfig(epochs=5, batch_size=16, optimizer=optimizer)
    # a callback sees the weights after each step, as it is called once the step was taken
    train(model, split, config=base, on_batch=lambda *_: iterates.append(vector(model)))
    averaged = linear()
    train(averaged, split, config=replace(base, average_epochs=2))
    steps = 2 * math.ceil(len(split) / 16)
    mean = torch.stack(iterates[-steps:]).mean(dim=0)
    torch.testing.assert_close(vector(averaged), mean, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(vector(averaged), iterates[-1], atol=1e-4), "or nothing was tested"


def test_averaging_takes_out_the_noise_of_the_batches():
    """At a constant rate SGD wanders around the stationary point; the mean lies near to it."""
    split, decay, cosines = problem(), 0.05, []
    base = TrainConfig(
        epochs=150, batch_size=4, learning_rate=0.05, weight_decay=decay, schedule="constant"
    )
    for epochs in (0, 100):
        model = linear()
        train(model, split, config=replace(base, average_epochs=epochs))
        cosines.append(residuals(model, equal_multipliers(model, split, decay)).cosine)
    assert 1 - cosines[1] < (1 - cosines[0]) / 2


def test_more_averaged_epochs_than_epochs():
    with pytest.raises(ValueError, match="average_epochs: expected at most epochs=5, got 6"):
        TrainConfig(epochs=5, average_epochs=6)


def test_no_epochs_leave_the_weights_alone():
    model = linear()
    assert train(model, problem(), config=TrainConfig(epochs=0)).empty
    assert torch.equal(vector(model), vector(linear()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_seed_gives_one_result(dropout):
    config = TrainConfig(epochs=3, batch_size=16)

    def weights(seed: int) -> Tensor:
        torch.rand(1)  # whatever the global generator did in between
        model = linear(dropout=dropout)
        train(model, problem(), config=config, generator=torch.Generator().manual_seed(seed))
        return vector(model)

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_global_randomness_is_left_alone(dropout):
    before = torch.get_rng_state()
    train(linear(dropout=dropout), problem(), config=QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_default_generator_is_seed_zero():
    first, second = linear(), linear()
    train(first, problem(), config=QUICK)
    train(second, problem(), config=QUICK, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vector(first), vector(second))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_is_part_of_the_gradient(optimizer):
    model, split = linear(), problem(10)
    theta = vector(model)
    F.cross_entropy(model(split.inputs), split.labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]) + 0.3 * theta
    # Adam's first step is the sign of the gradient, decoupled decay would not change it
    step = gradient if optimizer == "sgd" else gradient / (gradient.abs() + 1e-8)
    model.zero_grad()
    config = TrainConfig(
        epochs=1,
        batch_size=10,
        optimizer=optimizer,
        learning_rate=0.1,
        weight_decay=0.3,
        schedule="constant",
    )
    train(model, split, config=config)
    torch.testing.assert_close(vector(model), theta - 0.1 * step, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay():
    model = linear()
    model[0].requires_grad_(False)
    train(model, problem(), config=QUICK)
    assert torch.equal(model[0].weight, linear()[0].weight)
    assert not torch.equal(model[3].weight, linear()[3].weight)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", (1, 1, 1)),
        ("cosine", (1, 0.5, 0)),
        ("one-cycle", (0, 0.625, 0)),
        ("halfway", (1, 0.1, 0.1)),
    ],
)
def test_schedule_factors(schedule, factors):
    found = [learning_rate_factor(schedule, fraction) for fraction in (0, 0.5, 1)]
    assert found == pytest.approx(factors)


def test_schedule_corners():
    assert learning_rate_factor("halfway", 0.499) == 1
    assert learning_rate_factor("one-cycle", 0.2) == pytest.approx(1)
    assert learning_rate_factor("one-cycle", 0.1) == pytest.approx(0.5)
    assert learning_rate_factor("cosine", 0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_schedule_runs_over_the_steps():
    config = TrainConfig(epochs=4, batch_size=30, learning_rate=0.2, schedule="halfway")
    rates = train(linear(), problem(60), config=config)["learning_rate"]
    assert list(rates) == pytest.approx([0.2, 0.2, 0.02, 0.02])


def regularised(model: nn.Module, split: Split, decay: float) -> tuple[float, float]:
    """‖∇‖ of the regularised loss, and the cosine of θ and −Σ∇L."""
    model.zero_grad()
    F.cross_entropy(model(split.inputs), split.labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    theta = vector(model)
    model.zero_grad()
    return float((gradient + decay * theta).norm()), float(
        F.cosine_similarity(theta, -gradient, dim=0)
    )


@pytest.mark.parametrize("batch_size", [16, 100])
def test_polish_reaches_a_stationary_point(batch_size):
    decay, split = 0.05, problem()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 3, bias=False)
    plain = {"batch_size": batch_size, "learning_rate": 0.1, "weight_decay": decay}
    train(model, split, config=TrainConfig(epochs=2, **plain))
    norm, cosine = regularised(model, split, decay)
    train(model, split, config=TrainConfig(epochs=0, polish_steps=1000, **plain))
    polished, aligned = regularised(model, split, decay)
    assert polished < 0.02 * norm
    assert aligned > max(cosine, 0.999)
    # which is stationarity with every multiplier 1/(w·n)
    samples = SupportSet(split.inputs, split.labels, torch.full((60,), 1 / (decay * 60)))
    found = residuals(model, samples)
    assert found.stationarity < 0.02
    assert found.cosine == pytest.approx(aligned, abs=1e-5)


def test_polish_keeps_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    train(model, problem(), config=TrainConfig(epochs=0, polish_steps=3))
    assert torch.equal(model[0].running_mean, torch.zeros(4))
    assert int(model[0].num_batches_tracked) == 0


def test_on_batch_sees_every_sample_once_per_epoch():
    seen: list[Tensor] = []

    def note(indices: Tensor, hits: Tensor) -> None:
        assert indices.shape == hits.shape
        assert hits.dtype == torch.bool
        seen.append(indices)

    train(linear(), problem(50), config=TrainConfig(epochs=3, batch_size=16), on_batch=note)
    assert [len(batch) for batch in seen] == [16, 16, 16, 2] * 3
    orders = [torch.cat(seen[k : k + 4]) for k in (0, 4, 8)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(50))
    assert orders[0].tolist() != orders[1].tolist()


def test_on_batch_hits_are_the_right_ones():
    model, hits = linear(), torch.zeros(60, dtype=torch.bool)
    right = logits_of(model, problem().inputs).argmax(dim=1) == problem().labels
    config = TrainConfig(epochs=1, learning_rate=1e-12, batch_size=16)
    train(model, problem(), config=config, on_batch=lambda i, h: hits.__setitem__(i, h))
    assert 0 < right.sum() < 60
    assert torch.equal(hits, right)


def test_soft_labels_of_one_class_train_like_hard_ones():
    hard, soft, split = linear(), linear(), problem()
    train(hard, split, config=QUICK)
    train(soft, Split(split.inputs, F.one_hot(split.labels).float()), config=QUICK)
    torch.testing.assert_close(vector(soft), vector(hard), rtol=1e-4, atol=1e-6)


def test_augmentation_is_used_and_reproducible(digits):
    def history(strength: float) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
        augmentation = AugmentationConfig(translate=strength)
        config = TrainConfig(epochs=2, augmentation=augmentation)
        return list(train(model, digits.train[:200], config=config)["loss"])

    assert history(0.2) == history(0.2)
    assert history(0.2) != history(0.0)


def test_modes_are_put_back():
    model = delicate()
    modes = [m.training for m in model.modules()]
    samples = candidates(6)
    train(model, samples, config=TrainConfig(epochs=1))
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("change", [{}, {"polish_steps": 2}, {"average_epochs": 2}])
def test_gradients_that_the_caller_switched_off_are_on_inside(change):
    config, (plain, inside, fresh) = replace(QUICK, **change), (linear() for _ in range(3))
    train(plain, problem(), config=config)
    with torch.no_grad():
        train(inside, problem(), config=config)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(vector(inside), vector(plain), rtol=0, atol=0)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch.inference_mode; call"):
        train(fresh, problem(), config=config)


# --- accuracy ------------------------------------------------------------------------------------


def test_accuracy_counts_hits():
    model = nn.Identity()
    logits = torch.eye(4)
    assert accuracy(model, Split(logits, torch.tensor([0, 1, 2, 0]))) == 0.75
    soft = torch.tensor([[0.6, 0.4, 0.0, 0.0]] * 4)
    assert accuracy(model, Split(logits, soft)) == 0.25
    score = Split(torch.tensor([[-1.0], [2.0]]), torch.tensor([0, 1]))
    assert accuracy(model, score) == 1


def test_accuracy_leaves_the_model_untouched(untouched):
    model, samples = delicate(), candidates(6)
    with untouched(model):
        value = accuracy(model, samples)
    assert value == accuracy(delicate().eval(), samples)
    with untouched(model), pytest.raises(ValueError, match="expected a shape"):
        accuracy(model, Split(torch.zeros(2, 3, 4, 4).double(), torch.tensor([0, 1])))


def test_logits_come_in_batches():
    model, inputs = linear().eval(), problem().inputs
    torch.testing.assert_close(logits_of(model, inputs, batch_size=7), model(inputs))
    assert not logits_of(model, inputs).requires_grad


# --- bad input -----------------------------------------------------------------------------------


def test_divergence_is_reported():
    with pytest.raises(FloatingPointError, match=r"a finite loss.*lower the learning rate"):
        train(linear(), problem(), config=TrainConfig(epochs=20, learning_rate=1e30))


def test_divergence_while_polishing_is_reported():
    config = TrainConfig(epochs=0, polish_steps=30, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="expected"):
        train(linear(), problem(), config=config)


def test_model_without_gradients_is_refused():
    with pytest.raises(ValueError, match=r"requires? grad, got none"):
        train(linear().requires_grad_(False), problem())


@pytest.mark.parametrize("function", [train, accuracy])
def test_bad_splits_are_refused(function):
    split = problem(6)
    cases = [
        (torch.zeros(6, 5), split.labels, ValueError, "expected a shape"),
        (split.inputs.double(), split.labels, ValueError, "float64"),
        (split.inputs.int(), split.labels, TypeError, "floating-point"),
        (split.inputs * math.nan, split.labels, ValueError, "finite"),
        (split.inputs, split.labels + 1, ValueError, "from 0 to 2, got 3"),
        (split.inputs, split.labels - 1, ValueError, "from 0 to 2, got -1"),
        (split.inputs, torch.full((6, 2), 0.5), ValueError, "3 classes, got 2 columns"),
        (split.inputs[:0], split.labels[:0], ValueError, "at least one"),
    ]
    for inputs, labels, error, message in cases:
        model = linear()
        with pytest.raises(error, match=message):
            function(model, Split(inputs, labels))
        assert torch.equal(vector(model), vector(linear()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "sdg"}, "optimizer: expected one of 'sgd', 'adam'.*did you mean 'sgd'"),
        ({"schedule": "cosin"}, "schedule: expected one of.*did you mean 'cosine'"),
        ({"learning_rate": 0}, "learning_rate: expected a finite number > 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"epochs": -1}, "epochs: expected a finite number ≥ 0, got -1"),
        ({"polish_steps": -1}, "polish_steps"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": 5}, "momentum: expected a finite number ≥ 0 and < 1"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"batch_size": 0}, "batch_size: expected a finite number ≥ 1, got 0"),
        ({"log_every": 0}, "log_every"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "polish_steps", "log_every"])
@pytest.mark.parametrize("value", [2.5, "2"])
def test_counts_are_whole_numbers(name, value):
    with pytest.raises(TypeError, match=name):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_is_used_only_where_the_processor_computes_in_it(supported, monkeypatch):
    monkeypatch.setattr("dsvlib.classifiers.training.computes_bfloat16", lambda _: supported)
    half, full = linear(), linear()
    train(half, problem(), config=TrainConfig(epochs=5, batch_size=16, precision="bfloat16"))
    train(full, problem(), config=QUICK)
    assert torch.equal(vector(half), vector(full)) is not supported
    torch.testing.assert_close(vector(half), vector(full), atol=0.1, rtol=0.1)


# --- data, labels and networks as users have them ------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """A torch Dataset of (image, label); `label` says in which form."""

    def __init__(self, split: Split, label: Callable[[Tensor], object] = int) -> None:
        self.split, self.label = split, label

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, object]:
        if index >= len(self):
            raise RuntimeError("asked beyond its end")
        return self.split.inputs[index], self.label(self.split.labels[index])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Pairs(problem())[i] for i in range(60))


FORMS = {
    "Dataset": Pairs(problem()),
    "tensor labels": Pairs(problem(), lambda label: label),
    "numpy labels": Pairs(problem(), lambda label: label.numpy()),
    "soft labels": Pairs(problem(), lambda label: F.one_hot(label, 3).float()),
    "Subset": torch.utils.data.Subset(Pairs(problem()), range(60)),
    "TensorDataset": torch.utils.data.TensorDataset(problem().inputs, problem().labels),
    "DataLoader": torch.utils.data.DataLoader(Pairs(problem()), batch_size=7),
    "IterableDataset": Stream(),
    "list": [Pairs(problem())[i] for i in range(60)],
    "NumPy images": [(x.numpy(), y) for x, y in (Pairs(problem())[i] for i in range(60))],
    "pair of tensors": (problem().inputs, problem().labels),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_a_split_trains_to_the_same_weights(form):
    expected, model = linear(), linear()
    train(expected, problem(), config=QUICK)
    train(model, FORMS[form], config=QUICK)
    torch.testing.assert_close(vector(model), vector(expected), rtol=1e-4, atol=1e-6)
    assert accuracy(model, FORMS[form]) == accuracy(model, problem())


@pytest.mark.parametrize("function", [train, accuracy])
@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, "expected a Split, or a Dataset or DataLoader .* got NoneType"),
        ({1, 2}, "got set"),
        ("digits", "got str"),
        (torch.zeros(2, 4), "got Tensor"),
        ([{"image": 1}], r"item 0: expected \(image, label\), got dict"),
        ([("not an image", 1)], r"item 0: expected the image as a float tensor.*ToTensor"),
        (Pairs(problem(), lambda label: "cat"), "expected class numbers from 0.*got list"),
        (Pairs(problem(), lambda label: None), "expected class numbers from 0"),
        ((torch.zeros(2, 4), ["cat", "dog"]), r"labels: expected class numbers .*number the names"),
        ((torch.zeros(2, 4), {0, 1}), "labels: expected class numbers .* got set"),
        ((torch.zeros(2, 4), None), "labels: expected class numbers .* got NoneType"),
    ],
)
def test_what_is_no_split_or_label_is_said_in_words(function, split, message):
    with pytest.raises(TypeError, match=message):
        function(linear(), split)


def test_a_whole_data_set_and_mixed_shapes_are_refused(digits):
    with pytest.raises(TypeError, match=r"pass data.train or data.test"):
        train(linear(), digits)
    with pytest.raises(ValueError, match=r"images of one shape, got \[\(4,\), \(5,\)\]"):
        train(linear(), [(torch.zeros(4), 0), (torch.zeros(5), 1)])
    with pytest.raises(ValueError, match="at least one sample"):
        train(linear(), [])


def test_labels_that_start_at_one_are_recognised():
    split = problem()
    with pytest.raises(ValueError, match="subtract 1 from labels that start at 1"):
        train(linear(), Split(split.inputs, split.labels + 1))


def test_a_last_batch_of_one_under_batch_norm_is_said_at_once():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    before, buffers = vector(model), [value.clone() for value in model.buffers()]
    split, config = problem()[:33], TrainConfig(epochs=1, batch_size=16)
    with pytest.raises(ValueError, match=r"batch_size: .*33 samples in batches of 16"):
        train(model, split, config=config)
    assert torch.equal(vector(model), before)
    assert all(map(torch.equal, model.buffers(), buffers))
    train(model, split, config=replace(config, batch_size=11))
    images = Split(torch.randn(17, 1, 4, 4), torch.arange(17) % 3)
    pixels = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3))
    train(pixels, images, config=config)  # one image has pixels enough


def test_networks_of_volumes_are_trained():
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(12, 1, 4, 4, 4, generator=generator), torch.arange(12) % 2)
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    history = train(model, split, config=TrainConfig(epochs=30, learning_rate=0.1))
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]


def test_an_error_of_the_model_itself_keeps_its_words():
    class Broken(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            raise RuntimeError("my own bug")

    for function in (train, accuracy):
        with pytest.raises(RuntimeError, match=r"^my own bug"):
            function(Broken(4, 3), problem())


def test_networks_that_return_more_than_logits_are_trained():
    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(inputs), "features": inputs}

    rich, plain = Rich(), linear()
    config = TrainConfig(epochs=3, batch_size=16, polish_steps=2)
    train(rich, problem(), config=config)
    train(plain, problem(), config=config)
    assert torch.equal(vector(rich), vector(plain))
    assert accuracy(rich, problem()) == accuracy(plain, problem())


@pytest.mark.parametrize("epochs", [0, 3])
def test_another_loss_of_each_sample(epochs):
    """One logit with a logistic loss is two logits, their difference trained alone."""

    def logistic(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), reduction="none")

    split = problem()
    split = Split(split.inputs, (split.labels > 0).long())
    torch.manual_seed(0)
    one = nn.Linear(4, 1, bias=False)
    weight, config = one.weight.detach().clone(), TrainConfig(
        epochs=epochs, batch_size=60, weight_decay=0.1, momentum=0, polish_steps=0,
        schedule="constant",
    )  # fmt: skip
    history = train(one, split, config=config, loss_fn=logistic)
    signs = 2.0 * split.labels - 1
    for _ in range(epochs):  # gradient descent by hand
        score = signs * (split.inputs @ weight[0])
        slope = -(signs * torch.sigmoid(-score))[:, None] * split.inputs
        weight = weight - 0.05 * (slope.mean(0) + 0.1 * weight)
    torch.testing.assert_close(one.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    assert len(history) == epochs


def test_several_labels_of_a_sample_and_a_loss_that_reduces():
    many = (torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) > 0.5).float()

    def each(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)

    split = Split(problem().inputs, many)
    history = train(linear(), split, config=TrainConfig(epochs=20), loss_fn=each)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    with pytest.raises(ValueError, match=r"loss_fn: expected one loss per sample.*got shape \[\]"):
        train(linear(), split, loss_fn=lambda z, y: each(z, y).mean())
