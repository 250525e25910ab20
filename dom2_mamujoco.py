"""DOM2 (Diffusion Offline Multi-agent Model) on multi-agent MuJoCo, in one file.

Every agent has its own diffusion policy and twin critics. It learns from its own part of a fixed dataset. Training and
execution are decentralised. The paper (arXiv 2307.01472) in the order of this file:

    NoiseSchedule, dpm_solver                Sec. 4.1, Eq. 4     an action is Gaussian noise, denoised in a few steps
    MLPNoiseNet, ResidualNoiseNet            Sec. 5.4, Figure 8  the noise network
    DiffusionPolicy, TwinCritic                                  network + solver; two Q-functions
    critic_loss                              Eq. 1               TD error + conservative (CQL) term
    diffusion_loss, q_loss                   Eq. 3, Eq. 5        stay near the data + prefer high Q
    augment                                  Algorithm 1         replicate high-return trajectories
    update, train                            Algorithm 2

    python dom2_mamujoco.py --dataset medium-replay            # trains, evaluates, prints the returns
    python dom2_mamujoco.py --dataset medium-replay --eta 0    # the diffusion policy alone: BC

Everything that this file shares with dom2_mpe.py is identical there; a test checks this.

All learners train at once. A learner is one agent of one random seed, and every parameter, batch and loss has a leading
learner axis: a linear layer of L learners is one batched matrix product, and Algorithm 2's loop over agents disappears.
Learners share no gradient. Sizes in shapes: L = S n learners (seed 0's agents first), S seeds, n agents, B transitions
per minibatch, A action entries, d observation entries, K actions per observation, N denoising steps, E worlds.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import Dataset
from mamujoco_env import SCENARIOS
from run import Algorithm, Run, parse
from utils import options
from utils.data import draw, load_data
from utils.evaluation import evaluate
from utils.options import Count, DatasetName, Discount, Natural, NoiseScale, Share, Weight, Widths, scenario_of
from utils.policies import TrainedPolicy
from utils.program import UserError, program


@dataclass
class DataArgs(options.DataArgs):
    """What to learn from."""

    dataset: DatasetName = "medium-replay"
    """quality of the dataset"""
    scenario: scenario_of(*SCENARIOS) = "HalfCheetah"
    """the MuJoCo task (docs/environments.md), or module:function, an environment of your own"""
    agent_conf: options.OptionalName = None
    """partition of its joints among agents, such as 6x1; default: 2 agents (Hopper, Pusher 3, ManySegmentSwimmer 10)"""
    agent_obsk: Natural = 0
    """an agent sees its own joints, and the angles of other joints up to this many joints away from its own"""
    global_categories: tuple[Literal["qpos", "qvel"], ...] = ()
    """an agent also sees positions (qpos), velocities (qvel) or both of what no agent controls, such as the torso"""


@dataclass
class TrainingArgs(options.TrainingArgs):
    """How to learn. The defaults in --help are those of the given --scenario and --dataset (SETTINGS)."""

    actor_lr: Share = 1e-3
    """Adam's learning rate of the diffusion policies"""
    critic_lr: Share = 1e-3
    """Adam's learning rate of the critics"""
    gamma: Discount = 0.99
    """discount factor; the time limit is not a terminal state, a fall is"""
    rho: Share = 0.01
    """target networks, also the policy that acts: target <- rho source + (1 - rho) target (Algorithm 2, line 8)"""
    eta: Weight = 1.0
    """weight of the Q-loss in Eq. 5; 0 is behaviour cloning with a diffusion policy"""
    bc_weight: Weight = 1.0
    """weight of the diffusion loss in Eq. 5"""
    zeta: Weight = 0.0
    """weight of the conservative term in Eq. 1; 0 turns it off"""
    conservative_share: Share = 0.25
    """share of every minibatch used for that term; the paper's 1 nearly doubles the time of an update"""
    max_grad_norm: Weight = 0.0
    """largest gradient norm per learner and network; 0: no clipping"""


@dataclass
class NetworkArgs(options.Options):
    """The diffusion policies and the critics."""

    diffusion_steps: Count = 5
    """denoising steps N"""
    beta_max: NoiseScale = 10.0
    """noise schedule: beta at diffusion time 1; at time 0 it is 0.1"""
    prediction: Literal["action", "noise"] = "action"
    """meaning of the network's output f: tanh(f) is the clean action, which implies the noise; or f is the noise"""
    noise_net: Literal["mlp", "residual"] = "mlp"
    """the MLP of Sec. 5.4's ablation, or the U-net-like network of Figure 8"""
    widths: Widths = (128, 128, 128)
    """widths of the MLP's layers; with --noise-net residual, widths of the blocks before the middle block"""
    critic_widths: Widths = (128, 128)
    """widths of the critics' hidden layers"""
    critic_norm: bool = True
    """layer normalisation (without parameters) before every ReLU of the critics"""
    temperature: Weight = 0.0
    """standard deviation of the noise from which acting starts: 1 as in the paper; 0: the same action every time"""


@dataclass
class Args(DataArgs, TrainingArgs, NetworkArgs, options.EvaluationArgs, options.RunArgs):
    """All options of DOM2."""

    def __post_init__(self):
        super().__post_init__()
        if self.eta == self.bc_weight == 0:
            raise UserError("--eta 0 --bc-weight 0: nothing is left to learn from; give one of them a positive weight")


# Values that replace the defaults for one dataset, found by experiment (docs/settings.md). Command-line options win.
EVERYWHERE = dict(updates=6_000, batch_size=256, eval_interval=2_000, eval_episodes=32, shift=("random", "extreme"))
ROWS = {
    "random": dict(rho=0.02),
    "random-medium": dict(rho=0.02, eta=3.0),
    "medium-replay": dict(rho=0.02, eta=8.0, quantiles=(0.9, 0.95, 0.99), copies=15),
    "medium": dict(eta=0.05),
    "medium-expert": dict(eta=0.15),
    "expert": dict(eta=0.15),
}
SETTINGS = {(scenario, dataset): EVERYWHERE | row for scenario in SCENARIOS for dataset, row in ROWS.items()}


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
    """N + 1 uniform diffusion times, tau_N = 1 down to tau_0 = 1e-3 (not 0: the solver divides by sigma(tau_0))."""
    return [1e-3 + (1 - 1e-3) * i / num_steps for i in range(num_steps, -1, -1)]


def dpm_solver(noise_fn, noise: Tensor, schedule: NoiseSchedule, num_steps: int, clip: bool = False) -> Tensor:
    """First-order DPM-Solver from tau = 1 to 1e-3: Eq. 4, corrected as in Eq. 3.7 of Lu et al. (2022).

    a_{i-1} = alpha_{i-1} / alpha_i a_i - sigma_{i-1} (alpha_{i-1} sigma_i / (alpha_i sigma_{i-1}) - 1) eps(a_i, tau_i)

    The paper prints the second term with swapped indices. That step diverges. Gradients flow through all steps.

    Args:
        noise_fn: eps(a, tau) of noisy actions [..., A] and one diffusion time (a float) -> [..., A].
        noise: a_N ~ N(0, I), [..., A].
        clip: in every step, clip the predicted clean action to [-1, 1].
    """
    a = noise
    for s, t in pairwise(time_grid(num_steps)):  # from tau_i = s to tau_{i-1} = t; the last one ends at tau_0
        alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
        eps = noise_fn(a, s)
        if clip:
            a0 = ((a - sigma_s * eps) / alpha_s).clamp(-1, 1)
            eps = (a - alpha_s * a0) / sigma_s
        a = alpha_t / alpha_s * a - sigma_t * (alpha_t * sigma_s / (alpha_s * sigma_t) - 1) * eps
    return a


# --------------------------------------------------------------------------------------------------------------------
# Networks. Every module holds L independent networks, one per learner; `widths` is a tuple of ints.


class StackedLinear(nn.Module):
    """L linear layers as one batched matrix product, [L, B, in] -> [L, B, out]; initialised like nn.Linear."""

    def __init__(self, num_learners: int, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_learners, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_learners, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2] == 1:  # a matrix product with one output column is slow
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


class TimeFeatures(nn.Module):
    """32 random Fourier features (scale 30) of diffusion time: times [L, B] -> [L, B, 32], a float -> [L, 1, 32]."""

    def __init__(self, num_learners: int):
        super().__init__()
        self.register_buffer("frequency", torch.randn(num_learners, 1, 16) * 30)

    def forward(self, t) -> Tensor:
        t = t if isinstance(t, Tensor) else self.frequency.new_full((1, 1), t)
        angle = 2 * math.pi * self.frequency * t[..., None]
        return torch.cat([angle.sin(), angle.cos()], -1)


class MLPNoiseNet(nn.Module):
    """Sec. 5.4's noise network: an MLP of the noisy action, the observation and the time features."""

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths):
        super().__init__()
        self.time = TimeFeatures(num_learners)
        self.obs_in = StackedLinear(num_learners, obs_size, widths[0])
        self.time_in = StackedLinear(num_learners, 32, widths[0])
        self.action_in = StackedLinear(num_learners, action_size, widths[0])
        self.layers = nn.ModuleList(StackedLinear(num_learners, i, o) for i, o in pairwise([*widths, action_size]))

    def forward(self, noisy_action: Tensor, obs: Tensor, t) -> Tensor:
        """noisy_action [L, B, A], obs [L, B, d], diffusion time t (a float or [L, B]) -> [L, B, A]."""
        # the first layer's input is [action, obs, time]; each part has its own weight matrix
        condition = self.obs_in(obs) + (self.time_in(self.time(t)) + self.action_in.bias)
        x = torch.baddbmm(condition, noisy_action, self.action_in.weight)
        for layer in self.layers:
            x = layer(F.silu(x))
        return x


class ResidualBlock(nn.Module):
    """Two layers with the condition added between them, and a skip connection: [L, B, in] -> [L, B, out]."""

    def __init__(self, num_learners: int, in_size: int, out_size: int, condition_size: int):
        super().__init__()
        self.dense1 = StackedLinear(num_learners, in_size, out_size)
        self.dense2 = StackedLinear(num_learners, out_size, out_size)
        self.condition = StackedLinear(num_learners, condition_size, out_size)
        self.skip = StackedLinear(num_learners, in_size, out_size) if in_size != out_size else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.silu(self.dense1(x)) + self.condition(condition)
        return F.silu(self.dense2(h)) + self.skip(x)


class ResidualNoiseNet(nn.Module):
    """Figure 8's noise network, "resembling U-Net" after SfBC (Chen et al. 2022): downward residual blocks of `widths`,
    a middle block, and upward blocks in reverse order. Every upward block also gets its downward counterpart's output.
    Every block gets a condition made of the observation's and the time's embeddings."""

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths):
        super().__init__()
        L, c = num_learners, 128
        self.time = TimeFeatures(L)
        self.obs_in = StackedLinear(L, obs_size, 32)
        self.obs_condition = StackedLinear(L, 32, c)
        self.time_condition = StackedLinear(L, 32, c)
        self.condition = StackedLinear(L, c, c)
        self.down = nn.ModuleList(ResidualBlock(L, i, o, c) for i, o in pairwise([action_size, *widths]))
        self.middle = ResidualBlock(L, widths[-1], widths[-1], c)
        # an upward block takes the block before it and the skip of equal width
        self.up = nn.ModuleList(ResidualBlock(L, 2 * i, o, c) for i, o in pairwise(widths[::-1]))
        self.out = StackedLinear(L, 2 * widths[0], action_size)

    def forward(self, noisy_action: Tensor, obs: Tensor, t) -> Tensor:
        """noisy_action [L, B, A], obs [L, B, d], diffusion time t (a float or [L, B]) -> [L, B, A]."""
        obs_condition = self.obs_condition(F.silu(self.obs_in(obs)))
        condition = F.silu(obs_condition + self.time_condition(self.time(t)))
        condition = F.silu(self.condition(condition))
        skips, x = [], noisy_action
        for block in self.down:
            x = block(x, condition)
            skips.append(x)
        x = self.middle(x, condition)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], -1), condition)
        return self.out(torch.cat([x, skips.pop()], -1))


NOISE_NETS = {"residual": ResidualNoiseNet, "mlp": MLPNoiseNet}


class DiffusionPolicy(nn.Module):
    """The policy pi(a | o) of every learner: a noise network and the solver that turns noise into an action.

    With prediction="noise" the network's output f is eps_theta. With prediction="action" it stands for a clean action
    a0 = tanh(f), and the solver gets the noise eps_theta = (a - alpha a0) / sigma that this action implies. Every
    predicted action then lies in [-1, 1]. Noise of about 0.01 is left at tau_0; the last clamp only restores the range.
    `mask` [L, 1, A] is 0 where an agent has no such action entry; actions and network inputs are 0 there.
    """

    solver = staticmethod(dpm_solver)  # a subclass may have another one

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, num_steps: int, prediction: str = "action", mask=None):
        super().__init__()
        self.net, self.schedule, self.num_steps, self.prediction = net, schedule, num_steps, prediction
        self.register_buffer("mask", torch.ones(1, 1, 1) if mask is None else mask, persistent=False)

    def eps(self, noisy_action: Tensor, obs: Tensor, t: float) -> Tensor:
        """eps_theta(a, o, tau), [L, B, A]."""
        f = self.net(noisy_action * self.mask, obs, t)
        if self.prediction == "noise":
            return f
        return (noisy_action - self.schedule.alpha(t) * torch.tanh(f)) / self.schedule.sigma(t)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Denoise: observations [L, B, d] and Gaussian noise [L, B, A] -> actions [L, B, A] in [-1, 1]."""
        solver_args = self.schedule, self.num_steps, self.prediction == "noise"
        return self.solver(lambda a, t: self.eps(a, obs, t), noise, *solver_args).clamp(-1, 1) * self.mask


class TwinCritic(nn.Module):
    """Q_phi^1 and Q_phi^2 of every learner: obs [L, B, d], action [L, B, A] -> [L, 2, B].

    Parameters have a leading axis of size 2 L: rows 2 l and 2 l + 1 belong to learner l.
    """

    def __init__(self, num_learners: int, obs_size: int, action_size: int, widths, layer_norm: bool = False):
        super().__init__()
        self.layer_norm, sizes = layer_norm, [obs_size + action_size, *widths, 1]
        self.layers = nn.ModuleList(StackedLinear(2 * num_learners, i, o) for i, o in pairwise(sizes))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        twins = len(self.layers[0].weight) // len(obs)  # 2, or 1 in `q1`, which passes only the first twin's weights
        x = torch.cat([obs, action], -1).repeat_interleave(twins, 0)  # [2 L, B, d + A]
        for layer in self.layers[:-1]:
            x = layer(x)
            x = F.relu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        return self.layers[-1](x).view(len(obs), twins, -1)

    def q1(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q_phi^1 alone: [L, B, d], [L, B, A] -> [L, B]."""
        parameters = {name: parameter[::2] for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, parameters, (obs, action))[:, 0]


def q_of_candidates(q, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of K actions per observation: [L, B, d], [L, B, K, A] -> [L, 2, B, K] with q = critic, [L, B, K] with q1."""
    K = actions.shape[2]
    return q(obs.repeat_interleave(K, 1), actions.flatten(1, 2)).unflatten(-1, (-1, K))


# --------------------------------------------------------------------------------------------------------------------
# Losses, one number per learner: [L]. A loss depends on its own learner alone, so backward through the sum is enough.


class Batch(NamedTuple):
    """A minibatch per learner, and the random numbers of its update. The losses themselves draw no random numbers."""

    obs: Tensor  # [L, B, d]
    action: Tensor  # [L, B, A]
    reward: Tensor  # [L, B]
    next_obs: Tensor  # [L, B, d]
    done: Tensor  # [L, B], 1 after a terminal state
    target_noise: Tensor  # [L, B, A], starts the target policy's chain
    random_actions: Tensor  # [L, B', 10, A], uniform in [-1, 1], for the first B' transitions
    tau: Tensor  # [L, B], diffusion times of Eq. 3
    eps: Tensor  # [L, B, A], noise of Eq. 3
    policy_noise: Tensor  # [L, B, A], starts the policy's chain


def critic_loss(critic, target_critic, target_policy, batch: Batch, gamma: float, zeta: float):
    """Eq. 1, summed over the twin critics: TD error plus zeta times the conservative term.

    (r + gamma (1 - done) min_k Qbar_k(o', pibar(o')) - Q(o, a))^2
        + zeta (log sum_{10 uniform a~} exp Q(o, a~) - Q(o, a))

    Bars mark target networks. The term is a mean over the B' transitions with random actions. Returns the loss [L] and
    a dict of metrics [L].
    """
    with torch.no_grad():
        next_action = target_policy(batch.next_obs, batch.target_noise)
        next_q = target_critic(batch.next_obs, next_action).amin(1)  # [L, B]
        target = (batch.reward + gamma * (1 - batch.done) * next_q)[:, None]  # [L, 1, B]
    q = critic(batch.obs, batch.action)  # [L, 2, B]
    td = (target - q).square().mean(-1).sum(1)
    loss, metrics = td, {"losses/td": td.detach(), "charts/q_data": q.detach().mean((1, 2))}
    if zeta > 0:
        part = batch.random_actions.shape[1]  # B'
        actions = batch.random_actions * target_policy.mask[:, None]
        q_random = q_of_candidates(critic, batch.obs[:, :part], actions)  # [L, 2, B', 10]
        conservative = (q_random.logsumexp(-1) - q[..., :part]).mean(-1).sum(1)
        loss = td + zeta * conservative
        metrics["losses/conservative"] = conservative.detach()
        metrics["charts/q_random"] = q_random.detach().mean((1, 2, 3))
    return loss, metrics


def diffusion_loss(policy: DiffusionPolicy, batch: Batch) -> Tensor:
    """Eq. 3, [L]: squared error of the predicted noise, tau uniform over the solver's grid.

    With prediction="action" it is the squared error of the clean action. That equals Eq. 3 with each tau weighted by
    (sigma / alpha)^2, since eps - eps_theta = alpha / sigma (a0_theta - a0).
    """
    tau = batch.tau[..., None]
    noisy = policy.schedule.alpha(tau) * batch.action + policy.schedule.sigma(tau) * batch.eps
    f = policy.net(noisy * policy.mask, batch.obs, batch.tau)
    error = f - batch.eps if policy.prediction == "noise" else torch.tanh(f) - batch.action
    return (error * policy.mask).square().sum(-1).mean(-1)


def q_loss(policy: DiffusionPolicy, critic: TwinCritic, batch: Batch, eta: float):
    """The Q-loss of Eq. 5: -eta E[Q(o, pi(o))] / E[abs(Q(o, a))]. Its gradient flows through all denoising steps.

    The paper prints the normaliser without abs, so that a negative mean Q flips the objective's sign. The normaliser
    gets no gradient. Q is the first of the twins, as in TD3. Returns the loss [L] and a dict of metrics [L].
    """
    action = policy(batch.obs, batch.policy_noise)
    q = critic.q1(batch.obs, action).mean(-1)  # [L]
    with torch.no_grad():
        scale = critic.q1(batch.obs, batch.action).abs().mean(-1)
    saturated = (action.detach().abs() > 0.99).float().mean((1, 2)) / policy.mask.mean((1, 2))
    return -eta * q / scale, {"charts/q_policy": q.detach(), "charts/saturation": saturated}


# --------------------------------------------------------------------------------------------------------------------
# Training (Algorithms 1 and 2)


def augment(returns: Tensor, thresholds) -> Tensor:
    """Algorithm 1: the indices of all trajectories, plus each index once for every threshold that its return reaches.

    Returns [episodes] and thresholds -> int64 indices [episodes + replicas]. Minibatches are drawn from the rows of
    these, so a row of trajectory i has the weight 1 + #{r_th <= returns[i]}; no data are copied.
    """
    episodes = torch.arange(len(returns), device=returns.device)
    return torch.cat([episodes, *(episodes[returns >= r_th] for r_th in thresholds)])


def sample_transitions(data: Dataset, args) -> tuple[Tensor, ...]:
    """Algorithm 2, line 5: an independent minibatch for each learner, from its own agent's part of the dataset.

    Returns obs [L, B, d], action [L, B, A], reward [L, B], next_obs [L, B, d], done [L, B], with the Dataset's values.
    """
    (n, T, _), device = data.obs.shape, data.obs.device
    L, B = args.num_seeds * n, args.batch_size
    step = draw(data.index, L, B)  # rows of an agent's part, with replicas
    agent = torch.arange(L, device=device)[:, None] % n
    row = (agent * T + step).flatten()
    return tuple(x.flatten(0, 1).index_select(0, row).unflatten(0, (L, B)) for x in data[:5])


def sample_batch(data: Dataset, args: Args) -> Batch:
    """Minibatches for all learners, and the random numbers of their update."""
    transitions, N, device = sample_transitions(data, args), args.diffusion_steps, data.obs.device
    L, B, A = transitions[1].shape
    return Batch(
        *transitions,
        target_noise=torch.randn(L, B, A, device=device),
        random_actions=torch.rand(L, math.ceil(args.conservative_share * B), 10, A, device=device) * 2 - 1,
        tau=1e-3 + (1 - 1e-3) * torch.randint(N + 1, (L, B), device=device) / N,  # uniform over `time_grid`
        eps=torch.randn(L, B, A, device=device),
        policy_noise=torch.randn(L, B, A, device=device),
    )


def make_learners(args: Args, env, policy_class=DiffusionPolicy) -> nn.ModuleDict:
    """Policies, critics and their target copies of L = num_seeds * num_agents learners (Algorithm 2, line 1).

    Reads only num_agents, obs_size, action_size, device and, where there is one, action_mask [n, A] of `env`.
    """
    sizes = args.num_seeds * env.num_agents, env.obs_size, env.action_size
    net, schedule = NOISE_NETS[args.noise_net](*sizes, args.widths), NoiseSchedule(beta_max=args.beta_max)
    policy = policy_class(net, schedule, args.diffusion_steps, args.prediction, action_mask(args, env))
    critic = TwinCritic(*sizes, args.critic_widths, args.critic_norm)
    return with_targets(policy=policy, critic=critic).to(env.device)


def action_mask(args, env) -> Tensor | None:
    """What a policy takes as `mask`: [L, 1, A], 0 for entries that an agent does not have. None: all have as many."""
    mask = getattr(env, "action_mask", None)  # [n, A]
    return None if mask is None else mask.repeat(args.num_seeds, 1)[:, None]


def with_targets(**networks: nn.Module) -> nn.ModuleDict:
    """The networks by name, and a copy of each as target_<name>."""
    copies = {f"target_{name}": deepcopy(network).requires_grad_(False) for name, network in networks.items()}
    return nn.ModuleDict(networks | copies)


def adam(learners: nn.ModuleDict, **lr: float) -> dict[str, torch.optim.Optimizer]:
    """One Adam per network; `lr` maps names to learning rates. Adam is elementwise, so learners do not mix in it."""
    flags = {"fused": True, "capturable": next(learners.parameters()).is_cuda}  # CUDA graphs need capturable
    return {name: torch.optim.Adam(learners[name].parameters(), lr[name], **flags) for name in lr}


def make_optimizers(args: Args, learners: nn.ModuleDict) -> dict:
    return adam(learners, policy=args.actor_lr, critic=args.critic_lr)


def gradient_step(learners: nn.ModuleDict, optimizers: dict, name: str, loss: Tensor, max_norm: float) -> None:
    """One gradient step on network `name` for all learners' losses [L], each learner's gradient clipped to `max_norm`.

    Only the parameters of that network get a gradient. `max_norm` 0 clips nothing.
    """
    parameters = list(learners[name].parameters())
    optimizers[name].zero_grad()
    loss.sum().backward(inputs=parameters)
    if max_norm > 0:
        grads = [p.grad.view(len(loss), -1) for p in parameters]
        norm = sum(g.square().sum(1) for g in grads).sqrt()  # [L]
        scale = (max_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
        for g in grads:
            g.mul_(scale[:, None])
    optimizers[name].step()


def soft_update(target: nn.Module, source: nn.Module, rho: float) -> None:
    """Algorithm 2, line 8: target <- rho source + (1 - rho) target."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rho)


def update(learners: nn.ModuleDict, optimizers: dict, batch: Batch, args: Args) -> dict[str, Tensor]:
    """Algorithm 2, lines 6-8, for all learners at once. Returns metrics, each [L]."""
    policy, critic, metrics = learners["policy"], learners["critic"], {}
    if args.eta > 0:
        targets = learners["target_critic"], learners["target_policy"]
        loss, metrics = critic_loss(critic, *targets, batch, args.gamma, args.zeta)
        gradient_step(learners, optimizers, "critic", loss, args.max_grad_norm)  # line 6

    bc = diffusion_loss(policy, batch)
    metrics["losses/diffusion"] = bc.detach()
    loss = args.bc_weight * bc
    if args.eta > 0:
        q, q_metrics = q_loss(policy, critic, batch, args.eta)
        metrics |= q_metrics | {"losses/q": q.detach()}
        loss = loss + q  # Eq. 5
    gradient_step(learners, optimizers, "policy", loss, args.max_grad_norm)  # line 7

    soft_update(learners["target_policy"], policy, args.rho)  # line 8
    if args.eta > 0:
        soft_update(learners["target_critic"], critic, args.rho)
    return metrics


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Sample an action for every observation, from noise scaled by args.temperature: [L, E, d] -> [L, E, A].

    The target policy acts. It is a moving average of the policy, whose return changes less from update to update.
    """
    action_size = learners["critic"].layers[0].weight.shape[1] - obs.shape[-1]
    noise = torch.randn(*obs.shape[:2], action_size, generator=generator, device=obs.device)
    return learners["target_policy"](obs, args.temperature * noise)


DOM2 = Algorithm("dom2", Args, SETTINGS, make_learners, make_optimizers, sample_batch, update, act)
load_policy = TrainedPolicy


def train(args, algorithm: Algorithm = DOM2) -> dict:
    """Algorithm 2, then the evaluations. For a baseline, pass its Algorithm. Returns the content of results.json."""
    run = Run(args, algorithm)  # a new run, or the one that --resume or --eval-only names
    args, env = run.args, run.env
    torch.manual_seed(args.seed)
    data = None if args.eval_only else load_data(args, env, run.prey)

    def replicas(returns):
        thresholds = args.thresholds or returns.quantile(returns.new_tensor(args.quantiles)).tolist()
        return augment(returns, [*thresholds] * args.copies if args.augment else ())

    data = data and data.replicated(replicas)  # line 2
    learners = algorithm.make_learners(args, env)  # line 1
    optimizers = algorithm.make_optimizers(args, learners)

    def step():  # for all agents at once: the learner axis replaces line 4's loop
        batch = algorithm.sample_batch(data, args)  # line 5
        return algorithm.update(learners, optimizers, batch, args)  # lines 6 to 8

    with run.training(learners, optimizers, data):
        step = run.accelerate(step)
        for _ in run:  # line 3
            run.log(step())
            if run.evaluates:
                run.record("none", evaluate(run.act, run.evaluation_env("none"), args))  # "none": not shifted
    for shift in ("none", *args.shift):
        if shift not in run.returns:  # training ends with an evaluation of "none"
            run.record(shift, evaluate(run.act, run.evaluation_env(shift), args))
    return run.finish()


if __name__ == "__main__":
    program(lambda: train(parse(DOM2, __doc__)))
