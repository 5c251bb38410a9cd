"""The command `dsv`. Heavy modules are imported inside the commands, so that help is instant.

Exit status: 0 if all was done, 1 if something failed, 2 if it was asked for wrongly, 130 if
interrupted. One line on stderr says why; `--debug` adds the traceback.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from companion.runs import digest, write_json
from dsvlib._errors import DsvError, RequestError
from dsvlib._files import file_digest

if TYPE_CHECKING:
    from dsvlib.classifiers.foreign import Classifier
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
Preset = Annotated[str, typer.Option(help="smoke, quick, cifar10, imagenette or paper.")]


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
    from companion.workflow import reproduce as run

    done = run(preset, only=only or (), jobs=jobs, device=device, data_root=data_root, force=force)
    if not done:
        raise DsvError("at least one notebook failed; the reasons are above")


@app.command()
def site(preset: Preset = "quick") -> None:
    """Build the pages of the recorded runs into build/site/html."""
    from companion.site.build import build_site

    build_site(preset)


@notebooks.command()
def refresh(preset: Preset = "quick", only: Only = None) -> None:
    """Put the outputs of a run into the committed notebooks."""
    from companion.notebooks import refresh_notebooks

    for name in refresh_notebooks(preset, only or ()):
        print(f"{name} refreshed")


@notebooks.command("run")
def run_one(
    name: Annotated[str, typer.Argument(help="A notebook, by number or name.")],
    preset: Preset = "quick",
    seed: Annotated[
        int | None, typer.Option(help="Of a repetition that the preset asks for.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    data_root: Annotated[str | None, typer.Option(help="Folder of the data sets.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: all cores.")] = None,
) -> None:
    """Run one notebook whether it is up to date or not: what a rule of the Snakefile calls."""
    if threads is not None and threads < 1:
        raise RequestError(f"--threads: expected a whole number ≥ 1, got {threads}")
    from companion.presets import plan
    from companion.workflow import run_notebook

    jobs = plan(preset, only=[name], device=device, data_root=data_root)
    known = {job.repetition: job for job in jobs}
    if seed not in known:
        seeds = ", ".join(str(s) for s in known if s is not None) or "no seed"
        raise RequestError(
            f"--seed: preset {preset!r} repeats {jobs[0].notebook} at {seeds}, got {seed}; add it "
            "to the preset's 'repeat' in notebooks/presets.yml"
        )
    job = known[seed]
    flags = [f"--device {device}" if device else "", "--data-root PATH" if data_root else ""]
    run_id = os.environ.get("DSV_RUN_ID")  # of the run that holds this checkout, if there is one
    if run_notebook(job, threads=threads, flags=" ".join(filter(None, flags)), run_id=run_id):
        raise DsvError(f"{job.name} failed; the reason is above")


@notebooks.command()
def student() -> None:
    """Write the student editions: the committed notebooks without solutions and outputs."""
    from companion.notebooks import write_student_copies

    for name in write_student_copies():
        print(f"student/{name} written")


@notebooks.command()
def check() -> None:
    """Say what is wrong with the committed notebooks; nothing is changed."""
    from companion.notebooks import check_notebooks

    problems = check_notebooks()
    for problem in problems:
        print(problem)
    if problems:
        raise DsvError(f"{len(problems)} problems in the notebooks; they are listed above")


@app.command()
def claims(
    scale: Annotated[str, typer.Option("--scale", "--preset", help="quick, cifar10, …")] = (
        "quick"
    ),
) -> None:
    """Say which claims of the papers hold, from the records; write ledger and results."""
    from companion.ledger.claims import claim_rows, write_claims
    from companion.ledger.results import write_results
    from dsvlib._files import repository_root

    rows = claim_rows(scale)
    colours = {"reproduced": "green", "partly": "yellow"}
    for row in rows:
        word = typer.style(f"{row.verdict:14}", fg=colours.get(row.verdict, "red"), bold=True)
        typer.echo(f"{row.id:9} {word} {row.measured}")
        typer.echo(f"{'':9} {row.statement} Paper: {row.paper}.")
        typer.echo(f"{'':9} {row.notebook or '–'} · {row.scale} · {row.reason}")
    counts = Counter(row.verdict.value for row in rows)
    typer.echo(", ".join(f"{count} {word}" for word, count in counts.items()))
    for path in [*write_claims(scale), *write_results(scale)]:
        typer.echo(os.path.relpath(path, repository_root()))


@app.command()
def cell(
    method: Annotated[str, typer.Argument(help="DSV, DC, DSA, DM, 'class mean', 'same real', …")],
    per_class: Annotated[int, typer.Argument(help="Images per class.")],
    shot: Annotated[int, typer.Argument(help="Real images seen per class.")],
    preset: Preset = "quick",
    seeds: Annotated[str | None, typer.Option(help="E.g. 0,1; default: the recorded ones.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    data_root: Annotated[str | None, typer.Option(help="Folder of the data sets.")] = None,
) -> None:
    """Run one cell of Table 2 again and hold it against the recorded number."""
    from companion.ledger.table2 import recorded_cell, rerun
    from dsvlib.allocation import keep_memory

    chosen = _numbers("--seeds", seeds, int)
    recorded = recorded_cell(method, per_class, shot, preset=preset)
    keep_memory()
    found = rerun(recorded, data_root=data_root, device=device, seeds=chosen)
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    what = f"{method}, {per_class} per class, {shot} shot"
    print(f"{what}: {statistics.fmean(found):.1f}{spread} % (n = {len(found)}), recorded "
          f"{recorded.mean:.1f} ± {recorded.std:.1f} % (n = {recorded.count})")  # fmt: skip
    if not recorded.holds(found):
        raise DsvError(
            f"{what}: expected a mean within {recorded.std:.1f} points of {recorded.mean:.1f} %, "
            f"got {statistics.fmean(found):.1f} %; compare code and machine in "
            f"figures/{preset}/05_fewshot_retraining/table2.json"
        )


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
    from companion.recipes import RECIPES, train_shipped
    from dsvlib._files import checkpoints_folder, repository_root
    from dsvlib.allocation import keep_memory

    keep_memory()
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
    out: Annotated[Path, typer.Option(help="New folder for the results.")],
    classifier: Annotated[
        str | None,
        typer.Option(help="A file, digits-convnet, or torchvision:resnet50."),
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
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to go on from after a kill; removed at the end.")
    ] = None,
) -> None:
    """Make deep support vectors of a classifier: ours, torchvision's or your own."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RequestError(f"--out: expected a new or empty folder, got {str(out)!r}")
    if (classifier is None) == (architecture is None):
        raise RequestError("expected --classifier or --architecture, one of the two")
    if architecture is not None and (":" not in architecture or weights is None):
        raise RequestError("--architecture: expected MODULE:CALLABLE, and --weights FILE with it")
    if labels is not None and per_class is not None:
        raise RequestError("expected --labels or --per-class, got both; leave one out")
    if steps is not None and steps < 1:
        raise RequestError(f"--steps: expected a whole number ≥ 1, got {steps}")
    if per_class is not None and per_class < 1:
        raise RequestError(f"--per-class: expected a whole number ≥ 1, got {per_class}")
    given: dict[str, Any] = {
        "mean": _numbers("--mean", mean, float),
        "std": _numbers("--std", std, float),
        "shape": _numbers("--shape", shape, int),
        "classes": None if classes is None else classes.read_text("utf-8").split("\n"),
    }
    if given["classes"] is not None:
        given["classes"] = [line.strip() for line in given["classes"] if line.strip()]
    import torch

    import dsvlib
    from dsvlib.allocation import keep_memory

    keep_memory()
    opened = dsvlib.open_classifier(classifier or architecture or "", weights=weights, **given)
    if labels is None:
        wanted = torch.arange(len(opened.classes)).repeat_interleave(per_class or 1)
    else:
        try:
            wanted = opened.labels(labels.split(","))
        except ValueError as error:
            raise RequestError(f"--{error}") from None
    solution = dsvlib.synthesize(
        opened.model,
        wanted,
        opened.shape,
        config=_synthesis_config(opened.dataset, steps),
        bounds=opened.bounds,
        generator=torch.Generator().manual_seed(seed),
        checkpoint=checkpoint,
    )
    if not solution.status.successful:
        raise DsvError(f"{solution.status} Nothing was written; try fewer steps or another seed")
    about = {"status": str(solution.status), "classifier": opened.name, "seed": seed}
    with _new_folder(out) as folder:
        _write_solution(folder, solution, opened, about)
    print(f"{len(solution.samples)} deep support vectors in {out}. {solution.status}")


def _numbers(option: str, text: str | None, kind: type) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise RequestError(
            f"{option}: expected numbers with commas between them, got {text!r}"
        ) from None


def _synthesis_config(dataset: str, steps: int | None) -> Any:
    """Return the defaults for the bundled digits, and the start for photographs for all else."""
    from dsvlib import SynthesisConfig

    changes: dict[str, Any] = {} if steps is None else {"steps": steps}
    if dataset == "digits":
        return SynthesisConfig(**changes)
    return SynthesisConfig.photographs(**changes)


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
    folder: Path, solution: Solution, opened: Classifier, about: dict[str, Any]
) -> None:
    from companion.figures import image_grid, write_figure

    samples = solution.samples.to("cpu").describe(opened)
    samples.save(folder / "samples.safetensors")
    images = samples.images().numpy()
    names = [opened.classes[int(label)] for label in samples.labels]
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
def doctor(
    preset: Preset = "quick",
    data_root: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
) -> None:
    """Say what this machine has, what a preset still lacks, and what it will cost."""
    import platform

    import psutil  # type: ignore[import-untyped]
    import torch

    from companion.forecast import data_needed, forecast, total
    from companion.presets import plan
    from companion.runs import repository_root
    from dsvlib._files import checkpoints_folder

    todo = plan(preset, data_root=None if data_root is None else str(data_root))
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
        "classifiers": ", ".join(shipped) or "none; run dsv train --all",
    }
    lines |= {f"data {k}": v for k, v in data_needed(todo, data_root).items()}
    for name, value in lines.items():
        print(f"{name:12} {value}")
    if free < gib:
        print(f"{'':12} less than 1 GiB free: runs may fail; make clean frees what they left")
    print(f"\nforecast for dsv reproduce --preset {preset} (recorded runs, other machines differ):")
    expected = forecast(todo)
    for entry in expected:
        print(f"{entry.job:32} {entry}")
    print(f"{'together, one after another':32} {total(expected)}")
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


DataRoot = Annotated[Path | None, typer.Option(help="Folder of the data sets.")]
DataName = Annotated[list[str] | None, typer.Argument(help="Data sets; see dsv data list.")]


@data.command("list")
def list_data(root: DataRoot = None) -> None:
    """List the data sets that load_dataset knows, and which of them are here."""
    from dsvlib.data.downloads import CLASSES, FOLDERS, archives, default_root, state

    where = root or default_root()
    print("digits         bundled, works offline (the default)")
    for name in CLASSES:
        words = sorted({state(archive, where) for archive in archives(name)})
        fix = "" if words == ["whole"] else f"; dsv data fetch {name}, or on first use"
        print(f"{name:14} {', '.join(words)}{fix}")
    for name in FOLDERS:
        there = (where / name / "train").is_dir()
        print(f"{name:14} {'present' if there else f'missing: a folder of images in {where}'}")
    print("folder:PATH    your own: PATH/train/<class>/* and PATH/test/<class>/*")


@data.command("fetch")
def fetch_data(names: DataName = None, root: DataRoot = None) -> None:
    """Download data sets, checked; a download that broke off goes on where it stopped."""
    from dsvlib.data.downloads import archives, default_root, fetch

    if not names:
        raise RequestError("expected the NAME of a data set; dsv data list shows them")
    for files in [archives(name) for name in names]:  # every name is known before the first byte
        fetch(files, root or default_root(), echo=typer.echo)


@data.command("verify")
def verify_data(names: DataName = None, root: DataRoot = None) -> None:
    """Check the files of data sets against their checksums; all that are here by default."""
    from dsvlib.data.downloads import CLASSES, FOLDERS, archives, default_root, state, verify

    where = root or default_root()
    here = [n for n in CLASSES if any(state(a, where) != "missing" for a in archives(n))]
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
