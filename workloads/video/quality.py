"""How close a video is to another: PSNR and SSIM over pixels in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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
