"""One way through: imports follow the order of the design, so that no lower part knows a higher one."""

import ast
from pathlib import Path

import ftexp

ROOT = Path(ftexp.__file__).parent

# lowest first; a module may import from its own layer and from those above it in this list
LAYERS = [
    {
        "errors",
        "config.versions",
        "cluster.ray_private",
        "job.skipped_batches",
        "failure.phases",
        "job.stopwatch",
        "job.mfu",
        "config.fields",
        "cli.overrides",
    },
    {"registry", "config.timm_names", "storage.directory", "config.source_names", "wire.hub"},
    {"storage.lease", "storage.append_log"},
    {"rundir.sample_ledger", "rundir.metrics_csv", "config.tracker_schema"},
    {"config.schema"},
    {"cluster.process_exit", "cluster.ray_watch", "driver.restart"},
    {"config.field_checks", "config.fingerprint", "data.order"},
    {"config.checks.recipe", "config.machine", "config.checks.checkpoint", "trackers.registry", "trackers.wandb_log"},
    {"trackers.places", "trackers.follower"},
    {"trackers.tensorboard", "trackers.mlflow", "trackers.wandb"},
    {"trackers.builtin"},
    {"config.checks.trackers", "trackers.run"},
    {"config.checks.validate"},
    {
        "cli.compose",
        "cluster.ray_cluster",
        "data.stratify",
        "data.plan",
        "data.labels",
        "cluster.hot_start.launcher",
        "cluster.hot_start.setup_worker",
    },
    {"cluster.hot_start.driver", "cluster.hot_start.forker"},
    {"cluster.hot_start.preloader"},
    {"model.weights"},
    {
        "model.build",
        "model.optim",
        "model.freezing",
        "model.ema",
        "data.sources.arrays",
        "data.listing",
        "worker.hardware",
    },
    {"data.sources.entries"},
    {"data.sources.named_files"},
    {"data.augment.rand_augment"},
    {"data.augment.pixels", "data.augment.erasing"},
    {"evaluation.mistakes"},
    {"data.feeds.decoding", "data.sources.blocks"},
    {"data.sources.files", "data.sources.image_list", "data.sources.parquet", "data.sources.webdataset"},
    {"data.build"},
    {"data.feeds.feed", "evaluation.meter", "failure.causes"},
    {"rundir.record", "evaluation.counting", "data.feeds.streamed", "data.augment.mixing"},
    {"rundir.sweep_record"},
    {"rundir.ranking"},
    {"driver.terminal", "job.spec"},
    {"job.job"},
    {"checkpoint.registry", "checkpoint.store", "checkpoint.cadence", "checkpoint.staging"},
    {"checkpoint.states", "checkpoint.manager"},
    {"checkpoint.restore", "checkpoint.compare", "chaos.strike", "cli.trained_run", "driver.resume"},
    {"predicting.inputs", "predicting.parts", "predicting.progress", "predicting.stopping"},
    {"predicting.pipeline", "exporting.formats"},
    {"exporting.checking"},
    {
        "failure.policy",
        "failure.nonfinite",
        "failure.watchdog",
        "cluster.interruptible",
        "worker.profiler",
        "worker.speed",
    },
    {"worker.step", "driver.supervisor"},
    {"worker.loop"},
    {"driver.trainer"},
    {"report.markup", "report.palette", "report.source", "report.defaults"},
    {"report.timeline", "report.drawing"},
    {"report.series", "report.png"},
    {"report.frame", "report.charts", "report.confusion", "report.tables"},
    {"report.page", "report.sweep_charts"},
    {"report.sweep_page"},
    {"report.write"},
    {"driver.tracker_session"},
    {"driver.session", "predicting.session"},
    {"inspecting.inspect"},
    {"drilling.report"},
    {"sweep.run.identity"},
    {"driver.run"},
    {"sweep.run.trial"},
    {"sweep.run.runner", "sweep.search.space"},
    {"sweep.search.proposing", "sweep.search.halving"},
    {"sweep.show.display", "sweep.run.records"},
    {"sweep.show.leaderboard", "sweep.show.picture"},
    {"sweep.run.parent"},
    {"sweep.run.sweep", "sweep.run.session", "sweep.search.search"},
    {"sweep.hydra.launcher"},
    {"sweep.hydra.sweeper"},
    {"sweep.hydra.plugins"},
    {"sweeps"},
    {
        "train",
        "evaluate",
        "predict",
        "export",
        "drill",
        "checkpoints",
        "inspecting.inspect",
        "data.__main__",
        "report.__main__",
    },
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__" and "conf" not in parts:
            yield ".".join(parts), ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree):
    """ftexp modules that a module imports, other than for type checking alone."""
    skipped = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ftexp"):
            inside = node.module.removeprefix("ftexp").removeprefix(".")
            names = [f"{inside}.{alias.name}".removeprefix(".") for alias in node.names]
            yield from (name if name in LEVEL else inside for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("ftexp.") for alias in node.names if alias.name.startswith("ftexp."))


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} == set(LEVEL)


def test_imports_go_down_only():
    upward = [
        f"{name} imports {imported}"
        for name, tree in modules()
        for imported in imports_of(tree)
        if LEVEL[imported] > LEVEL[name]
    ]
    assert upward == []


def test_what_checks_a_config_imports_nothing_heavy():
    heavy = {
        *("tensorboard", "mlflow", "wandb"),
        "torch",
        "ray",
        "timm",
        "torchvision",
        "pyarrow",
        "pandas",
        "numpy",
        "rich",
    }
    light = {
        "errors",
        "registry",
        "config.timm_names",
        "config.source_names",
        "config.fields",
        "config.tracker_schema",
        "config.schema",
        "config.checks.recipe",
        "config.checks.validate",
        "trackers.registry",
        "trackers.tensorboard",
        "trackers.mlflow",
        "trackers.wandb",
        "config.checks.trackers",
        "cli.compose",
        "train",
        "driver.run",
        "config.fingerprint",
    }
    for name, tree in modules():
        if name in light:
            top_level = {
                alias.name.split(".")[0]
                for node in tree.body
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
            }
            assert not top_level & heavy, name
