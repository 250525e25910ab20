"""OMAR (Pan et al. 2022): MA-CQL whose policies also learn from the best action that a sampler finds.

Gradient ascent on a conservative Q gets stuck in poor local optima, the more the more agents there are. OMAR samples
actions from a Gaussian that it refits to those of high Q, and draws the policy towards the best one found:

    zeroth_order   the sampler, the inner loop of the paper's Algorithm 1
    policy_loss    -(1 - omar_coe) Q1(o, pi(o)) + omar_coe (pi(o) - a_best)^2 + 0.001 pi(o)^2
    critics        those of MA-CQL: cql_loss in baselines/shared.py

    python baselines/omar.py --scenario simple_spread --dataset expert
    python baselines/omar.py --help

What baselines/ma_cql.py says of settings, batch normalisation and differences holds here too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from baselines import shared
from baselines.shared import (
    act,
    cql_update,
    make_actor_critic,
    make_optimizers,
    options,
    sample_cql_batch,
    settings_table,
)
from dom2_mpe import q_of_candidates, train
from run import Algorithm, parse
from utils.program import UserError, program


@dataclass
class TrainingArgs(shared.CQLArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    omar_coe: options.Fraction = 1.0
    """weight of the distance to the best action found; the weight of Q is the rest"""
    omar_iterations: options.Count = 3
    """refits of the sampler's Gaussian"""
    omar_samples: options.Count = 10
    """actions in each of them"""
    omar_elites: Annotated[int, options.Rule("0 or at least 2", lambda x: x == 0 or x >= 2)] = 0
    """best actions to refit to (the cross-entropy method); 0: to all, weighted by softmax(Q)"""
    omar_sigma: Annotated[float, options.Rule("finite and above 0", lambda x: 0 < x < float("inf"))] = 2.0
    """the Gaussian's first standard deviation"""


@dataclass
class Args(shared.DataArgs, TrainingArgs, shared.CQLNetworkArgs, options.EvaluationArgs, options.RunArgs):
    """All options of OMAR."""

    def __post_init__(self):
        super().__post_init__()
        if self.omar_elites > self.omar_samples:
            raise UserError(f"--omar-elites {self.omar_elites}: must be at most --omar-samples {self.omar_samples}")


# As published with OMAR, except: on HalfCheetah what baselines/ma_cql.py names; random-medium and medium-expert, which
# were not published, have their neighbours' settings; batch normalisation, under which the critics cannot tell offset
# and scale of the sampler's actions, is off where that brings more return. The defaults of shared.py are those
# published for particles. cql_alpha was published for raw rewards.
SETTINGS = settings_table(
    particles=dict(raw_rewards=True),
    mujoco=dict(updates=6_000, batch_size=256, lr=1e-3, widths=(128, 128), gamma=0.99, rho=0.005, raw_rewards=True)
    | dict(cql_actions=4, cql_policy_actions=3, omar_iterations=2, omar_samples=20, omar_elites=5),
    rows={
        "simple_spread": {
            "random": dict(updates=6_000, cql_alpha=0.5, omar_coe=1.0),
            "random-medium": dict(cql_alpha=1.0, omar_coe=1.0),
            "medium-replay": dict(cql_alpha=1.0, omar_coe=1.0),
            "medium": dict(cql_alpha=5.0, omar_coe=1.0),
            "medium-expert": dict(cql_alpha=5.0, omar_coe=1.0, batch_norm=False),
            "expert": dict(cql_alpha=5.0, omar_coe=1.0),
        },
        "simple_tag": {
            "random": dict(cql_alpha=0.5, omar_coe=0.9),
            "random-medium": dict(updates=1_000, cql_alpha=0.5, omar_coe=0.9),
            "medium-replay": dict(updates=1_000, cql_alpha=0.5, omar_coe=0.9, batch_norm=False),
            "medium": dict(cql_alpha=5.0, omar_coe=0.7),
            "medium-expert": dict(cql_alpha=5.0, omar_coe=0.9, batch_norm=False),
            "expert": dict(cql_alpha=5.0, omar_coe=0.9, batch_norm=False),
        },
        "simple_world": {
            "random": dict(updates=1_000, cql_alpha=0.5, omar_coe=1.0, batch_norm=False),
            "random-medium": dict(updates=1_000, cql_alpha=1.0, omar_coe=0.7),
            "medium-replay": dict(updates=1_000, cql_alpha=1.0, omar_coe=0.7, batch_norm=False),
            "medium": dict(updates=1_000, cql_alpha=0.5, omar_coe=0.1),
            "medium-expert": dict(updates=1_000, cql_alpha=5.0, omar_coe=0.9, batch_norm=False),
            "expert": dict(updates=1_000, cql_alpha=5.0, omar_coe=0.9, batch_norm=False),
        },
        "HalfCheetah": {
            "random": dict(cql_alpha=1.0, omar_coe=1.0),
            "random-medium": dict(cql_alpha=5.0, omar_coe=0.9, batch_norm=False),
            "medium-replay": dict(cql_alpha=5.0, omar_coe=0.9),
            "medium": dict(cql_alpha=1.0, omar_coe=0.7, batch_norm=False),
            "medium-expert": dict(cql_alpha=5.0, omar_coe=0.5, batch_norm=False),
            "expert": dict(cql_alpha=5.0, omar_coe=0.5),
        },
    },
)


class Batch(NamedTuple):
    """MA-CQL's minibatch and random numbers, and those of the sampler."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    done: Tensor  # [L, B]
    random_actions: Tensor  # [L, B', K, A], uniform in [-1, 1], for the first B' transitions
    policy_noise: Tensor  # [2, L, B', K, A], standard normal
    sampler_noise: Tensor  # [iterations, L, B, samples, A], standard normal


def zeroth_order(q_fn, noise: Tensor, sigma: float, num_elites: int = 0) -> tuple[Tensor, Tensor]:
    """Maximise Q over actions by sampling from a Gaussian N(mu, sigma^2), refitted in every iteration.

    mu becomes the mean of the samples weighted by softmax(Q), sigma their root mean square distance from it. With
    `num_elites` above 0, mu and sigma are the mean and standard deviation of the best samples, and these samples and
    their Q also compete in the next iteration: the cross-entropy method, as published for HalfCheetah.

    Args:
        q_fn: actions [L, B, K, A] -> Q [L, B, K].
        noise: standard normal, [iterations, L, B, K, A].
        sigma: the first standard deviation, around 0.

    Returns:
        the best action of the last iteration [L, B, A], and its Q [L, B].
    """
    mu, kept, kept_q = torch.zeros_like(noise[0, :, :, :1]), noise[0, :, :, :0], noise[0, :, :, :0, 0]
    for eps in noise:
        new = (mu + sigma * eps).clamp(-1, 1)
        samples, q = torch.cat([new, kept], 2), torch.cat([q_fn(new), kept_q], -1)
        if num_elites:
            kept_q, elites = q.topk(num_elites)
            kept = samples.take_along_dim(elites[..., None], 2)
            mu, sigma = kept.mean(2, keepdim=True), kept.std(2, keepdim=True)
        else:
            mu = (q.softmax(-1)[..., None] * samples).sum(2, keepdim=True)
            sigma = (samples - mu).square().mean(2, keepdim=True).sqrt()
    best_q, best = q.max(-1)
    return samples.take_along_dim(best[..., None, None], 2)[:, :, 0], best_q


def policy_loss(policy, critic, batch: Batch, args: Args):
    """Q and the distance to the best action found, and MA-CQL's penalty: [L], and a dict of metrics [L].

    Where the policy's own action has the higher Q, it is its own target.
    """
    action = policy(batch.obs)
    q = critic.q1(batch.obs, action)  # [L, B]
    with torch.no_grad():
        q_fn = partial(q_of_candidates, critic.q1, batch.obs)
        noise = batch.sampler_noise * policy.mask[:, None]  # samples stay 0 where an agent has no action entry
        found, found_q = zeroth_order(q_fn, noise, args.omar_sigma, args.omar_elites)
        target = torch.where((found_q > q)[..., None], found, action)
    mimic = policy.own_mean((action - target).square())
    loss = args.omar_coe * mimic - (1 - args.omar_coe) * q.mean(1)
    metrics = {
        "charts/q_policy": q.detach().mean(1),
        "charts/q_sampler": found_q.mean(1),
        "losses/mimic": mimic.detach(),
    }
    return loss + args.action_penalty * policy.own_mean(action.square()), metrics


def sample_batch(data, args: Args) -> Batch:
    """Minibatches for all learners, and the random numbers of their update."""
    batch = sample_cql_batch(data, args)
    L, B, A = batch.action.shape
    noise = torch.randn(args.omar_iterations, L, B, args.omar_samples, A, device=batch.obs.device)
    return Batch(*batch, sampler_noise=noise)


update = partial(cql_update, policy_loss=policy_loss)
OMAR = Algorithm("omar", Args, SETTINGS, make_actor_critic, make_optimizers, sample_batch, update, act)


if __name__ == "__main__":
    program(lambda: train(parse(OMAR, __doc__), OMAR))
