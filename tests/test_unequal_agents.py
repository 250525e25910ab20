"""Agents with unequal numbers of joints (Humanoid, HumanoidStandup, Pusher), and what agents of robots may see."""

import copy
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import collect_datasets
import common
import dom2_mamujoco
import dom2_mpe
import mamujoco_env
from baselines import ma_bc, ma_cql, ma_diffusion_ql, ma_sfbc, ma_td3bc, madiff, omar, shared
from common import Dataset
from mamujoco_env import SCENARIOS, MujocoEnv, parallel_env, task_name
from run import Run, parse
from utils.data import load_data
from utils.evaluation import action_std, write_gif
from utils.policies import TrainedPolicy
from utils.program import UserError

UNEQUAL = {"Humanoid": (9, 8), "HumanoidStandup": (9, 8), "Pusher": (3, 1, 3)}
SIZES, S, B, D, A = (3, 1, 2), 2, 6, 4, 3  # action sizes of three agents; seeds, minibatch, widths
L = S * len(SIZES)
OWN = SIZES * S  # action sizes of the learners, the first seed's agents first
ALGORITHMS = {
    "dom2": (dom2_mpe.DOM2, {"zeta": 0.5, "critic_widths": (7,), "diffusion_steps": 3}),
    "dom2 of robots": (dom2_mamujoco.DOM2, {"zeta": 0.5, "critic_widths": (7,), "prediction": "noise"}),
    "dom2 residual": (dom2_mpe.DOM2, {"noise_net": "residual", "critic_widths": (7,), "max_grad_norm": 0.1}),
    "ma_bc": (ma_bc.MA_BC, {}),
    "ma_td3bc": (ma_td3bc.MA_TD3BC, {}),
    "ma_cql": (ma_cql.MA_CQL, {"cql_policy_actions": 2}),
    "omar": (omar.OMAR, {"omar_coe": 0.7, "cql_policy_actions": 2, "batch_norm": False}),
    "omar with elites": (omar.OMAR, {"omar_coe": 0.7, "omar_elites": 3, "omar_samples": 8}),
    "ma_sfbc": (ma_sfbc.MA_SFBC, {"window": 3, "critic_widths": (7,), "plan_candidates": 3}),
    "madiff": (madiff.MADIFF, {"width": 4, "num_blocks": 1, "inverse_widths": (8,), "horizon": 2}),
    "ma_diffusion_ql": (ma_diffusion_ql.MA_DIFFUSION_QL, {"critic_widths": (7,), "diffusion_steps": 3}),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


# ---- the environment ----


def library_env(scenario, **options):
    """The library's own environment; joints of Pusher that have one name are put in order, see `parallel_env`."""
    with mamujoco_env.quiet():
        from gymnasium_robotics import mamujoco_v1

        options = {"agent_obsk": 0, "global_categories": ()} | options
        env = mamujoco_v1.parallel_env(scenario, SCENARIOS[scenario], **options)
    if scenario == "Pusher":
        for k, joints in enumerate([(2, 0, 1), (3,), (4, 5, 6)]):
            by_number = {node.act_ids: node for node in env.k_dicts[k][0]}
            env.k_dicts[k][0] = [by_number[number] for number in joints]
    return env


def library_seed(seed, i):
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])


@pytest.mark.parametrize("scenario", UNEQUAL)
def test_steps_are_the_librarys_and_padding_is_ignored(scenario):
    """Two environments, number for number, whatever is in the entries that an agent does not have."""
    env, sizes, rng = MujocoEnv(scenario, 2, seed=7), UNEQUAL[scenario], np.random.default_rng(0)
    n, width = len(sizes), max(sizes)
    assert (env.num_agents, env.action_size, env.action_sizes) == (n, width, sizes)
    assert env.action_mask.tolist() == [[float(entry < size) for entry in range(width)] for size in sizes]
    theirs, ours, fallen = [library_env(scenario) for _ in range(2)], env.reset(), np.zeros(2, bool)
    names = theirs[0].possible_agents
    obs = [e.reset(seed=library_seed(7, i))[0] for i, e in enumerate(theirs)]
    for step in range(40):
        for i in np.flatnonzero(~fallen):
            for agent, name in enumerate(names):
                size = env.obs_sizes[agent]
                np.testing.assert_array_equal(ours[i, agent, :size], obs[i][name].astype(np.float32))
                assert not ours[i, agent, size:].any()
        actions = rng.uniform(-1, 1, (2, n, width))
        padded = torch.from_numpy(actions.copy())
        padded[:, env.action_mask == 0] = (float("nan"), 1e9, 0.5)[step % 3]
        ours, rewards, terminated = env.step(padded)
        for i in np.flatnonzero(~fallen):
            high = theirs[i].action_space(names[0]).high[0].item()
            by_name = {name: high * actions[i, agent, : sizes[agent]] for agent, name in enumerate(names)}
            obs[i], expected, ends, _, _ = theirs[i].step(by_name)
            assert rewards[i].tolist() == [np.float32(expected[name]) for name in names]
            fallen[i] = ends[names[0]]
        assert terminated.tolist() == fallen.tolist()
    assert fallen.all() == (scenario == "Humanoid")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_actions_are_scaled_to_the_range_of_all_joints(scenario):
    env = MujocoEnv(scenario, 1)
    whole = env.envs[0].single_agent_env.action_space
    assert (whole.high == np.float32(env.action_scale)).all() and (whole.low == -whole.high).all()
    assert env.action_scale == np.float32({"Humanoid": 0.4, "HumanoidStandup": 0.4, "Pusher": 2.0}.get(scenario, 1.0))
    assert sum(env.action_sizes) == len(whole.high)
    assert (env.action_mask is None) == (scenario not in UNEQUAL)


def test_joints_of_one_name_have_one_order():
    """Two of Pusher's joints have the same name. The library leaves their order to the addresses of its objects."""
    envs = [*MujocoEnv("Pusher", 12).envs, *(parallel_env("Pusher") for _ in range(4))]
    for env in envs:
        obs, _ = env.reset(seed=0)
        data = env.single_agent_env.unwrapped.data
        data.qpos[:] = np.arange(11)
        data.qvel[:] = np.arange(11) + 100
        assert env._get_obs()["agent_0"].tolist() == [2, 102, 0, 100, 1, 101]
        assert obs["agent_0"].shape == (6,)


# ---- what agents see ----

HAS = {**dict.fromkeys(SCENARIOS, ("qpos", "qvel")), "ManySegmentSwimmer": ()}
HAS |= dict.fromkeys(("Pusher", "Reacher"), ("qpos",))


def test_names_of_tasks():
    assert task_name("HalfCheetah") == task_name("HalfCheetah", "2x3", 0, ()) == "HalfCheetah"
    assert task_name("HalfCheetah", agent_obsk=1) == "HalfCheetah-2x3-obsk1"
    assert task_name("Hopper", "3x1", 2, ("qpos", "qvel")) == "Hopper-3x1-obsk2-qpos-qvel"
    assert task_name("Pusher", global_categories=["qpos"]) == "Pusher-3p-obsk0-qpos"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_global_categories_are_the_librarys(scenario):
    """Every agent also sees them, in the given order; a robot without one says which ones it has."""
    has = HAS[scenario]
    for categories in (has, has[::-1]):
        env = MujocoEnv(task_name(scenario, None, 0, categories), 1, seed=3)
        theirs = library_env(scenario, global_categories=categories)
        obs, expected = env.reset()[0], theirs.reset(seed=library_seed(3, 0))[0]
        for agent, name in enumerate(theirs.possible_agents):
            np.testing.assert_array_equal(obs[agent, : env.obs_sizes[agent]], expected[name].astype(np.float32))
    for category in {"qpos", "qvel", "foo", "cfrc_ext"} - set(has):
        with pytest.raises(ValueError, match=f"{scenario} has no global category '{category}'; it has "):
            MujocoEnv(task_name(scenario, None, 0, (category,)), 1)
    with pytest.raises(UserError, match=f"--scenario.* it has {', '.join(has) or 'none'}$"):
        common.make_env(task_name(scenario, None, 0, ("foo",)))


def test_global_values_of_the_half_cheetah():
    """Height and pitch, then the velocities of the torso: what the state has beside the joints."""
    env = MujocoEnv("HalfCheetah-2x3-obsk0-qpos-qvel", 1, seed=1)
    env.reset()
    obs, _, _ = env.step(torch.ones(1, 2, 3))
    assert env.obs_sizes == (11, 11)
    state = env.state[0]
    for agent in range(2):
        assert torch.equal(obs[0, agent, 6:], torch.cat([state[:2], state[8:11]]))
    with pytest.raises(ValueError, match="qpos qpos: name each of them once"):
        MujocoEnv("HalfCheetah-2x3-obsk0-qpos-qpos", 1)
    for other, name in (("HalfCheetah-2x3-obsk0", "HalfCheetah"), ("Hopper-3x1-obsk01", "Hopper-3x1-obsk1")):
        with pytest.raises(ValueError, match=f"call it {name}$"):  # its data would lie in another folder
            MujocoEnv(other, 1)


@pytest.mark.parametrize("scenario", sorted(set(SCENARIOS) - {"ManySegmentAnt"}))
def test_agents_can_see_the_angles_of_the_whole_robot(scenario):
    """With a large agent_obsk and all global categories; and without them they do not. (The library's graph of
    ManySegmentAnt links the segments in one direction only.)"""

    def unseen(agent_obsk, categories):
        env = MujocoEnv(task_name(scenario, None, agent_obsk, categories), 1, seed=2)
        env.reset()
        for _ in range(3):
            obs, _, _ = env.step(2 * torch.rand(1, env.num_agents, env.action_size) - 1)
        robot = env.robots[0]
        angles = robot.data.qpos[[node.qpos_ids for joints in env.envs[0].agent_action_partitions for node in joints]]
        shown = [np.float32([angle]) for angle in angles]
        if scenario == "Reacher":
            shown = [np.float32([np.cos(angle), np.sin(angle)]) for angle in angles]
        assert len(shown) == sum(env.action_sizes)
        own = [not np.isin(numbers, seen.numpy()).all() for seen in obs[0] for numbers in shown]
        if categories == ("qpos", "qvel"):  # the rest of the state's positions and its velocities as well
            missing = ~np.isin(env.state[0].numpy(), obs[0].numpy())
            assert not missing[: len(robot.data.qpos) - 2].any()
        return sum(own)

    torch.manual_seed(0)
    assert unseen(40, HAS[scenario]) == 0 < unseen(0, ())


def words_of(**options):
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@pytest.mark.parametrize("algorithm", [dom2_mamujoco.DOM2, omar.OMAR, madiff.MADIFF], ids=lambda a: a.name)
def test_options_lead_to_the_environment(algorithm):
    sight = {"scenario": "Walker2d", "agent_obsk": 2, "global_categories": ("qvel", "qpos")}
    args = parse(algorithm, "", words_of(**sight, dataset="random"))
    assert args == algorithm.args(dataset="random", **sight)
    env = common.make_env(common.task_name(args))
    assert env.task == "Walker2d-2x3-obsk2-qvel-qpos" and env.obs_sizes == (13, 13)
    default = algorithm.args("Walker2d", "random")
    assert default.global_categories == () and common.task_name(default) == "Walker2d"


@pytest.mark.parametrize(
    "changes", [{"agent_conf": "2x3"}, {"agent_obsk": 1}, {"global_categories": ("qpos",)}], ids=lambda c: next(iter(c))
)
def test_particles_have_no_joints(changes):
    with pytest.raises(UserError, match="simple_tag has no joints to share out"):
        Run(ma_bc.MA_BC.args("simple_tag", **changes), ma_bc.MA_BC)


def test_unknown_categories_end_the_program(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(dom2_mamujoco.DOM2, "", words_of(global_categories=("foo",)))
    assert stop.value.code == 2 and "qpos" in capsys.readouterr().err
    args = dom2_mamujoco.DOM2.args("Pusher", "random", global_categories=("qvel",), run_dir=str(tmp_path))
    with pytest.raises(UserError, match="--scenario Pusher-3p-obsk0-qvel: Pusher has no global category 'qvel'"):
        dom2_mamujoco.train(args)
    words = words_of(scenario="Hopper-3x1-obsk0-qpos-foo", data_dir=tmp_path)
    monkeypatch.setattr(sys, "argv", ["collect_datasets.py", *words])
    with pytest.raises(UserError, match="Hopper has no global category 'foo'; it has qpos, qvel"):
        collect_datasets.main()
    assert not list(tmp_path.iterdir())


# ---- data ----


@pytest.fixture(scope="session")
def unequal_data(tmp_path_factory):
    """Folder of small random datasets, to read only."""
    folder = tmp_path_factory.mktemp("unequal")
    for task in ("Pusher", "Pusher-3p-obsk1-qpos"):
        collect_datasets.collect(task, "random", folder, 400)
    return folder


@pytest.fixture(scope="session")
def humanoid_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("humanoid")
    collect_datasets.collect("Humanoid", "random", folder, 2000)
    return folder


def load(folder, task):
    return common.load_dataset(common.dataset_path(folder, task, "random"), MujocoEnv(task, 1))


def test_datasets_hold_the_librarys_actions_and_zeros(unequal_data):
    path = common.dataset_path(unequal_data, "Pusher", "random")
    actions = np.stack([np.load(path / f"acs_{agent}.npy", allow_pickle=False) for agent in range(3)])
    assert actions.shape == (3, 400, 3) and not actions[1, :, 1:].any()
    real = np.concatenate([actions[0], actions[1, :, :1], actions[2]], 1)
    assert 1.9 < abs(real).max() <= 2 and (abs(real).max(0) > 1.9).all() and abs(real.std() - 2 / 3**0.5) < 0.05
    data = load(unequal_data, "Pusher")
    np.testing.assert_array_equal(data.action, actions / 2)  # in [-1, 1]
    theirs = library_env("Pusher")  # the recorded actions give the recorded numbers there
    seed = np.random.SeedSequence([0, common.DATASETS.index("random"), 0, 0]).generate_state(1)[0]
    obs, _ = theirs.reset(seed=int(seed))
    for t in range(100):
        for agent in range(3):
            np.testing.assert_array_equal(
                data.obs[agent, t, : len(obs[f"agent_{agent}"])], np.float32(obs[f"agent_{agent}"])
            )
        played = {"agent_0": actions[0, t], "agent_1": actions[1, t, :1], "agent_2": actions[2, t]}
        obs, rewards, _, _, _ = theirs.step(played)
        assert data.reward[0, t] == np.float32(rewards["agent_0"])


def test_the_folder_tells_the_global_categories(unequal_data):
    task = "Pusher-3p-obsk1-qpos"
    metadata = json.loads((common.dataset_path(unequal_data, task, "random") / "metadata.json").read_text())
    assert metadata["scenario"] == task and load(unequal_data, task).obs.shape == (3, 400, 16)
    with pytest.raises(UserError, match="missing"):
        load(unequal_data, "Pusher-3p-obsk1")


def own_data(folder, source, cut=lambda name, agent, x: x):
    """Copy of Pusher's dataset as a user's own: without metadata, arrays changed by a function."""
    target = common.dataset_path(folder, "Pusher", "random")
    target.mkdir(parents=True)
    for file in common.dataset_path(source, "Pusher", "random").glob("*.npy"):
        name, agent = file.stem.rsplit("_", 1)
        np.save(target / file.name, cut(name, int(agent), np.load(file)))
    return folder


def test_own_data_may_have_each_agents_own_widths(unequal_data, tmp_path):
    widths = {"acs": (3, 1, 3), "obs": (6, 2, 6), "next_obs": (6, 2, 6)}

    def cut(name, agent, x):
        return x[:, : widths[name][agent]] if name in widths else x

    found, expected = load(own_data(tmp_path, unequal_data, cut), "Pusher"), load(unequal_data, "Pusher")
    for name in ("obs", "action", "reward", "next_obs", "done"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("acs", lambda x: x + (np.arange(400)[:, None] == 7) * [0, 0, 1e-3], "agent 1 has 1 columns.* in row 7"),
        ("obs", lambda x: x + (np.arange(400)[:, None] >= 9) * np.eye(6)[5], "agent 1 has 2 columns.* in row 9"),
        ("acs", lambda x: x[:, :2], r"has shape \(400, 2\), expected \[T, 1\]"),
        ("acs", lambda x: np.pad(x, ((0, 0), (0, 1))), r"has shape \(400, 4\), expected \[T, 1\]"),
    ],
)
def test_padding_with_numbers_is_refused(name, change, message, unequal_data, tmp_path):
    own_data(tmp_path, unequal_data, lambda n, agent, x: change(x) if (n, agent) == (name, 1) else x)
    with pytest.raises(UserError, match=f"{name}_1.npy: {message}"):
        load(tmp_path, "Pusher")


def test_actions_out_of_range_are_counted_among_real_entries(unequal_data, tmp_path, capsys):
    own_data(tmp_path, unequal_data, lambda name, agent, x: 0 * x + 2.1 if (name, agent) == ("acs", 0) else x)
    args = dom2_mamujoco.DOM2.args("Pusher", "random", data_dir=str(tmp_path))
    load_data(args, MujocoEnv("Pusher", 1), None)
    assert f"{3 / 7:.2%} of the action entries are outside [-2, 2]" in capsys.readouterr().err
    load_data(replace(args, data_dir=str(unequal_data)), MujocoEnv("Pusher", 1), None)
    assert not capsys.readouterr().err


# ---- learning: a stack of unequal agents learns as every agent alone, with its own number of action entries ----


def env_of(sizes, mask=None):
    return SimpleNamespace(num_agents=len(sizes), obs_size=D, action_size=max(sizes), action_mask=mask, device="cpu")


def mask_of(sizes):
    return (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).float()


def small_options(name, **changes):
    algorithm, own = ALGORITHMS[name]
    own = {"batch_size": B, "num_seeds": S} | ({} if name == "madiff" else {"widths": (8, 6)}) | own | changes
    return algorithm, algorithm.args("Hopper", "random", **own) if "robots" in name else algorithm.args(**own)


def tiny_dataset(seed=0):
    """Episodes of three steps of agents with SIZES action entries."""
    g, T = torch.Generator().manual_seed(seed), 24
    obs, next_obs = (torch.randn(len(SIZES), T, D, generator=g, dtype=torch.float64) for _ in range(2))
    action = (2 * torch.rand(len(SIZES), T, A, generator=g, dtype=torch.float64) - 1) * mask_of(SIZES)[:, None]
    reward = torch.randn(len(SIZES), T, generator=g, dtype=torch.float64)
    starts, lengths = torch.arange(0, T, 3), torch.full((T // 3,), 3)
    columns, returns = (obs, action, reward, next_obs, torch.zeros_like(reward)), torch.zeros(T // 3)
    data = Dataset(*columns, starts, lengths, returns, {}, {"all": T // 3})
    return data.replicated(lambda returns: torch.arange(T // 3))


def stacked(name, **changes):
    """An algorithm, its options, and learners of S teams with SIZES action entries, in double precision."""
    algorithm, args = small_options(name, **changes)
    torch.manual_seed(1)
    learners = algorithm.make_learners(args, env_of(SIZES, mask_of(SIZES))).double()
    with torch.no_grad():
        for p in learners.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return algorithm, args, learners


def doubled(batch):
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return tuple(map(doubled, batch))
    if isinstance(batch, tuple):
        return type(batch)(*map(doubled, batch))
    return batch.double() if batch.is_floating_point() else batch


def cut_batch(batch, learner):
    """The part of a minibatch that belongs to one learner, its actions without padding."""
    if not hasattr(batch, "_fields"):
        return tuple(cut_batch(b, learner) for b in batch)
    parts, size = {}, OWN[learner]
    for name, x in batch._asdict().items():
        if isinstance(x, tuple):
            parts[name] = cut_batch(x, learner)
            continue
        axis = 1 if len(x) != L or (name == "policy_noise" and x.dim() == 5) or name == "sampler_noise" else 0
        x = x.narrow(axis, learner, 1)
        if name in ("action", "random_actions", "policy_noise", "target_noise", "noise", "sampler_noise") or (
            name == "eps" and x.shape[-1] == A
        ):
            x = x.unflatten(-1, (-1, A))[..., :size].flatten(-2)
        parts[name] = x
    return type(batch)(**parts)


def cut_state(state, learner, target):
    """The part of stacked parameters that belongs to one learner; what it does not have is at the end of an axis."""
    cut = {k: x.unflatten(0, (L, -1))[learner] for k, x in state.items()}
    return {k: x[tuple(map(slice, target[k].shape))] for k, x in cut.items()}


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "madiff"])
def test_unequal_agents_learn_as_each_of_them_alone(name):
    """Three updates: the same parameters as of every learner by itself, whose networks have no padding at all."""
    algorithm, args, learners = stacked(name)
    before = copy.deepcopy(learners.state_dict())
    torch.manual_seed(2)
    batches = [doubled(algorithm.sample_batch(tiny_dataset(), args)) for _ in range(3)]
    optimizers = algorithm.make_optimizers(args, learners)
    metrics = [algorithm.update(learners, optimizers, batch, args) for batch in batches]
    for learner, size in enumerate(OWN):
        alone_args = replace(args, num_seeds=1)
        alone = algorithm.make_learners(alone_args, env_of((size,))).double()
        alone.load_state_dict(cut_state(before, learner, alone.state_dict()))
        optimizers = algorithm.make_optimizers(alone_args, alone)
        for batch, found in zip(batches, metrics, strict=True):
            expected = algorithm.update(alone, optimizers, cut_batch(batch, learner), alone_args)
            for key in expected:
                torch.testing.assert_close(found[key][learner], expected[key][0], rtol=1e-6, atol=1e-9, msg=key)
        now = cut_state(learners.state_dict(), learner, alone.state_dict())
        for key, expected in alone.state_dict().items():
            torch.testing.assert_close(now[key], expected, rtol=1e-7, atol=1e-7, msg=key)


def test_inverse_dynamics_of_madiff_learn_as_each_agents_alone():
    algorithm, args, learners = stacked("madiff")
    before, inverse = copy.deepcopy(learners.state_dict()), learners["inverse"]
    torch.manual_seed(2)
    batch = doubled(algorithm.sample_batch(tiny_dataset(), args))
    loss = madiff.inverse_loss(inverse, batch)
    grads = torch.autograd.grad(loss.sum(), list(inverse.parameters()))
    state = {k.removeprefix("inverse."): x for k, x in before.items() if k.startswith("inverse.")}
    for learner, size in enumerate(OWN):
        alone = shared.Policy(1, 2 * D, size, args.inverse_widths).double()
        alone.load_state_dict(cut_state(state, learner, alone.state_dict()))
        own = batch._replace(
            obs=batch.obs[learner, None],
            next_obs=batch.next_obs[learner, None],
            action=batch.action[learner, None, :, :size],
        )
        expected = madiff.inverse_loss(alone, own)
        torch.testing.assert_close(loss[learner], expected[0])
        for g, e in zip(grads, torch.autograd.grad(expected.sum(), list(alone.parameters())), strict=True):
            torch.testing.assert_close(g[learner][tuple(map(slice, e.shape[1:]))], e[0])


@pytest.mark.parametrize("prediction", ["action", "noise"])
@pytest.mark.parametrize("noise_net", dom2_mpe.NOISE_NETS)
def test_diffusion_loss_against_a_loop_over_agents(noise_net, prediction):
    """Eq. 3 of every learner, entry by entry over its own action, with a network that has no other entries."""
    algorithm, args, learners = stacked("dom2", noise_net=noise_net, prediction=prediction)
    policy, schedule = learners["policy"], dom2_mpe.NoiseSchedule(beta_max=args.beta_max)
    torch.manual_seed(3)
    batch = doubled(algorithm.sample_batch(tiny_dataset(), args))
    loss = dom2_mpe.diffusion_loss(policy, batch)
    state = policy.net.state_dict()
    for learner, size in enumerate(OWN):
        net = dom2_mpe.NOISE_NETS[noise_net](1, D, size, args.widths).double()
        net.load_state_dict(cut_state(state, learner, net.state_dict()))
        total = 0.0
        for b in range(B):
            tau, action, eps = batch.tau[learner, b], batch.action[learner, b, :size], batch.eps[learner, b, :size]
            noisy = schedule.alpha(tau) * action + schedule.sigma(tau) * eps
            f = net(noisy[None, None], batch.obs[None, None, learner, b], tau[None, None])[0, 0]
            for entry in range(size):
                wanted = eps[entry] if prediction == "noise" else action[entry]
                guess = f[entry] if prediction == "noise" else f[entry].tanh()
                total += (guess - wanted).item() ** 2
        assert loss[learner].item() == pytest.approx(total / B, rel=1e-9)
    gradient = torch.autograd.grad(loss.sum(), list(policy.net.parameters()))
    for g, p in zip(gradient, policy.net.parameters(), strict=True):
        for learner, size in enumerate(OWN):  # entries that do not exist learn nothing
            for axis in (axis for axis in range(1, p.dim()) if p.shape[axis] == A):
                assert not g[learner].narrow(axis - 1, size, A - size).any()
                assert g[learner].narrow(axis - 1, 0, size).any()


@every_algorithm
def test_actions_have_zeros_where_an_agent_has_no_joint(name):
    algorithm, args, learners = stacked(name)
    generator = torch.Generator().manual_seed(0)
    actions = algorithm.act(learners.float(), torch.randn(L, 9, D, generator=generator), args, generator)
    assert actions.shape == (L, 9, A) and abs(actions).max() <= 1
    for learner, size in enumerate(OWN):
        assert (actions[learner, :, :size] != 0).all() and not actions[learner, :, size:].any()


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("ma_bc", "madiff")])
def test_critics_see_zeros_where_an_agent_has_no_joint(name):
    """Whatever actions an update shows them: the data's, the policy's, noisy, random or the sampler's."""
    algorithm, args, learners = stacked(name)
    seen = []
    for key in ("critic", "target_critic"):
        learners[key].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].detach()))
    torch.manual_seed(2)
    batch = doubled(algorithm.sample_batch(tiny_dataset(), args))
    algorithm.update(learners, algorithm.make_optimizers(args, learners), batch, args)
    assert len(seen) >= 2
    for actions in seen:
        for learner, size in enumerate(OWN):
            assert not actions[learner, :, size:].any() and actions[learner, :, :size].any()


def test_log_densities_count_an_agents_own_entries():
    """-log p of uniform actions is log 2 for each entry that an agent has."""
    algorithm, args, learners = stacked("ma_cql")
    torch.manual_seed(2)
    batch = doubled(algorithm.sample_batch(tiny_dataset(), args))
    (_, uniform), (noisy, density), _ = shared.proposals(learners["policy"], batch, args.cql_noise)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for learner, size in enumerate(OWN):
        torch.testing.assert_close(uniform[learner], torch.full_like(uniform[learner], -size * np.log(2)))
        own = normal.log_prob(batch.policy_noise[0, learner, ..., :size]) - np.log(args.cql_noise)
        torch.testing.assert_close(density[learner], own.sum(-1))
        assert not noisy[learner, ..., size:].any()


def test_spread_and_saturation_are_of_own_entries():
    data = tiny_dataset()
    obs = data.obs.float()
    mask = mask_of(SIZES)
    noise = {}

    def act(x, generator):
        size = (L, x.shape[1], A)
        noise.setdefault("all", []).append(torch.randn(size, generator=generator))
        return noise["all"][-1] * mask.repeat(S, 1)[:, None]

    spread = action_std(act, data._replace(obs=obs), S, mask)
    drawn = torch.stack(noise["all"]).std(0)
    own = torch.cat([drawn[learner, :, :size].flatten() for learner, size in enumerate(OWN)])
    assert spread == pytest.approx(own.mean().item(), rel=1e-5)
    noise.clear()
    diluted = action_std(act, data._replace(obs=obs), S)
    assert diluted == pytest.approx(spread * sum(SIZES) / (A * len(SIZES)), rel=1e-5)

    algorithm, args, learners = stacked("dom2")
    with torch.no_grad():  # all actions go to the corners
        for p in learners["policy"].net.layers[-1].parameters():
            p.mul_(1e4)
    torch.manual_seed(2)
    batch = doubled(algorithm.sample_batch(data, args))
    policy = learners["policy"]
    action = policy(batch.obs, batch.policy_noise)
    saturation = dom2_mpe.q_loss(policy, learners["critic"], batch, 1.0)[1]["charts/saturation"]
    for learner, size in enumerate(OWN):
        share = (action[learner, :, :size].abs() > 0.99).double().mean()
        assert share > 0.2
        torch.testing.assert_close(saturation[learner], share, check_dtype=False)


# ---- whole runs ----

RUN = {"num_seeds": 2, "updates": 3, "batch_size": 25, "eval_interval": 3, "eval_episodes": 1, "cuda": False}


def train_on(name, scenario, folder, run_dir, **changes):
    algorithm, own = ALGORITHMS[name]
    own = ({} if name == "madiff" else {"widths": (8,)}) | own | RUN | {"shift": (), "run_dir": str(run_dir)} | changes
    args = algorithm.args(scenario, "random", data_dir=str(folder), **own)
    results = dom2_mpe.train(args, algorithm)
    (run,) = run_dir.iterdir()
    return results, run, algorithm, args


RUNS = [name for name in ALGORITHMS if name not in ("dom2", "dom2 residual")]  # dom2_mpe.py knows no robots


def check_run(name, scenario, folder, tmp_path, **changes):
    """It trains, evaluates, and its policy acts in the library's environment."""
    results, run, algorithm, args = train_on(name, scenario, folder, tmp_path, **changes)
    returns = torch.tensor(results["returns"]["none"])
    assert returns.shape == (2,) and returns.isfinite().all() and returns[0] != returns[1]
    again = dom2_mpe.train(replace(args, eval_only=str(run)), algorithm)
    assert again["returns"] == results["returns"]
    env = parallel_env(scenario, args.agent_conf, args.agent_obsk, args.global_categories)
    obs, _ = env.reset(seed=0)
    actions = TrainedPolicy(run, 1, algorithm=algorithm)(obs)
    assert [len(actions[agent]) for agent in env.possible_agents] == list(UNEQUAL[scenario])
    for agent in env.possible_agents:
        space = env.action_space(agent)
        assert isinstance(space, gymnasium.spaces.Box) and space.contains(actions[agent])
    env.step(actions)
    return run, algorithm


@pytest.mark.parametrize("name", RUNS)
def test_whole_run_on_pusher(name, unequal_data, tmp_path):
    run, algorithm = check_run(name, "Pusher", unequal_data, tmp_path)
    policy, env = TrainedPolicy(run, algorithm=algorithm), MujocoEnv("Pusher", 1)  # actions are the learners', doubled
    obs = {agent: torch.rand(size) for agent, size in zip(env.agents, env.obs_sizes, strict=True)}
    stack = torch.stack([F.pad(x, (0, 6 - len(x))) for x in obs.values()])
    expected = algorithm.act(
        policy.learners, stack[:, None], policy.args, torch.Generator().manual_seed(policy.args.seed)
    )
    actions = policy(obs)
    for agent, size in enumerate(env.action_sizes):
        np.testing.assert_allclose(actions[f"agent_{agent}"], 2 * expected[agent, 0, :size], rtol=1e-5, atol=1e-6)


def test_whole_run_on_humanoid(humanoid_data, tmp_path):
    check_run("dom2 of robots", "Humanoid", humanoid_data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "dom2 of robots"])
def test_every_algorithm_on_humanoid(name, humanoid_data, tmp_path):
    check_run(name, "Humanoid", humanoid_data, tmp_path, shift=("random", "extreme"))


@pytest.mark.slow
def test_a_standing_up_humanoid(tmp_path):
    collect_datasets.collect("HumanoidStandup", "random", tmp_path / "data", 2000)
    check_run("dom2 of robots", "HumanoidStandup", tmp_path / "data", tmp_path / "runs", shift=("extreme",))


def test_a_run_with_other_sight(unequal_data, tmp_path):
    run, _ = check_run("dom2 of robots", "Pusher", unequal_data, tmp_path, agent_obsk=1, global_categories=("qpos",))
    config = json.loads((run / "config.json").read_text())
    assert config["agent_obsk"] == 1 and config["global_categories"] == ["qpos"]
    with pytest.raises(UserError, match=r"--global-categories .* was trained with .'qpos',., which --resume cannot"):
        Run(parse(dom2_mamujoco.DOM2, "", words_of(resume=run, global_categories=())), dom2_mamujoco.DOM2)
    resumed = parse(dom2_mamujoco.DOM2, "", words_of(resume=run, updates=5))
    assert dom2_mamujoco.train(resumed)["updates"] == 5


def test_video_of_unequal_agents(unequal_data, tmp_path):
    run = Run(dom2_mamujoco.DOM2.args("Pusher", "random", num_seeds=2, shift=()), dom2_mamujoco.DOM2)
    run.act = lambda obs, generator: torch.full((6, obs.shape[1], 3), float("nan")).where(
        mask_of((3, 1, 3)).repeat(2, 1)[:, None] == 0, 0.1
    )
    make_env = run.make_env

    def short(*args, **options):
        env = make_env(*args, **options)
        env.episode_steps = 5
        return env

    run.make_env = short
    said = write_gif(run, tmp_path / "a.gif")
    if "no off-screen renderer" in said:
        pytest.skip(f"{said}")
    assert (tmp_path / "a.gif").stat().st_size > 1000


def test_evaluation_ignores_what_agents_do_not_have():
    args, returns = dom2_mamujoco.DOM2.args("Pusher", "random", num_seeds=2), []
    for padding in (0.0, float("nan")):
        env = MujocoEnv("Pusher", 4, seed=5)
        env.episode_steps = 10
        mask = env.action_mask.repeat(2, 1)[:, None]

        def act(obs, generator, mask=mask, padding=padding):
            return torch.where(mask > 0, obs[..., :3].tanh(), padding)

        returns.append(dom2_mamujoco.evaluate(act, env, args))
    assert torch.equal(*returns) and len(returns[0].unique()) == 4
