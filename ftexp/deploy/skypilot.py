"""A managed job of SkyPilot: on spot machines, restarted elsewhere when they are preempted."""

from __future__ import annotations

from typing import Any

from ftexp.cli.exit_codes import EXIT_TERMINATED
from ftexp.deploy.as_yaml import as_yaml
from ftexp.deploy.plan import PORT, Plan

_MAX_RESTARTS_ON_ERRORS = 3
TOKEN = "RAY_AUTH_TOKEN"  # token of the nodes' Ray; passed when the job is launched, so that no file contains it

_SETUP = """\
pip install uv
uv venv --python 3.12 --seed ~/ftexp-env
uv pip install --python ~/ftexp-env/bin/python .
"""
# SkyPilot runs a Ray of its own on each machine, on port 6380; `ray stop` would stop that one too
_CLUSTER = f"""\
head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
answers() {{ (exec 3<>"/dev/tcp/$head/{PORT}") 2>/dev/null; }}
if [ "$SKYPILOT_NODE_RANK" -ne 0 ]; then
  until answers; do sleep 1; done
  ray start --address="$head:{PORT}" --disable-usage-stats --block &
  while answers; do sleep 5; done # until the head has ended
  kill $!
  exit 0
fi
ray start --head --node-ip-address="$head" --port={PORT} --disable-usage-stats --block &
ray=$!
until answers; do sleep 1; done
"""


def manifest(plan: Plan) -> str:
    """Return the YAML of the task."""
    return as_yaml(task(plan))


def task(plan: Plan) -> dict[str, Any]:
    """Return the task."""
    own = plan.own
    resources: dict[str, Any] = {"cpus": f"{own.cpus_per_node}+", "memory": f"{own.memory_gb}+"}
    if own.gpus_per_node:
        resources["accelerators"] = {own.accelerator: own.gpus_per_node}
    resources |= {
        "use_spot": True,
        "job_recovery": {
            "strategy": "EAGER_NEXT_REGION",
            "max_restarts_on_errors": _MAX_RESTARTS_ON_ERRORS,
            "recover_on_exit_codes": [EXIT_TERMINATED],
        },
    }
    return {
        "name": plan.job_name,
        "num_nodes": own.nodes,
        "resources": resources,
        "workdir": ".",
        **({"envs": {"RAY_AUTH_MODE": "token"}, "secrets": {TOKEN: None}} if own.nodes > 1 else {}),
        "setup": _SETUP,
        "run": f"source ~/ftexp-env/bin/activate\n{_run(plan)}",
    }


def _run(plan: Plan) -> str:
    if plan.own.nodes == 1:
        return f"exec {plan.command(None)}\n"
    command = plan.command(f'"$head:{PORT}"')
    return f"{_CLUSTER}{command}\ncode=$?\nkill $ray\nexit $code\n"
