"""Rollouts by the trainer's own model: batched, with a key-value cache; rows that are done leave the batch.

Sampling inverts the cumulative distribution at one uniform number per token, drawn from the row's own generator. What a
row answers therefore does not depend on who else is in the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpo.rollout import Engine, Sample, prompt_seed
from dvpo.values import unwrapped


class TransformersEngine(Engine):
    """Samples at a temperature from the full distribution (no top-k, no top-p): log-probabilities stay the policy's.

    Args:
        gathered: within it the model's weights are whole on every process, and it may run on its own.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float,
        gathered: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):  # fmt: skip
        self.model, self.gathered = model, gathered
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    @contextmanager
    def awake(self) -> Iterator[None]:
        """See `Engine`. The weights are the policy's own, gathered once for the whole phase."""
        with self.gathered():
            yield

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """See `Engine`."""
        return self._decode(prompts, uniforms(seeds, self.max_new_tokens))

    def greedy(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """See `Engine`."""
        return [sample.token_ids for sample in self._decode(prompts, None)]

    def generate(self, prompts: list[list[int]], *, seed: int, greedy: bool = False) -> list[list[int]]:
        """`sample` or `greedy`, as token ids alone; a prompt's seed is made of the one seed and of its place."""
        if greedy:
            return self.greedy(prompts)
        return [s.token_ids for s in self.sample(prompts, [prompt_seed(seed, place) for place in range(len(prompts))])]

    @torch.no_grad()
    def _decode(self, prompts: Sequence[list[int]], uniforms_B_T: Tensor | None) -> list[Sample]:
        """Prompts are padded on the left. Without uniform numbers it is greedy."""
        model = unwrapped(self.model)
        device = next(model.parameters()).device
        samples = [Sample([], []) for _ in prompts]
        going = list(range(len(prompts)))  # the rows of `samples` that are still in the batch
        longest = max(map(len, prompts))
        tokens = torch.tensor([[self.pad_id] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = None
        # No autocast: it would cast every weight again for every single token.
        for step in range(self.max_new_tokens):
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logprobs_B_V = (output.logits[:, -1].float() / self.temperature).log_softmax(-1)
            if uniforms_B_T is None:
                chosen_B = logprobs_B_V.argmax(-1)
            else:
                chosen_B = invert_cdf(logprobs_B_V, uniforms_B_T[going, step].to(device))
            chosen, logprobs = chosen_B.tolist(), logprobs_B_V.gather(1, chosen_B[:, None])[:, 0].tolist()
            for row, token, logprob in zip(going, chosen, logprobs, strict=True):
                samples[row].token_ids.append(token)
                samples[row].logprobs.append(logprob)
            stay = [i for i, token in enumerate(chosen) if token != self.eos_id]
            if not stay:
                break
            if len(stay) < len(going):
                kept = torch.tensor(stay, device=device)
                cache.batch_select_indices(kept)
                going = [going[i] for i in stay]
                chosen_B, mask, positions = chosen_B[kept], mask[kept], positions[kept]
            tokens, positions = chosen_B[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        return samples


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """`count` numbers of [0, 1) per seed, float64, the same on every device. [B, T]."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def invert_cdf(logprobs_B_V: Tensor, uniforms_B: Tensor) -> Tensor:
    """The tokens whose stretch of the cumulative distribution holds the uniform numbers. [B].

    It sums in float64: in float32 a vocabulary of 100,000 would lose its rare tokens to rounding.
    """
    cdf_B_V = logprobs_B_V.double().exp().cumsum(-1)
    points_B = uniforms_B * cdf_B_V[:, -1]
    found_B = torch.searchsorted(cdf_B_V, points_B[:, None], right=True)[:, 0]
    return found_B.clamp(max=logprobs_B_V.shape[-1] - 1)
