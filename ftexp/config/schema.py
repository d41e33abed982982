"""The schema: every field a config may hold, with its type, unit, range and meaning.

The YAML groups under conf/ fill these classes; Hydra refuses a key or a type that is not here. What a
type can't say (ranges, choices, contradictions between groups) is in `ftexp.config.checks.validate`. Nothing heavier
than omegaconf is imported, so that a mistake is reported at once.
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
DAMAGES = ("truncate_checkpoint", "flip_byte", "delete_manifest", "delete_checkpoint")  # to checkpoints
FAULTS = (
    *("raise", "kill_worker", "kill_driver", "hang", "nonfinite"),
    *DAMAGES,
    *("half_snapshot", "disk_full", "slow_storage", "flip_weight", "slow_rank"),
)
SCHEDULES = ("cosine", "poly", "tanh", "step", "constant")
MIX_MODES = ("batch", "pair", "elem")
CROPS = ("none", "rrc", "rkrc", "rkrr")  # names of timm's train_crop_mode
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # keys of data that pretrained weights bring
CROP_MODES = ("center", "squash", "border")  # names of timm's crop_mode in evaluation
TTA = ("none", "hflip")  # test-time augmentation, of evaluate and predict
INTERPOLATIONS = ("bilinear", "bicubic")
PILLOW, TORCHVISION = "pillow", "torchvision"
DECODERS = (AUTO, TORCHVISION, PILLOW)  # see ftexp.data.decoder
ERASE_MODES = ("const", "rand", "pixel")
SINGLE_LABEL_LOSSES = ("ce", "bce", "focal", "asl", "poly", "jsd")
MULTI_LABEL_LOSSES, REGRESSION_LOSSES = ("bce", "asl", "focal"), ("mse", "l1", "huber")
LOSSES = (*SINGLE_LABEL_LOSSES, *REGRESSION_LOSSES)  # built in
CLASS_WEIGHTS = ("none", "inv_freq", "effective_num")  # names of timm's class weights
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label", "multi_label", "regression"
TASKS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
SAMPLINGS = ("shuffle", "balanced", "sqrt")
INLINE, BESIDE = "inline", "beside"
DISTILLATIONS = LOGITS, FEATURES, TOKEN = ("logits", "features", "token")  # names of timm's distillation types
ALERTS = ("gave_up", "finished", "recoveries", "no_progress", "failing_saves", "straggler")
HTTP_SCHEMES = ("http", "https")
WEIGHTS = ("raw", "ema")  # weights of a run: those that were trained, or their EMA
DIST_BN = ("none", "reduce", "broadcast")  # names of timm's --dist-bn
LR_SCALES = ("linear", "sqrt")
PARALLEL = DDP, FSDP, HSDP = ("ddp", "fsdp", "hsdp")
COMPILED = ("none", "model", "blocks")
RESTART, REPLACE = "restart", "replace"  # values of failure.recovery
SGD_NAMES = ("sgd", "momentum", "nesterov")  # timm's names for torch.optim.SGD


@dataclass(kw_only=True)
class RunConfig:
    name: str | None = None  # None: a new, timestamped run. Set: the same command resumes it
    storage: str = "runs"  # a directory, or any URI that pyarrow.fs opens: s3://bucket/prefix


@dataclass(kw_only=True)
class ModelConfig:
    name: str = MISSING  # a timm model name
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to timm.create_model
    # {timm name: kwargs}: defaults while `name` is that model; `kwargs` overrides them. A group file has its sizes
    # here, so that with another `model.name` they don't reach that architecture
    preset: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretrained: Any = False  # true: weights of timm's hub; a path: a local file of PyTorch or safetensors
    pretrained_partial: bool = False  # train also where weights give less than half of the model's parameters
    head_init_scale: float | None = ranged(
        None, above=0
    )  # the new classifier's weights and biases are multiplied by it
    head_init_bias: float | None = None  # what the new classifier's biases are set to
    # stochastic depth: probability that the last block is skipped for a sample, falling to 0 at the first
    drop_path_rate: float | None = ranged(None, low=0, high=0.99)

    def all_kwargs(self) -> dict[str, Any]:
        """Return the arguments for `timm.create_model`, besides input size, channels and classes."""
        drop_path = {} if self.drop_path_rate is None else {"drop_path_rate": self.drop_path_rate}
        return {**self.preset.get(self.name, {}), **drop_path, **self.kwargs}


@dataclass(kw_only=True)
class DataConfig:
    name: str = MISSING  # a registered source
    root: str | None = None  # directory or URI that holds the data, for sources that read files
    download: bool = False  # let torchvision fetch what is missing under root
    image_size: int = ranged(MISSING, low=1)  # pixels; images are square as the model sees them
    channels: int = ranged(3, low=1, high=4)
    # what a sample's label is: its class; any number of classes, none included; numbers
    task: str = choice(SINGLE_LABEL, TASKS)
    num_classes: int | None = ranged(None, low=2)  # None: as many as the source has
    # with model.pretrained, a field of PREPROCESSING without an override is taken from timm's config of the model
    mean: list[float] = MISSING  # per channel, of pixels scaled to 0..1
    std: list[float] = MISSING
    # how a whole image becomes a square: timm's crop_pct, crop_mode and interpolation of evaluation; crop_pct=null: all
    # of it, and with crop_mode=center its largest square, cut out before it is scaled
    crop_pct: float | None = ranged(None, above=0, high=1)
    crop_mode: str = choice("center", CROP_MODES)
    interpolation: str = choice("bicubic", INTERPOLATIONS)
    # how images are decoded, by default as runs did before there was a choice; group files set it for new runs.
    # decoder: see ftexp.data.decoder; auto is what a run began with, and torchvision for a new one
    decoder: str = choice(PILLOW, DECODERS)
    # pixels. An image that augment.crop cuts a part out of, and whose shorter side is at least 2, 4 or 8 times this, is
    # shrunk so many times while it is decoded; None: parts are cut out of the image as it is stored
    decode_size: int | None = ranged(None, low=1)
    exif_orientation: bool = False  # turn images upright as their EXIF data say
    background: str | None = None  # colour that transparent images are put on, white or #rrggbb; None: alpha is dropped
    bit_depth: int = ranged(16, low=8, high=16)  # bits of 16-bit grey images that are used: 12 for most X-rays, say
    val_fraction: float = ranged(0.1, low=0, high=0.9)  # share of train, where the source has no split
    test_fraction: float = ranged(0.1, low=0, high=0.9)  # likewise
    split_seed: int = ranged(0, low=0)  # its own seed, so that runs that differ in `seed` share a test set
    on_bad_sample: str = choice("fail", ("fail", "skip"))
    image_column: str = "image"  # parquet: encoded bytes, {"bytes": ...}, or nested lists; image_list: paths
    label_column: str = "label"
    label_separator: str = ";"  # between the labels, or numbers, of a cell that is text
    target_columns: list[str] | None = None  # regression: the columns that hold the targets; None: label_column alone
    standardize_targets: bool = True  # regression: learn (target - mean) / std, of the training split
    # what whole numbers mean as labels: values, each that occurs is a class; indices, n is class n of 0 to the largest
    integer_labels: str = choice("values", ("values", "indices"))
    num_samples: int | None = ranged(None, low=1)  # synthetic
    kwargs: dict[str, Any] = field(default_factory=dict)  # for sources of your own
    # cached: decoded once, in memory; streaming: decoded while the run trains; auto: cached if it fits
    feed: str = choice(AUTO, (AUTO, "cached", "streaming"))
    shuffle_window: int | None = ranged(None, low=1)  # blocks (row groups, ..) shuffled together; None: a whole epoch
    # what an epoch draws: each sample once; classes alike; classes by the square root of their size
    sampling: str = choice("shuffle", SAMPLINGS)
    decode_cpus: int | None = ranged(None, low=1)  # over all nodes; None: all, or what the workers leave
    prefetch_batches: int | None = ranged(None, low=0)  # batches made ahead; None: 2 on GPU, none on CPU

    @property
    def decoder_name(self) -> str:
        """The definition that `decoder` names; that of a new run for auto: see `ftexp.config.fingerprint.as_begun`."""
        return TORCHVISION if self.decoder == AUTO else self.decoder


@dataclass(kw_only=True)
class AugmentConfig:
    pad_px: int = ranged(0, low=0)  # shift by up to this many pixels each way, zeros moving in
    hflip: float = ranged(0.0, low=0, high=1)  # probability of a left-right flip
    brightness: float = ranged(0.0, low=0, high=1)  # multiply pixels by 1 +- up to this
    rand_augment: str | None = None  # as timm writes it, such as rand-m9-n2-mstd0.5-inc1; drawn and applied per sample
    # a random part of the image as it is stored; none: all of it, as it is evaluated
    crop: str = choice("none", CROPS)
    scale: list[float] | None = None  # [min, max] of the image's area; None: [0.08, 1], and [0.8, 1] of rkrc, rkrr
    ratio: list[float] | None = None  # [min, max] of width to height; None: [3/4, 4/3], and [0.9, 1/0.9] of those
    interpolation: str = choice("random", ("random", *INTERPOLATIONS))  # for crop and auto_augment
    vflip: float = ranged(0.0, low=0, high=1)  # probability of an upside-down flip
    auto_augment: str | None = None  # as timm writes it: rand-m9-mstd0.5-inc1, original, v0, augmix-m3, 3a, ...
    # maximum change of brightness, contrast and saturation; or [brightness, contrast, saturation], and hue if you like
    color_jitter: Any = None
    color_jitter_prob: float | None = ranged(None, low=0, high=1)  # None: of every sample
    grayscale: float = ranged(0.0, low=0, high=1)  # probability of grey
    gaussian_blur: float = ranged(0.0, low=0, high=1)  # probability; 23 px wide, of sigma 0.1 to 2
    custom: list[str] = field(default_factory=list)  # augmentations of your own, in this order, after all of those
    erase_prob: float = ranged(0.0, low=0, high=1)  # random erasing, after normalising
    erase_mode: str = choice("const", ERASE_MODES)  # the mean; a colour; noise
    erase_count: int = ranged(1, low=1)  # rectangles at most
    mixup_alpha: float = ranged(0.0, low=0)  # parameter of the beta distribution; 0: no mixup
    cutmix_alpha: float = ranged(0.0, low=0)  # likewise; where both are given, one of them is drawn
    mix_prob: float = ranged(1.0, low=0, high=1)  # probability of mixing at all
    mix_switch_prob: float = ranged(0.5, low=0, high=1)  # probability of cutmix, where both are given
    mix_mode: str = choice("batch", MIX_MODES)  # one draw for a global batch, for two samples, or for each
    mixup_off_epoch: int | None = ranged(None, low=0)  # the first that mixes nothing any more, from 0; None, 0: none
    repeats: int = ranged(1, low=1)  # versions of a sample in a global batch; an epoch then draws so many times fewer
    # views of each sample for loss=jsd, timm's --aug-splits: the first is cropped and flipped only, the others are also
    # changed by auto_augment, colour, blur and erasing, each by draws of its own
    splits: int = ranged(1, low=1)

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with one another."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def is_random(self) -> bool:
        """Whether a sample looks different at another position."""
        return (
            self.changes_pictures
            or self.mixes
            or self.rand_augment is not None
            or max(self.pad_px, self.hflip, self.brightness, self.erase_prob) > 0
        )

    @property
    def changes_pictures(self) -> bool:
        """Whether images are changed one by one, where they are decoded: by `ftexp.data.augment.picture`."""
        return (
            self.crop != "none"
            or max(self.vflip, self.grayscale, self.gaussian_blur) > 0
            or self.auto_augment is not None
            or self.color_jitter is not None
            or bool(self.custom)
        )


@dataclass(kw_only=True)
class ResizingConfig:
    """Progressive resizing, as in Composer: training begins with images smaller than data.image_size."""

    # size of the first images, as a share of data.image_size; None: every step trains on images of full size
    initial_scale: float | None = ranged(None, above=0, high=1)
    delay_fraction: float = ranged(0.5, low=0, high=1)  # share of train.epochs that keeps the first size
    finetune_fraction: float = ranged(0.2, low=0, high=1)  # share of train.epochs, at the end, of full size
    size_increment: int = ranged(4, low=1)  # pixels; sizes are multiples of it, the full size aside


@dataclass(kw_only=True)
class TrainConfig:
    epochs: int = ranged(MISSING, low=1)
    global_batch_size: int = ranged(MISSING, low=1)  # samples per optimiser step, over all workers
    accumulate_steps: int = ranged(1, low=1)  # micro-batches per optimiser step on each worker
    precision: str = choice("fp32", PRECISIONS)
    # what torch.compile takes: none; the model as one; each block, which compiles the blocks of a kind once. The first
    # steps are slow. true and false, of runs from before there were blocks, mean model and none: see `compiled`
    compile: Any = "none"
    # blocks whose activations are computed again in the backward pass, not kept: none; all blocks; every_2, ...:
    # each second, ... block. The losses are the same bits
    checkpoint_activations: str = "none"
    channels_last: bool = False
    deterministic: bool = True  # on GPUs: the same bits each time, at some cost; CPUs do that anyway
    label_smoothing: float = ranged(0.0, low=0, high=0.999)
    sync_bn: bool = False  # on GPUs: in training, batch norm takes its statistics over all workers
    # batch norm's running statistics before an evaluation. broadcast: all ranks take those of rank 0; reduce: they take
    # the mean; none: each rank keeps its own
    dist_bn: str = choice("broadcast", DIST_BN)
    clip_grad_norm: float | None = ranged(None, above=0)  # norm of all gradients together; one of these three, or none
    clip_grad_value: float | None = ranged(None, above=0)  # each gradient within +- this
    clip_grad_agc: float | None = ranged(None, above=0)  # each unit's, as a share of its weight norm; not in the head
    # {part: first epoch that trains it, from 1, or null for none}: backbone, layers.0-5, or a pattern of timm's names
    freeze: dict[str, Any] = field(default_factory=dict)
    eval_every_epochs: int = ranged(1, low=1)  # the last epoch is always evaluated
    # inline: the workers evaluate, and training waits; beside: a Ray task evaluates the checkpoint, while they train
    eval: str = choice(INLINE, (INLINE, BESIDE))
    eval_batch_size: int | None = ranged(None, low=1)  # per worker; None: four times a micro-batch
    # metrics of each evaluation, besides loss and accuracy: names in ftexp.config.metric_names, or of your own
    metrics: list[str] = field(default_factory=list)
    log_every_steps: int = ranged(10, low=1)
    max_steps: int | None = ranged(None, low=1)  # stop after so many optimiser steps; the schedule stays as it is
    ledger: bool = False  # write down which samples drove which update: ledger/*.jsonl

    @property
    def compiled(self) -> str:
        """The value of COMPILED that `compile` means."""
        if isinstance(self.compile, bool):
            return "model" if self.compile else "none"
        return str(self.compile)


@dataclass(kw_only=True)
class LossConfig:
    """The loss that training minimises. Evaluation's is that of `ftexp.evaluation.tasks`, whatever is set here."""

    name: str = "ce"  # one of LOSSES, or one of your own
    # none, inv_freq, effective_num, or a weight for each class, by which the loss of its samples is multiplied
    class_weights: Any = "none"
    effective_num_beta: float = ranged(0.999, above=0, high=0.9999999)  # effective_num: near 1 is near inv_freq
    target_threshold: float | None = ranged(None, low=0, high=0.999)  # bce: targets of mixed samples above it become 1
    sum_classes: bool = False  # bce: the sum over classes, not the mean
    pos_weight: Any = (
        None  # bce, and asl of several labels: weight of the positive term, a number or one for each class
    )
    gamma: float = ranged(2.0, low=0)  # focal: 0 is cross-entropy, binary where samples have several labels
    gamma_pos: float = ranged(1.0, low=0)  # asl
    gamma_neg: float = ranged(4.0, low=0)  # asl
    clip: float = ranged(
        0.05, low=0, high=0.5
    )  # asl of several labels: what probabilities are lowered by for classes not had
    epsilon: float = 2.0  # poly: 0 is cross-entropy
    alpha: float = ranged(12.0, above=0)  # jsd: weight of the divergence between the views of a sample
    delta: float = ranged(1.0, above=0)  # huber: errors above it count linearly; of standardised targets, in stds
    kwargs: dict[str, Any] = field(default_factory=dict)  # for losses of your own


@dataclass(kw_only=True)
class OptimConfig:
    name: str = MISSING  # a timm optimiser name
    lr: float = ranged(MISSING, above=0)  # peak learning rate at the configured global batch; never rescaled
    # instead of lr: the rate at lr_base_size samples per step, scaled to train.global_batch_size as by timm's train.py
    lr_base: float | None = ranged(None, above=0)
    lr_base_size: int = ranged(256, low=1)
    lr_base_scale: str | None = choice(None, LR_SCALES)  # None: sqrt for ada* and lamb, else linear
    weight_decay: float = ranged(0.0, low=0)  # not applied to biases and norms
    filter_bias_and_bn: bool = True  # false: weight decay for all but what the model itself excludes
    layer_decay: float | None = ranged(None, above=0, high=1)  # learning rate of a layer, as a share of the next
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to timm's create_optimizer_v2


@dataclass(kw_only=True)
class EmaConfig:
    """The EMA of the weights, timm's ModelEmaV3: saved, and evaluated besides the weights themselves."""

    decay: float | None = ranged(None, above=0, high=0.999999)  # share of the EMA that a step keeps; None: no EMA
    use_warmup: bool = False  # begin with less, and come up to `decay`: 1 - (1 + step / gamma) ** -power
    warmup_gamma: float = ranged(1.0, above=0)
    warmup_power: float = ranged(2 / 3, above=0)
    update_after_step: int = ranged(0, low=0)  # until then the EMA equals the weights


@dataclass(kw_only=True)
class DistillConfig:
    """A frozen model, the teacher, whose answers on the same batch are part of the loss that training minimises."""

    # a run's directory or URI; a weights file with timm's config.json next to it; or a timm name. None: no teacher
    teacher: str | None = None
    kind: str = choice(LOGITS, DISTILLATIONS)  # what is compared: logits; pooled features; the logits of DeiT's token
    alpha: float = ranged(0.5, above=0, high=1)  # share of the teacher's term; the rest is the loss of the labels
    temperature: float = ranged(1.0, above=0)  # logits, token: both sides' logits are divided by it
    hard: bool = False  # token: the teacher's most likely class, not its distribution
    # checkpoint of a run: best, latest, or a name. When a run resumes, best and latest stay what they were at its start
    # while that checkpoint exists
    checkpoint: str = "best"
    weights: str = choice("raw", WEIGHTS)  # weights of a run
    pretrained: Any = True  # weights of a timm name: true for timm's hub, or the path of a weights file
    kwargs: dict[str, Any] = field(default_factory=dict)  # kwargs of a timm name: passed on to timm.create_model
    # input size of the teacher, resized from data.image_size. None: the size that the teacher's run was trained with;
    # data.image_size if the teacher is not a run
    image_size: int | None = ranged(None, low=1)
    precision: str | None = choice(None, PRECISIONS)  # precision of the teacher; None: train.precision
    # hash of the weights file (BLAKE3 in checkpoints of format 3). None: computed when the run begins
    sha256: str | None = None
    spec_sha256: str | None = None  # SHA-256 of its arguments, mean, std, size and class names; None: likewise


@dataclass(kw_only=True)
class ScheduleConfig:
    name: str = choice(MISSING, SCHEDULES)  # schedulers of timm, stepped every optimiser step
    warmup_epochs: float = ranged(0.0, low=0)
    warmup_lr: float = ranged(1e-6, low=0)
    min_lr: float = ranged(0.0, low=0)
    cooldown_epochs: float = ranged(0.0, low=0)  # the last of train.epochs, at min_lr
    decay_epochs: float = ranged(30.0, above=0)  # step schedule: epochs between drops
    decay_rate: float = ranged(0.1, above=0)  # step: factor per drop; poly: exponent


@dataclass(kw_only=True)
class StoppingConfig:
    """Early stopping: the run ends, finished, once a metric no longer improves. The schedule stays as it is."""

    metric: str | None = None  # a metric that the run logs, such as val_loss; None: every epoch is trained
    mode: str | None = choice(None, ("max", "min"))  # which way the metric is better; None: as the metric says
    patience_epochs: int = ranged(10, low=1)  # without an improvement, counted at the ends of epochs
    min_delta: float = ranged(0.0, low=0)  # what is better by no more than this is no improvement


@dataclass(kw_only=True)
class ScalingConfig:
    num_workers: Any = AUTO  # int, [min, max] for elastic, or auto
    use_gpu: Any = AUTO  # true, false, or auto: whether this machine has one
    resources_per_worker: dict[str, float] = field(default_factory=dict)  # what isn't named here is decided: CPU, GPU
    placement_strategy: str = choice("PACK", ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"))
    accelerator_type: str | None = None
    label_selector: Any = None  # {label: value}, or a list of such, one for each worker
    elastic_resize_monitor_interval_s: float = ranged(60.0, low=0)
    address: str | None = None  # None: start Ray here; auto or host:port: join that cluster
    backend: str | None = None  # torch.distributed backend; None: nccl on GPU, gloo on CPU
    timeout_s: int = ranged(1800, low=1)  # timeout of one collective
    hot_start: str = choice("auto", ("auto", "on", "off"))  # workers fork from a process that has imported everything
    # a rank whose own time of a step stays above this many times the median over ranks is reported; None: no comparison
    straggler_factor: float | None = ranged(1.5, above=1)


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model lies on the workers."""

    # ddp: each worker holds all of it; fsdp: each holds a share of parameters, gradients and optimiser state;
    # hsdp: so do the shard_size workers of a replica, and each replica is whole
    kind: str = choice(DDP, PARALLEL)
    shard_size: int | None = ranged(
        None, low=2
    )  # hsdp: workers that share a replica; the number of workers is a multiple
    reshard_after_forward: bool = (
        True  # false: a block stays whole from its forward to its backward pass; faster, larger
    )
    # fsdp, hsdp: what blocks compute in, and what gradients are summed in; None: as the parameters are, in float32
    param_dtype: str | None = choice(None, PRECISIONS)
    reduce_dtype: str | None = choice(None, PRECISIONS)
    # what is gathered at a time: patterns of module names, blocks.*, say; *: any one part between dots. []: the blocks
    # that timm numbers
    wrap: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class FailureConfig:
    max_failures: int = ranged(3, low=-1)  # restarts of the worker group; -1: no limit
    max_preemption_failures: int = ranged(-1, low=-1)  # preemptions are not charged to max_failures
    max_ray_failures: int = ranged(3, low=-1)  # new Rays for one of our own that died; not charged to max_failures
    max_by_cause: dict[str, int] = field(default_factory=dict)  # {cause: restarts}, besides max_failures
    refill_after_steps: int | None = ranged(None, low=1)  # a failure this many steps back is forgiven; None: never
    max_failures_without_progress: int = ranged(3, low=-1)  # in a row, none of which saw a new step: a crash loop
    backoff_s: float = ranged(1.0, low=0)  # wait before a restart that follows no progress; doubled each time
    max_backoff_s: float = ranged(60.0, low=0)
    # a NaN or infinite loss or gradient: restart, skip the batch, or skip it and go back to the last checkpoint
    on_nonfinite: str = choice("raise", ("raise", "skip_step", "rollback"))
    max_nonfinite_steps: int = ranged(10, low=0)  # skipped in a row before the run gives up
    max_rollbacks: int = ranged(5, low=0)  # to the same checkpoint before the run gives up
    # retry: as the budgets say; fail: stop; halve_micro_batch: restart with twice the accumulate_steps, uncharged
    on_out_of_memory: str = choice("retry", ("retry", "fail", "halve_micro_batch"))
    # compare the weights of all ranks every so many steps, and before each checkpoint; a difference is a failure
    check_replicas_every_steps: int | None = ranged(None, low=1)
    repeat_step_every: int | None = ranged(None, low=1)  # one step in so many is computed twice, and compared bitwise
    # steps between snapshots in memory that outlives the workers; None: as often as costs 1 % of the time; 0: none
    memory_every_steps: int | None = ranged(None, low=0)
    # what follows when a worker dies: restart all workers, or replace it and have the others wait; auto: as it can be
    recovery: str = choice(RESTART, (RESTART, REPLACE, AUTO))
    memory_max_gb: float | None = ranged(None, above=0)  # for snapshots, per node; None: a quarter of what is free
    hang_timeout_s: float | None = ranged(300.0, above=0)  # without a step, on any rank; None: never
    start_timeout_s: float | None = ranged(1800.0, above=0)  # for building, restoring, compiling and the first step
    evaluation_timeout_s: float | None = ranged(1800.0, above=0)
    save_timeout_s: float | None = ranged(1800.0, above=0)  # waiting for the checkpoint before
    controller_failure_limit: int = ranged(-1, low=-1)  # restarts of Ray's controller, and starts that failed
    relax_collectives_on_preemption: bool = False
    preemption_grace_s: float = ranged(0.0, low=0)

    @property
    def takes_snapshots(self) -> bool:
        """Whether snapshots in memory are wanted; a rollback goes back to the last checkpoint and no other state."""
        return self.memory_every_steps != 0 and self.on_nonfinite != "rollback"


@dataclass(kw_only=True)
class CheckpointConfig:
    every_epochs: int | None = ranged(1, low=1)  # None: only at the other cadences, and at the end
    every_steps: int | None = ranged(None, low=1)  # optimiser steps
    every_seconds: float | None = ranged(None, above=0)  # since the last checkpoint was begun
    max_failed_saves: int | None = ranged(None, low=0)  # failed saves in a row that training survives; None: any number
    # full: rank 0 writes all of it; sharded: each worker writes its share of model and optimiser; auto: as they lie
    format: str = choice(AUTO, (AUTO, "full", "sharded"))
    # which sharded checkpoints have model.pt as well, for others than ftexp. end: the last and the best, once the run
    # ends; best: also each that is the best so far; never: none
    full_at: str = choice("end", ("end", "best", "never"))
    num_to_keep: int | None = ranged(2, low=2)  # 1 would leave no way back if the newest is corrupt; None: all
    checkpoint_score_attribute: str = "val_accuracy"  # the best by this metric is kept as well
    checkpoint_score_order: str = choice("max", ("max", "min"))
    extra_state: list[str] = field(
        default_factory=lambda: ["progress", "scheduler", "scaler", "ema", "distill", "rng", "best"]
    )


def fault_fields(fault: Any) -> dict[str, Any]:
    """Return an entry of `chaos.faults`, a name or {kind: ..., step: ...}, as the latter; a new dict."""
    return {"kind": fault} if isinstance(fault, str) else dict(fault)


@dataclass(kw_only=True)
class ChaosConfig:
    kind: str = choice("none", ("none", *FAULTS, "random"))
    step: int | None = ranged(None, low=1)  # fires after this optimiser step; None: in the middle of the run
    rank: int = ranged(0, low=0)  # the worker that it happens to, modulo their number
    count: int = ranged(1, low=1)  # newest checkpoints that are corrupt; saves that fail or are slow; slow steps
    # hang: how long; slow_storage, slow_rank: how much longer a checkpoint, or a step of that rank, takes
    seconds: float = ranged(3600.0, low=0)
    faults: list[Any] = field(default_factory=list)  # several: names, or {kind: ..., step: ..., rank: ...}
    kinds: list[str] = field(default_factory=lambda: ["kill_worker"])  # random: what may happen
    rate: float = ranged(0.01, low=0, high=1)  # random: probability of a fault at a step
    seed: int = ranged(0, low=0)  # random: its own seed


@dataclass(kw_only=True)
class ReportConfig:
    enabled: bool = True  # write report.html at the end, and evaluation_test.json for it


@dataclass(kw_only=True)
class NotifyConfig:
    """Alerts, each sent once. Errors in sending are logged and never fail the run."""

    # http and https: a JSON POST; others, slack://... or mailto://..., by the package apprise. Secret: written nowhere
    urls: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=lambda: list(ALERTS))
    max_recoveries: int | None = ranged(3, low=0)  # one more is an alert; None: never
    no_progress_s: float | None = ranged(1800.0, above=0)  # without a step that had not been done before; None: never
    timeout_s: float = ranged(10.0, above=0)  # for a request, and for the rest when the command ends


@dataclass(kw_only=True)
class ProfileConfig:
    enabled: bool = False  # leave a torch profiler trace of some steps in the run directory; profile=true for short
    start_step: int = ranged(20, low=1)  # the first that is traced; the first steps of all are slower than the rest
    num_steps: int = ranged(5, low=1, high=1000)
    rank: int = ranged(0, low=0)  # modulo the number of workers


@dataclass(kw_only=True)
class SweepConfig:
    """Settings of a multirun (-m); none defines a trial."""

    name: str | None = None  # None: a new, timestamped sweep. Set: the same command resumes it
    max_concurrent: int | None = ranged(None, low=1)  # trials at once; None: as many as fit
    retry_failed: bool = True  # whether the same command tries failed trials again
    metric: str | None = None  # objective, in a trial's last metrics; None: checkpoint.checkpoint_score_attribute
    mode: str | None = choice(None, ("max", "min"))  # None: checkpoint.checkpoint_score_order


@dataclass(kw_only=True)
class SearchConfig:
    """Settings of `hydra/sweeper=tune`, under hydra.sweeper; the objective is sweep.metric. None defines a trial."""

    num_trials: int = ranged(MISSING, low=1)  # in all, over all invocations
    search: str = choice(MISSING, ("random", "tpe"))
    seed: int = ranged(0, low=0)  # seed of the proposals; not the trials' own
    scheduler: str = choice("none", ("none", "asha"))  # asha: stop early what lags behind
    grace_epochs: int = ranged(1, low=1)  # asha: the first rung; no trial is stopped before it
    reduction_factor: float = ranged(3.0, above=1)  # asha: about 1 trial in so many continues beyond a rung


@dataclass(kw_only=True)
class Config:
    """A whole run. `conf/config.yaml` names the group files that fill it."""

    seed: int = ranged(0, low=0, high=2**32 - 1)
    resume: str = choice("auto", ("auto", "must", "never"))  # must, never: whether run.name must, or mustn't, exist
    resume_from: str | None = None  # a run directory or a checkpoint, whose weights a new run starts from
    plugins: list[str] = field(default_factory=list)  # modules of yours to import: models, sources, states
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
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)  # {name: arguments} of hooks of your own
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
    """Return the directory of the YAML groups: inside the package when installed, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
