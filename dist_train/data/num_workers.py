"""How many workers load a rank's images where data.num_workers=auto leaves it open."""

import os
import socket
from dataclasses import dataclass

from dist_train.cgroups import quota_cores
from dist_train.config import Config
from dist_train.distributed import Ranks
from dist_train.memory import host_memory_left

MOST = 16  # of a rank; more of them seldom gain, and each evaluation starts them anew
MEMORY_SHARE = 0.5  # of what the machine has left: for the workers of all its ranks
OWN_BYTES = 64 << 20  # of a worker beside its data set and batches: what it writes to after a fork
BATCHES = 3  # of a worker at once: torch asks for two ahead, and one is being made


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeShare:
    """What a rank may use of its machine."""

    cores: float
    memory_bytes: float
    batch_size: int  # images that a worker puts together at once

    def num_workers(self, *, data_set_bytes: int, image_bytes: int) -> int:
        """Return how many workers there are cores and memory for; one at least.

        Args:
            data_set_bytes: that each worker gets a copy of.
            image_bytes: of an image as workers send it.
        """
        each = OWN_BYTES + data_set_bytes + BATCHES * self.batch_size * image_bytes
        return max(1, min(int(self.cores), int(self.memory_bytes / each), MOST))


def share_of_node(ranks: Ranks, config: Config) -> NodeShare:
    """Return this rank's share of its machine: of the cores of all its ranks together. Collective.

    SLURM and NUMA binding deal the cores out to the ranks, torchrun lets each have all of them.
    """
    mine = os.sched_getaffinity(0)
    everyone = ranks.gather((socket.gethostname(), mine))
    here = [cores for host, cores in everyone if host == everyone[ranks.rank][0]]
    cores = float(len(set.union(*here)))
    quota = quota_cores()
    if quota is not None:
        cores = min(cores, quota)
    return NodeShare(
        cores=cores / len(here),
        memory_bytes=MEMORY_SHARE * host_memory_left() / len(here),
        batch_size=max(
            -(-config.train.global_batch_size // ranks.world_size), config.data.eval_batch_size
        ),
    )
