"""The sample ledger proves that each sample was used exactly once, and detects every violation."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.config.schema import AugmentConfig, Config, DataConfig, TrainConfig
from ftexp.data.batches import Batch
from ftexp.data.order import SampleOrder
from ftexp.data.plan import ShardPlan
from ftexp.data.sampling import ClassTable, identities, run_order
from ftexp.rundir.names import LEDGER
from ftexp.rundir.sample_ledger import SampleLedger, Update, last_attempt, problems, read_updates
from ftexp.storage.directory import Storage

NUM_SAMPLES, BATCH, EPOCHS = 10, 4, 3
TOTAL = NUM_SAMPLES * EPOCHS  # seven steps of four samples, and one of two


@pytest.fixture
def run_dir(tmp_path):
    return Storage.at(str(tmp_path / "run"))


def batches(world_size, rank, start_step=0, seed=0, accumulate=1):
    """Yield (step, Batch) of one rank's share after `start_step`, as its feed does."""
    plan, order = ShardPlan(BATCH, accumulate, TOTAL, rank, world_size), SampleOrder(seed, NUM_SAMPLES)
    for step, (start, end) in enumerate(plan.batch_ends(start_step * BATCH), start=start_step + 1):
        positions = np.concatenate([share.positions[: share.num_counted] for share in plan.micro_shares(start, end)])
        yield step, Batch(start, end, [], positions, order.samples(positions))


def write(run_dir, attempt, world_size, start_step=0, last_step=99, **how):
    for rank in range(world_size):
        ledger = SampleLedger(run_dir.child(LEDGER), attempt, rank)
        for step, batch in batches(world_size, rank, start_step, **how):
            if step <= last_step:
                ledger.note(step, batch)
        ledger.flush()


def found(updates):
    return [text for _, text in problems(updates, NUM_SAMPLES, BATCH)]


def correct():
    """Return the updates of a run without faults, derived from the order alone."""
    order, updates = SampleOrder(0, NUM_SAMPLES), []
    for step, start in enumerate(range(0, TOTAL, BATCH), start=1):
        positions = np.arange(start, min(start + BATCH, TOTAL))
        updates.append(Update(step, 1, tuple(positions.tolist()), tuple(order.samples(positions).tolist())))
    return updates


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_without_a_fault_has_no_problem_at_any_number_of_workers(run_dir, world_size, accumulate):
    write(run_dir, attempt=1, world_size=world_size, accumulate=accumulate)
    updates = read_updates(run_dir)
    assert updates == correct()
    assert found(updates) == []
    assert [len(update.positions) for update in updates] == [4] * 7 + [2]


def test_a_step_that_was_done_again_counts_as_it_was_done_last(run_dir):
    write(run_dir, attempt=1, world_size=3, last_step=5, seed=7)  # another seed, so that its samples differ
    write(run_dir, attempt=2, world_size=1, start_step=3, last_step=6)
    write(run_dir, attempt=10, world_size=2, start_step=4)  # attempts are ordered as numbers: 10 is after 2
    updates = read_updates(run_dir)
    assert [update.attempt for update in updates] == [1, 1, 1, 2, 10, 10, 10, 10]
    assert updates[3].samples == correct()[3].samples
    assert [update.samples for update in updates[4:]] == [update.samples for update in correct()[4:]]
    assert updates[0].samples != correct()[0].samples


def test_a_restart_with_another_number_of_workers_is_still_exactly_once(run_dir):
    write(run_dir, attempt=1, world_size=3, last_step=4)
    write(run_dir, attempt=2, world_size=1, start_step=2, last_step=5)
    write(run_dir, attempt=3, world_size=2, start_step=5)
    updates = read_updates(run_dir)
    assert found(updates) == []
    assert [(update.positions, update.samples) for update in updates] == [
        (update.positions, update.samples) for update in correct()
    ]


def test_a_line_that_a_kill_tore_is_left_out(run_dir):
    write(run_dir, attempt=1, world_size=2, last_step=4)
    directory = run_dir.child(LEDGER)
    content = directory.read_bytes("a0001.r1.jsonl")
    directory.write_bytes("a0001.r1.jsonl", content + content.splitlines()[-1][:-1].replace(b'"step": 4', b'"step": 5'))
    assert read_updates(run_dir) == correct()[:4]


def test_every_line_can_be_read_once_it_is_flushed(run_dir, memory):
    for storage in (run_dir, Storage(memory)):
        ledger = SampleLedger(storage.child(LEDGER), 1, 0)
        for step, batch in batches(1, 0):
            ledger.note(step, batch)
            ledger.flush()
            assert read_updates(storage) == correct()[:step]


def test_a_line_is_plain_json_with_the_step_its_positions_and_its_samples(run_dir):
    write(run_dir, attempt=1, world_size=2, last_step=1)
    lines = run_dir.child(LEDGER).read_bytes("a0001.r1.jsonl").decode().splitlines()
    samples = SampleOrder(0, NUM_SAMPLES).samples(np.array([2, 3])).tolist()
    assert [json.loads(line) for line in lines] == [{"step": 1, "positions": [2, 3], "samples": samples}]


def test_a_run_without_a_ledger_writes_and_finds_nothing(run_dir):
    ledger = SampleLedger(None, 1, 0)
    ledger.note(*next(batches(1, 0)))
    ledger.flush()
    assert read_updates(run_dir) == []
    assert found([]) == []
    assert not run_dir.exists()


def changed(step, **fields):
    updates = correct()
    updates[step - 1] = dataclasses.replace(updates[step - 1], **fields)
    return updates


def test_a_missing_step_is_found():
    for missing in (1, 2, 7):
        updates = [update for update in correct() if update.step != missing]
        assert found(updates) == [f"step {missing} is missing"]


def test_a_sample_that_drove_two_steps_of_an_epoch_is_found_and_so_is_the_one_left_out():
    first, second = correct()[0].samples, correct()[1].samples
    updates = changed(2, samples=(first[0], *second[1:]))
    assert found(updates) == [
        f"sample {first[0]} drove step 1 and step 2 of one epoch",
        f"epoch 0 used {NUM_SAMPLES - 1} of {NUM_SAMPLES} samples",
    ]


def test_a_sample_twice_in_one_batch_is_found():
    samples = correct()[1].samples
    assert found(changed(2, samples=(*samples[:3], samples[0])))[0] == (
        f"sample {samples[0]} drove step 2 and step 2 of one epoch"
    )


def test_a_sample_may_come_again_in_the_next_epoch():
    samples = [sample for update in correct() for sample in update.samples]
    assert sorted(samples[:NUM_SAMPLES]) == sorted(samples[NUM_SAMPLES : 2 * NUM_SAMPLES])
    assert found(correct()) == []


def test_wrong_positions_are_found():
    updates = changed(3, positions=(8, 9, 10, 12))
    assert found(updates) == ["step 3 was driven by other positions than 8 to 11"]
    assert found(changed(3, positions=(9, 10, 11, 12)))[0] == "step 3 was driven by other positions than 8 to 11"


def test_a_short_batch_is_found_wherever_it_is_not_the_last():
    updates = correct()
    short = dataclasses.replace(updates[2], positions=updates[2].positions[:3], samples=updates[2].samples[:3])
    assert found([*updates[:2], short, *updates[3:]])[0] == "step 3 was driven by 3 samples, not 4"
    assert found([*updates[:2], short]) == []  # a short batch may be the last one of a stopped run


def test_a_rank_whose_lines_are_gone_is_found(run_dir):
    write(run_dir, attempt=1, world_size=2)
    run_dir.child(LEDGER).delete_file("a0001.r1.jsonl")
    text = found(read_updates(run_dir))
    assert "step 1 was driven by 2 samples, not 4" in text
    assert "epoch 0 used 6 of 10 samples" in text


def test_the_last_attempt_is_the_highest_that_wrote_a_line(run_dir):
    assert last_attempt(run_dir) == 0
    write(run_dir, attempt=12, world_size=2, last_step=1)
    write(run_dir, attempt=3, world_size=1, last_step=1)
    assert last_attempt(run_dir) == 12


def drawn(config, epochs=6):
    """Return the updates of a run over classes of 2, 0 and 8 samples, with the sampling of `config`; and identities."""
    table, updates = ClassTable.of(np.array([2, 0, 2, 2, 2, 2, 0, 2, 2, 2]), 3), []
    order = run_order(config, NUM_SAMPLES, None, table)
    for step, start in enumerate(range(0, epochs * NUM_SAMPLES, BATCH), start=1):
        positions = np.arange(start, min(start + BATCH, epochs * NUM_SAMPLES))
        updates.append(Update(step, 1, tuple(positions.tolist()), tuple(order.samples(positions).tolist())))
    return updates, identities(config, NUM_SAMPLES, table.counts.tolist())


@pytest.mark.parametrize("draws", [("balanced", 1), ("sqrt", 1), ("shuffle", 3), ("balanced", 2)], ids=str)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_what_is_drawn_by_class_or_repeated_is_checked_against_what_is_drawn(draws, step):
    sampling, repeats = draws
    config = Config(
        data=DataConfig(sampling=sampling),
        augment=AugmentConfig(repeats=repeats),
        train=TrainConfig(global_batch_size=BATCH),
    )
    updates, drawn_by = drawn(config)
    assert list(problems(updates, NUM_SAMPLES, BATCH, drawn_by)) == []
    assert found(updates) != []  # samples don't come once per epoch
    samples = updates[step - 1].samples
    other = next(sample for sample in range(NUM_SAMPLES) if sample not in samples)
    for wrong in ((other, *samples[1:]), (*samples[1:], samples[0])):
        changed = [*updates]
        changed[step - 1] = dataclasses.replace(updates[step - 1], samples=wrong)
        assert any("the order draws" in text for _, text in problems(changed, NUM_SAMPLES, BATCH, drawn_by))
    del updates[2]
    assert [text for _, text in problems(updates, NUM_SAMPLES, BATCH, drawn_by)] == ["step 3 is missing"]


@given(data=st.data())
def test_no_swap_of_a_sample_goes_unnoticed(data):
    updates = correct()
    step = data.draw(st.integers(1, len(updates) - 3))  # in a completed epoch
    place = data.draw(st.integers(0, BATCH - 1))
    samples = list(updates[step - 1].samples)
    other = data.draw(st.integers(0, NUM_SAMPLES - 1).filter(lambda sample: sample != samples[place]))
    samples[place] = other
    assert found(changed(step, samples=tuple(samples))) != []


def test_what_was_rolled_back_does_not_stand_and_what_was_left_out_is_marked(run_dir):
    for rank in range(2):
        ledger = SampleLedger(run_dir.child(LEDGER), 1, rank)
        done = dict(batches(2, rank))
        for step in (1, 2, 3, 4):
            ledger.note(step, done[step])
        ledger.back_to(1)
        for step in (2, 3):  # a power failure comes after these
            ledger.note(step, done[step], skipped=step == 3)
        ledger.flush()
    one, two, three, *_ = correct()
    assert read_updates(run_dir) == [one, two, dataclasses.replace(three, skipped=True)]
