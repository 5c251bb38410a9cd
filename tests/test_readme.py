"""What README and docs tell users to type works as it stands, and what they say is recorded."""

from __future__ import annotations

import functools
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import dsvlib
from companion.ledger.claims import claim_rows
from companion.ledger.prose import plain, recorded

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "data/README.md", "notebooks/README.md")
PAGES += tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def run_blocks(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text(page), re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "figures").symlink_to(ROOT / "figures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code as it stands, on fewer images and with fewer steps: it runs, its numbers wait."""
    load, digits = dsvlib.load_dataset, dsvlib.SynthesisConfig.digits
    field = dsvlib.EvaluationConfig.field_protocol
    monkeypatch.setattr(dsvlib, "load_dataset", functools.partial(load, limit=200))
    monkeypatch.setattr(dsvlib.SynthesisConfig, "digits", functools.partial(digits, steps=20))
    short = functools.partial(field, epochs=60)
    monkeypatch.setattr(dsvlib.EvaluationConfig, "field_protocol", short)


@pytest.mark.usefixtures("small")
def test_the_readme_s_code_runs(folder: Path) -> None:
    names = run_blocks("README.md")
    assert names["solution"].status.successful
    saved = dsvlib.SupportSet.load(folder / "dsvs.safetensors")
    assert saved.labels.tolist() == list(range(10))
    assert names["found"].samples.multipliers.min() >= 0


@pytest.mark.usefixtures("small")
def test_one_s_own_classifier_as_documented(folder: Path) -> None:
    digits = dsvlib.load_dataset("digits")
    few = dsvlib.random_subset(digits, 10)  # stands for what notebook 05 makes
    few.save(folder / "build/runs/quick/05_fewshot_retraining/dsv_10_per_class_10_shot.safetensors")
    names = run_blocks("docs/own-classifier.md")
    assert names["pixels"].shape == (2, 3, 8, 8)
    assert not (folder / "dog-and-cat.state").exists()
    assert dsvlib.accuracy(names["fresh"], digits.test) > 0.5  # chance 0.1
    assert names["made"].synthesised.labels.tolist() == [3, 8]


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 160
    assert len(text("README.md").encode()) <= 14_000


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text(page)):
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, target


def test_every_notebook_has_ten_questions_with_ten_answers() -> None:
    sections = re.split(r"^## ", text("docs/questions.md"), flags=re.MULTILINE)[1:]
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for path, section in zip(notebooks, map(plain, sections), strict=True):
        title = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"][0]
        assert section.startswith(f"{title.removeprefix('# ').strip()}\n"), path.name
        assert f"](../notebooks/{path.name})" in section
        prose = r"((?:[^<]|< )+)"  # no tag in it
        answer = rf"\s+<details><summary>Answer</summary>\n\n {prose}\n\n\s+</details>"
        found = re.findall(rf"^(\d+)\. {prose}{answer}", section, re.MULTILINE)
        assert [int(number) for number, *_ in found] == list(range(1, 11)), path.name
        assert all("?" in question and reply.strip() for _, question, reply in found), path.name
        assert section.count("<summary>") == section.count("</details>") == 10


def test_the_notes_for_instructors_are_short() -> None:
    assert len(text("docs/teaching.md").splitlines()) <= 120


def test_the_readme_counts_the_claims() -> None:
    groups = yaml.safe_load(text("companion/ledger/claims.yml"))
    words = {18: "eighteen", 26: "Twenty-six"}  # another count needs another word there
    total, papers = sum(map(len, groups.values())), len(groups["papers"])
    assert f"{words[total]} claims, {words[papers]} of them the papers'" in text("README.md")


TABLE = re.compile(
    r"^\| .*\(((?:DSV|PDD|EXT)-\w+)\) \| (.+?) \| (.+?) \| (.+?) \| (.+?), \[(\d\d)\]\(.*\) \|$",
    re.MULTILINE,
)
PRESETS = {"digits": "quick", "CIFAR-10": "cifar10"}


def test_rows_of_the_readme_are_recorded() -> None:
    """Each number in the column `ours` names the recorded value of its claim that it is."""
    rows = TABLE.findall(text("README.md"))
    assert len(rows) == 8
    for claim, ours, paper, verdict, data, notebook in rows:
        preset = PRESETS[data]
        (known,) = (row for row in claim_rows(preset) if row.id == claim)
        assert (verdict, notebook) == (known.verdict.value, known.notebook[:2]), claim
        sources = re.findall(r"\d<!-- (\S+) (\S+) ", ours)  # test_prose holds the values
        numbers = re.findall(r"(?<![\w.-])\d+(?:\.\d+)?", plain(ours))
        assert sources == [(preset, claim)] * len(numbers), claim
        values = [row for (_, named, _), row in recorded().items() if named == claim]
        papers = known.paper + " ".join(row["paper_value"] for row in values)
        for number in re.findall(r"\d+\.\d+", paper):
            assert number in papers, (claim, number)


def test_only_what_is_recorded_is_spoken_of_as_recorded() -> None:
    """Pages of figures and ledgers that documents link to are of presets with results."""
    recorded = {path.stem for path in (ROOT / "data" / "results").glob("*.csv")}
    for folder in ("figures", "figures/claims"):
        found = {path.stem for path in (ROOT / folder).iterdir()} - {"claims", "seeds"}
        assert found == recorded, folder
    for page in PAGES:
        linked = re.findall(r"figures/(?:claims/)?([\w-]+)[./]", text(page))
        assert set(linked) - {"claims"} <= recorded, page


def rows_of_the_map() -> list[list[str]]:
    lines = [line for line in text("CONTRIBUTING.md").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_map_of_equations_leads_to_functions() -> None:
    assert len(rows_of_the_map()) > 25
    for where, _, function, notebook in rows_of_the_map():
        assert re.fullmatch(r"\[(\d\d)\]\(notebooks/\1_\w+\.ipynb\)", notebook), where
        pairs = re.findall(r"`((?:dsvlib|companion)/[\w/]+)\.py` `(\w+)`", function)
        assert pairs or function == "in the notebook", where
        for module, name in pairs:
            assert hasattr(importlib.import_module(module.replace("/", ".")), name), (module, name)


def test_every_claim_has_its_row_in_the_map_and_its_notebook() -> None:
    content = yaml.safe_load(text("companion/ledger/claims.yml"))
    claims = {key: value for part in content.values() for key, value in part.items()}
    listed = {}
    for where, _, _, notebook in rows_of_the_map():
        for claim in re.findall(r"\(([A-Z]+-\w+)\)", where):
            listed[claim] = notebook[1:3]
    assert listed == {claim: about["notebook"][:2] for claim, about in claims.items()}


def test_commands_of_the_documents_exist() -> None:
    commands = "\n".join(text(page) for page in PAGES)
    targets = set(re.findall(r"\bmake ([a-z-]+)(?= |`|$)", commands, re.MULTILINE))
    rules = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    assert targets - rules <= {"sure"}


def test_the_public_names_in_documents_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"dsvlib\.([A-Za-z_]+)", text(page)):
            assert (
                hasattr(dsvlib, name)
                or (ROOT / "dsvlib" / f"{name}.py").exists()
                or (ROOT / "dsvlib" / name).is_dir()
            ), (page, name)
