"""The page of a tokenizer: its reconstruction errors, and frames next to their reconstructions. One
HTML file that contains its pictures and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from mesocosm.evaluate.report.frames import strip
from mesocosm.evaluate.report.page import PAGES

Array = NDArray[Any]


def render(report: Mapping[str, Any], pictures: Sequence[tuple[Array, Array]]) -> str:
    """The whole page.

    Args:
        report: As `data.tokens.making.encode` returns it.
        pictures: For each image, frames uint8 [B, H, W, C] and their reconstructions.
    """
    strips = [[strip(frames), strip(again)] for frames, again in pictures]
    return PAGES.get_template("tokenizer.html").render(
        summary={"title": "How frames become codes"},
        images=list(zip(report["images"], strips, strict=True)),
        sentences=[sentence(image) for image in report["images"]],
    )


def sentence(image: Mapping[str, Any]) -> str:
    """The main figures of an image, of the held-out split where there is one."""
    split = "valid" if image["valid"]["frames"] else "train"
    figures = image[split]
    frames = "held-out frames" if split == "valid" else "frames"
    rows, columns = image["grid"]
    parts = [
        f"{image['name']} ({image['kind']}) is {rows} x {columns} codes of {image['codes']},"
        f" {image['bytes_a_frame']} bytes a frame",
        f"{figures['exact']:.1%} of {frames} are exact",
    ]
    if figures["psnr"] is not None:
        parts.append(f"PSNR {figures['psnr']:.1f} dB")
    if figures["moving_psnr"] is not None:
        parts.append(f"{figures['moving_psnr']:.1f} dB of moving pixels")
    if figures["unseen"]:
        parts.append(f"{figures['unseen']:.2%} of their patches have no code of their own")
    return "; ".join(parts)
