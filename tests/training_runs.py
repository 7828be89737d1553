"""Training runs that several test files share, and start in processes of their own.

As a script (`accelerate launch tests/training_runs.py FOLDER`) it trains on every process that was
launched and leaves what each process saw in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from vlm_course.appendix.checkpoints import Checkpoint, save_weights
from vlm_course.foundations.images import Batches, ImageSet
from vlm_course.foundations.training import (
    EMA,
    Callback,
    Evaluate,
    History,
    accuracy,
    classification_loss,
    fit,
)

CLASSES = 4


def patterns(count: int = 96, *, size: int = 8) -> ImageSet:
    """Noise with one bright row that tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.randint(160, (count, 1, size, size), generator=generator)
    images[torch.arange(count), 0, 2 * labels] += 40
    return ImageSet(images.to(torch.uint8), labels, [str(i) for i in range(CLASSES)], "patterns")


def convnet(seed: int = 0, *, width: int = 6) -> nn.Sequential:
    """Two convolutions with all that makes resuming hard: BatchNorm, dropout, channels_last."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(width * 16, CLASSES))  # fmt: skip


def plain_net(seed: int = 0) -> nn.Sequential:
    """A network whose loss is a mean over images: no BatchNorm, no dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(),
                         nn.Linear(96, CLASSES))  # fmt: skip


def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An augmentation that draws from the batch's generator."""
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def seeded(seed: int = 3) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def batches(count: int = 96, size: int = 16, **options) -> Batches:
    """Training batches of the toy set, from a generator of their own."""
    return patterns(count).batches(size, generator=seeded(), **options)


def short(model: nn.Module | None = None, **options) -> History:
    """A run of a few steps on the toy set."""
    options = {"steps": 6, "seed": 1, **options}
    return fit(model or convnet(), batches(), classification_loss, **options)


def equal(a: dict, b: dict) -> bool:
    """Whether two state dicts hold the same keys and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def long_run(folder: Path, *, steps: int = 60, resume: bool = True) -> None:
    """Train with everything that has state; at the end write losses, weights and averages."""
    torch.set_num_threads(1)
    model, average, folder = convnet(), EMA(0.9), Path(folder)
    data = batches(transform=noisy)
    check = Evaluate("accuracy", lambda m: accuracy(m, patterns(20).batches(7)), every=7)
    history = fit(model, data, classification_loss, steps=steps, lr=3e-3, seed=5,
                  callbacks=[Checkpoint(folder, every=2), average, check], resume=resume)
    save_weights(model, folder / "end.safetensors")
    save_weights(average.model, folder / "average.safetensors")
    record = {"losses": history.losses, "accuracy": history.metrics["accuracy"],
              "rates": history.learning_rates, "evaluations": history.evaluations["accuracy"]}
    (folder / "end.json").write_text(json.dumps(record))


class StopAt(Callback):
    """Ends a run after some steps, as an interrupt would."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, run) -> None:
        """Raise at the step given."""
        if run.step == self.step:
            raise KeyboardInterrupt


def global_run(model: nn.Module, **options):
    """A run whose numbers must not depend on how many processes share it."""
    options = {"steps": 12, "lr": 3e-3, "precision": "fp32", "log_every": 5, **options}
    return fit(model, patterns().batches(16, generator=seeded()), classification_loss, **options)


def refused(batch_size: int, **options) -> str:
    """The message with which two processes refuse a batch size."""
    try:
        data = patterns(90).batches(batch_size, **options)
        fit(plain_net(), data, classification_loss, steps=1)
    except ValueError as error:
        return str(error)
    return "accepted"


def main(folder: Path) -> None:
    """What every launched process does."""
    torch.set_num_threads(1)
    model, checkpoint = plain_net(), Checkpoint(folder / "run", every=4)
    whole = global_run(model)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    save_weights(model, folder / f"weights-{rank}.safetensors")
    seen = {"world": world, "losses": whole.losses, "metrics": whole.metrics["accuracy"]}
    odd = patterns(95)
    seen["accuracy"] = [accuracy(model, odd.batches(n)) for n in (10, 19, 94, 95)]
    seen["one"] = accuracy(model, odd[:1].batches(4, shuffle=False))
    seen["refused"] = [refused(15), refused(16, shuffle=True, drop_last=False, generator=seeded())]
    seen["last"] = refused(16, shuffle=False, drop_last=False)
    try:
        global_run(plain_net(), callbacks=[checkpoint, StopAt(10)])
    except KeyboardInterrupt:
        seen["files"] = [file.name for file in checkpoint.files()]
    resumed = plain_net(1)
    seen["resumed"] = global_run(resumed, callbacks=[checkpoint], resume=True).losses
    save_weights(resumed, folder / f"resumed-{rank}.safetensors")
    norm, average = convnet(), EMA(0.8)
    torch.manual_seed(rank)  # nothing may rest on the caller's own seed
    fit(norm, patterns().batches(16, generator=torch.Generator().manual_seed(rank)),
        classification_loss, steps=4, callbacks=[average])
    save_weights(norm, folder / f"norm-{rank}.safetensors")
    save_weights(average.model, folder / f"average-{rank}.safetensors")
    seen["twice"] = global_run(model, steps=2).losses  # a second run of the same model
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is on disk. About one normal exit in fifty is aborted by a gloo thread that
    # DistributedDataParallel leaves behind (torch 2.14): that is not what is tested here.
    torch.distributed.barrier()
    os._exit(0)
