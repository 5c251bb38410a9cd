"""EfficientNet-Lite (Google, 2020): inverted bottlenecks with ReLU6, no squeeze and excitation.

Every convolution pads as TensorFlow's "SAME" does, on the right and at the bottom first, from the
size that it is given: any image size can be read. Modules are called as in the published PyTorch
weights, without their leading underscores.

Shapes: inputs [n, C, H, W], logits [n, K].
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dsvlib._validation import check_number

EPSILON = 1e-3  # of the batch norms, as the weights were trained
STEM, HEAD = 32, 1280  # channels that all sizes share
STAGES = (  # repeats, kernel, stride, expansion, channels: EfficientNet-B0's
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ⌈side/stride⌉ pixels a side."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inside, outside, kernel, stride, groups=groups, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the convolution of the padded inputs."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [
            max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            for side in (inputs.shape[3], inputs.shape[2])
        ]
        return super().forward(F.pad(inputs, [p for m in missing for p in (m // 2, m - m // 2)]))


class Block(nn.Module):
    """Expansion, depthwise convolution and projection, around which the input passes by."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expands, self.passes = expansion > 1, stride == 1 and inside == outside
        if self.expands:
            self.expand_conv = SameConv2d(inside, wide, 1)
            self.bn0 = nn.BatchNorm2d(wide, eps=EPSILON)
        self.depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self.bn1 = nn.BatchNorm2d(wide, eps=EPSILON)
        self.project_conv = SameConv2d(wide, outside, 1)
        self.bn2 = nn.BatchNorm2d(outside, eps=EPSILON)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features [n, outside, ⌈H/stride⌉, ⌈W/stride⌉]."""
        x = F.relu6(self.bn0(self.expand_conv(inputs))) if self.expands else inputs
        x = F.relu6(self.bn1(self.depthwise_conv(x)))
        x = self.bn2(self.project_conv(x))
        return x + inputs if self.passes else x


class EfficientNetLite(nn.Module):
    """Lite0 at width 1 and depth 1, Lite2 at 1.1 and 1.2: 4.65 and 6.09 million parameters."""

    def __init__(
        self,
        num_classes: int,
        shape: tuple[int, int, int],
        *,
        width: float = 1.0,
        depth: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_number("width", width, above=0)
        check_number("depth", depth, above=0)
        self.conv_stem = SameConv2d(shape[0], STEM, 3, 2)
        self.bn0 = nn.BatchNorm2d(STEM, eps=EPSILON)
        blocks, inside = [], STEM
        for number, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            outside = _rounded(channels * width)
            if number not in (0, len(STAGES) - 1):
                repeats = math.ceil(repeats * depth)
            for index in range(repeats):
                blocks.append(Block(inside, outside, kernel, 1 if index else stride, expansion))
                inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = SameConv2d(inside, HEAD, 1)
        self.bn1 = nn.BatchNorm2d(HEAD, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(HEAD, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [n, K]."""
        x = F.relu6(self.bn0(self.conv_stem(inputs)))
        x = F.relu6(self.bn1(self.conv_head(self.blocks(x))))
        logits: Tensor = self.fc(self.dropout(x.mean(dim=(2, 3))))
        return logits


def _rounded(channels: float) -> int:
    """Return the nearest multiple of 8 that is not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
