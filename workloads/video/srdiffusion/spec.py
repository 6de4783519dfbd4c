"""SRDiffusion and what it competes with: a large and a small model share the steps of one video."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.video import options, pair, shapes

TITLE = "SRDiffusion: a large model sketches a video, a small one renders it, against the large one alone"
PAPER = "SRDiffusion, arXiv:2505.19151, 2025; the switch rule as a public port states it, on steps rather than forwards"
CHECK = (
    "the models in parts are the models, and the large one alone the reference, bit for bit; two runs are equal; "
    "quality is measured, not judged"
)
WORK_UNIT = "large forwards"
"""Counted work: a forward of the small model is as much of one as its FLOP are."""

VARIANTS = ("large", "small", "fewer-steps", "fixed-switch", "reversed", "srdiffusion", "srdiffusion+cache")
ADAPTIVE = ("srdiffusion", "srdiffusion+cache")

PARAMETERS = (
    Parameter("model", "toy", "", "the large model: toy, random, or a checkpoint folder in the layout of diffusers"),
    Parameter("small", "", "", "the small model, likewise; empty: the small one of the toys, or random weights"),
    Parameter("layers", 8, "blocks", "depth of a large model with random weights", minimum=1),
    Parameter("width", 96, "numbers", "width of a large model with random weights", minimum=12),
    Parameter("small_layers", 2, "blocks", "depth of a small model with random weights", minimum=1),
    Parameter("small_width", 96, "numbers", "width of a small model with random weights", minimum=12),
    *options.VIDEO,
    Parameter("batch", 1, "videos", "of one request; they switch together", minimum=1),
    Parameter("variant", "srdiffusion", "", "who takes which steps", choices=VARIANTS),
    Parameter("switch_step", 15, "steps", "of the large model, where fixed; sets the work of fewer-steps", minimum=0),
    Parameter("threshold", 0.01, "", "adaptive: switch once the change of predictions falls by less", minimum=0),
    Parameter("falls", 1, "steps", "adaptive: whose mean fall is meant; 1 is the paper's rule", minimum=1),
    Parameter("min_switch", 5, "steps", "adaptive: of the large model at the least", minimum=1),
    Parameter("max_switch", 30, "steps", "adaptive: of the large model at the most", minimum=1),
    *options.MEASURED,
)

_PAIRS = {
    "toy": ("toy", 8, 96, 2, 96),
    "8x192": ("random", 8, 192, 4, 120),
    "12x384": ("random", 12, 384, 6, 240),
    "cogvideox": ("random", 42, 3072, 30, 1920),
    "wan": ("random", 40, 5120, 30, 1536),
}
_SIZES = ("model", "layers", "width", "small_layers", "small_width")

AXES = (
    options.DATA,
    Axis(
        "model",
        "layers x width^2 of the large one",
        tuple(
            Rung(name, dict(zip(_SIZES, sizes, strict=True)), sizes[1] * sizes[2] ** 2)
            for name, sizes in _PAIRS.items()
        ),
    ),
    Axis(
        "switch_step",
        "steps of the large model",
        tuple(Rung(str(step), {"switch_step": step}, step) for step in (0, 5, 10, 15, 20, 25, 30, 40)),
    ),
)
"""wan is 14B and 1.3B, cogvideox has the layers and widths of 5B and 2B in Wan's blocks; both are random weights, for
speed alone: quality means something on the toy and on checkpoints."""

_PAPER = "more than 3x on Wan 14B and 1.3B, 2x on CogVideoX 5B and 2B, nearly no loss of VBench"
_BOUND = "1/(f+(1-f)r) gives both at a switch after f = 21 % of the steps: r = 0.16 for Wan, 0.37 for CogVideoX"

_TOY_SHARE = shapes.TOYS["toy-small"].forward_flop((8, 24, 24)) / shapes.TOYS["toy"].forward_flop((8, 24, 24))


LIKENESS = 0.96
"""SSIM with the large model's videos below which a switch came too early."""


def _claim(name: str, text: str, metric: str, top: str, bottom: str, target: float, **more: object) -> Claim:
    return Claim(name, text, metric, {"variant": top}, {"variant": bottom}, target, **more)  # type: ignore[arg-type]


CLAIMS = (
    _claim(
        "speed-over-large",
        "seconds of the large model alone over seconds of SRDiffusion",
        "step_s",
        "large",
        "srdiffusion",
        2.0,
        paper=f"{_PAPER}; {_BOUND}",
        bound=1 / (0.23 + 0.77 * _TOY_SHARE),  # of the study, whose two switches come after 11 and 12 of 50 steps
    ),
    _claim(
        "likeness", "SSIM of SRDiffusion with the large model's videos", "check_ssim", "srdiffusion", "large", LIKENESS
    ),
    _claim(
        "alignment",
        "share of the prompts' words that a probe reads in the videos, SRDiffusion over the large model",
        "check_alignment",
        "srdiffusion",
        "large",
        0.98,
    ),
    _claim(
        "gain-is-predicted",
        "measured gain over 1/(f+(1-f)r), f the large model's share of steps and r its small one's of FLOP",
        "work_per_s",
        "srdiffusion",
        "large",
        0.85,
    ),
    _claim(
        "gain-is-not-more-than-predicted",
        "the same from above",
        "work_per_s",
        "srdiffusion",
        "large",
        1.15,
        better="lower",
    ),
    _claim(
        "small-model-is-as-fast-as-counted",
        "r by FLOP over r by seconds, the small model alone against the large one alone",
        "work_per_s",
        "small",
        "large",
        0.85,
    ),
    Claim(
        "adaptive-is-as-good-as-the-best-fixed-switch",
        f"work of the earliest fixed switch with an SSIM of {LIKENESS}, chosen with hindsight, over SRDiffusion's",
        "check_best_switch_gain",
        {"variant": "srdiffusion"},
        {},
        target=0.95,
    ),
    _claim(
        "iso-quality-gain",
        "work that fewer steps of the large model need for the same PSNR over SRDiffusion's",
        "check_iso_gain",
        "srdiffusion",
        "fewer-steps",
        1.0,
    ),
    _claim(
        "sketch-first",
        "SSIM of large before small over small before large, at the same work",
        "check_ssim",
        "fixed-switch",
        "reversed",
        1.0,
    ),
    _claim("sketch-pays", "SSIM of SRDiffusion over the small model alone", "check_ssim", "srdiffusion", "small", 1.0),
    _claim(
        "cache-adds-speed",
        "seconds of SRDiffusion over seconds with a step cache after the switch",
        "step_s",
        "srdiffusion",
        "srdiffusion+cache",
        1.1,
        paper="orthogonal to caching, without a figure",
    ),
    _claim(
        "cache-keeps-likeness",
        "SSIM with a step cache after the switch over SSIM without",
        "check_ssim",
        "srdiffusion+cache",
        "srdiffusion",
        0.99,
    ),
)


def shape_of_large(params: Params) -> shapes.DiT:
    """Raises SaihError for a folder that is no checkpoint, or for a toy of another size than the shipped one."""
    return _sized(str(params["model"]), int(params["layers"]), int(params["width"]))


def shape_of_small(params: Params) -> shapes.DiT:
    """Raises SaihError likewise, and for a model that cannot go on with the large one's videos."""
    large, name = str(params["model"]), small(params)
    dit = _sized(name, int(params["small_layers"]), int(params["small_width"]))
    if large != "random":
        pair.check(options.folder(large), options.folder(name))
    return dit


def _sized(name: str, layers: int, width: int) -> shapes.DiT:
    dit = options.shape(name, layers, width)
    if name in shapes.TOYS and (layers, width) != (dit.layers, dit.width):
        raise SaihError(f"{name} has {dit.layers} layers of width {dit.width}; model=random takes others")
    return dit


def small(params: Params) -> str:
    """Name of the small model. Raises SaihError where none is given and none goes with the large one."""
    model, name = str(params["model"]), str(params["small"])
    usual = {"toy": "toy-small", "toy-small": "toy-small", "random": "random"}
    if not name and model not in usual:
        raise SaihError(f"small: name the folder of the small model that goes with {model}")
    name = name or usual[model]
    if (name == "random") != (model == "random"):
        raise SaihError(f"model {model} and small {name}: random weights go with random weights only")
    return name


def small_share(params: Params) -> float:
    """Work of a forward of the small model over the large one's."""
    size = options.grid(params)
    return shape_of_small(params).forward_flop(size) / shape_of_large(params).forward_flop(size)


def plain_steps(params: Params) -> int:
    """Steps of the large model alone: all, or as many as cost what a switch at `switch_step` does."""
    steps = int(params["denoise_steps"])
    if params["variant"] != "fewer-steps":
        return steps
    switch = min(steps, int(params["switch_step"]))
    return max(1, round(switch + (steps - switch) * small_share(params)))


def cost(params: Params) -> Cost:
    """One request on one rank. An adaptive switch is taken to come after `switch_step`."""
    variant, steps = str(params["variant"]), int(params["denoise_steps"])
    if int(params["min_switch"]) > int(params["max_switch"]):
        raise SaihError(f"min_switch {params['min_switch']} is more than max_switch {params['max_switch']}")
    sketched = {"large": steps, "small": 0, "fewer-steps": plain_steps(params)}.get(
        variant, min(steps, int(params["switch_step"]))
    )
    rendered = 0.0 if variant == "fewer-steps" else steps - sketched
    if variant == "srdiffusion+cache":
        rendered /= 2
    large, small_one = shape_of_large(params), shape_of_small(params)
    branches = options.branches(params, large)
    models = [(large, float(branches * sketched)), (small_one, float(branches * rendered))]
    videos, batch = int(params["videos"]), int(params["batch"])
    if videos % batch:
        raise SaihError(f"{videos} videos are not a whole number of batches of {batch}")
    work = branches * (sketched + rendered * small_share(params))
    return options.cost(params, models, work, check_steps=videos // batch + 2)
