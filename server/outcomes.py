"""What the engine says: of a request, of a batch, of itself, and why it scores nothing."""

from dataclasses import dataclass

from server.backends import Scored


class Overloaded(RuntimeError):
    """The queue is full: nothing was taken. `retry_after_seconds` is when it should have emptied, a whole number."""

    def __init__(self, waiting_tokens: int, retry_after_seconds: int) -> None:
        super().__init__(f"{waiting_tokens} tokens wait to be scored; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class Unavailable(RuntimeError):
    """No fault of the text: the engine stops, its worker died or hangs, or the model failed. The message says which."""


@dataclass(frozen=True)
class Reply:
    """The values of a request's texts in order, and where its time went.

    `inference_seconds` is the time of the batches that its texts were in, added up; `queue_seconds` is the rest.
    """

    scored: list[Scored]
    queue_seconds: float
    inference_seconds: float


@dataclass(frozen=True)
class BatchReport:
    """One batch as run, failed or not.

    tokens counts prompt and response of every text; cached_tokens those prompt tokens that were not computed; fill is
    the share of the token budget that was used (a text longer than the budget gives more than 1).
    """

    items: int
    tokens: int
    cached_tokens: int
    fill: float
    seconds: float
    failed: bool


@dataclass(frozen=True)
class Stats:
    """The engine at this moment. `tokens_per_second` is a running mean over recent batches, 0 before the first.

    `accepting` false is for good. `failing` passes: work is taken, but the model failed on the last text moments ago.
    """

    waiting_items: int
    waiting_tokens: int
    running_items: int
    tokens_per_second: float
    accepting: bool
    failing: bool
