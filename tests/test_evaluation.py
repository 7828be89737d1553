"""Evaluation: votes against peers, bad input, frozen backbones, statistics, and the table."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.networks import ResNet, ResNetConfig, ViT, ViTConfig
from vlm_course.self_supervised.evaluation import (
    bootstrap_interval,
    draw_labels,
    effective_rank,
    evaluate_features,
    few_label_curve,
    frozen_features,
    knn_accuracy,
    knn_probabilities,
    mcnemar_test,
    wilson_interval,
)
from vlm_course.self_supervised.masked import MAE, MAEConfig
from vlm_course.self_supervised.without_negatives import participation_ratio

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def space(generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bank of 120 rows, its labels in 6 classes, and 40 queries."""
    bank, queries = (torch.randn(n, 16, generator=generator) for n in (120, 40))
    return bank, torch.randint(6, (120,), generator=generator), queries


def pictures(count: int = 24, size: int = 16) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator)
    return ImageSet(images.to(torch.uint8), torch.arange(count) % 3, ["a", "b", "c"], "noise")


# ------------------------------------------------------------------------------- votes


@pytest.mark.parametrize("k", [1, 5, 120])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_votes_rank_as_lightly(space, k, temperature):
    peer = pytest.importorskip("lightly.utils.benchmarking")
    bank, labels, queries = space
    ours = knn_probabilities(queries, bank, labels, k=k, temperature=temperature, num_classes=6)
    theirs = peer.knn_predict(F.normalize(queries, dim=1), F.normalize(bank, dim=1).T, labels, 6,
                              k, temperature)  # classes, best first
    assert torch.equal(ours.argmax(1), theirs[:, 0])
    ranked = ours.gather(1, theirs)
    assert (ranked.diff(dim=1) <= 1e-6).all()  # the peer's order is an order of ours
    assert torch.allclose(ours.sum(1), torch.ones(40))


def test_votes_equal_sklearn(space):
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels, queries = space
    unit = [F.normalize(rows, dim=1).numpy() for rows in (bank, queries)]
    peer = neighbors.KNeighborsClassifier(  # distance d of unit vectors: cosine = 1 - d * d / 2
        9, weights=lambda d: np.exp((1 - d**2 / 2) / 0.1)).fit(unit[0], labels)
    theirs = torch.from_numpy(peer.predict_proba(unit[1])).float()
    assert torch.allclose(knn_probabilities(queries, bank, labels, k=9), theirs, atol=1e-5)


def test_votes_do_not_depend_on_chunks_scale_or_order(space, generator):
    bank, labels, queries = space
    whole = knn_probabilities(queries, bank, labels, k=10)
    for chunk in (1, 7, 40, 1000):
        part = knn_probabilities(queries, bank, labels, k=10, chunk=chunk)
        assert torch.allclose(whole, part, atol=1e-6)
    order = torch.randperm(120, generator=generator)
    shuffled = knn_probabilities(3 * queries, 100 * bank[order], labels[order], k=10)
    assert torch.allclose(whole, shuffled, atol=1e-5)


def test_chunks_bound_the_memory(space):
    bank, labels, queries = space
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(tuple(out.shape))
            return out

    with Watch():
        knn_probabilities(queries, bank, labels, k=3, chunk=8)
    assert (8, 120) in sizes and (40, 120) not in sizes


def test_limits_of_the_temperature(space):
    bank, labels, queries = space
    cold = knn_probabilities(queries, bank, labels, k=20, temperature=1e-5)
    assert cold.isfinite().all()
    nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(1)
    assert torch.equal(cold.argmax(1), labels[nearest])
    hot = knn_probabilities(queries, bank, labels, k=120, temperature=1e5)
    assert torch.allclose(hot, (torch.bincount(labels) / 120).expand(40, -1), atol=1e-4)


def test_zero_rows_and_half_precision(space):
    bank, labels, queries = space
    shares = knn_probabilities(torch.zeros(1, 16), bank, labels, k=120)
    assert torch.allclose(shares[0], torch.bincount(labels) / 120, atol=1e-6)
    half = knn_probabilities(queries.bfloat16(), bank.bfloat16(), labels, k=10)
    full = knn_probabilities(queries.bfloat16().float(), bank.bfloat16().float(), labels, k=10)
    assert half.dtype == torch.float32 and torch.allclose(half, full, atol=1e-6)


@pytest.mark.parametrize(("change", "words"), [
    (dict(k=0), "k must be in 1..120"), (dict(k=121), "121"),
    (dict(temperature=0.0), "temperature"),
    (dict(chunk=0), "chunk"), (dict(queries=torch.rand(3, 5)), "16 columns"),
    (dict(queries=torch.rand(16)), r"queries must be \(N, D\)"),
    (dict(queries=torch.full((1, 16), math.nan)), r"queries must be finite; rows \[0\]"),
    (dict(bank=torch.zeros(0, 16)), "N > 0"),
    (dict(bank=torch.ones(120, 16, dtype=torch.int64)), "float"),
    (dict(labels=torch.zeros(5, dtype=torch.int64)), r"\(120,\)"),
    (dict(labels=torch.zeros(120)), "int64.*float32"),
    (dict(labels=torch.zeros(120, dtype=torch.int32)), "int64.*int32"),
    (dict(labels=torch.full((120,), -1)), "labels of bank must be in 0..C-1; got -1"),
    (dict(labels=torch.full((120,), 6), num_classes=6), "num_classes must be above .* 6; got 6"),
    (dict(num_classes=0), "num_classes must be above"),
])
def test_what_votes_refuse(space, change, words):
    bank, labels, queries = space
    with pytest.raises(ValueError, match=words):
        knn_probabilities(**{"queries": queries, "bank": bank, "labels": labels, "k": 5} | change)


def test_one_query_is_a_batch_of_one(space):
    bank, labels, queries = space
    one, all_ = (knn_probabilities(q, bank, labels, k=9, num_classes=6)
                 for q in (queries[:1], queries))
    assert one.shape == (1, 6) and torch.allclose(one[0], all_[0], atol=1e-6)


# ------------------------------------------------------------------------------- few labels


def test_draws_are_balanced_disjoint_and_repeatable():
    labels = torch.tensor([0] * 10 + [2] * 5 + [7] * 8)
    rows = draw_labels(labels, 5, generator=torch.Generator().manual_seed(0))
    assert len(rows.unique()) == 15 and torch.bincount(labels[rows])[[0, 2, 7]].tolist() == [5] * 3
    assert torch.equal(rows, draw_labels(labels, 5, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(rows, draw_labels(labels, 5, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match=r"per_class must be in 1\.\.5, .*class 2; got 6"):
        draw_labels(labels, 6, generator=torch.Generator())
    for wrong in (labels[:0], labels.float(), labels[None]):
        with pytest.raises(ValueError, match=r"labels must be \(N,\) int64 with N > 0; got"):
            draw_labels(wrong, 1, generator=torch.Generator())
    with pytest.raises(ValueError, match="draws must be at least 1; got 0"):
        few_label_curve(torch.rand(23, 2), labels, torch.rand(23, 2), labels, draws=0)


def test_more_labels_help_and_curves_are_paired(generator):
    labels = torch.arange(300) % 3
    features = torch.randn(300, 8, generator=generator) + 1.5 * F.one_hot(labels, 8)
    curve = few_label_curve(features, labels, features, labels, counts=(1, 20), draws=4)
    assert curve[20].mean() > curve[1].mean() + 0.1 and curve[1].shape == (4,)
    again = few_label_curve(features, labels, features, labels, counts=(1, 20), draws=4)
    other = few_label_curve(features, labels, features, labels, counts=(1, 20), draws=4, seed=1)
    assert torch.equal(curve[1], again[1]) and not torch.equal(curve[1], other[1])


# ------------------------------------------------------------------------------- rank


def test_rank_of_equal_singular_values_and_the_published_form(generator):
    directions = torch.linalg.qr(torch.randn(50, 7, generator=generator, dtype=torch.float64))[0]
    assert abs(effective_rank(directions, center=False) - 7) < 1e-6
    z = torch.randn(60, 12, generator=generator)
    p = torch.linalg.svdvals(z.double())
    p = p / p.sum()
    assert abs(effective_rank(z, center=False) - torch.exp(-(p * p.log()).sum())) < 1e-9
    assert abs(effective_rank(z) - effective_rank(100 * z + 5)) < 1e-3
    assert effective_rank(z) > participation_ratio(z).item()


def test_rank_at_its_ends():
    assert effective_rank(torch.ones(10, 4)) == effective_rank(torch.rand(1, 4)) == 0.0
    assert abs(effective_rank(torch.eye(8).bfloat16(), center=False) - 8) < 1e-6
    assert abs(effective_rank(torch.arange(10.0)[:, None] * torch.ones(4)) - 1) < 1e-5
    with pytest.raises(ValueError, match="finite"):
        effective_rank(torch.tensor([[1.0, math.inf]]))


# ------------------------------------------------------------------------------- statistics


def test_wilson_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for correct, total in ((0, 10), (10, 10), (3, 10), (371, 1484)):
        for confidence in (0.9, 0.95):
            theirs = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
            assert wilson_interval(correct, total, confidence=confidence) == pytest.approx(
                (theirs.low, theirs.high), abs=1e-9)
    with pytest.raises(ValueError, match="correct must be in 0..total"):
        wilson_interval(11, 10)


def test_mcnemar_equals_scipy(generator):
    stats = pytest.importorskip("scipy.stats")
    for rate in (0.5, 0.6, 0.9):
        a, b = (torch.rand(200, generator=generator) < p for p in (rate, 0.5))
        only = int((a & ~b).sum()), int((~a & b).sum())
        assert mcnemar_test(a, b) == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
        assert mcnemar_test(a, b) == mcnemar_test(b, a)
    assert mcnemar_test(a, a) == 1.0
    with pytest.raises(ValueError, match="bool"):
        mcnemar_test(a, b.float())


def test_bootstrap_of_single_items_and_of_groups(generator):
    right = torch.rand(400, generator=generator) < 0.7
    low, high = bootstrap_interval(right)
    assert low < right.double().mean() < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 400), rel=0.12)
    four = right.repeat_interleave(4)  # every item four times: no more is known than before
    names = [str(i // 4) for i in range(1600)]
    grouped, naive = bootstrap_interval(four, groups=names), bootstrap_interval(four)
    assert grouped == pytest.approx((low, high), abs=1e-9)
    assert naive[1] - naive[0] == pytest.approx((high - low) / 2, rel=0.12)
    with pytest.raises(ValueError, match="groups as long"):
        bootstrap_interval(right, groups=["a"])
    for wrong in (dict(values=torch.tensor([0.0, math.nan])), dict(confidence=1.0),
                  dict(repeats=0)):
        with pytest.raises(ValueError, match="values must be finite, confidence in .* got"):
            bootstrap_interval(**{"values": right} | wrong)


def test_bootstrap_equals_scipy(generator):
    stats = pytest.importorskip("scipy.stats")
    right = torch.rand(300, generator=generator) < 0.8
    theirs = stats.bootstrap((right.double().numpy(),), np.mean, method="percentile",
                             n_resamples=2000, rng=np.random.default_rng(0)).confidence_interval
    assert bootstrap_interval(right) == pytest.approx((theirs.low, theirs.high), abs=0.008)


# ------------------------------------------------------------------------------- all scores


def networks():
    torch.manual_seed(0)
    yield ResNet(ResNetConfig(depths=(1, 1), widths=(8, 16), stem="small", num_classes=3)), 96
    yield ViT(ViTConfig(image_size=16, patch_size=4, dim=24, depth=3, num_heads=3)), 192


def test_features_leave_the_network_alone_and_do_not_depend_on_batches():
    data = pictures()
    for network, dimensions in networks():
        network.train()
        next(network.children()).eval()  # modes differ: each must come back
        modes = [module.training for module in network.modules()]
        before = {name: value.clone() for name, value in network.state_dict().items()}
        rows = frozen_features(network, data.batches(24, shuffle=False), precision="fp32")
        small = frozen_features(network, data.batches(5, shuffle=False), precision="fp32")
        assert rows.shape == (24, dimensions) and torch.allclose(rows, small, atol=1e-5)
        assert modes == [module.training for module in network.modules()]
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name
        with pytest.raises(ValueError, match="shuffle=False"):
            frozen_features(network, data.batches(8))
        for layers in (0, 9):
            with pytest.raises(ValueError, match=rf"layers must be in 1..\d, .*; got {layers}"):
                frozen_features(network, data.batches(8, shuffle=False), layers=layers)


def test_tokens_lie_where_their_patches_lie():
    _, (vit, _) = networks()
    data = pictures(2)
    rows = frozen_features(vit, data.batches(2, shuffle=False), layers=1, pool=4, precision="fp32")
    with torch.no_grad():
        tokens = vit.eval().intermediates(data.images.float() / 255)["blocks.2"][:, 1:]
    maps = rows.view(2, 24, 16)  # channel, then the 4 x 4 places in reading order
    assert torch.allclose(maps, tokens.transpose(1, 2), atol=1e-5)


def test_pictures_that_are_not_square():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (3, 3, 16, 24), generator=generator).to(torch.uint8)
    data = ImageSet(images, torch.arange(3), ["a", "b", "c"], "wide")
    (resnet, dimensions), _ = networks()
    torch.manual_seed(0)
    encoder = MAE(MAEConfig(patch_size=4, dim=24, depth=2, num_heads=3, decoder_dim=24,
                            decoder_depth=1, decoder_heads=3)).encoder
    for network, width in ((resnet, dimensions), (encoder, 192)):
        rows = frozen_features(network, data.batches(2, shuffle=False), precision="fp32")
        assert rows.shape == (3, width) and rows.isfinite().all()
    rows = frozen_features(encoder, data.batches(3, shuffle=False), layers=1, pool=2,
                           precision="fp32").view(3, 24, 2, 2)
    with torch.no_grad():
        tokens = list(encoder.intermediates(images.float() / 255).values())[-1][:, 1:]
    corner = tokens.view(3, 4, 6, 24)[:, :2, :3].mean((1, 2))  # 4 x 6 places, row by row
    assert torch.allclose(rows[:, :, 0, 0], corner, atol=1e-5)


def test_nan_pixels_are_found_in_the_features():
    (network, _), _ = networks()
    images = torch.rand(6, 3, 16, 16)
    images[2, 0, 0, 0] = math.nan
    rows = frozen_features(network, [(images, torch.zeros(6))], precision="fp32")
    with pytest.raises(ValueError, match=r"test_features must be finite; rows \[2\]"):
        evaluate_features(torch.rand(30, rows.shape[1]), torch.arange(30) % 3, rows,
                          torch.arange(6) % 3)


def test_scores_of_features_that_say_nothing_of_one_row_and_in_half_precision(generator):
    labels = torch.arange(60) % 3
    labels[:12] = 0
    same = evaluate_features(torch.ones(60, 4), labels, torch.ones(60, 4), labels)
    majority = (labels == 0).double().mean().item()
    assert same["effective_rank"] == 0.0 and same["probe"] == pytest.approx(majority)
    rows = torch.randn(60, 8, generator=generator) + 3 * F.one_hot(labels, 8)
    one = evaluate_features(rows, labels, rows[:1], labels[:1])
    assert one["knn"] in (0.0, 1.0) and one["probe"] in (0.0, 1.0)
    half, full = (evaluate_features(r, labels, r, labels)
                  for r in (rows.bfloat16(), rows.bfloat16().float()))
    assert half == pytest.approx(full, abs=1e-6)
    with pytest.raises(ValueError, match="test_features must have 8 columns.*got 5"):
        evaluate_features(rows, labels, rows[:, :5], labels)


def test_scores_are_fitted_on_the_training_part_alone(generator):
    labels = torch.arange(200) % 4
    known = torch.randn(200, 12, generator=generator) + 2 * F.one_hot(labels, 12)
    asked = torch.randn(80, 12, generator=generator) + 2 * F.one_hot(labels[:80], 12)
    asked[40:] = asked[:40] + 0.05 * torch.randn(40, 12, generator=generator)
    pairs = {"again": (torch.arange(40), torch.arange(40, 80))}
    scores = evaluate_features(known, labels, asked, labels[:80], pairs=pairs)
    assert list(scores) == ["probe", "knn", "effective_rank", "again"]
    assert scores["again"] > 0.95 and scores["probe"] > 0.6 and scores["knn"] > 0.6
    parts = [evaluate_features(known, labels, asked[i::2], labels[:80][i::2]) for i in (0, 1)]
    for name in ("probe", "knn"):  # two halves of the test set, one by one, make the whole
        assert scores[name] == pytest.approx(sum(part[name] for part in parts) / 2)
    assert parts[0]["effective_rank"] == scores["effective_rank"]
    with pytest.raises(ValueError, match="test_features must be finite"):
        evaluate_features(known, labels, asked / 0, labels[:80])


def test_the_query_itself_must_not_be_in_the_bank(space):
    bank, labels, _ = space
    assert knn_accuracy(bank, labels, bank, labels, k=1) == 1.0  # noise, and all right: a leak
    half = knn_accuracy(bank[:60], labels[:60], bank[60:], labels[60:], k=1)
    assert half < 0.45


# ------------------------------------------------------------------------------- the table


def test_the_committed_table_is_complete():
    with (ROOT / "nbs/self_supervised/comparison.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    keys = [(line["method"], line["seed"]) for line in lines]
    assert len(set(keys)) == len(keys) == 36 and len({line["method"] for line in lines}) == 12
    budgets = {(line["steps"], line["batch"]) for line in lines
               if line["method"] not in ("pixels", "random")}
    assert len(budgets) == 1
    for line in lines:
        for score in ("probe", "knn", "noto_twemoji", "noto_fluent"):
            assert 0 < float(line[score]) < 1


def test_the_script_adds_only_what_is_missing(tmp_path):
    out = tmp_path / "table.csv"
    command = [sys.executable, str(ROOT / "benchmarks/self_supervised.py"), "--out", str(out),
               "--methods", "pixels", "--seeds", "0"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    first = out.read_text(encoding="utf-8")
    result = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert out.read_text(encoding="utf-8") == first and not result.stdout.strip()
    row = next(csv.DictReader(first.splitlines()))
    with (ROOT / "nbs/self_supervised/comparison.csv").open(encoding="utf-8") as file:
        committed = next(line for line in csv.DictReader(file) if line["method"] == "pixels")
    for score in ("probe", "knn", "noto_twemoji", "noto_fluent"):  # the same machine or not
        assert abs(float(row[score]) - float(committed[score])) < 0.01
