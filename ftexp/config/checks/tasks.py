"""The parts of a config that must fit `data.task`: sources, losses, sampling, and the metric that ranks checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.schema import (
    FEATURES,
    LOSSES,
    MULTI_LABEL,
    MULTI_LABEL_LOSSES,
    REGRESSION,
    REGRESSION_LOSSES,
    SINGLE_LABEL,
    SINGLE_LABEL_LOSSES,
    Config,
    DataConfig,
)
from ftexp.config.source_names import SOURCE_FIELDS, WITH_OTHER_TASKS

_LABELS_OF = {
    SINGLE_LABEL: "one class for each sample",
    MULTI_LABEL: "any number of classes for each sample",
    REGRESSION: "numbers",
}
_LOSSES_OF = {
    SINGLE_LABEL: SINGLE_LABEL_LOSSES,
    MULTI_LABEL: MULTI_LABEL_LOSSES,
    REGRESSION: REGRESSION_LOSSES,
}
_USUAL_LOSS = {SINGLE_LABEL: "ce", MULTI_LABEL: "bce", REGRESSION: "mse"}


def check_task(config: Config) -> Iterator[str]:
    """The source, the loss and the sampling of a task."""
    data, task = config.data, config.data.task
    yield from _field_problems(data)
    if task == SINGLE_LABEL:
        yield from _loss_problems(config)
        return
    if data.name in SOURCE_FIELDS and data.name not in WITH_OTHER_TASKS:
        yield (
            f"data.task={task}: the samples of data.name={data.name} have one class each; take data="
            f"{', '.join(WITH_OTHER_TASKS)}"
        )
    if data.sampling != "shuffle":
        advice = " (loss.pos_weight or loss.class_weights weigh rare classes)" if task == MULTI_LABEL else ""
        yield (
            f"data.sampling={data.sampling} draws by the class of a sample, and labels of data.task={task} are "
            f"{_LABELS_OF[task]}: set data.sampling=shuffle{advice}"
        )
    if config.distill.teacher is not None and config.distill.kind != FEATURES:
        yield (
            f"distill.kind={config.distill.kind} compares softmax probabilities, and data.task={task} has none: set "
            f"distill.kind={FEATURES}"
        )
    yield from _loss_problems(config)
    if task == REGRESSION:
        yield from _regression_problems(config)


def _regression_problems(config: Config) -> Iterator[str]:
    """Settings that a regression has no use for."""
    if config.train.label_smoothing:
        yield (
            f"train.label_smoothing={config.train.label_smoothing} is of classes, and data.task=regression has none: "
            "set 0"
        )


def _field_problems(data: DataConfig) -> Iterator[str]:
    """Fields of data that another task reads."""
    if data.task == SINGLE_LABEL and data.label_separator != DataConfig.label_separator:
        yield (
            f"data.label_separator={data.label_separator!r} is for cells of several labels: set data.task=multi_label "
            "or regression, or take it out"
        )
    if not data.label_separator.strip():
        yield f"data.label_separator={data.label_separator!r} must be a visible character, or several: write ';', say"
    if data.task == REGRESSION:
        if data.num_classes is not None and data.name != "synthetic":
            yield (
                f"data.num_classes={data.num_classes}: data.task=regression takes as many targets as the data have; "
                "take it out"
            )
        if data.target_columns is not None and not data.target_columns:
            yield "data.target_columns=[] names no column: name them, or write null for data.label_column"
        return
    for name, default in (("target_columns", None), ("standardize_targets", True)):
        if getattr(data, name) != default:
            yield f"data.{name}={getattr(data, name)} is for targets: set data.task=regression, or take it out"


def _loss_problems(config: Config) -> Iterator[str]:
    loss, task = config.loss, config.data.task
    if loss.name in LOSSES and loss.name not in _LOSSES_OF[task]:
        *others, last = _LOSSES_OF[task]
        yield (
            f"loss.name={loss.name} with data.task={task}, whose labels are {_LABELS_OF[task]}: take loss="
            f"{_USUAL_LOSS[task]} ({', '.join(others)} and {last} fit)"
        )
    if loss.class_weights == "none":
        return
    if task == REGRESSION:
        yield (
            f"loss.class_weights={loss.class_weights}: data.task=regression has no classes; set loss.class_weights=none"
        )
    if task == MULTI_LABEL and loss.name not in LOSSES:
        yield (
            f"loss.class_weights={loss.class_weights}: a loss of your own gives a value for a sample, of all its "
            "classes together; weigh them in it (loss.kwargs), and set loss.class_weights=none"
        )
