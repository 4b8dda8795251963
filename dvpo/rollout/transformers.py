"""Rollouts by transformers' own `generate`, batched with a key-value cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dvpo.rollout import Engine
from dvpo.values import unwrapped


class TransformersEngine(Engine):
    """Samples at a temperature from the full distribution (no top-k, no top-p): log-probabilities stay the policy's."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float):
        self.model = model
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, seed: int, greedy: bool = False) -> list[list[int]]:
        """See `Engine`. Prompts are padded on the left; what follows EOS is cut."""
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[self.pad_id] * (longest - len(p)) + p for p in prompts])
        attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        device = next(self.model.parameters()).device
        sampling = {} if greedy else {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=not greedy,
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
            use_cache=True,
            **sampling,
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            # No autocast: it would cast every weight again for every single token.
            with _no_own_generation_settings(self.model):
                rows = self.model.generate(
                    input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
                )
        return [self._until_eos(row) for row in rows[:, longest:].tolist()]

    def _until_eos(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.eos_id) + 1] if self.eos_id in ids else ids


@contextmanager
def _no_own_generation_settings(model: Any) -> Iterator[None]:
    """`generate` fills what we leave unset from the checkpoint's own settings (a repetition penalty, say)."""
    plain = unwrapped(model)
    own, plain.generation_config = plain.generation_config, GenerationConfig()
    try:
        yield
    finally:
        plain.generation_config = own
