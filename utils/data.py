"""A dataset as training takes it: made if it is missing, cut to a share, its rewards standardised, on the device."""

from __future__ import annotations

import math
import shlex
import sys
from functools import partial

import torch
from torch import Tensor

import collect_datasets
import common
from utils.frozen import policy_checksum
from utils.program import UserError


def load_data(args, env, prey: dict | None) -> common.Dataset:
    """The dataset that `args` names, made first if its folder is missing; trajectories as they are, none replicated.

    Args:
        args: options of a run. prey: parameters of the frozen prey, or None.

    Raises:
        UserError: it is damaged, was made with another prey, or cannot be made.
    """
    task = common.task_name(args)
    folder = common.dataset_path(args.data_dir, task, args.dataset).parent
    if not folder.exists():
        if args.data_dir != "datasets":  # a mistyped folder must not be filled with our data
            make = shlex.join(["--scenario", task, "--dataset", args.dataset, "--data-dir", args.data_dir])
            raise UserError(f"{folder}: no such dataset; to make it there, run python collect_datasets.py {make}")
        print(f"{folder}: no such dataset, making it from pretrained/", file=sys.stderr)
        try:
            # so that this run equals the next one, which finds the dataset made; no GPU has a part in making it
            with torch.random.fork_rng(devices=()):
                collect_datasets.collect(task, args.dataset, data_dir=args.data_dir)
        except UserError:
            if not folder.exists():  # else another process was faster
                raise
    data = common.load_dataset(args.data_dir, task, args.dataset, env)
    made_with = data.metadata.get("prey_checksum")
    if prey is not None and made_with not in (None, policy_checksum(prey)):
        raise UserError(f"{folder}: made with another prey; pass it as --prey, or delete the folder to make it anew")
    outside = (data.action.abs() > 1.0001).float().mean().item()
    if outside:
        share = f"{outside:.2%} of the action entries are outside [-1, 1], where no policy here can act"
        print(f"warning: {folder}: {share}; scale the actions", file=sys.stderr)
    row = first_gap(data)
    if row is not None:
        gap = f"next_obs of row {row} is not obs of row {row + 1} of the same episode"
        print(f"warning: {folder}: {gap}; write whole episodes one after the other", file=sys.stderr)
    if args.data_fraction < 1:
        data = take_share(data, args.data_fraction)
    reward = data.reward if args.raw_rewards else standardise(data.reward, data.done)
    data = data._replace(reward=reward * args.reward_scale)
    return data._replace(**{name: x.to(env.device) for name, x in data._asdict().items() if isinstance(x, Tensor)})


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
    columns = {name: getattr(data, name)[:, rows] for name in ("obs", "action", "reward", "next_obs", "done")}
    return common.Dataset(
        **columns,
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        returns=data.returns[kept],
        metadata=data.metadata,
    )


def standardise(reward: Tensor, done: Tensor) -> Tensor:
    """Rewards [n, T] to standard deviation 1 over the dataset and, without terminal states, mean 0.

    Without terminal states a constant added to every reward adds the same to every Q-value: no policy gains by it, but
    the critics need not learn a large offset, and E[abs(Q)], Eq. 5's normaliser, measures how much states differ.
    """
    mean, std = reward.double().mean(), reward.double().std()
    return (reward - mean.float() * (1 - done.amax())) / std.clamp(min=1e-8).float()


def alike(one: dict, other: dict) -> bool:
    """Whether two `statistics` are those of the same data, up to rounding."""
    close = partial(math.isclose, rel_tol=1e-4, abs_tol=1e-4)
    return one.keys() == other.keys() and all(close(value, other[name]) for name, value in one.items())


def statistics(data: common.Dataset) -> dict:
    """Mean, standard deviation and maximum of the trajectories' returns, and the number of transitions."""
    returns = data.returns.cpu()
    return {
        "mean": returns.mean().item(),
        "std": returns.std(correction=0).item(),
        "max": returns.max().item(),
        "transitions": data.obs.shape[1],
    }
