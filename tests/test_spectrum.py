"""Spectra against waves of a known frequency and Parseval's theorem."""

from __future__ import annotations

import math

import pytest
import torch

from dsvlib.analysis.spectrum import band_pass, radial_spectrum


def wave(cycles: int, side: int = 16) -> torch.Tensor:
    row = torch.cos(2 * math.pi * cycles * torch.arange(side, dtype=torch.float64) / side)
    return row.expand(1, 1, side, side)


@pytest.mark.parametrize("cycles", [1, 3, 8])
def test_a_wave_has_all_its_power_at_its_frequency(cycles: int) -> None:
    spectrum = radial_spectrum(wave(cycles))
    strongest = spectrum.loc[spectrum["power"].idxmax()]
    assert strongest["frequency"] == pytest.approx(cycles / 16)
    rest = spectrum.drop(index=strongest.name)["power"]
    assert rest.max() < 1e-20 < strongest["power"]


def test_a_constant_image_has_power_at_zero_only() -> None:
    spectrum = radial_spectrum(torch.full((2, 3, 8, 8), 2.0))
    assert spectrum["power"][0] == pytest.approx(4 * 64)  # (Σx)² / (H·W)
    assert spectrum["power"][1:].abs().max() < 1e-6


@pytest.mark.parametrize("size", [(16, 16), (7, 12), (1, 9)])
def test_power_of_all_coefficients_is_the_squared_norm(size: tuple[int, int]) -> None:
    images = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(0))
    spectrum = radial_spectrum(images)
    total = (spectrum["power"] * spectrum.attrs["coefficients"]).sum()
    assert total == pytest.approx(float(images.square().sum() / (5 * 3)), rel=1e-5)
    assert sum(spectrum.attrs["coefficients"]) == size[0] * size[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_single(dtype: torch.dtype) -> None:
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert radial_spectrum(images).equals(radial_spectrum(images.float()))
    assert band_pass(images, 0, 0.2).dtype == dtype


def test_white_noise_is_flat() -> None:
    noise = torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert radial_spectrum(noise)["power"].between(0.8, 1.2).all()


def test_bands_add_up_and_hold_nothing_else() -> None:
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    low, high = band_pass(images, 0, 0.2), band_pass(images, 0.2, 1)
    torch.testing.assert_close(low + high, images)
    assert radial_spectrum(low).query("frequency > 0.25")["power"].max() < 1e-6
    assert radial_spectrum(high).query("frequency < 0.15")["power"].max() < 1e-6
    torch.testing.assert_close(band_pass(low, 0, 0.2), low)


def test_other_shapes_and_empty_bands_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images \[n, C, H, W\]"):
        radial_spectrum(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"high: expected a finite number > 0\.3"):
        band_pass(torch.zeros(1, 1, 8, 8), 0.3, 0.3)
