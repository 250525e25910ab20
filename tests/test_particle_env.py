"""The particle worlds against two independent sources, recorded reference trajectories (golden/README.md) and the
maintained mpe2 library, and against what their docstrings promise."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mpe2.simple_spread import simple_spread
from mpe2.simple_tag import simple_tag
from mpe2.simple_world_comm import simple_world_comm
from pettingzoo.test import parallel_api_test, parallel_seed_test

import particle_env
from particle_env import EPISODE_STEPS, SCENARIOS, ParticleEnv, TeamEnv, draw, parallel_env, scenario_spec

HERE = Path(__file__).parent
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
PUBLISHED = [scenario for scenario in SCENARIOS if scenario != "landmarks6"]  # others' sources describe these
TEAMS = [*((scenario, None) for scenario in PUBLISHED), ("simple_spread", 5)]
every_team = pytest.mark.parametrize("scenario, num_agents", TEAMS)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def crowded(scenario, num_envs, seed=0, num_agents=None):
    """Random states with many contacts, float64: agent_pos, agent_vel [E, n, 2], landmark_pos [E, m, 2], actions."""
    spec = scenario_spec(scenario, num_agents)
    g = torch.Generator().manual_seed(seed)
    n, m = len(spec.agents), len(spec.landmarks)

    def uniform(k, reach):
        return reach * (2 * torch.rand(num_envs, k, 2, generator=g, dtype=torch.float64) - 1)

    return uniform(n, 0.4), uniform(n, 1.5), uniform(m, 0.6), uniform(n, 1.0)


# ---- recorded trajectories ----


@pytest.fixture(scope="module", params=PUBLISHED)
def golden(request):
    with np.load(HERE / "golden" / f"{request.param}.npz") as data:
        return request.param, {key: torch.from_numpy(data[key]) for key in data.files}


def test_golden_episodes_in_float64(golden):
    scenario, data = golden
    env = ParticleEnv(scenario, num_envs=len(data["kind"]), dtype=torch.float64)
    obs = env.set_state(data["agent_pos0"], data["agent_vel0"], data["landmark_pos"])
    for t in range(EPISODE_STEPS + 1):
        for i, o in enumerate(obs):
            close(o, data[f"obs_{i}"][:, t], 1e-6)
        if t < EPISODE_STEPS:
            obs, rewards = env.step(data["actions"][:, t])
            close(rewards, data["rewards"][:, t], 1e-6)
            close(env.agent_pos, data["agent_pos"][:, t], 1e-6)
            close(env.agent_vel, data["agent_vel"][:, t], 1e-6)


def test_golden_single_steps_in_float32(golden):
    scenario, data = golden  # contacts amplify rounding over an episode, so every step starts from the recorded state

    def before(name):  # [E, T, n, 2], the state before each step, -> [E * T, n, 2]
        return torch.cat([data[f"{name}0"][:, None], data[name][:, :-1]], 1).flatten(0, 1)

    landmarks = data["landmark_pos"].repeat_interleave(EPISODE_STEPS, 0)
    env = ParticleEnv(scenario, num_envs=len(landmarks))
    env.set_state(before("agent_pos"), before("agent_vel"), landmarks)
    obs, rewards = env.step(data["actions"].flatten(0, 1))
    assert rewards.dtype == torch.float32
    close(rewards, data["rewards"].flatten(0, 1), 1e-4)
    close(env.agent_pos, data["agent_pos"].flatten(0, 1), 1e-4)
    close(env.agent_vel, data["agent_vel"].flatten(0, 1), 1e-4)
    for i, o in enumerate(obs):
        close(o, data[f"obs_{i}"][:, 1:].flatten(0, 1), 1e-4)


# ---- mpe2 ----
# mpe2's own scenarios bring radii, caps, landmarks and who collides with whom. Two differences of its physics are ours
# to bridge, the rest of `World.step` runs as it is:
# - force: mpe2 multiplies an action by `accel` (5 where there is none) once; the environments of OMAR do it twice.
# - order: mpe2 moves an agent with its OLD velocity and then updates the velocity, we move it with the NEW one. Both
#   take the contact forces from the positions before the step, so one mpe2 step gives our new velocity; our new
#   position is where a second mpe2 step, from the old positions with the new velocities, takes the agents.


class Mpe2:
    """One mpe2 world with its scenario's rewards and observations."""

    def __init__(self, scenario, num_agents=None):
        module, counts = {
            "simple_spread": (simple_spread, (num_agents or 3,)),
            "simple_tag": (simple_tag, (1, 3, 2)),  # prey, predators, obstacles
            "simple_world": (simple_world_comm, (1, 3, 1, 2, 2)),  # prey, predators, obstacles, food, forests
        }[scenario]
        self.scenario = module.Scenario()
        self.world = self.scenario.make_world(*counts)
        self.scenario.reset_world(self.world, np.random.default_rng(0))
        self.gains = [5.0 if agent.accel is None else agent.accel**2 for agent in self.world.agents]
        self.caps = [agent.max_speed for agent in self.world.agents]
        for agent in self.world.agents:
            agent.leader = True  # in mpe2 forests hide agents from all but simple_world's leader, here from nobody

    def place(self, agent_pos, agent_vel, landmark_pos):
        agent_pos, agent_vel = np.asarray(agent_pos).copy(), np.asarray(agent_vel).copy()  # mpe2 adds in place
        for agent, pos, vel in zip(self.world.agents, agent_pos, agent_vel, strict=True):
            agent.state.p_pos, agent.state.p_vel = pos, vel
        for landmark, pos in zip(self.world.landmarks, np.asarray(landmark_pos), strict=True):
            landmark.state.p_pos = pos

    def read(self):
        states = [agent.state for agent in self.world.agents]
        return np.array([s.p_pos for s in states]), np.array([s.p_vel for s in states])

    def step(self, agent_pos, agent_vel, landmark_pos, actions, speed):
        agents, actions, speed = self.world.agents, np.asarray(actions), speed.tolist()
        for agent, action, v, gain, cap in zip(agents, actions, speed, self.gains, self.caps, strict=True):
            agent.action.u, agent.action.c = v * gain * action, np.zeros(self.world.dim_c)
            agent.max_speed = cap and v * cap  # None stays None: no cap
        self.place(agent_pos, agent_vel, landmark_pos)
        self.world.step()
        _, vel = self.read()
        self.place(agent_pos, vel, landmark_pos)
        self.world.step()
        pos, _ = self.read()
        self.place(pos, vel, landmark_pos)
        return pos, vel

    def observations(self):
        return [self.scenario.observation(agent, self.world) for agent in self.world.agents]

    def rewards(self):
        return np.array([self.scenario.reward(agent, self.world) for agent in self.world.agents])

    def contacts(self):
        """How many agents and solid things some agent overlaps, counted over agents."""
        agents, solid = self.world.agents, [e for e in self.world.entities if e.collide]
        return sum(self.scenario.is_collision(a, e) for a in agents for e in solid if e is not a)


@every_team
def test_constants_are_those_of_mpe2(scenario, num_agents):
    spec, world = scenario_spec(scenario, num_agents), Mpe2(scenario, num_agents).world
    assert spec.agent_size == tuple(agent.size for agent in world.agents)
    assert spec.landmark_size == tuple(landmark.size for landmark in world.landmarks)
    assert spec.max_speed == tuple(agent.max_speed or float("inf") for agent in world.agents)
    assert spec.gain == tuple(5.0 if agent.accel is None else agent.accel**2 for agent in world.agents)
    solid = [landmark.collide for landmark in world.landmarks]
    assert solid == [i < spec.num_solid for i in range(len(solid))]
    assert (particle_env.DT, particle_env.DAMPING) == (world.dt, world.damping)
    assert (particle_env.CONTACT_FORCE, particle_env.CONTACT_MARGIN) == (world.contact_force, world.contact_margin)


@every_team
@pytest.mark.parametrize("shift", [None, "speed"])
def test_step_agrees_with_mpe2(scenario, num_agents, shift):
    E, mpe2 = 150, Mpe2(scenario, num_agents)
    env = ParticleEnv(scenario, E, shift=shift, dtype=torch.float64, num_agents=num_agents)
    env.reset()  # draws v_j
    *state, actions = crowded(scenario, E, num_agents=num_agents)
    env.set_state(*state)
    env.step(actions)
    contacts = 0
    for e in range(E):
        mpe2.place(*(x[e] for x in state))
        contacts += mpe2.contacts() > 0
        pos, vel = mpe2.step(*(x[e] for x in state), actions[e], env.speed[e])
        close(env.agent_vel[e], vel, 1e-10)
        close(env.agent_pos[e], pos, 1e-10)
    assert contacts > E / 2


@pytest.mark.parametrize("scenario, num_agents", [*TEAMS, ("simple_spread", 1)])
def test_observations_agree_with_mpe2(scenario, num_agents):
    E, mpe2 = 50, Mpe2(scenario, num_agents)
    *state, _ = crowded(scenario, E, seed=1, num_agents=num_agents)
    obs = ParticleEnv(scenario, E, dtype=torch.float64, num_agents=num_agents).set_state(*state)
    for e in range(E):
        mpe2.place(*(x[e] for x in state))
        for ours, theirs in zip(obs, mpe2.observations(), strict=True):
            extra = 4 if scenario == "simple_world" else 0  # the leader's message comes last in simple_world_comm
            assert len(theirs) == ours.shape[1] + extra
            close(ours[e], theirs[: ours.shape[1]], 1e-12)


@every_team
def test_rewards_agree_with_mpe2_up_to_omar_changes(scenario, num_agents):
    """Contacts, catches, food and the boundary penalty are mpe2's; only the terms that OMAR changed are put right."""
    E, mpe2 = 300, Mpe2(scenario, num_agents)
    agent_pos, agent_vel, landmark_pos, _ = crowded(scenario, E, seed=2, num_agents=num_agents)
    agent_pos[:, -1] *= 3.5  # the last agent (the prey) inside, at the edge of and far outside the arena
    agent_pos[E // 2 :, :-1] += agent_pos[E // 2 :, -1:]  # half of the time followed by the others
    landmark_pos[::3, 1] = agent_pos[::3, -1]  # and with food 0 under it
    env = ParticleEnv(scenario, E, dtype=torch.float64, num_agents=num_agents)
    env.set_state(agent_pos, agent_vel, landmark_pos)
    _, rewards = env.step(torch.zeros_like(agent_pos))
    terms = []
    for e in range(E):
        mpe2.place(env.agent_pos[e], env.agent_vel[e], landmark_pos[e])
        theirs, ours = mpe2.rewards(), rewards[e].numpy()
        pos, landmarks = env.agent_pos[e].numpy(), landmark_pos[e].numpy()
        terms.append(theirs)
        if scenario == "simple_spread":  # a contact costs 5 instead of 1, and all share the landmarks' proximity
            nearest = np.linalg.norm(landmarks[:, None] - pos, axis=-1).min(1)
            close(ours, 5 * theirs + np.minimum(1 / nearest, 10).sum(), 1e-10)
            continue
        d = np.linalg.norm(pos[:3] - pos[3], axis=1)
        shaping = -0.1 * d.sum()  # added to every predator's reward, taken from the prey's
        if scenario == "simple_world":
            theirs[:3] += 0.1 * d  # mpe2 shapes each predator by its own distance alone
            theirs[3] += 0.1 * np.linalg.norm(landmarks[1:3] - pos[3], axis=1).min()  # from -0.05 d to OMAR's +0.05 d
        close(ours, theirs + shaping * np.array([1, 1, 1, -1]), 1e-10)
    assert np.ptp(np.array(terms).round(), axis=0).min() >= 2  # several contacts, penalties, foods did occur


# ---- resets, seeds and the shift ----


@every_scenario
def test_reset_distribution(scenario):
    env, r = ParticleEnv(scenario, 4000), SCENARIOS[scenario].landmark_range
    env.reset()
    assert not env.agent_vel.any()
    for pos, reach in ((env.agent_pos, 1.0), (env.landmark_pos, r)):
        flat = pos.flatten(0, 1)
        assert (flat.abs() <= reach).all() and (flat.abs().amax(0) > 0.99 * reach).all()
        close(flat.mean(0), [0, 0], 0.05)
        close(flat.std(0), [reach / 3**0.5] * 2, 0.02)


@every_scenario
def test_same_seed_same_episodes(scenario):
    def episodes(seed, unrelated):
        env = ParticleEnv(scenario, 5, shift="speed", seed=seed)
        torch.manual_seed(unrelated)  # the global generator plays no part
        return torch.cat([torch.cat(env.reset(), 1) for _ in range(2)] + [env.speed], 1)

    first = episodes(seed=3, unrelated=0)
    assert torch.equal(first, episodes(seed=3, unrelated=1))
    assert not torch.isclose(first[:, :-4], episodes(seed=4, unrelated=0)[:, :-4]).all(1).any()
    elsewhere = ParticleEnv(scenario, 5, shift="speed", device="meta", seed=3)  # a device that cannot draw
    elsewhere.reset()
    drawn = ParticleEnv(scenario, 5, shift="speed", seed=3)
    drawn.reset()
    assert torch.equal(elsewhere.generator.get_state(), drawn.generator.get_state())  # every device, the same worlds


@every_scenario
def test_shift_draws_speeds_uniformly_at_each_reset(scenario):
    E, spec = 20_000, SCENARIOS[scenario]
    env, k, low = ParticleEnv(scenario, E, shift="speed"), spec.num_controlled, spec.v_min
    assert low == {"simple_spread": 0.3, "simple_tag": 0.4, "simple_world": 0.5, "landmarks6": 0.3}[scenario]
    draws = []
    for _ in range(2):
        env.reset()
        draws.append(env.speed.clone())
        env.step(torch.ones(E, env.num_agents, 2))
        assert torch.equal(env.speed, draws[-1])  # an episode keeps its v_j
    assert (draws[0][:, :k] != draws[1][:, :k]).float().mean() > 0.99
    for v in draws:
        assert (v[:, k:] == 1).all()
        assert (v[:, :k] >= low).all() and (v[:, :k] <= 1).all()
        assert (np.corrcoef(v[:, :k].T.numpy()) - np.eye(k) < 0.03).all()  # agents draw independently
        for column in v[:, :k].T:  # Kolmogorov-Smirnov distance to U[v_min, 1]
            uniform = torch.linspace(0, 1, E)
            assert ((column.sort().values - low) / (1 - low) - uniform).abs().max() < 2 / E**0.5


@every_scenario
def test_shift_with_full_speed_is_the_standard_environment(scenario):
    *state, _ = crowded(scenario, 20)
    standard, shifted, slow = (ParticleEnv(scenario, 20, shift=shift) for shift in (None, "speed", "speed"))
    shifted.reset(), slow.reset()
    shifted.speed.fill_(1.0)
    for env in (standard, shifted, slow):
        env.set_state(*state)
    for t in range(EPISODE_STEPS):
        actions = crowded(scenario, 20, seed=t)[-1]
        (obs, rewards), (obs_1, rewards_1), _ = (env.step(actions) for env in (standard, shifted, slow))
        assert torch.equal(torch.cat(obs, 1), torch.cat(obs_1, 1)) and torch.equal(rewards, rewards_1)
    assert not torch.equal(standard.agent_pos, slow.agent_pos)


def drive(env, action, steps):
    """Velocities [1, n, 2] after `steps` of one action for everybody, from rest, with nothing in the way."""
    n, m = env.num_agents, env.num_landmarks
    lanes = torch.arange(float(n))[:, None] * torch.tensor([4.0, -4.0])  # parallel lanes across the diagonal
    env.set_state(lanes[None], torch.zeros(1, n, 2), torch.full((1, m, 2), -9.0))
    for _ in range(steps):
        env.step(torch.full((1, n, 2), action))
    return env.agent_vel


@every_scenario
def test_speed_scales_the_force(scenario):
    env = ParticleEnv(scenario, 1, shift="speed", dtype=torch.float64)
    env.reset()
    first_step = 0.1 * np.array(SCENARIOS[scenario].gain) * env.speed.numpy() * 0.25  # dt gain v action, below any cap
    close(drive(env, action=0.25, steps=1), np.stack([first_step] * 2, -1), 1e-12)


@pytest.mark.parametrize("scenario", ["simple_tag", "simple_world"])
def test_speed_scales_the_cap(scenario):
    env = ParticleEnv(scenario, 1, dtype=torch.float64)
    env.speed[:] = torch.tensor([0.5, 0.75, 1.0, 1.0])
    close(drive(env, action=1.0, steps=40).norm(dim=-1), [[0.5, 0.75, 1.0, 1.3]], 1e-12)


def test_terminal_speed_of_simple_spread_is_2v_per_axis():
    env = ParticleEnv("simple_spread", 1, dtype=torch.float64)
    env.speed[:] = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
    v = drive(env, action=1.0, steps=100)  # 0.75 v + 0.1 * 5 v_j = v
    close(v, [[[0.6, 0.6], [1.2, 1.2], [2.0, 2.0]]], 1e-8)


# ---- the rest of ParticleEnv ----


@every_scenario
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_agents_stay_finite(scenario, dtype):
    env = ParticleEnv(scenario, 2, dtype=dtype)
    env.set_state(*(torch.full_like(x, 0.3) for x in (env.agent_pos, env.agent_vel, env.landmark_pos)))
    for action in (0.0, 1.0):
        obs, rewards = env.step(torch.full_like(env.agent_pos, action))
        assert torch.cat([*obs, rewards], 1).isfinite().all()


@every_scenario
def test_worlds_are_independent(scenario):
    E, steps = 6, 4
    *state, _ = crowded(scenario, E)
    actions = [crowded(scenario, E, seed=t)[-1] for t in range(steps)]

    def run(worlds):
        env = ParticleEnv(scenario, len(worlds), dtype=torch.float64)
        env.set_state(*(x[worlds] for x in state))
        return torch.stack([torch.cat([*obs, r], 1) for obs, r in (env.step(a[worlds]) for a in actions)], 1)

    close(run(list(range(E))), torch.cat([run([e]) for e in range(E)]), 1e-9)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"simple_tagg.*simple_spread, simple_tag, simple_world"):
        ParticleEnv("simple_tagg", 1)
    with pytest.raises(ValueError, match=r"fast.*simple_tag.*speed"):
        ParticleEnv("simple_tag", 1, shift="fast")
    with pytest.raises(ValueError, match=r"human.*'rgb_array'"):
        parallel_env("simple_tag", render_mode="human")
    env = ParticleEnv("simple_tag", 2)
    good = dict(agent_pos=torch.zeros(2, 4, 2), agent_vel=torch.zeros(2, 4, 2), landmark_pos=torch.zeros(2, 2, 2))
    env.set_state(**good)
    for name in good:
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3, 2\), expected \(2, [24], 2\)"):
            env.set_state(**{**good, name: torch.zeros(2, 3, 2)})


@pytest.mark.parametrize("n", [1, 3, 5])
def test_simple_spread_of_any_number_of_agents(n):
    world, team = ParticleEnv("simple_spread", 4, num_agents=n), TeamEnv("simple_spread", 4, num_agents=n)
    assert world.obs_sizes == team.obs_sizes == (4 + 2 * n + 2 * (n - 1) + 2 * (n - 1),) * n
    assert team.agents == tuple(f"agent_{i}" for i in range(n)) and team.num_agents == n
    assert torch.equal(torch.stack(world.reset(), 1), team.reset())
    obs, rewards, _ = team.step(torch.ones(4, n, 2))
    assert obs.shape == (4, n, 6 * n) and rewards.shape == (4, n) and obs.isfinite().all() and rewards.isfinite().all()
    parallel_api_test(parallel_env("simple_spread", num_agents=n), num_cycles=60)
    assert parallel_env("simple_spread", num_agents=n, render_mode="rgb_array").possible_agents == list(team.agents)
    if n == 3:
        assert torch.equal(TeamEnv("simple_spread", 4).reset(), TeamEnv("simple_spread", 4, num_agents=3).reset())


@pytest.mark.parametrize("make", [partial(ParticleEnv, num_envs=1), partial(TeamEnv, num_envs=1), parallel_env])
def test_numbers_of_agents_without_a_meaning(make):
    for n in (0, -1, 2.5, "3"):
        with pytest.raises(ValueError, match=rf"num_agents {n!r}: must be a whole number of at least 1"):
            make("simple_spread", num_agents=n)
    for scenario in SCENARIOS.keys() - {"simple_spread"}:
        with pytest.raises(ValueError, match=f"num_agents 3: {scenario} has its own"):
            make(scenario, num_agents=3)


# ---- TeamEnv ----


@every_scenario
@pytest.mark.parametrize("shift", ["none", "speed"])
def test_team_env_plays_the_given_prey(scenario, shift):
    """Two episodes against the worlds stepped by hand, every agent's action written out."""
    E, n, g = 7, 3, torch.Generator().manual_seed(0)
    size = ParticleEnv(scenario, 1).obs_sizes[-1]
    weight, asked = torch.randn(size, 2, generator=g), []

    def prey(obs):
        asked.append(obs.clone())
        return torch.tanh(obs @ weight)

    world, team = ParticleEnv(scenario, E, shift, seed=5), TeamEnv(scenario, E, shift, seed=5, prey=prey)
    has_prey = len(SCENARIOS[scenario].agents) > n
    assert team.agents == SCENARIOS[scenario].agents[:n] and team.num_agents == n and team.state is None
    for _ in range(2):
        expected, obs = world.reset(), team.reset()
        for t in range(EPISODE_STEPS + 1):
            assert torch.equal(obs, torch.stack(expected[:n], 1))
            if t == EPISODE_STEPS:
                break
            actions = torch.rand(E, n, 2, generator=g) * 2 - 1
            given, everybody = actions.clone(), torch.zeros(E, world.num_agents, 2)
            everybody[:, :n] = actions
            if has_prey:
                everybody[:, n] = torch.tanh(expected[n] @ weight)
            seen = expected[-1]
            expected, expected_rewards = world.step(everybody)
            obs, rewards, terminated = team.step(actions)
            assert torch.equal(actions, given)
            assert not has_prey or torch.equal(asked[-1], seen)  # the prey sees the same moment as the others
            assert torch.equal(rewards, expected_rewards[:, :n]) and not terminated.any()
    assert len(asked) == (2 * EPISODE_STEPS if has_prey else 0)
    assert np.array_equal(team.render(2), draw(world, 2, 300))


# ---- PettingZoo ----


@every_scenario
@pytest.mark.parametrize("shift", [None, "speed"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_pettingzoo_api(scenario, shift):
    parallel_api_test(parallel_env(scenario, shift), num_cycles=60)
    parallel_seed_test(lambda: parallel_env(scenario, shift), num_cycles=60)


@every_scenario
@pytest.mark.parametrize("shift", [None, "speed"])
def test_wrapper_rolls_out_the_batched_env(scenario, shift):
    batched, wrapped = ParticleEnv(scenario, 1, shift=shift, seed=7), parallel_env(scenario, shift)
    wrapped.reset()  # whatever came before, the seed decides
    spaces = [*wrapped.action_spaces.values(), *wrapped.observation_spaces.values(), wrapped.state_space]
    assert {space.dtype for space in spaces} == {np.dtype(np.float32)}
    for episode in range(2):
        expected = batched.reset()
        obs, infos = wrapped.reset(seed=7 if episode == 0 else None)
        assert wrapped.agents == wrapped.possible_agents == list(obs) == list(infos) == list(SCENARIOS[scenario].agents)
        for t in range(1, EPISODE_STEPS + 1):
            for agent, o in zip(wrapped.agents, expected, strict=True):
                assert wrapped.observation_space(agent).contains(obs[agent])
                np.testing.assert_array_equal(obs[agent], o[0].numpy(), strict=True)
            assert wrapped.state_space.contains(wrapped.state())
            np.testing.assert_array_equal(wrapped.state(), np.concatenate(list(obs.values())))
            actions = {agent: 1.5 * wrapped.action_space(agent).sample() for agent in wrapped.agents}  # clipped
            expected, expected_rewards = batched.step(torch.from_numpy(np.stack(list(actions.values())))[None])
            obs, rewards, terminations, truncations, _ = wrapped.step(actions)
            assert list(rewards.values()) == expected_rewards[0].tolist()
            assert not any(terminations.values())
            assert set(truncations.values()) == {t == EPISODE_STEPS}
        assert wrapped.agents == []
        with pytest.raises(RuntimeError, match="reset"):
            wrapped.step(actions)


def test_wrapper_without_a_seed_is_random():
    states = [env.state() for env in [parallel_env("simple_tag") for _ in range(2)] if env.reset()]
    assert not np.array_equal(*states)


@every_scenario
def test_draw_shows_every_entity_where_it_is(scenario):
    env = ParticleEnv(scenario, 2)
    spots = 0.8 * torch.tensor([[-1, 1], [0, 1], [1, 1], [-1, 0], [0, 0], [1, 0], [-1, -1], [0, -1], [1, -1.0]])
    n, m = env.num_agents, env.num_landmarks
    env.set_state(spots[:n].repeat(2, 1, 1), torch.zeros(2, n, 2), spots[n : n + m].repeat(2, 1, 1))
    image = draw(env, index=1)
    assert image.shape == (500, 500, 3) and image.dtype == np.uint8

    def pixel(x, y):
        return image[round(250 * (1 - y / 1.4)), round(250 * (1 + x / 1.4))].astype(int)

    def looks(red, green, blue):
        if red == green == blue == 255:
            return "nothing"
        if max(red, green, blue) < 100:
            return "dark"
        return ("red", "green", "blue")[np.argmax([red, green, blue])]

    expected = {
        "simple_spread": ["blue"] * 3 + ["dark"] * 3,
        "simple_tag": ["red"] * 3 + ["blue"] + ["dark"] * 2,
        "simple_world": ["red"] * 3 + ["blue", "dark"] + ["green"] * 4,
        "landmarks6": ["blue"] * 3 + ["dark"] * 6,
    }[scenario]
    assert [looks(*pixel(x, y)) for x, y in spots.tolist()] == expected + ["nothing"] * (9 - n - m)
    env.agent_pos[0, 0] = torch.tensor([3.0, -2.0])  # an agent that left comes into view, in its corner
    assert (draw(env, index=0)[375:, 450:].min(-1) < 200).any()
    assert np.array_equal(draw(env, index=1), image)
    assert draw(env, size=120).shape == (120, 120, 3)


def test_render_mode(monkeypatch):
    env = parallel_env("simple_world", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert env.render_mode in env.metadata["render_modes"]
    env.step({agent: np.ones(2, np.float32) for agent in env.agents})
    assert frame.dtype == np.uint8 and not np.array_equal(frame, env.render())
    env.close()

    monkeypatch.setattr(particle_env, "draw", lambda *args: pytest.fail("drew although nobody asked for an image"))
    for mode in (None, "rgb_array"):  # drawing is render's alone, and no work without a render mode
        env = parallel_env("simple_world", render_mode=mode)
        env.reset(seed=0)
        env.step({agent: np.ones(2, np.float32) for agent in env.agents})
    assert parallel_env("simple_world").render() is None


def test_import_leaves_mujoco_alone(tmp_path):
    (tmp_path / "mujoco.py").touch()  # a stand-in, so that the test means something where MuJoCo is not installed
    path = os.pathsep.join([str(tmp_path), str(HERE.parent)])
    code = "import sys, particle_env; print([m for m in sys.modules if m.split('.')[0].startswith('mujoco')])"
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- landmarks6 ----


def test_landmarks6_is_cooperative_navigation_with_more_landmarks_and_rewards_of_ones_own():
    E = 50
    pos, vel, landmarks, actions = crowded("landmarks6", E)
    env, spread = (ParticleEnv(scenario, E, dtype=torch.float64) for scenario in ("landmarks6", "simple_spread"))
    env.set_state(pos, vel, landmarks), spread.set_state(pos, vel, landmarks[:, :3])
    obs, rewards = env.step(actions)
    obs_3, _ = spread.step(actions)
    assert torch.equal(env.agent_pos, spread.agent_pos) and torch.equal(env.agent_vel, spread.agent_vel)
    touches = 0
    for e in range(E):
        for i in range(3):
            here = env.agent_pos[e, i]
            close(
                obs[i][e], torch.cat([obs_3[i][e, :10], (landmarks[e, 3:] - here).flatten(), obs_3[i][e, 10:]]), 1e-12
            )
            expected = min(1 / min((here - x).norm().item() for x in landmarks[e]), 10.0)
            touching = sum((here - env.agent_pos[e, j]).norm().item() < 0.3 for j in range(3) if j != i)
            assert rewards[e, i].item() == pytest.approx(expected - 5 * touching, abs=1e-9)
            touches += touching
    assert 20 < touches < 280  # with and without collisions


def test_dismissed_landmarks_repeat_those_that_remain():
    E = 20_000
    env, standard = ParticleEnv("landmarks6", E, shift="dismiss"), ParticleEnv("landmarks6", E)
    drawn = []
    for _ in range(2):
        obs, _ = env.reset(), standard.reset()
        if not drawn:  # the same seed: what was there before three vanished
            before = standard.landmark_pos
        now = env.landmark_pos
        same = (now[:, :, None] == now[:, None]).all(-1)  # [E, 6, 6]
        assert (same.float().sum((1, 2)) >= 12).all()
        distinct = torch.tensor([len(np.unique(world, axis=0)) for world in now[:500].numpy()])
        assert (distinct == 3).all()  # three remain
        close(obs[0][:, 4:16].reshape(E, 6, 2), now - env.agent_pos[:, :1], 1e-6)
        drawn.append(now)
    stay = (drawn[0] == before).all(-1)  # [E, 6], in their own places
    assert (stay.sum(1) == 3).all()
    close(stay.float().mean(0), np.full(6, 0.5), 0.02)
    pairs = (stay.float().T @ stay.float() / E).numpy()  # two of six remain together with probability 1/5
    close(pairs[~np.eye(6, dtype=bool)], np.full(30, 0.2), 0.02)
    copies = (drawn[0][:, :, None] == before[:, None]).all(-1).float().sum(1)  # [E, 6], of each landmark
    assert (copies[~stay] == 0).all() and (copies.sum(1) == 6).all()
    shares = torch.bincount(copies[stay].long()) / (
        3 * E
    )  # 1 + Binomial(3, 1/3): a vanished one picks any of the three
    close(shares, [0, 8 / 27, 12 / 27, 6 / 27, 1 / 27], 0.01)


@pytest.mark.parametrize("scenario", PUBLISHED)
def test_only_landmarks6_dismisses(scenario):
    with pytest.raises(ValueError, match="dismiss"):
        ParticleEnv(scenario, 1, shift="dismiss")
