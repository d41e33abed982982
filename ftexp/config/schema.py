"""The schema: every field of a config, with its type, unit, range and meaning.

The YAML groups under conf/ fill these classes; Hydra rejects unknown keys and wrong types. Checks that types can't
express (ranges, choices, conflicts between groups) are in `ftexp.config.checks.validate`. Imports nothing heavier than
omegaconf, so that a mistake is reported immediately.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ftexp.config.fields import choice, ranged
from ftexp.config.tracker_schema import TrackerConfig

AUTO = "auto"
PRECISIONS = ("fp32", "bf16", "fp16")
NON_FINITE, CORRUPTION = "non_finite", "corruption"
CAUSES = (
    "bug",
    "out_of_memory",
    "crash",
    "hang",
    "preemption",
    NON_FINITE,
    "storage",
    "startup",
    "ray",
    CORRUPTION,
)
DAMAGES = ("truncate_checkpoint", "flip_byte", "delete_manifest", "delete_checkpoint")  # damage to checkpoints
FAULTS = (
    *("raise", "kill_worker", "kill_driver", "hang", "nonfinite"),
    *DAMAGES,
    *("half_snapshot", "disk_full", "slow_storage", "flip_weight", "slow_rank"),
)
SCHEDULES = ("cosine", "poly", "tanh", "step", "constant")
MIX_MODES = ("batch", "pair", "elem")
CROPS = ("none", "rrc", "rkrc", "rkrr")  # timm's train_crop_mode, and none
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # keys of data that pretrained weights set
CROP_MODES = ("center", "squash", "border")  # timm's crop_mode for evaluation
TTA = ("none", "hflip")  # test-time augmentation in evaluate and predict
INTERPOLATIONS = ("bilinear", "bicubic")
PILLOW, TORCHVISION = "pillow", "torchvision"
DECODERS = (AUTO, TORCHVISION, PILLOW)  # see ftexp.data.decoder
ERASE_MODES = ("const", "rand", "pixel")
SINGLE_LABEL_LOSSES = ("ce", "bce", "focal", "asl", "poly", "jsd")
MULTI_LABEL_LOSSES, REGRESSION_LOSSES = ("bce", "asl", "focal"), ("mse", "l1", "huber")
LOSSES = (*SINGLE_LABEL_LOSSES, *REGRESSION_LOSSES)  # built-in losses
CLASS_WEIGHTS = ("none", "inv_freq", "effective_num")  # timm's names, and none
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label", "multi_label", "regression"
TASKS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
SAMPLINGS = ("shuffle", "balanced", "sqrt")
INLINE, BESIDE = "inline", "beside"
DISTILLATIONS = LOGITS, FEATURES, TOKEN = ("logits", "features", "token")  # timm's names of distillation types
ALERTS = ("gave_up", "finished", "recoveries", "no_progress", "failing_saves", "straggler")
HTTP_SCHEMES = ("http", "https")
WEIGHTS = ("raw", "ema")  # weights of a run: the trained ones, or their EMA
DIST_BN = ("none", "reduce", "broadcast")  # values of timm's --dist-bn, and none
LR_SCALES = ("linear", "sqrt")
PARALLEL = DDP, FSDP, HSDP = ("ddp", "fsdp", "hsdp")
COMPILED = ("none", "model", "blocks")
RESTART, REPLACE = "restart", "replace"  # values of failure.recovery
SGD_NAMES = ("sgd", "momentum", "nesterov")  # timm's names for torch.optim.SGD


@dataclass(kw_only=True)
class RunConfig:
    name: str | None = None  # None: a new, timestamped run; with a name, the same command resumes the run
    storage: str = "runs"  # directory, or a URI that pyarrow.fs opens: s3://bucket/prefix


@dataclass(kw_only=True)
class ModelConfig:
    name: str = MISSING  # timm model name
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_model
    # {timm name: kwargs}: kwargs used only if `name` is that timm name; `kwargs` overrides them. A group file sets
    # sizes here, so that they don't apply to another `model.name`
    preset: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretrained: Any = False  # true: weights from timm's hub; a path: a PyTorch or safetensors file
    pretrained_partial: bool = False  # accept weights that provide less than half of the model's parameters
    head_init_scale: float | None = ranged(None, above=0)  # factor on the new classifier's weights and biases
    head_init_bias: float | None = None  # initial biases of the new classifier
    # stochastic depth: probability of skipping the last block for a sample, decreasing to 0 at the first block
    drop_path_rate: float | None = ranged(None, low=0, high=0.99)

    def all_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `timm.create_model` other than input size, channels and number of classes."""
        drop_path = {} if self.drop_path_rate is None else {"drop_path_rate": self.drop_path_rate}
        return {**self.preset.get(self.name, {}), **drop_path, **self.kwargs}


@dataclass(kw_only=True)
class DataConfig:
    name: str = MISSING  # registered data source
    root: str | None = None  # directory or URI of the data, for sources that read files
    download: bool = False  # let torchvision download missing files to root
    image_size: int = ranged(MISSING, low=1)  # pixels; the model's input images are square
    channels: int = ranged(3, low=1, high=4)
    # a sample's label. single_label: one class; multi_label: any number of classes, including none; regression: numbers
    task: str = choice(SINGLE_LABEL, TASKS)
    num_classes: int | None = ranged(None, low=2)  # None: the number of classes in the data
    # with model.pretrained, each field of PREPROCESSING that no override sets is taken from timm's config of the model
    mean: list[float] = MISSING  # per channel, of pixels scaled to 0..1
    std: list[float] = MISSING
    # how a whole image becomes a square: timm's crop_pct, crop_mode and interpolation for evaluation. crop_pct=null:
    # without cropping; with crop_mode=center, the largest centred square, cropped before scaling
    crop_pct: float | None = ranged(None, above=0, high=1)
    crop_mode: str = choice("center", CROP_MODES)
    interpolation: str = choice("bicubic", INTERPOLATIONS)
    # decoder, exif_orientation, background: the defaults are those of runs older than these fields; group files set
    # other values for new runs. decoder: see ftexp.data.decoder; auto: the run's own, for a new run torchvision
    decoder: str = choice(PILLOW, DECODERS)
    # pixels. With augment.crop, an image whose shorter side is at least 2, 4 or 8 times decode_size is shrunk by that
    # factor during decoding; None: crops are taken from the image at its stored size
    decode_size: int | None = ranged(None, low=1)
    exif_orientation: bool = False  # rotate and flip images upright according to their EXIF data
    background: str | None = None  # colour behind transparent images: white, #rrggbb; None: alpha is dropped
    bit_depth: int = ranged(16, low=8, high=16)  # bits in use of 16-bit grey images, for example 12 for most X-rays
    val_fraction: float = ranged(0.1, low=0, high=0.9)  # share of train, if the source has no validation split
    test_fraction: float = ranged(0.1, low=0, high=0.9)  # share of train, if the source has no test split
    split_seed: int = ranged(0, low=0)  # independent of `seed`, so that runs with different seeds share a test set
    on_bad_sample: str = choice("fail", ("fail", "skip"))
    image_column: str = "image"  # parquet: encoded bytes, {"bytes": ...}, or nested lists; image_list: paths
    label_column: str = "label"
    label_separator: str = ";"  # separates labels, or numbers, in a text cell
    target_columns: list[str] | None = None  # regression: columns of the targets; None: only label_column
    standardize_targets: bool = True  # regression: learn (target - mean) / std, computed on the training split
    # meaning of integer labels. values: each value that occurs is a class; indices: n is class n, of 0 to the largest n
    integer_labels: str = choice("values", ("values", "indices"))
    num_samples: int | None = ranged(None, low=1)  # synthetic: over all splits
    kwargs: dict[str, Any] = field(default_factory=dict)  # for your own sources
    # cached: decoded once, kept in memory; streaming: decoded while the run trains; auto: cached if the data fit
    feed: str = choice(AUTO, (AUTO, "cached", "streaming"))
    shuffle_window: int | None = ranged(None, low=1)  # blocks (row groups, ..) shuffled together; None: a whole epoch
    # samples of an epoch. shuffle: each once; balanced: all classes equally often; sqrt: classes by the square root of
    # their size
    sampling: str = choice("shuffle", SAMPLINGS)
    decode_cpus: int | None = ranged(None, low=1)  # over all nodes; None: all, or those that workers leave free
    prefetch_batches: int | None = ranged(None, low=0)  # batches prepared in advance; None: 2 on GPU, 0 on CPU

    @property
    def decoder_name(self) -> str:
        """The decoder's name; for auto, that of a new run (`ftexp.config.fingerprint.as_begun` resolves other runs)."""
        return TORCHVISION if self.decoder == AUTO else self.decoder


@dataclass(kw_only=True)
class AugmentConfig:
    pad_px: int = ranged(0, low=0)  # shift by up to this many pixels in each direction, filled with zeros
    hflip: float = ranged(0.0, low=0, high=1)  # probability of a left-right flip
    brightness: float = ranged(0.0, low=0, high=1)  # multiply pixels by 1 +- up to this
    rand_augment: str | None = None  # in timm's notation, such as rand-m9-n2-mstd0.5-inc1; drawn per sample
    # timm's random crop of the stored image; none: the whole image, as in evaluation
    crop: str = choice("none", CROPS)
    scale: list[float] | None = None  # [min, max] share of the image's area; None: [0.08, 1]; rkrc, rkrr: [0.8, 1]
    ratio: list[float] | None = None  # [min, max] of width / height; None: [3/4, 4/3]; rkrc, rkrr: [0.9, 1/0.9]
    interpolation: str = choice("random", ("random", *INTERPOLATIONS))  # for crop and auto_augment
    vflip: float = ranged(0.0, low=0, high=1)  # probability of an upside-down flip
    auto_augment: str | None = None  # in timm's notation: rand-m9-mstd0.5-inc1, original, v0, augmix-m3, 3a, ...
    # maximum change of brightness, contrast and saturation; or [brightness, contrast, saturation(, hue)]
    color_jitter: Any = None
    color_jitter_prob: float | None = ranged(None, low=0, high=1)  # None: every sample is jittered
    grayscale: float = ranged(0.0, low=0, high=1)  # probability of conversion to grey
    gaussian_blur: float = ranged(0.0, low=0, high=1)  # probability; the kernel is 23 px wide, sigma 0.1 to 2
    custom: list[str] = field(default_factory=list)  # your own augmentations, in this order, after all of the above
    erase_prob: float = ranged(0.0, low=0, high=1)  # probability of random erasing, after normalisation
    erase_mode: str = choice("const", ERASE_MODES)  # fill with: const: the mean; rand: one colour; pixel: noise
    erase_count: int = ranged(1, low=1)  # maximum number of rectangles
    mixup_alpha: float = ranged(0.0, low=0)  # parameter of the beta distribution; 0: no mixup
    cutmix_alpha: float = ranged(0.0, low=0)  # parameter of the beta distribution; 0: no cutmix
    mix_prob: float = ranged(1.0, low=0, high=1)  # probability of mixing at all
    mix_switch_prob: float = ranged(0.5, low=0, high=1)  # with mixup and cutmix: probability of cutmix
    mix_mode: str = choice("batch", MIX_MODES)  # one draw per global batch, per pair of samples, or per sample
    mixup_off_epoch: int | None = ranged(None, low=0)  # first epoch without mixing, counted from 0; None, 0: mix always
    repeats: int = ranged(1, low=1)  # copies of a sample in a global batch; an epoch has this many times fewer samples
    # views of each sample for loss=jsd, as timm's --aug-splits: the first is only cropped and flipped; auto_augment,
    # colour, blur and erasing change each of the others by its own draws
    splits: int = ranged(1, low=1)

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with one another."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def is_random(self) -> bool:
        """Whether the augmentation of a sample depends on its position."""
        return (
            self.changes_pictures
            or self.mixes
            or self.rand_augment is not None
            or max(self.pad_px, self.hflip, self.brightness, self.erase_prob) > 0
        )

    @property
    def changes_pictures(self) -> bool:
        """Whether images are augmented one by one during decoding, by `ftexp.data.augment.picture`."""
        return (
            self.crop != "none"
            or max(self.vflip, self.grayscale, self.gaussian_blur) > 0
            or self.auto_augment is not None
            or self.color_jitter is not None
            or bool(self.custom)
        )


@dataclass(kw_only=True)
class ResizingConfig:
    """Progressive resizing, as in Composer: training starts with images smaller than data.image_size."""

    # first image size, as a share of data.image_size; None: every step trains on images of full size
    initial_scale: float | None = ranged(None, above=0, high=1)
    delay_fraction: float = ranged(0.5, low=0, high=1)  # share of train.epochs at the first size
    finetune_fraction: float = ranged(0.2, low=0, high=1)  # share of train.epochs at full size, at the end
    size_increment: int = ranged(4, low=1)  # pixels; all sizes but the full size are multiples of it


@dataclass(kw_only=True)
class TrainConfig:
    epochs: int = ranged(MISSING, low=1)
    global_batch_size: int = ranged(MISSING, low=1)  # samples per optimiser step, over all workers
    accumulate_steps: int = ranged(1, low=1)  # micro-batches per optimiser step on each worker
    precision: str = choice("fp32", PRECISIONS)
    # scope of torch.compile. none; model: the whole model; blocks: each block, compiled once per kind of block. The
    # first steps are slow. true and false, used before `blocks` existed, mean model and none: see `compiled`
    compile: Any = "none"
    # blocks whose activations are recomputed in the backward pass: none; blocks: all; every_2, ...: every second, ...
    # block. Losses are bitwise identical
    checkpoint_activations: str = "none"
    channels_last: bool = False
    deterministic: bool = True  # on GPUs: bitwise identical results in each run, at some cost; always so on CPUs
    label_smoothing: float = ranged(0.0, low=0, high=0.999)
    sync_bn: bool = False  # on GPUs: batch norm computes its training statistics over all workers
    # batch norm's running statistics before an evaluation. broadcast: all ranks take rank 0's; reduce: all ranks take
    # the mean over ranks; none: each rank keeps its own
    dist_bn: str = choice("broadcast", DIST_BN)
    # gradient clipping; at most one of these three
    clip_grad_norm: float | None = ranged(None, above=0)  # maximum norm of all gradients together
    clip_grad_value: float | None = ranged(None, above=0)  # maximum absolute value of each gradient
    clip_grad_agc: float | None = ranged(None, above=0)  # maximum norm of a unit / norm of its weights; except the head
    # {part: first epoch that trains it, at least 1, where epochs count from 0; null: never}. A part is backbone,
    # layers.0-5, or a pattern of parameter names
    freeze: dict[str, Any] = field(default_factory=dict)
    eval_every_epochs: int = ranged(1, low=1)  # the last epoch is always evaluated
    # inline: the workers evaluate and training waits; eval=beside: a Ray task evaluates a checkpoint while they train
    eval: str = choice(INLINE, (INLINE, BESIDE))
    # per worker; None: four times a micro-batch, and with eval=beside the global batch, at most 256
    eval_batch_size: int | None = ranged(None, low=1)
    # metrics of each evaluation, besides loss and accuracy: names in ftexp.config.metric_names, or your own
    metrics: list[str] = field(default_factory=list)
    log_every_steps: int = ranged(10, low=1)
    max_steps: int | None = ranged(None, low=1)  # stop after this many optimiser steps; does not change the schedule
    ledger: bool = False  # record which samples each update used, in ledger/*.jsonl

    @property
    def compiled(self) -> str:
        """The value of COMPILED that `compile` stands for."""
        if isinstance(self.compile, bool):
            return "model" if self.compile else "none"
        return str(self.compile)


@dataclass(kw_only=True)
class LossConfig:
    """The training loss. Evaluation always uses the loss of `ftexp.evaluation.tasks`."""

    name: str = "ce"  # one of LOSSES, or your own
    # none, inv_freq, effective_num, or a list of factors, one per class, on the loss of the class's samples
    class_weights: Any = "none"
    effective_num_beta: float = ranged(0.999, above=0, high=0.9999999)  # effective_num: near 1, it approaches inv_freq
    target_threshold: float | None = ranged(None, low=0, high=0.999)  # bce: targets of mixed samples above it become 1
    sum_classes: bool = False  # bce: sum over classes instead of mean
    # bce, and asl with multi_label: weight of the positive term, a number or a list with one per class
    pos_weight: Any = None
    gamma: float = ranged(2.0, low=0)  # focal: 0 gives cross-entropy; with multi_label, binary cross-entropy
    gamma_pos: float = ranged(1.0, low=0)  # asl
    gamma_neg: float = ranged(4.0, low=0)  # asl
    # asl with multi_label: margin subtracted from the probabilities of classes that a sample does not have
    clip: float = ranged(0.05, low=0, high=0.5)
    epsilon: float = 2.0  # poly: 0 gives cross-entropy
    alpha: float = ranged(12.0, above=0)  # jsd: weight of the divergence between the views of a sample
    delta: float = ranged(1.0, above=0)  # huber: error above which the loss is linear; in stds if standardize_targets
    kwargs: dict[str, Any] = field(default_factory=dict)  # for your own losses


@dataclass(kw_only=True)
class OptimConfig:
    name: str = MISSING  # timm optimiser name
    lr: float = ranged(MISSING, above=0)  # peak learning rate at train.global_batch_size; never rescaled
    # instead of lr: learning rate for a batch of lr_base_size, scaled to train.global_batch_size as in timm's train.py
    lr_base: float | None = ranged(None, above=0)
    lr_base_size: int = ranged(256, low=1)
    lr_base_scale: str | None = choice(None, LR_SCALES)  # None: sqrt for ada* and lamb, else linear
    weight_decay: float = ranged(0.0, low=0)  # not applied to biases and norms
    filter_bias_and_bn: bool = True  # false: weight decay also on biases and norms, unless the model excludes them
    layer_decay: float | None = ranged(None, above=0, high=1)  # learning rate of a layer relative to the next layer's
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm's create_optimizer_v2


@dataclass(kw_only=True)
class EmaConfig:
    """The EMA of the weights, timm's ModelEmaV3: saved, and evaluated in addition to the weights themselves."""

    decay: float | None = ranged(None, above=0, high=0.999999)  # share of the EMA kept at each step; None: no EMA
    use_warmup: bool = False  # let the decay grow up to `decay`: 1 - (1 + step / gamma) ** -power
    warmup_gamma: float = ranged(1.0, above=0)
    warmup_power: float = ranged(2 / 3, above=0)
    update_after_step: int = ranged(0, low=0)  # until this step, the EMA equals the weights


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation from a teacher: a frozen model whose outputs on the same batch are part of the training loss."""

    # a run's directory or URI; a weights file with timm's config.json next to it; or a timm name. None: no teacher
    teacher: str | None = None
    kind: str = choice(LOGITS, DISTILLATIONS)  # outputs compared: logits; pooled features; logits of DeiT's token
    alpha: float = ranged(0.5, above=0, high=1)  # weight of the teacher's term; the label loss has 1 - alpha
    temperature: float = ranged(1.0, above=0)  # logits, token: divides the logits of student and teacher
    hard: bool = False  # token: use the teacher's most likely class instead of its distribution
    # teacher is a run: best, latest, or a checkpoint's name. A resumed run keeps the checkpoint that best or latest
    # meant at its start, as long as that checkpoint exists
    checkpoint: str = "best"
    weights: str = choice("raw", WEIGHTS)  # teacher is a run: which of its weights
    pretrained: Any = True  # teacher is a timm name: true for timm's hub, or the path of a weights file
    kwargs: dict[str, Any] = field(default_factory=dict)  # teacher is a timm name: passed to timm.create_model
    # input size of the teacher, resized from data.image_size. None: the size that the teacher's run was trained with;
    # data.image_size if the teacher is not a run
    image_size: int | None = ranged(None, low=1)
    precision: str | None = choice(None, PRECISIONS)  # precision of the teacher; None: train.precision
    # hash of the weights file (BLAKE3 in checkpoints of format 3). None: computed when the run starts
    sha256: str | None = None
    # SHA-256 of the teacher's arguments, mean, std, size and class names. None: computed when the run starts
    spec_sha256: str | None = None


@dataclass(kw_only=True)
class ScheduleConfig:
    name: str = choice(MISSING, SCHEDULES)  # timm's schedulers, updated at every optimiser step
    warmup_epochs: float = ranged(0.0, low=0)
    warmup_lr: float = ranged(1e-6, low=0)
    min_lr: float = ranged(0.0, low=0)
    cooldown_epochs: float = ranged(0.0, low=0)  # last epochs of train.epochs, trained at min_lr
    decay_epochs: float = ranged(30.0, above=0)  # step: epochs between decays
    decay_rate: float = ranged(0.1, above=0)  # step: factor per decay; poly: exponent


@dataclass(kw_only=True)
class StoppingConfig:
    """Early stopping: the run finishes once a metric no longer improves. The schedule does not change."""

    metric: str | None = None  # a logged metric, such as val_loss; None: no early stopping
    mode: str | None = choice(None, ("max", "min"))  # whether larger or smaller is better; None: the metric's own
    patience_epochs: int = ranged(10, low=1)  # epochs without improvement, counted at their ends
    min_delta: float = ranged(0.0, low=0)  # an improvement must be larger than this


@dataclass(kw_only=True)
class ScalingConfig:
    num_workers: Any = AUTO  # int, [min, max] for elastic, or auto
    use_gpu: Any = AUTO  # true, false, or auto: true if this machine has a GPU
    resources_per_worker: dict[str, float] = field(default_factory=dict)  # CPU and GPU are chosen if not set here
    placement_strategy: str = choice("PACK", ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"))
    accelerator_type: str | None = None
    label_selector: Any = None  # {label: value}, or a list with one such dict per worker
    elastic_resize_monitor_interval_s: float = ranged(60.0, low=0)
    address: str | None = None  # None: start Ray on this machine; auto or host:port: join that cluster
    backend: str | None = None  # torch.distributed backend; None: nccl on GPU, gloo on CPU
    timeout_s: int = ranged(1800, low=1)  # timeout of one collective
    hot_start: str = choice("auto", ("auto", "on", "off"))  # fork workers from a process that has imported everything
    # a rank is reported if its own step time stays above this factor times the median over ranks; None: never
    straggler_factor: float | None = ranged(1.5, above=1)


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is distributed over the workers."""

    # ddp: each worker holds the whole model; fsdp: parameters, gradients and optimiser state are sharded over all
    # workers; hsdp: they are sharded over shard_size workers, which form a replica
    kind: str = choice(DDP, PARALLEL)
    shard_size: int | None = ranged(None, low=2)  # hsdp: workers per replica; must divide the number of workers
    # false: a block stays gathered from its forward to its backward pass: faster, but more memory
    reshard_after_forward: bool = True
    # fsdp, hsdp: dtype of computation in blocks, and of gradient reduction; None: the parameters' dtype, float32
    param_dtype: str | None = choice(None, PRECISIONS)
    reduce_dtype: str | None = choice(None, PRECISIONS)
    # modules that are gathered, compiled or recomputed as a unit: patterns of module names such as blocks.*, where *
    # matches one part between dots. []: the blocks that timm numbers
    wrap: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class FailureConfig:
    max_failures: int = ranged(3, low=-1)  # restarts of the worker group; -1: no limit
    max_preemption_failures: int = ranged(-1, low=-1)  # preemptions are not charged to max_failures
    max_ray_failures: int = ranged(3, low=-1)  # restarts of a local Ray that died; not charged to max_failures
    max_by_cause: dict[str, int] = field(default_factory=dict)  # {cause: restarts}, a limit in addition to max_failures
    refill_after_steps: int | None = ranged(None, low=1)  # steps after which a failure no longer counts; None: never
    max_failures_without_progress: int = ranged(3, low=-1)  # consecutive failures without a new step: a crash loop
    backoff_s: float = ranged(1.0, low=0)  # delay before a restart after no progress; doubled each time
    max_backoff_s: float = ranged(60.0, low=0)
    # after a NaN or infinite loss or gradient: restart; skip the batch; or skip it and restore the last checkpoint
    on_nonfinite: str = choice("raise", ("raise", "skip_step", "rollback"))
    max_nonfinite_steps: int = ranged(10, low=0)  # consecutive skipped steps before the run gives up
    max_rollbacks: int = ranged(5, low=0)  # rollbacks to the same checkpoint before the run gives up
    # retry: within the budgets; fail: stop; halve_micro_batch: restart with twice the accumulate_steps, not charged
    on_out_of_memory: str = choice("retry", ("retry", "fail", "halve_micro_batch"))
    # interval in steps for comparing the weights of all ranks, also before each checkpoint; a difference is a failure
    check_replicas_every_steps: int | None = ranged(None, low=1)
    repeat_step_every: int | None = ranged(None, low=1)  # steps between those computed twice and compared bitwise
    # steps between snapshots in memory, which survive workers; 0: none; None: as many as cost 1 % of the time
    memory_every_steps: int | None = ranged(None, low=0)
    # when a worker dies: restart all workers, or replace it while the others wait; auto: replace if possible
    recovery: str = choice(RESTART, (RESTART, REPLACE, AUTO))
    memory_max_gb: float | None = ranged(None, above=0)  # memory for snapshots per node; None: a quarter of free memory
    hang_timeout_s: float | None = ranged(300.0, above=0)  # time without a step on a rank; None: no limit
    start_timeout_s: float | None = ranged(1800.0, above=0)  # for building, restoring, compiling and the first step
    evaluation_timeout_s: float | None = ranged(1800.0, above=0)
    save_timeout_s: float | None = ranged(1800.0, above=0)  # for the wait for the previous checkpoint
    controller_failure_limit: int = ranged(-1, low=-1)  # restarts of Ray's controller, and failed starts
    relax_collectives_on_preemption: bool = False
    preemption_grace_s: float = ranged(0.0, low=0)

    @property
    def takes_snapshots(self) -> bool:
        """Whether to take snapshots in memory. A rollback restores the last checkpoint only, so it uses none."""
        return self.memory_every_steps != 0 and self.on_nonfinite != "rollback"


@dataclass(kw_only=True)
class CheckpointConfig:
    every_epochs: int | None = ranged(1, low=1)  # None: only at the other intervals, and at the end
    every_steps: int | None = ranged(None, low=1)  # optimiser steps
    every_seconds: float | None = ranged(None, above=0)  # since the start of the last checkpoint
    max_failed_saves: int | None = ranged(None, low=0)  # consecutive failures that training survives; None: any number
    # full: rank 0 writes everything; sharded: each worker writes its shard of model and optimiser; auto: sharded if the
    # model is sharded, else full
    format: str = choice(AUTO, (AUTO, "full", "sharded"))
    # sharded checkpoints that also get model.pt, for use without ftexp. end: the last and the best, when the run ends;
    # best: also each new best; never: none
    full_at: str = choice("end", ("end", "best", "never"))
    num_to_keep: int | None = ranged(2, low=2)  # at least 2, in case the newest is corrupt; None: all
    checkpoint_score_attribute: str = "val_accuracy"  # the best checkpoint by this metric is also kept
    checkpoint_score_order: str = choice("max", ("max", "min"))
    extra_state: list[str] = field(
        default_factory=lambda: ["progress", "scheduler", "scaler", "ema", "distill", "rng", "best"]
    )


def fault_fields(fault: Any) -> dict[str, Any]:
    """Return an entry of `chaos.faults`, a name or {kind: ..., step: ...}, as a new dict of the second form."""
    return {"kind": fault} if isinstance(fault, str) else dict(fault)


@dataclass(kw_only=True)
class ChaosConfig:
    kind: str = choice("none", ("none", *FAULTS, "random"))
    step: int | None = ranged(None, low=1)  # inject after this optimiser step; None: in the middle of the run
    rank: int = ranged(0, low=0)  # affected worker, modulo the number of workers
    count: int = ranged(1, low=1)  # newest checkpoints to damage; saves that fail or are slow; slow steps
    # hang: duration; slow_storage, slow_rank: extra time per checkpoint, or per step of that rank
    seconds: float = ranged(3600.0, low=0)
    faults: list[Any] = field(default_factory=list)  # several faults: names, or {kind: ..., step: ..., rank: ...}
    kinds: list[str] = field(default_factory=lambda: ["kill_worker"])  # random: faults to draw from
    rate: float = ranged(0.01, low=0, high=1)  # random: probability of a fault at a step
    seed: int = ranged(0, low=0)  # random: seed of the draws


@dataclass(kw_only=True)
class ReportConfig:
    enabled: bool = True  # write report.html at the end, and evaluation_test.json for it


@dataclass(kw_only=True)
class NotifyConfig:
    """Alerts, each sent once. Errors in sending are logged and never fail the run."""

    # http, https: a JSON POST; others, such as slack://... or mailto://...: sent by the package apprise. Secret: never
    # written to a file or log
    urls: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=lambda: list(ALERTS))
    max_recoveries: int | None = ranged(3, low=0)  # more recoveries than this raise an alert; None: never
    no_progress_s: float | None = ranged(1800.0, above=0)  # time without a new step that raises an alert; None: never
    timeout_s: float = ranged(10.0, above=0)  # for one request, and for all pending ones when the driver exits


@dataclass(kw_only=True)
class ProfileConfig:
    enabled: bool = False  # write a torch profiler trace of some steps to the run directory; short: profile=true
    start_step: int = ranged(20, low=1)  # first traced step; a run's first steps are slower than the rest
    num_steps: int = ranged(5, low=1, high=1000)
    rank: int = ranged(0, low=0)  # modulo the number of workers


@dataclass(kw_only=True)
class SweepConfig:
    """Settings of a multirun (-m); none of them is part of a trial's definition."""

    name: str | None = None  # None: a new, timestamped sweep; with a name, the same command resumes the sweep
    max_concurrent: int | None = ranged(None, low=1)  # trials at once; None: as many as fit
    retry_failed: bool = True  # whether a resumed sweep retries failed trials
    metric: str | None = None  # objective, from a trial's last metrics; None: checkpoint.checkpoint_score_attribute
    mode: str | None = choice(None, ("max", "min"))  # None: checkpoint.checkpoint_score_order


@dataclass(kw_only=True)
class SearchConfig:
    """Settings of `hydra/sweeper=tune`, under hydra.sweeper. The objective is sweep.metric.

    None of them is part of a trial's definition.
    """

    num_trials: int = ranged(MISSING, low=1)  # in total, over all invocations
    search: str = choice(MISSING, ("random", "tpe"))
    seed: int = ranged(0, low=0)  # seed of the proposals, not of the trials
    scheduler: str = choice("none", ("none", "asha"))  # asha: stop the worse trials early
    grace_epochs: int = ranged(1, low=1)  # asha: first rung; no trial is stopped before it
    reduction_factor: float = ranged(3.0, above=1)  # asha: about 1 trial in reduction_factor continues beyond a rung


@dataclass(kw_only=True)
class Config:
    """The config of a run. `conf/config.yaml` names the group files that fill it."""

    seed: int = ranged(0, low=0, high=2**32 - 1)
    resume: str = choice("auto", ("auto", "must", "never"))  # must: run.name must exist; never: it must not exist
    resume_from: str | None = None  # run directory or checkpoint with the initial weights of a new run
    plugins: list[str] = field(default_factory=list)  # your modules to import: models, sources, states
    verbose: bool = False  # show Ray's own output
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    resizing: ResizingConfig = field(default_factory=ResizingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)  # {name: arguments} of your own hooks
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    chaos: ChaosConfig = field(default_factory=ChaosConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def config_dir() -> Path:
    """Return the directory of the YAML groups: in the package if installed, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
