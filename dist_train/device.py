"""This rank's device, threads and determinism; refuses what the device cannot do."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import VERDICT_VARIABLE
from dist_train.layout import Layout

# Values of ONEDNN_MAX_CPU_ISA: https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
WITHOUT_BF16 = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)
WITHOUT_AMX = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")


def bind_device(config: Config, layout: Layout) -> tuple[torch.device, str]:
    """Return this rank's device and the name that is unique to it on the host.

    A launcher may show each rank GPUs of its own, which count from 0 again: the one that is visible
    is taken, whatever the rank. By the names rank 0 sees if that makes two ranks share one.
    """
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if gpus == 0:
        if config.device == "cuda":
            raise ConfigError(
                "device=cuda, but torch sees no GPU: install a driver and a CUDA build of torch, "
                "or set device=cpu"
            )
        return torch.device("cpu"), "cpu"
    index = layout.local_rank
    if gpus == 1 or layout.launcher == "slurm":  # --gpus-per-task
        index %= gpus
    if index >= gpus:
        raise ConfigError(
            f"local rank {layout.local_rank} has no GPU: {gpus} visible, "
            f"{layout.local_world_size} processes on this node: start at most {gpus} "
            "(--nproc-per-node), or set device=cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    if config.parallel.numa_binding:
        _bind_numa(properties)
    return device, str(getattr(properties, "uuid", None) or _bus_place(properties))


def _bus_place(properties: Any) -> str:
    domain, bus = properties.pci_domain_id, properties.pci_bus_id
    return f"{domain:04x}:{bus:02x}:{properties.pci_device_id:02x}"


def _bind_numa(properties: Any) -> None:
    """Run this process on the cores of its GPU's NUMA node (Linux sysfs)."""
    try:
        with open(f"/sys/bus/pci/devices/{_bus_place(properties)}.0/local_cpulist") as file:
            ranges = [part.split("-") for part in file.read().strip().split(",") if part]
    except OSError as error:
        raise ConfigError(
            f"parallel.numa_binding=true, but the GPU's cores cannot be read: {error}"
        ) from None
    cores = {c for r in ranges for c in range(int(r[0]), int(r[-1]) + 1)}
    usable = cores & os.sched_getaffinity(0)
    if usable:
        os.sched_setaffinity(0, usable)


def check_precision(config: Config, device: torch.device) -> None:
    """Raise ConfigError if the device cannot compute what the configuration asks for."""
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision=fp16 needs a GPU: on a CPU use precision=bf16 or fp32")
    if config.parallel.sync_batchnorm and device.type == "cpu":
        raise ConfigError(
            "parallel.sync_batchnorm=true needs GPUs: torch's SyncBatchNorm refuses CPU tensors"
        )
    if config.precision == "bf16" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ConfigError(
                f"precision=bf16 needs a GPU of compute capability 8.0 or newer, this one is "
                f"{major}.{minor}: use precision=fp16"
            )


def set_determinism(config: Config) -> None:
    """Choose deterministic algorithms, or fast ones, before any handle or communicator is made."""
    exact = config.deterministic or config.train.order == "fixed"
    if exact:
        # Read by cuBLAS when its handle is made, by NCCL when a communicator is.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")
    if config.model.compile:  # the compiler is told, too
        torch.use_deterministic_algorithms(exact)
    else:  # the same without importing the compiler, more than a second of every start
        torch.set_deterministic_debug_mode("error" if exact else "default")
    torch.backends.cudnn.benchmark = not exact
    # torch would fill every tensor that is made empty, with a kernel more for each of a step's;
    # nothing here reads one before it is written.
    settings: Any = torch.utils.deterministic  # a module with properties
    settings.fill_uninitialized_memory = False


def leave_errors_to_python(config: Config) -> None:
    """Let a broken GPU be told by Python's traceback alone; a user's own setting stays.

    torch's thread beside NCCL sees the same CUDA error, throws it and so aborts the process, maybe
    before the cause is written down. Without that it does not end a rank either whose collective
    takes too long, which is left to the monitor. By torch's sources; measured on no GPU.
    """
    if config.guards.watchdog:
        os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")


def threads_asked(config: Config) -> int | None:
    """Return the number of threads that the configuration asks for: fixed order needs one."""
    return 1 if config.train.order == "fixed" else config.threads


def threads_of(asked: int | None, layout: Layout, env: Mapping[str, str]) -> int:
    """Return the number of threads of this rank: the key, else OMP_NUM_THREADS, else a fair share.

    torchrun sets OMP_NUM_THREADS=1 by itself when it starts several ranks; that 1 is not a wish.
    Under `dist-train run`, which sets the fair share before torchrun can, it is one.
    """
    if asked is not None:
        return asked
    set_by_user = env.get("OMP_NUM_THREADS", "")
    bare = layout.launcher == "torchrun" and VERDICT_VARIABLE not in env
    by_torchrun = bare and layout.local_world_size > 1
    if set_by_user.isdigit() and not (set_by_user == "1" and by_torchrun):
        return max(1, int(set_by_user))
    return max(1, len(os.sched_getaffinity(0)) // layout.local_world_size)


def has_amx() -> bool:
    """Say whether this CPU has units that multiply matrices of bf16 (Intel's AMX), and may."""
    capped = _onednn_cap() in WITHOUT_BF16 + WITHOUT_AMX
    return not capped and _cpu_has("amx_bf16", lambda: torch.cpu._is_amx_tile_supported())


def multiplies_bf16() -> bool:
    """Say whether this CPU multiplies bf16 numbers itself, by AMX or AVX-512's instructions.

    oneDNN says that it supports bf16 on any CPU with AVX-512: without these it emulates them.
    """
    if _onednn_cap() in WITHOUT_BF16:
        return False
    return has_amx() or _cpu_has("avx512_bf16", lambda: torch.cpu._is_avx512_bf16_supported())


def arm_multiplies_bf16() -> bool:
    """Say whether this is an ARM CPU with instructions that multiply bf16 numbers."""
    return _cpu_has("bf16", lambda: False)  # only ARM has this key


@cache
def _onednn_cap() -> str:
    """Return the newest instructions that oneDNN may use here, as its user says; "": all."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


def _cpu_has(capability: str, ask_older_torch: Callable[[], bool]) -> bool:
    known = getattr(torch.cpu, "get_capabilities", None)  # newer than torch 2.11
    if known is None:
        return ask_older_torch()
    return bool(known().get(capability, False))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the kernel; elsewhere do nothing.

    A training step on the CPU frees and takes the same large tensors again and again, and every
    fresh page costs a fault: 22 % of the images/s of a narrow ResNet-9 (benchmarks/RESULTS.md).
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h; man 3 mallopt
    with contextlib.suppress(OSError, AttributeError):  # musl and macOS have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
