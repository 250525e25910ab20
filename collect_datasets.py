"""Make the particle data sets: behaviour policies by independent TD3, then roll-outs.

    python collect_datasets.py                                              # all 18 data sets, 10^6 transitions each
    python collect_datasets.py --scenario simple_tag --dataset random expert
    python collect_datasets.py --train --overwrite --scenario simple_tag    # retrain the behaviour policies first

A data set is a folder `datasets/<scenario>/<dataset>/seed_0_data` of plain .npy arrays, one per agent and quantity
(`obs_i`, `acs_i`, `rews_i`, `next_obs_i`, `dones_i`, float32, whole episodes one after the other), the layout of the
OMAR data sets, plus `metadata.json`. Only the controlled agents are stored; the prey of predator-prey and World is part
of the environment.

Behaviour policies: every agent is an independent TD3 learner (Fujimoto et al. 2018) that sees its own observation and
reward. In predator-prey and World the prey is trained together with the predators first and then frozen; predators
trained from scratch against it pass the medium level and go on to the expert level. `pretrained/<scenario>.pt` holds
the prey, the expert policies (`agent_params`, as in OMAR's files) and the medium ones.

    random          uniformly random actions
    medium, expert  the policies of that level, with Gaussian noise of standard deviation 0.1 on their actions
    medium-replay   the replay buffer of a TD3 run up to the moment its policies reach the medium level
    random-medium, medium-expert   half and half, by whole episodes
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import DATASETS, FILES, UserError
from dom2_mpe import StackedLinear, soft_update
from particle_env import EPISODE_STEPS, SCENARIOS, ParticleEnv


@dataclass
class Args:
    scenario: tuple[str, ...] = ("simple_spread", "simple_tag", "simple_world")
    """which scenarios: those three, or landmarks6"""
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
}
ACTION_NOISE = 0.1  # of the medium and expert data sets


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

    `train(updates)` goes on from where it stopped. One environment step of 16 worlds precedes every update.

    Args:
        prey: state dict of a frozen prey, or None: then the prey (if any) is one of the learners.
    """

    num_envs, batch_size = 16, 256
    lr, rho, gamma, reward_scale = 1e-3, 0.01, 0.95, 0.1
    warmup_steps = 320  # of uniformly random actions: 20 updates' worth of episodes before learning starts
    explore_noise, target_noise, target_noise_clip = 0.2, 0.2, 0.5
    action_penalty = 1e-3  # on the squared pre-tanh action, against saturation

    def __init__(self, scenario: str, prey: dict[str, Tensor] | None, max_updates: int, seed: int):
        torch.manual_seed(seed)
        self.env = ParticleEnv(scenario, self.num_envs, seed=seed)
        self.prey = prey
        L = self.num_learners = self.env.num_agents if prey is None else self.env.spec.num_controlled
        self.obs_sizes = self.env.obs_sizes[:L]
        d = self.obs_size = max(self.obs_sizes)  # smaller observations are padded with zeros
        actor_hidden, critic_hidden = RECIPES[scenario].hidden
        self.actor, self.target_actor = (StackedMLP(L, d, actor_hidden, 2) for _ in range(2))
        self.critic, self.target_critic = (StackedMLP(2 * L, d + 2, critic_hidden, 1) for _ in range(2))
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), self.lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), self.lr, fused=True)
        steps = self.warmup_steps + max_updates
        steps = -(-steps // EPISODE_STEPS) * EPISODE_STEPS
        self.buffer = torch.zeros(L, steps, self.num_envs, 2 * d + 3)  # obs, action, reward, next_obs
        self.steps = self.updates = 0
        self.obs = self.env.reset()

    def q(self, critic: StackedMLP, obs: Tensor, action: Tensor) -> Tensor:
        """Twin Q: [L, B, d], [L, B, 2] -> [L, 2, B]."""
        x = torch.cat([obs, action], -1).repeat_interleave(2, 0)
        return critic(x).view(self.num_learners, 2, -1)

    def pad(self, obs: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(o, (0, self.obs_size - o.shape[1])) for o in obs[: self.num_learners]])

    @torch.no_grad()
    def environment_step(self) -> None:
        obs = self.pad(self.obs)
        if self.steps < self.warmup_steps:
            action = torch.rand(self.num_learners, self.num_envs, 2) * 2 - 1
        else:
            action = torch.tanh(self.actor(obs))
            action = (action + self.explore_noise * torch.randn_like(action)).clamp(-1, 1)
        everybody = action.transpose(0, 1)
        if self.prey is not None and self.env.num_agents > self.num_learners:
            everybody = torch.cat([everybody, common.policy_action(self.prey, self.obs[-1])[:, None]], 1)
        next_obs, rewards = self.env.step(everybody)
        row = torch.cat([obs, action, rewards.T[: self.num_learners, :, None], self.pad(next_obs)], -1)
        self.buffer[:, self.steps] = row
        self.steps += 1
        self.obs = next_obs if self.steps % EPISODE_STEPS else self.env.reset()

    def update(self) -> None:
        L, B, d = self.num_learners, self.batch_size, self.obs_size
        rows = self.buffer.flatten(1, 2)  # [L, steps * num_envs, W]
        index = torch.randint(self.steps * self.num_envs, (L, B)) + torch.arange(L)[:, None] * rows.shape[1]
        rows = rows.flatten(0, 1).index_select(0, index.flatten()).view(L, B, -1)
        obs, action, reward, next_obs = rows.split([d, 2, 1, d], -1)
        with torch.no_grad():
            clip = self.target_noise_clip
            noise = (self.target_noise * torch.randn_like(action)).clamp(-clip, clip)
            next_action = (torch.tanh(self.target_actor(next_obs)) + noise).clamp(-1, 1)
            next_q = self.q(self.target_critic, next_obs, next_action).amin(1)
            target = self.reward_scale * reward[..., 0] + self.gamma * next_q  # the time limit is no terminal state
        loss = (self.q(self.critic, obs, action) - target[:, None]).square().mean(-1).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.updates += 1
        if self.updates % 2 == 0:  # delayed policy updates
            pre_tanh = self.actor(obs)
            q = self.q(self.critic, obs, torch.tanh(pre_tanh))[:, 0]
            loss = (self.action_penalty * pre_tanh.square().mean((1, 2)) - q.mean(1)).sum()
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
            soft_update(self.target_actor, self.actor, self.rho)
            soft_update(self.target_critic, self.critic, self.rho)

    def train(self, updates: int, bar: tqdm) -> None:
        for _ in range(updates):
            while self.steps < self.warmup_steps:
                self.environment_step()
            self.environment_step()
            self.update()
            bar.update()

    def policies(self) -> list[dict[str, Tensor]]:
        return unstack(self.actor, self.obs_sizes)

    def replay(self) -> Tensor:
        """What the buffer holds of whole episodes, one after the other: [L, T, W]."""
        episodes = self.steps // EPISODE_STEPS
        rows = self.buffer[:, : episodes * EPISODE_STEPS].unflatten(1, (episodes, EPISODE_STEPS))
        return rows.transpose(2, 3).flatten(1, 3)  # [L, episodes, E, 25, W] -> [L, T, W]


# --------------------------------------------------------------------------------------------------------------------
# Roll-outs


@torch.no_grad()
def rollout(env: ParticleEnv, generator: torch.Generator, policies, prey) -> Tensor:
    """Transitions of one episode in every world: [n, E * 25, W] with rows obs, action, reward, next_obs.

    Args:
        policies: one state dict per controlled agent, acting with Gaussian noise of ACTION_NOISE; None for uniformly
            random actions. prey: its state dict, or None where there is none.
    """
    n, E = env.spec.num_controlled, env.num_envs
    obs, steps = env.reset(), []
    for _ in range(EPISODE_STEPS):
        if policies is None:
            action = torch.rand(E, n, 2, generator=generator) * 2 - 1
        else:
            action = torch.stack([common.policy_action(policies[i], obs[i]) for i in range(n)], 1)
            action = (action + ACTION_NOISE * torch.randn(E, n, 2, generator=generator)).clamp(-1, 1)
        everybody = action if prey is None else torch.cat([action, common.policy_action(prey, obs[n])[:, None]], 1)
        next_obs, rewards = env.step(everybody)
        parts = [torch.stack(obs[:n]), action.transpose(0, 1), rewards.T[:n, :, None], torch.stack(next_obs[:n])]
        steps.append(torch.cat(parts, -1))
        obs = next_obs
    return torch.stack(steps, 2).flatten(1, 2)  # [n, E, 25, W] -> [n, T, W]


def team_returns(rows: Tensor) -> Tensor:
    """Episode returns of the team, [episodes]: mean over agents of the summed rewards."""
    obs_size = (rows.shape[2] - 3) // 2
    return rows[:, :, obs_size + 2].mean(0).view(-1, EPISODE_STEPS).sum(1)


def level(scenario: str, policies, prey) -> float:
    """Mean return of policies with the data sets' action noise, on the same 400 episodes every time."""
    env = ParticleEnv(scenario, 400, seed=1)
    return team_returns(rollout(env, torch.Generator().manual_seed(1), policies, prey)).mean().item()


# --------------------------------------------------------------------------------------------------------------------
# Behaviour policies


def train_to(td3: TD3, scenario: str, target: float, max_updates: int, bar: tqdm) -> float:
    """Train until the policies' level reaches `target` or `max_updates` have been made; returns the level."""
    while True:
        td3.train(250, bar)
        reached = level(scenario, td3.policies(), td3.prey)
        bar.set_postfix_str(f"return {reached:.1f} of {target:.1f}")
        if reached >= target or td3.updates >= max_updates:
            return reached


def train_behaviour(scenario: str, seed: int) -> dict:
    """Train prey, medium and expert policies from scratch: the contents of `pretrained/<scenario>.pt`."""
    recipe, prey = RECIPES[scenario], None
    with tqdm(desc=f"train {scenario}", unit="update", dynamic_ncols=True) as bar:
        if recipe.prey_updates:
            together = TD3(scenario, None, recipe.prey_updates, seed)
            together.train(recipe.prey_updates, bar)
            prey = together.policies()[-1]
        td3 = TD3(scenario, prey, recipe.expert_updates, seed)
        levels, policies = {}, {}
        for name in ("medium", "expert"):
            levels[name] = train_to(td3, scenario, recipe.published[name], recipe.expert_updates, bar)
            policies[name] = [{"policy": p} for p in td3.policies()]
    frozen = [] if prey is None else [{"policy": prey}]
    return {"agent_params": policies["expert"] + frozen, "medium": policies["medium"], "levels": levels, "seed": seed}


def load_behaviour(pretrained_dir: str | Path, scenario: str) -> dict:
    """Behaviour policies and prey of `<pretrained_dir>/<scenario>.pt`: {"prey", "medium", "expert", "seed"}.

    Raises:
        UserError: missing, unreadable or of another layout.
    """
    path = Path(pretrained_dir) / f"{scenario}.pt"
    checkpoint, spec = common.load_torch(path), SCENARIOS[scenario]
    n = spec.num_controlled
    try:
        everybody = [entry["policy"] for entry in checkpoint["agent_params"]]
        medium = [entry["policy"] for entry in checkpoint["medium"]]
        sizes = ParticleEnv(scenario, 1).obs_sizes
        for policies in (everybody, medium + everybody[n:]):
            for policy, size in zip(policies, sizes, strict=True):
                common.policy_action(policy, torch.zeros(1, size))
        prey = everybody[n] if len(spec.agents) > n else None
        return {"prey": prey, "expert": everybody[:n], "medium": medium, "seed": checkpoint["seed"]}
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: not behaviour policies of {scenario}; retrain them with --train") from None


# --------------------------------------------------------------------------------------------------------------------
# Data sets


def replay_rows(scenario: str, behaviour: dict) -> Tensor:
    """The replay buffer of TD3 (against the frozen prey) when its policies reach the medium level: [n, T, W]."""
    recipe = RECIPES[scenario]
    with tqdm(desc=f"{scenario}/medium-replay: TD3 to the medium level", unit="update", dynamic_ncols=True) as bar:
        td3 = TD3(scenario, behaviour["prey"], recipe.expert_updates, behaviour["seed"])
        train_to(td3, scenario, recipe.published["medium"], recipe.expert_updates, bar)
    return td3.replay()


def make_rows(scenario: str, dataset: str, behaviour: dict, num_episodes: int, seed: int):
    """Yield a data set's transitions in blocks of whole episodes, each [n, T, W]."""
    if dataset == "medium-replay":
        rows = replay_rows(scenario, behaviour).unflatten(1, (-1, EPISODE_STEPS))
        if rows.shape[1] > num_episodes:  # thin it out evenly: its policies improve from first to last
            rows = rows[:, torch.linspace(0, rows.shape[1] - 1, num_episodes).long()]
        yield rows.flatten(1, 2)
        return
    env = ParticleEnv(scenario, min(1_000, num_episodes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    sources = dataset.split("-")  # the two halves of a mixture
    for i, source in enumerate(sources):
        left = (num_episodes + i) // len(sources)
        while left > 0:
            rows = rollout(env, generator, behaviour.get(source), behaviour["prey"])
            yield rows[:, : left * EPISODE_STEPS]
            left -= env.num_envs


def write_arrays(folder: Path, blocks, num_transitions: int, bar: tqdm) -> dict:
    """Write blocks of rows as the layout's .npy files; returns what metadata.json says of the contents."""
    arrays, returns, done = None, [], 0
    for rows in blocks:
        n, T, W = rows.shape
        d = (W - 3) // 2
        if arrays is None:
            sizes = zip(FILES, (d, 2, 1, d, 1), strict=True)
            arrays = {k: np.zeros((n, num_transitions, size), np.float32) for k, size in sizes}
        for name, part in zip(FILES, rows.split([d, 2, 1, d], -1), strict=False):  # dones stay 0: no terminal states
            arrays[name][:, done : done + T] = part.numpy()
        returns.append(team_returns(rows))
        done += T
        bar.update(T)
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
    common.check_choice("--scenario", scenario, RECIPES)
    common.check_choice("--dataset", dataset, DATASETS)
    num_episodes = num_transitions // EPISODE_STEPS
    if num_episodes < 2:
        raise UserError(f"--num-transitions {num_transitions}: must be at least 50, two episodes")
    path = common.dataset_path(data_dir, scenario, dataset)
    target = path.parent
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists; pass --overwrite to replace it")
    behaviour = load_behaviour(pretrained_dir, scenario)
    temporary = target.with_name(f".{dataset}-{os.getpid()}-{time.time_ns()}.tmp")
    replaced = temporary.with_suffix(".old")
    try:
        (temporary / path.name).mkdir(parents=True)
        bar = tqdm(desc=f"{scenario}/{dataset}", total=num_episodes * EPISODE_STEPS, unit="step", unit_scale=True)
        with bar:
            blocks = make_rows(scenario, dataset, behaviour, num_episodes, seed)
            contents = write_arrays(temporary / path.name, blocks, num_episodes * EPISODE_STEPS, bar)
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
        common.check_choice("--scenario", scenario, RECIPES)
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
        published = RECIPES[m["scenario"]].published.get(m["dataset"])
        print(
            f"{m['scenario'] + '/' + m['dataset']:<28}{m['transitions']:>12,}{m['return_mean']:>9.1f}"
            f"{m['return_std']:>8.1f}{m['return_max']:>8.1f}{'-' if published is None else published:>11}"
        )


if __name__ == "__main__":
    common.run(main)
