"""The paper's figures from runs, and training curves and samples beside them.

Each function makes one figure, or says by `Missing` what it would need. Figures of metrics (6, 7,
curves) need the files of `results/` only, those of pictures and representations (1, 2, 5, samples)
a checkpoint and the data.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.manifold import TSNE
from torch import Tensor
from torch.distributions import Normal

import evaluate
import tables
from data import Data, to_unit
from files import UserError, writing

# Colours that the colour-blind tell apart: Okabe and Ito's for lines, Paul Tol's for ten classes.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dv<>P"
CLASSES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255",
           "#AA4499", "#888888")  # fmt: skip
NAMES = {
    "digits": "digits", "mnist": "MNIST", "fashionmnist": "FashionMNIST", "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100", "stl10": "STL-10", "tinyimagenet": "TinyImageNet", "celeba": "CelebA",
    "folder": "your images",
}  # fmt: skip


class Missing(Exception):
    """What a figure would need, in words."""


class Shown:
    """A configuration's runs; its first run's model and data are read when they are asked for."""

    def __init__(self, group: tables.Group, load: Callable[[dict], Data], device: torch.device):
        self.label, self.runs, self.first = group.label, group.runs, group.first
        self.dataset, self.load, self.device = group.first.config["dataset"], load, device

    @property
    def has_model(self) -> bool:
        return not self.first.past and (self.first.folder / evaluate.CHECKPOINT).is_file()

    @cached_property
    def model(self):
        state = evaluate.load_checkpoint(self.first.folder)
        return evaluate.restore_model(state).to(self.device).eval()

    @cached_property
    def data(self) -> Data:
        data = self.load(self.first.config)
        if tuple(data.test.shape[1:]) != tuple(self.model.config.image):
            raise UserError(f"{self.first.folder} was trained on other images than "
                            f"{self.dataset} now has")  # fmt: skip
        return data


def with_models(shown: list[Shown]) -> list[Shown]:
    found = [s for s in shown if s.has_model]
    if not found:
        raise Missing("a run with its checkpoint")
    return found


# --------------------------------------------------------------------------------------------------
# Pictures


def mosaic(pictures: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """(N, C, H, W) in [0, 1] as one picture (H', W', C), white between them, row by row."""
    n, c, h, w = pictures.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, c))
    for i, picture in enumerate(pictures.detach().cpu().permute(0, 2, 3, 1).float().numpy()):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        canvas[top : top + h, left : left + w] = picture
    return canvas


def show(axes, picture: np.ndarray) -> None:
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0,
                vmax=1, interpolation="nearest")  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def of_many_classes(data: Data, n: int) -> Tensor:
    """n test images (n, C, H, W) uint8, or as many as there are, of classes as many and as far
    apart as n allows: the first of each class, then the second."""
    if data.test_labels is None:
        return data.test[:n]
    labels = data.test_labels.numpy()
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    if n < len(by_class):
        few = np.linspace(0, len(by_class) - 1, n).round().astype(int)
        by_class = [by_class[c] for c in few]
    in_turn = [of[k] for k in range(max(map(len, by_class))) for of in by_class if k < len(of)]
    return data.test[torch.as_tensor(np.array(in_turn[:n]))]


@torch.no_grad()
def skip_paths(shown: list[Shown]) -> Figure:
    """Figure 1: test images, and what each level's representation alone decodes of them."""
    shown = with_models(shown)
    columns = min(max(4, 20 // len(shown)), len(shown[0].data.test))
    side = shown[0].data.test.shape[-1]
    levels = max(s.first.levels for s in shown)
    cell = 9.0 / len(shown) / columns
    figure = Figure(figsize=(10, cell * (levels + 1) + 0.5), layout="constrained")
    all_axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, s in zip(all_axes, shown, strict=True):
        images = to_unit(of_many_classes(s.data, columns).to(s.device))
        z = s.model.infer(images, sample=False).latents
        paths = [s.model.generate([None] * k + z[k:]).mean for k in range(len(z))]
        show(axes, mosaic(torch.cat([images, *paths]), columns))
        axes.set_title(s.label, fontsize=11)
        if axes is all_axes[0]:
            names = ["input"] + [f"$z_{{{k + 1}}}$" for k in range(levels)]
            axes.set_yticks([(side + 1) * k + side / 2 for k in range(len(names))], names)
            axes.tick_params(length=0, labelsize=11)
    return figure


@torch.no_grad()
def prior_samples(shown: list[Shown]) -> Figure:
    """Samples from the prior: the pixels' means given an ancestral sample of the latents."""
    shown = with_models(shown)
    across = max(4, 20 // len(shown))
    figure = Figure(figsize=(10, 9.7 / len(shown) + 0.5), layout="constrained")
    for axes, s in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        with evaluate.seeded(s.device):
            show(axes, mosaic(s.model.sample(across**2).mean, across))
        axes.set_title(s.label, fontsize=11)
    return figure


# --------------------------------------------------------------------------------------------------
# Representations


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """(D, E): the absolute Pearson correlation of each unit of a (N, D) with each of b (N, E)."""
    a, b = ((t.double() - t.double().mean(0)) for t in (a, b))
    a, b = (t / t.norm(dim=0).clamp_min(1e-300) for t in (a, b))
    return (a.T @ b).abs()


def found_again(a: list[Tensor], b: list[Tensor]) -> np.ndarray:
    """(L, M): how well an active unit of each level of `a` is found in each level of `b`.

    The mean over the units of a's level of the largest absolute correlation with a unit of b's,
    images along the first dimension; nan where either level has no active unit.
    """
    a, b = ([z[:, z.var(dim=0) > evaluate.ACTIVE] for z in levels] for levels in (a, b))
    out = np.full((len(a), len(b)), np.nan)
    for i, of_a in enumerate(a):
        for j, of_b in enumerate(b):
            if of_a.shape[1] and of_b.shape[1]:
                out[i, j] = correlations(of_a, of_b).max(dim=1).values.mean().item()
    return out


def correlation(shown: list[Shown]) -> Figure:
    """Figure 2: how well the units of a level are found again in a run of the same method that was
    trained on other images; on the test images of the data set named first."""
    found: dict[str, dict[str, Shown]] = {}  # by method and data set
    for s in with_models(shown):
        found.setdefault(s.first.method, {}).setdefault(s.dataset, s)
    candidates = {name: list(of.values())[:2] for name, of in found.items() if len(of) > 1}
    pairs = {
        name: (a, b)
        for name, (a, b) in candidates.items()
        if a.model.config.image == b.model.config.image
    }
    same = {name: (a.dataset, b.dataset) for name, (a, b) in pairs.items()}
    pairs = {name: pair for name, pair in pairs.items() if same[name] == next(iter(same.values()))}
    if not pairs:
        raise Missing("two runs with checkpoints of one method, trained on two data sets whose "
                      "images have the same shape")  # fmt: skip
    figure = Figure(figsize=(3.1 * len(pairs) + 1.0, 3.9), layout="constrained")
    all_axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (label, (a, b)) in zip(all_axes, pairs.items(), strict=True):
        images = a.data.test
        values = found_again(*(evaluate.representations(s.model, images) for s in (a, b)))
        drawn = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower")
        axes.set_facecolor("0.85")
        for (i, j), value in np.ndenumerate(values):
            text = "none" if np.isnan(value) else f"{value:.2f}"
            colour = "black" if np.isnan(value) or value > 0.55 else "white"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
        for axis, run in ((axes.xaxis, b), (axes.yaxis, a)):
            axis.set_ticks(range(run.first.levels),
                           [f"$z_{{{k + 1}}}$" for k in range(run.first.levels)])  # fmt: skip
        axes.set_title(label, fontsize=11)
        axes.set_xlabel(f"trained on {NAMES[b.dataset]}")
        if axes is all_axes[0]:
            axes.set_ylabel(f"trained on {NAMES[a.dataset]}")
    bar = figure.colorbar(drawn, ax=list(all_axes), shrink=0.8)
    bar.set_label("largest |Pearson r|, mean over units")
    figure.supxlabel(f"{NAMES[a.dataset]} test images; none: a level without an active unit",
                     fontsize=9)  # fmt: skip
    return figure


def scatter_of_classes(axes, points: np.ndarray, labels: np.ndarray | None, names, named) -> None:
    """Points (N, 2) coloured by class; with `named` its name where a class has most of its own."""
    if labels is None:
        axes.scatter(*points.T, s=5, color=LINES[0], linewidths=0)
        return
    few = len(names) <= len(CLASSES)
    for c, name in enumerate(names):
        of_class = points[labels == c]
        colour = CLASSES[c] if few else None
        axes.scatter(*of_class.T, s=5, color=colour, linewidths=0, alpha=0.8, label=str(name))
    for c, name in enumerate(names if named and few else ()):
        of_class = points[labels == c]
        if not len(of_class):
            continue
        apart = np.linalg.norm(of_class[:, None] - of_class[None], axis=-1)
        nearest = np.sort(apart, axis=1)[:, : max(2, len(of_class) // 3)]
        axes.annotate(
            str(name), of_class[nearest.mean(axis=1).argmin()], ha="center", va="center",
            fontsize=9, weight="bold", color=CLASSES[c],
            path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


GRID = 9  # traversed values a dimension


@torch.no_grad()
def latents(shown: list[Shown]) -> Figure:
    """Figure 5: t-SNE of z_L's representation of 2,000 test images, and a traversal of z_L.

    The means of a level without an active unit are equal but for rounding: it is shown by samples
    of its posteriors. The traversal starts from one test image, whose decoded z_L is the middle,
    and moves the two dimensions of z_L that vary most over the images by the quantiles of N(0, 1),
    5 % to 95 %.
    """
    shown = with_models(shown)
    figure = Figure(figsize=(9.4, 4.7 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False)
    steps = Normal(0.0, 1.0).icdf(torch.linspace(0.05, 0.95, GRID))
    steps[GRID // 2] = 0.0
    for (left, right), s in zip(grid, shown, strict=True):
        data, name = s.data, f"$z_{{{s.first.levels}}}$"
        top = evaluate.representations(s.model, data.test[:2000])[-1]
        of_what, collapsed = name, top.var(dim=0).max() <= evaluate.ACTIVE
        points = top
        if collapsed:
            of_what = f"samples of {name} (no active unit)"
            with evaluate.seeded(s.device):
                points = evaluate.representations(s.model, data.test[:2000], sample=True)[-1]
        if len(top) < 3:
            raise Missing("three test images")
        perplexity = min(30.0, (len(top) - 1) / 3)
        start = "pca" if top.shape[1] > 1 else "random"
        tsne = TSNE(init=start, perplexity=perplexity, random_state=0)
        points = tsne.fit_transform(points.double().cpu().numpy())
        labels = None if data.test_labels is None else data.test_labels[:2000].numpy()
        scatter_of_classes(left, points, labels, data.classes, named=not collapsed)
        left.set_xticks([])
        left.set_yticks([])
        left.margins(0.08)
        left.set_title(f"{s.label}: t-SNE of {of_what}", fontsize=11)

        first, second = top.var(dim=0).topk(2).indices.tolist() if top.shape[1] > 1 else (0, 0)
        anchor = s.model.infer(to_unit(data.test[:1].to(s.device)), sample=False).latents[-1]
        z = anchor.repeat(GRID**2, *[1] * (anchor.dim() - 1)).flatten(1)
        z[:, first] += steps.repeat(GRID).to(z)
        if second != first:
            z[:, second] -= steps.repeat_interleave(GRID).to(z)
        z = z.view(-1, *anchor.shape[1:])
        pixels = s.model.generate([None] * (s.first.levels - 1) + [z]).mean
        show(right, mosaic(pixels, GRID))
        side, middle = pixels.shape[-1], GRID // 2
        corner = middle * (side + 1) - 1
        right.add_patch(Rectangle((corner, corner), side + 1, side + 1, fill=False,
                                  edgecolor="#D62728", linewidth=2))  # fmt: skip
        image = "image"
        if data.test_labels is not None and data.classes:
            image = f"image ({data.classes[int(data.test_labels[0])]})"
        right.set_title(f"{s.label}: traversal around a test {image}", fontsize=11)
        right.set_xlabel(f"dimension {first + 1} of {name}")
        right.set_ylabel(f"dimension {second + 1} of {name}")
    handles, names = grid[0, 0].get_legend_handles_labels()
    if 0 < len(names) <= len(CLASSES):
        figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False,
                      fontsize=9, markerscale=3)  # fmt: skip
    return figure


# --------------------------------------------------------------------------------------------------
# Metrics


def lines_of(shown: list[Shown]) -> list[tuple[Shown, dict]]:
    """Each configuration with the look of its line."""
    return [
        (s, dict(color=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)],
                 linestyle=dash(s.first.method), label=s.label, markersize=5))
        for i, s in enumerate(shown)
    ]  # fmt: skip


def dash(method: str) -> str:
    """Solid with reinforcement learning, dashed by the ELBO, dotted for IVAE."""
    return {"RL": "-", "IVAE": ":"}.get(method.partition("+")[2], "--")


def tidy(axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def mean_and_std(values: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(values)
    return array.mean(0), array.std(0, ddof=1) if len(array) > 1 else np.zeros(array.shape[1])


def depth(shown: list[Shown]) -> Figure:
    """Figure 6: the probe of z_L by the number of levels, mean and standard deviation over seeds,
    and the paper's values (Tables 1 and 5) where it has them."""
    lines: dict[str, tuple[str, dict[int, list[float]]]] = {}  # label: method, probes by levels
    runs = [run for s in shown for run in s.runs]
    latents: dict[tuple, set] = {}
    for run in runs:
        latents.setdefault((run.method, run.levels), set()).add(run.config["latents"])
    apart = any(len(names) > 1 for names in latents.values())  # one depth, several widths
    for label, of_one in tables.groups(runs, ("levels",) if apart else ("levels", "latents")):
        by_levels: dict[int, list[float]] = {}
        for run in of_one:
            if "probe" in (m := tables.measures(run)):
                by_levels.setdefault(run.levels, []).append(m["probe"])
        if len(by_levels) > 1:
            lines[label] = of_one[0].method, by_levels
    if not lines:
        raise Missing("runs that differ in --levels, on images with labels")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    dataset = shown[0].dataset
    for i, (label, (name, levels)) in enumerate(lines.items()):
        x = sorted(levels)
        y = [np.mean(levels[n]) for n in x]
        error = [np.std(levels[n], ddof=1) if len(levels[n]) > 1 else 0.0 for n in x]
        look = dict(color=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)])
        axes.errorbar(x, y, error, linestyle=dash(name), label=label, capsize=3, **look)
        theirs = {n: tables.paper(dataset, name, n, 0.9).get("probe") for n in range(2, 11)}
        theirs = {n: float(text.split("±")[0]) for n, text in theirs.items() if text}
        if theirs:
            look |= dict(markerfacecolor="white", linestyle="none", label=f"{name}, paper")
            axes.plot(list(theirs), list(theirs.values()), **look)
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes, "levels L", "probe of $z_L$, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    axes.set_title(NAMES[dataset], fontsize=11)
    return figure


FLOOR = 1e-4  # nats below which a KL is drawn as this


def kl_of_levels(shown: list[Shown]) -> Figure:
    """Figure 7: the KL of each level on the test images, mean and standard deviation over seeds."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    looks = lines_of(shown)
    for nth, (s, look) in enumerate(looks):
        mean, std = mean_and_std([run.evaluation["kl"] for run in s.runs])
        mean = np.maximum(mean, FLOOR)
        x = np.arange(1, len(mean) + 1) + 0.05 * (nth - (len(looks) - 1) / 2)  # none hides another
        axes.plot(x, mean, **look)
        if len(s.runs) > 1:
            error = np.minimum(std, mean - FLOOR), std
            axes.errorbar(x, mean, error, linestyle="none", color=look["color"], capsize=3)
    axes.set_yscale("log")
    axes.set_ylim(bottom=FLOOR * 0.7)
    levels = max(s.first.levels for s in shown)
    axes.set_xticks(range(1, levels + 1), [f"$z_{{{k}}}$" for k in range(1, levels + 1)])
    tidy(axes, "level", f"KL, nats (below {FLOOR:g} drawn there)")
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(NAMES[shown[0].dataset], fontsize=11)
    return figure


CURVES = ("KL of $z_L$, training images, nats", "probe of $z_L$, %", "ELBO, test images, nats")


def course(run: tables.Run) -> list[dict[int, tuple[float, float]]]:
    """Of each of CURVES, by epoch: the minutes of training until then, and the value."""
    found: list[dict[int, tuple[float, float]]] = [{} for _ in CURVES]
    for line in run.metrics:
        test = line.get("test", {})
        if line is run.metrics[-1] and not test:  # after the last epoch all is measured
            test = {"probe": tables.measures(run).get("probe"), "elbo": run.evaluation.get("elbo")}
        values = max(line["kl"][-1], FLOOR), test.get("probe"), test.get("elbo")
        for of_one, value in zip(found, values, strict=True):
            if value is not None:
                of_one[line["epoch"]] = line["seconds"] / 60, value
    return found


def curves(shown: list[Shown]) -> Figure:
    """Training curves over the training time, and below over the epochs, mean and standard
    deviation over seeds: KL of z_L, and of the test split probe and ELBO."""
    drawn: dict[str, list[tuple[dict, tuple, np.ndarray, np.ndarray]]] = {}
    for s, look in lines_of(shown):
        courses = [course(run) for run in s.runs]
        for name, of_seeds in zip(CURVES, zip(*courses, strict=True), strict=True):
            of_seeds = [c for c in of_seeds if c]
            epochs = sorted(set.intersection(*map(set, of_seeds))) if of_seeds else []
            if epochs:
                minutes, _ = mean_and_std([[c[epoch][0] for epoch in epochs] for c in of_seeds])
                mean, std = mean_and_std([[c[epoch][1] for epoch in epochs] for c in of_seeds])
                style = look | {"marker": "o" if len(epochs) == 1 else None}
                drawn.setdefault(name, []).append((style, (minutes, epochs), mean, std))
    if not drawn:
        raise Missing("runs with their metrics.jsonl")
    figure = Figure(figsize=(4.2 * len(drawn), 6.9), layout="constrained")
    all_axes = figure.subplots(2, len(drawn), squeeze=False)
    for row, spent in enumerate(("minutes of training", "epochs")):
        for axes, (name, lines) in zip(all_axes[row], drawn.items(), strict=True):
            for style, x, mean, std in lines:
                axes.plot(x[row], mean, **style)
                if std.any():
                    low = np.maximum(mean - std, FLOOR) if name == CURVES[0] else mean - std
                    axes.fill_between(x[row], low, mean + std, color=style["color"], alpha=0.2,
                                      linewidth=0)  # fmt: skip
            if name == CURVES[0]:
                axes.set_yscale("log")
            axes.set_xlim(left=0)
            tidy(axes, spent, name)
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


# --------------------------------------------------------------------------------------------------

OF_ONE_DATASET = {
    "fig1-skip-paths": skip_paths,
    "fig5-latents": latents,
    "fig6-depth": depth,
    "fig7-kl": kl_of_levels,
    "curves": curves,
    "samples": prior_samples,
}


def draw(
    runs: list[tables.Run],
    folder: Path,
    load: Callable[[dict], Data],
    device: torch.device,
    dpi: int = 130,
) -> Iterator[str]:
    """Writes every figure that the runs allow as PNG into a folder, one for each data set; says
    line by line what was written and what was not. `load` gives a configuration's data."""
    shown = [Shown(group, load, device) for group in tables.groups(runs)]
    given = {run.folder: position for position, run in enumerate(runs)}
    as_given = sorted(shown, key=lambda s: min(given[run.folder] for run in s.runs))
    wanted = [("fig2-correlation", correlation, as_given)]
    for dataset in dict.fromkeys(s.dataset for s in shown):
        here = [s for s in shown if s.dataset == dataset]
        wanted += [(f"{name}-{dataset}", make, here) for name, make in OF_ONE_DATASET.items()]
    with writing(folder, replace=False):
        folder.mkdir(parents=True, exist_ok=True)
    for name, make, of in wanted:
        path = folder / f"{name}.png"
        try:
            figure = make(of)
        except Missing as what:
            yield f"not made: {name}.png needs {what}"
            continue
        with writing(path) as beside:
            figure.savefig(beside, dpi=dpi, format="png", bbox_inches="tight", pad_inches=0.06)
        yield str(path)
