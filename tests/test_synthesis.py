"""Algorithm 1 on small smooth networks: every option, every ending, every refusal."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import CLASSES, SHAPE, Once, build, delicate
from torch import Tensor, nn

from dsvlib import (
    AugmentationConfig,
    Solution,
    Status,
    SupportSet,
    SynthesisConfig,
    deepkkt_loss,
    residuals,
    synthesis,
    synthesize,
    total_variation,
)
from dsvlib.augmentation import Draw, draw, draw_windows
from dsvlib.logits import CrossEntropy
from dsvlib.synthesis import Step

LABELS = [0, 1, 2, 0]
SHORT = SynthesisConfig(steps=12, log_every=5, tv_weight=0.03)
# stationarity and the primal term only, so that values can be compared with deepkkt_loss
BARE = replace(SHORT, augmented_weight=0.0, tv_weight=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(model: nn.Module | None = None, labels=LABELS, shape=SHAPE, **options) -> Solution:
    return synthesize(model or build("conv"), labels, shape, **({"config": SHORT} | options))


def same(first: SupportSet, second: SupportSet) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("inputs", "labels", "multipliers")
    )


# --- what comes back -----------------------------------------------------------------------------


def test_solution_is_complete():
    model, steps = build("conv"), []
    solution = run(model, on_step=steps.append)
    samples = solution.samples
    assert samples.inputs.shape == (4, *SHAPE)
    assert samples.inputs.dtype == torch.float64
    assert samples.labels.tolist() == LABELS
    assert float(samples.multipliers.min()) >= 0
    assert not samples.inputs.requires_grad
    assert not samples.multipliers.requires_grad
    assert solution.status is Status.ALL_STEPS
    assert solution.status.successful
    assert str(solution.status) == "All steps were run."
    assert "4 samples, ALL_STEPS" in repr(solution)
    assert solution.config == SHORT
    found = residuals(model, samples)
    assert solution.residuals.stationarity == found.stationarity
    assert solution.residuals.per_layer.equals(found.per_layer)
    assert [step.number for step in steps] == list(range(1, 13))
    assert torch.equal(steps[-1].inputs, samples.inputs)
    # the cosine leaves the scale of λ open: the solution has the one that fits θ best
    scale = samples.multipliers / steps[-1].multipliers
    torch.testing.assert_close(scale, scale[:1].expand(4))
    for factor in (0.9, 1.1):
        other = SupportSet(samples.inputs, samples.labels, samples.multipliers * factor)
        assert residuals(model, other).stationarity > found.stationarity


def test_history_is_tidy_and_unweighted():
    config = replace(SHORT, tv_weight=5.0, norm_weight=3.0, primal_weight=2.0)
    history = run(config=config).history
    assert isinstance(history, pd.DataFrame)
    assert list(history["step"]) == [1, 5, 10, 12]
    expected = {"step", "total", "stationarity", "primal", "feasible", "entropy"}
    expected |= {"multiplier_sum", "active", "tv", "norm"}
    expected |= {"augmented_stationarity", "augmented_primal"}
    assert expected <= set(history.columns)
    assert all(history[name].dtype.kind in "if" for name in history)
    assert not history.isna().any().any()
    total = (
        history["stationarity"]
        + history["augmented_stationarity"]
        + 2 * (history["primal"] + history["augmented_primal"])
        + 5 * history["tv"]
        + 3 * history["norm"]
    )
    assert list(history["total"]) == pytest.approx(list(total))


def test_first_row_is_the_start(generator):
    model = build("conv")
    init = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)
    config = replace(BARE, tv_weight=0.1, norm_weight=0.1, initial_multiplier=0.5)
    row = run(model, init=init, config=config).history.iloc[0]
    start = SupportSet(init, LABELS, torch.full((4,), 0.5, dtype=torch.float64))
    assert row["stationarity"] == pytest.approx(deepkkt_loss(model, start, primal_weight=0).item())
    assert row["stationarity"] + row["primal"] == pytest.approx(deepkkt_loss(model, start).item())
    assert row["feasible"] == pytest.approx(1 - residuals(model, start).primal)
    assert row["tv"] == pytest.approx(total_variation(init).mean().item() / 32)
    assert row["norm"] == pytest.approx(init.square().mean().item())
    assert (row["multiplier_sum"], row["active"]) == (2, 1)


def test_one_step_by_hand(generator):
    """Adam's first step has the learning rate's length along the sign of the gradient."""
    model = build("dense")
    init = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)
    config = replace(BARE, steps=1, learning_rate=0.3, multiplier_learning_rate=0.2)
    solution = run(model, init=init, config=config)
    inputs, multipliers = init.clone().requires_grad_(), torch.ones(4).double().requires_grad_()
    loss = deepkkt_loss(model, SupportSet(inputs, LABELS, multipliers))
    slopes = torch.autograd.grad(loss, [inputs, multipliers])
    moves = [-rate * g / (g.abs() + 1e-8) for rate, g in zip((0.3, 0.2), slopes, strict=True)]
    torch.testing.assert_close(solution.samples.inputs, init + moves[0])
    moved = (1 + moves[1]).clamp(min=0)  # up to the scale, which the cosine leaves open
    scale = solution.samples.multipliers.sum() / moved.sum()
    torch.testing.assert_close(solution.samples.multipliers, scale * moved)


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("kind", ["dense", "conv", "conv-group"])
def test_every_distance_decreases_the_loss(distance, kind):
    config = replace(BARE, steps=60, distance=distance)
    history = run(build(kind), config=config).history
    assert history["stationarity"].iloc[-1] < history["stationarity"].iloc[0]
    assert history["total"].iloc[-1] < 0.9 * history["total"].iloc[0]


def test_primal_only():
    config = replace(BARE, steps=60, stationarity_weight=0.0)
    solution = run(build("conv"), config=config)
    assert solution.residuals.primal == 0
    assert solution.history["total"].iloc[0] == solution.history["primal"].iloc[0] > 0
    assert solution.history["feasible"].iloc[-1] == 1
    assert torch.equal(solution.samples.multipliers, torch.ones(4).double())  # nothing moves them


def test_without_the_switch_every_sample_has_a_primal_loss(generator):
    model, start = build("conv"), torch.randn(4, *SHAPE, generator=generator).double()
    logits = model.eval()(start)
    right = logits.argmax(dim=1)  # classified as labelled, each of them
    expected = -logits.log_softmax(dim=1).gather(1, right[:, None]).mean().item()
    for switch, value in ((True, 0.0), (False, expected)):
        config = replace(BARE, steps=1, primal_switch=switch)
        row = run(model, right, config=config, init=start).history.iloc[0]
        assert row["primal"] == pytest.approx(value)


def test_reduction_mean_returns_the_weights_in_the_sum():
    model = build("conv")
    config = replace(BARE, steps=20, distance="l2", reduction="mean", multiplier_learning_rate=0.5)
    config = replace(config, schedule="constant")
    shown = []
    solution = run(model, config=config, on_step=lambda step: shown.append(step.multipliers))
    samples = solution.samples
    assert torch.equal(shown[-1], samples.multipliers)
    loss = deepkkt_loss(model, samples, distance="l2", primal_weight=0).item()
    # one step more logs the loss of what this run returned
    longer = run(model, config=replace(config, steps=21, log_every=1))
    assert longer.history["stationarity"].iloc[-1] == pytest.approx(loss)


def test_reduction_mean_divides_the_multipliers():
    wide = run(config=replace(BARE, steps=1, distance="l2", reduction="mean"))
    narrow = run(config=replace(BARE, steps=1, distance="l2", initial_multiplier=0.25))
    assert wide.history["stationarity"][0] == pytest.approx(narrow.history["stationarity"][0])


def test_priors_pull():
    def final(**weights: float) -> Tensor:
        config = replace(BARE, steps=40, **weights)
        return run(config=config).samples.inputs

    assert total_variation(final(tv_weight=10.0)).mean() < 0.5 * total_variation(final()).mean()
    assert final(norm_weight=10.0).square().mean() < 0.5 * final().square().mean()


def test_augmented_term_is_used():
    noisy = replace(SHORT, augmentation=AugmentationConfig(noise=1.0))
    plain = run(config=replace(noisy, augmented_weight=0.0))
    assert "augmented_stationarity" not in plain.history
    assert not same(run(config=noisy).samples, plain.samples)


# --- randomness ----------------------------------------------------------------------------------


def test_one_seed_gives_one_result():
    first, again = (run(generator=seeded(3)) for _ in range(2))
    other = run(generator=seeded(4))
    assert same(first.samples, again.samples)
    assert first.history.equals(again.history)
    assert not torch.equal(first.samples.inputs, other.samples.inputs)
    assert same(run().samples, run(generator=seeded(0)).samples)


def test_global_randomness_is_neither_used_nor_moved():
    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert same(run().samples, first.samples)


def test_works_under_no_grad():
    with torch.no_grad():
        quiet = run()
    assert same(quiet.samples, run().samples)


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", [LABELS, torch.tensor(LABELS), torch.tensor(LABELS, dtype=torch.uint8)]
)
def test_labels_may_be_a_list_or_integers(labels):
    samples = run(labels=labels).samples
    assert same(samples, run().samples)
    assert samples.labels.dtype == torch.int64


def test_soft_labels():
    rows = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    solution = run(labels=rows, config=replace(BARE, steps=80))
    assert torch.equal(solution.samples.labels, rows)
    assert solution.residuals.primal == 0
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[LABELS]
    torch.testing.assert_close(run(labels=one_hot).samples.inputs, run().samples.inputs)


def test_init_is_the_start_and_stays_unchanged(generator):
    init = torch.randn(4, *SHAPE, generator=generator)
    copy, starts = init.clone(), []
    config = replace(BARE, learning_rate=1e-9, multiplier_learning_rate=0.0)
    solution = run(init=init, config=config, on_step=starts.append)
    torch.testing.assert_close(solution.samples.inputs, init.double(), rtol=0, atol=1e-6)
    assert torch.equal(init, copy)
    assert torch.equal(solution.samples.multipliers, torch.ones(4).double())


@pytest.mark.parametrize("per_channel", [False, True])
def test_inputs_stay_inside_the_bounds_after_every_step(per_channel):
    low, high = (-0.4, 0.3)
    if per_channel:
        low, high = torch.tensor([-0.4, -0.1]), torch.tensor([0.3, 0.2])
    lowest, highest = (
        torch.as_tensor(b, dtype=torch.float64).reshape(-1, 1, 1) for b in (low, high)
    )
    seen = []

    def check(step: Step) -> None:
        assert bool((step.inputs >= lowest).all())
        assert bool((step.inputs <= highest).all())
        assert bool((step.multipliers >= 0).all())
        seen.append(step.number)

    config = replace(SHORT, learning_rate=1.0, resolutions=(0.5, 1.0))
    samples = run(config=config, bounds=(low, high), on_step=check).samples
    assert len(seen) == 12
    at_limit = (samples.inputs == lowest) | (samples.inputs == highest)
    assert bool(at_limit.any())


def test_resolution_schedule():
    stages: list[Tensor] = []
    config = replace(BARE, steps=7, resolutions=(0.25, 0.5, 1.0), schedule="constant")
    solution = run(config=config, on_step=lambda step: stages.append(step.inputs.clone()))
    assert solution.samples.inputs.shape == (4, *SHAPE)
    flat = [float((x - x[..., :1, :1]).abs().max()) < 1e-12 for x in stages]
    assert flat == [True] * 3 + [False] * 4  # steps are shared 3, 2, 2

    def rank(x: Tensor) -> int:  # up-sampling from side k leaves rank k at most
        return int(torch.linalg.matrix_rank(x, rtol=1e-6).max())

    assert [rank(x) for x in stages[3:5]] == [2, 2]
    assert rank(stages[-1]) > 2


def test_parameter_subset():
    model = build("conv")
    params = {"5.weight": model[5].weight}
    solution = run(model, params=params, config=replace(BARE, steps=40))
    assert list(solution.residuals.per_layer["parameter"]) == ["5.weight"]
    start = run(model, params=params, config=replace(BARE, steps=1)).history["stationarity"][0]
    assert solution.history["stationarity"].iloc[-1] < start
    assert not same(solution.samples, run(model, config=replace(BARE, steps=40)).samples)


def test_tabular_data():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    solution = run(model, shape=(2,), config=SynthesisConfig(steps=40), bounds=(-2.0, 2.0))
    assert solution.samples.inputs.shape == (4, 2)
    assert solution.samples.inputs.dtype == torch.float32
    assert "tv" not in solution.history
    history = solution.history["stationarity"]
    assert history.iloc[-1] < history.iloc[0]


# --- endings -------------------------------------------------------------------------------------


def test_negative_multipliers_are_clamped():
    config = replace(BARE, multiplier_learning_rate=3.0)
    multipliers = []
    solution = run(config=config, on_step=lambda step: multipliers.append(step.multipliers.clone()))
    assert len(solution.samples) == 4
    assert float(torch.stack(multipliers).min()) == 0
    assert solution.residuals.dual == 0


def test_negative_multipliers_are_removed():
    config = replace(BARE, multiplier_learning_rate=1.5, negative_multiplier="remove")
    counts, model = [], build("conv")
    solution = run(model, config=config, on_step=lambda step: counts.append(len(step.inputs)))
    assert solution.status is Status.ALL_STEPS
    assert 0 < len(solution.samples) < 4
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == len(solution.samples)
    assert set(solution.samples.labels.tolist()) <= set(LABELS)


def test_removed_samples_take_their_labels_with_them():
    config = replace(
        BARE,
        steps=1,
        learning_rate=1e-6,
        multiplier_learning_rate=1.5,
        negative_multiplier="remove",
    )
    init = torch.randn(6, *SHAPE, generator=seeded(2))
    labels = [0, 1, 2, 0, 1, 2]
    samples = run(labels=labels, init=init, config=config).samples
    kept = torch.cdist(samples.inputs.flatten(1), init.double().flatten(1)).argmin(dim=1).tolist()
    assert kept == sorted(set(kept))
    assert kept != list(range(len(kept)))  # not only the last ones went
    assert samples.labels.tolist() == [labels[i] for i in kept]


def test_no_candidates_are_left():
    # far beyond the balance of θ and Σλ∇L every multiplier wants to shrink
    config = replace(
        BARE,
        distance="l2",
        initial_multiplier=1e4,
        multiplier_learning_rate=1e5,
        negative_multiplier="remove",
    )
    steps = []
    solution = run(labels=[1], config=config, on_step=steps.append)
    assert solution.status is Status.NO_CANDIDATES
    assert not solution.status.successful
    assert len(solution.samples) == 1
    assert solution.samples.multipliers.tolist() == [1e4]
    assert list(solution.history["step"]) == [1]
    assert steps == []


class BreaksAfter(nn.Module):
    """Multiplies by NaN from call number `calls` on, in the last of a model's layers."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, logits: Tensor) -> Tensor:
        self.left -= torch.is_grad_enabled()  # steps, not what is read to check the network
        return logits if self.left >= 0 else logits * math.nan


def test_non_finite_keeps_the_last_finite_samples():
    def recorded(model: nn.Module) -> tuple[Solution, list[Tensor]]:
        inputs: list[Tensor] = []
        config = replace(BARE, steps=20)
        solution = run(model, config=config, on_step=lambda s: inputs.append(s.inputs.clone()))
        return solution, inputs

    solution, inputs = recorded(nn.Sequential(build("conv"), BreaksAfter(6)))
    whole, all_inputs = recorded(build("conv"))
    assert whole.status is Status.ALL_STEPS
    assert solution.status is Status.NON_FINITE
    assert not solution.status.successful
    assert len(inputs) == 6
    assert list(solution.history["step"]) == [1, 5]
    assert not solution.history.isna().any().any()
    # what step 6 made led to a NaN: back to the samples of step 5, whose loss was seen to be finite
    torch.testing.assert_close(solution.samples.inputs, all_inputs[4])


def test_non_finite_from_the_start():
    model = nn.Sequential(build("conv"), BreaksAfter(0))
    solution = run(model)
    assert solution.status is Status.NON_FINITE
    assert len(solution.history) == 0
    assert torch.isfinite(solution.samples.inputs).all()


def test_tolerance_ends_the_run():
    config = replace(BARE, steps=500, learning_rate=1e-7, tolerance=1e-3, log_every=5)
    config = replace(config, multiplier_learning_rate=0.0)
    solution = run(config=config)
    assert solution.status is Status.CONVERGED
    assert solution.status.successful
    assert list(solution.history["step"]) == [1, 5]
    never = run(config=replace(config, steps=20, tolerance=0.0))
    assert never.status is Status.ALL_STEPS


def test_tolerance_ends_a_stage_and_the_run_goes_on_to_the_next():
    config = replace(BARE, learning_rate=1e-7, multiplier_learning_rate=0.0, tolerance=1e-3)
    config = replace(config, steps=60, log_every=4, resolutions=(0.5, 1.0))
    seen = []
    solution = run(config=config, on_step=lambda step: seen.append(step.inputs))
    assert solution.status is Status.CONVERGED
    assert list(solution.history["step"]) == [1, 4, 8, 12]  # 4 steps at half size, then 8 at full
    assert len(seen) == 12

    def rank(x: Tensor) -> int:
        return int(torch.linalg.matrix_rank(x, rtol=1e-6).max())

    assert rank(seen[3]) == 2
    # a last stage that is cut off by its steps has not converged
    few = run(config=replace(config, steps=8, log_every=4, tolerance=1e-3))
    assert few.status is Status.ALL_STEPS


def test_resumed_run_ends_its_stages_where_an_unbroken_one_does(tmp_path):
    config = replace(LONG, tolerance=0.2, steps=40, log_every=2)
    whole = run(config=config, generator=seeded(5))
    assert len(whole.history) < 21
    for at in (3, 6):
        solution, _ = interrupted(tmp_path / "state", config, at, 1)
        assert same(solution.samples, whole.samples)
        assert solution.history.equals(whole.history)
        assert solution.status is whole.status


# --- the model -----------------------------------------------------------------------------------


def test_model_is_untouched(untouched):
    model = delicate()
    with untouched(model):
        trained = run(model)
    assert same(trained.samples, run(delicate().eval()).samples)


def test_model_is_untouched_when_on_step_raises(untouched):
    model = delicate()

    def stop(step: Step) -> None:
        assert not any(module.training for module in model.modules())
        if step.number == 3:
            raise KeyboardInterrupt

    with untouched(model), pytest.raises(KeyboardInterrupt):
        run(model, on_step=stop)


def test_model_is_untouched_after_bad_input(untouched):
    model = delicate()
    with untouched(model), pytest.raises(ValueError, match="labels"):
        run(model, labels=[0, CLASSES])
    with untouched(model), pytest.raises(ValueError, match="expected a shape"):
        run(model, shape=(3, 4, 4))


class Cut(nn.Module):
    """A body whose output the graph forgets, before a head that is differentiated."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = build("conv"), nn.Linear(CLASSES, CLASSES).double(), how

    def forward(self, inputs: Tensor) -> Tensor:
        if self.how == "all":
            with torch.no_grad():
                return self.head(self.body(inputs))
        if self.how == "no_grad":
            with torch.no_grad():
                features = self.body(inputs)
        elif self.how == "detach":
            features = self.body(inputs).detach()
        else:
            features = torch.as_tensor(self.body(inputs).detach().numpy())
        return self.head(features)


@pytest.mark.parametrize("stationarity", [0.0, 1.0])
@pytest.mark.parametrize("how", ["no_grad", "detach", "numpy", "all"])
def test_logits_that_do_not_depend_on_the_inputs_are_refused(how, stationarity):
    steps = []
    config = replace(SHORT, stationarity_weight=stationarity)
    with pytest.raises(ValueError, match=r"model: expected .*; .*torch\.no_grad"):
        run(Cut(how), config=config, on_step=steps.append)
    assert steps == []


def test_parameters_that_are_not_finite_are_named():
    model = build("conv")
    with torch.no_grad():
        model[5].weight[0, 0] = math.nan
    with pytest.raises(
        ValueError, match=r"finite weights, got NaN or infinite ones in '5\.weight'"
    ):
        run(model)


# --- losses of one's own, and batches ------------------------------------------------------------


def test_several_labels_at_once(tmp_path):
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]]).double()

    def binary(logits: Tensor, wanted: Tensor) -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return losses.sum(dim=1)

    model = build("conv")
    config = replace(BARE, steps=200, primal_weight=5.0)
    solution = run(model, labels, config=config, loss_fn=binary)
    assert torch.equal(solution.samples.labels, labels)
    with torch.no_grad():
        assert torch.equal((model(solution.samples.inputs) > 0).double(), labels)
    assert solution.residuals.primal == 0
    assert solution.history["stationarity"].iloc[-1] < solution.history["stationarity"].iloc[0]
    solution.samples.save(tmp_path / "set.safetensors")
    assert same(SupportSet.load(tmp_path / "set.safetensors"), solution.samples)
    with pytest.raises(ValueError, match="rows that sum to 1"):
        run(model, labels)  # cross-entropy would take them for probabilities
    with pytest.raises(ValueError, match="rows that sum to 1"):
        residuals(model, solution.samples)


def test_a_single_logit_needs_a_loss_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(*list(build("conv"))[:-1], nn.Linear(16, 1).double())

    def logistic(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.softplus((1 - 2 * labels) * logits[:, 0])

    solution = run(model, [0, 1, 1, 0], config=replace(BARE, steps=80), loss_fn=logistic)
    assert solution.residuals.primal == 0
    assert 0 < solution.history["entropy"].iloc[0] <= math.log(2)
    rows = torch.tensor([[0.0], [1], [1], [0]]).double()
    same_one = run(
        model, rows, config=replace(BARE, steps=80), loss_fn=lambda z, y: logistic(z, y[:, 0])
    )
    assert torch.equal(same_one.samples.inputs, solution.samples.inputs)
    with pytest.raises(ValueError, match="loss_fn: expected one loss per sample"):
        run(model, [0, 1, 1, 0], loss_fn=lambda z, y: logistic(z, y).mean())


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
def test_batches_change_nothing_but_rounding(distance, batch_size):
    config = replace(SHORT, steps=6, distance=distance, norm_weight=0.1, resolutions=(0.5, 1.0))
    whole, parts = (run(config=config, batch_size=size) for size in (None, batch_size))
    torch.testing.assert_close(parts.samples.inputs, whole.samples.inputs)
    torch.testing.assert_close(parts.samples.multipliers, whole.samples.multipliers)
    pd.testing.assert_frame_equal(parts.history[list(whole.history)], whole.history)


def test_a_batch_is_all_that_the_model_sees_at_once():
    sizes = []
    model = build("conv")
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run(model, list(range(3)) * 7, batch_size=9, config=replace(SHORT, steps=2))
    assert max(sizes) == 9
    with pytest.raises(ValueError, match="batch_size"):
        run(batch_size=0)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": []}, ValueError, "expected at least one label, got none"),
        ({"labels": [0, 3]}, ValueError, "from 0 to 2, got 3"),
        ({"labels": [-1, 0]}, ValueError, "from 0 to 2, got -1"),
        ({"labels": [0.5, 0.5]}, ValueError, r"expected soft labels of shape \[n, K\]"),
        ({"labels": torch.ones(2, 3)}, ValueError, "sum to 1, got a row that sums to 3"),
        ({"labels": torch.full((2, 2), 0.5)}, ValueError, "3 classes, got 2 columns"),
        ({"shape": (2, 4, 4.0)}, ValueError, r"shape: expected one .* got \(2, 4, 4\.0\)"),
        ({"shape": 16}, ValueError, "shape: expected one sample's shape"),
        ({"shape": (2, 0, 4)}, ValueError, "shape: expected one sample's shape"),
        ({"shape": ()}, ValueError, "shape: expected one sample's shape"),
        ({"init": torch.zeros(3, *SHAPE)}, ValueError, r"init: expected shape \[4, 2, 4, 4\]"),
        ({"init": torch.full((4, *SHAPE), math.nan)}, ValueError, "init: expected finite"),
        ({"init": torch.zeros(4, *SHAPE).int()}, TypeError, "init: expected a floating"),
        ({"init": [[0.0]]}, TypeError, "init: expected a torch.Tensor"),
        ({"bounds": (1.0, 0.0)}, ValueError, "expected low < high"),
        ({"bounds": (0.0, math.nan)}, ValueError, "bounds high: expected finite"),
        ({"bounds": (torch.zeros(3), torch.ones(3))}, ValueError, r"one per channel \[2\]"),
        ({"params": {"6.weight": torch.zeros(3, 16)}}, ValueError, "did you mean '5.weight'"),
        ({"params": {}}, ValueError, "at least one parameter"),
        ({"model": build("conv").requires_grad_(False)}, ValueError, "requires? grad"),
        ({"model": nn.Flatten()}, ValueError, "at least one parameter that requires grad"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        run(**options)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedule": "cosin"}, "schedule: expected one of.*did you mean 'cosine'"),
        ({"negative_multiplier": "drop"}, "negative_multiplier: expected one of 'clamp', 'remove'"),
        ({"distance": "l3"}, "distance: expected one of 'cosine', 'l1', 'l2', got 'l3'"),
        ({"reduction": "none"}, "reduction: expected one of 'sum', 'mean'"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number > 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"initial_multiplier": 0.0}, "initial_multiplier"),
        ({"steps": 0}, "steps: expected a finite number ≥ 1, got 0"),
        ({"log_every": 0}, "log_every"),
        ({"multiplier_learning_rate": -1.0}, "multiplier_learning_rate"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"stationarity_weight": -1.0}, "stationarity_weight: expected a finite number ≥ 0"),
        ({"primal_weight": math.inf}, "primal_weight"),
        ({"augmented_weight": -1.0}, "augmented_weight"),
        ({"tv_weight": math.nan}, "tv_weight"),
        ({"norm_weight": -1.0}, "norm_weight"),
        ({"norm_target": math.nan}, "norm_target: expected a finite number, got nan"),
        ({"norm_target": -math.inf}, "norm_target"),
        ({"betas": (0.9, 1.0)}, "betas: expected Adam's two numbers"),
        ({"betas": (0.9,)}, "betas"),
        ({"resolutions": 0.5}, "resolutions: expected fractions"),
        ({"resolutions": ("half",)}, "resolutions: expected fractions"),
        ({"resolutions": (0.5, 2)}, r"resolutions: expected fractions .* got \(0.5, 2\)"),
        ({"resolutions": (0.5, 1.0), "steps": 1}, "steps: expected at least one for each of 2"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SynthesisConfig(**setting)


@pytest.mark.parametrize("name", ["steps", "log_every", "learning_rate", "tv_weight", "tolerance"])
def test_numbers_must_be_numbers(name):
    with pytest.raises(TypeError, match=name):
        SynthesisConfig(**{name: "3"})


def test_augmentation_is_one():
    with pytest.raises(TypeError, match="augmentation: expected an AugmentationConfig, got None"):
        SynthesisConfig(augmentation=None)


def test_steps_are_whole():
    with pytest.raises(TypeError, match=r"steps: expected a whole number, got float 2\.5"):
        SynthesisConfig(steps=2.5)


def test_the_defaults_favour_no_kind_of_image():
    plain, digits = SynthesisConfig(), SynthesisConfig.digits()
    assert (plain.norm_weight, plain.norm_target, plain.augmentation.fill) == (0, 0, 0)
    assert (plain.resolutions, plain.augmentation.flip) == ((), 0)
    assert digits.norm_target == digits.augmentation.fill == pytest.approx(-0.957)
    assert digits.resolutions == (0.5,)
    assert SynthesisConfig.digits(steps=7) == replace(digits, steps=7)
    assert SynthesisConfig.photographs(steps=7).norm_target == 0


def test_black_is_the_background_of_the_digits(digits):
    assert SynthesisConfig.digits().norm_target == pytest.approx(float(digits.bounds[0]), abs=5e-4)


# --- switches of later date ----------------------------------------------------------------------


def test_multipliers_keep_their_floor():
    config = replace(BARE, multiplier_learning_rate=3.0)
    lowest = []
    floor = replace(config, minimum_multiplier=0.2)
    run(config=floor, on_step=lambda step: lowest.append(float(step.multipliers.min())))
    assert min(lowest) == pytest.approx(0.2)
    lowest.clear()
    run(config=config, on_step=lambda step: lowest.append(float(step.multipliers.min())))
    assert min(lowest) == 0


@pytest.mark.parametrize(
    ("growing", "expected"), [(False, [0.25] * 4), (True, [0.125] * 2 + [0.25] * 2)]
)
def test_jitter_grows_with_the_resolution_where_asked(monkeypatch, growing, expected):
    shifts = []

    def watched(config, *args, **kwargs):
        shifts.append(config.translate)
        return draw(config, *args, **kwargs)

    monkeypatch.setattr(synthesis, "draw", watched)
    config = replace(
        SHORT,
        steps=4,
        resolutions=(0.5, 1.0),
        growing_jitter=growing,
        augmentation=AugmentationConfig(translate=0.25, noise=0.1),
    )
    run(config=config)
    assert shifts == expected


def test_floor_and_removal_exclude_each_other():
    with pytest.raises(ValueError, match="expected 0 where negative multipliers are removed"):
        SynthesisConfig(minimum_multiplier=0.1, negative_multiplier="remove")
    with pytest.raises(ValueError, match="at most initial_multiplier"):
        SynthesisConfig(minimum_multiplier=2.0)


def test_a_model_without_second_derivative_is_named():
    model = nn.Sequential(build("conv"), Once())
    with pytest.raises(ValueError, match=r"got 1 \(Once\), which cannot; replace it"):
        run(model)


# --- checkpoints ---------------------------------------------------------------------------------

LONG = replace(SHORT, steps=16, log_every=3, resolutions=(0.5, 1.0), tv_weight=0.1)
STOPS = {  # name: config, step that fails, steps between checkpoints
    "before the first checkpoint": (LONG, 2, 3),
    "at low resolution": (LONG, 5, 2),
    "at the change of size": (LONG, 9, 4),
    "near the end": (LONG, 16, 5),
    "with removal": (
        replace(LONG, multiplier_learning_rate=0.7, negative_multiplier="remove"),
        7,
        3,
    ),
}


def interrupted(path, config, at, every, **options):
    """Run until `on_step` raises at step `at`, then again, whole; return the solution and steps."""

    def stop(step: Step) -> None:
        if step.number == at:
            raise KeyboardInterrupt

    knobs = {"config": config, "checkpoint": path, "checkpoint_every": every} | options
    with pytest.raises(KeyboardInterrupt):
        run(generator=seeded(5), on_step=stop, **knobs)
    steps: list[int] = []
    solution = run(generator=seeded(5), on_step=lambda step: steps.append(step.number), **knobs)
    return solution, steps


@pytest.mark.parametrize("name", STOPS)
def test_resumed_run_ends_as_an_unbroken_one(name, tmp_path):
    config, at, every = STOPS[name]
    path = tmp_path / "state.safetensors"
    whole = run(config=config, generator=seeded(5))
    solution, steps = interrupted(path, config, at, every)
    assert steps[0] == (at - 1) // every * every + 1  # it did go on, and not from the start
    assert same(solution.samples, whole.samples)
    assert solution.history.equals(whole.history)
    assert solution.status is whole.status
    assert list(tmp_path.iterdir()) == []  # a finished run needs no checkpoint


def test_generator_goes_on_where_it_would_have(tmp_path):
    path, config = tmp_path / "state", LONG
    rng = seeded(5)
    run(config=config, generator=rng)

    def stop(step: Step) -> None:
        if step.number == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config=config, generator=seeded(5), on_step=stop, checkpoint=path, checkpoint_every=4)
    again = seeded(5)
    run(config=config, generator=again, checkpoint=path)
    assert torch.equal(rng.get_state(), again.get_state())


OTHER = {
    "config": {"config": replace(LONG, tv_weight=0.2)},
    "model": {"model": build("conv", seed=1)},
    "labels": {"labels": [0, 1, 2, 1]},
    "bounds": {"bounds": (-1.0, 1.0)},
    "start": {"init": torch.zeros(4, *SHAPE)},
    "loss": {"loss_fn": lambda z, y: nn.functional.cross_entropy(z, y, reduction="none")},
}


@pytest.mark.parametrize("what", OTHER)
def test_checkpoint_of_another_run_is_refused(what, tmp_path):
    path = tmp_path / "state"

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        # the first step is written by the time that the second calls
        run(
            config=LONG,
            generator=seeded(5),
            checkpoint=path,
            checkpoint_every=1,
            on_step=lambda step: stop(step) if step.number == 2 else None,
        )
    before = path.read_bytes()
    options = {"config": LONG, "generator": seeded(5)} | OTHER[what]
    with pytest.raises(ValueError, match=f"got one of another {what}; remove the file") as caught:
        run(checkpoint=path, **options)
    assert "expected the checkpoint of this run" in str(caught.value)
    assert path.read_bytes() == before


def test_foreign_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        run(checkpoint=path)
    with pytest.raises(ValueError, match="expected a file, got the folder"):
        run(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="checkpoint_every"):
        run(checkpoint=tmp_path / "other", checkpoint_every=0)


def test_killed_process_is_resumed(tmp_path):
    path = tmp_path / "state"

    def die(step):
        if step.number == 11:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()  # an interpreter of its own would import torch for seconds
    if child == 0:
        try:
            run(
                config=LONG,
                generator=seeded(5),
                checkpoint=path,
                checkpoint_every=2,
                on_step=die,
            )
        finally:
            os._exit(0)  # not killed: back in the parent this is no SIGKILL
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["state"]  # and nothing half-written
    steps: list[int] = []
    resumed = run(
        config=LONG,
        generator=seeded(5),
        checkpoint=path,
        on_step=lambda step: steps.append(step.number),
    )
    assert steps[0] == 11
    assert same(resumed.samples, run(config=LONG, generator=seeded(5)).samples)


@pytest.mark.parametrize("parameterisation", ["fourier", "multiresolution", "phase"])
def test_other_ways_to_write_an_image_stay_inside_the_bounds_and_lower_the_loss(parameterisation):
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    lowest, highest = (bound.double().reshape(-1, 1, 1) for bound in (low, high))
    config = replace(
        BARE, parameterisation=parameterisation, steps=40, learning_rate=0.05, log_every=1
    )
    solution = run(config=config, bounds=(low, high))
    inputs = solution.samples.inputs
    assert inputs.shape == (4, *SHAPE)
    assert bool((inputs > lowest).all())
    assert bool((inputs < highest).all())
    assert solution.history.total.iloc[-1] < 0.9 * solution.history.total.iloc[0]


@pytest.mark.parametrize("parameterisation", ["fourier", "multiresolution"])
def test_a_real_start_is_inverted(parameterisation, generator):
    init = torch.rand(4, *SHAPE, generator=generator) - 0.5
    config = replace(
        BARE, parameterisation=parameterisation, learning_rate=1e-9, multiplier_learning_rate=0.0
    )
    solution = run(init=init, config=config, bounds=(-0.6, 0.6))
    torch.testing.assert_close(solution.samples.inputs, init.double(), rtol=0, atol=1e-3)


def test_what_other_ways_to_write_an_image_need():
    with pytest.raises(ValueError, match="bounds: expected the valid range"):
        run(config=replace(BARE, parameterisation="fourier"))
    with pytest.raises(ValueError, match=r"resolutions: expected \(\) for parameterisation"):
        replace(BARE, parameterisation="multiresolution", resolutions=(0.5, 1.0))
    with pytest.raises(ValueError, match="parameterisation: expected one of 'pixels'"):
        replace(BARE, parameterisation="wavelets")


class Mean(nn.Module):
    """Reads images of any size, as networks with global pooling do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 5, 3, padding=1), nn.Linear(5, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs)).mean(dim=(2, 3)))


# four pixels to three by hand: between the two that are nearest to 1/6, 3/2 and 17/6
SHRINK = (
    torch.tensor([[5.0, 1.0, 0.0, 0.0], [0.0, 3.0, 3.0, 0.0], [0.0, 0.0, 1.0, 5.0]]).double() / 6
)
WINDOWED = SynthesisConfig(steps=12, learning_rate=0.05, log_every=5, window=3)


def placed(windows: Draw) -> Tensor:
    """Return top, left, extent and whether it is mirrored, [n, 4], of windows of square images."""
    affine = windows.affine.double()
    torch.testing.assert_close(affine[:, 0, 0].abs(), affine[:, 1, 1])
    assert not affine[:, [0, 1], [1, 0]].any()
    extent = SHAPE[1] * affine[:, 1, 1]
    left, top = (((affine[:, row, 2] + 1) * SHAPE[1] - extent) / 2 for row in (0, 1))
    found = torch.stack([top, left, extent, affine[:, 0, 0] < 0], dim=1)
    torch.testing.assert_close(found, found.round(), atol=1e-5, rtol=0)
    return found.round().long()


def test_each_window_lies_inside_and_is_drawn_afresh(monkeypatch):
    seen = []
    draw_windows = synthesis.draw_windows

    def listen(*args, **options):
        seen.append(draw_windows(*args, **options))
        return seen[-1]

    monkeypatch.setattr(synthesis, "draw_windows", listen)
    run(Mean(), config=replace(WINDOWED, steps=40, window=2))
    places = torch.stack([placed(drawn) for drawn in seen])
    corners, extents, mirrored = places[..., :2], places[..., 2], places[..., 3]
    assert corners.shape == (40, len(LABELS), 2)
    assert corners.min() == 0
    assert set(extents.flatten().tolist()) == {2, 3, 4}
    assert (corners + extents[..., None]).max() == SHAPE[1]
    assert len(mirrored.unique(dim=0)) > 4


def test_the_network_reads_windows_and_returns_whole_images():
    read = set()

    class Listens(Mean):
        def forward(self, inputs: Tensor) -> Tensor:
            read.add(tuple(inputs.shape[2:]))
            return super().forward(inputs)

    samples = run(Listens(), config=WINDOWED).samples
    assert samples.inputs.shape[1:] == SHAPE
    assert read == {(3, 3), SHAPE[1:]}  # the whole once more, for λ's scale and the residuals


@pytest.mark.parametrize("augmented_weight", [0.0, 1.0])
def test_a_window_of_the_whole_that_is_not_mirrored_changes_nothing(augmented_weight, monkeypatch):
    """The oracle is the same run without a window, whose augmentation draws the same numbers."""

    def whole(side, count, size, **options):
        return Draw(torch.eye(2, 3).double().expand(count, 2, 3), reflect=True, side=side)

    monkeypatch.setattr(synthesis, "draw_windows", whole)
    config = replace(WINDOWED, window=None, augmented_weight=augmented_weight)
    expected = run(Mean(), config=config, generator=seeded(3))
    windowed = run(Mean(), config=replace(config, window=SHAPE[1]), generator=seeded(3))
    assert same(windowed.samples, expected.samples)
    assert windowed.history.equals(expected.history)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_first_row_is_the_loss_of_the_windows(noise):
    model, generator = Mean(), seeded(3)
    config = replace(WINDOWED, steps=1, tv_weight=0.0, augmented_weight=0.0, window_noise=noise)
    row = run(model, config=config, generator=seeded(3)).history.iloc[0]
    x = torch.randn(len(LABELS), *SHAPE, generator=generator).double()
    windows = draw_windows(3, len(LABELS), SHAPE[1:], generator=generator)
    parts = []
    places = placed(windows).tolist()
    assert {extent for _, _, extent, _ in places} == {3, 4}
    for image, (top, left, extent, mirrored) in zip(x, places, strict=True):
        part = image[:, top : top + extent, left : left + extent]
        part = part.flip(-1) if mirrored else part
        narrow = SHRINK if extent == 4 else torch.eye(3).double()
        parts.append(narrow @ part @ narrow.T)
    extra = torch.randn(len(LABELS), 2, 3, 3, generator=generator).double()
    seen = torch.stack(parts) + noise * extra
    samples = SupportSet(seen, torch.tensor(LABELS), torch.ones(len(LABELS)).double())
    expected = deepkkt_loss(model, samples, primal_weight=0.0)
    assert row["stationarity"] == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_in_batches_change_nothing_but_rounding(batch_size):
    config = replace(WINDOWED, window_noise=0.3)
    whole, parts = (
        run(Mean(), config=config, generator=seeded(3), batch_size=size).samples
        for size in (None, batch_size)
    )
    torch.testing.assert_close(parts.inputs, whole.inputs, rtol=1e-7, atol=1e-9)


def test_resumed_run_draws_the_same_windows(tmp_path):
    path = tmp_path / "state.safetensors"
    config = replace(WINDOWED, window_noise=0.3)
    whole = run(Mean(), config=config, generator=seeded(5))
    solution, steps = interrupted(path, config, 7, 4, model=Mean())
    assert steps[0] == 5
    assert same(solution.samples, whole.samples)
    assert solution.history.equals(whole.history)


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_has_a_side(window):
    with pytest.raises(ValueError, match=f"window: expected a finite number ≥ 1, got {window}"):
        SynthesisConfig(window=window)


def test_noise_of_windows_needs_windows():
    with pytest.raises(ValueError, match=r"window_noise: expected 0 without a window, got 0\.1"):
        SynthesisConfig(window_noise=0.1)


def test_windows_need_images_that_hold_them():
    with pytest.raises(ValueError, match=r"window: expected .* got 5 for shape \[2, 4, 4\]; lower"):
        run(Mean(), config=replace(WINDOWED, window=5))
    with pytest.raises(ValueError, match=r"window: expected .* shape \[6\]; leave it out"):
        run(nn.Linear(6, 3).double(), shape=(6,), config=WINDOWED)


def test_a_network_of_one_size_cannot_read_windows():
    with pytest.raises(ValueError, match=r"expected a shape that the model can read.*3, 3\]"):
        run(config=WINDOWED)


# --- temperature and presets --------------------------------------------------------------------


def test_temperature_is_the_loss_of_divided_logits():
    model = build("conv")
    config = replace(BARE, temperature=4.0)
    warm = run(model, config=config)

    def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
        chosen = (logits / 4).log_softmax(dim=1)
        return -chosen.gather(1, labels[:, None])[:, 0]

    own = run(model, config=BARE, loss_fn=by_hand)
    torch.testing.assert_close(warm.samples.inputs, own.samples.inputs)
    torch.testing.assert_close(warm.samples.multipliers, own.samples.multipliers)
    # λ and the residuals of the solution are those of the loss that was used
    again = residuals(model, warm.samples, loss_fn=CrossEntropy(4.0))
    assert warm.residuals.stationarity == pytest.approx(again.stationarity)
    assert not torch.allclose(warm.samples.inputs, run(model, config=BARE).samples.inputs)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_out_of_range_is_refused(temperature: float):
    with pytest.raises(ValueError, match="temperature: expected"):
        SynthesisConfig(temperature=temperature)


def test_temperature_with_a_loss_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="temperature: expected 1 with a loss_fn of your own"):
        run(config=replace(BARE, temperature=2.0), loss_fn=CrossEntropy())


def test_labels_out_of_range_are_refused_at_any_temperature():
    with pytest.raises(ValueError, match="label"):
        run(labels=[0, 99], config=replace(BARE, temperature=2.0))


def test_presets_for_people_keep_images_in_range():
    model, bounds = build("conv"), (-1.0, 2.0)
    for config in (SynthesisConfig.strokes(steps=3), SynthesisConfig.photographs(steps=3)):
        found = run(model, config=config, bounds=bounds).samples.inputs
        assert float(found.min()) >= -1
        assert float(found.max()) <= 2
