"""Train a hierarchical VAE by the ELBO or by reinforcement learning.

python train.py --arch lvae --rl --gamma 0.9
python train.py --arch hvae --rl --dataset fashionmnist --out runs/mine
python train.py --resume runs/mine
torchrun --nproc-per-node 2 train.py --arch lvae --rl
"""

import devices  # before torch: see there

# isort: split
import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import baselines
import evaluate
import models
import rewards
from data import Data, place, shuffled, to_input
from devices import FIRST, LOCAL_RANK, LOCAL_SIZE, RANK, SIZE
from files import UserError, locked, one_line, write_json, writing
from settings import MAY_CHANGE, check, defaults, idle, kl_weight, network, parser, rate_factor

SAVE_EVERY = 60  # seconds between checkpoints
CHECK_EVERY = 20  # batches between looks at the losses: each look waits for the device


# --------------------------------------------------------------------------------------------------
# Algorithm 1


def losses(
    config: dict, levels: int, beta: float | Tensor = 1.0, free_bits: float = 0.0
) -> list[Callable[[nn.Module, Tensor], rewards.Loss]]:
    """The losses that a batch is used for, functions of model and x, one optimiser step each."""
    if config["arch"] == "aae":
        return [baselines.aae_loss]
    update, gamma, skip, pay = (config[key] for key in ("update", "gamma", "skip", "pay"))
    kl = dict(beta=beta, free_bits=free_bits)
    if config["rl"] and update == "stepwise":
        q = partial(rewards.stepwise_loss, gamma=gamma, skip=skip, pay=pay, **kl)
        return [partial(q, step=t) for t in range(levels)]
    if config["rl"]:
        q = rewards.joint_loss if update == "joint" else rewards.sampled_loss
        return [partial(q, gamma=gamma, skip=skip, pay=pay, **kl)]
    if config["ivae"]:
        return [partial(rewards.ivae_loss, skip=skip, sampled=update == "sampled", **kl)]
    return [partial(rewards.elbo_loss, **kl)]


def algorithm_1(run: "Run", x: Tensor, beta: float | Tensor, free_bits: float) -> Tensor:
    """The updates by one batch x (B, C, H, W): Algorithm 1's loop over t = 1 ... T.

    With `--update stepwise` each step infers afresh and ascends its Q_t (Eq. 9). The
    other updates are one step for all t. Returns (updates, 1 + L): the loss and each level's KL.
    """
    made = []
    for loss in losses(run.config, run.model.levels, beta, free_bits):
        run.optimizer.zero_grad()
        with torch.autocast(run.device.type, run.dtype, run.dtype != torch.float32):
            value, kl = run.objective(loss, x)
        value.backward()
        run.optimizer.step()
        run.updates += 1
        made.append(torch.cat([value.detach()[None], kl]))
    return torch.stack(made)


class Objective(nn.Module):
    """A loss of the model as a forward pass, which is what DistributedDataParallel takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss: Callable, x: Tensor) -> rewards.Loss:
        with parametrize.cached():  # each normalised weight once, not once a path
            return loss(self.model, x)


def update(run: "Run", x: Tensor, beta: float, free_bits: float) -> Tensor:
    """`algorithm_1`, on CUDA by a graph of it."""
    if run.captured is not None and len(x) == run.config["batch_size"]:
        return run.captured(run, x, beta, free_bits)
    return algorithm_1(run, x, beta, free_bits)


# --------------------------------------------------------------------------------------------------
# The state of a run


@torch.no_grad()
def average(decay: float, averaged: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
    """The moving average of the weights after n updates, in place. Its decay is at most (1 + n) /
    (10 + n), so that the first weights are soon forgotten."""
    keep = (1 + n) / (10 + n)
    for mean, weight in zip(averaged, weights, strict=True):
        mean.lerp_(weight, 1 - keep.clamp(max=decay))


class Run:
    """Model, optimisers and where training stands; kept in checkpoint.pt."""

    PLAIN = ("epoch", "batch", "seen", "updates", "seconds", "metrics", "made_by")

    def __init__(self, config: dict, device: torch.device, data: Data | None = None):
        self.config, self.device, self.folder = config, device, Path(config["out"])
        self.images = None if data is None else evaluate.images_fingerprint(data)
        torch.manual_seed(config["seed"])
        self.model = baselines.build(network(config)).to(device)
        groups = self.model.parameter_groups(config["lr"])
        self.rates = [group["lr"] for group in groups]
        self.captured = None
        if device.type == "cuda" and SIZE == 1:
            self.captured = devices.Captured(algorithm_1, device)
            for group in groups:  # the graph reads the rate where it lies
                group |= {"lr": torch.tensor(group["lr"], device=device), "capturable": True}
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.averaged = None
        if config["ema"]:
            self.averaged = AveragedModel(self.model, multi_avg_fn=partial(average, config["ema"]))
        self.dtype = devices.pick_dtype(config["dtype"], device)
        self.objective = Objective(self.model)
        if SIZE > 1:
            warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 kernels
            self.objective = DistributedDataParallel(self.objective)
        self.epoch = self.batch = self.updates = 0  # the batch to come; the updates made
        self.seconds = 0.0  # of training, evaluation left out
        self.metrics: list[dict] = []  # a line an epoch
        self.made_by: list[dict] = []  # one of devices.origin for each machine or commit
        # Since the epoch's start, over images: their number, and the sums of losses and KLs.
        self.seen, self.steps = 0, len(losses(config, self.model.levels))
        size = self.steps, 1 + self.model.levels
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.seed_others()

    def seed_others(self) -> None:
        """Every process but the first has noise of its own, by seed, rank and updates made."""
        if not FIRST:
            torch.manual_seed(self.config["seed"] + 1_000_003 * RANK + self.updates)

    @property
    def measured(self) -> models.Network:
        """The model that is evaluated: where one is kept, the moving average."""
        return self.model if self.averaged is None else self.averaged.module

    def set_rates(self, factor: float) -> None:
        """The learning rates: each group's own, times `factor`."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all, and then the files that follow from it."""
        if not FIRST:
            return
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {
            "format": evaluate.FORMAT,
            "config": self.config,
            "model_config": self.model.config._asdict(),
            "model": self.model.state_dict(),
            "ema": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "sums": self.sums,
            "images": self.images,
            **{key: getattr(self, key) for key in self.PLAIN},
        }
        with writing(self.folder / evaluate.CHECKPOINT) as beside, open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with writing(self.folder / "metrics.jsonl") as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in self.metrics))
        write_json(self.folder / "config.json", self.config | {"made_by": self.made_by})

    def restore(self, state: dict) -> None:
        if state["images"] != self.images:
            raise UserError(
                f"{self.folder} was trained on other images or labels than those in "
                f"{self.config['data_dir']}: name theirs with --data-dir, or start a new run"
            )
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["ema"])
        groups = self.optimizer.param_groups
        own = [{key: group[key] for key in ("lr", "capturable")} for group in groups]  # as here
        self.optimizer.load_state_dict(state["optimizer"])
        for group, here in zip(self.optimizer.param_groups, own, strict=True):
            group |= here
        self.sums.copy_(state["sums"])
        for key in self.PLAIN:
            setattr(self, key, state[key])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.seed_others()


# --------------------------------------------------------------------------------------------------
# Training


def train(run: Run, data: Data, bar: tqdm) -> None:
    """Trains until the last epoch, with a checkpoint every SAVE_EVERY seconds and at the end."""
    config, images = run.config, data.to_train_on
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    while run.epoch < config["epochs"]:
        batches = shuffled(images, config["batch_size"], config["seed"], run.epoch)
        for rows in batches[run.batch :]:
            progress = run.epoch + run.batch / len(batches)
            beta, free_bits = kl_weight(config, progress)
            run.set_rates(rate_factor(config, progress))
            x = to_input(images[devices.own_rows(rows)].to(run.device))
            made = update(run, x, beta, free_bits)
            if SIZE > 1:
                dist.all_reduce(made)
            if run.averaged is not None:
                run.averaged.update_parameters(run.model)
            run.sums += made * (len(rows) / SIZE)
            run.seen += len(rows)
            run.batch += 1
            bar.update()
            last = run.batch == len(batches)
            due = time.monotonic() - saved >= SAVE_EVERY
            due |= last and run.epoch + 1 == config["epochs"]
            if last or due or run.batch % CHECK_EVERY == 0:
                check_finite(run, bar, x if due else None)
            if last:
                run.seconds = time.monotonic() - started
                end_of_epoch(run, data, beta, free_bits)
                started = time.monotonic() - run.seconds
            if due:
                run.seconds = time.monotonic() - started
                run.save()
                saved = time.monotonic()
    torch.set_float32_matmul_precision("highest")


def check_finite(run: Run, bar: tqdm, x: Tensor | None) -> None:
    """UserError at a loss, a weight or a moment of Adam's that is not finite, before it can be
    saved; with a batch x also at its ELBO by the weights as they are now."""
    moments = [v for state in run.optimizer.state.values() for v in state.values()]
    values = [run.sums, *run.measured.parameters(), *run.model.parameters(), *moments]
    with torch.no_grad():
        finite = torch.nn.utils.get_total_norm(values).isfinite()
        if x is not None:
            with devices.seeded(run.device):
                finite &= rewards.elbo_loss(run.measured, x).value.isfinite()
    if not finite:
        raise UserError(
            f"the loss or a parameter is not finite in epoch {run.epoch + 1}, by update "
            f"{run.updates}: try a lower --lr or --dtype float32; {run.folder} keeps the last good "
            "checkpoint"
        )
    loss = run.sums[:, 0].mean() / run.seen
    bar.set_postfix(loss=f"{loss.item():.1f}", refresh=False)


def end_of_epoch(run: Run, data: Data, beta: float, free_bits: float) -> None:
    """Logs the epoch; every --eval-every epochs the first process evaluates."""
    means = run.sums / run.seen
    values, kl = means[:, 0].tolist(), means[:, 1:].mean(dim=0).tolist()
    run.epoch, run.batch, run.seen = run.epoch + 1, 0, 0
    run.sums.zero_()
    line = {"epoch": run.epoch, "update": run.updates, "seconds": round(run.seconds, 2)}
    line |= {"loss": sum(values) / len(values), "kl": kl, "beta": beta, "free_bits": free_bits}
    if len(values) > 1:
        line["losses"] = values
    text = f"epoch {run.epoch:4d}  loss {line['loss']:9.2f}  KL " + " ".join(f"{v:.2f}" for v in kl)
    measure = run.config["eval_every"] and run.epoch % run.config["eval_every"] == 0
    if measure and FIRST:
        test = line["test"] = evaluate.quick_eval(run.measured, data)
        text += f"  test: ELBO {test['elbo']:.2f}"
        text += f", z_L probe {test['probe']:.2f} %" if "probe" in test else ""
    run.metrics.append(line)
    if FIRST and (measure or run.epoch % max(1, run.config["epochs"] // 20) == 0):
        say(text)


# --------------------------------------------------------------------------------------------------
# The command


def prepare(flags: dict, held: contextlib.ExitStack) -> tuple[dict, dict | None]:
    """The configuration of the run and, where it goes on, its checkpoint. Checks the folder, and
    the first process locks it as long as `held` is open.

    On --resume what was not given is decided anew, by --epochs where these are raised.
    """
    overwrite, resume = flags.pop("overwrite", False), flags.pop("resume", None)
    if resume is None:
        config = defaults(flags)
        check(config)
        folder = Path(config["out"])
        if FIRST:
            held.enter_context(locked(folder))
        if any((folder / name).exists() for name in evaluate.FILES) and not overwrite:
            raise UserError(
                f"{folder} holds a run already: --resume goes on with it, --overwrite starts anew, "
                "--out names another folder"
            )
        return config, None
    if overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: choose one")
    if resume is not True and flags.setdefault("out", resume) != resume:
        raise UserError(f"--resume {resume} and --out {flags['out']} name two runs: choose one")
    folder = Path(flags.setdefault("out", defaults(flags)["out"]))
    if FIRST and folder.is_dir():
        held.enter_context(locked(folder))
    state = evaluate.load_checkpoint(folder)
    if "optimizer" not in state:
        raise UserError(f"{folder} has weights alone: name a run's folder to go on with")
    for key, value in flags.items():
        if key not in MAY_CHANGE and value != state["config"][key]:
            raise UserError(
                f"the run in {folder} has --{key.replace('_', '-')} {state['config'][key]}, not "
                f"{value}: leave the flag out, or start a new run with --out"
            )
    config = defaults(state["config"]["given"] | {"data_dir": state["config"]["data_dir"]} | flags)
    check(config)
    if network(config)._asdict() != state["model_config"]:
        raise UserError(
            f"{folder} has another network than its flags now give, since a preset has changed: "
            "start a new run with --out"
        )
    if config["epochs"] < state["epoch"] + (state["batch"] > 0):
        raise UserError(
            f"--epochs {config['epochs']}: the run has begun epoch {state['epoch'] + 1}"
        )
    return config, state


def say(*lines: str) -> None:
    """Prints lines. A pipe that the reader has closed costs them, and not the training."""
    with contextlib.suppress(BrokenPipeError):
        tqdm.write("\n".join(lines))
        sys.stdout.flush()


def introduce(run: Run, data: Data) -> None:
    """Prints what is about to be trained, and what the paper trains."""
    c, m = run.config, run.model.config
    keys = ("arch", "rl", "ivae", "dataset", "image_size", "levels", "latents")
    paper = defaults({key: c[key] for key in keys} | {"size": "paper"})
    objective = "adversarial" if c["arch"] == "aae" else "ELBO"
    if c["rl"] or c["ivae"]:
        objective = "Q-value (Eq. 26), gamma {gamma}" if c["rl"] else "IVAE (Eq. 39)"
        objective += ", {update} updates"
    stepwise = " (stepwise is Algorithm 1)" * (c["rl"] and c["update"] != "stepwise")
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    graph = ", one CUDA graph a batch" if run.captured is not None else ""
    processes = f", one of {SIZE} processes" if SIZE > 1 else ""
    measured = "validation" if c["validation"] else "test"
    training = "{epochs} epochs, Adam at {lr:g}, warm-up {warmup}, {free_bits} nats free bits"
    say(
        f"model     {c['arch']}, {c['size']}, levels {','.join(m.latents)} from the pixels up, "
        f"{m.channels} channels, {parameters:.2f} M parameters",
        f"objective {objective.format(**c)}{stepwise}",
        f"data      {c['dataset']}, {len(data.to_train_on):,} training and {len(data.test):,} "
        f"{measured} images of {'x'.join(map(str, m.image))}, {len(data.classes) or 'no'} classes",
        f"training  {training.format(**c)}, batches of {c['batch_size']}, seed {c['seed']}",
        f"device    {run.device}, {str(run.dtype).removeprefix('torch.')}{graph}{processes}",
        f"paper     {objective.format(**paper)}: {training.format(**paper)} (--size paper)",
        f"writes to {run.folder} every minute: Ctrl-C stops, --resume {run.folder} goes on",
    )


def command(flags: dict, held: contextlib.ExitStack) -> None:
    """A run from its flags to its evaluation. The folder stays locked as long as `held` is open."""
    config, state = prepare(flags, held)
    held.enter_context(devices.group(Path(config["out"]) / evaluate.CHECKPOINT))
    device = devices.pick_device(config["device"])
    if SIZE > 1 and device.type == "cuda":
        devices.pick_device(f"cuda:{LOCAL_SIZE - 1}")  # too few are an error of the first process
        device = devices.pick_device(f"cuda:{LOCAL_RANK}")
        torch.cuda.set_device(device)
    if not FIRST:  # what the first process downloads or decodes the others read
        dist.barrier()
    data = place(evaluate.load_data(config), device)
    if SIZE > 1 and FIRST:
        dist.barrier()
    run = Run(config, device, data)
    if state is not None:
        run.restore(state)
    if FIRST:
        begin(run, data, state, flags)
    if run.epoch < config["epochs"]:
        batches = math.ceil(len(data.to_train_on) / config["batch_size"])
        with tqdm(total=config["epochs"] * batches, initial=run.epoch * batches + run.batch,
                  unit="batch", mininterval=0.5 if sys.stderr.isatty() else 15,
                  dynamic_ncols=True, disable=not FIRST) as bar:  # fmt: skip
            train(run, data, bar)
    if SIZE > 1:
        dist.destroy_process_group()
    if FIRST:
        say("evaluating")
        about = config | {"epoch": run.epoch, "updates": run.updates}
        kept = evaluate.kept_evaluation(run.folder, run.measured, data, about)
        result = evaluate.evaluate(run.measured, data, kept, probe=config["probe"])
        say(f"trained for {run.epoch} epochs in {run.seconds:.0f} s", evaluate.table(result))
        write_json(run.folder / "eval.json", result)


def begin(run: Run, data: Data, state: dict | None, flags: dict) -> None:
    """Brings the folder's files in line with the run, and says what is about to be trained."""
    config, before = run.config, run.config if state is None else state["config"]
    if run.epoch < config["epochs"]:
        (run.folder / "eval.json").unlink(missing_ok=True)
        here = devices.origin(run.device, run.dtype)
        run.made_by += [here] if here not in run.made_by else []
    run.save()  # after a crash the other files may be of another state or run
    introduce(run, data)
    for flag in idle(config, flags):
        say(f"note      --{flag.replace('_', '-')} has no effect here")
    was, now = (rate_factor(c, run.epoch) for c in (before, config))
    if now > was:
        rises = f"note      the learning rate rises from {was:.2f} to {now:.2f} times --lr, since "
        say(rises + "the cosine ends with the last epoch")


def main(argv: list[str] | None = None) -> None:
    p = parser()
    if not FIRST:  # the first process says what is wrong
        p.error = lambda message: sys.exit(2)
    flags = vars(p.parse_args(argv))
    devices.keep_freed_memory()
    with one_line(p), contextlib.ExitStack() as held:
        command(flags, held)


if __name__ == "__main__":
    main()
