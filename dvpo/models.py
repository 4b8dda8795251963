"""Loading, saving and telling apart policies, value models and reward models.

All are stock transformers classes: a policy is an AutoModelForCausalLM, a value model (GVM or critic) an
AutoModelForTokenClassification with one label, a ScalarRM an AutoModelForSequenceClassification with one label. With
LoRA a folder holds the adapter, with `modules_to_save` for the head, and names its base model.
"""

import copy
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dvpo.config import LoraSettings, ModelSize
from dvpo.errors import InputError
from dvpo.files import sha256_json

Role = Literal["policy", "value", "reward"]
_AUTO: dict[Role, Any] = {
    "policy": AutoModelForCausalLM,
    "value": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}
_SUFFIX: dict[Role, str] = {
    "policy": "ForCausalLM",
    "value": "ForTokenClassification",
    "reward": "ForSequenceClassification",
}
_TASKS: dict[Role, str] = {"policy": "CAUSAL_LM", "value": "TOKEN_CLS", "reward": "SEQ_CLS"}
_HEADS = ("score", "classifier")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Its padding token is never EOS. Raises InputError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: no tokenizer could be loaded ({_first_line(error)}); save one beside the weights"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    _warn_of_another_eos(Path(folder), tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Our own masks come from lengths, but library code that compares ids with the padding token must not take a
        # real EOS for padding. Any other special token will do as the filler.
        special = [
            t for t in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()) if t != tokenizer.eos_token
        ]
        if not special:
            raise InputError(f"{folder}: the tokenizer has no special token but EOS to pad with; add a padding token")
        tokenizer.pad_token = special[0]
    tokenizer.padding_side = "right"
    return tokenizer


def _warn_of_another_eos(folder: Path, tokenizer: Any) -> None:
    """Says so where the model beside the tokenizer ends its answers with other tokens: ours would not end them."""
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        with suppress(OSError, ValueError):  # no file, as with a hub id; a damaged one is told of when the model loads
            found = json.loads((folder / name).read_text()).get("eos_token_id")
            ends |= set(found if isinstance(found, list) else [found]) - {None}
    if ends and tokenizer.eos_token_id not in ends:
        logging.getLogger("dvpo").warning(
            f"{folder}: the tokenizer ends texts with {tokenizer.eos_token} (id {tokenizer.eos_token_id}), but the "
            f"model's end tokens are {sorted(ends)}; correct eos_token in tokenizer_config.json if that is a mistake"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: vocabulary, merges, normalisation, EOS; not padding or the chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("padding", "truncation"):
        backend.pop(key, None)
    return sha256_json({"backend": backend, "eos": tokenizer.eos_token_id})


def require_same_tokenizer(policy_folder: str | Path, other_folder: str | Path, role: str) -> None:
    """Raises InputError unless both folders' tokenizers give the same ids for every text."""
    ours, theirs = (tokenizer_fingerprint(load_tokenizer(f)) for f in (policy_folder, other_folder))
    if ours != theirs:
        raise InputError(
            f"the {role} model in {other_folder} has another tokenizer (fingerprint {theirs[:12]}) than the policy in "
            f"{policy_folder} ({ours[:12]}); train it from a checkpoint with the policy's tokenizer"
        )


def load(
    folder: str | Path,
    role: Role,
    *,
    dtype: torch.dtype = torch.float32,
    lora: LoraSettings | None = None,
    fresh_head: bool = False,
) -> PreTrainedModel:
    """Loads a checkpoint folder (or hub id) in the given role, dropout off.

    Args:
        lora: put a new trainable adapter on the loaded weights (an adapter that the folder holds is merged first).
        fresh_head: the folder may be of another role; its head is replaced by a zero one (value) or a small random
            one (reward).

    Raises:
        InputError: no checkpoint there, damaged weights, another kind of checkpoint, or not exactly one label.
    """
    found = role_of(folder)
    if found != role and not fresh_head:
        raise InputError(
            f"{folder} holds {_describe(found)}, not {_describe(role)}; name a folder with {_describe(role)}"
        )
    model = _load_merged(folder, found, dtype) if _adapter(folder) else _load_stock(folder, role, dtype, fresh_head)
    if fresh_head and _adapter(folder):
        model = _with_backbone_of(model, role, dtype)
    if fresh_head and role != "policy":
        for parameter in head(model).parameters():
            nn.init.zeros_(parameter)
        if role == "reward":
            nn.init.normal_(head(model).weight, std=model.config.initializer_range)
    disable_dropout(model)
    if role != "policy":
        head(model).__class__ = Float32Head
    model.config.use_cache = role == "policy"
    return model if lora is None else add_lora(model, role, lora)


class Float32Head(nn.Linear):
    """The value head, kept out of autocast: differences of neighbouring values are far below bfloat16's resolution."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., 1], float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(
                hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float()
            )


def role_of(folder: str | Path) -> Role | None:
    """What kind of model a folder (or hub id) holds; None if none of ours. Raises InputError if nothing is there."""
    adapter = _adapter(folder)
    if adapter:
        tasks: dict[str, Role] = {task: role for role, task in _TASKS.items()}
        return tasks.get(adapter["task_type"])
    try:
        name = str((AutoConfig.from_pretrained(str(folder)).architectures or [""])[0])
    except Exception as error:
        raise InputError(
            f"{folder}: no model is there ({_first_line(error)}); give a checkpoint folder or a hub id"
        ) from error
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "policy"  # some are not called ...ForCausalLM: GPT2LMHeadModel
    return next((role for role, suffix in _SUFFIX.items() if name.endswith(suffix)), None)


def critic_from_reward(folder: str | Path, lora: LoraSettings | None = None) -> Any:
    """PPO's critic: a value model with the ScalarRM's backbone and head, so that at first V(s_T+1) is its score."""
    reward = load(folder, "reward")
    critic = _with_backbone_of(reward, "value", torch.float32)
    head(critic).weight.data.copy_(head(reward).weight.data)
    if head(critic).bias is not None:
        nn.init.zeros_(head(critic).bias)
    disable_dropout(critic)
    head(critic).__class__ = Float32Head
    critic.config.use_cache = False
    return critic if lora is None else add_lora(critic, "value", lora)


def new_policy(tokenizer: PreTrainedTokenizerBase, size: ModelSize, seed: int) -> Any:
    """A Llama of the given size from random weights."""
    from transformers import LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=True,
        # The library's 0.02 is for wide models; at this width facts are learned several times later with it.
        initializer_range=size.hidden**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def add_lora(model: PreTrainedModel, role: Role, lora: LoraSettings) -> Any:
    """Wraps the model in a trainable peft adapter; a value or reward head is trained in full."""
    from peft import LoraConfig, get_peft_model

    heads = None if role == "policy" else [head_name(model)]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        modules_to_save=heads,
        task_type=_TASKS[role],
    )
    return get_peft_model(model, config)


def save(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Saves a plain model, or an adapter with its head, and the tokenizer, as an ordinary checkpoint folder.

    weights: the whole state dict, where the model itself holds only a part of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft writes an empty card; the manifest says what this is


def head_name(model: Any) -> str:
    """Name of the linear head of a value or reward model."""
    for name in _HEADS:
        if hasattr(model, name):
            return name
    raise InputError(
        f"{type(model).__name__} has no head named {' or '.join(_HEADS)}; use an architecture that has one"
    )


def head(model: Any) -> Any:
    """The linear head of a value or reward model (hidden -> 1)."""
    return getattr(model, head_name(model))


def most_tokens(model: Any) -> int | None:
    """The longest text that the model has positions for; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def require_reads(model: Any, tokens: int, limits: str) -> None:
    """Raises InputError where a text of so many tokens is longer than the model reads.

    Args:
        limits: the settings that would shorten it.
    """
    most = most_tokens(model)
    if most is not None and tokens > most:
        name = getattr(model.config, "_name_or_path", "") or "the model"
        raise InputError(f"{name} reads at most {most} tokens, but the longest text has {tokens}; lower {limits}")


def disable_dropout(model: Any) -> None:
    """Sets every dropout probability to 0, so that training and scoring read the same values."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # Llama and its kin keep the rate as a number


def _load_stock(base: str | Path, role: Role, dtype: torch.dtype, fresh_head: bool, revision: str | None = None) -> Any:
    settings: dict[str, Any] = {"dtype": dtype, "revision": revision}
    if role != "policy":
        settings["num_labels"] = 1
    # An adapter of the model notes this name, and must find its base from wherever it is loaded.
    name = str(Path(base).absolute()) if Path(base).is_dir() else str(base)
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # a fresh head is expected, not worth a warning
    try:
        model, info = _AUTO[role].from_pretrained(name, output_loading_info=True, **settings)
    except Exception as error:
        raise InputError(f"{base}: the checkpoint cannot be loaded ({_first_line(error)})") from error
    finally:
        log.setLevel(level)
    missing = sorted(k for k in info["missing_keys"] if not (fresh_head and k.split(".")[0] in _HEADS))
    if missing:
        raise InputError(
            f"{base}: the checkpoint lacks the weights {', '.join(missing[:3])}; it is damaged or of another kind"
        )
    return model


def _load_merged(folder: str | Path, role: Role | None, dtype: torch.dtype) -> Any:
    """The base model of an adapter folder with the adapter (and the head it carries) merged into the weights."""
    from peft import PeftModel

    adapter = _adapter(folder)
    if adapter is None or role is None:
        raise InputError(f"{folder}: the adapter is of an unknown task; train it with this package")
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    try:
        model = _load_stock(base, role, dtype, fresh_head=role != "policy", revision=revision)
    except InputError as error:
        raise InputError(
            f"{folder} is an adapter, and its base model cannot be had ({error}); give the folder that holds it with "
            "--base to score, serve, evaluate or verify, or write it into the adapter_config.json of a copy of yours"
        ) from error
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _with_backbone_of(source: Any, role: Role, dtype: torch.dtype) -> Any:
    """A model of `role` around the backbone of `source`."""
    config = copy.deepcopy(source.config)
    if role != "policy":
        config.num_labels = 1
    model = _AUTO[role].from_config(config).to(dtype)
    model.base_model.load_state_dict(source.base_model.state_dict())
    return model


def _adapter(folder: str | Path) -> dict[str, Any] | None:
    path = Path(folder) / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _describe(role: Role | None) -> str:
    if role is None:
        return "a model of an unknown kind"
    return {"policy": "a causal language model", "value": "a value model", "reward": "a sequence reward model"}[role]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
