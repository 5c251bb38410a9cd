"""A report on a classifier, for people: what holds its decisions, shown, and what to doubt.

`make` measures, a `Report` holds what was found as tables and pictures, and its page is one HTML
file that needs no network (``site/templates/report.html``). Equations: `dsvlib.explanation`,
`dsvlib.multipliers`, `dsvlib.synthesis`, `dsvlib.analysis.lambda_accuracy`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

import dsvlib
from companion.report import inputs, page, stages, tables
from companion.site.render import render
from dsvlib._errors import DsvError, RequestError
from dsvlib._errors import explain as say_why
from dsvlib._files import atomic_path
from dsvlib.classifiers.foreign import Classifier
from dsvlib.cli import preset_for
from dsvlib.data.datasets import Dataset, first_of_each
from dsvlib.explanation import Explanation
from dsvlib.support_set import SupportSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT = 2000  # training images that λ is fitted to
HIGHEST = {"limit": stages.MOST_IMAGES, "per-class": inputs.MOST_MADE, "seed": 2**63 - 1}


@dataclass(frozen=True, eq=False)
class Report:
    """What was found of a classifier; a notebook's cell that ends with it shows the page.

    tables
        ``run`` (what was run), ``classes`` (accuracy and Σλ of each), ``layers`` (how nearly each
        is stationary), ``suspicious`` (training images), ``predictions`` (test images explained)
        and ``support`` (their support vectors). ``image`` is a place in the data set.
    support
        The training images that λ was fitted to, with it.
    synthesised, selected
        DSVs of the chosen classes, from noise (none where the network refuses) and by largest λ.
    explained, explanation
        The test images of ``predictions``, and their `Explanation`.
    verdict, caveats
        Sentences in plain words; `notes` has those of single sections.
    """

    title: str
    accuracy: float
    stationarity: float
    tables: Mapping[str, pd.DataFrame]
    support: SupportSet
    synthesised: SupportSet | None
    selected: SupportSet
    explained: SupportSet
    explanation: Explanation
    caveats: Sequence[str]
    notes: Mapping[str, str]
    verdict: Sequence[str] = field(default=())

    @cached_property
    def html(self) -> str:
        """The page, one file with its pictures in it."""
        return self._page(links=True)

    def _page(self, *, links: bool) -> str:
        tools = {"picture": page.picture, "percent": page.percent, "links": links}
        return render("report.html", report=self, chart=page.chart(self.tables["classes"]), **tools)

    @property
    def figures(self) -> dict[str, Figure]:
        """The pictures as matplotlib figures: synthesised, selected, suspicious and explained."""
        from companion.figures import image_grid

        at = torch.tensor(self.tables["suspicious"]["support"].to_numpy())
        sets = {"synthesised": self.synthesised, "selected": self.selected}
        sets |= {"suspicious": self.support[at] if len(at) else None, "explained": self.explained}
        return {
            name: image_grid(
                found.images().numpy(),
                captions=[found.classes[int(label)] for label in found.labels],
                title=name.capitalize(),
                smooth=True,
            )
            for name, found in sets.items()
            if found is not None
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all; what was there is replaced."""
        with say_why("write", Path(path)), atomic_path(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")

    def show(self) -> None:
        """Show the page in a notebook."""
        from IPython.display import display

        display(self)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"Report({self.title}: {' '.join(self.verdict)})"

    def _repr_html_(self) -> str:
        return render("report_cell.html", page=self._page(links=False))


def make(
    classifier: str | os.PathLike[str] | Classifier | nn.Module,
    data: str | os.PathLike[str] | Dataset,
    *,
    root: str | os.PathLike[str] | None = None,
    limit: int = LIMIT,
    classes: Sequence[int | str] | None = None,
    per_class: int = 1,
    seed: int = 0,
    device: str | None = None,
    parts: str | os.PathLike[str] | None = None,
    echo: Callable[[str], object] = lambda _: None,
    **opening: Any,
) -> Report:
    """Measure a classifier on a data set and return the report.

    Parameters
    ----------
    classifier
        What `open_classifier` takes, with its ``weights``, ``mean`` and ``std`` as `opening`; names
        of classes and the shape of a network of one's own are the data set's.
    data
        A name that `load_dataset` knows, a folder with ``train/<class>/*`` and ``test/<class>/*``,
        or a `Dataset`.
    root
        Folder of data sets, and of classifiers.
    limit
        λ is fitted to at most this many training images, the first of every class in turn.
    classes, per_class
        Classes, by name or number, whose DSVs are made and whose test images are explained
        (default: all), and DSVs of each.
    seed
        Of the starting noise, and of which predictions are explained.
    device
        ``"cpu"``, ``"cuda"``, ``"auto"``, or None: where the network is.
    parts
        Folder that keeps every finished stage; the same call then goes on from there.
    echo
        Called with a line at the start of every stage.

    Raises RequestError, before any work, for classes or images that do not fit the classifier and
    settings out of range; DsvError where no training image holds the classifier.
    """
    settings = {"limit": limit, "per-class": per_class, "seed": seed}
    for name, value in settings.items():
        low, high = int(name != "seed"), HIGHEST[name]
        if not (isinstance(value, int) and low <= value <= high):
            raise RequestError(f"{name}: expected a whole number from {low} to {high}, got {value}")
    opened, loaded = inputs.opened_with(classifier, data, root, opening)
    wanted = inputs.wanted(opened, classes, per_class)
    kept = first_of_each(loaded.train.labels, limit)
    train, test, model = loaded.train[kept], loaded.test, opened.model
    fewest = int(torch.bincount(train.labels, minlength=len(opened.classes)).min())
    if fewest < per_class:
        raise RequestError(
            f"limit: expected at least {per_class} training images of every class for λ to be "
            f"fitted to, got {fewest}; raise it, or ask for fewer DSVs per class"
        )
    if device is not None:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(automatic if device == "auto" else device)
    named: dict[str, Any] = {"classes": opened.classes, "mean": opened.mean, "std": opened.std}
    about = (
        dsvlib.__version__,
        limit,
        per_class,
        seed,
        wanted.tolist(),
        str(named),
        preset_for(opened)(),
    )
    stage = stages.Stages(parts, inputs.digest(model, train, test, *about), echo)

    logits = stage("accuracy", lambda: stages.logits(model, {"test": test, "train": train}))
    fit = stage("stationarity", lambda: stages.fitted(model, train))
    support = SupportSet(train.inputs, train.labels, fit["multipliers"], **named)
    if not bool((support.multipliers > 0).any()):
        raise DsvError("no training image has λ > 0, so none holds the classifier; train it longer")
    asked, steps = wanted.repeat_interleave(per_class), stage.path("steps")
    made = stage("synthesis", lambda: stages.synthesised(opened, asked, seed, steps))
    suspected = stage("suspicion", lambda: stages.suspected(model, support))
    predicted = logits["test"].argmax(dim=1)
    chosen = stages.to_explain(predicted, test.labels, wanted, seed)
    found = stage("explanation", lambda: stages.explained(model, test.inputs[chosen], support))

    explanation, files = Explanation(**found), inputs.file_names(data, loaded)
    best = dsvlib.select(support, per_class)
    where = next((p.device for p in model.parameters()), "cpu")
    part = len(train) < len(loaded.train)
    of = f"{len(train):,} of" if part else "all"
    of = f"{of} {len(loaded.train):,} training images"
    known = {"root": root, **opening, **settings}
    size = "×".join(map(str, opened.shape))
    rows = {
        "classifier": f"{opened.name or type(model).__name__}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "data": f"{loaded.name}: {of}, {len(test):,} test images, each {size}",
        "command": tables.command(classifier, data, classes, known),
        "machine": f"{where}, threads: {torch.get_num_threads()}, torch {torch.__version__}, "
        f"dsvlib {dsvlib.__version__}",
    }  # fmt: skip
    by_class = tables.by_class(support, logits["test"], test.labels)
    predictions = tables.predictions(explanation, chosen, test.labels, logits["test"])
    shown = None if classes is None else [opened.classes[int(k)] for k in wanted]
    report = Report(
        title=f"{opened.name or type(model).__name__} on {loaded.name}",
        accuracy=float((predicted == test.labels).double().mean()),
        stationarity=fit["stationarity"],
        tables={
            "run": tables.run(rows, stage.seconds),
            "classes": by_class,
            "layers": pd.DataFrame(fit["per_layer"]),
            "suspicious": tables.suspects(suspected, support, kept, logits["train"], files),
            "predictions": predictions,
            "support": tables.top(explanation, support, kept),
        },
        support=support,
        synthesised=SupportSet(**made["samples"], **named) if "samples" in made else None,
        selected=best[torch.isin(best.labels, wanted)],
        explained=SupportSet(
            test.inputs[chosen], test.labels[chosen], torch.ones(len(chosen)), **named
        ),
        explanation=explanation,
        caveats=page.caveats(fit, part, explanation, predictions, shown),
        notes={
            "synthesis": made["status"],
            "stationary": page.stationary(fit, of),
            "correlation": page.correlation(by_class),
        },
    )
    return replace(report, verdict=page.verdict(report))
