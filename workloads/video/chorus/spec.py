"""Chorus and what it competes with: a server that begins a video from the latents of a similar earlier request."""

from __future__ import annotations

from dataclasses import replace

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.video import options, shapes
from workloads.video.chorus.stages import Reuse

TITLE = "Chorus: latents shared between similar requests, throughput and what it costs in alignment"
PAPER = (
    "Chorus, arXiv:2604.04451, 2026; no public code: boundaries, regions and amplification are this project's reading"
)
CHECK = (
    "what is computed in full is the plain loop's, bit for bit; a request resumed from itself gives itself; "
    "serving again gives the same videos"
)
WORK_UNIT = "requests"

STORED = ("nirvana", "chorus-stage1", "chorus")
VARIANTS = ("none", "intra-request", *STORED)
BANDS = (0.75, 0.85, 0.95, 1.0)
"""Where bands of similarity end."""

SKIPS_ONE_OF_FOUR = "0.8"
"""Threshold of TeaCache: between the first change of modulation in four steps (0.48) and the first two (1.09)."""

PARAMETERS = (
    Parameter("model", "toy-4step", "", "toy-4step, toy, random, or a local checkpoint folder"),
    Parameter("layers", 8, "blocks", "depth of a model with random weights", minimum=3),
    Parameter("width", 96, "numbers", "width of a model with random weights", minimum=12),
    *(
        replace(each, default={"denoise_steps": 4, "guidance": 1.0}.get(each.name, each.default))
        for each in options.VIDEO
    ),
    Parameter("variant", "chorus", "", "how requests are served", choices=VARIANTS),
    Parameter(
        "requests", 200, "requests", "of a trace; a step serves one trace, beginning with nothing stored", minimum=2
    ),
    Parameter(
        "similar", 0.9, "", "share of requests that vary an earlier one by a word; the rest is unlike all", minimum=0
    ),
    Parameter("topics", 24, "topics", "that similar requests are about", minimum=1),
    Parameter("zipf", 1.0, "", "topic k is as popular as k to minus this", minimum=0),
    Parameter("repeats", 0.0, "", "share of requests that repeat an earlier one, noise and all", minimum=0),
    Parameter("load", 0.9, "", "arrivals in the time of a plain request, for latencies in the queue", minimum=0.01),
    Parameter("store_mb", 64.0, "MB", "bound on what is stored", minimum=0),
    Parameter("eviction", "lru", "", "which entry makes room", choices=("lru", "lcbfu")),
    Parameter("threshold", 0.75, "", "cosine of prompts from which a request is a hit; nirvana has its own", minimum=0),
    Parameter("region", 0.25, "", "chorus: share of the video tokens that stage 2 denoises", minimum=0.01),
    Parameter(
        "amplification", 4.0, "", "chorus: lambda of changed words at the start of stage 2; 1 for none", minimum=1
    ),
    Parameter(
        "teacache",
        0.1,
        "",
        "intra-request: threshold of TeaCache; 0.1 halves the work of the toy's 50 steps",
        minimum=0,
    ),
    *(each for each in options.MEASURED if each.name not in ("videos", "lpips")),
)

_SIZES = {
    "toy-4step": ("toy-4step", 8, 96, 4, 1.0),
    "toy-50step": ("toy", 8, 96, 50, 5.0),
    "wan-1.3b": ("random", 30, 1536, 4, 1.0),
    "wan-14b": ("random", 40, 5120, 4, 1.0),
}
_SETS = ("model", "layers", "width", "denoise_steps", "guidance")

AXES = (
    Axis(
        "data",
        "requests",
        tuple(Rung(str(count), {"requests": count}, count) for count in (25, 50, 100, 200, 400)),
    ),
    Axis(
        "model",
        "layers x width^2 x steps x branches",
        tuple(
            Rung(
                name,
                dict(zip(_SETS, each, strict=True)),
                each[1] * each[2] ** 2 * each[3] * (2 if each[4] > 1 else 1),
            )
            for name, each in _SIZES.items()
        ),
    ),
    Axis(
        "similar",
        "share of requests",
        tuple(Rung(f"{share:g}", {"similar": share}, share) for share in (0.0, 0.25, 0.5, 0.75, 0.9)),
    ),
    Axis(
        "store_mb",
        "MB",
        tuple(Rung(f"{size:g}", {"store_mb": size}, size) for size in (1.0, 2.0, 4.0, 16.0, 64.0)),
    ),
)
"""wan-* are Wan's shapes with random weights, for speed alone: alignment means something on the toys."""


def _per_second(name: str, top: str, bottom: str, model: str, target: float, text: str, paper: str = "") -> Claim:
    sides = {"variant": top}, {"variant": bottom}
    return Claim(name, text, "work_per_s", *sides, target=target, where={"model": model}, paper=paper)


def _kept(name: str, metric: str, top: str, bottom: str, model: str, target: float, text: str) -> Claim:
    sides = {"variant": top}, {"variant": bottom}
    return Claim(name, text, f"check_{metric}", *sides, target=target, where={"model": model})


CLAIMS = (
    _per_second(
        "throughput-at-4-steps",
        "chorus",
        "none",
        "toy-4step",
        1.3,
        "requests/s of Chorus over none, a 4-step model and no prompt asked twice, look-ups included",
        "up to 45 % faster on industrial 4-step models",
    ),
    Claim(
        "intra-request-gains-nothing-at-4-steps",
        "requests/s of a cache inside the request over none, at the setting that halves the work of 50 steps",
        "work_per_s",
        {"variant": "intra-request"},
        {"variant": "none"},
        target=1.1,
        better="lower",
        where={"model": "toy-4step"},
        paper="caches inside a request do nothing on 4-step models",
    ),
    Claim(
        "a-step-skipped-inside-the-request-is-seen",
        "share of the prompts' words that a probe reads in the videos, a cache inside the request set to skip one step "
        "of four over none",
        "check_alignment",
        {"variant": "intra-request"},
        {"variant": "none"},
        target=0.95,
        where={"teacache": SKIPS_ONE_OF_FOUR},
    ),
    Claim(
        "a-step-skipped-inside-the-request-gains-nothing",
        "requests/s of that cache over none",
        "work_per_s",
        {"variant": "intra-request"},
        {"variant": "none"},
        target=1.1,
        better="lower",
        where={"teacache": SKIPS_ONE_OF_FOUR},
        paper="caches inside a request do nothing on 4-step models",
    ),
    Claim(
        "over-a-step-skipped-inside-the-request",
        "requests/s of Chorus over a cache inside the request set to skip one step of four",
        "work_per_s",
        {"variant": "chorus"},
        {"variant": "intra-request"},
        target=1.0,
        where={"teacache": SKIPS_ONE_OF_FOUR},
    ),
    _per_second(
        "over-stage-1-alone",
        "chorus",
        "chorus-stage1",
        "toy-4step",
        1.0,
        "requests/s of Chorus over resuming at the same step without selective regions",
    ),
    _per_second("over-nirvana", "chorus", "nirvana", "toy-4step", 1.0, "requests/s of Chorus over NIRVANA's table"),
    _per_second(
        "throughput-at-50-steps",
        "chorus",
        "none",
        "toy-50step",
        1.3,
        "requests/s of Chorus over none at 50 guided steps",
        "up to 3.58x end to end on vanilla 50-step models",
    ),
    _kept(
        "alignment-kept-at-4-steps",
        "alignment",
        "chorus",
        "none",
        "toy-4step",
        0.95,
        "share of the prompts' words that a probe reads from the videos, Chorus over none",
    ),
    _kept(
        "changed-words-shown-at-4-steps",
        "changed_alignment",
        "chorus",
        "none",
        "toy-4step",
        0.9,
        "the same of the words that differ from the similar request's, Chorus over none",
    ),
    _kept(
        "latency-p95-at-4-steps",
        "latency_p95",
        "none",
        "chorus",
        "toy-4step",
        1.3,
        "95th percentile of the latency in the queue by counted work, none over Chorus",
    ),
    Claim(
        "overhead-without-similar-prompts",
        "share of the time that looking up and storing take on a trace without similar prompts; what watching "
        "attention adds to a step counts as the step's",
        "share_other",
        {"variant": "chorus"},
        {},
        target=0.02,
        better="lower",
        where={"similar": "0"},
    ),
    Claim(
        "amplification-pays",
        "share of changed words that the probe reads, with attention amplified 16 times over without",
        "check_changed_alignment",
        {"amplification": "16.0"},
        {"amplification": "1.0"},
        target=1.0,
    ),
    Claim(
        "lcbfu-over-lru",
        "hit rate with eviction by saved work over eviction by last use, in a store of 1 MB",
        "check_hit_rate",
        {"eviction": "lcbfu"},
        {"eviction": "lru"},
        target=1.0,
    ),
)

ONE_WORD = 6 / 7
"""Similarity that planning expects of prompts that differ in one of the toy's seven words."""


def shape(params: Params) -> shapes.DiT:
    """The transformer of these parameters. Raises SaihError for a folder that is no checkpoint."""
    model, layers, width = str(params["model"]), int(params["layers"]), int(params["width"])
    dit = options.shape(model, layers, width)
    if model in shapes.TOYS and (layers, width) != (dit.layers, dit.width):
        raise SaihError(f"{model} has {dit.layers} layers of width {dit.width}; model=random takes others")
    return dit


def reuse(params: Params) -> Reuse | None:
    """How the variant uses its store; None for variants without one."""
    variant = str(params["variant"])
    if variant not in STORED:
        return None
    return Reuse(
        variant == "nirvana",
        variant == "chorus",
        float(params["threshold"]),
        float(params["region"]),
        float(params["amplification"]),
    )


def cost(params: Params) -> Cost:
    """One trace on one rank. Requests about a topic are taken for hits a word away, all but the first of each."""
    for name in ("similar", "repeats", "threshold", "region"):
        if float(params[name]) > 1:
            raise SaihError(f"{name} is a share: at most 1, not {params[name]}")
    requests, steps = int(params["requests"]), int(params["denoise_steps"])
    similar, repeats = float(params["similar"]), float(params["repeats"])
    branches, used = options.branches(params, shape(params)), reuse(params)
    hits = max(0.0, similar - min(int(params["topics"]) / requests, similar)) * (1 - repeats)
    work = float(steps)
    if used is not None:
        work = hits * used.work(ONE_WORD, steps) + (1 - hits - repeats) * steps
    one = options.cost(params, [(shape(params), branches * work)], 1.0, check_steps=1.0)
    kernels = [Operation(requests * each.flop, requests * each.moved_bytes) for each in one.operations]
    return replace(one, flop=requests * one.flop, work=float(requests), operations=tuple(kernels))
