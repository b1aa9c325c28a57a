"""What `vitembed train` prints: how a training went, what one would be, a learning rate for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vitembed.cli.output import print_figures, print_json, warn

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.training import ImageDataset, TrainResult


def print_result(result: "TrainResult", model: "Embedder", out: Path, data: str, json: bool) -> None:
    """Print how a training went, and what to do next."""
    figures: dict[str, Any] = {
        "model": str(out),
        "best epoch": result.best_epoch,
        "validation recall@1": result.recall_at_1,
    }
    if "accuracy" in result.history[0]:
        figures["validation accuracy"] = result.accuracy
    if result.recall_at_1 is None:
        warn("nothing was held out, so nothing is known of how well the model does on new images")
    if result.unreadable:
        path, reason = next(iter(result.unreadable.items()))
        warn(f"{len(result.unreadable)} images could not be read and were set aside; the first is {path}: {reason}")
    if json:
        told = {"diagnoses": result.diagnoses, "unreadable": result.unreadable}
        print_json({**figures, **told, "history": result.history, "fingerprint": model.fingerprint})
    else:
        print_figures(figures)
        held_out = " --held-out" if model.provenance["held-out classes"] else ""
        typer.echo(f"\nNext: vitembed evaluate {out} {data}{held_out}")


def print_plan(model: "Embedder", dataset: "ImageDataset", task: dict[str, Any], json: bool) -> None:
    """Print what would be trained."""
    from vitembed.training.plan import plan_training

    plan = plan_training(model, dataset, **task)
    print_json(plan.to_dict()) if json else print_figures(plan.figures())


def print_rate(model: "Embedder", dataset: "ImageDataset", task: dict[str, Any], json: bool) -> None:
    """Print a learning rate that suits."""
    from vitembed.training.rate_finder import find_learning_rate

    curve = find_learning_rate(model, dataset, **task)
    if json:
        print_json({"learning_rate": curve.suggestion, "rates": list(curve.rates), "losses": list(curve.losses)})
    else:
        print_figures({"learning rate": f"{curve.suggestion:.2g}"})
