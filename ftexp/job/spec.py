"""What the driver tells its workers. Apart from ftexp.job.job, which imports timm: the driver has no use for that."""

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
    """What the driver sends to every worker."""

    config: Config
    info: DataInfo
    run_name: str
    run_uri: str
    fingerprint: dict[str, Any]  # what defines the run
    hub: HubAddress
    blocks: Int64s | None = None  # samples of train in each block, where they are read in blocks
    decode_cpus: int = 0  # of the cluster, for streams
    classes: Shared[ClassTable] | None = None  # of train, where data.sampling draws by class
    teacher: TeacherSpec | None = None
