"""Run what is missing of one of the paper's tables or figures, then print it next to the paper's numbers.

    python experiments/reproduce.py table1              # the missing cells of Table 1, one per core or GPU; the table
    python experiments/reproduce.py table1 --dry-run    # only list the commands and estimate the time
    python experiments/reproduce.py fig6 --scenarios simple_tag --launcher slurm --partition gpu --gpus 1
    python experiments/reproduce.py table1 -- --compile # what follows -- is added to every command
    python experiments/reproduce.py report              # all tables and figures from the raw results, without training

A cell is one ordinary command line of this repository. Its raw result is the `results.json` that the command wrote,
copied to `results/main/<algorithm>/<scenario>-<dataset>.json` or, with options that a study varies, to
`results/studies/<study>/<variant>/`. A cell with a raw result is not run again. A grid that was stopped or killed is
continued by the same line, each cell from its checkpoint. On a cluster that line also collects the finished cells.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from filelock import lock_descriptor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from common import ROOT
from experiments.report import (
    ALGORITHMS,
    FIRST_SEED,
    MUJOCO,
    TARGETS,
    Cell,
    Variant,
    command_line,
    read,
    result_path,
    write,
    write_overview,
    write_report,
    write_result,
)
from run import parse as parse_options
from utils.options import WHERE_AND_HOW, Count, Name, Natural, OptionalCount, OptionalName, Options, lines
from utils.program import UserError, catch_signals, program, usable_cores, warn


@dataclass
class Args(Options):
    target: tyro.conf.Positional[Literal[(*TARGETS, "report")]]
    """table, figure or study to run; report: all tables and figures from the raw results, without running anything"""
    scenarios: tuple[str, ...] = ()
    """only these scenarios"""
    datasets: tuple[str, ...] = ()
    """only these datasets"""
    algorithms: tuple[str, ...] = ()
    """only these algorithms, by their folder names in results/main: dom2, bc, omar, ..."""
    seed: Natural = FIRST_SEED
    """first seed of each cell; the settings were chosen with the seeds 0 to 2"""
    num_seeds: OptionalCount = None
    """seeds of each cell, trained side by side; default: 5, in a study 3. A result with more of them will do"""
    updates: OptionalCount = None
    """gradient updates of each cell; default: those in the scripts' SETTINGS"""
    dry_run: bool = False
    """list commands and states, estimate the time and run nothing"""
    retry: bool = False
    """run failed cells once more"""
    overwrite: bool = False
    """run cells whose raw result was made with other settings, and replace it"""
    launcher: Literal["local", "slurm"] = "local"
    """slurm: a job array"""
    jobs: Natural = 0
    """cells at once; 0: one per GPU, or per core where there is no GPU; with slurm: no limit"""
    partition: OptionalName = None
    """slurm: partition to submit to; default: the cluster's"""
    gpus: Natural = 0
    """slurm: GPUs per cell"""
    cpus: Count = 1
    """slurm: cores per cell"""
    time_limit: OptionalName = None
    """slurm: time limit per cell, as sbatch takes it; a cell that it ends is continued by the next invocation"""
    results_dir: Name = "results"
    """folder of the raw results and the report"""
    run_dir: Name = "runs/reproduce"
    """folder of the cells' run folders and logs"""


# --------------------------------------------------------------------------------------------------------------------
# Cells: the command, the settings that its result must have, and how far it is


# Options of where and how a cell runs, which change the results by rounding at most; and num_seeds, of which more will
# do.
NOT_COMPARED = ("num_seeds", "eval_interval", *WHERE_AND_HOW)
# Options of a cell's command that cannot be added to it.
OWN_OPTIONS = ("--scenario", "--dataset", "--seed", "--num-seeds", "--updates", "--run-dir", "--resume", "--eval-only")


class Job(NamedTuple):
    """A cell as something to run."""

    cell: Cell
    command: tuple[str, ...]  # without the interpreter and --run-dir
    settings: dict  # all options of the script, as it understands the command
    folder: Path  # of its log and its run folders; its name depends on the settings
    result: Path


def load(script: str):
    """The algorithm of a script.

    Raises:
        UserError: the script is not there or lacks a package.
    """
    try:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    except ImportError as error:
        raise UserError(f"{script}: {error}; mend that or leave its cells out with --algorithms, --scenarios") from None
    name = script.rpartition("/")[2].removesuffix(".py").upper()
    return module.DOM2 if name.startswith("DOM2") else getattr(module, name)


def resolve(cell: Cell, args: Args, further: tuple[str, ...]) -> tuple[tuple[str, ...], dict]:
    """The command of a cell with `further` options, and the settings that its script makes of it."""
    algorithm = ALGORITHMS[cell.variant.algorithm]
    script = algorithm.script.format(family="mamujoco" if cell.scenario in MUJOCO else "mpe")
    fields = {"seed": args.seed, "num_seeds": args.num_seeds or cell.variant.num_seeds}
    fields |= {"updates": args.updates} if args.updates else {}
    options = command_line((algorithm.options | fields | dict(cell.variant.options)).items())
    words = ("--scenario", cell.scenario, "--dataset", cell.dataset, *options, *further)
    settings = asdict(parse_options(load(script), "", list(words)))
    return (script, *words), json.loads(json.dumps(settings))


def make_job(cell: Cell, args: Args, further: tuple[str, ...] = ()) -> Job:
    """The job of a cell; a variant that has the plain algorithm's settings is the plain algorithm's cell."""
    command, settings = resolve(cell, args, further)
    if cell.variant.options:
        plain = cell._replace(variant=Variant(cell.variant.algorithm))
        plain_command, plain_settings = resolve(plain, args, further)
        if settings == plain_settings | {"num_seeds": settings["num_seeds"]}:
            cell, command, settings = plain, plain_command, plain_settings
    identity = {k: v for k, v in settings.items() if k not in NOT_COMPARED} | {"seeds": settings["num_seeds"]}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = ROOT / args.run_dir / cell.variant.folder / f"{cell.scenario}-{cell.dataset}-{digest}"
    return Job(cell, command, settings, folder, result_path(cell, ROOT / args.results_dir))


def differences(results: dict, job: Job) -> dict:
    """The settings in which a raw result is not the job's, {option: its value}; options newer than the result agree."""
    made = results["settings"]
    wanted = {k: v for k, v in job.settings.items() if k not in NOT_COMPARED}
    few = {"num_seeds": made["num_seeds"]} if made["num_seeds"] < job.settings["num_seeds"] else {}
    return few | {k: made[k] for k, v in wanted.items() if k in made and made[k] != v}


def run_folders(job: Job) -> list[Path]:
    return sorted(path.parent for path in job.folder.glob("*/config.json"))  # their names end with the time


def collect(job: Job) -> bool:
    """Copy the finished run's results.json, if there is one, to its place in results/."""
    for run in run_folders(job):
        results = read(run / "results.json")
        if results:
            write_result(job.result, results)
            return True
    return False


TO_RUN = ("missing", "interrupted")
WINDOWS = os.name == "nt"


def find_states(jobs: list[Job], args: Args) -> list[str]:
    """State of each job: done, other settings (its raw result was made with some), finished (not collected yet),
    running (or queued), failed, interrupted, missing."""
    active = active_jobs() if args.launcher == "slurm" else set()
    states = []
    for job in jobs:
        results, code = read(job.result), int(read_text_of(job, "exit_code") or -1)
        if results and not differences(results, job):
            states.append("done")
        elif results and not args.overwrite:
            states.append("other settings")
        elif any((run / "results.json").exists() for run in run_folders(job)):
            states.append("finished")
        elif read_text_of(job, "job") in active or is_locked(job):
            states.append("running")
        elif 0 <= code < 128 and not args.retry:  # others have not ended, or were ended by a signal
            states.append("failed")
        else:
            states.append("interrupted" if run_folders(job) else "missing")
    return states


def read_text_of(job: Job, name: str) -> str:
    """Text of a file in a job's folder, "" without one: exit_code, or job (its id on the cluster)."""
    path = job.folder / name
    return path.read_text("utf-8").strip() if path.exists() else ""


def lock(job: Job):
    """Take the lock of a job's folder: the open file that holds it, or None if another process holds it.

    A process that inherits the file keeps the lock, even when this process is killed. So no cell runs twice at once.
    Where the file system has no locks, nobody else is noticed, and a warning says so.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    file = open(job.folder / "lock", "wb")
    try:
        if lock_descriptor(file.fileno(), blocking=False):
            return file
    except OSError as error:
        warn(f"the folder of --run-dir has no locks ({error.strerror or error}); do not run this grid twice at once")
        return file
    file.close()
    return None


def is_locked(job: Job) -> bool:
    file = lock(job) if job.folder.exists() else None
    if file is not None:
        file.close()
    return job.folder.exists() and file is None


# --------------------------------------------------------------------------------------------------------------------
# Launchers


def start_command(job: Job) -> list[str]:
    """The cell's command, or the continuation of its last run that left a checkpoint."""
    (job.folder / "exit_code").unlink(missing_ok=True)
    stopped = [run for run in run_folders(job) if list(run.glob("checkpoint*.pt"))]
    if stopped:
        made = json.loads((stopped[-1] / "config.json").read_text("utf-8")) | {"capture_video": False}
        wanted = {name: job.settings[name] for name in ("cuda", "compile", "track", "capture_video", "eval_interval")}
        changed = command_line((name, value) for name, value in wanted.items() if value != made[name])
        return [sys.executable, job.command[0], "--resume", from_root(stopped[-1]), *changed]
    return [sys.executable, *job.command, "--run-dir", from_root(job.folder)]


def from_root(path: Path) -> str:
    """The path relative to the repository, where cells run, so that results name no folder of this machine."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def find_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else visible.split(",")
    return [name.strip() for name in names[:count]]  # CUDA ignores what follows the first name that is none


def start(job: Job, env: dict[str, str], held) -> subprocess.Popen:
    """Start a cell. Ctrl-C does not reach it: this process stops it. `held` is the file that holds its lock."""
    if WINDOWS:  # whose locks cannot be inherited
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        options = {"pass_fds": [held.fileno()], "start_new_session": True}
    command = start_command(job)
    with open(job.folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)


def run_local(jobs: list[Job], args: Args) -> None:
    """Run the jobs on this machine, `args.jobs` at once; on SIGINT and SIGTERM all of them save and stop."""
    gpus, cores = find_gpus(), usable_cores()
    at_once = args.jobs or len(gpus) or cores
    waiting, running, slots, failed = list(jobs), {}, list(range(at_once)), 0
    with tqdm(total=len(jobs), unit="cell", dynamic_ncols=True) as bar, catch_signals() as stopped:
        while running or (waiting and not stopped):
            while waiting and slots and not stopped:
                job = waiting.pop(0)
                held = lock(job)
                if held is None:  # another process has started it in the meantime
                    bar.update()
                    continue
                env = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // at_once))}
                slot = slots.pop(0)
                if gpus:
                    env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
                running[start(job, env, held)] = job, slot, held
            if stopped:
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()
            for process in [process for process in running if process.poll() is not None]:
                job, slot, held = running.pop(process)
                slots.append(slot)
                if not (stopped and process.returncode == 1 and WINDOWS):  # there a stopped cell seems to have failed
                    write(job.folder / "exit_code", f"{process.returncode}\n")
                    failed += 0 < process.returncode < 128  # others finished or were stopped
                collect(job)
                held.close()
                bar.update()
            if (state := f"{len(running)} running, {failed} failed") != bar.postfix:
                bar.set_postfix_str(state)
            time.sleep(0.1)
    if stopped:
        print("stopped; run the same line to continue")
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
    print(f"submitted job {number}, {len(jobs)} cells ({script}); run the same line to collect the finished ones")


def read_results(results_dir: Path) -> list[dict]:
    """All raw results. `algorithm` becomes the one of their folder, main/bc or studies/augmentation/bc-with-..., since
    those of bc name dom2."""
    files = sorted(results_dir.rglob("*.json"))
    return [read(file) | {"algorithm": file.parent.name.partition("-")[0]} for file in files]


def estimate(job: Job, made: list[dict]) -> float | None:
    """Seconds that a cell will take, from the seconds per update of similar raw results; None without any."""
    keys = ("algorithm", "scenario")
    wanted = {"algorithm": job.cell.variant.algorithm, "scenario": job.cell.scenario}
    for same in (keys, keys[:1], keys[1:], ()):
        alike = [r for r in made if all(r[key] == wanted[key] for key in same)]
        updates = [r["updates"] - r.get("first_update", 0) for r in alike]
        rates = [r["seconds"] / n for r, n in zip(alike, updates, strict=True) if n > 0]
        if rates:
            return statistics.median(rates) * job.settings["updates"]
    return None


# --------------------------------------------------------------------------------------------------------------------


def choose_cells(args: Args) -> list[Cell]:
    """The target's cells that --scenarios, --datasets and --algorithms select.

    Raises:
        UserError: one of them has a value that it cannot have.
    """
    if args.target == "report":
        return []
    cells = TARGETS[args.target].cells()
    for option, value in (
        ("scenarios", lambda cell: cell.scenario),
        ("datasets", lambda cell: cell.dataset),
        ("algorithms", lambda cell: cell.variant.algorithm),
    ):
        for choice in getattr(args, option):
            if choice not in (known := sorted({value(cell) for cell in cells})):
                raise UserError(f"--{option} {choice}: not in {args.target}; choose one of {', '.join(known)}")
        cells = [cell for cell in cells if value(cell) in (getattr(args, option) or (value(cell),))]
    return cells


def show_plan(jobs: list[Job], states: list[str], args: Args) -> None:
    """Print each job's state and command, and how long those to run will take."""
    made = read_results(ROOT / args.results_dir)
    seconds = []
    for job, now in zip(jobs, states, strict=True):
        print(f"{now:<16}python {shlex.join(job.command)}")
        seconds += [estimate(job, made)] if now in TO_RUN else []
    print(f"{len(seconds)} of {len(jobs)} cells to run", end="")
    if seconds and None not in seconds:
        print(f", about {sum(seconds) / 3600:.1f} h one after the other on the hardware of the results so far", end="")
    print()
    if "other settings" in states:
        print(f"{states.count('other settings')} results were made with other settings; --overwrite runs them again")


def reproduce(args: Args, further: tuple[str, ...] = ()) -> bool:
    """Run what is missing of `args.target`, print its tables and return whether no cell has failed.

    Raises:
        UserError: an option has a value that it cannot have, a script or SLURM is missing, or a raw result is damaged.
    """
    cells, results_dir = choose_cells(args), ROOT / args.results_dir
    if args.target == "report":
        if not results_dir.is_dir():
            raise UserError(f"--results-dir {args.results_dir}: no such folder; give one with raw results")
        for name in TARGETS:
            write_report(name, results_dir)
        if results_dir == ROOT / "results":
            write_overview(ROOT / "docs" / "results.md", results_dir)
        print(f"wrote {args.results_dir}/report")
        return True
    jobs = list({job.folder: job for job in (make_job(cell, args, further) for cell in cells)}.values())
    states = find_states(jobs, args)
    if args.dry_run:
        show_plan(jobs, states, args)
        return True
    for job, now in zip(jobs, states, strict=True):
        if now == "finished":
            collect(job)
    waiting = [job for job, now in zip(jobs, states, strict=True) if now in TO_RUN]
    if waiting:
        (submit if args.launcher == "slurm" else run_local)(waiting, args)
    print(f"\n{write_report(args.target, results_dir)}")
    states = find_states(jobs, replace(args, retry=False))
    for job, now in zip(jobs, states, strict=True):
        if now == "failed":
            print(f"failed: {job.cell}, log in {job.folder / 'log.txt'}; --retry runs it once more")
        elif now == "other settings":
            other = ", ".join(f"{name} {value}" for name, value in differences(read(job.result), job).items())
            print(f"other settings: {job.result} was made with {other}; --overwrite replaces it")
    print(f"cells: {', '.join(f'{states.count(now)} {now}' for now in dict.fromkeys(states))}")
    print(f"tables and figures: {args.results_dir}/report")
    return "failed" not in states


def main() -> None:
    words = sys.argv[1:]
    here = words.index("--") if "--" in words else len(words)
    args = tyro.cli(Args, description=lines(__doc__), args=words[:here])
    for word in words[here + 1 :]:
        if (option := word.partition("=")[0].replace("_", "-")) in OWN_OPTIONS:
            raise UserError(f"-- {option}: this program sets it for each cell; leave it out")
    if not reproduce(args, tuple(words[here + 1 :])):
        sys.exit(1)


if __name__ == "__main__":
    program(main)
