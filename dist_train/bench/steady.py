"""When a series of step times has left its warm-up behind: found, not guessed."""

import statistics
from collections.abc import Sequence

LEAST = 20  # values before which nothing is said
OUTLIER = 3.0  # times the median: a pause of the machine is no warm-up


def warm_up_length(values: Sequence[float]) -> int | None:
    """Return how many of the first values belong to the warm-up; None: it is not over yet.

    The cut with the least standard error of what follows (MSER: White 1997, Simulation 69:323); one
    in the second half says that the series still moves.
    """
    if len(values) < LEAST:
        return None
    highest = OUTLIER * statistics.median(values)
    kept = [min(value, highest) for value in values]
    best, best_error = 0, float("inf")
    for cut in range(len(kept) - LEAST // 2):
        rest = kept[cut:]
        error = statistics.pvariance(rest) / len(rest)
        if error < best_error:
            best, best_error = cut, error
    return best if best <= len(kept) // 2 else None
