"""The baselines with a class of their own: BIVA, and the adversarial autoencoder with its loss.

A plain VAE is an HVAE of one level, and IVAE is an objective of either hierarchy (rewards.py).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from likelihoods import full_precision
from models import (
    HVAE,
    LVAE,
    Config,
    FromLatent,
    Hierarchy,
    Merge,
    Network,
    ToGaussian,
    gaussian,
    he_initialisation,
    laid_out,
)
from rewards import Inference, Loss, kl_terms, reconstruction, through


def build(config: Config) -> Network:
    """The model of a configuration, initialised, on the CPU in float32."""
    model = {"hvae": HVAE, "lvae": LVAE, "biva": BIVA, "aae": AAE}[config.arch](config)
    if config.he_init:
        he_initialisation(model)
    return model.float()  # whatever the default type


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
        self.order = tuple(range(self.levels))  # of the z_l^BU, which all levels above see
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
            self.decoder.append(nn.Sequential(*self.decoder_blocks(level)))
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

    def parameter_groups(self, lr: float) -> list[dict]:
        """Adversaries turn with every step of each other, so the discriminator's momentum is 0.5,
        and it learns faster than the encoder (Heusel et al. 2017)."""
        adversary = list(self.discriminator.parameters())
        (rest,) = super().parameter_groups(lr)
        rest["params"] = rest["params"][: -len(adversary)]  # it is the last part
        return [rest, {"params": adversary, "lr": 3 * lr, "betas": (0.5, 0.999)}]

    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        posterior = self.head(self.features(x)[-1])
        z = posterior.rsample() if sample else posterior.mean
        return Inference([posterior], [self.top_prior()], [z])


def aae_loss(model: AAE, x: Tensor, weight: float = 1.0) -> Loss:
    """The adversarial autoencoder's terms in one loss, whose gradients reach one player each:

    -log p(x|z) - weight log D(z)                    the autoencoder, z of x, D as it stands
    -log D(z of the prior) - log(1 - D(z of x))      the discriminator D, z as it stands

    The KL has no part in it and is only reported.
    """
    inference = model.infer(x)
    z, prior = inference.latents[-1], inference.priors[-1].expand((len(x),)).rsample()
    fixed = {name: p.detach() for name, p in model.discriminator.named_parameters()}
    confused, real, fake = (  # log odds that z is of the prior, never below float32
        full_precision(functional_call(model.discriminator, weights, v))
        for weights, v in ((fixed, z), ({}, prior), ({}, z.detach()))
    )
    autoencoder = weight * F.softplus(-confused) - reconstruction(model, x, inference)
    discriminator = F.softplus(-real) + F.softplus(fake)
    kl = kl_terms(inference, model.order)
    return Loss((autoencoder + discriminator).mean(), kl.detach().mean(dim=1))
