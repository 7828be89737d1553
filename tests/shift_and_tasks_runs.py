"""Runs of several tasks that `test_shift_and_tasks.py` starts in two processes, and repeats in one.

As a script (`accelerate launch tests/shift_and_tasks_runs.py FOLDER`) it leaves what each process
saw in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from vlm_course.appendix.checkpoints import save_weights
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.networks import ViT, ViTConfig
from vlm_course.foundations.training import fit
from vlm_course.self_supervised.contrastive import process_rank
from vlm_course.transfer.shift_and_tasks import (
    FixedWeights,
    GradNorm,
    MultiTask,
    Task,
    UncertaintyWeights,
    multitask_groups,
    multitask_loss,
    numbered,
)

KINDS = ("sum", "uncertainty", "gradnorm")
ROWS = torch.arange(12)  # the whole batch


def pictures(count: int = 48) -> ImageSet:
    """Noise, the frequent class first and dark: the two processes' shares of `ROWS` differ."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(count) >= 0.6 * count) + (torch.arange(count) >= 0.8 * count).long()
    images = torch.randint(0, 80, (count, 3, 8, 8), generator=generator)
    images += 60 * labels.view(-1, 1, 1, 1)
    return ImageSet(images.to(torch.uint8), labels, ["a", "b", "c"], "noise")


def questions() -> list[Task]:
    """One task of classes and one of tags."""
    labels = pictures().labels
    tags = torch.stack([labels == 1, torch.arange(len(labels)) % 2 == 0], dim=1).float()
    return [Task("kind", labels, ["a", "b", "c"]), Task("tags", tags, ["middle", "even"])]


def build(kind: str, *, started: bool) -> MultiTask:
    """A model without BatchNorm; `started`: its balance is past the first batch, and unequal."""
    torch.manual_seed(0)
    backbone = ViT(ViTConfig(image_size=8, patch_size=4, dim=12, depth=2, num_heads=2,
                             num_classes=2))
    balance: nn.Module = {"sum": FixedWeights([1.0, 3.0]), "uncertainty": UncertaintyWeights(2),
                          "gradnorm": GradNorm(2)}[kind]
    model = MultiTask(backbone, questions(), balance=balance).train()
    if started and kind == "uncertainty":
        balance.log_variances.data = torch.tensor([0.4, -0.9])
        balance.started.fill_(True)
    if started and kind == "gradnorm":
        balance.log_weights.data = torch.tensor([1.7, 0.3]).log()
        balance.initial.copy_(torch.tensor([1.3, 0.5]))
    return model


def step(kind: str, rows: torch.Tensor, *, started: bool) -> dict:
    """The loss of these rows, the gradient of everything, and the weights of the losses."""
    model = build(kind, started=started)
    images = pictures().images[::4][rows].float() / 255
    total, parts = multitask_loss(questions())(model, images, 4 * rows)
    total.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                          for p in model.parameters()])
    return {"loss": total.item(), "gradient": gradient.tolist(),
            "parts": [parts[name].item() for name in ("kind", "tags")],
            "weights": model.balance.weights.tolist()}


def trained(kind: str) -> tuple[MultiTask, dict]:
    """A short run, whose numbers must not depend on how many processes share it."""
    model = build(kind, started=kind == "gradnorm")  # at its optimum a sign would be a coin
    optimizer = torch.optim.SGD(multitask_groups(model, lr=0.05, balance_lr=0.02))
    batches = numbered(pictures()).batches(16, generator=torch.Generator().manual_seed(1))
    history = fit(model, batches, multitask_loss(questions()), steps=5, optimizer=optimizer,
                  precision="fp32", log_every=2)
    return model, {"losses": history.losses, "tags": history.metrics["tags"],
                   "weights": history.metrics["weight of tags"]}


def main(folder: Path) -> None:
    """What every launched process does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = process_rank()
    share = ROWS[rank * len(ROWS) // world:(rank + 1) * len(ROWS) // world]
    seen = {}
    for kind in KINDS:
        seen[kind] = {"step": step(kind, share, started=True),
                      "first": step(kind, share, started=False)}
        model, seen[kind]["trained"] = trained(kind)
        save_weights(model, folder / f"{kind}-{rank}.safetensors")
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is on disk; an exit at once, as in training_runs.py, for the same reason.
    torch.distributed.barrier()
    os._exit(0)
