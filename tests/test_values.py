"""Padding, batch mates and order must not change a value, on rotary and on learned positions.

The reference is always the stock transformers model run alone on the exact unpadded ids.
"""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
)

from dvpo import models, values
from dvpo.config import LoraSettings
from dvpo.data.templates import Encoded
from dvpo.values import collate, model_inputs, position_ids, score_all, sequence_scores, token_values, unwrapped

ARCHS = ("llama", "gpt2")
PAD = 0
TOLERANCE = 1e-5
_STOCK = {"value": AutoModelForTokenClassification, "reward": AutoModelForSequenceClassification}


@cache
def ours(folder: Path, role: str):
    return models.load(folder, role).eval()


@cache
def stock(folder: Path, role: str):
    return _STOCK[role].from_pretrained(folder).eval()


@torch.no_grad()
def alone(folder: Path, item: Encoded) -> torch.Tensor:
    """h_0..h_T of the stock value model on one unpadded text."""
    logits_L = stock(folder, "value")(input_ids=torch.tensor([item.prompt_ids + item.response_ids])).logits[0, :, 0]
    return logits_L[len(item.prompt_ids) - 1 :]


def check(folder: Path, items: list[Encoded], side: str, pad: int = PAD) -> None:
    batch = collate(items, pad, side)
    with torch.no_grad():
        found = token_values(ours(folder, "value"), batch)
    assert found.dtype == torch.float32
    for i, item in enumerate(items):
        expected = alone(folder, item)
        assert len(expected) == len(item.response_ids) + 1 == int(batch.mask_B_S[i].sum())
        assert float((found[i, : len(expected)] - expected).abs().max()) <= TOLERANCE
        assert not found[i, len(expected) :].any()


def test_collate_by_hand() -> None:
    items = [Encoded([5, 6, 7], [8, 9]), Encoded([4], [3])]
    right = collate(items, PAD)
    assert right.input_ids_B_L.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert right.attention_mask_B_L.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert right.states_B_S.tolist() == [[2, 3, 4], [0, 1, 0]]
    assert right.mask_B_S.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    left = collate(items, PAD, "left")
    assert left.input_ids_B_L.tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 4, 3]]
    assert left.states_B_S.tolist() == [[2, 3, 4], [3, 4, 0]]
    assert position_ids(left.attention_mask_B_L).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="prompt of no tokens"):
        collate([Encoded([], [1])], PAD)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_values_equal_the_stock_model_alone(checkpoints, texts, arch: str, side: str) -> None:
    check(checkpoints[arch, "value"], texts, side)


def test_only_a_causal_model_padded_on_the_right_goes_without_a_mask(checkpoints, texts) -> None:
    causal = {arch: ours(checkpoints[arch, "value"], "value") for arch in ARCHS}
    for model in causal.values():
        assert model_inputs(model, collate(texts, PAD))["attention_mask"] is None
        assert model_inputs(model, collate(texts, PAD, "left"))["attention_mask"] is not None
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    both_ways = BertForTokenClassification(BertConfig(vocab_size=300, num_labels=1, **size)).eval()
    batch = collate(texts, PAD)
    assert model_inputs(both_ways, batch)["attention_mask"] is batch.attention_mask_B_L
    with torch.no_grad():
        whole_B_S = token_values(both_ways, batch)
        for row, item in enumerate(texts):
            alone_1_S = token_values(both_ways, collate([item], PAD))
            assert torch.allclose(whole_B_S[row, : alone_1_S.shape[1]], alone_1_S[0], atol=TOLERANCE)


@pytest.mark.parametrize("arch", ARCHS)
def test_values_tell_positions_apart(checkpoints, texts, arch: str) -> None:
    """Guards the tests here: were all values alike, an off-by-one would pass."""
    values = alone(checkpoints[arch, "value"], texts[0])
    assert float((values[1:] - values[:-1]).abs().min()) > 100 * TOLERANCE


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_with_the_end_token_does_no_harm(checkpoints, texts, tokenizer, arch: str, side: str) -> None:
    check(checkpoints[arch, "value"], texts[:4], side, pad=tokenizer.eos_token_id)


def test_the_last_value_reads_the_end_token(checkpoints, texts, tokenizer) -> None:
    """Another last token moves h_T and nothing before it."""
    item = texts[0]
    assert item.response_ids[-1] == tokenizer.eos_token_id
    changed = Encoded(item.prompt_ids, [*item.response_ids[:-1], 9])
    with torch.no_grad():
        values = token_values(ours(checkpoints["llama", "value"], "value"), collate([item, changed], PAD))
    assert torch.allclose(values[0, :-1], values[1, :-1], atol=TOLERANCE, rtol=0)
    assert abs(float(values[0, -1] - values[1, -1])) > 100 * TOLERANCE


tokens = st.lists(st.integers(6, 100), min_size=1, max_size=12)


@pytest.mark.parametrize("arch", ARCHS)
@settings(max_examples=15, deadline=None)
@given(
    items=st.lists(st.tuples(tokens, st.lists(st.integers(0, 100), max_size=12)), min_size=1, max_size=5),
    side=st.sampled_from(["right", "left"]),
)
def test_batch_composition_never_matters(checkpoints, arch: str, items, side: str) -> None:
    """Any mates, any order, either side, and ids that equal the padding inside a response."""
    check(checkpoints[arch, "value"], [Encoded(p, r) for p, r in items], side)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_scores_equal_the_stock_forward(checkpoints, texts, arch: str, side: str) -> None:
    folder = checkpoints[arch, "reward"]
    with torch.no_grad():
        found = sequence_scores(ours(folder, "reward"), collate(texts, PAD, side))
        for i, item in enumerate(texts):
            ids = torch.tensor([item.prompt_ids + item.response_ids])
            assert abs(float(stock(folder, "reward")(input_ids=ids).logits) - float(found[i])) <= TOLERANCE


def test_scores_of_a_checkpoint_that_pads_with_the_end_token(checkpoints, texts, tokenizer, tmp_path) -> None:
    """There the stock forward stops before EOS; ours reads it, and `load_tokenizer` picks another padding token."""
    stock_model = AutoModelForSequenceClassification.from_pretrained(checkpoints["llama", "reward"]).eval()
    stock_model.config.pad_token_id = tokenizer.eos_token_id
    stock_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"pad_token": "<pad>"', '"pad_token": "<eos>"'))

    loaded = models.load_tokenizer(tmp_path)
    assert loaded.pad_token_id is not None
    assert loaded.pad_token_id != loaded.eos_token_id == tokenizer.eos_token_id
    item = texts[0]
    ids = torch.tensor([item.prompt_ids + item.response_ids])
    with torch.no_grad():
        score = float(
            sequence_scores(models.load(tmp_path, "reward").eval(), collate([item, texts[1]], loaded.pad_token_id))[0]
        )
        before_end = float(stock_model(input_ids=ids).logits)
        stock_model.config.pad_token_id = loaded.pad_token_id
        assert abs(float(stock_model(input_ids=ids).logits) - score) <= TOLERANCE
    assert abs(before_end - score) > 100 * TOLERANCE


@pytest.mark.parametrize("role", ["value", "reward"])
@pytest.mark.parametrize("max_tokens", [1, 60, 8192])
def test_score_all_restores_the_order_and_equals_one_by_one(checkpoints, texts, role: str, max_tokens: int) -> None:
    model = ours(checkpoints["gpt2", role], role)
    shuffled = [*texts, Encoded([7, 8], [9]), Encoded([7], [])]
    random.Random(0).shuffle(shuffled)
    found = dict(score_all(model, shuffled, PAD, max_tokens=max_tokens))
    assert sorted(found) == list(range(len(shuffled)))
    for i, item in enumerate(shuffled):
        ((index, expected),) = score_all(model, [item], PAD)
        assert index == 0
        assert found[i].shape == expected.shape == (len(item.response_ids) + 1,)
        assert float((found[i] - expected).abs().max()) <= TOLERANCE


def test_score_all_under_bfloat16_keeps_the_head_in_float32(checkpoints, texts) -> None:
    model = ours(checkpoints["llama", "value"], "value")
    exact, rough = (dict(score_all(model, texts[:3], PAD, bf16=b)) for b in (False, True))
    for i in range(3):
        assert rough[i].dtype == torch.float32
        assert float((rough[i] - exact[i]).abs().max()) < 0.5
        # Values that went through a bfloat16 head would all be bfloat16 numbers.
        assert not torch.equal(rough[i], rough[i].bfloat16().float())


def test_score_all_of_nothing(checkpoints) -> None:
    assert list(score_all(ours(checkpoints["llama", "value"], "value"), [], PAD)) == []


def test_positions_go_on_over_the_padding(checkpoints, texts) -> None:
    model = models.load(checkpoints["llama", "value"], "value")
    positions = model_inputs(model, collate(texts, PAD))["position_ids"]
    assert torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions))


def test_a_model_of_which_one_layer_looks_both_ways_is_not_causal(checkpoints, texts) -> None:
    model = models.load(checkpoints["llama", "value"], "value")
    model.model.layers[0].self_attn.is_causal = False
    assert model_inputs(model, collate(texts, PAD))["attention_mask"] is not None
    for layer in model.model.layers:
        del layer.self_attn.is_causal
    assert model_inputs(model, collate(texts, PAD))["attention_mask"] is not None


def test_values_of_a_bfloat16_model_are_float32(checkpoints, texts) -> None:
    model = models.load(checkpoints["llama", "value"], "value").to(torch.bfloat16)
    with torch.no_grad():
        assert token_values(model, collate(texts, PAD)).dtype == torch.float32


def test_scoring_switches_dropout_off_and_keeps_no_graph(checkpoints, texts) -> None:
    model = models.load(checkpoints["gpt2", "value"], "value")
    expected = dict(score_all(model, texts[:3], PAD))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    for i, found in score_all(model, texts[:3], PAD):
        assert not found.requires_grad
        assert torch.allclose(found, expected[i], atol=1e-5)


def test_a_batch_keeps_to_its_padded_tokens(checkpoints, texts, monkeypatch) -> None:
    sizes = []

    def seen(items, pad):
        batch = collate(items, pad)
        sizes.append(batch.input_ids_B_L.numel())
        return batch

    monkeypatch.setattr(values, "collate", seen)
    most = 2 * max(len(t.prompt_ids) + len(t.response_ids) for t in texts)
    list(score_all(models.load(checkpoints["llama", "value"], "value"), texts, PAD, max_tokens=most))
    assert 1 < len(sizes) < len(texts) and max(sizes) <= most


def test_bfloat16_is_another_arithmetic(checkpoints, texts) -> None:
    model = models.load(checkpoints["llama", "value"], "value")
    exact, rough = (dict(score_all(model, texts[:3], PAD, bf16=b)) for b in (False, True))
    assert not any(torch.equal(exact[i], rough[i]) for i in range(3))


def test_an_adapter_is_unwrapped(checkpoints) -> None:
    model = models.load(checkpoints["llama", "value"], "value", lora=LoraSettings(r=2))
    assert type(unwrapped(model)).__name__ == "LlamaForTokenClassification"
