"""Datasets from elsewhere: every format gives the arrays that were in it, recordings give what happened, and nothing is
cut, padded, reordered or invented without a word."""

import errno
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import tensorstore
import torch
from gymnasium.spaces import Box, Dict, Discrete
from minari.data_collector import EpisodeBuffer
from mpe2.simple_spread import simple_spread
from pettingzoo import ParallelEnv
from pettingzoo.utils import BaseParallelWrapper

import common
import dom2_mamujoco
import dom2_mpe
import mamujoco_env
from import_dataset import Args, import_dataset
from mamujoco_env import make_robots
from particle_env import parallel_env
from record_dataset import Recorder, record
from utils.data import load_data
from utils.program import UserError

ROOT = Path(__file__).resolve().parents[1]
HOPPER = {"scenario": "Hopper", "agent_conf": "3x1", "agent_obsk": 1}
HOPPER_TASK = "Hopper-3x1-obsk1"
SIZES = (3, 4, 3)  # of the hopper's three agents


def load(data_dir, task, dataset="random"):
    return common.load_dataset(common.dataset_path(data_dir, task, dataset), common.make_env(task))


def import_to(tmp_path, source, path, scenario, dataset="random", **options):
    return import_dataset(Args(source, str(path), scenario, dataset, data_dir=str(tmp_path / "data"), **options))


def refused(match, call, *args, **options):
    """The call ends with one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


# ---- episodes that the tests know ----


class Episodes(list):
    """Episodes as dicts: obs {agent: [T + 1, d]}, state [T + 1, s] or None, action {agent: [T, A]}, whole [T, n A],
    reward {agent: [T]}, terminated."""

    def stacked(self, part, end=None):
        """One long array [rows, agents, width] of a part, narrow agents padded with zeros; `end` leaves out a row."""
        agents = list(self[0][part])
        width = (
            max(np.atleast_3d(self[0][part][a]).shape[1] for a in agents) if self[0][part][agents[0]].ndim > 1 else 0
        )

        def padded(x):
            return np.pad(x, ((0, 0), (0, width - x.shape[1]))) if width else x

        return np.concatenate([np.stack([padded(e[part][a][:end]) for a in agents], 1) for e in self])

    def long(self, part, rows=slice(None)):
        """The episodes' arrays of a part one after the other: one array, or {agent: array}."""
        if isinstance(self[0][part], dict):
            return {agent: np.concatenate([e[part][agent][rows] for e in self]) for agent in self[0][part]}
        return np.concatenate([e[part][rows] for e in self])

    def flags(self, terminated):
        """A flag in the last step of the episodes that did or did not terminate, [rows]."""
        ends = [np.arange(len(e["whole"])) == len(e["whole"]) - 1 for e in self]
        return np.concatenate([end & (e["terminated"] == terminated) for e, end in zip(self, ends, strict=True)])


def play(env, episodes, state=None, longest=10**9, seed=0):
    """Random episodes of a ParallelEnv."""
    played, rng = Episodes(), np.random.default_rng(seed)
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        agents, states = list(obs), [state()] if state else []
        seen, acts, rewards, over = [obs], [], [], False
        while not over and len(acts) < longest:
            acts.append({a: rng.uniform(-1, 1, env.action_space(a).shape).astype(np.float32) for a in agents})
            obs, reward, terminations, truncations, _ = env.step(acts[-1])
            seen, rewards = [*seen, obs], [*rewards, reward]
            states += [state()] if state else []
            over = any(terminations.values()) or any(truncations.values())
        action = {a: np.stack([x[a] for x in acts]) for a in agents}
        played.append(
            {
                "obs": {a: np.stack([x[a] for x in seen]) for a in agents},
                "state": np.stack(states) if state else None,
                "action": action,
                "whole": np.concatenate(list(action.values()), 1),  # the hopper's joints are in the agents' order
                "reward": {a: np.array([x[a] for x in rewards]) for a in agents},
                "terminated": bool(any(terminations.values())),
            }
        )
    return played


@pytest.fixture(scope="module")
def hopper():
    """Five episodes of the hopper, all of which it ends by falling."""
    env = make_robots(HOPPER_TASK, 1, None)[0]
    played = play(env, 5, env.state)
    assert all(e["terminated"] for e in played)
    return played


@pytest.fixture(scope="module")
def cheetah():
    """Two episodes of the half cheetah, which ends none before the time limit; its library orders the joints anew."""
    env = make_robots("HalfCheetah", 1, None)[0]
    played = play(env, 2, env.state)
    for e in played:
        e["whole"] = np.stack(
            [env.map_local_actions_to_global_action({a: x[t] for a, x in e["action"].items()}) for t in range(1000)]
        )
    return played


@pytest.fixture(scope="module")
def tag():
    """Four episodes of predator-prey, prey included."""
    return play(parallel_env("simple_tag"), 4)


def check(data, played, agents, end=None):
    """A loaded dataset holds the episodes; with `end` -1 without their last transitions."""
    for i, agent in enumerate(agents):
        expected = {
            "obs": np.concatenate([e["obs"][agent][:-1][:end] for e in played]),
            "next_obs": np.concatenate([e["obs"][agent][1:][:end] for e in played]),
            "action": np.concatenate([e["action"][agent][:end] for e in played]),
            "reward": np.concatenate([e["reward"][agent][:end] for e in played]),
        }
        for name, x in expected.items():
            found = getattr(data, name)[i].numpy()
            if name in ("obs", "next_obs"):
                assert not found[:, x.shape[1] :].any()
                found = found[:, : x.shape[1]]
            np.testing.assert_array_equal(found, x.astype(np.float32), err_msg=f"{name} of {agent}")
    lengths = [len(e["whole"][:end]) for e in played]
    assert data.lengths.tolist() == lengths
    done = torch.zeros(sum(lengths))
    done[[sum(lengths[: k + 1]) - 1 for k in range(len(lengths)) if played[k]["terminated"]]] = 1
    assert torch.equal(data.done, done.expand(len(agents), -1))


# ---- unequal observation sizes and episodes that were cut short, on disk ----


def write_hopper(folder, played, padded=(), change=lambda name, x: x):
    """The hopper's data as the library gives them, 3, 4 and 3 numbers; agents in `padded` have 4."""
    folder = common.dataset_path(folder, HOPPER_TASK, "random")
    folder.mkdir(parents=True)
    for i, agent in enumerate(played[0]["obs"]):
        obs, following = (played.long("obs", rows)[agent] for rows in (slice(0, -1), slice(1, None)))
        width = ((0, 0), (0, 4 - SIZES[i] if i in padded else 0))
        arrays = {
            "obs": np.pad(obs, width),
            "next_obs": np.pad(following, width),
            "acs": played.long("action")[agent],
            "rews": played.long("reward")[agent],
            "dones": played.flags(True).astype(float),
        }
        for name, x in arrays.items():
            np.save(folder / f"{name}_{i}.npy", change(f"{name}_{i}", x))


@pytest.mark.parametrize("padded", [(), (0,), (0, 1, 2)])
def test_own_data_of_agents_with_unequal_observations_are_padded_on_loading(padded, hopper, tmp_path):
    write_hopper(tmp_path, hopper, padded)
    data = load(tmp_path, HOPPER_TASK)
    assert data.obs.shape == (3, len(data.reward[0]), 4)
    check(data, hopper, hopper[0]["obs"])


@pytest.mark.parametrize(
    "file, change, match",
    [
        (
            "obs_0",
            lambda x: x[:, :2],
            r"obs_0.npy: has shape \(\d+, 2\), expected \[T, 3\] or, padded with zeros, \[T, 4\]",
        ),
        ("obs_0", lambda x: np.pad(x, ((0, 0), (0, 2))), r"\d+, 5\), expected \[T, 3\] or"),
        (
            "next_obs_2",
            lambda x: np.pad(x, ((0, 0), (0, 1)), constant_values=1.0),
            "next_obs_2.npy: agent 2 has 3 columns, but others are not 0",
        ),
        ("obs_1", lambda x: x[:, :3], r"obs_1.npy: has shape \(\d+, 3\), expected \[T, 4\]; is it"),
    ],
)
def test_other_observation_sizes_are_refused(file, change, match, hopper, tmp_path):
    write_hopper(tmp_path, hopper, change=lambda name, x: change(x) if name == file else x)
    refused(match, load, tmp_path, HOPPER_TASK)


def test_training_on_unequal_observations(hopper, tmp_path):
    write_hopper(tmp_path, hopper)
    options = dict(agent_obsk=1, updates=3, batch_size=8, eval_episodes=1, shift=(), cuda=False, eval_interval=3)
    args = dom2_mamujoco.DOM2.args("Hopper", "random", data_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **options)
    results = dom2_mamujoco.train(args)
    assert np.isfinite(results["returns"]["none"]).all() and results["data"]["transitions"] == len(hopper.flags(True))


@pytest.mark.parametrize("lost", [None, "timeouts_1.npy", "timeouts_*.npy"])
def test_a_timeout_ends_an_episode_and_is_no_terminal_state(lost, tmp_path):
    record_some(tmp_path, longest=9)
    if lost:
        for file in tmp_path.rglob(lost):
            file.unlink()
        refused("timeouts_[01].npy: missing", load, tmp_path, "simple_spread")
    else:
        data = load(tmp_path, "simple_spread")
        assert data.lengths.tolist() == [9, 9, 9] and not data.done.any()
        assert {np.load(file).shape for file in tmp_path.rglob("timeouts_*.npy")} == {(27,)}  # as docs/datasets.md says


def record_some(data_dir, longest=10**9, **options):
    """Three episodes of simple_spread, recorded; each ends after `longest` steps. Returns what was played."""
    with Recorder(parallel_env("simple_spread"), "simple_spread", "random", data_dir, **options) as env:
        return play(env, 3, longest=longest)


# ---- Minari ----


def to_minari(monkeypatch, tmp_path, played, obs_space, action_space, obs, action, name="test/random-v0"):
    """Write a Minari dataset; `obs` and `action` are the names of the parts of an episode."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    buffers = [
        EpisodeBuffer(
            id=k,
            observations=e[obs],
            actions=e[action],
            rewards=next(iter(e["reward"].values())).tolist(),
            terminations=[False] * (len(e["whole"]) - 1) + [e["terminated"]],
            truncations=[False] * (len(e["whole"]) - 1) + [not e["terminated"]],
            infos={},
        )
        for k, e in enumerate(played)
    ]
    minari.create_dataset_from_buffers(name, buffers, observation_space=obs_space, action_space=action_space)
    return tmp_path / "minari" / name


def boxes(values):
    """The space of an array's rows, or of a dict of arrays."""
    if isinstance(values, dict):
        return Dict({name: boxes(x) for name, x in values.items()})
    return Box(-np.inf, np.inf, values.shape[1:], values.dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["id", "folder", "data"])
def test_minari_whole_robot(where, hopper, tmp_path, monkeypatch, capsys):
    space = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    folder = to_minari(monkeypatch, tmp_path, hopper, space, boxes(hopper[0]["whole"]), "state", "whole")
    path = {"id": "test/random-v0", "folder": folder, "data": folder / "data"}[where]
    import_to(tmp_path, "minari", path, **HOPPER)
    check(load(tmp_path / "data", HOPPER_TASK), hopper, hopper[0]["obs"])
    out = capsys.readouterr().out
    returns = [e["reward"]["agent_0"].sum() for e in hopper]
    lengths = [len(e["whole"]) for e in hopper]
    assert "episodes  5: 5 end in a terminal state, 0 at the time limit of 1000 steps, 0 were cut short" in out
    assert f"lengths   min {min(lengths)}, mean {np.mean(lengths):.1f}, max {max(lengths)}" in out
    assert (
        f"min {min(returns):.2f}, mean {np.mean(returns):.2f}, max {max(returns):.2f}, std {np.std(returns):.2f}" in out
    )
    assert re.search(r"actions   agent_0 -[01]\.\d\d to [01]\.\d\d, agent_1 -", out)
    assert "every agent gets the one reward" in out and "observations of the whole robot are split among 3" in out


@pytest.mark.filterwarnings("ignore")
def test_minari_whole_robot_at_the_time_limit(cheetah, tmp_path, monkeypatch):
    spaces = boxes(cheetah[0]["state"]), boxes(cheetah[0]["whole"])
    folder = to_minari(monkeypatch, tmp_path, cheetah, *spaces, "state", "whole")
    import_to(tmp_path, "minari", folder, "HalfCheetah", "medium")
    check(load(tmp_path / "data", "HalfCheetah", "medium"), cheetah, cheetah[0]["obs"])
    metadata = json.loads(next((tmp_path / "data").rglob("metadata.json")).read_text())
    assert metadata["source"]["path"] == str(folder) and metadata["return_mean"] == pytest.approx(
        np.mean([e["reward"]["agent_0"].sum() for e in cheetah]), rel=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_minari_dict_over_agents_without_the_prey(tag, tmp_path, monkeypatch, capsys):
    spaces = boxes(tag[0]["obs"]), boxes(tag[0]["action"])
    shuffled = Episodes({**e, "obs": dict(reversed(e["obs"].items()))} for e in tag)  # the order of a dict says nothing
    folder = to_minari(monkeypatch, tmp_path, shuffled, *spaces, "obs", "action")
    import_to(tmp_path, "minari", folder, "simple_tag")
    predators = ["adversary_0", "adversary_1", "adversary_2"]
    one = Episodes({**e, "reward": dict.fromkeys(predators, e["reward"]["adversary_0"])} for e in tag)
    check(load(tmp_path / "data", "simple_tag"), one, predators)
    assert "agents left out: agent_0" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_minari_dict_of_other_names(tag, tmp_path, monkeypatch):
    names = dict(zip(tag[0]["obs"], ("b", "a", "c", "prey"), strict=True))
    renamed = Episodes({**e, **{p: {names[a]: x for a, x in e[p].items()} for p in ("obs", "action")}} for e in tag)
    spaces = boxes(renamed[0]["obs"]), boxes(renamed[0]["action"])
    folder = to_minari(monkeypatch, tmp_path, renamed, *spaces, "obs", "action")
    refused(
        "hold agents .*; name the 3 that are simple_tag's adversary_0,",
        import_to,
        tmp_path,
        "minari",
        folder,
        "simple_tag",
    )
    import_to(tmp_path, "minari", folder, "simple_tag", agents=("b", "a", "c"))
    data = load(tmp_path / "data", "simple_tag")
    np.testing.assert_array_equal(data.action[0], tag.long("action")["adversary_0"])
    for agents in (("a", "b"), ("a", "a", "b"), ("a", "b", "d")):
        refused("name the 3", import_to, tmp_path, "minari", folder, "simple_tag", agents=agents, overwrite=True)


# ---- HDF5 ----


def to_hdf5(path, columns):
    with h5py.File(path, "w") as file:
        for name, x in columns.items():
            for agent, values in x.items() if isinstance(x, dict) else [("", x)]:
                file[f"{name}/{agent}" if agent else name] = values
    return path


def d4rl(played, following=True):
    columns = {
        "observations": played.long("state", slice(0, -1)),
        "actions": played.long("whole"),
        "rewards": played.long("reward")["agent_0"],
        "terminals": played.flags(True),
        "timeouts": played.flags(False),
    }
    return columns | ({"next_observations": played.long("state", slice(1, None))} if following else {})


@pytest.mark.parametrize("timeouts", [True, False])
def test_d4rl_with_next_observations(timeouts, cheetah, tmp_path, capsys):
    columns = d4rl(cheetah)
    if not timeouts:
        del columns["timeouts"]
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", columns), "HalfCheetah")
    check(load(tmp_path / "data", "HalfCheetah"), cheetah, cheetah[0]["obs"])
    out = capsys.readouterr().out
    assert ("no timeouts" in out) != timeouts and "2 at the time limit" in out and "left out" not in out


def test_d4rl_without_next_observations_loses_the_last_transition_of_a_time_limit(cheetah, tmp_path, capsys):
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", d4rl(cheetah, following=False)), "HalfCheetah")
    check(load(tmp_path / "data", "HalfCheetah"), cheetah, cheetah[0]["obs"], end=-1)
    out = capsys.readouterr().out
    kept = np.mean([e["reward"]["agent_0"][:-1].sum() for e in cheetah])
    assert "of 2 episodes is unknown: their last transition is left out" in out
    assert (
        f"without it {kept:.2f}" in out
        and f"mean {np.mean([e['reward']['agent_0'].sum() for e in cheetah]):.2f}," in out
    )


def test_d4rl_without_next_observations_repeats_those_of_terminal_states(hopper, tmp_path, capsys):
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", d4rl(hopper, following=False)), **HOPPER)
    expected = Episodes(
        {**e, "obs": {a: np.concatenate([x[:-1], x[-2:-1]]) for a, x in e["obs"].items()}} for e in hopper
    )
    check(load(tmp_path / "data", HOPPER_TASK), expected, hopper[0]["obs"])
    assert "after 5 terminal states is unknown: next_obs repeats obs there" in capsys.readouterr().out


def test_a_terminal_flag_at_the_time_limit_is_the_time_limit(cheetah, tmp_path):
    columns = d4rl(cheetah, following=False)
    columns["terminals"] = columns.pop("timeouts")
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", columns), "HalfCheetah")
    data = load(tmp_path / "data", "HalfCheetah")
    assert data.lengths.tolist() == [999, 999] and not data.done.any()


@pytest.mark.parametrize("kind", ["quantity/agent", "agent/quantity", "array"])
def test_hdf5_of_each_agent(kind, hopper, tmp_path):
    flags = hopper.flags(True)
    columns = {
        "observations": hopper.long("obs", slice(0, -1)),
        "next_observations": hopper.long("obs", slice(1, None)),
        "actions": hopper.long("action"),
        "rewards": hopper.long("reward"),
        "terminals": dict.fromkeys(hopper[0]["obs"], flags),
        "timeouts": dict.fromkeys(hopper[0]["obs"], hopper.flags(False)),
    }
    if kind == "agent/quantity":
        columns = {f"{agent}/{name}": x[agent] for name, x in columns.items() for agent in x}
    if kind == "array":

        def stacked(x):
            width = max(np.atleast_2d(y.T).shape[0] for y in x.values())
            columns = [
                np.pad(y.reshape(len(y), -1), ((0, 0), (0, width - y.reshape(len(y), -1).shape[1]))) for y in x.values()
            ]
            return np.stack(columns, 1)

        columns = {name: stacked(x) for name, x in columns.items()}
        assert columns["observations"].shape[1:] == (3, 4) and columns["rewards"].shape[1:] == (3, 1)
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", columns), **HOPPER)
    check(load(tmp_path / "data", HOPPER_TASK), hopper, hopper[0]["obs"])


def test_columns_of_an_array_beyond_an_agents_own_must_be_zeros(hopper, tmp_path):
    columns = d4rl(hopper, following=False)
    columns |= {"observations": hopper.stacked("obs", -1), "actions": hopper.stacked("action")}
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", columns), **HOPPER)
    columns["observations"][7, 0, 3] = 1
    path = to_hdf5(tmp_path / "b.hdf5", columns)
    refused(r"observations of agent_0: .*numbers \[T, 3\]", import_to, tmp_path, "hdf5", path, **HOPPER, overwrite=True)


def with_nan(x):
    x = x.astype(np.float32)
    x[7] = np.nan
    return x


@pytest.mark.parametrize(
    "change, match",
    [
        ({"terminals": None}, "a.hdf5: holds no terminals"),
        ({"observations": lambda x: x[:, :10]}, r"observations: have shape \(\d+, 10\), the whole robot of .* has 11"),
        ({"actions": lambda x: x[:, :2]}, r"actions: have shape \(\d+, 2\), the whole robot of .* has 3 numbers"),
        ({"actions": lambda x: x[:-1]}, "actions, rewards and flags have"),
        ({"timeouts": lambda x: x[:-1]}, "actions, rewards and flags have"),
        ({"rewards": with_nan}, "rewards of the team: NaN or infinity, first in row 7"),
        ({"observations": lambda x: 1e300 * x}, "observations of agent_0: NaN or infinity, first in row 0"),
        ({"observations": lambda x: x.astype("S9")}, "not readable|expected numbers"),
        ({"observations": lambda x: np.stack([x, x], 1)}, "the data hold agents 0, 1; name the 3"),
        ({"terminals": lambda x: np.stack([x, x, 0 * x], 1)}, "the agents differ in row"),
        ({"terminals": lambda x: np.arange(len(x)) // 25}, "terminals: hold other numbers than 0 and 1"),
        ({"timeouts": lambda x: x + 1e-7}, "timeouts: hold other numbers than 0 and 1"),
        ({"timeouts": lambda x: x - np.nan}, "timeouts: hold other numbers than 0 and 1"),
        ({"terminals": lambda x: 0 * x}, "an episode of 1003 steps; one of Hopper-3x1-obsk1 has at most 1000"),
    ],
)
def test_hdf5_that_does_not_fit(change, match, hopper, tmp_path):
    columns = d4rl(hopper)
    if "1003 steps" in match:
        columns = {name: np.concatenate([x] * 50)[:1003] for name, x in columns.items()}
    for name, f in change.items():
        columns[name] = f and f(columns[name])
    path = to_hdf5(tmp_path / "a.hdf5", {name: x for name, x in columns.items() if x is not None})
    refused(match, import_to, tmp_path, "hdf5", path, **HOPPER)
    assert not (tmp_path / "data").exists()


def test_robots_that_cannot_be_split(hopper, tmp_path):
    columns = d4rl(hopper)
    for scenario, width in (("Reacher", 10), ("ManySegmentAnt", 311)):  # without a mapping; with a wrong one
        columns["observations"] = np.zeros((len(columns["actions"]), width))
        path = to_hdf5(tmp_path / "a", columns)
        refused(f"cannot split a whole robot of {scenario}", import_to, tmp_path, "hdf5", path, scenario)
    refused("simple_tag needs those of each agent", import_to, tmp_path, "hdf5", tmp_path / "a", "simple_tag")
    refused(
        "--agents 0 1 2: the .* whole robot",
        import_to,
        tmp_path,
        "hdf5",
        tmp_path / "a",
        **HOPPER,
        agents=("0", "1", "2"),
    )


@pytest.mark.parametrize("task", [t for t in mamujoco_env.SCENARIOS if t in ("Ant", "Swimmer", "Walker2d")])
def test_the_librarys_partition_is_what_the_agents_see(task):
    env = make_robots(task, 1, None)[0]
    played = play(env, 1, env.state, longest=30)[0]
    index = env.map_global_state_to_local_observations(np.arange(len(env.state())))
    bound = {"Walker2d": 10}.get(task, np.inf)
    for agent, obs in played["obs"].items():
        np.testing.assert_array_equal(played["state"][:, index[agent]], obs.clip(-bound, bound))


def test_clipped_observations_are_said(hopper, tmp_path, capsys):
    columns = d4rl(hopper)
    columns["observations"][:5, 10] = 10
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", columns), **HOPPER)
    assert "of the whole robot's observations are clipped at 10" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_clipped_observations_are_counted_over_all_episodes(hopper, tmp_path, monkeypatch, capsys):
    clipped = Episodes({**e, "state": e["state"].copy()} for e in hopper)
    for k, e in enumerate(clipped):
        e["state"][: k + 1, 10] = 10
    spaces = boxes(clipped[0]["state"]), boxes(clipped[0]["whole"])
    import_to(tmp_path, "minari", to_minari(monkeypatch, tmp_path, clipped, *spaces, "state", "whole"), **HOPPER)
    share = (clipped.long("state") == 10).mean()
    out = capsys.readouterr().out
    assert f"{share:.2%} of the whole robot's observations are clipped at 10" in out and out.count("are clipped") == 1


def test_actions_that_no_policy_can_express_are_warned_of(hopper, tmp_path, capsys):
    columns = d4rl(hopper)
    columns["actions"] = 10 * columns["actions"]
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", columns), **HOPPER)
    share = (np.abs(columns["actions"]) > 1.0001).mean()
    assert f"{share:.2%} of the action entries are outside [-1, 1]" in capsys.readouterr().err


# ---- Vaults ----


@pytest.fixture
def golden(tmp_path):
    """A Vault that flashbax itself wrote (tests/golden/README.md), and the arrays in it."""
    with zipfile.ZipFile(ROOT / "tests/golden/vault.zip") as archive:
        archive.extractall(tmp_path)
    b, t, i, k = np.ogrid[:2, :75, :4, :16]
    obs = 100 * b + t + i / 8 + k / 64
    action = (t % 25 - 12) / 16 + i / 32 - k[..., :2] / 64 + 0 * b
    reward = (t % 7 + i + 10 * b)[..., 0]
    return tmp_path / "simple_tag.vlt" / "Expert", obs, action, reward


@pytest.mark.parametrize("rows, seed", [((0,), 0), ((1,), 3), ((1, 0), 0)])
def test_a_vault_of_flashbax(rows, seed, golden, tmp_path, capsys):
    path, obs, action, reward = golden
    import_to(tmp_path, "vault", path, "simple_tag", "expert", rows=rows, agents=("0", "2", "1"), seed=seed)
    folder = tmp_path / "data" / "simple_tag" / "expert"
    (folder / f"seed_{seed}_data").rename(folder / "seed_0_data")
    data = load(tmp_path / "data", "simple_tag", "expert")
    keep = [t for t in range(75) if t % 25 != 24]  # what follows on the last action of an episode is unknown
    for agent, i in enumerate((0, 2, 1)):
        expected = {
            "obs": np.concatenate([obs[r, keep, i] for r in rows]),
            "next_obs": np.concatenate([obs[r, [t + 1 for t in keep], i] for r in rows]),
            "action": np.concatenate([action[r, keep, i] for r in rows]),
            "reward": np.concatenate([reward[r, keep, i] for r in rows]),
        }
        for name, x in expected.items():
            np.testing.assert_array_equal(getattr(data, name)[agent], x.astype(np.float32))
    assert data.lengths.tolist() == 3 * len(rows) * [24] and not data.done.any()
    out = capsys.readouterr().out
    assert f"{3 * len(rows)} at the time limit of 25 steps" in out and "agents left out: 3" in out


def test_a_vault_needs_rows_and_agents(golden, tmp_path):
    path, *_ = golden
    agents = ("0", "1", "2")
    for rows in ((), (2,), (-1,)):
        refused(
            "has 2 rows .*--rows from 0 to 1",
            import_to,
            tmp_path,
            "vault",
            path,
            "simple_tag",
            rows=rows,
            agents=agents,
        )
    refused("hold agents 0, 1, 2, 3; name the 3", import_to, tmp_path, "vault", path, "simple_tag", rows=(0,))
    refused("metadata.json.*innermost folder", import_to, tmp_path, "vault", path.parent, "simple_tag", rows=(0,))
    refused("expected numbers", import_to, tmp_path, "vault", path, "simple_spread", rows=(0,), agents=agents)
    refused("needs those of each agent", import_to, tmp_path, "vault", path, "simple_tag", rows=(0,), from_state=True)


def to_vault(folder, columns, unused=5):
    """A Vault as flashbax stores it: one zarr array per quantity, in one OCDBT store."""
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text('{"version": 1.2}')

    def store(name, x, shape):
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": name}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": {"compressor": {"id": "gzip", "level": 5}}}
        array = tensorstore.open(spec, dtype=str(x.dtype), shape=shape, create=True).result()
        array[tuple(slice(n) for n in x.shape)].write(x).result()

    T = next(iter(columns.values())).shape[1]
    for name, x in columns.items():
        store(f"{name}.", x, (x.shape[0], T + unused, *x.shape[2:]))
    store("vault_index", np.array([T], np.int32), (1,))
    return folder


def cheetah_columns(cheetah):
    columns = {
        "observations": cheetah.stacked("obs", -1),
        "actions": cheetah.stacked("action"),
        "rewards": cheetah.stacked("reward"),
        "terminals": np.repeat(cheetah.flags(True)[:, None], 2, 1),
        "truncations": np.repeat(cheetah.flags(False)[:, None], 2, 1),
        "infos.state": cheetah.long("state", slice(0, -1)),
    }
    return {name: x[None] for name, x in columns.items()}


@pytest.mark.parametrize("kind", ["arrays", "agents", "state", "npz", "npz of agents"])
def test_vaults_of_robots(kind, cheetah, tmp_path):
    columns = cheetah_columns(cheetah)
    if kind == "state":
        columns["observations"] = np.zeros((1, 2000, 2, 13), np.float32)  # what other agents see
    if "agents" in kind:
        columns = {
            f"{name}.agent_{i}" if x.ndim > 2 and name != "infos.state" else name: x[:, :, i]
            if name != "infos.state"
            else x
            for name, x in columns.items()
            for i in range(2)
        }
    if "npz" in kind:
        path = tmp_path / "arrays.npz"
        np.savez(path, **columns)
    else:
        path = to_vault(tmp_path / "2halfcheetah.vlt" / "Good 100%", columns)
    import_to(tmp_path, "vault", path, "HalfCheetah", from_state=kind == "state")
    check(load(tmp_path / "data", "HalfCheetah"), cheetah, cheetah[0]["obs"], end=-1)


def test_what_a_vault_lacks(cheetah, tmp_path):
    columns = cheetah_columns(cheetah)
    del columns["infos.state"]
    path = to_vault(tmp_path / "a", columns)
    refused("it holds no infos.state", import_to, tmp_path, "vault", path, "HalfCheetah", from_state=True)
    del columns["actions"]
    refused("holds no actions", import_to, tmp_path, "vault", to_vault(tmp_path / "b", columns), "HalfCheetah")


# ---- all formats ----


@pytest.mark.parametrize(
    "source, name, command",
    [
        ("minari", "minari", r"pip install 'minari\[hdf5\]'"),
        ("hdf5", "h5py", "pip install 'h5py'"),
        ("vault", "tensorstore", "pip install 'tensorstore'"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    source, name, command, golden, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    refused(f"{name} is not installed; run `{command}`", import_to, tmp_path, source, golden[0], "simple_tag")


@pytest.mark.parametrize("source", ["minari", "hdf5", "vault"])
@pytest.mark.parametrize("damage", ["missing", "text", "folder"])
def test_damaged_files(source, damage, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    path = tmp_path / "file"
    if damage == "text":
        path.write_text("observations\n1.0\n")
    if damage == "folder":
        path.mkdir()
        (path / "metadata.json").write_text("{}")
    refused(re.escape(str(path)) + ".*; ", import_to, tmp_path, source, path, "simple_tag")


def test_options_that_do_not_belong(tmp_path):
    refused("--rows: belongs to --source vault", import_to, tmp_path, "hdf5", "x", "simple_tag", rows=(0,))
    refused("--from-state: belongs to", import_to, tmp_path, "minari", "x", "simple_tag", from_state=True)
    for scenario in ("simple_tag", "my_envs:spread5", HOPPER_TASK):  # the last one says its partition itself
        match = f"--agent-obsk: {scenario} has no joints to share out"
        refused(match, import_to, tmp_path, "hdf5", "x", scenario, agent_obsk=1)
    refused("--source csv: unknown", import_to, tmp_path, "csv", "x", "simple_tag")
    refused("--seed -1", import_to, tmp_path, "hdf5", "x", "simple_tag", seed=-1)
    refused("--scenario nowhere: unknown", import_to, tmp_path, "hdf5", "x", "nowhere")
    for folder in ("", "~/data"):
        refused("--data-dir .*: must be a name", Args, "hdf5", "x", "simple_tag", "random", data_dir=folder)


def test_existing_data_are_replaced_only_if_asked(hopper, tmp_path):
    path = to_hdf5(tmp_path / "a.hdf5", d4rl(hopper))
    import_to(tmp_path, "hdf5", path, **HOPPER)
    file = next((tmp_path / "data").rglob("obs_0.npy"))
    file.write_bytes(b"mine")
    refused("seed_0_data: exists; choose", import_to, tmp_path, "hdf5", path, **HOPPER)
    import_to(tmp_path, "hdf5", path, **HOPPER, seed=1)
    assert file.read_bytes() == b"mine"
    import_to(tmp_path, "hdf5", path, **HOPPER, overwrite=True)
    assert file.read_bytes() != b"mine"
    assert sorted(folder.name for folder in file.parents[1].iterdir()) == ["seed_0_data", "seed_1_data"]


def test_of_two_recordings_at_once_none_is_lost(tmp_path):
    env, later = (parallel_env("simple_spread") for _ in range(2))
    with Recorder(env, "simple_spread", "random", tmp_path) as env:
        later = Recorder(later, "simple_spread", "random", tmp_path)
        play(env, 2)
    play(later, 3)
    refused("seed_0_data: another process has made it meanwhile; this one is .*seed_0_data-", later.save)
    folders = sorted((tmp_path / "simple_spread/random").iterdir())
    assert [len(np.load(folder / "rews_0.npy")) for folder in folders] == [50, 75]


@pytest.mark.parametrize(
    "where, match",
    [
        (dict(data_dir="a file"), "a file/simple_spread/random/seed_0_data: Not a directory"),
        (dict(data_dir="~/data"), "--data-dir ~/data: must be a name"),
        (dict(data_dir=""), "--data-dir : must be a name"),
        (dict(data_dir="data", seed=-1), "--seed -1: must be from 0"),
        (dict(data_dir="data", seed=True), "--seed True: must be of type int"),
    ],
)
def test_a_place_that_cannot_be_is_noticed_before_the_first_step(where, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    refused(match, Recorder, parallel_env("simple_spread"), "simple_spread", "random", **where)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_a_dataset_may_be_a_link_to_another_disk(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data/simple_spread").mkdir(parents=True)
    (tmp_path / "data/simple_spread/random").symlink_to(tmp_path / "disk")
    rename = os.rename

    def within_a_disk(old, new):
        if ("disk" in str(Path(old).resolve())) != ("disk" in str(Path(new).resolve())):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(old, new)

    monkeypatch.setattr(os, "rename", within_a_disk)
    record_some(tmp_path / "data")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["seed_0_data"]


def test_one_episode_is_no_dataset(hopper, tmp_path):
    path = to_hdf5(tmp_path / "a.hdf5", d4rl(Episodes(hopper[:1])))
    refused("a dataset needs two episodes, there are 1", import_to, tmp_path, "hdf5", path, **HOPPER)


def test_a_changed_file_of_an_imported_dataset_is_noticed(hopper, tmp_path):
    import_to(tmp_path, "hdf5", to_hdf5(tmp_path / "a.hdf5", d4rl(hopper)), **HOPPER)
    file = next((tmp_path / "data").rglob("acs_1.npy"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    refused("differs from its checksum.*import_dataset.py", load, tmp_path / "data", HOPPER_TASK)


# ---- recording ----


def test_a_recording_is_what_happened(tmp_path, capsys):
    played = record_some(tmp_path)
    check(load(tmp_path, "simple_spread"), played, ["agent_0", "agent_1", "agent_2"])
    assert "3 at the time limit of 25 steps" in capsys.readouterr().out
    assert not list(tmp_path.rglob("timeouts*"))


def test_a_recording_of_the_librarys_robots(tmp_path):
    robots = make_robots(HOPPER_TASK, 1, None)[0]
    with Recorder(robots, HOPPER_TASK, "random", tmp_path) as env:
        played = play(env, 3, longest=12)
    assert {e["terminated"] for e in played} == {False}  # cut short by `reset` and by the end of the context
    check(load(tmp_path, HOPPER_TASK), played, robots.possible_agents)
    with Recorder(robots, HOPPER_TASK, "medium", tmp_path) as env:
        played = play(env, 3)
    assert {e["terminated"] for e in played} == {True}
    check(load(tmp_path, HOPPER_TASK, "medium"), played, robots.possible_agents)


def test_recorded_data_train(tmp_path):
    env = parallel_env("simple_tag")
    seen = []

    def policy(observations):
        seen.append(observations)
        return {agent: env.action_space(agent).sample() for agent in observations}

    metadata = record(env, policy, 110, "simple_tag", "random", data_dir=tmp_path)
    assert metadata["transitions"] == 125 and metadata["episodes"] == 5  # whole episodes
    data = load(tmp_path, "simple_tag")
    first = parallel_env("simple_tag").reset(seed=0)[0]
    for i, agent in enumerate(("adversary_0", "adversary_1", "adversary_2")):
        np.testing.assert_array_equal(data.obs[i, 0], first[agent])
        np.testing.assert_array_equal(data.obs[i], np.stack([x[agent] for x in seen]))
    options = dict(updates=2, batch_size=8, eval_episodes=1, shift=(), cuda=False, eval_interval=2)
    options |= dict(data_dir=str(tmp_path), run_dir=str(tmp_path / "run"))
    results = dom2_mpe.train(dom2_mpe.DOM2.args("simple_tag", "random", **options))
    assert results["data"]["transitions"] == 125


def test_a_recording_is_saved_once_more(tmp_path):
    with Recorder(parallel_env("simple_spread"), "simple_spread", "random", tmp_path) as env:
        played = play(env, 2)
        assert env.save()["episodes"] == 2
        played += play(env, 1, seed=7)
    check(load(tmp_path, "simple_spread"), played, ["agent_0", "agent_1", "agent_2"])


def test_versions_of_a_recording(tmp_path):
    for seed in (0, 4):
        record_some(tmp_path, seed=seed)
    folders = sorted(folder.name for folder in (tmp_path / "simple_spread" / "random").iterdir())
    assert folders == ["seed_0_data", "seed_4_data"]
    refused("seed_4_data: exists", record_some, tmp_path, seed=4)


class Pair(ParallelEnv):
    """A made-up environment in the shape of HalfCheetah: two agents, 6 numbers each, 3 actions.

    Args:
        ends: the steps of its episodes and how each ends, "terminated" or "truncated".
        vanish: whether the agents are missing from the last observations. early: an agent that ends one step before.
    """

    metadata, reward = {"name": "pair"}, 1

    def __init__(self, *ends, vanish=False, early=None, box=None):
        self.possible_agents, self.ends, self.vanish, self.early = ["agent_0", "agent_1"], list(ends), vanish, early
        self.box, self.buffer = box or Box(-1, 1, (3,), np.float32), np.zeros(6, np.float16)

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (6,), np.float16)

    def action_space(self, agent):
        return self.box

    def observe(self):
        self.buffer[:] = self.steps  # the same array every time
        return dict.fromkeys(self.possible_agents, self.buffer)

    def reset(self, seed=None, options=None):
        self.steps, self.agents = 0, list(self.possible_agents)
        self.length, self.how = self.ends.pop(0)
        return self.observe(), {}

    def step(self, actions):
        self.steps += 1
        over = self.steps == self.length
        flags = {
            how: {a: over and how == self.how for a in self.possible_agents} for how in ("terminated", "truncated")
        }
        if self.early and self.steps == self.length - 1:
            flags["terminated"][self.early] = True
        self.agents = [] if over else self.agents
        obs = {} if over and self.vanish else self.observe()
        return obs, dict.fromkeys(self.possible_agents, self.reward), *flags.values(), {}


def run(env, episodes, actions=None):
    for _ in range(episodes):
        env.reset()
        while env.agents:
            env.step(dict.fromkeys(env.agents, np.zeros(3) if actions is None else actions))


@pytest.mark.parametrize("vanish", [False, True])
def test_terminations_truncations_and_agents_that_vanish(vanish, tmp_path, capsys):
    env = Pair((4, "terminated"), (5, "truncated"), (1000, "truncated"), (6, "terminated"), vanish=vanish)
    with Recorder(env, "HalfCheetah", "random", tmp_path) as recorder:
        run(recorder, 4)
    data = load(tmp_path, "HalfCheetah")
    lengths = [4, 5 - vanish, 1000 - vanish, 6]
    assert data.lengths.tolist() == lengths
    ends = (data.starts + data.lengths - 1).tolist()
    assert data.done.nonzero()[:, 1].tolist() == 2 * [ends[0], ends[3]]
    steps = np.concatenate([np.arange(n) for n in lengths])
    following = steps + 1
    if vanish:
        following[[ends[0], ends[3]]] -= 1  # unknown: repeated, and done
    for agent in range(2):
        np.testing.assert_array_equal(data.obs[agent], np.repeat(steps[:, None], 6, 1))
        np.testing.assert_array_equal(data.next_obs[agent], np.repeat(following[:, None], 6, 1))
    out = capsys.readouterr().out
    assert "4: 2 end in a terminal state, 1 at the time limit of 1000 steps, 1 were cut short" in out
    assert ("of 2 episodes is unknown: their last" in out) == ("after 2 terminal states is unknown" in out) == vanish


class Reversed(BaseParallelWrapper):
    """The same environment, whose dicts and list of agents have the reversed order."""

    def __init__(self, env):
        super().__init__(env)
        self.possible_agents = env.possible_agents[::-1]

    def reset(self, seed=None, options=None):
        obs, infos = self.env.reset(seed, options)
        return dict(reversed(obs.items())), infos

    def step(self, actions):
        return tuple(dict(reversed(x.items())) for x in self.env.step(actions))


def test_agents_are_told_apart_by_name(tmp_path):
    with Recorder(Reversed(parallel_env("simple_tag")), "simple_tag", "random", tmp_path) as env:
        played = play(env, 2)
    assert next(iter(played[0]["obs"])) == "agent_0"
    check(load(tmp_path, "simple_tag"), played, ["adversary_0", "adversary_1", "adversary_2"])


def test_agents_that_do_not_end_together_are_refused(tmp_path):
    recorder = Recorder(Pair((4, "terminated"), early="agent_1"), "HalfCheetah", "random", tmp_path)
    refused("agent_1: ended before the others", run, recorder, 1)


@pytest.mark.parametrize("vanish", [False, True])
def test_longer_episodes_are_refused(vanish, tmp_path):
    """Also where the last transition would be left out."""
    recorder = Recorder(Pair((1001, "truncated"), vanish=vanish), "HalfCheetah", "random", tmp_path)
    refused("an episode of 1001 steps", run, recorder, 1)


def test_rewards_that_are_no_numbers_are_refused(tmp_path):
    env = Pair((4, "truncated"))
    env.reward = np.nan
    recorder = Recorder(env, "HalfCheetah", "random", tmp_path)
    refused(r"rewards of agent_0: NaN or infinity, first in row 0 \(from 0\)", run, recorder, 1)


def test_episodes_without_a_transition_are_left_out_and_counted_anew_by_every_save(tmp_path, capsys):
    """After the only step of an episode that the time limit ends, the observation is unknown."""
    env = Pair((1, "truncated"), (4, "terminated"), (5, "terminated"), (1, "truncated"), vanish=True)
    with Recorder(env, "HalfCheetah", "random", tmp_path) as recorder:
        run(recorder, 3)
        recorder.save()
        assert "1 episodes without a whole transition are left out" in capsys.readouterr().out
        run(recorder, 1)
    out = capsys.readouterr().out
    assert "2 episodes without a whole transition are left out" in out and out.count("without a whole") == 1
    assert load(tmp_path, "HalfCheetah").lengths.tolist() == [4, 5]


@pytest.mark.parametrize("action", [[0, 0, 1.1], [0, 0], [0, 0, np.nan], [[0, 0, 0]]])
def test_actions_outside_the_box_are_refused_by_name(action, tmp_path):
    recorder = Recorder(Pair((4, "terminated")), "HalfCheetah", "random", tmp_path)
    refused("action of agent_0: .*is not in its Box.*; clip it", run, recorder, 1, np.array(action))
    recorder.env.ends = [(4, "terminated")]
    recorder.reset()
    refused("agent_1 has none", recorder.step, {"agent_0": np.zeros(3)})


def test_a_wider_box_is_recorded_with_a_warning(tmp_path, capsys):
    env = Pair((4, "terminated"), (4, "terminated"), box=Box(-2, 2, (3,), np.float32))
    with Recorder(env, "HalfCheetah", "random", tmp_path) as recorder:
        run(recorder, 2, np.array([0, 0, 2]))
    printed = capsys.readouterr()
    assert "33.33% of the action entries are outside [-1, 1]" in printed.err and "agent_1 0.00 to 2.00" in printed.out


@pytest.mark.parametrize("reward", ["1", 1j, [1.0, 2.0], None])
def test_rewards_that_are_not_one_number(reward, tmp_path):
    env = Pair((4, "terminated"))
    env.reward = reward
    refused("reward of agent_0", run, Recorder(env, "HalfCheetah", "random", tmp_path), 1)


def test_observations_and_rewards_that_lack_an_agent_or_are_no_numbers(tmp_path):
    env = Pair(*[(4, "terminated")] * 3)
    recorder = Recorder(env, "HalfCheetah", "random", tmp_path)
    monkey = env.observe
    env.observe = lambda: monkey() | {"agent_1": np.zeros(6) + 1j}
    refused("observation of agent_1: holds complex128", recorder.reset)
    env.observe = lambda: {"agent_0": np.zeros(6)}
    refused("observations of agent_0: expected agent_0, agent_1", recorder.reset)
    env.observe, step = monkey, env.step
    recorder.reset()
    env.step = lambda actions: tuple({"agent_0": x["agent_0"]} if k == 1 else x for k, x in enumerate(step(actions)))
    refused("rewards of agent_0: expected agent_0, agent_1", recorder.step, dict.fromkeys(env.agents, np.zeros(3)))


def test_torch_actions_with_gradients_are_recorded(tmp_path):
    with Recorder(Pair(*[(4, "terminated")] * 2), "HalfCheetah", "random", tmp_path) as env:
        run(env, 2, torch.full((3,), 0.5, requires_grad=True))
    assert (load(tmp_path, "HalfCheetah").action == 0.5).all()


def test_environments_of_another_shape_are_refused(tmp_path):
    for env, scenario, match in (
        (parallel_env("simple_spread"), "simple_tag", "hold agents agent_0, agent_1, agent_2; name the 3"),
        (parallel_env("simple_tag"), "simple_world", r"adversary_0: has observations of shape \(16,\), .* has \(24,\)"),
        (
            Pair(box=Discrete(5)),
            "HalfCheetah",
            r"agent_0: has actions in Discrete\(5\), HalfCheetah in a Box of \(3,\)",
        ),
        (simple_spread.parallel_env(continuous_actions=True), "simple_spread", "pass `store`"),
        (Pair(), "nowhere", "--scenario nowhere: unknown"),
    ):
        refused(match, Recorder, env, scenario, "random", tmp_path)
    refused("dataset mine: unknown", Recorder, Pair(), "HalfCheetah", "mine", tmp_path)


def test_what_is_stored_of_an_action_can_be_made_of_it(tmp_path):
    env = simple_spread.parallel_env(continuous_actions=True, max_cycles=25)
    forces = {f"agent_{i}": np.array([0, 0.25, 0.75, 0.5, 0.125 * i], np.float32) for i in range(3)}
    metadata = record(
        env, lambda _: forces, 50, "simple_spread", "random", data_dir=tmp_path, store=lambda a: a[[2, 4]] - a[[1, 3]]
    )
    assert metadata["transitions"] == 50
    data = load(tmp_path, "simple_spread")
    for i in range(3):
        assert data.action[i].unique(dim=0).tolist() == [[0.5, 0.125 * i - 0.5]]


def test_an_error_writes_nothing_and_steps_need_an_episode(tmp_path):
    with pytest.raises(ZeroDivisionError), Recorder(Pair((4, "terminated")), "HalfCheetah", "random", tmp_path) as env:
        run(env, 1)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    refused("no episode is running: call reset", env.step, dict.fromkeys(env.possible_agents, np.zeros(3)))
    refused("num_transitions 0", record, Pair(), lambda obs: {}, 0, "HalfCheetah", "random")


# ---- the page ----


@pytest.mark.slow
def test_the_pages_commands_import_and_train(cheetah, tmp_path):
    """The line for HDF5 and the line that learns from it, in a folder with such a file."""
    to_hdf5(tmp_path / "halfcheetah_medium-v2.hdf5", d4rl(cheetah))
    page = (ROOT / "docs/datasets.md").read_text()
    imports, training = (
        re.search(rf"^    python ({script}.py .*{word}.*)$", page, re.M)[1].split()
        for script, word in (("import_dataset", "hdf5"), ("dom2_mamujoco", "--dataset medium --data-dir my_data"))
    )
    short = ["--updates", "3", "--eval-episodes", "2", "--no-cuda"]

    def run_line(script, *words):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *words], cwd=tmp_path, capture_output=True, text=True
        )

    done = run_line(*imports)
    assert done.returncode == 0 and "2,000 transitions of 2 agents" in done.stdout, done.stderr
    done = run_line(*training, *short)
    assert done.returncode == 0 and "standard" in done.stdout, done.stderr
    done = run_line(*imports)
    assert done.returncode == 2 and re.fullmatch(r"error: .*seed_0_data: exists; .*\n", done.stderr)


def test_snippets_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/datasets.md").read_text(), re.M | re.S)
    assert len(snippets) == 2
    for text in snippets:
        exec(compile(text, "docs/datasets.md", "exec"), {})
    assert load("my_data", "simple_spread").lengths.sum() >= 1_000 and len(load("my_data", HOPPER_TASK).lengths) == 10
    args = dom2_mpe.DOM2.args("simple_spread", "random", data_dir="my_data")
    assert load_data(args, common.make_env("simple_spread"), None).obs.shape[0] == 3
