"""StyleGAN2: filters, modulated convolutions, penalties, augmentation, the step, files."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import labelled
from scipy.signal import upfirdn

from vlm_course.appendix.checkpoints import Checkpoint
from vlm_course.foundations.training import Callback, fit
from vlm_course.generation.gan import generate, load_generator, r1_penalty, save_generator
from vlm_course.generation.stylegan import (
    FILTER,
    AdaptiveAugment,
    EqualLinear,
    StyleGAN,
    StyleGANConfig,
    demodulation,
    minibatch_deviation,
    mix_styles,
    modulated_conv2d,
    path_lengths,
    path_penalty,
    principal_directions,
    project,
    random_colour,
    random_geometry,
    stylegan_loss,
    upfirdn2d,
)

TINY = StyleGANConfig(size=16, batch_size=8, width=4, critic_width=4, max_width=8, latent_dim=6,
                      style_dim=5, mapping_depth=2, r1_every=2, path_every=2)


@pytest.fixture(autouse=True)
def quiet(one_thread):
    torch.manual_seed(0)


pictures = partial(labelled, classes=3)


def train(model, steps: int, config=TINY, data=None, **options):
    batches = (pictures() if data is None else data).batches(
        config.batch_size, generator=torch.Generator().manual_seed(0))
    return fit(model, batches, config.loss(), steps=steps, optimizer=config.optimizer, seed=0,
               warmup=0, schedule="constant", precision="fp32",
               **{"callbacks": config.callbacks(), **options})


# ---------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("up, down, pad", [(1, 1, 3), (2, 1, 3), (1, 2, 3), (3, 2, 3), (2, 2, 1)])
@pytest.mark.parametrize("taps", [FILTER, (1.0, 2.0, 5.0, 3.0)])
def test_filter_is_scipys(up, down, pad, taps):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    ours = upfirdn2d(x, taps, up=up, down=down, pad=pad, gain=2.0)
    theirs, weights = x.numpy(), np.array(taps) / sum(taps)
    for axis in (2, 3):
        whole = upfirdn(weights, theirs, up=up, axis=axis)
        room = [(0, 0)] * 4
        room[axis] = (0, up - 1)  # the zeros behind the last pixel, which scipy leaves out
        whole = np.pad(whole, room)
        cut = len(taps) - 1 - pad
        theirs = whole.take(range(cut, whole.shape[axis] - cut, down), axis)
    assert ours.shape == theirs.shape
    assert np.abs(ours.numpy() - 2 * theirs).max() < 1e-12


def test_bilinear_interpolation_is_the_filter_inside():
    x = torch.rand(1, 3, 8, 8)
    ours = upfirdn2d(x, up=2, pad=2, gain=4.0)[:, :, :16, :16]
    theirs = F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(ours[:, :, 1:-1, 1:-1], theirs[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize("options", [dict(pad=1), dict(pad=2), dict(up=2, pad=2), dict(down=2)])
def test_filter_has_two_derivatives(options):
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    taps = (1.0, 2.0, 5.0)
    assert torch.autograd.gradcheck(lambda x: upfirdn2d(x, taps, **options), x)
    assert torch.autograd.gradgradcheck(lambda x: upfirdn2d(x, taps, **options) ** 2, x)


# ------------------------------------------------------------------------ modulated convolutions


def own_weights(weight, style, demodulate):
    weights = weight * style[:, None, :, None, None]
    norm = weights.square().sum((2, 3, 4), keepdim=True).add(1e-8).sqrt()
    return weights / norm if demodulate else weights


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [True, False])
def test_fast_form_is_grouped_and_looped(demodulate, up):
    x, weight, style = torch.randn(4, 5, 8, 8), torch.randn(6, 5, 3, 3), torch.randn(4, 5)
    weights, looped = own_weights(weight, style, demodulate), []
    for image, own in zip(x, weights):
        if up:
            wide = F.conv_transpose2d(image[None], own.transpose(0, 1), stride=2)
            looped.append(upfirdn2d(wide, pad=1, gain=4.0))
        else:
            looped.append(F.conv2d(image[None], own, padding=1))
    ours = modulated_conv2d(x, weight, style, demodulate=demodulate, up=up)
    torch.testing.assert_close(ours, torch.cat(looped), atol=1e-5, rtol=1e-5)
    if not up:
        flat = F.conv2d(x.flatten(0, 1)[None], weights.flatten(0, 1), padding=1, groups=4)
        torch.testing.assert_close(ours, flat.view_as(ours), atol=1e-5, rtol=1e-5)


def test_gradients_of_the_fast_form_are_those_of_the_loop():
    x, weight, style = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in
                        ((3, 4, 6, 6), (2, 4, 3, 3), (3, 4)))
    looped = torch.cat([F.conv2d(a[None], w, padding=1)
                        for a, w in zip(x, own_weights(weight, style, True))])
    probe = torch.randn_like(looped)
    wanted = torch.autograd.grad((looped * probe).sum(), (x, weight, style))
    got = torch.autograd.grad((modulated_conv2d(x, weight, style) * probe).sum(),
                              (x, weight, style))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_demodulation_is_not_lowered_by_autocast():
    weight, style = torch.randn(6, 5, 3, 3), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        low = demodulation(weight, style)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, demodulation(weight, style))


def test_equal_linear_learns_at_the_rate_that_it_is_told():
    for n, multiplier in ((16, 1.0), (1024, 1.0), (64, 0.01)):
        layer = EqualLinear(n, 8, lr_multiplier=multiplier)
        assert layer(torch.randn(500, n)).std().item() == pytest.approx(1, abs=0.15)
        before = layer.weight.detach().clone()
        layer(torch.ones(1, n)).sum().backward()
        torch.optim.Adam(layer.parameters(), lr=0.01).step()
        change = ((layer.weight - before).norm() / before.norm()).item()
        assert change == pytest.approx(0.01 * multiplier, rel=0.15)


# --------------------------------------------------------------------------- networks and styles


@pytest.mark.parametrize("size, channels, classes", [(8, 1, 0), (16, 3, 3), (32, 3, 0)])
def test_shapes(size, channels, classes):
    model = replace(TINY, size=size).adversarial(channels, classes)
    g, rest = model.generator, (torch.tensor([0, 1]),) if classes else ()
    images = g(torch.randn(2, 6), *rest)
    assert images.shape == (2, channels, size, size) and model.critic(images, *rest).shape == (2,)
    assert g.num_layers == 2 * math.log2(size) - 2 == g.styles(torch.randn(2, 6), *rest).shape[1]


def test_noise_is_new_in_training_and_fixed_in_evaluation():
    g = TINY.make_generator(3)
    for layer in (g.synthesis.first, *g.synthesis.same):
        torch.nn.init.constant_(layer.strength, 1.0)
    z = torch.randn(2, 6)
    assert not torch.equal(g(z), g(z))
    assert torch.equal(g.eval()(z), g(z))


def test_class_and_style_change_the_picture():
    g = TINY.make_generator(3, 3).eval()
    z = torch.randn(1, 6)
    a, b = (g(z, torch.tensor([k])) for k in (0, 1))
    assert (a - b).abs().max() > 1e-3
    critic = TINY.adversarial(3, 3).critic
    assert (critic(a, torch.tensor([0])) - critic(a, torch.tensor([1]))).abs() > 1e-6


def test_mixing_changes_layers_from_the_crossover_on():
    a, b = torch.zeros(3, 6, 2), torch.ones(3, 6, 2)
    assert mix_styles(a, b, 4)[:, :, 0].tolist() == [[0, 0, 0, 0, 1, 1]] * 3
    assert mix_styles(a, b, torch.tensor([0, 1, 6])).sum((1, 2)).tolist() == [12, 10, 0]
    model = replace(TINY, mixing=1.0).adversarial(3, 3)
    styles = model.random_styles(torch.zeros(64, dtype=torch.long))
    kinds = (styles != styles[:, :1]).any(2)  # differs from the first layer's
    assert kinds[:, -1].all() and not kinds[:, 0].any()
    model.mixing = 0.0
    styles = model.random_styles(torch.zeros(8, dtype=torch.long))
    assert torch.equal(styles, styles[:, :1].expand_as(styles))


def test_truncation_draws_towards_the_mean_of_the_class():
    g = TINY.make_generator(3, 3).eval()
    z, labels, means = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]), g.mapping.means()
    whole, half, none = (g.styles(z, labels, truncation=t) for t in (1.0, 0.5, 0.0))
    torch.testing.assert_close(none[:, 0], means[labels])
    torch.testing.assert_close(half, (whole + none) / 2)
    assert (means[0] - means[1]).norm() > 1e-3


def test_minibatch_deviation():
    x = torch.randn(8, 3, 4, 4)
    out = minibatch_deviation(x, group=4)
    for k in (0, 1):  # groups are images 0, 2, 4, 6 and 1, 3, 5, 7
        deviation = np.sqrt(x[k::2].numpy().var(0) + 1e-8).mean()
        assert out[k::2, 3].numpy() == pytest.approx(deviation, abs=1e-5)
    assert torch.equal(out[:, :3], x)
    assert minibatch_deviation(x[:1].expand(4, -1, -1, -1))[:, 3].max() < 1e-3
    assert minibatch_deviation(x[:5])[:, 3].max() < 1e-3  # five have no common divisor with four


# --------------------------------------------------------------------------------------- penalties


def test_path_lengths_are_those_of_the_jacobian():
    g = TINY.make_generator(1).double().eval()
    styles = g.styles(torch.randn(2, 6, dtype=torch.float64)).detach().requires_grad_()
    images = g.synthesis(styles)
    y = torch.randn_like(images)
    got = path_lengths(images, styles, y)
    for i in range(2):
        J = torch.autograd.functional.jacobian(
            lambda w: g.synthesis(w[None]).flatten(), styles[i].detach())
        wanted = torch.einsum("p,pld->ld", y[i].flatten(), J) / 16
        torch.testing.assert_close(got[i], wanted.square().sum(1).mean().sqrt(), rtol=1e-6,
                                   atol=1e-9)


def test_penalties_stay_in_float32_under_autocast():
    model, labels = TINY.adversarial(3, 3), torch.tensor([0, 1, 2, 0])
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    values = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append([r1_penalty(model.critic, images, labels),
                           path_penalty(model.eval(), labels)])
    for low, full in zip(*values):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, full)


def test_path_average_moves_in_training_only():
    model, labels = TINY.adversarial(3, 3), torch.tensor([0, 1])
    path_penalty(model.eval(), labels)
    assert model.path_mean == 0
    path_penalty(model.train(), labels)
    assert model.path_mean > 0


def test_penalties_come_in_their_steps_only():
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    config = replace(TINY, r1=50.0, path=50.0, r1_every=4, path_every=4, ada_target=0.0)
    model, extra = config.adversarial(3, 3).eval(), []
    for step in range(8):
        model.step = step
        total, metrics = stylegan_loss(model, images, labels)
        extra.append((total - metrics["critic"] - metrics["generator"]).item())
    assert [step for step, value in enumerate(extra) if abs(value) > 1e-4] == [0, 2, 4, 6]


# ------------------------------------------------------------------------------------ augmentation


def test_no_chance_no_change():
    x, augment = torch.rand(4, 3, 16, 16) * 2 - 1, AdaptiveAugment()
    torch.testing.assert_close(augment(x), x, atol=1e-4, rtol=0)


def test_augmentation_is_differentiable_and_random():
    x, augment = (torch.rand(6, 3, 16, 16) * 2 - 1).requires_grad_(), AdaptiveAugment()
    augment.p.fill_(0.8)
    a, b = augment(x), augment(x)
    assert not torch.equal(a, b)
    (gradient,) = torch.autograd.grad(a.sum(), x)
    assert gradient.isfinite().all() and gradient.flatten(1).abs().sum(1).min() > 0


def test_every_change_happens_with_its_probability():
    p = torch.tensor(0.3)
    eye = torch.eye(3).expand(20_000, 3, 3)
    still = (random_geometry(20_000, p) - eye).abs().amax((1, 2)) < 1e-6
    # a flip or a quarter turn can come out as nothing; two shifts, zoom, stretch, two free turns
    wanted = (1 - 0.3 / 2) * (1 - 0.3 * 3 / 4) * 0.7**2 * 0.7**2 * 0.7
    assert still.float().mean().item() == pytest.approx(wanted, abs=0.01)
    colour = random_colour(20_000, p)
    plain = (colour - torch.eye(3, 4)).abs().amax((1, 2)) < 1e-6
    assert plain.float().mean().item() == pytest.approx(0.7**4 * (1 - 0.3 / 2), abs=0.01)


def test_colours_keep_grey_grey():
    colour = random_colour(50, torch.tensor(1.0))
    moved = colour[:, :, :3].sum(2) * 0.3 + colour[:, :, 3]  # a grey pixel
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, 3), atol=1e-4, rtol=1e-4)


def test_grey_pictures_are_augmented_as_grey_colours():
    x, augment = torch.rand(5, 1, 16, 16) * 2 - 1, AdaptiveAugment()
    augment.p.fill_(0.7)
    torch.manual_seed(3)
    grey = augment(x)
    torch.manual_seed(3)
    colours = augment(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey, colours[:, :1], atol=1e-4, rtol=1e-4)


def test_probability_follows_the_sign_of_the_logits():
    augment = AdaptiveAugment(target=0.6, images=1000, limit=0.5)
    for _ in range(200):
        augment.update(torch.ones(10))
    assert augment.p == 0.5  # not beyond the limit
    for _ in range(200):
        augment.update(torch.tensor([1.0, -1.0]))
    assert 0 <= augment.p < 0.5


# ---------------------------------------------------------------------------------------- the step


def test_each_network_gets_its_own_gradient_only():
    model = replace(TINY, r1=0.0, path=0.0, ada_target=0.0, mixing=0.0).adversarial(3, 3).eval()
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(2)
    total, metrics = stylegan_loss(model, images, labels)
    for part, own in ((model.generator, "generator"), (model.critic, "critic")):
        whole, alone = (torch.autograd.grad(loss, list(part.parameters()), retain_graph=True,
                                            allow_unused=True)
                        for loss in (total, metrics[own]))
        for a, b in zip(whole, alone):
            if b is not None:
                torch.testing.assert_close(a, b)
            else:
                assert a is None or not a.any()


@pytest.mark.parametrize("channels", [1, 3])
def test_trains(channels):
    config = replace(TINY, conditional=channels == 3)
    model = config.network(None, data := pictures(channels=channels))
    first = {name: value.clone() for name, value in model.state_dict().items()
             if isinstance(value, torch.Tensor)}
    history = train(model, 6, config, data)
    assert all(map(math.isfinite, history.losses)) and model.step == 6
    still = [name for name, p in model.named_parameters()
             if torch.equal(first[name], p) and not name.startswith("average")]
    assert not still
    assert not torch.equal(first["average.synthesis.constant"], model.average.synthesis.constant)
    assert {"critic", "generator", "p", "sign", "path"} <= history.metrics.keys()


def test_a_batch_of_one_and_an_odd_one_have_a_loss():
    for count in (1, 3):
        batch = torch.rand(count, 3, 16, 16), torch.zeros(count).long()
        assert stylegan_loss(TINY.adversarial(3, 3), *batch)[0].isfinite()


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = TINY.adversarial(3, 3)
    torch.manual_seed(1)
    state = {k: v.clone() for k, v in whole.state_dict().items()}
    train(whole, 6)

    class Stop(Callback):
        def on_step(self, run):
            if run.step == 4:
                raise KeyboardInterrupt

    half = TINY.adversarial(3, 3)
    half.load_state_dict(state)
    with pytest.raises(KeyboardInterrupt):
        keep = Checkpoint(tmp_path, every=3)
        train(half, 6, callbacks=[*TINY.callbacks(), keep, Stop()])
    again = TINY.adversarial(3, 3)
    train(again, 6, callbacks=[*TINY.callbacks(), Checkpoint(tmp_path, every=3)], resume=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stands(tmp_path):
    class Break(Callback):
        def on_step(self, run):
            if run.step == 4:
                with torch.no_grad():
                    run.model.critic.out.bias.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="step 5"):
        train(TINY.adversarial(3, 3), 8, log_every=1,
              callbacks=[*TINY.callbacks(), Checkpoint(tmp_path, every=3), Break()])
    again = TINY.adversarial(3, 3)
    train(again, 4, callbacks=[*TINY.callbacks(), Checkpoint(tmp_path, every=10)],
          resume=tmp_path / "step-00000003.safetensors")
    assert again.step == 4


# ------------------------------------------------------------------ files, projection, directions


@pytest.mark.parametrize("dtype, tolerance", [(None, 0.0), (torch.float16, 0.02)])
def test_saved_generator_is_rebuilt(tmp_path, dtype, tolerance):
    g = TINY.make_generator(3, 3).eval()
    save_generator(g, tmp_path / "generator.safetensors", classes=["a", "b", "c"], dtype=dtype)
    again = load_generator(tmp_path)
    assert again.classes == ["a", "b", "c"] and again.config == TINY
    a, b = (generate(one, 6, seed=0, truncation=0.5, precision="fp32") for one in (g, again))
    assert (a - b).abs().max() <= tolerance


def test_projection_comes_closer_and_changes_nothing_else():
    g = TINY.make_generator(3, 3).eval()
    before = {name: value.clone() for name, value in g.state_dict().items()}
    target, labels = generate(g, 2, seed=0, labels=[0, 2], precision="fp32"), torch.tensor([0, 2])
    errors = []
    for steps in (0, 60):
        styles = project(g, target, labels=labels, steps=steps)
        made = g.synthesis(styles).add(1).div(2).detach()
        errors.append((made - target).square().mean().item())
    assert styles.shape == (2, g.num_layers, 5) and errors[1] < 0.5 * errors[0]
    assert all(torch.equal(before[name], value) for name, value in g.state_dict().items())
    assert all(p.grad is None for p in g.parameters())


def test_principal_directions_are_numpys():
    g = TINY.make_generator(3).eval()
    directions, deviations = principal_directions(g, count=500)
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    w = (g.mapping(z) - g.mapping.means()).detach().numpy()
    wanted = np.linalg.eigvalsh(w.T @ w / 499)[::-1]
    assert deviations.square().numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    torch.testing.assert_close(directions @ directions.T, torch.eye(5), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------- refusals


BYTES = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize("call, words", [
    (lambda: StyleGANConfig(size=48), "size must be a power of two, at least 8; got 48"),
    (lambda: StyleGANConfig(size=4), "size must be"),
    (lambda: StyleGANConfig(weight_decay=0.1), "weight_decay must be 0"),
    (lambda: TINY.adversarial(4), "channels must be 1 or 3.*got 4"),
    (lambda: TINY.adversarial(2), "channels must be 1 or 3"),
    (lambda: TINY.make_generator(3)(torch.zeros(2, 7)), r"latents must be \(B, 6\); got \(2, 7\)"),
    (lambda: TINY.make_generator(3)(torch.zeros(6)), "latents must be"),
    (lambda: TINY.make_generator(3, 3)(torch.zeros(2, 6)), "labels must be.*got None"),
    (lambda: TINY.make_generator(3)(torch.zeros(2, 6), torch.arange(2)), "labels must be None"),
    (lambda: TINY.make_generator(3, 3)(torch.zeros(2, 6), torch.tensor([0])), "labels must be"),
    (lambda: generate(TINY.make_generator(3), 2, truncation=1.5), r"truncation must be in \[0, 1"),
    (lambda: generate(TINY.make_generator(3), 2, truncation=-0.1), "truncation must be"),
    (lambda: generate(TINY.make_generator(3), 2, truncation=math.nan), "truncation must be"),
    (lambda: pictures(5).batches(8), "batch_size 8 does not fit 5 images"),
    (lambda: stylegan_loss(TINY.adversarial(3, 3), torch.rand(4, 1, 16, 16), torch.zeros(4).long()),
     "images must be"),
    (lambda: stylegan_loss(TINY.adversarial(3, 3), torch.rand(4, 4, 16, 16), torch.zeros(4).long()),
     "images must be"),
    (lambda: stylegan_loss(TINY.adversarial(3, 3), torch.rand(4, 3, 32, 32), torch.zeros(4).long()),
     "images must be"),
    (lambda: project(TINY.make_generator(3), torch.rand(1, 3, 32, 32)), "images must be"),
    (lambda: stylegan_loss(TINY.adversarial(3, 3), BYTES, torch.zeros(4).long()), "images .*uint8"),
    (lambda: stylegan_loss(TINY.adversarial(3, 3), BYTES / 255, torch.zeros(3).long()), "labels"),
    (lambda: project(TINY.make_generator(3), BYTES), "images .*uint8"),
    (lambda: project(TINY.make_generator(3), BYTES / 0.0), "images must be finite.*got nan or inf"),
    (lambda: project(TINY.make_generator(3, 3), BYTES / 255, labels=torch.tensor([0])),
     r"labels must be \(4,\)"),
    (lambda: project(TINY.make_generator(3, 3), BYTES / 255, labels=torch.tensor([0, 1, 2, 3])),
     "labels None or in 0..2"),
    (lambda: principal_directions(TINY.make_generator(3), count=4), "count must be at least 5"),
    (lambda: principal_directions(TINY.make_generator(3, 3), labels=torch.tensor([3])), "in 0..2"),
    (
        lambda: principal_directions(TINY.make_generator(3, 3), labels=torch.tensor([]).long()),
        "0..2",
    ),
    (lambda: mix_styles(torch.rand(2, 4, 5), torch.rand(2, 3, 5), 1), "one shape"),
    (lambda: mix_styles(torch.rand(2, 4, 5), torch.rand(2, 4, 5), 5), "crossover .* and 5"),
    (lambda: upfirdn2d(torch.rand(3, 8, 8)), r"x must be \(B, C, H, W\)"),
    (lambda: upfirdn2d(torch.rand(1, 3, 8, 8), pad=4), "pad in 0..3.* and 4"),
    (lambda: upfirdn2d(torch.rand(1, 3, 8, 8), up=0), "up and down positive"),
    (lambda: modulated_conv2d(torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3), torch.rand(1, 3)),
     r"style must be \(2, 3\)"),
    (lambda: modulated_conv2d(torch.rand(2, 3, 8, 8), torch.rand(4, 3, 2, 2), torch.rand(2, 3)),
     "kernel's side odd.*and 2"),
    (lambda: modulated_conv2d(torch.rand(2, 3, 8, 8), torch.rand(4, 3, 1, 1), torch.rand(2, 3),
                              up=True), "3 with up"),
    (lambda: StyleGAN(TINY.make_generator(3), None, mixing=2.0), r"mixing in \[0, 1\]"),
    (lambda: StyleGAN(TINY.make_generator(3), None, path_every=0), "path_every at least 1"),
    *[(partial(StyleGANConfig, **{name: value}), f"{name} must be")
      for name, value in {"width": 0, "max_width": 0, "critic_width": -1, "mapping_depth": 0,
                          "latent_dim": 0, "class_dim": 0, "mixing": 1.5, "path": -1.0,
                          "path_every": 0, "ada_target": 2.0, "ada_images": 0, "average": -0.1,
                          "lr": -1.0, "epochs": 0.0, "batch_size": 0}.items()],
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
