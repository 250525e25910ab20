"""How a script starts and ends, and how it reads and writes files: clear errors, whole files, no code from files."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch


class UserError(ValueError):
    """Something the user can mend: one line that names the file or option and says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))  # spaces have several lines


@cache
def warn(text: str) -> None:
    """Print a warning once."""
    print(f"warning: {text}", file=sys.stderr)


def program(main) -> None:
    """Run `main()`. A UserError ends the program with its one line and exit code 2, Ctrl-C with exit code 130.

    A reader that closes the pipe, such as `head`, ends the program silently.
    """
    keep_freed_memory()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell's >&- has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        with suppress(AttributeError, OSError):  # of streams of another kind
            getattr(sys, name).reconfigure(errors="replace")  # an ASCII terminal shows "?" for "±"
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes there at its end
        sys.exit(141)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        known = "can't allocate memory" in str(error) or "size calculation overflowed" in str(error)
        if not known and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        remedy = "lower --num-seeds, --batch-size, --eval-episodes or --num-transitions"
        print(f"error: not enough memory; {remedy} ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next update instead of returning it to the kernel.

    Every update frees and requests the same blocks. Returned blocks cost thousands of page faults per update.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
            mallopt(-3, 2**28) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: 256 MB, or the maximum before glibc 2.35


def counted(number: int, noun: str) -> str:
    """A number with its noun, as in "1 seed" and "2 seeds"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def catch_signals():
    """Within the context SIGINT and SIGTERM do not interrupt: their numbers are appended to the list it yields."""
    caught, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as of SIGINT in a shell's background jobs
                handlers[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def disk_errors(path: str | Path, remedy: str):
    """Within the context an OSError becomes a UserError that names `path`; `remedy` is for a full disk.

    Threads, in one of which TensorBoard writes, keep quiet about theirs: whoever waits for them raises it again.
    """
    hook = threading.excepthook
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else hook(failed)
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        said = [f"{path}: {error.strerror or error}"]
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None):  # NumPy's short writes have no number
            said.append(remedy)
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            said.append("make it writable, or use a copy of it")
        raise UserError("; ".join(said)) from None
    finally:
        threading.excepthook = hook


def write_file(path: Path, contents, previous: Path | None = None) -> None:
    """Write bytes beside `path`, then rename: the file is old or new, never half-written, whenever the process dies.

    Args:
        previous: where the old contents go; without it they are deleted. A process that dies between the two renames
            leaves them there and no file at `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(contents)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_torch(path: Path, contents, previous: Path | None = None) -> None:
    """torch.save by `write_file`: torch's own writer aborts the process where the disk is full."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_file(path, buffer.getbuffer(), previous)


def load_torch(path: Path):
    """torch.load that runs no code from the file.

    Raises:
        UserError: the file is missing, damaged or not such a file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):  # torch.load compares no checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        with warnings.catch_warnings(action="ignore"):  # foreign files trigger torch warnings; our error is enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); restore or delete it") from None


@contextmanager
def replaced_folder(target: Path, overwrite: bool, alike: bool = True):
    """A temporary folder that takes the place of `target`, a version of a dataset, when the context ends well, or not
    at all.

    Args:
        alike: whether another process that makes `target` at the same time makes the same; then its folder is kept.

    Raises:
        UserError: the disk refuses, or another process has made `target` and its contents may differ.
    """
    elsewhere = target.parent.is_symlink() or target.parent.is_mount()  # perhaps on another disk
    home = target.parent if elsewhere else target.parents[1]
    missing = [folder for folder in target.parents if not folder.exists()]
    temporary = home / f".{target.parent.name}-{os.getpid()}-{time.time_ns()}.tmp"
    replaced = temporary.with_suffix(".old")
    for left in (*home.glob(".*.tmp"), *home.glob(".*.old")):
        with suppress(FileNotFoundError):  # of a process that has just ended
            if time.time() - left.stat().st_mtime > 86_400:  # no dataset takes a day: a killed process left it
                shutil.rmtree(left, ignore_errors=True)
    try:
        with disk_errors(target, "free some space or choose another --data-dir"):
            temporary.mkdir(parents=True)
            yield temporary
            target.parent.mkdir(exist_ok=True)
            if overwrite and target.exists():
                os.rename(target, replaced)
            try:
                os.rename(temporary, target)
            except OSError:
                if not target.exists():
                    raise
                if not alike:
                    beside = target.with_name(f"{target.name}-{os.getpid()}-{time.time_ns()}")
                    os.rename(temporary, beside)
                    raise UserError(f"{target}: another process has made it meanwhile; this one is {beside}") from None
                print(f"{target}: another process has just made it; keeping that one")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        shutil.rmtree(replaced, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # it holds something now
                folder.rmdir()
