"""Trials: the same whether one after the other or side by side, and classifiers of one kind."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import make_checkout, whole_run

import dsvlib
from companion import recipes, trials
from companion.presets import plan, read_presets
from companion.runs import Run
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


def start(**changes: Any) -> Run:
    options = {"preset": "smoke", "seed": 0, "parameters": {"steps": 2}, "data_digest": "abc"}
    return Run.start("01_line", **(options | changes))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_killed_takes_up_the_jobs_it_had_finished(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_checkout(tmp_path, monkeypatch)
    begun, fails_at = root / "begun", root / "fails"
    begun.mkdir()

    def task(number: int) -> tuple[int, torch.Tensor]:
        (begun / f"{number}-{len(list(begun.glob(f'{number}-*')))}").touch()
        if fails_at.is_file() and number == 2:
            raise RuntimeError("killed")
        return number, torch.arange(number)

    def again(**changes: Any) -> tuple[Run, list[str]]:
        """Run the notebook anew in a fresh kernel, to its end or until it is killed."""
        for path in begun.iterdir():
            path.unlink()
        monkeypatch.setattr(trials, "_calls", itertools.count())
        run = start(**changes)
        try:
            first, _ = by_job(task, [(0,), (1,)], workers)
            second, seconds = by_job(task, {"x": (1,), "y": (2,), "z": (3,)}, workers)
        except RuntimeError:
            return run, sorted(path.name for path in begun.iterdir())
        assert [n for n, _ in (*first.values(), *second.values())] == [0, 1, 1, 2, 3]
        assert all(t.equal(torch.arange(n)) for n, t in second.values())
        assert min(seconds.values()) >= 0
        return run, sorted(path.name for path in begun.iterdir())

    with whole_run(root / "build" / "runs" / "smoke" / "01_line"):
        fails_at.touch()
        killed, _ = again()
        fails_at.unlink()
        run, ran = again()
        assert "0-0" not in ran
        assert "1-0" not in ran
        assert "2-0" in ran
        assert run.started <= killed.started
        _, ran = again()
        assert ran == []
        for change in ({"parameters": {"steps": 3}}, {"data_digest": "def"}):
            _, ran = again(**change)
            assert len(ran) == 5
        run.complete()
        assert not list((root / "build" / "runs" / ".jobs").iterdir())
        _, ran = again()
        assert len(ran) == 5, "a complete run leaves nothing to take up"
    _, ran = again()  # by hand
    assert len(ran) == 5
    _, ran = again()
    assert len(ran) == 5


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
