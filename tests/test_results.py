"""The committed results are complete, and the README shows what they hold and nothing else."""

import json
import re
import statistics
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "results").glob("*/*.json"))
KEYS = {
    *("algorithm", "scenario", "dataset", "num_seeds", "updates", "eval_episodes", "returns", "data", "settings"),
    *("hardware", "seconds", "command", "commit"),
}


SHIFTS = {"landmarks6": ("dismiss",), "HalfCheetah": ("random", "extreme")}  # and "speed"


def load(algorithm, scenario, dataset):
    path = ROOT / "results" / algorithm / f"{scenario}-{dataset}.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_results_file_is_complete_and_in_its_place(path):
    results = json.loads(path.read_text())
    assert results.keys() >= KEYS
    assert results["data"].keys() >= {"mean", "std", "max", "transitions"}
    assert path.name == f"{results['scenario']}-{results['dataset']}.json"
    assert f"{path.parent.name}-".startswith(f"{results['algorithm']}-")  # a variant's folder goes on with its options
    assert results["returns"].keys() == {"none", *SHIFTS.get(results["scenario"], ("speed",))}
    assert all(len(returns) == results["num_seeds"] >= 3 for returns in results["returns"].values())
    assert results["eval_episodes"] >= (32 if results["scenario"] == "HalfCheetah" else 1000)
    assert re.fullmatch("[0-9a-f]{40}", results["commit"]) and results["command"].startswith("python ")


def mean_std(mean, std):
    return f"{mean:.1f} ± {std:.1f}"


def row(scenario, dataset):
    """The README's row of a data set, from the raw files alone."""
    results = {name: load(name, scenario, dataset) for name in ("dom2", "bc")}
    cells = {}
    shifts = SHIFTS.get(scenario, ("speed",))
    for shift in ("none", *shifts):
        for name, result in results.items():
            x = result and result["returns"][shift]
            cells[name, shift] = mean_std(statistics.mean(x), statistics.pstdev(x)) if x else "not run"
        cells["paper", shift] = mean_std(*common.paper_result(scenario, dataset, shift))
    data = next((r["data"] for r in results.values() if r), None)
    cells["data"] = f"{data['mean']:.1f} ({data['max']:.0f})" if data else ""
    ours = results["dom2"] and common.normalised_score(scenario, statistics.mean(results["dom2"]["returns"]["none"]))
    paper = common.normalised_score(scenario, common.paper_result(scenario, dataset, "none")[0])
    cells["normalised"] = f"{f'{ours:.1f}' if results['dom2'] else '-'} / {paper:.1f}"
    order = [("dom2", "none"), ("bc", "none"), "data", ("paper", "none"), "normalised"]
    order += [(name, shift) for shift in shifts for name in ("dom2", "bc", "paper")]
    return f"| `{scenario}` {dataset} | " + " | ".join(cells[key] for key in order) + " |"


def comparison(scenario, dataset, algorithms=("dom2", "ma_td3bc", "ma_cql", "omar", "ma_sfbc")):
    """The README's row of the baselines on a data set, in the standard environment; None without any of them."""
    results = {name: load(name, scenario, dataset) for name in algorithms}
    if not any(results[name] for name in algorithms[1:]):
        return None
    cells = []
    for result in results.values():
        x = result and result["returns"]["none"]
        cells.append(mean_std(statistics.mean(x), statistics.pstdev(x)) if x else "not run")
    cells += [mean_std(*common.paper_result(scenario, dataset, "none", name)) for name in ("MA-CQL", "OMAR", "MA-SfBC")]
    return f"| `{scenario}` {dataset} | " + " | ".join(cells) + " |"


@pytest.mark.parametrize("dataset", common.DATASETS)
@pytest.mark.parametrize("scenario", ("simple_spread", "simple_tag", "simple_world", "HalfCheetah"))
def test_readme_shows_the_raw_results(scenario, dataset):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert row(scenario, dataset) in lines
    assert (comparison(scenario, dataset) or row(scenario, dataset)) in lines


@pytest.mark.parametrize("shift", ["none", "dismiss"])
@pytest.mark.parametrize("dataset", ["medium", "expert"])
def test_readme_shows_the_six_landmarks(dataset, shift):
    cells = []
    for algorithm in ("dom2", "ma_cql", "omar"):
        results = load(algorithm, "landmarks6", dataset)
        x, distinct = results["returns"][shift], statistics.mean(results["assignments"][shift]["distinct"])
        cells.append(f"{mean_std(statistics.mean(x), statistics.pstdev(x))} ({distinct:.1f})")
    line = f"| `landmarks6` {dataset} | {'standard' if shift == 'none' else '`dismiss`'} | {' | '.join(cells)} | "
    line += f"{results['data']['mean']:.1f} |" if shift == "none" else "|"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
