"""Everything is tested here, against independent truths: python -m pytest test_all.py

Tests of real data look in the folder that DATA_DIR names, and for FashionMNIST in Debian's too.
"""

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import types
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from sklearn.decomposition import PCA
from sklearn.multiclass import OneVsOneClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch.distributions import Independent, Normal, kl_divergence

import bench
import data
import evaluate
import figures
import files
import likelihoods
import mine
import models
import parallel
import rewards
import settings
import tables
import train

HERE = Path(__file__).parent
ARCHS = ("hvae", "lvae")
LATENTS = {1: ("3",), 2: ("2c", "3"), 3: ("2c", "4", "3"), 5: ("2c", "5", "4", "3", "2")}


CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def seeded(request, monkeypatch):
    """Every test is of the CPU, whose numbers are the same each time, but for those that ask for
    `cuda`."""
    torch.manual_seed(0)
    if "cuda" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


def of_cuda(test):
    """Such tests are there where CUDA is: they lack nothing that could be brought here."""
    test.__test__ = CUDA
    return test


def tiny(arch: str, levels: int, dtype: torch.dtype = torch.float64) -> models.Hierarchy:
    """A hierarchy of 8x8 images whose levels all have different shapes."""
    config = models.Config(
        arch=arch,
        image=(1, 8, 8),
        latents=LATENTS[levels],
        channels=6,  # with fewer, a chance initialisation leaves a path with no unit alive
        kernels=(3,) * levels,
        strides=(1, 2, 1, 2, 1)[:levels],
        blocks=1,
        patch=2,
    )
    return models.build(config).to(dtype)


def images(n: int, size: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.rand(n, 1, size, size) < 0.4).to(dtype)


def gradients(value: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def assert_same(a, b, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


@pytest.fixture
def fixed_noise(monkeypatch):
    """Samples use one noise vector a latent shape, the same for every row and every path."""
    noise: dict[tuple, torch.Tensor] = {}

    def rsample(self, sample_shape=()):
        shape = tuple(self.loc.shape[1:])
        noise.setdefault(shape, torch.randn(shape, dtype=torch.float64))
        return self.loc + self.scale * noise[shape].to(self.loc.dtype)

    monkeypatch.setattr(Normal, "rsample", rsample)
    return noise


# --------------------------------------------------------------------------------------------------
# models.py


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("levels", range(1, 11))
def test_every_number_of_levels(arch, levels):
    """--levels N gives 8 at the top, doubling downwards, at most 128; the small preset has 5."""
    config = models.configure(arch, "small", levels=levels)
    rule = ["8", "16", "32", "64", "128"] + ["128"] * 5
    expected = tuple(reversed(rule[:levels])) if levels != 5 else ("8c", "64", "32", "16", "8")
    assert config.latents == expected
    model = models.build(config)
    posteriors, priors, latents, _ = model.infer(images(2, 28, torch.float32))
    assert len(posteriors) == len(priors) == len(latents) == model.levels == levels
    for level, z in enumerate(latents):
        assert z.shape == (2, *model.latent_shapes[level]) == posteriors[level].mean.shape
    assert model.likelihood(latents[0]).mean.shape == (2, 1, 28, 28)


def test_presets():
    paper = models.configure("lvae", "paper")
    assert paper.latents == ("128", "64", "32", "16", "8") and paper.channels == 64
    assert (paper.kernels, paper.strides) == ((5, 3, 3, 3, 3), (2, 2, 1, 1, 1))
    model = models.build(paper)
    assert model.sizes == [28, 14, 7, 7, 7, 7]
    assert len(model.encoder[0]) == 3  # residual blocks a level
    assert model.infer(images(2, 28, torch.float32)).latents[0].shape == (2, 128)
    small = models.build(models.configure("hvae", "small"))
    assert small.latent_shapes == [(8, 7, 7), (64,), (32,), (16,), (8,)]
    best = models.configure("hvae", "best")
    assert best == models.configure("hvae", "small", channels=64)
    with pytest.raises(ValueError, match="--size best is for grey images: take small or paper"):
        models.configure("hvae", "best", (3, 32, 32))
    assert models.configure("vae").latents == ("8",)
    assert models.configure("lvae", latents="4c, 2").latents == ("4c", "2")


@pytest.mark.parametrize("arch", ARCHS)
def test_order_of_inference(arch):
    """z^t = z_t bottom-up, z_{L-t+1} top-down (section 2.1)."""
    expected = (0, 1, 2, 3, 4) if arch == "hvae" else (4, 3, 2, 1, 0)
    assert tiny(arch, 5).order == expected


def infer_given(model, x, given, monkeypatch):
    """The posteriors when level l's sample is the given value."""
    queue = [given[level] for level in model.order]
    with monkeypatch.context() as patch:
        patch.setattr(Independent, "rsample", lambda self, shape=(): queue.pop(0))
        return model.infer(x).posteriors


@pytest.mark.parametrize("arch", ARCHS)
def test_posterior_is_conditioned_on_x_and_on_the_neighbouring_sample_alone(arch, monkeypatch):
    """Eq. 1: q(z_l|z_{l-1}, x) and Eq. 2: q(z_l|z_{l+1}, x), mean and scale."""
    model, x = tiny(arch, 5), images(3).requires_grad_()
    z = [torch.randn(3, *shape, dtype=torch.float64) for shape in model.latent_shapes]
    z = [value.requires_grad_() for value in z]
    posteriors = infer_given(model, x, z, monkeypatch)
    neighbour = -1 if arch == "hvae" else 1
    for level in range(5):
        normal = posteriors[level].base_dist
        for parameter in (normal.loc, normal.scale):
            by_x, *by_z = torch.autograd.grad(
                parameter.sum(), [x, *z], allow_unused=True, retain_graph=True
            )
            assert by_x.abs().max() > 1e-6
            for other in range(5):
                if other == level + neighbour:
                    assert by_z[other].abs().max() > 1e-6
                else:
                    assert by_z[other] is None or by_z[other].abs().max() == 0


def test_mean_field_posteriors_are_those_of_each_level_alone(monkeypatch):
    """q(z_l|x): heads on the features of x, whatever is sampled above; the model's other half is
    the ladder's, and the KL still meets the prior given the sample."""
    config = tiny("lvae", 5).config._replace(mean_field=True)
    model, x = models.build(config).double(), images(3)
    z = [torch.randn(3, *s, dtype=torch.float64).requires_grad_() for s in model.latent_shapes]
    posteriors = infer_given(model, x, z, monkeypatch)
    expected = [
        head(features)
        for head, features in zip(model.posterior_heads, model.features(x), strict=True)
    ]
    for found, literal in zip(posteriors, expected, strict=True):
        assert_same(found.mean, literal.mean)
        assert_same(found.stddev, literal.stddev)
        by_z = torch.autograd.grad(found.mean.sum(), z, allow_unused=True, retain_graph=True)
        assert by_z == (None,) * 5
    inference = model.infer(x)
    for level in range(4):
        prior = model.prior(level, inference.latents[level + 1])
        assert_same(inference.priors[level].mean, prior.mean)
    ladder = dict(tiny("lvae", 5).named_parameters())
    without_merge = {name for name in ladder if not name.startswith("merge.")}
    assert {name for name, _ in model.named_parameters()} == without_merge != set(ladder)
    loss = rewards.joint_loss(model, x, 0.9).value  # every parameter that is there has a part in it
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in found)


@pytest.mark.parametrize("arch", ARCHS)
def test_markov_given_a_level_nothing_above_reaches_the_pixels(arch):
    model = tiny(arch, 5)
    z = [torch.randn(3, *s, dtype=torch.float64) for s in model.latent_shapes]
    for level in range(5):
        before = model.decode([v if k == level else None for k, v in enumerate(z)]).mean
        model.infer(images(3))  # nothing of an inference stays behind
        for above in range(level + 1, 5):  # what is above is another image's
            model.prior(above - 1, z[above] + 1)
        assert torch.equal(
            before, model.decode([v if k == level else None for k, v in enumerate(z)]).mean
        )
        if level < 4:  # the prior depends on the sample above, and on nothing higher
            moved = model.prior(level, z[level + 1] + 1).mean
            assert (moved - model.prior(level, z[level + 1]).mean).abs().max() > 1e-6


@pytest.mark.parametrize("arch", ARCHS)
def test_priors_of_inference_are_those_given_the_sample_above(arch):
    model, x = tiny(arch, 5), images(3)
    _, priors, latents, _ = model.infer(x)
    for level in range(4):
        expected = model.prior(level, latents[level + 1])
        assert_same(priors[level].mean, expected.mean)
        assert_same(priors[level].base_dist.scale, expected.base_dist.scale)
    assert (priors[4].mean == 0).all() and (priors[4].base_dist.scale == 1).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("skip", ["mean", "sample"])
def test_one_descent_equals_paths_one_by_one(arch, skip, fixed_noise):
    model = tiny(arch, 5)
    starts = [torch.randn(n, *s, dtype=torch.float64)
              for n, s in zip((2, 1, 3, 1, 2), model.latent_shapes, strict=True)]  # fmt: skip
    starts[1] = None
    one_by_one = []
    for level, z in enumerate(starts):
        if z is None:
            continue
        for row in z.split(1):
            for below in reversed(range(level)):
                prior = model.prior(below, row)
                row = prior.mean if skip == "mean" else prior.rsample()
            one_by_one.append(model.likelihood(row).mean)
    assert_same(model.decode(starts, skip).mean, torch.cat(one_by_one))


def test_representation_is_the_mean_given_means(monkeypatch):
    for arch in ARCHS:
        model, x = tiny(arch, 3), images(4)
        posteriors, _, latents, _ = model.infer(x, sample=False)
        for q, z in zip(posteriors, latents, strict=True):
            assert torch.equal(q.mean, z)
        again = infer_given(model, x, latents, monkeypatch)
        assert_same(torch.stack([q.mean.sum() for q in again]),
                    torch.stack([z.sum() for z in latents]))  # fmt: skip


def test_scale_is_one_at_zero():
    head = models.ToGaussian(4, 2, (3,)).double()
    for p in head.parameters():
        p.data.zero_()
    q = head(torch.randn(2, 4, 2, 2, dtype=torch.float64))
    assert_same(q.base_dist.scale, torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("arch", ARCHS)
def test_samples_of_the_prior(arch):
    """Ancestral sampling: the mean over many samples of the top level's is that of N(0, I)."""
    model = tiny(arch, 2)
    x = model.sample(7)
    assert x.mean.shape == (7, 1, 8, 8) and ((x.mean > 0) & (x.mean < 1)).all()
    assert x.mean.std(dim=0).max() > 0
    torch.manual_seed(1)
    by_hand = model.prior(0, torch.randn(7, 3, dtype=torch.float64)).sample()
    torch.manual_seed(1)
    assert_same(model.sample(7).mean, model.likelihood(by_hand).mean)


def moves(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[bool]:
    """Which of the inputs a value depends on."""
    by_input = torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=True)
    return [g is not None and bool(g.abs().max() > 1e-7) for g in by_input]


def halves(q: Independent) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and scale of z^BU, and of z^TD."""
    normal = q.base_dist
    pairs = zip(normal.loc.chunk(2, dim=1), normal.scale.chunk(2, dim=1), strict=True)
    return list(pairs)


def test_biva_is_conditioned_as_it_says(monkeypatch):
    """q(z_l^BU|x, z_<l^BU), q(z_L|x, z_<L^BU), q(z_l^TD|x, z_<l^BU, z_>l), and p(z_l|z_>l): which
    samples move which distributions, and no others."""
    model, x = tiny("biva", 5), images(3).requires_grad_()
    shapes = [(s[0] // 2, *s[1:]) for s in model.latent_shapes[:-1]] + [model.latent_shapes[-1]]
    up = [torch.randn(3, *s, dtype=torch.float64).requires_grad_() for s in shapes]  # up[4]: z_L
    down = [torch.randn(3, *s, dtype=torch.float64).requires_grad_() for s in shapes[:-1]]
    queue = [*up, *reversed(down)]
    with monkeypatch.context() as patch:
        patch.setattr(Independent, "rsample", lambda self, shape=(): queue.pop(0))
        posteriors, priors, latents, pixels = model.infer(x)
    assert queue == []
    inputs = [x, *up, *down]
    for level in range(5):
        below = [k < level for k in range(5)]  # of up
        above = [k > level for k in range(5)]
        if level == 4:
            assert torch.equal(latents[4], up[4])
            for parameter in (posteriors[4].base_dist.loc, posteriors[4].base_dist.scale):
                assert moves(parameter, inputs) == [True, *below, *[False] * 4]
            continue
        assert torch.equal(latents[level], torch.cat([up[level], down[level]], dim=1))
        of_up, of_down = halves(posteriors[level])
        for parameter in of_up:
            assert moves(parameter, inputs) == [True, *below, *[False] * 4]
        for parameter in of_down:
            either = [b or a for b, a in zip(below, above, strict=True)]
            assert moves(parameter, inputs) == [True, *either, *above[:4]]
        for half in halves(priors[level]):
            for parameter in half:
                assert moves(parameter, inputs) == [False, *above, *above[:4]]
    assert moves(pixels.mean, inputs) == [False, *[True] * 9]


def test_biva_generates_what_it_infers(fixed_noise):
    """p(x|z) from the latents alone, and lower levels from their priors, level by level."""
    model, x = tiny("biva", 3), images(4)
    _, priors, z, pixels = model.infer(x)
    assert model.latent_shapes == [(4, 4, 4), (8,), (3,)]
    assert_same(model.generate(z).mean, pixels.mean)
    for skip in ("mean", "sample"):
        middle = model.infer(x).priors[1]  # p(z_2|z_3) at the same z_3, whatever lies below
        assert_same(middle.mean, priors[1].mean)
        z_2 = middle.mean if skip == "mean" else middle.rsample()
        assert_same(model.generate([z[0], None, z[2]], skip).mean,
                    model.generate([z[0], z_2, z[2]]).mean)  # fmt: skip
        assert (model.generate([None, *z[1:]], skip).mean - pixels.mean).abs().max() > 1e-6
    assert model.sample(5).mean.shape == (5, 1, 8, 8)
    with pytest.raises(ValueError, match="top latent is None"):
        model.generate([*z[:2], None])
    with pytest.raises(ValueError, match="unknown skip"):
        model.generate([None, *z[1:]], "median")


def test_biva_elbo_is_the_literal_one():
    """log p(x|z) less the KL of each of its 2L - 1 latents, one by one; all parameters learn."""
    model, x = tiny("biva", 3), images(4)
    torch.manual_seed(4)
    value, kl = rewards.elbo(model, x)
    torch.manual_seed(4)
    posteriors, priors, z, _ = model.infer(x)
    p = model.generate(z).mean
    literal = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    for level in range(3):
        of_level = 0
        q, r = posteriors[level], priors[level]
        for (a, b), (mean, scale) in zip(
            halves(q) if level < 2 else [(q.base_dist.loc, q.base_dist.scale)],
            halves(r) if level < 2 else [(r.base_dist.loc, r.base_dist.scale)],
            strict=True,
        ):
            d = torch.log(scale / b) + (b**2 + (a - mean) ** 2) / (2 * scale**2) - 0.5
            of_level = of_level + d.flatten(1).sum(1)
        assert_same(kl[level], of_level)
        literal = literal - of_level
    assert_same(value, literal)
    for (name, _), g in zip(model.named_parameters(), gradients(value.sum(), model), strict=True):
        assert g.abs().max() > 0, name


def test_generate_is_the_skip_path_of_the_lowest_level_given():
    for arch in ARCHS:
        model = tiny(arch, 3)
        z = model.infer(images(2)).latents
        for level in range(3):
            alone = [z[k] if k == level else None for k in range(3)]
            path = model.decode(alone).mean
            assert_same(model.generate([None] * level + z[level:]).mean, path)
        with pytest.raises(ValueError, match="every latent is None"):
            model.generate([None] * 3)


@pytest.mark.parametrize("arch", ["biva", "aae"])
def test_representation_of_the_baselines_is_the_mean_given_means(arch):
    model, x = tiny(arch, 3 if arch == "biva" else 1), images(4)
    inference = model.infer(x, sample=False)
    for q, z in zip(inference.posteriors, inference.latents, strict=True):
        assert torch.equal(q.mean, z)
    assert torch.equal(inference.latents[0], model.infer(x, sample=False).latents[0])
    assert not torch.equal(inference.latents[0], model.infer(x).latents[0])


def test_half_precision_never_reaches_likelihoods():
    model = tiny("lvae", 3, torch.float32)
    x = images(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inference = model.infer(x)
        kl = rewards.level_kl(inference)
        r = rewards.rewards(model, x, inference, kl)
        assert kl.dtype == torch.float32
        assert r.dtype == torch.float32 and rewards.q_value(r, 0.9).dtype == torch.float32
        for loss in (rewards.joint_loss, rewards.sampled_loss):
            assert loss(model, x, gamma=0.9).value.dtype == torch.float32


# models.py: the likelihood of colour images


def mixture(
    channels: int,
    values: int = 256,
    side: int = 2,
    n: int = 3,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> likelihoods.LogisticMixture:
    raw = torch.randn(n, likelihoods.LogisticMixture.parameters(channels), side, side, dtype=dtype)
    return likelihoods.LogisticMixture(raw * spread, channels, values=values)


def eight_bit(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randint(0, 256, shape).to(dtype) / 255


def literal_mixture_log_prob(raw, x, values=256):
    """Section 2.1 and 2.2 of PixelCNN++ as they stand, pixel by pixel, bin by bin, on floats."""
    channels, half = x.shape[0], 1 / (values - 1)

    def sigmoid(t):
        return 1 / (1 + math.exp(-t)) if t > -700 else 0.0

    total = 0.0
    for row, column in itertools.product(range(x.shape[1]), range(x.shape[2])):
        p = raw[:, row, column].tolist()
        pixel = [2 * v - 1 for v in x[:, row, column].tolist()]
        logits, rest = p[:10], p[10:]
        mean, rest = rest[: 10 * channels], rest[10 * channels :]
        log_scale, coefficient = rest[: 10 * channels], rest[10 * channels :]
        pairs, probability = channels * (channels - 1) // 2, 0.0
        for k in range(10):
            term, pair = math.exp(logits[k]) / sum(math.exp(v) for v in logits), k * pairs
            for c in range(channels):
                m = mean[k * channels + c]
                for before in range(c):
                    m += math.tanh(coefficient[pair]) * pixel[before]
                    pair += 1
                scale = math.exp(min(max(log_scale[k * channels + c], -7), 7))
                above = 1.0 if pixel[c] > 1 - half else sigmoid((pixel[c] + half - m) / scale)
                below = 0.0 if pixel[c] < half - 1 else sigmoid((pixel[c] - half - m) / scale)
                term *= above - below
            probability += term
        total += math.log(probability)
    return total


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_logistic_mixture_equals_the_literal_one(channels):
    assert likelihoods.LogisticMixture.parameters(3) == 100
    p, x = mixture(channels), eight_bit(3, channels, 2, 2)
    x[0, :, 0, 0], x[1, :, 0, 0] = 0, 1  # the open bins at both ends
    x[2, 0, 1, 1], x[2, -1, 1, 1] = 0, 1
    expected = [literal_mixture_log_prob(a, b) for a, b in zip(p.raw, x, strict=True)]
    assert_same(p.log_prob(x), torch.tensor(expected, dtype=torch.float64))
    single = likelihoods.LogisticMixture(p.raw.float(), channels).log_prob(x.float())
    torch.testing.assert_close(single.double(), torch.tensor(expected).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
def test_probabilities_of_all_values_of_a_channel_sum_to_one(spread):
    p = mixture(1, side=4, n=1, spread=spread, dtype=torch.float32)
    every = torch.arange(256.0).view(256, 1, 1, 1).expand(-1, 1, 4, 4) / 255
    one_pixel = likelihoods.LogisticMixture(p.raw.view(1, -1, 16).mT.reshape(16, -1, 1, 1), 1)
    total = torch.stack([one_pixel.log_prob(v.view(16, 1, 1, 1)) for v in every]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(16), rtol=0, atol=1e-4)
    # And of the last channel of three, whatever the two before it are.
    p = mixture(3, side=1, n=8, spread=spread, dtype=torch.float32)
    first_two = eight_bit(8, 2, 1, 1, dtype=torch.float32)
    joint = torch.stack(
        [p.log_prob(torch.cat([first_two, v.expand(8, 1, 1, 1)], dim=1)) for v in every[:, :, 0, 0]]
    )
    pairs = range(2)  # the two channels alone: the same parameters without the third's
    keep = [*range(10), *(10 + 3 * k + c for k in range(10) for c in pairs)]
    keep += [*(40 + 3 * k + c for k in range(10) for c in pairs), *range(70, 100, 3)]
    alone = likelihoods.LogisticMixture(p.raw[:, keep], 2).log_prob(first_two)
    torch.testing.assert_close(joint.logsumexp(0), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [2, 3, 5])
def test_probabilities_of_joint_channel_values_sum_to_one(values):
    p = mixture(3, values, side=1, n=6, dtype=torch.float32)
    total = 0
    for rgb in itertools.product(range(values), repeat=3):
        x = torch.tensor(rgb).view(1, 3, 1, 1).expand(6, -1, -1, -1) / (values - 1)
        total = total + p.log_prob(x).exp()
    torch.testing.assert_close(total, torch.ones(6), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4, 1e6])
def test_likelihood_and_gradient_are_finite_whatever_the_parameters(size, dtype):
    raw = (torch.randn(40, 100, 2, 2) * size).to(dtype).requires_grad_()
    x = eight_bit(40, 3, 2, 2, dtype=torch.float32)
    x[::3], x[1::3] = 0, 1
    value = likelihoods.LogisticMixture(raw, 3).log_prob(x)
    value.sum().backward()
    assert value.dtype == torch.float32 and value.isfinite().all() and raw.grad.isfinite().all()
    assert raw.grad.abs().max() > 0
    p = likelihoods.LogisticMixture(raw.detach(), 3)
    for picture in (p.mean, p.sample()):
        assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1 + 1e-6


def test_gradient_of_the_mixture_against_finite_differences_and_autograd():
    p, x = mixture(3, side=2, n=5), eight_bit(5, 3, 2, 2)
    x[0], x[1] = 0, 1
    weight = torch.randn(5, dtype=torch.float64)
    found = {}
    for chunk in (1, 8, 100):  # 1, 2 and all 5 images at once
        raw = p.raw.clone().requires_grad_()
        q = likelihoods.LogisticMixture(raw, 3)
        q.CHUNK = chunk
        (q.log_prob(x) * weight).sum().backward()
        found[chunk] = raw.grad
    raw = p.raw.clone().requires_grad_()
    x_flat = x.view(5, 3, -1)
    (likelihoods.LogisticMixture(raw, 3)._log_prob(raw, x_flat) * weight).sum().backward()
    for gradient in found.values():
        assert_same(gradient, raw.grad)
    step, direction = 1e-6, torch.randn_like(p.raw)
    ahead, behind = (
        (likelihoods.LogisticMixture(p.raw + s * direction, 3).log_prob(x) * weight).sum()
        for s in (step, -step)
    )
    assert (raw.grad * direction).sum().item() == pytest.approx(
        (ahead - behind).item() / (2 * step), rel=1e-6
    )


def test_mixture_over_patches_is_the_mixture_over_shuffled_pixels():
    raw, x = torch.randn(2, 100 * 4, 3, 3, dtype=torch.float64), eight_bit(2, 3, 6, 6)
    in_patches = likelihoods.LogisticMixture(raw, 3, patch=2)
    pixels = likelihoods.LogisticMixture(torch.nn.functional.pixel_shuffle(raw, 2), 3)
    assert in_patches.event_shape == pixels.event_shape == (3, 6, 6)
    assert_same(in_patches.log_prob(x), pixels.log_prob(x))
    assert_same(in_patches.mean, pixels.mean)
    assert in_patches.sample().shape == (2, 3, 6, 6)


def test_samples_have_the_probabilities():
    """Chi-square over all joint values of three channels, and over the values of a channel."""
    for channels, values, cells in [(3, 4, 64), (1, 256, 256)]:
        p = mixture(channels, values, side=1, n=1, dtype=torch.float32)
        n = 200_000
        drawn = likelihoods.LogisticMixture(
            p.raw.expand(n, -1, -1, -1), channels, values=values
        ).sample()
        v = (drawn * (values - 1)).flatten(1)
        torch.testing.assert_close(v, v.round(), rtol=0, atol=1e-3)  # values there are
        index = sum(v[:, c].round().long() * values**c for c in range(channels))
        counts = torch.bincount(index, minlength=cells).double()
        grid = torch.tensor(list(itertools.product(range(values), repeat=channels))).flip(1)
        x = (grid / (values - 1)).view(cells, channels, 1, 1)
        log_p = likelihoods.LogisticMixture(
            p.raw.expand(cells, -1, -1, -1), channels, values=values
        )
        expected = n * log_p.log_prob(x).double().exp()
        seen = expected > 5
        chi2 = ((counts - expected).square() / expected)[seen].sum().item()
        freedom = int(seen.sum()) - 1
        assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_mean_of_the_mixture():
    """Exact for values that no bound cuts off, and the mean of many samples near the bounds."""
    p = mixture(3, side=1, n=400, dtype=torch.float32)
    raw = p.raw.clone()
    raw[:, 10:40] *= 0.2
    raw[:, 40:70] = -4  # narrow, well inside
    raw[:, 70:] *= 0.3
    p = likelihoods.LogisticMixture(raw, 3)
    by_sampling = torch.stack([p.sample() for _ in range(3000)]).mean(0)
    torch.testing.assert_close(p.mean, by_sampling, rtol=0, atol=0.02)
    edge = mixture(1, side=1, n=400, dtype=torch.float32)  # scales of 1: much beyond the bounds
    by_sampling = torch.stack([edge.sample() for _ in range(3000)]).mean(0)
    torch.testing.assert_close(edge.mean, by_sampling, rtol=0, atol=0.04)
    assert (edge.mean - by_sampling).mean().abs() < 0.002


@pytest.mark.parametrize("arch", ["vae", "aae", "biva"])
def test_baselines_of_colour_images(arch):
    """The likelihood is the mixture, and the maps of two latents lie side by side."""
    model = models.build(models.configure(arch, "small", (3, 32, 32), channels=4))
    x = eight_bit(2, 3, 32, 32, dtype=torch.float32)
    inference = model.infer(x)
    assert isinstance(model.generate(inference.latents), likelihoods.LogisticMixture)
    assert model.sample(2).sample().shape == x.shape
    if arch == "biva":
        assert model.latent_shapes == [(32, 8, 8), (16, 4, 4), (256,), (128,), (64,)]
    else:
        assert model.latent_shapes == [(64,)]
    value = rewards.elbo_loss(model, x).value
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, model))


@pytest.mark.parametrize("arch", ARCHS)
def test_colour_hierarchies(arch):
    """Presets at 32 and 64 pixels; the likelihood is the mixture of the decoder's last layer."""
    for size, side, latents, channels in [
        ("small", 32, ("16c", "8c", "128", "64", "64"), 64),
        ("small", 64, ("16c", "8c", "128", "64", "64"), 64),
        ("paper", 32, ("128c", "64c", "256", "128", "64"), 256),
        ("paper", 64, ("128c", "64c", "256", "128", "64"), 256),
    ]:
        config = models.configure(arch, size, (3, side, side))
        assert config.latents == latents and config.channels == channels
    assert config.strides == (2, 2, 2, 2, 2) and config.kernels == (5, 3, 3, 3, 3)
    for side in (32, 64):
        config = models.configure(arch, "small", (3, side, side), channels=8)
        model, x = models.build(config), eight_bit(3, 3, side, side, dtype=torch.float32)
        loss = rewards.joint_loss(model, x, 0.9)
        for name, g in zip(
            dict(model.named_parameters()), gradients(loss.value, model), strict=True
        ):
            assert g.abs().max() > 0, name
        z = model.infer(x).latents
        raw = model.to_pixels(model.decoder[0](z[0]).relu())
        pixels = torch.nn.functional.pixel_shuffle(raw, 4)
        expected = likelihoods.LogisticMixture(pixels, 3).log_prob(x)
        torch.testing.assert_close(model.likelihood(z[0]).log_prob(x), expected)
        assert model.sample(2).mean.shape == (2, 3, side, side)


def test_levels_of_colour_hierarchies():
    def latents(n, size="paper"):
        return models.configure("hvae", size, (3, 32, 32), levels=n).latents

    assert latents(1) == ("64",) and latents(3) == ("256", "128", "64")
    assert latents(7) == ("128c", "128c", "128c", "64c", "256", "128", "64")
    assert latents(2, "small") == ("64", "64")
    assert models.configure("vae", "paper", (3, 32, 32)).latents == ("64",)
    for n in range(1, 11):
        model = models.build(models.configure("lvae", "small", (3, 32, 32), levels=n, channels=4))
        assert len(model.infer(torch.rand(2, 3, 32, 32)).latents) == n
    with pytest.raises(ValueError, match="squares whose side is a multiple of 4"):
        models.configure("lvae", "small", (3, 30, 30))


def test_colour_rewards_equal_the_paths_one_by_one(fixed_noise):
    config = models.Config("lvae", (3, 8, 8), LATENTS[3], 4, (3,) * 3, (1, 2, 1), 1, 2)
    model, x = models.build(config).double(), eight_bit(4, 3, 8, 8)
    inference = model.infer(x)
    z = inference.latents
    for level, start in enumerate(z):
        row = start
        for below in reversed(range(level)):
            row = model.prior(below, row).mean
        raw = model.to_pixels(model.decoder[0](row).relu())
        raw = torch.nn.functional.pixel_shuffle(raw, 2)
        literal = [literal_mixture_log_prob(a, b) for a, b in zip(raw, x, strict=True)]
        rows = [slice(None) if k == level else None for k in range(3)]
        found = rewards.skip_log_likelihood(model, x, inference, rows)
        assert_same(found, torch.tensor(literal, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------
# rewards.py


def literal_q_value(model, arch, x, step, gamma, skip):
    """Eq. 24 to 26 as they stand: one path after another, one KL after another."""
    levels = model.levels
    posteriors, _, z, _ = model.infer(x)

    def kl(level):
        q = posteriors[level].base_dist
        if level == levels - 1:
            mean, scale = torch.zeros_like(q.loc), torch.ones_like(q.scale)
        else:
            p = model.prior(level, z[level + 1]).base_dist
            mean, scale = p.loc, p.scale
        d = torch.log(scale / q.scale) + (q.scale**2 + (q.loc - mean) ** 2) / (2 * scale**2) - 0.5
        return d.flatten(1).sum(1)

    def log_px(level):
        value = z[level]
        for below in range(level - 1, -1, -1):
            p = model.prior(below, value)
            value = p.mean if skip == "mean" else p.rsample()
        p = model.likelihood(value).mean
        return (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)

    def level_at(t):
        return t if arch == "hvae" else levels - 1 - t

    q_value = 0
    for i in range(step, levels):
        reward = log_px(level_at(i)) - sum(kl(level_at(s)) for s in range(i + 1))
        q_value = q_value + gamma ** (i - step) * reward
    return q_value


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("skip", ["mean", "sample"])
def test_q_values_equal_the_literal_transcription(arch, levels, gamma, skip, fixed_noise):
    """Values and all gradients of every Q_t, and of their sum in one update (Eq. 28)."""
    model, x = tiny(arch, levels), images(3)
    total, total_gradient = 0, None
    for step in range(levels):
        expected = literal_q_value(model, arch, x, step, gamma, skip)
        inference = model.infer(x)
        r = rewards.rewards(model, x, inference, rewards.level_kl(inference), step, skip)
        found = rewards.q_value(r, gamma)
        assert_same(found, expected)
        loss = rewards.stepwise_loss(model, x, step, gamma, skip).value
        assert_same(loss, -expected.mean())
        gradient = gradients(-expected.mean(), model)
        assert_same(gradients(loss, model), gradient)
        total = total - expected.mean()
        total_gradient = (
            gradient
            if total_gradient is None
            else [a + b for a, b in zip(total_gradient, gradient, strict=True)]
        )
    joint = rewards.joint_loss(model, x, gamma, skip).value
    assert_same(joint, total)
    assert_same(gradients(joint, model), total_gradient)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_learns(arch):
    model, x = tiny(arch, 5), images(8)
    for name, g in zip(
        dict(model.named_parameters()),
        gradients(rewards.joint_loss(model, x, 0.9).value, model),
        strict=True,
    ):
        assert g.abs().max() > 0, name


@pytest.mark.parametrize("arch", ARCHS)
def test_what_a_step_pays(arch):
    """By hand, each level's KL a number of its own; in the rewards, and in both kinds of sums."""
    model, kl = types.SimpleNamespace(order=tiny(arch, 3).order), torch.tensor([[1.0], [10], [100]])
    expected = {
        "lvae": {"inferred": [100, 110, 111], "own": [100, 10, 1]},
        "hvae": {"inferred": [1, 11, 111], "own": [1, 10, 100]},
    }[arch]
    for pay, values in expected.items():
        assert rewards.paid(model, kl, pay).flatten().tolist() == values
        assert rewards.paid(model, kl, pay, beta=0.5)[-1].item() == values[-1] / 2
    with pytest.raises(ValueError, match="choose inferred or own"):
        rewards.paid(model, kl, "nothing")
    model, x = tiny(arch, 3), images(6)

    def at_same_noise(loss, **kwargs):
        torch.manual_seed(5)
        return loss(model, x, gamma=0.8, pay="own", **kwargs).value

    torch.manual_seed(5)
    inference = model.infer(x)
    kl = rewards.level_kl(inference)
    r = rewards.rewards(model, x, inference, kl, pay="own")
    others = rewards.rewards(model, x, inference, kl)
    in_order = kl[list(model.order)]
    assert_same(r, others + in_order.cumsum(dim=0) - in_order)
    steps = [rewards.q_value(r[t:], 0.8).mean() for t in range(3)]
    assert_same(at_same_noise(rewards.stepwise_loss, step=1), -steps[1])
    assert_same(at_same_noise(rewards.joint_loss), -sum(steps))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("terms", [{}, {"beta": 0.3}, {"free_bits": 0.2, "beta": 0.5}])
def test_joint_is_the_sum_of_stepwise(arch, terms):
    model, x = tiny(arch, 5), images(3)

    def at_same_noise(loss, **kwargs):
        torch.manual_seed(5)
        return loss(model, x, gamma=0.8, **kwargs, **terms).value

    steps = sum(at_same_noise(rewards.stepwise_loss, step=t) for t in range(5))
    joint = at_same_noise(rewards.joint_loss)
    assert_same(joint, steps)
    assert_same(gradients(joint, model), gradients(steps, model))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n, levels, gamma", [(3, 2, 0.9), (4, 3, 0.5), (4, 2, 1.0), (3, 3, 0.0)])
@pytest.mark.parametrize("pay", ["inferred", "own"])
def test_sampled_is_unbiased(arch, n, levels, gamma, pay, fixed_noise):
    """The exact expectation over all orders of the batch, value and gradient."""
    model, x = tiny(arch, levels), images(n)
    values, grads = [], []
    for permutation in itertools.permutations(range(n)):
        loss = rewards.sampled_loss(model, x[list(permutation)], gamma, pay=pay)
        values.append(loss.value)
        grads.append(gradients(loss.value, model))
    assert torch.stack(values).std() > 1e-3  # the estimate does depend on the order
    joint = rewards.joint_loss(model, x, gamma, pay=pay)
    assert_same(torch.stack(values).mean(), joint.value)
    mean = [torch.stack(g).mean(dim=0) for g in zip(*grads, strict=True)]
    assert_same(mean, gradients(joint.value, model))
    assert_same(loss.kl, joint.kl)


@pytest.mark.parametrize("arch", ARCHS)
def test_sampled_by_hand(arch, fixed_noise):
    """Each image's one path, decoded alone, and the KL of all images."""
    model, x, gamma = tiny(arch, 3), images(7), 0.5
    counts = {"lvae": [3, 2, 2], "hvae": [2, 2, 3]}[arch]  # of 7 by the weights 1, 1.5, 1.75
    weight = [1.75, 1.5, 1.0] if arch == "lvae" else [1.0, 1.5, 1.75]  # bottom to top
    kl = rewards.level_kl(model.infer(x))
    until = kl.flip(0).cumsum(0).flip(0) if arch == "lvae" else kl.cumsum(0)
    value, start = sum(w * u.mean() for w, u in zip(weight, until, strict=True)), 0
    for level, n in enumerate(counts):
        part = x[start : start + n]
        below = [None] * level + model.infer(part).latents[level:]
        value = value - weight[level] * model.generate(below).log_prob(part).mean()
        start += n
    assert_same(rewards.sampled_loss(model, x, gamma).value, value)


def test_small_batches_take_every_path():
    model, x = tiny("lvae", 3), images(4)
    torch.manual_seed(1)
    sampled = rewards.sampled_loss(model, x[:2], 0.9).value
    torch.manual_seed(1)
    assert_same(sampled, rewards.joint_loss(model, x[:2], 0.9).value)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("skip", ["mean", "sample"])
def test_ivae_equals_the_literal_transcription(arch, levels, skip, fixed_noise):
    """Eq. 39: 1/L sum_k log p(x|z_<=k), z_>k inferred and z_<=k of the priors, less the KLs."""
    model, x = tiny(arch, levels), images(3)
    posteriors, _, z, _ = model.infer(x)
    literal = 0
    for k in range(levels):
        value = z[k]  # z_{k+1} in the paper's counting
        for below in reversed(range(k)):
            p = model.prior(below, value)
            value = p.mean if skip == "mean" else p.rsample()
        p = model.likelihood(value).mean
        literal = literal + (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1) / levels
    for k in range(levels):
        p = model.prior(k, z[k + 1] if k + 1 < levels else None)
        literal = literal - kl_divergence(posteriors[k], p)
    found = rewards.ivae_loss(model, x, skip)
    assert_same(found.value, -literal.mean())
    assert_same(gradients(found.value, model), gradients(-literal.mean(), model))
    weighted = rewards.ivae_loss(model, x, skip, beta=0.25).value
    assert_same(weighted, found.value - 0.75 * found.kl.sum())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n, levels", [(3, 2), (4, 3), (3, 3)])
def test_sampled_ivae_is_unbiased(arch, n, levels, fixed_noise):
    model, x = tiny(arch, levels), images(n)
    values, grads = [], []
    for permutation in itertools.permutations(range(n)):
        loss = rewards.ivae_loss(model, x[list(permutation)], sampled=True)
        values.append(loss.value)
        grads.append(gradients(loss.value, model))
    assert torch.stack(values).std() > 1e-3
    torch.manual_seed(3)
    whole = rewards.ivae_loss(model, x)
    assert_same(torch.stack(values).mean(), whole.value)
    mean = [torch.stack(g).mean(dim=0) for g in zip(*grads, strict=True)]
    assert_same(mean, gradients(whole.value, model))
    torch.manual_seed(3)
    few = rewards.ivae_loss(model, x[: levels - 1], sampled=True).value  # fewer images than paths
    torch.manual_seed(3)
    assert_same(few, rewards.ivae_loss(model, x[: levels - 1]).value)


AAE_LOSSES = (rewards.reconstruction_loss, rewards.discriminator_loss, rewards.confusion_loss)


def test_adversarial_losses_by_hand(monkeypatch):
    """With D(z) = sigmoid(w z + b). The samples of the prior are what is drawn next."""
    model, x = tiny("aae", 1), images(4)
    w, b = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 0.3
    monkeypatch.setattr(rewards, "odds", lambda model, z: z @ w + b)

    def at_same_noise(loss):
        torch.manual_seed(8)
        return loss(model, x)

    torch.manual_seed(8)
    z = model.infer(x).latents[0]
    prior = torch.randn(4, 3, dtype=torch.float64)

    def d(values):
        return 1 / (1 + torch.exp(-(values @ w + b)))

    p = model.likelihood(z).mean
    log_px = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    by_hand = [-log_px.mean(), -(d(prior).log() + (1 - d(z)).log()).mean(), -d(z).log().mean()]
    for loss, expected in zip(AAE_LOSSES, by_hand, strict=True):
        found = at_same_noise(loss)
        assert_same(found.value, expected)
        q = model.infer(x).posteriors[0].base_dist
        kl = (-q.scale.log() + (q.scale**2 + q.loc**2) / 2 - 0.5).sum(1).mean()
        assert_same(found.kl, kl.detach().view(1))


def test_a_discriminator_that_knows_nothing_and_one_that_knows_all():
    model, x = tiny("aae", 1), images(4)
    for parameter in model.discriminator.parameters():
        parameter.data.zero_()  # D = 1/2 everywhere
    assert_same(rewards.discriminator_loss(model, x).value.item(), 2 * math.log(2))
    assert_same(rewards.confusion_loss(model, x).value.item(), math.log(2))


def test_each_phase_of_the_adversarial_autoencoder_moves_its_own_parameters():
    run = train.Run(settings.defaults({"arch": "aae", "channels": 4}), torch.device("cpu"))
    model, x = run.model, images(6, 28, torch.float32)
    parts = {
        "encoder": [*model.stem.parameters(), *model.encoder.parameters(),
                    *model.head.parameters()],
        "decoder": [*model.decoder.parameters(), *model.to_pixels.parameters()],
        "discriminator": list(model.discriminator.parameters()),
    }  # fmt: skip
    assert sum(map(len, parts.values())) == len(list(model.parameters()))
    moved = []
    assert run.losses == list(AAE_LOSSES)
    for loss, optimizer in zip(run.losses, run.optimizers, strict=True):
        before = {name: [p.clone() for p in of] for name, of in parts.items()}
        optimizer.zero_grad()
        loss(model, x).value.backward()
        optimizer.step()
        moved.append({name for name, of in parts.items()
                      if any(not torch.equal(a, b)
                             for a, b in zip(of, before[name], strict=True))})  # fmt: skip
    assert moved == [{"encoder", "decoder"}, {"discriminator"}, {"encoder"}]
    # The discriminator's step lowers its loss, the encoder's step raises D(z of x).
    for loss, optimizer in list(zip(run.losses, run.optimizers, strict=True))[1:]:
        values = []
        for _ in range(30):
            torch.manual_seed(1)
            value = loss(model, x).value
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < values[0] - 0.01


def test_an_unknown_skip_is_refused():
    for levels in (1, 3):
        model, x = tiny("hvae", levels), images(2)
        with pytest.raises(ValueError, match="unknown skip 'median'"):
            rewards.joint_loss(model, x, 0.9, skip="median")
        if levels > 1:
            with pytest.raises(ValueError, match="unknown skip"):
                model.decode([None] * (levels - 1) + [model.infer(x).latents[-1]], skip="median")
    with pytest.raises(ValueError, match="every start is None"):
        model.decode([None] * 3)


def test_path_counts_and_weights():
    for gamma in (0.0, 0.5, 0.9, 0.98):
        for levels in (1, 2, 5, 10):
            weights = rewards.path_weights(levels, gamma)
            closed = [(1 - gamma**i) / (1 - gamma) for i in range(1, levels + 1)]
            assert weights == pytest.approx(closed)
            double_sum = [0.0] * levels
            for t in range(levels):
                for i in range(t, levels):
                    double_sum[i] += gamma ** (i - t)
            assert weights == pytest.approx(double_sum)
            for n in (levels, levels + 1, 93, 128):
                counts = rewards.path_counts(n, weights)
                assert sum(counts) == n and min(counts) >= 1
                if n == 128:
                    share = [n * w / sum(weights) for w in weights]
                    assert all(abs(c - s) < 1.5 for c, s in zip(counts, share, strict=True))
    assert rewards.path_weights(4, 1.0) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="2 images"):
        rewards.path_counts(2, [1, 1, 1])


@pytest.mark.parametrize("arch", ARCHS)
def test_one_level_by_rl_is_the_elbo(arch):
    model, x = tiny(arch, 1), images(6)

    def at_same_noise(loss, **kwargs):
        torch.manual_seed(2)
        value = loss(model, x, **kwargs).value
        return value, gradients(value, model)

    elbo = at_same_noise(rewards.elbo_loss)
    assert_same(at_same_noise(rewards.stepwise_loss, step=0, gamma=0.9), elbo)
    assert_same(at_same_noise(rewards.joint_loss, gamma=0.3), elbo)
    assert_same(at_same_noise(rewards.sampled_loss, gamma=0.9), elbo)


@pytest.mark.parametrize("arch", ARCHS)
def test_elbo_is_the_reward_that_decodes_the_lowest_level_after_all(arch):
    """Eq. 5 and 6 by hand; top-down that is the last reward."""
    model, x = tiny(arch, 3), images(4)
    torch.manual_seed(4)
    value, kl = rewards.elbo(model, x)
    torch.manual_seed(4)
    posteriors, priors, z, _ = model.infer(x)
    p = model.likelihood(z[0]).mean
    log_px = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    by_hand = sum(kl_divergence(q, r) for q, r in zip(posteriors, priors, strict=True))
    assert_same(value, log_px - by_hand)
    assert_same(kl.sum(0), by_hand)
    if arch == "lvae":
        torch.manual_seed(4)
        assert_same(rewards.rewards(model, x, model.infer(x), kl)[-1], value)


def test_free_bits_and_beta():
    kl = torch.tensor([[1.0, 5.0], [0.5, 1.0], [0.0, 0.2]], requires_grad=True)
    weighed = rewards.weigh_kl(kl, beta=0.5, free_bits=2.0)
    assert weighed.tolist() == [[0.5, 2.5], [1.0, 1.0], [1.0, 1.0]]
    weighed.sum().backward()
    assert kl.grad.tolist() == [[0.5, 0.5], [0, 0], [0, 0]]
    assert rewards.weigh_kl(kl) is not kl and torch.equal(rewards.weigh_kl(kl), kl)


@pytest.mark.parametrize("loss", ["elbo", "stepwise", "joint", "sampled"])
def test_gradients_against_finite_differences(loss, fixed_noise):
    model, x = tiny("lvae", 3), images(6)
    call = {
        "elbo": lambda: rewards.elbo_loss(model, x, beta=0.7),
        "stepwise": lambda: rewards.stepwise_loss(model, x, 1, 0.9, "sample"),
        "joint": lambda: rewards.joint_loss(model, x, 0.9, "sample"),
        "sampled": lambda: rewards.sampled_loss(model, x, 0.9),
    }[loss]
    found = gradients(call().value, model)
    direction = [torch.randn_like(p) for p in model.parameters()]
    values, step = [], 1e-6
    for shift in (step, -2 * step):  # to one side of where the parameters are, then to the other
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += shift * d
        values.append(call().value.item())
    slope = (values[0] - values[1]) / (2 * step)
    along = sum((g * d).sum() for g, d in zip(found, direction, strict=True)).item()
    assert along == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("a", [0.5, -0.5])
def test_kl_given_a_sample_that_was_inferred_from_the_level(a):
    """q(z_1) = N(0, 1), z_2 = a z_1 + noise and p(z_1|z_2) = N(z_2, 1): the mean of the KLs lies
    above that of log q(z_1) / p(z_1|z_2) by the covariance of z_1 and the prior's mean, which is a,
    so on either side of it."""
    torch.manual_seed(0)
    z1 = torch.randn(400_000, 1, dtype=torch.float64)
    z2 = a * z1 + 0.5 * torch.randn_like(z1)
    q, p = models.gaussian(torch.zeros_like(z1), torch.ones_like(z1)), models.gaussian(z2, z1**0)
    kl = rewards.level_kl(models.Inference([q], [p], [z1]))[0].mean()
    log_ratio = rewards.log_ratios(models.Inference([q], [p], [z1]))[0].mean()
    assert (kl - log_ratio).item() == pytest.approx(a, abs=0.01)


def test_level_kl_against_torch_and_monte_carlo():
    model, x = tiny("lvae", 3), images(2)
    inference = model.infer(x)
    kl = rewards.level_kl(inference)
    for level, (q, p) in enumerate(zip(inference.posteriors, inference.priors, strict=True)):
        base_p = Normal(p.mean.expand_as(q.mean), p.base_dist.scale.expand_as(q.mean))
        by_torch = kl_divergence(Normal(q.mean, q.base_dist.scale), base_p).flatten(1).sum(1)
        assert_same(kl[level], by_torch)
        with torch.no_grad():
            z = q.sample((40_000,))
            ratio = q.log_prob(z) - p.log_prob(z)
        error = ratio.std(dim=0) / 40_000**0.5
        assert ((ratio.mean(dim=0) - kl[level]).abs() < 5 * error).all()


class LinearGaussian:
    """z2 ~ N(0,1), z1|z2 ~ N(b z2, c), x|z1 ~ N(a z1, s), variances c and s, one pixel.

    A model for rewards.py that shares no code with models.py. Its posterior is the exact one,
    or, with `off`, one that is shifted and too wide.
    """

    levels, order = 2, (1, 0)
    a, b, c, s = 1.3, 0.7, 0.5, 0.4

    def __init__(self, off: float = 0.0):
        self.off = off

    def normal(self, mean, variance):
        return Independent(Normal(mean, torch.full_like(mean, variance).sqrt()), 1)

    def log_evidence(self, x):
        variance = self.a**2 * (self.b**2 + self.c) + self.s
        return self.normal(torch.zeros_like(x), variance).log_prob(x)

    def infer(self, x, sample=True):
        gain = self.a * self.b
        noise = self.a**2 * self.c + self.s
        q2 = self.normal(gain * x / (gain**2 + noise) + self.off,
                         noise / (gain**2 + noise) + self.off)  # fmt: skip
        z2 = q2.rsample()
        precision = 1 / self.c + self.a**2 / self.s
        q1 = self.normal((self.b * z2 / self.c + self.a * x / self.s) / precision + self.off,
                         1 / precision + self.off)  # fmt: skip
        p2 = self.normal(torch.zeros_like(x), 1.0)
        return models.Inference([q1, q2], [self.prior(0, z2), p2], [q1.rsample(), z2])

    def prior(self, level, above):
        return self.normal(self.b * above, self.c)

    def generate(self, latents, skip="mean"):
        return self.normal(self.a * latents[0], self.s)


def test_importance_weighted_bound_against_the_exact_likelihood():
    x = torch.randn(2000, 1, dtype=torch.float64) * 1.5
    exact = LinearGaussian()
    for k in (1, 7):  # with the exact posterior every weight is p(x)
        assert_same(rewards.importance_weighted_bound(exact, x, k), exact.log_evidence(x))
    off = LinearGaussian(off=0.3)
    truth = off.log_evidence(x).mean()
    bounds = [rewards.importance_weighted_bound(off, x, k).mean() for k in (1, 5, 50, 2000)]
    assert bounds[0] < bounds[1] - 0.05 < bounds[2] - 0.05 < truth
    assert bounds[3] == pytest.approx(truth.item(), abs=0.01)
    elbo = rewards.elbo(off, x)[0].mean()
    assert bounds[0] == pytest.approx(elbo.item(), abs=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        rewards.importance_weighted_bound(off, x, 0)


def test_log_ratios_see_the_whole_divergence_either_way_up():
    """With the exact posterior log p(x|z) less their sum is log p(x), whatever the sample, whether
    z1 or z2 is inferred first; the closed forms bottom-up say otherwise even in the mean."""
    x, down = torch.randn(2000, 1, dtype=torch.float64) * 1.5, LinearGaussian()
    of_z1 = down.b**2 + down.c  # the variance of z1 alone

    class Up(LinearGaussian):
        order = (0, 1)

        def infer(self, x, sample=True):
            precision = 1 / of_z1 + self.a**2 / self.s
            q1 = self.normal(self.a * x / self.s / precision, 1 / precision)
            z1 = q1.rsample()
            q2 = self.normal(self.b * z1 / of_z1, self.c / of_z1)
            z2, p2 = q2.rsample(), self.normal(torch.zeros_like(x), 1.0)
            return models.Inference([q1, q2], [self.prior(0, z2), p2], [z1, z2])

    for model in (down, Up()):
        inference = model.infer(x)
        log_px = rewards.reconstruction(model, x, inference)
        log_ratios = rewards.log_ratios(inference)
        assert_same(log_px - log_ratios.sum(dim=0), model.log_evidence(x))
        missed = (rewards.level_kl(inference) - log_ratios).sum(dim=0).mean().item()
        assert (abs(missed) < 0.03) == (model is down), missed


@pytest.mark.parametrize("arch", ARCHS)
def test_importance_weighted_bound_of_the_hierarchies(arch):
    """However many samples a pass takes, it is the log-mean of the weights p(x, z) / q(z|x)."""
    model, x = tiny(arch, 3), images(4)
    for at_once, passes in [(4, [1, 1, 1, 1, 1]), (8, [2, 2, 1]), (1024, [5])]:
        torch.manual_seed(6)
        weights = []
        for samples in passes:
            repeated = x.repeat(samples, 1, 1, 1)
            posteriors, priors, z, _ = model.infer(repeated)
            log_w = model.likelihood(z[0]).log_prob(repeated)
            for q, p, value in zip(posteriors, priors, z, strict=True):
                log_w = log_w + p.log_prob(value) - q.log_prob(value)
            weights.append(log_w.exp().view(samples, 4))
        by_hand = torch.cat(weights).mean(dim=0).log().detach()
        torch.manual_seed(6)
        assert_same(rewards.importance_weighted_bound(model, x, 5, at_once), by_hand)


# --------------------------------------------------------------------------------------------------
# evaluate.py


def test_bits_per_dimension_of_a_uniform_predictor():
    assert evaluate.bits_per_dimension(784 * math.log(0.5), 784) == pytest.approx(1.0)
    assert evaluate.bits_per_dimension(-3072 * math.log(256), 3072) == pytest.approx(8.0)
    model = tiny("hvae", 1, torch.float32)
    for p in model.to_pixels.parameters():
        p.data.zero_()
    pictures = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8)
    measured = evaluate.densities(model, pictures)
    bpd = evaluate.bits_per_dimension(measured["log_px_given_z"][0], 64)
    assert bpd == pytest.approx(1.0, abs=1e-5)

    class Uniform(torch.nn.Module):  # over the 256 values of each channel, and no latent at all
        levels, order, zero = 1, (0,), torch.zeros(())

        def infer(self, x, sample=True):
            unit = Independent(Normal(torch.zeros(len(x), 2), 1.0), 1)
            return models.Inference([unit], [unit], [torch.zeros(len(x), 2)])

        def generate(self, latents, skip="mean"):
            n = len(latents[0])
            logits = torch.zeros(n, 3, 8, 8, 256)
            values = torch.distributions.Categorical(logits=logits)
            return types.SimpleNamespace(
                log_prob=lambda x: values.log_prob(x * 255).flatten(1).sum(1)
            )

    colours = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    measured = evaluate.densities(Uniform(), colours, samples=3)
    for key in ("elbo", "iwae"):
        assert evaluate.bits_per_dimension(measured[key], 192) == pytest.approx(8.0, abs=1e-5)


def test_densities_leave_the_random_state_and_repeat():
    model = tiny("lvae", 3, torch.float32)
    pictures = torch.randint(0, 256, (600, 1, 8, 8), dtype=torch.uint8)
    before = torch.get_rng_state()
    a, b = evaluate.densities(model, pictures, 3), evaluate.densities(model, pictures, 3)
    assert a == b and torch.equal(before, torch.get_rng_state())
    assert a["iwae"] > a["elbo"] and evaluate.densities(model, pictures)["iwae"] is None


@pytest.mark.parametrize("arch", [*ARCHS, "biva"])
def test_measured_elbo_is_that_of_all_latents_together(arch):
    """The mean of log p(x, z) - log q(z|x) of one sample; top-down that is log p(x|z) less the
    closed-form KLs, but for the noise of the sample."""
    model = tiny(arch, 3, torch.float32)
    pictures = torch.randint(0, 256, (250, 1, 8, 8), dtype=torch.uint8)
    found = evaluate.densities(model, pictures)
    with torch.no_grad(), evaluate.seeded(torch.device("cpu"), 0):
        x = data.observed(pictures)
        posteriors, priors, z, _ = model.infer(x)
        by_hand = model.generate(z).log_prob(x)
        closed = by_hand - rewards.level_kl(models.Inference(posteriors, priors, z)).sum(dim=0)
        for q, p, value in zip(posteriors, priors, z, strict=True):
            q, p = q.base_dist, p.base_dist
            ratio = (value - q.loc).square() / q.scale**2 - (value - p.loc).square() / p.scale**2
            by_hand = by_hand + (ratio / 2 + q.scale.log() - p.scale.log()).flatten(1).sum(dim=1)
    assert found["elbo"] == pytest.approx(by_hand.mean().item(), rel=1e-6)
    if arch == "lvae":
        noise = by_hand - closed
        assert 0 < noise.mean().abs() < 4 * noise.std() / 250**0.5


class Recalls(torch.nn.Module):
    """A model whose representation of image i, of the value i, is row i of given tensors."""

    def __init__(self, *levels: torch.Tensor):
        super().__init__()
        self.tensors, self.levels = levels, len(levels)
        self.latent_shapes, self.zero = [t.shape[1:] for t in levels], levels[0].new_zeros(())

    def infer(self, x, sample=True):
        rows = (x[:, 0, 0, 0] * 255).round().long()
        return models.Inference([], [], [t[rows] for t in self.tensors])


def test_active_units():
    """Over batches, and for maps as for vectors."""
    z = torch.randn(250, 4) * torch.tensor([0.0, 0.07, 0.13, 3.0]) + 5
    maps = torch.stack([z, z * 0, z], dim=1).view(250, 3, 2, 2)
    pictures = torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 80, 80)
    model = Recalls(z, maps)
    assert evaluate.active_units(model, pictures) == [2, 4]
    assert evaluate.active_units(model, pictures, threshold=0.001) == [3, 6]


def test_representations_of_wide_maps_are_averaged():
    maps, z = torch.randn(9, 3, 4, 4), torch.randn(9, 5)
    pictures = torch.arange(9, dtype=torch.uint8).view(-1, 1, 1, 1)
    model = Recalls(maps, z)
    whole = evaluate.representations(model, pictures)
    assert torch.equal(whole[0], maps.flatten(1)) and torch.equal(whole[1], z)
    halves = evaluate.representations(model, pictures, widest=20)
    by_hand = maps.view(9, 3, 2, 2, 2, 2).mean(dim=(3, 5)).flatten(1)
    assert torch.equal(halves[1], z)
    torch.testing.assert_close(halves[0], by_hand)
    torch.testing.assert_close(
        evaluate.representations(model, pictures, widest=2)[0], maps.mean(dim=(2, 3))
    )


def test_probe_on_known_separability():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 3000)
    angle = labels * 2 * np.pi / 10
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) + rng.normal(0, 0.02, (3000, 2))

    def probe(z, y=labels):
        return evaluate.linear_probe(z[:2000], y[:2000], z[2000:], y[2000:])

    assert probe(circle) == 100  # one-versus-rest cannot: no line parts a class from the others
    assert probe(circle * [1e3, 10] + 7) == 100
    assert probe(rng.normal(size=(3000, 8))) < 15
    overlap = labels % 2 + rng.normal(0, 1, 3000)  # Bayes: Phi(1/2) = 69.1 %
    assert probe(overlap[:, None], labels % 2) == pytest.approx(69.1, abs=4)
    assert probe(circle * 1e-4) < 60  # rounding noise of a collapsed level is not blown up


def test_probe_of_many_classes(monkeypatch):
    """Against scikit-learn's own pipeline in one piece: standardise, PCA, one-versus-one."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (30, 60))
    labels = np.arange(1800) % 30
    z = (centres[labels] + rng.normal(0, 1.6, (1800, 60))) @ rng.normal(0, 0.3, (60, 60))
    z = np.float32(z + 3)
    a, ya, b, yb = z[:1200], labels[:1200], z[1200:], labels[1200:]
    standard, pca = StandardScaler().fit(a), PCA(20)  # 80 images a pair, a quarter of them
    machine = OneVsOneClassifier(LinearSVC(dual=False, tol=1e-2))
    machine.fit(pca.fit_transform(standard.transform(a)), ya)
    found = evaluate.linear_probe(a, ya, b, yb)
    by_sklearn = 100 * machine.score(pca.transform(standard.transform(b)), yb)
    assert found == pytest.approx(by_sklearn, abs=0.5) and found > 40
    twenty = labels[:1200] < 20, labels[1200:] < 20  # few classes keep all dimensions
    machine = OneVsOneClassifier(LinearSVC(dual=False))
    machine.fit(StandardScaler().fit_transform(a[twenty[0]]), ya[twenty[0]])
    standard = StandardScaler().fit(a[twenty[0]])
    whole = 100 * machine.score(standard.transform(b[twenty[1]]), yb[twenty[1]])
    few = a[twenty[0]], ya[twenty[0]], b[twenty[1]], yb[twenty[1]]
    assert evaluate.linear_probe(*few) == pytest.approx(whole, abs=0.3)
    # More than 512 dimensions: the leading 256 components.
    wide = [np.repeat(few[0], 9, axis=1), few[1], np.repeat(few[2], 9, axis=1), few[3]]
    kept = []
    monkeypatch.setattr(evaluate, "principal_components", lambda *x: kept.append(x[2]) or x[:2])
    evaluate.linear_probe(wide[0][:, :512], few[1], wide[2][:, :512], few[3])
    evaluate.linear_probe(wide[0][:, :513], few[1], wide[2][:, :513], few[3])
    assert kept == [256]


def test_probes_of_levels_and_of_all():
    torch.manual_seed(0)
    model = tiny("hvae", 2, torch.float32)
    pictures = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    labels = (pictures.float().flatten(1)[:, :32].mean(dim=1) > 127).long()
    halves = data.Data(pictures[:150], labels[:150], pictures[150:], labels[150:], ("0", "1"))
    found = evaluate.probes(model, halves)
    assert list(found) == ["z1", "z2", "all"]
    a, b = (np.concatenate([r.double().numpy() for r in evaluate.representations(model, p)], axis=1)
            for p in (pictures[:150], pictures[150:]))  # fmt: skip
    assert evaluate.probes(model, halves._replace(train_labels=None, test_labels=None)) == {}
    assert a.shape == (150, 2 * 4 * 4 + 3)
    expected = evaluate.linear_probe(a, labels[:150].numpy(), b, labels[150:].numpy())
    assert found["all"] == pytest.approx(expected, abs=1)  # a in float64
    assert evaluate.probes(model, halves, which="top") == {"z2": found["z2"]}


def test_the_probe_of_the_top_alone(few, tmp_path, capsys):
    """--probe top leaves the other probes out and the same z_L; no run differs from another by
    it, and `evaluate.py RUN` measures the rest anew."""
    evaluations = {}
    for probe in ("every", "top"):
        out = tmp_path / probe
        seed = ["--seed", "1"] if probe == "top" else []
        flags = [*TINY, "--epochs", "1", "--batch-size", "64", "--out", str(out), *seed]
        train.main([*flags, "--probe", probe])
        evaluations[probe] = json.loads((out / "eval.json").read_text())["probe"]
    top = max(evaluations["every"].keys() - {"all"})
    assert list(evaluations["top"]) == [top] and len(evaluations["every"]) > 2
    capsys.readouterr()
    evaluate.main([str(tmp_path / "every"), str(tmp_path / "top"), "--table", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert len(row["probe"]["values"]) == 2 and len(row["all"]["values"]) == 1
    evaluate.main([str(tmp_path / "top"), "--json"])
    again = json.loads(capsys.readouterr().out)["probe"]
    assert again.keys() == evaluations["every"].keys() and again[top] == evaluations["top"][top]
    evaluate.main([str(tmp_path / "every"), "--json", "--probe", "top"])
    assert json.loads(capsys.readouterr().out)["probe"] == {top: evaluations["every"][top]}


def test_probe_of_binarised_images(few, tmp_path, monkeypatch, capsys):
    """One draw of each pixel with its value as probability, in training and test anew, the same
    each time; kept in eval.json, a column of its own in the table."""
    pictures = torch.tensor([0, 64, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 40, 40)

    class Sees(torch.nn.Module):
        levels, latent_shapes, zero = 1, [(1600,)], torch.zeros(())

        def infer(self, x, sample=True):
            return models.Inference([], [], [x.flatten(1)])

    grey, drawn, again = (
        evaluate.representations(Sees(), pictures, binarised=b)[0] for b in (False, True, True)
    )
    assert torch.equal(grey.mul(255).round().to(torch.uint8), pictures.flatten(1))
    assert torch.equal(drawn, again) and set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean(dim=1).tolist() == pytest.approx([0, 64 / 255, 1], abs=0.04)
    out = str(tmp_path / "run")
    train.main([*TINY, "--epochs", "2", "--batch-size", "64", "--out", out])
    evaluate.main([out, "--table", "--binarised"])
    shown = capsys.readouterr().out
    assert "binarised z_L %" in shown and "binarised all %" in shown
    kept = json.loads(Path(out, "eval.json").read_text())
    model = evaluate.restore_model(evaluate.load_checkpoint(Path(out)))
    assert kept["probe_binarised"] == evaluate.probes(model, few, binarised=True)
    evaluate.main([out, "--binarised"])
    assert "on binarised images: z1" in capsys.readouterr().out
    model.config = model.config._replace(image=(3, 28, 28))
    monkeypatch.setattr(evaluate, "restore_model", lambda state: model)
    for flag in ("--binarised", "--sampled-binarised"):
        fails(capsys, [out, flag], f"{flag} is for grey", evaluate.main)


def test_probe_of_samples_of_the_posterior(few, tmp_path, capsys):
    """Of two classes at -1 and 1 with unit noise the best classifier has Φ(1) = 84.1 % of the
    samples right, of the means all. Where a quarter of a class's pixels comes out as the other
    class's, it has 3/4 of the binarised means right, and of their samples 3/4 Φ(1) + 1/4 Φ(-1)."""

    class Noisy(torch.nn.Module):
        levels, latent_shapes, zero = 1, [(1,)], torch.zeros(())

        def infer(self, x, sample=True):
            z = 2 * x.flatten(1)[:, :1] - 1
            return models.Inference([], [], [z + torch.randn_like(z) if sample else z])

    labels = torch.arange(6000) % 2
    pictures = (255 * labels).to(torch.uint8).view(-1, 1, 1, 1)
    two = few._replace(
        train=pictures, train_labels=labels, test=pictures[:5000], test_labels=labels[:5000]
    )
    assert evaluate.probes(Noisy(), two) == {"z1": 100.0, "all": 100.0}
    found = evaluate.probes(Noisy(), two, sample=True)
    phi = NormalDist().cdf(1)
    assert found["z1"] == found["all"] == pytest.approx(100 * phi, abs=1.6)  # 3 standard errors
    dim = torch.where(labels == 1, 191.25, 63.75).to(torch.uint8).view(-1, 1, 1, 1)
    two = two._replace(train=dim, test=dim[:5000])
    for name, right in (("binarised", 0.75), ("sampled_binarised", 0.75 * phi + 0.25 * (1 - phi))):
        found = evaluate.other_probe(Noisy(), two, name, "every")
        assert found["z1"] == found["all"] == pytest.approx(100 * right, abs=2.1)
    out = str(tmp_path / "run")
    train.main([*TINY, "--epochs", "2", "--batch-size", "64", "--out", out])
    before = json.loads(Path(out, "eval.json").read_text())
    capsys.readouterr()
    evaluate.main([out, "--table", "--sampled"])
    heading, *_ = (line for line in capsys.readouterr().out.splitlines() if "seeds" in line)
    assert "sampled z_L %" in heading and "sampled all %" in heading
    kept = json.loads(Path(out, "eval.json").read_text())
    model = evaluate.restore_model(evaluate.load_checkpoint(Path(out)))
    assert kept.pop("probe_sampled") == evaluate.probes(model, few, sample=True)
    assert kept == before  # what was measured before stays as it was
    evaluate.main([out, "--sampled", "--sampled-binarised", "--probe", "top"])
    top, shown = f"z{model.levels}", capsys.readouterr().out
    assert f"on samples of the posterior: {top}" in shown
    assert f"on samples of the posterior of binarised images: {top}" in shown


def test_mine_takes_images_as_they_are():
    x = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8)
    z = x.flatten(1)[:, :2].float() / 255

    def nats(pictures):
        pairs = pictures[:300], z[:300], (pictures[300:], z[300:])
        return mine.mutual_information(*pairs, hidden=16, epochs=4).nats

    assert nats(x) == pytest.approx(nats(x.double() / 255), abs=1e-3)


# --------------------------------------------------------------------------------------------------
# mine.py


def gaussian_pairs(n: int, dims: int, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, dims)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(n, dims)


@pytest.mark.parametrize(
    "dims, rho, tolerance", [(1, 0.9, 0.05), (4, 0.5, 0.07), (20, 0.5, 0.45), (2, 0.0, 0.02)]
)
def test_mine_on_gaussians(dims, rho, tolerance):
    """I = -d/2 ln(1 - rho^2), within what a network of this size and budget reaches."""
    truth = -dims / 2 * math.log(1 - rho**2)
    x, z = gaussian_pairs(30_000, dims, rho)
    found = mine.mutual_information(x, z, hidden=256, epochs=8 if dims < 20 else 12, lr=1e-3)
    assert found.nats == pytest.approx(truth, abs=tolerance)
    assert found.ceiling == pytest.approx(math.log(6000))
    assert found.curve[-1] == found.nats


def test_donsker_varadhan_with_the_true_density_ratio():
    rho = 0.8
    x, z = gaussian_pairs(20_000, 1, rho)

    def ratio(a, b):
        exponent = (rho**2 * (a**2 + b**2) - 2 * rho * a * b) / (2 * (1 - rho**2))
        return (-0.5 * math.log(1 - rho**2) - exponent).squeeze(-1)

    found = mine.donsker_varadhan(ratio, x, z, torch.Generator().manual_seed(0))
    assert found == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.02)


def test_mine_never_exceeds_its_ceiling():
    """z = x has infinite mutual information; any statistic, however extreme, reads at most ln n."""
    x = torch.randn(64, 3)
    generator = torch.Generator().manual_seed(0)
    for sharpness in (1.0, 100.0, 1e4):
        bound = mine.donsker_varadhan(lambda a, b, s=sharpness: -s * (a - b).square().sum(-1),
                                      x, x, generator)  # fmt: skip
        assert bound <= math.log(64) + 1e-6
    assert bound == pytest.approx(math.log(64), abs=0.01)
    repeated = x[:16].repeat(5, 1)
    estimate = mine.mutual_information(
        repeated, repeated, (repeated, repeated), hidden=32, epochs=3
    )
    assert estimate.ceiling == pytest.approx(math.log(16))
    assert max(estimate.curve) <= estimate.ceiling


def test_mine_gradient_and_moving_average():
    torch.manual_seed(0)
    values = [torch.randn(50, dtype=torch.float64) for _ in range(4)]
    average, by_hand, rate = mine.MovingLogMean(0.1), 0.0, 0.1
    for step, v in enumerate(values, start=1):
        by_hand = (1 - rate) * by_hand + rate * v.exp().mean().item()
        found = average.update(mine.log_mean_exp(v)).item()
        assert found == pytest.approx(math.log(by_hand / (1 - (1 - rate) ** step)))
    # On the first batch the average is the batch's own mean: the gradient is the bound's own.
    joint = torch.randn(50, dtype=torch.float64, requires_grad=True)
    product = torch.randn(50, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(
        mine.mine_loss(joint, product, mine.MovingLogMean()), [joint, product]
    )
    bound = joint.mean() - product.exp().mean().log()
    assert_same(found, torch.autograd.grad(-bound, [joint, product]))
    huge = mine.MovingLogMean().update(torch.tensor(5000.0))
    assert huge.item() == pytest.approx(5000)


def test_derangements():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 10, 101):
        for _ in range(20):
            d = mine.derangement(n, generator)
            assert sorted(d.tolist()) == list(range(n)) and (d != torch.arange(n)).all()


def test_mine_refuses_what_it_cannot_measure():
    x = torch.randn(10, 2)
    for args, words in [
        ((x, x[:9]), "one z for each x"),
        ((x[:4], x[:4]), "too few pairs"),
        ((x, x, (x, x[:3])), "do not match"),
    ]:
        with pytest.raises(ValueError, match=words):
            mine.mutual_information(*args)
    with pytest.raises(ValueError, match="epochs"):
        mine.mutual_information(x, x, (x, x), epochs=0)


# --------------------------------------------------------------------------------------------------
# data.py


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """A function that writes a small FashionMNIST; there is no network and no Debian package."""
    monkeypatch.setattr(data, "SPLITS", {"train": 20, "t10k": 10})
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "debian")

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", unreachable)
    rng = np.random.default_rng(0)

    def write(folder=tmp_path / "FashionMNIST" / "raw", suffix=""):
        arrays = {}
        for split, n in data.SPLITS.items():
            arrays[split] = (rng.integers(0, 256, (n, 28, 28), np.uint8),
                             rng.permutation(n).astype(np.uint8) % 10)  # fmt: skip
            write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", arrays[split][0])
            write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", arrays[split][1])
        return arrays

    return write


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("where", ["FashionMNIST/raw", "", "debian"])
def test_idx_layouts(layout, tmp_path, suffix, where):
    arrays = layout(tmp_path / where, suffix)
    found = data.load("fashionmnist", tmp_path, download=False)
    for pictures, labels, split in [
        (found.train, found.train_labels, "train"),
        (found.test, found.test_labels, "t10k"),
    ]:
        assert pictures.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(pictures.squeeze(1).numpy(), arrays[split][0])
        assert labels.tolist() == arrays[split][1].tolist()
    assert found.classes[9] == "Ankle boot" and len(found.classes) == 10


def broken(layout, tmp_path, how):
    folder = tmp_path / "FashionMNIST" / "raw"
    if how == "absent":
        return
    layout(suffix=".gz" if how == "bad gzip" else "")
    path = folder / "train-images-idx3-ubyte"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "html":
        path.write_bytes(b"<html>404</html>" * 9)
    elif how == "bad gzip":
        path = path.with_suffix(".gz") if path.suffix else Path(str(path) + ".gz")
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "other size":
        write_idx(path, np.zeros((20, 32, 32), np.uint8))
    elif how == "fewer":
        write_idx(path, np.zeros((19, 28, 28), np.uint8))
    elif how == "bad labels":
        write_idx(folder / "train-labels-idx1-ubyte", np.full(20, 10, np.uint8))


BROKEN = {
    "absent": "could not be downloaded.*put the four.*--data-dir.*apt-get.*digits",
    "missing": "could not be downloaded.*lacks train-images-idx3-ubyte",
    "truncated": "truncated or damaged.*delete it",
    "longer": "truncated or damaged",
    "empty": "not an IDX file",
    "html": "not an IDX file",
    "bad gzip": "cannot be read.*delete it",
    "other size": r"20, 32, 32.*not 20 of 28x28",
    "fewer": r"19, 28, 28.*20 labels",
    "bad labels": "in 10 classes",
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_data_gives_one_line(layout, tmp_path, how, capsys):
    broken(layout, tmp_path, how)
    line = fails(capsys, ["--dataset", "fashionmnist", "--data-dir", str(tmp_path),
                          "--out", str(tmp_path / "run")], BROKEN[how])  # fmt: skip
    assert str(tmp_path) in line and not (tmp_path / "run").exists()


# data.py: colour images. Every file is written here, in the official layout. An image is of one
# colour that tells which image of which class it is, so that each label can be checked.


@pytest.fixture
def offline(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


def colour_of(label: int, index: int) -> tuple[int, int, int]:
    return (8 + 24 * label, 8 + 24 * index, 100)


def assert_colours(pictures: torch.Tensor, labels, indices=None) -> None:
    """Image i has the colour of its label and of its number, up to what JPEG makes of it."""
    found = pictures.float().mean(dim=(2, 3))
    labels = torch.as_tensor(labels)
    assert ((found[:, 0] - 8) / 24).round().tolist() == labels.tolist()
    if indices is not None:
        assert ((found[:, 1] - 8) / 24).round().tolist() == list(indices)
    assert (found[:, 2] - 100).abs().max() < 6


def picture(label: int, index: int, size: tuple[int, int] = (64, 64), mode: str = "RGB"):
    return PIL.Image.new("RGB", size, colour_of(label, index)).convert(mode)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


CIFAR = {
    "cifar10": (torchvision.datasets.CIFAR10, "labels", "label_names", 5),
    "cifar100": (torchvision.datasets.CIFAR100, "fine_labels", "fine_label_names", 1),
}


@pytest.fixture
def write_cifar(tmp_path, monkeypatch, offline):
    """A function that writes a small CIFAR, four images a batch, with its checksums."""

    def write(name: str) -> Path:
        kind, key, names_key, _ = CIFAR[name]
        folder = tmp_path / kind.base_folder
        folder.mkdir()

        def dump(file: str, content: dict) -> list[str]:
            with open(folder / file, "wb") as f:
                pickle.dump(content, f, protocol=2)
            return [file, md5(folder / file)]

        lists = {"train_list": [], "test_list": []}
        for field in lists:
            for b, (file, _) in enumerate(getattr(kind, field)):
                labels = [(b + i) % 3 for i in range(4)]
                rows = [np.repeat(np.uint8(colour_of(c, i)), 1024) for i, c in enumerate(labels)]
                batch = {"data": np.stack(rows), key: labels, "filenames": ["x.png"] * 4}
                lists[field].append(dump(file, batch | {"coarse_labels": [0] * 4}))
        meta = dict(kind.meta)
        meta["md5"] = dump(meta["filename"], {names_key: ["cat", "dog", "ship"]})[1]
        for field, value in {**lists, "meta": meta}.items():
            monkeypatch.setattr(kind, field, value)
        return folder

    return write


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(write_cifar, tmp_path, monkeypatch, name, packed):
    """The unpacked folder, and the archive alone, of which the folder is unpacked offline."""
    folder = write_cifar(name)
    kind, *_, batches = CIFAR[name]
    if packed:
        archive = tmp_path / kind.filename
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, arcname=folder.name)
        monkeypatch.setattr(kind, "tgz_md5", md5(archive))
        shutil.rmtree(folder)
    d = data.load(name, tmp_path)
    assert d.train.shape == (4 * batches, 3, 32, 32) and d.test.shape == (4, 3, 32, 32)
    assert d.train.dtype == torch.uint8 and d.train_labels.dtype == torch.int64
    assert d.train_labels.tolist() == [(b + i) % 3 for b in range(batches) for i in range(4)]
    assert_colours(d.train, d.train_labels, [0, 1, 2, 3] * batches)
    assert_colours(d.test, d.test_labels, [0, 1, 2, 3])
    assert d.classes == ("cat", "dog", "ship") and d.unlabelled is None


@pytest.fixture
def write_stl10(tmp_path, monkeypatch, offline):
    def write() -> Path:
        kind = torchvision.datasets.STL10
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        for split, n in (("train", 6), ("test", 4), ("unlabeled", 7)):
            labels = [i % 3 for i in range(n)]
            colours = np.uint8([colour_of(c, i) for i, c in enumerate(labels)])
            images = np.broadcast_to(colours[:, :, None, None], (n, 3, 96, 96)).copy()
            images[0, :, :48, 48:] = 255  # the upper right quarter of the first one: file order
            images.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")  # column by column
            if split != "unlabeled":
                (np.uint8(labels) + 1).tofile(folder / f"{split}_y.bin")  # 1 to 10
        (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
        for field in ("train_list", "test_list"):
            listed = [[file, md5(folder / file)] for file, _ in getattr(kind, field)]
            monkeypatch.setattr(kind, field, listed)
        return folder

    return write


def test_stl10(write_stl10, tmp_path):
    folder = write_stl10()
    for _ in range(2):  # decoded, then from what was kept
        d = data.load("stl10", tmp_path, unlabelled=True)
        assert d.train.shape == (6, 3, 32, 32) and d.test.shape == (4, 3, 32, 32)
        assert d.train_labels.tolist() == [0, 1, 2, 0, 1, 2] and d.test_labels.tolist() == [
            0,
            1,
            2,
            0,
        ]
        assert_colours(d.train[1:], d.train_labels[1:], range(1, 6))
        assert_colours(d.test[1:], d.test_labels[1:], range(1, 4))
        assert d.unlabelled is d.to_train_on and d.unlabelled.shape == (7, 3, 32, 32)
        assert_colours(d.unlabelled[1:], [1, 2, 0, 1, 2, 0])
        white = (d.train[0] > 250).all(dim=0)
        assert white[1:15, 17:31].all() and not white[:, :15].any() and not white[17:].any()
        assert d.classes == ("airplane", "bird", "car")
    (folder / "unlabeled_X.bin").unlink()  # 2.6 GB that only --unlabelled needs
    d = data.load("stl10", tmp_path)
    assert d.unlabelled is None and d.to_train_on is d.train
    with pytest.raises(files.UserError, match="lacks unlabeled_X"):
        data.load("stl10", tmp_path, unlabelled=True)


WNIDS = ("n03444034", "n01443537", "n02002724")  # as wnids.txt lists them: not sorted


def write_tinyimagenet(root: Path, per_class: int = 4) -> Path:
    """tiny-imagenet-200/ with three classes; image 1 of each is grey, as some of the real are."""
    base = root / "tiny-imagenet-200"
    index = {wnid: label for label, wnid in enumerate(sorted(WNIDS))}
    for wnid in WNIDS:
        folder = base / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(per_class):
            image = picture(index[wnid], i, mode="L" if i == 1 else "RGB")
            image.save(folder / f"{wnid}_{i}.JPEG", quality=95)
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t0\t63\t63\n" for i in range(per_class))
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    for split in ("val", "test"):
        (base / split / "images").mkdir(parents=True)
    lines = []
    for i in range(12):  # val_10 sorts before val_2
        wnid = WNIDS[i % 3]
        picture(index[wnid], i % 10).save(base / "val/images" / f"val_{i}.JPEG", quality=95)
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    picture(0, 0).save(base / "test/images" / "test_0.JPEG")
    (base / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    words = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02002724\tblack stork\n"
    (base / "words.txt").write_text(words)
    return base


def pack(folder: Path) -> Path:
    """The folder as a zip beside it, and no folder."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as z:
        for path in sorted(folder.rglob("*")):
            z.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return archive


@pytest.mark.parametrize("layout", ["folder", "zip", "inside"])
def test_tinyimagenet(tmp_path, offline, layout):
    base = write_tinyimagenet(tmp_path)
    if layout == "zip":
        pack(base)
    for _ in range(2):
        d = data.load("tinyimagenet", base if layout == "inside" else tmp_path)
        assert d.train.shape == (12, 3, 64, 64) and d.test.shape == (12, 3, 64, 64)
        assert d.classes == ("goldfish", "black stork", "n03444034")
        assert d.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        colour = torch.tensor([i for i in range(12) if i % 4 != 1])
        assert_colours(d.train[colour], d.train_labels[colour], [0, 2, 3] * 3)
        grey = d.train[torch.arange(1, 12, 4)].float()
        assert (grey - grey[:, :1]).abs().max() == 0  # three equal channels
        order = [0, 1, 10, 11, *range(2, 10)]  # of the file names
        labels = [sorted(WNIDS).index(WNIDS[i % 3]) for i in order]
        assert d.test_labels.tolist() == labels
        assert_colours(d.test, labels, [i % 10 for i in order])


def write_celeba(root: Path, table: str = "txt") -> Path:
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    lines = ["image_id,partition"] if table == "csv" else []
    for i in range(9):
        image = picture(i % 4, i, size=(178, 218))
        image.paste((255, 255, 255), (0, 0, 178, 30))  # above the middle 148 rows
        image.save(base / "img_align_celeba" / f"{i + 1:06}.jpg", quality=95)
        lines.append(f"{i + 1:06}.jpg{',' if table == 'csv' else ' '}{(0, 0, 1, 2)[i % 4]}")
    (base / f"list_eval_partition.{table}").write_text("\n".join(lines) + "\n")
    return base


@pytest.mark.parametrize("layout", ["torchvision", "zip", "csv", "flat"])
def test_celeba(tmp_path, offline, layout):
    base = write_celeba(tmp_path, "csv" if layout == "csv" else "txt")
    if layout == "zip":
        pack(base / "img_align_celeba")
    d = data.load("celeba", base if layout == "flat" else tmp_path)
    assert d.train.shape == (5, 3, 64, 64) and d.test.shape == (2, 3, 64, 64)
    assert_colours(d.train, [0, 1, 0, 1, 0], [0, 1, 4, 5, 8])
    assert_colours(d.test, [3, 3], [3, 7])
    assert d.train.amax(dim=(1, 2, 3)).max() < 230  # the white strip is cut off
    assert d.train_labels is None and d.test_labels is None and d.classes == ()


def write_folder(root: Path, classes=("b", "a")) -> Path:
    """Images of several formats, sizes and modes, in class folders or in none."""
    for split, n in (("train", 5), ("test", 3)):
        for label, name in enumerate(sorted(classes) or [""]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                size, suffix, mode = [
                    ((40, 40), "png", "RGB"), ((90, 50), "jpg", "RGB"), ((30, 70), "png", "RGBA"),
                    ((32, 32), "BMP", "RGB"), ((200, 32), "webp", "RGB"),
                ][i]  # fmt: skip
                options = {"quality": 95} if suffix in ("jpg", "webp") else {}
                picture(label, i, size, mode).save(folder / f"{i}.{suffix}", **options)
            (folder / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize("side", [None, 64])
def test_folder(tmp_path, side):
    root = write_folder(tmp_path)
    d = data.load("folder", root, image_size=side)
    side = side or 32
    assert d.train.shape == (10, 3, side, side) and d.test.shape == (6, 3, side, side)
    assert d.train_labels.tolist() == [0] * 5 + [1] * 5 and d.classes == ("a", "b")
    assert_colours(d.train, d.train_labels, [0, 1, 2, 3, 4] * 2)
    assert_colours(d.test, d.test_labels, [0, 1, 2] * 2)
    assert data.image_shape("folder", side) == (3, side, side)


@pytest.mark.parametrize("classes", [(), ("all",)])
def test_folder_without_classes(tmp_path, classes, monkeypatch, capsys):
    """One class says no more than none. The whole run works without a probe."""
    root = write_folder(tmp_path / "data", classes)
    d = data.load("folder", root)
    assert d.train.shape == (5, 3, 32, 32) and d.train_labels is None and d.classes == ()
    assert_colours(d.train, [0] * 5, range(5))
    out = tmp_path / "run"
    train.main(["--dataset", "folder", "--data-dir", str(root), "--out", str(out), *TINY, "--rl",
                "--image-size", "16", "--epochs", "2", "--eval-every", "1"])  # fmt: skip
    text = capsys.readouterr().out
    assert "5 training and 3 test images of 3x16x16, no classes" in text and "bpd" in text
    assert json.loads((out / "eval.json").read_text())["probe"] == {}
    assert set(metrics_of(out)[0]["test"]) == {"kl", "elbo"}
    evaluate.main([str(out), "--json"])
    assert json.loads(capsys.readouterr().out)["probe"] == {}


def test_images_are_the_middle_square_resized(tmp_path):
    """Against Pillow, crop and resize apart, and no step for what has the size already."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    sizes = [(32, 32), (80, 48), (33, 71)]
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
    for i, p in enumerate(pictures):
        p.save(tmp_path / "train" / f"{i}.png")
    pictures[0].save(tmp_path / "test" / "0.png")
    found = data.load("folder", tmp_path).train.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found[0], np.asarray(pictures[0]))
    for i, (w, h) in enumerate(sizes[1:], start=1):
        side = min(w, h)
        left, top = (w - side) // 2, (h - side) // 2
        cut = pictures[i].crop((left, top, left + side, top + side))
        by_pillow = np.asarray(cut.resize((32, 32), PIL.Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(found[i] - by_pillow)[2:-2, 2:-2].max() <= 1


def test_decoding_happens_once_and_again_when_the_source_changes(tmp_path, monkeypatch):
    base, calls = write_tinyimagenet(tmp_path), []
    whole = files.decode

    def decode(*args):
        calls.append(args)
        return whole(*args)

    monkeypatch.setattr(files, "decode", decode)

    def load() -> tuple[int, data.Data]:
        before = len(calls)
        found = data.load("tinyimagenet", tmp_path)
        return len(calls) - before, found

    assert load()[0] == 2  # both splits
    count, first = load()
    assert count == 0
    image = base / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    picture(2, 9).save(image, quality=95)  # another image in its place
    count, found = load()
    assert count == 1 and (found.train[8, 1].float().mean() - 8) / 24 > 8.5
    assert (first.train[8, 1].float().mean() - 8) / 24 < 0.5  # an open map keeps what it had
    picture(2, 5).save(image.with_name(f"{WNIDS[0]}_7.JPEG"), quality=95)  # one more
    count, found = load()
    assert count == 1 and len(found.train) == 13 and len(found.train_labels) == 13
    kept = tmp_path / "decoded" / "tinyimagenet-train.npy"
    kept.write_bytes(kept.read_bytes()[:-1])  # damaged: truncated
    assert load()[0] == 1
    kept.with_suffix(".source").unlink()  # killed before the mark was set
    assert load()[0] == 1 and load()[0] == 0
    assert not list(kept.parent.glob("*.tmp"))
    found.train[0] = 0  # copy on write: never reaches the file
    assert load()[1].train[0].max() > 0


def test_decoding_that_is_killed_or_finds_no_room_leaves_nothing_half(tmp_path, capsys):
    write_tinyimagenet(tmp_path, per_class=2)
    script = textwrap.dedent("""
        import os, signal, sys
        import data, files
        whole = files.decode
        def decode(*args):
            if any("train" in name for name in args[1]) and args[1][0].endswith("_1.JPEG"):
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args)
        files.decode, files.BLOCK = decode, 1
        data.load("tinyimagenet", sys.argv[1])
    """)
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=HERE, check=False)
    assert killed.returncode == -signal.SIGKILL
    kept = tmp_path / "decoded"
    assert not list(kept.glob("*.npy")) and list(kept.glob("*.tmp"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        argv = ["--dataset", "tinyimagenet", "--data-dir", str(tmp_path)]
        fails(capsys, [*argv, "--out", str(tmp_path / "run")], "cannot write .*train.npy.*room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(kept.glob("*.npy")) and not list(kept.glob("*.tmp"))
    d = data.load("tinyimagenet", tmp_path)
    assert_colours(d.test, d.test_labels)


def test_decoding_in_several_processes_keeps_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 2)  # 30 images are more than eight blocks
    write_tinyimagenet(tmp_path, per_class=10)
    d = data.load("tinyimagenet", tmp_path)
    colour = torch.tensor([i for i in range(30) if i % 10 != 1])
    assert_colours(d.train[colour], d.train_labels[colour], [i % 10 for i in colour.tolist()])
    damaged_image(next(tmp_path.rglob(f"{WNIDS[0]}_3.JPEG")))
    with pytest.raises(files.UserError, match=f"{WNIDS[0]}_3.JPEG is not a whole image"):
        data.load("tinyimagenet", tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def resident() -> int:
    """Bytes of files that this process holds in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_a_memory_map_does_not_fill_the_memory(tmp_path):
    """100 MB are read whole, at random and in order; a few of them stay."""
    shape, device = (2000, 3, 128, 128), torch.device("cpu")
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, (100, *shape[1:]), np.uint8) for _ in range(20)]
    files.cached(tmp_path / "x.npy", shape, "1", lambda: iter(blocks))
    images = files.cached(tmp_path / "x.npy", shape, "1", pytest.fail)
    before = resident()
    sums = torch.zeros(3, dtype=torch.long)
    for rows in data.shuffled(images, 100, seed=0, epoch=0):
        sums += data.take(images, rows, device).sum(dim=(0, 2, 3))
    assert resident() - before < 20e6
    for _, batch in data.in_order(images, device):
        sums -= batch.sum(dim=(0, 2, 3))
    assert resident() - before < 20e6 and sums.tolist() == [0, 0, 0]
    assert images.sum() == sum(int(b.sum()) for b in blocks)
    assert resident() - before > 80e6  # without `take` all of it stays


def damaged_image(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def break_zip(root: Path, how: str) -> None:
    archive = pack(write_tinyimagenet(root))
    raw = archive.read_bytes()
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "damaged":
        middle = raw.rindex(b"JFIF") + 300  # of an image of val/
        raw = raw[:middle] + bytes(50) + raw[middle + 50 :]
    archive.write_bytes(raw if how != "html" else b"<html>404</html>")


def tiny_file(root: Path, name: str) -> Path:
    return write_tinyimagenet(root) / name


def drop_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


TINYIMAGENET_MISTAKES = {
    "absent": (lambda root: None, "could not be downloaded.*put tiny-imagenet-200.zip.*digits"),
    "no wnids": (lambda r: tiny_file(r, "wnids.txt").unlink(), "lacks wnids.txt"),
    "no class": (lambda r: shutil.rmtree(tiny_file(r, f"train/{WNIDS[1]}")),
                 f"no training images of {WNIDS[1]} \\(1 classes\\)"),
    "no annotations": (lambda r: tiny_file(r, "val/val_annotations.txt").unlink(),
                       "val/val_annotations.txt cannot be read"),
    "fewer annotations": (lambda r: drop_line(tiny_file(r, "val/val_annotations.txt")),
                          "differ in val/images/val_11.JPEG \\(1 in all\\)"),
    "other annotations": (lambda r: tiny_file(r, "val/val_annotations.txt").write_text("<html>"),
                          "names no class: '<html>'"),
    "no val image": (lambda r: tiny_file(r, "val/images/val_3.JPEG").unlink(),
                     "differ in val/images/val_3.JPEG"),
    "truncated image": (lambda r: damaged_image(tiny_file(r, "val/images/val_3.JPEG")),
                        "val/images/val_3.JPEG is not a whole image"),
    "no image": (lambda r: tiny_file(r, f"train/{WNIDS[0]}/images/{WNIDS[0]}_2.JPEG")
                 .write_text("<html>"), f"{WNIDS[0]}_2.JPEG is not a whole image"),
    "truncated zip": (lambda r: break_zip(r, "truncated"), "zip cannot be read"),
    "damaged zip": (lambda r: break_zip(r, "damaged"), "is not a whole image.*get it again"),
    "no zip": (lambda r: break_zip(r, "html"), "zip cannot be read.*get it again"),
}  # fmt: skip


@pytest.mark.parametrize("how", TINYIMAGENET_MISTAKES)
def test_broken_tinyimagenet_gives_one_line(tmp_path, offline, capsys, how):
    spoil, words = TINYIMAGENET_MISTAKES[how]
    spoil(tmp_path)
    line = fails(capsys, ["--dataset", "tinyimagenet", "--data-dir", str(tmp_path),
                          "--out", str(tmp_path / "run")], words)  # fmt: skip
    assert str(tmp_path) in line and not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.tmp"))


CELEBA_MISTAKES = {
    "absent": (lambda base: shutil.rmtree(base),
               "could not be downloaded.*lacks list_eval_partition.txt and img_align_celeba.*put "
               "img_align_celeba.zip"),
    "no list": (lambda base: (base / "list_eval_partition.txt").unlink(),
                "celeba lacks list_eval_partition.txt"),
    "no images": (lambda base: shutil.rmtree(base / "img_align_celeba"),
                  "celeba lacks img_align_celeba"),
    "empty list": (lambda base: (base / "list_eval_partition.txt").write_text(""),
                   "names no images of split 0"),
    "one image less": (lambda base: (base / "img_align_celeba/000005.jpg").unlink(),
                       "lacks 000005.jpg and 0 more images"),
    "truncated image": (lambda base: damaged_image(base / "img_align_celeba/000002.jpg"),
                        "000002.jpg is not a whole image"),
}  # fmt: skip


@pytest.mark.parametrize("how", CELEBA_MISTAKES)
def test_broken_celeba_gives_one_line(tmp_path, offline, capsys, how):
    spoil, words = CELEBA_MISTAKES[how]
    spoil(write_celeba(tmp_path))
    fails(capsys, ["--dataset", "celeba", "--data-dir", str(tmp_path)], words)


FOLDER_MISTAKES = {
    "absent": (lambda root: shutil.rmtree(root), "has no folder train/.*train/ and test/ below"),
    "no test": (lambda root: shutil.rmtree(root / "test"), "has no folder test/"),
    "empty": (lambda root: [shutil.rmtree(root / "test" / c) for c in "ab"], "test has no images"),
    "stray": (lambda root: picture(0, 0).save(root / "train/x.png"), "beside the class folders"),
    "new class": (lambda root: (root / "test/b").rename(root / "test/c"), "has the class 'c'"),
    "flat test": (lambda root: picture(0, 0).save(root / "test/x.png"),
                  "test has images outside the class folders"),
    "truncated": (lambda root: damaged_image(root / "train/a/1.jpg"), "a/1.jpg is not a whole"),
    "text": (lambda root: (root / "train/b/0.png").write_text("x"), "b/0.png is not a whole image"),
}  # fmt: skip


@pytest.mark.parametrize("how", FOLDER_MISTAKES)
def test_broken_folder_gives_one_line(tmp_path, capsys, how):
    spoil, words = FOLDER_MISTAKES[how]
    spoil(write_folder(tmp_path / "data"))
    fails(capsys, ["--dataset", "folder", "--data-dir", str(tmp_path / "data")], words)


CIFAR_MISTAKES = {
    "absent": (lambda folder: shutil.rmtree(folder), "could not be downloaded.*put cifar-10"),
    "missing": (lambda folder: next(folder.glob("*t*")).unlink(), "cifar-10.* lacks "),
    "truncated": (lambda folder: [p.write_bytes(p.read_bytes()[:-9]) for p in folder.glob("test*")],
                  "holds damaged files .test"),
}  # fmt: skip


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("how", CIFAR_MISTAKES)
def test_broken_cifar_gives_one_line(write_cifar, tmp_path, capsys, name, how):
    spoil, words = CIFAR_MISTAKES[how]
    spoil(write_cifar(name))
    fails(capsys, ["--dataset", name, "--data-dir", str(tmp_path)], words)
    with pytest.raises(files.UserError, match=f"no {name}: .*Ways to get it"):
        data.load(name, tmp_path, download=False)


STL10_MISTAKES = {
    "absent": (lambda folder: shutil.rmtree(folder), "could not be downloaded.*stl10_binary"),
    "missing": (lambda folder: (folder / "test_y.bin").unlink(), "stl10_binary lacks test_y.bin"),
    "truncated": (lambda folder: (folder / "train_X.bin").write_bytes(bytes(27648 * 5 + 7)),
                  r"holds damaged files \(train_X.bin\): delete"),
}  # fmt: skip


@pytest.mark.parametrize("how", STL10_MISTAKES)
def test_broken_stl10_gives_one_line(write_stl10, tmp_path, capsys, how):
    spoil, words = STL10_MISTAKES[how]
    spoil(write_stl10())
    fails(capsys, ["--dataset", "stl10", "--data-dir", str(tmp_path)], words)


def test_fewer_labels_than_images_of_stl10(write_stl10, tmp_path):
    folder = write_stl10()
    data.load("stl10", tmp_path)
    np.uint8([1, 2]).tofile(folder / "train_y.bin")
    with pytest.raises(files.UserError, match="has 2 labels for 6 images"):
        data.load("stl10", tmp_path)


def test_data_stay_where_they_are_told_to(tmp_path):
    d = data.load("folder", write_folder(tmp_path))
    cpu = torch.device("cpu")
    for mode in ("auto", "off"):
        assert data.place(d, cpu, mode) is d
    inside = data.place(d, cpu, "on")
    assert inside.train.data_ptr() != d.train.data_ptr()
    assert torch.equal(inside.train, d.train) and inside.train_labels is d.train_labels


def test_flags_of_data_sets():
    assert settings.defaults({"size": "paper", "dataset": "tinyimagenet"})["batch_size"] == 64
    assert settings.defaults({"size": "paper", "dataset": "cifar10"})["batch_size"] == 128
    assert settings.defaults({"size": "paper", "dataset": "tinyimagenet", "batch_size": 8})[
        "batch_size"] == 8  # fmt: skip
    for name in data.DATASETS:
        config = settings.defaults({"dataset": name})
        assert settings.network(config).image == data.SHAPES[name]
        assert settings.network(config).latents[0] == ("8c" if data.SHAPES[name][0] == 1 else "16c")


def test_digits():
    from sklearn.datasets import load_digits

    d = data.load("digits")
    assert d.train.shape == (1437, 1, 28, 28) and d.test.shape == (360, 1, 28, 28)
    assert d.train.dtype == torch.uint8 and d.train.max() > 250
    # Averaged back to 8x8 every image is one of the originals with its label, each once.
    small = torch.nn.functional.interpolate(
        torch.cat([d.train, d.test]).float(), size=(8, 8), mode="bilinear"
    ).flatten(1)
    original, labels = load_digits(return_X_y=True)
    nearest = torch.cdist(small, torch.from_numpy(original).float() * 255 / 16).argmin(dim=1)
    assert len(set(nearest.tolist())) >= 1790
    found = torch.cat([d.train_labels, d.test_labels])
    assert (found == torch.from_numpy(labels)[nearest]).float().mean() > 0.995
    assert torch.bincount(d.test_labels).min() >= 34  # stratified


def real_folder(name: str) -> str:
    """DATA_DIR where it has the data set, Debian's for FashionMNIST; skips where there is none."""
    folder = os.environ.get("DATA_DIR", "")
    if folder and any((Path(folder) / name / sub).is_dir() for sub in ("raw", ".")):
        return folder
    if name == "FashionMNIST" and not data._missing(data.DEBIAN_FASHION):
        return "nowhere"
    return pytest.skip(f"no {name}: name its folder in DATA_DIR")


def test_real_fashionmnist():
    d = data.load("fashionmnist", real_folder("FashionMNIST"), download=False)
    assert d.train.shape == (60_000, 1, 28, 28) and d.test.shape == (10_000, 1, 28, 28)
    assert torch.bincount(d.train_labels).tolist() == [6000] * 10
    assert torch.bincount(d.test_labels).tolist() == [1000] * 10
    # The mean and deviation that the data set is known by.
    assert d.train.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert d.train.float().std().item() / 255 == pytest.approx(0.3530, abs=1e-4)
    trousers = d.train[d.train_labels == 1].float().mean(dim=(0, 1))
    assert trousers[14:, :5].max() < 20 < 100 < trousers[14:, 10:18].mean()


def test_real_mnist_is_what_torchvision_reads():
    folder = real_folder("MNIST")
    d = data.load("mnist", folder, download=False)
    for is_train, pictures, labels in [
        (True, d.train, d.train_labels),
        (False, d.test, d.test_labels),
    ]:
        reference = torchvision.datasets.MNIST(folder, train=is_train, download=False)
        assert torch.equal(pictures.squeeze(1), reference.data)
        assert torch.equal(labels, reference.targets)


def test_real_cifar10():
    d = data.load("cifar10", real_folder("cifar-10-batches-py"), download=False)
    assert d.train.shape == (50_000, 3, 32, 32) and d.test.shape == (10_000, 3, 32, 32)
    assert torch.bincount(d.train_labels).tolist() == [5000] * 10
    assert torch.bincount(d.test_labels).tolist() == [1000] * 10
    assert d.classes[0] == "airplane" and d.classes[9] == "truck"
    # The mean and deviation of each channel that the data set is known by.
    for channel, (mean, std) in enumerate([(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]):
        values = d.train[:, channel].float() / 255
        assert values.mean().item() == pytest.approx(mean, abs=1e-4)
        assert values.std().item() == pytest.approx(std, abs=1e-4)
    planes = d.train[d.train_labels == 0].float().mean(dim=(0, 2, 3))  # the sky is blue
    assert planes[2] > planes[1] > planes[0]


def test_batches():
    pictures = torch.zeros(103, 1, 2, 2, dtype=torch.uint8)
    first, again = (data.shuffled(pictures, 10, seed=1, epoch=4) for _ in range(2))
    assert [len(b) for b in first] == [10] * 10 + [3]
    assert sorted(torch.cat(first).tolist()) == list(range(103))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, epoch in [(1, 5), (2, 4)]:
        assert not torch.equal(first[0], data.shuffled(pictures, 10, seed, epoch)[0])
    cpu = torch.device("cpu")
    parts = list(data.in_order(torch.arange(1100).view(1100, 1), cpu, pixels=500))
    assert [(start, len(p)) for start, p in parts] == [(0, 500), (500, 500), (1000, 100)]
    assert torch.cat([p for _, p in parts]).flatten().tolist() == list(range(1100))
    assert len(next(data.in_order(torch.zeros(600, 1, 28, 28), cpu))[1]) == 512
    shares = [list(data.in_order(torch.arange(1100), cpu, 500, first, 2)) for first in (0, 1)]
    assert [[start for start, _ in share] for share in shares] == [[0, 1000], [500]]
    assert torch.cat([p for share in shares for _, p in share]).sum() == 1100 * 1099 / 2


def test_binarisation_has_the_pixels_as_its_mean():
    grey = torch.tensor([0, 1, 64, 128, 254, 255], dtype=torch.uint8)
    x = data.binarize(grey.expand(200_000, 6))
    assert set(x.unique().tolist()) == {0, 1} and x.dtype == torch.float32
    assert x[:, 0].sum() == 0 and x[:, 5].min() == 1
    torch.testing.assert_close(x.mean(dim=0), grey / 255, rtol=0, atol=0.005)


def test_devices():
    assert data.pick_device("cpu").type == "cpu"
    assert data.pick_device("auto").type in ("cpu", "cuda")
    assert data.pick_dtype("float32", torch.device("cpu")) == torch.float32
    assert data.pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# train.py

TINY = ["--latents", "4,2", "--channels", "4", "--seed", "3", "--dtype", "float32"]


@pytest.fixture
def few(monkeypatch):
    """The digits, but only some of them, so that an epoch takes a moment."""
    d = data.load("digits")
    d = data.Data(d.train[:300], d.train_labels[:300], d.test[:60], d.test_labels[:60], d.classes)
    monkeypatch.setattr(evaluate, "load", lambda *a, **k: d)
    return d


def fails(capsys, argv: list[str], words: str, main=train.main) -> str:
    """The command ends in one line of standard error that matches, and with status 2."""
    import re

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "batch/s" not in line
             and "?batch" not in line and line.strip()]  # fmt: skip
    assert len(lines) == 1, lines
    assert re.search(words, lines[0]), lines[0]
    return lines[0]


def state_of(folder) -> dict:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def metrics_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(a, b) -> None:
    """Bit for bit the same parameters, optimiser, random state, sums and metrics."""
    one, two = state_of(a), state_of(b)
    for key in ("model", "ema", "optimizers", "rng", "sums", "epoch", "batch", "update"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    assert metrics_of(a) == metrics_of(b)


@pytest.mark.parametrize(
    "objective",
    [
        [],
        ["--rl", "--update", "stepwise"],
        ["--rl", "--update", "joint"],
        ["--rl", "--update", "sampled", "--skip", "sample"],
        ["--ivae", "--schedule", "cosine", "--ema", "0.9"],
        ["--arch", "aae", "--latents", "4", "--schedule", "cosine"],
    ],
)
def test_resume_equals_uninterrupted(few, tmp_path, monkeypatch, capsys, objective):
    """Stopped in the middle of an epoch, at an epoch's end, and after the last epoch."""
    flags = [*TINY, "--epochs", "3", "--batch-size", "64", "--eval-every", "2", "--warmup", "2"]
    flags += objective
    train.main([*flags, "--out", str(tmp_path / "whole")])
    for at, stop_signal in [(3, signal.SIGINT), (7, signal.SIGTERM), (10, signal.SIGINT)]:
        out = str(tmp_path / f"parts{at}")
        calls = itertools.count(1)

        def observed(x, at=at, calls=calls, number=stop_signal):
            if next(calls) == at:
                signal.raise_signal(number)
            return data.observed(x)

        with monkeypatch.context() as patch:
            patch.setattr(train, "observed", observed)
            with pytest.raises(SystemExit) as stop:
                train.main([*flags, "--out", out])
        assert stop.value.code == 128 + stop_signal
        assert state_of(out)["epoch"] * 5 + state_of(out)["batch"] == at
        assert "--resume" in capsys.readouterr().out and not Path(out, "eval.json").exists()
        train.main(["--resume", out])
        assert_same_run(tmp_path / "whole", out)
        assert Path(out, "eval.json").exists()
    if "cosine" in objective:  # whose learning rate depends on how long the run is to be
        return
    # Fewer epochs first, then more of them, is the same run as well.
    out = str(tmp_path / "more")
    train.main([*flags, "--epochs", "1", "--out", out])
    train.main([*flags, "--epochs", "3", "--out", out, "--resume"])
    assert_same_run(tmp_path / "whole", out)


def test_killed_while_writing_a_checkpoint(few, tmp_path):
    """kill -9 in the middle of a write, and of a metrics line: the run goes on from what was."""
    script = textwrap.dedent("""
        import os, signal, sys
        import torch, data, evaluate, train
        d = data.load("digits")
        few = data.Data(d.train[:300], d.train_labels[:300], d.test[:60], d.test_labels[:60], ())
        evaluate.load = lambda *a, **k: few
        whole_save, saves = torch.save, [0]
        def save(state, file):
            saves[0] += 1
            if saves[0] == int(sys.argv[1]):
                file.write(b"half of a checkpoint")
                file.flush()
                with open(state["config"]["out"] + "/metrics.jsonl", "a") as metrics:
                    metrics.write('{"epoch": ')
                os.kill(os.getpid(), signal.SIGKILL)
            whole_save(state, file)
        torch.save = save
        train.main(sys.argv[2:])
    """)
    flags = [*TINY, "--rl", "--epochs", "3", "--batch-size", "64", "--save-every", "0"]
    out = str(tmp_path / "killed")
    killed = subprocess.run([sys.executable, "-c", script, "9", *flags, "--out", out], cwd=HERE,
                            capture_output=True, check=False)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert state_of(out)["update"] == 7  # the eighth update's was being written
    train.main([*flags, "--out", out, "--resume"])
    train.main([*flags, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", out)


def test_a_loss_that_is_not_finite_stops_the_run(few, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*TINY, "--out", str(out), "--lr", "1e18", "--epochs", "9", "--save-every", "0"]
    fails(capsys, flags, r"(loss is|parameter is).* at epoch \d+, update \d+: try a lower --lr")
    assert all(v.isfinite().all() for v in state_of(out)["model"].values())


def test_a_full_disk_keeps_what_was_written(few, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1"])
    before = (out / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a write past 10 kB fails
    try:
        fails(capsys, ["--resume", str(out), "--epochs", "2"], "cannot write .*checkpoint.pt.*kept")
        fails(capsys, [*TINY, "--out", str(tmp_path / "new")], "cannot write .*checkpoint.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / "checkpoint.pt").read_bytes() == before
    assert [p.name for p in out.iterdir() if p.suffix == ".tmp"] == []
    train.main(["--resume", str(out), "--epochs", "2"])
    assert state_of(out)["epoch"] == 2


def test_a_run_end_to_end(few, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*TINY, "--arch", "hvae", "--rl", "--epochs", "2", "--eval-every", "1"]
    train.main([*argv, "--out", str(out)])
    text = capsys.readouterr().out
    for words in ("hvae, small, levels 4,2", "Q-value, gamma 0.9, sampled", "300 training",
                  "cpu", "--size paper", str(out), "z2", "bpd"):  # fmt: skip
        assert words in text
    lines = metrics_of(out)
    assert [line["epoch"] for line in lines] == [1, 2] and len(lines[0]["kl"]) == 2
    assert set(lines[0]["test"]) == {"probe", "kl", "elbo"}
    config = json.loads((out / "config.json").read_text())
    assert config["rl"] and config["latents"] == "4,2" and config["epochs"] == 2

    evaluate.main([str(out), "--json", "--out", str(tmp_path / "e.json"), "--samples", "4"])
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "e.json").read_text())
    assert (shown["arch"], shown["rl"], shown["dataset"]) == ("hvae", True, "digits")
    assert set(shown["probe"]) == {"z1", "z2", "all"} and shown["mine"] == {}
    for key in ("kl", "active_units", "log_px_given_z"):
        assert len(shown[key]) == 2
    assert shown["bpd"] == pytest.approx(-shown["elbo"] / 784 / math.log(2))
    saved = json.loads((out / "eval.json").read_text())
    assert saved["probe"] == shown["probe"] and saved["elbo"] == pytest.approx(shown["elbo"])
    evaluate.main([str(out), "--mine", "--mine-levels", "1"])
    assert "≤ 4.09" in capsys.readouterr().out  # ln 60 test images

    fails(capsys, [*argv, "--out", str(out)], "holds a run already: --resume.*--overwrite.*--out")
    train.main([*argv, "--out", str(out), "--overwrite", "--epochs", "1"])
    assert len(metrics_of(out)) == 1 and state_of(out)["epoch"] == 1
    train.main(["--resume", str(out)])  # nothing left to do: it shows the evaluation
    assert "z2" in capsys.readouterr().out


def test_settings_of_the_paper():
    rl = settings.defaults({"size": "paper", "rl": True})
    assert (rl["lr"], rl["batch_size"], rl["epochs"], rl["update"]) == (3e-4, 128, 200, "stepwise")
    assert rl["warmup"] == 0 and rl["free_bits"] == 0
    baseline = settings.defaults({"size": "paper"})
    assert (baseline["epochs"], baseline["warmup"]) == (1000, 200)
    assert (baseline["free_bits"], baseline["free_bits_epochs"]) == (2.0, 400)
    assert settings.defaults({"size": "paper", "rl": True, "levels": 2})["epochs"] == 500
    assert settings.defaults({"size": "paper", "warmup": 7, "lr": 0.1})["warmup"] == 7
    assert train.kl_terms(baseline, 50.0) == {"beta": 0.25, "free_bits": 2.0}
    assert train.kl_terms(baseline, 400.0) == {"beta": 1.0, "free_bits": 0.0}
    assert settings.defaults({"arch": "hvae", "rl": True})["out"] == "runs/digits-hvae-rl-0"
    assert settings.defaults({"arch": "hvae", "ivae": True})["out"] == "runs/digits-hvae-ivae-0"
    # C.3: warm-up and free bits for what has no other help at its upper levels.
    for arch, ivae, warmup, free_bits in (
        ("hvae", False, 200, 2.0), ("lvae", False, 200, 2.0), ("biva", False, 200, 2.0),
        ("hvae", True, 0, 0.0), ("lvae", True, 0, 0.0), ("vae", False, 0, 0.0),
        ("aae", False, 0, 0.0),
    ):  # fmt: skip
        c = settings.defaults({"size": "paper", "arch": arch, "ivae": ivae})
        assert (c["epochs"], c["warmup"], c["free_bits"]) == (1000, warmup, free_bits)
    assert settings.defaults({"size": "paper", "ivae": True})["update"] == "joint"
    best = settings.defaults({"size": "best", "rl": True, "dataset": "mnist", "ema": 0.5})
    assert (best["epochs"], best["schedule"], best["ema"]) == (40, "cosine", 0.5)
    fashion = {"dataset": "fashionmnist"}  # the small preset warms up where the top is at risk
    for flags, warmup in (
        ({"rl": True}, 20), ({"rl": True, "dataset": "cifar10"}, 5), ({"rl": True} | fashion, 10),
        ({"rl": True, "arch": "hvae"} | fashion, 10), ({"ivae": True} | fashion, 10),
        ({"arch": "hvae"} | fashion, 0), ({}, 0), ({"rl": True, "minutes": 3.0} | fashion, 10),
        ({"rl": True, "epochs": 5} | fashion, 2), ({"rl": True, "epochs": 1} | fashion, 1),
        ({"rl": True, "epochs": 5, "warmup": 9} | fashion, 9),
        ({"rl": True, "size": "best"} | fashion, 20), ({"size": "best"} | fashion, 0),
        ({"rl": True, "size": "best", "epochs": 6} | fashion, 3),
    ):  # fmt: skip
        assert settings.defaults(flags)["warmup"] == warmup


def test_stepwise_makes_one_update_a_level():
    config = settings.defaults({"rl": True, "update": "stepwise"})
    steps = train.objectives(config, 5)
    assert [s.keywords["step"] for s in steps] == [0, 1, 2, 3, 4]
    assert all(s.func is rewards.stepwise_loss and s.keywords["gamma"] == 0.9 for s in steps)
    assert train.objectives(settings.defaults({}), 5) == [rewards.elbo_loss]
    (ivae,) = train.objectives(settings.defaults({"ivae": True, "skip": "sample"}), 5)
    assert ivae.func is rewards.ivae_loss
    assert ivae.keywords == {"skip": "sample", "sampled": True}
    (ivae,) = train.objectives(settings.defaults({"ivae": True, "update": "joint"}), 5)
    assert not ivae.keywords["sampled"]


def test_a_run_of_some_minutes_ends_with_the_nearest_epoch(few, tmp_path, capsys):
    config = {"epochs": 9, "minutes": 2}
    for epoch, seconds, expected in [(1, 79, False), (1, 81, True), (4, 106, False), (4, 107, True),
                                     (9, 1, True), (8, 1, False)]:  # fmt: skip
        assert evaluate.ended(config, epoch, 0, seconds) == expected, (epoch, seconds)
    assert not evaluate.ended(config, 9, 3, 1e9)  # in the middle of an epoch
    assert not evaluate.ended({"epochs": 9}, 8, 0, 1e9)  # of before there were minutes
    out = str(tmp_path / "run")
    train.main([*TINY, "--minutes", "1e-6", "--batch-size", "64", "--out", out])
    assert state_of(out)["epoch"] == 1 and "1e-06 minutes" in capsys.readouterr().out
    train.main(["--resume", out, "--minutes", "1", "--epochs", "3"])
    assert state_of(out)["epoch"] == 3
    Path(out, "eval.json").unlink()
    evaluate.main([out, "--table"])
    assert "LVAE" in capsys.readouterr().out


def test_the_learning_rate_falls_to_nothing():
    config = {"schedule": "cosine", "epochs": 4, "minutes": None}
    falls = [train.rate_factor(config, epoch, part, 0) for epoch in range(4) for part in (0, 0.5)]
    assert falls == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)])
    assert train.rate_factor(config, 4, 0, 0) == 0
    timed = config | {"epochs": 10**6, "minutes": 1}
    for epoch, part, seconds, done in [(0, 0.9, 0, 0), (1, 0.5, 20, 0.5), (2, 0, 40, 2 / 3),
                                       (5, 0.5, 60, 1)]:  # fmt: skip
        expected = 0.5 + 0.5 * math.cos(math.pi * done)
        assert train.rate_factor(timed, epoch, part, seconds) == pytest.approx(expected, abs=1e-4)
    assert train.rate_factor({"schedule": "constant"}, 3, 0.5, 9) == 1


def test_the_moving_average_is_what_is_measured(few, tmp_path, monkeypatch):
    """Against the average made by hand of the weights after every update."""
    out, seen, descend = str(tmp_path), [], train.descend

    def watched(run, *args):
        means = descend(run, *args)
        seen.append({k: v.clone() for k, v in run.model.state_dict().items()})
        return means

    monkeypatch.setattr(train, "descend", watched)
    train.main([*TINY, "--ema", "0.7", "--epochs", "2", "--batch-size", "64", "--out", out])
    average = seen[0]
    for weights in seen[1:]:
        average = {k: 0.7 * a + 0.3 * weights[k] for k, a in average.items()}
    model = evaluate.restore_model(evaluate.load_checkpoint(tmp_path))
    torch.testing.assert_close(dict(model.state_dict()), average)
    torch.testing.assert_close(dict(state_of(out)["model"]), seen[-1], rtol=0, atol=0)
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["kl"] == pytest.approx(evaluate.densities(model, few.test)["kl"], rel=1e-6)


TRAIN_MISTAKES = [
    (["--arch", "gan"], "invalid choice: 'gan'"),
    (["--gamma", "1.5"], "gamma 1.5: a discount lies from 0 to 1"),
    (["--gamma", "nan"], "gamma nan"),
    (["--levels", "0"], "0 levels: a hierarchy has 1 to 10"),
    (["--levels", "11"], "11 levels"),
    (["--levels", "-3"], "levels"),
    (["--arch", "vae", "--levels", "3"], "vae has one level, not 3"),
    (["--arch", "aae", "--latents", "8,4"], "aae has one level, not 2"),
    (["--rl", "--ivae"], "two objectives: choose one"),
    (["--rl", "--arch", "biva"], "--rl is not defined for biva, .*: use --arch hvae or lvae"),
    (["--rl", "--arch", "aae"], "--rl is not defined for aae, .*: use --arch hvae or lvae"),
    (["--ivae", "--arch", "biva"], "--ivae is not defined for biva"),
    (["--ivae", "--update", "stepwise"], "stepwise is for --rl: --ivae takes joint or sampled"),
    (["--latents", "8x,4"], "latent '8x' is not understood"),
    (["--latents", "8,0"], "latent '0'"),
    (["--latents", "8,4", "--levels", "3"], "name 2 levels, not 3"),
    (["--channels", "0"], "0 channels"),
    (["--epochs", "0"], "--epochs 0: must be above 0"),
    (["--epochs", "many"], "invalid int value"),
    (["--batch-size", "-1"], "--batch-size -1"),
    (["--lr", "inf"], "--lr inf"),
    (["--minutes", "0"], "--minutes 0.0: must be above 0"),
    (["--ema", "1"], "--ema 1.0: a decay lies from 0 to below 1"),
    (["--accumulate", "0"], "--accumulate 0: must be above 0"),
    (["--train-images", "0"], "--train-images 0: must be above 0"),
    (["--warmup", "-1"], "--warmup -1: must not be negative"),
    (["--free-bits", "-0.5"], "--free-bits -0.5"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", "9" * 30], "must be below 2\\^32"),
    (["--channels", "9999999999"], "out of memory: lower --batch-size"),
    (["--latents", "9" * 14], "out of memory"),
    (["--device", "tpu"], "unknown device 'tpu': choose auto, cpu, cuda or cuda:N"),
    (["--device", "cuda:x"], "unknown device"),
    (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    (["--dataset", "cifar10", "--image-size", "64"], "--image-size is for --dataset folder"),
    (["--dataset", "folder", "--image-size", "4"], "--image-size 4: choose from 8 to 1024"),
    (["--dataset", "folder", "--image-size", "50"], "squares whose side is a multiple of 4"),
    (["--unlabelled"], "--unlabelled is for --dataset stl10"),
    (["--arch", "hvae", "--mean-field"], "--mean-field is for lvae, whose merge it leaves out"),
    (["--dataset", "cifar10", "--threshold"], "--threshold is for grey images: those of cifar10"),
    (["--device-data", "maybe"], "invalid choice: 'maybe'"),
    (["--update", "all"], "invalid choice: 'all'"),
    (["--colour"], "unrecognized arguments"),
    (["--resume"], "no run at .*: name a folder"),
    (["--resume", "nowhere"], "no run at nowhere"),
    (["--resume", "--overwrite"], "choose one"),
    (["--resume", "here", "--out", "there"], "name two runs"),
]  # fmt: skip


@pytest.mark.parametrize("argv, words", TRAIN_MISTAKES, ids=lambda v: " ".join(v) if v else "")
def test_mistakes_in_training_give_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(capsys, argv, words)
    assert list(tmp_path.iterdir()) == []


def test_no_accelerator(capsys, tmp_path):
    fails(capsys, ["--device", "cuda", "--out", str(tmp_path)], "no CUDA device here.*--device cpu")


def test_mistakes_with_runs_give_one_line(few, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1"])
    resume = ["--resume", str(out)]
    fails(capsys, [*resume, "--arch", "hvae"], "has --arch lvae, not hvae: leave the flag out")
    fails(capsys, [*resume, "--lr", "0.5"], "has --lr 0.001, not 0.5")
    fails(capsys, [*resume, "--epochs", "-1"], "--epochs -1")
    fails(capsys, ["--resume", str(out / "checkpoint.pt")], "is a file: --resume takes the run")
    (tmp_path / "file").write_text("")
    fails(capsys, [*TINY, "--out", str(tmp_path / "file")], "cannot write .*file")
    fails(capsys, [*TINY, "--out", str(tmp_path / "file" / "run")], "cannot write")

    def evaluation(words, *argv, run=out):
        fails(capsys, [str(run), *argv], words, main=evaluate.main)

    evaluation("no run at", run=tmp_path / "nowhere")
    evaluation("name levels from 1 to 2", "--mine-levels", "3")
    evaluation("name levels", "--mine-levels", "top")
    evaluation("--samples 0", "--samples", "0")
    evaluation("unknown device", "--device", "gpu")
    evaluation("cannot write", "--out", str(tmp_path / "no" / "such.json"))
    checkpoint = out / "checkpoint.pt"
    whole, other = checkpoint.read_bytes(), tmp_path / "other.pt"
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        evaluation("damaged or not a checkpoint")
        fails(capsys, resume, "damaged or not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, other)
    evaluation("not a checkpoint of this version", run=other)
    checkpoint.write_bytes(whole)
    state = state_of(out)
    del state["model"]["stem.weight"]
    torch.save(state, checkpoint)
    evaluation("not one that models.py builds")
    fails(capsys, resume, "does not fit this train.py")


# --------------------------------------------------------------------------------------------------
# tables.py


def write_run(root: Path, name: str, flags: dict, probe: float = 50.0, mine_nats=None) -> Path:
    """The files of a finished run of five levels (one for vae and aae), numbers made up."""
    folder = root / name
    folder.mkdir()
    config = settings.defaults(flags | {"out": str(folder)})
    levels = config["levels"] or (1 if config["arch"] in ("vae", "aae") else 5)
    top = f"z{levels}"
    evaluation = {
        "probe": {f"z{k + 1}": 80.0 - k for k in range(levels)} | {"all": 85.0, top: probe},
        "kl": [1.0] * (levels - 1) + [probe / 10],
        "elbo": -240.0,
        "iwae": -237.0 - config["seed"],
        "active_units": [8] * (levels - 1) + [4 + config["seed"]],
        "bpd": 0.4 + config["seed"] / 100,
        "mine": {} if mine_nats is None else {top: {"nats": mine_nats, "ceiling": 9.2103}},
    }
    lines = [{"epoch": 1, "seconds": 30.0, "kl": [0.5] * levels, "loss": 3.0},
             {"epoch": 2, "seconds": 61.0, "kl": [1.0] * levels, "loss": 2.0,
              "test": {"probe": probe, "kl": [1.0] * levels, "elbo": -250.0}}]  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FASHION = {"dataset": "fashionmnist"}


def cells(line: str) -> list[str]:
    return [part.strip() for part in line.strip("|").split("|")]


def test_table_of_seeds(tmp_path, capsys):
    """Mean ± standard deviation by hand, the paper's values beside it, one row a configuration."""
    runs = [
        write_run(tmp_path, f"rl{seed}", FASHION | {"rl": True, "seed": seed}, probe, nats)
        for seed, probe, nats in ((0, 70.0, 4.0), (1, 71.0, 5.0), (2, 75.0, 4.5))
    ]
    runs += [write_run(tmp_path, f"elbo{seed}", FASHION | {"arch": "hvae", "seed": seed,
                                                           "gamma": 0.1 * seed}, 10.0)
             for seed in (0, 1)]  # fmt: skip
    runs.append(write_run(tmp_path, "other", FASHION | {"rl": True, "gamma": 0.8}, 60.0))
    runs.append(write_run(tmp_path, "digits", {"arch": "vae"}, 0.0))
    runs += [write_run(tmp_path, f"biva{value}", FASHION | {"arch": "biva", key: value})
             for key, value in (("train_images", 900), ("latents", "9,8,7,6,5"),
                                ("latents", "128,64,32,16,8"))]  # fmt: skip
    evaluate.main([*map(str, runs), "--table", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "**digits**" and "**fashionmnist**" in lines
    head = cells(lines[lines.index("**fashionmnist**") + 2])
    assert head == ["", "seeds", "z_L probe %", "paper", "all levels %", "paper", "MINE nats",
                    "paper", "bpd", "paper", "KL z_L", "paper", "active units of z_L",
                    "training s"]  # fmt: skip
    rows = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
    assert rows["LVAE+RL, gamma 0.9"] == [
        "LVAE+RL, gamma 0.9", "3", "72.00 ± 2.65", "78.48 ± 0.15", "85.00 ± 0.00", "84.77 ± 0.30",
        "4.50 ± 0.50", "4.37 ± 0.58", "0.410 ± 0.010", "0.335 ± 0.072", "7.20 ± 0.26",
        "32.1 ± 0.5", "5.0 ± 1.0", "61 ± 0",
    ]  # fmt: skip
    assert rows["HVAE"][:4] == ["HVAE", "2", "10.00 ± 0.00", "10.73 ± 0.08"]  # gamma has no effect
    assert rows["LVAE+RL, gamma 0.8"][2:6] == ["60.00", "77.98 ± 0.23", "85.00", ""]
    assert rows["VAE"][:3] == ["VAE", "1", "0.00"]  # a mean of 0 is a value
    for label in ("BIVA, 900 images", "BIVA, latents 9,8,7,6,5"):  # the paper has none like these
        assert rows[label][3] == rows[label][9] == ""
    assert rows["BIVA, latents 128,64,32,16,8"][3] == "28.67 ± 0.64"  # those of its text
    assert "MINE cannot exceed 9.21 nats." in lines
    evaluate.main([*map(str, runs), "--table"])
    text = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in text[text.index("fashionmnist") + 1 : -1]}) == 1  # aligned
    evaluate.main([*map(str, runs), "--table", "--json"])
    (row,) = (r for r in json.loads(capsys.readouterr().out) if r["label"] == "LVAE+RL, gamma 0.9")
    assert row["probe"]["values"] == [70.0, 71.0, 75.0] and row["seeds"] == [0, 1, 2]
    assert row["probe"]["mean"] == 72.0 and row["probe"]["std"] == pytest.approx(7**0.5)


def test_columns_of_a_table(tmp_path, capsys):
    """Those asked for, in that order; the KL of each level is a mean over seeds too."""
    runs = [str(write_run(tmp_path, str(s), FASHION | {"rl": True, "seed": s}, 70.0 + s))
            for s in (0, 3)]  # fmt: skip
    command = [*runs, "--table", "--markdown", "--columns"]
    evaluate.main([*command, "kls,elbo,iwae,probe"])
    head, _, row = capsys.readouterr().out.splitlines()[2:]
    assert cells(head) == ["", "seeds", "KL, z_1 … z_L", "ELBO", "IWAE", "z_L probe %",
                           "paper"]  # fmt: skip
    assert cells(row) == ["LVAE+RL", "2", "1.00 1.00 1.00 1.00 7.15", "-240.0 ± 0.0",
                          "-238.5 ± 2.1", "71.50 ± 2.12", "78.48 ± 0.15"]  # fmt: skip
    evaluate.main([*command, "kl, probe"])
    assert cells(capsys.readouterr().out.splitlines()[2])[2:5:2] == ["KL z_L", "z_L probe %"]
    fails(capsys, [*command, "kl,probes"], "--columns 'probes': choose from probe,", evaluate.main)
    fails(capsys, [*command, ""], "--columns '': choose from probe,", evaluate.main)
    fails(capsys, [*runs, "--columns", "kl"], "--columns is for --table", evaluate.main)
    fails(capsys, [*command, "kl", "--json"], "not for --json", evaluate.main)


def test_order_of_rows(tmp_path):
    """Levels before discount, discount before length, length before warm-up, as numbers."""
    rl = FASHION | {"rl": True}
    order = [{"levels": 3}, {"gamma": 0.0}, {"epochs": 9, "warmup": 2}, {"epochs": 9, "warmup": 10},
             {"epochs": 10, "warmup": 1}, {"minutes": 2.0}, {"minutes": 12.0}, {"gamma": 1.0},
             {"levels": 10}]  # fmt: skip
    folders = [write_run(tmp_path, str(i), rl | flags) for i, flags in enumerate(order)]
    runs = [tables.read_run(f, tables.read_json(f / "eval.json", ())) for f in folders]
    assert [g.first.folder for g in tables.groups(runs[::-1])] == folders


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_tables_of_a_page_are_those_of_the_results(page, capsys, monkeypatch):
    """Each command of the page that prints Markdown prints the table right above it."""
    here = Path(__file__).parent
    monkeypatch.chdir(here)
    blocks = (here / page).read_text().split("\n\n")
    commands = 0
    for i, block in enumerate(blocks):
        for command in re.findall(r"`python evaluate.py (results/[^`]*--markdown[^`]*)`", block):
            above = [b for b in blocks[:i] if b.startswith("|")][-1]
            words = [glob.glob(w) if w.startswith("results/") else [w] for w in command.split()]
            assert all(words), f"{command}: no such runs"
            evaluate.main([word for words_of_one in words for word in sorted(words_of_one)])
            printed = capsys.readouterr().out.split("\n\n")
            (table,) = (part.strip() for part in printed if part.startswith("|"))
            assert table == above, f"{command} prints another table:\n{table}"
            commands += 1
    assert commands >= 2


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_of_a_page_lead_somewhere(page):
    """Files are there, and anchors are headings, spelled as GitHub does, or named by hand."""
    path = Path(__file__).parent / page
    links = re.findall(r"\]\((?!https:)([^)]*)\)", path.read_text())
    assert len(links) > 10
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            text = target.read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs | set(re.findall(r'<a name="(.*?)">', text)), link


def test_settings_that_make_a_configuration(tmp_path):
    """--levels 5 is the preset's 5, an older config.json without newer flags is as their default,
    and what only says where a run was computed sets nothing apart."""
    same = (
        write_run(tmp_path, "a", {"rl": True}),
        write_run(
            tmp_path,
            "b",
            {"rl": True, "levels": 5, "seed": 1, "device": "cpu", "data_dir": "there"},
        ),
    )
    older = json.loads((same[1] / "config.json").read_text())
    for key in tables.ADDED:
        del older[key]
    (same[1] / "config.json").write_text(json.dumps(older))
    apart = write_run(tmp_path, "c", {"rl": True, "levels": 3, "skip": "sample", "epochs": 7})

    def read(folder):
        return tables.read_run(folder, tables.read_json(folder / "eval.json", ()))

    three, five = tables.groups([read(f) for f in (*same, apart)])
    assert [run.folder for run in five.runs] == list(same)
    assert five.label == "LVAE+RL, 80 epochs, 5 levels"  # the mean is the usual skip
    assert three.label == "LVAE+RL, skip sample, 7 epochs, 3 levels"
    (alone,) = tables.groups([read(apart)])
    assert alone.label == "LVAE+RL"
    timed = [write_run(tmp_path, f"timed{n}", {"rl": True, "arch": "hvae", "minutes": n, **more})
             for n, more in ((1.5, {"train_images": 900}), (3.0, {"pay": "own"}))]  # fmt: skip
    assert [group.label for group in tables.groups([read(folder) for folder in timed])] == [
        "HVAE+RL, 900 images, 1.5 minutes",
        "HVAE+RL, pay own, 3 minutes",
    ]
    rule = [write_run(tmp_path, f"rule{n}", {"rl": True, "size": "paper", "levels": n})
            for n in (3, 5, 8)]  # fmt: skip
    labels = [label for label, _ in tables.groups([read(folder) for folder in rule])]
    assert labels == ["LVAE+RL, 3 levels", "LVAE+RL, 5 levels", "LVAE+RL, 8 levels"]
    (whatever,) = tables.groups([read(folder) for folder in rule], whatever=("levels",))
    assert whatever.label == "LVAE+RL" and len(whatever.runs) == 3


def test_runs_as_they_were(tmp_path, capsys):
    """--after-epochs and --after-minutes take a look of --eval-every for the run: with it go the
    settings that say how long it went on, unless the learning rate followed them."""
    looks = [(1, 40.0, 60.0), (2, 80.0, 66.0), (4, 160.0, 70.0)]
    flags = {"rl": True, "arch": "hvae", "warmup": 1}
    timed = write_run(tmp_path, "a", FASHION | flags | {"minutes": 3.0}, 71.0)
    counted = write_run(tmp_path, "b", FASHION | flags | {"epochs": 4, "seed": 1}, 73.0)
    joint = write_run(tmp_path, "c", FASHION | flags | {"epochs": 9, "update": "joint"}, 75.0)
    for folder, shift in ((timed, 0.0), (counted, 2.0), (joint, 3.0)):
        lines = [
            {"epoch": epoch, "seconds": seconds, "kl": [1.0] * 5, "loss": 1.0,
             "test": {"probe": probe + shift, "kl": [2.0] * 5, "elbo": -300.0}}
            for epoch, seconds, probe in looks
        ]  # fmt: skip
        del lines[2]["test"]  # as the last line of a run
        (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))

    def rows(*argv):
        evaluate.main([str(timed), str(counted), str(joint), "--table", "--json", *argv])
        return {row["label"]: row for row in json.loads(capsys.readouterr().out)}

    assert set(rows()) == {"HVAE+RL, 3 minutes, update sampled", "HVAE+RL, 9 epochs, update joint",
                           "HVAE+RL, 4 epochs, update sampled"}  # fmt: skip
    for argv, seconds, probe in ((("--after-epochs", "2"), 80.0, 66.0),
                                 (("--after-minutes", "1.3"), 40.0, 60.0),
                                 (("--after-minutes", "2"), 80.0, 66.0)):  # fmt: skip
        found = rows(*argv)
        assert set(found) == {"HVAE+RL, update sampled", "HVAE+RL, update joint"}
        row = found["HVAE+RL, update sampled"]
        assert row["seeds"] == [0, 1] and row["probe"]["values"] == [probe, probe + 2]
        assert row["seconds"]["values"] == [seconds] * 2 and row["kl"]["mean"] == 2.0
        assert row["bpd"]["values"] == pytest.approx([0.4 * 300 / 240, 0.41 * 300 / 240])
        assert row["all"]["mean"] is None
    (joint / "checkpoint.pt").write_text("of its end")  # which no figure may take for the past
    ended = tables.read_run(joint, tables.read_json(joint / "eval.json", ()))
    for run, has_model in ((ended, True), (tables.earlier(ended, epochs=2), False)):
        assert figures.Shown(tables.Group("", [run]), None, None).has_model == has_model
    config = json.loads((timed / "config.json").read_text()) | {"schedule": "cosine"}
    (timed / "config.json").write_text(json.dumps(config))
    assert "HVAE+RL, 3 minutes, schedule cosine, update sampled" in rows("--after-epochs", "2")

    def mistake(words, *argv):
        fails(capsys, [str(timed), *argv], words, main=evaluate.main)

    for argv in (("--after-epochs", "3"), ("--after-epochs", "4"), ("--after-minutes", "0.5")):
        mistake("a did not look at the test split .*: see --eval-every", *argv, "--table")
    mistake("is for --table and --figures", "--after-epochs", "2")
    mistake("is for --table", "--after-epochs", "2", "--after-minutes", "2", "--table")


def test_values_of_the_paper():
    """A few of each table, read off the page again."""
    fmnist, cifar = "fashionmnist", "cifar10"
    assert tables.paper(fmnist, "AAE", 1, 0.9) == {"probe": "72.11±0.27", "mine": "4.08±0.67"}
    assert tables.paper("stl10", "HVAE+RL", 5, 0.9) == {"probe": "43.76±0.15", "mine": "10.93±1.73"}
    assert tables.paper("tinyimagenet", "HVAE", 5, 0.9)["mine"] == "5e-10±0.00"
    assert tables.paper("cifar100", "VAE", 1, 0.9)["mine"] == "13.76±1.85"
    ivae = tables.paper(cifar, "LVAE+IVAE", 5, 0.9)
    assert ivae == {
        "probe": "39.26±0.25",
        "mine": "6.41±0.69",
        "bpd": "3.48±0.05",
        "kl": "233.0±7.0",
    }
    lvae = tables.paper(cifar, "LVAE", 5, 0.9)
    assert (lvae["bpd"], lvae["kl"], lvae["all"]) == ("2.91±0.03", "2e-3±0.0", "49.87±0.39")
    assert tables.paper(fmnist, "HVAE+RL", 5, 0.9)["all"] == "84.56±0.25"
    assert tables.paper(cifar, "HVAE+RL", 5, 0.0) == {"probe": "41.91±0.15"}
    assert tables.paper(fmnist, "LVAE+RL", 5, 0.95) == {"probe": "78.53±0.16"}
    assert tables.paper(fmnist, "HVAE+RL", 3, 0.9) == {"probe": "78.60"}
    assert tables.paper(fmnist, "LVAE+RL", 10, 0.9) == {"probe": "75.82"}
    for nothing in ((fmnist, "LVAE+RL", 2, 0.9), (cifar, "LVAE+RL", 7, 0.9),
                    ("digits", "VAE", 1, 0.9), (fmnist, "LVAE+RL", 5, 0.5),
                    (fmnist, "HVAE", 4, 0.9), (fmnist, "HVAE+IVAE", 5, 0.9)):  # fmt: skip
        assert tables.paper(*nothing) == {}


def test_mistakes_with_tables_give_one_line(tmp_path, capsys):
    a = write_run(tmp_path, "a", {"rl": True})
    b = write_run(tmp_path, "b", {"rl": True})

    def table(words, *argv):
        fails(capsys, [*map(str, argv), "--table"], words, main=evaluate.main)

    table("a and .*b have the same settings and seed: name one", a, b)
    table("nowhere has neither eval.json nor checkpoint.pt", a, tmp_path / "nowhere")
    (b / "eval.json").write_text("{")
    table("eval.json is damaged", b)
    (b / "eval.json").write_text((a / "eval.json").read_text())
    (b / "metrics.jsonl").write_text('{"epoch": ')
    table("metrics.jsonl is damaged", b)
    (b / "config.json").write_text("{}")
    (b / "metrics.jsonl").unlink()
    table("config.json is damaged or of another version", b)
    (b / "config.json").write_text((a / "config.json").read_text())
    for broken in ("{}", "[]", "3"):
        (b / "eval.json").write_text(broken)
        table("eval.json is damaged", b)
    (b / "eval.json").write_text((a / "eval.json").read_text())
    for broken in ("3", "{}", '{"seconds": 1, "kl": []}', '{"seconds": 1, "kl": [1]}',
                   '{"epoch": 1, "seconds": 1, "kl": [1], "test": {}}'):  # fmt: skip
        (b / "metrics.jsonl").write_text(broken)
        table("metrics.jsonl is damaged", b)
    table("no run at", a, "--mine")  # its mutual information needs the checkpoint
    fails(capsys, [str(a), "--figures", "f", "--dpi", "9"], "--dpi 9: choose", main=evaluate.main)
    fails(capsys, [str(a), "--markdown"], "--markdown is for --table", main=evaluate.main)
    fails(capsys, [str(a), str(b), "--out", "x.json"], "--out is for the evaluation of one run",
          main=evaluate.main)  # fmt: skip


def test_table_measures_what_is_missing_and_keeps_it(few, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1"])
    whole = json.loads((out / "eval.json").read_text())
    (out / "eval.json").unlink()
    evaluate.main([str(out), "--table"])
    made = json.loads((out / "eval.json").read_text())
    assert made["probe"] == whole["probe"] and made["mine"] == {}
    capsys.readouterr()
    running = tmp_path / "running"
    shutil.copytree(out, running)
    (running / "eval.json").unlink()
    state = state_of(running)
    state["config"]["epochs"] = 3
    torch.save(state, running / "checkpoint.pt")
    evaluate.main([str(out), str(running), "--table"])  # a run that goes on is let alone
    assert "running has done 1 of 3 epochs" in capsys.readouterr().err
    assert not (running / "eval.json").exists()
    monkeypatch.setattr(evaluate, "evaluate", None)  # nothing that is there is measured again
    monkeypatch.setattr(
        evaluate,
        "level_information",
        lambda model, data, level: {"nats": level + 0.5, "ceiling": 4},
    )
    evaluate.main([str(out), "--table", "--mine"])
    assert "1.50" in capsys.readouterr().out  # level 1 of 0 and 1 is z_L
    monkeypatch.setattr(evaluate, "level_information", None)
    evaluate.main([str(out), "--table", "--mine"])
    assert json.loads((out / "eval.json").read_text())["mine"] == {
        "z2": {"nats": 1.5, "ceiling": 4}
    }


# --------------------------------------------------------------------------------------------------
# figures.py


def test_mosaic():
    pictures = torch.arange(1, 4).view(3, 1, 1, 1).expand(3, 1, 2, 2) / 10
    canvas = figures.mosaic(pictures, 2)
    assert canvas.shape == (5, 5, 1)
    assert (canvas[:2, :2] == np.float32(0.1)).all() and (canvas[:2, 3:] == np.float32(0.2)).all()
    assert (canvas[3:, :2] == np.float32(0.3)).all()
    assert (canvas[2] == 1).all() and (canvas[:, 2] == 1).all() and (canvas[3:, 3:] == 1).all()


def test_correlations_against_numpy():
    a, b = torch.randn(50, 3), torch.randn(50, 2)
    expected = np.abs(np.corrcoef(a.T.numpy(), b.T.numpy())[:3, 3:])
    assert figures.correlations(a, b).numpy() == pytest.approx(expected, abs=1e-6)


def test_units_found_again():
    """Whatever the order and scale of the units; collapsed levels have none to be found."""
    z = torch.randn(5000, 4)
    other = [torch.randn(5000, 2), -3 * z[:, [2, 0, 3, 1]] + 1, torch.zeros(5000, 2)]
    found = figures.found_again([z, 0.01 * z, torch.cat([z[:, :1], 1e-3 * z], dim=1)], other)
    assert found[0, 1] == pytest.approx(1) and found[0, 0] < 0.05
    assert np.isnan(found[1]).all() and np.isnan(found[:, 2]).all()
    assert found[2, 1] == pytest.approx(1)  # of the units that are active


def test_test_images_of_many_classes():
    labels = torch.arange(40) % 10
    pictures = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    d = data.Data(pictures, labels, pictures, labels, tuple("abcdefghij"))
    assert figures.of_many_classes(d, 10).flatten().tolist() == list(range(10))
    assert figures.of_many_classes(d, 12).flatten().tolist() == [*range(10), 10, 11]
    assert figures.of_many_classes(d, 5).flatten().tolist() == [0, 2, 4, 7, 9]
    assert figures.of_many_classes(d, 99).flatten().tolist() == list(range(40))  # all there are
    uneven = d._replace(test=pictures[:3], test_labels=torch.tensor([1, 1, 0]))
    assert figures.of_many_classes(uneven, 20).flatten().tolist() == [2, 0, 1]
    unlabelled = d._replace(train_labels=None, test_labels=None, classes=())
    assert figures.of_many_classes(unlabelled, 3).flatten().tolist() == [0, 1, 2]


@pytest.fixture
def tiny_runs(few, tmp_path):
    """Folders of runs of an epoch, named by --dataset, whose images are digits all the same."""

    def make(name: str, *flags: str) -> str:
        out = tmp_path / name
        train.main([*TINY, "--epochs", "1", "--eval-every", "1", *flags, "--out", str(out)])
        return str(out)

    return make


def png(path: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path).convert("RGB"), dtype=float)


def test_every_figure_is_made(tiny_runs, tmp_path, capsys):
    runs = [
        tiny_runs("a", "--arch", "hvae", "--dataset", "fashionmnist"),
        tiny_runs("b", "--arch", "hvae", "--rl", "--dataset", "fashionmnist"),
        tiny_runs("c", "--arch", "hvae", "--rl", "--dataset", "mnist"),
        tiny_runs("d", "--arch", "hvae", "--rl", "--dataset", "fashionmnist", "--latents", "4,3,2"),
        tiny_runs("e", "--arch", "biva", "--dataset", "fashionmnist"),
        tiny_runs("f", "--arch", "aae", "--dataset", "fashionmnist", "--latents", "4"),
        tiny_runs("g", "--arch", "hvae", "--dataset", "fashionmnist", "--seed", "4"),
    ]
    capsys.readouterr()
    evaluate.main([*runs, "--figures", str(tmp_path / "figures")])
    said = capsys.readouterr().out.splitlines()
    of_fashion = ["fig1-skip-paths", "fig5-latents", "fig6-depth", "fig7-kl", "curves", "samples"]
    expected = {"fig2-correlation.png", *(f"{name}-fashionmnist.png" for name in of_fashion)}
    expected |= {f"{name}-mnist.png" for name in of_fashion if name != "fig6-depth"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == expected
    assert "not made: fig6-depth-mnist.png needs runs that differ in --levels, on images with " \
           "labels" in said  # fmt: skip
    for name in expected:
        picture = png(tmp_path / "figures" / name)
        assert min(picture.shape[:2]) > 200 and picture.std() > 5
        # Nothing touches the edge, where it would be cut.
        for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert (edge == 255).all(), name


def test_figure_2_takes_the_images_of_the_data_set_named_first(
    tiny_runs, few, tmp_path, monkeypatch
):
    folders = [tiny_runs(name, "--dataset", name) for name in ("mnist", "fashionmnist")]
    runs = [tables.read_run(Path(f), tables.read_json(Path(f, "eval.json"), ())) for f in folders]
    shown = [
        figures.Shown(group, lambda c: few, torch.device("cpu")) for group in tables.groups(runs)
    ]
    assert [s.dataset for s in shown] == ["fashionmnist", "mnist"]
    for order in (shown, shown[::-1]):
        axes = figures.correlation(order).axes[0]
        names = {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}
        assert axes.get_ylabel() == f"trained on {names[order[0].dataset]}"
        drawn = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
        a, b = (evaluate.representations(s.model, few.test) for s in order)
        assert drawn == pytest.approx(figures.found_again(a, b), nan_ok=True)

    def correlation(shown):
        raise figures.Missing(" and ".join(s.dataset for s in shown))

    monkeypatch.setattr(figures, "correlation", correlation)
    said = list(figures.draw(runs, tmp_path / "f", lambda c: few, torch.device("cpu")))
    assert said[0] == "not made: fig2-correlation.png needs mnist and fashionmnist"


def test_figures_of_metrics_need_no_checkpoint_and_no_data(tmp_path, capsys):
    runs = [str(write_run(tmp_path, "a", FASHION | {"rl": True})),
            str(write_run(tmp_path, "b", FASHION | {"rl": True, "levels": 3}))]  # fmt: skip
    evaluate.main([*runs, "--figures", str(tmp_path / "figures")])
    said = capsys.readouterr().out
    names = {p.name.removesuffix("-fashionmnist.png") for p in (tmp_path / "figures").iterdir()}
    assert names == {"fig6-depth", "fig7-kl", "curves"}
    shown = [tables.read_run(Path(run), tables.read_json(Path(run, "eval.json"), ()))
             for run in runs]  # fmt: skip
    drawn = figures.curves([figures.Shown(group, None, None) for group in tables.groups(shown)])
    x = [axes.lines[0].get_xdata().tolist() for axes in drawn.axes]  # minutes above, epochs below
    assert x == [[0.5, 61 / 60], [61 / 60], [61 / 60], [1, 2], [2], [2]]
    line = shown[0].metrics[0]
    assert line["epoch"] == 1 and line["seconds"] == 30 and line["kl"][-1] == 0.5
    shorter = shown[0]._replace(metrics=[line | {"seconds": 60, "kl": [0.7]}])
    group = tables.groups(shown[:1])[0]._replace(runs=[shown[0], shorter])
    axes = figures.curves([figures.Shown(group, None, None)]).axes[0]
    (mean,), (band,) = axes.lines, axes.collections  # of the one epoch that both have
    assert mean.get_xydata().ravel() == pytest.approx([0.75, 0.6])
    within = band.get_paths()[0].get_extents()
    std = math.sqrt(2 * 0.1**2)
    assert [within.y0, within.y1] == pytest.approx([0.6 - std, 0.6 + std])
    assert said.count("not made") == 4 and "needs a run with its checkpoint" in said
    (tmp_path / "file").write_text("")
    fails(capsys, [*runs, "--figures", str(tmp_path / "file")], "cannot write .*file",
          main=evaluate.main)  # fmt: skip


def test_figure_6_tells_widths_apart(tmp_path):
    """Runs of one depth with other latents are no further seeds of it."""
    folders = [write_run(tmp_path, "a", FASHION | {"rl": True, "levels": 3}, 70.0),
               write_run(tmp_path, "b", FASHION | {"rl": True}, 60.0),
               write_run(tmp_path, "c", FASHION | {"rl": True, "latents": "9,8,7,6,5"}, 10.0),
               write_run(tmp_path, "d", FASHION | {"rl": True, "seed": 1}, 62.0)]  # fmt: skip
    runs = [tables.read_run(f, tables.read_json(f / "eval.json", ())) for f in folders]
    shown = [figures.Shown(g, None, torch.device("cpu")) for g in tables.groups(runs)]
    axes = figures.depth(shown).axes[0]
    (container,) = axes.containers
    assert container.get_label() == "LVAE+RL"
    assert container.lines[0].get_xydata().tolist() == [[3, 70], [5, 61]]
    paper = next(line for line in axes.lines if line.get_label() == "LVAE+RL, paper")
    assert paper.get_xydata()[0].tolist() == [3, 78.77] and len(paper.get_xdata()) == 8


def test_one_number_and_few_images_have_figures_too(few, monkeypatch):
    monkeypatch.setattr(figures.Shown, "has_model", True)
    d = few._replace(test=few.test[:7], test_labels=few.test_labels[:7])
    model = models.build(models.configure("hvae", latents="3,1", channels=4))
    assert len(figures.latents([shown_of(model, d)]).axes) == 2
    assert len(figures.skip_paths([shown_of(model, d)]).axes) == 1
    two = d._replace(test=d.test[:2], test_labels=d.test_labels[:2])
    with pytest.raises(figures.Missing, match="three test images"):
        figures.latents([shown_of(model, two)])


def test_every_method_has_its_place_in_a_table(tmp_path):
    flags = [{"arch": "vae", "rl": True}, {"arch": "vae", "ivae": True}]
    flags += [{"arch": arch} for arch in models.ARCHS]
    flags += [{"arch": arch, kind: True} for arch in ARCHS for kind in ("rl", "ivae")]
    folders = [write_run(tmp_path, str(i), f) for i, f in enumerate(flags)]
    runs = [tables.read_run(f, tables.read_json(f / "eval.json", ())) for f in folders]
    assert [row["method"] for row in tables.rows(runs)] == list(tables.METHODS)


def shown_of(model, d: data.Data) -> figures.Shown:
    config = settings.defaults({"dataset": "digits", "arch": "hvae"})
    run = tables.Run(Path("run"), config, {"kl": [0.0] * model.levels}, [], "HVAE")
    shown = figures.Shown(tables.Group("HVAE", [run]), lambda c: d, torch.device("cpu"))
    shown.__dict__["model"] = model  # in place of the checkpoint's
    return shown


def test_rows_of_figure_1_are_the_levels_from_the_pixels_up(few, monkeypatch):
    monkeypatch.setattr(figures.Shown, "has_model", True)
    model = models.build(models.configure("lvae", latents="6,5,4", channels=4))
    drawn = []
    monkeypatch.setattr(figures, "show", lambda axes, picture: drawn.append(picture))
    figure = figures.skip_paths([shown_of(model, few)])
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == ["input", "$z_{1}$", "$z_{2}$", "$z_{3}$"]
    images = data.to_unit(figures.of_many_classes(few, 20))
    z = model.infer(images, sample=False).latents
    for row in range(4):
        expected = images
        if row:
            alone = [v if k == row - 1 else None for k, v in enumerate(z)]
            expected = model.decode(alone).mean.detach()
        canvas = drawn[0][row * 29 : row * 29 + 28]
        for column in (0, 7, 19):
            part = canvas[:, column * 29 : column * 29 + 28, 0]
            assert part == pytest.approx(expected[column, 0].numpy(), abs=1e-6)


def test_traversal_is_spaced_by_the_quantiles_of_the_prior_around_its_anchor(few, monkeypatch):
    from scipy.stats import norm

    monkeypatch.setattr(figures.Shown, "has_model", True)
    model = models.build(models.configure("hvae", latents="6,4", channels=4))
    seen = []
    whole = model.generate

    def generate(latents, skip="mean"):
        seen.append(latents)
        return whole(latents, skip)

    model.generate = generate
    figure = figures.latents([shown_of(model, few)])
    below, z = seen[-1]
    assert below is None and z.shape == (81, 4)
    anchor = model.infer(data.to_unit(few.test[:1]), sample=False).latents[-1][0]
    assert torch.allclose(z[40], anchor, atol=1e-5)
    spread = evaluate.representations(model, few.test)[-1].var(dim=0)
    first, second = spread.topk(2).indices.tolist()
    moved = (z - anchor).detach().view(9, 9, 4)  # rows from the top, columns
    quantiles = norm.ppf(np.linspace(0.05, 0.95, 9))
    for i in range(9):
        assert moved[i, :, first].numpy() == pytest.approx(quantiles, abs=1e-4)
        assert moved[:, i, second].numpy() == pytest.approx(-quantiles, abs=1e-4)
    others = [k for k in range(4) if k not in (first, second)]
    assert moved[:, :, others].abs().max() < 1e-6
    (box,) = figure.axes[1].patches  # around the middle picture, 28 pixels from 4 * 29 on
    assert box.get_xy() == (115, 115) and box.get_width() == 29 and box.get_edgecolor()[0] > 0.8


def test_the_adversary_keeps_the_aggregate_posterior_near_the_prior(tmp_path, monkeypatch):
    """The first two moments of z over the test images, with the adversary and without: as nats of
    the Gaussian that has them from N(0, I)."""

    def trained(name):
        out = tmp_path / name
        train.main(["--arch", "aae", "--epochs", "25", "--probe", "top", "--out", str(out)])
        model = evaluate.restore_model(evaluate.load_checkpoint(out))
        (z,) = evaluate.representations(model, data.load("digits").test, sample=True)
        mean, covariance = z.mean(0), z.T.cov()
        unit = torch.distributions.MultivariateNormal(torch.zeros(8), torch.eye(8))
        nats = kl_divergence(torch.distributions.MultivariateNormal(mean, covariance), unit)
        log_px = json.loads((out / "eval.json").read_text())["log_px_given_z"][0]
        return nats.item(), z.std(0), log_px

    nats, std, log_px = trained("adversarial")
    assert nats < 8 and std.min() > 0.4 and std.max() < 1.5
    assert log_px > -320  # and the images are decoded: -543, 784 ln 2, is a coin's guess
    whole = train.objectives
    monkeypatch.setattr(train, "objectives", lambda config, levels: whole(config, levels)[:1])
    alone, _, _ = trained("alone")
    assert alone > 3 * nats


# --------------------------------------------------------------------------------------------------
# parallel.py


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_rows_of_a_share(of):
    for whole in range(of, 12):
        for start, stop in itertools.combinations(range(whole + 1), 2):
            held = []
            for first in range(of):
                share = rewards.Share(whole, first, of)
                held += range(whole)[first::of][share.rows(start, stop)]
            assert sorted(held) == list(range(start, stop))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("of", [2, 3])
def test_losses_of_shares_add_up_to_the_loss_of_the_batch(arch, of, fixed_noise):
    """Values, gradients and KLs; free bits, which count the batch's mean, among them."""
    model, x = tiny(arch, 3), images(8)
    losses = {
        "elbo": rewards.elbo_loss,
        "stepwise": partial(rewards.stepwise_loss, step=1, gamma=0.8, skip="sample"),
        "joint": partial(rewards.joint_loss, gamma=0.8),
        "sampled": partial(rewards.sampled_loss, gamma=0.8),
        "sampled, sample": partial(rewards.sampled_loss, gamma=0.8, skip="sample"),
        "ivae": partial(rewards.ivae_loss, sampled=True),
    }
    kl = rewards.level_kl(model.infer(x)).mean(dim=1).detach()
    free_bits = kl.sort().values[1].item() + 1e-4  # two levels below, one above
    for name, loss in losses.items():
        for terms in ({}, {"free_bits": free_bits, "beta": 0.5}):
            whole = loss(model, x, **terms)
            parts = []
            for first in range(of):
                share = rewards.Share(len(x), first, of)
                share.mean = lambda values: kl
                part = x[first::of]
                parts.append((len(part) / len(x), loss(model, part, share=share, **terms)))
            value = sum(weight * found.value for weight, found in parts)
            assert_same(value, whole.value)
            assert_same(gradients(value, model), gradients(whole.value, model))
            assert_same(sum(weight * found.kl for weight, found in parts), whole.kl), name


def test_noise_of_a_share_is_that_of_the_batch():
    mean, whole, of = torch.arange(5.0).view(5, 1, 1), 5, 2

    def draws(x):
        q = models.gaussian(x, x + 1)
        paths = models.gaussian(x.repeat(3, 1, 1), torch.ones(3 * len(x), 1, 1))
        uniform = torch.rand(x.shape)
        return q.rsample(), paths.rsample(), uniform, q.sample()

    torch.manual_seed(5)
    expected = draws(mean)
    state = torch.get_rng_state()
    for first in range(of):
        torch.manual_seed(5)
        with parallel.SameNoise(rewards.Share(whole, first, of)):
            found = draws(mean[first::of])
            few = models.gaussian(torch.zeros(2, 4), torch.ones(2, 4)).rsample()
        assert_same(found[0], expected[0][first::of])
        assert_same(found[1].view(3, -1), expected[1].view(3, 5)[:, first::of])
        assert_same(found[2], expected[2][first::of])
        assert_same(found[3], expected[3][first::of])
        assert few.shape == (2, 4)
        others = few if first == 0 else others  # noqa: F821
    assert not torch.equal(few, others)  # numbers of their own where the batch's are not known
    torch.manual_seed(5)
    draws(mean)
    assert torch.equal(torch.get_rng_state(), state)


IN_PROCESSES = textwrap.dedent("""
    import os, signal, sys
    import torch, data, evaluate, models, parallel, settings, train
    d = data.load("digits")
    few = data.Data(d.train[:300], d.train_labels[:300], d.test[:60], d.test_labels[:60], d.classes)
    evaluate.load = lambda *a, **k: few
    build, descend = models.build, train.descend
    models.build = lambda config: build(config).double()
    train.observed = evaluate.observed = lambda x: data.observed(x).double()
    evaluate.to_unit = lambda x: data.to_unit(x).double()
""")


def in_processes(n: int, script: str, *argv: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.run(
        [sys.executable, *(launcher if n > 1 else []), script, *argv], cwd=HERE, text=True,
        capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(HERE)},
    )  # fmt: skip


def test_processes_share_one_run(tmp_path):
    """20 updates and the evaluation in float64: two processes do what one does; and one goes on
    where two have stopped. Batches of 63 and a last one of 48 make shares of unequal size."""
    runs = {
        "elbo": ["--free-bits", "0.3", "--epochs", "4"],
        "stepwise": ["--rl", "--update", "stepwise", "--skip", "sample", "--epochs", "2"],
        "joint": ["--arch", "hvae", "--rl", "--update", "joint", "--epochs", "4"],
        "sampled": ["--rl", "--epochs", "4"],
        "parts": ["--ivae", "--accumulate", "2", "--epochs", "4"],
        "aae": ["--arch", "aae", "--latents", "4", "--epochs", "2"],
    }
    flags = [*TINY, "--batch-size", "63", "--device", "cpu", "--save-every", "1000"]
    script = tmp_path / "run.py"
    script.write_text(IN_PROCESSES + textwrap.dedent(f"""
        with parallel.group():
            for name, more in {runs!r}.items():
                given = [*{flags!r}, *more, "--out", sys.argv[1] + name]
                train.command(vars(settings.parser().parse_args(given)))
            part = {["--rl", "--epochs", "2"]!r}
            given = [*{flags!r}, *part, "--out", sys.argv[1] + "part"]
            train.command(vars(settings.parser().parse_args(given)))
            if parallel.SIZE == 1:
                more = ["--resume", sys.argv[2] + "part", "--epochs", "4"]
                train.command(vars(settings.parser().parse_args(more)))
    """))  # fmt: skip
    one, two = f"{tmp_path}/one-", f"{tmp_path}/two-"
    for n, out in ((2, two), (1, one)):
        done = in_processes(n, str(script), out, two)
        assert done.returncode == 0, done.stderr
    for a, b in [(name, name) for name in runs] + [("sampled", "part")]:
        alone, shared = state_of(one + a), state_of(two + b)
        for key in ("model", "epoch", "update"):
            torch.testing.assert_close(shared[key], alone[key], rtol=1e-9, atol=1e-9)
        assert alone["update"] >= 20
        torch.testing.assert_close(metrics_of(two + b), metrics_of(one + a), rtol=1e-5, atol=1e-6)
        measured = []
        for out in (one + a, two + b):
            result = json.loads(Path(out, "eval.json").read_text())
            measured.append({k: result[k] for k in ("probe", "kl", "elbo", "iwae", "active_units")})
        torch.testing.assert_close(measured[1], measured[0], rtol=1e-9, atol=1e-9)


def test_a_lost_process_ends_the_run_with_a_word_and_a_checkpoint(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        IN_PROCESSES
        + textwrap.dedent("""
        def until_killed(run, *args):
            if parallel.RANK == 1 and run.update == 43:
                os.kill(os.getpid(), signal.SIGKILL)
            return descend(run, *args)
        train.descend = until_killed
        train.main(sys.argv[1:])
    """)
    )
    out = str(tmp_path / "run")
    flags = [*TINY, "--rl", "--epochs", "12", "--batch-size", "64", "--save-every", "0"]
    lost = in_processes(2, str(script), *flags, "--out", out)
    assert lost.returncode != 0
    words = [line for line in lost.stderr.splitlines() if "has lost another" in line]
    assert len(words) == 1 and "process 1 of 2" in words[0] and "--resume" in words[0]
    assert "Traceback" not in lost.stderr.partition("ChildFailedError")[0].partition("elastic")[0]
    assert 20 <= state_of(out)["update"] <= 43
    more = in_processes(1, str(script), "--resume", out)
    assert more.returncode == 0, more.stderr
    assert state_of(out)["update"] == 60 and Path(out, "eval.json").exists()


def test_a_process_that_is_stuck_ends_when_it_is_asked_to():
    script = textwrap.dedent("""
        import os, signal, threading, parallel
        parallel.SIZE, parallel.PATIENCE = 2, 0.5
        signal.signal(signal.SIGTERM, lambda *a: None)
        with parallel.StuckAfterSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
    """)
    stuck = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True,
                           text=True, timeout=50, check=False)  # fmt: skip
    assert stuck.returncode == 2 and "has lost another" in stuck.stderr


def test_processes_without_torchrun_are_told_to_take_it(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
    alone = subprocess.run([sys.executable, "train.py", "--out", str(tmp_path)], cwd=HERE,
                           env=environment | {"RANK": "1", "WORLD_SIZE": "2"},
                           text=True, capture_output=True, check=False)  # fmt: skip
    assert alone.returncode == 2 and len(alone.stderr.splitlines()) == 1
    assert "MASTER_ADDR" in alone.stderr and "start with torchrun" in alone.stderr


def test_mistakes_with_processes(few, tmp_path, monkeypatch, capsys):
    def nothing():
        raise files.UserError("no")

    with pytest.raises(files.UserError, match="no"):
        parallel.of_first(nothing)
    monkeypatch.setattr(parallel, "SIZE", 2)
    fails(capsys, ["--bench", *TINY], "not torchrun")
    fails(capsys, [str(tmp_path)], "not torchrun", evaluate.main)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(parallel, "LOCAL_RANK", 1)
    for name, words in (("cuda:0", "--device cuda"), ("auto", "--nproc-per-node 1")):
        with pytest.raises(files.UserError, match=words):
            parallel.own_device(name)
    assert parallel.own_device("cpu") == torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Parts of batches, compiled updates, and what updates cost


@pytest.fixture
def no_noise(monkeypatch, few):
    """Images are thresholded and samples are means, all in float64."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda config: build(config).double())
    monkeypatch.setattr(Normal, "rsample", lambda self, shape=(): self.loc)
    binary = lambda x: (x > 127).double()  # noqa: E731
    for module in (train, bench):
        monkeypatch.setattr(module, "observed", binary)
    return few


def a_run(*flags: str, device: str = "cpu") -> train.Run:
    given = vars(settings.parser().parse_args([*TINY, "--out", "nowhere", *flags]))
    return train.Run(settings.defaults(given), torch.device(device))


def updated(run: train.Run, pictures: torch.Tensor, sizes=(30, 30, 7)) -> dict:
    """The parameters after a few batches. Adam's steps are made to depend on the gradients' size:
    else it makes whole steps of the rounding errors in gradients that are 0."""
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["eps"] = 1.0
    start = 0
    for size in sizes:
        train.descend(run, pictures, torch.arange(start, start + size), {"beta": 0.5 + start / 200})
        start += size
    return run.model.state_dict()


@pytest.mark.parametrize("objective", [[], ["--rl", "--update", "stepwise"], ["--arch", "aae"]])
@pytest.mark.parametrize("parts", ["2", "4", "50"])
def test_a_batch_in_parts_is_the_batch(no_noise, objective, parts):
    if "aae" in objective:
        objective = [*objective, "--latents", "4"]
    whole = updated(a_run(*objective), no_noise.train)
    found = updated(a_run(*objective, "--accumulate", parts), no_noise.train)
    if "aae" not in objective:  # its discriminator meets other samples of the prior
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)
    assert not torch.equal(found["stem.weight"], a_run(*objective).model.stem.weight)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_compiled_updates_are_the_updates(no_noise):
    """One program for all batches, though the KL's weight changes; a smaller last one goes
    without."""
    flags = ["--rl", "--batch-size", "30"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = updated(a_run(*flags, "--compile"), no_noise.train)
    torch.testing.assert_close(found, updated(a_run(*flags), no_noise.train), rtol=1e-7, atol=1e-8)


class Recorder:
    """Stands for CUDA's graphs on the CPU: what is recorded is done once, without a trace, and done
    again, from the same inputs to the same outputs, at every replay."""

    recording: "Recorder | None" = None

    def __init__(self):
        self.replays = 0

    @staticmethod
    @contextlib.contextmanager
    def record(graph: "Recorder", stream: object):
        Recorder.recording = graph
        yield
        Recorder.recording = None

    def replay(self):
        self.replays += 1
        run, images, rows, terms = self.inputs
        self.outputs.copy_(self.updates(run, images, rows, terms))


@pytest.fixture
def recorders(monkeypatch):
    made, updates = [], train.updates

    def graph():
        made.append(Recorder())
        return made[-1]

    def recorded(run, images, rows, terms):
        found = Recorder.recording
        if found is None:
            return updates(run, images, rows, terms)
        found.updates, found.inputs = updates, (run, images, rows, terms)
        run.update += len(run.losses)
        found.outputs = torch.full((len(run.losses) + run.model.levels,), math.nan)
        return found.outputs

    nothing = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(train, "updates", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", Recorder.record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


def captured(run: train.Run) -> train.Run:
    """A run on the CPU that takes its updates as on CUDA."""
    run.captured = train.Captured(torch.device("cpu"))
    for optimizer, rate in zip(run.optimizers, run.rates, strict=True):
        optimizer.param_groups[0]["lr"] = run.captured.settings(rate)["lr"]
    return run


GRAPHS = [
    ["--rl", "--update", "stepwise"],
    ["--rl", "--update", "sampled", "--accumulate", "2"],
    [],
    ["--arch", "aae", "--latents", "4"],
]


def course(run: train.Run, pictures: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    """What the batches of a short training return, and the parameters after it. The weight of the
    KL and the learning rate change with every batch, the free bits once; the last is smaller."""
    found, beginning = [], 0
    for i, size in enumerate([30, 30, 30, 30, 7, 30, 30, 30, 30, 30]):
        run.set_rates(0.1 * (i + 1))
        rows = torch.arange(beginning, beginning + size, device=pictures.device)
        terms = {"beta": 0.1 * i, "free_bits": 0.5 if i < 7 else 0.0}
        found.append(train.descend(run, pictures, rows, terms))
        beginning += size
    return found, run.model.state_dict()


@pytest.mark.parametrize("flags", GRAPHS)
def test_recorded_updates_are_the_updates(few, recorders, flags):
    """Batch, KL's weight and learning rate come anew to every replay, free bits make another graph,
    the smaller batch goes without, and every batch is trained on once."""
    flags = ["--batch-size", "30", *flags]
    plain, replayed = a_run(*flags), captured(a_run(*flags))
    for optimizer in [*plain.optimizers, *replayed.optimizers]:
        optimizer.param_groups[0]["eps"] = 1e-3  # that no step is made of rounding errors
    torch.manual_seed(3)
    expected = course(plain, few.train)
    assert not recorders
    torch.manual_seed(3)
    found = course(replayed, few.train)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert plain.update == replayed.update == 10 * len(plain.losses)
    assert [graph.replays for graph in recorders] == [4, 1]  # after two batches without, each


def test_checkpoints_go_from_runs_with_a_graph_to_runs_without(few, recorders, tmp_path):
    """And back. The learning rate stays what the run has it as: a graph reads it where it lies."""
    flags = ["--batch-size", "30", "--out", str(tmp_path)]
    run = captured(a_run(*flags))
    course(run, few.train)
    run.save()
    runs = [a_run(*flags), captured(a_run(*flags))]
    for other in runs:
        before = other.optimizers[0].param_groups[0]["lr"]
        other.restore(evaluate.load_checkpoint(tmp_path))
        assert other.optimizers[0].param_groups[0]["lr"] is before
        assert (other.update, isinstance(before, torch.Tensor)) == (10, other is runs[1])
        torch.manual_seed(5)
        course(other, few.train)
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@of_cuda
@pytest.mark.parametrize("flags", GRAPHS)
def test_updates_on_cuda(cuda, no_noise, flags):
    """As one graph and step by step as on the CPU, in float64 and without noise."""
    flags = ["--batch-size", "30", *flags]
    found = {}
    for name, device, how in (
        ("cpu", "cpu", []),
        ("eager", "cuda", ["--eager"]),
        ("graph", "cuda", []),
    ):
        run = a_run(*flags, *how, device=device)
        assert (run.captured is not None) == (name == "graph")
        run.dtype = torch.float32  # nothing is cast
        for optimizer in run.optimizers:
            optimizer.param_groups[0]["eps"] = 1.0
        means, state = course(run, no_noise.train.to(device))
        found[name] = [m.cpu() for m in means], {k: v.cpu() for k, v in state.items()}
    if "aae" in flags:  # its discriminator meets other samples of the prior on another device
        return
    for name in ("eager", "graph"):
        torch.testing.assert_close(found[name], found["cpu"], rtol=1e-5, atol=1e-6)


@of_cuda
def test_noise_on_cuda(cuda, few):
    """The replays draw the numbers that the updates step by step would draw, every time others."""
    flags = ["--rl", "--batch-size", "30", "--dtype", "float32"]
    found = []
    for how in ([], ["--eager"]):
        run = a_run(*flags, *how, device="cuda")
        torch.manual_seed(3)
        found.append(course(run, few.train.to(cuda)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    run, rows = a_run(*flags, "--lr", "1e-9", device="cuda"), torch.arange(30, device=cuda)
    values = [train.descend(run, few.train.to(cuda), rows, {"beta": 1.0})[0] for _ in range(6)]
    assert len({value.item() for value in values}) == 6


@of_cuda
def test_a_run_on_cuda(cuda, few, tmp_path, capsys):
    """Trains, and goes on from its checkpoint on the CPU and from there on CUDA again."""
    flags = [*TINY, "--rl", "--batch-size", "64", "--out", str(tmp_path)]
    train.main([*flags, "--epochs", "2", "--schedule", "cosine", "--ema", "0.9"])
    assert "cuda, float32, one CUDA graph a batch" in capsys.readouterr().out
    for epochs, device in (("4", "cpu"), ("6", "cuda"), ("7", "auto")):
        train.main(["--resume", str(tmp_path), "--epochs", epochs, "--device", device])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 8))
    assert lines[-1]["loss"] < lines[0]["loss"]
    capsys.readouterr()
    found = []
    for device in ("cuda", "cpu"):
        evaluate.main([str(tmp_path), "--json", "--device", device])
        found.append(json.loads(capsys.readouterr().out))
    for key in ("kl", "elbo", "iwae"):
        assert found[0][key] == pytest.approx(found[1][key], rel=0.1, abs=0.1), key
    assert found[0]["probe"]["all"] == pytest.approx(found[1]["probe"]["all"], abs=5)


@pytest.mark.parametrize(
    "first, words",
    [
        (
            RuntimeError("Cannot copy\nand more"),
            r"recorded as a CUDA graph \(Cannot copy\): take --ea",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower --batch-size"),
    ],
)
def test_a_recording_that_fails_is_named(capsys, monkeypatch, first, words):
    """By what went wrong first: the end of the recording fails in turn."""

    def fails_to_record(flags):
        try:
            raise first
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(train, "command", fails_to_record)
    fails(capsys, [], words)


def test_a_compiler_that_fails_is_named(few, tmp_path, monkeypatch, capsys):
    class NoCompiler(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fails_to_compile(*args, **kwargs):
        def call(*args, **kwargs):
            raise NoCompiler("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", fails_to_compile)
    flags = [*TINY, "--compile", "--batch-size", "64", "--epochs", "1", "--out", str(tmp_path)]
    fails(capsys, flags, r"--compile.*\(no C\+\+ compiler\): leave it out")


def test_the_literal_algorithm_of_the_benchmark(no_noise, fixed_noise):
    """Its Q-values are those of the transcription above, and its updates those of stepwise."""
    for arch in ARCHS:
        model, x = tiny(arch, 3), images(4)
        for step in range(3):
            expected = -literal_q_value(model, arch, x, step, 0.8, "sample").mean()
            assert_same(bench.literal_loss(model, x, step, 0.8, "sample"), expected)
        flags = ["--arch", arch, "--rl", "--update", "stepwise", "--latents", "4,3,2"]
        run, literal = a_run(*flags), a_run(*flags)
        batch = bench.literal(literal, no_noise.train)
        for start in (0, 20):
            rows = torch.arange(start, start + 20)
            batch(rows)
            train.descend(run, no_noise.train, rows, {})
        expected = run.model.state_dict()
        torch.testing.assert_close(literal.model.state_dict(), expected, rtol=1e-9, atol=1e-9)
    assert torch.channels_last == models.LAYOUT


def test_bench(few, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    monkeypatch.setattr(bench, "ROUNDS", (3, 3))
    monkeypatch.setattr(bench, "peak_rate", lambda device, dtype: (1e11, "invented"))
    found = {}
    for batch in ("16", "32"):
        train.main(["--bench", "--json", *TINY, "--batch-size", batch])
        found[batch] = r = json.loads(capsys.readouterr().out)
        names = ["literal", "stepwise", "joint", "sampled", "elbo"]
        for key in ("images_per_s", "updates_per_s", "peak_memory_mb", "mfu", "ms_per_batch"):
            assert list(r[key]) == names and min(r[key].values()) > 0, key
        for name in names:
            seconds = r["ms_per_batch"][name] / 1e3
            assert r["images_per_s"][name] == pytest.approx(int(batch) / seconds)
            steps = 2 if name in ("literal", "stepwise") else 1
            assert r["updates_per_s"][name] == pytest.approx(steps / seconds)
            expected = 1e9 * r["gflop_per_batch"][name] / seconds / 1e11
            assert r["mfu"][name] == pytest.approx(expected)
        assert (r["levels"], r["batch"], r["dtype"]) == (2, int(batch), "float32")
        work = r["gflop_per_batch"]
        assert work["literal"] > work["stepwise"] > work["joint"] > work["sampled"]
    for name in names:  # twice the images are twice the work, and need more memory
        ratio = found["32"]["gflop_per_batch"][name] / found["16"]["gflop_per_batch"][name]
        assert ratio == pytest.approx(2, rel=0.02)
        assert found["32"]["peak_memory_mb"][name] > found["16"]["peak_memory_mb"][name]
    for flags, names in (
        (["--arch", "biva"], ["elbo"]),
        (["--arch", "aae", "--latents", "4"], ["aae"]),
        (["--ivae"], ["literal", "stepwise", "joint", "sampled", "elbo", "ivae"]),
    ):
        train.main(["--bench", *TINY, "--batch-size", "16", *flags])
        rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]]
        assert rows == names
    for flags, words in (
        (["--bench", "--resume"], "--resume has no meaning"),
        (["--bench", "--out", "x"], "--out has no meaning"),
        (["--bench", "--batch-size", "301"], "there are 300"),
        (["--json"], "--json is for --bench"),
    ):
        fails(capsys, flags, words)


def test_operations_and_memory_of_a_known_network(few):
    """One layer: 2 n m b operations forward, and again for the weights."""

    class Layer(torch.nn.Module):
        levels, order = 1, (0,)

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(784, 1000, bias=False)

    run = a_run()
    run.model = Layer()

    def batch(rows):
        x = torch.ones(len(rows), 784)
        run.model.layer(x).sum().backward()

    way = bench.Way(run, batch, 1, torch.float32)
    rows = torch.arange(64)
    assert bench.operations(way, rows) == 2 * 2 * 784 * 1000 * 64
    # Parameters, two moments and the gradient, the images, and the layer's output with its gradient
    # (which a sum only broadcasts).
    numbers = 4 * 784_000 + 64 * 784 + 64 * 1000
    assert bench.peak_memory(way, rows) == pytest.approx(4 * numbers / 2**20, rel=0.05)


def test_the_first_images(tmp_path, capsys):
    d = data.load("digits")
    part = data.first_images(d, 100)
    assert torch.equal(part.train, d.train[:100]) and torch.equal(part.test, d.test)
    assert torch.equal(part.train_labels, d.train_labels[:100]) and part.unlabelled is None
    assert data.first_images(d, None) is d
    unlabelled = d._replace(unlabelled=torch.cat([d.train, d.train]), train_labels=None)
    part = data.first_images(unlabelled, 2000)
    assert len(part.train) == len(d.train) and len(part.to_train_on) == 2000
    fails(capsys, ["--train-images", "2000", "--out", str(tmp_path)], "there are 1,437")
    flags = [*TINY, "--train-images", "150", "--epochs", "1", "--batch-size", "64"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    assert state_of(tmp_path / "run")["update"] == 3
    first = json.loads((tmp_path / "run/eval.json").read_text())
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["probe"] == first["probe"]


def test_thresholded_images(tmp_path, capsys):
    """Black or white from the file on: nothing is drawn, in training and in every measure."""
    grey, d = data.load("digits"), data.load("digits", threshold=True)
    for of_grey, images in ((grey.train, d.train), (grey.test, d.test)):
        assert images.dtype == torch.uint8 and 0 < (of_grey == 127).sum() < of_grey.numel()
        assert images.numpy().tolist() == np.where(of_grey.numpy() >= 127.5, 255, 0).tolist()
        assert torch.equal(data.observed(images), data.to_unit(images))
    assert torch.equal(d.train_labels, grey.train_labels)
    flags, folders = [*TINY, "--epochs", "1"], [str(tmp_path / "white"), str(tmp_path / "grey")]
    train.main([*flags, "--threshold", "--out", folders[0]])
    train.main([*flags, "--out", folders[1]])
    capsys.readouterr()
    evaluate.main([*folders, "--table", "--binarised"])
    labels = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"LVAE", "LVAE, threshold"} <= set(labels)
    found = [json.loads((Path(folder) / "eval.json").read_text()) for folder in folders]
    assert [e["probe"] == e["probe_binarised"] for e in found] == [True, False]


# --------------------------------------------------------------------------------------------------
# The claim


@pytest.mark.parametrize("arch", ARCHS)
def test_rl_keeps_the_top_level_informative_where_the_elbo_lets_it_collapse(arch, tmp_path):
    """Digits, all objectives with the same warm-up, less than a third of the main job's epochs.

    IVAE (tried top-down) keeps the top level informative too, but its lower levels alike.
    """
    found = {}
    objectives = {"elbo": [], "rl": ["--rl"]} | ({"ivae": ["--ivae"]} if arch == "lvae" else {})
    for name, rl in objectives.items():
        out = str(tmp_path / name)
        flags = ["--arch", arch, "--epochs", "24", "--warmup", "16", "--probe", "top", *rl]
        train.main([*flags, "--out", out])
        found[name] = json.loads(Path(out, "eval.json").read_text())
    assert found["rl"]["kl"][-1] > 1 and min(found["rl"]["kl"]) > 0.5
    assert found["rl"]["active_units"][-1] >= 2
    assert found["elbo"]["kl"][-1] < 0.1 and found["elbo"]["active_units"][-1] == 0
    assert found["rl"]["probe"]["z5"] > found["elbo"]["probe"]["z5"] + 15
    if arch == "hvae":
        return
    assert found["ivae"]["kl"][-1] > 1 and found["ivae"]["active_units"][-1] >= 1
    spread = {name: np.ptp(f["log_px_given_z"][:3]) for name, f in found.items()}
    assert spread["ivae"] < spread["elbo"] - 3
