"""Arrays, seeds and options as other people's code makes them: converted where that loses nothing, else refused by
name, in every public function that takes them."""

import json
import warnings
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mujoco import FORMS
from test_robustness import SCRIPTS
from test_scripts import the_run

import collect_datasets
import common
import dom2_mpe
from dom2_mpe import DOM2
from mamujoco_env import MujocoEnv
from own_env import OwnEnv
from particle_env import SCENARIOS, ParticleEnv, TeamEnv, parallel_env
from run import parse
from utils.arrays import as_int, as_tensor
from utils.checkpoints import load_checkpoint
from utils.frozen import load_prey, policy_action
from utils.program import UserError

E = 4
NUMBERS = {
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
    "0-d array": np.array,
    "big-endian": lambda x: np.array(x, ">i4"),
    "tensor": torch.tensor,
}
every_number = pytest.mark.parametrize("number", NUMBERS)
NO_INTEGERS = (2.0, "2", None, np.float32(2), np.array([2]), float("nan"))


def stay(obs):
    return torch.zeros(len(obs), 2)


ENVIRONMENTS = {
    "ParticleEnv": lambda num_envs=E, seed=0: ParticleEnv("simple_tag", num_envs, seed=seed),
    "TeamEnv": lambda num_envs=E, seed=0: TeamEnv("simple_tag", num_envs, seed=seed, prey=stay),
    "TeamEnv without prey": lambda num_envs=E, seed=0: TeamEnv("simple_spread", num_envs, seed=seed),
    "MujocoEnv": lambda num_envs=E, seed=0: MujocoEnv("Reacher", num_envs, seed=seed),
    "OwnEnv": lambda num_envs=E, seed=0: OwnEnv("test_own_env:Toy", num_envs, seed=seed),
}
every_environment = pytest.mark.parametrize("name", ENVIRONMENTS)


def shape_of(env):
    """The shape of its actions."""
    return env.num_envs, env.num_agents, getattr(env, "action_size", 2)


def uniform(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def played(env, actions):
    """Numbers of the first observation and of a step."""
    first, (obs, rewards, *_) = env.reset(), env.step(actions)
    first, obs = (torch.stack(x[:3], 1) if isinstance(x, list) else x for x in (first, obs))
    return torch.cat([first.flatten(), obs.flatten(), rewards.flatten()])


# ---- actions ----


@every_environment
@pytest.mark.parametrize("form", [*FORMS, "float16", "int64", "uint16", "bool", "bfloat16 tensor"])
def test_actions_in_any_form(name, form):
    make = ENVIRONMENTS[name]
    actions = uniform(shape_of(make()))
    if form in ("int64", "uint16", "bool", "float16", "bfloat16 tensor"):
        actions = np.abs(actions).round()
        given = torch.from_numpy(actions).bfloat16() if "tensor" in form else actions.astype(form)
    else:
        given = FORMS[form](actions)
    with warnings.catch_warnings(action="error"):
        got = played(make(), given)
    assert torch.equal(got.detach(), played(make(), torch.from_numpy(actions)))


@every_environment
def test_actions_of_another_shape_are_refused(name):
    """Nothing is broadcast, cropped or read in another order, and the worlds stay as they were."""
    env, twin = ENVIRONMENTS[name](), ENVIRONMENTS[name]()
    num_envs, n, A = shape = shape_of(env)
    env.reset(), twin.reset()
    wrong = [(num_envs, n, 1), (n, A), (1, n, A), (n, num_envs, A), (num_envs, A, n), (num_envs * n, A)]
    wrong += [
        (num_envs, n + 1, A),
        (num_envs, n, A + 1),
        (num_envs, n - 1, A),
        (num_envs, n * A),
        (),
        (0,),
        (*shape, 1),
    ]
    wrong = [x for x in wrong if x != shape]
    for x in wrong:
        for actions in (torch.zeros(x), np.zeros(x)):
            with pytest.raises(ValueError) as error:
                env.step(actions)
            assert str(error.value) == f"the array of actions has shape {x}, expected {shape}"
    actions = uniform(shape)
    assert torch.equal(env.step(actions)[1], twin.step(actions)[1])


@every_environment
@pytest.mark.parametrize(
    "actions",
    ["left", None, [[0.1, 0.2], [0.3]], np.array([1j]), torch.tensor([1j]), {"agent_0": 0.0}, np.array(["1.0"])],
    ids=str,
)
def test_actions_that_are_no_numbers_are_refused(name, actions):
    env = ENVIRONMENTS[name]()
    env.reset()
    with pytest.raises(ValueError, match=r"^the array of actions: "):
        env.step(actions)


@every_environment
def test_actions_are_clipped(name):
    """Also where the reward counts the control, as in MuJoCo."""
    make = ENVIRONMENTS[name]
    actions = 3 * uniform(shape_of(make()))
    clipped = actions.clip(-1, 1)
    assert (actions != clipped).any()
    assert torch.equal(played(make(), actions), played(make(), clipped))
    assert not torch.equal(played(make(), actions), played(make(), clipped / 2))


def test_robots_refuse_actions_that_are_not_finite():
    env = ENVIRONMENTS["MujocoEnv"]()
    env.reset()
    for value in (np.nan, np.inf, -np.inf):
        actions = uniform(shape_of(env))
        actions[1, 1, 0] = value
        with pytest.raises(ValueError, match=r"^the array of actions: holds NaN or infinity"):
            env.step(actions)


def test_gradients_flow_through_a_step():
    """Of the particle worlds, where nothing is clipped."""
    env = ParticleEnv("simple_spread", 2)
    env.reset()
    actions = torch.tensor([0.5, 2.0]).repeat(2, 3, 1).requires_grad_()
    env.step(actions)[0][0].sum().backward()
    assert (actions.grad[:, 0, 0] != 0).all() and (actions.grad[:, :, 1] == 0).all()


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("form", FORMS)
def test_pettingzoo_actions_in_any_form(scenario, form):
    env, twin = parallel_env(scenario), parallel_env(scenario)
    env.reset(seed=3), twin.reset(seed=3)
    actions = {agent: 1.5 * uniform(2, seed) for seed, agent in enumerate(env.agents)}
    given = {agent: FORMS[form](x) for agent, x in reversed(actions.items())}
    with warnings.catch_warnings(action="error"):
        got = env.step(given)
    np.testing.assert_equal(got, twin.step({agent: x.clip(-1, 1) for agent, x in actions.items()}))


def test_pettingzoo_actions_that_do_not_fit():
    env = parallel_env("simple_tag")
    env.reset(seed=0)
    good, state = {agent: np.zeros(2, np.float32) for agent in env.agents}, env.state()
    for wrong, message in (
        ({}, "expected adversary_0, adversary_1, adversary_2, agent_0"),
        (good | {"agent_1": good["agent_0"]}, "agent_1: expected adversary_0"),
        ({name: x for name, x in good.items() if name != "agent_0"}, "adversary_2: expected .*, agent_0"),
        (dict(enumerate(good.values())), "0, 1, 2, 3: expected"),
        *(
            (good | {"agent_0": np.zeros(n)}, rf"action of agent_0 has shape \({n},\), expected \(2,\)")
            for n in (1, 3, 5)
        ),
        (good | {"agent_0": np.zeros((1, 2))}, r"action of agent_0 has shape \(1, 2\), expected \(2,\)"),
        (good | {"agent_0": 0.5}, r"action of agent_0 has shape \(\), expected \(2,\)"),
        (good | {"agent_0": None}, "action of agent_0: holds object"),
        *((good | {"agent_0": [0.0, x]}, "action of agent_0: holds NaN or inf") for x in (np.nan, np.inf, -np.inf)),
    ):
        with pytest.raises(ValueError, match=message):
            env.step(wrong)
        assert np.array_equal(env.state(), state) and env.steps == 0
    env.step(good)


# ---- states and preys ----


@pytest.mark.parametrize("form", FORMS)
def test_states_in_any_form(form):
    state = [uniform((E, 4, 2), 1), uniform((E, 4, 2), 2), uniform((E, 2, 2), 3)]
    one, other = (ParticleEnv("simple_tag", E) for _ in range(2))
    with warnings.catch_warnings(action="error"):
        got = one.set_state(*(FORMS[form](x) for x in state))
    for a, b in zip(got, other.set_state(*map(torch.from_numpy, state)), strict=True):
        assert torch.equal(a.detach(), b)


def test_a_refused_state_changes_nothing():
    env = ParticleEnv("simple_tag", E)
    env.reset()
    before = env.agent_pos.clone()
    with pytest.raises(ValueError, match="landmark_pos has shape"):
        env.set_state(np.ones((E, 4, 2)), np.ones((E, 4, 2)), np.ones((E, 3, 2)))
    assert torch.equal(env.agent_pos, before)


def test_a_state_is_copied():
    given = torch.zeros(1, 4, 2)
    env = ParticleEnv("simple_tag", 1)
    env.set_state(given, given, torch.zeros(1, 2, 2))
    env.agent_pos += 1
    assert (given == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_preys_answer_in_any_form(form):
    answer, actions = uniform((E, 2)), uniform((E, 3, 2))
    make = lambda prey: TeamEnv("simple_tag", E, prey=prey)  # noqa: E731
    with warnings.catch_warnings(action="error"):
        got = played(make(lambda obs: FORMS[form](answer)), actions)
    assert torch.equal(got.detach(), played(make(lambda obs: torch.from_numpy(answer)), actions))


def test_preys_that_do_not_fit():
    actions = torch.zeros(E, 3, 2)
    for shape in ((2,), (1, 2), (E, 1), (E, 1, 2), (E, 3)):
        env = TeamEnv("simple_tag", E, prey=lambda obs, shape=shape: torch.zeros(shape))
        env.reset()
        with pytest.raises(ValueError) as error:
            env.step(actions)
        assert str(error.value) == f"the array of the prey's actions has shape {shape}, expected {(E, 2)}"
    env = TeamEnv("simple_tag", E)
    env.reset()
    with pytest.raises(ValueError, match=r"simple_tag has a prey: .*prey="):
        env.step(actions)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_policy_takes_observations_in_any_form(form, pretrained):
    prey, obs = load_prey(pretrained / "simple_tag.pt", 14), uniform((E, 14))
    with warnings.catch_warnings(action="error"):
        got = policy_action(prey, FORMS[form](obs))
    assert torch.equal(got.detach(), policy_action(prey, torch.from_numpy(obs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_the_worlds_is_kept(dtype, pretrained):
    """A float64 world takes float64 actions as they are; a prey in float32 may play in it."""
    action = torch.full((1, 4, 2), 0.1, dtype=torch.float64)
    env, (obs, _) = ParticleEnv("simple_tag", 1, dtype=dtype), (None, None)
    env.set_state(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.ones(1, 2, 2))
    env.step(action)
    expected = 0.1 * torch.tensor(16.0, dtype=dtype) * action.to(dtype)[0, 3, 0]
    assert env.agent_vel[0, 3, 0] == expected
    prey = load_prey(pretrained / "simple_tag.pt", 14)
    obs = env.reset()[3]
    torch.testing.assert_close(policy_action(prey, obs), policy_action(prey, obs.float()))


# ---- numbers ----


@every_environment
@every_number
def test_seeds_and_numbers_of_worlds_of_any_integer_type(name, number):
    make, convert = ENVIRONMENTS[name], NUMBERS[number]
    env = make(convert(3), convert(7))
    assert type(env.num_envs) is int
    actions = uniform(shape_of(env))
    assert torch.equal(played(env, actions), played(make(3, 7), actions))


@every_environment
@pytest.mark.parametrize("value", NO_INTEGERS, ids=str)
def test_seeds_and_numbers_of_worlds_that_are_no_integers(name, value):
    with pytest.raises(ValueError, match=r"^num_envs .*: must be an integer"):
        ENVIRONMENTS[name](value)
    with pytest.raises(ValueError, match=r"^seed .*: must be an integer"):
        ENVIRONMENTS[name](2, value)


@every_environment
@pytest.mark.parametrize("value", [0, -1])
def test_no_worlds(name, value):
    with pytest.raises(ValueError, match=f"^num_envs {value}: must be at least 1"):
        ENVIRONMENTS[name](value)


@every_number
def test_seeds_of_pettingzoo(number):
    env = parallel_env("simple_world")
    expected = env.reset(seed=5)
    np.testing.assert_equal(env.reset(seed=NUMBERS[number](5)), expected)
    with pytest.raises(ValueError, match=r"^seed 5\.0: must be an integer"):
        env.reset(seed=5.0)


@every_number
def test_seeds_of_robots_are_any_integers(number):
    convert = NUMBERS[number]
    first = MujocoEnv("Reacher", 2, seed=(convert(3), convert(1))).reset()
    assert torch.equal(first, MujocoEnv("Reacher", 2, seed=(3, 1)).reset())
    with pytest.raises(ValueError, match=r"^seed -1: must be at least 0"):
        MujocoEnv("Reacher", 1, seed=-1)


def test_integers():
    for number, convert in NUMBERS.items():
        assert type(as_int(convert(5), "x")) is int and as_int(convert(5), "x") == 5, number
    assert as_int(-3, "x") == -3


# ---- collecting ----


@every_number
def test_collecting_with_numbers_of_any_type(number, tmp_path, collect):
    convert = NUMBERS[number] if number != "uint8" else np.uint16
    plain = collect("simple_tag", "medium", str(tmp_path / "a"), 200, seed=9, action_noise=0.25)
    noise = np.float32(0.25) if number == "int32" else torch.tensor(0.25)
    made = collect("simple_tag", "medium", tmp_path / "b", convert(200), seed=convert(9), action_noise=noise)
    assert made["checksums"] == plain["checksums"]
    written = (common.dataset_path(tmp_path / folder, "simple_tag", "medium", 9) / "metadata.json" for folder in "ab")
    one, other = (json.loads(file.read_text()) for file in written)
    assert one == other and one["seed"] == 9 and one["action_noise"] == {"medium": 0.25}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(seed=-1), "--seed -1: must be from 0"),
        (dict(seed=1.5), "--seed 1.5: must be of type int"),
        (dict(num_transitions=1e3), "--num-transitions 1000.0: must be of type int"),
        (dict(action_noise=float("nan")), "--action-noise nan: must be finite"),
        (dict(action_noise=-0.1), "--action-noise -0.1: must be finite and not negative"),
        (dict(action_noise="0.1"), "--action-noise '0.1': must be of type float"),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["simple_spread", "Reacher"])
def test_collecting_with_numbers_that_do_not_fit(options, message, task, tmp_path):
    with pytest.raises(UserError) as error:
        collect_datasets.collect(task, "random", tmp_path, **options)
    assert str(error.value).startswith(message) and not list(tmp_path.iterdir())


# ---- options ----


def in_numpy(value):
    if isinstance(value, tuple):
        return [in_numpy(x) for x in value]
    if isinstance(value, bool | int | float):
        return np.array(value)[()]  # a NumPy scalar
    return value


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_of_any_type_are_those_of_the_command_line(script):
    """So that checkpoints and JSON files can hold them, and comparisons with --resume notice no difference."""
    algorithm = SCRIPTS[script][0]
    plain = algorithm.args("simple_tag" if "mujoco" not in script else "HalfCheetah", "random")
    converted = algorithm.Args(**{field.name: in_numpy(getattr(plain, field.name)) for field in fields(plain)})
    assert converted == plain

    def types(value):
        return (type(value), *map(types, value)) if isinstance(value, tuple) else type(value)

    assert {k: types(v) for k, v in asdict(converted).items()} == {k: types(v) for k, v in asdict(plain).items()}
    assert type(parse(algorithm, "", [])) is type(converted)


def test_options_of_other_kinds():
    args = DOM2.args(
        widths=np.array([8, 16]), quantiles=torch.tensor([0.5, 0.75]), thresholds=[0, 1], data_dir=Path("a/b")
    )
    assert (args.widths, args.quantiles, args.data_dir) == ((8, 16), (0.5, 0.75), str(Path("a/b")))
    assert args.thresholds == (0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        dict(shift="speed"),  # whose letters would be taken for shifts
        dict(updates=2.5),
        dict(updates=True),
        dict(updates="5"),
        dict(eta="5"),
        dict(eta=None),
        dict(augment="no"),
        dict(augment=1),
        dict(quantiles=0.5),
        dict(widths=128),
        dict(widths=(8, 2.5)),
        dict(thresholds=("1",)),
        dict(run_dir=None),
        dict(resume=3),
        dict(seed=1j),
    ],
    ids=str,
)
def test_options_of_another_type_are_refused_by_name(changes):
    with pytest.raises(UserError) as error:
        DOM2.args(**changes)
    ((name, value),) = changes.items()
    assert str(error.value).startswith(f"--{name.replace('_', '-')} {value!r}: must be of type ")


def test_a_run_with_options_of_numpy(data_dir, tmp_path):
    """As in `for seed in np.arange(3)`; it can be continued and loaded."""
    small = dict(updates=np.int64(2), batch_size=np.int32(8), widths=[8, 8], critic_widths=np.array([8]))
    small |= dict(eval_episodes=np.int64(2), eta=np.float32(0.5), shift=[], cuda=np.bool_(False))
    places = dict(data_dir=data_dir, run_dir=tmp_path / "runs")
    seed = np.arange(3)[2]
    results = dom2_mpe.train(DOM2.args("simple_spread", "random", seed=seed, **small, **places))
    run = the_run(tmp_path / "runs")
    args, _ = load_checkpoint(run, DOM2)
    assert args.seed == 2 and args.widths == (8, 8) and args.eta == 0.5
    again = dom2_mpe.train(DOM2.args("simple_spread", "random", seed=seed, **small, **places, eval_only=run))
    assert again["returns"] == results["returns"]
    policy = dom2_mpe.load_policy(run, seed_index=np.int64(0))
    obs, _ = parallel_env("simple_spread").reset(seed=0)
    expected = policy(obs)
    np.testing.assert_equal(dom2_mpe.load_policy(str(run))(obs), expected)
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="observation of agent_1: holds NaN or infinity"):
            policy(obs | {"agent_1": np.full_like(obs["agent_1"], value)})
    for index, message in ((1, "holds 1 seed$"), (-1, "at least 0"), (0.0, "an integer"), ("0", "an integer")):
        with pytest.raises(UserError, match=f"seed_index .*{message}"):
            dom2_mpe.load_policy(run, seed_index=index)


# ---- what the calling program has set ----


@contextmanager
def setting(name):
    """A setting of torch that other programs use."""
    if name == "float64":
        torch.set_default_dtype(torch.float64)
    elif name == "device":
        torch.set_default_device("meta")  # stands for a GPU: what is made there by mistake cannot be used
    try:
        with {"autocast": torch.autocast("cpu", torch.bfloat16)}.get(name, torch.set_grad_enabled(name != "no_grad")):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("name", ["float64", "device", "autocast", "no_grad"])
def test_settings_of_the_calling_program_change_nothing(name, data_dir, pretrained, tmp_path):
    """Neither of the environments nor of a trained policy with its prey."""
    prey = {"prey": pretrained / "simple_tag.pt"}
    small = dict(updates=1, batch_size=8, widths=(8,), critic_widths=(8,), eval_episodes=2, shift=(), cuda=False)
    dom2_mpe.train(DOM2.args("simple_tag", "random", **small, **prey, data_dir=data_dir, run_dir=tmp_path))

    def results():
        env = parallel_env("simple_tag")
        obs, _ = env.reset(seed=0)
        actions = dom2_mpe.load_policy(the_run(tmp_path))(obs)
        found = [actions, env.step(actions), env.state()]
        for env in (
            TeamEnv("simple_tag", 2, "speed", prey=lambda obs: np.ones((2, 2))),
            ParticleEnv("landmarks6", 2, "dismiss"),
            MujocoEnv("Reacher", 2, "extreme"),
        ):
            first = env.reset()
            found += [first, env.step(uniform(shape_of(env)))]
        return [x.numpy(force=True) if isinstance(x, torch.Tensor) else x for x in flat(found)]

    def flat(x):
        return [z for y in x for z in flat(y)] if isinstance(x, list | tuple) else [x]

    expected = results()
    with setting(name):
        got = results()
        assert torch.get_default_dtype() == (torch.float64 if name == "float64" else torch.float32)
    np.testing.assert_equal(got, expected)
    assert all(action.dtype == np.float32 for action in got[0].values())


# ---- tensors on another device ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")
@every_environment
def test_actions_on_another_device(name):
    env, twin = ENVIRONMENTS[name](), ENVIRONMENTS[name]()
    actions = torch.from_numpy(uniform(shape_of(env)))
    assert torch.equal(played(env, actions.cuda()), played(twin, actions))
    task = "Reacher" if name == "MujocoEnv" else "simple_tag"
    env = common.make_env(task, E, device="cuda", prey=stay)  # its prey answers on the CPU
    env.reset()
    assert env.step(uniform(shape_of(env)))[0].is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")
def test_a_frozen_policy_on_another_device(pretrained):
    prey = {name: x.cuda() for name, x in load_prey(pretrained / "simple_tag.pt", 14).items()}
    assert policy_action(prey, uniform((E, 14))).is_cuda


def test_tensors_are_converted_to_the_device():
    tensor = as_tensor(np.arange(3), "x", device="meta")  # the only other device of every machine
    assert tensor.device.type == "meta" and tensor.dtype == torch.float32 and tensor.shape == (3,)
    own = torch.zeros(2)
    assert as_tensor(own, "x") is own  # nothing is copied that fits
