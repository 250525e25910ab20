"""Other machines: without what only Linux has, with few cores, with or without a GPU."""

import ast
import io
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from test_robustness import SCRIPTS, SMALL
from test_scripts import assert_same_checkpoint, flags, resumed, stored, the_run

import collect_datasets
import common
import dom2_mpe
from dom2_mpe import DOM2, train
from particle_env import parallel_env
from utils.program import program, usable_cores

ROOT = Path(common.__file__).parent
FOLDERS = (ROOT, *(ROOT / name for name in ("utils", "baselines", "experiments")))
SOURCES = [file for folder in FOLDERS for file in folder.glob("*.py")]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")

# Modules that Windows does not have, and functions that are missing from others there or on macOS.
ONLY_UNIX = {
    **dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios"), ()),
    "os": ("sched_getaffinity", "process_cpu_count", "killpg", "setsid", "getuid", "fork", "wait4"),
    "signal": ("SIGKILL", "SIGHUP", "SIGALRM"),
}
# Runs scripts one after the other in a process that has nothing of what only Linux or Unix has.
ELSEWHERE = """if True:
    import json, os, runpy, signal, sys

    root, commands, names = sys.argv[1:]
    for module, missing in json.loads(names).items():
        if missing:
            for name in missing:
                vars(globals()[module]).pop(name, None)
        else:
            sys.modules[module] = None  # importing it raises ImportError
    sys.path.insert(0, root)
    for script, *words in json.loads(commands):
        sys.argv = [script, *words]
        try:
            runpy.run_path(os.path.join(root, script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, (script, stop.code)
"""


@pytest.mark.slow
def test_programs_run_without_what_only_linux_has(tmp_path, pretrained):
    script, small = "dom2_mpe.py", SCRIPTS["dom2_mpe"][1] | SMALL
    made = dict(scenario="simple_spread", dataset="random", num_transitions=500, pretrained_dir=str(pretrained))
    commands = [
        ["collect_datasets.py", *flags(**made)],
        [script, *flags(**small | dict(updates=2), capture_video=True)],
        ["experiments/reproduce.py", "table1", "--dry-run"],
    ]
    command = [sys.executable, "-c", ELSEWHERE, str(ROOT), json.dumps(commands), json.dumps(ONLY_UNIX)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = the_run(tmp_path / "runs")
    assert json.loads((run / "results.json").read_text())["updates"] == 2 and (run / "policy.gif").exists()
    assert " of 162 cells to run" in done.stdout


def test_nothing_that_only_linux_has_is_used_unasked():
    """What is asked for with hasattr first is allowed."""
    for file in SOURCES:
        text = file.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {name.name for name in node.names} | {getattr(node, "module", None)}
                assert not names & {module for module, missing in ONLY_UNIX.items() if not missing}, file
            if isinstance(node, ast.Attribute) and node.attr in ONLY_UNIX.get(ast.unparse(node.value), ()):
                assert f'hasattr({ast.unparse(node.value)}, "{node.attr}")' in text, f"{file}:{node.lineno}"


OTHER_OPEN = ("os.open", "Image.open", "ts.open", "ts.KvStore.open")  # no text files


def test_text_files_have_one_encoding_on_every_system():
    """Python's default is the system's, which on Windows is not UTF-8."""
    found = 0
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in ("open", "read_text", "write_text") or ast.unparse(node.func) in OTHER_OPEN:
                continue
            mode = ast.unparse(node.args[1]) if name == "open" and len(node.args) > 1 else ""
            given = "encoding" in {keyword.arg for keyword in node.keywords} or (name == "read_text" and node.args)
            assert "b" in mode or given, f"{file}:{node.lineno}"
            found += 1
    assert found > 5


def test_folders_have_no_names_that_windows_refuses(tmp_path):
    from utils.checkpoints import new_run_dir

    for script in SCRIPTS:
        algorithm, small = SCRIPTS[script]
        name = new_run_dir(algorithm.args(**small | dict(run_dir=str(tmp_path))), algorithm.name).name
        assert not set(name) & set('<>:"/\\|?*') and not name.endswith((" ", "."))


def test_an_ascii_terminal_is_no_reason_to_fail(monkeypatch):
    """The closing table has a plus-minus sign."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    program(lambda: print("1.0 ± 0.1"))
    assert terminal.buffer.getvalue() == b"1.0 ? 0.1" + os.linesep.encode()


def test_the_docker_image_has_what_it_needs():
    """And nothing that git ignores either: datasets and runs may be large."""
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert [what for word, what in steps if word == "COPY"] == ["requirements.txt .", ". ."]
    assert ["USER", "user"] in steps and (ROOT / json.loads(steps[-1][1])[0]).exists()
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text("utf-8").splitlines()]
    patterns = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for name in (*ignored, ".git"):
        assert any(fnmatch(name, pattern.removeprefix("**/")) for pattern in patterns), name
    for name in ("requirements.txt", *(file.name for file in SOURCES), "pretrained", "results", "docs"):
        assert not any(fnmatch(name, pattern.removeprefix("**/")) for pattern in patterns), name


def test_cores_of_python_3_13(monkeypatch):
    """It counts those of the process itself, and lets the user set the number."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert usable_cores() == 3
    monkeypatch.setattr(os, "process_cpu_count", lambda: None, raising=False)  # unknown
    assert usable_cores() == 1


# ---- another device ----

FEW = dict(scenario="simple_spread", dataset="random", updates=4, batch_size=8, eval_interval=2, eval_episodes=2)
FEW |= dict(widths=(8, 8), critic_widths=(8,), shift=())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """An undisturbed run on the CPU, to read only: run folder, results."""
    folder = tmp_path_factory.mktemp("whole")
    results = train(DOM2.args(**FEW, data_dir=data_dir, run_dir=folder, cuda=False))
    return the_run(folder), results


def begun(folder, data_dir, cuda):
    """Folder of a run that has made two of four updates."""
    train(DOM2.args(**FEW | dict(updates=2), data_dir=data_dir, run_dir=folder, cuda=cuda))
    return the_run(folder)


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(whole, tmp_path, data_dir):
    """The state of the GPU's generator and capturable optimisers, which one of a CPU lacks, change nothing."""
    run = begun(tmp_path / "runs", data_dir, cuda=False)
    checkpoint = stored(run)
    checkpoint["args"]["cuda"] = True
    checkpoint["cuda_rng"] = torch.zeros(16, dtype=torch.uint8)
    for optimizer in checkpoint["optimizers"].values():
        optimizer["param_groups"][0]["capturable"] = True
    torch.save(checkpoint, run / "checkpoint.pt")
    results = train(resumed(run, updates=4, cuda=False))
    assert results["returns"] == whole[1]["returns"]
    assert_same_checkpoint(run, whole[0])
    made = stored(run)
    assert made["cuda_rng"] is None
    assert not any(optimizer["param_groups"][0]["capturable"] for optimizer in made["optimizers"].values())


def test_without_cuda_the_gpu_is_left_alone(whole, tmp_path, data_dir, monkeypatch, collect):
    """It may be in use, or its driver broken; and nothing depends on whether there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("get_rng_state", "set_rng_state", "current_device", "get_device_name", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: pytest.fail(f"torch.cuda.{name} was called"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect_datasets, "collect", collect)  # the data are made first
    results = train(DOM2.args(**FEW, cuda=False))
    assert results["returns"] == whole[1]["returns"]
    assert train(resumed(the_run("runs"), "eval_only"))["returns"] == whole[1]["returns"]


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("first, then", [(True, False), (False, True), (True, True)])
def test_a_run_goes_on_on_another_device(first, then, compiled, tmp_path, data_dir):
    run = begun(tmp_path, data_dir, cuda=first)
    before = stored(run)["learners"]
    results = train(resumed(run, updates=12, cuda=then, compile=compiled and then))
    checkpoint = stored(run)
    assert results["updates"] == 12 and all(torch.isfinite(torch.tensor(x)).all() for x in results["returns"].values())
    assert (checkpoint["cuda_rng"] is not None) == then
    for optimizer in checkpoint["optimizers"].values():
        assert optimizer["param_groups"][0]["capturable"] == then
        assert {int(state["step"]) for state in optimizer["state"].values()} == {12}
    moved = [(checkpoint["learners"][k].cpu() - v.cpu()).abs().max().item() for k, v in before.items()]
    assert 0 < max(moved) < 1  # it went on from the parameters of the other device
    obs, _ = parallel_env("simple_spread").reset(seed=0)
    assert dom2_mpe.load_policy(run)(obs).keys() == obs.keys()
