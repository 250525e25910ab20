"""What a result was made with: hardware, commit and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def git_commit() -> str:
    """The commit of this checkout, "unknown" outside one."""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 10, "check": True}
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def script_command(script: Path | None = None) -> str:
    """The start of a command line that runs a script from the current folder; None: this one, again."""
    script = script or Path(sys.argv[0])
    with suppress(ValueError):  # another drive on Windows
        script = Path(os.path.relpath(script))
    return f"python {shlex.quote(script.as_posix())}"
