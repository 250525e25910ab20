"""docs/tutorial.md: excerpts are in dom2_mpe.py, snippets run and print what the page shows, pictures can be made."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import dom2_mpe
from experiments import tutorial_figures

ROOT = Path(dom2_mpe.__file__).resolve().parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
FENCES = re.findall(r"^```([\w ]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PICTURES = ["tutorial-conservative.png", "tutorial-denoising.png", "tutorial-two-modes.png"]


def test_excerpts_are_verbatim():
    source = (ROOT / "dom2_mpe.py").read_text()
    excerpts = [text for kind, text in FENCES if kind == "python excerpt"]
    assert len(excerpts) > 5
    for text in excerpts:
        assert text in source, text


def test_snippets_run_and_print_what_follows_them(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the last snippet loads the newest of runs/
    options = dict(updates=1, batch_size=8, eval_episodes=1, shift=(), data_dir=str(data_dir), cuda=False)
    dom2_mpe.train(dom2_mpe.DOM2.args("simple_spread", "random", **options))
    namespace, printed = {}, None
    for kind, text in FENCES:
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, "docs/tutorial.md", "exec"), namespace)
            assert printed in (None, ""), f"the page does not show this output:\n{printed}"
            printed = out.getvalue()
        elif kind == "text":
            assert text == printed
            printed = None
    assert not printed


def test_named_functions_exist():
    questions = PAGE[PAGE.index("## Questions and answers") :]
    names = re.findall(r"`(\w+)`", "".join(row.split("|")[3] for row in re.findall(r"^\|.*", questions, re.M)))
    assert len(names) > 10 and all(hasattr(dom2_mpe, name) for name in names)


def test_pictures_have_a_help(capsys, monkeypatch):
    """It draws nothing."""
    monkeypatch.setattr(sys, "argv", ["tutorial_figures.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(tutorial_figures.__file__, run_name="__main__")
    assert end.value.code in (0, None) and "--folder" in capsys.readouterr().out


def test_pictures(tmp_path):
    tutorial_figures.main(tmp_path, updates=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES
    for name in PICTURES:
        committed = ROOT / "docs" / name
        assert f"]({name})" in PAGE and committed.stat().st_size < 60_000
        assert Image.open(committed).size == Image.open(tmp_path / name).size


@pytest.mark.slow
def test_pictures_show_what_the_page_says():
    _, learners = tutorial_figures.train_policies(1_200, num_steps=10)
    side = tutorial_figures.denoise(learners["policy"], 1_000)[-1, :, 0]
    assert (side < -0.3).float().mean() > 0.35 and (side > 0.3).float().mean() > 0.35
    with torch.no_grad():
        assert learners["bc"](torch.zeros(1, 1, 1))[0, 0, 0].abs() < 0.15
    best = {}
    for zeta in (0.0, 0.1):
        actions = torch.linspace(-1, 1, 201)[None, :, None].expand(5, -1, 1)
        best[zeta] = tutorial_figures.train_critic(zeta, 300)(0 * actions, actions).mean(1).argmax(1)
    assert (actions[0, best[0.0]] == 1).all()
    assert ((actions[0, best[0.1]] - tutorial_figures.BEST).abs() < 0.1).all()
