"""The command line: every method, on one process and on two; resuming, refusing, configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_course import train as cli
from vlm_course.appendix.checkpoints import load_weights, read_tensors
from vlm_course.foundations.training import Callback
from vlm_course.generation.gan import load_generator

VITS = {"mae"}  # methods whose own default is a Vision Transformer
GENERATORS = [name for name in ("dcgan", "stylegan") if name in cli.METHODS]
CODES = ["vqvae", "transformer", "maskgit", "flow"]  # of pictures, and what learns them
SELF_MADE = {"finetune", *GENERATORS, *CODES}  # methods with a network of their own
BACKBONES = [name for name in cli.METHODS if name not in SELF_MADE]
FROM_NOTHING = [*BACKBONES, *GENERATORS]  # finetune: test_predict.py
QUICK = ["--data", "photos", "--batch_size", "16", "--save_every", "2", "--warmup", "0"]


def flags(name: str, out: Path, *more: str) -> list[str]:
    """A run of three steps."""
    size = ["--size", "32"] if name in GENERATORS else []
    return [name, *QUICK, *size, "--steps", "3", "--out", str(out), *more]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_method_trains_and_leaves_a_backbone(name, tmp_path):
    results = cli.main(flags(name, tmp_path))
    assert len(results["losses"]) == 3 and torch.tensor(results["losses"]).isfinite().all()
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["probe"] and all(0 <= value <= 1 for value in results["probe"].values())
    backbone = cli.make_backbone("vit_mini" if name in VITS else "resnet_mini", image_size=32)
    weights, _ = read_tensors(tmp_path / "backbone.safetensors")
    learnt = {key for key in backbone.state_dict() if not key.startswith(("fc.", "head."))}
    assert learnt - {"pos_embed"} <= set(weights)  # an MAE computes its positions


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_trains_on_the_pictures_and_classes_asked_for(name, tmp_path):
    asked = ["--only", '["label=animals", "label=f*"]', "--label", "[label]"]
    results = cli.main(flags(name, tmp_path, *asked))
    assert torch.tensor(results["losses"]).isfinite().all()
    assert results["classes"] == ["animals", "fish"]
    assert load_generator(tmp_path).classes == ["animals", "fish"]
    with Image.open(tmp_path / "samples.png") as sheet:
        assert min(sheet.size) > 32


def test_codes_are_learned_and_then_drawn(tmp_path):
    small = ["--size", "32", "--steps", "2"]
    plain = ["--width", "16", "--codes", "16", "--perceptual", "0", "--adversarial", "0"]
    cli.main(["vqvae", *QUICK, *small, *plain, "--out", str(tmp_path / "vqvae")])
    for name in CODES[1:]:
        known = ["--tokenizer", str(tmp_path / "vqvae"), "--out", str(tmp_path / name)]
        results = cli.main([name, *QUICK, *small, *known])
        assert torch.tensor(results["losses"]).isfinite().all()
        assert load_generator(tmp_path / name).sample(2).shape == (2, 3, 32, 32)


def test_pictures_are_chosen_by_any_entry_and_all_its_conditions():
    data, test = cli.load_parts("emoji", 32)
    only = ["subgroup=face-*", "group=objects,style=noto"]
    part, held = cli.choose(data, test, only=only, label=["group", "style"])
    assert part.classes == ["objects noto", *(f"smileys-emotion {style}" for style in (
        "fluent3d", "noto", "openmoji", "twemoji"))] == held.classes  # fmt: skip
    for subgroup, group, style in zip(*map(part.column, ("subgroup", "group", "style"))):
        assert subgroup.startswith("face-") or (group, style) == ("objects", "noto")
    whole = [cli.choose(data, test, only=[entry])[0] for entry in only]
    assert len(part) == sum(map(len, whole)) > 0
    assert cli.choose(data, None) == (data, None)


@pytest.mark.parametrize(("asked", "words"), [
    (dict(only=["group"]), "column=pattern.*got 'group'"),
    (dict(only=["colour=red"]), "column of.*'style'.*got 'colour=red'"),
    (dict(only=["group=nothing"]), "leaves none"),
    (dict(label=["name_en"]), "the same classes"),
])  # fmt: skip
def test_a_choice_that_cannot_be_made_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        cli.choose(*cli.load_parts("emoji", 32), **asked)


@pytest.mark.timeout(240)
def test_two_processes_train_every_method(tmp_path):
    runs = [flags(name, tmp_path / name) for name in FROM_NOTHING]
    script = f"from vlm_course.train import main\nfor flags in {runs!r}:\n    main(flags)\n"
    (tmp_path / "runs.py").write_text(script)
    launch(tmp_path / "runs.py")
    for name in FROM_NOTHING:
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["processes"] == 2 and len(results["losses"]) == 3
        assert torch.tensor(results["losses"]).isfinite().all(), name
        kept = "generator" if name in GENERATORS else "backbone"
        assert read_tensors(tmp_path / name / f"{kept}.safetensors")[0]


@pytest.mark.timeout(120)
def test_the_command_as_it_stands_in_the_chapters(tmp_path):
    launch("-m", "vlm_course.train", *flags("simclr", tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2


def launch(*arguments) -> None:
    """`accelerate launch` on two processes of this machine; it must end well."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
               "2", "--main_process_port", "0", *map(str, arguments)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-3000:]


class Stop(Callback):
    """Ends a run from within, as a kill would, after step 3."""

    def on_step(self, run) -> None:
        if run.step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["moco", "mae", "byol", "dino", *GENERATORS])  # all kinds of state
def test_a_stopped_run_ends_as_an_unbroken_one(name, tmp_path):
    whole = cli.main(flags(name, tmp_path / "whole", "--steps", "4"))
    again = flags(name, tmp_path / "again", "--steps", "4")
    with pytest.raises(KeyboardInterrupt):
        cli.train(*cli.parse(again), callbacks=[Stop()])
    resumed = cli.main([*again, "--resume", "true"])
    assert resumed["losses"] == whole["losses"] and resumed.get("probe") == whole.get("probe")


def test_a_folder_of_another_run_is_refused(tmp_path):
    cli.main(flags("supervised", tmp_path))
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(FileExistsError, match="--resume true"):
        cli.main(flags("supervised", tmp_path))
    with pytest.raises(ValueError, match=r"lr is 0\.5, was 0\.001"):
        cli.main(flags("supervised", tmp_path, "--resume", "true", "--lr", "0.5"))
    with pytest.raises(ValueError, match="method is rotation, was supervised"):
        cli.main(flags("rotation", tmp_path, "--resume", "true"))
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize("name", cli.METHODS)
def test_a_saved_configuration_asks_for_the_same_run(name, tmp_path):
    asked = cli.parse(flags(name, tmp_path, "--seed", "7", "--clip", "0.5"))
    path = tmp_path / "config.yaml"
    path.write_text(cli.to_yaml(*asked))
    assert cli.parse([name, "--config", str(path)]) == asked
    assert cli.parse([name, "--config", str(path), "--seed", "8"])[2].seed == 8


@pytest.mark.parametrize("name", cli.METHODS)
def test_every_flag_has_help(name, capsys):
    with pytest.raises(SystemExit):
        cli.parse([name, "--help"])
    shown = capsys.readouterr().out
    assert cli.ABOUT[name].split()[0] in shown
    words = {}
    for options in (cli.RunOptions, type(cli.METHODS[name]), cli.Method):
        words |= cli.comments(options)
    for field in (*fields(cli.RunOptions), *fields(cli.METHODS[name])):
        if field.name == "method":  # the subcommand says it
            continue
        assert f"--{field.name}" in shown
        assert words.get(field.name, "").split(" ")[0] in shown, field.name


@pytest.mark.parametrize(("wrong", "message"), [
    (["--tempreature", "1"], "unrecognized arguments: --tempreature"),
    (["--epochs", "many"], "epochs"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--resume", "perhaps"], "resume"),
])  # fmt: skip
def test_wrong_flags_are_named(wrong, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.parse(flags("simclr", tmp_path, *wrong))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "config.yaml").exists()


def test_a_masked_autoencoder_wants_a_vision_transformer(tmp_path):
    with pytest.raises(ValueError, match="vit_mini.*ResNet"):
        cli.main(flags("mae", tmp_path, "--backbone", "resnet_mini"))


@pytest.mark.parametrize(("wrong", "error", "words"), [
    (["--data", "emojis"], ValueError, "emojis.*CIFAR10"),
    (["--data", "./nowhere"], FileNotFoundError, "nowhere"),
    (["--backbone", "resnet19"], ValueError, "resnet18.*resnet19"),
    (["--precision", "fp8"], ValueError, "fp8"),
    (["--batch_size", "100000"], ValueError, "batch_size"),
    (["--clip", "-1"], ValueError, "clip must be above 0"),
    (["--warmup", "-1"], ValueError, "warmup"),
    (["--save_every", "0"], ValueError, "every"),
])  # fmt: skip
def test_a_run_that_never_began_leaves_the_folder_free(wrong, error, words, tmp_path):
    with pytest.raises(error, match=words):
        cli.main(flags("rotation", tmp_path, *wrong))
    assert not list(tmp_path.iterdir())
    cli.claim(tmp_path, "# method: rotation\n", resume=False)  # the corrected command may have it


def test_a_run_that_ends_early_keeps_its_folder_only_with_a_checkpoint(tmp_path):
    for every, kept in ((100, False), (2, True)):
        out = tmp_path / str(every)
        with pytest.raises(KeyboardInterrupt):
            arguments = flags("rotation", out, "--steps", "4", "--save_every", str(every))
            cli.train(*cli.parse(arguments), callbacks=[Stop()])
        assert (out / "config.yaml").exists() == kept


def test_no_steps_are_no_steps(tmp_path):
    assert cli.main(flags("rotation", tmp_path, "--steps", "0"))["losses"] == []


def test_parts_of_named_sets_and_of_folders(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "load", lambda data, size, split: asked.append((data, split)) or split)
    assert cli.load_parts("cifar10", 32) == ("train", "test")
    assert cli.load_parts("EuroSAT", 32) == (None, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()  # a folder of a set's name does not hide the set
    assert cli.load_parts("photos", 32) == ("train", "test")
    (tmp_path / "own" / "train").mkdir(parents=True)
    assert cli.load_parts("own", 32) == ("train", None)
    (tmp_path / "own" / "test").mkdir()
    assert cli.load_parts("own", 32) == ("train", "test")
    assert asked[-1] == ("own", "test")


def test_an_unreadable_test_part_is_not_passed_over(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / "0.png")
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1.png"):
        cli.load_parts(str(tmp_path), 8)


def test_an_unknown_backbone_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"resnet_mini.*vit_base.*resnet999"):
        cli.make_backbone("resnet999", image_size=32)


def test_a_flat_folder_of_pictures_trains_without_a_probe(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / f"{i}.png")
    results = cli.main(flags("rotation", tmp_path / "run", "--data", str(tmp_path / "pictures")))
    assert "probe" not in results and len(results["losses"]) == 3


def test_backbone_weights_go_back_into_a_backbone(tmp_path):
    results = cli.main(flags("supervised", tmp_path))
    backbone = cli.make_backbone("resnet_mini", image_size=32, num_classes=6)
    load_weights(backbone, tmp_path / "backbone.safetensors")
    data, test = cli.load_parts("photos", 32)
    assert cli.probe(backbone, data, test) == results["probe"]
