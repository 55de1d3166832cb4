"""Where tasks are carried out: in this process, in others beside it, or on a cluster.

A `concurrent.futures.Executor` is the one seam. `carry_out` knows no more of it than `submit`.
"""

import multiprocessing
import os
import platform
import runpy
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from ..errors import UsageError, in_one_line, optional_import
from ..learn import LearningDivergedError
from .cache import method

Name = TypeVar("Name", bound=Hashable)
Task = tuple[Any, ...]  # a function that a worker can import, and its arguments
Plan = Generator[dict[Hashable, Task], list[Any], Any]


def carry_out(
    plans: Mapping[Name, Plan],
    executor: Executor,
    at_once: int,
    ended: Callable[[], Any] = lambda: None,
) -> tuple[dict[Name, Any], dict[Name, Exception]]:
    """Carry out every plan; return what each returned, and the errors of those that failed.

    plans    name -> generator of rounds, {key: (function, *arguments)}, that is sent the answers of
             each round. A key names one task, which is carried out once for all plans that ask for
             it. A task that fails is tried again once, unless it failed by a refusal or because
             learning diverged, and would do so again; then it fails the plans that ask for it alone
    at_once  plans that are under way at a time
    ended    called whenever a plan ends
    """
    values: dict[Name, Any] = {}
    errors: dict[Name, Exception] = {}
    tasks: dict[Hashable, Task] = {}
    answers: dict[Hashable, Any] = {}
    failed: dict[Hashable, Exception] = {}
    tried_again: set[Hashable] = set()
    asking: dict[Hashable, list[Name]] = defaultdict(list)
    rounds: dict[Name, list[Hashable]] = {}  # of the plans under way
    done: SimpleQueue[tuple[Hashable, Future]] = SimpleQueue()
    waiting = list(plans)[::-1]

    def submit(key: Hashable) -> None:
        function, *arguments = tasks[key]
        try:
            future = executor.submit(function, *arguments)
        except RuntimeError as error:  # the executor is broken or was shut down
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda future: done.put((key, future)))

    def advance(name: Name, got: list[Any] | None) -> None:
        """Send a plan the answers of its round, and submit the tasks of the next."""
        try:
            wanted = plans[name].send(got)  # type: ignore[arg-type]  # None begins a generator
        except StopIteration as stop:
            values[name] = stop.value
            return end(name)
        except Exception as error:
            return fail(name, error)
        rounds[name] = list(wanted)
        for key, task in wanted.items():
            asking[key].append(name)
            if key not in tasks:
                tasks[key] = task
                submit(key)
        look(name)

    def look(name: Name) -> None:
        """Let a plan go on if its round is over."""
        if wrong := [failed[key] for key in rounds[name] if key in failed]:
            fail(name, wrong[0])
        elif all(key in answers for key in rounds[name]):
            advance(name, [answers[key] for key in rounds[name]])

    def fail(name: Name, error: Exception) -> None:
        errors[name] = error
        plans[name].close()
        end(name)

    def end(name: Name) -> None:
        rounds.pop(name, None)
        ended()

    while waiting or rounds:
        while waiting and len(rounds) < at_once:
            advance(waiting.pop(), None)
        if not rounds:
            continue
        key, future = done.get()
        if (error := future.exception()) is None:
            answers[key] = future.result()
        elif isinstance(error, UsageError | LearningDivergedError) or key in tried_again:
            failed[key] = error if isinstance(error, Exception) else RuntimeError(repr(error))
        else:
            tried_again.add(key)
            submit(key)
            continue
        for name in asking.pop(key):
            if name in rounds:
                look(name)
    return values, {name: errors[name] for name in plans if name in errors}


class ThisProcess(Executor):
    """An executor that carries out a task in this process, when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Return a future that is done."""
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes(Executor):
    """An executor of single processes: one that dies takes its own task with it and no other.

    In one ProcessPoolExecutor it would take all that are under way or wait.
    """

    def __init__(self, workers: int):
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()  # each thread's process
        self._pools: list[ProcessPoolExecutor] = []
        self.under_way: set[Future] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future = self._threads.submit(self._in_process, fn, *args, **kwargs)
        self.under_way.add(future)
        future.add_done_callback(self.under_way.discard)
        return future

    def _in_process(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        pool = getattr(self._own, "pool", None)
        if pool is None:
            context = multiprocessing.get_context("spawn")  # forked children inherit torch's locks
            pool = self._own.pool = ProcessPoolExecutor(1, context, _begin_worker)
            self._pools.append(pool)
        try:
            return pool.submit(fn, *args, **kwargs).result()
        except BrokenProcessPool:
            self._own.pool = None
            raise RuntimeError(
                "its process died: killed, perhaps because the memory was full"
            ) from None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for pool in self._pools if wait else []:
            pool.shutdown()


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Yield an executor of so many processes of one thread each, which end with this block.

    After an error, or where the user interrupts, tasks that are under way are not waited for.
    """
    others = set(multiprocessing.active_children())
    executor = _Processes(workers)
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        while executor.under_way:  # one may have been starting a process just now
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            time.sleep(0.05)
        raise
    finally:
        executor.shutdown(cancel_futures=True)  # what only failed plans had asked for


def _begin_worker() -> None:
    """Use one thread, and exit when the parent dies: a killed kernel would leave workers."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None  # only workers come here

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def cluster(path: Path) -> Iterator[Executor]:
    """Yield the executor that a Python file configures with Parsl: `config = parsl.Config(...)`.

    Its workers end with this block, or soon after this process dies. Raises UsageError for a file
    that is not there or not right, and where the cluster does not start.
    """
    with optional_import("parsl", "S4S_EXECUTOR"):
        import parsl
        from parsl.concurrent import ParslPoolExecutor
    if not path.is_file():
        raise UsageError(f"S4S_EXECUTOR is {path}, and there is no such file: see cluster/")
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} does not run ({in_one_line(error):.300})") from error
    if not isinstance(config, parsl.Config):
        raise UsageError(f"{path} must define config = parsl.Config(...), as those in cluster/ do")
    with ExitStack() as stack:
        stack.enter_context(_programs_of_this_python())
        try:
            kernel = stack.enter_context(parsl.DataFlowKernel(config))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the cluster of {path} does not start ({reason:.300})") from error
        for executor in config.executors:
            if interchange := getattr(executor, "interchange_proc", None):
                stack.enter_context(_ending_with_this_process(interchange.pid))
        yield ParslPoolExecutor(dfk=kernel)


@contextmanager
def _programs_of_this_python() -> Iterator[None]:
    """Let Parsl find its own programs where no shell has activated the environment."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _ending_with_this_process(process: int) -> Iterator[None]:
    """End a process when this one dies, be it killed: Parsl's own would wait for ever.

    A helper reads from a pipe, which ends with this process.
    """
    code = f"import os, sys; sys.stdin.read(); os.kill({process}, 15)"
    helper = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        helper.kill()
        helper.communicate()


class Elsewhere(Executor):
    """An executor whose workers may be other machines: they look before they begin.

    A worker works in the results folder of this process, and refuses if it does not see it or has
    another version of the code.
    """

    def __init__(self, executor: Executor, results: Path, sign: Path):
        self._executor, self._told = executor, (str(results), str(sign), method())

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Submit a task to the workers."""
        return self._executor.submit(_on_worker, *self._told, fn, *args, **kwargs)


def _on_worker(results: str, sign: str, code: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Carry out a task for another process."""
    node = platform.node()
    if method() != code:
        raise UsageError(
            f"worker {node} has another version of s4s_core than the notebook: install the same"
        )
    if not Path(sign).exists():
        raise UsageError(
            f"worker {node} does not see what was written to {results} just now: set S4S_RESULTS "
            "to a folder that all machines share"
        )
    os.environ["S4S_RESULTS"] = results
    try:
        return fn(*args)
    except UsageError as error:
        raise UsageError(f"worker {node}: {error}") from error
