"""Keeping memory: settings reach this process and its children, and the user's own settings win."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsvlib.allocation import keep_memory

ROOT = Path(__file__).resolve().parent.parent
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")
COUNT = """
import resource, torch
from dsvlib import allocation, build_model
{call}
torch.set_num_threads(1)
model = build_model("convnet", num_classes=10, shape=(3, 32, 32))
x = torch.randn(128, 3, 32, 32)
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if "MALLOC_" not in k})


def pages_asked_for(call: str) -> int:
    """Return how many pages a fresh process asks for in its fourth step of training."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    out = subprocess.run(
        [sys.executable, "-c", COUNT.format(call=call)],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    return int(out.stdout)


@LINUX
def test_a_step_asks_the_kernel_for_hardly_a_page_once_memory_is_kept() -> None:
    kept = pages_asked_for("assert allocation.keep_memory()")
    plain = pages_asked_for("")
    assert plain > 10_000, "or the setting would have nothing to gain"
    assert kept < plain / 3


@LINUX
def test_both_settings_are_made_and_handed_on() -> None:
    asked: dict[int, int] = {}
    library = SimpleNamespace(mallopt=lambda number, value: asked.update({number: value}) or 1)
    assert keep_memory(library)
    assert asked == {-4: 0, -1: 2**31 - 1}
    assert os.environ["MALLOC_MMAP_MAX_"] == "0"


@LINUX
def test_settings_of_the_user_win() -> None:
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"
    refuse = SimpleNamespace(mallopt=lambda *_: pytest.fail("the user's setting was overwritten"))
    assert not keep_memory(refuse)


def test_another_c_library_is_left_alone() -> None:
    assert not keep_memory(SimpleNamespace())
    assert "MALLOC_MMAP_MAX_" not in os.environ


@LINUX
def test_a_refusal_is_reported() -> None:
    assert not keep_memory(SimpleNamespace(mallopt=lambda number, _: int(number == -1)))
