"""Fine-tuning from the command line, and asking the result about new pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlm_course import predict
from vlm_course.appendix.checkpoints import save_weights
from vlm_course.appendix.files import data_folder
from vlm_course.foundations.images import ImageSet
from vlm_course.predict import classify, find_pictures, load_classifier, save_classifier
from vlm_course.train import hold_out, main
from vlm_course.transfer.pretrained import Preprocessing, PretrainedModel, load_pretrained

RUN = str(data_folder("runs/simclr_resnet_mini"))


def picture(label: str, seed: int) -> Image.Image:
    """Noise, bright or dark: a task that any network learns."""
    values = np.random.default_rng(seed).integers(0, 90, (40, 30, 3))
    return Image.fromarray((values + (150 if label == "light" else 0)).astype(np.uint8))


def fill(folder: Path, labels=("dark", "light"), count: int = 10) -> Path:
    for label in labels:
        (folder / label).mkdir(parents=True)
        for i in range(count):
            picture(label, i).save(folder / label / f"{i}.png")
    return folder


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return ["finetune", "--data", str(data), "--out", str(out), "--backbone", RUN, "--size", "24",
            "--batch_size", "8", "--steps", "12", "--lr", "0.01", *more]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    fill(folder / "pictures")
    main(flags(folder / "pictures", folder / "run"))
    return folder


# ------------------------------------------------------------------------------- the run


def test_the_run_leaves_all_that_is_promised(run):
    names = {path.name for path in (run / "run").iterdir()}
    assert names == {"README.md", "checkpoints", "config.yaml", "model.safetensors",
                     "results.json"}  # fmt: skip
    results = json.loads((run / "run" / "results.json").read_text())
    assert results["accuracy"] == 1.0 and results["classes"] == ["dark", "light"]
    assert results["confusion"] == [[2, 0], [0, 2]]  # a fifth of each class
    card = (run / "run" / "README.md").read_text()
    for words in ("right 4 times", "| dark | 8 | 2 | 1.00 |", "mode: \"full\"", "95 % interval"):
        assert words in card


def test_the_confusion_matrix_is_printed(tmp_path, capsys):
    main(flags(fill(tmp_path / "a"), tmp_path / "run", "--mode", "probe"))
    printed = capsys.readouterr().out
    assert "dark" in printed and "found" in printed and "accuracy 1.000 on 4 pictures" in printed


def test_a_test_part_is_used_where_there_is_one(tmp_path):
    fill(tmp_path / "data" / "train")
    fill(tmp_path / "data" / "test", count=3)
    results = main(flags(tmp_path / "data", tmp_path / "run", "--mode", "probe"))
    assert np.sum(results["confusion"]) == 6


def test_predict_knows_new_pictures_without_the_backbones_folder(run, tmp_path, capsys):
    for label in ("dark", "light"):
        picture(label, 99).resize((200, 90)).save(tmp_path / f"{label}.jpg")
    answers = predict.main([str(run / "run"), str(tmp_path), "--top", "1"])
    assert [next(iter(a["answers"])) for a in answers] == ["dark", "light"]
    assert "dark.jpg: dark" in capsys.readouterr().out
    predict.main([str(run / "run" / "model.safetensors"), str(tmp_path / "dark.jpg"), "--json"])
    assert json.loads(capsys.readouterr().out)["answers"].keys() == {"dark", "light"}


def test_the_command_runs_in_a_shell(run, tmp_path):
    picture("light", 5).save(tmp_path / "x.png")
    done = subprocess.run(
        [sys.executable, "-m", "vlm_course.predict", str(run / "run"), str(tmp_path / "x.png")],
        capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0 and "x.png: light" in done.stdout, done.stderr


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_pictures_of_every_kind_are_read(run, tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture("light", 7).convert(mode).save(path)
    shares = classify(load_classifier(run / "run"), [path])
    assert shares.shape == (1, 2) and abs(shares.sum().item() - 1) < 1e-5


def test_turned_pictures_are_seen_upright(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture("dark", 3)
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    a, b = classify(load_classifier(run / "run"),
                    [tmp_path / "upright.png", tmp_path / "turned.png"])  # fmt: skip
    assert torch.equal(a, b)


def test_batches_do_not_change_the_answers(run):
    files = find_pictures([run / "pictures"])
    model = load_classifier(run / "run")
    assert torch.allclose(classify(model, files, batch_size=3), classify(model, files), atol=1e-5)


def test_a_finetuned_run_is_a_backbone_again(run, tmp_path):
    model = load_pretrained(run / "run")
    assert model.classes == ["dark", "light"]
    more = [run / "run" if flag == RUN else flag
            for flag in flags(run / "pictures", tmp_path / "again", "--mode", "probe")]
    assert main([str(flag) for flag in more])["accuracy"] == 1.0
    shutil.copytree(tmp_path / "again", tmp_path / "moved")
    assert load_classifier(tmp_path / "moved").classes == ["dark", "light"]


def test_a_killed_run_goes_on(tmp_path):
    data = fill(tmp_path / "data")
    whole = main(flags(data, tmp_path / "whole", "--save_every", "5"))
    main(flags(data, tmp_path / "half", "--save_every", "5"))
    for path in (tmp_path / "half" / "checkpoints").glob("*12*"):
        path.unlink()  # as if killed between step 10 and 12
    resumed = main(flags(data, tmp_path / "half", "--save_every", "5", "--resume", "true"))
    assert resumed["losses"] == whole["losses"]


@pytest.mark.timeout(120)
def test_two_processes_finetune(tmp_path):
    data = fill(tmp_path / "data")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
              "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0", "-m", "vlm_course.train"]  # fmt: skip
    done = subprocess.run([*launch, *flags(data, tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["processes"] == 2 and results["accuracy"] >= 0.75
    assert done.stdout.count("accuracy") == 1


# ------------------------------------------------------------------------------- refusals


def test_one_class_is_refused_before_anything_is_kept(tmp_path):
    fill(tmp_path / "data", labels=("only",))
    with pytest.raises(ValueError, match="at least two classes"):
        main(flags(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_class_without_a_picture_to_learn_from_is_refused(tmp_path):
    fill(tmp_path / "data" / "train")
    fill(tmp_path / "data" / "test", labels=("dark", "light", "third"), count=2)
    with pytest.raises(ValueError, match="third"):
        main(flags(tmp_path / "data", tmp_path / "run"))


def test_a_class_of_one_picture_is_refused(tmp_path):
    fill(tmp_path / "data")
    (tmp_path / "data" / "rare").mkdir()
    picture("dark", 0).save(tmp_path / "data" / "rare" / "0.png")
    with pytest.raises(ValueError, match="class 'rare' has one picture; at least 2"):
        main(flags(tmp_path / "data", tmp_path / "run"))


def test_an_unknown_backbone_is_refused(tmp_path):
    fill(tmp_path / "data")
    wrong = ["nowhere" if flag == RUN else flag for flag in
             flags(tmp_path / "data", tmp_path / "run")]  # fmt: skip
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        main(wrong)


def test_held_out_pictures_are_a_share_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2)
    data = ImageSet(torch.zeros(62, 3, 2, 2, dtype=torch.uint8), labels, ["a", "b", "c"],
                    table={"row": list(range(62))})  # fmt: skip
    train, test = hold_out(data)
    assert torch.bincount(test.labels).tolist() == [10, 2, 1]
    assert sorted(train.column("row") + test.column("row")) == list(range(62))
    assert hold_out(data)[1].column("row") == test.column("row")


def small_model(classes: list[str]) -> PretrainedModel:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    preprocess = Preprocessing(size=8)
    return PretrainedModel(body, embed_dim=4, preprocess=preprocess).reset_head(
        len(classes), classes=classes)  # fmt: skip


def test_a_head_without_names_is_refused(tmp_path):
    model = small_model(["a", "b"])
    model.classes = ["a"]
    with pytest.raises(ValueError, match="1 names for 2 logits"):
        save_classifier(model, tmp_path / "model.safetensors")


def test_files_that_are_no_classifier_are_refused(run, tmp_path):
    save_weights(small_model(["a", "b"]), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="save_classifier"):
        load_classifier(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path)
    whole = (run / "run" / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="incomplete"):
        load_classifier(tmp_path / "half.safetensors")


@pytest.mark.parametrize("arguments", [["missing.png"], ["--top", "0", "."], ["empty"]])
def test_the_command_says_what_is_wrong(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        predict.main([str(run / "run"), *arguments])
    assert "Traceback" not in str(stopped.value) and len(str(stopped.value)) > 10


def test_a_training_model_is_not_asked(run):
    with pytest.raises(ValueError, match="evaluation mode"):
        classify(load_classifier(run / "run").train(), find_pictures([run / "pictures"]))
