"""ftexp.api in a notebook: two runs in one process, the second in a thread; no Ray is left afterwards."""

import nbformat
from nbclient import NotebookClient

CELLS = [
    """
import signal, threading
from ftexp import api
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
words = ["train.epochs=1", "train.max_steps=2", "model.kwargs.depth=1", "scaling.num_workers=1", "run.storage=runs"]
run = api.train(api.compose([*words, "run.name=first", "report.enabled=false"]))
assert run.status == "finished"
assert list(run.metrics.split) == ["train", "val", "test"]
""",
    """
found = []
target = lambda: found.append(api.train(api.compose([*words, "run.name=second", "report.enabled=false"])))
thread = threading.Thread(target=target)
thread.start()
thread.join()
assert found[0].last["test_accuracy"] == run.last["test_accuracy"]
""",
    """
import os, ray
from pathlib import Path
model, transform, class_names = api.load_model(run)
assert class_names == [str(digit) for digit in range(10)]
assert api.evaluate(run)["accuracy"] == run.last["test_accuracy"]
assert not ray.is_initialized()
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
names = [path.read_text() for path in Path("/proc").glob("[0-9]*/comm") if path.parent.stat().st_uid == os.getuid()]
parents = [path.read_text().rpartition(")")[2].split()[1] for path in Path("/proc").glob("[0-9]*/stat")]
assert str(os.getpid()) not in parents, names
""",
]


def test_a_notebook_trains_twice_and_leaves_no_ray_behind(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
