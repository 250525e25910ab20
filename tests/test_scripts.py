"""The scripts from end to end on tiny data: what they write, print, continue and refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import collect_datasets
import common
import dom2_mamujoco
import dom2_mpe
from baselines import madiff, omar
from common import UserError
from dom2_mpe import Args
from particle_env import EPISODE_STEPS, SCENARIOS, parallel_env

ROOT = Path(common.__file__).parent
NAN, INF = float("nan"), float("inf")
SMALL = dict(num_seeds=2, updates=6, batch_size=8, widths=(8, 8), critic_widths=(8,), eval_interval=2, eval_episodes=4)


def train(args):
    return dom2_mpe.train(args, dom2_mpe)


def flags(**options):
    """Options as on a command line."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def the_run(folder):
    (run,) = Path(folder).iterdir()
    return run


@pytest.fixture(scope="module")
def prey(pretrained):
    return str(pretrained / "simple_tag.pt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir, prey):
    """A run of the script in its own process: run folder, what it printed, its options."""
    folder = tmp_path_factory.mktemp("finished")
    places = dict(data_dir=str(data_dir), prey=prey, run_dir=str(folder / "runs"), cuda=False, capture_video=True)
    options = dict(scenario="simple_tag", dataset="random", seed=3, **SMALL, **places)
    command = [sys.executable, str(ROOT / "dom2_mpe.py"), *flags(**options)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder) == ["runs"]
    return the_run(folder / "runs"), done, options


@pytest.fixture
def small(tmp_path, data_dir):
    """Options of a tiny run without prey, its run folder in tmp_path."""
    places = dict(data_dir=str(data_dir), run_dir=str(tmp_path / "runs"), cuda=False)
    return dict(scenario="simple_spread", dataset="random", **SMALL, **places)


@pytest.fixture
def script(monkeypatch, capfd, tmp_path):
    """script(module, *words): exit code, standard output and error of a program started in tmp_path."""

    def script(module, *words):
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *words])
        monkeypatch.chdir(tmp_path)
        code = 0
        capfd.readouterr()
        try:
            common.run(module.main)
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return script


# ---- a whole run ----


def test_run_folder_holds_config_and_results(finished, data_dir):
    run, _, options = finished
    config, results = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "results"))
    for name, value in options.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value)
    assert config.keys() == {field.name for field in fields(Args)}
    assert all(config[name] is not None for name in dom2_mpe.SETTING_NAMES)  # filled in

    expected = dict(algorithm="dom2", scenario="simple_tag", dataset="random", num_seeds=2, updates=6, eval_episodes=4)
    assert {name: results[name] for name in expected} == expected
    assert results["settings"] == config
    assert list(results["returns"]) == ["none", "speed"]
    for returns in results["returns"].values():
        assert len(returns) == 2 and np.isfinite(returns).all() and returns[0] != returns[1]
    folder = data_dir / "simple_tag" / "random" / "seed_0_data"
    rewards = np.mean([np.load(folder / f"rews_{i}.npy") for i in range(3)], 0, np.float64)
    returns = rewards.reshape(-1, EPISODE_STEPS).sum(1)
    assert results["data"]["std"] == pytest.approx(returns.std(), rel=0.03)
    statistics = {"mean": returns.mean(), "max": returns.max(), "transitions": 500}
    assert {name: results["data"][name] for name in statistics} == pytest.approx(statistics, rel=1e-4)
    assert "torch" in results["hardware"] and 0 < results["seconds"] < 100
    assert results["command"].endswith(" ".join(flags(**options))) and results["command"].startswith("python ")
    assert results["commit"] == "unknown" or len(results["commit"]) == 40


def test_run_prints_the_table(finished):
    run, done, _ = finished
    results = json.loads((run / "results.json").read_text())
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name, shift, paper in (("standard", "none", "208.7 ± 57.3"), ("speed", "speed", "120.7 ± 100.2")):
        returns = np.array(results["returns"][shift])
        numbers = [f"{returns.mean():.1f} ± {returns.std():.1f}"]
        numbers += [f"{100 * (returns.mean() + 4.1) / 189.7:.1f}", f"{results['data']['mean']:.1f}"]
        numbers += [f"{results['data']['max']:.1f}", paper]
        rest = lines[name]
        for number in numbers:
            assert number in rest, lines[name]
            rest = rest.split(number, 1)[1]
    assert str(run) in done.stdout
    assert "6/6" in done.stderr  # the progress bar


def test_run_logs_to_tensorboard(finished):
    run, _, _ = finished
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"losses/td", "losses/diffusion", "losses/q", "charts/episodic_return", "charts/q_data"} <= set(tags)
    assert {tag.split("/")[0] for tag in tags} == {"charts", "losses"}
    returns = events.Scalars("charts/episodic_return")
    assert [event.step for event in returns] == [2, 4, 6]
    results = json.loads((run / "results.json").read_text())
    assert returns[-1].value == pytest.approx(np.mean(results["returns"]["none"]), rel=1e-5)  # the last parameters
    assert events.Scalars("losses/td")[-1].step == 6


def test_run_writes_a_gif(finished):
    run, _, _ = finished
    with Image.open(next(run.glob("*.gif"))) as image:
        assert image.n_frames >= EPISODE_STEPS
        frames = []
        for i in range(3):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
    assert not (frames[0] == frames[1]).all() and not (frames[1] == frames[2]).all()


def test_policy_plays_in_three_lines(finished):
    run, _, _ = finished
    env = parallel_env("simple_tag")
    policy = dom2_mpe.load_policy(run)
    obs, _ = env.reset(seed=0)
    steps, total = 0, 0.0
    while env.agents:
        actions = policy(obs)
        for agent in env.agents:
            assert env.action_space(agent).contains(actions[agent])
        obs, rewards, *_ = env.step(actions)
        steps, total = steps + 1, total + rewards["adversary_0"]
    assert steps == EPISODE_STEPS and np.isfinite(total)


def test_policy_is_that_of_the_chosen_seed_and_agent(finished, tmp_path, prey):
    """Networks that always answer one corner, another one for every seed and agent."""
    checkpoint = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [1, -1], [-1, 1.0]])  # [seed-major learners, 2]
    *_, last = (key for key in checkpoint["learners"] if key.startswith("policy.net") and key.endswith("weight"))
    checkpoint["learners"][last].zero_()
    checkpoint["learners"][last.replace("weight", "bias")].copy_(20 * corners[:, None])
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    obs, _ = parallel_env("simple_tag").reset(seed=0)
    frozen = common.load_prey(prey, 14, "cpu")
    for seed in (0, 1):
        actions = dom2_mpe.load_policy(tmp_path, seed)(obs)
        assert list(actions) == list(SCENARIOS["simple_tag"].agents)
        np.testing.assert_allclose([actions[f"adversary_{i}"] for i in range(3)], corners[3 * seed :][:3], atol=0.1)
        np.testing.assert_allclose(
            actions["agent_0"], common.policy_action(frozen, torch.from_numpy(obs["agent_0"])), atol=1e-6
        )


def test_the_table_of_one_seed_shows_no_spread(finished, capsys):
    results = json.loads((finished[0] / "results.json").read_text())
    results |= {"num_seeds": 1, "returns": {"none": [12.34], "speed": [5.0]}}
    dom2_mpe.print_table(results)
    out = capsys.readouterr().out
    assert "mean return of 4 episodes of one seed\n" in out
    assert re.search(r"^standard +12\.3 +8\.7 ", out, re.MULTILINE) and "12.3 ±" not in out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to change: its folder."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_eval_only_reproduces_the_returns(copied, script, tmp_path, data_dir):
    before, first = files(copied), json.loads((copied / "results.json").read_text())
    options = dict(eval_only=str(copied), eval_episodes=4, data_dir=str(data_dir), cuda=False)
    code, out, err = script(dom2_mpe, *flags(**options))
    assert code == 0, err
    again = json.loads((copied / "evaluation.json").read_text())
    assert again["returns"] == first["returns"] and again["updates"] == 6
    assert f"{np.mean(first['returns']['none']):.1f} ±" in out
    after = files(copied)
    assert all(after[name] == contents for name, contents in before.items())  # what training wrote stays
    assert not (tmp_path / "runs").exists()


def test_eval_only_takes_its_own_evaluation_options(copied, script, data_dir):
    options = dict(eval_only=str(copied), eval_episodes=3, eval_candidates=4, shift="none", data_dir=str(data_dir))
    code, _, err = script(dom2_mpe, *flags(**options, cuda=False))
    assert code == 0, err
    results = json.loads((copied / "evaluation.json").read_text())
    assert (results["eval_episodes"], results["settings"]["eval_candidates"]) == (3, 4)
    assert list(results["returns"]) == ["none"]


# ---- training ----


def assert_same_checkpoint(run, other):
    a, b = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (run, other))
    assert a["updates"] == b["updates"]
    for name, value in b["learners"].items():
        assert torch.equal(a["learners"][name], value), name
    for network, optimizer in b["optimizers"].items():
        for i, state in optimizer["state"].items():
            assert all(torch.equal(a["optimizers"][network]["state"][i][k], state[k]) for k in state)
    assert torch.equal(a["rng"], b["rng"])


def test_resume_continues_bit_for_bit(small, tmp_path, monkeypatch):
    whole = train(Args(**small | dict(run_dir=str(tmp_path / "whole"))))
    calls, update = [], dom2_mpe.update

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of update 2 and one update more
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dom2_mpe, "update", interrupted)
        train(Args(**small))
    run = the_run(tmp_path / "runs")
    assert torch.load(run / "checkpoint.pt", weights_only=True)["updates"] == 2
    assert not (run / "results.json").exists()
    torch.manual_seed(1234)
    resumed = train(Args(resume=str(run), data_dir=small["data_dir"]))
    assert resumed["returns"] == whole["returns"] and resumed["updates"] == 6

    assert_same_checkpoint(run, the_run(tmp_path / "whole"))
    for name in ("charts/episodic_return", "losses/td"):
        logs = []
        for folder in (run, the_run(tmp_path / "whole")):
            events = EventAccumulator(str(folder))
            events.Reload()
            logs.append({event.step: event.value for event in events.Scalars(name)})
        assert logs[0] == logs[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(number, small, tmp_path, monkeypatch, capsys):
    whole = train(Args(**small | dict(run_dir=str(tmp_path / "whole"))))
    calls, update = [], dom2_mpe.update

    def signalled(*args):
        calls.append(1)
        if len(calls) == 3:  # in the middle of an update between two checkpoints
            os.kill(os.getpid(), number)
        return update(*args)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(dom2_mpe, "update", signalled)
        train(Args(**small))
    assert exit.value.code == 128 + number and signal.getsignal(number) is handler
    run = the_run(tmp_path / "runs")
    assert f"stopped after update 3; go on with: python dom2_mpe.py --resume {run}" in capsys.readouterr().out
    resumed = train(Args(resume=str(run), data_dir=small["data_dir"]))
    assert resumed["returns"] == whole["returns"] and (whole["first_update"], resumed["first_update"]) == (0, 3)
    assert_same_checkpoint(run, the_run(tmp_path / "whole"))


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:999]), lambda f: f.unlink()])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, small, tmp_path, capsys):
    whole = train(Args(**small))
    run = the_run(tmp_path / "runs")
    last = torch.load(run / "checkpoint.pt", weights_only=True)["updates"]
    damage(run / "checkpoint.pt")
    resumed = train(Args(resume=str(run), data_dir=small["data_dir"]))
    assert "warning: " in capsys.readouterr().err and resumed["returns"] == whole["returns"]
    assert torch.load(run / "checkpoint-previous.pt", weights_only=True)["updates"] < last


def test_resume_goes_on_to_more_updates(small, tmp_path):
    longer = train(Args(**small | dict(run_dir=str(tmp_path / "longer"), updates=8)))
    train(Args(**small))
    run = the_run(tmp_path / "runs")
    resumed = train(Args(resume=str(run), updates=8, data_dir=small["data_dir"]))
    assert resumed["returns"] == longer["returns"] and resumed["updates"] == 8
    assert_same_checkpoint(run, the_run(tmp_path / "longer"))


def test_resume_does_not_go_back(small, tmp_path):
    train(Args(**small))
    with pytest.raises(UserError, match="--updates 3"):
        train(Args(resume=str(the_run(tmp_path / "runs")), updates=3, data_dir=small["data_dir"]))


@pytest.mark.parametrize("option", ["resume", "eval_only"])
def test_a_run_knows_where_its_data_are(option, small, tmp_path, monkeypatch):
    train(Args(**small))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect_datasets, "collect", lambda *args, **kwargs: pytest.fail("made other data"))
    results = train(Args(**{option: str(the_run(tmp_path / "runs"))}))
    assert results["settings"]["data_dir"] == small["data_dir"]


def test_same_seed_same_run_and_another_seed_another(small):
    first, second, third = (train(Args(**small | dict(seed=seed)))["returns"] for seed in (0, 0, 1))
    assert first == second
    assert first["none"][0] not in third["none"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(noise_net="residual", prediction="noise"),
        dict(eval_candidates=3, max_grad_norm=0.5, zeta=0.0),
        dict(scenario="simple_world", shift="none"),
        dict(dataset="random-medium", num_seeds=1, diffusion_steps=1),
    ],
    ids=str,
)
def test_other_options_train(changes, small, pretrained):
    args = Args(**small | dict(prey=str(pretrained / "simple_world.pt"), updates=3) | changes)
    results = train(args)
    assert np.isfinite(results["returns"]["none"]).all()
    assert len(results["returns"]["none"]) == args.num_seeds


def test_without_eta_it_is_cloning(small):
    small |= dict(eta=0.0, updates=3)
    results = train(Args(**small))
    assert results["algorithm"] == "bc" and results["settings"]["eta"] == 0
    events = EventAccumulator(str(the_run(small["run_dir"])))
    events.Reload()
    assert "losses/diffusion" in events.Tags()["scalars"] and "losses/td" not in events.Tags()["scalars"]


@pytest.fixture
def sampled(monkeypatch):
    """The data that training samples from at every update."""
    seen, sample_batch = [], dom2_mpe.sample_batch

    def spy(data, *args):
        seen.append(data)
        return sample_batch(data, *args)

    monkeypatch.setattr(dom2_mpe, "sample_batch", spy)
    return seen


def team_returns(data_dir):
    folder = Path(data_dir) / "simple_spread" / "random" / "seed_0_data"
    rewards = np.mean([np.load(folder / f"rews_{i}.npy") for i in range(3)], 0, np.float64)
    return rewards.reshape(-1, EPISODE_STEPS).sum(1)


@pytest.mark.parametrize("changes", [{}, {"quantiles": (0.3, 0.8)}, {"thresholds": (150.0, 170.0)}], ids=str)
def test_training_samples_with_the_weights_of_algorithm_1(changes, small, sampled, data_dir):
    train(Args(**small | dict(updates=1) | changes))
    returns = team_returns(data_dir)
    thresholds = changes.get("thresholds", np.quantile(returns, changes.get("quantiles", Args.quantiles)))
    weights = [1 + sum(value >= r for r in thresholds) for value in returns]
    assert torch.bincount(sampled[0].index).tolist() == np.repeat(weights, EPISODE_STEPS).tolist()
    assert max(weights) > 1


def test_no_augment(small, sampled):
    train(Args(**small | dict(updates=1, augment=False)))
    assert sampled[0].index.sort().values.tolist() == list(range(20 * EPISODE_STEPS))


def test_data_fraction_keeps_whole_trajectories(small, sampled, data_dir):
    """Sampling weights, statistics and the scale of the rewards are those of what is kept."""
    folder = data_dir / "simple_spread" / "random" / "seed_0_data"
    obs = np.stack([np.load(folder / f"obs_{i}.npy") for i in range(3)]).reshape(3, 20, EPISODE_STEPS, 18)
    choices = []
    for i, seed in enumerate((0, 1, 1)):
        results = train(Args(**small | dict(updates=1, data_fraction=0.25, seed=seed)))
        rows = sampled[i].rows
        assert rows.shape[:2] == (3, 5 * EPISODE_STEPS)
        kept = rows[:, :, :18].view(3, 5, EPISODE_STEPS, 18).numpy()
        choices.append([next(e for e in range(20) if (obs[:, e] == kept[:, k]).all()) for k in range(5)])
        returns = team_returns(data_dir)[choices[-1]]
        weights = [1 + sum(value >= r for r in np.quantile(returns, Args.quantiles)) for value in returns]
        assert torch.bincount(sampled[i].episodes).tolist() == weights
        assert results["data"]["mean"] == pytest.approx(returns.mean(), rel=1e-4)
        assert results["data"]["max"] == pytest.approx(returns.max(), rel=1e-4)
        assert results["data"]["transitions"] == 125
        assert rows[:, :, 20].std().item() == pytest.approx(1, rel=1e-3)
    assert len(set(choices[0])) == len(set(choices[1])) == 5
    assert set(choices[0]) != set(choices[1]) == set(choices[2])


def test_a_data_set_that_another_process_makes_in_the_meantime(small, tmp_path, monkeypatch, collect):
    def too_late(*names, **options):
        collect(*names, **options)
        collect(*names, **options)  # finds the one above

    monkeypatch.setattr(collect_datasets, "collect", too_late)
    assert train(Args(**small | dict(updates=1, data_dir=str(tmp_path / "new"))))["data"]["transitions"] == 500


def test_missing_data_set_is_made_first(small, tmp_path, monkeypatch, collect):
    folder = tmp_path / "new"
    monkeypatch.setattr(collect_datasets, "collect", lambda *names, **options: collect(*names, **options))
    results = train(Args(**small | dict(updates=1, data_dir=str(folder))))
    assert results["data"]["transitions"] == 500
    assert (folder / "simple_spread" / "random" / "seed_0_data" / "metadata.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(solver="ddpm", prediction="noise", zeta=0.0),  # Diffusion-QL made multi-agent
        dict(noise_net="residual", diffusion_steps=1, eta=1.0, bc_weight=0.0),
        dict(q_normaliser="printed", solver="ddpm", diffusion_steps=2, eval_candidates=3, eta=1.0),
        dict(raw_rewards=True, reward_scale=0.1, max_grad_norm=1.0, bf16=False),
    ],
    ids=str,
)
def test_variants_train_and_play(changes, small):
    results = train(Args(**small | dict(updates=2) | changes))
    assert np.isfinite(results["returns"]["none"]).all() and len(results["returns"]["none"]) == 2
    assert results["milliseconds_per_action"] > 0


def test_landmarks6_reports_what_its_figures_show(small, capsys):
    results = train(Args(**small | dict(scenario="landmarks6", updates=1)))
    assert results["returns"].keys() == results["assignments"].keys() == {"none", "dismiss"}
    for found in results["assignments"].values():
        assert len(found["distinct"]) == len(found["entropy"]) == 2 and min(found["distinct"]) >= 1
    assert "dismiss: " in capsys.readouterr().out


def test_losses_that_are_not_finite_end_the_run(small, monkeypatch):
    def update(learners, *args):
        bad = torch.zeros(6)
        bad[4] = float("nan")  # seed 1, agent 1
        return {"losses/td": torch.zeros(6), "losses/q": bad}

    monkeypatch.setattr(dom2_mpe, "update", update)
    with pytest.raises(UserError, match=r"update 1: losses/q of seed 8, agent 1 is not finite"):
        train(Args(**small | dict(eval_interval=6, seed=7)))
    run = the_run(small["run_dir"])
    assert not (run / "results.json").exists() and not (run / "checkpoint-previous.pt").exists()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["updates"] == 0


def test_a_broken_state_does_not_replace_the_last_checkpoint(small, monkeypatch):
    calls, update = [], dom2_mpe.update

    def broken(*args):
        calls.append(1)
        metrics = update(*args)
        return metrics if len(calls) < 4 else {tag: value * float("nan") for tag, value in metrics.items()}

    monkeypatch.setattr(dom2_mpe, "update", broken)
    with pytest.raises(UserError, match=r"update 4: .* is not finite"):
        train(Args(**small | dict(updates=9, eval_interval=3)))
    assert torch.load(the_run(small["run_dir"]) / "checkpoint.pt", weights_only=True)["updates"] == 3


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("network", ["policy", "critic", "target_policy", "target_critic", "optimizer"])
def test_a_broken_parameter_is_not_saved(network, value, small, monkeypatch):
    """It breaks in the very update that is saved next, whose losses are still finite."""
    calls, update = [], dom2_mpe.update

    def broken(learners, optimizers, *args):
        calls.append(1)
        metrics = update(learners, optimizers, *args)
        if len(calls) == 4:
            if network == "optimizer":
                tensor = next(iter(optimizers["critic"].state.values()))["exp_avg_sq"]
            else:
                tensor = next(learners[network].parameters()).detach()
            tensor.view(6, -1)[4, -1] = value  # seed 1, agent 1
        return metrics

    monkeypatch.setattr(dom2_mpe, "update", broken)
    with pytest.raises(UserError, match="update 4: a parameter of seed 8, agent 1 is not finite"):
        train(Args(**small | dict(seed=7)))
    assert torch.load(the_run(small["run_dir"]) / "checkpoint.pt", weights_only=True)["updates"] == 2


def test_two_runs_in_the_same_second_have_their_own_folders(small):
    args = dom2_mpe.resolve(Args(**small))
    runs = {dom2_mpe.new_run_dir(args, "dom2") for _ in range(5)}
    assert len(runs) == 5 and all(run.is_dir() for run in runs)


# ---- options ----


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("dataset", common.DATASETS)
def test_settings_are_valid_and_the_command_line_wins(scenario, dataset):
    args = dom2_mpe.resolve(Args(scenario=scenario, dataset=dataset))
    row = dict(zip(dom2_mpe.SETTING_NAMES, dom2_mpe.SETTINGS[scenario, dataset], strict=True))
    for name, value in row.items():
        assert getattr(Args(), name) is None and getattr(args, name) == value
        other = (5, 5) if isinstance(value, tuple) else type(value)(value / 2) or 1.0
        given = dom2_mpe.resolve(Args(scenario=scenario, dataset=dataset, **{name: other}))
        assert asdict(given) == asdict(args) | {name: other}
    assert dom2_mpe.resolve(args) == args


@pytest.mark.parametrize(
    "flags, expected", [({"avx512_f": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True)]
)
def test_bfloat16_where_the_hardware_has_it(flags, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert [module.Args().bf16 for module in (dom2_mpe, dom2_mamujoco, madiff, omar)] == [expected] * 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not dom2_mpe.Args().bf16


def test_settings_name_existing_data_sets():
    for scenario, dataset in dom2_mpe.SETTINGS:
        assert scenario in SCENARIOS and dataset in common.DATASETS


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {name: "nonsense"}
            for name in ("scenario", "dataset", "shift", "noise_net", "prediction", "solver", "q_normaliser")
        ),
        *({name: 0} for name in ("num_seeds", "updates", "batch_size", "diffusion_steps")),
        *({name: -1} for name in ("eval_interval", "eval_episodes", "eval_candidates")),
        *({name: -0.1} for name in ("eta", "zeta", "bc_weight", "reward_scale", "max_grad_norm", "beta_min")),
        *(
            {name: NAN}
            for name in ("eta", "zeta", "bc_weight", "reward_scale", "max_grad_norm", "beta_min", "beta_max")
        ),
        *({name: INF} for name in ("eta", "zeta", "bc_weight", "reward_scale", "max_grad_norm", "beta_max")),
        *({name: 0.0} for name in ("data_fraction", "rho", "actor_lr", "critic_lr")),
        *({name: 1.01} for name in ("data_fraction", "rho", "actor_lr", "critic_lr")),
        *({name: NAN} for name in ("data_fraction", "rho", "actor_lr", "critic_lr", "gamma")),
        *({"data_fraction": value} for value in (-0.5, INF)),
        *({"gamma": value} for value in (-0.1, 1.0, 2.0)),
        {"beta_max": 0.1},
        {"beta_max": 0.05},
        *({name: ()} for name in ("widths", "critic_widths")),
        *({name: (8, 0)} for name in ("widths", "critic_widths")),
        *({"quantiles": (0.5, value)} for value in (-0.1, 1.1, NAN)),
        {"thresholds": (5.0, NAN)},
        *({"seed": value} for value in (-1, 2**31)),
        {"eta": 0.0, "bc_weight": 0.0},
        {"eval_candidates": 2, "eta": 0.0},
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused(changes, script, small, tmp_path):
    with pytest.raises(UserError) as error:
        dom2_mpe.resolve(Args(**changes))
    for name in changes:
        assert f"--{name.replace('_', '-')}" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):  # train() checks them before it writes anything
        train(Args(**small | changes))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: 1.0} for name in ("data_fraction", "rho", "actor_lr", "critic_lr")),
        *({name: 0.0} for name in ("eta", "zeta", "gamma", "max_grad_norm", "beta_min")),
        {"bc_weight": 0.0, "eta": 1.0},
        {"data_fraction": 1e-6},
        {"quantiles": (0.0, 1.0)},
        {"thresholds": (-5.0, 1000.0)},
        *({"seed": value} for value in (0, 2**31 - 1)),
        {"eval_candidates": 2, "eta": 1.0},
        {"num_seeds": 1, "updates": 1, "batch_size": 1, "diffusion_steps": 1, "eval_interval": 1, "eval_episodes": 1},
    ],
    ids=str,
)
def test_extreme_options_are_allowed(changes):
    args = dom2_mpe.resolve(Args(**changes))
    assert all(getattr(args, name) == value for name, value in changes.items())


@pytest.mark.parametrize("module", [dom2_mpe, collect_datasets], ids=lambda module: module.__name__)
def test_help_explains_every_option(module, script, tmp_path):
    code, out, err = script(module, "--help")
    assert (code, err) == (0, "")
    for field in fields(module.Args):
        assert f"-{field.name.replace('_', '-')}" in out  # --name or --no-name
    assert not os.listdir(tmp_path)


# ---- bad input: one line, exit code 2, nothing written ----


def refused(script, tmp_path, *words, naming, module=dom2_mpe):
    before = files(tmp_path)
    code, out, err = script(module, *words)
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert naming in err, err
    assert files(tmp_path) == before
    assert "Traceback" not in out


@pytest.mark.parametrize(
    "option, value",
    [
        *((name, "nonsense") for name in ("scenario", "dataset", "noise_net", "prediction", "shift")),
        *(("data_fraction", value) for value in (0.0, 1.5, -1.0)),
        *(("updates", 0), ("num_seeds", 0), ("eval_candidates", 0), ("gamma", 1.0), ("widths", (0,)), ("eta", -1.0)),
    ],
)
def test_bad_options(option, value, script, tmp_path, small):
    flag = f"--{option.replace('_', '-')}"
    refused(script, tmp_path, *flags(**small | {option: value}), naming=flag)


@pytest.mark.parametrize("module", [dom2_mpe, collect_datasets], ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    "words, naming",
    [
        (["--nonsense", "3"], "--nonsense, 3"),
        (["--seed", "x"], "--seed"),
        (["--seed"], "--seed"),
        (["--seed", "1.5"], "--seed"),
        (["--seed", "-1"], "--seed -1"),
        (["random"], "random"),
    ],
    ids=str,
)
def test_words_that_are_no_options(words, naming, module, script, tmp_path):
    refused(script, tmp_path, *words, naming=naming, module=module)


def test_error_ends_the_process_with_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "dom2_mpe.py"), "--data-fraction", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --data-fraction 0") and done.stderr.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_bad_data(script, tmp_path, small, data_dir):
    for name in ("obs_1.npy", "rews_0.npy"):
        folder = tmp_path / "data" / "simple_spread" / "random" / "seed_0_data"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (data_dir / "simple_spread" / "random" / "seed_0_data").glob("*.npy"):
            (folder / file.name).write_bytes(file.read_bytes())
        array = np.load(folder / name)
        array[3] = np.nan
        np.save(folder / name, array)
        options = flags(**small | dict(data_dir=str(tmp_path / "data")))
        refused(script, tmp_path, *options, naming=name)
        (folder / name).unlink()
        refused(script, tmp_path, *options, naming=name)


def test_bad_prey(script, tmp_path, small, pretrained):
    (tmp_path / "text.pt").write_text("prey")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    wrong = pretrained / "simple_world.pt"
    for file in (tmp_path / "missing.pt", tmp_path / "text.pt", tmp_path / "other.pt", tmp_path, wrong):
        options = flags(**small | dict(scenario="simple_tag", prey=str(file)))
        refused(script, tmp_path, *options, naming=str(file))


def test_prey_is_that_of_the_data(script, tmp_path, small, pretrained, data_dir):
    """Data that say which prey they were made with are not mixed with another; data from elsewhere say nothing."""
    contents = torch.load(pretrained / "simple_tag.pt", weights_only=True)
    contents["agent_params"][-1]["policy"]["fc2.bias"][0] += 1e-3
    torch.save(contents, tmp_path / "other.pt")
    shutil.copytree(data_dir / "simple_tag", tmp_path / "datasets" / "simple_tag")
    places = dict(data_dir=str(tmp_path / "datasets"), prey=str(tmp_path / "other.pt"))
    options = flags(**small | dict(scenario="simple_tag", updates=1) | places)
    refused(script, tmp_path, *options, naming="--prey")
    (tmp_path / "datasets" / "simple_tag" / "random" / "seed_0_data" / "metadata.json").unlink()
    assert script(dom2_mpe, *options)[0] == 0


every_way_in = pytest.mark.parametrize("option", ["resume", "eval_only"])


@every_way_in
def test_bad_run_folders(option, script, tmp_path, finished):
    whole, run = (finished[0] / "checkpoint.pt").read_bytes(), tmp_path / "run"
    words = flags(**{option: str(run), "cuda": False})
    checkpoint = str(run / "checkpoint.pt")
    refused(script, tmp_path, *words, naming=checkpoint)  # no such folder
    run.mkdir()
    refused(script, tmp_path, *words, naming=checkpoint)
    for damaged in (b"", b"checkpoint", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        (run / "checkpoint.pt").write_bytes(damaged)
        refused(script, tmp_path, *words, naming=checkpoint)


def without(key):
    def change(checkpoint):
        del checkpoint[key]
        return checkpoint

    return change


def with_args(**changes):
    def change(checkpoint):
        checkpoint["args"] |= changes
        return checkpoint

    return change


def other_network(checkpoint):
    checkpoint["learners"] = {k: v[..., :1] for k, v in checkpoint["learners"].items()}
    return checkpoint


def other_optimizer(checkpoint):
    checkpoint["optimizers"]["policy"]["param_groups"][0]["params"].pop()
    return checkpoint


@every_way_in
@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint: {},
        lambda checkpoint: {"args": {}},
        lambda checkpoint: {"args": None},
        lambda checkpoint: [1, 2],
        lambda checkpoint: torch.zeros(3),
        lambda checkpoint: {"model": torch.zeros(3), "epoch": 4},
        lambda checkpoint: {"args": {"lr": 0.1}, "model": torch.zeros(3)},
        lambda checkpoint: checkpoint["learners"],
        other_network,
        other_optimizer,
        without("learners"),
        *(without(key) for key in ("optimizers", "updates", "rng", "prey")),
        with_args(num_seeds=3),
        with_args(widths=(8, 9)),
        with_args(learning_rate=0.1),
    ],
)
def test_checkpoints_of_another_kind(change, option, script, tmp_path, finished, data_dir):
    run = tmp_path / "run"
    run.mkdir()
    torch.save(change(torch.load(finished[0] / "checkpoint.pt", weights_only=True)), run / "checkpoint.pt")
    words = flags(**{option: str(run), "data_dir": str(data_dir), "cuda": False})
    refused(script, tmp_path, *words, naming="checkpoint.pt")


@every_way_in
@pytest.mark.parametrize("name, value", [("scenario", "simple_world"), ("dataset", "expert")])
def test_checkpoint_of_another_scenario_or_data_set(name, value, option, script, tmp_path, copied, data_dir):
    options = {name: value, option: str(copied), "data_dir": str(data_dir), "cuda": False}
    refused(script, tmp_path, *flags(**options), naming=f"--{name} {value}")


def test_load_policy_of_no_run(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        dom2_mpe.load_policy(tmp_path)


def test_load_policy_of_a_seed_that_was_not_trained(finished):
    with pytest.raises(UserError, match="seed"):
        dom2_mpe.load_policy(finished[0], seed_index=2)


def test_unusable_run_folder(script, tmp_path, small):
    (tmp_path / "file").touch()
    refused(script, tmp_path, *flags(**small | dict(run_dir=str(tmp_path / "file"))), naming="--run-dir")


def test_wandb_is_optional(script, tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(script, tmp_path, *flags(**small, track=True), naming="--track")


# ---- collect_datasets.py ----


def test_collect_datasets_from_the_command_line(script, tmp_path, pretrained):
    options = dict(scenario=("simple_tag", "simple_spread"), dataset=("random", "medium-expert"), num_transitions=500)
    words = flags(**options, pretrained_dir=str(pretrained))
    code, out, err = script(collect_datasets, *words)
    assert code == 0, err
    folders = {f"{s}/{d}" for s in options["scenario"] for d in options["dataset"]}
    made = files(tmp_path)
    assert {str(path.parent) for path in made} == {f"datasets/{folder}/seed_0_data" for folder in folders}
    for folder in folders:
        metadata = json.loads((tmp_path / "datasets" / folder / "seed_0_data" / "metadata.json").read_text())
        (line,) = (line for line in out.splitlines() if line.startswith(folder))
        numbers = [f"{metadata[f'return_{name}']:.1f}" for name in ("mean", "std", "max")]
        assert line.split()[1:5] == ["500", *numbers]
    assert "500/500" in err  # the progress bar

    code, out, _ = script(collect_datasets, *words, "--seed", "1")
    assert code == 0 and out.count("exists, kept") == 4 and files(tmp_path) == made
    code, _, _ = script(collect_datasets, *words, "--seed", "1", "--overwrite")
    assert code == 0 and files(tmp_path).keys() == made.keys() and files(tmp_path) != made


@pytest.mark.parametrize(
    "options, naming",
    [
        (dict(scenario="nonsense"), "--scenario nonsense"),
        (dict(dataset=("random", "nonsense")), "--dataset nonsense"),
        (dict(num_transitions=49), "--num-transitions 49"),
        (dict(num_transitions=-1000), "--num-transitions -1000"),
        (dict(pretrained_dir="none"), "none"),
    ],
)
def test_bad_input_of_collect_datasets(options, naming, script, tmp_path, pretrained):
    refused(
        script,
        tmp_path,
        *flags(**dict(pretrained_dir=str(pretrained)) | options),
        naming=naming,
        module=collect_datasets,
    )


def test_retraining_does_not_overwrite_policies(script, tmp_path, pretrained):
    before = files(pretrained)
    words = flags(train=True, scenario="simple_tag", pretrained_dir=str(pretrained))
    refused(script, tmp_path, *words, naming="--overwrite", module=collect_datasets)
    assert files(pretrained) == before


# ---- imports ----


def test_the_particle_scripts_leave_mujoco_alone(tmp_path):
    (tmp_path / "mujoco.py").touch()  # a stand-in, so that the test means something where MuJoCo is not installed
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code = "import sys, dom2_mpe, collect_datasets; print([m for m in sys.modules if m.startswith('mujoco')])"
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
