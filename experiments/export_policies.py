"""Write what acting needs of finished DOM2 runs to one policy file each, which `load_policy` and `--eval-only` take.

    python experiments/export_policies.py runs/NAME                  # writes pretrained/policies/<task>-<dataset>
    python experiments/export_policies.py runs/NAME --num-seeds 1    # only the first seed's team
    python experiments/export_policies.py --output my_policies runs/ONE runs/ANOTHER --dtype float32

A policy file can be exported again with fewer seeds. pretrained/policies/README.md lists the files there.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import common
from experiments.report import markdown_table, read, write
from utils.checkpoints import checkpoint_file, options_of, read_checkpoint
from utils.options import WHERE_AND_HOW, OptionalCount, OptionalName, Options
from utils.policies import maker_of
from utils.policy_files import DTYPES, POLICIES, read_policy, write_policy
from utils.program import UserError, counted, disk_errors, program


@dataclass
class Args(Options):
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders of finished DOM2 runs, or policy files"""
    output: OptionalName = None
    """folder of the policy files; default: pretrained/policies of this repository"""
    dtype: Literal[tuple(DTYPES)] = "float16"
    """of the policies' weight matrices"""
    num_seeds: OptionalCount = None
    """the first so many seeds of each run; default: all"""


# A policy file has the defaults of these options. Its `command` and `prey` still say what the run was given.
NOT_KEPT = ("data_dir", *WHERE_AND_HOW)
OF_RESULTS = (
    *("algorithm", "scenario", "dataset", "num_seeds", "updates", "eval_episodes", "returns", "data", "hardware"),
    *("seconds", "command", "commit"),
)


PAGE = """# Trained policies

Each file holds DOM2's target policies of one run: what acting needs, no critics and optimisers.
[How to load, evaluate and play them](../../docs/environments.md#trained-policies).
The table shows mean returns over the seeds, in the standard and in the shifted environments, with the last parameters.
Each file holds its settings.
`python experiments/export_policies.py` writes the files and this page.

"""


def prepare(run: str, num_seeds: int | None) -> tuple[str, dict, dict]:
    """The name of a run's policy file, and the checkpoint and the results with which `write_policy` makes it.

    Raises:
        UserError: the run is not finished or another algorithm's, or has fewer seeds.
    """
    checkpoint, file = read_checkpoint(run), checkpoint_file(run)
    algorithm = maker_of(checkpoint, file)
    if algorithm.name != "dom2":
        raise UserError(f"{run}: a run of {algorithm.name}; only DOM2 can be exported, others act with more networks")
    args = options_of(checkpoint, file, algorithm)
    results = checkpoint.get("results") or read(Path(run) / "results.json")
    if results is None or results["updates"] != checkpoint["updates"]:
        raise UserError(f"{run}: not finished, or trained further since; --resume {run} writes its results.json anew")
    S, K = args.num_seeds, args.num_seeds if num_seeds is None else num_seeds
    if K > S:
        raise UserError(f"--num-seeds {K}: {run} holds {counted(S, 'seed')}")
    learners = {name: x.unflatten(0, (S, -1))[:K].flatten(0, 1) for name, x in checkpoint["learners"].items()}
    defaults = asdict(algorithm.args(args.scenario, args.dataset))
    options = asdict(args) | {name: defaults[name] for name in NOT_KEPT} | {"num_seeds": K}
    returns = {shift: x[:K] for shift, x in results["returns"].items()}
    results = {name: results[name] for name in OF_RESULTS} | {"num_seeds": K, "returns": returns}
    return (
        f"{common.task_name(args)}-{args.dataset}".replace(":", "."),
        checkpoint | {"learners": learners, "args": options},
        results,
    )


def table(folder: Path) -> str:
    """A page with one row for each policy file in a folder: the returns of the runs that made them."""
    lines = [["policy", "seeds", "standard", "normalised", "shifted", "mean of the dataset", "kB"]]
    for file in sorted(folder.glob("*.safetensors")):
        policy = read_policy(file)
        results, first = policy["results"], policy["args"]["seed"]
        seeds = ", ".join(str(first + i) for i in range(results["num_seeds"]))
        mean = {shift: sum(x) / len(x) for shift, x in results["returns"].items()}
        standard, data = mean.pop("none"), results["data"]["mean"]
        score = common.normalised_score(common.task_name(Namespace(**policy["args"])), standard)
        shifted = ", ".join(f"{shift} {x:.1f}" for shift, x in mean.items())
        lines.append([f"`{file.stem}`", seeds, f"{standard:.1f}"])
        lines[-1] += ["-" if score is None else f"{score:.1f}", shifted or "-", f"{data:.1f}"]
        lines[-1].append(str(round(file.stat().st_size / 1000)))
    return PAGE + markdown_table(lines)


def export(args: Args) -> None:
    folder, made = Path(args.output or POLICIES), {}
    for run in args.runs:
        name, *contents = prepare(run, args.num_seeds)
        if name in made:
            raise UserError(f"{run}: another of the runs makes {name}.safetensors too; give one of them")
        made[name] = contents
    with disk_errors(folder, "free some space"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (checkpoint, results) in made.items():
            file = folder / f"{name}.safetensors"
            verb = "replaced" if file.exists() else "wrote"
            write_policy(file, checkpoint, results, args.dtype)
            print(f"{verb} {file}: seeds: {results['num_seeds']}, {args.dtype}, {file.stat().st_size:,} bytes")
        if folder.resolve() == POLICIES:
            write(folder / "README.md", table(folder))


if __name__ == "__main__":
    program(lambda: export(tyro.cli(Args, description=__doc__)))
