"""Memory of large tensors on a CPU: kept by the process between the passes of a network."""

import ctypes
import os

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, where networks run on a CPU; returns whether it does.

    By default glibc gives the memory of every large tensor back to the system, which hands it out again in the next
    layer, page by page and cleared: a tenth of the time of a training step. The peak stays the same, as the memory of
    one pass is that of the next. Other C libraries have no such switch; who has set glibc's own environment variables
    has decided.
    """
    if torch.accelerator.is_available() or any(name in os.environ for name in _ENVIRONMENT):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # The second value is what older versions of glibc allow at most.
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and any(mallopt(_MMAP_THRESHOLD, n) for n in (2**31 - 1, 2**25))
