"""Send the lines of metrics.jsonl to TensorBoard, Weights & Biases, Trackio or MLflow: --report_to.

Names are those of transformers' Trainer: `train/loss`, `eval/rewards/accuracies`. Sampled answers
are sent as text. Each package is optional, and imported only if asked for. A resumed run goes on
with its run in the logger, whose id is in output_dir/loggers.json.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from parts.config import DPOConfig
from parts.log import Logger
from parts.output import write_atomically

PACKAGES = {
    "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
IDS = "loggers.json"  # {logger: id of its run}
PARAMS_AT_ONCE = 100  # MLflow's limit
PARAM_LENGTH = 500  # characters; MLflow's limit


class RunIds:
    """The ids of the loggers' runs, by logger, kept in output_dir for a resume."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ids: dict[str, str] | None = None

    def known(self, name: str) -> str | None:
        """Return the id of an earlier run of the logger that this run resumes.

        A run that is not resumed has written only the one line of metrics that is logged now.
        """
        if self.ids is None:
            path = self.directory / IDS
            lines = (self.directory / "metrics.jsonl").read_text("utf-8").count("\n")
            self.ids = json.loads(path.read_text("utf-8")) if lines > 1 and path.exists() else {}
        return self.ids.get(name)

    def keep(self, name: str, run_id: str) -> None:
        self.ids = (self.ids or {}) | {name: run_id}
        write_atomically(self.directory / IDS, json.dumps(self.ids).encode())


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
    openers = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio, "mlflow": mlflow}
    ids = RunIds(Path(c.output_dir))
    return [when_first_used(openers[name], c, ids) for name in dict.fromkeys(names)]


def when_first_used(opener: Callable, c: DPOConfig, ids: RunIds) -> Logger:
    """Open a logger at its first metrics. Raises OSError naming it where that fails."""
    opened = []

    def log(metrics: dict) -> None:
        if not opened:
            try:
                opened.append(opener(c, metrics["step"], ids))
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


def tensorboard(c: DPOConfig, step: int, ids: RunIds) -> Logger:
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


def wandb(c: DPOConfig, step: int, ids: RunIds) -> Logger:
    import wandb

    known = ids.known("wandb")
    more = {"id": known, "resume": "allow"} if known else {}
    run = wandb.init(
        project=c.project, name=run_name(c), config=settings(c), dir=str(c.output_dir), **more)
    ids.keep("wandb", run.id)
    run.define_metric("*", step_metric="train/global_step")  # lines sent again fall on the first

    def log(metrics: dict) -> None:
        table = {}
        if rows := sample_rows(metrics):
            table["eval/samples"] = wandb.Table(
                ["prompt", "completion"], [[r["prompt"], r["completion"]] for r in rows]
            )
        run.log(named(metrics) | table | {"train/global_step": metrics["step"]})

    return log


def trackio(c: DPOConfig, step: int, ids: RunIds) -> Logger:
    import trackio

    run = trackio.init(project=c.project, name=run_name(c), config=settings(c), resume="allow")

    def log(metrics: dict) -> None:
        run.log(named(metrics), step=metrics["step"])

    return log


def mlflow(c: DPOConfig, step: int, ids: RunIds) -> Logger:
    """Log to the active run, if there is one, else to a new one; at MLFLOW_TRACKING_URI."""
    import mlflow

    if c.project != DPOConfig.project:
        mlflow.set_experiment(c.project)
    known = ids.known("mlflow")
    run = mlflow.active_run()
    if run is None:
        run = mlflow.start_run(run_id=known, run_name=None if known else run_name(c))
    ids.keep("mlflow", run.info.run_id)
    if known is None:  # parameters are written once
        items = [(k, str(v)[:PARAM_LENGTH]) for k, v in settings(c).items()]
        for i in range(0, len(items), PARAMS_AT_ONCE):
            mlflow.log_params(dict(items[i : i + PARAMS_AT_ONCE]))

    def log(metrics: dict) -> None:
        mlflow.log_metrics(named(metrics), step=metrics["step"])
        if rows := sample_rows(metrics):
            mlflow.log_dict({"samples": rows}, f"eval_samples/step-{metrics['step']}.json")

    return log
