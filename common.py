"""What every script here needs: environments and their shifts, datasets on disk, normalised scores, paper results."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

import mamujoco_env
import particle_env
from own_env import OwnEnv, check_agents, is_own
from utils.arrays import damaged, episode_lengths, first_difference, has_array, load_array, read_metadata
from utils.options import DatasetName
from utils.program import UserError

ROOT = Path(__file__).resolve().parent
DATASETS = get_args(DatasetName)  # random, random-medium, medium-replay, medium, medium-expert, expert
# (expert, random) mean returns of the published OMAR datasets, means over their five versions
NORMALISATION = {
    "simple_spread": (516.8, 159.8),
    "simple_tag": (185.6, -4.1),
    "simple_world": (79.5, -6.8),
    "HalfCheetah": (3568.8, -284.0),
    "landmarks6": (90.0, 68.8),  # this repository's own
}


def task_name(args) -> str:
    """Name of the environment that the options select: the scenario or, for MuJoCo, robot and joint partition."""
    if args.scenario in mamujoco_env.SCENARIOS:
        return mamujoco_env.task_name(args.scenario, args.agent_conf, args.agent_obsk, args.global_categories)
    for name in ("agent_conf", "agent_obsk", "global_categories"):
        if getattr(args, name, None):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: {args.scenario} has no joints to share out, or names them itself; leave it out")
    return args.scenario


def make_env(task: str, num_envs: int = 1, shift: str = "none", device="cpu", seed=0, prey=None, render_mode=None):
    """`num_envs` environments: a TeamEnv (its docstring explains `prey`), MujocoEnv or OwnEnv, of one interface.

    Raises:
        UserError: there is no such scenario, partition or shift.
    """
    if is_own(task):
        return OwnEnv(task, num_envs, shift, device, seed, render_mode)
    scenarios = (*particle_env.SCENARIOS, *mamujoco_env.SCENARIOS)
    if task not in scenarios and task.partition("-")[0] not in mamujoco_env.SCENARIOS:
        raise UserError(f"--scenario {task}: unknown; choose one of {', '.join(scenarios)}")
    try:
        if task in particle_env.SCENARIOS:
            return particle_env.TeamEnv(task, num_envs, shift, device, seed, prey)
        return mamujoco_env.MujocoEnv(task, num_envs, shift, device, seed, render_mode)
    except ValueError as error:
        option = f"--scenario {task}" if shift == "none" else f"--shift {shift}"
        raise UserError(f"{option}: {error}") from None


def normalised_score(scenario: str, episode_return):
    """100 (return - random) / (expert - random), the field's normalisation (Fu et al. 2020), or None."""
    if scenario not in NORMALISATION:
        return None
    expert, random = NORMALISATION[scenario]
    return 100 * (episode_return - random) / (expert - random)


def paper_result(scenario: str, dataset: str, shift: str, algorithm: str = "DOM2") -> tuple[float, float] | None:
    """Mean and standard deviation of the episode return in the paper's Tables 1 to 4; None if there is no such cell."""
    cell = {"scenario": scenario, "dataset": dataset, "shift": shift, "algorithm": algorithm}
    with open(ROOT / "results" / "paper.csv", encoding="utf-8", newline="") as f:
        found = [row for row in csv.DictReader(f) if cell.items() <= row.items()]
    return (float(found[0]["mean_return"]), float(found[0]["std_return"])) if found else None


class Dataset(NamedTuple):
    """A dataset in memory: n agents, T transitions in whole episodes, one after the other."""

    obs: Tensor  # [n, T, d]
    action: Tensor  # [n, T, A], in [-1, 1]
    reward: Tensor  # [n, T]
    next_obs: Tensor  # [n, T, d]
    done: Tensor  # [n, T], 1 after a terminal state, 0 at a time limit
    starts: Tensor  # [episodes], first row of each
    lengths: Tensor  # [episodes], its number of rows
    returns: Tensor  # [episodes], team return: mean over agents of the sum of rewards
    metadata: dict  # of metadata.json, empty where there is none
    versions: dict[str, int]  # {folder, or share of it: its episodes}; one for all seeds, or one for each, in turn
    episodes: tuple[Tensor, ...] = ()  # of each version: trajectories (with replicas) that minibatches are drawn from
    index: tuple[Tensor, ...] = ()  # the rows of all those trajectories

    def replicated(self, replicas) -> Dataset:
        """The dataset whose minibatches come from the trajectories that `replicas` makes of a version's returns."""
        parts = torch.arange(len(self.returns), device=self.returns.device).split(list(self.versions.values()))
        episodes = tuple(part[replicas(self.returns[part])] for part in parts)
        return self._replace(episodes=episodes, index=tuple(rows_of(self.starts[e], self.lengths[e]) for e in episodes))


def rows_of(starts: Tensor, lengths: Tensor) -> Tensor:
    """Indices of the rows of trajectories, one after the other: starts and lengths [k] -> [sum of lengths]."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=starts.device) + (starts - before).repeat_interleave(lengths)


def dataset_path(data_dir: str | Path, task: str, dataset: str, seed: int = 0) -> Path:
    """Folder of a version's arrays, in the layout of the OMAR datasets; module.function for a task module:function."""
    return Path(data_dir) / task.replace(":", ".") / dataset / f"seed_{seed}_data"


def load_dataset(path: Path, env) -> Dataset:
    """Load and check `<path>/{obs,acs,rews,next_obs,dones}_<agent>.npy`, and `timeouts` where there are;
    `path` is a `dataset_path`.

    Any float type is accepted and becomes float32. Where there is a `metadata.json`, its names and checksums must fit;
    datasets from elsewhere come without one and get every other check.

    Raises:
        UserError: a file is missing, damaged, of a shape that does not fit the others or the scenario, or not finite.
    """
    n, metadata = env.num_agents, read_metadata(path)
    check_agents(metadata.get("agents"), env.agents, path)
    obs, acs, one = env.obs_sizes, env.action_sizes, (1,) * n
    widths = {"obs": obs, "acs": acs, "rews": one, "next_obs": obs, "dones": one}
    widths |= {"timeouts": one} if has_array(path, "timeouts", metadata) else {}  # where episodes were cut short
    arrays = {}
    for name, sizes in widths.items():
        columns = [load_array(path / f"{name}_{agent}.npy", sizes, agent, metadata) for agent in range(n)]
        rows = len(arrays["obs"][0]) if arrays else len(columns[0])
        for agent, column in enumerate(columns):
            if len(column) != rows:
                raise damaged(path, f"{path}: {name}_{agent}.npy has {len(column)} rows, obs_0.npy {rows}")
        arrays[name] = torch.stack(columns)
    done, reward = arrays["dones"][..., 0], arrays["rews"][..., 0]
    flags = {name: arrays[name][..., 0] > 0 for name in ("dones", "timeouts") if name in arrays}  # each [n, T]
    for name, of_agents in flags.items():
        row = first_difference(of_agents)
        if row is not None:
            raise damaged(path, f"{path}: {name}: the agents differ in row {row}; all must end together")
    ended = torch.stack([of_agents[0] for of_agents in flags.values()]).any(0)  # [T]
    lengths = episode_lengths(ended, env.episode_steps)
    if not len(ended) or (lengths[-1] != env.episode_steps and not ended[-1]):
        raise damaged(path, f"{path}: {len(ended)} rows are no whole number of {env.episode_steps}-step episodes")
    ends = lengths.cumsum(0)
    done[:, ends[lengths == env.episode_steps] - 1] = 0  # some datasets mark the time limit, which is no terminal state
    returns = torch.zeros(len(lengths), dtype=torch.float64)
    returns.index_add_(0, torch.arange(len(lengths)).repeat_interleave(lengths), reward.double().mean(0))
    columns = arrays["obs"], arrays["acs"].div_(env.action_scale), reward, arrays["next_obs"], done
    return Dataset(*columns, ends - lengths, lengths, returns.float(), metadata, {path.name: len(lengths)})
