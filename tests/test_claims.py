"""The ledger: numbers and verdicts come from whole records, and nothing is left out."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from checkout import (
    END,
    small_blind_test,
    whole_run,
    write_notebook,
    write_presets,
)

from companion import cli
from companion.ledger.claims import CLAIMS, Verdict, claim_rows, markdown, verdicts, write_claims
from companion.runs import RecordError, Run, figures_root, own_root
from dsvlib._errors import DsvError, RequestError

PAPER_IDS = [
    "DSV-F1",
    "DSV-T1",
    "DSV-F2a",
    "DSV-F2b",
    "DSV-F3",
    "DSV-T2a",
    "DSV-T2b",
    "DSV-F4",
    "DSV-F5",
    "DSV-F5p",
    "DSV-F6",
    "DSV-F6e",
    "DSV-F7",
    "DSV-F10",
    "DSV-C1",
    "PDD-T1",
    "PDD-F2",
    "PDD-F3",
]


RULES = """
papers:
  DSV-F6:
    where: DSV, Fig. 6
    statement: Soft labels give images between the classes.
    notebook: 08_latent_labels
    headline: {rank: rank correlation}
    necessary: {rank ≥ 0.9: the judge follows}
    further: {lead > 0: smoother than independent starts}
  DSV-F1:
    notebook: 14_photographs
    necessary: {judge ≥ 95: a judge reads ≥ 95 %}
    blind_test: true
ours: {}
"""


pytestmark = pytest.mark.usefixtures("checkout")


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "claims.yml").write_text(RULES, encoding="utf-8")
    monkeypatch.setattr("companion.ledger.claims.CLAIMS", tmp_path / "claims.yml")


def publish(
    rank: float = 0.93,
    lead: tuple[float, float] | None = (0.1, 0.3),
    preset: str = "quick",
    root: Path | None = None,
    notebook: str = "08_latent_labels",
) -> Path:
    """Publish a run that recorded what the rules above are about, and a claim that has none."""
    with whole_run((root or figures_root()) / preset / notebook):
        run = Run.start(notebook, preset=preset, seed=0)
    run.record("DSV-F6", "rank", rank, std=0.02, seeds=range(3))
    run.record("DSV-F6", "lead", 0.2, interval=lead)
    run.record("EXT-new", "anything", 4.0)
    verdicts(run)
    run.complete()
    return run.directory


def row(claim: str, preset: str = "quick", root: Path | None = None):
    return next(row for row in claim_rows(preset, root) if row.id == claim)


def test_claim_without_a_run_is_told_and_never_missing() -> None:
    rows = claim_rows()
    assert [r.id for r in rows if r.group == "papers"] == PAPER_IDS
    assert {r.verdict for r in rows} == {Verdict.NOT_ATTEMPTED}
    assert all(r.reason and r.where and r.statement and r.tolerance and r.paper for r in rows)
    assert all(r.necessary and all((r.necessary | r.further).values()) for r in rows)
    assert markdown(rows).count("⚫ **not attempted**") == len(rows)


def test_no_verdict_is_typed_into_the_data_file() -> None:
    content = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    entries = [entry for group in content.values() for entry in group.values()]
    known = {"where", "statement", "paper", "notebook", "headline", "necessary", "further"}
    assert all(set(entry) <= known | {"blind_test"} for entry in entries)


@pytest.mark.parametrize(
    ("rank", "lead", "verdict", "reason"),
    [
        (0.93, (0.1, 0.3), Verdict.REPRODUCED, "rank 0.93, ≥ 0.9 shown; lead 0.2 [0.1, 0.3], > 0"),
        (0.93, (-0.1, 0.5), Verdict.PARTLY, "lead 0.2 [-0.1, 0.5], > 0 undecided"),
        (0.93, None, Verdict.PARTLY, "lead 0.2, > 0 undecided"),
        (0.80, (0.1, 0.3), Verdict.NOT_REPRODUCED, "rank 0.8, ≥ 0.9 not shown"),
    ],
)
def test_verdict_and_reason_follow_from_values_and_rules(
    rules: None, rank: float, lead: tuple[float, float] | None, verdict: Verdict, reason: str
) -> None:
    folder = publish(rank, lead)
    got = row("DSV-F6")
    assert got.verdict is verdict
    assert reason in got.reason
    assert got.measured == f"rank correlation: {rank:.3f} ± 0.020 (n = 3)"
    table = pd.read_csv(folder / "verdicts.csv")  # what the notebook shows is the same
    assert set(table["verdict"]) == {verdict.value}
    assert table["part"].tolist() == ["necessary", "further"]
    assert table["criterion"].tolist() == ["the judge follows", "smoother than independent starts"]
    (folder / "record.json").write_text((folder / "record.json").read_text().replace("0.2", "0.3"))
    with pytest.raises(RecordError, match="changed after the run"):
        claim_rows()


def test_smoke_is_no_result(rules: None, checkout: Path) -> None:
    write_presets(checkout, smoke={})
    folder = publish(preset="smoke")
    smoke = row("DSV-F6", "smoke")
    assert smoke.verdict is Verdict.NOT_ATTEMPTED
    assert "everything runs" in smoke.reason
    assert set(pd.read_csv(folder / "verdicts.csv")["verdict"]) == {"not attempted"}


def test_seeds_that_disagree_are_partly(rules: None) -> None:
    folder = publish(0.95)
    for seed, rank in ((1, 0.93), (2, 0.5)):
        with whole_run(figures_root() / "seeds" / str(seed) / "quick" / "08_latent_labels"):
            run = Run.start("08_latent_labels", preset="quick", seed=seed)
        run.record("DSV-F6", "rank", rank)
        run.record("DSV-F6", "lead", 0.2, interval=(0.1, 0.3))
        run.record("EXT-new", "anything", 4.0)
        run.complete()
        got = row("DSV-F6")
        agreed = seed == 1
        assert got.verdict is (Verdict.REPRODUCED if agreed else Verdict.PARTLY)
        said = (
            "the same verdict at seed 1" if agreed else "seed 1 reproduced, seed 2 not reproduced"
        )
        assert said in got.reason
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("word", "own", "other", "verdict", "reason"),
    [
        ("reproduced", 0, None, Verdict.REPRODUCED, "its blind test is on the site"),
        ("reproduced", None, None, Verdict.PARTLY, "without a blind test"),
        ("reproduced", None, 0, Verdict.PARTLY, "without a blind test"),
        ("reproduced", 1, 0, Verdict.PARTLY, "blind test is another, of cifar10/13_other"),
        ("reproduced", 0, 0, Verdict.REPRODUCED, "its blind test is on the site"),
        ("not reproduced", None, None, Verdict.NOT_REPRODUCED, "judge 94 %, ≥ 95 not shown"),
    ],
)
def test_pictures_count_as_read_only_where_people_can_be_asked(
    rules: None,
    checkout: Path,
    word: str,
    own: int | None,
    other: int | None,
    verdict: Verdict,
    reason: str,
) -> None:
    write_presets(checkout, cifar10={})
    for notebook, seed in {"14_photographs": own, "13_other": other}.items():
        with whole_run(figures_root() / "cifar10" / notebook):
            run = Run.start(notebook, preset="cifar10", seed=0)
        read = 96.0 if word == "reproduced" else 94.0
        run.record("DSV-F1", "judge", read, std=1.0, seeds=range(5), unit="%")
        if seed is not None:
            run.save_blind_test(small_blind_test(seed))
        run.complete()
    got = row("DSV-F1", "cifar10")
    assert got.verdict is verdict
    assert reason in got.reason


def test_unlisted_claim_of_a_record_is_shown(rules: None) -> None:
    publish()
    got = row("EXT-new")
    assert (got.group, got.verdict, got.notebook) == (
        "ours", Verdict.NOT_ATTEMPTED, "08_latent_labels",
    )  # fmt: skip
    assert got.reason == "recorded without a rule"


def test_files_of_the_ledger_keep_numbers_as_numbers(rules: None, checkout: Path) -> None:
    write_notebook(checkout, "08_latent_labels", END)
    publish(lead=(-0.1, 0.3))
    csv_path, md_path = write_claims()
    lines = list(csv.DictReader(csv_path.open(encoding="utf-8")))
    (line,) = (x for x in lines if x["claim"] == "DSV-F6")
    assert (float(line["value"]), float(line["std"]), line["seeds"]) == (0.93, 0.02, "0 1 2")
    assert {x["claim"] for x in lines} == {"DSV-F6", "DSV-F1", "EXT-new"}
    text = md_path.read_text(encoding="utf-8")
    assert "🟡 **partly**: rank 0.93" in text
    assert "the judge follows; else partly: smoother than independent starts" in text
    assert "[08](../../notebooks/08_latent_labels.ipynb)" in text
    assert str(checkout) not in text


def test_the_ledger_shows_recorded_runs_own_runs_on_request_and_never_those_by_hand(
    rules: None,
) -> None:
    publish(lead=None)
    publish(root=own_root())
    assert row("DSV-F6").verdict is Verdict.PARTLY
    assert row("DSV-F6", root=own_root()).verdict is Verdict.REPRODUCED
    run = Run.start("08_latent_labels", preset="quick", seed=0)
    run.record("DSV-F6", "rank", 0.1)
    run.complete()
    assert row("DSV-F6").verdict is Verdict.PARTLY
    folder = figures_root() / "quick" / "08_latent_labels"
    shutil.rmtree(folder)
    shutil.copytree(run.directory, folder)  # as someone may try
    with pytest.raises(RecordError, match="run by hand"):
        claim_rows()


def test_bad_requests_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError, match="unknown preset 'quik'; did you mean 'quick'"):
        claim_rows("quik")
    folder = publish(notebook="04_coresets")
    (folder / "record.json").write_text("{ half")
    with pytest.raises(SystemExit) as ended:
        cli.main(["claims"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "record.json cannot be read" in line
    assert "run dsv reproduce --preset quick --only 04_coresets" in line
    broken = tmp_path / "claims.yml"
    for text, message in [
        ("papers: [", "expected 'papers' and 'ours'"),
        ("papers: {X: {wher: a}}\nours: {}", "unknown key of claims.yml: X 'wher'"),
        ("papers: {X: {necessary: {gain: a}}}\nours: {}", "rule like 'gain_. > 0'.*got 'gain'"),
    ]:
        broken.write_text(text)
        monkeypatch.setattr("companion.ledger.claims.CLAIMS", broken)
        with pytest.raises(DsvError, match=message):
            claim_rows()


def test_command_prints_every_claim(rules: None, capsys: pytest.CaptureFixture[str]) -> None:
    publish()
    with pytest.raises(SystemExit) as ended:
        cli.main(["claims", "--scale", "quick"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"{claim} " in printed for claim in ("DSV-F6", "DSV-F1"))
    assert "1 reproduced" in printed
    assert not (figures_root() / "claims").exists(), "recording writes, looking does not"
