"""Pictures in a stream: what the tower reads, where its features stand, positions on three axes."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Pictures(NamedTuple):
    """The pictures of a stream: what the tower reads, and where in the stream its features stand."""

    pixels: Tensor  # (tiles, 3, height, width), or for Qwen (patches, 3 x frames x height x width)
    grids: Tensor  # (pictures, 2) int64, patches down and across; read by Qwen
    place: Tensor  # (M,) int64, stream positions of image tokens
    source: Tensor  # (M,) int64, which feature each of them becomes
    axes: Tensor | None = None  # (3, T) int64, Qwen's time, height and width of every token

    def to(self, device, non_blocking: bool = False) -> "Pictures":
        """Move to a device, except `grids`, which the tower reads on the CPU."""
        move = lambda tensor: tensor.to(device, non_blocking=non_blocking)
        axes = None if self.axes is None else move(self.axes)
        return self._replace(pixels=move(self.pixels), place=move(self.place),
                             source=move(self.source), axes=axes)


def stream_axes(input_ids: np.ndarray, spans: np.ndarray, image_token: int, grids: dict,
                merge: int) -> np.ndarray:
    """Return (3, T) positions of a stream: time, height and width of every token.

    `grids` gives for each span without prefix the (h, w) of its pictures, in patches. Both
    completions of a pair begin at the highest position of their prompt + 1, on every axis.
    """
    axes = np.zeros((3, len(input_ids)), np.int64)
    for start, end, prefix_start, prefix_end in spans.tolist():
        begin = axes[:, prefix_start:prefix_end].max(initial=-1) + 1
        at = start
        places = start + np.flatnonzero(input_ids[start:end] == image_token)
        for h, w in grids.get(start, ()):
            h, w = h // merge, w // merge
            picture = places[0]
            places = places[h * w :]
            axes[:, at:picture] = begin + np.arange(picture - at)
            begin += picture - at
            rows, columns = np.divmod(np.arange(h * w), w)
            axes[:, picture : picture + h * w] = begin + np.stack([0 * rows, rows, columns])
            begin += max(h, w)
            at = picture + h * w
        axes[:, at:end] = begin + np.arange(end - at)
    return axes
