"""Multi-agent MuJoCo: environments, datasets and dom2_mamujoco.py."""

import ast
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import collect_datasets
import common
import dom2_mamujoco
import dom2_mpe
import mamujoco_env
from experiments import train_behaviour
from mamujoco_env import SHIFTS, MujocoEnv, task_name
from run import Run, parse
from utils.arrays import episode_lengths
from utils.data import load_data
from utils.evaluation import write_gif
from utils.frozen import load_behaviour
from utils.program import UserError, load_torch

ROOT = Path(__file__).resolve().parent.parent


def library_env(scenario, agent_conf, agent_obsk=0):
    with mamujoco_env.quiet():
        from gymnasium_robotics import mamujoco_v1

        return mamujoco_v1.parallel_env(scenario, agent_conf, agent_obsk, global_categories=())


def model_of(env, i):
    return env.robots[i].model


# ---- environments ----


@pytest.mark.parametrize("task", ["simple_spread", "simple_tag", "HalfCheetah", "Hopper", "HalfCheetah-6x1-obsk1"])
def test_particles_and_robots_have_one_interface(task):
    shapes = {
        "simple_spread": (3, 18, 2),
        "simple_tag": (3, 16, 2),
        "HalfCheetah": (2, 6, 3),
        "Hopper": (3, 2, 1),
        "HalfCheetah-6x1-obsk1": (6, 4, 1),
    }
    n, d, A = shapes[task]
    preys = []

    def prey(obs):
        preys.append(obs.shape)
        return torch.zeros(5, 2)

    env = common.make_env(task, 5, seed=1, prey=prey, render_mode="rgb_array")
    assert (env.num_envs, env.num_agents, env.obs_size, env.action_size) == (5, n, d, A)
    assert env.device == torch.device("cpu") and isinstance(env.episode_steps, int)
    assert isinstance(env.agents, tuple) and len(set(env.agents)) == n
    assert tuple(env.obs_sizes) == ((4, 4, 3, 4, 4, 3) if "6x1" in task else (d,) * n)
    for _ in range(2):  # episodes
        obs = env.reset()
        assert obs.shape == (5, n, d) and obs.dtype == torch.float32 and obs.device == env.device
        first, kept = obs, obs.clone()
        for _ in range(3):
            state = env.state
            before = None if state is None else state.clone()
            obs, rewards, terminated = env.step(2 * torch.rand(5, n, A) - 1)
            assert obs.shape == (5, n, d) and rewards.shape == (5, n) and terminated.shape == (5,)
            assert (obs.dtype, rewards.dtype, terminated.dtype) == (torch.float32, torch.float32, torch.bool)
            assert obs.device == rewards.device == terminated.device == env.device
            assert not torch.equal(obs, first) and not terminated.any()
            if state is not None:
                assert state.shape[0] == 5 and state.dtype == torch.float32 and state.device == env.device
                assert torch.equal(state, before) and not torch.equal(env.state, state)
        assert torch.equal(first, kept)  # what was returned stays
    assert preys == ([(5, 14)] * 6 if task == "simple_tag" else [])
    again = common.make_env(task, 5, seed=1, prey=prey)
    assert torch.equal(again.reset(), common.make_env(task, 5, seed=1, prey=prey).reset())
    assert not torch.equal(again.reset(), common.make_env(task, 5, seed=2, prey=prey).reset())
    if task == "HalfCheetah-6x1-obsk1":  # the picture is HalfCheetah's, and slow
        return
    try:
        images = [env.render(), env.render(1)]
    except RuntimeError as error:
        assert "no off-screen renderer" in str(error) and task not in common.particle_env.SCENARIOS
        return
    for image in images:
        assert image.shape == (300, 300, 3) and image.dtype == np.uint8
    assert not np.array_equal(*images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")
@pytest.mark.parametrize("task", ["simple_tag", "Hopper"])
def test_tensors_are_on_the_device(task):
    env = common.make_env(task, 2, "speed" if task == "simple_tag" else "extreme", "cuda", prey=lambda obs: obs[:, :2])
    tensors = [env.reset(), *env.step(torch.zeros(2, 3, env.action_size, device="cuda"))]
    assert all(x.is_cuda for x in tensors) and env.device.type == "cuda"


@pytest.mark.parametrize(
    "scenario, agent_conf, agent_obsk, sizes",
    [
        ("HalfCheetah", "2x3", 0, [6, 6]),
        ("HalfCheetah", "6x1", 1, [4, 4, 3, 4, 4, 3]),
        ("Hopper", "3x1", 1, [3, 4, 3]),
        ("Walker2d", "2x3", 0, [6, 6]),
        ("Ant", "4x2", 0, None),
    ],
)
def test_steps_are_the_librarys(scenario, agent_conf, agent_obsk, sizes):
    """Two episodes of two environments, number for number; smaller observations end with zeros."""
    env = MujocoEnv(task_name(scenario, agent_conf, agent_obsk), 2, seed=7)
    ours, rng, fallen = env.reset(), np.random.default_rng(0), [False, False]
    theirs = [library_env(scenario, agent_conf, agent_obsk) for _ in range(2)]
    obs = [e.reset(seed=int(np.random.SeedSequence([7, i]).generate_state(1)[0]))[0] for i, e in enumerate(theirs)]
    names = theirs[0].possible_agents
    if sizes is not None:
        assert [len(obs[0][name]) for name in names] == sizes
    for episode in range(2):
        if episode:
            ours, fallen, obs = env.reset(), [False, False], [e.reset()[0] for e in theirs]
        for _ in range(30):
            for i in range(2):
                for agent, name in enumerate(names):
                    expected = np.zeros(env.obs_size, np.float32)
                    expected[: len(obs[i][name])] = obs[i][name]
                    np.testing.assert_array_equal(ours[i, agent], expected)
                np.testing.assert_array_equal(env.state[i], theirs[i].state().astype(np.float32))
            actions = rng.uniform(-1, 1, (2, env.num_agents, env.action_size))
            ours, ours_rewards, terminated = env.step(torch.from_numpy(actions))
            for i in np.flatnonzero(~np.array(fallen)):
                obs[i], rewards, terminations, _, _ = theirs[i].step(dict(zip(names, actions[i], strict=True)))
                assert ours_rewards[i].tolist() == [np.float32(rewards[name]) for name in names]
                fallen[i] = terminations[names[0]]
            assert terminated.tolist() == fallen


def test_episodes_have_1000_steps():
    assert MujocoEnv("HalfCheetah", 1).episode_steps == 1000


def test_a_fallen_robot_stands_still():
    env = MujocoEnv("Hopper", 3, seed=1)
    obs, fallen, ends = env.reset(), torch.zeros(3, dtype=torch.bool), torch.zeros(3)
    for step in range(1, 200):
        before, state = obs, env.state
        obs, rewards, terminated = env.step(torch.ones(3, 3, 1))
        assert (obs[fallen] == before[fallen]).all() and (env.state[fallen] == state[fallen]).all()
        assert (rewards[fallen] == 0).all() and (rewards[~fallen] != 0).all() and terminated[fallen].all()
        ends[terminated & ~fallen] = step
        fallen = terminated
        if terminated.all():
            break
    assert (ends > 0).all() and len(ends.unique()) > 1
    env.reset()
    assert not env.step(torch.zeros(3, 3, 1))[2].any()


def test_an_environments_episodes_depend_on_seed_and_number_alone():
    few, many = MujocoEnv("HalfCheetah", 2, "random", seed=3), MujocoEnv("HalfCheetah", 4, "random", seed=3)
    other = MujocoEnv("HalfCheetah", 2, "random", seed=(3, 0))
    for _ in range(2):
        obs, obs_of_many = few.reset(), many.reset()
        np.testing.assert_array_equal(obs, obs_of_many[:2])
        np.testing.assert_array_equal(few.ratios, many.ratios[:2])
        assert (other.reset() != obs).any()
        assert len(np.unique(obs_of_many.reshape(4, -1), axis=0)) == 4


def test_a_used_environment_with_a_new_seed_equals_a_new_one():
    actions = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (30, 3, 3, 1)))

    def play(env):
        return torch.stack([env.reset(), *(env.step(a)[0] for a in actions)]), env.state

    used = MujocoEnv("Hopper", 3, seed=1)
    play(used)
    used.seed((7, 2))
    (obs, state), (expected_obs, expected_state) = play(used), play(MujocoEnv("Hopper", 3, seed=(7, 2)))
    np.testing.assert_array_equal(obs, expected_obs)
    np.testing.assert_array_equal(state, expected_state)


def test_random_state_goes_on_where_it_was():
    env, copy = MujocoEnv("HalfCheetah", 2, "extreme", seed=1), MujocoEnv("HalfCheetah", 2, "extreme", seed=9)
    env.reset()
    copy.set_random_state(env.random_state())
    np.testing.assert_array_equal(env.reset(), copy.reset())
    np.testing.assert_array_equal(env.ratios, copy.ratios)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifted_models_hold_what_was_drawn(shift):
    """Read back from the compiled models, after several resets; everything else stays as it was."""
    env, standard = MujocoEnv("HalfCheetah", 8, shift, seed=2), library_env("HalfCheetah", "2x3")
    default = standard.single_agent_env.unwrapped.model
    torso = default.body("torso").id
    draws = []
    for _ in range(5):
        env.reset()
        draws.append(env.ratios.copy())
    assert len(np.unique(np.concatenate(draws), axis=0)) == 40
    for i, (gear, mass, friction) in enumerate(env.ratios):
        model = model_of(env, i)
        np.testing.assert_allclose(model.actuator_gear, default.actuator_gear * gear)
        np.testing.assert_allclose(model.body_mass[torso], default.body_mass[torso] * mass)
        np.testing.assert_allclose(model.body_inertia[torso], default.body_inertia[torso] * mass)
        np.testing.assert_allclose(model.geom_friction[:, 0], default.geom_friction[:, 0] * friction)
        others = np.arange(default.nbody) != torso
        np.testing.assert_array_equal(model.body_mass[others], default.body_mass[others])
        np.testing.assert_array_equal(model.body_inertia[others], default.body_inertia[others])
        np.testing.assert_array_equal(model.geom_friction[:, 1:], default.geom_friction[:, 1:])
        total = default.body_mass.sum() + (mass - 1) * default.body_mass[torso]
        np.testing.assert_allclose(model.body_subtreemass[torso], total)  # derived quantities follow
        for name in ("dof_damping", "jnt_stiffness", "jnt_range", "geom_size", "dof_armature"):
            np.testing.assert_array_equal(getattr(model, name), getattr(default, name))


def test_ranges_of_the_shifts():
    """Packer et al.'s intervals over their defaults; all parameters of extreme robots are outside the random ones."""
    default = {"gear": 0.9, "torso": 1000, "friction": 0.8}
    random = {"gear": (0.7, 1.1), "torso": (750, 1250), "friction": (0.5, 1.1)}
    extreme = {
        "gear": (0.5, 0.7, 1.1, 1.3),
        "torso": (500, 750, 1250, 1500),
        "friction": (0.2, 0.5, 1.1, 1.4),
    }
    env_r, env_e = (MujocoEnv("HalfCheetah", 60, shift, seed=4) for shift in ("random", "extreme"))
    for env in (env_r, env_e):
        env.reset()
    for k, name in enumerate(default):
        r, e = env_r.ratios[:, k] * default[name], env_e.ratios[:, k] * default[name]
        low, high = random[name]
        assert (low <= r).all() and (r <= high).all() and np.ptp(r) > 0.8 * (high - low)
        inside = [(a <= e) & (e <= b) for a, b in (extreme[name][:2], extreme[name][2:])]
        assert (inside[0] | inside[1]).all() and inside[0].sum() > 15 and inside[1].sum() > 15
        assert ((e <= low) | (e >= high)).all()
    assert abs(np.corrcoef(env_e.ratios.T) - np.eye(3)).max() < 0.5  # drawn one by one


@pytest.mark.parametrize("shift", [None, "none"])
def test_the_standard_robot_is_untouched(shift):
    env, default = (
        MujocoEnv("HalfCheetah", 2, shift),
        library_env("HalfCheetah", "2x3").single_agent_env.unwrapped.model,
    )
    shifted = MujocoEnv("HalfCheetah", 2, "extreme")
    for e in (env, shifted, env):
        e.reset()
        e.step(torch.ones(2, 2, 3))
    names = [name for name in dir(default) if isinstance(getattr(default, name), np.ndarray)]
    assert len(names) > 100
    for name in names:
        np.testing.assert_array_equal(getattr(model_of(env, 1), name), getattr(default, name), err_msg=name)


@pytest.mark.parametrize(
    "task, message",
    [
        ("Cheetah", "choose one of HalfCheetah"),
        (task_name("HalfCheetah", "5x5"), "HalfCheetah has no partition '5x5"),
        ("HalfCheetah-2x3-obskx", "HalfCheetah has no partition '2x3-obskx'; name it as in HalfCheetah-2x3-obsk1"),
    ],
)
def test_what_there_is_not(task, message):
    with pytest.raises(ValueError, match=message):
        MujocoEnv(task, 1)


def test_unknown_shift_of_robots():
    with pytest.raises(ValueError, match="choose 'random', 'extreme' or none"):
        MujocoEnv("HalfCheetah", 1, "speed")


def test_nothing_is_written_or_said(tmp_path):
    """MuJoCo's warnings about the robots' old files do not become a log file, nor do notices reach the terminal."""
    code = "from mamujoco_env import MujocoEnv; MujocoEnv('HalfCheetah', 1).reset()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_particle_scripts_do_without_mujoco():
    code = (
        "import sys, dom2_mpe, collect_datasets, common; common.make_env('simple_tag').reset();"
        "print([m for m in sys.modules if m.split('.')[0] in ('mujoco', 'gymnasium_robotics')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- datasets ----


@pytest.fixture(scope="session")
def robots_data(tmp_path_factory):
    """Folder of small random datasets of robots, to read only."""
    folder = tmp_path_factory.mktemp("robots")
    collect_datasets.collect("HalfCheetah", "random", folder, 2000)
    collect_datasets.collect("Hopper", "random", folder, 2000)
    return folder


def test_a_mixture_of_an_odd_number_of_episodes_has_them_all(tmp_path):
    made = collect_datasets.collect("HalfCheetah", "random-medium", tmp_path, 3000)
    assert (made["transitions"], made["episodes"]) == (3000, 3)
    returns = common.load_dataset(
        common.dataset_path(tmp_path, "HalfCheetah", "random-medium"), MujocoEnv("HalfCheetah", 1)
    ).returns
    assert returns[0] < 0 < returns[1:].min()  # one of random, two of medium


def load(folder, scenario):
    return common.load_dataset(common.dataset_path(folder, scenario, "random"), MujocoEnv(scenario, 1))


def arrays(folder, scenario, name):
    path = common.dataset_path(folder, scenario, "random")
    return np.stack([np.load(file, allow_pickle=False) for file in sorted(path.glob(f"{name}_?.npy"))])


def test_data_of_half_cheetahs(robots_data):
    """Layout, whole episodes, and joints that are the robot's state's: angles and velocities of an agent's joints."""
    obs, next_obs, acs, rews, dones, states, next_states = (
        arrays(robots_data, "HalfCheetah", name)
        for name in ("obs", "next_obs", "acs", "rews", "dones", "states", "next_states")
    )
    assert obs.shape == next_obs.shape == (2, 2000, 6) and acs.shape == (2, 2000, 3)
    assert rews.shape == dones.shape == (2, 2000) and states.shape == next_states.shape == (2, 2000, 17)
    assert obs.dtype == states.dtype == np.float32
    assert not dones.any()  # the time limit is no terminal state
    for before, after in ((obs, next_obs), (states, next_states)):
        before, after = (x.reshape(2, 2, 1000, -1) for x in (before, after))
        np.testing.assert_array_equal(after[:, :, :-1], before[:, :, 1:])
        assert (after[:, 0, -1] != before[:, 1, 0]).any()
    np.testing.assert_array_equal(states[0], states[1])
    np.testing.assert_array_equal(rews[0], rews[1])
    angles, velocities = states[0, :, 2:8], states[0, :, 11:17]  # thigh, shin and foot of the hind and the front leg
    for agent in range(2):
        joints = range(3 * agent, 3 * agent + 3)
        seen = np.stack([column for j in reversed(joints) for column in (angles[:, j], velocities[:, j])], -1)
        assert {tuple(row) for row in np.sort(seen)[:50]} == {tuple(row) for row in np.sort(obs[agent])[:50]}
    assert abs(acs).max() <= 1 and abs(acs.mean()) < 0.05 and abs(acs.std() - 3**-0.5) < 0.02
    metadata = json.loads((common.dataset_path(robots_data, "HalfCheetah", "random") / "metadata.json").read_text())
    returns = rews[0].reshape(2, 1000).sum(1)
    np.testing.assert_allclose(metadata["return_mean"], returns.mean(), rtol=1e-4)
    assert metadata["episodes"] == 2 and len(metadata["checksums"]) == 14


def test_recorded_steps_are_the_librarys(robots_data):
    """The first recorded actions, played in the library's environment, give the recorded numbers."""
    obs, acs, rews = (arrays(robots_data, "HalfCheetah", name) for name in ("obs", "acs", "rews"))
    env = MujocoEnv("HalfCheetah", 2, seed=(0, common.DATASETS.index("random"), 0))
    seen = env.reset()
    for t in range(20):
        np.testing.assert_array_equal(seen, obs.reshape(2, 2, 1000, 6)[:, :, t].swapaxes(0, 1))
        seen, rewards, _ = env.step(torch.from_numpy(acs.reshape(2, 2, 1000, 3)[:, :, t].swapaxes(0, 1)))
        np.testing.assert_array_equal(rewards.T, rews.reshape(2, 2, 1000)[:, :, t])


def test_episodes_end_with_a_fall(robots_data):
    """Episodes of different lengths: done marks their ends, and loading finds the same episodes."""
    dones, obs, next_obs = (arrays(robots_data, "Hopper", name) for name in ("dones", "obs", "next_obs"))
    assert (dones == dones[0]).all() and dones[0, -1] == 1
    ends = np.flatnonzero(dones[0])
    assert 1900 < len(dones[0]) <= 2000 and len(ends) > 20
    linked = (next_obs[:, :-1] == obs[:, 1:]).all((0, 2))
    np.testing.assert_array_equal(np.flatnonzero(~linked), ends[:-1])
    data = load(robots_data, "Hopper")
    np.testing.assert_array_equal(data.lengths, np.diff(np.concatenate([[-1], ends])))
    np.testing.assert_array_equal(data.starts, np.concatenate([[0], ends[:-1] + 1]))
    rewards = np.split(arrays(robots_data, "Hopper", "rews")[0], ends[:-1] + 1)
    np.testing.assert_allclose(data.returns, [r.sum() for r in rewards], rtol=1e-4)
    np.testing.assert_array_equal(data.done, dones)


@pytest.mark.parametrize("seed", range(5))
def test_episode_lengths_against_a_loop(seed):
    done = torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.1
    done[-1] = True
    lengths, since = [], 0
    for d in done.tolist():
        since += 1
        if d or since == 7:
            lengths.append(since)
            since = 0
    assert episode_lengths(done, 7).tolist() == lengths


def copy_with(folder, source, scenario, **changed):
    """Copy of a dataset without metadata, some arrays changed by a function of (agent, array)."""
    target = common.dataset_path(folder, scenario, "random")
    target.mkdir(parents=True)
    for file in common.dataset_path(source, scenario, "random").glob("*.npy"):
        name, agent = file.stem.rsplit("_", 1)
        np.save(target / file.name, changed.get(name, lambda agent, x: x)(int(agent), np.load(file)))
    return folder


def test_a_marked_time_limit_is_no_terminal_state(robots_data, tmp_path):
    def mark(agent, dones):
        dones[999::1000] = 1
        return dones

    copy_with(tmp_path, robots_data, "HalfCheetah", dones=mark)
    data = load(tmp_path, "HalfCheetah")
    assert data.lengths.tolist() == [1000, 1000] and not data.done.any()


def test_half_an_episode_is_refused(robots_data, tmp_path):
    cut = dict.fromkeys(("obs", "acs", "rews", "next_obs", "dones"), lambda agent, x: x[:1500])
    copy_with(tmp_path, robots_data, "HalfCheetah", **cut)
    with pytest.raises(UserError, match="no whole number of 1000-step episodes"):
        load(tmp_path, "HalfCheetah")


@pytest.mark.slow
def test_data_are_the_same_on_any_number_of_cores(tmp_path):
    """Worker processes make the blocks that this process makes itself."""
    collect_datasets.collect("Reacher", "random", tmp_path, 60 * 50)
    seed = (0, common.DATASETS.index("random"))
    blocks = [collect_datasets.rollout_block("Reacher", 25, (*seed, block), None, 0.1)[0] for block in range(3)]
    for name in ("obs", "acs", "next_obs", "states", "next_states"):
        expected = torch.cat([block[name] for block in blocks], 1)[:, :3000]
        np.testing.assert_array_equal(arrays(tmp_path, "Reacher", name), expected)


class Pool:
    """A pool of no processes: work is done where it is asked for."""

    def __init__(self, workers, *args):
        self.workers, self.pending, self.most = workers, 0, 0
        Pool.made = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        self.pending += 1
        self.most = max(self.most, self.pending)
        self.result_of = function(*args)
        return Future(self, self.result_of)


class Future:
    def __init__(self, pool, value):
        self.pool, self.value = pool, value

    def result(self):
        self.pool.pending -= 1
        return self.value


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 2), (64, 4), (1000, 4)])
def test_workers_are_as_many_as_cores_may_be_used_and_work_there_is(cores, workers, tmp_path, monkeypatch):
    """Four blocks of 25 episodes of 50 steps; and the data are those of one core, whose order is that of the blocks."""
    monkeypatch.setattr(collect_datasets, "usable_cores", lambda: cores)
    monkeypatch.setattr(collect_datasets, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(collect_datasets, "rollout_block", rolled_out)
    blocks = list(collect_datasets.parallel_rollouts("Reacher", None, 0.1, (0, 0), 4 * 25 * 50))
    assert Pool.made.workers == workers and Pool.made.most <= workers + 1
    assert [int(block["rews"][0, 0, 0]) for block, _ in blocks] == [0, 1, 2, 3]


def rolled_out(task, num_envs, seed, policies, action_noise):
    steps = num_envs * 50
    return {"rews": torch.full((2, steps, 1), float(seed[-1]))}, torch.full((num_envs,), 50)


def die(*_):
    os._exit(9)


def test_a_worker_that_dies_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(collect_datasets, "start_worker", die)
    with pytest.raises(UserError, match=r"Reacher: a worker process died, perhaps for lack of memory; .*__main__"):
        list(collect_datasets.parallel_rollouts("Reacher", None, 0.1, (0, 0), 2 * 25 * 50))


@pytest.mark.parametrize("dataset", ["medium", "expert"])
def test_robots_without_behaviour_policies(tmp_path, dataset):
    with pytest.raises(UserError, match=f"Hopper/{dataset}.*only random data"):
        collect_datasets.collect("Hopper", dataset, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_behaviour_policies_have_the_recorded_levels():
    """The committed policies reach, on the recorded episodes, within 10% the level that training measured."""
    scenario = "HalfCheetah"
    path = ROOT / "pretrained" / f"{scenario}.pt"
    behaviour, levels = load_behaviour(path, MujocoEnv(scenario, 1), None), load_torch(path)["levels"]
    for name in ("medium", "expert"):
        np.testing.assert_allclose(train_behaviour.mean_return(scenario, behaviour[name], None), levels[name], rtol=0.1)


@pytest.fixture
def small_td3(monkeypatch):
    """A TD3 run of the half cheetah that learns after 950 steps of two robots, in batches of 16."""
    recipe = replace(train_behaviour.RECIPES["HalfCheetah"], warmup_steps=950, hidden=(8, 8))
    monkeypatch.setitem(train_behaviour.RECIPES, "HalfCheetah", recipe)
    monkeypatch.setattr(train_behaviour.TD3, "num_envs", 2)
    monkeypatch.setattr(train_behaviour.TD3, "batch_size", 16)
    return lambda: train_behaviour.TD3("HalfCheetah", None, 200, seed=0)


@pytest.mark.slow
def test_td3_resumes_bit_for_bit(small_td3, tmp_path):
    bar, found = tqdm(disable=True), {"levels": {"medium": 1.0}, "policies": {}, "steps": {}}
    td3 = small_td3()
    td3.train(50, bar)
    td3.save(tmp_path / "td3.pt", found)
    td3.train(20, bar)
    resumed = small_td3()
    torch.randn(3)  # nothing hangs on what the generators did before
    assert resumed.load(tmp_path / "td3.pt") == found
    resumed.train(20, bar)
    for name in ("actor", "critic", "target_critic"):
        for a, b in zip(getattr(td3, name).parameters(), getattr(resumed, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(td3.buffer, resumed.buffer) and td3.steps == resumed.steps == 1020


@pytest.mark.slow
def test_recorded_actions_make_the_replay_buffer_again(small_td3):
    td3 = small_td3()
    td3.train(70, tqdm(disable=True))
    recording = td3.recording(td3.steps)
    assert recording.dtype == torch.float16 and recording.shape == (1000, 2, 2, 3)  # one of the 1,020 steps' episodes
    behaviour = {"prey": None, "replay": {"actions": recording, "seed": 0}}
    ((block, lengths),) = collect_datasets.replay("HalfCheetah", behaviour)
    assert lengths.tolist() == [1000, 1000] and not block["dones"].any()
    names = ("obs", "acs", "rews", "next_obs", "states", "next_states")
    for name, part in zip(names, td3.buffer[:, :1000].transpose(1, 2).split(td3.widths, -1), strict=True):
        assert torch.equal(block[name].view(part.shape), part)


def test_the_team_critic_sees_state_and_all_actions(small_td3):
    td3 = small_td3()
    obs, state, action = torch.randn(2, 5, 6), torch.randn(2, 5, 17), torch.randn(2, 5, 3)
    x = torch.cat([state[0], action[0], action[1]], -1)
    q = td3.q(td3.critic, obs, state, action)
    assert q.shape == (1, 2, 5)
    for k in range(2):
        h = x
        for layer in (td3.critic.fc1, td3.critic.fc2, td3.critic.fc3):
            h = h @ layer.weight[k] + layer.bias[k]
            h = h.relu() if layer is not td3.critic.fc3 else h
        torch.testing.assert_close(q[0, k], h[:, 0])


# ---- dom2_mamujoco.py ----


# What dom2_mamujoco.py has in another form than dom2_mpe.py, or not at all: its options and their settings.
DIFFERENT = {"LANDMARKS6", "DataArgs", "TrainingArgs", "NetworkArgs", "SETTINGS"}


def definitions(path):
    """Source text of a module's functions, classes and assignments, by name."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        decorated = getattr(node, "decorator_list", None)
        text = "\n".join(ast.get_source_segment(source, d) for d in decorated or ())
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text + ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(source, node)
    return found


def first_difference(one, other):
    return next((name for name in one if name not in DIFFERENT and one[name] != other.get(name)), None)


def test_both_scripts_share_the_same_text():
    mpe, mujoco = definitions(ROOT / "dom2_mpe.py"), definitions(ROOT / "dom2_mamujoco.py")
    assert first_difference(mpe, mujoco) is None
    assert set(mujoco) - set(mpe) == {"EVERYWHERE", "ROWS"}
    assert {name for name in mpe if mpe[name] != mujoco.get(name)} == DIFFERENT  # none of them is here without need
    changed = mujoco | {"q_loss": mujoco["q_loss"].replace("-eta", "eta")}
    assert first_difference(mpe, changed) == "q_loss"


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_trajectories_against_a_loop(seed):
    starts, lengths = torch.tensor([5, 0, 9]), torch.tensor([2, 3, 1])
    assert common.rows_of(starts, lengths).tolist() == [5, 6, 0, 1, 2, 9]
    g = torch.Generator().manual_seed(seed)
    starts, lengths = torch.randint(100, (20,), generator=g), torch.randint(1, 9, (20,), generator=g)
    expected = [
        row for start, k in zip(starts.tolist(), lengths.tolist(), strict=True) for row in range(start, start + k)
    ]
    assert common.rows_of(starts, lengths).tolist() == expected


SMALL = {"widths": (8,), "critic_widths": (8,), "batch_size": 8, "updates": 4, "eval_interval": 4, "eval_episodes": 1}


def options(folder, data, scenario="HalfCheetah", dataset="random", **changes):
    changes = SMALL | {"run_dir": str(folder), "data_dir": str(data), "cuda": False} | changes
    return dom2_mamujoco.DOM2.args(scenario, dataset, **changes)


def test_evaluation_plays_every_team_in_its_own_environments():
    """Against single episodes in the library's environment: seed 0's team in the first half, seed 1's in the rest."""
    args = dom2_mamujoco.DOM2.args(num_seeds=2)
    weights = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)) / 3  # [L, d, A]
    env = MujocoEnv("HalfCheetah", 4, seed=11)
    env.episode_steps = 40
    returns = dom2_mamujoco.evaluate(lambda obs, generator: (obs @ weights).tanh(), env, args)
    assert returns.shape == (2, 2)
    for i in range(4):
        one = library_env("HalfCheetah", "2x3")
        obs, _ = one.reset(seed=int(np.random.SeedSequence([11, i]).generate_state(1)[0]))
        total = 0.0
        for _ in range(40):
            x = torch.from_numpy(np.stack(list(obs.values()))).float()
            actions = torch.einsum("nd,nda->na", x, weights[2 * (i // 2) :][:2]).tanh().numpy()
            obs, rewards, _, _, _ = one.step(dict(zip(one.possible_agents, actions, strict=True)))
            total += rewards["agent_0"]
        np.testing.assert_allclose(returns[i // 2, i % 2], total, rtol=1e-3, atol=1e-3)


def test_evaluation_makes_one_policy_call_per_step():
    calls = []

    def act(obs, generator):
        calls.append(obs.shape)
        return torch.zeros(*obs.shape[:2], 1)

    args = dom2_mamujoco.DOM2.args("Reacher", num_seeds=3)
    assert dom2_mamujoco.evaluate(act, MujocoEnv("Reacher", 12), args).shape == (3, 4)
    assert calls == [(6, 4, 6)] * 50


def test_evaluation_ends_when_every_robot_has_fallen():
    calls = []

    def act(obs, generator):
        calls.append(1)
        return torch.ones(*obs.shape[:2], 1)

    args, env = dom2_mamujoco.DOM2.args("Hopper"), MujocoEnv("Hopper", 3, seed=1)
    returns = dom2_mamujoco.evaluate(act, env, args)[0]
    assert 5 < len(calls) < 200
    env.seed(1)
    env.reset()
    steps = torch.stack([env.step(torch.ones(3, 3, 1))[1] for _ in range(200)])  # those that have fallen get nothing
    torch.testing.assert_close(returns, steps.mean(-1).sum(0))


def test_minibatches_follow_algorithm_1_and_keep_falls(robots_data, tmp_path, monkeypatch):
    """With episodes of different lengths: every row weighs 1 + the number of thresholds that its episode reaches."""
    seen = []

    def sample(data, args):
        seen.append(data)
        return dom2_mamujoco.sample_batch(data, args)

    args = options(tmp_path, robots_data, "Hopper", thresholds=(10.0, 20.0), updates=1, shift=())
    dom2_mamujoco.train(args, dom2_mamujoco.DOM2._replace(sample_batch=sample))
    data, loaded = seen[0], load(robots_data, "Hopper")
    weight = 1 + sum((loaded.returns >= r).long() for r in args.thresholds)
    expected = weight.repeat_interleave(loaded.lengths)
    np.testing.assert_array_equal(torch.bincount(data.index[0], minlength=len(expected)), expected)
    np.testing.assert_array_equal(data.done, loaded.done)
    # where robots fall rewards keep their mean: a fall ends them, and a constant would change what it costs
    np.testing.assert_allclose(data.reward, loaded.reward / loaded.reward.double().std(), rtol=1e-4)
    args = replace(args, augment=False, thresholds=None)
    dom2_mamujoco.train(args, dom2_mamujoco.DOM2._replace(sample_batch=sample))
    assert seen[-1].index[0].tolist() == list(range(loaded.obs.shape[1]))


def test_a_share_of_the_trajectories(robots_data, tmp_path):
    args = options(tmp_path, robots_data, "Hopper", data_fraction=0.3)
    torch.manual_seed(0)
    data, loaded = load_data(args, MujocoEnv("Hopper", 1), None), load(robots_data, "Hopper")
    assert len(data.lengths) == round(0.3 * len(loaded.lengths)) and data.lengths.sum() == data.obs.shape[1]
    everything = {tuple(row.tolist()) for row in torch.cat([loaded.obs[0], loaded.action[0]], -1)}
    for start, length in zip(data.starts, data.lengths, strict=True):
        rows = slice(start, start + length)
        assert (data.done[:, rows][:, -1] == 1).all() and not data.done[:, rows][:, :-1].any()
        np.testing.assert_array_equal(data.next_obs[:, rows][:, :-1], data.obs[:, rows][:, 1:])
        assert tuple([*data.obs[0, start].tolist(), *data.action[0, start].tolist()]) in everything


def test_rewards_of_half_cheetahs_are_standardised(robots_data, tmp_path):
    args = options(tmp_path, robots_data, reward_scale=2.0)
    reward = load_data(args, MujocoEnv("HalfCheetah", 1), None).reward
    np.testing.assert_allclose([reward.mean(), reward.std()], [0, 2], atol=1e-3)


@pytest.mark.slow
def test_a_run_and_its_continuation(robots_data, tmp_path):
    """Six updates at once or four and two more end with the same parameters; results hold all three environments."""
    once = dom2_mamujoco.train(options(tmp_path / "a", robots_data, updates=6, num_seeds=2))
    dom2_mamujoco.train(options(tmp_path / "b", robots_data, num_seeds=2, shift=("none",)))
    (run,) = (tmp_path / "b").iterdir()
    resumed = parse(dom2_mamujoco.DOM2, "", ["--resume", str(run), "--updates", "6"])
    dom2_mamujoco.train(resumed)
    (first,) = (tmp_path / "a").iterdir()
    a, b = (load_torch(folder / "checkpoint.pt")["learners"] for folder in (first, run))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert list(once["returns"]) == ["none", "random", "extreme"] and all(len(x) == 2 for x in once["returns"].values())
    assert once["algorithm"] == "dom2" and once["data"]["transitions"] == 2000
    again = dom2_mamujoco.train(parse(dom2_mamujoco.DOM2, "", ["--eval-only", str(first)]))
    assert again["returns"] == once["returns"]

    policy, env = dom2_mamujoco.load_policy(first, seed_index=1), library_env("HalfCheetah", "2x3")
    actions = policy(env.reset(seed=0)[0])
    assert list(actions) == ["agent_0", "agent_1"] and all(a.shape == (3,) for a in actions.values())


def test_losses_that_are_not_finite_end_the_run(robots_data, tmp_path):
    calls = []

    def broken(*args):
        calls.append(1)
        metrics = dom2_mamujoco.update(*args)
        if len(calls) >= 3:
            metrics["losses/q"][1] = float("nan")  # agent 1
        return metrics

    args = options(tmp_path, robots_data, "Hopper", eval_interval=2, shift=("none",))
    with pytest.raises(UserError, match=r"update 4: losses/q of seed 0, agent 1 is not finite"):
        dom2_mamujoco.train(args, dom2_mamujoco.DOM2._replace(update=broken))
    (run,) = tmp_path.iterdir()
    assert load_torch(run / "checkpoint.pt")["updates"] == 2 and not (run / "results.json").exists()


def test_robots_that_fall_are_evaluated_to_their_fall(robots_data, tmp_path, capsys):
    args = options(tmp_path, robots_data, scenario="Hopper", updates=2, eval_episodes=3, shift=("extreme",))
    results = dom2_mamujoco.train(args)
    assert list(results["returns"]) == ["none", "extreme"] and 0 < results["returns"]["none"][0] < 1000
    assert " - " in capsys.readouterr().out  # no normalised score without published ones


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scenario": "HalfCheetah", "agent_conf": "4x4"}, "has no partition"),
        ({"scenario": "simple_tag"}, "must be one of HalfCheetah"),
        ({"shift": ("speed",)}, "--shift speed: .*choose 'random', 'extreme' or none"),
        ({"agent_obsk": -1}, "--agent-obsk -1: must be at least 0"),
    ],
)
def test_options_without_meaning(robots_data, tmp_path, changes, message):
    """They are named before anything is made, let alone trained."""
    with pytest.raises(UserError, match=message):
        dom2_mamujoco.train(options(tmp_path, robots_data, **changes))
    assert not list(tmp_path.iterdir())


def run_script(*arguments, **environment):
    command = [sys.executable, "dom2_mamujoco.py", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_video_needs_a_renderer(robots_data, tmp_path):
    """Without one the run ends well, with a line that says what is missing."""
    dom2_mamujoco.train(options(tmp_path, robots_data, updates=1, shift=("none",)))
    (run,) = tmp_path.iterdir()
    evaluation = ("--eval-only", run, "--eval-episodes", 1, "--shift", "none", "--capture-video")
    done = run_script(*evaluation, MUJOCO_GL="glfw")
    assert done.returncode == 0 and "--capture-video: no off-screen renderer" in done.stdout, done.stderr
    assert (run / "evaluation.json").exists() and not list(run.glob("*.gif"))


def test_video(robots_data, tmp_path):
    pytest.importorskip("OpenGL.EGL")
    args = options(tmp_path, robots_data, num_seeds=2)
    run, played = Run(args, dom2_mamujoco.DOM2), []
    run.act = lambda obs, generator: played.append(obs.shape) or torch.zeros(4, 1, 3)
    make_env = run.make_env

    def short(*args, **options):
        env = make_env(*args, **options)
        env.episode_steps = 7 if env.num_envs == 2 else env.episode_steps
        return env

    run.make_env = short
    said = write_gif(run, tmp_path / "a.gif")
    if "no off-screen renderer" in said:
        pytest.skip(f"{said}")
    from PIL import Image

    image = Image.open(tmp_path / "a.gif")
    assert played == [(4, 1, 6)] * 7  # every seed's team plays, the first one's is shown
    assert image.size == (300, 300) and image.n_frames == 4  # every second step
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


# ---- trained policies in other programs ----


@pytest.fixture(scope="session")
def trained(data_dir, pretrained, tmp_path_factory):
    """{name: (script, run folder, observations of every agent)} of two runs of two seeds: a particle scenario with a
    prey, and a robot whose agents see 3, 4 and 3 numbers."""
    folder, g, found = tmp_path_factory.mktemp("trained"), np.random.default_rng(0), {}
    collect_datasets.collect("Hopper-3x1-obsk1", "random", folder / "data", 2000)
    small = SMALL | {"updates": 1, "num_seeds": 2, "shift": (), "cuda": False}
    for name, script, data, more, sizes in (
        (
            "simple_tag",
            dom2_mpe,
            data_dir,
            {"prey": str(pretrained / "simple_tag.pt")},
            {**dict.fromkeys(("adversary_0", "adversary_1", "adversary_2"), 16), "agent_0": 14},
        ),
        ("Hopper", dom2_mamujoco, folder / "data", {"agent_obsk": 1}, {"agent_0": 3, "agent_1": 4, "agent_2": 3}),
    ):
        script.train(script.DOM2.args(name, "random", data_dir=str(data), run_dir=str(folder / name), **small | more))
        (run,) = (folder / name).iterdir()
        found[name] = script, run, {agent: g.normal(size=size).astype(np.float32) for agent, size in sizes.items()}
    return found


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


FORMS = {
    "float64": lambda x: x.astype(np.float64),
    "big-endian": lambda x: x.astype(">f4"),
    "big-endian float64": lambda x: x.astype(">f8"),
    "reversed": lambda x: x[::-1].copy()[::-1],
    "a column": lambda x: np.stack([x, x], 1)[:, 1],
    "read-only": read_only,
    "list": lambda x: x.tolist(),
    "tensor": torch.from_numpy,
    "float64 tensor with a gradient": lambda x: torch.from_numpy(x).double().requires_grad_(),
}


def same_actions(one, other):
    assert list(one) == list(other)
    for agent in one:
        np.testing.assert_array_equal(one[agent], other[agent], strict=True)


@pytest.mark.parametrize("name", ["simple_tag", "Hopper"])
@pytest.mark.parametrize("form", FORMS)
def test_a_policy_takes_observations_in_any_form(name, form, trained):
    script, run, obs = trained[name]
    expected = script.load_policy(run)(obs)
    assert list(expected) == list(obs)
    for action in expected.values():
        assert (
            action.dtype == np.float32
            and abs(action).max() <= 1
            and action.shape == (2 if name == "simple_tag" else 1,)
        )
    before = {agent: x.copy() for agent, x in obs.items()}
    with warnings.catch_warnings(action="error"):
        same_actions(script.load_policy(run)({agent: FORMS[form](x) for agent, x in obs.items()}), expected)
    same_actions(obs, before)


@pytest.mark.parametrize("name", ["simple_tag", "Hopper"])
@pytest.mark.parametrize("dtype", [np.int64, np.int8, ">i4", np.uint16, np.float16])
def test_a_policy_takes_integers(name, dtype, trained):
    script, run, obs = trained[name]
    whole = {agent: np.abs(5 * x).round() for agent, x in obs.items()}
    cast = {agent: x.astype(dtype) for agent, x in whole.items()}
    same_actions(script.load_policy(run)(cast), script.load_policy(run)(whole))


@pytest.mark.parametrize("name", ["simple_tag", "Hopper"])
def test_a_policy_tells_agents_apart_by_name(name, trained):
    script, run, obs = trained[name]
    expected = script.load_policy(run)(obs)
    same_actions(script.load_policy(run)(dict(reversed(obs.items()))), expected)
    one, other = ("adversary_0", "adversary_2") if name == "simple_tag" else ("agent_0", "agent_2")
    exchanged = script.load_policy(run)(obs | {one: obs[other], other: obs[one]})
    for agent in obs:
        assert np.array_equal(exchanged[agent], expected[agent]) == (agent not in (one, other))
    assert not np.array_equal(exchanged[one], expected[other])  # each has networks of its own


@pytest.mark.parametrize("name", ["simple_tag", "Hopper"])
def test_a_policy_survives_pickling(name, trained):
    """In whatever state: the copy goes on with the same random numbers."""
    script, run, obs = trained[name]
    policies = [script.load_policy(run, seed_index=seed) for seed in range(2)]
    first = [policy(obs) for policy in policies]
    copies = [pickle.loads(pickle.dumps(policy)) for policy in policies]
    for policy, copy in zip(policies, copies, strict=True):
        for _ in range(2):
            same_actions(copy(obs), policy(obs))
    controlled = next(iter(obs))
    assert not np.array_equal(first[0][controlled], first[1][controlled])  # the two seeds' teams
    same = np.array_equal(first[0][controlled], policies[0](obs)[controlled])
    assert same == (policies[0].args.temperature == 0)  # above 0 a diffusion policy samples


@pytest.mark.parametrize("name", ["simple_tag", "Hopper"])
def test_a_policy_acts_as_its_learners(name, trained):
    """By the checkpoint's own networks, learner by learner; observations of other agents play no part."""
    script, run, obs = trained[name]
    checkpoint = load_torch(run / "checkpoint.pt")
    args = replace(script.load_policy(run).args, num_seeds=2)
    env = common.make_env(common.task_name(args))
    learners = script.make_learners(args, env)
    learners.load_state_dict(checkpoint["learners"])
    n = env.num_agents
    for seed in range(2):
        actions = script.load_policy(run, seed_index=seed)(obs)
        noise = torch.randn(n, 1, env.action_size, generator=torch.Generator().manual_seed(args.seed))
        x = torch.zeros(2 * n, 1, env.obs_size)
        for i, agent in enumerate(env.agents):
            x[seed * n + i, 0, : len(obs[agent])] = torch.from_numpy(obs[agent])
        with torch.no_grad():
            expected = learners["target_policy"](x, args.temperature * noise.repeat(2, 1, 1))[seed * n :][:n, 0]
        for i, agent in enumerate(env.agents):
            np.testing.assert_allclose(actions[agent], expected[i], atol=1e-6)
