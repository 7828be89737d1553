"Diffusion and flows: closed forms, exact samplers, both networks, words, latents, refusals."

import math
from dataclasses import replace

import pytest
import torch

from vlm_course.foundations.images import ImageSet
from vlm_course.generation import diffusion as d
from vlm_course.generation.gan import load_generator, save_generator
from vlm_course.generation.vqvae import VQVAEConfig, load_tokenizer
from vlm_course.train import RunOptions, train

CLASSES = ["noto red apple", "twemoji dog"]
SMALL = dict(size=16, tokenizer="", width=16, depth=1, heads=4, dropout=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def mixture() -> d.GaussianMixture:
    return d.GaussianMixture(torch.tensor([[1.3, 0], [-0.7, 1], [-0.7, -1]], dtype=torch.float64),
                             torch.tensor([0.2, 0.3, 0.12], dtype=torch.float64),
                             torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    return torch.randn(4000, 2, generator=generator(1), dtype=torch.float64)


def say_something(network: torch.nn.Module) -> None:
    "Weights that start at zero get values, as after some training."
    for p in network.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.05)


@pytest.fixture
def flow() -> d.Flow:
    "A flow in pixels with weights that say something."
    torch.manual_seed(0)
    made = d.FlowConfig(**SMALL).make_generator(3, CLASSES).eval()
    say_something(made)
    return made


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory):
    "An untrained tokenizer of 16 pixels, in a folder."
    torch.manual_seed(0)
    model = VQVAEConfig(size=16, grid=4, width=16, perceptual=0, adversarial=0).make_generator(3)
    folder = tmp_path_factory.mktemp("vq")
    save_generator(model, folder / "generator.safetensors")
    return folder


def pictures(count: int = 8, size: int = 16) -> ImageSet:
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator())
    return ImageSet(images, torch.arange(count) % 2, classes=CLASSES, name="noise")


# -- the way into the noise

@pytest.mark.parametrize("schedule", [d.linear_noise(50, last=0.2), d.cosine_noise(50)])
def test_closed_form_equals_the_chain(schedule):
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        signal, variance = (1 - beta) ** 0.5 * signal, (1 - beta) * variance + beta
        assert abs(signal - schedule.signal[t]) < 1e-12
        assert abs(variance - schedule.noise[t] ** 2) < 1e-12
    x, noise = torch.randn(2, 3, 4, 5, generator=generator())
    t = torch.tensor([0, 20, 49])
    want = schedule.signal[t].view(3, 1, 1) * x + schedule.noise[t].view(3, 1, 1) * noise
    torch.testing.assert_close(d.diffuse(x, noise, t, schedule), want.float())


def test_cosine_noise_is_the_papers():
    f = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    kept = d.cosine_noise(100).kept
    assert all(abs(kept[i] - f((i + 1) / 100) / f(0)) < 1e-9 for i in (0, 49, 97))


def test_posterior_is_bayes_rule():
    "In one dimension, on a grid."
    schedule, t, x0, xt = d.linear_noise(10, last=0.5), 6, 0.7, -0.2
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    beta, before = schedule.betas[t], schedule.kept[t - 1]
    logs = -(xt - (1 - beta).sqrt() * grid) ** 2 / (2 * beta) \
        - (grid - before.sqrt() * x0) ** 2 / (2 * (1 - before))
    weights = logs.softmax(0)
    mean, variance = d.posterior(torch.tensor([x0]), torch.tensor([xt]), t, schedule)
    assert abs((weights * grid).sum() - mean.item()) < 1e-6
    assert abs((weights * grid**2).sum() - (weights * grid).sum() ** 2 - variance) < 1e-6


def test_weights_of_the_bound_are_divergences():
    schedule = d.linear_noise(100)
    x0, eps, guess = torch.randn(3, 16, 5, generator=generator(), dtype=torch.float64)
    for t in (1, 50, 99):
        noisy = d.diffuse(x0, eps, torch.full((16,), t), schedule)
        guessed = (noisy - schedule.noise[t] * guess) / schedule.signal[t]
        a, b = (d.posterior(x, noisy, t, schedule)[0] for x in (x0, guessed))
        want = (a - b).square().sum(1) / (2 * schedule.betas[t])
        got = d.bound_weights(schedule)[t] * (eps - guess).square().sum(1)
        torch.testing.assert_close(got, want)


def test_ddpm_loss_of_a_network_that_knows():
    schedule, data = d.linear_noise(10, last=0.5), torch.zeros(64, 3)

    def knows(noisy, t):
        rows = (t * 10).round().long() - 1
        return noisy / schedule.noise[rows][:, None]
    assert d.ddpm_loss(knows, data, schedule=schedule) < 1e-9
    zero = lambda noisy, t: torch.zeros_like(noisy)
    assert 0.7 < d.ddpm_loss(zero, data, schedule=schedule) < 1.3
    assert d.ddpm_loss(zero, data, schedule=schedule, weighted=True).dtype == torch.float32


# -- score, velocity, samplers

def test_score_is_the_slope_of_the_density(mixture, start):
    for a, b in ((0.9, 0.3), (0.3, 0.9)):
        x = start[:200].clone().requires_grad_()
        slope, = torch.autograd.grad(mixture.log_density(x, a, b).sum(), x)
        data, noise = mixture.expected(x.detach(), a, b)
        torch.testing.assert_close(d.score_from_noise(noise, b), slope)
        torch.testing.assert_close(a * data + b * noise, x.detach())


def test_one_field_serves_both_paths(mixture, start):
    schedule = d.linear_noise()
    predict = d.noise_from_velocity(mixture.velocity, schedule)
    for row in (0, 400, 999):
        t = torch.full((4000,), (row + 1) / 1000, dtype=torch.float64)
        exact = mixture.expected(start, schedule.signal[row], schedule.noise[row])[1]
        torch.testing.assert_close(predict(start, t), exact)


@pytest.mark.parametrize("name", ["ancestral", "ddim", "euler", "heun"])
def test_samplers_are_exact_on_the_mixture(mixture, start, name):
    schedule = d.linear_noise()
    predict = d.noise_from_velocity(mixture.velocity, schedule)
    if name in d.SOLVERS:
        x = d.ode_solve(mixture.velocity, start, steps=200 if name == "euler" else 60, method=name)
    else:
        x = d.ddpm_sample(predict, start, schedule, steps=200, eta=float(name == "ancestral"),
                          generator=generator())
    mean = mixture.shares @ mixture.means
    covariance = torch.cov(mixture.sample(400_000, generator(2)).T)
    assert (x.mean(0) - mean).abs().max() < 0.07
    assert (torch.cov(x.T) - covariance).abs().max() < 0.08
    nearest = torch.cdist(x, mixture.means).argmin(1)
    assert (nearest.bincount(minlength=3) / 4000 - mixture.shares).abs().max() < 0.04


def test_orders_of_the_solvers(mixture, start):
    truth = d.ode_solve(mixture.velocity, start[:500], steps=400)
    for method, low, high in (("euler", 1.7, 2.4), ("heun", 3.0, 6.0)):
        ends = [d.ode_solve(mixture.velocity, start[:500], steps=n, method=method)
                for n in (16, 32)]
        gaps = [(x - truth).norm(dim=1).median() for x in ends]
        assert low < gaps[0] / gaps[1] < high, method


def test_ancestral_step_is_the_posterior(mixture):
    schedule, x = d.linear_noise(2, first=0.3, last=0.6), torch.ones(5, 2).double()
    predict = d.noise_from_velocity(mixture.velocity, schedule)
    got = d.ddpm_sample(predict, x, schedule, generator=generator())
    guess = predict(x, torch.ones(5).double())
    data = (x - schedule.noise[1] * guess) / schedule.signal[1]
    mean, variance = d.posterior(data, x, 1, schedule)
    x = mean + variance**0.5 * torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    guess = predict(x, torch.full((5,), 0.5).double())
    torch.testing.assert_close(got, (x - schedule.noise[0] * guess) / schedule.signal[0])


def test_likelihood(mixture):
    x = mixture.sample(50, generator())
    exact = d.log_likelihood(mixture.velocity, x, steps=200)
    assert (exact - mixture.log_density(x)).abs().max() < 0.02
    some = d.log_likelihood(mixture.velocity, x[:1].expand(4000, 2), steps=40, probes=1,
                            generator=generator())
    assert abs(some.mean() - mixture.log_density(x[:1])) < 0.1 and some.std() > 0.01


# -- networks

@pytest.mark.parametrize("network", [d.UNet(3, width=16), d.UNet(3, width=16, patch_size=2),
                                     d.DiT(3, dim=16, depth=2, patch_size=2)])
def test_networks(network):
    x, t = torch.randn(2, 3, 8, 16, generator=generator()), torch.tensor([0.2, 0.9])
    assert network(x, t).shape == x.shape and not network(x, t).any()
    torch.manual_seed(0)
    for p in network.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    assert not torch.allclose(network(x, t), network(x, t.flip(0)))
    condition = torch.randn(2, network.dim, generator=generator())
    assert not torch.allclose(network(x, t), network(x, t, condition))
    torch.testing.assert_close(network(x, t)[1:], network(x[1:], t[1:]))  # rows do not mix
    for shape in ((2, 3, 7, 8), (2, 4, 8, 8)):
        with pytest.raises(ValueError, match="multiples|images must be"):
            network(torch.randn(shape), t)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        network(x, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="t must be"):
        network(x, torch.tensor([1, 0]))


def test_fresh_transformer_block_is_the_identity():
    network = d.DiT(1, dim=16, depth=1, num_heads=4)
    tokens = torch.randn(2, 5, 16)
    assert torch.equal(network.blocks[0](tokens, torch.randn(2, 16)), tokens)


# -- the flow

def test_sampling_is_repeatable(flow):
    a = flow.sample(5, seed=3, steps=2)
    assert a.shape == (5, 3, 16, 16) and a.dtype == torch.float32
    assert 0 <= a.min() and a.max() <= 1
    torch.testing.assert_close(a, flow.sample(5, seed=3, steps=2, batch_size=2), atol=1e-2, rtol=0)
    assert not torch.allclose(a, flow.sample(5, seed=4, steps=2))
    z = torch.randn(5, flow.latent_dim, generator=generator(3))
    torch.testing.assert_close(a, flow.sample(latents=z, steps=2))


def test_words(flow):
    torch.testing.assert_close(d.prompt_words(flow, 3), flow.words[[0, 1, 0]])
    same = d.prompt_words(flow, labels=torch.tensor([1, 0]))
    torch.testing.assert_close(same, d.prompt_words(flow, prompts=["twemoji dog", CLASSES[0]]))
    assert flow.sample(prompts=["dog"], steps=1).shape == (1, 3, 16, 16)
    for options, message in ((dict(prompts=["cat"]), "cat"), (dict(prompts=[""]), "prompt"),
                             (dict(labels=torch.tensor([2])), "labels must be"),
                             (dict(labels=torch.tensor([0.5])), "labels must be"),
                             (dict(labels=torch.tensor([0]), prompts=["dog"]), "exclude")):
        with pytest.raises(ValueError, match=message):
            flow.sample(steps=1, **options)
    free = d.FlowConfig(**SMALL, conditional=False).make_generator(3)
    assert free.sample(2, steps=1).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="no classes"):
        free.sample(prompts=["dog"], steps=1)


def test_guidance_is_a_line_through_both_fields(flow):
    x, t = torch.randn(2, 3, 16, 16, generator=generator()), torch.tensor([0.4, 0.4])
    with torch.no_grad():
        free, told, far = (d.guided(flow, flow.words, guidance=g, precision="fp32")(x, t)
                           for g in (0.0, 1.0, 3.0))
    assert not torch.allclose(free, told)
    torch.testing.assert_close(far, free + 3 * (told - free), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options, message", [
    (dict(steps=0), "steps must be"), (dict(guidance=-1.0), "guidance must be"),
    (dict(method="rk4"), "method must be"), (dict(latents=torch.zeros(2, 5)), "latents must be")])
def test_sample_refuses(flow, options, message):
    with pytest.raises(ValueError, match=message):
        flow.sample(2, **options)


@pytest.mark.parametrize("options, message", [
    (dict(architecture="mlp"), "architecture"), (dict(times="late"), "times"),
    (dict(condition_drop=1.0), "condition_drop"), (dict(width=20), "width"),
    (dict(dropout=-0.1), "dropout"), (dict(shift=-1), "shift"), (dict(depth=0), "depth")])
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        d.FlowConfig(**SMALL | options)


def test_size_that_does_not_divide():
    with pytest.raises(ValueError, match="size must make sides"):
        d.FlowConfig(**SMALL | dict(size=15)).make_generator(3)


@pytest.mark.parametrize("call", [
    lambda s: d.diffuse(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 10]), s),
    lambda s: d.diffuse(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.0, 1.0]), s),
    lambda s: d.interpolate(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.0, 1.1])),
    lambda s: d.ddpm_sample(None, torch.zeros(2, 3), s, steps=11),
    lambda s: d.ddpm_sample(None, torch.zeros(2, 3), s, steps=0),
    lambda s: d.ddpm_sample(None, torch.zeros(2, 3), s, eta=2.0),
    lambda s: d.Schedule(torch.tensor([0.1, 1.2]))])
def test_schedules_refuse(call):
    with pytest.raises(ValueError, match="must be"):
        call(d.linear_noise(10))


def test_loss(flow):
    images, labels = torch.rand(64, 3, 16, 16, generator=generator()), torch.arange(64) % 2
    with torch.autocast("cpu", torch.bfloat16):
        loss = d.flow_loss(flow, images.half(), labels)  # half precision in, float32 out
    assert loss.dtype == torch.float32 and loss.isfinite()
    with pytest.raises(ValueError, match="images must be"):
        d.flow_loss(flow, images[:, :, :8], labels)
    flow.prompt.table.weight.grad = None
    d.flow_loss(flow, images, labels).backward()
    assert flow.prompt.table.weight.grad[0].any()  # some pictures went without words
    assert flow.prompt.table.weight.grad[1:].any()
    never = d.Flow(replace(flow.config, condition_drop=0.0), channels=3, classes=CLASSES)
    say_something(never)
    d.flow_loss(never, images, labels).backward()
    assert not never.prompt.table.weight.grad[0].any()


def test_inpainting(flow):
    images, mask = torch.rand(2, 3, 16, 16, generator=generator()), torch.zeros(1, 1, 16, 16) > 0
    mask[..., 8:] = True
    made = d.inpaint(flow, images, mask, labels=torch.tensor([0, 1]), steps=3, resample=2)
    torch.testing.assert_close(made[..., :8], images[..., :8])
    assert (made - images)[..., 8:].abs().mean() > 0.05
    for wrong in (mask[..., :8], mask.float(), mask.expand(3, 1, 16, 16)):
        with pytest.raises(ValueError, match="mask must be"):
            d.inpaint(flow, images, wrong, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="steps must be"):
        d.inpaint(flow, images, mask, labels=torch.tensor([0, 1]), steps=0)


def test_invert_and_draw_again(flow):
    images, labels = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([0, 1])
    z = d.invert(flow, images, labels=labels, steps=40)
    again = flow.sample(latents=z, labels=labels, guidance=1.0, steps=40)
    assert z.shape == (2, flow.latent_dim) and (again - images).abs().max() < 0.02


def test_bits_of_a_fresh_flow_are_those_of_a_normal():
    "Its field is zero, so that data stay where they are."
    fresh = d.FlowConfig(**SMALL).make_generator(3, CLASSES)
    images = pictures(4).images
    bits = d.bits_per_dimension(fresh, images, labels=torch.tensor([0, 1, 0, 1]), steps=1)
    assert ((bits - 7 - 0.5 * math.log2(2 * math.pi)) > 0).all() and (bits < 9).all()
    with pytest.raises(ValueError, match="uint8"):
        d.bits_per_dimension(fresh, images.float(), labels=torch.tensor([0, 1, 0, 1]))


def test_shifts():
    images = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    assert d.shifted(images, 1, 0)[0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert d.shifted(images, 0, -1)[0, 0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]
    many = d.FlowConfig(**SMALL | dict(shift=1, mirror=True)).versions(pictures(4))
    assert len(many) == 40 and many.labels.tolist() == [0, 1, 0, 1] * 10


# -- latents, files, runs

def test_latents(tokenizer_run):
    flow = d.FlowConfig(**SMALL | dict(tokenizer=str(tokenizer_run))).make_generator(3, CLASSES)
    images = torch.rand(2, 3, 16, 16, generator=generator())
    values = flow.encode(images)
    assert flow.shape == values.shape[1:] == (8, 4, 4)
    torch.testing.assert_close(flow.decode(values), flow.tokenizer.decode(
        flow.tokenizer.encode(images)))
    assert not any(name.startswith("tokenizer") for name in flow.state_dict())
    with pytest.raises(ValueError, match="in pixels"):
        d.bits_per_dimension(flow, pictures(2).images)
    for options in (dict(size=32), dict(size=8)):
        with pytest.raises(ValueError, match="tokenizer must be of pictures"):
            d.Flow(d.FlowConfig(**SMALL | options), channels=3,
                   tokenizer=load_tokenizer(tokenizer_run))


@pytest.mark.parametrize("latent", [False, True])
def test_a_run_and_its_file(tmp_path, tokenizer_run, latent, monkeypatch):
    monkeypatch.setattr("vlm_course.train.load_parts", lambda data, size: (pictures(), None))
    config = d.FlowConfig(**SMALL | dict(batch_size=4, shift=0, average=0.5,
                                         tokenizer=str(tokenizer_run) if latent else ""))
    results = train("flow", config, RunOptions(out=tmp_path / "run", steps=3))
    assert results["classes"] == CLASSES and (tmp_path / "run" / "samples.png").exists()
    flow = load_generator(tmp_path / "run")
    assert isinstance(flow, d.Flow) and flow.classes == CLASSES
    assert flow.sample(2, steps=1).shape == (2, 3, 16, 16)
    if latent:  # another tokenizer under the same name
        torch.manual_seed(1)
        other = VQVAEConfig(size=16, grid=4, width=16, perceptual=0, adversarial=0)
        kept = (tokenizer_run / "generator.safetensors").read_bytes()
        save_generator(other.make_generator(3), tokenizer_run / "generator.safetensors")
        try:
            with pytest.raises(ValueError, match="another one"):
                load_generator(tmp_path / "run")
        finally:
            (tokenizer_run / "generator.safetensors").write_bytes(kept)


def test_average_is_kept_in_evaluation_mode():
    pair = d.Averaged(d.FlowConfig(**SMALL).make_generator(3)).train()
    assert pair.generator.training and not pair.average.training
    assert not any(p.requires_grad for p in pair.average.parameters())
