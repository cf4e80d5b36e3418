"""Distributed training for multi-GPU clusters; `from dist_train.train import train` starts."""

__version__ = "0.1.0"
