"""The error of a command that can't join its cluster."""

import pytest
import ray

from ftexp.cluster.ray_cluster import start_ray
from ftexp.errors import ConfigError
from tests.support.configs import composed


@pytest.mark.parametrize(
    ("settings", "hints"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}, True),
        ({"RAY_AUTH_MODE": "token"}, True),  # Ray sets it if the home directory holds a token, of any cluster
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/x"}, False),
    ],
)
def test_a_cluster_that_does_not_answer_may_ask_for_a_token(monkeypatch, settings, hints):
    def init(**_):
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr(ray, "init", init)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        start_ray(composed("data=synthetic", "scaling.address=10.0.0.1:6379", "scaling.num_workers=2", "verbose=true"))
    assert str(refused.value).startswith(
        "scaling.address=10.0.0.1:6379: no Ray cluster answers there: Failed to connect"
    )
    assert ("set RAY_AUTH_MODE=token" in str(refused.value)) == hints


def test_a_working_directory_that_cannot_be_shipped_is_an_error_of_a_line(monkeypatch):
    def init(**_):
        raise ray.exceptions.RuntimeEnvSetupError("Failed to upload working_dir /x:\nPackage size exceeds 512.00MiB.")

    monkeypatch.setattr(ray, "init", init)
    config = composed("data=synthetic", "scaling.address=10.0.0.1:6379", "scaling.num_workers=2", "verbose=true")
    with pytest.raises(ConfigError) as refused:
        start_ray(config)
    assert str(refused.value) == (
        "scaling.address=10.0.0.1:6379: Failed to set up runtime environment. Failed to upload working_dir /x: "
        "Package size exceeds 512.00MiB. Under `uv run`, Ray ships the working directory: where every machine has "
        "ftexp, set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0"
    )
