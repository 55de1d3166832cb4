"""The pictures show the data they were given, with labelled axes."""

import io
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_tables import ROWS

from s4s_core.errors import UsageError
from s4s_core.experiments import plot
from s4s_core.experiments.experiment import DPM_SOLVER_V3, GRID_NAMES, LEARN
from s4s_core.grid import GRIDS, LearnedGrid
from s4s_core.published import SOLVERS
from s4s_core.schedule import EDM, RectifiedFlow, VPLinear

matplotlib.use("Agg")
SCHEDULE = EDM(T=80.0, t_min=0.002)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def grids():
    return {name: grid(SCHEDULE, 5) for name, grid in GRIDS.items() if "sd" not in name}


@pytest.mark.parametrize("x", ["lam", "s"])
def test_grid_marks_every_step(x):
    ax = plot.plot_grid(grids(), x=x)
    marks = [line for line in ax.lines if line.get_marker() == "|"]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "uniform",
        "quadratic",
        "EDM",
        "EDM in t",
        "logSNR",
    ]
    for line, grid in zip(marks, grids().values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), getattr(grid, x))
    assert "noise" in ax.get_xlabel() and "data" in ax.get_xlabel()
    # In either coordinate sampling runs from left to right.
    ends = ax.transData.transform([(float(getattr(grid, x)[i]), 0) for i in (0, -1)])
    assert ends[0][0] < ends[1][0]


def test_grid_marks_the_times_told_to_the_network():
    start = LearnedGrid.start_at(GRIDS["logsnr"](SCHEDULE, 4))
    offsets = torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    xi = start.xi.clone().requires_grad_()
    grid = LearnedGrid(SCHEDULE, xi, start.xi_c + offsets).grid()
    ax = plot.plot_grid({"plain": GRIDS["logsnr"](SCHEDULE, 4), "learned": grid})
    (told,) = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(told.get_xdata(), SCHEDULE.lam(grid.t_model).detach()[:-1])


def test_trajectories_are_drawn_in_a_picture_that_no_schedule_changes():
    y = torch.linspace(-1, 1, 5 * 3 * 2, dtype=torch.float64).reshape(5, 3, 2)
    drawn = []
    for schedule in (SCHEDULE, VPLinear(), RectifiedFlow()):
        # The same y = x / alpha at the same s, whatever the schedule's time.
        s = torch.logspace(1, -1, 5, dtype=torch.float64)
        grid = SimpleNamespace(schedule=schedule, t=schedule.t_of_s(s))
        path = grid, schedule.alpha(grid.t)[:, None, None] * y
        ax = plot.plot_trajectories({"one": path, "two": path}, exact=path, data=y[0])
        drawn.append(
            np.array([line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 5])
        )
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert texts == ["exact", "one", "two"]
        assert len({line.get_linestyle() for line in ax.get_legend().get_lines()}) > 1
    lines = (y / (1 + s**2).sqrt()[:, None, None]).transpose(0, 1)
    for xy in drawn:
        np.testing.assert_allclose(xy, torch.cat([lines] * 3), rtol=1e-9)
    ends = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata()) == 3]
    np.testing.assert_allclose(ends[0].get_xydata(), lines[:, -1], rtol=1e-9)
    assert abs(lines).max() < ax.get_xlim()[1] == ax.get_ylim()[1]
    rows = plot.path_rows({"one": path})
    assert [row["t"] for row in rows[::3]] == path[0].t.tolist()
    points = [[row["x"], row["y"]] for row in rows if (row["path"], row["sample"]) == ("one", 1)]
    np.testing.assert_allclose(points, lines[1], rtol=1e-9)


def test_coefficients_are_shown_newest_first_and_blank_where_masked():
    b = torch.tensor([[1.0, 0.0, 0.0], [1.5, -0.5, 0.0], [2.0, -1.5, 0.0]], requires_grad=True)
    ax = plot.plot_coefficients(SimpleNamespace(b=b))
    (image,) = ax.images
    drawn = image.get_array()
    np.testing.assert_array_equal(
        drawn.filled(np.nan), [[1, np.nan, np.nan], [1.5, -0.5, np.nan], [2, -1.5, 0]]
    )
    assert image.get_clim() == (-2, 2)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("step", "network evaluation")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["newest", "−1", "−2"]
    assert [t.get_text() for t in ax.texts] == [
        "1.00",
        "1.50",
        "−0.50",
        "2.00",
        "−1.50",
        "0.00",
        "",
    ]


def rows():
    return [
        {"nfe": nfe, "solver": solver, "order": order, "seed": seed, "frechet": scale * nfe + seed}
        for nfe in (8, 3, 5)
        for solver, order, scale in (("ddim", 1, 4.0), ("ipndm", 3, 2.0))
        for seed in (0, 1, 5)
    ]


def test_metric_draws_mean_and_range_of_each_group():
    ax = plot.plot_metric(rows(), ylabel="Fréchet distance (toy)")
    assert [line.get_label() for line in ax.lines] == ["DDIM", "iPNDM"]
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), [3, 5, 8])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [8, 12, 18])
    band = ax.collections[1].get_paths()[0].vertices
    assert {(3.0, 6.0), (3.0, 11.0), (8.0, 16.0), (8.0, 21.0)} <= set(map(tuple, band))
    assert ax.get_xlabel() == "network calls (NFE)" and ax.get_ylabel() == "Fréchet distance (toy)"
    assert ax.get_yscale() == "log" and list(ax.get_xticks()) == [3, 5, 8]
    # Colour is never the only difference.
    assert len({line.get_marker() for line in ax.lines}) == 2
    assert len({line.get_linestyle() for line in ax.lines}) == 2


def test_metric_groups_by_several_keys_on_given_axes():
    _, given = plt.subplots()
    ax = plot.plot_metric(rows(), by=("solver", "order"), ax=given, log=False)
    assert ax is given and ax.get_yscale() == "linear" and ax.get_ylabel() == "frechet"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "DDIM, order 1",
        "iPNDM, order 3",
    ]
    with pytest.raises(KeyError, match="solvr"):
        plot.plot_metric(rows(), by="solvr")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_tiled_row_by_row(channels):
    x = torch.linspace(-1.2, 1, 5 * channels * 4 * 4).reshape(5, channels, 4, 4)
    ax = plot.show_images(x, rows=2, title="five")
    picture = np.atleast_3d(ax.images[0].get_array().filled())
    assert picture.shape == (2 * 4 + 1, 3 * 4 + 2, channels)
    expected = (x.clip(-1, 1) + 1) / 2
    np.testing.assert_allclose(picture[:4, 5:9], expected[1].permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(picture[5:, :4], expected[3].permute(1, 2, 0), atol=1e-6)
    assert (picture[5:, 10:] == 1).all() and (picture[4] == 1).all()
    assert ax.get_title() == "five" and len(ax.images) == 1


def test_images_of_another_shape_are_refused():
    for shape in (5, 2, 4, 4), (5, 3):
        with pytest.raises(UsageError, match=r"\(B, 1 or 3, H, W\), not \(5, .*images"):
            plot.show_samples(torch.zeros(shape))


def test_points_are_drawn_as_points_in_one_view():
    near, far = torch.tensor([[0.5, -1.0], [1.0, 0.25]]), torch.tensor([[4.0, 0.0]])
    ax = plot.show_samples(near, rows=4, title="two")
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), near)
    assert ax.get_xlim() == ax.get_ylim() == (-1.5, 1.5) and ax.get_title() == "two"
    assert plot.show_samples(far).get_xlim()[1] > 4


def test_signals_are_tiled_row_by_row():
    x = torch.linspace(-1, 1, 5 * 7).reshape(5, 1, 7)
    ax = plot.show_samples(x, rows=2)
    lines = [line.get_xydata() for line in ax.lines]
    for i, line in enumerate(lines):
        row, column = divmod(i, 3)
        shifted = line[:, 1] - x[i, 0].numpy()
        np.testing.assert_allclose(shifted, shifted[0], atol=1e-6)
        assert column <= line[:, 0].min() and line[:, 0].max() < column + 1
        assert line[:, 1].max() <= 1 - 2.2 * row + 1e-6  # no row reaches into the one above


def epochs(phases):
    return [
        SimpleNamespace(
            index=i, train_loss=1 / (i + 1), valid_loss=None if i == 0 else 2.0, phase=p
        )
        for i, p in enumerate(phases)
    ]


def test_losses_and_phases():
    ax = plot.plot_losses(epochs(["phi", "phi", "xi", "phi"]))
    train, valid = ax.lines
    np.testing.assert_array_equal(train.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_allclose(train.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_array_equal(valid.get_ydata(), [np.nan, 2, 2, 2])
    shaded = {bars.get_label(): [b.get_x() + 0.5 for b in bars] for bars in ax.containers}
    assert shaded == {"φ": [0, 1, 3], "Ξ": [2]}
    assert {bar.get_height() for bars in ax.containers for bar in bars} == {0.035}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")


def test_one_phase_needs_no_shading():
    ax = plot.plot_losses(iter(epochs(["phi", "phi"])))
    assert not ax.containers and len(ax.get_legend().get_texts()) == 2


def test_times_are_drawn_epoch_by_epoch():
    records = epochs(["phi", "xi"])
    for record, inner in zip(records, ([0.0, 1.0], [0.5, 1.5]), strict=True):
        record.solver = SimpleNamespace(grid=SimpleNamespace(lam=torch.tensor([-4.0, *inner, 6.0])))
        record.best = records[0].solver
    ax = plot.plot_times(iter(records))
    *times, best = ax.lines
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in times]
    assert drawn == [([0, 1], [0.0, 0.5]), ([0, 1], [1.0, 1.5])]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([1, 1], [0.0, 1.0])
    assert [bars.get_label() for bars in ax.containers] == ["φ", "Ξ"]


def test_style_stays_local():
    before = dict(matplotlib.rcParams)
    ax = plot.plot_losses(epochs(["phi"]))
    assert ax.figure.dpi == 80
    assert dict(matplotlib.rcParams) == before


def test_a_logarithmic_axis_of_x_has_room_for_zero():
    rows = [{"r": r, "frechet": 1.0, "solver": "ipndm"} for r in (0.0, 0.00637, 0.0637, 0.637)]
    ax = plot.plot_metric(rows, x="r", log_x=True)
    at = ax.transData.transform([(row["r"], 1.0) for row in rows])[:, 0]
    np.testing.assert_allclose(np.diff(at)[1:], np.diff(at)[1])
    assert np.diff(at)[0] > 0
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.0064", "0.064", "0.64"]


def vectors(seed=0):
    """A star and two paths of five points in a plane of R^6, away from the origin."""
    generator = np.random.default_rng(seed)
    plane, center = generator.normal(size=(2, 6)), generator.normal(size=6)
    names = ["iPNDM"] + 5 * [0] + 5 * [1]
    steps = [5, *range(1, 6), *range(1, 6)]
    weights = generator.normal(size=(11, 2))
    return [
        {"seed": name, "step": step, "b": torch.tensor(w @ plane + center).view(2, 3)}
        for name, step, w in zip(names, steps, weights, strict=True)
    ]


def test_principal_components_keep_the_distances_of_points_in_a_plane():
    rows, shares = plot.principal_components(vectors())
    assert list(rows[0]) == ["seed", "step", "pc1", "pc2"]
    flat = np.array([[row["pc1"], row["pc2"]] for row in rows])
    given = np.stack([row["b"].numpy().ravel() for row in vectors()])
    for i, j in [(0, 1), (3, 8), (2, 10)]:
        expected = np.linalg.norm(given[i] - given[j])
        assert np.linalg.norm(flat[i] - flat[j]) == pytest.approx(expected)
    assert flat[:, 0].var() > flat[:, 1].var()
    np.testing.assert_allclose(shares, flat.var(0) / flat.var(0).sum())


def test_the_plane_of_components_shows_paths_darker_where_earlier_and_a_star():
    rows, shares = plot.principal_components(vectors())
    ax = plot.plot_pca(rows, shares)
    for name, points in zip((0, 1), ax.collections, strict=True):
        path = [row for row in rows if row["seed"] == name]
        drawn = [[row["pc1"], row["pc2"]] for row in path]
        np.testing.assert_allclose(points.get_offsets(), drawn)
        points.update_scalarmappable()
        lightness = points.get_facecolors()[:, :3] @ [0.299, 0.587, 0.114]
        assert (np.diff(lightness) > 0).all()
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(star.get_xydata(), [[rows[0]["pc1"], rows[0]["pc2"]]])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["seed 0", "seed 1", "iPNDM"]
    assert f"{shares[0]:.0%} of variance" in ax.get_xlabel()


def test_save_writes_the_figure_and_its_rows_and_nothing_for_an_empty_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure = plot.plot_metric(ROWS, by=("method", "order")).figure
    plot.save(figure, "")
    assert not list(tmp_path.iterdir())
    plot.save(figure, "order.svg", ROWS)
    assert (tmp_path / "order.svg").read_text().startswith("<?xml")
    assert (tmp_path / "order.csv").read_text().splitlines()[1] == "S4S,3,4,0,7.0"
    plot.save(figure, "mixed.svg", [{"step": 1, "pc1": 0.5}, {"epoch": 2, "pc1": 1.5}])
    assert (tmp_path / "mixed.csv").read_text().split() == ["step,pc1,epoch", "1,0.5,", ",1.5,2"]


def test_a_line_style_of_its_own_leaves_the_colour_to_by():
    rows = [
        {"nfe": nfe, "frechet": 1.0 + nfe, "solver": solver, "learn": learn}
        for solver in ("ipndm", "unipc")
        for learn in ("none", "coefficients")
        for nfe in (3, 4)
    ]
    lines = plot.plot_metric(rows, line="learn").get_lines()
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in lines}
    ipndm, ipndm_s4s, unipc, unipc_s4s = looks.values()
    assert list(looks)[:2] == ["iPNDM, published", "iPNDM, S4S"]
    assert ipndm[0] == ipndm_s4s[0] != unipc[0]
    assert ipndm[1] == unipc[1] != unipc_s4s[1]


def test_several_tables_share_one_colour_scale():
    tables = {k: SimpleNamespace(b=torch.full((n, k), k / 2).tril()) for k, n in ((1, 3), (4, 5))}
    ax = plot.plot_coefficients({f"order {k}": table for k, table in tables.items()})
    assert [image.get_array().shape for image in ax.images] == [(3, 1), (5, 4)]
    assert {image.get_clim() for image in ax.images} == {(-2, 2)}
    assert {"order 1", "order 4"} <= {text.get_text() for text in ax.texts}
    assert ax.get_ylim() == (5.5, 0.5)


def test_a_matrix_shows_each_number_in_its_place_and_one_is_pale():
    rows = [{"at": a, "on": b, "ratio": 2.0 ** (a - b)} for a in (1, 2, 4) for b in (2, 1)]
    ax = plot.plot_matrix(rows[:-1], index="at", column="on", value="ratio", worst=4)
    written = {t.get_position(): t.get_text() for t in ax.texts}
    assert written[0, 0] == "0.50" and written[1, 1] == "2.00" and written[0, 2] == "4.00"
    assert written[1, 2] == "nan" and [t.get_text() for t in ax.get_xticklabels()] == ["2", "1"]
    colours = ax.images[0].get_array()
    assert colours[1, 0] == colours[0, 1] == 0 and colours[0, 0] == -colours[1, 1]
    assert colours[2, 0] == ax.images[0].get_clim()[1]


def test_paths_side_by_side_share_their_axes_and_number_the_steps():
    grid = SimpleNamespace(schedule=SCHEDULE, t=SCHEDULE.t_of_s(torch.tensor([4.0, 2.0, 1.0])))
    still, moving = torch.zeros(3, 2), torch.arange(6.0).view(3, 2)
    paths = {n: (grid, k * torch.stack([still, moving], 1)) for k, n in [(1, "one"), (2, "other")]}
    panels = plot.plot_side_by_side(paths).axes
    assert [ax.get_title() for ax in panels] == list(paths)
    assert panels[0].get_xlim() == panels[1].get_xlim()
    for ax, (_, x) in zip(panels, paths.values(), strict=True):
        numbers = {text.get_text(): text.xy for text in ax.texts}
        assert list(numbers) == ["1", "2"]
        np.testing.assert_allclose(numbers["2"], x[-1, 1] / 2**0.5, rtol=1e-5)
    assert panels[0].get_ylabel() and not panels[1].get_ylabel()


def test_balls_are_as_large_as_r_and_arrows_end_where_the_noise_went():
    x_T = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    ax = plot.plot_balls(x_T, x_T + 0.25, 0.5)
    assert {patch.radius for patch in ax.patches} == {0.5}
    assert [text.xyann for text in ax.texts] == [tuple(x) for x in x_T.tolist()]  # where it begins
    np.testing.assert_allclose([text.xy for text in ax.texts], x_T + 0.25)
    low, high = ax.get_ylim()
    assert low <= -1.5 and high >= 1.5  # no ball is cut


def test_slopes_join_the_two_numbers_of_a_name_and_write_them():
    ax = plot.plot_slopes({"steps": (0.2, 0.16), "ends": (0.7, 0.059)}, ("local", "global"))
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.2, 0.16], [0.7, 0.059]]
    written = [text.get_text() for text in ax.texts]
    assert written == ["0.200", "0.160  steps", "0.700", "0.059  ends"]
    assert ax.get_yscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["local", "global"]


@pytest.mark.parametrize("steps, limit", [(4, plot.CLIP), (40, 100.0)])
def test_colours_end_early_only_where_the_numbers_are_written(steps, limit):
    b = torch.ones(steps, 2)
    b[-1, 0] = 100
    (image,) = plot.plot_coefficients(SimpleNamespace(b=b)).images
    assert image.get_clim() == (-limit, limit)


def test_every_solver_grid_and_way_of_learning_has_a_name_and_a_look_of_its_own():
    assert {*SOLVERS, DPM_SOLVER_V3} <= {*plot.LOOKS}
    assert {*GRID_NAMES} <= {*plot.LOOKS}
    assert {*LEARN} <= {*plot.LOOKS}
    for names in (SOLVERS, GRID_NAMES, LEARN):
        found = plot.looks(names)
        assert len({tuple(look.values()) for look in found.values()}) == len(names)
        assert len({plot.display_name(name) for name in names}) == len(names)


def test_the_same_name_looks_the_same_in_all_pictures():
    color, marker, ls = plot.looks(["S4S-Alt"])["S4S-Alt"].values()
    rows = [{"nfe": 3, "method": m, "frechet": 2.0} for m in ("published", "iPNDM", "S4S-Alt")]
    drawn = [
        plot.plot_metric(rows, by="method").lines[2],
        plot.plot_slopes({"LD3": (1, 2), "alternating": (2, 1)}, ("a", "b")).lines[1],
    ]
    for line in drawn:
        assert (line.get_color(), line.get_marker(), line.get_linestyle()) == (color, marker, ls)
    dots = plot.plot_ranges(rows).axes[0].lines
    assert (color, marker) in [(line.get_color(), line.get_marker()) for line in dots]
    grid = GRIDS["logsnr"](SCHEDULE, 3)
    assert color in [line.get_color() for line in plot.plot_grid({"S4S-Alt": grid}).lines]


def test_a_name_takes_the_look_of_its_part_and_the_others_what_is_left():
    found = plot.looks(["ipndm, S4S", "S4S from iPNDM", "anything", "edm, 3"])
    blue = plot.looks(["coefficients"])["coefficients"]
    assert found["ipndm, S4S"] == blue
    assert found["S4S from iPNDM"]["color"] == blue["color"] and found["S4S from iPNDM"] != blue
    assert found["anything"]["color"] != blue["color"]
    assert found["edm, 3"] == plot.looks(["edm"])["edm"]
    assert plot.display_name("ipndm, S4S-Alt") == "iPNDM, S4S-Alt"
    assert plot.display_name("a, b") == "a, b"


@pytest.mark.parametrize("high", [2.6, 8.0, 60.0])
def test_a_short_logarithmic_axis_has_plain_decimals(high):
    rows = [{"nfe": n, "frechet": v, "solver": "ipndm"} for n, v in ((3, high), (4, 1.2))]
    ax = plot.plot_metric(rows)
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    labels = zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
    texts = [label.get_text() for label, at in labels if low < at < high]
    assert len(texts) >= 2 and not ax.get_yticks(minor=True).size
    assert [float(text) for text in texts]  # no powers of ten


def test_ranges_draw_mean_and_extremes_in_a_panel_for_each_number_of_calls():
    rows = [
        {"nfe": nfe, "grid": grid, "method": method, "seed": seed, "frechet": base * nfe + seed}
        for nfe in (5, 4)
        for method, base in (("published", 9.0), ("S4S", 2.0))
        for grid in ("edm", "logsnr")
        for seed in (0, 1, 5)
    ]
    rows += [{"nfe": nfe, "grid": "dmn", "method": "joint", "frechet": 1.0} for nfe in (4, 5)]
    figure = plot.plot_ranges(rows, by="grid", through=["joint"], label="Fréchet distance")
    left, right = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["4 calls", "5 calls"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["EDM", "logSNR"]
    assert figure.get_supxlabel() == "Fréchet distance"
    dots = [tuple(line.get_xydata()[0]) for line in left.lines if len(line.get_xdata()) == 1]
    assert sorted(dots) == [(10, 0), (10, 1), (38, 0), (38, 1)]
    bars = [tuple(line.get_xdata()) for line in left.lines if len(line.get_xdata()) == 2]
    assert {(8, 13), (36, 41), (10, 38), (1, 1)} == set(bars)
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["published", "S4S", "joint"]
    # A line of its own for each method needs no legend.
    assert plot.plot_ranges(rows).axes[-1].get_legend() is None


@pytest.mark.parametrize("channels", [1, 3])
def test_differences_of_images_are_drawn_around_white_on_a_scale_that_is_given(channels):
    x = torch.linspace(-0.5, 0.5, 2 * channels * 16).reshape(2, channels, 4, 4)
    (image,) = plot.show_images(x, rows=1, limit=0.25).images
    assert image.get_clim() == (0, 1) and image.get_cmap().name == "RdBu_r"
    drawn = image.get_array()[:, :4]
    expected = (x[0].mean(0).clip(-0.25, 0.25) / 0.25 + 1) / 2
    np.testing.assert_allclose(drawn, expected, atol=1e-6)
    np.testing.assert_array_equal(image.get_array()[:, 4], 0.5)


def test_a_picture_has_twice_the_pixels_of_its_size_and_says_what_it_shows():
    ax = plot.plot_metric(rows())
    ax.figure.set_size_inches(5, 3)
    width, height = 5 * 80, 3 * 80
    picture = plot.picture(ax, "two lines fall")
    data, shown = picture._repr_mimebundle_()
    assert not plt.get_fignums()
    assert shown["image/png"] == {"width": width, "height": height, "alt": "two lines fall"}
    pixels = plt.imread(io.BytesIO(picture.data))
    assert pixels.shape[:2] == (2 * height, 2 * width)
    colors = {tuple(pixel) for pixel in (pixels[..., :3] * 255).round().reshape(-1, 3).astype(int)}
    grey = matplotlib.colors.to_rgb(plot.looks(["ipndm"])["ipndm"]["color"])
    assert min(np.abs(np.array([*colors]) - 255 * np.array(grey)).max(1)) <= 3
    cropped = plot.picture(plot.plot_metric(rows()), "two lines fall", crop=True)
    assert cropped.width < 5.5 * 80 + 20


def test_nested_paths_are_thinner_one_by_one_so_that_paths_on_each_other_are_seen():
    grid = SimpleNamespace(schedule=SCHEDULE, t=SCHEDULE.t_of_s(torch.tensor([4.0, 2.0, 1.0])))
    path = grid, torch.arange(6.0).view(3, 1, 2)
    ax = plot.plot_trajectories(dict.fromkeys(["one", "two", "three"], path), nested=True)
    lines = [line for line in ax.lines if len(line.get_xdata()) == 3]
    widths = [line.get_linewidth() for line in lines]
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]
    assert [line.get_linestyle() for line in lines] == ["-", "-", ":"]


def test_a_curve_alone_has_no_legend():
    assert plot.plot_metric(rows()[:3]).get_legend() is None


def test_names_of_points_that_meet_are_written_one_after_the_other():
    there, other = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    points = {"UniPC 2": there, "UniPC 3": there, "iPNDM 2": other, "DDIM": [0.0, 0.0, 1.0]}
    ax = plot.plot_map({name: torch.tensor(vector) for name, vector in points.items()})
    assert [text.get_text() for text in ax.texts] == ["2, 3", "2"]
