"""Both vLLM engines give transformers' greedy tokens, take over new weights, and sample by each prompt's own seed.

vLLM runs in an environment of its own (DVPO_VLLM_PYTHON). A real model takes part where DVPO_SMOLLM2 names its folder.
"""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dvpo import models
from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from dvpo.logprobs import response_logprobs
from dvpo.rollout.transformers import TransformersEngine
from dvpo.rollout.vllm import VllmEngine
from dvpo.rollout.vllm_server import VllmServerEngine
from dvpo.values import collate

PYTHON, SMOLLM2 = os.environ.get("DVPO_VLLM_PYTHON"), os.environ.get("DVPO_SMOLLM2")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
START_SECONDS = 900
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="DVPO_VLLM_PYTHON (a Python that has vLLM) is not set")
needs_smollm2 = pytest.mark.skipif(
    SMOLLM2 is None, reason="DVPO_SMOLLM2 (the folder of SmolLM2-135M-Instruct) is not set"
)


def write_tiny(folder: Path, tokenizer: Any, tied: bool) -> list[list[int]]:
    """Two tiny Llamas and prompts for them; vLLM's kernels need heads of at least 32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,
    )
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 4  # some responses end by themselves
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return [[*range(5, 25)], [7, 8, 9], [3], [*range(30, 70)], [50, 60], [9, 9, 9]]


def write_smollm2(folder: Path) -> list[list[int]]:
    """The real model, and one that an update has changed."""
    assert SMOLLM2 is not None
    shutil.copytree(SMOLLM2, folder / "old")
    shutil.copytree(SMOLLM2, folder / "new")
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2)
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.data *= 0.6
    model.save_pretrained(folder / "new")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    questions = ["Why is the sky blue?", "List three fruits.", "Name a river.", "What is 12 times 7?"]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in questions
    ]


@contextmanager
def server(folder: Path) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command += ["--logprobs-mode", "processed_logprobs"]
    log = folder.parent / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"}, stdout=out, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < end:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield url
    finally:
        process.terminate()
        process.wait(60)


def run_script(python: str, folder: Path, *more: str) -> dict[str, Any]:
    script = Path(__file__).with_name("vllm_script.py")
    command = [python, str(script), str(folder), str(folder / "prompts.json"), str(folder / "out.json"), *more]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["colocated", "server"])
@pytest.mark.parametrize("which", ["tiny", "tiny-tied", pytest.param("smollm2", marks=needs_smollm2)])
def test_answers_are_transformers_before_and_after_an_update(tmp_path, tokenizer, which: str, mode: str) -> None:
    prompts = write_smollm2(tmp_path) if which == "smollm2" else write_tiny(tmp_path, tokenizer, which == "tiny-tied")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    if mode == "server":
        with server(tmp_path / "old") as url:
            seen = run_script(sys.executable, tmp_path, url)
    else:
        seen = run_script(str(PYTHON), tmp_path)
    own = models.load_tokenizer(tmp_path / "old")
    for name in ("old", "new"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert seen[name] == TransformersEngine(plain, own, seen["limit"], 1.0).greedy(prompts), name
    assert seen["old"] != seen["new"]
    assert seen["samples"] == seen["backwards"] != seen["other_seeds"]
    for ids in seen["samples"]:
        assert own.eos_token_id not in ids[:-1]
        assert len(ids) == seen["limit"] or ids[-1] == own.eos_token_id
    texts = [Encoded(p, ids) for p, ids in zip(prompts, seen["samples"], strict=True)]
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype=torch.float32).eval()
    with torch.no_grad():
        ours = response_logprobs(old, collate(texts, 0), seen["temperature"])
    for row, logprobs in zip(ours.tolist(), seen["logprobs"], strict=True):
        assert logprobs == pytest.approx(row[: len(logprobs)], abs=1e-3)


@pytest.mark.skipif(PYTHON is not None, reason="vLLM may be here")
def test_without_vllm_the_way_out_is_said(checkpoints, tokenizer) -> None:
    folder = checkpoints["llama", "policy"]
    with pytest.raises(InputError, match=r"vLLM is not installed in this environment; install it or set engine\.name"):
        VllmEngine(None, tokenizer, folder, max_new_tokens=1, max_tokens=8, temperature=1.0)


def test_where_no_server_answers(tokenizer, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"engine\.url: no vLLM server answers at {url}"):
            VllmServerEngine(None, tokenizer, url, tmp_path, max_new_tokens=1, temperature=1.0)


@pytest.mark.parametrize(
    ("info", "way_out"),
    [
        (None, "VLLM_SERVER_DEV_MODE=1"),
        ({"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}}, "--logprobs-mode processed_logprobs"),
    ],
)
def test_a_server_started_otherwise(tokenizer, tmp_path, info: Any, way_out: str) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if info else 404)
            self.end_headers()
            self.wfile.write(json.dumps(info).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{stub.server_port}"
        with pytest.raises(InputError, match=way_out):
            VllmServerEngine(None, tokenizer, url, tmp_path, max_new_tokens=1, temperature=1.0)
        stub.shutdown()
