"""ResNet, ViT and their parts: equal to trusted peers, readable refusals, one interface."""
from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlm_course.foundations.networks import (
    Attention,
    Block,
    PatchEmbedding,
    ResNet,
    ResNetConfig,
    ViT,
    ViTConfig,
    attention_maps,
    effective_receptive_field,
    evaluating,
    from_torchvision_vit,
    multiply_adds,
    receptive_field,
    spatial_layers,
)

RESNET18 = ResNetConfig()
RESNET50 = ResNetConfig(block="bottleneck", depths=(3, 4, 6, 3))
SMALL_RESNET = ResNetConfig(depths=(1, 2, 1), widths=(8, 16, 24), stem="small", num_classes=10)
SMALL_BOTTLENECK = dataclasses.replace(SMALL_RESNET, block="bottleneck", stem="imagenet")
PLAIN = dataclasses.replace(SMALL_RESNET, shortcut=False)
SMALL_VIT = ViTConfig(image_size=32, patch_size=8, dim=24, depth=3, num_heads=4, num_classes=10)
MEAN_VIT = dataclasses.replace(SMALL_VIT, pool="mean", depth=1)
SMALL = {
    "resnet": SMALL_RESNET,
    "bottleneck": SMALL_BOTTLENECK,
    "plain": PLAIN,
    "vit": SMALL_VIT,
    "mean-vit": MEAN_VIT,
}


def build(config: ResNetConfig | ViTConfig) -> ResNet | ViT:
    """The model of a configuration, from a fixed seed."""
    torch.manual_seed(0)
    return ResNet(config) if isinstance(config, ResNetConfig) else ViT(config)


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def model(request) -> ResNet | ViT:
    """Each small model in turn."""
    return build(request.param)


@pytest.fixture
def images() -> torch.Tensor:
    """Two pictures of noise."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize("name, config", [("resnet18", RESNET18), ("resnet50", RESNET50)])
@torch.no_grad()
def test_resnet_equals_torchvision(name, config):
    torch.manual_seed(0)
    peer = torchvision.models.get_model(name, weights=None).eval()
    for layer in peer.modules():  # running averages and scales that a trained checkpoint would have
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.8, 1.2)
            layer.weight.uniform_(0.5, 1)
    ours = ResNet(config).eval()
    ours.load_state_dict(peer.state_dict())
    pictures = torch.randn(2, 3, 97, 64)  # neither square nor a multiple of the stride
    expected = peer(pictures)
    torch.testing.assert_close(ours(pictures), expected, rtol=1e-5, atol=1e-6)
    peer.train(), ours.train()
    torch.testing.assert_close(ours(pictures), peer(pictures), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vit_equals_timm(images):
    peer = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4).eval()
    ours = ViT(ViTConfig(image_size=32, patch_size=4)).eval()
    ours.load_state_dict(peer.state_dict())
    torch.testing.assert_close(ours.forward_features(images), peer.forward_features(images),
                               rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(images), peer(images), rtol=1e-5, atol=1e-6)


def torchvision_vit() -> nn.Module:
    """A small peer with a head that is not zero."""
    torch.manual_seed(0)
    peer = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=24, mlp_dim=48).eval()
    nn.init.normal_(peer.heads.head.weight, std=0.1)
    return peer


@torch.no_grad()
def test_vit_equals_torchvision(images):
    peer = torchvision_vit()
    ours = build(dataclasses.replace(SMALL_VIT, mlp_ratio=2, num_classes=1000)).eval()
    ours.load_state_dict(from_torchvision_vit(peer.state_dict()))
    torch.testing.assert_close(ours(images), peer(images), rtol=1e-5, atol=1e-6)


def test_published_torchvision_files_use_older_names():
    state = torchvision_vit().state_dict()
    older = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v
             for k, v in state.items()}
    assert older.keys() != state.keys()
    assert from_torchvision_vit(older).keys() == from_torchvision_vit(state).keys()


@torch.no_grad()
def test_attention_equals_pytorch():
    torch.manual_seed(0)
    ours, tokens = Attention(24, num_heads=4), torch.randn(2, 7, 24)
    peer = nn.MultiheadAttention(24, 4, batch_first=True)
    peer.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    expected, weights = peer(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.weights(tokens), weights, rtol=1e-5, atol=1e-6)
    hidden = torch.rand(7, 7).gt(0.5).fill_diagonal_(False)
    expected, _ = peer(tokens, tokens, tokens, attn_mask=hidden)  # there, True hides
    torch.testing.assert_close(ours(tokens, ~hidden), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_block_order_and_patch_order(images):
    block, tokens = Block(24, num_heads=4), torch.randn(2, 7, 24)
    order = torch.randperm(7)
    torch.testing.assert_close(block(tokens)[:, order], block(tokens[:, order]))
    embed = PatchEmbedding(3, 8, 24)
    columns = F.unfold(images, 8, stride=8).transpose(1, 2)  # (B, N, C*p*p), row by row
    expected = columns @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(embed(images), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("config, published", [
    (RESNET18, torchvision.models.ResNet18_Weights.IMAGENET1K_V1),
    (RESNET50, torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
    (ViTConfig(dim=768, num_heads=12), torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1),
])
def test_counts_as_published(config, published):
    with torch.device("meta"):
        model, photo = build(config), torch.empty(2, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == published.meta["num_params"]
    counts = multiply_adds(model, photo)
    assert sum(counts.values()) / 1e9 == pytest.approx(published.meta["_ops"], abs=1e-3)
    with FlopCounterMode(display=False) as counter:
        model.eval()(photo)
    assert 2 * 2 * sum(counts.values()) == counter.get_total_flops()  # two pictures, two operations


def test_counting_leaves_the_model_as_it_was(images):
    model = build(SMALL_RESNET).train()
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert multiply_adds(model, images) == multiply_adds(model, images[:1])
    assert model.training and not model.layer1.training and model.layer2.training
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("config, expected", [
    (RESNET18, (435, 32)), (RESNET50, (427, 32)), (SMALL_RESNET, (33, 4))])
def test_receptive_field_of_models(config, expected):
    with torch.device("meta"):
        assert receptive_field(spatial_layers(build(config))) == expected


def test_effective_receptive_field_is_inside_the_theoretical_one():
    model = build(dataclasses.replace(SMALL_RESNET, depths=(1, 1), widths=(8, 16))).eval()
    side, jump = receptive_field(spatial_layers(model))
    assert (side, jump) == (13, 2)
    pictures = torch.randn(4, 3, 65, 65)
    field = effective_receptive_field(model.forward_features, pictures)
    assert field.shape == (65, 65) and field.min() >= 0
    assert float(field.sum()) == pytest.approx(1, abs=1e-5)
    seen = (field.sum(0) > 0).nonzero().flatten()
    assert int(seen[-1] - seen[0]) + 1 == side
    assert pictures.grad is None and all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------------------------- interface


def test_uniform_interface(model, images):
    model.eval()
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    assert model(images).shape == (2, 10)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.embed_dim)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    assert model.config.num_classes == 0
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.config.num_classes == 3
    again = type(model)(model.config)  # the configuration still describes the model
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(images), model(images))


def test_new_head_follows_the_model():
    model = build(SMALL_VIT).to(torch.bfloat16)
    model.reset_classifier(7)
    assert model.head.weight.dtype == torch.bfloat16 and model.head.weight.std() < 0.05


def test_intermediates(model, images):
    model.eval()
    inside = model.intermediates(images)
    last = list(inside.values())[-1]
    if isinstance(model, ViT):
        assert list(inside) == [f"blocks.{i}" for i in range(model.config.depth)]
        assert all(tokens.shape == (2, 17, 24) for tokens in inside.values())
        last = model.norm(last)
    else:
        assert list(inside) == ["layer1", "layer2", "layer3"]
        assert [maps.shape[1] for maps in inside.values()][-1] == model.embed_dim
        assert inside["layer1"].shape[-1] == 4 * last.shape[-1]
    torch.testing.assert_close(last, model.forward_features(images))


@pytest.mark.parametrize("widths", [(4,), (4, 6, 8, 10, 12)])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnets_of_odd_sizes(widths, stem, block):
    config = ResNetConfig(block=block, depths=(1,) * len(widths), widths=widths, stem=stem,
                          in_channels=2, num_classes=5)
    model = build(config).eval()
    assert model(torch.randn(1, 2, 29, 41)).shape == (1, 5)
    assert model.embed_dim == widths[-1] * (4 if block == "bottleneck" else 1)
    assert len(model.intermediates(torch.randn(1, 2, 28, 28))) == len(widths)


@pytest.mark.parametrize("size, patch, dim, heads, channels",
                         [(28, 7, 10, 1, 1), (15, 5, 12, 6, 4)])
def test_vits_of_odd_sizes(size, patch, dim, heads, channels):
    config = ViTConfig(image_size=size, patch_size=patch, dim=dim, depth=2, num_heads=heads,
                       in_channels=channels, num_classes=5)
    assert build(config)(torch.randn(2, channels, size, size)).shape == (2, 5)


def test_visible_tokens_go_through_the_blocks(images):
    model = build(SMALL_VIT).eval()
    tokens = model.patch_tokens(images)
    assert tokens.shape == (2, 16, 24)
    torch.testing.assert_close(model.encode(model.add_class_token(tokens)),
                               model.forward_features(images))
    visible = model.encode(model.add_class_token(tokens[:, [3, 1, 9]]))
    other = model.encode(model.add_class_token(tokens[:, [1, 9, 3]]))
    assert visible.shape == (2, 4, 24)
    torch.testing.assert_close(visible[:, [0, 2, 3, 1]], other)  # positions travel with tokens


@torch.no_grad()
def test_without_positions_a_move_by_a_patch_changes_nothing(images):
    model = build(SMALL_VIT).eval()
    nn.init.normal_(model.pos_embed)
    nn.init.normal_(model.head.weight)
    assert not torch.allclose(model(images.roll(8, -1)), model(images), atol=1e-3)
    model.pos_embed.zero_()
    torch.testing.assert_close(model(images.roll(8, -1)), model(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(images.roll(4, -1)), model(images), atol=0.1)


def test_evaluating_puts_modes_back_after_an_error(model):
    model.train()
    next(model.children()).eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before


def test_attention_maps(images):
    model = build(SMALL_VIT).train()
    maps = attention_maps(model, images)
    assert list(maps) == list(model.intermediates(images)) and model.training
    for weights in maps.values():
        assert weights.shape == (2, 4, 17, 17) and not weights.requires_grad
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))


# ------------------------------------------------------------------------------- training and care


def test_every_parameter_gets_a_gradient(model, images):
    F.cross_entropy(model.train()(images), torch.tensor([1, 2])).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


def test_initialisation():
    resnet, vit = build(RESNET18), build(ViTConfig())
    kernel = resnet.layer3[1].conv1.weight.detach()
    assert float(kernel.std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert float(vit.blocks[5].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(vit.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(vit.patch_embed.proj.weight.detach().std()) == pytest.approx(768**-0.5, rel=0.05)
    assert not any(p.any() for name, p in vit.named_parameters() if name.endswith("bias"))


def test_configurations_travel(model):
    config = model.config
    assert pickle.loads(pickle.dumps(config)) == config
    assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_classes = 3
    with pytest.raises(TypeError):
        type(config)(32)  # keyword-only


def test_channels_last_and_autocast(model, images):
    model.eval()
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    laid_out = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(laid_out), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("config", [SMALL_RESNET, SMALL_VIT], ids=["resnet", "vit"])
def test_traces_as_one_graph(config, images):
    model = build(config).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("make, message", [
    (lambda: ViTConfig(image_size=30, patch_size=4),
     "image_size 30 is not a multiple of patch_size 4"),
    (lambda: ViTConfig(dim=64, num_heads=5), "dim 64 is not a multiple of num_heads 5"),
    (lambda: Attention(64, num_heads=5), "dim 64 is not a multiple of num_heads 5"),
    (lambda: ViTConfig(pool="max"), "pool must be \"token\" or \"mean\"; got 'max'"),
    (lambda: ResNetConfig(block="wide"), "block must be one of"),
    (lambda: ResNetConfig(stem="tiny"), "stem must be"),
    (lambda: ResNetConfig(depths=(1, 1)), "one positive entry a stage"),
    (lambda: ResNetConfig(depths=(), widths=()), "one positive entry a stage"),
    (lambda: ResNetConfig(depths=(1, 0), widths=(8, 8)), "one positive entry a stage"),
])
def test_configurations_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape, message", [
    ((2, 1, 32, 32), r"images must be \(B, 3, .*\) float; got \(2, 1, 32, 32\) float32"),
    ((3, 32, 32), r"images must be \(B, 3, .*\) float; got \(3, 32, 32\) float32"),
])
def test_images_refused(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_bytes_and_wrong_sizes_refused(model, images):
    with pytest.raises(ValueError, match="uint8"):
        model(images.to(torch.uint8))
    with pytest.raises(ValueError, match=r"got \(2, 3, 28, 28\)"):
        build(SMALL_VIT)(images[..., :28, :28])
    with pytest.raises(ValueError, match=r"got \(2, 3, 32, 28\)"):
        build(SMALL_VIT)(images[..., :28])


def test_checkpoint_of_another_shape_is_an_error():
    other = build(dataclasses.replace(SMALL_VIT, depth=2))
    with pytest.raises(RuntimeError, match="blocks.2"):
        build(SMALL_VIT).load_state_dict(other.state_dict())
