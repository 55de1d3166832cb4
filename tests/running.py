"""Notebooks run cell by cell in this process, with parameters as papermill puts them in.

A kernel takes ten seconds of a processor to start and to import torch; most tests need none.
"""

from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@cache
def _shell() -> InteractiveShell:
    """IPython without history, and not in the place of this process's own __main__."""
    config = Config({"HistoryManager": {"enabled": False}})
    return InteractiveShell.instance(config=config, user_module=ModuleType("notebook"))


def run_notebook(name: str, tries: dict | None = None, **parameters) -> SimpleNamespace:
    """Run all cells in the working folder; raise what a cell raises.

    Returns `text`, all that was printed or shown as text or Markdown, and `cells`: (cell, text of
    what it printed) for each code cell. An unknown parameter is a KeyError, where papermill warns.
    `tries` maps the id of an exercise's cell to answers, as source; after its solution the cell is
    run again with each of them, and `tried` is (id, answer) -> what it printed.
    """
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    notebook = load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb"))
    (defaults,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for parameter in parameters:
        if f"\n{parameter} = " not in f"\n{defaults.source}":
            raise KeyError(f"{name} has no parameter {parameter}")
    notebook = parameterize_notebook(notebook, parameters)
    shell = _shell()
    shell.reset(new_session=False)
    shown, cells, tried, asked = [], [], {}, None
    try:
        for cell in notebook.cells:
            if cell.cell_type != "code":
                continue
            with capture_output() as captured:
                result = shell.run_cell(cell.source)
            result.raise_error()
            shown.append(captured.stdout)
            answers = captured.outputs + ([] if result.result is None else [result.result])
            for answer in answers:
                markdown = getattr(answer, "_repr_markdown_", lambda answer=answer: repr(answer))()
                shown.append(str(markdown))
            cells.append((cell, captured.stdout))
            if "answer = None" in cell.source:
                asked = cell
            if "solution" in cell.metadata.get("tags", []):
                for answer in (tries or {}).get(asked.id, []):
                    source = asked.source.replace("answer = None", f"answer = {answer}")
                    with capture_output() as captured:
                        shell.run_cell(source).raise_error()
                    tried[asked.id, answer] = captured.stdout
    finally:
        plt.close("all")
        shell.reset(new_session=False)
    return SimpleNamespace(text="\n".join(shown), cells=cells, tried=tried)
