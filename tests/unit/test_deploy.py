"""The files of ftexp.deploy: their content, their behaviour with fake Slurm programs, and rejected settings."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from ftexp.deploy import kuberay, skypilot, slurm
from ftexp.deploy.command import deploy, parse
from ftexp.deploy.dockerfile import dockerfile
from ftexp.deploy.plan import KINDS, DeployConfig, Plan, checked_words
from ftexp.errors import ConfigError, StorageError
from tests.support.processes import wait_until

WORDS = ("run.name=first", "model=vit", "'optim.lr=${oc.env:LR}'", "data.root=my photos")
PATIENCE_S = 20.0

# the training: the first run saves on TERM and exits with 75, the second finishes
TRAINING = """#!/bin/bash
echo "$@" >> "$LOG/training"
[ -e "$LOG/saved" ] && exit "${LAST_CODE:-0}"
trap 'touch "$LOG/saved"; exit 75' TERM
touch "$LOG/training_started"
while :; do sleep 0.05; done
"""
# replaces itself by its command, which then receives TERM and determines the exit code
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >> "$LOG/srun"; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\\nother\\n'; else echo "$@" >> "$LOG/scontrol"; fi
"""
# the head listens on its port until it is killed
RAY = """#!/bin/bash
echo "$@" >> "$LOG/ray"
[ "$RAY_AUTH_MODE" = token ] && echo -n "$RAY_AUTH_TOKEN" > "$LOG/token"
[ "$2" = --head ] && exec "$PYTHON" -c "
import socket, time
with socket.create_server(('127.0.0.1', 6379)) as server: time.sleep(60)"
exec sleep 60
"""


def plan(kind="slurm", words=WORDS, **settings):
    return Plan(kind, DeployConfig(**settings), words, "first", "runs")


@pytest.fixture
def slurm_job(tmp_path):
    """Function that starts a batch script as Slurm would, with fakes of Slurm's programs, Ray and the training."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", TRAINING), ("ray", RAY)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    started = []

    def start(script, **environment):
        (tmp_path / "train.sbatch").write_text(script)
        own = {"LOG": str(tmp_path), "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        path = f"{programs}:{os.environ['PATH']}"
        job = subprocess.Popen(
            ["bash", str(tmp_path / "train.sbatch")],
            env={**os.environ, **own, "PATH": path, "PYTHON": sys.executable, **environment},
            start_new_session=True,
        )
        started.append(job)
        return job

    yield start
    for job in started:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        job.wait()


def wait_for(path, num_lines=0):
    def is_there():
        return path.exists() and len(path.read_text().splitlines()) >= num_lines

    wait_until(is_there, tell=lambda: path, every_s=0.02, within_s=PATIENCE_S)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_signalled_saves_and_is_requeued_and_the_next_one_ends_it(slurm_job, tmp_path, sent):
    script = slurm.script(plan())
    job = slurm_job(script)
    wait_for(tmp_path / "training_started")
    job.send_signal(sent)
    assert job.wait(PATIENCE_S) == 75
    assert (tmp_path / "scontrol").read_text() == "requeue 42\n"
    assert slurm_job(script).wait(PATIENCE_S) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 42\n"
    runs = (tmp_path / "training").read_text().splitlines()
    assert runs[0] == runs[1]


def test_a_job_that_fails_is_not_requeued(slurm_job, tmp_path):
    (tmp_path / "saved").touch()
    assert slurm_job(slurm.script(plan()), LAST_CODE="1").wait(PATIENCE_S) == 1
    assert not (tmp_path / "scontrol").exists()


def test_on_several_nodes_training_starts_on_the_first_once_rays_head_answers(slurm_job, tmp_path):
    (tmp_path / "saved").touch()
    script = slurm.script(plan(nodes=2, gpus_per_node=4))
    assert slurm_job(script).wait(PATIENCE_S) == 0
    wait_for(tmp_path / "ray", num_lines=2)
    head, worker = sorted((tmp_path / "ray").read_text().splitlines(), reverse=True)
    assert head.startswith("start --head --node-ip-address=localhost --port=6379")
    assert worker.startswith("start --address=localhost:6379")
    (training,) = (tmp_path / "training").read_text().splitlines()
    assert training.endswith("scaling.num_workers=8 scaling.use_gpu=true scaling.address=localhost:6379")
    assert len((tmp_path / "token").read_text()) == 64
    assert "--exclude=localhost" in (tmp_path / "srun").read_text().splitlines()


def test_a_batch_script_asks_for_what_the_settings_say():
    script = slurm.script(
        plan(nodes=3, gpus_per_node=2, cpus_per_node=16, memory_gb=64, hours=1.5, warn_s=60, queue="q")
    )
    options = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    assert set(options) >= {
        *("--nodes=3", "--gpus-per-node=2", "--cpus-per-task=16", "--mem=64G", "--time=1:30:00"),
        *("--signal=B:USR1@60", "--requeue", "--partition=q", "--job-name=ftexp-first", "--open-mode=append"),
    }
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_words_reach_the_training_as_they_were_typed():
    words = shlex.split(plan().command(None))
    assert words[:3] == ["python", "-m", "ftexp.train"]
    assert tuple(words[3:7]) == WORDS


def test_without_gpus_a_worker_on_each_node_has_all_of_its_cpus_but_one():
    assert shlex.split(plan().command(None))[7:] == ["scaling.use_gpu=false"]
    words = shlex.split(plan(nodes=2, cpus_per_node=4).command("auto"))[7:]
    assert words == [
        *("scaling.num_workers=2", "scaling.use_gpu=false", "scaling.resources_per_worker={CPU: 3}"),
        "scaling.address=auto",
    ]


def test_a_rayjob_has_a_pod_for_each_node_and_a_queue_only_with_kueue():
    job = kuberay.rayjob(plan("kuberay", nodes=3, gpus_per_node=2, cpus_per_node=4, memory_gb=20, volume_claim="disk"))
    assert (job["kind"], job["metadata"]) == ("RayJob", {"name": "ftexp-first"})
    assert "suspend" not in job["spec"]
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "20Gi", "nvidia.com/gpu": "2"}
    assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]
    mounted = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    assert mounted["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "6Gi"}
    assert mounted["runs"]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert job["spec"]["entrypoint"].endswith("scaling.num_workers=6 scaling.use_gpu=true scaling.address=auto")
    queued = kuberay.rayjob(plan("kueue", queue="team"))
    assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert queued["spec"]["suspend"] is True


def test_a_task_of_skypilot_is_begun_again_by_the_exit_code_of_a_saved_run():
    task = skypilot.task(plan("skypilot", nodes=2, gpus_per_node=8, accelerator="H100"))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, {"H100": 8})
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert (task["envs"], task["secrets"]) == ({"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": None})
    for text in (task["run"], skypilot.task(plan("skypilot"))["run"], task["setup"]):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_dockerfile_ends_as_a_user_by_number_and_with_an_init():
    text = dockerfile()
    assert "\nUSER 10001:0\n" in text
    assert '\nENTRYPOINT ["tini", "--", "ftexp"]\n' in text
    assert " \\\n    && (python" in text


CHECKED = ["run.name=first", "run.storage=s3://bucket/runs"]


def composed(kind, words):
    from ftexp.api import compose

    kind, own, overrides = parse([kind, *words])
    return kind, own, overrides, compose(checked_words(overrides, own))


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_written_for_each_kind(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*CHECKED, "deploy.nodes=2", "deploy.gpus_per_node=4", "deploy.accelerator=H100", "deploy.queue=team"]
    written = deploy(*composed(kind, words))
    assert all(path.read_text() for path in written)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    for path in written:
        if path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_a_claim_becomes_the_storage(tmp_path):
    (rayjob, _) = deploy(
        *composed("kuberay", ["run.name=first", "deploy.volume_claim=disk", f"deploy.out={tmp_path / 'out'}"])
    )
    assert " run.storage=/runs " in yaml.safe_load(rayjob.read_text())["spec"]["entrypoint"]


@pytest.mark.parametrize(
    ("kind", "words", "problem"),
    [
        ("slurm", [], "run.name is not set"),
        (
            "slurm",
            ["run.name=a", "scaling.num_workers=2"],
            "scaling.num_workers=2: deploy sets scaling.num_workers itself",
        ),
        ("kuberay", ["run.name=a"], "run.storage=runs is on a pod's own disk"),
        ("kuberay", ["run.name=A_1", "run.storage=s3://b/r"], "run.name=A_1 is not a valid name for kuberay"),
        (
            "kuberay",
            ["run.name=a", "run.storage=s3://b/r", "deploy.volume_claim=x"],
            "deploy.volume_claim mounts the claim",
        ),
        ("kueue", CHECKED, "deploy.queue is not set"),
        ("skypilot", ["run.name=a"], "run.storage=runs ends with the machine"),
        ("skypilot", [*CHECKED, "deploy.gpus_per_node=1"], "deploy.accelerator is not set"),
    ],
)
def test_what_could_not_resume_or_start_is_refused(kind, words, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        deploy(*composed(kind, words))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no deployment target given. Name one: slurm, kuberay, kueue, skypilot"),
        (["slrum"], "slrum is not a deployment target. Did you mean 'slurm'?"),
        (["slurm", "deploy.nodes=0"], "deploy.nodes=0 is out of range"),
        (["slurm", "deploy.node=2"], "deploy.node"),
        (["slurm", "-m"], "deploy writes files for one run"),
    ],
)
def test_a_wrong_command_names_what_is_wrong(words, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse(words)


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(StorageError, match="can't be written"):
        deploy(*composed("slurm", ["run.name=first", f"deploy.out={tmp_path / 'out'}"]))


def test_an_image_is_built_though_a_package_holds_a_file_for_another_python_and_not_without_the_packages(tmp_path):
    (step,) = re.findall(r"^RUN (pip install.*?[^\\])\n", dockerfile(), re.MULTILINE | re.DOTALL)
    for name, code in (("pip", 0), ("python", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(["sh", "-c", step], env=environment, check=False).returncode == 0
    (tmp_path / "pip").write_text("#!/bin/sh\nexit 1\n")
    assert subprocess.run(["sh", "-c", step], env=environment, check=False).returncode == 1
