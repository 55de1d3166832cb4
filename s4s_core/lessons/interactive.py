"""Tools for the lessons in JupyterLab: sliders that redraw a picture, and checks of exercises."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UsageError
from ..experiments import plot
from ..experiments.tables import Table
from ..grid import TimeGrid
from ..setup import Setup
from ..solver import Solver
from .exact import exact_path, sample_path

Range: TypeAlias = tuple[float, float, float]  # low, start, high
JUDGED = range(200)  # seeds of the noises whose mean error the title of a picture tells


def sliders(draw: Callable[..., Figure], alt: str, **ranges: Range) -> None:
    """Show the figure draw(**values) with a slider for each value; moving one redraws the figure.

    alt     one sentence that says what is seen, for those who do not see it
    ranges  name -> (low, start, high); a button under the sliders goes back to all the starts
    Without ipywidgets, or outside a notebook, only the figure of the start values is shown.
    """
    from IPython import get_ipython
    from IPython.display import display

    def picture(small: bool = False) -> Any:
        return plot.picture(draw(**values), alt, small=small)

    def move(change: Any) -> None:
        name = change.owner.description
        if values[name] != change.new:  # as all are after a reset
            values[name] = change.new
            shown.update(picture())

    def reset(_: Any) -> None:
        values.update(starts)
        for control in moving:
            control.value = starts[control.description]
        shown.update(picture())

    starts = {name: start for name, (_, start, _) in ranges.items()}
    values = dict(starts)
    controls = _controls(ranges) if hasattr(get_ipython(), "kernel") else None
    if controls:
        display(controls)
        *moving, button = controls.children
        for control in moving:
            control.observe(move, "value")
        button.on_click(reset)
    shown = display(picture(small=True), display_id=True)


def _controls(ranges: dict[str, Range]) -> Any:
    """VBox of labelled sliders and a button at the end, or None if ipywidgets is missing."""
    try:
        from ipywidgets import Button, FloatSlider, VBox
    except ImportError:
        return None
    look = {"style": {"description_width": "8em"}, "layout": {"width": "32em"}}
    moving = [
        FloatSlider(start, min=low, max=high, step=(high - low) / 1000, description=name, **look)
        for name, (low, start, high) in ranges.items()
    ]
    return VBox([*moving, Button(description="reset")])


def explore_times(
    setup: Setup, solver: Solver, seeds: Sequence[int] = range(8), rival: Solver | None = None
) -> None:
    """Show a solver's trajectories in the plane, with sliders for lam at its inner times.

    seeds  of the noises that are drawn; the title has the mean error of 200, `JUDGED`
    rival  the solver to beat on these 200, or None for the one that is given
    The solver's table stays as it is. Times that pass each other change places. The times that are
    passed to the network (`t_model` of the grid) move along with the times of the steps.
    """
    grid, schedule = solver.grid, solver.grid.schedule
    lam, offsets = grid.lam, schedule.lam(grid.t_model) - grid.lam

    def moved(values: Sequence[float]) -> Solver:
        inner = torch.tensor(values, dtype=lam.dtype).sort().values
        inner = inner + 1e-9 * torch.arange(len(inner))  # two equal times would be no grid

        def times(u: Tensor) -> Tensor:
            return torch.cat([grid.t[:1], schedule.t_of_lam(u), grid.t[-1:]])

        return replace(solver, grid=TimeGrid(schedule, times(inner), times(inner + offsets[1:-1])))

    margin = 0.02 * (lam[-1] - lam[0])
    low, high = (lam[0] + margin).item(), (lam[-1] - margin).item()
    starts = {f"λ{i}": value for i, value in enumerate(lam.tolist())}
    inner = list(starts.items())[1:-1]
    _explore(setup, moved, {n: (min(low, v), v, max(high, v)) for n, v in inner}, seeds, rival)


def explore_coefficients(
    setup: Setup,
    solver: Solver,
    step: int | None = None,
    seeds: Sequence[int] = range(8),
    rival: Solver | None = None,
) -> None:
    """Show a multistep solver's trajectories in the plane, with sliders for its coefficients b.

    step          1 to N for the coefficients of one step, or None for those of all steps; the
                  newest evaluation comes first, as in `plot_coefficients`
    seeds, rival  as in `explore_times`
    Raises UsageError for another step.
    """
    b = solver.coefficients.b
    if step is not None and not 1 <= step <= len(b):
        raise UsageError(f"step must be a whole number from 1 to {len(b)}, not {step}")
    rows = range(len(b)) if step is None else [step - 1]
    places = [(i, j) for i in rows for j in range(min(i + 1, b.shape[1]))]

    def changed(values: Sequence[float]) -> Solver:
        table = b.clone()
        table[tuple(zip(*places, strict=True))] = torch.tensor(values, dtype=b.dtype)
        return replace(solver, coefficients=replace(solver.coefficients, b=table))

    names = [f"step {i + 1}, {f'−{j}' if j else 'newest'}" for i, j in places]
    starts = zip(names, [b[place].item() for place in places], strict=True)
    _explore(setup, changed, {name: (v - 1, v, v + 1) for name, v in starts}, seeds, rival)


def _explore(
    setup: Setup,
    make: Callable[[Sequence[float]], Solver],
    ranges: dict[str, Range],
    seeds: Sequence[int],
    rival: Solver | None,
) -> None:
    """Sliders for the values that `make` turns into a solver, and the solver's trajectories.

    Grey is where they began; below lie the times. The title is green once the rival is beaten.
    """
    noises, drawn = [*seeds, *JUDGED], len(seeds)  # solved together
    fine, exact = exact_path(setup, noises)
    data = cast(Tensor, setup.data())[:500] if setup.data else None

    def solve(solver: Solver) -> tuple[tuple[TimeGrid, Tensor], float]:
        grid, x = sample_path(setup, solver, noises)
        error = (x[-1] - exact[-1])[drawn:].norm(dim=1).mean().item()
        return (grid, x[:, :drawn]), round(error, 3)  # compared as shown

    start, at_start = solve(make([value for _, value, _ in ranges.values()]))
    goal = solve(rival)[1] if rival else at_start
    axes: Any = None

    @mpl.rc_context(plot.STYLE)
    def draw(**values: float) -> Figure:
        nonlocal axes
        path, error = solve(make(list(values.values())))
        fresh = axes is None
        if fresh:
            _, axes = plt.subplots(2, 1, figsize=(6.2, 5.6), height_ratios=(9, 1))
        picture, strip = axes
        picture.clear()
        strip.clear()
        ghost: dict[str, Any] = {"color": plot.GHOST, "zorder": 1.5}
        picture.plot(*plot.in_view(start), "o:", **ghost, ms=4, lw=1.2)
        picture.plot([], [], "o:", **ghost, ms=4, label="start")
        plot.plot_trajectories(
            {f"{len(path[1]) - 1} calls": path}, (fine, exact[:, :drawn]), data, picture
        )
        strip.plot(start[0].lam, torch.zeros(len(start[0].lam)), "|", **ghost, ms=15, mew=2.2)
        plot.plot_grid({"now": path[0]}, strip)
        beaten = error < goal
        picture.set_title(
            f"mean error of {len(JUDGED)} noises: {error:.3f}\n"
            f"start: {at_start:.3f}, to beat: {goal:.3f}{', beaten' if beaten else ''}",
            color=plot.GREEN if beaten else plot.INK,
        )
        figure = cast(Figure, picture.figure)
        if fresh:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # what was laid out stays, and redraws are faster
        return figure

    alt = f"Paths of {len(seeds)} samples in the plane, from noise to data: the solver's steps are "
    alt += "broken lines, grey where they began, the exact paths are smooth; the times lie below"
    sliders(draw, alt, **ranges)


def show_source(*functions: Callable[..., Any]) -> Table:
    """Return the source of functions or classes as Markdown that a notebook renders."""
    text = "\n\n".join(inspect.getsource(function).rstrip() for function in functions)
    return Table(f"```python\n{text}\n```")


def repaired_ends(solver: Solver, denoiser: Denoiser, exact: Tensor) -> list[float]:
    """Return the mean distance to the exact end of a solver put back on the flow after one step.

    exact (N+1, B, ...) is the exact flow at the solver's times. There is a number for each step but
    the last: after step i alone the solver's x is replaced by exact[i]; the evaluations that it has
    made so far are kept. The exercise of lesson 4 asks for these numbers.
    """
    ends = []
    for step in range(1, solver.nfe):
        points = solver.trajectory(denoiser, exact[0])
        x = next(points)
        for i in range(solver.nfe):
            x = points.send(exact[i] if i == step else x)
        ends.append((x - exact[-1]).flatten(1).norm(dim=1).mean().item())
    return ends


def check_answer(
    answer: Any,
    right: Any,
    hint: str = "",
    below: float | None = None,
    known: Iterable[Any] = (),
) -> None:
    """Print whether the answer to an exercise is right and, if it is not, how far it is off.

    right  the right answer, as one or more numbers, a word or a set of words; or, with `below`, a
           function answer -> number. Numbers may be off by 2 % and come as a list, a tuple, an
           array or a tensor; of words only letters and digits count, in either case, and of a
           set not the order
    hint   printed with a wrong answer
    below  what right(answer) has to be lower than
    known  numbers and grids that stand above the exercise: a copy of one is no answer
    The answer None means "not yet". No answer, of whatever kind, raises an error.
    """
    if answer is None:
        print("not yet: set answer, and run this cell again")
        return
    try:
        if any(torch.equal(_numbers(answer), _numbers(one)) for one in known):
            wrong = "this one stands above, make one of your own"
        elif below is not None:
            value = float(right(answer))
            found, goal = f"{value:.4g}", f"{below:.4g}"
            told = "no lower" if found == goal else f"wanted below {goal}"
            wrong = "" if value < below else f"{found}, {told}"
        elif isinstance(right, str | set):
            wrong = _other_words(answer, right)
        else:
            wrong = _other_numbers(_numbers(answer), _numbers(right))
    except UsageError as error:  # one sentence already
        wrong = str(error)
    except Exception:  # an answer of another kind is a wrong one
        wrong = f"this {type(answer).__name__} is not what the comment beside answer asks for"
    print(f"not yet: {wrong}{f' ({hint})' if hint else ''}" if wrong else "right")


def _numbers(value: Any) -> Tensor:
    """A number, numbers in any container, or the times of a grid, as float64."""
    value = value.t if isinstance(value, TimeGrid) else value
    return torch.as_tensor(value, dtype=torch.float64).detach().squeeze()


def _words(value: str | Iterable[str]) -> set[str]:
    words = [value] if isinstance(value, str) else value
    return {"".join(filter(str.isalnum, word.casefold())) for word in words}


def _other_words(answer: Any, right: Any) -> str:
    """How the words of an answer differ from the right ones; nothing if they do not."""
    found, wanted = _words(answer), _words(right)
    if found == wanted:
        return ""
    wrong = f", {len(found - wanted)} wrong" if found & wanted and found - wanted else ""
    return f"{len(found & wanted)} of {len(wanted)} right{wrong}"


def _other_numbers(found: Tensor, wanted: Tensor) -> str:
    """How numbers differ from the right ones, by more than 2 %; nothing if they do not."""
    if found.numel() != wanted.numel():
        return f"{found.numel()} given, {wanted.numel()} wanted"
    if found.shape != wanted.shape:
        return f"its shape is {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    if not found.isfinite().all():
        return "not all of it is a finite number"
    off = found - wanted
    agree = off.abs() <= 0.02 * wanted.abs() + 1e-9
    if agree.all():
        return ""
    if not wanted.ndim:
        return f"{found:g} is too {'large' if off > 0 else 'small'}, by {off.abs():.3g}"
    return (
        f"{agree.sum()} of {agree.numel()} numbers are right, one is off by {off.abs().max():.3g}"
    )
