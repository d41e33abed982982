"""The properties of a data set that the rest of ftexp needs, and the reading of its splits."""

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
    """A sample that could not be read: its location and the reason."""

    where: str
    reason: str


@dataclass(frozen=True)
class Excluded:
    """Entries of a source that a rule excludes from the samples."""

    reason: str
    count: int
    example: str  # location of the first one

    def __str__(self) -> str:
        such = f"such as {self.example}" if self.count > 1 else self.example
        return f"{self.count:,} entr{'ies' if self.count > 1 else 'y'}: {self.reason} ({such})"


def reasons(excluded: Sequence[Excluded], bad: Sequence[BadSample], max_shown: int = 10) -> str:
    """Return the reasons why entries of a source are not samples, each after a newline, to append to an error."""
    lines = [f"excluded {rule}" for rule in excluded] + [
        f"{sample.where}: {sample.reason}" for sample in bad[:max_shown]
    ]
    more = [f"and {len(bad) - max_shown:,} more"] if len(bad) > max_shown else []
    return "".join(f"\n{line}" for line in [*lines, *more])


@dataclass(frozen=True)
class DataInfo:
    """Properties of the data for models, feeds and reports. Sent to every worker."""

    class_names: list[str]
    image_size: int  # pixels, square
    channels: int
    mean: list[float]  # per channel, of pixels scaled to 0..1
    std: list[float]
    num_samples: dict[str, int]  # by split; without skipped unreadable samples
    bad_samples: list[BadSample] = field(default_factory=list)
    digest: str | None = None  # of the listing, see listing.digest_of; None: the source holds its data in memory
    excluded: list[Excluded] | None = None  # None: the run is older than this field
    warnings: list[str] = field(default_factory=list)  # warnings about the classes
    integer_labels: str = "indices"  # data.integer_labels at the run's start; the default is that of older runs
    crop_pct: float | None = None  # this and the next two as in DataConfig
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    class_counts: list[int] | None = None  # training samples per class, if data.sampling draws by class
    decoder: str = Decoding.decoder  # this and the next four as in DataConfig, but never auto
    decode_size: int | None = Decoding.decode_size
    exif_orientation: bool = Decoding.exif_orientation
    background: str | None = Decoding.background
    bit_depth: int = Decoding.bit_depth
    task: str = SINGLE_LABEL  # as in DataConfig; in a regression, class_names are the names of the targets
    target_mean: list[float] | None = None  # mean of each target, if targets are standardised
    target_std: list[float] | None = None

    @property
    def num_classes(self) -> int:
        """Number of the model's outputs: one per class, or per target of a regression."""
        return len(self.class_names)

    @property
    def outputs_in_words(self) -> str:
        """Description of the model's outputs, for messages."""
        number = self.num_classes
        if self.task == REGRESSION:
            return counted(number, "target")
        return counted(number, "class") + (", any number of them for each sample" if self.task == MULTI_LABEL else "")

    @property
    def fit(self) -> Fit:
        """Settings for decoding images, and for scaling and cropping whole ones."""
        decoding = Decoding(self.decoder, self.decode_size, self.exif_orientation, self.background, self.bit_depth)
        fitting = (self.crop_pct, self.crop_mode, self.interpolation)
        return Fit(self.image_size, self.channels, *fitting, tuple(self.mean), decoding)


@dataclass(frozen=True)
class DataBundle:
    """The data of a run: all splits cached, or all splits streamed.

    A cached split is a materialised Ray Dataset (for train, `pictures` may replace it). Its columns are
    image: uint8 [image_size, image_size, channels]; label: a row of `ftexp.data.targets.Labels`;
    sample: int64, unique in the split. Other columns are ignored. After sorting by `sample`, row i is sample i of
    `SampleOrder`.
    """

    datasets: dict[str, Dataset]
    info: DataInfo
    indexed: dict[str, IndexedSplit] = field(default_factory=dict)  # sources of files: the splits as tasks read them
    blocks: Int64s | None = None  # number of training samples in each block, in order, for data.shuffle_window
    feed: str = "cached"
    why: str = ""  # reason for this feed
    decode_cpus: int = 0  # CPUs of the cluster that decode, if there are `streams`
    pictures: IndexedSplit | None = None  # train, cached as single pictures for augmentation in tasks
    classes: ClassTable | None = None  # classes of the training split, if data.sampling draws by class

    @property
    def streamed(self) -> bool:
        """Whether samples are decoded while the run trains."""
        return self.feed == "streaming"

    @property
    def streams(self) -> dict[str, IndexedSplit]:
        """Splits whose pictures tasks decode or augment while the run trains."""
        if self.streamed:
            return self.indexed
        return {} if self.pictures is None else {"train": self.pictures}


Raw = tuple[str, Callable[[], Any]]  # location of an image, and a function that returns it: encoded, or as an array


class Reader(Protocol):
    """Reads items of one listed split; pickled into every decoding task."""

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield an entry for each item, in this order. If an item can't be read, the entry's function raises."""
        ...


@dataclass(frozen=True)
class IndexedSplit:
    """One split's samples, numbered 0 to num_samples - 1, as tasks read them."""

    num_samples: int
    read: Reader
    table: Shared[tuple[Int64s, Labels]]  # (item, label) of each sample, as two arrays
    block_sizes: Int64s | None  # samples of each block, in order; None: no blocks

    def __len__(self) -> int:
        return self.num_samples
