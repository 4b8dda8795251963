"""Policies whose answers are ragged, and prompts of different lengths."""

from pathlib import Path

import pytest

from dvpo import models
from dvpo.data.templates import Encoded


@pytest.fixture(scope="session")
def ragged_policies(checkpoints, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The random policies with an EOS that is likely after some tokens and not after others."""
    folders = {}
    for arch, factor in (("llama", 7), ("gpt2", 3)):
        model = models.load(checkpoints[arch, "policy"], "policy")
        model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= factor
        folders[arch] = tmp_path_factory.mktemp("policies") / arch
        models.save(model, tokenizer, folders[arch])
    return folders


@pytest.fixture(scope="session")
def prompt_ids(texts: list[Encoded]) -> list[list[int]]:
    assert len({len(t.prompt_ids) for t in texts}) > 3
    return [t.prompt_ids for t in texts]
