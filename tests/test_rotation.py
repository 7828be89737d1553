"""Rotation prediction: the task, its loss, and what the probes promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.networks import ResNet, ResNetConfig, ViT, ViTConfig
from vlm_course.foundations.training import fit
from vlm_course.self_supervised.rotation import (
    layer_features,
    linear_probe,
    nearest_neighbours,
    pool_maps,
    ridge_classifier,
    rotation_accuracy,
    rotation_loss,
    rotation_probabilities,
    rotations,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small_model(channels: int = 3, *, classes: int = 4) -> ResNet:
    torch.manual_seed(0)
    return ResNet(ResNetConfig(depths=(1, 1), widths=(8, 16), stem="small", in_channels=channels,
                               num_classes=classes))


def corner_set(count: int = 64, *, side: int = 8) -> ImageSet:
    """Noise with a bright upper left corner: upright can be learned at once."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 60, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    images[:, :, :3, :3] += 190
    return ImageSet(images, torch.arange(count) % 2, ["even", "odd"], "corners")


# --------------------------------------------------------------------------------- the views


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 5])
def test_views_equal_rot90_of_each_image(generator, channels, count):
    images = torch.rand(count, channels, 6, 6, generator=generator)
    views, turns = rotations(images)
    assert views.shape == (4 * count, channels, 6, 6) and views.dtype == images.dtype
    for k in range(4):
        for i in range(count):
            assert torch.equal(views[k * count + i], torch.rot90(images[i], k, (1, 2)))
            assert turns[k * count + i] == k


def test_first_quarter_turn_is_the_coordinate_map(generator):
    images = torch.rand(1, 1, 5, 5, generator=generator)
    turned = rotations(images)[0][1, 0]
    for i in range(5):
        for j in range(5):
            assert turned[i, j] == images[0, 0, j, 4 - i]


def test_turns_are_the_cyclic_group(generator):
    images = torch.rand(2, 3, 7, 7, generator=generator)
    views = rotations(images)[0].unflatten(0, (4, 2))
    for a in range(4):
        again = rotations(views[a])[0].unflatten(0, (4, 2))
        for b in range(4):
            assert torch.equal(again[b], views[(a + b) % 4])


def test_labels_are_int64_blocks_on_the_images_device(generator):
    _, turns = rotations(torch.rand(3, 1, 4, 4, generator=generator))
    assert turns.dtype == torch.int64
    assert turns.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_images_are_not_changed(generator):
    images = torch.rand(2, 3, 4, 4, generator=generator)
    kept = images.clone()
    rotations(images)[0].zero_()
    assert torch.equal(images, kept)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 6), r"square.*\(2, 3, 8, 6\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "float in .0, 1.*uint8"),
        (torch.rand(3, 8, 8), r"\(B, C, H, W\).*\(3, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), "at least one image"),
    ],
)
def test_wrong_images_are_refused_by_message(images, message):
    with pytest.raises(ValueError, match=message):
        rotations(images)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite_are_refused_and_named(generator, value):
    images = torch.rand(4, 3, 8, 8, generator=generator)
    images[2, 1, 0, 5] = value
    with pytest.raises(ValueError, match=r"finite; images \[2\]"):
        rotations(images)


# ---------------------------------------------------------------------------------- the loss


class Constant(nn.Module):
    """The same logits for every view."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_uniform_logits_cost_log_four(generator):
    images = torch.rand(3, 3, 8, 8, generator=generator)
    loss, metrics = rotation_loss(Constant([0.0] * 4), images)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    assert metrics["rotation_accuracy"].item() == pytest.approx(0.25)


def test_a_model_blind_to_orientation_never_beats_chance(generator):
    images = torch.rand(3, 3, 8, 8, generator=generator)
    for _ in range(20):
        logits = torch.randn(4, generator=generator).tolist()
        assert rotation_loss(Constant(logits), images)[0].item() >= math.log(4) - 1e-6


def test_loss_is_the_mean_negative_log_likelihood(generator):
    images, model = torch.rand(5, 3, 8, 8, generator=generator), small_model().eval()
    loss, metrics = rotation_loss(model, images)
    terms, hits = [], []
    for k in range(4):
        for image in images:
            p = model(torch.rot90(image, k, (1, 2))[None]).softmax(1)[0]
            terms.append(-p[k].log())
            hits.append(float(p.argmax() == k))
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)
    assert metrics["rotation_accuracy"].item() == pytest.approx(np.mean(hits))


def test_gradient_equals_probabilities_minus_labels(generator):
    images = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, dtype=torch.float64))
    views, turns = rotations(images)
    logits = model(views)
    # `rotation_loss` computes the softmax in fp32, hence the tolerance
    rotation_loss(model, images)[0].backward()
    error = (logits.softmax(1) - F.one_hot(turns, 4)) / len(views)
    assert torch.allclose(model[1].weight.grad, error.T @ views.flatten(1), atol=1e-6)


def test_the_images_own_labels_do_not_matter(generator):
    images, model = torch.rand(4, 3, 8, 8, generator=generator), small_model().eval()
    with_labels = rotation_loss(model, images, torch.tensor([3, 1, 0, 2]))[0]
    assert torch.equal(with_labels, rotation_loss(model, images)[0])


def test_a_head_of_another_size_is_named(generator):
    with pytest.raises(ValueError, match=r"4 logits.*\(8, 4\).*\(8, 10\).*reset_classifier"):
        rotation_loss(small_model(classes=10), torch.rand(2, 3, 8, 8, generator=generator))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_step_lowers_the_loss_on_its_batch(generator, channels):
    images, model = torch.rand(8, channels, 8, 8, generator=generator), small_model(channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = rotation_loss(model, images)[0]
    loss.backward()
    optimizer.step()
    assert rotation_loss(model, images)[0].item() < loss.item()


def test_fit_learns_what_is_upright():
    data, model = corner_set(), small_model()
    history = fit(model, data.batches(16), rotation_loss, steps=40, lr=1e-2)
    assert np.mean(history.losses[-5:]) < 0.5 < history.losses[0]
    assert "rotation_accuracy" in history.metrics
    assert rotation_accuracy(model, data.batches(32, shuffle=False)) > 0.9


# --------------------------------------------------------------------------------- beliefs


def test_probabilities_are_laid_out_by_image_then_turns():
    data, model = corner_set(5), small_model().eval()
    believed = rotation_probabilities(model, data.batches(2, shuffle=False), precision="fp32")
    assert believed.shape == (5, 4, 4) and believed.dtype == torch.float32
    assert torch.allclose(believed.sum(2), torch.ones(5, 4), atol=1e-5)
    for n in range(5):
        for k in range(4):
            view = torch.rot90(data.images[n].float() / 255, k, (1, 2))[None]
            assert torch.allclose(believed[n, k], model(view).softmax(1)[0], atol=1e-4)


def test_accuracy_of_a_constant_answer_is_a_quarter():
    model = Constant([0.0, 5.0, 0.0, 0.0])
    assert rotation_accuracy(model, corner_set(7).batches(3, shuffle=False)) == 0.25


# -------------------------------------------------------------------------------- features


def test_layer_features_leave_the_model_bit_identical_and_its_modes_alone():
    model = small_model().train()
    model.layer1.eval()  # a mixed mode must come back as it was
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layer_features(model, corner_set().batches(16, shuffle=False))
    rotation_accuracy(model, corner_set().batches(16, shuffle=False))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_error():
    model = small_model().train()
    with pytest.raises(ValueError, match="images must be"):
        layer_features(model, [(torch.rand(2, 1, 8, 8), None)])
    assert model.training and model.layer1.training


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_layer_features_are_pooled_maps_of_every_image_in_order(pool):
    data, model = corner_set(7), small_model()
    features = layer_features(model, data.batches(3, shuffle=False), pool=pool, precision="fp32")
    maps = model.eval().intermediates(data.images.float() / 255)
    assert list(features) == list(maps) == ["layer1", "layer2"]
    for name, rows in features.items():
        wanted = F.adaptive_avg_pool2d(maps[name], min(pool, maps[name].shape[-1])).flatten(1)
        assert rows.device.type == "cpu" and not rows.requires_grad
        assert torch.allclose(rows, wanted, atol=1e-5)


def test_batch_size_does_not_change_features():
    data, model = corner_set(6), small_model()
    one, all_ = (layer_features(model, data.batches(b, shuffle=False), precision="fp32")
                 for b in (1, 6))
    assert all(torch.allclose(one[name], all_[name], atol=1e-5) for name in one)


def test_a_vision_transformer_is_probed_the_same_way():
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=8, patch_size=4, dim=16, depth=2, num_heads=2, num_classes=4))
    features = layer_features(model, corner_set(5).batches(2, shuffle=False))
    assert len(features) == 2 and all(rows.shape == (5, 16) for rows in features.values())


def test_pool_maps_of_vectors_and_tokens(generator):
    tokens = torch.rand(2, 5, 3, generator=generator)
    assert torch.allclose(pool_maps(tokens), tokens.mean(1))
    assert torch.equal(pool_maps(tokens[:, 0]), tokens[:, 0])


def test_shuffled_batches_and_empty_grids_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match="shuffle=False"):
        layer_features(model, corner_set().batches(16))
    with pytest.raises(ValueError, match="pool must be at least 1; got 0"):
        layer_features(model, corner_set().batches(16, shuffle=False), pool=0)
    with pytest.raises(ValueError, match="at least one image"):
        layer_features(model, [])


# ----------------------------------------------------------------------------------- probes


def three_classes(generator, count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 3
    centres = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]]).repeat(1, 4)
    noise = torch.randn(count, 12, generator=generator)
    scales = torch.logspace(-3, 3, 12)  # columns of very different size: standardising matters
    return (centres[labels] + noise) * scales + 10 * scales, labels


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_ridge_classifier_equals_sklearn(generator, ridge):
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    features, labels = three_classes(generator)
    scaler = StandardScaler().fit(features.double().numpy())
    peer = Ridge(alpha=ridge * len(features)).fit(
        scaler.transform(features.double().numpy()), F.one_hot(labels).double().numpy())
    asked, _ = three_classes(torch.Generator().manual_seed(7))
    ours = ridge_classifier(features, labels, ridge=ridge)(asked.double()).numpy()
    theirs = peer.predict(scaler.transform(asked.double().numpy()))
    assert np.abs(ours - theirs).max() < 1e-8


def test_linear_probe_agrees_with_logistic_regression_and_ridge_classifier(generator):
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = three_classes(generator)
    asked, truth = three_classes(torch.Generator().manual_seed(7))
    ours = linear_probe(features, labels, asked, truth)
    ridge = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1e-2 * len(features)))
    logistic = make_pipeline(StandardScaler(), LogisticRegression())
    A, B = features.double().numpy(), asked.double().numpy()
    assert ours == ridge.fit(A, labels.numpy()).score(B, truth.numpy())
    assert ours == pytest.approx(logistic.fit(A, labels.numpy()).score(B, truth.numpy()), abs=0.05)
    assert ours > 0.9


def test_linear_probe_is_deterministic_and_leaves_its_inputs(generator):
    features, labels = three_classes(generator)
    kept = features.clone()
    results = {linear_probe(features, labels, features, labels) for _ in range(3)}
    assert len(results) == 1 and torch.equal(features, kept)


def test_scaling_a_column_changes_nothing(generator):
    features, labels = three_classes(generator)
    scaled = features * torch.linspace(1, 1000, 12) - 5
    assert linear_probe(features, labels, features, labels) == linear_probe(
        scaled, labels, scaled, labels)


def test_constant_columns_get_weight_zero(generator):
    features, labels = three_classes(generator)
    constant = torch.cat([features, torch.full((300, 1), 0.1), torch.zeros(300, 1)], dim=1)
    head = ridge_classifier(constant, labels)
    assert (head.weight[:, 12:] == 0).all() and head.weight.isfinite().all()
    moved = constant.clone()
    moved[:, 12:] += 100  # what was constant in training cannot mislead in the test
    assert linear_probe(constant, labels, moved, labels) == linear_probe(
        features, labels, features, labels)


def test_all_columns_constant_answers_the_largest_class():
    labels = torch.tensor([0, 1, 1, 1])
    assert linear_probe(torch.ones(4, 3), labels, torch.ones(4, 3), labels) == 0.75


def test_more_columns_than_rows_has_a_solution(generator):
    features = torch.randn(6, 50, generator=generator)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    assert linear_probe(features, labels, features, labels) == 1.0


def test_a_class_that_training_never_saw_counts_as_an_error(generator):
    features, labels = three_classes(generator)
    seen = linear_probe(features, labels, features, labels)
    strange = labels.clone()
    strange[:30] = 7
    assert linear_probe(features, labels, features, strange) <= min(seen, 0.9)


@pytest.mark.parametrize("name", ["train", "test"])
def test_features_that_are_not_finite_are_named(generator, name):
    features, labels = three_classes(generator)
    broken = features.clone()
    broken[3, 2] = math.nan
    pair = (broken, features) if name == "train" else (features, broken)
    with pytest.raises(ValueError, match=f"{name}_features must be finite.*1 rows"):
        linear_probe(pair[0], labels, pair[1], labels)


def test_probes_name_what_does_not_fit(generator):
    features, labels = three_classes(generator)
    with pytest.raises(ValueError, match="two classes; got only class 2 in 300 rows"):
        linear_probe(features, torch.full((300,), 2), features, labels)
    with pytest.raises(ValueError, match=r"train_labels \(N,\); got \(300, 12\) and \(299,\)"):
        linear_probe(features, labels[1:], features, labels)
    with pytest.raises(ValueError, match="12 columns.*got 11"):
        linear_probe(features, labels, features[:, 1:], labels)
    with pytest.raises(ValueError, match="ridge must be positive.*got 0"):
        linear_probe(features, labels, features, labels, ridge=0)
    with pytest.raises(ValueError, match="at least one row"):
        linear_probe(features[:0], labels[:0], features, labels)


# ------------------------------------------------------------------------------ neighbours


def test_nearest_neighbours_equal_a_loop_over_cosines(generator):
    queries, bank = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    bank = bank * torch.tensor([1.0, 100, 0.01, 5])
    found = nearest_neighbours(queries, bank, k=3)
    mean, std = bank.mean(0), bank.std(0, correction=0)
    for i, query in enumerate(queries):
        cosines = [F.cosine_similarity((query - mean) / std, (row - mean) / std, dim=0).item()
                   for row in bank]
        assert found[i].tolist() == sorted(range(9), key=lambda j: -cosines[j])[:3]


def test_every_row_is_its_own_nearest_neighbour(generator):
    bank = torch.randn(20, 6, generator=generator)
    assert torch.equal(nearest_neighbours(bank, bank)[:, 0], torch.arange(20))


def test_neighbours_name_what_does_not_fit(generator):
    bank = torch.randn(4, 3, generator=generator)
    with pytest.raises(ValueError, match=r"one D; got \(4, 2\) and \(4, 3\)"):
        nearest_neighbours(bank[:, :2], bank)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        nearest_neighbours(bank, bank, k=5)
