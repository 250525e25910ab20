"""MA-CQL: conservative Q-learning (Kumar et al. 2020) with deterministic policies, for every agent by itself.

This is the variant that OMAR (Pan et al. 2022) builds on and compares with, TD3's twin critics without its delay and
its target noise:

    proposals      actions whose Q is pushed down, and their log-density
    critic_loss    TD error + cql_alpha (log sum_a~ exp(Q(o, a~) - log p(a~)) - Q(o, a))        (CQL's Eq. 4)
    policy_loss    -Q1(o, pi(o)) + 0.001 pi(o)^2

    python baselines/ma_cql.py --scenario simple_spread --dataset expert
    python baselines/ma_cql.py --help

Settings are those published with OMAR; on robots, where they take hours on a CPU, networks, learning rate and updates
are DOM2's and the conservative term has a third of the actions. OMAR's published ones are an option each: `--updates
100000 --widths 256 256 --lr 3e-4 --cql-actions 10 --cql-policy-actions 10`.

OMAR's networks begin with batch normalisation, each call by its own batch. For observations that comes to
standardising them, as is done here. For actions it matters (BatchNormCritic): a shift or a scale common to all actions
of a call leaves Q as it is. Policies gain nothing from running to the border of the action box, where Q is least known,
but nothing teaches them offset and scale either. `--batch-norm False` turns it off, BY_DATA on some of robots' data.
One difference: that code subtracts the density of the noisy policy actions, CQL and this file the log-density.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import common
import dom2_mpe
from baselines import ma_td3bc
from baselines.ma_bc import RunArgs, family, resolve_by
from baselines.ma_td3bc import standardised, step
from dom2_mpe import TwinCritic, soft_update


@dataclass
class Args(RunArgs):
    """Options of MA-CQL."""

    raw_rewards: bool = True
    """keep the rewards as they are, those for which cql_alpha was published"""
    lr: float | None = None
    """Adam's learning rate, of policies and critics"""
    widths: tuple[int, ...] | None = None
    """widths of the hidden layers, of policies and critics"""
    gamma: float | None = None
    """discount factor; the 25-step limit is not a terminal state"""
    rho: float | None = None
    """target networks move by this share of the difference each update"""
    cql_alpha: float | None = None
    """weight of the conservative term"""
    cql_actions: int | None = None
    """uniform actions per transition in the conservative term"""
    cql_policy_actions: int | None = None
    """noisy actions of the policy at o, and as many at o', in the conservative term"""
    cql_noise: float = 0.2
    """standard deviation of their noise"""
    batch_norm: bool | None = None
    """critics see actions standardised over the call's own batch"""
    action_penalty: float = 1e-3
    """weight of the squared action in the policy's loss"""
    max_grad_norm: float = 0.5
    """largest gradient norm per learner and network; 0: no clipping"""
    bf16: bool = field(default_factory=common.has_bf16)
    """the critics' hidden layers compute in bfloat16, by default where the hardware does"""


SETTINGS = {
    "particles": {
        **{"batch_size": 1024, "lr": 0.01, "widths": (64, 64), "gamma": 0.95, "rho": 0.01},
        **{"cql_actions": 10, "cql_policy_actions": 0, "batch_norm": True},
    },
    "robots": {
        **{"batch_size": 256, "lr": 1e-3, "widths": (128, 128), "gamma": 0.99, "rho": 0.005},
        **{"cql_actions": 4, "cql_policy_actions": 3, "batch_norm": True},
    },
}
# In the order of common.DATASETS. As published with OMAR but for robots' updates, which are DOM2's, for
# random-medium and medium-expert, which it has not: they take the settings of medium-replay and of expert; and for
# robots' batch normalisation, published everywhere: left out where that brings more return.
BY_DATA = {
    "simple_spread": {
        "updates": (6_000, 2_000, 2_000, 2_000, 2_000, 2_000),
        "cql_alpha": (0.5, 1.0, 1.0, 5.0, 5.0, 5.0),
    },
    "simple_tag": {"updates": (2_000, 1_000, 1_000, 2_000, 2_000, 2_000), "cql_alpha": (0.5, 0.5, 0.5, 5.0, 5.0, 5.0)},
    "simple_world": {"updates": (1_000,) * 6, "cql_alpha": (0.5, 1.0, 1.0, 0.5, 5.0, 5.0)},
    "HalfCheetah": {
        "updates": (10_000,) * 6,
        "cql_alpha": (1.0, 5.0, 5.0, 1.0, 5.0, 5.0),
        "batch_norm": (True, False, False, True, False, False),
    },
}
BY_DATA["landmarks6"] = BY_DATA["simple_spread"]
RULES = (
    (("cql_noise",), "in (0, 1]", lambda x: 0 < x <= 1),
    (("cql_actions",), "at least 1", lambda x: x >= 1),
    (("cql_policy_actions",), "at least 0", lambda x: x >= 0),
    (("cql_alpha", "action_penalty"), "finite and not negative", lambda x: 0 <= x < math.inf),
)


def resolve(args: Args) -> Args:
    """Fill the options left open from SETTINGS and BY_DATA and check all of them; raises UserError."""
    return resolve_by(args, SETTINGS, BY_DATA, RULES)


def algorithm_name(args: Args) -> str:
    return "ma_cql"


class BatchNormCritic(TwinCritic):
    """Twin critics of actions that are standardised over the minibatch: [L, B, d], [L, B, K, A] -> [L, 2, B, K]."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        variance, mean = torch.var_mean(actions, (1, 2), correction=0, keepdim=True)
        return super().forward(obs, (actions - mean) / (variance + 1e-5).sqrt())


class Batch(NamedTuple):
    """A minibatch per learner, and every random number that its update needs."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    done: Tensor  # [L, B], 1 after a terminal state
    random_actions: Tensor  # [L, B, K, A], uniform in [-1, 1]
    policy_noise: Tensor  # [2, L, B, K, A], standard normal


def proposals(policy, batch: Batch, noise: float):
    """Uniform actions, noisy actions of the policy at o and at o': each [L, B, K, A] with log-densities [L, B, K]."""
    yield batch.random_actions, torch.full_like(batch.random_actions, math.log(0.5)).sum(-1)
    for obs, eps in zip((batch.obs, batch.next_obs), batch.policy_noise, strict=True):
        if eps.numel():
            log_density = -0.5 * eps.square() - math.log(noise * math.sqrt(2 * math.pi))
            yield (policy(obs).detach()[:, :, None] + noise * eps).clamp(-1, 1), log_density.sum(-1)


def critic_loss(critic, target_critic, policy, target_policy, batch: Batch, args):
    """TD error plus cql_alpha times the conservative term, summed over the twins: [L], and a dict of metrics [L]."""
    with torch.no_grad():
        next_action = target_policy(batch.next_obs)
        next_q = target_critic(batch.next_obs, next_action[:, :, None]).amin(1)[..., 0]
        target = (batch.reward + args.gamma * (1 - batch.done) * next_q)[:, None]  # [L, 1, B]
    q = critic(batch.obs, batch.action[:, :, None])[..., 0]  # [L, 2, B]
    sampled = proposals(policy, batch, args.cql_noise)
    q_sampled = torch.cat([critic(batch.obs, action) - density[:, None] for action, density in sampled], -1)
    td = (target - q).square().mean(-1).sum(1)
    conservative = (q_sampled.logsumexp(-1) - q).mean(-1).sum(1)
    metrics = {"losses/td": td, "losses/conservative": conservative, "charts/q_data": q.mean((1, 2))}
    return td + args.cql_alpha * conservative, {name: value.detach() for name, value in metrics.items()}


def policy_loss(policy, critic, batch: Batch, args):
    """-E[Q1(o, pi(o))] + action_penalty E[pi(o)^2]: [L], and a dict of metrics [L]."""
    action = policy(batch.obs)
    q = critic.first(batch.obs, action[:, :, None])[..., 0].mean(1)
    return args.action_penalty * action.square().mean((1, 2)) - q, {"charts/q_policy": q.detach()}


def make_learners(args: Args, num_learners: int, obs_size: int, action_size: int, device):
    critic = BatchNormCritic if args.batch_norm else TwinCritic
    return ma_td3bc.make_learners(args, num_learners, obs_size, action_size, device, critic)


# the optimisers and how the policies act are MA-TD3+BC's
make_optimizers, act = ma_td3bc.make_optimizers, ma_td3bc.act


def sample_batch(data, args: Args, num_learners: int) -> Batch:
    """Minibatches for all learners, and the random numbers of their update."""
    transitions = dom2_mpe.sample_transitions(data, num_learners, args.batch_size)
    (L, B, A), device = transitions[1].shape, data.rows.device
    return Batch(
        *transitions,
        random_actions=torch.rand(L, B, args.cql_actions, A, device=device) * 2 - 1,
        policy_noise=torch.randn(2, L, B, args.cql_policy_actions, A, device=device),
    )


def update(learners, optimizers: dict, batch: Batch, args: Args, policy_loss=policy_loss) -> dict[str, Tensor]:
    """One step of all critics, policies and targets. Returns metrics, each [L]."""
    policy, critic = learners["policy"], learners["critic"]
    batch = standardised(learners["norm"], batch)
    loss, metrics = critic_loss(critic, learners["target_critic"], policy, learners["target_policy"], batch, args)
    step(learners, optimizers, "critic", loss, args.max_grad_norm)
    loss, policy_metrics = policy_loss(policy, critic, batch, args)
    step(learners, optimizers, "policy", loss, args.max_grad_norm)
    for name in ("policy", "critic"):
        soft_update(learners[f"target_{name}"], learners[name], args.rho)
    return {**metrics, **policy_metrics, "losses/policy": loss.detach()}


def main() -> None:
    args = common.parse(Args, __doc__)
    family(args).train(args, sys.modules[__name__])


if __name__ == "__main__":
    common.run(main)
