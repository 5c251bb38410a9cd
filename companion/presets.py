"""Presets: which notebooks run with which parameters, all checked before any kernel starts.

A notebook's own defaults (its cell tagged `parameters`) ← ``notebooks/presets.yml`` ← the command
line. `plan` lays them over one another and returns one `Job` per notebook.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from companion.runs import code_cells, figures_root, repository_root
from dsvlib._errors import DsvError, RequestError

COMMON = {"preset": ("str", "quick"), "seed": ("int", 0), "device": ("str", "auto")}
COMMON["data_root"] = ("str", "")
PRESET_KEYS = {"description", "timeout_s", "expected_s", "omit", "repeat", "notebooks"}
REPETITIONS = "seeds"  # folder of figures/ with one root of figures for each further seed


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: annotation and literal default."""

    annotation: ast.expr
    default: Any


@dataclass(frozen=True)
class Job:
    """One notebook with everything that decides its result.

    `repetition` is the seed of a run that repeats the notebook, None for the run whose figures the
    preset shows.
    """

    notebook: str
    preset: str
    parameters: dict[str, Any]
    timeout_s: float
    expected_s: float | None
    repetition: int | None = None

    @property
    def name(self) -> str:
        """What the job is called: its notebook, and the seed where it repeats one."""
        return self.notebook + ("" if self.repetition is None else f".seed-{self.repetition}")

    @property
    def figures(self) -> Path:
        """The root of figures below which the notebook publishes; repetitions have their own."""
        if self.repetition is None:
            return figures_root()
        return figures_root() / REPETITIONS / str(self.repetition)

    @property
    def directory(self) -> Path:
        """Where the notebook publishes."""
        return self.figures / self.preset / self.notebook

    def build(self, suffix: str) -> Path:
        """Return a by-product of the run, such as its log."""
        return repository_root() / "build" / self.preset / f"{self.name}{suffix}"


def notebook_names() -> list[str]:
    """Return the names of all notebooks, ``NN_*``, in order."""
    folder = repository_root() / "notebooks"
    return sorted(path.stem for path in folder.glob("[0-9][0-9]_*.ipynb"))


def find_notebook(name: str) -> str:
    """Return the notebook called `name`, by its number or in full."""
    names = notebook_names()
    wanted = Path(name).name.removesuffix(".ipynb")
    number = wanted.zfill(2) + "_" if wanted.isdigit() else None
    found = [n for n in names if n == wanted or (number and n.startswith(number))]
    if not found:
        raise RequestError.unknown("notebook", name, names)
    return found[0]


def read_parameters(notebook: str) -> dict[str, Parameter]:
    """Return the parameters that a notebook takes.

    Raises DsvError unless one cell is tagged `parameters`, holds nothing but annotated literals
    that fit their annotation, and has the parameters common to all.
    """
    path = repository_root() / "notebooks" / f"{notebook}.ipynb"
    code_cells(path)  # one clear error for a file that is no notebook
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise DsvError(f"{notebook}: expected one cell tagged 'parameters', got {len(tagged)}")
    found = {}
    try:
        for line in ast.parse("".join(tagged[0]["source"])).body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                raise ValueError(f"line {line.lineno} is something else")
            default = ast.literal_eval(line.value) if line.value else None
            coerce(default, line.annotation)
            found[line.target.id] = Parameter(line.annotation, default)
    except (SyntaxError, ValueError) as error:
        raise DsvError(
            f"{notebook}: the parameters cell takes only lines like 'steps: int = 600'; {error}"
        ) from error
    for name, (annotation, default) in COMMON.items():
        have = found.get(name)
        if have is None or ast.unparse(have.annotation) != annotation or have.default != default:
            wanted = f"{name}: {annotation} = {json.dumps(default)}"
            raise DsvError(f"{notebook}: the parameters cell needs the line '{wanted}'")
    return found


def coerce(value: Any, annotation: ast.expr) -> Any:
    """Return `value` as the annotation wants it (an int becomes a float where one is expected).

    Raises ValueError if it does not fit: a bool is no number, text is never converted.
    """
    match annotation:
        case ast.Constant(value=None) if value is None:
            return None
        case ast.Constant(value=str(quoted)):
            return coerce(value, ast.parse(quoted, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            for option in (left, right):
                with suppress(ValueError):
                    return coerce(value, option)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner) if isinstance(value, list):
            return [coerce(item, inner) for item in value]
        case ast.Name(id="float") if isinstance(value, int | float) and value is not True:
            if value is not False:
                return float(value)
        case ast.Name(id="int" | "bool" | "str" | "list" as name):
            if type(value).__name__ == name:
                return value
    raise ValueError(f"expected {ast.unparse(annotation)}, got {value!r}{_yaml_trap(value)}")


def _yaml_trap(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return f", which YAML reads as text; write {float(value):.1e} with a point and a sign"
    if isinstance(value, bool):
        return ", which YAML makes of yes, no, on and off; put quotes around text"
    return ""


def read_presets() -> dict[str, dict[str, Any]]:
    """Return all presets, every key and notebook name in them checked.

    Raises RequestError for a key or notebook that does not exist, DsvError for a broken file.
    """
    path = repository_root() / "notebooks" / "presets.yml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DsvError(f"presets.yml: expected a readable YAML file, got {reason}") from error
    presets = _mapping(content, "presets.yml")
    for key in presets:
        if key != "presets":
            raise RequestError.unknown("key of presets.yml", str(key), ["presets"])
    presets = _mapping(presets.get("presets"), "presets.yml: presets")
    return {str(name): _check_preset(str(name), preset) for name, preset in presets.items()}


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise DsvError(f"{where}: expected 'name: value' lines, got {value!r}")
    return value


def _check_preset(name: str, preset: Any) -> dict[str, Any]:
    where = f"presets.yml: {name}"
    checked: dict[str, Any] = {"description": "", "timeout_s": 900, **_mapping(preset, where)}
    for key in checked:
        if key not in PRESET_KEYS:
            raise RequestError.unknown(f"key of {where}", str(key), PRESET_KEYS)
    limit = checked["timeout_s"]
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
        raise DsvError(f"{where}: timeout_s: expected seconds > 0, got {limit!r}")
    names = notebook_names()
    for key in ("expected_s", "omit", "repeat", "notebooks"):
        checked[key] = _mapping(checked.get(key) or {}, f"{where}: {key}")
        for notebook in checked[key]:
            if notebook not in names:
                raise RequestError.unknown(f"notebook in {where}: {key}:", str(notebook), names)
    for notebook, seeds in checked["repeat"].items():
        whole = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
        if not whole or len(set(seeds)) < len(seeds):
            wanted = "expected a list of different seeds ≥ 0"
            raise DsvError(f"{where}: repeat: {notebook}: {wanted}, got {seeds!r}")
    return checked


def plan(
    preset: str = "quick",
    *,
    only: Sequence[str] = (),
    device: str | None = None,
    data_root: str | None = None,
) -> list[Job]:
    """Return the notebooks to run with their complete parameters; no kernel starts.

    A notebook that the preset repeats is followed by one job for each further seed.

    Raises RequestError for anything asked for that does not exist or does not fit.
    """
    presets = read_presets()
    if preset not in presets:
        raise RequestError.unknown("preset", preset, presets)
    chosen, omitted = presets[preset], presets[preset]["omit"]
    names = list(dict.fromkeys(find_notebook(name) for name in only)) or notebook_names()
    if data_root is not None and not Path(data_root).is_dir():
        raise RequestError(f"--data-root: expected a folder, got {data_root!r}")
    common: dict[str, Any] = {"preset": preset}
    if device is not None:
        common["device"] = device
    if data_root is not None:
        common["data_root"] = str(Path(data_root).resolve())  # a kernel has its own folder
    jobs = []
    for name in names:
        if name in omitted and only:
            raise RequestError(f"{name} is not part of preset {preset!r}: {omitted[name]}")
        if name not in omitted:
            given = _mapping(chosen["notebooks"].get(name) or {}, f"presets.yml: {preset}: {name}")
            full = resolve(name, given, f"presets.yml: {preset}: {name}") | common
            job = Job(name, preset, full, chosen["timeout_s"], chosen["expected_s"].get(name))
            again = [seed for seed in chosen["repeat"].get(name, ()) if seed != full["seed"]]
            jobs += [job] + [
                replace(job, parameters=full | {"seed": seed}, repetition=seed) for seed in again
            ]
    if not jobs:
        raise RequestError(
            f"preset {preset!r} has no notebooks here; expected notebooks/NN_*.ipynb"
        )
    return jobs


def resolve(notebook: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a notebook's defaults overlaid with `given`, each name and type checked."""
    known = read_parameters(notebook)
    full = {name: coerce(p.default, p.annotation) for name, p in known.items()}
    for name, value in given.items():
        if name not in known:
            raise RequestError.unknown(f"parameter in {where}:", str(name), known)
        try:
            full[name] = coerce(value, known[name].annotation)
        except ValueError as error:
            raise RequestError(f"{where}: {name}: {error}") from error
    return full
