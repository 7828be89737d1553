"""The reference pages say what their tables say, lead where they point, and keep their promises."""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from urllib.request import ProxyHandler, build_opener

import pytest

from tools import lists, notebooks
from vlm_course.appendix import article, glossary, instructors, notation

TERMS = glossary.load_glossary()


# ------------------------------------------------------------------------------- lists and tables


@pytest.mark.parametrize(
    ("page", "tag"), [(page, tag) for page, tags in lists.LISTS.items() for tag in tags]
)
def test_list_is_what_its_table_makes(page, tag):
    """After a change of a table, a heading or a chapter's number: python -m tools.lists."""
    cells = notebooks.read(glossary.find_notebook(page)).cells
    shown = [cell.source for cell in cells if tag in notebooks.tags(cell)]
    assert shown == [lists.LISTS[page][tag]()], "run `python -m tools.lists`"


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.term)
def test_term_has_chinese_and_leads_to_its_definition(term):
    assert re.search("[\u4e00-\u9fff]|^[A-Z]", term.zh) and term.pinyin
    assert term.definition[0].isupper() and term.definition.endswith(".")
    known = glossary.anchors(term.page) | glossary.exported_names(term.page)
    assert term.anchor in known, f"{term.page} has no {term.anchor}"


def test_glossary_is_sorted_and_without_doubles():
    words = [term.term for term in TERMS]
    assert words == sorted(words, key=lambda word: (word.casefold(), word))
    for column in ("term", "zh", "id"):
        values = [getattr(term, column) for term in TERMS]
        assert len(set(values)) == len(values), column
    assert len(TERMS) >= 200


def test_a_function_in_the_glossary_is_the_one_that_its_name_leads_to():
    """A name in backticks leads to one definition, so two modules must not share it."""
    from vlm_course._modidx import d

    owners: dict[str, set[str]] = {}
    for module, names in d["syms"].items():
        for name in names:
            owners.setdefault(name.removeprefix(f"{module}."), set()).add(module)
    for term in TERMS:
        if term.anchor in glossary.exported_names(term.page):
            module = "vlm_course." + term.page.replace("/", ".")
            assert owners[term.anchor] == {module}, term


@pytest.mark.parametrize(
    ("query", "expected"),
    [("增强", "data augmentation"), ("shujuzengqiang", "data augmentation"),
     ("JENSEN", "Jensen's inequality"), ("迁移", "transfer learning"),
     ("转移", "transfer learning"), ("frechet", "Fréchet distance (FID)")],
)  # fmt: skip
def test_search_goes_both_ways(query, expected):
    assert expected in [term.term for term in glossary.look_up(query)]


def test_search_can_fail():
    assert glossary.look_up("flux capacitor") == []


# ------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize(
    ("heading", "expected"),
    [("1. Why not?", "why-not"), ("The teacher's step", "the-teachers-step"),
     ("Colour: three blends and a hue", "colour-three-blends-and-a-hue"),
     ("A *good* `name`", "a-good-name")],
)  # fmt: skip
def test_slug_is_that_of_pandoc(heading, expected):
    assert glossary.slug(heading) == expected


@pytest.mark.parametrize(("page", "found"), [("foundations/none", 0), ("appendix/", None)])
def test_unknown_page_is_refused(page, found):
    with pytest.raises(ValueError, match="page must name one notebook"):
        glossary.find_notebook(page)


def test_unknown_anchor_is_refused():
    with pytest.raises(ValueError, match="anchor must be .* of foundations/images; got 'moon'"):
        glossary.page_link("foundations/images", "moon")


def test_code_is_no_heading(monkeypatch):
    glossary.anchors.cache_clear()
    text = ("# One\n\n```python\n# no heading\n```\n\n## Two",)
    monkeypatch.setattr(glossary, "cells_of", lambda page, kind="markdown": text)
    assert glossary.anchors("any") == {"one", "two"}
    glossary.anchors.cache_clear()


# ---------------------------------------------------------------------------------------- article


def test_sections_lead_to_chapters_and_corrections_to_proofs():
    for section in article.load_sections():
        links = [article.place_link(place) for place in section.places.split()]
        assert links or section.to_come, section
    for correction in article.load_corrections():
        assert not article.place_link(correction.place).startswith("*"), correction


def test_a_page_that_does_not_exist_is_named_without_a_link():
    assert article.place_link("generation/none_yet") == "*none_yet*"


# ----------------------------------------------------------------------------------------- symbols


@pytest.mark.parametrize("row", notation.load_notation(), ids=lambda row: row.symbol)
def test_symbol_is_used_where_it_says(row):
    assert notation.in_formula(row.symbol, notation.formulas(row.page))
    assert notation.in_code(row.code, row.page)


def test_a_piece_of_a_name_is_no_symbol():
    assert not notation.in_formula("p", r"\operatorname{exp} + \exp + xp")
    assert notation.in_formula("p", "p_k")


# ------------------------------------------------------------------------------------- instructors


def test_timetable_shows_what_was_measured():
    """After `make cards`: make notebooks NB=nbs/appendix/NN_instructors.ipynb."""
    notebook = notebooks.read(glossary.find_notebook("appendix/instructors"))
    printed = [
        output.text
        for _, cell in notebooks.code_cells(notebook)
        if "print(timetable(" in cell.source
        for output in cell.outputs
    ]
    assert printed == [instructors.timetable(instructors.load_syllabus()) + "\n"], "run it again"


def test_syllabus_has_every_chapter_of_its_parts():
    taught = {page for week in instructors.load_syllabus() for page in week.pages.split()}
    for part in ("foundations", "self_supervised", "transfer"):
        paths = (notebooks.ROOT / "nbs" / part).glob("[0-9]*.ipynb")
        assert {f"{part}/{path.stem.partition('_')[2]}" for path in paths} <= taught


def test_exercises_are_told_apart_by_level():
    levels = dict(instructors.exercises("foundations/images"))
    assert levels["1"] == "warm-up" and levels["2"] == "regular" and levels["5"] == "research"
    assert instructors.exercises("train") == []


def test_workflow_is_yaml_and_runs_what_exists():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(instructors.pages_workflow("trunk", python="3.13"))
    assert workflow[True]["push"]["branches"] == ["trunk"]  # YAML reads `on` as true
    steps = workflow["jobs"]["site"]["steps"]
    makefile = (notebooks.ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [step["run"].removeprefix("make ") for step in steps if "run" in step]
    assert targets and all(f"\n{target}:" in makefile for target in targets)
    folder = notebooks.settings()["doc_path"]
    assert folder in [step.get("with", {}).get("path") for step in steps]


def test_site_can_be_looked_at_with_pythons_own_server(tmp_path):
    """The command that the page for instructors names, on a free port."""
    (tmp_path / "index.html").write_text("a page")
    command = [sys.executable, "-u", "-m", "http.server", "--directory", tmp_path]
    with subprocess.Popen(
        [*command, "--bind", "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            port = re.search(r"port (\d+)", server.stdout.readline()).group(1)
            fetch = build_opener(ProxyHandler({})).open
            assert fetch(f"http://127.0.0.1:{port}/", timeout=20).read() == b"a page"
        finally:
            server.terminate()


def test_settings_say_who_publishes():
    """What the page for instructors says becomes of two changed lines."""
    parser = ConfigParser(delimiters=["="])
    parser.read(notebooks.ROOT / "settings.ini", encoding="utf-8")
    parser["DEFAULT"]["user"] = "ada"
    assert "ada" in parser["DEFAULT"]["git_url"] and "ada" in parser["DEFAULT"]["doc_host"]
