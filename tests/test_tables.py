"""Tables of results: means over seeds, the best, and what is clear."""

import math

import pandas as pd
import pytest
import torch

from s4s_core import UsageError, interval
from s4s_core.experiments import tables
from s4s_core.experiments.experiment import DPM_SOLVER_V3, GRID_NAMES
from s4s_core.params import datasets
from s4s_core.published import SOLVERS


def runs(method: str, nfe: int, *values: float, spread: float = 0.1, **keys) -> list[dict]:
    """A row for each seed; the blocks of noise shift all rows alike, and by up to `spread` each."""
    return [
        {
            "method": method,
            "nfe": nfe,
            "seed": seed,
            "frechet": value,
            "frechet_blocks": [value - 1 + spread, value, value + 1 - spread * (seed + 1)],
            "seconds": 10.0 * nfe,
            **keys,
        }
        for seed, value in enumerate(values)
    ]


ROWS = [
    {"method": m, "order": k, "nfe": n, "seed": seed, "frechet": float(k + n + seed)}
    for m in ("S4S", "none") for k in (3, 4) for n in (4, 6) for seed in (0, 1)
    if (m, k, n) != ("none", 4, 4)
]  # fmt: skip


def test_a_table_shows_mean_and_half_range_and_dashes_where_nothing_ran():
    lines = str(tables.pivot(ROWS, index=("method", "order"))).splitlines()
    assert lines[0] == "| method | order | NFE 4 | NFE 6 |"
    assert lines[2] == "| S4S | 3 | 7.50 ± 0.50 | 9.50 ± 0.50 |"
    assert lines[-1] == "| none | 4 | - | 10.50 ± 0.50 |"
    assert len({line.count("|") for line in lines}) == 1


def test_where_there_are_several_sets_their_interval_takes_the_place_of_the_range():
    (row,) = runs("a", 4, 2.0, spread=0.0, n_sets=3)
    reach = 4.302653 / 3**0.5  # Student's t of two degrees of freedom; the sets differ by 1
    expected = f"| a | 2.00 ({2 - reach:.2f} to {2 + reach:.2f}) |"
    assert expected in tables.pivot([row], ("method",))
    beside = [row, *runs("b", 4, 5.0, 7.0)]  # as the paper's rows beside ours
    assert expected in tables.pivot(beside, ("method",))
    assert "| b | 6.00 ± 1.00 |" in tables.pivot(beside, ("method",))
    assert "| a | 40.00 |" in tables.pivot([row], ("method",), value="seconds")


def test_numbers_of_exploded_samples_are_short():
    rows = runs("a", 4, 6e17, 1e3) + runs("b", 4, 2.0)
    assert "| a | 3.0e+17 ± 3.0e+17 |" in tables.pivot(rows, ("method",))
    assert "4: 3.0e+17 against 2.000" in tables.cells_better(rows, "a", "b", "method", ("nfe",))


@pytest.mark.parametrize("others", [[], [float("inf")], [1.0]])
def test_a_cost_that_was_never_enough_has_no_range(others):
    rows = runs("a", 4, float("inf"), *others)
    assert "| a | inf |" in tables.pivot(rows, ("method",))


def test_compare_names_the_best_and_says_whether_the_difference_is_clear():
    wide = [row | {"frechet": 10 * row["order"] + row["seed"] / 100} for row in ROWS]
    lines = str(tables.compare(wide, by="order")).splitlines()
    assert "| S4S | 4 | 3 | 4 | 30.005 | 40.005 | -10.000 to -10.000 | yes |" in lines
    noisy = [row | {"frechet": row["frechet"] + row["order"] * row["seed"]} for row in ROWS]
    (line, *_) = [x for x in str(tables.compare(noisy, by="order")).splitlines() if "S4S" in x]
    assert line.startswith("| S4S | 4 | 3 | 4 | 9.000 | 10.500 | -") and line.endswith("| no |")
    assert not any(line.startswith("| none | 4 |") for line in lines)  # one order alone


def test_a_ranking_shows_all_settings_best_first_and_how_far_the_others_are_behind():
    rows = [*runs("a", 4, 2.0, 2.1), *runs("b", 4, 1.0), *runs("c", 4, 1.05), *runs("a", 5, 3.0)]
    ranked = tables.ranking(rows, {"frechet": 2, "seconds": 0})
    assert str(ranked).splitlines()[2:] == [
        "| 4 | b | 1.00 | 40 | - | - |",
        "| 4 | c | 1.05 | 40 | 0.05 to 0.05 | yes |",
        "| 4 | a | 2.05 | 40 | 0.81 to 1.25 | yes |",
        "| 5 | a | 3.00 | 50 | - | - |",
    ]
    noisy = [*runs("b", 4, 1.0, 1.3), *runs("c", 4, 1.05, 1.3)]
    *_, last = str(tables.ranking(noisy, {"frechet": 2})).splitlines()
    assert last.startswith("| 4 | c | 1.18 | -") and last.endswith("| no |")


def test_cells_better_counts_means_and_names_the_rest():
    rows = [
        row
        for grid, nfe, none, learned in [
            ("edm", 3, [4.0], [1.0, 1.1]),  # clear: each block and seed says so
            ("edm", 4, [4.0], [3.0, 4.5]),  # better on average, one seed is not
            ("dmn", 4, [2.0], [2.0, 2.5]),  # worse
            ("dmn", 6, [2.0], [4.0, 4.1]),  # clearly worse
            ("dmn", 5, [2.0], []),  # no pair
        ]
        for learn, values in (("none", none), ("coefficients", learned))
        for row in runs("", nfe, *values, grid=grid, solver="ipndm", learn=learn)
    ]
    text = tables.cells_better(rows, "coefficients", "none")
    assert text.splitlines() == [
        "frechet: better in 2 of 4 cells, clearly in 1, not in",
        "",
        "- dmn, ipndm, 4: 2.250 against 2.000",
        "- dmn, ipndm, 6: 4.050 against 2.000, clearly",
    ]
    assert "better in 2 of 2 cells, clearly in 1" in tables.cells_better(
        [row for row in rows if row["grid"] == "edm"], "coefficients", "none"
    )


def test_a_solver_is_never_clearly_better_than_itself():
    generator = torch.Generator().manual_seed(0)
    for seeds in (1, 3):
        values = torch.rand(seeds, generator=generator).tolist()
        same = [runs(name, 4, *values, spread=0.5) for name in "ab"]
        assert tables.difference(*same) == (0, 0)
        assert not tables.is_clearly_less(*same) and not tables.is_clearly_less(*same[::-1])
    # Relearned with other seeds it is another draw of the same thing: rarely clear, as 5 % are.
    count = 0
    for _ in range(400):
        seeds, blocks = (
            torch.randn(2, 3, 1, generator=generator),
            torch.randn(5, generator=generator),
        )
        noise = 0.3 * torch.randn(2, 3, 5, generator=generator)
        low, high = interval((0.3 * seeds + 10 * blocks + noise).diff(dim=0)[0])
        count += low > 0 or high < 0
    assert count <= 0.07 * 400


def test_an_interval_is_that_of_student_where_only_seeds_or_blocks_differ():
    values = torch.tensor([1.0, 2.0, 4.0])
    low, high = 7 / 3 - 4.302653 * math.sqrt(7 / 9), 7 / 3 + 4.302653 * math.sqrt(7 / 9)
    for table in (values[None], values[:, None]):
        assert interval(table) == pytest.approx((low, high), abs=1e-5)
    assert interval(values[:1, None]) == (-math.inf, math.inf)
    low, high = interval(values[:, None] + values[None])  # 4 degrees of freedom, twice the variance
    assert (high - low) / 2 == pytest.approx(2.776445 * math.sqrt(14 / 9), abs=1e-5)


def test_best_keeps_the_setting_of_the_smallest_mean_in_each_group():
    rows = runs("S4S", 4, 1.0, 5.0, grid="edm") + runs("S4S", 4, 2.0, 3.0, grid="dmn")
    rows += runs("S4S", 6, 1.0, grid="edm") + runs("LD3", 4, 9.0, grid="ld3")
    best = tables.best(rows, ("grid",))
    chosen = [(r["method"], r["nfe"], r["grid"], r["seed"]) for r in best.to_dict("records")]
    assert chosen == [
        ("S4S", 4, "dmn", 0),
        ("S4S", 4, "dmn", 1),
        ("S4S", 6, "edm", 0),
        ("LD3", 4, "ld3", 0),
    ]


def test_calls_to_match_takes_the_fewest_or_says_that_none_suffice():
    rows = (
        runs("BNS", 4, 5.0) + runs("BNS", 8, 3.0) + runs("LD3", 6, 2.0) + runs("LD3", 5, 1.0, 3.0)
    )
    rows += runs("Alt", 5, 1.5, 2.5) + runs("Alt", 3, 0.5)
    lines = str(tables.calls_to_match(rows, "Alt", 5)).splitlines()
    assert lines[0] == "| method | NFE | frechet | matches | seconds of learning |"
    assert lines[2:] == [
        "| Alt | 5 | 2.00 | yes | 50 |",
        "| BNS | 8 | 3.00 | no | 80 |",
        "| LD3 | 5 | 2.00 | yes | 50 |",
    ]
    with pytest.raises(ValueError, match="no runs of Alt with 4 calls"):
        tables.calls_to_match(rows, "Alt", 4)


def paper_rows(dataset: str, ranks: dict[int, list[str]]) -> pd.DataFrame:
    """Rows of a paper that ranks methods so, best first."""
    rows = [
        {"dataset": dataset, "method": m, "nfe": n, "frechet": float(i), "note": ""}
        for n, order in ranks.items()
        for i, m in enumerate(order)
    ]
    return pd.DataFrame(rows).sort_values("method", ascending=False)  # ranks are in the numbers


def test_agreement_counts_pairs_and_names_those_in_another_order():
    rows = runs("a", 4, 1.0, 2.0) + runs("b", 4, 2.5, 4.0) + runs("c", 4, 2.0, 3.0)
    rows += runs("a", 6, 5.0) + runs("b", 6, 4.0, spread=0.2)
    paper = paper_rows("ffhq", {4: ["a", "b", "c", "nowhere"], 6: ["a", "b"], 8: ["a", "b"]})
    assert tables.agreement(rows, paper).splitlines() == [
        "frechet: 2 of 4 pairs come in the paper's order, 1 clearly; the others do not",
        "",
        "- NFE 4: c 2.50 before b 3.25",
        "- NFE 6: b 4.00 before a 5.00, clearly",
    ]
    (sentence,) = tables.agreement(rows[:4], paper).splitlines()
    assert sentence == "frechet: 1 of 1 pairs come in the paper's order, 0 clearly"


def test_agreement_counts_each_dataset_of_the_paper_and_settings_of_several_columns():
    rows = [
        row | {"order": k}
        for k, value in ((3, 1.0), (4, 2.0))
        for row in runs("S4S", 4, value) + runs("none", 4, value + 3)
    ]
    third = paper_rows("ffhq", {4: ["S4S", "none"]}).assign(order=3)
    paper = pd.concat([third, third.assign(order=4), third.assign(dataset="cifar10")])
    text = tables.agreement(rows, paper, within=("order", "nfe"))
    assert [line for line in text.splitlines() if line] == [
        "frechet: 2 of 2 pairs come in the paper's order of ffhq, 2 clearly",
        "frechet: 1 of 1 pairs come in the paper's order of cifar10, 1 clearly",
    ]
    by_both = tables.agreement(rows, paper[:3], by=("method", "order"))
    assert by_both == "frechet: 3 of 3 pairs come in the paper's order, 3 clearly"


def test_agreement_names_no_more_pairs_than_can_be_read():
    names = [f"m{i}" for i in range(10)]
    rows = [row for i, name in enumerate(names) for row in runs(name, 4, float(-i))]
    lines = tables.agreement(rows, paper_rows("ffhq", {4: names})).splitlines()
    assert len(lines) == 2 + tables.SHOWN + 1
    assert lines[-1] == f"- and {45 - tables.SHOWN} more"


def test_the_papers_numbers_stand_below_ours_line_by_line_with_their_notes():
    rows = [row | {"dataset": "digits"} for row in runs("a", 4, 1.0, 2.0) + runs("b", 4, 3.0)]
    paper = paper_rows("ffhq", {4: ["c", "a"], 6: ["a"]})
    plain = str(tables.beside(rows, paper))
    assert plain.splitlines() == [
        "| method | dataset | NFE 4 | NFE 6 |",
        "| --- | --- | --- | --- |",
        "| a | digits | 1.50 ± 0.50 | - |",
        "| a | ffhq, paper | 1.00 | 0.00 |",
        "| b | digits | 3.00 | - |",
        "| c | ffhq, paper | 0.00 | - |",
    ]
    notes = {"a": "twice; doubtful", "c": "doubtful"}
    noted = str(tables.beside(rows, paper.assign(note=paper["method"].map(notes))))
    assert noted.removeprefix(plain).splitlines() == [
        "",
        "",
        "Notes on the paper's numbers:",
        "",
        "- all: doubtful",
        "- a, NFE 4, 6: twice",
    ]


# Cells and their sums, counted in the print by another way than the file was made.
PAPER = {2: (60, 837.98), 3: (24, 246.36), 4: (13, 86.41), 5: (19, 127.59), 6: (15, 73.71)}
PAPER |= {8: (12, 673.95), 9: (24, 576.21), 10: (24, 961.26), 11: (6, 273.11), 12: (13, 86.41)}
PAPER |= {13: (344, 11116.79), 14: (400, 23791.81), 15: (344, 13415.91)}
PAPER |= {16: (258, 5445.91), 17: (300, 17504.23), 18: (300, 7626.67)}


def test_every_number_of_the_papers_tables_is_there():
    for number, (count, total) in PAPER.items():
        found = tables.paper(number)
        assert len(found) == count, number
        assert math.isclose(found["frechet"].sum(), total, abs_tol=1e-6), number
    everything = tables.paper(*PAPER)
    names = ["table", "dataset", "grid", "solver", "method", "order", "nfe"]
    names += ["coefficients", "setting"]
    assert not everything.duplicated(names).any()
    assert set(everything["dataset"]) <= set(datasets())
    assert set(everything["grid"].dropna()) <= set(GRID_NAMES)
    assert set(everything["solver"].dropna()) <= {*SOLVERS, DPM_SOLVER_V3}


def test_the_papers_tables_agree_with_each_other_where_no_note_says_otherwise():
    cell = ["dataset", "grid", "solver", "method", "nfe"]
    full = tables.paper(*range(13, 19)).set_index(cell)["frechet"]
    selected, joint = tables.paper(2), tables.paper(6)
    selected = selected[selected["note"] == ""]
    assert len(selected) == 39
    names = {"S4S-Alt": "S4S-Alt", "iPNDM-S4S": "S4S", "iPNDM": "published"}
    joint = joint[joint["method"].isin(names)].replace({"method": names})
    for part in (selected, joint):
        assert list(full.loc[pd.MultiIndex.from_frame(part[cell])]) == list(part["frechet"])


def test_the_papers_rows_of_a_dataset_or_of_the_first_that_there_is():
    assert set(tables.paper(14, 15, dataset="ffhq")["table"]) == {15}
    assert set(tables.paper(15, 14, dataset="digits")["dataset"]) == {"ffhq"}
    assert "grid" not in tables.paper(12)
    for numbers in ((), (7,), ("3",)):
        with pytest.raises(UsageError, match="2, 3, 4, 5, 6, 8"):
            tables.paper(*numbers)
    with pytest.raises(UsageError, match="unknown dataset .ffqh"):
        tables.paper(3, dataset="ffqh")
