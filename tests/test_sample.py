"""Drawing from a trained generator, from the shell: what is written, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_course.appendix.checkpoints import write_tensors
from vlm_course.foundations.images import load
from vlm_course.generation.gan import GANConfig, generate, load_generator, save_generator
from vlm_course.sample import closed_walk, draw, main, slerp, write_film


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a run leaves it, of an untrained generator of three classes."""
    torch.manual_seed(0)
    generator = GANConfig(size=32, width=4, latent_dim=8).make_generator(3, 3)
    folder = tmp_path_factory.mktemp("run")
    save_generator(generator, folder / "generator.safetensors", classes=["cat", "dog", "a b"])
    return folder


def test_a_grid_holds_the_pictures_that_generate_makes(run, tmp_path):
    (path,) = main([str(run), str(tmp_path / "new" / "x.png"), "--count", "5", "--columns", "3"])
    with Image.open(path) as sheet:
        assert sheet.size == (3 * 34 + 2, 2 * 34 + 2)
        corner = torch.from_numpy(np.array(sheet)[2:34, 2:34]).float()
    pictures = generate(load_generator(run), 5, seed=0)
    first = (pictures[0] * 255).permute(1, 2, 0)
    assert (corner - first).abs().max() <= 1


def test_single_files_are_a_folder_that_load_reads(run, tmp_path):
    paths = main([str(run), str(tmp_path / "all"), "--count", "7", "--class", "dog"])
    assert [p.name for p in paths] == [f"{i:04d}.png" for i in range(7)]
    data = load(tmp_path / "all", size=32)
    assert data.images.shape == (7, 3, 32, 32)
    with pytest.raises(SystemExit, match="holds '0000.png' already"):
        main([str(run), str(tmp_path / "all"), "--count", "2"])
    assert len(list((tmp_path / "all").iterdir())) == 7


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_film_shows_every_frame_for_ever(run, tmp_path, suffix):
    noise = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    path = write_film(noise, tmp_path / f"noise{suffix}", scale=4)
    with Image.open(path) as film:
        assert film.size == (32, 32) and film.n_frames == 9 and film.info["loop"] == 0
    walk = str(tmp_path / f"walk{suffix}")
    (path,) = main([str(run), walk, "--count", "3", "--frames", "6", "--scale", "1"])
    with Image.open(path) as film:
        assert film.size == (32, 32)


def test_a_seed_gives_the_same_pictures_and_another_seed_others(run, tmp_path):
    names = [("a", "3"), ("b", "3"), ("c", "4")]
    files = [main([str(run), str(tmp_path / f"{n}.png"), "--seed", s])[0] for n, s in names]
    a, b, c = (file.read_bytes() for file in files)
    assert a == b != c


@pytest.mark.parametrize(("wrong", "words"), [
    (["--class", "bird"], r"class must be one of \['cat', 'dog', 'a b'\]; got 'bird'"),
    (["--truncation", "0.5"], "truncation must be left out"),
    (["--count", "0"], "count.*at least 1; got 0"),
    (["--columns", "-1"], "columns"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(run, tmp_path, wrong, words):
    with pytest.raises(SystemExit, match=words):
        main([str(run), str(tmp_path / "x.png"), *wrong])
    assert not list(tmp_path.iterdir())


def test_wrong_places_are_named(run, tmp_path):
    with pytest.raises(SystemExit, match="out must end in .png, .webp, .gif"):
        main([str(run), str(tmp_path / "x.jpg")])
    with pytest.raises(SystemExit, match="nowhere"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "x.png")])
    other = write_tensors({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="save_generator"):
        main([str(other), str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match="path must end in"):
        write_film(torch.zeros(2, 3, 4, 4), tmp_path / "x.mp4")


def test_grey_pictures_become_grey_films(tmp_path):
    frames = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 1, 8, 8)
    path = write_film(frames, tmp_path / "x.gif", scale=2)
    with Image.open(path) as film:
        film.seek(3)
        assert film.size == (16, 16) and film.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_slerp_keeps_the_length_and_meets_its_ends():
    a, b = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
    for share in (0.0, 0.3, 1.0):
        assert torch.allclose(slerp(a, b, share).norm(dim=1), torch.ones(5).double())
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    angle = torch.acos((a * b).sum(1))
    part = torch.acos((a * slerp(a, b, 0.3)).sum(1))
    assert torch.allclose(part, 0.3 * angle)
    for other in (a, -a):  # no arc, or any: no division by zero
        assert slerp(a, other, 0.5).isfinite().all()


def test_a_walk_wants_two_keys_and_meets_them_all():
    keys = torch.randn(3, 16)
    walk = closed_walk(keys, frames=4)
    assert walk.shape == (12, 16) and torch.allclose(walk[::4], keys)
    with pytest.raises(ValueError, match="keys must be two or more.*got 1 and 4"):
        closed_walk(keys[:1], frames=4)
    with pytest.raises(ValueError, match="frames"):
        closed_walk(keys, frames=0)


def test_latents_of_the_wrong_shape_are_refused(run):
    with pytest.raises(ValueError, match=r"latents must be \(B, 8\) float; got \(2, 9\)"):
        draw(load_generator(run), torch.zeros(2, 9))


def test_the_command_as_it_stands_in_the_chapters(run, tmp_path):
    command = [sys.executable, "-m", "vlm_course.sample", str(run), str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.strip().endswith("x.png"), done.stderr[-2000:]
