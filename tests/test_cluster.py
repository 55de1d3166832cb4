"""Experiments on executors of every kind: what fails, is killed, is lost, and what is equal."""

import contextlib
import errno
import getpass
import os
import platform
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from filelock import FileLock
from test_experiment import TINY as FIRST_ORDER
from test_experiment import script

import s4s_core as s4s
from s4s_core import errors as errors_module
from s4s_core.experiments import executors as executors_module
from s4s_core.experiments import run as run_module
from s4s_core.experiments.executors import ThisProcess, carry_out, cluster, processes

ROOT = Path(__file__).parents[1]
TINY = FIRST_ORDER | {"learner": "gauss_newton"}
NUMBERS = ["frechet", "frechet_to_teacher", "thumbnails_to_teacher", "distance_to_teacher"]


def sweep(**choices) -> list[s4s.Experiment]:
    values = {"dataset": "mixture", "order": 2, "nfe": [3, 4], "learn": ["none", "coefficients"]}
    return s4s.sweep(TINY, **{**values, **choices})


# --- Plans -------------------------------------------------------------------------------------


def plan(*rounds, ends=None):
    """A plan of these rounds, that returns all answers."""
    answers = []
    for tasks in rounds:
        answers += yield tasks
    return answers


def fail(error):
    raise error


def test_a_task_that_several_plans_ask_for_is_carried_out_once():
    calls = []
    plans = {i: plan({"shared": (calls.append, 0)}, {i: (pow, i, 2)}) for i in range(5)}
    values, errors = carry_out(plans, ThisProcess(), at_once=2)
    assert values == {i: [None, i * i] for i in range(5)} and not errors and calls == [0]


@pytest.mark.parametrize("at_once", [1, 2, 64])
@pytest.mark.parametrize("threads", [0, 3])
def test_a_task_that_fails_takes_down_the_plans_that_ask_for_it_alone(at_once, threads):
    wrong = {"wrong": (fail, OSError("gone"))}
    plans = {
        i: plan({i: (int, i)}, wrong if i % 2 else {}, {(i, "last"): (int, i)}) for i in range(6)
    }
    executor = ThreadPoolExecutor(threads) if threads else ThisProcess()
    ended = []
    with executor:
        values, errors = carry_out(plans, executor, at_once, lambda: ended.append(1))
    assert values == {i: [i, i] for i in (0, 2, 4)} and set(errors) == {1, 3, 5}
    assert len(ended) == 6 and "gone" in str(errors[1])


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (RuntimeError("worker lost"), 2),
        (s4s.UsageError("no such file"), 1),
        (s4s.LearningDivergedError("not finite"), 1),
    ],
)
def test_what_would_fail_again_is_not_tried_again(error, tries):
    calls = []

    def task():
        calls.append(1)
        raise error

    values, errors = carry_out({"a": plan({"task": (task,)})}, ThisProcess(), 1)
    assert len(calls) == tries and errors == {"a": error} and not values


def test_a_task_that_fails_once_is_forgiven():
    left = [OSError("gone")]
    task = lambda: fail(left.pop()) if left else "done"  # noqa: E731
    assert carry_out({"a": plan({"task": (task,)})}, ThisProcess(), 1) == ({"a": ["done"]}, {})


def test_an_executor_that_takes_nothing_fails_the_plans():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    _, errors = carry_out({i: plan({i: (int,)}) for i in range(3)}, executor, 2)
    assert set(errors) == {0, 1, 2} and "shutdown" in str(errors[0])


# --- Shards ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_shards_are_one(monkeypatch, tmp_path):
    given = sweep(nfe=4, learn="coefficients", seed=0)[0]
    whole = s4s.run(given)
    for size in (7, 3):
        monkeypatch.setattr(run_module, "SHARD", size)
        monkeypatch.setenv("S4S_RESULTS", str(tmp_path / str(size)))
        again = s4s.run(given)
        assert again.solver == whole.solver
        for name, values in whole.blocks.items():
            assert again.blocks[name] == pytest.approx(values, rel=1e-9, abs=1e-9)
            assert getattr(again, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 2048, 5000])
@pytest.mark.parametrize("shard", [1, 3, 1000])
def test_shards_are_all_seeds_in_order_and_blocks_are_unions_of_them(monkeypatch, n, shard):
    monkeypatch.setattr(run_module, "SHARD", shard)
    blocks = run_module._blocks(s4s.load("mixture", fid_samples=n))
    assert [seed for block in blocks for part in block for seed in part] == list(range(n))
    assert [sum(map(len, b)) for b in blocks] == [
        len(b) for b in torch.arange(n).tensor_split(min(5, max(1, n // 2)))
    ]
    assert all(0 < len(part) <= shard for block in blocks for part in block)


def test_a_run_goes_on_with_the_shards_that_are_there(monkeypatch, results):
    (given,) = sweep(nfe=4, learn="coefficients", seed=0)
    drawn, sample_batches = [], run_module.sample_batches

    def failing(solver, setup, seeds, *label):
        drawn.append((solver.nfe, seeds))
        if seeds.start == 30 and solver.nfe == 4:
            raise MemoryError("no room")
        return sample_batches(solver, setup, seeds, *label)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "sample_batches", failing)
        with pytest.raises(MemoryError):
            s4s.run_all([given], workers=1)
    assert drawn.count((4, range(30, 40))) == 2  # tried again once
    assert drawn.count((4, range(40, 50))) == 1  # and the others are not held up
    kept = sorted(results.rglob("shard_*"))
    assert len(kept) == 4 and len(list(results.rglob("learned_*"))) == 1
    monkeypatch.setattr(run_module, "_learned", None)
    drawn.clear()
    monkeypatch.setattr(
        run_module,
        "sample_batches",
        lambda solver, setup, seeds, *label: (
            drawn.append(seeds) or sample_batches(solver, setup, seeds, *label)
        ),
    )
    s4s.run_all([given], workers=1)
    assert drawn == [range(30, 40)]
    left = {p.name.split("_")[0] for p in results.rglob("*.*") if p.is_file()}
    assert left == {"teacher", "result"}


@pytest.mark.slow
def test_the_memory_of_a_run_does_not_grow_with_its_samples(monkeypatch, tmp_path):
    peaks = []
    for n in (100, 1100):  # 96 KB each in float64, and twice that with the teacher's
        command = [sys.executable, ROOT / "tests/benchmarks/memory.py", str(n), "100", "500"]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        peaks.append(int(process.stdout.split(",")[-1]))
    assert peaks[1] - peaks[0] < 80, peaks


# --- Processes and Parsl -----------------------------------------------------------------------

JOBS = """
import os, signal, time
from pathlib import Path

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_once(mark):
    if not Path(mark).exists():
        Path(mark).touch()
        die()
    return "alive"

def refuse(mark):
    with open(mark, "a") as file:
        file.write(".")
    import s4s_core
    raise s4s_core.UsageError("edm-cifar10.pkl is not here: s4s fetch cifar10")

def gpu(seconds):
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]

def beat(path):
    while True:
        open(path, "a").write(".")
        time.sleep(0.05)
"""

CONFIG = """
from parsl import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

config = Config(
    executors=[
        HighThroughputExecutor(
            address="127.0.0.1", max_workers_per_node=2, available_accelerators=["0", "1"],
            heartbeat_period=1, heartbeat_threshold=6, poll_period=100,
            provider=LocalProvider(
                init_blocks=1, max_blocks=1, worker_init="export OMP_NUM_THREADS=1"
            ),
        )
    ],
    run_dir={run_dir!r},
)
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A module of functions that workers can import."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs.py").write_text(JOBS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.syspath_prepend(str(folder))
        import jobs

        yield jobs
    del sys.modules["jobs"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An executor file of two workers on this machine."""
    folder = tmp_path_factory.mktemp("parsl")
    (folder / "config.py").write_text(CONFIG.format(run_dir=str(folder / "logs")))
    return folder / "config.py"


@pytest.fixture(scope="module")
def parsl(jobs, config):
    """Two workers of Parsl on this machine, started once."""
    with cluster(config) as executor:
        yield executor


@pytest.fixture
def two_workers(request):
    """An executor by its name."""
    if request.param == "parsl":
        yield request.getfixturevalue("parsl")
        return
    request.getfixturevalue("jobs")
    with processes(2) as executor:
        yield executor


both = pytest.mark.parametrize("two_workers", ["processes", "parsl"], indirect=True)


@pytest.mark.slow
@both
def test_a_killed_worker_takes_no_other_task_with_it(two_workers, jobs, tmp_path):
    plans = {i: plan({i: (pow, i, 2)}) for i in range(8)}
    plans["once"] = plan({"once": (jobs.die_once, str(tmp_path / "mark"))})
    plans["always"] = plan({"always": (jobs.die,)})
    names = ["always", "once", *range(8)]
    values, errors = carry_out({name: plans[name] for name in names}, two_workers, 64)
    assert values == {"once": ["alive"]} | {i: [i * i] for i in range(8)}
    assert list(errors) == ["always"]


@pytest.mark.slow
@both
def test_what_a_worker_refuses_is_told_as_it_said_it_and_not_tried_again(
    two_workers, jobs, tmp_path
):
    plans = {"refused": plan({"refused": (jobs.refuse, str(tmp_path / "mark"))})}
    _, errors = carry_out(plans, two_workers, 64)
    assert isinstance(errors["refused"], s4s.UsageError)
    assert str(errors["refused"]) == "edm-cifar10.pkl is not here: s4s fetch cifar10"
    assert (tmp_path / "mark").read_text() == "."


@pytest.mark.slow
@both
def test_a_worker_killed_in_the_middle_of_a_sweep_costs_no_run(
    two_workers, jobs, results, tmp_path, monkeypatch
):
    pid = two_workers.submit(os.getpid).result()
    todo = sweep(nfe=[3, 4, 5])

    def kill():
        wait_for(lambda: any(results.rglob("learned_*")))
        os.kill(pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill)
        rows = s4s.run_all(todo, executor=two_workers)
        killed.result()
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "here"))
    here = s4s.run_all(todo, workers=1)
    columns = [name for name in here if name != "seconds"]
    assert rows[columns].equals(here[columns])


@pytest.mark.slow
def test_results_of_a_cluster_are_those_of_this_process(parsl, results, tmp_path, monkeypatch):
    experiments = [
        *sweep(),
        *sweep(grid="ld3", nfe=3),
        *sweep(solver="dpm_solver_v3", learn="none"),
    ]
    rows = s4s.run_all(experiments, executor=parsl)
    made = {p.name for p in results.rglob("*.*") if "parsl" not in p.parts and p.is_file()}
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "here"))
    here = s4s.run_all(experiments, workers=1)
    columns = [name for name in here if name != "seconds"]
    assert rows[columns].equals(here[columns])
    assert made - {".cluster.lock"} == {p.name for p in (tmp_path / "here").rglob("*.*")}


def test_each_worker_has_a_gpu_of_its_own(parsl, jobs):
    assert {f.result() for f in [parsl.submit(jobs.gpu, 2) for _ in range(2)]} == {"0", "1"}


@pytest.mark.slow
def test_interrupted_processes_end_at_once(jobs, tmp_path):
    beats = [tmp_path / name for name in ("first", "second", "third")]
    with pytest.raises(KeyboardInterrupt), processes(2) as executor:
        for path in beats:
            executor.submit(jobs.beat, str(path))
        wait_for(lambda: sum(path.exists() for path in beats) == 2)
        raise KeyboardInterrupt
    before = [path.stat().st_size for path in beats if path.exists()]
    time.sleep(0.5)
    assert [path.stat().st_size for path in beats if path.exists()] == before and len(before) == 2


def wait_for(condition, seconds: float = 100):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def workers_of(results: Path) -> list[psutil.Process]:
    """The processes that were started for a results folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("S4S_RESULTS") == str(results):
                found.append(process)
        except psutil.Error:  # it has ended, or is not ours
            pass
    return found


def test_the_executor_of_the_environment_is_used(monkeypatch, config):
    @contextlib.contextmanager
    def recorded(path):
        used.append(path)
        yield ThisProcess()

    used = []
    monkeypatch.setattr(run_module, "cluster", recorded)
    monkeypatch.setenv("S4S_EXECUTOR", str(config))
    s4s.run_all(sweep(nfe=3, learn="none"))
    assert used == [config]
    s4s.run_all(sweep(nfe=3, learn="none"))  # nothing is missing, nothing is started
    s4s.run_all(sweep(nfe=4, learn="none"), workers=1)
    assert used == [config]


# --- What goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such file", "cluster/"]),
        ("", ["must define config = parsl.Config"]),
        ("config = 3", ["must define config = parsl.Config"]),
        ("config = parsl.Config(", ["does not run", "SyntaxError"]),
        ("config = parsl.Config()", ["does not run", "NameError"]),
        ("import parsl\nconfig = parsl.Config(executors=3)", ["does not run"]),
        ("raise SystemExit(3)", ["does not run", "SystemExit"]),
    ],
)
def test_a_wrong_executor_file_is_told_in_one_sentence(
    one_sentence, monkeypatch, tmp_path, text, words
):
    path = tmp_path / "executor.py"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("S4S_EXECUTOR", str(path))
    with one_sentence(str(path), *words):
        s4s.run_all(sweep())


def test_a_cluster_without_parsl_names_the_package(one_sentence, monkeypatch, config):
    monkeypatch.setitem(sys.modules, "parsl", None)
    with one_sentence("S4S_EXECUTOR", "pip install parsl"), cluster(config):
        pass


def test_workers_and_an_executor_exclude_each_other(one_sentence):
    with one_sentence("workers"):
        s4s.run_all(sweep(), workers=2, executor=ThisProcess())


class Stranger(ThisProcess):
    """A worker that is somewhere else in one respect."""

    def __init__(self, monkeypatch, target, name, value):
        self.change = lambda patch: patch.setattr(target, name, value)
        self.monkeypatch = monkeypatch

    def submit(self, fn, /, *args):
        with self.monkeypatch.context() as patch:
            self.change(patch)
            return super().submit(fn, *args)


def no_file(*_):
    raise s4s.UsageError("edm-cifar10.pkl is not here: s4s fetch cifar10")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((executors_module, "method", lambda: "other"), ["another version of s4s_core"]),
        ((Path, "exists", lambda path: False), ["does not see", "S4S_RESULTS"]),
        ((run_module, "_setup", no_file), ["edm-cifar10.pkl is not here", "s4s fetch cifar10"]),
    ],
)
def test_a_worker_that_is_not_fit_says_so_in_one_line_for_each_run(monkeypatch, change, words):
    with pytest.raises(s4s.RunsFailedError) as error:
        s4s.run_all(sweep(), executor=Stranger(monkeypatch, *change))
    first, *lines = str(error.value).splitlines()
    assert first.startswith("4 of 4 runs failed") and len(lines) == 4
    assert all("- mixture logsnr ipndm order 2 nfe" in line for line in lines)
    assert all(word in lines[0] for word in ["worker ", *words])
    assert all(line.endswith(": the same") for line in lines[1:])


def test_a_full_disk_fails_what_does_not_fit_and_nothing_is_lost(monkeypatch, results):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opening(path, *mode):
        file = open(path, *mode)
        return Full(file) if ".result" in Path(path).name else file

    with monkeypatch.context() as patch:
        patch.setattr(errors_module, "open", opening, raising=False)
        with pytest.raises(s4s.RunsFailedError, match="No space left on device.*make room"):
            s4s.run_all(sweep(), executor=ThisProcess())
    assert len(list(results.rglob("learned_*"))) == 4
    monkeypatch.setattr(run_module, "_learned", None)
    assert len(s4s.run_all(sweep(), workers=1)) == 4


def test_two_clusters_on_one_folder_are_told(results, capsys):
    results.mkdir()
    with FileLock(results / ".cluster.lock"):
        rows = s4s.run_all(sweep(), executor=ThisProcess())
    (line,) = capsys.readouterr().err.splitlines()
    assert "another notebook has a cluster at work" in line and "nothing is lost" in line
    assert len(rows) == 4


def test_threads_of_one_process_learn_what_one_thread_learns(tmp_path, monkeypatch):
    rows = []
    for threads in (1, 3):
        monkeypatch.setenv("S4S_RESULTS", str(tmp_path / str(threads)))
        with ThreadPoolExecutor(threads) as pool:
            rows.append(s4s.run_all(sweep(grid=["edm", "logsnr"]), executor=pool))
    one, three = (found.drop(columns="seconds") for found in rows)
    assert one.equals(three)


@pytest.mark.slow
def test_two_notebooks_at_work_on_one_folder_end_with_the_same_results(results):
    code = f"""
import s4s_core as s4s
from s4s_core.experiments.executors import ThisProcess

todo = s4s.sweep({TINY!r}, dataset="mixture", order=2, nfe=[3, 4], learn="coefficients")
print(s4s.run_all(todo, executor=ThisProcess()).drop(columns="seconds").to_json())
"""
    started = [script(results, code) for _ in range(2)]
    told = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert told[0][0] == told[1][0] and "distance_to_teacher" in told[0][0]


@pytest.mark.slow
def test_the_shipped_file_for_a_laptop_carries_out_a_sweep(results, tmp_path, monkeypatch):
    monkeypatch.setenv("S4S_EXECUTOR", str(ROOT / "cluster" / "laptop.py"))
    rows = s4s.run_all(sweep(nfe=3))
    assert (results / "parsl").is_dir()
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "here"))
    here = s4s.run_all(sweep(nfe=3), workers=1)
    columns = [name for name in here if name != "seconds"]
    assert rows[columns].equals(here[columns])


@pytest.mark.parametrize("name", ["laptop", "slurm", "kubernetes"])
def test_shipped_executor_files_are_configurations(name, monkeypatch):
    import parsl
    from parsl.providers.kubernetes import kube

    for attribute, value in (
        ("_kubernetes_enabled", True),
        ("config", SimpleNamespace(load_kube_config=lambda: None)),
        ("client", SimpleNamespace(CoreV1Api=lambda: None)),
    ):
        monkeypatch.setattr(kube, attribute, value, raising=False)
    found = runpy.run_path(str(ROOT / "cluster" / f"{name}.py"))["config"]
    assert isinstance(found, parsl.Config) and found.executors[0].heartbeat_threshold <= 60
    assert found.run_dir == str(s4s.results_folder() / "parsl")


# --- SLURM, and killed notebooks ---------------------------------------------------------------

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other}
AuthType=auth/none
CredType=cred/none
PluginDir={plugins}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 \
ThreadsPerCore=1 RealMemory=16000
PartitionName=debug Nodes=ALL Default=YES OverSubscribe=NO
"""


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens to just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def slurm(jobs, tmp_path, monkeypatch):
    """A SLURM of one node, which needs no root, no services and no munge."""
    programs = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "squeue", "scancel", "sinfo")
    if lacking := [name for name in programs if not shutil.which(name)]:
        pytest.skip(f"needs SLURM (Debian: slurmctld slurmd slurm-client) without {lacking}")
    root = Path(shutil.which("slurmctld")).parents[1]
    host, ports = platform.node().partition(".")[0], free_ports(2)
    (tmp_path / "state").mkdir()
    (tmp_path / "spool").mkdir()
    text = SLURM_CONF.format(
        host=host, port=ports[0], other=ports[1], user=getpass.getuser(), folder=tmp_path,
        plugins=next(p.parent for p in (root / "lib").rglob("select_cons_tres.so")),
    )  # fmt: skip
    (tmp_path / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    step = ["-N", host, "-d", shutil.which("slurmstepd")]
    daemons = []
    with open(tmp_path / "log", "w") as log:
        try:
            for command in (["slurmctld", "-c", "-D"], ["slurmd", "-D", *step]):
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(2)

            def idle():
                assert all(d.poll() is None for d in daemons), (tmp_path / "log").read_text()
                shown = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
                return shown.stdout.strip() == "idle"

            wait_for(idle, 60)
            yield
        finally:
            for daemon in daemons:
                daemon.terminate()
                daemon.wait()


SLURM_CONFIG = """
from parsl import Config
from parsl.executors import HighThroughputExecutor
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

config = Config(
    executors=[
        HighThroughputExecutor(
            address="127.0.0.1", max_workers_per_node=1, heartbeat_period=1, heartbeat_threshold=6,
            provider=SlurmProvider(
                partition="debug", init_blocks=2, max_blocks=2, cores_per_node=1, mem_per_node=1,
                exclusive=False, worker_init="export OMP_NUM_THREADS=1", launcher=SimpleLauncher(),
            ),
        )
    ],
    run_dir={run_dir!r},
)
"""


@pytest.mark.slow
def test_on_slurm_a_killed_worker_is_replaced_and_results_are_the_same(
    slurm, jobs, results, tmp_path, monkeypatch
):
    (tmp_path / "executor.py").write_text(SLURM_CONFIG.format(run_dir=str(tmp_path / "logs")))
    with cluster(tmp_path / "executor.py") as executor:
        plans = {"always": plan({"always": (jobs.die,)})}
        plans["once"] = plan({"once": (jobs.die_once, str(tmp_path / "mark"))})
        plans |= {i: plan({i: (pow, i, 2)}) for i in range(8)}
        values, errors = carry_out(plans, executor, 64)
        assert values == {"once": ["alive"]} | {i: [i * i] for i in range(8)}
        assert list(errors) == ["always"]
        rows = s4s.run_all(sweep(nfe=3), executor=executor)
    jobs_left = lambda: subprocess.check_output(["squeue", "-h"])  # noqa: E731
    wait_for(lambda: not jobs_left(), 60)
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "here"))
    here = s4s.run_all(sweep(nfe=3), workers=1)
    columns = [name for name in here if name != "seconds"]
    assert rows[columns].equals(here[columns])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "slurm"])
def test_no_worker_of_a_cluster_outlives_a_killed_notebook(where, request, jobs, results, tmp_path):
    if where == "slurm":
        request.getfixturevalue("slurm")
    config = tmp_path / "executor.py"
    text = CONFIG if where == "here" else SLURM_CONFIG
    config.write_text(text.format(run_dir=str(tmp_path / "logs")))
    code = "import jobs\nfrom pathlib import Path\n"
    code += "from s4s_core.experiments.executors import cluster\n"
    code += f"with cluster(Path({str(config)!r})) as executor:\n"
    code += f"    executor.submit(jobs.beat, {str(tmp_path / 'beats')!r}).result()\n"
    others = set(workers_of(results))  # SLURM's own
    notebook = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        wait_for((tmp_path / "beats").exists)
        assert len(set(workers_of(results)) - others) >= 4  # it, Parsl's two and a worker, at least
    finally:
        notebook.kill()
        notebook.wait()
    wait_for(lambda: set(workers_of(results)) <= others, 60)
