"""Trials: the same whether one after the other or side by side, and classifiers of one kind."""

from __future__ import annotations

import pytest
import torch

import dsvlib
from companion import recipes
from companion.presets import plan, read_presets
from companion.trials import as_set, by_job, classifiers, seeded, side_by_side, with_settings
from dsvlib import SynthesisConfig


def drawn(number: int, scale: float) -> float:
    return scale * float(torch.rand((), generator=seeded(number)))


def test_the_same_number_gives_the_same_draws() -> None:
    assert torch.rand(3, generator=seeded(4)).equal(torch.rand(3, generator=seeded(4)))


def test_jobs_keep_their_order_in_one_process_and_in_two() -> None:
    jobs = [(7, 2), (9, 4), (5, 5)]
    assert side_by_side(divmod, jobs, 1) == [(3, 1), (2, 1), (1, 0)]
    assert side_by_side(divmod, jobs, 2) == side_by_side(divmod, jobs, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_s_result_depends_on_its_seed_alone(workers: int) -> None:
    jobs = [(number, 2.0) for number in range(3)]
    found, seconds = by_job(drawn, jobs, workers)
    assert found == {job: drawn(*job) for job in jobs}
    assert set(seconds) == set(jobs)
    assert min(seconds.values()) >= 0
    named, _ = by_job(drawn, {"one": (1, 3.0)}, workers)
    assert named == {"one": drawn(1, 3.0)}


def test_a_line_of_settings_lies_over_a_configuration() -> None:
    base = SynthesisConfig.digits()
    config = with_settings(base, "steps=7 resolutions=(0.5,1.0) steps=9 jitter=0.25")
    assert (config.steps, config.resolutions, config.augmentation.noise) == (9, (0.5, 1.0), 0.25)
    assert config.augmentation.translate == base.augmentation.translate
    assert with_settings(base, "") == base
    with pytest.raises(TypeError, match="stepz"):
        with_settings(base, "stepz=7")


def test_real_images_as_a_set() -> None:
    data = dsvlib.load_dataset("digits", limit=20)
    samples = as_set(data.test, data)
    assert torch.equal(samples.inputs, data.test.inputs)
    assert samples.multipliers.tolist() == [1.0] * len(data.test)
    assert list(samples.classes or ()) == list(data.classes)


def test_the_classifier_is_the_shipped_one_or_one_that_is_trained_on_a_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = dsvlib.load_dataset("digits", limit=60)
    shipped, untrained = classifiers("digits-convnet", data, seed=0)
    assert dsvlib.accuracy(shipped, data.test) > 0.9 > dsvlib.accuracy(untrained, data.test)
    recipe = recipes.RECIPES["digits-convnet"]
    brief = dsvlib.TrainConfig(epochs=1)
    changed = recipe.__class__(**{**vars(recipe), "training": brief})
    monkeypatch.setitem(recipes.RECIPES, "digits-convnet", changed)
    own, _ = classifiers("", data, seed=0, part=data.train[:30])
    again, _ = classifiers("", data, seed=0, part=data.train[:30])
    other, _ = classifiers("", data, seed=0)
    outputs = [network(data.test.inputs) for network in (own, again, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("preset", list(read_presets()))
def test_every_line_of_settings_is_a_configuration(preset: str) -> None:
    """A line that SynthesisConfig refuses would end a run of hours when it comes to it."""
    for job in plan(preset):
        values = job.parameters
        photographs = values.get("dataset") != "digits"
        base = SynthesisConfig.photographs() if photographs else SynthesisConfig.digits()
        lines = list(values.get("settings", []))
        for own, others in zip(values.get("base", []), values.get("candidates", []), strict=True):
            lines += [f"{own} {line}" for line in [*others, *values.get("written", [])]]
        for line in lines:
            words = [word for word in line.split() if not word.startswith("average=")]
            config = with_settings(base, " ".join(words))
            assert config.steps >= 1
