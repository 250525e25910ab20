"""A trained policy, to act with in other programs."""

from __future__ import annotations

import importlib
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from own_env import check_agents, from_unit
from particle_env import SCENARIOS
from utils.arrays import as_int, as_tensor
from utils.checkpoints import checkpoint_file, options_of, read_checkpoint, restore, script_of
from utils.frozen import policy_action
from utils.program import UserError, counted

LOCK = threading.RLock()


@contextmanager
def torch_defaults():
    """Within the context torch's own defaults hold, whatever the calling program has set: float32, CPU, no autocast."""
    with LOCK:  # the default belongs to all threads
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), torch.autocast("cpu", enabled=False):
                yield
        finally:
            torch.set_default_dtype(dtype)


def maker_of(checkpoint, file: Path):
    """The Algorithm that made a checkpoint, which was read from `file`; raises UserError if it is none of these."""
    script = script_of(checkpoint)
    if script is None:
        remedy = "give a run folder or a policy file; with an algorithm of your own, TrainedPolicy(path, algorithm=...)"
        raise UserError(f"{file}: no checkpoint of these scripts; {remedy}")
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return getattr(module, checkpoint["algorithm"].upper())


class TrainedPolicy:
    """A trained team as a function from PettingZoo observations to actions, both dicts by agent name; can be pickled.

    The agents of one seed act, and with them the frozen prey where the scenario has one.

    Args:
        path: a run folder, a policy file, or the name of a policy in pretrained/policies such as "simple_tag-random".
        seed_index: which of its seeds.
        algorithm: the Algorithm that made it; None: the one of this repository that it names.

    Raises:
        UserError: there is no such policy or seed, or it is damaged or another algorithm's.
    """

    @torch_defaults()
    def __init__(self, path: str | Path, seed_index: int = 0, *, algorithm=None):
        checkpoint, file = read_checkpoint(path), checkpoint_file(path)
        algorithm = algorithm or maker_of(checkpoint, file)
        args = options_of(checkpoint, file, algorithm)
        seed_index = as_int(seed_index, "seed_index", 0)
        if seed_index >= args.num_seeds:
            raise UserError(f"seed_index {seed_index}: {path} holds {counted(args.num_seeds, 'seed')}")
        self.args, self.algorithm, self.prey = replace(args, num_seeds=1), algorithm, checkpoint["prey"]
        env = common.make_env(common.task_name(args))
        check_agents(checkpoint.get("agents"), env.agents, file)
        self.agents, self.obs_size, self.boxes = env.agents, env.obs_size, getattr(env, "boxes", {})
        self.action_sizes, self.action_scale = env.action_sizes, env.action_scale
        self.sizes = dict(zip(env.agents, env.obs_sizes, strict=True))  # of every agent's observation
        if self.prey is not None:
            self.prey_name = SCENARIOS[args.scenario].agents[-1]
            self.sizes[self.prey_name] = self.prey["fc1.weight"].shape[1]
        self.learners = algorithm.make_learners(self.args, env)
        # the learner axis is seed-major: cut out this seed's agents
        chosen = {k: v.unflatten(0, (args.num_seeds, -1))[seed_index] for k, v in checkpoint["learners"].items()}
        restore(self.learners, {}, checkpoint | {"learners": chosen}, path)
        self.generator = torch.Generator().manual_seed(args.seed)

    @torch_defaults()
    def __call__(self, observations: dict) -> dict:
        """{agent: observation [d_i]} -> {agent: action [A_i], float32}, in the range of the agent's action space.

        Particles take [-1, 1], robots the library's range, an environment of one's own its Box.

        Raises:
            UserError: an agent is missing or unknown, or its observation has another size or is not finite.
        """
        if observations.keys() != self.sizes.keys():
            raise UserError(f"observations of {', '.join(map(str, observations))}: expected {', '.join(self.sizes)}")
        obs = {
            name: as_tensor(observations[name], f"observation of {name}", (size,), finite=True).detach()
            for name, size in self.sizes.items()
        }
        stacked = torch.stack([F.pad(obs[name], (0, self.obs_size - self.sizes[name])) for name in self.agents])
        actions = self.algorithm.act(self.learners, stacked[:, None], self.args, self.generator)[:, 0]
        actions = (actions * self.action_scale).numpy()
        named = {name: a[:size] for name, a, size in zip(self.agents, actions, self.action_sizes, strict=True)}
        named |= {name: from_unit(box, named[name]) for name, box in self.boxes.items()}
        if self.prey is not None:
            named[self.prey_name] = policy_action(self.prey, obs[self.prey_name]).numpy()
        return named
