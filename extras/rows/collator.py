"""Collate pairs into TRL's padded batch, for a training loop of your own.

The trainer here never pads: see data.collate.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class DataCollatorForPreference:
    """Pad examples of prompt_ids, chosen_ids, rejected_ids to a batch, all chosen rows first.

    Return input_ids, attention_mask and completion_mask, (2B, L) each, padded on the right to a
    multiple of `pad_to_multiple_of`. Sequences longer than `max_length` are first cut, at the end
    (keep_start) or at the beginning (keep_end). ref_chosen_logps and ref_rejected_logps, (B,)
    each, are added where the examples have them. TRL 1.16's example:

        >>> DataCollatorForPreference(pad_token_id=0)([
        ...     {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        ...     {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]}])
        {'input_ids': tensor([[ 1,  2,  3,  4,  5],
                [ 7,  8,  9,  0,  0],
                [ 1,  2,  3,  6,  0],
                [ 7,  8, 10, 11,  0]]), 'attention_mask': tensor([[1, 1, 1, 1, 1],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 0]]), 'completion_mask': tensor([[0, 0, 0, 1, 1],
                [0, 0, 1, 0, 0],
                [0, 0, 0, 1, 0],
                [0, 0, 1, 1, 0]])}

    A log-prob of row i is the sum over positions t with completion_mask[i, t] = 1 of log
    p(input_ids[i, t] | the tokens before it). Raises ValueError for an unknown truncation_mode, and
    for examples of which only some have reference log-probs.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f"truncation_mode {self.truncation_mode!r}: expected keep_start or keep_end"
            )
        if self.return_tensors != "pt":
            raise ValueError(f"return_tensors {self.return_tensors!r}: only pt (torch) is made")

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.truncation_mode == "keep_start":
            kept = slice(None, self.max_length)
        else:
            kept = slice(-(self.max_length or 0), None)
        ids = []
        masks = []
        for name in ("chosen_ids", "rejected_ids"):
            for example in examples:
                prompt = list(example["prompt_ids"])
                completion = list(example[name])
                mask = [0] * len(prompt) + [1] * len(completion)
                ids.append(torch.tensor((prompt + completion)[kept], dtype=torch.int64))
                masks.append(torch.tensor(mask[kept], dtype=torch.int64))
        batch = {
            "input_ids": self.pad(ids, self.pad_token_id),
            "attention_mask": self.pad([torch.ones_like(row) for row in ids], 0),
            "completion_mask": self.pad(masks, 0),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            have = sum(name in example for example in examples)
            if have not in (0, len(examples)):
                raise ValueError(f"{name}: only {have} of {len(examples)} examples have it")
            if have:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch

    def pad(self, rows: list[Tensor], value: int) -> Tensor:  # (2B, L)
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        more = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, more), value=value)
