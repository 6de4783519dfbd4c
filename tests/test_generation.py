"""Text generation: all engines give the most likely tokens, a wrong one is caught, the plan is what the engine runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saih import workload
from saih.core import Context, Place, Point, Work
from saih.errors import SaihError
from saih.timing import Unclocked
from tests.conftest import package
from workloads.llm import config, loader, peers, prepack, stepcost
from workloads.llm.generation import bench, spec
from workloads.llm.model import Stage
from workloads.llm.request import Request

PEERS = [name for name in spec.ENGINES if name != "saih"]
TINY = {
    "shape": "llama-tiny",
    "prompt_tokens": 9,
    "new_tokens": 5,
    "requests": 7,
    "lengths": "mixed",
    "max_requests": 3,
}


def point(**settings: Any) -> Point:
    defaults = {name: each.default for name, each in workload.parameters(workload.spec("generation")).items()}
    return Point("generation", defaults | TINY | settings, seed=2)


def ready(**settings: Any) -> Any:
    return bench.setup(point(**settings), Context(Place(0, 0, 1), "cpu", "/nowhere"))


def wanted(name: str) -> None:
    """Skips where the package of a peer is missing, but not in CI."""
    package("transformers")
    if name == "ctranslate2":
        package("ctranslate2")


@pytest.fixture(scope="module")
def ours() -> list[list[int]]:
    made = ready()
    tokens: list[list[int]] = made.generator.generate(bench._fresh(made.trace))
    assert len({token for each in tokens for token in each}) > 10, "tokens vary, so errors would show"
    return tokens


@pytest.mark.parametrize("shape", ["llama-tiny", "gpt-tiny", "opt-tiny"])
@pytest.mark.parametrize(("precision", "matrices"), [("fp32", "prepacked"), ("fp32", "plain"), ("bf16", "prepacked")])
def test_our_engine_passes_its_check(
    shape: str, precision: str, matrices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepack, "SMALLEST", 0)
    made = ready(shape=shape, precision=precision, matrices=matrices, max_tokens=8)
    check = made.check()
    assert check.passed, check.why
    assert check.numbers["tokens"] == sum(request.max_new_tokens for request in made.trace)
    assert made.step(Unclocked()).units == check.numbers["tokens"]


@pytest.mark.parametrize("engine", PEERS)
def test_a_peer_has_our_weights_and_gives_our_tokens(engine: str, ours: list[list[int]]) -> None:
    wanted(engine)
    made = ready(engine=engine)
    try:
        assert made.check().passed
        assert made.generator.generate(made.trace) == ours
    finally:
        made.close()


@pytest.mark.parametrize("shape", ["llama-tiny", "gpt-tiny", "opt-tiny"])
def test_weights_given_to_transformers_are_ours(shape: str, tmp_path: Path) -> None:
    """There and back: transformers saves what it was given, and the core reads the same tensors from it."""
    wanted("hf-generate")
    stage, again = Stage(config.preset(shape)), Stage(config.preset(shape))
    loader.random_init(stage, 5)
    peers.hf_model(stage.spec, loader.state_dict(stage), torch.float32, "cpu").save_pretrained(tmp_path)
    loader.load(again, tmp_path)
    assert config.from_hf(tmp_path) == stage.spec
    for (name, one), (_, other) in zip(stage.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_takes_the_place_of_random_weights(tmp_path: Path) -> None:
    wanted("hf-generate")
    stage = Stage(config.preset("gpt-tiny"))
    loader.random_init(stage, 6)
    peers.hf_model(stage.spec, loader.state_dict(stage), torch.float32, "cpu").save_pretrained(tmp_path)
    found = [ready(checkpoint=str(tmp_path), engine=engine) for engine in ("saih", "hf-generate")]
    assert all(each.check().passed for each in found)
    one, other = (each.generator.generate(bench._fresh(each.trace)) for each in found)
    assert one == other


@pytest.mark.parametrize("engine", PEERS)
def test_the_end_token_of_a_checkpoint_stops_no_engine(engine: str, tmp_path: Path) -> None:
    wanted(engine)
    stage = Stage(config.preset("llama-tiny"))
    loader.random_init(stage, 2)
    model = peers.hf_model(stage.spec, loader.state_dict(stage), torch.float32, "cpu")
    model.save_pretrained(tmp_path)
    ours = ready(checkpoint=str(tmp_path))
    tokens = ours.generator.generate(bench._fresh(ours.trace))
    model.generation_config.eos_token_id = model.config.eos_token_id = tokens[0][0]
    model.save_pretrained(tmp_path)
    made = ready(checkpoint=str(tmp_path), engine=engine)
    try:
        assert made.generator.generate(bench._fresh(made.trace)) == tokens
    finally:
        made.close()


@pytest.mark.parametrize("damage", ["token", "length", "cache"])
def test_a_wrong_engine_fails_the_check(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ready()
    right = made.generator.generate

    def wrong(requests: Any) -> list[list[int]]:
        tokens: list[list[int]] = right(requests)
        tokens[2][-1] ^= damage == "token"
        return [*tokens[:-1], tokens[-1][: -1 if damage == "length" else None]]

    monkeypatch.setattr(made.generator, "generate", wrong)
    if damage == "cache":
        kv = made.generator.engine.worker.kv
        monkeypatch.setattr(kv, "write", lambda *words: None)
    assert not made.check().passed


@pytest.mark.parametrize("task", ["prefill", "decode"])
def test_one_step_alone_is_right_and_counted(task: str) -> None:
    settings = {"task": task, "lengths": "even", "max_requests": 7}
    made = ready(**settings)
    check = made.check()
    assert check.passed, check.why
    work, params = made.step(Unclocked()), point(**settings).params
    model = config.preset("llama-tiny")
    batch = stepcost.Batch.prefill([9] * 7) if task == "prefill" else stepcost.Batch.decode([9] * 7)
    expected = Work(
        7.0 * (9 if task == "prefill" else 1), stepcost.forward_flop(model, batch), stepcost.step_bytes(model, batch, 4)
    )
    assert work == expected
    cost = spec.cost(params)
    assert (cost.work, cost.flop) == (work.units, work.flop)
    assert sum(each.moved_bytes for each in cost.operations) == pytest.approx(work.moved_bytes)
    with pytest.raises(SaihError, match="set max_requests=7"):
        ready(**settings | {"max_requests": 2, "new_tokens": 1})


def test_smaller_blocks_need_no_more_memory_and_change_no_batch() -> None:
    """Planning does not know the device: what it says with a CPU's blocks is right for a GPU's."""
    cpu, gpu = (point(block_size=size).params for size in (0, 16))
    assert spec.batches(cpu) == spec.batches(gpu)
    assert spec.cost(cpu).device_bytes >= spec.cost(gpu).device_bytes


@pytest.mark.parametrize("max_tokens", [8, 4096])
def test_the_plan_holds_the_batches_that_the_engine_runs(max_tokens: int) -> None:
    made = ready(max_tokens=max_tokens)
    planned = spec.batches(point(max_tokens=max_tokens).params, seed=2)
    ran = [iteration.load for iteration in made.generator.engine.serve(bench._fresh(made.trace))]
    assert [batch.rows for batch in planned] == [load.decodes + load.prefill_tokens for load in ran]
    assert sum(batch.head_rows for batch in planned) == sum(request.max_new_tokens for request in made.trace)


@pytest.mark.parametrize("batching", spec.BATCHINGS)
@pytest.mark.parametrize("engine", spec.BATCHED)
def test_however_a_peer_batches_it_gives_our_tokens(engine: str, batching: str, ours: list[list[int]]) -> None:
    wanted(engine)
    made = ready(engine=engine, batching=batching)
    try:
        assert made.generator.generate(made.trace) == ours
    finally:
        made.close()


def test_which_requests_share_a_batch() -> None:
    pairs = [(5, 1), (9, 8), (5, 9), (7, 2), (5, 7)]
    requests = [Request(number, [1] * prompt, new) for number, (prompt, new) in enumerate(pairs)]
    assert peers.batches_of(requests, "prompts", 2) == [[0, 2], [4, 3], [1]]
    assert peers.batches_of(requests, "outputs", 2) == [[0, 3], [4, 1], [2]]
    assert peers.batches_of(requests, "equal", 2) == [[0, 2], [4], [3], [1]]
    assert peers.batches_of(requests, "together", 2) == [[0, 1, 2, 3, 4]]


def test_requests_that_come_over_time_are_waited_for_and_their_latencies_told() -> None:
    made = ready(rate_per_s=20.0)
    arrivals = [request.arrival_s for request in made.trace]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(6 / 20)
    check = made.check()
    assert check.passed, check.why
    assert 0 < check.numbers["ttft_p50_s"] <= check.numbers["ttft_p99_s"]
    assert check.numbers["tpot_p50_s"] > 0
    assert check.numbers["tokens_per_s"] < check.numbers["tokens"] / arrivals[-1]
    assert max(request.arrival_s for request in ready().trace) == 0


def test_a_trace_file_gives_the_lengths(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,12,3\n2023-11-16 18:17:05,4,6\n")
    made = ready(trace=str(path))
    assert [(len(each.prompt), each.max_new_tokens, each.arrival_s) for each in made.trace] == [
        (12, 3, 0.0),
        (4, 6, 0.0),
    ]
    assert made.check().passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 2}, "runs on one rank"),
        ({"batching": "outputs"}, "batching=outputs is for engine=hf-generate and ctranslate2"),
        ({"engine": "hf-generate", "rate_per_s": 2.0}, "rate_per_s is for engine=saih"),
        ({"engine": "hf-generate", "task": "decode"}, "serves whole traces only"),
        ({"engine": "ctranslate2", "matrices": "plain"}, "matrices=plain is for engine=saih"),
        ({"task": "prefill"}, "takes requests of one length"),
        ({"prompt_tokens": 9000, "lengths": "even"}, "exceeds the model's 8192 positions"),
    ],
)
def test_what_makes_no_sense_is_refused_in_planning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SaihError, match=message):
        spec.cost(point(**settings).params)


def test_a_missing_package_and_a_missing_precision_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted("ctranslate2")
    with pytest.raises(SaihError, match=r"ctranslate2 has no bfloat16 on cpu here, only .*float32"):
        ready(engine="ctranslate2", precision="bf16")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(SaihError, match=r"needs the ctranslate2 package .*: pip install 'saih\[peers\]'"):
        ready(engine="ctranslate2")
