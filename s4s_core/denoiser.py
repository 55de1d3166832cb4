"""Any network becomes a denoiser: D(x, t) -> an estimate of x_0, like x.

t is a float64 scalar tensor on the CPU (its gradient reaches the decoupled times). A denoiser may
carry its `schedule`; a solver made for another schedule then refuses it.
"""

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .errors import UsageError, first_line
from .schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
# What a network is to this package: called with x (B, ...), t (B,) and perhaps a condition.
Network = Callable[..., Tensor]
_FORWARD_MODE = threading.RLock()


@contextmanager
def forward_mode() -> Iterator[None]:
    """Let one thread take forward derivatives, with an attention that has them on every device.

    torch's levels of these derivatives are the process's, and its threads would mix them up.
    """
    with _FORWARD_MODE, sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own
        yield


class _Denoiser:
    """A function with its noise schedule, and with what tells its model from others."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        schedule: NoiseSchedule | None,
        model: dict[str, Any] | None = None,
    ):
        self.function, self.model = function, model
        if schedule is not None:
            self.schedule = schedule

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _in_place_of(denoiser: Callable[..., Tensor], function: Callable[..., Tensor]) -> Denoiser:
    """The function as a denoiser of the same model on the same noise schedule."""
    own = (getattr(denoiser, name, None) for name in ("schedule", "model"))
    return _Denoiser(function, *own)


def of_model(denoiser: Callable[..., Tensor], model: dict[str, Any]) -> Denoiser:
    """Return the same denoiser, which carries what tells its model from others as `.model`.

    A solver that was learned for another one then warns (see Setup.model).
    """
    return _Denoiser(denoiser, getattr(denoiser, "schedule", None), model)


def _fitted(network: Network) -> Network:
    """The same network, asked and answering as this package does; see from_denoiser."""

    def ask(x: Tensor, times: Tensor, *condition: Any, **named: Any) -> Tensor:
        like = x
        if isinstance(network, torch.nn.Module):
            numbers = itertools.chain(network.parameters(), network.buffers())
            like = next((n for n in numbers if n.is_floating_point()), x)
        # In half precision there is no 999.
        kind = torch.promote_types(like.dtype, torch.float32)
        times = times.to(like.device, kind, non_blocking=True)
        answer = network(x.to(like.device, like.dtype), times, *condition, **named)
        answer = answer[0] if isinstance(answer, tuple) else getattr(answer, "sample", answer)
        return answer.to(x) if isinstance(answer, Tensor) else answer

    return ask


def _asked(network: Network, x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
    """The network's answer for all of x (B, ...) at the one time t, like x."""
    times = torch.as_tensor(t).to(x.device, non_blocking=True).expand(len(x))
    return _fitted(network)(x, times, *condition)


def from_denoiser(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> x_0.

    A torch module gets x and t on the device and in the dtype of its weights (t in float32 at
    least); a function gets them as they are, in float64. The answer may be a tensor, a tuple that
    begins with it or an object that has it as `sample`. What follows x and t, a condition, is
    passed on to the network. All that holds for the functions below, too.
    """
    return _Denoiser(partial(_asked, network), schedule)


def from_noise_prediction(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> eps: D = (x - sigma eps) / alpha."""

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        eps = _asked(network, x, t, *condition)
        return (x - schedule.sigma(t) * eps) / schedule.alpha(t)

    return _Denoiser(denoise, schedule)


def from_velocity(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> v = alpha eps - sigma x_0.

    D = (alpha x - sigma v) / (alpha^2 + sigma^2) (Salimans & Ho 2022). What flow matching calls
    velocity is another quantity: `from_flow`.
    """

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        v = _asked(network, x, t, *condition)
        return (alpha * x - sigma * v) / (alpha**2 + sigma**2)

    return _Denoiser(denoise, schedule)


def from_flow(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> eps - x_0.

    On RectifiedFlow that is the velocity dx/dsigma. D = (x - sigma (eps - x_0)) / (alpha + sigma).
    Where time runs from noise to data (Lipman et al. 2023), give the network 1 - t and turn the
    sign of its answer.
    """

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (x - sigma * _asked(network, x, t, *condition)) / (alpha + sigma)

    return _Denoiser(denoise, schedule)


def guided(
    network: Network, conditional: dict[str, Any], unconditional: dict[str, Any], scale: float
) -> Network:
    """Return u + scale (c - u), classifier-free guidance (Ho & Salimans 2021), as a network.

    network(x (B, ...), t (B,), **condition) with two conditions: dicts of the same names, whose
    tensors have one row, or one row a sample; what is no tensor, a number or None, is the same in
    both. Both answers come from one call of 2B rows, the unconditional first, and count as one
    network call (NFE); at scale 1 there is only the conditional one. Raises UsageError for
    conditions that do not fit.
    """
    if scale != 1 and (odd := _unlike(conditional, unconditional)):
        raise UsageError(
            f"guidance needs both conditions alike, and {', '.join(odd)} differ: give both the "
            "same names, tensors under the same ones, and equal values elsewhere"
        )
    ask = _fitted(network)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        n = len(x)
        told = {k: _rows(k, v, n) for k, v in conditional.items()}
        if scale == 1:
            return ask(x, t, **told)
        both = {
            k: torch.cat([_rows(k, unconditional[k], n), v]) if isinstance(v, Tensor) else v
            for k, v in told.items()
        }
        # A time that all samples share stays one, which a network need embed only once.
        times = t[:1].expand(2 * n) if t.stride(0) == 0 else torch.cat([t, t])
        u, c = ask(torch.cat([x, x]), times, **both).chunk(2)
        return u + scale * (c - u)

    return predict


def _unlike(conditional: dict[str, Any], unconditional: dict[str, Any]) -> list[str]:
    """The names under which two conditions cannot be put into one call."""
    odd = conditional.keys() ^ unconditional.keys()
    for name in conditional.keys() & unconditional.keys():
        c, u = conditional[name], unconditional[name]
        tensors = isinstance(c, Tensor) + isinstance(u, Tensor)
        odd |= {name} if tensors == 1 or (tensors == 0 and c != u) else set()
    return sorted(odd)


def _rows(name: str, value: Any, n: int) -> Any:
    """A condition of n samples."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 or len(value) not in (1, n):
        raise UsageError(
            f"the condition {name} has shape {tuple(value.shape)} for {n} samples: give it one "
            "row for all of them, or one for each"
        )
    return value.expand(n, *value.shape[1:])


def conditioned(denoiser: Callable[..., Tensor], condition: Tensor) -> Denoiser:
    """Return D(x, t) = denoiser(x, t, condition) for x (B, ...), condition (B, ...)."""
    return _in_place_of(denoiser, lambda x, t: denoiser(x, t, condition))


def rescheduled(denoiser: Callable[..., Tensor], schedule: NoiseSchedule) -> Denoiser:
    """Return the same denoiser on another noise schedule: D depends on y = x / alpha and s alone.

    Raises UsageError for a denoiser that does not carry its own schedule.
    """
    own = getattr(denoiser, "schedule", None)
    if own is None:
        raise UsageError(
            "this denoiser does not say which noise schedule it has: make it with from_denoiser, "
            "from_noise_prediction, from_velocity or from_flow"
        )

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        own_t = own.t_of_s(schedule.s(t))
        return denoiser(own.alpha(own_t) / schedule.alpha(t) * x, own_t, *condition)

    return _Denoiser(denoise, schedule, getattr(denoiser, "model", None))


def rematerialized(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same denoiser or decoder, which computes its activations again going backward.

    Memory then holds one call's activations and the states, whatever N is, for one more forward
    pass in each backward (App. F.2).
    """
    return _in_place_of(
        function, lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)
    )


def in_precision(denoiser: Callable[..., Tensor], dtype: torch.dtype) -> Denoiser:
    """Return the same denoiser, its convolutions and matrix products in `dtype`.

    x and D stay as they are. Weights stay float32, and what must not be rounded (norms, the
    solver's own state) is not.
    """

    def denoise(x: Tensor, *inputs: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return denoiser(x, *inputs).to(x.dtype)

    return _in_place_of(denoiser, denoise)


class CallCounter(_Denoiser):
    """A denoiser that counts its calls in `.calls`, and what they cost.

    evaluations  samples that the network saw, the sum of all batches; and of these
    backward     those whose answers were differentiated, which costs about two more
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser, *(getattr(denoiser, n, None) for n in ("schedule", "model")))
        self.calls = self.evaluations = self.backward = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        D = super().__call__(*inputs)
        self.calls, self.evaluations = self.calls + 1, self.evaluations + len(D)
        self.backward += len(D) * D.requires_grad
        return D


def check_contract(denoiser: Denoiser, x: Tensor, t: Tensor, gradient: bool = False) -> None:
    """Raise UsageError unless D(x, t) is like x, leaves x unchanged and is the same twice.

    gradient  whether autograd must reach x through it, as learning by first order needs
    """
    before = x.detach().clone()
    with torch.set_grad_enabled(gradient):
        asked = before.clone().requires_grad_(gradient)
        # A leaf that is written into is autograd's error; the network is to see no leaf.
        seen = 1 * asked
        try:
            first = denoiser(seen, t)
        except UsageError:
            raise
        except Exception as error:  # whatever a network makes of it
            raise UsageError(
                f"the denoiser fails for x in {x.dtype} and t in {t.dtype} ({first_line(error)}): "
                "take x and t as they come, as from_denoiser and its kin do for a torch module"
            ) from error
    with torch.no_grad():
        second = denoiser(before.clone(), t)
    if not isinstance(first, Tensor) or first.shape != x.shape:
        shape = getattr(first, "shape", None)
        what = type(first).__name__ if shape is None else f"shape {tuple(shape)}"
        fault = f"returns {what} for x of shape {tuple(x.shape)}"
    elif not first.is_floating_point() or first.device != x.device:
        fault = f"returns {first.dtype} on {first.device} for {x.dtype} on {x.device}"
    elif not torch.equal(seen.detach(), before):
        fault = "writes into its input: let it work on a copy"
    elif not gradient and not first.isfinite().all():  # a learner says so, and keeps its best
        fault = f"returns NaN or infinity at t = {t:.3g}"
    elif (first - second).abs().max() > 1e-3 * first.abs().max():
        fault = "answers the same question in two ways: call eval() on its network (dropout?)"
    elif gradient and not first.requires_grad:
        fault = (
            "cuts the gradient to x (torch.no_grad or detach inside it?): let autograd through, or "
            "learn with learn_gauss_newton, which differentiates nothing"
        )
    else:
        return
    raise UsageError(f"the denoiser {fault}; D(x, t) must be an estimate of x_0 like x")
