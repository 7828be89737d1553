"""Time to draw 256 codes with a cache of keys and values, without it, and by transformers' GPT-2.

    python benchmarks/cache.py [--tokens 256 --batch 4 --rounds 5]

Both networks have the same weights (`from_gpt2`), draw in float32, and read the same number of
tokens. Ours chooses by a random number a code; GPT-2 is driven by a loop that chooses in the same
way, so that only the networks and their caches differ, and `generate` is timed beside it. Every
round times each candidate once, in turns; what counts is the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from vlm_course.generation.transformer import choose_codes, from_gpt2, probabilities


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256, help="codes of a picture")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    parser.add_argument("--codes", type=int, default=512, help="how many there are to choose from")
    parser.add_argument("--dim", type=int, default=128, help="channels")
    parser.add_argument("--depth", type=int, default=6, help="blocks")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    return parser.parse_args()


@torch.no_grad()
def draw_by_gpt2(gpt2: GPT2LMHeadModel, chance: Tensor) -> Tensor:
    """Codes by GPT-2 and its own cache, chosen as ours are."""
    token = torch.full((len(chance), 1), gpt2.config.bos_token_id)
    codes, past = [], None
    for i in range(chance.shape[1]):
        out = gpt2(token, past_key_values=past, use_cache=True)
        past = out.past_key_values
        token = choose_codes(probabilities(out.logits[:, -1]), chance[:, i])[:, None]
        codes.append(token)
    return torch.cat(codes, 1)


@torch.no_grad()
def generate(gpt2: GPT2LMHeadModel, batch: int, tokens: int) -> Tensor:
    """Codes by the library's own `generate`."""
    start = torch.full((batch, 1), gpt2.config.bos_token_id)
    return gpt2.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                         max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, pad_token_id=0)


def main() -> None:
    """Time, compare, print one line of JSON."""
    o = parse()
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(
        n_embd=o.dim, n_layer=o.depth, n_head=4, vocab_size=o.codes, n_positions=o.tokens,
        bos_token_id=o.codes - 1, eos_token_id=o.codes - 1)).eval()
    ours, words = from_gpt2(gpt2), torch.zeros(o.batch, 0, dtype=torch.long)
    chance = torch.rand(o.batch, o.tokens, generator=torch.Generator().manual_seed(0))
    candidates = {
        "cached": lambda: ours.sample_codes(words),
        "uncached": lambda: ours.sample_codes(words, cached=False),
        "gpt2": lambda: draw_by_gpt2(gpt2, chance),
        "gpt2_generate": lambda: generate(gpt2, o.batch, o.tokens),
    }
    same = torch.equal(candidates["cached"](), candidates["uncached"]())
    agree = (candidates["cached"]().flatten(1) == candidates["gpt2"]()).float().mean()
    times = {name: [] for name in candidates}
    for _ in range(o.rounds):
        for name, action in candidates.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({
        **{f"{name}_s": round(value, 3) for name, value in median.items()},
        "uncached_over_cached": round(median["uncached"] / median["cached"], 2),
        "gpt2_over_cached": round(median["gpt2"] / median["cached"], 2),
        "generate_over_cached": round(median["gpt2_generate"] / median["cached"], 2),
        "cached_equals_uncached": same, "codes_as_gpt2": round(float(agree), 4),
        "threads": torch.get_num_threads(), **vars(o)}))


if __name__ == "__main__":
    main()
