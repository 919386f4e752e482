"""What an update costs, by every way to make it: python train.py --bench [flags of a run] [--json]

All are timed in one process, in turn, by the functions that train: the objectives of this
repository, and Algorithm 1 as a transcription of the paper in plain PyTorch has it.
"""

import contextlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import models
import parallel
import rewards
import settings
import train
from data import observed, place, shuffled, take
from files import UserError

WARM_UP, ROUNDS, SECONDS = 3, (7, 60), 60.0  # at least and at most so many rounds, in so much time
# Dense products of bfloat16, and of float32 as TF32, in 10^12 operations a second, as specified.
PEAKS = {"H200": (989, 494), "H100 PCIe": (756, 378), "H100": (989, 494), "A100": (312, 156)}


class Way(NamedTuple):
    """A way to make the updates of a batch, and what it makes them with."""

    run: train.Run
    batch: Callable[[Tensor], None]  # rows of the training images to all updates by that batch
    updates: int  # optimiser steps by a batch
    dtype: torch.dtype


# --------------------------------------------------------------------------------------------------
# Algorithm 1 to the letter


def literal_loss(model: models.Hierarchy, x: Tensor, step: int, gamma: float, skip: str) -> Tensor:
    """-Q_step (Eq. 24 to 26), each path decoded by itself from its posterior sample down."""
    inference = model.infer(x)
    kl = rewards.level_kl(inference)
    q_value, paid = 0.0, 0.0
    for i, level in enumerate(model.order):
        paid = paid + kl[level]
        if i >= step:
            start = [z if at == level else None for at, z in enumerate(inference.latents)]
            reward = model.decode(start, skip).log_prob(x) - paid
            q_value = q_value + gamma ** (i - step) * reward
    return -q_value.mean()


@contextlib.contextmanager
def plain_layout() -> Iterator[None]:
    """Feature maps as PyTorch has them where no one asks for another layout."""
    before, models.LAYOUT = models.LAYOUT, torch.contiguous_format
    try:
        yield
    finally:
        models.LAYOUT = before


def literal(run: train.Run, images: Tensor) -> Callable[[Tensor], None]:
    """What is natural to write: float32, PyTorch's own layout and Adam, every weight normalised
    wherever it is used, and each loss looked at."""
    config, model = run.config, run.model
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])

    def batch(rows: Tensor) -> None:
        x = observed(take(images, rows, run.device))
        with plain_layout():
            for step in range(model.levels):
                optimizer.zero_grad()
                loss = literal_loss(model, x, step, config["gamma"], config["skip"])
                loss.backward()
                optimizer.step()
                loss.item()

    return batch


# --------------------------------------------------------------------------------------------------
# Measuring


def ways(config: dict, device: torch.device, images: Tensor) -> dict[str, Way]:
    """Those that the architecture has."""
    if config["arch"] == "aae":
        wanted = {"aae": {}}
    else:
        wanted = {"elbo": {"rl": False, "ivae": False}}
        if config["arch"] != "biva":
            rl = {k: {"rl": True, "ivae": False, "update": k} for k in settings.UPDATES}
            wanted = {"literal": rl["stepwise"], **rl, **wanted}
        if config["ivae"]:
            wanted["ivae"] = {}
    found = {}
    for name, flags in wanted.items():
        run = train.Run(config | flags, device)
        if name == "literal":
            found[name] = Way(run, literal(run, images), run.model.levels, torch.float32)
            continue
        terms = train.kl_terms(run.config, float(run.config["epochs"]))

        def batch(rows: Tensor, run: train.Run = run, terms: dict = terms) -> None:
            train.descend(run, images, rows, terms)

        found[name] = Way(run, batch, len(run.losses), run.dtype)
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(found: dict[str, Way], batches: Iterator[Tensor]) -> dict[str, list[float]]:
    """Seconds a batch, one way after the other, round by round, each round from another one on."""
    names, seconds = list(found), {name: [] for name in found}
    started = None
    for i in range(WARM_UP + ROUNDS[1]):
        if i == WARM_UP:
            started = time.perf_counter()
        rows = next(batches)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            device = found[name].run.device
            synchronize(device)
            start = time.perf_counter()
            found[name].batch(rows)
            synchronize(device)
            if started is not None:
                seconds[name].append(time.perf_counter() - start)
        enough = started is not None and time.perf_counter() - started > SECONDS
        if enough and i + 1 >= WARM_UP + ROUNDS[0]:
            break
    return seconds


@contextlib.contextmanager
def step_by_step(run: train.Run, compiled: bool = False) -> Iterator[None]:
    """No replays of a CUDA graph, and unless `compiled` no compiled updates either."""
    before = run.config, run.captured
    run.config, run.captured = run.config | ({} if compiled else {"compile": False}), None
    try:
        yield
    finally:
        run.config, run.captured = before


def operations(way: Way, rows: Tensor) -> int:
    """Floating point operations of the matrix products and convolutions for a batch."""
    with step_by_step(way.run), FlopCounterMode(display=False) as counter:
        way.batch(rows)
    return counter.get_total_flops()


def peak_memory(way: Way, rows: Tensor) -> float:
    """MiB that a batch needs at its peak: parameters, Adam's moments, gradients, activations."""
    run, device = way.run, way.run.device
    for parameter in run.model.parameters():
        parameter.grad = None
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with step_by_step(run, compiled=True):
            way.batch(rows)
        most = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            way.batch(rows)
        changes = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        most = max(itertools.accumulate(event.nbytes() for event in changes))
    fixed = sum(3 * p.numel() * p.element_size() for p in run.model.parameters())
    return (most + fixed) / 2**20


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """Operations a second that the device is able to, and how that is known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rates for part, rates in PEAKS.items() if part in name), None)
        return (known[dtype == torch.float32] * 1e12, "specified") if known else (None, "unknown")
    n = 2048
    a = torch.randn(n, n).to(dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"measured on {n}x{n} matrices"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


# --------------------------------------------------------------------------------------------------
# The command


def command(flags: dict) -> None:
    """Times the run that the flags describe, and prints a table or one line of JSON."""
    as_json = flags.pop("json", False)
    for flag in ("resume", "overwrite", "out", "eval_every", "probe", "save_every"):
        if flags.pop(flag, None) is not None:
            raise UserError(f"--{flag.replace('_', '-')} has no meaning with --bench")
    if parallel.SIZE > 1:
        raise UserError("--bench measures one process: start it with python, not torchrun")
    config = settings.defaults(flags)
    settings.check(config)
    settings.network(config)
    device = parallel.own_device(config["device"])
    data = place(evaluate.data_of(config), device, config["device_data"])
    size = config["batch_size"]
    if len(data.to_train_on) < size:
        raise UserError(f"--batch-size {size}: there are {len(data.to_train_on):,} images")
    result = measure(config, device, data.to_train_on)
    print(json.dumps(result) if as_json else table(result), flush=True)


def full_batches(images: Tensor, config: dict) -> Iterator[Tensor]:
    epoch = 0
    while True:
        batches = shuffled(images, config["batch_size"], config["seed"], epoch)
        yield from (rows for rows in batches if len(rows) == config["batch_size"])
        epoch += 1


def measure(config: dict, device: torch.device, images: Tensor) -> dict:
    """What --json prints."""
    batches, size = full_batches(images, config), config["batch_size"]
    with train.tf32(device):
        found = ways(config, device, images)
        seconds = times(found, batches)
        rows = next(batches)
        flops = {name: operations(way, rows) for name, way in found.items()}
        memory = {name: peak_memory(way, rows) for name, way in found.items()}
        peaks = {dtype: peak_rate(device, dtype) for dtype in {w.dtype for w in found.values()}}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}
    run = next(reversed(found.values())).run

    def by_name(value: Callable[[str], float | None]) -> dict[str, float | None]:
        return {name: value(name) for name in found}

    def utilisation(name: str) -> float | None:
        peak = peaks[found[name].dtype][0]
        return flops[name] / median[name] / peak if peak else None

    return {
        "device": device_name(device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "compile": config["compile"],
        "cuda_graph": run.captured is not None,
        "size": config["size"],
        "dataset": config["dataset"],
        "arch": config["arch"],
        "levels": run.model.levels,
        "batch": size,
        "images_per_s": by_name(lambda name: size / median[name]),
        "updates_per_s": by_name(lambda name: found[name].updates / median[name]),
        "ms_per_batch": by_name(lambda name: 1e3 * median[name]),
        "ms_quartiles": {n: [1e3 * q[0], 1e3 * q[2]] for n, q in quartiles.items()},
        "times_literal": by_name(lambda name: median["literal"] / median[name])
        if "literal" in found
        else {},
        "peak_memory_mb": by_name(lambda name: memory[name]),
        "gflop_per_batch": by_name(lambda name: flops[name] / 1e9),
        "mfu": by_name(utilisation),
        "peak_tflops": {
            str(dtype).removeprefix("torch."): [rate and rate / 1e12, how]
            for dtype, (rate, how) in peaks.items()
        },
        "rounds": len(next(iter(seconds.values()))),
    }


def table(result: dict) -> str:
    peaks = ", ".join(
        f"{dtype} {rate:.2f} TFLOP/s ({how})" if rate else f"{dtype} {how}"
        for dtype, (rate, how) in result["peak_tflops"].items()
    )
    lines = [
        f"{result['arch']}, {result['size']}, {result['levels']} levels, {result['dataset']}, "
        f"batches of {result['batch']}, {result['dtype']}{', compiled' * result['compile']}"
        f"{', one CUDA graph a batch' * result['cuda_graph']} "
        f"(literal: float32), median of {result['rounds']} rounds",
        f"{result['device']}; peak {peaks}",
        f"{'':>9} {'images/s':>9} {'x literal':>9} {'updates/s':>9} {'ms/update':>9} "
        f"{'ms/batch':>9} {'(quartiles)':>17} {'MiB':>7} {'GFLOP':>8} {'MFU':>7}",
    ]
    for name, rate in result["images_per_s"].items():
        ms, (low, high) = result["ms_per_batch"][name], result["ms_quartiles"][name]
        times = result["times_literal"].get(name)
        mfu = result["mfu"][name]
        lines.append(
            f"{name:>9} {rate:9.0f} {f'{times:.2f}' if times else '-':>9} "
            f"{result['updates_per_s'][name]:9.2f} {1e3 / result['updates_per_s'][name]:9.1f} "
            f"{ms:9.1f} {f'({low:.1f} to {high:.1f})':>17} {result['peak_memory_mb'][name]:7.0f} "
            f"{result['gflop_per_batch'][name]:8.2f} "
            f"{f'{100 * mfu:.1f} %' if mfu else '-':>7}"
        )
    return "\n".join(lines)
