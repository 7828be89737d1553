"""The training loop: what a run records, what surrounds it, what is refused in which words."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.appendix.checkpoints import Checkpoint
from vlm_course.foundations.training import (
    EMA,
    Callback,
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
    parameter_groups,
    plot_history,
    predict,
)

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports by file, processes by name
import training_runs as runs  # noqa: E402

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_an_optimizer_follows_its_model_into_another_memory_format():
    def run(fused):
        model = runs.convnet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        for layout in (False, True):
            runs.short(model, optimizer=optimizer, channels_last=layout, precision="fp32", steps=3)
        assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
        return model[3].weight.detach()

    assert torch.allclose(run(True), run(False), atol=1e-4)


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
        runs.short(steps=10, callbacks=[Poison(5), checkpoint])
    assert [file.name for file in checkpoint.files()][-1] == "step-00000004.safetensors"
    resumed = runs.short(steps=10, callbacks=[checkpoint], resume=True)
    assert resumed.losses == runs.short(steps=10).losses


def test_the_step_is_right_between_two_looks():
    with pytest.raises(FloatingPointError, match="at step 4 of 30"):
        runs.short(steps=30, callbacks=[Poison(3)], log_every=25)


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
        fit(model, runs.batches(), loss, steps=6, optimizer=optimizer)
    assert len(bars) == 1 and not bars[0].open and bars[0].n == 2
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert all(p.grad is None for p in model.parameters())
    assert len(runs.short(model).losses) == 6
    with pytest.raises(FileNotFoundError):
        runs.short(resume="nowhere.safetensors")
    assert not any(bar.open for bar in bars)


def test_one_callback_that_fails_to_end_does_not_keep_the_others_from_it():
    class Bad(Callback):
        """Fails at the end."""

        def on_end(self, run):
            """Fail."""
            raise RuntimeError("end")

    log = []
    with pytest.raises(RuntimeError, match="end"):
        runs.short(callbacks=[Spy("a", log), Bad(), Spy("b", log)], steps=1)
    assert log == [("a", "start"), ("b", "start"), ("a", 1), ("b", 1), ("b", "end"), ("a", "end")]


# --------------------------------------------------------------------------------------- precision


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
        fit(runs.convnet(), runs.batches(), loss, steps=1, precision=precision)
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
        fit(runs.convnet(), runs.batches(), loss, steps=1, precision="fp32")
    assert kinds == [torch.float32]


# --------------------------------------------------------------------------------------- arguments


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
        runs.short(model, **options)
    assert runs.equal(before, model.state_dict())


def test_an_optimizer_of_ones_own_brings_its_own_rate():
    model = runs.convnet()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.4},
                                 {"params": model[8].parameters(), "lr": 0.2}], momentum=0.9)
    frozen = copy.deepcopy(model[3].state_dict())
    with pytest.raises(ValueError, match="belong to the AdamW.* lr=0.5"):
        runs.short(model, optimizer=optimizer, lr=0.5)
    rates = []

    class Rates(Callback):
        """Notes the rates in use."""

        def on_step(self, run):
            """Note them."""
            rates.append([group["lr"] for group in run.optimizer.param_groups])

    history = runs.short(model, optimizer=optimizer, warmup=3, callbacks=[Rates()])
    assert rates[0] == pytest.approx([0.1, 0.05]) and rates[3] == pytest.approx([0.4, 0.2])
    assert history.learning_rates == [pair[0] for pair in rates]
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2]
    assert runs.equal(frozen, model[3].state_dict()) and optimizer.state[model[8].weight]


def test_warmup_steps_and_shares():
    def rates(**options):
        history = runs.short(runs.plain_net(), lr=1.0, **{"schedule": "constant", **options})
        return [round(rate, 6) for rate in history.learning_rates]

    assert rates(warmup=0) == [1] * 6
    assert rates(warmup=3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(warmup=0.5) == rates(warmup=3)
    assert rates(warmup=6) == [round(i / 7, 6) for i in range(1, 7)]
    own = rates(schedule=lambda step, steps, warmup: step + steps + warmup, warmup=2)
    assert own == [8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("log_every", [1, 4, 6, 100])
def test_every_loss_is_kept_however_rarely_one_looks(log_every):
    history = runs.short(runs.plain_net(), log_every=log_every)
    assert history.losses == runs.short(runs.plain_net()).losses and len(history.losses) == 6
    assert len(history.metrics["accuracy"]) == len(history.learning_rates) == 6


def test_no_steps():
    model, log = runs.convnet(), []
    before = copy.deepcopy(model.state_dict())
    history = runs.short(model, steps=0, callbacks=[Spy("a", log)])
    assert history.losses == [] == history.smoothed() and log == [("a", "start"), ("a", "end")]
    assert runs.equal(before, model.state_dict())
    assert plot_history(history) is not None
    assert runs.short(steps=None, epochs=0).losses == []


def test_epochs_are_passes():
    assert len(runs.short(steps=None, epochs=2).losses) == 12
    assert len(runs.short(steps=None, epochs=0.5).losses) == 3
    assert len(runs.short(steps=None, epochs=0.01).losses) == 1


def test_losses_of_every_accepted_kind():
    def scalar(model, images, labels):
        return F.cross_entropy(model(images), labels)

    def numbers(model, images, labels):
        loss = F.cross_entropy(model(images), labels)
        return loss[None], {"double": 2 * loss, "three": 3, "truth": torch.tensor(True)}

    history = fit(runs.plain_net(), runs.batches(), scalar, steps=2)
    assert history.metrics == {}
    history = fit(runs.plain_net(), runs.batches(), numbers, steps=2)
    assert history.metrics["double"] == pytest.approx([2 * v for v in history.losses])
    assert history.metrics["three"] == [3, 3] and history.metrics["truth"] == [1, 1]
    with pytest.raises(ValueError, match=r"loss must return one number; got shape \(16,\)"):
        fit(runs.plain_net(), runs.batches(), steps=1,
            loss=lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"))


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

    fit(runs.plain_net(), runs.batches(), loss, steps=3, callbacks=[Look()])
    assert held and not any(held)


# ------------------------------------------------------------------------- what surrounds the loop


def test_callbacks_run_in_order_and_checkpoints_last(tmp_path):
    log = []

    class Saver(Checkpoint):
        """A checkpoint that notes its turn."""

        def on_step(self, run):
            """Note it."""
            log.append(("saver", run.step))

    runs.short(callbacks=[Spy("a", log), Saver(tmp_path), Spy("b", log)], steps=2)
    assert log == [("a", "start"), ("b", "start"), ("a", 1), ("b", 1), ("saver", 1), ("a", 2),
                   ("b", 2), ("saver", 2), ("b", "end"), ("a", "end")]  # fmt: skip


def test_two_runs_in_one_process_do_not_touch_each_other():
    first = runs.short()
    runs.short(runs.convnet(7), steps=3)
    model = runs.convnet()
    assert runs.short(model).losses == first.losses
    assert runs.short(model).losses[0] < first.losses[0]  # a second run goes on
    assert model.training


def test_one_generator_goes_on_from_run_to_run():
    data = runs.batches()
    first = fit(runs.plain_net(), data, classification_loss, steps=6).losses
    second = fit(runs.plain_net(), data, classification_loss, steps=6).losses
    assert first[0] != second[0]  # another epoch, another order


def test_the_seed_covers_torch_numpy_and_python():
    import numpy as np

    def draw():
        runs.short(steps=1, seed=11)
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    assert draw() == draw()


def test_evaluation_neither_moves_training_nor_its_random_numbers():
    data = runs.batches(transform=runs.noisy)
    modes = []

    def check(model):
        modes.append(model.training)
        return accuracy(model, data)  # the training batches themselves

    plain = fit(runs.convnet(), runs.batches(transform=runs.noisy), classification_loss, steps=15,
                seed=1)
    watched = fit(runs.convnet(), data, classification_loss, steps=15, seed=1,
                  callbacks=[Evaluate("train", check, every=4)])
    assert watched.losses == plain.losses and modes == [False] * 4
    assert [step for step, _ in watched.evaluations["train"]] == [4, 8, 12, 15]


def test_a_model_left_in_evaluation_mode_is_trained_in_training_mode():
    model = runs.convnet().eval()
    assert runs.short(model).losses == runs.short(runs.convnet()).losses and model.training


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

    runs.short(model, callbacks=[ours, Peer()])
    theirs = peer[0].module.state_dict()
    assert runs.equal(ours.model.state_dict(), theirs)  # running statistics and counters too
    assert "1.running_var" in theirs and "1.num_batches_tracked" in theirs
    assert not ours.model.training and not any(p.requires_grad for p in ours.model.parameters())
    if decay == 0:
        assert runs.equal(ours.model.state_dict(), model.state_dict())


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
        runs.short(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), clip=clip, steps=1,
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
    history = runs.short(callbacks=[Evaluate("test accuracy", lambda m: 0.5, every=2)])
    figure = plot_history(history, title="It learns")
    assert [axis.get_xlabel() for axis in figure.axes] == ["step", "step"]
    assert figure.axes[0].get_ylabel() == "training loss"


def test_importing_training_stays_light():
    code = ("import sys, vlm_course.foundations.training as t; "
            "print([m for m in ('accelerate', 'matplotlib', 'safetensors', 'torchvision') "
            "if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
