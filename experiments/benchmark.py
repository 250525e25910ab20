"""Speed and memory, one line `key: value` each, in under three minutes on a CPU.

    python experiments/benchmark.py                # everything that this machine can measure
    python experiments/benchmark.py --only gemm_fraction_cpu help_seconds

Machines are noisy, so a ratio is measured inside one run: its two sides alternate, and the medians are compared. What
needs a GPU is printed as "not measured" without one. docs/development.md shows the figures and the
hardware they came from.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a script in a folder of its own

import dom2_mpe
from common import ROOT, Dataset, make_env
from dom2_mpe import DOM2
from particle_env import EPISODE_STEPS, ParticleEnv
from run import scenario_prey
from utils.accelerate import cuda_graph
from utils.frozen import policy_action
from utils.options import lines
from utils.program import program
from utils.provenance import hardware

OBS_SIZE, ACTION_SIZE, NUM_AGENTS = 16, 2, 3  # of simple_tag


def alternate(*functions, repeats: int = 15) -> list[float]:
    """Median seconds of each function; they take turns, after two rounds that do not count."""
    times = [[] for _ in functions]
    for i in range(repeats + 2):
        for function, record in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def make_step(num_learners: int, num_transitions: int = 100_000, device="cpu", dataset="random", **options):
    """One update of `num_learners` learners with the settings of simple_tag, as a function without arguments."""
    seeds, agents = max(1, num_learners // NUM_AGENTS), min(num_learners, NUM_AGENTS)
    args = DOM2.args("simple_tag", dataset, num_seeds=seeds, **options)
    columns = [torch.randn(agents, num_transitions, size, device=device) for size in (OBS_SIZE, ACTION_SIZE, OBS_SIZE)]
    reward, done = (torch.zeros(agents, num_transitions, device=device) for _ in range(2))
    obs, action, next_obs = columns
    index = torch.arange(num_transitions, device=device)
    data = Dataset(obs, action, reward, next_obs, done, None, None, None, {}, {}, (), (index,))
    sizes = dict(num_agents=agents, obs_size=OBS_SIZE, action_size=ACTION_SIZE, device=device)
    learners = dom2_mpe.make_learners(args, SimpleNamespace(**sizes))
    optimizers = dom2_mpe.make_optimizers(args, learners)

    def step():
        return dom2_mpe.update(learners, optimizers, dom2_mpe.sample_batch(data, args), args)

    return step


def stacked_speedup_cpu() -> str:
    """Three learners in one stack against the same three one after the other."""
    stacked, single = make_step(3), [make_step(1) for _ in range(3)]
    a, b = alternate(stacked, lambda: [step() for step in single])
    return f"{b / a:.2f}"


class RecordProducts(TorchDispatchMode):
    """Collects the operands' shapes and type of every matrix product."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            a, b = args[-2:]
            self.products.append((a.shape, b.shape, a.dtype))
        return func(*args, **(kwargs or {}))


def gemm_fraction_cpu() -> str:
    """Arithmetic rate of one update with widths 256 and batch 1,024 over that of its matrix products alone."""
    step = make_step(3, batch_size=1024, widths=(256, 256, 256), critic_widths=(256, 256), dataset="medium")
    with FlopCounterMode(display=False) as counter, RecordProducts() as record:
        step()
    operands = {}  # one pair per distinct product
    for a, b, dtype in record.products:
        if (a, b, dtype) not in operands:
            operands[a, b, dtype] = torch.randn(a, dtype=dtype), torch.randn(b, dtype=dtype)

    def products():
        for product in record.products:
            torch.bmm(*operands[product])

    update, plain = alternate(step, products, repeats=9)
    flops = counter.get_total_flops()
    return f"{plain / update:.2f} ({flops / update / 1e9:.0f} of {flops / plain / 1e9:.0f} GFLOP/s)"


def bf16_speedup_cpu() -> str:
    """The update in bfloat16 (--bf16) against float32, widths 256 and batch 1,024."""
    sizes = dict(batch_size=1024, widths=(256, 256, 256), critic_widths=(256, 256), dataset="medium")
    bf16 = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)(make_step(3, **sizes))
    half, full = alternate(bf16, make_step(3, **sizes), repeats=9)
    return f"{full / half:.2f}"


def conservative_cost_cpu() -> str:
    """The update with the conservative term against the one without, widths 256 and batch 256."""
    sizes = dict(batch_size=256, widths=(256, 256, 256), critic_widths=(256, 256), dataset="medium")
    conservative, plain = alternate(make_step(3, zeta=0.1, **sizes), make_step(3, zeta=0.0, **sizes), repeats=50)
    return f"{conservative / plain:.2f}"


def updates_per_second_cpu() -> str:
    """The default run's update, all cores."""
    return f"{1 / alternate(make_step(3), repeats=200)[0]:.1f}"


def data_size_slowdown() -> str:
    """Update time with 10^6 against 10^4 transitions."""
    large, small = alternate(make_step(3, 1_000_000), make_step(3, 10_000), repeats=30)
    return f"{large / small:.3f}"


def run_script(folder: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident GB (NaN on Windows) of a script run in `folder`."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script, *rest = arguments
    command = [sys.executable, str(ROOT / script), *rest]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = math.nan
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    if process.wait():
        raise SystemExit(f"benchmark.py: `{' '.join(arguments)}` failed with exit code {process.returncode}")
    return time.perf_counter() - start, peak


def peak_memory_gb() -> str:
    """A default run on a data set of 10^6 transitions of simple_world, made beforehand."""
    data = ("--scenario", "simple_world", "--dataset", "random")
    with tempfile.TemporaryDirectory() as folder:
        run_script(folder, "collect_datasets.py", *data)
        _, peak = run_script(folder, "dom2_mpe.py", *data, "--updates", "50", "--eval-interval", "50", "--no-cuda")
    return "not measured (needs os.wait4)" if math.isnan(peak) else f"{peak:.2f}"


def evaluation_seconds_cpu() -> str:
    """1,000 episodes of simple_tag."""
    args = DOM2.args("simple_tag", "random")
    env = make_env("simple_tag", 1_000, prey=partial(policy_action, scenario_prey(args)))
    learners = dom2_mpe.make_learners(args, env)

    def act(obs, generator):
        return dom2_mpe.act(learners, obs, args, generator)

    seconds = alternate(lambda: dom2_mpe.evaluate(act, env, args), repeats=3)[0]
    return f"{seconds:.2f}"


def env_steps_per_second_cpu() -> str:
    """simple_tag, 1,024 worlds, one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    env = ParticleEnv("simple_tag", 1024)
    env.reset()
    actions = torch.rand(1024, env.num_agents, 2) * 2 - 1

    def episode():
        for _ in range(EPISODE_STEPS):
            env.step(actions)

    seconds = alternate(episode)[0]
    torch.set_num_threads(threads)
    return f"{1024 * EPISODE_STEPS / seconds:,.0f}"


def robot_steps_per_second_cpu() -> str:
    """HalfCheetah, 32 robots, one core."""
    from mamujoco_env import MujocoEnv  # for those who have MuJoCo

    env = MujocoEnv("HalfCheetah", 32)
    env.reset()
    actions = torch.rand(32, env.num_agents, env.action_size) * 2 - 1

    def steps():
        for _ in range(100):
            env.step(actions)

    return f"{32 * 100 / alternate(steps)[0]:,.0f}"


def help_seconds() -> str:
    """Start-up: `python dom2_mpe.py --help`."""
    return f"{statistics.median(run_script('.', 'dom2_mpe.py', '--help')[0] for _ in range(3)):.2f}"


def graph_speedup_gpu() -> str:
    """CUDA-graph captured against eager update."""
    graph, eager = alternate(cuda_graph(make_step(3, device="cuda")), make_step(3, device="cuda"), repeats=100)
    return f"{eager / graph:.2f}"


def five_seeds_cost_gpu() -> str:
    """Five seeds' update against one seed's, both as CUDA graphs."""
    steps = [cuda_graph(make_step(n * NUM_AGENTS, device="cuda")) for n in (5, 1)]
    five, one = alternate(*steps, repeats=100)
    return f"{five / one:.2f}"


def default_run_seconds_gpu() -> str:
    """The default simple_tag run with five seeds, data collection and evaluation included."""
    with tempfile.TemporaryDirectory() as folder:
        return f"{run_script(folder, 'dom2_mpe.py', '--num-seeds', '5', '--compile')[0]:.0f}"


MEASURES = [
    stacked_speedup_cpu,
    gemm_fraction_cpu,
    bf16_speedup_cpu,
    conservative_cost_cpu,
    updates_per_second_cpu,
    data_size_slowdown,
    peak_memory_gb,
    evaluation_seconds_cpu,
    env_steps_per_second_cpu,
    robot_steps_per_second_cpu,
    help_seconds,
    graph_speedup_gpu,
    five_seeds_cost_gpu,
    default_run_seconds_gpu,
]


@dataclass
class Args:
    only: tuple[Literal[tuple(measure.__name__ for measure in MEASURES)], ...] = ()
    """keys to measure; default: all"""


def main() -> None:
    args = tyro.cli(Args, description=lines(__doc__))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"hardware: {hardware(device)}")
    for measure in MEASURES:
        if args.only and measure.__name__ not in args.only:
            continue
        if measure.__name__.endswith("_gpu") and device.type == "cpu":
            print(f"{measure.__name__}: not measured (needs a CUDA GPU)", flush=True)
        else:
            print(f"{measure.__name__}: {measure()}", flush=True)


if __name__ == "__main__":
    program(main)
