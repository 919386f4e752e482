"""The ELBO, the skip-generative reward with its Q-value, and the losses that ascend them.

    An, Li, et al.: Improving Unsupervised Hierarchical Representation with Reinforcement Learning,
    CVPR 2024. Equation numbers are the paper's.

A model is anything with the five names of `Model`. Code counts levels and steps from 0, formulas
from 1: z_1 is level 0. Levels are listed bottom to top, steps as they are made: step t infers level
order[t]. Values are in nats, one an image. Q-values are to be maximised, losses to be minimised.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence


class Inference(NamedTuple):
    """One pass of the encoder; lists go bottom to top."""

    posteriors: list[Distribution]  # of z_l, given x and the samples that it is conditioned on
    priors: list[Distribution]  # p(z_l | sample above); that of the top may have batch size 1
    latents: list[Tensor]  # reparameterised samples of z_l, (B, ...)
    pixels: Distribution | None = None  # p(x | all latents) where it is not Markov: ELBO alone


class Model(Protocol):
    """A Markov hierarchy p(x|z_1) p(z_1|z_2) ... p(z_L) and its inference, level by level.

    All distributions have one batch dimension: log_prob and KL are one number an image. The decoder
    gets z alone, no features that pass a level by, and no image sees another (no batch norm).
    """

    levels: int  # L, which is also T, the number of steps
    order: Sequence[int]  # the levels as inferred: (0, ..., L-1) bottom-up, (L-1, ..., 0) top-down

    def infer(self, x: Tensor) -> Inference:
        """Posteriors, priors and samples of all levels from images x (B, ...)."""

    def prior(self, level: int, z: Tensor) -> Distribution:
        """p(z_level | z_{level+1} = z), of level 0 p(z_1 | z_2 = z)."""

    def decode(self, z: Tensor) -> Distribution:
        """p(x | z_1 = z), z of level 0."""


class Loss(NamedTuple):
    value: Tensor  # scalar, to be minimised
    kl: Tensor  # (L,) mean over the batch of each level's KL, bottom to top, unweighted, detached


# --------------------------------------------------------------------------------------------------
# The terms


def one_an_image(values: Tensor, images: int) -> Tensor:
    """The values, (images,). ValueError for another shape."""
    if values.shape != (images,):
        raise ValueError(
            f"a KL or log-likelihood of shape {tuple(values.shape)} for {images} images: it must "
            "be one number an image, as of torch.distributions.Independent"
        )
    return values


def kl_terms(inference: Inference, order: Sequence[int]) -> Tensor:
    """(L, B), bottom to top: what each level adds to the KL of all latents (Eq. 4 to 6).

    Where the level above is inferred first, the closed form of posterior and prior. Where it is
    inferred later, its sample is drawn given this level's own, which the closed form overlooks:
    then log q - log p of the samples. This may be negative; the mean of all levels' sum is a KL.
    """
    inferred = zip(inference.posteriors, inference.priors, inference.latents, strict=True)
    step = {level: t for t, level in enumerate(order)}
    terms = []
    for level, (q, p, z) in enumerate(inferred):
        above_is_later = step.get(level + 1, -1) > step[level]
        kl = q.log_prob(z) - p.log_prob(z) if above_is_later else kl_divergence(q, p)
        terms.append(one_an_image(kl, len(z)))
    return torch.stack(terms)


def log_ratios(inference: Inference) -> Tensor:
    """(L, B): log q(z_l) - log p(z_l) of the samples."""
    inferred = zip(inference.posteriors, inference.priors, inference.latents, strict=True)
    return torch.stack(
        [one_an_image(q.log_prob(z) - p.log_prob(z), len(z)) for q, p, z in inferred]
    )


def weigh_kl(kl: Tensor, beta: float = 1.0, free_bits: float = 0.0) -> Tensor:
    """beta KL as the objective counts it, (L, B).

    Free bits are nats a level (Kingma et al. 2016). While a level's mean over the batch is below,
    it counts as that constant and has no gradient.
    """
    if free_bits > 0:
        mean = kl.detach().mean(dim=1, keepdim=True)
        kl = torch.where(mean < free_bits, free_bits, kl)
    return beta * kl


def reconstruction(model: Model, x: Tensor, inference: Inference) -> Tensor:
    """(B,): log p(x|z) given all latents inferred. Given z_1 nothing above it reaches x."""
    pixels = getattr(inference, "pixels", None) or model.decode(inference.latents[0])
    return one_an_image(pixels.log_prob(x), len(x))


def through(prior: Distribution, skip: str) -> Tensor:
    """What a skip path takes from a prior on its way down: the mean, or one sample."""
    if skip not in ("mean", "sample"):
        raise ValueError(f"unknown skip {skip!r}: choose mean or sample")
    return prior.mean if skip == "mean" else prior.rsample()


def skip_paths(
    model: Model, x: Tensor, inference: Inference, parts: Sequence[slice | None], skip="mean"
) -> list[Tensor]:
    """log p(x|z^t) down the skip path of step t's posterior sample: Eq. 24's first term.

    Step t decodes the images `parts[t]` of the batch: `slice(None)` all, None none. Returns, in the
    order of steps, a tensor for each that decodes some, with one value an image. Below z^t a path
    takes the means of the priors (`skip="mean"`) or a sample of each ("sample").

    All paths go down in one batch, the lowest level's first. A path enters the level below its own
    by the prior that `infer` has computed for the KL already.
    """
    paths = {level: part for level, part in zip(model.order, parts, strict=True) if part}
    z: list[Tensor] = []  # values of z_level on the paths that pass it, the lowest path's first
    for level in reversed(range(model.levels)):
        if z:
            z = [through(model.prior(level, torch.cat(z)), skip)]
        if level + 1 in paths:
            z.insert(0, through(inference.priors[level], skip)[paths[level + 1]])
    if 0 in paths:
        z.insert(0, inference.latents[0][paths[0]])
    targets = [x[paths[level]] for level in sorted(paths)]
    log_px = model.decode(torch.cat(z)).log_prob(torch.cat(targets))
    values = one_an_image(log_px, sum(map(len, targets))).split([*map(len, targets)])
    of_level = dict(zip(sorted(paths), values, strict=True))
    return [of_level[level] for level in model.order if level in paths]


def kl_paid(kl: Tensor, order: Sequence[int], pay: str = "inferred") -> Tensor:
    """(T, B): what each step pays of the KL (L, B), Eq. 24's second term. That is the KL of all
    levels inferred until then, or with `pay="own"` that of its own level alone."""
    if pay not in ("inferred", "own"):
        raise ValueError(f"unknown pay {pay!r}: choose inferred or own")
    kl = torch.stack([kl[level] for level in order])
    return kl.cumsum(dim=0) if pay == "inferred" else kl


def rewards(
    model: Model, x: Tensor, inference: Inference, kl: Tensor, first=0, skip="mean", pay="inferred"
) -> Tensor:
    """r_t = log p(x|z^t) - sum_{s<=t} KL_s (Eq. 24), (T, B), from the (weighted) `kl` (L, B).

    With `first`, (T - first, B): steps before it are not decoded.
    """
    parts = [slice(None) if t >= first else None for t in range(model.levels)]
    log_px = torch.stack(skip_paths(model, x, inference, parts, skip))
    return log_px - kl_paid(kl, model.order, pay)[first:]  # Eq. 24


def q_values(r: Tensor, gamma: float) -> Tensor:
    """Q_t = r_t + gamma Q_{t+1} (Eq. 26), (T, B), from the rewards r (T, B)."""
    q = [r[-1]]
    for reward in r[:-1].flip(0):
        q.append(reward + gamma * q[-1])  # Eq. 26
    return torch.stack(q[::-1])


def path_weights(steps: int, gamma: float) -> list[float]:
    """w_t with sum_t Q_t = sum_t w_t r_t (Eq. 28): w_t = sum_{s<=t} gamma^(t-s)."""
    return [sum(gamma**k for k in range(t + 1)) for t in range(steps)]


# --------------------------------------------------------------------------------------------------
# Losses of a batch x (B, ...)


def elbo_loss(model: Model, x: Tensor, beta: float = 1.0, free_bits: float = 0.0) -> Loss:
    """Minus the evidence lower bound (Eq. 5 and 6), with one sample."""
    inference = model.infer(x)
    kl = kl_terms(inference, model.order)
    value = reconstruction(model, x, inference) - weigh_kl(kl, beta, free_bits).sum(dim=0)
    return Loss(-value.mean(), kl.detach().mean(dim=1))


def stepwise_loss(
    model: Model,
    x: Tensor,
    step: int,
    gamma: float,
    skip: str = "mean",
    pay: str = "inferred",
    beta: float = 1.0,
    free_bits: float = 0.0,
) -> Loss:
    """-Q_step, step from 0 (Eq. 9): one of the T updates that Algorithm 1 makes with a batch, each
    inferring afresh. The gradient also goes through the states before the step."""
    inference = model.infer(x)  # Eq. 20 to 23
    kl = kl_terms(inference, model.order)
    r = rewards(model, x, inference, weigh_kl(kl, beta, free_bits), step, skip, pay)
    return Loss(-q_values(r, gamma)[0].mean(), kl.detach().mean(dim=1))


def joint_loss(
    model: Model, x: Tensor, gamma: float, skip="mean", pay="inferred", beta=1.0, free_bits=0.0
) -> Loss:
    """-sum_t Q_t (Eq. 28), all steps in one update. About sum_t w_t times as large as an ELBO."""
    inference = model.infer(x)
    kl = kl_terms(inference, model.order)
    r = rewards(model, x, inference, weigh_kl(kl, beta, free_bits), skip=skip, pay=pay)
    return Loss(-q_values(r, gamma).sum(dim=0).mean(), kl.detach().mean(dim=1))


def sampled_loss(
    model: Model, x: Tensor, gamma: float, skip="mean", pay="inferred", beta=1.0, free_bits=0.0
) -> Loss:
    """An unbiased estimate of `joint_loss` at about the price of the ELBO: one path an image.

    An image's place in the batch decides its path, see `share_images`: shuffle every batch.
    """
    inference = model.infer(x)
    kl = kl_terms(inference, model.order)
    # Eq. 28 is sum_t w_t r_t. What r_t pays is known of every image; what it decodes is estimated
    # from the images on its path.
    weights = path_weights(model.levels, gamma)
    paid = kl_paid(weigh_kl(kl, beta, free_bits), model.order, pay)
    log_px = skip_paths(model, x, inference, share_images(len(x), weights), skip)
    cost = sum(w * kl_t for w, kl_t in zip(weights, paid, strict=True)).mean()
    return Loss(cost - weighted_mean(log_px, weights, len(x)), kl.detach().mean(dim=1))


def share_images(images: int, weights: Sequence[float]) -> list[slice]:
    """Which of a batch's images each step decodes, one path an image: in proportion to the weights,
    at least one image a step. The last step has the first images. Where there are fewer images than
    steps, each step decodes them all.

    In a shuffled batch each image has the same chance of each path: then `weighted_mean` is without
    bias. Shares are rounded by the largest remainder, ties to later steps. All shapes are fixed.
    """
    if images < len(weights):
        return [slice(None)] * len(weights)
    spare, total = images - len(weights), sum(weights)
    wanted = [max(0.0, images * w / total - 1) for w in weights]
    shares = [spare * w / sum(wanted) if spare else 0.0 for w in wanted]
    counts = [1 + math.floor(share) for share in shares]
    last_first = reversed(range(len(shares)))
    by_remainder = sorted(last_first, key=lambda t: math.floor(shares[t]) - shares[t])
    for t in by_remainder[: images - sum(counts)]:
        counts[t] += 1
    ends = itertools.accumulate(counts)
    return [slice(images - end, images - end + n) for end, n in zip(ends, counts, strict=True)]


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float], images: int) -> Tensor:
    """sum_t w_t E[v_t] over a batch, from the values (n_t,) of the images on each path."""
    pairs = reversed([*zip(values, weights, strict=True)])
    return sum(w * images / len(v) * v.sum() for v, w in pairs) / images


def ivae_loss(model: Model, x: Tensor, skip="mean", sampled=False, beta=1.0, free_bits=0.0) -> Loss:
    """Informative hierarchical VAE (Li et al. 2022), Eq. 39: the ELBO whose reconstruction is the
    mean of log p(x|z_l) over the skip paths of all levels.

    `sampled` estimates that mean as `sampled_loss` does, by one path an image.
    """
    inference = model.infer(x)
    kl = kl_terms(inference, model.order)
    cost = weigh_kl(kl, beta, free_bits).sum(dim=0).mean()
    even = [1 / model.levels] * model.levels
    parts = share_images(len(x), even) if sampled else [slice(None)] * model.levels
    log_px = skip_paths(model, x, inference, parts, skip)
    return Loss(cost - weighted_mean(log_px, even, len(x)), kl.detach().mean(dim=1))


# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def importance_weighted_bound(model: Model, x: Tensor, samples: int) -> Tensor:
    """(B,): log (1/K) sum_k p(x, z^k) / q(z^k|x), K = `samples` (Burda et al. 2016), in nats.

    A lower bound of log p(x) that is the ELBO at K = 1 and rises to log p(x) with K.
    """
    log_weights = []
    for done in range(0, samples, 2):  # two a batch
        repeated = x.repeat(min(2, samples - done), *[1] * (x.dim() - 1))
        inference = model.infer(repeated)
        log_w = reconstruction(model, repeated, inference) - log_ratios(inference).sum(dim=0)
        log_weights.append(log_w.view(-1, len(x)))
    return torch.cat(log_weights).logsumexp(dim=0) - math.log(samples)
