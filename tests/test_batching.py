"""Batches by length: a partition, the way back to the original order, and what it saves."""

from hypothesis import given
from hypothesis import strategies as st

from dvpo.batching import buckets, epochs_of, of_like_length, places

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def padded(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def test_by_hand() -> None:
    assert buckets([3, 9, 1, 7, 5], 2) == [[1, 3], [4, 0], [2]]
    assert buckets([2, 2, 2, 2], 3) == [[0, 1, 2], [3]]
    assert places([[1, 3], [4, 0], [2]]) == [3, 0, 4, 1, 2]


def test_what_fits_one_batch_keeps_its_order() -> None:
    assert buckets([3, 9, 1], 3) == [[0, 1, 2]]


@given(LENGTHS, st.integers(1, 8))
def test_a_partition_and_the_way_back(lengths: list[int], rows: int) -> None:
    batches = buckets(lengths, rows)
    joined = [i for batch in batches for i in batch]
    assert sorted(joined) == list(range(len(lengths)))
    assert [len(batch) for batch in batches[:-1]] == [rows] * (len(batches) - 1) and len(batches[-1]) <= rows
    assert [joined[place] for place in places(batches)] == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 8))
def test_never_more_padding_than_in_the_given_order(lengths: list[int], rows: int) -> None:
    lengths = lengths[: max(1, len(lengths) // rows) * rows]
    order = list(range(len(lengths)))
    as_given = [order[i : i + rows] for i in range(0, len(order), rows)]
    assert padded(buckets(lengths, rows), lengths) <= padded(as_given, lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 5))
def test_texts_of_like_length_share_a_batch_and_none_is_lost_or_moved_far(lengths, batch_size) -> None:
    texts = [[i] * n for i, n in enumerate(lengths)]
    ordered = of_like_length(texts, len, batch_size, 3, 0)
    window = 3 * batch_size
    for start in range(0, len(texts), window):
        assert sorted(ordered[start : start + window]) == texts[start : start + window]

    def cost(rows: list[list[int]]) -> int:
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return sum(len(batch) * max(map(len, batch)) for batch in batches)

    if len(texts) % batch_size == 0:
        assert cost(ordered) <= cost(texts)


@given(st.lists(st.integers(), max_size=40, unique=True), st.sampled_from([0.25, 1, 1.5, 3]))
def test_epochs_hold_every_text_once_each_in_its_own_order(texts, epochs) -> None:
    ordered = epochs_of(texts, epochs, 0)
    assert len(ordered) == (round(epochs * len(texts)) or min(1, len(texts)))
    for start in range(0, len(ordered), max(1, len(texts))):
        epoch = ordered[start : start + len(texts)]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(texts)
    if epochs >= 3 and len(texts) > 20:
        assert ordered[: len(texts)] != ordered[len(texts) : 2 * len(texts)]
