"""Workers on this machine: the way to try what a cluster will do.

S4S_EXECUTOR=cluster/laptop.py papermill notebooks/ablation_order.ipynb runs/order.ipynb
"""

from parsl import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

from s4s_core import results_folder

config = Config(
    executors=[
        HighThroughputExecutor(
            address="127.0.0.1",
            max_workers_per_node=2,
            # Where there are GPUs: how many; each worker then sees one of them alone.
            available_accelerators=[],
            # A worker that is not heard of for so many seconds is lost, and ends where it is.
            heartbeat_period=5,
            heartbeat_threshold=30,
            provider=LocalProvider(
                init_blocks=1,
                max_blocks=1,
                worker_init="export OMP_NUM_THREADS=1",  # a worker fills one core
            ),
        )
    ],
    run_dir=str(results_folder() / "parsl"),  # Parsl's logs
)
