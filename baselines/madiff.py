"""MADiff-D (Zhu et al. 2024): diffusion over the joint trajectory of all agents, executed decentrally.

    Denoiser           temporal convolutions for every agent, attention across the agents
    trajectory_loss    denoise windows of all agents' observations, given the first one of one agent
    inverse_loss       the action that leads from one observation to the next: inverse dynamics
    plan               generate joint trajectories, guided to high return without a classifier, around what is known
    act                every agent plans for all from its own observation alone, and takes the first step of its plan

    python baselines/madiff.py --scenario simple_spread --dataset expert
    python baselines/madiff.py --help

Training is centralised: through the attention the agents of a seed learn together. What differs from the original:
- Windows of 8 observations instead of 24 (HalfCheetah: 18 past ones and 10 ahead), 32 per update instead of 64. The
  inverse dynamics learn from the first two observations of a window, not from all pairs.
- 3 blocks of convolution and attention, 64 wide, for every agent its own, instead of a U-Net of 128, 512 and 1,024,
  which on HalfCheetah all agents share. A block sees 2 steps to either side: `--horizon 24` wants `--num-blocks 12`.
- 10,000 updates (HalfCheetah: 20,000) instead of a million (500,000).
- The network predicts the clean trajectory, not the noise. It is told which observations are known. Nothing clips it.
- 3 DPM-Solver steps instead of 200 of DDPM; a learning rate of 1e-3 instead of 2e-4; the inverse dynamics end in tanh.
- Return is the mean reward of the window, as its rank in the minibatch, in [0, 1]. The original takes the discounted
  return to the end of the episode over a scale set by hand per dataset; the target, 0.9, is the original's.
- Observations are standardised by mean and standard deviation, not by the empirical distribution of each entry.
- Every episode is drawn with the same probability. The original draws windows, so long episodes more often.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from baselines import shared
from baselines.shared import ObservationNorm, Policy, options, settings_table
from dom2_mpe import (
    NoiseSchedule,
    StackedLinear,
    TimeFeatures,
    action_mask,
    adam,
    dpm_solver,
    gradient_step,
    soft_update,
    train,
    with_targets,
)
from run import Algorithm, parse
from utils.data import draw
from utils.program import program


@dataclass
class TrainingArgs(options.TrainingArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    batch_size: Annotated[int, options.Rule("at least 2", lambda x: x >= 2)] = 32  # returns are ranked among them
    """windows per seed and update"""
    lr: options.Share = 1e-3
    """Adam's learning rate"""
    rho: options.Share = 0.005
    """the acting networks are a moving average: they move by this share of the difference each update"""
    horizon: Annotated[int, options.Rule("at least 2", lambda x: x >= 2)] = 8
    """observations in a window and in a plan"""
    return_dropout: options.Fraction = 0.25
    """share of the windows that are learned without their return"""


@dataclass
class NetworkArgs(options.Options):
    """The denoiser and the inverse dynamics."""

    width: Annotated[int, options.Rule("at least 4", lambda x: x >= 4)] = 64
    """width of the denoiser"""
    num_blocks: options.Count = 3
    """blocks of convolution and attention"""
    inverse_widths: options.Widths = (256, 256)
    """widths of the inverse dynamics' hidden layers"""
    diffusion_steps: options.Count = 3
    """denoising steps"""
    beta_max: options.NoiseScale = 20.0
    """noise schedule: beta at diffusion time 1; at time 0 it is 0.1"""


@dataclass
class EvaluationArgs(options.EvaluationArgs):
    """How to measure."""

    target_return: options.Fraction = 0.9
    """return that the acting policy asks for: the rank of a window's mean reward in a minibatch, in [0, 1]"""
    guidance: options.Weight = 1.2
    """weight of the return in plans; 0: none, 1: no more than learned"""
    temperature: options.Weight = 0.5
    """standard deviation of the noise from which plans start"""


@dataclass
class Args(shared.DataArgs, TrainingArgs, NetworkArgs, EvaluationArgs, options.RunArgs):
    """All options of MADiff-D."""


SETTINGS = settings_table(
    particles=dict(updates=10_000, eval_interval=10_000), mujoco=dict(updates=20_000, eval_interval=20_000), rows={}
)


class Block(nn.Module):
    """Temporal convolution, then attention across the agents of a seed, both residual: [L, B, H, C] -> the same."""

    def __init__(self, num_learners: int, num_agents: int, width: int, kernel: int = 5):
        super().__init__()
        L, C = num_learners, width
        self.num_agents, self.kernel = num_agents, kernel
        self.convolution = StackedLinear(L, kernel * C, C)
        self.condition = StackedLinear(L, C, C)
        self.out = StackedLinear(L, C, C)
        self.query_key_value = StackedLinear(L, C, 3 * (C // 4))
        self.attended = StackedLinear(L, C // 4, C)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, self.kernel // 2, self.kernel // 2))
        neighbours = torch.cat([padded[:, :, k : k + x.shape[2]] for k in range(self.kernel)], -1)
        h = self.convolution(neighbours.flatten(1, 2)).view(x.shape) + self.condition(condition)[:, :, None]
        y = x.flatten(1, 2) + self.out(F.silu(h).flatten(1, 2))  # [L, B H, C]
        q, k, v = self.query_key_value(y).unflatten(0, (-1, self.num_agents)).chunk(3, -1)  # [S, n, B H, C / 4]
        weight = ((q[:, :, None] * k[:, None]).sum(-1) / q.shape[-1] ** 0.5).softmax(2)  # [S, n, n, B H]
        attended = (weight[..., None] * v[:, None]).sum(2).flatten(0, 1)
        return (y + self.attended(attended)).view(x.shape)


class Denoiser(nn.Module):
    """Clean joint trajectories from noisy ones. L learners: n agents of S seeds, seed-major."""

    def __init__(self, num_learners: int, num_agents: int, obs_size: int, width: int, num_blocks: int):
        super().__init__()
        L, self.num_agents = num_learners, num_agents
        self.time = TimeFeatures(L)
        self.time_in = StackedLinear(L, 32, width)
        self.return_in = StackedLinear(L, 2, width)
        self.x_in = StackedLinear(L, obs_size + 1, width)
        self.blocks = nn.ModuleList(Block(L, num_agents, width) for _ in range(num_blocks))
        self.x_out = StackedLinear(L, width, obs_size)

    def forward(self, x: Tensor, known: Tensor, rank: Tensor, guided: Tensor, t) -> Tensor:
        """x_0 from x [L, B, H, d] at time t (a float or [L, B]). Others as in Batch; `rank` counts where `guided`."""
        returns = self.return_in(torch.stack([rank * guided, guided], -1))
        condition = F.silu(self.time_in(self.time(t)) + returns)  # [L, B, C]
        h = self.x_in(torch.cat([x, known], -1).flatten(1, 2)).unflatten(1, x.shape[1:3])  # [L, B, H, C]
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
    known: Tensor  # [L, B, H, 1], 1 where the observation is given: the first one of one agent
    tau: Tensor  # [L, B], diffusion times
    eps: Tensor  # [L, B, H, d]


def trajectory_loss(denoiser, schedule, batch: Batch) -> Tensor:
    """E[(x_0(x_tau) - x_0)^2] over what is not known, [L]."""
    tau, known = batch.tau[..., None, None], batch.known
    noisy = schedule.alpha(tau) * batch.obs + schedule.sigma(tau) * batch.eps
    x = torch.lerp(noisy, batch.obs, known)
    error = denoiser(x, known, batch.rank, batch.guided, batch.tau) - batch.obs
    return ((1 - known) * error.square()).mean((1, 2, 3))


def inverse_loss(inverse, batch: Batch) -> Tensor:
    """E[(f(o, o') - a)^2], [L]."""
    action = inverse(torch.cat([batch.obs[:, :, 0], batch.next_obs], -1))
    return inverse.own_mean((action - batch.action).square())


def plan(denoiser, first: Tensor, known: Tensor, noise: Tensor, args: Args) -> Tensor:
    """Joint trajectories from `noise` [L, B, H, d]; where `known` [L, B, H, 1] is 1 they are `first` [L, B, d].

    Classifier-free guidance, on the clean trajectory: x_0 = x_0(no return) + guidance (x_0(target) - x_0(no return)).
    """
    schedule, given = NoiseSchedule(beta_max=args.beta_max), first[:, :, None].expand_as(noise)
    one = torch.ones_like(noise[:, :, 0, 0])

    def noise_fn(x, t):
        filled = torch.lerp(x, given, known)
        without, asked = (denoiser(filled, known, args.target_return * one, guided, t) for guided in (0 * one, one))
        x0 = torch.lerp(without + args.guidance * (asked - without), given, known)
        return (x - schedule.alpha(t) * x0) / schedule.sigma(t)

    return torch.lerp(dpm_solver(noise_fn, noise, schedule, args.diffusion_steps), given, known)


def make_learners(args: Args, env) -> nn.ModuleDict:
    """Observation moments, joint denoisers, inverse dynamics, and moving averages of the latter two."""
    L, d = args.num_seeds * env.num_agents, env.obs_size
    denoiser = Denoiser(L, env.num_agents, d, args.width, args.num_blocks)
    inverse = Policy(L, 2 * d, env.action_size, args.inverse_widths, action_mask(args, env))
    learners = with_targets(denoiser=denoiser, inverse=inverse)
    learners["norm"] = ObservationNorm(L, d)
    return learners.to(env.device)


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return adam(learners, denoiser=args.lr, inverse=args.lr)


def sample_batch(data, args: Args) -> Batch:
    """Windows for all seeds, and the random numbers of their update."""
    (n, _, d), device = data.obs.shape, data.obs.device
    S, B, H = args.num_seeds, args.batch_size, args.horizon
    episode = draw(data.episodes, S, B, 1)
    length = data.lengths[episode]
    step = (torch.rand(S, B, 1, device=device) * length).long() + torch.arange(H, device=device)
    row = data.starts[episode] + torch.minimum(step, length - 1)  # [S, B, H]
    obs, action, reward, next_obs = (x[:, row].transpose(0, 1).flatten(0, 1) for x in data[:4])  # [L, B, H, ...]
    real = (step < length).to(obs.dtype).repeat_interleave(n, 0)  # [L, B, H]
    mean_reward = (real * reward).sum(-1) / real.sum(-1)  # [L, B]
    ego = F.one_hot(torch.randint(n, (S, B), device=device), n).mT.flatten(0, 1).to(obs.dtype)  # [L, B]
    return Batch(
        obs=torch.where(real[..., None] > 0, obs, next_obs),
        action=action[:, :, 0],
        next_obs=next_obs[:, :, 0],
        rank=mean_reward.argsort(-1).argsort(-1) / (B - 1),
        known=F.pad(ego[..., None, None], (0, 0, 0, H - 1)),
        guided=(torch.rand(S, B, device=device) >= args.return_dropout).to(obs.dtype).repeat_interleave(n, 0),
        tau=1e-3 + (1 - 1e-3) * torch.rand(S, B, device=device).repeat_interleave(n, 0),
        eps=torch.randn(S * n, B, H, d, device=device),
    )


def update(learners: nn.ModuleDict, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of all denoisers and inverse dynamics. Returns metrics, each [L]."""
    batch = learners["norm"].standardise(batch._replace(obs=batch.obs.flatten(1, 2)))
    batch = batch._replace(obs=batch.obs.unflatten(1, (-1, args.horizon)))
    denoising = trajectory_loss(learners["denoiser"], NoiseSchedule(beta_max=args.beta_max), batch)
    gradient_step(learners, optimizers, "denoiser", denoising, max_norm=0)
    inverse = inverse_loss(learners["inverse"], batch)
    gradient_step(learners, optimizers, "inverse", inverse, max_norm=0)
    for name in ("denoiser", "inverse"):
        soft_update(learners[f"target_{name}"], learners[name], args.rho)
    return {"losses/diffusion": denoising.detach(), "losses/inverse": inverse.detach()}


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Actions of n joint plans for every state, each from one agent's observation alone: obs [L, E, d] -> [L, E, A]."""
    (L, E, d), n = obs.shape, learners["denoiser"].num_agents
    first = learners["norm"](obs)
    own = torch.eye(n, device=obs.device).repeat(L // n, 1).repeat_interleave(E, 1)  # [L, n E]: 1 in its own E plans
    known = F.pad(own[..., None, None], (0, 0, 0, args.horizon - 1))
    noise = torch.randn(L, n * E, args.horizon, d, generator=generator, device=obs.device)
    plans = plan(learners["target_denoiser"], first.repeat(1, n, 1), known, args.temperature * noise, args)
    second = plans[:, :, 1][own > 0].view(L, E, d)
    return learners["target_inverse"](torch.cat([first, second], -1))


MADIFF = Algorithm("madiff", Args, SETTINGS, make_learners, make_optimizers, sample_batch, update, act)


if __name__ == "__main__":
    program(lambda: train(parse(MADIFF, __doc__), MADIFF))
