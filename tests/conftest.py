"""What several test files share: notebooks written on the spot, the site, sums in one order."""

from __future__ import annotations

import os
import subprocess
import sys
import time
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


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The site, rendered once for all workers, or the one that COURSE_SITE names."""
    from tools import site

    if "COURSE_SITE" in os.environ:
        return Path(os.environ["COURSE_SITE"]).resolve()
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "rendered"
    try:
        shared.mkdir()
    except FileExistsError:  # another worker renders it
        limit = time.monotonic() + 240
        while not (shared / "done").exists():
            assert time.monotonic() < limit, "the worker that renders the site failed or hangs"
            time.sleep(0.2)
    else:
        site.build_site(shared / "_site", folder=shared / "_proc")
        (shared / "done").touch()
    return shared / "_site"


@pytest.fixture
def one_thread():
    """Sums in one order, so that equal runs are equal to the bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, request) -> Path:
    """What two processes of `accelerate launch` left behind that ran the test module's `runs`."""
    folder = tmp_path_factory.mktemp("launched")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
               "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", "0", request.module.runs.__file__, str(folder)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
