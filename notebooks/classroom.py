"""Write the course for a class: student/ without solutions and outputs, and solutions/ with them.

./do class

Where a student is asked for a prediction, the answer in the text is folded until it is opened, and
so is what the lesson claims. Code says neither: left out are what a picture shows, in its sentence
for those who do not see it, and what is asserted of results.
"""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
COURSE = sorted((ROOT / "notebooks").glob("0?_*.ipynb"))
KIT = ["do", "pyproject.toml", "requirements.txt", "LICENSE", "params", "s4s_core"]
KIT += ["explorable/index.html", "notebooks/SYMBOLS.md", "figures/pictures_samples.png"]
QUESTION = re.compile(r"\*\*Before you run|\*Predict\*:")
# What no longer belongs to the reading of a result: a heading, a question, an exercise, what leads
# over to the next cell or lesson.
NEXT = re.compile(
    r"^(?:#|\*\*Before you run|\*Predict\*:|\*\*\d|\*\*What would|\*\*Next|\[←|.*:\Z)", re.M
)
# What a lesson claims answers what it asks.
CLAIM = re.compile(r"^\*\*Claim.*?(?=\n\n|\Z)", re.M | re.S)
SHOWN = re.compile(r"^( *)alt = .*\n(?: *alt \+= .*\n)*", re.M)
SHOWN_AT_ONCE = re.compile(r"^( *plot\.show\(\w+, )\".*\"\)$", re.M)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)")


def folded(text: str, summary: str) -> str:
    """Return text in a fold that opens with a click; blank lines keep its Markdown alive."""
    return f"<details><summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n\n"


def for_students(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook with no outputs and no solutions, its answers to predictions folded."""
    notebook = deepcopy(notebook)
    notebook.cells = [c for c in notebook.cells if "solution" not in c.metadata.get("tags", [])]
    asked = False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = unspoiled(cell.source)
            continue
        answered = asked and fold_start(cell.source, "What happened? Open this after you ran it")
        asked = answered == cell.source and "## Exercises" not in cell.source
        cell.source = CLAIM.sub(claim, answered or cell.source)
        heading, summary, text = cell.source.partition("## Summary\n")
        if summary:
            text = fold_start(text.lstrip(), "Open this when you are through")
            cell.source = f"{heading}{summary}\n{text}"
        asked = asked or bool(QUESTION.search(cell.source))
    return notebook


def claim(found: re.Match) -> str:
    """Return the fold of what a lesson claims."""
    return folded(found[0], "The claim: open this when you have made your predictions").rstrip()


def unspoiled(source: str) -> str:
    """Return code without what it asserts of results, and without what its pictures show."""
    source = SHOWN.sub(r'\1alt = "a picture"\n', source)
    source = SHOWN_AT_ONCE.sub(r'\1"a picture")', source)
    lines = source.splitlines()
    for told in reversed([*verdicts(ast.parse(source).body)]):
        del lines[told.lineno - 1 : told.end_lineno]
    return "\n".join(lines).strip()


def verdicts(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that assert one result to be above another, and do nothing else."""
    for statement in statements:
        if isinstance(statement, ast.For | ast.If):
            found = [*verdicts(statement.body)]
            yield from [statement] if found == statement.body else found
        elif isinstance(statement, ast.Assert):
            if any(isinstance(part, ast.Compare) for part in ast.walk(statement)):
                yield statement


def fold_start(source: str, summary: str) -> str:
    """Return Markdown whose first part, up to the next heading or question, is folded."""
    end = found.start() if (found := NEXT.search(source)) else len(source)
    return (folded(source[:end], summary) if source[:end].strip() else "") + source[end:]


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook as it is, with its solutions open."""
    notebook = deepcopy(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("jupyter", None)
    return notebook


def write(folder: Path, version: Callable[[NotebookNode], NotebookNode]) -> None:
    """Write a version of all lessons; links that lead out of what a class gets become plain."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in COURSE}

    def link(found: re.Match) -> str:
        kept = found[2] in names or (folder / found[2]).exists()
        return found[0] if kept else found[1]

    for path in COURSE:
        notebook = version(nbformat.read(path, as_version=4))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = LINK.sub(link, cell.source)
        nbformat.write(notebook, folder / path.name)


def write_class(root: Path) -> None:
    """Write root/student, which is complete in itself, and root/solutions, both anew."""
    student, solutions = root / "student", root / "solutions"
    for folder in (student, solutions):
        shutil.rmtree(folder, ignore_errors=True)
    for name in KIT:
        (student / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, student / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, student / name)
    shutil.copy(ROOT / "notebooks" / "STUDENTS.md", student / "README.md")
    write(student / "notebooks", for_students)
    write(solutions, with_solutions)


if __name__ == "__main__":
    write_class(ROOT)
    print("student/ is what a class gets, solutions/ what its teacher keeps.")
