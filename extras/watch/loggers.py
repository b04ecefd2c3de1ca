"""Send the lines of metrics.jsonl to TensorBoard, Weights & Biases or Trackio: --report_to.

Names are those of transformers' Trainer: `train/loss`, `eval/rewards/accuracies`. Sampled answers
are sent as text. Each package is optional, and imported only if asked for.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from parts.config import DPOConfig
from parts.log import Logger

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def make_loggers(c: DPOConfig) -> list[Logger]:
    """Make a function for each logger; its package starts at the first metrics, on rank 0.

    Raises ValueError, on every rank, naming the package to install.
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
    """Open a logger at its first metrics. Raises OSError naming it where that fails."""
    opened = []

    def log(metrics: dict) -> None:
        if not opened:
            try:
                opened.append(opener(c, metrics["step"]))
            except Exception as error:  # no key, no network: each package raises its own kinds
                raise OSError(
                    f"--report_to {opener.__name__}: it cannot be started ({error})"
                ) from error
        opened[0](metrics)

    return log


def named(metrics: dict) -> dict[str, float]:
    """Name the numbers of a line of metrics as transformers does."""
    kept = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k not in ("step",)}
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in kept.items()}


def run_name(c: DPOConfig) -> str:
    return c.run_name or Path(c.output_dir).resolve().name


def settings(c: DPOConfig) -> dict:
    return {k: v for k, v in vars(c).items() if k != "hub_token"}


def sample_rows(metrics: dict) -> list[dict]:
    return metrics.get("eval_samples", [])


def tensorboard(c: DPOConfig, step: int) -> Logger:
    """Write event files to output_dir/runs; a resume drops the interrupted run's later steps."""
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
