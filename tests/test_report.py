"""The report on one's own classifier: one page, nothing fetched, nothing begun in vain."""

from __future__ import annotations

import dataclasses
import functools
import html
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pandas as pd
import pytest
import torch
from command_line import stderr_line
from conftest import Once
from PIL import Image

import dsvlib
from companion import cli, report
from companion.report import inputs, page, stages, tables

run = functools.partial(command_line.run, main=cli.main)
EVIL = '<b>&"x'  # also a folder's name, where systems allow it
CLASSES = (EVIL, "cat", "dog")
ROOT = Path(__file__).resolve().parent.parent


def write_images(folder: Path, classes: tuple[str, ...] = CLASSES, side: int = 8) -> Path:
    """Write ten grey images of each class, eight of them for training: bars at three heights."""
    rng = np.random.default_rng(0)
    for kind, name in enumerate(classes):
        for number in range(10):
            pixels = rng.integers(0, 90, (side, side))
            pixels[2 * kind + 1 : 2 * kind + 3] += 150
            path = folder / ("train" if number < 8 else "test") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def classifier(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that was trained on the images, with its classes in another order."""
    data = dsvlib.load_dataset(f"folder:{images}")
    torch.manual_seed(0)
    model = dsvlib.build_model("convnet", num_classes=3, shape=(1, 8, 8), width=4, depth=1)
    turned = dataclasses.replace(data.train, labels=2 - data.train.labels)
    dsvlib.train(model, turned, config=dsvlib.TrainConfig(epochs=30, batch_size=8))
    path = tmp_path_factory.mktemp("classifier") / "small.safetensors"
    about: dict[str, Any] = {"classes": data.classes[::-1], "mean": data.mean, "std": data.std}
    dsvlib.save_classifier(path, model, **about)
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(dsvlib.SynthesisConfig.photographs, steps=4)
    monkeypatch.setattr(stages, "preset_for", lambda _: few)


@pytest.fixture(scope="module")
def made(classifier: Path, images: Path) -> report.Report:
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(dsvlib.SynthesisConfig.photographs, steps=4)
        patch.setattr(stages, "preset_for", lambda _: few)
        return report.make(classifier, images, per_class=2)


@pytest.fixture
def words(classifier: Path, images: Path, tmp_path: Path) -> list[str]:
    out = ["--out", str(tmp_path / "page.html")]
    return ["report", "--classifier", str(classifier), "--data", str(images), *out]


class Reader(HTMLParser):
    """What a browser would take for elements, and for text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command_writes_one_page_and_leaves_nothing_beside_it(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").write_text("an older one")
    assert run(*words, "--classes", f"cat,{EVIL}", "--limit", "12") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in said[:-1]] == [f"{number} of 5" for number in range(1, 6)]
    assert re.fullmatch(
        r".*page\.html, 0\.\d MB\. It classifies .* as they are labelled.*", said[-1]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    text = (tmp_path / "page.html").read_text("utf-8")
    for word in ("12 of 24 training images", "of these classes: ", "a larger --limit includes"):
        assert word in text


def test_the_page_is_whole_alone_and_escaped(made: report.Report) -> None:
    found = Reader(made.html)
    assert len(made.html.encode()) < 1_000_000
    allowed = {"meta", "link", "title", "style", "img", "svg", "text", "circle", "line", "path"}
    tags = {tag for tag, _ in found.elements}
    assert tags & {"script", "iframe", "object", "form", "base"} == set()
    assert allowed <= tags
    for _, attributes in found.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")) or value == "data:,"
        assert not {name for name in attributes if name.startswith("on")}
    assert "url(" not in made.html
    assert "@import" not in made.html
    policy = next(a for tag, a in found.elements if a.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'; img-src data:")
    assert '<b>&"x' not in made.html, "a class's name is text and no markup"
    assert EVIL in found.text
    alts = [attributes["alt"] for tag, attributes in found.elements if tag == "img"]
    assert len(alts) > 30
    assert all(len(str(alt).split()) >= 3 for alt in alts)
    assert any(EVIL in str(alt) for alt in alts)
    targets = {a["href"] for tag, a in found.elements if tag == "a"}
    assert targets <= {f"#{a['id']}" for _, a in found.elements if "id" in a}


def test_the_numbers_of_the_page(made: report.Report, classifier: Path, images: Path) -> None:
    data = dsvlib.load_dataset(f"folder:{images}")
    opened = dsvlib.open_classifier(classifier)
    labels = 2 - data.train.labels
    fit = dsvlib.fit_multipliers(opened.model, data.train.inputs, labels)
    assert torch.allclose(made.support.multipliers, fit.samples.multipliers)
    assert made.stationarity == fit.residuals.stationarity
    test = dataclasses.replace(data.test, labels=2 - data.test.labels)
    assert made.accuracy == pytest.approx(dsvlib.accuracy(opened.model, test))
    assert made.accuracy > 0.8, "labels are told by name, in whatever order the folder has them"
    found = made.tables
    assert found["classes"]["name"].tolist() == list(CLASSES[::-1])
    assert found["classes"]["test_images"].tolist() == [2, 2, 2]
    sums = torch.zeros(3).index_add_(0, labels, fit.samples.multipliers)
    assert found["classes"]["multiplier_sum"].tolist() == pytest.approx(sums.tolist(), rel=1e-5)
    assert len(made.synthesised) == len(made.selected) == 6
    again = dsvlib.suspicious(opened.model, fit.samples)
    assert found["suspicious"]["image"].tolist() == [
        i for i, score in zip(again["index"], again["score"], strict=True) if score > 0
    ][:20]  # fmt: skip
    for name, label in zip(found["suspicious"]["file"], found["suspicious"]["label"], strict=True):
        assert (images / "train" / name).is_file()
        assert name.startswith(f"{CLASSES[::-1][label]}/"), "so that one finds the image"
    predictions, top = found["predictions"], found["support"]
    shares = top.groupby("prediction")["share"].sum()
    assert predictions["share"].tolist() == pytest.approx(shares.tolist(), rel=1e-6)
    assert (made.explained.labels == torch.tensor(predictions["label"].to_numpy())).all()


def test_a_notebook_shows_the_same_objects(made: report.Report, tmp_path: Path) -> None:
    cell = made._repr_html_()
    ((tag, attributes),) = Reader(cell).elements
    assert (tag, attributes["sandbox"]) == ("iframe", None), "no script runs in it"
    inside = Reader(str(attributes["srcdoc"]))
    assert EVIL in inside.text
    assert not [tag for tag, _ in inside.elements if tag == "a"], "links would lead to the notebook"
    assert len([tag for tag, _ in inside.elements if tag == "img"]) == made.html.count("<img ")
    assert set(made.figures) == {"synthesised", "selected", "suspicious", "explained"}
    made.write(tmp_path / "own.html")
    assert (tmp_path / "own.html").read_text("utf-8") == made.html
    made.show()


def test_a_call_goes_on_where_it_was_cut_off(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "suspected", cut)
        assert run(*words) == 130
    assert "the same call goes on from there" in capsys.readouterr().out
    kept = {path.name.split("-")[0] for path in (tmp_path / "page.html.parts").iterdir()}
    assert kept == {"accuracy", "stationarity", "synthesis"}
    assert not (tmp_path / "page.html").exists()
    with monkeypatch.context() as patch:  # another call takes nothing of it
        patch.setattr(stages, "logits", cut)
        assert run(*words, "--seed", "1") == 130
    for name in ("logits", "fitted", "synthesised"):
        monkeypatch.setattr(stages, name, lambda *_: pytest.fail("done twice"))
    capsys.readouterr()
    assert run(*words) == 0
    assert capsys.readouterr().out.count("finished earlier, taken from") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_keeps_what_was_done(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "render", lambda *_, **__: "page")
        patch.setattr(Path, "write_text", full)
        assert run(*words) == 1
    assert "No space left on device" in stderr_line(capsys)
    assert len(list((tmp_path / "page.html.parts").iterdir())) == 5


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--out", "no/such/page.html"], 2, "--out: expected a file in a folder that is there"),
        (["--out", "file/page.html"], 2, "--out: expected a file in a folder that is there"),
        (["--out", "page"], 2, "--out: expected a file that ends in .html, got 'page'"),
        (["--out", "folder.html"], 2, "--out: expected a file that ends in .html"),
        (["--out", f"{'x' * 300}.html"], 1, "cannot write"),
        (["--data", "digts"], 2, "did you mean 'digits'"),
        (["--data", "digits"], 2, "data: expected the classes of the classifier, 'dog', 'cat'"),
        (["--data", "file"], 2, "data: name: expected one of"),
        (["--data", "empty"], 2, "data: empty/train: expected a folder of classes, found none"),
        (["--data", "other"], 2, "got 'cat', 'cow', 'dog'; name the folders"),
        (["--data", "large"], 2, "data: expected images 1×8×8 as the classifier reads them, got"),
        (["--data", "folder:mixed"], 2, "data: mixed/train: expected images of one size"),
        (["--classes", "cat,dgo"], 2, "classes: expected names or numbers of classes, got 'dgo'; "),
        (["--classes", "3"], 2, "classes: expected numbers from 0 to 2, got 3"),
        (["--classes", ""], 2, "classes: expected names or numbers"),
        (["--limit", "0"], 2, "limit: expected a whole number from 1 to"),
        (["--limit", "99999999"], 2, "limit: expected a whole number from 1 to"),
        (["--limit", "2"], 2, "limit: expected at least 1 training images of every class"),
        (["--per-class", "0"], 2, "per-class: expected a whole number from 1 to"),
        (["--per-class", "9"], 2, "limit: expected at least 9 training images of every class"),
        (["--per-class", "200"], 2, "classes: expected from 1 to 300 DSVs on a page"),
        (["--seed", "-1"], 2, "seed: expected a whole number from 0 to"),
        (["--device", "tpu"], 2, "--device: expected auto, cpu, cuda or cuda:N"),
        (["--mean", "grey"], 2, "--mean: expected numbers"),
        (["--classifier", "no.safetensors"], 1, "no.safetensors"),
        (["--classifier", "report_net:build"], 1, "expected mean, std beside the network"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_any_work(
    words: list[str], status: int, message: str, classifier: Path, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(stages, "Stages", lambda *_: pytest.fail("begun"))
    Path("file").write_text("")
    Path("empty").mkdir()
    Path("folder.html").mkdir()
    write_own(Path("report_net.py"))
    if "other" in words:
        write_images(Path("other"), ("cat", "cow", "dog"))
    if "large" in words:
        write_images(Path("large"), side=9)
    if "folder:mixed" in words:
        write_images(Path("mixed"), (EVIL, "cat"))
        write_images(Path("mixed"), ("dog",), side=9)
    given = {"--classifier": str(classifier), "--data": str(images), "--out": "page.html"}
    given |= {words[0]: words[1]}
    assert run("report", *(word for pair in given.items() for word in pair)) == status
    assert message in stderr_line(capsys)
    assert not list(tmp_path.glob("*.parts"))
    assert not Path("page.html").exists()


def write_own(path: Path) -> None:
    path.write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))\n"
    )


def test_a_network_of_one_s_own_has_the_folder_s_classes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_own(tmp_path / "report_net.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words[words.index("--classifier") + 1] = "report_net:build"
    assert run(*words, "--mean", "0.3", "--std", "0.2") == 0
    text = html.unescape((tmp_path / "page.html").read_text("utf-8"))
    assert "--mean 0.3 --std 0.2" in text, "the command stands on the page"
    assert "<h1>report_net:build on images" in text.replace("\n", "")


def classifier_of(network: torch.nn.Module, data: dsvlib.Dataset) -> dsvlib.Classifier:
    return dsvlib.Classifier(network, data.classes, data.mean, data.std, data.shape)


def test_a_network_without_second_derivatives_gets_the_rest(images: Path) -> None:
    data = dsvlib.load_dataset(f"folder:{images}")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 4), Once(), torch.nn.Linear(4, 3)
    )
    with pytest.warns(UserWarning, match="sample by sample"):
        made = report.make(classifier_of(network, data), data)
    assert made.synthesised is None
    assert "None could be made: " in made.html
    assert "synthesised" not in made.figures


def test_one_logit_is_refused(images: Path, tmp_path: Path) -> None:
    data = dsvlib.load_dataset(f"folder:{write_images(tmp_path / 'two', ('cat', 'dog'))}")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
    with pytest.raises(RuntimeError, match="expected a logit for each of 2 classes, got 1"):
        report.make(classifier_of(network, data), data)


def test_a_network_that_no_image_holds_is_one_sentence(images: Path) -> None:
    data = dsvlib.load_dataset(f"folder:{images}")
    means = dsvlib.class_means(data.train).inputs.flatten(1)
    linear = torch.nn.Linear(64, 3, bias=False)  # takes every image for what it is least like
    linear.weight.data = -(means - means.mean(dim=0))
    network = torch.nn.Sequential(torch.nn.Flatten(), linear)
    with pytest.raises(RuntimeError, match="no training image has λ > 0"):
        report.make(classifier_of(network, data), data)


def test_another_normalisation_is_the_classifier_s(images: Path, made: report.Report) -> None:
    data = dsvlib.load_dataset(f"folder:{images}")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    own = dsvlib.Classifier(network, data.classes, (0.5,), (0.25,), data.shape)
    _, read = inputs.opened_with(own, data, None, {})
    pixels = data.denormalize(data.train.inputs)
    assert torch.allclose(read.train.inputs, (pixels - 0.5) / 0.25, atol=1e-6)


def test_without_the_extra_the_command_says_what_brings_it(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "companion.report", None)
    assert run(*words) == 1
    assert 'pip install "dsvlib[companion]" brings what' in stderr_line(capsys)


@pytest.mark.parametrize(
    ("off", "kind"),
    [(0.05, "nearly stationary"), (0.5, "partly stationary"), (0.9, "far from stationary")],
)
def test_stationarity_in_words(off: float, kind: str) -> None:
    said = page.stationary({"stationarity": off, "cosine": 0.9}, "all 10 training images")
    assert said.startswith(f"It is {kind}: a sum over all 10 training images")
    assert page.percent(off) in said


def test_poor_completeness_and_equal_gradients_are_caveats(made: report.Report) -> None:
    poor = dataclasses.replace(
        made.explanation, completeness=torch.full_like(made.explanation.completeness, 0.5)
    )
    say: Callable[..., list[str]] = page.caveats
    table = made.tables["predictions"].assign(against=0.97)
    told = " ".join(say({"stationarity": 0.9, "unique": False}, True, poor, table, ["cat"]))
    plain = " ".join(
        say({"stationarity": 0.1, "unique": True}, False, poor, table.assign(against=0), None)
    )
    for word in ("Far from stationary", "nearly cancel", "not unique", "a larger --limit", "cat"):
        assert word in told
        assert word not in plain
    assert f"poor for {len(poor.logits)} of {len(poor.logits)}" in plain


def test_the_chart_of_whatever_numbers_stays_in_its_frame() -> None:
    left, right, top, bottom = page.FRAME
    for sums in ([1.0, 2.0, 40.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0], [1e-9, 2e-9, 5e9]):
        table = pd.DataFrame({"multiplier_sum": sums, "accuracy": [1.0, 1.0, 0.0], "name": "abc"})
        drawn = page.chart(table)
        for x, y, _ in drawn["points"]:
            assert left <= x <= right
            assert top <= y <= bottom
        assert 1 <= len(drawn["x"]) <= 8
        assert 2 <= len(drawn["y"]) <= 8


def test_what_nothing_speaks_for_is_said(made: report.Report) -> None:
    explanation, count = made.explanation, len(made.explanation.logits)
    against = dataclasses.replace(explanation, contributions=-explanation.contributions.abs())
    found = tables.predictions(
        against, torch.arange(count), made.explained.labels, torch.zeros(count, 3)
    )
    assert found["share"].tolist() == [0] * count
    assert found["against"].isna().all()
    told = dataclasses.replace(made, tables={**made.tables, "predictions": found})
    assert told.html.count("No training image speaks for it.") == count
    assert "nan" not in told.html


def test_correlation_in_words() -> None:
    def say(sums: list[float], rho: float) -> str:
        table = pd.DataFrame({"multiplier_sum": sums, "accuracy": [0.1 * k for k in range(5)]})
        table.attrs["pearson"] = rho
        return page.correlation(table)

    assert "undefined" in say([1.0] * 5, float("nan"))
    assert "are classified better" in say([0.1, 1.0, 2.0, 3.1, 4.0], 0.999)
    assert "too wide to say" in say([3.0, 1.0, 4.0, 1.5, 3.2], -0.05)
    assert "−0.05" in say([3.0, 1.0, 4.0, 1.5, 3.2], -0.05)


def test_large_pictures_become_small() -> None:
    address = page.picture(torch.rand(3, 300, 200))
    assert address.startswith("data:image/jpeg;base64,")
    assert len(address) < 30_000
    assert page.picture(torch.rand(2, 8, 8)).startswith("data:image/png;base64,")


def test_the_committed_example_has_the_present_page() -> None:
    text = (ROOT / "docs" / "report-digits.html").read_text("utf-8")
    template = (ROOT / "companion/site/templates/report.html").read_text("utf-8")
    style = template[template.index("<style>") : template.index("</style>")]
    assert style in text, "make it anew: the command stands in docs/own-classifier.md"
    assert len(text.encode()) < 600_000
