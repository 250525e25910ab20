"""Multi-agent MuJoCo: environments, data sets and dom2_mamujoco.py."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import collect_datasets
import common
import dom2_mamujoco
import mamujoco_env
from common import UserError
from mamujoco_env import SHIFTS, MujocoEnv, task_name

ROOT = Path(__file__).resolve().parent.parent


def library_env(scenario, agent_conf, agent_obsk=0):
    with mamujoco_env.quiet():
        from gymnasium_robotics import mamujoco_v1

        return mamujoco_v1.parallel_env(scenario, agent_conf, agent_obsk, global_categories=())


def model_of(env, i):
    return env.robots[i].model


# ---- environments ----


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
            ours, reward, terminated = env.step(actions)
            for i in np.flatnonzero(~np.array(fallen)):
                obs[i], rewards, terminations, _, _ = theirs[i].step(dict(zip(names, actions[i], strict=True)))
                assert reward[i] == np.float32(rewards[names[0]])
                fallen[i] = terminations[names[0]]
            assert terminated.tolist() == fallen


def test_episodes_have_1000_steps():
    assert MujocoEnv("HalfCheetah", 1).episode_steps == 1000


def test_a_fallen_robot_stands_still():
    env = MujocoEnv("Hopper", 3, seed=1)
    env.reset()
    ends = np.zeros(3, int)
    for step in range(1, 200):
        before, fallen = env.obs, env.terminated
        obs, reward, terminated = env.step(np.ones((3, 3, 1)))
        assert (obs[fallen] == before[fallen]).all() and (reward[fallen] == 0).all() and terminated[fallen].all()
        ends[terminated & ~fallen] = step
        if terminated.all():
            break
    assert (ends > 0).all()
    env.reset()
    assert not env.terminated.any()


def test_an_environments_episodes_depend_on_seed_and_number_alone():
    few, many = MujocoEnv("HalfCheetah", 2, "random", seed=3), MujocoEnv("HalfCheetah", 4, "random", seed=3)
    other = MujocoEnv("HalfCheetah", 2, "random", seed=(3, 0))
    for _ in range(2):
        np.testing.assert_array_equal(few.reset(), many.reset()[:2])
        np.testing.assert_array_equal(few.ratios, many.ratios[:2])
        assert (other.reset() != few.obs).any()
    assert len(np.unique(many.obs.reshape(4, -1), axis=0)) == 4


def test_a_used_environment_with_a_new_seed_equals_a_new_one():
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 3, 3, 1))

    def play(env):
        return [env.reset(), *(env.step(a)[0] for a in actions)], env.state

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
        e.step(np.ones((2, 2, 3)))
    names = [name for name in dir(default) if isinstance(getattr(default, name), np.ndarray)]
    assert len(names) > 100
    for name in names:
        np.testing.assert_array_equal(getattr(model_of(env, 1), name), getattr(default, name), err_msg=name)


@pytest.mark.parametrize(
    "task, message",
    [
        ("Cheetah", "choose one of HalfCheetah"),
        (task_name("HalfCheetah", "5x5"), "HalfCheetah has no partition '5x5"),
        ("Humanoid", "have 9, 8 joints"),
        ("Pusher", "have 3, 1, 3 joints"),
    ],
)
def test_what_there_is_not(task, message):
    with pytest.raises(ValueError, match=message):
        MujocoEnv(task, 1)


def test_unknown_shift():
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
        "import sys, dom2_mpe, collect_datasets; collect_datasets.make_env('simple_tag', 1, 0).reset();"
        "print([m for m in sys.modules if m.split('.')[0] in ('mujoco', 'gymnasium_robotics')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- data sets ----


@pytest.fixture(scope="session")
def robots_data(tmp_path_factory):
    """Folder of small random data sets of robots, to read only."""
    folder = tmp_path_factory.mktemp("robots")
    collect_datasets.collect("HalfCheetah", "random", folder, 2000)
    collect_datasets.collect("Hopper", "random", folder, 2000)
    return folder


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
        seen, reward, _ = env.step(acs.reshape(2, 2, 1000, 3)[:, :, t].swapaxes(0, 1))
        np.testing.assert_array_equal(reward, rews[0].reshape(2, 1000)[:, t])


def test_episodes_end_with_a_fall(robots_data):
    """Episodes of different lengths: done marks their ends, and loading finds the same episodes."""
    dones, obs, next_obs = (arrays(robots_data, "Hopper", name) for name in ("dones", "obs", "next_obs"))
    assert (dones == dones[0]).all() and dones[0, -1] == 1
    ends = np.flatnonzero(dones[0])
    assert 1900 < len(dones[0]) <= 2000 and len(ends) > 20
    linked = (next_obs[:, :-1] == obs[:, 1:]).all((0, 2))
    np.testing.assert_array_equal(np.flatnonzero(~linked), ends[:-1])
    data = common.load_dataset(robots_data, "Hopper", "random", 2, 1, 3, 1000)
    np.testing.assert_array_equal(data.lengths, np.diff(np.concatenate([[-1], ends])))
    rewards = np.split(arrays(robots_data, "Hopper", "rews")[0], ends[:-1] + 1)
    np.testing.assert_allclose(data.returns, [r.sum() for r in rewards], rtol=1e-4)
    assert data.rows[:, :, -1].sum() == 3 * len(ends)


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
    assert common.episode_lengths(done, 7).tolist() == lengths


def copy_with(folder, source, scenario, **changed):
    """Copy of a data set without metadata, some arrays changed by a function of (agent, array)."""
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
    data = common.load_dataset(tmp_path, "HalfCheetah", "random", 6, 3, 2, 1000)
    assert data.lengths.tolist() == [1000, 1000] and not data.rows[:, :, -1].any()


def test_half_an_episode_is_refused(robots_data, tmp_path):
    cut = dict.fromkeys(common.FILES, lambda agent, x: x[:1500])
    copy_with(tmp_path, robots_data, "HalfCheetah", **cut)
    with pytest.raises(UserError, match="no whole number of 1000-step episodes"):
        common.load_dataset(tmp_path, "HalfCheetah", "random", 6, 3, 2, 1000)


def test_data_are_the_same_on_any_number_of_cores(tmp_path):
    """Worker processes make the blocks that this process makes itself."""
    collect_datasets.collect("Reacher", "random", tmp_path, 60 * 50)
    obs, seed = arrays(tmp_path, "Reacher", "obs"), (0, common.DATASETS.index("random"))
    blocks = [collect_datasets.rollout_block("Reacher", 25, (*seed, block), None)[0] for block in range(3)]
    np.testing.assert_array_equal(obs, torch.cat(blocks, 1)[:, :3000, : obs.shape[2]])


@pytest.mark.parametrize("dataset", ["medium", "expert"])
def test_robots_without_behaviour_policies(tmp_path, dataset):
    with pytest.raises(UserError, match=f"Hopper/{dataset}.*only random data"):
        collect_datasets.collect("Hopper", dataset, tmp_path)
    assert not list(tmp_path.iterdir())


def test_behaviour_policies_have_the_recorded_levels():
    """The committed policies reach, on the recorded episodes, within 10% the level that training measured."""
    scenario = "HalfCheetah"
    behaviour = collect_datasets.load_behaviour(ROOT / "pretrained", scenario)
    levels = common.load_torch(ROOT / "pretrained" / f"{scenario}.pt")["levels"]
    for name in ("medium", "expert"):
        np.testing.assert_allclose(collect_datasets.level(scenario, behaviour[name], None), levels[name], rtol=0.1)


@pytest.fixture
def small_td3(monkeypatch):
    """A TD3 run of the half cheetah that learns after 950 steps of two robots, in batches of 16."""
    recipe = replace(collect_datasets.RECIPES["HalfCheetah"], warmup_steps=950, hidden=(8, 8))
    monkeypatch.setitem(collect_datasets.RECIPES, "HalfCheetah", recipe)
    monkeypatch.setattr(collect_datasets.TD3, "num_envs", 2)
    monkeypatch.setattr(collect_datasets.TD3, "batch_size", 16)
    return lambda: collect_datasets.TD3("HalfCheetah", None, 200, seed=0)


def test_td3_resumes_bit_for_bit(small_td3, tmp_path):
    bar = collect_datasets.tqdm(disable=True)
    td3 = small_td3()
    td3.train(50, bar)
    td3.save(tmp_path / "td3.pt", found=({"medium": 1.0}, {}))
    td3.train(20, bar)
    resumed = small_td3()
    torch.randn(3)  # nothing hangs on what the generators did before
    assert resumed.load(tmp_path / "td3.pt")["found"] == ({"medium": 1.0}, {})
    resumed.train(20, bar)
    for name in ("actor", "critic", "target_critic"):
        for a, b in zip(getattr(td3, name).parameters(), getattr(resumed, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(td3.buffer, resumed.buffer) and td3.steps == resumed.steps == 1020


def test_recorded_actions_make_the_replay_buffer_again(small_td3):
    td3 = small_td3()
    td3.train(70, collect_datasets.tqdm(disable=True))
    recording = td3.recording(td3.steps)
    assert recording.dtype == torch.float16 and recording.shape == (1000, 2, 2, 3)  # one of the 1,020 steps' episodes
    behaviour = {"prey": None, "replay": {"actions": recording, "seed": 0}}
    ((rows, lengths),) = collect_datasets.replay("HalfCheetah", behaviour)
    assert lengths.tolist() == [1000, 1000]
    assert torch.equal(rows.view(2, 2, 1000, -1), td3.buffer[:, :1000].transpose(1, 2))


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


# What dom2_mamujoco.py has in another form than dom2_mpe.py, or not at all: options and settings, what plays and stores
# episodes (robots that may fall, no prey), and what mentions these.
DIFFERENT = {
    *("RunArgs", "Args", "SETTING_NAMES", "SETTINGS", "resolve_run", "standardise_rewards", "rollout", "evaluate"),
    *("load_data", "save_checkpoint", "load_checkpoint", "load_policy", "train", "fit", "print_table", "write_gif"),
    "assignments",
}


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
    assert set(mujoco) - set(mpe) == {"task", "rows_of"}
    assert {name for name in mpe if mpe[name] != mujoco.get(name)} == DIFFERENT  # none of them is here without need
    changed = mujoco | {"q_loss": mujoco["q_loss"].replace("-eta", "eta")}
    assert first_difference(mpe, changed) == "q_loss"


def test_rows_of():
    starts, lengths = torch.tensor([5, 0, 9]), torch.tensor([2, 3, 1])
    assert dom2_mamujoco.rows_of(starts, lengths).tolist() == [5, 6, 0, 1, 2, 9]


def options(folder, data, **changes):
    small = {"widths": (8,), "critic_widths": (8,), "batch_size": 8, "updates": 4, "eval_interval": 4}
    small |= {"eval_episodes": 1, "run_dir": str(folder), "data_dir": str(data), "dataset": "random", "cuda": False}
    return dom2_mamujoco.Args(**small | changes)


def test_rollout_plays_every_team_in_its_own_environments():
    """Against single episodes in the library's environment: seed 0's team in the first half, seed 1's in the rest."""
    args = dom2_mamujoco.Args(num_seeds=2)
    weights = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)) / 3  # [L, d, A]
    env = MujocoEnv("HalfCheetah", 4, seed=11)
    env.episode_steps = 40
    returns = dom2_mamujoco.rollout(lambda obs, generator: (obs @ weights).tanh(), args, env, "cpu")
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

    args = dom2_mamujoco.Args(scenario="Reacher", num_seeds=3, eval_episodes=4)
    assert dom2_mamujoco.evaluate(act, args, "none", "cpu").shape == (3,)
    assert calls == [(6, 4, 6)] * 50


def test_minibatches_follow_algorithm_1_and_keep_falls(robots_data, tmp_path):
    """With episodes of different lengths: every row weighs 1 + the number of thresholds that its episode reaches."""
    args = dom2_mamujoco.Args(scenario="Hopper", dataset="random", data_dir=str(robots_data), thresholds=(10.0, 20.0))
    env = MujocoEnv("Hopper", 1)
    data = dom2_mamujoco.load_data(args, env, torch.device("cpu"))
    loaded = common.load_dataset(robots_data, "Hopper", "random", 2, 1, 3, 1000)
    weight = 1 + sum((loaded.returns >= r).long() for r in args.thresholds)
    expected = weight.repeat_interleave(loaded.lengths)
    np.testing.assert_array_equal(torch.bincount(data.index, minlength=len(expected)), expected)
    np.testing.assert_array_equal(data.rows[:, :, -1], loaded.rows[:, :, -1])
    # where robots fall rewards keep their mean: a fall ends them, and a constant would change what it costs
    scale = loaded.rows[:, :, 3].double().std()
    np.testing.assert_allclose(data.rows[:, :, 3], loaded.rows[:, :, 3] / scale, rtol=1e-4)


def test_a_share_of_the_trajectories(robots_data):
    args = dom2_mamujoco.Args(scenario="Hopper", dataset="random", data_dir=str(robots_data), data_fraction=0.3)
    torch.manual_seed(0)
    data = dom2_mamujoco.load_data(args, MujocoEnv("Hopper", 1), torch.device("cpu"))
    loaded = common.load_dataset(robots_data, "Hopper", "random", 2, 1, 3, 1000)
    assert len(data.lengths) == round(0.3 * len(loaded.lengths)) and data.lengths.sum() == data.rows.shape[1]
    everything = {tuple(row.tolist()) for row in loaded.rows[0, :, :3]}
    for start, length in zip(data.starts, data.lengths, strict=True):
        episode = data.rows[0, start : start + length]
        assert episode[-1, -1] == 1 and not episode[:-1, -1].any()
        np.testing.assert_array_equal(episode[:-1, 4:6], episode[1:, :2])
        assert tuple(episode[0, :3].tolist()) in everything


def test_rewards_of_half_cheetahs_are_standardised(robots_data):
    args = dom2_mamujoco.Args(dataset="random", data_dir=str(robots_data), reward_scale=2.0)
    reward = dom2_mamujoco.load_data(args, MujocoEnv("HalfCheetah", 1), torch.device("cpu")).rows[:, :, 9]
    np.testing.assert_allclose([reward.mean(), reward.std()], [0, 2], atol=1e-3)


def test_a_run_and_its_continuation(robots_data, tmp_path):
    """Six updates at once or four and two more end with the same parameters; results hold all three environments."""
    once = dom2_mamujoco.train(options(tmp_path / "a", robots_data, updates=6, num_seeds=2), dom2_mamujoco)
    dom2_mamujoco.train(options(tmp_path / "b", robots_data, num_seeds=2, shift=("none",)), dom2_mamujoco)
    (run,) = (tmp_path / "b").iterdir()
    resumed = dom2_mamujoco.Args(resume=str(run), updates=6, cuda=False)
    dom2_mamujoco.train(resumed, dom2_mamujoco)
    (first,) = (tmp_path / "a").iterdir()
    a, b = (common.load_torch(folder / "checkpoint.pt")["learners"] for folder in (first, run))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert list(once["returns"]) == ["none", "random", "extreme"] and all(len(x) == 2 for x in once["returns"].values())
    assert once["algorithm"] == "dom2" and once["data"]["transitions"] == 2000
    again = dom2_mamujoco.train(dom2_mamujoco.Args(eval_only=str(first), eval_episodes=1, cuda=False), dom2_mamujoco)
    assert again["returns"]["none"] == once["returns"]["none"]

    policy, env = dom2_mamujoco.load_policy(first, 1), library_env("HalfCheetah", "2x3")
    actions = policy(env.reset(seed=0)[0])
    assert list(actions) == ["agent_0", "agent_1"] and all(a.shape == (3,) for a in actions.values())


def test_losses_that_are_not_finite_end_the_run(robots_data, tmp_path, monkeypatch):
    calls, update = [], dom2_mamujoco.update

    def broken(*args):
        calls.append(1)
        metrics = update(*args)
        if len(calls) >= 3:
            metrics["losses/q"][1] = float("nan")  # agent 1
        return metrics

    monkeypatch.setattr(dom2_mamujoco, "update", broken)
    args = options(tmp_path, robots_data, scenario="Hopper", eval_interval=2, shift=("none",))
    with pytest.raises(UserError, match="update 3: losses/q of seed 0, agent 1 is not finite"):
        dom2_mamujoco.train(args, dom2_mamujoco)
    (run,) = tmp_path.iterdir()
    assert common.load_torch(run / "checkpoint.pt")["updates"] == 2 and not (run / "results.json").exists()


def test_robots_that_fall_are_evaluated_to_their_fall(robots_data, tmp_path, capsys):
    args = options(tmp_path, robots_data, scenario="Hopper", updates=2, eval_episodes=3, shift=("extreme",))
    results = dom2_mamujoco.train(args, dom2_mamujoco)
    assert list(results["returns"]) == ["none", "extreme"] and 0 < results["returns"]["none"][0] < 1000
    assert " - " in capsys.readouterr().out  # no normalised score without published ones


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scenario": "Humanoid"}, "have 9, 8 joints"),
        ({"scenario": "HalfCheetah", "agent_conf": "4x4"}, "has no partition"),
        ({"scenario": "simple_tag"}, "choose one of HalfCheetah"),
        ({"shift": ("speed",)}, "choose one of random, extreme, none"),
        ({"agent_obsk": -1}, "has no partition"),
    ],
)
def test_options_without_meaning(robots_data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        dom2_mamujoco.train(options(tmp_path, robots_data, **changes), dom2_mamujoco)


def run_script(*arguments, **environment):
    command = [sys.executable, "dom2_mamujoco.py", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_video_needs_a_renderer(robots_data, tmp_path):
    """Without one the run ends well, with a line that says what is missing."""
    dom2_mamujoco.train(options(tmp_path, robots_data, updates=1, shift=("none",)), dom2_mamujoco)
    (run,) = tmp_path.iterdir()
    evaluation = ("--eval-only", run, "--eval-episodes", 1, "--shift", "none", "--capture-video")
    done = run_script(*evaluation, MUJOCO_GL="glfw")
    assert done.returncode == 0 and "--capture-video: no off-screen renderer" in done.stdout, done.stderr
    assert (run / "evaluation.json").exists() and not (run / "policy.gif").exists()


def test_video(robots_data, tmp_path):
    pytest.importorskip("OpenGL.EGL")
    args = options(tmp_path, robots_data, updates=1, shift=("none",))
    dom2_mamujoco.train(args, dom2_mamujoco)
    (run,) = tmp_path.iterdir()
    learners = dom2_mamujoco.load_policy(run)
    assert learners is not None
    from PIL import Image

    try:
        dom2_mamujoco.write_gif(lambda obs, g: torch.zeros(2, 1, 3), args, "cpu", tmp_path / "a.gif", steps=6)
    except RuntimeError as error:
        pytest.skip(f"this machine has none: {error}")
    image = Image.open(tmp_path / "a.gif")
    assert image.size == (300, 300) and image.n_frames == 3
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
