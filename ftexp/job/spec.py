"""Message from the driver to its workers. Not in ftexp.job.job, which imports timm: the driver does not need that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftexp.config.schema import Config
from ftexp.data.info import DataInfo
from ftexp.data.order import Int64s
from ftexp.data.sampling import ClassTable
from ftexp.data.shared import Shared
from ftexp.model.teacher_spec import TeacherSpec
from ftexp.wire.hub import HubAddress


@dataclass(frozen=True)
class JobSpec:
    """Everything that the driver sends to a worker."""

    config: Config
    info: DataInfo
    run_name: str
    run_uri: str
    fingerprint: dict[str, Any]  # what defines the run
    hub: HubAddress
    blocks: Int64s | None = None  # samples of train in each block, where they are read in blocks
    decode_cpus: int = 0  # CPUs of the cluster, for streams
    classes: Shared[ClassTable] | None = None  # classes of the training split, where data.sampling draws by class
    teacher: TeacherSpec | None = None
