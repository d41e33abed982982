"""Sources in an S3 object store that fails occasionally: the rows are the same as from a disk."""

import threading
from pathlib import Path

import numpy as np
import pytest

import ftexp.data.listing
from ftexp.data.build import build_data
from ftexp.data.feeds.feed import CachedRows, request
from ftexp.data.feeds.streamed import StreamedRows
from ftexp.errors import DataError
from ftexp.storage.directory import Storage
from tests.support.image_files import data_config, pairs, picture, read_all, write_layouts
from tests.support.s3 import s3_uri

IMAGES = [picture(number) for number in range(23)]
LABELS = [number % 3 for number in range(23)]


class Flaky:
    """WSGI application of an S3 server that refuses every request the first time, and some objects always."""

    def __init__(self, application):
        self._application, self._seen, self._lock = application, set(), threading.Lock()
        self.gone = None  # part of the paths that are always refused
        self.num_refused = 0

    def __call__(self, environment, start_response):
        request = tuple(environment.get(name) for name in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "HTTP_RANGE"))
        with self._lock:
            refused = request not in self._seen or (self.gone is not None and self.gone in request[1])
            self._seen.add(request)
            self.num_refused += refused
        if not refused:
            return self._application(environment, start_response)
        # pyarrow itself doesn't retry a 403; it would retry a 503 for seconds
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code></Error>"]

    def begin_anew(self):
        self._seen, self.num_refused, self.gone = set(), 0, None


@pytest.fixture(scope="module")
def roots(s3_server, tmp_path_factory):
    """Directory with the images in every layout; they are in the bucket, too."""
    directory = tmp_path_factory.mktemp("roots")
    write_layouts(directory, IMAGES, LABELS)
    storage = Storage.at(s3_uri(s3_server, "bucket"))
    for path in filter(Path.is_file, directory.rglob("*")):
        storage.child(*path.relative_to(directory).parts[:-1]).write_bytes(path.name, path.read_bytes())
    return directory


@pytest.fixture(scope="module")
def flaky_server(s3_server):
    """(port, application) of a failing server in front of the same bucket."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    flaky = Flaky(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, flaky, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.port, flaky
    server.shutdown()


@pytest.fixture
def flaky(roots, flaky_server, data_ray, monkeypatch):
    """(function from a name to its URI, application); the application has seen no requests yet."""
    monkeypatch.setattr(ftexp.data.listing, "_RETRY_AFTER_S", (0.0, 0.0, 0.0))
    port, application = flaky_server
    application.begin_anew()
    return lambda name: s3_uri(port, f"bucket/{name}"), application


def never(*_):
    raise AssertionError("nothing is bad or slow here")


@pytest.mark.parametrize(
    ("name", "window"),
    [("image_folder", None), ("image_list", None), ("webdataset", None), ("webdataset", 2), ("parquet", 2)],
)
def test_rows_from_a_store_that_fails_now_and_then_are_those_of_the_disk(roots, flaky, name, window):
    uri, store = flaky
    config = {"shuffle_window": window, "val_fraction": 0, "test_fraction": 0}
    on_disk = build_data(data_config(name, roots / name, feed="cached", **config))
    streams = build_data(data_config(name, uri(name), feed="streaming", **config))

    assert streams.info == on_disk.info
    assert streams.info.num_samples["train"] == len(IMAGES)
    samples = np.random.default_rng(0).permutation(len(IMAGES))
    expected = CachedRows(on_disk.datasets["train"].iterator()).take(samples)
    rows = StreamedRows(streams.indexed["train"], streams.info, 1, never, lambda _: None)
    with rows.open(iter([request(samples, samples)])) as take:
        taken = take(samples)
    assert taken.readable is None
    np.testing.assert_array_equal(taken.images, expected.images)
    np.testing.assert_array_equal(taken.labels, expected.labels)
    num_files = len(IMAGES) if name.startswith("image") else 3
    assert store.num_refused > 2 * num_files  # for each file, the first look-up and the first read were refused


def test_a_list_in_a_store_may_not_name_files_of_a_disk(roots, flaky, s3_server):
    Storage.at(s3_uri(s3_server, "bucket")).write_bytes("own.csv", b"path,label\n/disk/0.png,0\n1.png,1\n")
    with pytest.raises(DataError, match=r"^bucket/own\.csv lists /disk/0\.png: paths are relative to the list"):
        build_data(data_config("image_list", flaky[0]("own.csv")))


def test_images_that_a_store_never_gives_are_named_and_the_others_cached(roots, flaky):
    uri, store = flaky
    store.gone = "/07.png"
    config = data_config("image_folder", uri("image_folder"), on_bad_sample="skip", feed="cached")
    bundle = build_data(config)

    (bad,) = bundle.info.bad_samples
    assert bad.where == "bucket/image_folder/1/07.png"
    assert bad.reason.startswith("OSError: ")
    assert "ACCESS_DENIED" in bad.reason
    on_disk = build_data(data_config("image_folder", roots / "image_folder"))
    missing = (IMAGES[7].tobytes(), LABELS[7])
    assert pairs(*read_all(bundle).values()) == [p for p in pairs(*read_all(on_disk).values()) if p != missing]
