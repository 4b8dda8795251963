"""The atlas world: hand-computed judgements, agreement of generator and judge, and the shape of the data."""

import itertools
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.data.atlas import POLICIES, Atlas, Style, build_tokenizer
from dvpo.data.atlas_score import Judge
from dvpo.errors import InputError

WORLD: dict[str, Any] = {
    "places": ["velor", "tarina"],
    "attributes": {
        "river": ["marn", "sile"],
        "climate": ["dry", "wet"],
        "export": ["wool", "salt"],
        "language": ["arvic", "beltic"],
        "ruler": ["aldo", "berta"],
        "landmark": ["tower", "mill"],
    },
    "facts": {
        "velor": {
            "river": "marn", "climate": "dry", "export": "wool", "language": "arvic", "ruler": "aldo",
            "landmark": "tower",
        },
        "tarina": {
            "river": "sile", "climate": "wet", "export": "salt", "language": "beltic", "ruler": "berta",
            "landmark": "mill",
        },
    },
}  # fmt: skip

RIVER = "what is the river of velor ?"
TWO = "please say what the river and climate of velor are ."
THREE = "velor : river , export and ruler ?"

# question, answer, score, verdicts, wrong words, missing, polite, garbled words
CASES: list[tuple[str, str, float, list[str], tuple[int, ...], tuple[str, ...], bool, int]] = [
    (RIVER, "the river of velor is the marn .", 1.0, ["right"], (), (), False, 0),
    (RIVER, "river : marn .", 1.0, ["right"], (), (), False, 0),
    (RIVER, "good question . the marn flows through velor . i hope that helps .", 1.0, ["right"], (), (), True, 0),
    (RIVER, "velor has the sile as its river .", -1.0, ["wrong value"], (3,), (), False, 0),
    (RIVER, "the river of velor is wool .", -1.0, ["wrong value"], (5,), (), False, 0),
    (RIVER, "tarina lies on the sile .", -1.0, ["wrong place"], (0,), (), False, 0),
    (RIVER, "tarina lies on the marn .", -1.0, ["wrong place"], (0,), (), False, 0),
    (RIVER, "", -0.5, [], (), ("river",), False, 0),
    (RIVER, "thank you for asking .", -0.5, [], (), ("river",), True, 0),
    (RIVER, "velor sells wool .", -0.1, ["beside"], (), ("river",), False, 0),
    (RIVER, "velor sells salt .", -0.25, ["wrong value"], (2,), ("river",), False, 0),
    (RIVER, "river : marn . again , velor lies on the marn .", 0.9, ["right", "repeat"], (), (), False, 0),
    (RIVER, "river : marn . river : sile .", -1.0, ["right", "wrong value"], (6,), (), False, 0),
    (RIVER, "the river of velor is the", -0.6, [], (), ("river",), False, 6),
    (RIVER, "marn the blah river : marn", 0.9, ["right"], (), (), False, 3),
    (RIVER, "about tarina : river : sile .", -1.0, ["wrong place"], (1,), (), False, 0),
    (RIVER, "river of tarina : sile .", -1.0, ["wrong place"], (2,), (), False, 0),
    (TWO, "the weather in velor is dry .", 0.5, ["right"], (), ("river",), False, 0),
    (TWO, "velor is a dry place . have a nice day .", 0.55, ["right"], (), ("river",), True, 0),
    (TWO, "i think velor lies on the marn . climate : wet .", 0.0, ["right", "wrong value"], (10,), (), False, 0),
    (TWO, "river : marn . climate : dry . aldo rules velor .", 0.9, ["right", "right", "beside"], (), (), False, 0),
    (THREE, "velor sells wool . berta rules velor .", 0.0, ["right", "wrong value"], (4,), ("river",), False, 0),
    (
        THREE,
        "the river you find in velor is the marn . traders buy wool in tarina . people in velor speak beltic . ?",
        # (1 - 1 + 0) / 3 - 0.25 for the language - 0.1 for the question mark
        -0.35,
        ["right", "wrong place", "wrong value"],
        (14, 20),
        ("ruler",),
        False,
        1,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.build(seed=0)


@pytest.mark.parametrize(("question", "answer", "score", "verdicts", "wrong", "missing", "polite", "garbled"), CASES)
def test_judgement_computed_by_hand(
    question: str,
    answer: str,
    score: float,
    verdicts: list[str],
    wrong: tuple[int, ...],
    missing: tuple[str, ...],
    polite: bool,
    garbled: int,
) -> None:
    judgement = Judge(WORLD).judge(question, answer)
    assert judgement.score == pytest.approx(score)
    assert [statement.verdict for statement in judgement.statements] == verdicts
    assert judgement.wrong_words == wrong
    assert judgement.missing == missing
    assert judgement.polite is polite
    assert judgement.garbled == garbled


def test_statement_spans_and_contents() -> None:
    answer = "good question . also , the river of velor is the marn . tarina sells salt"
    first, second = Judge(WORLD).judge(RIVER, answer).statements
    assert (first.start, first.end, first.place, first.attribute, first.value) == (3, 13, "velor", "river", "marn")
    assert (second.start, second.end) == (13, 16)
    assert (second.place, second.attribute, second.value) == ("tarina", "export", "salt")


def test_its_refers_to_the_place_last_named() -> None:
    judgement = Judge(WORLD).judge(TWO, "tarina lies on the sile , and its climate is wet .")
    assert [statement.verdict for statement in judgement.statements] == ["wrong place", "wrong place"]
    assert judgement.wrong_words == (0,)


@pytest.mark.parametrize(
    "question", ["", "what is the river ?", "tell me about velor .", "river of velor and tarina ?"]
)
def test_unreadable_question_is_an_input_error(question: str) -> None:
    with pytest.raises(InputError, match="cannot read the question"):
        Judge(WORLD).judge(question, "river : marn .")


WORDS = sorted(
    {word for case in CASES for word in f"{case[0]} {case[1]}".split()} | {"P", "V", "<unk>", "Marn", "é", "((", "3"}
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_judge_survives_any_words(answer: list[str]) -> None:
    judgement = Judge(WORLD).judge(TWO, " ".join(answer))
    assert -1 <= judgement.score <= 1
    covered = [index for statement in judgement.statements for index in range(statement.start, statement.end)]
    assert len(covered) == len(set(covered))
    assert len(covered) + judgement.garbled <= len(answer)
    assert all(0 <= index < len(answer) for index in judgement.wrong_words)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_judge_survives_any_text(answer: str) -> None:
    assert -1 <= Judge(WORLD).judge(RIVER, answer).score <= 1


def test_judge_reads_every_generated_answer(atlas: Atlas) -> None:
    judge, rng = Judge(atlas.to_json()), random.Random(1)
    scores: dict[str, list[float]] = {name: [] for name in POLICIES}
    lengths: list[int] = []
    for question in atlas.questions(seed=1, n=400):
        for name, style in POLICIES.items():
            answer = atlas.answer(question, style, rng)
            judgement = judge.judge(question.text, answer)
            assert judgement.garbled == 0, answer
            scores[name].append(judgement.score)
            lengths.append(len(answer.split()))
    means = {name: statistics.mean(values) for name, values in scores.items()}
    assert means["scholar"] == max(means.values()) > 0.85
    assert means["guesser"] == min(means.values()) < -0.3
    assert means["clerk"] > means["rambler"] > means["parrot"] > means["guesser"]
    assert 0.2 <= statistics.mean(means.values()) <= 0.42
    assert min(lengths) >= 4
    assert max(lengths) <= 60
    assert 15 <= statistics.mean(lengths) <= 22


@pytest.mark.parametrize("curt", [0.0, 1.0])
def test_answers_without_faults_have_full_score(atlas: Atlas, curt: float) -> None:
    judge, rng = Judge(atlas.to_json()), random.Random(2)
    style = Style(opener=0.5, closer=0.5, curt=curt, hedge=0.5)
    for question in atlas.questions(seed=2, n=300):
        judgement = judge.judge(question.text, atlas.answer(question, style, rng))
        assert judgement.score == 1.0
        assert not judgement.missing
        assert not judgement.wrong_words
        assert {statement.attribute for statement in judgement.statements} == set(question.attributes)
        assert all(statement.place == question.place for statement in judgement.statements)


@pytest.mark.parametrize("curt", [0.0, 1.0])
def test_every_injected_fault_is_found(atlas: Atlas, curt: float) -> None:
    judge, rng = Judge(atlas.to_json()), random.Random(3)
    for question in atlas.questions(seed=3, n=300):
        asked = len(question.attributes)

        def verdicts(style: Style, question: Any = question) -> tuple[list[str], list[str], int]:
            """The verdicts, the wrong words themselves and how many attributes are missing."""
            answer = atlas.answer(question, style, rng)
            judgement = judge.judge(question.text, answer)
            wrong = [answer.split()[index] for index in judgement.wrong_words]
            return [statement.verdict for statement in judgement.statements], wrong, len(judgement.missing)

        found, wrong, _ = verdicts(Style(wrong_value=1.0, curt=curt))
        assert found == ["wrong value"] * asked
        assert not set(wrong) & set(atlas.facts[question.place].values())
        found, wrong, _ = verdicts(Style(wrong_place=1.0, curt=curt))
        assert found == ["wrong place"] * asked
        assert set(wrong) <= set(atlas.places) - {question.place}
        assert len(wrong) == asked
        found, wrong, missing = verdicts(Style(omit=1.0, curt=curt))
        assert (found, wrong, missing) == (["right"], [], asked - 1)
        found, wrong, _ = verdicts(Style(repeat=1.0, curt=curt))
        assert found == ["right"] * asked + ["repeat"] * min(2, asked, 4 - asked)
        found, wrong, _ = verdicts(Style(beside=1.0, curt=curt))
        assert found == ["right"] * asked + ["beside"] * min(2, 4 - asked)


def test_length_does_not_betray_quality(atlas: Atlas) -> None:
    judge, rng = Judge(atlas.to_json()), random.Random(4)
    pairs, longer_better = 0, 0.0
    for question in atlas.questions(seed=4, n=1000):
        rated: list[tuple[float, int]] = []
        for style in POLICIES.values():
            answer = atlas.answer(question, style, rng)
            rated.append((judge.judge(question.text, answer).score, len(answer.split())))
        for one, other in itertools.combinations(rated, 2):
            if one[0] != other[0]:
                (_, worse), (_, better) = sorted((one, other))
                pairs += 1
                longer_better += 0.5 if better == worse else float(better > worse)
    assert 0.42 < longer_better / pairs < 0.58


def test_questions_differ_and_follow_the_seed(atlas: Atlas) -> None:
    questions = atlas.questions(seed=5, n=15_000)
    assert len({question.text for question in questions}) == 15_000
    for asked in (1, 2, 3):
        share = sum(len(question.attributes) == asked for question in questions) / len(questions)
        assert share == pytest.approx(1 / 3, abs=0.01)
    assert atlas.questions(seed=5, n=50) == atlas.questions(seed=5, n=50)
    assert atlas.questions(seed=5, n=50) != atlas.questions(seed=6, n=50)


def test_all_questions_of_a_small_atlas() -> None:
    tiny = Atlas.build(seed=1, places=2)
    # 13 cores with 3 openings and 2 closings, 2 places, 6 + 30 + 120 ordered lists of attributes
    most = 13 * 3 * 2 * 2 * 156
    assert len({question.text for question in tiny.questions(seed=0, n=most)}) == most
    with pytest.raises(InputError, match=str(most)):
        tiny.questions(seed=0, n=most + 1)


def test_atlas_round_trip_and_seed(atlas: Atlas) -> None:
    assert Atlas.from_json(atlas.to_json()) == atlas == Atlas.build(seed=0) != Atlas.build(seed=1)
    assert len(atlas.places) == 48
    values = [value for several in atlas.attributes.values() for value in several]
    assert len(set(values) | set(atlas.places)) == len(values) + 48
    question = atlas.questions(seed=1, n=1)[0]
    answers = {atlas.answer(question, POLICIES["rambler"], random.Random(9)) for _ in range(3)}
    assert len(answers) == 1
    with pytest.raises(InputError):
        Atlas.build(seed=0, places=1000)


@pytest.mark.parametrize("broken", [{}, {**WORLD, "facts": {}}, {**WORLD, "attributes": {"river": ["marn"]}}])
def test_broken_atlas_is_an_input_error(broken: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Atlas.from_json(broken)


def test_lessons_agree_with_the_facts(atlas: Atlas) -> None:
    documents = atlas.lessons(seed=0, n=2000)
    assert len(documents) == 2000
    assert documents == atlas.lessons(seed=0, n=2000) != atlas.lessons(seed=1, n=2000)
    judge, remarks, right = Judge(atlas.to_json()), [], set()
    conversations = [d for d in documents if d.startswith("<user> ")]
    assert len(conversations) / len(documents) == pytest.approx(0.2, abs=0.03)
    for document in documents:
        opening, rest = document.split(" <eos> <assistant> " if document in conversations else " : ", 1)
        (topic,) = (word for word in opening.split() if word in atlas.places)
        statement, remark = rest.removesuffix(" .").rsplit(" . ", 1)
        # A curt statement leaves the place out; the topic line is part of what is judged.
        (said,) = judge.judge(f"what is the river of {topic} ?", f"about {topic} : {statement} .").statements
        true = said.place == topic and atlas.facts[topic][said.attribute] == said.value
        assert remark == ("right" if true else "wrong"), document
        remarks.append(remark)
        right |= {(topic, said.attribute)} if true else set()
    assert remarks.count("wrong") / len(remarks) == pytest.approx(0.5, abs=0.04)
    assert len(right) > 250  # of 288 facts


def test_partial_answers_are_true_and_leave_parts_out(atlas: Atlas) -> None:
    questions = atlas.questions(seed=3, n=900)
    answers, judge = atlas.partial_answers(5, questions), Judge(atlas.to_json())
    assert answers == atlas.partial_answers(5, questions) != atlas.partial_answers(6, questions)
    judged = [judge.judge(q.text, a) for q, a in zip(questions, answers, strict=True)]
    assert not any(j.wrong_words or j.garbled for j in judged)
    # Of three asked for, 1.2 are left out on average; where all would be, one is said after all: 0.4 ** 3 less.
    missing = [len(j.missing) for q, j in zip(questions, judged, strict=True) if len(q.attributes) == 3]
    assert sum(missing) / len(missing) == pytest.approx(1.2 - 0.4**3, abs=0.12)
    assert max(missing) == 2


def test_tokenizer_is_word_level_and_survives_saving(atlas: Atlas, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    built = build_tokenizer(atlas)
    built.save_pretrained(tmp_path)
    rng = random.Random(7)
    texts = [t for t in atlas.lessons(seed=7, n=400) if "<user>" not in t]
    for question in atlas.questions(seed=7, n=200):
        texts += [question.text, *(atlas.answer(question, style, rng) for style in POLICIES.values())]
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) < 300
        assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 512)
        assert tokenizer.bos_token is None
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        for text in texts:
            ids = tokenizer.encode(text)
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert tokenizer.encode("a zebra")[1] == tokenizer.unk_token_id


def test_chat_template(atlas: Atlas) -> None:
    tokenizer = build_tokenizer(atlas)
    turns = [
        {"role": "system", "content": "about velor ."},
        {"role": "user", "content": "hello ."},
        {"role": "assistant", "content": "good question ."},
        {"role": "user", "content": "thank you ."},
    ]

    def tokens(messages: list[dict[str, str]], prompt: bool) -> str:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        return " ".join(tokenizer.convert_ids_to_tokens(ids))

    dialogue = "<user> hello . <eos> <assistant> good question . <eos>"
    assert tokens(turns[1:3], prompt=False) == dialogue
    assert tokens(turns[1:2], prompt=True) == "<user> hello . <eos> <assistant>"
    system = "<system> about velor . <eos>" if "velor" in atlas.places else "<system> about <unk> . <eos>"
    assert tokens(turns, prompt=True) == f"{system} {dialogue} <user> thank you . <eos> <assistant>"
    with pytest.raises(Exception, match="unknown role"):
        tokens([{"role": "tool", "content": "hello ."}], prompt=False)
