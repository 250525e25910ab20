"""experiments/benchmark.py counts what it says it counts, and the captured update is the eager one."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import ROOT
from experiments import benchmark
from utils.accelerate import compiled, cuda_graph


def test_recorded_products_hold_the_arithmetic_of_an_update():
    step = benchmark.make_step(3, 1_000, batch_size=8, widths=(16, 16), critic_widths=(16,), dataset="medium")
    with FlopCounterMode(display=False) as counter, benchmark.RecordProducts() as record:
        step()
    flops = sum(2 * a[0] * a[1] * a[2] * b[2] for a, b, _ in record.products)
    assert flops == counter.get_total_flops() > 0


def test_alternating_functions_take_turns():
    calls = []
    times = benchmark.alternate(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)
    assert calls == ["a", "b"] * 5 and len(times) == 2


def test_command_prints_one_line_per_key_and_refuses_unknown_ones():
    def run(*arguments):
        command = [sys.executable, str(ROOT / "experiments" / "benchmark.py"), "--only", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("help_seconds")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and [line.split(": ")[0] for line in lines] == ["hardware", "help_seconds"]
    wrong = run("speed")
    assert wrong.returncode == 2 and "speed" in wrong.stderr and "--only" in wrong.stderr and not wrong.stdout


def losses_of_ten_updates(device, wrap, **options):
    torch.manual_seed(0)
    step = wrap(benchmark.make_step(3, 1_000, device=device, dataset="medium", batch_size=32, **options))
    for _ in range(10):
        metrics = step()
    return {name: value.clone() for name, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, such as Debian's g++")
def test_compiled_updates_equal_eager_ones():
    small = dict(widths=(8,), critic_widths=(8,), diffusion_steps=2)
    eager, fast = (losses_of_ten_updates("cpu", wrap, **small) for wrap in (lambda step: step, compiled))
    for name, value in eager.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and a CUDA build of torch")
def test_cuda_graph_equals_eager_updates():
    eager, captured = (losses_of_ten_updates("cuda", wrap) for wrap in (lambda step: step, cuda_graph))
    for name, value in eager.items():
        torch.testing.assert_close(captured[name], value, rtol=1e-3, atol=1e-4)
