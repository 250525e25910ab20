"""MA-Diffusion-QL: Diffusion-QL (Wang et al. 2023) for every agent by itself, the algorithm that DOM2 starts from.

    ddpm           ancestral sampling: fresh noise in every denoising step
    sample_batch   the diffusion loss is at the times at which ddpm calls the network; DOM2's is at tau_0 as well
    update         DOM2's, with a network that predicts the noise, without conservative term and without augmentation

    python baselines/ma_diffusion_ql.py --scenario simple_tag --dataset random
    python baselines/ma_diffusion_ql.py --help

Losses, networks, learning rates and updates are DOM2's, so that the two differ in what is named above and nothing else.
What differs from the original:
- The Q-loss is Eq. 5's. The original takes a random one of the twins for Q and the other one, at the policy's own
  action, for the scale. Its diffusion loss is the mean over action entries, where Eq. 3 has the sum.
- Updates, networks (SiLU, not Mish) and learning rates, which do not fall as the original's do; the moving average
  begins at once and moves in every update.
- One sample acts, on MuJoCo tasks the chain without noise. The original draws one of 50 with probability softmax(Q);
  `--eval-candidates 50` takes their best (on MuJoCo tasks with `--temperature 1`).
`--prediction action --augment` gives DOM2 with DDPM in place of DPM-Solver where DOM2 has zeta = 0, with tau_0 left out
of the diffusion loss; elsewhere add its --zeta.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import dom2_mamujoco
import dom2_mpe
from baselines import shared
from baselines.shared import options, settings_table
from dom2_mpe import (
    DOM2,
    Batch,
    DiffusionPolicy,
    NoiseSchedule,
    make_optimizers,
    q_of_candidates,
    time_grid,
    train,
    update,
)
from run import Algorithm, parse
from utils.program import program


@dataclass
class EvaluationArgs(options.EvaluationArgs):
    """How to measure."""

    eval_candidates: options.Count = 1
    """actions sampled per decision; above 1, the one with the highest Q acts"""


@dataclass
class Args(shared.DataArgs, dom2_mpe.TrainingArgs, dom2_mpe.NetworkArgs, EvaluationArgs, options.RunArgs):
    """All options of MA-Diffusion-QL."""


def dom2_settings() -> dict:
    """{scenario: {dataset: options}}: how DOM2 learns there, without what makes it DOM2."""
    groups = dom2_mpe.TrainingArgs, dom2_mpe.NetworkArgs
    names = ["quantiles", "copies", *(field.name for group in groups for field in fields(group))]
    rows = {}
    for algorithm, scenarios in ((DOM2, (*shared.SCENARIOS, shared.OWN)), (dom2_mamujoco.DOM2, ("HalfCheetah",))):
        for scenario in scenarios:
            dom2 = {dataset: asdict(algorithm.args(scenario, dataset)) for dataset in shared.DATASETS}
            rows[scenario] = {
                dataset: {name: values[name] for name in names} | {"zeta": 0.0, "prediction": "noise"}
                for dataset, values in dom2.items()
            }
    return rows


SETTINGS = settings_table(particles={}, mujoco={}, rows=dom2_settings())


def ddpm(noise_fn, noise: Tensor, schedule: NoiseSchedule, num_steps: int, clip: bool = False) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) on `dpm_solver`'s grid and with its arguments.

    a_{i-1} ~ q(a_{i-1} | a_i, a_0), with the clean action a_0 = (a_i - sigma_i eps(a_i, tau_i)) / alpha_i. With a_i |
    a_{i-1} ~ N(alpha a_{i-1}, v), alpha = alpha_i / alpha_{i-1} and v = sigma_i^2 - alpha^2 sigma_{i-1}^2, this is

        N(alpha sigma_{i-1}^2 / sigma_i^2 a_i + alpha_{i-1} v / sigma_i^2 a_0,  v sigma_{i-1}^2 / sigma_i^2)

    and the last step takes its mean.

    Args:
        noise: N(0, I), [..., N * A]: the chain's start and the noise of its steps but the last.
    """
    a, *fresh = noise.chunk(num_steps, -1)
    fresh.append(torch.zeros_like(a))
    for (s, t), eps_s in zip(pairwise(time_grid(num_steps)), fresh, strict=True):
        alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
        a0 = (a - sigma_s * noise_fn(a, s)) / alpha_s
        if clip:
            a0 = a0.clamp(-1, 1)
        alpha, v = alpha_s / alpha_t, sigma_s**2 - (alpha_s / alpha_t * sigma_t) ** 2
        mean = alpha * sigma_t**2 / sigma_s**2 * a + alpha_t * v / sigma_s**2 * a0
        a = mean + math.sqrt(v) * sigma_t / sigma_s * eps_s
    return a


class DDPMPolicy(DiffusionPolicy):
    """A diffusion policy that samples by `ddpm`: observations [L, B, d], noise [L, B, N * A] -> actions [L, B, A]."""

    solver = staticmethod(ddpm)


def make_learners(args: Args, env) -> nn.ModuleDict:
    return dom2_mpe.make_learners(args, env, DDPMPolicy)


def sample_batch(data, args: Args) -> Batch:
    """As DOM2's, without the time tau_0 and with the noise of whole chains: N * A entries per transition."""
    batch, N, device = dom2_mpe.sample_batch(data, args), args.diffusion_steps, data.obs.device
    L, B, A = batch.action.shape
    tau = 1e-3 + (1 - 1e-3) * torch.randint(1, N + 1, (L, B), device=device) / N  # of `time_grid` without the last
    target_noise, policy_noise = torch.randn(2, L, B, N * A, device=device)
    return batch._replace(tau=tau, target_noise=target_noise, policy_noise=policy_noise)


@torch.no_grad()
def act(learners: nn.ModuleDict, obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Sample actions: obs [L, E, d] -> [L, E, A]; the best by Q of `eval_candidates` where that is above 1."""
    (L, E, d), K = obs.shape, args.eval_candidates
    A = learners["critic"].layers[0].weight.shape[1] - d
    noise = torch.randn(L, E * K, args.diffusion_steps * A, generator=generator, device=obs.device)
    actions = learners["target_policy"](obs.repeat_interleave(K, 1), args.temperature * noise).view(L, E, K, A)
    if K == 1:
        return actions[:, :, 0]
    best = q_of_candidates(learners["critic"], obs, actions).amin(1).argmax(-1)  # [L, E]
    return actions.take_along_dim(best[..., None, None], 2)[:, :, 0]


MA_DIFFUSION_QL = Algorithm(
    "ma_diffusion_ql", Args, SETTINGS, make_learners, make_optimizers, sample_batch, update, act
)


if __name__ == "__main__":
    program(lambda: train(parse(MA_DIFFUSION_QL, __doc__), MA_DIFFUSION_QL))
