"""The error of a command that can't join its cluster."""

import pytest
import ray

from ftexp.cluster.ray_cluster import start_ray
from ftexp.errors import ConfigError
from tests.support.configs import composed


@pytest.mark.parametrize(("mode", "hints"), [(None, True), ("disabled", True), ("token", False)])
def test_a_cluster_that_does_not_answer_may_ask_for_a_token(monkeypatch, mode, hints):
    def init(**_):
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ConfigError) as refused:
        start_ray(composed("data=synthetic", "scaling.address=10.0.0.1:6379", "scaling.num_workers=2", "verbose=true"))
    assert str(refused.value).startswith(
        "scaling.address=10.0.0.1:6379: no Ray cluster answers there: Failed to connect"
    )
    assert ("set RAY_AUTH_MODE=token" in str(refused.value)) == hints
