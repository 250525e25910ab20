"""The paper's tables and figures: run what is missing of one, then print it next to the paper's numbers.

    python reproduce.py table1                       # the missing cells of Table 1, one per core or GPU; then the table
    python reproduce.py table1 --dry-run             # only list the commands and estimate the time
    python reproduce.py fig6 --scenarios simple_tag --launcher slurm --partition gpu --gpus 1 --time-limit 2:00:00
    python reproduce.py table1 -- --compile          # what follows -- is added to every command
    python reproduce.py report                       # all tables and figures from the raw results, without training

A cell is one ordinary command line of this repository, and its raw result is the `results.json` which that command
wrote, copied to `results/<algorithm>[-<options>]/<scenario>-<dataset>.json`. Cells that are there are never run again.
A grid that was stopped or killed goes on where it was when the same line is run again, each cell from its checkpoint;
on a cluster that line also collects what has finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

import common
from common import DATASETS, ROOT, UserError


@dataclass
class Args:
    target: tyro.conf.Positional[str]
    """table1 to table4, fig2, fig5, fig6, factorial, steps, or report: all of them without running anything"""
    scenarios: tuple[str, ...] = ()
    """only these scenarios"""
    datasets: tuple[str, ...] = ()
    """only these data sets"""
    algorithms: tuple[str, ...] = ()
    """only these algorithms, by their folder names in results/: dom2, bc, omar, ..."""
    num_seeds: int = 3
    """seeds of each cell, trained side by side; a result with more of them will do"""
    updates: int | None = None
    """gradient updates of each cell; default: the scripts' settings tables"""
    dry_run: bool = False
    """list commands and states, estimate the time, run nothing"""
    retry: bool = False
    """run the cells that failed once more"""
    overwrite: bool = False
    """run the cells whose result was made with other settings, and replace that result"""
    launcher: str = "local"
    """local or slurm (a job array)"""
    jobs: int = 0
    """cells at once; 0: as many as cores, or GPUs where there are any; on slurm: no limit"""
    partition: str | None = None
    """slurm: partition to submit to; default: the cluster's"""
    gpus: int = 0
    """slurm: GPUs per cell"""
    cpus: int = 1
    """slurm: cores per cell"""
    time_limit: str | None = None
    """slurm: time limit per cell, as sbatch takes it; a cell that it ends is continued by the next invocation"""
    results_dir: str = "results"
    """folder of the raw results, the report and the paper's numbers"""
    run_dir: str = "runs/reproduce"
    """folder of the cells' run folders and logs"""


# --------------------------------------------------------------------------------------------------------------------
# What the paper shows. A cell is an algorithm with options on a data set; a target is a set of cells.


class Algorithm(NamedTuple):
    name: str  # as the paper writes it
    script: str
    options: dict  # that make it this algorithm


ALGORITHMS = {
    "bc": Algorithm("BC", "dom2_{family}.py", {"eta": 0}),
    "ma_bc": Algorithm("MA-BC", "baselines/ma_bc.py", {}),
    "ma_td3bc": Algorithm("MA-TD3+BC", "baselines/ma_td3bc.py", {}),
    "ma_cql": Algorithm("MA-CQL", "baselines/ma_cql.py", {}),
    "omar": Algorithm("OMAR", "baselines/omar.py", {}),
    "ma_sfbc": Algorithm("MA-SfBC", "baselines/ma_sfbc.py", {}),
    "madiff": Algorithm("MADiff", "baselines/madiff.py", {}),
    "dom2": Algorithm("DOM2", "dom2_{family}.py", {}),
}
PARTICLE, MUJOCO = ("simple_tag", "simple_world", "simple_spread"), ("HalfCheetah",)
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
STEPS = (1, 2, 3, 5, 10)


def command_line(options) -> list[str]:
    """(field, value) pairs as command-line options: --eta 0, --augment, --no-augment."""
    words = []
    for field, value in options:
        name = field.replace("_", "-")
        words += [f"--no-{name}"] if value is False else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


class Variant(NamedTuple):
    """An algorithm with options of its script, (field, value) pairs."""

    algorithm: str
    options: tuple[tuple[str, object], ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder in results/: omar, dom2-no-augment, dom2-data-fraction-0.05."""
        return "-".join([self.algorithm, *(word.lstrip("-") for word in command_line(self.options))])

    @property
    def label(self) -> str:
        return ALGORITHMS[self.algorithm].name + self.folder.removeprefix(self.algorithm).replace("-", " ")


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

    def cells(self, args: Args) -> list[Cell]:
        """Its cells, without what --scenarios, --datasets and --algorithms leave out."""
        cells = {
            Cell(v, s, d): None
            for variants, scenarios, datasets in self.blocks
            for s in scenarios
            for d in datasets
            for v in variants
            if s in (args.scenarios or (s,)) and d in (args.datasets or (d,))
            if v.algorithm in (args.algorithms or (v.algorithm,))
        }
        return list(cells)


def variants(algorithms: tuple[str, ...], **options) -> tuple[Variant, ...]:
    return tuple(Variant(algorithm, tuple(options.items())) for algorithm in algorithms)


def with_fraction(algorithms: tuple[str, ...], fraction: float) -> tuple[Variant, ...]:
    return variants(algorithms, data_fraction=fraction) if fraction < 1 else variants(algorithms)


TABLE = variants(("bc", "ma_cql", "omar", "ma_sfbc", "dom2"))
BASELINES = ("ma_bc", "ma_td3bc", "ma_cql", "omar", "ma_sfbc", "madiff")
NO_REPLAY = tuple(d for d in DATASETS if d != "medium-replay")
ABLATIONS = (
    *variants(("dom2", "bc")),  # bc: without policy improvement
    *variants(("dom2",), bc_weight=0),
    *variants(("dom2",), augment=False),
    *variants(("dom2",), noise_net="residual"),
    *variants(("dom2",), prediction="noise"),
    *variants(("dom2",), solver="ddpm"),
    *variants(("dom2",), zeta=0),
)
STEP_COUNTS = tuple(v for n in STEPS for v in variants(("dom2",), diffusion_steps=n))
TARGETS = {
    "table1": Target("Table 1: particle environments", ("none",), ((TABLE, PARTICLE, DATASETS),)),
    "table2": Target("Table 2: shifted particle environments", ("speed",), ((TABLE, PARTICLE, DATASETS),)),
    "table3": Target("Table 3: HalfCheetah", ("none",), ((TABLE, MUJOCO, DATASETS),)),
    "table4": Target("Table 4: shifted HalfCheetah", ("random", "extreme"), ((TABLE, MUJOCO, DATASETS),)),
    "fig2": Target(
        "Figure 2: three agents, six landmarks",
        ("none", "dismiss"),
        ((variants(("ma_cql", "omar", "dom2")), ("landmarks6",), ("expert",)),),
    ),
    "fig5": Target(
        "Figure 5: data efficiency and data quality",
        ("none",),
        (
            *((with_fraction(("ma_cql", "omar", "ma_sfbc", "dom2"), f), PARTICLE, NO_REPLAY) for f in FRACTIONS),
            (variants(("ma_sfbc", "madiff", "dom2")), PARTICLE, DATASETS),
        ),
    ),
    "fig6": Target("Figure 6: ablations", ("none",), ((ABLATIONS, PARTICLE + MUJOCO, DATASETS),)),
    "factorial": Target(
        "Augmentation off and on",
        ("none",),
        (
            (variants(BASELINES), PARTICLE, DATASETS),
            (variants(BASELINES, augment=True), PARTICLE, DATASETS),
            (variants(("dom2",), augment=False) + variants(("dom2",)), PARTICLE, DATASETS),
        ),
    ),
    "steps": Target("Denoising steps", ("none",), ((STEP_COUNTS, PARTICLE, ("random", "expert")),)),
}


# --------------------------------------------------------------------------------------------------------------------
# Cells: the command, the settings that its result must have, and how far it is


# Options that change where and how a cell runs, not what comes out (and num_seeds, of which more will do).
NOT_COMPARED = {
    *("num_seeds", "run_dir", "resume", "eval_only", "eval_interval", "capture_video", "track", "cuda", "compile"),
    "shift",
}


class Job(NamedTuple):
    """A cell as something to run."""

    cell: Cell
    command: tuple[str, ...]  # without the interpreter and --run-dir
    settings: dict  # that the script will resolve the command to
    folder: Path  # of its log and its run folders; its name changes with the settings
    result: Path


@cache
def parse(script: str, options: tuple[str, ...]):
    """The module of a script, and its options parsed.

    Raises:
        UserError: the script is not there or lacks a package.
    """
    try:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    except ImportError as error:
        raise UserError(f"{script}: {error}; mend that or leave its cells out with --algorithms, --scenarios") from None
    return module, tyro.cli(module.Args, args=list(options), prog=script, config=(tyro.conf.FlagCreatePairsOff,))


def resolve(cell: Cell, args: Args, further: tuple[str, ...]) -> tuple[tuple[str, ...], dict]:
    """The command of a cell with `further` options, and the settings that its script makes of it."""
    algorithm = ALGORITHMS[cell.variant.algorithm]
    script = algorithm.script.format(family="mamujoco" if cell.scenario in MUJOCO else "mpe")
    fields = algorithm.options | dict(cell.variant.options) | {"num_seeds": args.num_seeds}
    options = (*command_line((fields | ({"updates": args.updates} if args.updates else {})).items()), *further)
    module, parsed = parse(script, options)
    resolved = module.resolve(replace(parsed, scenario=cell.scenario, dataset=cell.dataset))
    command = (script, "--scenario", cell.scenario, "--dataset", cell.dataset, *options)
    return command, json.loads(json.dumps(asdict(resolved)))


def make_job(cell: Cell, args: Args, further: tuple[str, ...] = ()) -> Job:
    """The job of a cell; a variant that has the plain algorithm's settings is the plain algorithm's cell."""
    command, settings = resolve(cell, args, further)
    plain = cell._replace(variant=Variant(cell.variant.algorithm))
    plain_command, plain_settings = resolve(plain, args, further)
    if settings == plain_settings:
        cell, command = plain, plain_command
    identity = {k: v for k, v in settings.items() if k not in NOT_COMPARED} | {"seeds": args.num_seeds}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = ROOT / args.run_dir / cell.variant.folder / f"{cell.scenario}-{cell.dataset}-{digest}"
    return Job(cell, command, settings, folder, result_path(cell, args))


def result_path(cell: Cell, args: Args) -> Path:
    return ROOT / args.results_dir / cell.variant.folder / f"{cell.scenario}-{cell.dataset}.json"


def read(path: Path) -> dict | None:
    """A raw result, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        results = json.loads(path.read_text())
        results["returns"], results["settings"]["num_seeds"]
        return results
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no readable result; restore it, or delete it to run its cell again") from None


def differences(results: dict, settings: dict) -> dict:
    """The settings in which a raw result is not what is asked for, {name: its value}; options newer than it agree."""
    made = results["settings"]
    few = {"num_seeds": made["num_seeds"]} if made["num_seeds"] < settings.get("num_seeds", 1) else {}
    return few | {k: made[k] for k, v in settings.items() if k in made and k not in NOT_COMPARED and made[k] != v}


def find(cell: Cell, args: Args) -> dict | None:
    """The raw result of a cell: its own or, where that has the same options, the plain algorithm's."""
    plain = read(result_path(cell._replace(variant=Variant(cell.variant.algorithm)), args))
    same = plain is not None and all(plain["settings"].get(k) == v for k, v in cell.variant.options)
    return read(result_path(cell, args)) or (plain if same else None)


def run_folders(job: Job) -> list[Path]:
    return sorted(path.parent for path in job.folder.glob("*/config.json"))  # their names end with the time


def write(path: Path, text: str) -> None:
    """Write a file so that at any moment it is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def collect(job: Job) -> bool:
    """Copy the finished run's results.json, if there is one, to its place in results/."""
    for run in run_folders(job):
        if (run / "results.json").exists():
            write(job.result, (run / "results.json").read_text())
            return True
    return False


def state(job: Job, args: Args, active: set[str] = frozenset()) -> str:
    """done, finished (to be collected), other settings, running, failed, interrupted or missing.

    `active` are the ids of the jobs that the cluster has.
    """
    results = read(job.result)
    if results is not None and not differences(results, job.settings):
        return "done"
    if results is not None and not args.overwrite:
        return "other settings"
    if any((run / "results.json").exists() for run in run_folders(job)):
        return "finished"
    if note(job, "job") in active or locked(job):
        return "running"
    if 0 <= int(note(job, "exit_code") or -1) < 128 and not args.retry:  # else it has not ended, or a signal ended it
        return "failed"
    return "interrupted" if run_folders(job) else "missing"


def note(job: Job, name: str) -> str:
    """What the file of that name in a job's folder says: exit_code, or job, its id on the cluster; "" without one."""
    path = job.folder / name
    return path.read_text().strip() if path.exists() else ""


def lock(job: Job):
    """Take the lock of a job's folder: the open file that holds it, None if somebody else does.

    A process that inherits the file holds the lock too, also when this one is killed, so no cell runs twice at once.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    file = open(job.folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError:
        file.close()
        return None


def locked(job: Job) -> bool:
    file = lock(job) if job.folder.exists() else None
    if file is not None:
        file.close()
    return job.folder.exists() and file is None


# --------------------------------------------------------------------------------------------------------------------
# Launchers


def start_command(job: Job) -> list[str]:
    """What to start: the cell's command, or the continuation of its last run that left a checkpoint."""
    (job.folder / "exit_code").unlink(missing_ok=True)
    stopped = [run for run in run_folders(job) if (run / "checkpoint.pt").exists()]
    if stopped:
        return [sys.executable, job.command[0], "--resume", str(stopped[-1])]
    return [sys.executable, *job.command, "--run-dir", str(job.folder)]


def find_gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def run_local(jobs: list[Job], args: Args) -> None:
    """Run the jobs on this machine, `args.jobs` at once; SIGINT and SIGTERM have all of them save and stop."""
    gpus, cores = find_gpus(), len(os.sched_getaffinity(0))
    at_once = args.jobs or len(gpus) or cores
    waiting, running, slots, failed = list(jobs), {}, list(range(at_once)), 0
    with tqdm(total=len(jobs), unit="cell", dynamic_ncols=True) as bar, common.catch_signals() as stopped:
        while running or (waiting and not stopped):
            while waiting and slots and not stopped:
                job = waiting.pop(0)
                held = lock(job)
                if held is None:  # somebody else has started it in the meantime
                    bar.update()
                    continue
                env = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // at_once))}
                slot = slots.pop(0)
                if gpus:
                    env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
                options = {"env": env, "cwd": ROOT, "pass_fds": [held.fileno()], "start_new_session": True}
                with held, open(job.folder / "log.txt", "a") as log:
                    process = subprocess.Popen(
                        start_command(job), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
                    )
                running[process] = job, slot
            if stopped:
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()
            for process in [process for process in running if process.poll() is not None]:
                job, slot = running.pop(process)
                slots.append(slot)
                write(job.folder / "exit_code", f"{process.returncode}\n")
                collect(job)
                failed += process.returncode > 0
                bar.update()
            bar.set_postfix_str(f"{len(running)} running, {failed} failed")
            time.sleep(0.1)
    if stopped:
        print("stopped; the same line goes on from here")
        raise SystemExit(128 + stopped[0])


def slurm(*command: str) -> str:
    """Standard output of a SLURM command.

    Raises:
        UserError: it is not installed, or refuses.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError:
        raise UserError(f"--launcher slurm: {command[0]} not found; run this where SLURM is installed") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"--launcher slurm: {command[0]}: {error.stderr.strip()}") from None


def active_jobs() -> set[str]:
    """Ids, <job>_<index>, of this user's jobs that wait or run on the cluster."""
    return set(slurm("squeue", "--me", "--noheader", "--array", "--format=%i").split())


def submit(jobs: list[Job], args: Args) -> None:
    """Submit the jobs as one job array; each writes its log and its exit code to its folder."""
    options = {
        "job-name": f"reproduce-{args.target}",
        "array": f"0-{len(jobs) - 1}" + (f"%{args.jobs}" if args.jobs else ""),
        "partition": args.partition,
        "gpus": args.gpus or None,
        "cpus-per-task": args.cpus,
        "time": args.time_limit,
        "chdir": ROOT,
        "output": "/dev/null",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None)]
    lines += [f"export OMP_NUM_THREADS={args.cpus}", "case $SLURM_ARRAY_TASK_ID in"]
    for i, job in enumerate(jobs):
        job.folder.mkdir(parents=True, exist_ok=True)
        log, code = shlex.quote(str(job.folder / "log.txt")), shlex.quote(str(job.folder / "exit_code"))
        lines.append(f"{i}) {shlex.join(start_command(job))} >> {log} 2>&1; echo $? > {code} ;;")
    script = ROOT / args.run_dir / "slurm" / f"{args.target}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.sh"
    write(script, "\n".join([*lines, "esac"]) + "\n")
    number = slurm("sbatch", "--parsable", str(script)).split(";")[0]
    for i, job in enumerate(jobs):
        write(job.folder / "job", f"{number}_{i}\n")
    print(f"submitted job {number}, {len(jobs)} cells ({script}); the same line again collects what has finished")


def estimate(job: Job, made: list[dict]) -> float | None:
    """Seconds that a cell will take, by the seconds per update of the raw results nearest to it; None without any."""
    keys = ("algorithm", "scenario")
    wanted = {"algorithm": job.cell.variant.algorithm, "scenario": job.cell.scenario}
    for same in (keys, keys[:1], keys[1:], ()):
        rates = [r["seconds"] / r["updates"] for r in made if all(r[key] == wanted[key] for key in same)]
        if rates:
            return statistics.median(rates) * job.settings["updates"]
    return None


# --------------------------------------------------------------------------------------------------------------------
# The report: from raw results to tables and figures


def iqm(x: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter (rounded down)."""
    cut = x.shape[-1] // 4
    return np.sort(x, -1)[..., cut : x.shape[-1] - cut].mean(-1)


def interval(tasks: list[np.ndarray], samples: int = 2000) -> tuple[float, float]:
    """95% interval of the interquartile mean over all `tasks` together, by stratified bootstrap: the seeds of each
    task ([seeds]) are resampled (Agarwal et al. 2021)."""
    rng = np.random.default_rng(0)
    drawn = [x[rng.integers(len(x), size=(samples, len(x)))] for x in tasks]
    low, high = np.percentile(iqm(np.concatenate(drawn, 1)), (2.5, 97.5))
    return float(low), float(high)


class Score(NamedTuple):
    """A cell in one environment."""

    returns: np.ndarray  # [seeds] each the mean over evaluation episodes
    normalised: np.ndarray  # [seeds]; NaN where the scenario has no normalisation
    data: dict  # mean, std and max of the returns in the data that it learned from


class Row(NamedTuple):
    """A row of the paper's tables."""

    shift: str
    scenario: str
    dataset: str
    here: dict[Variant, Score]  # of the cells that have been run
    paper: dict[Variant, tuple[float, float]]  # mean and std

    @property
    def best(self) -> Variant | None:
        return best({v: score.returns.mean() for v, score in self.here.items()})

    @property
    def best_in_paper(self) -> Variant | None:
        return best({v: mean for v, (mean, std) in self.paper.items()})


def best(means: dict):
    """The key of the largest value, None unless there are two to compare."""
    return max(means, key=means.get) if len(means) > 1 else None


def read_rows(target: Target, args: Args) -> list[Row]:
    """The target's rows, from the raw results and the paper's numbers."""
    rows = {}
    for shift in target.shifts:
        for cell in target.cells(args):
            variant, scenario, dataset = cell
            row = rows.setdefault((shift, scenario, dataset), Row(shift, scenario, dataset, {}, {}))
            if not variant.options:
                published = common.paper_result(scenario, dataset, shift, ALGORITHMS[variant.algorithm].name)
                if published:
                    row.paper[variant] = published
            results = find(cell, args)
            if results is not None and shift in results["returns"]:
                x = np.array(results["returns"][shift])
                known = scenario in common.NORMALISATION
                row.here[variant] = Score(
                    x, common.normalised_score(scenario, x) if known else np.nan * x, results["data"]
                )
    return list(rows.values())


def csv_table(rows: list[Row]) -> str:
    """One line per cell and environment that has been run."""
    names = "shift scenario dataset variant seeds mean std normalised iqm iqm_low iqm_high data_mean data_max"
    text = ",".join([*names.split(), "paper_mean", "paper_std"]) + "\n"
    for row in rows:
        for variant, (x, scores, data) in row.here.items():
            figures = x.mean(), x.std(), scores.mean(), iqm(scores), *interval([scores]), data["mean"], data["max"]
            line = (
                row.shift,
                row.scenario,
                row.dataset,
                variant.folder,
                len(x),
                *(f"{figure:.2f}" for figure in figures),
            )
            text += ",".join(map(str, (*line, *row.paper.get(variant, ("", ""))))) + "\n"
    return text


def show_return(row: Row, variant: Variant) -> str:
    """Mean ± std over seeds, bold where it is the best; after a slash the paper's."""
    text = "-"
    if variant in row.here:
        x = row.here[variant].returns
        text = f"{x.mean():.1f} ± {x.std():.1f}"
    text = f"**{text}**" if variant == row.best else text
    return text + (" / {} ± {}".format(*row.paper[variant]) if variant in row.paper else "")


def show_score(rows: list[Row], variant: Variant) -> str:
    """Interquartile mean of the normalised scores over seeds and rows, with its interval; only if all have been run."""
    if not all(variant in row.here for row in rows):
        return "-"
    tasks = [row.here[variant].normalised for row in rows]
    return "{:.1f} [{:.1f}, {:.1f}]".format(iqm(np.concatenate(tasks)), *interval(tasks))


def show_data(row: Row) -> str:
    data = next((score.data for variant, score in row.here.items() if not variant.options), None)
    return f"{data['mean']:.1f} ({data['max']:.0f})" if data else "-"


def show_wins(winners: list[Variant | None]) -> str:
    winners = [variant.label for variant in winners if variant]
    counts = [f"{label} {winners.count(label)}" for label in dict.fromkeys(winners)]
    return (", ".join(counts) or "none") + f" (of {len(winners)})"


def markdown_table(lines: list[list[str]]) -> str:
    """A table of its lines, the first of them the head; one that would be too wide is transposed."""
    lines = lines if len(lines[0]) < 12 else list(zip(*lines, strict=True))
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def markdown(target: Target, rows: list[Row], args: Args) -> str:
    """For each scenario and environment a table of returns, here and in the paper, and one of normalised scores."""
    cells = target.cells(args)
    columns = list(dict.fromkeys(cell.variant for cell in cells))
    labels = [variant.label for variant in columns]
    text = (
        f"# {target.title}\n\nMade by `python reproduce.py report` from the raw results. Returns: mean ± standard "
        "deviation over seeds / the same in the paper; bold is the best here.\nNormalised scores: interquartile mean "
        "over seeds [95% bootstrap interval]. A dash is a cell that has not been run.\n\n"
        f"Cells run: {sum(len(row.here) for row in rows)} of {len(cells) * len(target.shifts)}. "
        f"Best return, of rows with at least two cells: {show_wins([row.best for row in rows])} here, "
        f"{show_wins([row.best_in_paper for row in rows])} in the paper.\n"
    )
    for shift, scenario in dict.fromkeys((row.shift, row.scenario) for row in rows):
        group = [row for row in rows if (row.shift, row.scenario) == (shift, scenario)]
        returns = [["return", *labels, "data mean (max)", "best here", "best in the paper"]]
        scores = [["normalised score", *labels]]
        for row in group:
            winners = [variant.label if variant else "-" for variant in (row.best, row.best_in_paper)]
            returns.append([row.dataset, *(show_return(row, v) for v in columns), show_data(row), *winners])
            scores.append([row.dataset, *(show_score([row], v) for v in columns)])
        scores.append(["all", *(show_score(group, v) for v in columns)])
        text += f"\n## {scenario}, {'standard' if shift == 'none' else shift}\n\n"
        text += markdown_table(returns) + "\n" + markdown_table(scores)
    return text


def draw_bars(rows: list[Row], args: Args):
    """A panel per scenario and environment, a group of bars per data set; black marks are the paper's means."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.shift, row.scenario) for row in rows if row.here))
    columns = list(dict.fromkeys(v for row in rows for v in (*row.here, *row.paper)))
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (shift, scenario) in zip(axes, panels, strict=True):
        group = [row for row in rows if (row.shift, row.scenario) == (shift, scenario)]
        for k, variant in enumerate(columns):
            for x, row in enumerate(group):
                place, width = x + (k + 0.5) / len(columns) * 0.8 - 0.4, 0.8 / len(columns)
                if variant in row.here:
                    returns = row.here[variant].returns
                    ax.bar(place, returns.mean(), width, yerr=returns.std(), color=f"C{k % 10}", error_kw={"lw": 0.8})
                if variant in row.paper:
                    ax.plot([place - width / 2, place + width / 2], [row.paper[variant][0]] * 2, "k", lw=1.2)
        ax.set_xticks(range(len(group)), [row.dataset for row in group], rotation=30, ha="right")
        ax.set_title(f"{scenario}, {'standard' if shift == 'none' else shift}")
        ax.axhline(0, color="0.6", lw=0.6, zorder=0)
    axes[0].set_ylabel("episode return")
    handles = [axes[0].bar(0, 0, color=f"C{k % 10}", label=v.label) for k, v in enumerate(columns)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def seed_means(rows: list[Row], variant: Variant) -> np.ndarray | None:
    """Each seed's normalised score, averaged over rows [seeds]; None unless all rows have been run."""
    if not rows or not all(variant in row.here for row in rows):
        return None
    seeds = min(len(row.here[variant].normalised) for row in rows)
    return np.mean([row.here[variant].normalised[:seeds] for row in rows], 0)


def draw_curves(ax, curves: dict[str, list], ticks: list[str]) -> None:
    """Lines with standard deviations: {label: [an array [seeds], or None, per tick]}."""
    for label, points in curves.items():
        known = [(x, point.mean(), point.std()) for x, point in enumerate(points) if point is not None]
        if known:
            ax.errorbar(*np.array(known).T, marker="o", capsize=3, label=label)
    ax.set_xticks(range(len(ticks)), ticks)
    ax.legend(frameon=False, fontsize=8)


def draw_fig5(rows: list[Row], args: Args):
    """Normalised score against the share of the data, without medium-replay, and against the data's quality."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PARTICLE) + 1)
    for ax, scenario in zip(axes, PARTICLE, strict=False):
        group = [row for row in rows if row.scenario == scenario and row.dataset != "medium-replay"]
        curves = {
            ALGORITHMS[a].name: [seed_means(group, with_fraction((a,), f)[0]) for f in FRACTIONS]
            for a in ("ma_cql", "omar", "ma_sfbc", "dom2")
        }
        draw_curves(ax, curves, [f"{f:.0%}" for f in FRACTIONS])
        ax.set(title=scenario, xlabel="share of the trajectories")
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    curves = {
        v.label: [seed_means([row for row in rows if row.dataset == d], v) for d in datasets]
        for v in variants(("ma_sfbc", "madiff", "dom2"))
    }
    draw_curves(axes[-1], curves, datasets)
    axes[-1].set(title="average over the scenarios", xlabel="data set")
    axes[-1].tick_params("x", rotation=30)
    axes[0].set_ylabel("normalised score")
    return figure


def draw_steps(rows: list[Row], args: Args):
    """Normalised score and, where it was measured, time per action against the number of denoising steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    ticks = [str(n) for n in STEPS]
    curves = {f"{row.scenario} {row.dataset}": [seed_means([row], v) for v in STEP_COUNTS] for row in rows}
    draw_curves(axes[0], curves, ticks)
    axes[0].set(xlabel="denoising steps N", ylabel="normalised score")
    path = ROOT / args.results_dir / "action_time.json"
    if path.exists():
        measured = json.loads(path.read_text())
        axes[1].plot(range(len(STEPS)), [measured["milliseconds"][n] for n in ticks], marker="o")
        axes[1].set_title(measured["hardware"], fontsize=8)
    axes[1].set_xticks(range(len(STEPS)), ticks)
    axes[1].set(xlabel="denoising steps N", ylabel="milliseconds per decision of a team", ylim=(0, None))
    return figure


def write_report(name: str, args: Args) -> str:
    """Write `<results_dir>/report/<name>.{md,csv,png,pdf}` and return the Markdown; no figure without any cell."""
    rows, folder = read_rows(TARGETS[name], args), ROOT / args.results_dir / "report"
    text = markdown(TARGETS[name], rows, args)
    write(folder / f"{name}.md", text)
    write(folder / f"{name}.csv", csv_table(rows))
    if any(row.here for row in rows):
        figure = {"fig5": draw_fig5, "steps": draw_steps}.get(name, draw_bars)(rows, args)
        figure.savefig(folder / f"{name}.png", dpi=120)
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return text


def measure_action_time(path: Path, repeats: int = 200) -> None:
    """Median milliseconds that DOM2's team takes for one decision, for each number of denoising steps."""
    import torch

    import dom2_mpe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obs, generator = torch.randn(3, 1, 16, device=device), torch.Generator(device)  # three predators, one world
    teams = [dom2_mpe.resolve(dom2_mpe.Args(diffusion_steps=n)) for n in STEPS]
    teams = [(dom2_mpe.make_learners(args, 3, 16, 2, device), args) for args in teams]
    times = {str(n): [] for n in STEPS}
    for _ in range(repeats):  # in turns, because machines are noisy
        for (learners, args), record in zip(teams, times.values(), strict=True):
            start = time.perf_counter()
            dom2_mpe.act(learners, obs, args, generator).cpu()  # the copy waits for a GPU
            record.append(1000 * (time.perf_counter() - start))
    medians = {n: round(statistics.median(record), 4) for n, record in times.items()}
    write(path, json.dumps({"hardware": dom2_mpe.hardware(device), "milliseconds": medians}, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------------------------


def check(args: Args) -> None:
    """Raise a UserError for an option without a meaning."""
    common.check_choice("target", args.target, (*TARGETS, "report"))
    common.check_choice("--launcher", args.launcher, ("local", "slurm"))
    blocks = [block for target in TARGETS.values() for block in target.blocks]
    for scenario in args.scenarios:
        common.check_choice("--scenarios", scenario, sorted({s for block in blocks for s in block[1]}))
    for dataset in args.datasets:
        common.check_choice("--datasets", dataset, DATASETS)
    for algorithm in args.algorithms:
        common.check_choice("--algorithms", algorithm, ALGORITHMS)
    for option, least in (("num_seeds", 1), ("jobs", 0), ("gpus", 0), ("cpus", 1)):
        if getattr(args, option) < least:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be at least {least}")


def reproduce(args: Args, further: tuple[str, ...] = ()) -> bool:
    """Run what is missing of `args.target` and print its tables. Returns whether no cell has failed.

    Raises:
        UserError: an option has no meaning, a script or SLURM is missing, or a raw result is damaged.
    """
    check(args)
    if args.target == "report":
        for name in TARGETS:
            write_report(name, args)
        print(f"wrote {args.results_dir}/report")
        return True
    jobs = {job.folder: job for job in (make_job(cell, args, further) for cell in TARGETS[args.target].cells(args))}
    active = active_jobs() if args.launcher == "slurm" else frozenset()
    states = {folder: state(job, args, active) for folder, job in jobs.items()}
    waiting = [job for folder, job in jobs.items() if states[folder] in ("missing", "interrupted")]
    if args.dry_run:
        made = [read(path) for path in sorted((ROOT / args.results_dir).glob("*/*.json"))]
        for folder, job in jobs.items():
            print(f"{states[folder]:<16}python {shlex.join(job.command)}")
        seconds = [estimate(job, made) for job in waiting]
        hours = sum(s for s in seconds if s is not None) / 3600
        print(f"{len(waiting)} of {len(jobs)} cells to run, about {hours:.1f} h one after the other", end="")
        print(f" and {seconds.count(None)} of unknown length" if None in seconds else "")
        return True
    for folder, job in jobs.items():
        if states[folder] == "finished":
            collect(job)
    if waiting:
        (submit if args.launcher == "slurm" else run_local)(waiting, args)
    if args.target == "steps" and not (ROOT / args.results_dir / "action_time.json").exists():
        measure_action_time(ROOT / args.results_dir / "action_time.json")
    print(f"\n{write_report(args.target, args)}")
    active = active_jobs() if args.launcher == "slurm" else frozenset()
    states = {folder: state(job, args, active) for folder, job in jobs.items()}
    for folder, job in jobs.items():
        if states[folder] == "failed":
            print(f"failed: {job.cell}, log in {folder / 'log.txt'}; --retry runs it once more")
        elif states[folder] == "other settings":
            other = ", ".join(f"{k} {v}" for k, v in differences(read(job.result), job.settings).items())
            print(f"other settings: {job.result} was made with {other}; --overwrite replaces it")
    counts = [f"{list(states.values()).count(name)} {name}" for name in dict.fromkeys(states.values())]
    print(f"cells: {', '.join(counts)}; tables and figures in {args.results_dir}/report")
    return "failed" not in states.values()


def main() -> None:
    words = sys.argv[1:]
    here = words.index("--") if "--" in words else len(words)
    args = tyro.cli(Args, description=__doc__, args=words[:here], config=(tyro.conf.FlagCreatePairsOff,))
    if not reproduce(args, tuple(words[here + 1 :])):
        sys.exit(1)


if __name__ == "__main__":
    common.run(main)
