"""Runs side by side: mean and standard deviation over seeds, the paper's values beside them.

    python tables.py results/gamma.jsonl runs/gamma-* --rows 'gamma-hvae-*' --columns probe,kl

RUN is a run's folder (config.json, eval.json, metrics.jsonl) or a .jsonl file with a run a line.
A run's name without its trailing "-SEED" is its row.
"""

import contextlib
import csv
import json
import statistics
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from files import Parser, UserError, one_line, writing

PAPER = Path(__file__).parent / "results" / "paper.csv"  # its Tables 1 to 5
LATENTS = {"grey": "128,64,32,16,8", "colour": "128c,64c,256,128,64"}  # of its text
NOT_COMPARED = {"seed", "out", "data_dir", "device", "eval_every", "probe", "given", "made_by"}
ALIKE = {  # in the evaluations of a row's seeds; where not, what to do
    "epoch": "train.py --resume finishes a run, tables.py --after-epochs compares at an epoch",
    "updates": "train.py --resume finishes a run",
    "iwae_samples": "evaluate.py --samples measures one anew",
}

MEASURES = {  # name: heading, decimals, its place in an evaluation; lists bottom to top
    "probe": ("z_L probe %", 2, lambda e, z: e["probe"][z]),
    "all": ("all levels %", 2, lambda e, z: e["probe"]["all"]),
    "mine": ("MINE nats", 2, lambda e, z: e["mine"][z]["nats"]),
    "bpd": ("bpd", 3, lambda e, z: e["bpd"]),
    "kl": ("KL z_L", 2, lambda e, z: e["kl"][-1]),
    "active": ("active units", 1, lambda e, z: e["active_units"][-1]),
    "seconds": ("training s", 0, lambda e, z: e["seconds"]),
    "epochs": ("epochs", 0, lambda e, z: [e["epochs"]]),  # a list: without a deviation
    "elbo": ("ELBO", 1, lambda e, z: e["elbo"]),
    "iwae": ("IWAE", 1, lambda e, z: e["iwae"]),
    "kls": ("KL, z_1 … z_L", 2, lambda e, z: e["kl"]),
    "decoded": ("log p(x given z_l), z_1 … z_L", 1, lambda e, z: e["log_px_given_z"]),
}
KINDS = {k: k.replace("_", " ") for k in ("sample", "binarised_mean", "binarised_sample")}
MEASURES |= {  # evaluate.py --probe-of
    k: (f"z_L, {words} %", 2, lambda e, z, k=k: e[f"probe_{k}"][z]) for k, words in KINDS.items()
} | {
    f"{k}_all": (f"all, {words} %", 2, lambda e, z, k=k: e[f"probe_{k}"]["all"])
    for k, words in KINDS.items()
}
SHOWN = ("probe", "all", "mine", "bpd", "kl", "active", "seconds")  # unless asked
USUAL = {  # setting: its usual value, and what --words calls another
    "pay": ("inferred", "{} pay"),
    "update": ("sampled", "{}"),
    "gamma": (0.9, "gamma {:g}"),
    "skip": ("mean", "{}d skip paths"),
    "size": ("small", "size {}"),
    "levels": (None, "{} levels"),
    "latents": (None, "latents {}"),
    "mean_field": (False, "no merge"),
    "free_bits": (0, "{:g} free nats"),
    "lr": (1e-3, "learning rate {:g}"),
    "threshold": (False, "black and white"),
    "validation": (False, "validation"),
    "kl": ("exact", "{} KL"),  # of earlier runs of HVAE
    "changed": (None, "{}"),  # of runs with a changed copy of models.py
}


class Run(NamedTuple):
    name: str
    seed: int
    config: dict
    evaluation: dict  # what evaluate.py keeps in eval.json
    metrics: list[dict]  # one an epoch
    folder: Path | None = None  # None where it came from a .jsonl file
    commit: str | None = None  # at which it was measured, where known

    @property
    def levels(self) -> int:
        return len(self.evaluation["kl"])

    @property
    def method(self) -> str:
        objective = "+RL" if self.config["rl"] else "+IVAE" if self.config["ivae"] else ""
        return self.config["arch"].upper() + objective

    @property
    def words(self) -> str:
        """The method and what is not usual of it; the ELBO usually has no warm-up, RL and IVAE
        have one."""
        c = self.config
        said = [form.format(c[k]) for k, (usual, form) in USUAL.items() if c.get(k, usual) != usual]
        if bool(c["warmup"]) != (c["rl"] or c["ivae"]):
            said.append(f"warm-up {c['warmup']}" if c["warmup"] else "no warm-up")
        return ", ".join([self.method.replace("+", " + "), *said])

    @property
    def row(self) -> str:
        return self.name.removesuffix(f"-{self.seed}")


def read(paths: Iterable[str | Path]) -> list[Run]:
    """The runs of run folders and .jsonl files, in the order given. UserError where one is none."""
    runs = []
    for path in map(Path, paths):
        config, evaluation = path / "config.json", path / "eval.json"
        if not (path if path.suffix == ".jsonl" else config).exists():
            raise UserError(f"no run at {path}: name a run's folder or a .jsonl file")
        if config.exists() and not evaluation.exists():
            raise UserError(f"{path} has no eval.json: python evaluate.py {path} makes it")
        try:
            if path.suffix == ".jsonl":
                here = [Run(**json.loads(line)) for line in path.read_text().splitlines()]
            else:
                config, evaluation = (json.loads(file.read_text()) for file in (config, evaluation))
                metrics = [*map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]
                about = path.resolve().name, config["seed"], config, evaluation, metrics
                here = [Run(*about, path, evaluation.get("commit"))]
            for run in here:  # what every table needs
                _ = measures(run)["kl"], reported(run), run.row
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path} is damaged or of another version") from None
        runs += here
    return runs


def choose(runs: Iterable[Run], patterns: Iterable[str]) -> list[Run]:
    """The runs of the rows that match a pattern, in the patterns' order. UserError of none."""
    chosen: list[Run] = []
    for glob in patterns:
        matching = [run for run in runs if fnmatchcase(run.row, glob)]
        if not matching:
            raise UserError(f"no row is named {glob}")
        chosen += [run for run in matching if run not in chosen]
    return chosen


def pack(runs: list[Run], path: Path) -> None:
    """Write the runs into a new .jsonl file, a line a run, whole or not at all."""
    if path.suffix != ".jsonl" or path.exists():
        raise UserError(f"--pack {path}: name a new file that ends in .jsonl")
    fields = (run._replace(folder=None)._asdict() for run in runs)
    lines = (json.dumps({k: v for k, v in f.items() if v is not None}) + "\n" for f in fields)
    with writing(path) as beside:
        beside.write_text("".join(lines))


def at_epoch(run: Run, epoch: int) -> Run:
    """The run as --eval-every measured it after that epoch. UserError where it did not."""
    lines = [line for line in run.metrics if line["epoch"] <= epoch]
    if not lines or lines[-1]["epoch"] < epoch or "test" not in lines[-1]:
        raise UserError(f"{run.name} was not evaluated at epoch {epoch}: see train.py --eval-every")
    test, whole = lines[-1]["test"], run.evaluation
    evaluation = {key: test[key] for key in ("kl", "elbo") if key in test}
    if "elbo" in test and "elbo" in whole:
        evaluation["bpd"] = whole["bpd"] * test["elbo"] / whole["elbo"]
    if "probe" in test:
        evaluation["probe"] = {f"z{run.levels}": test["probe"]}
    return run._replace(evaluation=evaluation, metrics=lines)


def groups(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Rows by name, in the order given; the runs of each by seed. UserError where a row has a seed
    twice, other settings, or seeds not measured alike."""
    rows: dict[str, dict[int, Run]] = {}
    for run in runs:
        row = rows.setdefault(run.row, {})
        if run.seed in row:
            raise UserError(f"row {run.row} has seed {run.seed} twice: name one of them")
        row[run.seed] = run
        first = next(iter(row.values()))
        ours = {"data_dir"} if run.config["dataset"] == "folder" else set()  # whose images differ
        for key in (first.config.keys() | run.config.keys()) - NOT_COMPARED | ours:
            a, b = first.config.get(key), run.config.get(key)
            if (a or None) != (b or None):  # a setting that is absent is off
                raise UserError(f"{first.name} and {run.name} differ in {key}, {a} and {b}")
        for key, cure in ALIKE.items():
            a, b = first.evaluation.get(key), run.evaluation.get(key)
            if None not in (a, b) and a != b:
                raise UserError(f"{first.name} and {run.name} differ in {key}, {a} and {b}: {cure}")
    return {label: [row[seed] for seed in sorted(row)] for label, row in rows.items()}


def measures(run: Run) -> dict:
    """The numbers of MEASURES that a run has."""
    values, evaluation = {}, dict(run.evaluation)
    if run.metrics:
        evaluation |= {"seconds": run.metrics[-1]["seconds"], "epochs": run.metrics[-1]["epoch"]}
    for name, (_, _, place) in MEASURES.items():
        with contextlib.suppress(KeyError):
            values[name] = place(evaluation, f"z{run.levels}")
    return {name: value for name, value in values.items() if value is not None}


def paper(dataset: str, method: str, levels: int, gamma: float) -> dict[str, str]:
    """What the paper reports of a method, by the names of MEASURES; empty where it has nothing."""
    with PAPER.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            same = (row["dataset"], row["method"], row["levels"]) == (dataset, method, str(levels))
            if same and row["gamma"] in ("", f"{gamma:g}"):
                return {name: row[name] for name in MEASURES if row.get(name)}
    return {}


def reported(run: Run) -> dict[str, str]:
    """What stands beside a run; nothing where it had other images or latents of another text."""
    config = run.config
    if config["train_images"] or config.get("validation"):
        return {}
    text = LATENTS["grey" if config["dataset"] == "fashionmnist" else "colour"]
    if not f",{text}".endswith(f",{config['latents'] or text}"):
        return {}
    return paper(config["dataset"], run.method, run.levels, config["gamma"])


def cell(values: list, decimals: int) -> str:
    """Mean ± standard deviation (n - 1), small means in powers of ten; of lists each mean."""
    if isinstance(values[0], list):
        return " ".join(f"{statistics.fmean(v):.{decimals}f}" for v in zip(*values, strict=True))
    mean = statistics.fmean(values)
    form = f".{decimals}f" if abs(mean) >= 0.5 * 0.1**decimals or mean == 0 else ".0e"
    return f"{mean:{form}}" + (f" ± {statistics.stdev(values):{form}}" if values[1:] else "")


def table(
    rows: dict[str, list[Run]],
    markdown: bool = False,
    columns: Iterable[str] = SHOWN,
    words: bool = False,
) -> str:
    """Rows as text or Markdown, a table a data set; a column that no row fills is left out."""
    parts = []
    for dataset in dict.fromkeys(runs[0].config["dataset"] for runs in rows.values()):
        here = {name: runs for name, runs in rows.items() if runs[0].config["dataset"] == dataset}
        old = {name: ", closed-form KL" * ("kl" in runs[0].config) for name, runs in here.items()}
        names = [runs[0].words if words else name + old[name] for name, runs in here.items()]
        filled = [["", *names], ["seeds", *(str(len(runs)) for runs in here.values())]]
        for name in columns:
            heading, decimals, _ = MEASURES[name]
            values = [[m[name] for m in map(measures, runs) if name in m] for runs in here.values()]
            beside = [reported(r[0]).get(name, "").replace("±", " ± ") for r in here.values()]
            if any(values):
                filled.append([heading, *(cell(v, decimals) if v else "" for v in values)])
                filled += [["paper", *beside]] if any(beside) else []
        lines = zip(*filled, strict=True)
        if markdown:
            head, *body = ["| " + " | ".join(line) + " |" for line in lines]
            text = [f"**{dataset}**", "", head, "|---" * len(filled) + "|", *body]
        else:
            widths = [max(map(len, column)) for column in filled]
            text = [dataset, *("  ".join(map(str.rjust, line, widths)) for line in lines)]
        parts.append("\n".join(text))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("tables.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or a .jsonl file")
    parser.add_argument("--rows", default="*", metavar="GLOB,GLOB", help="these alone, in order")
    parser.add_argument("--columns", default=",".join(SHOWN), help="of " + ", ".join(MEASURES))
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--words", action="store_true", help="name rows in words")
    parser.add_argument("--after-epochs", type=int, metavar="N", help="at epoch N, by --eval-every")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the runs into this file")
    args = parser.parse_args(argv)
    with one_line(parser):
        runs, columns = read(args.runs), args.columns.split(",")
        if not set(columns) <= set(MEASURES):
            raise UserError(f"--columns {args.columns}: choose from {', '.join(MEASURES)}")
        runs, epoch = choose(runs, args.rows.split(",")), args.after_epochs
        rows = groups(runs if epoch is None else [at_epoch(run, epoch) for run in runs])
        if args.pack is not None:
            return pack(runs, args.pack)
        print(table(rows, args.markdown, columns, args.words), flush=True)


if __name__ == "__main__":
    main()
