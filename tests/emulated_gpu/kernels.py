"""What the kernels of the emulated GPU compute, computed on the CPU in the device's own memory.

Everything of torch but its kernels is the real thing: the CUDA tensors, the caching allocators and
their errors, streams, events and futures, autograd's thread of the device, DDP's reducer,
GradScaler. Not emulated are a kernel's own rounding, cuDNN, races between streams, and time.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.emulated_gpu.arrivals import Arrivals
from tests.emulated_gpu.build import RUNTIME, built
from tests.emulated_gpu.copying import on_device, on_host, send
from tests.emulated_gpu.nccl import Collectives, stands_for_nccl

# Operators that start no kernel: the device's own implementation runs.
OWN = {
    "_has_compatible_shallow_copy_type",
    "_local_scalar_dense",
    "_pin_memory",
    "_reshape_alias",
    "_resize_output_",
    "dim",
    "empty",
    "empty_like",
    "empty_strided",
    "is_pinned",
    "is_same_size",
    "new_empty",
    "new_empty_strided",
    "pin_memory",
    "record_stream",
    "resize_",
    "set_",
    "size",
    "stride",
}
# Operators that take a number as a 0-d tensor of the CPU beside tensors of the device; not these.
NO_NUMBERS = ("cat", "stack", "_fused", "_foreach_copy", "_amp_")
# Operators whose result's size the host waits for.
WAITING = {"nonzero", "masked_select", "_unique2", "equal", "repeat_interleave", "is_nonzero"}


class MixedDevicesError(RuntimeError):
    """A kernel was given tensors of the CPU and of a GPU."""


def counted(name: str) -> int:
    """Return one of the runtime's counters."""
    return _counter(name).value


def allow_pinned(num_bytes: int) -> None:
    """Let cudaHostAlloc give out no more than so much."""
    _counter("pinned_most").value = num_bytes


def allow_on_device(num_bytes: int) -> None:
    """Let a device have no more memory than so much."""
    _counter("device_most").value = num_bytes


def take_on_device(num_bytes: int) -> bool:
    """Take memory of the device that is not torch's, for good; says whether there was enough."""
    runtime, taken = ctypes.CDLL(str(built() / RUNTIME)), ctypes.c_void_p()
    return runtime.cudaMalloc(ctypes.byref(taken), ctypes.c_size_t(num_bytes)) == 0


@contextlib.contextmanager
def emulated() -> Iterator["Kernels"]:
    """Compute with the emulated GPU; gloo stands for NCCL.

    Raises:
        AssertionError: pinned memory was changed before the device had read it, a kernel did not
            come after the copy on another stream of what it reads, or nothing computes it.
    """
    collectives = Collectives()
    kernels = Kernels(collectives)
    run = threading.Thread.run

    def run_thread(thread: threading.Thread) -> None:
        with Kernels(collectives):  # a mode is one thread's
            run(thread)

    try:
        with (
            torch.backends.cudnn.flags(enabled=False),
            _without_filling(),
            stands_for_nccl(collectives),
            mock.patch.object(threading.Thread, "run", run_thread),
            kernels,
        ):
            yield kernels
            torch.cuda.synchronize()
    except BaseException:
        _taken("races")
        _taken("uncomputed")
        raise
    races, uncomputed = _taken("races"), _taken("uncomputed")
    early = kernels.arrivals.early
    assert early == 0, f"memory was used {early} times before its copy was waited for"
    assert races == 0, f"pinned memory was changed {races} times before the device had read it"
    assert uncomputed == 0, f"{uncomputed} kernels were started that nothing computes"


class Kernels(TorchDispatchMode):
    """Computes every operator on tensors of the device, on any thread that torch takes it to."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.launches = 0  # of kernels, as far as one operator on tensors is one
        self.hidden: list[str] = []  # operators that wait without torch's debug mode's telling
        self.arrivals = Arrivals()
        self._collectives = collectives

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch would import its compiler for it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        device = next((t.device for t in flat if t.is_cuda), None)
        asked = kwargs.get("device")
        to_device = asked is not None and torch.device(asked).type == "cuda"
        if func.namespace != "aten" or (device is None and not to_device):
            return func(*args, **kwargs)
        if self._collectives.unfinished and not _is_view(func):
            self._collectives.finish(flat)
        if name in OWN:
            return func(*args, **kwargs)
        if name == "_to_copy":
            return self._to_copy(func, args[0], kwargs)
        if name == "copy_" and args[0].device != args[1].device:
            later = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            return self._copy(args[0], args[1], later=bool(later))
        if device is not None and _is_view(func):
            return func(*args, **kwargs)
        if device is not None:
            self._check_devices(name, flat)
            self.arrivals.check(flat)
            if name in WAITING or _by_mask(name, args):
                torch.cuda.current_stream().synchronize()
                self.hidden.append(name)
        if to_device:
            device = torch.device(str(asked))
        assert device is not None
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return self._compute(func, args, kwargs, device)

    def _compute(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """Run the CPU's kernel in the device's memory."""
        self.launches += _launches(func, args)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        hosts: dict[int, tuple[Tensor, Tensor]] = {}

        def down(tensor: Tensor) -> Tensor:
            if not tensor.is_cuda:
                return tensor
            if id(tensor) not in hosts:
                hosts[id(tensor)] = (on_host(tensor), tensor)
            return hosts[id(tensor)][0]

        out = func(*tree_map_only(Tensor, down, args), **tree_map_only(Tensor, down, kwargs))
        given = {id(host): tensor for host, tensor in hosts.values()}

        def up(tensor: Tensor) -> Tensor:
            return given[id(tensor)] if id(tensor) in given else on_device(tensor, device)

        return tree_map_only(Tensor, up, out)

    def _check_devices(self, name: str, flat: list[Tensor]) -> None:
        others = [t for t in flat if not t.is_cuda]
        if len({t.device for t in flat if t.is_cuda}) > 1:
            raise MixedDevicesError(f"{name}: tensors are on {[str(t.device) for t in flat]}")
        if not any(t.dim() or name.startswith(NO_NUMBERS) for t in others):
            return
        if not name.startswith("index"):
            raise MixedDevicesError(f"{name}: tensors are on {[str(t.device) for t in flat]}")
        self.hidden.append("an index on the CPU")  # torch takes it to the device, and waits

    def _to_copy(self, func: Any, source: Tensor, kwargs: Any) -> Tensor:
        device = torch.device(kwargs.get("device") or source.device)
        dtype, later = kwargs.get("dtype") or source.dtype, bool(kwargs.get("non_blocking"))
        options = {k: kwargs[k] for k in ("dtype", "memory_format") if kwargs.get(k) is not None}
        if source.is_cuda and device.type == "cuda":
            self.launches += 1
            return on_device(func(on_host(source), **options), source.device)
        like = func(source.to("meta"), **options)
        made = torch.empty_strided(
            like.size(),
            like.stride(),
            dtype=dtype,
            device=device,
            pin_memory=later and device.type == "cpu",
        )
        return self._copy(made, source, later=later)

    def _copy(self, target: Tensor, source: Tensor, *, later: bool) -> Tensor:
        send(target, source.expand_as(target), later=later)
        if target.is_cuda:
            self.arrivals.note(target)
        return target


@contextlib.contextmanager
def _without_filling() -> Iterator[None]:
    """Let deterministic algorithms leave empty tensors as they are.

    torch starts the kernel that would fill them below its dispatcher.
    """
    settings: Any = torch.utils.deterministic  # a module with properties
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


def _counter(name: str) -> ctypes.c_long:
    return ctypes.c_long.in_dll(ctypes.CDLL(str(built() / RUNTIME)), f"emulated_{name}")


def _taken(name: str) -> int:
    """Return a counter, which begins anew."""
    counter = _counter(name)
    value, counter.value = counter.value, 0
    return value


def _is_view(func: Any) -> bool:
    infos = [result.alias_info for result in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _by_mask(name: str, args: Any) -> bool:
    """Say whether an operator takes elements by a mask, whose ones are counted first."""
    if not name.startswith("index") or len(args) < 2 or not isinstance(args[1], list | tuple):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _launches(func: Any, args: Any) -> int:
    """Return how many kernels an operator starts: on lists one, or one for each tensor.

    As can_use_fast_route of aten/src/ATen/native/ForeachUtils.h says; a copy may change the type.
    """
    if "_foreach_" not in func._schema.name:
        return 1
    lists = [arg for arg in args if isinstance(arg, list) and isinstance(arg[0], Tensor)]
    copies = "_foreach_copy" in func._schema.name
    together = lists if copies else [[tensor for tensors in lists for tensor in tensors]]
    one_type = all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in together)
    alike = all(len({t.stride() for t in same}) == 1 for same in zip(*lists, strict=True))
    return 1 if one_type and alike else len(lists[0])
