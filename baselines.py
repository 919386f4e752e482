"""The baselines with a class of their own: BIVA, and the adversarial autoencoder with its losses.

A plain VAE is an HVAE of one level, and IVAE is an objective of either hierarchy (rewards.py).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from likelihoods import full_precision
from models import (
    HVAE,
    LVAE,
    Config,
    FromLatent,
    Hierarchy,
    Inference,
    Merge,
    Network,
    ToGaussian,
    gaussian,
    keep_scale,
    laid_out,
)
from rewards import Loss, level_kl, reconstruction, through


def build(config: Config) -> Network:
    """The model of a configuration, initialised, on the CPU in float32."""
    model = {"hvae": HVAE, "lvae": LVAE, "biva": BIVA, "aae": AAE}[config.arch](config)
    if config.keep_scale:
        keep_scale(model)
    return model


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
        features, up, z_up = [], [], []
        for level in range(self.levels):
            if level > 0:
                h = self.up_merge[level - 1](h, self.up_embed[level - 1](z_up[-1]))
            h = self.encoder[level](h)
            features.append(h)
            up.append(self.up_heads[level](h))
            z_up.append(up[-1].rsample() if sample else up[-1].mean)

        posteriors, priors, latents, above = [up[-1]], [self.top_prior()], [z_up[-1]], None
        for level in reversed(range(self.levels - 1)):
            above = self.down(level + 1, above, latents[-1])
            down = self.down_heads[level](self.posterior_merge[level](features[level], above))
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
        above = None
        for level in reversed(range(self.levels)):
            z = latents[level]
            if z is None:
                z = through(self.prior_heads[level](above), skip)
            above = self.down(level, above, z)
        return self.pixels(above)


class AAE(Hierarchy):
    """Adversarial autoencoder (Makhzani et al. 2015): one level. A discriminator keeps its
    posteriors together at the prior, where a KL would keep each of them.

    q(z|x) is Gaussian, the second of that paper's three encoders. So KL, ELBO and mutual
    information are defined as of the others, though nothing trains the first two.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.order = (0,)
        self.head = ToGaussian(config.channels, self.sizes[1], self.latent_shapes[0])
        self.discriminator = nn.Sequential(  # z to the log odds that it is of the prior
            nn.Flatten(),
            nn.Linear(math.prod(self.latent_shapes[0]), 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
            nn.Flatten(0),
        )

    def phases(self, lr: float) -> list[dict]:
        """Adam's options for each of the three losses below. Adversaries turn with every step of
        each other, so their momentum is 0.5; the discriminator's rate is ten times the encoder's
        against it (Heusel et al. 2017)."""
        encoder = [p for part in (self.stem, self.encoder, self.head) for p in part.parameters()]
        decoder = [p for part in (self.decoder, self.to_pixels) for p in part.parameters()]
        return [
            {"params": encoder + decoder, "lr": lr},
            {"params": list(self.discriminator.parameters()), "lr": 3 * lr, "betas": (0.5, 0.999)},
            {"params": encoder, "lr": 0.3 * lr, "betas": (0.5, 0.999)},
        ]

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        posterior = self.head(self.features(x)[-1])
        z = posterior.rsample() if sample else posterior.mean
        return Inference([posterior], [self.top_prior()], [z])


# --------------------------------------------------------------------------------------------------
# The adversarial autoencoder's losses. The KL has no part in them and is only reported.


def reconstruction_loss(model, x: Tensor) -> Loss:
    """-log p(x|z), for encoder and decoder."""
    inference = model.infer(x)
    value = -reconstruction(model, x, inference).mean()
    return Loss(value, level_kl(inference).detach().mean(dim=1))


def discriminator_loss(model, x: Tensor) -> Loss:
    """-log D(z of the prior) - log(1 - D(z of x)), for the discriminator D."""
    inference = model.infer(x)
    z, prior = inference.latents[-1].detach(), inference.priors[-1].expand((len(x),)).rsample()
    value = F.softplus(-odds(model, prior)).mean() + F.softplus(odds(model, z)).mean()
    return Loss(value, level_kl(inference).detach().mean(dim=1))


def confusion_loss(model, x: Tensor) -> Loss:
    """-log D(z of x), for the encoder: its z shall pass for the prior's."""
    inference = model.infer(x)
    value = F.softplus(-odds(model, inference.latents[-1])).mean()
    return Loss(value, level_kl(inference).detach().mean(dim=1))


def odds(model, z: Tensor) -> Tensor:
    """(B,): log D(z) / (1 - D(z)), never below float32."""
    return full_precision(model.discriminator(z))


AAE_LOSSES = reconstruction_loss, discriminator_loss, confusion_loss  # in the order of `phases`
