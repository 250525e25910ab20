"""Run folders and checkpoints: made once, locked while a process trains in them, restored bit for bit."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from itertools import chain, count
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from utils.evaluation import NAMES
from utils.policy_files import policy_file, policy_names, read_policy
from utils.program import UserError, load_torch, warn


def new_run_dir(args, algorithm_name: str) -> Path:
    """Make and return a folder that no other run has, also when two start in the same second."""
    scenario = args.scenario.replace(":", ".")  # Windows allows no colon in a folder's name
    name = f"{algorithm_name}-{scenario}-{args.dataset}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in chain([""], (f"-{i}" for i in count(2))):
        path = Path(args.run_dir) / (name + suffix)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--run-dir {args.run_dir}: {error.strerror}; choose another folder") from None


@contextmanager
def locked(path: Path):
    """Within the context no other process can train in the run folder; the lock ends with the process.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(path / "lock", fallback_to_soft=False)  # a soft one would outlive a killed process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{path}: another process is training it; wait until it ends, or stop it") from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        print(f"warning: {path}: no lock ({error}); do not train this run twice at the same time", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def checkpoint_file(path: str | Path) -> Path:
    return policy_file(path) or Path(path) / "checkpoint.pt"


def read_checkpoint(path: str | Path) -> dict:
    """Contents of a run folder's checkpoint, or of the one before it if the newest cannot be read, or of a policy file.

    Nothing is written: a run that is being trained, or another user's, may be read.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (file := policy_file(path)) is not None:
        return read_policy(file)
    newest, previous = Path(path) / "checkpoint.pt", Path(path) / "checkpoint-previous.pt"
    if not newest.exists() and not previous.exists():
        there = f"a folder such as runs/NAME or, to act without training, a policy: {', '.join(policy_names())}"
        raise UserError(f"{path}: no run folder, there is no checkpoint.pt in it; give {there}")
    try:
        return load_torch(newest)
    except UserError as error:
        if not previous.exists():
            raise
        checkpoint = load_torch(previous)
        warn(f"{error}; using the one before")  # once, although parsing and running both read it
        return checkpoint


def drop_damaged(path: Path) -> None:
    """Of a run folder that this process has locked: let the checkpoint before take the place of a damaged one, which
    the next save would keep instead of it."""
    newest, previous = path / "checkpoint.pt", path / "checkpoint-previous.pt"
    try:
        load_torch(newest)
    except UserError:
        os.replace(previous, newest)


def script_of(checkpoint) -> str | None:
    """The program that made a checkpoint, such as baselines/omar.py; None: none of this repository."""
    facts = checkpoint if isinstance(checkpoint, dict) else {}
    name, options = facts.get("algorithm"), facts.get("args")
    if name not in list(NAMES) or not isinstance(options, dict):
        return None
    if name == "dom2":
        return "dom2_mamujoco.py" if "agent_conf" in options else "dom2_mpe.py"
    return f"baselines/{name}.py"


def load_checkpoint(path: str | Path, algorithm) -> tuple:
    """Options and contents of what `read_checkpoint` finds, if it is of this algorithm.

    Raises:
        UserError: there is none, or it is damaged or another program's.
    """
    checkpoint = read_checkpoint(path)
    return options_of(checkpoint, checkpoint_file(path), algorithm), checkpoint


def options_of(checkpoint, file: Path, algorithm):
    """The options of a checkpoint that was read from `file`.

    Raises:
        UserError: it is damaged or another program's.
    """
    script, options = script_of(checkpoint), {field.name: None for field in fields(algorithm.Args)}
    if script not in (None, script_of({"algorithm": algorithm.name, "args": options})):
        raise UserError(f"{file}: made by {script}; use that")
    try:
        needed = {"algorithm", "updates", "learners", "optimizers", "prey", "data", "rng", "cuda_rng"}
        if not needed <= checkpoint.keys() or type(checkpoint["updates"]) is not int or checkpoint["updates"] < 0:
            raise KeyError
        made_by = checkpoint["algorithm"]
        if made_by == algorithm.name:
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint["args"].items()}
            return algorithm.Args(**options)
    except (KeyError, TypeError, AttributeError, UserError):
        raise UserError(f"{file}: not a checkpoint of this script; give a run folder that it wrote") from None
    raise UserError(f"{file}: a run of {made_by}, not of {algorithm.name}; give a run folder that this script wrote")


def restore(learners, optimizers: dict, checkpoint: dict, path: str | Path) -> None:
    """Load parameters and optimiser states. Learning rates and what a device needs stay those of `optimizers`.

    Of a policy file, load the target policy; everything else stays as it is, since acting does not need it.
    """
    state = checkpoint["learners"]
    if checkpoint["optimizers"] is None:
        optimizers, others = {}, {k: v for k, v in learners.state_dict().items() if not k.startswith("target_policy.")}
        state = others | state
    try:
        learners.load_state_dict(state)
        for name, optimizer in optimizers.items():
            own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(checkpoint["optimizers"][name])
            for group, values in zip(optimizer.param_groups, own, strict=True):
                group.update(values)
    except (KeyError, RuntimeError, ValueError):
        why = "the file is damaged, or the environment has other sizes than in training"
        raise UserError(f"{checkpoint_file(path)}: its networks do not fit its options; {why}") from None


def finite_state(learners, optimizers: dict, num_learners: int) -> Tensor:
    """Whether all parameters and optimiser moments of each learner are finite, [L]."""
    moments = (x for optimizer in optimizers.values() for state in optimizer.state.values() for x in state.values())
    tensors = (x.detach() for x in (*learners.parameters(), *moments) if x.dim())
    return torch.stack([x.reshape(num_learners, -1).isfinite().all(1) for x in tensors]).all(0)
