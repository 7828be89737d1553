"""The masked autoencoder: equal to its peer, exact gradients, replayable, readable refusals."""

from __future__ import annotations

import math
import statistics
import time

import pytest
import torch
from torch import Tensor

from vlm_course.appendix.checkpoints import Checkpoint
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.training import fit
from vlm_course.self_supervised.masked import (
    MAE,
    MAEConfig,
    MAEDecoder,
    MaskNoise,
    SinCosViT,
    from_transformers_mae,
    mae_loss,
    mark_pasted,
    masked_mse,
    patch_targets,
    patchify,
    pixel_mask,
    random_masking,
    reconstruct,
    sincos_positions,
    take,
    unpatchify,
)

SMALL = dict(patch_size=4, dim=32, depth=2, num_heads=2, decoder_dim=16, decoder_depth=1,
             decoder_heads=2)


def build(**changes) -> MAE:
    """A small model from a fixed seed."""
    torch.manual_seed(0)
    return MAE(MAEConfig(**{**SMALL, **changes}))


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def views(*shape: int, seed: int = 0, block: int = 1) -> tuple[Tensor, Tensor]:
    """Random images of the shape, and their noise."""
    draw = generator(seed)
    return MaskNoise(4, block=block)(torch.rand(shape, generator=draw), draw)


def pictures(count: int = 24) -> ImageSet:
    """A set of random 8 x 12 pictures."""
    pixels = torch.randint(0, 256, (count, 3, 8, 12), generator=generator(1), dtype=torch.uint8)
    return ImageSet(pixels, torch.zeros(count, dtype=torch.int64), ["noise"], "noise")


# ------------------------------------------------------------------------------------------ peer


def peer_and_ours(*, normalize: bool, mask_ratio: float = 0.75, dim: int = 48, depth: int = 2,
                  decoder_dim: int = 32, image_size: int = 32, patch_size: int = 8):
    """transformers' model with random weights and our positions, and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=4 * dim,
        image_size=image_size, patch_size=patch_size, decoder_hidden_size=decoder_dim,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=2, norm_pix_loss=normalize,
        decoder_intermediate_size=4 * decoder_dim, mask_ratio=mask_ratio, layer_norm_eps=1e-6))
    draw, side = generator(0), image_size // patch_size
    with torch.no_grad():
        for weight in peer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / 10)
        for table in (peer.vit.embeddings.position_embeddings, peer.decoder.decoder_pos_embed):
            table[0, 0], table[0, 1:] = 0, sincos_positions(table.shape[2], side, side)
    ours = MAE(MAEConfig(patch_size=patch_size, dim=dim, depth=depth, num_heads=4,
                         decoder_dim=decoder_dim, decoder_depth=2, decoder_heads=2,
                         normalize_target=normalize, mask_ratio=mask_ratio))
    ours.load_state_dict(from_transformers_mae(peer.state_dict()))
    return peer, ours


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.4])
def test_equals_transformers(normalize: bool, mask_ratio: float) -> None:
    """Loss, predictions, mask and every gradient."""
    peer, ours = peer_and_ours(normalize=normalize, mask_ratio=mask_ratio)
    draw = generator(2)
    images = torch.rand(5, 3, 32, 32, generator=draw)
    noise = torch.rand(5, 16, generator=draw)
    theirs, (prediction, masked) = peer(pixel_values=images, noise=noise), ours(images, noise)
    loss = mae_loss(ours, (images, noise))
    assert abs(theirs.loss - loss) <= 1e-5
    assert (theirs.logits - prediction).abs().max() <= 1e-5
    assert torch.equal(theirs.mask.bool(), masked)
    theirs.loss.backward()
    loss.backward()
    gradients = from_transformers_mae({name: weight.grad for name, weight in
                                       peer.named_parameters() if weight.grad is not None})
    for name, weight in ours.named_parameters():
        assert (gradients[name] - weight.grad).abs().max() <= 1e-5, name


def test_published_names_load_too() -> None:
    """Files on the hub carry the names that transformers used before version 5."""
    _, ours = peer_and_ours(normalize=True)
    old = {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("encoder.blocks.", "vit.encoder.layer.").replace(
            "decoder.blocks.", "decoder.decoder_layers.")
        for new, before in ((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
                            (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
                            (".attn.proj.", ".attention.output.dense."),
                            ("encoder.norm.", "vit.layernorm."),
                            ("encoder.cls_token", "vit.embeddings.cls_token"),
                            ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings."
                                                          "projection."),
                            ("decoder.norm.", "decoder.decoder_norm."),
                            ("decoder.enter.", "decoder.decoder_embed."),
                            ("decoder.head.", "decoder.decoder_pred.")):
            name = name.replace(new, before)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                old[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            old[name] = tensor
    old["vit.embeddings.position_embeddings"] = torch.zeros(1, 17, 48)
    renamed = from_transformers_mae(old)
    assert renamed.keys() == ours.state_dict().keys()
    assert all(torch.equal(renamed[name], value) for name, value in ours.state_dict().items())


def positions_as_in_the_paper(dim: int, rows: int, columns: int) -> Tensor:
    """util/pos_embed.py of the paper's code, in words: the column goes first."""
    out = torch.zeros(rows * columns, dim, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            for k in range(dim // 4):
                omega = 1 / 10_000 ** (k / (dim / 4))
                waves = (math.sin(c * omega), math.cos(c * omega), math.sin(r * omega),
                         math.cos(r * omega))
                out[r * columns + c, k::dim // 4] = torch.tensor(waves, dtype=torch.float64)
    return out


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (14, 14), (1, 5)])
def test_positions(grid: tuple[int, int]) -> None:
    """The paper's numbers, on grids of any shape."""
    ours = sincos_positions(32, *grid).double()
    assert (ours - positions_as_in_the_paper(32, *grid)).abs().max() < 1e-5


def test_positions_depend_on_the_offset_only() -> None:
    """Products of positions equally far apart are equal; farther ones differ."""
    grid = sincos_positions(64, 6, 9, base=30.0).view(6, 9, 64).double()
    one = [grid[r, c] @ grid[r + 2, c + 3] for r in range(4) for c in range(6)]
    assert max(one) - min(one) < 1e-5
    assert grid[0, 0] @ grid[0, 1] > grid[0, 0] @ grid[0, 3] + 1


# --------------------------------------------------------------------------------------- masking


def test_four_patches_by_hand() -> None:
    """The worked permutation of the chapter."""
    masking = random_masking(torch.tensor([[0.7, 0.2, 0.9, 0.4]]), 0.5)
    assert masking.keep.tolist() == [[1, 3]]
    assert masking.restore.tolist() == [[2, 0, 3, 1]]
    assert masking.masked.tolist() == [[True, False, True, False]]


def test_shuffle_and_restore_are_inverse_and_counts_are_fixed() -> None:
    """Any noise gives the same count, and every patch comes home."""
    noise = torch.rand(50, 49, generator=generator())
    for ratio in (0.1, 0.5, 0.75, 0.9):
        masking = random_masking(noise, ratio)
        kept = math.floor(49 * (1 - ratio) + 1e-6)
        assert masking.keep.shape == (50, kept)
        assert (masking.masked.sum(1) == 49 - kept).all()
        assert not masking.masked.gather(1, masking.keep).any()
        assert torch.equal(masking.restore.gather(1, masking.keep),
                           torch.arange(kept).expand(50, kept))
    assert random_masking(torch.rand(1, 100), 0.9).keep.shape == (1, 10)  # not 9


def test_blocks_are_hidden_together() -> None:
    """With block=2 whole 2 x 2 blocks vanish, but for the one that the fixed count cuts."""
    _, noise = views(40, 3, 32, 32, block=2)
    masked = random_masking(noise, 0.75).masked.view(40, 4, 2, 4, 2).sum((2, 4))
    assert ((masked == 0) | (masked == 4)).all()
    _, odd = views(4, 3, 20, 12, block=2)  # 5 x 3 patches
    assert odd.shape == (4, 15)


def test_noise_is_replayed_on_resume() -> None:
    """A generator decides all masks; batches resumed inside an epoch draw the same ones."""
    def batches():
        return pictures().batches(8, generator=generator(3), transform=MaskNoise(4))

    whole, again = ([noise for (_, noise), _ in batches()] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert not torch.equal(whole[0], whole[1])
    first, second = batches(), batches()
    next(iter(first))
    second.load_state_dict(first.state_dict())
    rest = [noise for (_, noise), _ in second]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[1:], strict=True))


def test_a_resumed_run_ends_like_an_unbroken_one(tmp_path) -> None:
    """Losses and weights, through a checkpoint in the middle of an epoch."""
    def run(steps: int, folder: str, resume: bool = False):
        model = build()
        batches = pictures().batches(8, generator=generator(3), transform=MaskNoise(4))
        saved = Checkpoint(tmp_path / folder, every=4, keep=9)
        history = fit(model, batches, mae_loss, steps=steps, precision="fp32", callbacks=[saved],
                      resume=resume, schedule="constant", warmup=0)
        return model, history.losses

    model, losses = run(7, "whole")
    run(4, "broken")
    with pytest.warns(UserWarning, match="steps"):
        resumed, both = run(7, "broken", resume=True)
    assert both == losses
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 resumed.state_dict().values(), strict=True))


def test_augmentation_comes_first_and_shares_the_generator() -> None:
    """The noise follows what the augmentation drew."""
    def crop(images, draw):
        return images[:, :, :4] * torch.rand(1, generator=draw)

    images, noise = MaskNoise(4, augment=crop)(torch.ones(2, 3, 8, 8), generator(5))
    draw = generator(5)
    scale = torch.rand(1, generator=draw)
    assert torch.equal(images, torch.ones(2, 3, 4, 8) * scale)
    assert torch.equal(noise, torch.rand(2, 1, 2, generator=draw).flatten(1))


# -------------------------------------------------------------------------------- patches and loss


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 4, 20), (3, 3, 24, 12)])
def test_patches_and_back(shape: tuple[int, ...]) -> None:
    """Nothing is lost, for any aspect ratio; patch 1 is the one to the right of patch 0."""
    images = torch.rand(shape)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, patch_size=4, rows=shape[2] // 4), images)
    if shape[3] > 4:
        corner = patches[0, 1].view(4, 4, shape[1]).permute(2, 0, 1)
        assert torch.equal(corner, images[0, :, :4, 4:8])


@pytest.mark.parametrize("normalize", [False, True])
def test_visible_patches_get_no_gradient(normalize: bool) -> None:
    """Exactly zero at visible patches, for predictions and for targets."""
    target = patch_targets(torch.rand(3, 3, 8, 16), 4, normalize=normalize).requires_grad_()
    prediction = torch.randn(3, 8, 48, requires_grad=True)
    masked = random_masking(torch.rand(3, 8), 0.75).masked
    masked_mse(prediction, target, masked).backward()
    for leaf in (prediction, target):
        assert (leaf.grad[~masked] == 0).all()
        assert (leaf.grad[masked].abs().sum(-1) > 0).all()


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    """Changing what is hidden changes nothing that is painted: the encoder cannot see it."""
    model, (images, noise) = build(), views(2, 3, 16, 16)
    prediction, masked = model(images, noise)
    patches = patchify(images, 4)
    patches[masked] = torch.rand(int(masked.sum()), 48)
    changed, _ = model(unpatchify(patches, patch_size=4, rows=4), noise)
    assert torch.equal(prediction, changed)
    patches = patchify(images, 4)
    patches[~masked] = 0.5
    other, _ = model(unpatchify(patches, patch_size=4, rows=4), noise)
    assert (prediction - other).abs().max() > 1e-4


def test_constant_pictures_are_harmless() -> None:
    """All pixels equal: the normalised target is zero, loss and gradients are finite."""
    model, images = build(), torch.full((4, 3, 8, 8), 0.5)
    assert (patch_targets(images, 4, normalize=True) == 0).all()
    loss = mae_loss(model, MaskNoise(4)(images, generator()))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_the_target_uses_the_unbiased_variance() -> None:
    """One patch of three numbers, by hand."""
    image = torch.tensor([0.0, 0.0, 0.6]).view(1, 3, 1, 1)
    target = patch_targets(image, 1, normalize=True).flatten()
    assert torch.allclose(target, (image.flatten() - 0.2) / math.sqrt(0.12 + 1e-6))


# ------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 3, 8, 20), (2, 3, 24, 4)])
def test_any_shape_and_a_batch_of_one(shape: tuple[int, ...]) -> None:
    """Grids that the model was not told of; every parameter gets a gradient (none is idle)."""
    model = build(normalize_target=False)
    prediction, masked = model(*views(*shape))
    patches = (shape[2] // 4) * (shape[3] // 4)
    assert prediction.shape == (shape[0], patches, 48) and masked.shape == (shape[0], patches)
    mae_loss(model, views(*shape)).backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())
    assert set(model.encoder.intermediates(torch.rand(shape))) == {"blocks.0", "blocks.1"}


def test_an_odd_last_batch_trains() -> None:
    """27 pictures in batches of 8: the last one has three."""
    batches = pictures(27).batches(8, drop_last=False, transform=MaskNoise(4))
    assert len(fit(build(), batches, mae_loss, steps=4).losses) == 4


def test_half_precision() -> None:
    """Under bf16 autocast, and with all weights in bf16, the loss is finite fp32 and close."""
    model, batch = build(), views(4, 3, 16, 16)
    exact = mae_loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mae_loss(model, batch)
    pixels = mae_loss(model, MaskNoise(4)(batch[0].half(), generator())[:1] + batch[1:])
    half = mae_loss(model.bfloat16(), (batch[0].bfloat16(), batch[1]))
    for loss in (mixed, pixels, half):
        assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02 * exact
    seen = reconstruct(model, batch[0].bfloat16(), batch[1])
    assert all(picture.isfinite().all() for picture in seen[:3])


def test_pixels_are_normalised_inside() -> None:
    """A model told mean and standard deviation equals one given normalised pixels."""
    told, plain = build(mean=(0.5,), std=(0.2,)), build()
    images, noise = views(2, 3, 8, 8)
    normal = (images - 0.5) / 0.2
    assert torch.allclose(mae_loss(told, (images, noise)), mae_loss(plain, (normal, noise)))
    seen = reconstruct(told, images, noise)
    assert torch.allclose(seen.pasted, images, atol=1e-6) is False
    hidden = seen.seen != images
    assert torch.equal(seen.pasted[~hidden], images[~hidden])


def test_compiled_without_a_break_equals_eager() -> None:
    """One graph, also where masking and positions are computed; the same loss and gradients."""
    model, batch = build(), views(3, 3, 8, 16)
    mae_loss(model, batch).backward()
    eager = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(lambda *inputs: mae_loss(model, inputs), backend="aot_eager",
                         fullgraph=True)
    loss(*batch).backward()
    for weight, gradient in zip(model.parameters(), eager, strict=True):
        assert torch.allclose(weight.grad, gradient, atol=1e-6)


def test_a_hole_as_noise() -> None:
    """A 0 and 1 mask as noise hides exactly the hole."""
    hole = torch.zeros(2, 4, 4)
    hole[:, 1:3, 1:3] = 1
    images = torch.rand(2, 3, 16, 16)
    result = reconstruct(build(), images, hole.flatten(1), mask_ratio=0.25)
    assert torch.equal(result.masked, hole.flatten(1).bool())
    assert torch.equal(result.pasted[:, :, :4], images[:, :, :4])
    assert torch.equal(result.pasted[:, :, 4:12, 4:12], result.predicted[:, :, 4:12, 4:12])


def test_looking_changes_nothing() -> None:
    """Weights and modes are as before."""
    model = build()
    model.encoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reconstruct(model, *views(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.encoder.training


def test_normalised_targets_leak_the_patch_means() -> None:
    """With all predictions zero, the picture shown still has the true mean of every patch."""
    model = build()
    torch.nn.init.zeros_(model.decoder.head.weight)
    images, noise = views(2, 3, 16, 16)
    shown = patchify(reconstruct(model, images, noise).predicted, 4).mean(-1)
    assert torch.allclose(shown, patchify(images, 4).mean(-1), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_pasted_patches_are_framed(channels: int) -> None:
    """A frame of one pixel round visible patches, and none round predicted ones."""
    masked = torch.tensor([[True, False]])
    marked = mark_pasted(torch.zeros(1, channels, 4, 8), masked, patch_size=4, scale=3,
                         colour=(1.0, 0.5, 0.0))
    assert marked.shape == (1, 3, 12, 24)
    assert (marked[..., :12] == 0).all()
    assert int((marked[0, 0, :, 12:] == 1).sum()) == 4 * 11
    assert (marked[0, :, 1:-1, 13:-1] == 0).all()


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("images, words", [
    (torch.rand(2, 3, 30, 32), ["images", "multiples of patch_size 4", "(2, 3, 30, 32)"]),
    (torch.rand(0, 3, 8, 8), ["at least one", "(0, 3, 8, 8)"]),
    (torch.randint(0, 999, (2, 3, 8, 8)), ["images", "float", "int64"]),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["images", "float", "uint8"]),
    (torch.full((3, 3, 8, 8), torch.nan), ["finite", "NaN"]),
    (torch.rand(3, 8, 8), ["(B, C, H, W)", "(3, 8, 8)"]),
])
def test_bad_images_are_refused(images: Tensor, words: list[str]) -> None:
    """The message names argument, value and what is wanted."""
    with pytest.raises(ValueError) as error:
        MaskNoise(4)(images, generator())
    assert all(word in str(error.value) for word in words)


def test_the_model_refuses_what_does_not_fit() -> None:
    """Other channels, a noise of another length, sizes that do not tile."""
    model = build()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        model(*views(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"noise must be \(2, 4\).*got \(2, 9\)"):
        model(torch.rand(2, 3, 8, 8), torch.rand(2, 9))
    with pytest.raises(ValueError, match="multiples of patch_size 4"):
        model(torch.rand(2, 3, 10, 8), torch.rand(2, 4))


@pytest.mark.parametrize("change, message", [
    (dict(mask_ratio=1.0), "mask_ratio must be strictly between 0 and 1; got 1.0"),
    (dict(mask_ratio=0), "mask_ratio"),
    (dict(patch_size=1, in_channels=1), "normalize_target needs patches of two numbers"),
    (dict(std=(0.0,)), "std positive"),
    (dict(mean=(0.5, 0.5)), "one a channel"),
    (dict(dim=34), "dim must be a positive multiple of 4.*of its 2 heads; got 34"),
    (dict(decoder_dim=18), "decoder_dim must be a positive multiple of 4.*got 18"),
    (dict(decoder_heads=3), "decoder_dim must be .* of its 3 heads; got 16"),
])
def test_bad_configurations_are_refused(change: dict, message: str) -> None:
    """When the configuration is made, or the model built, or at the first picture."""
    with pytest.raises(ValueError, match=message):
        build(**change)(*views(1, 3, 8, 8))


def test_other_refusals() -> None:
    """Masks that leave nothing, noise of another shape, blocks and positions out of range."""
    with pytest.raises(ValueError, match="at least one patch visible and one hidden of 4; got 0.9"):
        random_masking(torch.rand(2, 4), 0.9)
    with pytest.raises(ValueError, match=r"noise must be \(B, N\)"):
        random_masking(torch.rand(2, 4, 4), 0.5)
    with pytest.raises(ValueError, match="block must be at least 1"):
        MaskNoise(4, block=0)
    for ratio in (math.nan, 1.5, -0.2):
        with pytest.raises(ValueError, match="mask_ratio must be strictly between 0 and 1; got"):
            random_masking(torch.rand(2, 4), ratio)
    with pytest.raises(ValueError, match="multiple of 4; got 6"):
        sincos_positions(6, 2, 2)


@pytest.mark.parametrize("images, words", [
    (torch.rand(2, 3, 30, 32), "multiples of patch_size 4; got (2, 3, 30, 32)"),
    (torch.randint(0, 999, (2, 3, 8, 8)), "float in [0, 1]; got (2, 3, 8, 8) torch.int64"),
])
def test_patches_are_cut_only_where_they_fit(images: Tensor, words: str) -> None:
    """No trace of einops: the message names sizes and patch."""
    for cut in (lambda: patchify(images, 4), lambda: patch_targets(images, 4, normalize=True)):
        with pytest.raises(ValueError) as error:
            cut()
        assert words in str(error.value)


def test_patches_that_make_no_picture_are_refused() -> None:
    """Rows that do not come out even, and patches that are no square."""
    with pytest.raises(ValueError, match=r"rows 4.*got \(2, 6, 48\)"):
        unpatchify(torch.rand(2, 6, 48), patch_size=4, rows=4)
    with pytest.raises(ValueError, match=r"P one of 16.*got \(2, 6, 47\)"):
        unpatchify(torch.rand(2, 6, 47), patch_size=4, rows=2)
    with pytest.raises(ValueError, match=r"rows 4; got \(2, 6\)"):
        pixel_mask(torch.zeros(2, 6, dtype=torch.bool), patch_size=4, rows=4)


def test_the_loss_refuses_shapes_that_would_broadcast() -> None:
    """A target of one number a patch, or a mask of another batch, would give a wrong number."""
    patches, masked = torch.rand(2, 6, 48), torch.ones(2, 6, dtype=torch.bool)
    for target, mask in ((patches[..., :1], masked), (patches, masked[:1]), (patches, ~masked * 1)):
        with pytest.raises(ValueError, match="masked .B, N. bool; got"):
            masked_mse(patches, target, mask)


def test_looking_refuses_what_cannot_be_shown() -> None:
    """NaN, two channels, the mask of another batch."""
    images, noise = views(2, 3, 8, 8)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite; images \[1\]"):
        reconstruct(build(), images, noise)
    shown = torch.zeros(2, 4, dtype=torch.bool)
    for wrong, mask in ((torch.rand(2, 2, 8, 8), shown), (torch.rand(2, 3, 8, 8), shown[:1])):
        with pytest.raises(ValueError, match="1 or 3 channels and masked one value a patch"):
            mark_pasted(wrong, mask, patch_size=4)


# ------------------------------------------------------------------------------------------ speed


def test_masking_pays_and_the_peer_is_not_faster() -> None:
    """Lenient, for a busy machine: `benchmarks/masked.py` measures with care."""
    peer, ours = peer_and_ours(normalize=True, dim=192, depth=4, decoder_dim=64, patch_size=4)
    images, noise = views(24, 3, 32, 32)

    def everything():
        order = torch.arange(64).expand(24, 64)
        prediction = ours.decoder(ours.encode(images, order), order, rows=8)
        target = patch_targets(images, 4, normalize=True)
        return masked_mse(prediction, target, random_masking(noise, 0.75).masked)

    steps = {"ours": lambda: mae_loss(ours, (images, noise)), "everything": everything,
             "peer": lambda: peer(pixel_values=images, noise=noise).loss}
    seconds = {name: [] for name in steps}
    for _ in range(6):
        for name, step in steps.items():
            began = time.perf_counter()
            step().backward()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    assert medians["everything"] > 1.8 * medians["ours"], medians
    assert medians["peer"] > 0.85 * medians["ours"], medians


def test_parts_stand_alone() -> None:
    """`take` picks rows, and encoder and decoder are the course's Transformer."""
    from vlm_course.foundations.networks import Transformer

    tokens = torch.arange(6.0).view(1, 3, 2)
    assert take(tokens, torch.tensor([[2, 0]])).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]
    assert issubclass(SinCosViT, Transformer) and issubclass(MAEDecoder, Transformer)
