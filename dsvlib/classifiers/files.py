"""Trained classifiers as safetensors: weights and what rebuilds the network, no pickle."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsvlib._files import (
    PACKAGE,
    atomic_path,
    checkpoint_path,
    checkpoints_folder,
    file_digest,
    read_safetensors,
)
from dsvlib.classifiers.architectures import ModelSpec, build_model
from dsvlib.classifiers.imagenet import PACKAGED, load_packaged
from dsvlib.frozen import unwrapped

FORMAT = "dsvlib.classifier.v1"
DIGESTS = Path(__file__).with_name("SHA256SUMS")  # of the shipped ones, as sha256sum writes them


def save_classifier(path: str | os.PathLike[str], model: nn.Module, **metadata: Any) -> None:
    """Write a classifier that `build_model` made, wrapped or not, whole or not at all.

    `metadata` is any JSON: by convention `dataset`, `classes`, `mean`, `std` and how it was
    trained. Raises TypeError for a model of unknown architecture or metadata that is no JSON,
    ValueError for more or fewer class names than logits.
    """
    from safetensors.torch import save_file

    model, _ = unwrapped(model)
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise TypeError(
            f"model: expected a classifier from build_model, got {type(model).__name__}; "
            f"save another network's weights with safetensors.torch.save_model"
        )
    names = metadata.get("classes")
    known = (1, 2) if spec.num_classes == 1 else (spec.num_classes,)  # one tells two apart
    if names is not None and len(names) not in known:
        raise ValueError(
            f"classes: expected one name for each logit, got classes {len(names)}, logits "
            f"{spec.num_classes}; name those that the network has"
        )
    header = {"format": FORMAT, "spec": json.dumps(asdict(spec)), "metadata": json.dumps(metadata)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata=header)


def load_classifier(
    path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a classifier in evaluation mode and its metadata.

    `path` is a file, or the name of a shipped classifier such as ``"digits-convnet"``: one in the
    wheel, in a checkout, in the cache or in the folder `root`, or of ImageNet by the extra
    ``[imagenet]``: ``"imagenet-efficientnet-lite0"``, ``"…-lite2"``. The metadata also holds
    `architecture`, `num_classes` and `shape`.

    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign one, for
    weights that are not finite, and for another file under a shipped one's name.
    """
    file = Path(path)
    if str(path) in PACKAGED and not file.exists():
        return load_packaged(str(path))
    if not file.exists() and file.suffix == "" and file.name == str(path):
        file = checkpoint_path(file.name, None if root is None else Path(root))
        if not file.is_file():
            folders = (PACKAGE / "_checkpoints", checkpoints_folder())
            shipped = {p.stem for f in folders for p in f.glob("*.safetensors")}
            shipped |= set(PACKAGED) if file.name.startswith("imagenet") else set()
            raise FileNotFoundError(
                f"expected a file or one of the shipped classifiers {sorted(shipped)}, got "
                f"{str(path)!r}"
            )
    sys.audit("dsvlib.load_classifier", str(file))  # who keeps records may listen
    tensors, header = read_safetensors(file, FORMAT, "save_classifier")
    named = file.name == f"{path}.safetensors"
    if named or file.resolve() == checkpoint_path(file.stem).resolve():
        _check_digest(file)
    check_state(tensors, file)
    try:
        spec = json.loads(header["spec"])
        with torch.random.fork_rng():  # initial weights are drawn only to be replaced
            model = build_model(
                spec["name"],
                num_classes=spec["num_classes"],
                shape=tuple(spec["shape"]),
                **spec["options"],
            )
        model.load_state_dict(tensors)
        metadata = dict(json.loads(header["metadata"]))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected weights that fit the architecture named in the file, got: "
            f"{' '.join(str(error).split())}; write it again with save_classifier"
        ) from error
    metadata |= {
        "architecture": spec["name"],
        "num_classes": spec["num_classes"],
        "shape": tuple(spec["shape"]),
    }
    return model.eval(), metadata


def check_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError where weights of a file are not finite."""
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(
                f"{path}: expected finite weights, got NaN or infinite ones in {name!r}; "
                f"train it anew or fetch it again"
            )


def _check_digest(file: Path) -> None:
    known = shipped_digests().get(file.name)
    if known is not None and file_digest(file) != known:
        raise ValueError(
            f"{file}: expected the shipped classifier (SHA-256 {known[:12]}…), got another file "
            f"under its name; restore it from the repository, or give yours another name"
        )


def shipped_digests() -> dict[str, str]:
    """Return the SHA-256 of every shipped classifier by file name."""
    lines = DIGESTS.read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in map(str.split, lines)}
