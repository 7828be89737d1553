"""Time each transform against torchvision and kornia on the same work.

    python benchmarks/augmentation.py [--sizes 32 64 224] [--batch 256] [--rounds 9] [--threads 2]
                                      [--compile] [--cold]

torchvision's transforms work picture by picture, kornia's and ours on the batch. Draws are part of
the work. Before anything is timed, our result is compared with torchvision's functions picture by
picture, with the parameters that we drew. Rounds are interleaved, A B C A B C; the table shows
medians in milliseconds, and how many times as long the others take. kornia has no filter against
aliasing in its crop, so its crop does less work; "crop, no filter" is the like-for-like row.

A process that has trained a step has allocated and freed large tensors, after which the C library
keeps what is freed instead of giving it back to the system page by page. Transforms run in such
processes, so the benchmark frees 30 MB first; `--cold` measures without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from vlm_course.foundations import augmentation as A

LINEAR = v2.InterpolationMode.BILINEAR
JITTER = (0.4, 0.4, 0.4, 0.1)


def reference(transform: A.Transform, image: torch.Tensor, p: dict) -> torch.Tensor | None:
    """torchvision's function for one picture with the parameters drawn for it; None: no peer."""
    if not bool(p.get("chosen", True)):
        return image
    if isinstance(transform, A.RandomResizedCrop):
        window = [int(p[name]) for name in ("top", "left", "height", "width")]
        return TF.resized_crop(
            image, *window, list(transform.size), antialias=transform.antialias
        )
    if isinstance(transform, A.RandomVerticalFlip):
        return TF.vertical_flip(image)
    if isinstance(transform, A.RandomHorizontalFlip):
        return TF.horizontal_flip(image)
    if isinstance(transform, A.RandomRotation):
        return TF.rotate(image, float(p["angle"]), interpolation=LINEAR)
    if isinstance(transform, A.ColorJitter):
        for change in p["order"].tolist():
            name = transform.names[change]
            image = getattr(TF, f"adjust_{name}")(image, float(p[name]))
        return image
    if isinstance(transform, A.RandomSolarize):
        return TF.solarize(image, transform.threshold)
    if isinstance(transform, A.RandomGrayscale):
        return TF.rgb_to_grayscale(image, 3)
    if isinstance(transform, A.GaussianBlur):
        side = transform.kernel_size
        return TF.gaussian_blur(image, [side, side], [float(p["sigma"])])
    if isinstance(transform, A.RandomErasing):
        top, left, height, width = (
            int(p["top"]), int(p["left"]), int(p["bottom"] - p["top"]), int(p["right"] - p["left"])
        )  # fmt: skip
        return TF.erase(image, top, left, height, width, torch.tensor(transform.value))
    return None


def check(transform: A.Transform, images: torch.Tensor) -> float | None:
    """The largest difference to torchvision over the first pictures; None where it has no peer."""
    images = images[:16]
    params = transform.draw(images, torch.Generator().manual_seed(0))
    ours = transform.apply_images(images, params)
    theirs = [
        reference(transform, image, A.take_rows(params, i)) for i, image in enumerate(images)
    ]
    return None if theirs[0] is None else (ours - torch.stack(theirs)).abs().max().item()


def rows(size: int) -> dict[str, tuple]:
    """Name -> (ours, torchvision's for one picture or None, kornia's for a batch or None)."""
    import kornia.augmentation as K

    side, blur = (size, size), 2 * (size // 20) + 1
    return {
        "crop": (A.RandomResizedCrop(size), v2.RandomResizedCrop(size), None),
        "crop, no filter": (
            A.RandomResizedCrop(size, antialias=False),
            v2.RandomResizedCrop(size, antialias=False),
            K.RandomResizedCrop(side),
        ),
        "horizontal flip": (
            A.RandomHorizontalFlip(),
            v2.RandomHorizontalFlip(),
            K.RandomHorizontalFlip(),
        ),
        "vertical flip": (A.RandomVerticalFlip(), v2.RandomVerticalFlip(), K.RandomVerticalFlip()),
        "rotation": (
            A.RandomRotation(30),
            v2.RandomRotation(30, interpolation=LINEAR),
            K.RandomRotation(30.0, p=1.0),
        ),
        "colour jitter": (
            A.ColorJitter(*JITTER),
            v2.ColorJitter(*JITTER),
            K.ColorJitter(*JITTER, p=1.0),
        ),
        "grey": (A.RandomGrayscale(0.2), v2.RandomGrayscale(0.2), K.RandomGrayscale(p=0.2)),
        "solarise": (
            A.RandomSolarize(0.5, 0.5),
            v2.RandomSolarize(0.5, 0.5),
            K.RandomSolarize(0.5, 0.0, p=0.5),
        ),
        "blur": (
            A.GaussianBlur(blur),
            v2.GaussianBlur(blur, (0.1, 2.0)),
            K.RandomGaussianBlur((blur, blur), (0.1, 2.0), p=1.0),
        ),
        "erase": (A.RandomErasing(), v2.RandomErasing(), K.RandomErasing(p=0.5)),
        "mixup": (A.Mixup(), None, K.RandomMixUpV2(p=1.0)),
        "cutmix": (A.CutMix(), None, K.RandomCutMixV2(p=1.0)),
    }


def simclr(size: int) -> tuple:
    """The whole chain of SimCLR in the three libraries."""
    import kornia.augmentation as K

    blur, strong = 2 * (size // 20) + 1, (0.8, 0.8, 0.8, 0.2)
    ours = A.Compose(
        A.RandomResizedCrop(size),
        A.RandomHorizontalFlip(),
        A.ColorJitter(*strong, p=0.8),
        A.RandomGrayscale(0.2),
        A.GaussianBlur(blur, p=0.5),
    )
    torchvision = v2.Compose(
        [
            v2.RandomResizedCrop(size),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*strong)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(blur, (0.1, 2.0))], p=0.5),
        ]
    )
    kornia = K.AugmentationSequential(
        K.RandomResizedCrop((size, size)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*strong, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((blur, blur), (0.1, 2.0), p=0.5),
    )
    return ours, torchvision, kornia


@torch.no_grad()
def measure(calls: dict, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, in turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def compare(
    name: str, size: int, images: torch.Tensor, trio: tuple, rounds: int, *, compiled: bool = False
) -> str:
    """One line of the table; `compiled`: ours through `torch.compile`, the others as they come."""
    ours, torchvision, kornia = trio
    difference = check(ours, images) if not isinstance(ours, A.Compose) else None
    allowed = 1e-5 if name != "rotation" else 2.5e-7 * max(size, 40)  # positions round in float32
    if difference is not None and difference > allowed:
        raise AssertionError(f"{name} at {size} px differs from torchvision by {difference:.1e}")
    generator = torch.Generator().manual_seed(0)
    apply = torch.compile(ours.apply_images) if compiled else ours.apply_images
    calls = {"ours": lambda: apply(images, ours.draw(images, generator))}
    if torchvision is not None:
        calls["torchvision"] = lambda: torch.stack([torchvision(image) for image in images])
    if kornia is not None:
        calls["kornia"] = lambda: kornia(images)
    took = measure(calls, rounds)
    cells = [f"{took[k]:9.2f}" if k in took else " " * 9 for k in ("ours", "torchvision", "kornia")]
    cells += [f"{took[k] / took['ours']:8.1f}x" if k in took else " " * 9
              for k in ("torchvision", "kornia")]  # fmt: skip
    shown = "" if difference is None else f"{difference:.0e}"
    return f"{size:5d}  {name:16s}{''.join(cells)}  {shown}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224], help="pixels a side")
    parser.add_argument("--batch", type=int, default=256, help="pictures, at 32 and 64 pixels")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", help="names of transforms; default: all")
    parser.add_argument("--cold", action="store_true", help="no memory was freed before")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not options.cold:
        torch.zeros(7_500_000)  # 30 MB, freed at once: from here on the allocator keeps its memory
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, {options.threads} threads; milliseconds a batch")
    print(f"{'px':>5s}  {'transform':16s}{'ours':>9s}{'tv':>9s}{'kornia':>9s}"
          f"{'tv/ours':>9s}{'k/ours':>9s}  difference to torchvision")  # fmt: skip
    for size in options.sizes:
        count = options.batch if size <= 64 else max(8, options.batch // 16)
        images = torch.rand(count, 3, size, size)
        for name, trio in {**rows(size), "SimCLR's chain": simclr(size)}.items():
            if options.only is None or name in options.only:
                row = compare(name, size, images, trio, options.rounds, compiled=options.compile)
                print(row, flush=True)


if __name__ == "__main__":
    main()
