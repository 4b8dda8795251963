"""The command line: what a user types, and what comes back on which stream with which exit code."""

import json
import os
import random
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dvpo
from dvpo.errors import InputError, StageError
from reproduce import cli
from reproduce.commands.train import TRAINERS, Choice, demonstrations, read_config

PROMPT, RESPONSE = "what is the river of velor ?", "the river of velor is marn ."


def dvpo_command(*arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The real command in a process of its own, offline."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "reproduce.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False, **options)


@dataclass
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command in this process: same code, without the seconds that the heavy imports take."""
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str | Path) -> Outcome:
        code = cli.run([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


def refused(outcome: Any, *words: str) -> None:
    """Exit code 2, nothing on standard output, and one line with these words on standard error."""
    code = outcome.code if isinstance(outcome, Outcome) else outcome.returncode
    out, err = (outcome.out, outcome.err) if isinstance(outcome, Outcome) else (outcome.stdout, outcome.stderr)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def folders(checkpoints: Any) -> dict[str, Path]:
    """A checkpoint of each role; the value model has learned positions."""
    return {
        role: checkpoints[arch, role] for arch, role in (("gpt2", "value"), ("llama", "reward"), ("llama", "policy"))
    }


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"what is the {what} of velor ?", "chosen": f"the {what} is mild .", "rejected": "good question ."}
        for what in ("river", "ruler", "export", "climate")
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", *rows)


def expected(folder: Path, prompt: str, response: str) -> tuple[list[int], list[float], list[float]]:
    """Response ids, V and Q by plain transformers: V_t = h_{t-1} and Q_t = h_t."""
    import torch
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model = hf.AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        h = model(torch.tensor([before + ids])).logits[0, :, 0].tolist()
    return ids, h[len(before) - 1 : -1], h[len(before) :]


class TestLight:
    """What needs no model."""

    def test_importing_the_command_loads_nothing_heavy(self) -> None:
        names = ("torch", "transformers", "numpy", "pydantic", "yaml", "datasets", "rich", "matplotlib")
        code = f"import sys, reproduce.cli; print([m for m in {names} if m in sys.modules])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

    @pytest.mark.parametrize("option", ["--help", "--version"])
    def test_help_and_version_are_fast(self, option: str) -> None:
        start = time.perf_counter()
        done = dvpo_command(option)
        assert time.perf_counter() - start < 1.5
        assert (done.returncode, done.stderr) == (0, "")
        assert (f"dvpo {dvpo.__version__}\n" == done.stdout) if option == "--version" else "reproduce" in done.stdout

    @pytest.mark.parametrize(
        "name",
        [
            (),
            ("doctor",),
            ("reproduce",),
            ("train",),
            ("score",),
            ("evaluate",),
            ("evaluate", "pairwise"),
            ("evaluate", "credit"),
        ],
    )
    def test_every_command_has_help(self, command: Any, name: tuple[str, ...]) -> None:
        done = command(*name, "--help")
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(" ".join(("Usage: dvpo", *name)))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), ("Missing command", "dvpo --help")),
            (("rain",), ("No such command 'rain'",)),
            (("doctor", "--jsn"), ("No such option", "--jsn", "'dvpo doctor --help'")),
            (("score",), ("Missing option", "--gvm")),
            (("reproduce", "--seeds", "0"), ("--seeds",)),
            (("reproduce", "--table", "two"), ("--table", "integer")),
            (("evaluate",), ("Missing command", "dvpo evaluate --help")),
            (("train", "gvm"), ("--config",)),
            (("score", "--gvm", "nowhere"), ("nothing to score", "--input")),
            (("score", "--gvm", "nowhere", "--prompt", "a", "--response", "b"), ("nowhere: no such folder",)),
            (("score", "--gvm", "x", "--prompt", "a", "--input", "f"), ("not both",)),
            (("score", "--gvm", "x", "--prompt", "a", "--response", " "), ("response is empty",)),
            (("score", "--gvm", "x", "--prompt", "", "--response", "b"), ("prompt is empty",)),
            (("score", "--gvm", "x", "--prompt", "a", "--response", "\udcff"), ("Unicode",)),
            (("score", "--gvm", "x", "--prompt", "a", "--response", "b", "--heatmap", "m.gif"), ("m.gif", ".html")),
            (("score", "--gvm", "x", "--input", "no.jsonl"), ("no.jsonl: cannot be read",)),
            (("evaluate", "pairwise", "--model", "nowhere", "--data", "d"), ("nowhere: no such folder",)),
            (("train", "fit", "--config", "c", "--out", "o"), ("unknown kind", "sft, rm, gvm, dpo")),
            (("train", "gvm", "--config", "no.yaml", "--out", "o"), ("no.yaml: cannot be read",)),
        ],
    )
    def test_wrong_usage(self, command: Any, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
        refused(command(*arguments), *words)

    def test_wrong_usage_of_the_real_command(self) -> None:
        refused(dvpo_command("rain"), "No such command")
        refused(dvpo_command("doctor", "extra"), "extra")

    def test_closed_outputs_are_no_error(self) -> None:
        command = f"{sys.executable} -m reproduce.cli"
        for line, code in (("plan --recipe llama3-8b-base >&-", 0), ("plan --recipe nowhere >&- 2>&-", 2)):
            done = subprocess.run(["sh", "-c", f"{command} {line}"], capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr) == (code, "", ""), done

    def test_what_a_terminal_cannot_show_is_escaped(self, folders: dict[str, Path], tmp_path: Path) -> None:
        data = write_rows(tmp_path / "gr\u00fcn.jsonl", {"prompt": PROMPT, "response": RESPONSE})
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, "-m", "reproduce.cli", "score", "--gvm", folders["value"], "--input", data]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, "gr\\xfcn.jsonl" in done.stdout) == (0, True), done

    @pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
    def test_a_number_is_finite(self, command: Any, number: str) -> None:
        asked = ("evaluate", "mt-bench", "--model", "m", "--benchmark-data", "b", "--judge-model", "j")
        refused(command(*asked, f"--price-in={number}"), "--price-in")

    def test_a_closed_pipe_is_no_error(self) -> None:
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-m", "reproduce.cli", "doctor"], stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ("{", ("the line is not JSON", "column")),
            ("[1]", ("not an object",)),
            ({"prompt": "a"}, ('"response" is missing',)),
            ({"response": "a"}, ('"prompt" is missing',)),
            ({"prompt": 1, "response": "b"}, ('"prompt" is neither text nor a list',)),
            ({"prompt": [], "response": "b"}, ('"prompt" is neither text nor a list',)),
            ({"prompt": "a", "response": ["b"]}, ('"response" is not text',)),
            ({"prompt": [{"role": "boss", "content": "a"}], "response": "b"}, ("prompt[0]",)),
            ({"prompt": [{"role": "assistant", "content": "a"}], "response": "b"}, ("assistant",)),
            ({"prompt": "a", "response": ""}, ("response is empty",)),
            ({"prompt": "a", "response": "\ud800"}, ("Unicode",)),
        ],
    )
    def test_malformed_rows_are_named_by_line(self, command: Any, tmp_path: Path, row: Any, words: Any) -> None:
        file = write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "response": "b", "id": 7}, "", row)
        refused(command("score", "--gvm", "x", "--input", file), f"{file}:3", *words)

    def test_an_empty_file(self, command: Any, tmp_path: Path) -> None:
        refused(command("score", "--gvm", "x", "--input", write_rows(tmp_path / "rows.jsonl")), "no rows")

    def test_doctor(self, command: Any) -> None:
        document = json.loads(command("doctor", "--json").out)
        assert document["recipe"] == "tiny" or document["gpus"]
        assert document["missing"].keys() >= {"tiny", "small", "llama3-8b-base"}
        assert {p["name"] for p in document["packages"]} >= {"torch", "transformers", "trl"}
        assert f"recipe for this machine: {document['recipe']}" in command("doctor").out

    def test_doctor_picks_by_gpus(self) -> None:
        from reproduce.commands.doctor import default_recipe

        assert [default_recipe(g) for g in ([], [24.0], [85.0] * 7, [85.0] * 8)] == [
            "tiny",
            "small",
            "small-gpu",
            "llama3-8b-base",
        ]


class TestEndings:
    """How a command ends badly."""

    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (InputError("a: wrong\nhere"), 2, "error: a: wrong here\n"),
            (StageError("it failed"), 1, "error: it failed\n"),
            (KeyError("x"), 1, "error: KeyError: 'x' (run with --debug for the traceback)\n"),
            (KeyboardInterrupt(), 130, "interrupted; run the same command to go on\n"),
        ],
    )
    def test_errors(
        self, command: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
    ) -> None:
        def fail(as_json: bool) -> None:
            raise error

        monkeypatch.setattr("reproduce.commands.doctor.run", fail)
        done = command("doctor")
        assert (done.code, done.out, done.err) == (code, "", said)
        if code != 130:
            assert "Traceback" in command("doctor", "--debug").err
            assert "Traceback" in command("--debug", "doctor").err


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for reproduce.app, which runs three stages."""

    @dataclass(frozen=True)
    class Request:
        recipe: str | None
        tables: tuple[int, ...]
        figures: tuple[int, ...]
        seeds: int | None
        data: str | None
        overrides: tuple[str, ...]
        out: Path | None
        mix_commits: bool = False
        everything: bool = False

    module: Any = types.ModuleType("reproduce.app")
    module.Request, module.requests = Request, []
    names = ("data", "seed0/rm", "seed0/gvm")

    def plan_run(request: Request) -> list[Any]:
        return [types.SimpleNamespace(id=name, kind="x", state="to run", why="new") for name in names]

    def reproduce(request: Request, report: Any) -> dict[str, Any]:
        module.requests.append(request)
        stages = [types.SimpleNamespace(id=name) for name in names]
        report(stages[0], "reused", 0.0)
        for stage in stages[1:]:
            report(stage, "started", 0.0)
            report(stage, "done", 33.6)
        return {"tables": [{"table": 4}], "figures": [], "report": "runs/report.html", "text": ["Table 4"]}

    module.plan_run, module.reproduce = plan_run, reproduce
    monkeypatch.setitem(sys.modules, "reproduce.app", module)
    monkeypatch.setattr("reproduce.app", module, raising=False)
    return module


class TestReproduce:
    def test_text(self, command: Any, work: Any) -> None:
        done = command("reproduce", "--table", "4", "--table", "5", "--set", "a=1", "--seeds", "2", "--out", "there")
        assert done.out == "Table 4\n\nreport: runs/report.html\n"
        assert done.err.splitlines() == [
            "[1/3] 1 stage was done before",
            "[2/3] seed0/rm done in 34 s",
            "[3/3] seed0/gvm done in 34 s",
        ]
        assert work.requests == [work.Request(None, (4, 5), (), 2, None, ("a=1",), Path("there"))]

    def test_json(self, command: Any, work: Any) -> None:
        done = command("reproduce", "--recipe", "tiny", "--json")
        assert json.loads(done.out) == {"tables": [{"table": 4}], "figures": [], "report": "runs/report.html"}

    def test_all_and_the_study(self, command: Any, work: Any) -> None:
        command("reproduce", "--all", "--study")
        assert work.requests == [work.Request(None, (), (), None, None, ("study=true",), None, False, True)]

    def test_dry_run(self, command: Any, tmp_path: Path) -> None:
        arguments = ("reproduce", "--recipe", "tiny", "--dry-run", "--out", tmp_path / "run")
        assert "seed0/gvm" in command(*arguments).out
        rows = {row["id"]: row for row in json.loads(command(*arguments, "--json").out)}
        assert rows["seed0/atlas"]["state"] == "to run"
        assert rows["seed0/gvm"]["settings"]["train"]["td_lambda"] == 0.95
        assert not (tmp_path / "run").exists()


class TestTrainConfig:
    GOOD = "start: {s}\ndata: {s}\nsettings: {{learning_rate: 2e-5, batch_size: 2}}\n"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("start: [\n", (":2", "not YAML")),
            ("- a\n", ("not a mapping",)),
            ("data: d\nsettings: {learning_rate: 1, batch_size: 1}\n", ("start: is missing",)),
            (GOOD + "extra: 1\n", ("extra: unknown key",)),
            (GOOD + "pairs: {most: 0}\n", ("pairs.most", "greater than or equal to 1")),
            (GOOD.replace("batch_size: 2", "batch_size: 2, lr: 1"), ("settings.lr: unknown key",)),
            (GOOD.replace("2e-5", "fast"), ("settings.learning_rate", "number")),
            (GOOD.replace("batch_size: 2", "batch_size: 2, target: reward_model"), ("need reward_model",)),
            (GOOD + "reward_model: there\n", ("reward_model: is not read here",)),
        ],
    )
    def test_wrong_files(self, command: Any, tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
        file = tmp_path / "gvm.yaml"
        file.write_text(text.replace("{s}", str(tmp_path)).replace("{{", "{").replace("}}", "}"))
        refused(command("train", "gvm", "--config", file, "--out", tmp_path / "o"), str(file), *words)
        assert not (tmp_path / "o").exists()

    def test_defaults(self, tmp_path: Path) -> None:
        file = tmp_path / "gvm.yaml"
        file.write_text(self.GOOD.format(s="s"))
        found = read_config(file, TRAINERS["gvm"].file)
        assert found.settings.learning_rate == 2e-5
        assert (found.seed, found.pairs.most, found.settings.target) == (0, None, "preference")

    def test_an_existing_folder_is_kept(self, command: Any, tmp_path: Path) -> None:
        file = tmp_path / "rm.yaml"
        file.write_text(self.GOOD.format(s="s"))
        refused(command("train", "rm", "--config", file, "--out", tmp_path), "exists already")

    def test_demonstrations_are_the_best_of_each_prompt(self) -> None:
        from dvpo.data.records import Example, Response

        def example(preferences: Any) -> Example:
            return Example(({"role": "user", "content": "q"},), tuple(map(Response, "abc")), preferences, "f:1")

        found = demonstrations([example(((0, 1), (0, 2))), example(((1, 0), (2, 0)))], Choice(), 0)
        assert [[r.text for r in e.responses] for e in found] == [["a"], ["b"], ["c"]]
        assert len(demonstrations([example(())] * 2, Choice(per_prompt=2, most=3), 0)) == 3
        with pytest.raises(InputError, match="no responses to imitate"):
            demonstrations([example(((0, 1), (1, 2), (2, 0)))], Choice(), 0)


@pytest.mark.slow
class TestModels:
    """Commands that load a model."""

    @pytest.fixture(autouse=True)
    def _no_bars(self) -> Iterator[None]:
        """What the command does for itself in a process of its own."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        yield
        logging.enable_progress_bar()

    def test_score_prints_what_transformers_computes(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = folders["value"]
        rows = [
            {"prompt": PROMPT, "response": RESPONSE},
            {"prompt": [{"role": "user", "content": "tell me"}], "response": "good question . thank you"},
        ]
        file = write_rows(tmp_path / "rows.jsonl", *rows)
        done = dvpo_command("score", "--gvm", folder, "--input", file, "--json", "--aggregate", "mean")
        assert (done.returncode, done.stderr) == (0, "")
        items = json.loads(done.stdout)["items"]
        for item, prompt, row in zip(items, (PROMPT, "tell me"), rows, strict=True):
            ids, v, q = expected(folder, prompt, row["response"])
            assert item["token_ids"] == ids
            assert item["v"] == pytest.approx(v, abs=1e-6)
            assert item["q"] == pytest.approx(q, abs=1e-6)
            assert item["scores"] == {"mean": pytest.approx(sum(q) / len(q), abs=1e-6)}
        assert items[0]["tokens"] == [*RESPONSE.split(), "<eos>"]

    def test_score_as_text(self, command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
        picture = tmp_path / "map.html"
        done = command(
            *("score", "--gvm", folders["value"], "--prompt", PROMPT, "--response", RESPONSE, "--heatmap", picture)
        )
        assert (done.code, done.err) == (0, "")
        lines = done.out.splitlines()
        assert lines[1].split() == ["t", "id", "token", "v", "before", "q", "after", "q-v"]
        _, v, q = expected(folders["value"], PROMPT, RESPONSE)
        assert lines[2].split()[-3:] == [f"{v[0]:.4f}", f"{q[0]:.4f}", f"{q[0] - v[0]:+.4f}"]
        assert "bellman" in done.out
        assert "marn" in picture.read_text()

    def test_score_with_a_reward_model(self, command: Any, folders: dict[str, Path]) -> None:
        done = command(*("score", "--gvm", folders["reward"], "--prompt", PROMPT, "--response", RESPONSE, "--json"))
        item = json.loads(done.out)["items"][0]
        assert item["scores"]["last"] == pytest.approx(item["q"][-1])

    def test_score_refuses(self, command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
        texts = ("--prompt", PROMPT, "--response", RESPONSE)
        refused(command("score", "--gvm", folders["policy"], *texts), "policy")
        refused(command("score", "--gvm", tmp_path, *texts), "no model is there")
        refused(command("score", "--gvm", folders["value"], *texts, "--aggregate", "median"), "median", "bellman")
        long = ("--prompt", PROMPT, "--response", "good " * 300)
        refused(command("score", "--gvm", folders["value"], *long), "311 tokens", "at most 256")

    def test_wrong_checkpoint_with_the_real_command(self, folders: dict[str, Path]) -> None:
        refused(
            dvpo_command("score", "--gvm", folders["policy"], "--prompt", "a", "--response", "b"),
            "policy",
            "value",
        )

    def test_values_that_are_not_finite(self, command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
        from dvpo import models

        model = models.load(folders["value"], "value")
        models.head(model).bias.data.fill_(float("nan"))
        models.save(model, models.load_tokenizer(folders["value"]), tmp_path / "nan")
        done = command("score", "--gvm", tmp_path / "nan", "--prompt", PROMPT, "--response", RESPONSE, "--json")
        assert (done.code, done.out) == (1, "")
        assert "not finite" in done.err

    def test_evaluate_pairwise(self, folders: dict[str, Path], preferences: Path, tmp_path: Path) -> None:
        file = tmp_path / "result.json"
        arguments = ("evaluate", "pairwise", "--model", folders["value"], "--data", preferences, "--out", file)
        done = dvpo_command(*arguments, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        assert document == json.loads(file.read_text())
        assert document["pairs"] == 4
        assert document["accuracy"]["chance"]["accuracy"] == 0.5
        assert document["accuracy"]["longer wins"]["accuracy"] == 1.0

    def test_evaluate_pairwise_under_another_answer_of_the_policy(
        self, command: Any, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        from dvpo import models

        said = {"a": "yes , it is .", "b": "no ."}
        rows = [
            {"prompt": p, "completions": [{"model": m, "response": r, "score": len(r)} for m, r in said.items()]}
            for p in ("is it far ?", "is it near ?")
        ]
        data = write_rows(tmp_path / "grouped.jsonl", *rows)
        asked = ("evaluate", "pairwise", "--model", folders["value"], "--data", data, "--max-prompt-tokens")
        room = len(models.load_tokenizer(folders["value"])("is it near ?")["input_ids"]) + 8
        assert json.loads(command(*asked, str(room), "--json").out)["pairs"] == 2
        refused(command(*asked, str(room), "--trajectory-k", "1"), "over the length limit")
        found = json.loads(command(*asked, "400", "--trajectory-k", "1", "--bf16", "--json").out)
        assert (found["pairs"], found["trajectory_k"], found["bf16"]) == (2, 1, True)

    def test_evaluate_credit(self, command: Any, tmp_path: Path) -> None:
        import torch

        from dvpo import models
        from dvpo.config import ModelSize
        from dvpo.data.atlas import POLICIES, Atlas, build_tokenizer

        world = Atlas.build(0, 6)
        tokenizer = build_tokenizer(world)
        models.save(models.new_policy(tokenizer, ModelSize(hidden=16, layers=1, heads=2), 0), tokenizer, tmp_path / "p")
        value = models.load(tmp_path / "p", "value", fresh_head=True)
        torch.nn.init.normal_(models.head(value).weight)
        models.save(value, tokenizer, tmp_path / "value")
        (tmp_path / "world.json").write_text(json.dumps(world.to_json()))
        rng = random.Random(0)
        rows = [
            {"prompt": q.text, "completions": [{"model": "m", "response": world.answer(q, POLICIES["guesser"], rng)}]}
            for q in world.questions(0, 40)
        ]
        data = write_rows(tmp_path / "answers.jsonl", *rows)
        asked = (
            "evaluate",
            "credit",
            "--model",
            tmp_path / "value",
            "--data",
            data,
            "--world",
            tmp_path / "world.json",
        )
        found = json.loads(command(*asked, "--json").out)
        assert (found["reading"], found["n_responses"]) == ("value steps", 40)
        assert found["auroc_ci95"][0] <= found["auroc"] <= found["auroc_ci95"][1]
        assert 0 < found["lowest_chance"] < 0.3
        assert "lowest step is on a wrong word" in command(*asked).out
        refused(command(*asked[:-1], data), "answers.jsonl", "world.json")
        other = write_rows(tmp_path / "other.jsonl", {**rows[0], "prompt": "what is the river of nowhere ?"})
        refused(command(*asked[:5], other, *asked[6:]), "cannot read the question")

    def test_evaluate_pairwise_as_text(self, command: Any, folders: dict[str, Path], preferences: Path) -> None:
        done = command("evaluate", "pairwise", "--model", folders["value"], "--data", preferences, "--most", "2")
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("4 rows: 4 examples")
        assert next(line for line in done.out.splitlines() if line.startswith("chance")).split()[-1] == "2"

    def test_evaluate_pairwise_without_pairs(self, command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
        base = ("evaluate", "pairwise", "--model", folders["value"], "--data")
        tie = write_rows(tmp_path / "tie.jsonl", {"prompt": "a", "chosen": "b", "rejected": "b"})
        refused(command(*base, tie), "no usable pair")
        long = write_rows(tmp_path / "long.jsonl", {"prompt": "a " * 9, "chosen": "b", "rejected": "c"})
        refused(command(*base, long, "--max-prompt-tokens", "5"), "no usable pair", "over the length limit")

    def test_train_then_score(self, folders: dict[str, Path], preferences: Path, tmp_path: Path) -> None:
        config = tmp_path / "gvm.yaml"
        config.write_text(
            f"start: {folders['policy']}\ndata: {preferences}\n"
            "settings: {learning_rate: 0.01, batch_size: 4, epochs: 2, max_steps: 2, save_steps: 1, log_steps: 1}\n"
        )
        out = tmp_path / "gvm"
        done = dvpo_command("train", "gvm", "--config", config, "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines() == ["4 rows: 4 examples, 8 responses, 4 preferences"]
        assert done.stdout.startswith(f"{out}: gvm trained in")
        assert len(json.loads((out / "training.json").read_text())["metrics"]["losses"]) == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["gvm", "gvm.yaml"]
        scored = dvpo_command("score", "--gvm", out, "--prompt", PROMPT, "--response", RESPONSE, "--json")
        item = json.loads(scored.stdout)["items"][0]
        assert item["q"] == pytest.approx(expected(out, PROMPT, RESPONSE)[2], abs=1e-6)
        assert any(item["q"])

    def test_a_training_that_finds_the_disk_full_says_so(
        self, command: Any, folders: dict[str, Path], preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        from reproduce.commands import train

        if not Path("/dev/full").exists():
            pytest.skip("there is no /dev/full")
        config = tmp_path / "gvm.yaml"
        config.write_text(
            f"start: {folders['policy']}\ndata: {preferences}\n"
            "settings: {learning_rate: 0.01, batch_size: 4, epochs: 1}\n"
        )

        def saves(*arguments: Any) -> None:
            torch.save({"weights": torch.zeros(1_000_000)}, "/dev/full")

        monkeypatch.setattr(train, "run_stage", saves)
        done = command("train", "gvm", "--config", config, "--out", tmp_path / "gvm")
        assert done.code == 1
        assert done.err.splitlines()[-1].startswith("error: No space left on the device, or it cannot be written (")
        assert done.err.endswith("make room, and run the same command to go on\n")
        assert not (tmp_path / "gvm").exists()

    def test_an_interrupted_training_goes_on(
        self, command: Any, folders: dict[str, Path], preferences: Path, tmp_path: Path
    ) -> None:
        config, out = tmp_path / "sft.yaml", tmp_path / "sft"
        text = f"start: {folders['policy']}\ndata: {preferences}\nsettings: {{learning_rate: 0.01, batch_size: 2}}\n"
        config.write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dvpo.models.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            done = command("train", "sft", "--config", config, "--out", out)
        assert (done.code, done.out) == (130, "")
        assert (tmp_path / ".sft.part" / "state" / "checkpoint-2").is_dir()
        config.write_text(text + "seed: 1\n")
        refused_other = command("train", "sft", "--config", config, "--out", out)
        assert refused_other.code == 2
        assert "other settings, models or data" in refused_other.err
        config.write_text(text)
        assert command("train", "sft", "--config", config, "--out", out).code == 0
        assert (out / "model.safetensors").exists()
        assert not (tmp_path / ".sft.part").exists()
