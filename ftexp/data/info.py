"""The facts about a data set that the rest of ftexp needs, and how each split of it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ftexp.counting import counted
from ftexp.data.cropping import Fit
from ftexp.data.decoder import Decoding
from ftexp.data.order import Int64s
from ftexp.data.targets import Labels

if TYPE_CHECKING:
    from ray.data import Dataset

    from ftexp.data.sampling import ClassTable
    from ftexp.data.shared import Shared


SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read: where it is, and why not."""

    where: str
    reason: str


@dataclass(frozen=True)
class Excluded:
    """Entries of a source that a rule excludes from the samples."""

    reason: str
    count: int
    example: str  # where the first of them is

    def __str__(self) -> str:
        such = f"such as {self.example}" if self.count > 1 else self.example
        return f"{self.count:,} entr{'ies' if self.count > 1 else 'y'}: {self.reason} ({such})"


def reasons(excluded: Sequence[Excluded], bad: Sequence[BadSample], max_shown: int = 10) -> str:
    """Return why entries of a source are no samples: a line each, begun by a newline, for the end of an error."""
    lines = [f"excluded {rule}" for rule in excluded] + [
        f"{sample.where}: {sample.reason}" for sample in bad[:max_shown]
    ]
    more = [f"and {len(bad) - max_shown:,} more"] if len(bad) > max_shown else []
    return "".join(f"\n{line}" for line in [*lines, *more])


@dataclass(frozen=True)
class DataInfo:
    """Facts of the data for models, feeds and reports. Sent to every worker."""

    class_names: list[str]
    image_size: int  # pixels, square
    channels: int
    mean: list[float]  # per channel, of pixels scaled to 0..1
    std: list[float]
    num_samples: dict[str, int]  # by split; without unreadable samples that were skipped
    bad_samples: list[BadSample] = field(default_factory=list)
    digest: str | None = None  # digest of a listing, see listing.digest_of; None: of data that is in memory as a whole
    excluded: list[Excluded] | None = None  # None: of a run that began before ftexp counted them
    warnings: list[str] = field(default_factory=list)  # warnings of what looks wrong about its classes
    integer_labels: str = "indices"  # data.integer_labels as the run began with; the default of runs without it
    crop_pct: float | None = None  # this and the next two as in DataConfig
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    class_counts: list[int] | None = None  # training samples of each class, where data.sampling draws by class
    decoder: str = Decoding.decoder  # this and the next four as in DataConfig, but never auto
    decode_size: int | None = Decoding.decode_size
    exif_orientation: bool = Decoding.exif_orientation
    background: str | None = Decoding.background
    bit_depth: int = Decoding.bit_depth
    task: str = SINGLE_LABEL  # as in DataConfig; of a regression, class_names are those of its targets
    target_mean: list[float] | None = None  # mean of each target, where the model learns standardised ones
    target_std: list[float] | None = None

    @property
    def num_classes(self) -> int:
        """Return the number of the model's outputs: one for each class, or for each target of a regression."""
        return len(self.class_names)

    @property
    def outputs_in_words(self) -> str:
        """Say what the model has outputs for."""
        number = self.num_classes
        if self.task == REGRESSION:
            return counted(number, "target")
        return counted(number, "class") + (", any number of them for each sample" if self.task == MULTI_LABEL else "")

    @property
    def fit(self) -> Fit:
        """Return how images are decoded, and how whole ones are scaled and cropped for the model."""
        decoding = Decoding(self.decoder, self.decode_size, self.exif_orientation, self.background, self.bit_depth)
        fitting = (self.crop_pct, self.crop_mode, self.interpolation)
        return Fit(self.image_size, self.channels, *fitting, tuple(self.mean), decoding)


@dataclass(frozen=True)
class DataBundle:
    """The data of a run: every split cached, or every split streamed.

    A cached split is a materialised Ray Dataset (train's may be `pictures` instead) with the columns
    image: uint8 [image_size, image_size, channels]; label: a row of `ftexp.data.targets.Labels`;
    sample: int64, distinct in the split. Others are ignored. Sorted by `sample`, row i is sample i of `SampleOrder`.
    """

    datasets: dict[str, Dataset]
    info: DataInfo
    indexed: dict[str, IndexedSplit] = field(default_factory=dict)  # files only: how each split is read
    blocks: Int64s | None = None  # samples of train in each block, in order, for data.shuffle_window
    feed: str = "cached"
    why: str = ""  # this feed
    decode_cpus: int = 0  # CPUs of the cluster, where there are `streams`
    pictures: IndexedSplit | None = None  # train, cached as what is done to single pictures needs it
    classes: ClassTable | None = None  # classes of the training split, where data.sampling draws by class

    @property
    def streamed(self) -> bool:
        """Whether samples are decoded while the run trains."""
        return self.feed == "streaming"

    @property
    def streams(self) -> dict[str, IndexedSplit]:
        """Splits that tasks decode, or change the pictures of, while the run trains."""
        if self.streamed:
            return self.indexed
        return {} if self.pictures is None else {"train": self.pictures}


Raw = tuple[str, Callable[[], Any]]  # where an image is, and how to get it: encoded, or as an array


class Reader(Protocol):
    """Reads items of one listed split; pickled into every decoding task."""

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield an entry for each item, in this order. What can't be read raises where it is got, not here."""
        ...


@dataclass(frozen=True)
class IndexedSplit:
    """One split's samples, 0 to num_samples - 1, as tasks read them."""

    num_samples: int
    read: Reader
    table: Shared[tuple[Int64s, Labels]]  # table of each sample: its item, its label
    block_sizes: Int64s | None  # samples of each block, in order; None: no blocks

    def __len__(self) -> int:
        return self.num_samples
