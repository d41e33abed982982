"""A RayJob for KubeRay: a head pod, which runs the driver, and a worker pod per node. For Kueue, also the queue."""

from __future__ import annotations

from typing import Any

from ftexp.config.versions import package_versions
from ftexp.deploy.as_yaml import as_yaml
from ftexp.deploy.plan import KUEUE, MOUNT, USER_ID, Plan

_HEAD_CPUS, _HEAD_GB = 2, 8
_SHARED_MEMORY_SHARE = 0.3  # share of a pod's memory for Ray's object store
_GRACE_S = 60  # time after SIGTERM, for the final checkpoint, which takes 30 s at most
_RETRIES = 5  # each creates a new cluster, and resumes the run
_SETTINGS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # time limit for waiting for a lost node
    "RAY_USAGE_STATS_ENABLED": "0",
}


def manifest(plan: Plan) -> str:
    """Return the YAML of the RayJob."""
    return as_yaml(rayjob(plan))


def rayjob(plan: Plan) -> dict[str, Any]:
    """Return the RayJob."""
    own = plan.own
    workers = {
        "groupName": "workers",
        "replicas": own.nodes,
        "minReplicas": own.nodes,
        "maxReplicas": own.nodes,
        "rayStartParams": {},
        "template": _pod(plan, "ray-worker", own.cpus_per_node, own.memory_gb, own.gpus_per_node),
    }
    head = {
        # only the driver runs there
        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
        "template": _pod(plan, "ray-head", _HEAD_CPUS, _HEAD_GB, 0),
    }
    labels = {"labels": {"kueue.x-k8s.io/queue-name": own.queue}} if plan.kind == KUEUE else {}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": plan.job_name, **labels},
        "spec": {
            "entrypoint": plan.command("auto"),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "backoffLimit": _RETRIES,
            **({"suspend": True} if plan.kind == KUEUE else {}),  # suspended until Kueue admits it
            "rayClusterSpec": {
                "rayVersion": package_versions()["ray"],
                "authOptions": {"mode": "token"},  # KubeRay creates a token, and passes it to the pods
                "headGroupSpec": head,
                "workerGroupSpecs": [workers],
            },
        },
    }


def _pod(plan: Plan, name: str, cpus: int, memory_gb: int, gpus: int) -> dict[str, Any]:
    claim = plan.own.volume_claim
    amounts = {"cpu": str(cpus), "memory": f"{memory_gb}Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    room = f"{max(1, int(_SHARED_MEMORY_SHARE * memory_gb))}Gi"
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": room}}]
    if claim is not None:
        mounts.append({"name": "runs", "mountPath": MOUNT})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
    container = {
        "name": name,
        "image": plan.own.image,
        "env": [{"name": key, "value": value} for key, value in _SETTINGS.items()],
        "resources": {"limits": amounts, "requests": amounts},
        "volumeMounts": mounts,
    }
    user = {"runAsUser": USER_ID, "runAsGroup": 0, "fsGroup": 0, "runAsNonRoot": True}
    return {
        "spec": {
            "securityContext": user,
            "terminationGracePeriodSeconds": _GRACE_S,
            "containers": [container],
            "volumes": volumes,
        }
    }
