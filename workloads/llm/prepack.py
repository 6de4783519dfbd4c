"""Matrices laid out for oneDNN, once, before a stage infers on a CPU. (Packed *rows* are another thing: `AttnMeta`.)

torch multiplies fp32 matrices by MKL, which takes a generic path on processors that are not Intel's, and lays a matrix
out anew in every call. oneDNN takes the widest vectors there are, and keeps the layout it is given.

The two operators behind it, `torch.ops.mkldnn._reorder_linear_weight` and `_linear_pointwise` (`shard.multiply`), are
those of torch's own compiler and private to it: tested with torch 2.13. A torch without them is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saih.errors import SaihError
from workloads.llm.model import Stage
from workloads.llm.shard import ColumnLinear, RowLinear, VocabMatrix

ROWS = 16
"""The layout is the best one for so many rows: it serves a decode step of any size, and a prefill as well."""
SMALLEST = 1 << 18
"""Numbers of the smallest matrix laid out: a call takes 25 us beside the arithmetic. Between two that were timed
(a core of a Xeon, torch 2.13, fp32, 40 rows): 256 x 512 took 111 us as it is and 128 us laid out, 512 x 1408 761 us and
594 us."""
OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")


def prepack(stage: Stage) -> None:
    """Replaces the larger matrices of a loaded stage on a CPU; from then on it only infers: nothing can be loaded.

    The matrix that gives logits is copied, for an embedding may look it up by rows. Results differ in rounding.
    Raises SaihError for a stage on another device and where torch was built without oneDNN or has other operators.
    """
    if stage.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise SaihError(f"matrices can be prepacked on a CPU with oneDNN only, not on {stage.device}")
    lacking = [name for name in OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if lacking:
        raise SaihError(
            f"torch {torch.__version__} lacks mkldnn.{', mkldnn.'.join(lacking)}, which prepacked matrices need; "
            "use torch 2.13, or plain matrices"
        )
    for module in stage.modules():
        if not isinstance(module, ColumnLinear | RowLinear | VocabMatrix) or module.weight.numel() < SMALLEST:
            continue
        if not isinstance(module, VocabMatrix):
            module.weight = nn.Parameter(_laid_out(module.weight), requires_grad=False)
        elif stage.last:
            module.prepacked = _laid_out(module.weight)


def _laid_out(weight_OD: Tensor) -> Tensor:
    weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OD.detach(), ROWS)
    return weight
