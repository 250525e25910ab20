"""Options of a script: groups of fields with rules, each group a box of its own in --help."""

from __future__ import annotations

import os
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, make_dataclass
from typing import Annotated, Any, Literal, NamedTuple

from own_env import OWN, is_own
from utils.program import UserError


class Rule(NamedTuple):
    """What an option may be, if it is not None: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE, SMALL = Rule("at least 1", lambda x: x >= 1), Rule("below 2^31", lambda x: x < 2**31)
FINITE = Rule("finite and not negative", lambda x: 0 <= x < float("inf"))
Natural = Annotated[int, Rule("at least 0", lambda x: x >= 0)]
Count, OptionalCount = Annotated[int, POSITIVE, SMALL], Annotated[int | None, POSITIVE, SMALL]
Weight, OptionalWeight = Annotated[float, FINITE], Annotated[float | None, FINITE]
Share = Annotated[float, Rule("in (0, 1]", lambda x: 0 < x <= 1)]
Fraction = Annotated[float, Rule("in [0, 1]", lambda x: 0 <= x <= 1)]
Discount = Annotated[float, Rule("in [0, 1)", lambda x: 0 <= x < 1)]
Widths = Annotated[
    tuple[int, ...],
    Rule("at least one width, each at least 1", lambda x: len(x) > 0 and min(x) >= 1),
    Rule("below 2^31", lambda x: max(x) < 2**31),
]
NoiseScale = Annotated[float, Rule("from 0 to 100", lambda x: 0 <= x <= 100)]  # a float32 holds exp(-100 / 4)
AT_LEAST_ONE = Rule("at least one name", len)
Quantiles = Annotated[tuple[float, ...], Rule("numbers in [0, 1]", lambda x: x and all(0 <= q <= 1 for q in x))]
Thresholds = Annotated[tuple[float, ...] | None, Rule("numbers, at least one", lambda x: x and all(r == r for r in x))]
DatasetName = Literal["random", "random-medium", "medium-replay", "medium", "medium-expert", "expert"]
Shift = Literal["none", "speed", "dismiss", "random", "extreme"]
# An empty word is often an unset variable of the shell, which also leaves the ~ of --option=~/folder as it is.
NAMED = Rule("a name, not empty and without ~ in front", lambda x: x and x[0] != "~")
Name, OptionalName = Annotated[str, NAMED], Annotated[str | None, NAMED]
Seed = Annotated[int, Rule("from 0 to 2^31 - 1", lambda x: 0 <= x < 2**31)]


def scenario_of(*names: str):
    """Type of --scenario: one of `names`, or an environment of one's own."""
    words = f"one of {', '.join(names)}, or {OWN}, an environment of your own (docs/own-environment.md)"
    return Annotated[str, Rule(words, lambda x: x in names or is_own(x))]


def plain(value):
    """An option as files can hold it: NumPy's and torch's numbers become Python's, sequences tuples, paths strings."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return tuple(plain(x) for x in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def has_type(value, hint) -> bool:
    """Whether a value has the type of an annotation; choices are not compared."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(has_type(x, args[0]) for x in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return origin is Literal or hint is type(value)


class Options:
    """Base class of option groups: dataclasses whose fields are checked when they are made."""

    def __post_init__(self):
        """Raise a UserError at the first option of another type than its annotation's, or that breaks its rule, or is
        none of its choices."""
        types_alone = typing.get_type_hints(type(self))
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value, option, kind = plain(getattr(self, name)), f"--{name.replace('_', '-')}", types_alone[name]
            setattr(self, name, value)
            if not has_type(value, kind):
                expected = kind.__name__ if isinstance(kind, type) else kind
                raise UserError(f"{option} {value!r}: must be of type {expected}")
            choices = kind.__args__[0] if typing.get_origin(kind) is tuple else kind
            if typing.get_origin(choices) is Literal:
                for one in value if isinstance(value, tuple) else (value,):
                    if one not in typing.get_args(choices):
                        known = ", ".join(typing.get_args(choices))
                        raise UserError(f"{option} {one}: unknown; choose one of {known}")
            for rule in getattr(hint, "__metadata__", ()):
                if isinstance(rule, Rule) and value is not None and not rule.holds(value):
                    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                    raise UserError(f"{option} {shown}: must be {rule.words}")


@dataclass
class DataArgs(Options):
    """What to learn from."""

    scenario: str = "simple_tag"
    """the task"""
    dataset: DatasetName = "random"
    """quality of the dataset"""
    data_dir: Name = "datasets"
    """folder of the datasets; one that is missing in the default folder is made first"""
    data_fraction: Share = 1.0
    """share of the dataset's trajectories to learn from, another random share for each seed"""
    augment: bool = True
    """replicate high-return trajectories (Algorithm 1)"""
    quantiles: Quantiles = (0.5, 0.75, 0.9, 0.95, 0.99)
    """quantiles of the dataset's returns that are Algorithm 1's thresholds r_th"""
    thresholds: Thresholds = None
    """thresholds r_th as returns, instead of --quantiles"""
    copies: Count = 1
    """how often a trajectory is replicated for every threshold that its return reaches"""
    raw_rewards: bool = False
    """keep the rewards as they are instead of standardising them over the dataset (standard deviation 1 and, without
    terminal states, mean 0)"""
    reward_scale: Weight = 1.0
    """factor on the (standardised) rewards"""

    def __post_init__(self):
        super().__post_init__()
        if self.thresholds and not self.augment:
            given = " ".join(map(str, self.thresholds))
            raise UserError(f"--thresholds {given}: nothing is replicated without --augment; leave them out or augment")


@dataclass
class TrainingArgs(Options):
    """How to learn. Defaults that depend on the dataset are shown for --scenario and --dataset as given."""

    seed: Seed = 0
    """seed of the first run, and of everything random"""
    num_seeds: Count = 1
    """independent runs S, trained side by side in one program"""
    updates: Count = 2_000
    """updates, T of DOM2's Algorithm 2"""
    batch_size: Count = 1024
    """transitions per learner and update"""


@dataclass
class EvaluationArgs(Options):
    """How to measure."""

    eval_interval: Count = 1_000
    """updates between evaluations in the standard environment"""
    eval_episodes: Count = 1_000
    """episodes per seed of every evaluation"""
    shift: tuple[Shift, ...] = ("speed",)
    """shifted environments of the final evaluation: speed; landmarks6: dismiss; MuJoCo: random, extreme; or none"""


@dataclass
class RunArgs(Options):
    """Where and how to run."""

    cuda: bool = True
    """use a GPU when there is one"""
    compile: bool = False
    """compile the update: a CUDA graph on a GPU; torch.compile on a CPU, which takes minutes to start"""
    bf16: bool = False
    """compute the update in bfloat16 where that is safe (autocast); float32 otherwise"""
    run_dir: Name = "runs"
    """folder in which this run's folder is made"""
    resume: OptionalName = None
    """run folder to continue from its checkpoint; --updates, the learning rates, --track and how to evaluate may be
    changed"""
    eval_only: OptionalName = None
    """run folder (or policy file, or name of a policy in pretrained/policies) to evaluate without training"""
    capture_video: bool = False
    """write a GIF of the trained policy to the run folder"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""


WHERE_AND_HOW = tuple(field.name for field in fields(RunArgs) if field.name != "bf16")  # changes no result


def lines(description: str) -> str:
    """A description whose line breaks --help keeps: tyro joins lines without a space in front."""
    return textwrap.indent(description, " ")


def parse_groups(default, description: str, words: list[str]):
    """Options from the command line, on top of those of the instance `default` of a class that inherits from groups.

    Raises:
        TypeError: the class has a field of its own, which belongs to none of the groups.
    """
    import tyro  # only programs need it

    groups, values = {}, asdict(default)
    for group in type(default).__bases__:
        name = group.__name__.removesuffix("Args").lower() or "all"
        groups[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
    if values:
        own = ", ".join(values)
        raise TypeError(f"{type(default).__qualname__}: move {own} to one of the option groups that it inherits from")
    Boxes = make_dataclass("Boxes", [(name, type(group)) for name, group in groups.items()])
    config = (tyro.conf.OmitArgPrefixes,)
    given = tyro.cli(Boxes, default=Boxes(**groups), args=words, description=lines(description or ""), config=config)
    args = type(default)(**{k: v for group in vars(given).values() for k, v in vars(group).items()})
    refuse_idle(args, words)
    return args


def refuse_idle(args: DataArgs, words: list[str]) -> None:
    """Raise a UserError at a word of the command line that changes nothing beside the other options."""
    named = {word.partition("=")[0] for word in words}
    for option in ("--quantiles", "--copies"):
        if option in named and not args.augment:
            raise UserError(f"{option}: nothing is replicated without --augment; leave it out or augment")
    if "--quantiles" in named and args.thresholds:
        raise UserError("--quantiles: --thresholds take their place; give one of them")
