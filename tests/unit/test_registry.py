"""Registries of builders by name, and users' modules that extend them."""

import sys

import pytest

from ftexp.errors import ConfigError, UnknownNameError
from ftexp.registry import Registry, did_you_mean, load_plugins


@pytest.fixture
def registry():
    made = Registry("data.name")
    made.register("digits")("the digits")
    made.register("cifar10")("the photographs")
    return made


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Empty working directory; modules and paths added by a test are removed afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_registered_entry_is_found_again(registry):
    assert registry.get("digits") == "the digits"
    assert "digits" in registry
    assert "mnist" not in registry
    assert list(registry) == ["cifar10", "digits"]


def test_register_returns_what_it_decorates(registry):
    def source():
        pass

    assert registry.register("mine")(source) is source


def test_a_name_can_not_be_registered_twice(registry):
    with pytest.raises(ValueError, match=r"^data\.name: 'digits' is already registered; choose another name$"):
        registry.register("digits")("others")
    assert registry.get("digits") == "the digits"


def test_a_miss_names_the_key_the_value_the_nearest_and_all_there_are(registry):
    with pytest.raises(UnknownNameError) as raised:
        registry.get("digit")
    assert str(raised.value) == (
        "data.name='digit' is unknown. Did you mean 'digits'? Available: cifar10, digits. "
        "Your own are registered by a module listed in plugins=[...]."
    )
    assert raised.value.exit_code == 2


def test_a_miss_far_from_everything_suggests_nothing(registry):
    assert did_you_mean("xyz", registry) == ""
    with pytest.raises(UnknownNameError) as raised:
        registry.get("xyz")
    assert "Did you mean" not in str(raised.value)


def test_a_plugin_is_imported_from_the_working_directory(directory):
    (directory / "my_plugin_a.py").write_text("LOADED = True\n")
    (directory / "my_package_b").mkdir()
    (directory / "my_package_b" / "inner.py").write_text("LOADED = True\n")
    load_plugins(["my_plugin_a", "my_package_b.inner"])
    assert sys.modules["my_plugin_a"].LOADED
    assert sys.modules["my_package_b.inner"].LOADED


def test_a_plugin_is_imported_once(directory):
    (directory / "my_plugin_c.py").write_text("import sys\nsys.my_count = getattr(sys, 'my_count', 0) + 1\n")
    try:
        load_plugins(["my_plugin_c"])
        load_plugins(["my_plugin_c"])
        assert sys.my_count == 1
    finally:
        vars(sys).pop("my_count", None)


@pytest.mark.parametrize("module", ["my_nothing", "my_nothing.inner", "my_plugin_d.inner", "my_plugin_d.py"])
def test_a_missing_plugin_is_named(directory, module):
    (directory / "my_plugin_d.py").write_text("")
    with pytest.raises(ConfigError) as raised:
        load_plugins([module])
    assert str(raised.value).startswith(f"plugins=[{module}]: no module of that name can be imported. Run from the")


@pytest.mark.parametrize("module", ["", ".relative", "double..dot"])
def test_what_can_not_be_a_modules_name_is_refused(directory, module):
    with pytest.raises(ConfigError, match="is not a module name: write it as in an import"):
        load_plugins([module])


@pytest.mark.parametrize("missing", ["my_nothing", "my_plug", "my_plugin_e.deeper"])
def test_an_import_that_fails_inside_a_plugin_is_not_swallowed(directory, missing):
    (directory / "my_plugin_e.py").write_text(f"import {missing}\n")
    with pytest.raises(ModuleNotFoundError) as raised:
        load_plugins(["my_plugin_e"])
    assert raised.value.name == missing


def test_an_error_inside_a_plugin_is_not_swallowed(directory):
    (directory / "my_plugin_f.py").write_text("from os import there_is_no_such_name\n")
    with pytest.raises(ImportError, match="there_is_no_such_name"):
        load_plugins(["my_plugin_f"])
