"""What a judge is told: named parts, each a list of chat messages with fields such as {question} in them.

Another text comes from a YAML file of the same parts:

    turn_1:
    - {role: system, content: "..."}
    - {role: user, content: "... {question} ... {answer} ..."}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dvpo.data.records import Message
from dvpo.errors import InputError
from dvpo.files import sha256_json

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class JudgePrompt:
    """parts: {name: messages}. fields: {name: the fields that the part must hold}."""

    parts: Mapping[str, tuple[Message, ...]]
    fields: Mapping[str, tuple[str, ...]]

    @property
    def sha256(self) -> str:
        """Digest of every part: two prompts of one digest ask the same."""
        return sha256_json({name: list(messages) for name, messages in self.parts.items()})

    def messages(self, part: str, **values: str) -> tuple[Message, ...]:
        """The part with its fields filled in. A field's name inside a value is left alone."""
        pattern = re.compile("{(" + "|".join(self.fields[part] or ["(?!)"]) + ")}")
        return tuple(
            {"role": m["role"], "content": pattern.sub(lambda found: values[found[1]], m["content"])}
            for m in self.parts[part]
        )

    def read(self, path: Path) -> "JudgePrompt":
        """The prompt of a YAML file that has this one's parts and fields. Raises InputError where it has not."""
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(
                f"{path}: no judge's prompt could be read ({error}); give a YAML file of its parts"
            ) from error
        if not isinstance(loaded, dict) or set(loaded) != set(self.parts):
            raise InputError(f"{path}: the judge's prompt must have exactly the parts {', '.join(self.parts)}")
        return JudgePrompt({name: self._part(path, name, loaded[name]) for name in self.parts}, self.fields)

    def _part(self, path: Path, name: str, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, list) or not value or not all(map(_is_message, value)):
            raise InputError(
                f"{path}: part {name} must be a list of messages, each with a role ({', '.join(_ROLES)}) and a content"
            )
        text = "".join(message["content"] for message in value)
        if lacking := [field for field in self.fields[name] if f"{{{field}}}" not in text]:
            raise InputError(f"{path}: part {name} lacks the field {{{lacking[0]}}}; put it where its text belongs")
        return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and value["role"] in _ROLES
        and isinstance(value["content"], str)
    )


def chat(system: str, user: str) -> tuple[Message, ...]:
    """A system message and a user's."""
    return {"role": "system", "content": system.strip()}, {"role": "user", "content": user.strip()}
