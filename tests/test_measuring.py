"""Measuring: equal to the peers on the same features, over processes and chunks; clear refusals."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_course.appendix.files import data_folder
from vlm_course.foundations.images import ImageSet
from vlm_course.generation import measuring
from vlm_course.generation.measuring import (
    FeatureStatistics,
    copying,
    density_coverage,
    evaluate_generator,
    feature_network,
    features_of,
    frechet_distance,
    frechet_infinity,
    kid,
    nearest_training,
    perceptual_distance,
    precision_recall,
    psnr,
    ssim,
)


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def cloud(count: int, width: int = 24, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Features with unequal variances and correlations."""
    mix = torch.randn(width, width, generator=seeded(99)) / width**0.5
    return torch.randn(count, width, generator=seeded(seed)) @ mix + shift


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Real features, and fewer fake ones that differ."""
    return cloud(150), 1.2 * cloud(110, seed=1, shift=0.1)


class Pooled(nn.Module):
    """A feature network small enough for a test: pooled pixels, with BatchNorm to go wrong."""

    name, embed_dim = "pooled pixels", 12

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 12)."""
        return nn.functional.adaptive_avg_pool2d(self.norm(images), 2).flatten(1)


def pictures(count: int = 40, *, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Random uint8 pictures."""
    return torch.randint(256, (count, 3, size, size), generator=seeded(seed)).to(torch.uint8)


# ------------------------------------------------------------------------------- statistics


def test_statistics_are_numpys_and_add_up(pair):
    real, _ = pair
    whole = FeatureStatistics(real)
    streamed = FeatureStatistics()
    for rows in real.split([1, 2, 70, 77]):
        streamed.update(rows)
    halves = FeatureStatistics(real[:31]) + FeatureStatistics(real[31:]) + FeatureStatistics()
    covariance = np.cov(real.double().numpy(), rowvar=False)
    for statistics in (whole, streamed, halves):
        assert statistics.count == 150
        np.testing.assert_allclose(statistics.mean, real.double().mean(0), atol=1e-12)
        np.testing.assert_allclose(statistics.covariance, covariance, atol=1e-12)


def test_adding_changes_neither_side():
    a, b = FeatureStatistics(cloud(5)), FeatureStatistics(cloud(7, seed=1))
    before = a.mean.clone(), b.covariance.clone()
    (a + FeatureStatistics()).update(cloud(3, seed=2))
    assert (a + b).count == 12 and a.count == 5
    assert torch.equal(a.mean, before[0]) and torch.equal(b.covariance, before[1])


def test_a_large_mean_keeps_the_digits():
    """In float32 the offset swallows the variance; deviations in float64 keep it."""
    features = torch.randn(2000, 3, generator=seeded(), dtype=torch.float64)
    statistics = FeatureStatistics()
    for rows in (features + 1e7).split(100):
        statistics.update(rows)
    expected = FeatureStatistics(features).covariance
    torch.testing.assert_close(statistics.covariance, expected, rtol=1e-6, atol=1e-8)


def in_a_process(rank: int, folder: str) -> None:
    """One of two gloo processes: its share of the rows, and an empty share."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    rows = cloud(90) + 5
    own = FeatureStatistics(rows[:70] if rank == 0 else rows[70:])
    uneven = FeatureStatistics(rows) if rank == 1 else FeatureStatistics()
    found = [own.all_reduce(), uneven.all_reduce(), FeatureStatistics().all_reduce()]
    torch.save([s.sums for s in found], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)])
               for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    one = FeatureStatistics(cloud(90) + 5)
    for rank in (0, 1):
        shares, uneven, nothing = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for count, mean, scatter in (shares, uneven):
            assert count == 90
            torch.testing.assert_close(mean, one.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(scatter / 89, one.covariance, rtol=1e-10, atol=1e-12)
        assert nothing[0] == 0


def test_alone_all_reduce_gives_a_copy():
    own = FeatureStatistics(cloud(9))
    copy = own.all_reduce()
    copy.update(cloud(9, seed=1))
    assert own.count == 9 and copy.count == 18


# --------------------------------------------------------------------------- Frechet distance


def peers_distance(name: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """The same distance by a peer, from the same features in float64."""
    a, b = a.double(), b.double()
    moments = [(x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b)]
    if name == "torch_fidelity":
        peer = pytest.importorskip("torch_fidelity.metric_fid")
        one, two = ({"mu": mu, "sigma": sigma} for mu, sigma in moments)
        return peer.fid_statistics_to_metric(one, two, False)[peer.KEY_METRIC_FID]
    if name == "pytorch_fid":
        peer = pytest.importorskip("pytorch_fid.fid_score")
        return peer.calculate_frechet_distance(*moments[0], *moments[1])
    if name == "torchmetrics":
        peer = pytest.importorskip("torchmetrics.image.fid")
        return peer._compute_fid(*(torch.from_numpy(x) for m in moments for x in m)).item()
    linalg = pytest.importorskip("scipy.linalg")
    root = linalg.sqrtm(moments[0][1] @ moments[1][1]).real
    gap = moments[0][0] - moments[1][0]
    return gap @ gap + np.trace(moments[0][1] + moments[1][1] - 2 * root)


@pytest.mark.parametrize("peer", ["torch_fidelity", "pytorch_fid", "torchmetrics", "scipy"])
def test_frechet_distance_equals_peers(pair, peer):
    ours = frechet_distance(*map(FeatureStatistics, pair))
    assert ours > 0.1
    assert ours == pytest.approx(peers_distance(peer, *pair), rel=1e-6)


def test_torchmetrics_module_on_the_same_features(pair):
    peer = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance

    class Given(nn.Module):
        """A feature network that hands its input through."""

        num_features = 24

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            """(B, 24, 1, 1) to (B, 24)."""
            return images.flatten(1)

    metric = peer(feature=Given(), normalize=True, input_img_size=(24, 1, 1))
    metric.set_dtype(torch.float64)
    for rows, is_real in zip(pair, (True, False)):
        metric.update(rows.double()[:, :, None, None], real=is_real)
    ours = frechet_distance(*map(FeatureStatistics, pair))
    assert metric.compute().item() == pytest.approx(ours, rel=1e-6)


def test_frechet_distance_of_singular_covariances():
    """Fewer rows than dimensions: scipy's root of such a product may fail or be complex."""
    a, b = cloud(10, 40), cloud(8, 40, seed=1)
    ours = frechet_distance(FeatureStatistics(a), FeatureStatistics(b))
    A, B = ((x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    gap = (a.double().mean(0) - b.double().mean(0)).square().sum()
    exact = gap + A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    assert ours == pytest.approx(exact.item(), rel=1e-9)
    assert frechet_distance(FeatureStatistics(a), FeatureStatistics(a)) < 1e-12
    point = (torch.zeros(3), torch.zeros(3, 3))
    assert frechet_distance(point, (torch.tensor([3.0, 4, 0]), torch.zeros(3, 3))) == 25


def test_frechet_distance_of_diagonals_and_its_symmetry(pair):
    a = torch.zeros(3), torch.diag(torch.tensor([1.0, 4, 9]))
    b = torch.ones(3), torch.diag(torch.tensor([4.0, 4, 1]))
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4)
    one, two = map(FeatureStatistics, pair)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-10)


def test_frechet_infinity_finds_the_intercept():
    real, fake = FeatureStatistics(cloud(40_000)), cloud(2000, seed=1)
    found = frechet_infinity(real, fake, generator=seeded(), counts=[100, 200, 400, 800, 2000])
    assert found.slope > 0 and found.distances[0] > 10 * abs(found.value)
    assert abs(found.value) < found.distances[-1] / 2
    assert found.counts == [100, 200, 400, 800, 2000]
    again = frechet_infinity(real, fake, generator=seeded(), counts=(2000, 800, 400, 200, 100))
    assert again == found
    assert len(frechet_infinity(real, fake, generator=seeded()).counts) == 10
    for counts in ([100], [1, 100], [100, 2001]):
        with pytest.raises(ValueError, match=r"two or more numbers in 2\.\.2000"):
            frechet_infinity(real, fake, generator=seeded(), counts=counts)
    with pytest.raises(ValueError, match="repeats must be at least 1; got 0"):
        frechet_infinity(real, fake, generator=seeded(), repeats=0)


# ------------------------------------------------------------------------------------------ kid


def test_kid_equals_torchmetrics_and_torch_fidelity():
    real, fake = cloud(90).double(), cloud(90, seed=1, shift=0.3).double()
    ours = kid(real, fake).value
    peer = pytest.importorskip("torchmetrics.image.kid")
    assert ours == pytest.approx(peer.poly_mmd(real, fake).item(), rel=1e-9)
    other = peer.poly_mmd(real, fake, degree=2, gamma=0.5, coef=0.1).item()
    assert kid(real, fake, degree=2, gamma=0.5, coef=0.1).value == pytest.approx(other, rel=1e-9)
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    kernels = [fidelity.kernel_poly(x.numpy(), y.numpy(), kid_kernel_poly_degree=3,
                                    kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
               for x, y in ((real, real), (real, fake), (fake, fake))]
    assert ours == pytest.approx(fidelity.mmd2(*kernels), rel=1e-9)


def kid_by_loop(real: torch.Tensor, fake: torch.Tensor) -> float:
    """All pairs, one at a time."""
    kernel = lambda x, y: (x @ y / len(x) + 1) ** 3  # noqa: E731
    total = 0.0
    for rows in (real, fake):
        n = len(rows)
        total += sum(kernel(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j) / (
            n * (n - 1))
    mixed = sum(kernel(x, y) for x in real for y in fake) / len(real) / len(fake)
    return (total - 2 * mixed).item()


def test_kid_and_its_error_by_brute_force():
    """Unequal counts, and the jackknife by really leaving each row out."""
    real, fake = cloud(7, 5).double(), cloud(9, 5, seed=1, shift=0.5).double()
    found = kid(real, fake, chunk=2)
    assert found.value == pytest.approx(kid_by_loop(real, fake), rel=1e-9)
    variance = 0.0
    for turned in (False, True):
        rows, others = (fake, real) if turned else (real, fake)
        without = torch.tensor([kid_by_loop(torch.cat([rows[:i], rows[i + 1:]]), others)
                                for i in range(len(rows))], dtype=torch.float64)
        variance += (len(rows) - 1) * without.var(correction=0)
    assert found.error == pytest.approx(variance.sqrt().item(), rel=1e-9)
    assert math.isnan(kid(real[:2], fake).error)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kid_is_unbiased_and_its_error_honest(shift):
    draws = [kid(cloud(60, 8, seed=2 * i), cloud(60, 8, seed=2 * i + 1, shift=shift))
             for i in range(150)]
    values = torch.tensor([draw.value for draw in draws])
    errors = torch.tensor([draw.error for draw in draws])
    truth = kid(cloud(6000, 8, seed=991), cloud(6000, 8, seed=992, shift=shift)).value
    assert abs(values.mean() - truth) < 3.5 * values.std() / 150**0.5 + 2e-3
    ratio = (errors.square().mean().sqrt() / values.std()).item()
    assert 0.8 < ratio < 1.25 if shift else 1.1 < ratio < 1.8


def test_chunks_change_nothing(pair):
    for measure in (kid, precision_recall, density_coverage, partial(copying, held_out=pair[1])):
        torch.testing.assert_close(measure(*pair, chunk=13), measure(*pair), rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def test_many_rows_fit_into_memory():
    """12,000 rows: the whole kernel matrix would be 144 million numbers."""
    rows, others = cloud(12_000, 4), cloud(500, 4, seed=1)
    with Largest() as largest:
        value, error = kid(rows, others, chunk=256)
    assert abs(value) < 5 * error
    assert largest.numbers == 256 * 12_000


# ------------------------------------------------------------------ precision, recall, and so on


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_coverage_equal_prdc(pair, k, capsys):
    peer = pytest.importorskip("prdc")
    theirs = peer.compute_prdc(*(x.double().numpy() for x in pair), nearest_k=k)
    precision, recall = precision_recall(*pair, k=k)
    density, coverage = density_coverage(*pair, k=k)
    ours = dict(precision=precision, recall=recall, density=density, coverage=coverage)
    assert ours == pytest.approx({key: float(value) for key, value in theirs.items()}, abs=1e-12)
    assert 0 < precision < 1 and 0 < recall < 1


def test_duplicates_do_not_break_the_balls():
    real = cloud(20, 3)
    assert precision_recall(real, real[:5].repeat(4, 1), k=3)[0] == 1
    assert density_coverage(real, real, k=3)[1] == 1
    collapsed = real[:1].repeat(10, 1)
    assert precision_recall(real, collapsed, k=3) == (1.0, 0.0)


def test_nearest_training_by_brute_force(pair):
    real, fake = pair
    found = nearest_training(fake, real, k=4, chunk=7)
    distances = torch.cdist(fake.double(), real.double())
    torch.testing.assert_close(found.distances, distances.sort(1).values[:, :4])
    assert torch.equal(found.rows[:, 0], distances.argmin(1))


def test_copying_equals_scipys_mann_whitney(pair):
    stats = pytest.importorskip("scipy.stats")
    training, fake = pair
    unseen = cloud(80, seed=5)
    near, far = (torch.cdist(x.double(), training.double()).amin(1).numpy() for x in (fake, unseen))
    share, z, ratio = copying(training, fake, unseen)
    peer = stats.mannwhitneyu(far, near, method="asymptotic", use_continuity=False)
    assert share == pytest.approx(peer.statistic / (len(near) * len(far)), rel=1e-12)
    assert 2 * stats.norm.sf(abs(z)) == pytest.approx(peer.pvalue, rel=1e-9)
    assert ratio == pytest.approx(np.median(np.sort(near)[: (len(near) + 1) // 2][-1:])
                                  / np.sort(far)[(len(far) - 1) // 2], rel=1e-6)


def test_copying_with_ties_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    training = torch.zeros(3, 1)
    near, far = torch.tensor([[1.0], [1], [2], [3]]), torch.tensor([[1.0], [2], [2], [4], [5]])
    peer = stats.mannwhitneyu(far[:, 0], near[:, 0], method="asymptotic", use_continuity=False)
    found = copying(training, near, far)
    assert found.share == pytest.approx(peer.statistic / 20)
    assert 2 * stats.norm.sf(abs(found.z)) == pytest.approx(peer.pvalue)
    assert copying(training, torch.ones(3, 1), torch.ones(4, 1))[:2] == (0.5, 0.0)


def test_copying_tells_copies_from_unseen():
    training, unseen = cloud(300), cloud(200, seed=3)
    assert copying(training, training[:100] + 1e-3, unseen).z > 8
    assert abs(copying(training, cloud(200, seed=4), unseen).z) < 3


# --------------------------------------------------------------------------- pictures in pairs


def noisy_pair(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth pictures and noisy ones of an odd size."""
    smooth = nn.functional.interpolate(torch.rand(4, channels, 5, 6, generator=seeded()), (23, 31),
                                       mode="bilinear")
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=seeded(1))).clamp(0, 1), smooth


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_equal_skimage_and_pytorch_msssim(channels):
    metrics = pytest.importorskip("skimage.metrics")
    images, reference = noisy_pair(channels)
    noise, likeness = psnr(images, reference), ssim(images, reference)
    for i in range(4):
        a, b = (x[i].double().numpy() for x in (reference, images))
        assert noise[i].item() == pytest.approx(
            metrics.peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
        assert likeness[i].item() == pytest.approx(metrics.structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1,
            channel_axis=0), abs=1e-9)
    peer = pytest.importorskip("pytorch_msssim")
    theirs = peer.ssim(images.double(), reference.double(), data_range=1, size_average=False)
    torch.testing.assert_close(likeness, theirs, rtol=0, atol=1e-6)


def test_equal_pictures():
    images = pictures(3, size=16)
    assert torch.equal(psnr(images, images), torch.full((3,), math.inf, dtype=torch.float64))
    torch.testing.assert_close(ssim(images, images), torch.ones(3, dtype=torch.float64))
    network = feature_network(data_folder("runs") / "simclr_vit_mini")
    assert perceptual_distance(network, images, images).abs().max() == 0


@pytest.mark.parametrize("name", ["simclr_resnet_mini", "simclr_vit_mini"])
def test_perceptual_distance_by_loop(name):
    network = feature_network(data_folder("runs") / name)
    a, b = pictures(2, size=32), pictures(2, size=32, seed=1)
    found = perceptual_distance(network, a, b)
    with torch.no_grad():
        layers = [network.intermediates(x.float() / 255) for x in (a, b)]
    total = torch.zeros(2)
    for key in layers[0]:
        x, y = (layer[key] if layer[key].ndim == 3 else layer[key].flatten(2).mT
                for layer in layers)  # (B, places, channels)
        for i in range(2):
            unit = [v / v.norm(dim=1, keepdim=True) for v in (x[i], y[i])]
            total[i] += (unit[0] - unit[1]).square().sum(1).mean() / len(layers[0])
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, perceptual_distance(network, b, a))


# --------------------------------------------------------------------- networks and evaluation


def test_features_are_the_same_whatever_the_batches():
    network, images = Pooled(), pictures(50)
    expected = network.eval().features(images.float() / 255)
    data = ImageSet(images, torch.zeros(50, dtype=torch.int64), ["a"], "noise")
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for given in (images, images.float() / 255, data, iter(images.split(9))):
        found = features_of(network, given, batch_size=7)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert network.training and all(torch.equal(before[k], v)
                                    for k, v in network.state_dict().items())


def test_networks_by_name():
    run = feature_network(data_folder("runs") / "simclr_resnet_mini")
    assert run.name == "simclr_resnet_mini, 32 px" and run.embed_dim == 128
    features = features_of(run, pictures(3, size=32))
    assert features.shape == (3, 128) and not run.training
    assert not any(parameter.requires_grad for parameter in run.parameters())
    grey = features_of(run, pictures(3, size=32)[:, :1])
    assert grey.shape == (3, 128) and not torch.equal(grey, features)


def test_lite0_features_are_the_pooled_ones():
    pytest.importorskip("timm")
    network = feature_network("efficientnet_lite0", size=64)
    assert network.name == "efficientnet_lite0, 64 px" and network.embed_dim == 1280
    assert features_of(network, pictures(2, size=32)).shape == (2, 1280)


def test_inception_only_from_a_file(tmp_path, monkeypatch):
    """Random weights in a file of the right shape; no download; only tensors are read."""
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    calls = []
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *a, **k: calls.append(a))
    for wrong in (None, tmp_path / "missing.pth"):
        with pytest.raises(FileNotFoundError, match="weights must be a file with Inception's"):
            feature_network("inception", weights=wrong)
    monkeypatch.setattr(peer.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
    untrained = peer.FeatureExtractorInceptionV3("i", ["2048"])
    assert calls
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *a, **k: calls.append(a))
    torch.save(untrained.state_dict(), tmp_path / "weights.pth")
    network = feature_network("inception", weights=tmp_path / "weights.pth")
    images = pictures(2, size=16)
    found, expected = features_of(network, images), untrained(images)[0]
    scale = expected.abs().max()  # tiny in an untrained network; another memory format, other bits
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-3, atol=1e-4)
    assert not calls
    assert features_of(network, images[:, :1]).shape == (2, 2048)
    assert "TensorFlow" in network.name
    torch.save(Path, tmp_path / "foreign.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        feature_network("inception", weights=tmp_path / "foreign.pth")


def test_evaluate_generator_names_what_it_measured():
    real, fake, unseen = pictures(60), pictures(50, seed=1), pictures(30, seed=2)
    network = Pooled().eval()
    with pytest.warns(UserWarning, match="50 pictures are few for 12 features"):
        scores = evaluate_generator(real, fake, network=network, held_out=unseen)
    assert scores["network"] == "pooled pixels" and (scores["real"], scores["fake"]) == (60, 50)
    features = [features_of(network, x) for x in (real, fake, unseen)]
    assert scores["frechet"] == frechet_distance(*map(FeatureStatistics, features[:2]))
    assert (scores["kid"], scores["kid_error"]) == kid(*features[:2])
    assert (scores["precision"], scores["recall"]) == precision_recall(*features[:2], k=5)
    assert (scores["density"], scores["coverage"]) == density_coverage(*features[:2])
    assert (scores["copying"], scores["copying_z"]) == copying(*features)[:2]
    with pytest.warns(UserWarning):
        assert evaluate_generator(*features[:2], network=network, held_out=unseen) == scores


def test_enough_pictures_bring_no_warning():
    rows = cloud(2048, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate_generator(rows, cloud(2048, 12, seed=1), network=Pooled())
        assert "copying" not in scores
        wide = Pooled()
        wide.embed_dim = 3000
        with pytest.raises(UserWarning, match="2048 pictures are few for 3000 features"):
            evaluate_generator(rows, rows, network=wide)


# --------------------------------------------------------------------------------------- refusals

PAIRED = [kid, precision_recall, density_coverage, partial(copying, held_out=cloud(9)),
          nearest_training]


@pytest.mark.parametrize("measure", PAIRED)
def test_features_that_do_not_fit(measure):
    good = cloud(9)
    with pytest.raises(ValueError, match="must have 24 columns|must have 23 columns"):
        measure(good, good[:, :23])
    hole = good.clone()
    hole[3, 2] = math.nan
    for pair in ((good, hole), (hole, good)):
        with pytest.raises(ValueError, match=r"must be finite; rows \[3\]"):
            measure(*pair)
    for wrong in (good.long(), good[0], good[:0]):
        with pytest.raises(ValueError, match=r"must be \(N, D\) float"):
            measure(wrong, good)


@pytest.mark.parametrize("measure", PAIRED[:3])
def test_fewer_than_two_rows(measure):
    for pair, name in (((cloud(9), cloud(1)), "fake"), ((cloud(1), cloud(9)), "real")):
        with pytest.raises(ValueError, match=f"{name} must have at least 2 rows; got 1"):
            measure(*pair)


def test_too_many_neighbours():
    for measure in (precision_recall, density_coverage):
        for k in (0, 9, 10):
            with pytest.raises(ValueError, match=r"k must be in 1\.\.8"):
                measure(cloud(9), cloud(20), k=k)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        precision_recall(cloud(9), cloud(5), k=5)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.9, the rows of training"):
        nearest_training(cloud(3), cloud(9), k=10)


def test_statistics_that_do_not_fit():
    one = FeatureStatistics(cloud(1))
    with pytest.raises(ValueError, match="at least 2 rows; got 1"):
        frechet_distance(one, FeatureStatistics(cloud(9)))
    with pytest.raises(ValueError, match="at least 1 rows; got 0"):
        FeatureStatistics().mean  # noqa: B018
    with pytest.raises(ValueError, match="b must have 24 features, as a; got 23"):
        frechet_distance(FeatureStatistics(cloud(9)), FeatureStatistics(cloud(9)[:, :23]))
    statistics = FeatureStatistics(cloud(9))
    for wrong, match in ((cloud(9)[:, :23], "24 columns"), (cloud(9) / 0, "finite")):
        with pytest.raises(ValueError, match=match):
            statistics.update(wrong)
    assert statistics.count == 9
    eye, zero = torch.eye(3), torch.zeros(3)
    for bad, match in (((zero, torch.eye(2)), "got"), ((zero, -eye), "negative eigenvalue"),
                       ((zero / 0, eye), "finite"),
                       ((zero, eye + torch.ones(3, 3).triu(1)), "symm")):
        with pytest.raises(ValueError, match=match):
            frechet_distance(bad, (zero, eye))


def test_pictures_that_do_not_fit():
    images = pictures(4, size=16)
    for measure in (psnr, ssim, partial(perceptual_distance, Pooled())):
        with pytest.raises(ValueError, match=r"shape of reference, \(4, 3, 8, 8\)"):
            measure(images, pictures(4))
    with pytest.raises(ValueError, match="at most 10, the picture's shorter side; got 11"):
        ssim(images[:, :, :10], images[:, :, :10])
    with pytest.raises(ValueError, match="side must be odd"):
        ssim(images, images, side=4)
    for wrong in (images.float() / 127.5 - 1, images.float(), images.float() / 0):
        with pytest.raises(ValueError, match=r"images must be in \[0, 1\]"):
            features_of(Pooled(), wrong)
        with pytest.raises(ValueError, match=r"images must be in \[0, 1\]"):
            psnr(wrong, wrong)
    for empty in (images[:0], []):
        with pytest.raises(ValueError, match="at least one picture"):
            features_of(Pooled(), empty)
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\)"):
        features_of(Pooled(), images[0])
    with pytest.raises(ValueError, match="1 or 3 channels"):
        features_of(feature_network(data_folder("runs") / "simclr_resnet_mini"),
                    torch.zeros(2, 4, 32, 32, dtype=torch.uint8))


def test_a_float16_feature_is_summed_in_double():
    half = cloud(50).half()
    found = measuring.frechet_distance(*(FeatureStatistics(x) for x in (half, half.double())))
    assert found < 1e-12 and FeatureStatistics(half).mean.dtype == torch.float64


if __name__ == "__main__":
    in_a_process(int(sys.argv[1]), sys.argv[2])
