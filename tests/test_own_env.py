"""A ParallelEnv of the user's own: the copies in lockstep, what is refused, all scripts, and the page that shows it."""

import gc
import json
import os
import re
import shlex
import shutil
import sys
import types
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv
from PIL import Image
from test_baselines import BASELINES

import collect_datasets
import common
import dom2_mamujoco
import own_env
from dom2_mpe import DOM2, load_policy, train
from own_env import OwnEnv, from_unit, to_unit
from particle_env import TeamEnv, parallel_env
from record_dataset import Recorder
from run import parse
from utils.program import UserError, program

ROOT = Path(common.__file__).parent
ALGORITHMS = {"dom2": DOM2, "dom2_mamujoco": dom2_mamujoco.DOM2, **BASELINES}
SMALL = ["--updates", "2", "--eval-interval", "1", "--no-cuda"]


class Toy(ParallelEnv):
    """Agents walk from random places; an episode is truncated after `limit` steps or terminates after `fall`."""

    limit, fall, num, box = 6, None, 2, Box(-1, 1, (3,), np.float32)

    def __init__(self, render_mode=None, **changes):
        vars(self).update(changes)
        self.render_mode, self.seeds, self.received = render_mode, [], []
        self.possible_agents = [f"walker_{i}" for i in range(self.num)]
        self.agents = []

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (3,), np.float64)

    def action_space(self, agent):
        return self.box

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.agents, self.t = list(self.possible_agents), 0
        self.place = np.random.default_rng(seed).normal(size=(self.num, 3))
        return self.observations(), {agent: {} for agent in self.agents}

    def observations(self):
        return {agent: self.place[i].copy() for i, agent in enumerate(self.possible_agents)}

    def step(self, actions):
        self.received.append(actions)
        self.t += 1
        self.place += np.stack([actions[agent] for agent in self.possible_agents])
        terminated, truncated = self.t == self.fall, self.t == self.limit
        rewards = {agent: self.place[i, 0] + i for i, agent in enumerate(self.possible_agents)}
        everybody = self.possible_agents
        if terminated or truncated:
            self.agents = []
        flags = dict.fromkeys(everybody, terminated), dict.fromkeys(everybody, truncated)
        return self.observations(), rewards, *flags, {agent: {} for agent in everybody}

    def render(self):
        return np.full((20, 30, 3), 9 * self.t, np.uint8) if self.render_mode == "rgb_array" else None


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """toys(name=function, ...): makes the module `toys` with these functions, the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_env, "COUNTED", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = types.ModuleType("toys")
    monkeypatch.setitem(sys.modules, "toys", module)
    return lambda **functions: vars(module).update(functions)


@pytest.fixture
def script(monkeypatch, capfd):
    """script(algorithm, *words): exit code, output and errors of a program."""

    def script(algorithm, *words):
        monkeypatch.setattr(sys, "argv", ["dom2_mpe.py", *words])
        monkeypatch.setenv("COLUMNS", "1000")
        capfd.readouterr()
        code = 0
        try:
            program(lambda: train(parse(algorithm, "a description"), algorithm))
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return script


def refused(call, *args, match, **kwargs):
    with pytest.raises(UserError, match=match) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def random_actions(env, seed=0):
    return 2 * torch.rand(env.num_envs, env.num_agents, env.action_size, generator=generator(seed)) - 1


def generator(seed):
    return torch.Generator().manual_seed(seed)


def roll(env, steps=None):
    """Observations [T + 1, E, n, d], rewards and terminated of an episode of random actions."""
    obs, rewards, terminated = [env.reset()], [], []
    for t in range(steps or env.episode_steps):
        for values, value in zip((obs, rewards, terminated), env.step(random_actions(env, t)), strict=True):
            values.append(value)
    return torch.stack(obs), torch.stack(rewards), torch.stack(terminated)


# ---- the copies ----


def test_interface_is_that_of_the_other_environments(toys):
    toys(make=lambda: Toy(num=3))
    env = common.make_env("toys:make", 5, seed=1)
    assert isinstance(env, OwnEnv) and env.agents == ("walker_0", "walker_1", "walker_2") and env.state is None
    assert (env.num_envs, env.num_agents, env.obs_size, env.action_size, env.episode_steps) == (5, 3, 3, 3, 6)
    assert env.obs_sizes == (3, 3, 3) and env.device == torch.device("cpu")
    obs, rewards, terminated = roll(env)
    assert obs.shape == (7, 5, 3, 3) and rewards.shape == (6, 5, 3) and terminated.shape == (6, 5)
    assert (obs.dtype, rewards.dtype, terminated.dtype) == (torch.float32, torch.float32, torch.bool)
    assert not terminated.any()


def test_steps_are_the_environments_own(toys):
    toys(make=Toy)
    env = OwnEnv("toys:make", 3, seed=4)
    obs, rewards, _ = roll(env)
    for i, copy in enumerate(env.envs):
        alone = Toy()
        theirs = list(alone.reset(seed=copy.seeds[-1])[0].values())
        np.testing.assert_allclose(obs[0, i], np.stack(theirs), rtol=1e-6)
        for t in range(6):
            actions = random_actions(env, t)[i].numpy()
            theirs, reward, *_ = alone.step(dict(zip(env.agents, actions, strict=True)))
            np.testing.assert_allclose(obs[t + 1, i], np.stack(list(theirs.values())), rtol=1e-6)
            np.testing.assert_allclose(rewards[t, i], list(reward.values()), rtol=1e-6)


def test_our_own_environment_is_the_same_as_its_own_batch(toys):
    toys(make=lambda: parallel_env("simple_spread", num_agents=5))
    env, team = OwnEnv("toys:make", 4), TeamEnv("simple_spread", 4, num_agents=5)
    obs, team_obs = env.reset(), team.reset()
    worlds = [copy.world for copy in env.envs]
    state = [torch.cat([getattr(w, name) for w in worlds]) for name in ("agent_pos", "agent_vel", "landmark_pos")]
    team_obs = torch.stack(team.world.set_state(*state), 1)
    for t in range(25):
        torch.testing.assert_close(obs, team_obs)
        obs, rewards, terminated = env.step(random_actions(env, t))
        team_obs, team_rewards, team_terminated = team.step(random_actions(env, t))
        torch.testing.assert_close(rewards, team_rewards)
        assert torch.equal(terminated, team_terminated)


def test_seeds(toys):
    """First states depend on the seed, the number of the copy and the number of the reset, and on nothing else."""
    toys(make=Toy)

    def first(num_envs, seed):
        env = OwnEnv("toys:make", num_envs, seed=seed)
        obs = torch.stack([env.reset() for _ in range(2)])
        assert all(type(s) is int and 0 <= s < 2**31 for copy in env.envs for s in copy.seeds)
        return obs

    a = first(3, 7)  # also counts the steps of an episode
    assert torch.equal(a, first(3, 7)) and torch.equal(a[:, :2], first(2, 7))
    everything = torch.cat([a.flatten(0, 1), first(3, 8).flatten(0, 1)]).flatten(1)
    assert len(everything.unique(dim=0)) == 12


@pytest.mark.parametrize("box", [Box(0, 1, (2,)), Box(np.array([-2, 3.0]), np.array([6, 3.1]), dtype=np.float64)])
def test_actions_are_scaled_to_the_box(box, toys):
    for value, bound in ((-1, box.low), (1, box.high)):
        np.testing.assert_allclose(from_unit(box, np.full(2, value)), bound, rtol=1e-14)
        np.testing.assert_allclose(to_unit(box, bound), np.full(2, value), atol=1e-6)
    np.testing.assert_allclose(from_unit(box, np.zeros((4, 2))), np.tile((box.low + box.high) / 2, (4, 1)), rtol=1e-6)
    unit = random_actions(types.SimpleNamespace(num_envs=9, num_agents=1, action_size=2)).numpy()
    assert from_unit(box, unit).dtype == box.dtype and to_unit(box, unit).dtype == np.float32
    assert all(box.contains(action[0]) for action in from_unit(box, unit))
    np.testing.assert_allclose(to_unit(box, from_unit(box, unit)), unit, atol=1e-5)
    assert from_unit(box, [-1.5, 1.5]).tolist() == [box.low[0], box.high[1]]
    assert (np.abs(to_unit(box, 2 * box.high - box.low)) > 2.9).all()  # nothing is clipped

    toys(make=lambda: Toy(box=Box(0, 1, (3,))))
    env = OwnEnv("toys:make", 2)
    env.reset()
    env.step(torch.tensor([-1.0, 0.0, 1.0]).expand(2, 2, 3))
    for copy in env.envs:
        for action in copy.received[-1].values():
            assert action.dtype == np.float32 and action.tolist() == [0, 0.5, 1]


def test_actions_of_another_shape_or_not_finite(toys):
    toys(make=Toy)
    env, box = OwnEnv("toys:make", 4), Box(0, 1, (3,))
    env.reset()
    for shape in ((4, 2, 1), (4, 2), (1, 2, 3), (4, 3, 2)):
        with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}, expected \(4, 2, 3\)"):
            env.step(torch.zeros(shape))
    with pytest.raises(ValueError, match="NaN or infinity"):
        env.step(torch.full((4, 2, 3), torch.nan))
    for convert in (from_unit, to_unit):
        for action in (0.5, np.zeros(1), np.zeros((3, 2)), [0, 0, np.inf]):
            with pytest.raises(ValueError, match=r"expected finite numbers \[..., 3\]"):
                convert(box, action)
    with pytest.raises(ValueError, match="num_envs 0"):
        OwnEnv("toys:make", 0)


def test_actions_in_our_box_stay_bit_for_bit():
    box, action = Box(-1, 1, (4,)), np.array([-1, 1e-30, 0.1, 1], np.float32)
    for convert in (from_unit, to_unit):
        assert convert(box, action).tobytes() == action.tobytes()


@pytest.mark.parametrize("box", [Box(-np.inf, np.inf, (2,)), Box(0, np.inf, (2,)), Box(1, 1, (2,))], ids=str)
def test_boxes_without_a_width_are_refused(box, toys):
    for convert in (from_unit, to_unit):
        refused(convert, box, np.zeros(2), match="finite bounds")
    toys(make=lambda: Toy(box=box))
    refused(OwnEnv, "toys:make", match="--scenario toys:make: walker_0: .*finite bounds")


# ---- how episodes end ----


def test_a_terminated_copy_stands_still(toys):
    falls = count()
    toys(make=lambda: Toy(fall=3 if next(falls) == 1 else None))
    env = OwnEnv("toys:make", 3)
    for _ in range(2):
        obs, rewards, terminated = roll(env)
        assert torch.equal(terminated.sum(0), torch.tensor([0, 4, 0])) and terminated[2, 1]
        assert (rewards[3:, 1] == 0).all() and (rewards[:3, 1] != 0).all() and (rewards[:, [0, 2]] != 0).all()
        assert torch.equal(obs[3, 1], obs[6, 1]) and not torch.equal(obs[3, 0], obs[4, 0])
        assert len(env.envs[1].received) == len(env.envs[2].received) // 2


@pytest.mark.parametrize("ends", [dict(fall=4, limit=None, episode_steps=9), dict(limit=4)], ids=str)
def test_agents_may_vanish_from_the_last_observations(ends, toys):
    class Vanishing(Toy):
        def observations(self):
            return super().observations() if self.agents else {}

    toys(make=lambda: Vanishing(**ends))
    env = OwnEnv("toys:make", 2)
    obs, rewards, terminated = roll(env, 4)
    assert torch.equal(obs[4], obs[3]) and (rewards[3] != 0).all() and bool(terminated[3].all()) == ("fall" in ends)
    assert env.episode_steps == ends.get("episode_steps", 4)


def changed(method, change):
    """A Toy whose method returns something else: `change` gets the environment and what it returned, as a list."""

    def wrapped(self, *args, **kwargs):
        returned = list(getattr(Toy, method)(self, *args, **kwargs))
        return change(self, returned) or tuple(returned)

    return type("Changed", (Toy,), {method: wrapped})


def later(t, do):
    return lambda env, returned: do(env, returned) if env.t == t else None


def forget(values):
    del values["walker_1"]


def leave(env, returned):
    env.agents = env.agents[1:]


UNSUITABLE_EPISODES = {
    "left": (changed("step", later(2, leave)), "walker_0 left in step 2, before the others; .*black_death"),
    "terminated": (changed("step", later(2, lambda env, x: x[2].update(walker_1=True))), "walker_1 left in step 2"),
    "truncated": (changed("step", later(2, lambda env, x: x[3].update(walker_1=True))), "walker_1 left in step 2"),
    "no observation": (
        changed("step", later(2, lambda env, x: x[0].__delitem__("walker_1"))),
        "of walker_1 is missing",
    ),
    "no reward": (
        changed("step", later(6, lambda env, x: x[1].__delitem__("walker_1"))),
        "step 6 gave an agent no finite",
    ),
    "NaN reward": (changed("step", later(2, lambda env, x: x[1].update(walker_1=np.nan))), "step 2 gave .*no finite"),
    "NaN": (changed("step", later(2, lambda env, x: x[0].update(walker_1=np.full(3, np.nan)))), "NaN or infinity"),
    "shape": (changed("step", later(2, lambda env, x: x[0].update(walker_1=np.ones(1)))), r"shape \(1,\), expected"),
    "first": (changed("reset", lambda env, x: x[0].pop("walker_1")["x"]), "failed with IndexError.* line "),
    "old reset": (changed("reset", lambda env, x: x[0]), r"reset\(\) returned no tuple of 2 dicts"),
    "old step": (changed("step", lambda env, x: (x[0], x[1], x[2], x[4])), r"step\(\) returned no tuple of 5 dicts"),
    "raises": (changed("step", later(3, lambda env, x: 1 / 0)), r"step\(\) failed with ZeroDivision.*test_own_env.py"),
}


@pytest.mark.parametrize("name", UNSUITABLE_EPISODES)
def test_unsuitable_episodes(name, toys):
    make, match = UNSUITABLE_EPISODES[name]
    toys(make=make)
    refused(OwnEnv, "toys:make", match=f"--scenario toys:make: .*{match}")


def test_time_limit(toys, monkeypatch):
    made = []

    def make(**changes):
        made.append(Toy(**changes))
        return made[-1]

    falls_sometimes = type(
        "",
        (Toy,),
        {"reset": lambda self, seed: vars(self).update(fall=None if seed % 2 else 2) or Toy.reset(self, seed)},
    )
    toys(counted=lambda: make(limit=8), given=lambda: make(limit=8, episode_steps=8), falling=falls_sometimes)
    assert [OwnEnv("toys:counted").episode_steps for _ in range(2)] == [8, 8]
    assert [len(env.received) for env in made] == [8, 0]  # counted once
    assert [OwnEnv("toys:given").episode_steps for _ in range(2)] == [8, 8]
    assert [len(env.received) for env in made[2:]] == [8, 0]  # played once as well
    toys(numpy=lambda: make(limit=8, episode_steps=np.int64(8)))
    assert OwnEnv("toys:numpy").episode_steps == 8
    assert OwnEnv("toys:falling").episode_steps == 6

    toys(endless=lambda: Toy(limit=None), fatal=lambda: Toy(fall=1), nonsense=lambda: Toy(episode_steps=0))
    monkeypatch.setattr(own_env, "LONGEST", 50)
    refused(OwnEnv, "toys:endless", match="none within 50 steps.*attribute episode_steps")
    refused(OwnEnv, "toys:fatal", match="ten episodes .* terminated.*attribute episode_steps")
    refused(OwnEnv, "toys:nonsense", match="attribute episode_steps 0: must be at least 1")


@pytest.mark.parametrize("given, found", [(5, "went on after 5 steps"), (7, "was cut off after 6 steps")])
def test_episodes_have_one_time_limit(given, found, toys):
    toys(make=lambda: Toy(episode_steps=given))
    refused(OwnEnv, "toys:make", match=f"an episode {found}, but the time limit is {given} steps")


# ---- functions and environments that do not fit ----


class Empty(Toy):
    def observation_space(self, agent):
        return Box(-1, 1, (0,))


ONE = Toy()
UNSUITABLE = {
    "nothing": (lambda: None, "returned an object of class NoneType, no PettingZoo ParallelEnv"),
    "discrete": (lambda: Toy(box=Discrete(5)), r"actions of walker_0 are Discrete\(5\).*continuous_actions=True"),
    "integers": (lambda: Toy(box=Box(0, 4, (2,), np.int32)), "not a Box of floats"),
    "image": (lambda: Toy(box=Box(0, 1, (2, 2))), "not a Box of floats"),
    "argument": (lambda size: None, "the function failed with TypeError.*'size'.*called without arguments.*mend it"),
    "no agents": (
        lambda: type("", (ParallelEnv,), {})(),
        r"reading agents and spaces failed .*possible_agents'; mend it",
    ),
    "no seed": (lambda: type("", (Toy,), {"reset": lambda self: None})(), r"reset\(\) failed .*called with seed="),
    "raises": (lambda: 1 / 0, "the function failed with ZeroDivisionError.*test_own_env.py, line"),
    "two lines": (lambda: exec("raise OSError('a\\nb')"), "OSError: a b"),
    "nobody": (lambda: Toy(num=0), "no agent"),
    "the same": (lambda: ONE, "two calls returned one object"),
    "not a function": ("text", "has no function"),
    "exits": (lambda: sys.exit(0), "the function failed with SystemExit: 0 .*test_own_env.py, line"),
    "no observations": (lambda: Empty(), r"observations of walker_0 are Box\(.*neither can be empty"),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_unsuitable_functions(name, toys):
    function, match = UNSUITABLE[name]
    toys(make=function)
    refused(common.make_env, "toys:make", 2, match=f"^--scenario toys:make: .*{match}")


def test_agents_of_unequal_sizes(toys):
    class Unequal(Toy):
        def observation_space(self, agent):
            return Box(-1, 1, (3 + ("1" in agent) * self.more,))

        def action_space(self, agent):
            return Box(-1, 1, (2 + ("1" in agent) * (not self.more),))

    toys(obs=lambda: Unequal(more=1), actions=lambda: Unequal(more=0))
    refused(OwnEnv, "toys:obs", match=r"sizes of observations differ \(walker_0 3, walker_1 4\).*pad")
    refused(OwnEnv, "toys:actions", match=r"sizes of actions differ \(walker_0 2, walker_1 3\).*pad")
    numbers = count(2)
    toys(growing=lambda: Toy(num=next(numbers)))
    refused(OwnEnv, "toys:growing", 2, match="two calls returned different agents")


def test_modules_are_found_in_the_current_folder(toys, tmp_path):
    refused(OwnEnv, "my_mod:f", match=f"there is no module my_mod .*{re.escape(str(tmp_path))}.*PYTHONPATH")
    (tmp_path / "my_mod").mkdir()
    (tmp_path / "my_mod" / "envs.py").write_text("from test_own_env import Toy\nmake = Toy\n")
    (tmp_path / "my_mod" / "broken.py").write_text("x = 1\nimport no_such_module\n")
    assert OwnEnv("my_mod.envs:make").num_agents == 2
    refused(OwnEnv, "my_mod.envs:other", match=r"envs.py has no function other")
    refused(OwnEnv, "my_mod.none:make", match="there is no module my_mod.none")
    refused(
        OwnEnv,
        "my_mod.broken:make",
        match="importing my_mod.broken failed with ModuleNotFoundError: .*broken.py, line 2",
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "my_mod"]:
        del sys.modules[name]


def test_shifts_are_refused_by_name(toys, script, tmp_path):
    toys(make=Toy)
    assert OwnEnv("toys:make", shift="none").episode_steps == 6
    for shift in ("speed", "extreme"):
        refused(common.make_env, "toys:make", shift=shift, match=f"^--shift {shift}: toys:make .*no shifts")
        code, _, err = script(DOM2, "--scenario", "toys:make", "--shift", shift)
        assert code == 2 and err.startswith(f"error: --shift {shift}") and not os.listdir(tmp_path)


# ---- the scripts ----


def write_data(folder, env, episodes=5):
    """Random data of an OwnEnv in the datasets' layout."""
    folder.mkdir(parents=True)
    block, _ = collect_datasets.rollout(env, collect_datasets.behaviour_actions(env, None, generator(0), 0))
    for name, values in block.items():
        for agent, column in enumerate(values.numpy()):
            np.save(folder / f"{name}_{agent}.npy", column)


@pytest.fixture
def data(toys, tmp_path):
    toys(make=lambda: Toy(), drawing=Toy)
    for name in ("make", "drawing"):
        write_data(tmp_path / "mine" / f"toys.{name}" / "random" / "seed_0_data", OwnEnv(f"toys:{name}", 5))
    return ["--dataset", "random", "--data-dir", "mine", "--eval-episodes", "3", *SMALL]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_there(name, data, script, tmp_path):
    small = ["--batch-size", "32"] + (["--window", "4"] if name == "ma_sfbc" else [])
    code, out, err = script(ALGORITHMS[name], "--scenario", "toys:make", *data, *small)
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert "toys.make-random" in run.name and ":" not in run.name
    results = json.loads((run / "results.json").read_text())
    assert results["scenario"] == "toys:make" and list(results["returns"]) == ["none"]
    assert results["data"]["transitions"] == 30
    row = next(line for line in out.splitlines() if line.startswith("standard"))
    assert row.split()[2] == row.split()[-1] == "-"  # no normalised score, no paper's result


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unknown_names_are_answered_with_the_known_ones(name, toys, script):
    for scenario in ("nonsense", "toys", "toys:", ":make", "a:b:c", "my-envs:f", "envs.py:f()", "a..b:f"):
        code, _, err = script(ALGORITHMS[name], "--scenario", scenario)
        assert code == 2 and err.startswith(f"error: --scenario {scenario}: must be one of ") and err.count("\n") == 1
        assert "HalfCheetah" in err or "landmarks6" in err
        assert "or module:function, an environment of your own (docs/own-environment.md)" in err


@pytest.mark.parametrize("name", ALGORITHMS)
def test_default_settings(name):
    args = ALGORITHMS[name].args("toys:make", "medium")
    assert (args.shift, args.eval_episodes) == (("none",), 100)
    assert ALGORITHMS[name].args("toys:make", shift=("speed",)).shift == ("speed",)
    if name == "ma_diffusion_ql":  # what makes it this algorithm
        assert args.prediction == "noise" and args.zeta == 0


def test_runs_go_on_and_are_evaluated_again(data, script, tmp_path, toys):
    assert script(DOM2, "--scenario", "toys:make", *data)[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    first = json.loads((run / "results.json").read_text())
    assert script(DOM2, "--eval-only", str(run))[0] == 0
    assert json.loads((run / "evaluation.json").read_text())["returns"] == first["returns"]

    assert script(DOM2, "--resume", str(run), "--updates", "4")[0] == 0
    shutil.move(run, tmp_path / "continued")
    assert script(DOM2, "--scenario", "toys:make", *data, "--updates", "4")[0] == 0
    (whole,) = (tmp_path / "runs").iterdir()
    runs = [json.loads((run / "results.json").read_text()) for run in (tmp_path / "continued", whole)]
    assert runs[0]["returns"] == runs[1]["returns"] != first["returns"]

    for words, named in (["--shift", "speed"], "--shift speed"), (["--scenario", "toys:drawing"], "--scenario"):
        code, _, err = script(DOM2, "--eval-only", str(whole), *words)
        assert code == 2 and named in err


def test_policies_act_by_name_in_the_environments_box(data, script, tmp_path, toys):
    assert script(DOM2, "--scenario", "toys:make", *data)[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    obs = Toy().reset(seed=0)[0]
    plain = load_policy(run)(obs)
    assert plain.keys() == obs.keys() and all(a.shape == (3,) and np.abs(a).max() <= 1 for a in plain.values())
    toys(make=lambda: Toy(box=Box(0, 10, (3,))))
    scaled = load_policy(run)(dict(reversed(obs.items())))
    for agent in obs:
        np.testing.assert_allclose(scaled[agent], 5 + 5 * plain[agent], rtol=1e-5)
    refused(load_policy(run), {"walker_0": obs["walker_0"]}, match="expected walker_0, walker_1")
    del sys.modules["toys"]
    refused(load_policy, run, match="there is no module toys")


def named(agents):
    env = Toy()
    env.possible_agents = agents
    return env


def test_agents_of_other_names_or_in_another_order_are_refused(data, script, tmp_path, toys):
    """A learner belongs to an agent's name, in a run as in a recording."""
    small = ["--dataset", "random", "--eval-episodes", "3", *SMALL]
    with Recorder(Toy(), "toys:make", "random") as env:
        for _ in range(3):
            env.reset()
            while env.agents:
                env.step({agent: env.action_space(agent).sample() for agent in env.agents})
    assert script(DOM2, "--scenario", "toys:make", "--data-dir", "my_data", *small)[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    for names in (["walker_1", "walker_0"], ["a", "b"]):
        toys(make=lambda names=names: named(names))
        told = f"has agents walker_0, walker_1, the environment {', '.join(names)}; let possible_agents"
        for words in (["--eval-only", str(run)], ["--resume", str(run), "--updates", "3"]):
            code, _, err = script(DOM2, *words)
            assert code == 2 and err.startswith(f"error: {run} {told}")
        refused(load_policy, run, match=told)
        code, _, err = script(DOM2, "--scenario", "toys:make", "--data-dir", "my_data", *small)
        assert code == 2 and f"seed_0_data {told}" in err


def test_copies_are_closed(data, script, tmp_path, toys):
    made, closed = [], []

    class Simulator(Toy):
        def __init__(self):
            super().__init__()
            made.append(id(self))

        def close(self):
            closed.append(id(self))
            raise OSError("closed twice")  # which must not end the program

    toys(make=Simulator)
    assert script(DOM2, "--scenario", "toys:make", *data)[0] == 0
    gc.collect()
    assert len(made) > 3 and sorted(closed) == sorted(made)


def test_a_return_that_is_not_finite_is_an_error(data, script, toys):
    code, _, err = script(DOM2, "--scenario", "toys:make", *data, "--temperature", "1e308")
    assert (code == 2 and "not finite" in err) or "NaN or infinity" in err


def test_faults_show_before_the_training(data, script, tmp_path, toys):
    """One object for all copies, and a wrong time limit: nothing has been trained, and nothing is written."""
    toys(same=lambda: ONE, long=lambda: Toy(episode_steps=9))
    for name, fault in (("same", "two calls returned one object"), ("long", "was cut off after 6 steps")):
        shutil.copytree(tmp_path / "mine" / "toys.make", tmp_path / "mine" / f"toys.{name}")
        code, _, err = script(DOM2, "--scenario", f"toys:{name}", *data)
        assert code == 2 and fault in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_actions_in_the_environments_range_are_reported(data, script, tmp_path, toys):
    """Those of Box(0, 1) are allowed actions of a dataset as well, so this is no error."""
    toys(make=lambda: Toy(box=Box(0, 1, (3,))))
    folder = tmp_path / "mine" / "toys.make" / "random" / "seed_0_data"
    assert "its own range" not in script(DOM2, "--scenario", "toys:make", *data)[2]
    for agent in range(2):
        np.save(folder / f"acs_{agent}.npy", np.load(folder / f"acs_{agent}.npy") / 2 + 0.5)
    code, _, err = script(DOM2, "--scenario", "toys:make", *data)
    told = [line for line in err.splitlines() if "its own range" in line]
    assert code == 0 and len(told) == 2 and "all actions of walker_1 lie in its own range Box(0.0, 1.0" in told[1]


class Grey(Toy):
    def render(self):
        return np.zeros((20, 30, 1), np.uint8)


def test_a_gif_where_the_environment_draws(data, script, tmp_path, toys):
    def without_renderer(render_mode=None):
        if render_mode:
            raise OSError("no display")
        return Toy()

    def run_of(scenario):
        code, out, err = script(DOM2, "--scenario", scenario, *data, "--capture-video")
        assert code == 0 and "standard" in out, err
        return sorted((tmp_path / "runs").glob(f"*{scenario.partition(':')[2]}*"))[-1], out

    run, out = run_of("toys:drawing")
    with Image.open(run / "policy.gif") as gif:
        assert gif.size == (30, 20) and gif.n_frames == 24  # four episodes of six steps
    run, out = run_of("toys:make")
    assert not (run / "policy.gif").exists() and "--capture-video: render() of toys:make returned no image" in out
    toys(drawing=lambda render_mode=None: Grey(render_mode))
    run, out = run_of("toys:drawing")
    assert "--capture-video: render() of toys:drawing returned no image" in out
    toys(drawing=without_renderer)
    run, out = run_of("toys:drawing")
    assert "--capture-video: --scenario toys:drawing: the function failed with OSError: no display" in out


def test_data_are_never_made(toys, script, tmp_path):
    toys(make=Toy)
    for data_dir in ("datasets", "mine"):
        code, _, err = script(DOM2, "--scenario", "toys:make", "--dataset", "random", "--data-dir", data_dir)
        folder = os.path.join(data_dir, "toys.make", "random")
        assert (
            code == 2 and err == f"error: {folder}: no such dataset; docs/own-environment.md shows how to record it\n"
        )
    refused(collect_datasets.collect, "toys:make", "random", tmp_path, match="toys:make: .*shows how to record it")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("words", [("--agent-conf", "6x1"), ("--agent-obsk", "1")], ids=" ".join)
def test_options_of_robots_are_refused(words, toys, script):
    toys(make=Toy)
    for algorithm, scenario in ((dom2_mamujoco.DOM2, "toys:make"), (BASELINES["omar"], "simple_spread")):
        code, _, err = script(algorithm, "--scenario", scenario, *words)
        assert code == 2 and err.startswith(f"error: {words[0]}: {scenario} has no joints") and err.count("\n") == 1
    code, _, err = script(BASELINES["omar"], "--scenario", "toys:make", "--prey", "x.pt")
    assert code == 2 and "toys:make has no prey" in err


# ---- docs/own-environment.md ----


def test_the_page_from_end_to_end(toys, script, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "own-environment.md").read_text()
    make, record, act = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "my_envs.py").write_text(make)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    render = OwnEnv.render
    monkeypatch.setattr(OwnEnv, "render", lambda *args: render(*args)[::20, ::20].copy())  # a large GIF takes seconds
    exec(compile(record.replace("10_000", "100"), "record", "exec"), {})
    assert (tmp_path / "mine" / "my_envs.spread5" / "random" / "seed_0_data").is_dir()  # as the page says
    actions = np.load(tmp_path / "mine" / "my_envs.reference" / "random" / "seed_0_data" / "acs_0.npy")
    assert actions.shape == (100, 15) and actions.min() < -0.9 and actions.max() > 0.9
    commands = re.findall(r"^    python (\S+)\.py (.*)$", page, re.M)
    assert len(commands) == 3
    for program_name, words in commands:
        algorithm = ALGORITHMS.get(program_name.removeprefix("baselines/"), DOM2)
        code, out, err = script(algorithm, *shlex.split(words), "--eval-episodes", "2", "--batch-size", "32", *SMALL)
        assert code == 0, err
        assert "standard" in out
    (spread,) = (tmp_path / "runs").glob("dom2-my_envs.spread5-*")
    assert json.loads((spread / "results.json").read_text())["data"]["transitions"] == 100
    (run,) = (tmp_path / "runs").glob("dom2-my_envs.reference-*")
    assert (run / "policy.gif").exists()
    spaces = {}
    exec(compile(act.replace("runs/NAME", str(run)), "act", "exec"), spaces)
    assert not spaces["env"].agents and spaces["truncations"] == {"agent_0": True, "agent_1": True}
