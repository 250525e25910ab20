"""Batched particle worlds: cooperative navigation, predator-prey, World and six landmarks, as tensors.

These are the variants of the multi-agent particle environments that offline multi-agent RL papers since OMAR (Pan et
al., ICML 2022) use: their own rewards and forces, no communication. All `num_envs` worlds advance in one `step`, on
the CPU or a GPU:

    env = ParticleEnv("simple_tag", num_envs=1024)
    obs = env.reset()                                   # list over agents of [E, d_i]
    obs, rewards = env.step(actions)                    # actions [E, n, 2] in [-1, 1], rewards [E, n]

`parallel_env("simple_tag")` is one such world behind PettingZoo's ParallelEnv interface, `draw(env)` a picture of one.

An episode has 25 steps and no terminal state: call `reset()` after `EPISODE_STEPS` steps. E is the number of worlds, n
the number of agents, m the number of landmark-like entities (landmarks, obstacles, food, forests). Lengths are world
units (the arena is about [-1, 1]^2, nothing stops an agent at its edge), velocities world units per unit time.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv
from PIL import Image, ImageDraw
from torch import Tensor

from utils.arrays import as_int, as_tensor

EPISODE_STEPS = 25
DT = 0.1  # time per step
DAMPING = 0.25  # share of the velocity lost per step
CONTACT_FORCE = 100.0
CONTACT_MARGIN = 1e-3
INF = float("inf")


@dataclass(frozen=True)
class Scenario:
    """The constants of one scenario; one tuple entry per agent or per landmark-like entity."""

    agents: tuple[str, ...]  # PettingZoo names in agent order; the controlled agents come first
    num_controlled: int  # agents that are trained; the others (the prey) follow them in agent order
    agent_size: tuple[float, ...]  # radii
    gain: tuple[float, ...]  # force per unit of action
    max_speed: tuple[float, ...]
    landmarks: tuple[str, ...]  # kind of each landmark-like entity
    landmark_size: tuple[float, ...]
    num_solid: int  # the first `num_solid` landmarks collide with agents
    landmark_range: float  # landmarks start uniformly in [-landmark_range, landmark_range]^2
    v_min: float  # shift "speed": v_j ~ U[v_min, 1] (Sec. 5.2 of the DOM2 paper)
    catch_reward: float = 0.0  # predators' reward for each predator that touches the prey
    num_dismissed: int = 0  # landmarks that vanish under the shift "dismiss"

    @property
    def shifts(self) -> tuple[str, ...]:
        """The shifted environments that the scenario has, the one it is made for first."""
        return ("dismiss", "speed") if self.num_dismissed else ("speed",)


HUNTERS = ("adversary_0", "adversary_1", "adversary_2", "agent_0")  # MPE calls the predators adversaries
SCENARIOS = {
    "simple_spread": Scenario(
        agents=("agent_0", "agent_1", "agent_2"),
        num_controlled=3,
        agent_size=(0.15,) * 3,
        gain=(5.0,) * 3,
        max_speed=(INF,) * 3,
        landmarks=("landmark",) * 3,
        landmark_size=(0.05,) * 3,
        num_solid=0,
        landmark_range=1.0,
        v_min=0.3,
    ),
    "simple_tag": Scenario(
        agents=HUNTERS,
        num_controlled=3,
        agent_size=(0.075, 0.075, 0.075, 0.05),
        gain=(9.0, 9.0, 9.0, 16.0),
        max_speed=(1.0, 1.0, 1.0, 1.3),
        landmarks=("obstacle", "obstacle"),
        landmark_size=(0.2, 0.2),
        num_solid=2,
        landmark_range=0.9,
        v_min=0.4,
        catch_reward=10.0,
    ),
    "simple_world": Scenario(
        agents=HUNTERS,
        num_controlled=3,
        agent_size=(0.075, 0.075, 0.075, 0.045),
        gain=(9.0, 9.0, 9.0, 16.0),
        max_speed=(1.0, 1.0, 1.0, 1.3),
        landmarks=("obstacle", "food", "food", "forest", "forest"),
        landmark_size=(0.2, 0.03, 0.03, 0.3, 0.3),
        num_solid=1,
        landmark_range=0.9,
        v_min=0.5,
        catch_reward=5.0,
    ),
    # the example of Figures 1 and 2: every agent is paid for its own nearest landmark
    "landmarks6": Scenario(
        agents=("agent_0", "agent_1", "agent_2"),
        num_controlled=3,
        agent_size=(0.15,) * 3,
        gain=(5.0,) * 3,
        max_speed=(INF,) * 3,
        landmarks=("landmark",) * 6,
        landmark_size=(0.05,) * 6,
        num_solid=0,
        landmark_range=1.0,
        v_min=0.3,
        num_dismissed=3,
    ),
}


def scenario_spec(scenario: str, num_agents: int | None = None) -> Scenario:
    """The constants of a scenario; of simple_spread also with other than three agents, and as many landmarks.

    Raises:
        ValueError: unknown scenario, fewer agents than one, or another scenario with a number of agents.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    spec, n = SCENARIOS[scenario], num_agents
    if n is None:
        return spec
    if scenario != "simple_spread":
        raise ValueError(f"num_agents {n}: {scenario} has its own number of agents, only simple_spread takes others")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_agents {n!r}: must be a whole number of at least 1")
    names = tuple(f"agent_{i}" for i in range(n))
    sized = ("agent_size", "gain", "max_speed", "landmarks", "landmark_size")
    return replace(spec, agents=names, num_controlled=n, **{name: getattr(spec, name)[:1] * n for name in sized})


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance over the last axis, [..., 2] -> [...]."""
    return (a - b).square().sum(-1).sqrt()


def _boundary_penalty(pos: Tensor) -> Tensor:
    """B(|x|) + B(|y|): what the prey pays for leaving the arena, [..., 2] -> [...]."""
    z = pos.abs()
    outside = torch.exp(2 * z - 2).clamp(max=10.0)
    return torch.where(z < 0.9, 0.0, torch.where(z < 1.0, 10 * (z - 0.9), outside)).sum(-1)


class ParticleEnv:
    """`num_envs` independent worlds of one scenario, stepped at once.

    Args:
        scenario: "simple_spread" (cooperative navigation), "simple_tag" (predator-prey), "simple_world" or
            "landmarks6" (three agents and six landmarks, the paper's first example).
        num_envs: number of worlds E.
        shift: None, or "speed": at every reset each controlled agent j draws v_j ~ U[v_min, 1], which multiplies its
            force and its speed cap; v_j = 1 is the standard environment. Or, in landmarks6, "dismiss": at every reset
            three landmarks vanish, and their places in the observation repeat landmarks that remain.
        device, dtype: where and in what precision the worlds live.
        seed: seeds this object's own random generator; all randomness is in `reset`.
        num_agents: of simple_spread, and its number of landmarks; None: three.

    Raises:
        ValueError: unknown scenario or shift, or `num_agents` does not fit.
    """

    def __init__(self, scenario, num_envs, shift=None, device="cpu", dtype=torch.float32, seed=0, num_agents=None):
        self.scenario, self.spec, self.num_envs = (
            scenario,
            scenario_spec(scenario, num_agents),
            as_int(num_envs, "num_envs", 1),
        )
        shifts = self.spec.shifts
        if shift not in (None, "none", *shifts):
            raise ValueError(f"unknown shift {shift!r} of {scenario}: choose {' or '.join(shifts)} or none")
        self.shift, self.device, self.dtype = shift, torch.device(device), dtype
        self.generator = torch.Generator("cpu").manual_seed(as_int(seed, "seed"))  # the same worlds on every device
        spec = self.spec
        self.num_agents, self.num_landmarks = len(spec.agents), len(spec.landmarks)
        n, m, solid = self.num_agents, self.num_landmarks, spec.num_solid

        def tensor(x):
            return torch.tensor(x, device=self.device, dtype=dtype)

        self.agent_size, self.landmark_size = tensor(spec.agent_size), tensor(spec.landmark_size)  # [n], [m]
        self.gain, self.max_speed = tensor(spec.gain), tensor(spec.max_speed)  # [n]
        self._capped = min(spec.max_speed) < INF
        solid_size = torch.cat([self.agent_size, self.landmark_size[:solid]])  # [n + s]
        self._contact_distance = self.agent_size[:, None] + solid_size  # [n, n + s]
        self._contact_distance[range(n), range(n)] = -INF  # nobody collides with itself
        others = [[j for j in range(n) if j != i] for i in range(n)]
        self._others = torch.tensor(others, dtype=torch.long, device=self.device)  # [n, n - 1]
        self.obs_sizes = tuple(4 + 2 * m + 2 * (n - 1) + extra for extra in self._extra_sizes())
        self.agent_pos = torch.zeros(num_envs, n, 2, device=self.device, dtype=dtype)
        self.agent_vel = torch.zeros_like(self.agent_pos)
        self.landmark_pos = torch.zeros(num_envs, m, 2, device=self.device, dtype=dtype)
        self.speed = torch.ones(num_envs, n, device=self.device, dtype=dtype)  # v_j

    def _extra_sizes(self):
        """Observation entries beyond velocity, position and relative positions, per agent."""
        if self.num_agents == self.spec.num_controlled:
            return (2 * (self.num_agents - 1),) * self.num_agents  # the silent others' messages
        forests = self.spec.landmarks.count("forest")
        return (2 + forests,) * 3 + (forests,)  # predators also see the prey's velocity

    def _uniform(self, *shape, low=-1.0, high=1.0):
        u = torch.rand(*shape, device="cpu", dtype=self.dtype, generator=self.generator)
        return low + (high - low) * u.to(self.device)

    def reset(self) -> list[Tensor]:
        """Draw new initial states (velocities 0) and, under a shift, new v_j. Returns obs as `step` does."""
        E, n, r = self.num_envs, self.num_agents, self.spec.landmark_range
        self.agent_pos = self._uniform(E, n, 2)
        self.agent_vel = torch.zeros_like(self.agent_pos)
        self.landmark_pos = self._uniform(E, self.num_landmarks, 2, low=-r, high=r)
        if self.shift == "dismiss":
            order = self._uniform(E, self.num_landmarks).argsort(1)  # of the landmarks, the last ones vanish
            remain, vanish = order.split([self.num_landmarks - self.spec.num_dismissed, self.spec.num_dismissed], 1)
            pick = self._uniform(E, vanish.shape[1], low=0, high=remain.shape[1]).long()
            source = torch.empty_like(order).scatter_(1, order, torch.cat([remain, remain.gather(1, pick)], 1))
            self.landmark_pos = self.landmark_pos.gather(1, source[..., None].expand(-1, -1, 2))
        if self.shift == "speed":
            k = self.spec.num_controlled
            self.speed[:, :k] = self._uniform(E, k, low=self.spec.v_min, high=1.0)
        return self._observations()

    def set_state(self, agent_pos: Tensor, agent_vel: Tensor, landmark_pos: Tensor) -> list[Tensor]:
        """Set positions [E, n, 2], velocities [E, n, 2] and landmarks [E, m, 2]; v_j stay. Returns obs.

        Raises:
            ValueError: a shape does not fit.
        """
        given = {"agent_pos": agent_pos, "agent_vel": agent_vel, "landmark_pos": landmark_pos}
        state = {
            name: as_tensor(x, name, getattr(self, name).shape, self.device, self.dtype) for name, x in given.items()
        }
        for name, x in state.items():
            setattr(self, name, x.clone())
        return self._observations()

    def step(self, actions: Tensor) -> tuple[list[Tensor], Tensor]:
        """Advance every world by one step of DT.

        Args:
            actions: [E, n, 2], clipped to [-1, 1]; whether they are finite is not checked.

        Returns:
            obs: list over agents of [E, d_i], in agent order. rewards: [E, n], of the state after the step.

        Raises:
            ValueError: the actions have another shape.
        """
        pos = self.agent_pos
        actions = as_tensor(actions, "the array of actions", pos.shape, self.device, self.dtype).clamp(-1, 1)
        solid = torch.cat([pos, self.landmark_pos[:, : self.spec.num_solid]], 1)  # [E, n + s, 2]
        force = (self.gain * self.speed)[..., None] * actions  # [E, n, 2]
        # Contact: every pair repels by k log(1 + exp(-(r - s_i - s_j) / k)); softplus is linear beyond 40, in float64
        # exact to rounding.
        delta = pos[:, :, None] - solid[:, None, :]  # [E, n, n + s, 2]
        r = delta.square().sum(-1).sqrt()  # [E, n, n + s]
        penetration = CONTACT_MARGIN * F.softplus((self._contact_distance - r) / CONTACT_MARGIN, threshold=40.0)
        push = CONTACT_FORCE * penetration / r.clamp(min=1e-12)  # coincident centres do not push (r = 0 gives 0 / 0)
        force = force + (push[..., None] * delta).sum(2)
        vel = (1 - DAMPING) * self.agent_vel + DT * force
        if self._capped:
            norm = vel.square().sum(-1).sqrt()  # [E, n]
            vel = vel * (self.max_speed * self.speed / norm.clamp(min=1e-12)).clamp(max=1.0)[..., None]
        self.agent_vel = vel
        self.agent_pos = pos + DT * vel
        return self._observations(), self._rewards()

    def _observations(self) -> list[Tensor]:
        pos, vel, E, n = self.agent_pos, self.agent_vel, self.num_envs, self.num_agents
        landmarks = (self.landmark_pos[:, None] - pos[:, :, None]).flatten(2)  # [E, n, 2 m]
        others = (pos[:, self._others] - pos[:, :, None]).flatten(2)  # [E, n, 2 (n - 1)]
        parts = [vel, pos, landmarks, others]
        if n == self.spec.num_controlled:
            obs = torch.cat([*parts, pos.new_zeros(E, n, 2 * (n - 1))], -1)
            return list(obs.unbind(1))
        parts.append(vel[:, -1:].expand(E, n, 2))  # the prey's velocity
        forest = [i for i, kind in enumerate(self.spec.landmarks) if kind == "forest"]
        if forest:
            reach = self.agent_size[:, None] + self.landmark_size[forest]  # [n, forests]
            inside = _distance(pos[:, :, None], self.landmark_pos[:, None, forest]) < reach
            parts.append(inside.to(self.dtype) * 2 - 1)
        obs = torch.cat(parts, -1)  # [E, n, d]
        prey = torch.cat([part[:, -1] for i, part in enumerate(parts) if i != 4], -1)  # without the prey's velocity
        return [*obs[:, :-1].unbind(1), prey]

    def _rewards(self) -> Tensor:
        pos, size = self.agent_pos, self.agent_size
        if self.num_agents == self.spec.num_controlled:
            d = _distance(pos[:, :, None], self.landmark_pos[:, None])  # [E, n, m]
            if self.scenario == "simple_spread":  # all agents share the landmarks' proximity to their nearest agent
                cover = (1 / d.amin(1)).clamp(max=10.0).sum(-1, keepdim=True)  # [E, 1]
            else:  # each has its own to its nearest landmark
                cover = (1 / d.amin(2)).clamp(max=10.0)  # [E, n]
            touching = _distance(pos[:, :, None], pos[:, self._others]) < size[:, None] + size[self._others]
            return cover - 5.0 * touching.sum(-1, dtype=self.dtype)
        d = _distance(pos[:, :-1], pos[:, -1:])  # predators to prey [E, 3]
        catches = self.spec.catch_reward * (d < size[:-1] + size[-1]).sum(-1, dtype=self.dtype)  # [E]
        predators = catches - 0.1 * d.sum(-1)
        prey = -predators
        if self.scenario == "simple_tag":
            prey = prey - _boundary_penalty(pos[:, -1])
        else:
            food = _distance(pos[:, -1:], self.landmark_pos[:, 1:3])  # [E, 2]
            eaten = (food < size[-1] + self.landmark_size[1:3]).sum(-1)
            # the sign of the last term is OMAR's: farther from the food is better
            prey = prey - 2 * _boundary_penalty(pos[:, -1]) + 2 * eaten + 0.05 * food.amin(-1)
        return torch.cat([predators[:, None].expand(-1, d.shape[1]), prey[:, None]], 1)


class TeamEnv:
    """The controlled agents' side of a ParticleEnv: a frozen prey, where the scenario has one, is part of the world.

    `MujocoEnv` has the same interface: n agents of one observation size d and one action size A, E worlds.

        obs = env.reset()                                   # [E, n, d]
        obs, rewards, terminated = env.step(actions)        # actions [E, n, A]; [E, n, d], [E, n], [E] bool

    A world that has terminated gives reward 0 until the next reset.

    Args:
        prey: maps the prey's observations [E, d'] to its actions [E, 2]; `step` needs it where there is a prey.
        The other arguments are those of ParticleEnv.
    """

    action_size, action_mask, action_scale, episode_steps, state = 2, None, 1.0, EPISODE_STEPS, None

    def __init__(self, scenario, num_envs, shift=None, device="cpu", seed=0, prey=None, num_agents=None):
        self.world = ParticleEnv(scenario, num_envs, shift, device, seed=seed, num_agents=num_agents)
        self.prey = prey
        spec = self.world.spec
        self.num_envs, self.num_agents = self.world.num_envs, spec.num_controlled
        self.obs_sizes = self.world.obs_sizes[: self.num_agents]
        self.obs_size, self.action_sizes = max(self.obs_sizes), (self.action_size,) * self.num_agents
        self.agents, self.device = spec.agents[: spec.num_controlled], self.world.device
        self.terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)  # nothing ever terminates

    def reset(self) -> Tensor:
        """Start a new episode in every world. Returns obs [E, n, d]."""
        self._obs = self.world.reset()
        return torch.stack(self._obs[: self.num_agents], 1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance every world by one step. Returns obs [E, n, d], rewards [E, n], terminated [E].

        Raises:
            ValueError: the actions have another shape, or there is a prey but no policy for it.
        """
        n, world = self.num_agents, self.world
        actions = as_tensor(actions, "the array of actions", (self.num_envs, n, 2), self.device, world.dtype)
        if world.num_agents > n:
            if self.prey is None:
                raise ValueError(f"{world.scenario} has a prey: make the environment with prey=..., its policy")
            prey, shape = self.prey(self._obs[n]), (self.num_envs, 2)
            prey = as_tensor(prey, "the array of the prey's actions", shape, self.device, world.dtype)
            actions = torch.cat([actions, prey[:, None]], 1)
        self._obs, rewards = self.world.step(actions)
        return torch.stack(self._obs[:n], 1), rewards[:, :n], self.terminated

    def render(self, index: int = 0) -> np.ndarray:
        """World `index` as an image, uint8 [300, 300, 3]."""
        return draw(self.world, index, 300)


COLORS = {  # RGBA; agents are translucent, so that overlaps and the landmarks below them show
    "forest": (76, 160, 86, 70),
    "obstacle": (74, 78, 86, 255),
    "landmark": (46, 50, 58, 255),
    "food": (58, 158, 74, 255),
    "predator": (214, 64, 58, 190),
    "prey": (24, 130, 196, 190),
    "cooperator": (58, 112, 205, 170),
}


def draw(env: ParticleEnv, index: int = 0, size: int = 500) -> np.ndarray:
    """World `index` of `env` as an image, uint8 [size, size, 3], y upwards.

    The camera shows [-1.4, 1.4]^2 and widens while an agent is farther out; the thin square is the arena [-1, 1]^2.
    """
    spec, agent_pos = env.spec, env.agent_pos[index]
    num_prey = env.num_agents - spec.num_controlled
    roles = ["predator" if num_prey else "cooperator"] * spec.num_controlled + ["prey"] * num_prey
    discs = [
        *zip(spec.landmarks, spec.landmark_size, env.landmark_pos[index].tolist(), strict=True),
        *zip(roles, spec.agent_size, agent_pos.tolist(), strict=True),
    ]
    view = max(1.4, agent_pos.abs().max().item() + 0.2)  # half the width of what the camera shows
    scale = size / view  # pixels per world unit, at twice the final size: shrinking the image smooths its edges

    def box(x, y, radius):
        return [scale * z for z in (view + x - radius, view - y - radius, view + x + radius, view - y + radius)]

    image = Image.new("RGB", (2 * size, 2 * size), "white")
    canvas = ImageDraw.Draw(image, "RGBA")
    canvas.rectangle(box(0, 0, 1), outline=(222, 224, 228), width=size // 125)
    for kind, radius, (x, y) in sorted(discs, key=lambda disc: disc[0] != "forest"):  # forests lie below the rest
        canvas.ellipse(box(x, y, radius), fill=COLORS[kind], outline=COLORS[kind][:3], width=size // 125)
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS))


class ParticleParallelEnv(ParallelEnv):
    """One world of `ParticleEnv` as a PettingZoo ParallelEnv.

    Actions are Box(-1, 1, (2,)), clipped as in ParticleEnv; observations are Box(-inf, inf, (d_i,)); both are float32.
    No agent ever terminates: all are truncated together after EPISODE_STEPS steps.

    Args:
        scenario, shift, num_agents: as in ParticleEnv.
        render_mode: None, or "rgb_array" for `render()` to return an image.

    Raises:
        ValueError: unknown scenario, shift or render mode, or `num_agents` does not fit.
    """

    def __init__(self, scenario, shift=None, render_mode=None, num_agents=None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"unknown render mode {render_mode!r}: choose 'rgb_array' or None")
        self.world = ParticleEnv(scenario, num_envs=1, shift=shift, num_agents=num_agents)
        self.world.generator.seed()  # every object its own episodes, until `reset` is given a seed
        self.render_mode = render_mode
        self.metadata = {
            "name": scenario,
            "render_modes": ["rgb_array"],
            "render_fps": round(1 / DT),
            "is_parallelizable": True,
        }
        self.possible_agents, self.agents = list(self.world.spec.agents), []
        self.action_spaces = {agent: Box(-1, 1, (2,), np.float32) for agent in self.possible_agents}
        self.observation_spaces = self._by_agent(Box(-INF, INF, (d,), np.float32) for d in self.world.obs_sizes)
        self.state_space = Box(-INF, INF, (sum(self.world.obs_sizes),), np.float32)

    def _by_agent(self, values):
        return dict(zip(self.possible_agents, values, strict=True))

    def action_space(self, agent):
        return self.action_spaces[agent]

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def reset(self, seed=None, options=None):
        """Start an episode; a seed restarts the random stream. Returns obs and infos, dicts over agents."""
        if seed is not None:
            self.world.generator.manual_seed(as_int(seed, "seed"))
        self.agents, self.steps = list(self.possible_agents), 0
        return self._by_agent(o[0].numpy() for o in self.world.reset()), {agent: {} for agent in self.agents}

    def step(self, actions):
        """Returns obs, rewards, terminations, truncations and infos, dicts over agents.

        Raises:
            RuntimeError: the episode is over, or none has begun.
            ValueError: an agent is missing or unknown, or its action has another shape or is not finite.
        """
        if not self.agents:
            raise RuntimeError("no episode is running: call reset() first")
        if actions.keys() != set(self.agents):
            raise ValueError(f"actions of {', '.join(map(str, actions))}: expected {', '.join(self.agents)}")
        stacked = [as_tensor(actions[agent], f"action of {agent}", (2,), finite=True) for agent in self.agents]
        obs, rewards = self.world.step(torch.stack(stacked).detach()[None])
        self.steps += 1
        truncated = self.steps == EPISODE_STEPS
        if truncated:
            self.agents = []
        return (
            self._by_agent(o[0].numpy() for o in obs),
            self._by_agent(rewards[0].tolist()),
            dict.fromkeys(self.possible_agents, False),
            dict.fromkeys(self.possible_agents, truncated),
            {agent: {} for agent in self.possible_agents},
        )

    def state(self):
        """All agents' observations in agent order, one float32 vector [sum of d_i]."""
        return torch.cat(self.world._observations(), 1)[0].numpy()

    def render(self):
        """The current state as an image, uint8 [500, 500, 3]; None where render_mode is None."""
        return None if self.render_mode is None else draw(self.world)

    def close(self):
        pass


parallel_env = ParticleParallelEnv  # the name PettingZoo's environment modules give it
