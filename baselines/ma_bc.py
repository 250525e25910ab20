"""Behaviour cloning, one deterministic policy per agent: what the data's actions alone teach.

    minimise  E[(pi(o) - a)^2]                                            bc_loss

    python baselines/ma_bc.py --scenario simple_spread --dataset expert
    python baselines/ma_bc.py --help

Cloning with DOM2's diffusion policy is `python dom2_mpe.py --eta 0`. MLP, Policy and ObservationNorm are also the
building blocks of MA-TD3+BC, MA-CQL and OMAR. Shapes as in dom2_mpe.py: L learners, B minibatch, d and A entries.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import common
import dom2_mpe
from dom2_mpe import StackedLinear
from particle_env import SCENARIOS

ROBOTS = ("HalfCheetah",)  # of dom2_mamujoco.py, for which there are published settings


@dataclass
class RunArgs(dom2_mpe.RunArgs):
    """Options of a run of any baseline, on particles or robots."""

    scenario: str = "simple_tag"
    """simple_spread (cooperative navigation), simple_tag (predator-prey), simple_world, landmarks6 or HalfCheetah"""
    agent_conf: str | None = None
    """partition of a robot's joints among agents, such as 6x1; default: 2x3"""
    agent_obsk: int = 0
    """an agent of a robot sees its own joints, and the angles of those at most so many joints away"""
    augment: bool = False
    """replicate high-return trajectories (DOM2's Algorithm 1), or learn from the data set as it is"""
    shift: str | None = None
    """shifted environment of the final evaluation: speed, dismiss (landmarks6), random or extreme (robots) or none;
    default: all that the scenario has"""
    eval_interval: int | None = None
    """updates between evaluations in the standard environment"""
    eval_episodes: int | None = None
    """episodes per seed of every evaluation"""


@dataclass
class Args(RunArgs):
    """Options of behaviour cloning."""

    lr: float | None = None
    """Adam's learning rate"""
    widths: tuple[int, ...] | None = None
    """widths of the policy's hidden layers"""


# No settings of behaviour cloning are published for these data; networks and batches are those of OMAR.
SETTINGS = {
    "particles": {"updates": 4_000, "batch_size": 1024, "lr": 1e-3, "widths": (64, 64)},
    "robots": {"updates": 10_000, "batch_size": 256, "lr": 1e-3, "widths": (128, 128)},
}


def family(args):
    """The script whose environments, data and runs the scenario belongs to, or that of the run to go on with."""
    scenario = args.scenario
    if args.resume or args.eval_only:
        try:
            scenario = json.loads((Path(args.resume or args.eval_only) / "config.json").read_text())["scenario"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # `train` will say what is wrong with the folder
    if scenario not in ROBOTS:
        return dom2_mpe
    import dom2_mamujoco  # needs MuJoCo, which the particle scenarios do without

    return dom2_mamujoco


def resolve_by(args, settings: dict, by_data: dict, rules=()):
    """Fill the options left open and check all of them.

    Args:
        settings: option -> value, for "particles" and for "robots".
        by_data: option -> its values for each of common.DATASETS, for each scenario.
        rules: of the algorithm's own options, as in common.RULES.

    Raises:
        UserError: an option has no meaning.
    """
    common.check_choice("--scenario", args.scenario, (*SCENARIOS, *ROBOTS))
    common.check_choice("--dataset", args.dataset, common.DATASETS)
    if args.scenario in SCENARIOS:
        args = dom2_mpe.resolve_run(args)
        defaults = {"eval_interval": 1_000, "eval_episodes": 1_000, **settings["particles"]}
    else:
        defaults = {"shift": ("random", "extreme"), "eval_interval": 5_000, "eval_episodes": 32, **settings["robots"]}
        if isinstance(args.shift, str):
            common.check_choice("--shift", args.shift, (*defaults["shift"], "none"))
            args = replace(args, shift=(args.shift,))
    column = common.DATASETS.index(args.dataset)
    defaults |= {name: values[column] for name, values in by_data.get(args.scenario, {}).items()}
    args = common.fill(args, defaults.keys(), defaults.values())
    common.check_options(args)
    common.check_options(args, rules)
    return args


def resolve(args: Args) -> Args:
    """Fill the options left open from SETTINGS and check all of them; raises UserError."""
    return resolve_by(args, SETTINGS, {})


def algorithm_name(args: Args) -> str:
    return "ma_bc"


class ObservationNorm(nn.Module):
    """(o - mean) / std of every learner's observations, the moments averaged over all minibatches seen: [L, B, d]."""

    def __init__(self, num_learners: int, obs_size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(num_learners, 1, 1))
        self.register_buffer("mean", torch.zeros(num_learners, 1, obs_size))
        self.register_buffer("square", torch.ones(num_learners, 1, obs_size))

    def track(self, obs: Tensor) -> None:
        """Take a minibatch's observations into the moments."""
        self.count += 1
        self.mean.lerp_(obs.mean(1, keepdim=True), 1 / self.count)
        self.square.lerp_(obs.square().mean(1, keepdim=True), 1 / self.count)

    def forward(self, obs: Tensor) -> Tensor:
        variance = (self.square - self.mean.square()).clamp(min=0)
        return (obs - self.mean) / (variance + 1e-5).sqrt()


class MLP(nn.Module):
    """Layers of `sizes` with `activation` between them, for every learner: [L, B, sizes[0]] -> [L, B, sizes[-1]]."""

    def __init__(self, num_learners: int, sizes, activation=F.relu):
        super().__init__()
        self.layers = nn.ModuleList(StackedLinear(num_learners, i, o) for i, o in pairwise(sizes))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Policy(MLP):
    """Deterministic policies pi(o): [L, B, d] -> actions [L, B, A] in [-1, 1]."""

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths):
        super().__init__(num_learners, [obs_size, *widths, action_size])
        with torch.no_grad():  # actions near 0, far from where tanh is flat
            self.layers[-1].weight.uniform_(-3e-3, 3e-3)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(super().forward(obs))


class Batch(NamedTuple):
    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]


def bc_loss(policy, batch) -> Tensor:
    """E[(pi(o) - a)^2], mean over the action's entries: [L]."""
    return (policy(batch.obs) - batch.action).square().mean((1, 2))


def make_learners(args: Args, num_learners: int, obs_size: int, action_size: int, device) -> nn.ModuleDict:
    learners = {
        "norm": ObservationNorm(num_learners, obs_size),
        "policy": Policy(num_learners, obs_size, action_size, args.widths),
    }
    return nn.ModuleDict(learners).to(device)


def adam(learners: nn.ModuleDict, **lr: float) -> dict[str, torch.optim.Optimizer]:
    """One Adam for each named network; on stacked parameters it is one Adam per learner."""
    options = {"fused": True, "capturable": next(learners.parameters()).is_cuda}  # as CUDA graphs need it
    return {name: torch.optim.Adam(learners[name].parameters(), lr[name], **options) for name in lr}


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return adam(learners, policy=args.lr)


def sample_batch(data, args: Args, num_learners: int) -> Batch:
    return Batch(*dom2_mpe.sample_transitions(data, num_learners, args.batch_size)[:2])


def update(learners: nn.ModuleDict, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of all policies. Returns metrics, each [L]."""
    learners["norm"].track(batch.obs)
    loss = bc_loss(learners["policy"], batch._replace(obs=learners["norm"](batch.obs)))
    optimizers["policy"].zero_grad()
    loss.sum().backward()
    optimizers["policy"].step()
    return {"losses/bc": loss.detach()}


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Actions of all learners, obs [L, E, d] -> [L, E, A]."""
    return learners["policy"](learners["norm"](obs))


def main() -> None:
    args = common.parse(Args, __doc__)
    family(args).train(args, sys.modules[__name__])


if __name__ == "__main__":
    common.run(main)
