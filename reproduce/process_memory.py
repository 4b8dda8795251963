"""This process's main memory as Linux counts it. (getrusage's peak would count the parent's in, through exec.)"""

from pathlib import Path


def resident_bytes() -> int:
    """What it holds now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that it held since `reset_peak`, or since its start."""
    return _status("VmHWM")


def reset_peak() -> None:
    """The peak starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
