"""What is said of a stage that failed."""

from pathlib import Path

import pytest
import torch

from reproduce.reasons import reason


def test_torchs_error_on_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(RuntimeError) as caught:
        torch.save({"weights": torch.zeros(1_000_000)}, "/dev/full")
    said = reason(caught.value, tmp_path)
    assert said.startswith("No space left on the device, or it cannot be written (") and "\n" not in said
    assert "MB are free in" in said and "RuntimeError: " in said


def test_another_error_is_said_as_it_is(tmp_path: Path) -> None:
    assert reason(RuntimeError("no such kernel\nand more"), tmp_path) == "RuntimeError: no such kernel"
    assert reason(OSError(28, "No space left on device"), tmp_path).endswith("No space left on device")
