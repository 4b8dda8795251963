"""Scores with vLLM: the way to several GPUs. vLLM is installed in an environment of its own; see its import below.

The same checkpoint as the transformers backend's, read by vLLM's task `token_classify` with the activation off. vLLM
does not use kept prompts for token values, so every text is computed whole.
"""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dvpo import models
from dvpo.data.templates import Encoded
from dvpo.errors import InputError, StageError
from server.backends import ModelInfo, Scored
from server.loading import identity

# vLLM pins other releases of what this package uses, and its import configures logging and processes.
_MISSING = (
    "vLLM is not installed in this environment; install it (vllm==0.32.0), or serve with the transformers backend"
)


class VllmBackend:
    """A stock classifier's folder in vLLM's engine, which runs in processes of its own.

    Values differ from the transformers backend's by at most 1e-4 in float32 (for values of the order of 1).
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        tensor_parallel: int = 1,
        data_parallel: int = 1,
        name: str = "gvm",
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts vLLM's engine on the checkpoint.

        Args:
            tensor_parallel: devices that share one copy of the model.
            data_parallel: copies of the model.
            engine: more arguments of vLLM's `AsyncEngineArgs`.

        Raises:
            InputError: vLLM is missing, or the folder is not of a stock classifier with one label.
        """
        try:
            from vllm import AsyncEngineArgs, AsyncLLMEngine, PoolingParams, TokensPrompt  # type: ignore[import-not-found]
            from vllm.config import PoolerConfig  # type: ignore[import-not-found]
        except ImportError as error:
            raise InputError(f"{_MISSING} ({error})") from error
        form = _require_stock(folder)
        found = identity(folder, models.load_tokenizer(folder))
        arguments = AsyncEngineArgs(
            model=str(folder),
            runner="pooling",
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            data_parallel_size=data_parallel,
            skip_tokenizer_init=True,
            pooler_config=PoolerConfig(task="token_classify", use_activation=False),
            **(engine or {}),
        )
        self._prompt = TokensPrompt
        self._parameters = PoolingParams(task="token_classify", use_activation=False)
        self.workers = 1  # vLLM makes its own batches
        self.keeps_prompts = False  # it reads none of them for values of tokens
        self._count = 0
        # The engine belongs to one event loop; `score` is called from a thread that has none.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

        async def start() -> Any:
            return AsyncLLMEngine.from_engine_args(arguments)

        self._engine = self._wait(start())
        limit = min(found.max_tokens, self._engine.model_config.max_model_len)
        self.info = ModelInfo(name, form, found.weights_sha256, found.tokenizer_sha256, dtype, "vllm", limit)

    def score(self, items: Sequence[Encoded], *, alone: bool = True) -> list[Scored]:
        """Values of every text, in order. `alone` makes no difference here.

        Raises:
            StageError: vLLM failed on a text, or a value is not finite; the message names the text by its place.
        """
        return self._wait(self._score(items))

    def close(self) -> None:
        """Ends vLLM's processes."""

        async def shut_down() -> None:
            self._engine.shutdown()

        self._wait(shut_down())
        self._engine = None  # its own clean-up must not find a half-ended interpreter
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _score(self, items: Sequence[Encoded]) -> list[Scored]:
        return list(await asyncio.gather(*(self._one(index, item) for index, item in enumerate(items))))

    async def _one(self, index: int, item: Encoded) -> Scored:
        self._count += 1
        ids = item.prompt_ids + item.response_ids
        outputs = self._engine.encode(self._prompt(prompt_token_ids=ids), self._parameters, str(self._count))
        # A pooling request has one output, the last.
        *_, output = [output async for output in outputs]
        values_L = output.outputs.data.float().numpy().reshape(-1)
        if len(values_L) != len(ids):
            raise StageError(f"text {index}: vLLM gave {len(values_L)} values for {len(ids)} tokens")
        values_S = values_L[len(item.prompt_ids) - 1 :].astype(np.float32)
        if not np.isfinite(values_S).all():
            raise StageError(f"text {index} has a value that is not finite; the weights are damaged or overflow")
        return Scored(values_S, 0)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _require_stock(folder: Path) -> str:
    """The form of the checkpoint. Raises InputError for one that vLLM cannot read as ours."""
    from transformers import AutoConfig

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a value model")
    role = models.role_of(folder)
    if role not in ("value", "reward") or (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: vLLM reads token and sequence classifiers only; serve this one with the transformers backend"
        )
    config = AutoConfig.from_pretrained(str(folder))
    if config.num_labels != 1:
        raise InputError(f"{folder}: the model has {config.num_labels} labels; a value model has exactly one")
    return f"{'token' if role == 'value' else 'sequence'} classifier {config.architectures[0]}"
