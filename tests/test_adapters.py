"""Adapters: what they compute, what they train, what they keep, and what they refuse."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.appendix.checkpoints import read_tensors, write_tensors
from vlm_course.foundations.images import ImageSet
from vlm_course.foundations.networks import ResNet, ResNetConfig, ViT, ViTConfig
from vlm_course.foundations.training import classification_loss, count_parameters, fit
from vlm_course.transfer.adapters import (
    Adapted,
    BottleneckAdapter,
    LoRAConv2d,
    LoRALayer,
    LoRALinear,
    adapter_state,
    add_adapters,
    add_lora,
    add_prompts,
    bias_only,
    head_of,
    load_adapter,
    match_layers,
    merge_lora,
    saved_activations,
    training_memory,
)
from vlm_course.transfer.finetune import freeze
from vlm_course.transfer.pretrained import PretrainedModel, SameConv2d, load_pretrained


def small_vit(*, classes: int = 5, pool: str = "token") -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=16, patch_size=4, dim=24, depth=3, num_heads=3,
                         num_classes=classes, pool=pool)).eval()


def small_resnet(*, classes: int = 5) -> ResNet:
    torch.manual_seed(0)
    return ResNet(ResNetConfig(depths=(1, 1), widths=(8, 16), stem="small",
                               num_classes=classes)).eval()


def lite0() -> nn.Module:
    torch.manual_seed(0)
    return load_pretrained("efficientnet_lite0", pretrained=False, size=32).reset_head(5).eval()


def wrapped_vit() -> PretrainedModel:
    """The small Transformer as the chapters have it: a body, and a head beside it."""
    body = small_vit(classes=0)
    return PretrainedModel(body, embed_dim=24, preprocess=nn.Identity(),
                           head=nn.Linear(24, 5)).eval()


def pictures(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """As if trained: small random numbers in everything trainable."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def frozen_part(model: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: v.clone() for name, v in model.state_dict().items() if name not in trained}


MODELS = {"vit": small_vit, "resnet": small_resnet, "lite0": lite0}
CHANGES = {"lora": lambda m: add_lora(m, rank=2), "adapters": lambda m: add_adapters(m, width=3),
           "deep prompts": lambda m: add_prompts(m, count=4),
           "shallow prompts": lambda m: add_prompts(m, count=4, deep=False),
           "bias": bias_only}


# ------------------------------------------------------------------------------ LoRA against peft


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "targets", "head"), [
    ("vit", ["qkv", "fc1", "patch_embed.proj"], "head"),
    ("resnet", ["conv1", "conv2", "downsample.0"], "fc"),
    ("lite0", ["expand.0", "project.0", "top.0"], "head"),
])
def test_lora_equals_peft(name, targets, head):
    peft = pytest.importorskip("peft")
    model, rank, alpha = MODELS[name](), 3, 6
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets,
                             modules_to_save=[head])
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    ours = add_lora(copy.deepcopy(model), rank=rank, alpha=alpha, targets=targets).eval()
    names = [key for key, layer in ours.named_modules() if isinstance(layer, LoRALayer)]
    adapted = [key for key, layer in theirs.base_model.model.named_modules()
               if hasattr(layer, "lora_A")]
    assert names == adapted and len(names) >= 3
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count_parameters(ours, trainable=True) == trainable
    pairs = [(ours.get_submodule(key), theirs.base_model.model.get_submodule(key))
             for key in names]
    randomise(ours)
    head_of(theirs.base_model.model).load_state_dict(
        {f"{part}{key}": value for part in ("original_module.", "modules_to_save.default.")
         for key, value in head_of(ours).state_dict().items()})
    with torch.no_grad():
        for mine, peer in pairs:
            peer.lora_A["default"].weight.copy_(mine.A.weight)
            peer.lora_B["default"].weight.copy_(mine.B.weight)
    images, labels = pictures(side=32 if name == "lite0" else 16), torch.tensor([0, 3, 4])
    logits, peers = ours(images), theirs(images)
    torch.testing.assert_close(logits, peers, atol=1e-6, rtol=1e-6)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(peers, labels).backward()
    for mine, peer in pairs:
        torch.testing.assert_close(mine.A.weight.grad, peer.lora_A["default"].weight.grad)
        torch.testing.assert_close(mine.B.weight.grad, peer.lora_B["default"].weight.grad)
        assert mine.base.weight.grad is None
    merged, peers = merge_lora(ours), theirs.merge_and_unload()
    torch.testing.assert_close(merged(images), peers(images), atol=1e-6, rtol=1e-5)
    scale = logits.abs().max().item()
    torch.testing.assert_close(merged(images), logits, atol=1e-4 * scale, rtol=0)


# -------------------------------------------------------------------------------- layers of LoRA


def test_linear_is_the_equation():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(7, 6), rank=2, alpha=6)
    nn.init.normal_(layer.B.weight)
    x = torch.rand(4, 7)
    A, B = layer.A.weight, layer.B.weight
    wanted = x @ (layer.base.weight + 3 * B @ A).T + layer.base.bias
    torch.testing.assert_close(layer(x), wanted)
    assert torch.linalg.matrix_rank(layer.delta()) == 2


@pytest.mark.parametrize("base", [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False),
    nn.Conv2d(4, 6, 3, stride=2, dilation=2), SameConv2d(4, 6, 5, stride=2),
    nn.Conv2d(4, 6, (3, 1), padding=(1, 0), padding_mode="reflect"),
])
def test_convolution_merges_exactly(base):
    torch.manual_seed(0)
    layer = LoRAConv2d(base, rank=2, alpha=4)
    x = torch.rand(2, 4, 9, 11)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.B.weight)
    before = layer(x)
    assert (before - base(x)).abs().max() > 0.1
    assert layer.delta().shape == base.weight.shape
    torch.testing.assert_close(layer.merge()(x), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_have_the_layers_dtype(dtype):
    layer = LoRALinear(nn.Linear(3, 4).to(dtype), rank=1, alpha=1)
    assert layer(torch.zeros(2, 3, dtype=dtype)).dtype == dtype
    assert layer.merge().weight.dtype == dtype


def test_only_the_second_factor_moves_first():
    layer = LoRALinear(nn.Linear(5, 4), rank=2, alpha=2)
    layer(torch.rand(3, 5)).square().sum().backward()
    assert layer.B.weight.grad.abs().max() > 0
    assert not layer.A.weight.grad.any()


# ------------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("name", MODELS)
def test_lora_starts_as_the_model_and_merges_into_it(name):
    model = MODELS[name]()
    images = pictures(side=32 if name == "lite0" else 16)
    before, names = model(images), list(model.state_dict())
    add_lora(model, rank=2)
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)
    changed = randomise(model)(images)
    merge_lora(model)
    assert list(model.state_dict()) == names
    assert not any(isinstance(layer, Adapted) for layer in model.modules())
    torch.testing.assert_close(model(images), changed, rtol=0,
                               atol=1e-4 * changed.abs().max().item())


def test_merging_keeps_the_trained_head():
    model = randomise(add_lora(small_vit()))
    head = copy.deepcopy(model.head.state_dict())
    merge_lora(model)
    assert all(torch.equal(head[key], value) for key, value in model.head.state_dict().items())


def test_grouped_convolutions_stay_as_they_are():
    model = add_lora(lite0())
    grouped = [layer for layer in model.modules()
               if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert len(grouped) == 16
    assert not any(isinstance(layer.base, nn.Conv2d) and layer.base.groups > 1
                   for layer in model.modules() if isinstance(layer, LoRALayer))


@pytest.mark.parametrize("change", ["lora", "adapters"])
def test_start_is_exact(change):
    model, images = small_vit(), pictures()
    before = model(images)
    torch.testing.assert_close(CHANGES[change](model)(images), before)


def test_adapter_is_the_equation():
    torch.manual_seed(0)
    layer = BottleneckAdapter(nn.Linear(6, 5), width=2)
    nn.init.normal_(layer.up.weight)
    x = torch.rand(3, 6)
    h = layer.base(x)
    down = F.gelu(h @ layer.down.weight.T + layer.down.bias)
    torch.testing.assert_close(layer(x), h + down @ layer.up.weight.T + layer.up.bias)


def test_adapters_behind_convolutions_start_exact_and_act_on_each_place():
    model, images = small_resnet(), pictures()
    before = model(images)
    torch.testing.assert_close(add_adapters(model, width=2, targets=["conv2"])(images), before)
    layer = randomise(BottleneckAdapter(nn.Conv2d(3, 4, 1), width=2))
    one = layer(images[:, :, 5:6, 7:8])
    torch.testing.assert_close(layer(images)[:, :, 5:6, 7:8], one)
    assert (one - layer.base(images[:, :, 5:6, 7:8])).abs().max() > 1e-3


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_prompts_equal_the_blocks_by_hand(deep, pool):
    model = small_vit(pool=pool)
    plain = copy.deepcopy(model)
    add_prompts(model, count=4, deep=deep)
    images = pictures()
    tokens = plain.embed(images)
    for i, block in enumerate(plain.blocks):
        if deep or i == 0:
            prompts = model.blocks[i].prompts.expand(3, -1, -1)
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)
        tokens = block(tokens)
        if deep or i == 2:
            tokens = torch.cat([tokens[:, :1], tokens[:, 5:]], 1)
    wanted = plain.forward_head(plain.norm(tokens))
    torch.testing.assert_close(model(images), wanted)
    assert model.forward_features(images).shape == (3, 17, 24)
    assert count_parameters(model, trainable=True) == 24 * 4 * (3 if deep else 1) + 24 * 5 + 5


def test_prompts_on_a_single_block():
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=8, patch_size=4, dim=12, depth=1, num_heads=2, num_classes=2))
    assert add_prompts(model, count=1, deep=False)(pictures(side=8)).shape == (3, 2)


def test_bias_only_trains_biases_and_head():
    model = bias_only(small_vit())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()
                       if name.endswith("bias") or name.startswith("head.")}


@pytest.mark.parametrize("change", CHANGES)
def test_training_moves_what_is_trainable_and_nothing_else(change):
    model = CHANGES[change](small_vit())
    data = ImageSet((255 * pictures(20)).byte(), torch.arange(20) % 5, list("abcde"), "noise")
    before, frozen = adapter_state(model), frozen_part(model)
    fit(model, data.batches(10, generator=torch.Generator()), classification_loss, steps=3,
        lr=1e-2, precision="fp32")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    moved = [name for name, value in adapter_state(model).items()
             if not torch.equal(value, before[name])]
    assert moved == list(before) and any(name.startswith("head") for name in moved)


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_switches_the_model_bit_for_bit(change, tmp_path):
    images = pictures()
    first, second = randomise(CHANGES[change](small_vit())), CHANGES[change](small_vit())
    path = write_tensors(adapter_state(first), tmp_path / "task.safetensors")
    assert not torch.equal(first(images), second(images))
    load_adapter(second, read_tensors(path)[0])
    assert torch.equal(first(images), second(images))
    numbers = sum(value.numel() for value in adapter_state(first).values())
    assert numbers == count_parameters(first, trainable=True)


def test_a_state_is_a_copy():
    model = add_lora(small_vit())
    state = adapter_state(model)
    randomise(model)
    assert not torch.equal(state["head.weight"], model.head.weight)


def test_timm_backbones_are_adapted_by_name():
    pytest.importorskip("timm")
    model = load_pretrained("timm/vit_tiny_patch16_224", pretrained=False).reset_head(3).eval()
    images = pictures(1, side=32)
    before = model(images)
    add_lora(model, rank=2, targets=["qkv"])
    assert sum(isinstance(layer, LoRALinear) for layer in model.modules()) == 12
    torch.testing.assert_close(model(images), before)


def test_layers_that_are_read_and_never_called_are_left_out():
    pytest.importorskip("torchvision")
    model = load_pretrained("torchvision/vit_b_16", pretrained=False).reset_head(3).eval()
    names = match_layers(model)  # nn.MultiheadAttention reads the weights of its layers
    assert len(names) == 1 + 2 * 12 and not any("attention" in name for name in names)
    with pytest.raises(ValueError, match="nn.MultiheadAttention; got 'out_proj'"):
        add_lora(model, targets=["out_proj"])
    images = pictures(1, side=32)
    before = model(images)
    torch.testing.assert_close(add_lora(model, rank=2)(images), before)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_trains_agrees_with_freeze_of_the_chapter_before(change):
    model = CHANGES[change](wrapped_vit())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    freeze(model)
    left = {name for name, p in model.named_parameters() if p.requires_grad}
    assert left == {"head.weight", "head.bias"}


@pytest.mark.parametrize("change", CHANGES)
def test_one_picture_gets_what_it_gets_in_a_batch(change):
    model, images = randomise(CHANGES[change](small_vit())), pictures()
    torch.testing.assert_close(model(images[1:2]), model(images)[1:2])


@pytest.mark.parametrize("change", CHANGES)
def test_half_precision_stays_half_precision(change):
    model = CHANGES[change](small_vit().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits = model(pictures().bfloat16())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("change", ["lora", "bias"])
def test_pictures_need_not_be_square(change):
    model = CHANGES[change](small_resnet())
    images = torch.rand(2, 3, 12, 19, generator=torch.Generator().manual_seed(3))
    changed = randomise(model)(images)
    assert changed.shape == (2, 5)
    if change == "lora":
        torch.testing.assert_close(merge_lora(model)(images), changed, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------- memory


def test_saved_activations_of_two_layers():
    model, x = nn.Sequential(nn.Linear(5, 30), nn.Linear(30, 20)), torch.rand(8, 5)
    assert saved_activations(model, x) == 8 * 30 * 4
    model[1].weight.requires_grad_(False)
    assert saved_activations(model, x) == 0
    model[1] = LoRALinear(model[1], rank=2, alpha=1)
    assert saved_activations(model, x) == 8 * 32 * 4


def test_counting_leaves_nothing_behind():
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    model, images = small_resnet(), pictures()
    saved_activations(model, images)
    before = tensors()
    for _ in range(3):
        saved_activations(model, images)
    assert tensors() <= before


def test_memory_is_counted():
    images = pictures()
    full, probe = (training_memory(model, images) for model in (wrapped_vit(),
                                                                freeze(wrapped_vit())))
    size = 4 * count_parameters(small_vit())
    assert full["weights"] == probe["weights"] == full["gradients"] == size
    assert full["optimizer"] == 2 * size
    assert probe["gradients"] == 4 * (24 * 5 + 5)
    assert probe["activations"] < 0.2 * full["activations"]
    lora = training_memory(add_lora(small_vit(), rank=2), images)
    assert lora["activations"] > full["activations"] and lora["optimizer"] < full["optimizer"] / 2


def test_memory_can_be_counted_without_computing():
    with torch.device("meta"):
        model, images = small_vit(), torch.rand(4, 3, 16, 16)
    assert saved_activations(model, images) > 0


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4"])
def test_rank_must_be_a_whole_number(rank):
    with pytest.raises(ValueError, match="rank must be a whole number, at least 1; got"):
        add_lora(small_vit(), rank=rank)


@pytest.mark.parametrize("alpha", [0, -2.0, math.inf, math.nan])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number; got"):
        add_lora(small_vit(), alpha=alpha)


def test_unknown_target_shows_near_names():
    with pytest.raises(ValueError, match="got 'qvk'; near names: .*qkv"):
        add_lora(small_vit(), targets=["proj", "qvk"])
    with pytest.raises(ValueError, match="near names: .*blocks.0.mlp.fc1"):
        match_layers(small_vit(), ["block.0.mlp.fc1"])


@pytest.mark.parametrize("targets", [["head"], ["norm1"], ["kv"], [""]])
def test_what_is_no_layer_of_the_body_is_no_target(targets):
    with pytest.raises(ValueError, match="targets must name layers"):
        add_lora(small_vit(), targets=targets)


def test_no_target_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        add_lora(small_vit(), targets=[])


def test_one_name_serves_as_a_list():
    assert match_layers(small_vit(), "qkv") == [f"blocks.{i}.attn.qkv" for i in range(3)]


def test_grouped_target_is_refused():
    with pytest.raises(ValueError, match="one group.*groups=32"):
        add_lora(lite0(), targets=["stage1.0.depthwise.0"])


@pytest.mark.parametrize("first", ["lora", "adapters", "deep prompts"])
@pytest.mark.parametrize("second", ["lora", "adapters", "deep prompts", "bias"])
def test_adapting_twice_is_refused(first, second):
    model = CHANGES[first](small_vit())
    trainable = count_parameters(model, trainable=True)
    with pytest.raises(ValueError, match="model must not be adapted yet|targets must name"):
        CHANGES[second](model)
    assert count_parameters(model, trainable=True) == trainable  # nothing was changed


def test_merging_twice_is_refused():
    model = merge_lora(add_lora(small_vit()))
    with pytest.raises(ValueError, match="it has none: never added, or merged already"):
        merge_lora(model)
    add_lora(model)  # and a merged model can be adapted anew


@pytest.mark.parametrize("change", [
    lambda model: add_lora(model, rank=0), lambda model: add_lora(model, targets=["qvk"]),
    lambda model: add_lora(model, alpha=-1.0), lambda model: add_adapters(model, width=0),
    lambda model: add_prompts(model, count=0)])
def test_a_refused_model_is_unchanged(change):
    model = small_vit()
    with pytest.raises(ValueError):
        change(model)
    assert count_parameters(model, trainable=True) == count_parameters(small_vit())


@pytest.mark.parametrize("make", [small_resnet, lite0])
def test_prompts_want_a_transformer(make):
    with pytest.raises(ValueError, match="model must be a ViT.*got (ResNet|EfficientNetLite)"):
        add_prompts(make())


def test_adapters_of_a_convolution_network_must_be_placed():
    with pytest.raises(ValueError, match="targets must name layers.*'attn.proj'"):
        add_adapters(small_resnet())


@pytest.mark.parametrize("change", ["lora", "bias"])
def test_a_model_without_a_head_is_refused(change):
    with pytest.raises(ValueError, match="model must have its classifier in `head`.*Sequential"):
        CHANGES[change](nn.Sequential(nn.Linear(3, 3)))


def test_a_model_without_biases_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

    with pytest.raises(ValueError, match="model must have biases outside of its head"):
        bias_only(Plain())


def test_a_head_of_the_wrong_size_is_refused_and_nothing_loaded():
    model, state = add_lora(small_vit(classes=4)), adapter_state(randomise(add_lora(small_vit())))
    before = adapter_state(model)
    with pytest.raises(ValueError, match=r"head.weight \(5, 24\) for \(4, 24\)"):
        load_adapter(model, state)
    assert all(torch.equal(before[name], value) for name, value in adapter_state(model).items())


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="missing .*A.weight.* unexpected .*down"):
        load_adapter(add_lora(small_vit()), adapter_state(add_adapters(small_vit())))
    with pytest.raises(ValueError, match=r"other shapes .*\(3, 24\) for \(2, 24\)"):
        load_adapter(add_lora(small_vit(), rank=2, targets="qkv"),
                     adapter_state(add_lora(small_vit(), rank=3, targets="qkv")))
