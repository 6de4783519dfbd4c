"""MixCache and what it competes with: caches of three granularities inside one video's denoising, at equal quality."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Need, Parameter, Params, Rung, TradeOff
from saih.errors import SaihError
from workloads.video import options, shapes

TITLE = "MixCache: step, CFG and block caches in one video denoise, speed at equal quality"
PAPER = "MixCache, arXiv:2508.12691, 2025; no public code: trigger and decision are this project's reading"
CHECK = (
    "the model in parts is the model, and the uncached run the reference, bit for bit; two runs are equal; "
    "quality is measured, not judged"
)
WORK_UNIT = "plain forwards"
"""A video is worth the forwards that plain fewer steps need to be as close to the uncached one."""

OURS = ("step", "cfg", "block", "static-mix", "mixcache")
HOOKED = ("first-block-cache", "pab", "taylorseer", "magcache", "cache-dit")
"""Peers that are hooks inside the model: caches of diffusers, and cache-dit."""
PEERS = ("teacache", "easycache", *HOOKED)
VARIANTS = ("none", "fewer-steps", *OURS, *PEERS)

PARAMETERS = (
    Parameter("model", "toy", "", "toy, random, or a local checkpoint folder in the layout of diffusers"),
    Parameter("family", "wan", "", "whose blocks a model with random weights has", choices=shapes.FAMILIES),
    Parameter("layers", 8, "blocks", "depth of a model with random weights", minimum=3),
    Parameter("width", 96, "numbers", "width of a model with random weights", minimum=12),
    *options.VIDEO,
    Parameter("batch", 1, "videos", "of one request; they are cached together", minimum=1),
    Parameter("variant", "mixcache", "", "none, fewer steps, a cache of ours, or a peer", choices=VARIANTS),
    Parameter("speedup", 2.0, "x", "counted work of `none` over the variant's: sets its knob", minimum=1),
    Parameter("threshold", 0.0, "", "the variant's own knob; 0: the one that gives `speedup`", minimum=0),
    Parameter("forecast", True, "", "our caches follow the line through two full steps; false: plain reuse"),
    Parameter("repair", True, "", "our caches: full steps make good what the step cache got wrong since the last one"),
    Parameter("trigger", True, "", "mixcache's trigger; false: caching from the start to the end"),
    Parameter("penalty", 1.4, "", "mixcache: error is this much dearer with each cached step in a row", minimum=1),
    Parameter("granularity", "all", "", "mixcache: what it may choose from", choices=("all", "step", "cfg", "block")),
    *options.MEASURED,
)

_SIZES = {
    "toy": ("toy", "wan", 8, 96),
    "8x192": ("random", "wan", 8, 192),
    "12x384": ("random", "wan", 12, 384),
    "wan-1.3b": ("random", "wan", 30, 1536),
    "cogvideox-2b": ("random", "cogvideox", 30, 1920),
    "cogvideox-5b": ("random", "cogvideox", 42, 3072),
    "hunyuanvideo": ("random", "hunyuanvideo", 60, 3072),
    "wan-14b": ("random", "wan", 40, 5120),
}
AXES = (
    options.DATA,
    Axis(
        "model",
        "layers x width^2",
        tuple(
            Rung(name, {"model": model, "family": family, "layers": layers, "width": width}, layers * width**2)
            for name, (model, family, layers, width) in _SIZES.items()
        ),
    ),
    Axis("batch", "videos in a request", tuple(Rung(str(size), {"batch": size}, size) for size in (1, 2, 3, 6))),
    Axis(
        "speedup",
        "counted work of none over this",
        tuple(Rung(f"{gain:g}", {"speedup": gain}, gain) for gain in (1.25, 1.5, 2.0, 2.5, 3.0)),
    ),
)
"""All but the toy are the published shapes, or small ones of Wan, with random weights: for speed alone."""


def _over(other: str, speedup: str, target: float, text: str, paper: str = "", bound: float | None = None) -> Claim:
    """Iso-quality gain of MixCache over that of another variant, both set to one speed-up."""
    return Claim(
        f"mixcache-over-{other}-at-{speedup}x",
        text,
        "check_iso_gain",
        {"variant": "mixcache"},
        {"variant": other},
        target=target,
        where={"speedup": speedup},
        paper=paper,
        bound=bound,
    )


TRADE_OFF = TradeOff("psnr_db", "PSNR (dB)", "work_gain", "iso_gain", along="speedup")
NEEDS = {"variant": {"cache-dit": Need("cache_dit", "pip install 'saih[caches]'")}}

_SPEEDUP_PAPER = "1.94x on Wan 14B, 1.97x on HunyuanVideo, at better quality than other caches"

CLAIMS = (
    *(
        _over(
            "fewer-steps",
            speedup,
            1.25,
            f"counted work that fewer steps need for MixCache's PSNR over MixCache's; as good as uncached is {speedup}",
            paper=_SPEEDUP_PAPER,
            bound=float(speedup),
        )
        for speedup in ("1.5", "2")
    ),
    Claim(
        "iso-quality-gain-in-seconds",
        "the same in measured time",
        "work_per_s",
        {"variant": "mixcache"},
        {"variant": "fewer-steps"},
        target=1.1,
        where={"model": "toy"},  # random weights have no quality to gain in
        paper=_SPEEDUP_PAPER,
    ),
    *(
        _over(
            other,
            speedup,
            1.0,
            f"iso-quality gain of MixCache over that of {other} set to the same speed-up"
            + (", both with forecast and repair" if other in OURS else ", which has no repair"),
        )
        for other in ("step", "cfg", "block", "static-mix", *PEERS)
        for speedup in ("1.5", "2")
        if (other, speedup) != ("cfg", "2")  # out of its reach
    ),
    Claim(
        "speed-at-2x",
        "seconds of a video uncached over seconds with MixCache set to half of the work",
        "step_s",
        {"variant": "none"},
        {"variant": "mixcache"},
        target=1.8,
        where={"speedup": "2"},
        paper=_SPEEDUP_PAPER,
        bound=2.0,
    ),
    Claim(
        "likeness-at-2x",
        "SSIM with the uncached video, MixCache set to half of the work",
        "check_ssim",
        {"variant": "mixcache"},
        {"variant": "none"},
        target=0.96,
        where={"speedup": "2"},
    ),
    Claim(
        "alignment-at-2x",
        "share of the prompts' words that a probe reads in the videos, MixCache set to half of the work over uncached",
        "check_alignment",
        {"variant": "mixcache"},
        {"variant": "none"},
        target=0.98,
        where={"speedup": "2"},
    ),
    Claim(
        "forecast-pays",
        "iso-quality gain of MixCache with forecasts over plain reuse",
        "check_iso_gain",
        {"forecast": "True"},
        {"forecast": "False"},
        target=1.0,
    ),
    Claim(
        "repair-pays",
        "iso-quality gain of MixCache, and of a step cache in a fixed rhythm, with repair of cached steps over without",
        "check_iso_gain",
        {"repair": "True"},
        {"repair": "False"},
        target=1.0,
    ),
    *(
        Claim(
            f"mixing-over-{alone}-alone",
            f"iso-quality gain of MixCache choosing among all granularities over choosing when to use {alone} alone",
            "check_iso_gain",
            {"granularity": "all"},
            {"granularity": alone},
            target=1.0,
        )
        for alone in ("step", "cfg", "block")
    ),
    Claim(
        "trigger-pays",
        "iso-quality gain of MixCache with its trigger over without",
        "check_iso_gain",
        {"trigger": "True"},
        {"trigger": "False"},
        target=1.0,
    ),
    Claim(
        "penalty-pays",
        "iso-quality gain of MixCache with the penalty of repetition over without",
        "check_iso_gain",
        {"penalty": "1.4"},
        {"penalty": "1.0"},
        target=1.0,
    ),
)


def shape(params: Params) -> shapes.DiT:
    """The transformer of these parameters. Raises SaihError for a folder that is no checkpoint."""
    model, layers, width = str(params["model"]), int(params["layers"]), int(params["width"])
    dit = options.shape(model, layers, width, str(params["family"]))
    if model == "toy" and (layers, width) != (dit.layers, dit.width):
        raise SaihError(f"the toy has {dit.layers} layers of width {dit.width}; model=random takes others")
    return dit


def cost(params: Params) -> Cost:
    """One video on one rank."""
    dit, steps = shape(params), int(params["denoise_steps"])
    _check_reach(params, dit)
    gain = 1.0 if params["variant"] == "none" else float(params["speedup"])
    plain = float(options.branches(params, dit) * steps)
    batch, videos = int(params["batch"]), int(params["videos"])
    if videos % batch:
        raise SaihError(f"{videos} videos are not a whole number of batches of {batch}")
    requests = videos // batch if params["model"] != "random" else 1
    return options.cost(params, [(dit, plain / gain)], work=plain, check_steps=requests + 2)


def _check_reach(params: Params, dit: shapes.DiT) -> None:
    """A single cache cannot save more than what it leaves out of every step it may be used in."""
    alone = params["granularity"] if params["variant"] == "mixcache" else params["variant"]
    if alone == "cfg" and options.branches(params, dit) == 1:
        raise SaihError(
            "the cfg cache needs a second branch: guidance above 1, in a family that does not take it as an input"
        )
    saved = {"cfg": 0.5, "block": 1 - 2 / dit.layers}.get(str(params["variant"]))
    wanted = 1 - 1 / float(params["speedup"])
    most = None if saved is None else saved * (1 - WARMUP - TAIL) * (MOST - 1) / MOST
    if most is not None and wanted > most and not params["threshold"]:
        reach = 1 / (1 - most)
        raise SaihError(f"the {params['variant']} cache alone reaches {reach:.2f}x here, not {params['speedup']}x")


WARMUP, TAIL, MOST = 0.1, 0.06, 8
"""Of all our caches, as shares of the steps: full steps at the start and the end, for MixCache at the least; and of
those in a fixed rhythm: a full step at least this often."""
