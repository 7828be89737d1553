"""The loader against what the world holds: damaged files, odd formats, wrong arguments, peers."""
import gzip
import io
import pickle
import struct
import subprocess
import sys
import time
import urllib.error
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlm_course.foundations import images as I
from vlm_course.foundations.images import ImageSet, load


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def save(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 8) if array is None else array).save(path, **options)
    return path


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def bomb(width: int, height: int) -> bytes:
    """A complete, tiny PNG file that declares `width` x `height` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"\0"))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


@pytest.fixture
def toy() -> ImageSet:
    """Ten pictures of one pixel, each as bright as its number."""
    table = {"word": list("abcdefghij"), "half": [i // 5 for i in range(10)]}
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    return ImageSet(pixels, torch.arange(10) % 2, ["even", "odd"], "toy", table)


def numbers(batches) -> list[list[int]]:
    return [I.to_uint8(images).flatten().tolist() for images, _ in batches]


# ------------------------------------------------------------------------- one file, any format


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png"):
        I.read_image(tmp_path / "none.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path, suffix):
    whole = save(tmp_path / f"whole.{suffix}", noise(40, 40)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for share in (0, 0.05, 0.3, 0.6):
        path.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(ValueError, match=f"cannot read image.*cut.{suffix}"):
            I.read_image(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_damaged_bytes_are_read_or_refused_and_nothing_else(tmp_path, suffix):
    whole = bytearray(save(tmp_path / f"whole.{suffix}", noise(16, 16)).read_bytes())
    path, random = tmp_path / f"damaged.{suffix}", np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), size=4):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            assert I.read_image(path).mode == "RGB"
        except ValueError as error:
            assert path.name in str(error)


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("these are notes")
    with pytest.raises(ValueError, match="notes.jpg.*not an image"):
        I.read_image(path)


@pytest.mark.parametrize("side", [9_000, 60_000])  # below and above Pillow's own limit
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="bomb.png.*max_pixels=64000000.*bomb"):
        I.read_image(path)
    assert time.perf_counter() - start < 1
    with pytest.raises(ValueError, match="max_pixels=63"):
        I.read_image(save(tmp_path / "small.png"), max_pixels=63)
    assert I.read_image(tmp_path / "small.png", max_pixels=64).size == (8, 8)


def test_an_unknown_mode_is_named(tmp_path):
    with pytest.raises(ValueError, match="mode must be.*'HSV'"):
        I.read_image(save(tmp_path / "a.png"), mode="HSV")


def test_grey_files_get_three_equal_channels(tmp_path):
    grey = noise(6, 5, 1)
    read = np.asarray(I.read_image(save(tmp_path / "grey.png", grey)))
    assert read.shape == (6, 5, 3) and (read == grey[..., None]).all()
    assert (np.asarray(I.read_image(tmp_path / "grey.png", mode="L")) == grey).all()


def test_alpha_is_laid_on_white_or_kept(tmp_path):
    array = np.zeros((1, 3, 4), dtype=np.uint8)
    array[0, :, 3] = 0, 255, 51  # black, seen not at all, wholly, and by a fifth
    path = save(tmp_path / "alpha.png", array)
    assert np.asarray(I.read_image(path))[0, :, 0].tolist() == [255, 0, 204]
    assert np.asarray(I.read_image(path, mode="L"))[0].tolist() == [255, 0, 204]
    assert (np.asarray(I.read_image(path, mode="RGBA"))[..., 3] == array[..., 3]).all()


def test_a_transparent_palette_is_laid_on_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 200, 10, 20])
    picture.putdata([0, 1])
    picture.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(I.read_image(tmp_path / "palette.png")).tolist() == [
        [[255, 255, 255], [200, 10, 20]]]
    kept = np.asarray(I.read_image(tmp_path / "palette.png", mode="RGBA"))
    assert kept[0, :, 3].tolist() == [0, 255]


def test_a_plain_palette_gives_colours_and_not_numbers(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([250, 0, 0, 0, 0, 250])
    picture.putdata([0, 1])
    picture.save(tmp_path / "palette.png")
    assert np.asarray(I.read_image(tmp_path / "palette.png"))[0].tolist() == [
        [250, 0, 0], [0, 0, 250]]


def test_grey_transparency_and_grey_alpha(tmp_path):
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "key.png", transparency=0)
    assert np.asarray(I.read_image(tmp_path / "key.png", mode="L"))[0].tolist() == [255, 9]
    Image.fromarray(np.array([[[0, 0], [7, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert np.asarray(I.read_image(tmp_path / "la.png", mode="L"))[0].tolist() == [255, 7]


def test_cmyk_becomes_rgb(tmp_path):
    picture = Image.new("RGB", (16, 16), (200, 40, 60)).convert("CMYK")
    picture.save(tmp_path / "print.jpg", quality=100)
    read = I.read_image(tmp_path / "print.jpg")
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read)[8, 8].astype(int) - (200, 40, 60)).max() <= 6


def test_sixteen_bits_keep_their_range(tmp_path):
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for mode in ("L", "RGB"):
        read = np.asarray(I.read_image(tmp_path / "deep.png", mode=mode)).reshape(4, -1)
        assert read[:, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif.*floating-point"):
        I.read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("values", [[0, 255], [0, 100_000], [-5, 5]])
def test_32_bit_integers_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match="mask.tif.*no agreed range"):
        I.read_image(tmp_path / "mask.tif")


def test_one_bit_pictures_are_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert np.asarray(I.read_image(tmp_path / "bit.png", mode="L"))[0].tolist() == [255, 0]


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(I.read_image(tmp_path / "film.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_pictures_upright(tmp_path, orientation):
    upright = Image.fromarray(np.kron(noise(2, 3, seed=1), np.ones((16, 16, 1), np.uint8)))
    T = Image.Transpose
    stored = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
              6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    turned = upright.transpose(stored[orientation]) if orientation in stored else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "photo.png", exif=exif)
    assert (np.asarray(I.read_image(tmp_path / "photo.png")) == np.asarray(upright)).all()


def test_fit_covers_cuts_the_middle_and_stretches_nothing():
    array = np.zeros((10, 30, 3), np.uint8)
    array[:, 10:20] = 255  # the middle third is white
    assert (np.asarray(I.fit_to(Image.fromarray(array), 10)) == 255).all()
    assert I.fit_to(Image.fromarray(array), (4, 6)).size == (6, 4)
    with pytest.raises(ValueError, match="size must be at least 1 pixel"):
        I.fit_to(Image.fromarray(array), (0, 6))


# ------------------------------------------------------------------------------------- a folder


def test_class_subfolders_give_the_labels(tmp_path):
    for name in ("cats/a.png", "dogs/b.JPG", "cats/deep/c.webp"):
        save(tmp_path / name)
    data = load(tmp_path)
    assert data.classes == ["cats", "dogs"] and data.name == tmp_path.name
    assert dict(zip(data.column("file"), data.column("label"))) == {
        "cats/a.png": "cats", "cats/deep/c.webp": "cats", "dogs/b.JPG": "dogs"}
    assert (data.images.shape, data.images.dtype) == ((3, 3, 8, 8), torch.uint8)


def test_a_flat_folder_gives_one_class_and_exact_pixels(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(5, 7, seed=i))
    data = load(str(tmp_path))
    assert data.classes == [tmp_path.name] and data.labels.tolist() == [0, 0, 0]
    for i in range(3):
        assert (data.images[i].permute(1, 2, 0).numpy() == noise(5, 7, seed=i)).all()


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_modes_set_the_channels(tmp_path, mode, channels):
    save(tmp_path / "a.png")
    assert load(tmp_path, mode=mode).images.shape == (1, channels, 8, 8)
    assert load(tmp_path, mode=mode, size=(2, 3)).images.shape == (1, channels, 2, 3)


def test_split_subfolders(tmp_path):
    for name in ("train/x/a.png", "train/y/b.png", "test/x/c.png"):
        save(tmp_path / name)
    assert load(tmp_path, split="train").classes == ["x", "y"]
    assert len(load(tmp_path, split="test")) == 1 and len(load(tmp_path, split="all")) == 3
    with pytest.raises(FileNotFoundError, match="no subfolder 'val'.*ImageSet.split"):
        load(tmp_path, split="val")


def test_train_and_test_share_one_numbering_of_the_classes(tmp_path):
    for name in ("train/x/a.png", "train/y/b.png", "test/y/c.png", "test/z/d.png"):
        save(tmp_path / name)
    train, test, whole = (load(tmp_path, split=s) for s in ("train", "test", None))
    assert train.classes == test.classes == whole.classes == ["x", "y", "z"]
    assert test.labels.tolist() == [1, 2] and test.column("label") == ["y", "z"]
    assert whole.where(split="test").column("file") == ["test/y/c.png", "test/z/d.png"]
    with pytest.raises(FileNotFoundError, match="no subfolder 'val'"):
        load(tmp_path, split="val")


def test_a_folder_named_train_beside_others_is_a_class(tmp_path):
    for name in ("train/a.png", "bus/b.png", "loose.png"):
        save(tmp_path / name)
    assert load(tmp_path).classes == sorted(["bus", "train", tmp_path.name])
    assert load(tmp_path, split="train").column("file") == ["train/a.png"]


def test_a_skipped_file_does_not_renumber_the_classes(tmp_path):
    save(tmp_path / "b" / "good.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        data = load(tmp_path, on_error="skip")
    assert data.classes == ["a", "b"] and data.labels.tolist() == [1]


def test_linked_class_folders_are_followed_and_circles_are_not(tmp_path):
    save(tmp_path / "store" / "x" / "a.png")
    (tmp_path / "set" / "y").mkdir(parents=True)
    save(tmp_path / "set" / "y" / "b.png")
    (tmp_path / "set" / "x").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "set" / "y" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load(tmp_path / "set")
    assert data.column("file")[0] == "x/a.png" and data.classes == ["x", "y"]
    assert len(data) == 2


def test_formats_that_are_not_read_are_not_dropped_in_silence(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"from a telephone")
    with pytest.warns(UserWarning, match="1 files such as 'IMG_0001.HEIC'.*JPEG or PNG"):
        assert len(load(tmp_path)) == 1


@pytest.mark.parametrize("suffix", ["jfif", "ppm", "tga", "JPEG"])
def test_less_common_formats_are_found(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}")
    assert len(load(tmp_path)) == 1


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert load(".").classes == [tmp_path.name]


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    path = save(tmp_path / "a.png")
    for name in (path, str(path)):
        with pytest.raises(NotADirectoryError, match="a.png' is a file.*read_image"):
            load(name)


def test_a_name_that_is_none_is_refused():
    for name in (None, 5, "", ["emoji"]):
        with pytest.raises(ValueError, match="name must be the name of a data set, or a folder"):
            load(name)


@pytest.mark.parametrize("size", [2.0, "2", (2, 3, 4), (2,), (2.5, 2), None])
def test_sizes_that_are_no_whole_numbers_are_refused(size):
    images = torch.zeros(1, 4, 4, 4)
    for function in (I.resize, I.resize_rgba):
        with pytest.raises(ValueError, match="size must be one whole number.*got"):
            function(images, size)
    with pytest.raises(ValueError, match="size must be one whole number.*got"):
        I.fit_to(Image.new("RGB", (4, 4)), size)


def test_whole_numbers_of_any_kind_are_sizes(tmp_path):
    save(tmp_path / "a.png")
    for size in (2, np.int64(2), torch.tensor(2), [2, 2], torch.Size((2, 2))):
        assert I.resize(torch.zeros(1, 3, 4, 4), size).shape[-2:] == (2, 2)
        assert load(tmp_path, size=size).images.shape[-2:] == (2, 2)


@pytest.mark.parametrize("name", ["emoji", "photos", "fashion_mnist"])
def test_no_set_takes_size_zero_for_its_own_size(name):
    with pytest.raises(ValueError, match="size must be at least 1 pixel"):
        load(name, size=0)


def test_hidden_and_other_files_are_ignored(tmp_path):
    for name in ("a.png", ".hidden.png", ".cache/b.png", "x/.thumbs/c.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    assert load(tmp_path).column("file") == ["a.png"]


def test_a_missing_folder_is_named(tmp_path):
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError, match="no folder.*nowhere"):
            load(name)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*holds no pictures.*[.]png"):
        load(tmp_path)


def test_several_sizes_need_a_size(tmp_path):
    save(tmp_path / "a.png", noise(8, 8))
    save(tmp_path / "b.png", noise(8, 9))
    with pytest.raises(ValueError, match=r"2 different sizes.*\(8, 9\).*size="):
        load(tmp_path)
    assert load(tmp_path, size=4).images.shape == (2, 3, 4, 4)


def test_a_bad_file_stops_or_is_skipped_and_counted(tmp_path):
    save(tmp_path / "good.png")
    save(tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "bomb.png").write_bytes(bomb(60_000, 60_000))
    with pytest.raises(ValueError, match="bomb.png"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="skipped 2 of 3 files"):
        data = load(tmp_path, on_error="skip")
    assert data.column("file") == ["good.png"]
    assert [name.rsplit("/")[-1] for name in data.skipped] == ["bomb.png", "cut.png"]
    (tmp_path / "good.png").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 2 files"):
        load(tmp_path, on_error="skip")
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip"'):
        load(tmp_path, on_error="ignore")


# ---------------------------------------------------------------------------- sets by their name


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'emojis'.*'emoji', 'photos', 'fashion_mnist'.*'CIFAR10'"):
        load("emojis")


@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), RuntimeError("no file")])
def test_without_a_network_the_offline_sets_are_named(tmp_path, monkeypatch, failure):
    from torchvision.datasets import CIFAR10

    def download(self):
        raise failure

    monkeypatch.setattr(CIFAR10, "download", download)
    with pytest.raises(ConnectionError, match="'CIFAR10'.*'emoji', 'photos', 'fashion_mnist'"):
        load("CIFAR10", root=tmp_path)


class Fake:
    """Stands for a torchvision data set that is already there."""

    classes = ["zero", "one"]

    def __init__(self, root, download, **arguments):
        assert not download
        self.train = arguments["train"]

    def __iter__(self):
        pictures = [noise(6, 6 if self.train else 8, seed=i) for i in range(2)]
        return iter([(Image.fromarray(p), label) for label, p in enumerate(pictures)])


def test_a_torchvision_set_that_is_there_is_not_downloaded(monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load("CIFAR10")
    assert data.classes == ["zero", "one"] and data.labels.tolist() == [0, 1]
    assert (data.images[1].permute(1, 2, 0).numpy() == noise(6, 6, seed=1)).all()
    assert len(load("CIFAR10", split="all", size=4)) == 4
    assert load("CIFAR10", split="test", mode="L").images.shape == (2, 1, 6, 8)
    with pytest.raises(ValueError, match="different sizes; pass size="):
        load("CIFAR10", split="all")
    with pytest.raises(ValueError, match=r"\['train', 'test', 'all'\]; got 'val'"):
        load("CIFAR10", split="val")


def test_every_torchvision_name_exists():
    import torchvision.datasets

    assert all(hasattr(torchvision.datasets, name) for name in I.TORCHVISION)


def test_the_data_folder_can_be_elsewhere(tmp_path, monkeypatch):
    shipped = I.data_folder("fashion_mnist")
    (tmp_path / "fashion_mnist").symlink_to(shipped)
    monkeypatch.setenv("VLM_COURSE_DATA", str(tmp_path))
    assert I.data_folder("fashion_mnist") == tmp_path / "fashion_mnist"
    assert len(load("fashion_mnist")) == 6000
    with pytest.raises(FileNotFoundError, match=f"'emoji'.*{tmp_path.name}.*VLM_COURSE_DATA"):
        load("emoji")


def test_a_wrong_data_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_COURSE_DATA", str(tmp_path / "nowhere"))
    for name, options in (("emoji", {}), ("photos", {"size": 8}), ("fashion_mnist", {})):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load(name, **options)


@pytest.fixture(scope="module")
def emoji() -> ImageSet:
    start = time.process_time()
    data = load("emoji", size=32, split="all")
    assert time.process_time() - start < 10
    return data


def test_emoji_are_1599_concepts_in_four_styles(emoji):
    assert len(emoji) == 4 * 1599 and emoji.images.shape[1:] == (3, 32, 32)
    assert len(emoji.classes) == 8 and emoji.column("group") == emoji.column("label")
    per_style = [emoji.where(style=style) for style in I.EMOJI_STYLES]
    assert all(len(set(part.column("concept"))) == 1599 for part in per_style)
    assert all(part.column("concept") == per_style[0].column("concept") for part in per_style)
    assert len(set(emoji.column("subgroup"))) == 95
    for column in ("name_en", "tags_en", "name_zh", "tags_zh"):
        assert len(emoji.column(column)) == len(emoji)
    assert all(emoji.column("name_en")) and all(emoji.column("name_zh"))
    index = per_style[0].column("name_en").index("fox")
    assert per_style[0].column("emoji")[index] == "🦊"


def test_the_emoji_split_is_by_family(emoji):
    train, test = load("emoji", size=8), load("emoji", size=8, split="test")
    assert len(train) + len(test) == len(emoji) and 0.2 < len(test) / len(emoji) < 0.4
    for column in ("concept", "family"):
        assert not set(train.column(column)) & set(test.column(column))
    assert set(train.column("label")) == set(test.column("label")) == set(emoji.classes)
    assert emoji.where(split="test").column("concept") == test.column("concept")
    assert emoji.where(split="test").column("style") == test.column("style")
    with pytest.raises(ValueError, match=r"'emoji' must be one of \['test', 'train', 'all'\]"):
        load("emoji", split="val")


def test_rgba_emoji_have_clear_corners_and_agree_with_rgb():
    clear, white = load("emoji", split="test", mode="RGBA"), load("emoji", split="test")
    assert clear.images.shape[1:] == (4, 64, 64)
    assert torch.equal(I.composite(clear.images), white.images)
    alpha = clear.images[:, 3]
    assert (alpha[:, 0, 0] == 0).float().mean() > 0.8  # a corner is seldom drawn on
    assert (alpha.flatten(1).amax(1) == 255).float().mean() > 0.99  # and something is opaque
    partly = ((alpha > 0) & (alpha < 255)).float().mean()
    assert 0.01 < partly < 0.5  # edges are smooth
    small = load("emoji", size=24, split="test", mode="RGBA").images
    difference = I.composite(small).int() - I.resize(white.images, 24).int()
    assert difference.abs().max() <= 3  # the order of resizing and compositing is free
    with pytest.raises(ValueError, match="mode.*'L'"):
        load("emoji", mode="L")


def test_photos_need_a_size_and_carry_their_licence():
    with pytest.raises(ValueError, match="photos.*size="):
        load("photos")
    data, train = load("photos", size=(24, 32), split="all"), load("photos", size=8)
    test = load("photos", size=8, split="test")
    assert data.images.shape[1:] == (3, 24, 32) and len(train) + len(test) == len(data) > 100
    assert not set(train.column("file")) & set(test.column("file"))
    for column in ("author", "licence", "source"):
        assert all(data.column(column))
    assert data.column("category") == data.column("label")
    assert load("photos", size=8, mode="L").images.shape[1] == 1


def test_fashion_mnist_is_balanced():
    train, test = load("fashion_mnist"), load("fashion_mnist", split="test")
    assert train.images.shape == (6000, 1, 28, 28) and test.images.shape == (1000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [600] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert len(load("fashion_mnist", split="all", size=14)) == 7000
    colour = load("fashion_mnist", split="test", mode="RGB").images
    assert torch.equal(colour, test.images.expand(-1, 3, -1, -1)) and colour.is_contiguous()
    for options in ({"mode": "RGBA"}, {"split": "val"}):
        with pytest.raises(ValueError, match="must be"):
            load("fashion_mnist", **options)


def test_an_installed_full_fashion_mnist_is_served(tmp_path, monkeypatch):
    for stem, count in (("train", 5), ("t10k", 3)):
        for kind, array in (("images-idx3", noise(count, 28, 28)),
                            ("labels-idx1", np.arange(count, dtype=np.uint8))):
            header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
            with gzip.open(tmp_path / f"{stem}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    monkeypatch.setattr(I, "FULL_FASHION_MNIST", tmp_path)
    data = load("FashionMNIST")
    assert data.name == "FashionMNIST" and data.images.shape == (5, 1, 28, 28)
    assert (data.images[:, 0].numpy() == noise(5, 28, 28)).all()
    assert data.labels.tolist() == [0, 1, 2, 3, 4] and data.classes == I.FASHION_CLASSES
    assert len(load("FashionMNIST", split="all")) == 8
    assert len(load("fashion_mnist")) == 6000


# ------------------------------------------------------------------------------------- ImageSet


@pytest.mark.parametrize("index, expected", [
    (3, [3]), (-1, [9]), (np.int64(2), [2]), ([4, 4, 0], [4, 4, 0]), ([], []), ((1, 2), [1, 2]),
    (slice(2, 5), [2, 3, 4]), (slice(None, None, -3), [9, 6, 3, 0]), (slice(0, 0), []),
    (range(3), [0, 1, 2]), (np.array([7, 8]), [7, 8]), (np.arange(10) % 5 == 0, [0, 5]),
    (torch.tensor([5, -1]), [5, 9]), (torch.tensor(6), [6]), (torch.arange(10) > 7, [8, 9]),
    (torch.tensor([], dtype=torch.long), []), ([True] + [False] * 9, [0]),
])
def test_indexing_keeps_pixels_labels_and_table_together(toy, index, expected):
    part = toy[index]
    assert part.images.flatten().tolist() == expected
    assert part.labels.tolist() == [i % 2 for i in expected]
    assert part.column("word") == ["abcdefghij"[i] for i in expected]
    assert part.classes == toy.classes and part.labels.dtype == torch.int64


@pytest.mark.parametrize("index", [10, -11, [0, 99], [True, False], "word", 1.5])
def test_wrong_indices_are_refused(toy, index):
    with pytest.raises(IndexError):
        toy[index]


def test_a_part_is_a_copy(toy):
    toy[:2].images.zero_()
    assert toy.images[1] == 1


def test_where(toy):
    assert toy.where(word="c").images.flatten().tolist() == [2]
    assert toy.where(word=["c", "a"], half=0).images.flatten().tolist() == [0, 2]
    assert toy.where(half=1, label="odd").images.flatten().tolist() == [5, 7, 9]
    assert toy.where(word=lambda word: word > "h").images.flatten().tolist() == [8, 9]
    assert len(toy.where(word="z")) == 0 and len(toy.where()) == 10
    with pytest.raises(KeyError, match=r"'toy' has no column 'style'.*'label', 'word', 'half'"):
        toy.where(style="noto")


def test_relabel(toy):
    other = toy.relabel("half")
    assert other.classes == ["0", "1"] and other.labels.tolist() == [0] * 5 + [1] * 5
    assert toy.classes == ["even", "odd"]  # unchanged
    assert toy.where(label="odd").relabel("label").classes == ["odd"]
    with pytest.raises(KeyError, match="no column 'group'"):
        toy.relabel("group")


def test_an_unknown_value_in_a_column_comes_last(toy):
    toy.table["style"] = [None, "b", "a"] + [None] * 7
    assert toy.relabel("style").classes == ["a", "b", "None"]
    first, second = toy.split(0.5, generator=seeded(), by="style")
    assert len(first) + len(second) == 10
    assert toy.where(half=np.array([1])).column("word") == list("fghij")


def test_split_is_disjoint_complete_and_replayed(toy):
    first, second = toy.split(0.7, generator=seeded())
    assert len(first) == 7
    assert sorted(first.column("word") + second.column("word")) == toy.column("word")
    again, _ = toy.split(0.7, generator=seeded())
    other, _ = toy.split(0.7, generator=seeded(1))
    assert again.column("word") == first.column("word") != other.column("word")
    first, second = toy.split(0.5, generator=seeded(), by="half")
    assert len(set(first.column("half"))) == len(set(second.column("half"))) == 1
    for fraction in (0, 1, 1.5, -0.1):
        with pytest.raises(ValueError, match="fraction must be strictly between 0 and 1"):
            toy.split(fraction, generator=seeded())
    for fraction in (0.01, 0.99):
        with pytest.raises(ValueError, match=f"fraction {fraction} of 10 leaves a part empty"):
            toy.split(fraction, generator=seeded())


def test_parts_that_do_not_fit_are_refused():
    pixels = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\) uint8.*float32"):
        ImageSet(pixels.float(), torch.tensor([0, 0]), ["a"])
    with pytest.raises(ValueError, match="2 entries.*got 1 labels"):
        ImageSet(pixels, torch.tensor([0]), ["a"])
    with pytest.raises(ValueError, match=r"wrong columns \['word'\]"):
        ImageSet(pixels, torch.tensor([0, 0]), ["a"], table={"word": ["one"]})
    for labels in ([0, 1], [-1, 0]):
        with pytest.raises(ValueError, match=r"labels must be in 0..0 \(1 classes\)"):
            ImageSet(pixels, torch.tensor(labels), ["a"])
    for labels, got in ((torch.tensor([0, 0], dtype=torch.int32), "torch.int32"),
                        ([0, 0], "list"), (torch.tensor([[0], [0]]), r"torch.int64 \(2, 1\)")):
        with pytest.raises(ValueError, match=f"labels must be .* int64; got {got}"):
            ImageSet(pixels, labels, ["a"])


def test_a_set_can_be_pickled(toy):
    other = pickle.loads(pickle.dumps(toy))
    assert torch.equal(other.images, toy.images) and other.table == toy.table
    assert repr(other) == repr(toy) == (
        "ImageSet('toy': 10 x (1, 1, 1) uint8, 2 classes, columns word, half)")


# -------------------------------------------------------------------------------------- batches


def test_an_epoch_holds_every_image_once(toy):
    batches = toy.batches(4, drop_last=False)
    epoch = numbers(batches)
    assert [len(batch) for batch in epoch] == [4, 4, 2] and len(batches) == 3
    assert sorted(sum(epoch, [])) == list(range(10)) != sum(epoch, [])
    assert [len(batch) for batch in numbers(toy.batches(4))] == [4, 4]  # shuffling drops the rest
    assert numbers(toy.batches(4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(toy.batches(4, shuffle=False, drop_last=True)) == 2


def test_images_are_float_and_go_with_their_labels(toy):
    for images, labels in toy.batches(3):
        assert images.dtype == torch.float32 and images.shape == (3, 1, 1, 1) and images.max() <= 1
        assert labels.dtype == torch.int64
        assert torch.equal(I.to_uint8(images).flatten().long() % 2, labels)


def test_a_seed_is_replayed_and_epochs_differ(toy):
    one, two = toy.batches(3, generator=seeded(5)), toy.batches(3, generator=seeded(5))
    epochs = [numbers(one) for _ in range(3)]
    assert epochs == [numbers(two) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert numbers(toy.batches(3, generator=seeded(6))) != epochs[0]
    assert numbers(toy.batches(3)) == numbers(toy.batches(3, generator=seeded(0)))


def test_the_global_generator_is_not_touched(toy):
    before = torch.get_rng_state()
    numbers(toy.batches(3))
    assert torch.equal(before, torch.get_rng_state())


def jitter(images, generator):
    return images + torch.rand(images.shape, generator=generator)


@pytest.mark.parametrize("stop", range(0, 8))
def test_resume_anywhere_in_two_epochs(toy, stop):
    def new():
        return toy.batches(3, generator=seeded(2), drop_last=False, transform=jitter)

    unbroken, whole = [], new()
    for _ in range(3):
        unbroken += [images for images, _ in whole]
    first, seen = new(), 0
    state = first.state_dict()
    for _ in range(2):
        for _batch in first:
            if seen == stop:
                break
            seen += 1
            state = pickle.loads(pickle.dumps(first.state_dict()))
        if seen == stop:
            break
    second, rest = new(), []
    second.load_state_dict(state)
    while len(rest) < len(unbroken) - stop:
        rest += [images for images, _ in second]
    assert all(torch.equal(a, b) for a, b in zip(unbroken[stop:], rest))


def test_after_an_epoch_the_next_one_comes_whole(toy):
    first = toy.batches(5, generator=seeded())
    numbers(first)
    second = toy.batches(5, generator=seeded())
    second.load_state_dict(first.state_dict())
    epoch = numbers(second)
    assert len(epoch) == 2 and epoch == numbers(first)


def test_a_generator_that_the_loop_draws_from_resumes_too(toy):
    def draws(batches, generator, states):
        values = []
        for _ in range(2):
            for _batch in batches:
                values.append(torch.rand((), generator=generator).item())
                states.append(batches.state_dict())
        return values

    generator, other, states = seeded(4), seeded(99), []
    unbroken = draws(toy.batches(5, generator=generator), generator, states)
    resumed = toy.batches(5, generator=other)
    resumed.load_state_dict(states[0])
    assert draws(resumed, other, []) == unbroken[1:]


def test_a_break_in_the_middle_starts_a_new_epoch(toy):
    batches = toy.batches(2, generator=seeded())
    first = next(iter(batches))[0]
    epoch = numbers(batches)
    assert len(epoch) == 5 and sorted(sum(epoch, [])) == list(range(10))
    assert I.to_uint8(first).flatten().tolist() != epoch[0]


@pytest.mark.parametrize("world", [2, 4])
def test_shards_make_up_the_global_batch(toy, world):
    data = toy[list(range(10)) * 2]

    def make():
        return data.batches(8, generator=seeded(1))

    shares = [numbers(make().shard(rank, world)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*shares)] == numbers(make())
    assert all(len(batch) == 8 // world for share in shares for batch in share)
    with pytest.raises(ValueError, match="multiple of the 3 processes; got 8"):
        make().shard(0, 3)


def test_a_process_outside_the_world_is_refused(toy):
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank must be in 0..{world - 1} .*got {rank}"):
            toy.batches(4, shuffle=False).shard(rank, world)


def test_shards_of_an_evaluation_count_every_image_once(toy):
    shares = [numbers(toy.batches(4, shuffle=False).shard(rank, 3)) for rank in range(3)]
    assert sorted(sum((sum(share, []) for share in shares), [])) == list(range(10))


def test_shards_are_augmented_differently(toy):
    seeds = []
    for rank in range(2):
        def note(images, generator):
            seeds.append(generator.initial_seed())
            return images

        list(toy.batches(2, generator=seeded(), transform=note).shard(rank, 2))
    assert len(set(seeds)) == len(seeds) == 10


def test_the_transform_gets_the_whole_float_batch_and_a_fresh_cpu_generator(toy):
    calls = []

    def transform(images, generator):
        calls.append((images.shape, images.dtype, generator.device.type, generator.initial_seed()))
        return images * 0

    for images, _ in toy.batches(5, transform=transform):
        assert not images.any()
    assert {call[:3] for call in calls} == {((5, 1, 1, 1), torch.float32, "cpu")}
    assert len({call[3] for call in calls}) == 2


def test_wrong_batches_are_refused(toy):
    for size in (0, -1, 2.5, "4"):
        with pytest.raises(ValueError, match="batch_size must be a positive integer"):
            toy.batches(size)
    with pytest.raises(ValueError, match="batch_size 11 does not fit 10 images.*drop_last=False"):
        toy.batches(11)
    assert len(toy.batches(11, drop_last=False)) == 1
    assert len(toy.batches(np.int64(5))) == 2
    with pytest.raises(ValueError, match="does not fit 0 images"):
        toy[[]].batches(2, drop_last=False)

    class OnGPU:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator must be a CPU generator; got one on cuda"):
        toy.batches(2, generator=OnGPU())


# ------------------------------------------------------------------------- pixels: conversions


def test_conversions_are_inverse_and_checked():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(I.to_uint8(I.to_float(every)), every)
    clipped = I.to_uint8(torch.tensor([-1.0, 0.5, 2.0]).view(1, 1, 1, 3))
    assert clipped.flatten().tolist() == [0, 128, 255]
    for wrong, got in ((every.float(), "torch.float32"), (every[0], r"\(1, 16, 16\) torch.uint8"),
                       (every.numpy(), "ndarray"), (every.long(), "torch.int64")):
        with pytest.raises(ValueError, match=rf"\(B, C, H, W\) uint8 in 0..255; got .*{got}"):
            I.to_float(wrong)
    with pytest.raises(ValueError, match=r"float in \[0, 1\]; got \(1, 1, 16, 16\) torch.uint8"):
        I.to_uint8(every)
    with pytest.raises(ValueError, match=r"uint8 in 0..255 or float in \[0, 1\]; got .*int64"):
        I.resize(every.long(), 4)


def test_normalising_is_undone_by_its_inverse():
    images = torch.from_numpy(noise(40, 40)).permute(2, 0, 1)[None]
    images[:, 0] //= 3
    mean, std = I.channel_statistics(images)
    exact = images.double() / 255
    assert torch.allclose(mean.double(), exact.mean((0, 2, 3)), atol=1e-7)
    assert torch.allclose(std.double(), exact.std((0, 2, 3), correction=0), atol=1e-7)
    z = I.normalize(I.to_float(images), mean=mean, std=std)
    assert z.mean((0, 2, 3)).abs().max() < 1e-5
    assert (z.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert torch.equal(I.to_uint8(I.denormalize(z, mean=mean, std=std)), images)
    assert torch.allclose(I.normalize(I.to_float(images), mean=[0.5], std=0.5),
                          I.to_float(images) * 2 - 1)
    with pytest.raises(ValueError, match="mean must have one value a channel, 3; got 2"):
        I.normalize(I.to_float(images), mean=[0, 0], std=[1, 1, 1])
    with pytest.raises(ValueError, match="std must be positive"):
        I.normalize(I.to_float(images), mean=[0, 0, 0], std=[1, 0, 1])


# ---------------------------------------------------------------------- pixels: resize and alpha


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(7, 9), (33, 40), (20, 50), (64, 61), 16, (1, 1)])
def test_resize_equals_its_matrices_and_torch(size, antialias):
    images = torch.rand(2, 3, 33, 40, generator=seeded())
    H, W = (size, size) if isinstance(size, int) else size
    ours = I.resize(images, size, antialias=antialias)
    theirs = F.interpolate(images, (H, W), mode="bilinear", antialias=antialias)
    assert torch.equal(ours, theirs if (H, W) != (33, 40) else images)
    rows = I.resize_matrix(33, H, antialias=antialias)
    columns = I.resize_matrix(40, W, antialias=antialias)
    assert torch.allclose(rows @ images @ columns.T, ours, atol=1e-5)
    assert torch.allclose(rows.sum(1), torch.ones(H))


@pytest.mark.parametrize("size", [(7, 9), (33, 20), (70, 61)])
def test_resize_equals_pillow_within_rounding(size):
    array = noise(33, 40)
    ours = I.resize(torch.from_numpy(array).permute(2, 0, 1)[None], size)
    pillow = Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR)
    difference = ours[0].permute(1, 2, 0).int().numpy() - np.asarray(pillow).astype(int)
    assert ours.dtype == torch.uint8 and np.abs(difference).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resize_keeps_every_float_type(dtype):
    images = torch.rand(1, 4, 9, 9, generator=seeded()).to(dtype)
    for function in (I.resize, I.resize_rgba):
        small = function(images, 4)
        assert small.dtype == dtype
        assert torch.allclose(small.float(), function(images.float(), 4), atol=1e-2)


def test_resize_refuses_an_empty_size():
    for size in (0, (3, 0), (-1, 2)):
        with pytest.raises(ValueError, match="size must be at least 1 pixel"):
            I.resize(torch.zeros(1, 1, 4, 4), size)


def test_composite_follows_the_equation():
    rgba = torch.rand(2, 4, 3, 3, generator=seeded())
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    backs = (0.3, torch.tensor([0.1, 0.5, 0.9]), torch.rand(2, 3, 3, 3, generator=seeded(1)))
    for back in backs:
        wide = torch.as_tensor(back)
        wide = wide.view(1, 3, 1, 1) if wide.ndim == 1 else wide
        assert torch.allclose(I.composite(rgba, back), alpha * colour + (1 - alpha) * wide)
    stored = torch.tensor([0, 100, 200, 51], dtype=torch.uint8).view(1, 4, 1, 1)
    assert I.composite(stored).flatten().tolist() == [204, 224, 244]
    assert I.composite(stored, 0.0).flatten().tolist() == [0, 20, 40]
    with pytest.raises(ValueError, match=r"images must be \(B, 4, H, W\).*\(2, 3, 3, 3\)"):
        I.composite(colour)


def test_resizing_alpha_leaves_no_fringe():
    rgba = torch.zeros(1, 4, 16, 16)
    rgba[:, :, 4:12, 4:12] = 1  # a white square; black where nothing is seen
    assert I.composite(I.resize_rgba(rgba, 7), 1.0).min() > 0.999
    assert I.composite(I.resize(rgba, 7), 1.0).min() < 0.9  # what it avoids
    for background in (0.0, 0.6):
        after = I.resize(I.composite(rgba, background), 7)
        assert torch.allclose(I.composite(I.resize_rgba(rgba, 7), background), after, atol=1e-5)
    stored = I.to_uint8(rgba)
    assert torch.equal(I.resize_rgba(stored, 16), stored)
    with pytest.raises(ValueError, match="alpha last"):
        I.resize_rgba(rgba[:, :3], 7)


def test_nearest_is_the_brute_force_answer():
    queries, keys = torch.rand(50, 8, generator=seeded()), torch.rand(70, 8, generator=seeded(1))
    assert torch.equal(I.nearest(queries, keys, chunk=7), torch.cdist(queries, keys).argmin(1))
    assert torch.equal(I.nearest(keys, keys), torch.arange(70))


# -------------------------------------------------------------------------------------- figures


def rendered(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_a_grid_shows_every_pixel_as_a_square_of_whole_dots():
    images = torch.from_numpy(noise(5, 6)).permute(2, 0, 1)[None].repeat(3, 1, 1, 1)
    shown = rendered(I.show_images(images, columns=2, width=1.0))
    factor = (150 // 2 - I.GAP) // 6
    large = np.kron(noise(5, 6), np.ones((factor, factor, 1), np.uint8))
    assert shown.shape == (2 * 5 * factor + I.GAP, 2 * 6 * factor + I.GAP, 3)
    assert (shown[:5 * factor, :6 * factor] == large).all()
    assert (shown[:5 * factor, -6 * factor:] == large).all()
    assert (shown[-5 * factor:, -6 * factor:] == 255).all()  # an empty place is white


def test_rows_without_titles_take_no_room_for_them():
    images = torch.rand(4, 3, 4, 4, generator=seeded())
    plain = rendered(I.show_images(images, columns=2)).shape[0]
    one, both = (rendered(I.show_images(images, columns=2, titles=t)).shape[0]
                 for t in (["a", "b", "", ""], ["a", "b", "c", "d"]))
    assert plain < one < both and both - one == one - plain
    with pytest.raises(ValueError, match="columns must be at least 1; got 0"):
        I.show_images(images, columns=0)


def test_a_grid_takes_sets_floats_grey_and_alpha(toy):
    for images in (toy, torch.rand(2, 1, 4, 4), torch.rand(2, 4, 300, 200)):
        assert I.show_images(images, titles=["a title"] * len(images), title="all").axes
    for wrong in (torch.rand(2, 2, 4, 4), torch.rand(0, 3, 4, 4)):
        with pytest.raises(ValueError, match="images must be one or more pictures of 1, 3 or 4"):
            I.show_images(wrong)
    with pytest.raises(ValueError, match="titles must be one a picture, 10; got 1"):
        I.show_images(toy, titles=["one"])


def test_figures_with_pictures_are_png_and_others_svg():
    import matplotlib.pyplot as plt

    with plt.rc_context():
        I.use_course_style()
        figure, axis = plt.subplots()
        axis.plot([0, 1])
        assert I._draw(figure, "png") is None and "<svg" in I._draw(figure, "svg")
        plt.close(figure)
    pictures = I.show_images(torch.rand(1, 3, 4, 4))
    assert I._draw(pictures, "svg") is None
    shown = np.asarray(Image.open(io.BytesIO(I._draw(pictures, "png"))).convert("RGB"))
    assert (shown == rendered(pictures)).all()  # smaller, and the same picture


def test_the_import_is_light():
    code = ("import sys, vlm_course.foundations.images; "
            "print([m for m in ('matplotlib', 'torchvision', 'accelerate', 'nbdev', 'fastcore', "
            "'IPython') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
