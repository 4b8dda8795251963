"""The way into verl, against the real scoring server.

verl is not a requirement of ours. Where it is not installed, `Batch` stands in for its DataProto: a dictionary of
tensors with the names, shapes and padding of verl 0.9.1; the tests of verl's own classes are skipped.
"""

import asyncio
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpo import models
from dvpo.data.atlas import Atlas, build_tokenizer
from dvpo.data.records import Example
from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from dvpo.integrations import verl
from dvpo.integrations.client import GVMClient
from dvpo.objectives.advantages import Signals, gae
from dvpo.values import collate, token_values


@dataclass
class Batch:
    """What we read of a DataProto."""

    batch: dict[str, Tensor]
    non_tensor_batch: dict[str, Any]


def packed(texts: list[Encoded], pad_id: int, left: bool = True, extra: int = 2) -> dict[str, Tensor]:
    """verl's form: prompts padded on one side, responses on the right, each with padding to spare."""
    p = max(len(t.prompt_ids) for t in texts) + extra
    r = max(len(t.response_ids) for t in texts) + extra
    prompts = torch.full((len(texts), p), pad_id)
    responses = torch.full((len(texts), r), pad_id)
    mask = torch.zeros(len(texts), p + r, dtype=torch.long)
    for row, text in enumerate(texts):
        n, m = len(text.prompt_ids), len(text.response_ids)
        start = p - n if left else 0
        prompts[row, start : start + n] = torch.tensor(text.prompt_ids)
        responses[row, :m] = torch.tensor(text.response_ids)
        mask[row, start : start + n] = 1
        mask[row, p : p + m] = 1
    return {"prompts": prompts, "responses": responses, "attention_mask": mask}


@pytest.fixture
def own_values(
    checkpoints: dict[tuple[str, str], Path], texts: list[Encoded], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """h_0..h_T of the texts in the process, and their mask."""
    batch = collate(texts, tokenizer.pad_token_id)
    with torch.no_grad():
        return token_values(models.load(checkpoints["llama", "value"], "value").eval(), batch), batch.mask_B_S


@pytest.fixture
def server(gvm_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that the environment names."""
    monkeypatch.setenv(verl.URL, gvm_url)
    return gvm_url


@pytest.mark.parametrize("left", [True, False])
def test_a_call_fills_the_batch_with_rewards_that_sum_to_the_score(
    server: str, texts: list[Encoded], tokenizer: PreTrainedTokenizerBase, own_values: Any, left: bool
) -> None:
    # Padding is EOS here: only the mask may tell the two apart.
    data = Batch(packed(texts, tokenizer.eos_token_id, left), {})
    found = verl.GVMRewardManager(tokenizer=tokenizer, num_examine=0, reward_fn_key="data_source")(data, True)
    rewards_B_T = data.batch["rm_scores"]
    assert found["reward_tensor"] is rewards_B_T
    assert rewards_B_T.shape == data.batch["responses"].shape
    assert rewards_B_T.dtype == torch.float32
    values_B_S, mask_B_S = own_values
    for row, text in enumerate(texts):
        h = values_B_S[row][mask_B_S[row]]
        count = len(text.response_ids)
        torch.testing.assert_close(rewards_B_T[row, :count].cumsum(0), h[1:], atol=3e-5, rtol=0)
        assert float(rewards_B_T[row].sum()) == pytest.approx(float(h[-1]), abs=3e-5)
        assert not rewards_B_T[row, count:].any()
        assert found["reward_extra_info"]["gvm_mean"][row] == pytest.approx(float(h[1:].mean()), abs=1e-5)


def test_sums_of_rewards_to_come_are_the_estimator_gae_at_lambda_1(
    server: str, texts: list[Encoded], tokenizer: PreTrainedTokenizerBase, own_values: Any
) -> None:
    data = Batch(packed(texts, tokenizer.pad_token_id, extra=0), {})
    rewards_B_T = verl.GVMRewardManager(tokenizer=tokenizer)(data)
    values_B_S, mask_B_S = own_values
    expected_B_T = gae(Signals(mask_B_S[:, 1:], values_B_S=values_B_S, lam=1.0))
    to_come_B_T = rewards_B_T.flip(1).cumsum(1).flip(1)
    later_B_T = mask_B_S[:, 1:].clone()
    later_B_T[:, 0] = False
    torch.testing.assert_close(to_come_B_T[later_B_T], expected_B_T[later_B_T], atol=5e-5, rtol=0)


def test_one_response_gives_one_number(
    server: str, texts: list[Encoded], tokenizer: PreTrainedTokenizerBase, own_values: Any
) -> None:
    manager = verl.GVMRewardManager(
        config={}, tokenizer=tokenizer, compute_score=None, reward_router_address=None, reward_model_tokenizer=None
    )
    data = Batch(packed(texts[:1], tokenizer.pad_token_id, extra=0), {})
    result = asyncio.run(manager.run_single(data))
    h = own_values[0][0][own_values[1][0]]
    assert result["reward_score"] == pytest.approx(float(h[-1]), abs=1e-5)
    assert result["reward_extra_info"] == {"gvm_mean": pytest.approx(float(h[1:].mean()), abs=1e-5)}
    with pytest.raises(InputError, match="2 outputs"):
        asyncio.run(manager.run_single(Batch(packed(texts[:2], tokenizer.pad_token_id), {})))


def test_the_reward_function_scores_text(server: str, examples: list[Example], own_values: Any) -> None:
    assert inspect.iscoroutinefunction(verl.compute_score)  # how verl tells that it may be awaited

    async def score(**extra: Any) -> dict[str, float]:
        return await verl.compute_score(
            data_source="atlas", solution_str=examples[0].responses[0].text, ground_truth=None, **extra
        )

    h = own_values[0][0][own_values[1][0]]
    chat = np.array(examples[0].prompt, dtype=object)  # as parquet gives it
    assert asyncio.run(score(extra_info={"prompt": chat, "num_turns": 2}))["score"] == pytest.approx(
        float(h[1:].mean()), abs=1e-5
    )
    last = asyncio.run(score(extra_info={"prompt": chat}, aggregate="last", reward_router_address="unused"))
    assert last["score"] == pytest.approx(float(h[-1]), abs=1e-5)
    with pytest.raises(InputError, match='a row of atlas has no "prompt"'):
        asyncio.run(score(extra_info={"index": 3}))


def test_no_server_and_another_tokenizer_are_refused(
    gvm_url: str, monkeypatch: pytest.MonkeyPatch, texts: list[Encoded], tokenizer: PreTrainedTokenizerBase
) -> None:
    monkeypatch.delenv(verl.URL, raising=False)
    with pytest.raises(InputError, match="set DVPO_GVM_URL"):
        verl.GVMRewardManager(tokenizer=tokenizer)
    monkeypatch.setenv(verl.URL, gvm_url)
    manager = verl.GVMRewardManager(tokenizer=build_tokenizer(Atlas.build(1)))
    with pytest.raises(InputError, match="tokenizer"):
        manager(Batch(packed(texts, 0), {}))


def test_the_key_comes_from_the_environment(
    guarded_url: tuple[str, str], monkeypatch: pytest.MonkeyPatch, texts: list[Encoded]
) -> None:
    url, key = guarded_url
    data = Batch(packed(texts[:2], 0), {})
    monkeypatch.setenv(verl.URL, url)
    monkeypatch.delenv(verl.API_KEY, raising=False)
    with pytest.raises(InputError, match="401"):
        verl.GVMRewardManager()(data)
    monkeypatch.setenv(verl.API_KEY, key)
    assert verl.GVMRewardManager()(data).any()
    assert verl.GVMRewardManager(client=GVMClient(url, api_key=key))(data).any()


def test_with_verl_its_own_batch_is_filled_and_its_loader_finds_the_names(
    server: str, texts: list[Encoded], tokenizer: PreTrainedTokenizerBase
) -> None:
    protocol = pytest.importorskip("verl.protocol", reason="verl is not installed")
    from verl.utils.import_utils import load_extern_object

    data = protocol.DataProto.from_single_dict(packed(texts, tokenizer.pad_token_id))
    manager = load_extern_object("pkg://dvpo.integrations.verl", "GVMRewardManager")(
        config=None, tokenizer=tokenizer, compute_score=None
    )
    torch.testing.assert_close(manager(data), manager(Batch(packed(texts, tokenizer.pad_token_id), {})))
    assert data.batch["rm_scores"].shape == data.batch["responses"].shape
    result = asyncio.run(manager.run_single(data[:1]))
    assert result["reward_score"] == pytest.approx(float(data.batch["rm_scores"][0].sum()), abs=1e-5)
    assert load_extern_object("pkg://dvpo.integrations.verl", "compute_score") is verl.compute_score


def test_with_verl_a_rollout_brings_its_token_rewards(
    server: str, texts: list[Encoded], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_loop = pytest.importorskip("verl.experimental.agent_loop.agent_loop", reason="verl is not installed")
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    sampled = agent_loop.AgentLoopOutput(
        prompt_ids=texts[0].prompt_ids,
        response_ids=texts[0].response_ids,
        response_mask=[1] * len(texts[0].response_ids),
        metrics={"generate_sequences": 1.5},
        num_turns=2,
        extra_fields={"turn_scores": []},
    )

    async def run(self: Any, sampling_params: Any, **kwargs: Any) -> Any:
        return sampled.model_copy(deep=True)

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    loop = verl.GVMAgentLoop.__new__(verl.GVMAgentLoop)
    loop.tokenizer = tokenizer
    output = asyncio.run(loop.run({"temperature": 1.0}, raw_prompt=[]))
    fields, plain = output.as_dict(), sampled.as_dict()
    expected = verl.GVMRewardManager(tokenizer=tokenizer)(Batch(packed(texts[:1], 0, extra=0), {}))[0]
    torch.testing.assert_close(fields["rm_scores"], expected)
    assert fields["rm_scores"].sum() == pytest.approx(output.reward_score, abs=1e-5)
    assert fields.keys() - plain.keys() == {"rm_scores"}
    assert fields["metrics"] == plain["metrics"]
    assert torch.equal(fields["responses"], plain["responses"])


def test_no_other_name_is_made_up() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        verl.Nothing  # noqa: B018
