"""What the tests share: small networks, and a check that a model is left as it was."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsvlib import SupportSet, load_dataset
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import FrozenClassifier
from dsvlib.logits import LossFn

# Without the extra (`make test-lowest`) the tests of the method alone are there to be run.
if importlib.util.find_spec("papermill") is None:
    collect_ignore = [
        path.name
        for path in Path(__file__).parent.glob("test_*.py")
        if any(name in path.read_text("utf-8") for name in ("companion", "import yaml"))
    ]

torch.set_num_threads(1)  # the networks are tiny: a second thread only adds noise
settings.register_profile("dsvlib", deadline=None, derandomize=True, database=None, max_examples=15)
settings.load_profile("dsvlib")

SHAPE = (2, 4, 4)
CLASSES = 3


class Gain(nn.Module):
    """A parameter that the output reads, beside one that it ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.gain


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, inputs: Tensor) -> Tensor:
        return inputs * 1.0

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.0


class Once(nn.Module):
    """The identity, with a first derivative only: what a fused kernel of one's own often has."""

    def forward(self, inputs: Tensor) -> Tensor:
        return _OnceOnly.apply(inputs)


def build(kind: str, *, seed: int = 0) -> nn.Module:
    """Return a smooth float64 network of `kind` for images of SHAPE and CLASSES logits."""
    channels, height, width = SHAPE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "dense":
            model = nn.Sequential(
                nn.Flatten(), nn.Linear(channels * height * width, 5), nn.Tanh(), nn.Linear(5, 3)
            )
        else:
            norm: dict[str, Callable[[], nn.Module]] = {
                "conv": nn.Identity,
                "conv-group": lambda: nn.GroupNorm(4, 4),
                "conv-batch": lambda: nn.BatchNorm2d(4),
            }
            model = nn.Sequential(
                nn.Conv2d(channels, 4, 3, padding=1),
                norm[kind](),
                nn.Tanh(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(16, CLASSES),
            )
        for value in model.parameters():  # no entry at its special start, such as γ = 1, β = 0
            value.data.add_(0.3 * torch.randn(value.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.double()


def candidates(count: int = 4, *, seed: int = 1, soft: bool = False) -> SupportSet:
    """Return float64 candidates with λ in [0.5, 1.5], labels cycling through the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    if soft:
        logits = torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)
        labels = logits.softmax(dim=1)
    return SupportSet(
        torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64),
        labels,
        torch.rand(count, generator=generator, dtype=torch.float64) + 0.5,
    )


def sample_gradients(
    model: nn.Module,
    samples: SupportSet,
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return θ [P] and G [n, P] as NumPy arrays, one backward pass per sample."""
    classifier = FrozenClassifier(model, params=params, loss_fn=loss_fn)
    rows = []
    with evaluation_mode(model):
        for i in range(len(samples)):
            losses, _ = classifier.losses(samples.inputs[i : i + 1], samples.labels[i : i + 1])
            parts = classifier.gradient(losses, torch.ones_like(losses), differentiable=False)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return classifier.flat_theta.numpy(), torch.stack(rows).numpy()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return copies of everything that a function must leave as it was."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name} training"] = module.training
        state[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    for name, value in model.named_parameters():
        state[f"{name} identity"] = id(value)
        state[f"{name} value"] = value.detach().clone()
        state[f"{name} requires_grad"] = value.requires_grad
        state[f"{name} grad"] = None if value.grad is None else value.grad.clone()
    for name, buffer in model.named_buffers():
        state[f"{name} buffer"] = buffer.clone()
    return state


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        same = torch.equal(old, new) if isinstance(old, Tensor) else old == new
        assert same, f"{name} changed from {old} to {new}"


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """A context that fails if the model differs afterwards, whether its body raised or not."""

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = state_of(model)
        try:
            yield
        finally:
            assert_same_state(before, state_of(model))

    return check


def delicate() -> nn.Module:
    """A model with everything that could be disturbed: norm, dropout, mixed modes, old gradients.

    Takes SHAPE, float64, in training mode but for its second norm; one parameter is frozen.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            Gain(),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        ).double()
        model.train()
        model[5].eval()
        model[4].bias.requires_grad_(False)
        for index, value in enumerate(model.parameters()):
            if index % 2 == 0:
                value.grad = torch.randn_like(value)
    return model


@pytest.fixture(scope="session")
def digits() -> Any:
    """The digits data set, read once."""
    return load_dataset("digits")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small checkout of its own, for tests of what runs and records notebooks."""
    from checkout import make_checkout  # of the companion, which `make test-lowest` is without

    return make_checkout(tmp_path, monkeypatch)
