"""A content-addressed folder of records: what was asked once is never asked again, and can be replayed offline.

A record is a JSON file named by the digest of what was asked, so two runs may share a folder, an interrupted run goes
on where it stopped, and nothing is ever seen half-written.
"""

import json
from pathlib import Path
from typing import Any

from dvpo.errors import StageError
from dvpo.files import sha256_json, write_json


class Archive:
    """Records below one folder, each FOLDER/ab/abcdef....json."""

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def key(question: Any) -> str:
        """The name of a record: the sha256 of what was asked, a JSON value."""
        return sha256_json(question)

    def path(self, key: str) -> Path:
        """Where the record of that key is, or would be."""
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The record; None where there is none. Raises StageError where its file is damaged."""
        path = self.path(key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StageError(f"{path}: the record cannot be read ({error}); remove it to have it made again") from error
        if not isinstance(record, dict) or Archive.key(record.get("asked")) != key:
            raise StageError(f"{path}: the record is not of what its name says; remove it to have it made again")
        return record

    def put(self, asked: Any, answer: dict[str, Any]) -> str:
        """Writes {"asked", **answer} under its key and returns the key; a record of that key is replaced."""
        key = self.key(asked)
        write_json(self.path(key), {"asked": asked, **answer})
        return key
