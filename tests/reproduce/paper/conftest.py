"""The paper's recipes on two-layer cuts of their models, with tokenizers of their form and tiny data."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from reproduce import recipe
from reproduce.graph import Graph, build
from reproduce.recipe import DataRecipe, HubModel

CUT = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
CUT |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = ("<s>", "</s>", "<unk>")
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEXT = "the river rises in the hills and flows to the sea past old towns with stone bridges and quiet fields"
WORDS = TEXT.split()


def sentence(rng: random.Random, least: int = 4) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, 12)))


def llama_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds a BOS by itself, as Llama 3's; the words of a text never leave its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(LLAMA), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    bos = LLAMA[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=LLAMA[1], chat_template=template,
        extra_special_tokens=list(LLAMA[2:]),
    )  # fmt: skip


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and marked spaces, as Llama 2's and Mistral's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [*MISTRAL, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=MISTRAL_TEMPLATE,
    )  # fmt: skip


def checkpoint(folder: Path, hub: HubModel) -> Path:
    """A policy of the recipe's architecture: its config, cut to two narrow layers and a small vocabulary."""
    import torch

    torch.manual_seed(0)
    if hub.config["model_type"] == "mistral":
        tokenizer = mistral_tokenizer()
    else:
        tokenizer = llama_tokenizer(hub.chat_template or _instruct_template())
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**(hub.config | CUT | ids | {"vocab_size": len(tokenizer)}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _instruct_template() -> str:
    base: Any = recipe.load("llama3-8b-base")
    return base.hub.chat_template


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ultrafeedback(path: Path, prompts: int) -> Path:
    """Rows of openbmb/UltraFeedback, with the fields that are read."""
    rng = random.Random(0)
    rows = []
    for i in range(prompts):
        completions = [
            {"model": f"model-{j}", "response": sentence(rng), "overall_score": float(score), "fine-grained_score": 1.0}
            for j, score in enumerate(rng.sample(range(1, 11), 4))
        ]
        rows.append({"source": "test", "instruction": f"{sentence(rng)} {i}?", "completions": completions})
    return write(path, rows)


def hh(path: Path, pairs: int) -> Path:
    """Rows of Anthropic/hh-rlhf."""
    rng = random.Random(1)
    rows = []
    for i in range(pairs):
        talk = f"\n\nHuman: {sentence(rng)} {i}?\n\nAssistant: "
        rows.append({"chosen": talk + sentence(rng), "rejected": talk + sentence(rng)})
    return write(path, rows)


def rewardbench(path: Path) -> Path:
    """Rows of allenai/reward-bench: two subsets of two sections."""
    rng = random.Random(2)
    subsets = ["alpacaeval-easy"] * 3 + ["hep-python"] * 3
    rows = [
        {"prompt": sentence(rng), "chosen": sentence(rng), "rejected": sentence(rng), "subset": s, "id": i}
        for i, s in enumerate(subsets)
    ]
    return write(path, rows)


@pytest.fixture(scope="session")
def judge() -> Iterator[str]:
    """An OpenAI-compatible endpoint that rates every answer 7."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Says nothing."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            message = {"role": "assistant", "content": "Well done. [[7]]"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "seven", "choices": [choice]}
            raw = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def cut_graph(name: str, folder: Path, judge: str, processes: int) -> Graph:
    """The recipe with every stage, on a two-layer cut, tiny data and few steps."""
    whole = recipe.load(name)
    assert isinstance(whole, DataRecipe)
    assert whole.hub is not None
    questions = [{"question_id": i, "category": "math", "turns": [f"What is 1+{i}?", "And 2+2?"]} for i in range(2)]
    short = {"max_prompt_tokens": 128, "max_response_tokens": 24}
    half = {"bf16": processes == 1}  # the Trainer refuses bfloat16 under DeepSpeed where there is no GPU
    step = half | {"batch_size": 4, "micro_batch_size": 2, "epochs": 1, "max_steps": 2, "save_steps": 1, "log_steps": 1}
    changes: dict[str, Any] = {
        "model": str(checkpoint(folder / "model", whole.hub)),
        "data": str(ultrafeedback(folder / "train.jsonl", 40)),
        "shares": {"sft": 0.25 if whole.sft else 0.0, "value": 0.25 if whole.sft else 0.5, "rl": 0.25, "test": 0.25},
        "rl_prompts": 6,
        "compute": {"threads": 1, "processes": processes, "strategy": "zero3"},
        "rm": short | step,
        "gvm": short | step,
        "dpo": short | step,
        "policy": half
        | {
            "updates": 1, "prompts_per_update": 4, "minibatch_size": 4, "max_prompt_tokens": 128, "max_new_tokens": 8,
            "epochs": 2,
        },
        "measure": short,
        "other_data": {"hh-rlhf": str(hh(folder / "hh.jsonl", 6))},
        "benchmarks": {
            "rewardbench": str(rewardbench(folder / "rewardbench.jsonl")),
            "max_new_tokens": 8,
            "mt_bench": str(write(folder / "mt_bench.jsonl", questions)),
        },
        "judge": {"model": "seven", "url": judge},
    }  # fmt: skip
    if whole.sft:
        changes["sft"] = short | step
    file = folder / "cut.yaml"
    file.write_text(yaml.safe_dump({"extends": name, "name": "cut"} | changes))
    return build(recipe.load(str(file)), None)


@pytest.fixture
def cut(tmp_path: Path, judge: str) -> Callable[[str, int], Graph]:
    """The graph of a recipe's cut, for so many processes."""
    return lambda name, processes: cut_graph(name, tmp_path, judge, processes)
