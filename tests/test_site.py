"""The built site in headless Chromium: what is there, offline, readable, and usable by keyboard.

Run by `make test-site` on what `make site` has built; no page is fetched from anywhere else.
"""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import MISSING, find_browser

pytestmark = pytest.mark.site
HTML = Path(__file__).resolve().parent.parent / "build" / "site" / "html"
NOTEBOOKS = sorted(path.stem for path in (HTML.parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
EXPECTED = [
    *("index", "claims", "exercises", "search", "genindex", "api/index", "api/conditions"),
    *(f"notebooks/{name}" for name in NOTEBOOKS),
]
# one page of each kind, for what would take long on all of them
KINDS = ["index", "claims", "exercises", "api/conditions", f"notebooks/{NOTEBOOKS[0]}"]
PHONE, DESK = {"width": 375, "height": 740}, {"width": 1366, "height": 900}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not (HTML / "index.html").is_file():
        pytest.fail("no site in build/site/html; run make site first", pytrace=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
    page = open_page("index")
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
        assert any(w in words for w in ("reproduced", "partly", "not attempted")), words


def test_mathematics_is_typeset(open_page: Any) -> None:
    page = open_page("index")
    page.wait_for_selector("mjx-container svg")
