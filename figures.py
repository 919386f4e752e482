"""The paper's figures, training curves and samples, from runs.

python figures.py runs/fashionmnist-* --out pictures
python figures.py results/levels.jsonl --out pictures --rows "levels-?vae-rl-*-deep"
python figures.py weights/fashionmnist-*.pt --out pictures

Figures 6, 7 and the curves need the numbers of a run alone. Figures 1, 2, 5 and the samples need
its folder with the checkpoint, or a file of weights, and the data.
"""

from devices import pick_device, seeded  # before torch: see there

# isort: split
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter
from sklearn.manifold import TSNE
from torch import Tensor
from torchvision.utils import make_grid

import evaluate
import tables
from data import to_unit
from files import Parser, one_line, writing
from models import Network

# Colours that the colour-blind tell apart: Okabe and Ito's for lines, Paul Tol's for ten classes.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
CLASSES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933",
           "#DDCC77", "#CC6677", "#882255", "#AA4499", "#888888")  # fmt: skip
MARKERS = "os^Dv<>"
BESIDE = dict(loc="upper left", bbox_to_anchor=(1, 1))  # where a legend hides nothing
CURVES = ("KL of $z_L$, training images, nats", "probe of $z_L$, %", "ELBO, test images, nats")
FLOOR = 1e-4  # nats: a curve draws a smaller KL as this
GRID = 9  # values of each dimension in a traversal
LOOK = {"axes.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False, "savefig.dpi": 130}
matplotlib.rcParams.update(LOOK | {"figure.constrained_layout.use": True, "savefig.bbox": "tight"})


class Missing(Exception):
    """What a figure would need, in words."""


class Row(NamedTuple):
    """Runs of one row by seed, with the model and the test images of the first one's checkpoint."""

    label: str
    dataset: str
    method: str
    levels: int
    runs: list[tables.Run]  # none of a file of weights
    model: Network | None = None
    images: Tensor | None = None  # (N, C, H, W) uint8
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()


def literal(name: str) -> str:
    """For matplotlib: $ begins no formula, and a legend leaves out no name that begins with _."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def load(runs: list[tables.Run], label: str, device: torch.device, data_dir: str | None) -> Row:
    """The row of its runs, or of one that stands for a file of weights and has no numbers."""
    first, dataset, path = runs[0], runs[0].config["dataset"], runs[0].folder
    levels = len(first.evaluation.get("kl", ()))
    row = Row(
        literal(label), dataset, first.method, levels, [run for run in runs if run.evaluation]
    )
    if path is None or (path.is_dir() and not (path / evaluate.CHECKPOINT).exists()):
        return row
    model, config = evaluate.load_run(path, device)
    data = evaluate.load_data(config, data_dir)
    row = row._replace(model=model, levels=model.levels, images=data.test)
    if data.test_labels is None:
        return row._replace(labels=torch.zeros(len(data.test)), classes=("no labels",))
    return row._replace(labels=data.test_labels, classes=tuple(map(literal, data.classes)))


def spread(row: Row, n: int) -> Tensor:
    """The numbers of at most n test images of all classes, evenly spaced, class by class."""
    order = row.labels.argsort(stable=True)
    n = min(n, len(order))
    return order[[int((i + 0.5) * len(order) / n) for i in range(n)]]


def level_names(levels: int) -> list[str]:
    return [f"$z_{{{level + 1}}}$" for level in range(levels)]


def panels(rows: list[Row], height: float) -> Iterator[tuple[Axes, Row]]:
    """The axes of a figure with a panel a row, side by side."""
    figure = Figure(figsize=(10, height))
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        axes.set_title(row.label)
        yield axes, row


def show(axes: Axes, pictures: Tensor, columns: int) -> None:
    """Pictures (N, C, H, W) in [0, 1] row by row, white lines between them."""
    grid = make_grid(pictures.cpu().float(), columns, padding=1, pad_value=1)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


@torch.no_grad()
def fig1_skip_paths(rows: list[Row]) -> Figure:
    """Figure 1: test images, and what each level's representation alone decodes of them."""
    columns, levels = max(4, 20 // len(rows)), max(row.levels for row in rows)
    for axes, row in panels(rows, height=0.5 + 9 * (levels + 1) / columns / len(rows)):
        images = to_unit(row.images[spread(row, columns)].to(row.model.device))
        z = row.model.infer(images, sample=False).latents
        paths = [row.model.generate([None] * level + z[level:]).mean for level in range(len(z))]
        show(axes, torch.cat([images, *paths]), len(images))
        if row is rows[0] or row.levels != rows[0].levels:
            middles = (np.arange(len(z) + 1) + 0.5) * (images.shape[-1] + 1)
            axes.set_yticks(middles, ["input", *level_names(len(z))], fontsize=11)
            axes.tick_params(length=0)
    return axes.figure


@torch.no_grad()
def samples(rows: list[Row]) -> Figure:
    """Samples from the prior: the pixels' means given an ancestral sample of the latents."""
    columns = max(4, 20 // len(rows))
    for axes, row in panels(rows, height=0.5 + 9.7 / len(rows)):
        with seeded(row.model.device):
            show(axes, row.model.sample(columns**2).mean, columns)
    return axes.figure


def matches(a: list[Tensor], b: list[Tensor]) -> np.ndarray:
    """(L, M): how well the units of each of a's levels (N, D) are found again in each of b's.

    A unit's match is its largest absolute Pearson correlation with a unit of b's level. The value
    is the mean over active units; nan where either level has none.
    """
    values = np.full((len(a), len(b)), np.nan)
    a, b = ([z.T[z.var(dim=0) > evaluate.ACTIVE].double().cpu() for z in x] for x in (a, b))
    for (i, one), (j, other) in itertools.product(enumerate(a), enumerate(b)):
        if len(one) and len(other):
            r = np.corrcoef(one, other)[: len(one), len(one) :]
            values[i, j] = np.abs(r).max(axis=1).mean()
    return values


def fig2_correlation(rows: list[Row]) -> Figure:
    """Figure 2: how well the units of a level are found again in a row of the same method on
    another data set; on test images of the row named first."""
    pairs = [
        (a, b)
        for a, b in itertools.combinations(rows, 2)
        if a.method == b.method and a.dataset != b.dataset
        if a.images.shape[1:] == b.images.shape[1:]
    ]
    if not pairs:
        raise Missing("checkpoints of one method on two data sets with images of one shape")
    figure = Figure(figsize=(3.1 * len(pairs) + 1.0, 3.9))
    all_axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (a, b) in zip(all_axes, pairs, strict=True):
        values = matches(*(evaluate.representations(row.model, a.images) for row in (a, b)))
        drawn = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower")
        axes.set_facecolor("0.85")
        for (i, j), value in np.ndenumerate(values):
            text = "none" if np.isnan(value) else f"{value:.2f}"
            look = dict(color="white" if value <= 0.55 else "black", fontsize=9)
            axes.text(j, i, text, ha="center", va="center", **look)
        for axis, row in ((axes.xaxis, b), (axes.yaxis, a)):
            axis.set_ticks(range(row.levels), level_names(row.levels))
            axis.set_label_text(f"{row.label} trained on {row.dataset}")
        axes.set_title(f"{a.method}, {a.dataset} images")
    figure.colorbar(drawn, ax=list(all_axes), shrink=0.8, label="mean largest |Pearson r|")
    return figure


def tsne(axes: Axes, row: Row, chosen: Tensor, top: Tensor) -> None:
    """t-SNE of the test images' z_L (N, D), coloured by class. Without an active unit the means
    differ by rounding errors alone: samples of the posteriors are drawn then."""
    name = level_names(row.levels)[-1]
    if top.var(dim=0).max() <= evaluate.ACTIVE:
        name = f"samples of {name} (no active unit)"
        top = evaluate.representations(row.model, row.images[chosen], sample=True)[-1]
    method = TSNE(perplexity=min(30, max(1, len(top) // 3)), random_state=0)
    points = method.fit_transform(top.double().cpu().numpy())
    labels, colours = row.labels[chosen].numpy(), CLASSES
    if len(row.classes) > len(CLASSES):
        colours = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(row.classes)))
    for k, label in enumerate(row.classes):
        x, y = points[labels == k].T
        axes.scatter(x, y, 5, color=colours[k], linewidths=0, alpha=0.8, label=label)
    axes.set(xticks=[], yticks=[], title=f"{row.label}: t-SNE of {name}")


@torch.no_grad()
def traversal(axes: Axes, row: Row, top: Tensor) -> None:
    """Decodes z_L of the first test image, moved by the quantiles of N(0, 1), 5 % to 95 %, along
    the two dimensions that vary most over the test images' z_L (N, D)."""
    first, second = top.var(dim=0).topk(2).indices.tolist()
    steps = torch.special.ndtri(torch.linspace(0.05, 0.95, GRID)).to(top)
    z = evaluate.representations(row.model, row.images[:1])[-1].repeat(GRID**2, 1)
    z[:, first] += steps.repeat(GRID)
    z[:, second] -= steps.repeat_interleave(GRID)
    z = z.view(-1, *row.model.latent_shapes[-1])
    pixels = row.model.generate([None] * (row.levels - 1) + [z]).mean
    show(axes, pixels, GRID)
    side, middle = pixels.shape[-1] + 1, GRID // 2
    frame = (middle * side, middle * side), side, side
    axes.add_patch(Rectangle(*frame, fill=False, color="#D62728", linewidth=2))
    x, y = (f"dimension {k + 1} of {level_names(row.levels)[-1]}" for k in (first, second))
    axes.set(xlabel=x, ylabel=y, title=f"{row.label}: traversal around a test image")


def fig5_latents(rows: list[Row]) -> Figure:
    """Figure 5: t-SNE of z_L for 2,000 test images, and a traversal of two of its dimensions."""
    if any(min(len(r.images), math.prod(r.model.latent_shapes[-1])) < 2 for r in rows):
        raise Missing("two test images or more, and top levels of two dimensions or more")
    figure = Figure(figsize=(9.4, 4.7 * len(rows)))
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), row in zip(grid, rows, strict=True):
        chosen = spread(row, 2000)
        top = evaluate.representations(row.model, row.images[chosen])[-1]
        tsne(left, row, chosen, top)
        traversal(right, row, top)
    if len(rows[0].classes) <= len(CLASSES):
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, markerscale=3)
    return figure


def mean_std(seeds: list) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1; 0 of one seed) along the first dimension."""
    return np.mean(seeds, axis=0), np.std(seeds, axis=0, ddof=min(1, len(seeds) - 1))


def line_style(number: int, method: str) -> dict:
    """Of the number-th line: solid with RL, dotted by IVAE, dashed by the ELBO."""
    dash = {"RL": "-", "IVAE": ":"}.get(method.partition("+")[2], "--")
    colour, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
    return dict(color=colour, marker=marker, linestyle=dash, markersize=5)


def tidy(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def fig6_depth(rows: list[Row]) -> Figure:
    """Figure 6: the probe of z_L by the number of levels, a line a method, mean and standard
    deviation over seeds; beside it the paper's values (Tables 1 and 5)."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.levels):
        if "probe" in tables.measures(row.runs[0]):
            lines.setdefault(row.method, []).append(row)
    lines = {method: line for method, line in lines.items() if line[0].levels < line[-1].levels}
    if not lines:
        raise Missing("runs that differ in --levels, on images with labels")
    axes = Figure(figsize=(6.4, 4.2), layout="none").subplots()
    for i, (method, line) in enumerate(lines.items()):
        name = method.replace("+", " + ")
        levels, style = [row.levels for row in line], line_style(i, method)
        stats = [mean_std([tables.measures(run)["probe"] for run in row.runs]) for row in line]
        axes.errorbar(levels, *zip(*stats, strict=True), label=name, capsize=3, **style)
        papers = {n: tables.paper(rows[0].dataset, method, n, gamma=0.9) for n in range(2, 11)}
        y = [float(paper.get("probe", "nan").split("±")[0]) for paper in papers.values()]
        if not np.isnan(y).all():
            style |= dict(markerfacecolor="white", linestyle="none", label=f"{name}, paper")
            axes.plot(list(papers), y, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(**BESIDE)
    tidy(axes, "levels L", "probe of $z_L$, %", rows[0].dataset)
    return axes.figure


def fig7_kl(rows: list[Row]) -> Figure:
    """Figure 7: the KL of each level on test images, mean and standard deviation over seeds."""
    axes = Figure(figsize=(6.4, 4.2), layout="none").subplots()
    for i, row in enumerate(rows):
        mean, std = mean_std([run.evaluation["kl"] for run in row.runs])
        x = np.arange(1, len(mean) + 1) + 0.05 * (i - (len(rows) - 1) / 2)  # beside each other
        axes.errorbar(x, mean, std, label=row.label, capsize=3, **line_style(i, row.method))
    levels = max(row.levels for row in rows)
    axes.set_xticks(range(1, levels + 1), level_names(levels))
    axes.set_yscale("symlog", linthresh=0.1)  # those of HVAE may be negative
    axes.legend(**BESIDE)
    tidy(axes, "level", "KL, nats (linear from -0.1 to 0.1)", rows[0].dataset)
    return axes.figure


def training_curve(run: tables.Run) -> np.ndarray:
    """(epochs, 4): minutes of training, and CURVES, nan where --eval-every measured nothing."""
    values, last = np.empty((len(run.metrics), 4)), tables.measures(run)
    for i, line in enumerate(run.metrics):
        test = line.get("test", last if line is run.metrics[-1] else {})
        kl = max(line["kl"][-1], FLOOR)
        values[i] = line["seconds"] / 60, kl, test.get("probe"), test.get("elbo")
    return values


def curves(rows: list[Row]) -> Figure:
    """KL, probe and ELBO in training, by minutes and by epochs: mean and standard deviation over
    seeds, of the epochs that all have."""
    figure = Figure(figsize=(12.6, 6.9))
    grid = figure.subplots(2, len(CURVES), sharey="col")
    for i, row in enumerate(rows):
        courses = [training_curve(run) for run in row.runs]
        epochs = np.arange(1, 1 + min(map(len, courses)))
        courses = [values[: len(epochs)] for values in courses]
        style = line_style(i, row.method) | dict(markersize=2)
        for k, (above, below) in enumerate(grid.T, 1):
            measuring = [values for values in courses if np.isfinite(values[:, k]).any()]
            mean, std = mean_std(measuring or courses)  # of the seeds that have it
            measured = np.isfinite(mean[:, k])
            y, error = mean[measured, k], std[measured, k]
            for axes, x in ((above, mean[measured, 0]), (below, epochs[measured])):
                axes.plot(x, y, label=row.label, **style)
                axes.fill_between(x, y - error, y + error, color=style["color"], alpha=0.2, lw=0)
    for name, (above, below) in zip(CURVES, grid.T, strict=True):
        tidy(above, "minutes of training", name)
        tidy(below, "epochs", name)
    grid[0, 0].set_yscale("log")
    grid[0, 0].yaxis.set_major_formatter(LogFormatter())  # 9, not 9 x 10^0
    grid[0, 0].yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def draw(rows: list[Row], folder: Path) -> Iterator[str]:
    """Writes every figure that the rows allow as PNG into a folder; says line by line what was
    written, and what the others would need."""
    wanted = [(fig2_correlation, "", [row for row in rows if row.model is not None])]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        here = [row for row in rows if row.dataset == dataset]
        measured = [row for row in here if row.runs]
        wanted += [(make, f"-{dataset}", measured) for make in (fig6_depth, fig7_kl, curves)]
        here = [row for row in here if row.model is not None]
        wanted += [(make, f"-{dataset}", here) for make in (fig1_skip_paths, fig5_latents, samples)]
    failed = None
    for make, suffix, shown in wanted:
        path = folder / f"{make.__name__.replace('_', '-')}{suffix}.png"
        try:
            if not shown:
                numbers = make in (fig6_depth, fig7_kl, curves)
                raise Missing("a run" if numbers else "a run folder with its checkpoint")
            with writing(path) as temporary:
                make(shown).savefig(temporary, format="png")
            yield str(path)
        except Missing as what:
            yield f"not made: {path.name} needs {what}"
        except Exception as error:  # costs no other figure, and is raised after the last
            yield f"not made: {path.name}: {type(error).__name__}"
            failed = error
    if failed is not None:
        raise failed


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Draw what runs allow of the paper's figures, as PNG files.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, a .jsonl file or a file of weights"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where they go")
    parser.add_argument("--rows", default="*", metavar="GLOB,GLOB", help="only rows so named")
    parser.add_argument("--data-dir", help="folder of the data sets (default: the run's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    args = parser.parse_args(argv)
    with one_line(parser):
        runs = []
        for path in (Path(run) for run in args.runs if run.endswith(".pt")):
            config = evaluate.load_checkpoint(path)["config"]
            runs.append(tables.Run(path.stem, config["seed"], config, {}, [], path))
        runs += tables.read(run for run in args.runs if not run.endswith(".pt"))
        groups = tables.groups(tables.choose(runs, args.rows.split(",")))
        device = pick_device(args.device)
        words = [group[0].words for group in groups.values()]
        labels = words if len(set(words)) == len(words) else groups  # in words where these differ
        named = zip(groups.values(), labels, strict=True)
        rows = [load(group, label, device, args.data_dir) for group, label in named]
        args.out.mkdir(parents=True, exist_ok=True)
        for line in draw(rows, args.out):
            print(line, flush=True)


if __name__ == "__main__":
    main()
