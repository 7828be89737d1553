"""Contrastive runs that `test_contrastive.py` starts in two processes, and repeats in one.

As a script (`accelerate launch tests/contrastive_runs.py FOLDER`) it leaves what each process saw
in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vlm_course.appendix.checkpoints import save_weights
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.training import fit
from vlm_course.self_supervised.contrastive import (
    MoCo,
    SimCLR,
    gather,
    moco_loss,
    nt_xent,
    process_rank,
    simclr_loss,
)

ROWS, DIM = 6, 5  # of the whole batch


class Backbone(nn.Module):
    """Features whose loss is a mean over images: no BatchNorm, no dropout."""

    embed_dim = 12

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1)

    def reset_classifier(self, num_classes: int) -> None:
        """There is no classifier."""

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to maps (B, 12, H / 2, W / 2)."""
        return torch.nn.functional.gelu(self.conv(images))

    def forward_head(self, maps: torch.Tensor) -> torch.Tensor:
        """The mean over all places."""
        return maps.mean((2, 3))


def build(kind: str) -> nn.Module:
    """A model without BatchNorm, the same in every process."""
    torch.manual_seed(0)
    encoder = SimCLR(Backbone(), out_dim=DIM)
    encoder.projector = nn.Linear(Backbone.embed_dim, DIM)
    return encoder if kind == "simclr" else MoCo(encoder, queue_size=40, momentum=0.9)


def pictures(count: int = 48) -> ImageSet:
    """Random pictures, some brighter than others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.zeros(count, dtype=torch.int64), ["all"], "noise")


def mirrored(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views that do not depend on which process makes them."""
    return images, images.flip(3)


def trained(kind: str) -> tuple[nn.Module, list[float]]:
    """A short run, whose numbers must not depend on how many processes share it."""
    model, loss = build(kind), {"simclr": simclr_loss, "moco": moco_loss}[kind]
    batches = pictures().batches(16, generator=torch.Generator().manual_seed(1), transform=mirrored)
    history = fit(model, batches, partial(loss, temperature=0.2), steps=7, lr=1e-2,
                  precision="fp32", log_every=2)
    return model, history.losses


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """Different rows for different processes."""
    generator = torch.Generator().manual_seed(2)
    z0, z1 = torch.randn(2, ROWS, DIM, generator=generator, dtype=torch.float64)
    return z0, z1


def loss_of(weight: torch.Tensor, rows: slice) -> torch.Tensor:
    """The loss of these rows, all processes' rows being candidates."""
    z0, z1 = (z[rows] @ weight for z in embeddings())
    return nt_xent(z0, z1, temperature=0.2, keys=(gather(z0), gather(z1)), rank=process_rank()[0])


def main(folder: Path) -> None:
    """What every launched process does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = process_rank()
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    weight = torch.eye(DIM, dtype=torch.float64).requires_grad_()
    loss = loss_of(weight, share)
    loss.backward()
    row = torch.full((2, 3), float(rank), requires_grad=True)
    together = gather(row)
    (together * torch.arange(4.0)[:, None]).sum().backward()
    seen = {"loss": loss.item(), "gradient": weight.grad.tolist(), "row": row.grad[:, 0].tolist(),
            "gathered": together[:, 0].tolist()}
    for kind in ("simclr", "moco"):
        model, seen[kind] = trained(kind)
        save_weights(model, folder / f"{kind}-{rank}.safetensors")
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is on disk; an exit at once, as in training_runs.py, for the same reason.
    torch.distributed.barrier()
    os._exit(0)
