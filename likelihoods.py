"""p(x | z) of images: binary pixels for grey images, 8-bit values for colour.

Distributions are torch.distributions with one batch dimension: log_prob is per image, in nats.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, constraints


def full_precision(x: Tensor) -> Tensor:
    """Likelihoods and divergences are never computed below float32, whatever the autocast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def likelihood(raw: Tensor, channels: int, patch: int) -> Distribution:
    """p(x | z) over (B, C, H, W) from a decoder's last layer (B, P patch^2, H/patch, W/patch).

    Bernoulli for grey images (C = 1, P = 1), LogisticMixture for colour. x is in [0, 1]: 0 or 1 for
    grey images, the 8-bit values divided by 255 for colour.
    """
    if channels > 1:
        return LogisticMixture(raw, channels, patch)
    logits = full_precision(F.pixel_shuffle(raw, patch))
    return BinaryImages(Bernoulli(logits=logits, validate_args=False), 3, validate_args=False)


def parameters_a_pixel(channels: int) -> int:
    """P of `likelihood`."""
    return 1 if channels == 1 else LogisticMixture.parameters(channels)


def checked(x: Tensor, p: Distribution) -> Tensor:
    """x; ValueError where p would broadcast or reshape it, or it has integers, perhaps 0 to 255."""
    shape, got = tuple(p.batch_shape + p.event_shape), tuple(x.shape)
    if got != shape or not x.is_floating_point():
        raise ValueError(f"x must be floats in [0, 1] of shape {shape}, not {x.dtype} of {got}")
    return x


class BinaryImages(Independent):
    def log_prob(self, x: Tensor) -> Tensor:
        """(B,): log p(x) of x (B, 1, H, W), in nats. ValueError by `checked`."""
        return super().log_prob(checked(x, self))


class LogisticMixture(Distribution):
    """Pixels as a mixture of discretised logistics (Salimans et al. 2017, PixelCNN++).

    Each pixel chooses one of K = 10 components, in which channel c has the mean m_c plus a linear
    term in the values of the channels before it. A value is the bin of its logistic around it, the
    first and the last one open. Values are v/(V-1) in [0, 1] for v = 0 ... V-1, V = 256.

    `raw` is (B, P patch^2, H/patch, W/patch), what nn.PixelShuffle(patch) makes (B, P, H, W) of, in
    any precision; the likelihood is computed in float32 or better. P = parameters(C): K logits,
    then for each component and channel a mean and a log scale in units in which the values span
    [-1, 1], then the coefficients before their tanh. Below, N = H W pixels.
    """

    arg_constraints = property(lambda self: {"raw": constraints.real})  # what repr shows
    COMPONENTS = 10
    MIN_LOG_SCALE, MAX_LOG_SCALE = -7.0, 7.0
    FAR = 1e30  # the outer edge of an open bin: finite, so that no gradient is inf times 0
    CHUNK = 2**13  # pixels whose likelihood is computed at once on a CPU: they fit its cache

    def __init__(self, raw: Tensor, channels: int, patch: int = 1, values: int = 256):
        shape = torch.Size((channels, raw.shape[2] * patch, raw.shape[3] * patch))
        super().__init__(raw.shape[:1], shape, validate_args=False)
        self.raw, self.channels, self.patch, self.values = raw, channels, patch, values

    @classmethod
    def parameters(cls, channels: int) -> int:
        """Parameters a pixel: 100 for three channels."""
        return cls.COMPONENTS * (1 + 2 * channels + channels * (channels - 1) // 2)

    def _unpack(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[Tensor]]]:
        """Log weights (B, K, N), means and log scales (B, K, C, N), and the coefficients [c][d]
        (B, K, N) with which channel d < c moves the mean of channel c."""
        k, c, n = self.COMPONENTS, self.channels, self.event_shape[1:].numel()
        raw = full_precision(raw).reshape(len(raw), self.parameters(c), n)
        logits, means, log_scales, pairs = raw.split([k, k * c, k * c, k * c * (c - 1) // 2], 1)
        means, log_scales, pairs = (t.unflatten(1, (k, -1)) for t in (means, log_scales, pairs))
        pairs = iter(pairs.tanh().unbind(2))
        coefficients = [[next(pairs) for _ in range(channel)] for channel in range(c)]
        log_scales = log_scales.clamp(self.MIN_LOG_SCALE, self.MAX_LOG_SCALE)
        return logits.log_softmax(1), means, log_scales, coefficients

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,): log p(x) of x (B, C, H, W), in nats. ValueError by `checked`."""
        x = F.pixel_unshuffle(checked(x, self), self.patch)
        x = x.reshape(len(x), self.channels, -1)  # (B, C, N)
        if self.raw.device.type != "cpu" or x.requires_grad:
            return self._log_prob(self.raw, x)
        raw = self.raw.contiguous()  # pixels side by side: faster
        return InChunks.apply(self._log_prob, max(1, self.CHUNK // x.shape[2]), raw, x)

    def _log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        log_weights, means, log_scales, coefficients = self._unpack(raw)
        half = 1 / (self.values - 1)  # of a bin
        x = 2 * x.unsqueeze(1) - 1  # (B, 1, C, N)
        terms = (map(torch.mul, row, x.unbind(2)) for row in coefficients)  # of channels before
        means = torch.stack([sum(t, start=means[:, :, c]) for c, t in enumerate(terms)], dim=2)
        inverse = (-log_scales).exp()
        upper = torch.where(x > 1 - half, self.FAR, x + half)
        lower = torch.where(x < half - 1, -self.FAR, x - half)
        # log(sigmoid(a) - sigmoid(b)) of the bin's edges a > b in units of the scale, without a
        # difference of close numbers: logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)).
        log_bin = F.logsigmoid((upper - means) * inverse) + F.logsigmoid((means - lower) * inverse)
        log_bin = log_bin + (-((lower - upper) * inverse).expm1()).log()
        return (log_weights + log_bin.sum(2)).logsumexp(1).sum(1)

    def _by_channel(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(B, K, C, N) in [-1, 1]: each channel's value from its mean, given those before it."""
        _, means, log_scales, coefficients = self._unpack(self.raw)
        channels: list[Tensor] = []
        for c, row in enumerate(coefficients):
            terms = (a * before for a, before in zip(row, channels, strict=True))
            channels.append(value(sum(terms, start=means[:, :, c]), log_scales[:, :, c].exp()))
        return torch.stack(channels, dim=2)

    def _image(self, pixels: Tensor) -> Tensor:
        """(B, C, N) in [-1, 1] to (B, C, H, W) in [0, 1]."""
        pixels = pixels.view(len(pixels), -1, *self.raw.shape[2:])
        return F.pixel_shuffle(pixels, self.patch) / 2 + 0.5

    @property
    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]: exact but that a bin counts as its logistic's own mass and not
        as its centre, and that a channel takes the means of those before it."""

        def clipped(mean: Tensor, scale: Tensor) -> Tensor:  # E of a logistic clipped to [-1, 1]
            mean = torch.clamp(mean, -1 - 20 * scale, 1 + 20 * scale)  # all beyond is the same
            above, below = F.softplus((mean + 1) / scale), F.softplus((mean - 1) / scale)
            return (scale * (above - below) - 1).clamp(-1, 1)

        weights = self._unpack(self.raw)[0].exp().unsqueeze(2)
        return self._image((weights * self._by_channel(clipped)).sum(1))

    @torch.no_grad()
    def sample(self) -> Tensor:
        """(B, C, H, W) in [0, 1]: one draw of all pixels."""

        def draw(mean: Tensor, scale: Tensor) -> Tensor:
            uniform = torch.rand_like(mean).clamp(1e-7, 1 - 1e-7)
            bins = (mean + scale * uniform.logit() + 1) / 2 * (self.values - 1)
            return bins.round().clamp(0, self.values - 1) * 2 / (self.values - 1) - 1

        log_weights = self._unpack(self.raw)[0]
        gumbel = -torch.empty_like(log_weights).exponential_().log()
        chosen = (log_weights + gumbel).argmax(1)[:, None, None].expand(-1, 1, self.channels, -1)
        return self._image(self._by_channel(draw).gather(1, chosen).squeeze(1))


class InChunks(torch.autograd.Function):
    """function(a, b), one number a row, for a few rows at a time; differentiable in a, once. The
    gradient is taken at once, while all is in the cache: up to twice as fast on a CPU."""

    @staticmethod
    def forward(ctx, function: Callable, rows: int, a: Tensor, b: Tensor) -> Tensor:
        values, needs_gradient = [], ctx.needs_input_grad[2]
        gradient = torch.empty_like(a) if needs_gradient else None
        for start in range(0, len(a), rows):
            part = a[start : start + rows].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                value = function(part, b[start : start + rows])
                if needs_gradient:
                    gradient[start : start + rows] = torch.autograd.grad(value.sum(), part)[0]
            values.append(value.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx, by_value: Tensor) -> tuple[None, None, Tensor, None]:
        if torch.is_grad_enabled():  # with create_graph; the gradient kept has no graph of its own
            raise RuntimeError("no second derivative: take an x that requires a gradient")
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * by_value.view(-1, *[1] * (gradient.dim() - 1)), None
