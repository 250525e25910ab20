"""MA-TD3+BC: TD3+BC (Fujimoto and Gu 2021) for every agent by itself.

    critic_loss    TD3's target: min of the twin target critics at the target policy's action plus clipped noise
    policy_loss    -lambda Q1(o, pi(o)) + (pi(o) - a)^2,  lambda = alpha / E|Q1(o, pi(o))|      (Eqs. 3 and 5)

    python baselines/ma_td3bc.py --scenario simple_spread --dataset expert
    python baselines/ma_td3bc.py --help

One update is `policy_delay` steps of the critics and then one of the policy and the targets, TD3's delayed policy
update; TD3+BC's own count of updates is that of the critics. Observations are standardised, as in the paper.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import common
import dom2_mpe
from baselines import ma_bc
from baselines.ma_bc import ObservationNorm, Policy, RunArgs, adam, bc_loss, family, resolve_by
from dom2_mpe import TwinCritic, clip_gradients, soft_update


@dataclass
class Args(RunArgs):
    """Options of MA-TD3+BC."""

    raw_rewards: bool = True
    """keep the rewards as they are; lambda divides by the scale of Q, so that alpha means the same for any of them"""
    alpha: float = 2.5
    """weight of Q against cloning"""
    lr: float | None = None
    """Adam's learning rate, of policies and critics"""
    widths: tuple[int, ...] | None = None
    """widths of the hidden layers, of policies and critics"""
    gamma: float | None = None
    """discount factor; the 25-step limit is not a terminal state"""
    rho: float | None = None
    """target networks move by this share of the difference each update"""
    policy_delay: int = 2
    """critic steps in an update, before the one step of the policy"""
    target_noise: float = 0.2
    """standard deviation of the noise on the target policy's action"""
    target_noise_clip: float = 0.5
    """largest absolute value of that noise"""
    max_grad_norm: float = 0.5
    """largest gradient norm per learner and network; 0: no clipping"""
    bf16: bool = field(default_factory=common.has_bf16)
    """the critics' hidden layers compute in bfloat16, by default where the hardware does"""


# alpha, noise, delay: TD3+BC's. Networks, rates and batches: OMAR's, whose authors ran it with them; its updates
# are OMAR's too, here divided by the delay.
SETTINGS = {
    "particles": {"batch_size": 1024, "lr": 0.01, "widths": (64, 64), "gamma": 0.95, "rho": 0.01},
    "robots": {"batch_size": 256, "lr": 1e-3, "widths": (128, 128), "gamma": 0.99, "rho": 0.005},
}
BY_DATA = {  # in the order of common.DATASETS
    "simple_spread": {"updates": (3_000, 1_000, 1_000, 1_000, 1_000, 1_000)},
    "simple_tag": {"updates": (1_000, 1_000, 500, 1_000, 1_000, 1_000)},
    "simple_world": {"updates": (500,) * 6},
    "HalfCheetah": {"updates": (5_000,) * 6},
}
BY_DATA["landmarks6"] = BY_DATA["simple_spread"]
RULES = (
    (("policy_delay",), "at least 1", lambda x: x >= 1),
    (("alpha", "target_noise", "target_noise_clip"), "finite and not negative", lambda x: 0 <= x < math.inf),
)


def resolve(args: Args) -> Args:
    """Fill the options left open from SETTINGS and BY_DATA and check all of them; raises UserError."""
    return resolve_by(args, SETTINGS, BY_DATA, RULES)


def algorithm_name(args: Args) -> str:
    return "ma_td3bc"


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
        next_action = (target_policy(batch.next_obs) + shift).clamp(-1, 1)
        next_q = target_critic(batch.next_obs, next_action[:, :, None]).amin(1)[..., 0]
        target = batch.reward + gamma * (1 - batch.done) * next_q  # [L, B]
    q = critic(batch.obs, batch.action[:, :, None])[..., 0]  # [L, 2, B]
    return (target[:, None] - q).square().mean(-1).sum(1)


def policy_loss(policy, critic, batch: Batch, alpha: float):
    """-alpha E[Q1(o, pi(o))] / E|Q1(o, pi(o))| + E[(pi(o) - a)^2], [L]; the denominator is a constant.

    Returns:
        loss [L], and a dict of metrics [L].
    """
    q = critic.first(batch.obs, policy(batch.obs)[:, :, None])[..., 0]  # [L, B]
    bc = bc_loss(policy, batch)
    metrics = {"losses/bc": bc.detach(), "charts/q_policy": q.detach().mean(1)}
    return -alpha * q.mean(1) / q.detach().abs().mean(1) + bc, metrics


def make_learners(args: Args, num_learners: int, obs_size: int, action_size: int, device, critic=TwinCritic):
    """Policies, critics of the class `critic`, and their target copies: an nn.ModuleDict."""
    sizes = num_learners, obs_size, action_size, args.widths
    learners = nn.ModuleDict({"norm": ObservationNorm(num_learners, obs_size)})
    critic = partial(critic, precision=torch.bfloat16 if args.bf16 else None)
    for name, network in (("policy", Policy), ("critic", critic)):
        learners[name], learners[f"target_{name}"] = network(*sizes), network(*sizes)
        learners[f"target_{name}"].load_state_dict(learners[name].state_dict())
        learners[f"target_{name}"].requires_grad_(False)
    return learners.to(device)


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return adam(learners, policy=args.lr, critic=args.lr)


def sample_batch(data, args: Args, num_learners: int) -> tuple[Batch, ...]:
    """One minibatch for each of the critics' steps."""

    def batch():
        transitions = dom2_mpe.sample_transitions(data, num_learners, args.batch_size)
        return Batch(*transitions, target_noise=torch.randn_like(transitions[1]))

    return tuple(batch() for _ in range(args.policy_delay))


def step(learners: nn.ModuleDict, optimizers: dict, name: str, loss: Tensor, max_grad_norm: float) -> None:
    """One Adam step on network `name`, down the losses [L] of all learners, each with its own gradient."""
    optimizers[name].zero_grad()
    loss.sum().backward(inputs=list(learners[name].parameters()))
    if max_grad_norm > 0:
        clip_gradients(learners[name], len(loss), max_grad_norm)
    optimizers[name].step()


def standardised(norm: ObservationNorm, batch):
    """A minibatch with standardised observations, which the moments have taken in."""
    norm.track(batch.obs)
    return batch._replace(obs=norm(batch.obs), next_obs=norm(batch.next_obs))


def update(learners: nn.ModuleDict, optimizers: dict, batches: tuple[Batch, ...], args: Args) -> dict[str, Tensor]:
    """`policy_delay` steps of the critics, one of policies and targets. Returns metrics, each [L]."""
    policy, critic = learners["policy"], learners["critic"]
    noise = args.gamma, args.target_noise, args.target_noise_clip
    for raw in batches:
        batch = standardised(learners["norm"], raw)
        td = critic_loss(critic, learners["target_critic"], learners["target_policy"], batch, *noise)
        step(learners, optimizers, "critic", td, args.max_grad_norm)
    loss, metrics = policy_loss(policy, critic, batch, args.alpha)
    step(learners, optimizers, "policy", loss, args.max_grad_norm)
    for name in ("policy", "critic"):
        soft_update(learners[f"target_{name}"], learners[name], args.rho)
    return {"losses/td": td.detach(), "losses/policy": loss.detach(), **metrics}


act = ma_bc.act


def main() -> None:
    args = common.parse(Args, __doc__)
    family(args).train(args, sys.modules[__name__])


if __name__ == "__main__":
    common.run(main)
