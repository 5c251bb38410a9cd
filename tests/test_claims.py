"""The ledger: numbers and verdicts come from whole records, and nothing is left out."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pandas as pd
import pytest
from checkout import (
    END,
    make_checkout,
    small_blind_test,
    whole_run,
    write_notebook,
    write_presets,
)

from companion import cli
from companion.ledger.claims import CLAIMS, Verdict, claim_rows, markdown, write_claims
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
    "DSV-F6",
    "DSV-F6e",
    "DSV-F7",
    "DSV-F10",
    "DSV-C1",
    "PDD-T1",
    "PDD-F2",
    "PDD-F3",
]


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_checkout(tmp_path, monkeypatch)


def publish(
    notebook: str,
    table: pd.DataFrame,
    caption: str = "",
    preset: str = "quick",
    root: Path | None = None,
) -> Path:
    with whole_run((root or figures_root()) / preset / notebook):
        run = Run.start(notebook, preset=preset, seed=0)
    run.record("DSV-F6", "judge_soft_labels_rank_p_b", 0.93, std=0.02, seeds=range(3))
    run.record("DSV-F2b", "pearson_gradient", 0.5, n=8, paper=0.783)
    run.record("DSV-T1", "gain_gradient_field_1", 2.5, std=1.0, n=5, unit="points", paper=2.57)
    run.record("EXT-new", "anything", 4.0)
    run.save_table(table, "verdicts", caption=caption)
    run.complete()
    return run.directory


def row(claim: str, preset: str = "quick"):
    return next(row for row in claim_rows(preset) if row.id == claim)


def test_claim_without_a_run_is_red_and_never_missing() -> None:
    rows = claim_rows()
    assert [r.id for r in rows if r.group == "papers"] == PAPER_IDS
    assert {r.verdict for r in rows} == {Verdict.NOT_ATTEMPTED}
    assert all(r.reason and r.where and r.statement and r.tolerance and r.paper for r in rows)
    assert markdown(rows).count("🔴 **not attempted**") == len(rows)


def test_no_verdict_is_typed_into_the_data_file() -> None:
    text = CLAIMS.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.lstrip().startswith(("rule:", "headline:")):
            assert not any(word in line for word in ("reproduced", "partly", "not attempted"))


def test_verdict_and_reason_come_from_the_published_table() -> None:
    table = pd.DataFrame({"claim": ["DSV-F6"], "ours": ["rank 0.93"], "verdict": ["reproduced"]})
    folder = publish("08_latent_labels", table)
    got = row("DSV-F6")
    assert got.verdict is Verdict.REPRODUCED
    assert got.reason == "rank 0.93 (reproduced)"
    assert got.measured == "rank correlation of δ and the judge's p: 0.930 ± 0.020 (n = 3)"
    assert row("DSV-F3").verdict is Verdict.NOT_ATTEMPTED
    (folder / "verdicts.csv").write_text("claim,ours,verdict\nDSV-F6,x,not reproduced\n")
    with pytest.raises(RecordError, match=r"verdicts\.csv was changed after the run"):
        claim_rows()


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (["reproduced", "reproduced"], Verdict.REPRODUCED),
        (["reproduced", "not reproduced"], Verdict.PARTLY),
        (["reproduced", "undecided"], Verdict.PARTLY),
        (["not reproduced", "reproduced"], Verdict.NOT_REPRODUCED),
        (["undecided", "reproduced"], Verdict.UNDECIDED),
        (["partly", "partly"], Verdict.PARTLY),
        (["who knows", ""], Verdict.NOT_ATTEMPTED),
    ],
)
def test_rows_are_taken_together(words: list[str], verdict: Verdict) -> None:
    methods = ["DSV gradient"] * 2 + ["DSV NNLS"]  # the rule of DSV-T1 leaves the last one out
    table = pd.DataFrame({"multipliers": methods, "gain": 1, "verdict": [*words, "partly"]})
    publish("04_coresets", table)
    assert row("DSV-T1").verdict is verdict


def test_verdict_in_a_caption_and_smoke_is_no_result(checkout: Path) -> None:
    table = pd.DataFrame({"quantity": ["ρ"], "ours": [0.5], "check": ["within"]})
    publish("03_lambda_vs_accuracy", table, "DSV-F2b: partly.")
    assert row("DSV-F2b").verdict is Verdict.PARTLY
    assert row("DSV-F2b").reason == "ρ, 0.5, within"
    write_presets(checkout, smoke={})
    publish("03_lambda_vs_accuracy", table, "DSV-F2b: reproduced.", preset="smoke")
    smoke = row("DSV-F2b", "smoke")
    assert smoke.verdict is Verdict.NOT_ATTEMPTED
    assert "everything runs" in smoke.reason


@pytest.mark.parametrize(
    ("word", "own", "other", "verdict", "reason"),
    [
        ("reproduced", 0, None, Verdict.REPRODUCED, "its blind test is on the site"),
        ("reproduced", None, None, Verdict.PARTLY, "without a blind test"),
        ("reproduced", None, 0, Verdict.PARTLY, "without a blind test"),
        ("reproduced", 1, 0, Verdict.PARTLY, "blind test is another, of cifar10/13_other"),
        ("reproduced", 0, 0, Verdict.REPRODUCED, "its blind test is on the site"),
        ("not reproduced", None, None, Verdict.NOT_REPRODUCED, "judge 96"),
    ],
)
def test_pictures_count_as_read_only_where_people_can_be_asked(
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
        run.record("DSV-F1", "judge_cifar10_robust", 96.0, std=1.0, seeds=range(5), unit="%")
        table = pd.DataFrame({"claim": ["DSV-F1"], "ours": ["judge 96"], "verdict": [word]})
        run.save_table(table, "verdicts")
        if seed is not None:
            run.save_blind_test(small_blind_test(seed))
        run.complete()
    got = row("DSV-F1", "cifar10")
    assert got.verdict is verdict
    assert reason in got.reason
    assert got.measured.endswith("of a robust classifier: 96.0 ± 1.0 % (n = 5)")


def test_unlisted_claim_of_a_record_is_shown(checkout: Path) -> None:
    publish("04_coresets", pd.DataFrame({"claim": ["EXT-new"], "verdict": ["shown"]}))
    got = row("EXT-new")
    assert (got.group, got.verdict, got.notebook) == ("ours", Verdict.REPRODUCED, "04_coresets")


def test_files_of_the_ledger_keep_numbers_as_numbers(checkout: Path) -> None:
    write_notebook(checkout, "08_latent_labels", END)
    table = pd.DataFrame({"claim": ["DSV-F6"], "ours": ["a | b"], "verdict": ["partly"]})
    publish("08_latent_labels", table)
    csv_path, md_path = write_claims()
    lines = list(csv.DictReader(csv_path.open(encoding="utf-8")))
    (line,) = (x for x in lines if x["claim"] == "DSV-F6")
    assert (float(line["value"]), float(line["std"]), line["seeds"]) == (0.93, 0.02, "0 1 2")
    assert {x["claim"] for x in lines} >= set(PAPER_IDS)
    text = md_path.read_text(encoding="utf-8")
    assert r"🟡 **partly**: a \| b" in text
    assert "[08](../../notebooks/08_latent_labels.ipynb)" in text
    assert str(checkout) not in text


def test_the_ledger_shows_recorded_runs_own_runs_on_request_and_never_those_by_hand(
    checkout: Path,
) -> None:
    def table(word: str) -> pd.DataFrame:
        return pd.DataFrame({"claim": ["DSV-F6"], "ours": ["a"], "verdict": [word]})

    publish("08_latent_labels", table("partly"))
    publish("08_latent_labels", table("reproduced"), root=own_root())
    assert row("DSV-F6").verdict is Verdict.PARTLY
    (own,) = (r for r in claim_rows(root=own_root()) if r.id == "DSV-F6")
    assert own.verdict is Verdict.REPRODUCED
    run = Run.start("08_latent_labels", preset="quick", seed=0)
    run.save_table(table("not reproduced"), "verdicts")
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
    folder = publish("04_coresets", pd.DataFrame({"verdict": ["partly"]}))
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
        ("papers: {X: {rule: {colum: a}}}\nours: {}", "'colum'; did you mean 'column'"),
    ]:
        broken.write_text(text)
        monkeypatch.setattr("companion.ledger.claims.CLAIMS", broken)
        with pytest.raises(DsvError, match=message):
            claim_rows()


def test_command_prints_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    publish(
        "08_latent_labels", pd.DataFrame({"claim": ["DSV-F6"], "o": ["x"], "verdict": ["partly"]})
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["claims", "--scale", "quick"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"{claim} " in printed for claim in PAPER_IDS)
    assert "1 partly" in printed
    assert not (figures_root() / "claims").exists(), "recording writes, looking does not"
