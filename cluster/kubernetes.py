"""Workers in pods of a Kubernetes cluster: change the lines marked with (*) to what yours is like.

    pip install kubernetes
    S4S_EXECUTOR=cluster/kubernetes.py papermill notebooks/... runs/...

Run it in a pod of the same cluster, which the workers reach by its address. The image holds this
package and Parsl; the volume holds $S4S_RESULTS, $S4S_HOME and $TORCH_HOME, at the same place in
every pod.
Nobody has run this file in our tests: it needs a cluster.
"""

from parsl import Config
from parsl.addresses import address_by_hostname
from parsl.executors import HighThroughputExecutor
from parsl.providers import KubernetesProvider

from s4s_core import results_folder

config = Config(
    executors=[
        HighThroughputExecutor(
            address=address_by_hostname(),
            max_workers_per_node=1,  # one worker a pod, and so one a GPU
            heartbeat_period=15,
            heartbeat_threshold=60,
            provider=KubernetesProvider(
                image="s4s:0.2.0",  # (*)
                namespace="default",  # (*)
                init_blocks=1,
                min_blocks=0,
                max_blocks=8,  # (*) pods at a time
                init_cpu=2,
                max_cpu=4,
                init_mem="8000Mi",
                max_mem="16000Mi",
                extra_limits={"nvidia.com/gpu": "1"},  # (*)
                persistent_volumes=[("s4s-results", "/results")],  # (*) (claim, where it is seen)
                worker_init="export OMP_NUM_THREADS=1 S4S_RESULTS=/results",
            ),
        )
    ],
    run_dir=str(results_folder() / "parsl"),  # Parsl's logs
)
