"""The cost model against hand-worked numbers, torch's own counts, real runs of the loop, and the paper's tables."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, LlamaConfig

from dvpo import models
from dvpo.config import LoraSettings, PolicySettings
from dvpo.errors import InputError
from reproduce import paper
from reproduce.cost import calls, hardware, memory, shapes, table7, timing
from reproduce.cost.hardware import CLUSTERS, GIB, Cluster, Device
from reproduce.cost.shapes import SHAPES, Shape
from reproduce.cost.work import METHODS, Job, Setup

A100 = CLUSTERS["8xa100-80gb"]
ONLINE = ("dvpo", "ppo", "remax", "grpo")
ALGORITHMS: dict[str, dict[str, Any]] = {
    "dvpo": {"name": "dvpo"},
    "ppo": {"name": "ppo", "critic_learning_rate": 1e-3},
    "remax": {"name": "remax"},
    "grpo": {"name": "grpo", "group_size": 3},
}
SMALL = [
    Shape("wide", 2, 48, 64, 4, 2, 31, False),
    Shape("tied", 3, 32, 80, 4, 4, 50, True),
    Shape("own heads", 2, 48, 64, 4, 1, 40, True, head_size=16),
]


def config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size or shape.hidden // shape.heads, tie_word_embeddings=shape.tied,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [("llama-3.2-3b", 3_212_749_824), ("llama-3-8b", 8_030_261_248), ("mistral-7b", 7_241_732_096),
         ("llama-2-13b", 13_015_864_320), ("smollm2-135m", 134_515_008)],
    )  # fmt: skip
    def test_published_sizes(self, name: str, parameters: int) -> None:
        assert SHAPES[name].parameters("policy") == parameters
        assert SHAPES[name].source.startswith("config.json of ")

    @pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.name)
    def test_parameters_are_transformers(self, shape: Shape) -> None:
        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(config(shape))
            labelled = config(shape)
            labelled.num_labels = 1
            value = AutoModelForTokenClassification.from_config(labelled)
        assert shape.parameters("policy") == count(policy)
        assert shape.parameters("value") == count(value)
        adapted = models.add_lora(policy, "policy", LoraSettings(r=3))
        assert shape.lora_parameters(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)

    @pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.name)
    def test_operations_are_those_that_torch_counts(self, shape: Shape) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model = AutoModelForCausalLM.from_config(config(shape)).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.ones(2, 7, dtype=torch.long), logits_to_keep=4, use_cache=False)
        # torch computes the whole square of attention and so twice the causal half, and the rotary angles.
        attention = 2 * 14 * 7 * shape.attention_width * shape.layers
        angles = 2 * 7 * (shape.head_size or shape.hidden // shape.heads) // 2
        expected = shape.forward_flops(14, 7, 8) + attention
        assert counter.get_total_flops() - expected in (0, angles, 2 * angles)

    def test_cache_is_transformers(self) -> None:
        shape = SMALL[0]
        model = AutoModelForCausalLM.from_config(config(shape)).eval()
        with torch.no_grad():
            cache = model(torch.ones(2, 7, dtype=torch.long), use_cache=True).past_key_values
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert shape.cache_bytes(14, 4) == size

    def test_a_folder_is_read(self, tmp_path: Path) -> None:
        config(SMALL[2]).save_pretrained(tmp_path)
        assert replace(shapes.find(str(tmp_path)), name="", source="") == replace(SMALL[2], name="", source="")

    @pytest.mark.parametrize(
        ("text", "words"),
        [("{", "not valid JSON"), ("[]", "num_hidden_layers"), ('{"num_hidden_layers": "x"}', "num_hidden_layers")],
    )
    def test_wrong_files(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=words):
            shapes.find(str(tmp_path))

    def test_heads_that_do_not_divide(self) -> None:
        fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        with pytest.raises(InputError, match="num_key_value_heads 3 does not divide"):
            shapes.from_config({**dict.fromkeys(fields, 8), "num_key_value_heads": 3}, "n", "there")


class TestMemory:
    # Rajbhandari et al. 2020, Table 1 and Figure 1: 7.5 billion parameters on 64 devices, 16 bytes each at first.
    @pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
    def test_model_states_are_those_of_the_zero_paper(self, zero: int, gigabytes: float) -> None:
        shape = Shape("7.5B", 1, 1, 1, 1, 1, 7_500_000_000 - 10, True)
        assert shape.parameters("policy") == pytest.approx(7.5e9, rel=1e-6)
        cluster = Cluster("64", A100.device, 64, 1e11)
        job = Job(METHODS["sft"], 1, 1, 1, 1)
        parts = memory.phases(job, shape, Setup(zero=zero), cluster)["update"]
        assert (parts["weights"] + parts["optimizer"] + parts["gradients"]) / 1e9 == pytest.approx(gigabytes, abs=0.05)

    @pytest.mark.parametrize(("precision", "bytes_each"), [("float32", 16), ("autocast", 16), ("bf16", 16)])
    def test_every_precision_takes_16_bytes_a_parameter_on_one_device(self, precision: Any, bytes_each: int) -> None:
        shape, job = SMALL[0], Job(METHODS["sft"], 4, 4, 2, 2)
        parts = memory.phases(job, shape, Setup(precision=precision), Cluster("1", A100.device, 1, 1.0))["update"]
        total = parts["weights"] + parts["gradients"] + parts["optimizer"]
        assert total == bytes_each * shape.parameters("policy")

    @pytest.mark.parametrize("shape", SMALL[:2], ids=lambda s: s.name)
    def test_activations_are_those_that_autograd_keeps(self, shape: Shape) -> None:
        """Counted on a real model in float32: what two more layers keep, by their tensors' storages."""

        def kept(layers: int) -> float:
            settings = config(replace(shape, layers=layers))
            settings._attn_implementation = "sdpa"
            model = AutoModelForCausalLM.from_config(settings)
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            storages: dict[int, int] = {}
            alive = []

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    storages[storage.data_ptr()] = storage.nbytes()
                    alive.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                mask = torch.ones(4, 64, dtype=torch.long)
                mask[0, :3] = 0
                model(torch.ones(4, 64, dtype=torch.long), attention_mask=mask, use_cache=False)
            return sum(storages.values())

        measured = (kept(4) - kept(2)) / 2 / (4 * 64)
        assert memory.layer_activations(shape, Setup(precision="float32")) == pytest.approx(measured, rel=0.15)

    def test_checkpointing_keeps_layer_inputs(self) -> None:
        shape, setup = SHAPES["llama-3-8b"], Setup(checkpointing=True)
        whole = memory.layer_activations(shape, setup)
        assert memory.activations(shape, setup, 10) == 10 * (32 * 2 * 4096 + whole)
        assert memory.activations(shape, Setup(), 10) == 10 * 32 * whole

    def test_logits_of_a_chunk(self) -> None:
        shape = SMALL[0]
        assert memory.logits(shape, Setup(logit_rows=5), 100) == memory.logits(shape, Setup(), 5)
        assert memory.logits(shape, Setup(precision="float32"), 1) == (4 + 4 + 8 + 4) * shape.vocab

    def test_casts_of_weights_that_learn_are_not_kept_by_the_online_loop(self) -> None:
        shape = SHAPES["llama-3.2-3b"]

        def casts(method: str, role: str, **options: Any) -> float:
            found = memory.phases(Job(METHODS[method], 8, 8, 8, 2), shape, Setup(precision="autocast", **options), A100)
            return found[f"learn {role}"]["working copies"]

        assert casts("dvpo", "policy") == 0
        assert casts("dvpo", "policy", lora_rank=8) == 2 * shape.parameters("policy")
        assert casts("gvm", "value") == 2 * shape.parameters("value")

    def test_frozen_models(self) -> None:
        shape, job = SHAPES["llama-3-8b"], Job(METHODS["dvpo"], 8, 8, 8, 2)
        policy, value = shape.parameters("policy"), shape.parameters("value")

        def frozen(**options: Any) -> float:
            return memory.resident(job, shape, Setup(zero=3, **options), A100)["frozen models"]

        assert frozen() == 2 * (policy + value)
        assert frozen(frozen_bytes=4, precision="float32") == 4 * (policy + value)
        layers, vocabulary = 32 * (2 * 4096 * 5120 + 3 * 4096 * 14336), 128256 * 4096
        assert frozen(frozen_bytes=4) == 4 * (policy + value) - 2 * (2 * layers + vocabulary)  # linear weights: 2 bytes
        assert frozen(frozen="sharded") == pytest.approx((policy + value) / 4)
        assert frozen(remote=True) == 2 * policy
        assert frozen(lora_rank=8) == 2 * value
        assert frozen(lora_rank=8, remote=True) == 0

    def test_ppo_trains_one_value_model_more_than_dvpo(self) -> None:
        shape, setup = SHAPES["llama-3.2-3b"], Setup(zero=1)
        ppo, dvpo = (memory.resident(Job(METHODS[m], 8, 8, 4, 2), shape, setup, A100) for m in ("ppo", "dvpo"))
        more = {name: ppo[name] - dvpo[name] for name in ppo}
        value = shape.parameters("value")
        assert more == pytest.approx({"weights": 2 * value, "optimizer": 12 * value / 8, "frozen models": 0})

    def test_gradients_are_there_in_the_second_pass_only_where_they_accumulate(self) -> None:
        shape, setup = SMALL[0], Setup(precision="float32")
        cluster = Cluster("1", A100.device, 1, 1.0)
        once = memory.phases(Job(METHODS["ppo"], 8, 8, 4, 4), shape, setup, cluster)
        assert once["learn policy"]["gradients"] == 0
        assert once["learn value"]["gradients"] == 4 * shape.parameters("policy")
        twice = memory.phases(Job(METHODS["ppo"], 8, 8, 4, 2), shape, setup, cluster)
        both = 4 * (shape.parameters("policy") + shape.parameters("value"))
        assert twice["learn policy"]["gradients"] == both
        assert twice["update"]["gradients"] == both

    def test_vllm_takes_its_share(self) -> None:
        job = Job(METHODS["dvpo"], 8, 8, 4, 2)
        parts = memory.phases(job, SMALL[0], Setup(vllm_share=0.3), A100)["generate"]
        assert parts["vllm"] == 0.3 * A100.device.memory
        assert "kv cache" not in parts

    @settings(deadline=None, max_examples=40)
    @given(
        method=st.sampled_from(sorted(METHODS)), zero=st.integers(0, 3), tokens=st.integers(1, 2000),
        micro=st.integers(1, 8), checkpointing=st.booleans(),
    )  # fmt: skip
    def test_more_never_takes_less(self, method: str, zero: int, tokens: int, micro: int, checkpointing: bool) -> None:
        shape, setup = SHAPES["llama-3-8b"], Setup(zero=zero, checkpointing=checkpointing)
        job = Job(METHODS[method], 100, tokens, 8, micro, group=2 if method == "grpo" else 1)

        def peak(job: Job, setup: Setup = setup, cluster: Cluster = A100) -> float:
            return memory.peak(memory.phases(job, shape, setup, cluster))[1]

        here = peak(job)
        assert peak(replace(job, response_tokens=tokens + 100)) >= here
        larger = replace(job, micro=micro + 1)
        # One pass for the whole batch keeps no gradient meanwhile, and so may take less.
        assert peak(larger) >= here or job.accumulates > larger.accumulates
        assert peak(job, cluster=replace(A100, nodes=2)) <= here
        assert peak(job, setup=replace(setup, offload=True)) <= here
        assert peak(job, setup=replace(setup, checkpointing=True)) <= here


class TestTime:
    def run(self, method: str, setup: Setup | None = None, utilisation: float = 0.3, **changes: Any) -> Any:
        setup = setup or Setup(zero=1)
        job = Job(METHODS[method], 200, 300, 8, 2, epochs=4, group=5 if method == "grpo" else 1)
        return timing.seconds(replace(job, **changes), SHAPES["llama-3-8b"], setup, A100, utilisation)

    def test_a_pass_by_hand(self) -> None:
        """No layer to start, no bandwidth to wait for: 2 operations a weight and token, 3 times as many to learn."""
        shape = SMALL[0]
        cluster = Cluster("1", Device("d", 1e12, 1e3, 1e30), 1, 1.0)
        found = timing.seconds(Job(METHODS["sft"], 3, 2, 4, 2, epochs=5), shape, Setup(), cluster, 0.5)
        forward = shape.forward_flops(20, 5, 8)
        assert found == {"learn": pytest.approx(5 * 3 * forward / 500)}

    def test_a_cpu_starts_kernels_itself(self) -> None:
        shape, job = SMALL[0], Job(METHODS["sft"], 3, 2, 4, 4)
        gpu = Cluster("1", Device("d", 1e12, 1e7, 1e30), 1, 1.0)
        cpu = replace(gpu, device=replace(gpu.device, ahead=False))
        host = 3 * (shape.layers * hardware.HOST_SECONDS_PER_LAYER + hardware.HOST_SECONDS_PER_STEP)
        fast, slow = (timing.seconds(job, shape, Setup(), c, 1.0)["learn"] for c in (gpu, cpu))
        assert slow - fast == pytest.approx(host)

    def test_what_distinguishes_the_methods(self) -> None:
        found = {m: self.run(m) for m in ONLINE}
        assert found["ppo"]["generate"] == found["dvpo"]["generate"] == found["remax"]["generate"] / 2
        assert found["ppo"]["learn"] == pytest.approx(2 * found["dvpo"]["learn"], rel=0.15)
        assert found["remax"]["learn"] == found["dvpo"]["learn"]
        assert found["grpo"]["learn"] == pytest.approx(5 * found["dvpo"]["learn"], rel=0.1)  # the steps are as many
        assert found["dvpo"]["judge"] < found["ppo"]["judge"] < 2 * found["dvpo"]["judge"]
        assert self.run("sft").keys() == self.run("gvm").keys() == self.run("rm").keys() == {"learn"}
        assert self.run("dpo").keys() == {"judge", "learn"}

    def test_stage_3_gathers(self) -> None:
        whole, once, always = (
            self.run("dvpo", setup) for setup in (Setup(zero=1), Setup(zero=3), Setup(zero=3, gathered=False))
        )
        gather = 2 * SHAPES["llama-3-8b"].parameters("policy") * 7 / 8 / A100.link
        assert once["generate"] - whole["generate"] == pytest.approx(gather)
        assert always["generate"] - once["generate"] > 300 * gather
        assert once["learn"] > whole["learn"]

    def test_recomputation_costs_a_third_more(self) -> None:
        slow, fast = (self.run("gvm", Setup(checkpointing=c), 0.01)["learn"] for c in (True, False))
        assert slow / fast == pytest.approx(4 / 3, rel=0.01)

    def test_vllm_generates_sooner(self) -> None:
        assert self.run("dvpo", Setup(zero=1, vllm_share=0.3))["generate"] < self.run("dvpo")["generate"] / 2

    def test_between_nodes_the_network_counts(self) -> None:
        assert replace(A100, nodes=2).collective == A100.network < A100.collective

    @settings(deadline=None, max_examples=40)
    @given(method=st.sampled_from(sorted(METHODS)), share=st.floats(0.01, 1), tokens=st.integers(1, 2000))
    def test_more_never_takes_less(self, method: str, share: float, tokens: int) -> None:
        here = sum(self.run(method, utilisation=share, response_tokens=tokens).values())
        assert sum(self.run(method, utilisation=share, response_tokens=tokens + 50).values()) > here
        assert sum(self.run(method, utilisation=share / 2, response_tokens=tokens).values()) >= here
        assert sum(self.run(method, utilisation=share, response_tokens=tokens, epochs=5).values()) > here


class TestJob:
    @settings(max_examples=60)
    @given(batch=st.integers(1, 20), micro=st.integers(1, 25), step=st.integers(1, 20), group=st.integers(1, 5))
    def test_passes_and_steps_cover_the_batch(self, batch: int, micro: int, step: int, group: int) -> None:
        job = Job(METHODS["grpo"], 1, 1, batch, micro, step=step, group=group)
        assert (job.passes - 1) * job.micro_texts < job.learned_texts <= job.passes * job.micro_texts
        assert (job.steps - 1) * step * group < job.learned_texts <= job.steps * step * group

    def test_a_pair_is_two_texts(self) -> None:
        job = Job(METHODS["rm"], 1, 1, 4, 2)
        assert (job.learned_texts, job.micro_texts, job.passes, job.steps) == (8, 4, 2, 1)


class TestTable6:
    def test_our_forms_differ_from_the_papers_in_one_cell(self) -> None:
        rows = calls.symbolic_table()
        assert len(rows) == len(paper.cells(6)) == 24
        assert [(r["method"], r["metric"]) for r in rows if not r["agrees"]] == [("GRPO", "C_back")]

    @pytest.mark.parametrize(("algorithm", "micro"), [("dvpo", None), *((name, 3) for name in ONLINE)])
    def test_a_real_update_does_what_its_settings_say(
        self, checkpoints: Any, examples: Any, algorithm: str, micro: int | None
    ) -> None:
        from dvpo.training.policy import Frozen, OnlineTrainer

        s = PolicySettings.model_validate({
            "algorithm": ALGORITHMS[algorithm], "learning_rate": 1e-3, "updates": 2, "prompts_per_update": 4,
            "minibatch_size": 2, "micro_batch_size": micro, "epochs": 2, "max_new_tokens": 3,
        })  # fmt: skip
        frozen = Frozen(checkpoints["llama", "value"], checkpoints["llama", "reward"])
        trainer = OnlineTrainer(checkpoints["llama", "policy"], frozen, [e.prompt for e in examples], s, 0)
        expected = calls.counted_calls(s)
        assert calls.count_calls(trainer) == expected
        trainer.step()  # nothing is watched any more
        assert calls.count_calls(trainer, updates=0) == {m: dict.fromkeys(c, 0) for m, c in expected.items()}

    @pytest.mark.parametrize(
        ("algorithm", "column"),
        [("ppo", (2, 2, 1, 2)), ("remax", (1, 2, 2, 1)), ("grpo", (1, 2, 3, 3)), ("dvpo", (1, 2, 1, 1))],
    )
    def test_in_the_tables_units(self, algorithm: str, column: tuple[float, ...]) -> None:
        s = PolicySettings.model_validate({"algorithm": ALGORITHMS[algorithm], "learning_rate": 1, "updates": 1})
        assert tuple(calls.table_6(s).values()) == column
        symbolic = {r["metric"]: r["ours"] for r in calls.symbolic_table() if r["method"].lower() == algorithm}
        numbers = [1 if "*" not in form else 3 if form[0] == "n" else int(form[0]) for form in symbolic.values()]
        assert numbers == list(column)

    def test_an_adapter_is_its_own_reference(self) -> None:
        s = PolicySettings(algorithm={"name": "dvpo"}, learning_rate=1, updates=1, lora=LoraSettings())
        found = calls.counted_calls(s)
        assert "reference" not in found
        assert found["policy"]["judged"] == 2 * s.prompts_per_update


class TestTable7:
    def test_sixteen_cells_half_of_them_fitted_by_three_constants(self) -> None:
        rows = table7.table_7_predictions()
        assert len(rows) == 16
        assert sum(r["fitted"] for r in rows) == 8
        assert len(vars(table7.constants())) == 3
        for row in rows:
            assert row["error"] == pytest.approx(row["predicted"] / row["paper"] - 1, abs=1e-3)
            assert row["paper"] == paper.value(7, *row["cell"].values())
            assert row["within"] == (abs(row["error"]) <= 0.15) == (row["reason"] is None)

    def test_which_cells_are_missed(self) -> None:
        missed = {tuple(r["cell"].values()) for r in table7.table_7_predictions() if not r["within"]}
        assert missed == set(table7.MISSES)
        assert len(missed) == 2
        assert all(cell[1] not in table7.FITTED_METHODS for cell in missed)

    def test_the_predicted_cells_do_not_touch_the_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cells = [c if c.method in table7.FITTED_METHODS else replace(c, value=1.0) for c in table7._cells()]
        monkeypatch.setattr(table7, "_cells", lambda: cells)
        assert table7.constants.__wrapped__() == table7.constants()

    def test_no_other_constants_nearby_fit_better(self) -> None:
        import math

        def loss(constants: table7.Constants) -> float:
            cells = [c for c in table7._cells() if c.method in table7.FITTED_METHODS]
            pairs = [(table7.predict(c.model, c.method, c.metric, constants), float(c.value)) for c in cells]
            return sum(math.log(predicted / printed) ** 2 for predicted, printed in pairs)

        best = table7.constants()
        for name in ("response_tokens", "utilisation", "slack"):
            for factor in (0.97, 1.03):
                assert loss(replace(best, **{name: getattr(best, name) * factor})) > loss(best)


class TestHardware:
    def test_other_numbers(self) -> None:
        assert hardware.find("8xa100-80gb", 4, 40).device.memory == 40 * GIB
        assert hardware.find("8xa100-80gb", 4).devices == 4
        assert (hardware.find("8xa100-80gb", 16).nodes, hardware.find("8xa100-80gb", 16).per_node) == (2, 8)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [(("9xzz",), "8xa100-80gb"), (("8xa100-80gb", 0), "at least 1"), (("8xa100-80gb", 9), "whole number"),
         (("8xa100-80gb", 4, -1.0), "more than 0"), (("8xa100-80gb", 4, float("nan")), "more than 0")],
    )  # fmt: skip
    def test_refusals(self, arguments: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            hardware.find(*arguments)
