"""The .npy arrays of a dataset on disk, each checked while it is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.program import UserError


def damaged(folder: Path, problem: str) -> UserError:
    """The error that a dataset is damaged; only one that collect_datasets.py made can be deleted and made again."""
    if (folder / "metadata.json").exists():
        return UserError(f"{problem}; the dataset is damaged; delete its folder and run collect_datasets.py again")
    return UserError(f"{problem}; mend the files or copy them again (docs/datasets.md has the layout)")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_metadata(path: Path, task: str, dataset: str) -> dict:
    """The contents of `metadata.json`, {} where there is none. Raises UserError if it is another dataset's."""
    if not (path / "metadata.json").exists():
        return {}
    try:
        metadata = json.loads((path / "metadata.json").read_text())
        recorded = (metadata["scenario"], metadata["dataset"])
        metadata["checksums"] = dict(metadata["checksums"])
    except (ValueError, KeyError, TypeError):
        raise damaged(path, f"{path / 'metadata.json'}: not readable") from None
    if recorded != (task, dataset):
        raise damaged(path, f"{path}: metadata.json says {recorded[0]}/{recorded[1]}")
    return metadata


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
    array = array[:, None] if array.ndim == 1 and width == 1 else array
    if array.ndim != 2 or array.shape[1] not in (own, width):
        raise UserError(f"{file}: has shape {array.shape}, expected [T, {own}]; is it another scenario's?")
    with np.errstate(over="ignore"):  # an infinity is noticed below
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if not tensor.isfinite().all():
        row = int((~tensor.isfinite()).any(1).nonzero()[0])
        raise damaged(file.parent, f"{file}: holds NaN or infinity, first in row {row}")
    if tensor[:, own:].any():
        row = int(tensor[:, own:].any(1).nonzero()[0])
        raise damaged(file.parent, f"{file}: agent {agent} has {own} columns, but others are not 0, first in row {row}")
    return F.pad(tensor, (0, width - tensor.shape[1]))
