"""Measure the host memory of one run of many samples, which are never all in it.

python tests/benchmarks/memory.py 50000

The samples are 3x64x64, the "network" a multiplication, so that all memory is the package's own.
The arguments behind the number of samples are those of a shard (by default the package's), and how
many values of a sample are left out between two features: 6 makes 2 048, as many as Inception has.
memory.csv beside this file has what it printed; its disk, of the teacher's samples, is 2.4 GB.
"""

import resource
import sys

import torch

import s4s_core as s4s
from s4s_core.experiments import run


def main(n: int, shard: int = run.SHARD, stride: int = 6) -> None:
    run.SHARD = shard
    own = {"teacher_nfe": 2, "teacher_solver": "ddim", "teacher_order": 1}
    setup = s4s.load("cifar10_tiny", fid_samples=n, sample_batch_size=100, **own).variant(
        name="large",
        shape=(3, 64, 64),
        condition=None,
        data=lambda: torch.randn(2 * (3 * 64 * 64 // stride), 3, 64, 64),
        features=lambda x: x.flatten(1)[:, ::stride],
        denoiser=lambda x, t: 0.5 * x,
    )
    run._setup = lambda experiment: setup
    cheap = {"solver": "ddim", "order": 1, "nfe": 1, "settings": {"fid_samples": n}}
    result = s4s.run(s4s.Experiment("cifar10_tiny", **cheap))
    assert result.distance_to_teacher > 0 and result.n_samples == n
    print("samples,peak_MB")
    print(f"{n},{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
