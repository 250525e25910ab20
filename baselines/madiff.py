"""MADiff-D (Zhu et al. 2024): diffusion over the joint trajectory of all agents, executed decentrally.

    Denoiser           temporal convolutions per agent, attention across agents             (Sec. 4.1, Figure 1)
    trajectory_loss    denoise windows of observations, given one agent's first             (Eq. 8)
    inverse_loss       the action between two observations                                  (Eq. 8, second term)
    plan               generate, guided towards high return, the rest given what is known   (Eq. 6)
    act                every agent plans for all, knowing its own observation alone, and does what leads to the
                       second observation of its own part of its own plan                   (Sec. 4.2, Algorithm 1)

    python baselines/madiff.py --scenario simple_spread --dataset expert
    python baselines/madiff.py --help

Training is centralised: the learners of one seed's n agents see each other through the attention, every other part is
each agent's own. Differences from the original, most of them to train in minutes on a CPU:
- windows of 8 observations for 24, no history (`--horizon 24`);
- three blocks of convolution and attention at one resolution, 64 wide, for a U-Net of 128, 512 and 1,024;
- the network predicts the clean trajectory and not the noise, and is told which observation is known: few steps then
  suffice, 5 of first-order DPM-Solver for 200 of DDPM;
- return: the mean reward of the window as its rank in the minibatch, in [0, 1]. The original divides the return to the
  end of the episode by a scale set by hand per data set. The target, 0.9, and guidance, 1.2, are the original's;
- observations are standardised by mean and standard deviation, not by their empirical distribution;
- no moving average of the parameters.
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
from baselines.ma_bc import ObservationNorm, Policy
from dom2_mpe import NoiseSchedule, StackedLinear, TimeFeatures, dpm_solver, time_grid


class Block(nn.Module):
    """Temporal convolution, then attention across the agents of a seed, both residual: [L, B, H, C] -> the same."""

    def __init__(self, num_learners: int, num_agents: int, width: int, kernel: int = 5):
        super().__init__()
        L, C = num_learners, width
        self.num_agents, self.kernel = num_agents, kernel
        self.convolution = StackedLinear(L, kernel * C, C)
        self.condition = StackedLinear(L, C, C)
        self.out = StackedLinear(L, C, C)
        self.query_key_value = StackedLinear(L, C, 3 * C)
        self.attended = StackedLinear(L, C, C)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        L, B, H, C = x.shape
        half = self.kernel // 2
        neighbours = F.pad(x, (0, 0, half, half)).unfold(2, self.kernel, 1)  # [L, B, H, C, kernel]
        h = self.convolution(neighbours.reshape(L, B * H, -1)).view(L, B, H, C)
        h = F.silu(h + self.condition(condition)[:, :, None]).flatten(1, 2)
        x = x.flatten(1, 2) + self.out(h)  # [L, B H, C]
        q, k, v = self.query_key_value(x).unflatten(0, (-1, self.num_agents)).transpose(1, 2).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v)  # [S, B H, n, C]
        return (x + self.attended(attended.transpose(1, 2).flatten(0, 1))).view(L, B, H, C)


class Denoiser(nn.Module):
    """Clean joint trajectories from noisy ones. L learners: n agents of S seeds, seed-major."""

    def __init__(self, num_learners: int, num_agents: int, obs_size: int, width: int, num_blocks: int):
        super().__init__()
        L = num_learners
        self.num_agents = num_agents
        self.time = TimeFeatures(L)
        self.time_in = StackedLinear(L, 32, width)
        self.return_in = StackedLinear(L, 2, width)
        self.x_in = StackedLinear(L, obs_size + 1, width)
        self.blocks = nn.ModuleList(Block(L, num_agents, width) for _ in range(num_blocks))
        self.x_out = StackedLinear(L, width, obs_size)

    def forward(self, x: Tensor, known: Tensor, rank: Tensor, guided: Tensor, t) -> Tensor:
        """x [L, B, H, d], known [L, B, H, 1], rank and guided [L, B] (0: the return does not count), t [L, B] or float."""
        L, B, H, _ = x.shape
        returns = self.return_in(torch.stack([rank * guided, guided], -1))
        condition = F.silu(self.time_in(self.time(t)) + returns)  # [L, B, C]
        h = self.x_in(torch.cat([x, known], -1).flatten(1, 2)).view(L, B, H, -1)
        for block in self.blocks:
            h = block(h, condition)
        return self.x_out(F.silu(h).flatten(1, 2)).view(x.shape)


class Batch(NamedTuple):
    """Windows of H observations, the same ones for all agents of a seed, and all random numbers of an update."""

    obs: Tensor  # [L, B, H, d]; beyond the end of an episode its last observation again
    action: Tensor  # [L, B, A], the first of the window
    next_obs: Tensor  # [L, B, d], what followed on it
    rank: Tensor  # [L, B], rank of the window's mean reward in the minibatch, in [0, 1]
    guided: Tensor  # [L, B], 0 where the return is withheld
    ego: Tensor  # [L, B], 1 for the agent whose first observation is given
    tau: Tensor  # [L, B], diffusion times
    eps: Tensor  # [L, B, H, d]


def first_step(ego: Tensor, horizon: int) -> Tensor:
    """Mask of what is known, [L, B, H, 1]: the first observation of the ego agent."""
    known = torch.zeros(*ego.shape, horizon, 1, dtype=ego.dtype, device=ego.device)
    known[:, :, 0, 0] = ego
    return known


def trajectory_loss(denoiser, schedule, batch: Batch) -> Tensor:
    """E[(x_0(x_tau) - x_0)^2] over what is not known, [L]."""
    tau = batch.tau[..., None, None]
    known = first_step(batch.ego, batch.obs.shape[2])
    noisy = schedule.alpha(tau) * batch.obs + schedule.sigma(tau) * batch.eps
    x = torch.lerp(noisy, batch.obs, known)
    error = denoiser(x, known, batch.rank, batch.guided, batch.tau) - batch.obs
    return ((1 - known) * error.square()).mean((1, 2, 3))


def inverse_loss(inverse, batch: Batch) -> Tensor:
    """E[(f(o, o') - a)^2], [L]."""
    pair = torch.cat([batch.obs[:, :, 0], batch.next_obs], -1)
    return (inverse(pair) - batch.action).square().mean((1, 2))


def plan(denoiser, schedule, first: Tensor, ego: Tensor, noise: Tensor, target: float, guidance: float, num_steps: int):
    """Joint trajectories [L, B, H, d] that begin, for the ego agents, with `first`.

    Eq. 6, classifier-free guidance, on the clean trajectory: x_0 = x_0(no return) + guidance (x_0(target) - x_0(no return)).

    Args:
        first: observations, [L, B, d], read where `ego` [L, B] is 1.
        noise: x_1 ~ N(0, I), [L, B, H, d].
        target: rank of the return that is asked for.
    """
    known = first_step(ego, noise.shape[2])
    given, rank, one = first[:, :, None].expand_as(noise), torch.full_like(ego, target), torch.ones_like(ego)

    def noise_fn(x, t):
        filled = torch.lerp(x, given, known)
        without = denoiser(filled, known, rank, 0 * one, t)
        x0 = without + guidance * (denoiser(filled, known, rank, one, t) - without)
        x0 = torch.lerp(x0, given, known)
        return (x - schedule.alpha(t) * x0) / schedule.sigma(t)

    return torch.lerp(dpm_solver(noise_fn, noise, schedule, num_steps), given, known)
