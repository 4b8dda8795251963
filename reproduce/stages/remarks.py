"""What a base model of the built-in world knows, read off the remarks that it would make.

A value model starts from this knowledge. Where a base model cannot tell a true statement from a false one inside a
conversation, no value model trained from it in minutes can.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dvpo.data.atlas_text import ASSISTANT
from dvpo.evaluation.credit import auroc

_ROWS = 128


@torch.inference_mode()
def remark_auroc(model: Any, tokenizer: Any, texts: Sequence[str], good: str, bad: str) -> float | None:
    """How well a language model foresees which of two remarks comes next, wherever one of them does in an answer.

    Args:
        texts: lessons, or conversations of one turn, with their remarks.
        good, bad: the first word of either remark. They stand nowhere else in a lesson or an answer.

    Returns:
        The AUROC of logit(good) - logit(bad) before the remark; 0.5 is chance. None where one of them never comes.
    """
    good_id, bad_id, answer_id = tokenizer.convert_tokens_to_ids([good, bad, ASSISTANT])
    rows = sorted((tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts), key=len)
    leanings: list[float] = []
    is_bad: list[bool] = []
    for start in range(0, len(rows), _ROWS):
        batch = rows[start : start + _ROWS]
        ids_B_T = torch.tensor([row + [tokenizer.pad_token_id] * (len(batch[-1]) - len(row)) for row in batch])
        logits_B_T_V = model(input_ids=ids_B_T).logits[:, :-1]
        leaning_B_T = logits_B_T_V[..., good_id] - logits_B_T_V[..., bad_id]
        next_B_T = ids_B_T[:, 1:]
        # In a question the words may stand for something else.
        asks_B_T = (ids_B_T == answer_id).flip(1).cumsum(1).flip(1)[:, 1:] > 0
        remarked_B_T = ((next_B_T == good_id) | (next_B_T == bad_id)) & ~asks_B_T
        leanings += leaning_B_T[remarked_B_T].tolist()
        is_bad += (next_B_T[remarked_B_T] == bad_id).tolist()
    if all(is_bad) or not any(is_bad):
        return None
    return auroc(np.array(leanings), np.array(is_bad))
