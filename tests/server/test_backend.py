"""A text's values do not depend on what it is scored with, nor on what is kept. The reference is the stock model."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MistralConfig,
    MistralForTokenClassification,
)

from dvpo import packed_parts
from dvpo.data.templates import Encoded
from dvpo.errors import InputError, StageError
from dvpo.packed_values import packed_values
from server.backends import Scored
from server.backends import transformers as backend_module
from server.backends.cpu_decoder import PackedDecoder
from server.backends.transformers import TransformersBackend

TOLERANCE = 1e-5
MODELS = [("llama", "value"), ("gpt2", "value"), ("llama", "reward"), ("gpt2", "reward")]
IDS = st.integers(0, 40)
# Few prompts, so that texts of a batch share them, and one is the beginning of another.
PROMPTS = ([7], [7, 8, 9], [7, 8, 9, 10, 11, 12, 3], [*range(5, 25)])
ITEMS = st.lists(
    st.builds(
        lambda prompt, response: Encoded(list(prompt), response), st.sampled_from(PROMPTS), st.lists(IDS, max_size=12)
    ),
    min_size=1,
    max_size=7,
)


@cache
def backend(folder: Path, cache_bytes: int = 1 << 20, exact: bool = False) -> TransformersBackend:
    return TransformersBackend(folder, cache_bytes=cache_bytes, exact=exact)


@cache
def stock(folder: Path, role: str):
    auto = AutoModelForTokenClassification if role == "value" else AutoModelForSequenceClassification
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def alone(folder: Path, role: str, item: Encoded) -> np.ndarray:
    """h_0..h_T from the stock model, one unpadded text."""
    model = stock(folder, role)
    hidden_L_D = model.base_model(input_ids=torch.tensor([item.prompt_ids + item.response_ids])).last_hidden_state[0]
    head = model.classifier if hasattr(model, "classifier") else model.score
    return head(hidden_L_D)[len(item.prompt_ids) - 1 :, 0].numpy()


def require_equal(found: list[Scored], expected: list[np.ndarray]) -> None:
    for scored, values_S in zip(found, expected, strict=True):
        assert scored.values_S.dtype == np.float32 and scored.values_S.shape == values_S.shape
        assert np.abs(scored.values_S - values_S).max() <= TOLERANCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes a batch in one part")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=ITEMS, cores=st.integers(2, 4), cuts=st.booleans())
def test_a_batch_that_is_divided_among_cores_has_the_same_values(
    checkpoints, monkeypatch, items, cores: int, cuts: bool
) -> None:
    """Cut into parts, as for layers of torch's, or not."""
    folder = checkpoints["llama", "value"]
    ours = backend(folder, 1 << 19)
    ours.cache.clear()
    parts: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(backend_module, "LEAST_PART", 4)
        patch.setattr(ours, "_cores", cores)
        patch.setattr(ours, "workers", cores)
        patch.setattr(ours, "_cuts", cuts)
        patch.setattr(backend_module, "packed_values", lambda m, g, p: (parts.append(p), packed_values(m, g, p))[1])
        expected = [alone(folder, "value", item) for item in items]
        require_equal(ours.score(items, alone=True), expected)
        require_equal(ours.score(items, alone=True), expected)
        require_equal(ours.score(items, alone=False), expected)
    assert parts[0] == (min(cores, max(1, computed(items) // 4)) if cuts else 1)
    assert parts[-1] == 1


def computed(items: list[Encoded]) -> int:
    """Tokens to compute, every prompt once."""
    prompts = {tuple(item.prompt_ids) for item in items}
    return sum(map(len, prompts)) + sum(len(item.response_ids) for item in items)


@pytest.mark.parametrize(("arch", "role"), MODELS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=ITEMS, data=st.data())
def test_company_order_and_cache_change_no_value(checkpoints, arch: str, role: str, items, data) -> None:
    folder = checkpoints[arch, role]
    ours = backend(folder)
    ours.cache.clear()
    expected = [alone(folder, role, item) for item in items]
    order = data.draw(st.permutations(range(len(items))))
    require_equal(ours.score(items), expected)
    require_equal(ours.score([items[i] for i in order]), [expected[i] for i in order])
    require_equal([ours.score([item])[0] for item in items], expected)
    ours.cache.clear()
    require_equal([ours.score([item])[0] for item in items], expected)


@pytest.mark.parametrize(("arch", "role"), MODELS)
def test_positions_and_tokens_are_told_apart(checkpoints, arch: str, role: str) -> None:
    """Guards the tests here: were neighbouring values alike, a value of the wrong place would pass."""
    values = alone(checkpoints[arch, role], role, Encoded(PROMPTS[3], [5, 5, 6, 7]))
    assert np.abs(np.diff(values)).min() > 10 * TOLERANCE


def test_a_prompt_is_computed_once(checkpoints) -> None:
    ours = backend(checkpoints["llama", "value"])
    ours.cache.clear()
    prompt = PROMPTS[3]
    together = ours.score([Encoded(prompt, [1, 2]), Encoded([9], [1]), Encoded(prompt, [3])])
    assert [s.cached_tokens for s in together] == [0, 0, 20]
    # The rest of the group comes in requests of their own.
    assert [ours.score([Encoded(prompt, [i])])[0].cached_tokens for i in range(3)] == [20, 20, 20]
    assert ours.score([Encoded([9, 9], [1])])[0].cached_tokens == 0


def test_the_prompt_is_not_run_again(checkpoints) -> None:
    """Counts the tokens that reach the model."""
    ours = TransformersBackend(checkpoints["gpt2", "value"])
    seen: list[int] = []
    embedding = ours._model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    group = [Encoded(PROMPTS[3], [1, 2, 3]), Encoded(PROMPTS[3], [4, 5])]
    ours.score(group)
    ours.score(group)
    assert seen == [20 + 5, 5]


def test_the_cache_keeps_to_its_bytes_and_drops_the_oldest(checkpoints) -> None:
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, their width, bytes
    ours = TransformersBackend(checkpoints["llama", "value"], cache_bytes=50 * per_token)
    prompts = [[i] * 20 for i in (1, 2, 3)]
    for prompt in prompts[:2]:
        ours.score([Encoded(prompt, [4])])
    assert (len(ours.cache), ours.cache.bytes) == (2, 40 * per_token)
    ours.score([Encoded(prompts[0], [4])])
    ours.score([Encoded(prompts[2], [4])])
    assert ours.cache.bytes == 40 * per_token
    cached = [ours.score([Encoded(prompts[i], [4])])[0].cached_tokens for i in (0, 2, 1)]
    assert cached == [20, 20, 0]
    ours.score([Encoded([5] * 51, [4])])
    assert ours.score([Encoded([5] * 51, [4])])[0].cached_tokens == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU one thread scores at a time")
def test_threads_that_score_at_once_share_the_cache_and_change_no_value(checkpoints) -> None:
    folder = checkpoints["llama", "value"]
    fresh = TransformersBackend(folder, cache_bytes=40_000)  # of a few prompts: they push one another out
    items = [Encoded(list(PROMPTS[i % 4]), [i, 40 - i, 3]) for i in range(40)]
    expected = [alone(folder, "value", item) for item in items]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda start: fresh.score(items[start : start + 4]), range(0, 40, 4))
            require_equal([one for part in found for one in part], expected)
    assert 0 < fresh.cache.bytes <= 40_000
    assert fresh.cache.bytes == sum(prefix.nbytes for prefix in fresh.cache._entries.values())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_exact_is_equal_to_the_last_bit(checkpoints, texts, arch: str) -> None:
    folder = checkpoints[arch, "value"]
    exact = backend(folder, exact=True)
    single = [exact.score([text])[0].values_S.tobytes() for text in texts]
    together = exact.score(texts[::-1])[::-1]
    assert [s.values_S.tobytes() for s in together] == single
    assert {s.cached_tokens for s in together} == {0}
    require_equal(together, [alone(folder, "value", text) for text in texts])


def test_a_sliding_window_falls_back_to_the_whole_text(tmp_path, tokenizer) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    MistralForTokenClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = TransformersBackend(tmp_path)
    items = [Encoded(PROMPTS[3], [1, 2, 3]), Encoded(PROMPTS[3], [4]), Encoded([7], [5, 6])]
    assert "not kept" in ours.info.form
    for _ in range(2):
        found = ours.score(items)
        require_equal(found, [alone(tmp_path, "value", item) for item in items])
        assert {s.cached_tokens for s in found} == {0}


def test_bfloat16_stays_near(checkpoints, texts) -> None:
    half = TransformersBackend(checkpoints["llama", "value"], dtype="bfloat16")
    assert half.info.dtype == "bfloat16"
    for scored, text in zip(half.score(texts), texts, strict=True):
        expected = alone(checkpoints["llama", "value"], "value", text)
        assert 0 < np.abs(scored.values_S - expected).max() < 0.1 * np.abs(expected).max()


def test_an_unknown_token_is_named(checkpoints) -> None:
    ours = backend(checkpoints["llama", "value"])
    with pytest.raises(InputError, match=r"text 1 has the token id 99999, but the model's ids are 0 to \d+"):
        ours.score([Encoded([1], [2]), Encoded([1], [99999])])
    with pytest.raises(InputError, match="text 0 has the token id -1"):
        ours.score([Encoded([-1], [2])])


def test_a_value_that_is_not_finite_is_an_error(checkpoints) -> None:
    ours = TransformersBackend(checkpoints["llama", "value"])
    with torch.no_grad():
        ours._model.get_input_embeddings().weight[11] = float("inf")
    assert np.isfinite(ours.score([Encoded([1], [2])])[0].values_S).all()
    with pytest.raises(StageError, match="text 1 has a value that is not finite"):
        ours.score([Encoded([1], [2]), Encoded([1], [2, 11])])


def test_info_says_what_is_served(checkpoints) -> None:
    value, reward = (backend(checkpoints["llama", role]).info for role in ("value", "reward"))
    assert (value.max_tokens, value.dtype, value.backend) == (256, "float32", "transformers")
    assert value.form == "token classifier LlamaForTokenClassification"
    assert reward.form == "sequence classifier LlamaForSequenceClassification, its head read at every token"
    assert value.weights_sha256 != reward.weights_sha256
    assert value.tokenizer_sha256 == reward.tokenizer_sha256


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes a batch in one part")
@pytest.mark.parametrize("exact", [False, True])
def test_an_idle_core_joins_in_unless_it_has_to_be_exact(checkpoints, monkeypatch, exact: bool) -> None:
    folder = checkpoints["llama", "value"]
    item = Encoded([7, 8, 9], [5, 6] * 150)
    joined: list[int] = []
    in_parts = PackedDecoder._in_parts
    monkeypatch.setattr(
        PackedDecoder,
        "_in_parts",
        lambda self, first, parts, *a: (joined.append(parts), in_parts(self, first, parts, *a))[1],
    )
    monkeypatch.setattr(packed_parts, "_IDLE_SECONDS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours = TransformersBackend(folder, exact=exact)
    finally:
        torch.set_num_threads(threads)
    for _ in range(2):  # the second time with the prompt kept
        require_equal(ours.score([item], alone=False), [alone(folder, "value", item)])
    assert (joined == []) if exact else (len(joined) == 2 and min(joined) >= 2)


def test_a_prompt_is_not_kept_with_what_is_no_number(checkpoints, monkeypatch) -> None:
    """It can stand in the prompt's keys, and others would be given them."""
    ours = TransformersBackend(checkpoints["llama", "value"], cache_bytes=1 << 20)

    def spoilt(*given):
        found, kept = packed_values(*given)
        found[0][0][-1] = float("nan")
        return found, kept

    with monkeypatch.context() as patch:
        patch.setattr(backend_module, "packed_values", spoilt)
        with pytest.raises(StageError, match="not finite"):
            ours.score([Encoded([7, 8, 9], [10, 11])])
    assert len(ours.cache) == 0
    ours.score([Encoded([7, 8, 9], [10, 11])])
    assert len(ours.cache) == 1
