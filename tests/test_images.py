"""The pixels, sets and batches of the images chapter: wrong arguments, replay, resume, peers."""
import io
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pictures import noise, save

from vlm_course.appendix import files
from vlm_course.foundations import images as I
from vlm_course.foundations.images import ImageSet, load


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def toy() -> ImageSet:
    """Ten pictures of one pixel, each as bright as its number."""
    table = {"word": list("abcdefghij"), "half": [i // 5 for i in range(10)]}
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    return ImageSet(pixels, torch.arange(10) % 2, ["even", "odd"], "toy", table)


def numbers(batches) -> list[list[int]]:
    return [I.to_uint8(images).flatten().tolist() for images, _ in batches]


# ---------------------------------------------------------------------------- sets by their name


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'emojis'.*'emoji', 'photos', 'fashion_mnist'.*'CIFAR10'"):
        load("emojis")


def test_names_go_in_any_case_and_before_folders(monkeypatch, tmp_path):
    assert load("Emoji", size=4, split="test").name == "emoji"
    monkeypatch.setattr(I, "load_torchvision", lambda name, **options: name)
    assert load("cifar10") == load("CIFAR10") == "CIFAR10" and load("stl10") == "STL10"
    (tmp_path / "cifar10").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cifar10" / "one.png")
    monkeypatch.chdir(tmp_path)
    assert load("cifar10") == "CIFAR10"
    assert len(load("./cifar10")) == 1 == len(load(Path("cifar10")))


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
        files.fit_to(Image.new("RGB", (4, 4)), size)


def test_whole_numbers_of_any_kind_are_sizes(tmp_path):
    save(tmp_path / "a.png")
    for size in (2, np.int64(2), torch.tensor(2), [2, 2], torch.Size((2, 2))):
        assert I.resize(torch.zeros(1, 3, 4, 4), size).shape[-2:] == (2, 2)
        assert load(tmp_path, size=size).images.shape[-2:] == (2, 2)


@pytest.mark.parametrize("name", ["emoji", "photos", "fashion_mnist"])
def test_no_set_takes_size_zero_for_its_own_size(name):
    with pytest.raises(ValueError, match="size must be at least 1 pixel"):
        load(name, size=0)


@pytest.fixture(scope="module")
def emoji() -> ImageSet:
    start = time.process_time()
    data = load("emoji", size=32, split="all")
    assert time.process_time() - start < 10
    return data


def test_emoji_are_1599_concepts_in_four_styles(emoji):
    assert len(emoji) == 4 * 1599 and emoji.images.shape[1:] == (3, 32, 32)
    assert len(emoji.classes) == 8 and emoji.column("group") == emoji.column("label")
    per_style = [emoji.where(style=style) for style in files.EMOJI_STYLES]
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
