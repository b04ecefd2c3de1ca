"""TRL 1.16's vision path as the peer: python tests/vision_peer.py run.json

run.json: {"model": DIR, "data": FILE, "out": DIR, "args": {...}, "backend": "pil"}. Writes metrics.jsonl and the
trained parameters, params.safetensors. Without torchvision transformers has its pillow processors, and LLaVA's and
Idefics3's processors work; SmolVLM's, Gemma 4's and Qwen's hold a video processor, which only exists with torchvision:
the last two are made without one. `backend` says who scales pictures: "pil", which extras/pictures.py equals, or "torchvision", transformers' own
choice where it is installed.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path


def make_processor(directory: str, backend: str):
    """The model's processor, without its video processor where there is no torchvision."""
    import transformers as hf

    images = hf.AutoImageProcessor.from_pretrained(directory, backend=backend)
    named = json.loads((Path(directory) / "processor_config.json").read_text())["processor_class"]
    if importlib.util.find_spec("torchvision") or not named.startswith(("Qwen", "Gemma4")):
        processor = hf.AutoProcessor.from_pretrained(directory)
        processor.image_processor = images
        return processor
    unchecked = dict(check_argument_for_proper_class=lambda self, name, argument: type(argument))
    bare = type(named, (getattr(hf, named),), unchecked)
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    if named == "Gemma4Processor":
        return bare(hf.Gemma4AudioFeatureExtractor(), images, tokenizer, None, chat_template=tokenizer.chat_template)
    return bare(images, tokenizer, None, chat_template=tokenizer.chat_template)


def main(path: str) -> None:
    run = json.loads(Path(path).read_text())
    import torch
    from datasets import Dataset
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(run.get("threads", 1))
    folder, out = Path(run["data"]).parent, Path(run["out"])
    rows = [json.loads(line) for line in open(run["data"])]
    for row in rows:
        row["images"] = [Image.open(folder / name).convert("RGB") for name in row["images"]]
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "metrics.jsonl", "w")

    class Write(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                log.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    args = DPOConfig(output_dir=str(out), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
                     logging_nan_inf_filter=False, train_sampling_strategy="sequential", bf16=False,
                     gradient_checkpointing=False, **run["args"])
    processor = make_processor(run["model"], run.get("backend", "pil"))
    trainer = DPOTrainer(model=run["model"], args=args, train_dataset=Dataset.from_list(rows), callbacks=[Write()],
                         processing_class=processor)
    started = time.perf_counter()
    trainer.train()
    log.write(json.dumps({"timing": time.perf_counter() - started}) + "\n")
    log.close()
    save_file({n: p.detach().contiguous() for n, p in trainer.model.named_parameters()}, out / "params.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
