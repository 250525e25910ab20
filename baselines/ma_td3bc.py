"""MA-TD3+BC: TD3+BC (Fujimoto and Gu 2021) for every agent by itself.

    critic_loss    TD3's target: min of the twin target critics at the target policy's action plus clipped noise
    policy_loss    -lambda Q1(o, pi(o)) + (pi(o) - a)^2,  lambda = alpha / E|Q1(o, pi(o))|

    python baselines/ma_td3bc.py --scenario simple_spread --dataset expert
    python baselines/ma_td3bc.py --help

One update is `policy_delay` steps of the critics and then one of the policy and the targets, TD3's delayed policy
update; TD3+BC's own count of updates is that of the critics. lambda is that of the authors' code; the paper's Eq. 5 has
the data's actions. What differs from the original:
- Observations are standardised by moments over the minibatches seen, not by the dataset's.
- Gradients are clipped, the policy's last layer begins near 0 (both as in OMAR), and the target policy acts.
- In the particle environments rewards are standardised.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from baselines import shared
from baselines.shared import act, make_actor_critic, make_optimizers, options, settings_table
from dom2_mpe import gradient_step, sample_transitions, soft_update, train
from run import Algorithm, parse
from utils.program import program


@dataclass
class TrainingArgs(shared.TrainingArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    alpha: options.Weight = 2.5
    """weight of Q against behaviour cloning"""
    policy_delay: options.Count = 2
    """critic steps in an update, before the one step of the policy"""
    target_noise: options.Weight = 0.2
    """standard deviation of the noise on the target policy's action"""
    target_noise_clip: options.Weight = 0.5
    """largest absolute value of that noise"""


@dataclass
class Args(shared.DataArgs, TrainingArgs, shared.ActorCriticArgs, options.EvaluationArgs, options.RunArgs):
    """All options of MA-TD3+BC."""


# alpha, noise, delay: TD3+BC's. Networks, rates and batches: OMAR's, whose authors ran it with them (on MuJoCo tasks
# those of omar.py here). Rewards, updates and gamma on particles: found by experiment (docs/baselines.md).
FEW, LOW_GAMMA = dict(updates=1_000), dict(updates=4_000, gamma=0.8)
SETTINGS = settings_table(
    particles={},
    mujoco=dict(updates=5_000, batch_size=256, lr=1e-3, widths=(128, 128), gamma=0.99, rho=0.005, raw_rewards=True),
    rows={
        "simple_spread": {"random": FEW, "random-medium": FEW, "medium-replay": FEW, "medium": FEW},
        "simple_tag": {
            "random": FEW | dict(gamma=0.9),
            "medium-replay": FEW,
            "medium": LOW_GAMMA,
            "medium-expert": LOW_GAMMA,
            "expert": LOW_GAMMA,
        },
        "simple_world": {"random": FEW, "medium-replay": FEW, "medium": LOW_GAMMA},
    },
)


class Batch(NamedTuple):
    """A minibatch per learner, and every random number that a critic's step needs."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    done: Tensor  # [L, B], 1 after a terminal state
    target_noise: Tensor  # [L, B, A], standard normal


def critic_loss(critic, target_critic, target_policy, batch: Batch, gamma: float, noise: float, clip: float) -> Tensor:
    """TD error of both critics, [L]: (r + gamma (1 - done) min_k Qbar_k(o', a') - Q(o, a))^2.

    a' = pibar(o') + clip(noise N(0, I), -clip, clip), clipped to the action box.
    """
    with torch.no_grad():
        shift = (noise * batch.target_noise).clamp(-clip, clip)
        next_action = (target_policy(batch.next_obs) + shift).clamp(-1, 1) * target_policy.mask
        next_q = target_critic(batch.next_obs, next_action).amin(1)
        target = batch.reward + gamma * (1 - batch.done) * next_q  # [L, B]
    q = critic(batch.obs, batch.action)  # [L, 2, B]
    return (target[:, None] - q).square().mean(-1).sum(1)


def policy_loss(policy, critic, batch: Batch, alpha: float):
    """-alpha E[Q1(o, pi(o))] / E|Q1(o, pi(o))| + E[(pi(o) - a)^2]; the denominator is a constant for the gradient.

    Returns the loss [L] and a dict of metrics [L].
    """
    action = policy(batch.obs)
    q = critic.q1(batch.obs, action)  # [L, B]
    bc = policy.own_mean((action - batch.action).square())
    metrics = {"losses/bc": bc.detach(), "charts/q_policy": q.detach().mean(1)}
    return -alpha * q.mean(1) / q.detach().abs().mean(1) + bc, metrics


def sample_batch(data, args: Args) -> tuple[Batch, ...]:
    """One minibatch for each of the critics' steps."""

    def batch():
        transitions = sample_transitions(data, args)
        return Batch(*transitions, target_noise=torch.randn_like(transitions[1]))

    return tuple(batch() for _ in range(args.policy_delay))


def update(learners: nn.ModuleDict, optimizers: dict, batches: tuple[Batch, ...], args: Args) -> dict[str, Tensor]:
    """`policy_delay` steps of the critics, one of policies and targets. Returns metrics, each [L]."""
    policy, critic = learners["policy"], learners["critic"]
    targets = learners["target_critic"], learners["target_policy"]
    for raw in batches:
        batch = learners["norm"].standardise(raw)
        td = critic_loss(critic, *targets, batch, args.gamma, args.target_noise, args.target_noise_clip)
        gradient_step(learners, optimizers, "critic", td, args.max_grad_norm)
    loss, metrics = policy_loss(policy, critic, batch, args.alpha)  # on the critics' last minibatch
    gradient_step(learners, optimizers, "policy", loss, args.max_grad_norm)
    for name in ("policy", "critic"):
        soft_update(learners[f"target_{name}"], learners[name], args.rho)
    return {"losses/td": td.detach(), "losses/policy": loss.detach(), **metrics}


MA_TD3BC = Algorithm("ma_td3bc", Args, SETTINGS, make_actor_critic, make_optimizers, sample_batch, update, act)


if __name__ == "__main__":
    program(lambda: train(parse(MA_TD3BC, __doc__), MA_TD3BC))
