"""Pages that no notebook holds: the reference of the library, the bibliography, the chapter cards.

Everything comes from what is there: the committed modules, references.bib, nbs/cards.csv.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import yaml

from tools import cards, showdoc
from tools.citations import References, family_names
from tools.notebooks import CITATION, ROOT, all_notebooks, markdown_cells, read

MAX_VALUE = 70


def front(title: str, description: str, order: int = 0) -> str:
    """The head of a page's source; `order` is its place among its neighbours."""
    return f'---\ntitle: "{title}"\ndescription: "{description}"\norder: {order}\n---\n\n'


@lru_cache(maxsize=None)
def titled(notebook: Path) -> tuple[str, str]:
    """Title and description of a notebook: its first cell."""
    first = read(notebook).cells[0].source
    return first.splitlines()[0].lstrip("# "), first.rpartition(">")[2].strip()


def short(module: ModuleType) -> str:
    """A module's name without the library's: foundations.images."""
    return module.__name__.partition(".")[2]


def source_block(symbol: object, url: str) -> str:
    """The source of a symbol, folded, and where it stands on the host if it is published."""
    lines, start = inspect.getsourcelines(symbol)
    end = start + len(lines) - 1
    link = f"[{url.rpartition('/')[2]}, lines {start} to {end}]({url}#L{start}-L{end})"
    there = f"\n{link}\n" if url else ""
    opened = '```{=html}\n<details class="source"><summary>Source</summary>\n```\n\n'
    code = "".join(lines).rstrip()
    return f"{opened}````python\n{code}\n````\n{there}\n```{{=html}}\n</details>\n```"


def constants(module: ModuleType) -> str:
    """A table of what a module exports besides functions and classes; "" for nothing."""
    names = [name for name in module.__all__ if not showdoc.documented(module, name)]
    if not names:
        return ""
    rows = []
    for name in names:
        text = " ".join(showdoc.default_text(getattr(module, name)).split())
        value = text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"
        anchor = f"[]{{#{showdoc.anchor(name)} .symbol}}"
        rows.append(f"| {anchor}{showdoc.code(name)} | {showdoc.code(value)} |")
    return "## Constants\n\n| Name | Value |\n|:---|:---|\n" + "\n".join(rows)


def reference_page(
    module: ModuleType,
    notebook: Path,
    *,
    page: str,
    linkify: Callable[[str], str],
    url: str,
    order: int,
) -> str:
    """The source of the page of one module. `page` leads to the chapter that grows it."""
    title, description = titled(notebook)
    name = short(module)
    blocks = [f"Grown in [{title}]({page}): {description}\n\n`import {module.__name__}`"]
    for symbol in [n for n in module.__all__ if showdoc.documented(module, n)]:
        value = getattr(module, symbol)
        blocks.append(linkify(showdoc.describe(value, symbol, level=2)))
        blocks.append(f"Grown in [{title}]({page}#{showdoc.anchor(symbol)}).")
        blocks.append(source_block(value, url))
    blocks.append(constants(module))
    text = "\n\n".join(block for block in blocks if block)
    return front(name, f"Every symbol that {module.__name__} exports", order) + text + "\n"


def reference_index(modules: list[tuple[ModuleType, Path]]) -> str:
    """The source of the page that lists all modules."""
    lines = [
        "Each notebook exports one module. Each symbol has its arguments, its source and a link to",
        "the place where it is grown.\n",
    ]
    for module, notebook in modules:
        _, description = titled(notebook)
        lines.append(f"## [{short(module)}]({short(module)}.qmd)\n\n{description}\n")
        page = f"{short(module)}.qmd"
        names = [n for n in module.__all__ if showdoc.documented(module, n)]
        links = [f"[`{name}`]({page}#{showdoc.anchor(name)})" for name in names]
        lines.append(", ".join(links) + "\n")
    return front("The library, module by module", "What each chapter exports") + "\n".join(lines)


# ---------------------------------------------------------------------------------- bibliography


def citing(notebook: Path) -> set[str]:
    """The keys that a notebook cites."""
    text = "\n".join(cell.source for _, cell in markdown_cells(read(notebook)))
    return {match.group(1) for match in CITATION.finditer(text)}


def bibliography(path: Path, page_of: Callable[[Path], str]) -> str:
    """The source of the page that lists every work, and which chapters cite it."""
    references = References.from_file(path)
    entries = references.bibliography.entries
    keys = {notebook: citing(notebook) for notebook in all_notebooks()}
    references.cited = sorted(
        (key for key in entries if any(key in cited for cited in keys.values())),
        key=lambda key: (family_names(entries[key]).lower(), entries[key].fields.get("year", "")),
    )
    blocks = []
    for key, text in references.entries():
        where = [f"[{titled(n)[0]}]({page_of(n)}#ref-{key})" for n in keys if key in keys[n]]
        blocks.append(f"::: {{#ref-{key} .csl-entry}}\n{text}\nCited in {', '.join(where)}.\n:::\n")
    return front("Bibliography", "Every work that the course cites, and where") + "\n".join(blocks)


# ----------------------------------------------------------------------------------------- order


@lru_cache(maxsize=1)
def parts() -> dict[str, list[Path]]:
    """The course as the sidebar of _quarto.yml has it: the notebooks of each section, in order."""
    options = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    found = {}
    for item in options["website"]["sidebar"][0]["contents"]:
        if isinstance(item, dict):
            known = item["contents"]
            patterns = known if isinstance(known, list) else [known]
            paths = [path for pattern in patterns for path in sorted((ROOT / "nbs").glob(pattern))]
            found[item["section"]] = paths
    return found


def in_order() -> list[Path]:
    """Every notebook of the sidebar's sections, in the order of the course."""
    return [notebook for notebooks in parts().values() for notebook in notebooks]


# ----------------------------------------------------------------------------------------- cards


def card(notebook: Path, row: dict[str, str], page: str) -> str:
    """One chapter: title, what it is about, time, memory and data."""
    title, description = titled(notebook)
    sets = row["data"].replace(" ", ", ")
    cost = f"{float(row['seconds']):.0f} s · {row['peak_mb']} MB · {sets}"
    return f"::: {{.course-card}}\n[{title}]({page})\n\n{description}\n\n{cost}\n:::"


def card_grid(page_of: Callable[[Path], str]) -> str:
    """All measured chapters as cards, part by part."""
    rows, grids = cards.read_table(), []
    for part, notebooks in parts().items():
        measured = [(path, rows.get(cards.chapter_name(path))) for path in notebooks]
        found = [card(path, row, page_of(path)) for path, row in measured if row]
        if found:
            grids.append(f"### {part}\n\n:::: {{.course-cards}}\n" + "\n\n".join(found) + "\n::::")
    return "\n\n".join(grids)
