"""MA-SfBC: SfBC (Chen et al. 2023) for every agent by itself: a diffusion policy clones the data, Q chooses.

    behaviour     the noise network of Figure 8 predicts the noise at any time in (1e-5, 1): dom2_mpe.diffusion_loss
    value         V(o) = sum_k softmax_k(alpha Q(o, a_k)) Q(o, a_k), K behaviour actions a_k         (Eq. 13)
    planning      R_t = r_t + gamma max(R_{t+1}, V(o_{t+1})), backwards along a trajectory             (Eq. 12)
    critic_loss   (Q(o_t, a_t) - R_t)^2                                                                (Eq. 14)
    act           of 32 behaviour actions one is drawn with probability softmax(alpha Q)               (Eq. 9)

    python baselines/ma_sfbc.py --scenario simple_spread --dataset medium
    python baselines/ma_sfbc.py --help

What differs from the original:
- It trains the behaviour to the end, then samples 16 actions for every state of the data once, and recomputes all R
  with the present Q a few times. That suits a GPU and small data; here one program trains both: each minibatch is some
  whole trajectories (windows of `window` steps), R is computed for them anew in every update with a slowly moving copy of Q,
  and the actions are fresh samples of the behaviour so far.
- The end of an episode is a time limit: R continues with V there, where the original stops with 0.
- It standardises the returns after every recomputation; here rewards are standardised and scaled, such that returns
  have a spread of about 1 and `alpha` its meaning.
- First-order DPM-Solver with `diffusion_steps` steps for third order with 15; smaller networks and batches by default.
  `--widths 512 256 128 --diffusion-steps 15 --plan-candidates 16` undoes most of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import common
from baselines.ma_bc import MLP
from dom2_mpe import DiffusionPolicy, NoiseSchedule, ResidualNoiseNet, diffusion_loss, soft_update


class Critic(MLP):
    """Q of every learner: obs [L, B, d], actions [L, B, K, A] -> [L, B, K]."""

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths):
        super().__init__(num_learners, [obs_size + action_size, *widths, 1], F.silu)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([obs[:, :, None].expand(-1, -1, actions.shape[2], -1), actions], -1)
        return super().forward(x.flatten(1, 2)).view(actions.shape[:3])


class Batch(NamedTuple):
    """Windows of trajectories, M windows of H steps in a row: B = M H. And all random numbers of an update."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    real: Tensor  # [L, B], 0 for what a window has beyond the end of its trajectory
    tau: Tensor  # [L, B], diffusion times
    eps: Tensor  # [L, B, A], noise of the diffusion loss
    plan_noise: Tensor  # [L, B, K, A], starts the behaviour's chains


def candidates(policy, obs: Tensor, noise: Tensor) -> Tensor:
    """K behaviour actions for each observation: obs [L, B, d], noise [L, B, K, A] -> [L, B, K, A]."""
    K = noise.shape[2]
    return policy(obs.repeat_interleave(K, 1), noise.flatten(1, 2)).view(noise.shape)


def value(q: Tensor, alpha: float) -> Tensor:
    """Eq. 13, the softmax-weighted mean of Q over the candidates: [..., K] -> [...]."""
    return ((alpha * q).softmax(-1) * q).sum(-1)


def planning(reward: Tensor, next_value: Tensor, real: Tensor, gamma: float) -> Tensor:
    """Eq. 12 backwards along windows, all [..., H]; where a window or a trajectory ends, R_{t+1} is V(o_{t+1})."""
    planned, later = [], torch.full_like(reward[..., 0], -torch.inf)
    for t in reversed(range(reward.shape[-1])):
        now = reward[..., t] + gamma * torch.maximum(later, next_value[..., t])
        planned.append(now)
        later = torch.where(real[..., t] > 0, now, -torch.inf)
    return torch.stack(planned[::-1], -1)


def critic_loss(critic, target_critic, policy, batch: Batch, window: int, gamma: float, alpha: float):
    """Eq. 14: squared error to the planned returns, [L], and a dict of metrics [L]."""
    with torch.no_grad():
        actions = candidates(policy, batch.next_obs, batch.plan_noise)
        next_value = value(target_critic(batch.next_obs, actions), alpha)  # [L, B]
        parts = [x.unflatten(1, (-1, window)) for x in (batch.reward, next_value, batch.real)]
        target = planning(*parts, gamma).flatten(1)
    q = critic(batch.obs, batch.action[:, :, None])[..., 0]
    loss = (batch.real * (q - target).square()).sum(1) / batch.real.sum(1)
    return loss, {"losses/td": loss.detach(), "charts/q_data": q.detach().mean(1), "charts/value": next_value.mean(1)}


def choose(q: Tensor, actions: Tensor, alpha: float, generator=None) -> Tensor:
    """Draw one of K actions with probability softmax(alpha Q): q [..., K], actions [..., K, A] -> [..., A]."""
    probability = (alpha * q).softmax(-1).flatten(0, -2)
    index = torch.multinomial(probability, 1, generator=generator).view(*q.shape[:-1], 1, 1)
    return actions.take_along_dim(index, -2).squeeze(-2)
