"""AlpacaEval 2: the judge's preference, the win rates, and the alpaca_eval package's own numbers."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dvpo.errors import InputError
from dvpo.evaluation import alpaca_eval as ae
from dvpo.evaluation.answers import Answer, AnswersOfFile
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.benchmark_data import Benchmark, Question
from dvpo.evaluation.judge import Judge, Reply
from dvpo.files import list_files

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "alpaca_eval.json").read_text(encoding="utf-8"))
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("alpaca_eval") is None, reason="the package alpaca_eval is not installed"
)


@pytest.fixture
def gamed(tmp_path: Path) -> Path:
    path = tmp_path / "df_gamed.csv"
    path.write_text(GOLDEN["gamed_csv"], encoding="utf-8")
    return path


def of(annotation: dict[str, Any]) -> ae.Comparison:
    preference = annotation["preference"]
    return ae.Comparison(
        question=str(annotation["index"]),
        policy_is="M",
        preference=None if preference is None else preference - 1,
        failure="unparsable" if preference is None else None,
        policy_length=annotation["policy_length"],
        baseline_length=annotation["baseline_length"],
        place=annotation["index"],
    )


def test_the_policy_sits_where_the_package_puts_it() -> None:
    assert [ae.policy_is_first(text) for text in GOLDEN["instructions"]] == GOLDEN["switched"]
    assert {True, False} == set(GOLDEN["switched"])


@pytest.mark.parametrize("case", GOLDEN["logprobs"])
def test_preferences_are_those_of_the_package(case: dict[str, Any]) -> None:
    found = ae.first_preferred(Reply("", finish="length", logprobs=[case["top"]]))
    expected = case["preference"]
    assert found == (None if expected is None else pytest.approx(2 - expected, abs=1e-12))


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_raw_win_rates_are_those_of_the_package(case: dict[str, Any]) -> None:
    found, expected = ae.table([of(a) for a in case["annotations"]]), case["scores"]
    assert found["win_rate"] == pytest.approx(expected["win_rate"])
    assert found["standard_error"] == pytest.approx(expected["standard_error"])
    assert found["discrete_win_rate"] == pytest.approx(expected["discrete_win_rate"])
    counts = [found[name] for name in ("wins", "losses", "draws")]
    assert counts == [expected[name] for name in ("n_wins", "n_wins_base", "n_draws")]


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_the_length_controlled_win_rate_is_that_of_the_package(case: dict[str, Any], gamed: Path) -> None:
    import alpaca_eval
    import sklearn

    package = Path(alpaca_eval.__file__).parent
    before = {p: p.stat().st_mtime_ns for p in list_files(package) if p.suffix != ".pyc"}
    routing = sklearn.get_config()["enable_metadata_routing"]
    found = ae.length_controlled([of(a) for a in case["annotations"]], gamed, resamples=4)
    assert found["win_rate"] == pytest.approx(case["scores"]["length_controlled_winrate"], abs=0.01)
    assert found["standard_error"] == pytest.approx(case["scores"]["lc_standard_error"], abs=0.01)
    low, high = found["ci95"]
    assert 0 <= low < high <= 100
    assert {p: p.stat().st_mtime_ns for p in list_files(package) if p.suffix != ".pyc"} == before
    assert sklearn.get_config()["enable_metadata_routing"] == routing


def test_a_judge_that_likes_length_is_corrected() -> None:
    """In the first recorded case the longer output wins most; the model takes that out."""
    case = GOLDEN["cases"][0]["scores"]
    assert case["win_rate"] - case["length_controlled_winrate"] > 10


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply("m"), 1.0),
        (Reply(' "M".\n'), 0.0),
        (Reply("m", logprobs=[]), 1.0),
        (Reply("M", logprobs=[{"The": -0.1}]), 0.0),
        (Reply("m", logprobs=[{"M": -3.0}]), 1.0),
        (Reply("Mm"), None),
        (Reply(""), None),
        (Reply(None, "timed out"), None),
        (Reply(" m", logprobs=[{" m": math.log(0.6), "M": math.log(0.15), "m": math.log(0.15)}]), 5 / 6),
    ],
)
def test_the_name_is_read_where_there_are_no_probabilities(reply: Reply, expected: float | None) -> None:
    assert ae.first_preferred(reply) == (None if expected is None else pytest.approx(expected))


def test_numbers_worked_by_hand() -> None:
    rows = [
        ae.Comparison("a", "m", 0.9, None, 30, 10, 0),
        ae.Comparison("b", "m", 0.5, None, 20, 10, 1),
        ae.Comparison("c", "M", 0.1, None, 10, 10, 2),
        ae.Comparison("d", "M", 0.7, None, 20, 30, 3),
        ae.Comparison("e", "M", None, "refused", 20, 40, 4),
        ae.Comparison("f", "M", None, "no answer: not in the file", 0, 999, 5),
    ]
    found = ae.table(rows)
    assert found["win_rate"] == pytest.approx((90 + 50 + 10 + 70) / 4)
    # Deviations from 55: 35, -5, -45, 15; their squares sum to 3500.
    assert found["standard_error"] == pytest.approx(math.sqrt(3500 / 3 / 4))
    assert found["discrete_win_rate"] == pytest.approx(100 * 2.5 / 4)
    assert (found["wins"], found["draws"], found["losses"]) == (2, 1, 1)
    assert found["bounds"] == pytest.approx([220 / 6, 420 / 6])
    assert found["mean_length"] == {"model": 20, "baseline": 20}
    assert (found["questions"], found["failed"]) == (6, 2)
    assert found["failures"] == {"refused": 1, "no answer: not in the file": 1}
    assert found["length_controlled"] == {"win_rate": None, "why": "df_gamed.csv was not given"}
    low, high = found["ci95"]
    assert 10 <= low < 55 < high <= 90


def test_nothing_judged_gives_no_number() -> None:
    found = ae.table([ae.Comparison("a", "m", None, "unparsable", 1, 2, 0)])
    assert (found["win_rate"], found["ci95"], found["discrete_win_rate"]) == (None, None, None)
    assert found["bounds"] == [0, 100]


def test_why_there_is_no_length_controlled_rate(gamed: Path) -> None:
    def why(lengths: list[int], place: int | None) -> str:
        rows = [ae.Comparison(str(i), "m", 0.5, None, n, 5, place) for i, n in enumerate(lengths)]
        return ae.length_controlled(rows, gamed)["why"]

    assert "places" in why([1, 2], None)
    assert "differences of length" in why([7, 7], 3)


def test_places_are_known_of_the_whole_benchmark_only() -> None:
    questions = tuple(Question(f"q{i}", (f"Say {i}.",)) for i in range(5))
    assert ae.places_in(Benchmark("AlpacaEval 2", questions, 5)) == {f"q{i}": i for i in range(5)}
    assert ae.places_in(Benchmark("AlpacaEval 2", questions, 805)) == {}


def test_both_orders_are_read_as_the_same_preference() -> None:
    """Whoever is m, a judge that finds the policy's output better at 0.8 gives 0.8."""
    texts = [text for text, first in zip(GOLDEN["instructions"], GOLDEN["switched"], strict=True)][:4]
    questions = [Question(str(i), (text,)) for i, text in enumerate(texts)]
    ours, theirs = [Answer(("good",))] * 4, [Answer(("poor",))] * 4
    asked = ae.requests(questions, ours, theirs, ae.PROMPT, 1)
    replies = []
    for (request,) in asked:
        text = request.messages[-1]["content"]
        good_is_m = text.index("good") < text.index("poor")
        top = {"m": math.log(0.8 if good_is_m else 0.2), "M": math.log(0.2 if good_is_m else 0.8)}
        replies.append([Reply("m", finish="length", logprobs=[top])])
    found = ae.comparisons(questions, ours, theirs, replies, {"2": 7})
    assert [c.preference for c in found] == [pytest.approx(0.8)] * 4
    assert [c.policy_is == "m" for c in found] == GOLDEN["switched"][:4]
    assert {c.policy_is for c in found} == {"m", "M"}
    assert [c.place for c in found] == [None, None, 7, None]


def top(**probabilities: float) -> dict[str, Any]:
    likeliest = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in probabilities.items()]
    return {"content": [likeliest[0] | {"top_logprobs": likeliest}], "refusal": None}


def test_end_to_end_with_a_judge_that_misbehaves(tmp_path: Path, fake_judge: Any) -> None:
    """Six instructions: two verdicts, one without log-probabilities, one refusal, one draw and one unanswered."""

    def script(body: dict[str, Any], attempt: int) -> Any:
        text = body["messages"][-1]["content"]
        if "task 2" in text and "logprobs" in body:
            return {"status": 400}
        if "task 2" in text:
            return {"message": {"content": "M"}, "finish": "length"}
        if "task 3" in text:
            return {"message": {"content": "Sorry"}, "finish": "length", "logprobs": top(Sorry=0.9, I=0.1)}
        return {"message": {"content": "m"}, "finish": "length", "logprobs": top(m=0.6, M=0.2, The=0.2)}

    server = fake_judge(script)
    questions = tuple(Question(f"q{i}", (f"This is task {i}.",)) for i in range(6))
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("policy", "baseline")}
    for name, path in paths.items():
        rows = [{"instruction": q.turns[0], "output": "same" if q.id == "q4" else f"{name} {q.id}"} for q in questions]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if name == "policy" or row != rows[5]))
    judge = Judge("fake", Archive(tmp_path / "judgments"), url=server.url)
    policy, baseline = (AnswersOfFile(path) for path in paths.values())
    work = ae.alpaca_eval(Benchmark("AlpacaEval 2", questions, 805), policy, baseline, judge)
    assert work.estimate()[1].requests == 4
    document = work.run()

    def of_policy(first: float, question: Question) -> float:
        return first if ae.policy_is_first(question.turns[0]) else 1 - first

    expected = [of_policy(0.75, questions[0]), of_policy(0.75, questions[1]), of_policy(0, questions[2]), 0.5]
    assert [row["preference"] for row in document["rows"]] == [
        *map(pytest.approx, expected[:3]), None, pytest.approx(0.5), None
    ]  # fmt: skip
    assert document["win_rate"] == pytest.approx(25 * sum(expected))
    assert document["failures"] == {"refused": 1, "no answer: not in the file (baseline)": 1}
    assert document["part"] == "6 of 805 questions"
    first = server.bodies[0]
    assert (first["max_tokens"], first["logprobs"], first["top_logprobs"]) == (1, True, 5)
    assert len(server.bodies) == 5

    replay = Judge("fake", Archive(tmp_path / "judgments"), offline=True)
    again = ae.alpaca_eval(Benchmark("AlpacaEval 2", questions, 805), policy, baseline, replay).run()
    assert again == document
    assert len(server.bodies) == 5


def test_the_file_for_the_length_model_is_checked_first(tmp_path: Path, gamed: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv cannot be read"):
        ae.check_gamed(tmp_path / "nowhere.csv")
    other = tmp_path / "other.csv"
    other.write_text("model,index\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no column instruction_difficulty"):
        ae.check_gamed(other)
    if importlib.util.find_spec("alpaca_eval") is None:
        with pytest.raises(InputError, match=r"install dvpo\[alpaca\]"):
            ae.check_gamed(gamed)
    assert ae.gamed_file(str(gamed)) == gamed


def test_the_judges_prompt_can_be_another(tmp_path: Path) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text(
        'pair:\n- {role: user, content: "{instruction} | {output_1} | {output_2} | m or M?"}\n', encoding="utf-8"
    )
    prompt = ae.PROMPT.read(path)
    ((request,),) = ae.requests([Question("q", ("Hi {output_2}",))], [Answer(("a",))], [Answer(("b",))], prompt, 3)
    shown = "a | b" if ae.policy_is_first("Hi {output_2}") else "b | a"
    assert request.messages == ({"role": "user", "content": f"Hi {{output_2}} | {shown} | m or M?"},)
    assert (request.max_tokens, request.prompt_sha256) == (3, prompt.sha256)
    assert prompt.sha256 != ae.PROMPT.sha256
