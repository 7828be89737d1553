"""Two real processes: they train, count, resume and refuse as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlm_course.appendix.checkpoints import Checkpoint, load_weights, read_tensors
from vlm_course.appendix.processes import share
from vlm_course.foundations.training import accuracy

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports by file, processes by name
import training_runs as runs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(folder: Path) -> list[dict]:
    """What each process wrote down."""
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.timeout(300)
def test_two_processes_train_as_one(launched):
    model = runs.plain_net()
    alone = runs.global_run(model)
    for record in seen(launched):
        assert record["world"] == 2
        assert record["losses"] == pytest.approx(alone.losses, rel=1e-5)
        assert record["metrics"] == pytest.approx(alone.metrics["accuracy"])
    weights = [read_tensors(launched / f"weights-{rank}.safetensors")[0] for rank in (0, 1)]
    assert runs.equal(*weights)
    for key, value in model.state_dict().items():
        assert torch.allclose(weights[0][key], value, atol=2e-5), key


def test_two_processes_count_each_image_once(launched):
    model = load_weights(runs.plain_net(), launched / "weights-0.safetensors")
    data = runs.patterns(95)
    alone = accuracy(model, data.batches(10))
    assert 0.3 < alone < 1 and alone * 95 == pytest.approx(round(alone * 95))
    for record in seen(launched):
        assert record["accuracy"] == [pytest.approx(alone)] * 4
        assert record["one"] == accuracy(model, data[:1].batches(4, shuffle=False))


def test_two_processes_refuse_batches_that_they_cannotshare(launched):
    for record in seen(launched):
        assert "multiple of the 2 processes; got 15" in record["refused"][0]
        assert record["refused"][1] == "accepted"  # 90 images: a last batch of ten
        assert record["last"] == "accepted"
    class Three:
        """The part of an accelerator that sharing looks at."""

        process_index, num_processes, device = 0, 3, torch.device("cpu")

    with pytest.raises(ValueError, match="last batch of 10: use drop_last=True"):
        share(runs.patterns(100).batches(15, drop_last=False), Three)


def test_two_processes_resume(launched):
    for rank, record in enumerate(seen(launched)):
        assert record["files"] == ["step-00000004.safetensors", "step-00000008.safetensors"]
        assert record["resumed"] == record["losses"]
        assert runs.equal(read_tensors(launched / f"resumed-{rank}.safetensors")[0],
                     read_tensors(launched / "weights-0.safetensors")[0])
        assert record["twice"][0] < record["losses"][0]


def test_one_process_goes_on_where_two_stopped(launched, tmp_path):
    (path,) = Checkpoint(launched / "run").files()[:1]
    history = runs.global_run(runs.plain_net(5), resume=path)
    assert history.losses == pytest.approx(seen(launched)[0]["losses"], rel=1e-5)


def test_two_processes_end_with_one_model(launched):
    for name in ("norm", "average"):
        both = [read_tensors(launched / f"{name}-{rank}.safetensors")[0] for rank in (0, 1)]
        assert "1.running_mean" in both[0] and runs.equal(*both), name


def test_the_missing_widget_is_not_mentioned_and_other_warnings_are():
    """In a notebook without ipywidgets, importing accelerate makes tqdm warn."""
    code = """
import sys, types, warnings
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: None)
sys.modules["ipywidgets"] = None
from vlm_course.appendix.processes import make_accelerator
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    make_accelerator()
    assert "tqdm.autonotebook" in sys.modules
    warnings.warn("IProgress not found, as a user says it")
    for name in [name for name in sys.modules if name.startswith("tqdm")]:
        del sys.modules[name]
    import tqdm.auto
print(sum("IProgress" in str(w.message) for w in caught))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2", done.stdout  # the user's, and tqdm's own outside
