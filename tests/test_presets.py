"""Everything asked for is checked, name and type, before any kernel starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkout import COMMON, END, write_notebook, write_presets

from companion.presets import plan, read_parameters, resolve
from dsvlib._errors import DsvError, RequestError

pytestmark = pytest.mark.usefixtures("checkout")


def test_plan_overlays_defaults_preset_and_options(tmp_path: Path) -> None:
    (job,) = plan("smoke", only=["1"], device="cpu", data_root=str(tmp_path))
    assert job.parameters == {
        "preset": "smoke",
        "seed": 0,
        "device": "cpu",
        "data_root": str(tmp_path),
        "steps": 2,
        "rate": 0.1,
        "names": [],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 2}, r"unknown parameter .*smoke: 01_line 'stepz'; did you mean 'steps'"),
        ({"steps": "2"}, r"smoke: 01_line: steps: expected a valid integer, got '2'"),
        ({"steps": True}, "expected a valid integer, got True"),
        ({"steps": 2.0}, "expected a valid integer, got 2.0"),
        (
            {"rate": "1e-3"},
            r"expected a valid number, got '1e-3', which YAML reads as text; write 1.0e-03",
        ),
        ({"device": False}, "expected a valid string, got False, which YAML makes of yes, no"),
        ({"names": [1]}, "names: 0: expected a valid string, got 1"),
    ],
)
def test_mistyped_parameter_is_refused(checkout: Path, given: dict[str, Any], message: str) -> None:
    write_presets(checkout, smoke={"notebooks": {"01_line": given}})
    with pytest.raises(RequestError, match=message):
        plan("smoke")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quik"}, "unknown preset 'quik'; did you mean 'quick'"),
        ({"only": ["07"]}, "unknown notebook '07'; expected one of: 01_line"),
        ({"only": ["01_lime"]}, "did you mean '01_line'"),
        ({"data_root": "no/such/folder"}, "--data-root"),
    ],
)
def test_unknown_request_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        ({"smoke": {"timeout": 3}}, "unknown key of presets.yml: smoke 'timeout'.*'timeout_s'"),
        ({"smoke": {"timeout_s": "3"}}, "smoke: timeout_s: expected a valid number, got '3'"),
        ({"smoke": {"notebooks": {"02_no": {}}}}, "unknown notebook in presets.yml: smoke"),
        ({"smoke": {"notebooks": ["01_line"]}}, "expected 'name: value' lines"),
        ({"smoke": 3}, "expected 'name: value' lines"),
    ],
)
def test_bad_presets_file_is_refused(checkout: Path, presets: Any, message: str) -> None:
    write_presets(checkout, **presets)
    with pytest.raises(DsvError, match=message):
        plan("quick")


def test_unreadable_presets_file_is_one_sentence(checkout: Path) -> None:
    path = checkout / "notebooks" / "presets.yml"
    path.write_text("presets: [")
    with pytest.raises(DsvError, match="readable YAML"):
        plan()
    path.write_text("preset: {}")
    with pytest.raises(DsvError, match="did you mean 'presets'"):
        plan()


def test_omitted_notebook_is_left_out_with_its_reason(checkout: Path) -> None:
    write_notebook(checkout, "02_more", END)
    write_presets(checkout, smoke={"omit": {"02_more": "it needs a GPU"}})
    assert [job.notebook for job in plan("smoke")] == ["01_line"]
    with pytest.raises(RequestError, match="it needs a GPU"):
        plan("smoke", only=["2"])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (COMMON.replace("seed: int = 0\n", ""), "needs the line 'seed: int = 0'"),
        (COMMON + "steps = 3", "something else"),
        (COMMON + "steps: int = '3'", "steps: expected a valid integer, got '3'"),
        (COMMON + "steps: integer = 3", "lines like 'steps: int = 600'"),
        (COMMON + "steps: int = len([])", "malformed"),
    ],
)
def test_parameters_cell_holds_annotated_literals(checkout: Path, cell: str, message: str) -> None:
    write_notebook(checkout, "01_line", parameters=cell)
    with pytest.raises(DsvError, match=message):
        read_parameters("01_line")


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("float", 1, 1.0),
        ("int | None", None, None),
        ("'float | None'", 2, 2.0),
        ("list[float]", [1, 2.5], [1.0, 2.5]),
        ("bool", True, True),
    ],
)
def test_values_become_what_their_annotation_says(
    checkout: Path, annotation: str, value: object, expected: object
) -> None:
    write_notebook(checkout, "01_line", parameters=f"{COMMON}rate: {annotation} = {value!r}")
    for given in ({}, {"rate": value}):
        result = resolve("01_line", given, "here")["rate"]
        assert result == expected
        assert type(result) is type(expected)


def test_a_default_of_several_lines_is_read_whole(checkout: Path) -> None:
    write_notebook(
        checkout, "01_line", parameters=f"{COMMON}cells: list[int] = [\n    1,\n    2,\n]"
    )
    assert resolve("01_line", {}, "here")["cells"] == [1, 2]


def test_a_repeated_notebook_is_followed_by_its_other_seeds(checkout: Path) -> None:
    write_presets(checkout, smoke={"repeat": {"01_line": [100, 0, 7]}})
    jobs = plan("smoke")
    assert [job.name for job in jobs] == ["01_line", "01_line.seed-100", "01_line.seed-7"]
    assert [job.parameters["seed"] for job in jobs] == [0, 100, 7], "0 is the preset's own"
    assert jobs[1].directory == checkout / "build/runs/seeds/100/smoke/01_line"
    assert jobs[1].recorded == checkout / "figures/seeds/100/smoke/01_line"
    assert len({job.build(".log") for job in jobs}) == 3


@pytest.mark.parametrize("seeds", [3, [1, 1], ["1"], [-1], [True]])
def test_bad_seeds_of_a_repetition_are_refused(checkout: Path, seeds: Any) -> None:
    write_presets(checkout, smoke={"repeat": {"01_line": seeds}})
    with pytest.raises(DsvError, match="repeat: 01_line: expected a list of different seeds"):
        plan("smoke")
