"""All self-supervised methods of the course at one budget: trains, evaluates, and writes a table.

    python benchmarks/self_supervised.py [--methods simclr byol --seeds 0 1 2 --steps 250 --out F]

Rows that the table holds already are skipped, so that it can be made in pieces. Every method draws
the same number of pictures (three styles of the training emoji; Fluent is kept for the test) in the
same number of steps, from the same backbone, and is evaluated in the same way. The masked
autoencoder needs patches and has a Vision Transformer. The recipes are those of the chapters.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.foundations.augmentation import (
    Compose,
    MultiView,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from vlm_course.foundations.images import ImageSet, channel_statistics, load
from vlm_course.foundations.networks import ResNet, ResNetConfig
from vlm_course.foundations.training import classification_loss, fit
from vlm_course.self_supervised import without_negatives as joint
from vlm_course.self_supervised.contrastive import (
    MoCo,
    SimCLR,
    moco_loss,
    simclr_augmentation,
    simclr_loss,
    stack_styles,
    two_artists,
)
from vlm_course.self_supervised.evaluation import evaluate_features, frozen_features
from vlm_course.self_supervised.masked import MAE, MAEConfig, MaskNoise, mae_loss
from vlm_course.self_supervised.rotation import rotation_loss

STYLES = ("noto", "twemoji", "openmoji")  # seen in training
PAIRS = {"noto_twemoji": ("noto", "twemoji"), "noto_fluent": ("noto", "fluent3d")}
SIZE = 24  # of the views: a crop enlarges, so things look as large as in the 32 pixels of the test
OUT = Path(__file__).parent.parent / "nbs" / "self_supervised" / "comparison.csv"


@dataclass
class Setup:
    """What a method trains, on what, and what is kept."""

    model: nn.Module
    backbone: nn.Module
    data: ImageSet
    transform: Callable
    loss: Callable
    views: str  # of each picture
    callbacks: tuple = ()


def resnet(num_classes: int = 0) -> ResNet:
    """The backbone of chapters 2 and 4: a stem that halves the picture, then three stages."""
    network = ResNet(ResNetConfig(depths=(1, 1, 1), widths=(32, 64, 128), stem="small",
                                  num_classes=num_classes))
    network.conv1 = nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out")
    return network


def view() -> Compose:
    """One random view, as in chapters 2 and 4."""
    return simclr_augmentation(SIZE, scale=(0.4, 1.0), color=0.4, grey=0.1)


def supervised(data: ImageSet) -> Setup:
    """Cross-entropy on the eight groups."""
    model, crop = resnet(len(data.classes)), RandomResizedCrop(SIZE, scale=(0.4, 1.0))
    return Setup(model, model, data, Compose(crop, RandomHorizontalFlip(0.5)), classification_loss,
                 "1 of 24")


def rotation(data: ImageSet) -> Setup:
    """Chapter 1."""
    model, crop = resnet(4), RandomResizedCrop(SIZE, scale=(0.4, 1.0))
    return Setup(model, model, data, crop, rotation_loss, "4 of 24")


def simclr(data: ImageSet) -> Setup:
    """Chapter 2, two views of one drawing."""
    model = SimCLR(resnet(), pool=2)
    return Setup(model, model.backbone, data, MultiView(view(), view()),
                 partial(simclr_loss, temperature=0.2), "2 of 24")


def artists(data: ImageSet) -> Setup:
    """Chapter 2, views of two artists' drawings of one concept."""
    concepts, transform = stack_styles(data, STYLES), partial(two_artists, view=view())
    return replace(simclr(data), data=concepts, transform=transform)


def moco(data: ImageSet) -> Setup:
    """Chapter 2, keys by a slow network and a queue."""
    setup = simclr(data)
    return replace(setup, model=MoCo(setup.model, queue_size=2048, momentum=0.98),
                   loss=partial(moco_loss, temperature=0.2))


def mae(data: ImageSet) -> Setup:
    """Chapter 3: whole drawings of 32 pixels in patches of 4."""
    mean, std = (tuple(values.tolist()) for values in channel_statistics(data.images))
    model = MAE(MAEConfig(patch_size=4, dim=64, depth=2, num_heads=2, decoder_dim=64,
                          decoder_depth=2, decoder_heads=2, normalize_target=False, base=20.0,
                          mean=mean, std=std))
    return Setup(model, model.encoder, data, MaskNoise(4), mae_loss, "1 of 32, a quarter seen")


def without_negatives(data: ImageSet, *, name: str) -> Setup:
    """Chapter 4, with its settings for short runs."""
    config = replace(joint.METHODS[name], pool=2, hidden_dim=256, momentum=0.95,
                     out_dim=64 if name == "byol" else 256, final_norm=name == "byol",
                     teacher_temperature=(0.04, 0.04))
    model, views = config.build(resnet()), MultiView(view(), view())
    if config.local_views:
        small = simclr_augmentation(SIZE // 2, scale=(0.1, 0.4), color=0.4, grey=0.1)
        views = MultiView(view(), view(), *[small] * config.local_views)
    count = f"2 of 24, {config.local_views} of 12" if config.local_views else "2 of 24"
    return Setup(model, model.backbone, data, views, joint.joint_embedding_loss, count,
                 (joint.MomentumTeacher(),))


METHODS: dict[str, Callable[[ImageSet], Setup]] = {
    "supervised": supervised, "rotation": rotation, "simclr": simclr, "simclr_artists": artists,
    "moco": moco, "mae": mae,
    **{name: partial(without_negatives, name=name)
       for name in ("byol", "vicreg", "barlow_twins", "dino")}}
CONTROLS = ("pixels", "random")  # nothing is trained


def train(method: str, seed: int, data: ImageSet, options) -> tuple[nn.Module, dict]:
    """The backbone after training, and what it cost."""
    torch.manual_seed(seed)
    if method == "random":
        return resnet(), {"backbone": "resnet", "steps": 0, "views": "", "seconds": 0}
    setup = METHODS[method](data)
    batches = setup.data.batches(options.batch, generator=torch.Generator().manual_seed(seed),
                                 transform=setup.transform)
    began = time.perf_counter()
    fit(setup.model, batches, setup.loss, steps=options.steps, lr=options.lr,
        callbacks=setup.callbacks)
    return setup.backbone, {"backbone": "vit" if method == "mae" else "resnet",
                            "steps": options.steps, "views": setup.views,
                            "seconds": round(time.perf_counter() - began, 1)}


def features(backbone: nn.Module | None, data: ImageSet) -> Tensor:
    """The last two layers on a 2 x 2 grid; without a backbone, the pixels at 16 x 16."""
    if backbone is None:
        return F.adaptive_avg_pool2d(data.images.float() / 255, 16).flatten(1)
    return frozen_features(backbone, data.batches(256, shuffle=False))


def run(method: str, seed: int, options) -> dict:
    """One row of the table."""
    training = load("emoji", size=32).where(style=lambda style: style in STYLES)
    test = load("emoji", size=32, split="test").where(group=lambda group: group != "people-body")
    if method == "pixels":
        backbone, row = None, {"backbone": "", "steps": 0, "views": "", "seconds": 0}
    else:
        backbone, row = train(method, seed, training, options)
    style = test.column("style")
    rows = {name: torch.tensor([s == name for s in style]).nonzero().flatten()
            for name in dict.fromkeys(style)}
    known = features(backbone, training)
    scores = evaluate_features(known, training.labels, features(backbone, test), test.labels,
                               pairs={name: (rows[a], rows[b]) for name, (a, b) in PAIRS.items()})
    return {"method": method, "seed": seed, **row, "batch": options.batch if row["steps"] else 0,
            "dimensions": known.shape[1], **{name: f"{value:.4f}" for name, value in scores.items()},
            "torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads()}


def append(path: Path, row: dict) -> None:
    """Add a row at the end; two processes may do so at once."""
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def done(path: Path) -> set[tuple[str, int]]:
    """The methods and seeds that the table has."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8") as file:
        return {(row["method"], int(row["seed"])) for row in csv.DictReader(file)}


def main(arguments: list[str] | None = None) -> None:
    """Make the rows that are missing."""
    everything = [*CONTROLS, *METHODS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything,
                        metavar="METHOD", help=f"any of {', '.join(everything)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2],
                        help="of weights, order of pictures, and views")
    parser.add_argument("--steps", type=int, default=250, help="optimiser steps of each method")
    parser.add_argument("--batch", type=int, default=128, help="pictures drawn in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak rate of AdamW, for all")
    parser.add_argument("--out", type=Path, default=OUT, help="the table, a CSV file")
    options = parser.parse_args(arguments)
    for seed in options.seeds:
        for method in options.methods:
            if (method, seed) not in done(options.out):
                row = run(method, seed, options)
                append(options.out, row)
                print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
