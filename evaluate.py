"""What a run has learned: probe, KL, active units, likelihoods and mutual information.

python evaluate.py runs/digits-lvae-rl-0
python evaluate.py runs/digits-lvae-rl-0 --mine --probe-of sample

What is measured is kept in the run's eval.json, which tables.py and figures.py read.
"""

from devices import commit, pick_device, seeded  # before torch: see there

# isort: split
import hashlib
import json
import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import baselines
import mine
import models
import rewards
from data import Data, evenly, in_order, load, place, to_input, to_unit
from files import Parser, UserError, locked, one_line, write_json, writing
from probe import linear_probe

CHECKPOINT, FORMAT = "checkpoint.pt", 5  # a checkpoint's name and version
FILES = (CHECKPOINT, "config.json", "metrics.jsonl", "eval.json")  # of a run's folder
PROVENANCE = ("epoch", "updates", "made_by")  # what a checkpoint knows beside its configuration
ACTIVE = 0.01  # variance of a unit's posterior mean above which it is active (Burda et al. 2016)
WIDEST = 1024  # numbers of a level that the probe takes: wider maps are averaged over squares
PROBE_OF = ("mean", "sample", "binarised-mean", "binarised-sample")  # what may be probed

bar = partial(tqdm, leave=False, disable=None)  # on a terminal alone


# --------------------------------------------------------------------------------------------------
# Runs


def load_checkpoint(run: Path) -> dict:
    """The checkpoint in a run's folder, or a file of weights; UserError says what is wrong."""
    path = run if run.suffix == ".pt" else run / CHECKPOINT
    if not path.is_file():
        raise UserError(f"no run at {run}: name a folder that train.py has written or a .pt")
    try:
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():
                raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason}): train again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of train.py: train again")
    return state


def load_run(run: Path | str, device: torch.device | str = "cpu") -> tuple[models.Network, dict]:
    """The model of a run's folder or of a file of weights, and its configuration. A run that
    averages its weights gives the averaged ones."""
    state = load_checkpoint(Path(run))
    model = baselines.build(models.Config(**state["model_config"]))
    model.load_state_dict(state["model"])
    if state["ema"] is not None:
        averaged = state["ema"].items()
        model.load_state_dict({k.removeprefix("module."): v for k, v in averaged if "module." in k})
    return model.to(device).eval(), state["config"] | {key: state[key] for key in PROVENANCE}


def fingerprint(*tensors: Tensor | None) -> str:
    """Of the shapes and values of tensors."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(str(None if t is None else t.shape).encode())
        if t is not None:
            digest.update(t.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def images_fingerprint(data: Data) -> str:
    """Of the images and labels that a run trains on and is measured on."""
    return fingerprint(*data[:4], data.unlabelled)


def save_weights(path: Path, model: models.Network, config: dict) -> None:
    """What `load_run` has given, as a file of weights that it takes: for others to load."""
    config = config | {"data_dir": "data"}  # of others
    state = {"format": FORMAT, "config": config, "model_config": model.config._asdict()}
    state |= {"model": model.state_dict(), "ema": None}
    state |= {key: config[key] for key in PROVENANCE}
    with writing(path) as beside, open(beside, "wb") as file:
        torch.save(state, file)


def load_data(config: dict, data_dir: str | None = None) -> Data:
    """The data set of a run's configuration, on the CPU."""
    keys = ("image_size", "unlabelled", "threshold", "validation", "train_images")
    options = {key: config.get(key) for key in keys}
    return load(config["dataset"], data_dir or config["data_dir"], **options)


# --------------------------------------------------------------------------------------------------
# Representations and the probe


@torch.no_grad()
def representations(
    model: models.Network,
    images: Tensor,
    sample: bool = False,
    binarised: bool = False,
    seed: int = 0,
    widest: int | None = None,
) -> list[Tensor]:
    """Each level's representation (N, D) of uint8 images (N, C, H, W), bottom to top, on the
    model's device: the posterior mean given the means of the levels it is conditioned on.

    With `sample` a posterior sample instead; with `binarised` of one draw of the binarised image.
    Maps of more than `widest` numbers an image are averaged over squares to fewer.
    """
    device = model.device
    parts: list[list[Tensor]] = [[] for _ in range(model.levels)]
    for start, batch in in_order(images, device, "representations"):
        with seeded(device, seed + start):
            x = to_input(batch) if binarised else to_unit(batch)
            latents = model.infer(x, sample=sample).latents
        for level, z in zip(parts, latents, strict=True):
            if widest is not None and z.dim() == 4 and z[0].numel() > widest:
                z = F.adaptive_avg_pool2d(z, max(1, math.isqrt(widest // z.shape[1])))
            level.append(z.flatten(1))
    return [torch.cat(level) for level in parts]


def probes(
    model: models.Network, data: Data, which: str = "every", kind: str = "mean"
) -> dict[str, float]:
    """The probe of each level and of all levels together, {"z1": ..., "zL": ..., "all": ...}, or
    with `which="top"` of z_L alone. `kind` is one of PROBE_OF. Empty where there are no labels."""
    if data.train_labels is None or len(data.train_labels.unique()) < 2:
        return {}
    labels = data.train_labels.numpy(), data.test_labels.numpy()
    of = dict(sample="sample" in kind, binarised="binarised" in kind, widest=WIDEST)
    train, test = (
        [z.cpu().numpy() for z in representations(model, images, seed=seed, **of)]
        for images, seed in ((data.train, 0), (data.test, len(data.train)))
    )
    if which == "top":
        return {f"z{model.levels}": linear_probe(train[-1], labels[0], test[-1], labels[1])}
    views = {f"z{level + 1}": (train[level], test[level]) for level in range(model.levels)}
    views["all"] = np.concatenate(train, axis=1), np.concatenate(test, axis=1)
    shown = bar(views.items(), "probes", unit=" probe")
    return {name: linear_probe(a, labels[0], b, labels[1]) for name, (a, b) in shown}


# --------------------------------------------------------------------------------------------------
# Likelihoods and divergences


@torch.no_grad()
def active_units(model: models.Network, images: Tensor) -> list[int]:
    """How many dimensions of each level have a posterior mean whose variance over the images
    exceeds ACTIVE, bottom to top. A collapsed z_L (Eq. 7) has none; below it a mean of LVAE also
    varies with the level above."""
    sums = [
        torch.zeros(2, math.prod(shape), dtype=torch.float64, device=model.device)
        for shape in model.latent_shapes
    ]
    for _, batch in in_order(images, model.device, "active units"):
        for total, z in zip(sums, model.infer(to_unit(batch), sample=False).latents, strict=True):
            z = z.flatten(1).double()
            total += torch.stack([z.sum(0), z.square().sum(0)])
    means = (total / len(images) for total in sums)
    return [int((square - mean.square() > ACTIVE).sum()) for mean, square in means]


@torch.no_grad()
def densities(model: models.Network, images: Tensor, samples: int = 0, seed: int = 0) -> dict:
    """Means over (binarised) images, nats: "kl" and "log_px_given_z" per level, "elbo", "iwae".

    One posterior sample an image, skip paths by the prior means. "elbo" is log p(x, z) - log q(z|x)
    of the sample, a bound whatever the architecture. "iwae" is the importance-weighted bound with
    `samples` samples, None where that is 0.
    """
    device, levels = model.device, model.levels
    sums = torch.zeros(2 * levels + 2, dtype=torch.float64, device=device)
    for start, batch in in_order(images, device, "likelihoods"):
        with seeded(device, seed + start):
            x = to_input(batch)
            inference = model.infer(x)
            z = inference.latents
            paths = [model.generate([None] * k + z[k:]).log_prob(x) for k in range(levels)]
            elbo = paths[0] - rewards.log_ratios(inference).sum(dim=0)
            values = [*rewards.kl_terms(inference, model.order), *paths, elbo]
            if samples:
                values.append(rewards.importance_weighted_bound(model, x, samples))
            sums[: len(values)] += torch.stack([v.double().sum() for v in values])
    *means, elbo, iwae = (sums / len(images)).tolist()
    return {
        "kl": means[:levels],
        "log_px_given_z": means[levels:],
        "elbo": elbo,
        "iwae": iwae if samples else None,
    }


def level_information(model: models.Network, data: Data, level: int, seed: int = 0) -> dict:
    """MINE (App. C.2) between images and posterior samples of a level: trained on the training
    split, with new samples every fifth epoch, measured on the test split; {"nats", "ceiling"}."""
    device, images = model.device, len(data.train) + len(data.test)
    z_test = representations(model, data.test, sample=True, seed=seed + len(data.train))[level]
    held_out = data.test.to(device), z_test
    with bar(desc="MINE", total=100, unit=" epoch") as shown:

        def draw(epoch: int) -> Tensor:
            shown.update(epoch - shown.n)
            seed_now = seed + epoch * images
            return representations(model, data.train, sample=True, seed=seed_now)[level]

        estimate = mine.mutual_information(data.train.to(device), draw, held_out, seed=seed)
    return {"nats": estimate.nats, "ceiling": estimate.ceiling}


# --------------------------------------------------------------------------------------------------
# All of it


def evaluate(
    model: models.Network,
    data: Data,
    kept: dict | None = None,
    samples: int = 16,
    probe: str = "every",
    probe_of: str = "mean",
    mine_levels: tuple[int, ...] = (),
) -> dict:
    """All measures of a model; what `kept` has already is not made again.

    Percentages from 0 to 100, nats an image; lists go bottom to top; `mine_levels` are 0-based.
    """
    result = {"mine": {}} | (kept or {})
    key = "probe" if probe_of == "mean" else f"probe_{probe_of.replace('-', '_')}"
    for name, kind in {"probe": "mean", key: probe_of}.items():
        if name not in result or (probe == "every" and "all" not in result[name]):
            result[name] = probes(model, data, probe, kind)
    if result.get("iwae_samples") != samples:
        result |= densities(model, data.test, samples) | {"iwae_samples": samples}
        result["bpd"] = -result["elbo"] / (data.test[0].numel() * math.log(2))
        result["active_units"] = active_units(model, data.test)
    for level in mine_levels:
        if f"z{level + 1}" not in result["mine"]:
            result["mine"][f"z{level + 1}"] = level_information(model, data, level)
    return finite(result)


def finite(result: dict) -> dict:
    """The result; UserError where one of its numbers is not finite."""
    try:
        json.dumps(result, allow_nan=False)
    except ValueError:
        raise UserError("the model has diverged, its evaluation is not finite: train it with a "
                        "lower --lr or --dtype float32") from None  # fmt: skip
    return result


def quick_eval(model: models.Network, data: Data) -> dict:
    """A cheap evaluation during training: KL and ELBO of the test split, and the probe of z_L
    fitted on 10,000 training images where they have labels."""
    measured = densities(model, data.test)
    result = {"kl": measured["kl"], "elbo": measured["elbo"]}
    if data.train_labels is None:
        return finite(result)
    some = evenly(len(data.train), 10_000)
    few = data._replace(train=data.train[some], train_labels=data.train_labels[some])
    if probe := probes(model, few, which="top"):
        result["probe"] = probe[f"z{model.levels}"]
    return finite(result)


def table(result: dict) -> str:
    """The evaluation as text, the top level first, as the hierarchies are drawn."""
    probes = {k.replace("probe_", "").replace("_", " ") + " %": v for k, v in result.items()
              if k.startswith("probe") and v}  # fmt: skip
    widths = [max(len(title) + 2, 9) for title in probes]
    heads = "".join(f"{title:>{w}}" for title, w in zip(probes, widths, strict=True))
    lines = [f"{'level':>6}{heads}{'KL':>10}{'active':>8}{'log p(x|z)':>12}"]
    for level in reversed(range(len(result["kl"]))):
        name = f"z{level + 1}"
        values = (f"{p[name]:.2f}" if name in p else "-" for p in probes.values())
        line = f"{name:>6}" + "".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
        line += f"{result['kl'][level]:10.3f}{result['active_units'][level]:8d}"
        line += f"{result['log_px_given_z'][level]:12.2f}"
        if name in result["mine"]:
            line += "   MINE {nats:.2f} nats (at most {ceiling:.2f})".format(**result["mine"][name])
        lines.append(line)
    values = (f"{p['all']:.2f}" if "all" in p else "-" for p in probes.values())
    line = f"{'all':>6}" + "".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
    lines.append(line + f"{sum(result['kl']):10.3f}")
    lines.append(
        f"ELBO {result['elbo']:.2f} nats, {result['bpd']:.4f} bits per dimension; importance-"
        f"weighted bound ({result['iwae_samples']} samples) {result['iwae']:.2f} nats"
    )
    if not probes:
        lines.append("no probe: the images have no labels, or those of a single class")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Measure what a run has learned, or a file of weights.")
    # fmt: off
    parser.add_argument("run", type=Path, metavar="RUN",
                        help="a folder that train.py has written, or a file of weights")
    parser.add_argument("--probe", choices=("every", "top"), default="every",
                        help="every level and all together (default), or z_L alone, much sooner")
    parser.add_argument("--probe-of", choices=PROBE_OF, default="mean",
                        help="what else is probed beside the posterior's mean: a sample of it, and "
                        "either of binarised images")
    parser.add_argument("--mine", nargs="?", const="top", metavar="LEVELS",
                        help="mutual information of x and z_L, or of these levels: 1,5")
    parser.add_argument("--samples", type=int, default=16,
                        help="of the importance-weighted bound (default 16)")
    parser.add_argument("--save", type=Path, metavar="FILE.pt",
                        help="write the weights and the configuration alone, for others to load")
    parser.add_argument("--data-dir", help="where the data sets are (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    # fmt: on
    args = parser.parse_args(argv)
    with one_line(parser):
        if args.samples < 1:
            raise UserError(f"--samples {args.samples}: the bound needs at least 1")
        if args.save is not None and args.save.suffix != ".pt":
            raise UserError(f"--save {args.save}: name a file that ends in .pt")
        if args.save is not None and args.save.exists():
            raise UserError(f"--save {args.save}: it exists, name a new file")
        device = pick_device(args.device)
        model, config = load_run(args.run, device)
        top, wanted = str(model.levels), args.mine.split(",") if args.mine else []
        wanted = [top if level == "top" else level.strip() for level in wanted]
        for level in wanted:
            if not (level.isdigit() and 1 <= int(level) <= model.levels):
                raise UserError(f"--mine {level!r}: name levels from 1 to {top}")
        if "binarised" in args.probe_of and model.config.image[0] > 1:
            raise UserError(f"{args.run} is of colour images: --probe-of {args.probe_of} is not")
        if args.save is not None:
            save_weights(args.save, model, config)
        data = place(load_data(config, args.data_dir), device)
        kept = kept_evaluation(args.run, model, data, config)
        levels = tuple(int(level) - 1 for level in wanted)
        result = evaluate(model, data, kept, args.samples, args.probe, args.probe_of, levels)
        print(json.dumps(result) if args.json else table(result), flush=True)
        why_not = keep(args.run, result) if args.run.is_dir() else ""  # weights are only measured
        if why_not and not args.json:
            print(why_not)


def kept_evaluation(run: Path, model: models.Network, data: Data, config: dict) -> dict:
    """What eval.json has, if it is of these weights and images; else what it is to begin with."""
    keys = ("out", "epoch", "updates", "dataset", "arch", "rl", "ivae")
    about = {key: config[key] for key in keys} | {
        "commit": commit(),
        "weights": fingerprint(*model.state_dict().values()),
        "images": images_fingerprint(data),
    }
    path = run / "eval.json"
    if not path.exists():
        return about
    try:
        kept = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and evaluate the run again") from None
    return kept if all(kept.get(key) == about[key] for key in ("weights", "images")) else about


def keep(run: Path, result: dict) -> str:
    """Writes eval.json, if the run's weights and images are still those measured; else says why."""
    with locked(run):
        if load_checkpoint(run)["images"] != result["images"]:
            return f"not kept: {run} was trained on other images"
        if fingerprint(*load_run(run)[0].state_dict().values()) != result["weights"]:
            return f"not kept: {run} has been trained on since"
        write_json(run / "eval.json", result)
    return ""


if __name__ == "__main__":
    main()
