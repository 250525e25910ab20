"""The three figures of docs/tutorial.md, each from networks that are trained here on a toy dataset.

    python experiments/tutorial_figures.py        # writes docs/tutorial-*.png, in about 20 seconds on one CPU core

Toy 1: one observation, an obstacle straight ahead. Half of the actions (a_1, a_2) go round it on the left, near
(-0.6, 0.6), and half on the right, near (0.6, 0.6). Toy 2: one action entry a, which lies between -0.25 and 0.25 in the
data, and a reward that is largest at 0.25. Shapes as in dom2_mpe.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

from baselines.ma_bc import bc_loss
from baselines.shared import Policy
from common import Dataset
from dom2_mpe import (
    DOM2,
    TwinCritic,
    adam,
    critic_loss,
    diffusion_loss,
    gradient_step,
    make_learners,
    sample_batch,
    time_grid,
)
from utils.options import lines
from utils.program import program

DOCS = Path(__file__).resolve().parents[1] / "docs"
LEFT, RIGHT, DATA = "#1f77b4", "#d95f02", "#8a8a8a"
MODES = torch.tensor([[-0.6, 0.6], [0.6, 0.6]])
BAND, BEST = 0.25, 0.25  # toy 2: the data's actions lie in [-BAND, BAND]; the reward is largest at BEST


def toy_dataset(action: Tensor, reward: Tensor) -> Dataset:
    """One agent, one observation (zero), episodes of one step: action [T, A], reward [T]."""
    T = len(action)
    zeros, rows = torch.zeros(1, T, 1), torch.arange(T)
    columns = zeros, action[None], reward[None], zeros, torch.ones(1, T)
    return Dataset(*columns, rows, torch.ones_like(rows), reward, {}, {"toy": T}).replicated(lambda returns: rows)


def two_ways(T: int = 4_096) -> Dataset:
    """Toy 1: actions near one of the two MODES, standard deviation 0.08."""
    action = MODES[torch.randint(2, (T,))] + 0.08 * torch.randn(T, 2)
    return toy_dataset(action.clamp(-1, 1), torch.zeros(T))


def true_reward(action: Tensor) -> Tensor:
    """Toy 2's reward: 1 at BEST, nearly 0 from half a unit away on."""
    return torch.exp(-((action - BEST) ** 2) / 0.08)


def narrow_band(T: int = 4_096) -> Dataset:
    """Toy 2: actions uniform in [-BAND, BAND]."""
    action = (torch.rand(T, 1) * 2 - 1) * BAND
    return toy_dataset(action, true_reward(action[:, 0]))


def train_policies(updates: int, num_steps: int):
    """DOM2's diffusion policy without Q-loss (eta = 0), and MA-BC's deterministic policy, on toy 1."""
    torch.manual_seed(0)
    data, options = two_ways(), dict(diffusion_steps=num_steps, batch_size=256, actor_lr=3e-3)
    args = DOM2.args("simple_spread", "expert", **options)
    learners = make_learners(args, SimpleNamespace(num_agents=1, obs_size=1, action_size=2, device="cpu"))
    learners["bc"] = Policy(1, 1, 2, (64, 64))
    optimizers = adam(learners, policy=args.actor_lr, bc=args.actor_lr)
    for _ in range(updates):
        batch = sample_batch(data, args)
        gradient_step(learners, optimizers, "policy", diffusion_loss(learners["policy"], batch), args.max_grad_norm)
        gradient_step(learners, optimizers, "bc", bc_loss(learners["bc"], batch), args.max_grad_norm)
    return data, learners


def train_critic(zeta: float, updates: int, num_seeds: int = 5) -> TwinCritic:
    """Critics of `num_seeds` learners on toy 2, Eq. 1. Every transition is terminal: the target is the reward alone."""
    torch.manual_seed(0)
    data, args = narrow_band(), DOM2.args("simple_spread", "expert", num_seeds=num_seeds, batch_size=128)
    learners = make_learners(args, SimpleNamespace(num_agents=1, obs_size=1, action_size=1, device="cpu"))
    optimizers = adam(learners, critic=3e-3)
    for _ in range(updates):
        batch, targets = sample_batch(data, args), (learners["target_critic"], learners["target_policy"])
        loss, _ = critic_loss(learners["critic"], *targets, batch, args.gamma, zeta)
        gradient_step(learners, optimizers, "critic", loss, args.max_grad_norm)
    return learners["critic"]


@torch.no_grad()
def denoise(policy, samples: int) -> Tensor:
    """The actions of a chain at every time of the grid: [N + 1, samples, A], from noise to the clean action."""
    obs, noise, chain = torch.zeros(1, samples, 1), torch.randn(1, samples, 2), []

    def noise_fn(a, tau):  # the solver calls it once a step, with the action so far
        chain.append(a[0])
        return policy.eps(a, obs, tau)

    chain.append(policy.solver(noise_fn, noise, policy.schedule, policy.num_steps)[0])
    return torch.stack(chain)


def axes_of_actions(ax, x: tuple[float, float], y: tuple[float, float]) -> None:
    ax.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color="#bbbbbb", linewidth=0.8)  # the action box
    ax.set(xlim=x, ylim=y, aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)


def plot_denoising(chain: Tensor, shown: int = 6) -> Figure:
    """`shown` times of the grid, a panel each: the actions, and their way since the panel before."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    colours = [LEFT if left else RIGHT for left in (chain[-1, :, 0] < 0).tolist()]
    N, every = len(chain) - 1, (len(chain) - 1) // (shown - 1)
    taus, axes = time_grid(N), figure.subplots(2, shown // 2, sharex=True, sharey=True).flat
    for ax, k in zip(axes, range(0, N + 1, every), strict=True):
        axes_of_actions(ax, (-2.6, 2.6), (-2.6, 2.6))
        for way, colour in zip(chain[max(0, k - every) : k + 1].unbind(1), colours, strict=True):
            ax.plot(*way.T, color=colour, linewidth=0.6, alpha=0.4)
        ax.scatter(*chain[k].T, s=10, c=colours, linewidths=0, zorder=3)
        what = {0: "noise", N: "action"}.get(k, f"step {k}")
        ax.set_title(rf"{what}, $\tau$ = {taus[k]:.2g}", fontsize=12)
    figure.supxlabel("first action entry $a_1$ (force)", fontsize=11)
    figure.supylabel("second action entry $a_2$ (force)", fontsize=11)
    return figure


def plot_two_modes(data: Dataset, samples: Tensor, bc_action: Tensor) -> Figure:
    """The data and, in the left panel, samples of the diffusion policy; in the right one, the deterministic action."""
    figure = Figure(figsize=(7, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax in (left, right):
        axes_of_actions(ax, (-1.05, 1.05), (0, 1.05))
        ax.set_yticks((0, 0.5, 1))
        ax.scatter(*data.action[0, : len(samples)].T, s=16, c=DATA, alpha=0.5, linewidths=0, label="data")
        ax.set_xlabel("first action entry $a_1$ (force)", fontsize=11)
    left.set_ylabel("second entry $a_2$ (force)", fontsize=11)
    left.scatter(*samples.T, s=14, c=RIGHT, marker="x", linewidths=0.9, label=f"{len(samples)} samples")
    right.scatter(*bc_action, s=130, c=RIGHT, marker="X", linewidths=0, label="its only action")
    left.set_title("diffusion policy: both modes", fontsize=12)
    right.set_title("deterministic policy: between them", fontsize=12)
    for ax in (left, right):
        ax.legend(loc="lower center", fontsize=10, ncols=2, frameon=False)
    return figure


@torch.no_grad()
def plot_conservative(critics: dict[float, TwinCritic]) -> Figure:
    """The mean of the twins of every seed along the action, without and with the conservative term."""
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    grid = torch.linspace(-1, 1, 201)
    for ax, (zeta, critic) in zip(figure.subplots(1, 2, sharey=True), critics.items(), strict=True):
        L = len(critic.layers[0].weight) // 2
        actions = grid[None, :, None].expand(L, -1, 1)
        q = critic(torch.zeros_like(actions), actions).mean(1)  # [L, 201]
        ax.axvspan(-BAND, BAND, color="#e4e4e4", linewidth=0, label="actions in the data")
        ax.plot(grid, true_reward(grid), color="black", linestyle="--", linewidth=1.4, label="true value")
        for seed, curve in enumerate(q):
            ax.plot(grid, curve, color=LEFT, linewidth=1.3, label=None if seed else "$Q$, five seeds")
            best = curve.argmax()
            ax.plot(grid[best], curve[best], "o", color=RIGHT, ms=6, label=None if seed else "its maximum", zorder=4)
        ax.set_title(rf"$\zeta$ = {zeta:g}", fontsize=12)
        ax.set_xlabel("action $a$ (force)", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(xlim=(-1.03, 1.03), ylim=(-1.5, 2.7))
    figure.axes[0].set_ylabel("value $Q(o, a)$ (reward)", fontsize=11)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """700 pixels wide, in 128 colours."""
    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main(folder: Path = DOCS, updates: int = 1_200) -> None:
    """Train the networks and draw the three figures.

    Args:
        folder: where the figures go
        updates: gradient steps of the policies
    """
    data, learners = train_policies(updates, num_steps=10)
    save(plot_denoising(denoise(learners["policy"], 100)), folder / "tutorial-denoising.png")
    with torch.no_grad():
        bc_action = learners["bc"](torch.zeros(1, 1, 1))[0, 0]
    samples = denoise(learners["policy"], 300)[-1]
    save(plot_two_modes(data, samples, bc_action), folder / "tutorial-two-modes.png")
    critics = {zeta: train_critic(zeta, updates // 4) for zeta in (0.0, 0.1)}
    save(plot_conservative(critics), folder / "tutorial-conservative.png")


if __name__ == "__main__":
    program(lambda: tyro.cli(main, description=lines(__doc__)))
