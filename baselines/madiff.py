"""MADiff-D (Zhu et al. 2024): diffusion over the joint trajectory of all agents, executed decentrally.

    Denoiser           temporal convolutions for every agent, attention across the agents
    trajectory_loss    denoise windows of all agents' observations, given the first one of one agent
    inverse_loss       the action that leads from one observation to the next: inverse dynamics
    plan               generate joint trajectories, guided to high return without a classifier, around what is known
    act                every agent plans for all from its own observation alone, and takes the first step of its plan

    python baselines/madiff.py --scenario simple_spread --dataset expert
    python baselines/madiff.py --help

Training is centralised: through the attention the n agents of a seed learn together, everything else is each agent's
own. What differs from the original, most of it to train in minutes on a CPU:
- Windows of 8 observations for 24 (`--horizon 24`); 3 blocks of convolution and attention, 64 wide, at one resolution
  for a U-Net of 128, 512 and 1,024; 10,000 updates (robots: 100,000) for a million.
- The network predicts the clean trajectory for the noise and is told which observation is known; 3 steps of first-order
  DPM-Solver for 200 of DDPM.
- Return is the mean reward of the window, as its rank in the minibatch, in [0, 1]. The original takes the discounted
  return to the end of the episode over a scale set by hand per data set; the target, 0.9, is the original's.
- Observations are standardised by mean and standard deviation for the empirical distribution of each entry.
- No moving average of the parameters.
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
    Algorithm,
    NoiseSchedule,
    StackedLinear,
    TimeFeatures,
    adam,
    dpm_solver,
    gradient_step,
    parse,
    program,
    train,
)

Fraction = Annotated[float, options.Rule("in [0, 1]", lambda x: 0 <= x <= 1)]


@dataclass
class TrainingArgs(options.TrainingArgs):
    """How to learn. The defaults shown are those of the given --scenario and --dataset (SETTINGS)."""

    batch_size: Annotated[int, options.Rule("at least 2", lambda x: x >= 2)] = 32  # returns are ranked among them
    """windows per seed and update"""
    lr: options.Share = 1e-3
    """Adam's learning rate"""
    horizon: Annotated[int, options.Rule("at least 2", lambda x: x >= 2)] = 8
    """observations in a window and in a plan"""
    return_dropout: Fraction = 0.25
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
    beta_max: options.Weight = 20.0
    """noise schedule: beta at diffusion time 1; at time 0 it is 0.1"""


@dataclass
class EvaluationArgs(options.EvaluationArgs):
    """How to measure."""

    target_return: Fraction = 0.9
    """return that the acting policy asks for, as a rank among the dataset's"""
    guidance: options.Weight = 1.2
    """weight of the return in plans; 0: none, 1: no more than learned"""


@dataclass
class Args(shared.DataArgs, TrainingArgs, NetworkArgs, EvaluationArgs, options.RunArgs):
    """All options of MADiff-D."""


SETTINGS = settings_table(
    particles=dict(updates=10_000, eval_interval=10_000), mujoco=dict(updates=100_000, eval_interval=50_000), rows={}
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
        L, B, H, C = x.shape
        half = self.kernel // 2
        padded = F.pad(x, (0, 0, half, half))
        neighbours = torch.cat([padded[:, :, k : k + H] for k in range(self.kernel)], -1)  # [L, B, H, kernel C]
        h = self.convolution(neighbours.flatten(1, 2)).view(L, B, H, C)
        h = F.silu(h + self.condition(condition)[:, :, None]).flatten(1, 2)
        x = x.flatten(1, 2) + self.out(h)  # [L, B H, C]
        q, k, v = self.query_key_value(x).unflatten(0, (-1, self.num_agents)).chunk(3, -1)  # [S, n, B H, C / 4]
        weight = ((q[:, :, None] * k[:, None]).sum(-1) / q.shape[-1] ** 0.5).softmax(2)  # [S, n, n, B H]
        attended = (weight[..., None] * v[:, None]).sum(2).flatten(0, 1)
        return (x + self.attended(attended)).view(L, B, H, C)


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
        """Predict x_0 from x at diffusion time t, both [L, B, H, d].

        Args:
            known: 1 where x is clean, [L, B, H, 1].
            rank: of the return, [L, B]; without meaning where `guided`, [L, B], is 0.
            t: [L, B] or a float.
        """
        L, B, H, _ = x.shape
        if not isinstance(t, Tensor):
            t = torch.full((1, 1), t, device=x.device)
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
    """Joint trajectories [L, B, H, d] in which the ego agents' begin with `first`.

    Classifier-free guidance, on the clean trajectory: x_0 = x_0(no return) + guidance (x_0(target) - x_0(no return)).

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


def make_learners(args: Args, env) -> nn.ModuleDict:
    """Observation moments, joint denoisers and inverse dynamics, with a leading learner axis."""
    n, L = env.num_agents, args.num_seeds * env.num_agents
    learners = {
        "norm": ObservationNorm(L, env.obs_size),
        "denoiser": Denoiser(L, n, env.obs_size, args.width, args.num_blocks),
        "inverse": Policy(L, 2 * env.obs_size, env.action_size, args.inverse_widths),
    }
    return nn.ModuleDict(learners).to(env.device)


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return adam(learners, denoiser=args.lr, inverse=args.lr)


def sample_batch(data, args: Args) -> Batch:
    """Windows for all seeds, and the random numbers of their update."""
    (n, _, d), device = data.obs.shape, data.obs.device
    S, B, H = args.num_seeds, args.batch_size, args.horizon
    episode = data.episodes[torch.randint(len(data.episodes), (S, B, 1), device=device)]
    length = data.lengths[episode]
    step = (torch.rand(S, B, 1, device=device) * length).long() + torch.arange(H, device=device)
    real = (step < length)[:, None].to(data.obs.dtype)  # [S, 1, B, H]
    row = data.starts[episode] + torch.minimum(step, length - 1)  # [S, B, H]
    columns = (data.obs, data.action, data.reward, data.next_obs)
    obs, action, reward, next_obs = (x[:, row].transpose(0, 1) for x in columns)  # [S, n, B, H, ...]
    mean_reward = (real * reward).sum(-1) / real.sum(-1)  # [S, n, B]
    ego = F.one_hot(torch.randint(n, (S, B), device=device), n).transpose(1, 2)
    guided = (torch.rand(S, 1, B, device=device) >= args.return_dropout).expand(S, n, B)
    return Batch(
        obs=torch.where(real[..., None] > 0, obs, next_obs).flatten(0, 1),
        action=action[:, :, :, 0].flatten(0, 1),
        next_obs=next_obs[:, :, :, 0].flatten(0, 1),
        rank=(mean_reward.argsort(-1).argsort(-1) / (B - 1)).flatten(0, 1),
        guided=guided.flatten(0, 1).to(obs.dtype),
        ego=ego.flatten(0, 1).to(obs.dtype),
        tau=1e-3 + (1 - 1e-3) * torch.rand(S, 1, B, device=device).expand(S, n, B).flatten(0, 1),
        eps=torch.randn(S * n, B, H, d, device=device),
    )


def update(learners: nn.ModuleDict, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of all denoisers and inverse dynamics. Returns metrics, each [L]."""
    norm = learners["norm"]
    norm.track(batch.obs.flatten(1, 2))
    obs = norm(batch.obs.flatten(1, 2)).view(batch.obs.shape)
    batch = batch._replace(obs=obs, next_obs=norm(batch.next_obs))
    losses = {
        "denoiser": trajectory_loss(learners["denoiser"], NoiseSchedule(beta_max=args.beta_max), batch),
        "inverse": inverse_loss(learners["inverse"], batch),
    }
    for name, loss in losses.items():
        gradient_step(learners, optimizers, name, loss, max_norm=0)
    return {"losses/diffusion": losses["denoiser"].detach(), "losses/inverse": losses["inverse"].detach()}


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """obs [L, E, d] -> [L, E, A]: n joint plans for every state of a team, each from one agent's observation alone."""
    (L, E, d), denoiser = obs.shape, learners["denoiser"]
    n = denoiser.num_agents
    own = torch.eye(n, device=obs.device).repeat(L // n, 1)  # [L, n], which of the n plans is the learner's own
    first = learners["norm"](obs)
    noise = torch.randn(L, n * E, args.horizon, d, generator=generator, device=obs.device)
    schedule = NoiseSchedule(beta_max=args.beta_max)
    known = first.repeat(1, n, 1), own.repeat_interleave(E, 1)  # plan by plan, in each the E states
    plans = plan(denoiser, schedule, *known, noise, args.target_return, args.guidance, args.diffusion_steps)
    second = plans[:, :, 1].view(L, n, E, d)[torch.arange(L), torch.arange(L) % n]  # of its own in its own plan
    return learners["inverse"](torch.cat([first, second], -1))


MADIFF = Algorithm("madiff", Args, SETTINGS, make_learners, make_optimizers, sample_batch, update, act)


if __name__ == "__main__":
    program(lambda: train(parse(MADIFF, __doc__), MADIFF))
