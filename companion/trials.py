"""An experiment at many seeds: what the notebooks that compare sets of images have in common.

A seed decides everything that a trial draws, so that trials can run in any order and side by side.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import joblib
import torch
from joblib import Parallel, delayed
from torch import nn

from companion.recipes import RECIPES, classifier
from companion.runs import kept_jobs
from dsvlib._files import atomic_path
from dsvlib.classifiers.architectures import build_model
from dsvlib.classifiers.training import Labelled, train
from dsvlib.data.datasets import Dataset, Split
from dsvlib.support_set import SupportSet
from dsvlib.synthesis import SynthesisConfig

Job = TypeVar("Job", bound=Hashable)
_calls = itertools.count()  # of `by_job`: a notebook makes the same ones, in the same order


def seeded(number: int) -> torch.Generator:
    """Return a generator at that seed."""
    return torch.Generator().manual_seed(number)


def as_set(part: Labelled, data: Dataset) -> SupportSet:
    """Return real images as a set of `data`, each with λ = 1."""
    ones = torch.ones(len(part.labels), device=part.inputs.device)
    return SupportSet(part.inputs, part.labels, ones).describe(data)


def settings(line: str) -> dict[str, Any]:
    """Return the settings of a line such as ``"steps=40 resolutions=(0.5,1.0)"``, by name."""
    pairs = (word.split("=", 1) for word in line.split())
    return {name: ast.literal_eval(value) for name, value in pairs}


def with_settings(config: SynthesisConfig, line: str) -> SynthesisConfig:
    """Return a configuration with a line of settings over it.

    Names are those of SynthesisConfig; ``jitter`` is the noise of its augmentation.
    """
    changes = settings(line)
    if "jitter" in changes:
        noise = changes.pop("jitter")
        changes["augmentation"] = dataclasses.replace(config.augmentation, noise=noise)
    return dataclasses.replace(config, **changes)


def classifiers(
    name: str,
    data: Dataset,
    *,
    seed: int,
    part: Split | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, nn.Module]:
    """Return a classifier, and an untrained one of the same architecture, in evaluation mode.

    The first is the shipped one of that name, or where `name` is empty one that is trained here, by
    a shipped one's recipe, on `part` (default: all training images).
    """
    shape_of: dict[str, Any] = {"num_classes": len(data.classes), "shape": data.shape}
    if name:
        model, _ = classifier(name, data)
        model = model.to(device)
    else:
        recipe = RECIPES["digits-convnet" if data.name == "digits" else "cifar10-ordinary"]
        torch.manual_seed(seed)
        model = build_model(recipe.architecture, **recipe.options, **shape_of).to(device)
        train(model, part or data.train, config=recipe.training, generator=seeded(seed))
    torch.manual_seed(seed + 1)
    spec: Any = model.spec
    untrained = build_model(spec.name, **spec.options, **shape_of).to(device)
    return model.eval(), untrained.eval()


def side_by_side(
    task: Callable[..., Any], jobs: Iterable[Iterable[Any]], workers: int = 1
) -> list[Any]:
    """Return ``task(*job)`` of every job, in order.

    More than one of `workers` are processes of one thread each: small networks leave a core mostly
    waiting for Python.
    """

    def alone(*job: Any) -> Any:
        if workers > 1:
            torch.set_num_threads(1)
        return task(*job)

    return list(Parallel(workers, batch_size=1)(delayed(alone)(*job) for job in jobs))


def by_job(
    task: Callable[..., Any], jobs: Mapping[Job, Iterable[Any]] | Iterable[Job], workers: int = 1
) -> tuple[dict[Job, Any], dict[Job, float]]:
    """Return what `task` gives for each job, and the seconds it took, both by job.

    `jobs` holds the task's arguments by job, or lists jobs that are tuples of arguments themselves;
    they run `side_by_side`. Where a run keeps finished jobs (`runs.kept_jobs`), the same run after
    a kill takes up theirs: what a job gives depends on nothing but code, parameters, data and seed.
    """
    arguments: Mapping[Any, Any] = jobs if isinstance(jobs, Mapping) else {job: job for job in jobs}
    folder, call = kept_jobs(), next(_calls)
    places = {job: folder and folder / f"{call}-{i}.joblib" for i, job in enumerate(arguments)}
    done = {job: joblib.load(at) for job, at in places.items() if at is not None and at.is_file()}

    def timed(place: Path | None, *job: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        found = task(*job), time.perf_counter() - began
        if place is not None:
            with atomic_path(place) as temporary:
                joblib.dump(found, temporary)
        return found

    rest = [job for job in arguments if job not in done]
    fresh = side_by_side(timed, [(places[job], *arguments[job]) for job in rest], workers)
    done |= dict(zip(rest, fresh, strict=True))
    return {job: done[job][0] for job in arguments}, {job: done[job][1] for job in arguments}
