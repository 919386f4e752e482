"""Hierarchical VAEs whose inference goes level by level, and the baselines.

Levels are 0-based in code and always listed bottom to top: level 0 is the paper's z_1, next to the
pixels, level L-1 is z_L. What an ELBO and the evaluation need of a model:

    levels             L
    infer(x)           posteriors, priors and latents of all levels, bottom to top
    generate(latents)  p(x | z); levels from the lowest up that are None come from their priors

`HVAE` and `LVAE` are Markov, given z_l nothing above it reaches x, and offer more, which is what
reinforcement learning needs (see rewards.py):

    order              the levels in the order in which they are inferred
    decode(starts)     any set of levels to the pixels along their skip paths, in one descent

Each architecture is `Network` or `Hierarchy` and one class: to understand one, read those and none
of the others. Distributions are torch.distributions with one batch dimension: log_prob and
kl_divergence are per image, in nats. For p(x | z) see likelihoods.py.
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
PRESETS["best"] = {"grey": PRESETS["small"]["grey"] | dict(channels=64)}
MAX_LEVELS = 10
ARCHS = ("vae", "aae", "hvae", "lvae", "biva")
ONE_LEVEL = ("vae", "aae")


def preset(size: str, image: tuple[int, int, int]) -> dict:
    """The row of PRESETS for a size and a kind of image (channels, height, width); ValueError where
    there is none."""
    kind = "grey" if image[0] == 1 else "colour" if image[1] <= 48 else "large"
    if kind not in PRESETS[size]:
        raise ValueError(f"--size {size} is for grey images: take small or paper for colour")
    return PRESETS[size][kind]


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
    mean_field: bool = False,
) -> Config:
    """The configuration of one of ARCHS at a preset size for a kind of image.

    `latents` ("8c,64,32,16,8", bottom to top) overrides the preset's, `levels` gives those of
    `latent_names`. Those of ONE_LEVEL have the preset's top one.
    Raises ValueError, with a message for the user, for what cannot be built.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}: choose {', '.join(ARCHS)}")
    if size not in PRESETS:
        raise ValueError(f"unknown size {size!r}: choose {', '.join(PRESETS)}")
    row = preset(size, image)
    if latents is not None:
        names = tuple(part.strip() for part in latents.split(","))
        if levels not in (None, len(names)):
            raise ValueError(f"latents {latents!r} name {len(names)} levels, not {levels}")
    else:
        if levels is None:
            levels = 1 if arch in ONE_LEVEL else len(row["latents"])
        names = latent_names(levels, image[0] == 1, row["latents"])
    if mean_field and arch != "lvae":
        raise ValueError(f"--mean-field is for lvae, whose merge it leaves out, not for {arch}")
    if not 1 <= len(names) <= MAX_LEVELS:
        raise ValueError(f"{len(names)} levels: a hierarchy has 1 to {MAX_LEVELS}")
    if arch in ONE_LEVEL and len(names) != 1:
        raise ValueError(f"{arch} has one level, not {len(names)}: use hvae, lvae or biva")
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
        mean_field=mean_field,
    )


def build(config: Config) -> "Network":
    """The model of a configuration, default initialisation, on the CPU in float32."""
    return {"hvae": HVAE, "lvae": LVAE, "biva": BIVA, "aae": AAE}[config.arch](config)


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
            # There is no padding to count, but unless told so, compiled gradients of the last row
            # and column come out wrong where the size is odd (pytorch/pytorch#198119).
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
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

    def forward(self, of_x: Tensor, of_sample: Tensor) -> Tensor:
        return self.block(self.mix(F.relu(torch.cat([of_x, of_sample], dim=1), inplace=True)))


def gaussian(mean: Tensor, scale: Tensor) -> Independent:
    """Diagonal Gaussian over all but the batch dimension. Validation would cost a sync a call."""
    normal = Normal(mean, scale, validate_args=False)
    return Independent(normal, mean.dim() - 1, validate_args=False)


# --------------------------------------------------------------------------------------------------
# What all architectures share


class Inference(NamedTuple):
    """One pass of the encoder; lists go bottom to top."""

    posteriors: list[Independent]  # of z_l, given x and the samples that it is conditioned on
    priors: list[Independent]  # of z_l, given the samples above; the top one has batch size 1
    latents: list[Tensor]  # z_l, (B, D) or (B, D, H, W)
    pixels: Distribution | None = None  # p(x | all latents), where the pass came by it


class Network(nn.Module):
    """Resolutions, the features of x, and the way from the lowest features to the pixels.

    Subclasses add posteriors and priors: `infer` and `generate`.
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

        self.stem = nn.Conv2d(
            depth,
            channels,
            kernel_size=config.patch if config.patch > 1 else config.kernels[0],
            stride=config.patch,
            padding=0 if config.patch > 1 else config.kernels[0] // 2,
        )
        # Features of x below level l to those at level l.
        self.encoder = nn.ModuleList(
            nn.Sequential(
                *(Residual(channels, kernel) for _ in range(config.blocks - 1)),
                Residual(channels, kernel, stride),
            )
            for kernel, stride in zip(config.kernels, config.strides, strict=True)
        )
        self.to_pixels = nn.Conv2d(channels, parameters_a_pixel(depth) * config.patch**2, 1)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def going_down(self, level: int) -> list[nn.Module]:
        """The residual blocks from generative features at a level to those at the level below."""
        channels, kernel = self.config.channels, self.config.kernels[level]
        plain = (Residual(channels, kernel) for _ in range(self.config.blocks - 1))
        return [Residual(channels, kernel, size=self.sizes[level]), *plain]

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
        zeros = self.zero.expand(1, *self.latent_shapes[-1])
        return gaussian(zeros, zeros + 1)

    def sample(self, n: int) -> Distribution:
        """p(x | z) for n ancestral samples of z from the prior."""
        top = self.top_prior().expand((n,)).sample()
        return self.generate([None] * (self.levels - 1) + [top], skip="sample")

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        """Posteriors, priors and latents of x (B, C, H, W) with values in [0, 1].

        Latents are reparameterised samples; with `sample=False` they are the posterior means,
        each given the means of the levels it is conditioned on: the representation of x.
        """
        raise NotImplementedError

    def generate(self, latents: Sequence[Tensor | None], skip: str = "mean") -> Distribution:
        """p(x | z) over (B, C, H, W). Of the levels, those from the lowest up may be None: they are
        the means of their priors (`skip="mean"`) or one sample of each ("sample")."""
        raise NotImplementedError


def through(prior: Independent, skip: str) -> Tensor:
    """What a skip path takes from a prior on its way down: the mean, or one sample."""
    if skip not in ("mean", "sample"):
        raise ValueError(f"unknown skip {skip!r}: choose mean or sample")
    return prior.mean if skip == "mean" else prior.rsample()


# --------------------------------------------------------------------------------------------------
# The hierarchies


class Hierarchy(Network):
    """The generative model of HVAE and LVAE: p(x|z_1) p(z_1|z_2) ... p(z_L).

    It is Markov: given z_l nothing above it reaches x, which is what makes p(x|z_l) a skip path.
    """

    order: tuple[int, ...]  # in which the levels are inferred

    def __init__(self, config: Config):
        super().__init__(config)
        channels, shapes = config.channels, self.latent_shapes
        self.decoder = nn.ModuleList()  # z_l to features at the level below
        self.prior_heads = nn.ModuleList()  # those features to p(z_l | z_{l+1}), l < L-1
        for level, (shape, size) in enumerate(zip(shapes, self.sizes[1:], strict=True)):
            embed = FromLatent(shape, channels, size)
            self.decoder.append(nn.Sequential(embed, *self.going_down(level)))
            if level < self.levels - 1:
                self.prior_heads.append(ToGaussian(channels, size, shape))

    def top_down(self, level: int, above: Tensor | None) -> tuple[Tensor | None, Independent]:
        """Features of the sample above at `level`, and the prior they give: p(z_l | z_{l+1})."""
        if level == self.levels - 1:
            return None, self.top_prior()
        features = self.decoder[level + 1](above)
        return features, self.prior_heads[level](features)

    def prior(self, level: int, above: Tensor | None = None) -> Independent:
        """p(z_l | z_{l+1} = above); at the top N(0, I) with batch size 1, `above` unused."""
        return self.top_down(level, above)[1]

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z_1 = z) over (B, C, H, W)."""
        return self.pixels(self.decoder[0](z))

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

    def generate(self, latents: Sequence[Tensor | None], skip: str = "mean") -> Distribution:
        """See Network. Being Markov, it is the skip path of the lowest level given."""
        lowest = next((level for level, z in enumerate(latents) if z is not None), None)
        if lowest is None:
            raise ValueError("generate: every latent is None")
        return self.decode(
            [z if level == lowest else None for level, z in enumerate(latents)], skip
        )


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
        features, z = self.features(x), None
        posteriors, priors, latents = [], [], []  # top to bottom
        for level in self.order:
            h = features[level]
            of_sample, prior = self.top_down(level, z)
            if of_sample is not None and not self.config.mean_field:
                h = self.merge[level](h, of_sample)
            posterior = self.posterior_heads[level](h)
            z = posterior.rsample() if sample else posterior.mean
            posteriors.append(posterior)
            priors.append(prior)
            latents.append(z)
        return Inference(posteriors[::-1], priors[::-1], latents[::-1])


# --------------------------------------------------------------------------------------------------
# Baselines that are no Markov hierarchies


class BIVA(Network):
    """Bidirectional inference (Maaløe et al. 2019): every level but the top has two latents, z_l =
    (z_l^BU, z_l^TD), held in one tensor, first the one and then the other.

    p(x, z) = p(x|z_1..z_L) prod p(z_l^BU|z_>l) p(z_l^TD|z_>l) p(z_L)
    q(z|x) = q(z_L|x, z_<L^BU) prod q(z_l^BU|x, z_<l^BU) q(z_l^TD|x, z_<l^BU, z_>l)

    Deterministic features that go up past the z^BU carry x and all of these below, deterministic
    features that go down past the z_l carry all latents above: its skip connections. So no level
    reaches x alone, and reinforcement learning's skip paths are not defined.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        channels, shapes, sizes = config.channels, self.latent_shapes, self.sizes[1:]
        self.latent_shapes = [(2 * d, *maps) for d, *maps in shapes[:-1]] + shapes[-1:]
        # Upwards, for q(z_l^BU) and q(z_L).
        self.up_heads = nn.ModuleList(
            ToGaussian(channels, size, shape) for size, shape in zip(sizes, shapes, strict=True)
        )
        self.up_embed, self.up_merge = nn.ModuleList(), nn.ModuleList()  # z_l^BU into the features
        # Downwards: z_l into the features, these to the level below, p(z_l) and q(z_l^TD) of them.
        self.down_embed, self.down_merge = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.prior_heads = nn.ModuleList(), nn.ModuleList()
        self.posterior_merge, self.down_heads = nn.ModuleList(), nn.ModuleList()
        for level, kernel in enumerate(config.kernels):
            size, shape, both = sizes[level], shapes[level], self.latent_shapes[level]
            self.down_embed.append(FromLatent(both, channels, size))
            self.decoder.append(nn.Sequential(*self.going_down(level)))
            if level < self.levels - 1:
                self.up_embed.append(FromLatent(shape, channels, size))
                self.up_merge.append(Merge(channels, kernel))
                self.down_merge.append(Merge(channels, kernel))
                self.prior_heads.append(ToGaussian(channels, size, both))
                self.posterior_merge.append(Merge(channels, kernel))
                self.down_heads.append(ToGaussian(channels, size, shape))

    def down(self, level: int, features: Tensor | None, z: Tensor) -> Tensor:
        """Features of all levels above `level`, and z_l, to the features at the level below."""
        h = self.down_embed[level](z)
        if features is not None:
            h = self.down_merge[level](features, h)
        return self.decoder[level](h)

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        h = laid_out(self.stem(x))
        of_x, up, z_up = [], [], []
        for level in range(self.levels):
            if level > 0:
                h = self.up_merge[level - 1](h, self.up_embed[level - 1](z_up[-1]))
            h = self.encoder[level](h)
            of_x.append(h)
            up.append(self.up_heads[level](h))
            z_up.append(up[-1].rsample() if sample else up[-1].mean)

        posteriors, priors, latents, above = [up[-1]], [self.top_prior()], [z_up[-1]], None
        for level in reversed(range(self.levels - 1)):
            above = self.down(level + 1, above, latents[-1])
            down = self.down_heads[level](self.posterior_merge[level](of_x[level], above))
            z_down = down.rsample() if sample else down.mean
            mean, scale = (
                torch.cat([getattr(q.base_dist, name) for q in (up[level], down)], dim=1)
                for name in ("loc", "scale")
            )
            posteriors.append(gaussian(mean, scale))
            priors.append(self.prior_heads[level](above))
            latents.append(torch.cat([z_up[level], z_down], dim=1))
        pixels = self.pixels(self.down(0, above, latents[-1]))
        return Inference(posteriors[::-1], priors[::-1], latents[::-1], pixels)

    def generate(self, latents: Sequence[Tensor | None], skip: str = "mean") -> Distribution:
        if latents[-1] is None:
            raise ValueError("generate: the top latent is None")
        above = None
        for level in reversed(range(self.levels)):
            z = latents[level]
            if z is None:
                z = through(self.prior_heads[level](above), skip)
            above = self.down(level, above, z)
        return self.pixels(above)


class AAE(Hierarchy):
    """Adversarial autoencoder (Makhzani et al. 2015): one level, whose posteriors together a
    discriminator keeps at the prior, instead of the KL each of them.

    q(z|x) is Gaussian, the second of the three encoders of that paper, so that KL, ELBO and mutual
    information are defined of it as of the others, though nothing trains the first two.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.order = (0,)
        self.head = ToGaussian(config.channels, self.sizes[1], self.latent_shapes[0])
        width = 256
        self.discriminator = nn.Sequential(  # z to the log odds that it is of the prior
            nn.Flatten(),
            nn.Linear(math.prod(self.latent_shapes[0]), width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
            nn.Flatten(0),
        )

    def phases(self) -> list[list[nn.Parameter]]:
        """What each of its three losses moves, in their order in rewards.py: the autoencoder, the
        discriminator, the encoder."""
        encoder = [p for part in (self.stem, self.encoder, self.head) for p in part.parameters()]
        decoder = [p for part in (self.decoder, self.to_pixels) for p in part.parameters()]
        return [encoder + decoder, list(self.discriminator.parameters()), encoder]

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        posterior = self.head(self.features(x)[-1])
        z = posterior.rsample() if sample else posterior.mean
        return Inference([posterior], [self.top_prior()], [z])
