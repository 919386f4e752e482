"""Train a hierarchical VAE by the ELBO or by reinforcement learning.

python train.py --arch lvae --rl --gamma 0.9
python train.py --arch hvae --rl --dataset fashionmnist --out runs/mine
python train.py --resume runs/mine
torchrun --nproc-per-node 2 train.py --arch lvae --rl
python train.py --bench --arch lvae --dataset fashionmnist
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import evaluate
import models
import parallel
import rewards
from data import (
    DATASETS,
    SHAPES,
    Data,
    image_shape,
    keep_freed_memory,
    observed,
    pick_dtype,
    place,
    shuffled,
    take,
)
from evaluate import CHECKPOINT, FORMAT
from files import UserError, writing

UPDATES = ("stepwise", "joint", "sampled")
CHECK_EVERY = 20  # updates between looks at the losses: each look waits for the device

# --------------------------------------------------------------------------------------------------
# Flags and their defaults


def parser() -> evaluate.Parser:
    # What is not given is absent: `defaults` decides it by --size, --dataset and --rl.
    p = evaluate.Parser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS,
        epilog="Where no default is named it depends on --size, --dataset and --rl; every run "
        "prints what it takes and keeps it in config.json.",
    )  # fmt: skip
    # fmt: off
    p.add_argument("--arch", choices=models.ARCHS,
                   help="hvae: bottom-up; lvae: top-down inference (default lvae); the baselines "
                   "vae and aae (adversarial autoencoder): one level; biva: both ways")
    p.add_argument("--rl", action="store_true", help="maximise the Q-value instead of the ELBO")
    p.add_argument("--ivae", action="store_true",
                   help="or the objective of the informative hierarchical VAE (Eq. 39)")
    p.add_argument("--gamma", type=float, help="discount of later rewards, 0 to 1 (default 0.9)")
    p.add_argument("--update", choices=UPDATES,
                   help="with --rl: one step for each Q_t, inferring afresh (Algorithm 1); one for "
                   "their sum; or one for an unbiased sample of the sum, one path an image. "
                   "--ivae has the last two")
    p.add_argument("--skip", choices=("mean", "sample"),
                   help="skip paths take the priors' means, or a sample of each (default mean)")
    p.add_argument("--pay", choices=("inferred", "own"),
                   help="what a step's reward pays: the KL of all levels inferred until then "
                   "(Eq. 24, the default), or that of its own level alone")
    p.add_argument("--dataset", choices=DATASETS, help="default digits, which is no download")
    p.add_argument("--data-dir", help="folder of the data sets (default data)")
    p.add_argument("--image-size", type=int, help="side of the images of --dataset folder "
                   "(default 32): the middle square of each is resized to it")
    p.add_argument("--unlabelled", action="store_true",
                   help="train on the 100,000 unlabelled images of --dataset stl10")
    p.add_argument("--threshold", action="store_true",
                   help="grey images in black and white once and for all, at half, instead of "
                   "binarised anew at every use")
    p.add_argument("--device-data", choices=("auto", "on", "off"),
                   help="images live in the device's memory (on) or go there batch by batch (off); "
                   "auto: on where they take a quarter of its free memory at most")
    p.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument("--size", choices=tuple(models.PRESETS),
                   help="paper: its network and training; small: for two CPU cores; best: the most "
                   "that they reach in 60 minutes, on grey images (default small)")
    p.add_argument("--latents", help="bottom to top, 8 dense and 8c convolutional: 8c,64,32,16,8")
    p.add_argument("--levels", type=int,
                   help="1 to 10: 8 dimensions at the top, doubling downwards to at most 128")
    p.add_argument("--channels", type=int, help="feature maps of every layer")
    p.add_argument("--mean-field", action="store_true",
                   help="lvae without its merge: posteriors q(z_l|x) that do not see the sample "
                   "above")
    p.add_argument("--epochs", type=int, help="passes over the training images")
    p.add_argument("--minutes", type=float,
                   help="or train for so long, to the end of the nearest epoch")
    p.add_argument("--batch-size", type=int, help="images an update (default 128)")
    p.add_argument("--lr", type=float, help="Adam's learning rate")
    p.add_argument("--schedule", choices=("constant", "cosine"),
                   help="of the learning rate; cosine falls to 0 at the end (default constant)")
    p.add_argument("--ema", type=float,
                   help="measure a moving average of the weights, of this decay: 0.999 (default "
                   "0, the weights themselves)")
    p.add_argument("--warmup", type=int, help="epochs in which the KL's weight rises from 0 to 1")
    p.add_argument("--free-bits", type=float, help="nats of each level's KL that cost nothing")
    p.add_argument("--free-bits-epochs", type=int, help="epochs of free bits (default: all)")
    p.add_argument("--seed", type=int, help="of initialisation, batches and noise (default 0)")
    p.add_argument("--out",
                   help="the run's folder (default runs/<dataset>-<arch>[-rl|-ivae]-<seed>)")
    p.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    p.add_argument("--resume", nargs="?", const=True, metavar="RUN",
                   help="go on with RUN (or --out) from its checkpoint; --epochs may be raised")
    p.add_argument("--eval-every", type=int,
                   help="epochs between measures of the test split: KL, ELBO, and the probe of z_L "
                   "fitted on 10,000 training images (default 0: only at the end)")
    p.add_argument("--probe", choices=evaluate.PROBES,
                   help="at the end: of every level and of all together (default), or of z_L "
                   "alone, which is much sooner done")
    p.add_argument("--save-every", type=float, help="seconds between checkpoints (default 60)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"),
                   help="of the network's arithmetic; auto is bfloat16 where the processor has it")
    p.add_argument("--compile", action="store_true",
                   help="compile each update, on CUDA with CUDA graphs: a minute at the start")
    p.add_argument("--accumulate", type=int, metavar="N",
                   help="take every batch in N parts, one after another, for little memory")
    p.add_argument("--train-images", type=int, metavar="N",
                   help="train, and fit the probe, on the first N training images")
    p.add_argument("--bench", action="store_true",
                   help="train nothing: time every kind of update beside the literal Algorithm 1")
    p.add_argument("--json", action="store_true", help="with --bench: one line of JSON")
    # fmt: on
    return p


MAY_CHANGE = {
    "epochs",
    "minutes",
    "data_dir",
    "device",
    "device_data",
    "eval_every",
    "probe",
    "save_every",
    "out",
    "compile",
    "accumulate",
}  # on --resume


def defaults(given: dict) -> dict:
    """A full configuration: the flags given, the rest by --size, --dataset and --rl."""
    config = dict(
        arch="lvae", rl=False, ivae=False, gamma=0.9, skip="mean", pay="inferred", dataset="digits",
        data_dir="data", image_size=None, unlabelled=False, threshold=False, device="auto",
        device_data="auto", size="small", latents=None, levels=None, channels=None,
        mean_field=False, batch_size=128, warmup=0, free_bits=0.0, free_bits_epochs=None, seed=0,
        eval_every=0, probe="every", save_every=60.0, dtype="auto", compile=False, accumulate=1,
        train_images=None, minutes=None, schedule="constant", ema=0.0,
    )  # fmt: skip
    config |= given
    if config["size"] == "paper":
        levels = len(network(config).latents)
        config |= dict(lr=3e-4, update="stepwise" if config["rl"] else "joint", epochs=1000)
        if config["dataset"] == "tinyimagenet":
            config["batch_size"] = 64
        if config["rl"]:
            config["epochs"] = max(1, round(1000 / levels))
        elif not config["ivae"] and config["arch"] not in models.ONE_LEVEL:
            config |= dict(warmup=200, free_bits=2.0, free_bits_epochs=400)
    else:
        digits, colour = config["dataset"] == "digits", SHAPES[config["dataset"]][0] > 1
        best = config["size"] == "best"
        epochs, warmup = (40, 20) if best else (20, 10)  # of grey images but digits
        config |= dict(lr=1e-3, update="sampled", epochs=80 if digits else 10 if colour else epochs)
        if best:
            config |= dict(schedule="cosine", ema=0.999)
        if config["rl"] or config["ivae"]:
            # The decoder is slow to listen, and until it does the KL would win at the top: in
            # some 240 updates over the whole level, in some thousand over some of its units.
            half = max(1, (config | given)["epochs"] // 2)
            config["warmup"] = 20 if digits else 1 if colour else min(warmup, half)
    if config["minutes"] is not None:
        config["epochs"] = 1_000_000
    config |= given
    if config["free_bits_epochs"] is None:
        config["free_bits_epochs"] = config["epochs"]
    objective = "-rl" if config["rl"] else "-ivae" if config["ivae"] else ""
    name = f"{config['dataset']}-{config['arch']}{objective}-{config['seed']}"
    return {"out": f"runs/{name}"} | config


def network(config: dict) -> models.Config:
    keys = ("arch", "size", "latents", "levels", "channels", "mean_field")
    image = image_shape(config["dataset"], config["image_size"])
    try:
        return models.configure(image=image, **{k: config[k] for k in keys})
    except ValueError as error:
        raise UserError(str(error)) from None


def check(config: dict) -> None:
    """UserError for numbers that make no sense, and for objectives that are not defined."""
    if config["rl"] and config["ivae"]:
        raise UserError("--rl and --ivae are two objectives: choose one")
    if (config["rl"] or config["ivae"]) and config["arch"] in ("aae", "biva"):
        flag, arch = "--rl" if config["rl"] else "--ivae", config["arch"]
        why = "it is trained by no ELBO" if arch == "aae" else "no level reaches x alone"
        raise UserError(f"{flag} is not defined for {arch}, since {why}: use --arch hvae or lvae")
    if config["ivae"] and config["update"] == "stepwise":
        raise UserError("--update stepwise is for --rl: --ivae takes joint or sampled")
    if not 0 <= config["ema"] < 1:
        raise UserError(f"--ema {config['ema']}: a decay lies from 0 to below 1")
    if not 0 <= config["gamma"] <= 1:
        raise UserError(f"--gamma {config['gamma']}: a discount lies from 0 to 1")
    for key in ("epochs", "minutes", "batch_size", "lr", "accumulate", "train_images"):
        if config[key] is not None and not 0 < config[key] < math.inf:
            raise UserError(f"--{key.replace('_', '-')} {config[key]}: must be above 0")
    if config["seed"] >= 2**32:
        raise UserError(f"--seed {config['seed']}: must be below 2^32")
    for key in ("warmup", "free_bits", "free_bits_epochs", "seed", "eval_every", "save_every"):
        if not 0 <= config[key] < math.inf:
            raise UserError(f"--{key.replace('_', '-')} {config[key]}: must not be negative")


# --------------------------------------------------------------------------------------------------
# The state of a run


class Run:
    """Model, optimiser and where training stands; kept in checkpoint.pt."""

    PLAIN = ("epoch", "batch", "update", "seconds", "epoch_seconds", "metrics_bytes")

    def __init__(self, config: dict, device: torch.device):
        self.config, self.device, self.folder = config, device, Path(config["out"])
        torch.manual_seed(config["seed"])
        self.model = models.build(network(config)).to(device)
        parts, settings = [list(self.model.parameters())], [{"lr": config["lr"]}]
        if isinstance(self.model, models.AAE):
            # Adversaries turn with every step of each other, so half the momentum. The
            # discriminator is faster than the encoder that follows it (Heusel et al. 2017), and
            # that one slower than the decoder that has to follow in turn.
            parts = self.model.phases()
            settings += [
                {"lr": 3 * config["lr"], "betas": (0.5, 0.999)},
                {"lr": 0.3 * config["lr"], "betas": (0.5, 0.999)},
            ]
        self.optimizers = [
            torch.optim.Adam(p, fused=True, **s) for p, s in zip(parts, settings, strict=True)
        ]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.averaged = None
        if config["ema"]:
            average = get_ema_multi_avg_fn(config["ema"])
            self.averaged = AveragedModel(self.model, multi_avg_fn=average)
        self.epoch = self.batch = self.update = 0  # the batch to come; the updates made
        self.seconds = 0.0  # of training, evaluation left out
        self.epoch_seconds = 0.0  # of these, until the epoch's start
        self.metrics_bytes = 0  # of metrics.jsonl that belong to this state
        self.losses, compiled = objectives(config, self.model.levels), []
        if config["compile"]:
            # CUDA graphs write where they wrote before, so that no gradients can add up there.
            graphs = device.type == "cuda" and config["accumulate"] == 1 and parallel.SIZE == 1
            mode = "reduce-overhead" if graphs else None
            compiled = [torch.compile(loss, dynamic=False, mode=mode) for loss in self.losses]
        self.objective = parallel.distributed(
            parallel.Objective(self.model, self.losses, compiled),
            each_uses_all=len(self.optimizers) == 1,
        )
        self.dtype = pick_dtype(config["dtype"], device)
        # Since the epoch's start: the number of batches, the sum of each loss, the sums of the KLs.
        size = 1 + len(self.losses) + self.model.levels
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)

    @property
    def measured(self) -> models.Network:
        """The model that is evaluated: where one is kept, the moving average."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def ended(self) -> bool:
        return evaluate.ended(self.config, self.epoch, self.batch, self.seconds)

    def save(self) -> None:
        """Writes beside and renames: whatever happens, the checkpoint before stays whole."""
        if not parallel.FIRST:
            return
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {
            "format": FORMAT,
            "config": self.config,
            "model_config": self.model.config._asdict(),
            "model": self.model.state_dict(),
            "ema": None if self.averaged is None else self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "sums": self.sums,
            **{key: getattr(self, key) for key in self.PLAIN},
        }
        with writing(self.folder / CHECKPOINT) as beside, open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def restore(self, state: dict) -> None:
        try:
            self.model.load_state_dict(state["model"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["ema"])
            for optimizer, of_optimizer in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(of_optimizer)
            self.sums.copy_(state["sums"])
            for key in self.PLAIN:
                setattr(self, key, state[key])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{self.folder / CHECKPOINT} does not fit this train.py") from None
        if not parallel.FIRST:
            return
        with contextlib.suppress(FileNotFoundError):  # lines after the checkpoint come again
            metrics = self.folder / "metrics.jsonl"
            os.truncate(metrics, min(self.metrics_bytes, metrics.stat().st_size))

    def log(self, line: dict) -> None:
        if not parallel.FIRST:
            return
        path = self.folder / "metrics.jsonl"
        with writing(path, replace=False), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            self.metrics_bytes = file.tell()


class Stop:
    """Ctrl-C and SIGTERM ask for a stop after the batch; a second one stops at once."""

    def __enter__(self) -> "Stop":
        self.signal: int | None = None
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, self.before[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Training


def objectives(config: dict, levels: int) -> list[Callable[..., rewards.Loss]]:
    """The losses that a batch is used for, one optimiser step each."""
    if config["arch"] == "aae":
        return [rewards.reconstruction_loss, rewards.discriminator_loss, rewards.confusion_loss]
    if config["ivae"]:
        sampled = config["update"] == "sampled"
        return [partial(rewards.ivae_loss, skip=config["skip"], sampled=sampled)]
    if not config["rl"]:
        return [rewards.elbo_loss]
    terms = {key: config[key] for key in ("gamma", "skip", "pay")}
    if config["update"] == "stepwise":
        return [partial(rewards.stepwise_loss, step=t, **terms) for t in range(levels)]
    loss = rewards.joint_loss if config["update"] == "joint" else rewards.sampled_loss
    return [partial(loss, **terms)]


def kl_terms(config: dict, progress: float) -> dict[str, float]:
    """The KL's weight and free bits after `progress` epochs."""
    beta = min(1.0, progress / config["warmup"]) if config["warmup"] else 1.0
    free_bits = config["free_bits"] if progress < config["free_bits_epochs"] else 0.0
    return {"beta": beta, "free_bits": free_bits}


def rate_factor(config: dict, epoch: int, batch: float, seconds: float) -> float:
    """What --schedule makes of the learning rate, `batch` of an epoch's batches (0 to 1) into an
    epoch, `seconds` the time that the epochs before it took."""
    if config["schedule"] == "constant":
        return 1.0
    done = (epoch + batch) / config["epochs"]
    if config["minutes"] is not None and epoch > 0:  # the first epoch's time is not known
        done = max(done, seconds * (1 + batch / epoch) / (60 * config["minutes"]))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def descend(run: Run, images: Tensor, rows: Tensor, terms: dict) -> Tensor:
    """The updates by one batch, the `rows` of uint8 images: a step for each of the run's losses.

    Returns the mean over the batch of each loss and each level's KL, (losses + L,). The gradients
    of a batch's parts, and of the processes' shares of a part, add up to those of the batch.
    """
    compiled = run.config["compile"] and len(rows) == run.config["batch_size"]
    if compiled:  # a number would be part of the program, and each another one
        beta = torch.full((), terms["beta"], dtype=torch.float64, device=run.device)
        terms = terms | {"beta": beta}
    parts = []
    for part in range(min(run.config["accumulate"], len(rows))):
        rows_of_part = rows[part :: run.config["accumulate"]]
        share = parallel.Share(len(rows_of_part))
        with parallel.same_noise(share):
            x = observed(take(images, share.of_rows(rows_of_part), run.device))
        shared = {"share": share} if parallel.SIZE > 1 else {}
        parts.append((x, share, len(x) * share.of / len(rows), terms | shared))
    means = torch.zeros(len(run.losses) + run.model.levels, device=run.device)
    for which, optimizer in zip(range(len(run.losses)), itertools.cycle(run.optimizers)):
        optimizer.zero_grad()
        for part, (x, share, weight, of_part) in enumerate(parts):
            whole = part == len(parts) - 1
            with parallel.keeping_gradients(run.objective, not whole), parallel.same_noise(share):
                with torch.autocast(run.device.type, run.dtype, run.dtype != torch.float32):
                    value, kl = run.objective(which, x, compiled, **of_part)
                (value * weight).backward()
            means[which] += value.detach() * weight
            means[len(run.losses) :] += kl * (weight / len(run.losses))
        optimizer.step()
        run.update += 1
    return parallel.total(means) / parallel.SIZE


def train(run: Run, data: Data, bar: tqdm) -> None:
    """Trains until the last epoch. A stop that was asked for saves and raises SystemExit."""
    config, model = run.config, run.model
    images = data.to_train_on
    batches = shuffled(images, config["batch_size"], config["seed"], run.epoch)
    last_save, started = time.monotonic(), time.monotonic() - run.seconds
    recent: list[tuple[int, int, Tensor]] = []  # epoch, update and losses, not looked at yet

    def fail(what: str, epoch: int, update: int) -> NoReturn:
        raise UserError(
            f"{what} at epoch {epoch}, update {update}: try a lower --lr or --dtype float32; "
            f"{run.folder} keeps the last good checkpoint"
        )

    def look() -> None:
        """Stops at a loss or a parameter that is not finite, before it can be saved."""
        values = torch.stack([losses for *_, losses in recent]).tolist() if recent else []
        for (epoch, update, _), of_batch in zip(recent, values, strict=True):
            for value in of_batch:
                if not math.isfinite(value):
                    fail(f"the loss is {value}", epoch, update)
            bar.set_postfix(loss=f"{of_batch[-1]:.1f}", refresh=False)
        recent.clear()
        if not torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all():
            fail("a parameter is not finite", run.epoch + 1, run.update)

    over = parallel.any_of([run.ended])[0]
    with Stop() as stop, parallel.StuckAfterSignal(), tf32(run.device):
        while not over:
            part = run.batch / len(batches)
            factor = rate_factor(config, run.epoch, part, run.epoch_seconds)
            for optimizer, rate in zip(run.optimizers, run.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            terms = kl_terms(config, run.epoch + part)
            means = descend(run, images, batches[run.batch], terms)
            if run.averaged is not None:
                run.averaged.update_parameters(model)
            recent.append((run.epoch + 1, run.update, means[: len(run.losses)]))
            run.sums += torch.cat([torch.ones_like(means[:1]), means])
            run.batch += 1
            bar.update()
            ended = run.batch == len(batches)
            check = ended or len(recent) * len(run.losses) >= CHECK_EVERY
            if check:
                look()
            if ended:
                run.seconds = time.monotonic() - started
                end_of_epoch(run, data, terms, bar)
                run.epoch, run.batch = run.epoch + 1, 0
                started = time.monotonic() - run.seconds
                batches = shuffled(images, config["batch_size"], config["seed"], run.epoch)
                run.epoch_seconds = parallel.first_says(run.seconds)
                over = parallel.any_of([run.ended])[0]
            stopping = stop.signal is not None
            due = over or time.monotonic() - last_save >= config["save_every"]
            if parallel.SIZE > 1:  # all have to agree, which takes them a moment
                stopping, due = parallel.any_of([stopping, due]) if check else (False, False)
            if due or stopping:
                look()
                run.seconds = time.monotonic() - started
                run.save()
                last_save = time.monotonic()
            if stopping and not over:
                bar.close()
                say(f"stopped in epoch {run.epoch + 1} after update {run.update}")
                say(f"go on with: python train.py --resume {run.folder}")
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """What is left of float32 matrix products in training may take CUDA's faster TF32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def end_of_epoch(run: Run, data: Data, terms: dict, bar: tqdm) -> None:
    """Logs the epoch that has ended; every --eval-every epochs it measures the test split."""
    config, epoch = run.config, run.epoch + 1
    means = (run.sums[1:] / run.sums[0]).tolist()
    run.sums.zero_()
    losses, kl = means[: len(run.losses)], means[len(run.losses) :]
    line = {"epoch": epoch, "update": run.update, "seconds": round(run.seconds, 2)}
    line |= {"loss": sum(losses) / len(losses), "kl": kl, **terms}
    if len(losses) > 1:
        line["losses"] = losses
    adversarial = config["arch"] == "aae"  # its losses have no common unit, and mean nothing summed
    shown = " ".join(f"{v:9.2f}" for v in (losses if adversarial else [line["loss"]]))
    levels = " ".join(f"{v:.2f}" for v in kl)
    text = f"epoch {epoch:4d}  loss {shown}  KL {levels}"
    measure = config["eval_every"] > 0 and epoch % config["eval_every"] == 0
    if measure:
        test = line["test"] = evaluate.glance(run.measured, data)
        text += f"  test: ELBO {test['elbo']:.2f}"
        text += f", z_L probe {test['probe']:.2f} %" if "probe" in test else ""
    run.log(line)
    if not parallel.FIRST:
        return
    every = 1 if config["minutes"] else max(1, config["epochs"] // 20)
    if measure or epoch % every == 0:
        bar.write(text)


# --------------------------------------------------------------------------------------------------
# The command


def say(*lines: str) -> None:
    """Prints, in one of several processes."""
    if parallel.FIRST:
        print(*lines, sep="\n", flush=True)


def introduce(run: Run, data: Data) -> None:
    """Prints what is about to be trained, and what the paper trains."""
    c, m = run.config, run.model.config
    levels, paper = len(m.latents), models.preset("paper", m.image)
    paper_batch = 64 if c["dataset"] == "tinyimagenet" else 128
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    objective, schedule = "ELBO", "1000 epochs, warm-up of 200, 2 nats free bits for 400"
    if c["rl"]:
        objective = f"Q-value, gamma {c['gamma']}, {c['update']} updates, skip by {c['skip']}"
        schedule = f"{max(1, round(1000 / levels))} epochs, stepwise, no warm-up, no free bits"
    elif c["arch"] in models.ONE_LEVEL or c["ivae"]:
        schedule = "1000 epochs, no warm-up, no free bits"
    if c["ivae"]:
        objective = f"IVAE (Eq. 39), {c['update']} updates, skip by {c['skip']}"
    elif c["arch"] == "aae":
        objective = "reconstruction, discriminator, and the encoder against it"
    warmup = f"KL warm-up of {c['warmup']} epochs" if c["warmup"] else "no KL warm-up"
    free = f", {c['free_bits']} nats free bits for {c['free_bits_epochs']} epochs"
    dtype = str(run.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    length = f"{c['minutes']:g} minutes" if c["minutes"] else f"{c['epochs']} epochs"
    processes = f", one of {parallel.SIZE} processes" if parallel.SIZE > 1 else ""
    how = ", compiled" if c["compile"] else ""
    field = ", mean field" if m.mean_field else ""
    parts = f" in {c['accumulate']} parts" if c["accumulate"] > 1 else ""
    say(
        f"model     {c['arch']}{field}, {c['size']}, levels {','.join(m.latents)} from the pixels "
        f"up, {m.channels} channels, {parameters:.2f} M parameters\n"
        f"objective {objective}, {warmup}{free if c['free_bits'] else ''}\n"
        f"data      {c['dataset']}, {len(data.to_train_on):,} training and {len(data.test):,} test "
        f"images of {'x'.join(map(str, m.image))}, {len(data.classes) or 'no'} classes\n"
        f"training  {length}, batches of {c['batch_size']}{parts}, Adam at "
        f"{c['lr']:g}, seed {c['seed']}\n"
        f"device    {run.device}{threads}, {dtype}{how}{processes}\n"
        f"paper     levels {','.join(paper['latents'])}, {paper['channels']} channels, batches of "
        f"{paper_batch}, Adam at 0.0003, {schedule} (--size paper)\n"
        f"writes to {run.folder}"
    )


def prepare(flags: dict) -> tuple[dict, dict | None]:
    """The configuration of the run and, where it goes on, its checkpoint. Checks the folder."""
    overwrite, resume = flags.pop("overwrite", False), flags.pop("resume", None)
    if resume is None:
        config = defaults(flags)
        check(config)
        if (Path(config["out"]) / CHECKPOINT).exists() and not overwrite:
            raise UserError(
                f"{config['out']} holds a run already: --resume goes on with it, --overwrite "
                "starts anew, --out names another folder"
            )
        return config, None
    if overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: choose one")
    if resume is not True and flags.setdefault("out", resume) != resume:
        raise UserError(f"--resume {resume} and --out {flags['out']} name two runs: choose one")
    flags.setdefault("out", defaults(flags)["out"])
    if Path(flags["out"]).is_file():
        raise UserError(f"{flags['out']} is a file: --resume takes the run's folder")
    state = evaluate.load_checkpoint(Path(flags["out"]))
    config = defaults(state["config"])  # an older checkpoint may lack newer settings
    for key, value in flags.items():
        if key not in MAY_CHANGE and value != config.get(key):
            raise UserError(
                f"the run in {flags['out']} has --{key.replace('_', '-')} {config.get(key)}, not "
                f"{value}: leave the flag out, or start a new run with --out"
            )
        config[key] = value
    check(config)
    return config, state


def idle(config: dict, flags: dict) -> list[str]:
    """The flags given that have no effect on this run."""
    useless = {"gamma", "update", "skip", "pay"}
    if config["rl"]:
        useless = set()
    elif config["ivae"]:
        useless = {"gamma", "pay"}
    elif config["arch"] == "aae":
        useless |= {"warmup", "free_bits", "free_bits_epochs"}
    return sorted(useless & flags.keys())


def command(flags: dict) -> None:
    """A run from its flags to its evaluation."""
    config, state = parallel.of_first(lambda: prepare(flags))
    network(config)  # what cannot be built is said before any data are read
    device = parallel.own_device(config["device"])
    with parallel.one_before_others():
        data = evaluate.data_of(config)
    data = place(data, device, config["device_data"])
    run = Run(config, device)
    if state is not None:
        run.restore(state)
    parallel.of_first(lambda: make_folder(run, new=state is None))
    introduce(run, data)
    for flag in idle(config, flags):
        say(f"note      --{flag.replace('_', '-')} has no effect here")
    if not run.ended:
        batches = math.ceil(len(data.to_train_on) / config["batch_size"])
        interval = 0.5 if sys.stderr.isatty() else 15  # seconds between lines of the bar
        whole = None if config["minutes"] else config["epochs"] * batches
        with tqdm(total=whole, initial=run.epoch * batches + run.batch,
                  unit="batch", mininterval=interval, dynamic_ncols=True,
                  disable=not parallel.FIRST) as bar:  # fmt: skip
            train(run, data, bar)
    kept = run.folder / "eval.json"
    if parallel.of_first(lambda: not kept.exists()):
        say("evaluating")
        result = evaluate.report(
            run.folder, config, run.epoch, run.measured, data, probe=config["probe"]
        )
        parallel.of_first(lambda: evaluate.write_json(kept, result))
    if parallel.FIRST:
        print(f"trained for {run.epoch} epochs in {run.seconds:.0f} s")
        print(evaluate.table(json.loads(kept.read_text())))


def make_folder(run: Run, new: bool) -> None:
    """The run's folder, without what belongs to another run or state."""
    with writing(run.folder, replace=False):
        run.folder.mkdir(parents=True, exist_ok=True)
        stale = ["metrics.jsonl", CHECKPOINT] if new else []
        if new or not run.ended:
            stale.append("eval.json")
        for name in stale:
            (run.folder / name).unlink(missing_ok=True)
    if new:
        run.save()
    evaluate.write_json(run.folder / "config.json", run.config)


def main(argv: list[str] | None = None) -> None:
    p = parser()
    flags = vars(p.parse_args(argv))
    keep_freed_memory()
    try:
        if flags.pop("bench", False):
            import bench

            bench.command(flags)
            return
        if flags.pop("json", False):
            raise UserError("--json is for --bench")
        with parallel.group():
            command(flags)
    except UserError as error:
        p.error(str(error))
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0]
            p.error(f"--compile: PyTorch's compiler fails here ({reason}): leave it out")
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        p.error("out of memory: lower --batch-size, --channels or --latents, or --update sampled")
    except KeyboardInterrupt:  # outside training, or the second one
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
