"""The vLLM backend gives the transformers backend's values. It runs in the environment that has vLLM."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, LlamaConfig

from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from server.backends.transformers import TransformersBackend
from server.backends.vllm import VllmBackend

PYTHON = os.environ.get("DVPO_VLLM_PYTHON")
BOUND = 1e-4
ITEMS = [Encoded([*range(5, 25)], [7, 8, 9]), Encoded([*range(5, 25)], [11]), Encoded([3], [*range(30, 70)])]
SCRIPT = """
import json, sys
from pathlib import Path
from dvpo.data.templates import Encoded
from server.backends.vllm import VllmBackend

if __name__ == "__main__":
    folder, copies, items, out = sys.argv[1:]
    backend = VllmBackend(
        Path(folder),
        dtype="float32",
        data_parallel=int(copies),
        engine={"enforce_eager": True},
    )
    scored = backend.score([Encoded(*item) for item in json.loads(items)])
    info = backend.info
    document = {
        "values": [s.values_S.tolist() for s in scored],
        "info": [info.form, info.weights_sha256, info.backend, info.max_tokens],
    }
    backend.close()
    Path(out).write_text(json.dumps(document))
"""
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="DVPO_VLLM_PYTHON (a Python that has vLLM) is not set")


def write_model(folder: Path, tokenizer, auto: type) -> None:
    """A tiny Llama; vLLM's kernels need heads of at least 32."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = auto.from_config(config)
    if getattr(model.score, "bias", None) is not None:
        torch.nn.init.normal_(model.score.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("auto", "copies"),
    [
        (AutoModelForTokenClassification, 1),
        (AutoModelForSequenceClassification, 1),
        (AutoModelForTokenClassification, 2),
    ],
)
def test_values_equal_those_of_transformers(tmp_path, tokenizer, auto: type, copies: int) -> None:
    write_model(tmp_path / "model", tokenizer, auto)
    (tmp_path / "script.py").write_text(SCRIPT)
    items = json.dumps([[i.prompt_ids, i.response_ids] for i in ITEMS])
    subprocess.run(
        [str(PYTHON), "script.py", "model", str(copies), items, "out.json"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
        },
        check=True,
        timeout=300,
    )
    found = json.loads((tmp_path / "out.json").read_text())
    ours = TransformersBackend(tmp_path / "model")
    for values, scored in zip(found["values"], ours.score(ITEMS), strict=True):
        assert len(values) == len(scored.values_S)
        assert np.abs(np.float32(values) - scored.values_S).max() <= BOUND
        assert len(set(np.round(values, 3))) > 1
    info = ours.info
    form = info.form.removesuffix(", its head read at every token")
    assert found["info"] == [form, info.weights_sha256, "vllm", 256]


@pytest.mark.skipif(PYTHON is not None, reason="vLLM may be here")
def test_without_vllm_the_way_out_is_said(checkpoints) -> None:
    with pytest.raises(InputError, match="vLLM is not installed in this environment; install it"):
        VllmBackend(checkpoints["llama", "value"])
