"""README and docs: links and files exist, options are known to the scripts they are given to, commands run."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.slow
def test_the_first_command_of_the_readme_runs(tmp_path):
    script, arguments = next(c for c in commands(ROOT / "README.md") if c[0] == "dom2_mpe.py")
    short = ["--updates", "20", "--eval-episodes", "10", "--no-cuda"]
    command = [sys.executable, str(ROOT / script), *arguments, *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "standard" in done.stdout
    assert (tmp_path / "datasets/simple_tag/random/seed_0_data/obs_0.npy").exists()
