"""What several test files share: notebooks written on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest


@pytest.fixture
def make_notebook(tmp_path: Path) -> Callable[..., Path]:
    """Write a notebook of the given cells to `nbs/foundations/NAME.ipynb` of a temporary folder."""

    def make(*cells, name: str = "01_images", metadata: dict | None = None) -> Path:
        notebook = nbformat.v4.new_notebook(cells=list(cells), metadata=metadata or {})
        path = tmp_path / "nbs" / "foundations" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return make
