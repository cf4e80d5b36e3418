"""The settings of a run, as frozen dataclasses: the one list of keys, types and defaults.

Imports no torch: the launcher reads it on a login node.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """The user's mistake: printed as one line."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, in which batches."""

    epochs: int | None = None
    steps: int | None = None  # wins over epochs
    max_minutes: float | None = None  # stop and save as if preempted after this long
    global_batch_size: int = 512  # samples a step, over all ranks
    # Largest that a rank forwards at once; None: its whole share; auto: what fits into memory.
    micro_batch_size: int | Literal["auto"] | None = None
    order: Literal["fast", "fixed"] = "fast"  # fixed: the same bits on any number of ranks
    num_shards: int = 8  # fixed order only: pieces of a global batch, a power of two
    drop_last: bool = True  # drop the remainder of an epoch smaller than the global batch
    early_stop_patience: int | None = None  # evaluations without a better validation accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network: `factory` is called with num_classes and `args`."""

    factory: str = "dist_train.models:resnet9"
    args: dict[str, Any] = field(default_factory=dict)
    activation_checkpointing: bool = False
    compile: bool = False  # by torch.compile: forward and backward, one graph for each shape
    # Of images, filters and feature maps. auto: channels_last where that was measured to gain.
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks share the work and find each other."""

    name: Literal["ddp"] = "ddp"
    # ddp: in buckets, while the backward still runs; flat: as one buffer, after it. auto: ddp on
    # GPUs, where a failure in a step can be taken back; what a run has begun with it goes on with.
    sync: Literal["auto", "ddp", "flat"] = "auto"
    find_unused_parameters: bool = False
    sync_batchnorm: bool = False
    start_timeout_sec: float = 1800.0  # until every rank has registered and taken its first step
    step_timeout_sec: float = 300.0  # for every collective after that
    numa_binding: bool = False  # bind each rank to the cores next to its GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which pictures, and what is done to them."""

    name: str = "auto"  # auto | cifar10 | image_folder | synthetic | package.module:callable
    root: str | None = None
    args: dict[str, Any] = field(default_factory=dict)  # for a callable of the user's own
    download: bool = True
    val_fraction: float = 0.1  # of the training pictures, split off by the seed; 0: none
    loader: Literal["auto", "memory", "workers"] = "auto"
    in_memory_gib: float = 4.0  # auto: larger data sets go through DataLoader workers
    cache_dir: str | None = None  # decoded pictures; None: ~/.cache/dist_train
    num_workers: int | Literal["auto"] = "auto"  # per rank, for loader=workers; auto: a core each
    image_size: int = 224  # side of the images that are resized and cropped
    # Which images are brought to image_size. auto: all, where they differ in size or an image_size
    # of your own is set that they do not all have; else none; needed: auto, an image_size of 224
    # being your own; always: all that go through workers.
    resize: Literal["auto", "needed", "always"] = "auto"
    # What training images get. auto: CIFAR-10 and generated images what the settings below say, any
    # other data what the command or the user's own files set of them, else nothing; standard: what
    # the settings say (images of many sizes: random-resized crop, and flip); none; or a list of
    # parts. The three after cutout hold wherever they are set, but with none.
    augment: (
        Literal["auto", "none", "standard"] | tuple[Literal["auto", "crop", "flip", "cutout"], ...]
    ) = "auto"
    crop_padding: int = 4  # random crop after reflection padding, pixels a side; 0: off
    # Left and right: each time by chance, or every picture in turns, the first time by chance.
    flip: bool | Literal["alternating"] = True
    cutout: int = 0  # side of the square set to the mean; 0: off
    randaugment: bool = False  # loader=workers only
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0
    mean: tuple[float, ...] | None = None  # per channel, 0..1; None: from the training pictures
    std: tuple[float, ...] | None = None
    eval_batch_size: int = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning rate as a function of the step."""

    name: Literal["sgd", "adamw", "muon"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-4
    # muon orthogonalises filters and matrices; these are for the rest: head, norms, biases.
    rest_lr: float | None = None  # None: lr
    rest_momentum: float | None = None  # None: momentum
    orthogonal_steps: int = 5  # muon: of the iteration; the records on CIFAR-10 take 3
    unit_filters: bool = False  # muon: filters keep one norm, where a normalisation follows them
    decay_norms_and_biases: bool = False
    schedule: Literal["cosine", "linear", "one_cycle", "constant"] = "cosine"
    warmup_steps: int | None = None  # wins over warmup_epochs
    warmup_epochs: float = 0.0
    final_lr_fraction: float = 0.0
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"  # with global_batch_size
    lr_base_batch_size: int = 256  # the batch that lr is meant for, if scaled
    clip_norm: float | None = None  # global gradient norm
    label_smoothing: float = 0.0
    ema_decay: float | None = None  # average of the weights, updated every step


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """When to evaluate (on the validation split; on the test split if there is none)."""

    every_epochs: int | None = 1
    every_steps: int | None = None  # wins over every_epochs
    # The last evaluation also averages over views: mirrored, and moved by a pixel. Told apart.
    views: Literal[1, 2, 6] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    # None: at every epoch's end; auto: from the cost of a save and the failures to expect
    every_steps: int | Literal["auto"] | None = None
    mtbf_hours: float | None = None  # mean time between failures, for auto; None: from the ranks
    keep_last: int = 2
    keep_best: bool = True
    exact_steps: bool = False  # wait for a save under way rather than put the next one off


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What to do about steps that go wrong, and ranks that hang."""

    max_consecutive: int = 10  # skipped steps in a row before the run goes back
    max_rollbacks: int = 1  # times that a diverging run goes back to its last checkpoint
    rollback_lr_factor: float = 0.5  # on the learning rate, each time
    drift_every: int = 100  # steps between comparisons of the ranks' weights
    loss_spike: float = 3.0  # report a mean loss this many times the recent median
    lag: Literal[0, 1] = 0  # 1: skip on the device and read the verdict a step later
    watchdog: bool = True  # name a rank that hangs or is slow, and end one that hangs
    hang_sec: float = 5.0  # silence that is a hang, if ten median steps are not longer


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """A torch.profiler trace of steps [first, last)."""

    steps: tuple[int, int] | None = None
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases, on rank 0."""

    mode: Literal["auto", "online", "offline", "disabled"] = "disabled"
    project: str = "dist_train"
    entity: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    experiment: str = "custom"
    run_dir: str | None = None  # None: runs/<experiment>-<hash of what changes the result>
    resume: str = "auto"  # auto | never | path of a checkpoint
    resume_allow: tuple[str, ...] = ()  # hashed keys that a resume may change
    seed: int = 0
    deterministic: bool = False
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: bf16 where the hardware gains from it (GPUs from 8.0 on, AMX, AVX512-BF16), else fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    log_every: int = 20  # steps
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
