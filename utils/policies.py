"""A trained policy, to act with in other programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from particle_env import SCENARIOS
from utils.checkpoints import load_checkpoint, restore
from utils.frozen import policy_action
from utils.program import UserError


def as_tensor(x) -> Tensor:
    """An array of any float or integer type, byte order and strides, or a tensor, as a float32 tensor on the CPU."""
    if isinstance(x, Tensor):
        return x.detach().to("cpu", torch.float32)
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))


class TrainedPolicy:
    """A trained team as a function from PettingZoo observations to actions, both dicts by agent name; can be pickled.

    The agents of one seed act, and with them the frozen prey where the scenario has one.
    """

    def __init__(self, path: str | Path, algorithm, seed_index: int = 0):
        args, checkpoint = load_checkpoint(path, algorithm)
        if not 0 <= seed_index < args.num_seeds:
            raise UserError(f"seed_index {seed_index}: {path} holds {args.num_seeds} seeds")
        self.args, self.algorithm, self.prey = replace(args, num_seeds=1), algorithm, checkpoint["prey"]
        env = common.make_env(common.task_name(args))
        self.agents, self.sizes = env.agents, dict.fromkeys(env.agents, env.obs_size)
        if self.prey is not None:
            (self.prey_name,) = SCENARIOS[args.scenario].agents[len(self.agents) :]
        self.learners = algorithm.make_learners(self.args, env)
        # the learner axis is seed-major: cut out this seed's agents
        chosen = {k: v.unflatten(0, (args.num_seeds, -1))[seed_index] for k, v in checkpoint["learners"].items()}
        restore(self.learners, {}, {"learners": chosen}, path)
        self.generator = torch.Generator().manual_seed(args.seed)

    def __call__(self, observations: dict) -> dict:
        obs = [as_tensor(observations[name]) for name in self.agents]
        obs = torch.stack([F.pad(x, (0, self.sizes[name] - len(x))) for name, x in zip(self.agents, obs, strict=True)])
        actions = self.algorithm.act(self.learners, obs[:, None], self.args, self.generator)[:, 0]
        named = dict(zip(self.agents, actions.numpy(), strict=True))
        if self.prey is not None:
            named[self.prey_name] = policy_action(self.prey, as_tensor(observations[self.prey_name])).numpy()
        return named
