"""What ./do class writes: students see no answer before they gave one, teachers see all of them."""

import re
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
CLASSROOM = runpy.run_path(str(ROOT / "notebooks" / "classroom.py"))
NAMES = [path.name for path in sorted((ROOT / "notebooks").glob("0?_*.ipynb"))]
every_lesson = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    shutil.copytree(ROOT / "figures", folder / "figures")  # beside which solutions/ lies
    CLASSROOM["write_class"](folder)
    return folder


def read(path: Path) -> tuple[list, str]:
    """All cells of a valid notebook, and its Markdown."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return notebook.cells, "\n\n".join(texts)


@every_lesson
def test_a_student_gets_every_cell_but_outputs_and_solutions(written, name):
    original, _ = read(ROOT / "notebooks" / name)
    given, _ = read(written / "student" / "notebooks" / name)
    kept = [cell for cell in original if "solution" not in cell.metadata.get("tags", [])]
    assert [cell.id for cell in given] == [cell.id for cell in kept]
    for cell, before in zip(given, kept, strict=True):
        if cell.cell_type == "code":
            now, once = {*cell.source.splitlines()}, {*before.source.splitlines()}
            assert all('"a picture"' in line for line in now - once)
            gone = ("alt ", "plot.show(", "assert ", "for ", "if ")
            assert all(line.strip().startswith(gone) for line in once - now)
            assert cell.outputs == [] and cell.execution_count is None


@every_lesson
def test_code_tells_a_student_neither_what_a_picture_shows_nor_which_result_is_above(written, name):
    original, _ = read(ROOT / "notebooks" / name)
    given, _ = read(written / "student" / "notebooks" / name)
    code = "\n".join(cell.source for cell in given if cell.cell_type == "code")
    compile(code, name, "exec")
    for cell in original:
        for output in cell.get("outputs", []):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                assert alt[:30] not in code
    assert not re.search(r"^ *assert .* (<|>|==) ", code, re.M)


def test_a_student_keeps_what_is_asserted_to_be_the_same(written):
    cells, _ = read(written / "student" / "notebooks" / "00_sampling.ipynb")
    assert any("assert torch.allclose(x, s4s.Solver(" in cell.source for cell in cells)


@every_lesson
def test_the_answer_to_a_prediction_is_folded_until_it_is_opened(written, name):
    _, before = read(ROOT / "notebooks" / name)
    _, given = read(written / "student" / "notebooks" / name)
    unfolded = given
    for opening in re.findall(r"<details><summary>.*?</summary>\n\n", given):
        unfolded = unfolded.replace(opening, "")
    unfolded = unfolded.replace("\n\n</details>", "")
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", before)
    assert re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", unfolded).split() == plain.split()
    shown = re.sub(r"<details>.*?</details>", "", given, flags=re.S)
    assert "## Summary" in shown and not re.search(r"## Summary\s+\S*(- |\|)", shown)
    asked = len(re.findall(r"\*\*Before you run\*\*:|\*Predict\*:", given))
    assert not re.search(r"^\*\*Claim", shown, re.M)
    assert given.count("<details>") == asked + 2 - UNANSWERED.get(name[:2], 0)


# Questions whose answer is the output itself: no text says it again.
UNANSWERED = {"01": 1}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("00_tour", "the last one here, a 2, becomes a 7"),
        ("02_time_grids", "With the uniform grid every sample ends at the mean"),
        ("04_global_error", "Accurate steps, and a worse end"),
        ("06_alternating", "worth more than the twelve coefficients"),
    ],
)
def test_no_answer_stands_under_its_question(written, name, answer):
    _, given = read(written / "student" / "notebooks" / f"{name}.ipynb")
    assert answer in given
    assert answer not in re.sub(r"<details>.*?</details>", "", given, flags=re.S)


@every_lesson
def test_a_teacher_gets_all_solutions_open_with_their_outputs(written, name):
    original, _ = read(ROOT / "notebooks" / name)
    kept, _ = read(written / "solutions" / name)
    for cell, before in zip(kept, original, strict=True):
        assert "jupyter" not in cell.metadata
        if cell.cell_type == "code":
            assert (cell.source, cell.outputs) == (before.source, before.outputs)


@pytest.mark.parametrize("folder", ["student/notebooks", "solutions"])
def test_links_lead_to_what_a_class_gets(written, folder):
    for name in NAMES:
        _, text = read(written / folder / name)
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (written / folder / link).exists(), link


def test_what_a_student_gets_is_complete(written):
    student = written / "student"
    files = [path for name in ("s4s_core", "params") for path in (ROOT / name).rglob("*.*")]
    for path in files:
        if "__pycache__" not in path.parts:
            assert (student / path.relative_to(ROOT)).exists(), path
    for name in ("do", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        assert (student / name).is_file(), name
    assert not list(written.rglob("__pycache__"))
    assert "./do lab" in (student / "README.md").read_text("utf-8")


def test_a_second_class_gets_nothing_of_the_first(written):
    stray = written / "student" / "notebooks" / "answers.ipynb"
    stray.write_text("{}")
    CLASSROOM["write_class"](written)
    assert not stray.exists()
