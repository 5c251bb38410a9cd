"""Where this machine has a Chromium; as a script, print it or say how to get one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
MISSING = (
    "no Chromium found: run apt-get install chromium (or brew install --cask google-chrome), "
    "or name the program in DSV_CHROMIUM"
)


def find_browser() -> str | None:
    """Return the path of the first Chromium or Chrome, `DSV_CHROMIUM` before all others."""
    if named := os.environ.get("DSV_CHROMIUM"):
        return shutil.which(named)
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (str(MAC) if MAC.is_file() else None)


if __name__ == "__main__":
    path = find_browser()
    print(path or MISSING, file=sys.stdout if path else sys.stderr)
    raise SystemExit(path is None)
