"""What the rows of `run_all` say, as tables: means over seeds, and who is better where.

`rows` is everywhere a pandas frame with a row for each run, or a list of dictionaries; runs that
agree in all columns asked about differ in the seed. Each function returns Markdown that a notebook
renders and a terminal prints.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import pandas as pd

Rows: TypeAlias = pd.DataFrame | Iterable[Mapping[str, Any]]


class Table(str):
    """Markdown text that a notebook renders and a terminal prints."""

    def _repr_markdown_(self) -> str:
        return str(self)


def _frame(rows: Rows) -> pd.DataFrame:
    return rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))


def _by(rows: Rows, keys: Sequence[str], value: str) -> pd.DataFrame:
    """Mean, min, max and number of `value` by `keys`, in order of first appearance."""
    groups = _frame(rows).groupby(list(keys), sort=False)[value]
    return groups.agg(["mean", "min", "max", "count"])


def _tuple(key: Any) -> tuple:
    """A group's key, which pandas gives bare where there is one column."""
    return key if isinstance(key, tuple) else (key,)


def _markdown(lines: list[list[str]]) -> Table:
    return Table("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def describe(rows: Rows) -> str:
    """Return how many runs there are, what they were judged by, and with which seeds."""
    frame = _frame(rows)
    features = ", ".join(frame["features"].unique())
    return f"{len(frame)} runs; features: {features}; seeds 0 to {frame['n_samples'].max() - 1}"


def pivot(
    rows: Rows,
    index: Sequence[str] = ("learn", "order"),
    column: str = "nfe",
    value: str = "frechet",
    digits: int = 2,
) -> Table:
    """Return the mean of `value` in a grid of `index` by `column`, half the range after ±.

    index  columns of `rows` that tell the lines apart; a cell without any run is a dash
    """
    found = _by(rows, [*index, column], value)
    columns = sorted(found.index.unique(column))
    text = [
        [*index, *(f"{column.upper()} {c}" for c in columns)],
        ["---"] * (len(index) + len(columns)),
    ]
    lines = found.index.droplevel(column).unique() if index else [()]
    for line in lines:
        line = _tuple(line)
        cells = []
        for c in columns:
            if (*line, c) not in found.index:
                cells.append("-")
                continue
            cell = found.loc[(*line, c)]
            spread = (cell["max"] - cell["min"]) / 2
            several = f" ± {spread:.{digits}f}" if cell["count"] > 1 else ""
            cells.append(f"{cell['mean']:.{digits}f}{several}")
        text.append([*map(str, line), *cells])
    return _markdown(text)


def compare(
    rows: Rows,
    by: str,
    within: Sequence[str] = ("method", "nfe"),
    value: str = "frechet",
    digits: int = 3,
) -> Table:
    """Return which setting of `by` is best in each group of `within`, and if the seeds agree.

    "clear" means that the worst seed of the best setting still beats the best seed of every other.
    """
    lines = [[*within, f"best {by}", "runner-up", f"{value}, best", "runner-up", "clear"]]
    lines.append(["---"] * len(lines[0]))
    for group, members in _frame(rows).groupby(list(within), sort=False):
        runs = _by(members, [by], value).sort_values("mean", kind="stable")
        if len(runs) < 2:
            continue
        clear = runs["max"].iloc[0] < runs["min"].iloc[1:].min()
        means = [f"{mean:.{digits}f}" for mean in runs["mean"].iloc[:2]]
        names = [*map(str, group), *map(str, runs.index[:2])]
        lines.append([*names, *means, "yes" if clear else "no"])
    return _markdown(lines)


def _pairs(
    rows: Rows, setting: Any, than: Any, by: str, within: Sequence[str], value: str
) -> pd.DataFrame:
    """Groups of `within` that have runs of both settings: their statistics, side by side."""
    found = _by(rows, [*within, by], value)
    a, b = (found.xs(s, level=by) if s in found.index.unique(by) else found[:0].droplevel(by)
            for s in (setting, than))  # fmt: skip
    return a.join(b, how="inner", suffixes=("_a", "_b"))


def cells_better(
    rows: Rows,
    setting: str,
    than: str,
    by: str = "learn",
    within: Sequence[str] = ("grid", "solver", "nfe"),
    value: str = "frechet",
) -> Table:
    """Return in how many cells of `within` the mean of `value` is smaller for one setting of `by`.

    Cells where it is not are named, with both means; "clearly" counts those in which the worst
    seed of the better setting beats the best seed of the other.
    """
    pairs = _pairs(rows, setting, than, by, within, value)
    worse = pairs[pairs["mean_a"] >= pairs["mean_b"]]
    clear = (pairs["max_a"] < pairs["min_b"]).sum()
    text = f"{value}: better in {len(pairs) - len(worse)} of {len(pairs)} cells, clearly in {clear}"
    lines = [
        f"- {', '.join(map(str, _tuple(cell)))}: {a:.3f} against {b:.3f}"
        for cell, a, b in zip(worse.index, worse["mean_a"], worse["mean_b"], strict=True)
    ]
    return Table("\n".join([text + (", not in" if len(worse) else ""), "", *lines]))


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


def agreement(
    rows: Rows,
    paper: Mapping[Any, Sequence[str]],
    by: str = "method",
    within: str = "nfe",
    value: str = "frechet",
    digits: int = 2,
) -> Table:
    """Return how many pairs of settings of `by` come in the paper's order, and which do not.

    paper  value of `within` -> the settings as the paper ranks them, best first
    "clearly" means that the worst seed of one still beats the best seed of the other.
    """
    found = _by(rows, [within, by], value)
    count, clear, contrary = 0, 0, []
    for at, order in paper.items():
        for first, second in combinations(order, 2):
            if (at, first) not in found.index or (at, second) not in found.index:
                continue
            a, b = found.loc[(at, first)], found.loc[(at, second)]
            count, clear = count + 1, clear + int(a["max"] < b["min"])
            if a["mean"] >= b["mean"]:
                means = f"{second} {b['mean']:.{digits}f} before {first} {a['mean']:.{digits}f}"
                clearly = ", clearly" if b["max"] < a["min"] else ""
                contrary.append(f"- {within.upper()} {at}: {means}{clearly}")
    text = f"{value}: {count - len(contrary)} of {count} pairs come in the paper's order"
    text += f", {clear} clearly" + ("; the others do not\n" if contrary else "")
    return Table("\n".join([text, *contrary]))


def calls_to_match(
    rows: Rows, method: str, nfe: int, value: str = "frechet", digits: int = 2
) -> Table:
    """Return the fewest calls with which each other method is as good as `method` with `nfe`.

    As Table 12: means over seeds; a method that is never as good is shown at its best; seconds are
    those of learning at that number of calls. Raises ValueError where there are no such runs to be
    matched.
    """
    mean = _frame(rows).groupby(["method", "nfe"], sort=False)[[value, "seconds"]].mean()
    if (method, nfe) not in mean.index:
        raise ValueError(f"there are no runs of {method} with {nfe} calls to be matched")
    target = mean.loc[(method, nfe), value]
    lines = [["method", "NFE", value, "matches", "seconds of learning"], ["---"] * 5]
    for name in dict.fromkeys([method, *mean.index.unique("method")]):
        own = mean.xs(name, level="method").sort_index()
        enough = own.index[own[value] <= target] if name != method else [nfe]
        at = enough[0] if len(enough) else own[value].idxmin()
        cell = [f"{own.loc[at, value]:.{digits}f}", "yes" if len(enough) else "no"]
        lines.append([name, str(at), *cell, f"{own.loc[at, 'seconds']:.0f}"])
    return _markdown(lines)
