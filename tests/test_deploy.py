"""Solvers as numbers alone: equal to the loop, read back, and refused where they do not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import s4s_core as s4s
from s4s_core import (
    EDM,
    Coefficients,
    CompiledSolver,
    LearnedGrid,
    RectifiedFlow,
    Solver,
    SolverFamily,
    TimeGrid,
    VPDiscrete,
    VPLinear,
    VPTable,
    compile_solver,
)

ROOT = Path(__file__).parent.parent
N = 6
LEVELS = tuple(torch.linspace(0.9999, 0.005, 100, dtype=torch.float64).tolist())
SCHEDULES = {
    "EDM": EDM(),
    "VPLinear": VPLinear(),
    "VPDiscrete": VPDiscrete(),
    "VPTable": VPTable(1.0, 0.01, LEVELS),
    "RectifiedFlow": RectifiedFlow(shift=3.0),
}
WRAPS = {
    "epsilon": s4s.from_noise_prediction,
    "v_prediction": s4s.from_velocity,
    "sample": s4s.from_denoiser,
    "flow_prediction": s4s.from_flow,
}


def shaken(table, noise):
    """The same solver, its numbers moved as learning moves them."""
    moved = {
        name: w * (1 + 0.05 * noise(3, *w.shape))
        for name in ("b", "c", "a")
        if (w := getattr(table, name)) is not None and isinstance(table, Coefficients)
    }
    return replace(table, **moved)


def decoupled(grid):
    return TimeGrid(
        grid.schedule, grid.t, torch.cat([grid.t[:1], grid.t[1:-1] * 1.01, grid.t[-1:]])
    )


def free_first_call(grid):
    start = LearnedGrid.start_at(grid)
    return replace(start, first=torch.tensor(-0.5, dtype=torch.float64)).grid()


FAMILIES = {
    "ddim": lambda grid: (s4s.ddim(grid), grid),
    "ipndm": lambda grid: (s4s.ipndm(grid), grid),
    "dpm_solver_pp": lambda grid: (s4s.dpm_solver_pp(grid), grid),
    "corrector": lambda grid: (s4s.unipc(grid), grid),
    "states": lambda grid: (s4s.dpm_solver_pp(grid).pad(N, N), grid),
    "decoupled": lambda grid: (s4s.unipc(grid, prediction="noise"), decoupled(grid)),
    "free first call": lambda grid: (s4s.dpm_solver_pp(grid), free_first_call(grid)),
    "2S": lambda grid: (s4s.dpm_solver(grid, 2), decoupled(grid)),
    "3S": lambda grid: (s4s.dpm_solver(grid, 3, "data"), grid),
}


def solver_of(family, schedule, noise):
    steps = {"2S": N // 2, "3S": N // 3}.get(family, N)
    table, grid = FAMILIES[family](s4s.time_logsnr(schedule, steps))
    return Solver(shaken(table, noise), grid, {"guidance": 7.5})


def network(x, timestep):
    """An answer of size 1 that depends on all of x and on the time, in numpy or torch."""
    tanh = torch.tanh if isinstance(x, torch.Tensor) else np.tanh
    return tanh(0.7 * x + 0.3 + 0.2 * np.sin(timestep))


@pytest.mark.parametrize("prediction", WRAPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_alone_sample_as_the_solver_does(noise, family, schedule, prediction):
    levels = SCHEDULES[schedule]
    solver = solver_of(family, levels, noise)
    compiled = CompiledSolver.from_dict(json.loads(json.dumps(
        compile_solver(solver, prediction).to_dict()
    )))  # fmt: skip
    calls = []

    def counted(x, timestep):
        calls.append(timestep)
        return network(x, timestep)

    denoiser = WRAPS[prediction](lambda x, t: network(x, levels.network_time(t[0]).item()), levels)
    x_T = levels.sigma(levels.T) * noise(0, 8, 3, 4)
    expected = solver.sample(denoiser, x_T)
    for x in (compiled.sample(counted, x_T), compiled.sample(network, x_T.numpy())):
        error = (torch.as_tensor(x) - expected).abs().max() / expected.abs().max()
        assert error < 1e-12
    assert len(calls) == solver.nfe == compiled.nfe
    assert sum(map(len, compiled.table)) == N * (N + 3) // 2
    assert compiled.init_noise_sigma == levels.sigma(levels.T)


def test_a_file_runs_in_the_loop_of_the_readme(noise, tmp_path, monkeypatch):
    solver = solver_of("corrector", VPDiscrete(), noise)
    compiled = compile_solver(solver, "v_prediction")
    compiled.save(tmp_path / "compiled.json")
    assert CompiledSolver.load(tmp_path / "compiled.json") == compiled
    assert compiled.provenance == {"guidance": 7.5}
    (loop,) = re.findall(r"```py\n(c = .*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    names = {"json": json, "noise": noise(0, 5, 3).numpy(), "network": network}
    exec(loop, names)
    x = compiled.sample(network, compiled.init_noise_sigma * names["noise"])
    np.testing.assert_allclose(names["x"], x, rtol=1e-14)


def test_the_table_tells_methods_apart_and_finds_the_same_again(noise):
    grid = s4s.time_logsnr(VPDiscrete(), N)
    ddim, same, other = (
        compile_solver(Solver(table, grid))
        for table in (s4s.ddim(grid), s4s.dpm_solver_pp(grid, 1), s4s.ipndm(grid, 2))
    )
    flat = [np.concatenate(c.table) for c in (ddim, same, other)]
    np.testing.assert_allclose(flat[0], flat[1], rtol=1e-10, atol=1e-10)
    assert np.abs(flat[0] - flat[2]).max() > 0.1


def test_an_onnx_model_of_the_loop_with_a_network_inside(noise):
    compiled = compile_solver(solver_of("corrector", VPDiscrete(), noise), "v_prediction")
    weights = noise(5, 3, 3).float().numpy() / 2
    nodes, constants = [], {"weights": weights}

    def node(kind, *inputs):
        nodes.append(onnx.helper.make_node(kind, inputs, [f"{kind}_{len(nodes)}"]))
        return nodes[-1].output[0]

    def linear(kind, number, x):
        name = f"number_{len(constants)}"
        constants[name] = np.float32(number)
        return node(kind, name, x)

    class Name(str):
        """The name of a value in the graph: its arithmetic adds nodes."""

        shape = ()
        __rmul__ = __mul__ = lambda x, number: Name(linear("Mul", number, x))
        __add__ = __radd__ = lambda x, y: Name(
            node("Add", x, y) if isinstance(y, Name) else linear("Add", y, x)
        )

    def predict(x, timestep):
        return Name(node("Tanh", node("MatMul", Name(x) + timestep / 1000, "weights")))

    x_0 = compiled.sample(predict, Name("x_T"))
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3])
             for name in ("x_T", x_0)]  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = onnx.helper.make_graph(nodes, "loop", value[:1], value[1:], tensors)
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x_T = noise(0, 5, 3).numpy()
    (found,) = session.run(None, {"x_T": x_T.astype(np.float32)})
    expected = compiled.sample(lambda x, t: np.tanh((x + t / 1000) @ weights), x_T)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def with_pixels(name, noise):
    grid = s4s.time_logsnr(VPDiscrete(), N)
    table = s4s.ipndm(grid)
    tables = {
        "b": {"b": table.b[..., None, None].expand(-1, -1, 2, 2)},
        "l": {"l": torch.zeros(N, 2, 2)},
        "d": {"d": torch.zeros(N, 2)},
    }
    return Solver(replace(table, **tables[name]), grid)


@pytest.mark.parametrize("name", ["b", "l", "d"])
def test_tables_for_each_pixel_are_refused_by_name(noise, one_sentence, name):
    with one_sentence(f"({name}", "DPM-Solver-v3"):
        compile_solver(with_pixels(name, noise))


def test_another_prediction_or_shape_is_refused(noise, one_sentence):
    solver = solver_of("ipndm", VPDiscrete(), noise)
    with one_sentence("'eps'", "epsilon, flow_prediction, sample, v_prediction"):
        compile_solver(solver, "eps")
    with one_sentence("(2, 8)", "(2, 4)", "variance"):
        compile_solver(solver).sample(lambda x, t: np.concatenate([x, x], 1), np.ones((2, 4)))


DAMAGES = {
    "format": (lambda e: e.update(format="s4s-solver"), ["not a compiled solver", "s4s-compiled"]),
    "no object": (lambda e: [], ["not a compiled solver"]),
    "version": (lambda e: e.update(version=2), ["version 2", "reads version 1"]),
    "unknown": (lambda e: e.update(tabel=[]), ["'tabel'", "table"]),
    "missing": (lambda e: e.pop("scale"), ["lacks scale"]),
    "prediction": (lambda e: e.update(prediction_type="eps"), ["'eps'", "epsilon"]),
    "no times": (lambda e: e.update(timesteps=[], scale=[], table=[]), ["at least one"]),
    "no list": (lambda e: e.update(timesteps=3), ["timesteps must be a list", "3"]),
    "scales": (lambda e: e["scale"].pop(), ["scale", "length 6", "5"]),
    "rows": (lambda e: e["table"].pop(), ["6 rows", "5"]),
    "row": (lambda e: e["table"][2].pop(), ["row 2", "length 4", "3"]),
    "no row": (lambda e: e["table"].__setitem__(2, None), ["row 2", "None"]),
    "nan": (lambda e: e["table"][2].__setitem__(1, float("nan")), ["row 2", "finite", "nan"]),
    "text": (lambda e: e["timesteps"].__setitem__(0, "999"), ["timesteps", "'999'"]),
    "truth": (lambda e: e["scale"].__setitem__(0, True), ["scale", "True"]),
    "noise": (lambda e: e.update(init_noise_sigma=0.0), ["init_noise_sigma", "above 0"]),
    "story": (lambda e: e.update(provenance="me"), ["provenance", "me"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_compiled_file_is_told_in_one_sentence(noise, one_sentence, tmp_path, damage):
    change, words = DAMAGES[damage]
    entries = compile_solver(solver_of("ipndm", VPDiscrete(), noise)).to_dict()
    changed = change(entries)
    path = tmp_path / "solver.json"
    path.write_text(json.dumps(changed if damage == "no object" else entries))
    with one_sentence(str(path), *words):
        CompiledSolver.load(path)


def family_of(*nfes):
    grids = [s4s.time_logsnr(VPDiscrete(), nfe) for nfe in nfes]
    return SolverFamily(Solver(s4s.dpm_solver_pp(grid, 2), grid) for grid in grids)


def test_a_family_is_one_file_for_several_numbers_of_calls(tmp_path, one_sentence):
    family = family_of(6, 4, 5)
    family.save(tmp_path / "family.json")
    again = SolverFamily.load(tmp_path / "family.json")
    assert again == family and again.nfes == [4, 5, 6] and again[5].nfe == 5
    with one_sentence("7 network calls", "4, 5, 6"):
        again[7]
    again[5].save(tmp_path / "solver.json")
    assert SolverFamily.load(tmp_path / "solver.json") == SolverFamily([again[5]])


FAMILY_FAULTS = {
    "none": (lambda: SolverFamily([]), ["at least one"]),
    "twice": (lambda: family_of(4, 5, 4), ["4 network calls", "not 2"]),
    "schedules": (
        lambda: SolverFamily([*family_of(4).solvers, solver_on(EDM(), 5)]),
        ["share one noise schedule", "EDM", "5 network calls"],
    ),
    "format": (lambda: SolverFamily.from_dict({"format": "x"}), ["no solver", "s4s-family"]),
    "no object": (lambda: SolverFamily.from_dict([]), ["no solver", "s4s-solver"]),
    "version": (lambda: from_family(version=0), ["version 0", "reads version 1"]),
    "unknown": (lambda: from_family(extra=1), ["format, version and solvers", "extra"]),
    "no list": (lambda: from_family(solvers={}), ["solvers (a list)"]),
    "no solver": (lambda: from_family(solvers=[{}]), ["not a solver"]),
}


def solver_on(schedule, nfe):
    grid = s4s.time_logsnr(schedule, nfe)
    return Solver(s4s.ddim(grid), grid)


def from_family(**changes):
    return SolverFamily.from_dict(family_of(4).to_dict() | changes)


@pytest.mark.parametrize("fault", FAMILY_FAULTS)
def test_what_is_no_family_is_told_in_one_sentence(one_sentence, fault):
    make, words = FAMILY_FAULTS[fault]
    with one_sentence(*words):
        make()
