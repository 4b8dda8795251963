"""Small jobs for measured processes."""

import os
import time

from dvpo.errors import InputError
from reproduce.bench.common import Turns


def counting(turns: Turns, log: str, name: str) -> None:
    """Notes each of its turns in a file, and reports how many it has had."""
    turns.begin()
    for number in range(100):
        with open(log, "a") as file:
            file.write(name)
        turns.end(number=number)


def holding(turns: Turns, megabytes: int) -> None:
    """Holds so much memory for a moment in every turn."""
    turns.begin()
    while True:
        held = bytearray(megabytes * 2**20)
        del held  # the peak stays
        time.sleep(0.05)
        turns.end()


def failing(turns: Turns) -> None:
    turns.begin()
    raise InputError("the data is bad; mend it")


def dying(turns: Turns) -> None:
    turns.begin()
    os._exit(9)
