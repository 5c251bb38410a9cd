"""Priors on x that stand for the manifold condition x ∈ M (DSV §4.2, the β2 and β3 terms of Eq. 9).

Shapes: inputs [n, C, H, W] → one number per image, [n].
"""

from __future__ import annotations

from torch import Tensor

from dsvlib._validation import check_inputs


def total_variation(inputs: Tensor) -> Tensor:
    """Return the anisotropic total variation of each image, summed over channels and pixels, [n].

    TV(x) = Σ |x[c, r+1, s] − x[c, r, s]| + Σ |x[c, r, s+1] − x[c, r, s]|; a constant image has 0.
    Raises ValueError unless `inputs` is [n, C, H, W].
    """
    check_inputs(inputs)
    if inputs.ndim != 4:
        raise ValueError(
            f"inputs: expected images [n, C, H, W], got shape {list(inputs.shape)}; "
            f"total variation is defined on pixels only"
        )
    return image_variation(inputs)


def image_variation(inputs: Tensor) -> Tensor:
    """Compute `total_variation` without its checks, for the inner loop."""
    rows = inputs.diff(dim=2).abs().sum(dim=(1, 2, 3))
    columns = inputs.diff(dim=3).abs().sum(dim=(1, 2, 3))
    return rows + columns


def squared_norm(inputs: Tensor, target: float = 0.0) -> Tensor:
    """Return the mean squared distance of the pixels from `target`, ‖x − t‖² / (C·H·W), [n]."""
    return (inputs - target).flatten(1).square().mean(dim=1)
