"""Contrastive learning: losses against trusted peers, bad input, the queue, and two processes."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vlm_course.foundations.augmentation import MultiView
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.networks import ResNet, ResNetConfig, ViT, ViTConfig
from vlm_course.foundations.training import fit
from vlm_course.self_supervised.contrastive import (
    MoCo,
    MoCoConfig,
    SimCLR,
    SimCLRConfig,
    alignment,
    gather,
    info_nce,
    moco_loss,
    nt_xent,
    nt_xent_logits,
    retrieval_accuracy,
    similarities,
    simclr_augmentation,
    simclr_loss,
    stack_styles,
    two_artists,
    uniformity,
    whitening,
)

sys.path.insert(0, str(Path(__file__).parent))
import contrastive_runs as runs  # noqa: E402

TEMPERATURES = [0.05, 0.2, 1.0]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pair(generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of 12 pairs that resemble each other."""
    z0, noise = torch.randn(2, 12, 16, generator=generator)
    return z0.requires_grad_(), (z0 + 0.7 * noise).detach().requires_grad_()


def value_and_gradient(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], *, tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(a, b, atol=tolerance, rtol=0)
               for a, b in zip(ours, theirs, strict=True))


def small_model(*, channels: int = 3, pool: int = 1) -> SimCLR:
    torch.manual_seed(0)
    backbone = ResNet(ResNetConfig(depths=(1, 1), widths=(8, 16), stem="small",
                                   in_channels=channels))
    return SimCLR(backbone, hidden_dim=16, out_dim=8, pool=pool)


def pictures(count: int = 40, *, size: tuple[int, int] = (12, 12), channels: int = 3) -> ImageSet:
    """Coloured noise: every picture has a mean colour of its own, so pairs can be found."""
    generator = torch.Generator().manual_seed(1)
    colour = torch.randint(0, 200, (count, channels, 1, 1), generator=generator)
    noise = torch.randint(0, 50, (count, channels, *size), generator=generator)
    return ImageSet((colour + noise).to(torch.uint8), torch.arange(count) % 2, ["a", "b"], "noise")


# ------------------------------------------------------------------------------- the peers


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_equals_lightly(pair, temperature):
    loss = pytest.importorskip("lightly.loss")
    theirs = loss.NTXentLoss(temperature=temperature)(*pair)
    ours = nt_xent(*pair, temperature=temperature)
    assert equal(value_and_gradient(ours, *pair), value_and_gradient(theirs, *pair))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_equals_pytorch_metric_learning(pair, temperature):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=temperature))(*pair)
    ours = nt_xent(*pair, temperature=temperature)
    assert equal(value_and_gradient(ours, *pair), value_and_gradient(theirs, *pair))


def test_queue_form_equals_lightly_with_a_memory_bank(pair, generator):
    loss = pytest.importorskip("lightly.loss")
    peer = loss.NTXentLoss(temperature=0.2, memory_bank_size=(30, 16))
    queue = F.normalize(torch.randn(30, 16, generator=generator), dim=1)
    peer.memory_bank.bank = queue.clone()
    q, k = pair[0], pair[1].detach()
    ours = info_nce(q, k, temperature=0.2, queue=queue)
    assert equal(value_and_gradient(ours, q), value_and_gradient(peer(q, k), q))


# ------------------------------------------------------------------------ the losses by loop


def by_loop(z0, z1, temperature: float) -> torch.Tensor:
    views, count = torch.cat([z0, z1]), len(z0)
    losses = []
    for i in range(2 * count):
        others = [j for j in range(2 * count) if j != i]
        s = torch.stack([F.cosine_similarity(views[i], views[j], dim=0) for j in others])
        partner = others.index((i + count) % (2 * count))
        losses.append(torch.logsumexp(s / temperature, 0) - s[partner] / temperature)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_equals_a_loop_and_its_gradient_is_exact(generator, count, temperature):
    z = torch.randn(2, count, 5, generator=generator, dtype=torch.float64).requires_grad_()
    ours, loop = nt_xent(*z, temperature=temperature), by_loop(*z, temperature)
    assert equal(value_and_gradient(ours, z), value_and_gradient(loop, z), tolerance=1e-10)
    assert torch.autograd.gradcheck(lambda z: nt_xent(*z, temperature=temperature), (z,))


def test_info_nce_without_a_queue_is_clips_half(pair):
    q, k = pair
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.3
    theirs = F.cross_entropy(logits, torch.arange(len(q)))
    assert equal(value_and_gradient(info_nce(q, k, temperature=0.3), q, k),
                 value_and_gradient(theirs, q, k))


def test_cosines_get_probability_minus_label_over_temperature(pair):
    logits, labels = nt_xent_logits(*(z.detach() for z in pair), temperature=0.2)
    cosines = (0.2 * logits).requires_grad_()
    F.cross_entropy(cosines / 0.2, labels, reduction="sum").backward()
    wanted = (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / 0.2
    assert torch.allclose(cosines.grad, wanted, atol=1e-5)
    assert (logits.softmax(1).diagonal() == 0).all()  # a view is no candidate of its own


def test_swapping_views_or_scaling_rows_changes_nothing(pair):
    z0, z1 = (z.detach() for z in pair)
    loss = nt_xent(z0, z1, temperature=0.2)
    assert torch.allclose(loss, nt_xent(z1, z0, temperature=0.2))
    scale = torch.linspace(0.1, 1000, len(z0))[:, None]
    assert torch.allclose(loss, nt_xent(z0 * scale, z1, temperature=0.2), atol=1e-5)


def test_parts_of_a_batch_against_all_keys_average_to_the_whole(pair):
    z0, z1 = (z.detach().double().requires_grad_() for z in pair)
    parts = [nt_xent(z0[i:i + 4], z1[i:i + 4], temperature=0.2, keys=(z0, z1), rank=i // 4)
             for i in (0, 4, 8)]
    whole = nt_xent(z0, z1, temperature=0.2)
    assert equal(value_and_gradient(sum(parts) / 3, z0, z1), value_and_gradient(whole, z0, z1),
                 tolerance=1e-12)


def test_a_mask_at_row_zero_is_another_loss(pair):
    z0, z1 = (z.detach() for z in pair)
    right, wrong = (nt_xent(z0[6:], z1[6:], temperature=0.2, keys=(z0, z1), rank=r) for r in (1, 0))
    assert abs(right - wrong) > 0.1


def test_gather_on_one_process_is_the_tensor_itself(pair):
    assert gather(pair[0]) is pair[0]


# ------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(pair, dtype):
    low = [z.detach().to(dtype).requires_grad_() for z in pair]
    exact = nt_xent(*(z.detach().float() for z in low), temperature=0.05)
    loss = nt_xent(*low, temperature=0.05)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), exact)
    assert all(z.grad.dtype == dtype and z.grad.isfinite().all() for z in low)


def test_autocast_does_not_reach_the_cosines(pair):
    outside = [nt_xent(*pair, temperature=0.05), info_nce(*pair, temperature=0.05)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [nt_xent(*pair, temperature=0.05), info_nce(*pair, temperature=0.05)]
        assert similarities(*pair, temperature=1.0).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_large_embeddings_do_not_overflow():
    z0, z1 = 1e18 * torch.eye(4), 1e-9 * torch.eye(4)
    assert nt_xent(z0, z1, temperature=0.01).item() < 1e-6


# ------------------------------------------------------------------------------- bad input


def test_all_identical_embeddings_cost_the_log_of_the_candidates():
    z = torch.ones(9, 4).requires_grad_()
    loss = nt_xent(z, z, temperature=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(17), abs=1e-5) and z.grad.isfinite().all()


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]])
def test_rows_of_zero_norm_give_finite_gradients(generator, rows):
    z0, z1 = torch.randn(2, 4, 8, generator=generator)
    z0[rows] = 0
    z0.requires_grad_()
    for loss in (nt_xent(z0, z1, temperature=0.1), info_nce(z0, z1, temperature=0.1)):
        gradient, = torch.autograd.grad(loss, z0)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_named(pair, value):
    z0, z1 = (z.detach().clone() for z in pair)
    z1[[3, 7], 2] = value
    for loss in (nt_xent, info_nce):
        name = "z1" if loss is nt_xent else "keys"
        with pytest.raises(ValueError, match=rf"{name} must be finite; rows \[3, 7\]"):
            loss(z0, z1, temperature=0.5)


@pytest.mark.parametrize(
    ("z0", "z1", "message"),
    [
        (torch.ones(1, 4), torch.ones(1, 4), "at least 2 images.*got 1"),
        (torch.ones(0, 4), torch.ones(0, 4), r"B > 0; got \(0, 4\)"),
        (torch.ones(3, 4), torch.ones(2, 4), r"one shape.*\(3, 4\).*\(2, 4\)"),
        (torch.ones(3, 4, 1), torch.ones(3, 4, 1), r"\(B, D\)"),
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64), "int64"),
        (torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64), "z1 must be.*float.*int64"),
    ],
)
def test_wrong_embeddings_are_refused_by_message(z0, z1, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(z0, z1, temperature=0.5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_that_are_not_positive_are_refused(pair, temperature):
    for call in (nt_xent, info_nce, partial(info_nce, queue=pair[0])):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            call(*pair, temperature=temperature)


def test_one_query_needs_a_queue(generator):
    one, queue = torch.ones(1, 4), torch.randn(6, 4, generator=generator)
    with pytest.raises(ValueError, match="at least 2 rows where there is no queue"):
        info_nce(one, one, temperature=0.5)
    assert info_nce(one, one, temperature=0.5, queue=queue).isfinite()


@pytest.mark.parametrize("mode", [True, False])
def test_a_batch_of_one_image_is_refused(mode):
    view = torch.rand(1, 3, 12, 12)
    with pytest.raises(ValueError, match="z0 must hold at least 2 images.*got 1"):
        simclr_loss(small_model().train(mode), (view, view))


def test_one_image_is_refused_by_moco_in_training_only():
    model, view = MoCo(small_model(), queue_size=16), torch.rand(1, 3, 12, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="views must hold at least 2 images in training.*got 1"):
        moco_loss(model, (view, view))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert moco_loss(model.eval(), (view, view))[0].isfinite()


@pytest.mark.parametrize(
    ("shapes", "rank"),
    [(((12, 16), (11, 16)), 0), (((12, 15), (12, 15)), 0), (((12, 16), (12, 16)), 1),
     (((12, 16), (12, 16)), -1)],
)
def test_keys_without_the_rows_of_the_rank_are_refused(pair, shapes, rank):
    keys = tuple(torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=rf"keys must be two \(N, 16\).* of rank {rank}; got"):
        nt_xent(*pair, temperature=0.5, keys=keys, rank=rank)


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        (torch.ones(0, 16), r"queue must be \(B, D\) float, B > 0; got \(0, 16\)"),
        (torch.ones(5, 15), r"queue must be \(K, 16\); got \(5, 15\)"),
        (torch.ones(5, 16, dtype=torch.int64), "queue must be.*int64"),
        (torch.full((5, 16), math.nan), r"queue must be finite; rows \[0, 1, 2, 3, 4\]"),
    ],
)
def test_queues_that_do_not_fit_are_refused(pair, queue, message):
    with pytest.raises(ValueError, match=message):
        info_nce(*pair, temperature=0.5, queue=queue)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (torch.rand(4, 3, 8, 8), "views must be 2 batches.*one tensor.*MultiView"),
        ((torch.rand(4, 3, 8, 8),) * 3, "2 batches.*got 3"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(4, 3, 8, 8).byte()), r"views\[1\].*uint8"),
        ((torch.rand(4, 3, 8, 8), torch.full((4, 3, 8, 8), 300)), r"views\[1\].*float.*int64"),
        ((torch.rand(5, 3, 8, 8), torch.rand(3, 3, 8, 8)), r"views\[1\] must hold.*3 and 5"),
        ((torch.rand(0, 3, 8, 8),) * 2, r"views\[0\] must hold.*above 0; got 0"),
    ],
)
@pytest.mark.parametrize("loss", [simclr_loss, moco_loss])
def test_wrong_views_are_refused_by_message(views, message, loss):
    model = small_model() if loss is simclr_loss else MoCo(small_model(), queue_size=16)
    with pytest.raises(ValueError, match=message):
        loss(model, views)


def test_views_of_two_sizes_do_not_go_through_one_pass():
    views = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 12, 8)
    with pytest.raises(ValueError, match=r"views must have one shape; got .*8, 8\), .*12, 8\)"):
        simclr_loss(small_model(), views)
    assert moco_loss(MoCo(small_model(), queue_size=16), views)[0].isfinite()  # two passes


@pytest.mark.parametrize("kind", ["simclr", "moco"])
@pytest.mark.parametrize("size", [(8, 13), (12, 12)])
def test_identical_images_and_half_precision_give_finite_steps(kind, size):
    model = small_model() if kind == "simclr" else MoCo(small_model(), queue_size=16)
    loss = {"simclr": simclr_loss, "moco": moco_loss}[kind]
    views = (torch.full((6, 3, *size), 0.5),) * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = loss(model, views)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    if kind == "simclr":
        assert value.item() == pytest.approx(math.log(11), abs=1e-3)  # nothing tells them apart
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_images_too_small_for_the_grid_are_refused():
    model = small_model(pool=2).eval()
    with pytest.raises(ValueError, match=r"at least pool = 2; got \(2, 16, 1, 1\) of"):
        model(torch.rand(2, 3, 2, 2))
    with pytest.raises(ValueError, match="pool must be at least 1; got 0"):
        small_model(pool=0)


def test_pixels_that_are_not_finite_are_named_and_nothing_is_changed():
    views = torch.rand(2, 4, 3, 8, 8)
    views[1, 2, 0, 0, 0] = math.nan
    model = MoCo(small_model(), queue_size=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"views\[1\] must be finite; images \[2\]"):
        moco_loss(model, tuple(views))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --------------------------------------------------------------- alignment and uniformity


def test_alignment_and_uniformity_equal_their_definitions(pair):
    z0, z1 = (F.normalize(z.detach(), dim=1) for z in pair)
    assert torch.allclose(alignment(*pair, alpha=1), (z0 - z1).norm(dim=1).mean(), atol=1e-6)
    distances = torch.stack([(z0[i] - z0[j]).square().sum()
                             for i in range(12) for j in range(i)])
    assert torch.allclose(uniformity(pair[0], t=3), (-3 * distances).exp().mean().log(), atol=1e-5)


def test_alignment_and_uniformity_at_their_limits():
    same = torch.ones(5, 3)
    opposite = torch.tensor([[1.0, 0], [-1, 0]])
    assert alignment(same, 2 * same) == 0 and uniformity(same) == 0
    assert alignment(opposite, opposite.flip(0)).item() == pytest.approx(4)
    assert uniformity(opposite).item() == pytest.approx(-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alignment_and_uniformity_of_zeros_and_half_precision(pair, dtype):
    low = [z.detach().to(dtype) for z in pair]
    exact = [z.float() for z in low]
    assert alignment(*low) == alignment(*exact) and uniformity(low[0]) == uniformity(exact[0])
    nothing = torch.zeros(3, 4, requires_grad=True)
    (alignment(nothing, torch.ones(3, 4)) + uniformity(nothing)).backward()
    assert nothing.grad.isfinite().all()


def test_alignment_and_uniformity_refuse_what_has_no_pair():
    with pytest.raises(ValueError, match=r"z0 and z1 must have one shape.*\(1, 4\) and \(3, 4\)"):
        alignment(torch.ones(1, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="z must hold at least 2 rows.*got 1"):
        uniformity(torch.ones(1, 4))
    for call in (uniformity, partial(alignment, torch.ones(2, 4))):
        with pytest.raises(ValueError, match=r"must be finite; rows \[1\]"):
            call(torch.tensor([[1.0] * 4, [math.nan] * 4]))


# -------------------------------------------------------------------------- views and models


@pytest.mark.parametrize("size", [(12, 12), (20, 13)])
def test_views_are_square_within_range_and_drawn_for_each_image(size):
    images = pictures(6, size=size).images[:1].repeat(6, 1, 1, 1).float() / 255
    view = simclr_augmentation(16, blur=0.5)
    first, second = MultiView(view, view)(images, torch.Generator().manual_seed(0))
    assert first.shape == second.shape == (6, 3, 16, 16)
    assert first.min() >= 0 and first.max() <= 1
    differ = (first[1:] - first[:1]).abs().amax((1, 2, 3))
    assert (differ > 0.01).sum() >= 4 and (first - second).abs().max() > 0.01
    again = MultiView(view, view)(images, torch.Generator().manual_seed(0))
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_loss_is_nt_xent_of_one_pass_over_both_views(generator):
    model = small_model().eval()
    views = tuple(torch.rand(2, 6, 3, 12, 12, generator=generator))
    loss, metrics = simclr_loss(model, views, temperature=0.3)
    z0, z1 = model(views[0]), model(views[1])
    assert torch.allclose(loss, nt_xent(z0, z1, temperature=0.3), atol=1e-5)
    logits, labels = nt_xent_logits(z0, z1, temperature=0.3)
    assert metrics["accuracy"] == (logits.argmax(1) == labels).float().mean()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    simclr_loss(model, views)
    assert len(calls) == 1


@pytest.mark.parametrize("size", [(12, 12), (10, 15)])
@pytest.mark.parametrize("pool", [1, 2])
def test_features_are_kept_before_the_head(generator, size, pool):
    model = small_model(pool=pool).eval()
    images = torch.rand(3, 3, *size, generator=generator)
    maps = model.backbone.forward_features(images)
    wanted = F.adaptive_avg_pool2d(maps, pool).flatten(1)
    assert torch.allclose(model.features(images), wanted, atol=1e-6)
    assert torch.allclose(model(images), model.projector(wanted), atol=1e-5)


def test_a_vision_transformer_is_trained_the_same_way(generator):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=8, patch_size=4, dim=16, depth=1, num_heads=2, num_classes=7))
    model = SimCLR(vit, out_dim=8)
    simclr_loss(model, tuple(torch.rand(2, 5, 3, 8, 8, generator=generator)))[0].backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="8, 8"):  # a size that the patches do not fit
        simclr_loss(model, tuple(torch.rand(2, 5, 3, 9, 9, generator=generator)))


@pytest.mark.parametrize("kind", ["simclr", "moco"])
def test_every_trained_parameter_gets_a_gradient(generator, kind):
    model = small_model() if kind == "simclr" else MoCo(small_model(), queue_size=16)
    loss = {"simclr": simclr_loss, "moco": moco_loss}[kind]
    loss(model, tuple(torch.rand(2, 6, 3, 12, 12, generator=generator)))[0].backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


@pytest.mark.parametrize("config", [SimCLRConfig(size=12, batch_size=16, temperature=0.2),
                                    MoCoConfig(size=12, batch_size=16, queue_size=24)])
def test_recipes_learn_to_find_partners(config):
    torch.manual_seed(0)
    backbone = ResNet(ResNetConfig(depths=(1,), widths=(8,), stem="small"))
    model = config.build(backbone)
    view = simclr_augmentation(12, scale=(0.5, 1.0), color=0.0, grey=0.0)
    history = fit(model, pictures().batches(16, transform=MultiView(view, view)), config.loss(),
                  steps=40, lr=1e-2, precision="fp32")
    assert sum(history.losses[-8:]) < sum(history.losses[:8]) - 1
    assert sum(history.metrics["accuracy"][-8:]) / 8 > 0.5
    first, second = config.transform()(pictures(4).images.float() / 255,
                                       torch.Generator().manual_seed(0))
    assert first.shape == second.shape == (4, 3, 12, 12)


# ------------------------------------------------------------------------------------ MoCo


@pytest.mark.parametrize("batch", [1, 3, 5, 7])
def test_queue_wraps_whatever_the_batch(generator, batch):
    model = MoCo(small_model(), queue_size=7)
    every = torch.randn(6 * batch, 8, generator=generator)
    start = F.normalize(model.queue, dim=1)
    for keys in every.split(batch):
        model.enqueue(keys)
    history = torch.cat([start, F.normalize(every, dim=1)])[-7:]  # the newest seven
    newest_first = torch.roll(model.queue, -int(model.position), dims=0)
    assert torch.allclose(newest_first, history, atol=1e-6)
    assert int(model.position) == 6 * batch % 7


def test_odd_last_batch_trains():
    model = MoCo(small_model(), queue_size=24)
    view = simclr_augmentation(12, scale=(0.5, 1.0))
    batches = pictures(40).batches(16, drop_last=False, transform=MultiView(view, view))
    history = fit(model, batches, moco_loss, epochs=3, precision="fp32")
    assert len(history.losses) == 9 and int(model.position) == 120 % 24
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(24), atol=1e-5)


def test_a_batch_larger_than_the_queue_is_refused(generator):
    with pytest.raises(ValueError, match="queue_size must be at least.* batch of 9; got 7"):
        MoCo(small_model(), queue_size=7).enqueue(torch.randn(9, 8, generator=generator))
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\); got 1.0"):
        MoCo(small_model(), momentum=1.0)


def test_keys_are_a_moving_average_and_get_no_gradient(generator):
    model = MoCo(small_model(), queue_size=16, momentum=0.9)
    views = tuple(torch.rand(2, 6, 3, 12, 12, generator=generator))
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    wanted = [0.9 * k + 0.1 * q for k, q in zip(model.key_encoder.parameters(),
                                                model.encoder.parameters(), strict=True)]
    moco_loss(model, views)[0].backward()
    for value, p in zip(wanted, model.key_encoder.parameters(), strict=True):
        assert torch.allclose(p, value, atol=1e-6) and p.grad is None


def test_evaluating_moco_changes_nothing(generator):
    model = MoCo(small_model(), queue_size=16).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moco_loss(model, tuple(torch.rand(2, 6, 3, 12, 12, generator=generator)))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_moco_loss_is_info_nce_against_the_queue_before_it_is_filled(generator):
    model = MoCo(small_model(), queue_size=16)
    queue = model.queue.clone()
    views = tuple(torch.rand(2, 6, 3, 12, 12, generator=generator))
    loss, _ = moco_loss(model, views, temperature=0.3)
    z0, z1 = model.encoder(views[0]), model.encoder(views[1])  # both networks are still equal
    assert torch.allclose(loss, info_nce(z0, z1, temperature=0.3, queue=queue), atol=1e-5)
    assert torch.allclose(model.queue[:6], F.normalize(z1, dim=1), atol=1e-5)


# ------------------------------------------------------------------------ artists, retrieval


def drawings() -> ImageSet:
    """Three styles of five concepts; the pixel value tells both."""
    value = torch.arange(15, dtype=torch.uint8).repeat_interleave(3 * 4).view(15, 3, 2, 2)
    table = {"style": [s for s in "abc" for _ in range(5)], "concept": list("vwxyz") * 3}
    return ImageSet(value, torch.zeros(15, dtype=torch.int64), ["all"], "drawings", table)


def test_pairs_are_two_different_styles_of_one_concept(generator):
    data = stack_styles(drawings(), ("a", "b", "c"))
    assert data.images.shape == (5, 9, 2, 2) and data.column("concept") == list("vwxyz")
    seen = set()
    for _ in range(20):
        first, second = two_artists(data.images.float() / 255, generator, view=lambda x, _: x)
        first, second = ((255 * v).round().int() for v in (first, second))
        assert first.shape == (5, 3, 2, 2) and (first == first[:, :1, :1, :1]).all()
        a, b = first[:, 0, 0, 0], second[:, 0, 0, 0]
        assert (a % 5 == torch.arange(5)).all() and (b % 5 == torch.arange(5)).all()
        assert (a // 5 != b // 5).all()
        seen |= set(zip((a // 5).tolist(), (b // 5).tolist(), strict=True))
    assert len(seen) == 6  # every ordered pair of styles occurs


def test_styles_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="'d'"):
        stack_styles(drawings(), ("a", "d"))
    with pytest.raises(ValueError, match="same concepts"):
        stack_styles(drawings()[:9], ("a", "b"))
    with pytest.raises(ValueError, match=r"styles must name at least two; got \['a'\]"):
        stack_styles(drawings(), ["a"])
    for channels in (3, 7):  # one style, and two and a third
        with pytest.raises(ValueError, match=f"at least two styles of 3.*got {channels} channels"):
            two_artists(torch.rand(2, channels, 4, 4), torch.Generator(), view=lambda x, _: x)
    with pytest.raises(ValueError, match="images must be.*float.*uint8"):
        two_artists(torch.zeros(2, 6, 4, 4).byte(), torch.Generator(), view=lambda x, _: x)


def test_retrieval_counts_own_rows(generator):
    bank = torch.randn(30, 6, generator=generator)
    queries = 5 * (bank + 0.01 * torch.randn(30, 6, generator=generator))
    assert retrieval_accuracy(queries, bank) == 1.0
    assert retrieval_accuracy(bank.roll(1, 0), bank) == 0.0
    mixed = torch.cat([bank[:15], bank[15:].roll(1, 0)])
    assert retrieval_accuracy(mixed, bank) == 0.5
    assert retrieval_accuracy(mixed, bank, k=30) == 1.0
    with pytest.raises(ValueError, match=r"one shape.*\(29, 6\)"):
        retrieval_accuracy(bank[1:], bank)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.30"):
        retrieval_accuracy(bank, bank, k=31)
    assert retrieval_accuracy(bank.half(), bank.half()) == 1.0
    bank[4, 2] = math.nan
    with pytest.raises(ValueError, match=r"bank must be finite; rows \[4\]"):
        retrieval_accuracy(queries, bank)


def test_whitening_gives_unit_covariance_and_undoes_scales(generator):
    rows = torch.randn(400, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3
    white = whitening(rows, ridge=1e-9)(rows)
    assert torch.allclose(white.mean(0), torch.zeros(5), atol=1e-4)
    assert torch.allclose(white.T @ white / 400, torch.eye(5), atol=1e-3)
    scaled = rows * torch.logspace(-2, 2, 5) + 7  # cosines, not signs of directions, are compared
    cosines = [F.normalize(whitening(r)(r), dim=1) for r in (rows, scaled)]
    assert torch.allclose(cosines[0] @ cosines[0].T, cosines[1] @ cosines[1].T, atol=1e-3)
    constant = torch.cat([rows, torch.ones(400, 1)], dim=1)
    assert whitening(constant)(constant).isfinite().all()
    z = (rows - rows.mean(0)) / rows.std(0, correction=0)
    variances, directions = torch.linalg.eigh((z.T @ z / 400).double())
    root = directions @ torch.diag((variances + 0.5).rsqrt()) @ directions.T
    assert torch.allclose(whitening(rows, ridge=0.5)(rows), z @ root.float(), atol=1e-4)
    assert torch.allclose(whitening(rows.half())(rows), whitening(rows)(rows), atol=0.02)
    for ridge in (0, math.nan):
        with pytest.raises(ValueError, match=f"ridge must be above 0; got {ridge}"):
            whitening(rows, ridge=ridge)
    rows[7] = math.inf
    for wrong, message in ((rows, r"finite; rows \[7\]"), (rows[0], r"\(B, D\).*got \(5,\)")):
        with pytest.raises(ValueError, match=f"features must be {message}"):
            whitening(wrong)


# -------------------------------------------------------------------------- two processes


def seen(folder: Path) -> list[dict]:
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def test_gather_collects_in_rank_order_and_sums_gradients(launched):
    for rank, found in enumerate(seen(launched)):
        assert found["gathered"] == [0.0, 0.0, 1.0, 1.0]
        rows = torch.arange(4.0)[2 * rank:2 * rank + 2]
        assert found["row"] == (2 * rows).tolist()  # both processes' losses weigh each row once


def test_two_processes_have_the_loss_and_gradient_of_one_with_the_whole_batch(launched):
    weight = torch.eye(runs.DIM, dtype=torch.float64).requires_grad_()
    loss = runs.loss_of(weight, slice(None))
    loss.backward()
    first, second = seen(launched)
    assert first["loss"] != pytest.approx(second["loss"], abs=1e-3)  # their data differ
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(loss.item(), abs=1e-12)
    averaged = (torch.tensor(first["gradient"]) + torch.tensor(second["gradient"])) / 2
    assert torch.allclose(averaged.double(), weight.grad, atol=1e-6)


@pytest.mark.parametrize("kind", ["simclr", "moco"])
def test_training_on_two_processes_equals_training_on_one(launched, kind):
    model, losses = runs.trained(kind)
    alone = {name: value for name, value in model.state_dict().items()}
    for rank, found in enumerate(seen(launched)):
        assert found[kind] == pytest.approx(losses, abs=1e-5)
        weights = load_file(launched / f"{kind}-{rank}.safetensors")
        assert weights.keys() == alone.keys()
        assert all(torch.allclose(weights[name].float(), alone[name].float(), atol=1e-4)
                   for name in weights)
