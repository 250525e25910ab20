"""What is measured and shown besides the return: spread and time of actions, assignments of landmarks, GIF, table."""

from __future__ import annotations

import math
import time
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from utils.program import counted

NAMES = {
    **{"dom2": "DOM2", "ma_bc": "MA-BC", "ma_td3bc": "MA-TD3+BC", "ma_cql": "MA-CQL", "omar": "OMAR"},
    **{"ma_sfbc": "MA-SfBC", "madiff": "MADiff", "ma_diffusion_ql": "MA-Diffusion-QL"},
}


@torch.no_grad()
def action_std(act, data: common.Dataset, num_seeds: int) -> float:
    """Spread of the actions that one observation gets, averaged over 256 observations; 0: a deterministic policy."""
    obs = data.obs[:, :: max(1, data.obs.shape[1] // 256)][:, :256].repeat(num_seeds, 1, 1)  # [L, 256, d]
    generator = torch.Generator(obs.device).manual_seed(0)
    return torch.stack([act(obs, generator) for _ in range(16)]).std(0).mean().item()


def milliseconds_per_action(act, env, num_seeds: int) -> float:
    """Time in which every learner decides on one observation, the median of 30 calls."""
    obs = torch.zeros(num_seeds * env.num_agents, 1, env.obs_size, device=env.device)
    generator, times = torch.Generator(env.device), []
    for _ in range(30):
        start = time.perf_counter()
        act(obs, generator).cpu()  # waits for the result
        times.append(time.perf_counter() - start)
    return round(1e3 * sorted(times)[15], 3)


def assignments(run, evaluate, shift: str, starts: int = 20, episodes: int = 100) -> dict:
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


def write_gif(run, evaluate, path: Path) -> str:
    """Seed 0's team in the standard environment as an animated GIF: four short episodes, or 300 steps of a long one.

    Returns:
        a line that says where it is, or why there is none
    """
    from PIL import Image

    args = run.args
    episodes, every = (4, 1) if run.make_env(1).episode_steps < 100 else (1, 2)
    env = run.make_env(args.num_seeds * episodes, seed=args.seed, render_mode="rgb_array")
    env.episode_steps, step, taken = min(env.episode_steps, 300), env.step, count()
    frames = [[] for _ in range(episodes)]

    def recorded_step(actions):
        if next(taken) % every == 0:
            for i, episode in enumerate(frames):
                episode.append(Image.fromarray(env.render(i)))
        return step(actions)

    env.step = recorded_step
    try:
        evaluate(run.act, env, args)
    except RuntimeError as error:
        return f"--capture-video: {error}; install EGL or OSMesa and set MUJOCO_GL=egl or osmesa"
    images = [image for episode in frames for image in episode]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)
    return f"wrote {path}"


def closing_table(results: dict) -> str:
    """One line per environment: return, normalised score, the dataset's returns and the paper's result."""
    scenario, dataset, data = results["scenario"], results["dataset"], results["data"]
    seeds, episodes, name = (
        results["num_seeds"],
        results["eval_episodes"],
        NAMES.get(results["algorithm"], results["algorithm"]),
    )
    over_seeds = f"for each of {seeds} seeds, mean ± std over seeds" if seeds > 1 else "of one seed"
    paper_column = f"paper ({name})"
    lines = [
        f"\n{name} on {scenario}/{dataset}, last parameters ({counted(results['updates'], 'update')}),",
        f"mean return of {counted(episodes, 'episode')} {over_seeds}\n",
        f"{'environment':<12}{'return':>17}{'normalised':>12}{'data mean':>11}{'data max':>10}{paper_column:>24}",
    ]
    for shift, returns in results["returns"].items():
        x = torch.tensor(returns)
        spread = f" ± {x.std(correction=0):.1f}" if seeds > 1 else ""
        paper = common.paper_result(scenario, dataset, shift, name)
        normalised = common.normalised_score(scenario, x.mean().item())
        lines.append(
            f"{'standard' if shift == 'none' else shift:<12} {f'{x.mean():.1f}{spread}':>16} "
            f"{'-' if normalised is None else f'{normalised:.1f}':>11} {data['mean']:>10.1f} {data['max']:>9.1f} "
            f"{f'{paper[0]:.1f} ± {paper[1]:.1f}' if paper else '-':>23}"
        )
    lines.append("")
    for shift, found in results.get("assignments", {}).items():
        distinct, entropy = (sum(found[key]) / seeds for key in ("distinct", "entropy"))
        lines.append(f"{shift}: {distinct:.1f} assignments of agents to landmarks from one start, {entropy:.2f} bits")
    return "\n".join(lines)
