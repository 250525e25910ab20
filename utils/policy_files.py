"""Policy files: what acting needs of a trained run, in one .safetensors file. pretrained/policies/ holds some.

A file holds the target policies, which act, of some seeds of a run (leading learner axis, seed 0's agents first) and
the frozen prey where the scenario has one. Its metadata has one entry, `policy`: the algorithm's name, the options, the
results and a checksum, in JSON. There are no critics and optimisers, so no run can be continued from it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from utils.frozen import policy_checksum
from utils.program import UserError, write_file

POLICIES = Path(__file__).resolve().parents[1] / "pretrained" / "policies"
DTYPES = {"float16": torch.float16, "float32": torch.float32}  # of the weight matrices


def policy_file(path: str | Path) -> Path | None:
    """The policy file that `path` is, or that has this name in pretrained/policies; None: it should be a run folder."""
    named = POLICIES / f"{path}.safetensors"
    if Path(path).suffix == ".safetensors":
        return Path(path)
    return named if not Path(path).exists() and named.is_file() else None


def policy_names() -> list[str]:
    """Names of the policies in pretrained/policies."""
    return sorted(file.stem for file in POLICIES.glob("*.safetensors"))


def checksum(facts: dict, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256((json.dumps(facts) + policy_checksum(tensors)).encode()).hexdigest()


def write_policy(file: Path, checkpoint: dict, results: dict, dtype: str = "float16") -> None:
    """Write a policy file.

    Args:
        checkpoint: of a run, as `read_checkpoint` returns it. results: its results.json.
        dtype: of the policy's weight matrices, a key of DTYPES. Everything else stays in float32: little in size, and
            rounding the frequencies of the time features would shift their phases.
    """
    policy = {name: x for name, x in checkpoint["learners"].items() if name.startswith("target_policy.")}
    tensors = {name: x.to(DTYPES[dtype]) if name.endswith(".weight") else x for name, x in policy.items()}
    tensors |= {f"prey.{name}": x for name, x in (checkpoint["prey"] or {}).items()}
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    facts = {"algorithm": checkpoint["algorithm"], "args": checkpoint["args"], "results": results}
    facts |= {"agents": checkpoint["agents"]} if checkpoint.get("agents") else {}  # older checkpoints do not say
    facts["checksum"] = checksum(facts, tensors)
    write_file(file, save(tensors, {"policy": json.dumps(facts)}))  # of several entries the order would vary


def read_policy(file: Path) -> dict:
    """The contents of a policy file like a checkpoint: learners holds the target policy alone. optimizers, rng and
    cuda_rng are None, and results is the run's results.json. All tensors are float32.

    Raises:
        UserError: the file is missing, damaged or not such a file.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with safe_open(file, "pt") as f:
            facts, tensors = json.loads(f.metadata()["policy"]), {name: f.get_tensor(name) for name in f.keys()}
        if facts.pop("checksum") != checksum(facts, tensors):
            raise ValueError
        results, parts = facts["results"], {"target_policy": {}, "prey": {}}
        for name, x in tensors.items():
            parts[name.partition(".")[0]][name] = x.to(torch.float32, copy=True)  # the file may change
        return {
            "algorithm": facts["algorithm"],
            "args": facts["args"],
            "agents": facts.get("agents"),  # older files do not say
            "updates": results["updates"],
            "learners": parts["target_policy"],
            "optimizers": None,
            "prey": {name.removeprefix("prey."): x for name, x in parts["prey"].items()} or None,
            "data": results["data"],
            "rng": None,
            "cuda_rng": None,
            "results": results,
        }
    except Exception as error:  # the library raises errors of its own
        raise UserError(f"{file}: not a readable policy file ({type(error).__name__}); restore or delete it") from None
