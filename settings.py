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
    probe="every", lr=1e-3, update="sampled", batch_size=128, schedule="constant", ema=0.0,
    pay="inferred",
)  # fmt: skip
BEST = dict(schedule="cosine", ema=0.999)
PAPER = dict(epochs=1000, lr=3e-4, update="joint")
RECIPE = dict(warmup=200, free_bits=2.0, free_bits_epochs=400)  # of the paper, by the ELBO
# What --size and the kind of images change of BASE, and the warm-up of RL and IVAE. Early on a
# level's KL costs more than it earns: for about 240 updates as a whole, for about a thousand in
# single units. So these have a warm-up, of at most half the epochs.
TRAINING = {
    ("small", "digits"): (dict(epochs=80), 20),
    ("small", "grey"): (dict(epochs=20), 10),
    ("small", "colour"): (dict(epochs=10), 10),
    ("best", "digits"): (BEST | dict(epochs=80), 20),
    ("best", "grey"): (BEST | dict(epochs=40), 20),
    ("best", "colour"): (BEST | dict(epochs=15, batch_size=32, pay="own"), 20),
    ("deep", "digits"): (dict(epochs=80, pay="own"), 20),
    ("deep", "grey"): (dict(epochs=20, pay="own"), 10),
    **{("paper", kind): (PAPER, 0) for kind in ("digits", "grey", "colour")},
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
    a = p.add_argument_group("what to train").add_argument
    a("--arch", choices=models.ARCHS,
      help="hvae infers bottom-up, lvae (default) top-down, biva both ways. vae and aae, "
      "the adversarial autoencoder, have one level.")
    a("--rl", action="store_true", help="Maximise the Q-value instead of the ELBO.")
    a("--ivae", action="store_true",
      help="Maximise the objective of the informative hierarchical VAE (Eq. 39).")
    a("--gamma", type=float, help="Later rewards are discounted by this, 0 to 1 (default 0.9).")
    a("--update", choices=UPDATES,
      help="stepwise is Algorithm 1, with a step for each Q_t. joint makes one step for their sum. "
      "sampled makes one for an unbiased estimate of the sum, with one path an image.")
    a("--skip", choices=("mean", "sample"),
      help="Skip paths take the priors' means (default) or a sample of each.")
    a("--pay", choices=("inferred", "own"),
      help="A step's reward pays the KL of all levels inferred until then (Eq. 24), or that of its "
      "own level alone.")
    a = p.add_argument_group("data").add_argument
    a("--dataset", choices=tuple(SHAPES), help="The default is digits, which needs no download.")
    a("--data-dir", help="The data sets lie in this folder (default data).")
    a("--image-size", type=int,
      help="The images of --dataset folder get this side (default 32).")
    a("--unlabelled", action="store_true",
      help="Train on the 100,000 unlabelled images of stl10.")
    a("--threshold", action="store_true",
      help="Make grey images black and white once, at half, instead of binarising them anew at "
      "every use.")
    a("--validation", action="store_true",
      help="Measure on the last 10,000 training images, at most a fifth, and train on the rest. "
      "Where classes come in order, evenly spaced images are taken.")
    a("--train-images", type=int, metavar="N",
      help="Train, and fit the probe, on the first N training images. Where classes come in order, "
      "evenly spaced images are taken.")
    a = p.add_argument_group("network").add_argument
    a("--size", choices=tuple(models.PRESETS),
      help="small (default) suits two CPU cores. best takes an hour or two on one. deep has ten "
      "levels, for 60,000 grey images. paper is the paper's network and training.")
    a("--latents",
      help="Name the latents from the bottom up, 8 dense and 8c convolutional: 8c,64,32,16,8.")
    a("--levels", type=int,
      help="Take 1 to 10 levels. Grey ones have 8 dimensions at the top, doubling downwards to at "
      "most 128; colour repeats the lowest.")
    a("--channels", type=int, help="Every layer has so many feature maps.")
    a("--mean-field", action="store_true",
      help="Leave out the merge of lvae: its posteriors q(z_l|x) do not see the sample above.")
    a = p.add_argument_group("training").add_argument
    a("--epochs", type=int, help="Pass so many times over the training images.")
    a("--batch-size", type=int, help="Take so many images an update.")
    a("--lr", type=float, help="Adam has this learning rate.")
    a("--schedule", choices=("constant", "cosine"),
      help="The learning rate stays, or falls to 0 at the end.")
    a("--ema", type=float, metavar="DECAY",
      help="Measure a moving average of the weights; 0 measures the weights.")
    a("--warmup", type=int, help="The KL's weight rises from 0 to 1 in so many epochs.")
    a("--free-bits", type=float, help="So many nats of each level's KL cost nothing.")
    a("--free-bits-epochs", type=int, help="Free bits end after so many epochs (default: never).")
    a("--seed", type=int, help="It decides initialisation, batches and noise (default 0).")
    a("--device", help="Choose auto (default), cpu, cuda or cuda:N.")
    a("--dtype", choices=("auto", "float32", "bfloat16"),
      help="The network computes in this; auto is bfloat16 where the processor has it.")
    a = p.add_argument_group("run and evaluation").add_argument
    a("--out", help="The run's folder (default runs/<dataset>-<arch>[-rl|-ivae]-<seed>).")
    a("--overwrite", action="store_true", help="Replace the run that --out holds.")
    a("--resume", nargs="?", const=True, metavar="RUN",
      help="Go on with RUN, or --out, from its checkpoint; --epochs may be raised.")
    a("--eval-every", type=int, metavar="N",
      help="Measure KL, ELBO and the probe of z_L, fitted on 10,000 images, every N epochs "
      "(default 0: only at the end).")
    a("--probe", choices=("every", "top"),
      help="Probe every level and all together at the end (default), or z_L alone, much sooner.")
    # fmt: on
    return p


def defaults(given: dict) -> dict:
    """A full configuration: the flags given, the rest by --size, --dataset and --rl."""
    config = BASE | given
    levels, dataset = len(network(config).latents), config["dataset"]
    kind = "digits" if dataset == "digits" else "colour" if SHAPES[dataset][0] > 1 else "grey"
    changed, warmup = TRAINING[config["size"], kind]
    config |= changed
    if config["rl"] or config["ivae"]:
        config["warmup"] = min(warmup, max(1, (config | given)["epochs"] // 2))
    elif config["size"] == "paper" and config["arch"] not in models.ONE_LEVEL:
        config |= RECIPE
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
