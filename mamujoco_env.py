"""Multi-agent MuJoCo, many environments in lockstep: a robot's joints shared out among agents.

Every environment is gymnasium-robotics' `mamujoco_v1` (Peng et al. 2021, now maintained there); this file steps many of
them side by side and adds shifted robots after Packer et al. (2018).

    env = MujocoEnv("HalfCheetah", num_envs=32)                 # two agents, hind and front leg, three joints each
    obs = env.reset()                                           # [E, n, d]
    obs, rewards, terminated = env.step(actions)                # actions [E, n, A] in [-1, 1]; [E, n, d], [E, n], [E]

The interface is that of `particle_env.TeamEnv`. An episode ends after `env.episode_steps` steps or, in robots that can
fall, with a fall: `terminated`. Only a fall is a terminal state. E is the number of environments, n of agents. Tensors
are float32, `terminated` is bool. The simulation runs on the CPU; `device` is where its tensors go.

Agents of Humanoid, HumanoidStandup and Pusher have unequal numbers of joints. A is the largest number, and the entries
that an agent does not have never reach the robot.
"""

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr

import numpy as np
import torch
from torch import Tensor

from utils.arrays import as_int, as_tensor

# Robots, and the partition where none is given: "2x3" is two agents of three joints each (of ManySegmentAnt: segments).
SCENARIOS = {
    "HalfCheetah": "2x3",
    "Ant": "2x4",
    "Hopper": "3x1",
    "Humanoid": "9|8",
    "HumanoidStandup": "9|8",
    "ManySegmentAnt": "2x3",
    "ManySegmentSwimmer": "10x2",
    "Pusher": "3p",
    "Reacher": "2x1",
    "Swimmer": "2x1",
    "Walker2d": "2x3",
}
GLOBAL_CATEGORIES = ("qpos", "qvel")  # of what no agent's joints have, such as the torso: positions and velocities

# Ratios to the standard robot, after Packer et al. (2018): around power 0.9, density 1,000 and friction 0.8 they draw
# from one interval ("random") or from two beyond it ("extreme"; either is equally likely). Those defaults belong to
# another simulator's cheetah, MuJoCo's has a friction of 0.4 and a fixed mass; hence ratios.
SHIFTS = {
    "random": {
        "gear": ((0.7 / 0.9, 1.1 / 0.9),),  # of the actuators
        "torso": ((0.75, 1.25),),  # mass and inertia
        "friction": ((0.5 / 0.8, 1.1 / 0.8),),  # sliding
    },
    "extreme": {
        "gear": ((0.5 / 0.9, 0.7 / 0.9), (1.1 / 0.9, 1.3 / 0.9)),
        "torso": ((0.5, 0.75), (1.25, 1.5)),
        "friction": ((0.2 / 0.8, 0.5 / 0.8), (1.1 / 0.8, 1.4 / 0.8)),
    },
}
TORSO = 1  # body 0 is the world


@contextmanager
def quiet():
    """Silence what the library tells of its other environments, and MuJoCo of the robots' old model files."""
    import mujoco

    shown = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # by default it writes a log file to the current folder
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        mujoco.set_mju_user_warning(shown)
        logging.disable(logging.NOTSET)


def task_name(
    scenario: str, agent_conf: str | None = None, agent_obsk: int = 0, global_categories: Sequence[str] = ()
) -> str:
    """Name of a robot with a partition of its joints: "HalfCheetah", "HalfCheetah-6x1-obsk1" or, with global
    categories, "HalfCheetah-6x1-obsk1-qpos-qvel".

    Args:
        agent_conf: partition of the joints, by the library's names; None: the one of `SCENARIOS`.
        agent_obsk: an agent sees its own joints, and of those at most so many joints away the angles.
            With 0 an agent of the half cheetah sees 6 numbers, its joints' angles and velocities.
        global_categories: names of `GLOBAL_CATEGORIES` whose global values every agent sees too, in this order.
    """
    agent_conf = agent_conf or SCENARIOS.get(scenario)
    if (agent_conf, agent_obsk, tuple(global_categories)) == (SCENARIOS.get(scenario), 0, ()):
        return scenario
    return "-".join([scenario, agent_conf, f"obsk{agent_obsk}", *global_categories])


def parallel_env(
    scenario: str, agent_conf: str | None = None, agent_obsk: int = 0, global_categories: Sequence[str] = (), **options
):
    """The library's environment of one robot, a PettingZoo ParallelEnv, as `MujocoEnv` steps it.

    Joints of an agent come in alphabetical order. Two of Pusher have the same name, and the library leaves their order
    to chance; here it is that of their numbers.

    Args:
        scenario, agent_conf, agent_obsk, global_categories: as of `task_name`. options: passed to the library.

    Raises:
        ValueError: the robot has no such partition or global category.
    """
    agent_conf = agent_conf or SCENARIOS[scenario]
    known = [category for category in global_categories if category in GLOBAL_CATEGORIES]
    with quiet():
        from gymnasium_robotics import mamujoco_v1
        from gymnasium_robotics.envs.multiagent_mujoco.obsk import build_obs

        try:
            env = mamujoco_v1.parallel_env(scenario, agent_conf, agent_obsk, global_categories=known, **options)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{scenario} has no partition {agent_conf!r} ({error})") from None
    data, nodes = env.single_agent_env.unwrapped.data, env.mujoco_globals
    has = [category for category in GLOBAL_CATEGORIES if len(build_obs(data, {}, [], nodes, (category,)))]
    for category in global_categories:
        if category not in has:
            raise ValueError(f"{scenario} has no global category {category!r}; it has {', '.join(has) or 'none'}")
    if len(known) > len(set(known)):
        raise ValueError(f"global categories {' '.join(known)}: name each of them once")
    for joints in env.k_dicts:
        for distance, nodes in joints.items():
            joints[distance] = sorted(nodes, key=lambda node: (node.label, node.act_ids))
    return env


def make_robots(task: str, num_envs: int, render_mode: str | None) -> list:
    """The library's environments of one task. Raises ValueError where there is no such task of the robot."""
    scenario, _, rest = task.partition("-")
    agent_conf, _, sight = (rest or f"{SCENARIOS[scenario]}-obsk0").partition("-obsk")
    agent_obsk, *categories = sight.split("-")
    if not agent_obsk.isdecimal():
        raise ValueError(f"{scenario} has no partition {rest!r}; name it as in {scenario}-{SCENARIOS[scenario]}-obsk1")
    name = task_name(scenario, agent_conf, int(agent_obsk), categories)
    if name != task:  # its data would lie in another folder
        raise ValueError(f"call it {name}")
    options = {"render_mode": render_mode}
    if render_mode is not None:
        options |= {"width": 300, "height": 300, "camera_name": "track"}  # most robots have this camera
    return [parallel_env(scenario, agent_conf, int(agent_obsk), categories, **options) for _ in range(num_envs)]


class MujocoEnv:
    """`num_envs` independent environments of one robot, stepped in lockstep.

    Args:
        task: a robot of `SCENARIOS`, or a `task_name` with another partition.
        num_envs: number of environments E.
        shift: None, or "random" or "extreme": at every reset each environment draws a new robot, see `SHIFTS`.
        device: of the tensors that `reset` and `step` return.
        seed: an int or a tuple of ints. Environment i's first states and shifts depend on `seed` and i alone.
        render_mode: None, or "rgb_array" for `render`.

    Where some agents see fewer numbers than others their observations end with zeros: d is the largest size.

    Attributes:
        action_sizes: number of joints of every agent; action_size: the largest of them, A.
        action_mask: [n, A], 1 for the entries that an agent has and 0 for others; None where all have equally many.
        action_scale: what the library's environment and datasets on disk have for a 1: 0.4 in humanoids, 2 in Pusher.

    Raises:
        ValueError: unknown scenario, partition, global category or shift.
    """

    def __init__(self, task, num_envs, shift=None, device="cpu", seed=0, render_mode=None):
        scenario = task.partition("-")[0]
        if scenario not in SCENARIOS:
            raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
        if shift not in (None, "none", *SHIFTS):
            raise ValueError(f"unknown shift {shift!r}: choose 'random', 'extreme' or none")
        if render_mode is not None and sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")
        self.task, self.num_envs, self.shift = task, as_int(num_envs, "num_envs", 1), SHIFTS.get(shift)
        self.device = torch.device(device)
        self.envs = make_robots(task, self.num_envs, render_mode)
        env = self.envs[0]
        self.robots = [env.single_agent_env.unwrapped for env in self.envs]
        joints = [[joint.act_ids for joint in partition] for partition in env.agent_action_partitions]
        self.agents, self.num_agents = tuple(env.possible_agents), len(joints)
        self.action_sizes = tuple(len(j) for j in joints)
        self.action_size = max(self.action_sizes)
        has = np.arange(self.action_size) < np.array(self.action_sizes)[:, None]  # [n, A]
        self.action_mask = None if has.all() else torch.from_numpy(has).to(self.device, torch.float32)
        self._joints, self._entries = np.concatenate(joints), np.flatnonzero(has)
        self.action_scale = float(env.single_agent_env.action_space.high[0])  # all joints of a robot have the same
        self.episode_steps = env.single_agent_env.get_wrapper_attr("_max_episode_steps")
        self.obs_sizes = tuple(env.observation_space(agent).shape[0] for agent in env.possible_agents)
        self.obs_size = max(self.obs_sizes)
        self.ratios = np.ones((self.num_envs, 3))  # drawn gear, torso and friction
        self.seed(seed)
        self._obs = np.zeros((self.num_envs, self.num_agents, self.obs_size), np.float32)
        self._state = np.zeros((self.num_envs, len(env.state())), np.float32)
        self._terminated = np.zeros(self.num_envs, bool)

    def seed(self, seed) -> None:
        """From the next reset on, the episodes of a new object with this seed; the robots are costly to make."""
        self._generators = []  # of the shifts
        numbers = [as_int(x, "seed", 0) for x in (seed if isinstance(seed, tuple) else (seed,))]
        for i, robot in enumerate(self.robots):
            sequence = np.random.SeedSequence([*numbers, i])
            robot.np_random = np.random.default_rng(int(sequence.generate_state(1)[0]))
            self._generators.append(np.random.default_rng(sequence.spawn(1)[0]))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    @property
    def state(self) -> Tensor:
        """What a single agent that controls the whole robot would see, [E, s]."""
        return self._tensor(self._state)

    def reset(self) -> Tensor:
        """Start a new episode in every environment. Returns obs [E, n, d]."""
        self._terminated[:] = False
        for i, robot in enumerate(self.robots):
            if self.shift is not None:
                self._draw_robot(i)
            self._state[i] = robot.reset()[0]
            self._observe(i)
        return self._tensor(self._obs)

    def _draw_robot(self, i: int) -> None:
        import mujoco

        drawn = []
        for intervals in self.shift.values():
            low, high = intervals[self._generators[i].integers(len(intervals))]
            drawn.append(self._generators[i].uniform(low, high))
        gear, torso, friction = drawn / self.ratios[i]  # relative to the robot before
        model, data = self.robots[i].model, self.robots[i].data
        model.actuator_gear[:] *= gear
        model.body_mass[TORSO] *= torso
        model.body_inertia[TORSO] *= torso
        model.geom_friction[:, 0] *= friction
        mujoco.mj_setConst(model, data)  # what the model derives from these
        self.ratios[i] = drawn

    def _observe(self, i: int) -> None:
        for agent, obs in enumerate(self.envs[i]._get_obs().values()):
            self._obs[i, agent, : len(obs)] = obs

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance every environment that has not ended by one step; the others stand still, at reward 0.

        Args:
            actions: [E, n, A], one number per joint, clipped to [-1, 1]; what an agent has beyond them is ignored.

        Returns:
            obs [E, n, d], rewards [E, n] (every agent gets the robot's), terminated [E].

        Raises:
            ValueError: the actions have another shape or are not finite.
        """
        shape = (self.num_envs, self.num_agents, self.action_size)
        actions = as_tensor(actions, "the array of actions", shape, dtype=torch.float64).detach().flatten(1)
        actions = as_tensor(actions[:, self._entries], "the array of actions", dtype=torch.float64, finite=True)
        controls = np.empty((self.num_envs, self._joints.size))
        controls[:, self._joints] = (actions.clamp(-1, 1) * self.action_scale).numpy()
        reward = np.zeros(self.num_envs, np.float32)
        for i in np.flatnonzero(~self._terminated):
            self._state[i], reward[i], self._terminated[i], _, _ = self.robots[i].step(controls[i])
            self._observe(i)
        rewards = self._tensor(reward)[:, None].expand(-1, self.num_agents)
        return self._tensor(self._obs), rewards, self._tensor(self._terminated)

    def render(self, i: int = 0) -> np.ndarray:
        """Environment i as an image, uint8 [300, 300, 3], drawn off-screen.

        Raises:
            RuntimeError: this machine has no off-screen renderer.
        """
        try:
            with quiet():
                return self.robots[i].render()
        except Exception as error:  # MuJoCo raises whatever the missing library makes of it
            remedy = "install EGL or OSMesa and set MUJOCO_GL=egl or osmesa"
            raise RuntimeError(f"no off-screen renderer ({type(error).__name__}: {error}); {remedy}") from None

    def random_state(self) -> str:
        """State of all random generators, for `set_random_state`."""
        generators = [robot.np_random for robot in self.robots] + self._generators
        return json.dumps([generator.bit_generator.state for generator in generators])

    def set_random_state(self, state: str) -> None:
        generators = [robot.np_random for robot in self.robots] + self._generators
        for generator, value in zip(generators, json.loads(state), strict=True):
            generator.bit_generator.state = value
