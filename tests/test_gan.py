"""Adversarial training: losses, penalties, the one-loss step, its average, networks and files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pictures import labelled
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from vlm_course.appendix.checkpoints import Checkpoint, DamagedFile, write_tensors
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.training import Callback, fit
from vlm_course.generation.gan import (
    LOSSES,
    Adversarial,
    DCGANCritic,
    GANConfig,
    GeneratorAverage,
    adversarial_loss,
    check_latents,
    frozen,
    generate,
    gradient_penalty,
    hinge_critic_loss,
    load_generator,
    logistic_critic_loss,
    minimax_generator_loss,
    nonsaturating_generator_loss,
    r1_penalty,
    save_generator,
    score_generator_loss,
    to_unit_range,
    wasserstein_critic_loss,
)

TINY = GANConfig(size=16, batch_size=8, width=4, latent_dim=6, class_dim=3, r1_every=2)


@pytest.fixture(autouse=True)
def quiet(one_thread):
    torch.manual_seed(0)


def train(model: Adversarial, config: GANConfig, data: ImageSet, steps: int, **options):
    batches = data.batches(config.batch_size, generator=torch.Generator().manual_seed(0))
    return fit(model, batches, config.loss(), steps=steps, optimizer=config.optimizer, seed=0,
               schedule="constant", precision="fp32", **options)


# losses


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_logistic_losses_equal_binary_cross_entropy(scale):
    real, fake = scale * torch.randn(2, 50)
    cross_entropy = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(50), torch.zeros(50)
    assert torch.allclose(logistic_critic_loss(real, fake),
                          cross_entropy(real, ones) + cross_entropy(fake, zeros), atol=1e-6)
    assert torch.allclose(nonsaturating_generator_loss(fake), cross_entropy(fake, ones), atol=1e-6)
    assert torch.allclose(minimax_generator_loss(fake), -cross_entropy(fake, zeros), atol=1e-6)


def test_hinge_and_wasserstein_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    assert torch.isclose(hinge_critic_loss(real, fake), torch.tensor(2.5 / 3 + 0.5))
    assert torch.isclose(wasserstein_critic_loss(real, fake), torch.tensor(-1.5 - 0.5))
    assert torch.isclose(score_generator_loss(fake), torch.tensor(1.5))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_of_half_precision_and_finite_at_extremes(name):
    critic_loss, generator_loss = LOSSES[name]
    extreme = torch.tensor([300.0, -300.0]).bfloat16().requires_grad_()
    for loss in (critic_loss(extreme, extreme.flip(0)), generator_loss(extreme)):
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert torch.autograd.grad(loss, extreme, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_critic_wants_real_above_fake_and_generator_wants_fake_up(name):
    critic_loss, generator_loss = LOSSES[name]
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    critic_loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake = torch.zeros(4, requires_grad=True)
    generator_loss(fake).backward()
    assert (fake.grad < 0).all()


# penalties


def test_penalties_of_a_linear_critic():
    weight = torch.randn(3 * 4 * 4, dtype=torch.float64, requires_grad=True)
    critic = lambda images: images.flatten(1) @ weight
    real, fake = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    r1 = r1_penalty(critic, real)
    assert torch.isclose(r1, weight.square().sum(), rtol=1e-12)
    assert torch.allclose(torch.autograd.grad(r1, weight)[0], 2 * weight, rtol=1e-10)
    expected = (weight.norm() - 1).square()
    assert torch.isclose(gradient_penalty(critic, real, fake), expected, rtol=1e-6)


def test_penalty_gradient_by_finite_differences():
    critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    points = torch.randn(4, 3, dtype=torch.float64)
    weight = critic[0].weight
    gradient, = torch.autograd.grad(r1_penalty(critic, points), weight)
    values = []
    for move in (1e-5, -2e-5):
        weight.data[1, 2] += move
        values.append(r1_penalty(critic, points))
    assert torch.isclose(gradient[1, 2], (values[0] - values[1]) / 2e-5, rtol=1e-5)


def test_penalties_stay_in_float32_under_autocast():
    critic = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1),
                           nn.Flatten(0))
    real, fake = torch.randn(2, 3, 1, 8, 8)
    plain = r1_penalty(critic, real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert critic(real).dtype == torch.bfloat16  # the rest is not
        assert torch.equal(r1_penalty(critic, real), plain)
        assert gradient_penalty(critic, real, fake).dtype == torch.float32


def test_gradient_penalty_is_finite_at_a_flat_critic_and_refuses_two_shapes():
    weight = torch.zeros(2, requires_grad=True)
    penalty = gradient_penalty(lambda x: x @ weight, torch.ones(3, 2), torch.zeros(3, 2))
    assert torch.isclose(penalty, torch.tensor(1.0), atol=1e-4)
    assert torch.autograd.grad(penalty, weight)[0].isfinite().all()
    with pytest.raises(ValueError, match="one shape"):
        gradient_penalty(lambda x: x @ weight, torch.ones(3, 2), torch.zeros(1, 2))


# one step


def test_frozen_trains_the_input_only():
    layer, x = nn.Linear(3, 1), torch.randn(2, 3, requires_grad=True)
    out = frozen(layer)(x)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    assert layer.weight.grad is None and torch.allclose(x.grad, layer.weight.expand(2, 3))


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("critic_norm", ["none", "spectral"])
def test_one_loss_has_the_gradients_of_the_textbook_loop(objective, critic_norm):
    config = replace(TINY, objective=objective, r1=2.0, critic_norm=critic_norm)
    model = config.adversarial(3, 2)
    model.critic.eval()  # power iteration is not advanced, so that both ways see one critic
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 2
    torch.manual_seed(3)
    adversarial_loss(model, images, labels)[0].backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.manual_seed(3)
    real, fake = images * 2 - 1, model.generator(torch.randn(8, 6), labels)
    critic_loss, generator_loss = LOSSES[objective]
    generator_loss(model.critic(fake, labels)).backward()
    model.critic.zero_grad()
    own = critic_loss(model.critic(real, labels), model.critic(fake.detach(), labels))
    (own + 2 * 2.0 / 2 * r1_penalty(model.critic, real, labels)).backward()  # lazy: twice as heavy
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(ours[name], p.grad, atol=1e-6), name


def test_no_parameter_is_left_without_gradient_and_the_average_gets_none():
    model = TINY.adversarial(3, 2)
    adversarial_loss(model, torch.rand(8, 3, 16, 16), torch.arange(8) % 2)[0].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("average."), name


def test_lazy_penalty_counts_training_steps_only():
    model = replace(TINY, r1=1e6, r1_every=3).adversarial(3, 2)
    batch = torch.rand(8, 3, 16, 16), torch.arange(8) % 2
    heavy = [adversarial_loss(model, *batch)[0].item() > 50 for _ in range(6)]
    assert heavy == [True, False, False] * 2 and model.step == 6
    adversarial_loss(model.eval(), *batch)
    assert model.step == 6


def test_augment_sees_real_and_fake():
    seen = []
    model = TINY.adversarial(3, 2)
    model.augment = lambda images: (seen.append(images.shape), images)[1]
    adversarial_loss(model, torch.rand(8, 3, 16, 16), torch.arange(8) % 2)
    assert len(seen) == 4  # real, fake for the critic, fake for the generator, R1


@pytest.mark.parametrize("shape", [(8, 1, 16, 16), (8, 4, 16, 16), (8, 3, 32, 32), (8, 3, 16, 24)])
def test_pictures_of_another_kind_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\)"):
        adversarial_loss(TINY.adversarial(3, 2), torch.rand(shape), torch.zeros(8).long())


@pytest.mark.parametrize("images, labels, words", [
    (torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8).long(), "images .*got .*uint8"),
    (torch.zeros(8, 3, 16, 16), torch.zeros(7).long(), r"labels must be \(8,\) int64.*got \(7,\)"),
    (torch.zeros(8, 3, 16, 16), torch.zeros(8), "labels must be .*float32"),
    (torch.zeros(8, 3, 16, 16), None, "labels must be .*got None")])
def test_integer_pictures_and_labels_that_do_not_fit_are_refused(images, labels, words):
    with pytest.raises(ValueError, match=words):
        adversarial_loss(TINY.adversarial(3, 2), images, labels)


def test_a_batch_of_one_and_an_odd_one_have_a_loss():
    for count in (1, 3):
        batch = torch.rand(count, 3, 16, 16), torch.zeros(count).long()
        assert adversarial_loss(TINY.adversarial(3, 2), *batch)[0].isfinite()


def test_fewer_pictures_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size 8 does not fit 5 images"):
        train(TINY.adversarial(3, 2), TINY, labelled(5), 1)


@pytest.mark.parametrize("wrong", [dict(loss="mse"), dict(r1=-1.0), dict(r1_every=0)])
def test_adversarial_refuses(wrong):
    with pytest.raises(ValueError, match="loss must be one of"):
        Adversarial(nn.Identity(), nn.Identity(), **wrong)


# training by `fit`


def test_average_follows_as_ema_does():
    model, seen = TINY.adversarial(3, 2), []

    class Check(Callback):
        def on_start(self, run):
            self.before = [p.clone() for p in model.average.state_dict().values()]

        def on_step(self, run):
            decay = min(0.9, (1 + run.step) / (10 + run.step))
            for old, new, now in zip(self.before, model.generator.state_dict().values(),
                                     model.average.state_dict().values(), strict=True):
                wanted = torch.lerp(old, new, 1 - decay) if new.is_floating_point() else new
                assert torch.allclose(now, wanted, atol=1e-6)
            self.before = [p.clone() for p in model.average.state_dict().values()]
            seen.append(run.step)

    train(model, TINY, labelled(), 4, callbacks=[GeneratorAverage(0.9), Check()])
    assert seen == [1, 2, 3, 4]


def test_two_rates_and_no_average_in_the_optimiser():
    config = replace(TINY, lr=1e-4, critic_lr=3e-4)
    model = config.adversarial(3, 2)
    groups = config.optimizer(model).param_groups
    assert [group["lr"] for group in groups] == [1e-4, 3e-4]
    optimised = {id(p) for group in groups for p in group["params"]}
    assert optimised == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path):
    data, config = labelled(), replace(TINY, r1_every=3)
    whole = config.adversarial(3, 2)
    start = {k: v.clone() for k, v in whole.state_dict().items()}
    train(whole, config, data, 7, callbacks=config.callbacks())
    halves = config.adversarial(3, 2)
    halves.load_state_dict(start)
    train(halves, config, data, 4, callbacks=[*config.callbacks(), Checkpoint(tmp_path, every=4)])
    resumed = config.adversarial(3, 2)
    with pytest.warns(UserWarning, match="run of 4 steps"):
        train(resumed, config, data, 7, resume=True,
              callbacks=[*config.callbacks(), Checkpoint(tmp_path, every=4)])
    assert resumed.step == whole.step == 7
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stands(tmp_path: Path):
    model, calls = TINY.adversarial(3, 2), []

    def breaks(model, images, labels):
        calls.append(0)
        loss, metrics = adversarial_loss(model, images, labels)
        return (loss * math.nan if len(calls) == 4 else loss), metrics

    keep = Checkpoint(tmp_path, every=2)
    with pytest.raises(FloatingPointError, match="step 4 of 6"):
        fit(model, labelled().batches(8), breaks, steps=6, optimizer=TINY.optimizer,
            schedule="constant", callbacks=[*TINY.callbacks(), keep], log_every=1)
    assert [file.name for file in keep.files()] == ["step-00000002.safetensors"]


# networks and configuration


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("changes", [{}, dict(upsample="resize"), dict(kernel=3), dict(kernel=5),
                                     dict(critic_norm="batch", norm="none")])
def test_every_size_and_every_doubling(size, changes):
    model = replace(TINY, size=size, **changes).adversarial(1, 0)
    images = model.generator(torch.randn(2, 6))
    assert images.shape == (2, 1, size, size) and images.abs().max() <= 1
    assert model.critic(images).shape == (2,)


def test_a_kernel_of_four_is_the_dcgan_layer():
    layer = TINY.make_generator(3).layers[2]
    assert (layer.kernel_size, layer.stride, layer.padding) == ((4, 4), (2, 2), (1, 1))


@pytest.mark.parametrize("wrong, words", [
    (dict(size=48), "power of two"), (dict(size=8), "power of two"), (dict(norm="layer"), "norm"),
    (dict(objective="mse"), "objective"), (dict(upsample="pixel"), "upsample"),
    (dict(critic_norm="no"), "critic_norm"), (dict(weight_decay=0.1), "weight_decay"),
    (dict(width=0), "width must be at least 1; got 0"),
    (dict(kernel=1), "kernel must be at least 2"),
    (dict(lr=0.0), "lr must be above 0; got 0.0"),
    (dict(lr=math.nan), "lr must be above 0; got nan"),
    (dict(average=1.5), r"average must be in \[0, 1\]; got 1.5"), (dict(class_dim=0), "class_dim"),
    (dict(r1=-1.0), "r1 must be at least 0"), (dict(r1_every=0), "r1_every must be at least 1"),
    (dict(gradient_penalty=math.inf), "gradient_penalty"), (dict(batch_size=0), "batch_size")])
def test_configurations_that_cannot_be_built_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        GANConfig(**wrong)


def test_projection_uses_the_class_and_the_class_vector_has_one_length():
    model = TINY.adversarial(3, 2)
    images = torch.randn(4, 3, 16, 16)
    a, b = (model.critic(images, torch.full((4,), k)) for k in (0, 1))
    assert (a - b).abs().min() > 1e-4
    latents = torch.randn(1, 6)
    before = model.generator.eval()(latents, torch.tensor([1]))
    with torch.no_grad():
        model.generator.embedding.weight *= 100
    assert torch.allclose(model.generator(latents, torch.tensor([1])), before, atol=1e-5)


def test_spectral_norm_by_hand_equals_the_peer_and_bounds_the_layer():
    layer = spectral_norm(nn.Conv2d(4, 8, 3))
    state = layer.parametrizations.weight
    matrix, v = state.original.detach().flatten(1), state[0]._v.clone()
    u = F.normalize(matrix @ v, dim=0)  # the peer's order
    v = F.normalize(matrix.T @ u, dim=0)
    assert torch.allclose(layer.weight, state.original / (u @ matrix @ v), atol=1e-6)
    critic = DCGANCritic(replace(TINY, critic_norm="spectral"), channels=3, num_classes=2)
    for _ in range(200):
        critic.head.weight  # each look is one more round
    assert torch.isclose(torch.linalg.matrix_norm(critic.head.weight, 2), torch.tensor(1.0),
                         atol=1e-3)


# pictures and files


def test_generate_does_not_depend_on_batches_and_puts_the_mode_back():
    generator = TINY.make_generator(3, 2).train()
    statistics = generator.layers[0].running_mean.clone()
    whole = generate(generator, 10, seed=4, precision="fp32")
    parts = generate(generator, 10, seed=4, batch_size=3, precision="fp32")
    assert torch.allclose(whole, parts, atol=1e-6) and generator.training
    assert torch.equal(generator.layers[0].running_mean, statistics)
    assert whole.shape == (10, 3, 16, 16) and 0 <= whole.min() <= whole.max() <= 1
    one_class = generate(generator, 10, seed=4, labels=1, precision="fp32")
    assert torch.allclose(one_class[1::2], whole[1::2], atol=1e-6)  # odd ones were class 1 before
    assert not torch.allclose(one_class[::2], whole[::2], atol=1e-4)


@pytest.mark.parametrize("latents, labels, words", [
    (torch.zeros(2, 5), torch.zeros(2).long(), r"latents must be \(B, 6\)"),
    (torch.zeros(6), None, r"latents must be"),
    (torch.zeros(2, 6).long(), torch.zeros(2).long(), "latents must be"),
    (torch.zeros(2, 6), None, r"labels must be \(2,\)"),
    (torch.zeros(2, 6), torch.zeros(3).long(), r"labels must be \(2,\)"),
    (torch.zeros(2, 6), torch.tensor([0, 2]), "labels must be in 0..1"),
    (torch.zeros(2, 6), torch.tensor([-1, 0]), "labels must be in 0..1")])
def test_latents_and_labels_that_do_not_fit_are_refused(latents, labels, words):
    with pytest.raises(ValueError, match=words):
        check_latents(TINY.make_generator(3, 2), latents, labels)


@pytest.mark.parametrize("call, words", [
    (dict(latents=-1), "at least 0; got 256 and -1"),
    (dict(latents=2, batch_size=0), "batch_size must be at least 1"),
    (dict(latents=4, labels=[0, 1]), r"labels must be \(4,\) int64 in 0..1; got \(2,\)")])
def test_numbers_that_generate_cannot_draw_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        generate(TINY.make_generator(3, 2), **call)


def test_no_pictures_are_pictures_too():
    assert generate(TINY.make_generator(3, 2), 0).shape == (0, 3, 16, 16)


def test_labels_for_a_generator_without_classes_are_refused():
    with pytest.raises(ValueError, match="no classes"):
        check_latents(TINY.make_generator(3), torch.zeros(1, 6), torch.zeros(1).long())


@pytest.mark.parametrize("classes", [(), ("cat", "dog")])
def test_a_generator_comes_back_from_its_file(tmp_path: Path, classes):
    generator = TINY.make_generator(3, len(classes)).eval()
    file = save_generator(generator, tmp_path / "generator.safetensors", classes=classes)
    for place in (file, tmp_path):  # a file, or the folder of a run
        again = load_generator(place)
        assert again.classes == list(classes) and not again.training
        assert torch.equal(generate(again, 4, seed=0), generate(generator, 4, seed=0))


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path):
    generator = replace(TINY, width=16).make_generator(3).eval()
    whole = save_generator(generator, tmp_path / "whole.safetensors")
    half = save_generator(generator, tmp_path / "half.safetensors", dtype=torch.float16)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    again = load_generator(half)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert (generate(again, 4, seed=0) - generate(generator, 4, seed=0)).abs().max() < 0.01


def test_foreign_and_damaged_files_are_refused(tmp_path: Path):
    file = save_generator(TINY.make_generator(3), tmp_path / "generator.safetensors")
    with pytest.raises(FileNotFoundError):
        load_generator(tmp_path / "none.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match="checksum"):
        load_generator(tmp_path / "damaged.safetensors")
    plain = write_tensors({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="not the words"):
        load_generator(plain)


@pytest.mark.parametrize("change", [
    dict(kind="os:system"), dict(kind=None), dict(config={"size": 16, "evil": 1}),
    dict(config={"size": 17}), dict(channels="three"), dict(classes=None)])
def test_words_that_describe_no_generator_are_refused(tmp_path: Path, change):
    about = {"kind": "dcgan", "config": {"size": 16}, "channels": 3, "classes": []} | change
    file = write_tensors({"a": torch.ones(1)}, tmp_path / "generator.safetensors",
                         metadata={"generator": json.dumps(about)})
    with pytest.raises(ValueError, match="describes no generator"):
        load_generator(file)


def test_weights_of_another_shape_are_refused(tmp_path: Path):
    about = {"kind": "dcgan", "config": {"size": 16}, "channels": 3, "classes": []}
    file = write_tensors({"a": torch.ones(1)}, tmp_path / "generator.safetensors",
                         metadata={"generator": json.dumps(about)})
    with pytest.raises(ValueError, match="another model"):
        load_generator(file)


def test_save_refuses_names_that_do_not_match(tmp_path: Path):
    with pytest.raises(ValueError, match="a name in classes"):
        save_generator(TINY.make_generator(3, 2), tmp_path / "generator.safetensors")


def test_a_run_leaves_a_generator_and_a_sheet(tmp_path: Path):
    data, config = labelled(), TINY
    model = config.build(config.network(None, data))
    assert model.generator.num_classes == 2 and model.generator.channels == 3
    results = config.finish(model, SimpleNamespace(out=tmp_path), data, None, "")
    assert results == {"classes": data.classes} and (tmp_path / "samples.png").is_file()
    assert load_generator(tmp_path).classes == data.classes
    free = replace(config, conditional=False).network(None, data)
    assert free.generator.num_classes == 0
    assert to_unit_range(torch.tensor([[[[-3.0, 0.0, 1.0]]]])).tolist() == [[[[0.0, 0.5, 1.0]]]]
