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

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import common
from particle_env import SCENARIOS
from utils.episodes import Episode, Team, dataset_folder, write_dataset
from utils.options import DatasetName, Natural, Options
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
    data_dir: str = "my_data"
    """folder of the datasets"""
    seed: Natural = 0
    """version: the arrays go to seed_<seed>_data"""
    overwrite: bool = False
    """replace the version if it exists"""


def library(name: str, package: str):
    """A library that only one format needs. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed; run `pip install '{package}'`") from None


@contextmanager
def readable(path: str, remedy: str):
    """Within the context an error of a format's library becomes a UserError that names `path`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # the libraries raise whatever a damaged file makes of them
        said = " ".join(str(error).split())  # some have several lines
        raise UserError(f"{path}: not readable ({type(error).__name__}: {said}); {remedy}") from None


def read_minari(args: Args, team: Team) -> Iterator[Episode]:
    """Episodes of a Minari dataset, which stores T + 1 observations of T transitions."""
    minari = library("minari", "minari[hdf5]")
    with readable(args.path, "give the folder of its metadata.json, or the id of a dataset that Minari has downloaded"):
        places = (Path(args.path), Path(args.path) / "data")
        folders = [folder for folder in places if (folder / "metadata.json").exists()]
        for found in minari.MinariDataset(folders[0]) if folders else minari.load_dataset(args.path):
            obs, actions = team.arrays(found.observations, "observations"), team.arrays(found.actions, "actions")
            yield team.episode(obs, actions, team.rewards(found.rewards), found.terminations[-1])


def hdf5_column(file, name: str):
    """An array of an HDF5 file, or {agent: array} from the groups `name/agent` or `agent/name`; None: there is none."""
    if name in file:
        item = file[name]
        return {agent: item[agent][()] for agent in item} if hasattr(item, "keys") else item[()]
    groups = {agent: group for agent, group in file.items() if hasattr(group, "keys")}
    return {agent: group[name][()] for agent, group in groups.items() if name in group} or None


def read_hdf5(args: Args, team: Team) -> Iterator[Episode]:
    """Episodes of an HDF5 file with D4RL's names, one after the other in long arrays."""
    h5py = library("h5py", "h5py")
    with readable(args.path, "give an HDF5 file with D4RL's names"), h5py.File(args.path) as file:
        if "episode_0" in file:
            raise UserError("a Minari dataset's file; pass its folder with --source minari")
        names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        columns = {name: hdf5_column(file, name) for name in names}
        yield from from_columns(columns, team)


def from_columns(columns: dict, team: Team) -> Iterator[Episode]:
    """Episodes of long arrays under D4RL's names; None where there is no such array."""
    missing = [name for name in ("observations", "actions", "rewards", "terminals") if columns.get(name) is None]
    if missing:
        raise UserError(f"holds no {', '.join(missing)}")
    obs, actions = (team.arrays(columns[name], name) for name in ("observations", "actions"))
    following, timeouts = columns.get("next_observations"), columns.get("timeouts")
    if timeouts is None:
        team.notes[f"no timeouts: an episode ends at a terminal or after {team.env.episode_steps} steps"] = None
    yield from team.cut(
        obs,
        actions,
        team.rewards(columns["rewards"]),
        team.flags(columns["terminals"], "terminals"),
        None if timeouts is None else team.flags(timeouts, "timeouts"),
        None if following is None else team.arrays(following, "observations"),
    )


def vault_columns(path: Path) -> dict:
    """The arrays of a Vault, still on disk: {name: array [rows, T, ...] or {agent: array}}, infos.state as "state"."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name.removeprefix("infos."): x for name, x in file.items()}
    ts = library("tensorstore", "tensorstore")
    if not (path / "metadata.json").exists():
        raise FileNotFoundError("there is no metadata.json in it")
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.resolve()}/"}}

    def read(name: str):
        return ts.open({"driver": "zarr", "kvstore": {**base, "path": name}}, read=True).result()

    T, columns = int(read("vault_index")[0].read().result()), {}
    for key in ts.KvStore.open(base).result().list().result():
        name = key.decode().removesuffix("/.zarray")
        if name.endswith("."):  # "observations.", "infos.state." or "observations.agent_0."
            field, *agent = name.removesuffix(".").removeprefix("infos.").split(".")
            array = read(name)[:, :T]
            columns[field] = {**columns.get(field, {}), agent[0]: array} if agent else array
    return columns


def read_vault(args: Args, team: Team) -> Iterator[Episode]:
    """Episodes of a Vault: each row of its first axis holds episodes one after the other, without next observations."""
    with readable(args.path, "give the Vault's innermost folder, such as simple_spread.vlt/Medium, or an .npz file"):
        columns = vault_columns(Path(args.path))
        columns["timeouts"] = columns.pop("truncations", None)
        if args.from_state:
            if "state" not in columns:
                raise UserError("--from-state: it holds no infos.state; leave the option out")
            columns["observations"] = columns["state"]
        needed = {name: columns.get(name) for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
        needed = {name: x for name, x in needed.items() if x is not None}
        if "actions" not in needed:
            raise UserError("holds no actions")
        first = needed["actions"]
        total = (next(iter(first.values())) if isinstance(first, dict) else first).shape[0]
        rows = args.rows or ((0,) if total == 1 else ())
        if not rows or not {*rows} <= {*range(total)}:
            raise UserError(
                f"has {total} rows (OMAR's Vaults have the five published versions in them); choose some with --rows "
                f"from 0 to {total - 1}"
            )

        def row_of(x, row: int):
            return {agent: row_of(y, row) for agent, y in x.items()} if isinstance(x, dict) else np.asarray(x[row])

        for row in rows:
            yield from from_columns({name: row_of(x, row) for name, x in needed.items()}, team)


READERS = {"minari": read_minari, "hdf5": read_hdf5, "vault": read_vault}


def import_dataset(args: Args) -> dict:
    """Read, describe and write a dataset. Returns its metadata.

    Raises:
        UserError: an option, a file or its contents do not fit; the library of the format is missing.
    """
    for option, value in (("--rows", args.rows), ("--from-state", args.from_state)):
        if value and args.source != "vault":
            raise UserError(f"{option}: belongs to --source vault; leave it out")
    if args.scenario in SCENARIOS and (args.agent_conf or args.agent_obsk or args.global_categories):
        raise UserError(f"--agent-conf, --agent-obsk, --global-categories: {args.scenario} is no robot; leave them out")
    team = Team(common.task_name(args), args.agents)
    path = dataset_folder(args.data_dir, team.task, args.dataset, args.seed, args.overwrite)
    episodes = list(READERS[args.source](args, team))
    source = {name: getattr(args, name) for name in ("source", "path", "agents", "rows", "from_state")}
    return write_dataset(episodes, team, args.dataset, path, args.overwrite, source)


def main() -> None:
    import_dataset(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    program(main)
