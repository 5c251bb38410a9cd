"""Spatial frequencies of images: how much power lies where, and images with one band only.

With the orthonormal 2-D discrete Fourier transform F of an image [H, W], the power of a ring is

    P(k) = mean of |F(u, v)|² over the (u, v) with √(u² + v²) nearest to k/side,

u and v in cycles per pixel, side = max(H, W). The mean colour is the ring 0. Power summed over all
coefficients is the squared norm of the image (Parseval).
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from dsvlib._validation import check_inputs, check_number


def radial_spectrum(inputs: Tensor) -> pd.DataFrame:
    """Return the power of each ring of frequencies, averaged over images and channels.

    Parameters
    ----------
    inputs
        Images [n, C, H, W], in whatever unit: power is in its square.

    Returns a frame with ``frequency`` (cycles per pixel; 0.5 is the finest pattern along an axis,
    0.71 along a diagonal) and ``power``; ``attrs["coefficients"]`` is the number of coefficients in
    each ring. Raises ValueError for other shapes or non-finite pixels.
    """
    images = _check_images(inputs)
    side = max(images.shape[2:])
    ring = (_radius(images) * side).round().long().flatten()
    power = torch.fft.fft2(images, norm="ortho").abs().square().mean(dim=(0, 1)).flatten()
    counts = ring.bincount()
    summed = torch.zeros(len(counts), dtype=power.dtype, device=power.device)
    summed = summed.index_add(0, ring, power)
    rings = torch.nonzero(counts)[:, 0]
    frame = pd.DataFrame(
        {
            "frequency": (rings / side).tolist(),
            "power": (summed[rings] / counts[rings]).tolist(),
        }
    )
    frame.attrs["coefficients"] = counts[rings].tolist()
    return frame


def band_pass(inputs: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return the images with only the frequencies low ≤ √(u² + v²) < high (cycles per pixel).

    Bands that tile [0, 1) add up to the image. Raises ValueError unless 0 ≤ low < high.
    """
    images = _check_images(inputs)
    check_number("low", low, at_least=0)
    check_number("high", high, above=low)
    radius = _radius(images)
    kept = torch.fft.fft2(images) * ((radius >= low) & (radius < high))
    return torch.fft.ifft2(kept).real.to(inputs.dtype)


def _radius(images: Tensor) -> Tensor:
    """Return the distance of each Fourier coefficient from the mean, [H, W]."""
    vertical, horizontal = (torch.fft.fftfreq(n, device=images.device) for n in images.shape[2:])
    return torch.hypot(vertical[:, None], horizontal[None, :])


def _check_images(inputs: Tensor) -> Tensor:
    images = check_inputs(inputs).detach()
    if images.ndim != 4:
        raise ValueError(
            f"inputs: expected images [n, C, H, W], got shape {list(images.shape)}; "
            f"add the dimensions that are missing"
        )
    return images.float() if torch.finfo(images.dtype).bits < 32 else images
