"""Images in a stream: what the tower reads, where its features stand, positions on three axes."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Pictures(NamedTuple):
    """The images of a stream: what the tower reads, and where in the stream its features stand."""

    pixels: Tensor  # (tiles, 3, height, width); Qwen, Gemma 4: (patches, a patch's numbers)
    grids: Tensor  # (images, 2) int64, patches down and across; read by Qwen and Gemma 4
    place: Tensor  # (M,) int64, stream positions of image tokens
    source: Tensor  # (M,) int64, which feature each of them becomes
    axes: Tensor | None = None  # (3, T) int64, Qwen's time, height and width of every token
    runs: Tensor | None = None  # (images, 2) int64, start and end of each one's tokens; Gemma

    def to(self, device: Any, non_blocking: bool = False) -> "Pictures":
        """Move to a device, except `grids` and `runs`, which are read on the CPU."""
        move = lambda tensor: tensor.to(device, non_blocking=non_blocking)
        axes = None if self.axes is None else move(self.axes)
        return self._replace(
            pixels=move(self.pixels), place=move(self.place), source=move(self.source), axes=axes)


def find_runs(input_ids: np.ndarray, image_token: int) -> np.ndarray:  # (runs, 2)
    """Return start and end of each stretch of image tokens: what Gemma takes for one image."""
    is_image = np.pad((input_ids == image_token).astype(np.int8), 1)
    return np.flatnonzero(np.diff(is_image)).reshape(-1, 2)


def stream_axes(
    input_ids: np.ndarray, spans: np.ndarray, image_token: int, grids: dict, merge: int,
) -> np.ndarray:  # (3, T)
    """Return the positions of a stream: time, height and width of every token.

    `grids` maps the start of a span to the (h, w) of its images, in patches. Both
    completions of a pair begin at the highest position of their prompt + 1, on every axis.
    """
    axes = np.zeros((3, len(input_ids)), np.int64)
    for start, end, prefix_start, prefix_end in spans.tolist():
        begin = axes[:, prefix_start:prefix_end].max(initial=-1) + 1
        at = start
        places = start + np.flatnonzero(input_ids[start:end] == image_token)
        for h, w in grids.get(start, ()):
            down = h // merge
            across = w // merge
            image = places[0]
            places = places[down * across :]
            axes[:, at:image] = begin + np.arange(image - at)
            begin += image - at
            rows, columns = np.divmod(np.arange(down * across), across)
            axes[:, image : image + len(rows)] = begin + np.stack([0 * rows, rows, columns])
            begin += max(down, across)  # text goes on after the highest position of the image
            at = image + len(rows)
        axes[:, at:end] = begin + np.arange(end - at)
    return axes
