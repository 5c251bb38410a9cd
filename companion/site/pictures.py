"""Pictures as pages want them: small ones for walls, and the frames of animations one by one."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from companion.ledger.figure_wall import Entry

WIDTH, WIDE = 760, 1200  # pixels of a small picture: a card of the wall, and one over its width
QUALITY = 82


def small(entry: Entry, original: Path, extra: Path) -> str:
    """Write a picture's small copy into `extra` and return its address, or that of the original.

    A picture that moves, or that would not get smaller, is shown as it is.
    """
    address = f"small/{entry.folder}/{original.stem}.webp"
    with Image.open(original) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            return entry.picture
        less = picture.convert("RGB")
        width = WIDE if entry.wide else WIDTH
        less.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
        target = extra / address
        target.parent.mkdir(parents=True, exist_ok=True)
        less.save(target, "webp", quality=QUALITY, method=4)
    if target.stat().st_size >= original.stat().st_size:
        target.unlink()
        return entry.picture
    return address


def frames(entry: Entry, original: Path, extra: Path) -> list[tuple[str, str]]:
    """Write an animation's frames into `extra`; return what each shows, and its address."""
    found = []
    with Image.open(original) as picture:
        for number, words in enumerate(entry.sidecar.get("frames", ())):
            picture.seek(number)
            address = f"frames/{entry.folder}/{original.stem}-{number}.webp"
            target = extra / address
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.convert("RGB").save(target, "webp", quality=90, method=4)
            found.append((str(words), address))
    return found
