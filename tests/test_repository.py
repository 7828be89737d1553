"""The repository keeps its own rules, and each rule is one that can be broken."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from packaging.requirements import Requirement

import vlm_course
from tools import cards, notebooks
from vlm_course.appendix.files import OFFLINE

ROOT = notebooks.ROOT
NOTEBOOKS = notebooks.all_notebooks()
CHAPTERS = cards.chapters()
PICTURE = new_output("display_data", {"image/png": "aGVsbG8=", "text/plain": "<Figure size 1x1>"})


def words(findings: list[notebooks.Finding]) -> list[str]:
    """Findings as text, which is what a failed assertion shows."""
    return [str(finding) for finding in findings]


@lru_cache(maxsize=2)
def read(path: Path):
    """A notebook, read once for all checks."""
    return notebooks.read(path)


# ------------------------------------------------------------------------- the rules are kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebooks.relative)
@pytest.mark.parametrize("check", notebooks.NOTEBOOK_CHECKS, ids=lambda check: check.__name__)
def test_notebook_keeps_the_rule(path, check):
    assert words(check(path, read(path))) == []


def test_one_module_for_each_notebook():
    assert words(notebooks.check_one_module_each(NOTEBOOKS)) == []


def test_modules_are_what_the_notebooks_export():
    assert words(notebooks.stale()) == []


@pytest.mark.parametrize(
    ("folder", "lists"),
    [
        ("vlm_course", ["requirements", "pretrained_requirements"]),
        ("tools", ["requirements", "dev_requirements", "docs_requirements"]),
        ("tests", ["requirements", "dev_requirements", "docs_requirements"]),
    ],
)
def test_imports_are_declared(folder, lists):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert words(notebooks.check_module_imports(paths, *lists)) == []


# -------------------------------------------------------------------- the rules can be broken


def code(source: str, *outputs, tags: tuple[str, ...] = (), count: int | None = 1):
    """A code cell as it stands in a file."""
    metadata = {"tags": list(tags)} if tags else {}
    return new_code_cell(source, outputs=list(outputs), execution_count=count, metadata=metadata)


def stream(text: str, name: str = "stdout"):
    """What a cell printed."""
    return new_output("stream", name=name, text=text)


HOME = "/" + "home/ada/pictures"
def chapter(prose: int, cells: int, *, words: int) -> list:
    """`prose` markdown cells of `words` words each, and `cells` code cells."""
    texts = [new_markdown_cell("word " * words) for _ in range(prose)]
    return texts + [code("x = 1") for _ in range(cells)]


BROKEN = {
    "no title": (notebooks.check_title, [code("1")]),
    "more than a title": (notebooks.check_title, [new_markdown_cell("# T\n\n> d\n\nObjectives")]),
    "never executed": (notebooks.check_execution, [code("1", count=None)]),
    "out of order": (notebooks.check_execution, [code("1", count=2), code("2", count=1)]),
    "not from a fresh kernel": (notebooks.check_execution, [code("1", count=7)]),
    "edited after the run": (notebooks.check_execution, [code("1")]),
    "error output": (
        notebooks.check_errors,
        [code("1 / 0", new_output("error", ename="E", evalue="v", traceback=[]))],
    ),
    "widget": (
        notebooks.check_widgets,
        [code("1", new_output("display_data", {sorted(notebooks.WIDGETS)[1]: {}}))],
    ),
    "machine path in code": (notebooks.check_machine_paths, [code(f"open('{HOME}')")]),
    "machine path in an output": (notebooks.check_machine_paths, [code("1", stream(f"at {HOME}"))]),
    "path on Windows": (notebooks.check_machine_paths, [new_markdown_cell("C:" + "\\Users\\ada")]),
    "the repository's path": (notebooks.check_machine_paths, [code("1", stream(str(ROOT)))]),
    "picture without alt text": (notebooks.check_alt_text, [code("plot()", PICTURE)]),
    "empty alt text": (notebooks.check_alt_text, [code('#| fig-alt: ""\nplot()', PICTURE)]),
    "compared picture": (
        notebooks.check_compared,
        [code("plot()", PICTURE, tags=("nbval-check-output",))],
    ),
    "compared stderr": (
        notebooks.check_compared,
        [code("1", stream("50%", "stderr"), tags=("nbval-check-output",))],
    ),
    "nothing to compare": (notebooks.check_compared, [code("1;", tags=("nbval-check-output",))]),
    "59 cells": (notebooks.check_shape, chapter(37, 22, words=60)),
    "111 cells": (notebooks.check_shape, chapter(67, 44, words=36)),
    "more code than prose": (notebooks.check_shape, chapter(50, 50, words=60)),
    "1,980 words": (notebooks.check_shape, chapter(60, 40, words=33)),
    "4,020 words": (notebooks.check_shape, chapter(60, 40, words=67)),
    "41 lines": (notebooks.check_length, [code("x = 1\n" * 41)]),
    "101 columns": (notebooks.check_width, [code("x" * 101)]),
    "over 2 MB": (notebooks.check_size, [new_markdown_cell("x" * 2_000_001)]),
    "space after $$": (notebooks.check_maths, [new_markdown_cell("$$ x = 1$$")]),
    "space before $$": (notebooks.check_maths, [new_markdown_cell("$$x = 1 $$ {#eq-x}")]),
    "spaces inside $": (notebooks.check_maths, [new_markdown_cell("where $ x $ is")]),
    "open $$": (notebooks.check_maths, [new_markdown_cell("$$x = 1$")]),
    "another module": (notebooks.check_module, [code("#| default_exp foundations.other")]),
    "two modules": (
        notebooks.check_module,
        [code("#| default_exp foundations.images"), code("#| default_exp foundations.images")],
    ),
    "no module": (notebooks.check_module, [code("#| export\nx = 1")]),
    "export elsewhere": (
        notebooks.check_module,
        [code("#| default_exp foundations.images"), code("#| export transfer.other\nx = 1")],
    ),
    "unknown citation": (notebooks.check_references, [new_markdown_cell("as in [@nobody1900no]")]),
    "unknown equation": (notebooks.check_references, [new_markdown_cell("by @eq-nothing")]),
    "equation twice": (
        notebooks.check_references,
        [new_markdown_cell("$$x$$ {#eq-x}\n\n$$y$$ {#eq-x}")],
    ),
    "undeclared import": (notebooks.check_imports, [code("import surely_not_installed.part")]),
    "exported import of a tool": (notebooks.check_imports, [code("#| export\nimport lightly")]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_reported(name, make_notebook):
    check, cells = BROKEN[name]
    path = make_notebook(*cells)
    found = check(path, notebooks.read(path))
    assert len(found) == 1, words(found)


def test_good_notebook_has_no_finding(make_notebook):
    path = make_notebook(
        new_markdown_cell("# Title\n\n> One line."),
        new_markdown_cell("$$\nx = 1\n$$ {#eq-x}\n\nBy @eq-x, $x$ costs \\$5 or `$ 5 $`.\n"),
        code("#| default_exp foundations.images", count=None),
        code(
            '#| fig-alt: "A line."\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);', count=None
        ),
        code("#| export\nimport torch", count=None),
        code("1 + 1", tags=("nbval-check-output",), count=None),
    )
    assert notebooks.run([path]) == 0
    checks = set(notebooks.NOTEBOOK_CHECKS) - {notebooks.check_shape}
    assert words(sum([check(path, notebooks.read(path)) for check in checks], [])) == []


def test_shape_is_asked_of_chapters_alone(make_notebook):
    path = make_notebook(*chapter(3, 1, words=60))
    assert notebooks.check_shape(path, notebooks.read(path))
    (page := path.with_name("train.ipynb")).write_text(path.read_text())
    assert not notebooks.check_shape(page, notebooks.read(page))


def test_code_and_displayed_equations_are_not_words(make_notebook):
    text = "one two\n\n$$\nx + y\n$$ {#eq-x}\n\n```python\na b c\n```"
    path = make_notebook(new_markdown_cell(text))
    assert notebooks.prose_words(notebooks.read(path)) <= 4  # the label and the empty fence count


def test_two_notebooks_with_one_module_are_reported(make_notebook):
    cell = code("#| default_exp foundations.images")
    paths = [make_notebook(cell, name="01_images"), make_notebook(cell, name="02_images")]
    assert len(notebooks.check_one_module_each(paths)) == 1


def test_undeclared_import_of_a_module_is_reported(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    import timm\ntry:\n    import wandb\nexcept ImportError:\n    pass\n"
    )
    found = notebooks.check_module_imports([path], "requirements")
    assert [finding.message.split(",")[0] for finding in found] == ["imports timm"]


def test_stale_modules_are_reported(make_notebook, tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    make_notebook(code("#| default_exp foundations.images"), code("#| export\nx = 1"))
    notebooks.export(tmp_path)
    assert words(notebooks.stale(tmp_path)) == []
    module = tmp_path / "vlm_course" / "foundations" / "images.py"
    module.write_text(module.read_text() + "# by hand\n")
    (module.parent / "extra.py").touch()
    (tmp_path / "vlm_course" / "_modidx.py").unlink()
    messages = [finding.message.split(":")[0] for finding in notebooks.stale(tmp_path)]
    assert messages == [
        "missing",
        "no notebook exports it",
        "differs from its notebook",
    ]


# --------------------------------------------------------------------------- running notebooks


def test_run_names_the_cell_that_fails_and_leaves_the_file(make_notebook, capsys):
    path = make_notebook(new_markdown_cell("# T"), code("x = 1"), code("raise ValueError('no')"))
    before = path.read_bytes()
    assert notebooks.run([path]) == 1
    assert path.read_bytes() == before
    message = capsys.readouterr().err
    assert "cell 2 failed" in message and "ValueError" in message


def test_run_cleans_and_does_not_churn(make_notebook):
    path = make_notebook(
        code("import sys, time\nprint('a'); print('b')", count=None),
        code("print('1%', end='\\r', file=sys.stderr)\nprint('99%', file=sys.stderr)", count=None),
        code(
            '#| fig-alt: "A line."\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);', count=None
        ),
        code("6 * 7", tags=("nbval-check-output",), count=None),
        metadata={"widgets": {}, "kernelspec": {"name": "elsewhere", "display_name": "Elsewhere"}},
    )
    assert notebooks.run([path]) == 0
    first, notebook = path.read_bytes(), notebooks.read(path)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3, 4]
    assert notebook.cells[0].outputs[0].text == "a\nb\n"
    assert notebook.cells[1].outputs[0].text == "99%\n"
    assert list(notebook.cells[2].outputs[0].data) == ["image/png"]
    assert notebook.cells[3].metadata == {"tags": ["nbval-check-output"]}
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert notebooks.run([path]) == 0
    assert path.read_bytes() == first


# ------------------------------------------------------------------------------ cards and sizes


@pytest.mark.parametrize("path", CHAPTERS, ids=notebooks.relative)
def test_chapter_is_measured_and_within_its_limits(path):
    row = cards.read_table().get(cards.chapter_name(path))
    assert row is not None, "no row in nbs/cards.csv: run `make cards`"
    assert float(row["seconds"]) <= cards.MAX_SECONDS
    assert float(row["peak_mb"]) <= cards.MAX_MB
    assert row["data"] == cards.data_sets(path)
    shown = [cell.source for cell in read(path).cells if "chapter-card" in notebooks.tags(cell)]
    assert shown == [cards.card(row)]


def test_card_finds_data_however_it_is_named(make_notebook):
    loop = "for name in ('photos', 'emoji'):\n    load(name, size=8)\nx = {'emoji': 'no such set'}"
    exported = "#| exports\nKNOWN = ('fashion_mnist',)"
    path = make_notebook(code("1"), code(exported), code(loop), new_markdown_cell("'emoji'"))
    assert cards.data_sets(path) == "photos emoji"
    assert cards.data_sets(make_notebook(code("'clothes'"), code(exported))) == "none"


def test_the_first_chapter_uses_every_set_that_ships():
    path = ROOT / "nbs" / "foundations" / "01_images.ipynb"
    folders = {folder.name for folder in (ROOT / "data").iterdir() if folder.is_dir()}
    assert folders == {*OFFLINE, "runs"}  # those are networks, not pictures
    assert set(cards.data_sets(path).split()) == set(OFFLINE)


def test_front_page_shows_every_card():
    rows = cards.read_table()
    assert set(rows) == {cards.chapter_name(path) for path in CHAPTERS}
    cells = notebooks.read(cards.INDEX).cells
    shown = [cell.source for cell in cells if "chapter-cards" in notebooks.tags(cell)]
    assert shown == [cards.overview(rows)]


def test_data_stays_small():
    runs, sizes = ROOT / "data" / "runs", {True: 0, False: 0}
    for path in (ROOT / "data").rglob("*"):
        sizes[runs in path.parents] += path.stat().st_size if path.is_file() else 0
    assert sizes[False] <= 20_000_000, "pictures"
    assert sizes[True] <= 26_000_000, "trained networks"


# ------------------------------------------------------------------------------------ packaging


def test_version_and_requirements_are_those_of_settings():
    settings = notebooks.settings()
    installed = distribution("vlm_course")
    assert settings["version"] == vlm_course.__version__ == installed.version
    wanted = {str(Requirement(text)) for text in settings["requirements"].split()}
    given = [Requirement(text) for text in installed.requires]
    assert {str(r) for r in given if "extra" not in str(r.marker)} == wanted
    extras = {
        key.removesuffix("_requirements") for key in settings if key.endswith("_requirements")
    }
    assert set(installed.metadata.get_all("Provides-Extra")) == extras


def test_nbdev_reads_the_same_settings():
    from nbdev.config import get_config

    config, settings = get_config(path=ROOT), notebooks.settings()
    for key in ("requirements", "dev_requirements", "version", "lib_name", "min_python"):
        assert config[key] == settings[key]
    assert config.nbs_path == ROOT / "nbs" and config.lib_path == ROOT / "vlm_course"


def test_wheel_carries_library_and_data(tmp_path):
    names = [
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "LICENSE-CONTENT",
    ]
    for name in names:
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("vlm_course", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path / "dist", tmp_path], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    prefix = f"vlm_course-{vlm_course.__version__}.data/data/share/vlm_course/"
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    data = [path for path in files if path.suffix != ".py"]
    modules = [path for path in (tmp_path / "vlm_course").rglob("*.py")]
    assert {prefix + path.relative_to(tmp_path).as_posix() for path in data} <= held
    assert {path.relative_to(tmp_path).as_posix() for path in modules} <= held


def python(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_needs_no_tool():
    tools = "{'nbdev', 'fastcore', 'matplotlib', 'accelerate', 'IPython'}"
    modules = "vlm_course, vlm_course.foundations.images"
    assert python(f"import {modules}, sys; print(sorted({tools} & set(sys.modules)))") == "[]"


def test_import_costs_nothing_beyond_torch():
    clock = "time.perf_counter()"
    timed = f"import torch, time; start = {clock}; import vlm_course; print({clock} - start)"
    assert float(python(timed)) < 0.1


# -------------------------------------------------------------------- README and tracked files


def test_readme_commands_are_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        commands = set(
            re.findall(r"(?:^|`)make (?:[A-Z_]+=\S+ )*([a-z]+)", text, flags=re.MULTILINE)
        )
        assert commands and commands <= targets, name


def test_lines_of_code_fit_on_a_page():
    paths = [*(ROOT / "tools").glob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"]
    lines = [(path.name, line) for path in paths for line in path.read_text("utf-8").splitlines()]
    assert [pair for pair in lines if len(pair[1]) > notebooks.MAX_COLUMNS] == []


def test_tracked_files_name_no_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = "/(" + "|".join(["home", "Users", "work", "tmp", "root"]) + ")/[a-zA-Z.]"
    hosts = "|".join(["pypi[.]org", "python" + "hosted", "registry[.]npmjs", "deb[.]debian"])
    command = ["git", "grep", "-nIoE", f"(^|[^a-zA-Z0-9._~/-])({paths})|{hosts}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.splitlines() == []
