"""The companion's commands of `dsv`, for a checkout but `report`; `dsvlib.cli` has the method's.

Heavy modules are imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from dsvlib import cli
from dsvlib._errors import DsvError, RequestError, explain

app = typer.Typer()
notebooks = typer.Typer(help="Keep the committed notebooks' outputs honest.", no_args_is_help=True)
app.add_typer(notebooks, name="notebooks")

Only = Annotated[
    list[str] | None, typer.Option("--only", help="A notebook, by number or name; repeatable.")
]
Preset = Annotated[str, typer.Option(help="smoke, quick, cifar10[-ten], imagenette or paper.")]
MOST = 1024  # notebooks or threads at once: beyond it, a mistyped number


def _is_here(device: str | None) -> str | None:
    """Refuse a device that is not here, at once and not in every notebook."""
    from companion.data_needs import check_device

    return check_device(device)


def _is_folder(path: str | None) -> str | None:
    if path is not None and not (path.strip() and Path(path).is_dir()):
        raise RequestError(f"--data-root: expected a folder, got {path!r}")
    return path


Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu or cuda.", callback=_is_here)
]
DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="Folder of the data sets.", callback=_is_folder)
]


def register(target: typer.Typer) -> None:
    """Add the companion's commands: the entry point of the group `dsvlib.commands`."""
    target.registered_commands += app.registered_commands
    target.registered_groups += app.registered_groups


def register_report(target: typer.Typer) -> None:
    """Add the one command that needs no checkout: an entry point for a wheel."""
    target.command()(report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with the companion's commands, installed or not, and exit."""
    cli.main(arguments, register)


@app.command()
def reproduce(
    preset: Preset = "quick",
    only: Only = None,
    jobs: Annotated[int, typer.Option(help="Notebooks to run side by side.")] = 1,
    device: Device = None,
    data_root: DataRoot = None,
    force: Annotated[bool, typer.Option("--force", help="Run also what is up to date.")] = False,
    part: Annotated[
        str | None, typer.Option("--slice", help="A piece of the work: 1/6 is one of six.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, how long and on which data.")
    ] = False,
) -> None:
    """Run the notebooks of a preset, or of a slice of it, and rebuild its figures."""
    from companion.forecast import preview
    from companion.presets import plan
    from companion.workflow import reproduce as run

    if not 1 <= jobs <= MOST:
        raise RequestError(f"--jobs: expected a whole number from 1 to {MOST}, got {jobs}")
    if dry_run:
        for line in preview(plan(preset, only=only or (), data_root=data_root), part, data_root):
            typer.echo(line)
        return
    asked = {"device": device, "data_root": data_root}
    done = run(preset, only=only or (), jobs=jobs, **asked, force=force, part=part, echo=typer.echo)
    if not done:
        raise DsvError("at least one notebook failed; the reasons are above")


@app.command()
def report(
    classifier: Annotated[
        str, typer.Option(help="A file, a shipped one's name, torchvision:NAME or MODULE:CALLABLE.")
    ],
    data: Annotated[
        str,
        typer.Option(help="A data set's name, or a folder with train/<class>/*, test/<class>/*."),
    ],
    out: Annotated[Path, typer.Option(help="The page: FILE.html, replaced if it is there.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the data sets, and of classifiers.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Training images that λ is fitted to.")] = 2000,
    classes: Annotated[
        str | None, typer.Option(help="Classes to show, by name or number: cat,5; default: all.")
    ] = None,
    per_class: Annotated[int, typer.Option(help="Support vectors to make of every class.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    device: Device = "auto",
    weights: Annotated[Path | None, typer.Option(help="A local state dict, for your own.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Your own's, per channel: 0.49,0.48,0.45")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Your own's, per channel: 0.20,0.20,0.20")] = None,
) -> None:
    """Show in one HTML page what holds a classifier's decisions, and what to doubt.

    What is finished is kept in FILE.html.parts, so that the same call goes on after a kill.
    """
    from companion.report import make  # without the extra this says so, before anything else

    opening = {"mean": cli.numbers("--mean", mean, float), "std": cli.numbers("--std", std, float)}
    parts = _parts_beside(out)
    try:
        made = make(
            classifier,
            data,
            root=root,
            limit=limit,
            classes=None if classes is None else classes.split(","),
            per_class=per_class,
            seed=seed,
            device=device,
            parts=parts,
            echo=typer.echo,
            weights=weights,
            **opening,
        )
        made.write(out)
        shutil.rmtree(parts)
    except KeyboardInterrupt:
        typer.echo(f"what is finished is kept in {parts}; the same call goes on from there")
        raise
    finally:
        with suppress(OSError):  # it stays where something is in it
            parts.rmdir()
    typer.echo(f"{out}, {out.stat().st_size / 1e6:.1f} MB. {made.verdict[0]}")


def _parts_beside(out: Path) -> Path:
    """Return the folder of what a report has finished, made; refuse what cannot be written."""
    with explain("write", out):
        if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
            raise RequestError(f"--out: expected a file that ends in .html, got {str(out)!r}")
        if not out.parent.is_dir():
            raise RequestError(
                f"--out: expected a file in a folder that is there, got {str(out)!r}; make the "
                f"folder first"
            )
        cli.probe(out.parent)
        parts = out.with_name(f"{out.name}.parts")
        parts.mkdir(exist_ok=True)
    return parts


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
    device: Device = None,
    data_root: DataRoot = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: all cores.")] = None,
) -> None:
    """Run one notebook whether it is up to date or not: what a rule of the Snakefile calls."""
    if threads is not None and not 1 <= threads <= MOST:
        raise RequestError(f"--threads: expected a whole number from 1 to {MOST}, got {threads}")
    from companion.data_needs import check_machine
    from companion.presets import plan
    from companion.workflow import run_job

    jobs = plan(preset, only=[name], device=device, data_root=data_root)
    known = {job.repetition: job for job in jobs}
    if seed not in known:
        seeds = ", ".join(str(s) for s in known if s is not None) or "no seed"
        raise RequestError(
            f"--seed: preset {preset!r} repeats {jobs[0].notebook} at {seeds}, got {seed}; add it "
            "to the preset's 'repeat' in notebooks/presets.yml"
        )
    job = known[seed]
    check_machine([job])
    flags = [f"--device {device}" if device else "", "--data-root PATH" if data_root else ""]
    run_id = os.environ.get("DSV_RUN_ID")  # of the run that holds this checkout, if there is one
    if run_job(job, threads=threads, flags=" ".join(filter(None, flags)), run_id=run_id):
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
    own: Annotated[
        bool, typer.Option("--own", help="Of the runs made here, not recorded.")
    ] = False,
) -> None:
    """Say which claims of the papers hold, from the records; nothing is written."""
    from companion.ledger.claims import claim_rows
    from companion.runs import own_root

    rows = claim_rows(scale, own_root() if own else None)
    colours = {"reproduced": "green", "partly": "yellow"}
    for row in rows:
        word = typer.style(f"{row.verdict:14}", fg=colours.get(row.verdict, "red"), bold=True)
        typer.echo(f"{row.id:9} {word} {row.measured}")
        typer.echo(f"{'':9} {row.statement} Paper: {row.paper}.")
        typer.echo(f"{'':9} {row.notebook or '–'} · {row.scale} · {row.reason}")
    counts = Counter(row.verdict.value for row in rows)
    typer.echo(", ".join(f"{count} {word}" for word, count in counts.items()))


@app.command()
def record(
    preset: Preset = "quick",
    only: Only = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Make this checkout's own runs the recorded ones (maintainers, from a clean commit)."""
    from companion.recording import record as run

    run(preset, only=only or (), device=device, data_root=data_root, echo=typer.echo)


@app.command()
def cell(
    method: Annotated[str, typer.Argument(help="DSV, DC, DSA, DM, 'class mean', 'same real', …")],
    per_class: Annotated[int, typer.Argument(help="Images per class.")],
    shot: Annotated[int, typer.Argument(help="Real images seen per class.")],
    preset: Preset = "quick",
    seeds: Annotated[str | None, typer.Option(help="E.g. 0,1; default: the recorded ones.")] = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Run one cell of Table 2 again and hold it against the recorded number."""
    from companion.ledger.table2 import recorded_cell, rerun

    chosen = cli.numbers("--seeds", seeds, int)
    if chosen and not all(0 <= seed < 2**31 for seed in chosen):
        raise RequestError(f"--seeds: expected whole numbers from 0 to 2147483647, got {seeds}")
    recorded = recorded_cell(method, per_class, shot, preset=preset)
    found = rerun(recorded, data_root=data_root, device=device or "auto", seeds=chosen)
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
    device: Annotated[
        str, typer.Option(help="Where to train: cpu, cuda.", callback=_is_here)
    ] = "cpu",
) -> None:
    """Train a shipped classifier anew, into its file in data/checkpoints.

    With --all, those that are there by their present recipe are left, so that the same call goes on
    after it was cut off.
    """
    if device == "auto":
        raise RequestError("--device: expected cpu or cuda to train on, got 'auto'; name one")
    if (name is None) != every:
        raise RequestError("expected the NAME of a shipped classifier or --all, one of the two")
    if root is not None and not root.is_dir():
        raise RequestError(f"--root: expected a folder, got {str(root)!r}")
    from companion.recipes import RECIPES, is_shipped, train_shipped
    from dsvlib._files import checkpoints_folder, repository_root

    folder = os.path.relpath(checkpoints_folder(), repository_root())
    if name is not None and name not in RECIPES:
        raise RequestError.unknown("classifier", name, RECIPES)
    for recipe in RECIPES if name is None else (name,):
        if every and root is None and RECIPES[recipe].dataset != "digits":
            print(f"{recipe:24} left as it is: its images are not bundled, say where with --root")
            continue
        if every and is_shipped(recipe):
            print(f"{recipe:24} is here by its present recipe; name it to train it anew")
            continue
        started = time.perf_counter()
        made = train_shipped(recipe, root=None if root is None else str(root), device=device)
        print(
            f"{recipe:24} train {made['train_accuracy']:.4f} · test {made['test_accuracy']:.4f} · "
            f"stationarity {made['stationarity']:.3g} · cosine {made['cosine']:.4f} · "
            f"{folder}/{recipe}.safetensors · {time.perf_counter() - started:.1f} s"
        )


@app.command()
def doctor(
    preset: Preset = "quick",
    data_root: DataRoot = None,
) -> None:
    """Say what this machine has, what a preset still lacks, and what it will cost."""
    import platform

    import psutil  # type: ignore[import-untyped]
    import torch

    from companion.data_needs import data_needed
    from companion.forecast import expected, total
    from companion.presets import plan
    from companion.runs import repository_root
    from companion.workflow import up_to_date
    from dsvlib._files import checkpoints_folder

    todo = plan(preset, data_root=data_root)
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
    found = data_needed(todo, Path(data_root) if data_root else None)
    lines |= {f"data {k}": v for k, v in found.items()}
    for name, value in lines.items():
        print(f"{name:12} {value}")
    if free < gib:
        print(f"{'':12} less than 1 GiB free: runs may fail; make clean frees what they left")
    print(f"\nforecast for dsv reproduce --preset {preset} (recorded runs, other machines differ):")
    due = [job for job in todo if not up_to_date(job)]
    for job in todo:
        print(f"{job.name:32} {expected(job) if job in due else 'up to date'}")
    print(f"{'together, one after another':32} {total(map(expected, due))}")
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


if __name__ == "__main__":
    main()
