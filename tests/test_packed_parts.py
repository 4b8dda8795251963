"""A row computed in parts, each in a thread of its own, gives what the whole row gives; and which cores are idle."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo import models, packed_parts, packed_values
from dvpo.packed_parts import Cores, Row, cut, run_together
from dvpo.packed_row import Handover, Packing, Prefix, Segment
from dvpo.packed_values import Group, can_pack
from dvpo.packed_values import packed_values as values_of

some = st.lists(st.integers(3, 60), max_size=9)
groups = st.lists(
    st.builds(
        Group,
        st.lists(st.integers(3, 60), min_size=1, max_size=20),
        st.lists(some, min_size=1, max_size=3),
        keep=st.just(True),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def model(checkpoints) -> Any:
    found = models.load(checkpoints["llama", "value"], "value").eval()
    assert can_pack(found)
    return found


def require_alike(found: tuple[Any, dict[int, Prefix]], expected: tuple[Any, dict[int, Prefix]]) -> None:
    for mine, theirs in zip(found[0], expected[0], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for index, kept in found[1].items():
        other = expected[1][index]
        assert kept.h_0 == pytest.approx(other.h_0, abs=1e-5)
        assert torch.allclose(kept.keys_L_1_H_P_D, other.keys_L_1_H_P_D, atol=1e-5)
        assert torch.allclose(kept.values_L_1_H_P_D, other.values_L_1_H_P_D, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(given_groups=groups, parts=st.integers(2, 5))
def test_values_and_kept_prompts_are_those_of_the_whole_row(model, given_groups: list[Group], parts: int) -> None:
    whole = values_of(model, given_groups)
    require_alike(values_of(model, given_groups, parts), whole)
    again = [Group(g.prompt_ids, [[4, 5], *g.responses], whole[1].get(i)) for i, g in enumerate(given_groups)]
    require_alike(values_of(model, again, parts), values_of(model, again))


@settings(max_examples=60, deadline=None)
@given(given_groups=groups, parts=st.integers(1, 6))
def test_every_token_and_every_value_is_in_one_part(given_groups: list[Group], parts: int) -> None:
    row = packed_values._pack(given_groups)
    found = cut(row, parts, width=8)
    assert 1 <= len(found) <= parts
    assert [i for part in found for i in part.ids] == row.ids
    assert [p for part in found for p in part.positions] == row.positions
    starts = [sum(len(before.ids) for before in found[:i]) for i in range(len(found))]
    wanted = [w + start for part, start in zip(found, starts, strict=True) for w in part.packing.wanted or ()]
    assert wanted == row.packing.wanted
    for part in found:
        ends = [(s.start, s.stop) for s in part.packing.segments]
        assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])]  # they follow one another
        assert ends[-1][1] == len(part.ids)


def test_parts_take_about_as_long() -> None:
    """A later token looks at more tokens, so the second of two parts has fewer; with a wide model hardly so."""
    row = Row(Packing([Segment(0, 1000)]), [1] * 1000, list(range(1000)))
    narrow, wide = (len(cut(row, 2, width)[0].ids) for width in (64, 4096))
    assert narrow > wide > 500
    assert narrow + (narrow**2 / 2) / 128 == pytest.approx((1000 + (1000**2 / 2) / 128) / 2, rel=0.01)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_part_that_fails_ends_the_others(model, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    whole = packed_values._values_of
    parts: list[Row] = []

    def sometimes(plain: Any, row: Row) -> torch.Tensor:
        if row is parts[failing]:
            raise MemoryError("no room for this part")
        return whole(plain, row)

    monkeypatch.setattr(packed_values, "cut", lambda *a: parts.extend(cut(*a)) or parts)
    monkeypatch.setattr(packed_values, "_values_of", sometimes)
    before, threads = threading.active_count(), torch.get_num_threads()
    with pytest.raises(MemoryError, match="no room for this part"):
        values_of(model, [Group([5] * 9, [[6] * 9])], 3)
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_a_thread_that_cannot_start_ends_those_that_did(model, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def fails(self: threading.Thread) -> None:
        if self.name == "part-2":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="new thread"):
        values_of(model, [Group([5] * 9, [[6] * 9])], 3)
    for thread in threading.enumerate():
        if thread.name == "part-1":
            thread.join(5)
            assert not thread.is_alive()


def test_waiting_for_what_will_not_come_ends() -> None:
    handover = Handover()
    handover.want(slice(0, 2))
    threading.Timer(0.05, handover.fail).start()
    with pytest.raises(RuntimeError, match="earlier part"):
        handover.get(0, slice(0, 2))


def test_only_what_is_wanted_is_handed_over() -> None:
    handover = Handover()
    assert not handover.wanted
    handover.want(slice(3, 5))
    handover.want(slice(4, 8))
    assert handover.wanted
    key = torch.arange(10.0).view(1, 1, 10, 1)
    handover.put(key, -key)
    found, negative = handover.get(0, slice(4, 8))
    assert found.flatten().tolist() == [4, 5, 6, 7]
    assert negative.flatten().tolist() == [-4, -5, -6, -7]
    assert handover._layers[0][0].untyped_storage().nbytes() == 5 * key.element_size()


def test_one_part_runs_in_this_thread() -> None:
    seen: list[threading.Thread] = []
    run_together(lambda part: (seen.append(threading.current_thread()), torch.empty(0))[1], [Packing()], threads=1)
    assert seen == [threading.current_thread()]


def test_layers_are_handed_over_from_the_first_that_is_computed_in_parts() -> None:
    handover = Handover(first_layer=7)
    handover.want(slice(0, 1))
    key = torch.ones(1, 1, 1, 1)
    handover.put(7 * key, key)
    handover.put(8 * key, key)
    assert [handover.get(layer, slice(0, 1))[0].item() for layer in (7, 8)] == [7, 8]


def test_a_core_joins_in_when_it_has_been_idle_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(packed_parts.time, "monotonic", lambda: now[0])
    cores = Cores(3)
    now[0] += 1
    with cores.busy(1):
        assert cores.claim(3) == 0  # what it has to do may be on its way
        now[0] += 0.1
        assert cores.claim(1) == 1
        assert cores.claim(3) == 1
        assert cores.claim(3) == 0
        with cores.busy(1):  # a batch came after all: for a while there is more to do than there are cores
            now[0] += 0.1
            assert cores.claim(3) == 0
            assert cores.missing == 1
        assert cores.missing == 0
        cores.release(2)
        assert cores.claim(3) == 0
        now[0] += 0.1
        assert cores.claim(3) == 2
        cores.release(2)
    now[0] += 0.1
    assert cores.claim(4) == 3
