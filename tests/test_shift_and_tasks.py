"""Shift and tasks: adapted statistics, domain classifiers, several heads and their balance."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.networks import ResNet, ResNetConfig, ViT, ViTConfig
from vlm_course.foundations.training import fit
from vlm_course.transfer.shift_and_tasks import (
    FixedWeights,
    GradNorm,
    MultiTask,
    Task,
    UncertaintyWeights,
    adapt_batchnorm,
    average_precision,
    logistic_classifier,
    multitask_groups,
    multitask_loss,
    numbered,
    process_mean,
    proxy_distance,
    task_gradients,
    task_scores,
)

sys.path.insert(0, str(Path(__file__).parent))
import shift_and_tasks_runs as runs  # noqa: E402


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(channels: int = 3) -> ResNet:
    torch.manual_seed(0)
    config = ResNetConfig(depths=(1, 1), widths=(8, 16), stem="small", num_classes=3,
                          in_channels=channels)
    return ResNet(config)


@pytest.fixture
def data() -> ImageSet:
    images = torch.randint(256, (96, 3, 12, 12), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(96) % 3
    images[labels == 1, 0] //= 4
    images[labels == 2, 1] //= 4
    return ImageSet(images, labels, ["a", "b", "c"], "toy")


@pytest.fixture
def tasks(data) -> list[Task]:
    tags = torch.stack([data.labels == 1, data.labels != 0], dim=1).float()
    return [Task("kind", data.labels, data.classes), Task("tags", tags, ["one", "not zero"])]


# ------------------------------------------------------------------------------ adapted BatchNorm


def test_adapted_statistics_equal_torchs_update_bn(data):
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    batches = data.batches(24, shuffle=False)
    ours = adapt_batchnorm(model, batches, precision="fp32")
    theirs = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn([images for images, _ in batches], theirs)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].float(), value.float(), atol=1e-6), name
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not ours.training and all(module.momentum == 0.1 for module in ours.modules()
                                     if isinstance(module, nn.BatchNorm2d))
    parameters = zip(ours.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


def test_an_affine_change_of_every_channel_is_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    x = torch.randn(32, 4, 9, 9, generator=generator())
    a, b = torch.tensor([0.5, 2.0, 3.0, 1.0]), torch.tensor([1.0, -2.0, 0.0, 5.0])
    moved = x * a.view(1, 4, 1, 1) + b.view(1, 4, 1, 1)
    with torch.no_grad():
        first, second = (adapt_batchnorm(model, [(y,)], precision="fp32")(y) for y in (x, moved))
        assert (first - second).abs().max() < 1e-3
        assert (model.eval()(moved) - model(x)).abs().max() > 0.5


def test_the_prior_mixes_old_and_new_statistics(data):
    model, batches = network().eval(), data.batches(96, shuffle=False)
    new = adapt_batchnorm(model, batches, precision="fp32")
    mixed = adapt_batchnorm(model, batches, prior=32, precision="fp32")
    for (name, old), value in zip(model.named_buffers(), mixed.buffers(), strict=True):
        if "running" in name:
            wanted = (32 * old + 96 * new.get_buffer(name)) / 128
            assert torch.allclose(value, wanted, atol=1e-6), name


def test_adapting_refuses_what_it_cannot_do(data):
    batches = data.batches(32)
    with pytest.raises(ValueError, match="0 layers"):
        adapt_batchnorm(nn.Conv2d(3, 3, 1), batches)
    with pytest.raises(ValueError, match="0 layers"):
        adapt_batchnorm(nn.BatchNorm2d(3, track_running_stats=False), batches)
    with pytest.raises(ValueError, match="at least one picture"):
        adapt_batchnorm(network(), [])
    for prior in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="prior"):
            adapt_batchnorm(network(), batches, prior=prior)
    images = data.images[:8].float() / 255
    images[3, 0, 5, 5] = torch.nan
    for prior in (0.0, 100.0):
        with pytest.raises(ValueError, match="images in batches must be finite"):
            adapt_batchnorm(network(), [(images,)], prior=prior)


def test_one_picture_an_odd_batch_any_shape_and_equal_pictures_are_adapted_to(data):
    images = torch.rand(5, 3, 9, 14, generator=generator())
    for batches in ([(images[:1],)], [(images[:4],), (images[4:],)], [(images[:1] * 0,)] * 2):
        adapted = adapt_batchnorm(network(), batches, prior=2.0)
        assert adapted(images).isfinite().all()
    half = adapt_batchnorm(network().bfloat16(), [(images.bfloat16(),)], precision="fp32")
    assert half.bn1.running_mean.dtype == torch.bfloat16


# ------------------------------------------------------------------------------ domain classifiers


def test_logistic_classifier_equals_sklearn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = torch.randn(200, 6, generator=generator()) * torch.tensor([1, 5, 0.1, 1, 1, 1]) + 3
    y = (x[:, 0] + 0.2 * x[:, 1]).argsort().argsort() * 3 // 200
    ours = logistic_classifier(x, y, penalty=0.05, steps=300)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    theirs = linear_model.LogisticRegression(C=1 / (0.05 * 200), max_iter=1000, tol=1e-8)
    theirs.fit(z, y.numpy())
    assert np.abs(ours(x).softmax(1).numpy() - theirs.predict_proba(z)).max() < 1e-3


def test_logistic_classifier_refuses():
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    with pytest.raises(ValueError, match="two classes"):
        logistic_classifier(x, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="penalty"):
        logistic_classifier(x, y, penalty=0)
    with pytest.raises(ValueError, match="finite"):
        logistic_classifier(torch.full((10, 3), torch.nan), y)
    with pytest.raises(ValueError, match=r"\(10, 3\) and \(9,\)"):
        logistic_classifier(x, y[:9])
    with pytest.raises(ValueError, match=r"none below 0.*\[-1, 0\]"):
        logistic_classifier(x, y - 1)


def test_proxy_distance_is_two_apart_and_nothing_together():
    rows = [torch.randn(n, 4, generator=generator(i)) for i, n in enumerate((900, 300, 400, 400))]
    assert abs(proxy_distance(*rows)) < 0.25  # one domain; and three times as many of the first
    assert proxy_distance(rows[0], rows[1] + 9, rows[2], rows[3] + 9) > 1.95


@pytest.mark.parametrize("change", [lambda x: x[:, :2], lambda x: x[:0], lambda x: x[0],
                                    lambda x: x / torch.tensor([1.0, 0.0, 1.0])])
@pytest.mark.parametrize("place", range(4))
def test_proxy_distance_refuses(change, place):
    rows = [torch.randn(8, 3, generator=generator(i)) for i in range(4)]
    rows[place] = change(rows[place])
    with pytest.raises(ValueError, match="source_new and target_new must be .N, D., finite"):
        proxy_distance(*rows)


# ------------------------------------------------------------------------------ tasks and heads


@pytest.mark.parametrize(
    ("targets", "classes", "message"),
    [
        (torch.tensor([0, 1, 3]), "abc", r"0\.\.2; got 0\.\.3"),
        (torch.tensor([0, -1, 2]), "abc", r"got -1"),
        (torch.tensor([0, 1, 1]), "abc", r"no picture of \['c'\]"),
        (torch.tensor([0, 0, 0]), "a", "two classes"),
        (torch.tensor([[0.0, 2.0]]), "ab", r"0\.\.1"),
        (torch.tensor([[1.0, 1.0], [0.0, torch.nan]]), "ab", r"0\.\.1; got nan"),
        (torch.tensor([[0.0, 1.0]]), "ab", r"no picture of \['a'\]"),
        (torch.tensor([[0.0, 1.0]]), "abc", r"\(N, 3\)"),
        (torch.tensor([0.0, 1.0]), "ab", "int64"),
        (torch.empty(0, dtype=torch.int64), "ab", "N > 0"),
    ],
)
def test_a_task_refuses_targets_that_do_not_fit(targets, classes, message):
    with pytest.raises(ValueError, match=message):
        Task("odd", targets, list(classes))


def test_average_precision_equals_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores = torch.randn(80, 5, generator=generator())
    targets = (torch.rand(80, 5, generator=generator(1)) < 0.3).float()
    wanted = [metrics.average_precision_score(targets[:, k], scores[:, k]) for k in range(5)]
    assert np.allclose(average_precision(scores, targets).numpy(), wanted)
    with pytest.raises(ValueError, match="a 1 in each column"):
        average_precision(scores, torch.zeros(80, 5))
    with pytest.raises(ValueError, match="no score nan"):
        average_precision(scores.log(), targets)


def test_loss_is_the_sum_of_the_tasks_losses(data, tasks):
    model = MultiTask(network(), tasks).eval()
    rows = torch.tensor([5, 0, 17])
    images = data.images[rows].float() / 255
    total, parts = multitask_loss(tasks)(model, images, rows)
    features = model.backbone(images)
    kind = F.cross_entropy(model.heads["kind"](features), data.labels[rows])
    tags = F.binary_cross_entropy_with_logits(model.heads["tags"](features), tasks[1].targets[rows])
    assert torch.allclose(total, kind + tags) and torch.allclose(parts["tags"], tags)
    assert parts["weight of kind"] == 1
    assert model(images).shape == (3, 5) and model.split(model(images))["tags"].shape == (3, 2)


def test_heads_and_tasks_that_do_not_fit_are_named(data, tasks):
    with pytest.raises(ValueError, match="different names"):
        MultiTask(network(), [tasks[0], tasks[0]])
    with pytest.raises(ValueError, match="different names"):
        MultiTask(network(), [])
    model = MultiTask(network(), tasks)
    other = Task("kind", data.labels, ["a", "b", "c"])
    wide = Task("tags", torch.ones(96, 4), list("wxyz"))
    with pytest.raises(ValueError, match="'tags' must be .*4.*got"):
        multitask_loss([other, wide])(model, data.images[:2].float() / 255, torch.arange(2))
    with pytest.raises(ValueError, match=r"one row a picture, 10; \['kind', 'tags'\]"):
        task_scores(model, data[:10], tasks)
    with pytest.raises(ValueError, match=r"a head each.*\['mood'\]"):
        task_scores(model, data, [tasks[0], Task("mood", data.labels, data.classes)])
    for given in (tasks[:1], tasks[::-1]):
        with pytest.raises(ValueError, match=r"heads, \['kind', 'tags'\]; got"):
            multitask_loss(given)(model, data.images[:2].float() / 255, torch.arange(2))
    for balance in (FixedWeights([1.0]), UncertaintyWeights(3), GradNorm(1)):
        with pytest.raises(ValueError, match="balance must have 2 weights, one a task; got"):
            MultiTask(network(), tasks, balance=balance)


def test_shared_is_the_last_matrix_that_pictures_meet(tasks):
    vit = ViT(ViTConfig(image_size=12, patch_size=4, dim=32, depth=2, num_heads=2, num_classes=7))
    assert MultiTask(vit, tasks).shared is vit.blocks[1].mlp.fc2.weight
    resnet = network()
    assert MultiTask(resnet, tasks).shared is resnet.layer2[0].conv2.weight


def test_one_picture_and_shapes_that_are_not_square(data, tasks):
    model, loss = MultiTask(network(), tasks, balance=UncertaintyWeights(2)), multitask_loss(tasks)
    total, _ = loss(model.train(), torch.rand(1, 3, 9, 14), torch.tensor([95]))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_learns_both_tasks_and_any_backbone_serves(data, tasks):
    config = ViTConfig(image_size=12, patch_size=4, dim=32, depth=1, num_heads=2, num_classes=7)
    for backbone, steps in ((network(), 60), (ViT(config), 2)):
        model = MultiTask(backbone, tasks)
        optimizer = torch.optim.AdamW(multitask_groups(model, lr=1e-2))
        history = fit(model, numbered(data).batches(32), multitask_loss(tasks), steps=steps,
                      optimizer=optimizer)
        assert {"kind", "tags", "weight of tags"} <= set(history.metrics)
        if steps == 60:
            assert min(task_scores(model, data, tasks).values()) > 0.9
    grey = MultiTask(network(channels=1), tasks)
    with pytest.raises(ValueError, match="1, H, W"):
        grey(data.images[:2].float() / 255)


# ------------------------------------------------------------------------------ balancing


def losses_of(model: MultiTask, data: ImageSet, tasks: list[Task]) -> torch.Tensor:
    logits = model.split(model(data.images.float() / 255))
    return torch.stack([task.loss(logits[task.name], torch.arange(len(data))) for task in tasks])


def test_task_gradients_equal_backward(data, tasks):
    model = MultiTask(network(), tasks)
    losses, parameters = losses_of(model, data, tasks), list(model.backbone.parameters())
    rows = task_gradients(losses, parameters)
    losses.sum().backward()
    assert torch.allclose(rows.sum(0), torch.cat([p.grad.flatten() for p in parameters]), atol=1e-5)
    head = list(model.heads["tags"].parameters())
    assert (task_gradients(losses_of(model, data, tasks), head)[0] == 0).all()  # not its own


def test_uncertainty_divides_a_loss_by_itself():
    losses = torch.tensor([3.0, 0.01])
    balance = UncertaintyWeights(2).eval()  # no start from the first batch
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        balance(losses, None).backward()
        optimizer.step()
    assert torch.allclose(balance.weights, 0.5 / losses, rtol=0.02)
    fresh = UncertaintyWeights(2)
    fresh(losses, None)
    assert torch.allclose(fresh.weights, 0.5 / losses) and fresh.started
    fresh(10 * losses, None)  # once is enough
    assert torch.allclose(fresh.weights, 0.5 / losses)


@pytest.mark.parametrize("balance", [UncertaintyWeights, GradNorm])
def test_a_balanced_run_does_not_depend_on_the_unit_of_a_loss(data, tasks, balance):
    curves = []
    for unit in (1.0, 64.0):
        model = MultiTask(network(), tasks, balance=balance(2)).train()
        optimizer = torch.optim.SGD(multitask_groups(model, lr=0.01, balance_lr=0.01))
        history = []
        for _ in range(5):
            losses = losses_of(model, data, tasks)
            optimizer.zero_grad()
            model.balance(losses * torch.tensor([1.0, unit]), model.shared).backward()
            optimizer.step()
            history.append(losses.detach())
            if balance is GradNorm:  # its weights have a fixed sum: compare their ratio
                optimizer.param_groups[-1]["lr"] = 0.0
        curves.append((torch.stack(history), model.balance.weights.detach()))
    ratio = [w[0] / w[1] for _, w in curves]
    assert abs(ratio[1] / ratio[0] / 64 - 1) < 0.05
    if balance is UncertaintyWeights:
        assert torch.allclose(curves[0][0], curves[1][0], rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_equals_differentiating_the_norms(data, tasks, alpha):
    model = MultiTask(network(), tasks, balance=GradNorm(2, alpha=alpha)).train()
    with torch.no_grad():
        model.balance.log_weights.copy_(torch.tensor([1.6, 0.4]).log())
        model.balance.initial.copy_(torch.tensor([2.0, 0.7]))
    losses = losses_of(model, data, tasks)
    total = model.balance(losses, model.shared)
    assert torch.allclose(total, (torch.tensor([1.6, 0.4]) * losses).sum())
    total.backward(retain_graph=True)
    theta = torch.tensor([1.6, 0.4]).log().requires_grad_()
    w = 2 * theta.softmax(0)
    pulls = torch.stack([
        torch.autograd.grad(weight * loss, model.shared, create_graph=True)[0].norm()
        for weight, loss in zip(w, losses, strict=True)])
    rate = (losses / model.balance.initial).detach()
    wanted = (pulls.mean() * (rate / rate.mean()) ** alpha).detach()
    theirs, = torch.autograd.grad((pulls - wanted).abs().sum(), theta)
    assert torch.allclose(model.balance.log_weights.grad, theirs, rtol=1e-4, atol=1e-6)
    network_grad = model.backbone.conv1.weight.grad.clone()  # the balance term moves weights alone
    model.zero_grad()
    (torch.tensor([1.6, 0.4]) * losses_of(model, data, tasks)).sum().backward()
    assert torch.allclose(network_grad, model.backbone.conv1.weight.grad, atol=1e-5)


def test_gradnorm_equalises_pulls_and_keeps_the_sum(data, tasks):
    model = MultiTask(network(), tasks, balance=GradNorm(2, alpha=0.0)).train()
    units = torch.tensor([1.0, 30.0])
    first = units * losses_of(model, data, tasks)
    model.balance(first, model.shared)
    pulls = task_gradients(first, [model.shared]).norm(dim=1) * model.balance.weights
    assert torch.allclose(pulls[0], pulls[1], rtol=1e-3)  # from the first batch on
    with torch.no_grad():
        model.balance.log_weights.zero_()
    optimizer = torch.optim.Adam(model.balance.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        model.balance(units * losses_of(model, data, tasks), model.shared).backward()
        optimizer.step()
    losses = units * losses_of(model, data, tasks)
    pulls = task_gradients(losses, [model.shared]).norm(dim=1) * model.balance.weights
    assert 0.6 < (pulls[0] / pulls[1]).item() < 1.6
    assert abs(model.balance.weights.sum().item() - 2) < 1e-5
    model.eval()
    before = copy.deepcopy(model.state_dict())
    model.balance(losses, model.shared)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_parameter_is_in_one_group(data, tasks):
    for balance in (FixedWeights([1.0, 1.0]), UncertaintyWeights(2), GradNorm(2)):
        model = MultiTask(network(), tasks, balance=balance)
        groups = multitask_groups(model, lr=1e-3, balance_lr=0.5)
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
        assert (groups[-1]["lr"] == 0.5) == (not isinstance(balance, FixedWeights))


# ------------------------------------------------------------------------------ two processes


def seen(folder: Path, kind: str) -> list[dict]:
    return [json.loads((folder / f"seen-{rank}.json").read_text())[kind] for rank in (0, 1)]


@pytest.mark.parametrize("started", ["step", "first"])
@pytest.mark.parametrize("kind", runs.KINDS)
def test_two_processes_have_the_loss_and_gradient_of_one_with_the_whole_batch(
        launched, kind, started):
    alone = runs.step(kind, runs.ROWS, started=started == "step")
    pair = [found[started] for found in seen(launched, kind)]
    assert abs(pair[0]["parts"][0] - pair[1]["parts"][0]) > 0.3  # their data differ
    for found in pair:  # a balance is the same everywhere, whatever its share of the batch
        assert found["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    mean = {key: np.mean([found[key] for found in pair], axis=0) for key in ("loss", "gradient")}
    assert mean["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    gradient, wanted = torch.tensor(mean["gradient"]), torch.tensor(alone["gradient"]).double()
    if (kind, started) == ("gradnorm", "first"):  # all pull alike: the sign of their difference
        gradient, wanted = gradient[:-2], wanted[:-2]  # is a coin, and the balance comes last
    elif started == "step" and kind != "sum":  # the balance has a gradient of its own
        assert wanted[-2:].abs().min() > 1e-3
    assert torch.allclose(gradient, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", runs.KINDS)
def test_training_on_two_processes_equals_training_on_one(launched, kind):
    model, alone = runs.trained(kind)
    weights = load_file(launched / f"{kind}-0.safetensors")
    other = load_file(launched / f"{kind}-1.safetensors")
    for found in seen(launched, kind):
        for name, values in alone.items():
            assert found["trained"][name] == pytest.approx(values, abs=1e-4), name
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], other[name]), name
        assert torch.allclose(weights[name].float(), value.float(), atol=1e-4), name


def test_the_mean_over_one_process_is_the_value_without_its_gradient():
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(process_mean(value), value) and not process_mean(value).requires_grad
