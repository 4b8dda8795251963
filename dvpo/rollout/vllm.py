"""Rollouts by a vLLM engine in the trainer's own process, which takes over the policy's weights before every rollout.

Each process of a distributed run has an engine of its own and answers its own prompts.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dvpo.errors import InputError
from dvpo.rollout import Engine, Sample
from dvpo.rollout.weights import named_weights


class VllmEngine(Engine):
    """vLLM samples at the temperature and returns log-probabilities with the temperature in them.

    Between rollouts it gives its memory back, where the platform can (CUDA).

    Args:
        folder: configuration and tokenizer of the policy; its weights are not read.
        max_tokens: of a prompt and its response together.
        options: passed to `vllm.LLM` (dtype, gpu_memory_utilization, enforce_eager...).

    Raises InputError where vLLM is not installed.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, max_new_tokens: int, max_tokens: int,
        temperature: float, options: dict[str, Any] | None = None,
    ):  # fmt: skip
        # The engine must live in this process to be handed weights as tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
            from vllm.platforms import current_platform  # type: ignore[import-not-found]
        except ImportError as error:
            raise InputError(
                "vLLM is not installed in this environment; install it or set engine.name to transformers"
            ) from error
        self.model = model
        self.sleeps = current_platform.is_sleep_mode_available()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        with torch.random.fork_rng():  # it seeds the whole process
            self.llm = LLM(
                model=str(folder),
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=max_tokens,
                enable_sleep_mode=self.sleeps,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if distributed else None,
                **(options or {}),
            )
        self.temperature = temperature
        self.parameters = lambda **changes: SamplingParams(
            max_tokens=max_new_tokens,
            # Our EOS alone ends a response, whatever else the checkpoint's own settings name.
            ignore_eos=True,
            stop_token_ids=[tokenizer.eos_token_id],
            detokenize=False,
            **changes,
        )
        if self.sleeps:
            self.llm.sleep(level=2)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """See `Engine`."""
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(self.model)})
        self.llm.reset_prefix_cache()
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """See `Engine`."""
        parameters = [self.parameters(temperature=self.temperature, seed=seed, logprobs=0) for seed in seeds]
        samples = []
        for output in self._run(prompts, parameters):
            ids = list(output.token_ids)
            logprobs = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
            samples.append(Sample(ids, logprobs))
        return samples

    def greedy(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """See `Engine`."""
        return [list(output.token_ids) for output in self._run(prompts, self.parameters(temperature=0))]

    def _run(self, prompts: Sequence[list[int]], parameters: Any) -> list[Any]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [request.outputs[0] for request in self.llm.generate(inputs, parameters, use_tqdm=False)]
