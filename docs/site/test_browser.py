"""The built site, opened in a headless Chromium: ``make docs-test``.

Pictures of some pages, in light, dark and on a phone, are left in build/screenshots.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

from tests.support.chromium import Browser
from tests.support.documents import PROJECT

SITE = PROJECT / "build" / "site"
PAGES = sorted(path.name for path in SITE.glob("*.html"))
DESKTOP = (1280, 900)
PHONE = (390, 844)
PICTURED = (
    "index",
    "getting-started",
    "how-it-works",
    "benchmarks",
    "records",
    "configuration",
    "architecture",
    "api-caches",
)


class Page(HTMLParser):
    """The targets of a page's links, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.resources: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and (target := given.get("href")):
            self.links.add(target)
        for name in ("src", "href"):
            if tag != "a" and given.get("rel") != "canonical" and (target := given.get(name)):
                self.resources.add(target)


@functools.cache
def read(path: Path) -> Page:
    return Page(path)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of the site, served on loopback."""
    assert PAGES, "the site isn't built: run make docs"
    handler = functools.partial(Handler, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def browser(chromium: Browser, url: str) -> Iterator[Browser]:
    """A browser that begins without settings; a problem or a request elsewhere fails the test."""
    chromium.problems.clear()
    chromium.requests.clear()
    chromium.call("Network.clearBrowserCookies")
    chromium.call("Storage.clearDataForOrigin", origin=url.rstrip("/"), storageTypes="all")
    chromium.resize(*DESKTOP)
    chromium.prefer("light")
    yield chromium
    assert chromium.problems == []
    assert not [one for one in chromium.requests if not one.startswith((url, "data:", "blob:"))]


# -- the files


def test_the_site_is_whole() -> None:
    assert len(PAGES) > 40
    assert {"index.html", "records.html", "api-caches.html", "404.html"} <= {*PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = read(SITE / name)
    assert page.links
    missing = []
    for target in page.links | page.resources:
        parts = urlsplit(target)
        if parts.scheme in ("https", "mailto", "data"):
            continue
        # The page of missing pages is served at any address, so that its links are absolute.
        address, anchor = urldefrag(urljoin(f"/{name}", target))
        path = SITE / unquote(address).lstrip("/")
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file() or (
            anchor and path.suffix == ".html" and unquote(anchor) not in read(path).anchors
        ):
            missing.append(target)
    assert not [one for one in missing if not one.endswith(("#only-light", "#only-dark"))]


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    resources = read(SITE / name).resources
    assert resources
    assert not [one for one in resources if re.match(r"(https?:)?//", one)]


# -- the pages in a browser

# Parts of the text that reach beyond the right edge and are in no box that scrolls.
CUT = """
[...document.querySelectorAll('.md-content :is(p,li,h1,h2,h3,h4,pre,table,img,code,.tabbed-set)')]
  .filter(one => {
    const box = one.getBoundingClientRect()
    if (!box.width || box.right <= innerWidth + 1) return false
    for (let around = one; around; around = around.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(around).overflowX)) return false
    return true
  }).map(one => one.outerHTML.slice(0, 120))
"""
# Code that is wider than its box, which doesn't scroll.
HIDDEN = """
[...document.querySelectorAll('.highlight code')]
  .filter(one => one.scrollWidth > one.clientWidth + 1)
  .filter(one => !['auto', 'scroll'].includes(getComputedStyle(one).overflowX))
  .map(one => one.textContent.slice(0, 120))
"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(browser: Browser, url: str, name: str) -> None:
    browser.resize(*PHONE, phone=True)
    browser.open(url + name)
    assert browser.run("document.querySelectorAll('h1').length") == 1
    assert browser.run("innerWidth") == PHONE[0]
    assert browser.run("document.documentElement.scrollWidth") == PHONE[0]
    assert browser.run("document.body.scrollWidth") <= PHONE[0]
    assert browser.run(CUT) == []
    assert browser.run(HIDDEN) == []


@pytest.mark.parametrize("name", [f"{name}.html" for name in PICTURED])
def test_pictures(browser: Browser, url: str, name: str) -> None:
    for kind, size, scheme in (
        ("light", DESKTOP, "light"),
        ("dark", DESKTOP, "dark"),
        ("phone", PHONE, "light"),
        ("phone-dark", PHONE, "dark"),
    ):
        browser.resize(*size, phone=size == PHONE)
        browser.prefer(scheme)
        browser.open(url + name)
        wanted = "slate" if scheme == "dark" else "default"
        browser.wait(f"document.body.dataset.mdColorScheme === '{wanted}'")
        # Every image is loaded before the picture is taken.
        browser.run("Promise.all([...document.images].map(one => one.decode().catch(() => 0)))")
        path = PROJECT / "build" / "screenshots" / f"{Path(name).stem}-{kind}.png"
        path.unlink(missing_ok=True)
        browser.screenshot(path)
        assert path.stat().st_size > 10_000


# The contrast of the smallest-contrast text of some kind with the page behind it, as in WCAG.
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const known = new Map()
  const paint = (...colours) => {
    const key = colours.join()
    if (!known.has(key)) known.set(key, painted(colours))
    return known.get(key)
  }
  const painted = colours => {
    canvas.clearRect(0, 0, 1, 1)
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1) }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
  }
  const light = parts => parts
    .map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0)
  const worst = { ratio: 99 }
  for (const one of document.querySelectorAll(
    '.md-content :is(p, li, td, th, a, h1, h2, h3, code, code span)'
  )) {
    if (![...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue
    if (!one.getClientRects().length || one.classList.contains('headerlink')) continue
    const behind = []
    for (let around = one; around; around = around.parentElement)
      behind.unshift(getComputedStyle(around).backgroundColor)
    const back = light(paint('#fff', ...behind))
    const text = light(paint('#fff', ...behind, getComputedStyle(one).color))
    const ratio = (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05)
    if (ratio < worst.ratio) Object.assign(worst, { ratio, html: one.outerHTML.slice(0, 120) })
  }
  return worst
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "records.html", "api-caches.html", "cli.html"])
def test_text_can_be_read(browser: Browser, url: str, name: str, scheme: str) -> None:
    browser.prefer(scheme)
    browser.open(url + name)
    worst = browser.run(CONTRAST)
    assert worst["ratio"] >= 4.5, worst


def test_the_switch_of_the_scheme(browser: Browser, url: str) -> None:
    browser.open(f"{url}index.html")
    shown = "[...document.querySelectorAll('img')].filter(one => one.getClientRects().length)"
    drawings = f"{shown}.map(one => one.src.split('/').pop().split('#')[0])"
    seen = []
    for _ in range(4):
        seen.append(browser.run("document.body.dataset.mdColorScheme"))
        wanted = "dark" if seen[-1] == "slate" else "light"
        assert browser.run(drawings) == [f"speed-{wanted}.svg"]
        browser.run(
            "[...document.querySelectorAll('[data-md-component=palette] label')]"
            ".find(one => !one.hidden).click()"
        )
    # By the system, light, dark, and by the system again.
    assert seen == ["default", "default", "slate", "default"]


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("expire", "records.html"),
        ("django", "frameworks.html"),
        ("django", "django.html"),
        ("pydantic", "records.html"),
        ("if_version", "records.html"),
        ("ConnectionLost", "failures.html"),
        ("commandTimeout", "configuration.html"),
        ("fetch_bulk", "api-caches.html"),
        ("sentinel", "configuration.html"),
    ],
)
def test_search(browser: Browser, url: str, word: str, page: str) -> None:
    browser.open(f"{url}index.html")
    browser.run("document.querySelector('.md-search__input').focus()")
    browser.type(word)
    results = "[...document.querySelectorAll('.md-search-result__item')]"
    found = browser.wait(
        f"(all => all.length && all)({results}.map(one => "
        "[one.querySelector('a').href, one.querySelector('h1')?.textContent]))"
    )
    pages = [urlsplit(target).path.lstrip("/") for target, _ in found]
    # Each result begins with the name of its page. The source of the API is left out.
    sources = f"{results}.filter(one => one.querySelector('a').href.includes('/api-'))"
    assert not browser.run(f"{sources}.some(one => one.textContent.includes('self._'))")
    assert all(title for _, title in found)
    assert page in pages[:5]


def test_tabs_of_async_and_blocking(browser: Browser, url: str) -> None:
    browser.open(f"{url}getting-started.html")
    labels = "[...document.querySelectorAll('.tabbed-labels label')].map(one => one.textContent)"
    assert {*browser.run(labels)} == {"Async", "Blocking"}
    shown = (
        "[...document.querySelectorAll('.tabbed-block')]"
        ".filter(one => one.getClientRects().length).map(one => one.textContent).join()"
    )
    assert "async def" in browser.run(shown)
    # All tabs of a page follow one choice.
    browser.run("document.querySelectorAll('.tabbed-labels label a')[1].click()")
    browser.wait(f"!({shown}).includes('async def')")
    assert "with dscache.Cache" in browser.run(shown)


def test_code_is_copied_without_prompts(browser: Browser, url: str) -> None:
    browser.call(
        "Browser.grantPermissions",
        permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
        origin=url.rstrip("/"),
    )
    browser.call("Page.bringToFront")
    browser.open(f"{url}records.html")
    blocks = browser.run("document.querySelectorAll('.highlight pre').length")
    button = "document.querySelectorAll('[data-md-type=copy]')"
    browser.wait(f"{button}.length === {blocks}")
    browser.run(f"{button}[0].click()")
    copied = browser.wait("navigator.clipboard.readText()")
    assert copied.startswith("import dscache")
    assert "\nawait cache.set(" in copied
    assert ">>>" not in copied


@pytest.mark.parametrize("name", ["api-caches.html", "api-messages.html"])
def test_the_api_tells_arguments_results_and_errors(browser: Browser, url: str, name: str) -> None:
    browser.open(url + name)
    text = browser.run("document.querySelector('.md-content').textContent")
    for heading in ("Parameters:", "Returns:", "Raises:", "Source code in"):
        assert heading in text
