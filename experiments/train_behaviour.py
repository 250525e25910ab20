"""Train the behaviour policies of the datasets from scratch: independent TD3 learners.

    python experiments/train_behaviour.py --scenario simple_tag --output my_pretrained
    python collect_datasets.py --scenario simple_tag --pretrained-dir my_pretrained --data-dir my_datasets

Every agent is an independent TD3 learner (Fujimoto et al. 2018) that sees its own observation and reward. In
predator-prey and World the prey is trained together with the predators first and then frozen; predators trained from
scratch against it pass the medium level and go on to the expert level. The half cheetah's agents see their own joints
alone, too little for a critic of their own: theirs is one that sees the whole robot and all actions.

`pretrained/` holds what this script wrote on one machine; HalfCheetah's file joins two runs, chosen as
docs/halfcheetah-data.md says. Rounding decides when a run reaches a level, so every machine
gets other policies.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from collect_datasets import PUBLISHED, behaviour_actions, behaviour_env, rollout, team_returns
from dom2_mpe import StackedLinear, soft_update
from particle_env import SCENARIOS, ParticleEnv
from utils.options import Name, Options, Seed, lines
from utils.program import UserError, disk_errors, load_torch, program, save_torch


@dataclass
class Args(Options):
    scenario: Literal["simple_spread", "simple_tag", "simple_world", "landmarks6", "HalfCheetah"]
    """the scenario"""
    output: Name = "pretrained"
    """folder of the result, <scenario>.pt"""
    seed: Seed = 0
    """seed of everything random"""
    overwrite: bool = False
    """replace policies that exist"""


@dataclass(frozen=True)
class Recipe:
    """How one scenario's behaviour policies are trained. Updates were chosen for the published datasets' returns."""

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


ROBOT = dict(gamma=0.99, rho=0.005, reward_scale=1.0, team_critic=True, lr_drop=50_000)
RECIPES = {
    "simple_spread": Recipe(0, 45_000, (128, 256)),
    "simple_tag": Recipe(4_000, 30_000, (64, 64)),
    "simple_world": Recipe(2_750, 30_000, (64, 64)),
    "landmarks6": Recipe(0, 10_000, (48, 128)),
    "HalfCheetah": Recipe(0, 110_000, (64, 256), warmup_steps=1000, level_interval=1000, level_episodes=16, **ROBOT),
}


class EveryAgent:
    """A ParticleEnv behind the interface of TeamEnv with all its agents, the prey too; smaller observations are padded
    with zeros."""

    state = None

    def __init__(self, scenario: str, num_envs: int, seed: int):
        self.world = ParticleEnv(scenario, num_envs, seed=seed)
        self.num_envs, self.num_agents, self.obs_sizes = num_envs, self.world.num_agents, self.world.obs_sizes
        self.obs_size, self.action_size, self.episode_steps = max(self.obs_sizes), 2, 25

    def pad(self, obs: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(o, (0, self.obs_size - o.shape[1])) for o in obs], 1)

    def reset(self) -> Tensor:
        return self.pad(self.world.reset())

    def step(self, actions: Tensor):
        obs, rewards = self.world.step(actions)
        return self.pad(obs), rewards, torch.zeros(self.num_envs, dtype=torch.bool)


class StackedMLP(nn.Module):
    """Three linear layers fc1, fc2, fc3 with ReLU between, one network per learner: [L, B, in] -> [L, B, out]."""

    def __init__(self, num_learners: int, in_size: int, hidden: int, out_size: int):
        super().__init__()
        sizes = (in_size, hidden, hidden, out_size)
        self.fc1, self.fc2, self.fc3 = (StackedLinear(num_learners, i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def unstack(actor: StackedMLP, obs_sizes) -> list[dict[str, Tensor]]:
    """One `policy_action` state dict per learner, cut to its own observation size."""
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
    """Independent TD3 learners for the controlled agents of a scenario, or for all of them.

    `train(updates)` goes on from where it stopped. One environment step of 16 worlds precedes every update. No episode
    has a terminal state.

    Args:
        prey: state dict of a frozen prey, or None. together: whether the prey is one of the learners.
    """

    num_envs, batch_size = 16, 256
    explore_noise, target_noise, target_noise_clip = 0.2, 0.2, 0.5
    action_penalty = 1e-3  # on the squared pre-tanh action, against saturation
    PARTS = ("actor", "target_actor", "critic", "target_critic", "actor_optimizer", "critic_optimizer")

    def __init__(self, scenario: str, prey: dict[str, Tensor] | None, max_updates: int, seed: int, together=False):
        torch.manual_seed(seed)
        self.recipe = RECIPES[scenario]
        worlds = scenario, self.num_envs, seed
        self.env = EveryAgent(*worlds) if together else behaviour_env(*worlds, prey)
        L = self.num_learners = self.env.num_agents
        self.obs_sizes = self.env.obs_sizes if together else (self.env.obs_size,) * L
        d, A = self.env.obs_size, self.env.action_size
        actor_hidden, critic_hidden = self.recipe.hidden
        self.actor, self.target_actor = (StackedMLP(L, d, actor_hidden, A) for _ in range(2))
        state_size = 0 if self.env.state is None else self.env.state.shape[1]
        self.num_critics, seen = (1, state_size + L * A) if self.recipe.team_critic else (L, d + A)
        self.critic, self.target_critic = (StackedMLP(2 * self.num_critics, seen, critic_hidden, 1) for _ in range(2))
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 1e-3, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), 1e-3, fused=True)
        episodes = -(-(self.recipe.warmup_steps + max_updates) // self.env.episode_steps)
        self.widths = [d, A, 1, d, state_size, state_size]  # obs, action, reward, next_obs, state, next_state
        self.buffer = torch.zeros(L, episodes * self.env.episode_steps, self.num_envs, sum(self.widths))
        self.steps = self.updates = 0

    def q(self, critic: StackedMLP, obs: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """Twin Q: obs [L, B, d], state [L, B, s], action [L, B, A] -> [critics, 2, B]."""
        seen = [state[:1], *action.split(1)] if self.recipe.team_critic else [obs, action]
        return critic(torch.cat(seen, -1).repeat_interleave(2, 0)).view(self.num_critics, 2, -1)

    @torch.no_grad()
    def environment_step(self) -> None:
        if self.steps % self.env.episode_steps == 0:
            self.obs = self.env.reset()
        obs = self.obs.transpose(0, 1)  # [L, E, d]
        if self.steps < self.recipe.warmup_steps:
            action = torch.rand(self.num_learners, self.num_envs, self.env.action_size) * 2 - 1
        else:
            action = torch.tanh(self.actor(obs))
            action = (action + self.explore_noise * torch.randn_like(action)).clamp(-1, 1)
        action = action.half().float()  # what `recording` keeps of it
        state = self.env.state
        self.obs, rewards, _ = self.env.step(action.transpose(0, 1))
        row = [obs, action, rewards.T[..., None], self.obs.transpose(0, 1)]
        if state is not None:
            row += [x.expand(self.num_learners, -1, -1) for x in (state, self.env.state)]
        self.buffer[:, self.steps] = torch.cat(row, -1)
        self.steps += 1

    def update(self) -> None:
        L, C, B, recipe = self.num_learners, self.num_critics, self.batch_size, self.recipe
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.param_groups[0]["lr"] = 1e-3 if self.updates < recipe.lr_drop else 3e-4
        rows = self.buffer.flatten(1, 2)  # [L, steps * num_envs, W]
        index = torch.randint(self.steps * self.num_envs, (C, B)) + torch.arange(L)[:, None] * rows.shape[1]
        rows = rows.flatten(0, 1).index_select(0, index.flatten()).view(L, B, -1)
        obs, action, reward, next_obs, state, next_state = rows.split(self.widths, -1)
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
        """The actions of the whole episodes among the first `steps`, half precision, [T, E, L, A]."""
        whole = steps // self.env.episode_steps * self.env.episode_steps
        d, A = self.env.obs_size, self.env.action_size
        return self.buffer[:, :whole, :, d : d + A].permute(1, 2, 0, 3).half().contiguous()

    def save(self, path: Path, found: dict) -> None:
        """Write all that continuing bit for bit needs. MuJoCo only, between two episodes."""
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state |= {"steps": self.steps, "updates": self.updates, "rng": torch.get_rng_state(), "found": found}
        state |= {"env": self.env.random_state(), "buffer": self.buffer[:, : self.steps].clone()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_torch(path, state)

    def load(self, path: Path) -> dict:
        """Continue from what `save` wrote; returns its `found`."""
        state = load_torch(path)
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.steps, self.updates = state["steps"], state["updates"]
        self.buffer[:, : self.steps] = state["buffer"]
        self.env.set_random_state(state["env"])
        torch.set_rng_state(state["rng"])
        return state["found"]


def mean_return(scenario: str, policies, prey) -> float:
    """Mean return of policies with action noise of 0.1, on the same episodes every time."""
    env = behaviour_env(scenario, RECIPES[scenario].level_episodes, 1, prey)
    act = behaviour_actions(env, policies, torch.Generator().manual_seed(1), 0.1)
    return team_returns(*rollout(env, act)).mean().item()


def train_to(td3: TD3, scenario: str, prey, target: float, bar: tqdm, checkpoint) -> float:
    """Train until the policies' level reaches `target` or the recipe's updates have been made; returns the level."""
    while True:
        checkpoint()
        td3.train(td3.recipe.level_interval, bar)
        reached = mean_return(scenario, td3.policies(), prey)
        bar.set_postfix_str(f"return {reached:.1f} of {target:.1f}")
        if reached >= target or td3.updates >= td3.recipe.expert_updates:
            return reached


def train_behaviour(scenario: str, seed: int) -> dict:
    """Train prey, medium and expert policies from scratch: the contents of `pretrained/<scenario>.pt`.

    MuJoCo takes long. Every 10,000 updates a checkpoint is written to training/, and a run that was interrupted
    continues from it, bit for bit.
    """
    recipe, prey = RECIPES[scenario], None
    path = Path("training") / f"{scenario}-seed{seed}.pt"
    with tqdm(desc=f"train {scenario}", unit="update", dynamic_ncols=True) as bar:
        if recipe.prey_updates:
            together = TD3(scenario, None, recipe.prey_updates, seed, together=True)
            together.train(recipe.prey_updates, bar)
            prey = together.policies()[-1]
        td3, found = TD3(scenario, prey, recipe.expert_updates, seed), {"levels": {}, "policies": {}, "steps": {}}
        if path.exists():
            found = td3.load(path)
            bar.update(td3.updates)

        def checkpoint():
            if scenario not in SCENARIOS and td3.updates and td3.updates % 10_000 == 0:
                td3.save(path, found)

        for name in ("medium", "expert"):
            if name not in found["levels"]:
                found["levels"][name] = train_to(td3, scenario, prey, PUBLISHED[scenario][name], bar, checkpoint)
                found["steps"][name] = td3.steps
                found["policies"][name] = [{"policy": p} for p in td3.policies()]
    path.unlink(missing_ok=True)
    return {
        "agent_params": found["policies"]["expert"] + ([] if prey is None else [{"policy": prey}]),
        "medium": found["policies"]["medium"],
        "levels": found["levels"],
        "seed": seed,
        "replay": {"actions": td3.recording(found["steps"]["medium"]), "seed": seed},
    }


def main() -> None:
    args = tyro.cli(Args, description=lines(__doc__))
    path = Path(args.output) / f"{args.scenario}.pt"
    if path.exists() and not args.overwrite:
        raise UserError(f"{path}: exists; pass --overwrite to replace it, or another --output")
    behaviour = train_behaviour(args.scenario, args.seed)
    with disk_errors(path, "free some space or choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_torch(path, behaviour)


if __name__ == "__main__":
    program(main)
