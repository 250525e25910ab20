"""Arrays and numbers as other programs make them, and the .npy arrays of a dataset on disk: checked, then converted."""

from __future__ import annotations

import hashlib
import json
import operator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.program import UserError


def as_tensor(x, name: str, shape=None, device="cpu", dtype=torch.float32, finite: bool = False) -> Tensor:
    """Convert numbers to a tensor: an array of any type, byte order and strides, a list, or a tensor on any device.

    Args:
        name: what the error message calls `x`. shape: a tuple that its shape must equal; None: any.
        finite: whether to refuse NaN and infinity, which waits for a GPU.

    Raises:
        UserError: `x` holds no real numbers, has another shape, or is not finite.
    """
    if not isinstance(x, Tensor):
        try:
            array = np.asarray(x)
        except (ValueError, TypeError, RuntimeError):  # rows of different lengths, for example
            raise UserError(f"{name}: not an array of numbers") from None
        if array.dtype.kind not in "biuf":
            raise UserError(f"{name}: holds {array.dtype}, not numbers")
        x = torch.from_numpy(np.array(array, np.float64, order="C"))  # a copy, as an array may be read-only
    if x.is_complex():
        raise UserError(f"{name}: holds {x.dtype}, not real numbers")
    if shape is not None and x.shape != shape:
        raise UserError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    if finite and not x.isfinite().all():
        raise UserError(f"{name}: holds NaN or infinity")
    return x.to(device, dtype)


def as_int(x, name: str, least: int | None = None) -> int:
    """Convert an integer of any type, such as np.int64. Raises UserError if it is none, or smaller than `least`."""
    try:
        if isinstance(x, bool):
            raise TypeError
        number = operator.index(x)
    except TypeError:
        raise UserError(f"{name} {x!r}: must be an integer") from None
    if least is not None and number < least:
        raise UserError(f"{name} {number}: must be at least {least}")
    return number


def first_difference(flags) -> int | None:
    """The first column of `flags` [n, T] in which the rows differ; None if all are the same."""
    flags = np.asarray(flags)
    differ = flags.any(0) != flags.all(0)
    return int(differ.argmax()) if differ.any() else None


def damaged(folder: Path, problem: str) -> UserError:
    """The error that a dataset is damaged; only one that a program here has written can be deleted and made again."""
    if (folder / "metadata.json").exists():
        again = "delete its folder and make it again (collect_datasets.py, import_dataset.py or your recording)"
        return UserError(f"{problem}; the dataset is damaged; {again}")
    return UserError(f"{problem}; mend the files or copy them again (docs/datasets.md has the layout)")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_metadata(path: Path) -> dict:
    """The contents of `metadata.json`, {} where there is none. Raises UserError if it is another dataset's."""
    if not (path / "metadata.json").exists():
        return {}
    try:
        metadata = json.loads((path / "metadata.json").read_text("utf-8"))
        recorded = (metadata["scenario"].replace(":", "."), metadata["dataset"])
        metadata["checksums"] = dict(metadata["checksums"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(path, f"{path / 'metadata.json'}: not readable") from None
    if recorded != path.absolute().parts[-3:-1]:
        remedy = "move it to folders of these names, or correct scenario and dataset there"
        raise UserError(f"{path}: its metadata.json says {'/'.join(recorded)}; {remedy}")
    return metadata


def has_array(path: Path, name: str, metadata: dict) -> bool:
    """Whether a dataset has the optional array `name`: of any agent, or in metadata.json's list."""
    return any(path.glob(f"{name}*.npy")) or f"{name}_0.npy" in metadata.get("checksums", {})


def load_array(file: Path, sizes: tuple[int, ...], agent: int, metadata: dict) -> Tensor:
    """One agent's array of a dataset as float32 [T, width]. Raises UserError if it is not that.

    Args:
        sizes: how many columns each agent has, `width` the largest of them. Those that `agent` does not have become 0;
            a file may leave them out or hold them as zeros.
    """
    own, width = sizes[agent], max(sizes)
    if not file.is_file():
        raise damaged(file.parent, f"{file}: missing")
    if metadata and file_checksum(file) != metadata["checksums"].get(file.name):
        raise damaged(file.parent, f"{file}: differs from its checksum in metadata.json")
    try:
        array = np.asarray(np.load(file, allow_pickle=False))
    except Exception:  # numpy's parser of headers raises more than it documents
        raise damaged(file.parent, f"{file}: truncated or not a plain .npy array") from None
    if array.dtype.kind not in "biuf":
        raise damaged(file.parent, f"{file}: holds {array.dtype}, not numbers")
    if file.name.startswith(("dones_", "timeouts_")) and not ((array == 0) | (array == 1)).all():
        raise damaged(file.parent, f"{file}: holds other numbers than 0 and 1")
    array = array[:, None] if array.ndim == 1 and width == 1 else array
    if array.ndim != 2 or array.shape[1] not in (own, width):
        padded = f" or, padded with zeros, [T, {width}]" if own < width else ""
        raise UserError(f"{file}: has shape {array.shape}, expected [T, {own}]{padded}; is it another scenario's?")
    with np.errstate(over="ignore"):  # an infinity is noticed below
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if not tensor.isfinite().all():
        row = int((~tensor.isfinite()).any(1).nonzero()[0])
        raise damaged(file.parent, f"{file}: holds NaN or infinity, first in row {row}")
    if tensor[:, own:].any():
        row = int(tensor[:, own:].any(1).nonzero()[0])
        raise damaged(file.parent, f"{file}: agent {agent} has {own} columns, but others are not 0, first in row {row}")
    return F.pad(tensor, (0, width - tensor.shape[1]))


def episode_lengths(ended: Tensor, episode_steps: int) -> Tensor:
    """Lengths of the episodes, [episodes]. One ends where `ended` [T] is true, or after `episode_steps` rows."""
    lengths, ends = [], (ended.nonzero()[:, 0] + 1).tolist()
    for start, end in pairwise([0, *ends, len(ended)]):
        whole, rest = divmod(end - start, episode_steps)
        lengths += [episode_steps] * whole + [rest] * (rest > 0)
    return torch.tensor(lengths)
