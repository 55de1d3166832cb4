"""Write the mixture, noises and compiled solvers into index.html, which shows them in a browser.

python explorable/build.py

A solver whose file in solvers/ was deleted is learned again first, which takes a minute at most.
"""

import json
from pathlib import Path
from typing import Any

import s4s_core as s4s

HERE = Path(__file__).parent
PAGE, SOLVERS = HERE / "index.html", HERE / "solvers"
OPENING = '<script id="data" type="application/json">'
NFE, ORDER, NOISES = 5, 3, 200
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "iPNDM": {},
    "S4S": {"learn": "coefficients"},
    "LD3": {"grid": "ld3"},
    "S4S-Alt": {"learn": "alternating", "grid": "ld3", "settings": {"phase_epochs": 2}},
    "joint": {"learn": "jointly", "grid": "dmn"},
}


def learn(name: str) -> s4s.Solver:
    """Learn a solver of EXPERIMENTS from three seeds, and return the nearest to the teacher."""
    settings = {"dataset": "mixture", "order": ORDER, "nfe": NFE, "seed": [0, 1, 2]}
    results = [s4s.run(e) for e in s4s.sweep(**settings | EXPERIMENTS[name])]
    return min(results, key=lambda result: result.distance_to_teacher).solver


def page() -> str:
    """Return index.html with the data that the package gives for the committed solver files."""
    setup = s4s.load("mixture")
    mixture = {name: getattr(setup.denoiser, name) for name in ("weights", "means", "stds")}
    solvers = {}
    for name in EXPERIMENTS:
        solver = s4s.Solver.load(SOLVERS / f"{name}.json")
        # Compiled for eps, whose weights are then the length of a step times the coefficients.
        compiled = s4s.compile_solver(solver, "epsilon").to_dict()
        solvers[name] = {"t": solver.grid.t.tolist(), "compiled": compiled | {"provenance": {}}}
    data = {
        "mixture": {name: value.tolist() for name, value in mixture.items()},
        "order": ORDER,
        "noises": s4s.initial_noise(setup, range(NOISES)).tolist(),
        "solvers": solvers,
    }
    before, opening, after = PAGE.read_text("utf-8").partition(OPENING)
    return before + opening + json.dumps(data) + after[after.index("</script>") :]


if __name__ == "__main__":
    for name in EXPERIMENTS:
        if not (path := SOLVERS / f"{name}.json").exists():
            learn(name).save(path)
    PAGE.write_text(page(), "utf-8")
