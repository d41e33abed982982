"""Fixtures that make Hydra compose configs faster than in the command."""

import dataclasses
import pickle

import hydra._internal.config_loader_impl as loader
import hydra._internal.defaults_list as defaults_list
import pytest
from hydra._internal.defaults_list import Overrides
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from ftexp.config.schema import config_dir


@pytest.fixture(autouse=True)
def _composing_once(monkeypatch):
    """Compose for `hydra.mode` only if an override sets it; otherwise Hydra composes every config twice."""
    get_mode = Hydra.get_mode

    def mode(self, config_name, overrides):
        is_given = any("hydra.mode" in word for word in overrides)
        return get_mode(self, config_name=config_name, overrides=overrides) if is_given else None

    monkeypatch.setattr(Hydra, "get_mode", mode)


@pytest.fixture(autouse=True, scope="session")
def _composing_from_memory():
    """Compose the files once for each choice of options, and apply the other overrides to the result.

    Only the overrides that choose options affect how Hydra composes the files. Nothing is remembered if a test adds its
    own config directory, which may change; a change of the config store clears everything remembered.
    """
    create, compose = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list
    store, stored, remembered, composed, own = ConfigStore.store, {}, {}, {}, f"file://{config_dir()}"
    Plugins.instance()  # it imports the sources a second time, under other names
    source = SourcesRegistry.instance().types["file"]
    read, files = source.load_config, {}
    choices_so_far = defaults_list._create_interpolation_map

    def read_once(self, config_path):
        if self.path != str(config_dir()):
            return read(self, config_path)
        if config_path not in files:
            files[config_path] = pickle.dumps(read(self, config_path))
        return pickle.loads(files[config_path])  # composing changes the loaded object

    def where_asked_for(overrides, defaults, self_added):
        """Return the choices so far only if a name in `defaults` needs them: Hydra builds them for every file."""
        is_needed = any(not default.is_self() and default.is_interpolation() for default in defaults)
        return choices_so_far(overrides, defaults, self_added) if is_needed else None

    def create_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        sources = tuple(source.full_path() for source in repo.get_sources())
        given = Overrides(repo, overrides_list)
        values = {id(override) for override in given.config_overrides}
        choices = [override for override in overrides_list if id(override) not in values]
        key = (sources, config_name, prepend_hydra, skip_missing, *(choice.input_line for choice in choices))
        if any(source.startswith("file://") and source != own for source in sources):
            key = object()
        if key not in remembered:
            remembered[key] = create(repo, config_name, choices, prepend_hydra, skip_missing)
        return dataclasses.replace(remembered[key], config_overrides=given.config_overrides)

    def compose_once(self, defaults, repo):
        if id(defaults) not in composed:
            composed[id(defaults)] = pickle.dumps(compose(self, defaults, repo)), defaults
        return pickle.loads(composed[id(defaults)][0])

    def store_and_forget(self, name, node, group=None, **kwargs):
        if stored.get((group, name)) != (node, kwargs):  # a sweep stores the same node each time
            stored[group, name] = node, kwargs
            remembered.clear()
            composed.clear()
        return store(self, name, node, group, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "load_config", read_once)
        patch.setattr(defaults_list, "_create_interpolation_map", where_asked_for)
        patch.setattr(loader, "create_defaults_list", create_once)
        patch.setattr(loader.ConfigLoaderImpl, "_compose_config_from_defaults_list", compose_once)
        patch.setattr(ConfigStore, "store", store_and_forget)
        yield
