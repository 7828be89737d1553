"""Write the lists of the appendix into their cells: python -m tools.lists.

A list, such as the glossary's, comes from a table beside the notebooks. It stands in a markdown
cell with a tag, so that its links are those of any other text; a test compares it with the table.
"""

from __future__ import annotations

from collections.abc import Callable

from tools.cards import replace_cell
from vlm_course.appendix.article import (
    correction_list,
    load_corrections,
    load_sections,
    section_list,
)
from vlm_course.appendix.glossary import chinese_list, find_notebook, glossary_list, load_glossary
from vlm_course.appendix.instructors import load_syllabus, syllabus_list
from vlm_course.appendix.notation import load_notation, notation_list

# Page: {tag of a cell: what makes its text}
LISTS: dict[str, dict[str, Callable[[], str]]] = {
    "appendix/article": {
        "article-sections": lambda: section_list(load_sections()),
        "article-corrections": lambda: correction_list(load_corrections()),
    },
    "appendix/glossary": {
        "glossary": lambda: glossary_list(load_glossary()),
        "glossary-zh": lambda: chinese_list(load_glossary()),
    },
    "appendix/instructors": {"syllabus": lambda: syllabus_list(load_syllabus())},
    "appendix/notation": {"notation": lambda: notation_list(load_notation())},
}


def main() -> None:
    """Write every list."""
    for page, lists in LISTS.items():
        for tag, text in lists.items():
            replace_cell(find_notebook(page), tag, text())


if __name__ == "__main__":
    main()
