"""Evaluation: returns, spread and time of actions, assignments of landmarks, GIF, table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from utils.program import UserError, counted

NAMES = {  # of the algorithms, in the order of the report's columns
    "ma_bc": "MA-BC",
    "ma_td3bc": "MA-TD3+BC",
    "ma_diffusion_ql": "MA-Diffusion-QL",
    "ma_cql": "MA-CQL",
    "omar": "OMAR",
    "ma_sfbc": "MA-SfBC",
    "madiff": "MADiff",
    "dom2": "DOM2",
}


@torch.no_grad()
def evaluate(act, env, args) -> Tensor:
    """Team returns [S, E] of one episode in every world of `env`; each seed's team plays E = num_envs / S of them.

    `act` maps observations [L, E, d] and a torch.Generator to actions [L, E, A]. `env` has the interface of TeamEnv.
    """
    S, n, E = args.num_seeds, env.num_agents, env.num_envs // args.num_seeds
    generator = torch.Generator(env.device).manual_seed(args.seed + 20_000)
    obs, returns = env.reset(), torch.zeros(env.num_envs, device=env.device)
    for _ in range(env.episode_steps):
        x = obs.view(S, E, n, -1).transpose(1, 2).flatten(0, 1)  # [S E, n, d] -> [L, E, d]
        actions = act(x, generator).unflatten(0, (S, n)).transpose(1, 2).flatten(0, 1)  # [L, E, A] -> [S E, n, A]
        obs, rewards, terminated = env.step(actions)
        returns += rewards.mean(-1)
        if terminated.all():
            break
    return returns.view(S, E)


@torch.no_grad()
def action_std(act, data: common.Dataset, num_seeds: int, mask: torch.Tensor | None = None) -> float:
    """Spread of the actions that one observation gets, averaged over 256 observations; 0: a deterministic policy.

    Args:
        mask: [n, A], 1 for the entries to average over; None: all.
    """
    obs = data.obs[:, :: max(1, data.obs.shape[1] // 256)][:, :256].repeat(num_seeds, 1, 1)  # [L, 256, d]
    generator = torch.Generator(obs.device).manual_seed(0)
    std = torch.stack([act(obs, generator) for _ in range(16)]).std(0)  # [L, 256, A]
    return (std if mask is None else std.unflatten(0, (num_seeds, -1)).mT[:, mask > 0]).mean().item()


def milliseconds_per_action(act, env, num_seeds: int) -> float:
    """Time in which every learner decides on one observation, the median of 30 calls."""
    obs = torch.zeros(num_seeds * env.num_agents, 1, env.obs_size, device=env.device)
    generator, times = torch.Generator(env.device), []
    for _ in range(30):
        start = time.perf_counter()
        act(obs, generator).cpu()  # waits for the result
        times.append(time.perf_counter() - start)
    return round(1e3 * sorted(times)[15], 3)


def assignments(run, shift: str, starts: int = 20, episodes: int = 100) -> dict:
    """How many ways the team finds from the same first state (Figures 1 and 2): at the end, which landmark is whose?

    Returns:
        distinct: different assignments of the agents to their nearest landmarks in `episodes` episodes, mean over
        `starts` first states; entropy: of their frequencies, in bits; both one number per seed. Of the first seed's
        first start: landmarks [m, 2], and the paths of ten episodes [10, 26, n, 2].
    """
    S, first = run.args.num_seeds, run.make_env(starts, shift, run.args.seed + 30_000).world
    first.reset()
    start = [x.repeat_interleave(episodes, 0).repeat(S, 1, 1) for x in (first.agent_pos, first.landmark_pos)]
    env, paths = run.make_env(len(start[0])), []
    world, step = env.world, env.world.step
    world.speed = first.speed.repeat_interleave(episodes, 0).repeat(S, 1)
    world.reset = lambda: world.set_state(start[0], torch.zeros_like(start[0]), start[1])

    def recorded_step(actions):
        paths.append(world.agent_pos[:10].cpu())
        return step(actions)

    world.step = recorded_step
    evaluate(run.act, env, run.args)
    paths.append(world.agent_pos[:10].cpu())
    m = world.num_landmarks
    nearest = torch.cdist(world.agent_pos, world.landmark_pos).argmin(-1)  # [S * starts * episodes, n]
    code = (nearest * m ** torch.arange(nearest.shape[1], device=nearest.device)).sum(-1)
    counts = F.one_hot(code, m ** nearest.shape[1]).view(S, starts, episodes, -1).sum(2)
    entropy = torch.special.entr(counts / episodes).sum(-1) / math.log(2)  # [S, starts]
    return {
        "distinct": (counts > 0).sum(-1).float().mean(1).tolist(),
        "entropy": entropy.mean(1).tolist(),
        "landmarks": world.landmark_pos[0].tolist(),
        "paths": torch.stack(paths, 1).double().round(decimals=3).tolist(),
    }


def write_gif(run, path: Path) -> str:
    """Seed 0's team in the standard environment as an animated GIF: four short episodes, or 300 steps of a long one.

    Returns:
        a line that says where it is, or why there is none
    """
    args = run.args
    episodes, every = (4, 1) if run.make_env(1).episode_steps < 100 else (1, 2)
    try:
        env = run.make_env(args.num_seeds * episodes, seed=args.seed, render_mode="rgb_array")
    except UserError as error:
        return f"--capture-video: {error}"
    env.episode_steps, step, taken = min(env.episode_steps, 300), env.step, count()
    frames = [[] for _ in range(episodes)]

    def recorded_step(actions):
        if next(taken) % every == 0:
            for i, episode in enumerate(frames):
                episode.append(env.render(i))
        return step(actions)

    env.step = recorded_step
    try:
        evaluate(run.act, env, args)
    except RuntimeError as error:
        return f"--capture-video: {error}"
    save_video([image for episode in frames for image in episode], path)
    return f"wrote {path}"


def save_video(images: Iterable, path: Path) -> None:
    """Write images, uint8 [height, width, 3], as an endless .gif or an .mp4 with ten of them per second.

    Raises:
        UserError: the file's name ends otherwise, or a package that writes .mp4 is missing.
    """
    if path.suffix == ".gif":
        from PIL import Image

        first, *others = map(Image.fromarray, images)
        first.save(path, save_all=True, append_images=others, duration=100, loop=0)
        return
    if path.suffix != ".mp4":
        raise UserError(f"{path}: must end with .gif or .mp4")
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: {error}; run `pip install imageio imageio-ffmpeg`, or write a .gif") from None
    imageio.mimsave(path, list(images), fps=10, macro_block_size=2)


def closing_table(results: dict, task: str) -> str:
    """One line per environment: return, normalised score, the dataset's returns and the paper's result of `task`."""
    dataset, data = results["dataset"], results["data"]
    seeds, episodes = results["num_seeds"], results["eval_episodes"]
    name = NAMES.get(results["algorithm"], results["algorithm"])
    if results["algorithm"] == "dom2" and results.get("settings", {}).get("eta") == 0:
        name = "BC"
    over_seeds = f"for each of {seeds} seeds, mean ± std over seeds" if seeds > 1 else "of one seed"
    paper_column = f"paper ({name})"
    lines = [
        f"\n{name} on {task}/{dataset}, last parameters ({counted(results['updates'], 'update')}),",
        f"mean return of {counted(episodes, 'episode')} {over_seeds}\n",
        f"{'environment':<12}{'return':>17}{'normalised':>12}{'data mean':>11}{'data max':>10}{paper_column:>24}",
    ]
    for shift, returns in results["returns"].items():
        x = torch.tensor(returns)
        spread = f" ± {x.std(correction=0):.1f}" if seeds > 1 else ""
        paper = common.paper_result(task, dataset, shift, name)
        normalised = common.normalised_score(task, x.mean().item())
        lines.append(
            f"{'standard' if shift == 'none' else shift:<12} {f'{x.mean():.1f}{spread}':>16} "
            f"{'-' if normalised is None else f'{normalised:.1f}':>11} {data['mean']:>10.1f} {data['max']:>9.1f} "
            f"{f'{paper[0]:.1f} ± {paper[1]:.1f}' if paper else '-':>23}"
        )
    versions = data["versions"]
    lines += [
        "",
        f"data: {versions[0]}, for all seeds" if len(versions) == 1 else f"data: {', '.join(versions)}, one per seed",
    ]
    for shift, found in results.get("assignments", {}).items():
        distinct, entropy = (sum(found[key]) / seeds for key in ("distinct", "entropy"))
        lines.append(f"{shift}: {distinct:.1f} assignments of agents to landmarks from one start, {entropy:.2f} bits")
    return "\n".join(lines)
