"""The Transformers on codes: words, masks, cache, choosing, completing, GPT-2, and bad input."""

import math

import pytest
import torch

from vlm_course.generation.gan import load_generator, save_generator
from vlm_course.generation.transformer import (
    KeepAverage,
    KeyValueCache,
    MaskedTransformer,
    MaskGITConfig,
    TokenTransformer,
    TransformerConfig,
    Vocabulary,
    any_order_cost,
    bits_per_code,
    choose_codes,
    complete,
    encode_pictures,
    from_gpt2,
    likelihood,
    maskgit_loss,
    probabilities,
    transformer_loss,
    turn,
    turns,
    words_of,
)
from vlm_course.generation.vqvae import VQVAEConfig, load_tokenizer

NAMES = ["noto red apple", "twemoji red heart", "noto cat"]
SMALL = dict(dim=32, depth=2, num_heads=2, dropout=0.0, size=16)


class Greys:
    """A tokenizer of 4 x 4 pictures in 9 greys."""

    grid, codebook_size, channels, image_size = 4, 9, 1, 4

    def encode(self, images):
        """Codes of pictures."""
        return (images[:, 0] * 8).round().long()

    def decode(self, codes):
        """Pictures of codes."""
        return codes[:, None].float() / 8


def make(kind=TokenTransformer, *, classes=NAMES, codes=9, grid=(4, 4), **options):
    """A small network that never learned anything."""
    config = {"transformer": TransformerConfig, "maskgit": MaskGITConfig}[kind.kind]
    torch.manual_seed(0)
    model = kind(config(**SMALL | options), codes=codes, grid=grid, classes=classes,
                 tokenizer=Greys()).eval()
    for parameter in model.parameters():  # far from uniform
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


BOTH = pytest.mark.parametrize("kind", [TokenTransformer, MaskedTransformer])
PLACES = pytest.mark.parametrize("positions", ["learned", "rotary", "none"])


def test_words_of_a_text():
    """Letters and digits make words, in any script and case; all else parts them."""
    assert words_of("Noto  red-Apple, no.1: Piñata_苹果") == [
        "noto", "red", "apple", "no", "1", "piñata", "苹果"]
    assert words_of(" -- ") == []


def test_vocabulary_encodes_and_pads():
    """Words by number in alphabetical order, zeros behind."""
    known = Vocabulary.of(NAMES)
    assert known.words == ["apple", "cat", "heart", "noto", "red", "twemoji"] and len(known) == 7
    assert known.encode(["noto red apple", "Cat"]).tolist() == [[4, 5, 1], [2, 0, 0]]


@pytest.mark.parametrize(("prompt", "message"), [
    ("", "1 to 3 words; got 0"), ("?!", "1 to 3 words; got 0"),
    ("red red red red", "1 to 3 words; got 4"), ("noto aple", "'aple', which is near 'apple'")])
def test_vocabulary_refuses(prompt, message):
    """An empty prompt, one that is too long, and a word never seen, with the nearest."""
    with pytest.raises(ValueError, match=message):
        Vocabulary.of(NAMES).encode([prompt])


@PLACES
def test_no_output_sees_a_later_code(positions):
    """The gradient of logits i with respect to tokens after them is exactly zero."""
    model = make(positions=positions)
    tokens = torch.randn(1, model.context, 32, requires_grad=True)
    out = model.run(tokens)
    for i in range(model.context):
        (gradient,) = torch.autograd.grad(out[0, i, 0], tokens, retain_graph=True)
        assert (gradient[0, i + 1:] == 0).all() and (gradient[0, :i + 1] != 0).any(1).all()


def test_masked_network_sees_all():
    """Every output of MaskGIT depends on every token."""
    model = make(MaskedTransformer)
    tokens = torch.randn(1, model.context, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.run(tokens)[0, 0, 0], tokens)
    assert (gradient != 0).any(-1).all()


def test_rotary_positions_tell_differences():
    """Products of turned queries and keys depend on the difference of places alone."""
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def score(a, b):
        return float(turn(q, turns(torch.tensor([a]), 16)) @ turn(
            k, turns(torch.tensor([b]), 16)).T)

    assert score((1.0, 2.0), (4.0, 9.0)) == pytest.approx(score((3.0, 0.0), (6.0, 7.0)), abs=1e-4)
    assert score((1.0, 2.0), (4.0, 9.0)) != pytest.approx(score((1.0, 2.0), (9.0, 4.0)), abs=1e-2)


@PLACES
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_equals_uncached(positions, guidance):
    """Logits agree, in pieces of any length, and the same codes are drawn."""
    model = make(positions=positions)
    words, codes = model.prompts, torch.randint(9, (3, 15))
    cache = KeyValueCache(model, 3)
    with torch.no_grad():
        pieces = [model(part, words, cache) for part in codes.split([0, 4, 1, 7, 3], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(codes, words), atol=1e-5, rtol=1e-5)
    drawn = [model.sample_codes(model.prompt(20), guidance=guidance, cached=cached)
             for cached in (True, False)]
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 3


def test_cache_keeps_within_the_context():
    """A cache longer than the context, or a token without room, is refused."""
    model = make()
    with pytest.raises(ValueError, match="length must be in 1..19"):
        KeyValueCache(model, 1, length=20)
    cache = KeyValueCache(model, 1, length=5)
    model(torch.zeros(1, 0, dtype=torch.long), model.prompts[:1], cache)
    model(torch.zeros(1, 1, dtype=torch.long), None, cache)
    with pytest.raises(ValueError, match="hold 6 tokens; got one of length 5"):
        model(torch.zeros(1, 1, dtype=torch.long), None, cache)
    with pytest.raises(ValueError, match="within 19 positions; got 20"):
        model(torch.zeros(1, 16, dtype=torch.long))


def test_equal_to_gpt2():
    """The logits of transformers.GPT2LMHeadModel, given its weights, to 1e-5."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40, n_positions=16,
                                     bos_token_id=39, eos_token_id=39)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text, ours = torch.randint(39, (4, 15)), from_gpt2(theirs)
    with torch.no_grad():
        wanted = theirs(torch.cat([torch.full((4, 1), 39), text], 1)).logits
        torch.testing.assert_close(ours(text), wanted, atol=1e-5, rtol=1e-5)
    theirs.config.activation_function = "relu"
    with pytest.raises(ValueError, match="'gelu_new'; got 'relu'"):
        from_gpt2(theirs)


def test_output_layer_may_have_a_table_of_its_own():
    """Tied, an untrained network says the same again; untied it says nothing."""
    same = torch.zeros(4, 4, 4, dtype=torch.long)
    torch.manual_seed(0)
    tied, apart = (bits_per_code(TokenTransformer(
        TransformerConfig(**SMALL, tied=tied), codes=8, grid=(4, 4)), same)
        for tied in (True, False))
    assert tied < 2.95 and abs(apart - 3) < 0.3


def test_probabilities():
    """Temperature sharpens, top-k keeps k, top-p the fewest codes of its mass, never none."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    torch.testing.assert_close(probabilities(logits), torch.tensor([0.1, 0.4, 0.2, 0.3]))
    torch.testing.assert_close(probabilities(logits, temperature=0.5) * 0.30,
                               torch.tensor([0.01, 0.16, 0.04, 0.09]))
    torch.testing.assert_close(probabilities(logits, top_k=2) * 7, torch.tensor([0, 4.0, 0, 3.0]))
    torch.testing.assert_close(probabilities(logits, top_p=0.8) * 9, torch.tensor([0, 4.0, 2, 3]))
    assert probabilities(logits, top_p=1e-9).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(("options", "message"), [
    (dict(temperature=0), "temperature must be above 0"),
    (dict(temperature=-1.0), "temperature must be above 0"),
    (dict(temperature=math.nan), "temperature must be above 0"),
    (dict(top_k=5), "top_k must be in 1..4"), (dict(top_k=0), "top_k must be in 1..4"),
    (dict(top_p=0.0), "top_p must be in"), (dict(top_p=1.1), "top_p must be in")])
def test_probabilities_refuse(options, message):
    """What cannot be meant is refused by name."""
    with pytest.raises(ValueError, match=message):
        probabilities(torch.zeros(4), **options)


def test_codes_are_chosen_by_their_share():
    """Uniform random numbers give each code its probability; codes without any never come."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    chance = torch.arange(1000) / 1000
    counts = choose_codes(p.expand(1000, 6), chance).bincount(minlength=6)
    assert (counts - 1000 * p).abs().max() <= 2 and counts[p == 0].sum() == 0
    assert choose_codes(p, torch.tensor(1.0)) == 4 and choose_codes(p, torch.tensor(0.0)) == 1


@BOTH
def test_likelihood_of_all_pictures_sums_to_one(kind):
    """Three binary codes: exp(-nll) over all eight, exactly; MaskGIT's bound is at most that."""
    model = make(kind, codes=2, grid=(1, 3))
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)[:, None]
    words = model.prompts[:1].expand(8, -1)
    with torch.no_grad():
        if kind is TokenTransformer:
            nll = model.negative_log_likelihood(every, words)
            assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-5)
        else:
            nll = any_order_cost(model, every, words, draws=300)
            assert 0.3 < float((-nll).exp().sum()) < 1.02


def test_any_order_cost_against_all_orders():
    """The estimate is the mean over all orders of the cost of writing one code after another."""
    from itertools import permutations

    model = make(MaskedTransformer, codes=3, grid=(1, 3), classes=())
    codes, costs = torch.tensor([[[2, 0, 1]]]), []
    with torch.no_grad():
        for order in permutations(range(3)):
            read, cost = torch.full((1, 3), 3), 0.0
            for i in order:
                cost -= float(model(read)[0, i].log_softmax(-1)[codes[0, 0, i]])
                read[0, i] = codes[0, 0, i]
            costs.append(cost)
        found = [float(any_order_cost(model, codes, draws=60, seed=s)) for s in range(20)]
    error = torch.tensor(found).std() / math.sqrt(20)
    assert abs(sum(found) / 20 - sum(costs) / 6) < 4 * error + 1e-3


@BOTH
def test_samples_depend_on_the_seed_only(kind):
    """The same for any batch size; another seed, another picture; a shorter list, its beginning."""
    model = make(kind)
    sheet = model.sample(7, seed=1)
    assert sheet.shape == (7, 1, 4, 4) and sheet.dtype == torch.float32
    assert torch.equal(sheet, model.sample(7, seed=1, batch_size=2))
    assert not torch.equal(sheet, model.sample(7, seed=2))
    assert len(model.sample()) == 3 and len(model.sample(prompts=["red", "cat"])) == 2


@BOTH
def test_samples_obey_labels_and_known_codes(kind):
    """Each class has its own pictures, and codes that are known stay."""
    model = make(kind)
    known = torch.full((6, 4, 4), -1)
    known[:, :2] = torch.randint(9, (6, 2, 4))
    drawn = model.sample_codes(model.prompt(6), known=known)
    assert torch.equal(drawn[:, :2], known[:, :2]) and (drawn < 9).all() and (drawn >= 0).all()
    a, b = (model.sample(20, labels=torch.full((20,), k)) for k in (0, 2))
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="known must be"):
        model.sample_codes(model.prompt(6), known=known[:3])
    with pytest.raises(ValueError, match="known must be"):
        model.sample_codes(model.prompt(6), known=known + 5)


@BOTH
def test_requests_that_make_no_sense(kind):
    """Labels out of range, labels and prompts at once, prompts of an unconditional model."""
    model, free = make(kind), make(kind, classes=())
    with pytest.raises(ValueError, match=r"labels must be in 0..2; got 3..3"):
        model.sample(labels=torch.tensor([3]))
    with pytest.raises(ValueError, match="not both"):
        model.sample(labels=torch.tensor([0]), prompts=["cat"])
    with pytest.raises(ValueError, match="knows no classes"):
        free.sample(prompts=["cat"])
    assert len(free.sample(5)) == 5


@pytest.mark.parametrize("steps", [0, 17])
def test_maskgit_steps(steps):
    """At least one pass, and at most one a code."""
    with pytest.raises(ValueError, match="steps must be in 1..16"):
        make(MaskedTransformer).sample(1, steps=steps)


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_maskgit_settles_every_code(steps):
    """No mask is left after any number of steps, with guidance too."""
    drawn = make(MaskedTransformer).sample_codes(make().prompt(5), steps=steps, guidance=2.0)
    assert drawn.min() >= 0 and drawn.max() < 9


@BOTH
def test_losses_are_float32_and_refuse_other_codes(kind):
    """Under autocast too; codes of another grid or type are refused; all parameters learn."""
    model, loss = make(kind).train(), {"transformer": transformer_loss,
                                       "maskgit": maskgit_loss}[kind.kind]
    codes, labels = torch.randint(9, (8, 4, 4)), torch.arange(8) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model, codes, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert all(p.grad is not None for p in model.parameters())
    for wrong in (codes[:, :3], codes.int()):
        with pytest.raises(ValueError, match=r"codes must be \(B, 4, 4\) int64"):
            loss(model, wrong, labels)


def test_words_are_dropped_in_training_only():
    """All words of some pictures in training; none in evaluation."""
    model = make(condition_dropout=0.5)
    labels = torch.zeros(2000, dtype=torch.long)
    assert torch.equal(model.condition(labels), model.prompts[labels])
    words = model.train().condition(labels)
    free = (words == 0).all(1)
    assert 0.45 < free.float().mean() < 0.55 and (words[~free] == model.prompts[0]).all()


def test_noise_is_read_but_not_asked_for():
    """With noise the loss differs in training, and the likelihood does not."""
    model, codes = make(noise=0.5, condition_dropout=0.0), torch.randint(9, (64, 4, 4))
    labels = torch.zeros(64, dtype=torch.long)
    nats = bits_per_code(model, codes, model.prompts[labels]) * math.log(2)
    assert float(transformer_loss(model, codes, labels).detach()) == pytest.approx(nats, rel=1e-4)
    torch.manual_seed(0)
    noisy = float(transformer_loss(model.train(), codes, labels).detach())
    assert abs(noisy - nats) > 1e-3


def test_complete_keeps_the_upper_half_and_hides_the_lower():
    """The given rows stay, and what is below the cut cannot matter."""
    model, images = make(), torch.rand(5, 1, 4, 4)
    other = images.clone()
    other[:, :, 2:] = torch.rand(5, 1, 2, 4)
    done = complete(model, images, seed=3)
    assert torch.equal(done, complete(model, other, seed=3))
    assert torch.equal(done[:, :, :2], Greys().decode(Greys().encode(images))[:, :, :2])
    with pytest.raises(ValueError, match="share must be in"):
        complete(model, images, share=1.0)


def test_encode_pictures_makes_versions():
    """The first version is the picture itself; others are moved, the border repeated."""
    images = torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8)
    codes = encode_pictures(Greys(), images, versions=3, shift=1, mirror=True)
    assert codes.shape == (18, 4, 4)
    assert torch.equal(codes[:6], Greys().encode(images / 255)) and (codes[6:12] != codes[:6]).any()
    assert torch.equal(codes, encode_pictures(Greys(), images, versions=3, shift=1, mirror=True))


def test_likelihood_counts_names_with_unknown_words_apart():
    """A test part may have other names; only those of known words are conditional."""
    from vlm_course.foundations.images import ImageSet

    images = torch.randint(256, (4, 1, 4, 4), dtype=torch.uint8)
    data = ImageSet(images=images, labels=torch.tensor([0, 1, 1, 0]),
                    classes=["noto heart", "noto dog"], name="new", table={})
    bits = likelihood(make(), data)
    assert bits["pictures"] == 4 and bits["pictures_of_known_words"] == 2
    assert bits["bits_per_dimension"] == pytest.approx(bits["bits_per_code"])  # a code a number


@pytest.mark.parametrize(("options", "message"), [
    (dict(dim=30), "multiple of 1"), (dict(dim=20, positions="rotary", num_heads=2), "of 4"),
    (dict(positions="sine"), "positions must be one of"),
    (dict(gelu="relu"), "gelu must be one of"),
    (dict(dropout=1.0), "dropout must be in"), (dict(versions=0), "versions and depth")])
def test_configurations_refuse(options, message):
    """What cannot be built is refused by name and value."""
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**options)


def test_average_takes_over_when_the_run_is_complete():
    """The model is left with the average, which is not its last state."""
    from vlm_course.foundations.training import fit
    from vlm_course.generation.vqvae import EncodedBatches

    model, codes = make(), torch.randint(9, (32, 4, 4))
    keep = KeepAverage(0.9)
    fit(model, EncodedBatches(codes, torch.zeros(32, dtype=torch.long), 8), transformer_loss,
        steps=6, callbacks=[keep], precision="fp32")
    for name, value in keep.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@BOTH
def test_saved_generators_come_back(kind, tmp_path):
    """Same samples after saving and loading; the tokenizer is found beside, by its hash."""
    torch.manual_seed(0)
    vqvae = VQVAEConfig(size=16, grid=4, width=16, codes=9).make_generator(3)
    (tmp_path / "tok").mkdir()
    save_generator(vqvae, tmp_path / "tok" / "generator.safetensors")
    tokenizer = load_tokenizer("tok", near=tmp_path)
    config = {"transformer": TransformerConfig, "maskgit": MaskGITConfig}[kind.kind](**SMALL)
    model = kind(config, codes=9, grid=(4, 4), classes=NAMES, tokenizer=tokenizer).eval()
    assert not any("tokenizer" in name for name in model.state_dict())
    path = save_generator(model, tmp_path / "own" / "generator.safetensors", classes=NAMES)
    loaded = load_generator(path)
    loaded.near = tmp_path
    assert torch.equal(loaded.sample(4), model.sample(4))
    assert (loaded.kind, loaded.channels, loaded.image_size) == (kind.kind, 3, 16)
    with torch.no_grad():
        next(vqvae.parameters()).add_(1)
    save_generator(vqvae, tmp_path / "tok" / "generator.safetensors")
    stranger = load_generator(path)
    stranger.near = tmp_path
    with pytest.raises(ValueError, match="another one than the model was trained with"):
        stranger.sample(1)


def test_half_precision_draws_valid_codes():
    """A network in bfloat16 samples, its cache too."""
    drawn = make().bfloat16().sample_codes(make().prompt(3))
    assert drawn.shape == (3, 4, 4) and drawn.max() < 9
