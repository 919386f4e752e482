"""Mutual information between any two tensors by a neural estimator.

    Belghazi et al.: Mutual Information Neural Estimation, ICML 2018.

    estimate = mutual_information(x, z)
    print(estimate.nats, "of at most", estimate.ceiling)

A network T(x, z) ascends the Donsker-Varadhan bound I(x; z) >= E_joint[T] - ln E_product[exp T] on
training pairs; the number reported is the bound on held-out pairs with the network frozen, so that
what it has memorised does not count.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


class MutualInformation(NamedTuple):
    nats: float  # the bound on held-out pairs after the last epoch
    ceiling: float  # ln(number of distinct held-out x), which `nats` cannot exceed
    curve: list[float]  # the bound on held-out pairs after every epoch


class Standardise:
    """(B, D) of any type to float32 by each dimension's mean and deviation in `data`, within +-10.

    In float64: neither scale nor offset matters. A dimension that is constant in `data` becomes 0.
    """

    def __init__(self, data: Tensor):
        parts = data.split(1024)
        first = data[0].double()  # taken off before the sum: a constant's variance is exactly 0
        self.mean = first + sum((part.double() - first).sum(0) for part in parts) / len(data)
        variance = sum((part.double() - self.mean).square().sum(0) for part in parts) / len(data)
        self.scale = torch.where(variance > 0, variance.rsqrt(), 0)

    def __call__(self, data: Tensor) -> Tensor:
        return ((data.double() - self.mean) * self.scale).clamp(-10, 10).float()


class Statistics(nn.Module):
    """T(x, z): x (B, D) and K candidates for its z, (K, B, E), to (K, B).

    Standardises by the training pairs x and z. The first layer sees x once for all candidates.
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
        with torch.autocast(x.device.type, enabled=False):
            h = F.linear(self.z(z), z_weight) + F.linear(self.x(x), x_weight, self.first.bias)
            return self.net(h).squeeze(-1)


def flat(data: Tensor) -> Tensor:
    if not data.numel() or data.is_complex() or not data.isfinite().all():
        raise ValueError("x and z must be real numbers, all finite, of one pair or more")
    return data.detach().reshape(len(data), -1)


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


@torch.no_grad()
def donsker_varadhan(
    statistics: nn.Module, x: Tensor, z: Tensor, generator: Generator, shifts: int = 10
) -> float:
    """The bound, in nats, on the pairs (x[i], z[i]) and the product of their own marginals.

    `statistics` takes x (B, D) and z (K, B, E) to T (K, B). The product measure gives each pair
    (i, j) weight 1/n^2: the diagonal, which keeps the bound to ln n, is exact, the rest estimated
    from `shifts` cyclic shifts of a random order. With n - 1 of them all of it is exact.
    """
    n = len(x)
    order = torch.randperm(n, generator=generator).to(x.device)
    orders = torch.stack([order.roll(shift) for shift in range(min(shifts, n - 1) + 1)])
    parts = orders.split(max(1, 4000 // len(orders)), dim=1)
    t = torch.cat([statistics(x[k[0]], z[k]) for k in parts], dim=1).double()  # (K, n)
    diagonal = log_mean_exp(t[0]) - math.log(n)
    rest = log_mean_exp(t[1:].flatten()) + math.log((n - 1) / n)
    return (t[0].mean() - torch.logaddexp(diagonal, rest)).item()


@torch.inference_mode(False)
@torch.enable_grad()
def mutual_information(
    x: Tensor,
    z: Tensor | Callable[[int], Tensor],
    held_out: tuple[Tensor, Tensor] | None = None,
    *,
    hidden: int = 512,
    epochs: int = 100,
    batch_size: int = 512,
    lr: float = 5e-4,
    seed: int = 0,
) -> MutualInformation:
    """A lower bound of I(x; z), in nats, from pairs x[i], z[i] of any shapes (N, ...) and types.

    Trains on the pairs given, measures on the pairs `held_out`; where that is None, a fifth of the
    pairs, drawn by `seed`, is held out. `z` may also be a function of the epoch, called at every
    fifth, that samples z of each x anew: a fixed sample is memorised. Adam's rate is `lr`, then
    0.3 `lr` and 0.09 `lr`, each for a third of the epochs. Runs where x lives. Raises ValueError
    for pairs that are not finite, do not match or are too few.
    """
    draw = z if callable(z) else lambda epoch: z
    x, drawn = flat(x), flat(draw(0))
    test_x, test_z = map(flat, held_out or (x, drawn))
    numbers = len(x), len(test_x), x.shape[1], drawn.shape[1]
    if numbers != (len(drawn), len(test_z), test_x.shape[1], test_z.shape[1]):
        raise ValueError("there must be one z for each x, and held-out pairs must be shaped alike")
    generator = Generator().manual_seed(seed)
    train = torch.randperm(len(x), generator=generator)
    if held_out is None:
        test, train = train[: len(x) // 5], train[len(x) // 5 :]
        test_x, test_z = x[test], drawn[test]
    n = len(test_x)
    if epochs < 1 or min(len(train), n, batch_size) < 2:
        raise ValueError("needs at least 1 epoch, 2 pairs to train on, 2 held out, 2 a batch")
    ceiling = math.log(len(torch.unique(test_x, dim=0)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        statistics = Statistics(x[train], drawn[train], hidden).to(x.device, torch.float32)
    optimizer = torch.optim.Adam(statistics.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, math.ceil(epochs / 3), 0.3)
    average = MovingLogMean()
    curve = []
    for epoch in range(epochs):
        if epoch and epoch % 5 == 0:  # each epoch would double the time of an image model
            drawn = flat(draw(epoch)).view_as(drawn)
        order = torch.randperm(len(train), generator=generator)
        batches = train[order].chunk(math.ceil(len(train) / batch_size))
        for batch in (b for b in batches if len(b) > 1):  # one pair has no other z
            pairs = torch.stack([batch, batch.roll(1)]).to(x.device)  # none in its own place
            loss = mine_loss(*statistics(x[pairs[0]], drawn[pairs]), average)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        shifts = 10 if epoch < epochs - 1 else max(10, 100_000 // n)  # less scatter at the end
        bound = donsker_varadhan(statistics, test_x, test_z, generator, shifts)
        curve.append(min(bound, ceiling))  # with repeated x the bound itself only keeps to ln n
    return MutualInformation(curve[-1], ceiling, curve)
