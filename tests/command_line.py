"""How the tests type a command: its exit status, and the one line that it says when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dsvlib import cli


def run(*words: str, main: Callable[[Sequence[str]], None] = cli.main) -> int:
    """Run `dsv` with `words` and return its exit status."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def stderr_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dsv: ")
    return lines[0]
