"""What several test files need: behaviour policies and small datasets made of them."""

import signal

import pytest
import torch

import collect_datasets
from particle_env import EPISODE_STEPS, SCENARIOS, ParticleEnv

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs, the tests send it


def random_policy(obs_size: int, generator: torch.Generator, hidden: int = 8) -> dict[str, torch.Tensor]:
    """State dict of a small frozen policy with random weights."""
    sizes = (obs_size, hidden, hidden, 2)
    layers = {f"fc{i}": (sizes[i], sizes[i - 1]) for i in (1, 2, 3)}
    params = {f"{name}.weight": torch.randn(*shape, generator=generator) / 3 for name, shape in layers.items()}
    return params | {f"{name}.bias": torch.randn(shape[0], generator=generator) / 3 for name, shape in layers.items()}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Folder of random behaviour policies and prey for all scenarios, laid out as `pretrained/`."""
    folder = tmp_path_factory.mktemp("pretrained")
    for seed, (scenario, spec) in enumerate(SCENARIOS.items()):
        g, sizes = torch.Generator().manual_seed(seed), ParticleEnv(scenario, 1).obs_sizes
        everybody = [{"policy": random_policy(size, g)} for size in sizes]
        medium = [{"policy": random_policy(size, g)} for size in sizes[: spec.num_controlled]]
        contents = {"agent_params": everybody, "medium": medium, "levels": {"medium": 1.0, "expert": 2.0}, "seed": 0}
        actions = torch.rand(2 * EPISODE_STEPS, 10, spec.num_controlled, 2, generator=g) * 2 - 1
        torch.save(contents | {"replay": {"actions": actions.half(), "seed": seed}}, folder / f"{scenario}.pt")
    return folder


@pytest.fixture(scope="session")
def collect(pretrained):
    """collect(scenario, dataset, data_dir): a dataset of 20 episodes made by the random policies, its metadata."""

    def collect(scenario, dataset, data_dir, num_transitions=500, **options):
        return original(scenario, dataset, data_dir, num_transitions, **{"pretrained_dir": pretrained} | options)

    original = collect_datasets.collect
    return collect


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, collect):
    """Folder of small datasets, to read only."""
    folder = tmp_path_factory.mktemp("datasets")
    for scenario in SCENARIOS:
        for dataset in ("random", "medium", "expert", "random-medium"):
            collect(scenario, dataset, folder)
    collect("Reacher", "random", folder)
    return folder
