"""A policy's answers: archived, the same again, turn after turn; and answers from files of several forms."""

import json

import pytest

from dvpo import models
from dvpo.data.templates import encode_prompt
from dvpo.errors import InputError
from dvpo.evaluation.answers import NOT_IN_FILE, TOO_LONG, AnswersOfFile, AnswersOfPolicy
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.benchmark_data import Question
from dvpo.evaluation.judge import MISSING
from dvpo.rollout.transformers import TransformersEngine

QUESTIONS = [Question(str(i), (f"where is town {i} ?", "and what is there ?")) for i in range(5)]
HOT = [1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.fixture
def policy(checkpoints, tmp_path):
    def make(archive: str = "a", **changes) -> AnswersOfPolicy:
        settings = {"max_new_tokens": 6, "batch_size": 2, **changes}
        return AnswersOfPolicy(checkpoints["llama", "policy"], Archive(tmp_path / archive), **settings)

    return make


def test_the_second_turn_follows_the_first_answer(policy, checkpoints) -> None:
    question = QUESTIONS[0]
    (answer,) = policy().to([question], [0.0])
    folder = checkpoints["llama", "policy"]
    model, tokenizer = models.load(folder, "policy"), models.load_tokenizer(folder)
    engine = TransformersEngine(model, tokenizer, 6, 1.0)
    talk, texts = [], []
    for turn in question.turns:
        talk.append({"role": "user", "content": turn})
        (ids,) = engine.greedy([encode_prompt(tokenizer, talk)])
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
        talk.append({"role": "assistant", "content": texts[-1]})
    assert answer.turns == tuple(texts)


def test_what_is_archived_is_not_made_again(policy, monkeypatch) -> None:
    first = policy().to(QUESTIONS, HOT)
    monkeypatch.setattr(AnswersOfPolicy, "_load", lambda self: pytest.fail("the model was loaded"))
    assert policy().to(QUESTIONS, HOT) == first
    assert policy().to(QUESTIONS, HOT, archived_only=True) == first


def test_an_interrupted_run_gives_the_answers_of_one_that_was_not(policy, tmp_path) -> None:
    whole = policy("whole").to(QUESTIONS, HOT)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policy("cut", on_answer=stop).to(QUESTIONS, HOT)
    assert len(list((tmp_path / "cut").rglob("*.json"))) == 2
    assert policy("cut", batch_size=3).to(QUESTIONS, HOT) == whole


def test_seeds_and_temperatures_make_other_answers(policy) -> None:
    assert policy(seed=1).to(QUESTIONS, [1.0] * 5) != policy(seed=2).to(QUESTIONS, [1.0] * 5)
    greedy = policy(seed=1).to(QUESTIONS, [0.0] * 5)
    assert greedy == policy(seed=2).to(QUESTIONS, [0.0] * 5)
    assert greedy != policy(seed=1).to(QUESTIONS, [1.0] * 5)


def test_a_prompt_that_leaves_no_room_is_a_failure_that_is_said(policy) -> None:
    long = Question("long", ("town " * 255, "so ?"))
    found = policy().to([QUESTIONS[0], long], [0.0, 0.0])
    assert [a.failure for a in found] == [None, TOO_LONG]


def test_looking_up_makes_nothing(policy, tmp_path) -> None:
    assert {a.failure for a in policy().to(QUESTIONS, HOT, archived_only=True)} == {MISSING}
    assert not (tmp_path / "a").exists()


def test_forms_of_answer_files(tmp_path) -> None:
    rows = [
        {"id": "0", "turns": ["a", "b"]},
        {"question_id": 1, "model_id": "gpt", "choices": [{"turns": [{"content": "c"}, {"content": "d"}]}]},
        {
            "uid": 2,
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": {"answer": "e"}},
                {"role": "assistant", "content": "f"},
            ],
        },
        {"instruction": QUESTIONS[3].turns[0], "output": "only one turn", "generator": "gpt"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = AnswersOfFile(path)
    found = source.to(QUESTIONS, HOT)
    assert [a.turns for a in found] == [("a", "b"), ("c", "d"), ("e", "f"), (), ()]
    assert [a.failure for a in found[3:]] == [NOT_IN_FILE] * 2
    one_turn = Question("3", (QUESTIONS[3].turns[0],))
    assert source.to([one_turn], [0.0])[0].turns == ("only one turn",)
    assert source.identity["name"] == "gpt, x"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"turns": ["a"]}, "names the question"),
        ({"id": 1, "answer": "a"}, "no answer in"),
        ({"id": 1, "turns": [3]}, "no answer in"),
        ({"id": 1, "choices": []}, "no answer in"),
        ([1], "not an object"),
        ({"id": 1, "output": "\ud800"}, "not usable JSON"),
    ],
)
def test_malformed_answers_are_refused(row, says, tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"x\.jsonl:1") as error:
        AnswersOfFile(path)
    assert says in str(error.value)


def test_a_second_answer_to_a_question_is_refused(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1, "output": "a"}\n{"id": 1, "output": "b"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: a second answer to question 1"):
        AnswersOfFile(path)
