"""--report_to: the lines of metrics.jsonl to TensorBoard, Weights & Biases or Trackio, each imported where asked for.

Names are those of transformers' Trainer: `train/loss`, `eval/rewards/accuracies`. Sampled answers go along as text.
"""

import importlib.util
from collections.abc import Callable

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
Log = Callable[[dict], None]


def make(trainer) -> list[Log]:
    """A function for each logger; what it needs is opened at the first metrics, on rank 0.

    Raises ValueError, on every rank, naming what is to be installed.
    """
    names = trainer.args.report_to
    if "none" in names:
        raise ValueError(f"--report_to {' '.join(names)}: none goes with no other")
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"--report_to {name}: not installed; pip install {PACKAGES[name]}")
    openers = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
    return [when_first_used(openers[name], trainer) for name in dict.fromkeys(names)]


def when_first_used(opener: Callable, trainer) -> Log:
    opened = []

    def log(metrics: dict) -> None:
        if not opened:
            try:
                opened.append(opener(trainer, metrics["step"]))
            except Exception as error:  # no key, no network: each package has its own kinds
                raise OSError(f"--report_to {opener.__name__}: it cannot be started ({error})") from error
        opened[0](metrics)

    return log


def named(metrics: dict) -> dict[str, float]:
    """The numbers of a line of metrics, as transformers names them."""
    kept = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k not in ("step",)}
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in kept.items()}


def run_name(trainer) -> str:
    return trainer.args.run_name or trainer.output_dir.resolve().name


def settings(trainer) -> dict:
    return {k: v for k, v in vars(trainer.args).items() if k != "hub_token"}


def sample_rows(metrics: dict) -> list[dict]:
    return metrics.get("eval_samples", [])


def tensorboard(trainer, step: int) -> Log:
    """Event files in output_dir/runs; after a resume, later steps of the interrupted run are dropped."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(trainer.output_dir / "runs" / run_name(trainer), purge_step=step)
    writer.add_text("configuration", "\n".join(f"    {k}: {v}" for k, v in settings(trainer).items()), step)

    def log(metrics: dict) -> None:
        for name, value in named(metrics).items():
            writer.add_scalar(name, value, metrics["step"])
        if rows := sample_rows(metrics):
            text = "\n\n".join(f"**{row['prompt']}**\n\n{row['completion']}" for row in rows)
            writer.add_text("eval/samples", text, metrics["step"])
        writer.flush()

    return log


def wandb(trainer, step: int) -> Log:
    import wandb

    run = wandb.init(project=trainer.args.project, name=run_name(trainer), config=settings(trainer),
                     dir=str(trainer.output_dir))

    def log(metrics: dict) -> None:
        table = {}
        if rows := sample_rows(metrics):
            table["eval/samples"] = wandb.Table(
                ["prompt", "completion"], [[r["prompt"], r["completion"]] for r in rows]
            )
        run.log(named(metrics) | table | {"train/global_step": metrics["step"]})

    return log


def trackio(trainer, step: int) -> Log:
    import trackio

    run = trackio.init(project=trainer.args.project, name=run_name(trainer), config=settings(trainer), resume="allow")

    def log(metrics: dict) -> None:
        run.log(named(metrics), step=metrics["step"])

    return log
