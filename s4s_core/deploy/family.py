"""Solvers for several numbers of network calls: one file, or a folder as the Hub has it."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import (
    UsageError,
    first_line,
    optional_import,
    read_json,
    require,
    shown,
    write_atomically,
)
from ..schedule import NoiseSchedule
from ..solver import FORMAT as SOLVER_FORMAT
from ..solver import Solver

FORMAT, VERSION = "s4s-family", 1
IN_FOLDER = "solver_*.json"  # the files of a folder, one for each number of calls


@dataclass(frozen=True)
class SolverFamily:
    """Solvers for one model that differ in their number of network calls: family[5] makes five.

    Raises UsageError for none, for two of one number of calls, or for several noise schedules.
    """

    solvers: tuple[Solver, ...]

    def __init__(self, solvers: Iterable[Solver]):
        solvers = list(solvers)
        for solver in solvers:
            require("solver", solver, Solver)
        by_nfe = tuple(sorted(solvers, key=lambda solver: solver.nfe))
        object.__setattr__(self, "solvers", by_nfe)
        if not by_nfe:
            raise UsageError("a family needs at least one solver")
        for first, second in zip(by_nfe, by_nfe[1:], strict=False):
            if first.nfe == second.nfe:
                raise UsageError(f"a family holds one solver for {first.nfe} network calls, not 2")
            if first.grid.schedule != second.grid.schedule:
                raise UsageError(
                    f"the solvers of a family share one noise schedule, not {first.grid.schedule} "
                    f"with {first.nfe} and {second.grid.schedule} with {second.nfe} network calls"
                )

    def __getitem__(self, nfe: int) -> Solver:
        for solver in self.solvers:
            if solver.nfe == nfe:
                return solver
        raise UsageError(
            f"there is no solver for {shown(nfe)} network calls here, only for "
            f"{', '.join(map(str, self.nfes))}: choose one of these or learn one more"
        )

    @property
    def nfes(self) -> list[int]:
        """The numbers of network calls that there are solvers for, rising."""
        return [solver.nfe for solver in self.solvers]

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of all solvers."""
        return self.solvers[0].grid.schedule

    def to_dict(self) -> dict[str, Any]:
        """Return the file's contents as plain numbers, lists and strings."""
        solvers = [solver.to_dict() for solver in self.solvers]
        return {"format": FORMAT, "version": VERSION, "solvers": solvers}

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "SolverFamily":
        """Return the family that `to_dict` wrote; a solver is a family of one.

        Raises UsageError for anything else.
        """
        if isinstance(entries, dict) and entries.get("format") == SOLVER_FORMAT:
            return cls([Solver.from_dict(entries)])
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise UsageError(
                f"no solver and no family: a JSON object of format {SOLVER_FORMAT!r} or {FORMAT!r} "
                "is one"
            )
        version = entries.get("version")
        if type(version) is not int or version != VERSION:
            raise UsageError(
                f"family of version {shown(version)}, but this package reads version "
                f"{VERSION}: save it again with the package that is installed here"
            )
        if set(entries) != {"format", "version", "solvers"} or not isinstance(
            entries["solvers"], list
        ):
            raise UsageError(
                f"a family has the entries format, version and solvers (a list), not "
                f"{', '.join(map(str, entries)):.80}"
            )
        return cls(map(Solver.from_dict, entries["solvers"]))

    def save(self, path: str | Path) -> None:
        """Write all solvers into one readable JSON file, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "SolverFamily":
        """Read a file that `save` wrote, one solver, or a folder that `save_pretrained` wrote.

        Raises UsageError, naming the file, for others.
        """
        if not os.path.isdir(path):  # False, too, for what can be no path
            return read_json(path, "solver file", cls.from_dict)
        files = sorted(Path(path).glob(IN_FOLDER))
        if not files:
            raise UsageError(f"the folder {path} holds no solvers: there is no {IN_FOLDER} in it")
        return cls(map(Solver.load, files))

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "SolverFamily":
        """Read a folder that `save_pretrained` wrote, here or in a repository of the Hub.

        name      the folder, or the repository as in "user/my-solver"
        revision  of the repository: a branch, a tag or a commit

        Only solver files are downloaded, and nothing in them is executed. Raises UsageError for a
        repository that cannot be read or holds none.
        """
        if os.path.isdir(name):
            return cls.load(name)
        with optional_import("huggingface_hub", "a solver of the Hub"):
            from huggingface_hub import snapshot_download
        try:
            folder = snapshot_download(str(name), revision=revision, allow_patterns=IN_FOLDER)
        except (OSError, ValueError) as error:  # the Hub's own errors are of these kinds
            raise UsageError(
                f"{name} is no folder, and no repository of the Hub that can be read "
                f"({first_line(error)}): "
                "check its name and your connection"
            ) from None
        return cls.load(folder)
