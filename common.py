"""What every script here needs: clear errors, frozen policies, data sets on disk, the paper's numbers."""

from __future__ import annotations

import csv
import ctypes
import hashlib
import io
import json
import math
import os
import signal
import sys
import threading
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent
DATASETS = ("random", "random-medium", "medium-replay", "medium", "medium-expert", "expert")
# (expert, random) returns of the OMAR data sets: a normalised score is 0 at the random and 100 at the expert return
NORMALISATION = {
    "simple_spread": (516.8, 159.8),
    "simple_tag": (185.6, -4.1),
    "simple_world": (79.5, -6.8),
    "HalfCheetah": (3568.8, -284.0),
    "landmarks6": (90.0, 68.8),  # this repository's own
}
# the paper's names of the algorithms of this repository
PAPER_NAMES = {"ma_cql": "MA-CQL", "omar": "OMAR", "ma_sfbc": "MA-SfBC", "madiff": "MADiff"}


class UserError(Exception):
    """Something the user can mend: one line that names the file or option and says what to do."""


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next update instead of handing it back to the kernel.

    An update frees and asks for the same blocks every time. Without this each of them is mapped and its pages are
    fetched anew: page faults by the thousand in every update, which are slow on virtual machines most of all.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
            mallopt(-3, 2**28) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: 256 MB, or the maximum before glibc 2.35


def has_bf16() -> bool:
    """Whether the hardware has bfloat16 arithmetic; without, bfloat16 is less than half as fast as float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def run(main) -> None:
    """Run `main()`; a UserError ends the program with its one line and exit code 2, Ctrl-C with 130.

    A reader that closes the pipe, such as `head`, ends it without a word, as it does other programs.
    """
    keep_freed_memory()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes to at its end
        sys.exit(141)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse(args_class, description: str | None = None, **options):
    """tyro.cli: options as an `args_class`; its boxes around words that are none become one line.

    Raises:
        UserError: unknown options, or values of another type.
    """
    import tyro  # only programs need it

    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(args_class, description=description, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    message = []
    for line in box.getvalue().splitlines()[1:]:
        line = line.strip("│ ")
        if not line.strip("─"):  # details and a hint at --help follow
            break
        message.append(line)
    raise UserError(f"{' '.join(message)}; --help lists the options")


@contextmanager
def disk_errors(path: str | Path, remedy: str):
    """Within the context an OSError, of a full disk for one, becomes a UserError that names `path` and the remedy.

    Threads (TensorBoard writes in one) keep quiet about theirs: whoever waits for them raises it again.
    """
    hook = threading.excepthook
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else hook(failed)
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {remedy}") from None
    finally:
        threading.excepthook = hook


def write_file(path: Path, contents, previous: Path | None = None) -> None:
    """Write bytes beside `path` and rename: it holds its old contents or the new ones, whenever the program is killed.

    Args:
        previous: where the old contents go; they are deleted without it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(contents)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def hold(run: Path):
    """Within the context no other process can hold the run folder; the lock goes with the process, however it ends.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(run / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: another process is training it; wait until it ends, or stop it") from None
        yield


@contextmanager
def catch_signals():
    """Within the context SIGINT and SIGTERM do not interrupt: their numbers are appended to the list it yields."""
    caught, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_choice(option: str, value: str, choices) -> None:
    """Raise a UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{option} {value}: unknown; choose one of {', '.join(choices)}")


# What an option may be: names, the rule in words, the rule
RULES = (
    (
        ("num_seeds", "updates", "batch_size", "eval_interval", "eval_episodes", "eval_candidates", "diffusion_steps"),
        "at least 1",
        lambda x: x >= 1,
    ),
    (
        ("eta", "zeta", "bc_weight", "max_grad_norm", "beta_min", "beta_max", "reward_scale"),
        "finite and not negative",
        lambda x: 0 <= x < math.inf,
    ),
    (("data_fraction", "rho", "lr", "actor_lr", "critic_lr"), "in (0, 1]", lambda x: 0 < x <= 1),
    (("gamma",), "in [0, 1)", lambda x: 0 <= x < 1),
    (("widths", "critic_widths"), "at least one width, each at least 1", lambda x: x and min(x) >= 1),
    (("quantiles",), "numbers in [0, 1]", lambda x: all(0 <= q <= 1 for q in x)),
    (("thresholds",), "numbers", lambda x: x is None or not any(map(math.isnan, x))),
    (("seed",), "from 0 to 2^31 - 1", lambda x: 0 <= x < 2**31),
)


def check_options(args, rules=RULES) -> None:
    """Raise a UserError at the first option of the dataclass `args` that breaks its rule."""
    for names, words, holds in rules:
        for name in names:
            if hasattr(args, name) and not holds(getattr(args, name)):
                value = getattr(args, name)
                value = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {words}")


def fill(args, names, values):
    """Set those of the options `names` that were left open (None) to `values`; whatever was given stays."""
    defaults = zip(names, values, strict=True)
    return replace(args, **{name: value for name, value in defaults if getattr(args, name) is None})


def finite_state(learners, optimizers: dict, num_learners: int) -> Tensor:
    """Whether all parameters and optimiser moments of each learner are finite, [L].

    Those of an update show in the losses of the next one; this is for what is saved in between.
    """
    moments = (x for optimizer in optimizers.values() for state in optimizer.state.values() for x in state.values())
    tensors = (x.detach() for x in (*learners.parameters(), *moments) if x.dim())
    return torch.stack([x.reshape(num_learners, -1).isfinite().all(1) for x in tensors]).all(0)


def normalised_score(scenario: str, episode_return: float) -> float:
    """100 (return - random) / (expert - random), the field's normalisation (Fu et al. 2020; OMAR's constants)."""
    expert, random = NORMALISATION[scenario]
    return 100 * (episode_return - random) / (expert - random)


def paper_result(scenario: str, dataset: str, shift: str, algorithm: str = "DOM2") -> tuple[float, float] | None:
    """Mean and std of the episode return that the paper's Tables 1-4 report, or None where they have no such cell."""
    cell = {"scenario": scenario, "dataset": dataset, "shift": shift, "algorithm": algorithm}
    with open(ROOT / "results" / "paper.csv", newline="") as f:
        for row in csv.DictReader(f):
            if all(row[k] == v for k, v in cell.items()):
                return float(row["mean_return"]), float(row["std_return"])
    return None


# --------------------------------------------------------------------------------------------------------------------
# Frozen policies: the prey of predator-prey and World, and the behaviour policies that made the data


def save_torch(path: Path, contents, previous: Path | None = None) -> None:
    """torch.save by `write_file`: its own way of writing ends the process where the disk is full."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_file(path, buffer.getbuffer(), previous)


def load_torch(path: Path):
    """torch.load without running code from the file; a UserError if it is missing, damaged or not such a file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):  # torch.load compares no checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        with warnings.catch_warnings(action="ignore"):  # of files that are none of ours: the error says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); restore or delete it") from None


def load_prey(path: str | Path, obs_size: int, device) -> dict[str, Tensor]:
    """The frozen prey of a checkpoint laid out as OMAR's `pretrained_adv_model.pt`: the last of `agent_params`.

    Raises:
        UserError: missing or unreadable, not of that layout, or of another observation size.
    """
    path = Path(path)
    checkpoint = load_torch(path)
    try:
        params = {
            name: value.to(device, torch.float32) for name, value in checkpoint["agent_params"][-1]["policy"].items()
        }
        action = policy_action(params, torch.zeros(1, obs_size, device=device))
        if action.shape != (1, 2) or not action.isfinite().all():
            raise ValueError
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError):
        raise UserError(
            f"{path}: holds no prey policy for observations of size {obs_size} (expected agent_params[-1]['policy'] "
            "with fc1, fc2, fc3); pass the pretrained_adv_model.pt of this scenario as --prey"
        ) from None
    return params


def policy_action(params: dict[str, Tensor], obs: Tensor) -> Tensor:
    """A frozen deterministic policy, the one OMAR's checkpoints hold: obs [..., d] -> action [..., 2] in [-1, 1].

    `params` is a state dict of three linear layers fc1, fc2, fc3 (ReLU, ReLU, tanh) and, optionally, of a BatchNorm1d
    `in_fn` on the input, used in evaluation mode.
    """
    x = obs
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


# --------------------------------------------------------------------------------------------------------------------
# Data sets


@dataclass
class Dataset:
    """A data set in memory. T transitions in whole episodes, one after the other; n agents."""

    rows: Tensor  # [n, T, 2 d + A + 2]: obs, action, reward, next_obs, done of each transition side by side
    lengths: Tensor  # [episodes] number of rows of each
    returns: Tensor  # [episodes] team return: mean over agents of the sum of rewards
    path: Path
    metadata: dict  # of metadata.json, empty where there is none


FILES = ("obs", "acs", "rews", "next_obs", "dones")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def dataset_path(data_dir: str | Path, scenario: str, dataset: str) -> Path:
    """Folder of the arrays, in the layout of the OMAR data sets."""
    return Path(data_dir) / scenario / dataset / "seed_0_data"


def load_dataset(
    data_dir: str | Path,
    scenario: str,
    dataset: str,
    obs_size: int,
    action_size: int,
    num_agents: int,
    episode_steps: int,
) -> Dataset:
    """Load and check `<data_dir>/<scenario>/<dataset>/seed_0_data/{obs,acs,rews,next_obs,dones}_<agent>.npy`.

    Any float type is accepted and becomes float32. Where there is a `metadata.json` its scenario, sizes and checksums
    are compared; data sets from elsewhere come without and get every other check.

    Raises:
        UserError: a file is missing, damaged, of another shape than its neighbours or the scenario, or not finite.
    """
    path = dataset_path(data_dir, scenario, dataset)
    remedy = "the data set is damaged; delete its folder and run collect_datasets.py again, or copy it again"
    metadata = {}
    if (path / "metadata.json").exists():
        try:
            metadata = json.loads((path / "metadata.json").read_text())
            recorded = (metadata["scenario"], metadata["dataset"])
            checksums = dict(metadata["checksums"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path / 'metadata.json'}: not readable; {remedy}") from None
        if recorded != (scenario, dataset):
            raise UserError(f"{path}: metadata.json says {recorded[0]}/{recorded[1]}; {remedy}")
    rows, length, first = None, None, None
    for agent in range(num_agents):
        columns, widths = [], (obs_size, action_size, 1, obs_size, 1)
        for name, width in zip(FILES, widths, strict=True):
            file = path / f"{name}_{agent}.npy"
            if not file.is_file():
                raise UserError(f"{file}: missing; {remedy}")
            if metadata and file_checksum(file) != checksums.get(file.name):
                raise UserError(f"{file}: differs from its checksum in metadata.json; {remedy}")
            try:
                array = np.asarray(np.load(file, allow_pickle=False))
            except Exception:  # numpy's parser of headers raises more than it documents
                raise UserError(f"{file}: truncated or not a plain .npy array; {remedy}") from None
            if array.dtype.kind not in "biuf":
                raise UserError(f"{file}: holds {array.dtype}, not numbers; {remedy}")
            if array.ndim == 1 and width == 1:
                array = array[:, None]
            if array.ndim != 2 or array.shape[1] != width:
                shape = tuple(array.shape)
                raise UserError(f"{file}: has shape {shape}, {scenario} needs [T, {width}]; is it another scenario's?")
            if length is None:
                length, first = len(array), file.name
            if len(array) != length:
                raise UserError(f"{path}: {file.name} has {len(array)} rows, {first} {length}; {remedy}")
            columns.append(array)
        if length == 0:
            raise UserError(f"{path}: {length} rows are no whole number of {episode_steps}-step episodes; {remedy}")
        if rows is None:
            rows = torch.empty(num_agents, length, 2 * obs_size + action_size + 2)
        start = 0
        for name, array in zip(FILES, columns, strict=True):
            block = rows[agent, :, start : start + array.shape[1]]
            with np.errstate(over="ignore"):  # an infinity is noticed below
                block.copy_(torch.from_numpy(array.astype(np.float32, copy=False)))
            start += array.shape[1]
            if not torch.isfinite(block).all():
                raise UserError(f"{path / f'{name}_{agent}.npy'}: holds NaN or infinity; {remedy}")
    lengths = episode_lengths(rows[:, :, -1].amax(0) > 0, episode_steps)
    ends = lengths.cumsum(0)
    if lengths[-1] != episode_steps and not rows[0, -1, -1]:
        raise UserError(f"{path}: {length} rows are no whole number of {episode_steps}-step episodes; {remedy}")
    rows[:, ends[lengths == episode_steps] - 1, -1] = 0  # some data sets mark the time limit, no terminal state
    rewards = rows[:, :, obs_size + action_size].double().mean(0)  # [T]
    returns = torch.zeros(len(lengths), dtype=torch.float64)
    returns.index_add_(0, torch.arange(len(lengths)).repeat_interleave(lengths), rewards)
    return Dataset(rows, lengths, returns.float(), path, metadata)


def episode_lengths(done: Tensor, episode_steps: int) -> Tensor:
    """Lengths of the episodes of a data set, [episodes]: each ends with a terminal state or after `episode_steps` rows.

    Args:
        done: [T] bool, true in the rows after which the state is terminal.
    """
    ends = (done.nonzero()[:, 0] + 1).tolist()
    if not ends or ends[-1] < len(done):
        ends.append(len(done))
    lengths = []
    for start, end in pairwise([0, *ends]):
        whole, rest = divmod(end - start, episode_steps)
        lengths += [episode_steps] * whole + [rest] * (rest > 0)
    return torch.tensor(lengths)
