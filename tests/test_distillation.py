"""Matching: losses on closed forms, what a run may see, and that one seed gives one result."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Once
from torch import Tensor, nn

from dsvlib.augmentation import DSA
from dsvlib.classifiers.architectures import build_model
from dsvlib.conditions import deepkkt_loss
from dsvlib.data.datasets import Split
from dsvlib.distillation import (
    DistributionMatchingConfig,
    GradientMatchingConfig,
    _matching,
    distribution_matching,
    feature_distance,
    gradient_distance,
    gradient_matching,
    match_distributions,
    match_gradients,
    seen_images,
)
from dsvlib.solution import Solution, Status

CLASSES, SHAPE = 3, (1, 8, 8)
NETWORK: dict[str, Any] = {"width": 8, "depth": 2}
NO_FLIP = dataclasses.replace(DSA, flip=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_split(per_class: int = 6) -> Split:
    """Three classes around a mean of their own."""
    labels = torch.arange(CLASSES).repeat(per_class)
    means = torch.randn(CLASSES, *SHAPE, generator=seeded(1))
    return Split(
        means[labels] + 0.3 * torch.randn(len(labels), *SHAPE, generator=seeded(2)), labels
    )


def make_classifier(norm: str = "none") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build_model("convnet", num_classes=CLASSES, shape=SHAPE, width=8, depth=2, norm=norm)


def dc(split: Split, per_class: int = 1, **changes: Any) -> Solution:
    settings: dict[str, Any] = {"steps": 3, "log_every": 1, "network_options": NETWORK}
    config = GradientMatchingConfig(**settings | changes)
    return match_gradients(split, per_class=per_class, config=config, generator=seeded(5))


def dsa(split: Split, per_class: int = 1, **changes: Any) -> Solution:
    return dc(split, per_class, **{"init": "real", "augmentation": NO_FLIP} | changes)


def dm(
    split: Split, per_class: int = 1, classifier: nn.Module | None = None, **changes: Any
) -> Solution:
    settings: dict[str, Any] = {"steps": 3, "log_every": 1, "network_options": NETWORK}
    config = DistributionMatchingConfig(**{"augmentation": NO_FLIP} | settings | changes)
    return match_distributions(
        split, per_class=per_class, config=config, classifier=classifier, generator=seeded(5)
    )


def pdd(split: Split, per_class: int = 1, **changes: Any) -> Solution:
    return dm(split, per_class, make_classifier(), **changes)


@pytest.mark.parametrize("method", [dc, dsa, dm, pdd])
def test_gradients_that_the_caller_switched_off_are_on_inside(method):
    plain = method(make_split()).samples.inputs
    with torch.no_grad():
        torch.testing.assert_close(method(make_split()).samples.inputs, plain, rtol=0, atol=0)
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch.inference_mode; call"):
        method(make_split())


METHODS = pytest.mark.parametrize("method", [dc, dsa, dm, pdd])


# ---------------------------------------------------------------------------- losses


def test_feature_distance_of_linear_features_is_that_of_the_class_means() -> None:
    real, synthetic = torch.randn(4, 7, 5).double(), torch.randn(4, 2, 5).double()
    weight = torch.randn(5, 6).double()
    expected = sum(
        float(((real[c].mean(0) - synthetic[c].mean(0)) @ weight).norm() ** 2) for c in range(4)
    )
    torch.testing.assert_close(
        feature_distance(real @ weight, synthetic @ weight),
        torch.tensor(expected, dtype=torch.float64),
    )


def linear(name: str, *, num_classes: int, shape: tuple[int, int, int], **_: Any) -> nn.Module:
    """Pixels are the features that its last linear layer sees."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], num_classes))


def test_dm_with_pixels_as_features_finds_the_class_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matching, "build_model", linear)
    split = make_split()
    means = torch.stack([split.inputs[split.labels == c].mean(0) for c in range(CLASSES)])
    solution = dm(split, steps=60, learning_rate=0.2, augmentation=None)
    start = torch.stack([split.inputs[split.labels == c][0] for c in range(CLASSES)])
    expected = float((start - means).square().sum())
    assert solution.history.matching.iloc[0] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(solution.samples.inputs, means, atol=1e-4, rtol=0)


def class_gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Gradients of each class's mean loss [K, *parameter], the slow way."""
    rows = []
    for label, own in enumerate(images):
        network.zero_grad()
        nn.functional.cross_entropy(network(own), torch.full((len(own),), label)).backward()
        rows.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def test_looped_and_batched_gradients_agree_with_backward() -> None:
    network = make_classifier("instance").double()
    images = torch.randn(CLASSES, 4, *SHAPE, generator=seeded()).double()
    expected = class_gradients(network, images)
    torch.testing.assert_close(gradient_matching._looped(network, images), expected)
    torch.testing.assert_close(gradient_matching._batched(network, images), expected)


def test_gradient_distance_is_zero_at_equality_and_blind_to_the_scale_of_a_row() -> None:
    network = make_classifier("instance").double()
    images = torch.randn(CLASSES, 4, *SHAPE, generator=seeded()).double()
    gradients = class_gradients(network, images)
    assert float(gradient_distance(gradients, gradients)) == pytest.approx(0, abs=1e-9)
    other = [torch.randn(g.shape, generator=seeded()).double() for g in gradients]
    scale = [torch.rand(*g.shape[:2], generator=seeded()).double() + 0.1 for g in gradients]
    scaled = [
        g * s.reshape(*s.shape, *(1,) * (g.ndim - 2)) for g, s in zip(gradients, scale, strict=True)
    ]
    torch.testing.assert_close(
        gradient_distance(scaled, other), gradient_distance(gradients, other)
    )


def test_gradient_distance_by_hand_leaves_out_vectors() -> None:
    weight = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])  # one class, two rows
    other = torch.tensor([[[0.0, 2.0], [4.0, 3.0]]])
    bias, wrong = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 5.0]])
    distance = gradient_distance([weight, bias], [other, wrong])
    assert float(distance) == pytest.approx((1 - 0) + (1 - 24 / 25))


def test_dc_starts_at_zero_when_synthetic_equals_real() -> None:
    """Also with augmentation, if and only if both share one draw."""
    for augmentation in (None, NO_FLIP):
        solution = dc(make_split(2), 2, init="real", augmentation=augmentation, loops=(1, 1))
        assert solution.history.matching.iloc[0] == pytest.approx(0, abs=1e-3)


def test_dm_starts_at_zero_when_synthetic_equals_real() -> None:
    assert dm(make_split(2), 2).history.matching.iloc[0] == pytest.approx(0, abs=1e-6)


def test_classes_have_draws_of_their_own() -> None:
    split = make_split(2)
    split = Split(split.inputs[:1].expand(len(split), *SHAPE), split.labels)
    config = GradientMatchingConfig(
        init="real", augmentation=dataclasses.replace(NO_FLIP, one_of=False)
    )
    run = _matching.Matching(split, 1, config, None, seeded())
    real, synthetic = run.batches()
    torch.testing.assert_close(real[:, :1], synthetic)  # shared by real and synthetic ones
    assert not torch.allclose(real[0], real[1])


# ---------------------------------------------------------------------------- what a run sees


@METHODS
def test_only_the_allowed_real_images_enter(method: Callable[..., Solution]) -> None:
    split = make_split()
    allowed = seen_images(split, 2, generator=seeded(5))
    poisoned = split.inputs.clone()
    for index, image in enumerate(split.inputs):
        if not any(torch.equal(image, other) for other in allowed.inputs):
            poisoned[index] = torch.nan
    assert int(poisoned.isnan().flatten(1).any(1).sum()) == CLASSES * 4
    clean = method(split, shot=2)
    torch.testing.assert_close(
        method(Split(poisoned, split.labels), shot=2).samples.inputs,
        clean.samples.inputs,
        atol=0,
        rtol=0,
    )
    assert clean.status is Status.ALL_STEPS


@METHODS
def test_one_seed_gives_one_result_and_leaves_torchs_own_generator(
    method: Callable[..., Solution],
) -> None:
    torch.manual_seed(1)
    first = method(make_split(), shot=3)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = method(make_split(), shot=3)
    assert torch.equal(first.samples.inputs, second.samples.inputs)
    assert torch.equal(torch.get_rng_state(), before)


@METHODS
def test_result_is_tidy(method: Callable[..., Solution]) -> None:
    solution = method(make_split(), 2, **({"loops": (2, 1)} if method in (dc, dsa) else {}))
    assert solution.samples.inputs.shape == (CLASSES * 2, *SHAPE)
    assert solution.samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not solution.samples.inputs.requires_grad
    assert solution.status is Status.ALL_STEPS
    assert list(solution.history.columns)[:3] == ["step", "total", "matching"]
    assert bool((solution.samples.multipliers >= 0).all())
    assert (solution.residuals is not None) == (method is pdd)


def test_real_start_is_the_first_images_seen() -> None:
    split = make_split()
    seen = seen_images(split, 2, generator=seeded(5))
    solution = dm(split, shot=2, learning_rate=1e-12, momentum=0.0, steps=1)
    torch.testing.assert_close(solution.samples.inputs, seen.inputs[::2])


def test_loops_follow_the_paper() -> None:
    loops = {m: GradientMatchingConfig().loops_for(m) for m in (1, 10, 50)}
    assert loops == {1: (1, 1), 10: (10, 50), 50: (50, 10)}
    assert GradientMatchingConfig(loops=(2, 3)).loops_for(10) == (2, 3)
    solution = dc(make_split(), 2, steps=2, loops=(3, 2))
    assert solution.history.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert GradientMatchingConfig.dsa(steps=7).augmentation == DSA


def test_images_stay_within_bounds() -> None:
    solution = match_distributions(
        make_split(),
        per_class=1,
        config=DistributionMatchingConfig(steps=3, network_options=NETWORK),
        bounds=(torch.tensor([-0.5]), torch.tensor([0.25])),
    )
    assert float(solution.samples.inputs.min()) >= -0.5
    assert float(solution.samples.inputs.max()) <= 0.25


# ---------------------------------------------------------------------------- methods that work


@METHODS
def test_matching_loss_falls(method: Callable[..., Solution]) -> None:
    solution = method(make_split(), init="noise", steps=40)
    history = solution.history.matching
    assert history.iloc[-5:].mean() < 0.8 * history.iloc[:3].mean()


def test_batch_norm_reads_the_real_images() -> None:
    """DC takes the statistics of the first real batch, and keeps them for both sides."""
    options = NETWORK | {"norm": "batch"}
    solution = dc(make_split(), 2, network_options=options, steps=1, loops=(2, 1))
    assert solution.status is Status.ALL_STEPS
    config = GradientMatchingConfig(network_options=options)
    run = _matching.Matching(make_split(), 2, config, None, seeded(5))
    network = run.fresh_network()
    real, synthetic = run.batches()
    seen: list[Tensor] = []
    norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the last pass, and there is one
    network.train()(real.flatten(0, 1))
    handle.remove()
    torch.testing.assert_close(norm.running_mean, seen[0].mean(dim=(0, 2, 3)))
    network.eval()
    expected = gradient_distance(
        class_gradients(network, real), class_gradients(network, synthetic)
    )
    assert solution.history.matching.iloc[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("method", [dc, dm])
def test_real_batches_are_drawn_anew(
    method: Callable[..., Solution], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    place, name = (
        (gradient_matching, "_looped") if method is dc else (distribution_matching, "_features")
    )
    original = getattr(place, name)

    def note(network: nn.Module, images: Tensor) -> Any:
        if images.shape[1] == 4:  # the synthetic ones are two
            seen.append(images.detach().clone())
        return original(network, images)

    monkeypatch.setattr(place, name, note)
    split = make_split()
    method(split, 2, batch_real=4, augmentation=None, **({"loops": (3, 1)} if method is dc else {}))
    assert len(seen) == (9 if method is dc else 3)
    for first, second in itertools.pairwise(seen):
        assert not torch.equal(first, second)
    for label, images in enumerate(seen[0]):
        own = split.inputs[split.labels == label]
        assert all(any(torch.equal(image, other) for other in own) for image in images)


class Recurrent(nn.Module):
    """Rows as a sequence: no network that `build_model` makes, nor one that vmap can take."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, classes)

    def forward(self, inputs: Tensor) -> Any:
        return {"logits": self.head(self.cell(inputs[:, 0])[0][:, -1])}


@pytest.mark.filterwarnings("ignore:build_model. gradients are computed class by class")
@pytest.mark.parametrize("which", ["gradients", "distributions"])
def test_networks_of_ones_own(which: str) -> None:
    split, made = make_split(), []

    def build() -> nn.Module:
        made.append(Recurrent())
        return made[-1]

    if which == "gradients":
        config: Any = GradientMatchingConfig(steps=25, log_every=1, init="noise", loops=(1, 1))
        method: Callable[..., Solution] = match_gradients
    else:
        config = DistributionMatchingConfig(
            steps=25, log_every=1, init="noise", augmentation=None, learning_rate=5.0
        )
        method = match_distributions
    before = torch.get_rng_state()
    runs = [
        method(split, per_class=1, config=config, build_model=build, generator=seeded(5))
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].samples.inputs, runs[1].samples.inputs)
    assert not torch.equal(made[1].head.weight, made[2].head.weight)  # fresh each time
    history = runs[0].history.matching
    assert history.iloc[-5:].mean() < history.iloc[:3].mean()
    with pytest.raises(ValueError, match="a logit for each of 3 classes, got 2"):
        method(split, per_class=1, config=config, build_model=lambda: Recurrent(2))


class WritesAndReadsOnce(nn.Sequential):
    """Frozen in part, and writes into its input."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        self[1].bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.sub_(0.5))


def test_a_loop_takes_over_with_a_warning_and_the_same_result() -> None:
    """Against the gradient of each class by `backward`, differentiated once more."""
    network = Recurrent().double()
    images = torch.randn(CLASSES, 2, *SHAPE, generator=seeded()).double().requires_grad_()
    gradients = gradient_matching._ClassGradients()
    with pytest.warns(UserWarning, match="class by class, slower but right"):
        found = gradients.synthetic(network, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again = gradients.synthetic(network, images)
    torch.testing.assert_close(found, again)
    rows = []
    for label, own in enumerate(images):
        loss = nn.functional.cross_entropy(network(own)["logits"], torch.full((2,), label))
        rows.append(torch.autograd.grad(loss, list(network.parameters()), create_graph=True))
    expected = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    torch.testing.assert_close(found, expected)
    slopes = [
        torch.autograd.grad(torch.stack([v.square().sum() for v in values]).sum(), images)[0]
        for values in (found, expected)
    ]
    torch.testing.assert_close(*slopes)


def test_a_batched_pass_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_classifier("instance").double()
    images = torch.randn(CLASSES, 2, *SHAPE, generator=seeded()).double().requires_grad_()
    original = gradient_matching._batched
    monkeypatch.setattr(
        gradient_matching, "_batched", lambda *args: [1.1 * v for v in original(*args)]
    )
    with pytest.warns(UserWarning, match="they differ from those of a backward pass"):
        found = gradient_matching._ClassGradients().synthetic(network, images)
    torch.testing.assert_close(
        [v.detach() for v in found], class_gradients(network, images.detach())
    )


@pytest.mark.parametrize("method", [match_gradients, match_distributions])
def test_networks_that_write_into_their_input_or_are_frozen_in_part(method: Any) -> None:
    split = make_split()
    before = split.inputs.clone()
    config: Any = (
        GradientMatchingConfig(steps=2, init="real")
        if method is match_gradients
        else DistributionMatchingConfig(steps=2, augmentation=None)
    )
    solution = method(split, per_class=1, config=config, build_model=WritesAndReadsOnce)
    assert solution.status is Status.ALL_STEPS
    assert torch.equal(split.inputs, before)


def test_dc_names_a_layer_without_second_derivative() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), Once(), nn.Linear(5, CLASSES))

    with pytest.raises(ValueError, match=r"differentiated twice, got 2 \(Once\)"):
        match_gradients(make_split(), per_class=1, build_model=build)


def test_dm_needs_the_last_linear_layer() -> None:
    class Spare(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, CLASSES))
            self.spare = nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self[1](self[0](inputs))

    with pytest.raises(ValueError, match="last linear layer to be used"):
        match_distributions(make_split(), per_class=1, build_model=Spare)


def test_pdds_multipliers_have_the_scale_that_fits_best() -> None:
    """The cosine leaves it open; what is left over is then orthogonal to the fit."""
    solution = pdd(make_split(), 2, multiplier_learning_rate=0.1)
    assert solution.residuals is not None
    cosine = solution.residuals.cosine
    assert cosine > 0
    assert solution.residuals.stationarity == pytest.approx((1 - cosine**2) ** 0.5, rel=1e-4)


def test_deepkkt_term_lowers_the_deepkkt_loss_and_leaves_the_classifier() -> None:
    split, classifier = make_split(), make_classifier()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    plain = dm(split, steps=40, augmentation=None)
    both = dm(split, 1, classifier, steps=40, augmentation=None, deepkkt_weight=5.0)
    assert deepkkt_loss(classifier, both.samples) < deepkkt_loss(classifier, plain.samples)
    assert both.residuals is not None
    assert not torch.equal(both.samples.multipliers, torch.ones(CLASSES))
    after = classifier.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert classifier.training
    assert all(p.requires_grad and p.grad is None for p in classifier.parameters())


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_class": 0}, "per_class: expected a finite number ≥ 1, got 0"),
        ({"per_class": 2.5}, "per_class: expected a whole number"),
        ({"per_class": 7}, "per_class: expected at most 6 for a real start"),
        ({"per_class": 2, "shot": 1}, "per_class: expected at most 1 for a real start"),
        ({"per_class": 1, "shot": 7}, "class 0: expected at least 7 real images, got 6"),
        ({"per_class": 1, "shot": 0}, "shot: expected a finite number ≥ 1, got 0"),
        ({"per_class": 1, "init": "reel"}, "did you mean 'real'"),
        ({"per_class": 1, "momentum": 1.0}, "momentum: expected a finite number ≥ 0 and < 1"),
        ({"per_class": 1, "momentum": float("nan")}, "momentum: expected a finite number"),
        ({"per_class": 1, "steps": 0}, "steps: expected a finite number ≥ 1"),
        ({"per_class": 1, "network": "convent"}, "did you mean 'convnet'"),
    ],
)
@pytest.mark.parametrize("method", [dsa, dm])
def test_bad_input_is_told_in_one_sentence(
    method: Callable[..., Solution], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        method(make_split(), **arguments)


@pytest.mark.parametrize("loops", [(1,), (1, 2, 3), ()])
def test_loops_are_two(loops: Any) -> None:
    with pytest.raises(ValueError, match="loops: expected two counts"):
        GradientMatchingConfig(loops=loops)


def test_bad_data_is_told_in_one_sentence() -> None:
    split = make_split()
    missing = Split(split.inputs[split.labels != 1], split.labels[split.labels != 1])
    with pytest.raises(ValueError, match="class 1: expected at least 1 real images, got 0"):
        dm(missing)
    with pytest.raises(ValueError, match="labels: expected class numbers"):
        dc(Split(split.inputs, torch.full((len(split), CLASSES), 1 / CLASSES)))
    with pytest.raises(ValueError, match="expected images"):
        dc(Split(split.inputs.flatten(1), split.labels))
    with pytest.raises(ValueError, match="inputs: expected finite numbers"):
        dm(Split(split.inputs * torch.nan, split.labels))
    with pytest.raises(ValueError, match="bounds: expected low < high"):
        match_gradients(split, per_class=1, bounds=(1.0, -1.0))
    for bounds in (1.0, (1.0,)):
        with pytest.raises(TypeError, match=r"bounds: expected a pair \(low, high\), got"):
            match_gradients(split, per_class=1, bounds=bounds)


@METHODS
def test_divergence_keeps_the_last_good_set(method: Callable[..., Solution]) -> None:
    solution = method(make_split(), learning_rate=1e30, steps=20)
    assert solution.status is Status.NON_FINITE
    assert bool(torch.isfinite(solution.samples.inputs).all())
    assert len(solution.history) < 20
