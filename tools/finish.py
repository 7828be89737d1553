"""What each rendered page gets that neither renderer gives: both end up with the same site.

Everything a page loads lies in the site. Landmarks have names, tables scroll, Chinese is marked as
such. Search, theme, downloads and the footer are ours. Works on the HTML that was written.
"""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
from pathlib import Path
from urllib.parse import urlparse

from lxml import html as markup

from tools.notebooks import ROOT, settings

# Hosts of repositories, and where they show a file.
HOSTS = {
    "github.com": "blob",
    "gitlab.com": "-/blob",
    "codeberg.org": "src/branch",
    "gitee.com": "blob",
}
COLAB = "https://colab.research.google.com/github"
LICENCES = {"LICENSE": "Apache 2.0", "LICENSE-CONTENT": "CC BY 4.0"}
LANDMARKS = {
    "navbar": "Site",
    "quarto-secondary-nav": "Place in the course",
    "quarto-page-breadcrumbs": "Breadcrumbs",
    "sidebar-navigation": "Chapters",
    "page-navigation": "Previous and next",
}
CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3000-\u303f\uff00-\uffef]+")
# Before the first paint, so that no page flashes in the wrong theme.
THEME = (
    'var t=null;try{t=localStorage.getItem("course-theme")}catch(e){}'
    't=t||(matchMedia("(prefers-color-scheme: dark)").matches?"dark":"light");'
    "var d=document.documentElement;d.dataset.bsTheme=t;"
    'd.classList.toggle("quarto-dark",t==="dark");'
)


# ----------------------------------------------------------------------------------- where it lies


def published(values: dict[str, str]) -> bool:
    """Whether git_url in settings.ini is a repository that readers can open: a known host, and the
    line `published = True`."""
    host = urlparse(values["git_url"]).hostname
    return host in HOSTS and values.get("published", "").lower() == "true"


def source_url(values: dict[str, str], path: str) -> str:
    """Where the host shows a file of the repository; "" where there is none."""
    if not published(values):
        return ""
    host = HOSTS[urlparse(values["git_url"]).hostname]
    return f"{values['git_url'].rstrip('/')}/{host}/{values['branch']}/{path}"


def colab_url(values: dict[str, str], path: str) -> str:
    """Where Colab opens a notebook of the repository; "" unless GitHub has it."""
    if not published(values) or urlparse(values["git_url"]).hostname != "github.com":
        return ""
    return f"{COLAB}{urlparse(values['git_url']).path.rstrip('/')}/blob/{values['branch']}/{path}"


# -------------------------------------------------------------------------------- parts of a page


def element(text: str) -> markup.HtmlElement:
    """One element from its HTML."""
    return markup.fragment_fromstring(text)


def with_class(page, name: str) -> list:
    """The elements that have a class."""
    return page.xpath(f'//*[contains(concat(" ", normalize-space(@class), " "), " {name} ")]')


def keep_local(page) -> None:
    """Drop scripts and styles of other hosts, and what starts a formula library of theirs."""
    for tag in page.xpath("//script | //link[@rel='stylesheet']"):
        address = tag.get("src") or tag.get("href") or ""
        starts = re.search(r"katex\.render|renderMathInElement|MathJax", tag.text or "")
        if re.match(r"(https?:)?//", address) or (tag.tag == "script" and not address and starts):
            tag.drop_tree()
    for span in with_class(page, "math"):
        if len(span) == 0 and span.text:
            span.text = re.sub(r"^\s*\\[(\[]|\\[)\]]\s*$", "", span.text)


def add_head(page, way: str) -> None:
    """Theme, fonts, formulas and behaviour."""
    head = page.find("head")
    head.insert(1, element(f"<script>{THEME}</script>"))
    files = [f'<link rel="stylesheet" href="{way}assets/fonts.css">']
    if with_class(page, "math"):
        files += [
            f'<link rel="stylesheet" href="{way}assets/katex/katex.min.css">',
            f'<script src="{way}assets/katex/katex.min.js" defer></script>',
        ]
    files += [
        f'<meta name="course-root" content="{way or "./"}">',
        f'<script src="{way}assets/course.js" defer></script>',
    ]
    for text in files:
        head.append(element(text))


def name_landmarks(page) -> None:
    """A skip link, and a name for each part of the navigation."""
    body, main = page.find("body"), page.xpath("//main")[0]
    main.set("id", main.get("id") or "content")
    main.set("tabindex", "-1")
    start = f"#{main.get('id')}"
    body.insert(0, element(f'<a class="skip-link" href="{start}">Skip to the content</a>'))
    for name, label in LANDMARKS.items():
        for nav in with_class(page, name):
            if nav.tag == "nav":
                nav.set("aria-label", label)
    for contents in page.xpath("//nav[@id='TOC']"):
        contents.set("aria-label", "On this page")
    for link in page.xpath("//a[@id='quarto-back-to-top']"):
        del link.attrib["role"]
        link.attrib.pop("onclick", None)
        link.set("href", start)


def name_controls(page) -> None:
    """Buttons where a link or a box opens something, with names; icons say nothing."""
    for link in page.xpath("//a[@role='navigation']"):
        del link.attrib["role"]
        if not link.get("href"):
            link.tag = "button"
            link.set("type", "button")
    for button in with_class(page, "code-copy-button"):
        button.set("aria-label", "Copy this code")
    for icon in with_class(page, "bi"):
        icon.attrib.pop("role", None)
        icon.set("aria-hidden", "true")
    for part in with_class(page, "callout-header"):
        if part.get("data-bs-toggle"):
            part.set("role", "button")
            part.set("tabindex", "0")


def separate_ids(page) -> None:
    """One owner for each id: a symbol keeps its own, a heading of the same name makes way."""
    owners: dict[str, list] = {}
    for tag in page.xpath("//main//*[@id]"):
        owners.setdefault(tag.get("id"), []).append(tag)
    for name, found in owners.items():
        links = page.xpath(f"//nav[@id='TOC']//a[@href='#{name}']") if '"' not in name else []
        keeper = next((tag for tag in found if is_symbol(tag)), found[0])
        for number, tag in enumerate(found):
            if tag is not keeper:
                tag.set("id", f"{name}-text{number or ''}")
                for heading in tag.xpath("self::*|*[@data-anchor-id]")[:2]:
                    if heading.get("data-anchor-id"):
                        heading.set("data-anchor-id", tag.get("id"))
                if len(links) == len(found):
                    links[number].set("href", f"#{tag.get('id')}")
                    links[number].set("data-scroll-target", f"#{tag.get('id')}")


def is_symbol(tag) -> bool:
    """Whether an element with an id is the heading of a symbol, or the section around it."""
    headings = [tag, *tag.xpath("*[self::h2 or self::h3 or self::h4]")[:1]]
    return any("symbol" in (heading.get("class") or "").split() for heading in headings)


def draw_contents(page) -> None:
    """Formulas in the table of contents, as in the headings; no ids, which could meet others."""
    for link in page.xpath("//nav[@id='TOC']//a"):
        link.attrib.pop("id", None)
        target = (link.get("href") or "#").partition("#")[2]
        holder = page.xpath("//main//*[@id=$id]", id=target)
        own = "self::h2 | self::h3 | self::h4 | ./h2 | ./h3 | ./h4"
        heading = next(iter(holder[0].xpath(own)), None) if holder else None
        if heading is not None and heading.xpath(".//span[contains(@class, 'math')]"):
            kept = heading.xpath("*[contains(@class, 'math') or self::em or self::code]")
            link.text, link[:] = heading.text, [copy.deepcopy(child) for child in kept]


def wrap_tables(page) -> None:
    """Each table in a box that scrolls by itself; what arguments are for is not squeezed."""
    for table in page.xpath("//main//table"):
        box = element('<div class="table-scroll" data-label="Table, scrolls sideways"></div>')
        heads = table.xpath(".//th")
        if heads and heads[-1].text_content().strip() == "Details":
            box.set("class", "table-scroll arguments")
        box.tail, table.tail = table.tail, None
        table.getparent().replace(table, box)
        box.append(table)


def mark_chinese(page) -> None:
    """lang="zh" around every run of Chinese in running text."""
    unread = "self::script or self::style or self::svg or self::pre or @lang='zh'"
    skipped = f"ancestor-or-self::*[{unread}]"
    for node in page.xpath("//body//text()"):
        holder = node.getparent()
        owner = holder if node.is_text else holder.getparent()
        if not CHINESE.search(node) or owner is None or owner.xpath(skipped):
            continue
        before, spans = split_chinese(str(node))
        if node.is_text:
            holder.text = before
            holder[:0] = spans
        else:
            holder.tail = before
            at = owner.index(holder) + 1
            owner[at:at] = spans


def split_chinese(text: str) -> tuple[str, list]:
    """The text before the first run of Chinese, and a span for each run with what follows it."""
    runs = list(CHINESE.finditer(text))
    ends = [run.start() for run in runs[1:]] + [len(text)]
    spans = []
    for run, end in zip(runs, ends, strict=True):
        span = markup.Element("span", lang="zh")
        span.text, span.tail = run.group(), text[run.end() : end]
        spans.append(span)
    return text[: runs[0].start()], spans


def add_tools(page, notebook: str, way: str, values: dict[str, str]) -> None:
    """Search and theme in the bar; download, Colab and folding under the title."""
    bars = page.xpath("//nav[contains(@class, 'navbar')]//*[contains(@class, 'navbar-container')]")
    if bars:
        bars[0].append(
            element(
                '<div class="navbar-tools"><button type="button" class="open-search">Search'
                '<kbd>/</kbd></button><button type="button" class="theme-switch" '
                'aria-label="Theme">◐</button></div>'
            )
        )
    if not notebook:
        return
    tools = [f'<a href="{way}notebooks/{notebook}" download>Download the notebook</a>']
    if url := colab_url(values, f"nbs/{notebook}"):
        tools.append(f'<a href="{html.escape(url)}">Open in Colab</a>')
    if with_class(page, "code-fold"):
        fold = '<button type="button" class="fold-code" aria-pressed="false">'
        tools.append(f"{fold}Fold all code</button>")
    block = element(f'<div class="page-tools">{"".join(tools)}</div>')
    title = page.xpath("//main//header[@id='title-block-header']")
    if title:
        title[0].addnext(block)
    else:
        page.xpath("//main")[0].insert(0, block)


def add_footer(page, notebook: str, way: str, values: dict[str, str]) -> None:
    """Copyright, licences, source and download, after everything else."""
    code, text = (f'<a href="{way}{file}.txt">{name}</a>' for file, name in LICENCES.items())
    parts = [f"© {html.escape(values['copyright'])}", f"Code: {code}", f"Text and figures: {text}"]
    parts.append("Pictures: their own licences, in <code>data/</code>")
    if notebook:
        parts.append(f'<a href="{way}notebooks/{notebook}" download>Notebook of this page</a>')
        if url := source_url(values, f"nbs/{notebook}"):
            parts.append(f'<a href="{html.escape(url)}">Source</a>')
    elif published(values):
        parts.append(f'<a href="{html.escape(values["git_url"])}">Source</a>')
    page.find("body").append(element(f'<footer class="footer">{" · ".join(parts)}</footer>'))


# ----------------------------------------------------------------------------------------- search


def words(node) -> str:
    """The running text of an element, without code blocks and scripts."""
    unread = "ancestor::*[self::pre or self::script or self::style or self::svg or self::details]"
    return " ".join("".join(node.xpath(f".//text()[not({unread})]")).split())


def search_entries(page, address: str) -> list[list[str]]:
    """[address, title, section, text] for the page's opening and for each of its sections."""
    titles = page.xpath("//h1")
    title = words(titles[0]) if titles else address
    main = page.xpath("//main")[0]
    found, current = [], [address, title, "", ""]
    skipped = ("nav", "header", "script", "style", "pre", "details", "button")

    def walk(node) -> None:
        nonlocal current
        for child in node.iterchildren(tag=markup.etree.Element):
            if child.tag in skipped or not isinstance(child.tag, str):
                continue
            if child.tag in ("h2", "h3", "h4"):
                found.append(current)
                holder = child if child.get("id") else child.getparent()
                anchor = child.get("data-anchor-id") or holder.get("id")
                current = [f"{address}#{anchor}" if anchor else address, title, words(child), ""]
            elif child.tag in ("section", "div", "figure", "ol", "ul") and len(child):
                walk(child)
            else:
                current[3] = f"{current[3]} {words(child)}".strip()

    walk(main)
    return [*found, current]


# ------------------------------------------------------------------------------------- everything


def finish_page(path: Path, site: Path, notebook: str, values: dict[str, str]) -> list[list[str]]:
    """Rewrite one page; returns its entries for the search."""
    inside = path.relative_to(site)
    way = "../" * (len(inside.parts) - 1)
    page = markup.document_fromstring(path.read_bytes(), parser=markup.HTMLParser(encoding="utf-8"))
    page.set("lang", page.get("lang") or "en")
    keep_local(page)
    separate_ids(page)
    draw_contents(page)
    entries = search_entries(page, inside.as_posix())
    add_head(page, way)
    name_landmarks(page)
    name_controls(page)
    wrap_tables(page)
    mark_chinese(page)
    add_tools(page, notebook, way, values)
    add_footer(page, notebook, way, values)
    text = markup.tostring(page, encoding="unicode", doctype="<!DOCTYPE html>")
    path.write_text(text, encoding="utf-8")
    return entries


def redirect(site: Path, old: str, new: str) -> None:
    """A page at the old address that leads to the new one."""
    path = site / old
    path.parent.mkdir(parents=True, exist_ok=True)
    target = "../" * (len(Path(old).parts) - 1) + new
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Moved</title>'
        f'<meta http-equiv="refresh" content="0; url={target}"><link rel="canonical" '
        f'href="{target}"></head><body><main><h1>This page has moved</h1><p><a href="{target}">'
        "Go to the page</a></p></main></body></html>\n",
        encoding="utf-8",
    )


def finish(site: Path, notebooks: dict[str, Path], moved: dict[str, str]) -> None:
    """Finish a rendered site. `notebooks` has the notebook of each page, `moved` old addresses."""
    values, entries = settings(), []
    for path in sorted(site.rglob("*.html")):
        notebook = notebooks.get(path.relative_to(site).as_posix())
        name = notebook.relative_to(ROOT / "nbs").as_posix() if notebook else ""
        entries += finish_page(path, site, name, values)
        if notebook:
            (site / "notebooks" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(notebook, site / "notebooks" / name)
    for name in LICENCES:
        shutil.copy(ROOT / name, site / f"{name}.txt")
    for old, new in moved.items():
        if not (site / new).exists() or (site / old).exists():
            raise SystemExit(f"redirect {old} -> {new}: the new page must exist, the old one not")
        redirect(site, old, new)
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    (site / "search-index.js").write_text(f"window.courseIndex={text};\n", encoding="utf-8")
    (site / ".nojekyll").touch()
    (site / "search.json").unlink(missing_ok=True)  # the renderer's, for its own search
