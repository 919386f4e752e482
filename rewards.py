"""Objectives for hierarchical VAEs: the ELBO, the skip-generative reward with its Q-value, and
those of the baselines.

    An, Li, et al.: Improving Unsupervised Hierarchical Representation with Reinforcement Learning,
    CVPR 2024. Equation numbers are the paper's.

A model is anything with `levels`, `infer(x)` and `generate(latents)` as models.py describes them,
and for what has skip paths `order` and `decode(starts, skip)`; nothing here asks which architecture
it is. Steps t count from 0 in the order of inference: step t infers level order[t]. Values are per
image, in nats, to be maximised; the `*_loss` functions give what an optimiser minimises.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence


class Loss(NamedTuple):
    value: Tensor  # scalar, to be minimised
    kl: Tensor  # (L,) mean over the batch of each level's KL, bottom to top, unweighted, detached


class Share:
    """For a batch that several processes hold: x is every `of`-th of its `whole` images, from
    number `first` on. The mean of the losses of all shares, weighted by their sizes, is the loss of
    the batch; `mean` is what has to know the other shares for that, parallel.py gives it."""

    def __init__(self, whole: int, first: int = 0, of: int = 1):
        self.whole, self.first, self.of = whole, first, of

    def rows(self, start: int, stop: int) -> slice:
        """Where this share holds its part of the batch's images `start` to `stop`."""
        return slice(*(max(0, -(-(end - self.first) // self.of)) for end in (start, stop)))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the batch of values (..., B) of this share's images."""
        return values.mean(dim=-1)


def level_kl(inference) -> Tensor:
    """(L, B): KL of each level's posterior from its prior given the sample above.

    Where that sample was inferred from the level's own, as bottom-up, how the two vary together is
    not seen: the sum of these may come out on either side of what `log_ratios` has in the mean.
    """
    pairs = zip(inference.posteriors, inference.priors, strict=True)
    return torch.stack([divergence(q, p) for q, p in pairs])


def log_ratios(inference) -> Tensor:
    """(L, B): log q(z_l) - log p(z_l) of the samples inferred. In the mean over samples their sum
    is the KL of all latents together (Eq. 4), in whatever order these are inferred."""
    inferred = zip(inference.posteriors, inference.priors, inference.latents, strict=True)
    return torch.stack([q.log_prob(z) - p.log_prob(z) for q, p, z in inferred])


def divergence(q: Distribution, p: Distribution) -> Tensor:
    """(B,): KL(q || p). For diagonal Gaussians by hand: PyTorch looks its formula up in a way that
    cannot be compiled."""
    gaussian = all(isinstance(getattr(d, "base_dist", None), Normal) for d in (q, p))
    if not gaussian:
        return kl_divergence(q, p)
    (mean, scale), (prior_mean, prior_scale) = (
        (d.base_dist.loc, d.base_dist.scale) for d in (q, p)
    )
    squared_ratio = (scale / prior_scale).square()
    distance = ((mean - prior_mean) / prior_scale).square()
    return 0.5 * (squared_ratio + distance - 1 - squared_ratio.log()).flatten(1).sum(1)


def weigh_kl(
    kl: Tensor, beta: float = 1.0, free_bits: float = 0.0, share: Share | None = None
) -> Tensor:
    """(L, B) KL as the objective counts it: beta max(free_bits, KL).

    Free bits are nats a level (Kingma et al. 2016): while a level's mean over the batch is below,
    it counts as that constant and has no gradient.
    """
    if free_bits > 0:
        mean = (share or Share(kl.shape[1])).mean(kl.detach()).unsqueeze(1)
        kl = torch.where(mean < free_bits, free_bits, kl)
    return beta * kl


def reconstruction(model, x: Tensor, inference) -> Tensor:
    """(B,): log p(x|z) given all latents inferred."""
    pixels = inference.pixels
    return (model.generate(inference.latents) if pixels is None else pixels).log_prob(x)


def skip_log_likelihood(model, x: Tensor, inference, rows: list, skip: str = "mean") -> Tensor:
    """log p(x|z_l) by the skip path of each level's posterior sample, Eq. 24's first term.

    `rows[l]` are the images whose level l is decoded, `slice(None)` for all, None for none. Returns
    one row a path, the lowest level's first.

    The first step of a path, the prior of the level below, is what the KL needs too and stands in
    `inference` already; the rest of all paths is one batched descent.
    """
    if skip not in ("mean", "sample"):
        raise ValueError(f"unknown skip {skip!r}: choose mean or sample")
    starts: list[list[Tensor]] = [[] for _ in range(model.levels)]
    for level, selected in enumerate(rows):
        if selected is None:
            continue
        if level == 0:
            starts[0].append(inference.latents[0][selected])
        else:
            prior = inference.priors[level - 1]
            z = prior.mean if skip == "mean" else prior.rsample()
            starts[level - 1].append(z[selected])
    pixels = model.decode([torch.cat(s) if s else None for s in starts], skip)
    return pixels.log_prob(torch.cat([x[s] for s in rows if s is not None]))


def rewards(
    model, x: Tensor, inference, kl: Tensor, start: int = 0, skip: str = "mean", **kl_terms
) -> Tensor:
    """(T - start, B): the rewards r_t of steps `start` to the last, Eq. 24.

    r_t = log p(x|z^t) - sum_{s<=t} KL_s. `kl` is `level_kl(inference)`, `kl_terms` are what
    `paid` takes beside it.
    """
    order = list(model.order)
    wanted = order[start:]
    rows = [slice(None) if level in wanted else None for level in range(model.levels)]
    log_px = skip_log_likelihood(model, x, inference, rows, skip).view(len(wanted), -1)
    position = {level: i for i, level in enumerate(sorted(wanted))}
    log_px = torch.stack([log_px[position[level]] for level in wanted])
    return log_px - paid(model, kl, **kl_terms)[start:]


def paid(model, kl: Tensor, pay: str = "inferred", **kl_terms) -> Tensor:
    """(T, B): what the reward of each step pays, the KL of all levels inferred until then (Eq. 24),
    or with `pay="own"` that of its own level alone. Bottom-up the levels below, whose samples the
    step's path does not use, then cost it nothing; top-down those above, through which it went,
    are paid once instead of by every later step.
    `kl_terms` are what `weigh_kl` takes beside the KL.
    """
    if pay not in ("inferred", "own"):
        raise ValueError(f"unknown pay {pay!r}: choose inferred or own")
    kl = weigh_kl(kl, **kl_terms)
    in_order = torch.stack([kl[level] for level in model.order])
    return in_order.cumsum(dim=0) if pay == "inferred" else in_order


def q_value(rewards: Tensor, gamma: float) -> Tensor:
    """(B,): Q_t = sum_{i>=t} gamma^(i-t) r_i (Eq. 26) from the rewards (T-t, B) of steps t on."""
    return sum(gamma**i * reward for i, reward in enumerate(rewards))


def path_weights(steps: int, gamma: float) -> list[float]:
    """w_i with sum_t Q_t = sum_i w_i r_i: w_i = sum_{t<=i} gamma^(i-t)."""
    return [sum(gamma**k for k in range(i + 1)) for i in range(steps)]


# --------------------------------------------------------------------------------------------------
# Losses: functions of the model and a batch x (B, C, H, W)


def elbo(model, x: Tensor, **kl_terms) -> tuple[Tensor, Tensor]:
    """(B,) evidence lower bound (Eq. 5 and 6) with one sample, and the KL of each level (L, B)."""
    inference = model.infer(x)
    kl = level_kl(inference)
    return reconstruction(model, x, inference) - weigh_kl(kl, **kl_terms).sum(dim=0), kl


def elbo_loss(model, x: Tensor, **kl_terms) -> Loss:
    value, kl = elbo(model, x, **kl_terms)
    return Loss(-value.mean(), kl.detach().mean(dim=1))


def stepwise_loss(model, x: Tensor, step: int, gamma: float, skip="mean", **kl_terms) -> Loss:
    """-Q_step: one of the T updates that Algorithm 1 makes with a batch, each inferring afresh."""
    inference = model.infer(x)
    kl = level_kl(inference)
    r = rewards(model, x, inference, kl, step, skip, **kl_terms)
    return Loss(-q_value(r, gamma).mean(), kl.detach().mean(dim=1))


def joint_loss(model, x: Tensor, gamma: float, skip: str = "mean", **kl_terms) -> Loss:
    """-sum_t Q_t, the whole gradient of Eq. 28 in one update."""
    inference = model.infer(x)
    kl = level_kl(inference)
    r = rewards(model, x, inference, kl, 0, skip, **kl_terms)
    total = sum(w * reward for w, reward in zip(path_weights(len(r), gamma), r, strict=True))
    return Loss(-total.mean(), kl.detach().mean(dim=1))


def path_counts(images: int, weights: list[float]) -> list[int]:
    """How many of a batch's images go along each path: in proportion to the weights, at least 1.

    Raises ValueError where there are fewer images than paths.
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
    return counts


def sampled_log_likelihood(
    model, x: Tensor, inference, weights: list[float], share: Share, skip: str
) -> Tensor:
    """An estimate of sum_l weights[l] E log p(x|z_l) over a batch of which x is a share, from one
    skip path an image: n_l images go down from level l, in proportion to its weight.

    Which they are their order decides. It has to be random, as in every batch of `data.shuffled`:
    then each image has the same chance of each path, and the weight times the mean over the n_l is
    without bias. Numbers and places are fixed, and so are all shapes.
    """
    counts = path_counts(share.whole, weights)
    ends = list(itertools.accumulate(counts))
    rows = [share.rows(end - n, end) for end, n in zip(ends, counts, strict=True)]
    log_px = skip_log_likelihood(model, x, inference, rows, skip)  # in the order of x
    of_level = zip(weights, counts, rows, strict=True)
    return sum(w * share.whole / n * log_px[part].sum() for w, n, part in of_level) / len(x)


def sampled_loss(model, x: Tensor, gamma: float, skip: str = "mean", **kl_terms) -> Loss:
    """An unbiased estimate of `joint_loss` at about the price of the ELBO: one path an image.

    x has to be in random order, see `sampled_log_likelihood`. A batch smaller than the number of
    levels takes all paths.
    """
    share = kl_terms.get("share") or Share(len(x))
    if share.whole < model.levels:
        return joint_loss(model, x, gamma, skip, **kl_terms)
    weights, order = path_weights(model.levels, gamma), list(model.order)
    inference = model.infer(x)
    kl = level_kl(inference)
    # What all images have inferred is known, so that only what they decode is sampled.
    of_steps = paid(model, kl, **kl_terms)
    cost = sum(w * of_step for w, of_step in zip(weights, of_steps, strict=True)).mean()
    weight_of_level = [weights[order.index(level)] for level in range(model.levels)]
    log_px = sampled_log_likelihood(model, x, inference, weight_of_level, share, skip)
    return Loss(cost - log_px, kl.detach().mean(dim=1))


# --------------------------------------------------------------------------------------------------
# Losses of the baselines


def ivae_loss(model, x: Tensor, skip: str = "mean", sampled: bool = False, **kl_terms) -> Loss:
    """Informative hierarchical VAE (Li et al. 2022), Eq. 39: the ELBO whose reconstruction is the
    mean of log p(x|z_l) over the skip paths of all levels.

    `sampled` estimates that mean as `sampled_loss` does, by one path an image of an x in random
    order, unbiased.
    """
    share = kl_terms.get("share") or Share(len(x))
    inference = model.infer(x)
    kl = level_kl(inference)
    if sampled and share.whole >= model.levels:
        even = [1 / model.levels] * model.levels
        log_px = sampled_log_likelihood(model, x, inference, even, share, skip)
    else:
        every = [slice(None)] * model.levels
        log_px = skip_log_likelihood(model, x, inference, every, skip).mean()
    return Loss(weigh_kl(kl, **kl_terms).sum(dim=0).mean() - log_px, kl.detach().mean(dim=1))


# The adversarial autoencoder's three phases (Makhzani et al. 2015); `phases` of the model says what
# each moves. The KL has no part in them and is only reported.


def reconstruction_loss(model, x: Tensor, **kl_terms) -> Loss:
    """-log p(x|z), for encoder and decoder."""
    inference = model.infer(x)
    value = -reconstruction(model, x, inference).mean()
    return Loss(value, level_kl(inference).detach().mean(dim=1))


def discriminator_loss(model, x: Tensor, **kl_terms) -> Loss:
    """-log D(z of the prior) - log(1 - D(z of x)), for the discriminator D."""
    inference = model.infer(x)
    z, prior = inference.latents[-1].detach(), inference.priors[-1].expand((len(x),)).rsample()
    value = F.softplus(-odds(model, prior)).mean() + F.softplus(odds(model, z)).mean()
    return Loss(value, level_kl(inference).detach().mean(dim=1))


def confusion_loss(model, x: Tensor, **kl_terms) -> Loss:
    """-log D(z of x), for the encoder: its z shall pass for the prior's."""
    inference = model.infer(x)
    value = F.softplus(-odds(model, inference.latents[-1])).mean()
    return Loss(value, level_kl(inference).detach().mean(dim=1))


def odds(model, z: Tensor) -> Tensor:
    """(B,): log D(z) / (1 - D(z)), never below float32."""
    log_odds = model.discriminator(z)
    return log_odds.float() if log_odds.dtype in (torch.bfloat16, torch.float16) else log_odds


# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def importance_weighted_bound(model, x: Tensor, samples: int, at_once: int = 1024) -> Tensor:
    """(B,): log (1/K) sum_k p(x, z^k) / q(z^k|x), K = `samples` (Burda et al. 2016), in nats.

    A lower bound of log p(x) that is the ELBO at K = 1 and rises to log p(x) with K. About
    `at_once` images and samples are inferred in one batch.
    """
    if samples < 1:
        raise ValueError(f"{samples} samples: the bound needs at least 1")
    per_pass = max(1, min(samples, at_once // max(1, len(x))))
    log_weights = []
    for done in range(0, samples, per_pass):
        k = min(per_pass, samples - done)
        repeated = x.repeat(k, *[1] * (x.dim() - 1))
        inference = model.infer(repeated)
        log_w = reconstruction(model, repeated, inference) - log_ratios(inference).sum(dim=0)
        log_weights.append(log_w.view(k, len(x)))
    return torch.cat(log_weights).logsumexp(dim=0) - math.log(samples)
