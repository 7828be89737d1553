"""Training runs that `test_without_negatives.py` compares between one process and two.

As a script (`accelerate launch tests/without_negatives_runs.py FOLDER`) it trains each method on
every process that was launched and leaves losses and weights in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vlm_course.appendix.checkpoints import save_weights
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.training import fit
from vlm_course.self_supervised.without_negatives import (
    METHODS,
    JointEmbedding,
    MomentumTeacher,
    joint_embedding_loss,
)

NAMES = ("byol", "vicreg", "barlow_twins", "dino")


class PlainBackbone(nn.Module):
    """One convolution, no BatchNorm: what it does to an image depends on that image only."""

    embed_dim = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Maps (B, 6, H / 2, W / 2)."""
        return nn.functional.gelu(self.conv(images))

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 6)."""
        return features.mean((2, 3))

    def reset_classifier(self, num_classes: int) -> None:
        """There is none."""


def without_batchnorm(module: nn.Module) -> nn.Module:
    """The same module with each BatchNorm replaced by nothing."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.Identity())
        else:
            without_batchnorm(child)
    return module


def method(name: str, **changes) -> JointEmbedding:
    """A very small model of a method, the same at every call."""
    torch.manual_seed(0)
    config = replace(METHODS[name], hidden_dim=16, out_dim=12, bottleneck=8, momentum=0.5,
                     teacher_temperature=(0.04, 0.06), **changes)
    return without_batchnorm(config.build(PlainBackbone()))


def pictures(count: int = 24) -> ImageSet:
    """Noise, each picture with a brightness of its own."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(100, (count, 3, 8, 8), generator=generator)
    images += torch.arange(count).view(-1, 1, 1, 1) * 6
    return ImageSet(images.to(torch.uint8), torch.zeros(count, dtype=torch.int64), ["all"])


def fixed_views(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Views that do not depend on who makes them: two whole ones and a small crop."""
    return images, images.flip(3) * 0.9, images[:, :, 2:6, 2:6]


def run(model: JointEmbedding, **options):
    """A run whose numbers must not depend on how many processes share it."""
    batches = pictures().batches(12, generator=torch.Generator().manual_seed(2),
                                 transform=fixed_views)
    options = {"steps": 4, "precision": "fp32", "callbacks": [MomentumTeacher()], **options}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    return fit(model, batches, joint_embedding_loss, optimizer=optimizer, **options)


def main(folder: Path) -> None:
    """What every launched process does."""
    torch.set_num_threads(1)
    seen = {}
    for name in NAMES:
        model = method(name)
        seen[name] = run(model).losses
        rank = torch.distributed.get_rank()
        save_weights(model, folder / f"{name}-{rank}.safetensors")
    seen["world"] = torch.distributed.get_world_size()
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # As in training_runs.py: a gloo thread can abort a normal exit.
    torch.distributed.barrier()
    os._exit(0)
