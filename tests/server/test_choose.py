"""Which of the waiting texts make a batch."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dvpo.data.templates import Encoded
from server.batching import Waiting, choose, cost_of

LONG = list(range(500))


def waiting(prompt: list[int], tokens: int) -> Waiting:
    item = Encoded(prompt, [1] * tokens)
    return Waiting(item, None, 0, len(prompt) + tokens, repr(prompt).encode())  # type: ignore[arg-type]


def group(prompt: list[int], count: int, tokens: int = 100) -> list[Waiting]:
    return [waiting(prompt, tokens) for _ in range(count)]


def test_a_prompt_is_counted_once_and_not_at_all_when_it_is_known() -> None:
    texts = group(LONG, 3)
    assert cost_of(texts) == 800
    assert cost_of(texts, {texts[0].prompt}) == 300
    assert cost_of([*texts, waiting([7], 10)], {texts[0].prompt}) == 311


def test_a_known_prompt_leaves_room_for_more_of_its_texts() -> None:
    texts = group(LONG, 8)
    assert len(choose(texts, 700, 4096)) == 2
    assert len(choose(texts, 700, 4096, {texts[0].prompt})) == 7


def test_a_second_prompt_is_begun_with_all_its_texts_or_not_at_all() -> None:
    first, second = group(LONG, 4), group([3, *LONG], 4)
    assert choose(first + second, 1802, 4096) == first + second
    assert choose(first + second, 1800, 4096) == first


def test_a_prompts_texts_stay_together_for_a_little_more_than_a_share_but_not_over_the_budget() -> None:
    texts = group(LONG, 4)  # 900 tokens
    assert len(choose(texts, 800, 4096)) == 4
    assert len(choose(texts, 790, 4096)) == 2
    assert len(choose(texts, 800, 800)) == 3


def test_the_oldest_is_first_and_then_the_nearest_in_length() -> None:
    oldest, short, near, far = waiting([1], 90), waiting([2], 5), waiting([3], 80), waiting([4], 900)
    assert choose([oldest, short, near, far], 180, 4096) == [oldest, near, short]


def test_a_suspect_goes_alone() -> None:
    texts = group([1], 3)
    texts[1].suspect = True
    assert choose(texts, 4096, 4096) == [texts[0], texts[2]]
    texts[0].suspect = True
    assert choose(texts, 4096, 4096) == [texts[0]]


prompts = st.integers(1, 4).map(lambda n: list(range(10 * n)))


@given(st.lists(st.builds(waiting, prompts, st.integers(0, 40)), min_size=1, max_size=30), st.integers(1, 400))
def test_the_budget_holds_the_oldest_is_in_it_and_texts_of_a_prompt_are_neighbours(texts, budget) -> None:
    batch = choose(texts, budget, budget)
    assert batch[0] is texts[0] and len(set(map(id, batch))) == len(batch)
    assert len(batch) == 1 or cost_of(batch) <= budget
    order = [entry.prompt for entry in batch]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes == len(set(order)) - 1


def test_of_one_prompt_the_nearest_in_length_come_first() -> None:
    prompt = LONG[:10]
    oldest, far, near = waiting(prompt, 50), waiting(prompt, 400), waiting(prompt, 60)
    assert choose([oldest, far, near], 130, 4096) == [oldest, near]


def test_a_second_prompt_that_is_known_costs_its_responses_alone() -> None:
    first, second = waiting([1], 100), waiting(LONG, 100)
    assert choose([first, second], 250, 4096) == [first]
    assert choose([first, second], 250, 4096, {second.prompt}) == [first, second]
