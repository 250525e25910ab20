"""Frozen policies: the prey of predator-prey and World, and the behaviour policies that made the datasets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.arrays import as_tensor
from utils.program import UserError, load_torch


def policy_action(params: dict[str, Tensor], obs: Tensor) -> Tensor:
    """A frozen deterministic policy, as OMAR's checkpoints hold it: obs [..., d] -> action [..., A] in [-1, 1].

    `obs` may be any array of numbers; the action is a tensor where the parameters are.

    `params` is a state dict of three linear layers fc1, fc2, fc3 (ReLU, ReLU, tanh) and, optionally, of a BatchNorm1d
    `in_fn` on the input, used in evaluation mode.
    """
    weight = params["fc1.weight"]
    x = as_tensor(obs, "obs", None, weight.device, torch.promote_types(weight.dtype, torch.float32))
    if "in_fn.running_mean" in params:
        x = (x - params["in_fn.running_mean"]) / (params["in_fn.running_var"] + 1e-5).sqrt()
        x = x * params["in_fn.weight"] + params["in_fn.bias"]
    x = F.relu(F.linear(x, params["fc1.weight"], params["fc1.bias"]))
    x = F.relu(F.linear(x, params["fc2.weight"], params["fc2.bias"]))
    return torch.tanh(F.linear(x, params["fc3.weight"], params["fc3.bias"]))


def policy_checksum(params: dict[str, Tensor]) -> str:
    """SHA-256 of a policy's parameters, the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode() + params[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_prey(path: str | Path, obs_size: int) -> dict[str, Tensor]:
    """The frozen prey of a checkpoint in the layout of OMAR's `pretrained_adv_model.pt`: the last of `agent_params`.

    Raises:
        UserError: missing or unreadable, not of that layout, or of another observation size.
    """
    path = Path(path)
    checkpoint = load_torch(path)
    try:
        params = {
            name: value.to("cpu", torch.float32) for name, value in checkpoint["agent_params"][-1]["policy"].items()
        }
        action = policy_action(params, torch.zeros(1, obs_size))
        if action.shape != (1, 2) or not action.isfinite().all():
            raise ValueError
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError):
        raise UserError(
            f"{path}: holds no prey policy for observations of size {obs_size} (expected agent_params[-1]['policy'] "
            "with fc1, fc2, fc3); pass the pretrained_adv_model.pt of this scenario as --prey"
        ) from None
    return params


def load_behaviour(path: str | Path, env, prey_obs_size: int | None) -> dict:
    """Behaviour policies of one scenario: state dicts "medium" and "expert" (lists over agents), "prey" (or None), and
    "replay", the recorded actions of a TD3 run with its seed (or None).

    Args:
        env: an environment of the scenario. prey_obs_size: None where the scenario has no prey.

    Raises:
        UserError: missing, unreadable or of another layout.
    """
    checkpoint = load_torch(Path(path))
    n, sizes = env.num_agents, [env.obs_size] * env.num_agents + ([prey_obs_size] if prey_obs_size else [])
    try:
        everybody = [entry["policy"] for entry in checkpoint["agent_params"]]
        medium = [entry["policy"] for entry in checkpoint["medium"]]
        for policies in (everybody, medium + everybody[n:]):
            for policy, size in zip(policies, sizes, strict=True):
                action = policy_action(policy, torch.zeros(1, size))
                if action.shape != (1, env.action_size) or not action.isfinite().all():
                    raise ValueError
        replay = checkpoint.get("replay")
        if replay is not None:
            steps, worlds, *action_shape = replay["actions"].shape
            whole = steps * worlds > 0 and steps % env.episode_steps == 0
            if not whole or action_shape != [n, env.action_size] or not isinstance(replay["seed"], int):
                raise ValueError
            if not replay["actions"].isfinite().all():
                raise ValueError
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError):
        raise UserError(
            f"{path}: not behaviour policies of this scenario; retrain them with experiments/train_behaviour.py"
        ) from None
    return {
        "prey": everybody[n] if prey_obs_size else None,
        "expert": everybody[:n],
        "medium": medium,
        "replay": replay,
    }
