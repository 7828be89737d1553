"""The pictures of a page: labels for those with a caption, and files in place of text.

A picture in a notebook is base64 or SVG inside the cell. A page that loads quickly points to files
instead, each with its size, so that nothing jumps while they arrive.
"""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

import yaml
from PIL import Image

from tools.notebooks import digest

KINDS = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
FOLDER = "figures"  # from the site's root
OPTION = re.compile(r"^#\| *([\w-]+: .*)$", re.MULTILINE)  # nbdev's own have no value


def options(source: str) -> dict:
    """The `#|` options of a code cell."""
    try:
        found = yaml.safe_load("\n".join(OPTION.findall(source)))
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}


def pictures(cell) -> list:
    """The outputs of a cell that are pictures."""
    outputs = cell.get("outputs", [])
    return [output for output in outputs if KINDS.keys() & output.get("data", {}).keys()]


def mark(cell) -> None:
    """Let readers fold the code of a cell, and give its one captioned picture a label.

    With a label both renderers number the figure, and `@fig-name` can refer to it.
    """
    known = options(cell.source)
    if known.get("echo") is False or not cell.source.strip():
        return
    added = [] if "code-fold" in known else ["#| code-fold: show"]
    if "fig-cap" in known and "label" not in known and len(pictures(cell)) == 1:
        added.append(f"#| label: fig-{digest(cell.source)[:8]}")
    cell.source = "\n".join([*added, cell.source])


def size(kind: str, content: bytes) -> tuple[int, int]:
    """Width and height in CSS pixels; (0, 0) where an SVG does not say."""
    if kind != "svg":
        return Image.open(io.BytesIO(content)).size
    pattern = rb'<svg[^>]*?\b%s="([\d.]+)pt"'
    found = [re.search(pattern % name, content) for name in (b"width", b"height")]
    return tuple(round(float(match.group(1)) * 4 / 3) if match else 0 for match in found)


def save(output, folder: Path) -> tuple[str, int, int]:
    """Write a picture to `folder`, named by its content; returns name, width and height."""
    mime = next(mime for mime in KINDS if mime in output["data"])
    text = "".join(output["data"][mime])
    content = text.encode() if mime == "image/svg+xml" else base64.b64decode(text)
    name = f"{digest(text)}.{KINDS[mime]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return name, *size(KINDS[mime], content)


def figure(output, alt: str, caption: str, folder: Path, way: str) -> str:
    """The HTML of one picture; `way` leads from the page to the site's root."""
    name, width, height = save(output, folder)
    sized = f' width="{width}" height="{height}"' if width and height else ""
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="figure"><img src="{way}{FOLDER}/{name}" alt="{html.escape(alt)}"{sized} '
        f'class="img-fluid" loading="lazy">{below}</figure>'
    )


def to_files(cells: list, folder: Path, way: str) -> dict[str, int]:
    """Put every picture of a page into a file of `folder`; returns the number of each label."""
    numbers: dict[str, int] = {}
    for cell in cells:
        found = pictures(cell)
        known = options(cell.source) if found else {}
        label, number = str(known.get("label", "")), ""
        if label.startswith("fig-"):
            numbers[label] = len(numbers) + 1
            number = f"Figure {numbers[label]}: "
        for place, output in enumerate(found):
            caption, alt = (nth(known.get(name, ""), place) for name in ("fig-cap", "fig-alt"))
            caption = f"{number}{caption}" if caption else ""
            output["data"] = {"text/html": figure(output, alt, caption, folder, way)}
    return numbers


def nth(option: str | list, place: int) -> str:
    """The text of an option for the picture at a place: a list has one for each."""
    texts = option if isinstance(option, list) else [option]
    return str(texts[min(place, len(texts) - 1)])
