"""Scores with transformers in this process. Prompts are computed once and kept: see `dvpo.packed_values`."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dvpo.data.templates import Encoded
from dvpo.errors import InputError, StageError
from dvpo.models import load_tokenizer
from dvpo.packed_parts import LEAST_PART, Cores
from dvpo.packed_row import Prefix
from dvpo.packed_values import Group, can_pack, packed_values
from dvpo.values import score_all, unwrapped
from server.backends import ModelInfo, Scored
from server.backends.cpu_decoder import pack_decoder
from server.backends.cpu_kernels import kernels
from server.backends.cpu_layers import pack_layers, prepare_process
from server.backends.gpu_decoder import CudaRecorder, record_decoder
from server.loading import identity, load

Dtype = Literal["float32", "bfloat16"]
_MOST_WORKERS = 8
"""Each holds the hidden states of a batch."""


class PrefixCache:
    """Prompts' keys and values, least recently used out first, within a number of bytes. For several threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Prefix | None:
        """What is kept under the key, which counts as used now."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, key: bytes, prefix: Prefix) -> None:
        """Keeps a prompt, unless it is too large, and drops what was unused for longest to make room."""
        with self._lock:
            if prefix.nbytes > self.most_bytes or key in self._entries:
                return
            while self.bytes + prefix.nbytes > self.most_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.bytes -= dropped.nbytes
            self._entries[key] = prefix
            self.bytes += prefix.nbytes

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


class TransformersBackend:
    """A checkpoint folder on this machine's GPU if it has one, else on its CPU.

    In float32 a text's values differ by at most 1e-5 (for values of the order of 1) whatever it is scored with,
    whatever is kept, and on how many cores. In bfloat16 the most that was seen is 0.25, beside a
    padded forward pass of a model of 135M weights. With `exact` every text is run alone and nothing is kept: equal to
    the last bit, and slower.

    `workers` says how many threads may call `score` at once. On a CPU that is one for each core: two batches on a core
    each are done sooner than one after the other on both. A batch that is alone has all cores, and one that becomes
    idle while another has a batch joins in with it: a row is cut into parts, unless the decoder's layers share their
    work between threads.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Dtype = "float32",
        exact: bool = False,
        cache_bytes: int = 1 << 30,
        name: str = "gvm",
    ) -> None:
        """Loads the checkpoint.

        Args:
            cache_bytes: for the keys and values of prompts.
            name: what the model is called to clients.

        Raises:
            InputError: nothing usable in the folder; see `server.loading.load`.
        """
        prepare_process(getattr(torch, dtype))
        loaded = load(folder, getattr(torch, dtype))
        self._model: Any = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._cores = torch.get_num_threads()
        self.workers = 1 if torch.cuda.is_available() or exact else min(self._cores, _MOST_WORKERS)
        self._threads = max(1, self._cores // self.workers)
        self._shares = Cores(0 if exact else self.workers, self._threads)
        tokenizer: Any = load_tokenizer(folder)
        self._pad_id: int = tokenizer.pad_token_id
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        self._packs = can_pack(self._model)
        self._cuts = False
        body = unwrapped(self._model).base_model
        if torch.cuda.is_available():
            if self._packs:
                record_decoder(body, CudaRecorder())
        else:
            if self._packs:
                shared = pack_decoder(body, self._shares, (lambda: None) if exact else kernels)
                self._cuts = self.workers > 1 and not shared
            pack_layers(body)
        self._one_by_one = exact or _scales_with_length(self._model.config)
        self.cache = PrefixCache(0 if self._one_by_one or not self._packs else cache_bytes)
        self.keeps_prompts = self.cache.most_bytes > 0
        found = identity(folder, tokenizer)
        self._weights = bytes.fromhex(found.weights_sha256)
        form = loaded.form if self._packs else f"{loaded.form}; prompts are not kept, its attention does not allow it"
        self.info = ModelInfo(
            name, form, found.weights_sha256, found.tokenizer_sha256, dtype, "transformers", found.max_tokens
        )

    def score(self, items: Sequence[Encoded], *, alone: bool = True) -> list[Scored]:
        """Values of every text, in order, in one forward pass: the caller bounds how many tokens that is.

        Raises:
            InputError: a token id that the model does not have.
            StageError: a value is not finite. Both name the text by its place.
        """
        for index, item in enumerate(items):
            self._require_known(index, item)
        if self.workers > 1:
            torch.get_num_threads()  # at a thread's first use torch sets what another asked for last
            torch.set_num_threads(self._cores if alone else self._threads)  # of this thread only
        with self._shares.busy(self.workers if alone else 1):
            if self._one_by_one:
                return [scored for item in items for scored in self._score([item])]
            return self._score(items, self._cores if alone and self._cuts else 1)

    def close(self) -> None:
        """Frees the model and what was kept."""
        self.cache.clear()
        self._model = None

    def _score(self, items: Sequence[Encoded], cores: int = 1) -> list[Scored]:
        if self._packs:
            values, cached = self._packed(items, cores)
        else:
            values = [v for _, v in sorted(score_all(self._model, items, self._pad_id), key=lambda pair: pair[0])]
            cached = [0] * len(items)
        for index, values_S in enumerate(values):
            if not bool(values_S.isfinite().all()):
                raise StageError(f"text {index} has a value that is not finite; the weights are damaged or overflow")
        return [Scored(v.numpy().astype(np.float32), c) for v, c in zip(values, cached, strict=True)]

    def _packed(self, items: Sequence[Encoded], cores: int) -> tuple[list[Tensor], list[int]]:
        """Values, and the prompt tokens that were not computed, by text. Texts of one prompt make one group."""
        members: dict[bytes, list[int]] = {}
        for index, item in enumerate(items):
            members.setdefault(self._key(item.prompt_ids), []).append(index)
        groups = []
        for key, indices in members.items():
            responses = [items[i].response_ids for i in indices]
            # A prompt seen once is kept too: the rest of its group may come in requests of their own.
            groups.append(Group(items[indices[0]].prompt_ids, responses, self.cache.get(key), keep=self.keeps_prompts))
        parts = min(cores, max(1, sum(group.tokens for group in groups) // LEAST_PART))
        found, kept = packed_values(self._model, groups, parts)
        values: list[Tensor] = [torch.empty(0)] * len(items)
        cached = [0] * len(items)
        for at, (key, indices) in enumerate(members.items()):
            for place, (index, values_S) in enumerate(zip(indices, found[at], strict=True)):
                values[index] = values_S
                computed_here = place == 0 and groups[at].prefix is None
                cached[index] = 0 if computed_here else len(groups[at].prompt_ids)
            # What is no number in a response can reach its prompt's keys: others must not be given them.
            if at in kept and all(bool(values_S.isfinite().all()) for values_S in found[at]):
                self.cache.put(key, kept[at])
        return values, cached

    def _key(self, prompt_ids: list[int]) -> bytes:
        return sha256(self._weights + np.asarray(prompt_ids, dtype=np.int64).tobytes()).digest()

    def _require_known(self, index: int, item: Encoded) -> None:
        for token in (*item.prompt_ids, *item.response_ids):
            if not 0 <= token < self._vocabulary:
                raise InputError(
                    f"text {index} has the token id {token}, but the model's ids are 0 to {self._vocabulary - 1}"
                )


def _scales_with_length(config: Any) -> bool:
    """Whether positions are scaled by the longest text of a batch, so that a text's values depend on its company."""
    return "longrope" in str(getattr(config.get_text_config(), "rope_parameters", None))
