"""The ELBO, the skip-generative reward with its Q-value, and the losses that ascend them.

    An, Li, et al.: Improving Unsupervised Hierarchical Representation with Reinforcement Learning,
    CVPR 2024. Equation numbers are the paper's.

A model is anything with four names, which models.py describes: `levels`, `order` (the levels in the
order of inference), `infer(x)` and `decode(starts, skip)`. Levels and steps count from 0; step t
infers level order[t]. Values are per image, in nats, to be maximised; losses are to be minimised.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence


class Loss(NamedTuple):
    value: Tensor  # scalar, to be minimised
    kl: Tensor  # (L,) mean over the batch of each level's KL, bottom to top, unweighted, detached


# --------------------------------------------------------------------------------------------------
# The terms


def level_kl(inference) -> Tensor:
    """(L, B): KL of each level's posterior from its prior given the sample above (Eq. 5 and 6),
    0 where the level has collapsed (Eq. 7).

    Bottom-up, that sample was inferred from the level's own. The closed form does not see how the
    two vary together, so its sum may differ from the mean of `log_ratios` either way.
    """
    pairs = zip(inference.posteriors, inference.priors, strict=True)
    return torch.stack([kl_divergence(posterior, prior) for posterior, prior in pairs])


def log_ratios(inference) -> Tensor:
    """(L, B): log q(z_l) - log p(z_l) of the samples. In the mean over samples their sum is the KL
    of all latents together (Eq. 4), whatever the order of inference."""
    inferred = zip(inference.posteriors, inference.priors, inference.latents, strict=True)
    return torch.stack([q.log_prob(z) - p.log_prob(z) for q, p, z in inferred])


def weigh_kl(kl: Tensor, beta: float = 1.0, free_bits: float = 0.0) -> Tensor:
    """(L, B) KL as the objective counts it: beta max(free_bits, KL).

    Free bits are nats a level (Kingma et al. 2016). While a level's mean over the batch is below,
    it counts as that constant and has no gradient.
    """
    if free_bits > 0:
        mean = kl.detach().mean(dim=1, keepdim=True)
        kl = torch.where(mean < free_bits, free_bits, kl)
    return beta * kl


def reconstruction(model, x: Tensor, inference) -> Tensor:
    """(B,): log p(x|z) given all latents inferred."""
    pixels = inference.pixels
    if pixels is None:  # given z_1 nothing above it reaches x
        pixels = model.decode([inference.latents[0], *[None] * (model.levels - 1)])
    return pixels.log_prob(x)


def through(prior, skip: str) -> Tensor:
    """What a skip path takes from a prior on its way down: the mean, or one sample."""
    if skip not in ("mean", "sample"):
        raise ValueError(f"unknown skip {skip!r}: choose mean or sample")
    return prior.mean if skip == "mean" else prior.rsample()


def skip_paths(
    model, x: Tensor, inference, paths: Sequence[slice | None], skip: str = "mean"
) -> list[Tensor | None]:
    """log p(x|z_l) down the skip path of each level's posterior sample: Eq. 24's first term.

    `paths[l]` are the images whose level l is decoded: `slice(None)` for all, None for none. The
    path takes the means of the priors below it (`skip="mean"`) or a sample of each ("sample").

    All paths go down in one batch. The first step of each is the prior of the level below, which
    `inference` has computed for the KL already.
    """
    starts: list[list[Tensor]] = [[] for _ in range(model.levels)]
    for level, images in enumerate(paths):
        if images is None:
            continue
        if level == 0:
            starts[0].append(inference.latents[0][images])
        else:
            starts[level - 1].append(through(inference.priors[level - 1], skip)[images])
    pixels = model.decode([torch.cat(s) if s else None for s in starts], skip)
    targets = [x[images] for images in paths if images is not None]  # the lowest level's first
    values = iter(pixels.log_prob(torch.cat(targets)).split([len(t) for t in targets]))
    return [None if images is None else next(values) for images in paths]


def rewards(
    model,
    x: Tensor,
    inference,
    kl: Tensor,
    start: int = 0,
    skip: str = "mean",
    pay: str = "inferred",
    paths: Sequence[slice | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Eq. 24, r_t = log p(x|z^t) - sum_{s<=t} KL_s, as its two terms `decoded` and `paid`.

    `decoded` has one tensor a step from `start` on, (B,), or with `paths` (see `skip_paths`) of
    that many images. `paid` is (T - start, B), from the (weighted) `kl` (L, B) of all levels
    inferred until then. With `pay="own"` a step pays the KL of its own level alone.
    """
    if pay not in ("inferred", "own"):
        raise ValueError(f"unknown pay {pay!r}: choose inferred or own")
    steps = model.order[start:]
    if paths is None:
        paths = [slice(None) if level in steps else None for level in range(model.levels)]
    log_px = skip_paths(model, x, inference, paths, skip)
    decoded = [log_px[level] for level in steps]
    paid = torch.stack([kl[level] for level in model.order])
    return decoded, (paid.cumsum(dim=0) if pay == "inferred" else paid)[start:]


def path_weights(steps: int, gamma: float) -> list[float]:
    """w_i with sum_t Q_t = sum_i w_i r_i (Eq. 28): w_i = sum_{t<=i} gamma^(i-t)."""
    return [sum(gamma**k for k in range(i + 1)) for i in range(steps)]


def q_value(r: Sequence[Tensor], gamma: float, summed: bool = False) -> Tensor:
    """(B,): Q_t = sum_{i>=t} gamma^(i-t) r_i (Eq. 26) from the rewards r (T-t, B) of steps t on.

    With `summed`, from the rewards of all steps, sum_t Q_t (Eq. 28).
    """
    weights = path_weights(len(r), gamma) if summed else [gamma**i for i in range(len(r))]
    return sum(w * reward for w, reward in zip(weights, r, strict=True))


# --------------------------------------------------------------------------------------------------
# Losses of a batch x (B, C, H, W)


def elbo_loss(model, x: Tensor, beta: float = 1.0, free_bits: float = 0.0) -> Loss:
    """Minus the evidence lower bound (Eq. 5 and 6), with one sample."""
    inference = model.infer(x)
    kl = level_kl(inference)
    value = reconstruction(model, x, inference) - weigh_kl(kl, beta, free_bits).sum(dim=0)
    return Loss(-value.mean(), kl.detach().mean(dim=1))


def stepwise_loss(
    model, x: Tensor, step: int, gamma: float, skip="mean", pay="inferred", beta=1.0, free_bits=0.0
) -> Loss:
    """-Q_step (Eq. 9): one of the T updates that Algorithm 1 makes with a batch, each inferring
    afresh. The gradient also goes through the states before the step."""
    inference = model.infer(x)  # Eq. 20 to 22
    kl = level_kl(inference)
    decoded, paid = rewards(model, x, inference, weigh_kl(kl, beta, free_bits), step, skip, pay)
    r = torch.stack(decoded) - paid  # Eq. 24
    return Loss(-q_value(r, gamma).mean(), kl.detach().mean(dim=1))  # Eq. 26


def joint_loss(
    model, x: Tensor, gamma: float, skip="mean", pay="inferred", beta=1.0, free_bits=0.0
) -> Loss:
    """-sum_t Q_t, the whole gradient of Eq. 28 in one update."""
    inference = model.infer(x)
    kl = level_kl(inference)
    decoded, paid = rewards(model, x, inference, weigh_kl(kl, beta, free_bits), 0, skip, pay)
    r = torch.stack(decoded) - paid  # Eq. 24
    return Loss(-q_value(r, gamma, summed=True).mean(), kl.detach().mean(dim=1))


def sampled_loss(
    model, x: Tensor, gamma: float, skip="mean", pay="inferred", beta=1.0, free_bits=0.0
) -> Loss:
    """An unbiased estimate of `joint_loss` at about the price of the ELBO: one path an image.

    x has to be in random order, see `share_paths`. A batch of fewer images than levels takes all
    paths.
    """
    if len(x) < model.levels:
        return joint_loss(model, x, gamma, skip, pay, beta, free_bits)
    steps = [model.order.index(level) for level in range(model.levels)]  # that infer z_1 ... z_L
    weights = [path_weights(model.levels, gamma)[t] for t in steps]
    paths = share_paths(len(x), weights)
    inference = model.infer(x)
    kl = level_kl(inference)
    weighted = weigh_kl(kl, beta, free_bits)
    decoded, paid = rewards(model, x, inference, weighted, 0, skip, pay, paths)  # Eq. 24
    # Eq. 28 is linear in both terms: what is paid is known of every image, and what is decoded is
    # estimated from the images on each path.
    log_px = weighted_mean([decoded[t] for t in steps], weights, len(x))
    return Loss(q_value(paid, gamma, summed=True).mean() - log_px, kl.detach().mean(dim=1))


def share_paths(images: int, weights: Sequence[float]) -> list[slice]:
    """Which of a batch's images go down from each level, one path an image: in proportion to the
    weights, at least one image a path. Raises ValueError where there are fewer images than paths.

    The order of the images decides. It has to be random, as in a shuffled batch: then each image
    has the same chance of each path, and `weighted_mean` is without bias. All shapes are fixed.
    """
    if images < len(weights):
        raise ValueError(f"{images} images cannot be shared among {len(weights)} paths")
    spare, total = images - len(weights), sum(weights)
    wanted = [max(0.0, images * w / total - 1) for w in weights]
    shares = [spare * w / sum(wanted) if spare else 0.0 for w in wanted]
    counts = [1 + math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: math.floor(shares[i]) - shares[i])
    for i in by_remainder[: images - sum(counts)]:
        counts[i] += 1
    ends = itertools.accumulate(counts)
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float], images: int) -> Tensor:
    """sum_l w_l E[v_l] over a batch, from the values (n_l,) of the images on each path."""
    pairs = zip(values, weights, strict=True)
    return sum(w * images / len(v) * v.sum() for v, w in pairs) / images


def ivae_loss(model, x: Tensor, skip="mean", sampled=False, beta=1.0, free_bits=0.0) -> Loss:
    """Informative hierarchical VAE (Li et al. 2022), Eq. 39: the ELBO whose reconstruction is the
    mean of log p(x|z_l) over the skip paths of all levels.

    `sampled` estimates that mean as `sampled_loss` does, by one path an image.
    """
    inference = model.infer(x)
    kl = level_kl(inference)
    cost = weigh_kl(kl, beta, free_bits).sum(dim=0).mean()
    if sampled and len(x) >= model.levels:
        even = [1 / model.levels] * model.levels
        decoded = skip_paths(model, x, inference, share_paths(len(x), even), skip)
        log_px = weighted_mean(decoded, even, len(x))
    else:
        log_px = torch.cat(skip_paths(model, x, inference, [slice(None)] * model.levels, skip))
    return Loss(cost - log_px.mean(), kl.detach().mean(dim=1))


# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def importance_weighted_bound(model, x: Tensor, samples: int) -> Tensor:
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
