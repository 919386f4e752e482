"""Hierarchical VAEs whose inference goes level by level.

Levels are 0-based in code and always listed bottom to top: level 0 is the paper's z_1, next to the
pixels, level L-1 is z_L. Every model offers the interface of `Hierarchy`, and nothing else is
needed to train it (see rewards.py):

    levels             L
    order              the levels in the order in which they are inferred
    infer(x)           posteriors, priors and latents of all levels, bottom to top
    prior(l, above)    p(z_l | z_{l+1})
    likelihood(z)      p(x | z_1)
    decode(starts)     any set of levels to the pixels along their skip paths, in one descent

Distributions are torch.distributions with one batch dimension: log_prob and kl_divergence are per
image, in nats. Grey images (one channel) are modelled as binary, colour images as 8-bit values.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal
from torch.nn.utils.parametrizations import weight_norm

# --------------------------------------------------------------------------------------------------
# Configuration


class Config(NamedTuple):
    """Everything that decides a model's parameters. Tuples go bottom to top, one entry a level."""

    arch: str  # "hvae" (bottom-up) or "lvae" (top-down)
    image: tuple[int, int, int]  # channels, height, width
    latents: tuple[str, ...]  # "8" is 8 dimensions, "8c" is 8 maps at the level's resolution
    channels: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: int  # residual blocks a level
    patch: int  # the stem cuts the image into patch x patch squares


# Colour images of more than 48 pixels a side take "large".
PRESETS = {
    "paper": {
        "grey": dict(
            channels=64, kernels=(5, 3, 3, 3, 3), strides=(2, 2, 1, 1, 1), blocks=3, patch=1,
            latents=("128", "64", "32", "16", "8"),
        ),
        "colour": dict(
            channels=256, kernels=(5, 3, 3, 3, 3), strides=(2, 2, 2, 2, 2), blocks=3, patch=1,
            latents=("128c", "64c", "256", "128", "64"),
        ),
    },
    "small": {
        "grey": dict(
            channels=32, kernels=(3, 3, 3, 3, 3), strides=(1, 2, 1, 1, 1), blocks=1, patch=4,
            latents=("8c", "64", "32", "16", "8"),
        ),
        "colour": dict(
            channels=64, kernels=(3, 3, 3, 3, 3), strides=(1, 2, 1, 2, 1), blocks=1, patch=4,
            latents=("16c", "8c", "128", "64", "64"),
        ),
    },
}  # fmt: skip
PRESETS["paper"]["large"] = PRESETS["paper"]["colour"]
PRESETS["small"]["large"] = PRESETS["small"]["colour"] | dict(strides=(2, 2, 1, 2, 1))
MAX_LEVELS = 10


def preset(size: str, image: tuple[int, int, int]) -> dict:
    """The row of PRESETS for a size and a kind of image (channels, height, width)."""
    return PRESETS[size]["grey" if image[0] == 1 else "colour" if image[1] <= 48 else "large"]


def latent_names(levels: int, grey: bool, preset_names: tuple[str, ...]) -> tuple[str, ...]:
    """The latents of a hierarchy of any depth, bottom to top, where no one names them.

    Grey: 8 at the top, doubling downwards and staying at 128. Colour: the preset's, counted from
    the top, its lowest repeated below.
    """
    if levels == len(preset_names):
        return preset_names
    if grey:
        return tuple(str(min(128, 8 * 2**i)) for i in reversed(range(max(levels, 0))))
    missing = levels - len(preset_names)
    return preset_names[:1] * missing + preset_names[max(0, -missing) :]


def configure(
    arch: str,
    size: str = "small",
    image: tuple[int, int, int] = (1, 28, 28),
    latents: str | None = None,
    levels: int | None = None,
    channels: int | None = None,
) -> Config:
    """The configuration of `arch` ("vae", "hvae", "lvae") at a preset size for a kind of image.

    `latents` ("8c,64,32,16,8", bottom to top) overrides the preset's, `levels` gives those of
    `latent_names`. "vae" has one level, the preset's top one.
    Raises ValueError, with a message for the user, for what cannot be built.
    """
    if arch not in ("vae", "hvae", "lvae"):
        raise ValueError(f"unknown architecture {arch!r}: choose vae, hvae or lvae")
    if size not in PRESETS:
        raise ValueError(f"unknown size {size!r}: choose {' or '.join(PRESETS)}")
    row = preset(size, image)
    if latents is not None:
        names = tuple(part.strip() for part in latents.split(","))
        if levels not in (None, len(names)):
            raise ValueError(f"latents {latents!r} name {len(names)} levels, not {levels}")
    else:
        if levels is None:
            levels = 1 if arch == "vae" else len(row["latents"])
        names = latent_names(levels, image[0] == 1, row["latents"])
    if not 1 <= len(names) <= MAX_LEVELS:
        raise ValueError(f"{len(names)} levels: a hierarchy has 1 to {MAX_LEVELS}")
    if arch == "vae" and len(names) != 1:
        raise ValueError(f"a vae has one level, not {len(names)}: use hvae or lvae")
    for name in names:
        digits = name.removesuffix("c")
        if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
            raise ValueError(f"latent {name!r} is not understood: write 8 (dense) or 8c (maps)")
    if channels is not None and channels < 1:
        raise ValueError(f"{channels} channels: there must be at least 1")
    if image[1] != image[2] or image[1] % row["patch"]:
        raise ValueError(
            f"images of {image[1]}x{image[2]}: --size {size} takes squares whose side is a "
            f"multiple of {row['patch']}"
        )

    def per_level(values: tuple[int, ...]) -> tuple[int, ...]:  # beyond the preset, as its last
        return tuple(values[min(i, len(values) - 1)] for i in range(len(names)))

    return Config(
        arch="hvae" if arch == "vae" else arch,  # at one level the two are the same model
        image=tuple(image),
        latents=names,
        channels=channels or row["channels"],
        kernels=per_level(row["kernels"]),
        strides=per_level(row["strides"]),
        blocks=row["blocks"],
        patch=row["patch"],
    )


def build(config: Config) -> "Hierarchy":
    """The model of a configuration, default initialisation, on the CPU in float32."""
    return {"hvae": HVAE, "lvae": LVAE}[config.arch](config)


# --------------------------------------------------------------------------------------------------
# Layers. Feature maps are (B, C, H, W); C is config.channels everywhere.


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2))


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))). Halves the resolution, or first resizes to `size`."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, size: int | None = None):
        super().__init__()
        self.stride, self.size = stride, size
        self.first = conv(channels, channels, kernel)
        self.second = conv(channels, channels, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and self.size != x.shape[-1]:
            x = F.interpolate(x, size=(self.size, self.size))
        out = self.second(F.relu(self.first(F.relu(x))))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return x + out


class ToGaussian(nn.Module):
    """Features (B, C, size, size) to a diagonal Gaussian over a latent."""

    def __init__(self, channels: int, size: int, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        if len(shape) == 3:
            self.head = nn.Conv2d(channels, 2 * shape[0], 1)
        else:
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, 2 * shape[0]))

    def forward(self, features: Tensor) -> Independent:
        mean, scale = full_precision(self.head(F.relu(features))).chunk(2, dim=1)
        # A softplus that is 1 at 0: a new level starts near the unit Gaussian.
        scale = F.softplus(scale, beta=math.log(2)).clamp_min(1e-6)
        return gaussian(mean, scale)


class FromLatent(nn.Module):
    """A latent to features (B, C, size, size)."""

    def __init__(self, shape: tuple[int, ...], channels: int, size: int):
        super().__init__()
        self.size = size
        if len(shape) == 3:
            self.embed = nn.Conv2d(shape[0], channels, 1)
        else:
            self.embed = nn.Sequential(
                nn.Linear(shape[0], channels * size**2), nn.Unflatten(1, (channels, size, size))
            )

    def forward(self, z: Tensor) -> Tensor:
        features = self.embed(z)
        if features.shape[-1] != self.size:  # maps of the finer level below
            features = F.adaptive_avg_pool2d(features, self.size)
        return features


class Merge(nn.Module):
    """Features of x and features of the neighbouring level's sample, together (B, C, H, W)."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.mix = conv(2 * channels, channels, 1)
        self.block = Residual(channels, kernel)

    def forward(self, of_x: Tensor, of_sample: Tensor) -> Tensor:
        return self.block(self.mix(F.relu(torch.cat([of_x, of_sample], dim=1))))


def full_precision(x: Tensor) -> Tensor:
    """Likelihoods and divergences are never computed below float32, whatever the autocast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def gaussian(mean: Tensor, scale: Tensor) -> Independent:
    """Diagonal Gaussian over all but the batch dimension. Validation would cost a sync a call."""
    normal = Normal(mean, scale, validate_args=False)
    return Independent(normal, mean.dim() - 1, validate_args=False)


# --------------------------------------------------------------------------------------------------
# The likelihood of colour images


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

    COMPONENTS = 10
    MIN_LOG_SCALE, MAX_LOG_SCALE = -7.0, 7.0
    FAR = 1e30  # the outer edge of an open bin: finite, so that no gradient is inf times 0
    CHUNK = 2**13  # pixels whose likelihood is computed at once on a CPU: they fit its cache

    def __init__(self, raw: Tensor, channels: int, patch: int = 1, values: int = 256):
        height, width = raw.shape[2] * patch, raw.shape[3] * patch
        super().__init__(raw.shape[:1], (channels, height, width), validate_args=False)
        self.raw, self.channels, self.patch, self.values = raw, channels, patch, values

    @classmethod
    def parameters(cls, channels: int) -> int:
        """Parameters a pixel: 100 for three channels."""
        return cls.COMPONENTS * (1 + 2 * channels + channels * (channels - 1) // 2)

    def _unpack(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[Tensor]]]:
        """Log weights (B, K, N), means and log scales (B, K, C, N), and the coefficients [c][d]
        (B, K, N) with which channel d < c moves the mean of channel c."""
        k, c = self.COMPONENTS, self.channels
        raw = full_precision(raw).reshape(len(raw), self.parameters(c), -1)
        logits, means, log_scales, pairs = raw.split([k, k * c, k * c, k * c * (c - 1) // 2], 1)
        means, log_scales, pairs = (t.unflatten(1, (k, -1)) for t in (means, log_scales, pairs))
        pairs = iter(pairs.tanh().unbind(2))
        coefficients = [[next(pairs) for _ in range(channel)] for channel in range(c)]
        log_scales = log_scales.clamp(self.MIN_LOG_SCALE, self.MAX_LOG_SCALE)
        return logits.log_softmax(1), means, log_scales, coefficients

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,): log p(x) of x (B, C, H, W), in nats."""
        x = F.pixel_unshuffle(x, self.patch).view(len(x), self.channels, -1)  # (B, C, N)
        if self.raw.device.type != "cpu":
            return self._log_prob(self.raw, x)
        return InChunks.apply(self._log_prob, max(1, self.CHUNK // x.shape[2]), self.raw, x)

    def _log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        log_weights, means, log_scales, coefficients = self._unpack(raw)
        half = 1 / (self.values - 1)  # of a bin
        x = 2 * x.unsqueeze(1) - 1  # (B, 1, C, N)
        means = torch.stack(
            [
                sum((a * x[:, :, d] for d, a in enumerate(row)), start=means[:, :, c])
                for c, row in enumerate(coefficients)
            ],
            dim=2,
        )
        inverse = (-log_scales).exp()
        upper = torch.where(x > 1 - half, self.FAR, x + half)
        lower = torch.where(x < half - 1, -self.FAR, x - half)
        # log(sigmoid(a) - sigmoid(b)) of the bin's edges a > b in units of the scale is
        # logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)): no difference of nearly equal
        # numbers, whatever the parameters.
        log_bin = F.logsigmoid((upper - means) * inverse) + F.logsigmoid((means - lower) * inverse)
        log_bin = log_bin + (-((lower - upper) * inverse).expm1()).log()
        return (log_weights + log_bin.sum(2)).logsumexp(1).sum(1)

    def _by_channel(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(B, K, C, N): each channel's value from its mean, given those before it, and its scale,
        in [-1, 1]."""
        _, means, log_scales, coefficients = self._unpack(self.raw)
        channels: list[Tensor] = []
        for c, row in enumerate(coefficients):
            terms = (a * before for a, before in zip(row, channels, strict=True))
            channels.append(value(sum(terms, start=means[:, :, c]), log_scales[:, :, c].exp()))
        return torch.stack(channels, dim=2)

    def _image(self, pixels: Tensor) -> Tensor:
        """(B, C, N) in [-1, 1] to (B, C, H, W) in [0, 1]."""
        return F.pixel_shuffle(pixels.view(len(pixels), -1, *self.raw.shape[2:]) / 2 + 0.5,
                               self.patch)  # fmt: skip

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
    """function(a, b) for a few rows at a time, its gradient with respect to a taken at once.

    For a function that gives one number a row. What it computes on the way stays in the cache and
    is not kept for the backward pass, which makes it up to twice as fast on a CPU.
    """

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
        ctx.rows = rows
        return torch.cat(values)

    @staticmethod
    def backward(ctx, by_value: Tensor) -> tuple[None, None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        by_value = by_value.view(-1, *[1] * (gradient.dim() - 1))
        scaled = torch.empty_like(gradient)
        parts = zip(*(t.split(ctx.rows) for t in (gradient, by_value, scaled)), strict=True)
        for part, factor, out in parts:
            torch.mul(part, factor, out=out)
        return None, None, scaled, None


# --------------------------------------------------------------------------------------------------
# The hierarchies


class Inference(NamedTuple):
    """One pass of the encoder; lists go bottom to top."""

    posteriors: list[Independent]  # q(z_l | neighbouring sample, x)
    priors: list[Independent]  # p(z_l | z_{l+1}) given the sample above; the top one has batch 1
    latents: list[Tensor]  # z_l, (B, D) or (B, D, H, W)


class Hierarchy(nn.Module):
    """What the architectures share: the generative model and the bottom-up features of x.

    p(x, z) = p(x|z_1) p(z_1|z_2) ... p(z_L), Markov: given z_l nothing above it reaches x, which
    is what makes p(x|z_l) a skip path. Subclasses add the posteriors (`infer`) and their `order`.
    """

    order: tuple[int, ...]

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.levels = len(config.latents)
        channels, (depth, size, _) = config.channels, config.image
        self.sizes = [size // config.patch]  # resolution below each level, then above the last
        for stride in config.strides:
            self.sizes.append(math.ceil(self.sizes[-1] / stride))
        self.latent_shapes: list[tuple[int, ...]] = []
        for name, size in zip(config.latents, self.sizes[1:], strict=True):
            dims = int(name.removesuffix("c"))
            self.latent_shapes.append((dims, size, size) if name.endswith("c") else (dims,))

        self.stem = nn.Conv2d(
            depth,
            channels,
            kernel_size=config.patch if config.patch > 1 else config.kernels[0],
            stride=config.patch,
            padding=0 if config.patch > 1 else config.kernels[0] // 2,
        )
        self.encoder = nn.ModuleList()  # features of x below level l to those at level l
        self.decoder = nn.ModuleList()  # z_l to features at the level below
        self.prior_heads = nn.ModuleList()  # those features to p(z_l | z_{l+1}), l < L-1
        for level in range(self.levels):
            kernel, stride, n = config.kernels[level], config.strides[level], config.blocks
            below, here = self.sizes[level], self.sizes[level + 1]
            plain = [Residual(channels, kernel) for _ in range(n - 1)]
            self.encoder.append(nn.Sequential(*plain, Residual(channels, kernel, stride)))
            plain = [Residual(channels, kernel) for _ in range(n - 1)]
            self.decoder.append(
                nn.Sequential(
                    FromLatent(self.latent_shapes[level], channels, here),
                    Residual(channels, kernel, size=below),
                    *plain,
                )
            )
            if level < self.levels - 1:
                self.prior_heads.append(ToGaussian(channels, here, self.latent_shapes[level]))
        per_pixel = 1 if depth == 1 else LogisticMixture.parameters(depth)
        self.to_pixels = nn.Conv2d(channels, per_pixel * config.patch**2, 1)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Deterministic features of x (B, C, H, W) in [0, 1] at every level, bottom to top."""
        h, out = self.stem(x), []
        for level in self.encoder:
            h = level(h)
            out.append(h)
        return out

    def top_down(self, level: int, above: Tensor | None) -> tuple[Tensor | None, Independent]:
        """Features of the sample above at `level`, and the prior they give: p(z_l | z_{l+1})."""
        if level == self.levels - 1:
            zeros = self.zero.expand(1, *self.latent_shapes[level])
            return None, gaussian(zeros, zeros + 1)
        features = self.decoder[level + 1](above)
        return features, self.prior_heads[level](features)

    def prior(self, level: int, above: Tensor | None = None) -> Independent:
        """p(z_l | z_{l+1} = above); at the top N(0, I) with batch size 1, `above` unused."""
        return self.top_down(level, above)[1]

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z_1 = z) over (B, C, H, W): Bernoulli for grey images, LogisticMixture for colour.

        x is in [0, 1]: 0 or 1 for grey images, the 8-bit values divided by 255 for colour.
        """
        raw, depth = self.to_pixels(F.relu(self.decoder[0](z))), self.config.image[0]
        if depth > 1:
            return LogisticMixture(raw, depth, self.config.patch)
        logits = full_precision(F.pixel_shuffle(raw, self.config.patch))
        return Independent(Bernoulli(logits=logits, validate_args=False), 3, validate_args=False)

    def decode(self, starts: Sequence[Tensor | None], skip: str = "mean") -> Distribution:
        """p(x | z_l) along the skip path of every start, all paths in one descent.

        `starts[l]` holds values of z_l, (N_l, *shape), or None. Paths that have reached a level go
        on together in one batch, through the priors below by their means (`skip="mean"`) or by
        one sample each ("sample"). The result has sum(N_l) rows, those of the lowest level first.
        """
        rows: Tensor | None = None
        for level in reversed(range(self.levels)):
            if starts[level] is not None:
                rows = starts[level] if rows is None else torch.cat([starts[level], rows])
            if rows is not None and level > 0:
                rows = through(self.prior(level - 1, rows), skip)
        if rows is None:
            raise ValueError("decode: every start is None")
        return self.likelihood(rows)

    def sample(self, n: int) -> Distribution:
        """p(x | z_1) for n ancestral samples from the prior."""
        top = self.prior(self.levels - 1).expand((n,)).sample()
        return self.decode([None] * (self.levels - 1) + [top], skip="sample")

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        """Posteriors, priors and latents of x (B, C, H, W) with values in [0, 1].

        Latents are reparameterised samples; with `sample=False` they are the posterior means,
        each given the means of the levels it is conditioned on: the representation of x.
        """
        raise NotImplementedError


def through(prior: Independent, skip: str) -> Tensor:
    """What a skip path takes from a prior on its way down: the mean, or one sample."""
    if skip not in ("mean", "sample"):
        raise ValueError(f"unknown skip {skip!r}: choose mean or sample")
    return prior.mean if skip == "mean" else prior.rsample()


class HVAE(Hierarchy):
    """Bottom-up inference (Eq. 1): q(z_1|x), then q(z_l|z_{l-1}, x) upwards."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.order = tuple(range(self.levels))
        shapes, channels = self.latent_shapes, config.channels
        self.embed = nn.ModuleList(  # z_{l-1} to features at level l
            FromLatent(shapes[level - 1], channels, self.sizes[level + 1])
            for level in range(1, self.levels)
        )
        self.merge = nn.ModuleList(Merge(channels, k) for k in config.kernels[1:])
        self.posterior_heads = nn.ModuleList(
            ToGaussian(channels, size, shape)
            for size, shape in zip(self.sizes[1:], shapes, strict=True)
        )

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        posteriors, latents = [], []
        for level, h in enumerate(self.features(x)):
            if level > 0:
                h = self.merge[level - 1](h, self.embed[level - 1](latents[-1]))
            posteriors.append(self.posterior_heads[level](h))
            latents.append(posteriors[-1].rsample() if sample else posteriors[-1].mean)
        priors = [self.prior(level, above) for level, above in enumerate(latents[1:])]
        return Inference(posteriors, [*priors, self.prior(self.levels - 1)], latents)


class LVAE(Hierarchy):
    """Top-down inference (Eq. 2): q(z_L|x), then q(z_l|z_{l+1}, x) downwards.

    As in a ladder (Sønderby et al. 2016) the posterior merges the features of x with the
    generative features of the sample above, the same that give the prior.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.order = tuple(reversed(range(self.levels)))
        self.merge = nn.ModuleList(Merge(config.channels, k) for k in config.kernels[:-1])
        self.posterior_heads = nn.ModuleList(
            ToGaussian(config.channels, size, shape)
            for size, shape in zip(self.sizes[1:], self.latent_shapes, strict=True)
        )

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        features, z = self.features(x), None
        posteriors, priors, latents = [], [], []  # top to bottom
        for level in self.order:
            h = features[level]
            of_sample, prior = self.top_down(level, z)
            if of_sample is not None:
                h = self.merge[level](h, of_sample)
            posterior = self.posterior_heads[level](h)
            z = posterior.rsample() if sample else posterior.mean
            posteriors.append(posterior)
            priors.append(prior)
            latents.append(z)
        return Inference(posteriors[::-1], priors[::-1], latents[::-1])
