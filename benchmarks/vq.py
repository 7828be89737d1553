"""Step time of the vector quantiser against vector_quantize_pytorch.

    python benchmarks/vq.py [--dim 8 --codes 512 --vectors 2048 --rounds 15]

Every round times each candidate once, in turns; what counts is the ratio of medians. A step is
assignment, moving averages, commitment loss and backward, of the same vectors in fp32. Both give
the same codes first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor, nn

from vlm_course.foundations.images import default_device
from vlm_course.generation.vqvae import VectorQuantizer


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=8, help="numbers in a vector")
    parser.add_argument("--codes", type=int, default=512, help="vectors in the codebook")
    parser.add_argument("--vectors", type=int, default=2048, help="vectors in a step")
    parser.add_argument("--cosine", action="store_true", help="unit vectors")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    return parser.parse_args()


def layers(options: argparse.Namespace, device: torch.device) -> dict[str, nn.Module]:
    """Ours and the peer, of equal configuration, with equal codebooks."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    peer = VectorQuantize(options.dim, options.codes, decay=0.99, commitment_weight=0.25,
                          rotation_trick=False, use_cosine_sim=options.cosine)
    ours = VectorQuantizer(options.dim, options.codes, cosine=options.cosine, kmeans=False)
    ours.codebook.copy_(peer.codebook)
    ours.averages.copy_(peer.codebook)
    return {"ours": ours.to(device).train(), "vector_quantize_pytorch": peer.to(device).train()}


def step(layer: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """The codes, and the seconds of one forward and backward pass."""
    x = x.clone().requires_grad_()
    began = time.perf_counter()
    vectors, codes, loss = layer(x)
    (vectors.square().mean() + loss).backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return codes, time.perf_counter() - began


def main() -> None:
    """Time in turns and print one JSON line."""
    options, device = parse(), default_device()
    both = layers(options, device)
    x = torch.randn(1, options.vectors, options.dim, device=device)
    first, second = (step(layer, x)[0] for layer in both.values())
    assert torch.equal(first, second)
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(options.rounds):
        for name, layer in both.items():
            times[name].append(step(layer, x)[1])
    median = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({
        "milliseconds": {name: round(1e3 * value, 2) for name, value in median.items()},
        "vector_quantize_pytorch / ours": round(
            median["vector_quantize_pytorch"] / median["ours"], 2),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        **{name: value for name, value in vars(options).items()}}))


if __name__ == "__main__":
    main()
