"""Lets the C library keep freed memory instead of giving it back to the system at once."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's parameters, from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc, for the rest of this process, to serve large tensors from memory that it keeps.

    It maps tensors above 32 MB anew each time and hands freed ones back, so that a training step spends a fifth of its
    time on the CPU in page faults: the system clears every page of logits and gradients, each step again. Kept, they
    are cleared once. The price: the process does not shrink below the most it held, plus what lies between pieces in
    use. A choice for a program that trains or serves, not for a library to make: nothing here calls it on import.

    Returns whether it could be told: False without glibc (musl, macOS, Windows), where nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # No mapping of its own for any tensor; no trimming of the heap's end (-1 is the greatest threshold).
    told = [library.mallopt(_MMAP_MAX, 0), library.mallopt(_TRIM_THRESHOLD, -1)]
    return all(each == 1 for each in told)
