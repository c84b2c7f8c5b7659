"""Settings of the C library's allocator that keep a CPU training step from faulting its pages in anew."""

import ctypes
import sys

# Parameter numbers of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc's malloc reuse freed memory instead of returning it to the kernel; True where it took.

    By default a freed buffer of more than 32 MiB, or the free end of the heap, is unmapped, and the next
    buffer of that size is faulted in page by page: a sixth of the step of a model with large logits,
    some percent otherwise. Call it before the first large allocation. The process then keeps its peak
    memory until it ends. Elsewhere than on Linux with glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return False
    settings = {_M_MMAP_THRESHOLD: _LARGEST, _M_TRIM_THRESHOLD: _LARGEST, _M_TOP_PAD: 64 * 2**20}
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings.items())
