"""A run as `train` opens it, up to its first step, for the measurements that take steps of it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from dist_train.claim import open_run
from dist_train.config import Config
from dist_train.data.feed import Feed
from dist_train.data.loaders import open_data
from dist_train.distributed import Ranks
from dist_train.metrics import Meter
from dist_train.plan import make_plan
from dist_train.progress import Progress
from dist_train.run import Run
from dist_train.start import build_parts, open_feed
from dist_train.state import Parts
from dist_train.trial import throw_away_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What a step needs, and what a save needs besides."""

    run: Run
    parts: Parts
    feed: Feed  # endless
    meter: Meter
    progress: Progress


@contextlib.contextmanager
def opened(config: Config, ranks: Ranks) -> Iterator[Opened]:
    """Open a run in `config.run_dir`. Collective."""
    with open_run(config, ranks) as run:
        data = open_data(config, ranks)
        plan = make_plan(config, data.num_train, world_size=ranks.world_size)
        parts = build_parts(config, plan, data, run)
        meter = Meter(ranks, plan)
        progress = run.resume(parts, meter, data)
        throw_away_step(parts, data, step=0)
        feed = open_feed(parts, data, last_step=10**9)
        try:
            yield Opened(run=run, parts=parts, feed=feed, meter=meter, progress=progress)
        finally:
            parts.replica.close()
