"""What the ranks of the PipeMax tests run. Started as processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from saih.core import Context, Place, Point
from saih.timing import Unclocked
from workloads.llm.pipemax import bench

STAGES = 3
CASES = [
    {"variant": "td-pipe"},
    {"variant": "pp-resident"},
    {"variant": "pipemax"},
    {"variant": "pipemax", "layout": "layer_first", "order": "fifo"},
    {"variant": "pipemax", "time": "real"},
    {"variant": "pipemax-static"},
]


def name(case: dict[str, Any]) -> str:
    return " ".join(map(str, case.values()))


def made(params: dict[str, Any], rank: int, ranks: int) -> Any:
    """The bench of a small model on this rank."""
    tiny = {"shape": "llama-tiny", "layers": STAGES, "requests": 30, "shrink": 16, "kv_tokens": 320, "stages": STAGES}
    point = Point("pipemax", params | tiny | {"gpus": ranks}, seed=4)
    return bench.setup(point, Context(Place(rank, rank, ranks), "cpu", "/nowhere"))


def pipeline(rank: int, folder: str, params: dict[str, Any]) -> None:
    """Every case, checked; the first rank writes the tokens and the numbers."""
    torch.set_num_threads(1)
    bench.REPEATS, bench.SWEEP = 1, bench.SWEEP[::4]  # how well steps are known is nothing to the tokens
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=STAGES)
    found = {}
    for case in CASES:
        stage = made(params | case, rank, STAGES)
        stage.step(Unclocked())
        check = stage.check()
        decoded = stage._decode()
        if decoded is not None:
            tokens = [each.generated for each in decoded[1]]
            found[name(case)] = {"passed": check.passed, "numbers": check.numbers, "tokens": tokens, "why": check.why}
            found[name(case)]["notes"] = check.notes
    if found:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
