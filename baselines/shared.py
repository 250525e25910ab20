"""What several baselines share: options, settings, deterministic policies, and the critics of MA-CQL and OMAR.

Shapes as in dom2_mpe.py: L learners, B minibatch, K actions per observation, d and A entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import DATASETS
from dom2_mpe import (
    StackedLinear,
    TwinCritic,
    action_mask,
    adam,
    gradient_step,
    q_of_candidates,
    sample_transitions,
    soft_update,
    with_targets,
)
from mamujoco_env import SCENARIOS as ROBOTS
from own_env import OWN
from particle_env import SCENARIOS
from utils import options
from utils.options import Count, Discount, Natural, Share, Weight, Widths, scenario_of

# --------------------------------------------------------------------------------------------------------------------
# Options and settings


@dataclass
class DataArgs(options.DataArgs):
    """What to learn from."""

    scenario: scenario_of(*SCENARIOS, *ROBOTS) = "simple_tag"
    """simple_spread, simple_tag, simple_world, landmarks6, a MuJoCo task, or module:function, one of your own"""
    augment: bool = False
    """replicate high-return trajectories (DOM2's Algorithm 1)"""
    prey: options.OptionalName = None
    """frozen prey of simple_tag and simple_world; default: pretrained/; for data from elsewhere give theirs"""
    agent_conf: options.OptionalName = None
    """partition of a MuJoCo task's joints among agents, such as 6x1; default: HalfCheetah 2x3"""
    agent_obsk: Natural = 0
    """an agent of a MuJoCo task sees its own joints, and the angles of those at most so many joints away"""
    global_categories: tuple[Literal["qpos", "qvel"], ...] = ()
    """it also sees positions (qpos), velocities (qvel) or both of what no agent controls, such as the torso"""


@dataclass
class TrainingArgs(options.TrainingArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    lr: Share = 0.01
    """Adam's learning rate, of policies and critics"""
    gamma: Discount = 0.95
    """discount factor; the time limit is not a terminal state"""
    rho: Share = 0.01
    """target networks, the acting policy among them, move by this share of the difference each update"""
    max_grad_norm: Weight = 0.5
    """largest gradient norm per learner and network; 0: no clipping"""


@dataclass
class NetworkArgs(options.Options):
    """The policies."""

    widths: Widths = (64, 64)
    """widths of the hidden layers"""


@dataclass
class ActorCriticArgs(NetworkArgs):
    """The policies and the critics."""

    critic_norm: bool = False
    """layer normalisation (without parameters) before every ReLU of the critics"""


def settings_table(particles: dict, mujoco: dict, rows: dict) -> dict:
    """Settings of every dataset, {(scenario, dataset): {option: value}}: its family's, then its own row.

    Args:
        particles, mujoco: options of a whole family; environments of the user's own have those of particles.
        rows: {scenario: {dataset: options}}; where they have none, landmarks6 takes those of simple_spread, and a
            MuJoCo task those of HalfCheetah.
    """
    mujoco = dict(eval_interval=5_000, eval_episodes=32, shift=("random", "extreme")) | mujoco
    table = {}
    families = dict.fromkeys((*SCENARIOS, OWN), particles) | dict.fromkeys(ROBOTS, mujoco)
    for scenario, family in families.items():
        model = {"landmarks6": "simple_spread", **dict.fromkeys(ROBOTS, "HalfCheetah")}.get(scenario)
        row = rows.get(scenario, rows.get(model, {}))
        shift = {"shift": ("dismiss",)} if scenario == "landmarks6" else {}
        table |= {(scenario, dataset): family | row.get(dataset, {}) | shift for dataset in DATASETS}
    return table


# --------------------------------------------------------------------------------------------------------------------
# Networks


class ObservationNorm(nn.Module):
    """(o - mean) / std of every learner's observations, the moments averaged over all minibatches seen: [L, B, d]."""

    def __init__(self, num_learners: int, obs_size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(num_learners, 1, 1))
        self.register_buffer("mean", torch.zeros(num_learners, 1, obs_size))
        self.register_buffer("square", torch.ones(num_learners, 1, obs_size))

    def track(self, obs: Tensor) -> None:
        """Take a minibatch's observations into the moments."""
        self.count += 1
        self.mean.lerp_(obs.mean(1, keepdim=True), 1 / self.count)
        self.square.lerp_(obs.square().mean(1, keepdim=True), 1 / self.count)

    def forward(self, obs: Tensor) -> Tensor:
        variance = (self.square - self.mean.square()).clamp(min=0)
        return (obs - self.mean) / (variance + 1e-5).sqrt()

    def standardise(self, batch):
        """A minibatch with standardised observations, which the moments have taken in."""
        self.track(batch.obs)
        return batch._replace(obs=self(batch.obs), next_obs=self(batch.next_obs))


class MLP(nn.Module):
    """Layers of `sizes` with `activation` between them, for every learner: [L, B, sizes[0]] -> [L, B, sizes[-1]]."""

    def __init__(self, num_learners: int, sizes, activation=F.relu):
        super().__init__()
        self.layers = nn.ModuleList(StackedLinear(num_learners, i, o) for i, o in pairwise(sizes))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Policy(MLP):
    """Deterministic policies pi(o): [L, B, d] -> actions [L, B, A] in [-1, 1], 0 where `mask` [L, 1, A] is 0."""

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths, mask=None):
        super().__init__(num_learners, [obs_size, *widths, action_size])
        self.register_buffer("mask", torch.ones(1, 1, 1) if mask is None else mask, persistent=False)
        with torch.no_grad():  # actions near 0, far from where tanh is flat
            self.layers[-1].weight.uniform_(-3e-3, 3e-3)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(super().forward(obs)) * self.mask

    def own_mean(self, x: Tensor) -> Tensor:
        """Mean over the minibatch and an agent's own entries of x [L, B, A], which is 0 in the others: [L]."""
        return x.mean((1, 2)) / self.mask.mean((1, 2))


class BatchNormCritic(TwinCritic):
    """Twin critics of actions that are standardised over the minibatch: [L, B, d], [L, B, A] -> [L, 2, B].

    A shift or a scale common to all actions of a call leaves Q as it is.
    """

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        variance, mean = torch.var_mean(action, 1, correction=0, keepdim=True)
        return super().forward(obs, (action - mean) / (variance + 1e-5).sqrt())


def make_actor_critic(args, env) -> nn.ModuleDict:
    """Observation moments, policies, critics, and target copies of the latter two."""
    critic_class = BatchNormCritic if getattr(args, "batch_norm", False) else TwinCritic
    sizes = args.num_seeds * env.num_agents, env.obs_size, env.action_size
    policy = Policy(*sizes, args.widths, action_mask(args, env))
    learners = with_targets(policy=policy, critic=critic_class(*sizes, args.widths, args.critic_norm))
    learners["norm"] = ObservationNorm(*sizes[:2])
    return learners.to(env.device)


def make_optimizers(args, learners: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return adam(learners, policy=args.lr, critic=args.lr)


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args, generator: torch.Generator) -> Tensor:
    """Deterministic actions of all learners' target policies, obs [L, E, d] -> [L, E, A]."""
    return learners["target_policy"](learners["norm"](obs))


# --------------------------------------------------------------------------------------------------------------------
# Conservative critics, of MA-CQL and OMAR


@dataclass
class CQLArgs(TrainingArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    cql_alpha: Weight = 1.0
    """weight of the conservative term"""
    conservative_share: Share = 0.25
    """share of every minibatch from which that term is estimated; as published: 1"""
    cql_actions: Count = 10
    """uniform actions per transition in the conservative term"""
    cql_policy_actions: Natural = 0
    """noisy actions of the policy at o, and as many at o', in the conservative term"""
    cql_noise: Share = 0.2
    """standard deviation of their noise"""
    action_penalty: Weight = 1e-3
    """weight of the squared action in the policy's loss"""


@dataclass
class CQLNetworkArgs(ActorCriticArgs):
    """The policies and the critics."""

    batch_norm: bool = True
    """critics see actions standardised over the call's own batch"""


class CQLBatch(NamedTuple):
    """A minibatch per learner, and the random numbers that the critics' update needs."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    done: Tensor  # [L, B], 1 after a terminal state
    random_actions: Tensor  # [L, B', K, A], uniform in [-1, 1], for the first B' transitions
    policy_noise: Tensor  # [2, L, B', K, A], standard normal


def sample_cql_batch(data, args) -> CQLBatch:
    """Minibatches for all learners, and the random numbers of their update."""
    transitions = sample_transitions(data, args)
    (L, B, A), device = transitions[1].shape, data.obs.device
    part = math.ceil(args.conservative_share * B)  # B'
    return CQLBatch(
        *transitions,
        random_actions=torch.rand(L, part, args.cql_actions, A, device=device) * 2 - 1,
        policy_noise=torch.randn(2, L, part, args.cql_policy_actions, A, device=device),
    )


def proposals(policy, batch, noise: float):
    """Uniform actions, noisy actions of the policy at o and at o': each [L, B', K, A] with log-densities [L, B', K]."""
    mask, part = policy.mask[:, None], batch.random_actions.shape[1]
    yield batch.random_actions * mask, (torch.full_like(batch.random_actions, math.log(0.5)) * mask).sum(-1)
    for obs, eps in zip((batch.obs, batch.next_obs), batch.policy_noise, strict=True):
        if eps.numel():
            log_density = -0.5 * eps.square() - math.log(noise * math.sqrt(2 * math.pi))
            actions = (policy(obs[:, :part]).detach()[:, :, None] + noise * eps).clamp(-1, 1)
            yield actions * mask, (log_density * mask).sum(-1)


def cql_loss(critic, target_critic, policy, target_policy, batch, args):
    """TD error + cql_alpha (log sum_a~ exp(Q(o, a~) - log p(a~)) - Q(o, a)) (CQL's Eq. 4), summed over the twins.

    The second term is a mean over the B' transitions that have random actions.

    Returns the loss [L] and a dict of metrics [L].
    """
    with torch.no_grad():
        next_q = target_critic(batch.next_obs, target_policy(batch.next_obs)).amin(1)
        target = (batch.reward + args.gamma * (1 - batch.done) * next_q)[:, None]  # [L, 1, B]
    q, part = critic(batch.obs, batch.action), batch.random_actions.shape[1]  # [L, 2, B], B'
    q_sampled = [
        q_of_candidates(critic, batch.obs[:, :part], actions) - density[:, None]
        for actions, density in proposals(policy, batch, args.cql_noise)
    ]
    td = (target - q).square().mean(-1).sum(1)
    conservative = (torch.cat(q_sampled, -1).logsumexp(-1) - q[..., :part]).mean(-1).sum(1)
    metrics = {"losses/td": td, "losses/conservative": conservative, "charts/q_data": q.mean((1, 2))}
    return td + args.cql_alpha * conservative, {name: value.detach() for name, value in metrics.items()}


def cql_update(learners: nn.ModuleDict, optimizers: dict, batch, args, policy_loss) -> dict[str, Tensor]:
    """One step of all critics, of all policies by `policy_loss`, and of the targets. Returns metrics, each [L]."""
    policy, critic = learners["policy"], learners["critic"]
    batch = learners["norm"].standardise(batch)
    loss, metrics = cql_loss(critic, learners["target_critic"], policy, learners["target_policy"], batch, args)
    gradient_step(learners, optimizers, "critic", loss, args.max_grad_norm)
    loss, policy_metrics = policy_loss(policy, critic, batch, args)
    gradient_step(learners, optimizers, "policy", loss, args.max_grad_norm)
    for name in ("policy", "critic"):
        soft_update(learners[f"target_{name}"], learners[name], args.rho)
    return {**metrics, **policy_metrics, "losses/policy": loss.detach()}
