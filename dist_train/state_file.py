"""What is inside a checkpoint's state.pt, found out without running any of it. Imports no torch.

torch.save writes a zip archive, stored and not compressed: `data.pkl`, a pickle, and `data/N`, the
bytes of each tensor. The pickle is read with stand-ins for the five or so names that it may use;
any other name, instruction or size is refused before torch sees the bytes.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoint_folder import BadCheckpointError

MAX_ENTRIES = 100_000
STORAGES = {  # name in torch: dtype, bytes an element
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
}
DTYPES = frozenset(dtype for dtype, _ in STORAGES.values())
# What torch.save needs for tensors, dicts, lists and plain values; GLOBAL is looked at by name.
OPCODES = (
    r"PROTO|STOP|MARK|EMPTY_(DICT|LIST|TUPLE)|TUPLE[123]?|APPENDS?|SETITEMS?|(LONG_)?BIN(PUT|GET)"
    r"|BINUNICODE|BININT[12]?|LONG1|BINFLOAT|NONE|NEWTRUE|NEWFALSE|GLOBAL|REDUCE|BINPERSID"
)
_RECORD = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment|data/[0-9]+)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorOutline:
    """A tensor's form, without its numbers."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return how many bytes its elements take."""
        width = next(size for dtype, size in STORAGES.values() if dtype == self.dtype)
        return math.prod(self.shape) * width


def outline(data: bytes) -> Any:
    """Return the state with a TensorOutline in each tensor's place; runs nothing in `data`.

    Raises:
        BadCheckpointError: it holds more than tensors and plain values, or sizes that are not so.
    """
    try:
        return _outline(data)
    except BadCheckpointError:
        raise
    except Exception as error:  # whatever zipfile and pickle meet in bytes of unknown origin
        raise _refused(f"{type(error).__name__}: {error}") from None


def _outline(data: bytes) -> Any:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise _refused("it is no zip archive as torch.save writes")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        _check_entries(entries, len(data))
        root = entries[0].filename.partition("/")[0]
        text = archive.read(f"{root}/data.pkl")
    _check_pickle(text)
    sizes = {e.filename.removeprefix(f"{root}/data/"): e.file_size for e in entries}
    reader = _Reader(io.BytesIO(text))
    reader.record_sizes = sizes
    state = reader.load()
    if not isinstance(state, dict):
        raise _refused(f"it holds a {type(state).__name__} where a run's state is a dictionary")
    return state


def _check_entries(entries: list[zipfile.ZipInfo], num_bytes: int) -> None:
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise _refused(f"its archive has {len(entries)} entries")
    if len({entry.filename for entry in entries}) != len(entries):
        raise _refused("its archive has two entries of one name")
    if len({entry.filename.partition("/")[0] for entry in entries}) != 1:
        raise _refused("its archive has entries outside its one folder")
    for entry in entries:
        if not _RECORD.fullmatch(entry.filename):
            raise _refused(f"its archive has an entry {entry.filename[:80]!r}")
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not stored or entry.compress_size != entry.file_size:
            raise _refused(f"entry {entry.filename[:80]!r} is compressed: torch.save never does so")
    total = sum(entry.file_size for entry in entries)
    if total > num_bytes:
        raise _refused(f"its entries claim {total} bytes, the file has {num_bytes}")


def _check_pickle(text: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(text):
        if not re.fullmatch(OPCODES, opcode.name):
            raise _refused(f"it uses the pickle instruction {opcode.name}")
        if isinstance(argument, int) and opcode.name == "LONG_BINPUT" and argument > len(text):
            raise _refused("its pickle asks for more places than it has bytes")


class _Storage:
    """Stands for torch.FloatStorage and its like."""

    def __init__(self, name: str) -> None:
        self.dtype, self.width = STORAGES[name]


def _tensor(
    storage: tuple[_Storage, int],
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    metadata: object = None,
) -> TensorOutline:
    """Stand for torch._utils._rebuild_tensor_v2."""
    kind, count = storage
    numbers = (offset, *size, *stride)
    plain = all(type(number) is int and number >= 0 for number in numbers)
    if not plain or len(size) != len(stride):
        raise _refused("a tensor's form makes no sense")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= count:
        raise _refused(f"a tensor of shape {list(size)} is larger than its bytes")
    if math.prod(size) > count:
        raise _refused(f"a tensor of shape {list(size)} repeats its {count} elements")
    return TensorOutline(dtype=kind.dtype, shape=tuple(size))


class _Reader(pickle.Unpickler):
    """Reads a pickle with stand-ins; nothing that it can reach does more than to hold values."""

    record_sizes: dict[str, int]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return _Storage(name)
        raise _refused(f"it asks for {module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> tuple[_Storage, int]:
        kind, storage, key, _location, count = pid
        if kind != "storage" or not isinstance(storage, _Storage) or type(count) is not int:
            raise _refused("a tensor's bytes are not described as torch.save does")
        size = self.record_sizes.get(str(key), -1)
        if count * storage.width != size:
            raise _refused(
                f"a tensor claims {count} elements of {storage.dtype}, its bytes are {size}"
            )
        return storage, count


def _refused(why: str) -> BadCheckpointError:
    return BadCheckpointError(f"the state holds more than tensors and plain values: {why}"[:300])
