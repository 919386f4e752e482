"""Mutual information between any two tensors by a neural estimator.

    Belghazi et al.: Mutual Information Neural Estimation, ICML 2018.

    estimate = mutual_information(x, z)
    print(estimate.nats, "of at most", estimate.ceiling)

A network T(x, z) ascends the Donsker-Varadhan bound I(x; z) >= E_joint[T] - ln E_product[exp T] on
training pairs; the number reported is the bound on held-out pairs with the network frozen, so that
what it has memorised does not count.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


class MutualInformation(NamedTuple):
    nats: float  # the bound on held-out pairs after the last epoch
    ceiling: float  # ln(number of distinct held-out x), which `nats` cannot exceed
    curve: list[float]  # the bound on held-out pairs after every epoch


class Standardise(nn.Module):
    """(B, ...) of any type, as uint8 images, to (B, D) float32 by mean and deviation of `data`."""

    def __init__(self, data: Tensor):
        super().__init__()
        parts = data.flatten(1).split(1024)
        mean = sum(part.double().sum(0) for part in parts) / len(data)
        variance = sum((part.double() - mean).square().sum(0) for part in parts) / (len(data) - 1)
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", variance.sqrt().float().clamp_min(1e-6))

    def forward(self, data: Tensor) -> Tensor:
        return (data.flatten(1).float() - self.mean) / self.std


class Statistics(nn.Module):
    """T(x, z): x (B, ...) and K candidates for its z, (K, B, ...), to (K, B).

    Standardises by the training pairs x and z. What the first layer makes of x, most of the work
    where x is an image, is computed once for all candidates.
    """

    def __init__(self, x: Tensor, z: Tensor, hidden: int):
        super().__init__()
        self.x, self.z = Standardise(x), Standardise(z)
        self.first = nn.Linear(len(self.x.mean) + len(self.z.mean), hidden)
        self.net = nn.Sequential(
            nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x_weight, z_weight = self.first.weight.split([len(self.x.mean), len(self.z.mean)], dim=1)
        h = F.linear(self.z(z.flatten(0, 1)), z_weight).unflatten(0, z.shape[:2])
        return self.net(h + F.linear(self.x(x), x_weight, self.first.bias)).squeeze(-1)


def log_mean_exp(t: Tensor) -> Tensor:
    return t.logsumexp(dim=0) - math.log(len(t))


class MovingLogMean:
    """ln of the bias-corrected exponential moving average of mean(exp T), never leaving log space.

    Dividing the gradient by this average instead of the batch's own mean removes most of the bias
    of the minibatch gradient (section 3.2 of the paper).
    """

    def __init__(self, rate: float = 0.01):
        self.rate, self.steps = rate, 0
        self.log_average = torch.tensor(-math.inf)

    def update(self, log_mean: Tensor) -> Tensor:
        self.steps += 1
        old = self.log_average.to(log_mean) + math.log1p(-self.rate)
        self.log_average = torch.logaddexp(old, log_mean + math.log(self.rate))
        return self.log_average - math.log(1 - (1 - self.rate) ** self.steps)


def mine_loss(joint: Tensor, product: Tensor, average: MovingLogMean) -> Tensor:
    """A scalar whose gradient is the bias-corrected one of minus the Donsker-Varadhan bound."""
    log_mean = log_mean_exp(product)
    return (log_mean - average.update(log_mean.detach())).exp() - joint.mean()


def derangement(n: int, generator: Generator) -> Tensor:
    """A random permutation of n >= 2 items, on the CPU, that leaves none in its place."""
    order = torch.randperm(n, generator=generator)
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)  # one random cycle through all
    return moved


@torch.no_grad()
def donsker_varadhan(statistics: nn.Module, x: Tensor, z: Tensor, generator: Generator) -> float:
    """The bound, in nats, on the pairs (x[i], z[i]) and the product of their own marginals.

    `statistics` takes x (B, ...) and z (K, B, ...) to T (K, B).
    The product measure gives each pair (i, j) weight 1/n^2: the diagonal is exact, the rest is
    estimated from ten derangements in one logsumexp. With the diagonal in, it is at most ln n.
    """
    n = len(x)
    orders = [torch.arange(n), *(derangement(n, generator) for _ in range(10))]
    orders = torch.stack(orders).to(x.device)
    parts = zip(x.split(1024), orders.split(1024, dim=1), strict=True)
    joint, *others = torch.cat([statistics(a, z[k]) for a, k in parts], dim=1).double()
    others = torch.cat(others)
    log_product = torch.logaddexp(
        log_mean_exp(joint) - math.log(n), log_mean_exp(others) + math.log((n - 1) / n)
    )
    return (joint.mean() - log_product).item()


def mutual_information(
    x: Tensor,
    z: Tensor,
    held_out: tuple[Tensor, Tensor] | None = None,
    *,
    hidden: int = 512,
    epochs: int = 100,
    batch_size: int = 512,
    lr: float = 5e-4,
    seed: int = 0,
) -> MutualInformation:
    """A lower bound of I(x; z), in nats, from pairs x[i], z[i] of any shapes (N, ...).

    Trains on the pairs given, measures on the pairs `held_out`; where that is None, a fifth of the
    pairs, drawn by `seed`, is held out. Adam's rate is `lr`, then 0.3 `lr` and 0.09 `lr`, each for
    a third of the epochs. Runs where x lives. Raises ValueError for pairs that do not match or
    are too few.
    """
    if any(len(a) != len(b) for a, b in [(x, z), held_out or (x, z)]):
        raise ValueError("there must be one z for each x")
    generator = Generator().manual_seed(seed)
    if held_out is None:
        order = torch.randperm(len(x), generator=generator)
        test, train = order[: len(x) // 5], order[len(x) // 5 :]
        held_out = x[test], z[test]
        x, z = x[train], z[train]
    if epochs < 1 or min(len(x), len(held_out[0])) < 2:
        raise ValueError("at least 1 epoch, 2 pairs to train on and 2 held out are needed")
    ceiling = math.log(len(torch.unique(held_out[0].flatten(1), dim=0)))

    x, z, *held_out = (t.detach() for t in (x, z, *held_out))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        statistics = Statistics(x, z, hidden).to(x.device)
    optimizer = torch.optim.Adam(statistics.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, math.ceil(epochs / 3), 0.3)
    average = MovingLogMean()
    curve = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            if len(batch) < 2:
                continue
            other = batch[derangement(len(batch), generator)]
            pairs = torch.stack([batch, other]).to(x.device)
            loss = mine_loss(*statistics(x[pairs[0]], z[pairs]), average)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        bound = donsker_varadhan(statistics, *held_out, generator)
        curve.append(min(bound, ceiling))  # with repeated x the bound itself only keeps to ln n
    return MutualInformation(curve[-1], ceiling, curve)
