"""Behaviour cloning (BC), one deterministic policy per agent: what the data's actions alone teach.

    minimise  E[(pi(o) - a)^2]                                            bc_loss

    python baselines/ma_bc.py --scenario simple_spread --dataset expert
    python baselines/ma_bc.py --help

BC with DOM2's diffusion policy is `python dom2_mpe.py --eta 0`. Shapes as in dom2_mpe.py: L learners, B minibatch, d
and A entries.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from baselines import shared
from baselines.shared import ObservationNorm, Policy, act, options, settings_table
from dom2_mpe import action_mask, adam, gradient_step, sample_transitions, soft_update, train, with_targets
from run import Algorithm, parse
from utils.program import program


@dataclass
class TrainingArgs(options.TrainingArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    lr: options.Share = 1e-3
    """Adam's learning rate"""
    rho: options.Share = 0.005
    """the acting policies are a moving average: they move by this share of the difference each update"""


@dataclass
class Args(shared.DataArgs, TrainingArgs, shared.NetworkArgs, options.EvaluationArgs, options.RunArgs):
    """All options of behaviour cloning."""


# No settings of behaviour cloning are published for these datasets; networks and batches are those of omar.py.
SETTINGS = settings_table(
    particles=dict(updates=4_000),
    mujoco=dict(updates=6_000, batch_size=256, widths=(128, 128)),
    rows={},
)


class Batch(NamedTuple):
    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]


def bc_loss(policy, batch: Batch) -> Tensor:
    """E[(pi(o) - a)^2], mean over the action's entries: [L]."""
    return policy.own_mean((policy(batch.obs) - batch.action).square())


def make_learners(args: Args, env) -> nn.ModuleDict:
    """Observation moments, policies and their moving averages, with a leading learner axis."""
    L = args.num_seeds * env.num_agents
    policy = Policy(L, env.obs_size, env.action_size, args.widths, action_mask(args, env))
    learners = with_targets(policy=policy)
    learners["norm"] = ObservationNorm(L, env.obs_size)
    return learners.to(env.device)


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict:
    return adam(learners, policy=args.lr)


def sample_batch(data, args: Args) -> Batch:
    return Batch(*sample_transitions(data, args)[:2])


def update(learners: nn.ModuleDict, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of all policies. Returns metrics, each [L]."""
    learners["norm"].track(batch.obs)
    loss = bc_loss(learners["policy"], batch._replace(obs=learners["norm"](batch.obs)))
    gradient_step(learners, optimizers, "policy", loss, max_norm=0)
    soft_update(learners["target_policy"], learners["policy"], args.rho)
    return {"losses/bc": loss.detach()}


MA_BC = Algorithm("ma_bc", Args, SETTINGS, make_learners, make_optimizers, sample_batch, update, act)


if __name__ == "__main__":
    program(lambda: train(parse(MA_BC, __doc__), MA_BC))
