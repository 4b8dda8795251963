"""Preference pairs and trajectories: of the same policy, never of the same example, the same on every run."""

import pytest

from dvpo.data.pairs import Encoder, Pick, preference_picks, prompt_numbers
from dvpo.data.records import Example, Response
from dvpo.errors import InputError
from dvpo.training.gvm_data import encodable_pairs

N = 8


@pytest.fixture
def mixed() -> list[Example]:
    """Eight prompts; two policies answer each, and one answer has no known author."""
    made = []
    for i in range(N):
        prompt = ({"role": "user", "content": " ".join(["hello"] * (i + 1))},)
        answers = (
            Response("the river .", "a"),
            Response("the salt .", "b"),
            Response("also , the river .", "a"),
            Response("surely", None),
        )
        made.append(Example(prompt, answers, ((0, 1), (2, 1), (0, 3)), f"x:{i}"))
    return made


def authors(examples: list[Example], trajectory) -> list[tuple[int, str]]:
    """(example, policy) of every pair of a trajectory."""
    by_prompt = {e.prompt[0]["content"]: i for i, e in enumerate(examples)}
    found = []
    for question, answer in trajectory:
        i = by_prompt[question[0]["content"]]
        (policy,) = {r.policy for r in examples[i].responses if r.text == answer}
        found.append((i, policy))
    return found


def test_trajectories_are_of_the_same_policy_and_of_other_examples(tokenizer, mixed) -> None:
    encoder = Encoder(tokenizer, mixed, 500, 500, trajectory_k=3, seed=1)
    for i in range(N):
        for j, response in enumerate(mixed[i].responses[:3]):
            found = authors(mixed, encoder.trajectory(Pick(i, j)))
            assert len(found) == 3
            assert {policy for _, policy in found} == {response.policy}
            assert i not in {example for example, _ in found}
        assert encoder.trajectory(Pick(i, 3)) == []


def test_trajectories_are_drawn_by_the_pick_and_the_seed_alone(tokenizer, mixed) -> None:
    picks = [Pick(i, 0) for i in range(N)]
    encoder = Encoder(tokenizer, mixed, 500, 500, trajectory_k=2, seed=1)
    forwards = [encoder.trajectory(p) for p in picks]
    again = Encoder(tokenizer, mixed, 500, 500, trajectory_k=2, seed=1)
    assert [again.trajectory(p) for p in reversed(picks)][::-1] == forwards
    other = Encoder(tokenizer, mixed, 500, 500, trajectory_k=2, seed=2)
    assert [other.trajectory(p) for p in picks] != forwards


def test_a_policy_with_few_other_answers_has_a_short_trajectory(tokenizer, mixed) -> None:
    encoder = Encoder(tokenizer, mixed[:2], 500, 500, trajectory_k=5)
    assert len(encoder.trajectory(Pick(0, 1))) == 1
    assert Encoder(tokenizer, mixed[:1], 500, 500, trajectory_k=5).trajectory(Pick(0, 1)) == []


def test_no_trajectory_by_default_and_it_stands_in_the_prompt_only(tokenizer, mixed) -> None:
    plain = Encoder(tokenizer, mixed, 500, 500).text(Pick(2, 0))
    longer = Encoder(tokenizer, mixed, 500, 500, trajectory_k=2).text(Pick(2, 0))
    assert longer.response_ids == plain.response_ids
    assert longer.prompt_ids[-len(plain.prompt_ids) :] == plain.prompt_ids
    assert len(longer.prompt_ids) > len(plain.prompt_ids)


def test_picks_are_better_then_worse_and_sampled_the_same_way_each_time(mixed) -> None:
    whole = preference_picks(mixed, None, 0)
    assert len(whole) == 3 * N
    assert whole[1] == (Pick(0, 2), Pick(0, 1))
    some = preference_picks(mixed, 2, 0)
    assert [p[0].example for p in some] == [i for i in range(N) for _ in range(2)]
    assert set(some) < set(whole)
    assert len(set(some)) == len(some)
    assert preference_picks(mixed, 2, 0) == some
    assert any(preference_picks(mixed, 2, seed) != some for seed in range(1, 6))


def test_limits_are_counted_and_half_a_pair_is_left_out(tokenizer, mixed) -> None:
    # The prompt of example i has i + 1 words and four more tokens; "also , the river ." has five and EOS.
    encoder = Encoder(tokenizer, mixed, max_prompt_tokens=6, max_response_tokens=4)
    kept = list(encoder.pairs(preference_picks(mixed, None, 0)))
    assert [p.prompt for p in kept] == [i for i in range(3) for _ in range(3)]
    # Four responses a prompt, of which one is in two pairs: it counts once.
    assert (encoder.notes.texts, encoder.notes.dropped_prompts, encoder.notes.cut_responses) == (4 * N, 4 * (N - 3), 3)
    assert max(len(p.better.response_ids) for p in kept) == 4
    cut = kept[1].better.response_ids
    assert tokenizer.eos_token_id not in cut
    assert kept[0].better.response_ids[-1] == tokenizer.eos_token_id


def test_pairs_keep_better_before_worse(tokenizer, mixed) -> None:
    (pair,) = Encoder(tokenizer, mixed, 500, 500).pairs([(Pick(4, 1), Pick(4, 0))])
    assert tokenizer.decode(pair.better.response_ids[:-1]) == "the salt ."
    assert tokenizer.decode(pair.worse.response_ids[:-1]) == "the river ."
    assert pair.better.prompt_ids == pair.worse.prompt_ids
    assert pair.prompt == 4


@pytest.fixture
def rows() -> list[Example]:
    """Three prompts of four pair rows each, spelt in two ways; one policy's answer stands in every row."""
    made = []
    for i in range(12):
        prompt = ({"role": "user", "content": f"what is  {i % 3} ?" if i % 2 else f"What is {i % 3} ?"},)
        made.append(Example(prompt, (Response("surely .", "a"), Response(f"the salt {i}", "b")), ((0, 1),), f"x:{i}"))
    return made


def test_a_prompt_in_many_rows_is_one_prompt(tokenizer, rows) -> None:
    assert prompt_numbers(rows) == [0, 1, 2] * 4
    some = preference_picks(rows, 1, 0)
    assert sorted(p[0].example % 3 for p in some) == [0, 1, 2]
    assert [p[0].example for p in some] == sorted(p[0].example for p in some)
    assert len(preference_picks(rows, 3, 0)) == 9
    assert [p[0].example for p in preference_picks(rows, None, 0)] == list(range(12))
    encoder = Encoder(tokenizer, rows, 500, 500)
    assert [pair.prompt for pair in encoder.pairs(preference_picks(rows, None, 0))] == [0, 1, 2] * 4


def test_a_trajectory_never_answers_the_prompt_itself(tokenizer, rows) -> None:
    encoder = Encoder(tokenizer, rows, 500, 500, trajectory_k=12)
    for i in range(12):
        found = encoder.trajectory(Pick(i, 0))
        assert len(found) == 8
        assert f"{i % 3} ?" not in {question[0]["content"][-3:] for question, _ in found}


def test_short_trajectories_are_said_and_none_at_all_is_refused(tokenizer, mixed) -> None:
    encoder = Encoder(tokenizer, mixed, 500, 500, trajectory_k=2)
    for j in (0, 3):
        encoder.text(Pick(0, j))
    encoder.require_trajectories()
    assert encoder.notes.lines() == [
        "1 of 2 texts have fewer answers of their policy before them than asked for, 1 of these none"
    ]
    nameless = Encoder(tokenizer, mixed, 500, 500, trajectory_k=2)
    nameless.require_trajectories()  # nothing was encoded yet
    nameless.text(Pick(0, 3))
    with pytest.raises(InputError, match="trajectory_k=2: no policy has answered two prompts"):
        nameless.require_trajectories()


def test_a_pair_is_left_out_where_only_the_worse_ones_trajectory_is_too_long(tokenizer) -> None:
    def prompt(n: int):
        return ({"role": "user", "content": " ".join(["hello"] * n)},)

    both = Example(prompt(1), (Response("the river .", "a"), Response("the salt .", "b")), ((0, 1),), "x:0")
    other = Example(prompt(20), (Response("surely", "b"),), (), "x:1")
    picks = [(Pick(0, 0), Pick(0, 1))]
    encoder = Encoder(tokenizer, [both, other], 10, 100, trajectory_k=1)
    assert encoder.text(Pick(0, 0)) is not None and encoder.text(Pick(0, 1)) is None
    assert list(encoder.pairs(picks)) == []
    assert encodable_pairs(encoder, picks, None) == []


def test_two_answers_of_one_policy_to_one_prompt_have_trajectories_of_their_own(tokenizer) -> None:
    def example(i: int) -> Example:
        prompt = ({"role": "user", "content": " ".join(["hello"] * (i + 1))},)
        return Example(prompt, (Response("the river .", "a"), Response("the salt .", "a")), (), f"x:{i}")

    encoder = Encoder(tokenizer, [example(i) for i in range(8)], 500, 500, trajectory_k=3)
    assert any(encoder.trajectory(Pick(i, 0)) != encoder.trajectory(Pick(i, 1)) for i in range(8))
