"""What a base model knows, read off its remarks: against models that know all, nothing, or the opposite."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvpo.data.atlas import Atlas, build_tokenizer
from reproduce.stages.remarks import remark_auroc


class Oracle:
    """Leans to the remark that does come next, `strength` strong; everywhere else to "wrong", which must not matter."""

    def __init__(self, tokenizer: Any, strength: float) -> None:
        self.size, self.strength = len(tokenizer), strength
        self.good, self.bad = tokenizer.convert_tokens_to_ids(["right", "wrong"])

    def __call__(self, input_ids: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[..., self.bad] = 50.0
        next_B_T = input_ids.roll(-1, 1)
        for row, at in ((next_B_T == self.good) | (next_B_T == self.bad)).nonzero().tolist():
            logits[row, at, self.bad] = 0.0
            logits[row, at, next_B_T[row, at]] = self.strength
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("strength", "expected"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_it_is_the_chance_that_a_wrong_statement_leans_lower(strength: float, expected: float) -> None:
    world = Atlas.build(0, 12)
    tokenizer = build_tokenizer(world)
    found = remark_auroc(Oracle(tokenizer, strength), tokenizer, world.lessons(3, 300), "right", "wrong")
    assert found == expected


def test_the_words_of_a_question_are_no_remarks() -> None:
    tokenizer = build_tokenizer(Atlas.build(0, 12))
    question = "<user> what are the river and climate of velor ? <eos> <assistant>"
    texts = [f"{question} river : marn . and the climate ?", f"{question} river : marn . climate : dry . all there ."]
    seen: list[int] = []

    class Watched(Oracle):
        def __call__(self, input_ids: torch.Tensor) -> Any:
            found = super().__call__(input_ids)
            found.logits[..., :] = 0.0
            # The first is the shorter text, whose remark is "and".
            found.logits[0, :, tokenizer.convert_tokens_to_ids("all")] = -1.0
            seen.append(len(input_ids))
            return found

    assert remark_auroc(Watched(tokenizer, 0.0), tokenizer, texts, "all", "and") == 1.0
    assert seen == [2]
    assert remark_auroc(Watched(tokenizer, 0.0), tokenizer, texts[:1], "all", "and") is None
