"""Every page of the site in a real browser, from files, with no network at all.

Wants Chromium: on the PATH, or named by the variable CHROMIUM. Debian has it as a package.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

from tools import notebooks, pages, showdoc, site
from vlm_course.appendix import glossary

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    pytest.skip("playwright is not installed", allow_module_level=True)

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if not BROWSER:
    pytest.skip("no Chromium on the PATH and none in CHROMIUM", allow_module_level=True)

AXE = notebooks.ROOT / "tests" / "assets" / "axe-core" / "axe.min.js"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PAGES = [
    *(site.page_path(path).as_posix() for path in notebooks.all_notebooks()),
    *(f"reference/{pages.short(module)}.html" for module, _ in site.modules()),
    "reference/index.html",
    "bibliography.html",
]

# What a reader would see of an unfinished page. Code and the source of formulas may hold anything.
FAULTS = r"""() => {
  const found = [];
  const text = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const unread = "pre, code, script, style, noscript, .katex, dialog";
  while (walk.nextNode()) {
    if (!walk.currentNode.parentElement.closest(unread)) {
      text.push(walk.currentNode.data);
    }
  }
  const all = text.join("\n");
  const raw = {
    "raw TeX": /\\[a-zA-Z]{2,}|\$\$|\\[()[\]]/, "directive": /:::|\{\{<|\{#|\{\.[a-z]/,
    "reference": /@(eq|fig|tbl|sec)-\w|\[@\w/, "table": /^\|.*\|$/m, "option": /^#\|/m,
  };
  for (const [name, pattern] of Object.entries(raw)) {
    const hit = all.match(pattern);
    if (hit) found.push(`${name}: ${all.slice(Math.max(0, hit.index - 30), hit.index + 40)}`);
  }
  for (const span of document.querySelectorAll("span.math")) {
    if (!span.querySelector(".katex")) found.push(`formula not drawn: ${span.textContent}`);
  }
  for (const wrong of document.querySelectorAll(".katex-error")) {
    found.push(`formula: ${wrong.title}`);
  }
  for (const image of document.images) {
    if (!image.alt.trim()) found.push(`no alt text: ${image.src.slice(-40)}`);
  }
  if (!document.querySelector("main h1, h1")) found.push("no title");
  if (!document.documentElement.lang) found.push("no language");
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  const twice = ids.filter((id, n) => ids.indexOf(id) !== n && !id.startsWith("cb"));
  if (twice.length) found.push(`ids twice: ${[...new Set(twice)].slice(0, 5)}`);
  return found;
}"""
LINKS = """() => [...document.querySelectorAll("[href], [src]")]
  .map((e) => e.href?.baseVal ?? e.href ?? e.src).filter((a) => a && a.startsWith("file:"))"""
IDS = """() => [...document.querySelectorAll("[id], a[name]")].map((e) => e.id || e.name)"""
# Thousands of coloured words and formulas look alike: axe sees the first of each block whole, the
# rest as plain text.
LIGHTEN = """() => {
  const blocks = [...document.querySelectorAll("main pre")];
  for (const block of blocks.slice(4)) (block.querySelector("code") ?? block).textContent = "code";
  for (const formula of document.querySelectorAll("main .katex")) formula.textContent = "formula";
}"""
SERIOUS = """async (rules) => {
  const tags = {type: "tag", values: ["wcag2a", "wcag2aa", "best-practice"]};
  const only = rules ? {type: "rule", values: rules} : tags;
  const options = {runOnly: only, resultTypes: ["violations"], preload: false};
  const {violations} = await axe.run(document, options);
  return violations.filter((v) => ["serious", "critical"].includes(v.impact))
    .map(({id, nodes: [first, ...more]}) => `${id}: ${1 + more.length} x`
      + ` ${first.html.slice(0, 160)}`
      + ` ${first.any[0]?.message ?? ""}`);
}"""
TOO_WIDE = """() => {
  const wide = document.documentElement.scrollWidth;
  if (wide <= innerWidth) return [];
  const scrolls = "pre, .table-scroll, .cell-output-display, .katex-display";
  const who = [...document.querySelectorAll("main *")].filter((e) => !e.closest(scrolls)
    && e.getBoundingClientRect().right > innerWidth + 1);
  return [`${wide} pixels wide: ${who.slice(0, 3).map((e) => e.outerHTML.slice(0, 120))}`];
}"""


class Visitor:
    """One tab, with the network closed: it records what a page asks for, logs, and links to."""

    def __init__(self, context, root: Path):
        self.root, self.asked, self.logged, self.links, self.ids = root, [], [], {}, {}
        context.route("**/*", self.gate)
        self.tab = context.new_page()
        self.tab.on("console", self.log)
        self.tab.on("pageerror", lambda error: self.logged.append(str(error)))

    def gate(self, route) -> None:
        """Let files through and nothing else."""
        url = route.request.url
        if url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:")):
            route.continue_()
        else:
            self.asked.append(url)
            route.abort()

    def log(self, message) -> None:
        """Keep errors and warnings of the console."""
        if message.type in ("error", "warning"):
            self.logged.append(message.text)

    def open(self, name: str, *, size: dict = WIDE, theme: str = "light"):
        """The tab with a page of the site in it, in a window of `size`."""
        self.asked.clear()
        self.logged.clear()
        self.tab.set_viewport_size(size)
        self.tab.emulate_media(color_scheme=theme)
        self.tab.goto((self.root / name).as_uri())
        return self.tab


@pytest.fixture(scope="module")
def playwright():
    """Playwright, started once: a process may have only one."""
    with sync_playwright() as tools:
        yield tools


@pytest.fixture(scope="module")
def visitor(built, playwright):
    """A browser, started once."""
    arguments = ["--no-sandbox", "--blink-settings=imagesEnabled=false"]  # none is looked at
    browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
    context = browser.new_context(bypass_csp=True, reduced_motion="reduce")
    yield Visitor(context, built)
    browser.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole(name, visitor):
    """Nothing unrendered, no error, no request elsewhere, no serious fault in either theme."""
    tab = visitor.open(name, size=NARROW)
    faults = tab.evaluate(FAULTS) + tab.evaluate(TOO_WIDE)
    visitor.links[name], visitor.ids[name] = tab.evaluate(LINKS), set(tab.evaluate(IDS))
    tab.evaluate(LIGHTEN)
    tab.set_viewport_size(WIDE)
    tab.add_script_tag(path=AXE)
    faults += tab.evaluate(SERIOUS, None)
    tab.evaluate("() => document.querySelector('.theme-switch').click()")
    assert tab.evaluate("() => document.documentElement.dataset.bsTheme") == "dark"
    faults += [f"dark: {fault}" for fault in tab.evaluate(SERIOUS, ["color-contrast"])]
    tab.evaluate("() => localStorage.clear()")
    assert faults + visitor.logged + visitor.asked == []


def test_links_between_pages_lead_somewhere(visitor):
    """Every link, with its anchor, of every page that was opened above."""
    assert len(visitor.links) == len(PAGES), "run the whole file"
    root, dead = visitor.root, []
    for name, links in visitor.links.items():
        for link in sorted(set(links)):
            address, _, anchor = link.partition("#")
            path = Path(unquote(address.partition("?")[0].removeprefix("file://")))
            path = path / "index.html" if path.is_dir() else path
            inside = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
            known = visitor.ids.get(inside)
            lost = anchor and known and unquote(anchor) not in known
            if not inside or not path.exists() or lost:
                dead.append(f"{name}: {link.removeprefix(root.as_uri())}")
    assert dead == []


@pytest.mark.parametrize("old", site.redirects())
def test_old_address_leads_to_the_new_page(old, visitor):
    tab = visitor.open(old)
    tab.wait_for_url(f"**/{site.redirects()[old]}", timeout=5000)
    assert visitor.logged + visitor.asked == []


def look_up(tab, word: str) -> list[str]:
    """Where the search leads for a word, typed into it from the keyboard."""
    tab.keyboard.press("/")
    tab.keyboard.type(word)
    done = "word => document.querySelector('dialog.search').dataset.searched === word"
    tab.wait_for_function(done, arg=word, timeout=5000)
    return [link.get_attribute("href") for link in tab.query_selector_all("dialog.search li a")]


def test_search_finds_words_and_symbols_from_a_file(visitor):
    tab = visitor.open("foundations/images.html")
    assert any("rotation.html" in href for href in look_up(tab, "gidaris rotation"))
    tab = visitor.open("foundations/images.html")
    assert "reference/self_supervised.contrastive.html#nt_xent" in look_up(tab, "nt_xent")[0]
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/self_supervised.contrastive.html#nt_xent", timeout=5000)
    tab = visitor.open("index.html")
    assert look_up(tab, "qwxyzqwxyz") == []
    tab.keyboard.press("Escape")
    assert not tab.evaluate("() => document.querySelector('dialog.search').open")


def test_search_finds_words_from_a_server(visitor):
    handler = functools.partial(Quiet, directory=str(visitor.root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        visitor.tab.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        assert look_up(visitor.tab, "augmentation")
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that does not log."""

    def log_message(self, *_):
        pass


def test_theme_follows_the_system_then_the_reader(visitor):
    theme = "() => document.documentElement.dataset.bsTheme"
    tab = visitor.open("index.html", theme="dark")
    tab.evaluate("() => localStorage.clear()")
    assert visitor.open("index.html", theme="dark").evaluate(theme) == "dark"
    tab.click(".theme-switch")
    assert tab.evaluate(theme) == "light"
    assert visitor.open("transfer/finetune.html", theme="dark").evaluate(theme) == "light"
    colour = "() => getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(colour) == "rgb(255, 255, 255)"
    tab.evaluate("() => localStorage.clear()")


def test_keyboard_reaches_the_content(visitor):
    tab = visitor.open("self_supervised/rotation.html")
    tab.keyboard.press("Tab")
    assert tab.evaluate("() => document.activeElement.className") == "skip-link"
    tab.keyboard.press("Enter")
    assert tab.evaluate("() => document.activeElement.tagName") == "MAIN"
    tab.keyboard.press("Tab")
    assert tab.evaluate("() => !!document.activeElement.closest('main')")
    style = "() => getComputedStyle(document.activeElement).outlineStyle"
    assert tab.evaluate(style) == "solid"  # the focus can be seen


def test_solutions_open_by_keyboard(visitor):
    tab = visitor.open("self_supervised/rotation.html")
    head = tab.locator(".callout-header[role=button]").first
    assert head.get_attribute("aria-expanded") == "false"
    head.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".callout-header[aria-expanded=true]", timeout=5000)


def test_code_folds_and_paper_shows_no_navigation(visitor):
    tab = visitor.open("self_supervised/rotation.html")
    shown = "() => document.querySelectorAll('details.code-fold[open]').length"
    assert tab.evaluate(shown) > 10
    tab.click(".fold-code")
    assert tab.evaluate(shown) == 0
    tab.emulate_media(media="print")
    assert not tab.is_visible("#quarto-sidebar") and not tab.is_visible(".page-tools")
    assert tab.is_visible("main h1")
    tab.emulate_media(media="screen")


def test_contents_follow_the_reader(visitor):
    tab = visitor.open("self_supervised/rotation.html")
    active = "() => document.querySelector('#TOC a.active')?.getAttribute('href')"
    tab.evaluate("() => document.querySelector('#failure-lab').scrollIntoView()")
    tab.wait_for_function(f"() => ({active})() === '#failure-lab'", timeout=5000)


SHOWN = """() => [...document.querySelectorAll('main li > strong[id^="term-"]')]
  .filter((e) => e.offsetParent).map((e) => e.id)"""


def test_glossary_shows_only_what_is_typed(visitor):
    """In either language, with or without tones; what is left is said, and reached by keys."""
    tab, terms = visitor.open("appendix/glossary.html"), glossary.load_glossary()
    field, said = tab.get_by_label("Only terms with"), tab.locator(".filter [role=status]")
    assert set(tab.evaluate(SHOWN)) == {term.id for term in terms}
    assert said.text_content() == f"{len(terms)} terms"
    for typed in ("Backbone", "骨干", "gǔ gàn", "gugan", "frechet", "噪声", "qwxyz"):
        field.fill(typed)
        shown = tab.evaluate(SHOWN)
        assert {term.id for term in glossary.look_up(typed)} <= set(shown) and len(shown) < 30
        assert said.text_content() == f"{len(shown)} of {len(terms)} terms"
        letters = tab.locator("#english-to-chinese section:visible").count()
        assert letters == len({glossary.plain(t.term)[0] for t in terms if t.id in shown})
    field.press("Escape")
    assert len(tab.evaluate(SHOWN)) == len(terms)
    field.press_sequentially("warm-up")
    field.press("Enter")
    inside = "() => document.activeElement.closest('li').querySelector('strong').id"
    assert tab.evaluate(inside) == tab.evaluate(SHOWN)[0]
    tab.locator("#chinese-to-english a[href='#term-backbone']").click()
    tab.wait_for_function(f"() => ({SHOWN})().length === {len(terms)}", timeout=5000)


def test_glossary_is_a_list_without_scripts(visitor):
    context = visitor.tab.context.browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((visitor.root / "appendix/glossary.html").as_uri())
    entries = tab.locator("main li > strong[id^=term-]:visible").count()
    assert entries == len(glossary.load_glossary())
    assert tab.locator(".filter").count() == 0
    context.close()


WEIGHTS = {  # pages, and the most that one may load before a reader scrolls, in bytes
    "index.html": 1_500_000,
    "self_supervised/rotation.html": 2_000_000,
    "reference/foundations.images.html": 1_200_000,
}
WATCH = """() => {
  window.seen = {shift: 0, largest: 0};
  const watch = (type, take) => new PerformanceObserver((list) => list.getEntries().forEach(take))
    .observe({type, buffered: true});
  watch("layout-shift", (e) => { if (!e.hadRecentInput) seen.shift += e.value; });
  watch("largest-contentful-paint", (e) => { seen.largest = e.startTime; });
}"""
LOADED = """() => {
  const all = [...performance.getEntriesByType("navigation"),
    ...performance.getEntriesByType("resource")];
  return {
    bytes: all.reduce((sum, e) => sum + e.transferSize, 0), requests: all.length,
    first: performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? 0, ...seen,
    unsized: [...document.images].filter((i) => !(i.getAttribute("width") && i.height)
      && !i.src.startsWith("data:")).map((i) => i.src),
  };
}"""
SCROLL = """async () => {
  for (let y = 0; y < document.body.scrollHeight; y += 700) {
    scrollTo(0, y);
    await new Promise((done) => setTimeout(done, 15));
  }
  return seen.shift;
}"""


@pytest.fixture(scope="module")
def served(built, playwright):
    """Opens a page as readers do: from a server, with pictures, nothing stored from before."""
    handler = functools.partial(Quiet, directory=str(built))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])

        def fetch(name: str, size: dict = WIDE):
            tab = browser.new_context(viewport=size).new_page()
            tab.add_init_script(f"({WATCH})()")
            tab.goto(f"http://127.0.0.1:{server.server_port}/{name}", wait_until="load")
            tab.wait_for_function("() => seen.largest > 0", timeout=20_000)
            return tab

        yield fetch
        browser.close()
        server.shutdown()


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_page_is_light_and_nothing_jumps(name, size, served, record_property):
    """What Lighthouse looks at first. Bytes are those of a server that compresses nothing."""
    tab = served(name, size)
    found = tab.evaluate(LOADED)
    found["shift"] = max(found["shift"], tab.evaluate(SCROLL))
    record_property("found", found)
    assert 0 < found["bytes"] < WEIGHTS[name] and found["requests"] < 40
    assert found["shift"] < 0.1 and found["unsized"] == []
    assert 0 < found["first"] <= found["largest"] < 20_000  # milliseconds, on a busy machine
    tab.context.close()


OUTSIDE = """() => [...document.querySelectorAll(".vlm-touch *")].filter((e) =>
  e.getBoundingClientRect().right > e.closest(".vlm-touch").getBoundingClientRect().right + 1)
  .map((e) => e.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_controls_of_figures_fit_into_their_pages(size, built, served):
    touched = [name for name in PAGES if 'class="vlm-touch"' in (built / name).read_text("utf-8")]
    assert len(touched) > 2
    for name in touched:
        tab = served(name, size)
        tab.wait_for_function("() => !document.querySelector('.vlm-touch:not(.live)')")
        assert tab.evaluate(OUTSIDE) == [], name
        tab.context.close()


def test_pages_say_what_they_are(built):
    """A title and a description of its own, the language, and a window that can be enlarged."""
    titles, descriptions = [], []
    for name in PAGES:
        page = BeautifulSoup((built / name).read_text("utf-8"), "lxml")
        titles.append(page.title.get_text())
        descriptions.append(page.find("meta", attrs={"name": "description"})["content"])
        view = page.find("meta", attrs={"name": "viewport"})["content"]
        assert page.html["lang"] == "en" and "width=device-width" in view, name
        assert not re.search(r"user-scalable=(no|0)|maximum-scale", view), name
        assert 3 < len(titles[-1]) <= 90 and 10 < len(descriptions[-1]) <= 200, name
    assert len(set(titles)) == len(set(descriptions)) == len(PAGES)


def test_reference_shows_every_exported_symbol(visitor):
    """A heading, or a row of the constants, for each name of `__all__`."""
    for module, _ in site.modules():
        ids = visitor.ids.get(f"reference/{pages.short(module)}.html")
        assert ids is not None, "run the whole file"
        assert {showdoc.anchor(name) for name in module.__all__} <= ids
