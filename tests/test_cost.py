"""What a notebook would cost: its runs are found without running them, and counted as they are."""

import json
import re
import shlex
from pathlib import Path

import papermill
import pytest

import s4s_core as s4s
from s4s_core.__main__ import main
from s4s_core.experiments import cost as counting
from s4s_core.experiments.cost import cost, planned, told
from s4s_core.params import read_yaml

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TABLES = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if "run_all(" in path.read_text()]
SMALL = {"n_train": 12, "n_valid": 5, "n_train_alt": 14, "n_valid_alt": 6, "epochs": 3}
SMALL |= {"rounds": 2, "phase_epochs": 2, "batch_size": 5, "batch_size_alt": 4, "teacher_nfe": 6}
SMALL |= {"fid_samples": 30, "learner": "first_order", "accept_if_better": True}


@pytest.fixture
def nothing_is_run(monkeypatch):
    def refuse(*given, **named):
        raise AssertionError("something is run")

    monkeypatch.setattr(s4s, "run_all", refuse)
    monkeypatch.setattr(s4s, "run", refuse)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_run")
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_runs_of_a_notebook_are_those_that_it_says_it_has_read(path):
    experiments, _ = planned(path, {})
    assert f"{len(experiments)} runs; features" in path.read_text()


def test_parameters_choose_the_runs():
    path = NOTEBOOKS / "tables.ipynb"
    experiments, others = planned(path, {"dataset": "cifar10", "seeds": [0]})
    assert others == 1  # the teacher itself
    assert {e.nfe for e in experiments} == {*range(3, 11)}
    assert {e.learn for e in experiments} == {"none", "coefficients", "alternating"}
    # Table 14: 42 lines of three solvers, S4S-Alt, and DPM-Solver-v3 on the six grids not learned.
    assert len(experiments) == (42 + 1 + 6) * 8
    total = cost(experiments)
    assert total["runs"] == len(experiments)
    assert total["images"] == (len(experiments) + 1) * 50_000


README = (NOTEBOOKS.parent / "README.md").read_text("utf-8")
SCALE = README.partition("### At the paper's own scale")[2].partition("\n## ")[0]
ROWS = [row.strip("| ").split(" | ") for row in SCALE.splitlines() if "| `papermill " in row]


@pytest.mark.usefixtures("nothing_is_run")
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * ("/tables." in row[1])) for row in ROWS],
    ids=lambda row: " ".join(shlex.split(row[1].strip("`"))[1::4]),
)
def test_a_row_of_the_readme_is_what_its_command_costs_with_one_seed(row, monkeypatch):
    monkeypatch.setattr("s4s_core.models.download.urlopen", None)  # no file is needed
    _, command, *told_costs = row
    _, path, _, *options = shlex.split(command.strip("`"))
    given = {
        name: read_yaml(value, name)
        for name, value in zip(options[1::3], options[2::3], strict=True)
    }
    if "seeds" in papermill.inspect_notebook(NOTEBOOKS.parent / path) and row[0] != "Fig. 2":
        given["seeds"] = [0]
    total = cost(planned(NOTEBOOKS.parent / path, given)[0])
    millions = [f"{total[name] / 1e6:.1f}" for name in ("forward", "backward", "images")]
    millions[0] = "≤ " * bool(total["bounded"]) + millions[0]
    assert told_costs == [str(total["runs"]), *millions]
    (disk,) = re.findall(r"Disk is at\s+most\s+(\d+)\s+GB, and\s+([\d.]+)\s+GB more", SCALE)
    for most, name in zip(disk, ("bytes", "passing"), strict=True):
        assert total[name] / 1e9 < 1.01 * float(most)


def test_the_readme_says_what_the_whole_scale_costs():
    assert len(ROWS) == 20 and not any("-" in row[2:] for row in ROWS)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_run")
def test_the_readme_says_what_three_sets_of_samples_cost():
    sentence = r"cost\s+([\d.]+) and ([\d.]+) million in place of ([\d.]+) and ([\d.]+)"
    (numbers,) = re.findall(sentence, SCALE)
    settings = {"cifar10": {"fid_blocks": 3}}
    given = {"dataset": "cifar10", "seeds": [0], "settings": settings}
    total = cost(planned(NOTEBOOKS / "tables.ipynb", given)[0])
    costs = [f"{total[name] / 1e6:.1f}" for name in ("forward", "images")]
    assert list(numbers) == [*costs, ROWS[0][3], ROWS[0][5]]


LEARNERS = ["coefficients", "times", "alternating", "jointly", "bns", "generalised"]


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0242, 0.0])
@pytest.mark.parametrize("learn", LEARNERS)
def test_what_learning_costs_is_what_the_network_sees(learn, gamma, tmp_path, monkeypatch):
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path))
    e = s4s.Experiment("mixture", nfe=4, learn=learn, settings=SMALL | {"gamma": gamma})
    result, expected = s4s.run(e), counting._learning(e)
    looks = result.evaluations - expected["forward"]
    assert 0 <= looks <= 3 * 32  # at the model itself, before learning
    assert abs(result.backward - expected["backward"]) <= 3 * 32


def test_looks_after_every_step_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path))
    e = s4s.Experiment("mixture", nfe=4, learn="times", settings=SMALL | {"patience": 100})
    looks = s4s.run(e).evaluations - counting._learning(e)["forward"]
    assert 0 <= looks <= 3 * 32


def test_what_several_runs_need_is_counted_once():
    one = s4s.Experiment("mixture", nfe=4, settings=SMALL)
    teacher = 2 * 30 * 6
    assert cost([one])["forward"] == 30 * 4 + teacher
    assert cost([one, one]) == cost([one])
    two = [one, s4s.Experiment("mixture", nfe=5, settings=SMALL)]
    assert cost(two)["forward"] == 30 * (4 + 5) + teacher
    sets = s4s.Experiment("mixture", nfe=4, settings=SMALL | {"fid_blocks": 3})
    assert cost([sets])["forward"] == 3 * 30 * 4 + (3 + 1) * 30 * 6
    assert cost([sets])["images"] == (3 + 1) * 30
    ld3 = s4s.sweep(SMALL, dataset="mixture", grid="ld3", nfe=4, learn=["none", "coefficients"])
    assert cost(ld3)["runs"] == 2 and cost(ld3)["learned"] == 2  # the grid, and the coefficients


def test_a_count_that_is_a_bound_says_so():
    newton = SMALL | {"learner": "gauss_newton"}
    runs = [
        s4s.Experiment("mixture", nfe=4, learn=learn, settings=settings)
        for settings in (newton, SMALL) for learn in ("none", "jointly", "alternating")
    ]  # fmt: skip
    (line,) = [line for line in told(cost(runs)) if "Gauss-Newton" in line]
    assert line.split()[0] == "1" and "upper bound" in line and len(line) < 100
    assert not any("Gauss-Newton" in line for line in told(cost(runs[3:])))


def notebook(tmp_path, *cells: str) -> Path:
    tags = [["parameters"], *[[]] * len(cells)]
    written = [
        {"cell_type": "code", "metadata": {"tags": tag}, "source": [source]}
        for tag, source in zip(tags, cells, strict=False)
    ]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": written}))
    return path


@pytest.mark.usefixtures("nothing_is_run")
def test_statements_that_run_something_are_left_out_and_what_needs_them(tmp_path):
    path = notebook(
        tmp_path,
        "n = 3",
        "import s4s_core as s4s\nfound = s4s.run(s4s.Experiment(nfe=n))\nprint(found.frechet)",
        "rows = s4s.run_all({'a': s4s.sweep(nfe=[n, 4])})\nraise OSError",
    )
    experiments, others = planned(path, {"n": 5})
    assert [e.nfe for e in experiments] == [5, 4] and others == 1


def test_what_loads_a_model_is_left_out_and_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(s4s, "load", lambda *_: pytest.fail("a model is loaded"))
    path = notebook(
        tmp_path,
        "import s4s_core as s4s",
        "setup = s4s.load('cifar10')\nprint(setup.shape)",
        "rows = s4s.run_all([s4s.Experiment('cifar10')])",
    )
    experiments, others = planned(path, {})
    assert [e.dataset for e in experiments] == ["cifar10"] and others == 0


@pytest.mark.parametrize(
    ("cells", "parameters", "sentence"),
    [
        (["n = 3", "print(n)"], {}, "a.ipynb has no run_all of experiments"),
        (["n = 3", "s4s.run_all(n)"], {}, "a.ipynb has no run_all of experiments"),
        (["n = 3", "s4s.run_all(m)"], {}, "a.ipynb fails before its first run_all: NameError"),
        (["n = 3", "n = 1 / 0"], {}, "fails before its first run_all: ZeroDivisionError"),
        (["n = 3"], {"m": 3}, "unknown parameter 'm'; choose one of: n"),
        (["n = %time"], {}, "a.ipynb is no notebook of plain Python"),
    ],
)
def test_slips_are_one_sentence(tmp_path, cells, parameters, sentence):
    with pytest.raises(s4s.UsageError, match=re.escape(sentence)):
        planned(notebook(tmp_path, *cells), parameters)


def test_the_command_prints_what_it_counts_and_about_how_long_it_takes(capsys):
    small = f"settings: {{mixture: {json.dumps({'sample_batch_size': 10})}}}"
    path = str(NOTEBOOKS / "train_solver.ipynb")
    main(["cost", path, "-p", "dataset", "mixture", "-y", "nfes: [3, 4]", "-y", small])
    printed = capsys.readouterr().out
    assert "mixture, where nothing is cached:" in printed
    assert re.search(r" 16 runs, for which 8 solvers are learned", printed)
    assert re.search(r"[\d.]+ hours, about, on cpu, in one process", printed)
    with pytest.raises(SystemExit, match="error: -y takes parameters by name"):
        main(["cost", path, "-y", "3"])
