"""Checks of settings that must fit `data.task`: source, loss, sampling, fields."""

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
    """Check that source, loss, sampling and distillation fit the task."""
    data, task = config.data, config.data.task
    yield from _field_problems(data)
    if task == SINGLE_LABEL:
        yield from _loss_problems(config)
        return
    if data.name in SOURCE_FIELDS and data.name not in WITH_OTHER_TASKS:
        yield (
            f"data.task={task}: the samples of data.name={data.name} have one class each; set data="
            f"{', '.join(WITH_OTHER_TASKS)}"
        )
    if data.sampling != "shuffle":
        advice = " (loss.pos_weight or loss.class_weights weigh rare classes)" if task == MULTI_LABEL else ""
        yield (
            f"data.sampling={data.sampling} draws by class, but labels of data.task={task} are "
            f"{_LABELS_OF[task]}: set data.sampling=shuffle{advice}"
        )
    if config.distill.teacher is not None and config.distill.kind != FEATURES:
        yield (
            f"distill.kind={config.distill.kind} compares softmax probabilities, but data.task={task} has none: set "
            f"distill.kind={FEATURES}"
        )
    yield from _loss_problems(config)
    if task == REGRESSION:
        yield from _regression_problems(config)


def _regression_problems(config: Config) -> Iterator[str]:
    """Yield a message for each setting that a regression does not use."""
    if config.train.label_smoothing:
        yield (
            f"train.label_smoothing={config.train.label_smoothing} applies to classes, but data.task=regression has "
            "none: set it to 0"
        )


def _field_problems(data: DataConfig) -> Iterator[str]:
    """Yield a message for each field of data that belongs to another task."""
    if data.task == SINGLE_LABEL and data.label_separator != DataConfig.label_separator:
        yield (
            f"data.label_separator={data.label_separator!r} is for cells of several labels: set data.task=multi_label "
            "or regression, or remove it"
        )
    if not data.label_separator.strip():
        yield f"data.label_separator={data.label_separator!r} must be one or more visible characters: for example ';'"
    if data.task == REGRESSION:
        if data.num_classes is not None and data.name != "synthetic":
            yield (
                f"data.num_classes={data.num_classes}: data.task=regression takes the number of targets from the "
                "data; remove it"
            )
        if data.target_columns is not None and not data.target_columns:
            yield "data.target_columns=[] is empty: name the columns, or set null for data.label_column"
        return
    for name, default in (("target_columns", None), ("standardize_targets", True)):
        if getattr(data, name) != default:
            yield f"data.{name}={getattr(data, name)} is for targets: set data.task=regression, or remove it"


def _loss_problems(config: Config) -> Iterator[str]:
    loss, task = config.loss, config.data.task
    if loss.name in LOSSES and loss.name not in _LOSSES_OF[task]:
        *others, last = _LOSSES_OF[task]
        yield (
            f"loss.name={loss.name} with data.task={task}, whose labels are {_LABELS_OF[task]}: set loss="
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
            f"loss.class_weights={loss.class_weights}: the loss of a plug-in returns one value per sample; "
            "weight its classes in the loss (loss.kwargs), and set loss.class_weights=none"
        )
