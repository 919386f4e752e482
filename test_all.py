"""Everything is tested here, against independent truths: python -m pytest test_all.py

Tests of real data look in the folder that DATA_DIR names, and for FashionMNIST in Debian's too.
"""

import devices  # before torch: see there

# isort: split
import ast
import glob
import gzip
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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
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
from matplotlib.textpath import FontProperties, TextPath, text_to_path
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.multiclass import OneVsOneClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

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
from likelihoods import LogisticMixture, likelihood
from models import Inference, gaussian
from probe import linear_probe

torch.set_num_threads(1)  # tiny tensors are slower on several
ARCHS = ("hvae", "lvae")
LATENTS = {1: "3", 2: "2c,3", 3: "2c,4,3", 5: "2c,5,4,3,2"}  # all of different shapes


@pytest.fixture(autouse=True)
def seeded(request, monkeypatch):
    """Tests run on the CPU, where numbers repeat, unless they ask for the fixture `cuda`."""
    torch.manual_seed(0)
    if "cuda" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts


def tiny(arch: str, levels: int, dtype=torch.float64, **changes) -> models.Network:
    """A model of 8x8 images. With fewer channels chance may leave a path with no unit alive."""
    config = models.configure(arch, latents=LATENTS[levels], channels=6)
    config = config._replace(image=(1, 8, 8), patch=2, strides=(1, 2, 1, 2, 1)[:levels])
    return baselines.build(config._replace(**changes)).to(dtype)


def images(n: int, size: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.rand(n, 1, size, size) < 0.4).to(dtype)


def gradient(value: torch.Tensor, parameters) -> torch.Tensor:
    """All in one vector."""
    by_each = torch.autograd.grad(
        value, list(parameters), retain_graph=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in by_each])


def assert_same(a, b, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


@pytest.fixture
def fixed_noise(monkeypatch):
    """Samples use one noise vector a latent shape, the same for every row and every path."""

    def rsample(self, sample_shape=()):
        generator = torch.Generator().manual_seed(self.loc[0].numel())
        noise = torch.randn(self.loc.shape[1:], generator=generator, dtype=torch.float64)
        return self.loc + self.scale * noise

    monkeypatch.setattr(Normal, "rsample", rsample)


# --------------------------------------------------------------------------------------------------
# The equations (rewards.py)


def skip_path(model, z: torch.Tensor, level: int, skip: str = "mean") -> torch.Tensor:
    """What the last layer gives at the end of z_l's path, through one prior after another."""
    for below in reversed(range(level)):
        prior = model.prior(below, z)
        z = prior.mean if skip == "mean" else prior.rsample()
    return pixel_shuffle(model.to_pixels(model.decoder[0](z).relu()), model.config.patch)


def literal(model, x, gamma, skip, pay="inferred", beta=1.0, free_bits=0.0):
    """As the equations stand, one path and one KL after another: the KLs, the rewards (Eq. 24), and
    ELBO (Eq. 5, 6), IVAE (Eq. 39), every Q_t (Eq. 26) and their sum (Eq. 28)."""
    levels = model.levels
    posteriors, _, z, _ = model.infer(x)
    log_px, kl, weighed = [], [], []
    for level, value in enumerate(z):
        pixels = skip_path(model, value, level, skip).sigmoid()
        log_px.append((x * pixels.log() + (1 - x) * (1 - pixels).log()).flatten(1).sum(1))
        q, p = posteriors[level], Normal(torch.zeros_like(value), 1)
        if level < levels - 1:
            p = model.prior(level, z[level + 1])
        var_q, var_p = q.variance, p.variance
        d = (var_p / var_q).log() + (var_q + (q.mean - p.mean) ** 2) / var_p - 1
        if model.config.arch == "hvae" and level < levels - 1:  # z_{l+1} is inferred from z_l
            squares = (value - p.mean) ** 2 / var_p - (value - q.mean) ** 2 / var_q
            d = (var_p / var_q).log() + squares  # log q - log p, twice
        d = d / 2
        kl.append(d.flatten(1).sum(1))
        free = kl[level].mean() < free_bits
        weighed.append(beta * (torch.full_like(kl[level], free_bits) if free else kl[level]))
    order = range(levels) if model.config.arch == "hvae" else range(levels)[::-1]
    inferred = [sum(weighed[s] for s in order[: i + 1]) for i in range(levels)]
    paid = [weighed[k] for k in order] if pay == "own" else inferred
    r = [log_px[k] - cost for k, cost in zip(order, paid, strict=True)]
    q_values = [sum(gamma ** (i - t) * r[i] for i in range(t, levels)) for t in range(levels)]
    cost = sum(weighed)
    return kl, r, [log_px[0] - cost, sum(log_px) / levels - cost, *q_values, sum(q_values)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("skip", ["mean", "sample"])
@pytest.mark.parametrize("pay", ["inferred", "own"])
@pytest.mark.parametrize("gamma, weights", [(0.0, (1, 0)), (0.9, (1, 0)), (1.0, (0.5, 0.2))])
def test_losses_are_the_literal_ones(arch, levels, skip, pay, gamma, weights, fixed_noise):
    """Values, all gradients and the KL reported; of the rewards each image's own."""
    model, x, terms = tiny(arch, levels), images(3), (gamma, skip, pay, *weights)
    parameters = list(model.parameters())
    losses = [
        rewards.elbo_loss(model, x, *weights),
        rewards.ivae_loss(model, x, skip, False, *weights),
        *(rewards.stepwise_loss(model, x, t, *terms) for t in range(levels)),
        rewards.joint_loss(model, x, *terms),
    ]
    kl, r, values = literal(model, x, *terms)
    for loss, value in zip(losses, values, strict=True):
        assert_same(loss.value, -value.mean())
        assert_same(gradient(loss.value, parameters), gradient(-value.mean(), parameters))
        assert_same(loss.kl, torch.stack(kl).detach().mean(dim=1))
    inference = model.infer(x)
    kl = rewards.weigh_kl(rewards.kl_terms(inference, model.order), *weights)
    whole = rewards.rewards(model, x, inference, kl, skip=skip, pay=pay)
    assert_same(whole, torch.stack(r))
    assert_same(rewards.rewards(model, x, inference, kl, levels - 1, skip, pay), whole[-1:])
    assert_same(rewards.q_values(whole, gamma), torch.stack(values[2:-1]))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n, levels, gamma", [(2, 1, 0.9), (4, 3, 0.5), (4, 2, 1.0), (3, 3, 0.0)])
@pytest.mark.parametrize("pay", ["inferred", "own", "ivae"])
def test_sampled_is_unbiased(arch, n, levels, gamma, pay, fixed_noise):
    """In the mean over all orders of the batch. Fewer images than paths take every path."""
    model, x, terms = tiny(arch, levels), images(n), dict(beta=0.5, free_bits=0.2)
    parameters = list(model.parameters())
    if pay == "ivae":
        whole, sampled = rewards.ivae_loss, partial(rewards.ivae_loss, sampled=True)
    else:
        whole, sampled = rewards.joint_loss, rewards.sampled_loss
        terms |= dict(gamma=gamma, pay=pay)
    losses = [sampled(model, x[list(p)], **terms) for p in itertools.permutations(range(n))]
    values, expected = torch.stack([loss.value for loss in losses]), whole(model, x, **terms)
    assert levels == 1 or values.std() > 1e-3  # the estimate does depend on the order
    assert_same(values.mean(), expected.value)
    assert_same(gradient(values.mean(), parameters), gradient(expected.value, parameters))
    assert_same(losses[-1].kl, expected.kl)
    few = x[: max(1, levels - 1)]
    assert_same(sampled(model, few, **terms).value, whole(model, few, **terms).value)


def test_sampled_by_hand(fixed_noise):
    """Each image's one path, and the KL of all images; 7 shared by the weights 1, 1.5, 1.75."""
    model, x = tiny("lvae", 3), images(7)
    paths = [(1, 5, 7), (1.5, 3, 5), (1.75, 0, 3)]  # weight, first image, end; by step
    kl, r, _ = literal(model, x, 0.5, "mean")
    paid = torch.stack(kl[::-1]).cumsum(dim=0)
    log_px = torch.stack(r) + paid
    value = sum(w * (paid[t].mean() - log_px[t, a:b].mean()) for t, (w, a, b) in enumerate(paths))
    assert_same(rewards.sampled_loss(model, x, 0.5).value, value)


def test_steps_share_the_images():
    for gamma, levels in itertools.product((0.0, 0.5, 0.9, 0.98, 1.0), (1, 2, 5, 10)):
        weights = rewards.path_weights(levels, gamma)
        for n in (levels, levels + 1, 93, 128):
            paths = rewards.share_images(n, weights)
            counts = [len(range(n)[path]) for path in paths]
            assert [i for path in paths[::-1] for i in range(n)[path]] == list(range(n))
            assert min(counts) >= 1
            share = [n * w / sum(weights) for w in weights]
            assert n < 128 or counts == pytest.approx(share, abs=1.5)
    assert rewards.share_images(4, [1.0] * 5) == [slice(None)] * 5


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("loss", "args"),
    [("stepwise", [1, 0.9, "sample"]), ("joint", [0.9, "sample"]), ("sampled", [0.9])],
)
def test_gradients_against_finite_differences(arch, loss, args, fixed_noise):
    model, x, values, step = tiny(arch, 3), images(6), [], 1e-6
    call = partial(getattr(rewards, f"{loss}_loss"), model, x, *args)
    start = parameters_to_vector(model.parameters()).detach()
    direction = torch.randn_like(start)
    along = gradient(call().value, model.parameters()) @ direction
    for shift in (step, -step):
        vector_to_parameters(start + shift * direction, model.parameters())
        values.append(call().value.item())
    assert along.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


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
        priors = [self.prior(level, z) for level, z in enumerate(latents[1:])]
        return Inference(posteriors, [*priors, gaussian(0 * x[:1], 0 * x[:1] + 1)], latents)

    def prior(self, level, z):
        return gaussian(self.down[level + 1](z), torch.full_like(z, self.NOISE))

    def decode(self, z):
        return gaussian(self.down[0](z), torch.full_like(z, self.NOISE))


@torch.no_grad()
def exact_posterior(model: LinearGaussian, off: float = 0.0) -> torch.Tensor:
    """Sets q to the posterior, or to one shifted and too wide; returns the variance of x. From the
    covariance of (x, z_1, ..., z_L) = A (x, z_1, ..., z_L) + noise."""
    weights = 0.8 + 0.2 * torch.arange(model.levels, dtype=torch.float64)
    for layer, weight in zip(model.down, weights, strict=True):
        layer.weight.fill_(weight)
    noise = torch.tensor([model.NOISE**2] * model.levels + [1.0], dtype=torch.float64)
    spread = (torch.eye(model.levels + 1) - weights.diag(1)).inverse()
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
def test_kl_terms_sum_to_the_kl_of_all_latents(order):
    """q(z_1 ... z_L|x) and p(z_1 ... z_L) of a linear-Gaussian model are Gaussians, too: z is
    W z + u + noise. Bottom-up the closed form of each level misses their KL."""
    model, x = LinearGaussian(order).double(), torch.full((400_000, 1), 1.3, dtype=torch.float64)
    exact_posterior(model, off=0.3)
    w_q, w_p, cov_q = torch.zeros(3, 3, 3, dtype=torch.float64)
    u = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for t, level in enumerate(order):
            weight = model.up[t].weight[0]
            u[level] = weight[0] * 1.3 + model.up[t].bias[0]
            cov_q[level, level] = model.log_scale[t].exp() ** 2
            if t > 0:
                w_q[level, order[t - 1]] = weight[1]
        for level in range(2):
            w_p[level, level + 1] = model.down[level + 1].weight
        inference = model.infer(x)
        kl = rewards.kl_terms(inference, order).sum(dim=0)
        pairs = zip(inference.posteriors, inference.priors, strict=True)
        closed = sum(kl_divergence(q, p) for q, p in pairs).mean()
    cov_p = torch.tensor([model.NOISE**2, model.NOISE**2, 1.0], dtype=torch.float64).diag()
    q, p = (
        MultivariateNormal(inverse @ mean, inverse @ cov @ inverse.T)
        for mean, w, cov in ((u, w_q, cov_q), (0 * u, w_p, cov_p))
        for inverse in [(torch.eye(3) - w).inverse()]
    )
    exact, error = kl_divergence(q, p).item(), kl.std().item() / len(kl) ** 0.5
    assert kl.mean().item() == pytest.approx(exact, abs=4 * error) and 4 * error < 0.02
    assert (abs(closed.item() - exact) > 0.2) == (order[0] == 0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_importance_weighted_bound_against_the_exact_likelihood(order):
    """With the exact posterior every weight is p(x), whatever the sample."""
    model, x = LinearGaussian(order).double(), torch.randn(500, 1, dtype=torch.float64)
    evidence = Normal(0 * x, exact_posterior(model).sqrt()).log_prob(x).squeeze(1)
    assert_same(rewards.importance_weighted_bound(model, x, 7), evidence)
    exact_posterior(model, off=0.3)
    samples, truth = (1, 5, 50, 3000), evidence.mean().item()
    bounds = [rewards.importance_weighted_bound(model, x, k).mean() for k in samples]
    assert bounds[0] < bounds[1] - 0.05 < bounds[2] - 0.05 < truth
    assert bounds[3] == pytest.approx(truth, abs=0.01)


def exact_q_values(model: LinearGaussian, x, gamma, skip):
    """E[sum_t Q_t]. It is quadratic in the posteriors' noise: -1 and 1 have the same mean. A level
    whose prior is given a sample that is inferred later pays log q - log p of its own sample."""
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
            if top or model.order[0] > 0:
                paid = paid + 0.5 * ((s + (mean[level] - p) ** 2) / v - 1 - (s / v).log())
            else:
                paid = paid + 0.5 * ((z[level] - p) ** 2 / v - noise[t] ** 2 - (s / v).log())
            value, variance = z[level], 0  # of the mean of what is below
            for below in range(level, -1, -1):
                w = model.down[below].weight
                value, variance = w * value, w**2 * variance + c * (skip == "sample" and below > 0)
            log_px = -((x - value) ** 2 + variance) / (2 * c) - 0.5 * math.log(2 * math.pi * c)
            total = total + sum(gamma**i for i in range(t + 1)) * (log_px - paid)
    return total.mean() / 2**model.levels


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("skip", ["mean", "sample"])
def test_losses_of_a_model_of_ones_own(order, skip):
    """In the mean all three are the exact Q-values, and so are their gradients."""
    model, x = LinearGaussian(order).double(), 1.5 * torch.randn(64, 1, dtype=torch.float64)
    value = -exact_q_values(model, x, 0.9, skip)
    exact = gradient(value, model.parameters())
    many = x.repeat(4000, 1)[torch.randperm(64 * 4000)]  # 4000 samples of each x
    for estimate in (
        rewards.joint_loss(model, many, 0.9, skip).value,
        rewards.sampled_loss(model, many, 0.9, skip).value,
        sum(rewards.stepwise_loss(model, many, t, 0.9, skip).value for t in range(3)),
    ):
        assert estimate.item() == pytest.approx(value.item(), rel=0.005)
        assert (gradient(estimate, model.parameters()) - exact).norm() < 0.03 * exact.norm()


def test_adversarial_loss_by_hand():
    """D(z) = sigmoid(discriminator(z)). Each term moves its own part. Drawn next is the prior."""
    run = train.Run(settings.defaults({"arch": "aae", "channels": 4}), torch.device("cpu"))
    model, x = run.model.double(), images(4, 28)
    (loss,) = train.losses(run.config, 1)
    torch.manual_seed(8)
    value, kl = loss(model, x)
    torch.manual_seed(8)
    inference = model.infer(x)
    z = inference.latents[0]
    assert_same(kl, kl_divergence(inference.posteriors[0], inference.priors[0]).mean()[None])
    prior = torch.randn(4, 8, dtype=torch.float64)
    d_prior, d_z = (torch.sigmoid(model.discriminator(v)) for v in (prior, z))
    p = skip_path(model, z, 0).sigmoid()
    log_px = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1).mean()
    autoencoder = -log_px - d_z.log().mean()
    adversary = -(d_prior.log() + (1 - d_z).log()).mean()
    assert_same(value, autoencoder + adversary)
    ours = list(model.discriminator.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in ours)]
    for group, parameters, term in zip(
        run.optimizer.param_groups, (rest, ours), (autoencoder, adversary), strict=True
    ):
        assert set(group["params"]) == set(parameters)
        assert_same(gradient(value, parameters), gradient(term, parameters))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("skip", ["mean", "sample"])
def test_one_descent_equals_paths_one_by_one(arch, skip, fixed_noise):
    """Of the steps asked for, in their order, each of its own images. And Markov: nothing above a
    level reaches the pixels. `sample` goes down from N(0, I)."""
    model, x = tiny(arch, 5), images(3)
    z = latent_values(model.latent_shapes)
    priors = [model.prior(level, z[level + 1]) for level in range(4)]
    rows = {0: slice(0, 2), 2: slice(None), 3: slice(2, 3), 4: slice(1, 3)}  # none of level 1
    asked = [rows.get(level) for level in model.order]
    log_px = rewards.skip_paths(model, x, Inference([], priors, z), asked, skip)
    for level, value in zip([k for k in model.order if k != 1], log_px, strict=True):
        logits = skip_path(model, z[level][rows[level]], level, skip)
        by_itself = Bernoulli(logits=logits).log_prob(x[rows[level]]).flatten(1).sum(1)
        assert_same(value, by_itself)
    for level in range(5):  # `generate` takes the lowest level given
        pixels = model.generate([None] * level + z[level:], skip).mean
        assert_same(pixels, skip_path(model, z[level], level, skip).sigmoid())
        assert moves(pixels, z) == [k == level for k in range(5)]
    with torch.random.fork_rng():  # what follows is drawn again
        pixels = model.sample(7).mean
    top = torch.randn(7, 2, dtype=torch.float64)
    assert_same(pixels, skip_path(model, top, 4, "sample").sigmoid())


class Broad(LinearGaussian):
    """Its distributions have no event dimension: log_prob is (B, D) in place of (B,)."""

    def __init__(self, order, parts):
        super().__init__(order)
        self.parts = parts

    def infer(self, x):
        inference = super().infer(x)
        bare = {name: [d.base_dist for d in getattr(inference, name)] for name in self.parts[:2]}
        return inference._replace(**bare) if len(bare) == 2 else inference

    def decode(self, z):
        return super().decode(z).base_dist


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("parts", [("posteriors", "priors"), ()])
def test_values_that_are_not_one_an_image_are_refused(order, parts):
    model, x = Broad(order, parts).double(), torch.randn(8, 1, dtype=torch.float64)
    q = dict(gamma=0.9)
    for loss in (
        rewards.elbo_loss, rewards.ivae_loss, partial(rewards.stepwise_loss, step=1, **q),
        partial(rewards.joint_loss, **q), partial(rewards.sampled_loss, **q),
        partial(rewards.importance_weighted_bound, samples=2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"one number an image, as of .*Independent"):
            loss(model, x)


# --------------------------------------------------------------------------------------------------
# models.py, baselines.py and likelihoods.py


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
    inference = model.infer(x)
    for q, p, z, shape in zip(*inference[:3], model.latent_shapes, strict=True):
        assert q.mean.shape == z.shape == (2, *shape) and p.mean.shape[1:] == shape
    for pixels in (model.generate(inference.latents), model.sample(2)):
        assert isinstance(pixels, LogisticMixture) == (image[0] == 3)
        assert pixels.mean.shape == pixels.sample().shape == (2, *image)
    if levels in (1, 5):
        loss = rewards.joint_loss(model, x, 0.9) if arch in ARCHS else rewards.elbo_loss(model, x)
        loss.value.backward()
        for name, p in model.named_parameters():
            assert "discriminator" in name or (p.grad.isfinite().all() and p.grad.any())


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
    colour = [(16, 8, 8), (8, 4, 4), (128,), (64,), (64,)]
    grey = [(8, 7, 7), (64,), (32,), (16,), (8,)]
    for image, shapes in [((3, 32, 32), colour), ((3, 64, 64), colour), ((1, 28, 28), grey)]:
        small = models.configure(arch, "small", image)
        assert baselines.build(small).latent_shapes == shapes
        if image[0] == 3:
            wide = ("16c", "8c", "256", "128", "64")
            assert models.configure(arch, "best", image) == small._replace(latents=wide)
    assert models.configure(arch, "best") == small._replace(channels=64)
    ten = models.configure(arch, levels=10)
    assert models.configure(arch, "deep") == ten._replace(he_init=True)
    assert models.configure(arch, latents="4c, 2").latents == ("4c", "2")
    assert models.configure("vae").latents == ("8",)
    deep = models.configure(arch, "paper", (3, 64, 64), levels=7)
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
        ("lvae", dict(size="deep", image=(3, 32, 32)), "colour has small, best and paper"),
        ("lvae", dict(image=(3, 30, 30)), "squares whose side is a multiple of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.configure(arch, **change)


def moves(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[bool]:
    """Which of the inputs a value depends on."""
    largest = [gradient(value.sum() + 0 * v.sum(), [v]).abs().max() for v in inputs]
    assert all(size == 0 or size > 1e-6 for size in largest)
    return [bool(size > 0) for size in largest]


def latent_values(shapes: list[tuple]) -> list[torch.Tensor]:
    return [torch.randn(3, *s, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("arch", "neighbour"), [("hvae", -1), ("lvae", 1), ("lvae", None)])
def test_what_each_level_is_conditioned_on(arch, neighbour):
    """Eq. 1: q(z_l|z_{l-1}, x), Eq. 2: q(z_l|z_{l+1}, x), mean field: q(z_l|x). p(z_l|z_{l+1})."""
    model, x = tiny(arch, 5, mean_field=neighbour is None), images(3).requires_grad_()
    assert model.order == ((0, 1, 2, 3, 4) if arch == "hvae" else (4, 3, 2, 1, 0))  # section 2.1
    z = latent_values(model.latent_shapes)
    with mock.patch.object(Independent, "rsample", side_effect=[z[k] for k in model.order]):
        posteriors, priors, *_ = model.infer(x)
    for level, (q, p) in enumerate(zip(posteriors, priors, strict=True)):
        others = [neighbour is not None and k == level + neighbour for k in range(5)]
        for name in ("mean", "stddev"):
            assert moves(getattr(q, name), [x, *z]) == [True, *others]
            assert moves(getattr(p, name), [x, *z]) == [False, *(k == level + 1 for k in range(5))]


@pytest.mark.parametrize(("arch", "levels"), [("hvae", 3), ("lvae", 3), ("biva", 3), ("aae", 1)])
def test_representation_is_the_mean_given_means(arch, levels, monkeypatch):
    model, x = tiny(arch, levels), images(4)
    means, samples = (model.infer(x, sample).latents for sample in (False, True))
    monkeypatch.setattr(Independent, "rsample", lambda q: q.mean)
    assert_same(means, model.infer(x).latents)
    assert not torch.equal(means[0], samples[0])


@pytest.mark.parametrize("arch", ["hvae", "lvae"])
def test_initial_skip_paths_keep_their_scale(arch):
    """In `deep`, weights around latents vary as He et al. say, and z_10 moves pixels as z_1 does,
    not half a million times less."""
    ratio = {}
    for size in ("small", "deep"):
        torch.manual_seed(0)
        model = baselines.build(models.configure(arch, size, levels=10))
        moved = []
        for level in (0, 9):
            z = torch.randn(200, *model.latent_shapes[level])
            with torch.no_grad():
                x = model.generate([None] * level + [z]).mean
            moved.append(x.std(dim=0).mean())
        ratio[size] = moved[1] / moved[0]
    assert ratio["small"] < 1e-5 and 0.3 < ratio["deep"] < 3
    for layer, rows, gain in [
        (model.decoder[5][0].embed, None, torch.nn.init.calculate_gain("linear")),
        (model.prior_heads[5].head, 64, torch.nn.init.calculate_gain("relu")),
        (model.posterior_heads[5].head, 64, torch.nn.init.calculate_gain("relu")),
    ]:
        spread = gain / layer.in_features**0.5
        assert layer.weight[:rows].std().item() == pytest.approx(spread, rel=0.05)


def test_scale_is_one_at_zero():
    head = models.ToGaussian(4, 2, (3,)).double()
    torch.nn.init.zeros_(head.head.bias)
    assert_same(head(torch.zeros(2, 4, 2, 2).double()).stddev, torch.ones(2, 3).double())


def test_biva_is_conditioned_as_it_says():
    """q(z_l^BU|x, z_<l^BU), q(z_L|x, z_<L^BU), q(z_l^TD|x, z_<l^BU, z_>l), and p(z_l|z_>l)."""
    model, x = tiny("biva", 5), images(3).requires_grad_()
    shapes = [(s[0] // 2, *s[1:]) for s in model.latent_shapes[:4]]
    up, down = latent_values([*shapes, model.latent_shapes[4]]), latent_values(shapes)
    with mock.patch.object(Independent, "rsample", side_effect=[*up, *reversed(down)]):
        posteriors, priors, latents, pixels = model.infer(x)
    inputs = [x, *up, *down]  # up[4] is z_L
    for level, (q, p) in enumerate(zip(posteriors, priors, strict=True)):
        below, above = [k < level for k in range(5)], [k > level for k in range(5)]
        others = [k != level for k in range(5)]
        for name in ("mean", "stddev"):
            bottom_up, top_down = getattr(q, name).chunk(2, dim=1)  # of z_L: two halves alike
            assert moves(bottom_up, inputs) == [True, *below, *[False] * 4]
            assert moves(top_down, inputs) == [True, *others, *above[:4]]
            for half in getattr(p, name).chunk(2, dim=1):
                assert moves(half, inputs) == [False, *above, *above[:4]]
        assert torch.equal(latents[level], torch.cat([up[level], *down[level : level + 1]], dim=1))
    assert moves(pixels.mean, inputs) == [False, *[True] * 9]


def test_biva_generates_what_it_infers(fixed_noise):
    """From the latents alone, lower levels from their priors. The ELBO has log p - log q of the
    sample, but for z_L, whose posterior and prior depend on nothing drawn after it."""
    model, x = tiny("biva", 3), images(4)
    _, priors, z, pixels = inference = model.infer(x)
    assert_same(model.generate(z).mean, pixels.mean)
    for skip in ("mean", "sample"):
        z_2 = priors[1].mean if skip == "mean" else priors[1].rsample()
        by_skip = model.generate([z[0], None, z[2]], skip).mean
        assert_same(by_skip, model.generate([z[0], z_2, z[2]]).mean)
        assert (model.generate([None, *z[1:]], skip).mean - pixels.mean).abs().max() > 1e-6
    elbo = pixels.log_prob(x) - kl_divergence(inference.posteriors[2], priors[2])
    for level in (0, 1):
        q, p = inference.posteriors[level], priors[level]
        elbo += p.log_prob(z[level]) - q.log_prob(z[level])
    assert_same(rewards.elbo_loss(model, x).value, -elbo.mean())


def test_half_precision_never_reaches_likelihoods():
    model, x = tiny("lvae", 3, torch.float32), images(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inference = model.infer(x)
        r = rewards.rewards(model, x, inference, rewards.kl_terms(inference, model.order))
        means = [d.mean for d in inference.posteriors + inference.priors]
        logits = model.generate(inference.latents).base_dist.logits
        losses = [f(model, x, 0.9).value for f in (rewards.joint_loss, rewards.sampled_loss)]
    assert all(v.dtype == torch.float32 for v in (r, *losses, *means, logits))


def random_raw(channels: int, n: int, side: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, LogisticMixture.parameters(channels), side, side, dtype=dtype)


def eight_bit(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape).double() / 255


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v > 0 else math.exp(v) / (1 + math.exp(v))


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
                above = 1.0 if pixel[c] > 1 - half else sigmoid((pixel[c] + half - m) / scale)
                below = 0.0 if pixel[c] < half - 1 else sigmoid((pixel[c] - half - m) / scale)
                term *= above - below
            probability += term
        total += math.log(probability)
    return total


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_logistic_mixture_equals_the_literal_one(channels):
    raw, x = random_raw(channels, 3, 4, torch.float64), eight_bit(3, channels, 4, 4)
    x[0, :, 0, 0], x[1, :, 0, 0] = 0, 1  # the open bins at both ends
    x[2, 0, 1, 1], x[2, -1, 1, 1] = 0, 1
    expected = torch.stack([literal_log_prob(*pair) for pair in zip(raw, x, strict=True)])
    whole = LogisticMixture(raw, channels)
    patches = LogisticMixture(pixel_unshuffle(raw, 2), channels, patch=2)
    assert_same([whole.log_prob(x), patches.log_prob(x)], [expected, expected])
    assert_same(patches.mean, whole.mean)
    single = LogisticMixture(raw.float(), channels).log_prob(x.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)


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
    with pytest.raises(RuntimeError, match="no second derivative"):  # not silently nothing
        torch.autograd.grad(p.log_prob(x) @ weight, raw, create_graph=True)
    x = (0.9 * x + 0.05).requires_grad_()  # inside the open bins: finite differences hold
    bounds |= dict(fast_mode=True)
    torch.autograd.gradcheck(lambda x: p.log_prob(x), x, eps=1e-6, **bounds)
    torch.autograd.grad(p.log_prob(x).sum(), raw, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize(("channels", "values"), [(3, 4), (1, 256)])
def test_samples_have_the_probabilities(channels, values):
    """Chi-square over all joint values of the channels."""
    n, raw = 200_000, random_raw(channels, 1)
    drawn = LogisticMixture(raw.expand(n, -1, -1, -1), channels, values=values).sample()
    x, counts = drawn.unique(dim=0, return_counts=True)
    steps = x * (values - 1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)  # values there are
    every = LogisticMixture(raw.expand(len(x), -1, -1, -1), channels, values=values)
    expected = n * every.log_prob(x).double().exp()
    terms = ((counts - expected).square() / expected)[expected > 5]
    freedom = len(terms) - 1
    assert abs(terms.sum() - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("channels, raw", [(1, (4, 16, 2, 2)), (3, (4, 1600, 2, 2))])
def test_images_that_would_be_broadcast_or_reshaped_are_refused(channels, raw):
    p, x = likelihood(torch.randn(raw), channels, patch=4), torch.rand(4, channels, 8, 8)
    assert p.log_prob(x).shape == (4,) and "torch.Size([4, " in repr(p)
    for wrong in (x.permute(0, 2, 3, 1), x.view(4, -1, 4, 16), x[:, 0], x[:1], (255 * x).byte()):
        with pytest.raises(ValueError, match=r"must be floats in \[0, 1\] of shape \(4, "):
            p.log_prob(wrong)


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
# evaluate.py, probe.py and mine.py


class Stub(nn.Module):
    """Its latents are functions of x (B, C, H, W), with noise where it samples."""

    def __init__(self, *levels, noise=0.0):
        super().__init__()
        self.functions, self.levels, self.noise = levels, len(levels), noise
        self.latent_shapes = [f(torch.zeros(1, 1, 1, 1)).shape[1:] for f in levels]
        self.device = torch.device("cpu")

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


def test_unknown_names_are_refused():
    model, x = tiny("hvae", 2), images(4)
    for wrong in ({"skip": "median"}, {"pay": "none"}):
        with pytest.raises(ValueError, match="unknown"):
            rewards.joint_loss(model, x, 0.9, **wrong)
    with pytest.raises(ValueError, match="unknown skip"):
        model.generate([None, torch.zeros(4, 3, dtype=torch.float64)], "median")


def test_probe_on_known_separability():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 3000)
    angle = labels * 2 * np.pi / 10
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) + rng.normal(0, 0.02, (3000, 2))

    def probe(z, y=labels):
        return linear_probe(z[:2000], y[:2000], z[2000:], y[2000:])

    assert probe(circle * [1e3, 10] + 7) == 100  # one-versus-rest cannot: no line parts a class
    overlap = labels % 2 + rng.normal(0, 1, 3000)  # Bayes: Phi(1/2) = 69.1 %
    assert probe(overlap[:, None], labels % 2) == pytest.approx(69.1, abs=4)
    assert probe(rng.normal(0, 1, (3000, 5))) < 15  # nothing there
    assert probe(circle * 1e-4) < 60  # rounding noise of a collapsed level is not blown up
    for kind in ("u1", "i8", "f2"):
        assert probe((circle * 50 + 100).astype(kind)) == 100
    names, holes = labels.astype(str).astype(object), np.where(circle > 0.9, np.nan, circle)
    assert probe(circle[:, :1] > 0, circle[:, 0] > 0) == probe(circle, names) == 100
    two = [(circle, y) for y in (labels[:, None], labels[:9], labels + 0.5, names)]
    for wrong in (*two, (holes, labels), (circle[:, :1], labels), (overlap, labels)):
        with pytest.raises(ValueError):
            linear_probe(circle, labels, *wrong)


def test_probe_of_many_classes():
    """Against scikit-learn's own pipeline in one piece: standardise, PCA, one-versus-one."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (30, 60))
    labels = np.arange(1800) % 30
    z = (centres[labels] + rng.normal(0, 1.6, (1800, 60))) @ rng.normal(0, 0.3, (60, 60))
    z = np.float32(z + 3)

    def by_sklearn(a, ya, b, yb, *steps, **options):
        machine = OneVsOneClassifier(LinearSVC(dual=False, **options))
        return 100 * make_pipeline(StandardScaler(), *steps, machine).fit(a, ya).score(b, yb)

    many = z[:1200], labels[:1200], z[1200:], labels[1200:]  # 80 images a pair, a quarter is 20
    expected = by_sklearn(*many, PCA(20), tol=1e-2)
    assert linear_probe(*many) == pytest.approx(expected, abs=0.5) and expected > 40
    few = [v[many[k] < 20] for v, k in zip(many, (1, 1, 3, 3), strict=True)]  # with all dimensions
    assert linear_probe(*few) == pytest.approx(by_sklearn(*few), abs=0.3)
    spread = rng.normal(size=(1800, 513)) * np.geomspace(3, 0.1, 513)  # classes differ where little
    wide = rng.normal(size=(5, 513))[labels % 5] * 0.05 + spread @ rng.normal(size=(513, 513)) / 16
    for dims, n, steps in ((513, 1200, [PCA(256, svd_solver="full")]), (512, 1200, [])):
        whole = wide[:n, :dims], labels[:n] % 5, wide[n:, :dims], labels[n:] % 5
        assert linear_probe(*whole) == pytest.approx(by_sklearn(*whole, *steps), abs=0.3)


def test_probes_of_samples_and_of_binarised_images():
    """Of classes at -1 and 1 with unit noise Φ(1) of the samples are right, and all means. Where a
    quarter of the pixels flips, 3/4 of the binarised means and 3/4 Φ(1) + 1/4 Φ(-1) of samples."""
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
        probes = evaluate.probes(model, two, kind=kind)
        assert probes["z1"] == probes["all"] == pytest.approx(100 * right, abs=error)


@pytest.mark.parametrize("arch, depth", [("hvae", 1), ("lvae", 1), ("biva", 1), ("lvae", 3)])
def test_densities_are_those_of_all_latents_together(arch, depth):
    """By log p(x, z) - log q(z|x) of each sample. They leave the random state and repeat."""
    model = tiny(arch, 3, torch.float32, image=(depth, 8, 8))
    pictures = torch.randint(0, 256, (250, depth, 8, 8), dtype=torch.uint8)
    before = torch.get_rng_state()
    measured, again = evaluate.densities(model, pictures, 3), evaluate.densities(model, pictures, 3)
    assert measured == again and torch.equal(before, torch.get_rng_state())
    assert evaluate.densities(model, pictures) == measured | {"iwae": None}

    def log_weights(inference, x):
        log_w = model.generate(inference.latents).log_prob(x)
        for q, p, z in zip(*inference[:3], strict=True):
            ratio = Normal(p.mean, p.stddev).log_prob(z) - Normal(q.mean, q.stddev).log_prob(z)
            log_w = log_w + ratio.flatten(1).sum(dim=1)
        return log_w

    with torch.no_grad(), devices.seeded(torch.device("cpu"), 0):
        x = data.to_input(pictures)
        inference = model.infer(x)
        elbo, many = log_weights(inference, x), []
        for samples in (2, 1):  # of the importance-weighted bound, two images and more at once
            repeated = x.repeat(samples, 1, 1, 1)
            many += log_weights(model.infer(repeated), repeated).view(samples, 250)
        below = [model.generate([None] * k + inference.latents[k:]).log_prob(x) for k in range(3)]
    iwae = torch.stack(many).logsumexp(dim=0) - math.log(3)
    by_hand = [*rewards.kl_terms(inference, model.order), *below, elbo, iwae]
    values = [*measured["kl"], *measured["log_px_given_z"], measured["elbo"], measured["iwae"]]
    assert values == pytest.approx([v.double().mean().item() for v in by_hand], rel=1e-6)


def test_an_evaluation_keeps_what_it_has():
    model = tiny("lvae", 2, torch.float32)
    pictures = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    labels = (pictures[:, :, :4].float().mean(dim=(1, 2, 3)) > 127).long()  # of the upper half
    few = data.Data(pictures[:100], labels[:100], pictures[100:], labels[100:], ("0", "1"))
    top = evaluate.evaluate(model, few, {"epoch": 3}, samples=2, probe="top")
    whole, measured = evaluate.probes(model, few), evaluate.densities(model, few.test, 2)
    a, b = (
        torch.cat(evaluate.representations(model, p), 1).double() for p in (few.train, few.test)
    )
    expected = linear_probe(*(v.numpy() for v in (a, few.train_labels, b, few.test_labels)))
    assert a.shape == (100, 2 * 4 * 4 + 3) and list(whole) == ["z1", "z2", "all"]
    assert whole["all"] == pytest.approx(expected, abs=1)  # a in float64
    assert top == measured | {
        "epoch": 3, "probe": {"z2": whole["z2"]}, "mine": {}, "iwae_samples": 2,
        "bpd": pytest.approx(-measured["elbo"] / 64 / math.log(2)),
        "active_units": evaluate.active_units(model, few.test),
    }  # fmt: skip
    # The other levels are made anew; what was measured is not, but for other samples.
    marked, kind = top | {"elbo": "kept"}, "binarised-sample"
    every = evaluate.evaluate(model, few, marked, samples=2)
    assert every == marked | {"probe": whole}
    more = evaluate.evaluate(model, few, every, 2, "top", kind, mine_levels=(0,))
    assert more == every | {
        "probe_binarised_sample": evaluate.probes(model, few, "top", kind),
        "mine": {"z1": evaluate.level_information(model, few, 0)},
    }
    marked = more | {"probe": {"all": "kept"}, "mine": {"z1": "kept"}}
    again = evaluate.evaluate(model, few, marked, 3, mine_levels=(0,))
    assert again == marked | evaluate.densities(model, few.test, 3) | {"iwae_samples": 3}
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


@pytest.mark.parametrize(
    "dims, rho, tolerance", [(1, 0.9, 0.05), (4, 0.5, 0.07), (20, 0.5, 0.45), (2, 0.0, 0.02)]
)
def test_mine_on_gaussians(dims, rho, tolerance):
    """I = -d/2 ln(1 - rho^2), within what a network of this size and budget reaches."""
    truth = -dims / 2 * math.log(1 - rho**2)
    x, noise = torch.randn(2, 30_000, dims)
    z = rho * x + math.sqrt(1 - rho**2) * noise
    estimate = mine.mutual_information(x, z, hidden=256, epochs=10, lr=1e-3)
    assert estimate.nats == estimate.curve[-1] == pytest.approx(truth, abs=tolerance)
    assert estimate.ceiling == pytest.approx(math.log(6000))


def test_donsker_varadhan_with_the_true_density_ratio():
    x, noise = torch.randn(2, 20_000, 1)

    def ratio(a, b):
        return (Normal(0.8 * a, 0.6).log_prob(b) - Normal(0, 1).log_prob(b)).squeeze(-1)

    bound = mine.donsker_varadhan(ratio, x, 0.8 * x + 0.6 * noise, torch.Generator().manual_seed(0))
    assert bound == pytest.approx(-math.log(0.6), abs=0.02)


def test_mine_never_exceeds_its_ceiling(monkeypatch):
    """z = x has infinite mutual information; any statistic, however extreme, reads at most ln n."""
    x, generator = torch.randn(64, 3), torch.Generator().manual_seed(0)
    for s in (1.0, 100.0, 1e4):
        bound = mine.donsker_varadhan(
            lambda a, b, s=s: -s * (a - b).square().sum(-1), x, x, generator
        )
        assert bound <= math.log(64) + 1e-6
    assert bound == pytest.approx(math.log(64), abs=0.01)
    same = x[:16].repeat(5, 1)
    monkeypatch.setattr(mine, "donsker_varadhan", lambda *args: math.log(80))  # its own limit
    estimate = mine.mutual_information(same, same, (same, same), hidden=32, epochs=3)
    assert estimate.nats == estimate.ceiling == pytest.approx(math.log(16))


def test_mine_gradient_and_moving_average():
    """The gradient of ln E[exp T] is divided by a moving average, corrected for its own bias."""
    average, by_hand, rate = mine.MovingLogMean(0.1), 0.0, 0.1
    for step in range(1, 5):
        joint, product = (torch.randn(50, dtype=torch.float64).requires_grad_() for _ in range(2))
        by_hand = (1 - rate) * by_hand + rate * product.exp().mean().item()
        corrected = by_hand / (1 - (1 - rate) ** step)
        slopes = torch.autograd.grad(mine.mine_loss(joint, product, average), [joint, product])
        assert_same(slopes[0], torch.full_like(joint, -1 / 50))
        assert_same(slopes[1], product.detach().exp() / 50 / corrected)
    huge = mine.MovingLogMean().update(torch.tensor(5000.0))
    assert huge.item() == pytest.approx(5000)


def truth(name: str, n: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Pairs (N,) or (N, 2) and their mutual information in nats."""
    noise, sign, angle = torch.randn(n), torch.randint(0, 2, (n,)), 2 * math.pi * torch.rand(n)
    if name == "binary":  # a symmetric channel that flips a tenth: ln 2 - H(.1)
        return sign, sign ^ (torch.rand(n) < 0.1), 0.368
    if name == "classes":
        return torch.arange(n) % 10, torch.arange(n) % 10, math.log(10)
    if name == "circle":  # uniform angle less angular noise: ln 2 pi - ln(.3 sqrt(2 pi e))
        x, z = (torch.stack([a.cos(), a.sin()], 1) for a in (angle, angle + 0.3 * noise))
        return x, z, math.log(2 * math.pi / 0.3) - math.log(2 * math.pi * math.e) / 2
    x = torch.randn(n)  # z = +-x + .3 noise: by Monte Carlo integration of ln p(z | x) / p(z)
    return x, (2 * sign - 1) * x + 0.3 * noise, 0.731


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["binary", "classes", "circle", "signs"])
def test_mine_on_truths_that_are_not_gaussian(name, beside):
    """Within 0.1 nats, also beside dimensions: constant in training alone, rare, or noise."""
    n, test = 12_000, 4000
    *pairs, nats = truth(name, n)
    if beside:
        constant = (torch.arange(n) < test)[:, None] * torch.rand(n, 2).round() + 0.1
        rare = (torch.rand(2, n, 3) < 1e-3).float()
        scaled = torch.randn(2, n, 2) * torch.tensor([1e-3, 1e3])
        parts = zip(pairs, rare, scaled, strict=True)
        pairs = [torch.cat([a.reshape(n, -1), constant, b, c], 1) for a, b, c in parts]
    x, z = pairs
    held_out = x[:test], z[:test]
    estimate = mine.mutual_information(x[test:], z[test:], held_out, hidden=128, epochs=20, lr=4e-3)
    assert estimate.nats == pytest.approx(nats, abs=0.1)


@pytest.mark.parametrize(
    "convert, context",
    [
        (lambda a: a[:, None, None] * 1e-9, nullcontext),
        (lambda a: a.double() + 1e9, nullcontext),
        (lambda a: (a * 1000).long() + 10**9, nullcontext),
        (torch.clone, torch.no_grad),
        (torch.clone, torch.inference_mode),
        (torch.clone, partial(torch.autocast, "cpu", torch.bfloat16)),
        (torch.clone, partial(torch.set_default_dtype, torch.float64)),
    ],
)
def test_mine_of_any_tensors_anywhere(convert, context):
    x, noise = torch.randn(2, 5000)
    z = 0.9 * x + math.sqrt(0.19) * noise
    small = partial(mine.mutual_information, hidden=64, epochs=6, lr=5e-3)
    plain = small(x, z).nats
    try:
        with context() or nullcontext():
            estimate = small(convert(x), convert(z)).nats
    finally:
        torch.set_default_dtype(torch.float32)
    assert plain == pytest.approx(-math.log(0.19) / 2, abs=0.1)
    assert estimate == pytest.approx(plain, abs=0.05)


def test_mine_of_a_sampler_does_not_memorise():
    x, test = torch.rand(400, 50), (torch.rand(400, 50), torch.randn(400, 4))
    small = partial(mine.mutual_information, held_out=test, hidden=128, epochs=60, batch_size=64)
    fixed, fresh = small(x, torch.randn(400, 4)), small(x, lambda epoch: torch.randn(400, 4))
    assert fixed.nats < -0.05 and abs(fresh.nats) < 0.03


def test_donsker_varadhan_of_few_pairs_is_exact():
    x, z = torch.randn(2, 30, 1, dtype=torch.float64)
    got = mine.donsker_varadhan(lambda a, b: (a * b)[..., 0], x, z, torch.Generator(), 29)
    assert got == pytest.approx((x * z).mean().item() - (x * z.T).exp().mean().log().item())


def test_mine_refuses_what_it_cannot_measure():
    x, few = torch.randn(10, 2), "at least 1 epoch, 2 pairs"
    for a, b, options, message in [
        (x, x[:9], {}, "one z for each x"), (x, x, {"held_out": (x[:, :1], x)}, "shaped alike"),
        (x, x, {"epochs": 0}, few), (x, x, {"batch_size": 1}, few), (x[:6], x[:6], {}, few),
        (x[:0], x[:0], {}, "one pair"), (x / 0, x, {}, "finite"), (x, x + 0j, {}, "real"),
        (x, lambda epoch: x * math.nan if epoch else x, {}, "finite"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mine.mutual_information(a, b, **{"epochs": 6} | options)
    with mock.patch.object(mine, "mine_loss", wraps=mine.mine_loss) as loss:  # of 3, 3 and 1 pairs
        mine.mutual_information(x[:7], x[:7], (x, x), epochs=1, batch_size=3)
    assert [len(call.args[0]) for call in loss.call_args_list] == [3, 3]


# --------------------------------------------------------------------------------------------------
# data.py and files.py


HERE = Path(data.__file__).parent
IDX = "train-images-idx3-ubyte"
WNIDS = ("n01443537", "n02002724", "n03444034")


def ends_in_one_line(capsys, error: BaseException, words: str) -> None:
    """A command that raises this ends with status 2 and one line of standard error."""
    with pytest.raises(SystemExit) as stop, files.one_line(files.Parser(prog="x.py")):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.search(f"^x.py: error: {words}", line), line


def test_errors_that_a_user_can_mend_end_in_one_line(capsys):
    ends_in_one_line(capsys, OSError("odd"), "cannot read or write a file: odd: make room, allow")
    captured = RuntimeError("capture failed")  # of a CUDA graph
    captured.__context__ = torch.OutOfMemoryError("CUDA")
    for error in (torch.OutOfMemoryError("CUDA"), captured):
        ends_in_one_line(capsys, error, "out of memory: lower --batch-size.*--update sampled")
    for bug in (RuntimeError("bug"), KeyError("bug")):  # keeps its traceback
        with pytest.raises(type(bug), match="bug"), files.one_line(files.Parser()):
            raise bug
    with pytest.raises(SystemExit, match="130"), files.one_line(files.Parser()):
        raise KeyboardInterrupt


EDGE = """import sys, files
with files.one_line(files.Parser(prog="x.py")):
    print("66 \\xb1 1 %" * int(sys.argv[1]))  # many fail at once, one when all is flushed
    print("progress", file=sys.stderr)"""


@pytest.mark.parametrize("times", [1, 9999])
@pytest.mark.parametrize(("redirect", "status", "words"), [
    ("| true", 130, "(progress\n)?"), ("2>&1 | true", 130, ""), ("2>&- | true", 130, ""),
    (">&-", 0, "progress\n"), ("| cat >&2", 0, r"(66 \? 1 %|progress|\s)+"),
    ("&>/dev/full", 2, ""), (">/dev/full", 2, "(progress\n)?x.py: error: .*No space.*\n"),
])  # fmt: skip
def test_streams_that_cannot_be_written_end_quietly(redirect, status, words, times):
    command = ["bash", "-c", f'"$0" -c "$1" {times} {redirect}; exit ${{PIPESTATUS[0]}}']
    options = dict(cwd=HERE, env=os.environ | {"PYTHONIOENCODING": "ascii"}, text=True)
    end = subprocess.run([*command, sys.executable, EDGE], **options, capture_output=True)
    assert end.returncode == status and re.fullmatch(words, end.stderr), end


def test_imports_that_one_function_needs_wait_for_it():
    code = "import sys, files; assert 'torch' not in sys.modules; import data; "
    code += "assert not {'sklearn', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


@pytest.fixture
def full_disk():
    """A function after which no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyError), files.writing(path) as beside:
        assert beside == tmp_path / "x.json.tmp" and beside.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------
# data.py: every data set is written here, small and in its official layout. Image k has label k % 3
# and a colour that tells both numbers. That of image 2 is grey, and is saved as such.


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network; and every file has the right checksum, but for one of the word "damaged"."""

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    def whole(path, md5):
        return Path(path).read_bytes() != b"damaged"

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torchvision.datasets.CelebA, "download", unreachable)
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", whole)


def refuses(words: str, name: str, root: Path, **options) -> None:
    """Loading ends in one line that matches, and leaves nothing half."""
    with pytest.raises(files.UserError, match=words) as error:
        data.load(name, root, **options)
    assert len(str(error.value).splitlines()) == 1 and not list(root.rglob("*.tmp"))


def painted(numbers, side: int) -> np.ndarray:
    colours = np.uint8([(10 + 20 * (k % 3), 10 + 20 * k, 50) for k in numbers])
    return np.tile(colours[:, :, None, None], (1, 1, side, side))  # (N, 3, side, side)


def assert_data(d: data.Data, train, test, classes=(), side: int = 32) -> None:
    """Both splits have these images, up to JPEG, and their labels where there are classes."""
    assert d.classes == classes
    for images, labels, ks in ((d.train, d.train_labels, train), (d.test, d.test_labels, test)):
        assert images.shape == (len(ks), 3, side, side) and images.dtype == torch.uint8
        assert (images.float() - torch.from_numpy(painted(ks, side))).abs().max() < 6
        if classes:
            assert labels.dtype == torch.int64 and labels.tolist() == [k % 3 for k in ks]
        else:
            assert labels is None


def draw(path: Path, k: int, size=(64, 64), mode="RGB", white: int = 0) -> None:
    """Image k as a picture, its upper rows white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.new("RGB", size, tuple(painted([k], 1).flatten().tolist()))
    picture.paste("white", (0, 0, size[0], white))
    picture.convert("L" if k == 2 else mode).save(path, quality=95)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def noise(name: str) -> np.ndarray:
    """What an IDX file holds: images, or labels below 10."""
    shape = data.IDX[name]
    return np.random.default_rng(len(name)).integers(0, 256 if shape[1:] else 10, shape, np.uint8)


def write_fashion(root: Path, patch, where="FashionMNIST/raw", suffix=".gz") -> Path:
    """20 and 10 images."""
    patch.setattr(data, "DEBIAN_FASHION", root / "debian")
    patch.setattr(data, "IDX", {n: (20 - 10 * ("t10k" in n), *s[1:]) for n, s in data.IDX.items()})
    for name, shape in data.IDX.items():
        raw = bytes(
            [0, 0, 8, len(shape), *np.array(shape, ">u4").tobytes(), *noise(name).tobytes()]
        )
        write(root / where / f"{name}{suffix}", gzip.compress(raw) if suffix else raw)
    return root / where


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("where", ["FashionMNIST/raw", "", "debian"])
def test_idx_layouts(tmp_path, monkeypatch, suffix, where):
    write_fashion(tmp_path, monkeypatch, where, suffix)
    d = data.load("fashionmnist", tmp_path, download=False)
    assert d.train.shape == (20, 1, 28, 28) and d.test.shape == (10, 1, 28, 28)
    assert [t.dtype for t in d[:4]] == [torch.uint8, torch.int64] * 2
    for read, name in zip(d[:4], data.IDX, strict=True):
        assert np.array_equal(read.flatten(), noise(name).flatten())
    assert d.classes[9] == "Ankle boot" and len(d.classes) == 10


def write_cifar(root: Path, patch, name: str = "CIFAR10") -> Path:
    """Images b to b + 3 in file b of a split."""
    kind = getattr(torchvision.datasets, name)
    for listed in (kind.train_list, kind.test_list):
        for b, (file, _) in enumerate(listed):
            images, labels = painted(range(b, b + 4), 32), [k % 3 for k in range(b, b + 4)]
            content = {"data": images.reshape(4, -1), "labels": labels}
            write(root / kind.base_folder / file, pickle.dumps(content))
    names = pickle.dumps({kind.meta["key"]: ["cat", "dog", "ship"]})
    return write(root / kind.base_folder / kind.meta["filename"], names).parent


@pytest.mark.parametrize(
    ("name", "batches", "packed"), [("CIFAR10", 5, 0), ("CIFAR10", 5, 1), ("CIFAR100", 1, 0)]
)
def test_cifar(tmp_path, monkeypatch, name, batches, packed):
    """The unpacked folder, and the archive alone, of which the folder is unpacked offline."""
    folder = write_cifar(tmp_path, monkeypatch, name)
    if packed:
        pack(folder, "gztar").rename(tmp_path / "cifar-10-python.tar.gz")
    train = [b + i for b in range(batches) for i in range(4)]
    assert_data(data.load(name.lower(), tmp_path), train, range(4), ("cat", "dog", "ship"))


def write_stl10(root: Path, patch) -> Path:
    for split, n in (("train", 6), ("test", 4), ("unlabeled", 7)):
        images = painted(range(n), 96)
        images[6:, :, :48, 48:] = 255  # the upper right quarter of one
        write(root / "stl10_binary" / f"{split}_X.bin", images.swapaxes(2, 3).tobytes())
        write(root / "stl10_binary" / f"{split}_y.bin", bytes(1 + k % 3 for k in range(n)))
    return write(root / "stl10_binary" / "class_names.txt", "airplane\nbird\ncar\n").parent


def test_stl10(tmp_path, monkeypatch):
    folder = write_stl10(tmp_path, monkeypatch)
    for _ in range(2):  # resized, then from what was kept
        d = data.load("stl10", tmp_path, unlabelled=True)
        assert_data(d, range(6), range(4), ("airplane", "bird", "car"))
        assert np.array_equal(d.unlabelled[:6], painted(range(6), 32))
        assert d.unlabelled[6, :, 1:15, 17:].min() == 255 > d.unlabelled[6, 0, 17:].max()
        assert d.to_train_on is d.unlabelled
    few = data.load("stl10", tmp_path, unlabelled=True, train_images=2)
    assert_data(few, range(2), range(4), d.classes)
    assert torch.equal(few.unlabelled, d.unlabelled[:2])
    (folder / "unlabeled_X.bin").unlink()  # 2.6 GB that only --unlabelled needs
    shutil.rmtree(tmp_path / "decoded")
    d = data.load("stl10", tmp_path)
    assert d.unlabelled is None and d.to_train_on is d.train
    refuses("lacks unlabeled_X.bin", "stl10", tmp_path, unlabelled=True)
    for labels in (bytes([1, 2]), bytes(range(6)), bytes([1, 2, 3, 4, 5, 255])):
        write(folder / "train_y.bin", labels)
        refuses("train_y.bin needs 6 labels, 1 to 10", "stl10", tmp_path)


def write_tinyimagenet(root: Path, patch=None) -> Path:
    base, lines = root / "tiny-imagenet-200", []
    for k in range(12):
        draw(base / "train" / WNIDS[k % 3] / "images" / f"{WNIDS[k % 3]}_{k}.JPEG", k)
        draw(base / "val/images" / f"val_{k}.JPEG", k)
        lines.append(f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t32\t44\t62\n")
    write(base / "val/val_annotations.txt", "".join(lines))
    write(base / "wnids.txt", "\n".join(reversed(WNIDS)))  # not sorted
    words = "n01443537\tgoldfish, Carassius auratus\nn02002724\tblack stork\nn1\tcr\xeape\n"
    write(base / "words.txt", words.encode("latin-1"))  # not all of it is UTF-8
    return base


def pack(folder: Path, kind: str = "zip") -> Path:
    """The folder as an archive beside it, and no folder."""
    archive = shutil.make_archive(str(folder), kind, folder.parent, folder.name)
    shutil.rmtree(folder)
    return Path(archive)


@pytest.mark.parametrize("layout", ["folder", "zip", "inside"])
def test_tinyimagenet(tmp_path, layout):
    base = write_tinyimagenet(tmp_path)
    if layout == "zip":
        pack(base)
    d = data.load("tinyimagenet", base if layout == "inside" else tmp_path)
    train = [0, 3, 6, 9, 1, 10, 4, 7, 11, 2, 5, 8]  # by class and name: X_10 sorts before X_4
    classes = ("goldfish", "black stork", "n03444034")
    assert_data(d, train, [0, 1, 10, 11, *range(2, 10)], classes, side=64)


def write_celeba(root: Path, patch=None, table: str = "txt") -> Path:
    base, lines = root / "celeba", ["image_id,partition"] * (table == "csv")
    for k in range(9):
        file = base / "img_align_celeba" / f"{k + 1:06}.jpg"
        draw(file, k, size=(178, 218), white=30)  # above the middle 148 rows
        lines.append(f"{file.name}{',' if table == 'csv' else ' '}{(0, 0, 1, 2)[k % 4]}")
    return write(base / f"list_eval_partition.{table}", "\n".join([*lines, "", ""])).parent


@pytest.mark.parametrize("layout", ["torchvision", "zip", "csv", "flat"])
def test_celeba(tmp_path, layout):
    """The white strip above the middle is cut off."""
    base = write_celeba(tmp_path, table="csv" if layout == "csv" else "txt")
    if layout == "zip":
        pack(base / "img_align_celeba")
    d = data.load("celeba", base if layout == "flat" else tmp_path)
    assert_data(d, [0, 1, 4, 5, 8], [3, 7], side=64)


def write_folder(root: Path, patch=None, classes=("a", "b", "c")) -> Path:
    """Images of several formats, sizes and modes in class folders or in none."""
    kinds = [("png", "RGB"), ("jpg", "RGB"), ("BMP", "RGB"), ("png", "RGBA"), ("webp", "RGB")]
    for k, (suffix, mode) in enumerate(kinds):
        name = Path(classes[k % len(classes)], f"{k}.{suffix}")
        for split in ("train", "test")[: 2 if k < 4 else 1]:
            draw(root / split / name, k, (32 + 9 * k, 50), mode)
    write(root / "train" / classes[0] / "notes.txt", "no image")
    write(root / "test" / classes[0] / "._0.png", "of macOS")
    return root


@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("classes", [("a", "b", "c"), ("",), ("all",)])
def test_folder(tmp_path, capsys, side, classes):
    """In class folders, in none, and in a single one, which says no more than none."""
    d = data.load("folder", write_folder(tmp_path, classes=classes), image_size=side)
    alone = (range(5), range(4), ())
    expected = ([0, 3, 1, 4, 2], [0, 3, 1, 2], classes) if classes[1:] else alone
    assert_data(d, *expected, side or 32)
    assert data.image_shape("folder", side) == d.train.shape[1:]
    assert "1 left out, no pictures: ['" in capsys.readouterr().err
    few = data.load("folder", tmp_path, image_size=side, train_images=3)  # of all classes
    assert torch.equal(few.train, d.train[[0, 1, 3]])
    assert not classes[1:] or few.train_labels.tolist() == [0, 0, 1]
    assert ("1 classes lack training images: ['c']" in capsys.readouterr().err) == bool(classes[1:])


def test_pictures_are_the_middle_square_resized(tmp_path):
    """Against Pillow, crop and resize apart, and no step for what has the size already."""
    rng, path = np.random.default_rng(0), tmp_path / "0.png"
    for w, h in [(32, 32), (80, 48), (33, 71)]:
        picture, side = PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)), min(w, h)
        picture.save(path)
        left, top = (w - side) // 2, (h - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        by_pillow = np.asarray(square.resize((32, 32), PIL.Image.Resampling.BILINEAR)).astype(int)
        off = np.abs(files.decode(path, 32, None) - by_pillow.transpose(2, 0, 1))
        assert off[:, 2:-2, 2:-2].max() <= 1 and (side > 32 or off.max() == 0)


def test_pictures_show_what_they_hold(tmp_path):
    """Rising greys of 16 bits or 8, half of them see-through, or turned clockwise."""
    rise = np.arange(32, dtype="<u2").repeat(32).reshape(32, 32) * 2114  # up to 65,534
    wide, seen, exif = PIL.Image.fromarray(rise), (rise >> 8).astype(int), PIL.Image.Exif()
    grey, exif[0x0112] = PIL.Image.fromarray(seen.astype(np.uint8)), 6
    alpha = PIL.Image.fromarray(np.uint8([[0] * 16 + [255] * 16] * 32))
    half, layers = np.where(alpha, seen, 128), PIL.Image.merge("LA", (grey, alpha))
    for name, picture, expected, options in [
        ("a.png", wide, seen, {}), ("b.pgm", wide, seen, {}), ("c.tif", grey, seen, {}),
        ("d.tif", PIL.Image.frombytes("I;16B", (32, 32), rise.astype(">u2")), seen, {}),
        ("e.png", layers, half, {}), ("f.webp", layers.convert("RGBA"), half, {"lossless": True}),
        ("g.gif", grey, np.where(rise, seen, 128), {"transparency": 0}),
        ("h.png", grey, np.rot90(seen, -1), {"exif": exif}), ("i.tif", wide.convert("F"), 0, {}),
    ]:  # fmt: skip
        picture.save(tmp_path / name, **options)
        with pytest.raises(files.UserError, match="16 b") if name == "i.tif" else nullcontext():
            assert np.abs(files.decode(tmp_path / name, 32, None) - expected).max() <= 1, name


def test_only_pictures_are_listed_and_each_once(tmp_path, capsys):
    root = write_folder(tmp_path) / "train"
    for path in ("@eaDir/x.png", "a/.ipynb_checkpoints/x.png", "a/.x.png", "b/5.gif", "b/6.jfif"):
        draw(root / path, 0)
    for link, to in (("a/b", "../b"), ("b/a", "../a"), ("c/up", "../.."), ("a/gone.png", "gone")):
        (root / link).symlink_to(to)
    os.mkfifo(root / "c/pipe.png")
    (root / "cow").mkdir()
    own = [f"{p}/{n}" for p in ("a", "b/a") for n in ("0.png", "3.png")]
    own += [f"{p}/{n}" for p in ("a/b", "b") for n in ("1.jpg", "4.webp", "5.gif", "6.jfif")]
    assert files.pictures(root) == sorted([*own, "c/2.BMP"])
    assert "['cow', 'a/gone.png', 'a/notes.txt', " in capsys.readouterr().err


def test_pictures_are_decoded_once_and_again_when_the_source_changes(tmp_path, monkeypatch):
    base, decode, calls = write_tinyimagenet(tmp_path), files.decode, []
    monkeypatch.setattr(files, "decode", lambda *a: calls.append(a) or decode(*a))

    def load(expected: int) -> torch.Tensor:
        calls.clear()
        images = data.load("tinyimagenet", tmp_path).train
        assert len(calls) == expected
        return images

    load(24)
    first = load(0)
    image = base / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    draw(image, 9)  # another image in its place
    assert load(12)[0, 1].min() > 180 and first[0, 1].max() < 20  # an open map keeps what it had
    os.utime(image)  # another time, the same size
    load(12)
    image.rename(image.with_name("0.JPEG"))  # the same time and size
    load(12)
    kept = tmp_path / "decoded" / "tinyimagenet-train.npy"
    for file in (kept.with_suffix(".source"), kept):  # without the mark: it was killed before
        file.unlink()
        load(12)[0] = 0  # copy on write: never reaches the file
    assert load(0)[0].max() > 0 and len(list(kept.parent.iterdir())) == 4
    right = load(0).clone()
    for content in (right.numpy().tobytes(), bytes(kept.stat().st_size), b""):  # damaged
        kept.write_bytes(content)
        assert torch.equal(load(12), right)


KILLED_BY_A_FULL_DISK = """
import resource, signal, sys, data
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
data.load("tinyimagenet", sys.argv[1])
"""


def test_decoding_that_is_killed_or_finds_no_room_leaves_nothing_half(tmp_path, full_disk, capsys):
    write_tinyimagenet(tmp_path)
    full_disk(50_000)
    command = [sys.executable, "-c", KILLED_BY_A_FULL_DISK, str(tmp_path)]
    assert subprocess.run(command, cwd=HERE, check=False).returncode == -signal.SIGXFSZ
    (half,) = (tmp_path / "decoded").iterdir()
    assert half.suffix == ".tmp" and half.stat().st_size == 50_000
    half.unlink()
    with pytest.raises(OSError) as failed:
        data.load("tinyimagenet", tmp_path)
    words = "cannot read or write .*decoded/tinyimagenet-train.*tmp: .* large: make room"
    ends_in_one_line(capsys, failed.value, words)
    assert not list((tmp_path / "decoded").iterdir())


WRITE = dict(fashionmnist=write_fashion, cifar10=write_cifar, stl10=write_stl10,
             tinyimagenet=write_tinyimagenet, celeba=write_celeba, folder=write_folder)  # fmt: skip
NO_IDX = f"{IDX}.* is not a whole IDX file of shape .20, 28, 28.*delete it"
MISTAKES = [  # in a whole data set, whose folder is f
    ("fashionmnist", lambda f: (f / f"{IDX}.gz").unlink(),
     f"raw lacks {IDX} .*unreachable.*put the four.*apt-get.*--data-dir.*digits"),
    ("fashionmnist", lambda f: os.truncate(f / f"{IDX}.gz", 999), NO_IDX),
    ("fashionmnist", lambda f: write(f / IDX, bytes(16 + 20 * 28 * 28)), NO_IDX),
    ("fashionmnist", lambda f: write(f / "t10k-labels-idx1-ubyte", b"\0\0\b\1\0\0\0" + b"\n" * 11),
     "t10k-labels.*a label is 10.: delete it"),
    ("cifar10", lambda f: (f / "data_batch_2").unlink(), "lacks data_batch_2.*unreachable.*put ci"),
    ("cifar10", lambda f: write(f / "test_batch", "damaged"), "lacks test_batch.*unreachable"),
    ("stl10", lambda f: (f / "test_y.bin").unlink(), "lacks test_y.bin.*unreachable.*put stl10_bi"),
    ("stl10", lambda f: write(f / "train_X.bin", "damaged"), "lacks train_X.bin, or it is damaged"),
    ("tinyimagenet", shutil.rmtree, "neither.*unreachable.*put tiny-imagenet-200.zip"),
    ("tinyimagenet", lambda f: shutil.rmtree(f / "train" / WNIDS[1]), f"no images of {WNIDS[1]}"),
    ("tinyimagenet", lambda f: os.truncate(f / "val/val_annotations.txt", 353), "val lacks val_11"),
    ("tinyimagenet", lambda f: (f / "val/images/val_3.JPEG").unlink(), "val lacks val_3.JPEG or"),
    ("tinyimagenet", lambda f: os.truncate(pack(f), 5000), "zip cannot be unpacked.*get it again"),
    ("celeba", lambda f: (f / "list_eval_partition.txt").unlink(), "lacks list_eval.*unreachable"),
    ("celeba", lambda f: shutil.rmtree(f / "img_align_celeba"), "unreachable.*put img_align_celeb"),
    ("celeba", lambda f: (f / "img_align_celeba/000005.jpg").unlink(), "05.jpg and 0 more images"),
    ("celeba", lambda f: os.truncate(f / "list_eval_partition.txt", 115), "txt is no list of name"),
    ("folder", lambda f: (f / "test").rename(f / "x") and write(f / "test", ""), "cannot read .*t"),
    ("folder", lambda f: shutil.rmtree(f / "test"), "needs images in train/ and test/"),
    ("folder", lambda f: draw(f / "train/x.png", 0), "train has images beside the class folders"),
    ("folder", lambda f: (f / "test/b").rename(f / "test/d"), "test has the class 'd', .*train"),
    ("folder", lambda f: draw(f / "test/x.png", 0), "test has images outside the class folders"),
    ("folder", lambda f: [os.truncate(p, 60) for p in (f / "train/b").iterdir()],
     "2 of 5 pictures are damaged: .*train/b/1.jpg .Trunc.*b/4.webp"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "words"), MISTAKES)
def test_broken_data_end_in_one_line(tmp_path, monkeypatch, name, spoil, words):
    spoil(WRITE[name](tmp_path, monkeypatch))
    refuses(words, name, tmp_path)
    if "unreachable" in words:
        refuses(f"^{name}: .*Ways to get it", name, tmp_path, download=False)


def test_digits():
    """Averaged back to 8x8 every image is one of the originals with its label, each once."""
    d = data.load("digits")
    assert d.train.shape == (1437, 1, 28, 28) and d.test.shape == (360, 1, 28, 28)
    assert d.train.dtype == torch.uint8 and d.train.max() > 250
    images, read = torch.cat([d.train, d.test]).float(), torch.cat([d.train_labels, d.test_labels])
    small = torch.nn.functional.interpolate(images, size=(8, 8), mode="bilinear").flatten(1)
    original, labels = load_digits(return_X_y=True)
    nearest = torch.cdist(small, torch.from_numpy(original).float() * 255 / 16).argmin(dim=1)
    assert len(set(nearest.tolist())) >= 1790
    assert (read == torch.from_numpy(labels)[nearest]).float().mean() > 0.995
    assert torch.bincount(d.test_labels).min() >= 34  # stratified


REAL = {  # folder, and each channel's mean and deviation, which the set is known by
    "mnist": ("MNIST", [(0.1307, 0.3081)]),
    "fashionmnist": ("FashionMNIST", [(0.2860, 0.3530)]),
    "cifar10": ("cifar-10-batches-py", [(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]),
}


def real(name: str) -> Path:
    """The folder of a real data set; where there is none the test skips."""
    base, folder = REAL[name][0], Path(os.environ.get("DATA_DIR", "nowhere"))
    if not (folder / base).is_dir() and not (base[0] == "F" and data.DEBIAN_FASHION.is_dir()):
        pytest.skip(f"no {base}: name its folder in DATA_DIR")
    return folder


@pytest.mark.parametrize("name", REAL)
def test_real_data(name):
    folder, known = real(name), REAL[name][1]
    d = data.load(name, folder, download=False)
    assert d.train.shape[1:] == d.test.shape[1:] == data.SHAPES[name] and len(d.test) == 10_000
    for channel, moments in enumerate(known):
        values = d.train[:, channel].float() / 255
        assert (values.mean().item(), values.std().item()) == pytest.approx(moments, abs=1e-4)
    split = data.load(name, folder, download=False, validation=True)
    assert len(split.test) == 10_000 and torch.equal(split.test, d.train[-10_000:])
    if name == "fashionmnist":  # bits per dimension that no model can go below
        p = data.to_unit(d.test).double()
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean().item() / math.log(2)
        assert f"{entropy:.3f}" == "0.349"
    if name == "mnist":
        for train, images, labels in ((True, *d[:2]), (False, *d[2:4])):
            reference = torchvision.datasets.MNIST(folder, train=train)
            assert torch.equal(images.squeeze(1), reference.data)
            assert torch.equal(labels, reference.targets)


def test_batches():
    pictures, cpu = torch.zeros(103, 1, 2, 2, dtype=torch.uint8), torch.device("cpu")
    batches = data.shuffled(pictures, 10, seed=1, epoch=4)
    assert [len(b) for b in batches] == [10] * 10 + [3]
    assert sorted(torch.cat(batches).tolist()) == list(range(103))
    for seed, epoch in [(1, 4), (1, 5), (2, 4)]:
        again = data.shuffled(pictures, 10, seed, epoch)
        assert torch.equal(torch.cat(batches), torch.cat(again)) == ((seed, epoch) == (1, 4))
    parts = list(data.in_order(torch.arange(1100).view(1100, 1).expand(1100, 28 * 28), cpu, "test"))
    assert [(start, len(p)) for start, p in parts] == [(0, 512), (512, 512), (1024, 76)]
    assert torch.cat([p[:, 0] for _, p in parts]).tolist() == list(range(1100))
    assert len(next(data.in_order(torch.zeros(600, 3, 14, 28), cpu, "test"))[1]) == 341


def test_binarisation():
    """It has the pixels as its mean. Colours and black and white stay what they are."""
    grey = torch.tensor([0, 1, 64, 128, 254, 255], dtype=torch.uint8)
    x = data.to_input(grey.expand(200_000, 1, 1, 6))
    assert set(x.unique().tolist()) == {0, 1} and x.dtype == torch.float32
    assert x[..., 0].sum() == 0 and x[..., 5].min() == 1
    torch.testing.assert_close(x.mean(dim=(0, 1, 2)), grey / 255, rtol=0, atol=0.005)
    colours = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    assert torch.equal(data.to_input(colours), colours / 255)
    for use in (data.to_input, data.to_unit, partial(evaluate.representations, tiny("hvae", 2))):
        with pytest.raises(TypeError, match="must be uint8"):
            use(colours / 255)
    d, black_and_white = data.load("digits"), data.load("digits", threshold=True)
    for grey, white in ((d.train, black_and_white.train), (d.test, black_and_white.test)):
        assert white.dtype == torch.uint8 and 0 < (grey == 127).sum() < grey.numel()
        assert np.array_equal(white, np.where(grey.numpy() >= 127.5, 255, 0))
        assert torch.equal(data.to_input(white), data.to_unit(white))


# --------------------------------------------------------------------------------------------------
# train.py and settings.py


CUDA = torch.cuda.is_available()


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


TINY = ["--latents", "4,2", "--channels", "4", "--seed", "3", "--dtype", "float32"]


@pytest.fixture
def few(monkeypatch) -> data.Data:
    """The digits, but only some of them, so that an epoch takes a moment."""
    d = data.load("digits", train_images=300)
    d = d._replace(test=d.test[:60], test_labels=d.test_labels[:60])
    monkeypatch.setattr(evaluate, "load", lambda *args, **options: d)
    return d


def fails(capsys, argv: list[str], words: str, main=train.main) -> None:
    """The command ends in one line of standard error that matches, and with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.strip() and "batch/s" not in line]
    assert stop.value.code == 2 and re.search(words, line), line


def evaluation_of(folder) -> dict:
    return json.loads((Path(folder) / "eval.json").read_text())


def metrics_of(folder) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": None} for line in lines]


def assert_same_run(a, b) -> None:
    """Bit for bit the same parameters, optimiser, random state, sums and metrics."""
    one, two = (evaluate.load_checkpoint(Path(folder)) for folder in (a, b))
    for key in ("model", "ema", "optimizer", "rng", "sums", "seen", "epoch", "batch", "updates"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    assert metrics_of(a) == metrics_of(b)


def run_of(*flags: str, device: str = "cpu") -> train.Run:
    config = settings.defaults(vars(settings.parser().parse_args([*TINY, *flags])))
    return train.Run(config, torch.device(device))


OBJECTIVES = [
    [],
    ["--rl", "--update", "stepwise"],
    ["--rl", "--update", "joint"],
    ["--rl", "--update", "sampled", "--skip", "sample"],
    ["--ivae", "--schedule", "cosine", "--ema", "0.9"],
    ["--arch", "aae", "--latents", "4", "--schedule", "cosine"],
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resume_equals_uninterrupted(few, tmp_path, monkeypatch, capsys, objective):
    """Stopped in the middle of an epoch, at an epoch's end, and before the last update."""
    flags = [*TINY, "--epochs", "3", "--batch-size", "64", "--eval-every", "2", "--warmup", "2"]
    flags += objective
    whole = tmp_path / "whole"
    train.main([*flags, "--out", str(whole)])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    for at in (3, 5, 10):
        out, calls = str(tmp_path / f"parts{at}"), itertools.count()

        def to_input(x, at=at, calls=calls):
            if next(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return data.to_input(x)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            patch.setattr(train, "SAVE_EVERY", 0)
            patch.setattr(train, "to_input", to_input)
            train.main([*flags, "--out", out])
        state = evaluate.load_checkpoint(Path(out))
        assert state["epoch"] * 5 + state["batch"] == at
        assert "--resume" in capsys.readouterr().out and not Path(out, "eval.json").exists()
        train.main(["--resume", out])
        assert_same_run(whole, out)
        assert evaluation_of(out)
    if "cosine" in objective:  # whose learning rate depends on how long the run is to be
        return
    out = str(tmp_path / "more")
    train.main([*flags, "--epochs", "1", "--out", out])
    train.main([*flags, "--epochs", "3", "--out", out, "--resume"])
    assert_same_run(whole, out)


KILLED = """
import os, signal, sys, torch, train
torch.set_num_threads(1)  # as the tests have it
train.SAVE_EVERY, saves = 0, []
def fsync(file):
    saves.append(file)
    if len(saves) == 9:
        os.truncate(file, 999)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
train.main(sys.argv[1:])
"""


def test_killed_while_writing_a_checkpoint(tmp_path):
    """kill -9 in the middle of a write, and of a metrics line: the run goes on from what was."""
    flags = [*TINY, "--rl", "--epochs", "3", "--batch-size", "64", "--train-images", "300"]
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, *flags, "--out", str(out)]
    killed = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / "checkpoint.pt.tmp").stat().st_size == 999
    # The first save is of the beginning, so the eighth update's was being written.
    assert evaluate.load_checkpoint(out)["updates"] == 7
    (out / "metrics.jsonl").write_text('{"epoch": ')
    train.main([*flags, "--out", str(out), "--resume"])
    train.main([*flags, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", out)


def test_a_loss_that_is_not_finite_stops_the_run(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    flags = [*TINY, "--out", str(tmp_path), "--lr", "1e18", "--epochs", "9"]
    fails(capsys, flags, r"not finite in epoch \d+, by update \d+: try a lower --lr.*last good")
    state = evaluate.load_checkpoint(tmp_path)
    assert all(v.isfinite().all() for v in state["model"].values())


def test_an_evaluation_is_of_its_weights_and_images(few, tmp_path, monkeypatch, capsys):
    """Other images are measured, and not kept; other weights are not those kept."""
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1", "--probe", "top"])
    kept, argv = evaluation_of(out), [str(out), "--probe", "top", "--json"]

    def measured(*more) -> dict:
        capsys.readouterr()
        evaluate.main([*argv, *more])
        return json.loads(capsys.readouterr().out)

    assert measured() == kept
    other = few._replace(test=255 - few.test)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", lambda *args, **options: other)
        seen = measured()
        fails(capsys, ["--resume", str(out), "--epochs", "2"], "trained on other images or labels")
    assert seen["elbo"] == evaluate.densities(evaluate.load_run(out)[0], other.test)["elbo"]
    assert seen["elbo"] != kept["elbo"] and evaluation_of(out) == kept
    labels = few._replace(test_labels=few.test_labels.flip(0))  # they count, too
    model, config = evaluate.load_run(out)
    assert evaluate.kept_evaluation(out, model, few, config) == kept
    assert "elbo" not in evaluate.kept_evaluation(out, model, labels, config)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert "elbo" not in evaluate.kept_evaluation(out, model, few, config)
    # An evaluation that began before the run went on does not replace the newer one.
    train.main(["--resume", str(out), "--epochs", "2", "--probe", "top"])
    assert "trained on since" in evaluate.keep(out, kept) and evaluation_of(out)["epoch"] == 2
    monkeypatch.setattr(evaluate, "write_json", mock.Mock(side_effect=OSError(28, "full", "eval")))
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(out), "--probe", "top"])
    assert "ELBO" in capsys.readouterr().out  # what cannot be kept has been printed


def test_a_folder_has_one_process(few, tmp_path, capsys):
    out = tmp_path / "runs/one"
    train.main([*TINY, "--out", str(out), "--epochs", "1", "--probe", "top"])
    before = evaluation_of(out)
    with files.locked(out):
        for more in (["--overwrite", "--out"], ["--resume"]):
            fails(capsys, [*TINY, *more, str(out)], "in use by another process: wait for it")
        fails(capsys, [str(out)], "in use by another process", evaluate.main)
    assert evaluation_of(out) == before
    train.main([*TINY, "--overwrite", "--out", str(out), "--epochs", "1", "--probe", "top"])
    for kept in evaluate.FILES:  # each alone is a run
        folder = tmp_path / kept.partition(".")[0]
        folder.mkdir()
        shutil.copy(out / kept, folder)
        fails(capsys, [*TINY, "--out", str(folder)], "holds a run already")
    fails(capsys, [*TINY, "--out", ""], "--out is empty")


def test_files_follow_the_checkpoint(few, tmp_path):
    """After a crash between two writes, whatever the other files hold."""
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "2", "--probe", "top"])
    files_of = [out / "metrics.jsonl", out / "config.json"]
    whole = [path.read_text() for path in files_of]
    files_of[0].write_text(whole[0].splitlines()[0] + "\n")
    files_of[1].write_text(whole[1].replace('"seed": 3', '"seed": 4'))
    train.main(["--resume", str(out), "--probe", "top"])
    seen = [path.read_text() for path in files_of]
    assert seen[0] == whole[0] and json.loads(seen[1])["seed"] == 3
    assert len(json.loads(seen[1])["made_by"]) == 1


def test_raised_epochs_stay_raised(few, tmp_path, monkeypatch):
    """Where the run is stopped before it first saves itself."""
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1", "--probe", "top"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "update", mock.Mock(side_effect=KeyboardInterrupt))
        train.main(["--resume", str(out), "--epochs", "2"])
    assert end.value.code == 130
    train.main(["--resume", str(out)])
    assert [line["epoch"] for line in metrics_of(out)] == [1, 2]


def test_what_is_not_finite_is_neither_saved_nor_kept(few, tmp_path, monkeypatch, capsys):
    """A moment of Adam's, a moving average, the ELBO by the weights as they are, an evaluation."""
    run, x = run_of("--ema", "0.9"), data.to_input(few.train[:64])
    train.update(run, x, 1.0, 0.0)
    run.averaged.update_parameters(run.model)
    run.seen, shown = 64, mock.Mock()
    train.check_finite(run, shown, x)
    moment = next(iter(run.optimizer.state.values()))["exp_avg_sq"]
    mean = run.measured.stem.weight.data
    for tensor in (moment, mean, run.sums):
        before = tensor.clone()
        tensor.view(-1)[0] = math.inf
        with pytest.raises(files.UserError, match=r"not finite.*last good"):
            train.check_finite(run, shown, None)
        tensor.copy_(before)
    mean.fill_(1e18)  # finite, but not what comes of it
    train.check_finite(run, shown, None)
    with pytest.raises(files.UserError, match="not finite"):
        train.check_finite(run, shown, x)
    with pytest.raises(files.UserError, match="evaluation is not finite"):
        evaluate.quick_eval(run.measured, few)
    out = tmp_path / "run"
    flags = ["--lr", "100", "--epochs", "1", "--train-images", "100", "--probe", "top"]
    fails(capsys, [*flags, "--out", str(out)], "not finite")
    assert not (out / "eval.json").exists()


def test_a_damaged_or_valuable_checkpoint(few, tmp_path, capsys):
    """One flipped byte is found wherever it is; `--save` never replaces a file."""
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1", "--probe", "top"])
    path = out / "checkpoint.pt"
    whole = path.read_bytes()
    fails(capsys, [str(out), "--save", str(path)], "it exists, name a new file", evaluate.main)
    assert path.read_bytes() == whole
    weights = evaluate.load_checkpoint(out)["model"]["stem.weight"].numpy().tobytes()
    at = whole.index(weights) + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
    fails(capsys, [str(out)], "damaged or not a checkpoint", evaluate.main)


def test_an_epochs_mean_is_over_images(tmp_path, monkeypatch):
    """The last batch has one image of 129: it counts 128 times less than the first."""
    seen, update = [], train.update
    monkeypatch.setattr(train, "update", lambda *args: seen.append(update(*args)) or seen[-1])
    flags = ["--epochs", "1", "--train-images", "129", "--batch-size", "128", "--probe", "top"]
    train.main([*TINY, *flags, "--out", str(tmp_path / "run")])
    (line,) = metrics_of(tmp_path / "run")
    mean = (128 * seen[0][0].double() + seen[1][0].double()) / 129
    assert [line["loss"], *line["kl"]] == pytest.approx(mean.tolist(), rel=1e-6)


def test_a_run_goes_on_from_any_folder(tmp_path, monkeypatch, capsys):
    """And says where a cosine that ends later makes the learning rate rise."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("mine"))
    more = ["--dataset", "folder", "--data-dir", "mine", "--schedule", "cosine", "--epochs", "1"]
    train.main([*TINY, *more, "--out", "run", "--probe", "top"])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    capsys.readouterr()
    train.main(["--resume", "../run", "--epochs", "2"])
    assert "learning rate rises from 0.00 to 0.50 times --lr" in capsys.readouterr().out
    evaluate.main(["../run", "--probe", "top"])
    evaluate.main(["../run", "--save", "w.pt"])
    assert evaluate.load_run("w.pt")[1]["data_dir"] == "data"


def test_weights_load_under_any_default_type(few):
    images = few.test[:3]
    path = HERE / "weights/digits-lvae-rl.pt"
    expected = evaluate.representations(evaluate.load_run(path)[0], images)
    torch.set_default_dtype(torch.float64)
    try:
        seen = evaluate.representations(evaluate.load_run(path)[0], images)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(seen, expected)


def test_a_full_disk_keeps_what_was_written(few, tmp_path, full_disk, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--out", str(out), "--epochs", "1"])
    before = (out / "checkpoint.pt").read_bytes()
    full_disk(10_000)
    more = ["--resume", str(out), "--epochs", "2"]
    fails(capsys, more, "cannot .*checkpoint.*kept")
    fails(capsys, [*TINY, "--out", str(tmp_path / "new")], "cannot .*checkpoint")
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    train.main(more)
    assert evaluate.load_checkpoint(out)["epoch"] == 2


def test_a_run_end_to_end(few, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*TINY, "--arch", "hvae", "--rl", "--out", str(out)]
    train.main([*argv, "--epochs", "2", "--eval-every", "1"])
    text = capsys.readouterr().out
    for words in ("hvae, small, levels 4,2", "gamma 0.9, sampled updates", "Algorithm 1",
                  "300 training", "cpu", "--size paper", str(out), "z2", "per dim"):  # fmt: skip
        assert words in text
    lines = metrics_of(out)
    assert [line["epoch"] for line in lines] == [1, 2] and len(lines[0]["kl"]) == 2
    assert set(lines[0]["test"]) == {"probe", "kl", "elbo"}
    kept = evaluation_of(out)
    assert (kept["arch"], kept["rl"], kept["dataset"]) == ("hvae", True, "digits")
    assert set(kept["probe"]) == {"z1", "z2", "all"}
    assert {len(kept[key]) for key in ("kl", "active_units", "log_px_given_z")} == {2}
    assert kept["bpd"] == pytest.approx(-kept["elbo"] / 784 / math.log(2))

    # What else is asked for is measured and kept beside it, and all is the same again.
    evaluate.main([str(out), "--mine", "1,2", "--probe-of", "sample"])
    assert "at most 4.09" in capsys.readouterr().out  # ln 60 test images
    more = evaluation_of(out)
    assert set(more.pop("mine")) == {"z1", "z2"} and kept.pop("mine") == {}
    assert set(more.pop("probe_sample")) == {"z1", "z2", "all"} and more == kept
    (out / "eval.json").unlink()
    evaluate.main([str(out), "--samples", "4", "--json", "--probe", "top"])
    again = json.loads(capsys.readouterr().out)
    assert again["probe"] == {"z2": kept["probe"]["z2"]} and again["elbo"] == kept["elbo"]

    fails(capsys, argv, "holds a run already: --resume.*--overwrite.*--out")
    train.main([*argv, "--overwrite", "--epochs", "1"])
    assert len(metrics_of(out)) == 1 and evaluate.load_checkpoint(out)["epoch"] == 1
    train.main(["--resume", str(out)])  # nothing left to do: it shows the evaluation
    assert "z2" in capsys.readouterr().out


def test_settings():
    """App. C.3: warm-up and free bits for what has no other help at its upper levels."""
    rl, ivae, hvae, paper = {"rl": True}, {"ivae": True}, {"arch": "hvae"}, {"size": "paper"}
    for flags, *expected in (
        ({}, 1000, 200, 2.0), (hvae, 1000, 200, 2.0), ({"arch": "biva"}, 1000, 200, 2.0),
        ({"arch": "vae"}, 1000, 0, 0.0), ({"arch": "aae"}, 1000, 0, 0.0), (ivae, 1000, 0, 0.0),
        (rl, 200, 0, 0.0), (rl | {"levels": 2}, 500, 0, 0.0), (rl | {"warmup": 7}, 200, 7, 0.0),
    ):  # fmt: skip
        c = settings.defaults(paper | flags)
        assert [c["epochs"], c["warmup"], c["free_bits"]] == expected
        assert (c["lr"], c["batch_size"]) == (3e-4, 128)
        assert c["update"] == ("stepwise" if c["rl"] else "joint")
    assert settings.kl_weight(settings.defaults(paper), 50.0) == (0.25, 2.0)
    assert settings.kl_weight(settings.defaults(paper), 400.0) == (1.0, 0.0)
    assert settings.defaults(hvae | rl)["out"] == "runs/digits-hvae-rl-0"
    fashion, best = {"dataset": "fashionmnist"}, {"size": "best"}
    c = settings.defaults(fashion | best | {"ema": 0.5})
    assert (c["epochs"], c["schedule"], c["ema"]) == (40, "cosine", 0.5)
    c = settings.defaults(rl | best | {"dataset": "cifar10"})
    assert [c[key] for key in ("epochs", "warmup", "batch_size", "pay")] == [15, 7, 32, "own"]
    deep, own = (settings.defaults(fashion | rl | f) for f in ({"size": "deep"}, {"pay": "own"}))
    assert deep == own | {"size": "deep", "given": deep["given"]}
    for flags, warmup in (  # the other presets warm up where the top is at risk
        ({}, 0), (fashion | best, 0), (rl, 20), (rl | {"dataset": "cifar10"}, 5),
        (rl | {"epochs": 8}, 4),
        (fashion | rl, 10), (fashion | ivae, 10), (fashion | rl | {"epochs": 5}, 2),
        (fashion | rl | {"epochs": 1}, 1), (fashion | rl | {"epochs": 5, "warmup": 9}, 9),
        (fashion | rl | best, 20), (fashion | rl | best | {"epochs": 6}, 3),
    ):  # fmt: skip
        assert settings.defaults(flags)["warmup"] == warmup
    c = {"schedule": "cosine", "epochs": 4}
    falls = [settings.rate_factor(c, i / 2) for i in range(9)]
    assert falls == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(9)])
    assert settings.rate_factor({"schedule": "constant"}, 3.5) == 1


def test_every_flag_is_read():
    """At most 36 options, and a run or its command looks at each."""
    options = settings.parser()._actions
    files = [HERE / f"{name}.py" for name in ("train", "settings", "evaluate")]
    source = "".join(file.read_text() for file in files)
    assert len(options) <= 36
    assert all(f'"{option.dest}"' in source for option in options[1:])  # the first is --help


def test_losses_of_a_run():
    """Algorithm 1 makes one update a level; the other objectives one."""
    rl, ivae, joint = {"rl": True}, {"ivae": True}, {"update": "joint"}
    steps = [{"step": t, "gamma": 0.9} for t in range(5)]
    for given, loss, keywords in (
        ({}, rewards.elbo_loss, [{}]),
        (rl | {"update": "stepwise"}, rewards.stepwise_loss, steps),
        (rl | {"pay": "own"}, rewards.sampled_loss, [{"pay": "own", "gamma": 0.9}]),
        (rl | joint, rewards.joint_loss, [{"skip": "mean"}]),
        (ivae | {"skip": "sample"}, rewards.ivae_loss, [{"skip": "sample", "sampled": True}]),
        (ivae | joint, rewards.ivae_loss, [{"sampled": False}]),
    ):
        losses = train.losses(settings.defaults(given), 5, 0.5, 2.0)
        for one, expected in zip(losses, keywords, strict=True):
            expected = expected | {"beta": 0.5, "free_bits": 2.0}
            assert one.func is loss and expected.items() <= one.keywords.items()


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
    for n, weights in enumerate(seen[1:], start=1):
        keep = min(0.7, (1 + n) / (10 + n))  # a short run is not of its first weights
        average = {k: keep * a + (1 - keep) * weights[k] for k, a in average.items()}
    model, _ = evaluate.load_run(tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), average)
    kl = evaluate.densities(model, few.test)["kl"]
    assert evaluation_of(tmp_path)["kl"] == pytest.approx(kl, rel=1e-6)


def test_mistakes_give_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, words in (
        ("--arch vae --levels 3", "vae has one level, not 3"),
        ("--rl --ivae", "two objectives: choose one"),
        ("--rl --arch biva", "--rl is not defined for biva, .*: use --arch hvae or lvae"),
        ("--ivae --arch aae", "--ivae is not defined for aae"),
        ("--ivae --update stepwise", "stepwise is for --rl: --ivae takes joint or sampled"),
        ("--gamma nan", "gamma nan: a discount lies from 0 to 1"),
        ("--ema 1", "--ema 1.0: a decay lies from 0 to below 1"),
        ("--lr inf", "--lr inf: must be above 0"),
        ("--seed 4294967296", "--seed 4294967296: choose from 0"),
        ("--channels 9999999999", "out of memory: lower --batch-size"),
        ("--train-images 2000", "there are 1,437"),
        ("--device tpu", "unknown device 'tpu': choose auto, cpu, cuda or cuda:N"),
        ("--device cuda", "no CUDA device here.*--device cpu"),
        ("--dataset cifar10 --image-size 64", "--image-size is for --dataset folder"),
        ("--dataset folder --image-size 4", "--image-size 4: choose from 8 to 1024"),
        ("--dataset folder --image-size 50", "squares whose side is a multiple of 4"),
        ("--unlabelled", "--unlabelled is for --dataset stl10"),
        ("--dataset cifar10 --threshold", "--threshold is for grey images"),
        ("--latents 8x,4", "latent '8x' is not understood"),
        ("--colour", "unrecognized arguments"),
        ("--resume", "no run at .*: name a folder"),
        ("--resume --overwrite", "choose one"),
        ("--resume here --out there", "name two runs"),
    ):
        fails(capsys, flags.split(), words)
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_another_run(tmp_path):
    """Its name is in the run's, and two folders are no seeds of one row."""
    runs = []
    for seed, folder in enumerate(("cats", "dogs")):
        given = {"dataset": "folder", "data_dir": str(tmp_path / folder), "seed": seed}
        config = settings.defaults(given)
        assert config["out"] == f"runs/{folder}-lvae-{seed}"
        runs.append(tables.Run(f"mine-{seed}", seed, config, {"kl": [1.0] * 5}, []))
    with pytest.raises(files.UserError, match="mine-0 and mine-1 differ in data_dir"):
        tables.groups(runs)


def test_what_was_not_given_is_decided_anew_on_resume(few, tmp_path):
    """A run of one epoch that goes on to three is the run of three, free bits and warm-up too."""
    flags = [*TINY, "--rl", "--dataset", "mnist", "--free-bits", "2", "--train-images", "300"]
    train.main([*flags, "--epochs", "1", "--out", str(tmp_path)])
    train.main(["--resume", str(tmp_path), "--epochs", "6"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["free_bits_epochs"], config["warmup"]) == (6, 3)
    assert [line["free_bits"] for line in metrics_of(tmp_path)] == [2.0] * 6


def test_a_single_class_has_no_probe(few, tmp_path, monkeypatch, capsys):
    one = few._replace(train_labels=torch.zeros_like(few.train_labels))
    monkeypatch.setattr(evaluate, "load", lambda *args, **options: one)
    train.main([*TINY, "--epochs", "1", "--eval-every", "1", "--out", str(tmp_path)])
    assert evaluation_of(tmp_path)["probe"] == {} and "probe" not in metrics_of(tmp_path)[0]["test"]
    assert "no probe: " in capsys.readouterr().out


def test_a_validation_split_is_made_of_training_images(tmp_path):
    """The last fifth, or where images come class by class one of every five; the test split is out
    of sight. What --train-images leaves is of the rest."""
    whole, split = data.load("digits"), data.load("digits", validation=True)
    assert len(split.test) == 1437 // 5
    assert torch.equal(torch.cat([split.train, split.test]), whole.train)
    assert torch.equal(torch.cat([split.train_labels, split.test_labels]), whole.train_labels)
    few = data.load("digits", validation=True, train_images=1150)
    assert torch.equal(few.train, split.train) and torch.equal(few.test, split.test)
    for k in range(10):
        draw(tmp_path / "train" / "ab"[k // 5] / f"{k}.png", k, size=(32, 32))
    draw(tmp_path / "test/a/0.png", 0)
    split = data.load("folder", tmp_path, validation=True)
    assert split.test_labels.tolist() == [0, 1] and split.train_labels.tolist() == 4 * [0] + 4 * [1]
    whole = data.load("folder", tmp_path).train
    assert torch.equal(split.test, whole[[0, 5]]) and len(split.train) == 8
    for k in range(3, 10):
        (tmp_path / "train" / "ab"[k // 5] / f"{k}.png").unlink()
    with pytest.raises(files.UserError, match="--validation: 3 training images are too few"):
        data.load("folder", tmp_path, validation=True)


def test_what_a_run_was_made_by(few, tmp_path, monkeypatch):
    """Processor, threads, arithmetic, PyTorch and commit; of a run that went on elsewhere each."""
    usual = ["--out", str(tmp_path / "run"), "--epochs"]
    train.main([*TINY, *usual, "1"])
    train.main(["--resume", *usual, "2"])
    monkeypatch.setattr(devices, "commit", lambda: "a1b2-dirty")
    train.main(["--resume", *usual, "3", "--probe", "top"])
    train.main(["--resume", *usual, "3"])
    one, two = json.loads((tmp_path / "run/config.json").read_text())["made_by"]
    assert two == one | {"commit": "a1b2-dirty"} and one["threads"] == torch.get_num_threads()
    assert one["dtype"] == "float32" and one["torch"] == torch.__version__ and one["device"]


def test_a_commit_is_named_with_its_changes(tmp_path, monkeypatch):
    def git(*argv: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.check_output(["git", *identity, *argv], cwd=tmp_path, text=True).strip()

    monkeypatch.setattr(devices, "__file__", str(write(tmp_path / "devices.py", "1")))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert devices.commit() is None
    git("init", "-q")
    git("add", "devices.py")
    git("commit", "-qm", "first")
    git("tag", "-am", "no commit's name", "v1")
    commit = git("rev-parse", "--short", "HEAD")
    assert devices.commit() == commit
    write(tmp_path / "devices.py", "2")
    assert devices.commit() == f"{commit}-dirty"
    other = write(tmp_path / "vendor/devices.py", "3")  # in a repository that does not have it
    monkeypatch.setattr(devices, "__file__", str(other))
    assert devices.commit() is None


def test_weights_alone(few, tmp_path, capsys):
    """They give the model that the run measures, numbers and pictures, and no run to go on with."""
    run, path = tmp_path / "run", str(tmp_path / "tiny-3.pt")
    train.main([*TINY, "--rl", "--ema", "0.5", "--epochs", "1", "--out", str(run)])
    capsys.readouterr()
    found = []
    for argv in ([str(run), "--save", path], [path]):
        evaluate.main([*argv, "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and sorted(os.listdir(tmp_path)) == ["run", "tiny-3.pt"]
    state = torch.load(path, weights_only=True)
    assert {k for k, v in state.items() if v} == {
        "format", "config", "model_config", "model", "epoch", "updates", "made_by"
    }  # fmt: skip
    figures.main([path, "--out", str(tmp_path / "made")])
    made = {p.name.removesuffix("-digits.png") for p in (tmp_path / "made").iterdir()}
    assert made == {"fig1-skip-paths", "fig5-latents", "samples"}
    fails(capsys, ["--resume", path], "has weights alone")
    fails(capsys, [str(run), "--save", "x"], "--save x: name a file that ends", evaluate.main)
    nowhere = str(tmp_path / "no/x.pt")
    fails(capsys, [str(run), "--save", nowhere], "cannot read or write .*no/x.pt", evaluate.main)


def test_evenly():
    for images, n in [(60_000, 10_000), (15_000, 10_000), (7, 3), (3, 9)]:
        rows = data.evenly(images, n)
        assert len(rows) == min(n, images) and rows[0] == 0
        assert set(rows.diff().tolist()) <= {images // len(rows), -(-images // len(rows))}
        assert images - rows[-1] <= -(-images // len(rows))


def test_mistakes_with_runs_give_one_line(few, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    train.main([*TINY, "--out", out, "--epochs", "1"])
    fails(capsys, ["--resume", out, "--arch", "hvae"], "has --arch lvae, not hvae: leave the flag")
    fails(capsys, ["--resume", out, "--epochs", "-1"], "--epochs -1: must be above 0")
    train.main(["--resume", out, "--epochs", "2", "--probe", "top"])
    fails(capsys, ["--resume", out, "--epochs", "1"], "--epochs 1: the run has begun epoch 3")
    with monkeypatch.context() as patch:
        patch.setitem(models.PRESETS["small"]["grey"], "blocks", 2)
        fails(capsys, ["--resume", out], "another network than its flags now give")
    (tmp_path / "run/eval.json").unlink()
    train.main(["--resume", out, "--probe", "top"])
    assert set(evaluation_of(out)["probe"]) == {"z2"}
    kept = tmp_path / "run/eval.json"
    kept.write_text(kept.read_text()[:-9])
    fails(capsys, [out], "eval.json is damaged: delete it", evaluate.main)
    kept.write_text(json.dumps({"updates": 1, "probe": {"z2": 0.0}}))  # of an earlier state
    train.main(["--resume", out, "--probe", "top"])
    assert evaluation_of(out)["probe"]["z2"] > 0 and evaluation_of(out)["epoch"] == 2
    train.main(["--resume", out, "--probe", "every"])  # what the kept evaluation lacks is made
    assert set(evaluation_of(out)["probe"]) == {"z1", "z2", "all"}
    other = few._replace(train=few.train[:299], train_labels=few.train_labels[:299])
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", lambda *args, **options: other)
        fails(capsys, ["--resume", out, "--epochs", "4"], "trained on other images or labels")
    fails(capsys, [out, "--mine", "3"], "name levels from 1 to 2", evaluate.main)
    fails(capsys, [out, "--samples", "0"], "--samples 0", evaluate.main)
    checkpoint = tmp_path / "run/checkpoint.pt"
    fails(capsys, ["--out", str(checkpoint / "run")], "cannot .*run")
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        for argv, main in (([out], evaluate.main), (["--resume", out], train.main)):
            fails(capsys, argv, "damaged or not a checkpoint", main)
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    fails(capsys, [out], "not a checkpoint of this version", evaluate.main)


# --------------------------------------------------------------------------------------------------
# Several processes


def test_without_torchrun_there_is_one_process():
    for rank in ("1", "8", "abc"):
        code = "import devices; print(devices.RANK, devices.SIZE, devices.FIRST)"
        alone = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "PYTHONPATH": str(HERE)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=alone, capture_output=True, text=True
        )
        assert done.stdout == "0 1 True\n", done.stderr


def two_processes(tmp_path: Path, code: str, *argv: str) -> subprocess.CompletedProcess:
    """What torchrun makes of a script of these lines."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import hashlib, os, signal, sys, torch, data, devices, settings, train\n"
        f"from pathlib import Path\n{code}"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(script), *argv]
    paths = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.run(command, cwd=HERE, text=True, capture_output=True, env=paths)


GRADIENTS = """
torch.distributions.Normal.rsample = lambda self, shape=(): self.loc
x = (data.load("digits").train[:64] > 127).float()

def gradients(size, *flags):
    train.SIZE = devices.SIZE = size
    flags = [*flags, "--latents", "4,2", "--channels", "4", "--dtype", "float32", "--lr", "1e-9"]
    config = settings.defaults(vars(settings.parser().parse_args(flags)))
    run = train.Run(config, torch.device("cpu"))
    train.algorithm_1(run, x[devices.own_rows(torch.arange(64))], 0.7, 0.0)
    return [p.grad for p in run.model.parameters()]

with devices.group(Path("none")):
    for flags in ([], ["--rl", "--update", "stepwise"], ["--ivae", "--update", "joint"],
                  ["--arch", "hvae", "--rl", "--update", "joint"]):
        shared, alone = gradients(2, *flags), gradients(1, *flags)
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
        assert sum(g.abs().sum() for g in alone) > 1
"""


def test_gradients_of_processes_are_those_of_one(tmp_path):
    """With noise and binarisation held fixed, and every path taken by every image."""
    done = two_processes(tmp_path, GRADIENTS)
    assert done.returncode == 0, done.stderr


TRAINED = """
whole, noise = train.train, []
def watched(run, *args):
    noise.append(torch.rand(1, generator=torch.default_generator.clone_state()).item())
    whole(run, *args)
    state = b"".join(p.detach().numpy().tobytes() for p in run.model.parameters())
    with open(f"{sys.argv[2]}.rank{train.RANK}", "w") as file:
        print(hashlib.sha256(state).hexdigest(), noise[0], run.updates, file=file)
train.train = watched
train.main(sys.argv[1:])
"""


def test_two_processes_train_one_run(tmp_path):
    """Equal parameters after 20 updates, with noise of their own; the first one evaluates; one
    process goes on. A batch that does not divide is there, and one smaller than the group."""
    out = tmp_path / "run"
    flags = [*TINY, "--rl", "--train-images", "253", "--batch-size", "63", "--epochs", "4"]
    done = two_processes(tmp_path, TRAINED, "--out", str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluating") == 1 and done.stdout.count("one of 2 processes") == 1
    one, two = ((tmp_path / f"run.rank{rank}").read_text().split() for rank in (0, 1))
    assert one[0] == two[0] and one[1] != two[1] and one[2] == two[2] == "20"
    assert [line["epoch"] for line in metrics_of(out)] == [1, 2, 3, 4]
    train.main(["--resume", str(out), "--epochs", "5"])
    assert evaluate.load_checkpoint(out)["updates"] == 25 and evaluation_of(out)


FEW = """
torch.cuda.device_count = lambda: 1
train.main(sys.argv[1:])
"""


def test_fewer_devices_than_processes_are_one_line(tmp_path):
    done = two_processes(tmp_path, FEW, *TINY, "--device", "cuda", "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("error: device cuda:1: no CUDA device here, or too few") == 1
    assert "train.py" not in done.stderr  # the traceback that follows is torchrun's own


LOST = """
train.SAVE_EVERY, update = 0, train.update
def until_killed(run, *args):
    if train.RANK == 1 and run.updates == 43:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(run, *args)
train.update = until_killed
train.main(sys.argv[1:])
"""


def test_a_lost_process_ends_the_run_with_a_word_and_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--rl", "--epochs", "12", "--batch-size", "64", "--train-images", "300"]
    lost = two_processes(tmp_path, LOST, *flags, "--out", str(out))
    assert lost.returncode != 0
    (words,) = [line for line in lost.stderr.splitlines() if "has lost another" in line]
    assert "process 1 of 2" in words and "--resume" in words
    assert 20 <= evaluate.load_checkpoint(out)["updates"] <= 43
    train.main(["--resume", str(out)])
    assert evaluate.load_checkpoint(out)["updates"] == 60 and evaluation_of(out)


def test_a_mistake_is_told_once(tmp_path):
    """By one process, and without advice to go on from a checkpoint that is not there."""
    for flags in (["--gamma", "7"], ["--dataset", "folder", "--data-dir", str(tmp_path / "none")]):
        done = two_processes(tmp_path, "train.main(sys.argv[1:])", *flags)
        lines = [line for line in done.stderr.splitlines() if "script.py: error" in line]
        assert done.returncode != 0 and len(lines) == 1 and "--resume" not in done.stderr


def test_own_rows(monkeypatch):
    """Equal parts that hold every row, whatever the numbers of rows and processes."""
    for size, n in itertools.product((1, 2, 3, 5), (1, 2, 7, 30)):
        monkeypatch.setattr(devices, "SIZE", size)
        parts = []
        for rank in range(size):
            monkeypatch.setattr(devices, "RANK", rank)
            parts.append(devices.own_rows(torch.arange(n)).tolist())
        assert {len(part) for part in parts} == {-(-n // size)}
        assert {row for part in parts for row in part} == set(range(n))


# --------------------------------------------------------------------------------------------------
# CUDA graphs


class Graph:
    """Stands for a CUDA graph on the CPU: what is recorded is done once, without a trace, and done
    again, from the same inputs to the same outputs, at every replay."""

    def __enter__(self):
        self.captured.function = self.record

    def __exit__(self, *error):
        self.captured.function = train.algorithm_1

    def record(self, run, *args):
        self.run, self.args, self.replays = run, args, 0
        run.updates += run.steps
        self.outputs = torch.full((run.steps, 1 + run.model.levels), math.nan)
        return self.outputs

    def replay(self):
        before, self.replays = self.run.updates, self.replays + 1
        self.outputs.copy_(train.algorithm_1(self.run, *self.args))
        self.run.updates = before


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
def test_recorded_updates_are_the_updates(few, monkeypatch, flags):
    """Batch, KL's weight and learning rate come anew to every replay, free bits make another graph,
    the smaller batch goes without, and every batch is trained on once."""
    graphs = [Graph() for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock(side_effect=graphs))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    flags, x = ["--batch-size", "30", *flags], (few.train > 127).float()
    plain, replayed = run_of(*flags), run_of(*flags)
    replayed.captured = devices.Captured(train.algorithm_1, torch.device("cpu"))
    for graph in graphs:
        graph.captured = replayed.captured
    for group, rate in zip(replayed.optimizer.param_groups, replayed.rates, strict=True):
        group["lr"] = torch.tensor(rate)
    courses = []
    for run in (plain, replayed):
        for group in run.optimizer.param_groups:
            group["eps"] = 1e-3  # that no step is made of rounding errors
        torch.manual_seed(3)
        courses.append(course(run, x))
    torch.testing.assert_close(*courses, rtol=1e-4, atol=1e-6)
    assert plain.updates == replayed.updates == 10 * plain.steps
    assert [graph.replays for graph in graphs] == [4, 1]  # after two batches without, each


if CUDA:

    @pytest.mark.parametrize("flags", GRAPHS)
    def test_updates_on_cuda(cuda, monkeypatch, few, flags):
        """As one graph and step by step as on the CPU, in float64 and without noise."""
        build = baselines.build
        monkeypatch.setattr(baselines, "build", lambda config: build(config).double())
        monkeypatch.setattr(Normal, "rsample", lambda self, shape=(): self.loc)
        found = {}
        for name, device in (("cpu", "cpu"), ("eager", "cuda"), ("graph", "cuda")):
            run = run_of("--batch-size", "30", *flags, device=device)
            assert (run.captured is not None) == (device == "cuda")
            run.captured = run.captured if name == "graph" else None
            for group in run.optimizer.param_groups:
                group["eps"] = 1.0
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
        for graph in (True, False):
            run = run_of(*flags, device="cuda")
            run.captured = run.captured if graph else None
            torch.manual_seed(3)
            found.append(course(run, x))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
        run = run_of(*flags, "--lr", "1e-9", device="cuda")
        values = [train.update(run, x[:30], 1.0, 0.0)[0, 0] for _ in range(6)]
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
# tables.py


def mistake(capsys, words: str, *argv) -> None:
    fails(capsys, [str(arg) for arg in argv], f"^tables.py: error: .*{words}", tables.main)


def write_run(root: Path, name: str, flags: dict, probe: float = 50.0) -> Path:
    """The files of a finished run of five levels, numbers made up."""
    folder = root / name
    folder.mkdir(parents=True)
    config = dict(arch="lvae", rl=False, ivae=False, gamma=0.9, dataset="fashionmnist", seed=0,
                  latents=None, train_images=None, out=str(folder)) | flags  # fmt: skip
    seed = config["seed"]
    evaluation = dict(probe={"z4": 77.0, "z5": probe, "all": 85.0}, kl=[1.0] * 4 + [probe / 10],
                      mine={"z5": {"nats": probe / 20}}, active_units=[8] * 4 + [4 + seed],
                      log_px_given_z=[-220.0 - k - seed for k in range(5)], commit="a1b2",
                      elbo=-240.0, iwae=-237.0 - seed, bpd=0.4 + seed / 100)  # fmt: skip
    test = {"probe": probe, "kl": [2.0] * 5, "elbo": -300.0}
    lines = [{"epoch": 1, "seconds": 30.0, "test": test}, {"epoch": 2, "seconds": 61.0}]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def three_seeds(root: Path) -> list[Path]:
    seeds = enumerate((70.0, 71.0, 75.0))
    return [write_run(root, f"rl-{s}", {"rl": True, "seed": s}, probe) for s, probe in seeds]


def printed(capsys, *argv) -> str:
    capsys.readouterr()
    tables.main([str(arg) for arg in argv])
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    return [part.strip() for part in line.strip("|").split("|")]


def test_table_of_seeds(tmp_path, capsys):
    """Mean ± standard deviation by hand, the paper's values beside it, a row a name."""
    runs = [
        *three_seeds(tmp_path),
        write_run(tmp_path, "gamma-0.8", {"rl": True, "gamma": 0.8}, 60.0),
        write_run(tmp_path, "few", {"arch": "biva", "train_images": 900}),
        write_run(tmp_path, "held", {"arch": "biva", "validation": True}),
        write_run(tmp_path, "latents", {"arch": "biva", "latents": "9,8,7,6,5"}),
        write_run(tmp_path, "text", {"arch": "biva", "latents": "128,64,32,16,8"}),
        write_run(tmp_path, "digits", {"dataset": "digits"}, 0.0),
    ]
    lines = printed(capsys, *runs, "--markdown").splitlines()
    assert lines[0] == "**fashionmnist**" and "**digits**" in lines
    rows = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
    assert rows["rl"] == ["rl", "3", "72.00 ± 2.65", "78.48 ± 0.15", "85.00 ± 0.00", "84.77 ± 0.30",
                          "3.60 ± 0.13", "4.37 ± 0.58", "0.410 ± 0.010", "0.335 ± 0.072",
                          "7.20 ± 0.26", "32.1 ± 0.5", "5.0 ± 1.0", "61 ± 0"]  # fmt: skip
    assert rows["gamma-0.8"][2:6] == ["60.00", "77.98 ± 0.23", "85.00", ""]
    assert rows["digits"][:3] == ["digits", "1", "0.00"]  # a mean of 0 is a value
    # Nothing beside other data and latents than the paper's; those of its text are the paper's.
    assert [rows[name][3] for name in ("few", "held", "latents")] == ["", "", ""]
    assert rows["text"][3] == "28.67 ± 0.64"
    text = printed(capsys, *runs[:-1]).splitlines()
    assert text[0] == "fashionmnist" and len({len(line) for line in text[1:]}) == 1  # aligned


def test_columns_and_rows_that_are_asked_for(tmp_path, capsys):
    """Columns and rows in the order asked; lists are means of each level over seeds."""
    runs = [*three_seeds(tmp_path), write_run(tmp_path, "levels-10", {"rl": True}, 1e-6)]
    command = [*runs, "--markdown", "--columns"]
    *_, three, ten = printed(capsys, *command, "kls,decoded,elbo,iwae,probe").splitlines()
    assert cells(three) == ["rl", "3", "1.00 1.00 1.00 1.00 7.20",
                            "-221.0 -222.0 -223.0 -224.0 -225.0", "-240.0 ± 0.0", "-238.0 ± 1.0",
                            "72.00 ± 2.65", "78.48 ± 0.15"]  # fmt: skip
    assert cells(ten)[0] == "levels-10" and cells(ten)[6] == "1e-06"  # not "levels" and "0.00"
    first, second = printed(capsys, *command, "kl", "--rows", "levels-*,rl").splitlines()[4:]
    assert first.startswith("| levels-10 |") and second.startswith("| rl |")
    path = runs[0] / "eval.json"
    more = {"probe_sample": {"z5": 65.0, "all": 66.0}, "probe_binarised_mean": {"z5": 67.0}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    columns = "sample,sample_all,binarised_mean,binarised_sample"
    *_, row = printed(capsys, *command, columns, "--rows", "rl").splitlines()
    assert cells(row) == ["rl", "3", "65.00", "66.00", "67.00"]  # of the one seed that has them


def test_rows_in_words(tmp_path, capsys):
    """The method and what is not usual of it; epochs beside it, without a deviation."""
    more = {"warmup": 10, "pay": "own", "gamma": 0.0, "size": "deep", "mean_field": True}
    runs = [
        write_run(tmp_path, "a-0", {"rl": True, "warmup": 10}),
        write_run(tmp_path, "a-1", {"rl": True, "warmup": 10, "seed": 1}),
        write_run(tmp_path, "b", {"rl": True, "arch": "hvae", **more}),
        write_run(tmp_path, "c", {"ivae": True, "update": "joint", "warmup": 0}),
        write_run(tmp_path, "d", {"warmup": 2, "free_bits": 2.0, "latents": "9,8,7,6,5"}),
        write_run(tmp_path, "e", {"arch": "hvae", "warmup": 0, "kl": "closed-form"}),
    ]
    command = [*runs, "--markdown", "--columns", "epochs"]
    assert cells(printed(capsys, *command).splitlines()[-1])[0] == "e, closed-form KL"
    *_, a, b, c, d, e = printed(capsys, *command, "--words").splitlines()
    assert cells(e)[0] == "HVAE, closed-form KL"
    assert cells(a) == ["LVAE + RL", "2", "2"]
    assert cells(b)[0] == "HVAE + RL, own pay, gamma 0, size deep, no merge"
    assert cells(c)[0] == "LVAE + IVAE, joint, no warm-up"
    assert cells(d)[0] == "LVAE, latents 9,8,7,6,5, 2 free nats, warm-up 2"


def test_runs_at_an_epoch(tmp_path, capsys):
    """--after-epochs takes the evaluation that --eval-every logged then for the run's."""
    runs = three_seeds(tmp_path)
    command = [*runs, "--markdown", "--columns", "probe,all,kl,bpd,elbo,seconds", "--after-epochs"]
    *_, row = printed(capsys, *command, 1).splitlines()
    assert cells(row) == ["rl", "3", "72.00 ± 2.65", "78.48 ± 0.15", "2.00 ± 0.00", "32.1 ± 0.5",
                          "0.513 ± 0.013", "0.335 ± 0.072", "-300.0 ± 0.0", "30 ± 0"]  # fmt: skip
    mistake(capsys, "rl-0 was not evaluated at epoch 2: see", *command, 2)


def test_packed_runs_are_the_runs(tmp_path, capsys):
    """A .jsonl file gives what its folders give, alone and beside others, and is packed again."""
    runs = [*three_seeds(tmp_path), write_run(tmp_path, "elbo-0", {"arch": "hvae"}, 10.0)]
    packed, three, again = (tmp_path / f"{name}.jsonl" for name in ("packed", "three", "again"))
    assert printed(capsys, *runs, "--pack", packed) == ""
    printed(capsys, *runs[:3], "--pack", three)
    printed(capsys, three, runs[3], "--pack", again)
    assert again.read_text() == packed.read_text() and len(packed.read_text().splitlines()) == 4
    for run, folder in zip(tables.read([packed]), runs, strict=True):
        assert run.folder is None and run.commit == "a1b2"
        assert run._replace(folder=folder) == tables.read([folder])[0]
    for path in (packed, tmp_path / "a.json"):
        mistake(capsys, "name a new file that ends in .jsonl", runs[3], "--pack", path)
    assert len(list(tmp_path.glob("*.json*"))) == 3


def test_mistakes_with_tables_give_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "__doc__", None)  # as by python -OO
    a = write_run(tmp_path, "a-0", {"rl": True, "device": "cpu", "eval_every": 5, "latents": None})
    b = write_run(tmp_path, "a-1", {"rl": True, "seed": 1, "device": "cuda", "threshold": False})
    c = write_run(tmp_path, "a-2", {"rl": True, "seed": 2, "gamma": 0.8})
    assert "a      2" in printed(capsys, a, b)  # where and how it is computed may differ
    mistake(capsys, "a-0 and a-2 differ in gamma, 0.9 and 0.8", a, b, c)
    mistake(capsys, "row a has seed 0 twice", a, b, write_run(tmp_path, "other/a-0", {"rl": True}))
    for key, *values in (("iwae_samples", 16, 2), ("updates", 8, 7), ("epoch", 3, 1)):
        for run, value in zip((a, b), values, strict=True):
            (run / "eval.json").write_text(json.dumps(evaluation_of(run) | {key: value}))
        mistake(capsys, f"a-0 and a-1 differ in {key}, {values[0]} and {values[1]}: ", a, b)
        assert "a      2" in printed(capsys, a, b, "--after-epochs", 1)
    run, packed = write_run(tmp_path, "b", {"rl": True}), tmp_path / "packed.jsonl"
    mistake(capsys, "no run at .*nowhere: name a run.s folder", run, tmp_path / "nowhere")
    mistake(capsys, "--columns kl,probes: choose from probe, all", run, "--columns", "kl,probes")
    mistake(capsys, r"no row is named c\*", run, "--rows", "c*")
    tables.pack(tables.read([run]), packed)
    for file in (packed, run / "config.json", run / "eval.json", run / "metrics.jsonl"):
        whole, name = file.read_text(), packed if file == packed else run
        for broken in ("{", "[]", "3", "{}"):
            file.write_text(broken)
            mistake(capsys, f"{name} is damaged or of another version", name)
        file.write_text(whole)
    (run / "eval.json").unlink()
    mistake(capsys, f"b has no eval.json: python evaluate.py {run} makes it", run)


def test_values_of_the_paper():
    """Some of each table, read off the page again."""
    for row, values in [
        (("fashionmnist", "AAE", 1, 0.9), {"probe": "72.11±0.27", "mine": "4.08±0.67"}),
        (("stl10", "HVAE+RL", 5, 0.9), {"probe": "43.76±0.15", "mine": "10.93±1.73"}),
        (("cifar100", "VAE", 1, 0.9), {"probe": "19.05±0.20", "mine": "13.76±1.85"}),
        (("cifar10", "LVAE", 5, 0.9), {"probe": "15.32±0.10", "all": "49.87±0.39",
                                       "mine": "5e-5±0.00", "bpd": "2.91±0.03", "kl": "2e-3±0.0"}),
        (("cifar10", "HVAE+RL", 5, 0.0), {"probe": "41.91±0.15"}),
        (("fashionmnist", "LVAE+RL", 10, 0.9), {"probe": "75.82"}),
        (("cifar10", "LVAE+RL", 7, 0.9), {}),
        (("fashionmnist", "LVAE+RL", 5, 0.5), {}),
    ]:  # fmt: skip
        assert tables.paper(*row) == values


def test_tables_of_the_study_are_those_of_the_results(capsys, monkeypatch):
    """Each command of the page that prints Markdown prints the table right above it."""
    monkeypatch.chdir(HERE)
    page = (HERE / "results/README.md").read_text()
    form = re.compile(r"^python tables.py (results/.*--markdown.*)$", re.MULTILINE)
    commands = list(form.finditer(page))
    for command in commands:
        above = [b for b in page[: command.start()].split("\n\n") if b.startswith("|")][-1]
        words = [sorted(glob.glob(w)) or [w] for w in shlex.split(command[1])]
        parts = printed(capsys, *(word for some in words for word in some)).split("\n\n")
        (table,) = (part.strip() for part in parts if part.startswith("|"))
        assert table == above, f"{command[1]} prints another table:\n{table}"
    assert len(commands) >= 12


def counts(gamma: float, pay: str = "inferred") -> tuple[list[float], list[float]]:
    """How often the sum of Q-values counts what each of five steps decodes, and its KL."""
    log_px, kl = torch.zeros(5, 1, requires_grad=True), torch.zeros(5, 1, requires_grad=True)
    r = log_px - rewards.kl_paid(kl, (0, 1, 2, 3, 4), pay)
    rewards.q_values(r, gamma).sum().backward()
    return log_px.grad.flatten().tolist(), (-kl.grad).flatten().tolist()


def test_other_tables_of_the_study():
    """What the KL counts, what a nat of z_5 costs, and what bench.py timed."""
    page = (HERE / "results/README.md").read_text()
    (w, pays), (w0, pays0) = counts(0.9), counts(0.0)
    for t in range(5):
        levels = f"z_{t + 1} | z_{5 - t}"  # of HVAE and LVAE
        assert f"| {t + 1} | {levels} | {pays[t] / w[t]:.1f} | {pays0[t] / w0[t]:.1f} |\n" in page
    studies = ("fashionmnist", "own", "gamma")
    groups = tables.groups(tables.read(HERE / f"results/{study}.jsonl" for study in studies))
    ivae = [0.2] * 5, [1.0] * 5  # Eq. 39
    for row, (decoded, paid) in {
        "fashionmnist-lvae-rl": (w, pays),
        "gamma-lvae-0": (w0, pays0),
        "fashionmnist-lvae-ivae": ivae,
        "own-lvae": counts(0.9, "own"),
        "fashionmnist-hvae-ivae": ivae,
        "own-hvae": counts(0.9, "own"),
        "fashionmnist-hvae-rl": (w, pays),
        "gamma-hvae-0": (w0, pays0),
    }.items():
        z5, z4 = (4, 3) if "hvae" in row else (0, 1)  # their steps
        costs, saves = (paid[step] / decoded[z5] for step in (z5, z4))
        kl = np.mean([run.evaluation["kl"][-1] for run in groups[row]])
        epochs = groups[row][0].config["epochs"]
        numbers = f"{costs:.1f} | {saves:.1f} | {costs - saves:.1f} | {kl:.1f} | {epochs}"
        assert f"| {groups[row][0].words} | {numbers} |\n" in page
    lines = map(json.loads, (HERE / "results/bench.jsonl").read_text().splitlines())
    speeds = {line["name"]: line["images_per_s"] for line in lines}
    for name, label in (
        ("small-lvae-bfloat16", "LVAE, two Xeon cores"),
        ("small-hvae-bfloat16", "HVAE, two Xeon cores"),
        ("paper-lvae-h200", "LVAE, size paper, H200"),
    ):
        ways = [speeds[name][way] for way in ("literal", "stepwise", "joint", "sampled", "elbo")]
        assert " | ".join([f"| {label}", *(f"{way:.0f}" for way in ways)]) + " |\n" in page


@pytest.mark.parametrize("path", sorted(HERE.glob("weights/*.pt")), ids=lambda path: path.stem)
def test_trained_weights(path):
    """Small, of a commit, the same by torch.hub, and what results/ says of seed 0: KL and probe,
    on FashionMNIST of z_L alone, as the run measured it last, fitted on 10,000 images."""
    assert path.stat().st_size < (11.1e6 if "best" in path.stem else 2.75e6)
    model, config = evaluate.load_run(path)
    dataset = config["dataset"]
    hub = torch.hub.load(str(HERE), path.stem.replace("-", "_"), source="local")
    for (key, a), b in zip(model.state_dict().items(), hub.state_dict().values(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b), key
    study = "best" if "best" in path.stem else dataset
    runs = tables.read([HERE / f"results/{study}.jsonl"])
    (run,) = (run for run in runs if run.name == f"{path.stem}-0")
    assert run.config["made_by"][0]["commit"].isalnum() and run.config["given"] == config["given"]
    d = evaluate.load_data(config, real(dataset) if dataset in REAL else None)
    kl = evaluate.densities(model, d.test)["kl"]
    assert kl == pytest.approx(run.evaluation["kl"], rel=1e-3, abs=1e-6)
    if path.stem == "fashionmnist-lvae-rl":
        row = f"{run.evaluation['probe']['z5']:.2f} %, {run.evaluation['kl'][-1]:.3f} nats"
        assert row in (HERE / "README.md").read_text()
    if dataset == "digits":
        probes = evaluate.probes(model, d)
        assert probes == pytest.approx(run.evaluation["probe"], abs=0.6)
    elif path.stem == "fashionmnist-lvae-rl":
        probe = evaluate.quick_eval(model, d)["probe"]
        assert probe == pytest.approx(run.metrics[-1]["test"]["probe"], abs=0.3)


def annealed(model, x, z, level: int, chains: int = 4, steps: int = 100) -> torch.Tensor:
    """(B,): log p(x|z_l), the levels below integrated out by annealed importance sampling (Neal
    2001) of their noise, with Hamiltonian moves. In the mean it lies a little below the truth."""
    x, z = (v.repeat_interleave(chains, dim=0) for v in (x, z))

    def log_px(noise: list[torch.Tensor]) -> torch.Tensor:
        below = z
        for k in reversed(range(level)):
            prior = model.prior(k, below)
            below = prior.mean + prior.stddev * noise[k]
        return model.decode(below).log_prob(x)

    def slopes(noise: list[torch.Tensor], beta: float):
        noise = [e.detach().requires_grad_() for e in noise]
        value = log_px(noise)
        gradients = torch.autograd.grad(value.sum(), noise)
        return value.detach(), [
            beta * g - e.detach() for g, e in zip(gradients, noise, strict=True)
        ]

    def energy(value, beta, *parts):
        return beta * value - sum(p.square().flatten(1).sum(1) for part in parts for p in part) / 2

    noise, below = [], z
    for k in reversed(range(level)):
        below = model.prior(k, below).mean.detach()
        noise.insert(0, torch.randn_like(below))
    betas = torch.linspace(-6, 6, steps + 1).sigmoid()
    betas = ((betas - betas[0]) / (betas[-1] - betas[0])).tolist()
    value, log_weight, size = slopes(noise, 0.0)[0], 0.0, x.new_full((len(x),), 0.1)
    for before, beta in itertools.pairwise(betas):
        log_weight = log_weight + (beta - before) * value
        there, speed = noise, [torch.randn_like(e) for e in noise]
        step = [size.view(-1, *[1] * (e.dim() - 1)) for e in noise]
        new, slope = slopes(there, beta)
        start = energy(new, beta, there, speed)
        for _ in range(5):  # leapfrog
            speed = [v + h / 2 * g for v, h, g in zip(speed, step, slope, strict=True)]
            there = [e + h * v for e, h, v in zip(there, step, speed, strict=True)]
            new, slope = slopes(there, beta)
            speed = [v + h / 2 * g for v, h, g in zip(speed, step, slope, strict=True)]
        taken = torch.rand_like(value).log() < energy(new, beta, there, speed) - start
        value = torch.where(taken, new, value)
        noise = [
            torch.where(taken.view(-1, *[1] * (e.dim() - 1)), t, e)
            for t, e in zip(there, noise, strict=True)
        ]
        size = size * torch.where(taken, 1.02, 0.96)
    return log_weight.view(-1, chains).logsumexp(dim=1) - math.log(chains)


def test_paths_by_means_beside_the_integral():
    """What the pages say of Eq. 24, z_2 and z_5: log p(x|z_l) with the priors' means, less the
    integral over the levels below. The estimate of that is first held against the exact one."""
    line = LinearGaussian((2, 1, 0)).double()
    exact_posterior(line)
    x, z = torch.randn(2, 60, 1, dtype=torch.float64)
    weights = [layer.weight.item() for layer in line.down]
    spread = line.NOISE * (1 + weights[0] ** 2 + (weights[0] * weights[1]) ** 2) ** 0.5
    exact = Normal(math.prod(weights) * z, spread).log_prob(x).squeeze(1)
    off = annealed(line, x, z, 2, chains=64) - exact
    assert abs(off.mean()) < 0.1 and off.abs().max() < 0.5
    d, found = data.load("fashionmnist", real("fashionmnist")), {}
    for arch in ARCHS:
        model, _ = evaluate.load_run(HERE / f"weights/fashionmnist-{arch}-rl.pt")
        x = data.to_input(d.test[:12])
        with parametrize.cached():
            z = [v.detach() for v in model.infer(x).latents]
            for level in (1, 4):
                means = model.generate([None] * level + [z[level]]).log_prob(x).detach()
                found[arch, level + 1] = (means - annealed(model, x, z[level], level)).mean().item()
    assert -2.5 < found["lvae", 2] < 0 and -12 < found["lvae", 5] < -3
    assert 3 < found["hvae", 2] < 14 and 5 < found["hvae", 5] < 16


def test_the_hub_leaves_modules_of_ones_own_alone(tmp_path):
    own = "import models; assert models.own"
    (tmp_path / "models.py").write_text("own = True")
    load = f"import torch; net = torch.hub.load({str(HERE)!r}, 'digits_lvae_rl', source='local')"
    for code in (f"{own}; {load}; {own}", f"{load}; {load}; {own}; net.sample(2)"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_of_a_page_lead_somewhere(page):
    """Files are there, and anchors are headings, spelled as GitHub does, or named by hand."""
    links = re.findall(r"\]\((?!https:)([^)]*)\)", (HERE / page).read_text())
    assert len(links) > 5
    for link in links:
        name, _, anchor = link.partition("#")
        target = (HERE / page).parent / name if name else HERE / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs or f'<a name="{anchor}">' in target.read_text(), link


# --------------------------------------------------------------------------------------------------
# figures.py


def row_of(d: data.Data, arch: str = "hvae", latents: str = "6,4", **changes) -> figures.Row:
    """A row of an untrained model."""
    model = baselines.build(models.configure(arch, latents=latents, channels=4))
    row = figures.Row("a-row", "digits", "HVAE", model.levels, [], model)
    return row._replace(images=d.test, labels=d.test_labels, classes=d.classes, **changes)


SECONDS = (30.0, 61.0, 90.0)  # until the end of each epoch


def made_up(label: str, seed: int, levels: int, probe: float) -> tables.Run:
    """A run of which there is no folder, numbers made up."""
    config = settings.defaults({"rl": True, "dataset": "fashionmnist", "seed": seed})
    evaluation = {"probe": {f"z{levels}": probe}, "kl": [1.0] * levels, "bpd": 0.4, "elbo": -240.0}
    lines = [{"epoch": i + 1, "seconds": s, "kl": [0.5] * levels} for i, s in enumerate(SECONDS)]
    lines[0]["test"] = {"probe": probe - 1, "elbo": -250.0}
    return tables.Run(f"{label}-{seed}", seed, config, evaluation, lines)


def rows_of(*runs: tables.Run) -> list[figures.Row]:
    groups = tables.groups(runs).items()
    return [figures.load(row, name, torch.device("cpu"), None) for name, row in groups]


def test_units_found_again():
    """Whatever the order and scale of the units; collapsed levels have none to be found."""
    z, other = torch.randn(2, 5000, 4, dtype=torch.float64)
    b = [other, -3 * z[:, [2, 0, 3, 1]] + 1, torch.zeros(5000, 2)]
    values = figures.matches([z, 0.01 * z, torch.cat([z[:, :1], 1e-3 * z], dim=1)], b)
    assert values[0, 1] == pytest.approx(1) and values[0, 0] < 0.05
    assert np.isnan(values[1]).all() and np.isnan(values[:, 2]).all()
    assert values[2, 1] == pytest.approx(1)  # of the units that are active
    one, two = ((t - t.mean(0)) / t.std(0, correction=0) for t in (z, other))
    assert values[0, 0] == pytest.approx((one.T @ two / 5000).abs().amax(1).mean().item())


def test_images_are_of_all_classes_whatever_their_order(few):
    labels = torch.arange(10).repeat_interleave(7)
    for order in (torch.arange(70), torch.randperm(70)):
        row = row_of(few)._replace(labels=labels[order])
        assert labels[order][figures.spread(row, 10)].tolist() == list(range(10))
        assert labels[order][figures.spread(row, 5)].tolist() == [1, 3, 5, 7, 9]
        assert sorted(figures.spread(row, 99).tolist()) == list(range(70))


def test_rows_of_figure_1_are_the_levels_from_the_pixels_up(few):
    row = row_of(few, "lvae", "6,5,4")
    axes = figures.fig1_skip_paths([row]).axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == ["input", "$z_{1}$", "$z_{2}$", "$z_{3}$"]
    images = data.to_unit(few.test[figures.spread(row, 20)])
    z = row.model.infer(images, sample=False).latents
    alone = ([None] * level + [v] for level, v in enumerate(z))
    expected = [images, *(row.model.generate(path).mean.detach() for path in alone)]
    drawn = np.asarray(axes.images[0].get_array())
    for level, column in itertools.product(range(4), (0, 7, 19)):
        top, left = level * 29 + 1, column * 29 + 1
        part = drawn[top : top + 28, left : left + 28, 0]
        assert part == pytest.approx(expected[level][column, 0].numpy(), abs=1e-6)


def test_figure_2_takes_the_images_of_the_row_named_first(few):
    rows = [row_of(few, dataset=dataset) for dataset in ("mnist", "fashionmnist")]
    rows[1] = rows[1]._replace(images=few.test[30:])
    for a, b in (rows, rows[::-1]):
        axes = figures.fig2_correlation([a, b]).axes[0]
        assert axes.get_ylabel() == f"a-row trained on {a.dataset}"
        drawn = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
        levels = (evaluate.representations(row.model, a.images) for row in (a, b))
        assert drawn == pytest.approx(figures.matches(*levels), nan_ok=True)
    for other in (rows[1]._replace(method="HVAE+RL"), rows[1]._replace(dataset="mnist")):
        with pytest.raises(figures.Missing, match="two data sets"):
            figures.fig2_correlation([rows[0], other])


def test_traversal_is_spaced_by_the_quantiles_of_the_prior_around_its_anchor(few, monkeypatch):
    row = row_of(few)
    seen, generate = [], row.model.generate
    monkeypatch.setattr(row.model, "generate", lambda z: seen.append(z) or generate(z))
    figure = figures.fig5_latents([row])
    below, z = seen[-1]
    assert below is None and z.shape == (81, 4)
    means = evaluate.representations(row.model, few.test)[-1]
    first, second, *others = means.var(dim=0).argsort(descending=True).tolist()
    moved = (z - means[0]).view(9, 9, 4)  # rows from the top, columns
    quantiles = [NormalDist().inv_cdf(p) for p in np.linspace(0.05, 0.95, 9)]
    for i in range(9):
        assert moved[i, :, first].numpy() == pytest.approx(quantiles, abs=1e-4)
        assert moved[:, i, second].numpy() == pytest.approx(quantiles[::-1], abs=1e-4)
    assert moved[:, :, others].abs().max() < 1e-5
    (frame,) = figure.axes[1].patches  # around the middle picture, 28 pixels after 4 of 29
    assert frame.get_xy() == (116, 116) and frame.get_width() == 29


def test_every_class_has_its_colour_and_name(few):
    """A name looks as it does without mathtext; the legend leaves none out."""
    names = (" _a", "$5", "$x^2$", "a\\$b", "^{c}", "%d", *map(str, range(24)))
    shown = tuple(figures.literal(name.strip()) for name in names)
    for name, text in zip(names, shown, strict=True):
        outline, _ = text_to_path.get_text_path(FontProperties(), name, ismath=False)
        assert np.array_equal(TextPath((0, 0), text, size=100).vertices, outline)
    for classes in (10, 30):
        row = row_of(few)._replace(labels=torch.arange(60) % classes, classes=shown[:classes])
        figure = figures.fig5_latents([row])
        points = figure.axes[0].collections
        assert sum(len(p.get_offsets()) for p in points) == 60
        assert len({to_hex(p.get_facecolor()[0]) for p in points}) == classes
        assert [len(legend.get_texts()) for legend in figure.legends] == [10] * (classes == 10)
    figures.fig5_latents([row._replace(images=few.test[:2], labels=row.labels[:2])])
    with pytest.raises(figures.Missing, match="two test images"):
        figures.fig5_latents([row._replace(images=few.test[:1])])


def test_figure_7_draws_negative_terms_where_they_are():
    seeds = enumerate(([2.0, -2.0, 1.0], [1.0, 0.0, 1e-9]))
    runs = (made_up("a", s, 3, 0.0)._replace(evaluation={"kl": kl}) for s, kl in seeds)
    axes = figures.fig7_kl(rows_of(*runs)).axes[0]
    (bars,) = axes.containers
    ends = np.concatenate(bars.lines[2][0].get_segments())[:, 1]
    spread = np.sqrt([0.5, 0.5, 2.0, 2.0, 0.5, 0.5]) * np.tile([-1, 1], 3)
    assert ends == pytest.approx(np.repeat([1.5, -1.0, 0.5], 2) + spread)
    assert axes.get_ylim()[0] < -1 - 2**0.5


def test_figure_6_has_the_seeds_and_the_paper():
    numbers = (("a", 0, 3, 70.0), ("b", 0, 5, 60.0), ("b", 1, 5, 62.0))
    axes = figures.fig6_depth(rows_of(*(made_up(*n) for n in numbers))).axes[0]
    (container,) = axes.containers
    assert container.get_label() == "LVAE + RL"
    assert container.lines[0].get_xydata().tolist() == [[3, 70], [5, 61]]
    bars = container.lines[2][0].get_segments()[1]
    assert bars[:, 1] == pytest.approx([61 - math.sqrt(2), 61 + math.sqrt(2)])
    paper = next(line for line in axes.lines if line.get_label() == "LVAE + RL, paper")
    points = paper.get_xydata()[~np.isnan(paper.get_ydata())]
    assert points[0].tolist() == [3, 78.77] and len(points) == 8


def test_curves():
    """Minutes above, epochs below; of several seeds the epochs that all have."""
    run = made_up("a", 0, 3, 70.0)
    figure = figures.curves(rows_of(run))
    minutes, epochs = [s / 60 for s in SECONDS], [1, 2, 3]
    x = [axes.lines[0].get_xdata().tolist() for axes in figure.axes]
    assert x == [minutes, minutes[::2], minutes[::2], epochs, epochs[::2], epochs[::2]]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [69, 70]  # at the end the evaluation
    line = run.metrics[0] | {"seconds": 60, "kl": [0.7]}
    other = run._replace(seed=1, name="a-1", metrics=[line])
    axes = figures.curves(rows_of(run, other)).axes[0]
    (mean,), (band,) = axes.lines, axes.collections
    assert mean.get_xydata().ravel() == pytest.approx([0.75, 0.6])
    within, std = band.get_paths()[0].get_extents(), math.sqrt(2 * 0.1**2)
    assert [within.y0, within.y1] == pytest.approx([0.6 - std, 0.6 + std])


def test_figures_of_numbers_need_no_checkpoint_and_no_data(tmp_path, capsys, monkeypatch):
    path, out = str(tmp_path / "runs.jsonl"), tmp_path / "made"
    tables.pack([made_up("fashionmnist-l3", 0, 3, 70.0), made_up("l5", 0, 5, 61.0)], Path(path))
    figures.main([path, "--out", str(out)])
    said = capsys.readouterr().out
    names = {p.name.removesuffix("-fashionmnist.png") for p in out.iterdir()}
    assert names == {"fig6-depth", "fig7-kl", "curves"}
    assert said.count("not made") == 4 and "needs a run folder with its checkpoint" in said
    fails(capsys, [path, "--out", "x", "--rows", "no"], "no row is named no", figures.main)
    monkeypatch.setattr(figures, "training_curve", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug in one figure is told after the others
        figures.main([path, "--out", str(out)])
    assert capsys.readouterr().out.count("not made") == 5


def test_every_figure_is_made(few, tmp_path, capsys):
    usual = [*TINY, "--arch", "hvae", "--dataset", "fashionmnist", "--epochs", "1"]
    runs = {
        "hvae-3": [],
        "hvae-4": ["--seed", "4"],
        "rl-3": ["--rl"],
        "deep-3": ["--rl", "--latents", "4,3,2"],
        "biva-3": ["--arch", "biva"],
        "aae-3": ["--arch", "aae", "--latents", "4"],
        "mnist-3": ["--rl", "--dataset", "mnist"],
    }
    folders = [str(tmp_path / name) for name in runs]
    for folder, flags in zip(folders, runs.values(), strict=True):
        train.main([*usual, *flags, "--out", folder])
    figures.main([*folders, "--out", str(tmp_path / "figures")])
    said = capsys.readouterr().out.splitlines()
    names = ["fig1-skip-paths", "fig5-latents", "fig6-depth", "fig7-kl", "curves", "samples"]
    expected = {f"{name}-{d}.png" for name in names for d in ("fashionmnist", "mnist")}
    expected ^= {"fig2-correlation.png", "fig6-depth-mnist.png"}
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


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("skip", ("mean", "sample"))
def test_the_literal_algorithm_makes_the_stepwise_updates(monkeypatch, arch, skip):
    """In float64, where all noise has one value, whatever the path."""
    build = baselines.build
    monkeypatch.setattr(baselines, "build", lambda config: build(config).double())
    monkeypatch.setattr(Normal, "rsample", lambda self, shape=(): self.loc + 0.7 * self.scale)
    start = run_of("--arch", arch, "--latents", "4,3,2", "--gamma", "0.8", "--skip", skip)
    ways = bench.ways(start.config, start.device)
    x = (torch.rand(2, 20, 1, 28, 28) < 0.3).double()
    for name in ("literal", "stepwise"):
        run, update = ways[name]
        (group,) = run.optimizer.param_groups
        group["eps"] = 1.0  # steps by the gradients' size, not by rounding errors
        for batch in x:
            update(run, batch)
    literal, stepwise = (ways[name][0].model.state_dict() for name in ("literal", "stepwise"))
    torch.testing.assert_close(literal, stepwise, rtol=1e-9, atol=1e-9)
    moved = [(literal[k] - v).abs().max() for k, v in start.model.state_dict().items()]
    assert max(moved) > 1e-4 and torch.channels_last == models.LAYOUT


def test_bench(few, monkeypatch, capsys):
    for name, value in (("WARM_UP", 1), ("ROUNDS", 3), ("SECONDS", 0)):
        monkeypatch.setattr(bench, name, value)
    names = ["literal", "stepwise", "joint", "sampled", "elbo"]
    for size in (16, 32):
        bench.main(["--json", *TINY, "--batch-size", str(size)])
        result = json.loads(capsys.readouterr().out)
        ways = result["ways"]
        assert list(ways) == names and result["rounds"] == 3
        assert (result["levels"], result["batch_size"], result["dtype"]) == (2, size, "float32")
        for name, way in ways.items():
            ms, steps = way["ms_per_batch"], 2 if name in ("literal", "stepwise") else 1
            assert way["images_per_s"] == pytest.approx(1e3 * size / ms)
            assert way["updates_per_s"] == pytest.approx(1e3 * steps / ms)
            assert way["times_first"] == pytest.approx(ways["literal"]["ms_per_batch"] / ms)
            assert way["ms_quartiles"][0] <= ms <= way["ms_quartiles"][1]
    biva, aae = ["--arch", "biva"], ["--arch", "aae", "--latents", "4"]
    for flags, shown in ((biva, ["elbo"]), (aae, ["aae"]), (["--ivae"], [*names, "ivae"])):
        bench.main([*TINY, "--batch-size", "16", *flags])
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]] == shown
    fails(capsys, ["--batch-size", "301"], "--batch-size 301: there are 300 images$", bench.main)


# --------------------------------------------------------------------------------------------------
# The house and its pages

HOUSE = ("likelihoods", "mine", "probe", "rewards", "models", "baselines", "files", "devices",
         "data", "evaluate", "settings", "train", "tables", "figures", "bench")  # fmt: skip
NEEDS = {"likelihoods": {"torch"}, "mine": {"torch"}, "rewards": {"torch"}, "tables": {"files"}}
NEEDS["probe"] = {"joblib", "numpy", "sklearn"}


def test_imports_point_down():
    """A file imports from files below it, at its top; some need torch or nothing. What one function
    alone needs of other packages may be imported in it, so that --help does not wait for it."""
    for position, name in enumerate(HOUSE):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        names = {dotted.partition(".")[0] for dotted in names}
        inside = {n.module for n in nodes if n not in tree.body and isinstance(n, ast.ImportFrom)}
        assert not inside & set(HOUSE), f"{name} imports {inside} inside a function"
        assert not names & set(HOUSE[position:]), f"{name} imports {names & set(HOUSE[position:])}"
        assert name not in NEEDS or names <= sys.stdlib_module_names | NEEDS[name]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE / page).read_text(), re.DOTALL)


def test_python_blocks_of_the_readme(few, tmp_path, monkeypatch):
    """Each runs as it stands: those of a piece in a folder that holds this piece alone. The model
    of one's own has learned: its Q-value is above that of a new one."""
    load_run, own, q_value, mine_block, likelihood, probe_block = blocks("README.md", "python")
    learned = f"trained, model = q.mean(), TwoLevels()\n{q_value}assert trained > q.mean() + 5"
    pieces = {"rewards": own + q_value + learned, "mine": mine_block, "likelihoods": likelihood}
    seeded = "import torch\ntorch.manual_seed(0)\n"
    pieces["mine"] = f"{seeded}{mine_block}assert 0.8 < estimate.nats < 1.04"
    pieces["probe"] = f"{probe_block}assert accuracy > 80"
    for name, code in pieces.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(HERE / f"{name}.py", folder)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(HERE / "weights")
    PIL.Image.new("RGB", (40, 30), "orange").save("yours.png")
    names: dict = {}
    exec(load_run, names)
    assert names["z"][-1].shape == (1, 8)


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
    groups = tables.groups(tables.read([HERE / "results/fashionmnist.jsonl"]))
    rows = (
        "fashionmnist-hvae",
        "fashionmnist-hvae-rl",
        "fashionmnist-lvae",
        "fashionmnist-lvae-rl",
    )
    for row, line in zip(rows, lines[2:6], strict=True):
        values = [tables.measures(run) for run in groups[row]]
        label, probe, kl, beside = cells(line)
        assert label == f"{groups[row][0].words} ({len(values)} seeds)"
        assert probe == tables.cell([v["probe"] for v in values], 1)
        assert kl == f"{np.mean([v['kl'] for v in values]):.1f}"
        paper = tables.reported(groups[row][0])["probe"].partition("±")[0]
        assert beside == f"{float(paper):.1f}"


def test_other_tables_of_the_readme():
    """How often the sum of Q-values counts each term, from its gradients; the row of CIFAR-10."""
    page = (HERE / "README.md").read_text()
    for t, (decoding, kl) in enumerate(zip(*counts(0.9), strict=True)):
        assert f"| {t + 1} | z_{t + 1} | z_{5 - t} | {decoding:.2f} | {kl:.2f} |\n" in page
    groups = tables.groups(tables.read([HERE / "results/cifar10.jsonl"]))
    rows = [groups[f"cifar10-{method}"] for method in ("hvae-rl", "lvae-rl", "vae")]
    paper = [float(tables.reported(row[0])["probe"].partition("±")[0]) for row in rows]
    ours = [np.mean([tables.measures(run)["probe"] for run in row]) for row in rows]
    theirs = "{:.1f} % (HVAE) and {:.1f} (LVAE), a VAE {:.1f}".format(*paper)
    old = "†" * ("kl" in rows[0][0].config)
    assert f"{theirs} | [{ours[0]:.1f}{old} and {ours[1]:.1f}; a VAE {ours[2]:.1f}](" in page


def test_paper_to_code():
    """Every function that the table names exists, and names one of the equations beside it; each
    equation, figure and section is named by one of the functions."""
    table = (HERE / "README.md").read_text().partition("## Paper → code")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if "`" in line]
    assert equations(table) >= {1, 2, 5, 6, 7, 9, *range(20, 25), 26, 28, 39}
    for paper, code in rows:
        names = [name.split(".") for name in re.findall(r"`(\w+\.\w+)`", code)]
        sources = [inspect.getsource(getattr(sys.modules[a], b)) for a, b in names if b != "py"]
        wanted = equations(paper)
        assert not wanted or all(equations(source) & wanted for source in sources), paper
        assert wanted <= set().union(*map(equations, sources)), paper
        for words in ("Algorithm 1", "App. C.2"):
            assert words not in paper or words in sources[0], paper
        if "Figure" in paper:
            for number, source in zip(re.findall(r"\d", paper), sources, strict=True):
                assert f"Figure {number}" in source


def commands(page: str) -> list[list[str]]:
    """The words of every python command of a page that stands alone in a line or in backticks."""
    text = (HERE / page).read_text().replace(" && ", "\n")
    text = text.replace("$arch", "hvae").replace("$objective", "--rl").replace("$n", "8")
    lines = re.findall(r"^ *python (\w+\.py .*)$", text, re.MULTILINE)
    lines += re.findall(r"`python (\w+\.py [^`]*)`", text)
    return [shlex.split(line) for line in lines if "…" not in line and "RUN" not in line]


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_commands_of_a_page(page, few, tmp_path, monkeypatch):
    """Each command is understood; those that train make a run, here a short one."""
    monkeypatch.chdir(HERE)
    assert len(commands(page)) > 8
    for i, (script, *argv) in enumerate(commands(page)):
        name = script.removesuffix(".py")
        if name == "train":
            given = vars(settings.parser().parse_args(argv))
            settings.check(settings.defaults(given))
            if given.get("dataset") != "folder" and page == "README.md":
                short = ["--epochs", "1", "--probe", "top", "--out", str(tmp_path / str(i))]
                train.main([*argv, *short])
        elif argv[0].startswith("results/"):
            out = ["--out", str(tmp_path)] if name == "figures" else []
            {"tables": tables.main, "figures": figures.main}[name]([*argv, *out])
        else:
            assert name in ("evaluate", "tables", "figures", "bench")


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
    "aae-alone": AAE,  # without its adversary
}
CLAIM_SCRIPT = """
import resource, sys, train
from functools import partial
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # a test may have it low just now
if sys.argv[-1].endswith("alone"):
    train.baselines.aae_loss = partial(train.baselines.aae_loss, weight=0.0)
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="session", autouse=True)
def training(request, tmp_path_factory) -> Iterator[tuple[Callable, dict[str, Future]]]:
    """The runs on the digits, trained one after another from the beginning of the session, in
    processes of a thread each, beside the other tests; none where no test waits for them."""
    waited_for = any("trained" in item.fixturenames for item in request.session.items)
    root = tmp_path_factory.mktemp("claims")
    alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(name: str) -> Path:
        argv = [*CLAIM_RUNS[name], "--out", str(root / name)]
        command = [sys.executable, "-c", CLAIM_SCRIPT, *argv]
        done = subprocess.run(command, cwd=HERE, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return root

    pool = ThreadPoolExecutor(1)
    yield run, {name: pool.submit(run, name) for name in CLAIM_RUNS if waited_for}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def trained(training) -> Path:
    """The folder of the runs, once all have ended; those still to begin are trained here."""
    run, runs = training
    for name, waiting in reversed(runs.items()):
        folder = run(name) if waiting.cancel() else waiting.result()
    return folder


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
    log_px = evaluation_of(trained / "aae")["log_px_given_z"][0]
    assert log_px > -320  # and the images are decoded: -543, 784 ln 2, is a coin's guess
    assert moments("aae-alone")[0] > 3 * nats


def test_rl_keeps_the_top_level_informative_where_the_elbo_lets_it_collapse(trained):
    """All objectives with the same warm-up. IVAE (tried top-down) keeps the top level informative
    too, but its lower levels alike."""
    for arch in ARCHS:
        rl, elbo = (evaluation_of(trained / f"{arch}-{name}") for name in ("rl", "elbo"))
        assert rl["kl"][-1] > 1 and min(rl["kl"]) > 0.5 and rl["active_units"][-1] >= 2
        assert elbo["kl"][-1] < 0.1 and elbo["active_units"][-1] == 0
        assert rl["probe"]["z5"] > elbo["probe"]["z5"] + 15
    ivae = evaluation_of(trained / "lvae-ivae")  # beside the LVAE by the ELBO, the last of these
    assert ivae["kl"][-1] > 1 and ivae["active_units"][-1] >= 4
    spread = [np.ptp(run["log_px_given_z"][:3]) for run in (ivae, elbo)]
    assert spread[0] < spread[1] - 3
