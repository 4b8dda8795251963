"""The benchmark: what it sends, how it compares, and one run of it against a bare pass through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dvpo.errors import InputError
from server.bench import Source, against_vllm, compare, distinct_texts, shared_prompts
from server.bench_targets import Bare, Outcome, Target, Workload

ROOT = Path(__file__).parents[2]


class Clock(Target):
    """Takes as many seconds as it is told, and notes what it was given."""

    def __init__(self, name: str, seconds: list[float], log: list[tuple[str, Workload]]) -> None:
        self.name, self.seconds, self.log = name, iter(seconds), log

    def run(self, workload: Workload) -> Outcome:
        self.log.append((self.name, workload))
        seconds = next(self.seconds)
        return Outcome(seconds, [], [seconds / 10] if self.name == "ours" else [])


def test_workloads_are_what_they_say(tokenizer) -> None:
    distinct = distinct_texts(Source(tokenizer))
    assert (len(distinct.requests), distinct.clients) == (64, 16)
    assert len({tuple(t.prompt_ids) for t in distinct.texts}) == 64
    assert 270 <= distinct.tokens / 64 <= 330
    shared = shared_prompts(Source(tokenizer))
    for request in shared.requests:
        assert len({tuple(t.prompt_ids) for t in request}) == 1 and len(request) == 8
        assert all(len(t.prompt_ids) == 512 and 67 <= len(t.response_ids) <= 133 for t in request)
    assert len({tuple(r[0].prompt_ids) for r in shared.requests}) == 4
    for clients, requests, texts in ((1, 4, 8), (6, 6, 8), (16, 16, 4), (64, 64, 1), (200, 64, 1)):
        parts = shared_prompts(Source(tokenizer), clients).requests
        assert len(parts) == requests and {len(part) for part in parts} == {texts}
    special = set(tokenizer.all_special_ids)
    assert not special & {i for t in distinct.texts for i in t.prompt_ids + t.response_ids}


def test_the_same_seed_gives_the_same_texts_and_a_round_gives_new_ones(tokenizer) -> None:
    first, second = Source(tokenizer), Source(tokenizer)
    assert distinct_texts(first) == distinct_texts(second)
    assert distinct_texts(first) != distinct_texts(Source(tokenizer))


def test_texts_of_a_file(tokenizer, tmp_path) -> None:
    words = [w for w in tokenizer.get_vocab() if w.isalpha()][:40]
    (tmp_path / "t.txt").write_text(" ".join(words * 60))
    ids = tokenizer(" ".join(words * 60), add_special_tokens=False)["input_ids"]
    passage = Source(tokenizer, tmp_path / "t.txt").take(50)
    assert any(ids[i : i + 50] == passage for i in range(len(ids)))
    (tmp_path / "short.txt").write_text("one two")
    for name, said in (("short.txt", "at least 1000"), ("none.txt", "cannot be read as text")):
        with pytest.raises(InputError, match=said):
            Source(tokenizer, tmp_path / name)


def test_rounds_are_in_turns_and_the_first_is_not_counted(tokenizer) -> None:
    log: list[tuple[str, Workload]] = []
    ours, other = Clock("ours", [9, 1, 2, 4], log), Clock("other", [9, 4, 4, 4], log)
    found = compare(lambda source: distinct_texts(source, 2), Source(tokenizer), ours, other, 3)
    order = [name for name, _ in log]
    assert order == ["other", "ours", "ours", "other"] * 2
    assert all(log[i][1] == log[i + 1][1] for i in range(0, 8, 2)) and log[0][1] != log[2][1]
    document = found.document()
    assert document["ratio"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    # Of the waits 0.1, 0.2 and 0.4 s of the counted rounds; 0.98 of the way between the last two.
    assert document["ours_seconds"] == pytest.approx({"p50": 0.2, "p99": 0.396})
    assert document["other_seconds"] is None


def test_a_bare_pass_gives_the_values_in_order(checkpoints, tokenizer) -> None:
    from server.backends.transformers import TransformersBackend

    workload = distinct_texts(Source(tokenizer), 3)
    short = Workload(
        "short", 1, [[type(t)(t.prompt_ids[:20], t.response_ids[: 5 + i])] for i, t in enumerate(workload.texts)]
    )
    outcome = Bare(checkpoints["llama", "value"], "float32").run(short)
    expected = TransformersBackend(checkpoints["llama", "value"]).score(short.texts)
    assert outcome.seconds > 0 and not outcome.waits
    for found, scored in zip(outcome.values, expected, strict=True):
        assert np.abs(found - scored.values_S[1:]).max() <= 1e-5


def test_vllm_must_be_named(checkpoints, monkeypatch) -> None:
    monkeypatch.delenv("DVPO_VLLM_PYTHON", raising=False)
    with pytest.raises(InputError, match="DVPO_VLLM_PYTHON is not set"):
        against_vllm([], checkpoints["llama", "value"], "float32", None, 1)


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "reproduce.cli", "bench", "server", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_the_command_against_a_bare_pass(checkpoints, tmp_path) -> None:
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(checkpoints["llama", "value"])
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoints["llama", "value"] / name).read_bytes())
    done = bench("--gvm", str(tmp_path), "--rounds", "2", "--clients", "1", "--clients", "3", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["largest_difference"] <= 1e-5
    assert [row["workload"].rpartition(", ")[2] for row in document["workloads"]] == ["1 client", "3 clients"]
    for row in document["workloads"]:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert 0 < row["ours_seconds"]["p50"] <= row["ours_seconds"]["p99"]


def test_sigterm_ends_the_servers_too(tmp_path) -> None:
    said = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {said}.new; mv {said}.new {said}; exec sleep 600"]
    script = f"from server.bench_targets import Ours, _running\nwith _running(Ours, {command!r}, '1'): pass"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        for _ in range(600):
            if said.exists():
                break
            time.sleep(0.1)
        server = int(said.read_text())
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not Path(f"/proc/{server}").exists()
    finally:
        process.kill()


def test_wrong_options_end_with_2(tmp_path) -> None:
    done = bench("--gvm", str(tmp_path), "--against", "trl")
    assert (done.returncode, done.stderr.strip()) == (2, "error: --against trl: unknown; choose bare or vllm")
