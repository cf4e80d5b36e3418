"""Configuration: schema, composition from YAML and the command line, checks. Imports no torch."""

from dist_train.config.schema import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    GuardConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    TrackingConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProfileConfig",
    "TrackingConfig",
    "TrainConfig",
    "WandbConfig",
]
