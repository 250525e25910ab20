"""Record a dataset from a PettingZoo ParallelEnv: ours, MAMuJoCo's, MPE2's or another one.

    from particle_env import parallel_env
    from record_dataset import record

    env = parallel_env("simple_spread")
    policy = lambda observations: {agent: env.action_space(agent).sample() for agent in observations}
    record(env, policy, num_transitions=10_000, scenario="simple_spread", dataset="random", data_dir="my_data")

`record` steps the environment. Where a program of yours does that, wrap the environment; leaving the context writes:

    with Recorder(env, "simple_spread", "medium-replay", data_dir="my_data") as env:
        ...  # env.reset() and env.step(actions) as ever

Then `python dom2_mpe.py --scenario simple_spread --dataset random --data-dir my_data` learns from it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gymnasium.spaces import Box
from pettingzoo.utils import BaseParallelWrapper

from own_env import is_own, to_unit
from utils.arrays import as_tensor
from utils.episodes import NewDataset
from utils.program import UserError


def float32_copy(x, what: str) -> np.ndarray:
    return as_tensor(x, what).detach().numpy().copy()


def number(x, what: str) -> float:
    """A number, or an array of one."""
    x = as_tensor(x, what, dtype=torch.float64)
    if x.numel() != 1:
        raise UserError(f"{what}: has shape {tuple(x.shape)}, expected one number")
    return x.item()


class Recorder(BaseParallelWrapper):
    """A ParallelEnv whose episodes become a dataset when `save` is called or the context ends without an error.

    An episode that `reset` or `save` interrupts is stored as one that was cut short.

    Args:
        env: a ParallelEnv. Its agents are found by the scenario's names.
        scenario: the task, as `common.make_env` takes it: "simple_tag", "HalfCheetah", "Hopper-3x1-obsk1".
        dataset, data_dir, seed, overwrite: as in import_dataset.py.
        agents: names of the environment's agents to record, in the scenario's order, where they are not the same. The
            prey of predator-prey and World has a name of its own and is not recorded.
        store: what to store of an agent's action, where it is not the action itself; e.g. for MPE2's five forces
            `lambda a: a[[2, 4]] - a[[1, 3]]`.

    Raises:
        UserError: agents, observations or actions do not fit the scenario, or the dataset exists.
    """

    def __init__(
        self, env, scenario: str, dataset: str, data_dir="my_data", seed=0, agents=(), overwrite=False, store=None
    ):
        super().__init__(env)
        self.data, self.store = NewDataset(scenario, dataset, data_dir, seed, agents, overwrite), store
        self.recorded = self.data.chosen(list(env.possible_agents))
        team = self.data.env
        for name, size, entries in zip(self.recorded, team.obs_sizes, team.action_sizes, strict=True):
            space, action_space = env.observation_space(name), env.action_space(name)
            if space.shape != (size,):
                raise UserError(
                    f"{name}: has observations of shape {space.shape}, {scenario} has ({size},) (of a robot, with "
                    "the task's partition and global_categories)"
                )
            if store is None and (not isinstance(action_space, Box) or action_space.shape != (entries,)):
                raise UserError(
                    f"{name}: has actions in {action_space}, {scenario} in a Box of ({entries},); pass "
                    "`store`, a function that makes such an action of them"
                )
        self._steps = {}  # of the episode that is running: {what: [{agent: array}, one each step]}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.save()

    def _named(self, values: dict) -> dict[str, np.ndarray]:
        """The recorded agents' observations as float32 copies, as an environment may write into its arrays again."""
        if not {*self.recorded} <= {*values}:
            raise UserError(f"observations of {', '.join(values)}: expected {', '.join(self.recorded)}")
        return {name: float32_copy(values[name], f"observation of {name}") for name in self.recorded}

    def reset(self, seed=None, options=None):
        self._end(terminated=False)
        observations, infos = self.env.reset(seed=seed, options=options)
        self._steps = {"observations": [self._named(observations)], "actions": [], "rewards": []}
        return observations, infos

    def step(self, actions):
        """Step the environment.

        Raises:
            UserError: an agent has no action or one outside its Box; or some agents end before the others.
        """
        if not self._steps:
            raise UserError("no episode is running: call reset() first")
        stored = {name: self._checked(name, actions) for name in self.recorded}
        observations, rewards, terminations, truncations, _ = result = self.env.step(actions)
        self._steps["actions"].append(stored)
        if not {*self.recorded} <= {*rewards}:
            raise UserError(f"rewards of {', '.join(rewards)}: expected {', '.join(self.recorded)}")
        self._steps["rewards"].append({name: number(rewards[name], f"reward of {name}") for name in self.recorded})
        ended = [name for name in self.recorded if terminations[name] or truncations[name]]
        if 0 < len(ended) < len(self.recorded):
            raise UserError(f"{', '.join(ended)}: ended before the others; the layout holds teams that end together")
        if not ended or {*ended} <= {*observations}:  # some environments leave out the last observations
            self._steps["observations"].append(self._named(observations))
        if ended:
            self._end(any(terminations[name] for name in self.recorded))
        return result

    def _checked(self, name: str, actions: dict) -> np.ndarray:
        """What to store of an agent's action, float32 [A]."""
        if name not in actions:
            raise UserError(f"actions of {', '.join(actions)}: {name} has none")
        space = self.env.action_space(name)
        if isinstance(space, Box):
            action = as_tensor(actions[name], f"action of {name}", dtype=torch.float64).detach().numpy()
            inside = action.shape == space.shape and (action >= space.low - 1e-4) & (action <= space.high + 1e-4)
            if not np.all(inside):
                raise UserError(f"action of {name}: {action.tolist()} is not in its {space}; clip it")
        if self.store is not None:
            return float32_copy(self.store(actions[name]), f"what store makes of {name}'s action")
        return to_unit(space, action) if is_own(self.data.task) else action.astype(np.float32)

    def _end(self, terminated: bool) -> None:
        """Keep the episode that was running, if it has a transition."""
        if self._steps.get("actions"):
            arrays = [
                self.data.arrays({name: np.stack([step[name] for step in steps]) for name in self.recorded}, what)
                for what, steps in self._steps.items()
            ]
            self.data.add(terminated, *arrays)
        self._steps = {}

    def save(self) -> dict:
        """Write what was recorded so far, in place of an earlier `save`, and print what it is. Returns the metadata."""
        self._end(terminated=False)
        return self.data.write({"environment": str(self.env), "agents": self.recorded})


def record(env, policy: Callable, num_transitions: int, scenario: str, dataset: str, seed: int = 0, **options) -> dict:
    """Record whole episodes until there are `num_transitions`, two at least. Returns the metadata.

    Args:
        policy: observations -> actions, dicts by agent name; of all agents, also those that are not recorded.
        seed: of the environment's first reset, and the version that is written. options: as in `Recorder`.
    """
    if num_transitions < 1:
        raise UserError(f"num_transitions {num_transitions}: must be at least 1")
    recorder = Recorder(env, scenario, dataset, seed=seed, **options)
    episodes, steps = recorder.data.episodes, 0
    while steps < num_transitions or len(episodes) < 2:
        kept = len(episodes)
        observations, _ = recorder.reset(seed=None if kept else seed)
        while len(episodes) == kept:
            observations, *_ = recorder.step(policy(observations))
            steps += 1
    return recorder.save()
