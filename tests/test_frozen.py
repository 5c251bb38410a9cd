"""Networks as users have them: what is refused, what is said, and that nothing changes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Body, Decides
from conftest import CLASSES, Once, build, candidates
from torch import Tensor, nn

from dsvlib import (
    GradientConfig,
    SupportSet,
    deepkkt_loss,
    fit_multipliers,
    residuals,
    synthesize,
    weighted_gradient,
)
from dsvlib.frozen import as_logits, evaluation_mode, read_logits
from dsvlib.gradients import SampleGradients, flatten


def fit(model: nn.Module, samples: SupportSet, **options: Any) -> Any:
    return fit_multipliers(model, samples.inputs, samples.labels, **options)


READERS: dict[str, Callable[[nn.Module, SupportSet], Any]] = {
    "weighted_gradient": weighted_gradient,
    "residuals": residuals,
    "deepkkt_loss": deepkkt_loss,
    "nnls": fit,
    "gradient": lambda m, s: fit(m, s, method="gradient", config=GradientConfig(steps=2)),
}
all_readers = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


def live(samples: SupportSet) -> SupportSet:
    return SupportSet(samples.inputs.clone().requires_grad_(), samples.labels, samples.multipliers)


# --- samples coupled through the batch -----------------------------------------------------------


class Spoiled(Body):
    """`Body` with its hidden units changed by a function of the whole batch."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, inputs: Tensor) -> Any:
        return self.last(self.change(self.first(inputs.flatten(1))))


COUPLED: dict[str, Callable[[], nn.Module]] = {
    "batch norm without statistics": lambda: Spoiled(nn.BatchNorm1d(5, track_running_stats=False)),
    "batch norm 2d without statistics": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(),
        nn.Linear(16, CLASSES),
    ),
    "dropout that stays on": lambda: Spoiled(lambda x: F.dropout(x, 0.5, training=True)),
    "noise": lambda: Spoiled(lambda x: x + torch.randn_like(x)),
    "mean over the batch": lambda: Spoiled(lambda x: x - x.mean(dim=0)),
    "attention over the batch": lambda: Spoiled(lambda x: (x @ x.T).softmax(dim=1) @ x),
}  # fmt: skip


@all_readers
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("count", [1, 6])
def test_samples_that_depend_on_each_other_are_refused(name, reader, count, untouched):
    torch.manual_seed(0)
    model = COUPLED[name]().double()
    with untouched(model), pytest.raises(ValueError, match="depend on that sample alone"):
        reader(model, candidates(count))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_dependence(dtype):
    samples = candidates(50)
    samples = SupportSet(samples.inputs.to(dtype), samples.labels, samples.multipliers.to(dtype))
    weighted_gradient(build("conv-group").to(dtype), samples)


# --- graphs that are cut -------------------------------------------------------------------------


def without_graph(inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return inputs * 1


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": without_graph,
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "numpy": lambda x: torch.from_numpy(np.asarray(x.detach())),
    "tensor": lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
}


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_cut_graph_is_refused_where_a_slope_in_the_inputs_is_wanted(cut, untouched):
    model, samples = CutAtTheInput(cut).double(), candidates()
    with untouched(model), pytest.raises(ValueError, match="cuts the graph"):
        deepkkt_loss(model, live(samples))
    # without one, what comes after the cut has a gradient as in any other network
    assert float(flatten(weighted_gradient(model, samples).values()).norm()) > 0


class CutAtTheInput(Body):
    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, inputs: Tensor) -> Any:
        return super().forward(self.cut(inputs))


# --- errors of the network's own -----------------------------------------------------------------


class Raises(Body):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, inputs: Tensor) -> Any:
        raise self.error


OWN_ERRORS = [
    RuntimeError("my own bug"),
    RuntimeError("my cache has the wrong size"),
    KeyError("inside"),
    NotImplementedError("later"),
]


@all_readers
@pytest.mark.parametrize("error", OWN_ERRORS, ids=str)
def test_an_error_of_the_network_passes_with_its_place(error, reader, untouched):
    model = Raises(type(error)(*error.args)).double()
    with untouched(model), pytest.raises(type(error)) as caught:
        reader(model, candidates())
    assert caught.value is model.error
    assert any("in the model's forward pass, on inputs [" in n for n in caught.value.__notes__)


@all_readers
def test_a_shape_that_the_network_cannot_read_is_named(reader):
    inputs = torch.randn(4, 3, 4, 4).double()
    samples = SupportSet(inputs, torch.arange(4) % CLASSES, torch.ones(4).double())
    for model in (build("conv"), Body().double()):
        with pytest.raises(ValueError, match=r"a shape that the model can read, got \[\d, 3, 4, 4"):
            reader(model, samples)


# --- what comes out ------------------------------------------------------------------------------


class Returns(Body):
    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, inputs: Tensor) -> Any:
        return self.pack(super().forward(inputs))


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda x: (x, x), "got tuple of 2"),
    "list": (lambda x: [x], "got list of 1"),
    "mapping": (lambda x: {"out": x, "aux": x}, "got dict with 'out', 'aux'"),
    "nothing": (lambda x: None, "got NoneType"),
    "class numbers": (lambda x: x.argmax(dim=1), "got torch.int64"),
    "object of tuples": (lambda x: type("Out", (), {"logits": (x, x)})(), "got tuple of 2"),
    "one number per sample": (lambda x: x[:, 0], r"expected logits \[n, K\]"),
    "a map": (lambda x: x[:, :, None, None], r"expected logits \[n, K\]"),
    "other rows": (lambda x: x[:1], r"expected logits \[n, K\] for"),
}


@all_readers
@pytest.mark.parametrize(("pack", "message"), REFUSED.values(), ids=REFUSED)
def test_outputs_without_logits_are_refused_in_words(pack, message, reader):
    with pytest.raises((TypeError, ValueError), match=message):
        reader(Returns(pack).double(), candidates())


def test_logits_of_an_output():
    x = torch.ones(2, 3)
    nested = type("Out", (), {"logits": {"logits": x}})()
    for output in (x, {"logits": x, "loss": None}, type("Out", (), {"logits": x})(), nested):
        assert as_logits(output) is x


# --- wrappers ------------------------------------------------------------------------------------


@all_readers
def test_data_parallel_and_compiled_networks_are_read_inside(reader, untouched):
    plain, samples = build("conv"), candidates()
    compiled_part = nn.Sequential(torch.compile(build("conv"), backend="eager"))
    for model in (nn.DataParallel(plain), torch.compile(plain, backend="eager"), compiled_part):
        with untouched(model):
            found = reader(model, samples)
        expected = reader(plain, samples)
        if isinstance(found, dict):
            assert list(found) == list(dict(model.named_parameters()))
            torch.testing.assert_close(list(found.values()), list(expected.values()))
        elif isinstance(found, Tensor):
            torch.testing.assert_close(found, expected)
        elif hasattr(found, "samples"):
            torch.testing.assert_close(found.samples.multipliers, expected.samples.multipliers)
        else:
            assert found.stationarity == pytest.approx(expected.stationarity)


def test_compiled_code_is_back_after_overlapping_threads():
    """PyTorch's switch is one for the process: it has to end where it stood."""
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    inside, leave = threading.Event(), threading.Event()

    class Waits(Body):
        def forward(self, inputs: Tensor) -> Any:
            inside.set()
            leave.wait(10)
            return super().forward(inputs)

    torch.compile(Body(), backend="eager")  # loads the compiler
    waits, samples = Waits().double(), candidates()
    thread = threading.Thread(target=lambda: weighted_gradient(waits, samples))
    thread.start()
    inside.wait(10)

    class LeavesFirst(Body):
        def forward(self, inputs: Tensor) -> Any:
            leave.set()
            thread.join()
            return super().forward(inputs)

    weighted_gradient(LeavesFirst().double(), samples)
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert compiled == [1]


def test_parameters_of_a_wrapped_network_go_by_its_names():
    model = nn.DataParallel(build("conv"))
    params = {"module.5.bias": model.module[5].bias}
    assert list(weighted_gradient(model, candidates(), params=params)) == ["module.5.bias"]


# --- weights that are not finite -----------------------------------------------------------------


@all_readers
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_parameter_that_is_not_finite_is_named(value, reader):
    model = build("conv-batch")
    with torch.no_grad():
        model[5].weight[1, 2] = value
    with pytest.raises(ValueError, match=r"NaN or infinite ones in '5.weight' \(1 of 48\)"):
        reader(model, candidates())


def test_weights_beside_the_parameters_in_use_count_too():
    model, samples = build("conv-batch"), candidates()
    head = {"5.bias": model[5].bias}
    model[1].running_var[2] = torch.nan
    with pytest.raises(ValueError, match=r"'1.running_var'"):
        residuals(model, samples, params=head)
    model[1].running_var[2] = 1.0
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))  # as attention has them
    residuals(model, samples, params=head)
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"'0.weight'"):
        residuals(model, samples, params=head)


# --- buffers -------------------------------------------------------------------------------------


class Counts(Body):
    """Changes a buffer in place, replaces another, makes a third, and may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()).double())
        self.fails = False

    def forward(self, inputs: Tensor) -> Any:
        self.calls += 1
        self.mean = 0.9 * self.mean + inputs.mean()
        self.register_buffer("grid", torch.ones(2))
        if self.fails:
            raise KeyError
        return super().forward(inputs) + 0 * self.mean


@all_readers
@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_as_before(fails, reader, untouched):
    model = Counts().double()
    model.fails = fails
    with untouched(model):
        try:
            reader(model, candidates())
        except KeyError:
            assert fails


def test_buffers_are_as_before_where_the_network_is_called_directly(untouched):
    model = Counts().double()
    with untouched(model), evaluation_mode(model):
        first = model(candidates().inputs)
        assert model.calls == 1
    first.sum().backward()
    model.zero_grad(set_to_none=True)


def test_a_graph_survives_the_buffers_return():
    model = nn.Sequential(Counts(), nn.BatchNorm1d(CLASSES)).double()
    samples = live(candidates())
    deepkkt_loss(model, samples).backward()
    assert float(samples.inputs.grad.norm()) > 0


# --- where torch.func cannot go ------------------------------------------------------------------


def assert_products(model: nn.Module, samples: SupportSet) -> None:
    """G, Gᵀλ and Gv agree with one `weighted_gradient` per sample."""
    rows = []
    for i in range(len(samples)):
        one = SupportSet(
            samples.inputs[i : i + 1], samples.labels[i : i + 1], torch.ones(1).double()
        )
        rows.append(flatten(weighted_gradient(model, one).values()))
    expected = torch.stack(rows)
    vector = torch.linspace(-1, 1, expected.shape[1]).double()
    with evaluation_mode(model):
        found = SampleGradients(model, samples.inputs, samples.labels, batch_size=3)
        torch.testing.assert_close(found.all(), expected)
        torch.testing.assert_close(found.directional(vector), expected @ vector)


def with_backward_hook() -> nn.Module:
    model = Body()
    model.first.register_full_backward_hook(lambda *_: None)
    return model


LIMITS: dict[str, Callable[[], nn.Module]] = {
    "decides": Decides,
    "rrelu": lambda: Spoiled(nn.RReLU()),
    "backward hook": with_backward_hook,
    "once differentiable": lambda: Spoiled(Once()),
    "lstm": lambda: nn.Sequential(nn.Flatten(2), Last(nn.LSTM(16, 5, batch_first=True))),
    "old weight norm": lambda: nn.Sequential(
        nn.Flatten(), torch.nn.utils.weight_norm(nn.Linear(32, 3))
    ),
    "old spectral norm": lambda: nn.Sequential(
        nn.Flatten(), torch.nn.utils.spectral_norm(nn.Linear(32, 3))
    ),
}


class Last(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Any:
        return self.head(self.cell(inputs)[0][:, -1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIMITS)
def test_products_where_torch_func_may_fail(name):
    torch.manual_seed(0)
    model = LIMITS[name]().double()
    assert_products(model, candidates(5))
    solution = fit(model, candidates(5))
    assert solution.certificate.satisfied


def test_the_slow_way_is_announced():
    with pytest.warns(UserWarning, match="sample by sample, slower but right"):
        fit(Decides().double(), candidates(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(build("conv-group"), candidates(5))


def test_a_transform_that_lies_is_found_out(monkeypatch):
    """Two routes to one gradient are compared: whichever is wrong, it is noticed."""
    from dsvlib import gradients

    original = gradients.vmap
    monkeypatch.setattr(gradients, "vmap", lambda f, dims: lambda *a: {
        k: 1.5 * v for k, v in original(f, dims)(*a).items()
    })  # fmt: skip
    with pytest.warns(UserWarning, match="differs from that of a backward pass"):
        assert_products(build("dense"), candidates(5))


def test_theta_of_ones_own_is_used():
    model, x = build("dense"), candidates().inputs
    theta = {k: 2 * v.detach() for k, v in model.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(model, theta, (x,))
        torch.testing.assert_close(read_logits(model, theta, x), expected)


# --- what no reader can differentiate ------------------------------------------------------------


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Body().double()


def without_any_graph() -> nn.Module:
    body = Body().double()
    body.forward = torch.no_grad()(body.forward)  # type: ignore[method-assign]
    return body


def with_a_compiled_part() -> nn.Module:
    body = Body().double()
    body.first = torch.jit.script(body.first)
    return body


UNREADABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).double(),
        "'1.weight' of a lazy",
    ),
    "inference": (made_in_inference_mode, "'first.weight', made under torch.inference_mode"),
    "no graph": (without_any_graph, r"cuts the graph, or params that it does not use"),
    "script": (lambda: torch.jit.script(build("dense")), "got one compiled by torch.jit"),
    "script inside": (with_a_compiled_part, "got first compiled by torch.jit"),
    "complex": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 3, dtype=torch.complex64)),
        "expected real parameters, got torch.complex64",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated", "ignore:Lazy modules are")
@all_readers
@pytest.mark.parametrize(("make", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_networks_that_cannot_be_differentiated_are_refused_in_words(make, message, reader):
    with pytest.raises((TypeError, ValueError), match=message):
        reader(make(), candidates())


@all_readers
def test_one_score_has_no_cross_entropy(reader):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 1)).double()
    samples = candidates()
    alike = SupportSet(samples.inputs, torch.zeros(len(samples)).long(), samples.multipliers)
    with pytest.raises(ValueError, match=r"one, of which it is always 0; pass a loss_fn for one"):
        reader(model, alike)
    score = model.forward
    model.forward = lambda x: torch.cat([0 * score(x), score(x)], dim=1)  # what the message says
    reader(model, alike)


LAST: dict[str, tuple[nn.Module, bool]] = {
    "softmax": (nn.Softmax(dim=1), True),
    "log softmax": (nn.LogSoftmax(dim=1), False),  # a cross-entropy of it is the logits' own
    "sigmoid": (nn.Sigmoid(), False),
    "nothing": (nn.Identity(), False),
}


@all_readers
@pytest.mark.parametrize(("last", "announced"), LAST.values(), ids=LAST)
def test_probabilities_for_logits_are_announced(last, announced, reader):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        reader(nn.Sequential(Body(), last).double(), candidates())
    said = [str(w.message) for w in heard if "got probabilities" in str(w.message)]
    assert bool(said) == announced


@all_readers
def test_inference_mode_is_refused_in_words(reader):
    model, samples = Body().double(), candidates()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch.inference_mode; call"):
        reader(model, samples)
    with torch.inference_mode():
        made_inside = samples.inputs.clone()
    reader(model, SupportSet(made_inside, samples.labels, samples.multipliers))


def test_weights_used_twice_have_one_gradient():
    """Tied weights stand under one name, with the sum of both uses' gradients."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.second.weight = self.first.weight
            self.last = nn.Linear(32, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(torch.tanh(self.second(torch.tanh(self.first(inputs.flatten(1))))))

    torch.manual_seed(0)
    model, samples = Tied().double(), candidates(5)
    losses = F.cross_entropy(model(samples.inputs), samples.labels, reduction="none")
    named = dict(model.named_parameters())
    parts = torch.autograd.grad(samples.multipliers @ losses, list(named.values()))
    found = weighted_gradient(model, samples)
    assert list(found) == list(named)
    torch.testing.assert_close(list(found.values()), list(parts))
    with evaluation_mode(model):
        rows = SampleGradients(model, samples.inputs, samples.labels).all()
    torch.testing.assert_close(samples.multipliers @ rows, flatten(parts))


def test_float16_takes_no_adam_steps():
    model, samples = Body().half(), candidates()
    with pytest.raises(ValueError, match=r"got float16.*convert it with model.float\(\)"):
        synthesize(model, [0, 1], (2, 4, 4))
    with pytest.raises(ValueError, match="got float16"):
        fit(model, samples, method="gradient")
    assert fit(model, samples).certificate.satisfied
