"""Presets: which notebooks run with which parameters, all checked before any kernel starts.

A notebook's own defaults (its cell tagged `parameters`) ← ``notebooks/presets.yml`` ← the command
line. `plan` lays them over one another and returns one `Job` per notebook.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    ValidationError,
    create_model,
)

from companion.runs import REPETITIONS, figures_root, own_root, repository_root, tagged_cells
from dsvlib._errors import DsvError, RequestError

COMMON = {"preset": "quick", "seed": 0, "device": "auto", "data_root": ""}
MAPPINGS = ("expected_s", "omit", "repeat", "notebooks")  # of a preset, by notebook


def _seeds(value: Any) -> Any:
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or len(set(value)) < len(value):
        raise ValueError("expected a list of different seeds ≥ 0")
    return value


T = TypeVar("T")
_Lines = Annotated[dict[str, T], BeforeValidator(lambda value: value or {})]


class _Preset(BaseModel):
    """One preset of presets.yml; the file's head says what each key means."""

    model_config = ConfigDict(extra="forbid", strict=True)

    description: str = ""
    timeout_s: float = Field(default=3600, gt=0)
    expected_s: _Lines[float] = {}
    omit: _Lines[str] = {}
    repeat: _Lines[Annotated[list[int], BeforeValidator(_seeds)]] = {}
    notebooks: _Lines[_Lines[Any]] = {}


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

    def below(self, root: Path) -> Path:
        """Return the job's folder below a root of figures; repetitions have their own root."""
        if self.repetition is not None:
            root = root / REPETITIONS / str(self.repetition)
        return root / self.preset / self.notebook

    @property
    def directory(self) -> Path:
        """Where a run of one's own publishes."""
        return self.below(own_root())

    @property
    def recorded(self) -> Path:
        """Where the maintainers record it."""
        return self.below(figures_root())

    def build(self, suffix: str) -> Path:
        """Return a by-product of one's own run, such as its log."""
        return self.directory.with_name(self.notebook + suffix)


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


def read_parameters(notebook: str) -> type[BaseModel]:
    """Return the parameters that a notebook takes, as a model that checks names and types.

    They are read by `ast`: papermill's inspection cuts a default that has several lines at its
    first. Raises DsvError unless one cell is tagged `parameters`, holds nothing but annotated
    literals that fit their annotation, and has the parameters common to all.
    """
    path = repository_root() / "notebooks" / f"{notebook}.ipynb"
    tagged = [source for source, tags in tagged_cells(path) if "parameters" in tags]
    if len(tagged) != 1:
        raise DsvError(f"{notebook}: expected one cell tagged 'parameters', got {len(tagged)}")
    fields: dict[str, Any] = {}
    try:
        for line in ast.parse(tagged[0]).body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                raise ValueError(f"line {line.lineno} is something else")
            default = ast.literal_eval(line.value) if line.value else None
            fields[line.target.id] = (ast.unparse(line.annotation).strip("'"), default)
        strict = ConfigDict(
            extra="forbid", strict=True, validate_default=True, protected_namespaces=()
        )
        model: type[BaseModel] = create_model(notebook, __config__=strict, **fields)
        model()
    except ValidationError as error:
        _, reason = _first(error)
        raise DsvError(f"{notebook}: the parameters cell: {reason}") from error
    except (SyntaxError, ValueError, PydanticUserError) as error:
        raise DsvError(
            f"{notebook}: the parameters cell takes only lines like 'steps: int = 600'; {error}"
        ) from error
    for name, default in COMMON.items():
        if fields.get(name) != (type(default).__name__, default):
            wanted = f"{name}: {type(default).__name__} = {json.dumps(default)}"
            raise DsvError(f"{notebook}: the parameters cell needs the line '{wanted}'")
    return model


def _first(error: ValidationError) -> tuple[str, str]:
    """Return the key that the first error is about if nobody knows it, and the error in words."""
    first = error.errors()[0]
    value, path = first["input"], ": ".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return str(first["loc"][-1]), path
    wanted = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if first["type"] in ("dict_type", "model_type"):
        wanted = "expected 'name: value' lines"
    hint = ""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        hint = f", which YAML reads as text; write {float(value):.1e} with a point and a sign"
    elif isinstance(value, bool):
        hint = ", which YAML makes of yes, no, on and off; put quotes around text"
    return "", f"{path}: {wanted}, got {value!r}{hint}".removeprefix(": ")


def checked(model: type[BaseModel], given: Any, where: str, what: str) -> dict[str, Any]:
    """Return `given` over the defaults of `model`; raise RequestError in words."""
    try:
        return model.model_validate(given).model_dump()
    except ValidationError as error:
        key, reason = _first(error)
        if key:
            raise RequestError.unknown(f"{what} {where}", key, model.model_fields) from error
        raise RequestError(f"{where}: {reason}") from error


def read_presets() -> dict[str, dict[str, Any]]:
    """Return all presets, every key and notebook name in them checked.

    Raises RequestError for a key, value or notebook that does not fit, DsvError for a broken file.
    """
    path = repository_root() / "notebooks" / "presets.yml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DsvError(f"presets.yml: expected a readable YAML file, got {reason}") from error
    file = create_model("file", __config__=ConfigDict(extra="forbid"), presets=(_Lines[Any], {}))
    presets: dict[Any, Any] = checked(file, content, "presets.yml", "key of")["presets"]
    return {str(name): _check_preset(f"presets.yml: {name}", p) for name, p in presets.items()}


def _check_preset(where: str, preset: Any) -> dict[str, Any]:
    about = checked(_Preset, preset, where, "key of")
    names = notebook_names()
    for key in MAPPINGS:
        for notebook in about[key]:
            if notebook not in names:
                raise RequestError.unknown(f"notebook in {where}: {key}:", notebook, names)
    return about


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
    check_preset(preset, presets)
    chosen, omitted = presets[preset], presets[preset]["omit"]
    names = list(dict.fromkeys(find_notebook(name) for name in only)) or notebook_names()
    if data_root is not None and not (data_root and Path(data_root).is_dir()):
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
            given = chosen["notebooks"].get(name, {})
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


def check_preset(preset: str, known: Collection[str]) -> None:
    """Raise RequestError for a preset that presets.yml does not have."""
    if preset not in known:
        raise RequestError.unknown("preset", preset, known)


def resolve(notebook: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a notebook's defaults overlaid with `given`, each name and type checked."""
    return checked(read_parameters(notebook), given, where, "parameter in")
