"""API keys: where they come from, and how one is compared."""

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

from dvpo.errors import InputError

VARIABLE = "DVPO_API_KEYS"


def load_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of a file (one a line, # begins a comment), else of the environment variable (commas between them).

    Raises InputError: the file cannot be read, there is no key in what was given, or a key has a space or a character
    that a header cannot carry.
    """
    if file is not None:
        origin = str(file)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: the API keys cannot be read ({error}); name a text file") from error
        keys = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    elif VARIABLE in environment:
        origin = VARIABLE
        keys = [key.strip() for key in environment[VARIABLE].split(",")]
    else:
        return ()
    keys = [key for key in keys if key]
    if not keys:
        raise InputError(f"{origin}: there is no API key in it; put one a line (a file) or between commas")
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{origin}: key {number} has a space or a character outside ASCII; use letters and digits")
    return tuple(keys)


def allows(keys: Sequence[str], authorization: str | None) -> bool:
    """Whether a header `Authorization: Bearer KEY` names one of the keys, or there are none.

    `Basic` with a key as the password is taken too: that is what a browser sends after asking its user. The time
    taken does not depend on which key it is or how much of it is right.
    """
    if not keys:
        return True
    scheme, _, value = (authorization or "").partition(" ")
    given = value.strip().encode("utf-8", "replace")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            given = b""
    elif scheme.lower() != "bearer":
        given = b""
    found = False
    for key in keys:
        found |= hmac.compare_digest(key.encode(), given)
    return found


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
