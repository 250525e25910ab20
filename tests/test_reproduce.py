"""The grid behind the paper's tables and figures: tiny real cells, a real SLURM, the report against naive versions."""

import csv
import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, mannwhitneyu, trim_mean

import common
from common import DATASETS, ROOT
from experiments import report, reproduce
from experiments.report import TARGETS, Cell, Variant, varied, with_fraction, with_steps
from experiments.reproduce import OWN_OPTIONS, Args
from utils.program import UserError, program

PROGRAM = (sys.executable, str(ROOT / "experiments/reproduce.py"))
TINY = ("--eval-episodes", "2", "--widths", "8", "8", "--critic-widths", "8", "--batch-size", "4", "--no-cuda")


@pytest.fixture
def tiny(tmp_path, data_dir):
    """Args of a grid with one tiny cell, DOM2 on simple_spread/random, in tmp_path; and further options of its runs."""
    places = dict(results_dir=str(tmp_path / "results"), run_dir=str(tmp_path / "runs"))
    choice = dict(scenarios=("simple_spread",), datasets=("random",), algorithms=("dom2",))
    return Args("table1", num_seeds=2, updates=2, **choice, **places), ("--data-dir", str(data_dir), *TINY)


@pytest.fixture
def no_starts(monkeypatch):
    """Nothing may be started; the jobs that would have been are collected in a list."""
    jobs = []
    monkeypatch.setattr(reproduce, "run_local", lambda waiting, args: jobs.extend(waiting))
    return jobs


def words(args, further):
    """Args as a command line of reproduce.py."""
    line = [*PROGRAM, args.target]
    for field, value in vars(args).items():
        if field != "target" and value not in (None, False, ()):
            line += [f"--{field.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return [*line, "--", *further]


def the_job(args, further):
    (cell,) = reproduce.choose_cells(args)
    return reproduce.make_job(cell, args, further)


def the_state(args, further):
    return reproduce.find_states([the_job(args, further)], args)[0]


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --------------------------------------------------------------------------------------------------------------------
# Running


def check_finished_grid(args, further, out, tmp_path):
    """What a grid of two cells, of which one failed, must have left."""
    done = tmp_path / "results/main/dom2/simple_spread-random.json"
    (run,) = (tmp_path / "runs/main/dom2").glob("simple_spread-random-*/dom2-*")
    assert done.read_bytes() == (run / "results.json").read_bytes()
    results = json.loads(done.read_text())
    assert results["command"].startswith(
        "python dom2_mpe.py --scenario simple_spread --dataset random --seed 10 --num-seeds 2 "
    )
    assert results["updates"] == 2 and results["num_seeds"] == 2
    assert not done.with_name("simple_spread-medium-replay.json").exists()
    (log,) = (tmp_path / "runs/main/dom2").glob("simple_spread-medium-replay-*/log.txt")
    assert "medium-replay: no such dataset" in log.read_text()
    assert f"failed: main/dom2/simple_spread-medium-replay, log in {log}" in out and "cells: 1 done, 1 failed" in out
    assert "Cells run: 1 of 162." in out
    x = results["returns"]["none"]
    assert f"| {statistics.mean(x):.1f} ± {statistics.pstdev(x):.1f} / 337.8 ± 26.0 " in out


@pytest.fixture
def with_a_failing_cell(tiny, tmp_path, data_dir):
    """The tiny grid and a second cell, whose dataset is damaged."""
    args, further = tiny
    data = shutil.copytree(data_dir, tmp_path / "data")
    (data / "simple_spread/medium-replay").mkdir()
    return replace(args, datasets=("random", "medium-replay")), ("--data-dir", str(data), *further[2:])


def test_a_grid_runs_and_is_not_run_again(with_a_failing_cell, tmp_path, capsys, monkeypatch):
    (args, further), no_starts = with_a_failing_cell, []
    assert not (tmp_path / "results").exists()
    assert not reproduce.reproduce(args, further)  # one cell has failed
    out, bar = capsys.readouterr()
    assert "2/2" in bar
    check_finished_grid(args, further, out, tmp_path)
    monkeypatch.setattr(reproduce, "run_local", lambda waiting, args: no_starts.extend(waiting))
    assert not reproduce.reproduce(args, further)
    assert no_starts == []
    assert not reproduce.reproduce(replace(args, retry=True), further)
    assert [str(job.cell) for job in no_starts] == ["main/dom2/simple_spread-medium-replay"]
    no_starts.clear()

    result = the_job(replace(args, datasets=("random",)), further).result
    before = result.read_bytes()
    fewer = replace(args, datasets=("random",), num_seeds=1)
    more = replace(args, datasets=("random",), updates=3)
    assert reproduce.reproduce(fewer, further) and no_starts == []
    assert reproduce.reproduce(replace(args, datasets=("random",)), (*further, "--eval-interval", "1"))
    capsys.readouterr()
    assert reproduce.reproduce(more, further) and no_starts == [] and result.read_bytes() == before
    assert f"other settings: {result} was made with updates 2; --overwrite replaces it" in capsys.readouterr().out
    assert reproduce.reproduce(replace(more, overwrite=True), further)
    assert [job.settings["updates"] for job in no_starts] == [3]


@pytest.mark.slow
def test_a_stopped_grid_goes_on_from_its_checkpoints(tiny, tmp_path):
    args, further = replace(tiny[0], updates=500), tiny[1]
    job = the_job(args, further)
    log, pipes = job.folder / "log.txt", dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert the_state(args, further) == "missing"
    grid = subprocess.Popen(words(args, further), cwd=tmp_path, **pipes)
    wait_until(lambda: (log.exists() and " 0/500 " in log.read_text()) or grid.poll() is not None)  # training begins
    assert the_state(args, further) == "running"
    grid.terminate()
    out, bar = grid.communicate(timeout=120)
    assert "0 failed" in bar and "1 failed" not in bar
    assert grid.returncode == 128 + signal.SIGTERM and "stopped; run the same line to continue" in out
    assert "stopped after update" in log.read_text()
    assert the_state(args, further) == "interrupted"

    assert reproduce.reproduce(args, further)
    (run,) = job.folder.glob("dom2-*")
    results = json.loads(job.result.read_text())
    assert results["updates"] == 500 and results["command"] == f"python dom2_mpe.py --resume {run}"
    assert the_state(args, further) == "done"


def test_a_cell_whose_launcher_was_killed_counts_as_running(tiny):
    job = the_job(*tiny)
    held = reproduce.lock(job)
    orphan = subprocess.Popen(["sleep", "60"], pass_fds=[held.fileno()])
    held.close()  # as when the launcher is killed
    assert the_state(*tiny) == "running" and reproduce.lock(job) is None
    orphan.kill()
    orphan.wait()
    assert the_state(*tiny) == "missing"


@pytest.mark.parametrize(
    ("code", "state"), [(None, "missing"), (2, "failed"), (0, "failed"), (137, "missing"), (-15, "missing")]
)
def test_states_by_exit_code(code, state, tiny):
    job = the_job(*tiny)
    if code is not None:
        report.write(job.folder / "exit_code", f"{code}\n")
    assert the_state(*tiny) == state


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_file_systems_without_locks(number, tiny, monkeypatch, capsys):
    """A cell there is not taken for one that another process runs; one warning says what to avoid."""
    reproduce.warn.cache_clear()

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    (cell,) = reproduce.choose_cells(tiny[0])
    job = reproduce.make_job(cell, *tiny)
    report.write(job.folder / "exit_code", "137\n")
    assert the_state(*tiny) == "missing"
    with reproduce.lock(job) as held, reproduce.lock(job) as other:
        assert held and other
    err = capsys.readouterr().err
    assert err.startswith("warning: the folder of --run-dir has no locks (") and err.count("\n") == 1


def test_a_grid_on_windows(tiny, monkeypatch):
    """No fcntl, no inherited locks, no sessions, and a cell that is stopped has the exit code of a failed one."""
    monkeypatch.setattr(reproduce, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0, raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    args = replace(tiny[0], datasets=("random", "medium"), jobs=2)
    jobs = [reproduce.make_job(cell, args, tiny[1]) for cell in reproduce.choose_cells(args)]
    states, sleep, seconds = [], time.sleep, 0
    code = """if True:
        import pathlib, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *args: sys.exit(1))
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(float(sys.argv[2]))
        sys.exit(1)
    """

    def start_command(job):
        return [sys.executable, "-c", code, str(job.folder / "started"), str(seconds)]

    def look(duration):  # as another process would while the cells run
        states.append([reproduce.is_locked(job) for job in jobs])
        if seconds and all((job.folder / "started").exists() for job in jobs):
            os.kill(os.getpid(), signal.SIGTERM)
        sleep(duration)

    monkeypatch.setattr(reproduce, "start_command", start_command)
    monkeypatch.setattr(time, "sleep", look)
    reproduce.run_local(jobs, args)
    assert states[0] == [True, True] and reproduce.find_states(jobs, args) == ["failed", "failed"]
    for job in jobs:
        (job.folder / "exit_code").unlink()
        (job.folder / "started").unlink()
    seconds = 60
    with pytest.raises(SystemExit):
        reproduce.run_local(jobs, args)
    assert reproduce.find_states(jobs, args) == ["missing", "missing"]


@pytest.mark.parametrize(
    "visible, count, expected",
    [
        (None, 2, ["0", "1"]),
        (None, 0, []),
        ("2,5", 2, ["2", "5"]),
        ("2, 5", 2, ["2", "5"]),
        ("GPU-1a,MIG-2b", 2, ["GPU-1a", "MIG-2b"]),
        ("", 0, []),
        ("-1", 0, []),
        ("1,-1,0", 1, ["1"]),  # CUDA ignores what follows
        ("0,9", 1, ["0"]),
        ("NoDevFiles", 0, []),
    ],
)
def test_gpus_that_may_be_used(visible, count, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert reproduce.find_gpus() == expected


def test_cells_share_the_gpus(tiny, monkeypatch):
    program = (
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']); time.sleep(0.3)"
    )
    monkeypatch.setattr(reproduce, "find_gpus", lambda: ["3", "5"])
    monkeypatch.setattr(reproduce, "start_command", lambda job: [sys.executable, "-c", program])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    args = replace(tiny[0], datasets=("random", "medium", "expert", "random-medium"))
    jobs = [reproduce.make_job(cell, args, tiny[1]) for cell in reproduce.choose_cells(args)]
    reproduce.run_local(jobs[:3], args)
    said = [(job.folder / "log.txt").read_text().strip() for job in jobs[:3]]
    assert said[:2] == ["3 4", "5 4"] and said[2] in ("3 4", "5 4")
    reproduce.run_local(jobs, replace(args, jobs=4))
    assert [(job.folder / "log.txt").read_text().split("\n")[-2] for job in jobs] == ["3 2", "5 2", "3 2", "5 2"]


def test_a_finished_run_is_collected(tiny, no_starts):
    job = the_job(*tiny)
    run = job.folder / "dom2-simple_spread-random-seed0-20200101-000000"
    text = json.dumps(fake(job.cell, {"none": [1.0, 2.0]}) | {"settings": job.settings})
    report.write(run / "config.json", "{}")
    report.write(run / "checkpoint.pt", "")
    report.write(run / "results.json", text)
    assert the_state(*tiny) == "finished"
    assert reproduce.reproduce(*tiny) and no_starts == []
    assert json.loads(job.result.read_text()) == json.loads(text) and the_state(*tiny) == "done"


def test_a_reader_that_leaves_early_ends_the_program_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*PROGRAM, "table1", "--dry-run", "--algorithms", "bc", "--scenarios", "simple_tag"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_dry_run_lists_commands_and_estimates_the_time(tiny, tmp_path, capsys):
    args, further = replace(tiny[0], dry_run=True, updates=100, algorithms=("bc", "dom2")), tiny[1]
    made = {"algorithm": "dom2", "scenario": "simple_spread", "seconds": 36.0, "updates": 11, "first_update": 10}
    path = report.result_path(Cell(Variant("dom2"), "simple_spread", "expert"), tmp_path / "results")
    report.write(path, json.dumps(fake(Cell(Variant("dom2"), "simple_spread", "expert"), {}) | made))
    before = sorted(tmp_path.rglob("*"))
    assert reproduce.reproduce(args, further)
    out = capsys.readouterr().out
    options = "--seed 10 --num-seeds 2 --updates 100 " + " ".join(further)
    assert f"missing         python dom2_mpe.py --scenario simple_spread --dataset random {options}\n" in out
    assert "--dataset random --eta 0 --seed 10 --num-seeds 2 --updates 100" in out
    assert "2 of 2 cells to run, about 2.0 h one after the other" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_time_of_dom2_is_not_estimated_from_the_runs_of_bc(tiny, tmp_path):
    """Raw results of both name dom2 as their algorithm; their folders tell them apart."""
    for variant, seconds in ((Variant("bc"), 1.0), (Variant("dom2"), 50.0), (report.NOT_AUGMENTED, 70.0)):
        cell = Cell(variant, "simple_spread", "expert")
        path = report.result_path(cell, tmp_path / "results")
        report.write(path, json.dumps(fake(cell, {}) | {"algorithm": "dom2", "seconds": seconds, "updates": 1}))
    made = reproduce.read_results(tmp_path / "results")
    for algorithm, seconds in (("bc", 1.0), ("dom2", 60.0)):
        job = reproduce.make_job(Cell(Variant(algorithm), "simple_spread", "random"), tiny[0], tiny[1])
        assert reproduce.estimate(job, made) == seconds * job.settings["updates"]


def test_a_variant_with_the_plain_settings_is_the_plain_cell(tiny):
    def make(variant):
        return reproduce.make_job(Cell(variant, "simple_spread", "random"), replace(tiny[0], num_seeds=None), tiny[1])

    plain = make(Variant("dom2"))
    assert plain.settings["num_seeds"] == 5
    assert make(varied("dom2", "ablations", "without conservative term", zeta=0)) == plain == make(with_steps(5))
    other = make(with_steps(1))
    assert other.settings == plain.settings | {"diffusion_steps": 1, "num_seeds": 3}
    for path in (other.result.parent, other.folder.parent):
        assert str(path).endswith("studies/denoising-steps/dom2-with-1-denoising-step")


def test_commands_name_no_folder_of_this_machine():
    job = reproduce.make_job(Cell(Variant("dom2"), "simple_tag", "random"), Args("table1", run_dir="runs/test"))
    line = (
        f"dom2_mpe.py --scenario simple_tag --dataset random --seed 10 --num-seeds 5 "
        f"--run-dir runs/test/main/dom2/{job.folder.name}"
    )
    assert reproduce.start_command(job)[1:] == line.split()


def test_a_cell_goes_on_with_what_is_added_to_its_command_now(tmp_path):
    """As without the compiler that it lacked. What the run has anyway is not repeated."""
    cell, args = Cell(Variant("dom2"), "simple_tag", "random"), Args("table1", run_dir=str(tmp_path))
    first = reproduce.make_job(cell, args, ("--compile", "--capture-video"))
    run = first.folder / "dom2-run"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(first.settings))
    (run / "checkpoint.pt").touch()
    for further, expected in (
        (("--compile",), []),
        (("--compile", "--capture-video"), ["--capture-video"]),
        (("--no-cuda", "--eval-interval", "7"), ["--no-cuda", "--no-compile", "--eval-interval", "7"]),
    ):
        job = reproduce.make_job(cell, args, further)
        assert reproduce.start_command(job)[1:] == ["dom2_mpe.py", "--resume", str(run), *expected]


def test_a_mistyped_folder_of_results_is_not_made(tmp_path):
    with pytest.raises(UserError, match=r"--results-dir .*typo: no such folder"):
        reproduce.reproduce(Args("report", results_dir=str(tmp_path / "typo")))
    assert not list(tmp_path.iterdir())


def test_every_variant_is_a_command_with_its_own_folder():
    cells = [cell for target in TARGETS.values() for cell in target.cells()]
    everything = {cell.variant for cell in cells}
    assert len({v.folder for v in everything}) == len({v.name for v in everything}) == len(everything)
    chosen = {tuple(name for name, _ in cell.variant.options): cell for cell in cells if cell.scenario != "landmarks6"}
    chosen |= {cell.variant.algorithm: cell for cell in cells if cell.scenario == "simple_tag"}
    for cell in chosen.values():
        job = reproduce.make_job(cell, Args("table1"))
        assert all(job.settings[option] == value for option, value in cell.variant.options)
        assert job.result.name == f"{job.settings['scenario']}-{job.settings['dataset']}.json"
        assert job.folder.parent == ROOT / "runs/reproduce" / job.cell.variant.folder
        assert (ROOT / job.command[0]).exists()


def test_settings_are_compared(tiny):
    job = the_job(*tiny)

    def differences(job=job, **made):
        return reproduce.differences({"settings": job.settings | made}, job)

    assert differences() == differences(num_seeds=3, cuda=True, eval_interval=7, run_dir="elsewhere") == {}
    assert differences(num_seeds=1) == {"num_seeds": 1}
    assert differences(bf16=True, eta=1.0, widths=[4]) == {"bf16": True, "eta": 1.0, "widths": [4]}
    older = {"settings": {k: v for k, v in job.settings.items() if k != "reward_scale"}}
    assert reproduce.differences(older, job) == {}


# --------------------------------------------------------------------------------------------------------------------
# SLURM


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=tiny Nodes=ALL Default=YES State=UP
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def cluster(monkeypatch):
    """A SLURM cluster of one node, this machine, with its own keys and ports."""
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    if not all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        pytest.skip("SLURM is not installed; on Debian: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # munge wants a path that everybody may enter
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    host, user = socket.gethostname().split(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
    conf = dict(host=host, user=user, ports=free_ports(2), folder=folder, cpus=len(os.sched_getaffinity(0)))
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**conf))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    daemons = []

    def start(*command):
        log = open(folder / f"{command[0]}.out", "w")
        daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    start("munged", "--foreground", f"--socket={folder}/munge.socket", *munge)
    wait_until((folder / "munge.socket").exists, 30)
    start("slurmctld", "-D")
    start("slurmd", "-D")
    try:
        wait_until(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout, 60)
        yield folder
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            daemon.wait(timeout=30)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_slurm(cluster, with_a_failing_cell, tmp_path, capsys):
    args, further = with_a_failing_cell
    args = replace(args, launcher="slurm", partition="tiny", time_limit="10")
    assert reproduce.reproduce(args, further)
    out = capsys.readouterr().out
    assert "submitted job 1, 2 cells" in out and "cells: 2 running" in out
    assert reproduce.reproduce(args, further)  # submits nothing while they run, unless they have ended already
    assert "submitted" not in capsys.readouterr().out
    wait_until(lambda: not reproduce.active_jobs())
    assert not reproduce.reproduce(args, further)
    check_finished_grid(args, further, capsys.readouterr().out, tmp_path)


@pytest.mark.slow
def test_slurm_cells_that_were_cancelled_are_submitted_again(cluster, tiny, capsys):
    args, further = replace(tiny[0], launcher="slurm"), (*tiny[1], "--eval-interval", "5")
    long = replace(args, updates=100_000)
    job = the_job(long, further)
    assert reproduce.reproduce(long, further)
    wait_until(lambda: list(job.folder.glob("*/checkpoint.pt")))
    subprocess.run(["scancel", "--me"], check=True)
    wait_until(lambda: not reproduce.active_jobs())
    assert the_state(long, further) == "interrupted"
    assert reproduce.reproduce(long, further)
    (run,) = job.folder.glob("dom2-*")
    scripts = sorted((Path(args.run_dir) / "slurm").glob("*.sh"))
    assert [f"dom2_mpe.py --resume {run} >>" in script.read_text() for script in scripts] == [False, True]
    subprocess.run(["scancel", "--me"], check=True)
    wait_until(lambda: not reproduce.active_jobs())


@pytest.mark.slow
def test_slurm_refuses(cluster, tiny):
    with pytest.raises(UserError, match=r"sbatch: .*invalid partition"):
        reproduce.reproduce(replace(tiny[0], launcher="slurm", partition="none"), tiny[1])


def test_slurm_is_not_installed(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue not found"):
        reproduce.reproduce(replace(tiny[0], launcher="slurm"), tiny[1])


# --------------------------------------------------------------------------------------------------------------------
# The report


def fake(cell, returns):
    """A raw result."""
    seeds = max(map(len, returns.values()), default=1)
    return {
        "algorithm": cell.variant.algorithm,
        "scenario": cell.scenario,
        "dataset": cell.dataset,
        "updates": 10,
        "seconds": 1.0,
        "returns": returns,
        "data": {"mean": 7.25, "std": 1.0, "max": 99.0, "transitions": 100},
        "settings": {"seed": 10, "num_seeds": seeds} | dict(cell.variant.options),
    }


def save(folder, cell, returns, **further):
    report.write_result(report.result_path(cell, folder), fake(cell, returns) | further)


def test_old_results_of_an_algorithm_are_not_shown_beside_its_later_ones(tmp_path):
    """Those of the seeds 0 to 2 were made by earlier code and have a dagger."""
    old, new = ({"settings": {"seed": seed, "num_seeds": 1}} for seed in (0, 10))
    plain, bc, ablation = Variant("dom2"), Variant("bc"), report.NOT_AUGMENTED
    results = (
        (plain, "random", 1.0, new),
        (bc, "random", 2.0, old),
        (bc, "expert", 3.0, old),
        (plain, "random-medium", 4.0, old),
        (ablation, "random", 5.0, old),
        (ablation, "random-medium", 6.0, old),
        (bc, "random-medium", 7.0, old),
        (plain, "expert", 8.0, new),
    )
    for variant, dataset, x, made_with in results:
        save(tmp_path, Cell(variant, "simple_tag", dataset), {"none": [x]}, **made_with)

    def shown(name):
        text = report.markdown(report.TARGETS[name], report.read_rows(report.TARGETS[name], tmp_path))
        return set(re.findall(r"\d\.0 ± 0\.0(?:\*\*)?†?", text))

    table1 = {"1.0 ± 0.0", "2.0 ± 0.0**†", "3.0 ± 0.0†", "4.0 ± 0.0†", "7.0 ± 0.0**†", "8.0 ± 0.0**"}
    assert shown("table1") == table1
    assert shown("fig6") == {"4.0 ± 0.0†", "6.0 ± 0.0†", "7.0 ± 0.0**†", "8.0 ± 0.0"}  # BC is an ablation: not 3.0
    assert shown("factorial") == {"1.0 ± 0.0", "4.0 ± 0.0†", "6.0 ± 0.0**†"}  # not 5.0


@pytest.mark.parametrize("size", range(1, 14))
def test_interquartile_mean_is_that_of_scipy(size):
    x = np.random.default_rng(size).normal(size=(3, size))
    np.testing.assert_allclose(report.iqm(x), trim_mean(x, 0.25, axis=-1), rtol=1e-12)


def test_probability_of_improvement():
    """The Mann-Whitney statistic per task, averaged; its interval contains it."""
    rng = np.random.default_rng(0)
    ours, theirs = [rng.normal(1, 1, n) for n in (3, 5)], [rng.normal(0, 1, n) for n in (4, 2)]
    ours[0][:2] = theirs[0][1]  # ties
    expected = np.mean([mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in zip(ours, theirs, strict=True)])
    estimate, low, high = report.improvement(ours, theirs)
    assert estimate == pytest.approx(expected, rel=1e-12) and 0 <= low < estimate < high <= 1
    back = report.improvement(theirs, ours)
    np.testing.assert_allclose(back[0], 1 - estimate)
    np.testing.assert_allclose(back[1:], (1 - high, 1 - low), atol=0.03)
    assert report.improvement([np.array([2.0, 3.0])], [np.array([1.0])]) == (1.0, 1.0, 1.0)
    # two seeds each, one of ours above both of theirs and one below: a resample has 0, 1 or 2 of the high one
    _, low, high = report.improvement([np.array([0.0, 3.0])], [np.array([1.0, 2.0])], 100_000)
    assert (low, high) == (0.0, 1.0)


def exact_interval(tasks):
    """All resamples of each task's seeds, combined; a task of two seeds has each of them twice beside one of four."""
    resamples = itertools.product(*(itertools.product(x, repeat=len(x)) for x in tasks))
    most = max(map(len, tasks))
    means = [trim_mean([score for x in r for score in x * (most // len(x))], 0.25) for r in resamples]
    return np.quantile(means, (0.025, 0.975), method="inverted_cdf")


@pytest.mark.parametrize("sizes", [(3,), (5,), (3, 3), (2, 4)])
def test_bootstrap_interval_is_that_of_all_resamples(sizes):
    rng = np.random.default_rng(sum(sizes))
    tasks = [rng.normal(10 * i, 1, size) for i, size in enumerate(sizes)]
    exact = exact_interval(tasks)
    np.testing.assert_allclose(report.interval(tasks, 100_000), exact, atol=0.05)
    if sizes == (3,):  # the extreme resamples have a weight of 1/27 each, above 2.5%
        np.testing.assert_allclose(exact, (tasks[0].min(), tasks[0].max()))


def test_tasks_of_few_seeds_weigh_as_much_as_those_of_many():
    tasks = [np.array([0.0, 1.0, 2.0]), np.full(2, 10.0), np.array([4.0])]
    assert sorted(report.pooled(tasks)) == [0, 0, 1, 1, 2, 2, *6 * [4], *6 * [10]]
    assert len(report.pooled([np.zeros(5), np.ones(5)])) == 10


def test_bootstrap_resamples_within_tasks():
    low, high = report.interval([np.full(3, 1.0), np.full(3, 5.0)])
    assert low == high == 3


def test_the_paper_s_numbers_are_all_in_the_tables():
    with open(ROOT / "results" / "paper.csv", newline="") as f:
        published = list(csv.DictReader(f))
    algorithms = {"MA-CQL": "ma_cql", "OMAR": "omar", "MA-SfBC": "ma_sfbc", "DOM2": "dom2"}
    rows = {
        (name.removeprefix("table"), row.scenario, row.shift, row.dataset): row
        for name in ("table1", "table2", "table3", "table4")
        for row in report.read_rows(TARGETS[name], Path("nowhere"))
    }
    for line in published:
        row = rows[line["table"], line["scenario"], line["shift"], line["dataset"]]
        variant = Variant(algorithms[line["algorithm"]])
        assert report.show_return(row, variant) == f"- / {line['mean_return']} ± {line['std_return']}"
    assert sum(len(row.paper) for row in rows.values()) == len(published) == 216


def test_tables_of_known_results(tmp_path):
    cells = {(a, d): Cell(Variant(a), "simple_tag", d) for a in ("bc", "omar", "dom2") for d in DATASETS}
    save(tmp_path, cells["bc", "random"], {"none": [1.0, 2.0, 6.0]})
    save(tmp_path, cells["dom2", "random"], {"none": [3.0, 3.0, 2.0]})
    save(tmp_path, cells["omar", "medium"], {"none": [-4.1, 185.6]})
    save(tmp_path, cells["bc", "expert"], {"speed": [5.0]})
    for dataset in DATASETS:
        save(tmp_path, Cell(Variant("ma_cql"), "simple_world", dataset), {"none": [-6.8, 79.5, 79.5, 79.5]})
    text = report.write_report("table1", tmp_path)
    assert text == (tmp_path / "report/table1.md").read_text()
    lines = [[word.strip() for word in line.strip("|").split("|")] for line in text.splitlines()]
    head = ["return", "BC", "MA-CQL", "OMAR", "MA-SfBC", "DOM2", "data mean (max)", "best here", "best in the paper"]
    assert lines.count(head) == 1 and lines.count([word for word in head if word != "BC"]) == 2
    assert (
        text.count("Not run on any of these datasets: BC, MA-BC, MA-TD3+BC, MA-Diffusion-QL, MADiff.") == 2
    )  # the others have the paper's numbers
    paper = ["- / 1.0 ± 7.6", "- / 14.3 ± 9.5", "- / 3.5 ± 2.5"]
    random = ["random", "**3.0 ± 2.2**", *paper, "2.7 ± 0.5 / 208.7 ± 57.3", "7.2 (99)", "BC", "DOM2"]
    assert random in lines
    score = [100 * (x + 4.1) / 189.7 for x in (1.0, 2.0, 6.0, 3.0)]
    three = f"{statistics.mean(score[:3]):.1f} [{score[0]:.1f}, {score[2]:.1f}]"
    lowest, mean = 100 * (2 + 4.1) / 189.7, 100 * (8 / 3 + 4.1) / 189.7
    assert ["random", three, "-", "-", "-", f"{mean:.1f} [{lowest:.1f}, {score[3]:.1f}]"] in lines
    assert ["medium", "-", "-", "50.0 [0.0, 100.0]", "-", "-"] in lines
    zeros = binom.ppf(0.975, 24, 0.25)  # of World's 6 x 4 scores, a quarter 0, the others 100; 6 are cut off
    assert ["all", f"100.0 [{100 * (18 - zeros) / 12:.1f}, 100.0]", "-", "-", "-"] in lines
    assert "Cells run: 9 of 162. " in text and "at least two algorithms: BC 1 of 1 rows here; DOM2 18 of 18" in text

    with open(tmp_path / "report/table1.csv", newline="") as f:
        table = {(line["variant"], line["scenario"], line["dataset"]): line for line in csv.DictReader(f)}
    assert len(table) == 9
    line = table["dom2", "simple_tag", "random"]
    assert (line["shift"], line["seeds"], line["mean"], line["std"]) == ("none", "3", "2.67", "0.47")
    assert (line["paper_mean"], line["paper_std"], line["data_max"]) == ("208.7", "57.3", "99.00")
    assert table["bc", "simple_tag", "random"]["paper_mean"] == ""


def test_a_variant_is_shown_with_the_plain_result_only_if_that_has_its_options(tmp_path):
    cell = Cell(Variant("dom2"), "simple_tag", "random")
    save(tmp_path, cell, {"none": [1.0]}, settings={"num_seeds": 1, "zeta": 0.0, "diffusion_steps": 5})

    def find(variant):
        return report.find(cell._replace(variant=variant), tmp_path)

    assert find(Variant("dom2")) and find(varied("dom2", "ablations", "without conservative term", zeta=0))
    assert find(with_steps(5)) and not find(with_steps(1))
    assert not find(report.NOT_AUGMENTED)  # the result says nothing about augmentation
    save(tmp_path, cell._replace(variant=with_steps(1)), {"none": [2.0]})
    assert find(with_steps(1))["returns"] == {"none": [2.0]}


def test_a_report_of_each_kind(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    ways = {"distinct": [2.0, 3.0, 5.0], "entropy": [1.0, 1.0, 1.75]}
    ways |= {"landmarks": rng.normal(size=(6, 2)).tolist(), "paths": rng.normal(size=(10, 26, 3, 2)).tolist()}
    drawn = {name: TARGETS[name] for name in ("table4", "fig2", "fig5", "steps")}  # one for each kind of figure
    for cell in {cell: None for target in drawn.values() for cell in target.cells()}:
        returns = {s: rng.normal(9, 2, 3).tolist() for s in ("none", "speed", "random", "extreme", "dismiss")}
        further = {"assignments": {"none": ways, "dismiss": ways}} if cell.scenario == "landmarks6" else {}
        save(tmp_path, cell, returns, milliseconds_per_action=2.5, **further)
    monkeypatch.setattr(reproduce, "TARGETS", drawn)
    assert reproduce.reproduce(Args("report", results_dir=str(tmp_path)))
    for name, target in drawn.items():
        files = [tmp_path / "report" / f"{name}.{kind}" for kind in ("md", "csv", "png", "pdf")]
        total = len(target.cells()) * len(target.shifts)
        assert f"Cells run: {total} of {total}." in files[0].read_text()
        assert len(files[1].read_text().splitlines()) == total + 1
        assert files[2].read_bytes()[:4] == b"\x89PNG" and files[3].read_bytes()[:5] == b"%PDF-"
    assert "| 3.3 (1.25 bits)" in (tmp_path / "report/fig2.md").read_text()
    again = tmp_path / "again"
    shutil.copytree(tmp_path, again, ignore=shutil.ignore_patterns("report", "again"))
    report.write_report("table4", again)
    for kind in ("md", "csv", "png", "pdf"):
        assert (again / f"report/table4.{kind}").read_bytes() == (tmp_path / f"report/table4.{kind}").read_bytes()


def curves(axes):
    """{label: {x: y}} of the lines with error bars of a panel."""
    lines = {container.get_label(): container.lines[0].get_xydata() for container in axes.containers}
    return {label: {x: y for x, y in points} for label, points in lines.items()}


def test_figure_5_averages_over_the_datasets_in_which_all_its_points_have_been_run(tmp_path):
    part, full = with_fraction("dom2", 0.05), Variant("dom2")
    returns = {"random": 10.0, "medium": 40.0, "expert": 100.0, "medium-replay": 1000.0}
    for dataset, x in returns.items():
        save(tmp_path, Cell(full, "simple_tag", dataset), {"none": [x, x + 2]})
        if dataset != "expert":
            save(tmp_path, Cell(part, "simple_tag", dataset), {"none": [x / 2, x / 2]})
    figure = report.draw_fig5(TARGETS["fig5"], report.read_rows(TARGETS["fig5"], tmp_path))
    tag, world, *_ = figure.axes
    points = curves(tag)["DOM2"]
    assert points.keys() == {report.FRACTIONS.index(0.05), report.FRACTIONS.index(1.0)}
    expected = [common.normalised_score("simple_tag", x) for x in (12.5, 26)]
    np.testing.assert_allclose(list(points.values()), expected)
    assert tag.get_title() == "simple_tag, 2 of 5 datasets" and curves(world) == {}


def test_the_committed_report_is_that_of_the_committed_results():
    for name, target in TARGETS.items():
        rows, path = report.read_rows(target, ROOT / "results"), ROOT / "results" / "report" / name
        message = "results have changed: run `python experiments/reproduce.py report` and commit results/report"
        text = report.TEXT.get(name, report.markdown)(target, rows)
        assert text == path.with_suffix(".md").read_text(encoding="utf-8"), message
        assert report.csv_table(rows) == path.with_suffix(".csv").read_text(), message
        assert path.with_suffix(".png").exists() == path.with_suffix(".pdf").exists() == any(row.here for row in rows)


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scenarios=("HalfCheetah",)), "--scenarios HalfCheetah: not in table1; choose one of simple_spread"),
        (dict(datasets=("best",)), "--datasets best: not in table1"),
        (dict(algorithms=("sac",)), "--algorithms sac: not in table1"),
        (dict(seed=-1), "--seed -1: must be at least 0"),
        (dict(num_seeds=0), "--num-seeds 0: must be at least 1"),
        (dict(jobs=-1), "--jobs -1: must be at least 0"),
        (dict(updates=0), "--updates 0: must be at least 1"),
    ],
)
def test_bad_options(changes, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        reproduce.reproduce(replace(tiny[0], **changes), tiny[1])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("content", ["", "{", 100_000 * "[", "[]", "{}", '"text"', '{"returns": {}}'])
def test_damaged_results(content, tiny):
    job = the_job(*tiny)
    report.write(job.result, content)
    with pytest.raises(UserError, match=f"{job.result}: no readable result"):
        reproduce.reproduce(*tiny)
    assert job.result.read_text() == content


def test_a_script_that_cannot_be_imported(tiny, monkeypatch):
    monkeypatch.setitem(report.ALGORITHMS, "dom2", report.Entry("DOM2", "no_such_script.py", {}))
    with pytest.raises(UserError, match=r"no_such_script.py: No module named 'no_such_script'; .*--algorithms"):
        reproduce.reproduce(*tiny)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table1 --algorithms dom2 -- --eta -1", "--eta -1.0: must be finite and not negative"),
        ("table1 --jobs -1", "--jobs -1: must be at least 0"),
        ("table1 --results-dir=~/results", "--results-dir ~/results: must be a name"),
        *((f"table1 -- {word} 1", f"-- {word.replace('_', '-')}: this program sets it") for word in OWN_OPTIONS),
        ("table1 -- --run_dir=elsewhere", "-- --run-dir: this program sets it"),
        ("table9", "table9"),
        ("table1 --launcher cloud", "cloud"),
    ],
)
def test_bad_options_end_the_program(line, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *line.split()])
    with pytest.raises(SystemExit) as end:
        program(reproduce.main)
    assert end.value.code == 2 and message in capsys.readouterr().err
