"""Files and arguments of strangers: one sentence or what they say, never a hang, never executed.

Good files are mutated by seed. A file that is read must say exactly what the object then says.
"""

import io
import json
import os
import random
import zipfile

import numpy as np
import pytest
import torch

import s4s_core as s4s
from s4s_core import UsageError
from s4s_core.errors import folder_from, write_atomically
from s4s_core.models.networks.checkpoint import open_checkpoint
from s4s_core.models.networks.latent import read_captions

EDM = s4s.EDM()
GRIDS = {n: s4s.time_edm(EDM, n) for n in (3, 5)}
SOLVERS = {n: s4s.Solver(s4s.unipc(grid, 2), grid, {"note": "x"}) for n, grid in GRIDS.items()}
JSON = {
    "solver": (s4s.Solver, SOLVERS[3]),
    "compiled": (s4s.CompiledSolver, s4s.compile_solver(SOLVERS[3])),
    "family": (s4s.SolverFamily, s4s.SolverFamily(SOLVERS.values())),
}
WEIGHTS = {"w": torch.arange(600.0), "b": torch.ones(7)}
VALUES = [True, False, None, "1", [], {}, -1, 1e308, 10**400, "x" * 1000, [1], -0.5, float("nan")]


def mutated_bytes(content: bytes, seed: int) -> bytes:
    """Some bytes flipped, cut out, doubled, zeroed, or all that follows cut off."""
    draw, data = random.Random(seed), bytearray(content)
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randrange(1, 64))
    match draw.randrange(5):
        case 0:
            data[start] ^= 1 << draw.randrange(8)
        case 1:
            del data[start:end]
        case 2:
            data[start:start] = data[start:end]
        case 3:
            data[start:end] = bytes(end - start)
        case _:
            del data[start:]
    return bytes(data)


def mutated_json(entries: dict, seed: int) -> bytes:
    """One entry, anywhere, replaced, left out or joined by an unknown one."""
    draw, entries = random.Random(seed), json.loads(json.dumps(entries))
    place, key = entries, draw.choice(list(entries))
    while isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.8:
        place = place[key]
        key = draw.choice([*place] if isinstance(place, dict) else range(len(place)))
    match draw.randrange(3):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place["unknown"] = draw.choice(VALUES)
        case _:
            place[key] = draw.choice(VALUES)
    return json.dumps(entries).encode()


def strict(entries: object) -> object:
    """JSON in which true is not 1, and 1 is 1.0."""
    if isinstance(entries, dict):
        return {key: strict(value) for key, value in entries.items()}
    if isinstance(entries, list):
        return [strict(value) for value in entries]
    return str(entries) if isinstance(entries, bool) else entries


def refused(read) -> bool:
    """Whether `read` is told in one short line; anything but a UsageError fails."""
    try:
        read()
    except UsageError as error:
        assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 600
        return True
    return False


@pytest.mark.parametrize("kind", JSON)
def test_a_changed_solver_file_is_refused_or_is_what_it_says(tmp_path, kind):
    cls, good = JSON[kind]
    text, path = json.dumps(good.to_dict()), tmp_path / "file.json"
    files = [mutated_json(good.to_dict(), seed) for seed in range(150)]
    files += [mutated_bytes(text.encode(), seed) for seed in range(60)]
    files += [(text[:-1] + f', "{key}": null' + "}").encode() for key in good.to_dict()]
    for content in files:
        path.write_bytes(content)
        found = []
        if not refused(lambda: found.append(cls.load(path))):  # noqa: B023
            told = json.loads(content)
            assert strict(found[0].to_dict()) == strict(told), content


def test_a_changed_checkpoint_is_refused_or_is_the_same(tmp_path):
    stream, path = io.BytesIO(), tmp_path / "model.ckpt"
    torch.save(WEIGHTS, stream)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ckpt", stream.getvalue())

    def read():
        with open_checkpoint(path) as weights:
            assert {*weights} == {*WEIGHTS}
            assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)

    for seed in range(60):
        for good in (stream, packed):
            path.write_bytes(mutated_bytes(good.getvalue(), seed))
            refused(read)


def test_changed_statistics_are_refused_or_are_the_same(tmp_path, noise):
    x, path = noise(0, 50, 6).numpy(), tmp_path / "statistics.npz"
    mean, covariance = x.mean(0), np.cov(x.T)
    for save in (np.savez, np.savez_compressed):
        save(path, mu=mean, sigma=covariance)
        good = path.read_bytes()
        for seed in range(60):
            path.write_bytes(mutated_bytes(good, seed))

            def read():
                found = s4s.read_reference(path)
                assert np.array_equal(found.mean, mean)
                assert np.array_equal(found.covariance, covariance)

            refused(read)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "pipe", "zero", "folder", "nowhere"])
def test_what_is_no_file_is_refused_by_all_that_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("/dev/zero", "zero")
    os.mkdir("folder")
    readers = [s4s.Solver.load, s4s.CompiledSolver.load, s4s.SolverFamily.load, s4s.read_params]
    readers += [s4s.networks.load_network, s4s.networks.load_edm, s4s.file_sha256, read_captions]
    for read in readers + ([] if name == "folder" else [s4s.read_reference]):
        assert refused(lambda: read(name))  # noqa: B023


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refused(lambda: SOLVERS[3].save(tmp_path / "pipe"))
    assert refused(lambda: write_atomically(tmp_path / "a\0b", b""))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("variable", ["S4S_HOME", "S4S_RESULTS"])
def test_the_home_of_nobody_is_told_in_one_sentence(monkeypatch, variable, one_sentence):
    monkeypatch.setenv(variable, "~nobody_of_this_name/x")
    with one_sentence(variable, "no such user"):
        folder_from(variable)
    assert refused(lambda: s4s.Experiment("cifar10").path())


def test_an_error_is_one_line_whatever_it_names():
    assert len(str(UsageError(f"there is no {'x' * 9000}\n  here"))) < 250
    assert refused(lambda: s4s.Params(schedule="EDM", shape=[2]).override(epoch=3))
    assert refused(lambda: s4s.Experiment("mixture", settings={None: 3}))


NUMBERS = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "x_T",
    [
        80 * NUMBERS[:0],
        (80 * NUMBERS).long(),
        NUMBERS > 0,
        80j * NUMBERS,
        (80 * NUMBERS).to_sparse(),
        (80 * NUMBERS).to("meta"),
        1e300 * NUMBERS,
    ],
    ids="empty whole bool complex sparse meta huge".split(),
)
def test_noise_that_is_none_is_refused(x_T):
    assert refused(lambda: SOLVERS[3].sample(lambda x, t: x, x_T))


@pytest.mark.parametrize("answer", [torch.Tensor.long, lambda x: 1j * x, lambda x: x.to("meta")])
def test_answers_that_are_no_floats_are_refused(answer, mixture):
    assert refused(lambda: SOLVERS[3].sample(lambda x, t: answer(x), 80 * NUMBERS))
    setup = mixture().variant(denoiser=lambda x, t: answer(x))
    grid = s4s.time_logsnr(setup.schedule, 3)
    solver, teacher = s4s.Solver(s4s.ipndm(grid, 2), grid), s4s.make_teacher_set(mixture())
    assert refused(lambda: [*s4s.learn_gauss_newton(solver, setup, teacher)])
    assert refused(lambda: s4s.check_denoiser(setup.denoiser, setup.schedule, (2,)))
    assert refused(lambda: SOLVERS[3].sample("x", NUMBERS))


@pytest.mark.parametrize(
    "pairs",
    [
        (NUMBERS.long(), NUMBERS, 3),
        (NUMBERS, NUMBERS[:5], 3),
        (NUMBERS, NUMBERS[:, :1], 3),
        (NUMBERS.numpy(), NUMBERS, 3),
        (NUMBERS, NUMBERS, 65),
        (NUMBERS, NUMBERS, 0),
        (NUMBERS, NUMBERS, -1),
        (NUMBERS, NUMBERS, 3.0),
        (NUMBERS, NUMBERS, 3, torch.arange(3)),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs):
    assert refused(lambda: s4s.TeacherSet(*pairs))


def test_learning_from_what_is_no_pair_of_the_model_is_refused(mixture):
    setup = mixture()
    grid = s4s.time_logsnr(setup.schedule, 3)
    solver, teacher = s4s.Solver(s4s.ipndm(grid, 2), grid), s4s.make_teacher_set(setup)
    scaled = s4s.TeacherSet(100 * teacher.x_T, teacher.x_0, teacher.n_train)
    for learn in (s4s.learn_coefficients, s4s.learn_times, s4s.learn_gauss_newton):
        for given in (
            (solver, setup, scaled),
            (grid, setup, teacher),
            (solver, setup, None),
            (solver, setup, s4s.TeacherSet(*teacher.train, teacher.n_train)),
        ):
            assert refused(lambda: [*learn(*given)])  # noqa: B023
        for seed in (-1, 0.5, None, 2**63, True):
            assert refused(lambda: [*learn(solver, setup, teacher, seed=seed)])  # noqa: B023


def test_what_is_no_experiment_is_not_run():
    for given in (None, 3, [3], {"a": 3}, {"a": [3]}):
        assert refused(lambda: s4s.run_all(given))  # noqa: B023
    assert refused(lambda: s4s.run(None)) and refused(lambda: s4s.run_all([], workers=0))


GRID = s4s.time_logsnr(s4s.EDM(), 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda wrong: s4s.Solver(wrong, GRID),
        lambda wrong: s4s.Solver(s4s.ddim(GRID), wrong),
        lambda wrong: s4s.TimeGrid(wrong, GRID.t),
        lambda wrong: s4s.SolverFamily([wrong]),
        lambda wrong: s4s.compile_solver(wrong),
        lambda wrong: s4s.initial_noise(wrong, [0]),
        lambda wrong: list(s4s.sample_batches(wrong, s4s.load("mixture"), [0])),
        lambda wrong: s4s.run(wrong),
        lambda wrong: s4s.run_all([wrong]),
        lambda wrong: s4s.frechet_distance(wrong, wrong),
        lambda wrong: s4s.GaussianMixture([0.5, 0.5], [[0.0], [wrong]], [1.0, 1.0], s4s.EDM()),
        lambda wrong: s4s.GaussianMixture([wrong], [[0.0]], [1.0], s4s.EDM()),
        lambda wrong: s4s.GaussianMixture([1.0], [[0.0]], [wrong], s4s.EDM()),
    ],
)
@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_another_object_is_told_in_one_sentence(call, wrong):
    assert refused(lambda: call(wrong))
