"""`dvpo bench draw`: the page of a folder of results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dvpo.errors import InputError
from reproduce.bench import page
from reproduce.cli import app


def spread(middle: float) -> dict[str, float]:
    return {"median": middle, "low": middle * 0.9, "high": middle * 1.2}


MACHINE = {
    "device": {"cpu": "a <processor>", "cores": 2, "accelerator": None},
    "versions": {"torch": "2.0", "transformers": "5.0", "trl": "1.0"},
    "git_commit": "0123456789abcdef",
}
SERVER: dict[str, Any] = {
    "against": "vllm",
    "dtype": "float32",
    "rounds": 3,
    "cores": 2,
    "largest_difference": 1e-6,
    "workloads": [
        {
            "workload": "64 texts & 16 clients",
            "tokens_per_round": 10,
            "ours_tokens_per_second": spread(100),
            "other_tokens_per_second": spread(50),
            "ratio": spread(2),
            "ours_seconds": {"p50": 1.0, "p99": 2.0},
            "other_seconds": None,
        }
    ],
    "command": "dvpo bench server",
    "machine": MACHINE,
}
POLICY = {
    "precision": "float32",
    "prompts_per_update": 4,
    "max_new_tokens": 8,
    "methods": {
        "dvpo": {
            "seconds": spread(2),
            "memory_mb": 100.0,
            "phases": {"generate": 1.0, "reference": 0.25, "forward": 0.25, "backward": 0.5, "optimiser": 0.0},
        }
    },
    "ratios": {"dvpo / ppo": {"seconds": spread(0.5), "memory": 0.6}},
}
GROWTH = {
    "precision": "float32",
    "fits": [
        {
            "kind": "gvm",
            "axis": "batch",
            "what": "memory_mb",
            "exponent": 0.9,
            "predicted_exponent": 1.0,
            "largest_error": 0.02,
        }
    ],
}


def write(folder: Path, **documents: Any) -> Path:
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def test_every_result_has_its_pictures_and_its_numbers(tmp_path: Path) -> None:
    write(tmp_path, a=SERVER, b=POLICY, c=GROWTH, other={"rows": []})
    done = CliRunner().invoke(app, ["bench", "draw", str(tmp_path)])
    assert (done.exit_code, done.output.strip()) == (0, f"drawn: {tmp_path / 'bench.html'}")
    text = (tmp_path / "bench.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "The scoring server beside vLLM, float32",
        "An update of the policy: 4 prompts, at most 8 new tokens, float32",
        "How cost grows, float32",
    ]
    assert text.count("<svg") == 4  # two of the policy's
    for said in ("64 texts &amp; 16 clients", "2.00 (1.80-2.40)", "1.00, 2.00", "generate 1.00", "a &lt;processor&gt;"):
        assert said in text
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is loaded from elsewhere
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    before = text
    page.write(tmp_path)
    assert (tmp_path / "bench.html").read_text() == before


def test_the_parts_of_an_update() -> None:
    assert page._thirds(POLICY["methods"]["dvpo"]["phases"]) == pytest.approx((0.5, 0.125, 0.375))  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no results there"),
        ('{"rows": []}', "no results there"),
        ("[1]", "no results there"),
        ("{", "cannot be read as JSON"),
        (json.dumps({**SERVER, "workloads": [{}]}), "not a whole result"),
        (json.dumps({**SERVER, "workloads": 3}), "not a whole result"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=said):
        page.write(tmp_path)
    assert not (tmp_path / "bench.html").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results there"):
        page.write(tmp_path / "none")
