"""Pretrained networks: the right weights, the right pixels, one interface, clear refusals."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlm_course.appendix.checkpoints import load_weights, save_weights
from vlm_course.appendix.files import data_folder
from vlm_course.foundations.images import load, to_float
from vlm_course.foundations.networks import ResNet, ResNetConfig
from vlm_course.self_supervised.rotation import linear_probe
from vlm_course.train import main
from vlm_course.transfer import pretrained
from vlm_course.transfer.pretrained import (
    LITE0_PACKAGE,
    LITE0_SHA256,
    EfficientNetLite,
    EfficientNetLiteConfig,
    PretrainedModel,
    Preprocessing,
    centre,
    efficientnet_lite0,
    from_run,
    from_timm,
    from_torchvision,
    lite0_names,
    load_pretrained,
    packaged_file,
    stage_names,
    take_classifier,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def lite0() -> PretrainedModel:
    return efficientnet_lite0(size=64).eval()


def tiny(**options) -> EfficientNetLite:
    torch.manual_seed(0)
    stages = ((1, 3, 1, 1, 8), (2, 3, 2, 2, 8), (2, 5, 1, 2, 12))
    return EfficientNetLite(EfficientNetLiteConfig(stages=stages, stem=8, embed_dim=16, **options))


# ------------------------------------------------------------------------------- the weights


def test_lite0_equals_timm(lite0):
    timm = pytest.importorskip("timm")
    peer = timm.create_model("tf_efficientnet_lite0").eval()
    ours = [*lite0.body.state_dict().values(), *lite0.head.state_dict().values()]
    peer.load_state_dict(dict(zip(peer.state_dict(), ours, strict=True)))
    for shape in ((2, 3, 64, 64), (1, 3, 97, 61), (1, 3, 33, 128)):
        x = noise(*shape) * 2 - 1
        with torch.no_grad():
            assert torch.allclose(lite0.head(lite0.body(x)), peer(x), rtol=0, atol=1e-5)


def test_gradient_equals_timm(lite0):
    timm = pytest.importorskip("timm")
    peer = timm.create_model("tf_efficientnet_lite0").eval()
    ours = [*lite0.body.state_dict().values(), *lite0.head.state_dict().values()]
    peer.load_state_dict(dict(zip(peer.state_dict(), ours, strict=True)))
    x = noise(1, 3, 48, 48)
    loss = nn.functional.cross_entropy(lite0.head(lite0.body(x)), torch.tensor([3]))
    theirs = nn.functional.cross_entropy(peer(x), torch.tensor([3]))
    weight = lite0.body.stem[0].weight
    got, wanted = torch.autograd.grad(loss, weight)[0], \
        torch.autograd.grad(theirs, peer.conv_stem.weight)[0]
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item() + 1e-7)


def test_lite0_knows_photographs(lite0):
    model = efficientnet_lite0(size=160).eval()
    photos = load("photos", size=160, split="all")
    stems = [name.rsplit("/")[-1].split(".")[0] for name in photos.column("file")]
    wanted = {"gorilla": "gorilla", "polar_bear": "ice bear", "koala": "koala",
              "cheetah": "cheetah", "hammer1": "hammer", "panda": "giant panda"}  # fmt: skip
    images = to_float(photos.images[[stems.index(stem) for stem in wanted]])
    with torch.no_grad():
        names = [model.classes[k] for k in model(images).argmax(1)]
    assert sum(a == b for a, b in zip(names, wanted.values(), strict=True)) >= 5


def test_package_file_is_checked():
    assert packaged_file(LITE0_PACKAGE, ".pth", sha256=LITE0_SHA256).is_file()
    with pytest.raises(ValueError, match="sha256.*wanted 0000"):
        packaged_file(LITE0_PACKAGE, ".pth", sha256="0000")
    with pytest.raises(ValueError, match="no file that ends in '.npz'"):
        packaged_file(LITE0_PACKAGE, ".npz", sha256="0000")
    with pytest.raises(ModuleNotFoundError, match="pip install no-such-weights"):
        packaged_file("no-such-weights", ".pth", sha256="0000")


def test_weights_are_read_without_running_them(monkeypatch):
    seen = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k) or real(*a, **k))
    efficientnet_lite0()
    assert seen and all(options["weights_only"] is True for options in seen)


def test_untrained_lite0_has_the_same_shape(lite0):
    other = efficientnet_lite0(pretrained=False)
    assert {k: v.shape for k, v in other.state_dict().items()} == \
        {k: v.shape for k, v in lite0.state_dict().items()}
    assert other.classes == []


def test_output_sizes_are_those_of_tensorflow():
    model = tiny(num_classes=0).eval()
    for side in (31, 32, 33):
        maps = model.intermediates(noise(1, 3, side, side))
        halves = [-(-side // s) for s in (2, 4, 8, 8)]
        assert [m.shape[-1] for m in maps.values()] == halves


# ------------------------------------------------------------------------------- preprocessing


def test_lite0_preprocessing_is_the_published_one(lite0):
    pixels = torch.randint(256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    got = lite0.preprocess(to_float(pixels.to(torch.uint8)))
    assert torch.allclose(got, (pixels - 127) / 128, atol=1e-6)


def test_preprocessing_equals_torchvision():
    models = pytest.importorskip("torchvision.models")
    for name in ("resnet18", "mobilenet_v3_small", "efficientnet_b0"):  # the last one is bicubic
        recipe = models.get_model_weights(name).DEFAULT.transforms()
        ours = from_torchvision(name, pretrained=False).preprocess
        for sides in ((300, 400), (256, 256), (333, 499), (499, 333), (257, 401), (101, 57)):
            images = noise(2, 3, *sides) / 2 + 0.25  # a cubic stays in [0, 1]
            assert torch.allclose(ours(images), recipe(images), atol=1e-5)


def test_preprocessing_equals_timms_but_for_rounding():
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    for name in ("resnet10t", "vit_tiny_patch16_224", "convnext_tiny"):
        theirs = create_transform(**resolve_data_config({}, model=timm.create_model(name)))
        ours = from_timm(name, pretrained=False).preprocess
        for sides in ((333, 499), (257, 401), (101, 57)):
            smooth = nn.functional.interpolate(noise(1, 3, 7, 9), sides, mode="bilinear")
            pixels = smooth.mul(255).round().to(torch.uint8)
            picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
            gap = (ours(to_float(pixels))[0] - theirs(picture)).abs().max().item()
            assert gap * min(ours.std) * 255 < 2  # PIL rounds twice to whole numbers


def test_the_positions_of_a_torchvision_vit_fit_its_recipe():
    with torch.device("meta"):
        model = from_torchvision("vit_h_14", pretrained=False).eval()
    assert model.preprocess.size == 518
    assert model(torch.empty(1, 3, 600, 700, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize(("options", "message"), [
    ({"size": 0}, "size must be at least 1 pixel; got 0"), ({"crop": 0.0}, "crop must be in"),
    ({"crop": 1.5}, r"crop must be in \(0, 1\].* got 1.5"),
    ({"interpolation": "nearest"}, "interpolation .* got 1.0 and 'nearest'"),
    ({"std": (1.0, 0.0, 1.0)}, "std above 0"), ({"mean": (0.5,)}, "one entry a channel")])
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**options)


@pytest.mark.parametrize(("images", "message"), [
    (noise(2, 3, 8, 8) * 255, r"images must be float in \[0, 1\].* got values in"),
    (noise(2, 3, 8, 8) - 0.5, r"images must be float in \[0, 1\]"),
    (noise(2, 3, 8, 8).where(torch.arange(2).view(2, 1, 1, 1) < 1, torch.nan),
     r"images must be finite; images \[1\]"),
    (noise(0, 3, 8, 8), "at least one picture"), (noise(3, 8, 8), "images must be")])
def test_pixels_that_are_none_are_refused(lite0, images, message):
    for call in (lite0, lite0.features, lite0.intermediates):
        with pytest.raises(ValueError, match=message):
            call(images)
    assert not any(module._forward_hooks for module in lite0.modules())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_keep_their_precision(interpolation, dtype):
    ours = Preprocessing(size=12, crop=0.75, interpolation=interpolation)
    images = noise(2, 3, 30, 41)
    got = ours(images.to(dtype))
    assert got.dtype == dtype and torch.allclose(got.float(), ours(images), atol=0.05)


def test_a_cubic_does_not_leave_the_unit_interval():
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    square = centre(edge, 20, interpolation="bicubic")
    assert square.min() == 0 and square.max() == 1


def test_one_picture_is_seen_as_in_a_batch_and_equal_ones_alike(lite0):
    images = noise(3, 3, 50, 70)
    with torch.no_grad():
        assert torch.allclose(lite0(images)[:1], lite0(images[:1]), atol=1e-4)
        same = lite0.features(torch.full((3, 3, 64, 64), 0.5))
    assert same.isfinite().all() and torch.allclose(same[0], same[2], atol=1e-6)


def test_grey_pictures_become_three_equal_channels(lite0):
    grey = noise(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(lite0(grey), lite0(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_refused(lite0, channels):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        lite0(noise(1, channels, 64, 64))


def test_integer_pixels_are_refused(lite0):
    with pytest.raises(ValueError, match="images must be"):
        lite0(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_centre_keeps_the_middle():
    images = torch.zeros(1, 1, 8, 16)
    images[..., 4:12] = 1
    assert centre(images, 8).eq(1).all()
    assert centre(noise(1, 3, 50, 20), 32, crop=0.875).shape == (1, 3, 32, 32)
    assert centre(noise(1, 3, 1, 1), 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_pictures_of_every_kind_are_classified(lite0, tmp_path, mode):
    pixels = Image.fromarray((noise(40, 60, 3).numpy() * 255).astype(np.uint8))
    if mode == "I;16":
        pixels = Image.fromarray((noise(40, 60).numpy() * 65535).astype(np.uint16))
    else:
        pixels = pixels.convert(mode)
    folder = tmp_path / "thing"
    folder.mkdir()
    pixels.save(folder / ("a.tif" if mode == "CMYK" else "a.png"))
    data = load(tmp_path, size=64)
    with torch.no_grad():
        assert lite0(to_float(data.images)).isfinite().all()


def test_turned_pictures_are_seen_upright(lite0, tmp_path):
    upright = Image.fromarray((noise(40, 60, 3).numpy() * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    for name in ("upright", "turned"):
        (tmp_path / name / "x").mkdir(parents=True)
    upright.save(tmp_path / "upright" / "x" / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned" / "x" / "a.png",
                                                      exif=exif)
    a, b = (load(tmp_path / name, size=64) for name in ("upright", "turned"))
    with torch.no_grad():
        assert torch.equal(lite0(to_float(a.images)), lite0(to_float(b.images)))


# ------------------------------------------------------------------------------- one interface


NAMES = ["efficientnet_lite0", "torchvision/resnet18", "torchvision/squeezenet1_0",
         "torchvision/vit_b_32", "timm/vit_tiny_patch16_224", "timm/resnet10t"]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in NAMES if "squeeze" not in n])
def test_every_source_answers_alike(name):
    model = load_pretrained(name, pretrained=False).eval()
    images = noise(2, 3, 80, 100)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, model.embed_dim)
        assert torch.equal(model(images), model.head(features))
        maps = model.intermediates(images)
    assert list(maps) == list(model.stages) and len(maps) >= 4
    assert isinstance(model.head, nn.Linear) and model.head.in_features == model.embed_dim
    assert not any(module._forward_hooks for module in model.modules())
    model.reset_head(3, classes=["a", "b", "c"])
    assert model(images).shape == (2, 3) and model.classes == ["a", "b", "c"]
    assert model.reset_head(0)(images).shape == (2, model.embed_dim)


def test_stages_cover_the_parameters():
    for name in ("torchvision/resnet18", "timm/vit_tiny_patch16_224"):
        model = load_pretrained(name, pretrained=False)
        inside = {key for key, _ in model.body.named_parameters()
                  if any(key.startswith(f"{stage}.") for stage in model.stages)}
        outside = {key for key, _ in model.body.named_parameters()} - inside
        assert outside <= {"cls_token", "pos_embed"}


@pytest.mark.parametrize("name", ["levit_128", "dla34"])  # two classifiers, and a convolution
def test_a_classifier_of_another_kind_in_timm_is_refused(name):
    pytest.importorskip("timm")
    with torch.device("meta"), pytest.raises(ValueError, match="linear classifier, and one alone"):
        from_timm(name, pretrained=False)


def test_names_of_no_lite0_are_refused():
    with pytest.raises(KeyError, match="layer1"):
        lite0_names({"layer1.weight": torch.zeros(1)})


def test_size_is_what_the_network_sees():
    model = load_pretrained("efficientnet_lite0", pretrained=False, size=32)
    assert model.preprocess(noise(1, 3, 99, 70)).shape == (1, 3, 32, 32)


def test_a_network_without_classifier_is_refused():
    with pytest.raises(ValueError, match="linear classifier"):
        take_classifier(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match="Conv2d at '0'"):
        take_classifier(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2)), "0")
    with pytest.raises(ValueError, match="linear classifier"):
        from_torchvision("squeezenet1_0", pretrained=False)


@pytest.mark.parametrize("name", ["resnet", "torchvision/", "nowhere/x", "/no/such/folder"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        load_pretrained(name)
    for make in (from_torchvision, from_timm):
        with pytest.raises(ValueError, match="name must be one of"):
            make("no_such_network")


def test_without_a_network_it_says_what_needs_none(monkeypatch):
    models = pytest.importorskip("torchvision.models")

    def fail(*args, **options):
        raise URLError("no route")

    monkeypatch.setattr(models, "get_model", fail)
    with pytest.raises(ConnectionError, match="efficientnet_lite0"):
        from_torchvision("resnet18")


def test_reset_head_refuses_names_that_do_not_fit(lite0):
    for number, names in ((3, ["a"]), (-1, [])):
        with pytest.raises(ValueError, match="num_classes must be"):
            lite0.reset_head(number, classes=names)


def test_weights_survive_saving(tmp_path):
    def make():
        body = tiny(num_classes=0)
        return PretrainedModel(body, embed_dim=16, preprocess=Preprocessing(size=32)).reset_head(4)

    model, other = make().eval(), make().eval()
    with torch.no_grad():
        model.head.weight.normal_()
    load_weights(other, save_weights(model, tmp_path / "model.safetensors"))
    images = noise(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(model(images), other(images))
    model.reset_head(5)
    with pytest.raises(ValueError, match=r"head.weight \(4, 16\) for \(5, 16\)"):
        load_weights(model, tmp_path / "model.safetensors")  # a head of the wrong size
    with pytest.raises(ValueError, match="missing .*unexpected"):
        load_weights(ResNet(ResNetConfig()), tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------- the course's runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for label in ("dark", "light"):
        (folder / label).mkdir()
        for i in range(8):
            pixels = noise(12, 12, 3, seed=i).numpy() * 100 + (150 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize(("method", "backbone"), [
    ("supervised", "resnet_mini"), ("simclr", "vit_mini"), ("mae", "vit_mini")])
def test_a_run_comes_back(pictures, tmp_path, method, backbone):
    out = tmp_path / "run"
    main([method, "--data", str(pictures), "--out", str(out), "--backbone", backbone, "--size",
          "12", "--batch_size", "8", "--steps", "2"])
    model = load_pretrained(out).eval()
    images = noise(2, 3, 12, 12)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, model.embed_dim)
        again = load_pretrained(out).eval().features(images)
    assert torch.equal(features, again)
    assert isinstance(model.head, nn.Linear) == (method == "supervised")
    assert stage_names(model.body) == list(model.stages)


def test_a_run_of_another_architecture_is_refused(pictures, tmp_path):
    out = tmp_path / "run"
    main(["supervised", "--data", str(pictures), "--out", str(out), "--size", "12",
          "--batch_size", "8", "--steps", "1"])  # fmt: skip
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("resnet_mini", "vit_mini"))
    with pytest.raises(ValueError, match="of another model: missing .*unexpected"):
        from_run(out)
    config.write_text("size: 12\n")
    with pytest.raises(ValueError, match="config must begin with '# method: .* got 'size: 12'"):
        from_run(out)
    (out / "backbone.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no backbone.safetensors"):
        from_run(out)


RUNS = ["simclr_resnet_mini", "simclr_vit_mini"]


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_are_the_documented_ones(name):
    folder = data_folder(f"runs/{name}")
    readme = (folder.parent / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((folder / "backbone.safetensors").read_bytes()).hexdigest()
    assert digest in readme
    steps = json.loads((folder / "results.json").read_text())["steps"]
    command = re.search(rf"python -m vlm_course.train simclr [^`]*{name}", readme)[0]
    assert f"--steps {steps}" in command.replace("\\\n", " ")


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_know_more_than_untrained_networks(name):
    model = load_pretrained(data_folder(f"runs/{name}")).eval()
    train, test = (load("emoji", size=32, split=part).where(style="noto")
                   for part in ("train", "test"))
    with torch.no_grad():
        a, b = (model.features(to_float(data.images)) for data in (train, test))
    c, d = (nn.functional.adaptive_avg_pool2d(to_float(data.images), 16).flatten(1)
            for data in (train, test))
    learned = linear_probe(a, train.labels, b, test.labels, ridge=0.1)
    pixels = linear_probe(c, train.labels, d, test.labels, ridge=0.1)
    torch.manual_seed(0)
    model.body.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    with torch.no_grad():
        a, b = (model.features(to_float(data.images)) for data in (train, test))
    assert learned > linear_probe(a, train.labels, b, test.labels, ridge=0.1) + 0.03
    assert name != "simclr_resnet_mini" or learned > pixels + 0.03


def test_preprocessing_is_replaced_not_changed(lite0):
    other = replace(lite0.preprocess, size=32)
    assert lite0.preprocess.size == 64 and other.size == 32
    assert pretrained.Preprocessing().mean == (0.485, 0.456, 0.406)
