"""DVPO in TRL: a reward function for its trainers, and `DVPOTrainer`, a GRPOTrainer with advantages for every token.

What differs from `dvpo train policy`: rollouts, optimiser, logging and distribution are TRL's. The distance to the
reference is TRL's loss term (`beta`, the k3 estimate); the reward stream is not offered here, for TRL computes the
reference's probabilities only together with that term. With `loss_type="dapo"` (TRL's default) and as many generation
steps as accumulation steps (also the default) the loss is `dvpo.objectives.policy_loss` divided by the response tokens
of the whole batch, plus `beta` times `dvpo.objectives.kl.kl_loss` (DVPOConfig switches off the ratio that TRL puts on
that term by default, `use_bias_correction_kl`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from dvpo import models
from dvpo.data.templates import Encoded, encode_prompt
from dvpo.errors import InputError
from dvpo.integrations.client import GVMClient
from dvpo.objectives.advantages import ESTIMATORS, Signals
from dvpo.objectives.stats import masked_whiten
from dvpo.objectives.td import AGGREGATES, aggregate
from dvpo.values import score_all

Estimator = Literal["q", "gae", "official"]
GVM = str | Path | GVMClient
"""Where the values come from: a checkpoint folder, the URL of a scoring server, or a client of one."""

Values = Callable[[Sequence[Encoded]], list[Tensor]]
"""h_0..h_T of every text: a list of float32 [T + 1] on the CPU."""


def open_gvm(gvm: GVM, tokenizer: PreTrainedTokenizerBase) -> Values:
    """The frozen GVM behind a folder or a URL. Raises InputError where its tokenizer is not the policy's."""
    if isinstance(gvm, str) and gvm.startswith(("http://", "https://")):
        gvm = GVMClient(gvm)
    if isinstance(gvm, GVMClient):
        gvm.require_tokenizer(tokenizer)
        return _remote(gvm)
    ours, theirs = (models.tokenizer_fingerprint(t) for t in (tokenizer, models.load_tokenizer(gvm)))
    if ours != theirs:
        raise InputError(
            f"the GVM in {gvm} has another tokenizer (fingerprint {theirs[:12]}) than the policy ({ours[:12]}); train "
            "it from a checkpoint with the policy's tokenizer"
        )
    return _local(gvm, tokenizer)


def gvm_reward(
    gvm: GVM, tokenizer: PreTrainedTokenizerBase, how: str = "mean", **template: Any
) -> Callable[..., list[float]]:
    """A reward function for TRL's online trainers: the score of each completion from its token values.

    Args:
        tokenizer: the policy's.
        how: the aggregate (mean, last, p1, p5, p10, p90, p95, p99, bellman).
        template: what the trainer gives the chat template (its `chat_template_kwargs`, `chat_template` and `tools`).
            TRL does not hand it to reward functions, and without it the GVM would read another prompt than the policy.

    Raises:
        InputError: an unknown aggregate, or a GVM with another tokenizer.
    """
    if how not in AGGREGATES:
        raise InputError(f"unknown aggregate {how!r}; one of {', '.join(AGGREGATES)}")
    values = open_gvm(gvm, tokenizer)

    def gvm_score(prompts: Sequence[Any], completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        read = [_prompt_ids(tokenizer, prompt, template) for prompt in prompts]
        texts = [Encoded(p, list(c)) for p, c in zip(read, completion_ids, strict=True)]
        return _scores(values(texts), how)

    return gvm_score


@dataclass
class DVPOConfig(GRPOConfig):
    """GRPOConfig with one response for each prompt (DVPO compares none, so it needs no group) and the plain k3 term."""

    num_generations: int | None = field(default=1, metadata={"help": "Responses for each prompt; one is enough."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Multiply the KL term by the ratio."})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            # GRPOConfig refuses a group of one after everything else has been set up and checked.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise


class DVPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are a frozen GVM's, one for every response token, EOS included.

    The rewards that TRL logs are the mean Q of each response; they take no part in the training.

    Args:
        model: as in GRPOTrainer.
        gvm: a folder, a URL or a client. In the process it runs beside the policy, on the same device.
        processing_class: the policy's tokenizer; its ids are what the GVM scores.
        args: DVPOConfig, or GRPOConfig for two and more responses for each prompt.
        estimator, gamma, lam: as in `dvpo.objectives.advantages`.
        whiten: bring the advantages of a generation batch (all processes) to mean 0 and variance 1.
        kwargs: the other arguments of GRPOTrainer but `reward_funcs`.

    Raises:
        InputError: an unknown estimator, or a GVM whose tokenizer is not the policy's.
    """

    def __init__(
        self,
        model: Any,
        gvm: GVM,
        processing_class: PreTrainedTokenizerBase,
        args: GRPOConfig,
        *,
        estimator: Estimator = "q",
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten: bool = True,
        **kwargs: Any,
    ):
        if estimator not in ("q", "gae", "official"):
            raise InputError(f"unknown estimator {estimator!r}; one of q, gae, official")
        self.estimator, self.gamma, self.lam, self.whiten = estimator, gamma, lam, whiten
        self.gvm = open_gvm(gvm, processing_class)
        self._values: list[Tensor] = []
        super().__init__(
            model=model, reward_funcs=self.gvm_score, args=args, processing_class=processing_class, **kwargs
        )

    def gvm_score(self, prompts: Sequence[Any], **_: Any) -> list[float]:
        """The mean Q of the responses at hand, for TRL's log."""
        return _scores(self._values, "mean")

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        self._values = self.gvm([Encoded(list(p), list(c)) for p, c in zip(generated[0], generated[1], strict=True)])
        return generated

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        batch["advantages"] = self._token_advantages(batch)
        self._log_advantages(batch)
        return batch

    def _token_advantages(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, T], 0 where the loss does not look."""
        mask_B_T = batch["completion_mask"].bool()
        values_B_S = torch.zeros(len(mask_B_T), mask_B_T.shape[1] + 1, device=mask_B_T.device)
        known_B_S = pad_sequence(self._values, batch_first=True)  # TRL may have padded further (pad_to_multiple_of)
        values_B_S[:, : known_B_S.shape[1]] = known_B_S
        advantages_B_T = ESTIMATORS[self.estimator](
            Signals(mask_B_T, values_B_S=values_B_S, gamma=self.gamma, lam=self.lam)
        )
        learnt_B_T = mask_B_T & batch["tool_mask"].bool() if "tool_mask" in batch else mask_B_T
        if self.whiten:
            return masked_whiten(advantages_B_T, learnt_B_T, lambda x: self.accelerator.reduce(x, reduction="sum"))
        return torch.where(learnt_B_T, advantages_B_T, 0)

    def _log_advantages(self, batch: dict[str, Tensor]) -> None:
        """Puts the mean advantage of each response in the place of GRPO's in TRL's table of completions."""
        mean_B = batch["advantages"].sum(1) / batch["completion_mask"].sum(1).clamp(min=1)
        means = self.accelerator.gather(mean_B).tolist()
        logged = self._logs["advantages"]
        for _ in range(min(len(means), len(logged))):
            logged.pop()
        logged.extend(means)


def _local(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Values:
    model = models.load(folder, "value").eval().requires_grad_(False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def values(texts: Sequence[Encoded]) -> list[Tensor]:
        found = dict(score_all(model, texts, tokenizer.pad_token_id))
        return [found[i] for i in range(len(texts))]

    return values


def _remote(client: GVMClient) -> Values:
    def values(texts: Sequence[Encoded]) -> list[Tensor]:
        scored = client.score([t.prompt_ids for t in texts], [t.response_ids for t in texts])
        return [torch.from_numpy(s.values_S) for s in scored]

    return values


def _scores(values: list[Tensor], how: str) -> list[float]:
    return [float(aggregate(v_S[None], torch.ones(1, len(v_S), dtype=torch.bool), how)) for v_S in values]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, template: Mapping[str, Any]) -> list[int]:
    """The ids that TRL's trainers give the policy for a prompt: chat messages, or a text as it is."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    return encode_prompt(tokenizer, prompt, **template)
