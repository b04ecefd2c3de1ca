"""--report_to: the lines of metrics.jsonl to TensorBoard, Weights & Biases or Trackio, each imported where asked for.

Names are those of transformers' Trainer: `train/loss`, `eval/rewards/accuracies`. Sampled answers go along as text.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from parts.config import DPOConfig
from parts.log import Logger

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def make_loggers(c: DPOConfig) -> list[Logger]:
    """A function for each logger; its package is started at the first metrics, on rank 0.

    Raises ValueError, on every rank, naming what to install.
    """
    names = c.report_to
    if "none" in names:
        raise ValueError(f"--report_to {' '.join(names)}: none goes with no other")
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"--report_to {name}: not installed; pip install {PACKAGES[name]}")
    openers = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
    return [when_first_used(openers[name], c) for name in dict.fromkeys(names)]


def when_first_used(opener: Callable, c: DPOConfig) -> Logger:
    opened = []

    def log(metrics: dict) -> None:
        if not opened:
            try:
                opened.append(opener(c, metrics["step"]))
            except Exception as error:  # no key, no network: each package has its own kinds
                raise OSError(
                    f"--report_to {opener.__name__}: it cannot be started ({error})"
                ) from error
        opened[0](metrics)

    return log


def named(metrics: dict) -> dict[str, float]:
    """The numbers of a line of metrics, as transformers names them."""
    kept = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k not in ("step",)}
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in kept.items()}


def run_name(c: DPOConfig) -> str:
    return c.run_name or Path(c.output_dir).resolve().name


def settings(c: DPOConfig) -> dict:
    return {k: v for k, v in vars(c).items() if k != "hub_token"}


def sample_rows(metrics: dict) -> list[dict]:
    return metrics.get("eval_samples", [])


def tensorboard(c: DPOConfig, step: int) -> Logger:
    """Event files in output_dir/runs; after a resume, later steps of the interrupted run are dropped."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(Path(c.output_dir) / "runs" / run_name(c), purge_step=step)
    writer.add_text(
        "configuration", "\n".join(f"    {k}: {v}" for k, v in settings(c).items()), step
    )

    def log(metrics: dict) -> None:
        for name, value in named(metrics).items():
            writer.add_scalar(name, value, metrics["step"])
        if rows := sample_rows(metrics):
            text = "\n\n".join(f"**{row['prompt']}**\n\n{row['completion']}" for row in rows)
            writer.add_text("eval/samples", text, metrics["step"])
        writer.flush()

    return log


def wandb(c: DPOConfig, step: int) -> Logger:
    import wandb

    run = wandb.init(project=c.project, name=run_name(c), config=settings(c), dir=str(c.output_dir))

    def log(metrics: dict) -> None:
        table = {}
        if rows := sample_rows(metrics):
            table["eval/samples"] = wandb.Table(
                ["prompt", "completion"], [[r["prompt"], r["completion"]] for r in rows]
            )
        run.log(named(metrics) | table | {"train/global_step": metrics["step"]})

    return log


def trackio(c: DPOConfig, step: int) -> Logger:
    import trackio

    run = trackio.init(project=c.project, name=run_name(c), config=settings(c), resume="allow")

    def log(metrics: dict) -> None:
        run.log(named(metrics), step=metrics["step"])

    return log
