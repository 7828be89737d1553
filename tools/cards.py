"""Measure each chapter alone and write what came out: python -m tools.cards [NOTEBOOK ...].

Wall time and peak memory go to nbs/cards.csv, to the cell tagged `chapter-card` of each chapter and
to the cell tagged `chapter-cards` of the front page. `--write` only rewrites the cells.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tools.notebooks import (
    ROOT,
    all_notebooks,
    code_cells,
    execute,
    name_cells,
    read,
    relative,
    tags,
    write,
)

TABLE = ROOT / "nbs" / "cards.csv"
INDEX = ROOT / "nbs" / "index.ipynb"
COLUMNS = ("chapter", "seconds", "peak_mb", "data", "python", "torch", "cores")
THREADS, MAX_SECONDS, MAX_MB = 2, 90, 2048
# VmHWM is the kernel process's own peak; where there is no /proc, what the system counts for it.
PEAK = """
from pathlib import Path
if Path("/proc/self/status").exists():
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
else:
    import psutil, sys
    if sys.platform == "win32":
        peak = psutil.Process().memory_info().peak_wset / 2**20
    else:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(peak)
"""


def chapters() -> list[Path]:
    """Every notebook but the front page, the appendix last."""
    pages = [path for path in all_notebooks() if path != INDEX]
    return sorted(pages, key=lambda path: path.parent.name == "appendix")


def chapter_name(path: Path) -> str:
    """A chapter as the table names it: foundations/01_images."""
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def title(path: Path) -> str:
    """The title of a chapter."""
    return read(path).cells[0].source.splitlines()[0].lstrip("# ")


def data_sets(path: Path) -> str:
    """The shipped data sets that a chapter loads by name, in order of first use."""
    shipped = {folder.name for folder in (ROOT / "data").glob("*") if folder.is_dir()}
    found = []
    for _, cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            value = getattr(node.args[0], "value", None)
            if name == "load" and value in shipped and value not in found:
                found.append(value)
    return " ".join(found) or "none"


def measure(path: Path) -> dict[str, str]:
    """The row of a chapter, run alone in a fresh kernel on two threads."""
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    start = time.perf_counter()
    notebook = execute(path, env={**os.environ, **threads}, last=PEAK)
    seconds = time.perf_counter() - start
    return {
        "chapter": chapter_name(path),
        "seconds": f"{seconds:.1f}",
        "peak_mb": f"{float(notebook.cells[-1].outputs[0].text):.0f}",
        "data": data_sets(path),
        "python": platform.python_version(),
        "torch": version("torch"),
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
    }


def read_table() -> dict[str, dict[str, str]]:
    """The rows of nbs/cards.csv by chapter; none where it does not exist yet."""
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["chapter"]: row for row in csv.DictReader(file)}


def write_table(rows: dict[str, dict[str, str]]) -> None:
    """Write nbs/cards.csv: a row for each chapter that exists, in the order of the course."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for path in chapters() if (name := chapter_name(path)) in rows)


def card(row: dict[str, str]) -> str:
    """The text of a chapter's card."""
    sets = row["data"].replace(" ", ", ")
    return (
        "| wall time | peak memory | data |\n|---|---|---|\n"
        f"| {float(row['seconds']):.0f} s | {row['peak_mb']} MB | {sets} |\n\n"
        f"*Measured from a fresh kernel on {row['cores']} cores without a GPU, with Python "
        f"{row['python']} and torch {row['torch']}; no network.*"
    )


def overview(rows: dict[str, dict[str, str]]) -> str:
    """The text of the front page's table of all chapters."""
    lines = ["| chapter | wall time | peak memory | data |", "|---|---|---|---|"]
    for path in chapters():
        row = rows.get(chapter_name(path))
        if row:
            link = f"[{title(path)}]({chapter_name(path)}.ipynb)"
            sets = row["data"].replace(" ", ", ")
            lines.append(
                f"| {link} | {float(row['seconds']):.0f} s | {row['peak_mb']} MB | {sets} |"
            )
    return "\n".join(lines)


def replace_cell(path: Path, tag: str, text: str) -> None:
    """Give the one cell of `path` with the tag a new text; SystemExit where there is none."""
    notebook = read(path)
    cells = [cell for cell in notebook.cells if tag in tags(cell)]
    if len(cells) != 1:
        raise SystemExit(
            f"{relative(path)}: wanted one markdown cell with the tag {tag}, got {len(cells)}"
        )
    cells[0].source = text
    name_cells(notebook)
    write(notebook, path)


def write_cells(rows: dict[str, dict[str, str]]) -> None:
    """Rewrite every card, and the front page's table, from the rows."""
    for path in chapters():
        if chapter_name(path) in rows:
            replace_cell(path, "chapter-card", card(rows[chapter_name(path)]))
    if INDEX.exists():
        replace_cell(INDEX, "chapter-cards", overview(rows))


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--write", action="store_true", help="rewrite the cells, measure nothing")
    arguments = parser.parse_args()
    rows = read_table()
    wanted = [path.resolve() for path in arguments.notebooks] or chapters()
    for path in [] if arguments.write else wanted:
        row = rows[chapter_name(path)] = measure(path)
        over = float(row["seconds"]) > MAX_SECONDS or float(row["peak_mb"]) > MAX_MB
        note = f"  OVER {MAX_SECONDS} s or {MAX_MB} MB" if over else ""
        print(f"{row['chapter']}: {row['seconds']} s, {row['peak_mb']} MB{note}", flush=True)
        write_table(rows)
    write_cells(rows)


if __name__ == "__main__":
    sys.exit(main())
