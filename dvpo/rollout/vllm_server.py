"""Rollouts by a vLLM server of its own, on other devices than the trainer's.

Its weights pass through a folder that the trainer writes and the server reads (a RAM disk, or a disk that several
machines share). It is started on the policy's folder, with its development interface:

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpo.errors import InputError, StageError
from dvpo.rollout import Engine, Sample
from dvpo.rollout.weights import named_weights

CONCURRENT = 64
SHARD_BYTES = 4 * 2**30


class VllmServerEngine(Engine):
    """Asks a vLLM server for answers, over its OpenAI protocol with token ids.

    Args:
        folder: where the weights are passed on; the server must see it under the same name.
        timeout: seconds that one request may take.

    Raises InputError where there is no such server at `url`.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, url: str, folder: Path, *, max_new_tokens: int,
        temperature: float, timeout: float = 600,
    ):  # fmt: skip
        self.model, self.folder, self.temperature = model, folder, temperature
        limits = httpx.Limits(max_connections=CONCURRENT, max_keepalive_connections=CONCURRENT)
        self.http = httpx.Client(base_url=url, timeout=timeout, limits=limits)
        self.url = url
        self.request = {
            "model": self._served(),
            "max_tokens": max_new_tokens,
            # Our EOS alone ends a response, and nothing of the checkpoint's own settings bends the distribution.
            "ignore_eos": True,
            "stop_token_ids": [tokenizer.eos_token_id],
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "return_token_ids": True,
        }

    @contextmanager
    def awake(self) -> Iterator[None]:
        """See `Engine`. The first process writes the weights; the others help to gather them and wait."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = not distributed or torch.distributed.get_rank() == 0
        self._write(first)
        if first:
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
            self._post("/reset_prefix_cache", {})
        if distributed:
            torch.distributed.barrier()
        yield

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """See `Engine`."""
        asked = [{"temperature": self.temperature, "seed": seed, "logprobs": 0} for seed in seeds]
        answers = self._complete(prompts, asked)
        return [Sample(answer["token_ids"], answer["logprobs"]["token_logprobs"]) for answer in answers]

    def greedy(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """See `Engine`."""
        return [answer["token_ids"] for answer in self._complete(prompts, [{"temperature": 0}] * len(prompts))]

    def _complete(self, prompts: Sequence[list[int]], asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        def ask(prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
            return self._post("/v1/completions", {**self.request, **parameters, "prompt": prompt})["choices"][0]

        with ThreadPoolExecutor(CONCURRENT) as pool:
            return list(pool.map(ask, prompts, asked))

    def _write(self, first: bool) -> None:
        """All weights as safetensors files in the folder, whatever was there before."""
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob("*.safetensors"):
                old.unlink()
        shard: dict[str, Tensor] = {}
        count = size = 0
        for name, weight in named_weights(self.model):
            if not first:
                continue
            shard[name] = weight.to("cpu", copy=True).contiguous()
            size += shard[name].nbytes
            if size > SHARD_BYTES:
                save_file(shard, self.folder / f"model-{count}.safetensors")
                shard, count, size = {}, count + 1, 0
        if shard:
            save_file(shard, self.folder / f"model-{count}.safetensors")

    def _served(self) -> str:
        """The model's name, once the server is known to return the log-probabilities that we need."""
        try:
            found = self.http.get("/server_info", params={"config_format": "json"})
        except httpx.HTTPError as error:
            raise InputError(f"engine.url: no vLLM server answers at {self.url} ({error}); start it") from error
        if found.status_code != 200:
            raise InputError(
                f"engine.url: {self.url} has no development interface; start it with VLLM_SERVER_DEV_MODE=1"
            )
        if found.json()["vllm_config"]["model_config"]["logprobs_mode"] != "processed_logprobs":
            raise InputError(f"engine.url: start {self.url} with --logprobs-mode processed_logprobs")
        return self.http.get("/v1/models").json()["data"][0]["id"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            answer = self.http.post(path, json=body)
        except httpx.HTTPError as error:
            raise StageError(f"the vLLM server at {self.url} did not answer {path}: {error!r}") from error
        if answer.status_code != 200:
            raise StageError(f"the vLLM server at {self.url} refused {path}: {answer.status_code} {answer.text[:300]}")
        return answer.json() if answer.content else None
