"""One list of cases, network × loss × dtype, for every object that reads a classifier.

The networks are as users have them: each stands for a kind of trouble that one of them has made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from conftest import CLASSES, SHAPE, build, candidates
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from dsvlib import SupportSet
from dsvlib.logits import LossFn


class Body(nn.Module):
    """A dense network on pixels whose forward pass the cases below spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 5), nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Any:
        return self.last(torch.tanh(self.first(inputs.flatten(1))))


class WritesIntoItsInput(Body):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs.sub_(0.5).div_(0.25))


class CountsItsCalls(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("highest", torch.full((1,), -1e9, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Any:
        self.calls += 1
        self.highest = torch.maximum(self.highest, inputs.detach().max().double())
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(1))
        return super().forward(inputs)


class StopsAGradient(Body):
    """Backward mode sees one path of two; forward mode would see both."""

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs.flatten(1))
        with torch.no_grad():
            gate = torch.sigmoid(self.first(inputs.flatten(1)))
        return self.last(torch.tanh(hidden * gate) + hidden.detach())


class Decides(Body):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs if float(inputs.detach().mean()) > -9 else -inputs)


class Checkpoints(Body):
    def forward(self, inputs: Tensor) -> Any:
        hidden = checkpoint(self.first, inputs.flatten(1), use_reentrant=False)
        return self.last(torch.tanh(hidden))


class Recurs(Body):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 5, batch_first=True)

    def forward(self, inputs: Tensor) -> Any:
        return self.last(self.cell(inputs.flatten(2).flatten(1).view(-1, 4, 8))[0][:, -1])


class Encodes(Body):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True, dropout=0.1)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Any:
        return self.head(self.encoder(inputs.reshape(-1, 4, 8)).mean(dim=1))


class ReturnsAnObject(Body):
    def forward(self, inputs: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(inputs), loss=None)


class ReturnsAMapping(Body):
    def forward(self, inputs: Tensor) -> Any:
        return {"logits": super().forward(inputs), "aux": inputs}


class RunsAutocast(Body):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs).double()


def normed() -> nn.Module:
    body = Body()
    weight_norm(body.first)
    return body


def hooked() -> nn.Module:
    body = Body()
    body.first.register_forward_hook(lambda _, __, out: torch.sin(out))
    return body


def hard_sigmoid() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(32, 5), nn.ReLU(inplace=True), nn.Hardsigmoid(), nn.Linear(5, 3)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: build("dense"),
    "conv": lambda: build("conv"),
    "conv-group": lambda: build("conv-group"),
    "conv-batch": lambda: build("conv-batch"),
    "writes into its input": WritesIntoItsInput,
    "counts its calls": CountsItsCalls,
    "stops a gradient": StopsAGradient,
    "decides": Decides,
    "checkpoints": Checkpoints,
    "recurrent": Recurs,
    "transformer encoder": Encodes,
    "weight norm": normed,
    "hook": hooked,
    "returns an object": ReturnsAnObject,
    "returns a mapping": ReturnsAMapping,
    "casts": RunsAutocast,
    "hard sigmoid": hard_sigmoid,
    "data parallel": lambda: nn.DataParallel(Body()),
}


def soft_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of one's own that codes its labels in place, as ±1 against the rest."""
    signs = 2 * F.one_hot(labels, CLASSES).to(logits.dtype) - 1
    labels.zero_()
    return F.softplus(-signs * logits).sum(dim=1)


class Case(NamedTuple):
    """A network, samples and a loss (None: cross-entropy)."""

    model: nn.Module
    samples: SupportSet
    loss_fn: LossFn | None

    def gradients(self) -> Tensor:
        """Return G [n, P], one sample and one backward pass of a copy of the network at a time."""
        model = copy.deepcopy(self.model).eval()
        model = model.module if isinstance(model, nn.DataParallel) else model
        rows = []
        for x, y in zip(self.samples.inputs, self.samples.labels, strict=True):
            out = model(x[None].clone())
            out = (
                out
                if isinstance(out, Tensor)
                else vars(out).get("logits")
                if not isinstance(out, dict)
                else out["logits"]
            )
            loss = self.loss_fn or (lambda logits, labels: F.cross_entropy(logits, labels))
            value = loss(out.to(x.dtype), y[None].clone()).sum()
            parts = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows).detach()

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


def _case(network: str, loss: str, dtype: torch.dtype) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[network]().to(dtype)
    samples = candidates(6, soft=loss == "soft labels")
    labels = samples.labels.to(dtype) if loss == "soft labels" else samples.labels
    samples = SupportSet(samples.inputs.to(dtype), labels, samples.multipliers.to(dtype))
    return Case(model, samples, soft_margin if loss == "own loss" else None)


LOSSES = ("hard labels", "soft labels", "own loss")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
# every network in float64, every loss on one of each family, float32 beside
NAMES = [(name, "hard labels", "float64") for name in NETWORKS]
NAMES += [(n, loss, "float64") for n in ("conv-batch", "recurrent") for loss in LOSSES[1:]]
NAMES += [(n, "hard labels", "float32") for n in ("conv-group", "transformer encoder", "decides")]
CASES: dict[str, Callable[[], Case]] = {
    ", ".join(names): lambda names=names: _case(names[0], names[1], DTYPES[names[2]])
    for names in NAMES
}
assert SHAPE == (2, 4, 4)
