"""Datasets: what is stored is what happened in the environment, and nothing damaged is ever learned from."""

import csv
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_robustness import SCRIPTS
from tqdm import tqdm

import collect_datasets
import common
import dom2_mamujoco
import dom2_mpe
from experiments import train_behaviour
from particle_env import EPISODE_STEPS, SCENARIOS, ParticleEnv
from utils.data import draw, load_data, standardise, take_share
from utils.frozen import load_prey, policy_action, policy_checksum
from utils.program import UserError, load_torch, usable_cores

FILES = ("obs", "acs", "rews", "next_obs", "dones")
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
N, A = 3, 2  # controlled agents of every scenario, action entries


def obs_sizes(scenario):
    return ParticleEnv(scenario, 1).obs_sizes


def load(data_dir, scenario, dataset):
    return common.load_dataset(common.dataset_path(data_dir, scenario, dataset), common.make_env(scenario))


def columns_of(loaded):
    """The columns of a loaded dataset as one tensor [n, T, 2 d + 4], in the order of FILES."""
    reward, done = loaded.reward[..., None], loaded.done[..., None]
    return torch.cat([loaded.obs, loaded.action, reward, loaded.next_obs, done], -1)


def arrays(data_dir, scenario, dataset, seed=0):
    """What numpy alone finds on disk: {"obs": [n, T, d], "acs": [n, T, 2], "rews": [n, T], ...}."""
    folder = Path(data_dir) / scenario / dataset / f"seed_{seed}_data"
    return {name: np.stack([np.load(folder / f"{name}_{i}.npy") for i in range(N)]) for name in FILES}


def behaviour(pretrained, scenario, level):
    """Policies of the controlled agents, and the prey or None."""
    contents = torch.load(pretrained / f"{scenario}.pt", weights_only=True)
    policies = contents["agent_params"] if level == "expert" else contents["medium"]
    prey = contents["agent_params"][N]["policy"] if len(contents["agent_params"]) > N else None
    return [entry["policy"] for entry in policies[:N]], prey


def plain_policy(params, obs):
    """A frozen policy in numpy."""
    p = {name: value.numpy().astype(np.float64) for name, value in params.items()}
    x = np.asarray(obs, np.float64)
    for name in ("fc1", "fc2"):
        x = np.maximum(x @ p[f"{name}.weight"].T + p[f"{name}.bias"], 0)
    return np.tanh(x @ p["fc3.weight"].T + p["fc3.bias"])


def world_states(scenario, obs):
    """Positions, velocities and landmarks of every stored transition, read off the observations [n, T, d]."""
    m = len(SCENARIOS[scenario].landmarks)
    vel, pos = list(obs[:, :, :2]), list(obs[:, :, 2:4])
    landmarks = obs[0, :, 4 : 4 + 2 * m].reshape(-1, m, 2) + pos[0][:, None]
    if len(SCENARIOS[scenario].agents) > N:  # the prey is the last of the others, then comes its velocity
        at = 4 + 2 * m + 2 * (N - 1)
        pos.append(pos[0] + obs[0, :, at : at + 2])
        vel.append(obs[0, :, at + 2 : at + 4])
    return tuple(torch.from_numpy(x) for x in (np.stack(pos, 1), np.stack(vel, 1), landmarks))


def check_against_environment(scenario, data, prey):
    """Stepping the environment from every stored observation gives what is stored beside it."""
    T = data["obs"].shape[1]
    env = ParticleEnv(scenario, T)
    obs = env.set_state(*world_states(scenario, data["obs"]))
    for i in range(N):
        np.testing.assert_allclose(obs[i], data["obs"][i], atol=1e-5)
    actions = torch.from_numpy(data["acs"]).transpose(0, 1)
    if prey is not None:
        actions = torch.cat([actions, torch.from_numpy(plain_policy(prey, obs[N])).float()[:, None]], 1)
    next_obs, rewards = env.step(actions)
    for i in range(N):
        np.testing.assert_allclose(next_obs[i], data["next_obs"][i], atol=1e-3)
        np.testing.assert_allclose(rewards[:, i], data["rews"][i], atol=1e-3)


# ---- what a collected dataset holds ----


@every_scenario
@pytest.mark.parametrize("dataset", ["random", "expert", "random-medium"])
def test_dataset_is_what_happened_in_the_environment(scenario, dataset, data_dir, pretrained):
    data = arrays(data_dir, scenario, dataset)
    d = obs_sizes(scenario)[0]
    shapes = {"obs": (N, 500, d), "acs": (N, 500, A), "rews": (N, 500), "next_obs": (N, 500, d), "dones": (N, 500)}
    assert {name: array.shape for name, array in data.items()} == shapes
    assert {array.dtype for array in data.values()} == {np.dtype(np.float32)}
    assert not data["dones"].any()  # the time limit is no terminal state
    assert np.abs(data["acs"]).max() <= 1
    check_against_environment(scenario, data, behaviour(pretrained, scenario, "expert")[1])

    obs, next_obs = (data[name].reshape(N, 20, EPISODE_STEPS, d) for name in ("obs", "next_obs"))
    np.testing.assert_array_equal(next_obs[:, :, :-1], obs[:, :, 1:])
    start = obs[:, :, 0]
    assert not start[..., :2].any() and np.abs(start[..., 2:4]).max() <= 1  # at rest, in the arena
    assert len(np.unique(start[0], axis=0)) == 20


@every_scenario
@pytest.mark.parametrize("dataset", ["random", "medium", "random-medium"])
def test_load_dataset_gives_the_arrays_and_the_returns(scenario, dataset, data_dir):
    data, loaded, d = arrays(data_dir, scenario, dataset), load(data_dir, scenario, dataset), obs_sizes(scenario)[0]
    columns = loaded.obs, loaded.action, loaded.reward, loaded.next_obs, loaded.done
    shapes = (N, 500, d), (N, 500, A), (N, 500), (N, 500, d), (N, 500)
    for name, part, shape in zip(FILES, columns, shapes, strict=True):
        assert part.shape == shape and part.dtype == torch.float32
        np.testing.assert_array_equal(part, data[name], strict=True)
    assert loaded.starts.tolist() == list(range(0, 500, 25)) and loaded.lengths.tolist() == [25] * 20
    returns = [sum(data["rews"][:, 25 * e : 25 * e + 25].mean(0, dtype=np.float64)) for e in range(20)]
    np.testing.assert_allclose(loaded.returns, returns, rtol=1e-4, atol=1e-4)

    folder = common.dataset_path(data_dir, scenario, dataset)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["scenario"], metadata["dataset"]) == (scenario, dataset)
    assert (metadata["transitions"], metadata["episodes"], metadata["seed"]) == (500, 20, 0)
    assert metadata["return_mean"] == pytest.approx(np.mean(returns), rel=1e-3)
    assert metadata["return_std"] == pytest.approx(np.std(returns), rel=0.03)
    assert metadata["return_max"] == pytest.approx(max(returns), rel=1e-3)
    sums = subprocess.run(["sha256sum", *metadata["checksums"]], cwd=folder, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in sums.stdout.splitlines()] == list(metadata["checksums"].values())
    assert len(metadata["checksums"]) == N * len(FILES)
    assert {"python", "torch", "numpy"} <= metadata["versions"].keys()
    assert loaded.metadata == metadata


@every_scenario
def test_random_actions_are_uniform(scenario, data_dir):
    actions = np.sort(arrays(data_dir, scenario, "random")["acs"].reshape(-1))
    uniform = np.linspace(-1, 1, len(actions))
    assert np.abs(actions - uniform).max() / 2 < 2 / len(actions) ** 0.5  # Kolmogorov-Smirnov
    columns = arrays(data_dir, scenario, "random")["acs"].transpose(1, 0, 2).reshape(500, -1)
    assert np.abs(np.corrcoef(columns.T) - np.eye(N * A)).max() < 0.2  # agents and components are independent


def action_noise(data, policies):
    """Stored actions minus the policies' own where the box cannot have cut them, NaN elsewhere: [n, T, 2]."""
    own = np.stack([plain_policy(policies[i], data["obs"][i]) for i in range(N)])
    return np.where(np.abs(own) < 0.6, data["acs"] - own, np.nan)


@every_scenario
@pytest.mark.parametrize("level", ["medium", "expert"])
def test_policies_act_with_gaussian_noise(scenario, level, data_dir, pretrained):
    policies, _ = behaviour(pretrained, scenario, level)
    noise = action_noise(arrays(data_dir, scenario, level), policies)
    noise = noise[np.isfinite(noise)]
    assert len(noise) > 200
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 0.1) < 0.02
    assert 0.55 < (np.abs(noise) < 0.1).mean() < 0.8  # 68% within one standard deviation


@every_scenario
def test_mixtures_are_half_and_half_by_episodes(scenario, data_dir, pretrained):
    policies, _ = behaviour(pretrained, scenario, "medium")
    noise = action_noise(arrays(data_dir, scenario, "random-medium"), policies)
    worst = np.nanmax(np.abs(noise).reshape(N, 20, EPISODE_STEPS, A), axis=(0, 2, 3))  # of every episode
    assert (worst > 0.6).sum() == (worst < 0.6).sum() == 10


def test_the_workers_of_a_killed_collection_end_with_it():
    code = (
        "import time; from collect_datasets import parallel_rollouts\n"
        "if __name__ == '__main__':\n"
        "    blocks = parallel_rollouts('Reacher', None, 0.1, (0,), 1_000_000)\n"
        "    next(blocks)\n"
        "    print('working', flush=True)\n"
        "    time.sleep(600)\n"
    )
    options = dict(stdout=subprocess.PIPE, text=True, cwd=common.ROOT, start_new_session=True)
    with subprocess.Popen([sys.executable, "-c", code], **options) as parent:
        assert parent.stdout.readline() == "working\n"
        parent.kill()
        try:
            parent.communicate(timeout=60)  # until the workers, too, have closed their output
        except subprocess.TimeoutExpired:
            os.killpg(parent.pid, signal.SIGKILL)
            pytest.fail("a worker outlived the program")


def test_many_episodes_come_in_blocks(tmp_path, collect, pretrained):
    """More episodes than worlds: two blocks for each half, none of them played twice."""
    metadata = collect("simple_tag", "random-medium", tmp_path, 25 * 2101)
    assert (metadata["transitions"], metadata["episodes"]) == (25 * 2101, 2101)
    data, loaded = arrays(tmp_path, "simple_tag", "random-medium"), load(tmp_path, "simple_tag", "random-medium")
    assert len(np.unique(data["obs"][0, ::EPISODE_STEPS], axis=0)) == len(loaded.returns) == 2101
    noise = action_noise(data, behaviour(pretrained, "simple_tag", "medium")[0])
    worst = np.nanmax(np.abs(noise).reshape(N, 2101, EPISODE_STEPS, A), axis=(0, 2, 3))
    assert sorted([(worst > 0.7).sum(), (worst < 0.7).sum()]) == [1050, 1051]
    check_against_environment("simple_tag", data, behaviour(pretrained, "simple_tag", "medium")[1])


@pytest.mark.parametrize("dataset", ["random", "medium", "random-medium"])
def test_same_seed_same_data(dataset, tmp_path, collect):
    made = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the global generator plays no part
        collect("simple_tag", dataset, tmp_path / str(i), seed=seed)
        made.append(arrays(tmp_path / str(i), "simple_tag", dataset, seed))
    for name in ("obs", "acs", "rews", "next_obs"):
        np.testing.assert_array_equal(made[0][name], made[1][name])
        assert not np.isclose(made[0][name], made[2][name]).all(axis=(0, 1)).any()


def test_transitions_are_whole_episodes(tmp_path, collect):
    assert collect("simple_spread", "random", tmp_path, 74)["transitions"] == 50
    with pytest.raises(UserError, match="--num-transitions 49"):
        collect("simple_spread", "random", tmp_path / "b", 49)
    assert not (tmp_path / "b").exists()


# ---- behaviour policies ----


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["simple_tag", "simple_spread"])
def test_retraining_and_the_replay_data(scenario, tmp_path, monkeypatch):
    """Training from scratch on a recipe that ends at once, and medium-replay from what it made: TD3's own buffer."""
    recipe = train_behaviour.RECIPES[scenario]
    monkeypatch.setitem(train_behaviour.PUBLISHED, scenario, {"medium": -1e9, "expert": -1e9})
    monkeypatch.setitem(train_behaviour.RECIPES, scenario, replace(recipe, prey_updates=3 * (scenario == "simple_tag")))
    monkeypatch.setattr(train_behaviour.TD3, "batch_size", 16)
    policies, prey = tmp_path / "pretrained", None
    arguments = ["train_behaviour.py", "--scenario", scenario, "--output", str(policies)]
    monkeypatch.setattr(sys, "argv", arguments)
    train_behaviour.main()
    made = contents(policies)
    with pytest.raises(UserError, match=rf"{scenario}\.pt: exists.*--overwrite"):
        train_behaviour.main()
    assert contents(policies) == made
    collect_datasets.collect(scenario, "medium-replay", tmp_path, 100_000, pretrained_dir=policies)

    trained = load_torch(policies / f"{scenario}.pt")
    assert len(trained["agent_params"]) == len(SCENARIOS[scenario].agents) and len(trained["medium"]) == N
    if scenario == "simple_tag":
        prey = load_prey(policies / "simple_tag.pt", 14)
    data = arrays(tmp_path, scenario, "medium-replay")
    check_against_environment(scenario, data, prey)
    episodes = data["obs"].shape[1] // EPISODE_STEPS
    td3 = train_behaviour.TD3(scenario, prey, 250, 0)
    td3.train(250, tqdm(disable=True))
    for ours, kept in zip(td3.policies(), trained["medium"], strict=True):
        assert all(torch.equal(ours[name], value) for name, value in kept["policy"].items())
    whole = td3.steps // EPISODE_STEPS
    assert episodes == 16 * whole
    parts = td3.buffer[:, : whole * EPISODE_STEPS].split(td3.widths, -1)
    for name, array in zip(("obs", "acs", "rews", "next_obs"), parts[:4], strict=True):
        buffer = array.unflatten(1, (whole, EPISODE_STEPS)).transpose(2, 3)  # [n, blocks, worlds, 25, width]
        np.testing.assert_array_equal(data[name].reshape(buffer.shape), buffer)
    assert not data["dones"].any()
    obs, next_obs = (data[k].reshape(N, episodes, EPISODE_STEPS, -1) for k in ("obs", "next_obs"))
    np.testing.assert_array_equal(next_obs[:, :, :-1], obs[:, :, 1:])
    loaded = load(tmp_path, scenario, "medium-replay")
    assert len(np.unique(obs[0, :, 0], axis=0)) == episodes == len(loaded.returns)


def test_long_replay_data_are_thinned_out_evenly(tmp_path, collect, monkeypatch):
    """Every array of a kept episode is that episode's."""
    widths = {"obs": 16, "acs": 2, "rews": 1, "next_obs": 16, "dones": 1}
    numbers = torch.arange(40.0).repeat_interleave(EPISODE_STEPS).view(1, -1, 1)
    blocks = []
    for part in numbers.split(16 * EPISODE_STEPS, 1):
        block = {name: part.expand(N, -1, width) for name, width in widths.items()}
        blocks.append((block, torch.full((part.shape[1] // EPISODE_STEPS,), EPISODE_STEPS)))
    monkeypatch.setattr(collect_datasets, "replay", lambda *args: blocks)
    assert collect("simple_tag", "medium-replay", tmp_path, 250)["transitions"] == 250
    for array in arrays(tmp_path, "simple_tag", "medium-replay").values():
        for agent in array:
            episodes = agent.reshape(10, -1)
            assert (episodes == episodes[:, :1]).all()  # whole episodes
            kept = episodes[:, 0]
            assert kept[0] == 0 and kept[-1] == 39 and set(np.diff(kept)) <= {4.0, 5.0}
    assert collect("simple_tag", "medium-replay", tmp_path / "all", 10_000)["episodes"] == 40


def test_unstacked_policies_act_like_the_stack():
    torch.manual_seed(0)
    sizes = (5, 5, 3)
    actor = train_behaviour.StackedMLP(3, 5, 8, 2)
    for i, params in enumerate(train_behaviour.unstack(actor, sizes)):
        obs = torch.randn(7, sizes[i])
        stacked = actor(F.pad(obs, (0, 5 - sizes[i])).expand(3, 7, 5))[i].tanh()
        torch.testing.assert_close(policy_action(params, obs), stacked)
        np.testing.assert_allclose(plain_policy(params, obs), stacked.detach(), atol=1e-5)


class OmarPolicy(nn.Module):
    """The policy network of OMAR's checkpoints."""

    def __init__(self, obs_size, hidden=64):
        super().__init__()
        self.in_fn = nn.BatchNorm1d(obs_size)
        self.fc1, self.fc2, self.fc3 = nn.Linear(obs_size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)

    def forward(self, x):
        return torch.tanh(self.fc3(F.relu(self.fc2(F.relu(self.fc1(self.in_fn(x)))))))


def omar_checkpoint(path, obs_size, **options):
    """A `pretrained_adv_model.pt` after some training; returns the prey."""
    torch.manual_seed(0)
    agents = [OmarPolicy(obs_size) for _ in range(4)]
    params = []
    for agent in agents:
        optimizer = torch.optim.Adam(agent.parameters(), 0.01)
        for _ in range(5):
            optimizer.zero_grad()
            agent(3 * torch.randn(32, obs_size) + 1).square().mean().backward()
            optimizer.step()
        params.append({"policy": agent.state_dict(), "policy_optimizer": optimizer.state_dict()})
    torch.save({"init_dict": {"gamma": 0.95, "lr": 0.01}, "agent_params": params}, path, **options)
    return agents[-1].eval()


@pytest.mark.parametrize("zipped", [True, False])
def test_published_prey_loads(tmp_path, zipped):
    prey = omar_checkpoint(tmp_path / "adv.pt", 14, _use_new_zipfile_serialization=zipped)
    assert not torch.allclose(prey.in_fn.running_mean, torch.zeros(14), atol=0.1)
    params = load_prey(tmp_path / "adv.pt", 14)
    obs = 2 * torch.randn(50, 14, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(policy_action(params, obs), prey(obs).detach())
    torch.testing.assert_close(policy_action(params, obs.view(5, 10, 14)), prey(obs).detach().view(5, 10, 2))


# ---- datasets from elsewhere ----


@pytest.fixture
def published(tmp_path, data_dir):
    """A dataset without metadata, to change: its folder."""
    folder = tmp_path / "simple_tag" / "medium" / "seed_0_data"
    shutil.copytree(common.dataset_path(data_dir, "simple_tag", "medium"), folder)
    (folder / "metadata.json").unlink()
    return folder


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f8"])
def test_published_layout_loads(published, tmp_path, data_dir, column, dtype):
    expected = load(data_dir, "simple_tag", "medium")
    for file in published.iterdir():
        array = np.load(file).astype(dtype)
        if column and file.name.startswith(("rews", "dones")):
            array = array[:, None]
        np.save(file, array.astype(bool) if file.name.startswith("dones") else array)
    loaded = load(tmp_path, "simple_tag", "medium")
    tolerance = 0 if dtype != np.float16 else 0.01
    for name in ("obs", "action", "reward", "next_obs", "done"):
        ours, theirs = getattr(loaded, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)  # and the same dtype
    assert loaded.metadata == {}


# ---- data of one's own ----


def own_data(folder, data_dir, rows, ends):
    """`rows` rows of simple_spread without metadata, whose episodes end in the rows `ends` and at the time limit."""
    made = common.dataset_path(data_dir, "simple_spread", "random")
    folder = common.dataset_path(folder, "simple_spread", "random")
    folder.mkdir(parents=True)
    for name in FILES:
        for agent in range(N):
            array = np.load(made / f"{name}_{agent}.npy")
            array = np.concatenate([array] * -(-rows // len(array)))[:rows]
            if name == "dones":
                array[list(ends)] = 1
            np.save(folder / f"{name}_{agent}.npy", array)
    return folder


@pytest.mark.parametrize(
    "rows, ends, begin",
    [
        (100, (9, 24), [10, 15, 25, 25, 25]),
        (2500, (29, 49), [25, 5, 20, 25]),
    ],
)
def test_one_notion_of_where_episodes_end(rows, ends, begin, data_dir, tmp_path):
    """The data's own, in returns, augmentation, shares of the data and windows."""
    own_data(tmp_path, data_dir, rows, ends)
    data = load(tmp_path, "simple_spread", "random")
    lengths = begin + [25] * ((rows - sum(begin)) // 25)
    assert data.lengths.tolist() == lengths and data.starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    reward = arrays(tmp_path, "simple_spread", "random")["rews"].mean(0)
    returns = [x.sum() for x in np.split(reward, np.cumsum(lengths)[:-1])]
    np.testing.assert_allclose(data.returns, returns, rtol=1e-5)
    assert data.done.nonzero()[:, 1].tolist() == list(ends) * N  # none of them at the time limit

    torch.manual_seed(0)
    episode = torch.arange(len(lengths)).repeat_interleave(data.lengths)
    numbered = data._replace(obs=episode.float().expand(N, -1)[..., None], next_obs=data.next_obs[..., :1])
    numbered = numbered._replace(next_obs=numbered.obs)
    part = take_share(numbered, 0.5)
    starts = part.starts.tolist()
    assert [x.unique().numel() for x in part.obs[0, :, 0].tensor_split(starts[1:])] == [1] * len(starts)
    half = data.returns.quantile(torch.tensor([0.5])).tolist()
    numbered = numbered.replicated(lambda returns: dom2_mpe.augment(returns, half))
    for script in ("baselines/ma_sfbc", "baselines/madiff"):
        algorithm, small = SCRIPTS[script]
        many = dict(batch_size=800) if script == "baselines/madiff" else dict(plan_windows=200)
        batch = algorithm.sample_batch(numbered, algorithm.args(**small | dict(dataset="random") | many))
        obs = batch.obs if script == "baselines/madiff" else batch.windows.obs
        windows = obs.reshape(N, -1, small.get("window") or small["horizon"])
        assert (windows == windows[..., :1]).all() and windows.unique().numel() > len(lengths) / 2


@pytest.mark.parametrize("script", ["dom2_mpe", "baselines/ma_sfbc", "baselines/madiff"])
def test_episodes_that_end_early_are_learned_from(script, data_dir, tmp_path):
    own_data(tmp_path / "own", data_dir, 100, (9, 24))
    algorithm, small = SCRIPTS[script]
    tiny = dict(dataset="random", updates=2, batch_size=8, eval_episodes=2, shift=(), cuda=False)
    places = dict(data_dir=tmp_path / "own", run_dir=tmp_path / "runs")
    results = dom2_mpe.train(algorithm.args(**small | tiny | places), algorithm)
    assert results["data"]["transitions"] == 100 and np.isfinite(results["returns"]["none"]).all()


@pytest.mark.parametrize("agents, row", [((0,), 12), ((1, 2), 7), ((0,), 24)])
def test_agents_that_end_at_different_times_are_refused(agents, row, data_dir, tmp_path):
    """A team's episode ends for all at once. Also where the time limit ends it anyway: the flags are wrong."""
    folder = own_data(tmp_path, data_dir, 50, ())
    for agent in agents:
        dones = np.load(folder / f"dones_{agent}.npy")
        dones[row] = 1
        np.save(folder / f"dones_{agent}.npy", dones)
    with pytest.raises(UserError, match=f"dones: the agents differ in row {row};"):
        load(tmp_path, "simple_spread", "random")


def test_actions_that_no_policy_can_take_are_reported(data_dir, tmp_path, capsys):
    folder = own_data(tmp_path, data_dir, 500, ())
    args = options(tmp_path, scenario="simple_spread", dataset="random")
    load_data(args, common.make_env("simple_spread"), None)
    assert capsys.readouterr().err == ""
    outside = 0
    for agent in range(N):
        actions = 10 * np.load(folder / f"acs_{agent}.npy")
        outside += (np.abs(actions) > 1).mean() / N
        np.save(folder / f"acs_{agent}.npy", actions)
    data = load_data(args, common.make_env("simple_spread"), None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder}: {outside:.2%} of the action entries are outside [-1, 1]")
    assert outside > 0.5 and data.action.abs().max() > 9  # nothing is cut in silence


@pytest.mark.parametrize("scenario", ["simple_spread", "Reacher"])
def test_rows_that_do_not_follow_each_other_are_reported(scenario, data_dir, tmp_path, capsys):
    """As where the steps of five environments were written in turn: returns and windows would mix them."""
    env = common.make_env(scenario)
    made, folder = (common.dataset_path(x, scenario, "random") for x in (data_dir, tmp_path))
    arguments = dom2_mamujoco.DOM2.args("Reacher", "random") if scenario == "Reacher" else options(tmp_path)
    arguments = replace(arguments, scenario=scenario, dataset="random", data_dir=tmp_path)
    folder.mkdir(parents=True)

    def reported(in_turn):
        for name in FILES:
            for agent in range(env.num_agents):
                array = np.load(made / f"{name}_{agent}.npy")
                if in_turn:
                    array = np.stack(np.split(array, 5), 1).reshape(array.shape)
                np.save(folder / f"{name}_{agent}.npy", array)
        load_data(arguments, env, None)
        return capsys.readouterr().err

    assert reported(in_turn=False) == ""
    assert reported(in_turn=True).startswith(
        f"warning: {folder}: next_obs of row 0 is not obs of row 1 of the same episode; write whole episodes"
    )


@pytest.mark.parametrize("value", [2, -1, 0.5, np.nan])
def test_dones_are_zeros_and_ones(value, data_dir, tmp_path):
    folder = own_data(tmp_path, data_dir, 100, (9,))
    dones = np.load(folder / "dones_1.npy").astype(np.float32)
    dones[24] = value
    np.save(folder / "dones_1.npy", dones)
    with pytest.raises(UserError, match=r"dones_1\.npy: holds other numbers than 0 and 1; mend the files"):
        load(tmp_path, "simple_spread", "random")


def test_what_others_made_is_never_to_be_deleted(data_dir, tmp_path):
    """Only a dataset with metadata.json can be made again; the first bad row is named."""
    folder = own_data(tmp_path, data_dir, 100, ())
    array = np.load(folder / "obs_1.npy")
    array[[41, 43], 3] = np.nan
    np.save(folder / "obs_1.npy", array)
    with pytest.raises(UserError) as error:
        load(tmp_path, "simple_spread", "random")
    text = "obs_1.npy: holds NaN or infinity, first in row 41; mend the files or copy them again"
    assert text in str(error.value) and "delete" not in str(error.value)
    shutil.rmtree(tmp_path / "simple_spread")
    shutil.copytree(data_dir / "simple_spread" / "random", tmp_path / "simple_spread" / "random")
    (folder / "obs_1.npy").unlink()
    with pytest.raises(UserError, match="delete its folder and make it again"):
        load(tmp_path, "simple_spread", "random")


# ---- datasets as training takes them ----


def options(data_dir, **changes):
    return dom2_mpe.DOM2.args(**{"scenario": "simple_tag", "dataset": "medium", "data_dir": str(data_dir)} | changes)


def tag_env():
    return common.make_env("simple_tag")


def test_training_takes_the_dataset_with_standardised_rewards(data_dir):
    loaded = load(data_dir, "simple_tag", "medium")
    raw = load_data(options(data_dir, raw_rewards=True), tag_env(), None)
    scaled = load_data(options(data_dir, reward_scale=3.0), tag_env(), None)
    for name in ("obs", "action", "reward", "next_obs", "done", "starts", "lengths", "returns"):
        assert torch.equal(getattr(raw, name), getattr(loaded, name))
        assert name == "reward" or torch.equal(getattr(scaled, name), getattr(loaded, name))
    reward = loaded.reward.numpy().astype(np.float64)
    np.testing.assert_allclose(scaled.reward, 3 * (reward - reward.mean()) / reward.std(ddof=1), atol=1e-4)


def test_rewards_keep_their_mean_where_episodes_terminate():
    """A constant added to every reward would change what an early end costs."""
    reward = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 7 + 100
    kept, done = reward.clone(), torch.zeros(2, 50)
    x = reward.double().numpy()
    np.testing.assert_allclose(standardise(reward, done), (x - x.mean()) / x.std(ddof=1), atol=1e-4)
    done[0, 9] = 1
    np.testing.assert_allclose(standardise(reward, done), x / x.std(ddof=1), rtol=1e-4)
    assert torch.equal(reward, kept)
    equal = torch.full((2, 50), -1.1)  # nothing to divide by
    np.testing.assert_allclose(standardise(equal, torch.zeros(2, 50)), torch.zeros(2, 50), atol=1e-6)
    assert torch.equal(standardise(equal, done), equal)


def test_a_share_is_whole_trajectories_each_with_its_rows(data_dir):
    loaded = load(data_dir, "simple_tag", "medium")
    episodes = {columns.numpy().tobytes(): i for i, columns in enumerate(columns_of(loaded).split(25, 1))}
    drawn = []
    for seed, share in ((0, 0.3), (0, 0.3), (1, 0.3), (0, 1e-6)):
        torch.manual_seed(seed)
        part = take_share(loaded, share)
        count = max(1, round(20 * share))
        assert part.obs.shape[1] == 25 * count and part.starts.tolist() == [25 * i for i in range(count)]
        found = [episodes[columns.numpy().tobytes()] for columns in columns_of(part).split(25, 1)]
        assert len(set(found)) == count and torch.equal(part.returns, loaded.returns[found])
        assert part.lengths.tolist() == [25] * count and part.metadata == loaded.metadata
        drawn.append(set(found))
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(0)
    part = load_data(options(data_dir, data_fraction=0.3), tag_env(), None)  # standardised over what is kept
    np.testing.assert_allclose([part.reward.double().mean(), part.reward.double().std()], [0, 1], atol=1e-4)
    assert len(part.returns) == 6


def test_every_seed_learns_from_its_own_share(data_dir):
    loaded = load(data_dir, "simple_tag", "medium")
    episodes = {x.numpy().tobytes(): i for i, x in enumerate(loaded.obs.split(25, 1))}
    torch.manual_seed(0)
    data = load_data(options(data_dir, data_fraction=0.3, num_seeds=3), tag_env(), None)
    assert data.versions == {f"share {i} of seed_0_data": 6 for i in (1, 2, 3)}
    shares = [[episodes[x.numpy().tobytes()] for x in part.split(25, 1)] for part in data.obs.split(150, 1)]
    assert [len(set(share)) for share in shares] == [6] * 3 and len(set(map(frozenset, shares))) == 3
    for share, reward in zip(shares, data.reward.split(150, 1), strict=True):
        kept = torch.cat([loaded.reward[:, 25 * i : 25 * i + 25] for i in share], 1)
        torch.testing.assert_close(reward, (kept - kept.mean()) / kept.double().std().float(), rtol=1e-4, atol=1e-4)
    (best,) = data.returns[6:12].quantile(torch.tensor([1.0])).tolist()  # of the second share
    replicated = data.replicated(lambda returns: dom2_mpe.augment(returns, [best]))
    assert [len(rows) for rows in replicated.index] == [
        25 * (6 + int((x >= best).sum())) for x in data.returns.split(6)
    ]
    drawn = draw(replicated.index, 9, 1000)  # three agents of each seed
    assert [(int(rows.min()) // 150, int(rows.max()) // 150) for rows in drawn.split(3)] == [(0, 0), (1, 1), (2, 2)]


def test_data_made_with_another_prey_are_refused(tmp_path, data_dir, pretrained):
    prey = load_prey(pretrained / "simple_tag.pt", 14)
    load_data(options(data_dir), tag_env(), prey)
    other = prey | {"fc3.bias": prey["fc3.bias"] + 1e-6}
    assert policy_checksum(other) != policy_checksum(prey)
    with pytest.raises(UserError, match=r"simple_tag.medium.seed_0_data: made with another prey.*pass it as --prey"):
        load_data(options(data_dir), tag_env(), other)
    with pytest.raises(UserError, match=r"another prey than --prey mine\.pt; give the right one"):
        load_data(options(data_dir, prey="mine.pt"), tag_env(), other)
    shutil.copytree(data_dir / "simple_tag", tmp_path / "simple_tag")
    for file in tmp_path.rglob("metadata.json"):
        file.unlink()
    load_data(options(tmp_path), tag_env(), other)  # nobody knows the prey of data from elsewhere


def test_missing_data_are_made_and_change_nothing_else(tmp_path, monkeypatch, collect):
    """The first run, which makes the dataset, draws the same random numbers as the next one."""
    monkeypatch.setattr(
        collect_datasets, "collect", lambda *args, **more: torch.rand(3) is None or collect(*args, **more)
    )
    monkeypatch.chdir(tmp_path)  # data are made in the default folder alone
    after = []
    for _ in range(2):
        torch.manual_seed(0)
        data = load_data(options("datasets"), tag_env(), None)
        after.append((torch.rand(5), data.obs))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert torch.equal(after[0][1], load("datasets", "simple_tag", "medium").obs)
    damage = common.dataset_path("datasets", "simple_tag", "medium") / "acs_1.npy"
    flip_byte(damage, 2000)  # a damaged one is neither made anew nor learned from
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"acs_1\.npy"):
        load_data(options("datasets"), tag_env(), None)
    assert contents(tmp_path) == before


def test_missing_data_are_not_made_with_another_prey_than_the_given_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such dataset, .* another prey than --prey; run collect"):
        load_data(options("datasets", prey="mine.pt"), tag_env(), None)
    assert not list(tmp_path.iterdir())


def test_medium_replay_records_no_noise_of_its_own(tmp_path, collect):
    made = collect("simple_tag", "medium-replay", tmp_path, 250, action_noise=0.5)
    assert made["action_noise"] == {} and collect("simple_tag", "medium", tmp_path)["action_noise"] == {"medium": 0.1}


def test_datasets_that_cannot_be_made_are_refused_before_any_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["collect_datasets.py", "--scenario", "simple_tag", "Hopper"])
    with pytest.raises(UserError, match=r"Hopper.random-medium.seed_0_data: missing, .* no behaviour policies"):
        collect_datasets.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux, where a process chooses its cores")
def test_usable_cores_are_those_of_the_process(monkeypatch):
    allowed = os.sched_getaffinity(0)
    assert usable_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on Windows and macOS
    assert usable_cores() == os.cpu_count()


# ---- damage ----


class Executed:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def flip_byte(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


def overwrite(value):
    def damage(folder):
        array = np.load(folder / "next_obs_1.npy")
        array[7, 3] = value
        np.save(folder / "next_obs_1.npy", array)
        return "next_obs_1.npy"

    return damage


def changed(name, change):
    def damage(folder):
        np.save(folder / name, change(np.load(folder / name)))
        return name

    return damage


def missing(folder):
    (folder / "acs_2.npy").unlink()
    return "acs_2.npy"


def truncated(folder):
    os.truncate(folder / "obs_1.npy", 1000)
    return "obs_1.npy"


def empty(folder):
    os.truncate(folder / "rews_0.npy", 0)
    return "rews_0.npy"


def text(folder):
    (folder / "obs_0.npy").write_text("obs\n1.0\n")
    return "obs_0.npy"


def archive(folder):
    with open(folder / "obs_0.npy", "wb") as f:
        np.savez(f, obs=np.zeros(3))
    return "obs_0.npy"


def directory(folder):
    (folder / "obs_0.npy").unlink()
    (folder / "obs_0.npy").mkdir()
    return "obs_0.npy"


def swapped(folder):
    (folder / "obs_0.npy").rename(folder / "x")
    (folder / "obs_1.npy").rename(folder / "obs_0.npy")
    (folder / "x").rename(folder / "obs_1.npy")
    return "obs_0.npy"


def flipped(folder):
    flip_byte(folder / "acs_1.npy", 2000)
    return "acs_1.npy"


def other_metadata(folder):
    text = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text(text.replace('"medium"', '"expert"'))
    return "metadata.json"


def other_scenario(folder):
    text = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text(text.replace('"simple_tag"', '"simple_world"'))
    return "metadata.json"


def metadata_is(text):
    def damage(folder):
        (folder / "metadata.json").write_bytes(text)
        return "metadata.json"

    return damage


def uncounted(folder):
    metadata = json.loads((folder / "metadata.json").read_text())
    del metadata["checksums"]["acs_1.npy"]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return "acs_1.npy"


def refused(data_dir, name, dataset="medium"):
    """Loading is refused in one line that names the file."""
    before = {file: file.read_bytes() for file in Path(data_dir).rglob("*") if file.is_file()}
    with pytest.raises(UserError) as error:
        load(data_dir, "simple_tag", dataset)
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) > len(name) + 40
    assert {file: file.read_bytes() for file in Path(data_dir).rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "damage",
    [
        *(missing, truncated, empty, flipped, swapped, other_metadata, other_scenario, uncounted),
        overwrite(np.nan),
        metadata_is(b"[" * 100_000),  # deeper than Python's stack
        *(metadata_is(text) for text in (b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"scenario": "simple_tag"}')),
    ],
)
def test_damage_to_a_collected_dataset_is_noticed(damage, tmp_path, data_dir):
    shutil.copytree(data_dir / "simple_tag" / "medium", tmp_path / "simple_tag" / "medium")
    load(tmp_path, "simple_tag", "medium")
    refused(tmp_path, damage(tmp_path / "simple_tag" / "medium" / "seed_0_data"))


@pytest.mark.parametrize(
    "damage",
    [
        *(missing, truncated, empty, text, directory),
        archive,
        *(overwrite(value) for value in (np.nan, np.inf, -np.inf)),
        changed("acs_1.npy", lambda x: x[:-25]),  # another number of rows than the others
        changed("acs_1.npy", lambda x: x[:-1]),
        changed("dones_2.npy", lambda x: x[:0]),
        changed("obs_0.npy", lambda x: np.pad(x, ((0, 0), (0, 8)))),
        changed("acs_0.npy", lambda x: x[:, :1]),
        changed("acs_0.npy", lambda x: x[:, 0]),
        changed("rews_0.npy", lambda x: np.stack([x, x], 1)),
        changed("obs_2.npy", lambda x: x[:, None]),
        changed("obs_2.npy", lambda x: np.float32(1.0)),
        changed("rews_1.npy", lambda x: np.array(["good"] * len(x))),
        changed("rews_1.npy", lambda x: x.astype("datetime64[s]")),
        changed("rews_1.npy", lambda x: x + 1j),
        changed("obs_1.npy", lambda x: 1e300 * x.astype(np.float64)),  # infinite in float32
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_damage_to_a_dataset_without_metadata_is_noticed(damage, published, tmp_path):
    load(tmp_path, "simple_tag", "medium")
    refused(tmp_path, damage(published))


@pytest.mark.parametrize("rows", [0, 499])
def test_data_are_whole_episodes(rows, published, tmp_path):
    for file in published.iterdir():
        np.save(file, np.load(file)[:rows])
    refused(tmp_path, f"{rows} rows")


@pytest.mark.parametrize("dataset", ["medium", "expert"])
def test_data_of_another_scenario_are_noticed(dataset, tmp_path, data_dir):
    for scenario in ("simple_world", "simple_spread"):
        folder = tmp_path / scenario
        shutil.copytree(data_dir / scenario, folder / "simple_tag")
        refused(folder, "metadata.json", dataset)
        for file in folder.rglob("metadata.json"):
            file.unlink()
        refused(folder, "obs_0.npy", dataset)


def test_no_dataset(tmp_path):
    refused(tmp_path, str(Path("simple_tag") / "medium" / "seed_0_data" / "obs_0.npy"))


@pytest.mark.filterwarnings("ignore")
def test_damaged_array_headers_never_surprise(published, tmp_path):
    """Any byte of a header: the data load as they are, or the file is named."""
    file = published / "obs_0.npy"
    expected, original = columns_of(load(tmp_path, "simple_tag", "medium")), file.read_bytes()
    noticed = 0
    for position in range(128):
        for value in (0, ord("9"), ord("'"), original[position] ^ 0x01, original[position] ^ 0x80):
            file.write_bytes(original[:position] + bytes([value]) + original[position + 1 :])
            try:
                rows = columns_of(load(tmp_path, "simple_tag", "medium"))
                assert rows.shape == expected.shape and rows.isfinite().all()
            except UserError as error:
                noticed += 1
                assert "obs_0.npy" in str(error)
    assert noticed > 300


def test_pickles_in_arrays_are_not_executed(published, tmp_path):
    np.save(published / "obs_0.npy", np.array([Executed(tmp_path / "executed")] * 500, object), allow_pickle=True)
    refused(tmp_path, "obs_0.npy")
    (published / "obs_0.npy").write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
    refused(tmp_path, "obs_0.npy")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_in_checkpoints_are_not_executed(zipped, tmp_path):
    file = tmp_path / "adv.pt"
    torch.save({"agent_params": [Executed(tmp_path / "executed")]}, file, _use_new_zipfile_serialization=zipped)
    for read in (lambda: load_torch(file), lambda: load_prey(file, 14)):
        with pytest.raises(UserError, match=r"adv\.pt"):
            read()
    file.write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
    with pytest.raises(UserError, match=r"adv\.pt"):
        load_prey(file, 14)
    assert not (tmp_path / "executed").exists()


def policy_with(pretrained, name, change):
    params = dict(behaviour(pretrained, "simple_tag", "expert")[1])
    params[name] = change(params[name])
    return {"agent_params": [{"policy": params}]}


@pytest.mark.parametrize(
    "contents",
    [
        torch.zeros(3),
        [1, 2],
        {},
        {"agent_params": []},
        {"agent_params": 3},
        {"agent_params": [torch.zeros(2)]},
        {"agent_params": [{"policy": {}}]},
        {"agent_params": [{"policy": {"fc1.weight": 3}}]},
        {"agent_params": [{"policy": None}]},
    ],
    ids=str,
)
def test_other_checkpoints_are_no_prey(contents, tmp_path):
    torch.save(contents, tmp_path / "adv.pt")
    with pytest.raises(UserError, match=r"adv\.pt.*--prey"):
        load_prey(tmp_path / "adv.pt", 14)


@pytest.mark.parametrize(
    "name, change",
    [
        ("fc1.weight", lambda x: x[:, :-1]),  # another observation size
        ("fc3.weight", lambda x: x[:1]),  # another action size
        ("fc3.weight", lambda x: torch.cat([x, x, x])[:5]),
        ("fc2.weight", lambda x: x * float("nan")),
    ],
)
def test_prey_of_another_kind_is_noticed(name, change, tmp_path, pretrained):
    contents = policy_with(pretrained, name, change)
    if name.startswith("fc3"):
        params = contents["agent_params"][0]["policy"]
        params["fc3.bias"] = torch.zeros(len(params["fc3.weight"]))
    torch.save(contents, tmp_path / "adv.pt")
    with pytest.raises(UserError, match=r"adv\.pt"):
        load_prey(tmp_path / "adv.pt", 14)


def test_damaged_prey_files(tmp_path, pretrained):
    for scenario, size in (("simple_tag", 14), ("simple_world", 22)):
        load_prey(pretrained / f"{scenario}.pt", size)
        with pytest.raises(UserError, match=scenario):  # of another scenario
            load_prey(pretrained / f"{scenario}.pt", 36 - size)
    whole = (pretrained / "simple_tag.pt").read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 20):
        (tmp_path / "adv.pt").write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"adv\.pt"):
            load_prey(tmp_path / "adv.pt", 14)
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match="no such file"):
            load_prey(path, 14)


# ---- collecting is all or nothing ----


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_existing_data_are_not_overwritten(tmp_path, collect):
    collect("simple_tag", "random", tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"simple_tag.*random.*--overwrite"):
        collect("simple_tag", "random", tmp_path, num_transitions=50)
    assert contents(tmp_path) == before
    collect("simple_tag", "random", tmp_path, num_transitions=50, overwrite=True)
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after != before
    load(tmp_path, "simple_tag", "random")


@pytest.mark.parametrize("exists", [False, True])
def test_interrupted_collection_leaves_what_was_there(exists, tmp_path, collect, monkeypatch):
    if exists:
        collect("simple_tag", "random-medium", tmp_path, 100)
    before, rollout = contents(tmp_path), collect_datasets.rollout

    made = []

    def interrupted(*args):
        made.append(rollout(*args))
        if len(made) == 2:  # the second half of the mixture
            raise KeyboardInterrupt
        return made[-1]

    monkeypatch.setattr(collect_datasets, "rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect("simple_tag", "random-medium", tmp_path, overwrite=exists)
    assert contents(tmp_path) == before
    left = {path.relative_to(tmp_path).parts for path in tmp_path.rglob("*") if path.is_dir()}
    named = ("simple_tag", "random-medium", "seed_0_data")
    assert left == ({named[:1], named[:2], named} if exists else set())  # no empty folder looks like a scenario


def test_killed_collection_leaves_nothing_that_looks_like_a_dataset(tmp_path, collect, pretrained):
    code = """if True:
        import os, signal, sys
        import numpy as np
        import collect_datasets
        save, saved = np.save, []
        def killed(file, array):
            save(file, array)
            saved.append(file)
            if len(saved) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
        np.save = killed
        collect_datasets.collect("simple_tag", "random", sys.argv[1], 500, pretrained_dir=sys.argv[2])
    """
    command = [sys.executable, "-c", code, str(tmp_path), str(pretrained)]
    run = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(contents(tmp_path)) == 10  # it was killed in the middle
    assert not common.dataset_path(tmp_path, "simple_tag", "random").parent.exists()
    refused(tmp_path, "obs_0.npy", "random")
    collect("simple_tag", "random", tmp_path)  # and nothing is in the way of the next try
    load(tmp_path, "simple_tag", "random")


def test_full_disk(tmp_path, collect, monkeypatch):
    save, saved = np.save, []

    def full(file, array):
        if len(saved) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(save(file, array))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"simple_tag.*random.*No space left.*; free some space"):
        collect("simple_tag", "random", tmp_path)
    assert len(saved) == 5 and not list(tmp_path.iterdir())


def test_a_refusal_while_replacing_keeps_the_old_dataset(tmp_path, collect, monkeypatch):
    """Between the two renames; and a folder that may not be written is not called full."""
    collect("simple_tag", "random", tmp_path)
    before, rename = contents(tmp_path), os.rename

    def refused(source, target):
        if Path(source).suffix == ".tmp":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(UserError) as error:
        collect("simple_tag", "random", tmp_path, num_transitions=50, overwrite=True)
    folder = tmp_path / "simple_tag" / "random" / "seed_0_data"
    assert str(error.value) == f"{folder}: Permission denied; make it writable, or use a copy of it"
    assert contents(tmp_path) == before


def test_two_collections_at_once(tmp_path, collect, monkeypatch):
    """The other process was faster: its dataset stays."""
    rollout = collect_datasets.rollout

    def while_another_collects(*args):
        monkeypatch.setattr(collect_datasets, "rollout", rollout)
        with monkeypatch.context() as another_process:
            another_process.setattr(os, "getpid", lambda: 0)
            collect("simple_tag", "random", tmp_path, num_transitions=50)
        shutil.copytree(tmp_path, tmp_path.with_name("other"))
        return rollout(*args)

    monkeypatch.setattr(collect_datasets, "rollout", while_another_collects)
    collect("simple_tag", "random", tmp_path)
    assert contents(tmp_path) == contents(tmp_path.with_name("other"))


def test_behaviour_policies_that_do_not_fit(tmp_path, collect, pretrained):
    policies = tmp_path / "pretrained"
    policies.mkdir()
    bad = {
        "no such file": lambda file: None,
        "not a readable checkpoint": lambda file: file.write_bytes(b"?"),
        "simple_tag.pt": lambda file: torch.save({"agent_params": []}, file),
        "simple_tag.pt: not behaviour": lambda file: torch.save(good | {"replay": {"seed": 0}}, file),
        "not behaviour policies": lambda file: torch.save(
            good | {"replay": {"actions": torch.zeros(24, 16, 3, 2)}}, file
        ),
        "retrain them": lambda file: torch.save(good | {"replay": {"actions": torch.zeros(25, 16, 3, 2)}}, file),
        "policies of this scenario": lambda file: torch.save(
            good | {"replay": {"actions": torch.zeros(25, 16, 4, 2)}}, file
        ),
    }
    good = load_torch(pretrained / "simple_tag.pt")
    for message, make in bad.items():
        make(policies / "simple_tag.pt")
        with pytest.raises(UserError, match=message):
            collect("simple_tag", "medium", tmp_path / "datasets", pretrained_dir=policies)
        assert not contents(tmp_path / "datasets")


@pytest.mark.parametrize("broken", ["medium", "prey", "replay", "size"])
def test_no_data_are_made_of_broken_behaviour_policies(broken, tmp_path, collect, pretrained):
    """They would be written with checksums that fit."""
    contents_of = load_torch(pretrained / "simple_tag.pt")
    medium, prey = contents_of["medium"][1]["policy"], contents_of["agent_params"][-1]["policy"]
    if broken == "size":
        medium["fc3.weight"], medium["fc3.bias"] = medium["fc3.weight"][:1], medium["fc3.bias"][:1]
    else:
        tensor = {"medium": medium["fc2.bias"], "prey": prey["fc3.bias"], "replay": contents_of["replay"]["actions"]}
        tensor[broken].view(-1)[3 % tensor[broken].numel()] = np.nan
    torch.save(contents_of, tmp_path / "simple_tag.pt")
    with pytest.raises(UserError, match=r"simple_tag\.pt: not behaviour policies of this scenario"):
        collect("simple_tag", "medium-replay", tmp_path / "datasets", pretrained_dir=tmp_path)
    assert not (tmp_path / "datasets").exists()


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(s, marks=[] if s == "simple_tag" else pytest.mark.slow)
        for s in ("simple_spread", "simple_tag", "simple_world")
    ],
)
def test_replay_data_are_the_same_on_every_machine(scenario, tmp_path):
    """The committed actions make the committed dataset again: its size, and its returns up to rounding."""
    made = collect_datasets.collect(scenario, "medium-replay", tmp_path)
    with open(common.ROOT / "results/datasets.csv") as file:
        (row,) = [r for r in csv.DictReader(file) if (r["scenario"], r["dataset"]) == (scenario, "medium-replay")]
    assert (made["transitions"], made["episodes"]) == (int(row["transitions"]), int(row["episodes"]))
    for name in ("return_mean", "return_std"):
        assert made[name] == pytest.approx(float(row[name]), abs=0.1)


def test_behaviour_policies_of_another_scenario(tmp_path, collect, pretrained):
    shutil.copytree(pretrained, tmp_path / "pretrained")
    shutil.copy(pretrained / "simple_world.pt", tmp_path / "pretrained" / "simple_tag.pt")
    with pytest.raises(UserError, match=r"simple_tag\.pt"):
        collect("simple_tag", "medium", tmp_path / "datasets", pretrained_dir=tmp_path / "pretrained")
    assert not contents(tmp_path / "datasets")


def test_a_killed_process_of_the_same_id_is_not_in_the_way(tmp_path, collect):
    (tmp_path / "simple_tag" / f".random-{os.getpid()}.tmp" / "seed_0_data").mkdir(parents=True)
    collect("simple_tag", "random", tmp_path)
    load(tmp_path, "simple_tag", "random")


def test_what_killed_processes_left_is_deleted_after_a_day(tmp_path, collect):
    now, folder = time.time(), tmp_path / "simple_tag"
    ages = {".random-1-1.tmp": 25, ".expert-2-2.old": 25, ".random-3-3.tmp": 23, "mine.tmp": 25, ".mine": 25}
    for name, hours in ages.items():
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (now - 3600 * hours,) * 2)
    collect("simple_tag", "random", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"random", ".random-3-3.tmp", "mine.tmp", ".mine"}


@pytest.mark.parametrize("scenario, dataset", [("simple_tagg", "random"), ("simple_tag", "rondom")])
def test_unknown_names(scenario, dataset, tmp_path, collect):
    with pytest.raises(UserError, match=r"simple_tagg.*simple_spread|rondom.*medium-replay"):
        collect(scenario, dataset, tmp_path)
    assert not contents(tmp_path)


# ---- the paper's numbers ----


def test_normalised_score():
    for scenario, expert, random in (("simple_spread", 516.8, 159.8), ("simple_tag", 185.6, -4.1)):
        assert common.normalised_score(scenario, expert) == pytest.approx(100)
        assert common.normalised_score(scenario, random) == pytest.approx(0)
    assert common.normalised_score("simple_world", -6.8 + 86.3 / 4) == pytest.approx(25)
    assert common.normalised_score("HalfCheetah", -284.0 - 3852.8) == pytest.approx(-100)


def test_paper_results():
    assert common.paper_result("simple_tag", "random", "none") == (208.7, 57.3)
    assert common.paper_result("simple_tag", "random", "speed") == (120.7, 100.2)
    assert common.paper_result("simple_world", "expert", "none") == (99.5, 17.1)
    assert common.paper_result("simple_spread", "medium-expert", "none", "OMAR") == (450.3, 39.0)
    assert common.paper_result("HalfCheetah", "medium", "extreme") == (2232.4, 215.1)
    assert common.paper_result("simple_tag", "random", "extreme") is None
    assert common.paper_result("simple_tag", "random", "none", "PPO") is None


def test_paper_results_normalised_are_those_that_later_work_quotes():
    quoted = {  # random, medium-replay, medium, expert
        "simple_spread": (49.9, 46.0, 55.8, 131.3),
        "simple_tag": (112.2, 81.5, 84.3, 138.7),
        "simple_world": (54.2, 84.2, 105.8, 123.2),
        "HalfCheetah": (28.1, 73.9, 81.4, 102.8),
    }
    for scenario, scores in quoted.items():
        for dataset, score in zip(("random", "medium-replay", "medium", "expert"), scores, strict=True):
            mean, _ = common.paper_result(scenario, dataset, "none")
            assert common.normalised_score(scenario, mean) == pytest.approx(score, abs=0.06)


# ---- versions: seed_0_data, seed_1_data, ... ----


def make_versions(data_dir, *episodes):
    """Random data of simple_tag in versions 0, 1, ...: version k has episodes[k] episodes, every reward of agent i at
    time t is 100 k + t + i."""
    for k, number in enumerate(episodes):
        T = 25 * number
        folder = common.dataset_path(data_dir, "simple_tag", "random", k)
        folder.mkdir(parents=True)
        for i in range(N):
            rng = np.random.default_rng(i)
            np.save(folder / f"obs_{i}.npy", rng.normal(size=(T, 16)))
            np.save(folder / f"next_obs_{i}.npy", rng.normal(size=(T, 16)))
            np.save(folder / f"acs_{i}.npy", rng.uniform(-1, 1, (T, A)))
            np.save(folder / f"rews_{i}.npy", 100 * k + np.arange(T) % 25 + i)
            np.save(folder / f"dones_{i}.npy", np.zeros(T))


def test_every_seed_learns_from_its_own_version_as_it_would_alone(tmp_path):
    make_versions(tmp_path, 4, 6, 5)
    args = options(tmp_path, dataset="random", seed=1, num_seeds=2, raw_rewards=True, batch_size=500)
    data = load_data(args, tag_env(), None)
    assert data.versions == {"seed_1_data": 6, "seed_2_data": 5}
    assert data.returns.tolist() == [25 * 101 + 300] * 6 + [25 * 201 + 300] * 5
    data = data.replicated(lambda returns: dom2_mpe.augment(returns, [returns[0]]))  # every trajectory twice
    batch = dom2_mpe.sample_batch(data, args)
    expected = [[100 * k + i + t for t in range(25)] for k in (1, 2) for i in range(N)]  # seed-major
    assert [sorted(set(row.tolist())) for row in batch.reward] == expected
    for seed, rows in ((1, slice(0, 150)), (2, slice(150, 275))):
        alone = load_data(options(tmp_path, dataset="random", seed=seed), tag_env(), None)
        both = load_data(options(tmp_path, dataset="random", seed=1, num_seeds=2), tag_env(), None)
        assert torch.equal(both.reward[:, rows], alone.reward)  # standardised by itself
        assert torch.equal(both.obs[:, rows], alone.obs)


def test_thresholds_belong_to_a_version(tmp_path):
    make_versions(tmp_path, 4, 6)
    data = load_data(options(tmp_path, dataset="random", num_seeds=2), tag_env(), None)
    data = data._replace(returns=torch.arange(10.0)).replicated(lambda r: dom2_mpe.augment(r, [r.quantile(0.9).item()]))
    assert [e.tolist() for e in data.episodes] == [[0, 1, 2, 3, 3], [4, 5, 6, 7, 8, 9, 9]]
    assert data.index[1].tolist() == [*range(100, 250), *range(225, 250)]


def test_one_version_is_shared_by_all_seeds_whatever_its_number(tmp_path):
    make_versions(tmp_path, 4, 6)
    shutil.rmtree(common.dataset_path(tmp_path, "simple_tag", "random", 0))
    data = load_data(options(tmp_path, dataset="random", num_seeds=3), tag_env(), None)
    assert data.versions == {"seed_1_data": 6}


def test_a_seed_without_its_own_version_is_refused_by_name(tmp_path):
    make_versions(tmp_path, 4, 6)
    with pytest.raises(UserError, match=r"seed_2_data: missing; there are seed_0_data, seed_1_data"):
        load_data(options(tmp_path, dataset="random", num_seeds=3), tag_env(), None)


def test_every_seed_of_a_collection_is_a_version_of_its_own(tmp_path, pretrained):
    for seed in (0, 3):
        collect_datasets.collect("simple_tag", "random", tmp_path, 50, seed, pretrained_dir=pretrained)
    folders = sorted((tmp_path / "simple_tag" / "random").iterdir())
    assert [folder.name for folder in folders] == ["seed_0_data", "seed_3_data"]
    first, other = (np.load(folder / "acs_0.npy") for folder in folders)
    assert not np.array_equal(first, other)
