"""Augmentation against its peers, on masks and boxes, compiled, in half precision, on bad input."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vlm_course.foundations import augmentation as A
from vlm_course.foundations.images import load, resize_matrix
from vlm_course.foundations.networks import ResNet, ResNetConfig
from vlm_course.foundations.training import fit


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 7, channels: int = 3, height: int = 37, width: int = 52) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=seeded(1))


def window(params: dict, i: int) -> list[int]:
    return [int(params[name][i]) for name in ("top", "left", "height", "width")]


def difference(transform, images, params, peer) -> float:
    """The largest difference between our batch and `peer(number, image)` image by image."""
    loop = torch.stack([peer(i, image) for i, image in enumerate(images)])
    return (transform.apply_images(images, params) - loop).abs().max().item()


ALL = [
    A.RandomResizedCrop(24),
    A.RandomResizedCrop((20, 48), antialias=False),
    A.RandomHorizontalFlip(),
    A.RandomVerticalFlip(),
    A.RandomRotation(40, fill=0.5),
    A.ColorJitter(0.4, 0.4, 0.4, 0.1),
    A.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
    A.ColorJitter(0.4, hue=0.3),
    A.ColorJitter(contrast=0.4, saturation=0.4),
    A.RandomGrayscale(0.4),
    A.RandomSolarize(0.6),
    A.GaussianBlur(7, p=0.5),
    A.RandomErasing(),
    A.Cutout(9),
    A.Mixup(),
    A.CutMix(),
]
CHAIN = A.Compose(
    A.RandomResizedCrop(24),
    A.RandomHorizontalFlip(),
    A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    A.RandomGrayscale(0.2),
    A.GaussianBlur(3, p=0.5),
)


def name(transform) -> str:
    return repr(transform).replace("\n", "")[:60]


# ------------------------------------------------------------------------- equal to torchvision


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, (24, 60), 64])
@pytest.mark.parametrize("antialias", [True, False])
def test_crop(channels, size, antialias):
    images, transform = noise(channels=channels), A.RandomResizedCrop(size, antialias=antialias)
    params = transform.draw(images, seeded())

    def peer(i, image):
        return TF.resized_crop(
            image, *window(params, i), list(transform.size), antialias=antialias
        )

    assert difference(transform, images, params, peer) < 1e-5
    assert len({tuple(window(params, i)) for i in range(7)}) == 7  # not one crop for all


def test_large_crops_by_loop_equal_the_matrices():
    images, transform = noise(3, height=90, width=80), A.RandomResizedCrop(40)
    params = transform.draw(images, seeded())
    sides = zip(("top", "left"), ("height", "width"), (90, 80), strict=True)
    matrices = [A.window_matrix(params[a], params[b], old=n, new=40) for a, b, n in sides]
    by_matrix = A.resample(images, *matrices)
    assert (transform.apply_images(images, params) - by_matrix).abs().max() < 1e-6


def test_a_window_of_the_whole_side_is_plain_resizing():
    for old, new in ((40, 16), (16, 40), (7, 7)):
        ours = A.window_matrix(torch.tensor([0]), torch.tensor([old]), old=old, new=new)[0]
        assert (ours - resize_matrix(old, new)).abs().max() < 1e-6


def test_crop_windows_have_torchvisions_distribution():
    from torchvision.transforms import v2

    shape = (4000, 3, 40, 60)
    p = A.RandomResizedCrop(8).sample(shape, seeded())
    torch.manual_seed(0)
    peer = v2.RandomResizedCrop(8)
    image = torch.empty(3, 40, 60)
    drawn = [peer.make_params([image]) for _ in range(4000)]
    for ours in ("top", "left", "height", "width"):
        theirs = torch.tensor([float(d[ours]) for d in drawn])
        mine = p[ours].double()
        error = math.hypot(mine.std() / 4000**0.5, theirs.std() / 4000**0.5)
        assert abs(mine.mean() - theirs.double().mean()) < 5 * error, ours
        assert abs(mine.std() / theirs.double().std() - 1) < 0.08, ours
    inside = (p["top"] + p["height"] <= 40) & (p["left"] + p["width"] <= 60)
    assert inside.all() and (p["height"] > 0).all()


def test_crop_falls_back_to_the_middle_where_nothing_fits():
    p = A.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(0.9, 1.1)).sample((3, 3, 10, 100), seeded())
    assert p["height"].tolist() == [10] * 3 and p["width"].tolist() == [11] * 3
    assert p["top"].tolist() == [0] * 3 and p["left"].tolist() == [44] * 3


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation(channels):
    images, transform = noise(channels=channels), A.RandomRotation(60)
    params = transform.draw(images, seeded())

    def peer(i, image):
        angle = params["angle"][i].item()
        return TF.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)

    assert difference(transform, images, params, peer) < 1e-5
    quarter = A.RandomRotation((90, 90))(noise(height=16, width=16))
    assert torch.allclose(quarter, torch.rot90(noise(height=16, width=16), 1, (2, 3)), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [(0.4, 0.4, 0.4, 0.1), (0.9, 0.9, 0.9, 0.5), (0.4, 0, 0.4, 0.2), (0.4, 0.4), (0, 0.3)],
)
def test_colour_jitter_in_each_images_own_order(channels, arguments):
    images, transform = noise(40, channels), A.ColorJitter(*arguments)
    params = transform.draw(images, seeded())
    if len(arguments) == 4 and all(arguments):
        assert len(set(map(tuple, params["order"].tolist()))) > 15  # of 24

    def peer(i, image):
        for k in params["order"][i].tolist():
            function = getattr(TF, f"adjust_{transform.names[k]}")
            image = function(image, params[transform.names[k]][i].item())
        return image

    assert difference(transform, images, params, peer) < 1e-5


def test_jitter_sorted_for_speed_equals_unsorted():
    images, transform = noise(300, height=20, width=24), A.ColorJitter(0.8, 0.8, 0.8, 0.3)
    assert A.PART > images.numel() > A.PART // 2  # sorted as a whole, not in its parts
    params = transform.draw(images, seeded())
    parts = [
        transform.apply_images(images[i : i + 5], A.take_rows(params, slice(i, i + 5)))
        for i in range(0, 300, 5)
    ]
    whole = transform.apply_images(images, params)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def test_colour_jitter_against_kornia():
    enhance = pytest.importorskip("kornia.enhance")
    images = noise(8)
    one, zero = torch.ones(8), torch.zeros(8)
    f = torch.linspace(0.2, 1.8, 8)
    brighter = A.blend(images, torch.stack([f, zero, zero]))
    assert (brighter - enhance.adjust_brightness_accumulative(images, f)).abs().max() < 1e-5
    contrast = A.blend(images, torch.stack([f, 1 - f, zero]))
    theirs = enhance.adjust_contrast_with_mean_subtraction(images, f)
    assert (contrast - theirs).abs().max() < 1e-4  # its grey is 0.299, ours 0.2989
    saturated = A.blend(images, torch.stack([f, zero, 1 - f]))
    theirs = enhance.adjust_saturation_with_gray_subtraction(images, f)
    assert (saturated - theirs).abs().max() < 2e-4  # for the same reason
    turns = torch.linspace(-0.5, 0.5, 8)
    hue = enhance.adjust_hue(images, 2 * math.pi * turns)  # radians there
    assert (A.shift_hue(images, turns) - hue).abs().max() < 1e-5
    assert torch.allclose(A.blend(images, torch.stack([one, zero, zero])), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_solarise_and_blur(channels):
    images = noise(channels=channels)
    grey, solarise, blur = A.RandomGrayscale(1.0), A.RandomSolarize(0.3, 1.0), A.GaussianBlur(9)
    params = grey.draw(images)
    peer = lambda i, image: TF.rgb_to_grayscale(image, channels)  # noqa: E731
    assert difference(grey, images, params, peer) < 1e-6
    params = solarise.draw(images)
    assert difference(solarise, images, params, lambda i, x: TF.solarize(x, 0.3)) < 1e-6
    params = blur.draw(images, seeded())
    sigma = params["sigma"].tolist()
    peer = lambda i, image: TF.gaussian_blur(image, [9, 9], [sigma[i]])  # noqa: E731
    assert difference(blur, images, params, peer) < 1e-5


def test_erasing_hides_exactly_the_rectangle():
    images, transform = noise(60) + 0.01, A.RandomErasing(p=0.5, value=0.0)
    params = transform.draw(images, seeded())
    erased = transform.apply_images(images, params) == 0
    for i in range(60):
        wanted = torch.zeros(37, 52, dtype=torch.bool)
        rows = slice(params["top"][i], params["bottom"][i])
        wanted[rows, params["left"][i] : params["right"][i]] = True
        assert torch.equal(erased[i, 0], wanted)
    assert 15 < int((params["bottom"] > params["top"]).sum()) < 45
    assert (A.Cutout(10, value=2.0)(images, seeded()) == 2).flatten(1).any(1).all()


# ---------------------------------------------------------------- masks, boxes, points, replay


@pytest.mark.parametrize("size", [10, (24, 60), 64])
def test_masks_of_a_crop(size):
    masks = torch.randint(5, (7, 60, 60), generator=seeded())
    transform = A.RandomResizedCrop(size)
    params = transform.draw(masks[:, None].float(), seeded())
    nearest = InterpolationMode.NEAREST_EXACT  # pixel centres, as for the images
    for i, mask in enumerate(transform.apply_masks(masks, params)):
        peer = TF.resized_crop(
            masks[i][None], *window(params, i), list(transform.size), interpolation=nearest
        )
        assert torch.equal(mask, peer[0])


def test_masks_that_shrink_by_a_whole_number_hit_pixel_borders():
    masks = torch.arange(60 * 60).view(1, 60, 60)
    transform = A.RandomResizedCrop(10, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    params = transform.draw(masks[:, None].float())
    assert torch.equal(transform.apply_masks(masks, params)[0], masks[0, 3::6, 3::6])


def test_image_and_mask_share_the_parameters():
    masks = (torch.rand(9, 1, 40, 40, generator=seeded()) > 0.5).float()
    transform = A.Compose(A.RandomHorizontalFlip(), A.RandomVerticalFlip())
    params = transform.draw(masks, seeded())
    assert torch.equal(transform.apply_images(masks, params), transform.apply_masks(masks, params))
    turn = A.RandomRotation(180)
    params = turn.draw(masks, seeded())
    for i, mask in enumerate(turn.apply_masks(masks, params)):
        assert torch.equal(mask, TF.rotate(masks[i], params["angle"][i].item()))


def test_points_follow_the_pixels():
    images = torch.zeros(20, 1, 64, 64)
    points = torch.randint(16, 48, (20, 1, 2), generator=seeded())
    for i, (x, y) in enumerate(points[:, 0].tolist()):
        images[i, 0, y - 2 : y + 2, x - 2 : x + 2] = 1  # a square centred on the point
    transform = A.Compose(
        A.RandomRotation(40), A.RandomHorizontalFlip(), A.RandomVerticalFlip(),
        A.RandomResizedCrop((50, 70), scale=(0.8, 1.0)),
    )  # fmt: skip
    params = transform.draw(images, seeded())
    moved, found = transform.apply_images(images, params), 0
    boxes = torch.cat([points - 2, points + 2], dim=-1).float()
    new_boxes = transform.apply_boxes(boxes, params)[:, 0]
    for image, (x, y), box in zip(moved, transform.apply_keypoints(points.float(), params)[:, 0],
                                  new_boxes, strict=True):  # fmt: skip
        if 5 < x < 65 and 5 < y < 45:  # well inside
            weight = image[0] / image.sum()
            centre_x = (weight.sum(0) * (torch.arange(70) + 0.5)).sum()
            centre_y = (weight.sum(1) * (torch.arange(50) + 0.5)).sum()
            assert abs(centre_x - x) < 0.3 and abs(centre_y - y) < 0.3
            assert box[0] < x < box[2] and box[1] < y < box[3]
            found += 1
    assert found > 10
    assert (new_boxes[:, :2] >= 0).all() and (new_boxes[:, 2] <= 70).all()
    assert (new_boxes[:, 3] <= 50).all()


def test_colours_move_nothing():
    masks, boxes = torch.rand(3, 8, 8), torch.rand(3, 2, 4)
    still = A.ColorJitter(0.4), A.GaussianBlur(3), A.RandomErasing(), A.RandomGrayscale()
    for transform in still:
        params = transform.draw(noise(3))
        assert transform.apply_masks(masks, params) is masks
        assert transform.apply_boxes(boxes, params) is boxes
        assert transform.apply_keypoints(boxes, params) is boxes


@pytest.mark.parametrize("transform", [*ALL, CHAIN], ids=name)
def test_a_seed_is_a_replay_and_images_do_not_influence_each_other(transform):
    images = noise()
    params = transform.draw(images, seeded(3))
    first = transform.apply_images(images, params)
    assert torch.equal(first, transform(images, seeded(3)))
    assert torch.equal(first, transform.apply_images(images, params))
    if not transform.whole_batch:
        alone = transform.apply_images(images[2:3], A.take_rows(params, slice(2, 3)))
        assert torch.allclose(alone, first[2:3], atol=1e-6)
    again = pickle.loads(pickle.dumps(transform)).draw(images, seeded(3))
    assert again.__class__ is params.__class__
    assert not list(transform.parameters()) and not transform.state_dict()


def test_torchs_own_generator_is_the_default():
    torch.manual_seed(5)
    first = CHAIN(noise())
    torch.manual_seed(5)
    assert torch.equal(first, CHAIN(noise()))
    assert not torch.equal(first, CHAIN(noise()))


def test_views_are_different_and_each_its_own_size():
    small = A.Compose(A.RandomResizedCrop(16, scale=(0.1, 0.4)), A.ColorJitter(0.4))
    views = A.MultiView(CHAIN, CHAIN, small)(noise(), seeded())
    assert [tuple(v.shape) for v in views] == [(7, 3, 24, 24)] * 2 + [(7, 3, 16, 16)]
    assert not torch.equal(views[0], views[1])
    many = noise(300)  # worked on in parts
    views = A.MultiView(CHAIN, small)(many, seeded())
    assert [len(v) for v in views] == [300, 300]


def test_large_pictures_one_by_one_equal_the_batch(monkeypatch):
    images = noise(20)
    for transform in (A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.5), A.RandomVerticalFlip()):
        params = transform.draw(images, seeded())
        whole = transform.apply_images(images, params)
        with monkeypatch.context() as patch:
            patch.setattr(A, "PART", 3 * 37 * 52 * 2)
            assert torch.allclose(whole, transform.apply_images(images, params), atol=1e-6)


def test_parts_of_a_large_batch_equal_the_whole(monkeypatch):
    images = noise(50)
    params = CHAIN.draw(images, seeded())
    whole = CHAIN.apply_images(images, params)
    monkeypatch.setattr(A, "PART", 3 * 37 * 52 * 8)
    assert torch.allclose(whole, CHAIN.apply_images(images, params), atol=1e-6)


# ------------------------------------------------------------------------------------- mixing


def test_mixed_labels_are_the_mixed_loss():
    images, labels = noise(30), torch.randint(4, (30,), generator=seeded())
    logits = torch.randn(30, 4, generator=seeded())
    for mix in (A.Mixup(0.4), A.CutMix()):
        params = mix.draw(images, seeded())
        weight = params["weight"][:, None]
        one_hot = F.one_hot(labels, 4).float()
        soft = weight * one_hot + (1 - weight) * one_hot[params["partner"]]
        loss = A.mixed_cross_entropy(logits, labels, params)
        assert torch.allclose(loss, F.cross_entropy(logits, soft), atol=1e-6)
        assert len(params["weight"].unique()) > 10  # one for each image, not one for the batch


def test_cutmix_weight_is_the_share_that_stays():
    images = torch.arange(30.0).view(30, 1, 1, 1).expand(30, 1, 20, 30) / 30
    mix = A.CutMix()
    params = mix.draw(images, seeded())
    stays = (mix.apply_images(images, params) == images).float().mean((1, 2, 3))
    moved = params["partner"] != torch.arange(30)
    assert torch.allclose(stays[moved], params["weight"][moved], atol=1e-6)
    with pytest.raises(ValueError, match="CutMix moves images and labels only"):
        mix.apply_masks(images, params)


@pytest.mark.parametrize("alpha", [1e-4, 0.2, 1.0, 50.0])
def test_mixup_weights_are_beta_and_finite(alpha):
    weight = A.Mixup(alpha).draw(torch.zeros(4000, 1, 1, 1), seeded())["weight"]
    assert weight.isfinite().all() and ((weight >= 0) & (weight <= 1)).all()
    assert abs(weight.mean() - 0.5) < 0.05
    assert abs(weight.var() - 0.25 / (2 * alpha + 1)) < 0.02


# ----------------------------------------------------------- compiled, half precision, gradient


@pytest.mark.parametrize("transform", [*ALL, CHAIN, A.MultiView(CHAIN, CHAIN)], ids=name)
def test_traced_whole_by_torch_compile(transform):
    torch.compiler.reset()
    images = noise()
    params = transform.draw(images, seeded())
    traced = torch.compile(transform.apply_images, fullgraph=True, backend="eager")
    expected, result = transform.apply_images(images, params), traced(images, params)
    if isinstance(transform, A.MultiView):
        expected, result = torch.cat(expected), torch.cat(result)
    assert torch.allclose(result, expected, atol=1e-5)


def test_compiled_through_aot_autograd():
    torch.compiler.reset()
    images = noise()
    params = CHAIN.draw(images, seeded())
    traced = torch.compile(CHAIN.apply_images, fullgraph=True, backend="aot_eager")
    assert torch.allclose(traced(images, params), CHAIN.apply_images(images, params), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transform", ALL, ids=name)
def test_other_precisions_round_once(transform, dtype):
    images = noise().to(dtype)
    params = transform.draw(images, seeded())
    result = transform.apply_images(images, params)
    exact = transform.apply_images(images.double(), params)
    assert result.dtype == dtype and result.isfinite().all()
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    assert (result.double() - exact).abs().max() <= bound
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the interpolation
        again = transform.apply_images(images, params)
    assert torch.equal(again, result)


@pytest.mark.parametrize("transform", [t for t in ALL if not isinstance(t, A.Cutout)], ids=name)
def test_gradients_are_finite_even_for_grey_pixels(transform):
    images = noise()
    images[:3] = images[:3, :1]  # no chroma
    images.requires_grad_()
    transform(images, seeded()).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("transform", [*ALL, CHAIN], ids=name)
def test_bad_images_are_refused_and_odd_ones_work(transform):
    nan = noise()
    nan[4, 0, 3, 3] = math.nan
    for bad, wanted in (
        (noise().mul(255).byte(), r"float in \[0, 1\]; got \(7, 3, 37, 52\) torch.uint8"),
        (noise().long(), "torch.int64"),
        (noise()[0], r"\(B, C, H, W\)"),
        (noise()[:0], r"at least one picture; got \(0, 3"),
        (nan, r"finite; images \[4\]"),
    ):
        with pytest.raises(ValueError, match=wanted):
            transform(bad)
    assert len(transform(noise(1), seeded())) == 1
    assert transform(torch.full((2, 3, 16, 16), 0.5), seeded()).isfinite().all()


def test_normalised_images_are_refused_by_what_would_clip_them():
    images = noise() * 4 - 2
    for transform in (A.ColorJitter(0.4), A.RandomSolarize(), CHAIN):
        with pytest.raises(ValueError, match="augment first, normalise afterwards"):
            transform(images)
    assert A.RandomHorizontalFlip()(images).min() < -1


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: A.RandomResizedCrop(0), "size must be .*got 0"),
        (lambda: A.RandomResizedCrop(8, scale=(0.5, 0.1)), "scale must be"),
        (lambda: A.RandomResizedCrop(8, scale=0.5), "scale must be"),
        (lambda: A.RandomResizedCrop(8, scale=(0.5, 2.0)), "scale must be"),
        (lambda: A.RandomHorizontalFlip(1.5), "p must be .*got 1.5"),
        (lambda: A.ColorJitter(hue=0.6), "hue must be"),
        (lambda: A.ColorJitter(-0.1), "brightness must not be negative; got -0.1"),
        (lambda: A.ColorJitter(contrast=(1.5, 0.5)), "contrast must be"),
        (lambda: A.GaussianBlur(4), "odd and positive; got 4"),
        (lambda: A.GaussianBlur(3, sigma=0), "sigma must be"),
        (lambda: A.Mixup(0), "alpha must be positive; got 0"),
    ],
)
def test_bad_arguments_are_refused(make, wanted):
    with pytest.raises(ValueError, match=wanted):
        make()


def test_other_refusals():
    with pytest.raises(ValueError, match="1 or 3 channels; got 4"):
        A.ColorJitter(0.4)(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match="twice the side of images; got 9"):
        A.GaussianBlur(9)(torch.rand(2, 3, 4, 4))


# ----------------------------------------------------------------------------------- training


def test_batches_take_transforms_and_fit_takes_mixed_losses():
    data = load("fashion_mnist", split="test")[:64]
    change = A.Compose(A.RandomResizedCrop(20), A.RandomHorizontalFlip())
    images, _ = next(iter(data.batches(16, transform=change, generator=seeded())))
    again, _ = next(iter(data.batches(16, transform=change, generator=seeded())))
    assert images.shape == (16, 1, 20, 20) and torch.equal(images, again)
    config = ResNetConfig(depths=(1,), widths=(8,), stem="small", in_channels=1, num_classes=10)
    history = fit(ResNet(config), data.batches(16, transform=change), A.mixed_loss(A.CutMix()),
                  steps=2, precision="fp32")  # fmt: skip
    assert all(math.isfinite(loss) for loss in history.losses)
