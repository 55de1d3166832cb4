"""Sliders redraw at once where a kernel and ipywidgets are; elsewhere a picture stands still."""

import sys

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import s4s_core as s4s
from s4s_core.experiments import plot
from s4s_core.lessons import interactive

matplotlib.use("Agg")
WIDGET = "application/vnd.jupyter.widget-view+json"
DOT = "a black dot in a square"


@pytest.fixture
def front_end(monkeypatch):
    """What a notebook would show, in a list; pictures as PNG, each update after them."""
    import IPython
    from IPython.display import Image

    class Kernel:
        kernel = object()

    shown = []

    def display(value, display_id=None):
        if isinstance(value, Image):
            value = value.data
        shown.append(value)
        return Handle if display_id else None

    class Handle:
        update = staticmethod(display)

    monkeypatch.setattr(IPython, "get_ipython", Kernel)
    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def point(x, y):
    figure, ax = plt.subplots(figsize=(2, 2))
    ax.plot([x], [y], "ko", ms=20)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    return figure


def png(x: float, y: float, small: bool = False) -> bytes:
    return plot.picture(point(x, y), DOT, small=small).data


def test_moving_a_slider_draws_the_new_value_and_keeps_the_others(front_end):
    interactive.sliders(point, DOT, x=(0.0, 0.5, 1.0), y=(0.0, 0.25, 1.0))
    controls, first = front_end
    x, y, reset = controls.children
    assert (x.min, x.value, x.max, x.description) == (0, 0.5, 1, "x")
    assert first == png(0.5, 0.25, small=True)
    y.value = 0.75
    x.value = 0.1
    assert front_end[2] == png(0.5, 0.75)
    assert front_end[3] == png(0.1, 0.75)
    assert len(front_end) == 4
    reset.click()  # both go back, and one picture is drawn
    assert (x.value, y.value) == (0.5, 0.25)
    assert front_end[4:] == [png(0.5, 0.25)]
    x.value = 0.1
    assert front_end[5] == png(0.1, 0.25)


@pytest.mark.parametrize("missing", ["ipywidgets", "kernel"])
def test_without_a_front_end_the_picture_of_the_start_stands_alone(front_end, monkeypatch, missing):
    if missing == "kernel":
        monkeypatch.setattr("IPython.get_ipython", lambda: None)
    else:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    interactive.sliders(point, DOT, x=(0.0, 0.5, 1.0), y=(0.0, 0.25, 1.0))
    (shown,) = front_end
    assert shown == png(0.5, 0.25, small=True)


@pytest.mark.kernel
def test_in_a_notebook_the_picture_itself_is_replaced():
    cells = [
        "import matplotlib.pyplot as plt\nfrom s4s_core.lessons.interactive import sliders\n"
        "def draw(x):\n    plt.figure(figsize=(1 + x, 1))\n    return plt.gcf()\n"
        "sliders(draw, 'a frame', x=(0.0, 0.0, 1.0))",
        "from ipywidgets import FloatSlider\nfrom ipywidgets.widgets.widget import _instances\n"
        "(x,) = [w for w in _instances.values() if isinstance(w, FloatSlider)]",
        "x.value = 1.0",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(notebook, kernel_name="python3")
    with client.setup_kernel():
        client.execute_cell(notebook.cells[0], 0)
        box, before = notebook.cells[0].outputs
        assert WIDGET in box.data and before.data["image/png"]
        before = before.data["image/png"]
        client.execute_cell(notebook.cells[1], 1)
        client.execute_cell(notebook.cells[2], 2)
    _, after = notebook.cells[0].outputs
    assert after.data["image/png"] != before
    assert not notebook.cells[2].outputs


@pytest.fixture
def setup(mixture):
    return mixture()


def solver(setup, nfe=4, order=2):
    grid = s4s.time_logsnr(setup.schedule, nfe)
    return s4s.Solver(s4s.ipndm(grid, order), grid)


@pytest.fixture
def drawn(monkeypatch):
    """The paths that were drawn."""
    paths, draw = [], plot.plot_trajectories

    def record(named, *others):
        paths.append(*named.values())
        return draw(named, *others)

    monkeypatch.setattr(plot, "plot_trajectories", record)
    return paths


@pytest.fixture
def pictures(monkeypatch):
    """(title, its colour, lines in the plane, lines in the strip) of each picture with sliders."""
    found, picture = [], plot.picture

    def record(figure, alt, small):
        lines = ([line.get_xydata().copy() for line in ax.lines] for ax in figure.axes)
        named = [label.get_text() for label in figure.axes[1].get_yticklabels()]
        assert named == ["now"]  # whatever the grid
        title = figure.axes[0].title
        found.append((title.get_text(), title.get_color(), *lines))
        return picture(figure, alt, small=small)

    monkeypatch.setattr(plot, "picture", record)
    return found


def contains(lines, points) -> bool:
    """Whether one of the lines goes through these points (n, 2)."""
    return any(np.shape(line) == np.shape(points) and np.allclose(line, points) for line in lines)


def test_sliders_move_the_times_of_a_solver_and_leave_its_table(setup, front_end, drawn):
    start = solver(setup)
    interactive.explore_times(setup, start, seeds=range(3))
    controls = front_end[0].children[:-1]
    np.testing.assert_allclose([c.value for c in controls], start.grid.lam[1:-1])
    torch.testing.assert_close(drawn[0][1], s4s.sample_path(setup, start, range(3))[1])
    controls[0].value = controls[2].value + 0.5  # past its neighbours: they change places
    moved = sorted(c.value for c in controls)
    torch.testing.assert_close(drawn[1][0].lam[1:-1].tolist(), moved, atol=1e-5, rtol=0)
    grid = drawn[1][0]
    expected = s4s.Solver(start.coefficients, grid)
    assert torch.equal(drawn[1][1], s4s.sample_path(setup, expected, range(3))[1])
    controls[0].value = controls[1].value  # no grid has two equal times
    assert (drawn[2][0].lam.diff() > 0).all()


def view(setup, solver, sample):
    """Where a sample of a solver is drawn at each time, (N+1, 2)."""
    grid, x = s4s.sample_path(setup, solver, range(3))
    scale = (setup.schedule.alpha(grid.t) ** 2 + setup.schedule.sigma(grid.t) ** 2).sqrt()
    return x[:, sample] / scale[:, None]


def test_a_grey_ghost_and_grey_ticks_stay_where_the_sliders_began(setup, front_end, pictures):
    start = solver(setup)
    interactive.explore_times(setup, start, seeds=range(3))
    lam = start.grid.lam.clone()
    front_end[0].children[1].value += 0.5
    lam[2] += 0.5
    moved = s4s.Solver(
        start.coefficients, s4s.TimeGrid(setup.schedule, setup.schedule.t_of_lam(lam))
    )
    _, _, plane, strip = pictures[1]
    for sample in range(3):
        assert contains(plane, view(setup, start, sample))
        assert contains(plane, view(setup, moved, sample))
        assert not contains(pictures[0][2], view(setup, moved, sample))
    for times in (start.grid.lam, lam):
        assert contains(strip, torch.stack([times, 0 * times], 1))


@pytest.mark.slow
def test_the_title_tells_the_error_of_200_noises_and_when_the_rival_is_beaten(
    setup, front_end, pictures
):
    start, better = solver(setup), solver(setup, 4, 1)
    b = better.coefficients.b
    start, better = (s4s.Solver(s4s.Coefficients(c), start.grid) for c in (0.9 * b, b))
    x_0 = s4s.exact_path(setup, range(200))[1][-1]
    error, goal = (s4s.global_error(setup, s, range(200), x_0).mean() for s in (start, better))
    assert error > goal + 0.01
    interactive.explore_coefficients(setup, start, seeds=range(100, 103), rival=better)
    for slider in front_end[0].children[:-1]:
        slider.value = 1.0  # at last the rival's own table: as good, not better
    front_end[0].children[-1].click()
    (first, _, *_), *_, (equal, ink, *_), (again, *_) = pictures
    assert first == again
    assert first.splitlines()[0] == f"mean error of 200 noises: {error:.3f}"
    assert first.splitlines()[1] == f"start: {error:.3f}, to beat: {goal:.3f}"
    assert equal.startswith(f"mean error of 200 noises: {goal:.3f}") and "beaten" not in equal


@pytest.mark.slow
def test_the_rivals_of_lessons_2_and_3_can_be_beaten(setup, front_end, pictures):
    grid, dmn = s4s.time_logsnr(setup.schedule, 5), s4s.dmn(setup.schedule, 5)
    start, rival = (s4s.Solver(s4s.ipndm(g, 3), g) for g in (grid, dmn))
    interactive.explore_times(setup, start, rival=rival)
    for slider, lam in zip(front_end[0].children, (-1.16, 0.13, 1.96, 3.38), strict=False):
        slider.value = lam
    assert pictures[-1][0].endswith(", beaten")
    front_end.clear()
    rival = s4s.Solver(s4s.deis(grid, 3, lower_order_final=False), grid)
    interactive.explore_coefficients(setup, start, step=4, rival=rival)
    assert not pictures[-1][0].endswith(", beaten")
    for slider, b in zip(front_end[0].children, (1.48, -1.03, 0.46), strict=False):
        slider.value = b
    assert pictures[-1][0].endswith(", beaten")


@pytest.mark.slow
def test_a_less_accurate_step_ends_closer_as_in_lesson_4(setup, front_end, pictures):
    grid = s4s.time_logsnr(setup.schedule, 5)
    _, others = s4s.exact_path(setup, range(10_000, 10_100), grid)
    table = s4s.locally_optimal(grid, setup.denoiser, others, 3)
    interactive.explore_coefficients(setup, s4s.Solver(table, grid), step=4)
    front_end[0].children[0].value += 0.3
    assert pictures[-1][0].endswith(", beaten")


def test_without_a_rival_the_start_is_to_be_beaten(setup, front_end, pictures):
    good = solver(setup, 4, 1)
    bad = s4s.Solver(s4s.Coefficients(0.9 * good.coefficients.b), good.grid)
    interactive.explore_coefficients(setup, bad, step=4, seeds=range(3))
    front_end[0].children[0].value = 1.0
    (before, plain, *_), (after, green, *_) = pictures
    assert before.endswith(before.split()[5]) and not before.endswith("beaten")
    assert after.endswith(", beaten") and green != plain


def test_times_told_to_the_network_move_along(setup, front_end, drawn):
    grid = s4s.time_logsnr(setup.schedule, 4)
    xi_c = torch.tensor([0.0, 0.2, -0.1, 0.3, 0.0], dtype=torch.float64)
    learned = s4s.LearnedGrid(setup.schedule, torch.zeros(5, dtype=torch.float64), xi_c).grid()
    interactive.explore_times(setup, s4s.Solver(s4s.ddim(grid), learned), seeds=[0])
    front_end[0].children[1].value += 0.4
    lam = setup.schedule.lam
    for path in drawn:
        torch.testing.assert_close(lam(path[0].t_model) - path[0].lam, xi_c)


def test_sliders_change_the_table_of_a_solver(setup, front_end, drawn):
    start = solver(setup)
    interactive.explore_coefficients(setup, start, step=3, seeds=range(3))
    newest, older, _ = front_end[0].children
    assert (newest.value, older.value) == (1.5, -0.5)
    assert (newest.description, older.description) == ("step 3, newest", "step 3, −1")
    older.value = 0.25
    b = start.coefficients.b.clone()
    b[2, 1] = 0.25
    expected = s4s.Solver(s4s.Coefficients(b), start.grid)
    assert torch.equal(drawn[1][1], s4s.sample_path(setup, expected, range(3))[1])
    assert start.coefficients.b[2, 1] == -0.5


def test_without_a_step_every_coefficient_has_a_slider(setup, front_end):
    start = solver(setup)
    interactive.explore_coefficients(setup, start, seeds=range(2))
    assert len(front_end[0].children[:-1]) == s4s.count_parameters(start.coefficients) == 7


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_that_is_not_there_is_refused(setup, one_sentence, step):
    with one_sentence("step", "from 1 to 4", str(step)):
        interactive.explore_coefficients(setup, solver(setup), step=step)


@pytest.mark.parametrize(
    ("answer", "right", "said"),
    [
        (None, 3, "not yet: set answer"),
        (3, 3, "right\n"),
        (2.97, 3, "right\n"),
        (torch.tensor([2.97]), 3, "right\n"),
        (2.9, 3, "not yet: 2.9 is too small, by 0.1 (look again)"),
        (float("nan"), 3, "not yet: not all of it is a finite number"),
        ([3, 3], 3, "not yet: 2 given, 1 wanted (look again)"),
        ("3", 3, "not yet: this str is not what the comment beside answer asks for (look again)"),
        (" EDM", "edm", "right\n"),
        (("edm",), "edm", "right\n"),
        ("logsnr", "edm", "not yet: 0 of 1 right (look again)"),
        (["edm", "uniform"], {"uniform", "edm"}, "right\n"),
        (["edm", "ddim"], {"uniform", "edm"}, "not yet: 1 of 2 right, 1 wrong (look again)"),
        (["edm"], {"uniform", "edm"}, "not yet: 1 of 2 right (look again)"),
        ("Rectified flow", "RectifiedFlow", "right\n"),
        ([1, 2], {"edm"}, "not yet: this list is not what"),
        ((1, 2.0), [1, 2], "right\n"),
        (np.array([1.0, 2]), torch.tensor([1.0, 2.0]), "right\n"),
        ([torch.tensor(1), 2.5], [1, 2], "not yet: 1 of 2 numbers are right, one is off by 0.5"),
        ([[1, 2], [3, 4]], [1, 2, 3, 4], "not yet: its shape is (2, 2), wanted (4,)"),
    ],
)
def test_answers_are_told_right_from_wrong(capsys, answer, right, said):
    interactive.check_answer(answer, right, "look again")
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (0.5, "right\n"),
        (1.0, "not yet: 1, no lower (look again)"),
        (2.0, "not yet: 4, wanted below 1 (look again)"),
        ("x", "not yet: this str is not what the comment beside answer asks for (look again)"),
        (-1.0, "not yet: negative, not -1.0 (look again)"),
    ],
)
def test_a_wrong_answer_is_told_how_far_it_is_from_the_goal(capsys, answer, said):
    def square(x):
        if x < 0:
            raise s4s.UsageError(f"negative, not {x}")
        return x**2

    interactive.check_answer(answer, square, "look again", below=1)
    assert capsys.readouterr().out.startswith(said)


def test_a_copy_of_what_is_shown_above_is_no_answer(capsys, setup):
    shown, other = solver(setup, 4).grid, solver(setup, 5).grid
    copied = s4s.TimeGrid(setup.schedule, shown.t.clone())
    for answer in (shown, copied, other):
        interactive.check_answer(answer, lambda grid: 1 / grid.nfe, below=0.5, known=[shown])
    refused = "not yet: this one stands above, make one of your own\n"
    assert capsys.readouterr().out == 2 * refused + "right\n"


def test_repairs_are_those_of_the_trajectory_put_back_after_one_step(setup):
    learned = solver(setup)
    exact = s4s.exact_path(setup, range(3), learned.grid)[1]
    found = interactive.repaired_ends(learned, setup.denoiser, exact)
    assert len(found) == learned.nfe - 1
    for step, distance in enumerate(found, 1):
        points = learned.trajectory(setup.denoiser, exact[0])
        for i in range(learned.nfe + 1):
            x = points.send(exact[i - 1]) if i == step + 1 else next(points)
        assert distance == pytest.approx((x - exact[-1]).norm(dim=1).mean().item(), rel=1e-12)


def test_source_is_that_of_the_real_function():
    shown = interactive.show_source(s4s.ddim, s4s.EDM)
    assert shown.startswith("```python\ndef ddim(grid") and shown.endswith("\n```")
    assert "\n\n@dataclass(frozen=True)\nclass EDM" in shown
    assert shown._repr_markdown_() == shown
