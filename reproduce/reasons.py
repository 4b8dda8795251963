"""What is said of work that failed by an error that nobody foresaw."""

import shutil
from pathlib import Path

_WRITING_FAILED = ("iostream error", "inline_container.cc", "PytorchStreamWriter", "file write failed")
"""What torch says instead of the system's own error."""


def not_written(error: BaseException) -> bool:
    """Whether torch could not write a file."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WRITING_FAILED)


def reason(error: Exception, folder: Path) -> str:
    """The first line of an error; what torch says where a file below `folder` could not be written is said in words."""
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    if not_written(error):
        free = shutil.disk_usage(folder).free / 2**20
        return f"No space left on the device, or it cannot be written ({free:.1f} MB are free in {folder}); {said}"
    return said
