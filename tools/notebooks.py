"""Run, check and compare the course's notebooks.

    python -m tools.notebooks run  [NOTEBOOK ...]   execute in a fresh kernel, clean, write back
    python -m tools.notebooks lint [NOTEBOOK ...]   list what breaks a rule of CONTRIBUTING.md
    python -m tools.notebooks stale                 list modules that differ from a fresh export

`run` without a notebook takes those whose outputs do not belong to their sources; `run --all` takes
every one. Each command exits with 1 where there is something to report.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import nbformat
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_COLUMNS, MAX_BYTES = 40, 100, 2_000_000
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}
CHAPTER_CELLS, CHAPTER_PROSE, CHAPTER_WORDS = (60, 110), (0.57, 0.75), (2_000, 4_000)
PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}
WIDGETS = {
    "application/vnd.jupyter.widget-view+json",
    "application/vnd.jupyter.widget-state+json",
}
# Where the name that one imports is not the name that one installs.
DISTRIBUTIONS = {
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "IPython": "ipython",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@dataclass(frozen=True)
class Finding:
    """One broken rule: where it is and what is wanted."""

    path: Path
    message: str
    cell: int | None = None  # counted from 0 over all cells, as contact sheets and nbclient do

    def __str__(self) -> str:
        place = (
            relative(self.path) if self.cell is None else f"{relative(self.path)}, cell {self.cell}"
        )
        return f"{place}: {self.message}"


def relative(path: Path) -> str:
    """`path` from the repository's root, or as it is outside of it."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def settings(root: Path = ROOT) -> dict[str, str]:
    """The [DEFAULT] section of settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def all_notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook of the course: the front page first, then part by part."""
    found = (root / "nbs").rglob("*.ipynb")
    visible = [path for path in found if not any(part[0] in "._" for part in path.parts)]
    return sorted(visible, key=lambda path: (len(path.parts), path))


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path`, in format 4."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list[tuple[int, nbformat.NotebookNode]]:
    """Number and cell of each code cell that holds something."""
    cells = enumerate(notebook.cells)
    return [(n, cell) for n, cell in cells if cell.cell_type == "code" and cell.source.strip()]


def markdown_cells(notebook) -> list[tuple[int, nbformat.NotebookNode]]:
    """Number and cell of each markdown cell."""
    return [(n, cell) for n, cell in enumerate(notebook.cells) if cell.cell_type == "markdown"]


def tags(cell) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def digest(text: str) -> str:
    """Sixteen hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def source_digest(notebook) -> str:
    """What stands for all code of a notebook: `run` records it, `lint` compares it."""
    return digest("\0".join(cell.source for _, cell in code_cells(notebook)))


# ------------------------------------------------------------------------------------------- run


def execute(
    path: Path, *, timeout: int = 600, env: dict[str, str] | None = None, last: str = ""
) -> nbformat.NotebookNode:
    """The notebook at `path` executed top to bottom in a fresh kernel of this environment.

    `env` replaces the kernel's environment variables and `last` is code for a last cell of its own.
    Raises `nbclient.exceptions.CellExecutionError` at the first cell that fails.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = read(path)
    for _, cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    if last:
        notebook.cells.append(nbformat.v4.new_code_cell(last))
    # No kernel folders: "python3" is then this interpreter, whatever is installed for the user.
    specs = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs),
        timeout=timeout,
        resources={"metadata": {"path": str(Path(path).resolve().parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute(**({"env": env} if env else {}))
    notebook.metadata["executed_source"] = source_digest(notebook)
    return notebook


def clean(notebook) -> nbformat.NotebookNode:
    """`notebook` with nothing left that differs from one machine or run to the next for no reason.

    nbdev's own cleaner also erases the execution counts, which are the proof of a run from top to
    bottom: they are put back here.
    """
    from nbdev.clean import clean_nb

    executed = notebook.metadata.get("executed_source")
    counts = [cell.get("execution_count") for cell in notebook.cells]
    clean_nb(notebook, allowed_cell_metadata_keys=["tags"])
    for cell, count in zip(notebook.cells, counts, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = count
            cell.outputs = [clean_output(output, count) for output in cell.outputs]
        if not tags(cell):
            cell.metadata.pop("tags", None)
    notebook.metadata = {"kernelspec": dict(KERNELSPEC), "language_info": {"name": "python"}}
    if executed:
        notebook.metadata["executed_source"] = executed
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    name_cells(notebook)
    return nbformat.from_dict(notebook)


def clean_output(output, count: int | None):
    """One output without what nobody reads: figure reprs beside figures, dates inside SVG."""
    if output.output_type == "execute_result":
        output.execution_count = count
    data = output.get("data", {})
    if PICTURES & data.keys() and "".join(data.get("text/plain", "")).startswith("<Figure size"):
        del data["text/plain"]
    if "image/svg+xml" in data:
        svg = "".join(data["image/svg+xml"])
        data["image/svg+xml"] = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    if "metadata" in output:
        output.metadata = {}
    return output


def name_cells(notebook) -> None:
    """Give each cell an id that follows from its text, so that no tool can make the ids churn."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        copies = seen[cell.source] = seen.get(cell.source, 0) + 1
        cell["id"] = digest(cell.source if copies == 1 else f"{cell.source}\0{copies}")[:8]


def write(notebook, path: Path) -> bool:
    """Write a notebook where that changes the file; True if it did."""
    text = nbformat.writes(notebook, version=4) + "\n"
    if Path(path).exists() and Path(path).read_text(encoding="utf-8") == text:
        return False
    Path(path).write_text(text, encoding="utf-8", newline="\n")
    return True


def run(paths: list[Path], *, timeout: int = 600) -> int:
    """Execute, clean and write back each notebook; stop at the first that fails. Returns 0 or 1."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    for path in paths:
        start = time.perf_counter()
        try:
            notebook = clean(execute(path, timeout=timeout))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(
                f"{relative(path)} was left as it is: {failed_cell(path, error)}", file=sys.stderr
            )
            return 1
        changed = "written" if write(notebook, path) else "unchanged"
        print(f"{relative(path)}: {changed}, {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def failed_cell(path: Path, error: Exception) -> str:
    """Which cell of the notebook an execution error is about, and the error itself."""
    text = str(error)
    for number, cell in code_cells(read(path)):
        if cell.source.strip() in text:
            return f"cell {number} failed\n{text}"
    return text


# ----------------------------------------------------------------------- checks of one notebook


def check_title(path: Path, notebook) -> list[Finding]:
    """The first cell is a title and one line of description: a page shows nothing else of it."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or not re.fullmatch(r"# [^\n]+\n\s*> [^\n]+\s*", first.source + "\n"):
        return [Finding(path, "wanted as the first cell: `# Title`, then `> one line`, no more", 0)]
    return []


def check_execution(path: Path, notebook) -> list[Finding]:
    """The outputs come from one run, from top to bottom, of exactly the sources that stand here."""
    counts = [cell.execution_count for _, cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        return [Finding(path, "not executed top to bottom in a fresh kernel: run `make notebooks`")]
    if counts and notebook.metadata.get("executed_source") != source_digest(notebook):
        return [Finding(path, "code changed since it was executed: run `make notebooks`")]
    return []


def check_errors(path: Path, notebook) -> list[Finding]:
    """No cell ended in an error."""
    return [
        Finding(path, f"error output {output.ename}: {output.evalue}", number)
        for number, cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "error"
    ]


def check_widgets(path: Path, notebook) -> list[Finding]:
    """No widget: a page without the kernel cannot show one."""
    found = (
        [Finding(path, "widget state in the metadata")] if "widgets" in notebook.metadata else []
    )
    for number, cell in code_cells(notebook):
        if any(WIDGETS & output.get("data", {}).keys() for output in cell.outputs):
            found.append(Finding(path, "widget output: print progress as text", number))
    return found


MACHINE_PATH = re.compile(
    r"(?<![\w.~/-])/(?:home|Users|tmp|root|private|mnt|opt|work)/[\w.~-]+"
    r"|\b[A-Za-z]:\\{1,2}(?:Users|Windows|Temp|Program)"
)


def cell_texts(cell) -> list[str]:
    """Source and every textual output of a cell."""
    texts = [cell.source]
    for output in cell.get("outputs", []):
        texts.append("".join(output.get("text", "")))
        texts += output.get("traceback", [])
        data = output.get("data", {}).items()
        texts += [str(value) for kind, value in data if kind not in ("image/png", "image/jpeg")]
    return texts


def machine_path(text: str) -> str | None:
    """The first path in `text` that names a machine's own folders, or None."""
    if str(ROOT) in text:
        return str(ROOT)
    match = MACHINE_PATH.search(text)
    return match.group() if match else None


def check_machine_paths(path: Path, notebook) -> list[Finding]:
    """No path of the machine that the notebook was run on."""
    return [
        Finding(path, f"machine path {found}", number)
        for number, cell in enumerate(notebook.cells)
        for found in {machine_path(text) for text in cell_texts(cell)} - {None}
    ]


def shows_picture(cell) -> bool:
    """Whether an output of the cell is a picture."""
    return any(PICTURES & output.get("data", {}).keys() for output in cell.get("outputs", []))


def check_alt_text(path: Path, notebook) -> list[Finding]:
    """Every picture says in words what it shows."""
    alt = re.compile(r"^#\| *fig-alt: *[\"']?[^\s\"']", re.MULTILINE)
    return [
        Finding(path, 'picture without a line `#| fig-alt: "..."`', number)
        for number, cell in code_cells(notebook)
        if shows_picture(cell) and not alt.search(cell.source)
    ]


def check_compared(path: Path, notebook) -> list[Finding]:
    """A cell that nbval compares shows text on stdout or a value: the rest differs by machine."""
    found = []
    for number, cell in code_cells(notebook):
        if "nbval-check-output" not in tags(cell):
            continue
        if shows_picture(cell):
            found.append(Finding(path, "a compared cell shows a picture: assert on arrays", number))
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(Finding(path, "a compared cell writes to stderr", number))
        if not cell.outputs:
            found.append(Finding(path, "a compared cell has no output to compare", number))
    return found


def check_length(path: Path, notebook) -> list[Finding]:
    """Code cells that fit on a screen."""
    return [
        Finding(path, f"code cell of {lines} lines, at most {MAX_LINES}", number)
        for number, cell in code_cells(notebook)
        if (lines := len(cell.source.splitlines())) > MAX_LINES
    ]


def prose_words(notebook) -> int:
    """Words of the markdown cells, without code and displayed equations."""
    texts = (without_code(cell.source) for _, cell in markdown_cells(notebook))
    return sum(len(re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL).split()) for text in texts)


def is_chapter(path: Path) -> bool:
    """Whether a page teaches: the numbered ones do, except for the appendix's reference pages."""
    return Path(path).name[:1].isdigit() and Path(path).parent.name != "appendix"


def check_shape(path: Path, notebook) -> list[Finding]:
    """A chapter that can be read in one sitting, and has more words than code."""
    if not is_chapter(path):
        return []
    cells, words = len(notebook.cells), prose_words(notebook)
    share = len(markdown_cells(notebook)) / max(1, cells)
    wanted = {
        f"{cells} cells": (cells, CHAPTER_CELLS),
        f"{share:.0%} of the cells are prose": (share, CHAPTER_PROSE),
        f"{words} words of prose": (words, CHAPTER_WORDS),
    }
    return [
        Finding(path, f"{what}; a chapter has {low} to {high}")
        for what, (value, (low, high)) in wanted.items()
        if not low <= value <= high
    ]


def check_width(path: Path, notebook) -> list[Finding]:
    """Lines of code that fit on a page; `#|` options may be longer."""
    return [
        Finding(path, f"line of {len(line)} columns, at most {MAX_COLUMNS}: {line[:40]}...", number)
        for number, cell in code_cells(notebook)
        for line in cell.source.splitlines()
        if len(line) > MAX_COLUMNS and not line.startswith("#|")
    ]


def check_size(path: Path, notebook) -> list[Finding]:
    """A file that a page loads at once."""
    size = Path(path).stat().st_size
    too_big = f"{size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB"
    return [Finding(path, too_big)] if size > MAX_BYTES else []


CODE = (
    r"^[ >]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ >]*(?P=fence)[`~]*[ \t]*$"  # fenced
    r"|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"  # in a line
)
FORMULA = r"\$\$.+?\$\$|(?<![\\$])\$(?![\s$])[^$\n]+?\$"
TARGET = r"\]\([^)\s]*\)|<[^>\s]+>"
MARKDOWN = re.DOTALL | re.MULTILINE
PROTECTED = re.compile(f"{CODE}|{FORMULA}|{TARGET}", MARKDOWN)


def without_code(text: str) -> str:
    """Markdown with the code in it emptied."""
    return re.sub(CODE, lambda match: "``" if match["ticks"] else "", text, flags=MARKDOWN)


def check_maths(path: Path, notebook) -> list[Finding]:
    """No space just inside dollar signs: Quarto then shows the dollars."""
    found = []
    for number, cell in markdown_cells(notebook):
        parts = without_code(cell.source).split("$$")
        if len(parts) % 2 == 0:
            found.append(Finding(path, "a `$$` that is never closed", number))
        for formula in parts[1::2]:
            last = formula.rpartition("\n")[2]
            if re.match(r"[ \t]", formula) or re.search(r"\S[ \t]+$", last):
                shown = " ".join(formula.split())[:40]
                found.append(Finding(path, f"space just inside `$$`: {shown}", number))
        for text in parts[::2]:
            for formula in re.findall(r"(?<![\\$\w])\$ [^$\n]+ \$(?![\w$])", text):
                found.append(Finding(path, f"space just inside `$`: {formula}", number))
    return found


def default_exports(notebook) -> list[str]:
    """Every module that the notebook names in a `#| default_exp` line."""
    pattern = re.compile(r"^\s*#\s*\|\s*default_exp\s+(\S+)", re.MULTILINE)
    return [name for _, cell in code_cells(notebook) for name in pattern.findall(cell.source)]


def module_of(path: Path, root: Path = ROOT) -> str:
    """The module that a notebook's folder and name ask for: foundations/01_x → foundations.x."""
    nbs = root / "nbs"
    path = Path(path).resolve()
    parts = path.relative_to(nbs).parts if path.is_relative_to(nbs) else path.parts[-2:]
    return ".".join([*parts[:-1], re.sub(r"^\d+[a-z]?_", "", path.stem)])


EXPORT = re.compile(r"^\s*#\s*\|\s*exports?i?\b *(\S*)", re.MULTILINE)


def check_module(path: Path, notebook) -> list[Finding]:
    """One notebook exports to one module, the one that its folder and name ask for."""
    named, wanted = default_exports(notebook), module_of(path)
    cells = code_cells(notebook)
    found = []
    if not named and any(EXPORT.search(cell.source) for _, cell in cells):
        found.append(Finding(path, f"exports, but has no line `#| default_exp {wanted}`"))
    if named and named != [wanted]:
        found.append(Finding(path, f"default_exp {', '.join(named)}: wanted {wanted}, once"))
    for number, cell in cells:
        if any(EXPORT.findall(cell.source)):
            found.append(Finding(path, "exports to another module than the notebook's own", number))
    return found


KEY = r"(?!(?:eq|fig|tbl|sec|lst)-)[A-Za-z_](?:[\w:.#$%&+?<>~/-]*\w)?"
CITATION = re.compile(rf"(?<![\w.\\])@({KEY})")
EQUATION = re.compile(r"\$\$\s*\{#(eq-[\w-]+)\}")


def bibliography_keys(root: Path = ROOT) -> set[str]:
    """The keys of references.bib."""
    path = root / "references.bib"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return set(re.findall(r"^@\w+\{\s*([^,\s]+)\s*,", text, flags=re.MULTILINE))


def check_references(path: Path, notebook) -> list[Finding]:
    """Every `@key` is in references.bib and every `@eq-name` in this notebook, once."""
    texts = [(number, without_code(cell.source)) for number, cell in markdown_cells(notebook)]
    labels = [label for _, text in texts for label in EQUATION.findall(text)]
    keys = bibliography_keys()
    found = [
        Finding(path, f"equation {label} is numbered twice")
        for label in sorted({label for label in labels if labels.count(label) > 1})
    ]
    for number, text in texts:
        prose = PROTECTED.sub("", text)
        missing = set(CITATION.findall(prose)) - keys
        found += [Finding(path, f"@{key} is not in references.bib", number) for key in missing]
        missing = set(re.findall(r"@(eq-[\w-]+)", prose)) - set(labels)
        found += [Finding(path, f"@{label} names no equation", number) for label in missing]
    return found


# -------------------------------------------------------------------------------------- imports


def distribution(module: str) -> str:
    """The name, in its canonical form, under which a top-level module is installed."""
    return DISTRIBUTIONS.get(module, module).lower().replace("_", "-")


def declared(*keys: str, root: Path = ROOT) -> set[str]:
    """The distributions that the given lists of settings.ini name, in canonical form."""
    values = settings(root)
    requirements = [Requirement(text) for key in keys for text in values.get(key, "").split()]
    return {requirement.name.lower().replace("_", "-") for requirement in requirements}


def imported(source: str) -> set[str]:
    """Top-level modules that Python source imports, save those that it can do without.

    An import is optional inside `try` with an `except ImportError` or `ModuleNotFoundError`.
    """
    tree = ast.parse(source)
    optional = {id(node) for block in guarded(tree) for node in ast.walk(block)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def guarded(tree: ast.AST) -> list[ast.stmt]:
    """The statements whose failed import the code itself handles."""
    blocks = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            handled = " ".join(ast.unparse(h.type) for h in node.handlers if h.type is not None)
            if "ImportError" in handled or "ModuleNotFoundError" in handled:
                blocks += node.body
    return blocks


def undeclared(source: str, allowed: set[str]) -> list[str]:
    """Modules that `source` imports and that are neither Python's own, ours, nor in `allowed`."""
    ours = {"vlm_course", "tools", "tests"}
    return sorted(
        name
        for name in imported(source) - sys.stdlib_module_names - ours
        if distribution(name) not in allowed
    )


LIBRARY = ("requirements", "pretrained_requirements")  # the second inside functions that need it


def check_imports(path: Path, notebook) -> list[Finding]:
    """What a notebook imports, `make lab` installs; what it exports needs the library's only."""
    found = []
    for number, cell in code_cells(notebook):
        exported = EXPORT.search(cell.source)
        keys = LIBRARY if exported else [*LIBRARY, "dev_requirements"]
        plain = re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)
        if cell.source.lstrip().startswith("%%"):
            continue
        for name in undeclared(plain, declared(*keys)):
            found.append(
                Finding(path, f"imports {name}, not in {', '.join(keys)} of settings.ini", number)
            )
    return found


NOTEBOOK_CHECKS = (
    check_title,
    check_execution,
    check_errors,
    check_widgets,
    check_machine_paths,
    check_alt_text,
    check_compared,
    check_length,
    check_shape,
    check_width,
    check_size,
    check_maths,
    check_module,
    check_references,
    check_imports,
)


# --------------------------------------------------------------------- checks across notebooks


def check_one_module_each(paths: list[Path]) -> list[Finding]:
    """No two notebooks name one module: the second would wipe out what the first exports."""
    owners: dict[str, Path] = {}
    found = []
    for path in paths:
        for name in default_exports(read(path)):
            if name in owners:
                found.append(Finding(path, f"names {name}, as {relative(owners[name])} does"))
            owners.setdefault(name, path)
    return found


def check_module_imports(paths: list[Path], *keys: str) -> list[Finding]:
    """Python files import only what the given lists of settings.ini declare."""
    return [
        Finding(path, f"imports {name}, not in {', '.join(keys)} of settings.ini")
        for path in paths
        for name in undeclared(path.read_text(encoding="utf-8"), declared(*keys))
        if not path.with_name(f"{name}.py").exists()  # a script beside it
    ]


def lint(paths: list[Path] | None = None) -> list[Finding]:
    """Every finding in the given notebooks; across all of them, and in the modules, without any."""
    every = all_notebooks()
    found = []
    for path in every if paths is None else paths:
        notebook = read(path)
        for check in NOTEBOOK_CHECKS:
            found += check(path, notebook)
    found += check_one_module_each(every)
    if paths is None:
        found += check_module_imports(sorted((ROOT / "vlm_course").rglob("*.py")), *LIBRARY)
    return found


# ------------------------------------------------------------------------------------- staleness


def export(root: Path) -> None:
    """Run `nbdev_export` on the project at `root`; RuntimeError with its words if it fails."""
    code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nbdev_export failed in {root}:\n{done.stderr}")


def stale(root: Path = ROOT) -> list[Finding]:
    """Files of the library, and pyproject.toml, that differ from what the notebooks export now."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder).resolve() / root.name
        fresh.mkdir()
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(root / name, fresh / name)
        shutil.copytree(root / "nbs", fresh / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
        export(fresh)
        return differences(root, fresh, settings(root)["lib_path"])


def differences(root: Path, fresh: Path, library: str) -> list[Finding]:
    """What is missing, left over or different in `root` beside a fresh export."""

    def files(base: Path) -> dict[str, bytes]:
        paths = [*(base / library).rglob("*.py"), base / "pyproject.toml"]
        return {p.relative_to(base).as_posix(): p.read_bytes() for p in paths}

    ours, theirs = files(root), files(fresh)
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            found.append(Finding(root / name, "no notebook exports it: delete it"))
        elif name not in ours:
            found.append(Finding(root / name, "missing: run `make export`"))
        elif ours[name] != theirs[name]:
            found.append(Finding(root / name, "differs from its notebook: run `make export`"))
    return found


# ------------------------------------------------------------------------------------ command line


def unexecuted() -> list[Path]:
    """The notebooks whose outputs do not belong to their sources."""
    return [path for path in all_notebooks() if check_execution(path, read(path))]


def report(findings: list[Finding]) -> int:
    """Print the findings and how many there are; the exit code."""
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings")
    return 1 if findings else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "lint"):
        command = commands.add_parser(name)
        command.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    commands.choices["run"].add_argument("--all", action="store_true", help="every notebook")
    commands.choices["run"].add_argument("--timeout", type=int, default=600, help="seconds a cell")
    commands.add_parser("stale")
    return parser.parse_args()


def main() -> int:
    """Do what the command line asks; the exit code."""
    arguments = parse_arguments()
    if arguments.command == "stale":
        return report(stale())
    missing = [str(path) for path in arguments.notebooks if not path.is_file()]
    if missing:
        sys.exit(f"no such notebook: {', '.join(missing)}")
    if arguments.command == "lint":
        return report(lint(arguments.notebooks or None))
    paths = all_notebooks() if arguments.all else arguments.notebooks or unexecuted()
    if not paths:
        print("every notebook holds the outputs of its sources")
    return run(paths, timeout=arguments.timeout)


if __name__ == "__main__":
    sys.exit(main())
