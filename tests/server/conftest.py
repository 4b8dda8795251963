"""A server around tiny real models: in this process, or on a real port."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.testclient import TestClient
from transformers import AutoConfig, AutoModelForTokenClassification

from dvpo import models
from dvpo.data.templates import Encoded
from dvpo.values import score_all
from server.app import create_app
from server.backends import Scored
from server.backends.transformers import TransformersBackend
from server.engine import Engine
from server.metrics import Metrics
from server.settings import Settings
from server.text import Codec


def random_classifier(kind: str, dtype: torch.dtype, **more: Any) -> Any:
    """A random value model of an architecture, with norms whose weights are not 1."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16, "num_labels": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **(sizes | more))
    model = AutoModelForTokenClassification.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


@pytest.fixture(scope="session")
def classifier() -> Callable[..., Any]:
    """Makes a random value model: `classifier(kind, dtype, **config)`."""
    return random_classifier


class Gated:
    """A backend that can be held up, and counts the texts it was asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.info, self.keeps_prompts = inner, inner.info, inner.keeps_prompts
        self.open = threading.Event()
        self.open.set()
        self.seen: list[Encoded] = []
        self.error: BaseException | None = None

    def score(self, items: Sequence[Encoded], *, alone: bool = True) -> list[Scored]:
        self.seen += items
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        found: list[Scored] = self.inner.score(items, alone=alone)
        return found

    def close(self) -> None:
        pass


@dataclass
class Served:
    """A server's parts, and what its model says without it."""

    app: Any
    backend: Gated
    engine: Engine
    folder: Path
    tokenizer: Any
    model: Any

    def direct(self, *texts: Encoded) -> list[list[float]]:
        """h_0..h_T of every text, straight from the model."""
        found = dict(score_all(self.model, texts, self.tokenizer.pad_token_id))
        return [found[i].tolist() for i in range(len(texts))]


@pytest.fixture(scope="session")
def backends() -> Callable[[Path], TransformersBackend]:
    """A loaded backend by folder; loaded once."""
    kept: dict[Path, TransformersBackend] = {}

    def load(folder: Path) -> TransformersBackend:
        if folder not in kept:
            kept[folder] = TransformersBackend(folder, cache_bytes=1 << 20)
        return kept[folder]

    return load


@pytest.fixture
def build(backends: Any, checkpoints: Any) -> Callable[..., Served]:
    """Builds a server around a folder, of a tiny value model by default."""

    def make(folder: Path | None = None, queue_tokens: int = 65_536, **settings: Any) -> Served:
        folder = folder or checkpoints["llama", "value"]
        metrics = Metrics()
        backend = Gated(backends(folder))
        backend.inner.cache.clear()
        engine = Engine(backend, queue_tokens=queue_tokens, on_batch=metrics.batch)
        tokenizer: Any = models.load_tokenizer(folder)
        app = create_app(engine, Codec(tokenizer), Settings(**settings), metrics)
        role: Any = models.role_of(folder)
        return Served(app, backend, engine, folder, tokenizer, models.load(folder, role))

    return make


@pytest.fixture
def served(build: Any) -> Served:
    return build()


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(served.app) as client:
        yield client


@contextmanager
def on_port(app: Any) -> Iterator[str]:
    """The app behind a real port, in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def live() -> Iterator[Callable[[Any], str]]:
    """Puts an app behind a real port until the test ends."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(on_port(app))


def save_model(tokenizer: Any, folder: Path) -> Path:
    """A random tiny value model for a tokenizer, wide enough in its weights to tell tokens apart."""
    from transformers import AutoModelForTokenClassification, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        num_labels=1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café 😀 日本語", "hello world, hello there"] * 4
_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _wrapped(raw: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=_CHAT
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Byte-level BPE with a BOS that is added to texts, as Llama 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    raw.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]),
        ]
    )
    return _wrapped(raw)


@pytest.fixture(scope="session")
def fallback_tokenizer() -> Any:
    """BPE of characters where an unknown character becomes its bytes, as Llama 2's and Gemma's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz.,!é"))
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("▁", "hello"),
    ]
    pieces += letters + [a + b for a, b in merges]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(raw)


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A value model with the byte-level tokenizer."""
    return save_model(byte_tokenizer, tmp_path_factory.mktemp("byte-level"))
