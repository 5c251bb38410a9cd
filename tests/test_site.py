"""The built site in headless Chromium: what is there, offline, readable, and usable by keyboard.

Run by `make test-site` on what `make site` has built; no page is fetched from anywhere else.
"""

from __future__ import annotations

import http.server
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import MISSING, find_browser
from checkout import small_blind_test

from companion.blind_test import UNSURE, BlindTest
from companion.ledger.figure_wall import Entry
from companion.site import content

pytestmark = pytest.mark.site
HTML = Path(__file__).resolve().parent.parent / "build" / "site" / "html"
NOTEBOOKS = sorted(path.stem for path in (HTML.parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
EXPECTED = [
    *(
        "index",
        "findings",
        "own-classifier",
        "running",
        "claims",
        "blind-test",
        "exercises",
        "questions",
        "teaching",
        "glossary",
        "wall/quick",
        "search",
        "genindex",
        "api/index",
        "api/conditions",
    ),
    *(f"notebooks/{name}" for name in NOTEBOOKS),
]
# one page of each kind, for what would take long on all of them
KINDS = [
    "index",
    "findings",
    "own-classifier",
    "running",
    "claims",
    "exercises",
    "questions",
    "teaching",
    "glossary",
    "wall/quick",
    "api/conditions",
    f"notebooks/{NOTEBOOKS[0]}",
]
PHONE, DESK = {"width": 375, "height": 740}, {"width": 1366, "height": 900}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not (HTML / "index.html").is_file():
        pytest.fail("no site in build/site/html; run make site first", pytrace=False)
    with served(HTML) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = find_browser()
    if program is None:
        if os.environ.get("DSV_NEEDS_BROWSER") or os.environ.get("CI"):
            pytest.fail(MISSING, pytrace=False)
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync"]
    # its sandbox does not start as root, which is what containers give us
    quiet += ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=quiet)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """Open a page by name; what it asks for and complains about is in `page.heard`."""
    contexts = []

    def open_it(name: str, *, viewport: dict[str, int] = DESK, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        context.set_default_timeout(90_000)  # a machine that trains beside this is slow
        contexts.append(context)
        page = context.new_page()
        page.heard = {"requests": [], "complaints": []}
        page.on("request", lambda request: page.heard["requests"].append(request.url))
        page.on("pageerror", lambda error: page.heard["complaints"].append(str(error)))
        page.on(
            "console",
            lambda said: (
                said.type in ("error", "warning") and page.heard["complaints"].append(said.text)
            ),
        )
        page.on(
            "response",
            lambda answer: (
                answer.status >= 400
                and page.heard["complaints"].append(f"{answer.status} {answer.url}")
            ),
        )
        file, _, rest = name.partition("?")
        page.goto(f"{address}/{file}.html{rest and '?' + rest}", wait_until="load")
        return page

    yield open_it
    for context in contexts:
        context.close()


def all_pages() -> list[str]:
    return sorted(str(path.relative_to(HTML).with_suffix("")) for path in HTML.rglob("*.html")) or [
        "index"
    ]


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_pages_are_there(address: str, name: str) -> None:
    page = HTML / f"{name}.html"
    assert page.is_file(), f"{name}.html is missing"
    assert "<h1>" in page.read_text(encoding="utf-8") or name in ("search", "genindex")


@pytest.mark.parametrize("name", all_pages())
def test_every_page_is_quiet_offline_described_and_fits_a_phone(open_page: Any, name: str) -> None:
    page = open_page(name, viewport=PHONE)
    for image in page.query_selector_all("img[loading=lazy]")[:1]:
        image.scroll_into_view_if_needed()
    page.wait_for_load_state("networkidle")
    assert page.heard["complaints"] == []
    away = [
        url
        for url in page.heard["requests"]
        if urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname != "127.0.0.1"
    ]
    assert away == [], "requests that leave this machine"
    alts = page.eval_on_selector_all("img", "images => images.map(i => i.getAttribute('alt'))")
    poor = [alt for alt in alts if alt is None or len(alt.split()) < 3]
    assert poor == [], "images whose alternative text states no finding"
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"], f"{name} is {width} px wide on a phone"


# The ratio of WCAG 2.2 between each visible text and what lies behind it, sizes considered.
CONTRAST = """
() => {
  const parse = c => { const v = c.match(/[\\d.]+/g).map(Number);
    return c.startsWith('color(srgb') ? [v[0]*255, v[1]*255, v[2]*255, v[3] ?? 1]
                                      : [v[0], v[1], v[2], v[3] ?? 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1 - a[3])).concat(1);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= 0.04045 ? v/12.92 : ((v + 0.055)/1.055)**2.4; });
    return 0.2126*r + 0.7152*g + 0.0722*b; };
  const ground = element => { const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.push(parse(getComputedStyle(e).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((below, above) => over(above, below), [255, 255, 255, 1]); };
  const found = new Map();
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (!text || e.closest('script, style, noscript, mjx-container, [hidden]')) continue;
    if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    const back = ground(e), front = over(parse(style.color), back);
    const [low, high] = [light(front), light(back)].sort((x, y) => x - y);
    const ratio = (high + 0.05)/(low + 0.05);
    seen += 1;
    const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
    const key = `${e.tagName}.${e.className} ${style.color} on ${back.map(Math.round)}`;
    if (ratio < (large ? 3 : 4.5)) found.set(key, `${ratio.toFixed(2)} ${text.slice(0, 30)}`);
  }
  return { seen, low: Object.fromEntries(found) };
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", KINDS)
def test_contrast_holds(open_page: Any, name: str, scheme: str) -> None:
    page = open_page(name, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    measured = page.evaluate(CONTRAST)
    assert measured["seen"] > 50
    assert measured["low"] == {}


def test_the_measure_of_contrast_sees_a_pale_text(open_page: Any) -> None:
    page = open_page("claims")
    page.evaluate("document.querySelector('article p').style.color = '#bbb'")
    assert page.evaluate(CONTRAST)["low"]


def test_light_and_dark_differ(open_page: Any) -> None:
    grounds = {
        scheme: open_page("index", scheme=scheme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for scheme in ("light", "dark")
    }
    assert grounds["light"] != grounds["dark"]


def test_search_finds_stationarity(open_page: Any) -> None:
    page = open_page("index")
    page.fill(".sidebar-search", "stationarity")
    page.press(".sidebar-search", "Enter")
    page.wait_for_function(  # hits come in one by one
        "document.querySelector('.search-summary')?.textContent.includes('finished')"
    )
    hits = page.eval_on_selector_all("#search-results li > a", "links => links.map(l => l.href)")
    assert any("conditions" in hit for hit in hits), hits
    assert any("notebooks/" in hit for hit in hits), hits


def test_search_finds_a_word_of_the_glossary_first(open_page: Any) -> None:
    page = open_page("search?q=judge")
    page.wait_for_function(
        "document.querySelector('.search-summary')?.textContent.includes('finished')"
    )
    first = page.eval_on_selector("#search-results li > a", "link => link.href")
    assert first.endswith("glossary.html#term-judge")


def test_a_word_of_the_glossary_says_what_it_is_where_it_is_first_used(
    open_page: Any, address: str
) -> None:
    page = open_page("notebooks/01_from_svm_to_deepkkt")
    links = page.query_selector_all("a.term")
    texts = [link.text_content().lower().removesuffix("s") for link in links]
    assert "stationarity" in texts
    assert len(texts) == len(set(texts)), "once a page"
    assert all(link.get_attribute("title") for link in links)
    page.goto(links[0].evaluate("link => link.href"))
    assert page.query_selector(":target") is not None


@pytest.mark.parametrize("name", all_pages())
def test_a_page_weighs_little(browser: Any, address: str, name: str) -> None:
    """What a page asks for before a reader scrolls, but for MathJax, which is fetched once."""
    page = browser.new_page(viewport=DESK)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path.lstrip("/")))
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    page.close()
    files = {HTML / path for path in asked if "mathjax" not in path}
    weight = sum(path.stat().st_size for path in files if path.is_file())
    assert weight < 1_500_000, f"{weight / 1e6:.1f} MB"


def test_home_is_short(open_page: Any) -> None:
    page = open_page("index")
    height = page.evaluate("document.documentElement.scrollHeight")
    assert height < 3 * DESK["height"]


@pytest.mark.parametrize(
    ("name", "picture"),
    [("wall/quick", ".card a.picture"), (f"notebooks/{NOTEBOOKS[1]}", ".cell_output img")],
)
def test_a_picture_opens_large_and_closes_by_escape(
    open_page: Any, name: str, picture: str
) -> None:
    page = open_page(name, viewport=PHONE)
    here = page.url
    page.click(picture)
    assert page.url == here
    assert page.evaluate("document.querySelector('.lightbox').open") is True
    size = "document.querySelector('.lightbox img').getBoundingClientRect().width"
    assert page.evaluate(size) > PHONE["width"], "larger than the page can show it"
    assert page.eval_on_selector(".lightbox img", "image => image.alt") != ""
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('.lightbox').open")


def test_an_animation_is_moved_through_by_keyboard(open_page: Any) -> None:
    page = open_page("index")
    page.focus(".scrubber input")
    shown = "document.querySelector('.scrubber img').src"
    said = "document.querySelector('.scrubber output').textContent"
    last = page.evaluate(shown), page.evaluate(said)
    page.keyboard.press("ArrowLeft")
    before = page.evaluate(shown), page.evaluate(said)
    assert before[0] != last[0]
    assert before[1] != last[1]
    page.wait_for_function("document.querySelector('.scrubber img').naturalWidth > 0")
    page.keyboard.press("End")
    assert (page.evaluate(shown), page.evaluate(said)) == last


@pytest.mark.parametrize(
    ("name", "panel"),
    [
        ("index", "details.why"),
        ("exercises", "details.solution"),
        (f"notebooks/{NOTEBOOKS[0]}", "details.hide"),
    ],
)
def test_panels_open_by_keyboard(open_page: Any, name: str, panel: str) -> None:
    page = open_page(name)
    page.focus(f"{panel} > summary")
    assert page.evaluate(f"document.querySelector('{panel}').open") is False
    page.keyboard.press("Enter")
    assert page.evaluate(f"document.querySelector('{panel}').open") is True
    page.keyboard.press("Enter")
    assert page.evaluate(f"document.querySelector('{panel}').open") is False


def test_panels_are_reached_by_tab(open_page: Any) -> None:
    page = open_page("index")
    page.focus(".card .picture")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.parentElement.className") == "why"


def test_why_panel_tells_all_and_its_files_are_there(open_page: Any, address: str) -> None:
    page = open_page("wall/quick")
    panels = page.query_selector_all("details.why")
    assert len(panels) == len(page.query_selector_all(".card")) > 0
    for panel in panels:
        text = panel.text_content()
        for word in ("dsv reproduce", "Parameters", "Commit", "Data digest", "sidecar"):
            assert word in text
    links = page.eval_on_selector_all("details.why a", "links => links.map(l => l.href)")
    missing = [link for link in links if not (HTML / link.removeprefix(f"{address}/")).is_file()]
    assert missing == []
    assert any(link.endswith(".csv") for link in links)


def test_the_ledger_shows_each_claim_with_a_word_beside_its_colour(open_page: Any) -> None:
    page = open_page("claims")
    rows = page.query_selector_all("table.ledger tbody tr")
    assert len(rows) >= 16  # the claims of both papers
    for row in rows:
        words = row.query_selector(".verdict").text_content()
        assert any(w in words for w in ("reproduced", "partly", "undecided", "not attempted")), (
            words
        )


def test_mathematics_is_typeset(open_page: Any) -> None:
    page = open_page("index")
    page.wait_for_selector("mjx-container svg")


# --- the blind test ------------------------------------------------------------------------------


@pytest.fixture(params=["served", "from disk"])
def asked(request: Any, browser: Any, tmp_path: Path) -> Iterator[tuple[Any, BlindTest]]:
    """The page of a small set whose answers are known, with the site's script and style."""
    test = small_blind_test()
    about = {
        "kind": "blind test",
        "name": "blind_test",
        "parameters": {},
        "command": "dsv",
        "seed": 0,
    }
    about |= {"commit": "c" * 40, "dirty": False, "code": "d" * 64, "data_digest": ""}
    about |= {
        "environment": dict.fromkeys(("device", "threads", "torch", "python", "platform"), "x")
    }
    entry = Entry("figures/quick/01_line", about, (), fresh=True)
    body = content.blind_test_page(test, entry, "owner/name").split("---\n", 2)[2]
    style = '<meta charset="utf-8"><link rel="stylesheet" href="_static/site.css">'
    (tmp_path / "page.html").write_text(f"<!doctype html>{style}{body}", encoding="utf-8")
    shutil.copytree(HTML.parents[2] / "site" / "_static", tmp_path / "_static",
                    ignore=shutil.ignore_patterns("vendor"))  # fmt: skip
    folder = tmp_path / entry.folder
    folder.mkdir(parents=True)
    test.save(folder / "blind_test")
    (folder / "blind_test_key.js").write_text(content.blind_test_key(test), encoding="utf-8")
    with served(tmp_path) as address:
        page = browser.new_context(viewport=DESK, accept_downloads=True).new_page()
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        root = address if request.param == "served" else tmp_path.as_uri()
        page.goto(f"{root}/page.html")
        yield page, test
        assert page.complaints == []
        page.context.close()


def choose(page: Any, name: str) -> None:
    label = "I cannot tell" if name == UNSURE else name
    page.click(f".blind-choices button:has-text('{label}')")


def test_the_blind_test_counts_what_was_answered(asked: tuple[Any, BlindTest]) -> None:
    page, test = asked
    rows = test.key.to_dict(orient="records")
    answers = [row["asked"] if row["kind"] == "real" else "cat" for row in rows]
    answers[next(i for i, row in enumerate(rows) if row["kind"] == "real")] = UNSURE
    page.click(".blind-begin")
    for number, name in enumerate(answers, 1):
        assert f"Picture {number} of {len(answers)}" in page.text_content(".blind-count")
        choose(page, name)
    page.wait_for_selector(".blind-scores")
    for kind, score in test.score(answers).iterrows():
        cells = page.eval_on_selector_all(
            f".blind-scores tr[data-kind='{kind}'] td[data-label]", "c => c.map(x => x.textContent)"
        )
        # rounded by JavaScript, where a half goes up
        low, high, rate, judge = (int(score[n] + 0.5) for n in ("low", "high", "accuracy", "judge"))
        assert cells == [
            f"{score['right']:.0f} of {score['n']:.0f} ({rate} %)",
            f"{low} – {high} %",
            f"{judge} %",
        ]
    wrong = [
        row
        for name, row in zip(answers, rows, strict=True)
        if row["kind"] != "control" and name != row["asked"]
    ]
    assert len(page.query_selector_all(".blind-misread li")) == len(wrong)
    with page.expect_download() as waiting:
        page.click(".blind-save")
    saved = Path(waiting.value.path())
    assert test.read_answers(saved) == dict(enumerate(answers, 1))
    link = page.get_attribute(".blind-stage a", "href")
    assert link.startswith("https://github.com/owner/name/issues/new?")
    assert test.digest in link


def test_the_blind_test_is_answered_by_keyboard_and_hides_its_key(
    asked: tuple[Any, BlindTest],
) -> None:
    page, test = asked
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.focus(".blind-begin")
    page.keyboard.press("Enter")
    page.wait_for_selector(".blind-choices")
    for key in ("2", "Backspace", "1", "x", "9", "3"):  # there is no ninth class
        page.keyboard.press(key)
    assert "Picture 4 of 18" in page.text_content(".blind-said")
    shown = page.inner_html("body")
    assert not any(word in shown for word in ("an untrained network", "a classifier<", "judge:"))
    assert page.get_attribute(".blind-stage canvas", "aria-label") == "picture 4, without its label"
    assert not [url for url in requests if "key" in url]
    assert page.evaluate("globalThis.blindTestKey") is None
    page.keyboard.press("Control+1")  # the browser's own
    page.click("text=Finish here")
    page.wait_for_selector(".blind-scores")
    assert [url for url in requests if url.endswith("blind_test_key.js")]
    assert page.evaluate("document.activeElement.textContent") == "What you read"
    total = test.score(["cat", UNSURE, "frog"])["n"].sum()
    cells = page.eval_on_selector_all("td[data-label=You]", "c => c.map(x => x.textContent)")
    assert sum(int(cell.split()[2]) for cell in cells) == total == 3


def test_the_blind_test_fits_a_phone_and_says_what_is_missing(
    asked: tuple[Any, BlindTest], tmp_path: Path
) -> None:
    page, _ = asked
    page.set_viewport_size({"width": 360, "height": 740})
    page.click(".blind-begin")
    choose(page, "dog")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    next(tmp_path.rglob("blind_test_key.js")).unlink()
    page.click("text=Finish here")
    page.wait_for_selector(".blind-said.wrong")
    assert "blind_test_key.js is missing. Your answers are kept" in page.text_content(".blind-said")
    assert page.is_visible(".blind-save")


# --- the report on a classifier ------------------------------------------------------------------

REPORT = HTML.parents[2] / "docs" / "report-digits.html"


@pytest.fixture
def open_report(browser: Any) -> Iterator[Any]:
    """Open the committed report from disk, as those do who are sent one."""
    contexts = []

    def open_it(*, viewport: dict[str, int] = DESK, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.heard = []
        page.on("request", lambda request: page.heard.append(request.url))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("console", lambda said: page.heard.append(said.text))
        page.goto(REPORT.as_uri(), wait_until="load")
        return page

    yield open_it
    for context in contexts:
        context.close()


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_the_report_is_quiet_offline_described_and_fits(open_report: Any, viewport: Any) -> None:
    page = open_report(viewport=viewport)
    assert [heard for heard in page.heard if not heard.startswith("data:")] == [REPORT.as_uri()]
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= viewport["width"], f"the report is {width} px wide"
    whole = page.eval_on_selector_all("img", "all => all.every(i => i.naturalWidth > 0)")
    assert whole, "every picture is in the file"
    alts = page.eval_on_selector_all("img", "images => images.map(i => i.alt)")
    assert len(alts) > 100
    assert [alt for alt in alts if len(alt.split()) < 3] == []
    small = page.eval_on_selector_all("img", "all => Math.min(...all.map(i => i.clientWidth))")
    assert small >= 44, "a digit can be made out"
    clipped = """all => all.filter(e => e.scrollWidth > e.clientWidth + 1
                   && !e.closest('.scroll')).map(e => e.textContent.slice(0, 40))"""
    assert page.eval_on_selector_all("main p, main li, main h2, main h3", clipped) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_the_report_holds(open_report: Any, scheme: str) -> None:
    measured = open_report(scheme=scheme).evaluate(CONTRAST)
    assert measured["seen"] > 200
    assert measured["low"] == {}


def test_the_report_is_light_and_dark(open_report: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    found = {scheme: open_report(scheme=scheme).evaluate(ground) for scheme in ("light", "dark")}
    assert found["light"] != found["dark"]


def test_the_report_is_read_by_keyboard(open_report: Any) -> None:
    page = open_report(viewport=PHONE)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(
            "document.activeElement.getAttribute('href') ?? document.activeElement.ariaLabel"
        ))  # fmt: skip
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or reached[-1] is None
    assert reached[0] == "#verdict", "first of all one can skip to the verdict"
    assert reached[1:9] == ["#verdict", "#accuracy", "#stationary", "#dsvs", "#lambda",
                            "#suspicious", "#predictions", "#caveats"]  # fmt: skip
    assert reached[9:11] == ["Accuracy by class", "What the sum leaves out of each layer"]
    page.focus("nav a[href='#caveats']")
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)  # the page's policy forbids Playwright's own way to wait
    box = page.locator("#caveats").bounding_box()
    assert box["y"] < PHONE["height"]
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
