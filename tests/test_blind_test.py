"""The blind test: pictures that tell nothing, a key that fits them, and a score that adds up."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkout import small_blind_test, whole_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import norm

from companion.blind_test import KINDS, UNSURE, BlindTest, Group, at_chance, make, wilson
from companion.runs import Run, copy_recorded, figures_root, own_root, read_record
from dsvlib._errors import DsvError, RequestError


def publish(test: BlindTest, root: Path | None = None) -> Path:
    with whole_run((root or own_root()) / "quick" / "01_line"):
        run = Run.start("01_line", preset="quick", seed=0)
    run.save_blind_test(test, caption="Pictures without labels")
    run.complete()
    return run.directory


# --- the set -------------------------------------------------------------------------------------


def test_a_set_comes_back_as_it_was_made(checkout: Path) -> None:
    test = small_blind_test()
    again = BlindTest.load(publish(test))
    assert again.png == test.png
    assert again.digest == test.digest
    pd.testing.assert_frame_equal(again.key, test.key)
    np.testing.assert_array_equal(again.pictures, test.pictures)


def test_recording_keeps_the_set_whole(checkout: Path) -> None:
    folder = publish(small_blind_test())
    copy_recorded(folder, figures_root() / "quick" / "01_line")
    recorded = figures_root() / "quick" / "01_line"
    assert set(read_record(recorded)["files"]) == {
        f"blind_test{s}" for s in (".png", ".csv", ".json")
    }
    assert BlindTest.load(recorded).digest == BlindTest.load(folder).digest
    sidecar = json.loads((recorded / "blind_test.json").read_text())
    assert sidecar["files"]["blind_test.png"] == BlindTest.load(recorded).digest
    assert sidecar["kind"] == "blind test"
    assert {"seed", "commit", "parameters", "data_digest"} <= set(sidecar)


def test_every_picture_stands_at_the_number_of_its_key() -> None:
    test = small_blind_test()
    assert test.pictures.shape == (18, 4, 4, 3)
    level = {"cat": 51, "dog": 128, "frog": 204}
    for picture, (_, row) in zip(test.pictures, test.key.iterrows(), strict=True):
        if row["kind"] != "control":
            assert np.all(np.abs(picture.astype(int) - level[row["asked"]]) <= 1)
    assert list(test.key["number"]) == list(range(1, 19))
    assert test.classes == ["cat", "dog", "frog"]
    assert test.key.groupby("kind").size().to_dict() == dict.fromkeys(KINDS, 6)


def test_grey_pictures_of_any_shape_come_back(generator: torch.Generator) -> None:
    images = np.random.default_rng(0).uniform(size=(13, 1, 3, 5))
    test = make([Group("real", images, ["7"] * 13, ["7"] * 13, "test")], torch.Generator())
    order = torch.randperm(13, generator=torch.Generator()).numpy()
    expected = np.rint(images[order] * 255).transpose(0, 2, 3, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(test.pictures, expected)


def test_the_picture_holds_nothing_but_pixels() -> None:
    test = small_blind_test()
    with Image.open(io.BytesIO(test.png)) as opened:
        opened.load()
        assert opened.info == {}
        assert opened.text == {}  # type: ignore[attr-defined]
    chunks, at = [], 8
    while at < len(test.png):
        chunks.append(test.png[at + 4 : at + 8])
        at += 12 + int.from_bytes(test.png[at : at + 4])
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}


def test_the_order_is_that_of_the_generator() -> None:
    one, same, other = small_blind_test(), small_blind_test(), small_blind_test(seed=1)
    assert one.png == same.png
    assert list(one.key["asked"]) != list(other.key["asked"])
    assert list(one.key["kind"]) != sorted(one.key["kind"])
    assert "kind" not in repr(one).split("key=")[0]


@pytest.mark.parametrize("file", ["blind_test.png", "blind_test.csv"])
def test_a_set_that_was_changed_is_one_sentence(checkout: Path, file: str) -> None:
    folder = publish(small_blind_test())
    other = small_blind_test(seed=1)
    for path in other.save(folder / "other"):
        if path.suffix == Path(file).suffix:
            path.replace(folder / file)
    with pytest.raises(DsvError, match=rf"{file}: expected the file of SHA-256 .* restore it"):
        BlindTest.load(folder)


def test_a_missing_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DsvError, match=r"expected a blind test, blind_test\.png, \.csv and \.json"):
        BlindTest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ours"}, "kind: expected one of support vector, control, real, got 'ours'"),
        ({"images": np.zeros((2, 2, 4, 4))}, r"expected \[n, 1 or 3, H, W\], all of one size"),
        ({"images": np.zeros((2, 3, 5, 4))}, r"got \[2, 3, 5, 4\] beside \[3, 4, 4\]"),
        ({"images": np.full((2, 3, 4, 4), 2.0)}, r"expected pixels in \[0, 1\]; denormalise"),
        ({"images": np.full((2, 3, 4, 4), math.nan)}, r"expected pixels in \[0, 1\]"),
        ({"asked": ["cat"]}, "for each of 2 images, got 1 and 2"),
    ],
)
def test_bad_pictures_are_refused(change: dict[str, object], message: str) -> None:
    good = {"kind": "real", "images": np.zeros((2, 3, 4, 4)), "asked": ["cat"] * 2}
    good |= {"judged": ["cat"] * 2, "source": "x"}
    groups = [Group(**good), Group(**(good | change))]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        make(groups, torch.Generator())


def test_the_sheet_to_read_shows_numbers_and_no_class() -> None:
    figure = small_blind_test().ask(7)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == [str(number) for number in range(1, 8)]


# --- the score -----------------------------------------------------------------------------------


def test_answers_counted_by_hand() -> None:
    test = small_blind_test()
    right = test.key.set_index("number")["asked"].to_dict()
    kinds = test.key.set_index("number")["kind"].to_dict()
    ours = [number for number, kind in kinds.items() if kind == "support vector"]
    answers = dict(right)
    answers[ours[0]] = UNSURE  # counts as not read
    answers[ours[1]] = next(name for name in test.classes if name != right[ours[1]])
    answers[ours[2]] = " "  # not answered
    score = test.score(answers)
    assert list(score.index) == list(KINDS)
    assert score.loc["support vector", ["n", "right"]].tolist() == [5, 3]
    assert score.loc["support vector", "accuracy"] == pytest.approx(60)
    assert score.loc["control", ["n", "right", "judge"]].tolist() == [6, 6, pytest.approx(100 / 3)]
    assert score.loc["real", ["accuracy", "judge"]].tolist() == [100, 100]
    wrong = {n for n in ours if test.key["judge"][n - 1] != right[n]}
    assert len(wrong) == 1
    left = 5 if ours[2] in wrong else 4  # the judge is asked about what was answered
    assert score.loc["support vector", "judge"] == pytest.approx(100 * left / 5)
    first = test.score(list(right.values())[:4])
    assert first["n"].sum() == first["right"].sum() == 4


def test_without_answers_the_judge_stands_alone() -> None:
    for answers in ([], {}, ["", ""]):
        score = small_blind_test().score(answers)
        assert score["n"].tolist() == [0, 0, 0]
        assert score["accuracy"].isna().all()
        assert score["judge"].tolist() == pytest.approx([500 / 6, 100 / 3, 100])


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_that_of_the_score_test(drawn: tuple[int, int]) -> None:
    """Its ends are the rates from which what was seen lies 1.96 of *their* errors away."""
    right, n = drawn
    z = norm.ppf(0.975)
    for end in wilson(right, n):
        rate = min(max(end / 100, 0), 1)
        assert abs(right / n - rate) == pytest.approx(
            z * math.sqrt(rate * (1 - rate) / n), abs=1e-7
        )


@pytest.mark.parametrize(("right", "chance"), [(0, True), (2, True), (4, True), (5, False)])
def test_controls_are_at_chance_or_not(right: int, chance: bool) -> None:
    assert at_chance(right, 20, 10) is chance


def test_bad_answers_are_one_sentence() -> None:
    test = small_blind_test()
    with pytest.raises(
        RequestError, match="unknown answer to picture 2 'dogg'; did you mean 'dog'"
    ):
        test.score(["cat", "dogg"])
    with pytest.raises(RequestError, match="for each of the 18 pictures at most, got one for numb"):
        test.score(["cat"] * 19)


def test_saved_answers_are_read_and_only_those_to_this_set(tmp_path: Path) -> None:
    test, path = small_blind_test(), tmp_path / "answers.json"
    path.write_text(json.dumps({"set": test.digest, "answers": {"1": "cat", "3": "?"}}))
    assert test.read_answers(path) == {1: "cat", 3: "?"}
    with pytest.raises(RequestError, match=r"expected answers to the set .*, got some to"):
        small_blind_test(seed=1).read_answers(path)
    for text in ("{", "[]", '{"set": "x"}', '{"set": "x", "answers": {"one": "cat"}}'):
        path.write_text(text)
        with pytest.raises(RequestError, match="expected answers that the page of the blind test"):
            test.read_answers(path)
