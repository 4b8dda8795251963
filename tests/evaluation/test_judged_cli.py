"""`dvpo evaluate mt-bench | arena-hard | win-rate` from end to end, against a judge on a socket that misbehaves."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dvpo.evaluation.mt_bench import PROMPT
from reproduce.cli import run

pytest.importorskip("openai", reason="a judge needs dvpo[judge]")

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
QUICK = ["--timeout", "1", "--retries", "1", "--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "DVPO_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight questions of two turns, one of each category; four hard prompts; answers to both."""
    write(
        tmp_path / "mt_bench_questions.jsonl",
        [
            {
                "question_id": i,
                "category": c,
                "turns": [f"where is town{i} ?", "and why ?"],
                "reference": ["here", "so"],
            }
            for i, c in enumerate(CATEGORIES)
        ],
    )
    write(tmp_path / "arena_hard_questions.jsonl", [{"uid": f"u{i}", "prompt": f"hard {i}"} for i in range(4)])
    for name in ("strong", "weak"):
        rows = [{"uid": f"u{i}", "model": name, "choices": [{"turns": [f"{name} {i}"]}]} for i in range(4)]
        write(tmp_path / f"{name}.jsonl", rows)
    rows = [{"question_id": i, "model": "talker", "turns": [f"first{i}", f"second{i}"]} for i in range(8)]
    write(tmp_path / "talker.jsonl", rows)
    return tmp_path


def mt_bench(model: object, folder: Path, url: str, *more: str) -> list[str]:
    start = ["evaluate", "mt-bench", "--model", str(model), "--benchmark-data", str(folder), "--judge-model", "fake"]
    return [*start, "--judge-url", url, "--archive", str(folder / "kept"), *QUICK, *more]


def document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def misbehaving(body: dict, attempt: int) -> object:
    """What is done to the judgments of each question, told by its first turn."""
    text = body["messages"][-1]["content"]
    number = next(i for i in range(8) if f"town{i}" in text)
    orders = {
        0: {"status": 500} if attempt == 1 else "Rating: [[2]]",
        1: {"status": 429, "retry_after": 1} if attempt == 1 else "Rating: [[3]]",
        2: "colourless green ideas",
        3: {"message": {"content": None, "refusal": "no"}},
        4: {"silence": 3},
        5: {"raw": b"<html>", "type": "text/html"},
    }
    return orders.get(number, "Rating: [9]")


def test_a_policy_is_judged_by_a_judge_that_misbehaves_and_replayed_offline(
    fake_judge, checkpoints, folder, capsys
) -> None:
    server = fake_judge(misbehaving)
    command = mt_bench(checkpoints["llama", "policy"], folder, server.url, "--concurrency", "16")
    out = folder / "result.json"
    found = document([*command, "--out", str(out)], capsys)
    assert json.loads(out.read_text()) == found
    assert found["benchmark"] == "MT-Bench"
    assert found["part"] == "8 of 80 questions"
    assert found["failures"] == {"unparsable": 2, "refused": 2, "timed out": 2, "malformed response": 2}
    assert (found["judgments"], found["failed"], found["score"]) == (16, 8, (2 + 3 + 9 + 9) / 4)
    assert found["judge"]["model"] == "fake"
    assert found["judge"]["prompt_sha256"] == PROMPT.sha256
    assert found["judge"]["reported_models"] == ["fake-0613"]
    assert found["model"]["name"] == "llama-policy"
    assert len(found["model"]["policy_sha256"]) == 64
    assert str(folder) not in json.dumps(found)
    # The judge is asked about what the policy really answered: its archived answers stand in the requests.
    answers = [json.loads(p.read_text())["text"] for p in (folder / "kept" / "answers").rglob("*.json")]
    assert len(answers) == 16
    assert all(any(a in b["messages"][-1]["content"] for b in server.bodies) for a in answers)

    asked = len(server.bodies)
    replayed = document(mt_bench(checkpoints["llama", "policy"], folder, "http://127.0.0.1:9/v1", "--offline"), capsys)
    assert replayed == found
    assert len(server.bodies) == asked

    # Failures that may pass are asked about again; verdicts, nonsense and refusals are not.
    server.script = lambda body, attempt: "[[8]]"
    again = document(command, capsys)
    assert len(server.bodies) == asked + 4
    assert again["failures"] == {"unparsable": 2, "refused": 2}


def test_an_interrupted_run_goes_on_where_it_stopped(fake_judge, folder, capsys) -> None:
    reached = threading.Event()

    def stalls(body: dict, attempt: int) -> object:
        if len(server.bodies) <= 5:
            return "[[4]]"
        reached.set()
        return {"silence": 30}

    server = fake_judge(stalls)
    command = mt_bench(folder / "talker.jsonl", folder, server.url, "--concurrency", "1", "--timeout", "60")
    process = subprocess.Popen(
        [sys.executable, "-m", "reproduce.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        # A shell that has started the tests in the background has had interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert reached.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "run the same command to go on" in said
    kept = list((folder / "kept" / "judgments").rglob("*.json"))
    assert len(kept) == 5
    assert not [p for p in folder.rglob(".*.json*") if p.is_file()]

    assert run([*command, "--offline"]) == 1
    assert "lacks 0 of 8 answers and 11 of 16 judgments" in capsys.readouterr().err
    before = len(server.bodies)
    server.script = lambda body, attempt: "[[4]]"
    resumed = document(command, capsys)
    assert len(server.bodies) == before + 11
    assert (resumed["score"], resumed["failed"]) == (4, 0)
    assert document([*command, "--offline"], capsys) == resumed


def test_a_dry_run_asks_nobody_and_counts(fake_judge, folder, checkpoints, capsys) -> None:
    server = fake_judge(lambda body, attempt: "[[4]]")
    prices = ["--price-in", "10", "--price-out", "30", "--judge-max-tokens", "100"]
    command = mt_bench(checkpoints["llama", "policy"], folder, server.url, *prices)
    plan = document([*command, "--dry-run"], capsys)
    assert server.bodies == []
    assert not (folder / "kept").exists()
    assert (plan["answers_to_make"], plan["requests"], plan["archived"]) == ({"model": 8}, 16, 0)
    assert plan["output_tokens_at_most"] == 1600
    assert plan["cost_at_most"] == pytest.approx((plan["input_tokens"] * 10 + 1600 * 30) / 1e6)

    talker = mt_bench(folder / "talker.jsonl", folder, server.url, *prices)
    plan = document([*talker, "--dry-run"], capsys)
    document(talker, capsys)
    characters = sum(len(m["content"]) for b in server.bodies for m in b["messages"])
    assert plan["input_tokens"] == -(-characters // 4)
    plan = document([*talker, "--dry-run"], capsys)
    assert (plan["requests"], plan["archived"], plan["cost_at_most"]) == (16, 16, 0)


def test_arena_hard_in_two_games(fake_judge, folder, capsys) -> None:
    def script(body: dict, attempt: int) -> str:
        text = body["messages"][1]["content"]
        return "[[A>>B]]" if text.index("strong") < text.index("weak") else "[[B>A]]"

    server = fake_judge(script)
    start = [
        "evaluate",
        "arena-hard",
        "--benchmark-data",
        str(folder),
        "--judge-model",
        "fake",
        "--judge-url",
        server.url,
    ]
    start += ["--archive", str(folder / "kept")]
    command = [*start, "--model", str(folder / "strong.jsonl"), "--baseline", str(folder / "weak.jsonl")]
    found = document(command, capsys)
    assert found["part"] == "4 of 500 questions"
    assert found["bradley_terry"]["win_rate"] == found["mean"]["win_rate"] == 100
    assert (found["model"]["name"], found["baseline"]["name"]) == ("strong", "weak")
    assert found["labels"] == {"A>>B": 4, "A>B": 4, "A=B": 0, "B>A": 0, "B>>A": 0}
    # The other way round the same eight requests decide, and all are archived.
    back = document([*start, "--model", str(folder / "weak.jsonl"), "--baseline", str(folder / "strong.jsonl")], capsys)
    assert back["bradley_terry"]["win_rate"] == 0
    assert len(server.bodies) == 8
    assert back["identity_sha256"] != found["identity_sha256"]
    assert run(command) == 0
    assert "win rate %" in capsys.readouterr().out


def test_the_win_rate_with_another_prompt(fake_judge, folder, capsys) -> None:
    server = fake_judge(lambda body, attempt: "Score: 4" if "strong" in body["messages"][-1]["content"] else "Score: 1")
    prompt = folder / "mine.yaml"
    prompt.write_text('answer: [{role: user, content: "MINE {question} {answer}"}]\n')
    answers = {
        name: [{"prompt": f"hard {i}", "output": f"{name} {i}"} for i in range(3)] for name in ("strong", "poor")
    }
    command = [
        "evaluate",
        "win-rate",
        "--data",
        str(write(folder / "prompts.jsonl", [{"prompt": f"hard {i}"} for i in range(4)])),
    ]
    command += ["--model", str(write(folder / "s.jsonl", answers["strong"]))]
    command += ["--baseline", str(write(folder / "p.jsonl", answers["poor"]))]
    command += ["--judge-model", "fake", "--judge-url", server.url, "--archive", str(folder / "kept")]
    own = document(command, capsys)
    other = document([*command, "--judge-prompt", str(prompt)], capsys)
    for found in (own, other):
        assert (found["win_rate"], found["wins"], found["failed"]) == (100, 3, 1)
        assert found["failures"] == {"no answer: not in the file": 1}
        assert found["points"] == {"policy": 4, "baseline": 1}
    assert own["judge"]["prompt_sha256"] != other["judge"]["prompt_sha256"]
    assert server.bodies[-1]["messages"][0]["content"].startswith("MINE hard")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--benchmark-data", "nowhere"], "nowhere is no file or folder"),
        (["--judge-prompt", "nowhere.yaml"], "nowhere.yaml: no judge's prompt"),
        (["--dtype", "int4"], "--dtype is int4"),
    ],
)
def test_wrong_input_is_said_before_anything_is_asked(change, says, fake_judge, folder, capsys) -> None:
    server = fake_judge(lambda body, attempt: "[[4]]")
    assert run([*mt_bench(folder / "talker.jsonl", folder, server.url), *change]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
    assert server.bodies == []
