"""What torch says of itself and its GPUs, and rank 0's store. Importing this imports torch."""

import os
from datetime import timedelta

import torch
import torch.cuda.nccl
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from dist_train.device import threads_of
from dist_train.doctor.deadline import within
from dist_train.layout import Layout

TIMEOUT_SEC = 10.0


def versions() -> dict[str, str]:
    """Return the versions of torch, and of the CUDA and NCCL that it was built with."""
    cuda = torch.version.cuda or ""
    nccl = ""
    if cuda and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"torch": torch.__version__, "cuda": cuda, "nccl": nccl}


def gpus() -> tuple[list[str], str]:
    """Return the unique names of the visible GPUs, and the model of the first."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [str(getattr(gpu, "uuid", number)) for number, gpu in enumerate(found)]
    return names, found[0].name if found else ""


def use_threads(layout: Layout) -> None:
    """Compute with as many threads as a training would."""
    torch.set_num_threads(threads_of(None, layout, os.environ))


def serve_store(layout: Layout) -> Store:
    """Listen at rank 0's port for the other ranks. Raises RuntimeError if it is taken."""
    store = TCPStore(
        "127.0.0.1",  # of rank 0 itself; its server listens at every address
        layout.master_port,
        world_size=None,
        is_master=True,
        timeout=timedelta(seconds=TIMEOUT_SEC),
        wait_for_workers=False,
    )
    return _of_this_attempt(store, layout)


def join_store(layout: Layout) -> Store:
    """Return rank 0's store. Raises RuntimeError if whoever listens there is none."""
    store = within(
        TIMEOUT_SEC + 1,  # its own timeout does not count where nobody answers
        lambda: TCPStore(
            layout.master_addr,
            layout.master_port,
            world_size=None,
            is_master=False,
            timeout=timedelta(seconds=TIMEOUT_SEC),
            wait_for_workers=False,
        ),
    )
    return _of_this_attempt(store, layout)


def _of_this_attempt(store: Store, layout: Layout) -> Store:
    """Return the store under a prefix: torchrun's holds the words of earlier ranks."""
    return PrefixStore(f"doctor_{layout.attempt}", store)
