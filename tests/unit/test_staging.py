"""Staging: a copy that later steps don't change, in reused memory."""

import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from ftexp.checkpoint.staging import Staging

CPU = torch.device("cpu")


def state():
    torch.manual_seed(0)
    return {
        "weights": torch.randn(3, 4),
        "nested": {"list": [torch.arange(5), 2, "text"], "tuple": (torch.ones(2, dtype=torch.bfloat16), None)},
        0: {"step": torch.tensor(7.0)},
        "number": 1.5,
    }


def same(first, second):
    """Return whether two trees are bitwise identical, with the same container types."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def test_a_copy_is_equal_and_keeps_the_kinds_of_containers():
    assert same(Staging(CPU).copy(state()), state())
    assert same(Staging(CPU).copy((state(), [state()], {})), (state(), [state()], {}))


def test_later_changes_in_place_do_not_reach_the_copy():
    live = state()
    copied = Staging(CPU).copy(live)
    live["weights"].zero_()
    live["nested"]["list"][0] += 1
    live["nested"]["list"].append("more")
    live["nested"]["tuple"][0].mul_(3)
    live[0]["step"].fill_(8.0)
    live[0]["new"] = 1
    assert same(copied, state())


def test_an_optimizers_next_step_does_not_reach_the_copy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()

    step()
    copied = Staging(CPU).copy((model.state_dict(), optimizer.state_dict()))
    expected = [tensor.clone() for tensor in model.state_dict().values()]
    moments = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    step()
    assert all(map(torch.equal, copied[0].values(), expected))
    assert torch.equal(copied[1]["state"][0]["exp_avg"], moments)
    assert not torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert not any(tensor.requires_grad for tensor in copied[0].values())
    fresh = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fresh.load_state_dict(copied[0])


def addresses(tree):
    if isinstance(tree, torch.Tensor):
        return [tree.data_ptr()]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [address for item in items for address in addresses(item)]


def test_memory_is_used_again_and_is_not_the_sources():
    staging, live = Staging(CPU), state()
    first = addresses(staging.copy(live))
    live["weights"].add_(1)
    second = staging.copy(live)
    assert addresses(second) == first
    assert same(second, live)
    assert len(set(first)) == 4
    assert not set(first) & set(addresses(live))


@pytest.mark.parametrize(
    "other",
    [torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(12), torch.zeros(0), torch.zeros(4, 3).T],
    ids=["shape", "dtype", "dimensions", "empty", "strides"],
)
def test_a_tensor_of_another_kind_in_the_same_place_gets_memory_of_its_own(other):
    staging = Staging(CPU)
    first = staging.copy({"weights": torch.ones(3, 4)})["weights"]
    second = staging.copy({"weights": other})["weights"]
    assert same(second, other)
    assert second.stride() == other.stride()
    assert torch.equal(first, torch.ones(3, 4))


def test_channels_last_stays_channels_last_and_is_kept():
    staging = Staging(CPU)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    first = staging.copy({"kernel": images})["kernel"]
    assert torch.equal(first, images)
    assert first.stride() == images.stride()
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert staging.copy({"kernel": images})["kernel"].data_ptr() == first.data_ptr()


def test_a_view_with_gaps_is_copied_by_value():
    whole = torch.arange(20.0).view(4, 5)
    for view in (whole[:, 1:3], whole[::2], torch.ones(1).expand(5)):
        staging = Staging(CPU)
        assert torch.equal(staging.copy([view])[0], view)
        assert torch.equal(staging.copy([view])[0], view)


def test_parameters_that_share_memory_become_copies_that_do_not():
    shared = torch.ones(3)
    one, two = Staging(CPU).copy([shared, shared])
    assert torch.equal(one, two)
    assert one.data_ptr() != two.data_ptr()


def test_a_mapping_becomes_a_plain_dict_that_can_be_loaded_without_running_code():
    copied = Staging(CPU).copy(OrderedDict(a=torch.ones(1)))
    assert type(copied) is dict


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": torch.ones(2), "a": {"b": torch.zeros(2)}},
        {0: torch.ones(2), "0": torch.zeros(2)},
    ],
    ids=["slash", "number"],
)
def test_two_places_never_share_memory_whatever_their_keys(tree):
    assert same(Staging(CPU).copy(tree), tree)


@pytest.mark.skipif(sys.platform != "linux", reason="of threads, Linux knows priorities")
def test_the_writing_thread_gives_way_to_its_process_and_never_asks_for_more_than_that_has():
    program = (
        "import os, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from ftexp.checkpoint.priority import give_way\n"
        "for own in range(os.nice(0), 20):\n"
        "    pool = ThreadPoolExecutor(1, initializer=give_way)\n"
        "    number = pool.submit(threading.get_native_id).result()\n"
        "    print(os.nice(0), os.getpriority(os.PRIO_PROCESS, number), os.sched_getscheduler(number))\n"
        "    os.nice(1)"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = [tuple(map(int, line.split())) for line in child.stdout.splitlines()]
    expected = {own: (own + 10, os.SCHED_OTHER) if own < 10 else (own, os.SCHED_IDLE) for own in range(20)}
    assert [line[0] for line in found] == list(range(os.nice(0), 20))
    assert all(line[1:] == expected[line[0]] for line in found)
