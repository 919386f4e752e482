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
image, in nats.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
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


PRESETS = {
    "paper": dict(
        channels=64, kernels=(5, 3, 3, 3, 3), strides=(2, 2, 1, 1, 1), blocks=3, patch=1,
        latents=("128", "64", "32", "16", "8"),
    ),
    "small": dict(
        channels=32, kernels=(3, 3, 3, 3, 3), strides=(1, 2, 1, 1, 1), blocks=1, patch=4,
        latents=("8c", "64", "32", "16", "8"),
    ),
}  # fmt: skip
MAX_LEVELS = 10


def configure(
    arch: str,
    size: str = "small",
    image: tuple[int, int, int] = (1, 28, 28),
    latents: str | None = None,
    levels: int | None = None,
    channels: int | None = None,
) -> Config:
    """The configuration of `arch` ("vae", "hvae", "lvae") at a preset size.

    `latents` ("8c,64,32,16,8", bottom to top) overrides the preset's; `levels` other than the
    preset's gives 8 at the top, doubling downwards and staying at 128. "vae" has one level.
    Raises ValueError, with a message for the user, for what cannot be built.
    """
    if arch not in ("vae", "hvae", "lvae"):
        raise ValueError(f"unknown architecture {arch!r}: choose vae, hvae or lvae")
    if size not in PRESETS:
        raise ValueError(f"unknown size {size!r}: choose {' or '.join(PRESETS)}")
    preset = PRESETS[size]
    if arch == "vae" and latents is None:
        levels = 1 if levels is None else levels
    if latents is not None:
        names = tuple(part.strip() for part in latents.split(","))
        if levels not in (None, len(names)):
            raise ValueError(f"latents {latents!r} name {len(names)} levels, not {levels}")
    elif levels is None or levels == len(preset["latents"]):
        names = preset["latents"]
    else:
        names = tuple(str(min(128, 8 * 2**i)) for i in reversed(range(max(levels, 0))))
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

    def per_level(values: tuple[int, ...]) -> tuple[int, ...]:  # beyond the preset, as its last
        return tuple(values[min(i, len(values) - 1)] for i in range(len(names)))

    return Config(
        arch="hvae" if arch == "vae" else arch,  # at one level the two are the same model
        image=tuple(image),
        latents=names,
        channels=channels or preset["channels"],
        kernels=per_level(preset["kernels"]),
        strides=per_level(preset["strides"]),
        blocks=preset["blocks"],
        patch=preset["patch"],
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
        if config.image[1] != config.image[2] or size % config.patch:
            raise ValueError(f"images of {config.image}: need squares of a multiple of the patch")
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
        self.to_pixels = nn.Conv2d(channels, depth * config.patch**2, 1)
        self.unpatch = nn.PixelShuffle(config.patch)
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

    def likelihood(self, z: Tensor) -> Independent:
        """p(x | z_1 = z): Bernoulli over (B, C, H, W)."""
        logits = self.unpatch(self.to_pixels(F.relu(self.decoder[0](z))))
        return Independent(
            Bernoulli(logits=full_precision(logits), validate_args=False), 3, validate_args=False
        )

    def decode(self, starts: Sequence[Tensor | None], skip: str = "mean") -> Independent:
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

    def sample(self, n: int) -> Independent:
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
