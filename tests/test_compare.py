"""One table of generators: which runs may stand in it, and what its cells hold."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from vlm_course.compare import (
    SHIPPED,
    common_data,
    compare,
    draw_like,
    find_run,
    main,
    markdown_table,
    training_seconds,
)
from vlm_course.generation.gan import GANConfig, save_generator
from vlm_course.generation.measuring import feature_network

DATA = {"data": "emoji", "size": 32, "only": ["group=smileys-emotion"], "label": ["style"]}
STYLES = ["fluent3d", "noto", "openmoji", "twemoji"]


def make_run(folder, seed=0, **options):
    """A run's folder, of an untrained generator."""
    torch.manual_seed(seed)
    config = GANConfig(size=32, width=4, latent_dim=8)
    folder.mkdir()
    save_generator(config.make_generator(3, 4), folder / "generator.safetensors", classes=STYLES)
    lines = [f"{key}: {json.dumps(value)}" for key, value in {**DATA, **options}.items()]
    (folder / "config.yaml").write_text("\n".join(["# method: dcgan", *lines, ""]))
    (folder / "results.json").write_text(json.dumps({"seconds": 10.0 + seed}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, seed) for seed, name in enumerate("ab")}


def test_every_row_has_its_cells_and_held_out_drawings_are_nearest(runs):
    network = feature_network("efficientnet_lite0", size=32)
    rows, sheets = compare(runs, network=network)
    assert [row["name"] for row in rows] == ["held out", "a", "b"] == list(sheets)
    assert rows[0]["kid"] < min(rows[1]["kid"], rows[2]["kid"])
    assert [row["training"] for row in rows[1:]] == [10.0, 11.0]
    assert all(row["drawing"] > 0 and row["parameters"] > 1000 for row in rows[1:])
    assert "bits" not in rows[1]  # a GAN has no likelihood
    table = markdown_table(rows).splitlines()
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1


def test_the_command_writes_what_it_prints(runs, tmp_path, capsys):
    path = tmp_path / "table.csv"
    rows = main([*map(str, runs.values()), "--out", str(path)])
    assert capsys.readouterr().out.strip() == markdown_table(rows)
    written = list(csv.DictReader(path.open()))
    assert [row["name"] for row in written] == ["held out", "a", "b"]
    assert float(written[1]["kid"]) == pytest.approx(rows[1]["kid"])


def test_pictures_are_of_the_held_out_classes_and_repeat(runs):
    _, unseen = common_data(list(runs.values()))
    few = unseen[:6]
    a, b = (draw_like(runs["a"], few, seed=1)[0] for _ in range(2))
    assert a.shape == (6, 3, 32, 32) and torch.equal(a, b)
    assert not torch.equal(a, draw_like(runs["a"], few, seed=2)[0])


def test_runs_that_learned_from_other_pictures_are_refused(runs, tmp_path):
    other = make_run(tmp_path / "other", only=["group=objects"])
    with pytest.raises(ValueError, match="same pictures.*objects"):
        common_data([runs["a"], other])
    with pytest.raises(SystemExit, match="same pictures"):
        main([str(runs["a"]), str(other)])


def test_a_run_that_is_not_there_or_not_finished_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="results.json.*nowhere"):
        find_run("nowhere")
    (tmp_path / "begun").mkdir()
    with pytest.raises(SystemExit, match="begun"):
        main([str(tmp_path / "begun")])


def test_the_time_of_a_tokenizer_counts(runs, tmp_path):
    late = make_run(tmp_path / "late", tokenizer=str(runs["b"]))
    assert training_seconds(late) == 10.0 + 11.0
    assert training_seconds(make_run(tmp_path / "pixels", tokenizer="")) == 10.0


def test_the_shipped_runs_learned_from_one_set_for_one_time():
    times = [training_seconds(run) for run in SHIPPED.values()]
    assert max(times) < 1.2 * min(times)
    train, unseen = common_data(list(SHIPPED.values()))
    assert len(train) == 1824 and train.classes == unseen.classes
