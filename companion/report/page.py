"""What a report says in words, and its pictures: everything that the template is handed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from dsvlib.analysis.lambda_accuracy import pearson
from dsvlib.explanation import POOR, Explanation

if TYPE_CHECKING:
    from companion.report import Report

SIDE = 160  # pixels of a picture on the page
NEAR, PARTLY = 0.2, 0.6  # ‖θ + Σλ∇L‖ / ‖θ‖ up to which a classifier is nearly, partly stationary
FRAME = (46, 368, 22, 222)  # of the drawing: left, right, top, bottom
PAPER = "The paper found 0.78 for CIFAR-10 (Fig. 2)."


def percent(value: float) -> str:
    """Return a fraction in percent, with as many digits as it can bear."""
    return f"{100 * value:.{0 if value >= 0.9995 else 1}f}\N{NO-BREAK SPACE}%"


def stationary(fit: Mapping[str, Any], of: str) -> str:
    """Say how nearly θ is a sum over training images, and what that means for the rest."""
    off = fit["stationarity"]
    if off <= NEAR:
        kind = "nearly stationary"
        meaning = "what follows speaks of the classifier itself"
    elif off <= PARTLY:
        kind = "partly stationary"
        meaning = "what follows is most of the story, not all of it"
    else:
        kind = "far from stationary"
        meaning = (
            "take what follows as hints only; training on changed images, for few epochs or "
            "without weight decay does this, and so does a small --limit"
        )
    return (
        f"It is {kind}: a sum over {of} leaves out {percent(off)} of the length of its weights "
        f"(cosine {fit['cosine']:.3f}), so {meaning}."
    )


def correlation(classes: pd.DataFrame) -> str:
    """Say how Σλ of a class goes with its accuracy."""
    rho, count = classes.attrs["pearson"], len(classes)
    if not np.isfinite(rho):
        return "A correlation is undefined here: one of the two is the same for every class."
    said = f"Correlation over {count} classes: {_signed(rho)}"
    if count < 4:
        return f"{said}, which so few classes cannot support."
    found = pearson(classes["multiplier_sum"], classes["accuracy"])
    told = f"{said} (95 % interval {_signed(found.low)} to {_signed(found.high)})"
    if found.low <= 0 <= found.high:
        return f"{told}, too wide to say that one goes with the other. {PAPER}"
    way = "better" if rho > 0 else "worse"
    return f"{told}: classes with a larger Σλ are classified {way}. {PAPER}"


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def verdict(report: Report) -> list[str]:
    """Return the findings, a sentence each."""
    classes, suspects = report.tables["classes"], report.tables["suspicious"]
    count, worst = int(classes["test_images"].sum()), classes.nsmallest(1, "accuracy").iloc[0]
    said = [
        f"It classifies {percent(report.accuracy)} of {count:,} test images as they are labelled; "
        f"the weakest class is {worst['name']} with {percent(worst['accuracy'])}.",
        report.notes["stationary"],
    ]
    if len(report.explained):
        missing = float(report.explanation.completeness.median())
        said.append(
            f"Of what makes up the predictions explained below, sums over these images leave out "
            f"{percent(missing)} (median)" + (", which is much." if missing > POOR else ".")
        )
    odd = int((suspects["predicted"] != suspects["label"]).sum())
    if len(suspects):
        said.append(
            f"Of the {len(suspects)} training images that stand most by themselves it classifies "
            f"{odd or 'none'} other than labelled; look at these first for wrong labels."
        )
    return said


def caveats(
    fit: Mapping[str, Any],
    part: bool,
    found: Explanation,
    predictions: pd.DataFrame,
    shown: Sequence[str] | None,
) -> list[str]:
    """Return what not to read into the page, a sentence or two each."""
    said = [
        "The pictures made from noise are what this classifier takes for its classes. A "
        "classifier, and another one as its judge, may read what no person sees: look for yourself."
    ]
    if fit["stationarity"] > PARTLY:
        said.append(
            "Far from stationary, the network is little more than hinted at by its support "
            "vectors, and their order may change with --limit."
        )
    poor = sum(not value <= POOR for value in found.completeness.tolist())
    if poor:
        said.append(
            f"Completeness is poor for {poor} of {len(found.logits)} explained predictions (more "
            f"than {percent(POOR)} is left out): the contributions explain only a part of them."
        )
    against = float(predictions["against"].median())
    if against > 0.8:
        said.append(
            f"What speaks for a prediction and what speaks against it nearly cancel here: the one "
            f"comes to {percent(against)} of the other (median). A logit is a small difference of "
            f"two large sums."
        )
    said += [
        "A contribution says what an image holds in the sum. What the network would predict had "
        "it been trained without that image is another question.",
        "Two images are near in the network's own sense, which need not be by their looks.",
        "λ can be large because an image holds much, and also because its own gradient is small, "
        "as where the network is sure. Σλ of a class can hang on one such image.",
        "A suspicious image is one that holds its label mostly by itself. That finds wrong labels, "
        "and also rare images with right ones: nothing here proves an error.",
        "Σλ and accuracy are of one classifier, whose classes are no independent draws.",
    ]
    if part:
        said.append(
            "λ was fitted to a part of the training images, and those left out may hold what is "
            "missing; a larger --limit includes more."
        )
    if not fit["unique"]:
        said.append(
            "λ is not unique here: the gradients of several images are alike and could share it "
            "in another way. Sums over classes say more than single images."
        )
    if shown is not None:
        said.append(f"DSVs and explained predictions are of these classes: {', '.join(shown)}.")
    return said


def picture(image: Tensor) -> str:
    """Return an image [C, H, W] in [0, 1] as a data address, at most SIDE pixels wide or high."""
    tile = to_pil_image(image if len(image) in (1, 3) else image[:1])
    photograph = max(tile.size) > SIDE // 2
    tile.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if photograph:
        tile.save(stream, "jpeg", quality=88)
    else:
        tile.save(stream, "png", optimize=True)
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def chart(classes: pd.DataFrame) -> dict[str, Any]:
    """Return Σλ and accuracy of each class as places on the drawing, with names and ticks."""
    left, right, top, bottom = FRAME
    x, x_ticks = _axis(classes["multiplier_sum"].to_numpy(float), left, right, "{:g}".format)
    y, y_ticks = _axis(
        classes["accuracy"].to_numpy(float), bottom, top, lambda v: percent(v).replace(".0", "")
    )
    points = list(zip(x, y, classes["name"], strict=True))
    names = _names(points) if len(points) <= 20 else []
    return {"frame": FRAME, "x": x_ticks, "y": y_ticks, "points": points, "names": names}


def _axis(
    values: np.ndarray, start: float, end: float, write: Callable[[float], str]
) -> tuple[list[float], list[tuple[float, str]]]:
    """Return where values stand between `start` and `end`, and a few round numbers there."""
    spread = float(np.ptp(values)) or max(abs(float(values[0])), 1e-3)
    low, high = values.min() - 0.08 * spread, values.max() + 0.08 * spread
    unit = 10 ** np.floor(np.log10(spread / 3))
    step = unit * max(factor for factor in (1, 2, 5) if factor * unit <= spread / 3)
    round_ones = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step

    def place(value: float) -> float:
        return round(float(start + (end - start) * (value - low) / (high - low)), 1)

    ticks = [(place(v), write(round(float(v), 10) + 0.0)) for v in round_ones]  # no −0
    return [place(float(v)) for v in values], ticks


def _names(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Return each name where it covers no point and no other name, as far as there is room."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    placed = []
    for x, y, whole in points:
        name = whole if len(whole) <= 14 else f"{whole[:13]}…"
        wide = 6.5 * len(name)
        beside, before, around = x + 7, x - 7 - wide, x - wide / 2
        tries = [(beside, y + 4), (before, y + 4), (around, y - 8), (around, y + 16)]
        tries += [(beside, y - 8), (beside, y + 16), (before, y - 8), (before, y + 16)]
        boxes = [(a, b - 9, a + wide, b + 1) for a, b in tries]
        free = [i for i, box in enumerate(boxes)
                if FRAME[0] + 3 < box[0] and box[2] < FRAME[1] + 10
                and not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3]
                            for o in taken)]  # fmt: skip
        best = free[0] if free else 0
        taken.append(boxes[best])
        placed.append((round(tries[best][0], 1), round(tries[best][1], 1), name))
    return placed
