"""What several test files share: notebooks written on the spot, sums in one order."""

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


@pytest.fixture
def one_thread():
    """Sums in one order, so that equal runs are equal to the bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
