"""The lessons: one arc with links back and forth, exercises with checks and hidden solutions."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ARC = sorted(NOTEBOOKS.glob("0?_*.ipynb"))  # the tour first
LESSONS = ARC[1:]
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(path, kind: str) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_there_are_lessons():
    assert [path.stem[:3] for path in ARC[:4]] == ["00_", "01_", "02_", "03_"]


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
def test_three_exercises_each_with_a_check_and_a_hidden_solution(path):
    asked = [source for source in cells(path, "code") if "answer = None" in source]
    assert len(asked) == 3 and all(
        re.search(r"interactive\.check_answer\(\s*answer", s) for s in asked
    )
    notebook = nbformat.read(path, as_version=4)
    solutions = [c for c in notebook.cells if "solution" in c.metadata.get("tags", [])]
    assert len(solutions) == 3
    assert all(cell.metadata.jupyter.source_hidden for cell in solutions)
