"""A PettingZoo ParallelEnv of your own, given as `module:function`, many copies in lockstep.

    env = OwnEnv("my_envs:spread5", num_envs=100)               # calls my_envs.spread5() 100 times
    obs = env.reset()                                           # [E, n, d]
    obs, rewards, terminated = env.step(actions)                # actions [E, n, A] in [-1, 1]; [E, n, d], [E, n], [E]

The interface is that of `particle_env.TeamEnv`. Policies and datasets have actions in [-1, 1]; `from_unit` and
`to_unit` convert them to the environment's Box and back. E is the number of copies, n of agents.
docs/own-environment.md shows it with examples.
"""

import importlib
import inspect
import os
import re
import sys
import traceback
import weakref
from contextlib import contextmanager, suppress

import numpy as np
import torch
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv
from torch import Tensor

from utils.arrays import as_int, as_tensor
from utils.program import UserError

OWN = "module:function"  # the form of the name; also the key of settings that hold for every such environment
LONGEST = 10_000  # steps of an episode in which the time limit is looked for
COUNTED = {}  # {(task, its attribute episode_steps): steps of its episodes}


def is_own(scenario: str) -> bool:
    """Whether a scenario's name has the form `module:function`."""
    return re.fullmatch(r"\w+(\.\w+)*:\w+", scenario) is not None


# --------------------------------------------------------------------------------------------------------------------
# Actions


def middle_and_half(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half the width of a Box in float64. Raises UserError where it has no finite width."""
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)
    if not (np.isfinite(high - low) & (low < high)).all():
        raise UserError(f"actions in {box}: every entry needs finite bounds, low below high; give the Box such bounds")
    return (low + high) / 2, (high - low) / 2


def checked(box: Box, action) -> np.ndarray:
    action = np.asarray(action, np.float64)
    if action.shape[-1:] != box.shape or not np.isfinite(action).all():
        raise ValueError(f"actions of shape {action.shape}: expected finite numbers [..., {box.shape[0]}] for {box}")
    return action


def from_unit(box: Box, action) -> np.ndarray:
    """Actions in [-1, 1] as an environment's Box takes them, [..., A]: -1 becomes box.low and 1 becomes box.high.

    With Box(-1, 1) nothing changes. What lies beyond [-1, 1] becomes the nearest bound.

    Raises:
        ValueError: the actions have another size than the Box, or are not finite.
        UserError: the Box has no finite width.
    """
    middle, half = middle_and_half(box)
    return np.clip(middle + half * checked(box, action), box.low, box.high).astype(box.dtype)


def to_unit(box: Box, action) -> np.ndarray:
    """The inverse of `from_unit`, float32 [..., A]: what a dataset on disk holds. Nothing is clipped. Same errors."""
    middle, half = middle_and_half(box)
    return ((checked(box, action) - middle) / half).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# The user's function and what it returns


@contextmanager
def users_code(task: str, what: str, call: str = ""):
    """Within the context an exception becomes a UserError that names the file and line it comes from, or how the
    user's function is called where its arguments do not fit."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else call and f" (it is called {call})"
        reason = f"{type(error).__name__}: {error}{place}"
        raise UserError(f"--scenario {task}: {what} failed with {reason}; mend it") from error


def load_function(task: str):
    """The function that `module:function` names; modules in the current folder are found."""
    module_name, _, name = task.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        with users_code(task, f"importing {module_name}"):
            module = importlib.import_module(module_name)
    except UserError as error:
        missing = getattr(error.__cause__, "name", None) if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise
        where = f"in the current folder, {os.getcwd()}, or on Python's path"
        remedy = "start in the folder that holds it or add that folder to PYTHONPATH"
        raise UserError(f"--scenario {task}: there is no module {missing} {where}; {remedy}") from None
    if not callable(getattr(module, name, None)):
        file = getattr(module, "__file__", module_name)
        raise UserError(f"--scenario {task}: {file} has no function {name}; write it, or give the name of one it has")
    return getattr(module, name)


def spaces(task: str, env) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, Box]]:
    """Agents of an environment, the sizes of their observations, and {agent: Box of its actions}.

    Raises:
        UserError: it is no ParallelEnv, or agents have unequal sizes or spaces of another kind.
    """
    fault = f"--scenario {task}:"
    if not isinstance(env, ParallelEnv):
        remedy = "return one (pettingzoo.utils.aec_to_parallel makes one of an AECEnv)"
        raise UserError(
            f"{fault} returned an object of class {type(env).__name__}, no PettingZoo ParallelEnv; {remedy}"
        )
    agents, sizes, boxes = tuple(env.possible_agents), [], {}
    for agent in agents:
        obs, action = env.observation_space(agent), env.action_space(agent)
        if not isinstance(action, Box) or len(action.shape) != 1 or action.dtype.kind != "f":
            remedy = "make them continuous (in MPE2: continuous_actions=True)"
            raise UserError(f"{fault} actions of {agent} are {action}, not a Box of floats [A]; {remedy}")
        if not isinstance(obs, Box) or len(obs.shape) != 1:
            raise UserError(f"{fault} observations of {agent} are {obs}, not a Box [d]; flatten them")
        try:
            middle_and_half(action)
        except UserError as error:
            raise UserError(f"{fault} {agent}: {error}") from None
        if 0 in (*obs.shape, *action.shape):
            raise UserError(f"{fault} observations of {agent} are {obs}, actions {action}; neither can be empty")
        sizes.append(obs.shape[0])
        boxes[agent] = action
    for what, own in (("observations", sizes), ("actions", [len(box.low) for box in boxes.values()])):
        if len(set(own)) != 1:
            listed = ", ".join(f"{agent} {size}" for agent, size in zip(agents, own, strict=True)) or "no agent"
            remedy = "agents are trained in one stack and need equal sizes; pad the smaller ones in the environment"
            raise UserError(f"{fault} sizes of {what} differ ({listed}); {remedy}")
    return agents, tuple(sizes), boxes


def close(envs: list) -> None:
    """Close environments; one that fails or has no `close` must not end the program."""
    for env in envs:
        with suppress(Exception):
            env.close()


def check_agents(known: list[str] | None, agents, what) -> None:
    """Raise a UserError if `what` was made with agents of other names or in another order; None: it does not say."""
    own = list(map(str, agents))
    if known not in (None, own):
        remedy = "let possible_agents list them in that order, under these names"
        raise UserError(f"{what} has agents {', '.join(known)}, the environment {', '.join(own)}; {remedy}")


class OwnEnv:
    """`num_envs` copies of a ParallelEnv of the user's own, stepped one after the other.

    Args:
        task: `module:function`. The function takes no arguments and returns a new ParallelEnv at every call.
        num_envs: number of copies E.
        shift: None or "none"; such an environment has no shifts.
        device: of the tensors that `reset` and `step` return.
        seed: an int. Every `reset` of copy i passes a seed that depends on `seed`, i and the number of the reset.
        render_mode: passed on where the function has an argument of this name.

    An episode ends for all agents at once: after `episode_steps` steps by truncation, or before by termination. The
    environment's attribute `episode_steps` says how many steps, else they are counted in an episode of random actions.

    Raises:
        UserError: the function or its environment does not fit, or what the environment does later does not.
        ValueError: `num_envs` is less than 1.
    """

    state = None  # what a single agent would see: nobody needs it

    def __init__(self, task, num_envs=1, shift=None, device="cpu", seed=0, render_mode=None):
        if shift not in (None, "none"):
            raise UserError(f"--shift {shift}: {task} is an environment of your own and has no shifts; give none")
        num_envs, seed = as_int(num_envs, "num_envs", 1), as_int(seed, "seed", 0)
        function, options = load_function(task), {}
        with users_code(task, "the function", "without arguments, or with render_mode where it has that one"):
            if render_mode is not None and "render_mode" in inspect.signature(function).parameters:
                options["render_mode"] = render_mode
            self.envs = [function(**options) for _ in range(num_envs)]
        weakref.finalize(self, close, self.envs)
        with users_code(task, "reading agents and spaces"):
            self.agents, self.obs_sizes, self.boxes = found = spaces(task, self.envs[0])
            if any(spaces(task, env) != found for env in self.envs):
                raise UserError(f"--scenario {task}: two calls returned different agents or spaces; return equal ones")
        if len({id(env) for env in self.envs}) < num_envs:
            raise UserError(f"--scenario {task}: two calls returned one object; return a new environment at every call")
        self.task, self.num_envs, self.num_agents = task, num_envs, len(self.agents)
        self.obs_size, self.action_size = self.obs_sizes[0], len(self.boxes[self.agents[0]].low)
        self.action_sizes, self.action_mask, self.action_scale = (self.action_size,) * self.num_agents, None, 1.0
        self.device, self._seed, self._episode, self._steps = torch.device(device), seed, 0, 0
        self._obs = np.zeros((num_envs, self.num_agents, self.obs_size), np.float32)
        self._running, self._terminated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self._limit = None
        self.episode_steps = self._limit = self._time_limit()

    def _error(self, message: str) -> UserError:
        return UserError(f"--scenario {self.task}: {message}")

    def _time_limit(self) -> int:
        """Steps of an episode that the time limit ends."""
        given = getattr(self.envs[0], "episode_steps", None)
        if given is not None:
            given = as_int(given, f"--scenario {self.task}: its attribute episode_steps", 1)
        if (self.task, given) not in COUNTED:
            self._limit = given
            COUNTED[self.task, given] = self._count_steps(given)
        return COUNTED[self.task, given]

    def _count_steps(self, given: int | None) -> int:
        """Steps of the first of ten episodes of random actions that does not terminate, played in copy 0.

        They are played with the limit `given` as well, so that a fault shows now and not after hours of training.
        """
        generator = np.random.default_rng(0)
        for _ in range(10):
            self.reset()
            self._running[1:] = False
            while self._running[0] and self._steps < LONGEST:
                actions = generator.uniform(-1, 1, (self.num_envs, self.num_agents, self.action_size))
                self.step(torch.from_numpy(actions))
            if self._running[0]:
                break
            if not self._terminated[0]:
                given = self._steps
                break
        if given:
            self._episode = 0
            return given
        found = f"none within {LONGEST:,} steps" if self._running[0] else "ten episodes of random actions terminated"
        raise self._error(f"no time limit found ({found}); give the environment an attribute episode_steps")

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    def reset(self) -> Tensor:
        """Start a new episode in every copy. Returns obs [E, n, d]."""
        for i, env in enumerate(self.envs):
            seed = int(np.random.SeedSequence([self._seed, i, self._episode]).generate_state(1)[0]) >> 1  # an int32
            with users_code(self.task, "reset()", "with seed=..."):
                obs, _ = self._dicts(env.reset(seed=seed), "reset", 2)
                self._observe(i, obs)
        self._episode, self._steps = self._episode + 1, 0
        self._running[:], self._terminated[:] = True, False
        return self._tensor(self._obs)

    def _dicts(self, returned, method: str, number: int) -> tuple:
        if isinstance(returned, tuple) and len(returned) == number and all(isinstance(x, dict) for x in returned):
            return returned
        raise self._error(f"{method}() returned no tuple of {number} dicts, as a ParallelEnv does; mend it")

    def _observe(self, i: int, obs: dict, over: bool = False) -> None:
        for agent, name in enumerate(self.agents):
            if over and name not in obs:  # nobody acts on the last observation
                continue
            if name not in obs or np.shape(obs[name]) != (self.obs_size,):
                found = f"of shape {np.shape(obs[name])}" if name in obs else "missing"
                raise self._error(f"the observation of {name} is {found}, expected [{self.obs_size}]; mend it")
            self._obs[i, agent] = obs[name]
        if not np.isfinite(self._obs[i]).all():
            raise self._error("an observation holds NaN or infinity; mend it")

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance every copy whose episode has not ended by one step; the others stand still, at reward 0.

        Args:
            actions: [E, n, A] in [-1, 1].

        Returns:
            obs [E, n, d], rewards [E, n], terminated [E]: where all agents terminated, which no time limit does.

        Raises:
            ValueError: the actions have another shape or are not finite.
            UserError: the environment does not keep the rules of docs/own-environment.md.
        """
        shape = (self.num_envs, self.num_agents, self.action_size)
        actions = as_tensor(actions, "the array of actions", shape, dtype=torch.float64, finite=True).detach().numpy()
        actions = {name: from_unit(box, actions[:, agent]) for agent, (name, box) in enumerate(self.boxes.items())}
        rewards = np.zeros((self.num_envs, self.num_agents), np.float32)
        self._steps += 1
        for i in np.flatnonzero(self._running):
            with users_code(self.task, "step()", "with a dict of actions"):
                returned = self.envs[i].step({name: action[i] for name, action in actions.items()})
                obs, reward, terminations, truncations, _ = self._dicts(returned, "step", 5)
                over = self._ended(i, terminations, truncations)
                self._observe(i, obs, over)
                given = [reward.get(name, np.nan) for name in self.agents]
                with np.errstate(over="ignore"):  # a float32 of it can be infinite
                    if any(np.shape(x) != () or not np.isfinite(np.float32(x)) for x in given):
                        told = f"step {self._steps} gave an agent no finite reward"
                        raise self._error(f"{told}; give every agent one, a number in the range of float32")
                rewards[i] = given
        return self._tensor(self._obs), self._tensor(rewards), self._tensor(self._terminated)

    def _ended(self, i: int, terminations: dict, truncations: dict) -> bool:
        """Whether this step has ended the episode of copy i. All agents must leave together."""
        left = [
            name
            for name in self.agents
            if terminations.get(name) or truncations.get(name) or name not in self.envs[i].agents
        ]
        if 0 < len(left) < self.num_agents:
            remedy = "keep every agent until the last one leaves (supersuit.black_death_v3 does this)"
            raise self._error(f"{left[0]} left in step {self._steps}, before the others; {remedy}")
        self._running[i] = not left
        self._terminated[i] = all(terminations.get(name) for name in self.agents)
        if self._limit and bool(left) != (self._steps == self._limit) and not self._terminated[i]:
            found = f"was cut off after {self._steps} steps" if left else f"went on after {self._steps} steps"
            limits = f"the time limit is {self._limit} steps (its attribute episode_steps or, without it, a count)"
            raise self._error(f"an episode {found}, but {limits}; give all episodes one limit, and that attribute")
        return bool(left)

    def render(self, i: int = 0) -> np.ndarray:
        """Copy i as an image, uint8 [height, width, 3].

        Raises:
            RuntimeError: the environment draws none.
        """
        remedy = "let the function take render_mode and pass it on, and the environment know 'rgb_array'"
        try:
            image = self.envs[i].render()
        except Exception as error:
            raise RuntimeError(f"render() of {self.task} failed ({type(error).__name__}: {error}); {remedy}") from None
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
            raise RuntimeError(f"render() of {self.task} returned no image; {remedy}")
        return image
