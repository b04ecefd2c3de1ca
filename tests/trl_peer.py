"""TRL 1.16 as the peer: train with its `DPOTrainer` on the CPU, in file order, and write down every number it logs.

    python tests/trl_peer.py run.json

run.json holds
    model          directory of a Hugging Face checkpoint with tokenizer.json
    data           list of files: .jsonl or .json (one array), also gzipped; rows as TRL takes them, or from/value ones
    out            directory for metrics.jsonl, params-N.safetensors and the saved model
    args           `DPOConfig` flags under TRL's names; they lie over `MECHANICS` below
    limit          take only the first `limit` rows                                     (default: all)
    peft, adapter  `LoraConfig` keywords for a new adapter (its initial state goes to out/initial), or the directory of
                   a PEFT adapter to go on from; TRL's reference is the base model for the first, a frozen copy of the
                   adapter for the second                                               (default: full fine-tuning)
    dtype          of the weights: float32, bfloat16, auto                              (default: float32, TRL's own)
    chat_template  Jinja text in place of the tokenizer's                               (default: the tokenizer's)
    threads        torch threads                                                        (default: 2)
    params         list of steps after which the trained parameters are dumped (0: before any); true: after the last
    save           true writes the trained model or adapter to `out`

or {"runs": [...]}, several such objects, which run one after another in this process: importing TRL takes longer than
a short run. "threads" is then read from the first.

out/metrics.jsonl gets one object per optimizer step, unrounded: step, epoch, loss, grad_norm (before clipping),
learning_rate (the one the step used), num_tokens (so far, each prompt twice, no padding), logps/*, logits/*, rewards/*,
entropy, mean_token_accuracy. With gradient accumulation each is the unweighted mean over the micro-batches, so a ragged
last micro-batch counts its pairs more than the others. The last line is {"timing": {...}}: see `timing`.

Defaults of TRL 1.16 over transformers 5.23 that decide the numbers; whoever compares must hold the same values:

    bf16                           True unless fp16 (bfloat16 autocast over float32 weights, on the CPU too)
    gradient_checkpointing         True              disable_dropout             True (covers LoRA's dropout)
    max_length, truncation_mode    1024, keep_start  precompute_ref_log_probs    False
    per_device_train_batch_size    8                 gradient_accumulation_steps 1
    learning_rate                  1e-6              num_train_epochs, max_steps 3.0, -1
    lr_scheduler_type              linear to 0       warmup_steps                0 (below 1: share of the steps)
    optim                          adamw_torch_fused weight_decay                0.0
    adam_beta1, adam_beta2         0.9, 0.999        adam_epsilon                1e-8
    max_grad_norm                  1.0               seed                        42
    loss_type, beta                ["sigmoid"], 0.1  label_smoothing             0.0 (no effect on `sigmoid`)
    train_sampling_strategy        random (here: sequential)                     logging_steps 10 (here: 1)

`FLOAT32` turns off the first two. A float64 comparison is not possible: TRL's head computes in float32 whatever the
weights are. Rows whose prompt alone fills max_length are dropped before training; timing.rows tells how many are left.
"""
import contextlib
import gzip
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

START = time.perf_counter()
FLOAT32 = {"bf16": False, "gradient_checkpointing": False}
# A NaN must show: by default the trainer logs the mean of earlier losses in its place.
MECHANICS = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
             "logging_nan_inf_filter": False, "train_sampling_strategy": "sequential"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
COLUMNS = ("prompt", "chosen", "rejected", "images", "tools")  # a text model given images is refused by TRL


def read_rows(path: str) -> list[dict]:
    """Rows of a .jsonl or .json file, gzipped or not."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    # Not splitlines: U+2028 and its like may stand unescaped inside a JSON string.
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.split("\n") if x.strip()]


def to_trl_row(row: dict) -> dict:
    """The columns TRL reads; a from/value row becomes role/content messages, KeyError for a speaker not in `ROLES`."""
    if "conversations" not in row:
        return {key: row[key] for key in COLUMNS if key in row}
    turns = {"prompt": row["conversations"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}
    return {key: [{"role": ROLES[x["from"]], "content": x["value"]} for x in side] for key, side in turns.items()}


def memory_mib(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, Linux only. Not ru_maxrss: it survives exec, so that a child of
    a large test process would report its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


@contextlib.contextmanager
def clock(seconds: Counter, key: str):
    """Add the wall-clock seconds of the block to `seconds[key]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[key] += time.perf_counter() - start


def save_params(run: dict, model, step: int, last_step: int | None = None) -> None:
    """Dump the trained parameters if run.json wants this step: under the model's names, or for an adapter under those
    of PEFT's files."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    wanted = run.get("params") or []
    if (step != last_step) if wanted is True else (step not in wanted):
        return
    state = get_peft_model_state_dict(model) if hasattr(model, "peft_config") else dict(model.named_parameters())
    state = {name: p.detach().clone().contiguous() for name, p in state.items()}
    save_file(state, Path(run["out"]) / f"params-{step}.safetensors")


def peer_class(run: dict, seconds: Counter):
    """DPOTrainer with a clock around tokenization and the reference pass, which counts pairs and dumps parameters."""
    from trl import DPOTrainer

    class Peer(DPOTrainer):
        pairs = 0

        def _prepare_dataset(self, *args):
            with clock(seconds, "tokenize"):
                return super()._prepare_dataset(*args)

        def _precompute_ref_logps(self, *args):
            with clock(seconds, "reference"):
                return super()._precompute_ref_logps(*args)

        def training_step(self, model, inputs, *args):
            self.pairs += len(inputs["input_ids"]) // 2
            return super().training_step(model, inputs, *args)

        def log(self, logs, *args):  # after every optimizer step, after evaluations, and once at the end
            super().log(logs, *args)
            if "loss" in logs:
                save_params(run, self.model, self.state.global_step, self.state.max_steps)

    return Peer


def load_policy(run: dict):
    """The model in `dtype`, wrapped in its adapter where one is named, and the tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # Not AutoTokenizer: it may rebuild the tokenizer of a known model type, and drop what tokenizer.json says.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run["model"])
    tokenizer.chat_template = run.get("chat_template") or tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype=run.get("dtype", "float32"))
    if run.get("adapter"):
        model = PeftModel.from_pretrained(model, run["adapter"], is_trainable=True)
    return model, tokenizer


def make_trainer(run: dict, seconds: Counter):
    """The trainer as TRL builds it; its constructor tokenizes, loads or precomputes the reference."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig

    if run.get("peft") and run.get("adapter"):
        raise ValueError("run.json names both peft (a new adapter) and adapter (an existing one); give one of them")
    with clock(seconds, "load"):
        model, tokenizer = load_policy(run)
    rss_after_load = memory_mib("VmRSS")
    rows = [to_trl_row(row) for path in run["data"] for row in read_rows(str(path))][:run.get("limit")]
    peft_config = LoraConfig(**{"task_type": "CAUSAL_LM", **run["peft"]}) if run.get("peft") else None
    args = DPOConfig(**{"output_dir": run["out"], **MECHANICS, **run.get("args", {})})
    with clock(seconds, "init"):
        trainer = peer_class(run, seconds)(model, args=args, train_dataset=Dataset.from_list(rows),
                                           processing_class=tokenizer, peft_config=peft_config)
    return trainer, rss_after_load


def timing(trainer, seconds: Counter, rss_after_load: float) -> dict:
    """Wall-clock seconds of each part, pairs/s, memory. `init` includes tokenize, reference and the load of a live
    reference; `total` is from this script's first line to the last step, without saving, so that with several runs only
    the first one's means something; `cpu_seconds`, over all threads, tells whether the machine was shared."""
    seconds["total"] = time.perf_counter() - START
    packages = ("trl", "transformers", "peft", "torch")
    return {"seconds": dict(seconds), "cpu_seconds": time.process_time(), "rows": len(trainer.train_dataset),
            "pairs": trainer.pairs, "pairs_per_second_train": trainer.pairs / seconds["train"],
            "pairs_per_second_total": trainer.pairs / seconds["total"], "rss_after_load_mib": rss_after_load,
            "peak_rss_mib": memory_mib("VmHWM"), "versions": {p: importlib.metadata.version(p) for p in packages}}


def train(run: dict, seconds: Counter) -> None:
    """One run, from its files to its files."""
    out = Path(run["out"])
    out.mkdir(parents=True, exist_ok=True)
    trainer, rss_after_load = make_trainer(run, seconds)
    if run.get("peft"):
        trainer.model.save_pretrained(out / "initial")
    save_params(run, trainer.model, 0)
    with clock(seconds, "train"):
        trainer.train()
    record = {"timing": timing(trainer, seconds, rss_after_load)}
    steps = [log for log in trainer.state.log_history if "loss" in log]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*steps, record]), encoding="utf-8")
    if run.get("save"):
        trainer.save_model(str(out))


def main(path: str) -> None:
    """Do what run.json says; the formats of both ends are told at the top of this file."""
    content, imports = json.loads(Path(path).read_text(encoding="utf-8")), Counter()
    runs = content.get("runs", [content])
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # before the imports, which read them
    with clock(imports, "import"):
        import torch
        from trl import DPOTrainer  # noqa: F401 (so that its import is timed here)
    torch.set_num_threads(runs[0].get("threads", 2))
    for run in runs:
        train(run, Counter(imports))


def skip_without_trl() -> None:
    import pytest

    try:
        version, _ = (importlib.metadata.version(package) for package in ("trl", "peft"))
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed: pip install trl==1.16.0 peft")
    if not version.startswith("1.16."):
        pytest.skip(f"the peer is trl 1.16, found {version}: pip install trl==1.16.0")


def execute(content: dict, path: Path, threads: int) -> None:
    """Run this script on `content`, written to `path`; RuntimeError with TRL's words if it fails."""
    path.write_text(json.dumps(content, default=str), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"TRL exited with {done.returncode}:\n{done.stderr[-4000:]}")


def run_many(tmp_path, runs: dict[str, dict]) -> None:
    """All runs in one interpreter, each as run.json has them but for `out`, which is tmp_path/name."""
    skip_without_trl()
    content = {"runs": [{**run, "out": Path(tmp_path) / name} for name, run in runs.items()]}
    execute(content, Path(tmp_path) / "runs.json", content["runs"][0].get("threads", 2))


def run_trl(tmp_path, model, data, args, peft=None, adapter=None, **more) -> list[dict]:
    """Run this script in a fresh interpreter and return its metrics: one dict per step, the last one {"timing": ...}.

    `data` is one path, a list of paths, or a list of rows; `more` may hold any other key of run.json; `out` is
    tmp_path/trl if not given. Skips the test where TRL 1.16 is missing; RuntimeError with TRL's words if it fails.
    """
    skip_without_trl()
    tmp_path = Path(tmp_path)
    data = [data] if isinstance(data, (str, Path)) else list(data)
    if data and isinstance(data[0], dict):
        (tmp_path / "trl-rows.json").write_text(json.dumps(data), encoding="utf-8")
        data = [tmp_path / "trl-rows.json"]
    run = {"model": model, "data": data, "args": args, "peft": peft, "adapter": adapter}
    run = {**run, "out": tmp_path / "trl", **more}
    execute(run, tmp_path / "run.json", run.get("threads", 2))
    return read_rows(str(Path(run["out"]) / "metrics.jsonl"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/trl_peer.py run.json")
    main(sys.argv[1])
