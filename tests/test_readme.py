"""The README: its Python, typed as it stands, its commands and its pictures."""

import re
import shlex
import sys
from pathlib import Path

import nbformat
import pandas
import papermill
import pytest

import s4s_core as s4s

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import runtimes  # noqa: E402

README = (ROOT / "README.md").read_text("utf-8")
ROWS = [line for line in README.splitlines() if line.startswith("|") and "](notebooks/" in line]
MAP = [row.strip("| ").split(" | ") for row in ROWS]
COMMANDS = sorted(set(re.findall(r"papermill notebooks/\w+\.ipynb[^\n`]*", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_a_notebook_and_its_parameters(command):
    _, notebook, out, *options = shlex.split(command)
    assert out.endswith(".ipynb")
    parameters = papermill.inspect_notebook(ROOT / notebook)
    flags, names, values = options[::3], options[1::3], options[2::3]
    assert set(flags) <= {"-p"} and len(names) == len(values)
    assert set(names) <= set(parameters)
    if "dataset" in names:
        assert values[names.index("dataset")] in s4s.datasets()


@pytest.mark.parametrize("row", MAP, ids=lambda row: row[1])
def test_a_row_of_the_map_runs_the_notebook_it_links(row):
    paper, link, command, runtime = row
    (notebook,) = re.findall(r"\]\((notebooks/\w+\.ipynb)\)", link)
    assert command.strip("`").startswith((f"papermill {notebook} ", "./do tour"))
    name = Path(notebook).stem
    measured = runtimes.measured()
    if name in measured:
        assert paper and runtime == runtimes.wording(measured[name])
    else:  # nobody may take a guess for a measurement
        assert paper and runtime.startswith("not measured")


@pytest.mark.parametrize("name", sorted(runtimes.measured()))
def test_a_notebook_says_the_runtime_that_was_measured(name):
    first = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells[0].source
    said = re.findall(r"`CPU ([^`]*)`", first)
    assert said in ([], [runtimes.in_words(float(runtimes.measured()[name]["seconds"]))])


def test_the_memory_of_many_samples_is_what_was_measured():
    row = pandas.read_csv(ROOT / "tests" / "benchmarks" / "memory.csv").iloc[-1]
    said = f"{row['samples']:,}".replace(",", " ") + " of 3x64x64"
    assert said in README and f"take {row['peak_MB'] / 1000:.1f} GB" in README


def test_the_table_of_runtimes_is_of_notebooks_that_are_there():
    assert runtimes.measured()
    for name, row in runtimes.measured().items():
        assert (ROOT / "notebooks" / f"{name}.ipynb").is_file() and row["cpu"]
        assert float(row["seconds"]) > 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(9.4, "10 seconds"), (51, "1 minute"), (90, "90 seconds"), (100, "90 seconds")]
    + [(3500, "1 hour"), (5400, "90 minutes"), (7300, "2 hours"), (150, "3 minutes")],
)
def test_runtimes_are_rounded_to_the_nearest_round_time(seconds, words):
    assert runtimes.in_words(seconds) == words


def test_a_second_run_and_what_ran_before_stand_in_the_wording():
    row = {"notebook": "compare_learned", "seconds": "1700", "again": "33"}
    assert runtimes.wording(row) == "30 minutes after `tables`, then 30 seconds"
    assert runtimes.wording(row | {"notebook": "tables", "again": ""}) == "30 minutes"


def test_pictures_come_from_figures_and_lie_beside_what_they_draw():
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert shown and all(path.startswith("figures/") and (ROOT / path).is_file() for path in shown)
    for figure in (ROOT / "figures").glob("*.svg"):
        assert figure.with_suffix(".csv").is_file(), f"{figure} lacks the rows that it draws"


@pytest.mark.slow
def test_the_example_learns_a_solver_and_samples_with_it(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["x_0"].shape == (64, 1, 8, 8)
    assert names["epoch"].best == s4s.Solver.load("digits_nfe5.json")
    before = names["solver"].sample(names["setup"].denoiser, names["x_T"])
    exact = names["setup"].teacher.sample(names["setup"].denoiser, names["x_T"])
    assert (names["x_0"] - exact).square().mean() < 0.25 * (before - exact).square().mean()


def committed_numbers() -> set[str]:
    """All decimal numbers of committed outputs, and the means and ranges over seeds of the rows of
    figures/*.csv, with 2, 3 and 4 decimals.
    """
    found = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                text = [output.get("text", ""), *(v for k, v in data.items() if "image" not in k)]
                found |= set(re.findall(r"\d+\.\d+", "".join(map(str, text))))
    metrics = ["frechet", "frechet_to_teacher", "thumbnails_to_teacher", "distance_to_teacher"]
    metrics += ["seconds", "evaluations", "backward"]
    for path in (ROOT / "figures").glob("*.csv"):
        rows = pandas.read_csv(path)
        values = [name for name in metrics if name in rows]
        blocks = {k for k in rows if k.endswith("_blocks")}
        keys = [k for k in rows if k not in {*metrics, *blocks, "seed", "n_samples", "features"}]
        for value in values:
            # Of a group whose seeds differ, and of each run.
            means = rows.groupby(keys, dropna=False)[value].agg(["mean", "min", "max"])
            for number in [*means.to_numpy().flatten(), *rows[value]]:
                found |= {f"{number:.{digits}f}" for digits in (2, 3, 4)}
    return found


def test_every_number_of_the_teachers_guide_stands_in_a_committed_output():
    wanted = set(re.findall(r"\d+\.\d+", (ROOT / "notebooks" / "TEACHING.md").read_text("utf-8")))
    assert len(wanted) > 20
    assert wanted - {"0.01"} <= committed_numbers()  # 0.01 is a setting


def test_every_number_of_the_results_stands_in_a_committed_output():
    results = README.partition("## What to expect")[2].partition("## Licence")[0]
    text = re.sub(r"\]\([^)]*\)", "", results)
    wanted = set(re.findall(r"\d+\.\d{2,}", text))
    assert len(wanted) > 30
    assert wanted <= committed_numbers()
