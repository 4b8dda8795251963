"""DVPO in TRL: advantages and loss of `DVPOTrainer` against our own functions and against plain loops; whole runs."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from dvpo import models
from dvpo.config import ModelSize
from dvpo.data.atlas import Atlas, build_tokenizer
from dvpo.data.records import Example
from dvpo.data.templates import Encoded, encode_prompt, encode_response
from dvpo.errors import InputError
from dvpo.integrations.client import GVMClient
from dvpo.integrations.trl import DVPOConfig, DVPOTrainer, gvm_reward
from dvpo.objectives.advantages import ESTIMATORS, Signals
from dvpo.objectives.kl import kl_loss
from dvpo.objectives.policy_loss import policy_loss
from dvpo.objectives.stats import masked_whiten
from dvpo.training.policy import response_logprobs
from dvpo.values import collate, token_values

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_dvpo.py"
Checkpoints = dict[tuple[str, str], Path]


def make_trainer(
    checkpoints: Checkpoints,
    examples: list[Example],
    out: Path,
    kind: type = DVPOConfig,
    settings: dict[str, Any] | None = None,
    **own: Any,
) -> DVPOTrainer:
    args = kind(
        output_dir=str(out),
        max_completion_length=12,
        max_steps=2,
        learning_rate=1e-3,
        temperature=0.9,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 6, **(settings or {})},
    )
    return DVPOTrainer(
        str(checkpoints["llama", "policy"]),
        own.pop("gvm", checkpoints["llama", "value"]),
        models.load_tokenizer(checkpoints["llama", "policy"]),
        args,
        train_dataset=Dataset.from_list([{"prompt": list(e.prompt)} for e in examples]),
        **own,
    )


def texts_of(batch: dict[str, torch.Tensor]) -> list[Encoded]:
    """The ids of a TRL batch, without its padding."""
    rows = zip(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
    )
    return [Encoded(p[pm.bool()].tolist(), c[cm.bool()].tolist()) for p, pm, c, cm in rows]


def rollouts(trainer: DVPOTrainer, examples: list[Example], count: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([{"prompt": list(e.prompt)} for e in examples[:count]])


def own_values(checkpoints: Checkpoints, texts: list[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate(texts, pad_id)
    with torch.no_grad():
        return token_values(models.load(checkpoints["llama", "value"], "value").eval(), batch), batch.mask_B_S


@pytest.mark.parametrize("estimator", ["q", "gae", "official"])
@pytest.mark.parametrize("whiten", [True, False])
def test_the_advantages_are_the_estimator_of_the_gvms_values(
    checkpoints: Checkpoints, examples: list[Example], tmp_path: Path, estimator: Any, whiten: bool
) -> None:
    trainer = make_trainer(checkpoints, examples, tmp_path, estimator=estimator, whiten=whiten, gamma=0.98, lam=0.9)
    batch = rollouts(trainer, examples)
    values_B_S, mask_B_S = own_values(checkpoints, texts_of(batch), trainer.processing_class.pad_token_id)
    expected = ESTIMATORS[estimator](Signals(mask_B_S[:, 1:], values_B_S=values_B_S, gamma=0.98, lam=0.9))
    if whiten:
        expected = masked_whiten(expected, mask_B_S[:, 1:])
    assert batch["advantages"].shape == batch["completion_ids"].shape
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-4, atol=1e-5)
    assert batch["advantages"][batch["completion_mask"].bool()].unique().numel() > 10


def test_the_loss_equals_our_own_loops_and_a_plain_loops(
    checkpoints: Checkpoints, examples: list[Example], tmp_path: Path
) -> None:
    beta, clip, temperature = 0.07, 0.2, 0.9
    trainer = make_trainer(checkpoints, examples, tmp_path, settings={"beta": beta, "epsilon": clip})
    batch = rollouts(trainer, examples)
    texts = texts_of(batch)
    pad_id = trainer.processing_class.pad_token_id
    # The policy has moved since the rollouts, so that ratios are not 1 and some are clipped.
    with torch.no_grad():
        old = response_logprobs(trainer.model, collate(texts, pad_id), temperature)
        batch["old_per_token_logps"] = torch.where(batch["completion_mask"].bool(), old, -7.0)
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = trainer._compute_loss(trainer.model, batch)
    their_gradient = torch.autograd.grad(theirs, list(trainer.model.parameters()))

    packed = collate(texts, pad_id)
    mask_B_T = packed.mask_B_S[:, 1:]
    count = mask_B_T.sum()
    logprobs = response_logprobs(trainer.model, packed, temperature)
    with torch.no_grad():
        reference = response_logprobs(models.load(checkpoints["llama", "policy"], "policy"), packed, temperature)
    ours, clipped = policy_loss(logprobs, old, batch["advantages"], mask_B_T, clip, count)
    ours = ours + beta * kl_loss(logprobs, reference, mask_B_T, count)
    our_gradient = torch.autograd.grad(ours, list(trainer.model.parameters()))
    assert clipped > 0.02
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    for g, h in zip(their_gradient, our_gradient, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5)

    total, tokens = 0.0, 0
    for row, text in enumerate(texts):
        for t in range(len(text.response_ids)):
            new, before, start = (x[row, t].item() for x in (logprobs, old, reference))
            advantage, ratio = float(batch["advantages"][row, t]), math.exp(new - before)
            total -= min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
            total += beta * (math.exp(start - new) - (start - new) - 1)
            tokens += 1
    assert theirs.item() == pytest.approx(total / tokens, rel=1e-4, abs=1e-6)


def test_eos_is_inside_the_loss_and_padding_outside(
    checkpoints: Checkpoints, examples: list[Example], tmp_path: Path
) -> None:
    trainer = make_trainer(checkpoints, examples, tmp_path, whiten=False)
    eos = trainer.processing_class.eos_token_id
    answers = [
        encode_response(trainer.processing_class, e.responses[0].text)[-9 + i :] for i, e in enumerate(examples[:6])
    ]
    trainer._generate_single_turn = lambda *_: (answers, None)
    batch = rollouts(trainer, examples)
    for row, answer in enumerate(answers):
        last = len(answer) - 1
        assert batch["completion_ids"][row, last] == eos
        assert batch["completion_mask"][row, last] == 1
        assert batch["advantages"][row, last] != 0
        assert not batch["advantages"][row, last + 1 :].any()
    # The gradient of the loss reaches the probability of EOS: without its advantage the loss is another.
    with_eos = trainer._compute_loss(trainer.model, batch).item()
    batch["advantages"] = torch.where(batch["completion_ids"] == eos, 0, batch["advantages"])
    assert trainer._compute_loss(trainer.model, batch).item() != pytest.approx(with_eos, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DVPOConfig, {}),
        (DVPOConfig, {"per_device_train_batch_size": 1}),
        (DVPOConfig, {"gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.05, "pad_to_multiple_of": 8}),
        (GRPOConfig, {"num_generations": 2}),
    ],
)
def test_whole_runs_train_the_policy(
    checkpoints: Checkpoints, examples: list[Example], tmp_path: Path, kind: type, settings: dict[str, Any]
) -> None:
    # Whitening would leave nothing of a batch of one response of one token.
    alone = settings.get("per_device_train_batch_size") == 1
    trainer = make_trainer(checkpoints, examples, tmp_path, kind, settings, whiten=not alone)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    row = trainer.state.log_history[0]
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and math.isfinite(row["rewards/gvm_score/mean"])


def test_a_group_of_one_is_the_only_thing_the_config_allows_beyond_grpo(tmp_path: Path) -> None:
    assert DVPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).num_generations == 1
    with pytest.raises(ValueError, match="at least 2"):
        DVPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=-1)
    with pytest.raises(ValueError, match="generation_batch_size"):
        DVPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, generation_batch_size=6
        )


def test_another_tokenizer_and_another_estimator_are_refused(
    checkpoints: Checkpoints, examples: list[Example], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    models.save(models.load(checkpoints["llama", "value"], "value"), build_tokenizer(Atlas.build(1)), other)
    with pytest.raises(InputError, match="another tokenizer"):
        make_trainer(checkpoints, examples, tmp_path, gvm=other)
    with pytest.raises(InputError, match="unknown estimator 'critic'"):
        make_trainer(checkpoints, examples, tmp_path, estimator="critic")
    with pytest.raises(InputError, match="value model"):
        make_trainer(checkpoints, examples, tmp_path, gvm=checkpoints["llama", "reward"])


def test_values_over_http_are_those_of_the_process(
    checkpoints: Checkpoints, examples: list[Example], tmp_path: Path, gvm_url: str, guarded_url: tuple[str, str]
) -> None:
    url, key = guarded_url
    trainers = [
        make_trainer(checkpoints, examples, tmp_path, gvm=gvm)
        for gvm in (checkpoints["llama", "value"], gvm_url, GVMClient(url, api_key=key, max_items=2))
    ]
    batches = [rollouts(trainer, examples) for trainer in trainers]
    for batch in batches[1:]:
        torch.testing.assert_close(batch["completion_ids"], batches[0]["completion_ids"])
        torch.testing.assert_close(batch["advantages"], batches[0]["advantages"], rtol=1e-4, atol=1e-4)
    chats = [list(e.prompt) for e in examples[:2]]
    tokenizer = trainers[0].processing_class
    answers = [encode_response(tokenizer, e.responses[0].text) for e in examples[:2]]
    rewards = [
        gvm_reward(gvm, tokenizer)(prompts=chats, completions=chats, completion_ids=answers)
        for gvm in (checkpoints["llama", "value"], gvm_url)
    ]
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-5)


def test_a_server_with_another_tokenizer_is_refused(gvm_url: str) -> None:
    with pytest.raises(InputError, match=r"400 your tokenizer .* is not this model's"):
        gvm_reward(gvm_url, build_tokenizer(Atlas.build(1)))


@pytest.mark.parametrize("conversational", [True, False])
def test_the_reward_function_gives_the_aggregate_of_the_values(
    checkpoints: Checkpoints, examples: list[Example], tokenizer: PreTrainedTokenizerBase, conversational: bool
) -> None:
    chats = [list(e.prompt) for e in examples[:3]]
    ids = [encode_prompt(tokenizer, p) for p in chats]
    answers = [encode_response(tokenizer, e.responses[0].text) for e in examples[:3]]
    values_B_S, mask_B_S = own_values(checkpoints, [*map(Encoded, ids, answers)], tokenizer.pad_token_id)
    reward = gvm_reward(checkpoints["llama", "value"], tokenizer, "last")
    prompts: Any = chats if conversational else [tokenizer.decode(i) for i in ids]
    given = reward(prompts=prompts, completions=["unused"] * 3, completion_ids=answers, trainer_state=None)
    expected = [float(h[m][-1]) for h, m in zip(values_B_S, mask_B_S, strict=True)]
    assert given == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="unknown aggregate"):
        gvm_reward(checkpoints["llama", "value"], tokenizer, "median")


def test_the_reward_function_reads_the_prompt_that_the_template_makes_for_the_policy(
    checkpoints: Checkpoints, examples: list[Example], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A template may have switches, such as one that leaves out the thinking."""
    chat, answer = list(examples[0].prompt), encode_response(tokenizer, examples[0].responses[0].text)
    switch = {
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'the the' if short }}",
        "short": 1,
    }
    read = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **switch)
    values_B_S, mask_B_S = own_values(checkpoints, [Encoded(read, answer)], tokenizer.pad_token_id)
    given = gvm_reward(checkpoints["llama", "value"], tokenizer, "last", **switch)
    found = given(prompts=[chat], completions=["unused"], completion_ids=[answer])
    assert found == pytest.approx([float(values_B_S[0][mask_B_S[0]][-1])], abs=1e-5)
    plain = gvm_reward(checkpoints["llama", "value"], tokenizer, "last")
    assert plain(prompts=[chat], completions=["unused"], completion_ids=[answer]) != pytest.approx(found, abs=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, atlas: Atlas) -> Path:
    """Random models and a file of prompts, as a user would have them."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer(atlas)
    policy = models.new_policy(
        tokenizer, ModelSize(hidden=32, intermediate=64, layers=2, heads=4, positions=256), seed=0
    )
    models.save(policy, tokenizer, root / "policy")
    gvm = models.load(root / "policy", "value", fresh_head=True)
    torch.nn.init.normal_(models.head(gvm).weight)  # a fresh head is zero: nothing to learn from
    models.save(gvm, tokenizer, root / "gvm")
    rows = [{"prompt": [{"role": "user", "content": q.text}]} for q in atlas.questions(0, 24)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return root


def arguments(tiny: Path, gvm: str, out: Path) -> list[str]:
    prompts = str(tiny / "prompts.jsonl")
    return [str(EXAMPLE), "--policy", str(tiny / "policy"), "--gvm", gvm, "--prompts", prompts, "--out", str(out)]


def test_the_example_trains_and_saves_a_policy(tiny: Path, tmp_path: Path) -> None:
    command = [*arguments(tiny, str(tiny / "gvm"), tmp_path), "--updates", "2", "--batch", "4", "--max-new-tokens", "8"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("update")]
    assert shown[:2] == ["update 1", "update 2"]
    saved, start = (models.load(f, "policy").state_dict() for f in (tmp_path, tiny / "policy"))
    assert not all(torch.equal(saved[k], start[k]) for k in start)
    assert models.load_tokenizer(tmp_path).chat_template


@pytest.mark.parametrize(
    ("gvm", "line", "said"),
    [("policy", None, "not a value model"), ("gvm", '{"prompt": "plain"}', "prompts.jsonl:25")],
)
def test_the_example_says_what_is_wrong(
    tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, gvm: str, line: str | None, said: str
) -> None:
    options = arguments(tiny, str(tiny / gvm), tmp_path / "out")
    if line:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text((tiny / "prompts.jsonl").read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
        options[options.index("--prompts") + 1] = str(prompts)
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert end.value.code == 2
    assert said in capsys.readouterr().err


TWO = """
import json, os, sys
from pathlib import Path
import torch
from datasets import Dataset
from dvpo import models
from dvpo.integrations.trl import DVPOConfig, DVPOTrainer

class Kept(DVPOTrainer):
    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        torch.save({k: batch[k] for k in ("advantages", "completion_mask")}, out / (os.environ["RANK"] + ".pt"))
        return batch

root, out = Path(sys.argv[1]), Path(sys.argv[2])
prompts = Dataset.from_list([json.loads(line) for line in (root / "prompts.jsonl").read_text().splitlines()])
args = DVPOConfig(output_dir=str(out / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
                  save_strategy="no", per_device_train_batch_size=3, max_steps=1, max_completion_length=8, beta=0.05)
tokenizer = models.load_tokenizer(root / "policy")
Kept(str(root / "policy"), str(root / "gvm"), tokenizer, args, train_dataset=prompts).train()
"""


@pytest.mark.slow
def test_two_processes_whiten_together(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py"), str(tiny), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    learnt = [part["advantages"][part["completion_mask"].bool()] for part in parts]
    together = torch.cat(learnt)
    assert together.mean().item() == pytest.approx(0, abs=1e-5)
    assert together.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert any(abs(x.std(correction=0).item() - 1) > 0.01 for x in learnt)  # each by itself is not white


def test_what_a_tool_wrote_is_not_learnt(checkpoints: Checkpoints, examples: list[Example], tmp_path: Path) -> None:
    trainer = make_trainer(checkpoints, examples, tmp_path)
    trainer._values = [torch.tensor([0.0, 1.0, 2.0, 5.0])]
    batch = {"completion_mask": torch.ones(1, 3, dtype=torch.long), "tool_mask": torch.tensor([[1, 0, 1]])}
    assert trainer._token_advantages(batch)[0].tolist() == pytest.approx([-1, 0, 1], abs=1e-5)


def test_by_default_it_is_the_papers_estimator_and_trl_logs_its_means(
    checkpoints: Checkpoints, examples: list[Example], tmp_path: Path
) -> None:
    trainer = make_trainer(checkpoints, examples, tmp_path)
    assert (trainer.estimator, trainer.gamma, trainer.lam, trainer.whiten) == ("q", 1.0, 0.95, True)
    batch = rollouts(trainer, examples)
    means = batch["advantages"].sum(1) / batch["completion_mask"].sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(means.tolist())
    values_B_S, mask_B_S = own_values(checkpoints, texts_of(batch), trainer.processing_class.pad_token_id)
    mean_q = [float(h[m][1:].mean()) for h, m in zip(values_B_S, mask_B_S, strict=True)]
    assert trainer.gvm_score([None] * 6) == pytest.approx(mean_q, abs=1e-5)
