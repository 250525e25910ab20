"""The committed results are complete, and the README shows what they hold and nothing else."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

import common
import report
import reproduce

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


@pytest.mark.parametrize("target", report.TARGETS)
def test_results_were_made_with_the_settings_that_their_cells_have_today(target):
    for cell in report.TARGETS[target].cells():
        results = report.read(report.result_path(cell, ROOT / "results"))
        if results:
            _, settings = reproduce.resolve(cell, reproduce.Args(target), ())
            assert not reproduce.differences(results, settings), cell


@pytest.mark.parametrize("target", report.TARGETS)
def test_results_are_from_the_data_sets_of_the_table(target):
    """But for rounding, which makes the roll-outs of a robot's policies other episodes on another processor."""
    with open(ROOT / "results/datasets.csv") as file:
        table = {(row["scenario"], row["dataset"]): row for row in csv.DictReader(file)}
    for cell in report.TARGETS[target].cells():
        results = report.read(report.result_path(cell, ROOT / "results"))
        if results and cell.scenario != "landmarks6":  # it has no row
            row, fraction = table[cell.scenario, cell.dataset], results["settings"]["data_fraction"]
            near = {"rel": 0.02} if cell.scenario == "HalfCheetah" else {"abs": 0.05 if fraction == 1 else 5}
            assert results["data"]["mean"] == pytest.approx(float(row["return_mean"]), **near), cell
            assert results["data"]["transitions"] == pytest.approx(int(row["transitions"]) * fraction, abs=1000), cell


@pytest.mark.parametrize("scenario", ("simple_spread", "simple_tag", "simple_world", "HalfCheetah"))
def test_readme_shows_the_data_sets(scenario):
    cells = []
    with open(ROOT / "results/datasets.csv") as file:
        for row in csv.DictReader(file):
            if row["scenario"] == scenario:
                size = "1M" if row["transitions"] == "1000000" else f"{int(row['transitions']) / 1000:g}k"
                cells.append(f"{float(row['return_mean']):.1f} ({float(row['return_max']):.0f}), {size}")
    assert f"| `{scenario}` | {' | '.join(cells)} |" in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def mean_std(mean, std):
    return f"{mean:.1f} ± {std:.1f}"


def show(results, shift="none"):
    if results is None:
        return "not run"
    return mean_std(statistics.mean(results["returns"][shift]), statistics.pstdev(results["returns"][shift]))


def row(scenario, dataset):
    """The README's row of a data set, from the raw files alone."""
    results = {name: load(name, scenario, dataset) for name in ("dom2", "bc")}
    cells = {}
    shifts = SHIFTS.get(scenario, ("speed",))
    for shift in ("none", *shifts):
        for name, result in results.items():
            cells[name, shift] = show(result, shift)
        cells["paper", shift] = mean_std(*common.paper_result(scenario, dataset, shift))
    data = next((r["data"] for r in results.values() if r), None)
    cells["data"] = f"{data['mean']:.1f} ({data['max']:.0f})" if data else ""
    ours = results["dom2"] and common.normalised_score(scenario, statistics.mean(results["dom2"]["returns"]["none"]))
    paper = common.normalised_score(scenario, common.paper_result(scenario, dataset, "none")[0])
    cells["normalised"] = f"{f'{ours:.1f}' if results['dom2'] else '-'} / {paper:.1f}"
    order = [("dom2", "none"), ("bc", "none"), "data", ("paper", "none"), "normalised"]
    order += [(name, shift) for shift in shifts for name in ("dom2", "bc", "paper")]
    return f"| `{scenario}` {dataset} | " + " | ".join(cells[key] for key in order) + " |"


def comparison(scenario, dataset):
    """The README's row of the baselines on a data set, in the standard environment; MADiff is not run on robots."""
    names = ("dom2", "ma_td3bc", "ma_cql", "omar", "ma_sfbc", *(() if scenario == "HalfCheetah" else ("madiff",)))
    cells = [show(load(name, scenario, dataset)) for name in names]
    cells += [mean_std(*common.paper_result(scenario, dataset, "none", name)) for name in ("MA-CQL", "OMAR", "MA-SfBC")]
    return f"| `{scenario}` {dataset} | " + " | ".join(cells) + " |"


@pytest.mark.parametrize("dataset", common.DATASETS)
@pytest.mark.parametrize("scenario", ("simple_spread", "simple_tag", "simple_world", "HalfCheetah"))
def test_readme_shows_the_raw_results(scenario, dataset):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert row(scenario, dataset) in lines
    assert comparison(scenario, dataset) in lines


def ablation(folder, label):
    """The README's row of a part of DOM2 left out or replaced, on random-medium: standard, then shifted."""
    cells = [show(load(folder, scenario, "random-medium")) for scenario in (*report.PARTICLE, *report.MUJOCO)]
    cells += [show(load(folder, scenario, "random-medium"), "speed") for scenario in report.PARTICLE]
    return f"| {label} | {' | '.join(cells)} |"


ABLATIONS = {
    "dom2": "DOM2",
    "bc": "without policy improvement (`--eta 0`)",
    "dom2-bc-weight-0": "without diffusion loss (`--bc-weight 0`)",
    "dom2-no-augment": "without augmentation (`--no-augment`)",
    "dom2-noise-net-residual": "Figure 8's network (`--noise-net residual`)",
    "dom2-prediction-noise": "network predicts the noise (`--prediction noise`)",
    "dom2-solver-ddpm": "DDPM for DPM-Solver (`--solver ddpm`)",
    "dom2-q-normaliser-printed": "Eq. 5's weight as printed (`--q-normaliser printed`)",
    "dom2-solver-ddpm-prediction-noise-zeta-0": "Diffusion-QL, augmented (`--solver ddpm --prediction noise --zeta 0`)",
}


def augmentation(label, without, with_):
    """The README's row of an algorithm without and with Algorithm 1, on random-medium of the three environments."""
    results = [load(folder, s, "random-medium") for s in report.PARTICLE for folder in (without, with_)]
    return f"| {label} | {' | '.join(map(show, results))} |"


AUGMENTED = {
    "DOM2": ("dom2-no-augment", "dom2"),
    "MA-TD3+BC": ("ma_td3bc", "ma_td3bc-augment"),
    "MA-CQL": ("ma_cql", "ma_cql-augment"),
    "OMAR": ("omar", "omar-augment"),
    "MA-SfBC": ("ma_sfbc", "ma_sfbc-augment"),
    "MA-BC": ("ma_bc", "ma_bc-augment"),
}


@pytest.mark.parametrize("folder", ABLATIONS)
def test_readme_shows_the_ablations(folder):
    assert ablation(folder, ABLATIONS[folder]) in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("label", AUGMENTED)
def test_readme_shows_augmentation_for_everyone(label):
    assert augmentation(label, *AUGMENTED[label]) in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


PUBLISHED_ON = ("random", "medium-replay", "medium", "expert")  # data sets with scores published for the baselines
COMPARED = {"ma_cql": "MA-CQL", "ma_td3bc": "MA-TD3+BC", "omar": "OMAR", "madiff": "MADiff"}


def published(scenario, name):
    """The README's normalised scores of a baseline, up to the published ones: a pattern."""
    returns = [statistics.mean(load(name, scenario, dataset)["returns"]["none"]) for dataset in PUBLISHED_ON]
    cells = [rf"{common.normalised_score(scenario, value):.1f} / \d+\.\d" for value in returns]
    return r" \| ".join([rf"\| `{scenario}` {re.escape(COMPARED[name])}", *cells]) + r" \|"


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("scenario", report.PARTICLE)
def test_readme_shows_normalised_scores_beside_the_published(scenario, name):
    assert re.search(f"^{published(scenario, name)}$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("shift", ["none", "dismiss"])
@pytest.mark.parametrize("dataset", ["medium", "expert"])
def test_readme_shows_the_six_landmarks(dataset, shift):
    cells = []
    for algorithm in ("dom2", "ma_cql", "omar"):
        results = load(algorithm, "landmarks6", dataset)
        distinct = statistics.mean(results["assignments"][shift]["distinct"])
        cells.append(f"{show(results, shift)} ({distinct:.1f})")
    line = f"| `landmarks6` {dataset} | {'standard' if shift == 'none' else '`dismiss`'} | {' | '.join(cells)} | "
    line += f"{results['data']['mean']:.1f} |" if shift == "none" else "|"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_mean_and_spread_has_a_raw_file_or_is_said_to_have_none(name):
    known = set()
    for path in FILES:
        returns = json.loads(path.read_text())["returns"]
        known |= {mean_std(statistics.mean(values), statistics.pstdev(values)) for values in returns.values()}
    with open(ROOT / "results/paper.csv") as file:
        known |= {mean_std(float(row["mean_return"]), float(row["std_return"])) for row in csv.DictReader(file)}
    text, found = (ROOT / name).read_text(encoding="utf-8"), 0
    for part in re.split(r"\n\n|\n(?=[-|] ?)", text):  # paragraphs, items of lists, rows of tables
        part = " ".join(part.split()).replace(",", "")
        numbers = re.findall(r"-?\d+\.\d ± \d+\.\d", part)
        found += len(numbers)
        assert "no raw file" in part or "commit " in part or not set(numbers) - known, part
    assert found > 50
