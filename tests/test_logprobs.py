"""Log-probabilities of responses: a plain forward's, in chunks or in one piece, with the same gradient."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM

from dvpo import logprobs, models
from dvpo.config import LoraSettings
from dvpo.data.templates import Encoded
from dvpo.errors import StageError
from dvpo.logprobs import response_logprobs
from dvpo.values import ValueBatch, collate


@pytest.fixture(scope="module")
def mixed(texts: list[Encoded]) -> list[Encoded]:
    chosen = [*texts[:5], Encoded(texts[5].prompt_ids * 2, texts[5].response_ids[:1])]
    assert len({len(t.prompt_ids) for t in chosen}) > 2
    assert len({len(t.response_ids) for t in chosen}) > 2
    return chosen


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch, tokenizer) -> int:
    """Seven tokens at a time."""
    monkeypatch.setattr(logprobs, "MOST_LOGITS", 7 * len(tokenizer) + 3)
    return 7


def plain(model: Any, text: Encoded, temperature: float) -> torch.Tensor:
    """Of one text alone: no padding, no positions, the whole block of logits."""
    ids = torch.tensor([text.prompt_ids + text.response_ids])
    all_logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
    first = len(text.prompt_ids)
    return torch.stack([all_logprobs[first + t - 1, token] for t, token in enumerate(text.response_ids)])


def gradient(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighted(found_B_T: torch.Tensor) -> torch.Tensor:
    """A loss in which every token counts differently."""
    return (found_B_T * torch.arange(1, found_B_T.numel() + 1, dtype=found_B_T.dtype).view_as(found_B_T)).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_chunks_give_a_plain_forward_s_values_and_gradient(
    checkpoints, mixed, in_chunks, arch: str, temperature: float, side: Any, monkeypatch
) -> None:
    monkeypatch.setattr(logprobs, "token_logprobs", in_float64)
    model = models.load(checkpoints[arch, "policy"], "policy").eval().double()
    found = response_logprobs(model, collate(mixed, 0, side), temperature)
    expected = torch.zeros_like(found)
    for row, text in enumerate(mixed):
        expected[row, : len(text.response_ids)] = plain(model, text, temperature)
    assert (found - expected).abs().max() < 1e-12
    ours, theirs = gradient(model, weighted(found)), gradient(model, weighted(expected))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-9), name


def in_float64(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """The log-probabilities of the objectives, without their float32."""
    return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def test_chunks_and_one_piece_agree(checkpoints, mixed, monkeypatch) -> None:
    model = models.load(checkpoints["llama", "policy"], "policy").eval()
    batch = collate(mixed, 0)
    whole = response_logprobs(model, batch, 0.7)
    monkeypatch.setattr(logprobs, "MOST_LOGITS", 1)
    single = response_logprobs(model, batch, 0.7)
    assert whole.dtype == single.dtype == torch.float32
    assert not torch.equal(whole, torch.zeros_like(whole))
    assert (whole - single).abs().max() < 1e-5
    assert not single[~batch.mask_B_S[:, 1:]].any()


class Largest(TorchDispatchMode):
    """The most rows of a vocabulary's width that any one tensor holds (the head's gradient has a row per dimension)."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return out


def test_no_more_logits_than_one_chunk_forward_and_backward(checkpoints, mixed, tokenizer, monkeypatch) -> None:
    model = models.load(checkpoints["gpt2", "policy"], "policy").train()
    width = len(tokenizer)
    assert width not in {p.shape[-1] for p in model.parameters()}
    dimensions, tokens = model.config.hidden_size, sum(len(t.response_ids) for t in mixed)
    chunk = dimensions + 3
    assert tokens > 2 * chunk
    seen = {}
    for limit in (chunk * width, 2**24):
        monkeypatch.setattr(logprobs, "MOST_LOGITS", limit)
        with Largest(width) as largest:
            response_logprobs(model, collate(mixed, 0), 1.0).sum().backward()
        seen[limit] = largest.rows
    assert seen[chunk * width] == chunk
    assert seen[2**24] >= tokens


def test_an_adapter_learns_the_same_in_chunks(checkpoints, mixed, monkeypatch) -> None:
    torch.manual_seed(0)
    model = models.load(checkpoints["llama", "policy"], "policy", lora=LoraSettings(r=4, alpha=8)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    batch = collate(mixed, 0)
    whole = response_logprobs(model, batch, 1.0)
    expected = gradient(model, weighted(whole))
    monkeypatch.setattr(logprobs, "MOST_LOGITS", 1)
    found = response_logprobs(model, batch, 1.0)
    assert (found - whole).abs().max() < 1e-5
    grads = gradient(model, weighted(found))
    assert grads.keys() == expected.keys() and all("lora" in name for name in grads)
    for name, grad in grads.items():
        assert torch.allclose(grad, expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max())), name
    with model.disable_adapter():
        assert (response_logprobs(model, batch, 1.0) - whole).abs().max() > 1e-3


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_data_parallel_wrapper_is_called_as_a_whole(checkpoints, mixed, in_chunks, group) -> None:
    """Its forward prepares the reduction of gradients: a way around it would leave the processes apart."""
    model = models.load(checkpoints["llama", "policy"], "policy").train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    called = []
    wrapped.register_forward_hook(lambda *_: called.append(True))
    batch = collate(mixed, 0)
    found = response_logprobs(wrapped, batch, 1.0)
    assert called and torch.equal(found, response_logprobs(model, batch, 1.0))
    assert len(gradient(model, found.sum())) == len(list(model.named_parameters()))


def test_hooks_of_the_last_layer_run_and_its_own_forward_comes_back(checkpoints, mixed, in_chunks) -> None:
    model = models.load(checkpoints["llama", "policy"], "policy").eval()
    head = model.get_output_embeddings()
    order = []
    head.register_forward_pre_hook(lambda *_: order.append("gather"))
    head.register_forward_hook(lambda *_: order.append("release"))
    own = head.forward
    head.forward = lambda hidden: order.append("chunk") or own(hidden)
    kept = head.forward
    response_logprobs(model, collate(mixed[:2], 0), 1.0)
    tokens = sum(len(t.response_ids) for t in mixed[:2])
    assert order == ["gather", *["chunk"] * -(-tokens // in_chunks), "release"]
    assert head.forward is kept


def test_logits_that_change_after_the_last_layer(tokenizer, mixed, in_chunks, monkeypatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **sizes)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    batch: ValueBatch = collate(mixed, 0)
    with torch.no_grad():
        found = response_logprobs(model, batch, 1.0)
        expected = plain(model, mixed[0], 1.0)
    assert (found[0, : len(expected)] - expected).abs().max() < 1e-4
    monkeypatch.setattr(logprobs, "CHANGES_LOGITS", ())
    with pytest.raises(StageError, match="Gemma2ForCausalLM changes its logits"):
        response_logprobs(model, batch, 1.0)


def test_all_rows_count_towards_the_logits_at_once(checkpoints, texts, monkeypatch) -> None:
    model = models.load(checkpoints["llama", "policy"], "policy").eval()
    batch = collate(texts[:4], 0)
    keep = batch.input_ids_B_L.shape[1]
    monkeypatch.setattr(logprobs, "MOST_LOGITS", 2 * keep * model.config.vocab_size)
    monkeypatch.setattr(logprobs, "_in_one_piece", lambda *_: pytest.fail("four rows are more than two"))
    response_logprobs(model, batch, 1.0)
