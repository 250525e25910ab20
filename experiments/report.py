"""The paper's tables and figures as sets of cells, and the way from their raw results to the report.

`python experiments/reproduce.py report` writes `results/report/<name>.{md,csv,png,pdf}` for every table and figure. It
reads `results/paper.csv` and the raw results, which lie on two shelves:

    results/main/<algorithm>/<scenario>-<dataset>.json             an algorithm with its settings
    results/studies/<study>/<variant>/<scenario>-<dataset>.json    an algorithm with other options
"""

from __future__ import annotations

import json
import math
import os
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

import common
from common import DATASETS
from utils.evaluation import NAMES
from utils.program import UserError

# --------------------------------------------------------------------------------------------------------------------
# A cell is an algorithm with options of its script on a dataset; a target is a set of cells.


class Entry(NamedTuple):
    name: str  # as the paper writes it
    script: str
    options: dict  # that make it this algorithm


ALGORITHMS = {"bc": Entry("BC", "dom2_{family}.py", {"eta": 0})}  # with DOM2's diffusion policy
ALGORITHMS |= {key: Entry(name, f"baselines/{key}.py", {}) for key, name in NAMES.items()}
ALGORITHMS["dom2"] = Entry("DOM2", "dom2_{family}.py", {})
COLOURS = {algorithm.name: f"C{k}" for k, algorithm in enumerate(reversed(ALGORITHMS.values()))}
PARTICLE, MUJOCO = ("simple_tag", "simple_world", "simple_spread"), ("HalfCheetah",)
FRACTIONS = (0.01, 0.05, 0.2, 1.0)
STEPS = (1, 2, 3, 5, 10)
FIRST_SEED = 10  # of the cells; the settings were chosen with the seeds 0 to 2


def command_line(options) -> list[str]:
    """(field, value) pairs as command-line options: --eta 0, --augment, --no-augment."""
    words = []
    for field, value in options:
        name = field.replace("_", "-")
        words += [f"--no-{name}"] if value is False else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


class Variant(NamedTuple):
    """An algorithm, plain or as varied in a study."""

    algorithm: str
    study: str = ""
    words: str = ""  # how it is varied: "without augmentation"
    options: tuple[tuple[str, object], ...] = ()  # of its script, that do so: (field, value) pairs

    @property
    def name(self) -> str:
        """Name of its folder: omar, dom2-without-augmentation."""
        return "-".join([self.algorithm, *self.words.split()])

    @property
    def folder(self) -> str:
        """Its folder in results/: main/omar, studies/augmentation/dom2-without-augmentation."""
        return f"studies/{self.study}/{self.name}" if self.study else f"main/{self.name}"

    @property
    def num_seeds(self) -> int:
        """Seeds of its cells: five as in the paper, three in a study."""
        return 3 if self.study else 5

    @property
    def label(self) -> str:
        return " ".join([ALGORITHMS[self.algorithm].name, *self.words.split()])


class Cell(NamedTuple):
    variant: Variant
    scenario: str
    dataset: str

    def __str__(self) -> str:
        return f"{self.variant.folder}/{self.scenario}-{self.dataset}"


class Target(NamedTuple):
    title: str
    shifts: tuple[str, ...]
    blocks: tuple  # of (variants, scenarios, datasets): the cells are all their combinations

    def cells(self) -> list[Cell]:
        combinations = (product(scenarios, datasets, variants) for variants, scenarios, datasets in self.blocks)
        return list(dict.fromkeys(Cell(v, s, d) for s, d, v in chain(*combinations)))


def plain(*algorithms: str) -> tuple[Variant, ...]:
    return tuple(map(Variant, algorithms))


def varied(algorithm: str, study: str, words: str, **options) -> Variant:
    return Variant(algorithm, study, words, tuple(options.items()))


def with_fraction(algorithm: str, fraction: float) -> Variant:
    if fraction == 1:
        return Variant(algorithm)
    return varied(algorithm, "data-fractions", f"with {100 * fraction:g} percent of the data", data_fraction=fraction)


def with_steps(steps: int) -> Variant:
    words = f"with {steps} denoising step{'s' if steps > 1 else ''}"
    return varied("dom2", "denoising-steps", words, diffusion_steps=steps)


TABLE = plain(*ALGORITHMS)
EFFICIENCY = ("ma_td3bc", "omar", "ma_sfbc", "dom2")
BASELINES = ("ma_bc", "ma_td3bc", "ma_cql", "omar", "ma_sfbc", "madiff")
NO_REPLAY = tuple(d for d in DATASETS if d != "medium-replay")
NOT_AUGMENTED = varied("dom2", "augmentation", "without augmentation", augment=False)
ABLATIONS = (
    *plain("dom2", "bc"),  # bc: without policy improvement
    varied("dom2", "ablations", "without diffusion loss", bc_weight=0),
    NOT_AUGMENTED,
    varied("dom2", "ablations", "with the residual noise network", noise_net="residual"),
    varied("dom2", "ablations", "predicting the noise", prediction="noise"),
    varied("dom2", "ablations", "with the conservative term", zeta=0.1),
    varied("ma_diffusion_ql", "ablations", "with augmentation", augment=True),
    varied("ma_diffusion_ql", "ablations", "with augmentation predicting actions", augment=True, prediction="action"),
    *plain("ma_diffusion_ql"),
)
AUGMENTED = tuple(varied(algorithm, "augmentation", "with augmentation", augment=True) for algorithm in BASELINES)
OFF_AND_ON = (*chain(*zip(plain(*BASELINES), AUGMENTED, strict=True)), NOT_AUGMENTED, *plain("dom2"))
STEP_COUNTS = tuple(map(with_steps, STEPS))
TARGETS = {
    "table1": Target("Table 1: particle environments", ("none",), ((TABLE, PARTICLE, DATASETS),)),
    "table2": Target("Table 2: shifted particle environments", ("speed",), ((TABLE, PARTICLE, DATASETS),)),
    "table3": Target("Table 3: HalfCheetah", ("none",), ((TABLE, MUJOCO, DATASETS),)),
    "table4": Target("Table 4: shifted HalfCheetah", ("random", "extreme"), ((TABLE, MUJOCO, DATASETS),)),
    "statistics": Target(
        "Tables 1 to 4 in two numbers per algorithm",
        ("none", "speed", "random", "extreme"),
        ((TABLE, PARTICLE + MUJOCO, DATASETS),),
    ),
    "fig2": Target(
        "Figure 2: three agents, six landmarks",
        ("none", "dismiss"),
        ((plain("ma_cql", "omar", "dom2"), ("landmarks6",), ("medium", "expert")),),
    ),
    "fig5": Target(
        "Figure 5: data efficiency and data quality",
        ("none",),
        (
            *((tuple(with_fraction(a, f) for a in EFFICIENCY), PARTICLE, NO_REPLAY) for f in FRACTIONS),
            (plain("ma_sfbc", "madiff", "dom2"), PARTICLE, DATASETS),
        ),
    ),
    "fig6": Target("Figure 6: ablations", ("none",), ((ABLATIONS, PARTICLE + MUJOCO, ("random-medium", "expert")),)),
    "factorial": Target("Augmentation off and on", ("none",), ((OFF_AND_ON, PARTICLE, ("random", "random-medium")),)),
    "steps": Target("Denoising steps", ("none",), ((STEP_COUNTS, PARTICLE, ("random", "expert")),)),
}


# --------------------------------------------------------------------------------------------------------------------
# Raw results


def result_path(cell: Cell, results_dir: Path) -> Path:
    return results_dir / cell.variant.folder / f"{cell.scenario}-{cell.dataset}.json"


def read(path: Path) -> dict | None:
    """A raw result, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        results = json.loads(path.read_text("utf-8"))
        if {"returns", "data", "settings", "seconds", "updates"} <= results.keys():
            return results
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: no readable result; restore it, or delete it to run its cell again")


def find(cell: Cell, results_dir: Path) -> dict | None:
    """The raw result of a cell: its own or, where that was made with the same options, the plain algorithm's."""
    results = read(result_path(cell, results_dir))
    if results is None and cell.variant.options:
        standard = read(result_path(cell._replace(variant=Variant(cell.variant.algorithm)), results_dir))
        if standard and all(standard["settings"].get(field) == value for field, value in cell.variant.options):
            return standard
    return results


def write_result(path: Path, results: dict) -> None:
    """Write a raw result. The agents' paths among six landmarks, which are large, go to a .npz beside it."""
    large, paths, assignments = ("landmarks", "paths"), {}, {}
    for shift, found in results.get("assignments", {}).items():
        paths |= {f"{shift}-{name}": np.array(found[name], np.float16) for name in large}
        assignments[shift] = {name: value for name, value in found.items() if name not in large}
    if paths:
        results = results | {"assignments": assignments}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path.with_suffix(".npz"), **paths)
    write(path, json.dumps(results, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file so that at any moment it is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------------------------
# Rows: what has been run, beside what the paper reports


def iqm(x: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter (rounded down)."""
    cut = x.shape[-1] // 4
    return np.sort(x, -1)[..., cut : x.shape[-1] - cut].mean(-1)


def pooled(tasks: list[np.ndarray]) -> np.ndarray:
    """Scores [..., seeds] of all tasks in one row, so often that tasks of few seeds and of many weigh the same."""
    least = math.lcm(*(x.shape[-1] for x in tasks))
    return np.concatenate([x.repeat(least // x.shape[-1], -1) for x in tasks], -1)


def interval(tasks: list[np.ndarray], samples: int = 2000) -> tuple[float, float]:
    """95% interval of the interquartile mean over all `tasks` together, by stratified bootstrap: the seeds of each
    task ([seeds]) are resampled (Agarwal et al. 2021)."""
    rng = np.random.default_rng(0)
    drawn = [x[rng.integers(len(x), size=(samples, len(x)))] for x in tasks]
    low, high = np.percentile(iqm(pooled(drawn)), (2.5, 97.5))
    return float(low), float(high)


def improvement(ours: list[np.ndarray], theirs: list[np.ndarray], samples: int = 2000) -> tuple[float, float, float]:
    """Probability that a seed of `ours` scores higher than one of `theirs`, averaged over tasks, and its 95% interval
    by stratified bootstrap (Agarwal et al. 2021). Per task it is the Mann-Whitney statistic; a tie counts half."""
    rng = np.random.default_rng(0)

    def probability(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # [..., seeds], [..., seeds] -> [...]
        x, y = x[..., :, None], y[..., None, :]
        return ((x > y) + 0.5 * (x == y)).mean((-2, -1))

    def resampled(x: np.ndarray) -> np.ndarray:
        return x[rng.integers(len(x), size=(samples, len(x)))]

    estimate = np.mean([probability(x, y) for x, y in zip(ours, theirs, strict=True)])
    drawn = np.mean([probability(resampled(x), resampled(y)) for x, y in zip(ours, theirs, strict=True)], 0)
    return float(estimate), *(float(x) for x in np.percentile(drawn, (2.5, 97.5)))


class Score(NamedTuple):
    """A cell in one environment."""

    returns: np.ndarray  # [seeds] each the mean over evaluation episodes
    normalised: np.ndarray  # [seeds] of the normalised scores, NaN where the scenario has none
    raw: dict  # the whole raw result
    paths: Path  # of the agents' paths; only six landmarks have such a file


class Row(NamedTuple):
    """A row of the paper's tables."""

    shift: str
    scenario: str
    dataset: str
    here: dict[Variant, Score]  # of the cells that have been run
    paper: dict[Variant, tuple[float, float]]  # mean and std

    def best(self, paper: bool = False) -> Variant | None:
        """The highest mean return here, or in the paper; None unless there are two to compare."""
        means = {v: score.returns.mean() for v, score in self.here.items()}
        means = {v: mean for v, (mean, std) in self.paper.items()} if paper else means
        return max(means, key=means.get) if len(means) > 1 else None


def read_rows(target: Target, results_dir: Path) -> list[Row]:
    """The target's rows, from the raw results and the paper's numbers."""
    rows = {}
    for shift in target.shifts:
        for cell in target.cells():
            variant, scenario, dataset = cell
            row = rows.setdefault((shift, scenario, dataset), Row(shift, scenario, dataset, {}, {}))
            published = common.paper_result(scenario, dataset, shift, ALGORITHMS[variant.algorithm].name)
            if published and not variant.options:
                row.paper[variant] = published
            results = find(cell, results_dir)
            if results and shift in results["returns"]:
                x = np.array(results["returns"][shift])
                known = scenario in common.NORMALISATION
                normalised = common.normalised_score(scenario, x) if known else np.full(len(x), np.nan)
                row.here[variant] = Score(x, normalised, results, result_path(cell, results_dir).with_suffix(".npz"))
    together = target is TARGETS["fig6"]  # its BC and DDPM stand for parts of DOM2
    return [row._replace(here=comparable(row.here, together)) for row in rows.values()]


def is_old(score: Score) -> bool:
    """Whether a result is of earlier settings or code: its seeds begin with 0."""
    return score.raw["settings"]["seed"] != FIRST_SEED


def comparable(here: dict[Variant, Score], together: bool) -> dict[Variant, Score]:
    """Without an algorithm's old results where it has later ones, so that its variants differ in nothing else.

    `together`: all algorithms count as variants of one.
    """
    renewed = {together or variant.algorithm for variant, score in here.items() if not is_old(score)}
    return {v: score for v, score in here.items() if not ((together or v.algorithm) in renewed and is_old(score))}


# --------------------------------------------------------------------------------------------------------------------
# Tables


def csv_table(rows: list[Row]) -> str:
    """One line per cell and environment that has been run; `iqm` is that of the normalised scores."""
    names = "shift scenario dataset variant seeds mean std normalised iqm iqm_low iqm_high data_mean data_max"
    lines = [[*names.split(), "paper_mean", "paper_std"]]
    for row in rows:
        for variant, (x, scores, raw, _) in row.here.items():
            data = raw["data"]
            figures = x.mean(), x.std(), scores.mean(), iqm(scores), *interval([scores]), data["mean"], data["max"]
            lines.append([row.shift, row.scenario, row.dataset, variant.name, len(x), *(f"{f:.2f}" for f in figures)])
            lines[-1] += row.paper.get(variant, ("", ""))
    return "".join(",".join(map(str, line)) + "\n" for line in lines)


def show_return(row: Row, variant: Variant) -> str:
    """Mean ± std over seeds, bold where it is the best, with a dagger if old; after a slash the paper's."""
    here = "-"
    if variant in row.here:
        x = row.here[variant].returns
        here = f"{x.mean():.1f} ± {x.std():.1f}"
        here = f"**{here}**" if variant == row.best() else here
        here += "†" if is_old(row.here[variant]) else ""
    return here + (" / {} ± {}".format(*row.paper[variant]) if variant in row.paper else "")


def show_score(rows: list[Row], variant: Variant) -> str:
    """Interquartile mean of the normalised scores over seeds and rows, with its interval; only if all have been run."""
    if not all(variant in row.here for row in rows):
        return "-"
    tasks = [row.here[variant].normalised for row in rows]
    return "{:.1f} [{:.1f}, {:.1f}]".format(iqm(pooled(tasks)), *interval(tasks))


def show_assignments(row: Row, variant: Variant) -> str:
    """Different assignments of agents to landmarks in 100 episodes from one same start, and their entropy."""
    if variant not in row.here:
        return "-"
    found = row.here[variant].raw["assignments"][row.shift]
    return f"{np.mean(found['distinct']):.1f} ({np.mean(found['entropy']):.2f} bits)"


def show_data(row: Row) -> str:
    data = next((score.raw["data"] for variant, score in row.here.items() if not variant.options), None)
    return f"{data['mean']:.1f} ({data['max']:.0f})" if data else "-"


def show_wins(winners: list[Variant | None]) -> str:
    labels = [variant.label for variant in winners if variant]
    if not labels:
        return "no such row"
    return ", ".join(f"{label} {labels.count(label)}" for label in dict.fromkeys(labels)) + f" of {len(labels)} rows"


def markdown_table(lines: list[list[str]]) -> str:
    """A table of its lines, the first of them the head; one that would be too wide is transposed."""
    lines = lines if len(lines[0]) < 12 else list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def summary(target: Target, rows: list[Row]) -> str:
    """How many cells have been run, and which algorithm is best in how many rows."""
    here, paper = (show_wins([row.best(paper) for row in rows]) for paper in (False, True))
    return (
        f"Cells run: {sum(len(row.here) for row in rows)} of {len(target.cells()) * len(target.shifts)}. "
        f"Best algorithm, in rows with results of at least two algorithms: {here} here; {paper} in the paper."
    )


def markdown(target: Target, rows: list[Row]) -> str:
    """For each scenario and environment a table of returns, here and in the paper, and one of normalised scores."""
    everything = list(dict.fromkeys(cell.variant for cell in target.cells()))
    text = (
        f"# {target.title}\n\n"
        "Returns: mean ± standard deviation over seeds here / the same in the paper; bold is the best here.\n"
        "Normalised scores: interquartile mean over seeds [95% bootstrap interval]. A dash: not run here.\n"
        "A dagger (†): seeds 0 to 2 with earlier settings or code, to be made again.\n\n"
        f"{summary(target, rows)}\n"
    )
    for shift, scenario in dict.fromkeys((row.shift, row.scenario) for row in rows):
        group = [row for row in rows if (row.shift, row.scenario) == (shift, scenario)]
        columns = [v for v in everything if any(v in row.here or v in row.paper for row in group)]
        labels = [variant.label for variant in columns]
        missing = [variant.label for variant in everything if variant not in columns]
        returns = [["return", *labels, "data mean (max)", "best here", "best in the paper"]]
        scores = [["normalised score", *labels]]
        for row in group:
            winners = [variant.label if variant else "-" for variant in (row.best(), row.best(paper=True))]
            returns.append([row.dataset, *(show_return(row, v) for v in columns), show_data(row), *winners])
            scores.append([row.dataset, *(show_score([row], v) for v in columns)])
        scores.append(["all", *(show_score(group, v) for v in columns)])
        text += f"\n## {scenario}, {'standard' if shift == 'none' else shift}\n\n{markdown_table(returns)}"
        if scenario in common.NORMALISATION:
            text += f"\n{markdown_table(scores)}"
        if missing:
            text += f"\nNot run on any of these datasets: {', '.join(missing)}.\n"
        if scenario == "landmarks6":
            found = [["assignments", *labels]] + [
                [r.dataset, *(show_assignments(r, v) for v in columns)] for r in group
            ]
            text += f"\n{markdown_table(found)}"
    return text


# --------------------------------------------------------------------------------------------------------------------
# Figures


def draw_bars(target: Target, rows: list[Row]) -> Figure:
    """A panel per scenario and environment, a group of bars per dataset; black marks are the paper's means."""
    panels = list(dict.fromkeys((row.shift, row.scenario) for row in rows if row.here))
    shown = {v for row in rows for v in (*row.here, *row.paper)}
    columns = [v for v in dict.fromkeys(cell.variant for cell in target.cells()) if v in shown]
    own = all(variant.label in COLOURS for variant in columns)  # else some columns are variants of one algorithm
    colours = {v: COLOURS[v.label] if own else c for v, c in zip(columns, colormaps["tab20"].colors, strict=False)}
    width = 0.8 / len(columns)
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (shift, scenario) in zip(axes, panels, strict=True):
        group = [row for row in rows if (row.shift, row.scenario) == (shift, scenario)]
        for k, variant in enumerate(columns):
            left = np.arange(len(group)) - 0.4 + k * width
            bars = [(x, row.here[variant].returns) for x, row in zip(left, group, strict=True) if variant in row.here]
            marks = [(x, row.paper[variant][0]) for x, row in zip(left, group, strict=True) if variant in row.paper]
            if bars:
                x, returns = zip(*bars, strict=True)
                style = {"align": "edge", "color": colours[variant], "error_kw": {"lw": 0.8}}
                ax.bar(x, [r.mean() for r in returns], width, yerr=[r.std() for r in returns], **style)
            if marks:
                x, means = np.array(marks).T
                ax.hlines(means, x, x + width, color="k", lw=1.2)
        ax.set_xticks(range(len(group)), [row.dataset for row in group], rotation=30, ha="right")
        ax.set_title(f"{scenario}, {'standard' if shift == 'none' else shift}")
        ax.axhline(0, color="0.6", lw=0.6, zorder=0)
    axes[0].set_ylabel("episode return")
    handles = [axes[0].bar(0, 0, color=colours[variant], label=variant.label) for variant in columns]
    if any(row.paper for row in rows):
        handles += axes[0].plot([], [], "k", lw=1.2, label="in the paper")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, 3 * len(panels)), frameon=False)
    return figure


def draw_fig2(target: Target, rows: list[Row]) -> Figure:
    """The three agents' paths in ten episodes from one same start, and the returns; a line per environment and data."""
    columns = list(dict.fromkeys(cell.variant for cell in target.cells()))
    figure = Figure(figsize=(3 * len(columns) + 3, 3 * len(rows)), layout="constrained")
    for row, axes in zip(rows, figure.subplots(len(rows), len(columns) + 1, squeeze=False), strict=True):
        for variant, ax in zip(columns, axes, strict=False):
            ax.set(title=f"{variant.label}: {show_assignments(row, variant)}", xticks=[], yticks=[], aspect="equal")
            if variant in row.here:
                with np.load(row.here[variant].paths, allow_pickle=False) as arrays:
                    paths, landmarks = (arrays[f"{row.shift}-{name}"] for name in ("paths", "landmarks"))
                for path in paths:  # [26, agents, 2]
                    for agent, points in enumerate(path.swapaxes(0, 1)):
                        ax.plot(*points.T, color=f"C{agent}", lw=0.8, alpha=0.6)
                ax.plot(*landmarks.T, "k*")
        axes[0].set_ylabel(f"{row.dataset}, {'standard' if row.shift == 'none' else row.shift}")
        run = [(variant.label, row.here[variant].returns) for variant in columns if variant in row.here]
        if run:
            labels, returns = zip(*run, strict=True)
            axes[-1].bar(labels, [r.mean() for r in returns], yerr=[r.std() for r in returns], color="0.6")
        axes[-1].set_title("episode return")
    return figure


def mean_scores(rows: list[Row], variant: Variant) -> np.ndarray | None:
    """Each seed's normalised score averaged over the rows [seeds]; None unless all of them have been run."""
    if not rows or not all(variant in row.here for row in rows):
        return None
    seeds = min(len(row.here[variant].normalised) for row in rows)
    return np.mean([row.here[variant].normalised[:seeds] for row in rows], 0)


def draw_curves(ax, curves: dict[str, list], ticks: list[str], title: str, xlabel: str) -> None:
    """Means and standard deviations: {label: [an array [seeds], or None, per tick]}."""
    for k, (label, points) in enumerate(curves.items()):
        known = [(x, point.mean(), point.std()) for x, point in enumerate(points) if point is not None]
        if known:
            ax.errorbar(*np.array(known).T, marker="o", capsize=3, label=label, color=COLOURS.get(label, f"C{k}"))
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlim(-0.3, len(ticks) - 0.7)
    ax.set(title=title, xlabel=xlabel)


def add_legend(figure: Figure, ncols: int) -> None:
    """One legend below all panels of curves."""
    labelled = [ax.get_legend_handles_labels() for ax in figure.axes]
    found = {label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=ncols, frameon=False)


def draw_fig5(target: Target, rows: list[Row]) -> Figure:
    """(a)-(c): normalised score against the share of the data; (d): against their quality, all scenarios together.

    A point of (a)-(c) averages over datasets, as in the paper without medium-replay: over those in which all points
    of the panel have been run.
    """
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PARTICLE) + 1)
    curves = {ALGORITHMS[a].name: [with_fraction(a, f) for f in FRACTIONS] for a in EFFICIENCY}
    for ax, scenario in zip(axes, PARTICLE, strict=False):
        group = [row for row in rows if row.scenario == scenario and row.dataset in NO_REPLAY]
        run = {v for row in group for v in row.here if v in chain(*curves.values())}
        group = [row for row in group if run and run <= row.here.keys()]
        points = {label: [mean_scores(group, v) for v in line] for label, line in curves.items()}
        title = f"{scenario}, {len(group)} of {len(NO_REPLAY)} datasets"
        draw_curves(ax, points, [f"{f:.0%}" for f in FRACTIONS], title, "share of the trajectories")
    points = {
        v.label: [mean_scores([row for row in rows if row.dataset == d], v) for d in DATASETS]
        for v in plain("ma_sfbc", "madiff", "dom2")
    }
    draw_curves(axes[-1], points, DATASETS, "mean of the scenarios", "dataset")
    axes[-1].set_xticks(range(len(DATASETS)), DATASETS, rotation=30, ha="right")
    axes[0].set_ylabel("normalised score")
    add_legend(figure, ncols=6)
    return figure


def draw_steps(target: Target, rows: list[Row]) -> Figure:
    """Normalised score and time per decision, as far as it was measured, against the number of denoising steps."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    scores, times = figure.subplots(1, 2)
    points = {f"{row.scenario} {row.dataset}": [mean_scores([row], v) for v in STEP_COUNTS] for row in rows}
    draw_curves(scores, points, STEPS, "", "denoising steps N")
    measured = [[row.here[v].raw["milliseconds_per_action"] for row in rows if v in row.here] for v in STEP_COUNTS]
    points = {"_": [np.array(column) if column else None for column in measured]}  # a label that no legend shows
    draw_curves(times, points, STEPS, "", "denoising steps N")
    scores.set_ylabel("normalised score")
    times.set(ylabel="milliseconds per decision,\nall agents of all seeds", ylim=(0, None))
    add_legend(figure, ncols=3)
    return figure


GROUPS = {
    "particle environments, standard": (PARTICLE, ("none",)),
    "particle environments, shifted": (PARTICLE, ("speed",)),
    "HalfCheetah, standard": (MUJOCO, ("none",)),
    "HalfCheetah, shifts random and extreme": (MUJOCO, ("random", "extreme")),
}


STATISTICS = """A task is one dataset in one environment. The tables show, for every algorithm:

- the interquartile mean (without the lowest and the highest quarter) of the normalised scores over all tasks and seeds,
  every task with the same weight;
- the probability that a seed of DOM2 scores higher than a seed of this algorithm on the same task, averaged over tasks.

In brackets are 95% intervals by stratified bootstrap (Agarwal et al. 2021). A dash: not all tasks have been run. The
CSV has the cells behind the numbers. Results with a dagger in the tables count as well.
"""


class Aggregate(NamedTuple):
    """An algorithm over all tasks of a group: estimates with their intervals, None where no task has been run."""

    group: str
    variant: Variant
    tasks: int  # datasets and environments that have been run
    score: tuple[float, float, float] | None  # interquartile mean of the normalised scores; only if all have been run
    dom2_better: tuple[float, float, float] | None  # over the tasks that DOM2 has too


def aggregates(rows: list[Row]) -> list[Aggregate]:
    """Interquartile mean of every algorithm, and the probability that DOM2 improves on it."""
    found, (dom2,) = [], plain("dom2")
    for name, (scenarios, shifts) in GROUPS.items():
        group = [row for row in rows if row.scenario in scenarios and row.shift in shifts]
        for variant in TABLE:
            scores = [row.here[variant].normalised for row in group if variant in row.here]
            both = [row.here for row in group if {variant, dom2} <= row.here.keys() and variant != dom2]
            score = (float(iqm(pooled(scores))), *interval(scores)) if len(scores) == len(group) > 0 else None
            pairs = [[here[v].normalised for here in both] for v in (dom2, variant)]
            found.append(Aggregate(name, variant, len(scores), score, improvement(*pairs) if both else None))
    return found


def statistics_table(target: Target, rows: list[Row]) -> str:
    """A table for each group of environments."""

    def show(x: tuple[float, float, float] | None, digits: int) -> str:
        return "-" if x is None else "{0:.{3}f} [{1:.{3}f}, {2:.{3}f}]".format(*x, digits)

    text = f"# {target.title}\n\n{STATISTICS}"
    head = ["algorithm", "tasks run", "interquartile mean", "probability that DOM2 is better"]
    found = [x for x in aggregates(rows) if x.tasks]
    for name in GROUPS:
        group = [x for x in found if x.group == name]
        lines = [[x.variant.label, str(x.tasks), show(x.score, 1), show(x.dom2_better, 2)] for x in group]
        text += f"\n## {name}\n\n{markdown_table([head, *lines])}"
    return text


def draw_statistics(target: Target, rows: list[Row]) -> Figure:
    """Both numbers with their intervals: a column of panels per group of environments."""
    figure = Figure(figsize=(4 * len(GROUPS), 6), layout="constrained")
    panels = figure.subplots(2, len(GROUPS), sharey=True)
    labels = [variant.label for variant in TABLE][::-1]
    for x in aggregates(rows):
        column = list(GROUPS).index(x.group)
        for ax, value in zip(panels[:, column], (x.score, x.dom2_better), strict=True):
            if value is not None:
                estimate, low, high = value
                y, colour = labels.index(x.variant.label), COLOURS[x.variant.label]
                ax.plot((low, high), (y, y), color=colour, lw=6, alpha=0.4, solid_capstyle="butt")
                ax.plot(estimate, y, "o", color=colour)
        panels[0, column].set(title=x.group, xlabel="interquartile mean of the normalised scores")
        panels[1, column].set(xlabel="probability that DOM2 is better", xlim=(-0.03, 1.03))
        panels[1, column].axvline(0.5, color="0.6", lw=0.8, zorder=0)
    for ax in panels[:, 0]:
        ax.set_yticks(range(len(labels)), labels)
    return figure


TEXT = {"statistics": statistics_table}
DRAW = {"fig2": draw_fig2, "fig5": draw_fig5, "steps": draw_steps, "statistics": draw_statistics}


def write_report(name: str, results_dir: Path) -> str:
    """Write `<results_dir>/report/<name>.{md,csv,png,pdf}` and return the Markdown; no figure without any cell."""
    rows, path = read_rows(TARGETS[name], results_dir), results_dir / "report" / name
    text = TEXT.get(name, markdown)(TARGETS[name], rows)
    write(path.with_suffix(".md"), text)
    write(path.with_suffix(".csv"), csv_table(rows))
    if any(row.here for row in rows):
        figure = DRAW.get(name, draw_bars)(TARGETS[name], rows)
        figure.savefig(path.with_suffix(".png"), dpi=100)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return text


OVERVIEW = """# What did the experiments show?

`python experiments/reproduce.py report` writes this page, the tables and the figures from the raw results in
[`results/`](../results/README.md). Returns are means over seeds of the last parameters. A cell is one algorithm on one
dataset in one environment. Each heading has its figure and a link to its table, which shows every mean and spread next
to the paper's. *Within the spread* means that two means differ by less than the larger of their standard deviations
over seeds.

Everything is being made again with today's code and settings: algorithms with the seeds 10 to 14, their variants in
the studies with 10 to 12. In Tables 1 and 2 DOM2, BC, MA-BC and MA-TD3+BC are done, in Tables 3 and 4 all. A dagger
(†) in the tables marks older results. These have the seeds 0 to 2, with which the settings were chosen, and earlier
code, in which the policies acted themselves and not their average. Six results of MA-SfBC and MA-Diffusion-QL without
a dagger are older as well ([more](../results/README.md#raw-results)). Variants of an algorithm that are older than its
main result are left out. Figure 6 leaves out everything older than DOM2's result.
"""


def write_overview(path: Path, results_dir: Path) -> None:
    """Write docs/results.md: every target's figure, its summary and a link to its table."""
    text = OVERVIEW
    for name, target in TARGETS.items():
        rows, report = read_rows(target, results_dir), f"../{results_dir.name}/report/{name}"
        said = STATISTICS if name == "statistics" else f"{summary(target, rows)}\n"
        text += f"\n## {target.title}\n\n{said}[Table]({report}.md), [CSV]({report}.csv).\n"
        if any(row.here for row in rows):
            text += f"\n![{target.title}]({report}.png)\n"
    write(path, text)
