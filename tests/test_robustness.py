"""Whatever happens to the process, the disk or the data: nothing is lost, and no number comes from damaged input."""

import ast
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_scripts import files, flags, logged

import common
import dom2_mamujoco
import dom2_mpe
from baselines.ma_bc import MA_BC
from baselines.ma_cql import MA_CQL
from baselines.ma_diffusion_ql import MA_DIFFUSION_QL
from baselines.ma_sfbc import MA_SFBC
from baselines.ma_td3bc import MA_TD3BC
from baselines.madiff import MADIFF
from baselines.omar import OMAR
from dom2_mpe import DOM2, train
from particle_env import SCENARIOS, TeamEnv
from run import parse
from utils import program as programs
from utils.checkpoints import load_checkpoint
from utils.frozen import load_behaviour, load_prey
from utils.program import UserError, load_torch

ROOT = Path(common.__file__).parent
ARRAYS = ("obs", "acs", "rews", "next_obs", "dones")
DIFFUSION = dict(scenario="simple_spread", widths=(8, 8), critic_widths=(8,), diffusion_steps=2)
PLAIN = dict(scenario="simple_spread", widths=(8, 8))
# Scripts that train: their algorithm, and options that make them tiny
SCRIPTS = {
    "dom2_mpe": (DOM2, DIFFUSION),
    "dom2_mamujoco": (dom2_mamujoco.DOM2, DIFFUSION | dict(scenario="Reacher")),
    "baselines/ma_bc": (MA_BC, PLAIN),
    "baselines/ma_td3bc": (MA_TD3BC, PLAIN),
    "baselines/ma_cql": (MA_CQL, PLAIN),
    "baselines/omar": (OMAR, PLAIN),
    "baselines/ma_diffusion_ql": (MA_DIFFUSION_QL, DIFFUSION),
    "baselines/ma_sfbc": (MA_SFBC, DIFFUSION | dict(window=4, plan_candidates=2, eval_candidates=2)),
    "baselines/madiff": (MADIFF, dict(scenario="simple_spread", horizon=2, width=4, num_blocks=1, diffusion_steps=1)),
}
every_script = pytest.mark.parametrize("script", SCRIPTS)
# The baselines bring their networks and losses; runs, checkpoints and logs are those of one of these two.
TRAINING = ("dom2_mpe", pytest.param("dom2_mamujoco", marks=pytest.mark.slow))
both_trainings = pytest.mark.parametrize("script", TRAINING)
SMALL = dict(dataset="random", updates=6, batch_size=8, eval_interval=2, eval_episodes=2, cuda=False)


def tiny(script, **options):
    """Words of a tiny run."""
    return flags(**SCRIPTS[script][1] | SMALL | options)


# ---- programs to kill: forked from one process that has imported everything, as starting Python takes seconds ----

NURSERY = """
import json, os, resource, runpy, signal, sys, traceback
from functools import partial

import torch, torch.utils.tensorboard, tyro
import collect_datasets, dom2_mpe

torch.set_num_threads(1)
parameter = torch.nn.Parameter(torch.zeros(1))
parameter.sum().backward()
torch.optim.Adam([parameter]).step()  # imports much the first time

def program(script, words, folder, output, largest_file, deadly, pretrained):
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY), descriptor)
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    collect_datasets.collect = partial(collect_datasets.collect, num_transitions=500, pretrained_dir=pretrained)
    sys.argv, code = [script, *words], 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        _, status, used = os.wait4(request, 0)
        answer = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]
    else:
        answer = os.fork() or program(*request)
    print(json.dumps(answer), flush=True)
os._exit(0)
"""


class Program:
    """A script in its own process: `wait` gives its exit code and what it printed, `seconds` then its CPU time."""

    def __init__(self, ask, script, words, folder, largest_file, deadly, pretrained):
        folder.mkdir(exist_ok=True)
        pipe = folder / "output"
        os.mkfifo(pipe)
        self.ask, self.output = ask, os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.pid = ask(
            [str(ROOT / f"{script}.py"), words, str(folder), "output", largest_file, deadly, str(pretrained)]
        )
        self.pipe, self.printed = pipe, b""

    def kill(self, seconds):
        """Kill it when it has computed for that long, if it still runs then; it is there until it is waited for."""
        while self.running():
            if int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) > 1e9 * seconds:
                return os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.001)

    def running(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"

    def resident(self):
        """Yields its resident pages as long as it runs."""
        while self.running():
            self.read()  # a full pipe would stop it
            if pages := int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]):
                yield pages

    def read(self):
        with suppress(BlockingIOError):  # nothing new
            while chunk := os.read(self.output, 1 << 16):
                self.printed += chunk

    def wait(self):
        code, self.seconds = self.ask(self.pid)
        self.read()
        os.close(self.output)
        self.pipe.unlink()
        return code, self.printed.decode()


@pytest.fixture(scope="module")
def start(pretrained):
    """start(script, words, folder): begin a Program in that folder.

    Its files cannot grow beyond `largest_file` bytes: the write fails, or, if that is `deadly`, the process dies in it.
    """
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("needs Linux's /proc to watch processes")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:

        def ask(request):
            print(json.dumps(request), file=nursery.stdin, flush=True)
            return json.loads(nursery.stdout.readline())

        def start(script, words, folder, largest_file=None, deadly=False):
            return Program(ask, script, words, folder, largest_file, deadly, pretrained)

        yield start
        nursery.stdin.close()


def finish(program):
    code, printed = program.wait()
    assert code == 0, printed
    return printed


def the_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def assert_same(a, b):
    """Equal tensors, numbers and names in dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(run, other):
    """The same parameters, optimisers, generators, results and logs, bit for bit."""
    a, b = (load_torch(x / "checkpoint.pt") for x in (run, other))
    assert_same({k: v for k, v in a.items() if k != "args"}, {k: v for k, v in b.items() if k != "args"})
    a, b = (json.loads((x / "results.json").read_text()) for x in (run, other))
    for name in ("returns", "data", "updates", "dataset"):
        assert a[name] == b[name]
    assert logged(run) == logged(other)


@pytest.mark.slow
@every_script
def test_runs_killed_at_any_moment_go_on_bit_for_bit(script, start, tmp_path, data_dir):
    words = tiny(script, data_dir=str(data_dir))
    whole = start(script, words, tmp_path / "whole")
    finish(whole)
    moments, kills, chains = random.Random(0), 0, 0
    while kills < 20:
        folder, chains = tmp_path / str(chains), chains + 1
        command, code = words, None
        while code not in (0, 2):
            program = start(script, command, folder)
            if kills < 20:
                program.kill(moments.uniform(0, whole.seconds))
            code, printed = program.wait()
            # 2: it was killed between its results and its end, and so had nothing left to do
            assert code in (0, -signal.SIGKILL) or (code == 2 and "is finished; a larger --updates" in printed), printed
            kills += code == -signal.SIGKILL
            checkpoints = sorted(folder.glob("runs/*/*.pt"))
            for checkpoint in checkpoints:  # none is half
                load_torch(checkpoint)
            for text in folder.glob("runs/*/*.json"):
                json.loads(text.read_text())
            if checkpoints:
                command = flags(resume=str(checkpoints[0].parent), data_dir=str(data_dir))
            else:  # killed before it began to train: it is started again
                assert not list(folder.glob("runs/*/events.*"))
                shutil.rmtree(folder / "runs", ignore_errors=True)
        assert_same_run(the_run(folder), the_run(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_collections_killed_at_any_moment_leave_whole_datasets(overwrite, start, tmp_path, pretrained):
    words = flags(scenario="simple_tag", dataset=("random", "medium-expert"), num_transitions=10_000, data_dir="data")
    words += flags(pretrained_dir=str(pretrained))
    undisturbed = start("collect_datasets", words, tmp_path / "whole")
    finish(undisturbed)
    whole = files(tmp_path / "whole" / "data")
    if overwrite:
        finish(start("collect_datasets", [*words, "--action-noise", "0.5"], tmp_path / "killed"))
        words += ["--overwrite"]
    possible = [whole, files(tmp_path / "killed" / "data")] if overwrite else [whole]
    moments, kills, code = random.Random(0), 0, None
    while kills < 10 or code != 0:
        if code == 0 and not overwrite:  # all made: once more from nothing
            shutil.rmtree(tmp_path / "killed")
        program = start("collect_datasets", words, tmp_path / "killed")
        if kills < 10:
            program.kill(moments.uniform(0, undisturbed.seconds))
        code, printed = program.wait()
        assert code in (0, -signal.SIGKILL), printed
        kills += code != 0
        for folder in (tmp_path / "killed" / "data").glob("simple_tag/[!.]*"):  # what has a dataset's name is one
            if not files(folder):
                continue  # killed between two renames: an empty folder is no dataset, and training makes it
            names = [name for name in whole if folder.name in name.parts]
            made = {Path("simple_tag") / folder.name / name: contents for name, contents in files(folder).items()}
            assert made in [{name: contents[name] for name in names} for contents in possible]
    made = files(tmp_path / "killed" / "data")
    assert {name: contents for name, contents in made.items() if not name.parts[1].startswith(".")} == whole


@pytest.mark.slow
@both_trainings
def test_two_runs_at_once_that_want_the_same_missing_dataset(script, start, tmp_path):
    words = tiny(script)
    finish(start(script, words, tmp_path / "alone"))
    for i in range(3):
        together = tmp_path / str(i)
        (together / "data").mkdir(parents=True)
        started = []
        for name in ("a", "b"):  # two folders, as each keeps its output in its own
            (together / name).mkdir(parents=True)
            (together / name / "datasets").symlink_to(together / "data")
            started.append(start(script, [*words, "--run-dir", str(together / "runs")], together / name))
        for program in started:
            finish(program)
        assert files(together / "data") == files(tmp_path / "alone" / "datasets")
        runs = list((together / "runs").iterdir())
        assert len(runs) == 2
        for run in runs:
            assert_same_run(run, the_run(tmp_path / "alone"))


@both_trainings
def test_a_run_is_not_continued_while_it_still_runs(script, start, tmp_path, data_dir):
    words = tiny(script, updates=60, eval_interval=50, data_dir=str(data_dir))
    finish(start(script, words, tmp_path / "whole"))
    program = start(script, words, tmp_path / "run")
    while program.running() and not list(tmp_path.glob("run/runs/*/checkpoint.pt")):
        time.sleep(0.001)
    os.kill(program.pid, signal.SIGSTOP)
    run = the_run(tmp_path / "run")
    before = None
    while before != (before := files(run)):  # it may still be in the middle of writing one
        time.sleep(0.1)
    resume = flags(resume=str(run), data_dir=str(data_dir))
    code, printed = start(script, resume, tmp_path / "second").wait()
    assert code == 2 and printed.splitlines()[-1].startswith(f"error: {run}: another process"), printed
    assert files(run) == before
    os.kill(program.pid, signal.SIGCONT)
    finish(program)
    assert_same_run(run, the_run(tmp_path / "whole"))


@pytest.mark.slow
@both_trainings
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, script, start, tmp_path, data_dir):
    words = tiny(script, updates=150, eval_interval=100, data_dir=str(data_dir))
    finish(start(script, words, tmp_path / "whole"))
    program = start(script, words, tmp_path / "run")
    while program.running() and not list(
        tmp_path.glob("run/runs/*/checkpoint-previous.pt")
    ):  # from the first evaluation on
        time.sleep(0.001)
    os.kill(program.pid, number)
    code, printed = program.wait()
    run = the_run(tmp_path / "run")
    update = load_torch(run / "checkpoint.pt")["updates"]
    assert 100 <= update < 150 and code == 128 + number
    last = printed.splitlines()[-1]
    assert last.startswith(f"stopped after update {update}; go on with: python ")
    *_, path, option, folder = last.split()
    assert path.endswith(f"{script}.py") and (option, folder) == ("--resume", f"runs/{run.name}")
    finish(start(script, [option, folder], tmp_path / "run"))
    whole = the_run(tmp_path / "whole")  # whose log lacks the update at which the run was stopped
    assert_same(*(load_torch(x / "checkpoint.pt")["learners"] for x in (run, whole)))
    assert_same(*(json.loads((x / "results.json").read_text())["returns"] for x in (run, whole)))


# ---- full disks: files cannot grow beyond a limit ----


def assert_full(program, *naming):
    code, printed = program.wait()
    *_, last = printed.splitlines()
    assert code == 2 and last.startswith("error: ") and "Traceback" not in printed, printed
    for name in naming:
        assert name in last
    assert printed.count("error: ") == 1


@pytest.fixture(scope="module", params=TRAINING)
def trained(request, start, tmp_path_factory, data_dir):
    """Name of a script, its options, a run folder of it, and that of its first two updates, to read only."""
    folder = tmp_path_factory.mktemp("trained")
    words = tiny(request.param, data_dir=str(data_dir))
    finish(start(request.param, words, folder / "whole"))
    finish(start(request.param, [*words, "--updates", "2"], folder / "begun"))
    return request.param, words, the_run(folder / "whole"), the_run(folder / "begun")


@pytest.mark.parametrize("largest_file", [200, 10_000])  # TensorBoard's log does not fit, a checkpoint does not fit
def test_full_disk_in_training(trained, largest_file, start, tmp_path):
    script, words, whole, begun = trained
    run = shutil.copytree(begun, tmp_path / "my run")
    assert (run / "checkpoint.pt").stat().st_size > 10_000
    before = files(run)
    resume = flags(resume=str(run), updates=6)
    assert_full(start(script, resume, tmp_path / "full", largest_file), str(run), "File too large", "--resume")
    after = files(run)
    assert {name for name in after.keys() - before.keys() if not name.name.startswith("events.")} == set()
    assert all(after[name] == contents for name, contents in before.items())
    finish(start(script, resume, tmp_path / "again"))  # with space again
    assert_same_run(run, whole)

    assert_full(start(script, words, tmp_path / "new", largest_file), "File too large")


def test_killed_in_the_middle_of_a_checkpoint(trained, start, tmp_path):
    script, _, whole, begun = trained
    run = shutil.copytree(begun, tmp_path / "run")
    resume = flags(resume=str(run), updates=6)
    for size in (5_000, 20_000, 40_000):
        before = (run / "checkpoint.pt").read_bytes()
        code, printed = start(script, resume, tmp_path / "killed", size, deadly=True).wait()
        assert code == -signal.SIGXFSZ, printed
        assert [file.stat().st_size for file in run.glob("checkpoint*") if file.stat().st_size == size]  # half of one
        assert (run / "checkpoint.pt").read_bytes() == before
    finish(start(script, resume, tmp_path / "again"))
    assert_same_run(run, whole)


def test_full_disk_in_collecting(start, tmp_path, pretrained):
    words = flags(scenario="simple_tag", dataset="random", data_dir="data", num_transitions=500)
    words += flags(pretrained_dir=str(pretrained))
    assert_full(start("collect_datasets", words, tmp_path / "full", 10_000), "simple_tag/random", "--data-dir")
    assert not files(tmp_path / "full")
    code, printed = start("collect_datasets", words, tmp_path / "full", 10_000, deadly=True).wait()
    assert code == -signal.SIGXFSZ, printed
    assert files(tmp_path / "full")
    assert not (tmp_path / "full" / "data" / "simple_tag" / "random").exists()
    finish(start("collect_datasets", words, tmp_path / "full"))


# ---- damaged data ----


def load(data_dir, scenario="simple_tag"):
    return common.load_dataset(common.dataset_path(data_dir, scenario, "medium"), TeamEnv(scenario, 1))


def refused(file, reader, *arguments):
    """Reading ends in one line that names the file."""
    with pytest.raises(UserError) as error:
        reader(*arguments)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def flipped(contents, position, bit):
    contents = bytearray(contents)
    contents[position] ^= 1 << bit
    return bytes(contents)


@pytest.mark.parametrize("described", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("agent", [1, *(pytest.param(agent, marks=pytest.mark.slow) for agent in (0, 2))])
@pytest.mark.filterwarnings("ignore")  # numpy's, of damaged headers
def test_damage_to_any_array_is_noticed(agent, name, described, tmp_path, data_dir):
    for scenario in ("simple_tag", "simple_world"):
        shutil.copytree(data_dir / scenario / "medium", tmp_path / scenario / "medium")
    folder = common.dataset_path(tmp_path, "simple_tag", "medium")
    if not described:
        (folder / "metadata.json").unlink()
    file = folder / f"{name}_{agent}.npy"
    whole, places = file.read_bytes(), random.Random(agent)
    load(tmp_path)
    for _ in range(10):
        file.write_bytes(whole[: places.randrange(len(whole))])
        refused(file, load, tmp_path)
    for value in (np.nan, np.inf, -np.inf):
        file.write_bytes(whole)
        array = np.load(file)
        array.flat[places.randrange(array.size)] = value
        np.save(file, array)
        refused(file, load, tmp_path)
    if described:
        for _ in range(10):
            file.write_bytes(flipped(whole, places.randrange(len(whole)), places.randrange(8)))
            refused(file, load, tmp_path)
        if name != "dones":  # they are all zero
            other = folder / f"{name}_{(agent + 1) % 3}.npy"
            for swapped in (other, common.dataset_path(tmp_path, "simple_world", "medium") / file.name):
                file.write_bytes(swapped.read_bytes())
                differs = file.read_bytes() != whole  # the agents of simple_tag share one reward
                if differs:
                    refused(file, load, tmp_path)
                assert differs or name == "rews"
    file.write_bytes(whole)
    load(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.npy", "/etc/hostname", "../../../simple_world/medium/seed_0_data/obs_0.npy"]
)
def test_names_in_metadata_lead_nowhere(name, tmp_path, data_dir):
    """Whatever metadata.json says, the files read are the layout's own, and none of its names is a path."""
    shutil.copytree(data_dir / "simple_tag" / "medium", tmp_path / "simple_tag" / "medium")
    file = common.dataset_path(tmp_path, "simple_tag", "medium") / "metadata.json"
    metadata, expected = json.loads(file.read_text()), load(tmp_path).obs
    file.write_text(json.dumps(metadata | {"checksums": metadata["checksums"] | {name: "0"}, "path": name}))
    assert torch.equal(load(tmp_path).obs, expected)
    for key in ("scenario", "dataset"):
        file.write_text(json.dumps(metadata | {key: name}))
        refused("metadata.json", load, tmp_path)


def test_a_dataset_that_was_moved_is_not_called_damaged(tmp_path, data_dir, monkeypatch):
    folder = common.dataset_path(tmp_path / "mine", "simple_tag", "medium")
    shutil.copytree(common.dataset_path(data_dir, "simple_tag", "medium"), folder)
    monkeypatch.chdir(folder.parent)
    env = common.make_env("simple_tag")
    expected = common.load_dataset(folder, env).obs
    assert torch.equal(common.load_dataset(Path("seed_0_data"), env).obs, expected)
    moved = folder.parent.rename(tmp_path / "mine/simple_tag/expert") / "seed_0_data"
    told = f"{moved}: its metadata.json says simple_tag/medium; move it to folders of these names"
    refused(told, common.load_dataset, moved, env)


# ---- damaged and malicious checkpoints ----


def test_flipped_bits_in_a_checkpoint_are_noticed(trained, tmp_path):
    """torch.load itself reads flipped weights without a word."""
    whole, file, places = (trained[2] / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt", random.Random(0)
    expected, noticed = load_torch(trained[2] / "checkpoint.pt"), 0
    for _ in range(100):
        file.write_bytes(flipped(whole, places.randrange(len(whole)), places.randrange(8)))
        try:
            contents = load_torch(file)
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            noticed += 1
        else:  # padding, or a date that nobody reads
            assert_same(contents, expected)
    assert noticed > 50
    for _ in range(10):
        file.write_bytes(whole[: places.randrange(len(whole))])
        refused(file, load_torch, file)


def test_a_damaged_checkpoint_is_never_evaluated(trained, start, tmp_path):
    """The one before stands in with a warning; without it the run is refused. Neither file is touched by reading."""
    script, _, run, _ = trained
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    files = checkpoint, tmp_path / "run" / "checkpoint-previous.pt"

    def damage(file):
        whole, middle = file.read_bytes(), file.stat().st_size // 2
        file.write_bytes(whole[:middle] + whole[middle:][:200][::-1] + whole[middle + 200 :])  # more than padding

    damage(checkpoint)
    before = [file.read_bytes() for file in files]
    words = flags(eval_only=str(tmp_path / "run"), cuda=False)
    printed = finish(start(script, words, tmp_path / "first"))
    assert printed.startswith(f"warning: {checkpoint}: ") and "the one before" in printed
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["updates"] == 4
    assert [file.read_bytes() for file in files] == before
    damage(files[1])
    code, printed = start(script, words, tmp_path / "second").wait()
    assert code == 2 and printed.startswith(f"error: {files[1]}: ") and printed.count("\n") == 1


class Executed:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_checkpoint(folder, DOM2),
        lambda folder: dom2_mpe.load_policy(folder),
        lambda folder: train(parse(DOM2, "", ["--resume", str(folder)])),
        lambda folder: train(DOM2.args(eval_only=str(folder))),
        lambda folder: train(DOM2.args(prey=str(folder / "checkpoint.pt"))),
        lambda folder: load_behaviour(folder / "checkpoint.pt", TeamEnv("simple_tag", 1), 14),
        lambda folder: load_prey(folder / "checkpoint.pt", 14),
    ],
    ids=["load_checkpoint", "load_policy", "resume", "eval_only", "prey", "load_behaviour", "load_prey"],
)
def test_no_loader_runs_code_from_a_checkpoint(read, tmp_path):
    bad = Executed(tmp_path / "executed")
    file = tmp_path / "checkpoint.pt"
    for contents in (bad, {"agent_params": [bad], "learners": bad}, {"args": {"scenario": bad}}):
        for zipped in (True, False):
            torch.save(contents, file, _use_new_zipfile_serialization=zipped)
            refused(file, read, tmp_path)
        file.write_bytes(pickle.dumps(contents))
        refused(file, read, tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "executed").exists()  # it would have been noticed


def test_no_source_file_loads_pickles():
    """Every torch.load and np.load says so itself, and nothing else unpickles."""
    loads = 0
    for file in [*ROOT.glob("*.py"), *(file for folder in ROOT.glob("[a-z]*/") for file in folder.glob("*.py"))]:
        if file.parent.name == "tests":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {name.name for name in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "shelve", "cloudpickle"}, file
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}[ast.unparse(node.func)]
                assert safe in map(ast.unparse, node.keywords), file
                loads += 1
    assert loads >= 2


# ---- options: valid ones train, invalid ones end in a message that names them ----

CHOICES = {
    "scenario": tuple(SCENARIOS),
    "dataset": ("random", "medium", "expert", "random-medium"),
    "shift": ("none",),
    "prediction": ("action", "noise"),
    "noise_net": ("mlp", "residual"),
}
ROBOTS = {"scenario": ("Reacher",), "dataset": ("random",), "shift": ("random", "extreme", "none")}
SWITCHES = ("augment", "raw_rewards", "bf16", "batch_norm")
small_widths = st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple)
VALID = {
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    **{name: st.integers(1, 3) for name in ("num_seeds", "eval_interval", "eval_episodes", "eval_candidates")},
    **{name: st.integers(1, 12) for name in ("batch_size", "diffusion_steps")},
    **{name: st.integers(1, 4) for name in ("window", "plan_windows", "plan_candidates", "num_blocks", "policy_delay")},
    **{name: st.integers(1, 4) for name in ("copies", "cql_actions", "cql_policy_actions", "omar_iterations")},
    **{name: st.integers(2, 6) for name in ("horizon", "omar_samples")},
    **{name: st.floats(0, 10) for name in ("eta", "zeta", "bc_weight", "max_grad_norm", "reward_scale")},
    **{name: st.floats(0, 10) for name in ("alpha", "cql_alpha", "action_penalty", "target_noise", "guidance")},
    **{name: st.floats(0, 1) for name in ("omar_coe", "return_dropout", "target_return")},
    **{name: st.floats(1e-6, 1e-2) for name in ("lr", "actor_lr", "critic_lr")},
    **{name: st.floats(1e-6, 1) for name in ("data_fraction", "rho", "cql_noise")},
    **{name: small_widths for name in ("widths", "critic_widths", "inverse_widths")},
    "beta_max": st.floats(1e-3, 20),
    "width": st.integers(4, 12),
    "gamma": st.floats(0, 0.999),
    "seed": st.integers(0, 2**31 - 1),
    "quantiles": st.lists(st.floats(0, 1), min_size=1, max_size=3).map(tuple),
    "thresholds": st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3).map(tuple),
}
INVALID = {
    **{name: ("nonsense", "", "../simple_tag") for name in CHOICES},
    **{name: ("yes", "1") for name in (*SWITCHES, "cuda", "compile", "capture_video")},
    **{name: ("0", "-1", "1.5", "x", None) for name in ("num_seeds", "updates", "batch_size", "diffusion_steps")},
    **{name: ("0", "-1", "1.5", "x", None) for name in ("eval_interval", "eval_episodes", "eval_candidates")},
    **{name: ("-0.1", "nan", "inf", "x", None) for name in ("eta", "zeta", "bc_weight", "max_grad_norm")},
    **{name: ("-0.1", "nan", "inf", "x", None) for name in ("reward_scale", "beta_max")},
    **{name: ("0", "1.01", "nan", "x", None) for name in ("data_fraction", "rho", "lr", "actor_lr", "critic_lr")},
    **{name: ("0", "-1", "1.5", "x", None) for name in ("window", "plan_candidates", "num_blocks", "policy_delay")},
    **{name: ("0", "-1", "1.5", "x", None) for name in ("copies", "cql_actions", "omar_iterations", "omar_samples")},
    **{name: ("1", "-1", "1.5", "x", None) for name in ("horizon", "width", "omar_elites")},
    **{name: ("-0.1", "nan", "inf", "x", None) for name in ("alpha", "cql_alpha", "action_penalty", "target_noise")},
    **{name: ("-0.1", "1.1", "nan", "x", None) for name in ("omar_coe", "return_dropout", "target_return")},
    **{name: ("0", "-8", "1.5", "x", None) for name in ("widths", "critic_widths", "inverse_widths")},
    "gamma": ("1", "-0.1", "nan", "x", None),
    "agent_obsk": ("-1", "x", None),
    "seed": ("-1", str(2**31), "1e99", "x", None),
    "quantiles": ("1.1", "-0.1", "nan", "x"),
    "thresholds": ("nan", "x"),
    "resume": ("nowhere",),
    "eval_only": ("nowhere",),
    "nonsense": ("1", None),
}


def contradictory(given, defaults):
    """Options that are valid alone but not together."""
    named, given = set(given), defaults | given
    if "horizon" in given and given["batch_size"] < 2:
        return True
    if not given["augment"] and (given["thresholds"] or {"quantiles", "copies"} & named):
        return True
    if given["thresholds"] and "quantiles" in named:
        return True
    return given.get("eta") == 0 and given.get("bc_weight") == 0


@pytest.fixture
def command(monkeypatch, capfd, tmp_path, data_dir, pretrained):
    """command(algorithm, words): exit code and errors of a script that runs in this process."""

    def command(algorithm, words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "1000")  # of tyro's boxes
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        capfd.readouterr()
        code = 0
        try:
            programs.program(lambda: train(parse(algorithm, "a description"), algorithm))
        except SystemExit as stop:
            code = stop.code
        return code, capfd.readouterr().err

    return command


def drawn(strategies, script):
    algorithm, _ = SCRIPTS[script]
    defaults = {field.name: field.default for field in fields(algorithm.Args)}
    if script == "dom2_mamujoco":
        strategies = strategies | {name: st.sampled_from(choices) for name, choices in ROBOTS.items()}
    optional = {name: strategies[name] for name in strategies if name in defaults}
    optional |= {name: st.booleans() for name in SWITCHES if name in defaults}
    return st.fixed_dictionaries({}, optional=optional)


a_few = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failure is small as it is, and every further try trains
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow
@every_script
def test_valid_options_train_and_evaluate(script, command, tmp_path, data_dir, pretrained):
    algorithm, small = SCRIPTS[script]
    defaults = {field.name: field.default for field in fields(algorithm.Args)}

    @settings(a_few, max_examples=25)
    @given(drawn(VALID, script))
    def check(options):
        given = small | SMALL | dict(updates=2) | options
        given |= dict(data_dir=str(data_dir), run_dir=str(tmp_path))
        if "prey" in defaults and given["scenario"] in ("simple_tag", "simple_world"):
            given["prey"] = str(pretrained / f"{given['scenario']}.pt")
        code, errors = command(algorithm, flags(**given))
        if contradictory(given, defaults):
            assert code == 2 and "--" in errors and "Traceback" not in errors, errors
        else:
            assert code == 0, (given, errors)
            run = max(tmp_path.iterdir(), key=lambda run: run.stat().st_ctime_ns)
            results = json.loads((run / "results.json").read_text())
            assert results["updates"] == 2 and results["scenario"] == given["scenario"]
            assert all(np.isfinite(returns).all() for returns in results["returns"].values())

    check()


@pytest.mark.slow
@every_script
def test_an_invalid_option_ends_in_a_message_that_names_it(script, command, tmp_path, data_dir):
    algorithm, small = SCRIPTS[script]
    defaults = {field.name: field.default for field in fields(algorithm.Args)}
    wrong = [(name, word) for name, words in INVALID.items() if name in {*defaults, "nonsense"} for word in words]

    def check(options, error):
        name, word = error
        given_options = small | SMALL | dict(data_dir=str(data_dir)) | options
        if contradictory(given_options, defaults):  # which would be the one to be named
            return
        words = flags(**{other: value for other, value in given_options.items() if other != name})
        words += [f"--{name.replace('_', '-')}", *([] if word is None else [word])]
        code, errors = command(algorithm, words)
        assert code == 2 and "Traceback" not in errors, (words, errors)
        assert name.replace("_", "-") in errors or word in errors, (words, errors)
        assert not list(tmp_path.iterdir())

    for error in wrong:
        check({}, error)
    settings(a_few, max_examples=50)(given(drawn(VALID, script), st.sampled_from(wrong))(check))()


# ---- memory ----


@pytest.mark.slow
@both_trainings
def test_memory_stays_flat(script, start, tmp_path, data_dir):
    """Two hours of the default run on a CPU are about 115,000 updates: SOAK_UPDATES=115000 python -m pytest -k flat."""
    updates = int(os.environ.get("SOAK_UPDATES", 2_000))
    options = dict(updates=updates, eval_interval=max(20, updates // 200), eval_episodes=20)
    program = start(script, tiny(script, **options, data_dir=str(data_dir)), tmp_path)
    resident = []
    for pages in program.resident():
        resident.append(pages)
        time.sleep(0.02)
    finish(program)
    warm = 10 if "SOAK_UPDATES" in os.environ else 2  # a short run has warmed up only by its middle
    early, late = resident[len(resident) // warm], resident[-len(resident) // 10 :]
    assert len(late) > 5 and max(late) < 1.03 * early
