"""MA-SfBC: SfBC (Chen et al. 2023) for every agent by itself: a diffusion policy clones the data, Q chooses.

    behaviour      a noise network predicts the noise at any time in (1e-5, 1): diffusion_loss in dom2_mpe.py
    value          V(o) = sum_k softmax_k(alpha Q(o, a_k)) Q(o, a_k), a_k actions of the behaviour
    planning       R_t = r_t + gamma max(R_{t+1}, V(o_{t+1})), backwards along a trajectory of the data
    critic_loss    (Q(o_t, a_t) - R_t)^2: in-sample planning
    act            of 8 behaviour actions one is drawn with probability softmax(eval_alpha Q); in MuJoCo tasks the
                   mean of 4 of 32 acts

    python baselines/ma_sfbc.py --scenario simple_spread --dataset medium
    python baselines/ma_sfbc.py --help

What differs from the original:
- It trains the behaviour to the end, samples 16 actions once for every state of the data, and recomputes all R with the
  present Q every 100 epochs (its code: once). Here both learn together, the critic from windows of consecutive steps
  (particle environments: whole episodes) whose R is computed anew in every update, from a slowly moving copy of Q and
  fresh actions.
- The moving average of the behaviour acts, and every denoising step clips the clean action to [-1, 1].
- The original makes a new critic at every recomputation; here it learns on.
- The end of an episode is a time limit: R continues with V there, where the original stops with 0.
- It standardises returns at every recomputation, so that alpha has a scale; here rewards are standardised and scaled.
- Sampling planning's candidates takes most of an update's time, so the critic learns from 4 windows at a time.
- First-order DPM-Solver with 5 steps instead of third order with 15, DOM2's MLP instead of Figure 8's network of
  512-256-128, batches of 256 instead of 4,096, fewer updates, at a behaviour learning rate of 2e-3 instead of 1e-4.
- 8 candidates instead of 16 in planning and, in the particle environments, instead of 32 in acting. eval_alpha is 10
  instead of 100, except on random data: after so short a training the best by Q are often odd ones.
- `--noise-net residual --widths 512 256 128 --diffusion-steps 15 --plan-candidates 16 --batch-size 4096 --plan-windows
  163 --actor-lr 1e-4 --eval-candidates 32 --eval-alpha 100` and time undo most of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from baselines import shared
from baselines.shared import MLP, OWN, SCENARIOS, options, settings_table
from dom2_mpe import (
    NOISE_NETS,
    DiffusionPolicy,
    NoiseSchedule,
    action_mask,
    adam,
    diffusion_loss,
    gradient_step,
    q_of_candidates,
    sample_transitions,
    soft_update,
    train,
    with_targets,
)
from run import Algorithm, parse
from utils.data import draw
from utils.program import UserError, program


@dataclass
class TrainingArgs(options.TrainingArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    actor_lr: options.Share = 2e-3
    """Adam's learning rate of the behaviour policies"""
    critic_lr: options.Share = 1e-3
    """Adam's learning rate of the critics"""
    gamma: options.Discount = 0.95
    """discount factor; the time limit is not a terminal state"""
    rho: options.Share = 0.01
    """the critic that plans and the policy that acts move by this share of the difference each update"""
    window: options.Count = 25
    """consecutive steps to plan over"""
    plan_windows: options.Count = 4
    """windows per learner and update that the critic learns from"""
    alpha: options.Weight = 20.0
    """how strongly V prefers candidates of high Q"""
    plan_candidates: options.Count = 8
    """behaviour actions per observation in planning"""


@dataclass
class NetworkArgs(options.Options):
    """The behaviour policies and the critics."""

    noise_net: Literal["mlp", "residual"] = "mlp"
    """mlp, or residual (Figure 8, after the original)"""
    widths: options.Widths = (128, 128, 128)
    """widths of the noise network's layers; of its downward half for residual"""
    critic_widths: options.Widths = (256, 256)
    """widths of the critics' hidden layers"""
    diffusion_steps: options.Count = 5
    """denoising steps"""
    beta_max: options.NoiseScale = 20.0
    """noise schedule: beta at diffusion time 1; at time 0 it is 0.1"""


@dataclass
class EvaluationArgs(options.EvaluationArgs):
    """How to measure."""

    eval_alpha: options.Weight = 10.0
    """how strongly the acting policy prefers candidates of high Q"""
    eval_candidates: options.Count = 8
    """behaviour actions per decision of the acting policy"""
    eval_average: options.Count = 1
    """how many of them are chosen and averaged; published: 1; 4 on MuJoCo tasks"""
    temperature: options.Weight = 1.0
    """standard deviation of the noise from which they start; 0: all of them are the same"""


@dataclass
class Args(shared.DataArgs, TrainingArgs, NetworkArgs, EvaluationArgs, options.RunArgs):
    """All options of MA-SfBC."""

    def __post_init__(self):
        super().__post_init__()
        if self.eval_average > self.eval_candidates:
            raise UserError(f"--eval-average {self.eval_average}: at most --eval-candidates {self.eval_candidates}")


# alpha expects discounted returns with a standard deviation of about 1. With reward_scale it is 0.8 to 2.2 in the
# particle environments, and 1.2 (random) to 3.6 (random-medium) on HalfCheetah.
SETTINGS = settings_table(
    particles=dict(updates=4_000, reward_scale=0.2, batch_size=256, eval_interval=2_000),
    mujoco=dict(updates=6_000, gamma=0.99, reward_scale=0.05, batch_size=256, eval_candidates=32, eval_average=4),
    rows={scenario: {"random": dict(eval_alpha=100.0)} for scenario in (*SCENARIOS, OWN, "HalfCheetah")},
)


class Critic(MLP):
    """Q of every learner: obs [L, B, d], action [L, B, A] -> [L, B]."""

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths):
        super().__init__(num_learners, [obs_size + action_size, *widths, 1], F.silu)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return super().forward(torch.cat([obs, action], -1))[..., 0]


class Windows(NamedTuple):
    """Windows of H consecutive steps, one after the other: W is their number times H. And random numbers."""

    obs: Tensor  # [L, W, d]
    action: Tensor  # [L, W, A]
    reward: Tensor  # [L, W]
    next_obs: Tensor  # [L, W, d]
    done: Tensor  # [L, W], 1 after a terminal state
    real: Tensor  # [L, W], 0 for what a window has outside its trajectory
    noise: Tensor  # [L, W, K, A], starts the behaviour's chains


class Batch(NamedTuple):
    """Transitions and random numbers for the behaviour, windows for the critic."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    tau: Tensor  # [L, B], diffusion times
    eps: Tensor  # [L, B, A], noise of the diffusion loss
    windows: Windows


def candidates(policy, obs: Tensor, noise: Tensor) -> Tensor:
    """K behaviour actions for each observation: obs [L, B, d], noise [L, B, K, A] -> [L, B, K, A]."""
    K = noise.shape[2]
    return policy(obs.repeat_interleave(K, 1), noise.flatten(1, 2)).view(noise.shape)


def value(q: Tensor, alpha: float) -> Tensor:
    """The softmax-weighted mean of Q over the candidates: [..., K] -> [...]."""
    return ((alpha * q).softmax(-1) * q).sum(-1)


def planning(reward: Tensor, next_value: Tensor, real: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma max(R_{t+1}, V(o_{t+1})) along windows; where one ends, V alone. All are [..., H]."""
    planned, later = [], torch.full_like(reward[..., 0], -torch.inf)
    for t in reversed(range(reward.shape[-1])):
        now = reward[..., t] + gamma * torch.maximum(later, next_value[..., t])
        planned.append(now)
        later = torch.where(real[..., t] > 0, now, -torch.inf)
    return torch.stack(planned[::-1], -1)


def critic_loss(critic, target_critic, policy, windows: Windows, length: int, gamma: float, alpha: float):
    """Squared error to the planned returns, [L], and a dict of metrics [L]; the windows have `length` steps each."""
    obs, action, reward, next_obs, done, real, noise = windows
    with torch.no_grad():
        actions = candidates(policy, next_obs, noise)
        next_value = (1 - done) * value(q_of_candidates(target_critic, next_obs, actions), alpha)  # [L, W]
        columns = [x.unflatten(1, (-1, length)) for x in (reward, next_value, real)]
        target = planning(*columns, gamma).flatten(1)
    q = critic(obs, action)
    loss = (real * (q - target).square()).sum(1) / real.sum(1)
    return loss, {"losses/td": loss.detach(), "charts/q_data": q.detach().mean(1), "charts/value": next_value.mean(1)}


def choose(q: Tensor, actions: Tensor, alpha: float, num: int = 1, generator=None) -> Tensor:
    """The mean of `num` different ones of K actions, drawn with probability softmax(alpha Q).

    q [..., K], actions [..., K, A] -> [..., A].
    """
    probability = (alpha * q).softmax(-1).flatten(0, -2).clamp(min=1e-30)  # too few above 0 could not be drawn
    index = torch.multinomial(probability, num, generator=generator).view(*q.shape[:-1], num, 1)
    return actions.take_along_dim(index, -2).mean(-2)


def make_learners(args: Args, env) -> nn.ModuleDict:
    """Behaviour policies, critics and target copies of both, with a leading learner axis."""
    sizes = args.num_seeds * env.num_agents, env.obs_size, env.action_size
    net, schedule = NOISE_NETS[args.noise_net](*sizes, args.widths), NoiseSchedule(beta_max=args.beta_max)
    policy = DiffusionPolicy(net, schedule, args.diffusion_steps, "noise", action_mask(args, env))
    return with_targets(policy=policy, critic=Critic(*sizes, args.critic_widths)).to(env.device)


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return adam(learners, policy=args.actor_lr, critic=args.critic_lr)


def sample_windows(data, args: Args) -> Windows:
    """Windows for all learners, which hold every step of an episode as often.

    An episode shorter than a window has one only, so its steps are drawn less often.
    """
    (n, _, A), device = data.action.shape, data.obs.device
    L, M, H = args.num_seeds * n, args.plan_windows, args.window
    episode = torch.searchsorted(data.starts, draw(data.index, L, M, 1), right=True) - 1
    start, length = data.starts[episode], data.lengths[episode]
    first = (torch.rand(L, M, 1, device=device) * (length + H - 1)).long() - (H - 1)  # some begin before the episode
    step = torch.where(length > H, first, 0) + torch.arange(H, device=device)  # [L, M, H]
    row = (start + torch.minimum(step.clamp(min=0), length - 1)).flatten(1)  # [L, M * H]
    agent = torch.arange(L, device=device)[:, None] % n
    return Windows(
        *(x[agent, row] for x in data[:5]),
        real=((step >= 0) & (step < length)).flatten(1).to(data.obs.dtype),
        noise=torch.randn(L, M * H, args.plan_candidates, A, device=device),
    )


def sample_batch(data, args: Args) -> Batch:
    """Minibatches and windows for all learners, and the random numbers of their update."""
    obs, action, *_ = sample_transitions(data, args)
    tau = 1e-5 + (1 - 1e-5) * torch.rand(obs.shape[:2], device=obs.device)
    return Batch(obs, action, tau, torch.randn_like(action), sample_windows(data, args))


def update(learners: nn.ModuleDict, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of all behaviour policies and critics. Returns metrics, each [L]."""
    policy, critic, target_critic = (learners[name] for name in ("policy", "critic", "target_critic"))
    loss, metrics = critic_loss(critic, target_critic, policy, batch.windows, args.window, args.gamma, args.alpha)
    gradient_step(learners, optimizers, "critic", loss, max_norm=0)
    loss = diffusion_loss(policy, batch)
    gradient_step(learners, optimizers, "policy", loss, max_norm=0)
    for name in ("policy", "critic"):
        soft_update(learners[f"target_{name}"], learners[name], args.rho)
    return metrics | {"losses/diffusion": loss.detach()}


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """The mean of `eval_average` actions of the behaviour, drawn by Q: obs [L, E, d] -> [L, E, A]."""
    A = learners["critic"].layers[0].weight.shape[1] - obs.shape[-1]
    noise = torch.randn(*obs.shape[:2], args.eval_candidates, A, generator=generator, device=obs.device)
    actions = candidates(learners["target_policy"], obs, args.temperature * noise)
    q = q_of_candidates(learners["critic"], obs, actions)
    return choose(q, actions, args.eval_alpha, args.eval_average, generator)


MA_SFBC = Algorithm("ma_sfbc", Args, SETTINGS, make_learners, make_optimizers, sample_batch, update, act)


if __name__ == "__main__":
    program(lambda: train(parse(MA_SFBC, __doc__), MA_SFBC))
