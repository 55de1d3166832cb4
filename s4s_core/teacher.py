"""The data-free data set: noise, and where an accurate solver takes it (Alg. 1, line 1)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError, halve_batch, progress, require, require_whole, shown
from .schedule import check_begins_in_noise
from .setup import Setup
from .solver import Solver

# Evaluation uses seeds from 0; every teacher set draws from its own million above them.
SEEDS_PER_SET, SEED_LIMIT = 1_000_000, 1000


def initial_noise(setup: Setup, seeds: Iterable[int]) -> Tensor:
    """Draw x_T ~ N(0, sigma(T)^2 I), (len(seeds), *setup.shape) float64 on the setup's device.

    Each sample comes from a generator of its own on the CPU, so a seed gives the same noise in
    any batch and on any device (Karras et al. 2022). Raises UsageError without seeds, and for a
    schedule at whose end signal is left.
    """
    require("setup", setup, Setup)
    require("seeds", seeds, Iterable)
    check_begins_in_noise(setup.schedule)
    draws = [
        torch.randn(setup.shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in seeds
    ]
    if not draws:
        raise UsageError("initial_noise needs at least one seed")
    return setup.schedule.sigma(setup.schedule.T).item() * torch.stack(draws).to(setup.device)


def sample_batches(
    solver: Solver, setup: Setup, seeds: Iterable[int], label: str = "sampling"
) -> Iterator[Tensor]:
    """Yield batches of samples (B, *setup.shape) in the order of the seeds, with a progress bar.

    A batch that does not fit into memory is halved, and so are those after it: but for rounding a
    sample does not depend on its batch.
    """
    require("solver", solver, Solver)
    require("setup", setup, Setup)
    seeds, size = list(seeds), setup.params.sample_batch_size
    with progress(total=len(seeds), desc=label) as bar:
        while seeds:
            batch = seeds[:size]
            try:
                x_0 = solver.sample(setup.denoiser_for(batch), initial_noise(setup, batch))
            except torch.OutOfMemoryError:
                size = halve_batch(len(batch), label)
                continue
            yield x_0
            seeds = seeds[size:]
            bar.update(len(batch))


@dataclass(frozen=True)
class TeacherSet:
    """Pairs (x_T, x_0 = Psi*(x_T)), each (n, *shape) on the CPU; the first n_train teach.

    `seeds` (n,) are those of the noises, and so of the conditions, if the model has any.
    The relaxed starts x'_T of Eq. 7 belong to a learning run, which begins them at x_T, so a set
    can be used again. Raises UsageError for tensors that do not fit each other, or are no floats,
    and for a set with no pair to teach.
    """

    x_T: Tensor
    x_0: Tensor
    n_train: int
    seeds: Tensor | None = None

    def __post_init__(self):
        for name in ("x_T", "x_0"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise UsageError(f"{name} must be a tensor of floats, not {shown(value)}")
        if self.x_T.shape != self.x_0.shape:
            raise UsageError(
                "x_T and x_0 must be pairs of one shape, not of shapes "
                f"{tuple(self.x_T.shape)} and {tuple(self.x_0.shape)}"
            )
        require_whole("n_train", self.n_train, 1, len(self.x_T))
        if self.seeds is not None and self.seeds.shape != self.x_T.shape[:1]:
            raise UsageError(
                f"seeds must be one a pair, {len(self.x_T)}, not of shape {tuple(self.seeds.shape)}"
            )

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """The pairs to learn from."""
        return self.x_T[: self.n_train], self.x_0[: self.n_train]

    @property
    def valid(self) -> tuple[Tensor, Tensor]:
        """The pairs that choose the best solver."""
        return self.x_T[self.n_train :], self.x_0[self.n_train :]


def make_teacher_set(
    setup: Setup, n_train: int | None = None, n_valid: int | None = None, seed: int = 0
) -> TeacherSet:
    """Return n_train + n_valid noises and the teacher's samples from them, (n, *shape) on the CPU.

    Raises UsageError for sizes that are no whole numbers, or too large for one set.
    Sizes are the setup's (params/) unless given. Sets of different `seed` share no noise, with
    each other or with seeds below a million.
    """
    n_train = setup.params.n_train if n_train is None else n_train
    n_valid = setup.params.n_valid if n_valid is None else n_valid
    require_whole("n_train", n_train, 1)
    require_whole("n_valid", n_valid, 1)
    require_whole("seed", seed, 0, SEED_LIMIT - 1)
    if n_train + n_valid > SEEDS_PER_SET:
        raise UsageError(
            f"n_train and n_valid must be together at most {SEEDS_PER_SET}, not {n_train} and "
            f"{n_valid}"
        )
    first = SEEDS_PER_SET * (seed + 1)
    seeds = range(first, first + n_train + n_valid)
    x_0 = torch.cat([x.cpu() for x in sample_batches(setup.teacher, setup, seeds, "teacher set")])
    return TeacherSet(initial_noise(setup, seeds).cpu(), x_0, n_train, torch.tensor(seeds))
