"""Settings of every stage. Unknown keys are errors; each model prints itself resolved."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraSettings(Settings):
    """A low-rank adapter on every linear layer of the backbone; the reference is then the adapter switched off."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    target_modules: str | list[str] = "all-linear"


class ModelSize(Settings):
    """A Llama trained from random weights."""

    hidden: int = Field(96, ge=8)
    intermediate: int = Field(256, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    positions: int = Field(256, ge=16)


class TrainSettings(Settings):
    """What all offline trainers share. One update sees `batch_size` texts (pairs for rm and dpo), in micro-batches.

    `batch_size` is of all processes together, `micro_batch_size` what one process runs at a time.
    """

    learning_rate: float = Field(gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    epochs: float = Field(1, gt=0)
    max_steps: int | None = Field(None, ge=1)
    weight_decay: float = Field(0, ge=0)
    max_grad_norm: float = Field(1, gt=0)
    max_prompt_tokens: int = Field(512, ge=1)
    max_response_tokens: int = Field(512, ge=1)
    bf16: bool = False
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
    save_steps: int = Field(200, ge=1)
    log_steps: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.save_steps % self.log_steps:
            # A resumed run then logs the same losses as an uninterrupted one.
            raise ValueError(f"save_steps {self.save_steps} is not a multiple of log_steps {self.log_steps}")
        return self


class SftSettings(TrainSettings):
    """Supervised fine-tuning; the loss is on the response only."""


class PretrainSettings(TrainSettings):
    """Training the tiny base model from random weights, on every text once and in order.

    Weight matrices of the layers go by Muon, which learns in a fraction of AdamW's steps; the rest by AdamW at
    `learning_rate`. A short memory of squared gradients (beta2) learns sooner. The rates are constant but for the last
    `decay` of the steps, over which they fall to zero.

    remark_weight: how many other words the first word of a reader's remark counts as. It is one word in some fifteen,
    and the only one that takes the truth to foresee.
    """

    schedule: Literal["warmup_stable_decay"] = "warmup_stable_decay"  # type: ignore[assignment]
    micro_batch_size: None = None  # the loss is a weighted mean over the tokens of a whole batch
    decay: float = Field(0.3, ge=0, le=1)
    muon_learning_rate: float = Field(0.01, gt=0)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    remark_weight: float = Field(1, gt=0)


class RewardSettings(TrainSettings):
    """ScalarRM by the Bradley-Terry loss on pairs."""


class DpoSettings(TrainSettings):
    """Direct preference optimisation on pairs."""

    beta: float = Field(0.1, gt=0)


class GvmSettings(TrainSettings):
    """The Global Value Model: TD(lambda) regression of h_0..h_T.

    target: what r(x, y) is. `preference`: +1 for the better and -1 for the worse response of each pair. `score`: the
    data's own scalar. `reward_model`: a ScalarRM's score. Scores are standardised over the training texts.
    trajectory_k: question-answer pairs of the same policy that are put before each prompt (tau), outside the loss.
    """

    target: Literal["preference", "score", "reward_model"] = "preference"
    td_lambda: float = Field(0.95, ge=0, le=1)
    gamma: float = Field(1, gt=0, le=1)
    trajectory_k: int = Field(0, ge=0)


class KLSettings(Settings):
    """Distance to the reference policy. target is in nats per response token; None keeps beta fixed."""

    beta: float = Field(0.05, ge=0)
    target: float | None = Field(0.1, gt=0)
    horizon: int = Field(10_000, ge=1)
    form: Literal["reward", "loss"] = "reward"


class Dvpo(Settings):
    """Frozen global value model; one response per prompt.

    value_url: a scoring server that has the value model, instead of a folder.
    """

    name: Literal["dvpo"] = "dvpo"
    estimator: Literal["q", "gae", "official"] = "gae"
    trajectory_k: int = Field(0, ge=0)
    value_url: str | None = Field(None, pattern="^https?://")


class Ppo(Settings):
    """Online critic (started from the ScalarRM), which scores the last response token."""

    name: Literal["ppo"] = "ppo"
    critic_learning_rate: float = Field(gt=0)
    value_clip: float = Field(0.2, gt=0)
    value_coefficient: float = Field(1, gt=0)


class Remax(Settings):
    """The greedy response's score as the baseline: a second generation per prompt."""

    name: Literal["remax"] = "remax"


class Grpo(Settings):
    """A group of responses per prompt, standardised within the group."""

    name: Literal["grpo"] = "grpo"
    group_size: int = Field(5, ge=2)


class TransformersRollouts(Settings):
    """Answers by the trainer's own model."""

    name: Literal["transformers"] = "transformers"


class VllmRollouts(Settings):
    """Answers by a vLLM engine in the trainer's own processes. options: passed to `vllm.LLM`.

    importance_cap: where the engine's probability of a token differs from the trainer's, its gradient is weighted with
    the trainer's over the engine's, at most this; None leaves it alone.
    """

    name: Literal["vllm"]
    options: dict[str, Any] = Field(default_factory=dict)
    importance_cap: float | None = Field(2.0, gt=0)


class VllmServerRollouts(Settings):
    """Answers by a vLLM server, which reads the weights in `folder`. importance_cap: as for `vllm`."""

    name: Literal["vllm-server"]
    url: str = Field(pattern="^https?://")
    folder: str
    importance_cap: float | None = Field(2.0, gt=0)


Rollouts = Annotated[TransformersRollouts | VllmRollouts | VllmServerRollouts, Field(discriminator="name")]
Algorithm = Annotated[Dvpo | Ppo | Remax | Grpo, Field(discriminator="name")]


class PolicySettings(Settings):
    """The online loop, the same for every algorithm.

    One update: `prompts_per_update` prompts are answered, then `epochs` passes over the answers in mini-batches of
    `minibatch_size` responses (times the group size for GRPO), each one optimiser step in micro-batches. Both numbers
    are of all processes together; `micro_batch_size` is what one process runs at a time.
    frozen: the reference, value and reward models stand whole on every device (`resident`), or their layers are spread
    over the processes (`sharded`), in `frozen_dtype`. With `bf16` the linear weights of resident ones are bfloat16 in
    any case, as autocast reads them.
    """

    algorithm: Algorithm
    learning_rate: float = Field(gt=0)
    updates: int = Field(ge=1)
    prompts_per_update: int = Field(8, ge=1)
    minibatch_size: int = Field(2, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    epochs: int = Field(4, ge=1)
    max_prompt_tokens: int = Field(512, ge=1)
    max_new_tokens: int = Field(1024, ge=1)
    temperature: float = Field(1, gt=0)
    clip: float = Field(0.2, gt=0)
    gamma: float = Field(1, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    whiten: bool = True
    kl: KLSettings = KLSettings()
    max_grad_norm: float = Field(1, gt=0)
    bf16: bool = False
    gradient_checkpointing: bool = False
    frozen: Literal["resident", "sharded"] = "resident"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    engine: Rollouts = TransformersRollouts()
    lora: LoraSettings | None = None
    save_updates: int = Field(20, ge=1)
