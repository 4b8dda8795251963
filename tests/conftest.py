"""Shared fixtures: tiny random checkpoints of two architectures, a word-level tokenizer, and encoded texts.

The weights are drawn wide (standard deviation 0.2), so that values differ visibly between tokens and positions.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from dvpo.data.atlas import POLICIES, Atlas, build_tokenizer
from dvpo.data.records import Example, Response
from dvpo.data.templates import Encoded, encode

AUTO = {
    "policy": AutoModelForCausalLM,
    "value": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}
Checkpoints = dict[tuple[str, str], Path]


def tiny_config(arch: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Two layers of width 32; GPT2 has learned positions."""
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if arch == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common)
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **common,
    )


@pytest.fixture(scope="session")
def atlas() -> Atlas:
    return Atlas.build(0)


@pytest.fixture(scope="session")
def tokenizer(atlas: Atlas) -> PreTrainedTokenizerBase:
    return build_tokenizer(atlas)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Checkpoints:
    """Folders of random models by (architecture, role): llama and gpt2; policy, value and reward. Read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders: Checkpoints = {}
    for arch in ("llama", "gpt2"):
        for seed, (role, auto) in enumerate(AUTO.items()):
            torch.manual_seed(seed)
            config = tiny_config(arch, tokenizer)
            if role != "policy":
                config.num_labels = 1
            folder = root / f"{arch}-{role}"
            auto.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[arch, role] = folder
    return folders


@pytest.fixture(scope="session")
def examples(atlas: Atlas) -> list[Example]:
    """Twelve questions, each with a careful and a careless answer; the careful one is preferred."""
    rng = random.Random(0)
    made = []
    for i, question in enumerate(atlas.questions(0, 12)):
        answers = tuple(
            Response(atlas.answer(question, POLICIES[name], rng), name, score)
            for name, score in (("scholar", 1.0 + i), ("guesser", -2.0))
        )
        made.append(Example(({"role": "user", "content": question.text},), answers, ((0, 1),), f"atlas:{i}"))
    return made


@pytest.fixture(scope="session")
def texts(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[Encoded]:
    """The twelve careful answers as token ids, of different lengths."""
    return [encode(tokenizer, e.prompt, e.responses[0].text) for e in examples]


@pytest.fixture(scope="session")
def ragged() -> Callable[[list[list[float]], float, int], tuple[torch.Tensor, torch.Tensor]]:
    """Builds a right-padded float64 block and its mask from rows of numbers, with `fill` in the padding."""

    def build(rows: list[list[float]], fill: float = 0.0, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows)) + extra
        block = torch.full((len(rows), width), fill, dtype=torch.float64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            block[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
            mask[i, : len(row)] = True
        return block, mask

    return build
