"""The .npy arrays of a dataset on disk, each checked while it is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.program import UserError

REMEDY = "the dataset is damaged; delete its folder and run collect_datasets.py again, or copy it again"


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
        raise UserError(f"{path / 'metadata.json'}: not readable; {REMEDY}") from None
    if recorded != (task, dataset):
        raise UserError(f"{path}: metadata.json says {recorded[0]}/{recorded[1]}; {REMEDY}")
    return metadata


def load_array(file: Path, width: int, metadata: dict) -> Tensor:
    """One array of a dataset as float32 [T, width]. Raises UserError if it is not that."""
    if not file.is_file():
        raise UserError(f"{file}: missing; {REMEDY}")
    if metadata and file_checksum(file) != metadata["checksums"].get(file.name):
        raise UserError(f"{file}: differs from its checksum in metadata.json; {REMEDY}")
    try:
        array = np.asarray(np.load(file, allow_pickle=False))
    except Exception:  # numpy's parser of headers raises more than it documents
        raise UserError(f"{file}: truncated or not a plain .npy array; {REMEDY}") from None
    if array.dtype.kind not in "biuf":
        raise UserError(f"{file}: holds {array.dtype}, not numbers; {REMEDY}")
    array = array[:, None] if array.ndim == 1 and width == 1 else array
    if array.ndim != 2 or array.shape[1] != width:
        raise UserError(f"{file}: has shape {array.shape}, expected [T, {width}]; is it another scenario's?")
    with np.errstate(over="ignore"):  # an infinity is noticed below
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if not tensor.isfinite().all():
        raise UserError(f"{file}: holds NaN or infinity; {REMEDY}")
    return tensor
