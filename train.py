"""Train a hierarchical VAE by the ELBO or by reinforcement learning.

python train.py --arch lvae --rl --gamma 0.9
python train.py --arch hvae --rl --dataset fashionmnist --out runs/mine
python train.py --resume runs/mine
torchrun --nproc-per-node 2 train.py --arch lvae --rl
python train.py --bench --arch lvae --dataset fashionmnist
"""

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
    Data,
    keep_freed_memory,
    observed,
    pick_dtype,
    place,
    shuffled,
    take,
)
from evaluate import CHECKPOINT, FORMAT
from files import UserError, writing
from settings import MAY_CHANGE, check, defaults, idle, network, parser

CHECK_EVERY = 20  # updates between looks at the losses: each look waits for the device

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
        self.rates = [of_part["lr"] for of_part in settings]
        self.captured = None
        if device.type == "cuda" and parallel.SIZE == 1 and not config["eager"]:
            self.captured = Captured(device)
            settings = [s | self.captured.settings(s["lr"]) for s in settings]
        self.optimizers = [
            torch.optim.Adam(p, fused=True, **s) for p, s in zip(parts, settings, strict=True)
        ]
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
            compiled = [torch.compile(loss, dynamic=False) for loss in self.losses]
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

    def set_rates(self, factor: float) -> None:
        """Each optimiser's learning rate: its own, times `factor`."""
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            group = optimizer.param_groups[0]
            if isinstance(group["lr"], Tensor):  # a graph reads it where it lies
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

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
                group = optimizer.param_groups[0]
                own = {key: group[key] for key in ("lr", "capturable")}  # of this device
                optimizer.load_state_dict(of_optimizer)
                optimizer.param_groups[0] |= own
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


class Captured:
    """All updates by a batch as one CUDA graph: some thousand kernels, recorded once and from then
    on replayed, which take longer to be launched one by one than to run.

    A replay reads and writes where the recording did. So a batch is first copied there, and what
    changes from batch to batch, the KL's weight and the learning rates, lies in the device's
    memory. When the free bits change, which are part of the program, it is recorded anew.
    """

    WARM_UP = 2  # batches before the recording, in which libraries choose, and compilers work

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.beta = torch.ones((), dtype=torch.float64, device=device)
        self.forget(free_bits=0.0)

    def forget(self, free_bits: float) -> None:
        self.graph, self.seen, self.free_bits = None, 0, free_bits

    def settings(self, rate: float) -> dict:
        """Those of Adam."""
        return {"lr": torch.tensor(rate, device=self.device), "capturable": True}

    def __call__(self, run: Run, batch: Tensor, terms: dict) -> Tensor:
        """`descend` by uint8 images that are on the device."""
        self.beta.fill_(terms.get("beta", 1.0))
        free_bits = terms.get("free_bits", 0.0)
        if free_bits != self.free_bits:
            self.forget(free_bits)
        terms = terms | {"beta": self.beta}
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        if self.seen < self.WARM_UP:
            self.seen += 1
            with torch.cuda.stream(self.stream):  # where the recording will be
                means = updates(run, batch, torch.arange(len(batch), device=self.device), terms)
            current.wait_stream(self.stream)
            return means
        made = run.update + len(run.losses)
        if self.graph is None:
            self.batch, self.rows = batch.clone(), torch.arange(len(batch), device=self.device)
            for parameter in run.model.parameters():
                parameter.grad = None
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.means = updates(run, self.batch, self.rows, terms)
        self.batch.copy_(batch)
        self.graph.replay()
        run.update = made
        return self.means.clone()


def descend(run: Run, images: Tensor, rows: Tensor, terms: dict) -> Tensor:
    """The updates by one batch, the `rows` of uint8 images: a step for each of the run's losses.

    Returns the mean over the batch of each loss and each level's KL, (losses + L,).
    """
    if run.captured is not None and len(rows) == run.config["batch_size"]:
        return run.captured(run, take(images, rows, run.device), terms)
    return updates(run, images, rows, terms)


def updates(run: Run, images: Tensor, rows: Tensor, terms: dict) -> Tensor:
    """What `descend` does and returns, step by step. The gradients of a batch's parts, and of the
    processes' shares of a part, add up to those of the batch."""
    compiled = run.config["compile"] and len(rows) == run.config["batch_size"]
    if compiled and not isinstance(terms["beta"], Tensor):  # a number would be part of the program
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
        if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
            fail("a parameter is not finite", run.epoch + 1, run.update)

    over = parallel.any_of([run.ended])[0]
    with Stop() as stop, parallel.StuckAfterSignal(), tf32(run.device):
        while not over:
            part = run.batch / len(batches)
            factor = rate_factor(config, run.epoch, part, run.epoch_seconds)
            run.set_rates(factor)
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
    how += ", one CUDA graph a batch" if run.captured is not None else ""
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
        # What went wrong first stands last: a recording that fails ends with an error of its own.
        errors: list[BaseException] = [error]
        while errors[-1].__context__ is not None:
            errors.append(errors[-1].__context__)
        no_memory = any(
            isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e) for e in errors
        )
        if "captur" in str(error) and not no_memory:
            reason = str(errors[-1]).strip().splitlines()[0]
            p.error(f"an update cannot be recorded as a CUDA graph ({reason}): take --eager")
        if not no_memory:
            raise
        p.error("out of memory: lower --batch-size, --channels or --latents, or --update sampled")
    except KeyboardInterrupt:  # outside training, or the second one
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
