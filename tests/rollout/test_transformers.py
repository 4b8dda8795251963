"""The trainer's own engine: plain greedy tokens, the whole distribution, a seed for each prompt, work that stops."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvpo import models
from dvpo.config import LoraSettings
from dvpo.data.templates import Encoded
from dvpo.logprobs import response_logprobs
from dvpo.rollout import prompt_seed
from dvpo.rollout.transformers import TransformersEngine, invert_cdf, uniforms
from dvpo.values import collate

both = pytest.mark.parametrize("arch", ["llama", "gpt2"])


@pytest.fixture
def engine(ragged_policies, tokenizer) -> Any:
    def build(arch: str = "llama", limit: int = 12, temperature: float = 1.0, **options: Any) -> TransformersEngine:
        model = models.load(ragged_policies[arch], "policy", **options).eval()
        return TransformersEngine(model, tokenizer, limit, temperature)

    return build


@torch.no_grad()
def greedy_by_hand(model: Any, prompt: list[int], eos: int, limit: int) -> list[int]:
    """Without cache or padding."""
    made: list[int] = []
    while len(made) < limit and eos not in made:
        made.append(int(model(torch.tensor([prompt + made])).logits[0, -1].argmax()))
    return made


@torch.no_grad()
def sample_by_hand(model: Any, prompt: list[int], eos: int, points: list[float], temperature: float) -> list[int]:
    """Walks the distribution, token by token, up to the uniform number."""
    made: list[int] = []
    for point in points:
        left, token = point, 0
        shares = (model(torch.tensor([prompt + made])).logits[0, -1].double() / temperature).softmax(-1).tolist()
        while left >= shares[token]:
            left, token = left - shares[token], token + 1
        made.append(token)
        if token == eos:
            break
    return made


@both
def test_greedy_tokens_are_the_plain_argmax_whoever_is_beside_them(engine, tokenizer, prompt_ids, arch: str) -> None:
    ours = engine(arch, 16, 0.7)
    plain = [greedy_by_hand(ours.model, p, tokenizer.eos_token_id, 16) for p in prompt_ids]
    assert ours.greedy(prompt_ids) == plain
    assert ours.greedy(prompt_ids[::-1]) == plain[::-1]
    assert [ours.greedy([p])[0] for p in prompt_ids] == plain


@both
def test_samples_are_those_of_a_walk_over_the_distribution(engine, tokenizer, prompt_ids, arch: str) -> None:
    ours = engine(arch, 12, 0.7)
    seeds = [prompt_seed(3, place) for place in range(len(prompt_ids))]
    points = uniforms(seeds, 12).tolist()
    found = [s.token_ids for s in ours.sample(prompt_ids, seeds)]
    eos = tokenizer.eos_token_id
    assert found == [sample_by_hand(ours.model, p, eos, u, 0.7) for p, u in zip(prompt_ids, points, strict=True)]


@both
def test_a_response_follows_its_own_seed_whoever_is_beside_it(engine, prompt_ids, arch: str) -> None:
    ours = engine(arch)
    seeds = [prompt_seed(0, 5, place) for place in range(len(prompt_ids))]
    state = torch.get_rng_state()
    found = [s.token_ids for s in ours.sample(prompt_ids, seeds)]
    assert torch.equal(torch.get_rng_state(), state)
    half = len(seeds) // 2
    for part in (slice(0, half), slice(half, None), slice(None, None, -1), slice(3, 4)):
        assert [s.token_ids for s in ours.sample(prompt_ids[part], seeds[part])] == found[part]
    same = ours.sample([prompt_ids[0]] * 20, [prompt_seed(0, 6, place) for place in range(20)])
    assert len({tuple(s.token_ids) for s in same}) > 15


def test_responses_end_at_eos_or_at_the_limit(engine, tokenizer, prompt_ids) -> None:
    eos = tokenizer.eos_token_id
    found = [s.token_ids for s in engine().sample(prompt_ids * 16, range(16 * len(prompt_ids)))]
    ended = [ids for ids in found if ids[-1] == eos]
    assert 0 < len(ended) < len(found)
    assert all(ids.count(eos) == 1 and len(ids) <= 12 for ids in ended)
    assert all(len(ids) == 12 and eos not in ids for ids in found if ids[-1] != eos)


@both
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainer_s(engine, prompt_ids, arch: str, temperature: float) -> None:
    ours = engine(arch, 12, temperature)
    samples = ours.sample(prompt_ids, range(len(prompt_ids)))
    texts = [Encoded(p, s.token_ids) for p, s in zip(prompt_ids, samples, strict=True)]
    with torch.no_grad():
        again = response_logprobs(ours.model, collate(texts, 0), temperature)
    for row, sample in zip(again.tolist(), samples, strict=True):
        assert sample.logprobs == pytest.approx(row[: len(sample.logprobs)], abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_are_from_the_whole_distribution(checkpoints, tokenizer, prompt_ids, temperature: float) -> None:
    model = models.load(checkpoints["llama", "policy"], "policy").eval()
    # What a published checkpoint brings along must not bend the distribution that the log-probabilities are of.
    model.generation_config.update(repetition_penalty=3.0, top_k=5, top_p=0.5, temperature=0.1, min_new_tokens=1)
    engine = TransformersEngine(model, tokenizer, 1, temperature)
    n = 6000
    drawn = torch.tensor([s.token_ids[0] for s in engine.sample([prompt_ids[0]] * n, range(n))])
    with torch.no_grad():
        expected = (model(torch.tensor([prompt_ids[0]])).logits[0, -1] / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=len(expected)) / n
    # The spread of n draws: the sum of |found - p| is about sqrt(2 / pi) * sum sqrt(p (1 - p) / n).
    noise = float((expected * (1 - expected) / n).sqrt().sum()) * (2 / math.pi) ** 0.5
    assert float((found - expected).abs().sum()) < 1.3 * noise


def test_rows_that_are_done_are_not_computed(engine, prompt_ids) -> None:
    """One token per row and step after the prompts, and no step after the last row has ended."""
    ours = engine(limit=64)
    sizes = []
    ours.model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    lengths = [len(s.token_ids) for s in ours.sample(prompt_ids, range(len(prompt_ids)))]
    assert sizes[0] == (len(prompt_ids), max(map(len, prompt_ids)))
    assert sizes[1:] == [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]
    assert max(lengths) < 64


def test_an_adapter_takes_part(engine, prompt_ids) -> None:
    torch.manual_seed(0)
    ours = engine(lora=LoraSettings(r=4, alpha=8))
    plain = ours.greedy(prompt_ids)
    for name, p in ours.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    assert ours.greedy(prompt_ids) != plain
    with ours.model.disable_adapter():
        assert ours.greedy(prompt_ids) == plain


def test_weights_are_gathered_once_for_the_whole_phase(engine, tokenizer, prompt_ids) -> None:
    events = []

    @contextmanager
    def gathered() -> Iterator[None]:
        events.append("gather")
        yield
        events.append("release")

    ours = TransformersEngine(engine().model, tokenizer, 12, 1.0, gathered)
    ours.model.register_forward_hook(lambda *_: events.append("step"))
    with ours.awake():
        ours.sample(prompt_ids, range(len(prompt_ids)))
        ours.greedy(prompt_ids[:2])
    assert events[0] == "gather" and events[-1] == "release" and set(events[1:-1]) == {"step"}


def test_the_cumulative_distribution_by_hand() -> None:
    logprobs = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()
    points = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(logprobs.expand(6, -1), points).tolist() == [0, 0, 2, 2, 3, 3]


@given(st.integers(0, 2**63 - 1))
def test_uniform_numbers_of_a_seed(seed: int) -> None:
    found = uniforms([seed, seed, seed ^ 1], 8)
    assert found.dtype == torch.float64 and bool(((found >= 0) & (found < 1)).all())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(found[:1, :3], uniforms([seed], 3))


def test_seeds_differ_by_every_part_of_their_place() -> None:
    places = [(a, b, c) for a in range(3) for b in range(12) for c in range(12)]
    seeds = {prompt_seed(*place) for place in places}
    assert len(seeds) == len(places) and all(0 <= seed < 2**63 for seed in seeds)


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logprobs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log()
    points = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(logprobs.expand(3, -1), points).tolist() == [1, 2, 2]


def test_a_token_rarer_than_float32_resolves_is_not_lost() -> None:
    logprobs = torch.tensor([[0.5, 1e-9, 0.5]]).log()
    shares = logprobs[0].double().exp()
    middles = (shares.cumsum(0) - shares / 2) / shares.sum()
    assert invert_cdf(logprobs.expand(3, -1), middles).tolist() == [0, 1, 2]


def test_prompts_of_one_seed_are_answered_each_by_its_place(checkpoints, tokenizer) -> None:
    engine = TransformersEngine(models.load(checkpoints["llama", "policy"], "policy"), tokenizer, 8, 1.0)
    answers = engine.generate([[5, 6, 7]] * 4, seed=0)
    assert len(set(map(tuple, answers))) > 1
    assert answers == engine.generate([[5, 6, 7]] * 4, seed=0) != engine.generate([[5, 6, 7]] * 4, seed=1)


def test_an_unnormalised_sum_keeps_to_the_tokens_there_are() -> None:
    """Log-probabilities of float32 do not sum to 1: the points are shares of what they sum to."""
    logprobs = torch.tensor([[0.25, 0.25, 0.0]]).log()
    assert invert_cdf(logprobs, torch.tensor([0.9], dtype=torch.float64)).tolist() == [1]
