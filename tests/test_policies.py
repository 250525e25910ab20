"""Policy files: exported, loaded, evaluated, refused and played; those in pretrained/policies earn their returns."""

import itertools
import json
import pickle
import re
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import common
import dom2_mamujoco
import dom2_mpe
import play
from baselines.ma_bc import MA_BC
from baselines.ma_diffusion_ql import MA_DIFFUSION_QL
from dom2_mpe import DOM2, load_policy, train
from experiments import export_policies, report
from mamujoco_env import MujocoEnv
from particle_env import EPISODE_STEPS, parallel_env
from run import Run, parse
from utils import checkpoints, evaluation, policy_files
from utils.checkpoints import load_checkpoint
from utils.policies import TrainedPolicy
from utils.policy_files import POLICIES, read_policy
from utils.program import UserError, load_torch, program

SMALL = dict(num_seeds=2, updates=4, batch_size=8, widths=(8, 8), critic_widths=(8,), eval_interval=4, eval_episodes=4)
COMMITTED = sorted(POLICIES.glob("*.safetensors"))


def the_run(folder):
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir, pretrained):
    """The folder of a finished run of two seeds, with another prey than the one in pretrained/."""
    folder = tmp_path_factory.mktemp("policies")
    places = dict(data_dir=str(data_dir), prey=str(pretrained / "simple_tag.pt"), run_dir=str(folder / "runs"))
    train(DOM2.args("simple_tag", "random", cuda=False, **SMALL, **places))
    return the_run(folder / "runs")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """{dtype: policy file of the run}."""
    files = {}
    for dtype in ("float16", "float32"):
        folder = tmp_path_factory.mktemp(dtype)
        export_policies.export(export_policies.Args((str(run),), str(folder), dtype))
        files[dtype] = folder / "simple_tag-random.safetensors"
    return files


@pytest.fixture
def shelf(exported, tmp_path, monkeypatch):
    """A folder in the place of pretrained/policies that holds simple_tag-random; the current folder is another one."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    shutil.copy(exported["float32"], folder)
    monkeypatch.setattr(policy_files, "POLICIES", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def first_actions(policy):
    obs, _ = parallel_env("simple_tag").reset(seed=0)
    return policy(obs)


def evaluated(words):
    return train(parse(DOM2, "", [*map(str, words), "--no-cuda"]))


# ---- loading and evaluating ----


@pytest.mark.parametrize("seed", [0, 1])
def test_a_policy_file_acts_as_its_run(run, exported, seed):
    expected = first_actions(load_policy(run, seed_index=seed))
    np.testing.assert_equal(first_actions(load_policy(exported["float32"], seed_index=seed)), expected)
    rounded = first_actions(load_policy(exported["float16"], seed_index=seed))
    assert rounded.keys() == expected.keys()
    for name, action in expected.items():
        np.testing.assert_allclose(rounded[name], action, atol=0.01)
    others = first_actions(load_policy(exported["float32"], seed_index=1 - seed))
    assert np.abs(others["adversary_0"] - expected["adversary_0"]).max() > 0.02


def test_a_policy_from_a_file_can_be_pickled(exported):
    policy = load_policy(exported["float16"])
    np.testing.assert_equal(first_actions(pickle.loads(pickle.dumps(policy))), first_actions(policy))


def test_a_policy_file_holds_only_what_acting_needs(run, exported):
    checkpoint, found = load_torch(run / "checkpoint.pt"), read_policy(exported["float32"])
    policy = {name: x for name, x in checkpoint["learners"].items() if name.startswith("target_policy.")}
    assert found["learners"].keys() == policy.keys()
    assert all(torch.equal(found["learners"][name], x) for name, x in policy.items())
    assert all(torch.equal(found["prey"][name], x) for name, x in checkpoint["prey"].items())
    results = json.loads((run / "results.json").read_text())
    assert all(results[name] == value for name, value in found["results"].items())
    assert {"returns", "data", "command", "commit", "num_seeds", "eval_episodes"} <= found["results"].keys()
    rounded = read_policy(exported["float16"])["learners"]
    assert all(x.dtype == torch.float32 for x in rounded.values())
    for name, x in policy.items():
        assert torch.equal(rounded[name], x.half().float() if name.endswith("weight") else x), name
    assert {name: checkpoint["args"][name] for name in ("eta", "beta_max", "prey")}.items() <= found["args"].items()
    assert found["args"]["run_dir"] == "runs" and found["args"]["data_dir"] == "datasets"


def test_evaluating_a_policy_file_reproduces_its_returns(exported, shelf, tmp_path, capsys, monkeypatch):
    """In a run folder of its own, since there is none."""
    whole = exported["float32"].read_bytes()
    for name, folder in (("simple_tag-random", "runs"), (exported["float32"], "elsewhere")):
        capsys.readouterr()
        results = evaluated(["--eval-only", name, "--run-dir", folder])
        run = the_run(tmp_path / "here" / folder)
        assert [file.name for file in run.iterdir()] == ["evaluation.json"]
        assert capsys.readouterr().out.endswith(f"{folder}/{run.name}: evaluation.json\n")
        assert json.loads((run / "evaluation.json").read_text()) == json.loads(json.dumps(results))
        assert results["returns"] == read_policy(exported["float32"])["results"]["returns"]
        assert results["settings"]["eval_only"] == str(name) and results["updates"] == 4
    assert exported["float32"].read_bytes() == whole == (shelf / "simple_tag-random.safetensors").read_bytes()
    monkeypatch.setattr(evaluation, "write_gif", lambda run, path: path.touch())
    evaluated(["--eval-only", "simple_tag-random", "--capture-video", "--eval-episodes", "1", "--run-dir", "video"])
    assert list(the_run(tmp_path / "here" / "video").glob("*.gif"))


def test_names(exported, shelf, run, tmp_path):
    expected = first_actions(load_policy(exported["float32"]))
    np.testing.assert_equal(first_actions(load_policy("simple_tag-random")), expected)
    shutil.copytree(run, "simple_tag-random")  # a folder of this name is meant before pretrained/policies
    (shelf / "simple_tag-random.safetensors").write_bytes(b"")
    np.testing.assert_equal(first_actions(load_policy("simple_tag-random")), expected)


def test_an_unknown_name_lists_those_that_exist(shelf, monkeypatch, capsys):
    shutil.copy(shelf / "simple_tag-random.safetensors", shelf / "simple_world-expert.safetensors")
    for load in (load_policy, dom2_mamujoco.load_policy, TrainedPolicy):
        with pytest.raises(UserError, match=r"^simple_tag-expert: .*: simple_tag-random, simple_world-expert$"):
            load("simple_tag-expert")
    with pytest.raises(SystemExit) as stopped:
        program(lambda: evaluated(["--eval-only", "simple_tag-expert"]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: simple_tag-expert: ") and error.count("\n") == 1


def test_training_on_from_a_policy_file_is_refused(shelf, exported, capsys):
    for name in ("simple_tag-random", str(exported["float16"])):
        with pytest.raises(SystemExit) as stopped:
            program(lambda name=name: evaluated(["--resume", name, "--updates", "9"]))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: --resume {name}: a policy file has no critics")


def test_options_that_a_policy_file_cannot_honour_are_refused(shelf, run, tmp_path):
    for name, value in (("eta", 3.0), ("seed", 7), ("num_seeds", 1), ("prey", "other.pt"), ("track", True)):
        args = replace(load_checkpoint("simple_tag-random", DOM2)[0], eval_only="simple_tag-random", **{name: value})
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} {value}: "):
            train(args)
    with pytest.raises(UserError, match=r"^--run-dir x: "):  # a run folder has its evaluation in itself, as before
        evaluated(["--eval-only", run, "--run-dir", "x"])
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("algorithm", [MA_BC, dom2_mamujoco.DOM2], ids=["ma_bc", "dom2_mamujoco"])
def test_a_policy_file_of_another_script(exported, algorithm):
    with pytest.raises(UserError, match=rf"^{exported['float16']}: made by dom2_mpe.py; use that"):
        load_checkpoint(exported["float16"], algorithm)


def test_a_seed_that_the_file_does_not_hold(exported):
    with pytest.raises(UserError, match=r"seed_index 2: .* holds 2 seeds"):
        load_policy(exported["float16"], seed_index=2)


def test_every_changed_byte_is_noticed(exported, tmp_path):
    whole, file = exported["float16"].read_bytes(), tmp_path / "a.safetensors"
    places = np.random.default_rng(0).integers(len(whole), size=100)
    for place in [*places, 0, 9, len(whole) - 1]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"^{file}: ") as error:
            load_policy(file)
        assert "\n" not in str(error.value)
    for damaged in (b"", whole[:100], whole[:-1], whole + b"x", pickle.dumps({"policy": 1})):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^{file}: not a readable policy file"):
            load_policy(file)


def test_files_of_others(exported, tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=rf"^{file}: no such file"):
        load_policy(file)
    contents = read_policy(exported["float32"])["learners"]
    for metadata in (None, {"format": "pt"}, {"policy": "[]"}, {"policy": "{}"}):
        save_file(contents, file, metadata)
        with pytest.raises(UserError, match=rf"^{file}: not a readable policy file"):
            load_policy(file)


def test_networks_that_do_not_fit_the_options(run, exported, tmp_path):
    contents, file = read_policy(exported["float32"]), tmp_path / "a.safetensors"
    name = next(name for name in contents["learners"] if name.endswith("weight"))
    missing = {k: v for k, v in contents["learners"].items() if k != name}
    changed = contents["learners"] | {name: contents["learners"][name][..., :1]}
    for learners in (missing, changed, contents["learners"] | {"target_policy.more": torch.zeros(6)}):
        policy_files.write_policy(file, contents | {"learners": learners}, contents["results"])
        with pytest.raises(UserError, match=rf"^{file}: its networks do not fit its options"):
            load_policy(file)


# ---- exporting ----


def export(*runs, output, **options):
    export_policies.export(export_policies.Args(tuple(map(str, runs)), str(output), **options))


def test_the_first_seeds_of_a_run(run, exported, tmp_path):
    """Also of a policy file."""
    expected = first_actions(load_policy(run, seed_index=0))
    for number, source in enumerate((run, exported["float32"])):
        export(source, output=tmp_path / str(number), num_seeds=1, dtype="float32")
        file = tmp_path / str(number) / "simple_tag-random.safetensors"
        np.testing.assert_equal(first_actions(load_policy(file)), expected)
        with pytest.raises(UserError, match="holds 1 seed"):
            load_policy(file, seed_index=1)
        returns = json.loads((run / "results.json").read_text())["returns"]
        assert read_policy(file)["results"]["returns"] == {shift: x[:1] for shift, x in returns.items()}
        assert sorted(path.name for path in file.parent.iterdir()) == [file.name]  # the page is of pretrained/policies
    assert (tmp_path / "0" / file.name).read_bytes() == file.read_bytes()  # the same bytes every time


def test_runs_that_cannot_be_exported(run, exported, tmp_path):
    output = tmp_path / "output"
    for number, reason in ((0, "must be at least 1"), (3, ".* holds 2 seeds")):
        with pytest.raises(UserError, match=f"--num-seeds {number}: {reason}"):
            export(run, output=output, num_seeds=number)
    for name in ("", "~/policies"):  # an unset variable of the shell is no request to replace pretrained/policies
        with pytest.raises(UserError, match=f"--output {name}: must be a name"):
            export(run, output=name)
    with pytest.raises(UserError, match=r"another of the runs makes simple_tag-random\.safetensors"):
        export(run, exported["float16"], output=output)
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    results = json.loads((run / "results.json").read_text())
    for change in ("further", "missing"):
        (unfinished / "results.json").write_text(json.dumps(results | {"updates": 3}))
        if change == "missing":
            (unfinished / "results.json").unlink()
        with pytest.raises(UserError, match=rf"^{unfinished}: not finished, or trained further"):
            export(run, unfinished, output=output)
    for file in unfinished.glob("checkpoint*.pt"):
        file.unlink()
    with pytest.raises(UserError, match=rf"^{unfinished}: no run folder"):
        export(unfinished, output=output)
    assert not output.exists()


@pytest.mark.parametrize("algorithm", [MA_BC, MA_DIFFUSION_QL], ids=lambda algorithm: algorithm.name)
def test_only_dom2_is_exported_but_everything_is_played(algorithm, tmp_path, data_dir, capsys):
    """The others may act with more than their policy network: MA-Diffusion-QL chooses by its critics."""
    names = algorithm.Args.__dataclass_fields__
    small = {name: value for name, value in SMALL.items() if name in names} | dict(cuda=False, shift=("none",))
    places = dict(data_dir=str(data_dir), run_dir=str(tmp_path / "runs"))
    train(algorithm.args("simple_spread", "random", **small, **places), algorithm)
    run = the_run(tmp_path / "runs")
    with pytest.raises(UserError, match=rf"^{run}: a run of {algorithm.name}; only DOM2 can be exported"):
        export(run, output=tmp_path / "output")
    play.main(play.Args(str(run), output=str(tmp_path / "a.gif"), steps=2))
    assert Image.open(tmp_path / "a.gif").n_frames == 2


def test_checkpoints_of_no_algorithm(tmp_path):
    for contents in ({"algorithm": "os", "args": {}}, {"algorithm": []}, [1], torch.zeros(3), {}):
        torch.save(contents, tmp_path / "checkpoint.pt")
        with pytest.raises(UserError, match=rf"^{tmp_path}/checkpoint\.pt: no checkpoint of these scripts"):
            TrainedPolicy(tmp_path)


# ---- pretrained/policies ----


def check_returns(file, episodes):
    """Returns of the policies in `episodes` episodes, each seed and environment against the committed result: at most
    four standard errors apart."""
    algorithm, results = TrainedPolicy(file).algorithm, read_policy(file)["results"]
    args, checkpoint = load_checkpoint(file, algorithm)
    run = Run(replace(args, eval_only=str(file), eval_episodes=episodes, cuda=False), algorithm)
    run.learners = algorithm.make_learners(run.args, run.make_env(1))
    checkpoints.restore(run.learners, {}, checkpoint, file)
    for shift, committed in results["returns"].items():
        returns = dom2_mpe.evaluate(run.act, run.evaluation_env(shift), run.args).double()  # [S, episodes]
        error = returns.std(1) * (1 / episodes + 1 / results["eval_episodes"]) ** 0.5
        difference = returns.mean(1) - torch.tensor(committed).double()
        assert (difference.abs() < 4 * error).all(), f"{file.stem}, {shift}: {difference} with errors {error}"


@pytest.mark.parametrize("name", ["simple_tag-medium-replay", "simple_world-random-medium"])
def test_committed_policies_earn_their_returns(name):
    check_returns(POLICIES / f"{name}.safetensors", 200)


def test_wrong_weights_do_not_earn_them(tmp_path):
    """Networks whose agents are exchanged, or that are a tenth off."""
    source = POLICIES / "simple_tag-medium-replay.safetensors"
    contents, file = read_policy(source), tmp_path / source.name
    generator = torch.Generator().manual_seed(0)
    noisy = {k: x + 0.1 * torch.randn(x.shape, generator=generator) for k, x in contents["learners"].items()}
    for learners in ({k: x.roll(1, 0) for k, x in contents["learners"].items()}, noisy):
        policy_files.write_policy(file, contents | {"learners": learners}, contents["results"])
        with pytest.raises(AssertionError, match=r"simple_tag-medium-replay, \w+: "):
            check_returns(file, 200)


@pytest.mark.slow
@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_every_committed_policy_earns_its_returns(file):
    check_returns(file, 16 if read_policy(file)["results"]["scenario"] == "HalfCheetah" else 1000)


def test_the_page_of_committed_policies_is_up_to_date():
    assert (POLICIES / "README.md").read_text() == export_policies.table(POLICIES)


def test_committed_policies_are_small_and_named_after_what_they_are():
    assert len(COMMITTED) >= 2 and sum(file.stat().st_size for file in COMMITTED) < 8_000_000
    for file in COMMITTED:
        algorithm = TrainedPolicy(file).algorithm
        args, checkpoint = load_checkpoint(file, algorithm)
        assert file.stem == f"{common.task_name(args)}-{args.dataset}"
        assert checkpoint["results"]["eval_episodes"] >= (32 if args.scenario == "HalfCheetah" else 1000)
        defaults = algorithm.args(args.scenario, args.dataset)
        if args.seed == report.FIRST_SEED:  # else of the results with earlier settings
            assert args == replace(defaults, seed=args.seed, num_seeds=args.num_seeds), file


def test_the_example_of_the_docs_runs():
    section = (common.ROOT / "docs" / "environments.md").read_text().split("## Trained policies")[1]
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["rewards"].keys() == names["observations"].keys() and not names["env"].agents


# ---- playing ----


def frames(file):
    with Image.open(file) as image:
        for number in range(image.n_frames):
            image.seek(number)
            yield np.asarray(image.convert("RGB"))


def test_play_writes_a_gif(tmp_path, capsys):
    file = tmp_path / "a.gif"
    play.main(play.Args("simple_tag-medium-replay", output=str(file), episodes=2, steps=6, seed=3))
    images = list(frames(file))
    assert len(images) == 2 * 6 and images[0].shape == (300, 300, 3)
    assert all((a != b).any() for a, b in itertools.pairwise(images))
    out = capsys.readouterr().out
    assert "episode 2: return " in out and out.endswith(f"wrote {file}\n")
    again, other = tmp_path / "b.gif", tmp_path / "c.gif"
    play.main(play.Args("simple_tag-medium-replay", output=str(again), episodes=2, steps=6, seed=3))
    assert again.read_bytes() == file.read_bytes()
    play.main(play.Args("simple_tag-medium-replay", output=str(other), seed=4))
    assert len(list(frames(other))) == EPISODE_STEPS and (next(frames(other)) != images[0]).any()


@pytest.mark.parametrize("shift", ["none", "speed"])
def test_play_earns_the_policys_return(shift, monkeypatch, capsys):
    monkeypatch.setattr(play.common.particle_env.TeamEnv, "render", lambda env: None)
    policy, episodes = load_policy("simple_tag-medium-replay"), 60
    list(play.play(policy, play.Args("simple_tag-medium-replay", shift=shift, episodes=episodes)))
    returns = [float(x) for x in re.findall(r"return (\S+), 25 steps", capsys.readouterr().out)]
    (expected,) = read_policy(POLICIES / "simple_tag-medium-replay.safetensors")["results"]["returns"][shift]
    assert len(returns) == episodes
    assert abs(np.mean(returns) - expected) < 4 * np.std(returns) / episodes**0.5 < 50


def test_the_chosen_seed_plays(exported, tmp_path):
    for seed in (0, 1):
        play.main(play.Args(str(exported["float16"]), output=str(tmp_path / f"{seed}.gif"), seed_index=seed, steps=9))
    first, second = (list(frames(tmp_path / f"{seed}.gif")) for seed in (0, 1))
    assert (first[0] == second[0]).all() and (first[-1] != second[-1]).any()


def test_play_shows_a_window(monkeypatch):
    """matplotlib draws off-screen here; closing the window ends the show."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = []

    def pause(seconds):
        (axes,) = pyplot.gcf().axes
        shown.append(np.array(axes.images[0].get_array()))
        if len(shown) == 30:
            pyplot.close()

    monkeypatch.setattr(pyplot, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(pyplot, "pause", pause)
    play.main(play.Args("simple_tag-medium-replay", episodes=2))
    assert len(shown) == 30 and shown[0].shape == (300, 300, 3) and (shown[0] != shown[1]).any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "no window can be opened .*; use --output NAME.gif"),
        (dict(policy="nowhere"), "nowhere: no run folder"),
        (dict(seed_index=1), "seed_index 1: .* holds 1 seed"),
        (dict(shift="extreme"), "--shift extreme: "),
        (dict(output="a.avi"), "a.avi: must end with .gif or .mp4"),
        (dict(output="a.mp4"), "a.mp4: .*imageio.*; run `pip install imageio imageio-ffmpeg`, or write a .gif"),
        (dict(output="nowhere/a.gif"), "--output nowhere/a.gif: there is no such folder"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_play_cannot_do(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # as if it were not installed
    if "shift" in options:
        options = options | dict(output="a.gif")
    with pytest.raises(UserError, match=f"^{message}"):
        play.main(play.Args(**{"policy": "simple_tag-medium-replay"} | options))
    assert not list(tmp_path.iterdir())


def test_play_writes_an_mp4(tmp_path, monkeypatch):
    """Through imageio, of which this test has a stand-in."""
    written = []
    stand_in = types.SimpleNamespace(mimsave=lambda *given, **options: written.append((given, options)))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.ModuleType("imageio_ffmpeg"))
    monkeypatch.setattr("imageio.v2.mimsave", stand_in.mimsave)
    play.main(play.Args("simple_tag-medium-replay", output=str(tmp_path / "a.mp4")))
    ((path, images), options) = written[0]
    assert path == tmp_path / "a.mp4" and len(images) == EPISODE_STEPS and options["fps"] == 10


@pytest.fixture
def robot(data_dir, tmp_path):
    """The folder of a finished run on a robot."""
    places = dict(data_dir=str(data_dir), run_dir=str(tmp_path / "runs"), cuda=False)
    options = SMALL | dict(eval_episodes=1, shift=("extreme",))
    dom2_mamujoco.train(dom2_mamujoco.DOM2.args("Reacher", "random", **options, **places))
    return the_run(tmp_path / "runs")


def test_policies_of_robots(robot, tmp_path):
    export(robot, output=tmp_path, dtype="float32")
    file, obs = tmp_path / "Reacher-random.safetensors", {"agent_0": np.ones(3), "agent_1": np.ones(6)}
    for seed in (0, 1):
        expected = dom2_mamujoco.load_policy(robot, seed_index=seed)(obs)
        np.testing.assert_equal(dom2_mamujoco.load_policy(file, seed_index=seed)(obs), expected)
    words = ["--eval-only", str(file), "--run-dir", str(tmp_path / "again"), "--no-cuda"]
    results = dom2_mamujoco.train(parse(dom2_mamujoco.DOM2, "", words))
    assert results["returns"] == json.loads((robot / "results.json").read_text())["returns"]
    assert load_policy(file)(obs).keys() == obs.keys()
    with pytest.raises(UserError, match=f"^{file}: made by dom2_mamujoco.py; use that"):
        load_checkpoint(file, DOM2)


def test_play_shows_a_robot(robot, tmp_path, monkeypatch, capsys):
    """Every second step. This needs no renderer: a camera that numbers its pictures takes its place."""
    file, numbers = tmp_path / "a.gif", itertools.count()
    monkeypatch.setattr(MujocoEnv, "render", lambda env: np.full((300, 300, 3), 10 * next(numbers), np.uint8))
    monkeypatch.setattr(MujocoEnv, "episode_steps", property(lambda env: 100, lambda env, value: None), raising=False)
    play.main(play.Args(str(robot), output=str(file), shift="extreme", steps=20))
    assert [image.flat[0] for image in frames(file)] == list(range(0, 100, 10))
    assert "20 steps" in capsys.readouterr().out

    def broken(env):
        raise RuntimeError("no off-screen renderer (X); install EGL or OSMesa")

    monkeypatch.setattr(MujocoEnv, "render", broken)
    with pytest.raises(UserError, match=r"no off-screen renderer \(X\); install EGL or OSMesa"):
        play.main(play.Args(str(robot), output=str(file)))


def test_the_camera_follows_a_robot():
    """Far from the start the robot, which is the only brown thing, is still in the picture."""
    pytest.importorskip("OpenGL.EGL", reason="needs a renderer: pip install PyOpenGL, and the system's EGL")
    env = MujocoEnv("HalfCheetah", 1, render_mode="rgb_array")
    env.reset()
    robot = env.robots[0]
    for distance in (0, 32):
        robot.data.qpos[0] += distance
        robot.set_state(robot.data.qpos, robot.data.qvel)
        try:
            image = env.render().astype(int)
        except RuntimeError as error:
            pytest.skip(f"{error}; install EGL")
        assert (image[..., 0] - image[..., 2] > 40).mean() > 0.01


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_a_committed_policy_has_all_that_the_closing_table_shows(file):
    results = read_policy(file)["results"]
    assert f"data: {results['data']['versions'][0]}" in evaluation.closing_table(results, results["scenario"])
