"""Shared pieces: a tiny model with a tokenizer and pairs made on the spot, and the real data where it lies."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


@pytest.fixture(autouse=True)
def denormals():
    """A trainer flushes denormals to zero; the next test starts without."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real checkpoints and pairs; they are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


WORDS = "the a cat dog sun moon sees likes eats red blue big small and runs sleeps today why not yes no".split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(directory: Path) -> Path:
    """A random two-layer Llama with a word tokenizer: directory of a Hugging Face checkpoint."""
    import tokenizers

    import model as models

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    write(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(vocabulary),
              "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
              "hidden_act": "silu", "torch_dtype": "float32"}
    write(directory / "config.json", config)
    torch.manual_seed(0)
    state = {n: torch.randn(p.shape) * (0.3 if p.dim() == 2 else 0.1) + (p.dim() == 1)
             for n, p in models.Decoder(models.read_config(config)).named_parameters()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_rows(count: int, seed: int = 0, scores: bool = False) -> list[dict]:
    """Pairs of word salads of unequal lengths."""
    rng = random.Random(seed)
    text = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    rows = []
    for _ in range(count):
        row = {"prompt": text(1, 9), "chosen": " " + text(1, 12), "rejected": " " + text(1, 12)}
        if scores:
            row |= {"chosen_score": rng.uniform(1, 2), "rejected_score": rng.uniform(-1, 0.5)}
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    """23 pairs: divisible by nothing."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in make_rows(23, scores=True)), encoding="utf-8")
    return path


def run_dpo(*arguments, ranks: int = 1, expect: int = 0, timeout: int = 240) -> subprocess.CompletedProcess:
    """`python dpo.py` (or torchrun with that many ranks), one thread each; asserts the exit status."""
    command = [sys.executable, str(ROOT / "dpo.py")]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(ROOT / "dpo.py")]
    import os

    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == expect, f"exit {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
    return done


def read_metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
