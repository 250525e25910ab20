"""README and docs: links and files exist, options are known to the scripts they are given to, commands run."""

import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import dom2_mamujoco
from collect_datasets import collect
from common import task_name
from run import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / folder / "README.md" for folder in (".", "results", "pretrained/policies"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page):
    """(script, arguments) of every command line of a page that runs a script of this repository."""
    found = []
    for text in re.findall(r"^    (?:\$ )?(.*)$|`([^`\n]+)`", page.read_text(), re.M):
        line = (text[0] or text[1]).split("#")[0].strip()
        match = re.match(r"python ((?:baselines/|experiments/)?\w+\.py)\b(.*)", line)
        if match:
            found.append((match[1], tuple(shlex.split(match[2]))))
    return found


@cache
def help_of(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][\w-]*", done.stdout))


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_page
def test_files_exist(page):
    text = page.read_text()
    for name in re.findall(r"`((?:[\w.-]+/)*\w+\.(?:py|md|csv|toml|txt))`", text):
        places = [ROOT, page.parent, ROOT / "utils", ROOT / "baselines", ROOT / "experiments", ROOT / "docs"]
        assert any((place / name).exists() for place in [*places, ROOT / "results", ROOT / "results/trials"]), name


def test_commands_were_found():
    assert len(commands(ROOT / "README.md")) >= 5
    assert not [command for command in commands(ROOT / "README.md") if not (ROOT / command[0]).exists()]


@pytest.mark.slow
@every_page
def test_commands_name_scripts_and_options_that_exist(page):
    for script, arguments in commands(page):
        assert (ROOT / script).exists(), script
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        unknown = {word.partition("=")[0] for word in own if word.startswith("--")} - help_of(script)
        assert not unknown, f"{script}: {unknown}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


TRAINING = ("dom2_mpe.py", "dom2_mamujoco.py", *(str(f.relative_to(ROOT)) for f in (ROOT / "baselines").glob("ma*.py")))
TRAINING = (*TRAINING, "baselines/omar.py")
ELSEWHERE = {"--resume", "--eval-only", "--data-dir", "--prey", "--help", "--track"}  # need files of the reader's own
COMMANDS = sorted({c for page in PAGES for c in commands(page) if c[0] in TRAINING and not ELSEWHERE & {*c[1]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with small datasets in it, where the commands of README and docs run."""
    folder = tmp_path_factory.mktemp("reader")
    for script, arguments in COMMANDS:
        named = dict(pairwise(arguments))
        scenario, dataset = named.get("--scenario", "simple_tag"), named.get("--dataset", "random")
        if script == "dom2_mamujoco.py":
            args = parse(dom2_mamujoco.DOM2, "", list(arguments))
            scenario, dataset = task_name(args), args.dataset
        if not (folder / "datasets" / scenario / dataset).exists():
            collect(scenario, dataset, folder / "datasets", num_transitions=5_000)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join((command[0], *command[1])))
def test_commands_of_readme_and_docs_run(command, folder):
    script, arguments = command
    short = ["--updates", "3", "--eval-episodes", "2", "--eval-interval", "3", "--no-cuda"]
    words = [word for word in arguments if word != "--compile"]  # its compiler has a test of its own
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words, *short], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "standard" in done.stdout


def test_the_readme_has_training_commands():
    assert {"dom2_mpe.py", "dom2_mamujoco.py", "baselines/omar.py"} <= {script for script, _ in COMMANDS}
