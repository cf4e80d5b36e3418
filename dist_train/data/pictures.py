"""Pictures in memory, and their channels. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from dist_train.config.schema import ConfigError, DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """One split, decoded, all pictures of one size."""

    images: np.ndarray  # (num, height, width, channels), uint8; may be a read-only memmap
    labels: np.ndarray  # (num,), int64

    def __len__(self) -> int:
        return len(self.images)


def check_channels(config: DataConfig, channels: int) -> None:
    """Raise ConfigError if data.mean is for another number of channels; one value is for all."""
    if config.mean is not None and len(config.mean) not in (1, channels):
        raise ConfigError(
            f"data.mean has {len(config.mean)} values, the images have {channels} channels: give "
            "data.mean and data.std as many values as there are channels, or one for all"
        )
