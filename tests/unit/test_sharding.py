"""Shards: their rows, files that are verified in parts, and corruption that is found anywhere."""

import contextlib
import io
import itertools
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftexp import api
from ftexp.chaos.strike import damage
from ftexp.checkpoint import slices
from ftexp.checkpoint.compare import tree_differences
from ftexp.checkpoint.converting import as_full, as_sharded
from ftexp.checkpoint.full_model import add_full_models
from ftexp.checkpoint.manifest import EXTRA, FILES, MODEL, OPTIMIZER, Manifest, content_hash, shard_file
from ftexp.checkpoint.reading import read_part, read_parts, read_weights, weights_at
from ftexp.checkpoint.sharding import Guard, LivePiece, Piece, overlaps, slices_of
from ftexp.checkpoint.slices import SliceFile, Wanted
from ftexp.checkpoint.staging import writer
from ftexp.checkpoint.store import CheckpointStore
from ftexp.checkpoint.writing import CheckpointWriter, Saving
from ftexp.checkpoints import convert, show, show_differences
from ftexp.config.schema import CheckpointConfig
from ftexp.errors import CheckpointError, ConfigError
from ftexp.model.parallel.parts import rows_of
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage
from ftexp.wire import events
from tests.support.jobs import ALONE, Lines
from tests.support.saved_runs import CHECKPOINT, random_weights, saved_run


def manifest(step=10):
    return Manifest(
        name=f"step_{step:08d}.a1", step=step, epoch=0, position=step, attempt=1, world_size=2, metrics={},
        state_versions={}, written_by="run 'x'", written_at=1.5, versions={}, fingerprint={},
    )  # fmt: skip


def content():
    """State of a run: uneven rows, one row, no row, several dtypes, and values that aren't sharded."""
    torch.manual_seed(3)
    weights = {
        "conv.weight": torch.randn(5, 2, 3, 3).to(memory_format=torch.channels_last),
        "bias": torch.randn(7),
        "half": torch.randn(6, 4).to(torch.bfloat16),
        "one": torch.randn(1, 9),
        "none": torch.empty(0, 4),
        "num_batches_tracked": torch.tensor(3),
    }
    moments = {
        0: {"step": torch.tensor(4.0), "exp_avg": torch.randn(5, 2, 3, 3)},
        1: {"step": torch.tensor(4.0), "exp_avg": torch.randn(7)},
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]
    extra = {"progress": {"step": 10}, "ema": {"weights": {"bias": torch.randn(7)}}, "rng": {"torch": torch.arange(9)}}
    return {MODEL: weights, OPTIMIZER: {"state": moments, "param_groups": groups}, EXTRA: extra}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(Storage.at(str(tmp_path / "checkpoints")))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(slices, "CHUNK_BYTES", 24)
    monkeypatch.setattr(slices, "_READ_BYTES", 60)
    monkeypatch.setattr(slices, "_GAP_BYTES", 30)


def full(store, step=10):
    return store.save(manifest(step), {name: writer(part) for name, part in content().items()})


def same(first, second):
    return list(tree_differences(first, second)) == []


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 40))
def test_from_any_number_of_workers_to_any_other_each_row_is_read_exactly_once(num_rows, before, after):
    read = []
    for shard in range(after):
        for source, rows in overlaps(num_rows, rows_of(num_rows, shard, after), before):
            assert rows
            assert set(rows) <= set(rows_of(num_rows, source, before))
            read += rows
    assert read == list(range(num_rows))


@given(st.integers(1, 60), st.integers(1, 20))
def test_rows_are_cut_as_torch_cuts_them(num_rows, num_shards):
    chunks = list(torch.arange(num_rows).chunk(num_shards))
    for shard in range(num_shards):
        expected = chunks[shard].tolist() if shard < len(chunks) else []
        assert list(rows_of(num_rows, shard, num_shards)) == expected


@given(st.data(), st.integers(1, 30), st.integers(1, 5))
def test_any_rows_of_a_file_are_read_with_the_chunks_around_them_alone(data, num_rows, columns):
    first = data.draw(st.integers(0, 9))
    rows = torch.arange(num_rows * columns, dtype=torch.int16).view(num_rows, columns)
    piece = Piece(rows, first, (first + num_rows + 3, columns))
    file = SliceFile(slices_of({"x": piece, "y": Piece(torch.ones(3), 0, (3,))}))
    stream = io.BytesIO()
    file(stream)
    start = data.draw(st.integers(first, first + num_rows))
    stop = data.draw(st.integers(start, first + num_rows))
    read, found = [], bytearray(2 * columns * (stop - start))

    class File(io.BytesIO):
        def size(self):
            return len(self.getvalue())

        def read_at(self, count, offset):
            read.append((offset, count))
            return self.getvalue()[offset : offset + count]

    class Folder:
        @contextlib.contextmanager
        def reading_at(self, name):
            yield File(stream.getvalue())

    def put(offset, data):
        found[offset : offset + len(data)] = data

    slices.read(Folder(), "f", file.described, [Wanted("x", range(start, stop), "I16", piece.shape, put)])
    assert bytes(found) == rows[start - first : stop - first].numpy().tobytes()
    assert read[0] == (0, file.described[slices.HEADER_BYTES])
    assert len(read) == 1 + (stop > start)


def test_each_file_is_one_of_safetensors(store, tmp_path, small_chunks):
    parts = content()
    saved = as_sharded(store, full(store), CheckpointStore(store.storage.parent.child("sharded")), 2)
    directory = tmp_path / "sharded" / saved.name
    first, second = (safetensors.torch.load_file(directory / shard_file(MODEL, shard, 2)) for shard in range(2))
    assert sorted(first) == ["bias", "conv.weight", "half", "one"]
    assert sorted(second) == ["bias", "conv.weight", "half"]  # the only row of `one` is in the first shard
    for name in second:
        assert torch.equal(torch.cat([first[name], second[name]]), parts[MODEL][name])
    assert (
        safetensors.torch.load_file(directory / shard_file(EXTRA, 1, 2))["ema/weights/bias"].tolist()
        == parts[EXTRA]["ema"]["weights"]["bias"][4:].tolist()
    )
    sizes = sum(path.stat().st_size for path in directory.iterdir() if path.suffix != ".json")
    assert saved.num_bytes == sizes


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_a_checkpoint_is_the_same_bits_sharded_and_back(store, small_chunks, num_shards):
    whole, parts = full(store), content()
    between = CheckpointStore(store.storage.parent.child("sharded"))
    sharded = as_sharded(store, whole, between, num_shards)
    between.verify(sharded)
    assert between.latest(lambda *_: pytest.fail("nothing is damaged")) == sharded
    assert between.by_name(sharded.name).mesh == {"dims": {"shard": num_shards}, "num_shards": num_shards}
    assert same(read_parts(between, sharded, FILES), parts)
    again = CheckpointStore(store.storage.parent.child("again"))
    back = as_full(between, sharded, again)
    assert back.mesh is None
    for name in FILES:
        loaded = torch.load(again.storage.local_path / back.name / name, weights_only=True)
        assert same(loaded, parts[name])
    assert [path.name for path in again.storage.local_path.iterdir()] == [back.name]
    twice = CheckpointStore(store.storage.parent.child("twice"))
    assert same(read_parts(twice, as_sharded(between, sharded, twice, num_shards + 1), FILES), parts)


def test_a_sharded_checkpoint_on_an_object_store_is_read_converted_and_rejected_alike(memory, store, small_chunks):
    out = CheckpointStore(Storage(memory).child("checkpoints"))
    sharded = as_sharded(store, full(store), out, 3)
    assert same(read_parts(out, out.latest(lambda *_: None), FILES), content())
    added = next(iter([*add_full_models(out, {10}), None]))
    assert added is None
    complete = out.by_name(sharded.name)
    assert sorted({*complete.files} - {*sharded.files}) == [MODEL]
    assert same(torch.load(io.BytesIO(out.read_file(complete, MODEL)), weights_only=True), content()[MODEL])
    directory = out.storage.child(sharded.name)
    directory.write_bytes(shard_file(MODEL, 1, 3), directory.read_bytes(shard_file(MODEL, 1, 3))[:-1])
    with pytest.raises(CheckpointError, match=r"^model\.00001-of-00003\.safetensors has"):
        read_part(out, complete, MODEL)


def test_a_model_pt_is_added_to_checkpoints_that_lack_it_and_known_to_their_manifests(store, small_chunks):
    out = CheckpointStore(store.storage.parent.child("sharded"))
    for step in (10, 20, 30):
        as_sharded(store, full(store, step), out, 2)
    before = {step: content_hash(out.by_name(manifest(step).name), MODEL) for step in (10, 30)}
    assert list(add_full_models(out, {10, 30, None})) == []
    assert [MODEL in each.files for each in out.manifests(lambda *_: None)] == [True, False, True]
    for step, known in before.items():
        complete = out.by_name(manifest(step).name)
        out.verify(complete)
        assert content_hash(complete, MODEL) == known
        path = out.storage.local_path / complete.name / MODEL
        assert same(torch.load(path, weights_only=True), content()[MODEL])
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"^model\.pt has"):
            out.verify(complete)


@pytest.mark.parametrize(
    ("full_at", "is_end", "best", "expected"),
    [
        ("end", True, 10, [10, 30]),
        ("end", False, 30, []),
        ("best", False, 30, [30]),
        ("best", False, 10, []),
        ("best", True, 10, [10, 30]),
        ("never", True, 10, []),
    ],
)
def test_model_pt_is_written_when_the_config_says_and_where_it_cannot_be_the_run_goes_on(
    store, small_chunks, monkeypatch, full_at, is_end, best, expected
):
    out, lines = CheckpointStore(store.storage.parent.child("sharded")), Lines()
    saved = [as_sharded(store, full(store, step), out, 2) for step in (10, 20, 30)][-1]
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    made = CheckpointWriter(CheckpointConfig(full_at=full_at), ALONE, lines, out, is_sharded=False, timeout_s=None)
    saving = Saving(saved, {}, None, {}, {}, is_last=is_end, is_end=is_end, pending=(), best_step=best)
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "writing", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        made._add_full_models(saving, saved)
    failed = lines.events(events.FullModelFailed)
    assert sorted(each.checkpoint for each in failed) == [manifest(step).name for step in expected]
    assert {each.error for each in failed} <= {"disk full"}
    made._add_full_models(saving, saved)
    assert [each.step for each in out.manifests(lambda *_: None) if MODEL in each.files] == expected[::-1]
    assert lines.events(events.FullModelFailed) == failed


def test_rows_that_change_while_they_are_written_are_written_as_they_were(small_chunks):
    values = {name: torch.arange(20.0) + number for number, name in enumerate("abc")}
    live, guard, copied, stream = {name: rows.clone() for name, rows in values.items()}, Guard(), [], io.BytesIO()
    pieces = {name: LivePiece(rows, 0, (20,), guard) for name, rows in live.items()}
    num_written = itertools.count(1)

    def copy(rows):
        copied.append(rows)
        return rows.clone()

    def write(data):
        if next(num_written) == 1 + 4 + 2:  # after the header, all of the first tensor and half of the second
            with guard.lock:
                for piece in pieces.values():
                    piece.settle(copy)
            for rows in live.values():
                rows.zero_()
        return stream.write(data)

    file = SliceFile(slices_of(pieces))
    assert [piece.with_rows(torch.sum).item() for piece in pieces.values()] == [190.0, 210.0, 230.0]
    file(SimpleNamespace(write=write))
    found = safetensors.torch.load(stream.getvalue())
    assert all(torch.equal(found[name], rows) for name, rows in values.items())
    assert [rows.data_ptr() for rows in copied] == [live[name].data_ptr() for name in "bc"]
    with pytest.raises(CheckpointError, match="written once already"):
        slices_of(pieces)


def test_rows_that_are_written_already_are_not_copied(small_chunks):
    guard = Guard()
    pieces = {name: LivePiece(torch.randn(20), 0, (20,), guard) for name in "ab"}
    SliceFile(slices_of(pieces))(io.BytesIO())
    with guard.lock:
        for piece in pieces.values():
            piece.settle(lambda rows: pytest.fail("a copy that nobody needs"))


def truncate(directory, name):
    (directory / name).write_bytes((directory / name).read_bytes()[:-1])


def lengthen(directory, name):
    (directory / name).write_bytes((directory / name).read_bytes() + b"x")


def remove(directory, name):
    (directory / name).unlink()


def flip_a_byte_of_the_header(directory, name):
    _flip(directory / name, 20)


def flip_the_last_byte(directory, name):
    _flip(directory / name, -1)


def swap_with_another_ranks(directory, name):
    other = name.replace("00001-of", "00000-of")
    mine, theirs = (directory / name).read_bytes(), (directory / other).read_bytes()
    (directory / name).write_bytes(theirs)
    (directory / other).write_bytes(mine)


def _flip(path, place):
    found = bytearray(path.read_bytes())
    found[place] ^= 1
    path.write_bytes(bytes(found))


DAMAGES = [
    (truncate, "has .* bytes, not"),
    (lengthen, "has .* bytes, not"),
    (remove, r"can't be read \(FileNotFoundError\)"),
    (flip_a_byte_of_the_header, "differs from its BLAKE3"),
    (flip_the_last_byte, "differs from its BLAKE3"),
    (swap_with_another_ranks, "(has .* bytes, not|differs from its BLAKE3)"),
]


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize(("break_it", "reason"), DAMAGES, ids=[break_it.__name__ for break_it, _ in DAMAGES])
def test_damage_to_any_file_is_rejected_by_name_and_the_one_before_is_taken(store, break_it, reason, part):
    out = CheckpointStore(store.storage.parent.child("sharded"))
    older, newer = (as_sharded(store, full(store, step), out, 2) for step in (10, 20))
    name = shard_file(part, 1, 2)
    break_it(out.storage.local_path / newer.name, name)
    named = r"\d-of-00002" if break_it is swap_with_another_ranks else "1-of-00002"
    expected = rf"^{part.removesuffix('.pt')}\.0000{named}\.safetensors {reason}"
    with pytest.raises(CheckpointError, match=expected):
        read_parts(out, newer, FILES)
    rejected = {}
    assert out.latest(rejected.__setitem__) == older
    assert list(rejected) == [newer.name]
    with pytest.raises(CheckpointError, match=expected):
        raise CheckpointError(rejected[newer.name])
    others = [name for name in FILES if name != part]
    assert same(read_parts(out, newer, others), {name: content()[name] for name in others})


def test_a_file_that_only_its_writer_sees_is_no_checkpoint(store):
    files = store.write(manifest().name, {"model.pt": writer({})})
    (store.storage.child(manifest().name).draft.local_path / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"model\.pt was written, and isn't at .* one directory for all workers"):
        store.commit(Manifest(**{**vars(manifest()), "files": files}))
    assert store.storage.list_directories() == []


def test_the_command_converts_lists_and_compares(store, capsys, small_chunks):
    run, elsewhere = store.storage.parent, store.storage.parent.child("elsewhere")
    whole = full(store)
    assert convert(run, "sharded:3", whole.name, elsewhere.uri)
    sharded = elsewhere.child(whole.name).uri
    assert show_differences(run, whole.name, sharded)
    assert convert(run, "full", sharded, store.storage.parent.child("back").uri)
    assert show_differences(run, sharded, store.storage.parent.child("back", whole.name).uri)
    assert capsys.readouterr().out.count("bitwise identical") == 2
    other = content()
    other[MODEL]["bias"][6] += 1
    store.save(manifest(20), {name: writer(part) for name, part in other.items()})
    assert not show_differences(run, manifest(20).name, sharded)
    assert "model.pt/bias: 1 of 7 values differ" in capsys.readouterr().out
    for wanted, name, out, why in (
        ("sharded:0", whole.name, "new", "--convert sharded:0: give full, or sharded:N"),
        ("full", whole.name, "new", "is not sharded: convert it to sharded:N"),
        ("sharded:2", whole.name, "elsewhere", "already exists"),
    ):
        with pytest.raises(ConfigError, match=why):
            convert(run, wanted, name, run.child(out).uri)
    as_sharded(store, whole, CheckpointStore(run.child("other", CHECKPOINTS)), 2)
    assert show(run.child("other"))
    assert "2 shards" in capsys.readouterr().out
    damage(run.child("other", CHECKPOINTS, whole.name), "flip_byte")
    assert not show(run.child("other"))
    assert "no: optimizer.00000-of-00002.safetensors differs from its BLAKE3" in capsys.readouterr().out


def test_a_run_of_sharded_checkpoints_is_loaded_by_one_process_as_any_other(tmp_path):
    average = random_weights(timm.create_model("test_resnet", num_classes=3)).state_dict()
    run = saved_run(tmp_path / "run", "model.name=test_resnet", average=average)
    moved = saved_run(tmp_path / "sharded", "model.name=test_resnet")
    saved = run.store.by_name(CHECKPOINT)
    moved.store.storage.child(CHECKPOINT).delete()
    as_sharded(run.store, saved, moved.store, 3)
    sharded = moved.store.by_name(CHECKPOINT)
    for weights in ("raw", "ema"):
        assert same(read_weights(moved.store, sharded, weights), read_weights(run.store, saved, weights))
    assert same(read_weights(moved.store, sharded, "ema"), average)
    models = [api.load_model(each.storage.uri).model.state_dict() for each in (run, moved)]
    assert same(*models)
    found, digest = weights_at(moved.store.storage.child(CHECKPOINT).uri, MODEL)
    assert same(found, models[0])
    assert digest == content_hash(sharded, MODEL)
    damage(moved.store.storage.child(CHECKPOINT), "truncate_checkpoint")
    with pytest.raises(CheckpointError, match=r"^model\.00000-of-00003\.safetensors has"):
        api.load_model(moved.storage.uri)
