"""Where the work of a request is done."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from server.routes.score import _texts
from server.schemas import Item
from server.service import Service


@pytest.mark.parametrize(
    ("item", "apart"),
    [
        ({"prompt_ids": [1], "response_ids": [2]}, False),
        ({"prompt": "", "response_ids": [2]}, True),
        ({"prompt": "a", "response": "b"}, True),
        ({"messages": [{"role": "user", "content": ""}], "response_ids": [2]}, True),
    ],
)
def test_whatever_needs_the_tokenizer_has_its_thread(item: dict[str, Any], apart: bool) -> None:
    engine: Any = SimpleNamespace(info=SimpleNamespace(max_tokens=10))
    codec: Any = SimpleNamespace(at_least=len)
    service = Service(engine, codec, None, None)  # type: ignore[arg-type]
    texts = [_texts(Item.model_validate(item))]
    [thread] = asyncio.run(service.prepare("items", texts, lambda _: threading.current_thread()))
    service.close()
    assert (thread is not threading.main_thread()) == apart
