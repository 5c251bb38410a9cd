"""Independent judges: does a classifier that never saw a sample read it as labelled?

A judge is any function from inputs [n, C, H, W] to predicted classes [n]. Judges are trained on
real images only, differ from the classifier under study in kind, architecture or weights, and say
nothing about whether people could read the picture: look at it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from dsvlib.classifiers.training import logits_of
from dsvlib.data.datasets import AnySplit, as_split
from dsvlib.logits import predict
from dsvlib.support_set import SupportSet

Judge = Callable[[Tensor], Tensor]


def svm_judge(split: AnySplit) -> Judge:
    """Return a support vector machine with a radial kernel (C = 10) trained on raw pixels."""
    from sklearn.svm import SVC

    split = as_split(split)
    machine = SVC(kernel="rbf", gamma="scale", C=10)
    machine.fit(split.inputs.flatten(1).cpu().numpy(), split.labels.cpu().numpy())

    def judge(inputs: Tensor) -> Tensor:
        return torch.as_tensor(machine.predict(inputs.detach().flatten(1).cpu().numpy()))

    return judge


def network_judge(model: nn.Module) -> Judge:
    """Return a trained network as a judge."""
    return lambda inputs: predict(logits_of(model, inputs.detach())).cpu()


def recognised(samples: SupportSet, judges: Mapping[str, Judge]) -> pd.DataFrame:
    """Ask every judge about every sample.

    Returns a tidy frame with a row per judge and sample: judge, sample, label, predicted, correct.
    Soft labels count as their most probable class.
    """
    labels = samples.hard_labels.cpu()
    frames = []
    for name, judge in judges.items():
        predicted = judge(samples.inputs)
        frames.append(
            pd.DataFrame(
                {
                    "judge": name,
                    "sample": range(len(samples)),
                    "label": labels.numpy(),
                    "predicted": predicted.numpy(),
                    "correct": (predicted == labels).numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
