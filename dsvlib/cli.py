"""The command `dsv`. Heavy modules are imported inside the commands, so that help is instant.

Here is what an installed dsvlib offers. The companion of a checkout adds its own commands by the
entry-point group `dsvlib.commands`, a function that registers them with the typer app.

Exit status: 0 if all was done, 1 if something failed, 2 if it was asked for wrongly, 130 if
interrupted. One line on stderr says why; `--debug` adds the traceback.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsvlib import __version__
from dsvlib._errors import DsvError, RequestError, explain
from dsvlib._files import checkout, downloads_folder, file_digest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from dsvlib.classifiers.foreign import Classifier
    from dsvlib.conditions import Residuals
    from dsvlib.solution import Solution
    from dsvlib.synthesis import SynthesisConfig

Register = Callable[[typer.Typer], None]

INTERRUPTED = "interrupted; figures published earlier are as they were"
MOST_PIXELS = 8  # GiB of images in one run of synthesize
COMPANION = ("reproduce", "record", "claims", "cell", "train", "doctor", "site", "notebooks")
ANYWHERE = ("report",)  # of the companion, but no checkout is needed


def main(arguments: Sequence[str] | None = None, register: Register | None = None) -> None:
    """Run the command line and exit with its status; `register` adds commands to the app."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # accepted anywhere in the line
    # as Ctrl-C, so that kernels end with a run; Windows has no SIGHUP, and nohup ignores it
    ends = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    heard = [number for number in ends if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, _interrupt) for number in heard}
    show, warnings.showwarning = warnings.showwarning, _warn
    try:
        app = _application(register or _companion())
        status = app([w for w in words if w != "--debug"], prog_name="dsv", standalone_mode=False)
        if status == 130:  # what typer makes of KeyboardInterrupt
            _complain(INTERRUPTED, 130)
    except (KeyboardInterrupt, typer.Abort):
        status = _complain(INTERRUPTED, 130)
    except (typer.TyperException, DsvError, ValueError, TypeError, OSError,
            RuntimeError, ImportError) as error:  # fmt: skip
        if debug:
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if isinstance(error, ModuleNotFoundError):
            message += '; pip install "dsvlib[companion]" brings what the command needs'
        default = 2 if isinstance(error, typer.TyperException) else 1
        status = _complain(message, getattr(error, "exit_status", default))
    finally:
        warnings.showwarning = show
        for number, handler in earlier.items():
            signal.signal(number, handler)
    raise SystemExit(status if isinstance(status, int) else 0)


def _application(register: Register) -> typer.Typer:
    app = typer.Typer(
        name="dsv", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    app.callback(invoke_without_command=True)(_options)
    app.command()(synthesize)
    app.add_typer(data, name="data")
    register(app)
    return app


def _companion() -> Register:
    """Return what adds the companion's commands, or names that say what they lack."""
    if checkout() is None:
        found = _entry("report") or _missing(ANYWHERE, 'pip install "dsvlib[companion]"')
        lacking = _missing(COMPANION, "clone the repository and run make install, then this "
                           "command, in it")  # fmt: skip

        def register(app: typer.Typer) -> None:
            found(app)
            lacking(app)

        return register
    fix = 'install what the companion needs by pip install -e ".[companion]"'
    return _entry("companion") or _missing(COMPANION + ANYWHERE, fix)


def _entry(name: str) -> Register | None:
    """Return what an installed package adds under this name, None where none can be loaded."""
    try:
        for entry in entry_points(group="dsvlib.commands"):
            if entry.name == name:
                return entry.load()  # type: ignore[no-any-return]
    except ImportError:  # the extra's packages; or none of its entries is installed yet
        pass
    return None


def _missing(names: Sequence[str], fix: str) -> Register:
    def refuse(context: typer.Context) -> None:
        """Of the companion, which works in a checkout of the repository."""
        name = context.info_name
        needs = "its packages" if name in ANYWHERE else "a checkout"
        raise RequestError(f"{name}: a command of the companion needs {needs}; {fix}")

    anything = {"allow_extra_args": True, "ignore_unknown_options": True}

    def register(app: typer.Typer) -> None:
        for name in names:
            app.command(name, context_settings=anything, add_help_option=False)(refuse)

    return register


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"dsv: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _complain(message: str, status: int) -> int:
    print(f"dsv: {' '.join(message.split()) or 'failed without a message'}", file=sys.stderr)
    return status


def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Deep support vectors: make them, and every figure of the papers."""
    if version:
        print(f"dsvlib {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def synthesize(
    out: Annotated[Path, typer.Option(help="New folder for the results.")],
    classifier: Annotated[
        str | None,
        typer.Option(
            help="A file, digits-convnet, imagenet-efficientnet-lite0 (the extra [imagenet]) or "
            "torchvision:resnet50."
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Your own: MODULE:CALLABLE, with --weights.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A local state dict.")] = None,
    mean: Annotated[str | None, typer.Option(help="Per channel, e.g. 0.49,0.48,0.45.")] = None,
    std: Annotated[str | None, typer.Option(help="Per channel, e.g. 0.20,0.20,0.20.")] = None,
    shape: Annotated[str | None, typer.Option(help="One input: 3,32,32.")] = None,
    classes: Annotated[Path | None, typer.Option(help="File of class names, one a line.")] = None,
    labels: Annotated[str | None, typer.Option(help="Classes by name or number: cat,5.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Samples of every class.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    root: Annotated[Path | None, typer.Option(help="Folder of shipped classifiers.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to go on from after a kill; removed at the end.")
    ] = None,
) -> None:
    """Make deep support vectors of a classifier: ours, torchvision's or your own."""
    with explain("write", out):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise RequestError(f"--out: expected a new or empty folder, got {str(out)!r}")
    if (classifier is None) == (architecture is None):
        raise RequestError("expected --classifier or --architecture, one of the two")
    if architecture is not None and (":" not in architecture or weights is None):
        raise RequestError("--architecture: expected MODULE:CALLABLE, and --weights FILE with it")
    if labels is not None and per_class is not None:
        raise RequestError("expected --labels or --per-class, got both; leave one out")
    _check_range("--steps", steps, 1)
    _check_range("--per-class", per_class, 1)
    _check_range("--seed", seed, 0, 2**63 - 1)
    given: dict[str, Any] = {
        "mean": numbers("--mean", mean, float),
        "std": numbers("--std", std, float),
        "shape": numbers("--shape", shape, int),
        "classes": None if classes is None else _class_list(classes),
    }
    if checkpoint is not None:
        with explain("write", checkpoint):
            probe(checkpoint.parent)
    with _new_folder(out) as folder:  # made first: what cannot be written is not begun
        import torch

        import dsvlib

        opened = dsvlib.open_classifier(
            classifier or architecture or "", weights=weights, root=root, **given
        )
        if labels is None:
            _check_size(len(opened.classes) * (per_class or 1), opened.shape)
            wanted = torch.arange(len(opened.classes)).repeat_interleave(per_class or 1)
        else:
            try:
                wanted = opened.labels(labels.split(","))
            except ValueError as error:
                raise RequestError(f"--{error}") from None
        preset = preset_for(opened)
        solution = dsvlib.synthesize(
            opened.model,
            wanted,
            opened.shape,
            config=preset() if steps is None else preset(steps=steps),
            bounds=opened.bounds,
            generator=torch.Generator().manual_seed(seed),
            checkpoint=checkpoint,
            keep_checkpoint=True,
        )
        if not solution.status.successful:
            raise DsvError(f"{solution.status} Nothing was written; try fewer steps")
        about = {"status": str(solution.status), "classifier": opened.name, "seed": seed}
        _write_solution(folder, solution, opened, about)
    if checkpoint is not None:  # once all is in its place
        checkpoint.unlink(missing_ok=True)
    print(f"{len(solution.samples)} deep support vectors in {out}. {solution.status}")


def preset_for(opened: Classifier) -> Callable[..., SynthesisConfig]:
    """Return the settings for what a classifier reads; windows for networks that read them."""
    from dsvlib.synthesis import SynthesisConfig

    if opened.dataset == "digits":
        return SynthesisConfig.strokes
    channels, *sides = opened.shape
    window = SynthesisConfig.large_photographs().window or 0
    if min(sides) > window and opened.reads((channels, window, window)):
        return SynthesisConfig.large_photographs
    return SynthesisConfig.photographs


def _check_range(option: str, value: int | None, lowest: int, highest: int | None = None) -> None:
    if value is None or lowest <= value <= (value if highest is None else highest):
        return
    wanted = f"≥ {lowest}" if highest is None else f"from {lowest} to {highest}"
    raise RequestError(f"{option}: expected a whole number {wanted}, got {value}")


def _check_size(count: int, shape: Sequence[int]) -> None:
    """Refuse more images than a machine holds, which are all made at once."""
    size = 4 * count * math.prod(shape) / 2**30
    if size > MOST_PIXELS:
        raise RequestError(
            f"--per-class: expected images of at most {MOST_PIXELS} GiB together, got {count} of "
            f"{size:.3g} GiB; ask for fewer, or name some with --labels"
        )


def _class_list(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8 or UTF-16, with a byte order mark or without."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"--classes: expected a text file, got {error}") from error
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"--classes: expected {path} in UTF-8, got another encoding ({error.reason} at byte "
            f"{error.start}); save it as UTF-8"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def numbers(option: str, text: str | None, kind: type) -> list[Any] | None:
    """Return the numbers of an option's value such as ``0.5,0.25``, None for None."""
    if text is None:
        return None
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise RequestError(
            f"{option}: expected numbers with commas between them, got {text!r}"
        ) from None


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` when all went well and vanishes otherwise."""
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with explain("write", target):
            probe(folder)
        yield folder
        with explain("write", target):
            os.replace(folder, target)  # also over an empty folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe(folder: Path) -> None:
    """Make a folder, and a file in it for a moment: one can be made where the other cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(b"?")


def _write_solution(
    folder: Path, solution: Solution, opened: Classifier, about: dict[str, Any]
) -> None:
    samples = solution.samples.to("cpu").describe(opened)
    samples.save(folder / "samples.safetensors")
    names = [opened.classes[int(label)] for label in samples.labels]
    _draw(folder / "samples.png", samples.images(), names)
    solution.history.to_csv(folder / "history.csv", index=False)
    if solution.residuals is not None:
        _table(solution.residuals).to_csv(folder / "residuals.csv", index=False)
    about |= {"steps": int(solution.config.steps)}
    about |= {"samples_sha256": file_digest(folder / "samples.safetensors")}
    text = json.dumps(about, indent=2, ensure_ascii=False)
    (folder / "about.json").write_text(text + "\n", encoding="utf-8")


def _table(residuals: Residuals) -> pd.DataFrame:
    import pandas as pd

    names = ("stationarity", "cosine", "primal", "dual", "active")
    whole = pd.DataFrame({"quantity": names, "parameter": "all"})
    whole["value"] = [float(getattr(residuals, name)) for name in names]
    return pd.concat([whole, residuals.per_layer.melt("parameter", var_name="quantity")])


def _draw(path: Path, images: Tensor, names: Sequence[str]) -> None:
    """Draw `images` [n, C, H, W] in [0, 1] ten a row, each with its name below.

    Small ones are enlarged smoothly: where pixels show their edges, people read these.
    """
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import to_pil_image

    scale = -(-192 // images.shape[-1])  # whole pixels, and room for a name
    width, height = images.shape[-1] * scale, images.shape[-2] * scale
    columns, line = min(len(images), 10), 20
    size = (columns * (width + 4), -(-len(images) // columns) * (height + line + 4))
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        x, y = index % columns * (width + 4), index // columns * (height + line + 4)
        tile = to_pil_image(image if len(image) in (1, 3) else image[:1])
        page.paste(tile.resize((width, height), Image.Resampling.BICUBIC), (x + 2, y + 2))
        while len(name) > 3 and draw.textlength(name, font) > width:
            name = name.removesuffix("…")[:-1] + "…"
        draw.text((x + 2, y + height + 3), name, "black", font)
    page.save(path)


data = typer.Typer(help="The data sets.", no_args_is_help=True)
DataRoot = Annotated[Path | None, typer.Option(help="Folder of the data sets.")]
DataName = Annotated[list[str] | None, typer.Argument(help="Data sets; see dsv data list.")]


@data.command("list")
def list_data(root: DataRoot = None) -> None:
    """List the data sets that load_dataset knows, and which of them are here."""
    from dsvlib.data.downloads import CLASSES, FOLDERS, as_folder, has_images, states

    where = root or downloads_folder()
    print("digits         bundled, works offline (the default)")
    for name in CLASSES:
        if as_folder(name, where):
            said = "present, folders of images" if has_images(where / name) else "an empty folder"
            print(f"{name:14} {said}; dsv data verify {name} looks at all of them")
            continue
        words = sorted(set(states(name, where).values()))
        fix = "" if words == ["whole"] else f"; dsv data fetch {name}, or on first use"
        print(f"{name:14} {', '.join(words)}{fix}")
    for name in FOLDERS:
        there = (where / name / "train").is_dir()
        print(f"{name:14} {'present' if there else f'missing: a folder of images in {where}'}")
    print("folder:PATH    your own: PATH/train/<class>/* and PATH/test/<class>/*")


@data.command("fetch")
def fetch_data(names: DataName = None, root: DataRoot = None) -> None:
    """Download data sets, each file checked against its checksum."""
    from dsvlib.data.downloads import archives, as_folder, fetch

    if not names:
        raise RequestError("expected the NAME of a data set; dsv data list shows them")
    where = root or downloads_folder()
    files = {name: archives(name) for name in names}  # every name is known before the first byte
    for name in names:
        if as_folder(name, where):
            typer.echo(f"{name} · its folder {where / name} is used; dsv data verify checks it")
        else:
            fetch(files[name], where, echo=typer.echo)


@data.command("verify")
def verify_data(names: DataName = None, root: DataRoot = None) -> None:
    """Check the files of data sets against their checksums; all that are here by default."""
    from dsvlib.data.downloads import CLASSES, FOLDERS, as_folder, states, verify

    where = root or downloads_folder()
    here = [
        n for n in CLASSES if as_folder(n, where) or {*states(n, where).values()} != {"missing"}
    ]
    here += [name for name in FOLDERS if (where / name).is_dir()]
    wrong = []
    for name in names or ["digits", *here]:
        whole, text = verify(name, where)
        typer.echo(f"{name:14} {'whole' if whole else 'NOT WHOLE'} · {text}")
        wrong += [] if whole else [name]
    if wrong:
        raise DsvError(f"{', '.join(wrong)}: not whole; the lines above say what to do")


if __name__ == "__main__":
    main()
