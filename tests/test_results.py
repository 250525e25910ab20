"""The committed raw results are well formed and in their places, and were made with the settings of their cells."""

import csv
import json
import re
import subprocess
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest

import common
from common import ROOT
from experiments import report, reproduce

RESULTS = ROOT / "results"
FILES = {path: json.loads(path.read_text()) for path in sorted(RESULTS.rglob("*.json"))}
FOLDERS = sorted({str(path.parent.relative_to(RESULTS)) for path in FILES})
CELLS = {
    report.result_path(cell, RESULTS): cell for target in report.TARGETS.values() for cell in target.cells()
}  # of the tables and figures
KEYS = {
    *("algorithm", "scenario", "dataset", "num_seeds", "updates", "eval_episodes", "returns", "data", "settings"),
    *("hardware", "seconds", "command", "commit"),
}
SHIFTS = {"landmarks6": ("dismiss",), "HalfCheetah": ("random", "extreme")}  # and "speed"
TRIALS = sorted((RESULTS / "trials").glob("*.csv"))


def in_folder(folder):
    return [(path, results) for path, results in FILES.items() if path.parent == RESULTS / folder]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def history():
    """All commits up to this one."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.split()

    if git("rev-parse", "--is-shallow-repository") != ["false"]:
        pytest.skip("needs the whole history: git fetch --unshallow")
    return set(git("rev-list", "HEAD"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_raw_results_are_complete(folder):
    for path, results in in_folder(folder):
        scenario, returns = results["scenario"], results["returns"]
        assert results.keys() >= KEYS, path
        assert results["data"].keys() >= {"mean", "std", "max", "transitions"}, path
        assert path.name == f"{scenario}-{results['dataset']}.json"
        assert returns.keys() == {"none", *SHIFTS.get(scenario, ("speed",))}, path
        assert all(len(x) == results["num_seeds"] >= 3 and np.isfinite(x).all() for x in returns.values()), path
        assert results["eval_episodes"] >= (32 if scenario == "HalfCheetah" else 1000), path
        assert re.fullmatch("[0-9a-f]{40}", results["commit"]) and results["command"].startswith("python "), path
        assert path.stat().st_size < 10_000, path  # large arrays are kept elsewhere


@pytest.mark.parametrize("folder", FOLDERS)
def test_raw_results_are_in_their_places(folder):
    for path, results in in_folder(folder):
        algorithm = results["algorithm"]
        if results["settings"].get("solver") == "ddpm":
            algorithm = "ma_diffusion_ql"  # it was an option of DOM2 once
        if folder == "main/bc":  # DOM2 without the Q-loss
            assert algorithm in ("bc", "dom2") and results["settings"]["eta"] == 0, path
        elif folder.startswith("main/"):
            assert folder == f"main/{algorithm}", path
        else:
            assert CELLS[path].variant.algorithm == algorithm, path  # every study is part of the report


def test_raw_results_can_be_made_again_or_say_why_not(history):
    for path, results in FILES.items():
        runs = not re.search("--(resume|eval-only)", results["command"]) and results["commit"] in history
        assert ("reproducible" not in results) == runs, path
        if not runs:
            assert results["reproducible"] is False and results["why"], path


def settings(cell):
    """Today's settings of a cell: as `reproduce.resolve`, without the slow command line."""
    algorithm = report.ALGORITHMS[cell.variant.algorithm]
    script = algorithm.script.format(family="mamujoco" if cell.scenario in report.MUJOCO else "mpe")
    options = algorithm.options | {"seed": 10, "num_seeds": cell.variant.num_seeds} | dict(cell.variant.options)
    args = reproduce.load(script).args(cell.scenario, cell.dataset, **options)
    return json.loads(json.dumps(asdict(args)))


def test_these_settings_are_those_of_the_command_line():
    for variant in {cell.variant.algorithm: cell.variant for cell in CELLS.values()}.values():
        cell = report.Cell(variant, "simple_tag", "medium")
        assert settings(cell) == reproduce.resolve(cell, reproduce.Args("table1"), ())[1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_raw_results_were_made_with_the_settings_that_their_cells_have_today(folder):
    """Except those with the seeds from 0, which are of earlier settings and have a dagger in the tables."""
    for path, results in in_folder(folder):
        if results["settings"]["seed"] == 0 and folder != "main/dom2":
            continue
        plain = report.Cell(report.Variant(results["algorithm"]), results["scenario"], results["dataset"])
        cell = CELLS.get(path, plain)
        job = reproduce.Job(cell, (), settings(cell), path.parent, path)
        assert reproduce.differences(results, job) == {}, path


def test_raw_results_are_from_the_datasets_of_the_table():
    """Except rounding, which changes the episodes of MuJoCo's behaviour policies from processor to processor."""
    table = {(row["scenario"], row["dataset"]): row for row in read_csv(RESULTS / "datasets.csv")}
    for path, results in FILES.items():
        if results["scenario"] != "landmarks6":  # it has no row
            row, fraction = table[results["scenario"], results["dataset"]], results["settings"]["data_fraction"]
            near = {"rel": 0.02} if results["scenario"] == "HalfCheetah" else {"abs": 0.05 if fraction == 1 else 5}
            if fraction < 0.05:
                near = {"abs": 20}
            assert results["data"]["mean"] == pytest.approx(float(row["return_mean"]), **near), path
            # with the seeds 10 to 12 every seed has its own share of the data, before that all had the same
            shares = results["num_seeds"] if fraction < 1 and results["settings"]["seed"] == report.FIRST_SEED else 1
            transitions = shares * fraction * int(row["transitions"])
            assert results["data"]["transitions"] == pytest.approx(transitions, abs=1000), path


SCENARIOS = ("simple_spread", "simple_tag", "simple_world", "HalfCheetah")


def readme_table():
    """Rows of the README's table of results, made from the raw ones: DOM2 / the best baseline / the paper's DOM2."""
    rows = report.read_rows(report.TARGETS["table1"], RESULTS) + report.read_rows(report.TARGETS["table3"], RESULTS)
    cells = {}
    for row in rows:
        scores = {v.algorithm: common.normalised_score(row.scenario, s.returns.mean()) for v, s in row.here.items()}
        others = max(score for name, score in scores.items() if name != "dom2")
        paper = common.normalised_score(row.scenario, row.paper[report.Variant("dom2")][0])
        ours = [f"**{x:.1f}**" if x >= max(scores.values()) else f"{x:.1f}" for x in (scores["dom2"], others)]
        cells[row.scenario, row.dataset] = " / ".join([*ours, f"{paper:.1f}"])
    return [f"| {d} | {' | '.join(cells[s, d] for s in SCENARIOS)} |" for d in common.DATASETS]


def test_the_readme_shows_the_results():
    text = (ROOT / "README.md").read_text()
    assert [line for line in readme_table() if line not in text] == []


def test_readme_counts_the_datasets_on_which_a_share_of_the_data_is_enough():
    """Point 4: DOM2 and MA-TD3+BC with 5% of the data against the baselines of the paper with all of it."""

    def mean(variant, scenario, dataset):
        path = report.result_path(report.Cell(variant, scenario, dataset), RESULTS)
        return np.mean(report.read(path)["returns"]["none"])

    def reached(algorithm):
        part, paper = report.with_fraction(algorithm, 0.05), report.plain("ma_cql", "omar", "ma_sfbc", "madiff")
        cells = product(report.PARTICLE, report.NO_REPLAY)
        return sum(mean(part, *cell) >= max(mean(v, *cell) for v in paper) for cell in cells)

    text = (ROOT / "README.md").read_text("utf-8")
    assert f"on {reached('dom2')} of the 15 particle datasets" in text
    assert f"MA-TD3+BC with 5% does on {reached('ma_td3bc')} (" in text


def test_the_published_scores_stand_beside_those_of_the_raw_results():
    """docs/baselines.md: `scenario` algorithm, then "here / published" for each dataset."""
    algorithms = {algorithm.name: name for name, algorithm in report.ALGORITHMS.items()}
    text = (ROOT / "docs/baselines.md").read_text().split("## Published scores")[1].split("\n## ")[0]
    rows = re.findall(r"\| `(\w+)` ([\w+-]+) \| (\S+) / .* \| (\S+) / .* \| (\S+) / .* \| (\S+) / .* \|", text)
    assert len(rows) == 15
    for scenario, label, *scores in rows:
        for dataset, score in zip(("random", "medium-replay", "medium", "expert"), scores, strict=True):
            returns = FILES[RESULTS / f"main/{algorithms[label]}/{scenario}-{dataset}.json"]["returns"]["none"]
            assert score == f"{common.normalised_score(scenario, np.mean(returns)):.1f}", (scenario, label, dataset)


def test_the_returns_beside_those_of_omars_code_are_those_of_the_raw_results():
    algorithms = {algorithm.name: name for name, algorithm in report.ALGORITHMS.items()}
    text = (ROOT / "docs/baselines.md").read_text().split("## Published scores")[1].split("\n## ")[0]
    rows = re.findall(r"\| ([\w+-]+) \| `(\w+)` ([\w-]+) \| \d+ \| (.*) \|", text)
    assert len(rows) == 4
    for label, scenario, dataset, ours in rows:
        returns = FILES[RESULTS / f"main/{algorithms[label]}/{scenario}-{dataset}.json"]["returns"]["none"]
        assert ours == f"{np.mean(returns):.1f} ± {np.std(returns):.1f}", (label, scenario, dataset)


def test_paths_among_six_landmarks_lie_beside_their_raw_results():
    for path, results in FILES.items():
        if results["scenario"] == "landmarks6":
            with np.load(path.with_suffix(".npz")) as arrays:
                for shift, found in results["assignments"].items():
                    assert found.keys() == {"distinct", "entropy"}
                    assert arrays[f"{shift}-paths"].shape == (10, 26, 3, 2)
                    landmarks = arrays[f"{shift}-landmarks"]
                    assert landmarks.shape == (6, 2) and len(np.unique(landmarks, axis=0)) == (
                        3 if shift == "dismiss" else 6
                    )


@pytest.mark.parametrize("path", TRIALS, ids=lambda path: path.stem)
def test_a_table_of_trials_is_complete(path, history):
    rows = read_csv(path)
    for row in rows:
        assert row["algorithm"] in report.ALGORITHMS and row["dataset"] in common.DATASETS
        assert row["environment"] in ("standard", *SHIFTS.get(row["scenario"], ("speed",)))
        assert np.isfinite(float(row["return"])) and int(row["seed"]) >= 0 and int(row["updates"]) >= 1
        assert (row["commit"] in history) or row["reproducible"] == "false"
    assert len({tuple(v for k, v in row.items() if k != "return") for row in rows}) == len(rows) > 0


def test_every_table_of_trials_is_in_the_index():
    named = re.findall(r"`([\w-]+\.csv)` \|", (RESULTS / "README.md").read_text())
    assert {path.name for path in TRIALS} == set(named) - {"paper.csv", "datasets.csv"}
