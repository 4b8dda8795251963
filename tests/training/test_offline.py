"""The offline trainers: the loss is the one that is written down, resuming and micro-batches change nothing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from dvpo import models
from dvpo.config import (
    DpoSettings,
    GvmSettings,
    LoraSettings,
    PretrainSettings,
    RewardSettings,
    SftSettings,
)
from dvpo.data.pairs import EncodedPair, Encoder, Pick, preference_picks
from dvpo.data.records import Example
from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from dvpo.objectives.policy_loss import token_logprobs
from dvpo.training import gvm
from dvpo.training.common import argument_values, last_checkpoint
from dvpo.training.dpo import train_dpo
from dvpo.training.gvm import GvmTrainer, ValueText, train_gvm
from dvpo.training.gvm_data import encodable_pairs, value_texts
from dvpo.training.muon import Muon, MuonWithAdamW, orthogonalised
from dvpo.training.pretrain import pretrain
from dvpo.training.reward import train_reward
from dvpo.training.sft import train_sft
from dvpo.values import collate, score_all, sequence_scores, token_values

LORA = LoraSettings(r=4, alpha=8)


def gvm_settings(**changes: object) -> GvmSettings:
    base = {"learning_rate": 3e-3, "schedule": "constant", "batch_size": 4, "epochs": 50, "log_steps": 1}
    return GvmSettings(**{**base, **changes})


@pytest.fixture(scope="module")
def labelled(texts: list[Encoded]) -> list[ValueText]:
    """Twelve short texts with rewards of both signs."""
    return [ValueText(t, 1.0 if i % 2 else -1.0) for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def pairs(tokenizer, examples: list[Example]) -> list[EncodedPair]:
    return list(Encoder(tokenizer, examples, 200, 200).pairs(preference_picks(examples, None, 0)))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_gvm_training_lowers_the_loss(checkpoints, labelled, tmp_path) -> None:
    done = train_gvm(
        checkpoints["llama", "policy"], labelled, gvm_settings(max_steps=30), tmp_path / "out", tmp_path / "state", 0
    )
    steps, losses = zip(*done["losses"], strict=True)
    assert list(steps) == list(range(1, 31))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    model = models.load(tmp_path / "out", "value")
    found = dict(score_all(model, [v.text for v in labelled], 0))
    # What it learned is at the last token of each text, whatever the curve says.
    assert sum((float(found[i][-1]) > 0) == (v.reward > 0) for i, v in enumerate(labelled)) >= 10


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_the_first_loss_is_that_of_a_zero_head(checkpoints, labelled, tmp_path, lam: float) -> None:
    """All values are 0, so G_t = lambda^(T - t) * r (gamma = 1), and the loss is the mean of G^2 over h_0..h_T."""
    settings = gvm_settings(batch_size=12, micro_batch_size=4, max_steps=1, td_lambda=lam)
    done = train_gvm(checkpoints["llama", "policy"], labelled, settings, tmp_path / "out", tmp_path / "state", 0)
    total, count = 0.0, 0
    for v in labelled:
        T = len(v.text.response_ids)
        total += sum((lam ** (T - t) * v.reward) ** 2 for t in range(T + 1))
        count += T + 1
    assert done["losses"][0][1] == pytest.approx(total / count, rel=1e-3)


def cut_off_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The trainer dies right after it has written its checkpoint of this step."""
    whole = GvmTrainer._save_checkpoint

    def saves_and_dies(self: GvmTrainer, *args: object, **kwargs: object) -> None:
        whole(self, *args, **kwargs)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(GvmTrainer, "_save_checkpoint", saves_and_dies)


@pytest.mark.parametrize(("lora", "worth"), [(None, 1e9), (LORA, 1e9), (None, 0)], ids=["whole", "lora", "packed"])
def test_interrupted_and_resumed_equals_uninterrupted(
    checkpoints, labelled, tmp_path, monkeypatch, lora, worth: float
) -> None:
    """Bit for bit, across an epoch's end (three steps an epoch, cut at step 4)."""
    monkeypatch.setattr(gvm, "_WORTH_PACKING", worth)
    settings = gvm_settings(max_steps=8, save_steps=2, schedule="cosine", warmup_steps=2, lora=lora)
    start = checkpoints["llama", "policy"]
    whole = train_gvm(start, labelled, settings, tmp_path / "whole", tmp_path / "state-whole", 7)
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        cut_off_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train_gvm(start, labelled, settings, tmp_path / "never", state, 7)
    assert Path(last_checkpoint(state)).name == "checkpoint-4"
    torch.rand(17)  # the resumed process has another random state
    steps = []
    with monkeypatch.context() as patch:
        step = GvmTrainer.training_step
        patch.setattr(GvmTrainer, "training_step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k))[1])
        resumed = train_gvm(start, labelled, settings, tmp_path / "resumed", state, 7)
    assert len(steps) == 4  # it went on, it did not begin again
    assert resumed["losses"] == whole["losses"]
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "never").exists()


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path) -> None:
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"cut'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("lengths", ["equal", "ragged"])
def test_micro_batches_change_nothing(checkpoints, labelled, tmp_path, lengths: str) -> None:
    """Eight rows at once equal one row eight times, also where their lengths differ."""
    # Rewards that do not cancel: where a gradient is exactly 0, Adam would turn rounding noise into whole steps.
    rows: Sequence[ValueText] = [replace(v, reward=1.0 + 0.25 * i) for i, v in enumerate(labelled[:8])]
    if lengths == "equal":
        rows = [replace(v, text=Encoded(v.text.prompt_ids[:8], v.text.response_ids[-5:])) for v in rows]
    assert (len({len(v.text.response_ids) for v in rows}) == 1) == (lengths == "equal")
    losses = {}
    for micro in (8, 1):
        settings = gvm_settings(batch_size=8, micro_batch_size=micro, max_steps=3, learning_rate=1e-3)
        out = tmp_path / f"out-{micro}"
        done = train_gvm(checkpoints["llama", "value"], rows, settings, out, tmp_path / f"state-{micro}", 0)
        losses[micro] = [loss for _, loss in done["losses"]]
    assert losses[1] == pytest.approx(losses[8], abs=2e-4)
    assert largest_difference(tmp_path / "out-1", tmp_path / "out-8") <= 5e-6


def test_gvm_gradients_ignore_the_prompt_and_the_padding(checkpoints, texts) -> None:
    """The loss at h_0..h_T only: with one state in the mask, the head's gradient is that state's hidden vector."""
    from dvpo.objectives.td import td_lambda_targets, value_model_loss

    model = models.load(checkpoints["llama", "policy"], "value", fresh_head=True)
    item = Encoded(texts[0].prompt_ids, [])
    batch = collate([item], 0)
    values_B_S = token_values(model, batch)
    targets = td_lambda_targets(values_B_S, torch.tensor([1.0]), batch.mask_B_S, 1.0, 0.95)
    value_model_loss(values_B_S, targets, batch.mask_B_S, 1).backward()
    hidden = model.base_model(torch.tensor([item.prompt_ids])).last_hidden_state[0, -1]
    assert torch.allclose(models.head(model).weight.grad[0], -2 * hidden, atol=1e-5)


def test_reward_loss_at_the_start_is_minus_log_sigmoid_of_the_difference(checkpoints, pairs, tmp_path) -> None:
    start = checkpoints["llama", "policy"]
    settings = RewardSettings(learning_rate=1e-3, batch_size=len(pairs), epochs=2, log_steps=1)
    done = train_reward(start, pairs, settings, tmp_path / "out", tmp_path / "state", 5)
    assert [step for step, _ in done["losses"]] == [1, 2]

    torch.manual_seed(5)  # draws the same initial head
    model = models.load(start, "reward", fresh_head=True)
    pad = models.load_tokenizer(start).pad_token_id
    with torch.no_grad():
        better, worse = (
            sequence_scores(model, collate([getattr(p, s) for p in pairs], pad)) for s in ("better", "worse")
        )
    expected = sum(math.log1p(math.exp(-(float(b) - float(w)))) for b, w in zip(better, worse, strict=True))
    assert float((better - worse).abs().max()) > 1e-2
    assert done["losses"][0][1] == pytest.approx(expected / len(pairs), abs=2e-4)


def test_a_trained_reward_model_reads_the_end_token_in_plain_transformers_too(checkpoints, pairs, tmp_path) -> None:
    """The stock forward on a padded batch gives the scores that we read."""
    start = checkpoints["llama", "policy"]
    settings = RewardSettings(learning_rate=1e-2, batch_size=4, max_steps=2, log_steps=1)
    train_reward(start, pairs, settings, tmp_path / "out", tmp_path / "state", 0)
    tokenizer = models.load_tokenizer(tmp_path / "out")
    batch = collate([p.better for p in pairs], tokenizer.pad_token_id)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert stock.config.pad_token_id not in (None, tokenizer.eos_token_id)
    with torch.no_grad():
        theirs = stock(input_ids=batch.input_ids_B_L, attention_mask=batch.attention_mask_B_L).logits[:, 0]
        ours = sequence_scores(models.load(tmp_path / "out", "reward").eval(), batch)
    assert float((theirs - ours).abs().max()) <= 1e-5


def test_sft_loss_at_the_start_is_the_cross_entropy_of_the_responses(checkpoints, texts, tmp_path) -> None:
    """The mean over response tokens, EOS included and the prompt left out."""
    start = checkpoints["llama", "policy"]
    settings = SftSettings(learning_rate=1e-3, batch_size=len(texts), micro_batch_size=4, epochs=2, log_steps=1)
    done = train_sft(start, texts, settings, tmp_path / "out", tmp_path / "state", 0)
    assert [step for step, _ in done["losses"]] == [1, 2]
    model = models.load(start, "policy").eval()
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([text.prompt_ids + text.response_ids])
        with torch.no_grad():
            logprobs = token_logprobs(model(ids).logits[:, :-1], ids[:, 1:])[0, len(text.prompt_ids) - 1 :]
        assert len(logprobs) == len(text.response_ids)
        total -= float(logprobs.sum())
        count += len(text.response_ids)
    assert done["losses"][0][1] == pytest.approx(total / count, abs=2e-3)
    assert models.role_of(tmp_path / "out") == "policy"
    models.require_same_tokenizer(start, tmp_path / "out", "policy")


def test_dpo_loss_at_the_start_is_log_2_and_falls(checkpoints, pairs, tmp_path) -> None:
    start = checkpoints["llama", "policy"]
    settings = DpoSettings(learning_rate=1e-3, batch_size=len(pairs), epochs=2, log_steps=1)
    done = train_dpo(start, pairs, settings, tmp_path / "out", tmp_path / "state", 0)
    assert [step for step, _ in done["losses"]] == [1, 2]
    assert done["losses"][0][1] == pytest.approx(math.log(2), abs=2e-4)
    assert done["losses"][1][1] < math.log(2)
    assert largest_difference(tmp_path / "out", start) > 0
    models.load(tmp_path / "out", "policy")


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_stages_train_adapters_that_load(checkpoints, texts, pairs, tmp_path, stage: str) -> None:
    start, state, out = checkpoints["llama", "policy"], tmp_path / "state", tmp_path / "out"
    common = {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 2, "log_steps": 1, "lora": LORA}
    if stage == "sft":
        train_sft(start, texts, SftSettings(**common), out, state, 0)
    elif stage == "rm":
        train_reward(start, pairs, RewardSettings(**common), out, state, 0)
    else:
        train_dpo(start, pairs, DpoSettings(**common), out, state, 0)
    role = "reward" if stage == "rm" else "policy"
    assert (out / "adapter_config.json").is_file()
    assert models.role_of(out) == role
    models.load(out, role)


def test_preference_targets_are_plus_and_minus_one(tokenizer, examples) -> None:
    encoder = Encoder(tokenizer, examples, 200, 200)
    kept = encodable_pairs(encoder, preference_picks(examples, None, 0), None)
    rewarded, scale = value_texts(kept, "preference", examples)
    assert [v.reward for v in rewarded] == [1.0, -1.0] * len(examples)
    assert rewarded[0].text == encoder.text(Pick(0, 0))
    assert rewarded[1].text == encoder.text(Pick(0, 1))
    assert scale == {"mean": 0.0, "std": 1.0}


def test_a_response_in_several_pairs_is_one_text_with_the_mean_of_its_outcomes(tokenizer, examples) -> None:
    better, worse = preference_picks(examples, None, 0)[0]
    kept = encodable_pairs(
        Encoder(tokenizer, examples, 200, 200), [(better, worse), (worse, better), (better, worse)], None
    )
    rewarded, _ = value_texts(kept, "preference", examples)
    assert [v.reward for v in rewarded] == pytest.approx([1 / 3, -1 / 3])


def test_scores_are_standardised_over_the_texts_each_once(tokenizer, examples) -> None:
    encoder = Encoder(tokenizer, examples, 200, 200)
    picks = preference_picks(examples, None, 0)
    kept = encodable_pairs(encoder, [*picks, picks[0]], None)  # the first pair twice
    rewarded, scale = value_texts(kept, "score", examples)
    raw = [r.score for e in examples for r in e.responses]
    mean = sum(raw) / len(raw)
    std = (sum((x - mean) ** 2 for x in raw) / len(raw)) ** 0.5
    assert len(rewarded) == len(raw)
    assert scale == pytest.approx({"mean": mean, "std": std})
    assert [v.reward for v in rewarded] == pytest.approx([(x - mean) / std for x in raw])


def test_a_reward_model_gives_the_targets_in_the_order_of_the_texts(checkpoints, tokenizer, examples) -> None:
    kept = encodable_pairs(Encoder(tokenizer, examples, 200, 200), preference_picks(examples, None, 0), None)
    model = models.load(checkpoints["llama", "reward"], "reward")
    rewarded, scale = value_texts(kept, "reward_model", examples, model, tokenizer.pad_token_id)
    assert sum(v.reward for v in rewarded) == pytest.approx(0, abs=1e-4)
    for value in rewarded:
        with torch.no_grad():
            raw = float(sequence_scores(model, collate([value.text], tokenizer.pad_token_id)))
        assert value.reward * scale["std"] + scale["mean"] == pytest.approx(raw, abs=1e-4)


def test_a_missing_score_and_equal_scores_are_input_errors(tokenizer, examples) -> None:
    bare = [replace(e, responses=tuple(replace(r, score=None) for r in e.responses)) for e in examples]
    kept = encodable_pairs(Encoder(tokenizer, examples, 200, 200), preference_picks(examples, None, 0), None)
    with pytest.raises(InputError, match="atlas:0: a response has no score"):
        value_texts(kept, "score", bare)
    flat = [replace(e, responses=tuple(replace(r, score=2.0) for r in e.responses)) for e in examples]
    with pytest.raises(InputError, match="same score"):
        value_texts(kept, "score", flat)


def test_most_pairs_are_the_first_that_fit(tokenizer, examples) -> None:
    picks = preference_picks(examples, None, 0)
    encoder = Encoder(tokenizer, examples, 200, 200)
    kept = encodable_pairs(encoder, picks, 3)
    assert [(better[0], worse[0]) for better, worse in kept] == picks[:3]
    short = Encoder(tokenizer, examples, max_prompt_tokens=14, max_response_tokens=200)
    fitting = [p for p in picks if len(encoder.text(p[0]).prompt_ids) <= 14]
    assert 0 < len(fitting) < len(picks)
    assert [(better[0], worse[0]) for better, worse in encodable_pairs(short, picks, None)] == fitting


def test_every_weight_is_in_one_part_of_the_optimizer(checkpoints) -> None:
    model = models.load(checkpoints["llama", "policy"], "policy")
    optimizer = MuonWithAdamW(model, 0.02, 1e-3, 0.95)
    muon, adam = ({id(p) for g in part.param_groups for p in g["params"]} for part in optimizer.parts)
    assert not muon & adam
    assert muon | adam == {id(p) for p in model.parameters()}
    assert {id(p) for n, p in model.named_parameters() if "_proj" in n} == muon


def test_a_schedule_reaches_both_parts_also_after_loading(checkpoints) -> None:
    model = models.load(checkpoints["llama", "policy"], "policy")
    optimizer = MuonWithAdamW(model, 0.02, 1e-3, 0.95)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [p.detach().clone() for p in model.parameters()]
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.01, 0.0005]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if b.grad.any())


def test_pretraining_learns_and_resumes_to_the_same_bytes(checkpoints, texts, tmp_path, monkeypatch) -> None:
    rows = [t.prompt_ids + t.response_ids for t in texts] * 2
    settings = PretrainSettings(learning_rate=4e-3, batch_size=4, epochs=4, save_steps=4, log_steps=2)
    start = checkpoints["llama", "policy"]
    whole = pretrain(start, rows, settings, tmp_path / "whole", tmp_path / "a", 0)["losses"]
    assert whole[-1][1] < 0.7 * whole[0][1]
    import transformers

    saves = transformers.Trainer._save_checkpoint

    def die_after_the_second(self, *args, **kwargs):
        saves(self, *args, **kwargs)
        if self.state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", die_after_the_second)
        with pytest.raises(KeyboardInterrupt):
            pretrain(start, rows, settings, tmp_path / "cut", tmp_path / "b", 0)
    resumed = pretrain(start, rows, settings, tmp_path / "cut", tmp_path / "b", 0)["losses"]
    assert resumed == whole
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") == 0.0


def test_a_weighted_token_counts_so_many_times_in_the_loss(checkpoints, tmp_path) -> None:
    rows, start = [[5, 6, 7, 8, 7], [9, 7, 4]], checkpoints["llama", "policy"]
    settings = PretrainSettings(learning_rate=1e-3, batch_size=2, log_steps=1, save_steps=1)
    found = pretrain(start, rows, settings, tmp_path / "out", tmp_path / "state", 0, {7: 20.0})["losses"][0][1]
    model, total, weight = models.load(start, "policy").eval(), 0.0, 0.0
    for row in rows:
        with torch.no_grad():
            logprobs_T_V = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        for t, target in enumerate(row[1:]):
            counts = 20.0 if target == 7 else 1.0
            total -= counts * float(logprobs_T_V[t, target])
            weight += counts
    assert found == pytest.approx(total / weight, abs=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_orthogonalised_keeps_the_singular_vectors_and_evens_out_the_values(shape) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, *shape, dtype=torch.float64)
    for raw, found in zip(stack, orthogonalised(stack), strict=True):
        u, s, vh = torch.linalg.svd(raw, full_matrices=False)
        inside = u.T @ found @ vh.T
        values = inside.diagonal()
        assert (inside - values.diag()).abs().max() < 1e-9
        assert values[s / s.norm() > 0.1].min() > 0.6 and values.max() < 1.3


def test_muon_steps_as_torchs_own_but_for_its_bfloat16() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in [(8, 8), (16, 8), (8, 8), (8, 24)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = Muon(ours, 0.01), torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    moved = max((p - q).abs().max() for p, q in zip(ours, theirs, strict=True))
    assert moved < 0.002  # four steps of 0.01 to 0.014 at most, in 8 bits of mantissa


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["gvm", "rm", "sft", "dpo"])
def test_a_text_longer_than_the_model_reads_is_refused(checkpoints, texts, tmp_path, arch: str, kind: str) -> None:
    start, out, state = checkpoints[arch, "policy"], tmp_path / "out", tmp_path / "state"
    fits, long = Encoded(texts[0].prompt_ids, [5] * 9), Encoded([5] * 200, [6] * 57)
    both = [EncodedPair(fits, fits, 0), EncodedPair(fits, long, 1)]
    few = {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 1}
    train: dict[str, tuple[Any, Any, Any]] = {
        "gvm": (train_gvm, [ValueText(fits, 1.0), ValueText(long, -1.0)], GvmSettings(**few)),
        "rm": (train_reward, both, RewardSettings(**few)),
        "sft": (train_sft, [fits, long], SftSettings(**few)),
        "dpo": (train_dpo, both, DpoSettings(**few)),
    }
    run, data, settings = train[kind]
    with pytest.raises(InputError, match="reads at most 256 tokens, but the longest text has 257; lower max_prompt"):
        run(start, data, settings, out, state, 0)
    assert not out.exists()


def test_gamma_and_lambda_of_the_targets_are_not_swapped(checkpoints, texts, tmp_path, monkeypatch) -> None:
    seen = set()
    whole = gvm.td_lambda_targets
    monkeypatch.setattr(gvm, "td_lambda_targets", lambda *a: (seen.add(a[3:]), whole(*a))[1])
    s = GvmSettings(learning_rate=1e-3, batch_size=4, max_steps=1, log_steps=1, gamma=0.9, td_lambda=0.5)
    labelled = [ValueText(t, 1.0) for t in texts]
    train_gvm(checkpoints["llama", "policy"], labelled, s, tmp_path / "out", tmp_path / "state", 0)
    assert seen == {(0.9, 0.5)}


def test_the_seed_of_a_gvm_decides_the_order(checkpoints, texts, tmp_path, monkeypatch) -> None:
    orders = []
    monkeypatch.setattr(
        gvm, "train", lambda trainer, *_: orders.append([v.reward for v in trainer.train_dataset.items])
    )
    monkeypatch.setattr(gvm, "_WORTH_PACKING", 1e9)
    s = GvmSettings(learning_rate=1e-3, batch_size=4, log_steps=1)
    labelled = [ValueText(t, float(i)) for i, t in enumerate(texts)]
    for seed in (0, 0, 1):
        train_gvm(checkpoints["llama", "policy"], labelled, s, tmp_path / "out", tmp_path / "state", seed)
    assert orders[0] == orders[1] != orders[2]


def test_texts_of_like_length_share_a_micro_batch(checkpoints, texts, tmp_path, monkeypatch) -> None:
    found = []
    monkeypatch.setattr(gvm, "train", lambda trainer, *_: found.extend(trainer.train_dataset.items))
    s = GvmSettings(learning_rate=1e-3, batch_size=12, micro_batch_size=3, log_steps=1)
    labelled = [ValueText(t, 1.0) for t in texts]
    train_gvm(checkpoints["llama", "policy"], labelled, s, tmp_path / "out", tmp_path / "state", 0)
    lengths = [gvm._length(v) for v in found]
    spans = [range(min(part), max(part)) for part in (lengths[k : k + 3] for k in range(0, 12, 3))]
    assert sorted(lengths) == sorted(map(gvm._length, labelled))
    assert all(a.stop <= b.start or b.stop <= a.start for i, a in enumerate(spans) for b in spans[i + 1 :])


def test_every_setting_reaches_the_trainer(tmp_path: Path) -> None:
    chosen = {
        "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.5, "bf16": True,
        "gradient_checkpointing": True, "max_steps": 7, "save_steps": 4, "log_steps": 2,
    }  # fmt: skip
    found = argument_values(GvmSettings(learning_rate=2e-4, batch_size=8, micro_batch_size=2, **chosen), tmp_path, 11)
    expected = {**chosen, "lr_scheduler_type": "cosine", "logging_steps": 2, "learning_rate": 2e-4, "seed": 11}
    expected |= {"data_seed": 11, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for ours in ("schedule", "log_steps"):
        expected.pop(ours)
    assert {key: found.get(key) for key in expected} == expected


def test_rewards_in_bfloat16_are_another_arithmetic(checkpoints, tokenizer, examples) -> None:
    kept = encodable_pairs(Encoder(tokenizer, examples, 200, 200), preference_picks(examples, None, 0), None)
    model = models.load(checkpoints["llama", "reward"], "reward")
    a, b = (value_texts(kept, "reward_model", examples, model, 0, bf16)[1] for bf16 in (False, True))
    assert a != b
    assert a == pytest.approx(b, rel=0.1)
