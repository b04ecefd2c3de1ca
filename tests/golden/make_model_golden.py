"""Write what holds a model and a trainer, not a loss: two checkpoints, logps.json, collator.json, trajectory.json.

    python tests/golden/make_model_golden.py

A decoder, its gradient and a DPO training loop in plain numpy, one unpadded sequence at a time; they share no code with
the implementation they judge. Everything is float64; weights are multiples of 1/128, the same numbers in float32.

Gradients in logps.json are complex steps: f(x + ih) = f(x) + ih f'(x), so f' is the imaginary part over h, without
subtraction and without a backward pass that could be wrong. The trajectory needs all gradients and has a backward pass
written by hand; `backward_error` holds it to complex steps before anything is written.

Rotary angles, and their cosine and sine, are rounded to float32, as all common implementations have them. Here every
such value lies at least 0.12 float32 ulps from a rounding boundary (`largest_rounding`), so that a sine with an error below
0.62 ulps gives the same tables; this is why no sequence is longer than 12 tokens.
"""

import json
from pathlib import Path

import numpy as np
from make_golden import dumps, write_checksums
from safetensors.numpy import save_file

HERE = Path(__file__).parent
STEP = 1e-30
POSITIONS = 12
ROPE = {"rope_theta": 173.0, "rope_scaling": {"rope_type": "linear", "factor": 1.75}}
SIZES = {"vocab_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 64, "torch_dtype": "float32"}
LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "hidden_act": "silu"},
    **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
}
GEMMA2 = {  # head_dim is not hidden_size / heads; caps and window are small enough to matter; attention is multi-query
    **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 12, "intermediate_size": 20},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "query_pre_attn_scalar": 6},
    **{"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 4},
    **{"layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 1, "eos_token_id": 2},
}
CONFIGS = {"llama": LLAMA | SIZES | ROPE, "gemma2": GEMMA2 | SIZES | ROPE}
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = """a the this one cat dog bird sun moon star sea hill road door house tree red blue old small sees likes finds
    keeps eats runs sleeps sings and with under over now then not yes no""".split()
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
NORMS = {"llama": TWO_NORMS, "gemma2": (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")}


# The model's files.


def shapes(c):
    """{Hugging Face's name: shape} of every parameter."""
    hidden, inner, size = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    block = {f"{name}.weight": (hidden,) for name in NORMS[c["model_type"]]}
    block |= {"self_attn.q_proj.weight": (heads, hidden), "self_attn.o_proj.weight": (hidden, heads)}
    block |= {f"self_attn.{name}_proj.weight": (kv_heads, hidden) for name in "kv"}
    block |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    block |= {"mlp.down_proj.weight": (hidden, inner)}
    outer = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    outer |= {} if c["tie_word_embeddings"] else {"lm_head.weight": (c["vocab_size"], hidden)}
    layers = range(c["num_hidden_layers"])
    return outer | {f"model.layers.{i}.{name}": shape for i in layers for name, shape in block.items()}


def draw_weights(c, seed):
    """Random multiples of 1/128; norms around the value that leaves their input alone (Gemma: 0, else 1)."""
    random = np.random.RandomState(seed)  # the one generator whose stream numpy never changes
    neutral = 0.0 if c["model_type"] == "gemma2" else 1.0
    weights = {}
    for name, shape in sorted(shapes(c).items()):
        scale = 0.2 if len(shape) == 1 else 1.5 / np.sqrt(shape[1])
        weights[name] = np.round(128 * (random.randn(*shape) * scale + neutral * (len(shape) == 1))) / 128
    return weights


def write_model(name, weights):
    directory = HERE / "models" / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name], indent=1) + "\n")
    save_file({n: w.astype(np.float32) for n, w in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    tokens = [*SPECIAL, *WORDS]
    assert len(tokens) == CONFIGS[name]["vocab_size"] == len(set(tokens)), len(tokens)
    added = [{"id": i, "content": t, "special": True} for i, t in enumerate(SPECIAL)]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": [a | plain for a in added]},
        **{"normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None},
        "post_processor": {
            **{"type": "TemplateProcessing", "single": [start, {"Sequence": {"id": "A", "type_id": 0}}]},
            **{"pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]},
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


# The decoder: one sequence, (L, C) arrays, no cache, no padding. All of it runs on complex numbers too.


def rotary_tables(c, length):
    """cos and sin of position x theta^(-2i/D) / factor, both halves of a head alike: (L, 1, D)."""
    size, one = c["head_dim"], np.float32(1)
    frequencies = one / np.float32(c["rope_theta"]) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    frequencies = frequencies / np.float32(c["rope_scaling"]["factor"])
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    angles = np.concatenate([angles, angles], 1)[:, None].astype(np.float64)
    return tuple(f(angles).astype(np.float32).astype(np.float64) for f in (np.cos, np.sin))


def rotate_half(x):
    half = x.shape[-1] // 2
    return np.concatenate([-x[..., half:], x[..., :half]], -1)


def rms_norm(x, weight, c):
    """x / sqrt(mean x^2 + eps), times weight (Gemma: 1 + weight)."""
    gain = 1 + weight if c["model_type"] == "gemma2" else weight
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * gain


def softmax(x, allowed=True):
    e = np.where(allowed, np.exp(x - np.where(allowed, x.real, -np.inf).max(-1, keepdims=True)), 0)
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def visible(c, layer, length):
    """(L, L) whether query row sees key column: all before it and itself, or the last `sliding_window` of them."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    slides = c.get("layer_types", ["full_attention"] * (layer + 1))[layer] == "sliding_attention"
    return (distance >= 0) & (distance < (c["sliding_window"] if slides else length))


def attention(x, w, layer, c, keep):
    """Softmax attention, each key/value head shared by several query heads; `keep` gets what backward needs."""
    length, size, place = len(x), c["head_dim"], f"model.layers.{layer}.self_attn"
    q, k, v = ((x @ w[f"{place}.{n}_proj.weight"].T).reshape(length, -1, size) for n in "qkv")
    cos, sin = rotary_tables(c, length)
    q, k = (part * cos + rotate_half(part) * sin for part in (q, k))
    scale, cap = c.get("query_pre_attn_scalar", size) ** -0.5, c.get("attn_logit_softcapping")
    group, probs, out = q.shape[1] // k.shape[1], [], []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T * scale
        scores = cap * np.tanh(scores / cap) if cap else scores
        probs.append(softmax(scores, visible(c, layer, length)))
        out.append(probs[-1] @ v[:, head // group])
    flat = np.concatenate(out, 1)
    keep.append((x, q, k, v, probs, flat))
    return flat @ w[f"{place}.o_proj.weight"].T


def mlp(x, w, layer, c, keep):
    place = f"model.layers.{layer}.mlp"
    gate, up = x @ w[f"{place}.gate_proj.weight"].T, x @ w[f"{place}.up_proj.weight"].T
    act = tanh_gelu if c["model_type"] == "gemma2" else silu
    keep.append((x, gate, up))
    return (act(gate) * up) @ w[f"{place}.down_proj.weight"].T


def forward(w, c, ids):
    """Logits (L, V) of one sequence, and what the backward pass of a Llama needs."""
    x, kept = w["model.embed_tokens.weight"][ids], []
    gemma = c["model_type"] == "gemma2"
    x = x * np.sqrt(c["hidden_size"]) if gemma else x
    for layer in range(c["num_hidden_layers"]):
        norm = lambda x, name, layer=layer: rms_norm(x, w[f"model.layers.{layer}.{name}.weight"], c)
        keep = [x]
        out = attention(norm(x, "input_layernorm"), w, layer, c, keep)
        x = x + (norm(out, "post_attention_layernorm") if gemma else out)
        keep.append(x)
        out = mlp(norm(x, NORMS[c["model_type"]][2 if gemma else 1]), w, layer, c, keep)
        x = x + (norm(out, "post_feedforward_layernorm") if gemma else out)
        kept.append(keep)
    hidden = rms_norm(x, w["model.norm.weight"], c)
    logits = hidden @ w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T
    cap = c.get("final_logit_softcapping")
    return (cap * np.tanh(logits / cap) if cap else logits), (kept, x, hidden)


def log_softmax(logits):
    shifted = logits - logits.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def scored_positions(prompt, completion):
    """Positions that predict a completion token; nothing predicts the first token of a sequence without prompt."""
    return np.arange(max(len(prompt), 1) - 1, len(prompt) + len(completion) - 1)


def token_logps(w, c, prompt, completion):
    """log pi(token | all before it) of each scored completion token."""
    ids = np.array([*prompt, *completion])
    at = scored_positions(prompt, completion)
    return log_softmax(forward(w, c, ids)[0][at])[np.arange(len(at)), ids[at + 1]]


# The gradient of a Llama's log-probs, by hand.


def norm_backward(grad, x, name, w, c, grads):
    """Through rms_norm: y = g x / s, s = sqrt(mean x^2 + eps)."""
    s = np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"])
    grads[name] += (grad * x / s).sum(0)
    inner = grad * w[name]
    return inner / s - x * (inner * x).mean(-1, keepdims=True) / s**3


def linear_backward(grad, x, name, w, grads):
    grads[name] += grad.T @ x
    return grad @ w[name]


def attention_backward(grad, saved, layer, w, c, grads):
    x, q, k, v, probs, flat = saved
    length, size, place = len(x), c["head_dim"], f"model.layers.{layer}.self_attn"
    d_out = linear_backward(grad, flat, f"{place}.o_proj.weight", w, grads).reshape(q.shape)
    d_q, d_k, d_v, group = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), q.shape[1] // k.shape[1]
    for head, p in enumerate(probs):
        kv = head // group
        d_v[:, kv] += p.T @ d_out[:, head]
        d_p = d_out[:, head] @ v[:, kv].T
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * size**-0.5
        d_q[:, head] += d_scores @ k[:, kv]
        d_k[:, kv] += d_scores.T @ q[:, head]
    cos, sin = rotary_tables(c, length)
    d_q, d_k = (d * cos - rotate_half(d * sin) for d in (d_q, d_k))  # rotate_half is its own negative transpose
    parts = (d.reshape(length, -1) for d in (d_q, d_k, d_v))
    return sum(linear_backward(d, x, f"{place}.{n}_proj.weight", w, grads) for n, d in zip("qkv", parts))


def mlp_backward(grad, saved, layer, w, grads):
    x, gate, up = saved
    place, s = f"model.layers.{layer}.mlp", 1 / (1 + np.exp(-gate))
    d = linear_backward(grad, gate * s * up, f"{place}.down_proj.weight", w, grads)
    d_gate = linear_backward(d * up * s * (1 + gate * (1 - s)), x, f"{place}.gate_proj.weight", w, grads)
    return d_gate + linear_backward(d * gate * s, x, f"{place}.up_proj.weight", w, grads)


def add_gradient(w, c, prompt, completion, factor, grads):
    """grads += factor x d (summed log-prob of the completion) / d w; returns that log-prob. Llama only."""
    ids, at = np.array([*prompt, *completion]), scored_positions(prompt, completion)
    logits, (kept, last, hidden) = forward(w, c, ids)
    logps = log_softmax(logits)
    d_logits = np.zeros_like(logits)
    d_logits[at] = -factor * np.exp(logps[at])
    d_logits[at, ids[at + 1]] += factor
    d = linear_backward(d_logits, hidden, "lm_head.weight", w, grads)
    d = norm_backward(d, last, "model.norm.weight", w, c, grads)
    for layer in reversed(range(len(kept))):
        start, attended, middle, mlp_saved = kept[layer]
        place = f"model.layers.{layer}."
        inner = mlp_backward(d, mlp_saved, layer, w, grads)
        d = d + norm_backward(inner, middle, place + "post_attention_layernorm.weight", w, c, grads)
        inner = attention_backward(d, attended, layer, w, c, grads)
        d = d + norm_backward(inner, start, place + "input_layernorm.weight", w, c, grads)
    np.add.at(grads["model.embed_tokens.weight"], ids, d)
    return logps[at, ids[at + 1]].sum()


def complex_step(w, name, index, f):
    """d f(w) / d w[name][index]."""
    moved = w[name].astype(complex)
    moved[index] += 1j * STEP
    return f(w | {name: moved}).imag / STEP


def backward_error(w, c):
    """The largest difference of the backward pass above from complex steps, at 12 entries of every parameter."""
    prompt, completion = [1, 5, 9, 11], [7, 3, 3, 20, 2]
    grads = {name: np.zeros_like(value) for name, value in w.items()}
    add_gradient(w, c, prompt, completion, 1.0, grads)
    return max(abs(complex_step(w, name, index, lambda w: token_logps(w, c, prompt, completion).sum()) - grads[name][index])
               for name, value in w.items()
               for index in list(np.ndindex(value.shape))[:: max(1, value.size // 12)])


def largest_rounding(c):
    """The largest rounding of a rotary cosine or sine to float32, in ulps: at 0.5 it would turn."""
    size, largest = c["head_dim"], 0.0
    for i in range(0, size, 2):
        frequency = np.float32(c["rope_theta"]) ** np.float32(-i / size) / np.float32(c["rope_scaling"]["factor"])
        angles = (np.arange(POSITIONS, dtype=np.float32) * np.float32(frequency)).astype(np.float64)
        for exact in (np.cos(angles), np.sin(angles)):
            rounded = exact.astype(np.float32)
            off = np.abs(exact - rounded.astype(np.float64)) / np.spacing(np.abs(rounded)).astype(np.float64)
            largest = max(largest, off.max())
    return largest


# Batches: a list of pairs as the two forms that trainers use.


def stream_form(pairs, share_prefix=True):
    """prompt chosen rejected of each pair, one after another, no padding; or two whole sequences per pair.

    A span (start, end, prefix_start, prefix_end) sees its prefix and, causally, itself; 0, 0 is no prefix.
    """
    out = {"input_ids": [], "position_ids": [], "spans": [], "score_index": [], "targets": [], "lengths": []}
    out["num_tokens"] = 0
    for pair in pairs:
        own = pair.get("rejected_prompt_ids", pair["prompt_ids"])
        shared = share_prefix and "rejected_prompt_ids" not in pair and len(own) > 0
        sides = [(pair["prompt_ids"], pair["chosen_ids"]), (own, pair["rejected_ids"])]
        prefix = append_span(out, pair["prompt_ids"], 0, [0, 0]) if shared else [0, 0]
        out["lengths"].append([append_completion(out, *side, prefix) for side in sides])
        out["num_tokens"] += sum(len(part) for side in sides for part in side)
    return out


def append_span(out, ids, first_position, prefix):
    start = len(out["input_ids"])
    out["input_ids"] += ids
    out["position_ids"] += range(first_position, first_position + len(ids))
    out["spans"].append([start, start + len(ids), *prefix])
    return [start, start + len(ids)]


def append_completion(out, prompt, completion, prefix):
    """Adds one completion, after the shared prompt at `prefix` or with its own; returns its number of scored tokens."""
    if prefix[1] > 0:
        start, _ = append_span(out, completion, len(prompt), prefix)
        predicting = [prefix[1] - 1, *range(start, start + len(completion) - 1)]
    else:
        start, end = append_span(out, prompt + completion, 0, [0, 0])
        predicting = list(range(start + max(len(prompt), 1) - 1, end - 1))
    out["score_index"] += predicting
    out["targets"] += completion[len(completion) - len(predicting) :]
    return len(predicting)


def padded_form(pairs):
    """(2B, L) rows: every chosen sequence, then every rejected one, padded with 0 on the right."""
    rows = [(pair["prompt_ids"], pair["chosen_ids"]) for pair in pairs]
    rows += [(pair.get("rejected_prompt_ids", pair["prompt_ids"]), pair["rejected_ids"]) for pair in pairs]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    fill = lambda row: row + [0] * (longest - len(row))
    return {
        "input_ids": [fill(prompt + completion) for prompt, completion in rows],
        "attention_mask": [fill([1] * len(prompt + completion)) for prompt, completion in rows],
        "completion_mask": [fill([0] * len(prompt) + [1] * len(completion)) for prompt, completion in rows],
    }


def pair(prompt, chosen, rejected, rejected_prompt=None):
    own = {} if rejected_prompt is None else {"rejected_prompt_ids": rejected_prompt}
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} | own


COLLATOR = {  # name: (pairs, share_prefix)
    "one pair": ([pair([1, 2, 3], [4, 5], [6])], True),
    "two pairs": ([pair([1, 2, 3], [4, 5], [6]), pair([7, 8], [9], [10, 11])], True),
    "two pairs, each prompt twice": ([pair([1, 2, 3], [4, 5], [6]), pair([7, 8], [9], [10, 11])], False),
    "one token each": ([pair([5], [6], [7])], True),
    "completions that begin alike": ([pair([1, 2], [3, 4, 5], [3, 4, 6])], True),
    "no prompt: the first token is not scored": ([pair([], [4, 5, 6], [7, 8])], True),
    "prompts that differ, after truncation kept the ends": ([pair([2, 3], [4], [5, 6], [3])], True),
    "one prompt cut away": ([pair([3], [4, 5], [6, 7, 8], [])], True),
    "a shared pair between unshared ones": (
        [pair([], [1, 2], [3, 4]), pair([5, 6], [7], [8, 9]), pair([10, 11], [12], [13, 14], [11])],
        True,
    ),
}


def collator_cases():
    for name, (pairs, share_prefix) in COLLATOR.items():
        expected = {"stream": stream_form(pairs, share_prefix), "padded": padded_form(pairs)}
        yield {"name": name, "share_prefix": share_prefix, "pairs": pairs, "expected": expected}


# Log-probs.

LOGPS_PAIRS = [
    pair([1, 5, 9, 30, 11, 4], [7, 3, 22, 35, 8, 2], [13, 2]),
    pair([1], [39, 39, 39, 39, 39, 39, 39, 39, 39, 39, 2], [6]),
    pair([], [17, 24, 5, 31, 2], [17, 33, 2]),
    pair([1, 28, 15, 19, 6, 23, 10], [12, 26, 14, 37, 2], [12, 26, 14, 38, 2]),
    pair([9, 30, 11, 4], [21, 16, 18, 25, 27, 29, 32, 2], [34, 36, 20, 2], [11, 4]),
]
GRADIENTS = {
    "llama": ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"],
    "gemma2": [
        *("model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        *("model.layers.0.post_attention_layernorm.weight", "model.layers.1.pre_feedforward_layernorm.weight"),
    ],
}


def sides_of(pairs):
    """(prompt, completion) of chosen 0, rejected 0, chosen 1 ..."""
    for p in pairs:
        yield p["prompt_ids"], p["chosen_ids"]
        yield p.get("rejected_prompt_ids", p["prompt_ids"]), p["rejected_ids"]


def statistics(w, c, prompt, completion):
    """Of each scored position: entropy, log sum_v p_v^2, mean logit over the vocabulary."""
    logits = forward(w, c, np.array([*prompt, *completion]))[0][scored_positions(prompt, completion)]
    logps = log_softmax(logits)
    sum_sq = np.log(np.exp(2 * logps).sum(-1))
    return {"entropy": -(np.exp(logps) * logps).sum(-1), "log_sum_sq_probs": sum_sq, "mean_logits": logits.mean(-1)}


def logps_case(name, w, c):
    """One checkpoint's numbers on all pairs."""
    sides = list(sides_of(LOGPS_PAIRS))
    expected = {"token_logps": [token_logps(w, c, *side).tolist() for side in sides]}
    found = [statistics(w, c, *side) for side in sides]
    expected |= {key: [one[key].tolist() for one in found] for key in found[0]}
    total = lambda w: sum(token_logps(w, c, *side).sum() for side in sides)
    expected["gradients"] = [
        {"parameter": p, "values": [complex_step(w, p, index, total) for index in np.ndindex(w[p].shape)]}
        for p in GRADIENTS[name]
    ]
    forms = {"stream": stream_form(LOGPS_PAIRS), "padded": padded_form(LOGPS_PAIRS)}
    return {"name": name, "model": f"models/{name}", "pairs": LOGPS_PAIRS, **forms, "expected": expected}


# Training.

HYPER_PARAMETERS = {
    **{"beta": 0.3, "learning_rate": 0.004, "weight_decay": 0.05, "adam_beta1": 0.9, "adam_beta2": 0.99},
    **{"adam_epsilon": 1e-8, "max_grad_norm": 4.0, "warmup_steps": 3, "steps": 20, "pairs_per_step": 4},
}


def draw_rows():
    """38 rows of a few words: the tenth batch of an epoch has two pairs only."""
    random = np.random.RandomState(7)
    words = lambda low, high: " ".join(WORDS[i] for i in random.randint(0, len(WORDS), random.randint(low, high)))
    return [{"prompt": words(1, 5), "chosen": " " + words(1, 6), "rejected": " " + words(1, 6)} for _ in range(38)]


def row_ids(row):
    """<s> prompt, completion </s>; a word is a token."""
    number = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    ids = {f"{key}_ids": [number[word] for word in row[key].split()] for key in ("prompt", "chosen", "rejected")}
    return {k: [1, *v] if k == "prompt_ids" else [*v, 2] for k, v in ids.items()}


def adamw(w, grads, state, step, rate, h):
    """One AdamW step (arXiv:1711.05101, as PyTorch has it), in place; only matrices decay."""
    for name, g in grads.items():
        m, v = state.setdefault(name, (np.zeros_like(g), np.zeros_like(g)))
        m, v = h["adam_beta1"] * m + (1 - h["adam_beta1"]) * g, h["adam_beta2"] * v + (1 - h["adam_beta2"]) * g * g
        state[name] = m, v
        mean, var = m / (1 - h["adam_beta1"] ** (step + 1)), v / (1 - h["adam_beta2"] ** (step + 1))
        decay = h["weight_decay"] if w[name].ndim > 1 else 0.0
        w[name] = w[name] * (1 - rate * decay) - rate * mean / (np.sqrt(var) + h["adam_epsilon"])


def batch_gradient(w, c, pairs, refs, beta):
    """Mean DPO loss (arXiv:2305.18290 eq. 7) of a batch, its gradient, and the mean rewards and log-probs."""
    grads = {name: np.zeros_like(value) for name, value in w.items()}
    rows = []
    for p, ref in zip(pairs, refs):
        policy = [token_logps(w, c, p["prompt_ids"], p[f"{side}_ids"]).sum() for side in ("chosen", "rejected")]
        rewards = [beta * (a - b) for a, b in zip(policy, ref)]
        margin = rewards[0] - rewards[1]
        slope = -beta / (1 + np.exp(margin)) / len(pairs)  # d loss / d h: -beta sigma(-beta h), over the pairs
        for side, sign in (("chosen", 1), ("rejected", -1)):
            add_gradient(w, c, p["prompt_ids"], p[f"{side}_ids"], sign * slope, grads)
        accuracy = (np.sign(margin) + 1) / 2  # a tie counts one half
        rows.append([np.log1p(np.exp(-margin)), *rewards, margin, accuracy, *policy])
    keys = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    means = dict(zip((*keys, "logps/chosen", "logps/rejected"), np.mean(rows, 0).tolist()))
    return means, grads


def train(w, c, pairs, h):
    """Batches in file order, again from the start when they end; returns each step's metrics and the final weights."""
    w, state, steps, size = dict(w), {}, [], h["pairs_per_step"]
    refs = [[token_logps(w, c, p["prompt_ids"], p[f"{s}_ids"]).sum() for s in ("chosen", "rejected")] for p in pairs]
    batches = [range(i, min(i + size, len(pairs))) for i in range(0, len(pairs), size)]
    for step in range(h["steps"]):
        rows = batches[step % len(batches)]
        metrics, grads = batch_gradient(w, c, [pairs[i] for i in rows], [refs[i] for i in rows], h["beta"])
        norm = np.sqrt(sum((g * g).sum() for g in grads.values()))
        grads = {name: g * min(1.0, h["max_grad_norm"] / (norm + 1e-6)) for name, g in grads.items()}
        warm = step / h["warmup_steps"]
        rate = h["learning_rate"] * min(warm, (h["steps"] - step) / (h["steps"] - h["warmup_steps"]))
        adamw(w, grads, state, step, rate, h)
        steps.append({"step": step + 1, **metrics, "grad_norm": float(norm), "learning_rate": rate})
    return steps, w


def trajectory(w, c):
    rows = draw_rows()
    pairs = [row_ids(row) for row in rows]
    steps, final = train(w, c, pairs, HYPER_PARAMETERS)
    sums = [
        {"parameter": name, "sum": float(value.sum()), "sum_of_squares": float((value * value).sum())}
        for name, value in final.items()
    ]
    data = [row | ids for row, ids in zip(rows, pairs)]
    return {"model": "models/llama", "hyper_parameters": HYPER_PARAMETERS, "rows": data, "steps": steps, "final": sums}


# Files.


def lines(items):
    """Objects on one line each, for lists of small ones."""
    return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]"


def write_all():
    for name, c in CONFIGS.items():
        assert largest_rounding(c) < 0.38
        write_model(name, draw_weights(c, seed=len(name)))
    weights = {name: draw_weights(c, seed=len(name)) for name, c in CONFIGS.items()}
    assert backward_error(weights["llama"], CONFIGS["llama"]) < 1e-12
    cases = ",\n".join(dumps(logps_case(name, weights[name], c)) for name, c in CONFIGS.items())
    (HERE / "logps.json").write_text('{"format": 1, "cases": [\n' + cases + "\n]}\n")
    cases = ",\n".join(dumps(case) for case in collator_cases())
    (HERE / "collator.json").write_text('{"format": 1, "cases": [\n' + cases + "\n]}\n")
    found = trajectory(weights["llama"], CONFIGS["llama"])
    parts = {key: lines(value) if isinstance(value, list) else json.dumps(value) for key, value in found.items()}
    body = [f'"{key}": {text}' for key, text in parts.items()]
    (HERE / "trajectory.json").write_text('{\n"format": 1,\n' + ",\n".join(body) + "\n}\n")
    write_checksums()


if __name__ == "__main__":
    write_all()
