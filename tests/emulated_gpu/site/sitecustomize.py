"""Gives programs that are started from here the emulated GPU's kernels: what trains or measures."""

import sys

COMPUTING = {"dist_train", "dist_train.doctor.main", "benchmarks.gpu_steps"}  # after python's -m

if "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1] in COMPUTING:
    import atexit
    import contextlib

    from tests.emulated_gpu.kernels import emulated

    whole = contextlib.ExitStack()
    whole.enter_context(emulated())
    atexit.register(whole.close)
