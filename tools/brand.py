"""Draw the icon, the card that links to the site show, and the README's picture.

`python -m tools.brand` writes all three into nbs/assets/, where they are committed. The card has
the title and the description of settings.ini, so a fork runs this once after changing them. The
picture of the README is what the front page shows first.
"""

from __future__ import annotations

import base64
import io
import textwrap
from pathlib import Path

from tools.figures import pictures
from tools.notebooks import ROOT, read, settings

ASSETS = ROOT / "nbs" / "assets"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
# A picture of 4 x 4 patches, three of them seen by a model; letters are places in COLOURS.
PATCHES = ("0.1.", ".0.2", "3.0.", ".1.4")
WIDTH, HEIGHT = 1200, 630  # what social networks ask for


def squares(x: float, y: float, side: float) -> list[tuple[float, float, float, str]]:
    """The patches as x, y, side and colour, from the top left corner at (x, y)."""
    step = side / len(PATCHES)
    return [
        (
            x + column * step,
            y + row * step,
            step * 0.86,
            "#d9dfe7" if mark == "." else COLOURS[int(mark)],
        )
        for row, line in enumerate(PATCHES)
        for column, mark in enumerate(line)
    ]


def icon() -> str:
    """The icon as SVG."""
    rects = "".join(
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{side:.2f}" height="{side:.2f}" rx="1.5" '
        f'fill="{colour}"/>'
        for x, y, side, colour in squares(1, 1, 31)
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{rects}</svg>\n'


def card(path: Path) -> None:
    """Write the card as PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    values = settings()
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    for x, y, side, colour in squares(70, 115, 400):
        axes.add_patch(Rectangle((x, y), side, side, color=colour, linewidth=0))
    axes.text(540, 250, values["title"], fontsize=40, weight="bold", color="#1d2430", va="center")
    about = values["description"].rpartition(": ")[2]
    for line, text in enumerate(textwrap.wrap(about[:1].upper() + about[1:], 38)):
        axes.text(540, 325 + 45 * line, text, fontsize=19, color="#566072", va="center")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def strip(path: Path, gap: int = 24) -> None:
    """Write the first pictures of the front page side by side."""
    from PIL import Image

    cell = next(cell for cell in read(ROOT / "nbs" / "index.ipynb").cells if pictures(cell))
    parts = [
        Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).convert("RGB")
        for output in pictures(cell)
    ]
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    whole = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + gap
    whole.save(path, optimize=True)


def main() -> None:
    """Draw all three."""
    (ASSETS / "favicon.svg").write_text(icon(), encoding="utf-8")
    card(ASSETS / "social-card.png")
    strip(ASSETS / "front.png")


if __name__ == "__main__":
    main()
