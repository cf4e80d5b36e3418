"""One cluster for each pytest process.

Without the means for one the tests do not run, and say why; in continuous integration that is an
error.
"""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running_cluster, why_not


@pytest.fixture(scope="session")
def slurm_is_here() -> None:
    reason = why_not()
    if reason is not None and os.environ.get("CI"):
        pytest.fail(f"no SLURM cluster can be started: {reason}")
    if reason is not None:
        pytest.skip(f"no SLURM cluster can be started: {reason}")


@pytest.fixture(scope="session")
def started_cluster(slurm_is_here: None) -> Iterator[Cluster]:
    with running_cluster(cpus=2) as running:
        yield running


@pytest.fixture
def cluster(started_cluster: Cluster) -> Cluster:
    """A cluster without jobs, whatever the test before has left."""
    started_cluster.clear()
    return started_cluster
