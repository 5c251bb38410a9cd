"""What a step of DM, DC and DSA costs beside the papers' loops, written out plainly.

ConvNet-3 (128 channels, instance norm), ten classes of 32×32 colour images, 64 real ones a class.
Each step is on a fresh network, so the two take turns whenever `dsvlib` asks for one, and each
round gives its own ratio: a slow minute hits both. Time is CPU time on one thread, of a fresh
process for each row: what the kernel must clear anew depends on what was allocated before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median, quantiles
from typing import Any

import pytest
import torch
from reference_distillation import dc_loss, dm_loss, step
from torch import nn

from dsvlib import build_model
from dsvlib.augmentation import DSA
from dsvlib.data.datasets import Split
from dsvlib.distillation import (
    DistributionMatchingConfig,
    GradientMatchingConfig,
    match_distributions,
    match_gradients,
)

GOAL = 0.9  # × the plain loop
ROUNDS = 5
CLASSES, SHAPE, BATCH = 10, (3, 32, 32), 64
METHODS: dict[str, tuple[Any, Any, Any]] = {  # ours, its settings, the plain loop's loss
    "DM": (match_distributions, DistributionMatchingConfig(augmentation=DSA), dm_loss),
    "DC": (match_gradients, GradientMatchingConfig(init="real", loops=(1, 1)), dc_loss),
    "DSA": (match_gradients, GradientMatchingConfig.dsa(loops=(1, 1)), dc_loss),
}


def seconds_of_steps(method: str, per_class: int) -> list[tuple[float, float]]:
    """Return CPU seconds of our step and of the plain loop's, round by round."""
    match, config, loss = METHODS[method]
    labels = torch.arange(CLASSES).repeat(100)
    images = torch.randn(len(labels), *SHAPE, generator=torch.Generator().manual_seed(1))
    real = [images[labels == number] for number in range(CLASSES)]
    synthetic = torch.stack([own[:per_class] for own in real]).requires_grad_()
    optimizer = torch.optim.SGD([synthetic], config.learning_rate, momentum=config.momentum)
    generator = torch.Generator().manual_seed(2)
    rounds: list[tuple[float, float]] = []
    clock: list[float] = []

    def take_turns() -> nn.Module:
        """Return dsvlib's next network; before that, note its time and let the other have a go."""
        start = time.process_time()
        ours = start - clock[-1] if clock else 0.0
        if len(clock) > 1:  # before the first step there is nothing to compare
            augmented = config.augmentation is not None
            arguments = (loss, real, synthetic, optimizer)
            step(*arguments, batch=BATCH, augmented=augmented, generator=generator)
        clock.append(time.process_time())
        rounds.append((ours, clock[-1] - start))
        return build_model("convnet", num_classes=CLASSES, shape=SHAPE)

    steps = ROUNDS + 2  # the last one has no end, the first one warms up
    settings = type(config)(**vars(config) | {"steps": steps, "batch_real": BATCH})
    match(Split(images, labels), per_class=per_class, config=settings, build_model=take_turns)
    return rounds[-ROUNDS:]


@pytest.mark.parametrize("per_class", [1, 10])
@pytest.mark.parametrize("method", METHODS)
def test_step(
    method: str, per_class: int, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, __file__, method, str(per_class)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def measure() -> Any:
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        return json.loads(run.stdout)

    rounds = benchmark.pedantic(measure)
    low, middle, high = quantiles([ours / plain for ours, plain in rounds], n=4)
    ours, plain = (median(values) for values in zip(*rounds, strict=True))
    benchmark.extra_info |= {"ratio": middle, "ours": ours, "plain": plain}
    with capsys.disabled():
        print(
            f"\n{method}, {per_class} per class: {middle:.2f} × the plain loop "
            f" [{low:.2f}, {high:.2f}]   {ours:.2f} s, plain {plain:.2f} s"
        )
    assert middle <= GOAL


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(seconds_of_steps(sys.argv[1], int(sys.argv[2]))))
