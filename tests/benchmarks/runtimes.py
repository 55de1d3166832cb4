"""Measure how long notebooks take at their defaults, and write it beside this file.

python tests/benchmarks/runtimes.py 00_tour 01_noise_schedules ...

It prints what the README's map and the first cell of a notebook have to say, which is tested.
Counted is the CPU time of the kernel and its workers, user and system, their start and imports
included, one thread each: wall time would tell what else the machine does, and how many cores it
has. The results folder is empty at first; a notebook that fills it is run a second time. A notebook
that has a row is left out, so that the same command goes on after an interruption; delete the row
to measure it again. The executed notebooks stay in `runs/runtimes`.
"""

import csv
import os
import platform
import resource
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".csv")
SCRATCH = ROOT / "runs" / "runtimes"
COLUMNS = ["notebook", "seconds", "again", "cpu"]
AFTER = {"compare_learned": "tables"}  # what fills the results folder before
# In seconds; the README and the notebooks name the one with the nearest logarithm.
ROUND = [5, 10, 15, 20, 30, 40, 60, 90]
ROUND += [60 * n for n in (2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 40, 50, 60, 90)]
ROUND += [3600 * n for n in (2, 3, 4, 5, 6, 8, 10, 15, 20)]
UNITS = [(3600, "hour"), (60, "minute"), (1, "second")]


def in_words(seconds: float) -> str:
    """Return the nearest round time, such as "90 seconds", "1 minute" or "2 hours"."""
    near = min(ROUND, key=lambda value: max(value / seconds, seconds / value))
    unit, name = next((u, n) for u, n in UNITS if near % u == 0)
    return f"{near // unit} {name}{'s' if near > unit else ''}"


def wording(row: dict[str, str]) -> str:
    """Return what the README's map says of a row of the table."""
    words = in_words(float(row["seconds"]))
    if before := AFTER.get(row["notebook"]):
        words += f" after `{before}`"
    return f"{words}, then {in_words(float(row['again']))}" if row["again"] else words


def measured() -> dict[str, dict[str, str]]:
    """Return the rows of the table, by notebook."""
    if not TABLE.is_file():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["notebook"]: row for row in csv.DictReader(file)}


def children_seconds() -> float:
    """Return the CPU time of all processes that this one has started, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(name: str, folder: Path) -> float:
    """Run a notebook in `folder`, keep it there, and return the CPU seconds of its kernel."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    began = children_seconds()
    runner = ExecutePreprocessor(timeout=None, kernel_name="python3")
    runner.preprocess(notebook, {"metadata": {"path": folder}})
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return children_seconds() - began


def measure(name: str) -> dict[str, str]:
    """Return the row of one notebook."""
    folder = SCRATCH / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results = folder / "results"
    if before := AFTER.get(name):
        if not (filled := SCRATCH / before / "results").is_dir():
            sys.exit(f"{name} is measured after {before}: delete its row, and name it before")
        shutil.copytree(filled, results)
    os.environ |= {"S4S_RESULTS": str(results), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    seconds = execute(name, folder)
    again = f"{execute(name, folder):.0f}" if results.is_dir() else ""
    return dict(zip(COLUMNS, [name, f"{seconds:.0f}", again, cpu()], strict=True))


def cpu() -> str:
    """Return what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(names: list[str]) -> None:
    for name in names:
        if name not in measured():
            row = measure(name)
            rows = measured() | {name: row}  # another process may have written in the meantime
            with TABLE.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows[key] for key in sorted(rows))
        row = measured()[name]
        print(f"{name}: {wording(row)} ({row['seconds']} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
