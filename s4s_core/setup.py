"""Setup: a model, and all that learning a solver for it needs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from .denoiser import Denoiser, conditioned
from .errors import UsageError
from .evaluate import FeatureStatistics, FeatureSums, feature_sums
from .grid import GRIDS
from .params import Params
from .published import count_steps, table_by_name
from .schedule import NoiseSchedule
from .solver import Solver


@dataclass(frozen=True)
class Setup:
    """A model and all that learning a solver for it needs; a model of your own is one of these.

    denoiser   D(x, t) -> x_0 estimate; schedule, shape (of one sample), params  as they say
    condition  seeds -> (B, ...), the classes or captions that go with the noises of these seeds;
               the denoiser is then D(x, t, condition). None: there are no conditions
    decode     x -> images (B, C, H, W) in [-1, 1], differentiable, where samples are latents
    features   decode(x) -> (B, F) for the Fréchet distance, and its name; only to measure it
    data       () -> real images, (n, ...) as decode gives them, or statistics of their features:
               the other side of that distance
    activations  decode(x) -> layers (B, C, H, W) of a network for the distance "features"
    weights    file name -> sha256, for each network behind these; none for closed forms
    """

    name: str
    denoiser: Denoiser
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    params: Params
    features: Callable[[Tensor], Tensor] | None = None
    features_name: str = ""
    data: Callable[[], Tensor | FeatureSums | FeatureStatistics] | None = None
    activations: Callable[[Tensor], Sequence[Tensor]] | None = None
    weights: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    condition: Callable[[Sequence[int]], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] = lambda x: x

    def variant(self, **changes: Any) -> "Setup":
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def denoiser_for(self, seeds: Sequence[int] | None) -> Denoiser:
        """Return D(x, t) for the samples of these seeds, each with the condition that is its own.

        Raises UsageError if the model has conditions and the seeds are not known (None).
        """
        if self.condition is None:
            return self.denoiser
        if seeds is None:
            raise UsageError(
                f"{self.name} has a condition for each seed: say which seeds these are"
            )
        return conditioned(self.denoiser, self.condition(seeds))

    @property
    def model(self) -> dict[str, Any]:
        """What tells this model from others, for the provenance of solvers: JSON."""
        return {"name": self.name, "guidance": self.params.guidance, "weights": self.weights}

    @cached_property
    def teacher(self) -> Solver:
        """The accurate solver that `params` name (Psi* of Alg. 1)."""
        p = self.params
        steps = count_steps(p.teacher_solver, p.teacher_order, p.teacher_nfe)
        grid = GRIDS[p.teacher_grid](self.schedule, steps)
        return Solver(table_by_name(p.teacher_solver, grid, p.teacher_order, p.unipc_variant), grid)

    def feature_sums(self, samples: Iterable[Tensor]) -> FeatureSums:
        """Return the sums of the features over batches of samples, (B, *shape) each."""
        if (features := self.features) is None:
            raise UsageError(f"{self.name} has no features or no data: give its Setup both")
        return feature_sums(lambda x: features(self.decode(x.to(self.device))), samples)

    @cached_property
    def reference(self) -> FeatureSums | FeatureStatistics:
        """Sums or statistics of the real data; UsageError if there are no features or no data."""
        if self.features is None or self.data is None:
            raise UsageError(f"{self.name} has no features or no data: give its Setup both")
        data = self.data()
        if not isinstance(data, Tensor):
            return data
        return feature_sums(self.features, data.to(self.device).split(1000))
