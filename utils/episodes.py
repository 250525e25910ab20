"""Episodes from elsewhere: given to the agents of a task, checked, described, and written in the datasets' layout."""

from __future__ import annotations

import json
import tempfile
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import common
from collect_datasets import Args, write_arrays
from utils.arrays import first_difference
from utils.data import warn_of_actions
from utils.program import UserError, disk_errors, replaced_folder

CLIPPED = {"Hopper": 10, "Walker2d": 10, "Ant": 1, "ManySegmentAnt": 1}  # bound of what whole robots observe


class Episode(NamedTuple):
    """One episode of n agents, T transitions: its arrays under their names on disk, float32 [n, T, width], and more."""

    arrays: dict[str, np.ndarray]  # obs, acs, rews, next_obs, dones, timeouts
    steps: int  # T
    terminated: bool  # whether it ended in a terminal state
    last: str  # where the last next_obs comes from: "given", "repeated", or "unknown": that transition is left out
    team_return: float  # mean over agents of the sum of rewards, that of a transition left out included


class NewDataset:
    """A dataset in the making: takes episodes from elsewhere, as those of the n agents of a task, and writes them.

    Args:
        task: as `common.make_env` takes it. dataset: one of `common.DATASETS`. seed: the version.
        agents: names or indices of the source's agents, in the order of the task's own; () where the names are the
            same or there are as many.

    Attributes:
        path: folder of the version's arrays. episodes: what `add` has taken.
        notes: what was done to the arrays, sentences (the keys of a dict).
        clipped: how many of a whole robot's observed numbers are at the bound in CLIPPED, and how many there are.

    Raises:
        UserError: there is no such task or dataset, the version exists and `overwrite` is off, or the disk refuses.
    """

    def __init__(self, task: str, dataset: str, data_dir, seed: int, agents: tuple[str, ...], overwrite: bool):
        place = Args((task,), (dataset,), data_dir=data_dir, seed=seed, overwrite=overwrite)  # checked and converted
        env, path = common.make_env(task), common.dataset_path(place.data_dir, task, dataset, place.seed)
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; choose another --data-dir or --seed, or pass --overwrite to replace it")
        self.task, self.env, self.agents = task, env, tuple(agents)
        self.dataset, self.path, self.overwrite = dataset, path, overwrite
        self.episodes, self.notes, self.clipped = [], {}, np.zeros(2, int)
        there = next(folder for folder in path.parents if folder.exists())
        with disk_errors(path, "free some space"):  # noticed now, not after hours of recording
            tempfile.TemporaryDirectory(dir=there).cleanup()

    def chosen(self, names: list[str]) -> list[str]:
        """Which of the source's agents are the task's, in its order. Raises UserError where names do not tell."""
        own, indices = self.env.agents, [str(i) for i in range(self.env.num_agents)]
        known = own if {*own} <= {*names} else indices if {*indices} == {*names} else ()
        chosen = self.agents or known
        if not len(own) == len(chosen) == len({*chosen} & {*names}):
            listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise UserError(
                f"the data hold agents {listed}; name the {len(own)} that are {self.task}'s "
                f"{', '.join(own)}, in this order, with --agents"
            )
        if len(names) > len(chosen):
            self.notes[f"agents left out: {', '.join(name for name in names if name not in chosen)}"] = None
        return list(chosen)

    def columns(self, values, what: str) -> list[tuple[str, np.ndarray]]:
        """Each of the task's agents and its column of a dict or tuple over agents, or of an array [T, agents, ...].

        A single column, [T] or [T, 1], is the whole team's: every agent gets it.
        """
        if not isinstance(values, dict | tuple):
            if np.shape(values)[1:] in ((), (1,)):
                if what == "rewards":
                    self.notes["every agent gets the one reward of the team"] = None
                return [("the team", np.reshape(values, -1))] * self.env.num_agents
            values = tuple(np.moveaxis(values, 1, 0))
        if isinstance(values, tuple):
            values = {str(i): value for i, value in enumerate(values)}
        chosen = self.chosen(list(values))
        return [(agent, np.asarray(values[name])) for agent, name in zip(self.env.agents, chosen, strict=True)]

    def split(self, values: np.ndarray, what: str) -> list[tuple[str, np.ndarray]]:
        """What `columns` returns, of a whole robot's observations or actions [T, width], by the library's partition."""
        if self.env.state is None:
            raise UserError(f"{what}: have shape {values.shape}; {self.task} needs those of each agent")
        obs, robot = what == "observations", self.env.envs[0]
        width = self.env.state.shape[1] if obs else sum(self.env.action_sizes)
        if self.agents:
            raise UserError(f"--agents {' '.join(self.agents)}: the {what} are a whole robot's; leave the option out")
        if values.shape[1:] != (width,):
            raise UserError(f"{what}: have shape {values.shape}, the whole robot of {self.task} has {width} numbers")
        partition = robot.map_global_state_to_local_observations if obs else robot.map_global_action_to_local_actions
        try:
            parts = partition(np.arange(width))
            seen = robot.reset(seed=0)[0]  # the library mixes up entries of ManySegmentAnt
            right = not obs or all(np.allclose(robot.state()[parts[agent]], seen[agent]) for agent in seen)
        except AssertionError:  # it has no mapping
            right = False
        if not right:
            raise UserError(f"{what}: the library cannot split a whole robot of {self.task}; bring those of each agent")
        self.notes[f"{what} of the whole robot are split among {len(parts)} agents"] = None
        bound = CLIPPED.get(self.task.partition("-")[0])
        if obs and bound:
            self.clipped += (np.abs(values) == bound).sum(), values.size
        return [(agent, values[:, parts[agent]]) for agent in self.env.agents]

    def arrays(self, values, what: str) -> np.ndarray:
        """What every agent observes, does or gets, float32 [n, T, width]; zeros pad it to the widest agent's width.

        Args:
            values: a dict or tuple over agents, an array [T, agents, width] that may be padded with zeros in the same
                way, [T, width] of a whole robot, or rewards [T] or [T, 1] of the whole team, which every agent gets.
            what: "observations", "actions" or "rewards".

        Raises:
            UserError: they do not fit the task, or are not finite.
        """
        ones = (1,) * self.env.num_agents
        sizes = {"observations": self.env.obs_sizes, "actions": self.env.action_sizes, "rewards": ones}[what]
        whole = what != "rewards" and not isinstance(values, dict | tuple) and np.ndim(values) <= 2
        columns = self.split(values, what) if whole else self.columns(values, what)
        T, width = len(columns[0][1]), max(sizes)
        padded = np.zeros((len(columns), T, width), np.float32)
        for row, (agent, x), own in zip(padded, columns, sizes, strict=True):
            x = x[:, None] if x.ndim == 1 and own == 1 else x
            fits = x.ndim == 2 and len(x) == T and x.shape[1] in (own, width) and x.dtype.kind in "biuf"
            if not fits or x[:, own:].any():
                raise UserError(
                    f"{what} of {agent}: {x.dtype} of shape {x.shape}, expected numbers [T, {own}] with T = {T} for "
                    f"{self.task} (of a robot, with its --agent-conf, --agent-obsk and --global-categories)"
                )
            with np.errstate(over="ignore"):  # an infinity is noticed below
                row[:, :own] = x[:, :own]
            bad = ~np.isfinite(row).all(1)
            if bad.any():
                where = f"row {bad.argmax()} (from 0) of the episode or file"
                raise UserError(f"{what} of {agent}: NaN or infinity, first in {where}")
        return padded

    def flags(self, values, what: str) -> np.ndarray:
        """Whether the team's episode ends, [T] bool: one flag of the team, or one per agent, all the same."""
        flags = np.stack([x.reshape(len(x)) for _, x in self.columns(values, what)])
        if not ((flags == 0) | (flags == 1)).all():
            raise UserError(f"{what}: hold other numbers than 0 and 1; give 1 where the episode ends, 0 elsewhere")
        row = first_difference(flags)
        if row is not None:
            raise UserError(f"{what}: the agents differ in row {row} (from 0); a team's episode ends for all at once")
        return flags[0] > 0

    def add(self, terminated: bool, obs, action, reward, next_obs=None) -> None:
        """Take an episode of T transitions, arrays [n, T, width], as `arrays` returns them.

        Args:
            terminated: whether it ended in a terminal state.
            obs: [n, T + 1, d], or [n, T, d] where `next_obs` [n, T, d] is given or the last observation is unknown.
                An unknown one after a terminal state is repeated, as no TD target reads it there. After any other end
                the last transition is left out.

        Raises:
            UserError: the arrays have different lengths, or the episode is longer than the task's.
        """
        T, limit, last = action.shape[1], self.env.episode_steps, "given"
        if T > limit:
            raise UserError(f"an episode of {T} steps; one of {self.task} has at most {limit}; end episodes there")
        team_return = float(reward.sum((1, 2), np.float64).mean())
        terminated = bool(terminated) and T < limit  # at the limit it is the time limit that ends it
        if next_obs is None and obs.shape[1] == T:
            last = "repeated" if terminated else "unknown"
            if terminated:
                obs = np.concatenate([obs, obs[:, -1:]], 1)
            else:
                action, reward = action[:, :-1], reward[:, :-1]
        if next_obs is None:
            obs, next_obs = obs[:, :-1], obs[:, 1:]
        rows = {x.shape[1] for x in (obs, action, reward, next_obs)}
        if len(rows) > 1:
            raise UserError(f"observations, actions and rewards of an episode have {sorted(rows)} rows")
        dones, timeouts = np.zeros_like(reward), np.zeros_like(reward)
        dones[:, -1:], timeouts[:, -1:] = terminated, not terminated and reward.shape[1] < limit
        arrays = {"obs": obs, "acs": action, "rews": reward, "next_obs": next_obs, "dones": dones, "timeouts": timeouts}
        self.episodes.append(Episode(arrays, reward.shape[1], terminated, last, team_return))

    def write(self, source: dict) -> dict:
        """Write the episodes, whole or not at all, and print what they are; a later call replaces them.

        Args:
            source: where they come from, for the metadata, which are returned.

        Raises:
            UserError: there are fewer than two episodes, or the disk refuses.
        """
        env, path, episodes = self.env, self.path, [e for e in self.episodes if e.steps]
        if len(episodes) < 2:
            raise UserError(f"{path}: a dataset needs two episodes, there are {len(episodes)}; bring more")
        print(describe(self, episodes), flush=True)
        total = sum(e.steps for e in episodes)
        bar = tqdm(desc=str(path), total=total, unit="step")
        with replaced_folder(path, self.overwrite, alike=False) as folder, bar:
            contents = write_arrays(folder, blocks(episodes), total, bar)
            agents = [str(agent) for agent in env.agents]
            metadata = {"scenario": self.task, "dataset": self.dataset, "agents": agents, **contents, "source": source}
            (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        self.overwrite = True
        outside = sum((np.abs(e.arrays["acs"]) > 1.0001 * env.action_scale).sum() for e in episodes)
        warn_of_actions(outside / (total * sum(env.action_sizes)), path, env.action_scale)
        print(f"wrote {path}: {total:,} transitions of {env.num_agents} agents")
        return metadata


def blocks(episodes: list[Episode]):
    """Yield 1,000 episodes at a time as `write_arrays` takes them; timeouts only where an episode was cut short."""
    cut_short = any(e.arrays["timeouts"].any() for e in episodes)
    names = [name for name in episodes[0].arrays if cut_short or name != "timeouts"]
    for first in range(0, len(episodes), 1_000):
        part = episodes[first : first + 1_000]
        block = {name: torch.from_numpy(np.concatenate([e.arrays[name] for e in part], 1)) for name in names}
        yield block, torch.tensor([e.steps for e in part])


def describe(data: NewDataset, episodes: list[Episode]) -> str:
    """What was found in `episodes`, those of `data` that are written, and what was done to them; several lines."""
    limit, lengths = data.env.episode_steps, np.array([e.steps + (e.last == "unknown") for e in episodes])
    terminal, at_limit = sum(e.terminated for e in episodes), int((lengths == limit).sum())
    r = np.array([e.team_return for e in episodes])
    ranges, notes = [], list(data.notes)
    for i, agent in enumerate(data.env.agents):
        actions = np.concatenate([e.arrays["acs"][i, :, : data.env.action_sizes[i]] for e in episodes])
        ranges.append(f"{agent} {actions.min():.2f} to {actions.max():.2f}")
    if data.clipped[0]:
        share, bound = data.clipped[0] / data.clipped[1], CLIPPED[data.task.partition("-")[0]]
        notes.append(f"{share:.2%} of the whole robot's observations are clipped at {bound}")
    if empty := len(data.episodes) - len(episodes):
        notes.append(f"{empty:,} episodes without a whole transition are left out")
    if unknown := sum(e.last == "unknown" for e in episodes):
        kept = np.mean([e.arrays["rews"].sum((1, 2)).mean() for e in episodes])
        notes.append(
            f"the last observation of {unknown:,} episodes is unknown: their last transition is left out (mean return "
            f"without it {kept:.2f})"
        )
    if repeated := sum(e.last == "repeated" for e in episodes):
        notes.append(
            f"the observation after {repeated:,} terminal states is unknown: next_obs repeats obs there, and dones is "
            "1, so that no TD target reads it (MADiff and the conservative term of MA-CQL and OMAR do)"
        )
    lines = [
        f"episodes  {len(episodes):,}: {terminal:,} end in a terminal state, {at_limit:,} at the time limit of {limit} "
        f"steps, {len(episodes) - terminal - at_limit:,} were cut short before",
        f"lengths   min {lengths.min()}, mean {lengths.mean():.1f}, max {lengths.max()}",
        f"returns   min {r.min():.2f}, mean {r.mean():.2f}, max {r.max():.2f}, std {r.std():.2f}",
        f"actions   {', '.join(ranges)}",
    ]
    return "\n".join(lines + [f"note      {note}" for note in notes])
