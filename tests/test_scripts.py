"""The scripts from end to end on tiny data: what they write, print, continue and refuse."""

import errno
import importlib.machinery
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import collect_datasets
import common
import dom2_mamujoco
import dom2_mpe
from baselines.ma_cql import MA_CQL
from baselines.omar import OMAR
from dom2_mpe import DOM2, train
from particle_env import EPISODE_STEPS, SCENARIOS, parallel_env
from run import WITH_EVAL_ONLY, WITH_RESUME, parse
from utils.checkpoints import load_checkpoint, locked, new_run_dir, restore
from utils.evaluation import closing_table
from utils.frozen import load_prey, policy_action
from utils.program import UserError, catch_signals, program
from utils.provenance import script_command

ROOT = Path(common.__file__).parent
NAN, INF = float("nan"), float("inf")
SMALL = dict(num_seeds=2, updates=6, batch_size=8, widths=(8, 8), critic_widths=(8,), eval_interval=2, eval_episodes=4)


def flags(**options):
    """Options as on a command line."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def resumed(run, option="resume", algorithm=DOM2, **changes):
    """Options that continue (or evaluate) a run."""
    return replace(load_checkpoint(run, algorithm)[0], **{option: str(run)}, **changes)


def stored(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def logged(run):
    """{tag: {step: value}} in all TensorBoard files of a run, of which the last may end in the middle of a record."""
    scalars = {}
    for file in sorted(run.glob("events.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return scalars


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def the_run(folder):
    (run,) = Path(folder).iterdir()
    return run


@pytest.fixture(scope="module")
def prey(pretrained):
    return str(pretrained / "simple_tag.pt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir, prey):
    """A run of the script in its own process: run folder, what it printed, its options. It imports no MuJoCo."""
    folder, path = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("path")
    (path / "mujoco.py").write_text("open('mujoco was imported', 'w')")
    places = dict(data_dir=str(data_dir), prey=prey, run_dir=str(folder / "runs"), cuda=False, capture_video=True)
    options = dict(scenario="simple_tag", dataset="random", seed=3, **SMALL, **places)
    command = [sys.executable, str(ROOT / "dom2_mpe.py"), *flags(**options)]
    env = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder) == ["runs"]
    return the_run(folder / "runs"), done, options


@pytest.fixture
def small(tmp_path, data_dir):
    """Options of a tiny run without prey, its run folder in tmp_path."""
    places = dict(data_dir=str(data_dir), run_dir=str(tmp_path / "runs"), cuda=False)
    return dict(scenario="simple_spread", dataset="random", **SMALL, **places)


@pytest.fixture
def script(monkeypatch, capfd, tmp_path):
    """script(algorithm or collect_datasets, *words): exit code, output and errors of a program started in tmp_path."""

    def script(what, *words):
        name = "collect_datasets.py" if what is collect_datasets else f"{what.name}_mpe.py"
        monkeypatch.setattr(sys, "argv", [name, *words])
        monkeypatch.setenv("COLUMNS", "1000")  # of tyro's boxes
        monkeypatch.chdir(tmp_path)
        code = 0
        capfd.readouterr()
        try:
            program(what.main if what is collect_datasets else lambda: train(parse(what, "a description"), what))
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return script


# ---- a whole run ----


def test_run_folder_holds_config_and_results(finished, data_dir):
    run, _, options = finished
    config, results = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "results"))
    for name, value in options.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value)
    assert config.keys() == {field.name for field in fields(DOM2.Args)}
    assert config["eta"] == DOM2.settings["simple_tag", "random"]["eta"]  # the dataset's own

    expected = dict(algorithm="dom2", scenario="simple_tag", dataset="random", num_seeds=2, updates=6, eval_episodes=4)
    assert {name: results[name] for name in expected} == expected
    assert results["settings"] == config
    assert list(results["returns"]) == ["none", "speed"]
    for returns in results["returns"].values():
        assert len(returns) == 2 and np.isfinite(returns).all() and returns[0] != returns[1]
    folder = data_dir / "simple_tag" / "random" / "seed_0_data"
    rewards = np.mean([np.load(folder / f"rews_{i}.npy") for i in range(3)], 0, np.float64)
    returns = rewards.reshape(-1, EPISODE_STEPS).sum(1)
    assert results["data"]["std"] == pytest.approx(returns.std(), rel=0.03)
    statistics = {"mean": returns.mean(), "max": returns.max(), "transitions": 500}
    assert {name: results["data"][name] for name in statistics} == pytest.approx(statistics, rel=1e-4)
    assert "torch" in results["hardware"] and 0 < results["seconds"] < 100
    words = shlex.split(results["command"])
    assert words[0] == "python" and words[2:] == flags(**options)
    assert results["commit"] == "unknown" or len(results["commit"]) == 40


def test_run_prints_the_table(finished):
    run, done, _ = finished
    results = json.loads((run / "results.json").read_text())
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name, shift, paper in (("standard", "none", "208.7 ± 57.3"), ("speed", "speed", "120.7 ± 100.2")):
        returns = np.array(results["returns"][shift])
        numbers = [f"{returns.mean():.1f} ± {returns.std():.1f}"]
        numbers += [f"{100 * (returns.mean() + 4.1) / 189.7:.1f}", f"{results['data']['mean']:.1f}"]
        numbers += [f"{results['data']['max']:.1f}", paper]
        rest = lines[name]
        for number in numbers:
            assert number in rest, lines[name]
            rest = rest.split(number, 1)[1]
    assert str(run) in done.stdout
    assert "6/6" in done.stderr  # the progress bar


def test_run_logs_to_tensorboard(finished):
    run, _, _ = finished
    log = logged(run)
    assert {"losses/td", "losses/diffusion", "losses/q", "charts/episodic_return", "charts/q_data"} <= log.keys()
    assert {tag.split("/")[0] for tag in log} == {"charts", "losses"}
    returns = log["charts/episodic_return"]
    assert list(returns) == [2, 4, 6]
    results = json.loads((run / "results.json").read_text())
    assert returns[6] == pytest.approx(np.mean(results["returns"]["none"]), rel=1e-5)  # the last parameters
    assert max(log["losses/td"]) == 6


def test_run_writes_a_gif(finished):
    run, _, _ = finished
    with Image.open(next(run.glob("*.gif"))) as image:
        assert image.n_frames >= EPISODE_STEPS
        frames = []
        for i in range(3):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
    assert not (frames[0] == frames[1]).all() and not (frames[1] == frames[2]).all()


def test_policy_plays_in_three_lines(finished):
    run, _, _ = finished
    env = parallel_env("simple_tag")
    policy = dom2_mpe.load_policy(run)
    obs, _ = env.reset(seed=0)
    steps, total = 0, 0.0
    while env.agents:
        actions = policy(obs)
        for agent in env.agents:
            assert env.action_space(agent).contains(actions[agent])
        obs, rewards, *_ = env.step(actions)
        steps, total = steps + 1, total + rewards["adversary_0"]
    assert steps == EPISODE_STEPS and np.isfinite(total)


def test_policy_is_that_of_the_chosen_seed_and_agent(finished, tmp_path, prey):
    """Networks that always answer one corner, another one for every seed and agent."""
    checkpoint = stored(finished[0])
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [1, -1], [-1, 1.0]])  # [seed-major learners, 2]
    *_, last = (key for key in checkpoint["learners"] if key.startswith("target_policy.net") and key.endswith("weight"))
    checkpoint["learners"][last].zero_()
    checkpoint["learners"][last.replace("weight", "bias")].copy_(20 * corners[:, None])
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    obs, _ = parallel_env("simple_tag").reset(seed=0)
    frozen = load_prey(prey, 14)
    for seed in (0, 1):
        actions = dom2_mpe.load_policy(tmp_path, seed_index=seed)(obs)
        assert list(actions) == list(SCENARIOS["simple_tag"].agents)
        np.testing.assert_allclose([actions[f"adversary_{i}"] for i in range(3)], corners[3 * seed :][:3], atol=0.1)
        np.testing.assert_allclose(
            actions["agent_0"], policy_action(frozen, torch.from_numpy(obs["agent_0"])), atol=1e-6
        )


def test_policies_take_observations_of_any_type_and_can_be_pickled(finished):
    obs, _ = parallel_env("simple_tag").reset(seed=0)
    obs = {name: np.round(x) for name, x in obs.items()}
    expected = dom2_mpe.load_policy(finished[0])(obs)
    changes = [
        *(lambda x, dtype=dtype: x.astype(dtype) for dtype in (np.float64, np.int64, ">f4")),
        *(lambda x: x[::-1].copy()[::-1], torch.from_numpy, list),
    ]
    for change in changes:
        actions = dom2_mpe.load_policy(finished[0])({name: change(x) for name, x in obs.items()})
        for name, action in expected.items():
            np.testing.assert_array_equal(actions[name], action)
    again = pickle.loads(pickle.dumps(dom2_mpe.load_policy(finished[0])))(obs)
    np.testing.assert_equal(again, expected)


def test_the_table_of_one_seed_shows_no_spread(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    results |= {"num_seeds": 1, "returns": {"none": [12.34], "speed": [5.0]}}
    out = closing_table(results, "simple_tag")
    assert "mean return of 4 episodes of one seed\n" in out
    assert "mean return of 1 episode of one seed\n" in closing_table(results | {"eval_episodes": 1}, "simple_tag")
    assert "BC on simple_tag" not in out and "DOM2 on simple_tag" in out and "paper (DOM2)" in out
    out_of_bc = closing_table(results | {"settings": results["settings"] | {"eta": 0.0}}, "simple_tag")
    assert "BC on simple_tag" in out_of_bc and re.search(r"^standard .* -$", out_of_bc, re.MULTILINE)
    assert re.search(r"^standard +12\.3 +8\.7 ", out, re.MULTILINE) and "12.3 ±" not in out
    # the paper's results and the normalisation are those of its own partition of the robot
    robot = results | {"scenario": "HalfCheetah", "dataset": "expert"}
    assert re.search(r"^standard +12\.3 +7\.7 .* 3676\.6 ± 248\.1$", closing_table(robot, "HalfCheetah"), re.MULTILINE)
    assert re.search(r"^standard +12\.3 +- .* -$", closing_table(robot, "HalfCheetah-6x1"), re.MULTILINE)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to change: its folder."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_eval_only_reproduces_the_returns(copied, script, tmp_path, data_dir):
    before, first = files(copied), json.loads((copied / "results.json").read_text())
    options = dict(eval_only=str(copied), eval_episodes=4, data_dir=str(data_dir), cuda=False)
    code, out, err = script(DOM2, *flags(**options))
    assert code == 0, err
    again = json.loads((copied / "evaluation.json").read_text())
    assert again["returns"] == first["returns"] and again["updates"] == 6
    assert f"{np.mean(first['returns']['none']):.1f} ±" in out
    after = files(copied)
    assert all(after[name] == contents for name, contents in before.items())  # what training wrote stays
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_is_shown_before_it_is_written(copied, script, data_dir, monkeypatch):
    """Where the run's folder may not be written, as of another user."""
    before, first = files(copied), json.loads((copied / "results.json").read_text())

    def refuse(path, contents):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    options = dict(eval_only=str(copied), eval_episodes=4, data_dir=str(data_dir), cuda=False)
    code, out, err = script(DOM2, *flags(**options))
    assert code == 2 and err == f"error: {copied}: Read-only file system; make it writable, or use a copy of it\n"
    assert f"{np.mean(first['returns']['none']):.1f} ±" in out and files(copied) == before


# ---- runs that were interrupted ----


def assert_same_checkpoint(run, other):
    a, b = stored(run), stored(other)
    assert a["updates"] == b["updates"]
    for name, value in b["learners"].items():
        assert torch.equal(a["learners"][name], value), name
    for network, optimizer in b["optimizers"].items():
        for i, state in optimizer["state"].items():
            assert all(torch.equal(a["optimizers"][network]["state"][i][k], state[k]) for k in state)
    assert torch.equal(a["rng"], b["rng"])


def nth(number, do):
    """DOM2 whose `number`th update calls `do` first."""
    calls = []

    def update(*args):
        calls.append(1)
        if len(calls) == number:
            do()
        return DOM2.update(*args)

    return DOM2._replace(update=update)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """An undisturbed run with the options of `small`, to read only: run folder, results."""
    folder = tmp_path_factory.mktemp("whole")
    places = dict(data_dir=str(data_dir), run_dir=str(folder), cuda=False)
    results = train(DOM2.args("simple_spread", "random", **SMALL, **places))
    return the_run(folder), results


def test_resume_continues_bit_for_bit(small, tmp_path, whole):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(DOM2.args(**small), nth(4, interrupt))  # after the checkpoint of update 2 and one update more
    run = the_run(tmp_path / "runs")
    assert stored(run)["updates"] == 2
    assert not (run / "results.json").exists()
    torch.manual_seed(1234)
    results = train(resumed(run))
    assert results["returns"] == whole[1]["returns"] and results["updates"] == 6
    assert_same_checkpoint(run, whole[0])
    assert logged(run) == logged(whole[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(number, small, tmp_path, whole, monkeypatch, capsys):
    """The printed command can be pasted, also where there are spaces in it."""
    handler = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["dom2_mpe.py"])
    monkeypatch.chdir(tmp_path)
    kill = lambda: os.kill(os.getpid(), number)  # noqa: E731
    with pytest.raises(SystemExit) as exit:
        train(DOM2.args(**small | dict(run_dir="my runs")), nth(3, kill))  # between two checkpoints
    assert exit.value.code == 128 + number and signal.getsignal(number) is handler
    run = the_run(tmp_path / "my runs")
    message, command = capsys.readouterr().out.splitlines()[-1].split("; go on with: ")
    assert message == "stopped after update 3" and stored(run)["updates"] == 3
    words = shlex.split(command)
    assert words == ["python", "dom2_mpe.py", "--resume", str(run.relative_to(tmp_path))]
    results = train(parse(DOM2, "", words[2:]))
    assert results["returns"] == whole[1]["returns"]
    assert (whole[1]["first_update"], results["first_update"]) == (0, 3)
    assert_same_checkpoint(run, whole[0])


def test_options_of_a_script_that_was_copied():
    """New defaults go into a subclass, a new option into one of the groups."""

    @dataclass
    class MyArgs(dom2_mpe.Args):
        updates: int = 7

    @dataclass
    class Other(MyArgs):
        dropout: float = 0.1

    assert parse(DOM2._replace(Args=MyArgs, settings={}), "", ["--eta", "3"]) == MyArgs(eta=3.0)
    with pytest.raises(TypeError, match=r"Other: move dropout to one of the option groups"):
        parse(DOM2._replace(Args=Other), "", [])


def test_printed_commands_without_a_relative_path(monkeypatch):
    def relpath(path):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    monkeypatch.setattr(sys, "argv", ["/my scripts/dom2_mpe.py"])
    assert shlex.split(script_command()) == ["python", "/my scripts/dom2_mpe.py"]


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:999]), lambda f: f.unlink()])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, whole, tmp_path, capsys):
    run = shutil.copytree(whole[0], tmp_path / "run")
    damage(run / "checkpoint.pt")
    results = train(resumed(run))
    assert capsys.readouterr().err.count("using the one before") == 1  # although options and run are read apart
    assert results["returns"] == whole[1]["returns"]
    assert results["first_update"] == 4
    assert torch.load(run / "checkpoint-previous.pt", weights_only=True)["updates"] == 4
    assert_same_checkpoint(run, whole[0])


def test_a_damaged_checkpoint_is_read_once_to_act(whole, tmp_path, capsys):
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:999])
    dom2_mpe.load_policy(run)
    assert capsys.readouterr().err.count("using the one before") == 1


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(failing, whole, tmp_path, monkeypatch):
    """Whichever step of writing fails, one of the two files is whole."""
    calls, replace_file = [], os.replace

    def full(path, contents):
        with open(path, "wb") as file:
            file.write(contents[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopped(*paths):  # between the two renames
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(*paths)

    run = shutil.copytree(whole[0], tmp_path / "run")
    with monkeypatch.context() as patch:
        if failing == "replace":
            patch.setattr(os, "replace", stopped)
        else:
            patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"run: No space left .*free some space; .* --resume .* goes on"):
            train(resumed(run, updates=8))
    assert not list(run.glob("*.tmp"))
    longer = train(resumed(run, updates=8))
    assert longer["first_update"] == 6 and stored(run)["updates"] == 8


def test_other_errors_of_the_disk_are_not_called_full(whole, tmp_path, monkeypatch):
    def refuse(path, contents):
        raise OSError(errno.EACCES, "Permission denied")

    run = shutil.copytree(whole[0], tmp_path / "run")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError) as error:
        train(resumed(run, updates=8))
    assert str(error.value) == f"{run}: Permission denied; make it writable, or use a copy of it"


# ---- the lock ----


def test_a_run_is_not_continued_while_it_still_runs(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    before = files(run)
    with locked(run), pytest.raises(UserError, match="run: another process is training it"):
        train(resumed(run, updates=8))
    after = files(run)
    assert all(after[name] == contents for name, contents in before.items()) and after.keys() - before.keys() <= {
        Path("lock")
    }
    assert train(resumed(run, updates=8))["updates"] == 8


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_file_systems_without_locks(number, whole, tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    fcntl = pytest.importorskip("fcntl")
    run = shutil.copytree(whole[0], tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert train(resumed(run, updates=8))["updates"] == 8
    err = capsys.readouterr().err
    assert f"warning: {run}: no lock" in err and "space" not in err
    assert train(resumed(run, updates=9))["updates"] == 9  # nothing is left that would keep others out


def test_systems_without_locks(tmp_path, monkeypatch, capsys):
    def acquire(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path):
        assert "warning: " in capsys.readouterr().err


# ---- options given with --resume and --eval-only ----


def test_resume_goes_on_to_more_updates(small, tmp_path, whole):
    longer = train(DOM2.args(**small | dict(updates=8)))
    run = shutil.copytree(whole[0], tmp_path / "run")
    results = train(resumed(run, updates=8))
    assert results["returns"] == longer["returns"] and results["updates"] == 8
    assert_same_checkpoint(run, the_run(tmp_path / "runs"))
    with pytest.raises(UserError, match="--updates 7"):  # nor back again
        train(resumed(run, updates=7))


def test_options_given_with_resume_are_honoured(copied, script):
    before = json.loads((copied / "config.json").read_text())
    changes = dict(updates=9, actor_lr=1e-4, critic_lr=2e-4, eval_interval=3, eval_episodes=3, shift="none")
    code, _, err = script(DOM2, *flags(resume=str(copied), **changes, eta=40.0))  # eta as it was
    assert code == 0, err
    results = json.loads((copied / "results.json").read_text())
    changes |= dict(resume=str(copied), shift=["none"], capture_video=False)
    assert results["settings"] == before | changes
    assert results["returns"].keys() == {"none"} and results["eval_episodes"] == 3
    optimizers = stored(copied)["optimizers"]
    assert [optimizers[name]["param_groups"][0]["lr"] for name in ("policy", "critic")] == [1e-4, 2e-4]
    assert list(logged(copied)["charts/episodic_return"]) == [2, 4, 6, 9]


def test_a_finished_run_says_how_to_go_on(copied, script):
    before = (copied / "results.json").read_bytes()
    code, _, err = script(DOM2, "--resume", str(copied), "--eval-episodes", "2")
    assert code == 2 and f"{copied} is finished; a larger --updates goes on, --eval-only evaluates it again" in err
    assert (copied / "results.json").read_bytes() == before
    code, _, err = script(DOM2, "--resume", str(copied), "--updates", "7")
    assert code == 0, err
    # as if the last evaluation had been interrupted: then the file has the results of fewer updates, or is missing
    for contents in (before, None, b'{"upda', b"[]"):  # the last two are damaged
        (copied / "results.json").unlink()
        if contents is not None:
            (copied / "results.json").write_bytes(contents)
        code, _, err = script(DOM2, "--resume", str(copied))
        assert code == 0 and json.loads((copied / "results.json").read_text())["updates"] == 7, err


def test_a_lower_learning_rate_changes_what_is_learned(whole, tmp_path):
    weights = []
    for actor_lr in (3e-3, 1e-5):
        run = shutil.copytree(whole[0], tmp_path / str(actor_lr))
        train(resumed(run, updates=7, actor_lr=actor_lr))
        weights.append(next(v for k, v in stored(run)["learners"].items() if "policy.net.obs_in" in k))
    before = next(v for k, v in stored(whole[0])["learners"].items() if "policy.net.obs_in" in k)
    large, small = ((x - before).abs().max() for x in weights)
    assert 0 < small < large / 10


def test_options_given_with_eval_only_are_honoured(copied, script):
    before, video = json.loads((copied / "config.json").read_text()), (copied / "policy.gif").read_bytes()
    code, _, err = script(DOM2, *flags(eval_only=str(copied), eval_episodes=3, shift="none", capture_video=True))
    assert code == 0, err
    results = json.loads((copied / "evaluation.json").read_text())
    assert results["settings"] == before | dict(eval_only=str(copied), eval_episodes=3, shift=["none"])
    assert list(results["returns"]) == ["none"]
    assert (copied / "evaluation.gif").exists() and (copied / "policy.gif").read_bytes() == video  # of the training


def another(value):
    """A valid value of an option, other than `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.5
    if isinstance(value, tuple):
        return value[:1] if len(value) > 1 else (*value, *value)
    return "elsewhere"


OTHER = dict(scenario="simple_world", dataset="expert", prediction="noise", noise_net="residual", thresholds=(1.0,))


@pytest.mark.parametrize(
    "option, honoured", [("resume", WITH_RESUME), ("eval_only", WITH_EVAL_ONLY)], ids=["resume", "eval_only"]
)
def test_options_that_cannot_be_honoured_are_refused_by_name(option, honoured, copied):
    args, before = resumed(copied, option), files(copied)
    refused = [field.name for field in fields(args) if field.name not in honoured]
    assert {"seed", "num_seeds", "prey", "eta", "widths", "bf16", "run_dir"} <= set(refused)
    for name in refused:
        changed = replace(args, **{name: OTHER.get(name, another(getattr(args, name)))})
        with pytest.raises(UserError) as error:
            train(changed)
        assert str(error.value).startswith(f"--{name.replace('_', '-')} ")
    assert files(copied) == before


def test_resume_or_eval_only_but_not_both(copied, script, tmp_path):
    refused(script, tmp_path, *flags(resume=str(copied), eval_only=str(copied)), naming="--eval-only")


def test_a_run_that_was_compiled_goes_on_where_that_is_impossible(whole, tmp_path, monkeypatch):
    run = shutil.copytree(whole[0], tmp_path / "run")
    checkpoint = stored(run)
    checkpoint["args"]["compile"] = True
    torch.save(checkpoint, run / "checkpoint.pt")
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("no compiler"))
    results = train(parse(DOM2, "", flags(resume=str(run), compile=False, updates=7)))
    assert results["updates"] == 7 and not results["settings"]["compile"]


@pytest.mark.parametrize("option", ["resume", "eval_only"])
def test_a_run_knows_where_its_data_are(option, whole, tmp_path, data_dir, monkeypatch):
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "results.json").unlink()  # as if the last evaluation had been interrupted
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect_datasets, "collect", lambda *args, **kwargs: pytest.fail("made other data"))
    results = train(resumed(run, option))
    assert results["settings"]["data_dir"] == str(data_dir)
    assert results["returns"] == whole[1]["returns"]


def test_a_run_goes_on_with_its_own_data_alone(whole, tmp_path, collect):
    """Another folder may hold them, as after a move; other data of the same name, or fewer, are refused."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    collect("simple_spread", "random", tmp_path / "other", seed=1)
    before = files(run)
    with pytest.raises(UserError) as error:
        train(resumed(run, updates=8, data_dir=tmp_path / "other"))
    assert str(error.value) == f"--data-dir {tmp_path / 'other'}: not the data that {run} was trained on"
    assert files(run) == before
    for change in (lambda x: 0.5 * x, lambda x: x[::-1]):  # with the same returns
        collect("simple_spread", "random", tmp_path / "changed", overwrite=True)
        folder = common.dataset_path(tmp_path / "changed", "simple_spread", "random")
        (folder / "metadata.json").unlink()
        for name in ("obs", "next_obs", "acs"):
            for agent, x in enumerate(change(np.stack([np.load(folder / f"{name}_{i}.npy") for i in range(3)]))):
                np.save(folder / f"{name}_{agent}.npy", x)
        with pytest.raises(UserError, match="changed: not the data that"):
            train(resumed(run, updates=8, data_dir=tmp_path / "changed"))
    collect("simple_spread", "random", tmp_path / "same")
    assert train(resumed(run, updates=8, data_dir=tmp_path / "same"))["updates"] == 8


def test_restoring_keeps_what_the_device_needs():
    """A CUDA graph needs capturable optimisers, which a checkpoint made on a CPU does not have."""
    learners = torch.nn.ModuleDict({"policy": torch.nn.Linear(2, 2)})
    optimizers = {"policy": torch.optim.Adam(learners.parameters(), 0.1)}
    learners["policy"].weight.sum().backward()
    optimizers["policy"].step()
    checkpoint = {"learners": learners.state_dict(), "optimizers": {"policy": optimizers["policy"].state_dict()}}
    others = {"policy": torch.optim.Adam(learners.parameters(), 0.2, capturable=True, fused=True)}
    restore(learners, others, checkpoint, "run")
    (group,) = others["policy"].param_groups
    assert group["capturable"] and group["fused"] and group["lr"] == 0.2
    for name, value in optimizers["policy"].state_dict()["state"][0].items():
        assert torch.equal(others["policy"].state_dict()["state"][0][name], value)


def test_an_ignored_signal_stays_ignored():
    """As SIGINT in background jobs of a shell's script, which Ctrl-C in the foreground must not stop."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


# ---- training ----


def test_same_seed_same_run_and_another_seed_another(small, whole):
    again, other = (train(DOM2.args(**small | dict(seed=seed)))["returns"] for seed in (0, 1))
    assert again == whole[1]["returns"]
    assert again["none"][0] not in other["none"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(noise_net="residual", prediction="noise", zeta=0.1),
        dict(scenario="simple_world", shift=("none",), max_grad_norm=0.0),
        dict(dataset="random-medium", num_seeds=1, diffusion_steps=1, eta=1.0, bc_weight=0.0, augment=False),
        dict(raw_rewards=True, reward_scale=0.1, max_grad_norm=1.0, bf16=True),
    ],
    ids=str,
)
def test_other_options_train_and_play(changes, small, pretrained):
    prey = dict(prey=str(pretrained / "simple_world.pt")) if changes.get("scenario") == "simple_world" else {}
    args = DOM2.args(**small | prey | dict(updates=2) | changes)
    results = train(args)
    assert np.isfinite(results["returns"]["none"]).all()
    assert len(results["returns"]["none"]) == args.num_seeds
    assert results["milliseconds_per_action"] > 0


def test_without_eta_it_is_cloning(small):
    results = train(DOM2.args(**small | dict(eta=0.0, updates=2)))
    assert results["algorithm"] == "dom2" and results["settings"]["eta"] == 0
    log = logged(the_run(small["run_dir"]))
    assert "losses/diffusion" in log and "losses/td" not in log


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, such as Debian's g++")
def test_compiled_updates_learn_the_same(small, tmp_path, whole):
    command = [sys.executable, str(ROOT / "dom2_mpe.py"), *flags(**small, compile=True)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    compiled, plain = stored(the_run(small["run_dir"])), stored(whole[0])
    assert compiled["args"]["compile"] and compiled["updates"] == 6
    for name, value in plain["learners"].items():
        torch.testing.assert_close(compiled["learners"][name], value, rtol=1e-3, atol=1e-4)


def test_compiling_needs_a_compiler(small, monkeypatch):
    def fast():
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fast)
    with pytest.raises(UserError, match="--compile: no C\\+\\+ compiler found; install one"):
        train(DOM2.args(**small | dict(compile=True)))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 1.71 PiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 24 bytes"),
        RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807, 3]"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_said_in_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        program(main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: not enough memory; lower --num-seeds, ") and str(error).splitlines()[0] in line


def test_other_errors_are_not_taken_for_too_little_memory():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        program(main)


def test_a_file_that_cannot_be_read_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        program(lambda: (tmp_path / "missing").read_bytes())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{tmp_path / 'missing'}'\n"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_reason_to_fail(closed, monkeypatch):
    """As the shell's `>&-` leaves it."""
    monkeypatch.setattr(sys, closed, None)
    done = []

    def main():
        print("text", file=getattr(sys, closed))
        getattr(sys, closed).flush()
        done.append(True)

    program(main)
    assert done


def sampled(args):
    """The data that training samples from, and the results."""
    seen = []

    def spy(data, *args):
        seen.append(data)
        return DOM2.sample_batch(data, *args)

    results = train(args, DOM2._replace(sample_batch=spy))
    return seen[0], results


def team_returns(data_dir):
    folder = Path(data_dir) / "simple_spread" / "random" / "seed_0_data"
    rewards = np.mean([np.load(folder / f"rews_{i}.npy") for i in range(3)], 0, np.float64)
    return rewards.reshape(-1, EPISODE_STEPS).sum(1)


@pytest.mark.parametrize(
    "changes", [{}, {"quantiles": (0.3, 0.8)}, {"thresholds": (150.0, 170.0)}, {"copies": 3}], ids=str
)
def test_training_samples_with_the_weights_of_algorithm_1(changes, small, data_dir):
    data, _ = sampled(DOM2.args(**small | dict(updates=1) | changes))
    returns = team_returns(data_dir)
    thresholds = changes.get("thresholds", np.quantile(returns, changes.get("quantiles", DOM2.Args.quantiles)))
    weights = [1 + changes.get("copies", 1) * sum(value >= r for r in thresholds) for value in returns]
    assert torch.bincount(data.index[0]).tolist() == np.repeat(weights, EPISODE_STEPS).tolist()
    assert max(weights) > 1


def test_no_augment(small, capsys):
    data, _ = sampled(DOM2.args(**small | dict(updates=1, augment=False, num_seeds=1)))
    out = capsys.readouterr().out
    assert "3 learners (1 seed x 3 agents)" in out and "(1 update)" in out
    assert data.index[0].sort().values.tolist() == list(range(20 * EPISODE_STEPS))


def test_data_fraction_keeps_whole_trajectories(small, data_dir):
    """Sampling weights, statistics and the scale of the rewards are those of what is kept."""
    folder = data_dir / "simple_spread" / "random" / "seed_0_data"
    obs = np.stack([np.load(folder / f"obs_{i}.npy") for i in range(3)]).reshape(3, 20, EPISODE_STEPS, 18)
    choices = []
    for seed in (0, 1, 1):
        data, results = sampled(DOM2.args(**small | dict(updates=1, data_fraction=0.25, seed=seed, num_seeds=1)))
        assert data.obs.shape == (3, 5 * EPISODE_STEPS, 18)
        kept = data.obs.view(3, 5, EPISODE_STEPS, 18).numpy()
        choices.append([next(e for e in range(20) if (obs[:, e] == kept[:, k]).all()) for k in range(5)])
        returns = team_returns(data_dir)[choices[-1]]
        weights = [1 + sum(value >= r for r in np.quantile(returns, DOM2.Args.quantiles)) for value in returns]
        assert torch.bincount(data.episodes[0]).tolist() == weights
        assert results["data"]["mean"] == pytest.approx(returns.mean(), rel=1e-4)
        assert results["data"]["max"] == pytest.approx(returns.max(), rel=1e-4)
        assert results["data"]["transitions"] == 125
        assert data.reward.std().item() == pytest.approx(1, rel=1e-3)
        assert data.reward.mean().item() == pytest.approx(0, abs=1e-4)
    assert len(set(choices[0])) == len(set(choices[1])) == 5
    assert set(choices[0]) != set(choices[1]) == set(choices[2])


def test_a_dataset_that_another_process_makes_in_the_meantime(small, tmp_path, monkeypatch, collect):
    def too_late(*names, **options):
        collect(*names, **options)
        collect(*names, **options)  # finds the one above

    monkeypatch.setattr(collect_datasets, "collect", too_late)
    monkeypatch.chdir(tmp_path)
    assert train(DOM2.args(**small | dict(updates=1, data_dir="datasets")))["data"]["transitions"] == 500


def test_a_mistyped_folder_makes_no_data(small, script, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_datasets, "collect", lambda *args, **kwargs: pytest.fail("made data"))
    refused(script, tmp_path, *flags(**small | dict(data_dir="datsets")), naming="--data-dir datsets")
    refused(script, tmp_path, *flags(**small | dict(data_dir=str(tmp_path))), naming=f"--data-dir {tmp_path}")


def test_missing_dataset_is_made_first_and_makes_no_difference(small, tmp_path, monkeypatch, whole, capsys):
    """The run equals one that finds the dataset."""
    folder = tmp_path / "datasets" / "simple_spread" / "random"
    monkeypatch.chdir(tmp_path)

    def collect(*names, **options):
        torch.manual_seed(5)
        shutil.copytree(Path(small["data_dir"]) / "simple_spread" / "random", folder)

    monkeypatch.setattr(collect_datasets, "collect", collect)
    results = train(DOM2.args(**small | dict(data_dir="datasets")))
    assert results["returns"] == whole[1]["returns"]
    assert "datasets/simple_spread/random" in capsys.readouterr().err  # says where it makes data


def test_landmarks6_reports_what_its_figures_show(small, capsys):
    results = train(DOM2.args(**small | dict(scenario="landmarks6", updates=1)))
    assert results["returns"].keys() == results["assignments"].keys() == {"none", "dismiss"}
    for found in results["assignments"].values():
        assert len(found["distinct"]) == len(found["entropy"]) == 2 and min(found["distinct"]) >= 1
    assert "dismiss: " in capsys.readouterr().out


def test_losses_that_are_not_finite_end_the_run(small):
    def update(learners, *args):
        bad = torch.zeros(6)
        bad[4] = float("nan")  # seed 1, agent 1
        return {"losses/td": torch.zeros(6), "losses/q": bad}

    with pytest.raises(UserError, match="update 6: losses/q of seed 8, agent 1 is not finite; lower the"):
        train(DOM2.args(**small | dict(eval_interval=6, seed=7)), DOM2._replace(update=update))
    run = the_run(small["run_dir"])
    assert not (run / "results.json").exists() and not (run / "checkpoint-previous.pt").exists()
    assert stored(run)["updates"] == 0


@pytest.mark.parametrize("updates, noticed", [(150, 100), (9, 9)])
def test_losses_are_checked_every_100_updates_and_before_evaluations(updates, noticed, small, tmp_path):
    def update(learners, *args):
        return {"losses/td": torch.full((6,), INF)}

    with pytest.raises(UserError, match=f"update {noticed}: losses/td of seed 0, agent 0 is not finite"):
        train(DOM2.args(**small | dict(updates=updates, eval_interval=1000)), DOM2._replace(update=update))


def test_a_broken_state_does_not_replace_the_last_checkpoint(small):
    calls = []

    def broken(*args):
        calls.append(1)
        metrics = DOM2.update(*args)
        return metrics if len(calls) < 4 else {tag: value * NAN for tag, value in metrics.items()}

    with pytest.raises(UserError, match=r"update 6: .* is not finite"):
        train(DOM2.args(**small | dict(updates=9, eval_interval=3)), DOM2._replace(update=broken))
    assert stored(the_run(small["run_dir"]))["updates"] == 3


@pytest.mark.parametrize(
    "network, value",
    [("policy", NAN), ("critic", INF), ("target_policy", -INF), ("target_critic", NAN), ("optimizer", INF)],
)
def test_a_broken_parameter_is_not_saved(network, value, small):
    """It breaks in the very update that is saved next, whose losses are still finite."""
    calls = []

    def broken(learners, optimizers, *args):
        calls.append(1)
        metrics = DOM2.update(learners, optimizers, *args)
        if len(calls) == 4:
            if network == "optimizer":
                tensor = next(iter(optimizers["critic"].state.values()))["exp_avg_sq"]
            else:
                tensor = next(learners[network].parameters()).detach()
            tensor.view(6, -1)[4, -1] = value  # seed 1, agent 1
        return metrics

    with pytest.raises(UserError, match="update 4: a parameter of seed 8, agent 1 is not finite"):
        train(DOM2.args(**small | dict(seed=7)), DOM2._replace(update=broken))
    assert stored(the_run(small["run_dir"]))["updates"] == 2


def test_two_runs_in_the_same_second_have_their_own_folders(small):
    args = DOM2.args(**small)
    runs = {new_run_dir(args, "dom2") for _ in range(5)}
    assert len(runs) == 5 and all(run.is_dir() for run in runs)


def test_runs_are_logged_to_wandb_where_asked(copied, script, monkeypatch):
    logged, wandb = [], types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **options: logged.append(options)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    code, _, err = script(DOM2, *flags(resume=str(copied), updates=7, track=True))
    assert code == 0, err
    (options,) = logged
    assert options["name"] == copied.name and options["config"]["updates"] == 7 and options["sync_tensorboard"]


# ---- options ----


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_settings_are_valid_and_the_command_line_wins(scenario):
    for dataset in common.DATASETS:
        args, row = DOM2.args(scenario, dataset), DOM2.settings.get((scenario, dataset), {})
        assert asdict(args) == asdict(DOM2.Args()) | dict(scenario=scenario, dataset=dataset) | row
    words = ["--scenario", scenario, "--dataset", dataset]
    assert parse(DOM2, "", words) == args
    others = {name: ("none",) if name == "shift" else another(value) for name, value in row.items()}
    assert DOM2.args(scenario, dataset, **others) == replace(args, **others)
    assert parse(DOM2, "", words + flags(**others)) == replace(args, **others)


def test_settings_name_existing_datasets_and_options():
    for algorithm in (DOM2, dom2_mamujoco.DOM2, OMAR, MA_CQL):
        for (scenario, dataset), row in algorithm.settings.items():
            assert dataset in common.DATASETS and algorithm.args(scenario, dataset).scenario == scenario
            assert row.keys() <= {field.name for field in fields(algorithm.Args)}


def test_defaults_do_not_ask_the_hardware(monkeypatch):
    for name in ("is_available", "is_bf16_supported", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: pytest.fail("asked"))
    for algorithm in (DOM2, dom2_mamujoco.DOM2, OMAR):
        args = parse(algorithm, "", ["--no-cuda"])
        assert not args.cuda and not args.bf16 and not args.compile


def test_option_types_of_the_command_line():
    words = flags(widths=(5, 6), eta=2.0, augment=True, shift="none", thresholds=(1.0, -2.5), prey="a b", seed=3)
    args = parse(DOM2, None, words)  # a script without a docstring has no description
    assert args == DOM2.args(
        widths=(5, 6), eta=2.0, augment=True, shift=("none",), thresholds=(1.0, -2.5), prey="a b", seed=3
    )


def test_thresholds_without_replication_are_refused():
    for algorithm, options in ((DOM2, {"augment": False}), (OMAR, {})):
        with pytest.raises(UserError, match=r"--thresholds 1\.0 -2\.5: nothing is replicated without --augment"):
            algorithm.args(thresholds=(1.0, -2.5), **options)


@pytest.mark.parametrize(
    "algorithm, words, message",
    [
        (DOM2, "--quantiles 0.5 --thresholds 1", "--quantiles: --thresholds take their place"),
        (DOM2, "--thresholds 1 --quantiles=0.5", "--quantiles: --thresholds take their place"),
        (DOM2, "--no-augment --copies 2", "--copies: nothing is replicated without --augment"),
        (DOM2, "--no-augment --quantiles 0.5", "--quantiles: nothing is replicated without --augment"),
        (OMAR, "--copies=2", "--copies: nothing is replicated without --augment"),
        (OMAR, "--augment --copies 2 --thresholds 1", None),
        (DOM2, "--quantiles 0.5 --copies 2", None),
    ],
)
def test_options_of_replication_that_change_nothing_are_refused(algorithm, words, message):
    if message is None:
        assert parse(algorithm, "", words.split()).copies == 2
    else:
        with pytest.raises(UserError, match=message):
            parse(algorithm, "", words.split())


@pytest.mark.parametrize(
    "changes",
    [
        *({name: "nonsense"} for name in ("scenario", "dataset", "noise_net", "prediction")),
        *({"shift": value} for value in (("nonsense",), ("speed", "nonsense"))),
        *({name: 0} for name in ("num_seeds", "updates", "batch_size", "diffusion_steps")),
        *({name: -1} for name in ("eval_interval", "eval_episodes")),
        *({name: -0.1} for name in ("eta", "zeta", "bc_weight", "reward_scale", "max_grad_norm", "beta_max")),
        *({name: NAN} for name in ("eta", "zeta", "bc_weight", "reward_scale", "max_grad_norm", "beta_max")),
        *({name: INF} for name in ("eta", "zeta", "bc_weight", "reward_scale", "max_grad_norm", "beta_max")),
        *({name: 0.0} for name in ("data_fraction", "rho", "actor_lr", "critic_lr")),
        *({name: 1.01} for name in ("data_fraction", "rho", "actor_lr", "critic_lr")),
        *({name: NAN} for name in ("data_fraction", "rho", "actor_lr", "critic_lr", "gamma")),
        *({"data_fraction": value} for value in (-0.5, INF)),
        *({"gamma": value} for value in (-0.1, 1.0, 2.0)),
        {"beta_max": 101.0},  # a float32 holds no such alpha(1)
        *({name: 2**31} for name in ("num_seeds", "updates", "batch_size", "eval_episodes", "copies")),
        {"widths": (8, 2**31)},
        *({name: ()} for name in ("widths", "critic_widths")),
        *({name: (8, 0)} for name in ("widths", "critic_widths")),
        *({"quantiles": (0.5, value)} for value in (-0.1, 1.1, NAN)),
        {"thresholds": (5.0, NAN)},
        *({"seed": value} for value in (-1, 2**31)),
        {"eta": 0.0, "bc_weight": 0.0},
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused(changes):
    with pytest.raises(UserError) as error:
        DOM2.args(**changes)
    for name in changes:
        assert f"--{name.replace('_', '-')}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm", [dom2_mamujoco.DOM2, OMAR], ids=lambda algorithm: algorithm.name)
def test_numbers_at_the_edge_of_a_range(algorithm):
    with pytest.raises(UserError, match="--agent-obsk -1: must be at least 0"):
        algorithm.args("HalfCheetah", agent_obsk=-1)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: 1.0} for name in ("data_fraction", "rho", "actor_lr", "critic_lr")),
        *({name: 0.0} for name in ("eta", "zeta", "gamma", "max_grad_norm")),
        {"bc_weight": 0.0, "eta": 1.0},
        {"data_fraction": 1e-6},
        {"quantiles": (0.0, 1.0)},
        {"thresholds": (-5.0, 1000.0)},
        *({"seed": value} for value in (0, 2**31 - 1)),
        {"num_seeds": 1, "updates": 1, "batch_size": 1, "diffusion_steps": 1, "eval_interval": 1, "eval_episodes": 1},
    ],
    ids=str,
)
def test_extreme_options_are_allowed(changes):
    args = DOM2.args(**changes)
    assert all(getattr(args, name) == value for name, value in changes.items())


@pytest.mark.parametrize("what", [DOM2, OMAR, collect_datasets], ids=lambda what: getattr(what, "name", "collect"))
def test_help_explains_every_option(what, script, tmp_path):
    code, out, err = script(what, "--help")
    assert (code, err) == (0, "")
    for field in fields(what.Args):
        assert f"-{field.name.replace('_', '-')}" in out  # --name or --no-name
    assert not os.listdir(tmp_path)


def test_help_shows_the_settings_of_what_is_given(script, copied):
    out = script(DOM2, "--scenario", "simple_tag", "--dataset", "medium", "--help")[1]
    assert re.search(r"--updates .*\(default: 4000\)", out)
    out = script(DOM2, "--resume", str(copied), "--help")[1]
    assert re.search(r"--updates .*\(default: 6\)", out)


# ---- bad input: a message that names it, exit code 2, nothing written ----


def refused(script, tmp_path, *words, naming, what=DOM2, boxed=False):
    """Ends with one line of ours or, if `boxed`, with tyro's message."""
    before = files(tmp_path)
    code, out, err = script(what, *words)
    assert code == 2, err
    assert naming in err and "Traceback" not in out + err, err
    assert err.startswith("╭") if boxed else err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        *(["--" + name, "nonsense"] for name in ("scenario", "dataset", "noise-net", "prediction", "shift")),
        *(["--data-fraction", value] for value in ("0", "1.5", "nan")),
        *(["--" + name, "0"] for name in ("updates", "num-seeds", "widths")),
        ["--gamma", "1"],
        ["--eta", "-1"],
        ["--widths"],
        ["--resume"],
        ["--nonsense", "3"],
        ["--seed", "x"],
        ["--seed"],
        ["--seed", "1.5"],
        ["--seed", "-1"],
        *(["--" + name, ""] for name in ("resume", "eval-only", "prey", "data-dir", "run-dir")),  # as of "$UNSET"
        *(["--" + name + "=~/x"] for name in ("prey", "data-dir", "run-dir")),
        ["random"],
        *(["--" + name, "1"] for name in ("solver", "q-normaliser", "eval-candidates", "beta-min")),
    ],
    ids=" ".join,
)
def test_words_that_are_no_options(words, script, tmp_path):
    ours = words[0] in ("--scenario", "--dataset")  # read before the others, as defaults depend on them
    refused(script, tmp_path, *words, naming=words[0].replace("=", " "), boxed=not ours)


def test_options_that_do_not_fit_together(script, tmp_path, small):
    refused(script, tmp_path, *flags(**small, eta=0.0, bc_weight=0.0), naming="--eta 0 --bc-weight 0")
    refused(script, tmp_path, *flags(**small, shift="dismiss"), naming="'dismiss'")  # another scenario's
    words = flags(scenario="HalfCheetah", dataset="random", agent_conf="7x7")
    refused(script, tmp_path, *words, naming="7x7", what=OMAR)


def test_bad_data(script, tmp_path, small, data_dir):
    for name in ("obs_1.npy", "rews_0.npy"):
        folder = tmp_path / "data" / "simple_spread" / "random" / "seed_0_data"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (data_dir / "simple_spread" / "random" / "seed_0_data").glob("*.npy"):
            (folder / file.name).write_bytes(file.read_bytes())
        array = np.load(folder / name)
        array[3] = np.nan
        np.save(folder / name, array)
        options = flags(**small | dict(data_dir=str(tmp_path / "data")))
        refused(script, tmp_path, *options, naming=name)
        (folder / name).unlink()
        refused(script, tmp_path, *options, naming=name)


def test_bad_prey(script, tmp_path, small, pretrained):
    (tmp_path / "text.pt").write_text("prey")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    wrong = pretrained / "simple_world.pt"
    for file in (tmp_path / "missing.pt", tmp_path / "text.pt", tmp_path / "other.pt", tmp_path, wrong):
        options = flags(**small | dict(scenario="simple_tag", prey=str(file)))
        refused(script, tmp_path, *options, naming=str(file))


def test_prey_is_that_of_the_data(script, tmp_path, small, pretrained, data_dir):
    """Data that say which prey they were made with are not mixed with another; data from elsewhere say nothing."""
    contents = torch.load(pretrained / "simple_tag.pt", weights_only=True)
    contents["agent_params"][-1]["policy"]["fc2.bias"][0] += 1e-3
    torch.save(contents, tmp_path / "other.pt")
    shutil.copytree(data_dir / "simple_tag", tmp_path / "datasets" / "simple_tag")
    places = dict(data_dir=str(tmp_path / "datasets"), prey=str(tmp_path / "other.pt"))
    options = flags(**small | dict(scenario="simple_tag", updates=1) | places)
    refused(script, tmp_path, *options, naming="--prey")
    (tmp_path / "datasets" / "simple_tag" / "random" / "seed_0_data" / "metadata.json").unlink()
    assert script(DOM2, *options)[0] == 0


every_way_in = pytest.mark.parametrize("option", ["resume", "eval_only"])


@every_way_in
def test_bad_run_folders(option, script, tmp_path, finished):
    whole, run = (finished[0] / "checkpoint.pt").read_bytes(), tmp_path / "run"
    words = flags(**{option: str(run), "cuda": False})
    checkpoint = str(run / "checkpoint.pt")
    refused(script, tmp_path, *words, naming=f"{run}: no run folder")
    run.mkdir()
    refused(script, tmp_path, *words, naming=f"{run}: no run folder")
    for damaged in (b"", b"checkpoint", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        (run / "checkpoint.pt").write_bytes(damaged)
        refused(script, tmp_path, *words, naming=checkpoint)


def without(key):
    def change(checkpoint):
        del checkpoint[key]
        return checkpoint

    return change


def with_args(**changes):
    def change(checkpoint):
        checkpoint["args"] |= changes
        return checkpoint

    return change


def other_network(checkpoint):
    checkpoint["learners"] = {k: v[..., :1] for k, v in checkpoint["learners"].items()}
    return checkpoint


def other_optimizer(checkpoint):
    checkpoint["optimizers"]["policy"]["param_groups"][0]["params"].pop()
    return checkpoint


@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint: {"args": {}},
        lambda checkpoint: checkpoint | {"args": None},
        lambda checkpoint: [1, 2],
        lambda checkpoint: torch.zeros(3),
        lambda checkpoint: {"model": torch.zeros(3), "epoch": 4},
        lambda checkpoint: {"args": {"lr": 0.1}, "model": torch.zeros(3)},
        lambda checkpoint: checkpoint["learners"],
        lambda checkpoint: checkpoint | {"algorithm": "omar"},
        other_network,
        other_optimizer,
        *(without(key) for key in ("args", "algorithm", "learners", "optimizers", "updates", "rng", "prey")),
        with_args(num_seeds=3),
        with_args(critic_widths=(9,)),
        with_args(learning_rate=0.1),
        with_args(updates="6"),
        with_args(widths=3),
        *((lambda checkpoint, updates=updates: checkpoint | {"updates": updates}) for updates in (-1, 2.5, "6", None)),
        with_args(gamma=2.0),
    ],
)
def test_checkpoints_of_another_kind(change, script, tmp_path, finished):
    run = tmp_path / "run"
    run.mkdir()
    torch.save(change(stored(finished[0])), run / "checkpoint.pt")
    refused(script, tmp_path, "--resume", str(run), naming=str(run / "checkpoint.pt"))
    refused(script, tmp_path, "--eval-only", str(run), naming=str(run / "checkpoint.pt"))


def test_a_run_of_another_algorithm(small, data_dir):
    """OMAR's options are MA-CQL's and more, and their networks are the same."""
    options = {k: v for k, v in small.items() if k != "critic_widths"}
    train(MA_CQL.args(**options | dict(updates=1)), MA_CQL)
    run = the_run(small["run_dir"])
    for algorithm in (OMAR, DOM2, dom2_mamujoco.DOM2):
        with pytest.raises(UserError, match=r"checkpoint\.pt: made by baselines/ma_cql.py; use that"):
            load_checkpoint(run, algorithm)


@every_way_in
@pytest.mark.parametrize("name, value", [("scenario", "simple_world"), ("dataset", "expert"), ("num_seeds", 3)])
def test_checkpoint_of_another_scenario_or_dataset(name, value, option, script, tmp_path, copied):
    options = {name: value, option: str(copied), "cuda": False}
    refused(script, tmp_path, *flags(**options), naming=f"--{name.replace('_', '-')} {value}")


def test_load_policy_of_no_run(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        dom2_mpe.load_policy(tmp_path)


def test_load_policy_of_a_seed_that_was_not_trained(finished):
    with pytest.raises(UserError, match="seed"):
        dom2_mpe.load_policy(finished[0], seed_index=2)


def test_unusable_run_folder(script, tmp_path, small):
    (tmp_path / "file").touch()
    refused(script, tmp_path, *flags(**small | dict(run_dir=str(tmp_path / "file"))), naming="--run-dir")


def test_wandb_is_optional(script, tmp_path, small, copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(script, tmp_path, *flags(**small, track=True), naming="--track")
    refused(script, tmp_path, "--resume", str(copied), "--track", naming="--track")


# ---- collect_datasets.py ----


def test_collect_datasets_from_the_command_line(script, tmp_path, pretrained):
    options = dict(scenario=("simple_tag", "simple_spread"), dataset=("random", "medium-expert"), num_transitions=500)
    words = flags(**options, pretrained_dir=str(pretrained))
    code, out, err = script(collect_datasets, *words)
    assert code == 0, err
    folders = {f"{s}/{d}" for s in options["scenario"] for d in options["dataset"]}
    made = files(tmp_path)
    assert {str(path.parent) for path in made} == {f"datasets/{folder}/seed_0_data" for folder in folders}
    for folder in folders:
        metadata = json.loads((tmp_path / "datasets" / folder / "seed_0_data" / "metadata.json").read_text())
        (line,) = (line for line in out.splitlines() if line.startswith(folder))
        numbers = [f"{metadata[f'return_{name}']:.1f}" for name in ("mean", "std", "max")]
        assert line.split()[1:5] == ["500", *numbers]
    assert "500/500" in err  # the progress bar

    code, out, err = script(collect_datasets, *words, "--action-noise", "0.5")
    assert code == 0 and (out + err).count("exists, kept") == 4 and files(tmp_path) == made
    code, _, _ = script(collect_datasets, *words, "--action-noise", "0.5", "--overwrite")
    assert code == 0 and files(tmp_path).keys() == made.keys() and files(tmp_path) != made
    code, _, _ = script(collect_datasets, *words, "--seed", "1")
    assert code == 0 and len(files(tmp_path)) == 2 * len(made)


def test_all_is_checked_before_any_dataset_is_made(script, tmp_path, pretrained):
    (tmp_path / "one").mkdir()
    shutil.copy(pretrained / "simple_spread.pt", tmp_path / "one")
    words = ["--pretrained-dir", str(tmp_path / "one"), "--dataset", "random", "--num-transitions", "100"]
    for second, naming in (
        ("HalfCheetah", "--num-transitions 100: HalfCheetah needs at least 2000, two episodes"),
        ("simple_world", "simple_world.pt"),
    ):
        refused(script, tmp_path, *words, "--scenario", "simple_spread", second, naming=naming, what=collect_datasets)


@pytest.mark.parametrize(
    "options, naming, boxed",
    [
        (dict(scenario="nonsense"), "--scenario nonsense", False),
        (dict(dataset=("random", "nonsense")), "nonsense", True),
        (dict(dataset=()), "--dataset : must be at least one name", True),
        (dict(scenario=()), "--scenario : must be at least one name", True),
        (dict(num_transitions=49), "--num-transitions 49", False),
        (dict(num_transitions=-1000), "--num-transitions -1000", False),
        (dict(pretrained_dir="none"), "none", False),
        (dict(nonsense=3), "--nonsense", True),
    ],
    ids=str,
)
def test_bad_input_of_collect_datasets(options, naming, boxed, script, tmp_path, pretrained):
    words = flags(**dict(pretrained_dir=str(pretrained)) | options)
    refused(script, tmp_path, *words, naming=naming, what=collect_datasets, boxed=boxed)
