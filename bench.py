"""What an update costs, by every way to make it: python bench.py [flags of a run] [--json]

All are timed in one process, in turn: the updates of this repository, made by the function that
trains, and Algorithm 1 as it is natural to write it in plain PyTorch.
"""

from devices import keep_freed_memory, origin, pick_device  # before torch: see there

# isort: split
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor

import evaluate
import models
import rewards
import settings
import train
from data import place, shuffled, to_input
from files import UserError, one_line

WARM_UP, ROUNDS, SECONDS = 3, 7, 30  # untimed rounds; then at least so many rounds and seconds
Update = Callable[[train.Run, Tensor], object]  # all updates of a run by a batch x


def literal_loss(model: models.Hierarchy, x: Tensor, step: int, gamma: float, skip: str) -> Tensor:
    """-Q_step (Eq. 24 to 26), each path decoded by itself from its posterior sample down."""
    inference = model.infer(x)
    kl = rewards.kl_terms(inference, model.order)
    q_value, paid = 0.0, 0.0
    for i, level in enumerate(model.order):
        paid = paid + kl[level]
        if i >= step:
            z = inference.latents[level]
            for below in reversed(range(level)):
                z = rewards.through(model.prior(below, z), skip)
            reward = model.decode(z).log_prob(x) - paid  # Eq. 24
            q_value = q_value + gamma ** (i - step) * reward  # Eq. 26
    return -q_value.mean()


def literal_update(run: train.Run, x: Tensor) -> None:
    """What is natural to write: float32, PyTorch's own layout of feature maps and Adam, every
    weight normalised wherever it is used, and each loss looked at."""
    layout, models.LAYOUT = models.LAYOUT, torch.contiguous_format
    for step in range(run.model.levels):
        run.optimizer.zero_grad()
        loss = literal_loss(run.model, x, step, run.config["gamma"], run.config["skip"])
        loss.backward()
        run.optimizer.step()
        loss.item()
    models.LAYOUT = layout


def ways(config: dict, device: torch.device) -> dict[str, tuple[train.Run, Update]]:
    """Those that the architecture has, the literal one first."""
    flags = {"elbo": {"rl": False, "ivae": False}}
    if config["arch"] == "aae":
        flags = {"aae": {}}
    elif config["arch"] != "biva":
        flags = {u: {"rl": True, "ivae": False, "update": u} for u in settings.UPDATES} | flags
    if config["ivae"]:
        flags["ivae"] = {}
    update = partial(train.update, beta=1.0, free_bits=0.0)
    own = {name: (train.Run(config | some, device), update) for name, some in flags.items()}
    if "stepwise" not in own:
        return own
    run = train.Run(config | flags["stepwise"], device)
    run.captured = None
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=config["lr"])
    return {"literal": (run, literal_update), **own}


def seconds_per_batch(ways: dict, batches: Iterator[Tensor]) -> dict[str, list[float]]:
    """Each round times every way once, starting with another one each time. `batches` are uint8
    images: that they go to the device and are binarised counts."""
    names, seconds = list(ways), {name: [] for name in ways}
    for i in itertools.count(-WARM_UP):
        if i == 0:
            started = time.perf_counter()
        if i >= ROUNDS and time.perf_counter() - started > SECONDS:
            return seconds
        images = next(batches)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run, update = ways[name]
            cuda = run.device.type == "cuda"
            wait = partial(torch.cuda.synchronize, run.device) if cuda else bool
            wait()
            before = time.perf_counter()
            update(run, to_input(images.to(run.device)))
            wait()
            if i >= 0:
                seconds[name].append(time.perf_counter() - before)


def measure(config: dict, device: torch.device, images: Tensor) -> dict:
    """What --json prints: of the run, and in "ways" what each of them costs."""
    size, timed = config["batch_size"], ways(config, device)
    batches = (
        images[rows]
        for epoch in itertools.count()
        for rows in shuffled(images, size, config["seed"], epoch)[: len(images) // size]
    )
    seconds = seconds_per_batch(timed, batches)
    run, first = timed[list(timed)[-1]][0], median(next(iter(seconds.values())))
    result = {key: config[key] for key in ("arch", "size", "dataset", "batch_size")}
    result |= origin(device, run.dtype)
    result |= {"levels": run.model.levels, "cuda_graph": run.captured is not None, "ways": {}}
    for name, (run, _) in timed.items():
        low, middle, high = quantiles(seconds[name])
        result["ways"][name] = {
            "images_per_s": size / middle,
            "times_first": first / middle,
            "updates_per_s": run.steps / middle,
            "ms_per_batch": 1e3 * middle,
            "ms_quartiles": [1e3 * low, 1e3 * high],
        }
    return result | {"rounds": len(seconds[name])}


def table(result: dict) -> str:
    about = "{arch}, {size}, {levels} levels, {dataset}, batches of {batch_size}, {dtype}{}\n"
    about += "{device}, {threads} threads; medians of {rounds} rounds{}"
    head = f"           images/s {'x ' + next(iter(result['ways'])):>9}  updates/s  ms/batch"
    graph = ", one CUDA graph a batch" * result["cuda_graph"]
    literal = ", literal in float32" * ("literal" in result["ways"])
    lines = [about.format(graph, literal, **result), head + "       quartiles"]
    row = "{:>8} {images_per_s:10.0f} {times_first:9.2f} {updates_per_s:10.2f} {ms_per_batch:9.1f}"
    row += " {:>15}"
    for name, way in result["ways"].items():
        quartiles = "{:.1f} to {:.1f}".format(*way["ms_quartiles"])
        lines.append(row.format(name, quartiles, **way))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = settings.parser()
    parser.description = "Time every kind of update of a run, beside the literal Algorithm 1."
    parser.add_argument("--json", action="store_true", default=False, help="print one line of JSON")
    flags = vars(parser.parse_args(argv))
    keep_freed_memory()
    with one_line(parser):
        config = settings.defaults(flags)
        settings.check(config)
        device = pick_device(config["device"])
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as train.py does
        images = place(evaluate.load_data(config), device).to_train_on
        if len(images) < config["batch_size"]:
            raise UserError(f"--batch-size {config['batch_size']}: there are {len(images)} images")
        result = measure(config, device, images)
        print(json.dumps(result) if config["json"] else table(result))


if __name__ == "__main__":
    main()
