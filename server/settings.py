"""What an operator may set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and keys of one server.

    api_keys: any of them opens every route; none at all means that no key is asked for.
    max_body_bytes: of one request. All requests in flight together may hold `body_bytes_in_flight`.
    max_items: texts in one request.
    reward: which aggregate `/get_reward` and `/reward` answer with.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_items: int = 1024
    reward: str = "last"

    @property
    def body_bytes_in_flight(self) -> int:
        """What the bodies of all requests in flight may hold together; bounds memory."""
        return 16 * self.max_body_bytes
