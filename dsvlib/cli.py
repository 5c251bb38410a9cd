"""The command `dsv`. Heavy modules are imported inside the commands, so that help is instant.

Exit status: 0 if all was done, 1 if something failed, 2 if it was asked for wrongly, 130 if
interrupted. One line on stderr says why; `--debug` adds the traceback.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsvlib.run import DsvError, RequestError, digest, file_digest, write_json

if TYPE_CHECKING:
    from dsvlib.solution import Solution

app = typer.Typer(
    name="dsv",
    help="Deep support vectors: make them, and every figure of the papers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
notebooks = typer.Typer(help="Keep the committed notebooks' outputs honest.", no_args_is_help=True)
data = typer.Typer(help="The data sets.", no_args_is_help=True)
app.add_typer(notebooks, name="notebooks")
app.add_typer(data, name="data")

INTERRUPTED = "interrupted; figures published earlier are as they were"
Only = Annotated[
    list[str] | None, typer.Option("--only", help="A notebook, by number or name; repeatable.")
]
Preset = Annotated[str, typer.Option(help="smoke, quick, cifar10 or paper.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # accepted anywhere in the line
    earlier = signal.signal(signal.SIGTERM, _interrupt)
    try:
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
        default = 2 if isinstance(error, typer.TyperException) else 1
        status = _complain(message, getattr(error, "exit_status", default))
    finally:
        signal.signal(signal.SIGTERM, earlier)
    raise SystemExit(status if isinstance(status, int) else 0)


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def _complain(message: str, status: int) -> int:
    print(f"dsv: {' '.join(message.split()) or 'failed without a message'}", file=sys.stderr)
    return status


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Deep support vectors: make them, and every figure of the papers."""


@app.command()
def reproduce(
    preset: Preset = "quick",
    only: Only = None,
    jobs: Annotated[int, typer.Option(help="Notebooks to run side by side.")] = 1,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    data_root: Annotated[str | None, typer.Option(help="Folder of the data sets.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run also what is up to date.")] = False,
) -> None:
    """Run the notebooks of a preset and rebuild its figures."""
    from dsvlib.reproduce import reproduce as run

    done = run(preset, only=only or (), jobs=jobs, device=device, data_root=data_root, force=force)
    if not done:
        raise DsvError("at least one notebook failed; the reasons are above")


@app.command()
def site(preset: Preset = "quick") -> None:
    """Build the pages of the recorded runs into build/site/html."""
    from dsvlib.site import build_site

    build_site(preset)


@notebooks.command()
def refresh(preset: Preset = "quick", only: Only = None) -> None:
    """Put the outputs of a run into the committed notebooks."""
    from dsvlib.notebook_files import refresh_notebooks

    for name in refresh_notebooks(preset, only or ()):
        print(f"{name} refreshed")


@notebooks.command()
def check() -> None:
    """Say what is wrong with the committed notebooks; nothing is changed."""
    from dsvlib.notebook_files import check_notebooks

    problems = check_notebooks()
    for problem in problems:
        print(problem)
    if problems:
        raise DsvError(f"{len(problems)} problems in the notebooks; they are listed above")


@app.command()
def claims(
    scale: Annotated[str, typer.Option("--scale", "--preset", help="quick, cifar10 or paper.")] = (
        "quick"
    ),
) -> None:
    """Say which claims of the papers hold, from the recorded runs, and write the ledger."""
    from dsvlib.claims import claim_rows, write_claims
    from dsvlib.files import repository_root

    rows = claim_rows(scale)
    colours = {"reproduced": "green", "partly": "yellow"}
    for row in rows:
        word = typer.style(f"{row.verdict:14}", fg=colours.get(row.verdict, "red"), bold=True)
        typer.echo(f"{row.id:9} {word} {row.measured}")
        typer.echo(f"{'':9} {row.statement} Paper: {row.paper}.")
        typer.echo(f"{'':9} {row.notebook or '–'} · {row.scale} · {row.reason}")
    counts = Counter(row.verdict.value for row in rows)
    typer.echo(", ".join(f"{count} {word}" for word, count in counts.items()))
    for path in write_claims(scale):
        typer.echo(os.path.relpath(path, repository_root()))


@app.command()
def train(
    name: Annotated[str | None, typer.Argument(help="A shipped one: digits-convnet.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Train all shipped classifiers.")] = False,
    root: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
) -> None:
    """Train a shipped classifier anew, into its file in data/checkpoints."""
    if (name is None) != every:
        raise RequestError("expected the NAME of a shipped classifier or --all, one of the two")
    if root is not None and not root.is_dir():
        raise RequestError(f"--root: expected a folder, got {str(root)!r}")
    from dsvlib.files import checkpoints_folder, repository_root
    from dsvlib.zoo import RECIPES, train_shipped

    folder = os.path.relpath(checkpoints_folder(), repository_root())
    if name is not None and name not in RECIPES:
        raise RequestError.unknown("classifier", name, RECIPES)
    for recipe in RECIPES if name is None else (name,):
        if every and root is None and RECIPES[recipe].dataset != "digits":
            print(f"{recipe:24} left as it is: its images are not bundled, say where with --root")
            continue
        started = time.perf_counter()
        made = train_shipped(recipe, root=None if root is None else str(root))
        print(
            f"{recipe:24} train {made['train_accuracy']:.4f} · test {made['test_accuracy']:.4f} · "
            f"stationarity {made['stationarity']:.3g} · cosine {made['cosine']:.4f} · "
            f"{folder}/{recipe}.safetensors · {time.perf_counter() - started:.1f} s"
        )


@app.command()
def synthesize(
    classifier: Annotated[str, typer.Option(help="A file, or a shipped one: digits-convnet.")],
    out: Annotated[Path, typer.Option(help="New folder for the results.")],
    labels: Annotated[str | None, typer.Option(help="Class numbers, e.g. 0,1,2.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Samples of every class.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
) -> None:
    """Make deep support vectors of a classifier."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RequestError(f"--out: expected a new or empty folder, got {str(out)!r}")
    if labels is not None and per_class is not None:
        raise RequestError("expected --labels or --per-class, got both; leave one out")
    if steps is not None and steps < 1:
        raise RequestError(f"--steps: expected a whole number ≥ 1, got {steps}")
    if per_class is not None and per_class < 1:
        raise RequestError(f"--per-class: expected a whole number ≥ 1, got {per_class}")
    import torch

    import dsvlib

    model, metadata = dsvlib.load_classifier(classifier)
    if not {"classes", "mean", "std"} <= set(metadata):
        raise DsvError(f"{classifier}: expected classes, mean and std in the file's metadata")
    wanted = _labels(labels, per_class or 1, metadata["num_classes"])
    mean, std = torch.tensor(metadata["mean"]), torch.tensor(metadata["std"])
    solution = dsvlib.synthesize(
        model,
        torch.tensor(wanted),
        metadata["shape"],
        config=_synthesis_config(metadata, steps),
        bounds=((0 - mean) / std, (1 - mean) / std),
        generator=torch.Generator().manual_seed(seed),
    )
    if not solution.status.successful:
        raise DsvError(f"{solution.status} Nothing was written; try fewer steps or another seed")
    about = {"status": str(solution.status), "classifier": Path(classifier).name, "seed": seed}
    with _new_folder(out) as folder:
        _write_solution(folder, solution, metadata, about)
    print(f"{len(solution.samples)} deep support vectors in {out}. {solution.status}")


def _synthesis_config(metadata: dict[str, Any], steps: int | None) -> Any:
    """Return the defaults for the bundled digits, and the start for photographs for all else."""
    from dsvlib import SynthesisConfig

    changes = {} if steps is None else {"steps": steps}
    if metadata.get("dataset") == "digits":
        return SynthesisConfig(**changes)
    return SynthesisConfig.photographs(**changes)


def _labels(text: str | None, per_class: int, classes: int) -> list[int]:
    if text is None:
        return [c for c in range(classes) for _ in range(per_class)]
    try:
        labels = [int(word) for word in text.split(",")]
    except ValueError:
        raise RequestError(f"--labels: expected numbers such as 0,1,2, got {text!r}") from None
    if min(labels) < 0 or max(labels) >= classes:
        raise RequestError(f"--labels: expected numbers from 0 to {classes - 1}, got {text!r}")
    return labels


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` when all went well and vanishes otherwise."""
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, target)  # also over an empty folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_solution(
    folder: Path, solution: Solution, metadata: dict[str, Any], about: dict[str, Any]
) -> None:
    import numpy as np

    from dsvlib.figures import image_grid, write_figure

    samples = solution.samples
    samples.save(folder / "samples.safetensors")
    shape = (1, -1, 1, 1)
    mean, std = (np.reshape(metadata[key], shape) for key in ("mean", "std"))
    images = np.clip(samples.inputs.detach().cpu().numpy() * std + mean, 0, 1)
    names = [metadata["classes"][int(label)] for label in samples.labels]
    steps = int(solution.config.steps)
    alt = f"{len(names)} deep support vectors, of the classes {', '.join(dict.fromkeys(names))}"
    write_figure(
        image_grid(images, captions=names),
        folder / "samples",
        alt=alt,
        badge=f"{steps} steps · seed {about['seed']}",
    )
    solution.history.to_csv(folder / "history.csv", index=False)
    residuals = solution.residuals
    if residuals is not None:
        lines = ["quantity,parameter,value"]
        for key in ("stationarity", "cosine", "primal", "dual", "active"):
            lines.append(f"{key},all,{float(getattr(residuals, key))!r}")
        for row in residuals.per_layer.to_dict("records"):
            for key in ("stationarity", "cosine"):
                lines.append(f"{key},{row['parameter']},{float(row[key])!r}")
        (folder / "residuals.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about |= {"steps": steps, "samples_sha256": file_digest(folder / "samples.safetensors")}
    write_json(folder / "about.json", about | {"digest": digest(about)})


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, device, memory, disk, shipped classifiers."""
    import platform

    import psutil  # type: ignore[import-untyped]
    import torch

    from dsvlib.files import checkpoints_folder
    from dsvlib.run import repository_root

    gib = 2**30
    cuda = torch.cuda.is_available()
    shipped = sorted(path.stem for path in checkpoints_folder().glob("*.safetensors"))
    free = shutil.disk_usage(repository_root()).free
    lines = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _torchvision(),
        "device": f"cuda ({torch.cuda.get_device_name()})" if cuda else "cpu",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().available / gib:.1f} GiB free",
        "disk": f"{free / gib:.1f} GiB free",
        "classifiers": ", ".join(shipped) or "none",
    }
    for name, value in lines.items():
        print(f"{name:12} {value}")
    if not shipped:
        raise DsvError("no shipped classifier found; restore data/checkpoints from the repository")


def _torchvision() -> str:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise DsvError(
            f"torchvision does not fit this torch ({error}); install both from one index"
        ) from error
    return str(torchvision.__version__)


@data.command("list")
def list_data() -> None:
    """List the data sets that load_dataset knows."""
    print("digits         bundled, works offline (the default)")
    for name in ("cifar10", "cifar100", "svhn", "mnist", "fashion_mnist"):
        print(f"{name:14} downloaded on first use, with checksum")
    print("folder:PATH    your own: PATH/train/<class>/* and PATH/test/<class>/*")


if __name__ == "__main__":
    main()
