"""OMAR (Pan et al. 2022): MA-CQL whose policies also learn from the best action that a sampler finds.

Gradient ascent on a conservative Q gets stuck in poor local optima, the more the more agents there are. OMAR samples
actions from a Gaussian that it refits to those of high Q, and draws the policy towards the best one found:

    zeroth_order   the sampler, the inner loop of the paper's Algorithm 1
    policy_loss    -(1 - omar_coe) Q1(o, pi(o)) + omar_coe (pi(o) - a_best)^2 + 0.001 pi(o)^2
    critics        those of MA-CQL, baselines/ma_cql.py, with what is said there

    python baselines/omar.py --scenario simple_spread --dataset expert
    python baselines/omar.py --help
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import common
from baselines import ma_cql
from baselines.ma_bc import family, resolve_by


@dataclass
class Args(ma_cql.Args):
    """Options of OMAR: those of MA-CQL and of the sampler."""

    omar_coe: float | None = None
    """weight of the distance to the best action found, in [0, 1]; the weight of Q is the rest"""
    omar_iterations: int | None = None
    """refits of the sampler's Gaussian"""
    omar_samples: int | None = None
    """actions in each of them"""
    omar_elites: int | None = None
    """best actions to refit to (the cross-entropy method); 0: to all, weighted by softmax(Q)"""
    omar_sigma: float = 2.0
    """the Gaussian's first standard deviation"""


SETTINGS = {
    "particles": ma_cql.SETTINGS["particles"] | {"omar_iterations": 3, "omar_samples": 10, "omar_elites": 0},
    "robots": ma_cql.SETTINGS["robots"] | {"omar_iterations": 2, "omar_samples": 20, "omar_elites": 5},
}
# In the order of common.DATASETS; as in ma_cql.py random-medium and medium-expert are their neighbours'.
OMAR_COE = {
    "simple_spread": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "simple_tag": (0.9, 0.9, 0.9, 0.7, 0.9, 0.9),
    "simple_world": (1.0, 0.7, 0.7, 0.1, 0.9, 0.9),
    "HalfCheetah": (1.0, 0.9, 0.9, 0.7, 0.5, 0.5),
}
# Published with batch normalisation everywhere. The sampler's actions have the offset and the scale that such a critic
# cannot tell: left out where it brings more return.
BATCH_NORM = {
    "simple_spread": (True, True, True, True, False, True),
    "simple_tag": (True, True, False, True, False, False),
    "simple_world": (False, True, False, True, False, False),
    "HalfCheetah": (True, False, True, True, False, True),
}
BY_DATA = {
    name: ma_cql.BY_DATA[name] | {"omar_coe": OMAR_COE[name], "batch_norm": BATCH_NORM[name]} for name in OMAR_COE
}
BY_DATA["landmarks6"] = BY_DATA["simple_spread"]
RULES = (
    *ma_cql.RULES,
    (("omar_coe",), "in [0, 1]", lambda x: 0 <= x <= 1),
    (("omar_iterations", "omar_samples"), "at least 1", lambda x: x >= 1),
    (("omar_elites",), "0 or at least 2", lambda x: x == 0 or x >= 2),  # one sample has no standard deviation
    (("omar_sigma",), "finite and above 0", lambda x: 0 < x < math.inf),
)


def resolve(args: Args) -> Args:
    """Fill the options left open from SETTINGS and BY_DATA and check all of them; raises UserError."""
    args = resolve_by(args, SETTINGS, BY_DATA, RULES)
    if args.omar_elites > args.omar_samples:
        raise common.UserError(f"--omar-elites {args.omar_elites}: must be at most --omar-samples {args.omar_samples}")
    return args


def algorithm_name(args: Args) -> str:
    return "omar"


class Batch(NamedTuple):
    """MA-CQL's minibatch and random numbers, and those of the sampler."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    done: Tensor  # [L, B]
    random_actions: Tensor  # [L, B, K, A], uniform in [-1, 1]
    policy_noise: Tensor  # [2, L, B, K, A], standard normal
    sampler_noise: Tensor  # [iterations, L, B, samples, A], standard normal


def zeroth_order(q_fn, noise: Tensor, sigma: float, num_elites: int = 0) -> tuple[Tensor, Tensor]:
    """Maximise Q over actions by sampling from a Gaussian N(mu, sigma^2), refitted in every iteration.

    mu becomes the mean of the samples weighted by softmax(Q), sigma their root mean square distance from it. With
    `num_elites` above 0 instead mean and standard deviation of the best samples, which stay among the next ones: the
    cross-entropy method, as published for HalfCheetah.

    Args:
        q_fn: actions [L, B, K, A] -> Q [L, B, K].
        noise: standard normal, [iterations, L, B, K, A].
        sigma: the first standard deviation, around 0.

    Returns:
        the best action of the last iteration [L, B, A], and its Q [L, B].
    """
    mu, kept = torch.zeros_like(noise[0, :, :, :1]), noise[0, :, :, :0]
    for eps in noise:
        samples = torch.cat([(mu + sigma * eps).clamp(-1, 1), kept], 2)
        q = q_fn(samples)
        if num_elites:
            kept = samples.take_along_dim(q.topk(num_elites).indices[..., None], 2)
            mu, sigma = kept.mean(2, keepdim=True), kept.std(2, keepdim=True)
        else:
            mu = (q.softmax(-1)[..., None] * samples).sum(2, keepdim=True)
            sigma = (samples - mu).square().mean(2, keepdim=True).sqrt()
    best_q, best = q.max(-1)
    return samples.take_along_dim(best[..., None, None], 2)[:, :, 0], best_q


def policy_loss(policy, critic, batch, args):
    """Q and the distance to the best action found, and MA-CQL's penalty: [L], and a dict of metrics [L].

    Where the policy's own action has the higher Q, it is its own target.
    """
    action = policy(batch.obs)
    q = critic.first(batch.obs, action[:, :, None])[..., 0]  # [L, B]
    with torch.no_grad():
        found, found_q = zeroth_order(
            partial(critic.first, batch.obs), batch.sampler_noise, args.omar_sigma, args.omar_elites
        )
        target = torch.where((found_q > q)[..., None], found, action)
    mimic = (action - target).square().mean((1, 2))
    loss = args.omar_coe * mimic - (1 - args.omar_coe) * q.mean(1)
    metrics = {
        "charts/q_policy": q.detach().mean(1),
        "charts/q_sampler": found_q.mean(1),
        "losses/mimic": mimic.detach(),
    }
    return loss + args.action_penalty * action.square().mean((1, 2)), metrics


# the networks, their optimisers and how they act are MA-CQL's
make_learners, make_optimizers, act = ma_cql.make_learners, ma_cql.make_optimizers, ma_cql.act


def sample_batch(data, args: Args, num_learners: int) -> Batch:
    """Minibatches for all learners, and the random numbers of their update."""
    batch = ma_cql.sample_batch(data, args, num_learners)
    L, B, A = batch.action.shape
    noise = torch.randn(args.omar_iterations, L, B, args.omar_samples, A, device=data.rows.device)
    return Batch(*batch, sampler_noise=noise)


def update(learners, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """MA-CQL's update with OMAR's loss of the policies. Returns metrics, each [L]."""
    return ma_cql.update(learners, optimizers, batch, args, policy_loss)


def main() -> None:
    args = common.parse(Args, __doc__)
    family(args).train(args, sys.modules[__name__])


if __name__ == "__main__":
    common.run(main)
