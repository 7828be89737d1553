"""The quantisers against vector_quantize_pytorch, the networks, losses, and what a run leaves.

As a script (`accelerate launch tests/test_vqvae.py FOLDER`) it trains on two processes.
"""

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vlm_course import train as training
from vlm_course.appendix.checkpoints import read_tensors, save_weights
from vlm_course.appendix.processes import make_accelerator
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.training import fit
from vlm_course.generation import vqvae
from vlm_course.generation.gan import load_generator, save_generator
from vlm_course.generation.vqvae import (
    EncodedBatches,
    FiniteScalarQuantizer,
    Perceptual,
    VectorQuantizer,
    VQVAEConfig,
    adaptive_gradient,
    code_shares,
    encode_set,
    kmeans,
    load_tokenizer,
    nearest_code,
    perplexity,
    reconstruction_loss,
    rotate_to,
    straight_through,
    tokenizer_reference,
    vqgan_loss,
    vqvae_loss,
)

runs = sys.modules[__name__]  # what `launched` runs
SMALL = dict(size=16, grid=4, width=16, codes=16, code_dim=4, batch_size=8, critic_width=8)


def pictures(count=32, size=16, channels=3):
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(count) % 2, ["a", "b"], "made", {})


def make(**changes):
    torch.manual_seed(0)
    return VQVAEConfig(**(SMALL | changes)).make_generator(3)


# ------------------------------------------------------------------------------- quantisers


def both_quantizers(cosine, rotation):
    peer = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(
        8, 32, decay=0.9, commitment_weight=0.25, use_cosine_sim=cosine, rotation_trick=rotation)
    own = VectorQuantizer(8, 32, decay=0.9, cosine=cosine, rotation=rotation, kmeans=False)
    own.codebook.copy_(peer.codebook)
    own.averages.copy_(peer.codebook)
    return own.train(), peer.train()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_equal_to_vector_quantize_pytorch(cosine, rotation):
    torch.manual_seed(0)
    own, peer = both_quantizers(cosine, rotation)
    for _ in range(4):
        a = torch.randn(4, 16, 8, requires_grad=True)
        b, upstream = a.detach().clone().requires_grad_(), torch.randn(4, 16, 8)
        found, (vectors, codes, loss) = own(a), peer(b)
        ((found.vectors * upstream).sum() + found.loss).backward()
        ((vectors * upstream).sum() + loss).backward()
        assert torch.equal(found.codes, codes)
        for ours, theirs in ((found.vectors, vectors), (found.loss, loss), (a.grad, b.grad),
                             (own.codebook, peer.codebook)):
            torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=2e-6, rtol=1e-5)


def test_codebook_by_loss_equal_to_vector_quantize_pytorch():
    module = pytest.importorskip("vector_quantize_pytorch")
    peer = module.VectorQuantize(8, 32, learnable_codebook=True, ema_update=False,
                                 commitment_weight=1.0, rotation_trick=False)
    own = VectorQuantizer(8, 32, decay=0, commitment=1.0, kmeans=False)
    own.codebook.data.copy_(peer.codebook)
    x = torch.randn(64, 8)
    found, (_, codes, loss) = own(x), peer(x[None])
    found.loss.backward()
    loss.backward()
    assert torch.equal(found.codes, codes[0])
    torch.testing.assert_close(own.codebook.grad, peer._codebook.embed.grad[0])


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 8, 8), (5, 4, 3)])
def test_fsq_equal_to_vector_quantize_pytorch(levels):
    peer = pytest.importorskip("vector_quantize_pytorch").FSQ(list(levels))
    own, a = FiniteScalarQuantizer(levels), (3 * torch.randn(4, 16, len(levels))).requires_grad_()
    b, upstream = a.detach().clone().requires_grad_(), torch.randn(4, 16, len(levels))
    found, (vectors, codes) = own(a), peer(b)
    (found.vectors * upstream).sum().backward()
    (vectors * upstream).sum().backward()
    assert torch.equal(found.codes, codes.long()) and found.loss == 0
    torch.testing.assert_close(found.vectors, vectors)
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(own.lookup(found.codes), found.vectors)
    assert own.size == math.prod(levels) > found.codes.max() and found.codes.min() >= 0


def test_restart_resets_vector_average_and_count():
    layer = VectorQuantizer(2, 4, kmeans=False, restart=0.5).train()
    layer.counts[:] = torch.tensor([9.0, 0.1, 9.0, 9.0])
    layer.codebook[:] = torch.tensor([[0.0, 0], [50, 50], [1, 1], [2, 0]])
    layer.averages[:] = layer.codebook * layer.counts[:, None]
    x = torch.rand(20, 2)
    layer(x)
    row = (x == layer.codebook[1]).all(1)
    assert row.any() and layer.counts[1] == 0.5
    torch.testing.assert_close(layer.averages[1], 0.5 * layer.codebook[1])
    assert not (x[:, None] == layer.codebook[[0, 2, 3]]).all(-1).any()  # the living stay
    before = layer.codebook[1].clone()
    layer.restart = 0.0
    layer(torch.full((8, 2), 9.0))  # nobody near: it must stay, up to smoothing
    torch.testing.assert_close(layer.codebook[1], before, atol=1e-3, rtol=1e-3)


def test_kmeans_start_happens_once_and_is_kept():
    torch.manual_seed(0)
    layer = VectorQuantizer(2, 4).train()
    x = torch.cat([0.01 * torch.randn(50, 2) + c for c in torch.eye(2).repeat(2, 1) * 5])
    layer(x)
    assert layer.ready and torch.cdist(x, layer.codebook).amin(1).max() < 2
    loaded = VectorQuantizer(2, 4).train()
    loaded.load_state_dict(layer.state_dict())
    book = loaded.codebook.clone()
    loaded(x + 40)  # started: moves a little, and does not jump to the new data
    assert loaded.ready and (loaded.codebook - book).abs().max() < 5
    fresh = VectorQuantizer(2, 4)
    loaded.load_state_dict(fresh.state_dict())
    assert not loaded.ready


def test_kmeans_reaches_a_fixed_point_that_is_the_mean():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    centres, counts = kmeans(x, 5, steps=100)
    codes = nearest_code(x, centres)
    assert counts.tolist() == torch.bincount(codes, minlength=5).tolist()
    for k in range(5):
        torch.testing.assert_close(centres[k], x[codes == k].mean(0), atol=1e-5, rtol=1e-5)
    assert kmeans(x[:3], 5)[0].shape == (5, 3)  # fewer rows than codes


def test_evaluation_changes_nothing():
    layer = VectorQuantizer(4, 8, kmeans=False, restart=1.0).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(30, 4))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_gradients_past_the_choice():
    x, vectors = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    upstream = torch.randn(9, 4)
    same, = torch.autograd.grad(straight_through(x, vectors), x, upstream)
    assert torch.equal(same, upstream)
    turned, = torch.autograd.grad(rotate_to(x, vectors), x, upstream)
    torch.testing.assert_close(torch.cosine_similarity(turned, x),
                               torch.cosine_similarity(upstream, vectors), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rotate_to(x, vectors), vectors, atol=1e-5, rtol=1e-5)


def test_perplexity():
    assert perplexity(torch.full((8,), 1 / 8)).item() == pytest.approx(8)
    assert perplexity(code_shares(torch.zeros(5, dtype=torch.int64), 8)).item() == 1
    assert code_shares(torch.tensor([[0, 0], [3, 1]]), 4).tolist() == [0.5, 0.25, 0, 0.25]


# ---------------------------------------------------------------------------------- network


@pytest.mark.parametrize("size,grid", [(32, 8), (64, 8), (28, 7), (16, 4), (8, 4)])
def test_shapes_of_all_sizes(size, grid):
    model = VQVAEConfig(size=size, grid=grid, width=16, codes=8).make_generator(1)
    images = torch.rand(2, 1, size, size)
    codes = model.encode(images)
    assert codes.shape == (2, grid, grid) and codes.dtype == torch.int64
    made = model.decode(codes)
    assert made.shape == images.shape and 0 <= made.min() <= made.max() <= 1


def test_codes_are_the_same_in_half_precision_and_in_training_mode():
    model, images = make().train(), torch.rand(8, 3, 16, 16)
    codes, state = model.encode(images), copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), codes)
        assert torch.equal(model.encode(images.bfloat16().float()),
                           model.encode(images.bfloat16()))
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="network must be float32.*float16"):
        make().half().encode(images)


@pytest.mark.parametrize("changes", [{}, {"cosine": False}, {"quantizer": "fsq"}])
def test_latents_and_codes_agree(changes):
    model, images = make(**changes).eval(), torch.rand(4, 3, 16, 16)
    latents, codes = model.encode_latents(images), model.encode(images)
    assert latents.shape == (4, model.latent_dim, 4, 4) and latents.dtype == torch.float32
    torch.testing.assert_close(model.decode_latents(latents), model.decode(codes))
    free = model.decode_latents(latents, quantize=False)
    assert free.shape == images.shape and not torch.equal(free, model.decode(codes))
    assert torch.equal(encode_set(model, images, batch_size=3), codes)


@pytest.mark.parametrize("call,words", [
    (lambda m: m.encode(torch.rand(2, 3, 20, 16)), "images must be .B, 3, 16, 16.*got .2, 3, 20"),
    (lambda m: m.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), "images must.*uint8"),
    (lambda m: m.decode(torch.full((1, 4, 4), 16)), "codes must be in 0..15; got 16"),
    (lambda m: m.decode(torch.full((1, 4, 4), -1)), "codes must be in 0..15; got -1"),
    (lambda m: m.decode(torch.zeros(1, 4, 4)), "codes must be .B, 4, 4. int64"),
    (lambda m: m.decode(torch.zeros(4, 4, dtype=torch.int64)), "codes must be .B, 4, 4. int64"),
    (lambda m: m.decode_latents(torch.zeros(1, 5, 4, 4)), "latents must be .B, 4, 4, 4. float"),
    (lambda m: m.quantizer(torch.zeros(3, 5)), "x must be .*4. float; got .3, 5"),
    (lambda m: tokenizer_reference(m), "tokenizer must come from load_tokenizer"),
])
def test_wrong_inputs_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(make())


@pytest.mark.parametrize("changes,words", [
    ({"size": 60}, "size must be grid times a power of two.*60 for grid 8"),
    ({"size": 8, "grid": 8}, "size must be"), ({"size": 24, "grid": 8}, "size must be"),
    ({"grid": 0}, "size must be"), ({"quantizer": "lfq"}, "quantizer must be vq or fsq.*lfq"),
    ({"width": 12}, "width must be"), ({"depth": 0}, "depth at least 1"),
    ({"start": -0.1}, "start and ramp must be at least 0"), ({"codes": 1}, "size 2"),
    ({"decay": 1.0}, r"decay in \[0, 1\)"), ({"code_dim": 0}, "dim must be at least 1"),
    ({"quantizer": "fsq", "levels": (2, 8)}, "levels must be.*at least 3"),
])
def test_wrong_configurations_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        VQVAEConfig(**changes)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        VQVAEConfig().make_generator(4)


# ------------------------------------------------------------------------------------ losses


def test_adaptive_gradient_is_the_naive_one():
    model, inputs = make(), torch.rand(4, 3, 16, 16) * 2 - 1
    critic = vqvae.make_patch_critic(3, 8)
    made, _ = model(inputs)
    last, parts = model.decoder[-1].weight, (reconstruction_loss(made, inputs),
                                             -critic(made).mean())
    naive = [torch.autograd.grad(part, last, retain_graph=True)[0] for part in parts]
    weight, near, far = adaptive_gradient(*parts, made, last)
    torch.testing.assert_close(weight, naive[0].norm() / naive[1].norm(), rtol=1e-3, atol=0)
    both, = torch.autograd.grad(made, last, near + weight * far)
    torch.testing.assert_close(both, naive[0] + weight * naive[1], atol=1e-6, rtol=1e-4)


def test_perceptual_distance_is_zero_for_equals_and_has_a_gradient():
    torch.manual_seed(0)
    judge = Perceptual(side=16).train()
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    noisy = (images + 0.3 * torch.randn_like(images)).requires_grad_()
    assert judge(images, images) < 1e-6 < judge(noisy, images)
    judge(noisy, images).backward()
    assert noisy.grad.abs().sum() > 0 and not judge.network.training
    assert judge(images[:, :1], images[:, :1]) < 1e-6  # grey too
    assert not any(p.requires_grad for p in judge.parameters())


def test_critic_waits_then_grows_and_each_network_gets_its_own_gradient():
    model = make(start=0.5, ramp=0.25, perceptual=0)
    model = model.config.build(model)
    model.steps = 8
    shares = [model.ramp() for model.step in range(9)]
    assert shares == [0, 0, 0, 0, 0, 0.5, 1, 1, 1]
    images, model.step = torch.rand(4, 3, 16, 16), 0
    loss, metrics = vqgan_loss(model.train(), images)
    loss.backward()
    assert metrics["critic"] == 0 and all((p.grad == 0).all() for p in model.critic.parameters())
    model.zero_grad()
    model.step = 8
    loss, metrics = vqgan_loss(model.eval(), images)  # the codebook stays as it is
    loss.backward()
    made, found = model.autoencoder(images * 2 - 1)
    critic_loss, generator_loss = vqvae.LOSSES["hinge"]
    own = critic_loss(model.critic(images * 2 - 1), model.critic(made.detach()))
    rest = (reconstruction_loss(made, images * 2 - 1) + found.loss
            + metrics["weight"] * generator_loss(vqvae.frozen(model.critic)(made)))
    for network, part in ((model.critic, own), (model.autoencoder, rest)):
        wanted = torch.autograd.grad(part, list(network.parameters()), retain_graph=True)
        for parameter, gradient in zip(network.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(loss, own + rest)
    assert metrics["weight"] > 0 and model.step == 8


def test_without_judges_the_loss_is_the_plain_one():
    model = make(perceptual=0, adversarial=0)
    config = model.config
    assert config.build(model) is model and config.loss() is vqvae_loss
    images = torch.rand(4, 3, 16, 16)
    model.eval()
    loss, metrics = vqvae_loss(model, images)
    made, found = model(images * 2 - 1)
    torch.testing.assert_close(loss, reconstruction_loss(made, images * 2 - 1) + found.loss)
    assert 1 <= metrics["perplexity"] <= 16 and 0 < metrics["used"] <= 1


def test_learning(one_thread):
    data, config = pictures(16), VQVAEConfig(**(SMALL | dict(perceptual=0, adversarial=0)), lr=3e-3)
    smooth = nn.functional.interpolate(data.images[..., ::8, ::8].float(), size=16, mode="bilinear")
    data = dataclasses.replace(data, images=smooth.to(torch.uint8))
    torch.manual_seed(0)
    model = config.make_generator(3)
    history = fit(model, data.batches(8), config.loss(), steps=60, optimizer=config.optimizer,
                  callbacks=config.callbacks(), seed=0)
    values = history.metrics["reconstruction"]
    assert sum(values[-5:]) < 0.7 * sum(values[:5])


# -------------------------------------------------------------------------- files and batches


def test_saved_and_loaded(tmp_path):
    model, images = make(), torch.rand(3, 3, 16, 16)
    model.train()(torch.rand(16, 3, 16, 16))  # starts the codebook
    save_generator(model.eval(), tmp_path / "run" / "generator.safetensors")
    loaded = load_generator(tmp_path / "run")
    assert torch.equal(loaded.encode(images), model.encode(images)) and loaded.quantizer.ready
    assert loaded.config == model.config and loaded.classes == []
    tokenizer = load_tokenizer("run", near=tmp_path)
    reference = tokenizer_reference(tokenizer)
    assert reference["run"] == "run" and not any(p.requires_grad for p in tokenizer.parameters())
    assert load_tokenizer(**reference, near=tmp_path / "other").reference == reference
    with pytest.raises(ValueError, match="another one than the model was trained with"):
        load_tokenizer("run", near=tmp_path, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match="tokenizer 'nowhere'"):
        load_tokenizer("nowhere", near=tmp_path)
    with pytest.raises(ValueError, match="tokenizer must be a VQVAE"):
        load_tokenizer("stylegan_emoji_64")


def test_encoded_batches_follow_the_pictures():
    data, model = pictures(), make()
    codes = encode_set(model, data)
    a = data.batches(8, generator=torch.Generator().manual_seed(3))
    b = EncodedBatches(codes, data.labels, 8, generator=torch.Generator().manual_seed(3))
    for (images, labels), (values, same) in zip(a, b, strict=True):
        assert torch.equal(labels, same) and torch.equal(model.encode(images), values)
    parts = [next(iter(b.shard(rank, 2)))[0] for rank in (0, 1)]
    b.load_state_dict(b.state_dict())
    assert [len(part) for part in parts] == [4, 4]
    with pytest.raises(ValueError, match="values and labels must be one each"):
        EncodedBatches(codes, data.labels[:3], 8)


def test_a_run_leaves_everything(tmp_path, monkeypatch):
    data = pictures()
    test = dataclasses.replace(pictures(8), classes=["a", "c"])
    method = VQVAEConfig(**SMALL, start=0.3, ramp=0.3)
    monkeypatch.setattr(training, "load_parts", lambda name, size: (data, test))
    options = training.RunOptions(out=tmp_path / "run", data="made", steps=4, label=[])
    results = training.train("vqvae", method, options)
    assert {"psnr", "perplexity", "used"} <= results.keys() and results["part"] == "test"
    assert (tmp_path / "run" / "reconstructions.png").stat().st_size > 0
    model = load_tokenizer(tmp_path / "run")
    assert model.latent_std.min() > 0 and not torch.equal(model.latent_std, torch.ones(4))
    latents = encode_set(model, data, latents=True).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(model.latent_mean, latents.mean(1), atol=1e-3, rtol=1e-2)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4


# -------------------------------------------------------------------------- two processes


def quantized(rows):
    torch.manual_seed(0)
    layer = VectorQuantizer(4, 6, decay=0.8).train()  # k-means is drawn by process 0 for all
    for _ in range(3):
        x = torch.randn(16, 4)
        layer(x[rows] if layer.ready else x)
    return layer


def main(folder: Path) -> None:
    """What every launched process does."""
    accelerator = make_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    own = quantized(torch.arange(16).tensor_split(world)[rank])
    save_weights(own, folder / f"layer-{rank}.safetensors")
    config = VQVAEConfig(**SMALL, start=0.5, ramp=0.0)
    torch.manual_seed(0)
    model = config.make_generator(3)
    fit(config.build(model), pictures().batches(8), config.loss(), steps=4, seed=0,
        optimizer=config.optimizer, callbacks=config.callbacks(), precision="fp32")
    save_weights(model, folder / f"model-{rank}.safetensors")


def test_two_processes_have_one_codebook(launched):
    first, second = (read_tensors(launched / f"layer-{rank}.safetensors")[0] for rank in (0, 1))
    for name, value in quantized(slice(None)).state_dict().items():
        torch.testing.assert_close(first[name], second[name])
        if name == "codebook":
            assert torch.isfinite(value).all()
    first, second = (read_tensors(launched / f"model-{rank}.safetensors")[0] for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
