"""One training run, whatever the algorithm: its options, folder, progress, log, checkpoints and results.

Nothing here is needed to understand an algorithm. `train` in dom2_mpe.py shows how it is used.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import common
from collect_datasets import prey_obs_size
from own_env import OWN, check_agents, is_own
from utils import evaluation
from utils.accelerate import compiled, cuda_graph
from utils.checkpoints import drop_damaged, finite_state, load_checkpoint, locked, new_run_dir, restore
from utils.data import alike, statistics
from utils.frozen import load_prey, policy_action
from utils.options import parse_groups
from utils.program import UserError, catch_signals, counted, disk_errors, save_torch, write_file
from utils.provenance import git_commit, hardware, script_command

# Options that may change when a run is continued or evaluated again; with a policy file also --run-dir.
ALWAYS = {"data_dir", "cuda", "compile", "resume", "eval_only", "capture_video"}
WITH_RESUME = ALWAYS | {"track", "updates", "lr", "actor_lr", "critic_lr", "eval_interval", "eval_episodes", "shift"}
ACTING = {"temperature", "eval_candidates", "eval_alpha", "eval_average", "target_return", "guidance"}
WITH_EVAL_ONLY = ALWAYS | ACTING | {"eval_episodes", "shift"}


class Algorithm(NamedTuple):
    """An algorithm as `train` needs it. L learners: the n agents of each of S seeds, seed-major."""

    name: str  # of its run folders and results
    Args: type  # its options
    settings: dict  # {(scenario, dataset): {option: value}} where a dataset needs other values than the defaults
    make_learners: Callable  # (args, env) -> nn.ModuleDict of networks with a leading learner axis
    make_optimizers: Callable  # (args, learners) -> dict of optimisers
    sample_batch: Callable  # (data, args) -> what `update` learns from, random numbers included
    update: Callable  # (learners, optimizers, batch, args) -> dict of metrics, each [L]
    act: Callable  # (learners, obs [L, E, d], args, generator) -> actions [L, E, A]

    def args(self, scenario: str | None = None, dataset: str | None = None, **options):
        """The options of a run: the defaults, the dataset's settings, and what is given here."""
        scenario, dataset = scenario or self.Args.scenario, dataset or self.Args.dataset
        own = is_own(scenario)
        values = dict(shift=("none",), eval_episodes=100) if own else {}
        values |= self.settings.get((OWN if own else scenario, dataset), {}) | options
        return self.Args(scenario=scenario, dataset=dataset, **values)


def parse(algorithm: Algorithm, description: str, words: list[str] | None = None):
    """Options from the command line, which overrides the dataset's settings or the continued run's options."""
    import tyro  # only programs need it

    @dataclass
    class Source:
        scenario: str | None = None
        dataset: str | None = None
        resume: str | None = None
        eval_only: str | None = None

    words = sys.argv[1:] if words is None else words
    known = [word for word in words if word not in ("-h", "--help")]
    source, _ = tyro.cli(Source, args=known, return_unknown_args=True)
    if source.resume or source.eval_only:
        stored, _ = load_checkpoint(source.resume or source.eval_only, algorithm)
        default = replace(stored, resume=source.resume, eval_only=source.eval_only, capture_video=False)
    else:
        default = algorithm.args(source.scenario, source.dataset)
    return parse_groups(default, description, words)


def scenario_prey(args) -> dict | None:
    """Parameters of the frozen prey of `args.scenario`, from --prey or pretrained/; None where there is no prey."""
    size = prey_obs_size(args.scenario)
    if size is None:
        if getattr(args, "prey", None):
            raise UserError(f"--prey {args.prey}: {args.scenario} has no prey; leave the option out")
        return None
    path = args.prey or common.ROOT / "pretrained" / f"{args.scenario}.pt"
    return load_prey(path, size)


class Run:
    """A run and its folder: a new one, or the one that --resume or --eval-only names. A policy file gets a new one.

    Attributes:
        args: the options; device: where to compute; prey: the frozen prey's parameters, or None; path: the folder.
        returns: {shift: [S]}, mean return of each seed's team, the latest.
        evaluates: whether this update is followed by an evaluation.

    Raises:
        UserError: an option, the folder or its checkpoint does not fit.
    """

    def __init__(self, args, algorithm: Algorithm):
        self.started, self.algorithm, self.args, self.checkpoint = time.time(), algorithm, args, None
        self.task = common.task_name(args)
        if args.resume and args.eval_only:
            raise UserError(f"--eval-only {args.eval_only}: cannot be combined with --resume; give one of them")
        if args.track and not args.eval_only and importlib.util.find_spec("wandb") is None:
            raise UserError("--track: wandb is not installed; run `pip install wandb`")
        if args.resume or args.eval_only:
            self.path = Path(args.resume or args.eval_only)  # a policy file gets a run folder in `training`
            stored, self.checkpoint = load_checkpoint(self.path, algorithm)
            self._compare(stored)
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.first_update = self.update = self.checkpoint["updates"] if self.checkpoint else 0
        self.returns, self.stats = {}, self.checkpoint["data"] if self.checkpoint else None
        self.prey = self.checkpoint["prey"] if self.checkpoint else scenario_prey(args)
        self.evaluates, self.stopped = False, []
        # An unknown shift is noticed here, not after the training. Two: do copies of an own environment agree?
        self.env, *_ = [self.make_env(2, shift) for shift in ("none", *args.shift)]
        if self.checkpoint:
            check_agents(self.checkpoint.get("agents"), self.env.agents, self.path)  # older checkpoints have none

    def _compare(self, stored) -> None:
        """Raise a UserError if an option differs from the run's own and can no longer be changed."""
        args, done, policy_only = self.args, self.checkpoint["updates"], self.checkpoint["optimizers"] is None
        if args.resume and policy_only:
            raise UserError(f"--resume {self.path}: a policy file has no critics to train on with; give a run folder")
        option, may = ("--resume", WITH_RESUME) if args.resume else ("--eval-only", WITH_EVAL_ONLY)
        may = may | {"run_dir"} if policy_only else may
        for field in fields(args):
            value, own = getattr(args, field.name), getattr(stored, field.name)
            if value != own and field.name not in may:
                name = f"--{field.name.replace('_', '-')}"
                raise UserError(f"{name} {value}: {self.path} was trained with {own}, which {option} cannot change")
        if args.eval_only and not done:
            raise UserError(f"{self.path}: has made no update yet; train it with --resume {self.path}")
        if args.resume and args.updates < done:
            raise UserError(f"--updates {args.updates}: {self.path} has made {done} already")
        if args.resume and args.updates == done:
            finished = None  # missing or damaged: the last evaluation is made again
            with suppress(OSError, ValueError, KeyError, TypeError):
                finished = json.loads((self.path / "results.json").read_text("utf-8"))["updates"]
            if finished == done:
                raise UserError(f"{self.path} is finished; a larger --updates goes on, --eval-only evaluates it again")
        if args.eval_only:
            self.args = replace(args, updates=done)

    def make_env(self, num_envs: int, shift: str = "none", seed: int = 0, render_mode: str | None = None):
        """Environments of this run's scenario, with its prey."""
        prey = self.prey and partial(policy_action, {k: v.to(self.device) for k, v in self.prey.items()})
        return common.make_env(self.task, num_envs, shift, self.device, seed, prey, render_mode)

    def evaluation_env(self, shift: str):
        """--eval-episodes worlds for each seed's team. Their first states depend on --seed, --num-seeds,
        --eval-episodes and the shift alone, so every algorithm meets the same ones."""
        return self.make_env(self.args.num_seeds * self.args.eval_episodes, shift, self.args.seed + 10_000)

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """The learners' actions, obs [L, E, d] -> [L, E, A]."""
        return self.algorithm.act(self.learners, obs, self.args, generator)

    @contextmanager
    def training(self, learners, optimizers: dict, data):
        """Within the context the learners are trained: continued from the checkpoint or begun, locked, logged, saved.

        Iterating over the run yields the numbers of the updates to make; with --eval-only there are none.
        """
        self.learners, self.optimizers, self.data = learners, optimizers, data
        if self.checkpoint is not None:
            restore(learners, optimizers, self.checkpoint, self.path)
            if self.checkpoint["optimizers"] is None:  # a policy file
                self.path = new_run_dir(self.args, self.algorithm.name)
            else:
                torch.set_rng_state(self.checkpoint["rng"])
            if self.device.type == "cuda" and self.checkpoint["cuda_rng"] is not None:
                torch.cuda.set_rng_state(self.checkpoint["cuda_rng"])
            if data is not None and not alike(statistics(data), self.stats):
                raise UserError(f"--data-dir {self.args.data_dir}: not the data that {self.path} was trained on")
        if self.args.eval_only:
            self.updates = range(0)
            yield self
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and --help needs none of it

        if self.checkpoint is None:
            self.path, self.stats = new_run_dir(self.args, self.algorithm.name), statistics(data)
        args = self.args
        of = f"{counted(args.num_seeds, 'seed')} x {counted(len(data.obs), 'agent')}"
        team = counted(args.num_seeds * len(data.obs), "learner")
        print(f"{args.scenario}/{args.dataset}: {team} ({of}), {self.path}")
        if args.track:
            import wandb

            wandb.init(project="dom2", name=self.path.name, config=asdict(args), sync_tensorboard=True)
        self.updates = range(self.first_update + 1, args.updates + 1)
        with disk_errors(self.path, f"free some space; {self.continuation()} goes on"), locked(self.path):
            if self.checkpoint is None:  # a run that is killed before its first evaluation can be continued as well
                self.save()
            else:
                drop_damaged(self.path)
            self.writer = SummaryWriter(self.path, purge_step=self.first_update + 1)
            every = 0.1 if sys.stderr.isatty() else 10  # seconds between lines in a log file
            options = dict(unit="update", dynamic_ncols=True, mininterval=every, maxinterval=every)
            self.bar = tqdm(total=args.updates, initial=self.first_update, **options)
            with self.writer, self.bar, catch_signals() as self.stopped:
                yield self

    def __iter__(self):
        for number in self.updates:
            self.update = number
            self.evaluates = self.update % self.args.eval_interval == 0 or self.update == self.args.updates
            yield self.update
            self.bar.update()
            if self.evaluates or self.stopped:
                self.writer.flush()  # what is logged up to a checkpoint is not lost with the process
                self.save()
            if self.stopped:
                self.bar.close()
                print(f"stopped after update {self.update}; go on with: {self.continuation()}")
                raise SystemExit(128 + self.stopped[0])

    def continuation(self) -> str:
        return f"{script_command()} --resume {shlex.quote(self.path.as_posix())}"

    def accelerate(self, step):
        """`step()` as --bf16 and --compile want it."""
        if self.args.bf16:
            step = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)(step)
        if self.args.compile:
            step = cuda_graph(step) if self.device.type == "cuda" else compiled(step)
        return step

    def log(self, metrics: dict[str, Tensor]) -> None:
        """Every 100 updates and before evaluations: check the metrics (each [L]) and write their means.

        Raises:
            UserError: one of them is not finite.
        """
        if self.update % 100 == 0 or self.evaluates:
            for tag, value in metrics.items():
                self.check_finite(value.isfinite(), tag)
                self.writer.add_scalar(tag, value.mean().item(), self.update)

    def check_finite(self, finite: Tensor, what: str) -> None:
        """Raise a UserError that names the first learner where `finite` [L] is False."""
        if not finite.all():
            seed, agent = divmod(int(finite.int().argmin()), len(self.data.obs))
            raise UserError(
                f"update {self.update}: {what} of seed {self.args.seed + seed}, agent {agent} is not finite; lower the "
                f"learning rates (the checkpoint in {self.path} is from before)"
            )

    def record(self, shift: str, returns: Tensor) -> None:
        """Store the returns [S, episodes] of an evaluation; log those of the standard environment during training."""
        self.returns[shift] = returns = returns.mean(1).cpu()
        if shift != "none" or not self.evaluates:
            return
        score, S = returns.mean().item(), self.args.num_seeds
        spread = evaluation.action_std(self.act, self.data, S, self.env.action_mask)
        normalised = common.normalised_score(self.task, score)
        self.writer.add_scalar("charts/episodic_return", score, self.update)
        self.writer.add_scalar("charts/action_std", spread, self.update)
        if normalised is not None:
            self.writer.add_scalar("charts/normalised_score", normalised, self.update)
        shown = "" if normalised is None else f", normalised {normalised:.1f}"
        self.bar.set_postfix_str(f"return {score:.1f}{shown}")

    def save(self) -> None:
        """Save all that continuing bit for bit needs. The previous checkpoint becomes checkpoint-previous.pt."""
        num_learners = self.args.num_seeds * len(self.data.obs)
        self.check_finite(finite_state(self.learners, self.optimizers, num_learners), "a parameter")
        checkpoint = {
            "algorithm": self.algorithm.name,
            "args": asdict(self.args),
            "updates": self.update,
            "learners": self.learners.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "prey": self.prey,
            "data": self.stats,
            "agents": list(map(str, self.env.agents)),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        save_torch(self.path / "checkpoint.pt", checkpoint, previous=self.path / "checkpoint-previous.pt")
        write_file(self.path / "config.json", json.dumps(asdict(self.args), indent=2).encode() + b"\n")

    def finish(self) -> dict:
        """Write results.json (evaluation.json with --eval-only) and print the closing table.

        Returns:
            what the file holds

        Raises:
            UserError: a return is not finite, or the disk refuses.
        """
        args = self.args
        if not all(x.isfinite().all() for x in self.returns.values()):
            raise UserError(f"{self.path}: a return is not finite; lower --temperature or the environment's rewards")
        results = {
            "algorithm": self.algorithm.name,
            "scenario": args.scenario,
            "dataset": args.dataset,
            "num_seeds": args.num_seeds,
            "updates": args.updates,
            "eval_episodes": args.eval_episodes,
            "returns": {shift: x.tolist() for shift, x in self.returns.items()},
            "data": self.stats,
            "milliseconds_per_action": evaluation.milliseconds_per_action(self.act, self.env, args.num_seeds),
            "settings": asdict(args),
            "hardware": hardware(self.device),
            "first_update": self.first_update,  # number of updates that earlier commands made
            "seconds": round(time.time() - self.started, 1),
            "command": shlex.join(["python", *sys.argv]),
            "commit": git_commit(),
        }
        if args.scenario == "landmarks6":
            results["assignments"] = {shift: evaluation.assignments(self, shift) for shift in self.returns}
        print(evaluation.closing_table(results, self.task))
        name = "evaluation.json" if args.eval_only else "results.json"
        goes_on = "evaluate again" if args.eval_only else f"{self.continuation()} goes on"
        with disk_errors(self.path, f"free some space; {goes_on}"):
            write_file(self.path / name, json.dumps(results, indent=2).encode() + b"\n")
            gif = self.path / ("evaluation.gif" if args.eval_only else "policy.gif")
            video = evaluation.write_gif(self, gif) if args.capture_video else None
        if video:
            print(video)
        print(f"{self.path}: {name}" if args.eval_only else f"{self.path}: {name}, checkpoint.pt, TensorBoard events")
        return results
