"""A batch script for Slurm, on one or several nodes; it requeues itself after a signal and a final checkpoint."""

from __future__ import annotations

import math

from ftexp.cli.exit_codes import EXIT_TERMINATED
from ftexp.deploy.plan import PORT, Plan

_CLUSTER = f"""\
# only who has this job's token may use its Ray; srun hands the environment on
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# Ray: its head on this node, the first, which the others join; training starts once the head answers
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ray start --head --node-ip-address="$head" --port={PORT} --disable-usage-stats --block &
until (exec 3<>"/dev/tcp/$head/{PORT}") 2>/dev/null; do sleep 1; done
others=$((SLURM_JOB_NUM_NODES - 1))
srun --nodes="$others" --ntasks="$others" --exclude="$head" \\
    ray start --address="$head:{PORT}" --disable-usage-stats --block &
"""


def script(plan: Plan) -> str:
    """Return the batch script."""
    return "\n".join([_head(plan), *([_CLUSTER] if plan.own.nodes > 1 else []), _training(plan), _END])


def _head(plan: Plan) -> str:
    own = plan.own
    options = [
        f"--job-name={plan.job_name}",
        *([f"--partition={own.queue}"] if own.queue else []),
        f"--nodes={own.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={own.cpus_per_node}",
        f"--mem={own.memory_gb}G",
        *([f"--gpus-per-node={own.gpus_per_node}"] if own.gpus_per_node else []),
        f"--time={_time(own.hours)}",
        f"--signal=B:USR1@{own.warn_s}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    lines = [f"#SBATCH {option}" for option in options]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            "# The directory that this is submitted from must be shared by the nodes, and `python` must have ftexp.",
            "set -u",
            f"export SRUN_CPUS_PER_TASK={own.cpus_per_node}",
            "",
        ]
    )


def _time(hours: float) -> str:
    minutes = math.ceil(60 * hours)
    return f"{minutes // 60}:{minutes % 60:02}:00"


def _training(plan: Plan) -> str:
    """Return the shell code that starts the training, without srun, which would also signal Ray's own processes."""
    address = None if plan.own.nodes == 1 else f'"$head:{PORT}"'
    return f"{plan.command(address)} &\ntraining=$!\n"


_END = f"""\
# Slurm sends USR1 to this script before the time limit, and with PreemptParameters=send_user_signal also before it
# preempts the job. The training then saves, and ends with {EXIT_TERMINATED}.
trap 'trapped=yes; kill -TERM "$training"' USR1 TERM
trapped=yes
while [ "$trapped" = yes ]; do # a trap ends the wait
    trapped=no
    wait "$training"
    code=$?
done

[ "$code" -eq {EXIT_TERMINATED} ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""
