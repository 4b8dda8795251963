"""The example that sets prompts and policies apart, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dvpo.data.formats import read

SCRIPT = Path(__file__).parents[2] / "examples" / "policies_apart.py"


def test_prompts_and_policies_are_apart_and_scores_are_ranks(tmp_path: Path) -> None:
    models = [f"m{i}" for i in range(8)]
    rows = [
        {
            "prompt": f"question {p}",
            "completions": [
                {"model": m, "response": f"{m} on {p}", "score": 1 + (i * 7 + p) % 5} for i, m in enumerate(models)
            ],
        }
        for p in range(12)
    ]
    data = tmp_path / "grouped.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([sys.executable, str(SCRIPT), str(data), str(tmp_path / "out")], check=True, capture_output=True)
    parts = {
        n: read(str(tmp_path / "out" / f"{n}.jsonl")).examples for n in ("train", "unseen_prompts", "unseen_policies")
    }
    prompts = {n: {e.prompt[-1]["content"] for e in part} for n, part in parts.items()}
    policies = {n: {r.policy for e in part for r in e.responses} for n, part in parts.items()}
    assert len(prompts["train"]) == 9 and not prompts["train"] & prompts["unseen_prompts"]
    assert prompts["unseen_prompts"] == prompts["unseen_policies"]
    assert policies["train"] == policies["unseen_prompts"] and len(policies["train"]) == 6
    assert policies["unseen_policies"] == set(models) - policies["train"]
    raw = {(row["prompt"], c["model"]): c["score"] for row in rows for c in row["completions"]}
    for example in parts["train"]:
        scores = [raw[example.prompt[-1]["content"], r.policy or ""] for r in example.responses]
        for i, j in example.preferences:
            assert scores[i] > scores[j]
        assert sum(r.score or 0.0 for r in example.responses) == pytest.approx(0)
        assert all(-1 <= (r.score or 0.0) <= 1 for r in example.responses)


def test_a_prompt_in_many_rows_is_on_one_side(tmp_path: Path) -> None:
    models = [f"m{i}" for i in range(4)]
    rows = [
        {
            "prompt": f"question {p % 4}",
            "completions": [{"model": m, "response": f"{m} {p}", "score": i} for i, m in enumerate(models)],
        }
        for p in range(12)
    ]
    data = tmp_path / "grouped.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([sys.executable, str(SCRIPT), str(data), str(tmp_path / "out")], check=True, capture_output=True)
    parts = [read(str(tmp_path / "out" / f"{n}.jsonl")).examples for n in ("train", "unseen_prompts")]
    prompts = [{e.prompt[-1]["content"] for e in part} for part in parts]
    assert [len(part) for part in parts] == [9, 3]
    assert [len(part) for part in prompts] == [3, 1] and prompts[0].isdisjoint(prompts[1])


def test_data_without_policies_ends_with_2(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    command = [sys.executable, str(SCRIPT), str(data), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "named policies" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
