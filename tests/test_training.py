"""The training loop: what a run records, what survives a kill, what is refused in which words."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.foundations import training
from vlm_course.foundations.training import (
    EMA,
    Callback,
    Checkpoint,
    Evaluate,
    History,
    accuracy,
    autocast_dtype,
    classification_loss,
    constant_schedule,
    cosine_schedule,
    count_parameters,
    evaluation_mode,
    fit,
    load_weights,
    parameter_groups,
    plot_history,
    predict,
    read_tensors,
    save_weights,
    unwrap,
    write_tensors,
)

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports by file, processes by name
import training_runs as runs  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that equal runs are equal to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(count: int = 96, size: int = 16, **options):
    """Training batches of the toy set, from a generator of their own."""
    return runs.patterns(count).batches(size, generator=runs.seeded(), **options)


def short(model: nn.Module | None = None, **options) -> History:
    """A run of a few steps on the toy set."""
    options = {"steps": 6, "seed": 1, **options}
    return fit(model or runs.convnet(), batches(), classification_loss, **options)


def equal(a: dict, b: dict) -> bool:
    """Whether two state dicts hold the same keys and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Spy(Callback):
    """Writes down when it was called."""

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def on_start(self, run):
        """Note it."""
        self.log.append((self.name, "start"))

    def on_step(self, run):
        """Note the step."""
        self.log.append((self.name, run.step))

    def on_end(self, run):
        """Note it."""
        self.log.append((self.name, "end"))


# --------------------------------------------------------------------------- killed and resumed


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
        short(callbacks=[checkpoint, runs.StopAt(at)], steps=10)
    return checkpoint


def test_leftovers_of_a_killed_write_are_harmless_and_cleared(tmp_path):
    checkpoint = interrupted(tmp_path)
    leftover = tmp_path / "step-00000008.safetensors.4711.partial"
    leftover.write_bytes(b"half a file")
    whole = short(steps=10)
    history = short(runs.convnet(9), callbacks=[checkpoint], steps=10, resume=True)
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
    with pytest.raises(ValueError, match="incomplete") as error:
        short(callbacks=[checkpoint], steps=10, resume=True)
    assert last.name in str(error.value) and before.name in str(error.value)
    history = short(runs.convnet(9), callbacks=[checkpoint], steps=10, resume=before)
    assert history.losses == short(steps=10).losses
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
            training.load_checkpoint(None, path)
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
        short(other, callbacks=[checkpoint], steps=10, resume=True)
    words = str(error.value)
    assert checkpoint.files()[-1].name in words
    if model == "other width":
        assert "0.weight (6, 1, 3, 3) for (5, 1, 3, 3)" in words
    else:
        assert "missing ['3.bias', '3.weight']" not in words
        assert "unexpected ['1.bias', '1.num_batches_tracked'" in words
    assert equal(before, other.state_dict())


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
        short(resume=path)


def test_the_weights_of_a_checkpoint_load_as_weights(tmp_path):
    model = runs.convnet()
    short(model, callbacks=[Checkpoint(tmp_path)])
    other = load_weights(runs.convnet(9), tmp_path / "step-00000006.safetensors")
    assert equal(model.state_dict(), other.state_dict())


def test_resume_refuses_another_run(tmp_path):
    checkpoint = interrupted(tmp_path)
    with pytest.raises(ValueError, match="batch_size 16, now 8"):
        fit(runs.convnet(), batches(size=8), classification_loss, steps=10, callbacks=[checkpoint],
            resume=True)
    with pytest.raises(ValueError, match="images 96, now 48"):
        fit(runs.convnet(), batches(48), classification_loss, steps=10, callbacks=[checkpoint],
            resume=True)
    model = runs.convnet()
    with pytest.raises(ValueError, match="optimizer 'AdamW', now 'SGD'"):
        short(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), steps=10,
              callbacks=[checkpoint], resume=True)
    with pytest.raises(ValueError, match="at step 6, beyond steps=5"):
        short(steps=5, callbacks=[checkpoint], resume=True)
    with pytest.raises(ValueError, match="no state of callback EMA.0"):
        short(steps=10, callbacks=[checkpoint, EMA()], resume=True)
    with pytest.warns(UserWarning, match="a run of 10 steps, this one has 20"):
        short(steps=20, callbacks=[checkpoint], resume=True)


def test_resume_without_anything_to_resume(tmp_path):
    with pytest.raises(ValueError, match="needs a Checkpoint"):
        short(resume=True)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        short(resume=tmp_path / "nowhere.safetensors")
    assert len(short(resume=True, callbacks=[Checkpoint(tmp_path / "empty")]).losses) == 6


def test_a_new_run_does_not_touch_the_checkpoints_of_an_old_one(tmp_path):
    checkpoint = interrupted(tmp_path)
    files = {file: file.read_bytes() for file in checkpoint.files()}
    with pytest.raises(FileExistsError, match="step-00000006.*resume=True"):
        short(callbacks=[checkpoint])
    assert files == {file: file.read_bytes() for file in checkpoint.files()}


def test_going_back_drops_what_lies_ahead(tmp_path):
    oldest = interrupted(tmp_path, keep=3).files()[0]
    with pytest.raises(KeyboardInterrupt):
        short(steps=10, resume=oldest,
              callbacks=[Checkpoint(tmp_path, every=3, keep=3), runs.StopAt(4)])
    assert [file.name for file in Checkpoint(tmp_path).files()] == [
        "step-00000002.safetensors", "step-00000003.safetensors"]  # fmt: skip


def test_a_finished_run_resumes_to_itself(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=4)
    first = short(callbacks=[checkpoint, Evaluate("one", lambda m: 1.0, every=2)])
    model = runs.convnet(9)
    again = short(model, callbacks=[checkpoint, Evaluate("one", lambda m: 1.0)], resume=True)
    assert again.losses == first.losses and again.evaluations == {"one": [(2, 1), (4, 1), (6, 1)]}
    assert again.seconds == pytest.approx(first.seconds, rel=0.5) and again.seconds > 0


def test_keep_and_every(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=2, keep=1)
    short(callbacks=[checkpoint], steps=5)
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

    short(callbacks=[Checkpoint(tmp_path, every=2), Counter()], steps=4)
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
            fit(model, batches(), classification_loss, steps=9, optimizer=optimizer, seed=0,
                callbacks=callbacks, resume=resume, precision="fp32")
        except KeyboardInterrupt:
            pass
        kernel = model[3].weight
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert optimizer.state[kernel]["exp_avg"].stride() == kernel.stride()
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", stop=4)
    assert equal(whole.state_dict(), run(tmp_path / "broken", resume=True).state_dict())


def test_an_optimizer_follows_its_model_into_another_memory_format():
    def run(fused):
        model = runs.convnet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        for layout in (False, True):
            short(model, optimizer=optimizer, channels_last=layout, precision="fp32", steps=3)
        assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
        return model[3].weight.detach()

    assert torch.allclose(run(True), run(False), atol=1e-4)


# ------------------------------------------------------------------------------- files and code


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
        short(callbacks=[Checkpoint(tmp_path)], resume=True)
    assert not (tmp_path / "exploded").exists()


def test_a_torch_file_of_tensors_loads(tmp_path):
    model = runs.convnet()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert equal(load_weights(runs.convnet(9), tmp_path / "w.pt").state_dict(), model.state_dict())
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(wrapped, tmp_path / "ddp.pt")
    loaded = load_weights(runs.convnet(9), tmp_path / "ddp.pt")
    assert equal(loaded.state_dict(), model.state_dict())
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
    assert equal(load_weights(build(), path).state_dict(), model.state_dict())


def test_all_kinds_of_tensors_survive(tmp_path):
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5),
               "flag": torch.tensor([True]),
               "half": torch.randn(3).bfloat16(), "layout": torch.randn(2, 3, 4, 4).to(
                   memory_format=torch.channels_last), "view": torch.arange(10)[::2]}
    read, metadata = read_tensors(write_tensors(tensors, tmp_path / "a" / "x.safetensors",
                                                metadata={"word": "é"}))
    assert metadata == {"word": "é"} and equal(read, tensors)


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
    whole = short(steps=6, callbacks=[EMA()])
    model = torch.compile(runs.convnet(), backend="eager")
    with pytest.raises(KeyboardInterrupt):
        short(model, callbacks=[EMA(), Checkpoint(tmp_path, every=2), runs.StopAt(4)])
    history = short(callbacks=[EMA(), Checkpoint(tmp_path)], resume=True)
    assert history.losses == pytest.approx(whole.losses, rel=1e-5)


# ------------------------------------------------------------------------------ numbers that break


class Poison(Callback):
    """Turns weights into NaN."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, run):
        """Poison the first weight, after the step given."""
        if run.step == self.step:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_the_run_and_its_step_is_named(tmp_path):
    checkpoint = Checkpoint(tmp_path, every=2)
    with pytest.raises(FloatingPointError, match="loss is nan at step 6 of 10"):
        short(steps=10, callbacks=[Poison(5), checkpoint])
    assert [file.name for file in checkpoint.files()][-1] == "step-00000004.safetensors"
    assert short(steps=10, callbacks=[checkpoint], resume=True).losses == short(steps=10).losses


def test_the_step_is_right_between_two_looks():
    with pytest.raises(FloatingPointError, match="at step 4 of 30"):
        short(steps=30, callbacks=[Poison(3)], log_every=25)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """The square root's slope at zero is infinite: the loss is fine, the gradient is not."""

    def loss(model, images, labels):
        value = classification_loss(model, images, labels)[0]
        calls.append(1)
        return value + (model[0].bias.sum() * 0).sqrt() if len(calls) == 2 else value

    calls = []
    with pytest.raises(FloatingPointError, match=r"0\.bias is not finite after step 2 of 4"):
        fit(runs.convnet(), batches(), loss, steps=4, callbacks=[Checkpoint(tmp_path, every=2)],
            log_every=100)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_loss_closes_the_bar_and_leaves_the_model_usable(monkeypatch):
    bars, model, calls = [], runs.convnet(), []

    class Bar:
        """A progress bar that remembers whether it is open."""

        n = 0

        def __init__(self, **_):
            self.open = True
            bars.append(self)

        def set_postfix(self, **_):
            """Nothing."""

        def update(self):
            """Count."""
            self.n += 1

        def close(self):
            """Close."""
            self.open = False

    def loss(model, images, labels):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return classification_loss(model, images, labels)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(model, batches(), loss, steps=6, optimizer=optimizer)
    assert len(bars) == 1 and not bars[0].open and bars[0].n == 2
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert all(p.grad is None for p in model.parameters())
    assert len(short(model).losses) == 6
    with pytest.raises(FileNotFoundError):
        short(resume="nowhere.safetensors")
    assert not any(bar.open for bar in bars)


def test_one_callback_that_fails_to_end_does_not_keep_the_others_from_it():
    class Bad(Callback):
        """Fails at the end."""

        def on_end(self, run):
            """Fail."""
            raise RuntimeError("end")

    log = []
    with pytest.raises(RuntimeError, match="end"):
        short(callbacks=[Spy("a", log), Bad(), Spy("b", log)], steps=1)
    assert log == [("a", "start"), ("b", "start"), ("a", 1), ("b", 1), ("b", "end"), ("a", "end")]


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(("has", "expected"), [
    ({}, None), ({"avx512_f": True, "avx512_bf16": False}, None), ({"amx_int8": True}, None),
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)])  # fmt: skip
def test_bf16_only_where_the_processor_has_it(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert autocast_dtype(CPU) == autocast_dtype(torch.device("cpu", 0)) == expected
    kinds = []

    def loss(model, images, labels):
        logits = model(images)
        kinds.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    for precision in ("auto", "bf16", "fp32"):
        fit(runs.convnet(), batches(), loss, steps=1, precision=precision)
    assert kinds == [expected or torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("capability", "expected"), [
    ((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])  # fmt: skip
def test_bf16_on_gpus_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype(torch.device("cuda")) == expected
    assert autocast_dtype(torch.device("mps")) is None


def test_an_older_torch_is_asked_in_its_own_words(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert autocast_dtype(CPU) is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert autocast_dtype(CPU) == torch.bfloat16


def test_fp32_holds_inside_a_callers_autocast():
    kinds = []

    def loss(model, images, labels):
        kinds.append(model(images).dtype)
        return classification_loss(model, images, labels)

    with torch.autocast("cpu", torch.bfloat16):
        fit(runs.convnet(), batches(), loss, steps=1, precision="fp32")
    assert kinds == [torch.float32]


# ------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(("options", "words"), [
    ({"steps": None}, "give steps or epochs, one of them; got steps=None, epochs=None"),
    ({"epochs": 1}, "one of them"), ({"steps": -1}, "steps must be"), ({"steps": 1.5}, "got 1.5"),
    ({"steps": None, "epochs": -1}, "epochs must be"), ({"warmup": -1}, "warmup must be"),
    ({"warmup": 7}, "warmup must be"), ({"warmup": 2.5}, "warmup must be"),
    ({"steps": None, "epochs": float("inf")}, "epochs must be"),
    ({"precision": "fp16"}, "precision must be .* got 'fp16'"), ({"clip": 0.0}, "clip must be"),
    ({"log_every": 0}, "log_every must be"), ({"schedule": "step"}, "schedule must be in"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_the_first_step(options, words):
    model = runs.convnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        short(model, **options)
    assert equal(before, model.state_dict())


def test_an_optimizer_of_ones_own_brings_its_own_rate():
    model = runs.convnet()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.4},
                                 {"params": model[8].parameters(), "lr": 0.2}], momentum=0.9)
    frozen = copy.deepcopy(model[3].state_dict())
    with pytest.raises(ValueError, match="belong to the AdamW.* lr=0.5"):
        short(model, optimizer=optimizer, lr=0.5)
    rates = []

    class Rates(Callback):
        """Notes the rates in use."""

        def on_step(self, run):
            """Note them."""
            rates.append([group["lr"] for group in run.optimizer.param_groups])

    history = short(model, optimizer=optimizer, warmup=3, callbacks=[Rates()])
    assert rates[0] == pytest.approx([0.1, 0.05]) and rates[3] == pytest.approx([0.4, 0.2])
    assert history.learning_rates == [pair[0] for pair in rates]
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2]
    assert equal(frozen, model[3].state_dict()) and optimizer.state[model[8].weight]


def test_warmup_steps_and_shares():
    def rates(**options):
        history = short(runs.plain_net(), lr=1.0, **{"schedule": "constant", **options})
        return [round(rate, 6) for rate in history.learning_rates]

    assert rates(warmup=0) == [1] * 6
    assert rates(warmup=3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(warmup=0.5) == rates(warmup=3)
    assert rates(warmup=6) == [round(i / 7, 6) for i in range(1, 7)]
    own = rates(schedule=lambda step, steps, warmup: step + steps + warmup, warmup=2)
    assert own == [8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("log_every", [1, 4, 6, 100])
def test_every_loss_is_kept_however_rarely_one_looks(log_every):
    history = short(runs.plain_net(), log_every=log_every)
    assert history.losses == short(runs.plain_net()).losses and len(history.losses) == 6
    assert len(history.metrics["accuracy"]) == len(history.learning_rates) == 6


def test_no_steps():
    model, log = runs.convnet(), []
    before = copy.deepcopy(model.state_dict())
    history = short(model, steps=0, callbacks=[Spy("a", log)])
    assert history.losses == [] == history.smoothed() and log == [("a", "start"), ("a", "end")]
    assert equal(before, model.state_dict())
    assert plot_history(history) is not None
    assert short(steps=None, epochs=0).losses == []


def test_epochs_are_passes():
    assert len(short(steps=None, epochs=2).losses) == 12
    assert len(short(steps=None, epochs=0.5).losses) == 3
    assert len(short(steps=None, epochs=0.01).losses) == 1


def test_losses_of_every_accepted_kind():
    def scalar(model, images, labels):
        return F.cross_entropy(model(images), labels)

    def numbers(model, images, labels):
        loss = F.cross_entropy(model(images), labels)
        return loss[None], {"double": 2 * loss, "three": 3, "truth": torch.tensor(True)}

    history = fit(runs.plain_net(), batches(), scalar, steps=2)
    assert history.metrics == {}
    history = fit(runs.plain_net(), batches(), numbers, steps=2)
    assert history.metrics["double"] == pytest.approx([2 * v for v in history.losses])
    assert history.metrics["three"] == [3, 3] and history.metrics["truth"] == [1, 1]
    with pytest.raises(ValueError, match=r"loss must return one number; got shape \(16,\)"):
        fit(runs.plain_net(), batches(), lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"),
            steps=1)


def test_metrics_do_not_keep_graphs_alive():
    held = []

    def loss(model, images, labels):
        value = F.cross_entropy(model(images), labels)
        return value, {"same": value * 1}

    class Look(Callback):
        """Looks at what waits to be read."""

        def on_step(self, run):
            """Collect whether anything has a graph."""
            held.extend(metrics["same"].requires_grad or value.requires_grad
                        for _, _, value, metrics in run.pending)

    fit(runs.plain_net(), batches(), loss, steps=3, callbacks=[Look()])
    assert held and not any(held)


# --------------------------------------------------------------------- what surrounds the loop


def test_callbacks_run_in_order_and_checkpoints_last(tmp_path):
    log = []

    class Saver(Checkpoint):
        """A checkpoint that notes its turn."""

        def on_step(self, run):
            """Note it."""
            log.append(("saver", run.step))

    short(callbacks=[Spy("a", log), Saver(tmp_path), Spy("b", log)], steps=2)
    assert log == [("a", "start"), ("b", "start"), ("a", 1), ("b", 1), ("saver", 1), ("a", 2),
                   ("b", 2), ("saver", 2), ("b", "end"), ("a", "end")]  # fmt: skip


def test_two_runs_in_one_process_do_not_touch_each_other():
    first = short()
    short(runs.convnet(7), steps=3)
    model = runs.convnet()
    assert short(model).losses == first.losses
    assert short(model).losses[0] < first.losses[0]  # and a second run goes on from the weights
    assert model.training


def test_one_generator_goes_on_from_run_to_run():
    data = batches()
    first = fit(runs.plain_net(), data, classification_loss, steps=6).losses
    second = fit(runs.plain_net(), data, classification_loss, steps=6).losses
    assert first[0] != second[0]  # another epoch, another order


def test_the_seed_covers_torch_numpy_and_python():
    import numpy as np

    def draw():
        short(steps=1, seed=11)
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    assert draw() == draw()


def test_evaluation_neither_moves_training_nor_its_random_numbers():
    data = batches(transform=runs.noisy)
    modes = []

    def check(model):
        modes.append(model.training)
        return accuracy(model, data)  # the training batches themselves

    plain = fit(runs.convnet(), batches(transform=runs.noisy), classification_loss, steps=15,
                seed=1)
    watched = fit(runs.convnet(), data, classification_loss, steps=15, seed=1,
                  callbacks=[Evaluate("train", check, every=4)])
    assert watched.losses == plain.losses and modes == [False] * 4
    assert [step for step, _ in watched.evaluations["train"]] == [4, 8, 12, 15]


def test_a_model_left_in_evaluation_mode_is_trained_in_training_mode():
    model = runs.convnet().eval()
    assert short(model).losses == short(runs.convnet()).losses and model.training


def test_evaluation_gives_each_submodule_its_own_mode_back():
    model = runs.convnet()
    model[1].eval()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert model.training and model[4].training and not model[1].training


def test_predict_is_in_order_complete_and_without_side_effects():
    model, data = runs.convnet(), runs.patterns(37)
    model.train()
    shuffled = data.batches(8, generator=runs.seeded())  # would shuffle and drop five
    state = shuffled.generator.get_state()
    outputs, labels = predict(model, shuffled, precision="fp32")
    assert model.training and torch.equal(state, shuffled.generator.get_state())
    with evaluation_mode(model), torch.no_grad():
        expected = model(data.images.float() / 255)
    assert torch.allclose(outputs, expected, atol=1e-5) and torch.equal(labels, data.labels)
    right = (expected.argmax(1) == data.labels).float().mean()
    assert accuracy(model, shuffled, precision="fp32") == pytest.approx(float(right))
    model.eval()
    predict(model, shuffled)
    assert not model.training
    assert predict(nn.Flatten(), shuffled, precision="fp32")[0].shape == (37, 64)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_equals_timms(decay):
    from timm.utils import ModelEmaV3

    model, ours = runs.convnet(), EMA(decay)
    peer = []

    class Peer(Callback):
        """timm's average of the same run."""

        def on_start(self, run):
            """Start."""
            peer.append(ModelEmaV3(run.model, decay=decay))

        def on_step(self, run):
            """Average."""
            peer[0].update(run.model)

    short(model, callbacks=[ours, Peer()])
    theirs = peer[0].module.state_dict()
    assert equal(ours.model.state_dict(), theirs)  # running statistics and counters too
    assert "1.running_var" in theirs and "1.num_batches_tracked" in theirs
    assert not ours.model.training and not any(p.requires_grad for p in ours.model.parameters())
    if decay == 0:
        assert equal(ours.model.state_dict(), model.state_dict())


def test_averages_of_one_are_refused():
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay"):
            EMA(decay)
    with pytest.raises(ValueError, match="every"):
        Evaluate("x", len, every=0)


def test_clipping_bounds_the_step_of_plain_sgd():
    def moved(clip):
        model = runs.plain_net()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        short(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), clip=clip, steps=1,
              warmup=0, precision="fp32")
        return (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()

    assert moved(1e-3) == pytest.approx(1e-3, rel=1e-3) and moved(None) > 0.1


def test_parameter_groups():
    model = runs.convnet()
    model[0].weight.requires_grad_(False)
    decayed, free = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(model[3].weight), id(model[8].weight)}
    assert all(p.ndim == 1 for p in free["params"]) and len(free["params"]) == 7
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    assert count_parameters(model) - count_parameters(model, trainable=True) == 54


def test_schedules():
    def values(schedule, steps, warmup):
        return [schedule(step, steps=steps, warmup=warmup) for step in range(steps + 1)]

    assert values(cosine_schedule, 8, 0) == pytest.approx(
        [1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0], abs=1e-4)
    assert values(cosine_schedule, 4, 2) == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])
    assert values(constant_schedule, 3, 1) == [0.5, 1, 1, 1]
    assert values(cosine_schedule, 3, 3) == pytest.approx([0.25, 0.5, 0.75, 1])


def test_smoothed_is_a_running_mean():
    history = History(losses=[4.0, 2.0, 3.0, 1.0])
    assert history.smoothed(2) == pytest.approx([4, 3, 2.5, 2])
    assert history.smoothed(10) == pytest.approx([4, 3, 3, 2.5])
    with pytest.raises(ValueError, match="window"):
        history.smoothed(0)


def test_plots_say_what_they_show():
    history = short(callbacks=[Evaluate("test accuracy", lambda m: 0.5, every=2)])
    figure = plot_history(history, title="It learns")
    assert [axis.get_xlabel() for axis in figure.axes] == ["step", "step"]
    assert figure.axes[0].get_ylabel() == "training loss"


def test_importing_training_stays_light():
    code = ("import sys, vlm_course.foundations.training as t; "
            "print([m for m in ('accelerate', 'matplotlib', 'safetensors', 'torchvision') "
            "if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------- two real processes


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """What two processes of `accelerate launch` left behind."""
    folder = tmp_path_factory.mktemp("launched")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
               "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", "0", runs.__file__, str(folder)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


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
    assert equal(*weights)
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


def test_two_processes_refuse_batches_that_they_cannot_share(launched):
    for record in seen(launched):
        assert "multiple of the 2 processes; got 15" in record["refused"][0]
        assert record["refused"][1] == "accepted"  # 90 images: a last batch of ten
        assert record["last"] == "accepted"
    from vlm_course.foundations.training import _share

    class Three:
        """The part of an accelerator that sharing looks at."""

        process_index, num_processes, device = 0, 3, CPU

    with pytest.raises(ValueError, match="last batch of 10: use drop_last=True"):
        _share(runs.patterns(100).batches(15, drop_last=False), Three)


def test_two_processes_resume(launched):
    for rank, record in enumerate(seen(launched)):
        assert record["files"] == ["step-00000004.safetensors", "step-00000008.safetensors"]
        assert record["resumed"] == record["losses"]
        assert equal(read_tensors(launched / f"resumed-{rank}.safetensors")[0],
                     read_tensors(launched / "weights-0.safetensors")[0])
        assert record["twice"][0] < record["losses"][0]


def test_one_process_goes_on_where_two_stopped(launched, tmp_path):
    (path,) = Checkpoint(launched / "run").files()[:1]
    history = runs.global_run(runs.plain_net(5), resume=path)
    assert history.losses == pytest.approx(seen(launched)[0]["losses"], rel=1e-5)


def test_two_processes_end_with_one_model(launched):
    for name in ("norm", "average"):
        both = [read_tensors(launched / f"{name}-{rank}.safetensors")[0] for rank in (0, 1)]
        assert "1.running_mean" in both[0] and equal(*both), name
