"""AlpacaEval 2: outputs for 805 instructions against a baseline's, by weighted preferences and corrected for length.

The protocol is that of Dubois et al. 2024 (arXiv:2404.04475) as the package alpaca_eval 0.6.6 has it. One question of
each instruction shows both outputs, of models called m and M; which of them the policy is follows from the instruction,
by the package's own rule. The judge names the better one in a single token, and the policy's preference is the
probability of its name over that of both names among the five likeliest tokens. Equal outputs are a draw and not asked.

- `win_rate`: the mean preference, in percent. `discrete_win_rate` rounds every preference first.
- `length_controlled`: what a logistic model of the preferences says for outputs of equal length. It is the package's
  own (`get_length_controlled_winrate`, the extra `alpaca`), on local data: it needs df_gamed.csv of the hub data set
  tatsu-lab/alpaca_eval, and the place that every instruction has among the 805.

The published baseline is gpt-4-1106-preview. What differs: the judge's prompt is our own; a name counts with white
space around it too; where the endpoint gives no log-probability of the name that it writes, that name is the
preference, 0 or 1; and what has no verdict is counted, with `bounds`.
"""

import csv
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dvpo.data.splits import brief, is_hub_id
from dvpo.errors import InputError
from dvpo.evaluation.answers import Answer, Answers
from dvpo.evaluation.benchmark_data import Benchmark, Question
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.evaluation.judge import Judge, Reply, Request, count_failures, why_no_verdict
from dvpo.evaluation.judge_prompt import JudgePrompt, chat
from dvpo.evaluation.judged import Judged
from dvpo.files import sha256_file

MAX_NEW_TOKENS = 4096
TEMPERATURE = 0.7
"""Of the answers: what the package samples with where a model's own settings say nothing else."""
JUDGE_TOKENS = 1
TOP_LOGPROBS = 5
FIRST, SECOND = "m", "M"
RESAMPLES = 100
"""Each is a fit of the logistic model, about a second with 805 questions."""
GAMED = "df_gamed.csv"
_GAMED_COLUMNS = ("model", "preference", "index", "instruction_difficulty", "std_delta_len", "not_gamed_baseline")
_NO_LOGPROBS = ("HTTP 400", "HTTP 422")
_AROUND = " \t\r\n\"'`.*:()[]"

_SYSTEM = """
You are shown an instruction and the outputs that two language models gave to it. Choose the output that most people
would prefer: the one that does what the instruction asks, is right, and helps most.
"""
_USER = """
### The instruction
{instruction}

### The output of model m
{output_1}

### The output of model M
{output_2}

### Which model's output is better?
Reply with the model's name and nothing else: m or M.
"""
PROMPT = JudgePrompt(parts={"pair": chat(_SYSTEM, _USER)}, fields={"pair": ("instruction", "output_1", "output_2")})


@dataclass(frozen=True)
class Comparison:
    """One instruction: how strongly the policy's output is preferred, or the reason why that is not known.

    preference: 0 (the baseline's) to 1 (the policy's). policy_is: m or M. lengths: characters of the outputs, 0 where
    there is none. place: of the instruction in the whole benchmark, from 0; None where that is not known.
    """

    question: str
    policy_is: str
    preference: float | None
    failure: str | None
    policy_length: int
    baseline_length: int
    place: int | None


def alpaca_eval(
    benchmark: Benchmark,
    model: Answers,
    baseline: Answers,
    judge: Judge,
    *,
    prompt: JudgePrompt = PROMPT,
    max_tokens: int = JUDGE_TOKENS,
    temperature: float = TEMPERATURE,
    places: Mapping[str, int] | None = None,
    gamed: Path | None = None,
) -> Judged:
    """The benchmark of one policy, ready to run.

    Args:
        temperature: of the answers.
        places: of the questions' ids among the 805. gamed: df_gamed.csv. Without both, no length-controlled win rate.

    Raises:
        InputError: gamed is no such file, or the package is not there.
    """
    if gamed is not None:
        check_gamed(gamed)
    return Judged(
        benchmark=benchmark,
        sides={"model": model, "baseline": baseline},
        temperatures=[temperature] * len(benchmark.questions),
        judge=judge,
        prompt=prompt,
        max_tokens=max_tokens,
        requests=partial(requests, prompt=prompt, max_tokens=max_tokens),
        ask=partial(ask, judge),
        read=partial(comparisons, places=places or {}),
        table=partial(table, gamed=gamed),
    )


def places_in(whole: Benchmark) -> dict[str, int]:
    """The place of every question; none where the benchmark is a part, which does not say what is missing."""
    return {} if whole.part else {q.id: i for i, q in enumerate(whole.questions)}


def policy_is_first(instruction: str) -> bool:
    """Whether the policy is m. The package's rule: a random choice seeded with the instruction."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]


def requests(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    prompt: JudgePrompt,
    max_tokens: int,
) -> list[list[Request]]:
    """One request of every question; none where an answer is missing or both are the same."""
    asked: list[list[Request]] = []
    for q, ours, theirs in zip(questions, answers, baseline, strict=True):
        asked.append([])
        if _missing(ours, theirs) is None and ours.turns[0] != theirs.turns[0]:
            instruction, texts = q.turns[0], (theirs.turns[0], ours.turns[0])
            output_1, output_2 = reversed(texts) if policy_is_first(instruction) else texts
            messages = prompt.messages("pair", instruction=instruction, output_1=output_1, output_2=output_2)
            asked[-1].append(Request(messages, prompt.sha256, max_tokens, top_logprobs=TOP_LOGPROBS))
    return asked


def _missing(ours: Answer, theirs: Answer) -> str | None:
    return ours.failure or (theirs.failure and f"{theirs.failure} (baseline)")


def ask(judge: Judge, asked: Sequence[Request]) -> list[Reply]:
    """The judge's replies; an endpoint that refuses to give log-probabilities is asked without."""
    replies = judge.ask(asked)
    refused = [i for i, r in enumerate(replies) if r.failure in _NO_LOGPROBS]
    plain = judge.ask([replace(asked[i], top_logprobs=None) for i in refused])
    for i, reply in zip(refused, plain, strict=True):
        replies[i] = reply
    return replies


def first_preferred(reply: Reply) -> float | None:
    """The probability that m is better, from the first token's log-probabilities or the name written; None: neither."""
    top = reply.logprobs[0] if reply.logprobs else {}
    weights = dict.fromkeys((FIRST, SECOND), 0.0)
    for token, logprob in top.items():
        if token.strip() in weights:
            weights[token.strip()] += math.exp(logprob)
    written = (reply.text or "").strip(_AROUND)
    # The name written is the likeliest: where its probability is not known, the other's alone would mislead.
    if weights.get(written) == 0:
        return float(written == FIRST)
    total = sum(weights.values())
    return weights[FIRST] / total if total > 0 else None


def comparisons(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    replies: Sequence[Sequence[Reply]],
    places: Mapping[str, int],
) -> list[Comparison]:
    """Every question's preference, read from the replies to `requests`."""
    found = []
    for q, ours, theirs, said in zip(questions, answers, baseline, replies, strict=True):
        first = policy_is_first(q.turns[0])
        preference, failure = None, None
        if missing := _missing(ours, theirs):
            failure = f"no answer: {missing}"
        elif not said:
            preference = 0.5
        elif (m := first_preferred(said[0])) is not None:
            preference = m if first else 1 - m
        else:
            # One token is allowed, so that every reply is cut off: that is no reason.
            failure = why_no_verdict(replace(said[0], finish=None))
        policy_length, baseline_length = (len(a.turns[0]) if a.turns else 0 for a in (ours, theirs))
        policy_is = FIRST if first else SECOND
        found.append(Comparison(q.id, policy_is, preference, failure, policy_length, baseline_length, places.get(q.id)))
    return found


def table(found: Sequence[Comparison], gamed: Path | None = None) -> dict[str, Any]:
    """The benchmark's numbers, win rates of the policy in percent (50 is the baseline's own).

    Returns:
        {"win_rate", "ci95", "standard_error", "discrete_win_rate", "wins", "draws", "losses", "length_controlled",
        "mean_length": {"model", "baseline"}, "bounds", "questions", "failed", "failures": {reason: count}}. Rates are
        None where nothing was judged. bounds: the win rate had every failed question been lost, and won. Lengths are
        in characters, over the questions that both answered.
    """
    rates = 100 * np.array([c.preference for c in found if c.preference is not None], dtype=np.float64)
    n, failed = rates.size, sum(c.preference is None for c in found)
    rate, interval = mean_with_interval(rates.tolist()) if n else (None, None)
    counts = {"wins": int((rates > 50).sum()), "draws": int((rates == 50).sum()), "losses": int((rates < 50).sum())}
    answered = [c for c in found if not (c.failure or "").startswith("no answer")]
    return {
        "win_rate": rate,
        "ci95": None if interval is None else list(interval),
        "standard_error": float(rates.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "discrete_win_rate": 100 * (counts["wins"] + counts["draws"] / 2) / n if n else None,
        **counts,
        "length_controlled": length_controlled(answered, gamed),
        "mean_length": {
            "model": float(np.mean([c.policy_length for c in answered])) if answered else None,
            "baseline": float(np.mean([c.baseline_length for c in answered])) if answered else None,
        },
        "bounds": [float(rates.sum() + extra) / len(found) for extra in (0, 100 * failed)] if found else None,
        "questions": len(found),
        "failed": failed,
        "failures": count_failures([c.failure for c in found]),
    }


def length_controlled(answered: Sequence[Comparison], gamed: Path | None, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The length-controlled win rate, in percent, of questions that both sides answered.

    Returns:
        {"win_rate", "ci95", "standard_error", "package", "gamed_sha256"}; for the interval the model is fitted to
        questions drawn anew, while the package's standard error is only that of its predicted preferences' mean. Or
        {"win_rate": None, "why"}.
    """
    why = None
    if gamed is None:
        why = f"{GAMED} was not given"
    elif any(c.place is None for c in answered):
        why = "the questions' places among the 805 are not known"
    elif len({c.policy_length - c.baseline_length for c in answered if c.preference is not None}) < 2:
        why = "fewer than two differences of length were judged"
    if gamed is None or why is not None:
        return {"win_rate": None, "why": why}
    glm, version = _package()
    # The package reads nothing of the outputs but their lengths.
    annotations = [
        {
            "index": c.place,
            "preference": None if c.preference is None else 1 + c.preference,
            "output_1": " " * c.baseline_length,
            "output_2": " " * c.policy_length,
            "generator_1": "baseline",
            "generator_2": "model",
        }
        for c in answered
    ]

    def fitted(rows: Sequence[int]) -> dict[str, Any]:
        return glm.get_length_controlled_winrate(
            [annotations[i] for i in rows],
            save_weights_dir=None,
            is_add_glm_preference_inplace=False,
            is_warn_extreme_changes=False,
        )

    n = len(annotations)
    with _reading(glm, gamed):
        found = fitted(range(n))
        draws = np.random.default_rng(0).integers(0, n, (resamples, n)).tolist()
        rates = [fitted(draw)["length_controlled_winrate"] for draw in draws]
    low, high = np.percentile(rates, [2.5, 97.5])
    return {
        "win_rate": float(found["length_controlled_winrate"]),
        "ci95": [float(low), float(high)],
        "standard_error": float(found["lc_standard_error"]),
        "package": f"alpaca_eval {version}",
        "gamed_sha256": sha256_file(gamed),
    }


def _package() -> tuple[Any, str]:
    """The package's module of the logistic model, and its version."""
    try:
        from alpaca_eval import __version__
        from alpaca_eval.metrics import glm_winrate
    except ImportError as error:
        raise InputError(
            f"the length-controlled win rate needs the package alpaca_eval ({brief(error)}); install dvpo[alpaca]"
        ) from error
    return glm_winrate, __version__


@contextmanager
def _reading(glm: Any, gamed: Path) -> Iterator[None]:
    """Has the package read the local file where it would fetch one, and takes back what it sets for all of sklearn."""
    import sklearn

    fetch = glm.hf_hub_download
    glm.hf_hub_download = lambda **_: str(gamed)
    try:
        with sklearn.config_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        glm.hf_hub_download = fetch


def gamed_file(source: str) -> Path:
    """df_gamed.csv, from a file or from a data set owner/name@REV of the hub. Raises InputError where it is not."""
    if Path(source).is_file() or not is_hub_id(source):
        return Path(source)
    name, _, revision = source.partition("@")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, GAMED, repo_type="dataset", revision=revision))
    except Exception as error:  # the library raises whatever its network and cache raise
        raise InputError(f"{source}: {GAMED} cannot be loaded from the hub ({brief(error)}); give a file") from error


def check_gamed(path: Path) -> None:
    """Raises InputError where the file is not df_gamed.csv, or the package that reads it is not there."""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            lacking = set(_GAMED_COLUMNS) - set(next(csv.reader(f), []))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({brief(error)}); give {GAMED} of tatsu-lab/alpaca_eval") from error
    if lacking:
        raise InputError(f"{path} has no column {min(lacking)}; give {GAMED} of tatsu-lab/alpaca_eval")
    _package()
