"""Splits of data: those a folder or the hub has, and the division by prompt, which keeps evaluations honest."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvpo.data.records import Example, Message
from dvpo.errors import InputError
from dvpo.files import sha256_json

_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")
# Branches such as main move, so they are no revision.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@(?!(?:main|master|HEAD)$)[\w./+-]+", re.ASCII)
_TOLERANCE = 1e-9
_PIECE = 60


def _stem(path: Path) -> str | None:
    """The file's name without its ending; None where it is not a data file."""
    return next((path.name.removesuffix(ending) for ending in _ENDINGS if path.name.endswith(ending)), None)


def data_files(path: Path, split: str | None) -> list[Path]:
    """The file itself, or a folder's data files: those whose name contains `split`, if one is given."""
    endings = ", ".join(_ENDINGS)
    if not path.is_dir():
        if _stem(path) is None:
            raise InputError(f"{path} is not a data file; its name must end in one of {endings}")
        if split is not None:
            raise InputError(f'{path} is one file and has no split "{split}"; leave the split out')
        return [path]
    named = {file: stem for file in sorted(path.iterdir()) if file.is_file() and (stem := _stem(file)) is not None}
    chosen = {file: stem for file, stem in named.items() if split is None or split in stem}
    if not chosen:
        wanted = "" if split is None else f' with "{split}" in their names (there: {listed(f.name for f in named)})'
        raise InputError(f"{path} has no data files ({endings}){wanted}; name another folder, file or split")
    # The same stem in two endings is one data set twice; a split's stems may differ only as shards do.
    ambiguous = len(set(chosen.values())) < len(chosen)
    if split is not None:
        ambiguous = ambiguous or len({_SHARD.sub("", stem) for stem in chosen.values()}) > 1
    if ambiguous:
        raise InputError(f"{path} is ambiguous: {listed(f.name for f in chosen)} all fit; name one file or its split")
    return list(chosen)


def listed(names: Iterable[str]) -> str:
    """Names in a row, for messages."""
    return ", ".join(names) or "none"


def is_hub_id(name: str) -> bool:
    """Whether `name` is owner/name@REV."""
    return _HUB_ID.fullmatch(name) is not None


def hub_rows(name: str, split: str | None) -> Iterator[Any]:
    """The rows of one split of the hub data set owner/name@REV; every failure is an `InputError`."""
    hub_id, _, revision = name.partition("@")
    try:
        import datasets

        loaded = datasets.load_dataset(hub_id, revision=revision, split=split)
        if isinstance(loaded, Mapping):
            if len(loaded) != 1:
                raise InputError(f"{name} has the splits {listed(map(str, loaded))}; name one of them")
            loaded = next(iter(loaded.values()))
        yield from loaded
    except InputError:
        raise
    except Exception as error:  # the library raises whatever its network, cache and builders raise
        where = name if split is None else f'{name} (split "{split}")'
        raise InputError(f"{where} cannot be loaded from the hub ({brief(error)}); give a local file") from error


def brief(error: Exception) -> str:
    """An error in one short line; a foreign one with its name, without which it often says nothing."""
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:200].rstrip(". ")


def prompt_key(prompt: tuple[Message, ...]) -> str:
    """Digest of a prompt's roles and texts that ignores case, white space and Unicode compatibility forms."""
    return sha256_json([[message["role"], _normalised(message["content"])] for message in prompt])


def _normalised(text: str) -> str:
    # Case folding can undo the normal form, hence NFKC on both sides of it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def split_by_prompt(examples: Sequence[Example], shares: dict[str, float], seed: int) -> dict[str, list[Example]]:
    """Divides examples into named splits, disjoint by `prompt_key` and each in the input's order.

    A prompt's split depends only on the seed, the shares and the prompt itself: adding rows never moves others.
    """
    if (
        not shares
        or not all(share >= 0 for share in shares.values())
        or not abs(sum(shares.values()) - 1) <= _TOLERANCE
    ):
        given = ", ".join(f"{name}={share}" for name, share in shares.items()) or "none"
        raise InputError(f"the split shares ({given}) do not sum to 1; give shares of at least 0 that do")
    splits: dict[str, list[Example]] = {name: [] for name in shares}
    for example in examples:
        splits[_assigned(prompt_key(example.prompt), shares, seed)].append(example)
    return splits


def _assigned(key: str, shares: dict[str, float], seed: int) -> str:
    point = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8]) / 2**64
    # By name, so that the order in which a configuration lists the shares does not matter.
    names = sorted(name for name, share in shares.items() if share > 0)
    reached = 0.0
    for name in names[:-1]:
        reached += shares[name]
        if point < reached:
            return name
    return names[-1]


def check_disjoint(splits: dict[str, list[Example]]) -> None:
    """Raises `InputError` where a prompt (by `prompt_key`) stands in two splits."""
    first: dict[str, tuple[str, Example]] = {}
    for name, examples in splits.items():
        for example in examples:
            other, earlier = first.setdefault(prompt_key(example.prompt), (name, example))
            if other != name:
                raise InputError(
                    f'the prompt "{_piece(example)}" stands in the splits "{other}" ({earlier.origin}) '
                    f'and "{name}" ({example.origin}); remove it from one of them'
                )


def _piece(example: Example) -> str:
    text = " ".join(example.prompt[-1]["content"].split())
    return text if len(text) <= _PIECE else text[:_PIECE] + "..."
