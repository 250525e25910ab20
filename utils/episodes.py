"""Episodes from elsewhere: given to the agents of a task, checked, described, and written in the datasets' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import common
from collect_datasets import write_arrays
from utils.arrays import episode_lengths
from utils.data import warn_of_actions
from utils.program import UserError, replaced_folder

CLIPPED = {"Hopper": 10, "Walker2d": 10, "Ant": 1, "ManySegmentAnt": 1}  # bound of what whole robots observe


class Episode(NamedTuple):
    """One episode, T transitions of n agents; lists have one float32 array per agent."""

    obs: list[np.ndarray]  # [T, d_i]
    action: list[np.ndarray]  # [T, A]
    reward: list[np.ndarray]  # [T]
    next_obs: list[np.ndarray]  # [T, d_i]
    terminated: bool  # whether it ended in a terminal state
    last: str  # where the last next_obs comes from: "given", "repeated", or "unknown": that transition is left out
    team_return: float  # mean over agents of the sum of rewards, that of a transition left out included


class Team:
    """The agents of a task and how arrays from elsewhere become theirs.

    Args:
        task: as `common.make_env` takes it. agents: names or indices of the source's agents, in the order of the
            task's own; () where the names are the same or there are as many.

    Attributes:
        notes: what was done to the arrays, sentences (the keys of a dict).
    """

    def __init__(self, task: str, agents: tuple[str, ...] = ()):
        self.task, self.env, self.agents, self.notes = task, common.make_env(task), tuple(agents), {}

    def chosen(self, names: list[str]) -> list[str]:
        """Which of the source's agents are the task's, in its order.

        Raises:
            UserError: that cannot be told from the names.
        """
        own, indices = self.env.agents, [str(i) for i in range(self.env.num_agents)]
        known = own if {*own} <= {*names} else indices if {*indices} == {*names} else ()
        chosen = self.agents or known
        if len(chosen) != len(own) or len({*chosen}) != len(own) or not {*chosen} <= {*names}:
            raise UserError(
                f"the data hold agents {', '.join(names)}; name the {len(own)} that are {self.task}'s "
                f"{', '.join(own)}, in this order, with --agents"
            )
        if len(names) > len(chosen):
            self.notes[f"agents left out: {', '.join(name for name in names if name not in chosen)}"] = None
        return list(chosen)

    def columns(self, values, what: str) -> list[np.ndarray]:
        """The columns of the task's agents in a dict or tuple over agents, or in an array [T, agents, ...]."""
        if isinstance(values, tuple):
            values = {str(i): value for i, value in enumerate(values)}
        if isinstance(values, dict):
            return [np.asarray(values[name]) for name in self.chosen(list(values))]
        if np.ndim(values) < 2:
            raise UserError(f"{what}: have shape {np.shape(values)}, expected one column per agent")
        return [values[:, int(name)] for name in self.chosen([str(i) for i in range(values.shape[1])])]

    def arrays(self, values, what: str) -> list[np.ndarray]:
        """Observations or actions of each agent, float32 [T, width].

        Args:
            values: a dict or tuple over agents, an array [T, agents, width], or [T, width] of a whole robot.
            what: "observations" or "actions".

        Raises:
            UserError: they do not fit the task.
        """
        obs = what == "observations"
        widths = self.env.obs_sizes if obs else self.env.action_sizes
        if not isinstance(values, dict | tuple) and np.ndim(values) == 2:
            columns = [values[:, index] for index in self.parts(values, what)]
        else:
            columns = self.columns(values, what)
        return [self.fitted(x, *of, max(widths), what) for x, *of in zip(columns, self.env.agents, widths, strict=True)]

    def parts(self, values: np.ndarray, what: str) -> list[np.ndarray]:
        """Which entries of a whole robot's observations or actions are each agent's, by the library's partition."""
        if self.env.state is None:
            raise UserError(f"{what}: have shape {values.shape}; {self.task} needs those of each agent")
        obs, robot = what == "observations", self.env.envs[0]
        width = self.env.state.shape[1] if obs else sum(self.env.action_sizes)
        if self.agents:
            raise UserError(f"--agents {' '.join(self.agents)}: the {what} are a whole robot's; leave the option out")
        if values.shape[1] != width:
            raise UserError(f"{what}: have shape {values.shape}, the whole robot of {self.task} has {width} numbers")
        split = robot.map_global_state_to_local_observations if obs else robot.map_global_action_to_local_actions
        try:
            parts = split(np.arange(width))
            seen = robot.reset(seed=0)[0]  # the library mixes up entries of ManySegmentAnt
            right = not obs or all(np.allclose(robot.state()[parts[agent]], seen[agent]) for agent in seen)
        except AssertionError:  # it has no mapping
            right = False
        if not right:
            raise UserError(f"{what}: the library cannot split a whole robot of {self.task}; bring those of each agent")
        self.notes[f"{what} of the whole robot are split among {len(parts)} agents"] = None
        bound = CLIPPED.get(self.task.partition("-")[0])
        if obs and bound and (share := (np.abs(values) == bound).mean()):
            self.notes[f"{share:.2%} of the whole robot's observations are clipped at {bound}"] = None
        return [parts[agent] for agent in self.env.agents]

    def fitted(self, x: np.ndarray, agent: str, own: int, padded: int, what: str) -> np.ndarray:
        """One agent's column as float32 [T, own]; zeros that pad it to the widest agent's width are left out."""
        x = x[:, None] if x.ndim == 1 and own == 1 else x
        if x.ndim != 2 or x.dtype.kind not in "biuf" or x.shape[1] not in (own, padded) or x[:, own:].any():
            raise UserError(
                f"{what} of {agent}: {x.dtype} of shape {x.shape}, expected numbers [T, {own}] for {self.task} (of a "
                "robot, made with global_categories=() and its --agent-conf and --agent-obsk)"
            )
        with np.errstate(over="ignore"):  # an infinity is noticed below
            x = np.array(x[:, :own], np.float32)
        if not np.isfinite(x).all():
            row = int(np.flatnonzero(~np.isfinite(x).all(1))[0])
            raise UserError(f"{what} of {agent}: NaN or infinity, first in row {row} (from 0) of the episode or file")
        return x

    def rewards(self, values) -> list[np.ndarray]:
        """Rewards of each agent, float32 [T]; one reward of the whole team, [T] or [T, 1], is every agent's."""
        n, shared = self.env.num_agents, np.asarray(0 if isinstance(values, dict | tuple) else values)
        if shared.ndim == 1 or (shared.ndim == 2 and shared.shape[1] == 1):
            self.notes["every agent gets the one reward of the team"] = None
            return n * [self.fitted(shared, "the team", 1, 1, "rewards")[:, 0]]
        columns = self.columns(values, "rewards")
        return [self.fitted(x, a, 1, 1, "rewards")[:, 0] for x, a in zip(columns, self.env.agents, strict=True)]

    def flags(self, values, what: str) -> np.ndarray:
        """Whether the team's episode ends, [T] bool: one flag of the team, or one per agent, all the same."""
        if not isinstance(values, dict | tuple) and np.size(values) == len(values):
            return np.asarray(values).reshape(-1) > 0
        flags = np.stack([x.reshape(len(x)) > 0 for x in self.columns(values, what)])
        if (flags.any(0) != flags.all(0)).any():
            row = int(np.flatnonzero(flags.any(0) != flags.all(0))[0])
            raise UserError(f"{what}: the agents differ in row {row} (from 0); a team's episode ends for all at once")
        return flags[0]

    def episode(self, obs, action, reward, terminated: bool, next_obs=None) -> Episode:
        """An episode of T transitions from lists of the agents' arrays, as `arrays` and `rewards` return them.

        Args:
            obs: [T + 1, d_i], or [T, d_i] where `next_obs` [T, d_i] is given or the last observation is unknown.
                An unknown one after a terminal state is repeated, as no TD target reads it there. After any other end
                the last transition is left out.

        Raises:
            UserError: the arrays have different lengths, or the episode is longer than the task's.
        """
        T, limit = len(action[0]), self.env.episode_steps
        team_return = float(np.mean([r.sum(dtype=np.float64) for r in reward]))
        terminated = bool(terminated) and T < limit  # at the limit it is the time limit that ends it
        last = "given"
        if next_obs is None and len(obs[0]) == T:
            last = "repeated" if terminated else "unknown"
            obs = [np.concatenate([x, x[-1:]]) for x in obs] if terminated else obs
            action, reward = (x if terminated else [a[:-1] for a in x] for x in (action, reward))
        if next_obs is None:
            obs, next_obs = [x[:-1] for x in obs], [x[1:] for x in obs]
        rows = {len(x) for x in (*obs, *action, *reward, *next_obs)}
        if len(rows) > 1:
            raise UserError(f"observations, actions and rewards of an episode have {sorted(rows)} rows")
        if len(action[0]) > limit:
            raise UserError(f"an episode of {len(action[0])} steps; one of {self.task} has at most {limit}")
        return Episode(obs, action, reward, next_obs, terminated, last, team_return)

    def cut(self, obs, action, reward, terminals: np.ndarray, timeouts: np.ndarray | None, next_obs=None):
        """Yield the episodes of arrays that hold them one after the other. Without `timeouts`, the time limit cuts."""
        flags = (terminals,) if timeouts is None else (terminals, timeouts)
        rows = {len(x) for x in (*obs, *action, *reward, *(next_obs or ()), *flags)}
        if len(rows) > 1:
            raise UserError(f"observations, actions, rewards and flags have {sorted(rows)} rows")
        ended = terminals if timeouts is None else terminals | timeouts
        steps = self.env.episode_steps if timeouts is None else len(ended) + 1
        start = 0
        for length in episode_lengths(torch.from_numpy(ended), steps).tolist() if len(ended) else ():
            rows, start = slice(start, start + length), start + length
            parts = [x and [column[rows] for column in x] for x in (obs, action, reward, next_obs)]
            yield self.episode(*parts[:3], terminals[start - 1], parts[3])


def blocks(episodes: list[Episode], widths: dict[str, int], limit: int):
    """Yield the episodes as `write_arrays` takes them; observations padded with zeros to the widest agent's."""

    def padded(columns: list[np.ndarray], width: int) -> Tensor:
        return torch.from_numpy(np.pad(np.concatenate(columns), ((0, 0), (0, width - columns[0].shape[1]))))

    def short(episode: Episode) -> bool:
        return not episode.terminated and len(episode.action[0]) < limit

    marks = {"dones": lambda episode: episode.terminated, **({"timeouts": short} if any(map(short, episodes)) else {})}
    for first in range(0, len(episodes), 1_000):
        part = episodes[first : first + 1_000]
        lengths = torch.tensor([len(episode.action[0]) for episode in part])
        block = {}
        for name, field in (("obs", "obs"), ("acs", "action"), ("rews", "reward"), ("next_obs", "next_obs")):
            agents = zip(*(getattr(episode, field) for episode in part), strict=True)
            agents = [[x.reshape(len(x), -1) for x in columns] for columns in agents]
            block[name] = torch.stack([padded(columns, widths[name]) for columns in agents])
        for name, marked in marks.items():
            block[name] = torch.zeros_like(block["rews"])
            block[name][:, lengths.cumsum(0)[torch.tensor([marked(episode) for episode in part])] - 1] = 1
        yield block, lengths


def dataset_folder(data_dir: str | Path, task: str, dataset: str, seed: int, overwrite: bool) -> Path:
    """Where version `seed` of a dataset goes. Raises UserError where there is one and `overwrite` is off."""
    path = common.dataset_path(data_dir, task, dataset, seed)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another --data-dir or --seed, or pass --overwrite to replace it")
    return path


def describe(episodes: list[Episode], team: Team) -> str:
    """What was found: how episodes end, lengths, returns, ranges of actions, and what was done to the data."""
    limit, env = team.env.episode_steps, team.env
    lengths = np.array([len(episode.action[0]) + (episode.last == "unknown") for episode in episodes])
    r = np.array([episode.team_return for episode in episodes])
    terminal = sum(episode.terminated for episode in episodes)
    at_limit = int(sum(length >= limit for length in lengths))
    unknown, repeated = (sum(e.last == last for e in episodes) for last in ("unknown", "repeated"))
    ranges = []
    for i, agent in enumerate(env.agents):
        low, high = min(e.action[i].min() for e in episodes), max(e.action[i].max() for e in episodes)
        ranges.append(f"{agent} {low:.2f} to {high:.2f}")
    lines = [
        f"episodes  {len(episodes):,}: {terminal:,} end in a terminal state, {at_limit:,} at the time limit of {limit} "
        f"steps, {len(episodes) - terminal - at_limit:,} were cut short before",
        f"lengths   min {lengths.min()}, mean {lengths.mean():.1f}, max {lengths.max()}",
        f"returns   min {r.min():.2f}, mean {r.mean():.2f}, max {r.max():.2f}, std {r.std():.2f}",
        f"actions   {', '.join(ranges)}",
        *(f"note      {note}" for note in team.notes),
    ]
    if unknown:
        kept = np.mean([np.mean([x.sum() for x in e.reward]) for e in episodes])
        lines.append(
            f"note      the last observation of {unknown:,} episodes is unknown: their last transition is left out "
            f"(mean return without it {kept:.2f})"
        )
    if repeated:
        lines.append(
            f"note      the observation after {repeated:,} terminal states is unknown: next_obs repeats obs there, and "
            "dones is 1, so that no TD target reads it (MADiff and the conservative term of MA-CQL and OMAR do)"
        )
    return "\n".join(lines)


def write_dataset(episodes: list[Episode], team: Team, dataset: str, path: Path, overwrite: bool, source: dict) -> dict:
    """Write episodes to the folder `path`, whole or not at all, and print what they are. Returns the metadata.

    Args:
        source: where they come from, for metadata.json.

    Raises:
        UserError: there are fewer than two episodes, or the disk refuses.
    """
    empty = sum(not len(episode.action[0]) for episode in episodes)
    if empty:
        team.notes[f"{empty:,} episodes without a whole transition are left out"] = None
        episodes = [episode for episode in episodes if len(episode.action[0])]
    if len(episodes) < 2:
        raise UserError(f"{path}: a dataset needs two episodes, there are {len(episodes)}; bring more")
    print(describe(episodes, team), flush=True)
    env, total = team.env, sum(len(episode.action[0]) for episode in episodes)
    widths = {"obs": env.obs_size, "acs": env.action_size, "rews": 1, "next_obs": env.obs_size}
    with replaced_folder(path, overwrite) as folder, tqdm(desc=str(path), total=total, unit="step") as bar:
        contents = write_arrays(folder, blocks(episodes, widths, env.episode_steps), total, bar)
        metadata = {"scenario": team.task, "dataset": dataset, **contents, "source": source}
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    actions = np.concatenate([x.reshape(-1) for episode in episodes for x in episode.action])
    warn_of_actions(float((np.abs(actions) > 1.0001 * env.action_scale).mean()), path, env.action_scale)
    print(f"wrote {path}: {total:,} transitions of {env.num_agents} agents")
    return metadata
