"""An interrupt while a solver is learned keeps the epochs so far and is told in one sentence."""

import re
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

import s4s_core as s4s
from s4s_core.experiments import run as run_module

LOST = r"\*_, .*learn|(list\(|\[\*)(s4s\.)?learn"  # an interrupt would leave nothing of these
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def epochs(setup, stop_at: int):
    """A learner whose user interrupts it while it works on epoch `stop_at`."""
    grid = s4s.time_logsnr(setup.schedule, 3)
    start, teacher = s4s.Solver(s4s.ddim(grid), grid), s4s.make_teacher_set(setup)
    for epoch in s4s.learn_coefficients(start, setup, teacher):
        if epoch.index == stop_at:
            raise KeyboardInterrupt
        yield epoch


def test_without_an_interrupt_all_epochs_are_collected(mixture, capsys):
    found = s4s.collect(epochs(mixture(epochs=3), stop_at=4))
    assert [epoch.index for epoch in found] == [0, 1, 2, 3]
    assert capsys.readouterr().out == ""


def test_an_interrupt_keeps_the_epochs_so_far(mixture, capsys):
    found = s4s.collect(epochs(mixture(epochs=3), stop_at=2))
    assert [epoch.index for epoch in found] == [0, 1]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "the 2 epochs so far" in said and "run this again" in said


def test_an_interrupt_before_the_first_epoch_has_nothing_to_keep(mixture, one_sentence):
    with one_sentence("before the first epoch", "run this again"):
        s4s.collect(epochs(mixture(), stop_at=0))


def test_a_second_interrupt_stops_everything(mixture, one_sentence, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with one_sentence("interrupted twice", "run this again"):
        s4s.collect(epochs(mixture(), stop_at=1))


def test_an_interrupt_of_several_runs_keeps_those_that_have_ended(
    tmp_path, monkeypatch, one_sentence
):
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path))
    todo = s4s.sweep({"fid_samples": 100}, dataset="mixture", nfe=[3, 4, 5])
    finish, asked = run_module.run, []

    def interrupted(experiment):
        asked.append(experiment.nfe)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return finish(experiment)

    monkeypatch.setattr(run_module, "run", interrupted)
    with one_sentence("1 of 3 runs have ended and are kept", "run this again"):
        s4s.run_all(todo, workers=1)
    assert [experiment.path().exists() for experiment in todo] == [True, False, False]
    assert s4s.run_all(todo, workers=1)["nfe"].tolist() == [3, 4, 5]


@pytest.mark.kernel
def test_the_stop_button_of_a_notebook_leaves_a_variable_and_one_sentence():
    cell = """
import s4s_core as s4s
setup = s4s.load("mixture")
grid = s4s.time_logsnr(setup.schedule, 3)
start, teacher = s4s.Solver(s4s.ddim(grid), grid), s4s.make_teacher_set(setup, 40, 20)

def told(epochs):
    for epoch in epochs:
        print("epoch", epoch.index, flush=True)
        yield epoch

history = s4s.collect(told(s4s.learn_coefficients(start, setup, teacher, epochs=100_000)))
"""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        printed, kinds = [], set()

        def hear(message):
            kinds.add(message["msg_type"])
            printed.append(message["content"].get("text", ""))
            if "epoch 2\n" in "".join(printed) and not hear.stopped:
                hear.stopped = True
                manager.interrupt_kernel()

        hear.stopped = False
        client.execute_interactive(cell, timeout=120, output_hook=hear)
        assert hear.stopped and "error" not in kinds
        lines = "".join(printed).splitlines()
        (sentence,) = [line for line in lines if not re.fullmatch(r"epoch \d+", line)]
        assert sentence.startswith("interrupted: what comes next goes on with the ")
        printed.clear()
        after = "print(history[-1].index, history[-1].best.nfe)"
        client.execute_interactive(after, timeout=60, output_hook=hear)
        index, nfe = map(int, "".join(printed).split())
        assert index >= 2 and nfe == 3 and f"the {index + 1} epochs" in sentence
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_collect_epochs_so_that_an_interrupt_keeps_them(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert not re.search(LOST, cell.source), cell.source
