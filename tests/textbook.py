"""DPO as the paper tells it: two padded sequences, dense logits, two forwards, no tricks. Read this first.

Everything fast in this repository is held to these functions, in float64. They use the repository's Decoder only to
turn token ids into logits, one padded row at a time.
"""

import torch
import torch.nn.functional as F


def pad(sequences: list[list[int]], value: int = 0) -> torch.Tensor:  # (2B, L)
    """Right-padded rows."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [value] * (longest - len(s)) for s in sequences])


def padded_batch(pairs) -> tuple[torch.Tensor, torch.Tensor]:  # (2B, L), (2B, L)
    """All chosen sequences, then all rejected; and the mask of their completion tokens."""
    rows, masks = [], []
    for kind in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            own = pair.prompt_ids if kind == "chosen_ids" or pair.rejected_prompt_ids is None else pair.rejected_prompt_ids
            prompt, completion = [int(i) for i in own], [int(i) for i in getattr(pair, kind)]
            rows.append(prompt + completion)
            masks.append([0] * len(prompt) + [1] * len(completion))
    return pad(rows), pad(masks)


def dense_logits(model, input_ids: torch.Tensor) -> torch.Tensor:  # (2B, L, V)
    """Each row through the model as one plain causal sequence; padding at its end is never looked back at."""
    length = input_ids.shape[1]
    whole = torch.tensor([[0, length, 0, 0]], dtype=torch.int32)
    return torch.stack([model.logits(row, torch.arange(length), whole) for row in input_ids])


def completion_logps(model, input_ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:  # (2B,)
    """log pi(y|x): the log-probability of each completion token given all before it, summed."""
    logps = dense_logits(model, input_ids)[:, :-1].log_softmax(-1)  # position t predicts token t + 1
    per_token = logps.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (per_token * completion_mask[:, 1:]).sum(-1)


def dpo_loss(policy, reference, pairs, beta: float) -> torch.Tensor:  # (B,)
    """-log sigma(beta [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)]), arXiv:2305.18290 eq. 7."""
    input_ids, completion_mask = padded_batch(pairs)
    policy_chosen, policy_rejected = completion_logps(policy, input_ids, completion_mask).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = completion_logps(reference, input_ids, completion_mask).chunk(2)
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def train(policy, reference, batches, beta: float, learning_rate: float, max_grad_norm: float) -> list[float]:
    """Plain AdamW with a linear schedule down to 0, one batch of pairs a step; returns the losses."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    history = []
    for step, pairs in enumerate(batches):
        loss = dpo_loss(policy, reference, pairs, beta).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(batches))
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history
