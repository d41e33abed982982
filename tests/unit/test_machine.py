"""Problems of the machine are found before Ray starts: avoided if that is safe, else reported in one line."""

import getpass
import os
import stat

import pytest

from ftexp.config import machine
from ftexp.config.checks.validate import validate
from ftexp.errors import ConfigError
from tests.support.configs import composed

PRIVATE = f"/tmp/ftexp-{os.getuid()}"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Home directory and environment of a machine without problems, into which a test introduces one."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
        monkeypatch.setenv(name, "")  # so that values set by the test are restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def forbid(monkeypatch):
    """Function that makes directories appear unwritable, even to root."""
    access = os.access

    def forbid(*directories):
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in directories and access(path, mode))

    return forbid


def changed():
    names = ("RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH", "TORCHINDUCTOR_CACHE_DIR")
    return {name: os.environ[name] for name in names if name in os.environ}


def test_where_nothing_is_lacking_nothing_is_set(home, monkeypatch):
    machine.prepare_machine()
    monkeypatch.setenv("TMPDIR", "")
    machine.prepare_machine()
    assert changed() == {}
    assert "TMPDIR" not in os.environ


def test_a_folder_that_is_too_long_for_a_socket_is_exchanged_for_a_short_one_of_this_users_own(home, monkeypatch):
    longest = "/tmp/" + "x" * (107 - machine._BELOW - 5)
    monkeypatch.setenv("TMPDIR", longest)
    machine.prepare_machine()
    assert changed() == {}
    monkeypatch.setenv("TMPDIR", longest + "x")
    machine.prepare_machine()
    assert changed() == {"RAY_TMPDIR": PRIVATE}
    status = os.lstat(PRIVATE)
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.getuid(), 0o700)


def test_a_folder_of_another_users_is_exchanged_too(home, forbid):
    forbid("/tmp/ray", "/tmp")
    machine.prepare_machine()
    assert changed() == {"RAY_TMPDIR": PRIVATE}


def test_what_the_user_has_set_is_not_exchanged_but_told(home, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 99)
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR=/tmp/x+: /tmp/x+ is too long for a socket's path by \d+ b"):
        machine.prepare_machine()


@pytest.mark.parametrize("spoil", ["another's", "open to all", "a link"])
def test_a_private_folder_that_is_not_private_is_refused(home, monkeypatch, tmp_path, spoil):
    directory = tmp_path / "private"
    if spoil == "a link":
        directory.symlink_to("/tmp")
    else:
        directory.mkdir(mode=0o700)
    if spoil == "open to all":
        directory.chmod(0o755)
    if spoil == "another's":
        os.chown(directory, 12345, 12345)
    monkeypatch.setattr(machine, "Path", lambda path: directory if str(path) == PRIVATE else type(directory)(path))
    with pytest.raises(ConfigError, match=r"it is lacking, and .*private is not this user's alone: set RAY_TMPDIR and"):
        machine._private("it is lacking")


def test_without_a_home_or_a_name_ray_and_torch_keep_their_files_in_the_private_folder(
    home, forbid, monkeypatch, tmp_path_factory
):
    own = tmp_path_factory.mktemp("own")
    monkeypatch.setattr(machine, "_private", lambda _: str(own))
    forbid(str(home))
    machine.prepare_machine()
    assert changed() == {"RAY_AUTH_TOKEN_PATH": f"{own}/auth_token"}
    token = (own / "auth_token").stat()
    assert (token.st_size, stat.S_IMODE(token.st_mode)) == (64, 0o600)

    def nobody():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nobody)
    machine.prepare_machine()
    assert changed()["TORCHINDUCTOR_CACHE_DIR"] == f"{own}/inductor"


def test_compiling_without_a_compiler_is_a_wrong_config(monkeypatch):
    config = composed("train.compile=true")
    monkeypatch.delenv("CXX", raising=False)
    validate(config)
    monkeypatch.setenv("CXX", "nowhere-g++ -O2")
    with pytest.raises(ConfigError, match=r"train\.compile=model needs a C\+\+ compiler, but CXX=nowhere-g\+\+ -O2 "):
        validate(config)
    monkeypatch.setenv("CXX", "")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"but there is no g\+\+: install g\+\+, set CXX to another"):
        validate(config)
    validate(composed())
