"""Make the data sets: behaviour policies by TD3, then roll-outs.

    python collect_datasets.py                                              # the particles' 18, 10^6 transitions each
    python collect_datasets.py --scenario simple_tag --dataset random expert
    python collect_datasets.py --scenario HalfCheetah                       # all six
    python collect_datasets.py --train --overwrite --scenario simple_tag    # retrain the behaviour policies first

A data set is a folder `datasets/<scenario>/<dataset>/seed_0_data` of plain .npy arrays, one per agent and quantity
(`obs_i`, `acs_i`, `rews_i`, `next_obs_i`, `dones_i`, float32, whole episodes one after the other), the layout of the
OMAR data sets, plus `metadata.json`. Only the controlled agents are stored; the prey of predator-prey and World is part
of the environment. Robots also have the whole robot's `states_i` and `next_states_i`; `dones_i` is 1 where one fell.

Behaviour policies: every agent is an independent TD3 learner (Fujimoto et al. 2018) that sees its own observation and
reward. In predator-prey and World the prey is trained together with the predators first and then frozen; predators
trained from scratch against it pass the medium level and go on to the expert level. The half cheetah's agents see their
own joints alone, too little for a critic of their own: theirs is one that sees the whole robot and all actions.
`pretrained/<scenario>.pt` holds the prey, the expert policies (`agent_params`, as in OMAR's files), the medium ones and
the actions of a TD3 run, from which its replay buffer is made again: training would give every machine another one.

    random          uniformly random actions
    medium, expert  the policies of that level, with Gaussian noise of standard deviation 0.1 on their actions
    medium-replay   the replay buffer of a TD3 run up to the moment its policies reach the medium level
    random-medium, medium-expert   half and half, by whole episodes
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise, starmap
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import DATASETS, UserError
from dom2_mpe import StackedLinear, soft_update
from mamujoco_env import SCENARIOS as ROBOTS
from mamujoco_env import MujocoEnv
from particle_env import EPISODE_STEPS, SCENARIOS, ParticleEnv


@dataclass
class Args:
    scenario: tuple[str, ...] = ("simple_spread", "simple_tag", "simple_world")
    """which scenarios: those three, landmarks6, HalfCheetah or, with random data alone, another robot"""
    dataset: tuple[str, ...] = DATASETS
    """which data sets of each"""
    num_transitions: int = 1_000_000
    """transitions of each data set; of medium-replay at most this many, as its buffer holds fewer"""
    data_dir: str = "datasets"
    """folder of the data sets"""
    seed: int = 0
    """seed of the roll-outs and of --train"""
    overwrite: bool = False
    """replace data sets (and with --train, policies) that exist"""
    train: bool = False
    """train the behaviour policies and the prey from scratch first"""
    pretrained_dir: str = str(common.ROOT / "pretrained")
    """folder of the behaviour policies"""


@dataclass(frozen=True)
class Recipe:
    """How one scenario's behaviour policies are trained. Updates were chosen for the published sets' returns."""

    published: dict[str, float]  # mean returns of the OMAR data sets
    prey_updates: int  # predators and prey together, until the prey is frozen
    expert_updates: int  # of the controlled agents (against the frozen prey) at most
    hidden: tuple[int, int]  # widths of the actors' and the critics' hidden layers
    gamma: float = 0.95
    rho: float = 0.01
    reward_scale: float = 0.1
    team_critic: bool = False  # one critic that sees the robot's state and all actions, instead of one per agent
    warmup_steps: int = 320  # of uniformly random actions in every world, before learning starts
    lr_drop: float = float("inf")  # updates after which the learning rates are 3e-4 instead of 1e-3
    level_interval: int = 250  # updates between measurements of the policies' level
    level_episodes: int = 400  # episodes of each


RECIPES = {
    "simple_spread": Recipe(
        {"random": 159.6, "medium-replay": 203.7, "medium": 273.4, "expert": 531.0}, 0, 45_000, (128, 256)
    ),
    "simple_tag": Recipe(
        {"random": -4.1, "medium-replay": 3.9, "medium": 116.4, "expert": 207.9}, 4_000, 30_000, (64, 64)
    ),
    "simple_world": Recipe(
        {"random": -6.8, "medium-replay": 1.2, "medium": 65.9, "expert": 85.2}, 2_750, 30_000, (64, 64)
    ),
    # nothing is published for it: random actions reach 69, TD3 soon 80 and, more and more slowly, 90
    "landmarks6": Recipe({"medium": 80.0, "expert": 90.0}, 0, 10_000, (48, 128)),
    "HalfCheetah": Recipe(
        {"random": -283.0, "medium-replay": 423.0, "medium": 1569.0, "expert": 3339.0},
        0,
        110_000,
        (64, 256),
        gamma=0.99,
        rho=0.005,
        reward_scale=1.0,
        team_critic=True,
        lr_drop=50_000,
        warmup_steps=1000,
        level_interval=1000,
        level_episodes=16,
    ),
}
ACTION_NOISE = 0.1  # of the medium and expert data sets


def make_env(scenario: str, num_envs: int, seed):
    """`num_envs` worlds of a scenario: a ParticleEnv, or robots behind its interface."""
    if scenario in SCENARIOS:
        return ParticleEnv(scenario, num_envs, seed=seed)

    class RobotEnv(MujocoEnv):
        @property
        def obs_sizes(self):
            return (self.obs_size,) * self.num_agents

        def reset(self):
            return list(torch.from_numpy(super().reset()).unbind(1))

        def step(self, actions):
            obs, reward, _ = super().step(actions.numpy())
            return list(torch.from_numpy(obs).unbind(1)), torch.from_numpy(reward)[:, None].expand(-1, self.num_agents)

    return RobotEnv(scenario, num_envs, seed=seed)


def row_widths(env) -> dict[str, int]:
    """What a row of transitions holds side by side: names of the layout's arrays and their widths."""
    d = max(env.obs_sizes[: env.num_controlled])
    widths = {"obs": d, "acs": env.action_size, "rews": 1, "next_obs": d, "dones": 1}
    if not isinstance(env, ParticleEnv):
        widths |= {"states": env.state_size, "next_states": env.state_size}
    return widths


def transition(env, obs: Tensor, action: Tensor, rewards: Tensor, next_obs: Tensor, state) -> Tensor:
    """Rows [n, E, W] of the step that `env` has just made; `state` is the robots' before it."""
    parts = [obs, action, rewards.T[: len(obs), :, None], next_obs]
    if isinstance(env, ParticleEnv):
        parts.append(torch.zeros_like(obs[..., :1]))
    else:
        of_all = np.concatenate([env.terminated[:, None], state, env.state], 1, dtype=np.float32)
        parts.append(torch.from_numpy(of_all).expand(len(obs), -1, -1))
    return torch.cat(parts, -1)


# --------------------------------------------------------------------------------------------------------------------
# Independent TD3


class StackedMLP(nn.Module):
    """Three linear layers fc1, fc2, fc3 with ReLU between, one network per learner: [L, B, in] -> [L, B, out]."""

    def __init__(self, num_learners: int, in_size: int, hidden: int, out_size: int):
        super().__init__()
        sizes = (in_size, hidden, hidden, out_size)
        self.fc1, self.fc2, self.fc3 = (StackedLinear(num_learners, i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def unstack(actor: StackedMLP, obs_sizes) -> list[dict[str, Tensor]]:
    """One `common.policy_action` state dict per learner, cut to its own observation size."""
    policies = []
    for agent, size in enumerate(obs_sizes):
        params = {}
        for name in ("fc1", "fc2", "fc3"):
            layer = getattr(actor, name)
            weight = layer.weight.detach()[agent, :size] if name == "fc1" else layer.weight.detach()[agent]
            params[f"{name}.weight"] = weight.T.clone().contiguous()
            params[f"{name}.bias"] = layer.bias.detach()[agent, 0].clone()
        policies.append(params)
    return policies


class TD3:
    """Independent TD3 learners for the first agents of a scenario, its remaining agent played by a frozen prey.

    `train(updates)` goes on from where it stopped. One environment step of 16 worlds precedes every update. No episode
    has a terminal state.

    Args:
        prey: state dict of a frozen prey, or None: then the prey (if any) is one of the learners.
    """

    num_envs, batch_size = 16, 256
    explore_noise, target_noise, target_noise_clip = 0.2, 0.2, 0.5
    PARTS = ("actor", "target_actor", "critic", "target_critic", "actor_optimizer", "critic_optimizer")
    action_penalty = 1e-3  # on the squared pre-tanh action, against saturation

    def __init__(self, scenario: str, prey: dict[str, Tensor] | None, max_updates: int, seed: int):
        torch.manual_seed(seed)
        self.recipe, self.env, self.prey = RECIPES[scenario], make_env(scenario, self.num_envs, seed), prey
        L = self.num_learners = self.env.num_agents if prey is None else self.env.num_controlled
        self.obs_sizes = self.env.obs_sizes[:L]
        d, A = self.obs_size, self.action_size = max(self.obs_sizes), self.env.action_size
        actor_hidden, critic_hidden = self.recipe.hidden  # smaller observations are padded with zeros
        self.actor, self.target_actor = (StackedMLP(L, d, actor_hidden, A) for _ in range(2))
        self.num_critics, seen = (1, self.env.state_size + L * A) if self.recipe.team_critic else (L, d + A)
        self.critic, self.target_critic = (StackedMLP(2 * self.num_critics, seen, critic_hidden, 1) for _ in range(2))
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 1e-3, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), 1e-3, fused=True)
        steps = self.recipe.warmup_steps + max_updates
        steps = -(-steps // self.env.episode_steps) * self.env.episode_steps
        self.widths = list(row_widths(self.env).values())
        self.buffer = torch.zeros(L, steps, self.num_envs, sum(self.widths))
        self.steps = self.updates = 0

    def q(self, critic: StackedMLP, obs: Tensor, state: Tensor | None, action: Tensor) -> Tensor:
        """Twin Q: obs [L, B, d], state [L, B, s], action [L, B, A] -> [critics, 2, B]."""
        seen = [state[:1], *action.split(1)] if self.recipe.team_critic else [obs, action]
        return critic(torch.cat(seen, -1).repeat_interleave(2, 0)).view(self.num_critics, 2, -1)

    def pad(self, obs: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(o, (0, self.obs_size - o.shape[1])) for o in obs[: self.num_learners]])

    @torch.no_grad()
    def environment_step(self) -> None:
        if self.steps % self.env.episode_steps == 0:
            self.obs = self.env.reset()
        obs = self.pad(self.obs)
        if self.steps < self.recipe.warmup_steps:
            action = torch.rand(self.num_learners, self.num_envs, self.action_size) * 2 - 1
        else:
            action = torch.tanh(self.actor(obs))
            action = (action + self.explore_noise * torch.randn_like(action)).clamp(-1, 1)
        action = action.half().float()  # what `recording` keeps of it
        everybody = action.transpose(0, 1)
        if self.prey is not None and self.env.num_agents > self.num_learners:
            everybody = torch.cat([everybody, common.policy_action(self.prey, self.obs[-1])[:, None]], 1)
        state = getattr(self.env, "state", None)
        next_obs, rewards = self.env.step(everybody)
        self.buffer[:, self.steps] = transition(self.env, obs, action, rewards, self.pad(next_obs), state)
        self.steps += 1
        self.obs = next_obs

    def update(self) -> None:
        L, C, B, recipe = self.num_learners, self.num_critics, self.batch_size, self.recipe
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.param_groups[0]["lr"] = 1e-3 if self.updates < recipe.lr_drop else 3e-4
        rows = self.buffer.flatten(1, 2)  # [L, steps * num_envs, W]
        index = torch.randint(self.steps * self.num_envs, (C, B)) + torch.arange(L)[:, None] * rows.shape[1]
        rows = rows.flatten(0, 1).index_select(0, index.flatten()).view(L, B, -1)
        obs, action, reward, next_obs, _, *states = rows.split(self.widths, -1)
        state, next_state = states or (None, None)
        with torch.no_grad():
            clip = self.target_noise_clip
            noise = (self.target_noise * torch.randn_like(action)).clamp(-clip, clip)
            next_action = (torch.tanh(self.target_actor(next_obs)) + noise).clamp(-1, 1)
            next_q = self.q(self.target_critic, next_obs, next_state, next_action).amin(1)
            target = recipe.reward_scale * reward[:C, :, 0] + recipe.gamma * next_q  # a time limit is no terminal state
        loss = (self.q(self.critic, obs, state, action) - target[:, None]).square().mean(-1).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.updates += 1
        if self.updates % 2 == 0:  # delayed policy updates
            pre_tanh = self.actor(obs)
            q = self.q(self.critic, obs, state, torch.tanh(pre_tanh))[:, 0]
            loss = (self.action_penalty * pre_tanh.square().mean((1, 2)) - C / L * q.mean(1)).sum()
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
            soft_update(self.target_actor, self.actor, recipe.rho)
            soft_update(self.target_critic, self.critic, recipe.rho)

    def train(self, updates: int, bar: tqdm) -> None:
        for _ in range(updates):
            while self.steps < self.recipe.warmup_steps:
                self.environment_step()
            self.environment_step()
            self.update()
            bar.update()

    def policies(self) -> list[dict[str, Tensor]]:
        return unstack(self.actor, self.obs_sizes)

    def recording(self, steps: int) -> Tensor:
        """The actions of the whole episodes among the first `steps`, half precision, [T, E, L, A]: see `replay`."""
        whole = steps // self.env.episode_steps * self.env.episode_steps
        actions = self.buffer[:, :whole, :, self.obs_size : self.obs_size + self.action_size]
        return actions.permute(1, 2, 0, 3).half().contiguous()

    def save(self, path: Path, **more) -> None:
        """Write everything that going on bit for bit needs. Robots only, between two episodes."""
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state |= {"steps": self.steps, "updates": self.updates, "rng": torch.get_rng_state(), **more}
        state["env"] = self.env.random_state()
        state["buffer"] = self.buffer[:, : self.steps].clone()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> dict:
        """Go on from what `save` wrote; returns it."""
        state = common.load_torch(path)
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.steps, self.updates = state["steps"], state["updates"]
        self.buffer[:, : self.steps] = state["buffer"]
        self.env.set_random_state(state["env"])
        torch.set_rng_state(state["rng"])
        return state


# --------------------------------------------------------------------------------------------------------------------
# Roll-outs


def behave(env, policies, generator: torch.Generator):
    """Observations and step -> actions [E, n, A]: one policy (state dict) per controlled agent, with Gaussian noise of
    ACTION_NOISE; uniformly random ones where `policies` is None."""
    n, size = env.num_controlled, (env.num_envs, env.num_controlled, env.action_size)

    def act(obs, step):
        if policies is None:
            return torch.rand(size, generator=generator) * 2 - 1
        action = torch.stack([common.policy_action(policies[i], obs[i]) for i in range(n)], 1)
        return (action + ACTION_NOISE * torch.randn(size, generator=generator)).clamp(-1, 1)

    return act


@torch.no_grad()
def rollout(env, act, prey) -> tuple[Tensor, Tensor]:
    """One episode in every world.

    Args:
        act: all agents' observations and the step -> the controlled agents' actions [E, n, A].
        prey: its state dict, or None where there is none.

    Returns:
        rows [n, T, W] of transitions, one episode after the other, columns as `row_widths` says; the episodes' lengths
        [E], shorter than the limit where a robot has fallen.
    """
    n, E = env.num_controlled, env.num_envs
    obs, steps, going = env.reset(), [], []
    for step in range(env.episode_steps):
        action = act(obs, step)
        everybody = action if prey is None else torch.cat([action, common.policy_action(prey, obs[n])[:, None]], 1)
        state, fallen = getattr(env, "state", None), getattr(env, "terminated", np.zeros(E, bool))
        next_obs, rewards = env.step(everybody)
        rows = transition(env, torch.stack(obs[:n]), action.transpose(0, 1), rewards, torch.stack(next_obs[:n]), state)
        steps.append(rows)
        going.append(~torch.from_numpy(fallen))
        obs = next_obs
        if getattr(env, "terminated", fallen).all():
            break
    going = torch.stack(going, 1)  # [E, steps]
    return torch.stack(steps, 2)[:, going], going.sum(1)


def team_returns(rows: Tensor, lengths: Tensor, reward_column: int) -> Tensor:
    """Episode returns of the team, [episodes]: mean over agents of the summed rewards."""
    episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.zeros(len(lengths)).index_add_(0, episode, rows[:, :, reward_column].mean(0))


def level(scenario: str, policies, prey) -> float:
    """Mean return of policies with the data sets' action noise, on the same episodes every time."""
    env = make_env(scenario, RECIPES[scenario].level_episodes, seed=1)
    rows, lengths = rollout(env, behave(env, policies, torch.Generator().manual_seed(1)), prey)
    return team_returns(rows, lengths, env.obs_size + env.action_size).mean().item()


# --------------------------------------------------------------------------------------------------------------------
# Behaviour policies


def train_to(td3: TD3, scenario: str, target: float, max_updates: int, bar: tqdm, checkpoint=None) -> float:
    """Train until the policies' level reaches `target` or `max_updates` have been made; returns the level."""
    while True:
        if checkpoint is not None:
            checkpoint()
        td3.train(RECIPES[scenario].level_interval, bar)
        reached = level(scenario, td3.policies(), td3.prey)
        bar.set_postfix_str(f"return {reached:.1f} of {target:.1f}")
        if reached >= target or td3.updates >= max_updates:
            return reached


def train_behaviour(scenario: str, seed: int, training_dir: str | Path = "training") -> dict:
    """Train prey, medium and expert policies from scratch: the contents of `pretrained/<scenario>.pt`.

    Robots take long. Every 10,000 updates they leave a checkpoint in `training_dir`, and a run that was interrupted
    goes on from it, bit for bit.
    """
    recipe, prey = RECIPES[scenario], None
    path = Path(training_dir) / f"{scenario}-seed{seed}.pt"
    with tqdm(desc=f"train {scenario}", unit="update", dynamic_ncols=True) as bar:
        if recipe.prey_updates:
            together = TD3(scenario, None, recipe.prey_updates, seed)
            together.train(recipe.prey_updates, bar)
            prey = together.policies()[-1]
        td3 = TD3(scenario, prey, recipe.expert_updates, seed)
        found = {"levels": {}, "policies": {}, "steps": {}}
        if path.exists():
            found = td3.load(path)["found"]
            bar.update(td3.updates)

        def checkpoint():
            if scenario not in SCENARIOS and td3.updates and td3.updates % 10_000 == 0:
                td3.save(path, found=found)

        for name in ("medium", "expert"):
            if name not in found["levels"]:
                reached = train_to(td3, scenario, recipe.published[name], recipe.expert_updates, bar, checkpoint)
                found["levels"][name], found["steps"][name] = reached, td3.steps
                found["policies"][name] = [{"policy": p} for p in td3.policies()]
    path.unlink(missing_ok=True)
    frozen = [] if prey is None else [{"policy": prey}]
    return {
        "agent_params": found["policies"]["expert"] + frozen,
        "medium": found["policies"]["medium"],
        "levels": found["levels"],
        "seed": seed,
        "replay": {"actions": td3.recording(found["steps"]["medium"]), "seed": seed},
    }


def load_behaviour(pretrained_dir: str | Path, scenario: str) -> dict:
    """What `<pretrained_dir>/<scenario>.pt` holds: policies "medium" and "expert", "prey" and "replay", TD3's actions
    and its seed.

    Raises:
        UserError: missing, unreadable or of another layout.
    """
    path = Path(pretrained_dir) / f"{scenario}.pt"
    checkpoint, env = common.load_torch(path), make_env(scenario, 1, 0)
    n = env.num_controlled
    try:
        everybody = [entry["policy"] for entry in checkpoint["agent_params"]]
        medium = [entry["policy"] for entry in checkpoint["medium"]]
        for policies in (everybody, medium + everybody[n:]):
            for policy, size in zip(policies, env.obs_sizes, strict=True):
                common.policy_action(policy, torch.zeros(1, size))
        prey, replay = everybody[n] if env.num_agents > n else None, checkpoint["replay"]
        steps, worlds, *action_shape = replay["actions"].shape
        whole = steps * worlds > 0 and steps % env.episode_steps == 0
        if not whole or action_shape != [n, env.action_size] or not isinstance(replay["seed"], int):
            raise ValueError
        return {"prey": prey, "expert": everybody[:n], "medium": medium, "replay": replay}
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: not behaviour policies of {scenario}; retrain them with --train") from None


# --------------------------------------------------------------------------------------------------------------------
# Data sets


def replay(scenario: str, behaviour: dict):
    """Yield the replay buffer of TD3 up to the medium level as blocks of episodes, as `rollout` returns them.

    The recorded actions from the first states of TD3's own seed are the same episodes again, but for rounding.
    """
    recording = behaviour["replay"]["actions"]
    env = make_env(scenario, recording.shape[1], behaviour["replay"]["seed"])
    for actions in recording.float().split(env.episode_steps):
        yield rollout(env, lambda obs, step, actions=actions: actions[step], behaviour["prey"])


BLOCK = 25  # robots' episodes that one core rolls out together


@cache
def robots(scenario: str, num_envs: int):
    """The robots of one core, made once."""
    return make_env(scenario, num_envs, 0)


def rollout_block(scenario: str, num_envs: int, seed: tuple[int, ...], policies) -> tuple[Tensor, Tensor]:
    """One episode of each of `num_envs` robots, as `rollout` returns it: a piece of work for one core."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    env = robots(scenario, num_envs)
    env.seed(seed)
    return rollout(env, behave(env, policies, generator), None)


def robot_rollouts(scenario: str, policies, seed: tuple[int, ...], num_transitions: int):
    """Yield blocks of episodes, at least `num_transitions` in all, the same on any number of cores.

    On all of them if there is more than a block to do.
    """
    steps = make_env(scenario, 1, 0).episode_steps
    num_envs = min(BLOCK, -(-num_transitions // steps))
    work = ((scenario, num_envs, (*seed, block), policies) for block in count())
    if num_transitions <= BLOCK * steps:
        yield from starmap(rollout_block, work)
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    pending, left, expected = deque(), num_transitions, num_envs * steps
    with pool:
        while left > 0:
            while not pending or (len(pending) <= os.cpu_count() and len(pending) * expected < left):
                pending.append(pool.submit(rollout_block, *next(work)))
            rows, lengths = pending.popleft().result()
            expected = rows.shape[1]  # robots may fall early
            left -= expected
            yield rows, lengths


def whole_episodes(blocks, num_transitions: int):
    """Cut blocks of rows and lengths off before the first episode with which there were more than `num_transitions`."""
    for rows, lengths in blocks:
        fit = lengths[lengths.cumsum(0) <= num_transitions]
        yield rows[:, : fit.sum()], fit
        if len(fit) < len(lengths):
            return
        num_transitions -= fit.sum()
        if num_transitions == 0:
            return


def make_rows(scenario: str, dataset: str, behaviour: dict, num_transitions: int, seed: int):
    """Yield a data set's transitions in blocks of whole episodes, as `rollout` returns them."""
    if dataset == "medium-replay":
        blocks, length = replay(scenario, behaviour), make_env(scenario, 1, 0).episode_steps
        rows = torch.cat([rows for rows, _ in blocks], 1).unflatten(1, (-1, length))
        if rows.shape[1] > num_transitions // length:  # thin it out evenly: its policies improve from first to last
            rows = rows[:, torch.linspace(0, rows.shape[1] - 1, num_transitions // length).long()]
        yield rows.flatten(1, 2), torch.full((rows.shape[1],), length)
        return
    sources = dataset.split("-")  # the two halves of a mixture
    if scenario in SCENARIOS:
        env = make_env(scenario, min(1_000, num_transitions // EPISODE_STEPS), seed)
        generator = torch.Generator().manual_seed(seed)
    for i, source in enumerate(sources):
        if scenario in SCENARIOS:
            act = behave(env, behaviour.get(source), generator)
            blocks = (rollout(env, act, behaviour["prey"]) for _ in count())
            share = (num_transitions // EPISODE_STEPS + i) // len(sources) * EPISODE_STEPS
        else:
            share = num_transitions // len(sources)
            blocks = robot_rollouts(scenario, behaviour.get(source), (seed, DATASETS.index(source)), share)
        yield from whole_episodes(blocks, share)


def write_arrays(folder: Path, widths: dict[str, int], blocks, num_transitions: int, bar: tqdm) -> dict:
    """Write blocks of rows as the layout's .npy files; returns what metadata.json says of the contents."""
    arrays, returns, done = None, [], 0
    for rows, lengths in blocks:
        n, T, _ = rows.shape
        if arrays is None:
            arrays = {name: np.zeros((n, num_transitions, width), np.float32) for name, width in widths.items()}
        for name, part in zip(widths, rows.split(list(widths.values()), -1), strict=True):
            arrays[name][:, done : done + T] = part.numpy()
        returns.append(team_returns(rows, lengths, widths["obs"] + widths["acs"]))
        done += T
        bar.update(T)
    bar.total = done  # medium-replay ends before num_transitions
    bar.refresh()
    checksums = {}
    for name, array in arrays.items():
        for agent, values in enumerate(array[:, :done]):
            file = folder / f"{name}_{agent}.npy"
            np.save(file, values[:, 0] if name in ("rews", "dones") else values)
            checksums[file.name] = common.file_checksum(file)
    returns = torch.cat(returns)
    return {
        "transitions": done,
        "episodes": len(returns),
        "return_mean": returns.mean().item(),
        "return_std": returns.std().item(),
        "return_max": returns.max().item(),
        "checksums": checksums,
    }


def collect(
    scenario: str,
    dataset: str,
    data_dir: str | Path = "datasets",
    num_transitions: int = 1_000_000,
    seed: int = 0,
    overwrite: bool = False,
    pretrained_dir: str | Path = common.ROOT / "pretrained",
) -> dict:
    """Make one data set, in a temporary folder that is renamed when it is complete. Returns its metadata.

    Raises:
        UserError: it exists and `overwrite` is off, behaviour policies are missing, or the disk refuses.
    """
    if scenario not in RECIPES:  # a robot with another partition is named like HalfCheetah-6x1-obsk1
        common.check_choice("--scenario", scenario.partition("-")[0], (*SCENARIOS, *ROBOTS))
    common.check_choice("--dataset", dataset, DATASETS)
    if scenario not in RECIPES and dataset != "random":
        raise UserError(
            f"{common.dataset_path(data_dir, scenario, dataset)}: missing, and there are no behaviour policies of "
            f"{scenario} to make it with, only random data; put data of your own there"
        )
    env = make_env(scenario, 1, 0)
    if num_transitions < 2 * env.episode_steps:
        raise UserError(f"--num-transitions {num_transitions}: must be at least {2 * env.episode_steps}, two episodes")
    num_transitions = num_transitions // env.episode_steps * env.episode_steps
    path = common.dataset_path(data_dir, scenario, dataset)
    target = path.parent
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists; pass --overwrite to replace it")
    robots_random = scenario not in SCENARIOS and dataset == "random"  # takes no policies
    behaviour = {"prey": None} if robots_random else load_behaviour(pretrained_dir, scenario)
    temporary = target.with_name(f".{dataset}-{os.getpid()}-{time.time_ns()}.tmp")
    replaced = temporary.with_suffix(".old")
    for left in (*target.parent.glob(".*.tmp"), *target.parent.glob(".*.old")):
        with suppress(FileNotFoundError):  # of a process that has just ended
            if time.time() - left.stat().st_mtime > 86_400:  # no data set takes a day: a killed process left it
                shutil.rmtree(left, ignore_errors=True)
    try:
        (temporary / path.name).mkdir(parents=True)
        with tqdm(desc=f"{scenario}/{dataset}", total=num_transitions, unit="step", unit_scale=True) as bar:
            blocks = make_rows(scenario, dataset, behaviour, num_transitions, seed)
            contents = write_arrays(temporary / path.name, row_widths(env), blocks, num_transitions, bar)
        metadata = {
            "scenario": scenario,
            "dataset": dataset,
            **contents,
            "seed": seed,
            "action_noise": ACTION_NOISE,
            "prey_checksum": behaviour["prey"] and common.policy_checksum(behaviour["prey"]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        }
        (temporary / path.name / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        if overwrite and target.exists():
            os.rename(target, replaced)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.exists():
                raise
            print(f"{target}: another process has just made it; keeping that one")
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}; free some space or choose another --data-dir") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return metadata


def main() -> None:
    args = common.parse(Args, __doc__)
    common.check_options(args)
    for scenario in args.scenario:
        choices = RECIPES if args.train else (*SCENARIOS, *ROBOTS)
        common.check_choice("--scenario", scenario, choices)
    for dataset in args.dataset:
        common.check_choice("--dataset", dataset, DATASETS)
    if args.train:
        for scenario in args.scenario:
            path = Path(args.pretrained_dir) / f"{scenario}.pt"
            if path.exists() and not args.overwrite:
                raise UserError(f"{path}: exists; pass --overwrite to replace it, or another --pretrained-dir")
            behaviour = train_behaviour(scenario, args.seed)
            with common.disk_errors(path, "free some space or choose another --pretrained-dir"):
                path.parent.mkdir(parents=True, exist_ok=True)
                common.save_torch(path, behaviour)
    made = []
    for scenario in args.scenario:
        for dataset in args.dataset:
            target = common.dataset_path(args.data_dir, scenario, dataset)
            if target.parent.exists() and not args.overwrite:
                print(f"{target.parent}: exists, kept (--overwrite replaces it)")
                continue
            sizes = args.num_transitions, args.seed, args.overwrite, args.pretrained_dir
            made.append(collect(scenario, dataset, args.data_dir, *sizes))
    print_table(made)


def print_table(made: list[dict]) -> None:
    """What was made, next to the published data sets."""
    if not made:
        return
    print(f"\n{'data set':<28}{'transitions':>12}{'mean':>9}{'std':>8}{'max':>8}{'published':>11}")
    for m in made:
        recipe = RECIPES.get(m["scenario"])
        published = recipe and recipe.published.get(m["dataset"])
        print(
            f"{m['scenario'] + '/' + m['dataset']:<28}{m['transitions']:>12,}{m['return_mean']:>9.1f}"
            f"{m['return_std']:>8.1f}{m['return_max']:>8.1f}{'-' if published is None else published:>11}"
        )


if __name__ == "__main__":
    common.run(main)
