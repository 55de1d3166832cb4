"""The density of a solver's samples, by exact change of variables, and a check of Theorem D.1.

A solver is a map x_0 = Psi(x_T) of noise with density N(0, sigma(T)^2 I). Where it can be inverted,

    ln p(x_0) = ln N(x_T) - ln |det dPsi/dx_T|      at x_T = Psi^-1(x_0)

holds exactly. It takes one backward pass for each entry of a sample, so it is meant for points in
the plane rather than images.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UsageError
from ..solver import Solver


def jacobian(solver: Solver, denoiser: Denoiser, x_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return Psi(x_T), (B, ...), and dPsi/dx_T, (B, d, d) for samples of d entries."""
    x_T = x_T.detach().requires_grad_()
    x_0 = deque(solver.trajectory(denoiser, x_T), maxlen=1).pop()
    # No sample depends on another's noise, so the sum over samples keeps their gradients apart.
    rows = [
        torch.autograd.grad(entry, x_T, retain_graph=True)[0].flatten(1)
        for entry in x_0.flatten(1).sum(0)
    ]
    return x_0.detach(), torch.stack(rows, 1)


def log_abs_det(solver: Solver, denoiser: Denoiser, x_T: Tensor) -> Tensor:
    """Return ln |det dPsi/dx_T|, (B,), at x_T (B, ...): C(Psi) at Psi(x_T) in Theorem D.1."""
    return torch.linalg.slogdet(jacobian(solver, denoiser, x_T)[1]).logabsdet


def invert(
    solver: Solver,
    denoiser: Denoiser,
    x_0: Tensor,
    start: Tensor,
    steps: int = 100,
    tolerance: float = 1e-9,
) -> tuple[Tensor, Tensor]:
    """Return noises x_T with Psi(x_T) = x_0, (B, ...), and whether each was found, (B,).

    The search takes at most `steps` damped Newton steps from `start`, which has the shape of x_0. A
    noise is found if |Psi(x_T) - x_0| <= tolerance. A map that folds has several such noises, or
    none; the search finds at most the one that Newton's method leads to.
    """
    x_T, damping = start.detach().clone(), start.new_ones(len(start))
    image, J = jacobian(solver, denoiser, x_T)
    error = (image - x_0).flatten(1)
    for _ in range(steps):
        if (error.norm(dim=1) <= tolerance).all():
            break
        newton, _ = torch.linalg.solve_ex(J, error)  # not finite, so never nearer, if J is singular
        trial = x_T - (damping[:, None] * newton).view_as(x_T)
        image, J_trial = jacobian(solver, denoiser, trial)
        error_trial = (image - x_0).flatten(1)
        nearer = error_trial.norm(dim=1) < error.norm(dim=1)
        x_T[nearer], J[nearer], error[nearer] = trial[nearer], J_trial[nearer], error_trial[nearer]
        damping = torch.where(nearer, (2 * damping).clamp_max(1), damping / 2)
    return x_T, error.norm(dim=1) <= tolerance


@dataclass(frozen=True, eq=False)
class Divergence:
    """A comparison of a teacher's density q with a student's density p_phi.

    It is made at n samples x = Psi*(b) = Psi_phi(a) of the teacher.

    b, a          (n, ...) the teacher's and the student's noise of x, in units of sigma(T)
    log_ratio     (n,) ln q(x) - ln p_phi(x); its mean estimates the KL divergence
    determinants  (n,) C(Psi*) - C(Psi_phi) at x
    found         the share of samples for which the student's noise was found; the others are
                  left out of everything above
    """

    b: Tensor
    a: Tensor
    log_ratio: Tensor
    determinants: Tensor
    found: float

    @property
    def kl(self) -> float:
        """D_KL(q || p_phi), estimated as the mean of `log_ratio`, in nats."""
        return self.log_ratio.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `kl`, as an estimate from n samples."""
        return self.log_ratio.std().item() / len(self.log_ratio) ** 0.5

    @property
    def radius(self) -> float:
        """The smallest r such that a lies in B_r(b) for all n samples, as the theorem demands."""
        return (self.a - self.b).flatten(1).norm(dim=1).max().item()

    def bound(self, r: float) -> float:
        """Return the bound of Theorem D.1 on `kl` (Eq. 11).

        It is r^2 / 2 + r sqrt(d + 1) + E |C(Psi*) - C(Psi_phi)|, for samples of d entries.
        """
        d = self.b[0].numel()
        return r**2 / 2 + r * math.sqrt(d + 1) + self.determinants.abs().mean().item()


def compare_densities(
    student: Solver, teacher: Solver, denoiser: Denoiser, x_T: Tensor
) -> Divergence:
    """Return the comparison of the teacher's and the student's densities at samples Psi*(x_T).

    x_T (B, ...) has entries ~ N(0, sigma(T)^2), and is b of Theorem D.1. Where the student's map
    folds, p_phi is a sum over several noises a, and only one of them is found, so `kl` comes out
    too large. On the other hand samples that are not `found` are missing from `kl`, which makes it
    too small. Raises UsageError if no noise is found.
    """
    schedule = student.grid.schedule
    x_0, J = jacobian(teacher, denoiser, x_T)
    a, found = invert(student, denoiser, x_0, x_T)
    if not found.any():
        raise UsageError("the student could not be inverted at any of these samples")
    x_T, a, J = x_T[found], a[found], J[found]
    C_teacher, C_student = torch.linalg.slogdet(J).logabsdet, log_abs_det(student, denoiser, a)
    b, a = (x / schedule.sigma(schedule.T) for x in (x_T, a))
    gaussian = (a.square() - b.square()).flatten(1).sum(1) / 2  # ln N(b) - ln N(a)
    determinants = C_teacher - C_student
    return Divergence(b, a, gaussian - determinants, determinants, found.double().mean().item())
