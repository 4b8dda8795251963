"""The online loop and its engine: log-probabilities, frozen models, resuming, micro-batches, adapters, refusals."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvpo import models
from dvpo.config import Dvpo, KLSettings, LoraSettings, PolicySettings, Ppo
from dvpo.data.atlas import Atlas, build_tokenizer
from dvpo.data.templates import Encoded, encode_prompt
from dvpo.errors import InputError
from dvpo.objectives.advantages import ESTIMATORS, Signals, discounted_sum
from dvpo.objectives.kl import kl_rewards
from dvpo.training import policy
from dvpo.training.policy import Frozen, OnlineTrainer, Prompt, Rollouts, response_logprobs
from dvpo.values import collate, sequence_scores, token_values

ALGORITHMS: dict[str, dict[str, Any]] = {
    "q": {"name": "dvpo", "estimator": "q"},
    "gae": {"name": "dvpo", "estimator": "gae"},
    "official": {"name": "dvpo", "estimator": "official"},
    "ppo": {"name": "ppo", "critic_learning_rate": 1e-3},
    "remax": {"name": "remax"},
    "grpo": {"name": "grpo", "group_size": 3},
}
LORA = LoraSettings(r=4, alpha=8)
Make = Callable[..., OnlineTrainer]


def settings(algorithm: str = "gae", **changes: Any) -> PolicySettings:
    base = {"learning_rate": 1e-3, "updates": 2, "prompts_per_update": 4, "epochs": 2, "max_new_tokens": 8}
    return PolicySettings(**{**base, "algorithm": ALGORITHMS[algorithm], **changes})


@pytest.fixture(scope="module")
def starts(checkpoints, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The random policies with an EOS that is likely after some tokens and not after others: responses are ragged."""
    folders = {}
    for arch in ("llama", "gpt2"):
        model = models.load(checkpoints[arch, "policy"], "policy")
        model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= {"llama": 7, "gpt2": 3}[arch]
        folders[arch] = tmp_path_factory.mktemp("starts") / arch
        models.save(model, tokenizer, folders[arch])
    return folders


@pytest.fixture(scope="module")
def prompts(examples) -> list[Prompt]:
    return [e.prompt for e in examples]


@pytest.fixture
def make(starts, checkpoints, prompts) -> Make:
    """Builds a trainer on the tiny checkpoints."""

    def trainer(s: PolicySettings, arch: str = "llama", seed: int = 0, **options: Any) -> OnlineTrainer:
        scale = (0.1, 2.0)
        frozen = Frozen(**{role: checkpoints[arch, role] for role in ("value", "reward")}, reward_scale=scale)
        return OnlineTrainer(starts[arch], frozen, prompts, s, seed, **options)

    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def judged(trainer: OnlineTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Rollouts]:
    """A list that will hold the rollouts of every update."""
    kept: list[Rollouts] = []
    whole = trainer._judge

    def judge(*args: Any) -> Any:
        rollouts, row = whole(*args)
        kept.append(rollouts)
        return rollouts, row

    monkeypatch.setattr(trainer, "_judge", judge)
    return kept


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_every_algorithm_learns_and_leaves_the_frozen_models_alone(make, starts, tmp_path, algorithm, arch) -> None:
    trainer = make(settings(algorithm), arch)
    frozen = {name: getattr(trainer, name) for name in ("value", "reward", "reference") if getattr(trainer, name)}
    needed = {"dvpo": "value"}.get(trainer.algorithm.name, "reward")
    assert set(frozen) == {needed, "reference"}
    before = {name: weights(model) for name, model in frozen.items()}
    critic = weights(trainer.critic) if algorithm == "ppo" else {}
    rows = trainer.train(tmp_path / "state")
    assert [r["update"] for r in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    measured = {"update", "kl", "length", "finished", "surprise", "policy_loss", "clipped", "beta"}
    measured |= {"value"} if needed == "value" else {"score"}
    assert set(rows[0]) == measured | ({"critic_loss"} if algorithm == "ppo" else set())
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[1]["kl"]) > 1e-5
    for name, model in frozen.items():
        assert difference(weights(model), before[name]) == 0
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not model.training
    assert difference(weights(trainer.policy), weights(models.load(starts[arch], "policy"))) > 1e-4
    trainer.save(tmp_path / "out")
    assert difference(weights(models.load(tmp_path / "out", "policy")), weights(trainer.policy)) == 0
    models.require_same_tokenizer(starts[arch], tmp_path / "out", "policy")
    assert (trainer.critic is not None) == (algorithm == "ppo") == (tmp_path / "out" / "critic").exists()
    if algorithm == "ppo":
        assert difference(weights(trainer.critic), critic) > 1e-4
        assert difference(weights(models.load(tmp_path / "out" / "critic", "value")), weights(trainer.critic)) == 0


@pytest.mark.parametrize("algorithm", ["gae", "ppo", "remax", "grpo"])
def test_the_frozen_models_run_once_per_rollout(make, algorithm: str) -> None:
    counts = {}
    for epochs in (1, 4):
        trainer = make(settings(algorithm, epochs=epochs))
        calls = counts[epochs] = {"value": 0, "reward": 0, "reference": 0}

        def count(name: str, calls: dict[str, int] = calls) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                calls[name] += 1

            return hook

        for name in calls:
            if model := getattr(trainer, name):
                model.base_model.register_forward_pre_hook(count(name))
        trainer.step()
    assert counts[1] == counts[4]
    # ReMax has two answers to score, the sampled one and the greedy one.
    reward = {"gae": 0, "remax": 2}.get(algorithm, 1)
    assert counts[1] == {"value": int(algorithm == "gae"), "reward": reward, "reference": 1}


@pytest.mark.parametrize(("algorithm", "lora"), [("gae", None), ("ppo", None), ("gae", LORA), ("ppo", LORA)])
def test_interrupted_and_resumed_equals_uninterrupted(make, tmp_path, monkeypatch, algorithm, lora) -> None:
    """Bit for bit: weights, log and beta."""
    s = settings(algorithm, updates=5, save_updates=2, lora=lora, kl=KLSettings(target=1e-3, horizon=20))
    whole = make(s)
    expected = whole.train(tmp_path / "whole")
    cut = make(s)
    step = cut.step

    def dies() -> dict[str, float]:
        if cut.update == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(cut, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        cut.train(tmp_path / "cut")
    torch.rand(17)  # the resumed process has another random state
    resumed = make(s)
    steps: list[int] = []
    again = resumed.step
    monkeypatch.setattr(resumed, "step", lambda: (steps.append(resumed.update), again())[1])
    assert resumed.train(tmp_path / "cut") == expected
    assert steps == [2, 3, 4]  # it went on from its checkpoint, it did not begin again
    assert resumed.kl.beta == whole.kl.beta
    assert difference(weights(resumed.policy), weights(whole.policy)) == 0
    if algorithm == "ppo":
        assert difference(weights(resumed.critic), weights(whole.critic)) == 0
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["online.pt"]


@pytest.mark.parametrize("algorithm", ["gae", "ppo", "grpo"])
def test_micro_batches_change_nothing(make, algorithm: str) -> None:
    found = {}
    for micro in (None, 1):
        s = settings(algorithm, updates=1, minibatch_size=4, micro_batch_size=micro, learning_rate=2e-5)
        if algorithm == "ppo":
            s = s.model_copy(update={"algorithm": Ppo(critic_learning_rate=2e-5)})
        trainer = make(s)
        row = trainer.step()
        assert row["length"] != round(row["length"]) or row["length"] < 8  # ragged: the token counts differ
        found[micro] = (trainer, row)
    (one, row), (other, other_row) = found[None], found[1]
    assert row == pytest.approx(other_row, abs=1e-5)
    assert difference(weights(one.policy), weights(other.policy)) <= 1e-6
    if algorithm == "ppo":
        assert difference(weights(one.critic), weights(other.critic)) <= 1e-6


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_the_first_mini_batch_has_a_ratio_of_one(make, monkeypatch, arch: str, lora: LoraSettings | None) -> None:
    furthest: list[float] = []
    whole = policy.policy_loss

    def loss(
        logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *rest: Any
    ) -> Any:
        furthest.append(float(torch.where(mask, logprobs - old, 0).detach().abs().max()))
        return whole(logprobs, old, advantages, mask, *rest)

    monkeypatch.setattr(policy, "policy_loss", loss)
    trainer = make(settings(lora=lora, temperature=0.8), arch)
    for _ in range(3):
        furthest.clear()
        trainer.step()
        assert len(furthest) == 4
        assert furthest[0] <= 1e-5
        assert furthest[-1] > 1e-4


def test_the_reference_of_an_adapter_is_the_adapter_switched_off(make, starts, tmp_path, monkeypatch) -> None:
    trainer = make(settings(lora=LORA, updates=3, learning_rate=1e-2))
    assert trainer.reference is None
    rollouts = judged(trainer, monkeypatch)
    start = models.load(starts["llama"], "policy").eval()
    trainer.train(tmp_path / "state")
    for r in rollouts:
        with torch.no_grad():
            plain = response_logprobs(start, collate(r.texts, 0), 1.0)
        assert torch.allclose(r.ref_logprobs.cpu(), plain, atol=1e-5)
    assert float((rollouts[-1].old_logprobs - rollouts[-1].ref_logprobs).abs().max()) > 1e-3
    base = {
        n.replace(".base_layer", ""): p for n, p in weights(trainer.policy.get_base_model()).items() if "lora_" not in n
    }
    assert difference(base, weights(start)) == 0
    trainer.save(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    loaded = models.load(tmp_path / "out", "policy").eval()
    with torch.no_grad():
        batch = collate(rollouts[-1].texts, 0)
        ours, theirs = (response_logprobs(m, batch, 1.0) for m in (trainer.policy.eval().cpu(), loaded))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_answers_longer_than_a_model_reads_are_refused(make) -> None:
    longest = max(len(ids) for _, ids in make(settings()).prompts)
    make(settings(max_new_tokens=256 - longest))
    with pytest.raises(InputError, match=r"reads at most 256 .* text has 257; lower max_prompt_tokens or max_new_tok"):
        make(settings(max_new_tokens=257 - longest))


@pytest.mark.parametrize(("algorithm", "role"), [("gae", "value"), ("ppo", "reward"), ("grpo", "reward")])
def test_frozen_models_that_do_not_fit_are_refused(starts, checkpoints, prompts, tmp_path, algorithm, role) -> None:
    s, start = settings(algorithm), starts["llama"]
    with pytest.raises(InputError, match=f"needs a {role} model"):
        OnlineTrainer(start, Frozen(), prompts, s, 0)
    other_role = {"value": "reward", "reward": "value"}[role]
    with pytest.raises(InputError, match=f"needs a {role} model"):
        OnlineTrainer(start, Frozen(**{other_role: checkpoints["llama", other_role]}), prompts, s, 0)
    with pytest.raises(InputError, match="name a folder with"):
        OnlineTrainer(start, Frozen(**{role: checkpoints["llama", other_role]}), prompts, s, 0)
    folder = tmp_path / "foreign"
    shutil.copytree(checkpoints["llama", role], folder)
    build_tokenizer(Atlas.build(1)).save_pretrained(folder)
    with pytest.raises(InputError, match=f"the {role} model in .*foreign has another tokenizer"):
        OnlineTrainer(start, Frozen(**{role: folder}), prompts, s, 0)


def test_prompts_over_the_limit_are_left_out_and_said(make, tokenizer, prompts) -> None:
    lengths = sorted(len(encode_prompt(tokenizer, p)) for p in prompts)
    middle = lengths[len(lengths) // 2]
    trainer = make(settings(max_prompt_tokens=middle))
    over = sum(n > middle for n in lengths)
    assert 0 < over < len(prompts)
    assert len(trainer.prompts) == len(prompts) - over
    assert trainer.said == [f"{over} of {len(prompts)} prompts are over the length limit and were left out"]
    with pytest.raises(InputError, match="no prompt is within max_prompt_tokens=2"):
        make(settings(max_prompt_tokens=2))


def test_the_data_is_gone_through_in_whole_passes(make, prompts) -> None:
    trainer = make(settings(prompts_per_update=5))
    drawn = [i for update in range(12) for i in trainer._prompts_of(update)]
    passes = [drawn[k : k + 12] for k in range(0, 60, 12)]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert len({tuple(one) for one in passes}) == 5
    assert [trainer._prompts_of(u) for u in range(12)] == [drawn[k : k + 5] for k in range(0, 60, 5)]


def test_a_group_answers_the_same_prompt_and_is_shown_to_the_monitor(make, monkeypatch) -> None:
    seen: list[tuple[list[Prompt], list[str]]] = []

    def monitor(prompts: Any, texts: Any) -> dict[str, float]:
        seen.append((list(prompts), list(texts)))
        return {"gold": 0.5}

    trainer = make(settings("grpo"), monitor=monitor)
    rollouts = judged(trainer, monkeypatch)
    assert trainer.step()["gold"] == 0.5
    (shown, texts) = seen[0]
    (r,) = rollouts
    assert len(r.texts) == len(shown) == len(texts) == 12
    assert len({p[0]["content"] for p in shown}) == 4
    for i, text in enumerate(r.texts):
        assert shown[i] is shown[i // 3 * 3]
        assert text.prompt_ids == encode_prompt(trainer.tokenizer, shown[i])
        assert texts[i] == trainer.tokenizer.decode(text.response_ids, skip_special_tokens=True)
    plain = make(settings("grpo"))
    plain.step()
    assert difference(weights(plain.policy), weights(trainer.policy)) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_all(make, seed: int) -> None:
    one, other, another = make(settings(), seed=seed), make(settings(), seed=seed), make(settings(), seed=seed + 1)
    rows = [t.step() for t in (one, other, another)]
    assert rows[0] == rows[1] != rows[2]


def test_a_trajectory_holds_no_answer_to_the_prompt_itself(make) -> None:
    trainer = make(settings().model_copy(update={"algorithm": Dvpo(trajectory_k=3)}))
    chosen = [0, 1, 0, 2]
    texts = [Encoded(trainer.prompts[i][1], [5 + j]) for j, i in enumerate(chosen)]
    pairs = [(trainer.prompts[i][0], trainer._text(t)) for i, t in zip(chosen, texts, strict=True)]
    read = trainer._value_texts(chosen, texts)
    for text, own, others in zip(read, texts, ([1, 3], [2, 3, 0], [3, 1], [0, 1, 2]), strict=True):
        tau = [pairs[j] for j in others]
        prompt, _ = pairs[texts.index(own)]
        assert text == Encoded(encode_prompt(trainer.tokenizer, prompt, tau), own.response_ids)


def test_a_trajectory_changes_what_the_value_model_reads_and_nothing_else(make, monkeypatch) -> None:
    found = {}
    for k in (0, 1, 2):
        read: list[Any] = []
        whole = policy.token_values
        trainer = make(settings().model_copy(update={"algorithm": Dvpo(trajectory_k=k)}))
        rollouts = judged(trainer, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(policy, "token_values", lambda m, b, read=read, whole=whole: (read.append(b), whole(m, b))[1])
            trainer.step()
        assert len(read) == 1
        rows = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(read[0].input_ids_B_L, read[0].attention_mask_B_L, strict=True)
        ]
        found[k] = (rows, rollouts[0], read[0].mask_B_S, trainer)
    plain, r, mask, trainer = found[0]
    assert plain == [t.prompt_ids + t.response_ids for t in r.texts]
    prompts = [trainer.prompts[i][0] for i in trainer._prompts_of(0)]
    pairs = [
        (p, trainer.tokenizer.decode(t.response_ids, skip_special_tokens=True))
        for p, t in zip(prompts, r.texts, strict=True)
    ]
    for k in (1, 2):
        rows, other, other_mask, _ = found[k]
        assert other.texts == r.texts
        assert torch.equal(other.old_logprobs, r.old_logprobs)
        assert torch.equal(other_mask, mask)
        for i in range(4):
            tau = [pairs[(i + 1 + j) % 4] for j in range(k)]
            assert rows[i] == encode_prompt(trainer.tokenizer, prompts[i], tau) + r.texts[i].response_ids
        assert not torch.allclose(other.advantages, r.advantages)


@pytest.mark.parametrize("form", ["reward", "loss"])
@pytest.mark.parametrize("algorithm", ["gae", "grpo"])
def test_beta_follows_the_distance(make, tmp_path, form: str, algorithm: str) -> None:
    kl = KLSettings(beta=0.05, target=1e-3, horizon=50, form=form)
    rows = make(settings(algorithm, updates=4, kl=kl)).train(tmp_path)
    beta, n = 0.05, 12 if algorithm == "grpo" else 4
    for row in rows:
        beta *= 1 + min(max(row["kl"] / 1e-3 - 1, -0.2), 0.2) * n / 50
        assert row["beta"] == pytest.approx(beta)
    assert rows[0]["beta"] == pytest.approx(0.05 * (1 - 0.2 * n / 50))  # at first there is no distance
    fixed = make(settings(algorithm, kl=KLSettings(beta=0.05, target=None, form=form))).train(tmp_path / "fixed")
    assert {r["beta"] for r in fixed} == {0.05}


@pytest.mark.parametrize("form", ["reward", "loss"])
def test_a_strong_penalty_holds_the_policy_back(make, tmp_path, form: str) -> None:
    """Where the rewards say nothing, only the penalty pulls: a policy that has left its reference comes back."""
    far = {}
    for beta in (0.0, 50.0):
        s = settings("gae", updates=6, whiten=False, kl=KLSettings(beta=beta, target=None, form=form))
        trainer = make(s)
        trainer.train(tmp_path / f"{form}-{beta}")
        far[beta] = sum(abs(r["kl"]) for r in trainer.log[1:])
    assert far[50.0] < far[0.0]


@pytest.mark.parametrize("algorithm", ["gae", "ppo"])
def test_what_is_judged_is_what_the_settings_say(make, starts, checkpoints, algorithm: str) -> None:
    """Temperature, gamma, lambda, the penalty's discount and the reward's scale, on plain forward passes."""
    kl = KLSettings(beta=0.3, target=None)
    s = settings(algorithm, temperature=0.7, gamma=0.9, lam=0.6, whiten=False, kl=kl, learning_rate=1e-2)
    trainer = make(s)
    trainer.step()
    chosen = trainer._prompts_of(1)
    texts, greedy, _ = trainer._roll_out(chosen)
    r, row = trainer._judge(chosen, texts, greedy)
    batch = collate(texts, 0)
    mask = batch.mask_B_S[:, 1:]
    with torch.no_grad():
        old = response_logprobs(trainer.policy, batch, 0.7)
        ref = response_logprobs(models.load(starts["llama"], "policy").eval(), batch, 0.7)
        scores = (sequence_scores(models.load(checkpoints["llama", "reward"], "reward").eval(), batch) - 0.1) / 2
        model = trainer.critic if algorithm == "ppo" else models.load(checkpoints["llama", "value"], "value").eval()
        values = token_values(model, batch)
    signals = Signals(mask, values_B_S=values, scores_B=scores, gamma=0.9, lam=0.6)
    expected = ESTIMATORS["critic" if algorithm == "ppo" else "gae"](signals)
    expected = expected + discounted_sum(kl_rewards(old, ref, mask, 0.3), mask, 0.9 * 0.6)
    assert float((old - ref).abs().max()) > 1e-2
    assert torch.allclose(r.advantages, expected, atol=1e-4)
    n = mask.sum()
    assert row["kl"] == pytest.approx(float((old - ref).sum() / n), abs=1e-5)
    assert row["surprise"] == pytest.approx(-float(old.sum() / n), abs=1e-5)
    eos = trainer.tokenizer.eos_token_id
    assert row["finished"] == sum(t.response_ids[-1] == eos for t in texts) / len(texts)
    if algorithm == "ppo":
        assert torch.allclose(r.old_values, values[:, :-1], atol=1e-5)
        assert torch.allclose(r.returns, expected + values[:, :-1], atol=1e-4)
        assert row["score"] == pytest.approx(float(scores.mean()), abs=1e-5)
    else:
        assert row["value"] == pytest.approx(float(values[:, 1:][mask].mean()), abs=1e-5)


def test_whitening_is_over_the_response_tokens(make) -> None:
    trainer = make(settings())
    chosen = trainer._prompts_of(0)
    r, _ = trainer._judge(chosen, *trainer._roll_out(chosen)[:2])
    assert not r.mask.all()
    assert float(r.advantages[r.mask].mean()) == pytest.approx(0, abs=1e-5)
    assert float(r.advantages[r.mask].std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_the_settings_of_the_losses_reach_them(make, monkeypatch) -> None:
    clips, kept, critic, pulled = [], [], [], []
    ours, theirs = policy.policy_loss, policy.critic_loss

    def loss(*args):
        clips.append(args[4])
        kept.append((int(args[5]), int(args[3].sum())))
        return ours(*args)

    def value_loss(*args):
        critic.append((args[4], theirs(*args)))
        assert int(args[5]) == kept[-1][0]
        return critic[-1][1]

    monkeypatch.setattr(policy, "policy_loss", loss)
    monkeypatch.setattr(policy, "critic_loss", value_loss)
    ppo = Ppo(critic_learning_rate=3e-4, value_clip=0.35, value_coefficient=0.25)
    trainer = make(settings(clip=0.15, max_grad_norm=0.5).model_copy(update={"algorithm": ppo}))
    assert trainer.critic_learner.optimizer.param_groups[0]["lr"] == 3e-4
    assert (trainer.policy_learner.max_grad_norm, trainer.critic_learner.max_grad_norm) == (0.5, 0.5)
    backward = trainer.critic_learner.backward
    monkeypatch.setattr(
        trainer.critic_learner, "backward", lambda x, last: (pulled.append(x.item()), backward(x, last))
    )
    trainer.step()
    assert set(clips) == {0.15} and {clip for clip, _ in critic} == {0.35}
    assert pulled == pytest.approx([0.25 * x.item() for _, x in critic])
    assert all(count == tokens for count, tokens in kept)  # a mini-batch is divided by its own tokens


def test_a_first_critic_step_pulls_the_values_to_the_returns(make) -> None:
    """Before any step the critic's values are the old ones, so its loss is half the mean squared advantage."""
    trainer = make(settings("ppo", epochs=1, minibatch_size=4, whiten=False))
    chosen = trainer._prompts_of(0)
    r, _ = trainer._judge(chosen, *trainer._roll_out(chosen)[:2])
    row = trainer._learn(r, 0)
    assert row["critic_loss"] == pytest.approx(0.5 * float((r.advantages[r.mask] ** 2).mean()), rel=1e-4)


def test_every_epoch_has_its_own_order_and_a_row_is_a_mean_over_steps(make, monkeypatch) -> None:
    trainer = make(settings(epochs=3, prompts_per_update=8))
    chosen = trainer._prompts_of(0)
    r, _ = trainer._judge(chosen, *trainer._roll_out(chosen)[:2])
    seen: list[int] = []
    steps = iter(range(12))
    said = lambda r, rows, count, last: (seen.extend(rows), {"policy_loss": float(next(steps)), "clipped": 0.5})[1]  # noqa
    monkeypatch.setattr(trainer, "_backward", said)
    row = trainer._learn(r, 0)
    epochs = [tuple(seen[k : k + 8]) for k in (0, 8, 16)]
    assert len(set(epochs)) == 3 and all(sorted(e) == list(range(8)) for e in epochs)
    assert (row["policy_loss"], row["clipped"]) == (5.5, 0.5)


def test_seeds_make_other_orders_and_answers(make) -> None:
    one, other = make(settings("grpo"), seed=0), make(settings("grpo"), seed=1)
    assert one._prompts_of(0) != other._prompts_of(0)
    first = one._roll_out([0, 0])[0]
    assert len({tuple(t.response_ids) for t in first}) > 1  # of one prompt
    one.update = 1
    assert one._roll_out([0, 0])[0] != first
