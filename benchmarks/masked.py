"""Step time of the masked autoencoder: what masking saves, and against transformers' ViTMAE.

    python benchmarks/masked.py [--dim 192 --depth 6 --size 32 --patch 4 --batch 32 --rounds 15]

Every round times each candidate once, in turns; what counts is the ratio of medians. A step is
forward, loss and backward, of the same pictures and masks in fp32. All three give the same loss
first, where they compute the same thing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vlm_course.foundations.images import default_device
from vlm_course.self_supervised.masked import (
    MAE,
    MAEConfig,
    MaskNoise,
    from_transformers_mae,
    mae_loss,
    masked_mse,
    patch_targets,
    random_masking,
    sincos_positions,
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=192, help="channels of the encoder")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the encoder")
    parser.add_argument("--heads", type=int, default=3, help="heads of the encoder")
    parser.add_argument("--decoder-dim", type=int, default=96, help="channels of the decoder")
    parser.add_argument("--decoder-depth", type=int, default=1, help="blocks of the decoder")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures, in pixels")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch, in pixels")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step")
    parser.add_argument("--mask-ratio", type=float, default=0.75, help="share hidden")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    return parser.parse_args()


def models(options: argparse.Namespace, device: torch.device):
    """Ours and the peer, of equal configuration, with equal weights and positions."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    peer = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=options.dim, num_hidden_layers=options.depth, layer_norm_eps=1e-6,
        num_attention_heads=options.heads, intermediate_size=4 * options.dim,
        image_size=options.size, patch_size=options.patch, norm_pix_loss=True,
        decoder_hidden_size=options.decoder_dim, decoder_num_attention_heads=options.heads,
        decoder_num_hidden_layers=options.decoder_depth, mask_ratio=options.mask_ratio,
        decoder_intermediate_size=4 * options.decoder_dim))
    side = options.size // options.patch
    with torch.no_grad():
        for table in (peer.vit.embeddings.position_embeddings, peer.decoder.decoder_pos_embed):
            table[0, 0], table[0, 1:] = 0, sincos_positions(table.shape[2], side, side)
    ours = MAE(MAEConfig(
        patch_size=options.patch, dim=options.dim, depth=options.depth, num_heads=options.heads,
        decoder_dim=options.decoder_dim, decoder_depth=options.decoder_depth,
        decoder_heads=options.heads, mask_ratio=options.mask_ratio))
    ours.load_state_dict(from_transformers_mae(peer.state_dict()))
    return ours.to(device), peer.to(device)


def reads_everything(model: MAE, images: Tensor, noise: Tensor) -> Tensor:
    """The same loss when the encoder reads the hidden patches, too."""
    order = torch.arange(noise.shape[1], device=noise.device).expand_as(noise)
    rows = images.shape[2] // model.config.patch_size
    prediction = model.decoder(model.encode(images, order), order, rows=rows)
    target = patch_targets(images, model.config.patch_size, normalize=True)
    return masked_mse(prediction, target, random_masking(noise, model.config.mask_ratio).masked)


def seconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """Wall time of one forward and backward pass."""
    began = time.perf_counter()
    step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Time in turns and print one JSON line."""
    options, device = parse(), default_device()
    ours, peer = models(options, device)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(options.batch, 3, options.size, options.size, generator=generator)
    images, noise = MaskNoise(options.patch)(images.to(device), generator)
    steps = {"ours": lambda: mae_loss(ours, (images, noise)),
             "ours, encoder reads everything": lambda: reads_everything(ours, images, noise),
             "transformers": lambda: peer(pixel_values=images, noise=noise).loss}
    assert abs(steps["ours"]() - steps["transformers"]()) < 1e-5
    for step in steps.values():  # warm up
        seconds(step, device)
    times = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({
        "milliseconds": {name: round(1e3 * value, 1) for name, value in median.items()},
        "masking saves": round(median["ours, encoder reads everything"] / median["ours"], 2),
        "transformers / ours": round(median["transformers"] / median["ours"], 2),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        **{name: value for name, value in vars(options).items()}}))


if __name__ == "__main__":
    main()
