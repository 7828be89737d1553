"""Files and runs that survive: kills, damage, what is refused in which words."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from vlm_course.appendix.checkpoints import (
    Checkpoint,
    DamagedFile,
    load_checkpoint,
    load_weights,
    read_tensors,
    save_weights,
    write_tensors,
)
from vlm_course.foundations.training import (
    EMA,
    Callback,
    Evaluate,
    classification_loss,
    fit,
    unwrap,
)

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports by file, processes by name
import training_runs as runs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------ killed and resumed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    runs.long_run(folder, resume=False)
    return folder


def start(folder: Path):
    """The long run in a process of its own, forked from a clean server: real and quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs", "accelerate", "tqdm", "safetensors.torch"])
    process = context.Process(target=runs.long_run, args=(folder,), daemon=True)
    process.start()
    return process


def newest(folder: Path) -> str:
    """The name of the newest checkpoint, or nothing."""
    return max((file.name for file in folder.glob("step-*.safetensors")), default="")


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and the fork server are POSIX")
@pytest.mark.timeout(180)
def test_a_run_killed_again_and_again_ends_as_if_unbroken(unbroken, tmp_path):
    moments, kills, seen = random.Random(0), 0, set()
    process = start(tmp_path)
    while kills < 5 and process.is_alive():
        before = newest(tmp_path)
        while process.is_alive() and newest(tmp_path) == before:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.03)  # in a step, in a write, in a rename: wherever it is
        if process.is_alive():
            process.kill()
            process.join()
            assert process.exitcode == -9
            kills += 1
            seen.add(newest(tmp_path))
            process = start(tmp_path)
    process.join(120)
    assert process.exitcode == 0 and kills >= 3 and len(seen) >= 2
    for name in ("end.json", "end.safetensors", "average.safetensors"):
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert len(json.loads((tmp_path / "end.json").read_text())["losses"]) == 60


def test_the_unbroken_run_is_the_one_without_checkpoints(unbroken):
    model = runs.convnet()
    data = runs.patterns().batches(16, generator=runs.seeded(), transform=runs.noisy)
    losses = fit(model, data, classification_loss, steps=60, lr=3e-3, seed=5).losses
    assert losses == json.loads((unbroken / "end.json").read_text())["losses"]
    assert losses[-1] < losses[0] / 2


def interrupted(folder: Path, *, at: int = 7, every: int = 2, **options) -> Checkpoint:
    """A run stopped after some steps, and the checkpoints that it left."""
    checkpoint = Checkpoint(folder, every=every, **options)
    with pytest.raises(KeyboardInterrupt):
        runs.short(callbacks=[checkpoint, runs.StopAt(at)], steps=10)
    return checkpoint


def test_leftovers_of_a_killed_write_are_harmless_and_cleared(tmp_path):
    checkpoint = interrupted(tmp_path)
    leftover = tmp_path / "step-00000008.safetensors.4711.partial"
    leftover.write_bytes(b"half a file")
    whole = runs.short(steps=10)
    history = runs.short(runs.convnet(9), callbacks=[checkpoint], steps=10, resume=True)
    assert history.losses == whole.losses
    assert not leftover.exists() and len(checkpoint.files()) == 2


def test_a_kill_inside_the_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_tensors({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_tensors({"a": torch.zeros(3)}, path)
    assert torch.equal(read_tensors(path)[0]["a"], torch.ones(3))


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_loads(tmp_path):
    checkpoint = interrupted(tmp_path)
    before, last = checkpoint.files()
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match="incomplete") as error:
        runs.short(callbacks=[checkpoint], steps=10, resume=True)
    assert last.name in str(error.value) and before.name in str(error.value)
    history = runs.short(runs.convnet(9), callbacks=[checkpoint], steps=10, resume=before)
    assert history.losses == runs.short(steps=10).losses
    assert [file.name for file in checkpoint.files()] == [
        "step-00000008.safetensors", "step-00000010.safetensors"]  # fmt: skip


def test_every_flipped_bit_is_caught(tmp_path):
    checkpoint = interrupted(tmp_path, at=3)
    (path,) = checkpoint.files()
    good, moments = path.read_bytes(), random.Random(0)
    header = int.from_bytes(good[:8], "little")
    places = [moments.randrange(len(good)) for _ in range(60)]
    places += [moments.randrange(8, 8 + header) for _ in range(60)] + list(range(8))
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << moments.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=path.name):
            load_checkpoint(None, path)
    path.write_bytes(good.replace(b'"crc32"', b'"crc33"'))
    with pytest.raises(ValueError, match="damaged: its checksum"):
        read_tensors(path)
    at = 8 + header + 10
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
    with pytest.raises(ValueError, match="damaged: its checksum"):
        read_tensors(path)


@pytest.mark.parametrize("model", ["other width", "other layers"])
def test_a_checkpoint_of_another_model_names_the_keys(tmp_path, model):
    checkpoint = interrupted(tmp_path)
    other = runs.convnet(width=5) if model == "other width" else runs.plain_net()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError) as error:
        runs.short(other, callbacks=[checkpoint], steps=10, resume=True)
    words = str(error.value)
    assert checkpoint.files()[-1].name in words
    if model == "other width":
        assert "0.weight (6, 1, 3, 3) for (5, 1, 3, 3)" in words
    else:
        assert "missing ['3.bias', '3.weight']" not in words
        assert "unexpected ['1.bias', '1.num_batches_tracked'" in words
    assert runs.equal(before, other.state_dict())


def test_weights_that_do_not_fit_are_named_by_kind(tmp_path):
    small = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    path = save_weights(small, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as error:
        load_weights(nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(2, 2)), path)
    words = str(error.value)
    assert "w.safetensors" in words and "missing ['2.bias', '2.weight'] (2)" in words
    assert "unexpected ['1.bias'" in words and "0.weight (2, 3) for (5, 3)" in words


def test_weights_are_no_run(tmp_path):
    path = save_weights(runs.convnet(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors.*holds weights only.*load_weights"):
        runs.short(resume=path)


def test_the_weights_of_a_checkpoint_load_as_weights(tmp_path):
    model = runs.convnet()
    runs.short(model, callbacks=[Checkpoint(tmp_path)])
    other = load_weights(runs.convnet(9), tmp_path / "step-00000006.safetensors")
    assert runs.equal(model.state_dict(), other.state_dict())


def test_resume_refuses_another_run(tmp_path):
    checkpoint = interrupted(tmp_path)
    with pytest.raises(ValueError, match="batch_size 16, now 8"):
        fit(runs.convnet(), runs.batches(size=8), classification_loss, steps=10,
            callbacks=[checkpoint], resume=True)
    with pytest.raises(ValueError, match="images 96, now 48"):
        fit(runs.convnet(), runs.batches(48), classification_loss, steps=10,
            callbacks=[checkpoint], resume=True)
    model = runs.convnet()
    with pytest.raises(ValueError, match="optimizer 'AdamW', now 'SGD'"):
        runs.short(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), steps=10,
              callbacks=[checkpoint], resume=True)
    with pytest.raises(ValueError, match="at step 6, beyond steps=5") as error:
        runs.short(steps=5, callbacks=[checkpoint], resume=True)
    assert "the one before it" not in str(error.value)  # that helps against damage only
    model = runs.convnet(9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no state of callback EMA.0"):
        runs.short(model, steps=10, callbacks=[checkpoint, EMA()], resume=True)
    assert runs.equal(before, model.state_dict())  # checked first, changed afterwards
    model[8].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="optimiser state of '8.weight'"):
        runs.short(model, steps=10, callbacks=[checkpoint], resume=True)
    assert runs.equal(before, model.state_dict())
    with pytest.warns(UserWarning, match="a run of 10 steps, this one has 20") as caught:
        runs.short(steps=20, callbacks=[checkpoint], resume=True)
    assert Path(caught[0].filename).name == "training_runs.py"  # the line that calls `fit`


def test_resume_without_anything_to_resume(tmp_path):
    with pytest.raises(ValueError, match="needs a Checkpoint"):
        runs.short(resume=True)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        runs.short(resume=tmp_path / "nowhere.safetensors")
    assert len(runs.short(resume=True, callbacks=[Checkpoint(tmp_path / "empty")]).losses) == 6


def test_a_new_run_does_not_touch_the_checkpoints_of_an_old_one(tmp_path):
    checkpoint = interrupted(tmp_path)
    files = {file: file.read_bytes() for file in checkpoint.files()}
    with pytest.raises(FileExistsError, match="step-00000006.*resume=True"):
        runs.short(callbacks=[checkpoint])
    assert files == {file: file.read_bytes() for file in checkpoint.files()}


def test_going_back_drops_what_lies_ahead(tmp_path):
    oldest = interrupted(tmp_path, keep=3).files()[0]
    with pytest.raises(KeyboardInterrupt):
        runs.short(steps=10, resume=oldest,
              callbacks=[Checkpoint(tmp_path, every=3, keep=3), runs.StopAt(4)])
    assert [file.name for file in Checkpoint(tmp_path).files()] == [
        "step-00000002.safetensors", "step-00000003.safetensors"]  # fmt: skip


def test_a_finished_run_resumes_to_itself(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=4)
    first = runs.short(callbacks=[checkpoint, Evaluate("one", lambda m: 1.0, every=2)])
    model = runs.convnet(9)
    again = runs.short(model, callbacks=[checkpoint, Evaluate("one", lambda m: 1.0)], resume=True)
    assert again.losses == first.losses and again.evaluations == {"one": [(2, 1), (4, 1), (6, 1)]}
    assert again.seconds == pytest.approx(first.seconds, rel=0.5) and again.seconds > 0


def test_keep_and_every(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=2, keep=1)
    runs.short(callbacks=[checkpoint], steps=5)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000005.safetensors"]
    for arguments in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Checkpoint(tmp_path, **arguments)


def test_checkpoints_come_after_the_callbacks_whose_state_they_keep(tmp_path):
    class Counter(Callback):
        """Counts steps."""

        count = 0

        def on_step(self, run):
            """Count."""
            self.count += 1

        def state_dict(self):
            """The count."""
            return {"count": torch.tensor(self.count)}

    runs.short(callbacks=[Checkpoint(tmp_path, every=2), Counter()], steps=4)
    tensors, _ = read_tensors(tmp_path / "step-00000002.safetensors")
    assert int(tensors["callback.Counter.0.count"]) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_moments_keep_the_memory_format_of_their_weights(tmp_path, fused):
    """Fused AdamW reads weight and moments in storage order: other layouts give wrong steps."""

    def run(folder, *, stop=None, resume=False):
        model = runs.convnet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        callbacks = [Checkpoint(folder, every=3), *([runs.StopAt(stop)] if stop else [])]
        try:
            fit(model, runs.batches(), classification_loss, steps=9, optimizer=optimizer, seed=0,
                callbacks=callbacks, resume=resume, precision="fp32")
        except KeyboardInterrupt:
            pass
        kernel = model[3].weight
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert optimizer.state[kernel]["exp_avg"].stride() == kernel.stride()
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", stop=4)
    assert runs.equal(whole.state_dict(), run(tmp_path / "broken", resume=True).state_dict())


# ---------------------------------------------------------------------------------- files and code


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"weight": Bomb()}, protocol=2))
    torch.save({"weight": Bomb()}, tmp_path / "zip.pt")
    (tmp_path / "step-00000001.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "zip.pt"):
        with pytest.raises(ValueError, match=name):
            load_weights(nn.Linear(1, 1), tmp_path / name)
    with pytest.raises(ValueError, match="step-00000001"):
        runs.short(callbacks=[Checkpoint(tmp_path)], resume=True)
    assert not (tmp_path / "exploded").exists()


def test_a_torch_file_of_tensors_loads(tmp_path):
    model = runs.convnet()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = load_weights(runs.convnet(9), tmp_path / "w.pt")
    assert runs.equal(loaded.state_dict(), model.state_dict())
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(wrapped, tmp_path / "ddp.pt")
    loaded = load_weights(runs.convnet(9), tmp_path / "ddp.pt")
    assert runs.equal(loaded.state_dict(), model.state_dict())
    torch.save({"epoch": 3}, tmp_path / "no.pt")
    with pytest.raises(ValueError, match="no.pt.*no state_dict"):
        load_weights(model, tmp_path / "no.pt")
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "nowhere.pt")


def test_a_submodule_called_module_keeps_its_name(tmp_path):
    def build():
        model = nn.Module()
        model.module, model.weight = nn.Linear(2, 3), nn.Parameter(torch.randn(3, 2))
        return model

    model = build()
    path = save_weights(model, tmp_path / "w.safetensors")
    assert set(read_tensors(path)[0]) == {"module.weight", "module.bias", "weight"}
    assert runs.equal(load_weights(build(), path).state_dict(), model.state_dict())


def test_all_kinds_of_tensors_survive(tmp_path):
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5),
               "flag": torch.tensor([True]),
               "half": torch.randn(3).bfloat16(), "layout": torch.randn(2, 3, 4, 4).to(
                   memory_format=torch.channels_last), "view": torch.arange(10)[::2]}
    read, metadata = read_tensors(write_tensors(tensors, tmp_path / "a" / "x.safetensors",
                                                metadata={"word": "é"}))
    assert metadata == {"word": "é"} and runs.equal(read, tensors)


def test_compiled_models_and_plain_ones_share_files(tmp_path):
    plain, compiled = runs.convnet(1), torch.compile(runs.convnet(2), backend="eager")
    nested = runs.convnet(3)
    nested[3] = torch.compile(nested[3], backend="eager")
    for name, model in (("plain", plain), ("compiled", compiled), ("nested", nested)):
        path = save_weights(model, tmp_path / f"{name}.safetensors")
        assert not any("_orig_mod" in key for key in read_tensors(path)[0])
        for other in (runs.convnet(4), torch.compile(runs.convnet(5), backend="eager")):
            load_weights(other, path)
            assert all(torch.equal(a, b) for a, b in zip(
                unwrap(other).state_dict().values(), unwrap(model).state_dict().values()))
    assert unwrap(compiled) is compiled._orig_mod


@pytest.mark.timeout(120)
def test_a_compiled_model_trains_and_resumes_as_a_plain_one(tmp_path):
    whole = runs.short(steps=6, callbacks=[EMA()])
    model = torch.compile(runs.convnet(), backend="eager")
    with pytest.raises(KeyboardInterrupt):
        runs.short(model, callbacks=[EMA(), Checkpoint(tmp_path, every=2), runs.StopAt(4)])
    history = runs.short(callbacks=[EMA(), Checkpoint(tmp_path)], resume=True)
    assert history.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.timeout(120)
def test_averages_of_a_model_compiled_in_part_resume(tmp_path):
    def build(*, compiled):
        model = runs.convnet()
        model[3] = torch.compile(model[3], backend="eager") if compiled else model[3]
        return model

    with pytest.raises(KeyboardInterrupt):
        runs.short(build(compiled=True),
                   callbacks=[EMA(), Checkpoint(tmp_path, every=2), runs.StopAt(4)])
    average = EMA()
    runs.short(build(compiled=False), callbacks=[average, Checkpoint(tmp_path)], resume=True)
    assert not any("_orig_mod" in key for key in read_tensors(
        tmp_path / "step-00000006.safetensors")[0])
    assert "3.weight" in average.model.state_dict()


# ------------------------------------------------------------------------------ numbers that break


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """The square root's slope at zero is infinite: the loss is fine, the gradient is not."""

    def loss(model, images, labels):
        value = classification_loss(model, images, labels)[0]
        calls.append(1)
        return value + (model[0].bias.sum() * 0).sqrt() if len(calls) == 2 else value

    calls = []
    with pytest.raises(FloatingPointError, match=r"0\.bias is not finite after step 2 of 4"):
        fit(runs.convnet(), runs.batches(), loss, steps=4, log_every=100,
            callbacks=[Checkpoint(tmp_path, every=2)])
    assert not list(tmp_path.iterdir())
