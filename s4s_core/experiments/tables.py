"""What the rows of `run_all` say, as tables: means over seeds, who is better where, and the paper.

`rows` is everywhere a pandas frame with a row for each run, or a list of dictionaries; runs that
agree in all columns asked about differ in the seed. Each function returns Markdown that a notebook
renders and a terminal prints.

A difference between two settings is taken on the same noises, and is "clear" where its 95 %
interval over blocks of noise and seeds of learning excludes zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import pandas as pd
import torch
from torch import Tensor

from ..errors import UsageError, choose, shown
from ..evaluate import interval
from ..params import PARAMS, datasets

Rows: TypeAlias = pd.DataFrame | Iterable[Mapping[str, Any]]
SHOWN = 30  # pairs that are named one by one


class Table(str):
    """Markdown text that a notebook renders and a terminal prints."""

    def _repr_markdown_(self) -> str:
        return str(self)


def _frame(rows: Rows) -> pd.DataFrame:
    return rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))


def _tuple(key: Any) -> tuple:
    """A group's key, which pandas gives bare where there is one column."""
    return key if isinstance(key, tuple) else (key,)


def _groups(rows: Rows, keys: Sequence[str]) -> dict[tuple, pd.DataFrame]:
    """The rows of each combination of `keys`, in order of first appearance."""
    groups = _frame(rows).groupby(list(keys), sort=False)
    return {_tuple(key): group for key, group in groups}


def _number(value: float, digits: int) -> str:
    """A number with some decimals, or in powers of ten where samples have exploded."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def _between(low: float, high: float, digits: int) -> str:
    return f"{_number(low, digits)} to {_number(high, digits)}"


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _markdown(lines: list[list[str]]) -> Table:
    return Table("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def describe(rows: Rows) -> str:
    """Return how many runs there are, what they were judged by, and with which seeds."""
    frame = _frame(rows)
    features = ", ".join(frame["features"].unique())
    n_sets = int(frame["n_sets"].max()) if "n_sets" in frame else 1
    sizes = sorted(frame["n_samples"].unique())
    ends = " or ".join(str(n_sets * n - 1) for n in sizes)
    text = f"{len(frame)} runs; features: {features}; seeds 0 to {ends}"
    return text + (f", in {n_sets} sets of {sizes[-1]}" if n_sets > 1 else "")


def pivot(
    rows: Rows,
    index: Sequence[str] = ("learn", "order"),
    column: str = "nfe",
    value: str = "frechet",
    digits: int = 2,
) -> Table:
    """Return the mean of `value` in a grid of `index` by `column`, half the range after ±.

    index  columns of `rows` that tell the lines apart; a cell without any run is a dash

    Where each run was judged on several sets of samples, the 95 % interval of the mean over sets
    and seeds of learning stands after it in place of the range.
    """
    found = _groups(rows, [*index, column])
    columns = sorted({c for *_, c in found})
    text = [
        [*index, *(f"{column.upper()} {c}" for c in columns)],
        ["---"] * (len(index) + len(columns)),
    ]
    for line in dict.fromkeys(tuple(line) for *line, _ in found):
        cells = [
            _cell(found[*line, c], value, digits) if (*line, c) in found else "-" for c in columns
        ]
        text.append([*map(str, line), *cells])
    return _markdown(text)


def _cell(runs: pd.DataFrame, value: str, digits: int) -> str:
    """The mean of `value` over runs, and its interval or half its range."""
    values = runs[value]
    text = _number(values.mean(), digits)
    if f"{value}_blocks" in runs and "n_sets" in runs and runs["n_sets"].notna().all():
        low, high = interval(_values(runs, value))
        return f"{text} ({_between(low, high, digits)})"
    if values.count() < 2 or values.mean() == float("inf"):
        return text  # a cost that was never enough is inf, and has no range
    return f"{text} ± {_number((values.max() - values.min()) / 2, digits)}"


def compare(
    rows: Rows,
    by: str,
    within: Sequence[str] = ("method", "nfe"),
    value: str = "frechet",
    digits: int = 3,
) -> Table:
    """Return which setting of `by` is best in each group of `within`, and by how much.

    The difference is the interval of best minus runner-up; "clear" where the best is clearly less
    than every other setting.
    """
    lines = [[*within, f"best {by}", "runner-up", f"{value}, best", "runner-up"]]
    lines[0] += ["difference", "clear"]
    lines.append(["---"] * len(lines[0]))
    for group, members in _groups(rows, within).items():
        found = _groups(members, [by])
        names = sorted(found, key=lambda name: found[name][value].mean())
        if len(names) < 2:
            continue
        best, *others = (found[name] for name in names)
        clear = all(is_clearly_less(best, other, value) for other in others)
        numbers = [_number(runs[value].mean(), digits) for runs in (best, others[0])]
        low, high = difference(best, others[0], value)
        numbers.append(_between(low, high, digits))
        settings = [str(name) for (name,) in names[:2]]
        lines.append([*map(str, group), *settings, *numbers, _yes(clear)])
    return _markdown(lines)


def ranking(
    rows: Rows,
    values: Mapping[str, int],
    by: str = "method",
    within: Sequence[str] = ("nfe",),
) -> Table:
    """Return every setting of `by` in each group of `within`, the best first.

    values  columns of `rows`, with the decimals to show, the first of which ranks: smaller is
            better; each is a mean over the seeds

    The last column is the interval of the difference to the first of the group, "clear" where it is
    clearly behind.
    """
    lines = [[*within, by, *values, "behind the first by", "clear"]]
    lines.append(["---"] * len(lines[0]))
    first, digits = next(iter(values.items()))
    for group, members in _groups(rows, within).items():
        found = sorted(_groups(members, [by]).items(), key=lambda item: item[1][first].mean())
        for place, ((name,), runs) in enumerate(found):
            cells = [_number(runs[value].mean(), n) for value, n in values.items()]
            gap = ["-", "-"]
            if place:
                low, high = difference(runs, found[0][1], first)
                gap = [_between(low, high, digits), _yes(low > 0)]
            lines.append([*map(str, group), str(name), *cells, *gap])
    return _markdown(lines)


def difference(a: Rows, b: Rows, value: str = "frechet") -> tuple[float, float]:
    """Return the 95 % interval of the mean of `value` over the runs a minus that over the runs b.

    a, b  runs that differ in the seed of learning, judged on the same noises; a side without seeds,
          such as a published solver, is one run and stands beside each of the other side's

    The blocks of noise are in the column `value`_blocks; without it all noise is one block.
    """
    first, second = (_values(_frame(rows), value) for rows in (a, b))
    seeds = min(len(first), len(second)) if min(len(first), len(second)) > 1 else None
    return interval(first[:seeds] - second[:seeds])


def is_clearly_less(a: Rows, b: Rows, value: str = "frechet") -> bool:
    """Return whether the whole interval of the `difference` lies below zero."""
    return difference(a, b, value)[1] < 0


def _values(runs: pd.DataFrame, value: str) -> Tensor:
    """(S, B): `value` of each seed of learning on each block of noise."""
    runs = runs.sort_values("seed", kind="stable") if "seed" in runs else runs
    blocks = f"{value}_blocks"
    values = runs[blocks] if blocks in runs else [[v] for v in runs[value]]
    return torch.tensor(list(values), dtype=torch.float64)


def cells_better(
    rows: Rows,
    setting: str,
    than: str,
    by: str = "learn",
    within: Sequence[str] = ("grid", "solver", "nfe"),
    value: str = "frechet",
) -> Table:
    """Return in how many cells of `within` the mean of `value` is smaller for one setting of `by`.

    Cells where it is not are named, with both means; "clearly" counts the cells where the
    difference is clear.
    """
    found = _groups(rows, [*within, by])
    cells = {
        tuple(cell): (runs, found[*cell, than])
        for (*cell, name), runs in found.items()
        if name == setting and (*cell, than) in found
    }
    clear, lines = 0, []
    for cell, (a, b) in cells.items():
        clear += is_clearly_less(a, b, value)
        if (mean := a[value].mean()) >= (other := b[value].mean()):
            clearly = ", clearly" if is_clearly_less(b, a, value) else ""
            name = ", ".join(map(str, cell))
            means = f"{_number(mean, 3)} against {_number(other, 3)}"
            lines.append(f"- {name}: {means}{clearly}")
    text = f"{value}: better in {len(cells) - len(lines)} of {len(cells)} cells, clearly in {clear}"
    return Table("\n".join([text + (", not in" if lines else ""), "", *lines]))


def best(
    rows: Rows,
    of: Sequence[str],
    within: Sequence[str] = ("method", "nfe"),
    value: str = "frechet",
) -> pd.DataFrame:
    """Return the rows of one setting of `of` in each group of `within`: that of the smallest mean.

    of  columns such as ("grid", "solver"); rows that agree in them differ in the seed
    """
    chosen = []
    for _, group in _frame(rows).groupby(list(within), sort=False):
        means = group.groupby(list(of), sort=False)[value].transform("mean")
        first = group[means == means.min()].iloc[0][list(of)]
        chosen.append(group[(group[list(of)] == first).all(axis=1)])
    return pd.concat(chosen)


def paper(*numbers: int, dataset: str = "") -> pd.DataFrame:
    """Return the paper's own numbers, which are FIDs, as rows like those of `run_all`.

    numbers  of its tables: 2 to 6 and 8 to 18, which stand in params/paper.csv
    dataset  keep its rows alone, or where these tables have none of it, as of a model of ours,
             those of the first dataset that they have

    Solvers, grids and methods have the names that the notebooks give them, and S4S-Alt the grid and
    the solver that it starts from. The column "note" says why a cell cannot be right. A column that
    these tables leave empty is left out. Raises UsageError for what is no such table or dataset.
    """
    printed = pd.read_csv(PARAMS / "paper.csv", dtype={"order": "Int64"})
    tables = {number: rows for (number,), rows in _groups(printed, ["table"]).items()}
    if not numbers or set(numbers) - {*tables}:
        raise UsageError(
            f"the paper's tables with such numbers are {', '.join(map(str, tables))}, not "
            f"{shown(numbers)}"
        )
    found = pd.concat([tables[number] for number in numbers]).fillna({"note": ""})
    if dataset:
        own = found["dataset"] == choose("dataset", dataset, datasets())
        found = found[own if own.any() else found["dataset"] == found["dataset"].iloc[0]]
    return found.dropna(axis="columns", how="all").reset_index(drop=True)


def beside(
    rows: Rows, paper: pd.DataFrame, index: Sequence[str] = ("method",), digits: int = 2
) -> Table:
    """Return a `pivot` in which the paper's numbers follow ours line by line, and notes on them.

    rows, paper  ours, which are shown by their dataset, and those of `paper`
    index        columns that both have
    """
    ours, theirs = _frame(rows), paper.assign(dataset=paper["dataset"] + ", paper")
    both = pd.concat([ours, theirs])
    at = both.groupby(list(index), sort=False).ngroup()
    both = both.iloc[at.argsort(kind="stable")]
    text = pivot(both, (*index, "dataset"), digits=digits)
    noted = theirs.assign(note=theirs["note"].str.split("; ")).explode("note")
    lines = []
    for (note,), cells in _groups(noted[noted["note"] != ""], ["note"]).items():
        calls = cells.groupby(list(index), sort=False)["nfe"].unique()
        at = [
            f"{', '.join(map(str, _tuple(line)))}, NFE {', '.join(map(str, n))}"
            for line, n in calls.items()
        ]
        lines.append(f"- {'; '.join(at) if len(cells) < len(theirs) else 'all'}: {note}")
    heading = ["", "Notes on the paper's numbers:", ""] if lines else []
    return Table("\n".join([text, *heading, *lines]))


def agreement(
    rows: Rows,
    paper: pd.DataFrame,
    by: str | Sequence[str] = "method",
    within: str | Sequence[str] = "nfe",
    value: str = "frechet",
    digits: int = 2,
) -> Table:
    """Return how many pairs of settings of `by` come in the paper's order, and which do not.

    paper  the rows of `paper`, counted one dataset of it after the other
    "clearly" means that the interval of their difference excludes zero. Of the pairs in another
    order SHOWN are named.
    """
    by, within = ([names] if isinstance(names, str) else [*names] for names in (by, within))
    found = _groups(rows, [*within, *by])
    texts = []
    for (dataset,), theirs in _groups(paper, ["dataset"]).items():
        count, clear, contrary = 0, 0, []
        for at, cells in _groups(theirs, within).items():
            means = cells.groupby(by, sort=False)["frechet"].mean()
            order = [_tuple(name) for name in means.sort_values(kind="stable").index]
            where = ", ".join(
                f"NFE {v}" if n == "nfe" else str(v) for n, v in zip(within, at, strict=True)
            )
            for first, second in combinations(order, 2):
                if (*at, *first) not in found or (*at, *second) not in found:
                    continue
                a, b = found[*at, *first], found[*at, *second]
                count, clear = count + 1, clear + int(is_clearly_less(a, b, value))
                if (mean := a[value].mean()) >= (other := b[value].mean()):
                    before, after = (", ".join(map(str, name)) for name in (second, first))
                    clearly = ", clearly" if is_clearly_less(b, a, value) else ""
                    pair = f"{before} {_number(other, digits)} before {after}"
                    contrary.append(f"- {where}: {pair} {_number(mean, digits)}{clearly}")
        of = f" of {dataset}" if paper["dataset"].nunique() > 1 else ""
        text = f"{value}: {count - len(contrary)} of {count} pairs come in the paper's order{of}"
        text += f", {clear} clearly" + ("; the others do not\n" if contrary else "")
        more = [f"- and {len(contrary) - SHOWN} more"] if len(contrary) > SHOWN else []
        texts.append("\n".join([text, *contrary[:SHOWN], *more]))
    return Table("\n\n".join(texts))


def calls_to_match(
    rows: Rows, method: str, nfe: int, value: str = "frechet", digits: int = 2
) -> Table:
    """Return the fewest calls with which each other method is as good as `method` with `nfe`.

    As Table 12: means over seeds; a method that is never as good is shown at its best; seconds are
    those of learning at that number of calls. Raises UsageError where there are no such runs to be
    matched.
    """
    mean = _frame(rows).groupby(["method", "nfe"], sort=False)[[value, "seconds"]].mean()
    if (method, nfe) not in mean.index:
        there = ", ".join(f"{name} with {n}" for name, n in mean.index)
        raise UsageError(
            f"there are no runs of {method} with {nfe} calls to be matched, only {there:.500}"
        )
    target = mean.loc[(method, nfe), value]
    lines = [["method", "NFE", value, "matches", "seconds of learning"], ["---"] * 5]
    for name in dict.fromkeys([method, *mean.index.unique("method")]):
        own = mean.xs(name, level="method").sort_index()
        enough = own.index[own[value] <= target] if name != method else [nfe]
        at = enough[0] if len(enough) else own[value].idxmin()
        cell = [f"{own.loc[at, value]:.{digits}f}", _yes(len(enough) > 0)]
        lines.append([name, str(at), *cell, f"{own.loc[at, 'seconds']:.0f}"])
    return _markdown(lines)
