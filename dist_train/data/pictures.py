"""Pictures in memory. Imports no torch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """One split, decoded, all pictures of one size."""

    images: np.ndarray  # (num, height, width, channels), uint8; may be a read-only memmap
    labels: np.ndarray  # (num,), int64

    def __len__(self) -> int:
        return len(self.images)
