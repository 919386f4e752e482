"""Runs side by side: mean and standard deviation over seeds, the paper's values beside them.

A run is a folder that train.py has written; config.json, eval.json and metrics.jsonl are enough.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import models
from files import UserError

# --------------------------------------------------------------------------------------------------
# What the paper reports: mean and standard deviation over 5 seeds, as printed there

COLUMNS = ("fashionmnist", "cifar10", "cifar100", "tinyimagenet", "stl10")
# Table 1: probe of z_L in percent and MINE of x and z_L, for each of COLUMNS. Its IVAE is stated
# top-down (Eq. 39).
TABLE_1 = {
    "AAE": "72.11±0.27 4.08±0.67  38.36±0.20 5.91±1.03  17.56±0.45 6.19±0.95  "
           "8.73±0.58 3.37±0.67  36.64±0.17 6.65±1.10",
    "VAE": "75.08±0.09 4.36±0.35  39.98±0.05 6.32±0.65  19.05±0.20 13.76±1.85  "
           "8.92±0.36 3.76±1.21  37.75±0.07 6.87±0.75",
    "BIVA": "28.67±0.64 3.48±0.48  10.40±0.13 5e-9±0.00  1.07±0.05 8e-9±0.00  "
            "0.67±0.06 9e-8±0.00  10.02±0.20 1.41±0.38",
    "LVAE+IVAE": "76.25±0.30 2.44±0.52  39.26±0.25 6.41±0.69  19.49±0.33 8.91±0.96  "
                 "8.07±0.69 3.92±0.98  37.98±0.41 2.86±0.95",
    "HVAE": "10.73±0.08 0.31±0.08  10.40±0.05 3e-8±0.00  1.21±0.10 7e-7±0.00  "
            "0.63±0.06 5e-10±0.00  10.24±0.07 0.97±0.17",
    "HVAE+RL": "78.23±0.13 5.01±0.70  46.46±0.15 11.39±1.20  25.21±0.21 17.01±2.41  "
               "12.76±0.39 11.88±2.87  43.76±0.15 10.93±1.73",
    "LVAE": "19.70±0.21 1.73±0.32  15.32±0.10 5e-5±0.00  10.38±0.89 1.04±0.39  "
            "4.77±0.47 0.54±0.12  11.89±0.10 0.45±0.08",
    "LVAE+RL": "78.48±0.15 4.37±0.58  46.35±0.17 6.91±0.86  25.41±0.20 9.00±1.19  "
               "13.41±0.44 4.48±1.71  41.86±0.26 10.77±1.94",
}  # fmt: skip
# Table 2: bits per dimension and KL of z_L, of FashionMNIST and of CIFAR-10.
TABLE_2 = {
    "VAE": "0.306±0.041 17.9±0.3  3.74±0.01 263.0±4.0",
    "BIVA": "0.302±0.071 3e-4±0.0  2.85±0.02 2e-3±0.0",
    "LVAE+IVAE": "0.403±0.096 28.9±0.7  3.48±0.05 233.0±7.0",
    "HVAE": "0.315±0.067 6e-5±0.0  4.55±0.02 1e-3±0.0",
    "HVAE+RL": "0.305±0.089 41.2±0.4  4.36±0.03 265.0±8.0",
    "LVAE": "0.313±0.050 9e-4±0.0  2.91±0.03 2e-3±0.0",
    "LVAE+RL": "0.335±0.072 32.1±0.5  3.21±0.07 181.0±6.0",
}
# Table 3: the probe of all levels together.
TABLE_3 = {
    "HVAE": "79.96±0.23 50.09±0.67",
    "LVAE": "80.25±0.27 49.87±0.39",
    "HVAE+RL": "84.56±0.25 52.87±0.54",
    "LVAE+RL": "84.77±0.30 52.89±0.48",
}
# Table 4: the probe of z_L by the discount gamma.
TABLE_4 = {
    "HVAE+RL": {0: "75.63±0.11 41.91±0.15", 0.8: "78.03±0.16 46.45±0.30",
                0.85: "78.11±0.24 45.89±0.24", 0.9: "78.23±0.13 46.46±0.15",
                0.95: "77.95±0.19 46.21±0.21", 0.98: "78.01±0.10 46.31±0.20"},
    "LVAE+RL": {0: "75.52±0.10 42.16±0.13", 0.8: "77.98±0.23 46.42±0.27",
                0.85: "78.34±0.19 45.97±0.31", 0.9: "78.48±0.15 46.35±0.17",
                0.95: "78.53±0.16 46.25±0.25", 0.98: "78.28±0.17 46.37±0.19"},
}  # fmt: skip
# Table 5: the probe of z_L on FashionMNIST by the number of levels, 3 to 10.
TABLE_5 = {
    "HVAE+RL": "78.60 78.51 78.23 77.70 77.08 76.59 76.29 75.99",
    "LVAE+RL": "78.77 78.32 78.48 77.90 77.21 76.54 75.90 75.82",
}


def paper(dataset: str, method: str, levels: int, gamma: float) -> dict[str, str]:
    """What the paper reports of a method, by the names of MEASURES; empty where it has nothing."""
    if dataset not in COLUMNS:
        return {}
    column, found = COLUMNS.index(dataset), {}

    def take(names: list[str], line: str, at: int) -> None:
        values = line.split()[at : at + len(names)]
        found.update(zip(names, values, strict=False))

    rl = method.endswith("+RL")
    if levels == (1 if method in ("VAE", "AAE") else 5) and (not rl or gamma == 0.9):
        take(["probe", "mine"], TABLE_1.get(method, ""), 2 * column)
        take(["bpd", "kl"], TABLE_2.get(method, ""), 2 * column)
        take(["all"], TABLE_3.get(method, ""), column)
    elif rl and levels == 5:
        take(["probe"], TABLE_4.get(method, {}).get(gamma, ""), column)
    elif rl and gamma == 0.9 and levels >= 3 and dataset == "fashionmnist":
        take(["probe"], TABLE_5.get(method, ""), levels - 3)
    return found


# --------------------------------------------------------------------------------------------------
# Runs and their configurations

METHODS = ("AAE", "VAE", "VAE+IVAE", "VAE+RL", "BIVA", "HVAE", "HVAE+IVAE", "HVAE+RL", "LVAE",
           "LVAE+IVAE", "LVAE+RL")  # fmt: skip
ADDED = {  # settings of a run from before they could be chosen
    "ivae": False, "pay": "inferred", "compile": False, "accumulate": 1, "train_images": None,
    "minutes": None, "schedule": "constant", "ema": 0.0, "threshold": False,
    "mean_field": False,
}  # fmt: skip
UNSAID = {  # values that need no word beside a row that has another
    "pay": "inferred", "skip": "mean", "latents": None, "channels": None, "compile": False,
    "train_images": None, "schedule": "constant", "ema": 0.0, "free_bits": 0.0,
    "free_bits_epochs": None, "threshold": False, "mean_field": False,
}  # fmt: skip
NOT_COMPARED = {  # settings that say where and how a run is computed, not what
    "seed", "out", "data_dir", "device", "device_data", "eager", "eval_every", "probe",
    "save_every",
}  # fmt: skip


class Run(NamedTuple):
    folder: Path
    config: dict
    evaluation: dict  # as eval.json has it
    metrics: list[dict]  # a line an epoch
    method: str  # one of METHODS
    past: bool = False  # as it was before its end, of which there is no checkpoint

    @property
    def levels(self) -> int:
        return len(self.evaluation["kl"])

    @property
    def settings(self) -> dict:
        """What makes two runs comparable: everything configured that has an effect."""
        config = ADDED | self.config
        idle = {"levels"}
        if not config["rl"]:
            idle |= {"gamma", "pay"} if config["ivae"] else {"gamma", "update", "skip", "pay"}
        if config["arch"] == "aae":
            idle |= {"warmup", "free_bits"}
        if not config["free_bits"] or "free_bits" in idle:
            idle.add("free_bits_epochs")
        if config["minutes"] is not None:
            idle.add("epochs")
        skipped = NOT_COMPARED | idle
        kept = {key: value for key, value in config.items() if key not in skipped}
        if config["rl"] and kept.get("epochs") == max(1, round(1000 / self.levels)):
            kept["epochs"] = "1000/L"  # the paper's rule is one setting, whatever L
        return kept | {"levels": self.levels}


def read_json(path: Path, keys: tuple[str, ...]) -> dict:
    """The object in a file, which must have these keys. UserError where it is none such."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise UserError(f"{path} is damaged or of another version: evaluate or train the run again")
    return found


def read_run(folder: Path, evaluation: dict) -> Run:
    """The run in a folder. UserError where it is not one, or damaged."""
    config = read_json(
        folder / "config.json",
        ("arch", "rl", "gamma", "dataset", "seed", "latents", "epochs", "free_bits"),
    )
    path, metrics = folder / "metrics.jsonl", []
    try:
        if path.exists():
            metrics = [json.loads(line) for line in path.read_text().splitlines()]
            [(line["epoch"], line["seconds"], line["kl"][-1]) for line in metrics]
            [(line["test"]["elbo"], line["test"]["kl"][-1]) for line in metrics if "test" in line]
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{path} is damaged: train again") from None
    objective = "+RL" if config["rl"] else "+IVAE" if config.get("ivae") else ""
    return Run(folder, config, evaluation, metrics, config["arch"].upper() + objective)


def earlier(run: Run, epochs: int | None = None, minutes: float | None = None) -> Run:
    """The run as it was after so many epochs, or at its last look within so many minutes of
    training, by the looks of --eval-every. UserError where it looked not then.

    With a constant learning rate it counts as a run of that length, for that is what it was.
    """
    whole = run.evaluation
    lines = [line for line in run.metrics if "test" in line and "elbo" in whole]
    if minutes is None:
        when, lines = f"after {epochs} epochs", [e for e in lines if e["epoch"] == epochs]
    else:
        when = f"within {minutes:g} minutes"
        lines = [line for line in lines if line["seconds"] <= 60 * minutes]
    if not lines:
        raise UserError(f"{run.folder} did not look at the test split {when}: see --eval-every")
    test, config = lines[-1]["test"], run.config
    evaluation = {
        "probe": {f"z{run.levels}": test["probe"]} if "probe" in test else {},
        "kl": test["kl"],
        "elbo": test["elbo"],
        "bpd": whole["bpd"] * test["elbo"] / whole["elbo"],
        "mine": {},
    }
    if config.get("schedule", "constant") == "constant":
        length = {"epochs": epochs} if minutes is None else {}
        config = config | {"minutes": minutes} | length
    metrics = [line for line in run.metrics if line["epoch"] <= lines[-1]["epoch"]]
    return run._replace(config=config, evaluation=evaluation, metrics=metrics, past=True)


class Group(NamedTuple):
    """The seeds of one configuration."""

    label: str  # the method, and what sets the configuration apart from others of the same method
    runs: list[Run]  # by seed

    @property
    def first(self) -> Run:
        return self.runs[0]


def groups(runs: list[Run], whatever: tuple[str, ...] = ()) -> list[Group]:
    """Runs of one configuration together, `whatever` the settings of these names; by data set, then
    in the order of METHODS, of levels, discount, length and warm-up.

    Raises UserError where a configuration has a seed twice: it would count twice.
    """
    together: dict[tuple, list[Run]] = {}
    seen: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda run: run.config["seed"]):
        settings = {k: repr(v) for k, v in run.settings.items()}
        other = seen.setdefault((run.config["seed"], *sorted(settings.items())), run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {run.folder} have the same settings and seed: name one"
            )
        key = tuple(sorted((k, v) for k, v in settings.items() if k not in whatever))
        together.setdefault(key, []).append(run)

    found = []
    for of_one in together.values():
        first = of_one[0]
        same = [
            other[0].settings
            for other in together.values()
            if (other[0].config["dataset"], other[0].method)
            == (first.config["dataset"], first.method)
        ]
        differing = [
            key
            for key in first.settings
            if key not in whatever and any(other.get(key) != first.settings[key] for other in same)
        ]
        if first.settings["minutes"] is None and {"epochs", "minutes"} <= set(differing):
            differing.remove("minutes")  # the number of epochs says it
        parts = [
            setting(key, first.settings[key])
            for key in differing
            if key not in UNSAID or first.settings[key] != UNSAID[key]
        ]
        found.append(Group(", ".join([first.method, *parts]), of_one))

    def position(group: Group) -> tuple:
        run = group.first
        of_method = run.config["dataset"], METHODS.index(run.method), run.levels
        length = run.config.get("minutes") or 0.0, run.config["epochs"]
        return *of_method, run.config["gamma"], *length, run.config.get("warmup") or 0

    return sorted(found, key=position)


def setting(key: str, value: object) -> str:
    name = key.replace("_", " ")
    if key == "levels":
        return f"{value} levels"
    if key == "epochs":
        return f"{value} epochs"
    if key == "minutes":
        return "by epochs" if value is None else f"{value:g} minutes"
    if key == "train_images":
        return f"{value} images"
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {value}"


# --------------------------------------------------------------------------------------------------
# The table

MEASURES = {  # name: heading, decimals
    "probe": ("z_L probe %", 2),
    "all": ("all levels %", 2),
    "binarised": ("binarised z_L %", 2),
    "binarised_all": ("binarised all %", 2),
    "sampled": ("sampled z_L %", 2),
    "sampled_all": ("sampled all %", 2),
    "sampled_binarised": ("sampled, binarised z_L %", 2),
    "sampled_binarised_all": ("sampled, binarised all %", 2),
    "mine": ("MINE nats", 2),
    "bpd": ("bpd", 3),
    "kl": ("KL z_L", 2),
    "active": ("active units of z_L", 1),
    "seconds": ("training s", 0),
    "elbo": ("ELBO", 1),
    "iwae": ("IWAE", 1),
    "kls": ("KL, z_1 … z_L", 2),
}
SHOWN = tuple(name for name in MEASURES if name not in ("elbo", "iwae", "kls"))  # unless asked


def measures(run: Run) -> dict:
    """The numbers of MEASURES that a run has; "kls" are a list."""
    e, top = run.evaluation, f"z{run.levels}"
    values = {
        "probe": e["probe"].get(top),
        "all": e["probe"].get("all"),
        "binarised": e.get("probe_binarised", {}).get(top),
        "binarised_all": e.get("probe_binarised", {}).get("all"),
        "sampled": e.get("probe_sampled", {}).get(top),
        "sampled_all": e.get("probe_sampled", {}).get("all"),
        "sampled_binarised": e.get("probe_sampled_binarised", {}).get(top),
        "sampled_binarised_all": e.get("probe_sampled_binarised", {}).get("all"),
        "mine": e["mine"].get(top, {}).get("nats"),
        "bpd": e["bpd"],
        "kl": e["kl"][-1],
        "active": e.get("active_units", [None])[-1],
        "seconds": run.metrics[-1]["seconds"] if run.metrics else None,
        "elbo": e.get("elbo"),
        "iwae": e.get("iwae"),
        "kls": e["kl"],
    }
    return {name: value for name, value in values.items() if value is not None}


def latents_of_paper(run: Run) -> bool:
    """Whether a run's latents are a preset's, or named and those of the paper's text."""
    named = run.config["latents"]
    kind = "grey" if run.config["dataset"] == "fashionmnist" else "colour"
    text = models.PRESETS["paper"][kind]["latents"][-run.levels :]
    return named is None or tuple(name.strip() for name in named.split(",")) == text


def rows(runs: list[Run]) -> list[dict]:
    """A row a configuration: for each measure the values by seed, their mean and standard deviation
    (n - 1; None of one value), and what the paper has. Of "kls" the mean is one of each level."""
    out = []
    for label, of_one in groups(runs):
        first, row = of_one[0], {}
        reported = paper(first.config["dataset"], first.method, first.levels, first.config["gamma"])
        if first.settings["train_images"] or not latents_of_paper(first):
            reported = {}  # the paper trains on all images, and latents of its own
        for name in MEASURES:
            values = [m[name] for m in map(measures, of_one) if name in m]
            lists = name == "kls"
            mean = (
                [statistics.fmean(level) for level in zip(*values, strict=True)] if lists else None
            )
            row[name] = {
                "values": values,
                "mean": mean if lists else statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 and not lists else None,
                "paper": reported.get(name),
            }
        about = {"dataset": first.config["dataset"], "label": label, "method": first.method}
        ceilings = [e["ceiling"] for run in of_one for e in run.evaluation["mine"].values()]
        out.append(
            about
            | {"seeds": [run.config["seed"] for run in of_one]}
            | {"mine_ceiling": max(ceilings, default=None)}
            | row
        )
    return out


def cell(measure: dict, decimals: int) -> str:
    """Mean ± standard deviation; a mean that would read as zero in powers of ten."""
    mean, std = measure["mean"], measure["std"]
    if mean is None:
        return ""
    if isinstance(mean, list):
        return " ".join(f"{value:.{decimals}f}" for value in mean)
    form = f".{decimals}f" if abs(mean) >= 0.5 * 0.1**decimals or mean == 0 else ".0e"
    return f"{mean:{form}}" + ("" if std is None else f" ± {std:{form}}")


def table(runs: list[Run], markdown: bool = False, columns: tuple[str, ...] = SHOWN) -> str:
    """`rows` as text or Markdown, a table a data set; `columns` are names of MEASURES, those that
    nobody fills are left out."""
    found, parts = rows(runs), []
    for dataset in dict.fromkeys(row["dataset"] for row in found):
        here = [row for row in found if row["dataset"] == dataset]
        head, filled = ["", "seeds"], [[row["label"] for row in here]]
        filled.append([str(len(row["seeds"])) for row in here])
        for name in columns:
            heading, decimals = MEASURES[name]
            column = [cell(row[name], decimals) for row in here]
            reported = [(row[name]["paper"] or "").replace("±", " ± ") for row in here]
            if any(column):
                head.append(heading)
                filled.append(column)
                if any(reported):
                    head.append("paper")
                    filled.append(reported)
        lines = [head, *zip(*filled, strict=True)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        ceiling = max((row["mine_ceiling"] or 0 for row in here), default=0)
        note = f"MINE cannot exceed {ceiling:.2f} nats." if ceiling and "mine" in columns else ""
        if markdown:
            text = ["| " + " | ".join(line) + " |" for line in lines]
            text.insert(1, "|---" * len(head) + "|")
            parts.append("\n".join([f"**{dataset}**", "", *text] + (["", note] if note else [])))
        else:
            text = [
                "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(pairs))
                for pairs in (list(zip(line, widths, strict=True)) for line in lines)
            ]
            parts.append("\n".join([dataset, *text] + ([note] if note else [])))
    return "\n\n".join(parts)
