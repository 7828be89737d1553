"""Reading files against what the world holds: damaged ones, odd forms, folders, no network."""
import gzip
import struct
import subprocess
import sys
import time
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from pictures import bomb, noise, save

from vlm_course.appendix import files
from vlm_course.foundations.images import load


# ------------------------------------------------------------------------- one file, any format


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png"):
        files.read_image(tmp_path / "none.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path, suffix):
    whole = save(tmp_path / f"whole.{suffix}", noise(40, 40)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for share in (0, 0.05, 0.3, 0.6):
        path.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(ValueError, match=f"cannot read image.*cut.{suffix}"):
            files.read_image(path)


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
            assert files.read_image(path).mode == "RGB"
        except ValueError as error:
            assert path.name in str(error)


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("these are notes")
    with pytest.raises(ValueError, match="notes.jpg.*not an image"):
        files.read_image(path)


@pytest.mark.parametrize("side", [9_000, 60_000])  # below and above Pillow's own limit
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="bomb.png.*max_pixels=64000000.*bomb"):
        files.read_image(path)
    assert time.perf_counter() - start < 1
    with pytest.raises(ValueError, match="max_pixels=63"):
        files.read_image(save(tmp_path / "small.png"), max_pixels=63)
    assert files.read_image(tmp_path / "small.png", max_pixels=64).size == (8, 8)


def test_an_unknown_mode_is_named(tmp_path):
    with pytest.raises(ValueError, match="mode must be.*'HSV'"):
        files.read_image(save(tmp_path / "a.png"), mode="HSV")


def test_grey_files_get_three_equal_channels(tmp_path):
    grey = noise(6, 5, 1)
    read = np.asarray(files.read_image(save(tmp_path / "grey.png", grey)))
    assert read.shape == (6, 5, 3) and (read == grey[..., None]).all()
    assert (np.asarray(files.read_image(tmp_path / "grey.png", mode="L")) == grey).all()


def test_alpha_is_laid_on_white_or_kept(tmp_path):
    array = np.zeros((1, 3, 4), dtype=np.uint8)
    array[0, :, 3] = 0, 255, 51  # black, seen not at all, wholly, and by a fifth
    path = save(tmp_path / "alpha.png", array)
    assert np.asarray(files.read_image(path))[0, :, 0].tolist() == [255, 0, 204]
    assert np.asarray(files.read_image(path, mode="L"))[0].tolist() == [255, 0, 204]
    assert (np.asarray(files.read_image(path, mode="RGBA"))[..., 3] == array[..., 3]).all()


def test_a_transparent_palette_is_laid_on_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 200, 10, 20])
    picture.putdata([0, 1])
    picture.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(files.read_image(tmp_path / "palette.png")).tolist() == [
        [[255, 255, 255], [200, 10, 20]]]
    kept = np.asarray(files.read_image(tmp_path / "palette.png", mode="RGBA"))
    assert kept[0, :, 3].tolist() == [0, 255]


def test_a_plain_palette_gives_colours_and_not_numbers(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([250, 0, 0, 0, 0, 250])
    picture.putdata([0, 1])
    picture.save(tmp_path / "palette.png")
    assert np.asarray(files.read_image(tmp_path / "palette.png"))[0].tolist() == [
        [250, 0, 0], [0, 0, 250]]


def test_grey_transparency_and_grey_alpha(tmp_path):
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "key.png", transparency=0)
    assert np.asarray(files.read_image(tmp_path / "key.png", mode="L"))[0].tolist() == [255, 9]
    Image.fromarray(np.array([[[0, 0], [7, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert np.asarray(files.read_image(tmp_path / "la.png", mode="L"))[0].tolist() == [255, 7]


def test_cmyk_becomes_rgb(tmp_path):
    picture = Image.new("RGB", (16, 16), (200, 40, 60)).convert("CMYK")
    picture.save(tmp_path / "print.jpg", quality=100)
    read = files.read_image(tmp_path / "print.jpg")
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read)[8, 8].astype(int) - (200, 40, 60)).max() <= 6


def test_sixteen_bits_keep_their_range(tmp_path):
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for mode in ("L", "RGB"):
        read = np.asarray(files.read_image(tmp_path / "deep.png", mode=mode)).reshape(4, -1)
        assert read[:, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif.*floating-point"):
        files.read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("values", [[0, 255], [0, 100_000], [-5, 5]])
def test_32_bit_integers_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match="mask.tif.*no agreed range"):
        files.read_image(tmp_path / "mask.tif")


def test_one_bit_pictures_are_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert np.asarray(files.read_image(tmp_path / "bit.png", mode="L"))[0].tolist() == [255, 0]


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(files.read_image(tmp_path / "film.gif"))[0, 0].tolist() == [255, 0, 0]


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
    assert (np.asarray(files.read_image(tmp_path / "photo.png")) == np.asarray(upright)).all()


def test_fit_covers_cuts_the_middle_and_stretches_nothing():
    array = np.zeros((10, 30, 3), np.uint8)
    array[:, 10:20] = 255  # the middle third is white
    assert (np.asarray(files.fit_to(Image.fromarray(array), 10)) == 255).all()
    assert files.fit_to(Image.fromarray(array), (4, 6)).size == (6, 4)
    with pytest.raises(ValueError, match="size must be at least 1 pixel"):
        files.fit_to(Image.fromarray(array), (0, 6))


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

    assert all(hasattr(torchvision.datasets, name) for name in files.TORCHVISION)


def test_the_data_folder_can_be_elsewhere(tmp_path, monkeypatch):
    shipped = files.data_folder("fashion_mnist")
    (tmp_path / "fashion_mnist").symlink_to(shipped)
    monkeypatch.setenv("VLM_COURSE_DATA", str(tmp_path))
    assert files.data_folder("fashion_mnist") == tmp_path / "fashion_mnist"
    assert len(load("fashion_mnist")) == 6000
    with pytest.raises(FileNotFoundError, match=f"'emoji'.*{tmp_path.name}.*VLM_COURSE_DATA"):
        load("emoji")


def test_a_wrong_data_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_COURSE_DATA", str(tmp_path / "nowhere"))
    for name, options in (("emoji", {}), ("photos", {"size": 8}), ("fashion_mnist", {})):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load(name, **options)


def test_an_installed_full_fashion_mnist_is_served(tmp_path, monkeypatch):
    for stem, count in (("train", 5), ("t10k", 3)):
        for kind, array in (("images-idx3", noise(count, 28, 28)),
                            ("labels-idx1", np.arange(count, dtype=np.uint8))):
            header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
            with gzip.open(tmp_path / f"{stem}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    monkeypatch.setattr(files, "FULL_FASHION_MNIST", tmp_path)
    data = load("FashionMNIST")
    assert data.name == "FashionMNIST" and data.images.shape == (5, 1, 28, 28)
    assert (data.images[:, 0].numpy() == noise(5, 28, 28)).all()
    assert data.labels.tolist() == [0, 1, 2, 3, 4] and data.classes == files.FASHION_CLASSES
    assert len(load("FashionMNIST", split="all")) == 8
    assert len(load("fashion_mnist")) == 6000


def test_a_file_that_is_no_idx_is_named(tmp_path):
    with gzip.open(tmp_path / "floats.gz", "wb") as file:
        file.write(struct.pack(">BBBB1i", 0, 0, 13, 1, 0))  # 13: float32
    with pytest.raises(ValueError, match="floats.gz.*no IDX file of uint8"):
        files._read_idx(tmp_path / "floats.gz")


# --------------------------------------------------------------------------- fields and layers


def test_every_reader_hands_over_fields_that_fit(tmp_path):
    save(tmp_path / "x" / "a.png")
    readers = (files.read_emoji(split="test"), files.read_photos(size=8, split="test"),
               files.read_fashion_mnist(split="test"), files.read_folder(tmp_path))
    for fields in readers:
        assert set(fields) <= {"images", "labels", "classes", "name", "table", "skipped"}
        assert fields["images"].dtype == torch.uint8 and fields["images"].is_contiguous()
        files.check_fields(fields["images"], fields["labels"], classes=fields["classes"],
                           table=fields.get("table", {}))


def test_read_images_keeps_order_pixels_and_names(tmp_path):
    paths = [save(tmp_path / f"{i}.png", noise(5, 7, seed=i)) for i in (2, 0, 1)]
    pixels, kept, skipped = files.read_images(paths, size=None)
    assert kept == paths and skipped == [] and pixels.shape == (3, 3, 5, 7)
    for image, seed in zip(pixels, (2, 0, 1)):
        assert (image.permute(1, 2, 0).numpy() == noise(5, 7, seed=seed)).all()


@pytest.mark.parametrize("labels, table, message", [
    ([0, 1], {}, r"labels must be \(N,\) int64; got list"),
    (torch.tensor([0]), {}, "2 entries, one an image; got 1 labels"),
    (torch.tensor([0, 1]), {"word": ["one"]}, r"wrong columns \['word'\]"),
    (torch.tensor([0, 2]), {}, r"labels must be in 0..1 \(2 classes\); got 0..2"),
])
def test_fields_that_do_not_fit_are_refused(labels, table, message):
    images = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        files.check_fields(images, labels, classes=["a", "b"], table=table)


def test_the_reader_needs_nothing_of_the_chapters():
    code = ("import sys, vlm_course.appendix.files; "
            "print([m for m in sys.modules if m.startswith('vlm_course.foundations') "
            "or m in ('matplotlib', 'torchvision', 'IPython')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
