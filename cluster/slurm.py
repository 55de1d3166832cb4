"""Workers on a SLURM cluster: change the lines marked with (*) to what yours is like.

    s4s fetch cifar10        # on the login node: most compute nodes have no internet
    S4S_EXECUTOR=cluster/slurm.py papermill notebooks/... runs/...

Run it on the login node or in a small job. $S4S_RESULTS must be on a file system that all nodes
share; so must be this environment, $S4S_HOME and $TORCH_HOME, where `s4s fetch` puts files.
"""

from parsl import Config
from parsl.executors import HighThroughputExecutor
from parsl.launchers import SrunLauncher
from parsl.providers import SlurmProvider

from s4s_core import results_folder

GPUS = 4  # (*) of a node; 0 where workers compute on cores

config = Config(
    executors=[
        HighThroughputExecutor(
            max_workers_per_node=GPUS or 8,  # (*) one worker a GPU, or a core
            available_accelerators=GPUS,  # each worker sees one GPU alone
            # Minutes without a word mean a lost node; its tasks are tried again elsewhere.
            heartbeat_period=15,
            heartbeat_threshold=60,
            provider=SlurmProvider(
                partition="gpu",  # (*)
                account=None,  # (*)
                walltime="04:00:00",  # (*) of one job; what is cut off is tried again once
                init_blocks=1,
                min_blocks=0,
                max_blocks=8,  # (*) jobs at a time
                nodes_per_block=1,
                cores_per_node=8,  # (*)
                mem_per_node=64,  # (*) GB
                exclusive=False,
                gpus_per_node=GPUS or None,
                worker_init="export OMP_NUM_THREADS=1",  # (*) and what activates the environment
                launcher=SrunLauncher(),
            ),
        )
    ],
    run_dir=str(results_folder() / "parsl"),  # Parsl's logs and the jobs' own
)
