"""Tables of results: means over seeds, the best, and what is clear."""

import pytest

from s4s_core.experiments import tables


def runs(method: str, nfe: int, *values: float, **keys) -> list[dict]:
    return [
        {
            "method": method,
            "nfe": nfe,
            "seed": seed,
            "frechet": value,
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


def test_compare_names_the_best_and_says_whether_the_seeds_agree():
    wide = [row | {"frechet": 10 * row["order"] + row["seed"]} for row in ROWS]
    lines = str(tables.compare(wide, by="order")).splitlines()
    assert "| S4S | 4 | 3 | 4 | 30.500 | 40.500 | yes |" in lines
    overlapping = str(tables.compare(ROWS, by="order")).splitlines()
    assert "| S4S | 4 | 3 | 4 | 7.500 | 8.500 | no |" in overlapping
    assert not any(line.startswith("| none | 4 |") for line in lines)  # one order alone


def test_cells_better_counts_means_and_names_the_rest():
    rows = [
        {"learn": learn, "grid": grid, "solver": "ipndm", "nfe": nfe, "frechet": value}
        for grid, nfe, none, learned in [
            ("edm", 3, [4.0, 4.0], [1.0, 2.0]),  # clear
            ("edm", 4, [4.0], [3.0, 4.5]),  # better on average, one seed is not
            ("dmn", 4, [2.0], [2.0, 2.5]),  # worse
            ("dmn", 5, [2.0], []),  # no pair
        ]
        for learn, values in (("none", none), ("coefficients", learned))
        for value in values
    ]
    text = tables.cells_better(rows, "coefficients", "none")
    assert text.splitlines() == [
        "frechet: better in 2 of 3 cells, clearly in 1, not in",
        "",
        "- dmn, ipndm, 4: 2.250 against 2.000",
    ]
    assert "better in 2 of 2 cells, clearly in 1" in tables.cells_better(
        [row for row in rows if row["grid"] == "edm"], "coefficients", "none"
    )


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


def test_agreement_counts_pairs_and_names_those_in_another_order():
    rows = runs("a", 4, 1.0, 2.0) + runs("b", 4, 2.5, 4.0) + runs("c", 4, 2.0, 3.0)
    rows += runs("a", 6, 5.0) + runs("b", 6, 4.0)
    paper = {4: ["a", "b", "c", "nowhere"], 6: ["a", "b"], 8: ["a", "b"]}
    assert tables.agreement(rows, paper).splitlines() == [
        "frechet: 2 of 4 pairs come in the paper's order, 1 clearly; the others do not",
        "",
        "- NFE 4: c 2.50 before b 3.25",
        "- NFE 6: b 4.00 before a 5.00, clearly",
    ]
    (sentence,) = tables.agreement(rows[:4], paper).splitlines()
    assert sentence == "frechet: 1 of 1 pairs come in the paper's order, 1 clearly"
