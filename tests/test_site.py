"""The rendered pages show what the course promises: definitions, their tables, links that lead."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from bs4 import BeautifulSoup

from tools import citations, figures, finish, notebooks, showdoc, site
from tools import pages as made

if importlib.util.find_spec("smalldocs") is None:
    pytest.skip("smalldocs needs Python 3.11 or newer", allow_module_level=True)

NOTEBOOKS = notebooks.all_notebooks()
EXPORTING = [path for path in NOTEBOOKS if notebooks.default_exports(notebooks.read(path))]


@pytest.fixture(scope="module")
def pages(built) -> dict[str, BeautifulSoup]:
    """Every page by its path from the site's root."""
    moved = site.redirects()
    names = [path.relative_to(built).as_posix() for path in built.rglob("*.html")]
    return {
        name: BeautifulSoup((built / name).read_text("utf-8"), "lxml")
        for name in names
        if name not in moved
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


def test_each_notebook_and_module_has_a_page(pages):
    chapters = {site.page_path(path).as_posix() for path in NOTEBOOKS}
    modules = {f"reference/{made.short(module)}.html" for module, _ in site.modules()}
    assert set(pages) == chapters | modules | {"reference/index.html", "bibliography.html"}
    assert len(modules) == len(EXPORTING)


def test_sidebars_lead_to_every_page(pages):
    """A new part folder wants a section in _quarto.yml."""
    course = hrefs(pages["index.html"].find(id="quarto-sidebar"))
    library = hrefs(pages["reference/index.html"].find(id="quarto-sidebar"))
    assert {name for name in pages if not name.startswith("reference/")} <= course
    reference = {name for name in pages if name.startswith("reference/")}
    assert {name.removeprefix("reference/") for name in reference} <= library


@pytest.mark.parametrize("path", EXPORTING, ids=notebooks.relative)
def test_reference_describes_every_symbol(path, pages):
    """Signature, arguments, source, and the chapter that grows it; constants in a table."""
    module = site.module_of_page(path)
    page = pages[f"reference/{made.short(module)}.html"].find("main")
    shown = {re.sub(r"\s", "", block.get_text()) for block in page.find_all("pre")}
    links = hrefs(page)
    for name in module.__all__:
        assert len(page.find_all(id=showdoc.anchor(name))) == 1, name
        if not showdoc.documented(module, name):
            continue
        symbol = getattr(module, name)
        assert re.sub(r"\s", "", showdoc.signature_text(name, symbol)) in shown, name
        assert re.sub(r"\s", "", inspect.getsource(symbol)) in shown, name
        here = f"reference/{made.short(module)}.html"
        assert f"{site.way(Path(here), site.page_path(path))}#{showdoc.anchor(name)}" in links, name


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
            ends = lookup[name][0]
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


def test_bibliography_has_every_work_that_is_cited(pages):
    ids = {tag["id"] for tag in pages["bibliography.html"].find_all(id=True)}
    cited = set().union(*(made.citing(path) for path in NOTEBOOKS))
    cited &= set(notebooks.bibliography_keys())
    assert cited and {f"ref-{key}" for key in cited} <= ids


def test_figures_with_a_caption_are_numbered_and_have_files(built, pages):
    found = 0
    for name, page in pages.items():
        captions = [tag.get_text() for tag in page.select("main figcaption")]
        numbers = [int(n) for text in captions for n in re.findall(r"^Figure (\d+): ", text)]
        assert numbers == list(range(1, len(numbers) + 1)), name
        found += len(numbers)
        for image in page.select('main figure img[src*="figures/"]'):
            assert image["alt"] and int(image["width"]) and int(image["height"]), name
            assert (built / name).parent.joinpath(image["src"]).is_file(), name
    assert found > 10


def test_a_figure_can_be_referred_to(tmp_path):
    text = "See @fig-one, `@fig-one` and @fig-two."
    (text,) = citations.resolve([text], tmp_path / "no.bib", {"fig-one": 3})
    assert text == "See [Figure 3](#fig-one), `@fig-one` and @fig-two."


def test_formulas_of_two_lines_become_one():
    text = "Let $a +\nb$ be\nfree. \\$5\n\n```\n$x\n```\n\n$$\nx\n$$ {#eq-x}"
    assert site.join_formulas(text) == text.replace("+\nb", "+ b")


def test_list_of_captions_gives_each_picture_its_own(tmp_path):
    svg = '<svg width="72pt" height="36pt"></svg>'
    outputs = [{"data": {"image/svg+xml": svg}}, {"data": {"image/svg+xml": svg + " "}}]
    source = '#| fig-alt: ["one", "two"]\n#| fig-cap: ["A", "B & C"]\nplot()'
    cell = notebooks.nbformat.from_dict({"cell_type": "code", "source": source, "outputs": outputs})
    figures.mark(cell)
    assert cell.source.startswith("#| code-fold: show\n#| fig-alt")  # two pictures have no number
    assert figures.to_files([cell], tmp_path, "../") == {}
    first, second = (output["data"]["text/html"] for output in cell.outputs)
    assert 'alt="one" width="96" height="48"' in first and "<figcaption>A<" in first
    assert 'alt="two"' in second and "B &amp; C" in second and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("url", "flag", "source", "colab"),
    [
        ("github.com/ada/course", "True", "blob", "github/ada/course/blob/main/nbs/a.ipynb"),
        ("github.com/ada/course", "False", "", ""),
        ("gitlab.com/ada/course", "True", "-/blob", ""),
        ("git.example.org/ada/course", "True", "", ""),
    ],
)
def test_source_and_colab_only_where_readers_can_go(url, flag, source, colab):
    values = {"git_url": f"https://{url}", "published": flag, "branch": "main"}
    there = f"https://{url}/{source}/main/nbs/a.ipynb" if source else ""
    assert finish.source_url(values, "nbs/a.ipynb") == there
    opened = f"https://colab.research.google.com/{colab}" if colab else ""
    assert finish.colab_url(values, "nbs/a.ipynb") == opened


@pytest.mark.parametrize("flag", ["True", "False"])
def test_page_offers_colab_where_it_is_published(tmp_path, monkeypatch, flag):
    values = {**notebooks.settings(), "git_url": "https://github.com/ada/course", "published": flag}
    monkeypatch.setattr(finish, "settings", lambda: values)
    text = "<html><head><title>T</title></head><body><main><p>中文 text</p></main></body></html>"
    (tmp_path / "index.html").write_text(text, "utf-8")
    notebook = notebooks.ROOT / "nbs" / "index.ipynb"
    finish.finish(tmp_path, {"index.html": notebook}, {})
    page = (tmp_path / "index.html").read_text("utf-8")
    assert ("colab.research.google.com" in page) == (flag == "True")
    assert ("github.com/ada/course/blob/main/nbs/index.ipynb" in page) == (flag == "True")
    assert '<span lang="zh">中文</span> text' in page
    assert (tmp_path / "notebooks" / "index.ipynb").read_bytes() == notebook.read_bytes()


def test_what_other_hosts_serve_is_dropped(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        '<html><head><title>T</title><script src="https://cdn.example.org/katex.js"></script>'
        '<link rel="stylesheet" href="//cdn.example.org/a.css"><script>katex.render("x")</script>'
        '</head><body><main><h1>T</h1><span class="math inline">\\(x^2\\)</span></main></body>'
    )
    finish.finish_page(path, tmp_path, "", notebooks.settings())
    text = path.read_text()
    assert "example.org" not in text and "katex.render" not in text
    assert '<span class="math inline">x^2</span>' in text and "assets/katex/katex.min.js" in text


def test_redirect_must_lead_from_nothing_to_something(tmp_path):
    with pytest.raises(SystemExit, match="redirect old.html -> gone.html"):
        finish.finish(tmp_path, {}, {"old.html": "gone.html"})


def test_vendored_files_have_their_licence_and_sum():
    text = (notebooks.ROOT / "nbs" / "assets" / "README.md").read_text("utf-8")
    for folder in (
        notebooks.ROOT / "nbs/assets/katex",
        notebooks.ROOT / "nbs/assets/fonts",
        notebooks.ROOT / "tests/assets/axe-core",
    ):
        assert (folder / "LICENSE").is_file() and f"{folder.name}/" in text
    assert len(re.findall(r"`[0-9a-f]{64}`", text)) == 3


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


# ------------------------------------------------------------------- what Quarto is given to render

# Of the options that Quarto 1.8 knows (https://quarto.org/docs/reference/), those used here.
# Anything else is a slip, which Quarto refuses or silently ignores: look it up, then add it.
OPTIONS = {
    "": "project bibliography link-citations execute website format",
    "project": "type output-dir render resources",
    "execute": "enabled",
    "website": "title description site-url favicon image open-graph twitter-card page-navigation "
    "back-to-top-navigation search navbar sidebar",
    "website.navbar": "left",
    "website.navbar.left": "text href",
    "website.sidebar": "id style collapse-level contents",
    "website.sidebar.contents": "section contents",
    "format": "html",
    "format.html": "lang theme html-math-method toc toc-depth code-copy"
    " code-overflow anchor-sections "
    "smooth-scroll callout-appearance fig-align",
}
CELL_OPTIONS = set("code-fold code-summary echo output fig-alt fig-cap label layout-ncol".split())
CALLOUTS = {"note", "tip", "important", "warning", "caution"}
CALLOUT = re.compile(r"\.callout-(\w+)((?: (?:collapse|title|icon|appearance)=\"[^\"]*\")*)")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[Path, list[dict]]:
    """The cells of every page as Quarto gets it, before smalldocs' half of the work."""
    folder = site.process(tmp_path_factory.mktemp("sources"))
    found = {}
    for path in [*folder.rglob("*.ipynb"), *folder.rglob("*.qmd")]:
        text = path.read_text("utf-8")
        cells = json.loads(text)["cells"] if path.suffix == ".ipynb" else [prose(text)]
        found[path] = [{**cell, "source": "".join(cell["source"])} for cell in cells]
    return found


def prose(text: str) -> dict:
    """A markdown cell."""
    return {"cell_type": "markdown", "source": text}


def written(cells: list[dict]) -> list[str]:
    """What the markdown cells say, and what code cells show as markdown."""
    texts = []
    for cell in cells:
        shown = [output.get("data", {}) for output in cell.get("outputs", [])]
        texts += [cell["source"]] * (cell["cell_type"] == "markdown")
        texts += ["".join(data["text/markdown"]) for data in shown if "text/markdown" in data]
    return texts


def named(options: dict | list | str, place: str = "") -> dict[str, set[str]]:
    """The names of nested options, by the place where they stand."""
    if isinstance(options, list):
        names: dict[str, set[str]] = {}
        for item in options:
            for where, some in named(item, place).items():
                names[where] = names.get(where, set()) | some
        return names
    if not isinstance(options, dict):
        return {}
    names = {place: set(options)}
    for name, value in options.items():
        names |= named(value, f"{place}.{name}".lstrip("."))
    return names


def test_quarto_knows_every_option(sources):
    folder = next(path.parent for path in sources if path.name == "index.ipynb")
    options = yaml.safe_load((folder / "_quarto.yml").read_text("utf-8"))
    known = {place: set(names.split()) for place, names in OPTIONS.items()}
    for place, names in named(options).items():
        assert names <= known.get(place.replace("contents.contents", "contents"), set()), place
    for path, cells in sources.items():
        for cell in cells:
            if cell["cell_type"] == "raw":
                assert set(yaml.safe_load(cell["source"].strip("-\n"))) <= {
                    "title", "description", "order"}, path.name  # fmt: skip
            head = re.findall(r"^ *# *\| *(.*)$", cell["source"], flags=re.MULTILINE)
            if cell["cell_type"] == "code" and head:
                assert set(yaml.safe_load("\n".join(head))) <= CELL_OPTIONS, (path.name, head)


def test_pages_and_files_that_options_name_are_there(sources):
    folder = next(path.parent for path in sources if path.name == "index.ipynb")
    website = yaml.safe_load((folder / "_quarto.yml").read_text("utf-8"))["website"]
    wanted = [website["favicon"], website["image"]]
    wanted += [item["href"] for item in website["navbar"]["left"]]
    for item in [item for bar in website["sidebar"] for item in bar["contents"]]:
        if isinstance(item, dict):
            inside = item["contents"]
            wanted += inside if isinstance(inside, list) else [inside]
        elif len(item) > 1:  # one letter: `contents` was one pattern
            wanted.append(item)
    assert [name for name in wanted if not list(folder.glob(name))] == []


def test_boxes_and_fences_are_those_of_quarto(sources):
    """Each cell closes what it opens; boxes have one of the five kinds, with a title in quotes."""
    for path, cells in sources.items():
        for text in written(cells):
            fences = re.findall(r"^(:{3,})[ \t]*(.*?)[ \t]*$", notebooks.without_code(text),
                                flags=re.MULTILINE)  # fmt: skip
            depth = 0
            for _, rest in fences:
                depth += 1 if rest else -1
                assert depth >= 0, f"{path.name}: a fence closes nothing in\n{text}"
            assert depth == 0, f"{path.name}: a fence stays open in\n{text}"
            for _, rest in fences:
                if "callout" in rest:
                    found = CALLOUT.fullmatch(rest.strip("{}"))
                    assert found and found.group(1) in CALLOUTS, f"{path.name}: {rest}"


def test_each_reference_has_one_label(sources):
    """`@eq-name` and `@fig-name` of a page, its equations, its cells."""
    for path, cells in sources.items():
        text = "\n\n".join(written(cells))
        outside = re.sub(notebooks.CODE, "", text, flags=notebooks.MARKDOWN)
        labels = Counter(re.findall(r"\$\$[ \t]*\{#(eq-[\w-]+)\}", outside))
        labels.update(str(figures.options(cell["source"]).get("label", "")) or "none"
                      for cell in cells if cell["cell_type"] == "code")  # fmt: skip
        del labels["none"]
        assert [name for name, count in labels.items() if count > 1] == [], path.name
        used = set(re.findall(r"(?<![\w\\])@((?:eq|fig|tbl|sec|lst)-[\w-]*\w)", outside))
        assert used <= set(labels), path.name
        assert outside.count("{#eq-") == sum(name.startswith("eq-") for name in labels), path.name
        ids = Counter(cell["id"] for cell in cells if "id" in cell)
        assert [name for name, count in ids.items() if count > 1] == [], path.name


def test_links_between_sources_lead_to_sources(sources):
    """Quarto warns of a link to a page that it does not render."""
    for path, cells in sources.items():
        for text in written(cells):
            for link in re.findall(r"\]\((?!\w+:)([^)\s#]+\.(?:ipynb|qmd))", text):
                assert (path.parent / link).resolve() in sources, f"{path.name}: {link}"


def pandoc() -> str:
    """Where Pandoc is, of which Quarto is made: on the PATH, or in the package pypandoc_binary."""
    found = shutil.which("pandoc")
    if found:
        return found
    return pytest.importorskip("pypandoc", reason="no pandoc here").get_pandoc_path()


def as_pandoc_reads(cells: list[dict]) -> str:
    """One text of a page's cells, as Quarto makes it; code, and what is HTML already, left out."""
    return "\n\n".join(written([c for c in cells if c["cell_type"] != "raw"]))


def test_pandoc_has_nothing_to_warn_of(sources):
    """No fence left open, no identifier twice, no citation unknown, no syntax left as text."""
    command = [pandoc(), "--from=markdown", "--to=json"]
    known, faults = notebooks.bibliography_keys(), []
    for path, cells in sources.items():
        done = subprocess.run(command, input=as_pandoc_reads(cells), capture_output=True,
                              encoding="utf-8", check=True)  # fmt: skip
        faults += [f"{path.name}: {line}" for line in done.stderr.splitlines()]
        keys = set(re.findall(r'"citationId":"([^"]+)"', done.stdout)) - known
        faults += [f"{path.name}: @{key}" for key in keys if not re.match(r"(eq|fig)-", key)]
        for text in re.findall(r'\{"t":"Str","c":"((?:[^"\\]|\\.)*)"\}', done.stdout):
            if re.search(r":::|\$\$|^\{[#.](?!eq-)|\{\{<", text):
                faults.append(f"{path.name}: {text}")
    assert faults == []
