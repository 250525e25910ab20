"""Bring a dataset from elsewhere into the layout that training reads.

    python import_dataset.py --source minari --path mujoco/halfcheetah/medium-v0 --scenario HalfCheetah --dataset medium
    python import_dataset.py --source hdf5 --path halfcheetah_medium-v2.hdf5 --scenario HalfCheetah --dataset medium
    python import_dataset.py --source vault --path simple_tag.vlt/Expert --scenario simple_tag --dataset expert \
        --rows 0 --agents 0 1 2
    python dom2_mamujoco.py --dataset medium --data-dir my_data

It prints what it found. The observations, actions and rewards of each agent may be

    a dict or tuple over agents     the agents' names decide which is which, or --agents does
    an array [T, agents, width]     in the task's order, or as --agents says
    an array [T, width]             a whole robot's, which the library's partition of the task splits among the agents

docs/datasets.md says where each format's last observation comes from. The files of each format are read by a library
of its own, which the error message names where it is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import common
from utils.arrays import episode_lengths
from utils.episodes import NewDataset
from utils.options import DatasetName, Name, Natural, Options
from utils.program import UserError, program


@dataclass
class Args(Options):
    source: Literal["minari", "hdf5", "vault"]
    """format: a Minari dataset, an HDF5 file with D4RL's names, a flashbax Vault as OG-MARL has it"""
    path: str
    """folder or id of the Minari dataset, the HDF5 file, or the Vault's folder (or an .npz file of its arrays)"""
    scenario: str
    """the task"""
    dataset: DatasetName
    """which of the six datasets it stands for; the name chooses the settings"""
    agent_conf: str | None = None
    """partition of a robot's joints, as in dom2_mamujoco.py"""
    agent_obsk: Natural = 0
    """how many joints away an agent of a robot sees, as in dom2_mamujoco.py"""
    global_categories: tuple[Literal["qpos", "qvel"], ...] = ()
    """what else an agent of a robot sees, as in dom2_mamujoco.py"""
    agents: tuple[str, ...] = ()
    """names or indices of the source's agents that are the task's, in its order"""
    rows: tuple[int, ...] = ()
    """which rows of a Vault's first axis to take, one after the other"""
    from_state: bool = False
    """make a robot's observations from the whole state that a Vault stores (infos.state), not from its observations"""
    data_dir: Name = "my_data"
    """folder of the datasets"""
    seed: Natural = 0
    """version: the arrays go to seed_<seed>_data"""
    overwrite: bool = False
    """replace the version if it exists"""


def read_minari(args: Args, data: NewDataset) -> None:
    """Add the episodes of a Minari dataset, which stores T + 1 observations of T transitions."""
    import minari

    places = (Path(args.path), Path(args.path) / "data")
    folders = [folder for folder in places if (folder / "metadata.json").exists()]
    for found in minari.MinariDataset(folders[0]) if folders else minari.load_dataset(args.path):
        arrays = [data.arrays(getattr(found, what), what) for what in ("observations", "actions", "rewards")]
        data.add(found.terminations[-1], *arrays)


def read_hdf5(args: Args, data: NewDataset) -> None:
    """Add the episodes of an HDF5 file with D4RL's names; an agent's are in groups `name/agent` or `agent/name`."""
    import h5py

    def column(name: str):
        if name in file:
            item = file[name]
            return {agent: item[agent][()] for agent in item} if hasattr(item, "keys") else item[()]
        return {a: group[name][()] for a, group in file.items() if hasattr(group, "keys") and name in group} or None

    with h5py.File(args.path) as file:
        if "episode_0" in file:
            raise UserError("a Minari dataset's file; pass its folder with --source minari")
        names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        from_columns({name: x for name in names if (x := column(name)) is not None}, data)


def from_columns(columns: dict, data: NewDataset) -> None:
    """Add the episodes that lie one after the other in long arrays, {D4RL's name: what `arrays` or `flags` takes}."""
    missing = [name for name in ("observations", "actions", "rewards", "terminals") if name not in columns]
    if missing:
        raise UserError(f"holds no {', '.join(missing)}")
    arrays = [data.arrays(columns[name], name) for name in ("observations", "actions", "rewards")]
    if "next_observations" in columns:
        arrays.append(data.arrays(columns["next_observations"], "observations"))
    flags = [data.flags(columns[name], name) for name in ("terminals", "timeouts") if name in columns]
    longest = len(flags[0]) + 1  # timeouts alone end an episode
    if "timeouts" not in columns:
        longest = data.env.episode_steps
        data.notes[f"no timeouts: an episode ends at a terminal or after {longest} steps"] = None
    rows = {x.shape[1] for x in arrays} | {len(x) for x in flags}
    if len(rows) > 1:
        raise UserError(f"observations, actions, rewards and flags have {sorted(rows)} rows")
    lengths = episode_lengths(torch.from_numpy(np.any(flags, 0)), longest)
    for end, length in zip(lengths.cumsum(0).tolist(), lengths.tolist(), strict=True):
        data.add(flags[0][end - 1], *(x[:, end - length : end] for x in arrays))


def vault_arrays(path: Path) -> dict:
    """Arrays [rows, T, ...] of a Vault, still on disk: "observations", or "observations.agent_0"; without "infos."."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name.removeprefix("infos."): x for name, x in file.items()}
    import tensorstore as ts

    if not (path / "metadata.json").exists():
        raise FileNotFoundError("there is no metadata.json in it")
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.resolve()}/"}}

    def read(name: str):
        return ts.open({"driver": "zarr", "kvstore": {**base, "path": name}}, read=True).result()

    T = int(read("vault_index")[0].read().result())
    names = (key.decode().removesuffix("/.zarray") for key in ts.KvStore.open(base).result().list().result())
    return {name[:-1].removeprefix("infos."): read(name)[:, :T] for name in names if name.endswith(".")}


def read_vault(args: Args, data: NewDataset) -> None:
    """Add the episodes of a Vault: those of each row of its first axis, one after the other, no next observations."""
    names = {"actions": "actions", "rewards": "rewards", "terminals": "terminals", "truncations": "timeouts"}
    names["state" if args.from_state else "observations"] = "observations"  # {name in the Vault: D4RL's}
    arrays = {key: x for key, x in vault_arrays(Path(args.path)).items() if key.partition(".")[0] in names}
    if args.from_state and "state" not in arrays:
        raise UserError("--from-state: it holds no infos.state; leave the option out")
    total = min((x.shape[0] for x in arrays.values()), default=1)
    rows = args.rows or ((0,) if total == 1 else ())
    if not rows or not {*rows} <= {*range(total)}:
        raise UserError(
            f"has {total} rows (OMAR's Vaults have the five published versions in them); choose some with --rows from "
            f"0 to {total - 1}"
        )
    for row in rows:
        columns = {}
        for key, x in arrays.items():
            name, _, agent = key.partition(".")
            values = np.asarray(x[row])
            columns[names[name]] = {**columns.get(names[name], {}), agent: values} if agent else values
        from_columns(columns, data)


FORMATS = {  # --source: its reader, the package that it needs, and what to do where --path is not readable
    "minari": (read_minari, "minari[hdf5]", "give the folder of its metadata.json, or the id of a downloaded dataset"),
    "hdf5": (read_hdf5, "h5py", "give an HDF5 file with D4RL's names"),
    "vault": (read_vault, "tensorstore", "give the innermost folder, as simple_spread.vlt/Medium, or an .npz file"),
}


def import_dataset(args: Args) -> dict:
    """Read, describe and write a dataset. Returns its metadata.

    Raises:
        UserError: an option, a file or its contents do not fit; the library of the format is missing.
    """
    for option, value in (("--rows", args.rows), ("--from-state", args.from_state)):
        if value and args.source != "vault":
            raise UserError(f"{option}: belongs to --source vault; leave it out")
    task = common.task_name(args)
    data = NewDataset(task, args.dataset, args.data_dir, args.seed, args.agents, args.overwrite)
    read, package, remedy = FORMATS[args.source]
    try:
        read(args, data)
    except ImportError:
        raise UserError(f"{package.partition('[')[0]} is not installed; run `pip install '{package}'`") from None
    except UserError as error:
        raise UserError(f"{args.path}: {error}") from None
    except Exception as error:  # the libraries raise whatever a damaged file makes of them
        raise UserError(f"{args.path}: not readable ({type(error).__name__}: {error}); {remedy}") from None
    return data.write({name: getattr(args, name) for name in ("source", "path", "agents", "rows", "from_state")})


def main() -> None:
    import_dataset(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    program(main)
