"""The tables of a report: classes, suspicious images, explained predictions and what holds them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import dsvlib
from companion.report.stages import TOP
from dsvlib._progress import duration
from dsvlib.data.datasets import Split
from dsvlib.explanation import Explanation
from dsvlib.support_set import SupportSet


def by_class(support: SupportSet, logits: Tensor, labels: Tensor) -> pd.DataFrame:
    """Return accuracy, Σλ and support vectors of each class."""
    # the logits are there already: the network that gives them is the identity
    table = dsvlib.lambda_accuracy(support, nn.Identity(), Split(logits, labels))
    table["name"], count = support.classes, len(support.classes)
    table["test_images"] = torch.bincount(labels, minlength=count).numpy()
    held = support.labels[support.multipliers > 0]
    table["support_vectors"] = torch.bincount(held, minlength=count).numpy()
    return table


def suspects(
    found: Mapping[str, Any],
    support: SupportSet,
    kept: Tensor,
    logits: Tensor,
    files: Sequence[str] | None,
) -> pd.DataFrame:
    """Return suspicious images with label and prediction; `image` is the place in the data set."""
    table = pd.DataFrame(found).rename(columns={"index": "support"})
    at = torch.tensor(table["support"].to_numpy())
    table["image"] = kept[at].numpy()
    table["file"] = [f"no. {k}" if files is None else files[k] for k in table["image"]]
    table["multiplier"] = support.multipliers[at].double().numpy()
    table["predicted"] = logits[at].argmax(dim=1).numpy()
    return table[table["score"] > 0]


def predictions(
    explanation: Explanation, chosen: Tensor, labels: Tensor, logits: Tensor
) -> pd.DataFrame:
    """Return the predictions explained: what their top support vectors hold, and what is left."""
    terms = explanation.contributions
    mass, against = terms.clamp(min=0).sum(dim=1), (-terms).clamp(min=0).sum(dim=1)
    top = explanation.top(TOP).groupby("prediction")["share"].sum()
    table = pd.DataFrame({"image": chosen.numpy(), "label": labels[chosen].numpy()})
    table["predicted"] = explanation.classes.numpy()
    table["probability"] = logits[chosen].double().softmax(dim=1).amax(dim=1).numpy()
    table["share"] = top.reindex(table.index).to_numpy()
    table["against"] = torch.where(mass > 0, against / mass, torch.nan).numpy()
    table["left_out"] = explanation.completeness.numpy()
    return table


def top(explanation: Explanation, support: SupportSet, kept: Tensor) -> pd.DataFrame:
    """Return the top support vectors of each prediction, those that speak for it."""
    table = explanation.top(TOP)
    at = torch.tensor(table["support"].to_numpy())
    table["image"] = kept[at].numpy()
    table["multiplier"] = support.multipliers[at].double().numpy()
    return table[table["contribution"] > 0]


def run(rows: Mapping[str, str], seconds: Mapping[str, float]) -> pd.DataFrame:
    """Return what was run, with how long it took."""
    each = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    rows = {**rows, "time": f"{duration(sum(seconds.values()))} in all: {each}"}
    return pd.DataFrame({"what": list(rows), "value": list(rows.values())})


def command(
    classifier: object, data: object, classes: Sequence[object] | None, options: Mapping[str, Any]
) -> str:
    """Return the command that makes the page again, where what it names is no object."""
    if not all(isinstance(named, str | os.PathLike) for named in (classifier, data)):
        return "companion.report.make, in Python"
    words = ["dsv", "report", "--classifier", str(classifier), "--data", str(data)]
    words += ["--out", "report.html"]
    options = {"classes": classes, **options}
    for name, value in options.items():
        if value is not None:
            several = isinstance(value, list | tuple)
            words += [f"--{name}", ",".join(map(str, value)) if several else str(value)]
    return shlex.join(words)
