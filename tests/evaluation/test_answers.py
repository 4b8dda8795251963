"""A policy's answers: archived, the same again, turn after turn; and answers from files of several forms."""

import json
from pathlib import Path

import pytest

from dvpo import models
from dvpo.data.templates import encode_prompt
from dvpo.errors import InputError
from dvpo.evaluation.answers import NOT_IN_FILE, TOO_LONG, AnswersOfFile, AnswersOfPolicy
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.benchmark_data import Question, load
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


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    source = AnswersOfFile(write(tmp_path / "x.jsonl", rows))
    found = source.to(QUESTIONS, HOT)
    assert [a.turns for a in found] == [("a", "b"), ("c", "d"), ("e", "f"), (), ()]
    assert [a.failure for a in found[3:]] == [NOT_IN_FILE] * 2
    one_turn = Question("3", (QUESTIONS[3].turns[0],))
    assert source.to([one_turn], [0.0])[0].turns == ("only one turn",)
    assert source.identity["name"] == "gpt, x"


@pytest.mark.parametrize(
    "answer",
    [
        {"turns": "Paris it is."},
        {"turns": {"content": "Paris it is."}},
        {"choices": [{"turns": "Paris it is."}]},
        {"output": "Paris it is."},
    ],
)
def test_one_text_is_one_turn(answer, tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", [{"id": "1", **answer}])
    assert AnswersOfFile(path).to([Question("1", ("Where?",))], [0.0])[0].turns == ("Paris it is.",)


TEXTS = ("Who?", "Where?", "When?")


def paired(folder, questions: list[dict], rows: list[dict]) -> list[str]:
    """The answer to each question, "-" where the file has none."""
    asked = load("alpaca_eval", write(folder / "q.jsonl", questions)).questions
    found = AnswersOfFile(write(folder / "x.jsonl", rows)).to(asked, [0.0] * len(asked))
    return [a.turns[0] if a.failure is None else "-" for a in found]


def test_the_text_of_a_question_says_more_than_a_number(tmp_path) -> None:
    bare = [{"instruction": t} for t in TEXTS]
    rows = [{"id": i, "instruction": f"{t}\n", "output": f"to {t}"} for i, t in enumerate(TEXTS)]
    assert paired(tmp_path, bare, rows) == ["to Who?", "to Where?", "to When?"]
    assert paired(tmp_path, bare, rows[:2]) == ["to Who?", "to Where?", "-"]
    other = [{"id": 1, "prompt": "<user>Where?", "output": "to Where?"}]
    assert paired(tmp_path, bare, other) == ["-", "-", "-"]
    by_number = [{"id": i, "output": f"number {i}"} for i in (1, 3)]
    assert paired(tmp_path, bare, by_number) == ["number 1", "-", "number 3"]


def test_an_id_tells_questions_of_one_text_apart_and_stands_where_the_text_is_of_none(tmp_path) -> None:
    named = [{"id": i, "instruction": t} for i, t in (("a", "Who?"), ("b", "Who?"), ("c", "When?"))]
    rows = [{"id": i, "instruction": "Who?", "output": f"by {i}"} for i in "ba"]
    rows.append({"id": "c", "prompt": "<user>When?", "output": "by c"})
    assert paired(tmp_path, named, rows) == ["by a", "by b", "by c"]
    assert paired(tmp_path, named, [{"instruction": "Who?", "output": "both"}]) == ["both", "both", "-"]
    assert paired(tmp_path, named, [{"id": 7, "prompt": ["When?", "Why?"], "output": "then"}]) == ["-", "-", "then"]


@pytest.mark.parametrize(
    ("ids", "rows", "says"),
    [
        ("abc", [{"id": "a", "instruction": "Who?"}, {"id": "c", "instruction": "Where?"}], "2: id c is not that of"),
        ("abc", [{"id": "s1", "prompt": "Who?"}, {"id": "s2", "prompt": "Who?"}], "2: a second answer to question a"),
        ("abc", [{"id": "a"}, {"prompt": "Who?"}], "2: a second answer to question a"),
        ("", [{"id": 0}, {"id": 1}, {"id": 2}], "1: id 0, but questions without ids are numbered from 1"),
    ],
)
def test_answers_that_name_no_question_for_certain_are_refused(ids, rows, says, tmp_path) -> None:
    questions = [{"instruction": t} for t in TEXTS]
    questions = [{"id": i, **q} for i, q in zip(ids, questions, strict=True)] if ids else questions
    with pytest.raises(InputError, match=rf"x\.jsonl:{says}"):
        paired(tmp_path, questions, [{**row, "output": "some"} for row in rows])


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
