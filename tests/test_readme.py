"""What the README tells users to type works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dsvlib import accuracy
from dsvlib._files import repository_root

ROOT = repository_root()
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "figures").symlink_to(ROOT / "figures")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "dsvs.safetensors").is_file()
    assert accuracy(names["network"], names["data"].test) > 0.5  # chance is 0.1
    assert names["pixels"].shape == (2, 3, 8, 8)
    assert not (tmp_path / "dog-and-cat.state").exists()


def test_every_link_into_the_repository_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", TEXT)
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []
