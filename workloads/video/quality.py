"""How close a video is to another: PSNR and SSIM over pixels in [0, 1], and LPIPS where its weights are on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saih.errors import SaihError

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def psnr_db(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio over all pixels of all frames; infinite for equal videos. Any equal shapes."""
    error = float((video.double() - reference.double()).square().mean())
    return 10 * math.log10(1 / error) if error else math.inf


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, mean over frames and channels.

    Shapes [..., H, W]; frames smaller than the window take the largest odd window that fits.
    """
    height, width = video.shape[-2:]
    side = min(SSIM_WINDOW, height - 1 + height % 2, width - 1 + width % 2)
    place = torch.arange(side, dtype=torch.float64) - side // 2
    bell = torch.exp(-0.5 * (place / SSIM_SIGMA) ** 2)
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def local(values: Tensor) -> Tensor:
        return nn.functional.conv2d(values.reshape(-1, 1, height, width), window)

    x, y = video.double().cpu(), reference.double().cpu()
    mean_x, mean_y = local(x), local(y)
    var_x, var_y, cov = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + SSIM_C1) * (2 * cov + SSIM_C2)
    return float((likeness / ((mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2))).mean())


LPIPS_SIDE = 64
"""Pixels that a frame needs for the strides of LPIPS's network."""


class Lpips:
    """LPIPS (Zhang et al., CVPR 2018) by the lpips package, AlexNet, with weights from a local file.

    Args:
        weights: the state dict of `lpips.LPIPS(net="alex")`, saved by torch on a machine with a network.

    Raises:
        SaihError: the package is missing, or the file holds no such weights.
    """

    def __init__(self, weights: Path) -> None:
        try:
            from lpips import LPIPS
        except ImportError as error:
            raise SaihError(
                f"lpips={weights} needs the lpips package ({error}): pip install lpips torchvision"
            ) from None
        self.network: Any = LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).eval()
        try:
            self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise SaihError(f"lpips: {weights} holds no state dict of lpips.LPIPS(net='alex') ({first})") from None

    @torch.no_grad()
    def distance(self, video: Tensor, reference: Tensor) -> float:
        """Mean over frames, of pixels in [0, 1], [frames, 1 or 3 channels, rows, columns]; 0 for equal videos.

        Raises SaihError for frames too small for the network.
        """
        if min(video.shape[-2:]) < LPIPS_SIDE:
            raise SaihError(
                f"lpips: frames of {video.shape[-2]} x {video.shape[-1]} pixels; it needs {LPIPS_SIDE} at least"
            )
        one, other = (2 * pixels.float().cpu().expand(-1, 3, -1, -1) - 1 for pixels in (video, reference))
        return float(self.network(one, other).mean())
