"""The rendered pages show what the course promises: definitions, their tables, links that lead."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

from tools import citations, notebooks, showdoc, site

if importlib.util.find_spec("smalldocs") is None:
    pytest.skip("smalldocs needs Python 3.11 or newer", allow_module_level=True)

NOTEBOOKS = notebooks.all_notebooks()
EXPORTING = [path for path in NOTEBOOKS if notebooks.default_exports(notebooks.read(path))]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The site, rendered once, without Quarto."""
    folder = tmp_path_factory.mktemp("site")
    return site.build_site(folder / "_site", folder=folder / "_proc", quarto=False)


@pytest.fixture(scope="module")
def pages(built) -> dict[str, BeautifulSoup]:
    """Every page by its path from the site's root."""
    found = built.rglob("*.html")
    return {
        path.relative_to(built).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in found
    }


def hrefs(tag) -> set[str]:
    """Where the links inside a tag lead."""
    return {link["href"] for link in tag.find_all("a", href=True)}


def page_of(path: Path, pages: dict[str, BeautifulSoup]) -> BeautifulSoup:
    """The body of a notebook's page."""
    return pages[site.page_path(path).as_posix()].find("main")


def definitions(module) -> list[str]:
    """The functions and classes that a module exports, and the described methods of the classes."""
    names = [name for name in module.__all__ if showdoc.documented(module, name)]
    for name in list(names):
        if inspect.isclass(getattr(module, name)):
            names += [
                f"{name}.{method}" for method in showdoc.public_methods(getattr(module, name))
            ]
    return names


def test_each_notebook_has_a_page(pages):
    assert set(pages) == {site.page_path(path).as_posix() for path in NOTEBOOKS}


def test_sidebar_leads_to_every_page(pages):
    """A new part folder wants a section in _quarto.yml."""
    assert set(pages) <= hrefs(pages["index.html"].find(id="quarto-sidebar"))


@pytest.mark.parametrize("path", EXPORTING, ids=notebooks.relative)
def test_each_definition_has_signature_and_arguments(path, pages):
    page, module = page_of(path, pages), site.module_of_page(path)
    assert module.__all__
    for name in definitions(module):
        headings = page.find_all(id=showdoc.anchor(name))
        assert len(headings) == 1, f"{name} has {len(headings)} headings"
        signature = headings[0].find_next("pre").get_text()
        assert signature.startswith(f"{name}("), f"{name}: {signature}"
        owner, _, method = name.partition(".")
        symbol = getattr(module, owner)
        arguments = showdoc.signature_of(getattr(symbol, method) if method else symbol)
        if arguments is None or not arguments.parameters:
            continue
        rows = headings[0].find_next("table").find_all("tr")
        shown = [row.find("td").get_text() for row in rows if row.find("td")]
        assert [text for text in shown if text != "Returns"] == list(arguments.parameters), name


@pytest.mark.parametrize("path", EXPORTING, ids=notebooks.relative)
def test_exports_show_their_source_and_hidden_cells_nothing(path, pages):
    page = page_of(path, pages)
    shown = [re.sub(r"\s", "", block.get_text()) for block in page.find_all("pre")]
    for _, cell in notebooks.code_cells(notebooks.read(path)):
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
        squeezed = re.sub(r"\s", "", source)
        if re.search(r"^#\| *exports\b", cell.source, flags=re.MULTILINE):
            assert squeezed in shown, f"the page does not show:\n{source}"
        elif re.search(r"^#\| *(hide|default_exp)\b", cell.source, flags=re.MULTILINE) and squeezed:
            assert squeezed not in shown, f"the page shows a hidden cell:\n{source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebooks.relative)
def test_names_in_backticks_lead_to_their_definitions(path, pages):
    page = page_of(path, pages)
    lookup = site.PageLookup(site.page_path(path), site.module_of_page(path)).syms
    links = {(link.get_text(), link["href"]) for link in page.find_all("a", href=True)}
    for _, cell in notebooks.markdown_cells(notebooks.read(path))[1:]:
        lines = [line for line in cell.source.splitlines() if not line.startswith("    ")]
        prose = notebooks.PROTECTED.sub(lambda m: m.group() if m["ticks"] else "", "\n".join(lines))
        for name in re.findall(r"(?<![\[`])`(\w[\w.]*)(?:\(\))?`(?!\])", prose):
            if name not in lookup:
                continue
            target, _, fragment = lookup[name][0].partition("#")
            here = target == site.page_path(path).name
            ends = f"#{fragment}" if here else f"{target}#{fragment}"
            found = [href for text, href in links if text.rstrip("()") == name]
            assert any(href.endswith(ends) for href in found), (
                f"`{name}` leads to {found}, not {ends}"
            )


def test_there_are_links_to_definitions(pages):
    """The test above could pass on a site with no link at all."""
    links = [link for page in pages.values() for link in page.find("main").find_all("a", href=True)]
    assert any(link.find("code") and "#" in link["href"] for link in links)


def test_no_internal_link_is_dead(built, pages):
    ids = {name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    dead = []
    for name, page in pages.items():
        for tag in page.find_all(["a", "img", "link", "script"]):
            url = tag.get("href") or tag.get("src") or ""
            if re.match(r"[a-z]+:|//", url) or url in ("", "#"):
                continue
            path, _, fragment = url.partition("#")
            target = (
                (built / name).parent / unquote(path.partition("?")[0]) if path else built / name
            )
            target = target / "index.html" if target.is_dir() else target
            key = target.resolve().relative_to(built.resolve()).as_posix()
            if not target.exists() or (
                fragment and key in ids and unquote(fragment) not in ids[key]
            ):
                dead.append(f"{name}: {url}")
    assert dead == []


def test_citations_and_equations_are_resolved(pages):
    for name, page in pages.items():
        main = page.find("main")
        for block in main.find_all(["pre", "code", "script"]):
            block.decompose()
        text = main.get_text()
        assert not re.search(r"\[@\w|@eq-|\{#eq-", text), name


def test_references_are_listed_once_and_by_name(tmp_path):
    text = "See [@a; @b, p. 3], @a, `@a` and $x@a$.\n\n$$\nx\n$$ {#eq-x}\n\nBy @eq-x, a@b.org."
    bibliography = "@book{a,\n title={One}, author={Ada One}, publisher={P}, year={1990}}\n"
    bibliography += (
        "@book{b,\n title={Two}, author={B Two and C Three}, publisher={P}, year={1991}}\n"
    )
    path = tmp_path / "references.bib"
    path.write_text(bibliography)
    (done,) = citations.resolve([text], path)
    assert "([One 1990](#ref-a); [Two and Three 1991](#ref-b), p. 3), [One (1990)](#ref-a)" in done
    assert "`@a` and $x@a$" in done and "a@b.org" in done
    assert "x \\tag{1}" in done and "[Equation 1](#eq-x)" in done
    assert done.count("#ref-a .csl-entry") == 1
