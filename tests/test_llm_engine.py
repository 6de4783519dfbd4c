"""The engine's tokens are those of transformers' generate for every request, however requests are batched and cut."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from saih.errors import SaihError
from tests.conftest import package
from workloads.llm import config, loader, metrics
from workloads.llm import worker as worker_module
from workloads.llm.engine import Engine
from workloads.llm.model import Stage
from workloads.llm.request import GREEDY, Phase, Request, Sampling
from workloads.llm.scheduler import BatchPlan, FirstComeFirstServed, ServerState
from workloads.llm.serve import Iteration
from workloads.llm.shard import Mesh
from workloads.llm.worker import Worker

FAMILIES = ("llama", "gpt2", "opt")
VOCAB = 96
LENGTHS = ((5, 9), (23, 6), (1, 12), (14, 1), (9, 10), (40, 8), (3, 7))
"""Prompt and new tokens of each request."""
DRAWN = Sampling(1.0, 0.9, seed=3)
CUTS = ((2, 2), (1, 4))
"""tp and pp of four ranks."""


def hf_config(family: str) -> Any:
    transformers = package("transformers")
    common = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family == "llama":
        return transformers.LlamaConfig(
            **common,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    if family == "gpt2":
        return transformers.GPT2Config(**common, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3)
    return transformers.OPTConfig(
        **common,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.3,
    )


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (prompt,), generator=generator).tolist() for prompt, _ in LENGTHS]


def fresh_requests(sampling: Sampling = GREEDY) -> list[Request]:
    pairs = zip(prompts(), LENGTHS, strict=True)
    return [Request(n, prompt, new, sampling=sampling) for n, (prompt, (_, new)) in enumerate(pairs)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with random weights for each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    transformers = package("transformers")
    for family in FAMILIES:
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(hf_config(family)).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What generate says to each prompt by itself."""
    transformers = package("transformers")
    found: dict[str, list[list[int]]] = {}
    for family, folder in checkpoints.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found[family] = []
        for prompt, (_, new) in zip(prompts(), LENGTHS, strict=True):
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
            found[family].append(out[0, len(prompt) :].tolist())
        assert len({token for tokens in found[family] for token in tokens}) > 10, "tokens vary, so errors would show"
    return found


def worker_of(folder: Path, mesh: Mesh | None = None, blocks: int = 100, block_size: int = 4) -> Worker:
    stage = Stage(config.from_hf(folder), mesh)
    loader.load(stage, folder)
    return Worker(stage, stage.new_kv(blocks, block_size))


def serve_all(worker: Worker, requests: Sequence[Request], scheduler: Any) -> list[Iteration]:
    with Engine(worker, scheduler) as engine:
        iterations = list(engine.serve(requests))
        assert engine.state.blocks.free_blocks == worker.kv.blocks
    return iterations


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("tokens", "batch", "blocks"),
    [(512, 64, 100), (512, 1, 100), (7, 3, 100), (16, 64, 14)],
    ids=["together", "one-by-one", "chunks", "chunks-and-preemption"],
)
def test_tokens_are_those_of_generate(
    family: str,
    tokens: int,
    batch: int,
    blocks: int,
    checkpoints: dict[str, Path],
    expected: dict[str, list[list[int]]],
) -> None:
    requests = fresh_requests()
    iterations = serve_all(worker_of(checkpoints[family], blocks=blocks), requests, FirstComeFirstServed(tokens, batch))
    assert [request.generated for request in requests] == expected[family]
    assert any(request.preemptions for request in requests) == (blocks == 14)
    figures = metrics.summary(requests, iterations)
    assert figures["requests_served"] == len(requests)
    assert figures["tokens_per_s"] > 0
    assert figures["idle_s"] >= 0


def test_tokens_stream_as_they_come_and_stop_where_told(
    checkpoints: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    requests = fresh_requests()
    for request, tokens in zip(requests, expected["llama"], strict=True):
        request.stop_token = tokens[len(tokens) // 2]
    seen: dict[int, list[int]] = {request.id: [] for request in requests}
    with Engine(worker_of(checkpoints["llama"]), FirstComeFirstServed(64, 8)) as engine:
        for request, token in engine.stream(requests):
            seen[request.id].append(token)
            assert request.generated == seen[request.id]
    for request, tokens in zip(requests, expected["llama"], strict=True):
        assert seen[request.id] == tokens[: tokens.index(request.stop_token) + 1]


def test_drawn_tokens_do_not_depend_on_the_batch(checkpoints: dict[str, Path]) -> None:
    worker = worker_of(checkpoints["llama"], blocks=14)
    outcomes = []
    for scheduler in (FirstComeFirstServed(512, 1), FirstComeFirstServed(16, 64)):
        requests = fresh_requests(DRAWN)
        serve_all(worker, requests, scheduler)
        outcomes.append([request.generated for request in requests])
    assert outcomes[0] == outcomes[1]


class NewestFirst(FirstComeFirstServed):
    """The same batches with their requests turned round, so that one without a token stands before those with one."""

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        plan = super().next_batch(state)
        return plan and BatchPlan(plan.requests[::-1], plan.tokens[::-1])


def test_the_order_within_a_batch_changes_nothing(checkpoints: dict[str, Path]) -> None:
    worker = worker_of(checkpoints["gpt2"])
    outcomes = []
    for scheduler in (FirstComeFirstServed(9, 64), NewestFirst(9, 64)):
        requests = [*fresh_requests(), *fresh_requests(DRAWN)]
        for number, request in enumerate(requests):
            request.id = number
        serve_all(worker, requests, scheduler)
        outcomes.append([request.generated for request in requests])
    assert outcomes[0] == outcomes[1]


def test_requests_that_cannot_be_served_end_refused_and_others_go_on(
    checkpoints: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    requests = [*fresh_requests(), Request(97, [VOCAB], 1), Request(98, [1] * 60, 6), Request(99, [1] * 60, 30)]
    serve_all(worker_of(checkpoints["gpt2"], blocks=20), requests, FirstComeFirstServed(64, 8))
    assert [request.phase for request in requests[-3:]] == [Phase.REFUSED] * 3
    assert requests[-3].refusal == f"request 97: its prompt has tokens outside the vocabulary of {VOCAB}"
    assert "exceed the model's 64 positions" in requests[-2].refusal
    assert "exceed the KV cache, which holds 80 tokens" in requests[-1].refusal
    assert [request.generated for request in requests[:-3]] == expected["gpt2"]


def test_arrivals_are_waited_for(checkpoints: dict[str, Path]) -> None:
    requests = [Request(0, [1, 2], 2), Request(1, [3], 2, arrival_s=0.2)]
    serve_all(worker_of(checkpoints["opt"]), requests, FirstComeFirstServed(64, 8))
    assert requests[1].token_s[0] > 0.2


def test_followers_outlast_a_long_gap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    stage = Stage(config.preset("llama-tiny"), Mesh(tp=2), device="meta")
    monkeypatch.setattr(dist, "new_group", lambda **more: asked.append(more["timeout"]))
    Worker(stage, stage.new_kv(1))
    assert asked[0].days >= 7


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_is_told_to_the_other(dies: int, tmp_path: Path) -> None:
    """By an error of ours, on the rank that decides and on the one that follows."""
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_dying, args=(rank, dies, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode is not None, "hangs"
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"rank {1 - dies} of the engine lost another rank"), said


def _dying(rank: int, dies: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    stage = Stage(config.preset("llama-tiny"), Mesh.make(1, 2))
    loader.random_init(stage, 1)
    worker = Worker(stage, stage.new_kv(20, 4))
    dist.barrier()
    behind_the_barrier = Path(folder, "ready")
    if rank == dies:
        while not behind_the_barrier.exists():
            time.sleep(0.01)
        os._exit(3)
    behind_the_barrier.touch()
    try:
        if rank == 0:
            serve_all(worker, [Request(n, [1, 2, 3], 8) for n in range(4)], FirstComeFirstServed(16, 4))
        else:
            worker.follow()
    except SaihError as error:
        Path(folder, "said").write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize(("tp", "pp"), CUTS)
def test_several_ranks_give_the_tokens_of_one(
    tp: int,
    pp: int,
    checkpoints: dict[str, Path],
    expected: dict[str, list[list[int]]],
    four_ranks: dict[str, list[list[int]]],
) -> None:
    for family in FAMILIES:
        assert four_ranks[f"{family} tp={tp} pp={pp}"] == expected[family], family
    drawn = fresh_requests(DRAWN)
    serve_all(worker_of(checkpoints["llama"]), drawn, FirstComeFirstServed(512, 64))
    assert four_ranks[f"drawn tp={tp} pp={pp}"] == [request.generated for request in drawn]


@pytest.fixture(scope="module")
def four_ranks(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (folder, checkpoints), nprocs=4)
    tokens: dict[str, list[list[int]]] = json.loads((folder / "tokens.json").read_text())
    return tokens


def _rank(rank: int, folder: Path, checkpoints: dict[str, Path]) -> None:
    """Serves every family cut in every way, with a cache so small that requests are preempted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    tokens = {}
    for tp, pp in CUTS:
        mesh = Mesh.make(tp, pp)
        worker_module.FIRST_WORDS = 24 if pp == 2 else 1024  # so few that every step takes a second message
        for name in (*FAMILIES, "drawn"):
            worker = worker_of(checkpoints["llama" if name == "drawn" else name], mesh, blocks=14)
            if rank == 0:
                requests = fresh_requests(DRAWN if name == "drawn" else GREEDY)
                serve_all(worker, requests, FirstComeFirstServed(16, 4))
                tokens[f"{name} tp={tp} pp={pp}"] = [request.generated for request in requests]
            else:
                worker.follow()
    if rank == 0:
        (folder / "tokens.json").write_text(json.dumps(tokens))
    dist.destroy_process_group()
