"""Make the datasets: rollouts of frozen behaviour policies.

    python collect_datasets.py                                              # the particles' 18, 10^6 transitions each
    python collect_datasets.py --scenario simple_tag --dataset random expert
    python collect_datasets.py --scenario HalfCheetah                       # all six

A dataset is a folder `datasets/<scenario>/<dataset>/seed_0_data` of plain .npy arrays, one per agent and quantity
(`obs_i`, `acs_i`, `rews_i`, `next_obs_i`, `dones_i`, float32, whole episodes one after the other), the layout of the
OMAR datasets, plus `metadata.json`. `--seed k` makes another version of it, `seed_k_data`. Only the controlled agents
are stored; the prey of predator-prey and World is part of the environment. MuJoCo tasks also have the whole robot's
`states_i`, `next_states_i`; `dones_i` is 1 where it fell.

    random          uniformly random actions
    medium, expert  the policies of that level, with Gaussian noise on their actions (standard deviation 0.1;
                    HalfCheetah: medium 0.4, expert 0.2)
    medium-replay   the replay buffer of a TD3 run up to the moment its policies reach the medium level
                    (HalfCheetah: up to update 27,000)
    random-medium, medium-expert   half and half, by whole episodes

`pretrained/<scenario>.pt` holds the prey, the expert policies (`agent_params`, as in OMAR's files), the medium ones and
the actions of a TD3 run, from which its replay buffer is made again. experiments/train_behaviour.py makes such a file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, product, starmap
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import common
from common import DATASETS
from own_env import is_own
from particle_env import SCENARIOS, ParticleEnv
from utils.arrays import file_checksum
from utils.frozen import load_behaviour, policy_action, policy_checksum
from utils.options import AT_LEAST_ONE, DatasetName, Name, OptionalWeight, Options, Seed, lines
from utils.program import UserError, program, replaced_folder, usable_cores

# Standard deviation of the noise on the actions of the medium and expert policies (docs/halfcheetah-data.md)
ACTION_NOISE = {("HalfCheetah", "medium"): 0.4, ("HalfCheetah", "expert"): 0.2}  # 0.1 of all others
ARRAYS = ("obs", "acs", "rews", "next_obs", "dones", "states", "next_states")  # the layout's; of robots the last two
BLOCK = 25  # episodes of MuJoCo that one core rolls out together
# Mean returns of version 0 of the published OMAR datasets, the targets of the behaviour policies (HalfCheetah's were
# chosen otherwise, docs/halfcheetah-data.md). A task without a row has no behaviour policies.
PUBLISHED = {
    "simple_spread": {"random": 159.6, "medium-replay": 203.7, "medium": 273.4, "expert": 531.0},
    "simple_tag": {"random": -4.1, "medium-replay": 3.9, "medium": 116.4, "expert": 207.9},
    "simple_world": {"random": -6.8, "medium-replay": 1.2, "medium": 65.9, "expert": 85.2},
    # nothing is published for it: random actions reach 69, TD3 soon 80 and, more and more slowly, 90
    "landmarks6": {"medium": 80.0, "expert": 90.0},
    "HalfCheetah": {"random": -283.0, "medium-replay": 423.0, "medium": 1569.0, "expert": 3339.0},
}


@dataclass
class Args(Options):
    scenario: Annotated[tuple[str, ...], AT_LEAST_ONE] = ("simple_spread", "simple_tag", "simple_world")
    """which scenarios: those three, landmarks6, HalfCheetah or, with random data alone, another MuJoCo task, also with
    another partition or sight, such as HalfCheetah-6x1-obsk1 or Hopper-3x1-obsk2-qpos-qvel"""
    dataset: Annotated[tuple[DatasetName, ...], AT_LEAST_ONE] = DATASETS
    """which datasets of each"""
    num_transitions: int = 1_000_000
    """transitions of each dataset; of medium-replay at most this many, as its buffer holds fewer"""
    data_dir: Name = "datasets"
    """folder of the datasets"""
    seed: Seed = 0
    """seed of the rollouts, and the version: seed i writes seed_i_data"""
    overwrite: bool = False
    """replace datasets that exist"""
    pretrained_dir: Name = str(common.ROOT / "pretrained")
    """folder of the behaviour policies"""
    action_noise: OptionalWeight = None
    """standard deviation of the noise on the actions of medium and expert policies; default: 0.1, of HalfCheetah's 0.4
    and 0.2"""


# --------------------------------------------------------------------------------------------------------------------
# Rollouts. A block of episodes is a dict of arrays [n, T, width], the episodes one after the other, and their lengths.


def behaviour_env(task: str, num_envs: int, seed, prey: dict[str, Tensor] | None):
    """Environments of a task, with its frozen prey."""
    return common.make_env(task, num_envs, seed=seed, prey=prey and partial(policy_action, prey))


def behaviour_actions(env, policies, generator: torch.Generator, action_noise: float):
    """Observations [E, n, d] and step -> actions [E, n, A]: one frozen policy (state dict) per agent, with Gaussian
    noise; uniformly random ones where `policies` is None."""
    size = (env.num_envs, env.num_agents, env.action_size)

    def act(obs, step):
        if policies is None:
            return torch.rand(size, generator=generator) * 2 - 1
        action = torch.stack([policy_action(params, obs[:, i]) for i, params in enumerate(policies)], 1)
        return (action + action_noise * torch.randn(size, generator=generator)).clamp(-1, 1)

    return act


@torch.no_grad()
def rollout(env, act) -> tuple[dict[str, Tensor], Tensor]:
    """One episode in every world: a block, and the lengths [E], shorter than the limit where a robot has fallen."""
    obs, steps, running = env.reset(), [], []
    terminated = torch.zeros(env.num_envs, dtype=torch.bool)
    mask = 1.0 if env.action_mask is None else env.action_mask
    for step in range(env.episode_steps):
        action, state = act(obs, step) * mask, env.state
        running.append(~terminated)
        next_obs, rewards, terminated = env.step(action)
        dones = terminated[:, None, None].expand(-1, env.num_agents, 1)
        arrays = [obs, action * env.action_scale, rewards[..., None], next_obs, dones]
        if state is not None:
            arrays += [x[:, None].expand(-1, env.num_agents, -1) for x in (state, env.state)]
        steps.append(dict(zip(ARRAYS, arrays, strict=False)))
        obs = next_obs
        if terminated.all():
            break
    running = torch.stack(running, 1)  # [E, T]
    block = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}  # [E, T, n, width]
    return {name: x.float()[running].transpose(0, 1) for name, x in block.items()}, running.sum(1)


def team_returns(block: dict[str, Tensor], lengths: Tensor) -> Tensor:
    """Episode returns of the team, [episodes]: mean over agents of the summed rewards."""
    episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.zeros(len(lengths)).index_add_(0, episode, block["rews"][..., 0].mean(0))


def replay(task: str, behaviour: dict):
    """Yield the replay buffer of TD3 up to the medium level as blocks.

    The recorded actions from the first states of TD3's own seed are the same episodes again, up to rounding.
    """
    recording = behaviour["replay"]["actions"]
    env = behaviour_env(task, recording.shape[1], behaviour["replay"]["seed"], behaviour["prey"])
    for actions in recording.float().split(env.episode_steps):
        yield rollout(env, lambda obs, step, actions=actions: actions[step])


def start_worker() -> None:
    """Prepare a worker process: one thread, and an end as soon as the main process ends, even if that is killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@cache
def worker_env(task: str, num_envs: int):
    """The environments of one core, made once."""
    return common.make_env(task, num_envs)


def rollout_block(task: str, num_envs: int, seed: tuple[int, ...], policies, action_noise: float):
    """One episode of each of `num_envs` robots, as `rollout` returns it: a piece of work for one core."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    env = worker_env(task, num_envs)
    env.seed(seed)
    return rollout(env, behaviour_actions(env, policies, generator, action_noise))


def parallel_rollouts(task: str, policies, action_noise: float, seed: tuple[int, ...], num_transitions: int):
    """Yield blocks of episodes of a MuJoCo task, at least `num_transitions` in all, the same on any number of cores."""
    steps = common.make_env(task).episode_steps
    num_envs = min(BLOCK, -(-num_transitions // steps))
    work = ((task, num_envs, (*seed, block), policies, action_noise) for block in count())
    if num_transitions <= BLOCK * steps:  # one block is enough
        yield from starmap(rollout_block, work)
    pending, left, expected = deque(), num_transitions, num_envs * steps
    workers = min(usable_cores(), -(-num_transitions // expected), 61)  # Windows allows no more than 61
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker) as pool:
        while left > 0:
            try:
                while not pending or (len(pending) <= workers and len(pending) * expected < left):
                    pending.append(pool.submit(rollout_block, *next(work)))
                block, lengths = pending.popleft().result()
            except BrokenProcessPool:
                guard = "a script of your own needs `if __name__ == '__main__':` around its calls"
                raise UserError(f"{task}: a worker process died, perhaps for lack of memory; {guard}") from None
            expected = int(lengths.sum())  # robots may fall early
            left -= expected
            yield block, lengths


def whole_episodes(blocks, num_transitions: int):
    """Yield whole episodes until the next one would exceed `num_transitions`."""
    for block, lengths in blocks:
        fit = lengths[lengths.cumsum(0) <= num_transitions]
        yield {name: x[:, : fit.sum()] for name, x in block.items()}, fit
        num_transitions -= fit.sum()
        if len(fit) < len(lengths) or num_transitions == 0:
            return


def thinned_replay(task: str, behaviour: dict, num_transitions: int):
    """`replay` as one block of at most `num_transitions`, thinned out evenly, as its policies improve all the time."""
    blocks, lengths = zip(*replay(task, behaviour), strict=True)
    steps = int(lengths[0][0])
    block = {name: torch.cat([b[name] for b in blocks], 1).unflatten(1, (-1, steps)) for name in blocks[0]}
    episodes, most = block["rews"].shape[1], num_transitions // steps
    kept = torch.linspace(0, episodes - 1, most).long() if episodes > most else torch.arange(episodes)
    return {name: x[:, kept].flatten(1, 2) for name, x in block.items()}, torch.full((len(kept),), steps)


def make_blocks(task: str, dataset: str, behaviour: dict, num_transitions: int, seed: int, noise: dict):
    """Yield a dataset's transitions as blocks of whole episodes."""
    if dataset == "medium-replay":
        yield thinned_replay(task, behaviour, num_transitions)
        return
    sources, particles = dataset.split("-"), task in SCENARIOS  # the two halves of a mixture
    steps = common.make_env(task).episode_steps
    episodes = num_transitions // steps
    if particles:
        env = behaviour_env(task, min(1_000, episodes), seed, behaviour["prey"])
        generator = torch.Generator().manual_seed(seed)
    for i, source in enumerate(sources):
        share = (episodes + i) // len(sources) * steps
        if particles:
            act = behaviour_actions(env, behaviour.get(source), generator, noise[source])
            blocks = (rollout(env, act) for _ in count())
        else:
            seeds = (seed, DATASETS.index(source))
            blocks = parallel_rollouts(task, behaviour.get(source), noise[source], seeds, share)
        yield from whole_episodes(blocks, share)


# --------------------------------------------------------------------------------------------------------------------
# Writing


def write_arrays(folder: Path, blocks, num_transitions: int, bar: tqdm) -> dict:
    """Write blocks as the layout's .npy files; returns what metadata.json says of the contents."""
    arrays, returns, done = None, [], 0
    for block, lengths in blocks:
        T = block["rews"].shape[1]
        if arrays is None:
            arrays = {
                name: np.zeros((x.shape[0], num_transitions, x.shape[2]), np.float32) for name, x in block.items()
            }
        for name, part in block.items():
            arrays[name][:, done : done + T] = part.numpy()
        returns.append(team_returns(block, lengths))
        done += T
        bar.update(T)
    bar.total = done  # medium-replay ends before num_transitions
    bar.refresh()
    checksums = {}
    for name, array in arrays.items():
        for agent, values in enumerate(array[:, :done]):
            file = folder / f"{name}_{agent}.npy"
            np.save(file, values[:, 0] if name in ("rews", "dones", "timeouts") else values)
            checksums[file.name] = file_checksum(file)
    returns = torch.cat(returns)
    return {
        "transitions": done,
        "episodes": len(returns),
        "return_mean": returns.mean().item(),
        "return_std": returns.std().item(),
        "return_max": returns.max().item(),
        "checksums": checksums,
    }


def prey_obs_size(task: str) -> int | None:
    """Observation size of the scenario's prey, None where it has none."""
    if task not in SCENARIOS or len(SCENARIOS[task].agents) == SCENARIOS[task].num_controlled:
        return None
    return ParticleEnv(task, 1).obs_sizes[-1]


def env_to_collect_in(task: str, dataset: str, target: Path):
    """One environment of the task; raises UserError if nothing here can make this dataset, whose folder is `target`."""
    if is_own(task):
        raise UserError(f"--scenario {task}: of your own; docs/own-environment.md shows how to record it")
    env = common.make_env(task)
    if task not in PUBLISHED and dataset != "random":
        raise UserError(
            f"{target}: missing, and there are no behaviour policies of {task} to make it with, only random data; put "
            "data of your own there"
        )
    return env


def ingredients(task: str, dataset: str, args: Args):
    """The environment, the behaviour policies and the folder of a dataset; raises as `collect` does."""
    target = common.dataset_path(args.data_dir, task, dataset, args.seed)
    env, path = env_to_collect_in(task, dataset, target), Path(args.pretrained_dir) / f"{task}.pt"
    if args.num_transitions < 2 * env.episode_steps:
        least = f"{2 * env.episode_steps}, two episodes"
        raise UserError(f"--num-transitions {args.num_transitions}: {task} needs at least {least}")
    if target.exists() and not args.overwrite:
        raise UserError(f"{target}: exists; pass --overwrite to replace it")
    behaviour = {"prey": None}
    if task in SCENARIOS or dataset != "random":  # random actions of a robot need no policies
        behaviour = load_behaviour(path, env, prey_obs_size(task))
    if dataset == "medium-replay" and behaviour["replay"] is None:
        raise UserError(f"{path}: records no TD3 run to replay; choose another --dataset")
    return env, behaviour, target


def collect(
    task: str,
    dataset: str,
    data_dir: str | Path = "datasets",
    num_transitions: int = 1_000_000,
    seed: int = 0,
    overwrite: bool = False,
    pretrained_dir: str | Path = common.ROOT / "pretrained",
    action_noise: float | None = None,
) -> dict:
    """Make one dataset, in a temporary folder that is renamed when it is complete. Returns its metadata.

    Raises:
        UserError: it exists and `overwrite` is off, behaviour policies are missing, or the disk refuses.
    """
    args = Args((task,), (dataset,), num_transitions, data_dir, seed, overwrite, pretrained_dir, action_noise)
    env, behaviour, target = ingredients(task, dataset, args)
    num_transitions, seed = args.num_transitions // env.episode_steps * env.episode_steps, args.seed
    levels = () if dataset == "medium-replay" else dataset.split("-")  # a replay repeats the noise of TD3
    noise = {level: ACTION_NOISE.get((task, level), 0.1) for level in levels}
    noise = noise if args.action_noise is None else dict.fromkeys(levels, args.action_noise)
    if dataset == "medium-replay" and seed:
        print(f"{target}: one TD3 run is recorded, so all versions of medium-replay are the same", file=sys.stderr)
    with replaced_folder(target, overwrite) as folder:
        with tqdm(desc=f"{task}/{dataset}", total=num_transitions, unit="step", unit_scale=True) as bar:
            blocks = make_blocks(task, dataset, behaviour, num_transitions, seed, noise)
            contents = write_arrays(folder, blocks, num_transitions, bar)
        metadata = {
            "scenario": task,
            "dataset": dataset,
            **contents,
            "seed": seed,
            "action_noise": {level: std for level, std in noise.items() if level in ("medium", "expert")},
            "prey_checksum": behaviour["prey"] and policy_checksum(behaviour["prey"]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return metadata


def print_table(made: list[dict]) -> None:
    """What was made, next to the published datasets."""
    if not made:
        return
    print(f"\n{'dataset':<28}{'transitions':>12}{'mean':>9}{'std':>8}{'max':>8}{'published':>11}")
    for m in made:
        published = PUBLISHED.get(m["scenario"], {}).get(m["dataset"], "-")
        print(
            f"{m['scenario'] + '/' + m['dataset']:<28}{m['transitions']:>12,}{m['return_mean']:>9.1f}"
            f"{m['return_std']:>8.1f}{m['return_max']:>8.1f}{published:>11}"
        )


def main() -> None:
    args = tyro.cli(Args, description=lines(__doc__))
    missing = []
    for task, dataset in dict.fromkeys(product(args.scenario, args.dataset)):
        target = common.dataset_path(args.data_dir, task, dataset, args.seed)
        if target.exists() and not args.overwrite:
            print(f"{target}: exists, kept (--overwrite replaces it)", file=sys.stderr)
        else:
            ingredients(task, dataset, args)  # everything is checked before anything is made
            missing.append((task, dataset))
    how = args.num_transitions, args.seed, args.overwrite, args.pretrained_dir, args.action_noise
    print_table([collect(task, dataset, args.data_dir, *how) for task, dataset in missing])


if __name__ == "__main__":
    program(main)
