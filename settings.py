"""The flags of train.py, what they are where they are not given, and what cannot be."""

import argparse
import math
import os
from pathlib import Path

import models
from data import SHAPES, image_shape
from files import Parser, UserError

UPDATES = ("stepwise", "joint", "sampled")
MAY_CHANGE = {"epochs", "data_dir", "device", "eval_every", "probe", "out"}  # on --resume

BASE = dict(  # whatever --size, --dataset and --rl
    arch="lvae", rl=False, ivae=False, gamma=0.9, skip="mean", dataset="digits", data_dir="data",
    image_size=None, unlabelled=False, threshold=False, validation=False, train_images=None,
    size="small", latents=None, levels=None, channels=None, mean_field=False, warmup=0,
    free_bits=0.0, free_bits_epochs=None, seed=0, device="auto", dtype="auto", eval_every=0,
    probe="every",
)  # fmt: skip
SMALL = dict(
    lr=1e-3, update="sampled", batch_size=128, schedule="constant", ema=0.0, pay="inferred"
)
BEST = SMALL | dict(schedule="cosine", ema=0.999)
DEEP = SMALL | dict(pay="own")
PAPER = SMALL | dict(lr=3e-4, update="joint", epochs=1000)
RECIPE = dict(warmup=200, free_bits=2.0, free_bits_epochs=400)  # of the paper, by the ELBO
# Presets of training, by --size and kind of images: for every objective; by RL or IVAE; by the ELBO
# of a hierarchy. Early on a level's KL costs more than it earns: for about 240 updates as a whole,
# for about a thousand in single units. So RL and IVAE have a warm-up, of at most half the epochs.
TRAINING = {
    ("small", "digits"): (SMALL | dict(epochs=80), dict(warmup=20), {}),
    ("small", "grey"): (SMALL | dict(epochs=20), dict(warmup=10), {}),
    ("small", "colour"): (SMALL | dict(epochs=10), dict(warmup=10), {}),
    ("best", "digits"): (BEST | dict(epochs=80), dict(warmup=20), {}),
    ("best", "grey"): (BEST | dict(epochs=40), dict(warmup=20), {}),
    ("best", "colour"): (BEST | dict(epochs=15, batch_size=32, pay="own"), dict(warmup=20), {}),
    ("deep", "digits"): (DEEP | dict(epochs=80), dict(warmup=20), {}),
    ("deep", "grey"): (DEEP | dict(epochs=20), dict(warmup=10), {}),
    ("paper", "digits"): (PAPER, dict(warmup=0), RECIPE),
    ("paper", "grey"): (PAPER, dict(warmup=0), RECIPE),
    ("paper", "colour"): (PAPER, dict(warmup=0), RECIPE),
}


def parser() -> Parser:
    # What is not given is absent: `defaults` decides it by --size, --dataset and --rl.
    p = Parser(
        description="Train a hierarchical VAE by the ELBO or by reinforcement learning.",
        argument_default=argparse.SUPPRESS,
        epilog="Where no default is named it depends on --size, --dataset and --rl. Every run "
        "prints what it takes and keeps it in config.json.",
    )
    # fmt: off
    p.add_argument("--arch", choices=models.ARCHS,
                   help="hvae: bottom-up inference; lvae: top-down (default); the baselines vae "
                   "and aae (adversarial autoencoder): one level; biva: both ways")
    p.add_argument("--rl", action="store_true", help="maximise the Q-value instead of the ELBO")
    p.add_argument("--ivae", action="store_true",
                   help="maximise the objective of the informative hierarchical VAE (Eq. 39)")
    p.add_argument("--gamma", type=float, help="discount of later rewards, 0 to 1 (default 0.9)")
    p.add_argument("--update", choices=UPDATES,
                   help="with --rl: stepwise is Algorithm 1, a step for each Q_t; joint is one for "
                   "their sum; sampled is one for an unbiased estimate of the sum, one path an "
                   "image. --ivae has the last two")
    p.add_argument("--skip", choices=("mean", "sample"),
                   help="skip paths take the priors' means (default) or a sample of each")
    p.add_argument("--pay", choices=("inferred", "own"),
                   help="what a step's reward pays: the KL of all levels inferred until then "
                   "(Eq. 24), or that of its own level alone")
    p.add_argument("--dataset", choices=tuple(SHAPES), help="default digits, never downloaded")
    p.add_argument("--data-dir", help="folder of the data sets (default data)")
    p.add_argument("--image-size", type=int,
                   help="side of the images of --dataset folder (default 32)")
    p.add_argument("--unlabelled", action="store_true",
                   help="train on the 100,000 unlabelled images of stl10")
    p.add_argument("--threshold", action="store_true",
                   help="make grey images black and white once, at half, instead of binarising "
                   "them anew at every use")
    p.add_argument("--validation", action="store_true",
                   help="measure on the last 10,000 training images, at most a fifth, or on evenly "
                   "spaced ones where classes come in order; train on the rest: to choose by")
    p.add_argument("--train-images", type=int, metavar="N",
                   help="train, and fit the probe, on the first N training images, or on "
                   "evenly spaced ones where classes come in order")
    p.add_argument("--size", choices=tuple(models.PRESETS),
                   help="paper: its network and training; small: for two CPU cores (default); "
                   "best: an hour or two on one, grey images by twice the channels, colour by "
                   "wider latents and --pay own; "
                   "deep: ten levels of 60,000 grey images, by --pay own and other initial weights")
    p.add_argument("--latents", help="bottom to top, 8 dense and 8c convolutional: 8c,64,32,16,8")
    p.add_argument("--levels", type=int,
                   help="1 to 10; other than the preset's: grey 8 dimensions at the top, "
                   "doubling downwards to at most 128; colour repeats the lowest")
    p.add_argument("--channels", type=int, help="feature maps of every layer")
    p.add_argument("--mean-field", action="store_true",
                   help="lvae without its merge: posteriors q(z_l|x) do not see the sample above")
    p.add_argument("--epochs", type=int, help="passes over the training images")
    p.add_argument("--batch-size", type=int, help="images an update")
    p.add_argument("--lr", type=float, help="Adam's learning rate")
    p.add_argument("--schedule", choices=("constant", "cosine"),
                   help="of the learning rate; cosine falls to 0 at the end")
    p.add_argument("--ema", type=float, metavar="DECAY",
                   help="measure a moving average of the weights; 0: the weights")
    p.add_argument("--warmup", type=int, help="epochs in which the KL's weight rises from 0 to 1")
    p.add_argument("--free-bits", type=float, help="nats of each level's KL that cost nothing")
    p.add_argument("--free-bits-epochs", type=int, help="epochs of free bits (default: all)")
    p.add_argument("--seed", type=int, help="of initialisation, batches and noise (default 0)")
    p.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"),
                   help="of the network's arithmetic; auto: bfloat16 where the processor has it")
    p.add_argument("--out",
                   help="the run's folder (default runs/<dataset>-<arch>[-rl|-ivae]-<seed>)")
    p.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    p.add_argument("--resume", nargs="?", const=True, metavar="RUN",
                   help="go on with RUN (or --out) from its checkpoint; --epochs may be raised")
    p.add_argument("--eval-every", type=int, metavar="N",
                   help="measure KL, ELBO and the probe of z_L (fitted on 10,000 images) every N "
                   "epochs (default 0: only at the end)")
    p.add_argument("--probe", choices=("every", "top"),
                   help="at the end: every level and all together (default), or z_L alone, which "
                   "is much sooner done")
    # fmt: on
    return p


def defaults(given: dict) -> dict:
    """A full configuration: the flags given, the rest by --size, --dataset and --rl."""
    config = BASE | given
    levels, dataset = len(network(config).latents), config["dataset"]
    kind = "digits" if dataset == "digits" else "colour" if SHAPES[dataset][0] > 1 else "grey"
    every, by_q, by_elbo = TRAINING[config["size"], kind]
    config |= every
    if config["rl"] or config["ivae"]:
        half = max(1, (config | given)["epochs"] // 2)
        config |= by_q | {"warmup": min(by_q["warmup"], half)}
    elif config["arch"] not in models.ONE_LEVEL:
        config |= by_elbo
    if config["size"] == "paper" and config["rl"]:  # as many updates
        config |= dict(update="stepwise", epochs=max(1, round(config["epochs"] / levels)))
    if config["size"] == "paper" and dataset == "tinyimagenet":
        config["batch_size"] = 64
    config |= given
    if config["free_bits_epochs"] is None:
        config["free_bits_epochs"] = config["epochs"]
    objective = "-rl" if config["rl"] else "-ivae" if config["ivae"] else ""
    config["data_dir"] = os.path.abspath(config["data_dir"])  # found from any folder
    if dataset == "folder":  # which one is part of what is trained
        dataset = Path(config["data_dir"]).resolve().name
    name = f"{dataset}-{config['arch']}{objective}-{config['seed']}"
    return {"out": f"runs/{name}", "given": given} | config


def network(config: dict) -> models.Config:
    """The configuration of a run's network; UserError for one that cannot be built."""
    keys = ("arch", "size", "latents", "levels", "channels", "mean_field")
    image = image_shape(config["dataset"], config["image_size"])
    try:
        return models.configure(image=image, **{key: config[key] for key in keys})
    except ValueError as error:
        raise UserError(str(error)) from None


def check(config: dict) -> None:
    """UserError for numbers that make no sense, and for objectives that are not defined."""
    rl, ivae, arch = config["rl"], config["ivae"], config["arch"]
    if not config["out"]:
        raise UserError("--out is empty: name a folder")
    if rl and ivae:
        raise UserError("--rl and --ivae are two objectives: choose one")
    if (rl or ivae) and arch in ("aae", "biva"):
        why = "it is trained by no ELBO" if arch == "aae" else "no level reaches x alone"
        flag = "--rl" if rl else "--ivae"
        raise UserError(f"{flag} is not defined for {arch}, since {why}: use --arch hvae or lvae")
    if ivae and config["update"] == "stepwise":
        raise UserError("--update stepwise is for --rl: --ivae takes joint or sampled")
    if not 0 <= config["ema"] < 1:
        raise UserError(f"--ema {config['ema']}: a decay lies from 0 to below 1")
    if not 0 <= config["gamma"] <= 1:
        raise UserError(f"--gamma {config['gamma']}: a discount lies from 0 to 1")
    for key in ("epochs", "batch_size", "lr", "train_images"):
        if config[key] is not None and not 0 < config[key] < math.inf:
            raise UserError(f"--{key.replace('_', '-')} {config[key]}: must be above 0")
    for key in ("warmup", "free_bits", "free_bits_epochs", "seed", "eval_every"):
        if not 0 <= config[key] < 2**32:
            raise UserError(f"--{key.replace('_', '-')} {config[key]}: choose from 0 to 2^32 - 1")


def idle(config: dict, flags: dict) -> list[str]:
    """The flags given that have no effect on this run."""
    if config["rl"]:
        return []
    useless = {"gamma", "pay"} if config["ivae"] else {"gamma", "update", "skip", "pay"}
    if config["arch"] == "aae":
        useless |= {"warmup", "free_bits", "free_bits_epochs"}
    return sorted(useless & flags.keys())


def kl_weight(config: dict, progress: float) -> tuple[float, float]:
    """The KL's weight and free bits after `progress` epochs."""
    beta = min(1.0, progress / config["warmup"]) if config["warmup"] else 1.0
    return beta, config["free_bits"] if progress < config["free_bits_epochs"] else 0.0


def rate_factor(config: dict, progress: float) -> float:
    """What --schedule makes of the learning rate after `progress` epochs."""
    if config["schedule"] == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress / config["epochs"])))
