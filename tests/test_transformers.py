"""Attention under the DeepKKT loss: the kernel is chosen by itself, its derivatives are right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad, gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsvlib import (
    SupportSet,
    SynthesisConfig,
    _second_derivatives,
    build_model,
    deepkkt_loss,
    residuals,
    synthesize,
    weighted_gradient,
)
from dsvlib._second_derivatives import twice_differentiable

SHAPE = (2, 4, 4)
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class Tokens(nn.Module):
    """Pixels as tokens [n, 16, 4] through `block`, averaged, to three logits."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Linear(2, 4), block, nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embedding(inputs.flatten(2).transpose(1, 2))
        logits: Tensor = self.head(self.block(tokens).mean(dim=1))
        return logits


class Stubborn(nn.Module):
    """Ask for a fused kernel where it is called, as networks tuned for speed do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        with sdpa_kernel(FUSED):
            out: Tensor = self.inner(tokens)
        return out


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)  # one head: [n, 1, t, 4]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)


def torchvision_vit() -> nn.Module:
    return build_model("vit", num_classes=3, shape=SHAPE, patch=2, width=4, depth=1, heads=2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision_vit,
    "encoder-layer": lambda: Tokens(encoder_layer()),
    "encoder": lambda: Tokens(nn.TransformerEncoder(encoder_layer(), 2)),
    "own-attention": lambda: Tokens(OwnAttention()),
    "fused-by-wish": lambda: Tokens(Stubborn(OwnAttention())),
    "fused-by-wish-module": lambda: Tokens(Stubborn(encoder_layer())),
}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=NETWORKS, ids=str)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param]().double()


def candidates(count: int = 4, dtype: torch.dtype = torch.float64) -> SupportSet:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *SHAPE, generator=generator).to(dtype)
    multipliers = (torch.rand(count, generator=generator) + 0.5).to(dtype)
    return SupportSet(inputs, torch.arange(count) % 3, multipliers)


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "boolean mask": {"attn_mask": torch.tril(torch.ones(5, 5, dtype=torch.bool))},
    "float mask": {"attn_mask": torch.linspace(-2, 2, 25).view(5, 5).double()},
    "grouped heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention_is_torchs_own(options: dict[str, Any]) -> None:
    heads = 2 if "enable_gqa" in options else 4
    q = torch.randn(2, 4, 5, 6).double()
    k, v = torch.randn(2, 2, heads, 5, 6).double()
    with twice_differentiable():
        found = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize("wanted", [True, False])
def test_attention_module_is_torchs_own(wanted: bool) -> None:
    layer, x = nn.MultiheadAttention(6, 2, batch_first=True).double(), torch.randn(2, 5, 6).double()
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options: dict[str, Any] = {"key_padding_mask": hidden, "need_weights": wanted}
    with twice_differentiable():
        found, weights = layer(x, x, x, **options)
    expected, own = layer(x, x, x, **options)
    torch.testing.assert_close(found, expected)
    assert (weights is None) == (own is None) == (not wanted)


def test_overlapping_threads_leave_torchs_choice() -> None:
    """A switch of the process would stay where the thread that entered second found it."""

    def switches() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    before, inside, done = switches(), threading.Event(), threading.Event()

    def enters_first() -> None:
        with twice_differentiable():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=enters_first)
    thread.start()
    inside.wait(10)
    with twice_differentiable():
        assert switches() == before
        done.set()
        thread.join()
    assert switches() == before
    with pytest.raises(KeyError), twice_differentiable():
        raise KeyError
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    assert "ScaledDotProduct" in type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__


def test_finite_differences_in_inputs_and_multipliers(network: nn.Module) -> None:
    samples = candidates(3)
    network.requires_grad_(True)

    def loss(inputs: Tensor, multipliers: Tensor) -> Tensor:
        return deepkkt_loss(
            network, SupportSet(inputs, samples.labels, multipliers), primal_weight=0.0
        )

    leaves = [t.clone().requires_grad_() for t in (samples.inputs, samples.multipliers)]
    assert gradcheck(loss, leaves, fast_mode=True)


def test_weighted_gradient_sums_the_gradients_of_single_samples(network: nn.Module) -> None:
    samples = candidates()
    found = weighted_gradient(network, samples)
    network.eval()
    expected = [torch.zeros_like(p) for p in network.parameters()]
    for i in range(len(samples)):  # by the kernel that torch takes by itself
        loss = F.cross_entropy(network(samples.inputs[i : i + 1]), samples.labels[i : i + 1])
        for total, part in zip(expected, grad(loss, list(network.parameters())), strict=True):
            total += samples.multipliers[i] * part
    for have, want in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


def test_without_the_choice_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would notice: torch's own choice has no second derivative."""
    samples = candidates()
    inputs = samples.inputs.requires_grad_()
    network = NETWORKS["fused-by-wish"]().double()
    grad(deepkkt_loss(network, samples), inputs)
    monkeypatch.delitem(_second_derivatives._REPLACED, F.scaled_dot_product_attention)
    with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product|backend"):
        grad(deepkkt_loss(network, samples), inputs)


@pytest.mark.parametrize("name", ["torchvision", "encoder-layer"])
def test_synthesis_moves_the_images_and_leaves_the_network(name: str) -> None:
    network = NETWORKS[name]().eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    config = SynthesisConfig(
        steps=20, resolutions=(), augmented_weight=0.0, tv_weight=0.0, norm_weight=0.0, log_every=1
    )
    with sdpa_kernel(FUSED):  # the user's own choice around the call
        found = synthesize(network, [0, 1, 2], SHAPE, config=config)
    assert found.history["total"].iloc[-1] < found.history["total"].iloc[0]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_frozen_backbone_and_head_alone() -> None:
    """Without a gradient to record, torch's inference path for encoder layers stays away."""
    network = NETWORKS["encoder-layer"]().double().requires_grad_(False)
    network.head.requires_grad_(True)  # type: ignore[union-attr]
    head = {k: v for k, v in network.named_parameters() if k.startswith("head")}
    samples = candidates()
    found = weighted_gradient(network, samples, params=head)
    assert set(found) == set(head)
    assert residuals(network, samples, params=head).stationarity > 0
    inputs = samples.inputs.requires_grad_()
    (moved,) = grad(deepkkt_loss(network, samples, params=head), inputs)
    assert moved.norm() > 0


def test_dropout_of_the_attention_is_off() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True)
    network, samples = Tokens(layer).double().train(), candidates()
    first, second = (weighted_gradient(network, samples) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_layer_norm_hides_the_scale_of_what_it_reads() -> None:
    """Euler: ⟨θ, ∇L⟩ = 0 over all that writes into the residual stream, whatever λ."""
    network = torchvision_vit().double()
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.0
    names = ("conv_proj", "class_token", "pos_embedding", "out_proj", "mlp.3")
    writers = {k: p for k, p in network.named_parameters() if any(n in k for n in names)}
    for parameter in writers.values():
        nn.init.normal_(parameter)
    found = weighted_gradient(network, candidates(), params=writers)
    inner = sum((writers[k].detach() * found[k]).sum() for k in writers)
    size = sum(found[k].norm() * writers[k].norm() for k in writers)
    assert abs(inner) < 1e-10 * size
    assert residuals(network, candidates(), params=writers).stationarity >= 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    samples: Any = candidates(dtype=dtype).to("cuda")
    inputs = samples.inputs.requires_grad_()
    network = NETWORKS["torchvision"]().to("cuda", dtype)
    (moved,) = grad(deepkkt_loss(network, samples), inputs)
    assert torch.isfinite(moved).all()
    assert moved.norm() > 0
