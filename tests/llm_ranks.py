"""What the ranks of the transformer tests run. Started as processes of their own, so it imports no transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from workloads.llm.attention import AttnMeta
from workloads.llm.config import from_hf
from workloads.llm.kv import PagedKV
from workloads.llm.loader import load, source_name
from workloads.llm.model import Stage
from workloads.llm.shard import Mesh

LENGTHS = (1, 11, 6, 16)
STAGES = (1, 2, 4)
BACKENDS = ("padded", "loop")
LAYOUTS = {"padded": "block_first", "loop": "layer_first"}
BLOCK = 4


def ids_of(vocab: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


class Pipeline:
    """All stages of a model one after the other, in one process a tensor-parallel rank."""

    def __init__(
        self, folder: Path, backend: str, pp: int, tp: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        self.spec = from_hf(folder)
        rank = dist.get_rank(group) if tp > 1 else 0
        meshes = [Mesh(tp, pp, rank, stage, group) for stage in range(pp)]
        self.stages = [Stage(self.spec, mesh, attention=backend) for mesh in meshes]
        for stage in self.stages:
            load(stage, folder)

    def __call__(
        self, ids: Tensor, meta: AttnMeta, caches: list[PagedKV] | None = None, rows: Tensor | None = None
    ) -> Tensor:
        x = ids
        for stage, kv in zip(self.stages, caches or [None] * len(self.stages), strict=True):
            x = stage(x, meta, kv, rows if stage.last else None)
        return x


def errors_of(pipeline: Pipeline, backend: str, wanted: list[Tensor]) -> dict[str, float]:
    """Largest deviation from the logits wanted: packed rows, padded rows, chosen rows, chunks through the cache."""
    spec, ids = pipeline.spec, ids_of(pipeline.spec.vocab)
    whole = torch.cat(wanted)
    meta = AttnMeta.packed(LENGTHS, causal=spec.causal)
    found = {"packed": _far(pipeline(torch.cat(ids), meta), whole)}
    found["last"] = _far(
        pipeline(torch.cat(ids), meta, rows=meta.last_rows), torch.stack([each[-1] for each in wanted])
    )
    found["padded"] = _far(_padded(pipeline, ids), whole)
    if spec.causal:
        found["cached"] = _far(_chunked(pipeline, ids, LAYOUTS[backend]), whole)
    return found


def _far(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()


def _padded(pipeline: Pipeline, ids: list[Tensor]) -> Tensor:
    filled = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=3).flatten()
    meta = AttnMeta.padded(LENGTHS, causal=pipeline.spec.causal)
    logits = pipeline(filled, meta).unflatten(0, (len(ids), -1))
    last = pipeline(filled, meta, rows=meta.last_rows)
    rows = [each[: len(one)] for each, one in zip(logits, ids, strict=True)]
    torch.testing.assert_close(last, torch.stack([each[-1] for each in rows]), atol=1e-5, rtol=0)
    return torch.cat(rows)


def _chunked(pipeline: Pipeline, ids: list[Tensor], layout: str) -> Tensor:
    """Every sequence in chunks of its own size, then token by token, all through one paged cache."""
    blocks = [-(-length // BLOCK) for length in LENGTHS]
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).tolist()
    tables = [order[sum(blocks[:i]) : sum(blocks[: i + 1])] for i in range(len(blocks))]
    caches = [stage.new_kv(sum(blocks), BLOCK, layout=layout) for stage in pipeline.stages]
    found: list[list[Tensor]] = [[] for _ in ids]
    for step in _steps():
        now = [(b, a, z) for b, (a, z) in enumerate(step) if z > a]
        meta = AttnMeta.packed(
            [z - a for _, a, z in now],
            starts=[a for _, a, _ in now],
            block_tables=[tables[b] for b, _, _ in now],
            block_size=BLOCK,
        )
        logits = pipeline(torch.cat([ids[b][a:z] for b, a, z in now]), meta, caches)
        for (b, _, _), part in zip(now, logits.split([z - a for _, a, z in now]), strict=True):
            found[b].append(part)
    return torch.cat([torch.cat(each) for each in found])


def _steps() -> Iterator[list[tuple[int, int]]]:
    """[from, to) of every sequence in each step: a short prefill, a longer chunk, two decode steps, the rest."""
    edges = [0, 3, 9, 10, 11, max(LENGTHS)]
    for a, z in pairwise(edges):
        yield [(min(a, length), min(z, length)) for length in LENGTHS]


def gradients_of(pipeline: Pipeline) -> dict[str, Tensor]:
    """Tensor of the whole model -> gradient of the mean next-token loss, where this rank holds it; zeros elsewhere."""
    spec, ids = pipeline.spec, torch.cat(ids_of(pipeline.spec.vocab))
    F.cross_entropy(pipeline(ids, AttnMeta.packed(LENGTHS, causal=spec.causal)), ids.flip(0)).backward()
    found: dict[str, Tensor] = {}
    for stage in pipeline.stages:
        for piece in stage.pieces():
            assert piece.parameter.grad is not None, piece.name
            whole = found.setdefault(source_name(spec, piece.name), torch.zeros(piece.shape))
            whole[piece.index] += piece.parameter.grad[piece.rows]
    return found


def four_ranks(rank: int, port: int, folders: dict[str, str], trained: list[str], out: str) -> None:
    """tp=2 x pp=2 in four processes, once through a real grid; then each pair of ranks takes half of the families."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=4)
    mesh = Mesh.make(2, 2)
    with torch.inference_mode():
        grid(mesh, folders["qwen3"], Path(out) / f"grid{rank}.json")
    for family in list(folders)[mesh.pp_rank :: 2]:
        tensor_parallel(mesh, family, Path(folders[family]), family in trained, Path(out))
    dist.destroy_process_group()


def tensor_parallel(mesh: Mesh, family: str, folder: Path, trained: bool, out: Path) -> None:
    """tp=2: a family in every number of stages and with every backend, and its gradients, written by each rank."""
    found = {}
    wanted = torch.load(folder / "logits.pt", weights_only=True)
    for pp in STAGES:
        for backend in BACKENDS:
            with torch.inference_mode():
                pipeline = Pipeline(folder, backend, pp, 2, mesh.tp_group)
                found[f"pp={pp} {backend}"] = errors_of(pipeline, backend, wanted)
    (out / f"{family}{mesh.tp_rank}.json").write_text(json.dumps(found))
    if trained:
        pipeline = Pipeline(folder, "padded", 1, 2, mesh.tp_group)
        pieces = pipeline.stages[0].pieces()
        cut = [source_name(pipeline.spec, piece.name) for piece in pieces if piece.target.shape != piece.shape]
        torch.save([gradients_of(pipeline), cut], out / f"{family}{mesh.tp_rank}.pt")


def grid(mesh: Mesh, folder: str, out: Path) -> None:
    """Each rank makes its stage from its mesh; hidden states go from stage to stage."""
    spec = from_hf(folder)
    stage = Stage(spec, mesh)
    load(stage, folder)
    meta = AttnMeta.packed(LENGTHS, causal=spec.causal)
    if stage.first:
        dist.send(stage(torch.cat(ids_of(spec.vocab)), meta), group=mesh.pp_group, group_dst=1)
        return
    h_TD = torch.empty(sum(LENGTHS), spec.hidden)
    dist.recv(h_TD, group=mesh.pp_group, group_src=0)
    wanted = torch.load(Path(folder) / "logits.pt", weights_only=True)
    out.write_text(json.dumps([_far(stage(h_TD, meta), torch.cat(wanted)), mesh.tp_rank, list(stage.range)]))
