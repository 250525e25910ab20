"""DOM2 (Diffusion Offline Multi-agent Model) on the particle environments, in one file.

Every agent has its own diffusion policy and its own twin critics and learns from its own column of a fixed data set:
training and execution are decentralised. The paper (arXiv 2307.01472) in the order of this file:

    NoiseSchedule, dpm_solver (ddpm)         Sec. 4.1, Eq. 4     an action is Gaussian noise, denoised in a few steps
    ResidualNoiseNet, MLPNoiseNet            Figure 8, Sec. 5.4  the noise network and its ablation
    critic_loss                              Eq. 1               TD error + conservative (CQL) term
    diffusion_loss, q_loss                   Eq. 3, Eq. 5        stay near the data + prefer high Q
    augment                                  Algorithm 1         replicate high-return trajectories
    train                                    Algorithm 2

    python dom2_mpe.py --scenario simple_tag --dataset random            # trains, then prints the table
    python dom2_mpe.py --scenario simple_tag --dataset random --eta 0    # the diffusion policy alone: cloning
    python dom2_mpe.py --help

All learners train at once: a learner is one agent of one random seed, and every parameter, batch and loss has a
leading learner axis. A linear layer of L learners is one batched matrix product, Algorithm 2's loop over agents
disappears, and no learner's gradient touches another's. In shapes: L learners (seed-major: seed 0's agents first), S
seeds, n agents, B minibatch, A = 2 action entries, d observation entries, K actions per observation, N denoising steps.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import UserError
from particle_env import EPISODE_STEPS, SCENARIOS, ParticleEnv


@dataclass
class RunArgs:
    """Options of a run, whatever the algorithm."""

    scenario: str = "simple_tag"
    """simple_spread (cooperative navigation), simple_tag (predator-prey), simple_world or landmarks6 (Figure 1)"""
    dataset: str = "random"
    """random, random-medium, medium-replay, medium, medium-expert or expert"""
    data_dir: str = "datasets"
    """folder of the data sets; one that is missing there is made first"""
    data_fraction: float = 1.0
    """share of the data set's trajectories to learn from, in (0, 1]"""
    thresholds: tuple[float, ...] | None = None
    """returns r_th above which a trajectory is replicated (Algorithm 1); default: --quantiles of the data's returns"""
    quantiles: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95, 0.99)
    """quantiles of the data set's returns used as thresholds"""
    augment: bool = True
    """replicate high-return trajectories (Algorithm 1), or learn from the data set as it is"""
    prey: str | None = None
    """frozen prey of simple_tag and simple_world; default: pretrained/; for data from elsewhere give theirs"""
    seed: int = 0
    """seed of the first of the runs, and of everything random"""
    num_seeds: int = 1
    """independent runs S, trained side by side in one program"""
    updates: int | None = None
    """gradient updates T of Algorithm 2; None here and below: from SETTINGS"""
    batch_size: int | None = None
    """transitions per learner and update"""
    raw_rewards: bool = False
    """keep the rewards as they are instead of standardising them over the data set (mean 0, standard deviation 1)"""
    reward_scale: float = 1.0
    """factor on the (standardised) rewards"""

    eval_interval: int = 1000
    """updates between evaluations in the standard environment"""
    eval_episodes: int = 1000
    """episodes per seed of every evaluation"""
    shift: str | None = None
    """shifted environment of the final evaluation: speed, dismiss (landmarks6) or none; None: the scenario's own"""
    cuda: bool = True
    """use a GPU when there is one"""
    compile: bool = False
    """compile the update: a CUDA graph on a GPU; on a CPU torch.compile, which takes minutes to start"""
    run_dir: str = "runs"
    """folder in which this run's folder is made"""
    resume: str | None = None
    """run folder to continue with its options from its checkpoint; --updates may be raised"""
    eval_only: str | None = None
    """run folder whose checkpoint to evaluate without training"""
    capture_video: bool = False
    """write a GIF of the trained policy to the run folder"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""


@dataclass
class Args(RunArgs):
    """Options of DOM2."""

    actor_lr: float = 3e-3
    """Adam's learning rate of the diffusion policies"""
    critic_lr: float = 1e-2
    """Adam's learning rate of the critics"""
    gamma: float | None = None
    """discount factor; the 25-step limit is not a terminal state"""
    rho: float = 0.01
    """target networks move by this share of the difference each update (Algorithm 2, line 8)"""
    eta: float | None = None
    """weight of the Q-loss in Eq. 5; 0 is behaviour cloning with a diffusion policy"""
    q_normaliser: str = "abs"
    """normaliser of the Q-loss: "abs", E[abs(Q)], or "printed", Eq. 5's own E[Q], whose sign may be wrong"""
    bc_weight: float = 1.0
    """weight of the diffusion loss in Eq. 5"""
    zeta: float | None = None
    """weight of the conservative term in Eq. 1; 0 turns it off"""
    max_grad_norm: float = 0.5
    """largest gradient norm per learner and network; 0: no clipping"""

    diffusion_steps: int = 5
    """denoising steps N"""
    beta_min: float = 0.1
    """noise schedule: beta at diffusion time 0"""
    beta_max: float = 10.0
    """noise schedule: beta at diffusion time 1"""
    solver: str = "dpm"
    """dpm: the deterministic first-order DPM-Solver of Eq. 4; ddpm: ancestral sampling, fresh noise in every step"""
    prediction: str = "action"
    """what the noise network predicts: the clean "action" through tanh, rewritten as a noise, or the "noise" itself"""
    noise_net: str = "mlp"
    """residual (the U-net-like one of Figure 8) or mlp (the ablation)"""
    widths: tuple[int, ...] = (128, 128, 128)
    """widths of the noise network's layers; of its downward half for residual"""
    critic_widths: tuple[int, ...] | None = None
    """widths of the critics' hidden layers"""
    eval_candidates: int = 1
    """actions sampled per decision in evaluation; above 1, the one with the highest Q acts"""
    bf16: bool = field(default_factory=common.has_bf16)
    """hidden layers compute in bfloat16, by default where the hardware does, faster there; the rest stays float32"""


# What differs per scenario and data set, found by experiment (results/README.md). An option on the command line wins.
SETTING_NAMES = ("updates", "batch_size", "critic_widths", "gamma", "eta", "zeta")
SETTINGS = {
    ("simple_spread", "random"): (5_000, 1024, (128, 128), 0.95, 60.0, 0.0),
    ("simple_spread", "random-medium"): (3_000, 256, (128, 128), 0.95, 5.0, 0.0),
    ("simple_spread", "medium-replay"): (2_000, 1024, (128, 128), 0.95, 5.0, 0.1),
    ("simple_spread", "medium"): (2_000, 1024, (64, 64), 0.95, 5.0, 0.1),
    ("simple_spread", "medium-expert"): (2_000, 1024, (64, 64), 0.95, 5.0, 0.1),
    ("simple_spread", "expert"): (2_000, 1024, (64, 64), 0.95, 5.0, 0.1),
    ("simple_tag", "random"): (4_000, 256, (128, 128), 0.9, 40.0, 0.0),
    ("simple_tag", "random-medium"): (3_000, 256, (64, 64), 0.95, 5.0, 0.0),
    ("simple_tag", "medium-replay"): (2_000, 1024, (64, 64), 0.95, 5.0, 0.0),
    ("simple_tag", "medium"): (8_000, 256, (64, 64), 0.8, 1.0, 0.0),
    ("simple_tag", "medium-expert"): (4_000, 256, (64, 64), 0.95, 1.0, 0.0),
    ("simple_tag", "expert"): (8_000, 256, (64, 64), 0.8, 1.0, 0.0),
    ("simple_world", "random"): (3_000, 256, (128, 128), 0.95, 10.0, 0.0),
    ("simple_world", "random-medium"): (3_000, 256, (64, 64), 0.95, 5.0, 0.0),
    ("simple_world", "medium-replay"): (2_000, 1024, (64, 64), 0.95, 5.0, 0.0),
    ("simple_world", "medium"): (4_000, 1024, (64, 64), 0.8, 1.0, 0.0),
    ("simple_world", "medium-expert"): (2_000, 1024, (64, 64), 0.95, 1.0, 0.0),
    ("simple_world", "expert"): (2_000, 1024, (64, 64), 0.95, 1.0, 0.0),
    ("landmarks6", "random"): (5_000, 256, (64, 64), 0.95, 5.0, 0.0),
    ("landmarks6", "random-medium"): (5_000, 256, (64, 64), 0.95, 5.0, 0.0),
    ("landmarks6", "medium-replay"): (5_000, 256, (64, 64), 0.95, 5.0, 0.0),
    ("landmarks6", "medium"): (4_000, 256, (64, 64), 0.95, 1.0, 0.0),
    ("landmarks6", "medium-expert"): (4_000, 256, (64, 64), 0.95, 1.0, 0.0),
    ("landmarks6", "expert"): (4_000, 256, (64, 64), 0.95, 1.0, 0.0),
}


def resolve_run(args: RunArgs) -> RunArgs:
    """Check scenario, data set and shift, and fill the shift where it was left open.

    Raises:
        UserError: there is no such scenario, data set or shift.
    """
    common.check_choice("--scenario", args.scenario, SCENARIOS)
    common.check_choice("--dataset", args.dataset, common.DATASETS)
    shifts = SCENARIOS[args.scenario].shifts
    args = common.fill(args, ("shift",), (shifts[0],))
    common.check_choice("--shift", args.shift, (*shifts, "none"))
    return args


def resolve(args: Args) -> Args:
    """Fill the options left open from SETTINGS and check all of them.

    Raises:
        UserError: an option has no meaning.
    """
    args = resolve_run(args)
    common.check_choice("--noise-net", args.noise_net, NOISE_NETS)
    common.check_choice("--prediction", args.prediction, ("action", "noise"))
    common.check_choice("--solver", args.solver, SOLVERS)
    common.check_choice("--q-normaliser", args.q_normaliser, ("abs", "printed"))
    args = common.fill(args, SETTING_NAMES, SETTINGS[args.scenario, args.dataset])
    common.check_options(args)
    if args.beta_min >= args.beta_max:
        raise UserError(f"--beta-max {args.beta_max}: must be above --beta-min {args.beta_min}")
    if args.eta == 0 and args.bc_weight == 0:
        raise UserError("--eta 0 --bc-weight 0: nothing is left to learn from; give one of them a positive weight")
    if args.eval_candidates > 1 and args.eta == 0:
        raise UserError("--eval-candidates chooses by Q, but --eta 0 trains no critic; give --eta a positive weight")
    return args


def algorithm_name(args: Args) -> str:
    return "dom2" if args.eta > 0 else "bc"


# --------------------------------------------------------------------------------------------------------------------
# Diffusion (Sec. 4.1)


class NoiseSchedule:
    """The forward process a_tau = alpha(tau) a_0 + sigma(tau) eps, eps ~ N(0, I): the linear variance-preserving SDE.

    Diffusion time tau runs from 0 (a clean action) to 1 (nearly pure noise). With beta(tau) = beta_min + tau (beta_max
    - beta_min), log alpha(tau) = -1/2 int_0^tau beta = -(beta_max - beta_min) / 4 tau^2 - beta_min / 2 tau, and
    sigma^2 = 1 - alpha^2. A larger beta_max leaves less of the action at tau = 1 (alpha(1) = 0.0066 at 20, 0.08 at 10).
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 10.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha(self, t):
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def alpha(self, t):
        """alpha(t) of a float or a tensor of diffusion times."""
        return torch.exp(self.log_alpha(t)) if isinstance(t, Tensor) else math.exp(self.log_alpha(t))

    def sigma(self, t):
        """sigma(t) of a float or a tensor of diffusion times."""
        if isinstance(t, Tensor):
            return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))
        return math.sqrt(-math.expm1(2 * self.log_alpha(t)))


def time_grid(num_steps: int) -> list[float]:
    """Diffusion times tau_N = 1 > ... > tau_0 = 1e-3, uniform: N + 1 floats, in denoising order."""
    return [1e-3 + (1 - 1e-3) * i / num_steps for i in range(num_steps, -1, -1)]


def dpm_solver(noise_fn, noise: Tensor, schedule: NoiseSchedule, num_steps: int, clip: bool = False) -> Tensor:
    """First-order DPM-Solver from tau = 1 to 1e-3: the corrected Eq. 4, (3.7) in Lu et al. (2022).

    a_{i-1} = alpha_{i-1} / alpha_i a_i - sigma_{i-1} (alpha_{i-1} sigma_i / (alpha_i sigma_{i-1}) - 1) eps(a_i, tau_i)

    The paper prints the second term with its indices swapped, which diverges. Differentiable through all steps.

    Args:
        noise_fn: eps(a, tau) of noisy actions [..., A] and one diffusion time (a float) -> [..., A].
        noise: a_N ~ N(0, I), [..., A].
        clip: clip the clean action that every step predicts to [-1, 1].
    """
    grid = time_grid(num_steps)
    a = noise
    for s, t in pairwise(grid):  # from tau_i = s to tau_{i-1} = t
        alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
        eps = noise_fn(a, s)
        if clip:
            a0 = ((a - sigma_s * eps) / alpha_s).clamp(-1, 1)
            eps = (a - alpha_s * a0) / sigma_s
        a = alpha_t / alpha_s * a - sigma_t * (alpha_t * sigma_s / (alpha_s * sigma_t) - 1) * eps
    return a


def ddpm(noise_fn, noise: Tensor, schedule: NoiseSchedule, num_steps: int, clip: bool = False) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) on the same grid: `dpm_solver`'s stochastic alternative, Diffusion-QL's.

    a_{i-1} ~ q(a_{i-1} | a_i, a_0), with the clean action a_0 = (a_i - sigma_i eps(a_i, tau_i)) / alpha_i. With a_i |
    a_{i-1} ~ N(alpha a_{i-1}, v), alpha = alpha_i / alpha_{i-1} and v = sigma_i^2 - alpha^2 sigma_{i-1}^2, this is

        N(alpha sigma_{i-1}^2 / sigma_i^2 a_i + alpha_{i-1} v / sigma_i^2 a_0,  v sigma_{i-1}^2 / sigma_i^2)

    and the last step takes its mean.

    Args:
        noise: N(0, I), [..., N * A]: the chain's start and the noise of its steps but the last.
    """
    a, *fresh = noise.chunk(num_steps, -1)
    fresh.append(torch.zeros_like(a))
    for (s, t), eps_s in zip(pairwise(time_grid(num_steps)), fresh, strict=True):
        alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
        a0 = (a - sigma_s * noise_fn(a, s)) / alpha_s
        if clip:
            a0 = a0.clamp(-1, 1)
        alpha, v = alpha_s / alpha_t, sigma_s**2 - (alpha_s / alpha_t * sigma_t) ** 2
        mean = alpha * sigma_t**2 / sigma_s**2 * a + alpha_t * v / sigma_s**2 * a0
        a = mean + math.sqrt(v) * sigma_t / sigma_s * eps_s
    return a


# --------------------------------------------------------------------------------------------------------------------
# Networks. Every module holds L independent networks, one per learner. `precision` is the hidden layers' (None:
# the inputs'); inputs, outputs and parameters keep theirs. `widths` is a tuple of ints.


class StackedLinear(nn.Module):
    """L independent linear layers as one batched matrix product, [L, B, in] -> [L, B, out]; nn.Linear's own start.

    It computes in the precision of its input; the parameters stay as they are.
    """

    def __init__(self, num_learners: int, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_learners, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_learners, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2] == 1:  # as a matrix product, one column is slow; the sum has the parameters' precision
            return (x * self.weight.mT.to(x.dtype)).sum(-1, keepdim=True, dtype=self.bias.dtype) + self.bias
        return self.cast(x.dtype)(x)

    def cast(self, precision):
        """The layer as a function of inputs of that precision, for those who call it often."""
        weight, bias = self.weight.to(precision), self.bias.to(precision)
        return lambda x: torch.baddbmm(bias, x, weight)


class TimeFeatures(nn.Module):
    """Random Fourier features of diffusion time (scale 30), 32 numbers: [L or 1, B] -> [L, B, 32]."""

    def __init__(self, num_learners: int):
        super().__init__()
        self.register_buffer("frequency", torch.randn(num_learners, 1, 16) * 30)

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * self.frequency * t[..., None].to(self.frequency.dtype)
        return torch.cat([angle.sin(), angle.cos()], -1)


class MLPNoiseNet(nn.Module):
    """The ablation's noise network: an MLP of the noisy action, the observation and the time features."""

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths, precision=None):
        super().__init__()
        self.precision = precision
        self.time = TimeFeatures(num_learners)
        self.obs_in = StackedLinear(num_learners, obs_size, widths[0])
        self.time_in = StackedLinear(num_learners, 32, widths[0])
        self.action_in = StackedLinear(num_learners, action_size, widths[0])
        sizes = [*widths, action_size]
        self.layers = nn.ModuleList(StackedLinear(num_learners, i, o) for i, o in pairwise(sizes))

    def bind(self, obs: Tensor, times: Tensor):
        """The network for these observations, and embeddings of the times: all that a denoising chain can share.

        Args:
            obs: [L, B, d]. times: [L, B], or [1, N] for the N times of a chain.

        Returns:
            f(a [L, B, A], embedding [L, B or 1, H]) -> [L, B, A], and the embeddings [L, B or N, H]
        """
        obs_part, last = self.obs_in(obs) + self.action_in.bias, self.layers[-1].cast(obs.dtype)
        hidden = [layer.cast(self.precision or obs.dtype) for layer in self.layers[:-1]]

        def f(a: Tensor, time_part: Tensor) -> Tensor:
            x = torch.baddbmm(obs_part + time_part, a, self.action_in.weight).to(dtype=self.precision)
            for layer in hidden:
                x = layer(F.silu(x))
            return last(F.silu(x).to(a.dtype))

        return f, self.time_in(self.time(times))


class ResidualBlock(nn.Module):
    """Two layers with the condition added between them, and a skip connection: [L, B, in] -> [L, B, out]."""

    def __init__(self, num_learners: int, in_size: int, out_size: int, condition_size: int):
        super().__init__()
        self.dense1 = StackedLinear(num_learners, in_size, out_size)
        self.dense2 = StackedLinear(num_learners, out_size, out_size)
        self.condition = StackedLinear(num_learners, condition_size, out_size)
        self.skip = StackedLinear(num_learners, in_size, out_size) if in_size != out_size else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.silu(self.dense1(x)).to(condition.dtype) + self.condition(condition)
        return F.silu(self.dense2(h)) + self.skip(x).to(condition.dtype)


class ResidualNoiseNet(nn.Module):
    """Figure 8's noise network, "resembling U-Net" after SfBC (Chen et al. 2022): residual blocks that narrow to a
    middle block and widen again, each upward block also fed with its downward counterpart's output. A condition made of
    the observation's and the time's embeddings enters every block. `widths` are those of the downward half.
    """

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths, precision=None):
        super().__init__()
        L, c = num_learners, 128
        self.precision = precision
        self.time = TimeFeatures(L)
        self.obs_in = StackedLinear(L, obs_size, 32)
        self.obs_condition = StackedLinear(L, 32, c)
        self.time_condition = StackedLinear(L, 32, c)
        self.condition = StackedLinear(L, c, c)
        sizes = [action_size, *widths]
        self.down = nn.ModuleList(ResidualBlock(L, i, o, c) for i, o in pairwise(sizes))
        self.middle = ResidualBlock(L, widths[-1], widths[-1], c)
        up = list(reversed(widths))  # an upward block takes the block before it and the skip of equal width
        self.up = nn.ModuleList(ResidualBlock(L, 2 * i, o, c) for i, o in pairwise(up))
        self.out = StackedLinear(L, 2 * widths[0], action_size)

    def bind(self, obs: Tensor, times: Tensor):
        """As of MLPNoiseNet."""
        obs_part = self.obs_condition(F.silu(self.obs_in(obs)))

        def f(a: Tensor, time_part: Tensor) -> Tensor:
            condition = F.silu((obs_part + time_part).to(dtype=self.precision))
            condition = F.silu(self.condition(condition))
            skips, x = [], a
            for block in self.down:
                x = block(x, condition)
                skips.append(x)
            x = self.middle(x, condition)
            for block in self.up:
                x = block(torch.cat([x, skips.pop()], -1), condition)
            return self.out(torch.cat([x, skips.pop()], -1).to(a.dtype))

        return f, self.time_condition(self.time(times))


SOLVERS = {"dpm": dpm_solver, "ddpm": ddpm}
NOISE_NETS = {"residual": ResidualNoiseNet, "mlp": MLPNoiseNet}


class DiffusionPolicy(nn.Module):
    """pi_theta_j(a | o) of every learner: a noise network and the solver that turns noise into an action.

    With prediction="noise" the network's output is eps_theta. With prediction="action" it is a clean action a0 =
    tanh(f), and eps_theta = (a - alpha a0) / sigma is the noise that this means: the same family of noise functions and
    the same solver, but every predicted action lies in the action box, and at its border gradients do not vanish.
    """

    def __init__(
        self, net: nn.Module, schedule: NoiseSchedule, num_steps: int, prediction: str = "action", solver=dpm_solver
    ):
        super().__init__()
        self.net, self.schedule, self.num_steps = net, schedule, num_steps
        self.prediction, self.solver = prediction, solver
        grid = torch.tensor([time_grid(num_steps)[:-1]], dtype=torch.float64)
        self.register_buffer("grid", grid, persistent=False)  # [1, N]

    def noise(self, f: Tensor, a: Tensor, t: float) -> Tensor:
        """eps_theta(a, o, tau) from the network's output f [L, B, A] at a [L, B, A] and tau."""
        if self.prediction == "noise":
            return f
        return (a - self.schedule.alpha(t) * torch.tanh(f)) / self.schedule.sigma(t)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Denoise: observations [L, B, d] and Gaussian noise [L, B, A] -> actions [L, B, A] in [-1, 1].

        ddpm needs noise for every step: [L, B, N * A].
        """
        f, embeddings = self.net.bind(obs, self.grid)
        at = dict(zip(time_grid(self.num_steps)[:-1], embeddings.split(1, 1), strict=True))

        def noise_fn(a: Tensor, t: float) -> Tensor:
            return self.noise(f(a, at[t]), a, t)

        a = self.solver(noise_fn, noise, self.schedule, self.num_steps, clip=self.prediction == "noise")
        return a.clamp(-1, 1)


class TwinCritic(nn.Module):
    """Q_phi^1 and Q_phi^2 of every learner: obs [L, B, d], actions [L, B, K, A] -> [L, 2, B, K].

    Parameters have leading axis 2 L, learner-major.
    """

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths, precision=None):
        super().__init__()
        self.precision = precision
        sizes = [obs_size + action_size, *widths, 1]
        self.layers = nn.ModuleList(StackedLinear(2 * num_learners, i, o) for i, o in pairwise(sizes))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        L, B, K, _ = actions.shape
        C = len(self.layers[0].weight) // L  # 2, or 1 in `first`
        x = torch.cat([obs[:, :, None].expand(-1, -1, K, -1), actions], -1).to(dtype=self.precision)
        x = x.flatten(1, 2).repeat_interleave(C, 0)  # [C L, B * K, d + A]
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).view(L, C, B, K)

    def first(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Q_phi^1 alone: [L, B, d], [L, B, K, A] -> [L, B, K]."""
        parameters = {name: parameter[::2] for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, parameters, (obs, actions))[:, 0]


# --------------------------------------------------------------------------------------------------------------------
# Losses, one number per learner: [L]. Their sum has each learner's own gradient.


class Batch(NamedTuple):
    """A minibatch per learner, and every random number that its update needs."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    done: Tensor  # [L, B], 1 after a terminal state
    target_noise: Tensor  # [L, B, A], starts the target policy's chain ([L, B, N * A] for ddpm)
    random_actions: Tensor  # [L, B, 10, A], uniform in [-1, 1]
    tau: Tensor  # [L, B], diffusion times of Eq. 3
    eps: Tensor  # [L, B, A], noise of Eq. 3
    policy_noise: Tensor  # [L, B, A], starts the policy's chain


def critic_loss(critic, target_critic, target_policy, batch: Batch, gamma: float, zeta: float):
    """Eq. 1, summed over the twin critics: TD error plus zeta times the conservative term.

    (r + gamma (1 - done) min_k Qbar_k(o', pibar(o')) - Q(o, a))^2
        + zeta (log sum_{10 uniform a~} exp Q(o, a~) - Q(o, a))

    Returns:
        loss [L], and a dict of metrics [L].
    """
    with torch.no_grad():
        next_action = target_policy(batch.next_obs, batch.target_noise)
        next_q = target_critic(batch.next_obs, next_action[:, :, None]).amin(1)[..., 0]  # [L, B]
        target = (batch.reward + gamma * (1 - batch.done) * next_q)[:, None]  # [L, 1, B]
    actions = batch.action[:, :, None]
    if zeta > 0:
        actions = torch.cat([actions, batch.random_actions], 2)  # [L, B, 11, A]
    q = critic(batch.obs, actions)  # [L, 2, B, 1 or 11]
    td = (target - q[..., 0]).square().mean(-1).sum(1)
    metrics = {"losses/td": td.detach(), "charts/q_data": q[..., 0].detach().mean((1, 2))}
    if zeta == 0:
        return td, metrics
    conservative = (q[..., 1:].logsumexp(-1) - q[..., 0]).mean(-1).sum(1)
    metrics["losses/conservative"] = conservative.detach()
    metrics["charts/q_random"] = q[..., 1:].detach().mean((1, 2, 3))
    return td + zeta * conservative, metrics


def diffusion_loss(policy: DiffusionPolicy, batch: Batch) -> Tensor:
    """Eq. 3, [L]: squared error of the predicted noise, tau uniform over the solver's grid.

    With prediction="action" the squared error of the clean action instead: Eq. 3 with each tau weighted by
    (sigma / alpha)^2, since eps - eps_theta = alpha / sigma (a0_theta - a0).
    """
    tau = batch.tau[..., None]
    noisy = policy.schedule.alpha(tau) * batch.action + policy.schedule.sigma(tau) * batch.eps
    net, embedding = policy.net.bind(batch.obs, batch.tau)
    f = net(noisy, embedding)
    error = f - batch.eps if policy.prediction == "noise" else torch.tanh(f) - batch.action
    return error.square().sum(-1).mean(-1)


def q_loss(policy: DiffusionPolicy, critic: TwinCritic, batch: Batch, eta: float, normaliser: str = "abs"):
    """The Q-loss of Eq. 5: -eta E[Q(o, pi(o))] / E[abs(Q(o, a))], through all denoising steps.

    The paper prints the normaliser without abs ("printed"): a negative mean Q flips the objective's sign. It is a
    constant for the gradient. Q is the first of the twins, as in TD3.

    Returns:
        loss [L], and a dict of metrics [L].
    """
    action = policy(batch.obs, batch.policy_noise)
    q = critic.first(batch.obs, torch.stack([batch.action, action], 2))  # [L, B, 2]
    q_data = q[..., 0].detach()
    scale = (q_data.abs() if normaliser == "abs" else q_data).mean(-1)
    loss = -eta * q[..., 1].mean(-1) / scale
    saturated = (action.detach().abs() > 0.99).float().mean((1, 2))
    return loss, {"charts/q_policy": q[..., 1].detach().mean(-1), "charts/saturation": saturated}


# --------------------------------------------------------------------------------------------------------------------
# Data augmentation (Sec. 4.3)


def augment(returns: Tensor, thresholds) -> Tensor:
    """Algorithm 1: indices of the trajectories, each once and once more for every threshold that its return reaches.

    Sampling these indices uniformly samples trajectory i with weight 1 + #{r_th <= returns[i]}; no data are copied.

    Args:
        returns: [episodes]. thresholds: K floats.

    Returns:
        int64 indices [episodes + replicas].
    """
    everything = torch.arange(len(returns))
    return torch.cat([everything, *(everything[returns >= r] for r in thresholds)])


# --------------------------------------------------------------------------------------------------------------------
# Training (Algorithm 2)


def make_learners(args: Args, num_learners: int, obs_size: int, action_size: int, device) -> nn.ModuleDict:
    """Policies, critics and their target copies, all with a leading learner axis (Algorithm 2, line 1)."""
    precision = torch.bfloat16 if args.bf16 else None

    def policy():
        net = NOISE_NETS[args.noise_net](num_learners, obs_size, action_size, args.widths, precision)
        schedule = NoiseSchedule(args.beta_min, args.beta_max)
        return DiffusionPolicy(net, schedule, args.diffusion_steps, args.prediction, SOLVERS[args.solver])

    def critic():
        return TwinCritic(num_learners, obs_size, action_size, args.critic_widths, precision)

    learners = nn.ModuleDict(
        {"policy": policy(), "critic": critic(), "target_policy": policy(), "target_critic": critic()}
    )
    for name in ("policy", "critic"):
        learners[f"target_{name}"].load_state_dict(learners[name].state_dict())
        learners[f"target_{name}"].requires_grad_(False)
    return learners.to(device)


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    """Adam is elementwise: on stacked parameters it is one Adam per learner."""
    options = {"fused": True, "capturable": next(learners.parameters()).is_cuda}  # as CUDA graphs need it
    lr = {"policy": args.actor_lr, "critic": args.critic_lr}
    return {name: torch.optim.Adam(learners[name].parameters(), lr[name], **options) for name in lr}


def clip_gradients(module: nn.Module, num_learners: int, max_norm: float) -> None:
    """Scale each learner's gradient of a stacked module to a norm of at most `max_norm`."""
    grads = [p.grad.view(num_learners, -1) for p in module.parameters()]
    norm = sum(g.square().sum(1) for g in grads).sqrt()  # [L]
    scale = (max_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale[:, None])


def soft_update(target: nn.Module, source: nn.Module, rho: float) -> None:
    """Algorithm 2, line 8: target <- rho source + (1 - rho) target."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rho)


def standardise_rewards(rows: Tensor, obs_size: int) -> None:
    """In place: rewards of all agents to mean 0 and standard deviation 1.

    Without terminal states a constant added to every reward adds the same to every Q-value: no policy gains by it, but
    the critics need not learn a large offset, and E[abs(Q)], Eq. 5's normaliser, measures how much states differ.
    """
    reward = rows[:, :, -obs_size - 2]
    mean, std = reward.double().mean(), reward.double().std()
    reward.sub_(mean.float()).div_(std.clamp(min=1e-8).float())


class Data(NamedTuple):
    """The data set as training sees it, on the device: n agents, T transitions, trajectory after trajectory."""

    rows: Tensor  # [n, T, W] as in common.Dataset, rewards standardised
    starts: Tensor  # [trajectories], row in which each begins
    lengths: Tensor  # [trajectories], its number of rows
    episodes: Tensor  # `augment`'s indices of (replicated) trajectories
    index: Tensor  # the rows of all those trajectories: sampled uniformly, this is Algorithm 1's data set
    obs_size: int
    stats: dict  # mean, std and max of the returns, number of transitions


def sample_transitions(data: Data, num_learners: int, batch_size: int) -> tuple[Tensor, ...]:
    """Algorithm 2, line 5: an independent minibatch for each learner, from its own agent's column.

    Returns:
        obs [L, B, d], action [L, B, A], reward [L, B], next_obs [L, B, d], done [L, B]
    """
    n, T, W = data.rows.shape
    L, B, d, device = num_learners, batch_size, data.obs_size, data.rows.device
    row = data.index[torch.randint(len(data.index), (L, B), device=device)]
    row = row + torch.arange(L, device=device)[:, None] % n * T
    batch = data.rows.view(n * T, W).index_select(0, row.flatten()).view(L, B, W)
    obs, action, reward, next_obs, done = batch.split([d, W - 2 * d - 2, 1, d, 1], -1)
    return obs, action, reward[..., 0], next_obs, done[..., 0]


def sample_batch(data: Data, args: Args, num_learners: int) -> Batch:
    """Minibatches for all learners, and the random numbers of their update."""
    transitions = sample_transitions(data, num_learners, args.batch_size)
    L, B, A = transitions[1].shape
    N, device = args.diffusion_steps, data.rows.device
    chain = N * A if args.solver == "ddpm" else A
    return Batch(
        *transitions,
        target_noise=torch.randn(L, B, chain, device=device),
        random_actions=torch.rand(L, B, 10, A, device=device) * 2 - 1,
        tau=1e-3 + (1 - 1e-3) * torch.randint(N + 1, (L, B), device=device) / N,  # of `time_grid`
        eps=torch.randn(L, B, A, device=device),
        policy_noise=torch.randn(L, B, chain, device=device),
    )


def update(learners: nn.ModuleDict, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """Algorithm 2, lines 6-8, for all learners at once. Returns metrics, each [L]."""
    L = len(batch.obs)
    metrics = {}
    if args.eta > 0:
        loss, metrics = critic_loss(
            learners["critic"], learners["target_critic"], learners["target_policy"], batch, args.gamma, args.zeta
        )
        optimizers["critic"].zero_grad()
        loss.sum().backward()
        if args.max_grad_norm > 0:
            clip_gradients(learners["critic"], L, args.max_grad_norm)
        optimizers["critic"].step()

    bc = diffusion_loss(learners["policy"], batch)
    metrics["losses/diffusion"] = bc.detach()
    loss = args.bc_weight * bc
    if args.eta > 0:
        learners["critic"].requires_grad_(False)  # Eq. 5 is minimised over theta alone
        q, q_metrics = q_loss(learners["policy"], learners["critic"], batch, args.eta, args.q_normaliser)
        learners["critic"].requires_grad_(True)
        loss = loss + q
        metrics |= q_metrics | {"losses/q": q.detach()}
    optimizers["policy"].zero_grad()
    loss.sum().backward()
    if args.max_grad_norm > 0:
        clip_gradients(learners["policy"], L, args.max_grad_norm)
    optimizers["policy"].step()

    soft_update(learners["target_policy"], learners["policy"], args.rho)
    if args.eta > 0:
        soft_update(learners["target_critic"], learners["critic"], args.rho)
    return metrics


def cuda_graph(step):
    """`step()` as one CUDA graph: three ordinary calls, then it is recorded once and replayed at every further call.

    A small update is some thousand kernels of a few microseconds, and starting them one by one takes longer than they
    run. `step` must work on the same tensors every time and copy nothing from or to the host.
    """
    stream, graph, calls, output = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0, None

    def replay():
        nonlocal calls, output
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = step()
            torch.cuda.current_stream().wait_stream(stream)
            return output
        if calls == 4:
            with torch.cuda.graph(graph):
                output = step()
        graph.replay()
        return output

    return replay


def compiled(step):
    """`step()` through torch.compile, with the random numbers that it draws without."""
    return torch.compile(step, options={"fallback_random": True})


# --------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Sample actions: obs [L, E, d] -> [L, E, A]; the best by Q of `eval_candidates` where that is above 1."""
    L, E, d = obs.shape
    K, A = args.eval_candidates, learners["critic"].layers[0].weight.shape[1] - d
    chain = args.diffusion_steps * A if args.solver == "ddpm" else A
    noise = torch.randn(L, E * K, chain, generator=generator, device=obs.device)
    actions = learners["policy"](obs.repeat_interleave(K, 1), noise).view(L, E, K, A)
    if K == 1:
        return actions[:, :, 0]
    best = learners["critic"](obs, actions).amin(1).argmax(-1)  # [L, E]
    return actions.take_along_dim(best[..., None, None], 2)[:, :, 0]


@torch.no_grad()
def rollout(act, args: RunArgs, env: ParticleEnv, prey: dict | None, on_step=None, start=None) -> Tensor:
    """Play one episode in every world of `env`, worlds shared out over the S seeds' teams: team returns [S, E].

    `act` maps observations [L, E, d] and a torch.Generator to actions [L, E, A]. `start`, if given, is the first state,
    as `ParticleEnv.set_state` takes it.
    """
    S, n = args.num_seeds, env.spec.num_controlled
    E = env.num_envs // S
    generator = torch.Generator(env.device).manual_seed(args.seed + 20_000)
    obs = env.reset() if start is None else env.set_state(*start)
    returns = torch.zeros(env.num_envs, device=env.device)
    for _ in range(EPISODE_STEPS):
        if on_step is not None:
            on_step()
        x = torch.stack(obs[:n], 1).view(S, E, n, -1).transpose(1, 2).flatten(0, 1)  # [L, E, d], seed-major
        actions = act(x, generator).view(S, n, E, -1).transpose(1, 2).flatten(0, 1)  # [S * E, n, A]
        if prey is not None:
            actions = torch.cat([actions, common.policy_action(prey, obs[n])[:, None]], 1)
        obs, rewards = env.step(actions)
        returns += env.score(rewards)
    return returns.view(S, E)


def evaluate(act, args: RunArgs, shift: str, prey: dict | None, device) -> Tensor:
    """Mean return of each seed's team over `eval_episodes` episodes, [S], on the CPU.

    The first states depend on `args.seed` and the shift alone, so every algorithm meets the same ones.
    """
    env = ParticleEnv(args.scenario, args.num_seeds * args.eval_episodes, shift, device, seed=args.seed + 10_000)
    return rollout(act, args, env, prey).mean(1).cpu()


def assignments(act, args: RunArgs, shift: str, device, starts: int = 20, episodes: int = 100) -> dict:
    """How many ways the team finds from the same first state (Figures 1 and 2): at the end, which landmark is whose?

    Returns:
        distinct: different assignments of the agents to their nearest landmarks in `episodes` episodes, mean over
        `starts` first states; entropy: of their frequencies, in bits; both one number per seed. Of the first seed's
        first start: landmarks [m, 2], and the paths of ten episodes [10, 26, n, 2].
    """
    env = ParticleEnv(args.scenario, starts, shift, device, seed=args.seed + 30_000)
    env.reset()
    start = [x.repeat_interleave(episodes, 0).repeat(args.num_seeds, 1, 1) for x in (env.agent_pos, env.landmark_pos)]
    env = ParticleEnv(args.scenario, len(start[0]), device=device)
    paths = []
    rollout(
        act,
        args,
        env,
        None,
        on_step=lambda: paths.append(env.agent_pos[:10].cpu()),
        start=(start[0], torch.zeros_like(start[0]), start[1]),
    )
    paths.append(env.agent_pos[:10].cpu())
    nearest = torch.cdist(env.agent_pos, env.landmark_pos).argmin(-1)  # [S * starts * episodes, n]
    code = (nearest * env.num_landmarks ** torch.arange(nearest.shape[1], device=device)).sum(-1)
    counts = F.one_hot(code, env.num_landmarks ** nearest.shape[1]).view(args.num_seeds, starts, episodes, -1).sum(2)
    entropy = torch.special.entr(counts / episodes).sum(-1) / math.log(2)  # [S, starts]
    return {
        "distinct": (counts > 0).sum(-1).float().mean(1).tolist(),
        "entropy": entropy.mean(1).tolist(),
        "landmarks": env.landmark_pos[0].tolist(),
        "paths": torch.stack(paths, 1).double().round(decimals=3).tolist(),
    }


def action_std(act, data: Data, num_learners: int) -> float:
    """Spread of the actions that one observation gets, averaged over 256 observations; 0: a deterministic policy."""
    rows, L = data.rows, num_learners
    obs = rows[torch.arange(L) % len(rows), :: max(1, rows.shape[1] // 256), : data.obs_size][:, :256]
    generator = torch.Generator(rows.device).manual_seed(0)
    return torch.stack([act(obs, generator) for _ in range(16)]).std(0).mean().item()


def milliseconds_per_action(act, num_learners: int, obs_size: int, device) -> float:
    """Time in which every learner decides on one observation, the median of 30 calls."""
    obs, generator, times = torch.zeros(num_learners, 1, obs_size, device=device), torch.Generator(device), []
    for _ in range(30):
        start = time.perf_counter()
        act(obs, generator).cpu()  # waits for the result
        times.append(time.perf_counter() - start)
    return round(1e3 * sorted(times)[15], 3)


# --------------------------------------------------------------------------------------------------------------------
# Runs


def save_checkpoint(path: Path, args: RunArgs, updates: int, learners, optimizers, prey, data_stats) -> None:
    """Everything that continuing bit for bit needs; the checkpoint before is kept as checkpoint-previous.pt."""
    checkpoint = {
        "args": asdict(args),
        "updates": updates,
        "learners": learners.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "prey": prey,
        "data": data_stats,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    common.save_torch(path / "checkpoint.pt", checkpoint, previous=path / "checkpoint-previous.pt")


def load_checkpoint(run: str | Path, args_class=Args) -> tuple[RunArgs, dict]:
    """Options and contents of a run folder's checkpoint, or of the one before it if the newest cannot be read.

    Raises:
        UserError: there is none, or it is damaged or another program's.
    """
    path, previous = Path(run) / "checkpoint.pt", Path(run) / "checkpoint-previous.pt"
    try:
        checkpoint = common.load_torch(path)
    except UserError as error:
        if not previous.exists():
            raise
        checkpoint = common.load_torch(previous)
        os.replace(previous, path)
        print(f"warning: {error}; using the one before", file=sys.stderr)
    try:
        if not {"updates", "learners", "optimizers", "prey", "data", "rng", "cuda_rng"} <= checkpoint.keys():
            raise KeyError
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint["args"].items()}
        return args_class(**options), checkpoint
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a checkpoint of this script; give a run folder that it wrote") from None


def restore(learners: nn.ModuleDict, optimizers: dict, checkpoint: dict, run: str | Path) -> None:
    try:
        learners.load_state_dict(checkpoint["learners"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
    except (KeyError, RuntimeError, ValueError):
        raise UserError(f"{run}/checkpoint.pt: its networks do not fit its options; the file is damaged") from None


def load_policy(run: str | Path, seed_index: int = 0, algorithm=None):
    """A trained policy as a function from PettingZoo observations to actions, both dicts by agent name.

    The agents of one seed act, and with them the frozen prey where the scenario has one.

    Args:
        algorithm: the module of the algorithm that was trained, as `train` takes it; None: this one.

    Raises:
        UserError: no such run, or a damaged one.
    """
    algorithm = algorithm or sys.modules[__name__]
    args, checkpoint = load_checkpoint(run, algorithm.Args)
    if not 0 <= seed_index < args.num_seeds:
        raise UserError(f"seed_index {seed_index}: {run} holds {args.num_seeds} seeds")
    spec = SCENARIOS[args.scenario]
    n = spec.num_controlled
    obs_size = ParticleEnv(args.scenario, 1).obs_sizes[0]
    learners = algorithm.make_learners(args, n, obs_size, 2, "cpu")
    # the learner axis is seed-major: cut out this seed's agents
    chosen = {k: v.unflatten(0, (args.num_seeds, -1))[seed_index] for k, v in checkpoint["learners"].items()}
    restore(learners, {}, {"learners": chosen}, run)
    args = replace(args, num_seeds=1)
    generator = torch.Generator().manual_seed(args.seed)

    def policy(observations: dict) -> dict:
        obs = [torch.as_tensor(observations[name]) for name in spec.agents]
        actions = algorithm.act(learners, torch.stack(obs[:n])[:, None], args, generator)[:, 0]
        if checkpoint["prey"] is not None:
            actions = torch.cat([actions, common.policy_action(checkpoint["prey"], obs[n])[None]])
        return dict(zip(spec.agents, actions.numpy(), strict=True))

    return policy


def new_run_dir(args: RunArgs, algorithm_name: str) -> Path:
    """Make and return a folder that no other run has, also when two start in the same second."""
    name = f"{algorithm_name}-{args.scenario}-{args.dataset}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
        path = Path(args.run_dir) / (name + suffix)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--run-dir {args.run_dir}: {error.strerror}; choose another folder") from None
    raise UserError(f"--run-dir {args.run_dir}: holds too many runs of this second")


def load_data(args: RunArgs, obs_size: int, action_size: int, num_agents: int, prey: dict | None, device) -> Data:
    """Load the data set, making it first if there is none, keep `data_fraction` of it, and augment it.

    Raises:
        UserError: it is damaged, or was made with another prey.
    """
    folder = common.dataset_path(args.data_dir, args.scenario, args.dataset).parent
    if not folder.exists():
        import collect_datasets  # only when it is needed

        try:
            with torch.random.fork_rng():  # so that this run equals the next one, which finds the data set made
                collect_datasets.collect(args.scenario, args.dataset, data_dir=args.data_dir)
        except UserError:
            if not folder.exists():  # else another process was faster
                raise
    sizes = obs_size, action_size, num_agents, EPISODE_STEPS
    data = common.load_dataset(args.data_dir, args.scenario, args.dataset, *sizes)
    made_with = data.metadata.get("prey_checksum")
    if prey is not None and made_with not in (None, common.policy_checksum(prey)):
        raise UserError(f"{data.path}: made with another prey; pass it as --prey, or delete the folder to make it anew")
    rows, returns = data.rows, data.returns
    if args.data_fraction < 1:
        kept = torch.randperm(len(returns))[: max(1, round(args.data_fraction * len(returns)))]
        rows = rows.unflatten(1, (-1, EPISODE_STEPS))[:, kept].flatten(1, 2)
        returns = returns[kept]
    if not args.raw_rewards:
        standardise_rewards(rows, obs_size)
    rows[:, :, -obs_size - 2] *= args.reward_scale
    thresholds = ()
    if args.augment:
        thresholds = args.thresholds or torch.quantile(returns, torch.tensor(args.quantiles)).tolist()
    stats = {
        "mean": returns.mean().item(),
        "std": returns.std(correction=0).item(),
        "max": returns.max().item(),
        "transitions": rows.shape[1],
    }
    starts = torch.arange(len(returns)) * EPISODE_STEPS
    lengths = torch.full_like(starts, EPISODE_STEPS)
    episodes = augment(returns, thresholds)
    index = (starts[episodes][:, None] + torch.arange(EPISODE_STEPS)).flatten()
    rows, starts, lengths, episodes, index = (x.to(device) for x in (rows, starts, lengths, episodes, index))
    return Data(rows, starts, lengths, episodes, index, obs_size, stats)


def train(args: RunArgs, algorithm) -> dict:
    """Train and evaluate: Algorithm 2 with its data, logging, checkpoints and results.

    Args:
        algorithm: a module that has what this one has under the same names: Args, algorithm_name, resolve,
            make_learners, make_optimizers, sample_batch, update and act. The baselines pass themselves.

    Returns:
        what `results.json` in the run folder holds

    Raises:
        UserError: an option, the data set or a checkpoint does not fit, or the losses are no longer finite.
    """
    started = time.time()
    checkpoint = None
    if args.resume or args.eval_only:
        run = Path(args.resume or args.eval_only)
        stored, checkpoint = load_checkpoint(run, algorithm.Args)
        if args.eval_only and not checkpoint["updates"]:
            raise UserError(f"{run}: has made no update yet; train it with --resume {run}")
        for option in ("scenario", "dataset"):
            if getattr(args, option) not in (getattr(stored, option), getattr(algorithm.Args, option)):
                raise UserError(f"--{option} {getattr(args, option)}: {run} was trained on {getattr(stored, option)}")
        if args.data_dir == algorithm.Args.data_dir:  # not given: where the data were
            args = replace(args, data_dir=stored.data_dir)
        if args.resume and args.updates and args.updates < checkpoint["updates"]:
            raise UserError(f"--updates {args.updates}: {run} has made {checkpoint['updates']} already")
        names = ["resume", "eval_only", "data_dir", "cuda", "capture_video"]
        if args.resume:
            names += ["updates"] if args.updates else []
        else:
            own = ("eval_episodes", "eval_candidates", "eval_alpha", "shift")  # those of them that the algorithm has
            names += [name for name in own if hasattr(args, name)]
            stored.updates = checkpoint["updates"]
        args = replace(stored, **{name: getattr(args, name) for name in names})
    args = algorithm.resolve(args)
    if args.track and importlib.util.find_spec("wandb") is None:
        raise UserError("--track: wandb is not installed; run `pip install wandb`")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    env = ParticleEnv(args.scenario, 1)
    obs_size, action_size, n = env.obs_sizes[0], 2, env.spec.num_controlled
    num_learners = args.num_seeds * n
    if checkpoint is not None:
        prey = checkpoint["prey"] and {name: value.to(device) for name, value in checkpoint["prey"].items()}
    elif env.num_agents > n:
        prey = common.load_prey(
            args.prey or common.ROOT / "pretrained" / f"{args.scenario}.pt", env.obs_sizes[n], device
        )
    else:
        prey = None

    torch.manual_seed(args.seed)
    data = None if args.eval_only else load_data(args, obs_size, action_size, n, prey, device)
    learners = algorithm.make_learners(args, num_learners, obs_size, action_size, device)
    optimizers = algorithm.make_optimizers(args, learners)
    if checkpoint is not None:
        restore(learners, optimizers, checkpoint, run)
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    else:
        run = new_run_dir(args, algorithm.algorithm_name(args))

    def act(obs, generator):
        return algorithm.act(learners, obs, args, generator)

    first_update = checkpoint["updates"] if checkpoint else 0
    last = None  # the returns [S] after the last update, where `fit` has made it
    disk = partial(common.disk_errors, run, f"free some space; --resume {run} goes on from the last checkpoint")
    if not args.eval_only:
        print(f"{args.scenario}/{args.dataset}: {num_learners} learners ({args.num_seeds} seeds x {n} agents), {run}")
        with disk(), common.hold(run):
            if checkpoint is None:  # a run that is killed before its first evaluation can be continued as well
                common.write_file(run / "config.json", json.dumps(asdict(args), indent=2).encode() + b"\n")
                save_checkpoint(run, args, 0, learners, optimizers, prey, data.stats)
            last = fit(args, algorithm, learners, optimizers, data, prey, first_update, run)
    returns = {"none": evaluate(act, args, "none", prey, device) if last is None else last}
    if args.shift != "none":
        returns[args.shift] = evaluate(act, args, args.shift, prey, device)
    results = {
        "algorithm": algorithm.algorithm_name(args),
        "scenario": args.scenario,
        "dataset": args.dataset,
        "num_seeds": args.num_seeds,
        "updates": args.updates,
        "eval_episodes": args.eval_episodes,
        "returns": {shift: x.tolist() for shift, x in returns.items()},
        "data": checkpoint["data"] if data is None else data.stats,
        "milliseconds_per_action": milliseconds_per_action(act, num_learners, obs_size, device),
        "settings": asdict(args),
        "hardware": hardware(device),
        "first_update": first_update,  # those before it were made by earlier commands
        "seconds": round(time.time() - started, 1),
        "command": "python " + " ".join(sys.argv),
        "commit": git_commit(),
    }
    if args.scenario == "landmarks6":
        results["assignments"] = {shift: assignments(act, args, shift, device) for shift in results["returns"]}
    name = "evaluation.json" if args.eval_only else "results.json"
    with disk():
        common.write_file(run / name, json.dumps(results, indent=2).encode() + b"\n")
        if args.capture_video:
            write_gif(act, args, prey, run / "policy.gif")
    print_table(results)
    if args.capture_video:
        print(f"wrote {run / 'policy.gif'}")
    print(f"{run}: {name}, checkpoint.pt, TensorBoard events")
    return results


def fit(
    args: RunArgs, algorithm, learners, optimizers, data: Data, prey, first_update: int, run: Path
) -> Tensor | None:
    """The loop of Algorithm 2, with its progress bar, logging, evaluations and checkpoints.

    Returns:
        the returns [S] of its last evaluation, made after the last update; None if there was no update left to make
    """
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and --help needs none of it

    if args.track:
        import wandb

        wandb.init(project="dom2", name=run.name, config=asdict(args), sync_tensorboard=True)
    device, n = data.rows.device, len(data.rows)
    L = args.num_seeds * n
    checked, finite = first_update, torch.zeros(L, dtype=torch.long, device=device)  # [L], finite updates since checked

    def step():
        metrics = algorithm.update(learners, optimizers, algorithm.sample_batch(data, args, L), args)
        finite.add_(torch.stack(tuple(metrics.values())).isfinite().all(0))
        return metrics

    def act(obs, generator):
        return algorithm.act(learners, obs, args, generator)

    if args.compile:
        step = cuda_graph(step) if device.type == "cuda" else compiled(step)
    returns = None
    writer = SummaryWriter(run, purge_step=first_update + 1)
    bar = tqdm(total=args.updates, initial=first_update, unit="update", dynamic_ncols=True)
    with writer, bar, common.catch_signals() as stopped:
        for u in range(first_update + 1, args.updates + 1):
            metrics = step()
            bar.update()
            evaluates = u % args.eval_interval == 0 or u == args.updates
            saves = evaluates or bool(stopped)
            if u % 100 == 0 or saves:
                sound = finite == u - checked  # [L]
                if saves:  # a parameter that has just broken shows in the next update's losses only
                    sound &= common.finite_state(learners, optimizers, L)
                if not sound.all():
                    j = int(sound.int().argmin())
                    broken = [tag for tag, value in metrics.items() if not value[j].isfinite()]
                    raise UserError(
                        f"update {min(checked + int(finite[j]) + 1, u)}: {', '.join(broken) or 'a parameter'} of seed "
                        f"{args.seed + j // n}, agent {j % n} is not finite; lower the learning rates (the checkpoint "
                        f"in {run} is from before)"
                    )
                checked = u
                finite.zero_()
                for tag, value in metrics.items():
                    writer.add_scalar(tag, value.mean().item(), u)
            if evaluates:
                returns = evaluate(act, args, "none", prey, device)
                score = returns.mean().item()
                normalised = common.normalised_score(args.scenario, score)
                writer.add_scalar("charts/episodic_return", score, u)
                writer.add_scalar("charts/normalised_score", normalised, u)
                writer.add_scalar("charts/action_std", action_std(act, data, L), u)
                bar.set_postfix_str(f"return {score:.1f}, normalised {normalised:.1f}")
                bar.refresh()
            if saves:
                writer.flush()  # what is logged up to a checkpoint is not lost with the process
                save_checkpoint(run, args, u, learners, optimizers, prey, data.stats)
                if stopped:
                    bar.close()
                    script = os.path.relpath(algorithm.__file__)
                    print(f"stopped after update {u}; go on with: python {script} --resume {run}")
                    raise SystemExit(128 + stopped[0])
    return returns


def print_table(results: dict) -> None:
    """The closing table: one line per environment."""
    scenario, dataset, data = results["scenario"], results["dataset"], results["data"]
    paper_name = common.PAPER_NAMES.get(results["algorithm"], "DOM2")
    seeds, episodes = results["num_seeds"], results["eval_episodes"]
    print(
        f"\n{results['algorithm'].upper()} on {scenario}/{dataset}, last parameters ({results['updates']:,} updates),"
    )
    over_seeds = f"for each of {seeds} seeds, mean ± std over seeds" if seeds > 1 else "of one seed"
    print(f"mean return of {episodes:,} episodes {over_seeds}\n")
    paper_column = f"paper ({paper_name})"
    print(f"{'environment':<12}{'return':>17}{'normalised':>12}{'data mean':>11}{'data max':>10}{paper_column:>17}")
    for shift, returns in results["returns"].items():
        x = torch.tensor(returns)
        spread = f" ± {x.std(correction=0):.1f}" if seeds > 1 else ""
        paper = common.paper_result(scenario, dataset, shift, paper_name)
        print(
            f"{'standard' if shift == 'none' else shift:<12} {f'{x.mean():.1f}{spread}':>16} "
            f"{common.normalised_score(scenario, x.mean().item()):>11.1f} {data['mean']:>10.1f} {data['max']:>9.1f} "
            f"{f'{paper[0]:.1f} ± {paper[1]:.1f}' if paper else '-':>16}"
        )
    print()
    for shift, found in results.get("assignments", {}).items():
        distinct, entropy = (sum(found[key]) / seeds for key in ("distinct", "entropy"))
        print(f"{shift}: {distinct:.1f} assignments of agents to landmarks from one start, entropy {entropy:.2f} bits")


def write_gif(act, args: RunArgs, prey: dict | None, path: Path, episodes: int = 4) -> None:
    """Seed 0's team in `episodes` episodes of the standard environment, as an animated GIF."""
    from PIL import Image

    from particle_env import draw

    env = ParticleEnv(args.scenario, args.num_seeds * episodes, seed=args.seed)
    frames = []
    rollout(act, args, env, prey, on_step=lambda: frames.append([draw(env, i, 300) for i in range(episodes)]))
    images = [Image.fromarray(frame) for episode in zip(*frames, strict=True) for frame in episode]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def git_commit() -> str:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=common.ROOT, capture_output=True, text=True, timeout=10, check=True
        )
        return out.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main() -> None:
    train(common.parse(Args, __doc__), sys.modules[__name__])


if __name__ == "__main__":
    common.run(main)
