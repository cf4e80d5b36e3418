"""All rows of the campaign, in the order of its table."""

from benchmarks.reliability import (
    rows_cable,
    rows_checkpoint,
    rows_crafted,
    rows_crash,
    rows_data,
    rows_disk,
    rows_flips,
    rows_folder,
    rows_hangs,
    rows_limits,
    rows_memory,
    rows_network,
    rows_numerics,
    rows_paths,
    rows_safety,
    rows_slurm,
    rows_stop,
    rows_storm,
    rows_users,
    rows_wandb,
)
from benchmarks.reliability.row import Row

GROUPS = "RPJHSNDOCWXUL"


def _place(row: Row) -> tuple[int, int]:
    return GROUPS.index(row.id[0]), int(row.id[1:])


ROWS: tuple[Row, ...] = tuple(
    sorted(
        (
            *rows_cable.ROWS,
            *rows_checkpoint.ROWS,
            *rows_crafted.ROWS,
            *rows_crash.ROWS,
            *rows_data.ROWS,
            *rows_disk.ROWS,
            *rows_flips.ROWS,
            *rows_folder.ROWS,
            *rows_hangs.ROWS,
            *rows_limits.ROWS,
            *rows_memory.ROWS,
            *rows_network.ROWS,
            *rows_numerics.ROWS,
            *rows_paths.ROWS,
            *rows_safety.ROWS,
            *rows_slurm.ROWS,
            *rows_stop.ROWS,
            *rows_storm.ROWS,
            *rows_users.ROWS,
            *rows_wandb.ROWS,
        ),
        key=_place,
    )
)


def rows_named(words: list[str]) -> list[Row]:
    """Return the rows of these ids; all without any.

    Raises:
        ValueError: no such row; names those that are.
    """
    known = {row.id: row for row in ROWS}
    missing = [word for word in words if word not in known]
    if missing:
        raise ValueError(f"no row {', '.join(missing)}: choose from {', '.join(known)}")
    return [known[word] for word in words] if words else list(ROWS)
