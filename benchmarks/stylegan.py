"""Time of a training step of StyleGAN2, against stylegan2-pytorch at equal configuration.

    pip install stylegan2_pytorch==1.9.0
    python benchmarks/stylegan.py [--size 64 --batch 16 --width 32 --critic-width 64 --rounds 9]

Equal are: the side of the pictures, the batch, the latents, the layers of the mapping, the
generator's channels at each resolution, the critic's channels (theirs are four times the
generator's at full size, so ours are set to that here), Adam, and that both networks take a step.
Style mixing, augmentation, path lengths and averaging are off in both. A step is timed without and
with the critic's gradient penalty on real pictures. What stays different is the authors' choice:
they interpolate before the convolution that doubles the side, we filter after it; they draw fakes
twice a step, we once; their critic's first block reads pixels, ours has a 1 x 1 convolution before
it, and theirs has one more block, at 2 pixels. Floating point operations of the forward passes are
counted and printed, so that one sees how much work each does.

The peer wants CUDA, and packages that a step does not need, when it is imported: both are stubbed.
Every round times each candidate once, in turns; what counts is the ratio of medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlm_course.foundations.training import autocast, model_on_device
from vlm_course.generation.stylegan import StyleGAN, StyleGANConfig, stylegan_loss

CPU = torch.device("cpu")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="pictures in a step")
    parser.add_argument("--width", type=int, default=32, help="generator's channels at full size")
    parser.add_argument("--critic-width", type=int, default=64, help="the critic's")
    parser.add_argument("--max-width", type=int, default=128, help="largest number of channels")
    parser.add_argument("--latent", type=int, default=128, help="numbers in a latent and a style")
    parser.add_argument("--depth", type=int, default=4, help="layers of the mapping")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each")
    return parser.parse_args()


def load_peer():
    """The module of stylegan2-pytorch, imported without CUDA and without what a step never calls."""
    stubs = {name: types.ModuleType(name) for name in ("fire", "aim")}
    try:
        import vector_quantize_pytorch  # noqa: F401
    except ImportError:
        stubs["vector_quantize_pytorch"] = types.ModuleType("vector_quantize_pytorch")
        stubs["vector_quantize_pytorch"].VectorQuantize = None
    with mock.patch.dict(sys.modules, stubs), \
            mock.patch("torch.cuda.is_available", return_value=True):
        return importlib.import_module("stylegan2_pytorch.stylegan2_pytorch")


class Peer(nn.Module):
    """Networks of stylegan2-pytorch, and its two optimisers."""

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        self.lib, o = load_peer(), options
        self.mapping = self.lib.StyleVectorizer(o.latent, o.depth, lr_mul=0.1)
        self.generator = self.lib.Generator(o.size, o.latent, o.width // 2, fmap_max=o.max_width)
        self.critic = self.lib.Discriminator(o.size, o.critic_width // 4, fmap_max=o.max_width)
        both = [*self.generator.parameters(), *self.mapping.parameters()]
        self.adam = [torch.optim.Adam(both, lr=1e-4, betas=(0.5, 0.9)),
                     torch.optim.Adam(self.critic.parameters(), lr=2e-4, betas=(0.5, 0.9))]

    def generate(self, count: int) -> Tensor:
        """Fakes, each with one style throughout."""
        g = self.generator
        latents = torch.randn(count, g.latent_dim)
        styles = self.lib.latent_to_w(self.mapping, [(latents, g.num_layers)])
        noise = torch.rand(count, g.image_size, g.image_size, 1)
        return g(self.lib.styles_def_to_tensor(styles), noise)

    def step(self, images: Tensor, penalty: bool) -> None:
        """As `Trainer.train` takes it: the critic's step, then the generator's."""
        fake = self.generate(len(images)).clone().detach()
        images = images.clone().requires_grad_(penalty)
        fake_logits, real_logits = self.critic(fake)[0], self.critic(images)[0]
        loss = self.lib.hinge_loss(fake_logits, real_logits)
        if penalty:
            loss = loss + self.lib.gradient_penalty(images, real_logits)
        self.adam[1].zero_grad()
        loss.backward()
        self.adam[1].step()
        self.adam[0].zero_grad()
        self.lib.gen_hinge_loss(self.critic(self.generate(len(images)))[0], None).backward()
        self.adam[0].step()


def our_step(model: StyleGAN, adam: torch.optim.Optimizer, precision: str) -> Callable:
    """One step of `fit` of ours; the penalty is on at step 0."""
    def step(images: Tensor, penalty: bool) -> None:
        model.step = 0 if penalty else 1
        with autocast(CPU, precision):
            loss, _ = stylegan_loss(model, images, torch.zeros(len(images), dtype=torch.long))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return step


def operations(call: Callable) -> float:
    """Floating point operations of a call, in units of 10^9."""
    with FlopCounterMode(display=False) as counter:
        call()
    return round(counter.get_total_flops() / 1e9, 2)


def seconds(step: Callable, images: Tensor, penalty: bool) -> float:
    """Wall time of one step."""
    began = time.perf_counter()
    step(images, penalty)
    return time.perf_counter() - began


def main() -> None:
    """Count, time in turns and print one JSON line."""
    options = parse()
    torch.manual_seed(0)
    config = StyleGANConfig(size=options.size, width=options.width, mixing=0.0, path=0.0,
                            critic_width=options.critic_width, max_width=options.max_width,
                            latent_dim=options.latent, style_dim=options.latent, ada_target=0.0,
                            mapping_depth=options.depth, conditional=False)
    model, peer = model_on_device(config.adversarial(3), CPU), Peer(options)
    images = torch.rand(options.batch, 3, options.size, options.size)
    labels = torch.zeros(options.batch, dtype=torch.long)
    work = {"ours": [operations(lambda: model.generator.synthesis(model.random_styles(labels))),
                     operations(lambda: model.critic(images))],
            "stylegan2-pytorch": [operations(lambda: peer.generate(options.batch)),
                                  operations(lambda: peer.critic(images))]}
    adam = config.optimizer(model)
    steps = {"ours": our_step(model, adam, "fp32"), "ours, auto": our_step(model, adam, "auto"),
             "stylegan2-pytorch": peer.step}
    times: dict[tuple[str, bool], list[float]] = {(n, p): [] for p in (False, True) for n in steps}
    for turn in range(options.rounds + 1):  # the first one warms up
        for (name, penalty), values in times.items():
            values.append(seconds(steps[name], images, penalty))
            if not turn:
                values.clear()
    median = {key: statistics.median(values) for key, values in times.items()}
    theirs = {penalty: median["stylegan2-pytorch", penalty] for penalty in (False, True)}
    print(json.dumps({
        "milliseconds": {f"{name}{', penalty' if p else ''}": round(1e3 * value, 1)
                         for (name, p), value in median.items()},
        "theirs / ours": {f"{name}{', penalty' if p else ''}": round(theirs[p] / value, 2)
                          for (name, p), value in median.items() if name != "stylegan2-pytorch"},
        "GFLOP of generator, critic": work,
        "threads": torch.get_num_threads(), "torch": torch.__version__, **vars(options)}))


if __name__ == "__main__":
    main()
