"""Memory of the host that a GPU copies from and to by itself, as far as there is any."""

import warnings

from torch import Tensor

from dist_train.memory import is_out_of_memory


def pinned(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in pinned memory; the tensor itself, and a warning, if none is left.

    CUDA says then what it says of the GPU's own memory, which smaller micro-batches would spare.
    A copy from or to other memory is the same, but the host waits for it.
    """
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        why = str(error).splitlines()[0]
    warnings.warn(
        f"no more host memory can be pinned ({why}): batches are copied through other memory, and "
        "the host waits for them. Leave the host more memory",
        RuntimeWarning,
        stacklevel=2,
    )
    return tensor
