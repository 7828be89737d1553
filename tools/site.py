"""Render the course as a web site: python -m tools.site [--output DIR].

The notebooks go through nbdev's processors (signatures and argument tables for what they export,
links from names in backticks to the library's reference, hidden cells gone) into _proc/, beside the
pages that tools/pages.py writes. Quarto renders that folder where it is installed; else smalldocs
does. tools/finish.py then completes every page. Nothing is executed and nothing is fetched.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import yaml
from execnb.nbio import read_nb, write_nb
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor, Processor
from nbdev.processors import FilterDefaults, add_show_docs

from tools import figures, finish, pages, showdoc
from tools.notebooks import ROOT, all_notebooks, default_exports, read, settings, tags
from vlm_course.appendix.glossary import slug

NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")  # nbdev drops the same from a page's name


REDIRECTS = ROOT / "nbs" / "redirects.csv"


def page_path(notebook: Path) -> Path:
    """Where the page of a notebook lies, from the site's root: foundations/images.html."""
    inside = notebook.relative_to(ROOT / "nbs")
    return inside.with_name(NUMBER.sub("", inside.stem)).with_suffix(".html")


def module_of_page(notebook: Path) -> ModuleType | None:
    """The committed module that the notebook exports, or None for one that exports nothing."""
    names = default_exports(read(notebook))
    if not names:
        return None
    try:
        return importlib.import_module(f"{settings()['lib_name']}.{names[0]}")
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{notebook.name} has no module yet: run `make export` ({error})"
        ) from error


def modules() -> list[tuple[ModuleType, Path]]:
    """Every module of the library and the notebook that grows it, in the order of the course."""
    found = [(module_of_page(notebook), notebook) for notebook in pages.in_order()]
    return [(module, notebook) for module, notebook in found if module]


def way(start: Path, target: Path | str) -> str:
    """The link from one page to another, both from the site's root."""
    return os.path.relpath(target, start.parent).replace(os.sep, "/")


# ------------------------------------------------------------------------------------ processing


class PageLookup(NbdevLookup):
    """nbdev's links from names, to the library's reference; a page's own names come first."""

    def __init__(self, page: Path, module: ModuleType | None):
        index = importlib.import_module(f"{settings()['lib_name']}._modidx").d["syms"]
        self.aliases: dict[str, str] = {}
        self.syms: dict[str, tuple[str, str, None]] = {}
        own = module.__name__ if module else ""
        for name in sorted(index, key=lambda name: name != own):
            self.add(name, index[name], page)

    def add(self, module_name: str, symbols: dict[str, tuple[str, str]], page: Path) -> None:
        """Take in the symbols of one module, under their full and, unless taken, short names."""
        module = importlib.import_module(module_name)
        target = f"reference/{pages.short(module)}.html"
        for full, (_, source) in symbols.items():
            name = full.removeprefix(f"{module_name}.")
            if name.startswith("_"):
                continue
            owner = name if showdoc.documented(module, name) else name.partition(".")[0]
            entry = (f"{way(page, target)}#{showdoc.anchor(owner)}", source, None)
            self.syms[full] = entry
            self.syms.setdefault(name, entry)


class OrderedShowDocs(add_show_docs):
    """nbdev's `show_doc` cells in the order of the definitions, before the source."""

    def begin(self):
        super().begin()
        ordered, source, docs = [], [], []
        for cell in self.nb.cells:
            if getattr(cell, "has_sd", False):
                docs.insert(0, cell)  # nbdev puts each one in front of the last
                continue
            ordered += docs + source
            source, docs = [cell], []
        self.nb.cells = ordered + docs + source


def chapter_filter(notebook: Path) -> type[FilterDefaults]:
    """nbdev's processors, documenting the committed module and linking inside the site."""
    module = module_of_page(notebook)
    lookup = PageLookup(page_path(notebook), module)

    class ShowDocs(Processor):
        """Fill each `show_doc(name)` cell; nbdev would run the notebook's imports and exports."""

        def cell(self, cell):
            match = re.search(r"^show_doc\(([\w.]+)", cell.source, flags=re.MULTILINE)
            if cell.cell_type != "code" or not match:
                return
            symbol = module
            for part in match.group(1).split("."):
                symbol = getattr(symbol, part)
            text = showdoc.describe(symbol, match.group(1)).splitlines(keepends=True)
            data = {"data": {"text/markdown": text}, "metadata": {}, "output_type": "display_data"}
            cell.outputs = [data]

    def add_links(cell):
        """Links in prose, and in what ShowDocs wrote."""
        if cell.cell_type == "markdown":
            cell.source = unnest(lookup.linkify(cell.source))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                text = lookup.linkify("".join(data["text/markdown"])) or ""
                data["text/markdown"] = text.splitlines(keepends=True)

    replaced = {
        "add_show_docs": OrderedShowDocs,
        "exec_show_docs": ShowDocs,
        "add_links": add_links,
        "mv_exports": None,  # OrderedShowDocs has put them in their places
    }

    class ChapterFilter(FilterDefaults):
        """nbdev's processors with ours in place of some."""

        def base_procs(self):
            procs = [replaced.get(proc.__name__, proc) for proc in super().base_procs()]
            return [proc for proc in procs if proc]

    return ChapterFilter


def unnest(text: str) -> str:
    """Undo a link inside the text of a link: [[`name`](a)](b) is [`name`](b)."""
    return re.sub(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(", r"[\1](", text)


def process_notebook(notebook: Path, target: Path) -> None:
    """Write the page source of one notebook to the file `target`."""
    processed = read_nb(notebook)
    NBProcessor(nb=processed, procs=chapter_filter(notebook)().procs()).process()
    set_apart(processed.cells)
    for cell in processed.cells:
        if cell.cell_type == "markdown":
            cell.source = join_formulas(unnumber_links(cell.source))
            if {"chapter-card", "chapter-cards"} & set(tags(cell)):
                cell.source = show_cards(cell, notebook)
        elif cell.cell_type == "raw":
            cell.source = front_matter(cell.source, notebook)
        else:
            figures.mark(cell)
            link_pages(cell)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(processed, target)


def show_cards(cell, notebook: Path) -> str:
    """A chapter's own card in a box; on the front page a card for each chapter."""
    if "chapter-card" in tags(cell):
        return f"::: {{.chapter-card}}\n{cell.source}\n:::"
    here = page_path(notebook)
    cards = pages.card_grid(lambda other: way(here, page_path(other).with_suffix(".ipynb")))
    return f"{cell.source.partition('|')[0]}{cards}"


def link_pages(cell) -> None:
    """Links to notebooks in what a cell shows as HTML: the page does not turn them, we do."""
    for output in cell.get("outputs", []):
        if "text/html" in output.get("data", {}):
            text = "".join(output["data"]["text/html"])
            numbered = r'href="(?!\w+:)([^"#]*?)(?:\d+[a-zA-Z0-9]*_)?([^"#/]*)\.ipynb'
            output["data"]["text/html"] = re.sub(numbered, r'href="\1\2.html', text)


def set_apart(cells: list) -> None:
    """An id of its own for each heading whose text is also the name of a symbol of the page."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    taken = set(re.findall(r"\{#([^ }]+) \.symbol\}", shown))

    def apart(match: re.Match) -> str:
        name = slug(match.group(1))
        return f"{match.group()} {{#{name}-text}}" if name in taken else match.group()

    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^#{2,6} ([^{}\n]+)$", apart, cell.source, flags=re.MULTILINE)


def unnumber_links(text: str) -> str:
    """Links to notebooks by the names that their pages have: 01_images.ipynb is images.ipynb."""

    def unnumbered(match: re.Match) -> str:
        folder, slash, name = match.group(1).rpartition("/")
        return f"]({folder}{slash}{NUMBER.sub('', name)}.ipynb"

    return re.sub(r"\]\((?!\w+:)([^)\s#]+)\.ipynb", unnumbered, text)


def join_formulas(text: str) -> str:
    """Put a formula that ends on the next line on one line: smalldocs reads no other."""
    joined: list[str] = []
    code = open_formula = False
    for line in text.split("\n"):
        fence = re.match(r"\s*(```|~~~)", line)
        code ^= bool(fence)
        if open_formula and not fence and line.strip():
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
        dollars = len(re.findall(r"(?<!\\)\$", re.sub(r"`[^`]*`", "", joined[-1])))
        open_formula = not code and not fence and dollars % 2 == 1
    return "\n".join(joined)


def front_matter(text: str, notebook: Path) -> str:
    """The front matter that nbdev made of the title cell, with the chapter's place in its part."""
    fields = yaml.safe_load(text.strip().strip("-")) or {}
    fields.pop("output-file", None)  # the file already has that name
    number = re.match(r"\d+", notebook.stem)
    if number:
        fields["order"] = int(number.group())
    return f"---\n{yaml.safe_dump(fields, allow_unicode=True, sort_keys=True)}---\n"


def process(folder: Path) -> Path:
    """Make `folder` the source of the site: notebooks, options, bibliography, other files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for notebook in all_notebooks():
        process_notebook(notebook, folder / page_path(notebook).with_suffix(".ipynb"))
    for path in sorted((ROOT / "nbs").rglob("*")):
        inside = path.relative_to(ROOT / "nbs")
        if (
            path.is_file()
            and path.suffix != ".ipynb"
            and not any(p[0] in "._" for p in inside.parts)
        ):
            (folder / inside.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / inside)
    shutil.copy(ROOT / "references.bib", folder)
    write_pages(folder)
    options = site_options(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")))
    write_options(folder, options)
    return folder


def write_pages(folder: Path) -> None:
    """Write the reference of the library and the bibliography."""
    (folder / "reference").mkdir(parents=True)
    (folder / "reference" / "index.qmd").write_text(pages.reference_index(modules()), "utf-8")
    for order, (module, notebook) in enumerate(modules(), 1):
        here = Path("reference", f"{pages.short(module)}.html")
        file = Path(module.__file__).relative_to(ROOT).as_posix()
        text = pages.reference_page(
            module,
            notebook,
            page=way(here, page_path(notebook).with_suffix(".ipynb")),
            linkify=PageLookup(here, module).linkify,
            url=finish.source_url(settings(), file),
            order=order,
        )
        (folder / here.with_suffix(".qmd")).write_text(text, "utf-8")
    listing = pages.bibliography(
        folder / "references.bib",
        lambda notebook: page_path(notebook).with_suffix(".ipynb").as_posix(),
    )
    (folder / "bibliography.qmd").write_text(listing, "utf-8")


def site_options(options: dict) -> dict:
    """_quarto.yml with what settings.ini knows: title, description and, if published, addresses."""
    values, website = settings(), options["website"]
    website["title"], website["description"] = values["title"], values["description"]
    if finish.published(values):
        website["site-url"] = values["doc_host"].rstrip("/") + values["doc_baseurl"]
    return options


def write_options(folder: Path, options: dict) -> None:
    """Write the site's options."""
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    (folder / "_quarto.yml").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------- rendering


def render_with_quarto(folder: Path, output: Path) -> None:
    """Render with Quarto from the outputs that the notebooks hold."""
    subprocess.run(["quarto", "render", ".", "--no-execute"], cwd=folder, check=True)
    place(folder / "_site", output)


def render_with_smalldocs(folder: Path, output: Path) -> None:
    """Render with smalldocs, citations and numbers resolved for it; stop on a dead link."""
    try:
        from smalldocs.site import build
    except ModuleNotFoundError:
        raise SystemExit(
            "rendering wants Quarto on the PATH, or smalldocs, which needs Python 3.11 or newer: "
            "make VENV=.venv-site PYTHON=python3.11 site"
        ) from None
    resolve_references(folder)
    prepare_for_smalldocs(folder)
    site = build(folder, quiet=True)
    dead = [warning for warning in site.warnings if "broken link" in warning]
    for warning in site.warnings:
        print(f"smalldocs: {warning}", file=sys.stderr)
    if dead:
        raise SystemExit(f"{len(dead)} dead links, see above")
    place(folder / "_site", output)


def resolve_references(folder: Path) -> None:
    """Resolve citations and numbers of every page in `folder`, and put its pictures into files."""
    from tools.citations import resolve

    for path in folder.rglob("*.ipynb"):
        page = read_nb(path)
        numbers = figures.to_files(page.cells, folder / figures.FOLDER, way(path, folder) + "/")
        cells = [cell for cell in page.cells if cell.cell_type == "markdown"]
        texts = resolve([cell.source for cell in cells], folder / "references.bib", numbers)
        for cell, text in zip(cells, texts, strict=True):
            cell.source = text
        write_nb(page, path)


def prepare_for_smalldocs(folder: Path) -> None:
    """The options without what is already done or unknown, and the look as plain CSS."""
    options = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    for name in ("bibliography", "link-citations", "execute"):
        options.pop(name)
    options["project"]["resources"].append(f"{figures.FOLDER}/**")
    look = options["format"]["html"]
    look.pop("html-math-method")
    scss = folder / look["theme"]
    css = scss.with_suffix(".css")
    css.write_text(scss.read_text(encoding="utf-8").replace("/*-- scss:rules --*/", ""), "utf-8")
    look["theme"], look["css"] = "bootstrap", css.relative_to(folder).as_posix()
    write_options(folder, options)


def place(built: Path, output: Path) -> None:
    """Move the built site to `output`, in place of an older one."""
    if output.exists() and not (output / "index.html").exists():
        raise SystemExit(
            f"{output} exists and is not a site: delete it, or choose another --output"
        )
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(built, output)


def redirects() -> dict[str, str]:
    """Old addresses and where their pages are: nbs/redirects.csv, and the notebooks' own names."""
    with REDIRECTS.open(encoding="utf-8", newline="") as file:
        moved = {row["old"]: row["new"] for row in csv.DictReader(file)}
    for notebook in all_notebooks():
        new = page_path(notebook)
        if notebook.stem != new.stem:
            moved[new.with_name(f"{notebook.stem}.html").as_posix()] = new.as_posix()
    return moved


def build_site(output: Path, *, folder: Path = ROOT / "_proc", quarto: bool | None = None) -> Path:
    """Process and render the course into `output`; with Quarto if there is one, or as asked."""
    process(folder)
    if shutil.which("quarto") is not None if quarto is None else quarto:
        render_with_quarto(folder, output)
    else:
        print("no quarto on the PATH: rendering with smalldocs")
        render_with_smalldocs(folder, output)
    notebooks = {page_path(notebook).as_posix(): notebook for notebook in all_notebooks()}
    finish.finish(output, notebooks, redirects())
    return output


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = ROOT / settings()["doc_path"]
    parser.add_argument("--output", type=Path, default=default, help="default: %(default)s")
    output = build_site(parser.parse_args().output.resolve())
    print(f"{len(list(output.rglob('*.html')))} pages: {os.path.relpath(output / 'index.html')}")


if __name__ == "__main__":
    main()
