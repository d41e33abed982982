"""The checks of ftexp.doctor: their findings, and which of these would fail a run."""

import io
import os
import resource
import shutil
from collections import namedtuple

import pytest
from rich.console import Console

import ftexp.doctor.disk
import ftexp.doctor.machine
import ftexp.doctor.together
from ftexp.config.schema import Config
from ftexp.doctor.decoding import decode_rate
from ftexp.doctor.disk import data_root, disk_space, probed, storage_checks
from ftexp.doctor.finding import Verdict, fails, not_here, ok, print_table, warning
from ftexp.doctor.machine import gpus, open_files, ray_directory, shared_memory, versions
from ftexp.doctor.model_size import ModelSize, model_size
from ftexp.doctor.ranks import RankFacts, all_reduce_rate
from ftexp.doctor.together import all_reduce, clocks, same_product, same_versions, together
from ftexp.storage.directory import Storage

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.run.storage = str(tmp_path / "runs")
    config.model.name, config.data.name, config.data.image_size = "vit_tiny_patch16_224", "digits", 32
    config.data.mean = config.data.std = [0.5]
    config.data.channels, config.optim.name = 1, "adamw"
    return config


def facts(rank, node="a", device="cpu", products=("x", "x"), seconds=0.01, ahead=0.0, torch="2.9"):
    return RankFacts(rank, node, device, {"torch": torch}, list(products), seconds, ahead, 0.001)


def test_versions_that_are_installed_are_those_that_are_asked_for(monkeypatch):
    assert versions().verdict is Verdict.OK
    monkeypatch.setattr(ftexp.doctor.machine, "requires", lambda _: ["torch>=99", "no-such-package", "rich"])
    found = versions()
    assert found.verdict is Verdict.FAILS
    assert "is not >=99" in found.found
    assert "no-such-package is missing" in found.found


def test_a_machine_without_a_gpu_is_told_and_fails_only_a_run_that_wants_one(config, monkeypatch):
    monkeypatch.setattr(ftexp.doctor.machine, "num_local_gpus", lambda: 0)
    assert gpus(config).verdict is Verdict.NOT_HERE
    config.scaling.use_gpu = True
    assert gpus(config).verdict is Verdict.FAILS


def test_gpus_that_torch_cannot_use_fail_a_run_and_those_in_use_are_told(config, monkeypatch):
    monkeypatch.setattr(ftexp.doctor.machine, "num_local_gpus", lambda: 2)
    monkeypatch.setattr(ftexp.doctor.machine, "_driver", lambda: ("470.1", [0.0, 0.5]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpus(config).verdict is Verdict.FAILS
    assert "driver 470.1" in gpus(config).found
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "H100")
    assert (gpus(config).verdict, "memory of GPU 1 is in use" in gpus(config).found) == (Verdict.WARNING, True)


def test_little_shared_memory_is_told(tmp_path, monkeypatch):
    assert shared_memory(tmp_path / "none").verdict is Verdict.NOT_HERE
    for free, verdict in ((64e6, Verdict.WARNING), (1e15, Verdict.OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        assert shared_memory(tmp_path).verdict is verdict


@pytest.mark.parametrize(
    ("soft", "verdict"),
    [(256, Verdict.FAILS), (4096, Verdict.WARNING), (65536, Verdict.OK), (resource.RLIM_INFINITY, Verdict.OK)],
)
def test_few_open_files_fail_a_run(soft, verdict):
    assert open_files((soft, resource.RLIM_INFINITY)).verdict is verdict


def test_rays_directory_is_checked_for_length_and_owner(config, tmp_path):
    assert ray_directory(config, {"TMPDIR": "/tmp"}).verdict is Verdict.OK
    long = str(tmp_path / ("x" * 100))
    assert "too long for a socket's path" in ray_directory(config, {"RAY_TMPDIR": long}).found
    assert ray_directory(config, {"RAY_TMPDIR": long}).verdict is Verdict.FAILS
    replaced = ray_directory(config, {"TMPDIR": long})
    assert (replaced.verdict, f"/tmp/ftexp-{os.getuid()} instead" in replaced.found) == (Verdict.OK, True)
    config.scaling.address = "auto"
    assert ray_directory(config, {"RAY_TMPDIR": long}).verdict is Verdict.NOT_HERE


def test_a_disk_without_room_for_the_checkpoints_fails_a_run(config, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 399))
    # four checkpoints: num_to_keep=2, the best, and the one in flight
    assert disk_space(config, 100).verdict is Verdict.FAILS
    assert disk_space(config, 99).verdict is Verdict.OK
    config.checkpoint.num_to_keep = None
    assert disk_space(config, 99).verdict is Verdict.WARNING
    config.run.storage = "s3://bucket/runs"
    assert disk_space(config, 99).verdict is Verdict.NOT_HERE


def test_the_storage_is_tried_and_left_as_it_was(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ftexp.doctor.disk, "_PROBE_BYTES", 2**20)
    found = storage_checks(config, 10**6)
    assert [finding.verdict for finding in found] == [Verdict.OK] * 3
    assert "a checkpoint of 1 MB takes" in found[2].found
    assert list(tmp_path.iterdir()) == []
    with probed(config) as directory:
        directory.write_bytes("x", b"")
        (tmp_path / "runs" / "other").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("name", "root", "verdict"),
    [
        ("image_folder", "{}/nowhere", Verdict.FAILS),
        ("image_folder", "{}", Verdict.OK),
        ("image_folder", "s3://bucket/nowhere", Verdict.NOT_HERE),
        ("cifar10", "{}/nowhere", Verdict.NOT_HERE),  # it may be downloaded to there
        ("digits", None, Verdict.NOT_HERE),
    ],
)
def test_a_root_that_is_not_there_fails_a_run(config, tmp_path, name, root, verdict):
    config.data.name, config.data.root = name, root and root.format(tmp_path)
    assert data_root(config).verdict is verdict


def test_a_storage_that_cannot_be_written_fails_a_run(config, tmp_path):
    (tmp_path / "runs").touch()
    (found,) = storage_checks(config, None)
    assert (found.check, found.verdict) == ("storage: write, rename, list", Verdict.FAILS)


def test_a_storage_that_lists_wrongly_fails_a_run(config, monkeypatch):
    monkeypatch.setattr(Storage, "list_files", lambda _: [])
    assert "not listed" in storage_checks(config, None)[1].found


def test_a_slow_storage_is_told(config, monkeypatch):
    monkeypatch.setattr(ftexp.doctor.disk, "_SLOW_SAVE_S", 0.0)
    assert storage_checks(config, 10**6)[2].verdict is Verdict.WARNING


def test_the_model_is_measured_without_being_built(config):
    config.data.num_classes = 10
    size = model_size(config)
    import timm

    arguments = {"num_classes": 10, "in_chans": 1, "img_size": 32}
    real = sum(each.numel() for each in timm.create_model("vit_tiny_patch16_224", **arguments).parameters())
    assert (size.num_parameters, size.checkpoint_bytes) == (real, 12 * real)  # float32: parameters and two moments
    config.optim.name, config.ema.decay = "sgd", 0.9
    assert model_size(config).checkpoint_bytes == 12 * real  # parameters, momentum and EMA


def test_decoding_is_timed_where_there_is_some(config):
    assert decode_rate(config).verdict is Verdict.NOT_HERE
    config.data.name, config.data.channels, config.data.mean = "image_folder", 3, [0.5] * 3
    assert decode_rate(config, seconds=0.01).verdict is Verdict.OK
    config.data.decoder = "nothing"
    config.data.interpolation = "none"
    assert decode_rate(config, seconds=0.01).verdict is Verdict.FAILS


def test_ranks_that_compute_otherwise_are_named():
    assert same_product([facts(0), facts(1)]).verdict is Verdict.OK
    wavering = same_product([facts(0), facts(1, node="b", products=("x", "y"))])
    assert (wavering.verdict, "rank 1 (cpu of b) has several results" in wavering.found) == (Verdict.FAILS, True)
    odd = same_product([facts(0), facts(1, node="b", products=("y", "y")), facts(2)])
    assert (odd.verdict, "rank 1 of b is in the minority" in odd.found) == (Verdict.FAILS, True)
    kinds = same_product([facts(0), facts(1, device="gpu", products=("y", "y"))])
    assert (kinds.verdict, kinds.found) == (Verdict.WARNING, "differs between cpu and gpu")


def test_other_versions_on_another_node_fail_a_run():
    assert same_versions([facts(0), facts(1)]).verdict is Verdict.OK
    found = same_versions([facts(0), facts(1, node="b", torch="2.10")])
    assert (found.verdict, found.found) == (Verdict.FAILS, "torch is 2.9 on a, and 2.10 on b")


def test_a_slow_network_is_told_by_what_a_steps_gradients_take():
    assert all_reduce([facts(0)], None).verdict is Verdict.NOT_HERE
    pair = [facts(0), facts(1, seconds=0.02)]
    rate = all_reduce_rate(0.02, 2)
    assert rate == 16 * 2**20 / 0.02
    assert all_reduce(pair, ModelSize(int(rate / 4 * 0.4), 0)).verdict is Verdict.OK
    slow = all_reduce(pair, ModelSize(int(rate / 4 * 0.6), 0))
    assert (slow.verdict, "take 600 ms" in slow.found) == (Verdict.WARNING, True)


def test_clocks_that_are_apart_are_told():
    assert clocks([facts(0), facts(1)]).verdict is Verdict.NOT_HERE
    assert clocks([facts(0), facts(1, node="b", ahead=-0.9)]).verdict is Verdict.OK
    assert clocks([facts(0), facts(1, node="b", ahead=-1.5)]).verdict is Verdict.WARNING


def test_workers_that_do_not_start_are_a_finding(config, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(ftexp.doctor.together, "measured", refuse)
    (found,) = together(config, "2 workers", None, None)
    assert (found.verdict, found.found) == (Verdict.FAILS, "2 workers: no room at all")


def test_the_table_says_whether_a_run_would_start():
    def printed(*findings):
        console = Console(file=io.StringIO(), width=100)
        print_table(findings, console)
        return console.file.getvalue()

    calm = printed(ok("a", "well"), not_here("b", "none"), warning("c", "slow", "buy more"))
    assert "a run would start: 1 ok, 1 to look at, 0 that fail" in calm
    assert "buy more" in calm
    assert "a run would fail: 0 ok, 0 to look at, 1 that fail" in printed(fails("a", "[no] markup", "mend it"))


def test_what_to_do_is_next_to_a_finding_where_there_is_room_and_below_it_elsewhere():
    def printed(width, *findings):
        console = Console(file=io.StringIO(), width=width)
        print_table(findings, console)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]

    files = fails("open files", "512", "ulimit -n 65536")
    wide = printed(120, files)
    assert wide[:2] == ["check              found  what to do", "open files  fails  512    ulimit -n 65536"]
    narrow = printed(80, files)
    assert narrow[:3] == ["check              found", "open files  fails  512", "                   → ulimit -n 65536"]
    assert printed(120, ok("clocks", "they agree"))[0] == "check       found"
