"""Freed main memory goes back to the system. glibc keeps it: in holes that what comes next may not fit into."""

import ctypes
import gc


def give_back(*, after_loading: bool = False) -> None:
    """Hands back the pages that nothing stands in; does nothing where the C library has no `malloc_trim`.

    after_loading: a model was loaded and changed; the file's pages go with the last tensor that stands in them, which
    may be part of a cycle.
    """
    if after_loading:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
