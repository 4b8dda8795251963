"""The sizes of decoder-only models, and what follows from them: parameters, and bytes and operations per token."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo.config import ModelSize
from dvpo.errors import InputError


@dataclass(frozen=True)
class Shape:
    """A Llama-like model: grouped-query attention, gated MLP, RMSNorm, no biases.

    source: where its numbers come from.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    head_size: int | None = None
    source: str = ""

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * (self.head_size or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.attention_width * self.kv_heads // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of one layer: queries and output, keys and values, the MLP's three matrices, two norms."""
        attention = 2 * self.hidden * (self.attention_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def backbone_parameters(self) -> int:
        """All layers, the last norm and the token embedding."""
        return self.layers * self.layer_parameters + self.hidden + self.embedding_parameters

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    def parameters(self, role: str) -> int:
        """Of a `policy` (vocabulary head, tied or not), or of a `value` model (head hidden -> 1 with its bias)."""
        if role == "policy":
            return self.backbone_parameters + (0 if self.tied else self.embedding_parameters)
        return self.backbone_parameters + self.hidden + 1

    def lora_parameters(self, rank: int) -> int:
        """Of an adapter on every linear layer: rank * (inputs + outputs) each."""
        h, q, kv, f = self.hidden, self.attention_width, self.kv_width, self.intermediate
        return self.layers * rank * (2 * (h + q) + 2 * (h + kv) + 3 * (h + f))

    def forward_flops(self, tokens: float, length: float, logits: float = 0) -> float:
        """Operations of one forward pass over `tokens` tokens in texts of `length`, with `logits` rows of the head."""
        matrices = 2 * tokens * self.layers * (self.layer_parameters - 2 * self.hidden)
        attention = 2 * tokens * length * self.attention_width * self.layers  # causal: half of the full square
        return matrices + attention + 2 * logits * self.embedding_parameters

    def cache_bytes(self, tokens: float, width: int) -> float:
        """Keys and values of `tokens` tokens at `width` bytes a number."""
        return 2 * self.layers * self.kv_width * width * tokens


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128256, True, source="config.json of meta-llama/Llama-3.2-3B"),
        Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128256, False, source="config.json of meta-llama/Meta-Llama-3-8B"),
        Shape("llama-2-13b", 40, 5120, 13824, 40, 40, 32000, False, source="config.json of meta-llama/Llama-2-13b-hf"),
        Shape("mistral-7b", 32, 4096, 14336, 32, 8, 32000, False,
              source="config.json of mistralai/Mistral-7B-Instruct-v0.2"),
        Shape("smollm2-135m", 30, 576, 1536, 9, 3, 49152, True,
              source="config.json of HuggingFaceTB/SmolLM2-135M-Instruct"),
    )
}  # fmt: skip


def find(name: str) -> Shape:
    """A known shape, or that of a folder or config.json. Raises InputError for any other name."""
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{name}: no such model; choose one of {', '.join(SHAPES)} or name a folder with a config.json"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON; name a model's config.json") from error
    return from_config(config, path.name, str(file))


def from_config(config: dict[str, Any], name: str, place: str) -> Shape:
    """The shape in a model's configuration. Raises InputError naming the missing field."""
    numbers = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    for field in numbers:
        if not isinstance(config, dict) or not isinstance(config.get(field), int) or config[field] < 1:
            raise InputError(f"{place}: {field} is missing or no positive number; the planner knows Llama-like models")
    layers, hidden, intermediate, heads, vocab = (config[field] for field in numbers)
    kv_heads, head_size = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if not isinstance(kv_heads, int) or heads % kv_heads:
        raise InputError(f"{place}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    tied = bool(config.get("tie_word_embeddings", False))
    return Shape(name, layers, hidden, intermediate, heads, kv_heads, vocab, tied, head_size, place)


def from_size(size: ModelSize, vocab: int, name: str) -> Shape:
    """The shape of a recipe's own small Llama."""
    return Shape(
        name, size.layers, size.hidden, size.intermediate, size.heads, size.heads, vocab, True, source="the recipe"
    )
