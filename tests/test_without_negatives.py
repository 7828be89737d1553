"""BYOL, VICReg, Barlow Twins and DINO: losses, the shared module, the teacher and the alarm."""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.appendix.checkpoints import Checkpoint, read_tensors
from vlm_course.foundations.networks import ResNet, ResNetConfig, ViT, ViTConfig
from vlm_course.foundations.training import fit
from vlm_course.self_supervised.without_negatives import (
    METHODS,
    CollapseAlarm,
    CollapseError,
    JointEmbedding,
    MomentumTeacher,
    Prototypes,
    barlow_twins_loss,
    by_resolution,
    byol_loss,
    dino_loss,
    entropy,
    joint_embedding_loss,
    participation_ratio,
    spread,
    update_center,
    vicreg_loss,
    vicreg_terms,
)

sys.path.insert(0, str(Path(__file__).parent))
import without_negatives_runs as runs  # noqa: E402

ALL = sorted(METHODS)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small(name: str, **changes) -> JointEmbedding:
    torch.manual_seed(0)
    config = replace(METHODS[name], hidden_dim=16, out_dim=12, bottleneck=8, **changes)
    return config.build(ResNet(ResNetConfig(depths=(1, 1), widths=(4, 8), stem="small")))


def pair(generator, rows=16, dim=6, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    z0 = torch.randn(rows, dim, generator=generator, dtype=dtype) * torch.linspace(0.2, 2, dim)
    z1 = z0 + 0.3 * torch.randn(rows, dim, generator=generator, dtype=dtype)
    return z0.to(dtype), z1.to(dtype)


def crops(generator, count=6, size=8) -> tuple[torch.Tensor, ...]:
    sides = (size, size, size // 2, size // 2)
    return tuple(torch.rand(count, 3, side, side, generator=generator) for side in sides)


# ---------------------------------------------------------------------------------- the losses


def assert_agree(ours, peer, *inputs, rel=1e-5):
    """Equal in value and in gradient."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    a, b = ours(*inputs), peer(*inputs)
    assert torch.allclose(a, b, rtol=rel, atol=1e-6)
    options = {"allow_unused": True, "materialize_grads": True}
    for x, y in zip(torch.autograd.grad(a, inputs, **options),
                    torch.autograd.grad(b, inputs, **options), strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=rel * y.abs().max().item())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_equal_lightly(seed):
    lightly = pytest.importorskip("lightly.loss")
    generator = torch.Generator().manual_seed(seed)
    z0, z1 = pair(generator)
    cosine = lightly.NegativeCosineSimilarity()
    assert_agree(byol_loss, lambda p, t: 2 + 2 * cosine(p, t), z0, z1)
    assert_agree(vicreg_loss, lightly.VICRegLoss(), z0, z1)
    assert_agree(lambda a, b: vicreg_loss(a, b, invariance=2, variance=3, covariance=4),
                 lightly.VICRegLoss(lambda_param=2, mu_param=3, nu_param=4), z0, z1)
    assert_agree(lambda a, b: barlow_twins_loss(a, b, redundancy=0.1),
                 lightly.BarlowTwinsLoss(lambda_param=0.1), z0, z1)


@pytest.mark.parametrize("teachers", [1, 2])
def test_dino_equals_lightly_and_so_does_its_centre(generator, teachers):
    lightly = pytest.importorskip("lightly.loss")
    student = [torch.randn(5, 7, generator=generator) for _ in range(4)]
    teacher = [torch.randn(5, 7, generator=generator) for _ in range(teachers)]
    center = torch.randn(7, generator=generator)

    def peer(*logits):
        loss = lightly.DINOLoss(7, teacher_temp=0.05)
        loss.center = center.view(1, 1, 7).clone()
        value = loss(teacher, list(logits))
        peer.center = loss.center.flatten()
        return value

    assert_agree(lambda *s: dino_loss(s, teacher, center=center, teacher_temperature=0.05),
                 peer, *student)
    ours = center.clone()
    update_center(ours, teacher, momentum=0.9)
    assert torch.allclose(ours, peer.center, atol=1e-6)


def test_losses_pass_gradcheck(generator):
    z0, z1 = (z.requires_grad_() for z in pair(generator, 5, 3, torch.float64))
    for loss in (byol_loss, vicreg_loss, barlow_twins_loss):
        assert torch.autograd.gradcheck(loss, (z0, z1), atol=1e-4)
    assert torch.autograd.gradcheck(lambda s: dino_loss([z1, s], [z1.detach()]), (z0,), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32(generator, dtype):
    z0, z1 = (z.to(dtype) for z in pair(generator, 64))
    for loss in (byol_loss, vicreg_loss, barlow_twins_loss,
                 lambda a, b: dino_loss([a, b], [b, a])):
        exact = loss(z0.float(), z1.float())
        with torch.autocast("cpu", torch.bfloat16):
            low, under = loss(z0, z1), loss(z0.float(), z1.float())
        assert low.dtype == under.dtype == torch.float32
        assert torch.equal(low, exact) and torch.equal(under, exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert participation_ratio(z0.float()) == participation_ratio(z0.float())
        assert Prototypes(6, 4)(z0.float()).dtype == torch.float32


@pytest.mark.parametrize("loss", [byol_loss, vicreg_loss, barlow_twins_loss])
def test_zero_and_equal_embeddings_give_finite_gradients(loss):
    for value in (0.0, 1.0):
        z = torch.full((6, 4), value, requires_grad=True)
        result = loss(z, torch.full((6, 4), value))
        gradient, = torch.autograd.grad(result, z)
        assert result.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 100


@pytest.mark.parametrize("loss", [byol_loss, vicreg_loss, barlow_twins_loss])
def test_wrong_shapes_are_refused_by_message(loss):
    with pytest.raises(ValueError, match=r"one shape.*\(4, 3\) and \(4, 2\)"):
        loss(torch.rand(4, 3), torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"\(4, 3, 2\)"):
        loss(torch.rand(4, 3, 2), torch.rand(4, 3, 2))


@pytest.mark.parametrize("loss", [vicreg_loss, barlow_twins_loss])
def test_statistics_of_one_row_are_refused(loss):
    with pytest.raises(ValueError, match=r"B at least 2; got \(1, 3\)"):
        loss(torch.rand(1, 3), torch.rand(1, 3))


def test_dino_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="pair of different views; got 1 and 1"):
        dino_loss([torch.rand(2, 3)], [torch.rand(2, 3)])
    with pytest.raises(ValueError, match="one shape"):
        dino_loss([torch.rand(2, 3), torch.rand(2, 4)], [torch.rand(2, 3)])


def test_cross_entropy_is_entropy_and_divergence(generator):
    q = torch.randn(5, 9, generator=generator).softmax(1)
    p = torch.randn(5, 9, generator=generator).log_softmax(1)
    cross = -(q * p).sum(1)
    kl = F.kl_div(p, q, reduction="none").sum(1)
    assert torch.allclose(cross, math.log(9) * entropy(q) + kl, atol=1e-5)
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(1)
    assert entropy(torch.tensor([1.0, 0, 0])) == 0


def test_vicreg_terms_see_their_own_collapse():
    one = torch.tensor([1.0, -1, 1, -1]) * 0.75**0.5
    two = torch.tensor([1.0, 1, -1, -1]) * 0.75**0.5
    copied, free = torch.stack([one, one], 1), torch.stack([one, two], 1)
    assert vicreg_terms(0 * free, 0 * free)["variance"] > 0.98
    assert vicreg_terms(copied, copied)["covariance"] == pytest.approx(2, rel=1e-4)
    assert sum(vicreg_terms(free, free).values()) < 1e-6


@pytest.mark.parametrize("argument", ["student_temperature", "teacher_temperature"])
def test_dino_refuses_a_temperature_that_is_not_above_zero(argument):
    logits = [torch.rand(2, 3), torch.rand(2, 3)]
    with pytest.raises(ValueError, match=f"{argument} must be above 0; got 0.0"):
        dino_loss(logits, logits, **{argument: 0.0})


def test_dino_of_zero_and_equal_logits_gives_finite_gradients():
    for value in (0.0, 1.0):
        s = torch.full((6, 4), value, requires_grad=True)
        loss = dino_loss([s, s], [torch.full((6, 4), value)] * 2)
        gradient, = torch.autograd.grad(loss, s)
        assert loss.item() == pytest.approx(math.log(4)) and gradient.abs().max() < 1e-6


# ------------------------------------------------------------------------------ the signatures


def test_signatures_of_the_three_collapses(generator):
    even = torch.randn(2000, 16, generator=generator)
    assert spread(even) == pytest.approx(1, abs=0.02) and participation_ratio(even) > 15
    line = even[:, :1] * torch.randn(1, 16, generator=generator)
    assert spread(line) > 0.5 and participation_ratio(line) == pytest.approx(1, abs=1e-3)
    point = 1 + 0.01 * even
    assert spread(point) < 0.02 and participation_ratio(point) > 15
    assert spread(torch.ones(4, 3)) < 1e-6 and participation_ratio(torch.ones(4, 3)) < 1e-6
    assert spread(torch.zeros(4, 3)) == 0


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_rank_equals_its_eigenvalues(generator, shape):
    z = torch.randn(shape, generator=generator)
    values = torch.linalg.eigvalsh(torch.cov(z.T))
    assert participation_ratio(z) == pytest.approx(
        (values.sum() ** 2 / values.square().sum()).item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.1, 3.7, -250.0])
def test_equal_rows_have_no_spread_and_no_rank(value):
    equal = torch.full((7, 64), value)  # the mean of seven is not exactly the value
    assert spread(equal) < 1e-5 and participation_ratio(equal) == 0
    assert spread(equal[:1]) == 0 and participation_ratio(equal[:1]) == 0  # a batch of one


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_rank_does_not_depend_on_scale(generator, scale):
    z, _ = pair(generator, 64)
    wanted = pytest.approx(participation_ratio(z).item(), rel=1e-4)
    assert participation_ratio(z * scale).item() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_signatures_of_half_precision_are_float32(generator, dtype):
    z = pair(generator, 64)[0].to(dtype)
    assert torch.equal(spread(z), spread(z.float()))
    assert torch.equal(participation_ratio(z), participation_ratio(z.float()))
    q = z.softmax(1)
    assert torch.equal(entropy(q), entropy(q.float()))


def test_nan_is_not_hidden_by_a_signature():
    z = torch.ones(4, 3)
    z[0, 0] = math.nan
    assert spread(z).isnan() and participation_ratio(z).isnan()


# ---------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("name", ALL)
def test_every_trained_parameter_gets_a_gradient(generator, name):
    model = small(name)
    loss, metrics = joint_embedding_loss(model, crops(generator))
    loss.backward()
    for key, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), key
        assert p.requires_grad != key.startswith("teacher"), key
    assert loss.isfinite() and {"spread", "rank"} <= metrics.keys()
    assert not any(metric.requires_grad for metric in metrics.values())


def test_one_forward_a_resolution_in_the_views_order(generator):
    views, calls = crops(generator), []

    def function(images):
        calls.append(tuple(images.shape))
        return images.mean((1, 2, 3))[:, None]

    rows = by_resolution([views[2], views[0], views[3], views[1]], function)
    assert calls == [(12, 3, 4, 4), (12, 3, 8, 8)]
    for row, view in zip(rows, (views[2], views[0], views[3], views[1]), strict=True):
        assert torch.allclose(row[:, 0], view.mean((1, 2, 3)))


def test_stop_gradient_is_what_it_says(generator):
    views = crops(generator)[:2]
    config = {"teacher": False, "predictor": False}
    flowing = small("byol", **config, stop_gradient=False)
    stopped = small("byol", **config, stop_gradient=True)
    gradients = []
    for model in (flowing, stopped):
        joint_embedding_loss(model, views)[0].backward()
        gradients.append(model.student.projector[0][3].weight.grad)
    assert torch.allclose(gradients[0], 2 * gradients[1], atol=1e-6)  # both sides against one


def test_prototypes_have_length_one(generator):
    layer = Prototypes(5, 7)
    x = torch.randn(4, 5, generator=generator)
    expected = F.normalize(x) @ F.normalize(layer.weight).T
    assert torch.allclose(layer(x), expected, atol=1e-6)
    layer.weight.data *= 3
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_non_square_views_and_odd_sizes_work(generator, name):
    views = tuple(torch.rand(3, 3, 9, 7, generator=generator) for _ in range(2))
    assert joint_embedding_loss(small(name), views)[0].isfinite()


def test_a_transformer_backbone_works(generator):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=8, patch_size=4, dim=12, depth=1, num_heads=2))
    model = replace(METHODS["dino"], hidden_dim=16, out_dim=12, bottleneck=8).build(vit)
    views = crops(generator)[:2]
    joint_embedding_loss(model, views)[0].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="8, 8"):  # positions of another size: refused by the ViT
        joint_embedding_loss(model, crops(generator))


@pytest.mark.parametrize("name", ALL)
def test_batch_of_one(generator, name):
    views = crops(generator, 1)[:2]
    if name in ("byol", "simsiam", "dino"):
        assert joint_embedding_loss(small(name), views)[0].isfinite()
    else:
        with pytest.raises(ValueError, match="B at least 2"):
            joint_embedding_loss(small(name), views)


@pytest.mark.parametrize("name", ALL)
def test_an_odd_last_batch_is_a_step_like_others(name):
    batches = runs.pictures(20).batches(8, drop_last=False, transform=runs.fixed_views)
    history = fit(runs.method(name), batches, joint_embedding_loss, steps=3,
                  callbacks=[MomentumTeacher()])  # 8, 8 and 4 images
    assert len(history.losses) == 3 and all(map(math.isfinite, history.losses))


@pytest.mark.parametrize("name", ALL)
def test_views_of_other_images_are_refused(generator, name):
    views = [torch.rand(rows, 3, 8, 8, generator=generator) for rows in (3, 5)]
    with pytest.raises(ValueError, match=r"as many images as views\[0\], above 0; got 5 and 3"):
        joint_embedding_loss(small(name), views)


def test_bad_views_are_refused_by_message(generator):
    model, views = small("vicreg"), list(crops(generator)[:2])
    with pytest.raises(ValueError, match="views must be 2 batches.*got one tensor"):
        joint_embedding_loss(model, views[0])
    with pytest.raises(ValueError, match="views must be 2 batches.*got 1"):
        joint_embedding_loss(model, views[:1])
    with pytest.raises(ValueError, match=r"views\[1\].*uint8"):
        joint_embedding_loss(model, [views[0], (views[1] * 255).to(torch.uint8)])
    with pytest.raises(ValueError, match=r"views\[0\] must be .* float.*int64"):
        joint_embedding_loss(model, [(views[0] * 999).long(), views[1]])
    views[1][3, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"views\[1\] must be finite; images \[3\]"):
        joint_embedding_loss(model, views)


@pytest.mark.parametrize("name", ALL)
def test_equal_images_and_half_precision_stay_finite(name):
    views = tuple(torch.full((4, 3, 8, 8), 0.5, dtype=torch.float16) for _ in range(2))
    loss, _ = joint_embedding_loss(small(name), views)
    assert loss.isfinite() and loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert joint_embedding_loss(small(name), views)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"method": "moco"}, "method must be one of.*'moco'"),
     ({"stop_gradient": False}, "stop_gradient must be True with a teacher"),
     ({"momentum": 1.5}, "momentum.*1.5"),
     ({"method": "vicreg"}, "predictor must be False for method 'vicreg'"),
     ({"method": "vicreg", "predictor": False}, "teacher must be False for method 'vicreg'"),
     ({"method": "barlow_twins", "predictor": False, "teacher": False},
      "stop_gradient must be False for method 'barlow_twins'"),
     ({"method": "dino"}, "predictor must be False for method 'dino'"),
     ({"method": "dino", "predictor": False, "final_norm": True},
      "final_norm must be False for method 'dino'"),
     ({"center_momentum": -0.1}, "center_momentum.*-0.1"),
     ({"temperature_warmup": 2}, "temperature_warmup.*2"),
     ({"teacher_temperature": (0.04, 0.0)}, r"above 0; got 0.1 and \(0.04, 0.0\)")])
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(METHODS["byol"], **changes)


@pytest.mark.parametrize("name", ALL)
def test_recipes_train_from_their_own_parts(name):
    config = replace(METHODS[name], size=8, hidden_dim=16, out_dim=12, bottleneck=8)
    torch.manual_seed(0)
    model = config.build(ResNet(ResNetConfig(depths=(1, 1), widths=(4, 8), stem="small")))
    batches = runs.pictures().batches(8, transform=config.transform())
    history = fit(model, batches, config.loss(), steps=3, callbacks=config.callbacks())
    assert len(history.metrics["rank"]) == 3


# ------------------------------------------------------------------------ the teacher, the alarm


def test_momentum_rises_by_half_a_cosine():
    teacher = MomentumTeacher()
    assert teacher.momentum(0.9, 0, 10) == pytest.approx(0.9)
    assert teacher.momentum(0.9, 5, 10) == pytest.approx(0.95)
    assert teacher.momentum(0.9, 10, 10) == 1


def test_teacher_moves_by_the_rest_of_its_momentum():
    model = runs.method("byol")  # momentum 0.5 at the start
    before = [p.clone() for p in model.teacher.parameters()]
    runs.run(model, steps=1, callbacks=[])
    assert all(torch.equal(p, old) for p, old in
               zip(model.teacher.parameters(), before, strict=True))  # nothing else moves it
    run = SimpleNamespace(model=model, step=1, steps=2)
    m = MomentumTeacher().momentum(0.5, 1, 2)
    assert m == pytest.approx(0.75)
    MomentumTeacher().on_step(run)
    for p, old, new in zip(model.teacher.parameters(), before, model.student.parameters(),
                           strict=True):
        assert torch.allclose(p, m * old + (1 - m) * new, atol=1e-7)
    assert any(not torch.equal(p, old) for p, old in
               zip(model.teacher.parameters(), before, strict=True))


def test_teacher_centre_and_temperature_are_resumed(tmp_path):
    whole, other = runs.method("dino"), runs.method("dino")
    runs.run(whole, steps=6, callbacks=[MomentumTeacher(), Checkpoint(tmp_path, every=3, keep=3)])
    middle = tmp_path / "step-00000003.safetensors"
    kept, _ = read_tensors(middle)
    assert kept["model.center"].abs().max() > 0 and "model.teacher.projector.1.weight" in kept
    assert 0.04 < kept["model.teacher_temperature"] <= 0.06
    other.center.fill_(9.0)
    runs.run(other, steps=6, resume=middle)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_centre_moves_in_training_only(generator):
    model, views = small("dino"), crops(generator)
    joint_embedding_loss(model.eval(), views)
    assert model.center.abs().max() == 0
    joint_embedding_loss(model.train(), views)
    assert model.center.abs().max() > 0


class Fixed(nn.Module):
    """A loss with given signatures."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1))


def alarm_run(metrics: dict, *, alarm: CollapseAlarm, steps: int = 30, odd: int | None = None):
    count = iter(range(1, steps + 1))

    def loss(model, *batch):
        healthy = {"spread": 0.9, "rank": 5.0, "entropy_all": 0.9, "entropy_each": 0.5}
        step = next(count)
        now = healthy if odd is not None and step != odd else {**healthy, **metrics}
        return model.p.sum() ** 2, {key: torch.tensor(float(v)) for key, v in now.items()}

    batches = runs.pictures().batches(12, generator=torch.Generator().manual_seed(0))
    return fit(Fixed(), batches, loss, steps=steps, callbacks=[alarm], log_every=2)


@pytest.mark.parametrize(("metrics", "reason"), [
    ({"spread": 0.05}, "step 16 of 30: spread 0.050 has been below 0.1.*one way"),
    ({"rank": 1.1}, "rank 1.100 has been below 1.3.*line"),
    ({"entropy_all": 0.1}, "entropy_all 0.100.*few prototypes"),
    ({"entropy_each": 0.99}, "entropy_each 0.990 has been above 0.95.*alike")])
def test_alarm_names_step_sign_and_reason(metrics, reason):
    with pytest.raises(CollapseError, match=reason):
        alarm_run(metrics, alarm=CollapseAlarm())


def test_alarm_is_silent_for_health_and_for_one_odd_batch():
    alarm_run({}, alarm=CollapseAlarm())
    alarm_run({"spread": 0.0}, alarm=CollapseAlarm(), odd=20)
    alarm_run({"spread": 0.05}, alarm=CollapseAlarm(limits={"spread": 0.01}))


def test_alarm_can_warn_once_a_sign():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        alarm_run({"spread": 0.0, "rank": 1.0}, alarm=CollapseAlarm(action="warn"))
    messages = [str(w.message) for w in seen if "collapse at step" in str(w.message)]
    assert len(messages) == 2


def test_alarm_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'mail'"):
        CollapseAlarm(action="mail")
    with pytest.raises(ValueError, match="loss"):
        CollapseAlarm(limits={"loss": 1.0})
    with pytest.raises(ValueError, match="patience at least 1.*got 'raise', 0"):
        CollapseAlarm(patience=0)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step():
    model = runs.method("dino")

    def loss(model, views, labels):
        value, metrics = joint_embedding_loss(model, views)
        return value * (math.nan if model.center.abs().max() > 0.0 else 1.0), metrics

    batches = runs.pictures().batches(12, transform=runs.fixed_views)
    with pytest.raises(FloatingPointError, match="step 1 of 5"):
        fit(model, batches, loss, steps=5, callbacks=[MomentumTeacher()])


# --------------------------------------------------------------------------------- two processes


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", runs.NAMES)
def test_two_processes_are_one_with_the_whole_batch(launched, name):
    model = runs.method(name)
    alone = runs.run(model).losses
    assert len(set(alone)) == len(alone)
    for rank in (0, 1):
        seen = json.loads((launched / f"seen-{rank}.json").read_text())
        assert seen["world"] == 2
        assert seen[name] == pytest.approx(alone, rel=1e-4)
        weights, _ = read_tensors(launched / f"{name}-{rank}.safetensors")
        for key, value in model.state_dict().items():  # SGD: equal weights are equal gradients
            assert torch.allclose(weights[key], value, atol=1e-5, rtol=1e-4), key


@pytest.mark.timeout(300)
def test_centre_and_teacher_are_the_same_in_both_processes(launched):
    first, second = (read_tensors(launched / f"dino-{rank}.safetensors")[0] for rank in (0, 1))
    assert first["center"].abs().max() > 0 and "teacher.backbone.conv.weight" in first
    assert all(torch.equal(first[key], second[key]) for key in first)
