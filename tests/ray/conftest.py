"""One Ray instance for all tests of this directory that a worker of pytest-xdist runs."""

import logging

import pytest

from ftexp.cluster import ray_private


@pytest.fixture(scope="package")
def data_ray(preloaded):
    """Start a Ray on this machine whose workers can import the tests, and retry reads from a store without a delay."""
    import ray

    def hurry():
        import ftexp.data.listing

        ftexp.data.listing._RETRY_AFTER_S = (0.0, 0.0, 0.0)

    logging.getLogger("ray").setLevel(logging.WARNING)  # otherwise it fills the report of a failed test
    with (
        pytest.MonkeyPatch.context() as patch,
        preloaded.raylet_settings(),
        ray_private.starting_fewer_processes(prints_logs=False),
    ):
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # prestarted workers would not be forks
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={**preloaded.runtime_env(), "worker_process_setup_hook": hurry},
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
