"""Message from the driver to its workers. Not in ftexp.job.job, which imports timm: the driver does not need it."""

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
    blocks: Int64s | None = None  # number of training samples in each block, if they are read in blocks
    decode_cpus: int = 0  # CPUs of the cluster, for decoding streams
    classes: Shared[ClassTable] | None = None  # classes of the training split, if data.sampling draws by class
    teacher: TeacherSpec | None = None
