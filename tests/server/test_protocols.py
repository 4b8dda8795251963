"""The protocols of other systems, driven by request bodies as their clients send them, and by the OpenAI client."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from dvpo.data.templates import Encoded

PROMPT, ANSWER = "what is the river of velor ?", "the river of velor is mild ."


def ids(served: Any, text: str) -> list[int]:
    found: list[int] = served.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def ask(client: TestClient, route: str, body: Any, status: int = 200) -> Any:
    reply = client.post(route, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def near(found: Any, wanted: Any) -> None:
    assert found == pytest.approx(wanted, abs=1e-5)


def whole(served: Any, tokens: list[int]) -> list[float]:
    """The value at every token of a text."""
    values: list[float] = served.direct(Encoded(tokens[:1], tokens[1:]))[0]
    return values


def test_the_openai_client_lists_the_model(build: Any, live: Any) -> None:
    url = live(build(api_keys=("sk-test-key",)).app)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test-key", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["gvm"]
    refused = pytest.raises(openai.AuthenticationError, match="no valid API key")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client, refused:
        client.models.list()


def test_the_openai_clients_low_level_post_reads_pooling(build: Any, live: Any) -> None:
    """As people call vLLM's own routes."""
    served = build()
    url = live(served.app)
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
        reply: Any = client.post("/pooling", body={"model": "gvm", "input": [5, 6, 7]}, cast_to=object)
        near([v for (v,) in reply["data"][0]["data"]], whole(served, [5, 6, 7]))
        with pytest.raises(openai.BadRequestError, match="not a token id"):
            client.post("/pooling", body={"model": "gvm", "input": [10**6]}, cast_to=object)


def test_pooling_takes_every_form_of_input(client: TestClient, served: Any) -> None:
    a, b = ids(served, PROMPT), ids(served, ANSWER)
    forms = {"text": (PROMPT, [a]), "texts": ([PROMPT, ANSWER], [a, b]), "ids": (a, [a]), "lists": ([a, b], [a, b])}
    for given, texts in forms.values():
        # The body of vLLM's own example client.
        reply = ask(client, "/pooling", {"model": "a/b", "task": "token_classify", "input": given, "user": "x"})
        assert (reply["object"], reply["id"][:5]) == ("list", "pool-")
        assert [d["index"] for d in reply["data"]] == list(range(len(texts)))
        for data, text in zip(reply["data"], texts, strict=True):
            assert data["object"] == "pooling"
            near([v for (v,) in data["data"]], whole(served, text))
        count = sum(map(len, texts))
        assert reply["usage"] == {
            "prompt_tokens": count,
            "total_tokens": count,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }
    one = ask(client, "/pooling", {"input": [5]})["data"][0]["data"]
    assert np.shape(one) == (1, 1)
    near(one[0], served.direct(Encoded([5], []))[0])


def test_pooling_in_base64(client: TestClient, served: Any) -> None:
    body = {"input": [5, 6, 7], "encoding_format": "base64", "embed_dtype": "float32", "endianness": "native"}
    data = ask(client, "/pooling", body)["data"][0]["data"]
    near(np.frombuffer(base64.b64decode(data), "<f4").tolist(), whole(served, [5, 6, 7]))


def test_vllm_adds_special_tokens_unless_told_otherwise(build: Any, byte_folder: Path) -> None:
    with TestClient(build(byte_folder).app) as client:
        plain = ask(client, "/pooling", {"input": "hello", "add_special_tokens": False})["usage"]["prompt_tokens"]
        assert ask(client, "/pooling", {"input": "hello"})["usage"]["prompt_tokens"] == plain + 1
        assert ask(client, "/pooling", {"input": "<bos>hello"})["usage"]["prompt_tokens"] == plain + 1


@pytest.mark.parametrize(
    ("route", "body", "words"),
    [
        ("/pooling", {"input": [5], "truncate_prompt_tokens": 3}, "nothing is truncated"),
        ("/pooling", {"input": [5], "use_activation": True}, "values are raw"),
        ("/pooling", {"input": [5], "task": "embed"}, "task"),
        ("/pooling", {"input": [5], "encoding_format": "bytes"}, "encoding_format"),
        ("/pooling", {"input": [5], "embed_dtype": "float16"}, "embed_dtype"),
        ("/pooling", {"input": [5], "dimensions": 2}, "dimensions"),
        ("/pooling", {"input": [5, "a"]}, "string, a list of token ids, or a list of either"),
        ("/pooling", {"input": [True]}, "string, a list of token ids"),
        ("/pooling", {"input": None}, "string, a list of token ids"),
        ("/pooling", {"input": ""}, "no tokens"),
        ("/pooling", {"input": [[5], []]}, "input[1]: the prompt has no tokens"),
        ("/pooling", {"input": [5] * 257}, "257 tokens, but the model reads at most 256"),
        ("/pooling", {"messages": []}, "input is missing"),
        ("/classify", {"input": [5], "activation": True}, "values are raw"),
        ("/get_reward", {"query": "text"}, "query: should be a valid list"),
        ("/get_reward", {"prompts": []}, "query is missing"),
        ("/get_reward", {"query": ["a"], "prompts": []}, "one for each"),
        ("/get_reward", {"query": [""]}, "no tokens"),
        ("/reward", {"prompt": "a"}, "response is missing"),
        ("/reward", {"prompt": "a", "response": ""}, "response is empty"),
        ("/reward", {"prompt": "", "response": "a"}, "prompt has no tokens"),
        ("/reward", {"prompt": 1, "response": "a"}, "list of messages"),
        ("/reward", {"prompt": [], "response": "a"}, "messages is empty"),
    ],
)
def test_bad_requests(client: TestClient, route: str, body: Any, words: str) -> None:
    error = ask(client, route, body, 400)["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param"}


def test_verl_reads_the_value_at_the_last_token(client: TestClient, served: Any) -> None:
    """The body of verl's reward loop (a discriminative reward model on vLLM), and what it reads of the reply."""
    tokens = ids(served, f"{PROMPT} {ANSWER}")
    reply = ask(client, "/classify", {"model": "some/path", "input": f"{PROMPT} {ANSWER}", "activation": False})
    near(reply["data"][-1]["probs"][-1], whole(served, tokens)[-1])
    assert reply["data"][0]["num_classes"] == 1
    newer = ask(client, "/classify", {"input": f"{PROMPT} {ANSWER}", "use_activation": False})
    near(newer["data"][-1]["probs"][-1], whole(served, tokens)[-1])
    many = ask(client, "/classify", {"input": [tokens, tokens[:5]]})
    near([d["probs"][0] for d in many["data"]], [whole(served, tokens)[-1], whole(served, tokens[:5])[-1]])


def test_a_line_break_after_the_end_is_not_read(build: Any, byte_folder: Path) -> None:
    """Chat templates write one; a value model has learnt nothing about it."""
    served = build(byte_folder)
    text = "<bos><|user|>hello<eos>\n<|assistant|>a<eos>"
    tokens = ids(served, text)
    with TestClient(served.app) as client:
        for given in (text, f"{text}\n"):
            near(ask(client, "/classify", {"input": given})["data"][0]["probs"][0], whole(served, tokens)[-1])


def test_a_sequence_classifier_is_read_at_the_last_token(build: Any, checkpoints: Any) -> None:
    served = build(checkpoints["llama", "reward"])
    with TestClient(served.app) as client:
        tokens = [*ids(served, PROMPT), served.tokenizer.eos_token_id]
        import torch

        with torch.no_grad():
            wanted = served.model(input_ids=torch.tensor([tokens])).logits.item()
        near(ask(client, "/classify", {"input": tokens})["data"][0]["probs"][0], wanted)
        near(ask(client, "/get_reward", {"query": [f"{PROMPT} <eos>"]})["rewards"][0], wanted)


def test_openrlhf(client: TestClient, served: Any) -> None:
    """The body of its single-turn executor: decoded ids, special tokens and all."""
    queries = [f"{PROMPT} {ANSWER} <eos>", f"{PROMPT} mild"]
    body = {"query": queries, "prompts": [PROMPT, PROMPT], "labels": ["mild", None]}
    reply = ask(client, "/get_reward", body)
    wanted = [whole(served, ids(served, query))[-1] for query in queries]
    near(reply["rewards"], wanted)
    assert reply["scores"] == reply["rewards"]
    assert reply["extra_logs"] == {}
    near(ask(client, "/get_reward", {"query": queries})["rewards"], wanted)
    empty = ask(client, "/get_reward", {"query": [], "prompts": [], "labels": []})
    assert empty == {"rewards": [], "scores": [], "extra_logs": {}}


def test_slime(client: TestClient, served: Any) -> None:
    """The body is the number, for a text prompt and for messages."""
    answer = f"{ANSWER} <eos>"
    number = ask(client, "/reward", {"prompt": PROMPT, "response": answer, "label": {"any": ["thing"]}})
    near(number, whole(served, ids(served, f"{PROMPT} {answer}"))[-1])
    messages = [{"role": "user", "content": PROMPT}]
    chat = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    number = ask(client, "/reward", {"prompt": messages, "response": answer, "label": None})
    near(number, whole(served, ids(served, f"{chat} {answer}"))[-1])


def test_the_operator_may_choose_another_aggregate(build: Any) -> None:
    served = build(reward="mean")
    with TestClient(served.app) as client:
        count = len(ids(served, PROMPT))
        values = whole(served, ids(served, f"{PROMPT} {ANSWER}"))[count:]
        wanted = sum(values) / len(values)
        query = f"{PROMPT} {ANSWER}"
        near(ask(client, "/get_reward", {"query": [query], "prompts": [PROMPT]})["rewards"][0], wanted)
        near(ask(client, "/reward", {"prompt": PROMPT, "response": ANSWER}), wanted)
        error = ask(client, "/get_reward", {"query": [query]}, 400)["error"]
        assert "--reward last" in error["message"]
