"""A dataset as training takes it: made if it is missing, cut to a share, its rewards standardised, on the device."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

import collect_datasets
import common
from own_env import is_own
from utils.frozen import policy_checksum
from utils.program import UserError
from utils.provenance import script_command


def load_data(args, env, prey: dict | None) -> common.Dataset:
    """The dataset that `args` names, made first if its folder is missing; trajectories as they are, none replicated.

    Args:
        args: options of a run. prey: parameters of the frozen prey, or None.

    Raises:
        UserError: it is damaged, was made with another prey, or cannot be made.
    """
    task = common.task_name(args)
    folder = common.dataset_path(args.data_dir, task, args.dataset).parent
    if not any(folder.glob("[!.]*")):  # what begins with a dot was left by a killed process
        if is_own(task):
            raise UserError(f"{folder}: no such dataset; docs/own-environment.md shows how to record it")
        if args.data_dir != "datasets":  # a mistyped folder must not be filled with our data
            collect_datasets.env_to_collect_in(task, args.dataset, folder)
            make = shlex.join(["--scenario", task, "--dataset", args.dataset, "--data-dir", args.data_dir])
            command = f"{script_command(common.ROOT / 'collect_datasets.py')} {make}"
            raise UserError(f"{folder}: no such dataset; to make it there, run {command}")
        if getattr(args, "prey", None):
            remedy = "run collect_datasets.py with --pretrained-dir, or leave --prey out"
            raise UserError(f"{folder}: no such dataset, and it would be made with another prey than --prey; {remedy}")
        print(f"{folder}: no such dataset, making it from pretrained/", file=sys.stderr)
        try:
            # so that this run equals the next one, which finds the dataset made; no GPU has a part in making it
            with torch.random.fork_rng(devices=()):
                collect_datasets.collect(task, args.dataset, data_dir=args.data_dir)
        except UserError:
            if not any(folder.glob("[!.]*")):  # else another process was faster
                raise
    paths = versions(folder, args)
    seeds = args.num_seeds // len(paths)  # that learn from one version
    data = joined([part for path in paths for part in load_version(path, args, env, prey, seeds)])
    return data._replace(**{name: x.to(env.device) for name, x in data._asdict().items() if isinstance(x, Tensor)})


def versions(folder: Path, args) -> list[Path]:
    """The version of a dataset for each seed of a run, `seed_i_data` for seed i; the only one, where there is one.

    Raises:
        UserError: there are several versions, and none for one of the seeds.
    """
    found = sorted(folder.glob("seed_*_data"))
    if len(found) <= 1:
        return found or [folder / "seed_0_data"]
    own = [folder / f"seed_{args.seed + i}_data" for i in range(args.num_seeds)]
    for path in own:
        if path not in found:
            names = ", ".join(path.name for path in found)
            raise UserError(
                f"{path}: missing; there are {names}, and where there are several, every seed learns from its own; "
                "choose other seeds, or leave one version in the folder"
            )
    return own


def load_version(path: Path, args, env, prey: dict | None, seeds: int) -> list[common.Dataset]:
    """One version for `seeds` seeds, checked against the prey, its rewards standardised; with --data-fraction a share
    of its trajectories for each seed."""
    data = common.load_dataset(path, env)
    made_with = data.metadata.get("prey_checksum")
    if prey is not None and made_with not in (None, policy_checksum(prey)):
        other, remedy = "that of pretrained/", "pass it as --prey, or delete the folder to make it anew"
        if args.prey:
            other, remedy = f"--prey {args.prey}", "give the right one"
        raise UserError(f"{path}: made with another prey than {other}; {remedy}")
    outside = (data.action.abs() > 1.0001).sum().item() / (data.action.shape[1] * sum(env.action_sizes))
    warn_of_actions(outside, path, env.action_scale)
    warn_of_raw_actions(data.action, path, getattr(env, "boxes", {}))
    row = first_gap(data)
    if row is not None:
        gap = f"next_obs of row {row} is not obs of row {row + 1} of the same episode"
        print(f"warning: {path}: {gap}; write whole episodes one after the other", file=sys.stderr)
    parts = [data] if args.data_fraction == 1 else [take_share(data, args.data_fraction) for _ in range(seeds)]
    if len(parts) > 1:  # each needs a name of its own
        parts = [x._replace(versions={f"share {i} of {path.name}": len(x.returns)}) for i, x in enumerate(parts, 1)]
    if not args.raw_rewards:
        parts = [x._replace(reward=standardise(x.reward, x.done)) for x in parts]
    return [x._replace(reward=x.reward * args.reward_scale) for x in parts]


def joined(parts: list[common.Dataset]) -> common.Dataset:
    """The versions of a dataset as one, their rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = [torch.cat(x, 1) for x in zip(*(part[:5] for part in parts), strict=True)]
    lengths, returns = (torch.cat([getattr(part, name) for part in parts]) for name in ("lengths", "returns"))
    versions = {name: episodes for part in parts for name, episodes in part.versions.items()}
    return common.Dataset(*columns, lengths.cumsum(0) - lengths, lengths, returns, parts[0].metadata, versions)


def draw(choices: tuple[Tensor, ...], num: int, *size: int) -> Tensor:
    """Independent draws [num, *size]: equally many of each version's choices, one after the other."""
    return torch.cat([x[torch.randint(len(x), (num // len(choices), *size), device=x.device)] for x in choices])


def warn_of_actions(outside: float, folder, scale: float) -> None:
    """Warn if a share `outside` of the action entries in `folder` is beyond what the policies can express."""
    if outside:
        share = f"{outside:.2%} of the action entries are outside [-{scale:g}, {scale:g}], where no policy here can act"
        print(f"warning: {folder}: {share}; scale the actions", file=sys.stderr)


def warn_of_raw_actions(action: Tensor, folder, boxes: dict) -> None:
    """Warn if all actions [n, T, A] of an agent are within its Box in an environment of one's own, as they are where
    nobody converted them, and this Box is not all of [-1, 1]."""
    for own, (name, box) in zip(action, boxes.items(), strict=False):
        low, high = torch.from_numpy(box.low), torch.from_numpy(box.high)
        if ((low > -1) | (high < 1)).any() and ((own >= low) & (own <= high)).all():
            told = f"all actions of {name} lie in its own range {box}; datasets hold actions in [-1, 1]"
            print(f"warning: {folder}: {told}; convert them with own_env.to_unit if these are not", file=sys.stderr)


def first_gap(data: common.Dataset) -> int | None:
    """The first of 10,000 rows that the next row of its episode does not continue; None if all do.

    There are such rows where the steps of several environments were written in turn, for example.
    """
    last = torch.zeros(data.obs.shape[1], dtype=torch.bool)
    last[data.starts + data.lengths - 1] = True
    rows = (~last).nonzero()[:, 0]
    rows = rows[:: max(1, len(rows) // 10_000)]
    one, other = data.next_obs[:, rows], data.obs[:, rows + 1]
    gaps = rows[((one - other).abs() > 1e-3 * (1 + other.abs())).any(-1).any(0)]
    return int(gaps[0]) if len(gaps) else None


def take_share(data: common.Dataset, share: float) -> common.Dataset:
    """A random share of the trajectories, at least one."""
    kept = torch.randperm(len(data.returns))[: max(1, round(share * len(data.returns)))]
    rows, lengths = common.rows_of(data.starts[kept], data.lengths[kept]), data.lengths[kept]
    columns, starts = [x[:, rows] for x in data[:5]], lengths.cumsum(0) - lengths
    versions = dict.fromkeys(data.versions, len(kept))
    return common.Dataset(*columns, starts, lengths, data.returns[kept], data.metadata, versions)


def standardise(reward: Tensor, done: Tensor) -> Tensor:
    """Rewards [n, T] to standard deviation 1 over the dataset and, without terminal states, mean 0.

    Without terminal states a constant added to every reward adds the same to every Q-value: no policy gains by it, but
    the critics need not learn a large offset, and E[abs(Q)], Eq. 5's normaliser, measures how much states differ.
    """
    mean, std = reward.double().mean(), reward.double().std()
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)  # all rewards are the same: nothing to divide by
    return (reward - mean.float() * (1 - done.amax())) / std.float()


def alike(one: dict, other: dict) -> bool:
    """Whether two `statistics` are those of the same data, up to rounding."""
    if one.keys() != other.keys() or one["versions"] != other["versions"]:
        return False
    pairs = [[torch.tensor(x[name], dtype=torch.float64) for x in (one, other)] for name in one if name != "versions"]
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-4) for x, y in pairs)


def statistics(data: common.Dataset) -> dict:
    """Mean, standard deviation and maximum of the returns, number of transitions, versions, and the mean absolute
    observation, action and next observation of each agent."""
    returns, columns = data.returns.cpu(), {"obs": data.obs, "action": data.action, "next_obs": data.next_obs}
    return {
        "mean": returns.mean().item(),
        "std": returns.std(correction=0).item(),
        "max": returns.max().item(),
        "transitions": data.obs.shape[1],
        "versions": list(data.versions),
        **{name: x.abs().mean((1, 2), dtype=torch.float64).tolist() for name, x in columns.items()},
    }
