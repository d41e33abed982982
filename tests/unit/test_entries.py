"""Entries of a source: each one is used, excluded by a rule and counted, or bad and named. Without Ray."""

import os

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

import ftexp.data.listing
from ftexp.cli.trained_run import require_data
from ftexp.config.schema import DataConfig
from ftexp.data.info import BadSample, Excluded, reasons
from ftexp.data.root import require_root
from ftexp.data.sources import entries as module
from ftexp.data.sources.entries import Account, files_at
from ftexp.driver.run import train
from ftexp.errors import DataError
from ftexp.inspecting.command import inspect
from tests.support.configs import composed

IMAGES = (".png", ".jpg")


@pytest.fixture
def slept(monkeypatch):
    """List of the seconds that would have been slept."""
    seconds = []
    monkeypatch.setattr(ftexp.data.listing.time, "sleep", seconds.append)
    return seconds


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1234")


def found_at(root, filesystem=None, endings=IMAGES):
    """Return (files below the root, account of the others)."""
    account = Account()
    where = str(root) if filesystem is None else ""
    infos = files_at(filesystem or LocalFileSystem(), where, DataConfig(root=str(root)), account, endings)
    assert {info.size for info in infos} <= {4}
    return sorted(info.path.removeprefix(f"{root}/") for info in infos), account


@pytest.mark.parametrize("stored", [False, True], ids=["on disk", "in a store"])
def test_files_are_selected_by_their_ending_in_any_case_and_every_other_entry_is_counted(tmp_path, stored):
    touch(tmp_path, "a/0.png", "a/1.JPG", "b/c/2.Png", "e.png/3.png")
    touch(tmp_path, "a/Thumbs.db", "notes/readme.md", "notes/png")
    touch(tmp_path, ".DS_Store", "a/._0.png", ".git/objects/4.png", ".git/objects/5.png")
    touch(tmp_path, "a/@eaDir/0.png/THUMB.png", "a/@eaDir/1.png/THUMB.png", "lost+found/6.png", "__MACOSX/a/7.png")

    names, account = found_at(tmp_path, SubTreeFileSystem(str(tmp_path), LocalFileSystem()) if stored else None)

    assert names == ["a/0.png", "a/1.JPG", "b/c/2.Png", "e.png/3.png"]
    assert account.bad == []
    assert {rule.reason: rule.count for rule in account.excluded} == {
        "no image extension": 3,
        "hidden": 3,
        "system directory": 3,
    }


def test_a_link_to_nothing_is_bad_and_named_be_it_a_file_a_directory_or_itself(tmp_path):
    touch(tmp_path, "a/0.png", "elsewhere.png")
    (tmp_path / "a" / "1.png").symlink_to("../elsewhere.png")
    (tmp_path / "a" / "2.png").symlink_to("/nowhere/2.png")
    (tmp_path / "b").symlink_to("nowhere")
    (tmp_path / "c.png").symlink_to("c.png")
    (tmp_path / ".d.png").symlink_to("/nowhere")

    names, account = found_at(tmp_path)

    assert names == ["a/0.png", "a/1.png", "elsewhere.png"]
    bad = {sample.where.removeprefix(f"{tmp_path}/"): sample.reason for sample in account.bad}
    assert set(bad) == {"a/2.png", "b", "c.png"}
    assert bad["a/2.png"] == "a symbolic link to /nowhere/2.png, which does not exist"
    assert "Too many levels of symbolic links" in bad["c.png"]
    assert account.excluded == [Excluded("hidden", 1, f"{tmp_path}/.d.png")]


@pytest.mark.parametrize(
    ("links", "cut"),
    [
        ({"a/loop": ".."}, 1),
        ({"a/loop": "."}, 1),
        ({"a/x": "../b", "b/y": "../a"}, 2),
        ({"a/x": "../b", "b/y": "../c", "c/z": "../a"}, 3),
        ({"a/up": "../.."}, 1),
    ],
    ids=["up", "self", "mutual", "three", "above the root"],
)
def test_a_directory_cycle_multiplies_nothing(tmp_path, links, cut):
    root = tmp_path / "root"
    touch(root, "a/0.png", "b/1.png", "c/2.png", "c/d/3.png")
    for link, target in links.items():
        (root / link).symlink_to(target)

    names, account = found_at(root)

    assert names == ["a/0.png", "b/1.png", "c/2.png", "c/d/3.png"]
    assert account.bad == []
    ((rule, count),) = [(rule.reason, rule.count) for rule in account.excluded]
    assert (rule, count) == ("symbolic link in a directory cycle", cut)


def test_links_that_make_no_cycle_are_followed_by_every_path(tmp_path):
    touch(tmp_path, "store/x/0.png", "root/train/a/1.png")
    (tmp_path / "root" / "train" / "b").symlink_to("../../store/x")
    (tmp_path / "root" / "val").symlink_to("train")

    names, account = found_at(tmp_path / "root")

    assert names == ["train/a/1.png", "train/b/0.png", "val/a/1.png", "val/b/0.png"]
    assert (account.bad, account.excluded) == ([], [])


@pytest.fixture
def forbidden(tmp_path, monkeypatch):
    """Directory that can't be read, not even by root."""
    path = str(tmp_path / "private")
    scandir = os.scandir

    def refusing(where):
        if where == path:
            raise PermissionError(13, "Permission denied", where)
        return scandir(where)

    monkeypatch.setattr(module.os, "scandir", refusing)
    return path


def test_a_directory_without_permission_is_bad_and_the_others_are_listed(tmp_path, forbidden, slept):
    touch(tmp_path, "a/0.png", "private/1.png")

    names, account = found_at(tmp_path)

    assert names == ["a/0.png"]
    assert account.bad == [BadSample(forbidden, f"PermissionError: [Errno 13] Permission denied: '{forbidden}'")]
    with pytest.raises(DataError, match=r"^data\.root=.*/private can't be listed: .*Permission denied"):
        found_at(forbidden)
    assert not slept


def test_a_name_that_is_not_utf_8_is_bad_and_what_is_no_file_is_excluded(tmp_path):
    touch(tmp_path, "0.png")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):  # noqa: PTH123 - a name in bytes
        pass
    os.mkfifo(tmp_path / "pipe.png")

    names, account = found_at(tmp_path)

    assert names == ["0.png"]
    assert account.bad == [BadSample(f"{tmp_path}/\\xff.png", "its name is not UTF-8")]
    assert account.excluded == [Excluded("no regular file", 1, f"{tmp_path}/pipe.png")]


class FlakyFolder:
    """A filesystem whose first `num_failures` calls fail."""

    def __init__(self, num_failures):
        self._local, self._left = LocalFileSystem(), num_failures

    def get_file_info(self, what):
        if self._left:
            self._left -= 1
            raise OSError("slow down")
        return self._local.get_file_info(what)


def test_a_store_that_fails_while_it_is_listed_is_asked_again(tmp_path, slept):
    touch(tmp_path, "a/0.png", "b/c/1.png")
    assert found_at(tmp_path, endings=())[0] == ["a/0.png", "b/c/1.png"]

    def listed(store, root):
        return sorted(info.path for info in files_at(store, root, DataConfig(root=root), Account()))

    root = str(tmp_path)
    assert listed(FlakyFolder(3), root) == [f"{root}/a/0.png", f"{root}/b/c/1.png"]
    assert listed(FlakyFolder(0), f"{root}/a/0.png") == [f"{root}/a/0.png"]
    assert slept == [0.2, 1.0, 3.0]
    with pytest.raises(DataError, match=rf"^data\.root={root} can't be listed: slow down$"):
        listed(FlakyFolder(4), root)
    slept.clear()
    with pytest.raises(DataError, match=rf"^data\.root={root}/nowhere does not exist$"):
        listed(FlakyFolder(0), f"{root}/nowhere")
    assert not slept


def test_accounts_add_up_and_say_why_entries_are_no_samples():
    account, other = Account(), Account()
    account.exclude("a/x.md", "no image extension")
    other.exclude("b/y.md", "no image extension", 1_999)
    other.exclude("b/.z", "hidden")
    other.add_bad("b/1.png", "torn")

    account.add(other)

    assert reasons(account.excluded, account.bad) == (
        "\nexcluded 2,000 entries: no image extension (such as a/x.md)\nexcluded 1 entry: hidden (b/.z)\nb/1.png: torn"
    )
    many = [BadSample(str(number), "torn") for number in range(12)]
    assert reasons([], many).endswith("\n9: torn\nand 2 more")


@pytest.mark.parametrize("root", ["{}/nowhere", "file://{}/nowhere", "nowhere"])
@pytest.mark.parametrize("name", ["image_folder", "image_list", "parquet", "webdataset"])
def test_a_missing_root_of_files_is_noticed_at_first_sight(tmp_path, name, root):
    root = root.format(tmp_path)
    with pytest.raises(DataError, match=rf"^data\.root={root} does not exist$"):
        require_root(DataConfig(name=name, root=root))


@pytest.mark.parametrize("command", [train, inspect])
def test_a_missing_root_is_noticed_before_ray_is_imported(tmp_path, monkeypatch, command):
    monkeypatch.setattr("ftexp.cluster.ray_cluster.prepare_environment", lambda _: pytest.fail("Ray is next"))
    config = composed("data=image_folder", f"data.root={tmp_path}/nowhere", f"run.storage={tmp_path}")
    with pytest.raises(DataError, match="does not exist"):
        command(config)


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("image_folder", "{}"),
        ("image_folder", "s3://bucket/nowhere"),
        ("cifar10", "{}/nowhere"),  # it may be downloaded to this directory
        ("mine", "what only a source of the user's understands"),
        ("digits", None),
    ],
)
def test_what_may_be_there_is_left_to_the_source(tmp_path, name, root):
    data = DataConfig(name=name, root=root and root.format(tmp_path))
    require_root(data)
    require_data(data)
