"""Fine-tuning: what moves, at which rate, what stays, and what is refused before the first step."""

from __future__ import annotations

import pickle
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vlm_course.appendix.checkpoints import Checkpoint, load_weights, save_weights
from vlm_course.foundations.images import ImageSet, load
from vlm_course.foundations.networks import ResNet, ResNetConfig, ViT, ViTConfig
from vlm_course.foundations.training import (
    Evaluate,
    classification_loss,
    fit,
    parameter_groups,
    predict,
)
from vlm_course.self_supervised.rotation import linear_probe, ridge_classifier
from vlm_course.transfer.finetune import (
    FinetuneConfig,
    FrozenBatchNorm,
    GradualUnfreezing,
    TowardsStart,
    check_task,
    confusion_matrix,
    confusion_table,
    freeze,
    frozen_batchnorm,
    l2_sp,
    layer_groups,
    layerwise_groups,
)
from vlm_course.transfer.pretrained import PretrainedModel, load_pretrained

CLASSES = ["left", "right", "top", "bottom"]


def small_model(*, classes: int = 4) -> PretrainedModel:
    """A ResNet with BatchNorm, three stages, that trains in milliseconds."""
    torch.manual_seed(0)
    body = ResNet(ResNetConfig(depths=(1, 1, 1), widths=(8, 8, 16), stem="small", num_classes=0))
    model = PretrainedModel(body, embed_dim=16, preprocess=nn.Identity(), name="small")
    return model.reset_head(classes, classes=CLASSES[:classes])


def vit_model() -> PretrainedModel:
    torch.manual_seed(0)
    body = ViT(ViTConfig(image_size=8, patch_size=4, dim=12, depth=3, num_heads=3, num_classes=0))
    return PretrainedModel(body, embed_dim=12, preprocess=nn.Identity(), name="vit").reset_head(4)


def bright_sides(count: int = 48) -> ImageSet:
    """Noise with one bright side, which is the label."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 90, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    places = [(slice(None), slice(0, 3)), (slice(None), slice(5, 8)),
              (slice(0, 3), slice(None)), (slice(5, 8), slice(None))]
    for image, label in zip(images, labels.tolist(), strict=True):
        image[(slice(None), *places[label])] += 150
    return ImageSet(images, labels, CLASSES, "sides")


def train(model, *, steps=6, callbacks=(), optimizer=None, seed=0, **options):
    batches = bright_sides().batches(16, generator=torch.Generator().manual_seed(seed))
    optimizer = optimizer or torch.optim.AdamW(layerwise_groups(model, lr=1e-2))
    return fit(model, batches, classification_loss, steps=steps, optimizer=optimizer,
               callbacks=callbacks, precision="fp32", **options)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


# ------------------------------------------------------------------------------ groups and rates


@pytest.mark.parametrize("make", [
    small_model, vit_model, lambda: load_pretrained("timm/vit_tiny_patch16_224", pretrained=False),
    lambda: load_pretrained("torchvision/resnet18", pretrained=False),
    lambda: load_pretrained("efficientnet_lite0", pretrained=False)])
def test_every_parameter_is_in_exactly_one_group(make):
    model = make()
    groups = layer_groups(model)
    listed = [id(p) for group in groups.values() for p in group]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert len(set(listed)) == len(listed)
    assert list(groups)[-1] == "head" and all(groups.values())
    assert [name for name in groups if name in model.stages] == [
        name for name in model.stages if name != "norm"]


def test_the_embedding_of_a_vit_is_its_stem_and_the_last_norm_goes_with_the_last_block():
    model = vit_model()
    groups = layer_groups(model)
    assert {id(model.body.pos_embed), id(model.body.cls_token)} <= {id(p) for p in groups["stem"]}
    assert id(model.body.norm.weight) in {id(p) for p in groups["blocks.2"]}


def test_rates_fall_by_the_factor_and_weight_decay_spares_vectors():
    model = small_model()
    groups = layerwise_groups(model, lr=0.1, decay=0.5, weight_decay=0.3)
    rates = {group["name"]: group["lr"] for group in groups}
    assert list(rates) == list(reversed(layer_groups(model)))
    assert list(rates.values()) == pytest.approx([0.1 * 0.5**d for d in range(len(rates))])
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.3) for p in group["params"])


def test_decay_one_trains_as_plain_adamw(one_thread):
    plain, layered = small_model(), small_model()
    train(plain, optimizer=torch.optim.AdamW(parameter_groups(plain, 0.05), lr=1e-2))
    train(layered, optimizer=torch.optim.AdamW(layerwise_groups(layered, lr=1e-2, decay=1.0)))
    assert not changed(plain, state(layered))


def test_block_rates_are_those_of_timm():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("vit_tiny_patch16_224")
    scale = {id(p): group["lr_scale"] for group in
             param_groups_layer_decay(theirs, layer_decay=0.6) for p in group["params"]}
    model = load_pretrained("timm/vit_tiny_patch16_224", pretrained=False)
    rates = {group["name"]: group["lr"] for group in layerwise_groups(model, lr=1.0, decay=0.6)}
    for i, block in enumerate(theirs.blocks):
        assert rates[f"blocks.{i}"] == pytest.approx(scale[id(block.attn.qkv.weight)])
    assert rates["head"] == scale[id(theirs.head.weight)] == 1.0


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": 0.0}, "lr"), ({"lr": 1.0, "decay": 0.0}, "decay"),
    ({"lr": 1.0, "decay": 1.5}, "decay")])
def test_rates_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layerwise_groups(small_model(), **options)


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        layerwise_groups(freeze(small_model(), keep=0), lr=1.0)


# ------------------------------------------------------------------------- freezing and unfreezing


def test_freeze_keeps_the_last_groups():
    model = small_model()
    names = list(layer_groups(model))
    for keep in range(len(names) + 1):
        freeze(model, keep=keep)
        learning = [name for name, group in layer_groups(model).items()
                    if all(p.requires_grad for p in group)]
        assert learning == names[len(names) - keep:]
    for wrong in (-1, len(names) + 1):
        with pytest.raises(ValueError, match="keep"):
            freeze(model, keep=wrong)


def test_a_probe_leaves_the_body_bit_identical():
    model = freeze(small_model())
    before = state(model)
    train(model, callbacks=[FrozenBatchNorm()])
    assert changed(model, before) == {"head.weight", "head.bias"}


def test_without_frozen_batchnorm_a_probe_moves_the_statistics():
    model = freeze(small_model())
    before = state(model)
    train(model)
    assert any("running_mean" in key for key in changed(model, before))


def test_batchnorm_stays_frozen_through_an_evaluation_in_the_middle():
    model = small_model()
    before = state(model)
    train(model, callbacks=[FrozenBatchNorm(), Evaluate("nothing", lambda m: 0.0, every=2)])
    assert not any("running" in key or "num_batches" in key for key in changed(model, before))
    assert "head.weight" in changed(model, before)
    assert not any(m.training for m in frozen_batchnorm(model.train()).modules()
                   if isinstance(m, nn.BatchNorm2d))


class Watch(GradualUnfreezing):
    """Remembers how many groups are open before each step."""

    def on_start(self, run):
        super().on_start(run)
        self.seen = [self.open]

    def on_step(self, run):
        super().on_step(run)
        self.seen.append(self.open)


def test_gradual_unfreezing_opens_a_group_every_so_many_steps():
    model, watch = small_model(), Watch(every=2)
    count = len(layer_groups(model))
    train(model, steps=12, callbacks=[watch])
    assert watch.seen == [min(1 + step // 2, count) for step in range(13)]
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_not_open_yet_does_not_move():
    model = small_model()
    before = state(model)
    train(model, steps=4, callbacks=[GradualUnfreezing(every=4), FrozenBatchNorm()])
    assert changed(model, before) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("other", [None, TowardsStart])
def test_a_gradual_run_resumes_to_the_same_weights(tmp_path, one_thread, other):
    def callbacks():
        extra = [other(20.0)] if other else []
        return [GradualUnfreezing(every=2), FrozenBatchNorm(), *extra]

    whole, stopped, resumed = small_model(), small_model(), small_model()
    train(whole, steps=7, callbacks=callbacks(), schedule="constant", warmup=0)
    keep = Checkpoint(tmp_path, every=4)

    class Stop(FrozenBatchNorm):
        last = True

        def on_step(self, run):
            if run.step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, steps=7, callbacks=[*callbacks(), keep, Stop()], schedule="constant",
              warmup=0)
    train(resumed, steps=7, callbacks=[*callbacks(), keep], resume=True, schedule="constant",
          warmup=0)
    assert not changed(whole, state(resumed))


def test_gradual_unfreezing_refuses_many_processes_and_no_steps():
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), model=small_model(), step=0)
    with pytest.raises(ValueError, match="got 2 processes"):
        GradualUnfreezing(every=2).on_start(run)
    with pytest.raises(ValueError, match="every"):
        GradualUnfreezing(every=0)


# ------------------------------------------------------------------------------ towards the start


def test_l2_sp_is_half_the_squared_distance_and_pulls_back():
    model = small_model()
    start = {f"body.{key}": p.detach().clone() for key, p in model.body.named_parameters()}
    assert l2_sp(model, start) == 0
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    count = sum(p.numel() for p in model.body.parameters())
    penalty = l2_sp(model, start)
    assert penalty.item() == pytest.approx(0.5 * 0.01 * count, rel=1e-4)
    penalty.backward()
    for p in model.body.parameters():
        assert torch.allclose(p.grad, torch.full_like(p, 0.1), atol=1e-5)
    assert model.head.weight.grad is None


@pytest.mark.parametrize("start", [{}, {"nowhere.weight": torch.zeros(1)},
                                   {"head.bias": torch.zeros(1)}])  # would broadcast
def test_l2_sp_refuses_a_start_of_another_model(start):
    with pytest.raises(ValueError, match="start must hold weights"):
        l2_sp(small_model(), start)


def test_the_strongest_pull_puts_the_body_back_and_leaves_the_head():
    model = small_model()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    adam = torch.optim.AdamW(layerwise_groups(model, lr=1e-2, decay=1.0))
    train(model, optimizer=adam, callbacks=[TowardsStart(100.0)], schedule="constant", warmup=0)
    for key, p in model.named_parameters():
        assert torch.allclose(p, before[key], atol=1e-6) == key.startswith("body")
    with pytest.raises(ValueError, match="at most 1 / lr"):
        train(model, optimizer=adam, callbacks=[TowardsStart(101.0)])
    with pytest.raises(ValueError, match="above 0"):
        TowardsStart(0.0)


def test_a_pull_keeps_the_body_nearer_to_its_start():
    distance = {}
    for strength in (None, 30.0):
        model = small_model()
        start = {key: p.detach().clone() for key, p in model.body.named_parameters()}
        train(model, steps=12, callbacks=[TowardsStart(strength)] if strength else [])
        distance[strength] = l2_sp(model.body, start).item()
    assert distance[30.0] < 0.8 * distance[None]


# ------------------------------------------------------------------------------ the probe, twice


def test_the_closed_form_and_the_gradient_find_one_probe():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    rows = torch.randn(40, 25, generator=generator, dtype=torch.float64) + labels[:, None]
    head = ridge_classifier(rows, labels, ridge=0.1)
    mean, std = rows.mean(0), rows.std(0, correction=0)
    Z, Y = (rows - mean) / std, F.one_hot(labels).double()
    Y = Y - Y.mean(0)
    W = torch.zeros(25, 3, dtype=torch.float64, requires_grad=True)
    step = 0.5 / (torch.linalg.matrix_norm(Z, 2) ** 2 / len(Z) + 0.1)
    for _ in range(3000):
        value = ((Z @ W - Y) ** 2).sum() / len(Z) + 0.1 * (W**2).sum()
        W = (W - step * torch.autograd.grad(value, W)[0]).detach().requires_grad_()
    assert (W.detach() - head.weight.T * std[:, None]).abs().max() < 1e-8


@pytest.mark.parametrize("folds", [1, 2, 3])
def test_pretrained_features_tell_four_categories_whatever_the_folds(four_categories, folds):
    from sklearn.model_selection import StratifiedKFold

    rows, labels = four_categories
    right = 0
    for a, b in StratifiedKFold(5, shuffle=True, random_state=folds).split(rows, labels):
        right += len(b) * linear_probe(rows[a], labels[a], rows[b], labels[b], ridge=0.1)
    assert right / len(rows) >= 0.95


@pytest.fixture(scope="module")
def four_categories() -> tuple[torch.Tensor, torch.Tensor]:
    names = ["animals", "fish", "monuments", "tools"]
    photos = load("photos", size=128, split="all").where(category=names).relabel("category")
    model = load_pretrained("efficientnet_lite0", size=128).reset_head(0)
    return predict(model, photos.batches(64, shuffle=False), precision="fp32")


# ------------------------------------------------------------------------------ confusion matrix


def test_confusion_matrix_equals_scikit_learns():
    from sklearn.metrics import confusion_matrix as peer

    generator = torch.Generator().manual_seed(0)
    truth, said = torch.randint(5, (2, 300), generator=generator)
    ours = confusion_matrix(said, truth, num_classes=6)
    assert np.array_equal(ours.numpy(), peer(truth.numpy(), said.numpy(), labels=range(6)))
    assert confusion_matrix(said[:0], truth[:0], num_classes=2).sum() == 0


@pytest.mark.parametrize(("said", "truth", "message"), [
    ([0, 4], [0, 1], "predictions must be in 0..3; got 0..4"),
    ([0, 1], [0, -1], "labels must be in 0..3; got -1..0"),
    ([0.0, 1.0], [0, 1], "predictions must be numbers of classes.* got torch.float32"),
    ([0, 1], [0, 1, 2], "alike")])
def test_confusion_matrix_refuses_what_is_out_of_range(said, truth, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(said), torch.tensor(truth), num_classes=4)


def test_confusion_table_names_rows_and_columns():
    table = confusion_table(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ["cat", "dog", "emu"])
    lines = table.splitlines()
    assert lines[0].split() == ["cat", "dog", "emu", "found"]
    assert lines[1].split() == ["cat", "3", "1", "0", "75%"]
    assert lines[3].split() == ["emu", "0", "0", "0", "-"]
    assert len({len(line) for line in lines}) == 1
    for names in (["cat", "dog"], []):
        with pytest.raises(ValueError, match=rf"\(3, 3\) and {len(names)} names"):
            confusion_table(torch.zeros(3, 3, dtype=torch.int64), names)


# ------------------------------------------------------------------------------ bad input


def test_a_task_that_cannot_be_learned_is_refused_by_name():
    data, model = bright_sides(), small_model()
    check_task(model, data)
    with pytest.raises(ValueError, match=r"4 logits, one a class; got 3"):
        check_task(small_model(classes=3), data)
    with pytest.raises(ValueError, match="got 0"):
        check_task(small_model().reset_head(0), data)
    with pytest.raises(ValueError, match=r"\['bottom'\] have none"):
        check_task(model, data[data.labels != 3])
    alone = ImageSet(data.images, torch.zeros(len(data)).long(), ["left"])
    with pytest.raises(ValueError, match="at least two classes"):
        check_task(model, alone)


def test_labels_out_of_range_never_become_a_data_set():
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3"):
        ImageSet(bright_sides(4).images, torch.tensor([0, 1, 2, 4]), CLASSES)


def test_weights_of_another_architecture_are_refused_with_the_keys(tmp_path):
    save_weights(small_model(), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"another model: missing .*body\.blocks"):
        load_weights(vit_model(), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"other shapes .*head\.weight \(4, 16\) for \(3, 16\)"):
        load_weights(small_model(classes=3), tmp_path / "small.safetensors")


def test_pictures_of_every_mode_are_learned_from(tmp_path):
    """Grey, with alpha, CMYK, palette, and turned by EXIF: upright RGB when they arrive."""
    tall = np.zeros((16, 8, 3), dtype=np.uint8)
    tall[:8] = 255  # bright above
    for number, (mode, suffix) in enumerate(
            [("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("RGB", "jpg")]):
        for name, array in (("above", tall), ("below", tall[::-1])):
            image, options = Image.fromarray(np.ascontiguousarray(array)), {}
            if mode == "RGB":  # stored lying down; the tag says how to put it up
                exif = Image.Exif()
                exif[0x0112] = 6
                image, options = image.transpose(Image.Transpose.ROTATE_90), {"exif": exif}
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            image.convert(mode).save(folder / f"{number}.{suffix}", **options)
    data = load(tmp_path, size=8)
    assert data.images.shape == (10, 3, 8, 8) and data.classes == ["above", "below"]
    upper = data.images[:, :, :3].float().mean((1, 2, 3))
    assert ((upper > 128) == (data.labels == 0)).all()
    model = small_model(classes=2)
    check_task(model, data)
    fit(model, data.batches(10), classification_loss, steps=15, precision="fp32",
        optimizer=torch.optim.AdamW(layerwise_groups(model, lr=1e-2)),
        callbacks=[FrozenBatchNorm()])
    outputs, truth = predict(model, data.batches(10, shuffle=False), precision="fp32")
    assert (outputs.argmax(1) == truth).all()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_single_picture_and_an_odd_last_batch_are_learned_from(count):
    model, data = small_model(), bright_sides()[:count]
    history = fit(model, data.batches(3, shuffle=False), classification_loss, steps=4,
                  optimizer=torch.optim.AdamW(layerwise_groups(model, lr=1e-2)),
                  callbacks=[FrozenBatchNorm()], precision="fp32")
    assert np.isfinite(history.losses).all() and len(history.losses) == 4


def test_pictures_that_are_not_square_and_those_that_are_all_alike():
    data = bright_sides()
    for images in (data.images[:, :, :, :5], torch.full_like(data.images, 7)):
        model = small_model()
        history = fit(model, ImageSet(images, data.labels, CLASSES).batches(16),
                      classification_loss, steps=3, callbacks=[FrozenBatchNorm()],
                      optimizer=torch.optim.AdamW(layerwise_groups(model, lr=1e-2)),
                      precision="fp32")
        assert np.isfinite(history.losses).all()


def test_half_precision_learns_with_the_callbacks():
    model = small_model()
    before = state(model)
    history = fit(model, bright_sides().batches(16), classification_loss, steps=12,
                  optimizer=torch.optim.AdamW(layerwise_groups(model, lr=1e-2)), precision="bf16",
                  callbacks=[FrozenBatchNorm(), GradualUnfreezing(every=2), TowardsStart(5.0)])
    assert history.losses[-1] < history.losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any("running" in key for key in changed(model, before))


def test_pixels_that_are_no_numbers_stop_before_the_first_step():
    model = load_pretrained("efficientnet_lite0", pretrained=False, size=32).reset_head(4)
    before = state(model)
    broken = bright_sides().batches(4, transform=lambda images, generator: images * torch.nan)
    with pytest.raises(ValueError, match="images must be finite"):
        fit(model, broken, classification_loss, steps=1, precision="fp32",
            optimizer=torch.optim.AdamW(layerwise_groups(model, lr=1e-2)))
    assert not changed(model, before)


# ------------------------------------------------------------------------------ the recipe


def test_the_recipe_has_what_the_command_line_wants():
    from vlm_course.train import Method

    config = FinetuneConfig()
    assert set(Method.__annotations__) <= {field.name for field in fields(config)}
    for name in ("build", "transform", "loss"):
        assert callable(getattr(config, name))
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("options", [
    {"mode": "probe"}, {"mode": "full"}, {"mode": "gradual", "unfreeze_every": 2},
    {"mode": "full", "towards_start": 20.0}, {"mode": "full", "train_batchnorm": True}])
def test_every_mode_learns_and_moves_what_it_says(options):
    config = FinetuneConfig(size=8, batch_size=16, lr=2e-2, scale=(1, 1), **options)
    model = small_model()
    before = state(model)
    history = fit(config.build(model), bright_sides().batches(16, transform=config.transform()),
                  config.loss(), steps=20, optimizer=config.optimizer, callbacks=config.callbacks(),
                  precision="fp32")
    assert history.losses[-1] < history.losses[0]
    moved = changed(model, before)
    assert ("body.conv1.weight" in moved or len(moved) > 10) == (options["mode"] != "probe")
    assert any("running" in key for key in moved) == options.get("train_batchnorm", False)


def test_views_have_the_size_of_the_recipe():
    data = bright_sides()
    config = FinetuneConfig(size=6, batch_size=8)
    images, _ = next(iter(data.batches(8, transform=config.transform())))
    assert images.shape == (8, 3, 6, 6)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="everything"):
        FinetuneConfig(mode="everything").build(small_model())
