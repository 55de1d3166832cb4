"""The README's Python, typed as it stands."""

import re
from pathlib import Path

import s4s_core as s4s

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_the_example_learns_a_solver_and_samples_with_it(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["x_0"].shape == (64, 1, 8, 8)
    assert names["epoch"].index == names["setup"].params.epochs
    assert names["epoch"].best == s4s.Solver.load("digits_nfe5.json")
    before = names["solver"].sample(names["setup"].denoiser, names["x_T"])
    exact = names["setup"].teacher.sample(names["setup"].denoiser, names["x_T"])
    assert (names["x_0"] - exact).square().mean() < 0.9 * (before - exact).square().mean()
