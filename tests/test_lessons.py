"""The lessons: one arc with links back and forth, exercises with checks and hidden solutions."""

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

import s4s_core as s4s

# Answers to each exercise, as typed after its solution was run: right in several forms, and wrong
# ones, copies of what stands above among them, with what the check says of them. test_notebooks
# tries them while it runs the lessons.
RIGHT = {
    "00-24": ["0.4621", "[0.46]", "torch.tensor(0.5).tanh()"],
    "00-27": ["'at the mean of the data'", "['At the mean of the data']"],
    "00-30": ["from_examples", "from_examples.tolist()"],
    "01-18": ["1", "torch.tensor(1.0)", "[1.01]"],
    "01-21": ["'RectifiedFlow'", "' rectifiedflow'", "['Rectified flow']"],
    "01-24": ["landed", "landed.tolist()", "landed.float()"],
    "02-16": ["5", "5.0", "torch.tensor(5)"],
    "02-19": ["['uniform', 'logsnr']", "('logsnr', 'uniform')", "{'LogSNR', 'Uniform'}"],
    "02-22": ["even"],
    "03-21": ["27", "27.0"],
    "03-24": ["'uniform'", "'Uniform'", "('uniform',)"],
    "03-27": ["table.b", "table.b.tolist()", "tuple(map(tuple, table.b.float()))"],
    "04-23": ["ratio.index(max(ratio)) + 1"],
    "04-26": ["(2, 'Noise')", "[3, 'data']"],
    "04-29": ["repaired", "tuple(repaired)", "torch.tensor(repaired)"],
    "05-18": ["max(free)", "torch.tensor(max(free))"],
    "05-21": ["0.1"],  # seconds each, as 06-24
    "05-24": ["a", "a.tolist()"],
    "06-21": ["double", "tuple(double)", "torch.tensor(double)", "[0.6931, 0, 0, 0, 0, 0]"],
    "06-24": ["{'first_phase': 'xi'}"],
    "06-27": ["last"],
}
WRONG = {
    "00-24": [("0.5", "0.5 is too large, by"), ("-1", "-1 is too small, by 1.46")],
    "00-27": [("'on the clusters'", "0 of 1 right"), ("0", "this int is not what")],
    "00-30": [("x", "wanted below 0.02"), ("D(x, t) + 1e-9", "D itself"), ("x.T", "not what")],
    "01-18": [("0.5", "0.5 is too small, by 0.5"), ("'one'", "this str is not what")],
    "01-21": [("'EDM'", "0 of 1 right"), ("3", "this int is not what")],
    "01-24": [
        ("x[1]", "stands above"),
        ("x[0] + 1", "0 of"),
        ("x", "96 given, 16 wanted"),
        ("x[1].T", "its shape is (2, 8)"),
    ],
    "02-16": [("4", "4 is too small, by 1"), ("None, 5", "this tuple is not what")],
    "02-19": [("('uniform', 'edm')", "1 of 2 right, 1 wrong"), ("'logsnr'", "1 of 2 right (")],
    "02-22": [
        ("grids['dmn']", "stands above"),
        ("s4s.time_edm(schedule, nfe, 3.0)", "wanted below 0.146"),
        ("s4s.dmn(schedule, 6)", "6 calls instead of 5"),
        ("'dmn'", "this str is not what"),
    ],
    "03-21": [
        ("30", "30 is too large, by 3"),
        ("float('nan')", "finite"),
        ("[27, 28]", "2 given, 1 wanted"),
    ],
    "03-24": [("'edm'", "0 of 1 right"), ("{'edm', 'uniform'}", "1 of 1 right, 1 wrong")],
    "03-27": [("s4s.ipndm(grid, 2).b", "stands above"), ("3 * table.b", "of 10 numbers are right")],
    "04-23": [("9", "9 is too large, by")],
    "04-26": [
        ("(3, 'noise')", "0.1626, wanted below 0.1269"),
        ("(2, 'velocity')", "choose one of"),
        ("2", "this int is not what"),
        ("(2, 'data', 1)", "this tuple is not what"),
    ],
    "04-29": [
        ("[1, 0, 0, 0]", "0 of 4"),
        ("[0.07]", "1 given, 4 wanted"),
        ("'0.07'", "this str is not what"),
    ],
    "05-18": [("1", "1 is too large, by")],
    "05-21": [("0", "wanted below"), ("1e-6", "wanted below")],
    "05-24": [("x", "wanted below 1e-06"), ("a[:3]", "this Tensor is not what")],
    "06-21": [("6 * [0.0]", "1, wanted below 0.04"), ("[0.6931, 0]", "not what")],
    "06-24": [("{}", "no lower"), ("{'speed': 1}", "speed"), ("[1]", "this list is not what")],
    "06-27": [("runs['jointly', 0][-1]", "wanted below 0.5"), ("3", "this int is not what")],
}

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ARC = sorted(NOTEBOOKS.glob("0?_*.ipynb"))  # lesson 0, the tour, lesson 1, ...
LESSONS = [path for path in ARC if path.stem != "00_tour"]
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(path, kind: str) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_there_are_lessons():
    assert [path.stem[:3] for path in LESSONS[:4]] == ["00_", "01_", "02_", "03_"]


@pytest.mark.parametrize(("before", "after"), list(pairwise(ARC)), ids=lambda path: path.stem)
def test_neighbours_are_linked_in_both_directions(before, after):
    assert f"({after.name})" in cells(before, "markdown")[-1]
    assert f"({before.name})" in cells(after, "markdown")[0]


@every_lesson
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#:]+)\)", "\n".join(cells(path, "markdown"))):
        assert (NOTEBOOKS / link).exists(), link


@every_lesson
def test_claim_prediction_and_what_would_falsify(path):
    first, *_, last = text = cells(path, "markdown")
    assert "**Claim.**" in first and "falsify" in last
    assert any("efore you run" in cell or "redict" in cell for cell in text[1:])


@every_lesson
def test_three_exercises_each_with_a_check_a_hint_and_a_hidden_solution(path):
    notebook = nbformat.read(path, as_version=4)
    asked = {cell.id: cell.source for cell in notebook.cells if "answer = None" in cell.source}
    assert len(asked) == 3 and set(asked) == {cell for cell in RIGHT if cell[:2] == path.stem[:2]}
    for source in asked.values():
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        (check,) = [c for c in calls if ast.unparse(c.func) == "interactive.check_answer"]
        answer, _, hint = check.args
        assert ast.unparse(answer) == "answer" and hint
    solutions = [c for c in notebook.cells if "solution" in c.metadata.get("tags", [])]
    assert len(solutions) == 3
    assert all(cell.metadata.jupyter.source_hidden for cell in solutions)


@every_lesson
def test_the_source_that_a_lesson_shows_is_that_of_the_package(path):
    """A committed output does not follow the code by itself."""
    for cell in nbformat.read(path, as_version=4).cells:
        for call in re.findall(r"show_source\((.*)\)", cell.source):
            (output,) = cell.outputs
            sources = [inspect.getsource(eval(name, {"s4s": s4s})) for name in call.split(", ")]
            shown = "\n\n".join(source.rstrip() for source in sources)
            assert output.data["text/markdown"] == f"```python\n{shown}\n```", call


@pytest.mark.parametrize("path", ARC, ids=lambda path: path.stem)
def test_the_head_of_every_lesson_links_the_symbols(path):
    assert "(SYMBOLS.md)" in cells(path, "markdown")[0]


def test_the_names_beside_the_symbols_are_those_of_the_code():
    rows = re.findall(r"^\|.*", (NOTEBOOKS / "SYMBOLS.md").read_text("utf-8"), re.M)
    names = re.findall(r"`([\w.]+)`", "\n".join(rows))
    assert len(names) > 20
    for name in names:
        owner, _, part = name.partition(".")
        found = getattr(s4s, owner)
        assert not part or hasattr(found, part) or part in found.__dataclass_fields__, name
