"""Adversarial training against the closed form of a linear classifier and a loop of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsvlib import AdversarialConfig, TrainConfig, train
from dsvlib.classifiers.adversarial import _uniform_in_ball, attack
from dsvlib.data.datasets import Split
from dsvlib.logits import cross_entropy

MEAN, STD = (0.4, 0.5), (0.2, 0.3)


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    """Float64 pixels well inside of [0, 1], and labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = 0.4 + 0.2 * torch.rand(count, 2, 3, 3, generator=generator, dtype=torch.float64)
    return pixels, torch.arange(count) % 2


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 2)).double()


def moved(model: nn.Module, pixels: Tensor, labels: Tensor, **options: float) -> Tensor:
    """Return the attacked images as pixels."""
    found = attack(
        model, normalised(pixels), labels, config=AdversarialConfig(**options), mean=MEAN, std=STD,
        loss_fn=cross_entropy, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    return found * std + mean


@pytest.mark.parametrize(("steps", "length"), [(1, 1.25), (2, 1.25), (5, 0.5)])
def test_steps_on_a_linear_classifier_are_those_by_hand(steps: int, length: float) -> None:
    """Its gradient has one direction everywhere, so that every step is known in closed form."""
    model, (pixels, labels) = linear(), images()
    weight = (model[1].weight[1] - model[1].weight[0]).detach().view(2, 3, 3)
    direction = weight / torch.tensor(STD).view(-1, 1, 1).double()  # of pixels, not of inputs
    direction = direction / direction.norm()
    found = moved(model, pixels, labels, radius=0.2, steps=steps)
    starts = _uniform_in_ball(pixels, 0.2, torch.Generator().manual_seed(3))
    for image, start, label, got in zip(pixels, starts, labels, found, strict=True):
        shift = start
        for _ in range(steps):
            shift = shift + length * 0.2 * (-1 if label else 1) * direction  # away from the label
            shift = shift * min(1.0, 0.2 / float(shift.norm()))
        torch.testing.assert_close(got, image + shift)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_stays_in_the_ball_and_in_the_range_and_raises_the_loss(steps: int) -> None:
    model, (pixels, labels) = linear(), images()
    found = moved(model, pixels, labels, radius=0.3, steps=steps)
    assert (found - pixels).flatten(1).norm(dim=1).max() <= 0.3 + 1e-9
    before = cross_entropy(model(normalised(pixels)), labels)
    assert (cross_entropy(model(normalised(found)), labels) > before).all()
    edge = pixels.round()  # black and white pixels: half of the directions lead out of [0, 1]
    found = moved(model, edge, labels, radius=1.0, steps=steps)
    assert 0 <= found.min() <= found.max() <= 1


def test_the_start_is_uniform_in_the_ball() -> None:
    """In d dimensions the d-th power of the distance is uniform in [0, 1]."""
    like = torch.zeros(4000, 1, 2, 2, dtype=torch.float64)
    found = _uniform_in_ball(like, 0.5, torch.Generator().manual_seed(0)).flatten(1)
    share = (found.norm(dim=1) / 0.5) ** 4
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(share.quantile(quantiles), quantiles, rtol=0, atol=0.03)
    assert found.mean(dim=0).abs().max() < 0.02


def test_training_with_it_makes_a_classifier_robust(digits) -> None:
    """Under the attack, a network trained with it keeps what one trained without loses."""
    split, config = digits.train[:400], AdversarialConfig(radius=1.0)
    rates = {}
    for name, adversarial in (("plain", None), ("robust", config)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
        history = train(
            model, split, config=TrainConfig(epochs=12, batch_size=50, adversarial=adversarial)
        )
        assert history["loss"].iloc[-1] < history["loss"].iloc[0]
        found = attack(
            model, split.inputs, split.labels, config=AdversarialConfig(radius=1.0, steps=10),
            mean=split.mean, std=split.std, loss_fn=cross_entropy,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        rates[name] = float((model(found).argmax(1) == split.labels).float().mean())
    assert rates["robust"] > rates["plain"] + 0.1


def test_attacks_leave_the_model_alone(untouched) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), linear()).double().train()
    with untouched(model):
        moved(model, *images(), radius=0.3, steps=2)


def test_what_cannot_be_done_is_said() -> None:
    pixels, labels = images()
    with pytest.raises(ValueError, match="adversarial: expected a split that knows how its pixels"):
        train(linear(), Split(pixels, labels), config=TrainConfig(adversarial=AdversarialConfig()))
    with pytest.raises(ValueError, match="radius: expected a finite number > 0"):
        AdversarialConfig(radius=0)
    with pytest.raises(ValueError, match="steps"):
        AdversarialConfig(steps=0)
