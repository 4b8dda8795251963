"""Attention to all texts of a row in one call, which GPUs take, gives what attention text by text gives."""

import pytest
import torch

from dvpo import models, packed_attention, packed_one_call
from dvpo.packed_values import Group, can_pack
from dvpo.packed_values import packed_values as values_of

GROUPS = [
    Group([7, 8, 9], [[1, 2], [3, 4, 5], []], keep=True),
    Group([4], [[6]]),
    Group([5, 6, 7, 8], [[], [9, 1, 2]], keep=True),
]


def flat(lists):
    return [item for each in lists for item in each]


def plain_varlen(query, key, value, queries_G1, keys_G1, most_queries, most_keys, *, scale, window_size):
    """What the docstring of torch's varlen_attn promises, text by text. [N, heads, D]."""
    assert window_size == (-1, 0)
    outputs = []
    spans = zip(queries_G1.tolist(), queries_G1.tolist()[1:], keys_G1.tolist(), keys_G1.tolist()[1:], strict=False)
    for q_start, q_stop, k_start, k_stop in spans:
        rows, columns = q_stop - q_start, k_stop - k_start
        assert rows <= most_queries and columns <= most_keys
        scores = torch.einsum("qhd,khd->hqk", query[q_start:q_stop], key[k_start:k_stop]) * scale
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[k_start:k_stop]))
    return torch.cat(outputs)


@pytest.mark.parametrize("attend", [plain_varlen, packed_one_call.padded_attention])
def test_one_call_equals_a_call_for_every_text(checkpoints, monkeypatch, attend) -> None:
    model = models.load(checkpoints["llama", "value"], "value").eval()
    assert can_pack(model)
    expected, kept = values_of(model, GROUPS)
    again = [Group(g.prompt_ids, [[2, 3], *g.responses], kept.get(i)) for i, g in enumerate(GROUPS)]
    expected_again, _ = values_of(model, again)

    monkeypatch.setattr(packed_attention, "_in_one_call", lambda query: True)
    monkeypatch.setattr(packed_one_call, "padded_attention", attend)  # what float32 takes
    found, kept = values_of(model, GROUPS)
    again = [Group(g.prompt_ids, [[2, 3], *g.responses], kept.get(i)) for i, g in enumerate(GROUPS)]
    found_again, _ = values_of(model, again)
    for mine, theirs in ((found, expected), (found_again, expected_again)):
        for a, b in zip(flat(mine), flat(theirs), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
def test_a_gpu_computes_what_the_cpu_does(checkpoints, kept: bool, dtype: torch.dtype, bound: float) -> None:
    reference = models.load(checkpoints["llama", "value"], "value").eval()
    model = models.load(checkpoints["llama", "value"], "value", dtype=dtype).eval().to("cuda")
    assert can_pack(reference) and can_pack(model)
    prefixes = values_of(model, GROUPS)[1] if kept else {}
    found, _ = values_of(model, [Group(g.prompt_ids, g.responses, prefixes.get(i)) for i, g in enumerate(GROUPS)])
    expected, _ = values_of(reference, GROUPS)
    a, b = torch.cat(flat(found)), torch.cat(flat(expected))
    assert (a - b).norm() <= bound * b.norm()


def test_whether_a_model_can_pack_is_tried_on_tokens_from_the_middle(checkpoints) -> None:
    """The first ones are often not trained on, and rounding alone moves what comes of them."""
    model = models.load(checkpoints["llama", "value"], "value").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[:10] = float("nan")
    assert can_pack(model)
