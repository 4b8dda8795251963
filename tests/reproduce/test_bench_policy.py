"""`dvpo bench policy`: the phases of an update, and one run of each of its two forms on tiny models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvpo import models
from dvpo.errors import InputError
from reproduce.bench import policy
from reproduce.bench.common import Job, in_turns


def prompts_file(tmp_path: Path, examples) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": list(e.prompt)}) + "\n" for e in examples))
    return str(path)


@pytest.fixture
def work(checkpoints, examples, tmp_path) -> policy.Work:
    folders = [checkpoints["llama", role] for role in ("policy", "value", "reward")]
    prompts = policy.read_prompts(folders[0], prompts_file(tmp_path, examples))
    return policy.Work(*folders, prompts, bf16=False, max_new_tokens=6)


def test_all_methods_answer_the_same_prompts_with_the_same_settings(work, examples, tmp_path) -> None:
    assert work.prompts == [e.prompt for e in examples[: policy.PROMPTS]]
    kinds = {name: work.settings(name).model_dump() for name in policy.METHODS}
    for settings in kinds.values():
        settings.pop("algorithm")
    assert len({json.dumps(s) for s in kinds.values()}) == 1
    with pytest.raises(InputError, match="only 3 prompts"):
        policy.read_prompts(work.start, prompts_file(tmp_path, examples[:3]))


def test_the_stopwatch_tells_models_apart_and_counts_what_is_nested_once(checkpoints, monkeypatch) -> None:
    """With a clock that moves only where a layer or the optimiser is called."""
    now = [0.0]
    monkeypatch.setattr(policy, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            now[0] += seconds

        return hook

    learning = models.load(checkpoints["llama", "policy"], "policy")
    frozen = models.load(checkpoints["llama", "value"], "value").requires_grad_(False)
    learning.model.layers[0].register_forward_hook(takes(5))
    frozen.model.layers[0].register_forward_hook(takes(2))
    optimizer = torch.optim.SGD(learning.parameters(), lr=0.0)
    watch = policy.Stopwatch()
    optimizer.register_step_pre_hook(takes(7))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        learning(ids, use_cache=True)  # generation: not counted here
        learning(ids, use_cache=False)
        frozen.base_model(ids, use_cache=False)  # the backbone alone counts too
    learning(ids, use_cache=False).logits.sum().backward()
    optimizer.step()
    found = watch.phases({"generate": 1.0, "judge": 20.0, "learn": 30.0})
    assert found == {
        "generate": 1.0,
        "reference": 0,
        "value": 2,
        "critic": 0,
        "old": 5,
        "other": 13,
        "forward": 5,
        "optimiser": 7,
        "backward": 18,
    }
    assert not any(watch.phases({"generate": 0.0, "judge": 0.0, "learn": 0.0}).values())  # since the last call


@pytest.mark.slow
def test_the_four_methods_side_by_side(work) -> None:
    rows = in_turns({name: Job(policy.update_ours, (work, name)) for name in policy.METHODS}, 1)
    found = policy.document(work, rows)
    for name, row in found["methods"].items():
        phases = row["phases"]
        assert all(phases[p] > 0 for p in ("generate", "reference", "value", "old", "forward", "backward", "optimiser"))
        assert (phases["critic"] > 0) == (name == "ppo")
        assert sum(phases.values()) <= row["seconds"]["median"]
        assert 1 <= row["response_tokens"]["median"] <= 6
        assert row["memory_mb"] > 0
    assert list(found["ratios"]) == ["dvpo / ppo", "dvpo / remax", "dvpo / grpo"]
    assert found["optimiser_steps_per_update"] == 4
    assert str(work.start) not in json.dumps(found)


@pytest.mark.slow
def test_our_grpo_beside_trls(work) -> None:
    jobs = {"grpo": Job(policy.update_ours, (work, "grpo")), "trl": Job(policy.update_trl, (work,))}
    found = policy.document(work, in_turns(jobs, 1))
    assert list(found["ratios"]) == ["grpo / trl"]
    theirs = found["methods"]["trl"]
    assert set(theirs["phases"]) == {"generate", "judge"}
    assert sum(theirs["phases"].values()) < theirs["seconds"]["median"]
    assert 1 <= theirs["response_tokens"]["median"] <= 6
