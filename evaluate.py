"""What runs have learned: probe, KL, active units, likelihoods and mutual information.

python evaluate.py runs/digits-lvae-rl-0
python evaluate.py runs/digits-lvae-rl-0 --json --mine
python evaluate.py runs/digits-* --table
python evaluate.py runs/digits-* --figures pictures
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.multiclass import OneVsOneClassifier
from sklearn.svm import LinearSVC
from torch import Tensor

import mine
import models
import parallel
import rewards
import tables
from data import Data, first_images, in_order, load, observed, pick_device, place, to_unit
from files import UserError, writing

CHECKPOINT = "checkpoint.pt"
PROBES = ("every", "top")  # of every level and of all together, or of the top level alone
FORMAT = 2  # of checkpoints


@contextlib.contextmanager
def seeded(device: torch.device, seed: int = 0) -> Iterator[None]:
    """The same random numbers each time; the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# --------------------------------------------------------------------------------------------------
# Representations and the probe


def own_batches(images: Tensor, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The batches of `in_order` that are this process's, of several."""
    return in_order(images, device, first=parallel.RANK, of=parallel.SIZE)


@torch.no_grad()
def latents(
    model: models.Network,
    images: Tensor,
    sample: bool = False,
    seed: int = 0,
    binarised: bool = False,
) -> Iterator[tuple[int, list[Tensor]]]:
    """Batch by batch the representation of uint8 images at each level, bottom to top, on the
    model's device: the posterior mean given the means of the levels it is conditioned on, of the
    grey or colour image, or of one draw of the `binarised` image; with `sample` a sample of the
    posterior instead. Each comes with the number of the batch's first image. Of several processes
    each gets some of the batches."""
    device = model.zero.device
    for start, batch in own_batches(images, device):
        with seeded(device, seed + start) if sample or binarised else contextlib.nullcontext():
            x = observed(batch) if binarised else to_unit(batch)
            found = model.infer(x, sample=sample).latents
        yield start, found


def representations(
    model: models.Network,
    images: Tensor,
    sample: bool = False,
    widest: int | None = None,
    seed: int = 0,
    binarised: bool = False,
) -> list[Tensor]:
    """Each level's representation (N, D) of uint8 images, bottom to top, on the model's device.

    Maps of more than `widest` numbers an image are first averaged over squares to fewer.
    """

    def flat(z: Tensor) -> Tensor:
        if widest is not None and z.dim() == 4 and z[0].numel() > widest:
            z = F.adaptive_avg_pool2d(z, max(1, math.isqrt(widest // z.shape[1])))
        return z.flatten(1)

    widths = [flat(model.zero.expand(1, *shape)).shape[1] for shape in model.latent_shapes]
    out = [model.zero.new_zeros(len(images), width) for width in widths]
    for start, batch in latents(model, images, sample, seed, binarised):
        for whole, part in zip(out, batch, strict=True):
            whole[start : start + len(part)] = flat(part)
    return [parallel.total(whole) for whole in out]


def principal_components(
    train: np.ndarray, test: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both (N, D) in the basis of the training split's `most` leading principal components."""
    mean = train.mean(axis=0)
    basis = np.linalg.eigh((train - mean).T @ (train - mean))[1][:, ::-1][:, :most]
    return (train - mean) @ basis, (test - mean) @ basis


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Test accuracy in percent of a one-versus-one linear SVM on representations (N, D).

    Standardised on the training split, but a dimension with a variance below 0.01, the usual
    threshold of an inactive unit, is only centred: blown up to unit variance, the rounding noise of
    a fully collapsed level (standard deviation 1e-4) still reads as some classes.

    A representation of more than 512 dimensions is taken in its 256 leading principal components:
    LIBLINEAR takes a minute for each pair of CIFAR-10's classes in 1,024 dimensions, a second in
    256 components. With more than 20 classes, thousands of pairs with few images each, it is at
    most a quarter of a pair's images, lest they be separable, and LIBLINEAR's own tolerance, 0.01.
    """
    mean = train.mean(axis=0, dtype=np.float64).astype(train.dtype)
    std = np.maximum(train.std(axis=0, dtype=np.float64), 0.1).astype(train.dtype)
    train, test = (train - mean) / std, (test - mean) / std
    classes = len(np.unique(train_labels))
    many = classes > 20
    most = max(1, len(train) * 2 // classes // 4) if many else 512
    if train.shape[1] > min(most, 512):
        train, test = principal_components(train, test, min(most, 256))
    svm = OneVsOneClassifier(LinearSVC(dual=False, tol=1e-2 if many else 1e-4))
    with joblib.parallel_config("threading", n_jobs=-1):  # liblinear lets other threads run
        svm.fit(train, train_labels)
    # The scores of all pairs (19,900 of 200 classes) are held for a part of the images at a time.
    parts = range(0, len(test), 500)
    found = np.concatenate([svm.predict(test[i : i + 500]) for i in parts])
    return 100 * float((found == test_labels).mean())


WIDEST = 1024  # numbers of a level that the probe takes: wider maps are averaged over squares


def probes(
    model: models.Network,
    data: Data,
    binarised: bool = False,
    which: str = "every",
    sample: bool = False,
) -> dict[str, float]:
    """The probe of each level and of all levels together: {"z1": ..., "zL": ..., "all": ...}, on
    grey or colour images, or on the `binarised`; with `which="top"` of z_L alone; with `sample` on
    one sample of the posterior of each image instead of the means.

    Empty where the images have no labels.
    """
    if data.train_labels is None:
        return {}
    labels = data.train_labels.numpy(), data.test_labels.numpy()
    train, test = (
        [
            level.cpu().numpy()
            for level in representations(model, images, sample, WIDEST, seed, binarised)
        ]
        for images, seed in ((data.train, 0), (data.test, len(data.train)))
    )
    names = [f"z{level + 1}" for level in range(model.levels)] + ["all"]
    if which == "top":
        train, test = train[-1:], test[-1:]
        names = names[-2:-1]
    found = torch.zeros(len(names), dtype=torch.float64)
    for i in range(parallel.RANK, len(names), parallel.SIZE):  # each process some of them
        views = [z[i] if i < len(z) else np.concatenate(z, axis=1) for z in (train, test)]
        found[i] = linear_probe(views[0], labels[0], views[1], labels[1])
    return dict(zip(names, parallel.total(found).tolist(), strict=True))


OTHER_PROBES = {  # by the option that asks for it: a word about it, and what `probes` then takes
    "binarised": ("binarised images", {"binarised": True}),
    "sampled": ("samples of the posterior", {"sample": True}),
    "sampled_binarised": (
        "samples of the posterior of binarised images",
        {"binarised": True, "sample": True},
    ),
}


def other_probe(model: models.Network, data: Data, name: str, which: str) -> dict[str, float]:
    """`probes` by a name of OTHER_PROBES."""
    return probes(model, data, which=which, **OTHER_PROBES[name][1])


# --------------------------------------------------------------------------------------------------
# Likelihoods and divergences


def bits_per_dimension(nats: float, dims: int) -> float:
    """-log p(x) / (dims ln 2) from log p(x) in nats."""
    return -nats / (dims * math.log(2))


ACTIVE = 0.01  # variance of a unit's posterior mean above which it is active (Burda et al. 2016)


def active_units(model: models.Network, images: Tensor, threshold: float = ACTIVE) -> list[int]:
    """How many dimensions of each level have a posterior mean whose variance over the images
    exceeds the threshold, bottom to top."""
    device = model.zero.device
    sums = [torch.zeros(2, math.prod(shape), dtype=torch.float64, device=device)
            for shape in model.latent_shapes]  # fmt: skip
    for _, batch in latents(model, images):
        for level, z in zip(sums, batch, strict=True):
            z = z.flatten(1).double()
            level += torch.stack([z.sum(0), z.square().sum(0)])
    means = (parallel.total(level) / len(images) for level in sums)
    return [int((square - mean.square() > threshold).sum()) for mean, square in means]


@torch.no_grad()
def densities(model: models.Network, images: Tensor, samples: int = 0, seed: int = 0) -> dict:
    """Means over (binarised) images, nats: "kl" and "log_px_given_z" per level, "elbo", "iwae".

    One posterior sample an image, skip paths by the prior means; "elbo" is log p(x, z) - log q(z|x)
    of the sample, in the mean a bound whatever the architecture; "iwae" is the importance-weighted
    bound with `samples` samples, None where that is 0.
    """
    device, levels = model.zero.device, model.levels
    sums = torch.zeros(2 * levels + 2, dtype=torch.float64, device=device)
    for start, batch in own_batches(images, device):
        with seeded(device, seed + start):
            x = observed(batch)
            inference = model.infer(x)
            below = [None] * levels  # those that level l leaves to the priors: below[:l]
            paths = [
                model.generate(below[:level] + inference.latents[level:]).log_prob(x)
                for level in range(levels)
            ]
            elbo = paths[0] - rewards.log_ratios(inference).sum(dim=0)
            values = [*rewards.level_kl(inference), *paths, elbo]
            if samples:
                bound = rewards.importance_weighted_bound(model, x, samples, 2 * len(x))
                values.append(bound)
            sums[: len(values)] += torch.stack([v.double().sum() for v in values])
    *means, elbo, iwae = (parallel.total(sums) / len(images)).tolist()
    return {
        "kl": means[:levels],
        "log_px_given_z": means[levels:],
        "elbo": elbo,
        "iwae": iwae if samples else None,
    }


def level_information(model: models.Network, data: Data, level: int, seed: int = 0) -> dict:
    """MINE between grey images and posterior samples of a level: trained on the training split,
    measured on the test split; {"nats", "ceiling"}."""
    device = model.zero.device
    z = representations(model, data.train, sample=True, seed=seed)[level]
    z_test = representations(model, data.test, sample=True, seed=seed + len(data.train))[level]
    held_out = data.test.to(device), z_test
    estimate = mine.mutual_information(data.train.to(device), z, held_out, seed=seed)
    return {"nats": estimate.nats, "ceiling": estimate.ceiling}


# --------------------------------------------------------------------------------------------------
# A run


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of a run's folder or a checkpoint file; UserError says what is wrong with it."""
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no run at {path}: name a folder that train.py has written")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason}): train again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of train.py: train again")
    return state


def ended(config: dict, epoch: int, batch: int, seconds: float) -> bool:
    """Whether a run has come to its end: --epochs, or the epoch's end that is nearest --minutes."""
    if batch:
        return False
    limit = config.get("minutes")
    time_is_up = limit is not None and epoch > 0 and seconds * (1 + 0.5 / epoch) >= 60 * limit
    return time_is_up or epoch >= config["epochs"]


def restore_model(state: dict) -> models.Network:
    """The model of a checkpoint that its run was measured by, on the CPU."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in state["model_config"].items()}
    try:
        model = models.build(models.Config(**fields))
        weights = state["model"]
        if state.get("ema") is not None:
            ema = state["ema"].items()
            weights = {k.removeprefix("module."): v for k, v in ema if k.startswith("module.")}
        model.load_state_dict(weights)
    except (TypeError, RuntimeError, ValueError, KeyError):
        raise UserError("the checkpoint's model is not one that models.py builds") from None
    return model


def evaluate(
    model: models.Network,
    data: Data,
    samples: int = 16,
    mine_levels: tuple[int, ...] = (),
    others: tuple[str, ...] = (),
    probe: str = "every",
) -> dict:
    """All measures of a model on a data set, as README.md lists them. `mine_levels` are 0-based,
    `others` names of OTHER_PROBES, `probe` one of PROBES.

    Percentages from 0 to 100, nats per image; kl, active_units and log_px_given_z bottom to top.
    """
    result = {"probe": probes(model, data, which=probe), **densities(model, data.test, samples)}
    result["active_units"] = active_units(model, data.test)
    result["iwae_samples"] = samples
    result["bpd"] = bits_per_dimension(result["elbo"], data.test[0].numel())
    result["mine"] = {
        f"z{level + 1}": level_information(model, data, level) for level in mine_levels
    }
    for name in others:
        result[f"probe_{name}"] = other_probe(model, data, name, probe)
    return result


def report(run: Path, config: dict, epoch: int, model, data: Data, **options) -> dict:
    """`evaluate` with what was trained, as --json prints it and eval.json keeps it."""
    about = {"run": str(run), "epoch": epoch} | {
        k: config.get(k, False) for k in ("dataset", "arch", "rl", "ivae")
    }
    return about | evaluate(model, data, **options)


def glance(model: models.Network, data: Data) -> dict:
    """A cheap look during training: KL and ELBO of the test split, and the probe of z_L fitted on
    10,000 training images where they have labels."""
    measured = densities(model, data.test)
    found = {"kl": measured["kl"], "elbo": measured["elbo"]}
    if data.train_labels is None:
        return found
    some = torch.arange(0, len(data.train), max(1, len(data.train) // 10_000))[:10_000]
    views = []
    for images, labels in (
        (data.train[some], data.train_labels[some]),
        (data.test, data.test_labels),
    ):
        views += [representations(model, images)[-1].cpu().numpy(), labels.numpy()]
    return {"probe": linear_probe(*views)} | found


def table(result: dict) -> str:
    """The evaluation as text, the top level first, as the hierarchies are drawn."""
    probe = {name: f"{value:8.2f}" for name, value in result["probe"].items()}
    lines = [f"{'level':>6} {'probe %':>8} {'KL':>8} {'active':>7} {'log p(x|z)':>11} {'MINE':>14}"]
    if not result["mine"]:
        lines[0] = lines[0].removesuffix(f" {'MINE':>14}")
    for level in reversed(range(len(result["kl"]))):
        name = f"z{level + 1}"
        line = (
            f"{name:>6} {probe.get(name, '-'):>8} {result['kl'][level]:8.3f} "
            f"{result['active_units'][level]:7d} {result['log_px_given_z'][level]:11.2f}"
        )
        if name in result["mine"]:
            nats, ceiling = (result["mine"][name][key] for key in ("nats", "ceiling"))
            line += f" {nats:6.2f} (≤ {ceiling:.2f})"
        lines.append(line)
    iwae = "" if result["iwae"] is None else (
        f"  importance-weighted bound ({result['iwae_samples']} samples) {result['iwae']:.2f} nats"
    )  # fmt: skip
    lines.append(f"{'all':>6} {probe.get('all', '-'):>8} {sum(result['kl']):8.3f}")
    for name, (what, _) in OTHER_PROBES.items():
        if result.get(f"probe_{name}"):
            of_levels = "  ".join(f"{k} {v:.2f}" for k, v in result[f"probe_{name}"].items())
            lines.append(f"probe % on {what}: {of_levels}")
    lines.append(f"ELBO {result['elbo']:.2f} nats{iwae}  bpd {result['bpd']:.4f} (of the ELBO)")
    return "\n".join(lines)


def write_json(path: Path, content: dict) -> None:
    with writing(path) as beside:
        beside.write_text(json.dumps(content) + "\n")


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    # fmt: off
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="a folder that train.py has written")
    parser.add_argument("--table", action="store_true",
                        help="runs side by side, by their eval.json (made where it is missing): "
                        "mean and standard deviation over seeds, beside the paper's values")
    parser.add_argument("--markdown", action="store_true", help="with --table: as Markdown")
    parser.add_argument("--columns", metavar="NAMES", help="with --table: these in this order, of "
                        f"{','.join(tables.MEASURES)} (default all but the last three)")
    parser.add_argument("--after-epochs", type=int, metavar="N", help="with --table or --figures: "
                        "runs as they were after N epochs, by the looks of train.py --eval-every")
    parser.add_argument("--after-minutes", type=float, metavar="N",
                        help="or at their last look within N minutes of training")
    parser.add_argument("--figures", type=Path, metavar="DIR",
                        help="write the paper's figures that the runs allow into this folder")
    parser.add_argument("--dpi", type=int, default=130, help="of the figures, 10 to 1200 "
                        "(default 130; they are about 10 inches wide)")
    parser.add_argument("--json", action="store_true", help="print JSON, no table")
    parser.add_argument("--data-dir", help="where the data sets are (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--device-data", choices=("auto", "on", "off"), default="auto",
                        help="as in training")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    parser.add_argument("--samples", type=int, default=16,
                        help="of the importance-weighted bound (default 16)")
    parser.add_argument("--probe", choices=PROBES, default="every", help="of every level and of "
                        "all together (default), or of z_L alone, which is much sooner done")
    parser.add_argument("--mine", action="store_true", help="mutual information of x and z_L")
    parser.add_argument("--binarised", action="store_true",
                        help="the probe on binarised images as well, one draw of each")
    parser.add_argument("--sampled", action="store_true",
                        help="the probe on a sample of the posterior of each image as well")
    parser.add_argument("--sampled-binarised", action="store_true",
                        help="the probe on a sample of the posterior of each binarised image")
    parser.add_argument("--mine-levels", help="or of these levels, 1 the lowest: 1,5")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        command(args)
    except UserError as error:
        parser.error(str(error))


def command(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    if parallel.SIZE > 1:
        raise UserError("evaluate.py is one process: start it with python, not torchrun")
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: the bound needs at least 1")
    if not 10 <= args.dpi <= 1200:
        raise UserError(f"--dpi {args.dpi}: choose from 10 to 1200")
    after = args.after_epochs, args.after_minutes
    if after != (None, None) and (None not in after or not (args.table or args.figures)):
        raise UserError("--after-epochs or --after-minutes is for --table and --figures")
    if args.markdown and not args.table:
        raise UserError("--markdown is for --table")
    if args.columns is not None and (args.json or not args.table):
        raise UserError("--columns is for --table, and not for --json, which has all")
    columns = tables.SHOWN
    if args.columns is not None:
        columns = tuple(name.strip() for name in args.columns.split(","))
    for name in columns:
        if name not in tables.MEASURES:
            raise UserError(f"--columns {name!r}: choose from {', '.join(tables.MEASURES)}")
    if args.out and (len(args.runs) > 1 or args.table or args.figures):
        raise UserError("--out is for the evaluation of one run")
    if not (args.table or args.figures):
        for run in args.runs:
            result = evaluate_run(run, args)
            if args.out:
                write_json(args.out, result)
            title = f"{run}\n" if len(args.runs) > 1 else ""
            print(json.dumps(result) if args.json else title + table(result), flush=True)
        return
    runs = []
    for folder in args.runs:
        result = kept_evaluation(folder, args)
        if result is not None:
            run = tables.read_run(folder, result)
            runs.append(run if after == (None, None) else tables.earlier(run, *after))
    if not runs:
        raise UserError("none of these runs has ended")
    if args.table:
        found = tables.rows(runs) if args.json else tables.table(runs, args.markdown, columns)
        print(json.dumps(found) if args.json else found)
    if args.figures:
        import figures

        device, loaded = pick_device(args.device), {}

        def data_for(config: dict) -> Data:  # each data set once
            names = ("dataset", "data_dir", "image_size", "train_images", "threshold")
            key = tuple(config.get(name) for name in names)
            if key not in loaded:
                loaded[key] = place(data_of(config, args.data_dir), device, args.device_data)
            return loaded[key]

        for line in figures.draw(runs, args.figures, data_for, device, args.dpi):
            print(line, flush=True)


def data_of(config: dict, data_dir: str | None = None) -> Data:
    """The data set of a run's configuration."""
    data = load(
        config["dataset"],
        data_dir or config["data_dir"],
        image_size=config.get("image_size"),
        unlabelled=config.get("unlabelled", False),
        threshold=config.get("threshold", False),
    )
    return first_images(data, config.get("train_images"))


def other_probes(args: argparse.Namespace) -> tuple[str, ...]:
    """The names of OTHER_PROBES that are asked for."""
    return tuple(name for name in OTHER_PROBES if getattr(args, name))


def levels_of_mine(args: argparse.Namespace, levels: int) -> tuple[int, ...]:
    """The 0-based levels whose mutual information is asked for."""
    if not args.mine_levels:
        return (levels - 1,) if args.mine else ()
    parts = [part.strip() for part in args.mine_levels.split(",")]
    for part in parts:
        if not part.isdigit() or not 1 <= int(part) <= levels:
            raise UserError(f"--mine-levels {part!r}: name levels from 1 to {levels}")
    return tuple(int(part) - 1 for part in parts)


def opened(folder: Path, args: argparse.Namespace) -> tuple[dict, models.Network, Data]:
    """A run's checkpoint, its model on the device, and the data it was trained on."""
    state, device = load_checkpoint(folder), pick_device(args.device)
    model, name = restore_model(state), state["config"]["dataset"]
    levels_of_mine(args, model.levels)  # what cannot be is said before any data are read
    for probe in other_probes(args):
        if OTHER_PROBES[probe][1].get("binarised") and model.config.image[0] > 1:
            flag = f"--{probe.replace('_', '-')}"
            raise UserError(f"{folder} is of colour images: {flag} is for grey ones")
    data = place(data_of(state["config"], args.data_dir), device, args.device_data)
    if tuple(data.train.shape[1:]) != tuple(model.config.image):
        raise UserError(f"{folder} was trained on other images than {name} now has")
    return state, model.to(device), data


def evaluate_run(folder: Path, args: argparse.Namespace) -> dict:
    """The evaluation of a run's checkpoint."""
    state, model, data = opened(folder, args)
    levels = levels_of_mine(args, model.levels)
    return report(
        folder,
        state["config"],
        state["epoch"],
        model,
        data,
        samples=args.samples,
        mine_levels=levels,
        others=other_probes(args),
        probe=args.probe,
    )


def kept_evaluation(folder: Path, args: argparse.Namespace) -> dict | None:
    """A run's eval.json; what it lacks is measured first, and kept there. None, and a word on
    standard error, where the run has not ended."""
    path = folder / "eval.json"
    if not path.exists():
        if not (folder / CHECKPOINT).exists():
            raise UserError(f"{folder} has neither eval.json nor {CHECKPOINT}: train.py makes both")
        state = load_checkpoint(folder)
        config, epoch = state["config"], state["epoch"]
        if not ended(config, epoch, state["batch"], state["seconds"]):
            done = f"{epoch} of {config['epochs']} epochs"
            if config.get("minutes"):
                done = f"{state['seconds'] / 60:.1f} of {config['minutes']:g} minutes"
            print(f"left out: {folder} has done {done}", file=sys.stderr)
            return None
        write_json(path, evaluate_run(folder, args))
    result = tables.read_json(path, ("probe", "kl", "bpd", "mine"))
    levels = levels_of_mine(args, len(result["kl"]))
    missing = [level for level in levels if f"z{level + 1}" not in result["mine"]]
    others = [name for name in other_probes(args) if f"probe_{name}" not in result]
    if missing or others:
        _, model, data = opened(folder, args)
        for level in missing:
            result["mine"][f"z{level + 1}"] = level_information(model, data, level)
        for name in others:
            result[f"probe_{name}"] = other_probe(model, data, name, args.probe)
        write_json(path, result)
    return result


if __name__ == "__main__":
    main()
