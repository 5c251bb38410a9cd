"""Classifiers Φ(x; θ): [n, C, H, W] → logits [n, K].

`build_model` is the one place where networks are made, so that a checkpoint can name its
architecture and be built again without unpickling code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsvlib._validation import check_choice, check_count
from dsvlib.classifiers.efficientnet import EfficientNetLite


@dataclass(frozen=True)
class ModelSpec:
    """Everything that `build_model` needs to build the same architecture again."""

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict)


class _Halving(nn.AvgPool2d):
    """Means of 2×2 pixels; on a CPU one product of matrices for small images, 2 to 4 times as fast.

    PyTorch's own kernel is vectorised for channels-last tensors only.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [n, C, H/2, W/2]."""
        *leading, height, width = inputs.shape
        small = width <= 64 and height % 2 == width % 2 == 0
        if not (small and inputs.device.type == "cpu" and inputs.is_contiguous()):
            return super().forward(inputs)
        columns = torch.eye(width // 2, dtype=inputs.dtype).repeat_interleave(2, 0) / 4
        return inputs.reshape(*leading, height // 2, 2 * width) @ columns.repeat(2, 1)


class ConvNet(nn.Module):
    """The field's ConvNet: `depth` blocks of [3×3 convolution, norm, ReLU, pooling], one linear.

    With the defaults (width 128, depth 3, instance norm as GroupNorm with one channel per group,
    average pooling) and 32×32 colour images it has 2048 features and, for ten classes, 320,010
    parameters.
    """

    def __init__(
        self,
        num_classes: int,
        shape: tuple[int, int, int],
        *,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        pooling: str = "avg",
    ) -> None:
        super().__init__()
        check_choice("norm", norm, ("instance", "batch", "none"))
        check_choice("pooling", pooling, ("avg", "max"))
        check_count("width", width)
        check_count("depth", depth)
        channels, height, image_width = shape
        scale = 2**depth
        if height < scale or image_width < scale:
            raise ValueError(
                f"depth: expected at most {min(height, image_width).bit_length() - 1} blocks of "
                f"halving for {height}×{image_width} images, got {depth}; lower depth"
            )
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            if norm == "instance":
                layers.append(nn.GroupNorm(width, width))
            elif norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            layers.append(_Halving() if pooling == "avg" else nn.MaxPool2d(2))
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(width * (height // scale) * (image_width // scale), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [n, K]."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


def _resnet(name: str) -> Callable[..., nn.Module]:
    def build(
        num_classes: int,
        shape: tuple[int, int, int],
        *,
        width: int = 64,
        stride: int | None = None,
        **options: Any,
    ) -> nn.Module:
        from torchvision import models

        check_count("width", width)
        if stride is not None:
            check_count("stride", stride)
        network: nn.Module = getattr(models, name)(num_classes=num_classes, **options)
        if width != 64:
            _narrow(network, width, num_classes)
        channels, height, _ = shape
        # torchvision's stem divides 224 pixels by four; small images keep their resolution
        small = height <= 64
        if small or channels != 3 or width != 64 or stride is not None:
            network.conv1 = nn.Conv2d(
                channels,
                width,
                3 if small else 7,
                stride or (1 if small else 2),
                1 if small else 3,
                bias=False,
            )
        if small:
            network.maxpool = nn.Identity()
        return network

    return build


def _narrow(network: Any, width: int, num_classes: int) -> None:
    """Build torchvision's four stages again at `width`, 2, 4 and 8 times `width` channels."""
    network.bn1 = nn.BatchNorm2d(width)
    network.inplanes = width  # which torchvision's stages multiply as they are built
    for index, name in enumerate(("layer1", "layer2", "layer3", "layer4")):
        stage = getattr(network, name)
        stride = 2 if index else 1
        made = network._make_layer(type(stage[0]), width << index, len(stage), stride=stride)
        setattr(network, name, made)
    network.fc = nn.Linear(network.inplanes, num_classes)


def _vit(
    num_classes: int,
    shape: tuple[int, int, int],
    *,
    patch: int = 4,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
) -> nn.Module:
    """Return torchvision's vision transformer in a size that small images can train."""
    from torchvision.models import VisionTransformer

    channels, height, image_width = shape
    if height != image_width or height % patch:
        raise ValueError(
            f"shape: expected square images divided by patch={patch}, got {height}×{image_width}; "
            f"choose another patch or image_size"
        )
    network: nn.Module = VisionTransformer(
        image_size=height,
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=2 * width,
        num_classes=num_classes,
    )
    if channels != 3:
        network.conv_proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
    # torchvision starts the head at zero: no gradient would reach the features of an untrained net
    nn.init.normal_(network.heads.head.weight, std=0.02)  # type: ignore[union-attr, arg-type]
    return network


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "efficientnet-lite": EfficientNetLite,
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50"),
    "vit": _vit,
}


def build_model(
    name: str, *, num_classes: int, shape: tuple[int, int, int], **options: Any
) -> nn.Module:
    """Build a fresh classifier with PyTorch's default initialisation.

    Parameters
    ----------
    name
        ``"convnet"`` (options ``width=128``, ``depth=3``, ``norm="instance"|"batch"|"none"``,
        ``pooling="avg"|"max"``), ``"resnet18"``, ``"resnet50"`` (with a 3×3 stem for images up to
        64 pixels; options ``width=64`` of the first stage, ``stride`` of the stem), ``"vit"``
        (options ``patch=4``, ``width=64``, ``depth=4``, ``heads=4``), ``"efficientnet-lite"``
        (options ``width=1.0``, ``depth=1.0``, ``dropout=0.2``).
    num_classes
        Number of logits K ≥ 1.
    shape
        One input's (C, H, W).

    Raises ValueError for an unknown name or a shape the network cannot take, TypeError for an
    unknown option. Initial weights come from torch's global generator: call `torch.manual_seed`
    before.
    """
    check_choice("name", name, _BUILDERS)
    if num_classes < 1 or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"expected num_classes ≥ 1 and shape (C, H, W), got {num_classes} and {shape}; "
            f"take both from the data set"
        )
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    try:
        model = _BUILDERS[name](num_classes, size, **options)
    except TypeError as error:
        raise TypeError(
            f"build_model({name!r}): expected its documented options, got {options}: {error}"
        ) from error
    model.spec = ModelSpec(name, num_classes, size, dict(options))  # type: ignore[assignment]
    return model


def embed(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the features [n, d] that the model's last linear layer sees, for any classifier."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            "model: expected a last linear layer to read features from, got none; "
            "end the classifier with nn.Linear"
        )
    seen: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(inputs.clone())  # it may write into them
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            "model: expected its last linear layer to be used in the forward pass, got one that is "
            "not; define the layer that gives the logits last"
        )
    return seen[-1].flatten(1)
