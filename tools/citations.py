"""Citations and numbers for a renderer that knows neither (Quarto knows both).

`[@key]` becomes a link to an entry of a list of references, `$$...$$ {#eq-name}` gets a number, and
`@eq-name` a link to it, as `@fig-name` to a figure. Code and formulas stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from pybtex.database import BibliographyData, Entry, parse_file
from pybtex.plugin import find_plugin

from tools.notebooks import CITATION, KEY, PROTECTED

EQUATION = re.compile(r"\$\$((?:(?!\$\$).)+)\$\$[ \t]*\{#(eq-[\w-]+)\}", re.DOTALL)
BRACKET = re.compile(rf"\[((?:[^\[\]@]*@{KEY}[^\[\]]*))\](?!\()")
USE = re.compile(r"(?<![\w\\])@((eq|fig)-[\w-]*\w)")
URL = re.compile(r"\\url ?(https?://[^\s,]*[^\s,.])")
REFERENCES = re.compile(r"^::: *\{#refs\}\s*:::", re.MULTILINE)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to all of it but code, formulas and link targets."""
    parts, start = [], 0
    for match in PROTECTED.finditer(text):
        parts += [change(text[start : match.start()]), match.group()]
        start = match.end()
    return "".join([*parts, change(text[start:])])


def family_names(entry: Entry) -> str:
    """The authors in running text: one, two or three names, else the first and "et al."."""
    people = entry.persons.get("author") or entry.persons.get("editor") or []
    names = [" ".join([*p.prelast_names, *p.last_names]).strip("{}") for p in people]
    if len(names) > 3:
        return f"{names[0]} et al."
    if len(names) == 3:
        return f"{names[0]}, {names[1]}, and {names[2]}"
    return " and ".join(names) or entry.fields.get("title", "Anonymous")


@lru_cache(maxsize=1)
def parse(path: Path, changed: int) -> BibliographyData:
    """The BibTeX file at `path`, read once for all pages; `changed` is when it was written."""
    return parse_file(str(path))


class References:
    """The bibliography as one page uses it: what is cited, and which labels have a number."""

    def __init__(self, bibliography: BibliographyData):
        self.bibliography = bibliography
        self.cited: list[str] = []
        self.equations: dict[str, int] = {}
        self.figures: dict[str, int] = {}

    @classmethod
    def from_file(cls, path: Path) -> References:
        """The references of the BibTeX file at `path`; none where there is no such file."""
        return cls(parse(path, path.stat().st_mtime_ns) if path.exists() else BibliographyData())

    def link(self, key: str, text: str) -> str:
        """A link to the entry of `key`, which is now one that the page cites."""
        if key not in self.cited:
            self.cited.append(key)
        return f"[{text}](#ref-{key})"

    def narrative(self, match: re.Match) -> str:
        """`@key` in running text: He et al. (2016)."""
        entry = self.bibliography.entries.get(match.group(1))
        if entry is None:
            return match.group()
        text = f"{family_names(entry)} ({entry.fields.get('year', 'n.d.')})"
        return self.link(match.group(1), text)

    def bracket(self, match: re.Match) -> str:
        """`[see @key, p. 3; @other]` in brackets: (see He et al. 2016, p. 3; ...)."""

        def one(found: re.Match) -> str:
            entry = self.bibliography.entries.get(found.group(1))
            if entry is None:
                return found.group()
            text = f"{family_names(entry)} {entry.fields.get('year', 'n.d.')}"
            return self.link(found.group(1), text)

        inner = re.sub(rf"(?<!\w)-?@({KEY})", one, match.group(1))
        return match.group() if inner == match.group(1) else f"({inner})"

    def number_equations(self, text: str) -> str:
        """`text` with a number in place of each equation's name."""

        def numbered(match: re.Match) -> str:
            number = self.equations.setdefault(match.group(2), len(self.equations) + 1)
            formula = match.group(1).strip()
            return (
                f"\n\n::: {{#{match.group(2)}}}\n\n$$\n{formula} \\tag{{{number}}}\n$$\n\n:::\n\n"
            )

        return EQUATION.sub(numbered, text)

    def use(self, match: re.Match) -> str:
        """`@eq-name` or `@fig-name`: a link that says Equation or Figure and its number."""
        label, kind = match.groups()
        word, numbers = ("Equation", self.equations) if kind == "eq" else ("Figure", self.figures)
        return f"[{word} {numbers[label]}](#{label})" if label in numbers else match.group()

    def cite(self, text: str) -> str:
        """`text` with links in place of citations and of references to equations and figures."""

        def change(part: str) -> str:
            part = BRACKET.sub(self.bracket, part)
            part = USE.sub(self.use, part)
            return CITATION.sub(self.narrative, part)

        return outside_code(text, change)

    def entries(self) -> list[tuple[str, str]]:
        """Key and text of every work that is cited, by author."""
        if not self.cited:
            return []
        style = find_plugin("pybtex.style.formatting", "plain")(name_style="lastfirst")
        backend = find_plugin("pybtex.backends", "markdown")()
        found = style.format_bibliography(self.bibliography, self.cited)
        texts = [(entry.key, " ".join(entry.text.render(backend).split())) for entry in found]
        return [(key, URL.sub(r"<\1>", text)) for key, text in texts]

    def listing(self) -> str:
        """The list of references, by author, each entry with an id to link to; "" for none."""
        entry = ":::: {{#ref-{} .csl-entry}}\n{}\n::::\n\n"
        blocks = [entry.format(key, text) for key, text in self.entries()]
        return "::: {#refs}\n\n" + "".join(blocks) + ":::" if blocks else ""


def resolve(
    texts: Iterable[str], bibliography: Path, figures: dict[str, int] | None = None
) -> list[str]:
    """The Markdown texts of one page with every citation and number resolved.

    `figures` has the number of each figure's label. The list of references takes the place of an
    empty `::: {#refs}` block, or comes last.
    """
    references = References.from_file(bibliography)
    references.figures = figures or {}
    numbered = [references.number_equations(text) for text in texts]
    done = [references.cite(text) for text in numbered]
    listing = references.listing()
    for position, text in enumerate(done):
        if REFERENCES.search(text):
            done[position] = REFERENCES.sub(lambda _: listing, text)
            return done
    return [*done[:-1], f"{done[-1]}\n\n{listing}"] if done and listing else done
