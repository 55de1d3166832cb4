"""The pictures that the notebooks share; each function draws on `ax`, or a new one, and returns it.

Colours are those of Okabe and Ito, told apart by colour-blind readers; markers and line styles
repeat what the colour says, so that a picture also reads in grey. The same thing looks the same in
all pictures: `LOOKS` says how.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ..grid import TimeGrid
    from ..learn import Epoch
    from ..solver import Coefficients
    from .tables import Rows

    Path2D = tuple[TimeGrid, Any]  # a grid, and x (N+1, B, 2) at its times

CALLS = "network calls (NFE)"
INK, PALE, GHOST = "#333333", "#d9d9d9", "#a6a6a6"
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY = "#E69F00", "#56B4E9"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#000000")
CLIP = 3.0  # coefficients beyond have the darkest colours: those of iPNDM are below
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
# What the package calls a thing, what a reader sees, and its colour, marker and line. What is
# learned has the strong colours; what is published is grey, with a tint for each solver and grid.
_LOOKS = (
    ("teacher", "teacher", "#000000", "", ":"),
    ("exact", "exact", "#8c8c8c", "x", "-"),
    ("none", "published", "#7f7f7f", "o", "--"),
    ("baseline", "baseline", "#7f7f7f", "o", "--"),
    ("coefficients", "S4S", BLUE, "s", "-"),
    ("learned", "learned", BLUE, "s", "-"),
    ("iPNDM-S4S", "iPNDM-S4S", BLUE, "s", "-"),
    ("locally optimal", "locally optimal", SKY, "^", "-."),
    ("times", "LD3", GREEN, "^", "-."),
    ("ld3", "LD3", GREEN, "^", "-."),
    ("alternating", "S4S-Alt", VERMILION, "D", "-"),
    ("joint", "joint", PURPLE, "v", "-"),
    ("jointly", "jointly", PURPLE, "v", "-"),
    ("joint, all", "joint, all", "#9c4f7d", "v", "--"),
    ("full", "full", "#6b2f54", "P", "-"),
    ("newton", "Gauss-Newton", ORANGE, "P", "-"),
    ("Gauss-Newton, full", "Gauss-Newton, full", "#a87400", "X", "--"),
    ("bns", "BNS", "#8fa9bd", "<", "--"),
    ("generalised", "generalised", "#bfa58a", ">", "--"),
    ("dpm_solver_v3", "DPM-Solver-v3", "#a5b58a", "h", "--"),
    ("ddim", "DDIM", "#a6a6a6", "o", "-"),
    ("ipndm", "iPNDM", "#4d4d4d", "s", "--"),
    ("dpm_solver", "DPM-Solver", "#b09668", "<", ":"),
    ("dpm_solver_pp", "DPM-Solver++", "#8a6d3b", "^", "-."),
    ("exponential_adams", "exponential Adams", "#9d8aa6", ">", ":"),
    ("deis", "DEIS", "#6f7d3e", "v", "--"),
    ("deis_rho", "DEIS (ρ)", "#8d9a5e", "v", "-."),
    ("deis_t", "DEIS (t)", "#aab582", "v", ":"),
    ("unipc", "UniPC", "#5f8296", "D", ":"),
    ("gaussian", "random numbers", "#c9a9a9", "X", ":"),
    ("uniform", "uniform", "#c08a3e", "o", "-"),
    ("quadratic", "quadratic", "#b0647a", "^", "-."),
    ("edm", "EDM", "#7b6fa0", "D", ":"),
    ("edm_t", "EDM in t", "#a79fc2", "D", "-."),
    ("logsnr", "logSNR", "#3f8f8c", "s", "--"),
    ("ays_sd15", "AYS (SD 1.5)", "#8d8d5a", "<", "--"),
    ("ays_sdxl", "AYS (SDXL)", "#a9a97a", "<", ":"),
    ("gits_sd15", "GITS (SD 1.5)", "#cba9b0", ">", ":"),
    ("dmn", "DMN", "#8a6d3b", "v", "-."),
    ("gits", "GITS", "#b5838d", ">", "--"),
    ("train_loss", "training loss", INK, "", "-"),
    ("valid_loss", "validation loss", SKY, "", "--"),
    ("start", "start", "#7f7f7f", "", "-"),
    ("phi", "φ", BLUE, "", "-"),
    ("xi", "Ξ", GREEN, "", "-"),
    ("phi+xi", "φ+Ξ", PURPLE, "", "-"),
)
LOOKS = {name: look for look in _LOOKS for name in look[:2]}
STYLE: Any = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "legend.frameon": False,
}


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """`ax`, or new axes of `size` inches, without the frame on the side where nothing is read."""
    if ax is None:
        _, ax = plt.subplots(figsize=size)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def display_name(name: str) -> str:
    """Return what a reader sees: "iPNDM, S4S" for "ipndm, S4S"; other names stay as they are."""
    if name in LOOKS:
        return LOOKS[name][1]
    return ", ".join(LOOKS.get(part, ("", part))[1] for part in name.split(", "))


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return for each name the color, marker and ls that matplotlib draws it with.

    They are those of `LOOKS` for the name, or for a part of it: the last after a comma that is
    there, or that has its first word there. A second name of one look keeps the colour alone.
    Names that are not there take what the others leave of the usual colours, markers and lines.
    """
    names = list(dict.fromkeys(names))
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        parts = [name, *reversed(name.split(", "))]
        known = [
            LOOKS[key]
            for part in parts
            for key in (part, re.split("[ (]", part)[0])
            if key in LOOKS
        ]
        if known:
            found[name] = known[0][2:]
    taken: set[tuple[str, ...]] = set()
    colors = cycle([c for c in COLORS if c not in {look[0] for look in found.values()}] or COLORS)
    markers, lines = cycle(MARKERS), cycle(LINES)
    for name in names:
        look = found.get(name) or (next(colors), next(markers), next(lines))
        if look in taken:
            look = (look[0], next(markers), next(lines))
        taken.add(look)
        found[name] = look
    return {n: dict(zip(("color", "marker", "ls"), found[n], strict=True)) for n in names}


def _write_beside(ax: Axes, points: Iterable[tuple[str, Any]]) -> None:
    """Write a text beside each point (2,), and those of points that nearly meet one after another.

    To be called when the axes have their limits.
    """
    span = np.ptp([ax.get_xlim(), ax.get_ylim()], axis=1)
    written: list[tuple[Any, list[str]]] = []
    for text, place in points:
        near = (t for at, t in written if (np.abs(np.subtract(place, at)) < 0.035 * span).all())
        if (texts := next(near, None)) is not None:
            texts.append(text)
        else:
            written.append((place, [text]))
    for at, texts in written:
        text = ", ".join(texts)
        ax.annotate(text, at, (5, 4), textcoords="offset points", fontsize=9, color=INK)


def log_scale(ax: Axes, axis: str) -> None:
    """Make an axis "x" or "y" logarithmic; plain decimals where it spans less than two decades."""
    ax.set(**{f"{axis}scale": "log"})
    low, high = sorted(getattr(ax, f"get_{axis}lim")())
    if high < 100 * low:
        ticker, ticks = mpl.ticker, getattr(ax, f"{axis}axis")
        subs = (1, 2, 5) if high > 10 * low else (1, 2, 3, 5)
        few = high < 4 * low
        ticks.set_major_locator(ticker.MaxNLocator(5) if few else ticker.LogLocator(subs=subs))
        ticks.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ticks.set_minor_locator(ticker.NullLocator())


def _numpy(x: Any) -> np.ndarray:
    """A tensor on any device, with or without gradient, or anything that numpy takes."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=float)


def _records(rows: "Rows") -> list[dict[str, Any]]:
    """The rows of a frame, or any other rows, as dictionaries."""
    found: Any = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    return [dict(row) for row in found]


@mpl.rc_context(STYLE)
def plot_grid(grids: "Mapping[str, TimeGrid]", ax: Axes | None = None, x: str = "lam") -> Axes:
    """Draw where the steps fall: one row for each named grid, noise on the left, data on the right.

    grids  name -> TimeGrid, or any object whose `x` is a tensor (N+1,)
    x      "lam", or "s" on a logarithmic axis
    Circles below a row are the times passed to the network (`t_model`), where they differ from
    those of the steps.
    """
    ax = _axes(ax, (6.5, 0.8 + 0.4 * len(grids)))
    colors = [look["color"] for look in looks(grids).values()]
    for row, (grid, color) in enumerate(zip(grids.values(), colors, strict=True)):
        points = _numpy(getattr(grid, x))
        ax.plot(points, np.full(len(points), row), "-", color=PALE, lw=1.5, zorder=1)
        ax.plot(points, np.full(len(points), row), "|", color=color, ms=15, mew=2.2)
        t_model = getattr(grid, "t_model", None)
        if t_model is not None and not np.array_equal(_numpy(t_model), _numpy(grid.t)):
            passed = _numpy(getattr(grid.schedule, x)(t_model))[:-1]  # no call at the last time
            ax.plot(passed, np.full(len(passed), row + 0.32), "o", color=color, mfc="w", ms=5)
    ax.set_yticks(range(len(grids)), map(display_name, grids))
    ax.set_ylim(len(grids) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    if x == "s":
        ax.set_xscale("log")
        ax.invert_xaxis()
    noise_level = r"$\lambda = \ln(\alpha/\sigma)$" if x == "lam" else r"$s = \sigma/\alpha$"
    ax.set_xlabel(f"noise   ←   {noise_level}   →   data")
    return ax


def in_view(path: "Path2D") -> np.ndarray:
    """Return x / sqrt(alpha^2 + sigma^2), whose size no noise level changes: (2, N+1, B)."""
    grid, x = path
    scale = np.hypot(_numpy(grid.schedule.alpha(grid.t)), _numpy(grid.schedule.sigma(grid.t)))
    return np.moveaxis(_numpy(x) / scale[:, None, None], -1, 0)


@mpl.rc_context(STYLE)
def plot_trajectories(
    paths: "Mapping[str, Path2D]",
    exact: "Path2D | None" = None,
    data: Any = None,
    ax: Axes | None = None,
    nested: bool = False,
) -> Axes:
    """Draw samples on their way from noise to data, in the plane, with a marker at each step.

    paths  name -> (grid, x), x (N+1, B, 2) at the times of the grid
    exact  (grid, x) of the exact flow on a fine grid: grey lines under them, a cross at each end
    data   (n, 2) points of the data, a pale cloud under all
    nested whether each path is thinner than the one before it and the last is dotted, so that
           paths on each other are seen
    Drawn is x / sqrt(alpha^2 + sigma^2), which neither grows with the noise nor knows of the
    schedule: standard normal at first, the data at last. The view is that of `exact` if given.
    """
    ax = _axes(ax, (6.2, 4.6))
    if data is not None:
        ax.plot(*_numpy(data).T, ".", color="#c4c4c4", ms=5, mew=0, zorder=0)
    if exact is not None:
        x = in_view(exact)
        ax.plot(*x, color="#8c8c8c", lw=0.9, zorder=1)
        ax.plot(*x[:, -1], "x", color=INK, ms=6, mew=1.4, zorder=3)
        ax.plot([], [], "-x", color="#8c8c8c", mec=INK, lw=0.9, ms=6, label="exact")
        reach = 1.08 * np.abs(x).max()
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    wider = len(paths) if nested else 1
    for (name, path), look in zip(paths.items(), looks(paths).values(), strict=True):
        x, look = in_view(path), look | {"lw": 1.1, "alpha": 1 / wider}
        if nested:
            look |= {"ls": "-" if wider > 1 else ":", "marker": "", "lw": 1.6 * wider**1.7}
        ax.plot(*x, **look, ms=3, zorder=2)
        ax.plot(*x[:, -1], **look | {"ls": "", "marker": look["marker"] or "o"}, ms=6, zorder=2)
        ax.plot([], [], **look, ms=4, label=display_name(name))
        wider = max(1, wider - 1)
    ax.set_aspect("equal")
    ax.locator_params(nbins=5)
    ax.set_xlabel(r"first coordinate of $x / \sqrt{\alpha^2 + \sigma^2}$")
    ax.set_ylabel("second coordinate")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


@mpl.rc_context(STYLE)
def plot_side_by_side(
    paths: "Mapping[str, Path2D]", exact: "Path2D | None" = None, data: Any = None
) -> Figure:
    """Draw `plot_trajectories` of each path in a panel of its own, on shared axes.

    paths, exact, data  as in `plot_trajectories`
    The steps of one sample are numbered, whose closest two points are farthest apart.
    """
    figure, axes = plt.subplots(
        1, len(paths), figsize=(0.5 + 3.9 * len(paths), 4.2), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    views = [in_view(path) for path in paths.values()]
    gaps = [np.linalg.norm(np.diff(view, axis=1), axis=0).min(0) for view in views]
    clearest = np.min(gaps, 0).argmax()
    for ax, view, (name, path) in zip(axes[0], views, paths.items(), strict=True):
        plot_trajectories({name: path}, exact, data, ax)
        _write_beside(ax, [(str(i), place) for i, place in enumerate(view[..., clearest].T)][1:])
        ax.get_legend().remove()
        ax.set_title(display_name(name))
        ax.label_outer()
    return figure


@mpl.rc_context(STYLE)
def plot_balls(x_T: Any, moved: Any, r: float, ax: Axes | None = None) -> Axes:
    """Draw the balls of Eq. 7 in the plane, and an arrow from each noise to what it became.

    x_T    (B, 2) noises, the centres, in units of sigma at T
    moved  (B, 2) the x'_T of the same pairs, in the same units
    r      radius of the balls, in the same units
    """
    ax = _axes(ax, (4.2, 4.2))
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": INK, "lw": 0.9, "mutation_scale": 6}
    arrow |= {"shrinkA": 0, "shrinkB": 0}  # from point to point
    for center, end, color in zip(_numpy(x_T), _numpy(moved), cycle(COLORS)):
        ax.add_patch(plt.Circle(tuple(center), r, fc=color, alpha=0.15, lw=0))
        ax.add_patch(plt.Circle(tuple(center), r, fill=False, ec=color, lw=1))
        ax.annotate("", end, center, arrowprops=arrow)
        ax.plot(*center, ".", color=color, ms=3)
    ax.set_aspect("equal")
    ax.set(xlabel=r"first coordinate, in units of $\sigma_T$", ylabel="second coordinate")
    ax.set_title(f"r = {r}")
    return ax


@mpl.rc_context(STYLE)
def plot_slopes(
    values: Mapping[str, tuple[float, float]], names: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """Draw a line from a first to a second number for each name, on one logarithmic scale.

    values  name -> two positive numbers, which are written at the ends of its line
    names   what the first and the second numbers are
    Lines that cross are names whose order turns round.
    """
    ax = _axes(ax, (5.6, 4.4))
    for (name, (first, second)), look in zip(values.items(), looks(values).values(), strict=True):
        written: Any = {"color": look["color"], "size": 9, "va": "center"}
        ax.plot([0, 1], [first, second], **look)
        ax.text(-0.05, first, f"{first:.3f}", ha="right", **written)
        ax.text(1.05, second, f"{second:.3f}  {display_name(name)}", **written)
    ax.set_yscale("log")
    ax.yaxis.set_visible(False)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(-0.3, 2.0)
    ax.set_xticks([0, 1], names)
    ax.spines["bottom"].set_bounds(0, 1)
    return ax


def path_rows(paths: "Mapping[str, Path2D]") -> list[dict[str, Any]]:
    """Return one flat record for each point that `plot_trajectories` draws, for `save`."""
    return [
        {"path": name, "sample": b, "step": i, "t": t, "x": x.item(), "y": y.item()}
        for name, path in paths.items()
        for i, (t, points) in enumerate(
            zip(path[0].t.tolist(), in_view(path).swapaxes(0, 1), strict=True)
        )
        for b, (x, y) in enumerate(points.T)
    ]


@mpl.rc_context(STYLE)
def plot_coefficients(
    coefficients: "Coefficients | Mapping[str, Coefficients]", ax: Axes | None = None
) -> Axes:
    """Draw the tables b: a row for each step, the newest evaluation first, blank where is none.

    coefficients  Coefficients, or name -> Coefficients to set several side by side; only `.b`,
                  a tensor (N, k), is read. Tables of at most 60 numbers have them written in;
                  where all have, colours end at `CLIP`, so that one large number leaves the others
                  some colour.
    """
    tables: Any = coefficients if isinstance(coefficients, dict) else {"": coefficients}
    blocks = {}
    for name, table in tables.items():
        b = _numpy(table.b)
        step, back = np.indices(b.shape)
        blocks[name] = np.where(back <= step, b, np.nan)
    height = max(len(b) for b in blocks.values())
    limit = largest = max(np.nanmax(np.abs(b)) for b in blocks.values())
    if all(b.size <= 60 for b in blocks.values()):  # else a colour is all that tells a number
        limit = min(largest, CLIP)
    width = sum(b.shape[1] for b in blocks.values()) + 0.6 * (len(blocks) - 1)
    ax = _axes(ax, (1.8 + 0.62 * width, 1.3 + 0.36 * height))
    ax.spines[:].set_visible(False)
    left, ticks, labels = 0.0, [], []
    for name, b in blocks.items():
        n, k = b.shape
        image = ax.imshow(b, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto",
                          extent=(left, left + k, n + 0.5, 0.5))  # fmt: skip
        for (i, j), value in np.ndenumerate(b):
            if np.isfinite(value) and b.size <= 60:
                ink = "white" if abs(value) > 0.6 * limit else INK
                number = f"{value:.2f}".replace("-", "−")
                ax.text(left + j + 0.5, i + 1, number, color=ink, size=9, ha="center", va="center")
        ax.text(left + k / 2, 0.3, display_name(name), ha="center", va="bottom")
        ticks += [left + j + 0.5 for j in range(k)]
        labels += ["newest" if j == 0 else f"−{j}" for j in range(k)]
        left += k + 0.6
    ax.set(xlim=(0, left - 0.6), ylim=(height + 0.5, 0.5), ylabel="step")
    ax.set_xticks(ticks, labels)
    ax.set_yticks(range(1, height + 1))
    ax.tick_params(length=0)
    ax.set_xlabel("network evaluation")
    beyond = "both" if limit < largest else "neither"
    ax.figure.colorbar(image, ax=ax, label="coefficient", shrink=0.9, extend=beyond)
    return ax


@mpl.rc_context(STYLE)
def plot_metric(
    rows: "Rows",
    x: str = "nfe",
    y: str = "frechet",
    by: str | Sequence[str] = "solver",
    ax: Axes | None = None,
    ylabel: str | None = None,
    log: bool = True,
    line: str | None = None,
    log_x: bool = False,
) -> Axes:
    """Draw curves of the mean of `y` over rows that agree in `by` and `x`; the band is min to max.

    rows  a row for each run; seeds are what differs within a group
    by    column, or several, that tell the curves apart by colour and marker
    line  a further key that tells them apart by the style of the line; by default as `by`
    log, log_x  logarithmic axes; that of x has room for 0
    Raises KeyError where a row lacks `x`, `y` or a key of `by` or `line`.
    """
    ax, rows = _axes(ax, (5.5, 3.6)), _records(rows)
    curves: dict[tuple[str, Any], dict[Any, list[float]]] = {}
    for row in rows:
        points = curves.setdefault((_group(row, by), row[line] if line else ""), {})
        points.setdefault(row[x], []).append(float(row[y]))
    shown = looks(name for name, _ in curves)
    dashes = dict(zip(dict.fromkeys(style for _, style in curves), cycle(LINES)))
    for (name, style), points in curves.items():
        at, look, label = sorted(points), dict(shown[name]), display_name(name)
        if line:
            look["ls"], label = dashes[style], f"{label}, {display_name(str(style))}"
        ax.fill_between(at, [min(points[p]) for p in at], [max(points[p]) for p in at],
                        color=look["color"], alpha=0.18, lw=0)  # fmt: skip
        ax.plot(at, [np.mean(points[p]) for p in at], **look, label=label, ms=5.5)
    if log:
        log_scale(ax, "y")
    at = sorted({row[x] for row in rows})
    if log_x and at[-1] > 0:
        ax.set_xscale("symlog", linthresh=min(p for p in at if p > 0), linscale=0.5)
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.set_xticks(at, [f"{p:.2g}" if isinstance(p, float) else str(p) for p in at])
    ax.grid(axis="y", color=PALE, lw=0.6)
    ax.set(xlabel=CALLS if x == "nfe" else x, ylabel=ylabel or y)
    if len(curves) > 1:
        ax.legend()
    return ax


def _group(row: Mapping[str, Any], by: str | Sequence[str]) -> str:
    """What a row has under one key or several, with a comma between; numbers with their key."""
    found = [(key, row[key]) for key in ((by,) if isinstance(by, str) else by)]
    one = len(found) == 1
    return ", ".join(str(v) if one or isinstance(v, str) else f"{k} {v}" for k, v in found)


@mpl.rc_context(STYLE)
def plot_ranges(
    rows: "Rows",
    value: str = "frechet",
    by: str | Sequence[str] = "method",
    hue: str = "method",
    label: str | None = None,
    through: Sequence[str] = (),
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draw a dot at the mean of `value` and a bar from min to max, in a panel for each `nfe`.

    rows     a row for each run, with `nfe`; seeds are what differs within a dot
    by       column, or several, whose values have a line of the picture each, on one shared scale
    hue      column whose values have their colours and markers; a pale line joins those that meet
    through  values of `hue` that are drawn as a line through a whole panel
    figure   what to draw in, by default a new figure
    """
    records = _records(rows)
    places: dict[str, int] = {}
    for row in records:
        if row[hue] not in through:
            places.setdefault(_group(row, by), len(places))
    panels: dict[Any, dict[tuple[str, str], list[float]]] = {r["nfe"]: {} for r in records}
    for row in records:
        dot = "" if row[hue] in through else _group(row, by), row[hue]
        panels[row["nfe"]].setdefault(dot, []).append(float(row[value]))
    shown = looks(row[hue] for row in records)
    if figure is None:
        size = (2.4 + 2.2 * len(panels), 1.2 + 0.26 * max(len(places), 3))
        figure = plt.figure(figsize=size)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, nfe in zip(axes, sorted(panels), strict=True):
        _axes(ax, (0, 0))
        for place in places.values():
            reached = [np.mean(v) for (n, _), v in panels[nfe].items() if places.get(n) == place]
            if reached:
                ax.plot([min(reached), max(reached)], 2 * [place], color=PALE, lw=2, zorder=1)
        for (name, key), values in panels[nfe].items():
            look, mean = shown[key], np.mean(values)
            if key in through:
                ax.axvline(
                    mean, color=look["color"], ls=look["ls"], lw=1.4, label=display_name(key)
                )
                continue
            ax.plot([min(values), max(values)], 2 * [places[name]], color=look["color"], lw=2)
            ax.plot(mean, places[name], **look | {"ls": ""}, ms=6, label=display_name(key))
        ax.set_title(f"{nfe} calls")
        ax.grid(axis="x", color=PALE, lw=0.6)
    log_scale(ax, "x")
    ax.set_yticks(list(places.values()), map(display_name, places))
    ax.set_ylim(len(places) - 0.4, -0.6)
    figure.supxlabel(label or value, fontsize=11)
    if hue != by:
        entries = [zip(*one.get_legend_handles_labels()[::-1], strict=True) for one in axes]
        once = dict(entry for one in entries for entry in one)
        ax.legend(once.values(), once, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def principal_components(rows: "Rows", of: str = "b") -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the first two principal components of the rows' vectors, and their shares.

    rows  dictionaries, each with an array of numbers under `of`, all of one shape
    Returns the rows with "pc1" and "pc2" in place of `of`, and two fractions of 1.
    """
    from sklearn.decomposition import PCA

    rows, pca = _records(rows), PCA(2)
    points = pca.fit_transform(np.stack([_numpy(row[of]).ravel() for row in rows]))
    found = [
        {key: value for key, value in row.items() if key != of} | {"pc1": float(u), "pc2": float(v)}
        for row, (u, v) in zip(rows, points, strict=True)
    ]
    return found, pca.explained_variance_ratio_


def _name_components(ax: Axes, shares: Any) -> None:
    ax.set(
        xlabel=f"first component ({shares[0]:.0%} of variance)",
        ylabel=f"second component ({shares[1]:.0%})",
    )


@mpl.rc_context(STYLE)
def plot_pca(
    rows: "Rows",
    shares: Sequence[float],
    by: str = "step",
    line: str = "seed",
    reference: str = "iPNDM",
    ax: Axes | None = None,
) -> Axes:
    """Draw paths in the plane of `principal_components`, darker where `by` is earlier.

    by    key of a row, whole numbers: where on its path a point lies
    line  key that tells the paths apart, by marker; the row that has `reference` there is a star
    """
    ax, rows = _axes(ax, (5.6, 4.0)), _records(rows)
    learned = [row for row in rows if row[line] != reference]
    at = sorted({row[by] for row in learned})
    colors = mpl.colors.ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.95, len(at))))
    norm = mpl.colors.BoundaryNorm([p - 0.5 for p in at] + [at[-1] + 0.5], len(at))
    for name, marker in zip(dict.fromkeys(row[line] for row in learned), cycle(MARKERS)):
        path = sorted((row for row in learned if row[line] == name), key=lambda row: row[by])
        u, v = [row["pc1"] for row in path], [row["pc2"] for row in path]
        ax.plot(u, v, "-", color=PALE, lw=1, zorder=1)
        points = ax.scatter(u, v, s=55, c=[row[by] for row in path], cmap=colors, norm=norm,
                            marker=marker, ec=INK, lw=0.6, label=f"{line} {name}")  # fmt: skip
    for row in rows:
        if row[line] == reference:
            ax.plot(row["pc1"], row["pc2"], "*", color=looks([reference])[reference]["color"],
                    ms=16, mec=INK, label=reference)  # fmt: skip
    _name_components(ax, shares)
    ax.locator_params(nbins=6)
    ax.figure.colorbar(points, ax=ax, ticks=at, label=by)
    ax.legend()
    return ax


@mpl.rc_context(STYLE)
def plot_map(vectors: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw named vectors of one length as points in the plane of their `principal_components`.

    The first word of a name chooses colour and marker: solvers of one family look alike.
    """
    ax = _axes(ax, (7.5, 4.0))
    points, shares = principal_components([{"name": n, "b": v} for n, v in vectors.items()])
    shown, beside = looks(name.split()[0] for name in vectors), []
    for row in points:
        family, *rest = row["name"].split()
        look = shown[family] | {"ls": ""}
        ax.plot(row["pc1"], row["pc2"], **look, ms=9, alpha=0.8, label=display_name(row["name"]))
        beside.append((" ".join(rest), (row["pc1"], row["pc2"])))
    _write_beside(ax, [(text, place) for text, place in beside if text])
    _name_components(ax, shares)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


@mpl.rc_context(STYLE)
def show_images(
    x: Any,
    rows: int | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    limit: float | None = None,
) -> Axes:
    """Draw images as one tiled picture, row by row; values outside [-1, 1] are clipped.

    x      (B, C, H, W) in [-1, 1], C = 1 (grey) or 3 (red, green, blue)
    rows   number of rows; by default the most nearly square tiling
    limit  for differences of images: their means over C are drawn from blue at -limit over white
           at 0 to red at limit
    """
    x = _numpy(x)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UsageError(
            f"images must have shape (B, 1 or 3, H, W), not {x.shape}: take a data set of images"
        )
    look: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
    if limit is not None:
        x = x.mean(1, keepdims=True).clip(-limit, limit) / limit
        look["cmap"] = "RdBu_r"
    count, channels, height, width = x.shape
    rows = rows or max(1, int(count**0.5))
    columns = -(-count // rows)
    gap = max(1, width // 16)
    blank = 1.0 if limit is None else 0.5
    tiles = np.full((rows * columns, channels, height + gap, width + gap), blank)
    tiles[:count, :, :height, :width] = (x.clip(-1, 1) + 1) / 2
    picture = tiles.reshape(rows, columns, channels, height + gap, width + gap)
    picture = picture.transpose(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, channels)
    picture = picture[:-gap, :-gap]
    side = min(0.9, 9 / columns)
    ax = _axes(ax, (side * columns, side * rows + (0.3 if title else 0)))
    picture = picture.squeeze(-1) if channels == 1 else picture
    ax.imshow(picture, **look, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title or "")
    return ax


@mpl.rc_context(STYLE)
def show_samples(
    x: Any,
    rows: int | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    limit: float | None = None,
) -> Axes:
    """Draw samples in the way that suits them: images, signals in tiles, points in the plane.

    x      (B, C, H, W) as in `show_images`, (B, 1, length) in [-1, 1], or (B, 2)
    rows   number of rows of tiles; by default the most nearly square tiling
    limit  of the colours of images that are differences, as in `show_images`
    Raises UsageError for another shape.
    """
    x = _numpy(x)
    if x.ndim == 2 and x.shape[1] == 2:
        ax = _axes(ax, (3.4, 3.4))
        ax.plot(*x.T, ".", color=INK, ms=5)
        reach = max(1.5, 1.08 * np.abs(x).max())
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    elif x.ndim == 3 and x.shape[1] == 1:
        rows = rows or max(1, int(len(x) ** 0.5))
        columns = -(-len(x) // rows)
        ax = _axes(ax, (9, 0.5 + 0.6 * rows))
        for i, (signal,) in enumerate(x):
            row, column = divmod(i, columns)
            along = column + np.linspace(0, 0.9, len(signal))
            ax.plot(along, signal - 2.2 * row, lw=0.8, color=INK)
        ax.set_axis_off()
    else:
        return show_images(x, rows, ax, title, limit)
    ax.set_title(title or "")
    return ax


@mpl.rc_context(STYLE)
def plot_matrix(
    rows: "Rows", index: str, column: str, value: str, ax: Axes | None = None, worst: float = 5
) -> Axes:
    """Draw `value`, a ratio, in a grid of `index` by `column`, each with its number.

    Colours follow the logarithm: 1 is pale, and `worst` and 1 / `worst` are the darkest.
    """
    ax, records = _axes(ax, (5.2, 4.2)), _records(rows)
    lines, columns = (list(dict.fromkeys(r[key] for r in records)) for key in (index, column))
    numbers = np.full((len(lines), len(columns)), np.nan)
    for r in records:
        numbers[lines.index(r[index]), columns.index(r[column])] = r[value]
    limit = np.log(worst)
    colours = np.log(numbers.clip(1 / worst, worst))
    ax.imshow(colours, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), number in np.ndenumerate(numbers):
        ink = "w" if abs(colours[i, j]) > 0.6 * limit else "k"
        ax.text(j, i, f"{number:.2f}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.set_yticks(range(len(lines)), [display_name(str(line)) for line in lines])
    ax.set(xlabel=column, ylabel=index)
    return ax


@mpl.rc_context(STYLE)
def plot_signals(
    x: "Tensor", rate: float, scale: float = 1.0, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Draw signals (n, 1, length) side by side: `rate` points a second, times `scale`."""
    ax = _axes(ax, (9, 1.5))
    for i, signal in enumerate(_numpy(x[:, 0])):
        start = i * 1.1 * len(signal) / rate
        ax.plot(start + np.arange(len(signal)) / rate, scale * signal, lw=0.9, color="k")
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xticks([])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return ax


@mpl.rc_context(STYLE)
def plot_losses(epochs: "Iterable[Epoch]", ax: Axes | None = None) -> Axes:
    """Draw the training and validation loss of each epoch; a strip shows several phases.

    epochs  records with `index`, `train_loss`, `valid_loss` and `phase`, in order
    """
    epochs = list(epochs)
    ax = _axes(ax, (6.0, 3.2))
    for key, look in looks(["train_loss", "valid_loss"]).items():
        values = _numpy([getattr(e, key) for e in epochs])
        ax.plot([e.index for e in epochs], values, **look, label=display_name(key))
    log_scale(ax, "y")
    _mark_phases(ax, epochs)
    ax.set_ylabel("loss")
    return ax


@mpl.rc_context(STYLE)
def plot_times(epochs: "Iterable[Epoch]", ax: Axes | None = None) -> Axes:
    """Draw the inner times of the solver after each epoch, in lam, and of the best one at the end.

    epochs  records with `index`, `phase`, `solver` and `best`, in order
    """
    epochs = list(epochs)
    ax = _axes(ax, (6.0, 3.2))
    index = [e.index for e in epochs]
    lam = np.array([_numpy(e.solver.grid.lam)[1:-1] for e in epochs])
    ax.plot(index, lam, color=INK, lw=1.3)
    best = _numpy(epochs[-1].best.grid.lam)[1:-1]
    ax.plot([index[-1]] * len(best), best, "D", color=INK, ms=5, clip_on=False, label="best")
    _mark_phases(ax, epochs)
    ax.set_ylabel(r"$\lambda$ of the inner times")
    return ax


def _mark_phases(ax: Axes, epochs: "Sequence[Epoch]") -> None:
    """The axis of epochs; a thin strip along it where there are several phases."""
    shown = looks(e.phase for e in epochs)
    if len(shown) > 1:
        for phase, look in shown.items():
            ax.bar([e.index for e in epochs if e.phase == phase], 0.035, 1, color=look["color"],
                   zorder=0, transform=ax.get_xaxis_transform(),
                   label=display_name(phase), alpha=0.4)  # fmt: skip
    ax.set_xlim(epochs[0].index - 0.5, epochs[-1].index + 0.5)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def picture(drawn: Axes | Figure, alt: str, crop: bool = False, small: bool = True) -> Any:
    """Return a figure as an IPython Image of its own size in twice the pixels, and close it.

    alt    one sentence that says what is seen, for those who do not see it
    crop   whether to cut the empty margins off, as notebooks do
    small  whether to take the time for a small file, which one that is not kept is not worth
    """
    from IPython.display import Image
    from PIL import Image as pillow

    figure: Any = drawn.figure
    content = io.BytesIO()
    look = {"dpi": 2 * figure.dpi, "bbox_inches": "tight" if crop else None}
    figure.savefig(content, **look, pil_kwargs={"compress_level": 1})
    plt.close(figure)  # or a notebook would show it once more
    image = pillow.open(content)
    width, height = (side // 2 for side in image.size)
    if small:
        content = io.BytesIO()
        palette = image.convert("RGB").quantize(method=pillow.Quantize.MAXCOVERAGE)
        palette.save(content, "png", optimize=True)
    return Image(content.getvalue(), width=width, height=height, alt=alt)


def show(drawn: Axes | Figure, alt: str) -> None:
    """Show a figure in a notebook as a `picture` that has `alt` in its metadata."""
    from IPython.display import display

    display(picture(drawn, alt, crop=True))


def save(figure: Figure, path: str, rows: "Rows" = ()) -> None:
    """Write the figure to `path` (.svg or .png), and the rows it draws to a CSV beside it.

    An empty path writes nothing, so that a notebook's parameter can decide. What a row lacks of
    the others' keys is left blank.
    """
    if not path:
        return
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path[-3:] == "svg" else {})
    if records := _records(rows):
        with open(Path(path).with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in records for key in row))
            writer.writeheader()
            writer.writerows(records)
