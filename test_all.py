"""Everything is tested here, against independent truths: python -m pytest test_all.py

Tests of real data look in the folder that DATA_DIR names, and for FashionMNIST in Debian's too.
"""

import ast
import contextlib
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import NormalDist
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from matplotlib.colors import to_hex
from scipy.special import expit
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.multiclass import OneVsOneClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import pixel_shuffle

import baselines
import bench
import data
import evaluate
import figures
import files
import mine
import models
import rewards
import settings
import tables
import train
from likelihoods import LogisticMixture
from models import Inference, gaussian

# --------------------------------------------------------------------------------------------------
# models.py, baselines.py and likelihoods.py


torch.set_num_threads(1)  # tiny tensors are slower on several

ARCHS = ("hvae", "lvae")
LATENTS = {1: ("3",), 2: ("2c", "3"), 3: ("2c", "4", "3"), 5: ("2c", "5", "4", "3", "2")}


@pytest.fixture(autouse=True)
def seeded(request, monkeypatch):
    """Tests run on the CPU, where numbers repeat, unless they ask for the fixture `cuda`."""
    torch.manual_seed(0)
    if "cuda" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts


def tiny(arch: str, levels: int, dtype: torch.dtype = torch.float64, **changes) -> models.Network:
    """A model of 8x8 images whose levels all have different shapes."""
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
    return baselines.build(config._replace(**changes)).to(dtype)


def images(n: int, size: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.rand(n, 1, size, size) < 0.4).to(dtype)


def gradients(value: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))


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
# models.py and baselines.py


@pytest.mark.parametrize(
    ("arch", "levels"), [*itertools.product((*ARCHS, "biva"), range(1, 11)), ("vae", 1), ("aae", 1)]
)
@pytest.mark.parametrize("image", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_every_number_of_levels(arch, levels, image):
    """Grey: 8 doubles downwards, to 128; five are the preset's. Colour repeats the lowest."""
    upwards = {1: ["8", "16", "32", "64"] + ["128"] * 6, 3: ["64", "64", "128", "8c"] + ["16c"] * 6}
    expected = tuple(reversed(upwards[image[0]][:levels]))
    if (levels, image[0]) == (5, 1):
        expected = ("8c", "64", "32", "16", "8")
    config = models.configure(arch, "small", image, levels=levels, channels=8)
    assert config.latents == expected
    model, x = baselines.build(config), torch.rand(2, *image).round()
    posteriors, priors, latents, _ = model.infer(x)
    assert len(posteriors) == len(priors) == len(latents) == model.levels == levels
    for level, z in enumerate(latents):
        assert z.shape == (2, *model.latent_shapes[level]) == posteriors[level].mean.shape
    for pixels in (model.generate(latents), model.sample(2)):
        assert isinstance(pixels, LogisticMixture) == (image[0] == 3)
        assert pixels.mean.shape == pixels.sample().shape == (2, *image)
    if levels in (1, 5):
        loss = rewards.joint_loss(model, x, 0.9) if arch in ARCHS else rewards.elbo_loss(model, x)
        for g in gradients(loss.value, model):
            assert g.isfinite().all() and (g.abs().max() > 0 or arch == "aae")


@pytest.mark.parametrize(("arch", "mean_field"), [("hvae", False), ("lvae", False), ("lvae", True)])
def test_presets(arch, mean_field):
    model = baselines.build(models.configure(arch, "paper", mean_field=mean_field))
    count = 64 * (25 + 1) + 64 + 1  # the first layer and the last
    dims, sizes, kernels = (128, 64, 32, 16, 8), (14, 7, 7, 7, 7), (5, 3, 3, 3, 3)
    assert model.sizes == [28, *sizes] and model.latent_shapes == [(dim,) for dim in dims]
    for level, (dim, size, kernel) in enumerate(zip(dims, sizes, kernels, strict=True)):
        features, block = 64 * size**2, 2 * 64 * (64 * kernel**2 + 2)  # with norms and biases
        count += 6 * block + (dim + 1) * features  # three blocks up, and three down from z
        count += (features + 1) * 2 * dim * (1 if level == 4 else 2)  # posterior and prior
        if level != (0 if arch == "hvae" else 4) and not mean_field:
            count += 64 * (128 + 2) + block  # the merge
        if level > 0 and arch == "hvae":
            count += (dims[level - 1] + 1) * features  # of the sample below
    assert sum(p.numel() for p in model.parameters()) == count
    small = models.configure(arch, "small")
    assert baselines.build(small).latent_shapes == [(8, 7, 7), (64,), (32,), (16,), (8,)]
    assert models.configure(arch, "best") == small._replace(channels=64)
    assert models.configure(arch, latents="4c, 2").latents == ("4c", "2")
    assert models.configure("vae").latents == models.configure("aae").latents == ("8",)
    for side in (32, 64):
        small = models.configure(arch, "small", (3, side, side))
        shapes = [(16, 8, 8), (8, 4, 4), (128,), (64,), (64,)]
        assert small.channels == 64 and baselines.build(small).latent_shapes == shapes
        deep = models.configure(arch, "paper", (3, side, side), levels=7)
        assert deep.latents == ("128c", "128c", "128c", "64c", "256", "128", "64")
        assert (deep.channels, deep.strides, deep.kernels) == (256, (2,) * 7, (5, *[3] * 6))


def test_what_cannot_be_built():
    for arch, change, message in [
        ("hvae", dict(levels=0), "0 levels: a hierarchy has 1 to 10"),
        ("biva", dict(levels=11), "11 levels: a hierarchy has 1 to 10"),
        ("aae", dict(latents="8,4"), "aae has one level, not 2"),
        ("lvae", dict(latents="8,4", levels=3), "name 2 levels, not 3"),
        ("lvae", dict(latents="8,0c"), "latent '0c' is not understood"),
        ("hvae", dict(mean_field=True), "--mean-field is for lvae"),
        ("hvae", dict(channels=0), "0 channels: there must be at least 1"),
        ("hvae", dict(size="best", image=(3, 32, 32)), "is for grey images: take small or paper"),
        ("lvae", dict(image=(3, 30, 30)), "squares whose side is a multiple of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.configure(arch, **change)


def moves(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[bool]:
    """Which of the inputs a value depends on."""
    if not value.requires_grad:
        return [False] * len(inputs)
    by_input = torch.autograd.grad(value.sum(), inputs, retain_graph=True, materialize_grads=True)
    largest = [g.abs().max().item() for g in by_input]
    assert all(size == 0 or size > 1e-6 for size in largest)
    return [size > 0 for size in largest]


def latent_values(shapes: list[tuple]) -> list[torch.Tensor]:
    return [torch.randn(3, *s, dtype=torch.float64).requires_grad_() for s in shapes]


def infer_given(model, x, samples: list[torch.Tensor]) -> models.Inference:
    """The inference that draws the given samples, one after the other."""
    with mock.patch.object(Independent, "rsample", side_effect=samples) as draw:
        inference = model.infer(x)
    assert draw.call_count == len(samples)
    return inference


def skip_path(model, z: torch.Tensor, level: int, skip: str = "mean") -> torch.Tensor:
    """What the last layer gives at the end of z_l's path, through one prior after another."""
    for below in reversed(range(level)):
        prior = model.prior(below, z)
        z = prior.mean if skip == "mean" else prior.rsample()
    return pixel_shuffle(model.to_pixels(model.decoder[0](z).relu()), model.config.patch)


@pytest.mark.parametrize(("arch", "neighbour"), [("hvae", -1), ("lvae", 1), ("lvae", None)])
def test_what_each_level_is_conditioned_on(arch, neighbour):
    """Eq. 1: q(z_l|z_{l-1}, x), Eq. 2: q(z_l|z_{l+1}, x), mean field: q(z_l|x). p(z_l|z_{l+1})."""
    model, x = tiny(arch, 5, mean_field=neighbour is None), images(3).requires_grad_()
    assert model.order == ((0, 1, 2, 3, 4) if arch == "hvae" else (4, 3, 2, 1, 0))  # section 2.1
    z = latent_values(model.latent_shapes)
    posteriors, priors, *_ = infer_given(model, x, [z[level] for level in model.order])
    for level, (q, p) in enumerate(zip(posteriors, priors, strict=True)):
        others = [neighbour is not None and k == level + neighbour for k in range(5)]
        for parameter in (q.mean, q.stddev):
            assert moves(parameter, [x, *z]) == [True, *others]
        literal = model.prior(level, z[level + 1]) if level < 4 else Normal(p.mean * 0, 1)
        for parameter, expected in ((p.mean, literal.mean), (p.stddev, literal.stddev)):
            assert_same(parameter, expected)
            assert moves(parameter, [x, *z]) == [False, *(k == level + 1 for k in range(5))]
    if neighbour is None:
        for q, head, h in zip(posteriors, model.posterior_heads, model.features(x), strict=True):
            assert_same(torch.cat([q.mean, q.stddev]), torch.cat([head(h).mean, head(h).stddev]))
    loss = rewards.joint_loss(model, images(8), 0.9).value
    assert all(g.abs().max() > 0 for g in gradients(loss, model))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("skip", ["mean", "sample"])
def test_one_descent_equals_paths_one_by_one(arch, skip, fixed_noise):
    """And Markov: nothing above a level reaches the pixels. `sample` goes down from N(0, I)."""
    model = tiny(arch, 5)
    z = latent_values(model.latent_shapes)
    starts = [z[0][:2], None, z[2], z[3][:1], z[4][:2]]
    paths = [(row, k) for k, start in enumerate(starts) if k != 1 for row in start.split(1)]
    one_by_one = [skip_path(model, row, level, skip).sigmoid() for row, level in paths]
    model.infer(images(3))  # leaves nothing behind
    assert_same(model.decode(starts, skip).mean, torch.cat(one_by_one))
    for level in range(5):  # `generate` takes the lowest level given
        pixels = model.generate([None] * level + z[level:], skip).mean
        assert_same(pixels, skip_path(model, z[level], level, skip).sigmoid())
        assert moves(pixels, z) == [k == level for k in range(5)]
    with torch.random.fork_rng():  # what follows is drawn again
        pixels = model.sample(7).mean
    top = torch.randn(7, 2, dtype=torch.float64)
    assert_same(pixels, skip_path(model, top, 4, "sample").sigmoid())
    with pytest.raises(ValueError, match="unknown skip 'median'"):
        model.decode(starts, "median")
    with pytest.raises(ValueError, match="every start is None"):
        model.decode([None] * 5)


@pytest.mark.parametrize(("arch", "levels"), [("hvae", 3), ("lvae", 3), ("biva", 3), ("aae", 1)])
def test_representation_is_the_mean_given_means(arch, levels, monkeypatch):
    model, x = tiny(arch, levels), images(4)
    posteriors, _, means, _ = model.infer(x, sample=False)
    assert all(torch.equal(q.mean, z) for q, z in zip(posteriors, means, strict=True))
    assert not torch.equal(means[0], model.infer(x).latents[0])
    monkeypatch.setattr(Independent, "rsample", lambda q: q.mean)
    for z, expected in zip(means, model.infer(x).latents, strict=True):
        assert_same(z, expected)


def test_scale_is_one_at_zero():
    head = models.ToGaussian(4, 2, (3,)).double()
    torch.nn.init.zeros_(head.head.bias)
    assert_same(head(torch.zeros(2, 4, 2, 2).double()).stddev, torch.ones(2, 3).double())


def test_biva_is_conditioned_as_it_says():
    """q(z_l^BU|x, z_<l^BU), q(z_L|x, z_<L^BU), q(z_l^TD|x, z_<l^BU, z_>l), and p(z_l|z_>l)."""
    model, x = tiny("biva", 5), images(3).requires_grad_()
    shapes = [(s[0] // 2, *s[1:]) for s in model.latent_shapes[:4]]
    up, down = latent_values([*shapes, model.latent_shapes[4]]), latent_values(shapes)
    posteriors, priors, latents, pixels = infer_given(model, x, [*up, *reversed(down)])
    inputs = [x, *up, *down]  # up[4] is z_L
    for level, (q, p) in enumerate(zip(posteriors, priors, strict=True)):
        below, above = [k < level for k in range(5)], [k > level for k in range(5)]
        others = [k != level for k in range(5)]
        for q_parameter, p_parameter in ((q.mean, p.mean), (q.stddev, p.stddev)):
            bottom_up, top_down = q_parameter.chunk(2, dim=1)  # of z_L: two halves alike
            assert moves(bottom_up, inputs) == [True, *below, *[False] * 4]
            assert moves(top_down, inputs) == [True, *others, *above[:4]]
            for half in p_parameter.chunk(2, dim=1):
                assert moves(half, inputs) == [False, *above, *above[:4]]
        assert torch.equal(latents[level], torch.cat([up[level], *down[level : level + 1]], dim=1))
    assert moves(pixels.mean, inputs) == [False, *[True] * 9]


def test_biva_generates_what_it_infers(fixed_noise):
    """From the latents alone, lower levels from their priors; and the ELBO as it stands."""
    model, x = tiny("biva", 3), images(4)
    posteriors, priors, z, pixels = model.infer(x)
    assert model.latent_shapes == [(4, 4, 4), (8,), (3,)]
    assert_same(model.generate(z).mean, pixels.mean)
    for skip in ("mean", "sample"):
        z_2 = priors[1].mean if skip == "mean" else priors[1].rsample()
        by_skip = model.generate([z[0], None, z[2]], skip).mean
        assert_same(by_skip, model.generate([z[0], z_2, z[2]]).mean)
        assert (model.generate([None, *z[1:]], skip).mean - pixels.mean).abs().max() > 1e-6
    with pytest.raises(ValueError, match="top latent is None"):
        model.generate([*z[:2], None])
    loss, p = rewards.elbo_loss(model, x), pixels.mean
    log_px = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    literal = []
    for q, p in zip(posteriors, priors, strict=True):
        ratio, distance = q.stddev / p.stddev, (q.mean - p.mean) / p.stddev
        literal.append(((ratio**2 + distance**2) / 2 - 0.5 - ratio.log()).flatten(1).sum(1))
    assert_same(rewards.level_kl(model.infer(x)), torch.stack(literal))
    assert_same(loss.value, (sum(literal) - log_px).mean())
    assert all(g.abs().max() > 0 for g in gradients(loss.value, model))


def test_half_precision_never_reaches_likelihoods():
    model, x = tiny("lvae", 3, torch.float32), images(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inference = model.infer(x)
        decoded, paid = rewards.rewards(model, x, inference, rewards.level_kl(inference))
        means = [d.mean for d in inference.posteriors + inference.priors]
        logits = model.generate(inference.latents).base_dist.logits
        losses = [f(model, x, 0.9).value for f in (rewards.joint_loss, rewards.sampled_loss)]
    assert all(v.dtype == torch.float32 for v in (*decoded, paid, *losses, *means, logits))


# --------------------------------------------------------------------------------------------------
# likelihoods.py: colour images


def random_raw(channels: int, n: int, side: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, LogisticMixture.parameters(channels), side, side, dtype=dtype)


def eight_bit(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape).double() / 255


def literal_log_prob(raw: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Section 2.1 and 2.2 of PixelCNN++ as they stand, pixel by pixel, bin by bin, on floats."""
    channels, half = x.shape[0], 1 / 255
    total = torch.zeros((), dtype=torch.float64)
    for p, pixel in zip(raw.flatten(1).T.tolist(), (2 * x.flatten(1).T - 1).tolist(), strict=True):
        mean, log_scale = p[10:][: 10 * channels], p[10 + 10 * channels :][: 10 * channels]
        coefficient, probability = iter(p[10 + 20 * channels :]), 0.0
        for k in range(10):
            term = math.exp(p[k]) / sum(math.exp(v) for v in p[:10])
            for c in range(channels):
                m = mean[k * channels + c]
                m += sum(math.tanh(next(coefficient)) * pixel[before] for before in range(c))
                scale = math.exp(min(max(log_scale[k * channels + c], -7), 7))
                above = 1.0 if pixel[c] > 1 - half else expit((pixel[c] + half - m) / scale)
                below = 0.0 if pixel[c] < half - 1 else expit((pixel[c] - half - m) / scale)
                term *= above - below
            probability += term
        total += math.log(probability)
    return total


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_logistic_mixture_equals_the_literal_one(channels):
    assert LogisticMixture.parameters(3) == 100
    raw, x = random_raw(channels, 3, 2, torch.float64), eight_bit(3, channels, 2, 2)
    x[0, :, 0, 0], x[1, :, 0, 0] = 0, 1  # the open bins at both ends
    x[2, 0, 1, 1], x[2, -1, 1, 1] = 0, 1
    expected = torch.stack([literal_log_prob(*pair) for pair in zip(raw, x, strict=True)])
    assert_same(LogisticMixture(raw, channels).log_prob(x), expected)
    single = LogisticMixture(raw.float(), channels).log_prob(x.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)


def test_colour_paths_equal_the_literal_ones(fixed_noise):
    model, x = tiny("lvae", 3, image=(3, 8, 8), channels=4), eight_bit(4, 3, 8, 8)
    inference = model.infer(x)
    decoded = rewards.skip_paths(model, x, inference, [slice(None)] * 3)
    flat = LogisticMixture(skip_path(model, inference.latents[0], 0), 3)  # without patches
    assert_same(model.generate(inference.latents).mean, flat.mean)
    for level, z in enumerate(inference.latents):
        pairs = zip(skip_path(model, z, level), x, strict=True)
        assert_same(decoded[level], torch.stack([literal_log_prob(*pair) for pair in pairs]))


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("channels", "values"), [(1, 256), (2, 256), (3, 2), (3, 3), (3, 5)])
def test_probabilities_of_all_values_sum_to_one(channels, values, spread):
    """In single precision, over all joint values of the channels."""
    grid = torch.tensor(list(itertools.product(range(values), repeat=channels))) / (values - 1)
    n = 2 if len(grid) > 1000 else 16
    raw = random_raw(channels, n).repeat_interleave(len(grid), dim=0) * spread
    x = grid[..., None, None].repeat(n, 1, 1, 1)
    log_p = LogisticMixture(raw, channels, values=values).log_prob(x)
    torch.testing.assert_close(log_p.exp().view(n, -1).sum(1), torch.ones(n), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4, 1e6])
def test_likelihood_and_gradient_are_finite_whatever_the_parameters(size, dtype):
    raw = (random_raw(3, 40, 2) * size).to(dtype).requires_grad_()
    p, x = LogisticMixture(raw, 3), eight_bit(40, 3, 2, 2).float()
    x[::3], x[1::3] = 0, 1
    value = p.log_prob(x)
    value.sum().backward()
    assert torch.equal(value, LogisticMixture(raw.float(), 3).log_prob(x))
    assert value.isfinite().all() and raw.grad.isfinite().all() and raw.grad.abs().max() > 0
    for picture in (p.mean, p.sample()):
        assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1 + 1e-6


def test_gradient_of_the_mixture_against_finite_differences_and_autograd():
    raw, x = random_raw(3, 5, 2, torch.float64).requires_grad_(), eight_bit(5, 3, 2, 2)
    x[0], x[1] = 0, 1
    p, inputs, bounds = LogisticMixture(raw, 3), (raw, x.flatten(2)), dict(atol=1e-8, rtol=1e-6)
    torch.autograd.gradcheck(p._log_prob, inputs, eps=1e-6, **bounds, fast_mode=True)
    weight = torch.randn(5, dtype=torch.float64)
    expected = torch.autograd.grad(p._log_prob(*inputs) @ weight, raw)
    for chunk in (1, 8, 100):  # 1, 2 and all 5 images at once
        p.CHUNK = chunk
        assert_same(torch.autograd.grad(p.log_prob(x) @ weight, raw), expected)


@pytest.mark.parametrize(("channels", "values"), [(3, 4), (1, 256)])
def test_samples_have_the_probabilities(channels, values):
    """Chi-square over all joint values of the channels."""
    n, raw = 200_000, random_raw(channels, 1)
    drawn = LogisticMixture(raw.expand(n, -1, -1, -1), channels, values=values).sample()
    v = (drawn * (values - 1)).flatten(1)
    torch.testing.assert_close(v, v.round(), rtol=0, atol=1e-3)  # values there are
    grid = torch.tensor(list(itertools.product(range(values), repeat=channels)))
    place = torch.tensor([values**c for c in reversed(range(channels))])
    counts = torch.bincount((v.round().long() * place).sum(1), minlength=len(grid))
    every = LogisticMixture(raw.expand(len(grid), -1, -1, -1), channels, values=values)
    expected = n * every.log_prob(grid[..., None, None] / (values - 1)).double().exp()
    seen = expected > 5
    chi2 = ((counts - expected).square() / expected)[seen].sum().item()
    freedom = int(seen.sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_mean_of_the_mixture():
    """Exact for values that no bound cuts off, and the mean of many samples near the bounds."""
    inside, edge = random_raw(3, 400), random_raw(1, 400)  # scales of 1: much beyond the bounds
    inside[:, 10:40] *= 0.2
    inside[:, 40:70] = -4  # narrow, well inside
    inside[:, 70:] *= 0.3
    for raw, channels, bound in ((inside, 3, 0.02), (edge, 1, 0.04)):
        p, many = (LogisticMixture(raw.repeat(k, 1, 1, 1), channels) for k in (1, 300))
        by_sampling = torch.cat([many.sample().view(300, 400, -1) for _ in range(10)]).mean(0)
        torch.testing.assert_close(p.mean.view(400, -1), by_sampling, rtol=0, atol=bound)
    assert (p.mean.view(400, -1) - by_sampling).mean().abs() < 0.002


# --------------------------------------------------------------------------------------------------
# rewards.py


def literal_log_px(model, x, z1):
    p = model.pixels(model.decoder[0](z1)).mean
    return (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)


def literal(model, x, gamma, skip, pay="inferred", beta=1.0, free_bits=0.0):
    """As the equations stand, one path and one KL after another: the KLs, the rewards (Eq. 24), and
    ELBO (Eq. 5, 6), IVAE (Eq. 39), every Q_t (Eq. 26) and their sum (Eq. 28)."""
    levels = model.levels
    posteriors, _, z, _ = model.infer(x)
    log_px, kl, weighed = [], [], []
    for level in range(levels):
        value = z[level]
        for below in range(level - 1, -1, -1):
            p = model.prior(below, value)
            value = p.mean if skip == "mean" else p.rsample()
        log_px.append(literal_log_px(model, x, value))
        q = posteriors[level].base_dist
        if level == levels - 1:
            mean, scale = torch.zeros_like(q.loc), torch.ones_like(q.scale)
        else:
            p = model.prior(level, z[level + 1]).base_dist
            mean, scale = p.loc, p.scale
        d = torch.log(scale / q.scale) + (q.scale**2 + (q.loc - mean) ** 2) / (2 * scale**2) - 0.5
        kl.append(d.flatten(1).sum(1))
        free = kl[level].mean() < free_bits
        weighed.append(beta * (torch.full_like(kl[level], free_bits) if free else kl[level]))
    order = range(levels) if model.config.arch == "hvae" else range(levels)[::-1]
    paid = [weighed[k] if pay == "own" else sum(weighed[s] for s in order[: i + 1])
            for i, k in enumerate(order)]  # fmt: skip
    r = [log_px[k] - cost for k, cost in zip(order, paid, strict=True)]
    q_values = [sum(gamma ** (i - t) * r[i] for i in range(t, levels)) for t in range(levels)]
    cost = sum(weighed)
    return kl, r, [log_px[0] - cost, sum(log_px) / levels - cost, *q_values, sum(q_values)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("skip", ["mean", "sample"])
@pytest.mark.parametrize(
    "gamma, terms",
    [(0.0, ("inferred", 1, 0)), (0.9, ("inferred", 1, 0)), (1.0, ("inferred", 0.5, 0.2)),
     (0.9, ("own", 1, 0)), (0.8, ("own", 0.3, 0.2))],
)  # fmt: skip
def test_losses_equal_the_literal_transcription(arch, levels, skip, gamma, terms, fixed_noise):
    """Values, all gradients and the KL reported; of the rewards each image's own."""
    model, x, (pay, *weights) = tiny(arch, levels), images(3), terms
    terms = (gamma, skip, *terms)
    losses = [
        rewards.elbo_loss(model, x, *weights),
        rewards.ivae_loss(model, x, skip, False, *weights),
        *(rewards.stepwise_loss(model, x, t, *terms) for t in range(levels)),
        rewards.joint_loss(model, x, *terms),
    ]
    if levels == 1:  # the one path is every image's
        losses[-1:] = [rewards.sampled_loss(model, x, *terms)]
    for i, loss in enumerate(losses):
        kl, r, values = literal(model, x, *terms)
        assert_same(loss.value, -values[i].mean())
        assert_same(gradients(loss.value, model), gradients(-values[i].mean(), model))
        assert_same(loss.kl, torch.stack(kl).detach().mean(dim=1))
    inference = model.infer(x)
    kl = rewards.weigh_kl(rewards.level_kl(inference), *weights)
    for t in range(levels):
        decoded, paid = rewards.rewards(model, x, inference, kl, t, skip, pay)
        assert_same(torch.stack(decoded) - paid, torch.stack(r[t:]))
        assert_same(rewards.q_value(torch.stack(r[t:]), gamma), values[2 + t])
    assert_same(rewards.q_value(r, gamma, summed=True), values[-1])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n, levels, gamma", [(3, 2, 0.9), (4, 3, 0.5), (4, 2, 1.0), (3, 3, 0.0)])
@pytest.mark.parametrize("pay", ["inferred", "own", "ivae"])
def test_sampled_is_unbiased(arch, n, levels, gamma, pay, fixed_noise):
    """The exact expectation over all orders of the batch, value and gradient. Fewer images than
    paths take every path."""
    model, x, terms = tiny(arch, levels), images(n), dict(beta=0.5, free_bits=0.2)
    if pay == "ivae":
        whole, sampled = rewards.ivae_loss, partial(rewards.ivae_loss, sampled=True)
    else:
        whole, sampled = rewards.joint_loss, rewards.sampled_loss
        terms |= dict(gamma=gamma, pay=pay)
    values, grads = [], []
    for permutation in itertools.permutations(range(n)):
        loss = sampled(model, x[list(permutation)], **terms)
        values.append(loss.value)
        grads.append(gradients(loss.value, model))
    assert torch.stack(values).std() > 1e-3  # the estimate does depend on the order
    expected = whole(model, x, **terms)
    assert_same(torch.stack(values).mean(), expected.value)
    mean = [torch.stack(g).mean(dim=0) for g in zip(*grads, strict=True)]
    assert_same(mean, gradients(expected.value, model))
    assert_same(loss.kl, expected.kl)
    few = x[: levels - 1]
    assert_same(sampled(model, few, **terms).value, whole(model, few, **terms).value)


@pytest.mark.parametrize("arch", ARCHS)
def test_sampled_by_hand(arch, fixed_noise):
    """Each image's one path, and the KL of all images; 7 shared by the weights 1, 1.5, 1.75."""
    model, x = tiny(arch, 3), images(7)
    paths = [(1, 0, 2), (1.5, 2, 4), (1.75, 4, 7)]  # weight, first image, end; by step
    if arch == "lvae":
        paths = [(1, 5, 7), (1.5, 3, 5), (1.75, 0, 3)]
    kl, r, _ = literal(model, x, 0.5, "mean")
    paid = torch.stack(kl if arch == "hvae" else kl[::-1]).cumsum(dim=0)
    log_px = torch.stack(r) + paid
    value = sum(w * (paid[t].mean() - log_px[t, a:b].mean()) for t, (w, a, b) in enumerate(paths))
    assert_same(rewards.sampled_loss(model, x, 0.5).value, value)


def test_what_is_unknown_is_refused():
    for levels in (1, 3):
        model, x = tiny("hvae", levels), images(2)
        for name in ("skip", "pay"):
            with pytest.raises(ValueError, match=f"unknown {name} 'median'"):
                rewards.joint_loss(model, x, 0.9, **{name: "median"})


def test_path_counts():
    for gamma, levels in itertools.product((0.0, 0.5, 0.9, 0.98, 1.0), (1, 2, 5, 10)):
        weights = rewards.path_weights(levels, gamma)
        for n in (levels, levels + 1, 93, 128):
            counts = rewards.path_counts(n, weights)
            assert sum(counts) == n and min(counts) >= 1
            share = [n * w / sum(weights) for w in weights]
            assert n < 128 or counts == pytest.approx(share, abs=1.5)
    with pytest.raises(ValueError, match="2 images"):
        rewards.path_counts(2, [1, 1, 1])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "loss, args",
    [("elbo", [0.7]), ("stepwise", [1, 0.9, "sample"]), ("joint", [0.9, "sample"]),
     ("sampled", [0.9])],
)  # fmt: skip
def test_gradients_against_finite_differences(arch, loss, args, fixed_noise):
    model, x = tiny(arch, 3), images(6)
    call = partial(getattr(rewards, f"{loss}_loss"), model, x, *args)
    slopes = gradients(call().value, model)
    direction = [torch.randn_like(p) for p in model.parameters()]
    values, step = [], 1e-6
    for shift in (step, -2 * step):  # to one side of where the parameters are, then to the other
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += shift * d
        values.append(call().value.item())
    along = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True)).item()
    assert along == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("a", [0.5, -0.5])
def test_kl_given_a_sample_that_was_inferred_from_the_level(a):
    """q(z_1) = N(0, 1), z_2 = a z_1 + noise and p(z_1|z_2) = N(z_2, 1): the mean of the KLs lies
    above that of log q(z_1) / p(z_1|z_2) by the covariance of z_1 and the prior's mean, which is a,
    so on either side of it."""
    z1 = torch.randn(400_000, 1, dtype=torch.float64)
    z2 = a * z1 + 0.5 * torch.randn_like(z1)
    one = Inference([gaussian(0 * z1, z1**0)], [gaussian(z2, z1**0)], [z1])
    missed = rewards.level_kl(one)[0].mean() - rewards.log_ratios(one)[0].mean()
    assert missed.item() == pytest.approx(a, abs=0.01)


class LinearGaussian(nn.Module):
    """A model of one's own, x (B, 1): p(x|z_1), p(z_l|z_{l+1}) and q are linear and Gaussian."""

    NOISE = 0.5  # standard deviation of x given z_1 and of z_l given z_{l+1}

    def __init__(self, order: tuple[int, ...]):
        super().__init__()
        self.levels, self.order = len(order), order
        # From z_l to the mean of what is below, and from what step t sees to the posterior's mean.
        self.down = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in order)
        self.up = nn.ModuleList(nn.Linear(1 + (t > 0), 1) for t in range(len(order)))
        self.log_scale = nn.Parameter(torch.zeros(len(order)))

    def infer(self, x):
        posteriors, latents = [None] * self.levels, [None] * self.levels
        given = x  # and from the second step on the sample of the step before
        for t, level in enumerate(self.order):
            posteriors[level] = gaussian(self.up[t](given), self.log_scale[t].exp())
            latents[level] = posteriors[level].rsample()
            given = torch.cat([x, latents[level]], dim=1)
        priors = [self.below(level, latents[level]) for level in range(1, self.levels)]
        return Inference(posteriors, [*priors, gaussian(0 * x[:1], 0 * x[:1] + 1)], latents)

    def decode(self, starts, skip="mean"):
        rows = None
        for level in reversed(range(self.levels)):
            if starts[level] is not None:  # lower levels' rows come first
                rows = starts[level] if rows is None else torch.cat([starts[level], rows])
            if level > 0 and rows is not None:
                prior = self.below(level, rows)
                rows = prior.mean if skip == "mean" else prior.rsample()
        return self.below(0, rows)

    def below(self, level, z):
        """p(x|z_1) for level 0, else p(z_l|z_{l+1})."""
        return gaussian(self.down[level](z), torch.full_like(z, self.NOISE))


@torch.no_grad()
def exact_posterior(model: LinearGaussian, off: float = 0.0) -> torch.Tensor:
    """Sets q to the posterior, or to one shifted and too wide; returns the variance of x. From the
    covariance of (x, z_1, ..., z_L) = A (x, z_1, ..., z_L) + noise."""
    linear = torch.zeros(model.levels + 1, model.levels + 1, dtype=torch.float64)
    for level, layer in enumerate(model.down):
        linear[level, level + 1] = layer.weight.fill_(0.8 + 0.2 * level).item()
    noise = torch.tensor([model.NOISE**2] * model.levels + [1.0], dtype=torch.float64)
    spread = torch.linalg.inv(torch.eye(model.levels + 1, dtype=torch.float64) - linear)
    cov, given = spread @ noise.diag() @ spread.T, [0]
    for t, level in enumerate(model.order):
        weight = torch.linalg.solve(cov[given][:, given], cov[given, level + 1])
        variance = cov[level + 1, level + 1] - weight @ cov[given, level + 1]
        model.up[t].weight.copy_(weight[None])
        model.up[t].bias.fill_(off)
        model.log_scale[t] = 0.5 * (variance + off).log()
        given = [0, level + 1]
    return cov[0, 0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_importance_weighted_bound_against_the_exact_likelihood(order):
    """With the exact posterior every weight is p(x), whatever the sample: the log ratios see the
    whole divergence either way up, the closed forms bottom-up not even in the mean."""
    model, x = LinearGaussian(order).double(), torch.randn(500, 1, dtype=torch.float64)
    evidence = Normal(0 * x, exact_posterior(model).sqrt()).log_prob(x).squeeze(1)
    for k in (1, 7):
        assert_same(rewards.importance_weighted_bound(model, x, k), evidence)
    inference = model.infer(x.repeat(20, 1))
    missed = (rewards.level_kl(inference) - rewards.log_ratios(inference)).sum(dim=0).mean().item()
    assert (abs(missed) < 0.03) == (order[0] == 2), missed
    exact_posterior(model, off=0.3)
    samples, truth = (1, 5, 50, 3000), evidence.mean().item()
    bounds = [rewards.importance_weighted_bound(model, x, k, 9000).mean() for k in samples]
    assert bounds[0] < bounds[1] - 0.05 < bounds[2] - 0.05 < truth
    assert bounds[3] == pytest.approx(truth, abs=0.01)


def exact_q_values(model: LinearGaussian, x, gamma, skip):
    """sum_t Q_t in the mean over all noise, from the model's parameters. Every term is quadratic in
    the noise of the posteriors, so that noise of -1 and 1 has the same mean."""
    c, scales, total = model.NOISE**2, model.log_scale.exp(), 0
    for noise in itertools.product([-1.0, 1.0], repeat=model.levels):
        mean, z, given, paid = {}, {}, x, 0
        for t, level in enumerate(model.order):
            mean[level] = model.up[t](given)
            z[level] = mean[level] + scales[t] * noise[t]
            given = torch.cat([x, z[level]], dim=1)
        for t, level in enumerate(model.order):
            top, s = level == model.levels - 1, scales[t] ** 2
            p, v = (0, 1) if top else (model.down[level + 1](z[level + 1]), c)
            paid = paid + 0.5 * ((s + (mean[level] - p) ** 2) / v - 1 - (s / v).log())
            value, variance = z[level], 0  # of the mean of what is below
            for below in range(level, -1, -1):
                w = model.down[below].weight
                value, variance = w * value, w**2 * variance + c * (skip == "sample" and below > 0)
            log_px = -((x - value) ** 2 + variance) / (2 * c) - 0.5 * math.log(2 * math.pi * c)
            total = total + sum(gamma**i for i in range(t + 1)) * (log_px - paid)
    return total.mean() / 2**model.levels


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("skip", ["mean", "sample"])
def test_a_model_of_ones_own_learns_by_the_q_value(order, skip):
    """An update ascends the exact Q-values, and all three have their gradient in the mean."""
    model, x = LinearGaussian(order).double(), 1.5 * torch.randn(64, 1, dtype=torch.float64)
    before = exact_q_values(model, x, 0.9, skip)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        rewards.joint_loss(model, x, 0.9, skip).value.backward()
        optimizer.step()
    after = exact_q_values(model, x, 0.9, skip)
    assert after > before + 20
    exact = torch.cat([g.flatten() for g in gradients(-after, model)])
    many = x.repeat(4000, 1)[torch.randperm(64 * 4000)]  # 4000 samples of each x
    for value in (
        rewards.joint_loss(model, many, 0.9, skip).value,
        rewards.sampled_loss(model, many, 0.9, skip).value,
        sum(rewards.stepwise_loss(model, many, t, 0.9, skip).value for t in range(3)),
    ):
        assert value.item() == pytest.approx(-after.item(), rel=0.005)
        estimate = torch.cat([g.flatten() for g in gradients(value, model)])
        assert (estimate - exact).norm() < 0.03 * exact.norm()


def test_adversarial_losses_by_hand():
    """D(z) = sigmoid(discriminator(z)). The samples of the prior are what is drawn next."""
    model, x = tiny("aae", 1), images(4)
    torch.manual_seed(8)
    inference = model.infer(x)
    z, q = inference.latents[0], inference.posteriors[0].base_dist
    prior = torch.randn(4, 3, dtype=torch.float64)
    d_prior, d_z = (torch.sigmoid(model.discriminator(v)) for v in (prior, z))
    log_d = -(d_prior.log() + (1 - d_z).log()).mean(), -d_z.log().mean()
    by_hand = [-literal_log_px(model, x, z).mean(), *log_d]
    kl = (-q.scale.log() + (q.scale**2 + q.loc**2) / 2 - 0.5).sum(1).mean()
    for loss, expected in zip(train.losses({"arch": "aae"}, 1), by_hand, strict=True):
        torch.manual_seed(8)
        value, reported = loss(model, x)
        assert_same(value, expected)
        assert_same(reported, kl.detach().view(1))


def test_each_phase_of_the_adversarial_autoencoder_moves_its_own_parameters():
    """The discriminator's step lowers its loss, the encoder's step raises D(z of x)."""
    run = train.Run(settings.defaults({"arch": "aae", "channels": 4}), torch.device("cpu"))
    model, x, losses = run.model, images(6, 28, torch.float32), train.losses(run.config, 1)
    decoder, encoder = {"decoder", "to_pixels"}, {"stem", "encoder", "head"}
    moves = [encoder | decoder, {"discriminator"}, encoder]
    for loss, optimizer, expected in zip(losses, run.optimizers, moves, strict=True):
        before, values = {name: p.clone() for name, p in model.named_parameters()}, []
        for _ in range(30):
            torch.manual_seed(1)
            value = loss(model, x).value
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        after = model.named_parameters()
        moved = {name.split(".")[0] for name, p in after if not torch.equal(p, before[name])}
        assert moved == expected and values[-1] < values[0] - 0.01


# --------------------------------------------------------------------------------------------------
# evaluate.py


class Stub(nn.Module):
    """Its latents are functions of x (B, C, H, W), with noise where it samples."""

    def __init__(self, *levels, noise=0.0):
        super().__init__()
        self.functions, self.levels, self.noise = levels, len(levels), noise
        self.latent_shapes = [f(torch.zeros(1, 1, 1, 1)).shape[1:] for f in levels]
        self.register_buffer("zero", torch.zeros(()))

    def infer(self, x, sample=True):
        z = [f(x) for f in self.functions]
        return Inference([], [], [v + sample * self.noise * torch.randn_like(v) for v in z])


def recall(rows: torch.Tensor):
    return lambda x: rows[(x[:, 0, 0, 0] * 255).round().long()]  # of an image of the value i row i


def test_active_units_and_wide_maps():
    """Over batches, of vectors and of maps; maps too wide for the probe are averaged."""
    z = torch.randn(250, 16) * torch.tensor([0.0, 0.07, 0.13, 3.0] * 4) + 5
    maps = torch.stack([z, z * 0, z], dim=1).view(250, 3, 4, 4)
    pictures = torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 80, 80)
    model = Stub(recall(maps), recall(z), noise=9.0)
    assert evaluate.active_units(model, pictures) == [16, 8]
    for widest, side in ((None, 4), (20, 2), (2, 1)):
        by_hand = maps.view(250, 3, side, 4 // side, side, 4 // side).mean(dim=(3, 5)).flatten(1)
        representations = evaluate.representations(model, pictures, widest=widest)
        torch.testing.assert_close(representations, [by_hand, z])


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

    def by_sklearn(a, ya, b, yb, *steps, **options):
        for step in (StandardScaler(), *steps):
            a, b = step.fit_transform(a), step.transform(b)
        machine = OneVsOneClassifier(LinearSVC(dual=False, **options)).fit(a, ya)
        return 100 * machine.score(b, yb)

    many = z[:1200], labels[:1200], z[1200:], labels[1200:]  # 80 images a pair, a quarter is 20
    expected = by_sklearn(*many, PCA(20), tol=1e-2)
    assert evaluate.linear_probe(*many) == pytest.approx(expected, abs=0.5) and expected > 40
    a, b = labels[:1200] < 20, labels[1200:] < 20  # few classes keep all dimensions
    few = many[0][a], many[1][a], many[2][b], many[3][b]
    assert evaluate.linear_probe(*few) == pytest.approx(by_sklearn(*few), abs=0.3)
    # More than 512 dimensions: the leading 256 components.
    wide, kept = rng.normal(size=(40, 513)), []
    monkeypatch.setattr(evaluate, "principal_components", lambda *x: kept.append(x[2]) or x[:2])
    for z in (wide[:, 1:], wide):
        evaluate.linear_probe(z, labels[:40] % 2, z, labels[:40] % 2)
    assert kept == [256]


def test_probes_of_samples_and_of_binarised_images():
    """Of two classes at -1 and 1 with unit noise the best classifier has Φ(1) = 84.1 % of the
    samples right, of the means all. Where a quarter of a class's pixels comes out as the other
    class's, it has 3/4 of the binarised means right, and of their samples 3/4 Φ(1) + 1/4 Φ(-1)."""
    model = Stub(lambda x: 2 * x.flatten(1)[:, :1] - 1, noise=1.0)
    labels, phi = torch.arange(6000) % 2, 0.5 + 0.5 * math.erf(0.5**0.5)
    for kind, low, high, right, error in [
        ("mean", 0, 255, 1, 0),
        ("sample", 0, 255, phi, 1.6),  # 3 standard errors
        ("binarised-mean", 63.75, 191.25, 0.75, 2.1),
        ("binarised-sample", 63.75, 191.25, 0.75 * phi + 0.25 * (1 - phi), 2.1),
    ]:
        pictures = torch.where(labels == 1, high, low).to(torch.uint8).view(-1, 1, 1, 1)
        two = data.Data(pictures, labels, pictures[:5000], labels[:5000], ("0", "1"))
        found = evaluate.probes(model, two, kind=kind)
        assert found["z1"] == found["all"] == pytest.approx(100 * right, abs=error)
    drawn = evaluate.representations(model, pictures, binarised=True)[0]
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("arch, depth", [("hvae", 1), ("lvae", 1), ("biva", 1), ("lvae", 3)])
def test_densities_are_those_of_all_latents_together(arch, depth):
    """By log p(x, z) - log q(z|x) of each sample. They leave the random state and repeat."""
    model = baselines.build(tiny(arch, 3).config._replace(image=(depth, 8, 8)))
    pictures = torch.randint(0, 256, (250, depth, 8, 8), dtype=torch.uint8)
    before = torch.get_rng_state()
    measured, again = evaluate.densities(model, pictures, 3), evaluate.densities(model, pictures, 3)
    assert measured == again and torch.equal(before, torch.get_rng_state())
    assert evaluate.densities(model, pictures) == measured | {"iwae": None}

    def log_weights(inference, x):
        log_w = model.generate(inference.latents).log_prob(x)
        for q, p, z in zip(*inference[:3], strict=True):
            q, p = q.base_dist, p.base_dist
            ratio = (z - q.loc).square() / q.scale**2 - (z - p.loc).square() / p.scale**2
            log_w = log_w + (ratio / 2 + q.scale.log() - p.scale.log()).flatten(1).sum(dim=1)
        return log_w

    with torch.no_grad(), evaluate.seeded(torch.device("cpu"), 0):
        x = data.to_input(pictures)
        inference = model.infer(x)
        elbo, many = log_weights(inference, x), []
        for samples in (2, 1):  # of the importance-weighted bound, two images and more at once
            repeated = x.repeat(samples, 1, 1, 1)
            many += log_weights(model.infer(repeated), repeated).view(samples, 250)
        below = [model.generate([None] * k + inference.latents[k:]).log_prob(x) for k in range(3)]
    iwae = torch.stack(many).logsumexp(dim=0) - math.log(3)
    assert measured["elbo"] == pytest.approx(elbo.mean().item(), rel=1e-6)
    assert measured["iwae"] == pytest.approx(iwae.mean().item(), rel=1e-6)
    assert measured["log_px_given_z"] == pytest.approx([p.mean().item() for p in below], rel=1e-6)
    kl = rewards.level_kl(inference).mean(dim=1).tolist()
    assert measured["kl"] == pytest.approx(kl, rel=1e-5)


def test_an_evaluation_keeps_what_it_has():
    model = tiny("lvae", 2, torch.float32)
    pictures = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    labels = (pictures[:, :, :4].float().mean(dim=(1, 2, 3)) > 127).long()  # of the upper half
    few = data.Data(pictures[:100], labels[:100], pictures[100:], labels[100:], ("0", "1"))
    top = evaluate.evaluate(model, few, {"epoch": 3}, samples=2, probe="top")
    whole, measured = evaluate.probes(model, few), evaluate.densities(model, few.test, 2)
    a, b = (np.concatenate([r.double().numpy() for r in evaluate.representations(model, p)], axis=1)
            for p in (few.train, few.test))  # fmt: skip
    expected = evaluate.linear_probe(a, few.train_labels.numpy(), b, few.test_labels.numpy())
    assert a.shape == (100, 2 * 4 * 4 + 3) and list(whole) == ["z1", "z2", "all"]
    assert whole["all"] == pytest.approx(expected, abs=1)  # a in float64
    assert top == measured | {
        "epoch": 3, "probe": {"z2": whole["z2"]}, "mine": {}, "iwae_samples": 2,
        "bpd": pytest.approx(-measured["elbo"] / 64 / math.log(2)),
        "active_units": evaluate.active_units(model, few.test),
    }  # fmt: skip
    # The other levels are made anew; later what was measured is not, but for other samples.
    every = evaluate.evaluate(model, few, top, samples=2)
    assert every == top | {"probe": whole}
    marked = every | {"elbo": "kept", "probe": whole | {"z1": "kept"}}
    kind = "binarised-sample"
    more = evaluate.evaluate(model, few, marked, 2, "top", kind, mine_levels=(0,))
    assert more == marked | {
        "probe_binarised_sample": evaluate.probes(model, few, "top", kind),
        "mine": {"z1": evaluate.level_information(model, few, 0)},
    }
    again = evaluate.evaluate(model, few, marked | {"mine": {"z1": "kept"}}, 3, mine_levels=(0,))
    assert again["mine"] == {"z1": "kept"} and again["probe"] == marked["probe"]
    assert (again["elbo"], again["iwae_samples"]) == (top["elbo"], 3)
    quick = evaluate.quick_eval(model, few)
    assert quick == {"probe": whole["z2"], "kl": top["kl"], "elbo": top["elbo"]}
    few = few._replace(train_labels=None, test_labels=None)
    assert evaluate.probes(model, few) == {}
    assert quick.keys() - evaluate.quick_eval(model, few) == {"probe"}


def test_information_of_a_level(monkeypatch):
    """Of two pictures, uint8 as they are: a level that tells them apart has ln 2, noise has 0."""
    small = partial(mine.mutual_information, hidden=64, epochs=40, lr=5e-3)
    monkeypatch.setattr(mine, "mutual_information", small)
    pictures = torch.randint(0, 2, (1500, 1, 1, 1)).to(torch.uint8)
    two = data.Data(pictures[:1000], None, pictures[1000:], None, ())
    model = Stub(lambda x: 255 * x.flatten(1), lambda x: 0 * x.flatten(1), noise=0.1)
    for level, nats in enumerate((math.log(2), 0)):
        estimate = evaluate.level_information(model, two, level)
        assert estimate["ceiling"] == pytest.approx(math.log(2))
        assert estimate["nats"] == pytest.approx(nats, abs=0.05)


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
    estimate = mine.mutual_information(x, z, hidden=256, epochs=8 if dims < 20 else 12, lr=1e-3)
    assert estimate.nats == estimate.curve[-1] == pytest.approx(truth, abs=tolerance)
    assert estimate.ceiling == pytest.approx(math.log(6000))


def test_donsker_varadhan_with_the_true_density_ratio():
    rho = 0.8
    x, z = gaussian_pairs(20_000, 1, rho)

    def ratio(a, b):
        exponent = (rho**2 * (a**2 + b**2) - 2 * rho * a * b) / (2 * (1 - rho**2))
        return (-0.5 * math.log(1 - rho**2) - exponent).squeeze(-1)

    bound = mine.donsker_varadhan(ratio, x, z, torch.Generator().manual_seed(0))
    assert bound == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.02)


def test_mine_never_exceeds_its_ceiling(monkeypatch):
    """z = x has infinite mutual information; any statistic, however extreme, reads at most ln n."""
    x, generator = torch.randn(64, 3), torch.Generator().manual_seed(0)
    for sharpness in (1.0, 100.0, 1e4):
        bound = mine.donsker_varadhan(lambda a, b, s=sharpness: -s * (a - b).square().sum(-1),
                                      x, x, generator)  # fmt: skip
        assert bound <= math.log(64) + 1e-6
    assert bound == pytest.approx(math.log(64), abs=0.01)
    same = x[:16].repeat(5, 1)
    monkeypatch.setattr(mine, "donsker_varadhan", lambda *args: math.log(80))  # its own limit
    estimate = mine.mutual_information(same, same, (same, same), hidden=32, epochs=3)
    assert estimate.nats == estimate.ceiling == pytest.approx(math.log(16))


def test_mine_gradient_and_moving_average():
    """The mean of exp T has its gradient divided by its own moving average, not by itself. On the
    first batch they are the same, and the gradient is the bound's own."""
    average, by_hand, rate = mine.MovingLogMean(0.1), 0.0, 0.1
    for step in range(1, 5):
        joint, product = (torch.randn(50, dtype=torch.float64).requires_grad_() for _ in range(2))
        by_hand = (1 - rate) * by_hand + rate * product.exp().mean().item()
        corrected = by_hand / (1 - (1 - rate) ** step)
        found = torch.autograd.grad(mine.mine_loss(joint, product, average), [joint, product])
        assert_same(found[0], torch.full_like(joint, -1 / 50))
        assert_same(found[1], product.detach().exp() / 50 / corrected)
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
    for args in ((x, x[:9]), (x, x, (x, x[:3]))):
        with pytest.raises(ValueError, match="one z for each x"):
            mine.mutual_information(*args)
    for args in ((x[:4], x[:4]), (x[:1], x[:1], (x, x))):
        with pytest.raises(ValueError, match="2 pairs"):
            mine.mutual_information(*args)
    with pytest.raises(ValueError, match="1 epoch"):
        mine.mutual_information(x, x, (x, x), epochs=0)


# --------------------------------------------------------------------------------------------------
# data.py and files.py


HERE = Path(data.__file__).parent


def ends_in_one_line(capsys, error: BaseException, words: str) -> None:
    """A command that raises this ends with status 2 and one line of standard error."""
    with pytest.raises(SystemExit) as stop, files.one_line(files.Parser(prog="x.py")):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.search(f"^x.py: error: {words}", line), line


def test_errors_that_a_user_can_mend_end_in_one_line(capsys):
    no_memory = "out of memory: lower --batch-size.*--update sampled"
    captured = RuntimeError("capture failed")  # of a CUDA graph
    captured.__context__ = torch.OutOfMemoryError("CUDA")
    for error, words in [
        (files.UserError("choose another"), "choose another"),
        (
            OSError(28, "No space left", "eval.json.tmp"),
            "cannot .* eval.json.tmp: No space.*: make",
        ),
        (OSError("odd"), "cannot read or write a file: odd: make room"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), no_memory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), no_memory),
        (captured, no_memory),
    ]:
        ends_in_one_line(capsys, error, words)
    for bug in (ValueError("bug"), RuntimeError("bug"), KeyError("bug")):  # keeps its traceback
        with pytest.raises(type(bug), match="bug"), files.one_line(files.Parser()):
            raise bug
    with pytest.raises(SystemExit, match="130"), files.one_line(files.Parser()):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match="2"):
        files.Parser(prog="x.py").parse_args(["--flag"])
    assert capsys.readouterr().err == "x.py: error: unrecognized arguments: --flag\n"


@pytest.fixture
def full_disk():
    """A function after which no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, full_disk, capsys):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyError), files.writing(path) as beside:
        assert beside == tmp_path / "x.json.tmp" and beside.write_text("half")
        raise KeyError
    full_disk(1000)
    with pytest.raises(OSError) as failed:
        files.write_json(path, {"a": "b" * 2000})
    ends_in_one_line(capsys, failed.value, f"cannot read or write {path}.tmp: .* large: make room")
    with pytest.raises(RuntimeError) as failed, files.writing(path) as beside:
        torch.save(torch.zeros(1000), beside)  # tells neither the file nor the reason
    ends_in_one_line(capsys, failed.value, "cannot write a checkpoint: make room")
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------
# data.py: every data set is written here, small and in its official layout. A colour image is of
# one colour, which tells its class and its number there, so that each label can be checked.


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torchvision.datasets.CelebA, "download", unreachable)


def refuses(words: str, name: str, root: Path, **options) -> None:
    """Loading ends in one line that matches, and leaves nothing half."""
    with pytest.raises(files.UserError, match=words) as error:
        data.load(name, root, **options)
    assert len(str(error.value).splitlines()) == 1 and not list(root.rglob("*.tmp"))


def colours(labels, indices) -> torch.Tensor:
    return torch.stack([8 + 24 * torch.tensor(labels), 8 + 24 * torch.tensor(indices)], dim=1)


def assert_images(images, read, labels, numbers, side: int = 32, grey: int = 0) -> None:
    """Each image has the colour of its label and its number, but for so many grey ones. `read` are
    its labels as they were loaded, None where the data set has none."""
    assert images.shape == (len(labels), 3, side, side) and images.dtype == torch.uint8
    assert read is None or (read.dtype == torch.int64 and read.tolist() == list(labels))
    coloured = (images != images[:, :1]).flatten(1).any(dim=1)  # the others have equal channels
    assert (~coloured).sum() == grey
    expected = torch.cat([colours(labels, numbers), torch.full((len(labels), 1), 100)], dim=1)
    mean = images.float().mean(dim=(2, 3))
    assert (mean - expected)[coloured].abs().max() < 6  # up to what JPEG makes of it


def draw(path: Path, label: int, index: int, size=(64, 64), mode="RGB") -> None:
    """Writes a picture of the colour that assert_images expects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (*colours([label], [index])[0].tolist(), 100)
    PIL.Image.new("RGB", size, colour).convert(mode).save(path, quality=95)


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_fashion(root: Path, patch, where: str = "FashionMNIST/raw", suffix: str = "") -> Path:
    """20 and 10 images of noise. Their numbers, modulo 10, are their labels."""
    patch.setattr(data, "DEBIAN_FASHION", root / "debian")
    patch.setattr(data, "IDX", {n: (20 - 10 * ("t10k" in n), *s[1:]) for n, s in data.IDX.items()})
    for name, shape in data.IDX.items():
        noise = np.random.default_rng(len(name)).integers(0, 256, shape, np.uint8)
        labels = np.arange(shape[0], dtype=np.uint8) % 10
        write_idx(root / where / f"{name}{suffix}", noise if len(shape) == 3 else labels)
    return root / where


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("where", ["FashionMNIST/raw", "", "debian"])
def test_idx_layouts(tmp_path, monkeypatch, suffix, where):
    write_fashion(tmp_path, monkeypatch, where, suffix)
    d = data.load("fashionmnist", tmp_path, download=False)
    for images, labels, name in (
        (*d[:2], "train-images-idx3-ubyte"),
        (*d[2:4], "t10k-images-idx3-ubyte"),
    ):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        noise = np.random.default_rng(len(name)).integers(0, 256, data.IDX[name], np.uint8)
        assert np.array_equal(images.squeeze(1), noise)
        assert labels.tolist() == [i % 10 for i in range(len(images))]
    assert d.classes[9] == "Ankle boot" and len(d.classes) == 10


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, patch, name: str = "CIFAR10") -> Path:
    """Four images a file, with their checksums."""
    kind, prefix = getattr(torchvision.datasets, name), "fine_" * (name == "CIFAR100")
    folder = root / kind.base_folder
    folder.mkdir()
    for field in ("train_list", "test_list"):
        for b, (file, _) in enumerate(getattr(kind, field)):
            labels = [(b + i) % 3 for i in range(4)]
            rows = torch.cat([colours(labels, range(4)), torch.full((4, 1), 100)], dim=1)
            rows = rows.repeat_interleave(1024, dim=1).to(torch.uint8).numpy()
            content = {"data": rows, f"{prefix}labels": labels}
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({f"{prefix}label_names": ["cat", "dog", "ship"]}, protocol=2))
    patch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    return checked(kind, folder, patch)


def checked(kind: type, folder: Path, patch) -> Path:
    """Tells torchvision the checksums of what was written."""
    for field in ("train_list", "test_list"):
        sums = [[file, md5(folder / file)] for file, _ in getattr(kind, field)]
        patch.setattr(kind, field, sums)
    return folder


def write_stl10(root: Path, patch) -> Path:
    kind, folder = torchvision.datasets.STL10, root / "stl10_binary"
    write(folder / "class_names.txt", "airplane\nbird\ncar\n")
    for split, n in (("train", 6), ("test", 4), ("unlabeled", 7)):
        labels = [i % 3 for i in range(n)]
        images = torch.full((n, 3, 96, 96), 100, dtype=torch.uint8)
        images[:, :2] = colours(labels, range(n))[:, :, None, None]
        images[0, :, :48, 48:] = 255  # the upper right quarter of the first one: file order
        images.mT.numpy().tofile(folder / f"{split}_X.bin")  # column by column
        if split != "unlabeled":
            (np.uint8(labels) + 1).tofile(folder / f"{split}_y.bin")  # 1 to 10
    return checked(kind, folder, patch)


def test_stl10(tmp_path, monkeypatch):
    folder = write_stl10(tmp_path, monkeypatch)
    for _ in range(2):  # resized, then from what was kept
        d = data.load("stl10", tmp_path, unlabelled=True)
        assert_images(d.train[1:], d.train_labels[1:], [1, 2, 0, 1, 2], range(1, 6))
        assert_images(d.test[1:], d.test_labels[1:], [1, 2, 0], range(1, 4))
        assert_images(d.unlabelled[1:], None, [1, 2, 0, 1, 2, 0], range(1, 7))
        white = (d.train[0] > 250).all(dim=0)
        assert white[1:15, 17:31].all() and not white[:, :15].any() and not white[17:].any()
        assert d.classes == ("airplane", "bird", "car") and d.to_train_on is d.unlabelled
    few = data.load("stl10", tmp_path, unlabelled=True, train_images=2)
    assert [len(images) for images in (few.train, few.train_labels, few.unlabelled)] == [2, 2, 2]
    (folder / "unlabeled_X.bin").unlink()  # 2.6 GB that only --unlabelled needs
    shutil.rmtree(tmp_path / "decoded")
    d = data.load("stl10", tmp_path)
    assert d.unlabelled is None and d.to_train_on is d.train
    refuses("lacks unlabeled_X.bin", "stl10", tmp_path, unlabelled=True)
    np.uint8([1, 2]).tofile(folder / "train_y.bin")
    refuses("2 train labels for 6 images", "stl10", tmp_path)


WNIDS = ("n03444034", "n01443537", "n02002724")  # as wnids.txt lists them: not sorted
VAL = [sorted(WNIDS).index(WNIDS[i % 3]) for i in range(12)]  # labels


def write_tinyimagenet(root: Path, patch=None, per_class: int = 4) -> Path:
    """Three classes; image 1 of each is grey, as some of the real are."""
    base, lines = root / "tiny-imagenet-200", []
    for label, wnid in enumerate(sorted(WNIDS)):
        write(base / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        for i in range(per_class):
            file = base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            draw(file, label, i, mode="L" if i == 1 else "RGB")
    for i, label in enumerate(VAL):  # val_10 sorts before val_2
        draw(base / "val/images" / f"val_{i}.JPEG", label, i % 10)
        lines.append(f"val_{i}.JPEG\t{sorted(WNIDS)[label]}\t0\t32\t44\t62\n")
    write(base / "val/val_annotations.txt", "".join(lines))
    draw(base / "test/images/test_0.JPEG", 0, 0)
    write(base / "wnids.txt", "".join(f"{wnid}\n" for wnid in WNIDS))
    words = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02002724\tblack stork\n"
    write(base / "words.txt", words)
    return base


def pack(folder: Path) -> Path:
    """The folder as a zip beside it, and no folder."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return folder.with_suffix(".zip")


def write_celeba(root: Path, patch=None, table: str = "txt") -> Path:
    base, lines = root / "celeba", ["image_id,partition"] * (table == "csv")
    for i in range(9):
        file = base / "img_align_celeba" / f"{i + 1:06}.jpg"
        draw(file, i % 4, i, size=(178, 218))
        with PIL.Image.open(file) as image:
            image.paste((255, 255, 255), (0, 0, 178, 30))  # above the middle 148 rows
            image.save(file, quality=95)
        lines.append(f"{file.name}{',' if table == 'csv' else ' '}{(0, 0, 1, 2)[i % 4]}")
    write(base / f"list_eval_partition.{table}", "\n".join(lines) + "\n")
    return base


def write_folder(root: Path, patch=None, classes=("a", "b")) -> Path:
    """Images of several formats, sizes and modes, in class folders or in none."""
    kinds = [((40, 40), "png", "RGB"), ((90, 50), "jpg", "RGB"), ((30, 70), "png", "RGBA"),
             ((32, 32), "BMP", "RGB"), ((200, 32), "webp", "RGB")]  # fmt: skip
    for split, n in (("train", 5), ("test", 3)):
        for label, name in enumerate(classes):
            for i, (size, suffix, mode) in enumerate(kinds[:n]):
                draw(root / split / name / f"{i}.{suffix}", label, i, size, mode)
            write(root / split / name / "notes.txt", "no image")
            write(root / split / name / "._0.png", "of macOS")
    return root


@pytest.mark.parametrize(("name", "batches"), [("CIFAR10", 5), ("CIFAR100", 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, monkeypatch, name, batches, packed):
    """The unpacked folder, and the archive alone, of which the folder is unpacked offline."""
    folder, kind = write_cifar(tmp_path, monkeypatch, name), getattr(torchvision.datasets, name)
    if packed:
        with tarfile.open(tmp_path / kind.filename, "w:gz") as archive:
            archive.add(folder, arcname=folder.name)
        monkeypatch.setattr(kind, "tgz_md5", md5(tmp_path / kind.filename))
        shutil.rmtree(folder)
    d = data.load(name.lower(), tmp_path)
    labels = [(b + i) % 3 for b in range(batches) for i in range(4)]
    assert_images(d.train, d.train_labels, labels, [0, 1, 2, 3] * batches)
    assert_images(d.test, d.test_labels, [0, 1, 2, 0], range(4))
    assert d.classes == ("cat", "dog", "ship") and d.unlabelled is None


@pytest.mark.parametrize("layout", ["folder", "zip", "inside"])
def test_tinyimagenet(tmp_path, layout):
    base = write_tinyimagenet(tmp_path)
    if layout == "zip":
        pack(base)
    order = [0, 1, 10, 11, *range(2, 10)]  # of the file names
    for _ in range(2):
        d = data.load("tinyimagenet", base if layout == "inside" else tmp_path)
        labels = [0] * 4 + [1] * 4 + [2] * 4
        assert_images(d.train, d.train_labels, labels, [0, 1, 2, 3] * 3, side=64, grey=3)
        labels = [VAL[i] for i in order]
        assert_images(d.test, d.test_labels, labels, [i % 10 for i in order], side=64)
        assert d.classes == ("goldfish", "black stork", "n03444034")


@pytest.mark.parametrize("layout", ["torchvision", "zip", "csv", "flat"])
def test_celeba(tmp_path, layout):
    """The white strip above the middle is cut off."""
    base = write_celeba(tmp_path, table="csv" if layout == "csv" else "txt")
    if layout == "zip":
        pack(base / "img_align_celeba")
    d = data.load("celeba", base if layout == "flat" else tmp_path)
    assert_images(d.train, None, [0, 1, 0, 1, 0], [0, 1, 4, 5, 8], side=64)
    assert_images(d.test, None, [3, 3], [3, 7], side=64)
    assert d.train_labels is d.test_labels is None and d.classes == ()


@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("classes", [("a", "b"), ("",), ("all",)])
def test_folder(tmp_path, side, classes):
    """In class folders, in none, and in a single one, which says no more than none."""
    d, n = (
        data.load("folder", write_folder(tmp_path, classes=classes), image_size=side),
        len(classes),
    )
    assert data.image_shape("folder", side) == (3, side or 32, side or 32)
    labels = [0] * 5 + [1] * 5 * (n - 1)
    assert_images(d.train, d.train_labels, labels, [0, 1, 2, 3, 4] * n, side or 32)
    assert_images(d.test, d.test_labels, [0] * 3 + [1] * 3 * (n - 1), [0, 1, 2] * n, side or 32)
    assert d.classes == (("a", "b") if n == 2 else ()) and (d.train_labels is None) == (n == 1)


def test_images_are_the_middle_square_resized(tmp_path):
    """Against Pillow, crop and resize apart, and no step for what has the size already."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (80, 48), (33, 71)]
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i, p in enumerate(pictures):
            p.save(tmp_path / split / f"{i}.png")
    images = data.load("folder", tmp_path).train.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[0], np.asarray(pictures[0]))
    for i, (w, h) in enumerate(sizes[1:], start=1):
        side = min(w, h)
        left, top = (w - side) // 2, (h - side) // 2
        square = pictures[i].crop((left, top, left + side, top + side))
        by_pillow = np.asarray(square.resize((32, 32), PIL.Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(images[i] - by_pillow)[2:-2, 2:-2].max() <= 1


def test_pictures_are_decoded_once_and_again_when_the_source_changes(tmp_path, monkeypatch):
    base, decode, calls = write_tinyimagenet(tmp_path), files.decode, []
    monkeypatch.setattr(files, "decode", lambda *a: calls.append(a) or decode(*a))

    def load(expected: int) -> data.Data:
        calls.clear()
        d = data.load("tinyimagenet", tmp_path)
        assert len(calls) == expected
        return d

    load(24)
    first = load(0)
    image = base / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    draw(image, 2, 9)  # another image in its place
    assert (load(12).train[8, 1].float().mean() - 8) / 24 > 8.5
    assert (first.train[8, 1].float().mean() - 8) / 24 < 0.5  # an open map keeps what it had
    more = image.with_name(f"{WNIDS[0]}_7.JPEG")
    draw(more, 2, 5)  # one more
    d = load(13)
    assert len(d.train) == 13 and len(d.train_labels) == 13
    more.unlink()  # gone
    load(12)
    kept = tmp_path / "decoded" / "tinyimagenet-train.npy"
    kept.with_suffix(".source").unlink()  # killed before the mark was set
    load(12)
    kept.unlink()
    load(12).train[0] = 0  # copy on write: never reaches the file
    assert load(0).train[0].max() > 0
    assert len(list(kept.parent.iterdir())) == 4


def test_decoding_that_is_killed_or_finds_no_room_leaves_nothing_half(tmp_path, full_disk, capsys):
    write_tinyimagenet(tmp_path, per_class=2)
    script = textwrap.dedent("""
        import os, signal, sys
        import data, files
        decode = files.decode
        def killed(path, *args):
            if "train" in str(path) and path.name.endswith("_1.JPEG"):
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(path, *args)
        files.decode, files.BLOCK = killed, 1
        data.load("tinyimagenet", sys.argv[1])
    """)
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=HERE, check=False)
    assert killed.returncode == -signal.SIGKILL
    kept = tmp_path / "decoded"
    assert not list(kept.glob("*.npy")) and [f.unlink() for f in kept.glob("*.tmp")]
    full_disk(50_000)
    with pytest.raises(OSError) as failed:
        data.load("tinyimagenet", tmp_path)
    ends_in_one_line(capsys, failed.value, "cannot read or write .*decoded/tinyimagenet-train")
    assert not list(kept.iterdir())


def cut(path: Path, size: int = 200) -> None:
    path.write_bytes(path.read_bytes()[:size])


def damage(archive: Path) -> None:
    raw = archive.read_bytes()
    middle = raw.rindex(b"JFIF") + 300  # of an image
    archive.write_bytes(raw[:middle] + bytes(50) + raw[middle + 50 :])


IDX = "train-images-idx3-ubyte"
NO_IDX = f"{IDX}.* is not a whole IDX file of shape .20, 28, 28.*delete it"
NO_ZIP = "zip cannot be unpacked.*get it again"
MISTAKES = {  # in a whole data set, whose folder is f
    ("fashionmnist", write_fashion): [
        (shutil.rmtree, "unreachable.*put the four.*apt-get.*--data-dir.*digits"),
        (lambda f: (f / IDX).unlink(), f"raw lacks {IDX} .*unreachable"),
        (lambda f: cut(f / IDX, -5), NO_IDX),
        (lambda f: (f / IDX).write_bytes(b"<html>" * 99), NO_IDX),
        (lambda f: write_idx(f / IDX, np.zeros((20, 32, 32), np.uint8)), NO_IDX),
        (lambda f: write_idx(f / "train-labels-idx1-ubyte", np.zeros(19, np.uint8)), "shape .20,"),
    ],
    ("fashionmnist", partial(write_fashion, suffix=".gz")): [
        (lambda f: cut(f / f"{IDX}.gz", -9), f"{IDX}.gz is not a whole IDX file"),
    ],
    ("cifar10", write_cifar): [
        (shutil.rmtree, "unreachable.*put cifar-10"),
        (lambda f: (f / "data_batch_2").unlink(), "lacks data_batch_2.*unreachable"),
    ],
    ("cifar100", partial(write_cifar, name="CIFAR100")): [
        (lambda f: cut(f / "test", -1), "lacks test, or it is damaged.*unreachable"),
    ],
    ("stl10", write_stl10): [
        (shutil.rmtree, "unreachable.*put stl10_binary"),
        (lambda f: (f / "test_y.bin").unlink(), "lacks test_y.bin.*unreachable"),
        (lambda f: cut(f / "train_X.bin", -1), "lacks train_X.bin, or it is damaged"),
    ],
    ("tinyimagenet", write_tinyimagenet): [
        (shutil.rmtree, "neither.*unreachable.*put tiny-imagenet-200.zip"),
        (lambda f: shutil.rmtree(f / "train" / WNIDS[1]), f"no images of {WNIDS[1]}"),
        (lambda f: cut(f / "val/val_annotations.txt", -33), "val lacks val_11.JPEG or"),
        (lambda f: (f / "val/images/val_3.JPEG").unlink(), "val lacks val_3.JPEG or its"),
        (lambda f: cut(pack(f), 5000), NO_ZIP),
        (lambda f: damage(pack(f)), NO_ZIP),
        (lambda f: pack(f).write_bytes(b"<html>"), NO_ZIP),
    ],
    ("celeba", write_celeba): [
        (shutil.rmtree, "celeba lacks.*unreachable.*put img_align_celeba.zip"),
        (lambda f: (f / "list_eval_partition.txt").unlink(), "lacks list_eval.*unreachable"),
        (lambda f: shutil.rmtree(f / "img_align_celeba"), "lacks .*img_align.*unreachable"),
        (lambda f: (f / "img_align_celeba/000005.jpg").unlink(), "000005.jpg and 0 more images"),
    ],
    ("folder", write_folder): [
        (lambda f: shutil.rmtree(f / "test"), "needs images in train/ and test/"),
        (lambda f: draw(f / "train/x.png", 0, 0), "train has images beside the class folders"),
        (lambda f: (f / "test/b").rename(f / "test/c"), "test has the class 'c', which .*train"),
        (lambda f: draw(f / "test/x.png", 0, 0), "test has images outside the class folders"),
        (lambda f: cut(f / "train/a/1.jpg"), "a/1.jpg is not a whole image"),
        (lambda f: write(f / "train/b/0.png", "x"), "b/0.png is not a whole image"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make", "spoil", "words"), [(*k, *row) for k, rows in MISTAKES.items() for row in rows]
)
def test_broken_data_end_in_one_line(tmp_path, monkeypatch, name, make, spoil, words):
    spoil(make(tmp_path, monkeypatch))
    refuses(words, name, tmp_path)
    if "unreachable" in words:
        refuses(f"^{name}: .*Ways to get it", name, tmp_path, download=False)


def test_digits():
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
    read = torch.cat([d.train_labels, d.test_labels])
    assert (read == torch.from_numpy(labels)[nearest]).float().mean() > 0.995
    assert torch.bincount(d.test_labels).min() >= 34  # stratified


REAL = {  # folder, shape, and each channel's mean and deviation, which the set is known by
    "mnist": ("MNIST", (1, 28, 28), [(0.1307, 0.3081)]),
    "fashionmnist": ("FashionMNIST", (1, 28, 28), [(0.2860, 0.3530)]),
    "cifar10": ("cifar-10-batches-py", (3, 32, 32),
                [(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_data(name):
    base, shape, known = REAL[name]
    folder = Path(os.environ.get("DATA_DIR", "nowhere"))
    if not (folder / base).is_dir() and not (base[0] == "F" and data.DEBIAN_FASHION.is_dir()):
        pytest.skip(f"no {base}: name its folder in DATA_DIR")
    d = data.load(name, folder, download=False)
    assert d.train.shape[1:] == d.test.shape[1:] == shape and len(d.test) == 10_000
    for channel, (mean, std) in enumerate(known):
        values = d.train[:, channel].float() / 255
        assert values.mean().item() == pytest.approx(mean, abs=1e-4)
        assert values.std().item() == pytest.approx(std, abs=1e-4)
    if name == "mnist":
        for train, images, labels in ((True, *d[:2]), (False, *d[2:4])):
            reference = torchvision.datasets.MNIST(folder, train=train)
            assert torch.equal(images.squeeze(1), reference.data)
            assert torch.equal(labels, reference.targets)
        return
    for labels in (d.train_labels, d.test_labels):
        assert torch.bincount(labels).tolist() == [len(labels) // 10] * 10
    if name == "cifar10":
        assert d.classes[0] == "airplane" and d.classes[9] == "truck"
        planes = d.train[d.train_labels == 0].float().mean(dim=(0, 2, 3))  # the sky is blue
        assert planes[2] > planes[1] > planes[0]
    else:
        trousers = d.train[d.train_labels == 1].float().mean(dim=(0, 1))
        assert trousers[14:, :5].max() < 20 < 100 < trousers[14:, 10:18].mean()


def test_the_first_images_and_black_and_white():
    d, part = data.load("digits"), data.load("digits", train_images=100)
    assert torch.equal(part.train, d.train[:100]) and torch.equal(part.test, d.test)
    assert torch.equal(part.train_labels, d.train_labels[:100]) and part.unlabelled is None
    white = data.load("digits", threshold=True)
    for grey, images in ((d.train, white.train), (d.test, white.test)):
        assert images.dtype == torch.uint8 and 0 < (grey == 127).sum() < grey.numel()
        assert images.numpy().tolist() == np.where(grey.numpy() >= 127.5, 255, 0).tolist()
        assert torch.equal(data.to_input(images), data.to_unit(images))  # nothing is drawn
    assert torch.equal(white.train_labels, d.train_labels)


def test_options_that_a_data_set_lacks():
    for name, options, words in [
        ("digits", {"unlabelled": True}, "--unlabelled is for --dataset stl10"),
        ("cifar10", {"threshold": True}, "--threshold is for grey images"),
        ("mnist", {"image_size": 32}, "--image-size is for --dataset folder"),
        ("folder", {"image_size": 4}, "--image-size 4: choose from 8 to 1024 pixels"),
        ("digits", {"train_images": 2000}, "--train-images 2000: there are 1,437"),
    ]:
        refuses(words, name, Path("nowhere"), **options)


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


def test_binarisation_has_the_pixels_as_its_mean():
    grey = torch.tensor([0, 1, 64, 128, 254, 255], dtype=torch.uint8)
    x = data.binarize(grey.expand(200_000, 6))
    assert set(x.unique().tolist()) == {0, 1} and x.dtype == torch.float32
    assert x[:, 0].sum() == 0 and x[:, 5].min() == 1
    torch.testing.assert_close(x.mean(dim=0), grey / 255, rtol=0, atol=0.005)
    colours = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    assert torch.equal(data.to_input(colours), colours / 255)


def test_devices():
    cpu, d = torch.device("cpu"), data.load("digits")
    assert data.pick_device("cpu") == cpu and data.place(d, cpu) is d
    assert data.pick_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:x", "cpu:1"):
        with pytest.raises(files.UserError, match="unknown device"):
            data.pick_device(name)
    with pytest.raises(files.UserError, match=r"no CUDA device here.*--device cpu"):
        data.pick_device("cuda:99")
    assert data.pick_dtype("float32", cpu) == torch.float32
    assert data.pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# train.py and settings.py


CUDA = torch.cuda.is_available()


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


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


def metrics_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(a, b) -> None:
    """Bit for bit the same parameters, optimiser, random state, sums and metrics."""
    one, two = (evaluate.load_checkpoint(Path(folder)) for folder in (a, b))
    for key in ("model", "ema", "optimizers", "rng", "sums", "epoch", "batch", "updates"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    assert metrics_of(a) == metrics_of(b)


def run_of(*flags: str, device: str = "cpu") -> train.Run:
    given = vars(settings.parser().parse_args([*TINY, "--out", "nowhere", *flags]))
    return train.Run(settings.defaults(given), torch.device(device))


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
    """Stopped in the middle of an epoch, at an epoch's end, and before the last update."""
    flags = [*TINY, "--epochs", "3", "--batch-size", "64", "--eval-every", "2", "--warmup", "2"]
    flags += objective
    train.main([*flags, "--out", str(tmp_path / "whole")])
    for at, stop_signal in [(3, signal.SIGINT), (5, signal.SIGTERM), (10, signal.SIGINT)]:
        out = str(tmp_path / f"parts{at}")
        calls = itertools.count(1)

        def to_input(x, at=at, calls=calls, number=stop_signal):
            if next(calls) == at:
                signal.raise_signal(number)
            return data.to_input(x)

        with monkeypatch.context() as patch:
            patch.setattr(train, "to_input", to_input)
            with pytest.raises(SystemExit) as stop:
                train.main([*flags, "--out", out])
        assert stop.value.code == 128 + stop_signal
        state = evaluate.load_checkpoint(Path(out))
        assert state["epoch"] * 5 + state["batch"] == at
        assert "--resume" in capsys.readouterr().out and not Path(out, "eval.json").exists()
        train.main(["--resume", out])
        assert_same_run(tmp_path / "whole", out)
        assert Path(out, "eval.json").exists()
    if "cosine" in objective:  # whose learning rate depends on how long the run is to be
        return
    out = str(tmp_path / "more")
    train.main([*flags, "--epochs", "1", "--out", out])
    train.main([*flags, "--epochs", "3", "--out", out, "--resume"])
    assert_same_run(tmp_path / "whole", out)


KILLED = """
import os, signal, sys
import torch, data, evaluate, train
d = data.load("digits")
few = data.Data(d.train[:300], d.train_labels[:300], d.test[:60], d.test_labels[:60], ())
evaluate.load = lambda *a, **k: few
train.SAVE_EVERY = 0
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
"""


def test_killed_while_writing_a_checkpoint(few, tmp_path):
    """kill -9 in the middle of a write, and of a metrics line: the run goes on from what was."""
    flags = [*TINY, "--rl", "--epochs", "3", "--batch-size", "64"]
    out = str(tmp_path / "killed")
    killed = subprocess.run([sys.executable, "-c", KILLED, "9", *flags, "--out", out], cwd=HERE,
                            capture_output=True, check=False)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    # The first save is of the beginning, so the eighth update's was being written.
    assert evaluate.load_checkpoint(Path(out))["updates"] == 7
    train.main([*flags, "--out", out, "--resume"])
    train.main([*flags, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", out)


def test_a_loss_that_is_not_finite_stops_the_run(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    flags = [*TINY, "--out", str(tmp_path), "--lr", "1e18", "--epochs", "9"]
    fails(capsys, flags, r"not finite in epoch \d+, by update \d+: try a lower --lr.*last good")
    state = evaluate.load_checkpoint(tmp_path)
    assert all(v.isfinite().all() for v in state["model"].values())


def test_a_full_disk_keeps_what_was_written(few, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1"])
    before = (out / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a write past 10 kB fails
    try:
        fails(capsys, ["--resume", str(out), "--epochs", "2"], "cannot .*checkpoint.*kept")
        fails(capsys, [*TINY, "--out", str(tmp_path / "new")], "cannot .*checkpoint")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / "checkpoint.pt").read_bytes() == before
    assert [p.name for p in out.iterdir() if p.suffix == ".tmp"] == []
    train.main(["--resume", str(out), "--epochs", "2"])
    assert evaluate.load_checkpoint(out)["epoch"] == 2


def test_a_run_end_to_end(few, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*TINY, "--arch", "hvae", "--rl", "--epochs", "2", "--eval-every", "1"]
    train.main([*argv, "--out", str(out)])
    text = capsys.readouterr().out
    for words in ("hvae, small, levels 4,2", "gamma 0.9, sampled updates", "Algorithm 1",
                  "300 training", "cpu", "--size paper", str(out), "z2", "per dim"):  # fmt: skip
        assert words in text
    lines = metrics_of(out)
    assert [line["epoch"] for line in lines] == [1, 2] and len(lines[0]["kl"]) == 2
    assert set(lines[0]["test"]) == {"probe", "kl", "elbo"}
    config = json.loads((out / "config.json").read_text())
    assert config["rl"] and config["latents"] == "4,2" and config["epochs"] == 2
    kept = json.loads((out / "eval.json").read_text())
    assert (kept["arch"], kept["rl"], kept["dataset"]) == ("hvae", True, "digits")
    assert set(kept["probe"]) == {"z1", "z2", "all"} and kept["mine"] == {}
    for key in ("kl", "active_units", "log_px_given_z"):
        assert len(kept[key]) == 2
    assert kept["bpd"] == pytest.approx(-kept["elbo"] / 784 / math.log(2))

    # What else is asked for is measured and kept beside it; what is there is not made again.
    evaluate.main([str(out), "--mine", "1,2", "--probe-of", "sample", "--json"])
    more = json.loads(capsys.readouterr().out)
    assert more == json.loads((out / "eval.json").read_text())
    assert {k: v for k, v in more.items() if k not in ("mine", "probe_sample")} | {
        "mine": {}
    } == kept
    assert set(more["mine"]) == {"z1", "z2"} and set(more["probe_sample"]) == {"z1", "z2", "all"}
    (out / "eval.json").unlink()
    evaluate.main([str(out), "--samples", "4", "--json", "--probe", "top"])
    again = json.loads(capsys.readouterr().out)
    assert again["probe"] == {"z2": kept["probe"]["z2"]} and again["elbo"] == kept["elbo"]
    evaluate.main([str(out), "--mine", "2"])
    assert "at most 4.09" in capsys.readouterr().out  # ln 60 test images

    fails(capsys, [*argv, "--out", str(out)], "holds a run already: --resume.*--overwrite.*--out")
    train.main([*argv, "--out", str(out), "--overwrite", "--epochs", "1"])
    assert len(metrics_of(out)) == 1 and evaluate.load_checkpoint(out)["epoch"] == 1
    train.main(["--resume", str(out)])  # nothing left to do: it shows the evaluation
    assert "z2" in capsys.readouterr().out
    model, config = evaluate.load_run(out)
    assert [z.shape for z in evaluate.representations(model, few.test)] == [(60, 4), (60, 2)]
    assert not model.training and config["arch"] == "hvae"


def test_settings_of_the_paper():
    rl = settings.defaults({"size": "paper", "rl": True})
    assert (rl["lr"], rl["batch_size"], rl["epochs"], rl["update"]) == (3e-4, 128, 200, "stepwise")
    assert rl["warmup"] == 0 and rl["free_bits"] == 0
    baseline = settings.defaults({"size": "paper"})
    assert (baseline["epochs"], baseline["warmup"]) == (1000, 200)
    assert (baseline["free_bits"], baseline["free_bits_epochs"]) == (2.0, 400)
    assert settings.defaults({"size": "paper", "rl": True, "levels": 2})["epochs"] == 500
    assert settings.defaults({"size": "paper", "warmup": 7, "lr": 0.1})["warmup"] == 7
    assert settings.kl_weight(baseline, 50.0) == (0.25, 2.0)
    assert settings.kl_weight(baseline, 400.0) == (1.0, 0.0)
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
        ({"arch": "hvae"} | fashion, 0), ({}, 0),
        ({"rl": True, "epochs": 5} | fashion, 2), ({"rl": True, "epochs": 1} | fashion, 1),
        ({"rl": True, "epochs": 5, "warmup": 9} | fashion, 9),
        ({"rl": True, "size": "best"} | fashion, 20), ({"size": "best"} | fashion, 0),
        ({"rl": True, "size": "best", "epochs": 6} | fashion, 3),
    ):  # fmt: skip
        assert settings.defaults(flags)["warmup"] == warmup


def test_every_flag_is_read(monkeypatch):
    """At most 36 options, and a run or its command looks at each."""
    options = settings.parser()._actions
    assert len(options) <= 36
    source = "".join(
        (HERE / f"{name}.py").read_text() for name in ("train", "settings", "evaluate")
    )
    for option in options:
        if option.dest != "help":
            assert source.count(f'"{option.dest}"') >= 1, option.dest


def test_losses_of_a_run():
    """Algorithm 1 makes one update a level; the other objectives one."""
    steps = train.losses(settings.defaults({"rl": True, "update": "stepwise"}), 5, 0.5, 2.0)
    assert [s.keywords["step"] for s in steps] == [0, 1, 2, 3, 4]
    for step in steps:
        assert step.func is rewards.stepwise_loss and step.keywords["gamma"] == 0.9
        assert step.keywords["beta"] == 0.5 and step.keywords["free_bits"] == 2.0
    for given, loss, keywords in (
        ({}, rewards.elbo_loss, {}),
        ({"rl": True, "pay": "own"}, rewards.sampled_loss, {"pay": "own", "gamma": 0.9}),
        ({"rl": True, "update": "joint"}, rewards.joint_loss, {"skip": "mean"}),
        ({"ivae": True, "skip": "sample"}, rewards.ivae_loss, {"skip": "sample", "sampled": True}),
        ({"ivae": True, "update": "joint"}, rewards.ivae_loss, {"sampled": False}),
    ):
        (only,) = train.losses(settings.defaults(given), 5)
        assert only.func is loss and keywords.items() <= only.keywords.items()


def test_the_learning_rate_falls_to_nothing():
    config = {"schedule": "cosine", "epochs": 4}
    falls = [settings.rate_factor(config, i / 2) for i in range(9)]
    assert falls == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(9)])
    assert settings.rate_factor({"schedule": "constant"}, 3.5) == 1


def test_the_moving_average_is_what_is_measured(few, tmp_path, monkeypatch):
    """Against the average made by hand of the weights after every update."""
    seen, update = [], train.update

    def watched(run, *args):
        means = update(run, *args)
        seen.append({k: v.clone() for k, v in run.model.state_dict().items()})
        return means

    monkeypatch.setattr(train, "update", watched)
    flags = [*TINY, "--ema", "0.7", "--epochs", "2", "--batch-size", "64"]
    train.main([*flags, "--out", str(tmp_path)])
    average = seen[0]
    for weights in seen[1:]:
        average = {k: 0.7 * a + 0.3 * weights[k] for k, a in average.items()}
    model, _ = evaluate.load_run(tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), average)
    last = evaluate.load_checkpoint(tmp_path)["model"]
    torch.testing.assert_close(dict(last), seen[-1], rtol=0, atol=0)
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["kl"] == pytest.approx(evaluate.densities(model, few.test)["kl"], rel=1e-6)


TRAIN_MISTAKES = [
    (["--arch", "gan"], "invalid choice: 'gan'"),
    (["--gamma", "nan"], "gamma nan: a discount lies from 0 to 1"),
    (["--levels", "0"], "0 levels: a hierarchy has 1 to 10"),
    (["--levels", "-3"], "levels"),
    (["--arch", "vae", "--levels", "3"], "vae has one level, not 3"),
    (["--rl", "--ivae"], "two objectives: choose one"),
    (["--rl", "--arch", "biva"], "--rl is not defined for biva, .*: use --arch hvae or lvae"),
    (["--ivae", "--arch", "aae"], "--ivae is not defined for aae"),
    (["--ivae", "--update", "stepwise"], "stepwise is for --rl: --ivae takes joint or sampled"),
    (["--latents", "8x,4"], "latent '8x' is not understood"),
    (["--latents", "8,0"], "latent '0'"),
    (["--latents", "8,4", "--levels", "3"], "name 2 levels, not 3"),
    (["--channels", "0"], "0 channels"),
    (["--epochs", "0"], "--epochs 0: must be above 0"),
    (["--epochs", "many"], "invalid int value"),
    (["--lr", "inf"], "--lr inf"),
    (["--ema", "1"], "--ema 1.0: a decay lies from 0 to below 1"),
    (["--train-images", "0"], "--train-images 0: must be above 0"),
    (["--train-images", "2000"], "there are 1,437"),
    (["--warmup", "-1"], "--warmup -1: choose from 0"),
    (["--free-bits", "nan"], "--free-bits nan"),
    (["--seed", "9" * 30], "--seed 9+: choose from 0"),
    (["--channels", "9999999999"], "out of memory: lower --batch-size"),
    (["--device", "tpu"], "unknown device 'tpu': choose auto, cpu, cuda or cuda:N"),
    (["--device", "cuda"], "no CUDA device here.*--device cpu"),
    (["--dataset", "cifar10", "--image-size", "64"], "--image-size is for --dataset folder"),
    (["--dataset", "folder", "--image-size", "4"], "--image-size 4: choose from 8 to 1024"),
    (["--dataset", "folder", "--image-size", "50"], "squares whose side is a multiple of 4"),
    (["--unlabelled"], "--unlabelled is for --dataset stl10"),
    (["--arch", "hvae", "--mean-field"], "--mean-field is for lvae, whose merge it leaves out"),
    (["--dataset", "cifar10", "--threshold"], "--threshold is for grey images"),
    (["--size", "best", "--dataset", "cifar10"], "--size best is for grey images"),
    (["--colour"], "unrecognized arguments"),
    (["--resume"], "no run at .*: name a folder"),
    (["--resume", "--overwrite"], "choose one"),
    (["--resume", "here", "--out", "there"], "name two runs"),
]  # fmt: skip


@pytest.mark.parametrize("argv, words", TRAIN_MISTAKES, ids=lambda v: " ".join(v) if v else "")
def test_mistakes_in_training_give_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(capsys, argv, words)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_with_runs_give_one_line(few, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1"])
    resume = ["--resume", str(out)]
    fails(capsys, [*resume, "--arch", "hvae"], "has --arch lvae, not hvae: leave the flag out")
    fails(capsys, [*resume, "--epochs", "-1"], "--epochs -1")
    fails(capsys, ["--resume", str(out / "checkpoint.pt")], "no run at .*checkpoint.pt: name a fol")
    (tmp_path / "file").write_text("")
    fails(capsys, [*TINY, "--out", str(tmp_path / "file")], "cannot .*file")
    fails(capsys, [*TINY, "--out", str(tmp_path / "file" / "run")], "cannot .*run")

    def evaluation(words, *argv, run=out):
        fails(capsys, [str(run), *argv], words, main=evaluate.main)

    evaluation("no run at", run=tmp_path / "nowhere")
    evaluation("name levels from 1 to 2", "--mine", "3")
    evaluation("--samples 0", "--samples", "0")
    evaluation("unknown device", "--device", "gpu")
    checkpoint = out / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        evaluation("damaged or not a checkpoint")
        fails(capsys, resume, "damaged or not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    evaluation("not a checkpoint of this version")


# --------------------------------------------------------------------------------------------------
# Several processes

IN_PROCESSES = """
import hashlib, os, signal, sys
import torch, data, evaluate, settings, train
torch.set_num_threads(1)
d = data.load("digits")
few = data.Data(d.train[:300], d.train_labels[:300], d.test[:60], d.test_labels[:60], d.classes)
evaluate.load = lambda *a, **k: few
"""


def in_processes(n: int, script: str, *argv: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.run(
        [sys.executable, *(launcher if n > 1 else []), script, *argv], cwd=HERE, text=True,
        capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(HERE)},
    )  # fmt: skip


GRADIENTS = """
torch.distributions.Normal.rsample = lambda self, shape=(): self.loc
x = (few.train[:64] > 127).float()
x = x[train.own_rows(torch.arange(64))]
with train.group():
    found = {}
    for name, flags in runs.items():
        given = [*tiny, *flags, "--batch-size", "64", "--lr", "1e-9", "--out", "nowhere"]
        given = vars(settings.parser().parse_args(given))
        run = train.Run(settings.defaults(given), torch.device("cpu"))
        train.algorithm_1(run, x, 0.7, 0.0)
        found[name] = [p.grad for p in run.model.parameters()]
    if train.FIRST:
        torch.save(found, sys.argv[1])
"""


def test_gradients_of_processes_are_those_of_one(tmp_path):
    """With noise and binarisation held fixed, and every path taken by every image."""
    runs = {
        "elbo": [],
        "stepwise": ["--rl", "--update", "stepwise"],
        "joint": ["--arch", "hvae", "--rl", "--update", "joint"],
        "ivae": ["--ivae", "--update", "joint"],
    }
    script = tmp_path / "run.py"
    script.write_text(f"{IN_PROCESSES}\nruns, tiny = {runs!r}, {TINY!r}\n{GRADIENTS}")
    for n in (1, 2):
        done = in_processes(n, str(script), f"{tmp_path}/{n}.pt")
        assert done.returncode == 0, done.stderr
    alone, shared = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
    assert all(sum(g.abs().sum() for g in grads) > 1 for grads in alone.values())


def test_two_processes_train_one_run(tmp_path):
    """Equal parameters after 20 updates, with noise of their own; the first one evaluates; one
    process goes on. A batch that does not divide is there, and one smaller than the group."""
    script = tmp_path / "run.py"
    script.write_text(
        IN_PROCESSES
        + textwrap.dedent("""
        few = few._replace(train=few.train[:253], train_labels=few.train_labels[:253])
        whole, noise = train.train, []
        def watched(run, *args):
            noise.append(torch.rand(1, generator=torch.default_generator.clone_state()).item())
            whole(run, *args)
            state = b"".join(p.detach().numpy().tobytes() for p in run.model.parameters())
            with open(f"{sys.argv[2]}.rank{train.RANK}", "w") as file:
                print(hashlib.sha256(state).hexdigest(), noise[0], run.updates, file=file)
        train.train = watched
        train.main(sys.argv[1:])
    """)
    )
    out = tmp_path / "run"
    flags = ["--out", str(out), *TINY, "--rl", "--batch-size", "63", "--epochs", "4"]
    done = in_processes(2, str(script), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluating") == 1 and done.stdout.count("one of 2 processes") == 1
    one, two = ((tmp_path / f"run.rank{rank}").read_text().split() for rank in (0, 1))
    assert one[0] == two[0] and one[1] != two[1] and one[2] == two[2] == "20"
    assert [line["epoch"] for line in metrics_of(out)] == [1, 2, 3, 4]
    more = in_processes(1, str(script), "--out", str(out), "--resume", "--epochs", "5")
    assert more.returncode == 0, more.stderr
    assert evaluate.load_checkpoint(out)["updates"] == 25 and (out / "eval.json").exists()


def test_a_lost_process_ends_the_run_with_a_word_and_a_checkpoint(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        IN_PROCESSES
        + textwrap.dedent("""
        train.SAVE_EVERY, update = 0, train.update
        def until_killed(run, *args):
            if train.RANK == 1 and run.updates == 43:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(run, *args)
        train.update = until_killed
        train.main(sys.argv[1:])
    """)
    )
    out = tmp_path / "run"
    flags = [*TINY, "--rl", "--epochs", "12", "--batch-size", "64", "--out", str(out)]
    lost = in_processes(2, str(script), *flags)
    assert lost.returncode != 0
    words = [line for line in lost.stderr.splitlines() if "has lost another" in line]
    assert len(words) == 1 and "process 1 of 2" in words[0] and "--resume" in words[0]
    assert 20 <= evaluate.load_checkpoint(out)["updates"] <= 43
    more = in_processes(1, str(script), "--resume", str(out))
    assert more.returncode == 0, more.stderr
    assert evaluate.load_checkpoint(out)["updates"] == 60 and (out / "eval.json").exists()


def test_own_rows(monkeypatch):
    """Equal parts that hold every row, whatever the numbers of rows and processes."""
    for size, n in itertools.product((1, 2, 3, 5), (1, 2, 7, 30)):
        monkeypatch.setattr(train, "SIZE", size)
        parts = []
        for rank in range(size):
            monkeypatch.setattr(train, "RANK", rank)
            parts.append(train.own_rows(torch.arange(n)).tolist())
        assert {len(part) for part in parts} == {-(-n // size)}
        assert {row for part in parts for row in part} == set(range(n))


# --------------------------------------------------------------------------------------------------
# CUDA graphs


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
        before = self.inputs[0].updates
        self.outputs.copy_(self.algorithm_1(*self.inputs))
        self.inputs[0].updates = before


@pytest.fixture
def recorders(monkeypatch):
    made, algorithm_1 = [], train.algorithm_1

    def graph():
        made.append(Recorder())
        return made[-1]

    def recorded(run, *args):
        recorder = Recorder.recording
        if recorder is None:
            return algorithm_1(run, *args)
        recorder.algorithm_1, recorder.inputs = algorithm_1, (run, *args)
        run.updates += run.losses
        recorder.outputs = torch.full((run.losses + run.model.levels,), math.nan)
        return recorder.outputs

    nothing = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(train, "algorithm_1", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", Recorder.record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


GRAPHS = [
    ["--rl", "--update", "stepwise"],
    ["--rl", "--update", "sampled"],
    [],
    ["--arch", "aae", "--latents", "4"],
]


def course(run: train.Run, x: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    """What the batches of a short training return, and the parameters after it. The weight of the
    KL and the learning rate change with every batch, the free bits once; one batch is smaller."""
    means, start = [], 0
    for i, size in enumerate([30, 30, 30, 30, 7, 30, 30, 30, 30, 30]):
        run.set_rates(0.1 * (i + 1))
        means.append(train.update(run, x[start : start + size], 0.1 * i, 0.5 if i < 7 else 0.0))
        start += size
    return means, run.model.state_dict()


@pytest.mark.parametrize("flags", GRAPHS)
def test_recorded_updates_are_the_updates(few, recorders, flags):
    """Batch, KL's weight and learning rate come anew to every replay, free bits make another graph,
    the smaller batch goes without, and every batch is trained on once."""
    flags, x = ["--batch-size", "30", *flags], (few.train > 127).float()
    plain, replayed = run_of(*flags), run_of(*flags)
    replayed.captured = train.Captured(torch.device("cpu"))
    for optimizer, rate in zip(replayed.optimizers, replayed.rates, strict=True):
        optimizer.param_groups[0]["lr"] = torch.tensor(rate)
    for optimizer in [*plain.optimizers, *replayed.optimizers]:
        optimizer.param_groups[0]["eps"] = 1e-3  # that no step is made of rounding errors
    torch.manual_seed(3)
    expected = course(plain, x)
    assert not recorders
    torch.manual_seed(3)
    torch.testing.assert_close(course(replayed, x), expected, rtol=1e-4, atol=1e-6)
    assert plain.updates == replayed.updates == 10 * plain.losses
    assert [graph.replays for graph in recorders] == [4, 1]  # after two batches without, each


if CUDA:

    @pytest.mark.parametrize("flags", GRAPHS)
    def test_updates_on_cuda(cuda, monkeypatch, few, flags):
        """As one graph and step by step as on the CPU, in float64 and without noise."""
        build = baselines.build
        monkeypatch.setattr(baselines, "build", lambda config: build(config).double())
        monkeypatch.setattr(Normal, "rsample", lambda self, shape=(): self.loc)
        found = {}
        for name, device, how in (("cpu", "cpu", []), ("eager", "cuda", ["--eager"]),
                                  ("graph", "cuda", [])):  # fmt: skip
            run = run_of("--batch-size", "30", *flags, *how, device=device)
            assert (run.captured is not None) == (name == "graph")
            for optimizer in run.optimizers:
                optimizer.param_groups[0]["eps"] = 1.0
            means, state = course(run, (few.train > 127).double().to(device))
            found[name] = ([m.cpu() for m in means], {k: v.cpu() for k, v in state.items()})
        if "aae" in flags:  # its discriminator meets other samples of the prior on another device
            return
        for name in ("eager", "graph"):
            torch.testing.assert_close(found[name], found["cpu"], rtol=1e-5, atol=1e-6)

    def test_noise_on_cuda(cuda, few):
        """The replays draw the numbers that the updates step by step would draw, always others."""
        flags, x = ["--rl", "--batch-size", "30"], (few.train > 127).float().to(cuda)
        found = []
        for how in ([], ["--eager"]):
            run = run_of(*flags, *how, device="cuda")
            torch.manual_seed(3)
            found.append(course(run, x))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
        run = run_of(*flags, "--lr", "1e-9", device="cuda")
        values = [train.update(run, x[:30], 1.0, 0.0)[0] for _ in range(6)]
        assert len({value.item() for value in values}) == 6

    def test_a_run_on_cuda(cuda, few, tmp_path, capsys):
        """Trains, and goes on from its checkpoint on the CPU and from there on CUDA again."""
        flags = [*TINY, "--rl", "--batch-size", "64", "--out", str(tmp_path)]
        train.main([*flags, "--epochs", "2", "--schedule", "cosine", "--ema", "0.9"])
        assert "cuda, float32, one CUDA graph a batch" in capsys.readouterr().out
        for epochs, device in (("4", "cpu"), ("6", "cuda"), ("7", "auto")):
            train.main(["--resume", str(tmp_path), "--epochs", epochs, "--device", device])
        lines = metrics_of(tmp_path)
        assert [line["epoch"] for line in lines] == list(range(1, 8))
        assert lines[-1]["loss"] < lines[0]["loss"]
        found = []
        for device in ("cuda", "cpu"):
            (tmp_path / "eval.json").unlink()
            capsys.readouterr()
            evaluate.main([str(tmp_path), "--json", "--device", device])
            found.append(json.loads(capsys.readouterr().out))
        for key in ("kl", "elbo", "iwae"):
            assert found[0][key] == pytest.approx(found[1][key], rel=0.1, abs=0.1), key
        assert found[0]["probe"]["all"] == pytest.approx(found[1]["probe"]["all"], abs=5)


# --------------------------------------------------------------------------------------------------
# The claims


CLAIMS = ["--epochs", "30", "--warmup", "20", "--probe", "top"]  # less than half of the main job
AAE = ["--arch", "aae", "--epochs", "40", "--probe", "top"]
CLAIM_RUNS = {  # folder: flags
    "hvae-elbo": ["--arch", "hvae", *CLAIMS],
    "hvae-rl": ["--arch", "hvae", "--rl", *CLAIMS],
    "lvae-elbo": CLAIMS,
    "lvae-rl": ["--rl", *CLAIMS],
    "lvae-ivae": ["--ivae", *CLAIMS],
    "aae": AAE,
    "aae-alone": AAE,  # by its first loss alone
}
CLAIM_SCRIPT = """
import sys, train
if sys.argv[-1].endswith("alone"):
    whole = train.losses
    train.losses = lambda *args: whole(*args)[:1]
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of runs on the digits, trained two side by side, a thread each."""
    root = tmp_path_factory.mktemp("claims")
    alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(name: str) -> None:
        argv = [*CLAIM_RUNS[name], "--out", str(root / name)]
        subprocess.run([sys.executable, "-c", CLAIM_SCRIPT, *argv], cwd=HERE, env=alone,
                       capture_output=True, check=True)  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, CLAIM_RUNS))
    return root


def test_the_adversary_keeps_the_aggregate_posterior_near_the_prior(trained):
    """The first two moments of z over the test images, with the adversary and without: as nats of
    the Gaussian that has them from N(0, I)."""

    def moments(name):
        model, _ = evaluate.load_run(trained / name)
        (z,) = evaluate.representations(model, data.load("digits").test, sample=True)
        unit = MultivariateNormal(torch.zeros(8), torch.eye(8))
        nats = kl_divergence(MultivariateNormal(z.mean(0), z.T.cov()), unit)
        return nats.item(), z.std(0)

    nats, std = moments("aae")
    assert nats < 4 and std.min() > 0.4 and std.max() < 1.5
    log_px = json.loads((trained / "aae/eval.json").read_text())["log_px_given_z"][0]
    assert log_px > -320  # and the images are decoded: -543, 784 ln 2, is a coin's guess
    assert moments("aae-alone")[0] > 3 * nats


@pytest.mark.parametrize("arch", ARCHS)
def test_rl_keeps_the_top_level_informative_where_the_elbo_lets_it_collapse(arch, trained):
    """All objectives with the same warm-up. IVAE (tried top-down) keeps the top level informative
    too, but its lower levels alike."""
    found = {
        name: json.loads((trained / f"{arch}-{name}/eval.json").read_text())
        for name in ("elbo", "rl", "ivae")[: 3 if arch == "lvae" else 2]
    }
    assert found["rl"]["kl"][-1] > 1 and min(found["rl"]["kl"]) > 0.5
    assert found["rl"]["active_units"][-1] >= 2
    assert found["elbo"]["kl"][-1] < 0.1 and found["elbo"]["active_units"][-1] == 0
    assert found["rl"]["probe"]["z5"] > found["elbo"]["probe"]["z5"] + 15
    if arch == "hvae":
        return
    assert found["ivae"]["kl"][-1] > 1 and found["ivae"]["active_units"][-1] >= 4
    spread = {name: np.ptp(f["log_px_given_z"][:3]) for name, f in found.items()}
    assert spread["ivae"] < spread["elbo"] - 3


# --------------------------------------------------------------------------------------------------
# tables.py


def write_run(root: Path, name: str, flags: dict, probe: float = 50.0, mine_nats=None) -> Path:
    """The files of a finished run of five levels (one for vae and aae), numbers made up."""
    folder = root / name
    folder.mkdir(parents=True)
    config = dict(arch="lvae", rl=False, ivae=False, gamma=0.9, dataset="fashionmnist", seed=0,
                  latents=None, train_images=None, out=str(folder)) | flags  # fmt: skip
    levels, seed = 1 if config["arch"] in ("vae", "aae") else 5, config["seed"]
    top = f"z{levels}"
    evaluation = {
        "probe": {f"z{k + 1}": 80.0 - k for k in range(levels)} | {"all": 85.0, top: probe},
        "kl": [1.0] * (levels - 1) + [probe / 10],
        "elbo": -240.0,
        "iwae": -237.0 - seed,
        "log_px_given_z": [-220.0 - k - seed for k in range(levels)],
        "active_units": [8] * (levels - 1) + [4 + seed],
        "bpd": 0.4 + seed / 100,
        "mine": {} if mine_nats is None else {top: {"nats": mine_nats, "ceiling": 9.2103}},
    }
    test = {"probe": probe, "kl": [2.0] * levels, "elbo": -300.0}
    lines = [{"epoch": 1, "seconds": 30.0, "kl": [0.5] * levels, "loss": 3.0, "test": test},
             {"epoch": 2, "seconds": 61.0, "kl": [1.0] * levels, "loss": 2.0}]  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def three_seeds(root: Path) -> list[Path]:
    return [write_run(root, f"rl-{seed}", {"rl": True, "seed": seed}, probe, nats)
            for seed, probe, nats in ((0, 70.0, 4.0), (1, 71.0, 5.0), (2, 75.0, 4.5))]  # fmt: skip


def printed(capsys, *argv) -> str:
    capsys.readouterr()
    tables.main([str(arg) for arg in argv])
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    return [part.strip() for part in line.strip("|").split("|")]


def mistake(capsys, words: str, *argv) -> None:
    """The command ends in one line of standard error that has these words, and with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        tables.main([str(arg) for arg in argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("tables.py: error: ") and words in line, line


def test_table_of_seeds(tmp_path, capsys):
    """Mean ± standard deviation by hand, the paper's values beside it, a row a name."""
    runs = [
        *three_seeds(tmp_path),
        *(write_run(tmp_path, f"elbo-{s}", {"arch": "hvae", "seed": s}, 10.0) for s in (0, 1)),
        write_run(tmp_path, "gamma-0.8", {"rl": True, "gamma": 0.8}, 60.0),
        write_run(tmp_path, "few", {"arch": "biva", "train_images": 900}),
        write_run(tmp_path, "latents", {"arch": "biva", "latents": "9,8,7,6,5"}),
        write_run(tmp_path, "text", {"arch": "biva", "latents": "128,64,32,16,8"}),
        write_run(tmp_path, "digits-vae", {"dataset": "digits", "arch": "vae"}, 0.0),
    ]
    lines = printed(capsys, *runs, "--markdown").splitlines()
    assert lines[0] == "**fashionmnist**" and "**digits**" in lines
    assert cells(lines[2]) == ["", "seeds", "z_L probe %", "paper", "all levels %", "paper",
                               "MINE nats", "paper", "bpd", "paper", "KL z_L", "paper",
                               "active units", "training s"]  # fmt: skip
    rows = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
    assert rows["rl"] == ["rl", "3", "72.00 ± 2.65", "78.48 ± 0.15", "85.00 ± 0.00", "84.77 ± 0.30",
                          "4.50 ± 0.50", "4.37 ± 0.58", "0.410 ± 0.010", "0.335 ± 0.072",
                          "7.20 ± 0.26", "32.1 ± 0.5", "5.0 ± 1.0", "61 ± 0"]  # fmt: skip
    assert rows["elbo"][:4] == ["elbo", "2", "10.00 ± 0.00", "10.73 ± 0.08"]
    assert rows["gamma-0.8"][2:6] == ["60.00", "77.98 ± 0.23", "85.00", ""]
    assert rows["digits-vae"][:3] == ["digits-vae", "1", "0.00"]  # a mean of 0 is a value
    assert rows["few"][3] == rows["latents"][3] == rows["few"][9] == rows["latents"][9] == ""
    assert rows["text"][3] == "28.67 ± 0.64"  # the latents of the paper's text
    text = printed(capsys, *runs[:-1]).splitlines()
    assert text[0] == "fashionmnist" and len({len(line) for line in text[1:]}) == 1  # aligned


def test_columns_and_rows_that_are_asked_for(tmp_path, capsys):
    """Columns and rows in the order asked; lists are means of each level over seeds."""
    runs = [*three_seeds(tmp_path), write_run(tmp_path, "levels-10", {"rl": True}, 1e-6)]
    command = [*runs, "--markdown", "--columns"]
    head, _, three, ten = printed(capsys, *command, "kls,decoded,elbo,iwae,probe").splitlines()[2:]
    assert cells(head) == ["", "seeds", "KL, z_1 … z_L", "log p(x given z_l), z_1 … z_L", "ELBO",
                           "IWAE", "z_L probe %", "paper"]  # fmt: skip
    assert cells(three) == ["rl", "3", "1.00 1.00 1.00 1.00 7.20",
                            "-221.0 -222.0 -223.0 -224.0 -225.0", "-240.0 ± 0.0", "-238.0 ± 1.0",
                            "72.00 ± 2.65", "78.48 ± 0.15"]  # fmt: skip
    assert cells(ten)[0] == "levels-10" and cells(ten)[6] == "1e-06"  # not "levels" and "0.00"
    first, second = printed(capsys, *command, "kl", "--rows", "levels-*,rl").splitlines()[4:]
    assert first.startswith("| levels-10 |") and second.startswith("| rl |")
    path = runs[0] / "eval.json"
    evaluation = json.loads(path.read_text())
    evaluation |= {"probe_sample": {"z5": 65.0, "all": 66.0}, "probe_binarised_mean": {"z5": 67.0}}
    path.write_text(json.dumps(evaluation))
    *_, row = printed(capsys, *command, "sample,sample_all,binarised_mean,binarised_sample",
                      "--rows", "rl").splitlines()  # fmt: skip
    assert cells(row) == ["rl", "3", "65.00", "66.00", "67.00"]  # of the one seed that has them


def test_runs_at_an_epoch(tmp_path, capsys):
    """--after-epochs takes the evaluation that --eval-every logged then for the run's."""
    runs = three_seeds(tmp_path)
    columns = "probe,all,kl,bpd,elbo,seconds"
    head, _, row = printed(capsys, *runs, "--after-epochs", 1, "--columns", columns,
                           "--markdown").splitlines()[2:]  # fmt: skip
    assert [c for c in cells(head) if c != "paper"] == [
        "", "seeds", "z_L probe %", "KL z_L", "bpd", "ELBO", "training s"]  # fmt: skip
    assert [cells(row)[i] for i in (2, 4, 6, 8, 9)] == [
        "72.00 ± 2.65", "2.00 ± 0.00", "0.513 ± 0.013", "-300.0 ± 0.0", "30 ± 0"]  # fmt: skip
    mistake(capsys, "rl-0 was not evaluated at epoch 2: see", *runs, "--after-epochs", 2)


def test_packed_runs_are_the_runs(tmp_path, capsys):
    """A .jsonl file gives what its folders give, alone and beside others, and is packed again."""
    runs = [*three_seeds(tmp_path), write_run(tmp_path, "elbo-0", {"arch": "hvae"}, 10.0)]
    columns = ["--columns", ",".join(tables.MEASURES)]
    whole = printed(capsys, *runs, *columns)
    packed, again = tmp_path / "runs.jsonl", tmp_path / "again.jsonl"
    assert printed(capsys, *runs, "--pack", packed) == ""
    assert printed(capsys, packed, *columns) == whole
    printed(capsys, *runs[:3], "--pack", tmp_path / "three.jsonl")
    assert printed(capsys, tmp_path / "three.jsonl", runs[3], *columns) == whole
    printed(capsys, packed, "--pack", again)
    assert again.read_text() == packed.read_text() and len(packed.read_text().splitlines()) == 4
    for run, folder in zip(tables.read([packed]), runs, strict=True):
        assert run.folder is None and run._replace(folder=folder) == tables.read([folder])[0]
    mistake(capsys, "name a new file that ends in .jsonl", runs[3], "--pack", packed)
    mistake(capsys, "name a new file that ends in .jsonl", runs[3], "--pack", tmp_path / "a.json")
    assert len(list(tmp_path.glob("*.json*"))) == 3


def test_rows_that_disagree(tmp_path, capsys):
    """A row has one setting of everything but where and how it is computed, and each seed once."""
    a = write_run(tmp_path, "a-0", {"rl": True, "device": "cpu", "eval_every": 5, "minutes": None})
    b = write_run(tmp_path, "a-1", {"rl": True, "seed": 1, "device": "cuda", "threshold": False})
    c = write_run(tmp_path, "a-2", {"rl": True, "seed": 2, "gamma": 0.8})
    assert "a      2" in printed(capsys, a, b)
    mistake(capsys, "a-0 and a-2 differ in gamma, 0.9 and 0.8", a, b, c)
    mistake(capsys, "row a has seed 0 twice", a, b, write_run(tmp_path, "other/a-0", {"rl": True}))


def test_mistakes_with_tables_give_one_line(tmp_path, capsys):
    run = write_run(tmp_path, "a", {"rl": True})
    mistake(capsys, "the following arguments are required: RUN")
    mistake(capsys, "config.json: No such file or directory", run, tmp_path / "nowhere")
    mistake(capsys, "--columns kl,probes: choose from probe, all", run, "--columns", "kl,probes")
    mistake(capsys, "no row is named b*", run, "--rows", "b*")
    packed = tmp_path / "packed.jsonl"
    tables.pack(tables.read([run]), packed)
    packed.write_text(packed.read_text()[:-9])
    mistake(capsys, "packed.jsonl is damaged", packed)
    for name in ("config.json", "eval.json", "metrics.jsonl"):
        whole = (run / name).read_text()
        for broken in ("{", "[]", "3", "{}"):
            (run / name).write_text(broken)
            mistake(capsys, "a is damaged or of another version", run)
        (run / name).write_text(whole)
    (run / "eval.json").unlink()
    mistake(capsys, f"a has no eval.json: python evaluate.py {run} makes it", run)


def test_values_of_the_paper():
    """A few of each table, read off the page again."""
    grey, cifar = "fashionmnist", "cifar10"
    assert tables.paper(grey, "AAE", 1, 0.9) == {"probe": "72.11±0.27", "mine": "4.08±0.67"}
    assert tables.paper("stl10", "HVAE+RL", 5, 0.9) == {"probe": "43.76±0.15", "mine": "10.93±1.73"}
    assert tables.paper("cifar100", "VAE", 1, 0.9)["mine"] == "13.76±1.85"
    assert tables.paper(cifar, "LVAE+IVAE", 5, 0.9) == {
        "probe": "39.26±0.25", "mine": "6.41±0.69", "bpd": "3.48±0.05", "kl": "233.0±7.0",
    }  # fmt: skip
    assert tables.paper(cifar, "LVAE", 5, 0.9)["all"] == "49.87±0.39"
    assert tables.paper(cifar, "HVAE+RL", 5, 0.0) == {"probe": "41.91±0.15"}
    assert tables.paper(grey, "LVAE+RL", 10, 0.9) == {"probe": "75.82"}
    for nothing in ((grey, "LVAE+RL", 2, 0.9), (cifar, "LVAE+RL", 7, 0.9),
                    ("digits", "VAE", 1, 0.9), (grey, "LVAE+RL", 5, 0.5),
                    (grey, "HVAE", 4, 0.9), (grey, "HVAE+IVAE", 5, 0.9)):  # fmt: skip
        assert tables.paper(*nothing) == {}


def test_tables_of_the_study_are_those_of_the_results(capsys, monkeypatch):
    """Each command of the page that prints Markdown prints the table right above it."""
    monkeypatch.chdir(HERE)
    blocks = (HERE / "results/README.md").read_text().split("\n\n")
    commands = 0
    for i, block in enumerate(blocks):
        for command in re.findall(r"`python tables.py (results/[^`]*--markdown[^`]*)`", block):
            above = [b for b in blocks[:i] if b.startswith("|")][-1]
            words = [sorted(glob.glob(w)) or [w] for w in shlex.split(command)]
            parts = printed(capsys, *(word for some in words for word in some)).split("\n\n")
            (table,) = (part.strip() for part in parts if part.startswith("|"))
            assert table == above, f"{command} prints another table:\n{table}"
            commands += 1
    assert commands >= 12


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_of_a_page_lead_somewhere(page):
    """Files are there, and anchors are headings, spelled as GitHub does, or named by hand."""
    path = HERE / page
    links = re.findall(r"\]\((?!https:)([^)]*)\)", path.read_text())
    assert len(links) > 5
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            text = target.read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs | set(re.findall(r'<a name="(.*?)">', text)), link


# --------------------------------------------------------------------------------------------------
# figures.py


def row_of(model, d: data.Data, method: str = "HVAE", dataset: str = "digits") -> figures.Row:
    about = "a-row", dataset, method, model.levels, []
    return figures.Row(*about, model, d.test, d.test_labels, d.classes)


def made_up_run(name: str, seed: int, levels: int, probe: float, **flags) -> tables.Run:
    """A run of which there is no folder, numbers made up."""
    config = dict(arch="lvae", rl=True, ivae=False, gamma=0.9, dataset="fashionmnist", seed=seed,
                  latents=None, train_images=None) | flags  # fmt: skip
    evaluation = {"probe": {f"z{levels}": probe}, "kl": [1.0] * (levels - 1) + [probe / 10],
                  "bpd": 0.4, "elbo": -240.0}  # fmt: skip
    test = {"probe": probe - 1, "elbo": -250.0}
    lines = [{"epoch": 1, "seconds": 30.0, "kl": [0.5] * levels, "test": test},
             {"epoch": 2, "seconds": 61.0, "kl": [1.0] * levels},
             {"epoch": 3, "seconds": 90.0, "kl": [2.0] * levels}]  # fmt: skip
    return tables.Run(f"{name}-{seed}", seed, config, evaluation, lines)


def rows_of(runs: list[tables.Run]) -> list[figures.Row]:
    return [figures.load(group, torch.device("cpu"), None) for group in tables.groups(runs)]


def test_units_found_again():
    """Whatever the order and scale of the units; collapsed levels have none to be found."""
    z, other = torch.randn(5000, 4), torch.randn(5000, 3)
    b = [other, -3 * z[:, [2, 0, 3, 1]] + 1, torch.zeros(5000, 2)]
    values = figures.matches([z, 0.01 * z, torch.cat([z[:, :1], 1e-3 * z], dim=1)], b)
    assert values[0, 1] == pytest.approx(1) and values[0, 0] < 0.05
    assert np.isnan(values[1]).all() and np.isnan(values[:, 2]).all()
    assert values[2, 1] == pytest.approx(1)  # of the units that are active
    one, two = (np.asarray(t, dtype=float) for t in (z, other))
    one, two = ((t - t.mean(0)) / t.std(0) for t in (one, two))
    best = [max(abs((u * v).mean()) for v in two.T) for u in one.T]
    assert values[0, 0] == pytest.approx(np.mean(best))


def test_images_are_of_all_classes_whatever_their_order():
    labels = torch.arange(10).repeat_interleave(7)
    for order in (torch.arange(70), torch.randperm(70)):
        images = torch.zeros(70, 1, 1, 1)
        row = figures.Row("", "", "", 1, [], None, images, labels[order], ())
        assert labels[order][figures.spread(row, 10)].tolist() == list(range(10))
        assert labels[order][figures.spread(row, 5)].tolist() == [1, 3, 5, 7, 9]
        assert sorted(figures.spread(row, 99).tolist()) == list(range(70))


def test_rows_of_figure_1_are_the_levels_from_the_pixels_up(few):
    model = baselines.build(models.configure("lvae", latents="6,5,4", channels=4))
    row = row_of(model, few)
    axes = figures.fig1_skip_paths([row]).axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["input", "$z_{1}$", "$z_{2}$", "$z_{3}$"]
    drawn = np.asarray(axes.images[0].get_array())
    images = data.to_unit(few.test[figures.spread(row, 20)])
    z = model.infer(images, sample=False).latents
    for level in range(4):
        expected = images
        if level:
            alone = [v if k == level - 1 else None for k, v in enumerate(z)]
            expected = model.decode(alone).mean.detach()
        for column in (0, 7, 19):
            top, left = level * 29 + 1, column * 29 + 1
            part = drawn[top : top + 28, left : left + 28, 0]
            assert part == pytest.approx(expected[column, 0].numpy(), abs=1e-6)


def test_figure_2_takes_the_images_of_the_row_named_first(few):
    def row(dataset: str, images: torch.Tensor) -> figures.Row:
        model = baselines.build(models.configure("hvae", latents="4,3", channels=4))
        return row_of(model, few._replace(test=images), "HVAE+RL", dataset)

    rows = row("mnist", few.test[:30]), row("fashionmnist", few.test[30:])
    for a, b in (rows, rows[::-1]):
        axes = figures.fig2_correlation([a, b]).axes[0]
        assert axes.get_ylabel() == f"a-row trained on {a.dataset}"
        drawn = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
        levels = (evaluate.representations(row.model, a.images) for row in (a, b))
        assert drawn == pytest.approx(figures.matches(*levels), nan_ok=True)
    for other in (rows[1]._replace(method="HVAE"), rows[1]._replace(dataset="mnist")):
        with pytest.raises(figures.Missing, match="two data sets"):
            figures.fig2_correlation([rows[0], other])


def test_traversal_is_spaced_by_the_quantiles_of_the_prior_around_its_anchor(few):
    model = baselines.build(models.configure("hvae", latents="6,4", channels=4))
    seen, generate = [], model.generate
    model.generate = lambda latents: seen.append(latents) or generate(latents)
    figure = figures.fig5_latents([row_of(model, few)])
    below, z = seen[-1]
    assert below is None and z.shape == (81, 4)
    anchor = model.infer(data.to_unit(few.test[:1]), sample=False).latents[-1][0]
    spread = evaluate.representations(model, few.test)[-1].var(dim=0)
    first, second = spread.topk(2).indices.tolist()
    moved = (z - anchor).detach().view(9, 9, 4)  # rows from the top, columns
    quantiles = [NormalDist().inv_cdf(p) for p in np.linspace(0.05, 0.95, 9)]
    for i in range(9):
        assert moved[i, :, first].numpy() == pytest.approx(quantiles, abs=1e-4)
        assert moved[:, i, second].numpy() == pytest.approx([-q for q in quantiles], abs=1e-4)
    others = [k for k in range(4) if k not in (first, second)]
    assert moved[:, :, others].abs().max() < 1e-5
    (frame,) = figure.axes[1].patches  # around the middle picture, 28 pixels after 4 of 29
    assert frame.get_xy() == (116, 116) and frame.get_width() == 29


def test_every_class_has_its_colour(few):
    model = baselines.build(models.configure("hvae", latents="6,4", channels=4))
    for classes in (10, 30):
        labels = torch.arange(60) % classes
        d = few._replace(test_labels=labels, classes=tuple(map(str, range(classes))))
        figure = figures.fig5_latents([row_of(model, d)])
        points = figure.axes[0].collections
        assert sum(len(p.get_offsets()) for p in points) == 60
        assert len({to_hex(p.get_facecolor()[0]) for p in points}) == classes
        assert len(figure.legends) == (classes == 10)


def test_figure_6_has_the_seeds_and_the_paper():
    numbers = (("a", 0, 3, 70.0), ("b", 0, 5, 60.0), ("b", 1, 5, 62.0))
    axes = figures.fig6_depth(rows_of([made_up_run(*n) for n in numbers])).axes[0]
    (container,) = axes.containers
    assert container.get_label() == "LVAE+RL"
    assert container.lines[0].get_xydata().tolist() == [[3, 70], [5, 61]]
    bars = container.lines[2][0].get_segments()[1]
    assert bars[:, 1] == pytest.approx([61 - math.sqrt(2), 61 + math.sqrt(2)])
    paper = next(line for line in axes.lines if line.get_label() == "LVAE+RL, paper")
    points = paper.get_xydata()[~np.isnan(paper.get_ydata())]
    assert points[0].tolist() == [3, 78.77] and len(points) == 8


def test_figures_of_numbers_need_no_checkpoint_and_no_data(tmp_path, capsys):
    runs = [made_up_run("fashionmnist-l3", 0, 3, 70.0), made_up_run("l5", 0, 5, 61.0)]
    tables.pack(runs, tmp_path / "runs.jsonl")
    figures.main([str(tmp_path / "runs.jsonl"), "--out", str(tmp_path / "made")])
    said = capsys.readouterr().out
    names = {p.name.removesuffix("-fashionmnist.png") for p in (tmp_path / "made").iterdir()}
    assert names == {"fig6-depth", "fig7-kl", "curves"}
    assert said.count("not made") == 4 and "needs a run folder with its checkpoint" in said

    figure = figures.curves(rows_of(runs[:1]))
    x = [axes.lines[0].get_xdata().tolist() for axes in figure.axes]  # minutes above, epochs below
    minutes, epochs = [0.5, 61 / 60, 1.5], [1, 2, 3]
    assert x == [minutes, minutes[::2], minutes[::2], epochs, epochs[::2], epochs[::2]]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [69, 70]  # at the end the evaluation
    line = runs[0].metrics[0] | {"seconds": 60, "kl": [0.7]}
    other = runs[0]._replace(seed=1, name="fashionmnist-l3-1", metrics=[line])
    (row,) = rows_of([runs[0], other])
    assert row.label == "l3"
    axes = figures.curves([row]).axes[0]
    (mean,), (band,) = axes.lines, axes.collections  # of the one epoch that both have
    assert mean.get_xydata().ravel() == pytest.approx([0.75, 0.6])
    within, std = band.get_paths()[0].get_extents(), math.sqrt(2 * 0.1**2)
    assert [within.y0, within.y1] == pytest.approx([0.6 - std, 0.6 + std])

    (tmp_path / "file").write_text("")
    path = str(tmp_path / "runs.jsonl")
    fails(capsys, [path, "--out", str(tmp_path / "file")], "/file", figures.main)
    fails(
        capsys, [path, "--out", "x", "--rows", "nothing"], "no row is named nothing", figures.main
    )


def test_every_figure_is_made(few, tmp_path, capsys):
    runs = {
        "fashionmnist-hvae-3": [],
        "fashionmnist-hvae-4": ["--seed", "4"],
        "fashionmnist-hvae-rl-3": ["--rl"],
        "fashionmnist-deep-3": ["--rl", "--latents", "4,3,2"],
        "fashionmnist-biva-3": ["--arch", "biva"],
        "fashionmnist-aae-3": ["--arch", "aae", "--latents", "4"],
        "mnist-hvae-rl-3": ["--rl", "--dataset", "mnist"],
    }
    for name, flags in runs.items():
        usual = [*TINY, "--arch", "hvae", "--dataset", "fashionmnist", "--epochs", "1"]
        train.main([*usual, *flags, "--out", str(tmp_path / name)])
    capsys.readouterr()
    figures.main([*(str(tmp_path / name) for name in runs), "--out", str(tmp_path / "figures")])
    said = capsys.readouterr().out.splitlines()
    names = ["fig1-skip-paths", "fig5-latents", "fig6-depth", "fig7-kl", "curves", "samples"]
    expected = {"fig2-correlation.png", *(f"{name}-fashionmnist.png" for name in names)}
    expected |= {f"{name}-mnist.png" for name in names if name != "fig6-depth"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == expected
    needs = "needs runs that differ in --levels, on images with labels"
    assert f"not made: fig6-depth-mnist.png {needs}" in said
    for name in expected:
        picture = np.asarray(PIL.Image.open(tmp_path / "figures" / name).convert("RGB"))
        assert min(picture.shape[:2]) > 200 and picture.std() > 5
        # Nothing touches the edge, where it would be cut.
        for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert (edge == 255).all(), name


# --------------------------------------------------------------------------------------------------
# bench.py


@pytest.fixture
def double_noise(monkeypatch):
    """All is float64, and samples use one noise vector a latent shape, whatever the path."""
    noise: dict[tuple, torch.Tensor] = {}

    def rsample(self, shape=()):
        key = tuple(self.loc.shape[1:])
        noise.setdefault(key, torch.randn(key, dtype=torch.float64))
        return self.loc + self.scale * noise[key]

    build = baselines.build
    monkeypatch.setattr(baselines, "build", lambda config: build(config).double())
    monkeypatch.setattr(Normal, "rsample", rsample)


def config_of(*flags: str) -> dict:
    return settings.defaults(vars(settings.parser().parse_args([*TINY, *flags])))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("skip", ("mean", "sample"))
def test_the_literal_algorithm_makes_the_stepwise_updates(double_noise, arch, skip):
    torch.manual_seed(0)
    config = config_of("--arch", arch, "--latents", "4,3,2", "--gamma", "0.8", "--skip", skip)
    ways = bench.ways(config, torch.device("cpu"))
    x = (torch.rand(2, 20, 1, 28, 28) < 0.3).double()
    for name in ("literal", "stepwise"):
        run, update = ways[name]
        for optimizer in run.optimizers:  # steps by the gradients' size, not by rounding errors
            optimizer.param_groups[0]["eps"] = 1.0
        for batch in x:
            update(run, batch)
    literal, stepwise = (ways[name][0].model.state_dict() for name in ("literal", "stepwise"))
    torch.testing.assert_close(literal, stepwise, rtol=1e-9, atol=1e-9)
    start = train.Run(config, torch.device("cpu")).model.state_dict()
    assert max((literal[k] - start[k]).abs().max() for k in start) > 1e-4
    assert torch.channels_last == models.LAYOUT


def test_bench(few, monkeypatch, capsys):
    for name, value in (("WARM_UP", 1), ("ROUNDS", 3), ("SECONDS", 0)):
        monkeypatch.setattr(bench, name, value)
    names, results = ["literal", "stepwise", "joint", "sampled", "elbo"], []
    for size in (16, 32):
        bench.main(["--json", *TINY, "--batch-size", str(size)])
        result = json.loads(capsys.readouterr().out)
        results.append(result["ways"])
        assert list(result["ways"]) == names and result["rounds"] == 3
        assert (result["levels"], result["batch_size"], result["dtype"]) == (2, size, "float32")
        for name, way in result["ways"].items():
            seconds = way["ms_per_batch"] / 1e3
            assert way["images_per_s"] == pytest.approx(size / seconds)
            steps = 2 if name in ("literal", "stepwise") else 1
            assert way["updates_per_s"] == pytest.approx(steps / seconds)
            ratio = result["ways"]["literal"]["ms_per_batch"] / way["ms_per_batch"]
            assert way["times_first"] == pytest.approx(ratio)
            assert way["ms_quartiles"][0] <= way["ms_per_batch"] <= way["ms_quartiles"][1]
        work = [result["ways"][name]["gflop_per_batch"] for name in names[:4]]
        assert work == sorted(work, reverse=True) and len(set(work)) == 4
    for name in names:  # twice the images are twice the work, and need more memory
        few_images, many = (result[name] for result in results)
        assert many["gflop_per_batch"] == pytest.approx(2 * few_images["gflop_per_batch"], rel=0.02)
        assert many["peak_memory_mb"] > few_images["peak_memory_mb"]
    for flags, names in (
        (["--arch", "biva"], ["elbo"]),
        (["--arch", "aae", "--latents", "4"], ["aae"]),
        (["--ivae"], ["literal", "stepwise", "joint", "sampled", "elbo", "ivae"]),
    ):
        bench.main([*TINY, "--batch-size", "16", *flags])
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]] == names
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--batch-size", "301"])
    assert capsys.readouterr().err.endswith("error: --batch-size 301: there are 300 images\n")


def test_operations_and_memory_of_a_known_network():
    """One layer: 2 n m b operations forward, and again for the weights."""
    run = train.Run(config_of(), torch.device("cpu"))
    run.model = torch.nn.Linear(784, 1000, bias=False)
    x = torch.ones(64, 784)

    def update(run, x):
        run.model(x.clone()).sum().backward()

    assert bench.operations(run, update, x) == 2 * 2 * 784 * 1000 * 64
    # Parameters, two moments and the gradient, the images, and the layer's output, whose gradient
    # is one number.
    numbers = 4 * 784_000 + 64 * 784 + 64 * 1000
    assert bench.peak_memory(run, update, x) == pytest.approx(4 * numbers / 2**20, rel=0.05)


# --------------------------------------------------------------------------------------------------
# The house and its pages

HOUSE = ("likelihoods", "mine", "rewards", "models", "baselines", "files", "data", "evaluate",
         "settings", "train", "tables", "figures", "bench")  # fmt: skip


def test_imports_point_down():
    """A file imports from files below it, at its top; three of them need torch alone."""
    for position, name in enumerate(HOUSE):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        found = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert all(node in tree.body for node in found), f"{name} imports inside a function"
        names = {a.name for n in found if isinstance(n, ast.Import) for a in n.names}
        names = {
            n.partition(".")[0] for n in names | {getattr(n, "module", None) or "" for n in found}
        }
        assert not names & set(HOUSE[position:]), f"{name} imports {names & set(HOUSE[position:])}"
        allowed = {
            "likelihoods": {"torch"},
            "mine": {"torch"},
            "rewards": {"torch"},
            "tables": set(),
        }
        if name in allowed:
            assert names - {""} <= sys.stdlib_module_names | allowed[name]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE / page).read_text(), re.DOTALL)


def test_python_blocks_of_the_readme(few, tmp_path, monkeypatch):
    """Each runs as it stands: those of a piece in a folder that holds this piece alone."""
    load_run, own, q_value, mine_block, likelihood, probe = blocks("README.md", "python")
    for name, code in (
        ("rewards", own + q_value),
        ("mine", mine_block),
        ("likelihoods", likelihood),
    ):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(HERE / f"{name}.py", folder)
        (folder / "example.py").write_text(code)
        done = subprocess.run([sys.executable, "example.py"], cwd=folder, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    train.main(["--rl", "--dtype", "float32", "--epochs", "1"])  # runs/digits-lvae-rl-0
    names: dict = {}
    exec(load_run, names)
    assert names["z"][-1].shape == (60, 8)
    labels = np.arange(60) % 3
    names = {"train_z": np.eye(3)[labels], "train_labels": labels}
    exec(probe, names | {"test_z": names["train_z"], "test_labels": labels} | names)


def test_the_model_of_ones_own_learns():
    """The README's example: its Q-value rises, by the exact gradient of all steps."""
    names: dict = {}
    code, _, loop = blocks("README.md", "python")[1].partition("for _ in range")
    exec(code, names)
    model, x = names["model"], names["x"]

    def q() -> float:
        return -rewards.joint_loss(model, x, gamma=0.9).value.item()

    before = np.mean([q() for _ in range(20)])
    exec("for _ in range" + loop, names)
    assert np.mean([q() for _ in range(20)]) > before + 5


def equations(text: str) -> set[int]:
    """The numbers of the equations that a text names: Eq. 5 and 6, Eq. 20 to 23, Eq. 26."""
    numbers: set[int] = set()
    for some in re.findall(r"Eq\. ((?:\d+(?:, | and | to |-)?)+)", text):
        numbers |= set(map(int, re.findall(r"\d+", some)))
        for low, high in re.findall(r"(\d+)(?: to |-)(\d+)", some):
            numbers |= set(range(int(low), int(high)))
    return numbers


def test_the_first_table_of_the_readme():
    """Its numbers are those of the results, rounded to one decimal."""
    lines = [line for line in (HERE / "README.md").read_text().splitlines() if line[:1] == "|"]
    groups = {g.label: g for g in tables.groups(tables.read([HERE / "results/fashionmnist.jsonl"]))}
    rows = ("hvae", "hvae-rl", "lvae", "lvae-rl")
    for row, line in zip(rows, lines[2:6], strict=True):
        runs = groups[f"fashionmnist-{row}"].runs
        values = {name: [tables.measures(run)[name] for run in runs] for name in ("probe", "kl")}
        paper = tables.reported(runs[0])["probe"].partition("±")[0]
        _, probe, beside, kl = cells(line)
        assert len(runs) == 5 and beside == f"{float(paper):.1f}"
        assert probe == tables.cell(values["probe"], 1) and kl == f"{np.mean(values['kl']):.1f}"


def test_paper_to_code():
    """Every function that the table names exists, and names one of the equations beside it; each
    equation, figure and section is named by one of the functions."""
    table = (HERE / "README.md").read_text().partition("## Paper → code")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if "`" in line]
    assert len(rows) >= 14
    for paper, code in rows:
        sources = []
        for name in re.findall(r"`(\w+\.\w+)`", code):
            module, _, attribute = name.partition(".")
            if attribute != "py":
                sources.append(inspect.getsource(getattr(globals()[module], attribute)))
        wanted = equations(paper)
        for source in sources if wanted else ():
            assert equations(source) & wanted, (paper, source[:80])
        assert wanted <= set().union(*map(equations, sources)), paper
        for words in ("Algorithm 1", "App. C.2"):
            assert words not in paper or all(words in source for source in sources[:1]), paper
        figures_named = re.findall(r"\d", paper) if "Figure" in paper else []
        for number, source in zip(figures_named, sources, strict=bool(figures_named)):
            assert f"Figure {number}" in source


def commands(page: str) -> list[list[str]]:
    """The words of every python command of a page that stands alone in a line or in backticks."""
    text = (HERE / page).read_text().replace(" && ", "\n")
    lines = re.findall(r"^ *(python \w+\.py .*)$", text, re.MULTILINE)
    lines += re.findall(r"`(python \w+\.py [^`]*)`", text)
    lines = [line for line in lines if "…" not in line and "RUN" not in line]
    return [
        shlex.split(line.replace("$row", "hvae --rl").replace("$seed", "1"))[1:] for line in lines
    ]


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_commands_of_a_page(page, few, tmp_path, monkeypatch, capsys):
    """Each command is understood; those that train make a run, here a short one."""
    monkeypatch.chdir(HERE)
    found = commands(page)
    assert len(found) > 8
    for i, (script, *argv) in enumerate(found):
        name = script.removesuffix(".py")
        assert (HERE / script).exists()
        if name == "train":
            given = vars(settings.parser().parse_args(argv))
            settings.check(settings.defaults(given))
            if given.get("dataset") != "folder" and page == "README.md":
                short = ["--epochs", "1", "--probe", "top", "--train-images", "64"]
                train.main([*argv, *short, "--out", str(tmp_path / str(i))])
        elif argv[0].startswith("results/"):
            out = ["--out", str(tmp_path)] if name == "figures" else []
            {"tables": tables.main, "figures": figures.main}[name]([*argv, *out])
        else:
            assert name in ("evaluate", "tables", "figures", "bench")
