"""Hierarchical VAEs whose inference goes level by level: HVAE (bottom-up) and LVAE (top-down).

Levels are 0-based in code and always listed bottom to top: level 0 is the paper's z_1, next to the
pixels, level L-1 is z_L. What training needs of a model is `rewards.Model`: `levels`, `order`,
`infer(x)`, `prior(level, z)` and `decode(z)`.

To understand an architecture, read `Network`, `Hierarchy` and its own class. Distributions are
torch.distributions with one batch dimension: log_prob and kl_divergence are per image, in nats.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.utils.parametrizations import weight_norm

from likelihoods import full_precision, likelihood, parameters_a_pixel
from rewards import Inference, through

# --------------------------------------------------------------------------------------------------
# Configuration


class Config(NamedTuple):
    """Everything that decides a model's parameters. Tuples go bottom to top, one entry a level."""

    arch: str  # "hvae", "lvae", "biva" or "aae"
    image: tuple[int, int, int]  # channels, height, width
    latents: tuple[str, ...]  # "8" is 8 dimensions, "8c" is 8 maps at the level's resolution
    channels: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: int  # residual blocks a level
    patch: int  # the stem cuts the image into patch x patch squares
    mean_field: bool = False  # of lvae: posteriors do not see the sample above
    he_init: bool = False  # of the weights around latents: see `he_initialisation`


PAPER = dict(kernels=(5, 3, 3, 3, 3), blocks=3, patch=1)
SMALL = dict(kernels=(3, 3, 3, 3, 3), blocks=1, patch=4)
PRESETS = {  # size, then kind of image: "large" are colour images of more than 48 pixels a side
    "paper": {
        "grey": PAPER | dict(channels=64, strides=(2, 2, 1, 1, 1), latents="128,64,32,16,8"),
        "colour": PAPER | dict(channels=256, strides=(2,) * 5, latents="128c,64c,256,128,64"),
    },
    "small": {
        "grey": SMALL | dict(channels=32, strides=(1, 2, 1, 1, 1), latents="8c,64,32,16,8"),
        "colour": SMALL | dict(channels=64, strides=(1, 2, 1, 2, 1), latents="16c,8c,128,64,64"),
    },
}
PRESETS["best"] = {
    "grey": PRESETS["small"]["grey"] | dict(channels=64),
    "colour": PRESETS["small"]["colour"] | dict(latents="16c,8c,256,128,64"),
}
PRESETS["deep"] = {
    "grey": PRESETS["small"]["grey"] | dict(latents="128," * 6 + "64,32,16,8", he_init=True)
}
PRESETS["paper"]["large"] = PRESETS["paper"]["colour"]
PRESETS["small"]["large"] = PRESETS["small"]["colour"] | dict(strides=(2, 2, 1, 2, 1))
PRESETS["best"]["large"] = PRESETS["best"]["colour"] | dict(strides=(2, 2, 1, 2, 1))
ARCHS = ("vae", "aae", "hvae", "lvae", "biva")
ONE_LEVEL = ("vae", "aae")


def latent_names(levels: int, grey: bool, preset_names: list[str]) -> list[str]:
    """The latents of a hierarchy of any depth, bottom to top.

    Grey: 8 at the top, doubling downwards and staying at 128. Colour: the preset's, counted from
    the top, its lowest repeated below.
    """
    if levels == len(preset_names):
        return preset_names
    if grey:
        return [str(min(128, 8 * 2**i)) for i in reversed(range(levels))]
    missing = levels - len(preset_names)
    return preset_names[:1] * missing + preset_names[max(0, -missing) :]


def configure(
    arch: str,
    size: str = "small",
    image: tuple[int, int, int] = (1, 28, 28),
    latents: str | None = None,
    levels: int | None = None,
    channels: int | None = None,
    mean_field: bool = False,
) -> Config:
    """The configuration of one of ARCHS at a preset size for a kind of image.

    `latents` ("8c,64,32,16,8", bottom to top) overrides the preset's; `levels` takes those of
    `latent_names`. Raises ValueError, with a message for the user, for what cannot be built.
    """
    kind = "grey" if image[0] == 1 else "colour" if image[1] <= 48 else "large"
    if kind not in PRESETS[size]:
        raise ValueError(f"--size {size} is for grey images: colour has small, best and paper")
    row = PRESETS[size][kind]
    usual = row["latents"].split(",")
    if latents is not None:
        names = [part.strip() for part in latents.split(",")]
        if levels not in (None, len(names)):
            raise ValueError(f"latents {latents!r} name {len(names)} levels, not {levels}")
    else:
        standard = 1 if arch in ONE_LEVEL else len(usual)
        names = latent_names(standard if levels is None else levels, image[0] == 1, usual)
    per_level = [  # beyond the preset's levels as its last
        tuple(row[key][min(i, len(row[key]) - 1)] for i in range(len(names)))
        for key in ("kernels", "strides")
    ]
    for name in names:
        digits = name.removesuffix("c")
        if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
            raise ValueError(f"latent {name!r} is not understood: write 8 (dense) or 8c (maps)")
    if not 1 <= len(names) <= 10:
        raise ValueError(f"{len(names)} levels: a hierarchy has 1 to 10")
    if arch in ONE_LEVEL and len(names) != 1:
        raise ValueError(f"{arch} has one level, not {len(names)}: use hvae, lvae or biva")
    if mean_field and arch != "lvae":
        raise ValueError(f"--mean-field is for lvae, whose merge it leaves out, not for {arch}")
    if channels is not None and channels < 1:
        raise ValueError(f"{channels} channels: there must be at least 1")
    if image[1] != image[2] or image[1] % row["patch"]:
        raise ValueError(
            f"images of {image[1]}x{image[2]}: --size {size} takes squares whose side is a "
            f"multiple of {row['patch']}"
        )
    return Config(
        arch="hvae" if arch == "vae" else arch,  # at one level the two are the same model
        image=tuple(image),
        latents=tuple(names),
        channels=channels or row["channels"],
        kernels=per_level[0],
        strides=per_level[1],
        blocks=row["blocks"],
        patch=row["patch"],
        mean_field=mean_field,
        he_init=row.get("he_init", False),
    )


# --------------------------------------------------------------------------------------------------
# Layers. Feature maps are (B, C, H, W), channels last in memory: convolutions are up to three times
# as fast so. C is config.channels everywhere. Latents lie as their shape says.


LAYOUT = torch.channels_last


def laid_out(features: Tensor) -> Tensor:
    return features.contiguous(memory_format=LAYOUT)


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
        out = self.second(F.relu(self.first(F.relu(x)), inplace=True))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return x + out


class ToGaussian(nn.Module):
    """Features (B, C, size, size) to a diagonal Gaussian over a latent."""

    def __init__(self, channels: int, size: int, shape: tuple[int, ...]):
        super().__init__()
        self.maps = len(shape) == 3
        if self.maps:
            self.head = nn.Conv2d(channels, 2 * shape[0], 1)
        else:
            self.head = nn.Linear(size**2 * channels, 2 * shape[0])

    def forward(self, features: Tensor) -> Independent:
        h = F.relu(features)
        h = self.head(h if self.maps else h.permute(0, 2, 3, 1).flatten(1))  # as it lies in memory
        mean, scale = full_precision(h).contiguous().chunk(2, dim=1)
        # A softplus that is 1 at 0: a new level starts near the unit Gaussian.
        scale = F.softplus(scale, beta=math.log(2)).clamp_min(1e-6)
        return gaussian(mean, scale)


class FromLatent(nn.Module):
    """A latent to features (B, C, size, size)."""

    def __init__(self, shape: tuple[int, ...], channels: int, size: int):
        super().__init__()
        self.size, self.maps = size, len(shape) == 3
        if self.maps:
            self.embed = nn.Conv2d(shape[0], channels, 1)
        else:
            self.embed = nn.Linear(shape[0], size**2 * channels)

    def forward(self, z: Tensor) -> Tensor:
        if not self.maps:
            rows = self.embed(z).unflatten(1, (self.size, self.size, -1))
            return laid_out(rows.permute(0, 3, 1, 2))
        features = self.embed(laid_out(z))
        if features.shape[-1] != self.size:  # maps of the finer level below
            features = F.adaptive_avg_pool2d(features, self.size)
        return features


class Merge(nn.Module):
    """Features of x and features of the neighbouring level's sample, together (B, C, H, W)."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.mix = conv(2 * channels, channels, 1)
        self.block = Residual(channels, kernel)

    def forward(self, features: Tensor, sample: Tensor) -> Tensor:
        return self.block(self.mix(F.relu(torch.cat([features, sample], dim=1), inplace=True)))


@torch.no_grad()
def he_initialisation(model: nn.Module) -> None:
    """Scale the initial weights into and out of latents to the variances of He et al. 2015.

    PyTorch's default has a third of them, a sixth after a ReLU: down a skip path, from mean to
    mean, what z_l says shrinks about 4.3 times a level, half a million times in ten levels.
    """
    for module in model.modules():
        if isinstance(module, FromLatent):
            module.embed.weight *= math.sqrt(3)
        elif isinstance(module, ToGaussian):  # the mean's half
            module.head.weight[: len(module.head.weight) // 2] *= math.sqrt(6)


def gaussian(mean: Tensor, scale: Tensor) -> Independent:
    """Diagonal Gaussian over all but the batch dimension. Validation would cost a sync a call."""
    normal = Normal(mean, scale, validate_args=False)
    return Independent(normal, mean.dim() - 1, validate_args=False)


# --------------------------------------------------------------------------------------------------
# What all architectures share


class Network(nn.Module):
    """Resolutions, the features of x, and the way from the lowest features to the pixels.

    Subclasses add
    infer(x, sample=True)             -> Inference of x (B, C, H, W) with values in [0, 1]. Latents
        are reparameterised samples or, with sample=False, posterior means, each given the means of
        the levels it is conditioned on: the representation of x.
    generate(latents, skip="mean")    -> p(x | z) over (B, C, H, W). Levels from the lowest up that
        are None take the means of their priors, or one sample of each (skip="sample").
    """

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

        patch, kernel = config.patch, config.kernels[0]
        if patch > 1:
            self.stem = nn.Conv2d(depth, channels, patch, stride=patch)
        else:
            self.stem = nn.Conv2d(depth, channels, kernel, padding=kernel // 2)
        # Features of x below level l to those at level l.
        self.encoder = nn.ModuleList(
            nn.Sequential(
                *(Residual(channels, kernel) for _ in range(config.blocks - 1)),
                Residual(channels, kernel, stride),
            )
            for kernel, stride in zip(config.kernels, config.strides, strict=True)
        )
        self.to_pixels = nn.Conv2d(channels, parameters_a_pixel(depth) * config.patch**2, 1)

    def decoder_blocks(self, level: int) -> list[nn.Module]:
        """The residual blocks from generative features at a level to those at the level below."""
        channels, kernel = self.config.channels, self.config.kernels[level]
        plain = (Residual(channels, kernel) for _ in range(self.config.blocks - 1))
        return [Residual(channels, kernel, size=self.sizes[level]), *plain]

    def parameter_groups(self, lr: float) -> list[dict]:
        """What an optimiser is given."""
        return [{"params": list(self.parameters()), "lr": lr}]

    @property
    def device(self) -> torch.device:
        return self.stem.weight.device

    def features(self, x: Tensor) -> list[Tensor]:
        """Deterministic features of x (B, C, H, W) in [0, 1] at every level, bottom to top."""
        h, out = laid_out(self.stem(x)), []
        for level in self.encoder:
            h = level(h)
            out.append(h)
        return out

    def pixels(self, features: Tensor) -> Distribution:
        """p(x | z) from the generative features below level 0."""
        raw = self.to_pixels(F.relu(features))
        return likelihood(raw, self.config.image[0], self.config.patch)

    def top_prior(self) -> Independent:
        """p(z_L) = N(0, I), with batch size 1."""
        zeros = self.stem.weight.new_zeros(1, *self.latent_shapes[-1])
        return gaussian(zeros, zeros + 1)

    def sample(self, n: int) -> Distribution:
        """p(x | z) for n ancestral samples of z from the prior."""
        top = self.top_prior().expand((n,)).sample()
        return self.generate([None] * (self.levels - 1) + [top], skip="sample")


# --------------------------------------------------------------------------------------------------
# The hierarchies


class Hierarchy(Network):
    """The generative model of HVAE and LVAE: p(x|z_1) p(z_1|z_2) ... p(z_L).

    It is Markov: given z_l nothing above it reaches x. That makes p(x|z_l) of Eq. 24 a skip path.
    """

    order: tuple[int, ...]  # the levels as they are inferred

    def __init__(self, config: Config):
        super().__init__(config)
        channels, shapes = config.channels, self.latent_shapes
        self.decoder = nn.ModuleList()  # z_l to features at the level below
        self.prior_heads = nn.ModuleList()  # those features to p(z_l | z_{l+1}), l < L-1
        for level, (shape, size) in enumerate(zip(shapes, self.sizes[1:], strict=True)):
            embed = FromLatent(shape, channels, size)
            self.decoder.append(nn.Sequential(embed, *self.decoder_blocks(level)))
            if level < self.levels - 1:
                self.prior_heads.append(ToGaussian(channels, size, shape))

    def prior(self, level: int, z: Tensor) -> Independent:
        """p(z_level | z_{level+1} = z)."""
        return self.prior_heads[level](self.decoder[level + 1](z))

    def decode(self, z: Tensor) -> Distribution:
        """p(x | z_1 = z)."""
        return self.pixels(self.decoder[0](z))

    def generate(self, latents: Sequence[Tensor | None], skip: str = "mean") -> Distribution:
        """See Network. Being Markov, it depends on the lowest level given alone."""
        lowest = next(level for level, z in enumerate(latents) if z is not None)
        z = latents[lowest]
        for level in reversed(range(lowest)):
            z = through(self.prior(level, z), skip)
        return self.decode(z)


class HVAE(Hierarchy):
    """Bottom-up inference (Eq. 1): q(z_1|x), then q(z_l|z_{l-1}, x) upwards.

    In the paper's terms each level is a step: from the state of x and the samples so far (Eq. 20)
    the posterior (Eq. 21) draws a sample (Eq. 22), which joins the state (Eq. 23).
    """

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
        priors = [self.prior(level, z) for level, z in enumerate(latents[1:])]
        return Inference(posteriors, [*priors, self.top_prior()], latents)


class LVAE(Hierarchy):
    """Top-down inference (Eq. 2): q(z_L|x), then q(z_l|z_{l+1}, x) downwards (Eq. 20 to 23).

    As in a ladder (Sønderby et al. 2016) the posterior merges the features of x with the
    generative features of the sample above, the same that give the prior. Without that merge
    (`mean_field`) every q(z_l|x) is of x alone, and the levels meet in the priors only.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.order = tuple(reversed(range(self.levels)))
        merged = () if config.mean_field else config.kernels[:-1]
        self.merge = nn.ModuleList(Merge(config.channels, kernel) for kernel in merged)
        self.posterior_heads = nn.ModuleList(
            ToGaussian(config.channels, size, shape)
            for size, shape in zip(self.sizes[1:], self.latent_shapes, strict=True)
        )

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        features = self.features(x)
        posteriors, priors, latents = [], [self.top_prior()], []  # top to bottom
        for level in self.order:
            h = features[level]
            if level < self.levels - 1:
                above = self.decoder[level + 1](latents[-1])
                priors.append(self.prior_heads[level](above))
                if not self.config.mean_field:
                    h = self.merge[level](h, above)
            posteriors.append(self.posterior_heads[level](h))
            latents.append(posteriors[-1].rsample() if sample else posteriors[-1].mean)
        return Inference(posteriors[::-1], priors[::-1], latents[::-1])
