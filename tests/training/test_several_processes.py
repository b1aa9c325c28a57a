"""Two processes learn what one does: shares of batches, batch norm, a memory, hard negatives, one checkpoint."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from vitembed.embedder import Embedder
from vitembed.training.checkpoints import list_checkpoints

SCRIPT = """
    import sys
    from pathlib import Path
    from tests.training.test_resume import *
    plain = sys.argv[2] == "plain"
    settings = QUICK | {"epochs": 2, "hard_negatives": HardNegatives(every=1, first=2)}
    if not plain:
        settings |= {"gradient_cache": 5, "patch_dropout": 0.2}
    model = embedder()
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in model.network.modules())
    loss = CrossBatchMemory(TripletLoss(mining="all" if plain else "distance-weighted"), size=40)
    train(model, stripes(per_class=7), loss=loss, config=TrainConfig(**settings), out=Path(sys.argv[1]), resume=True)
"""


def start(script: str, out: Path, processes: int, *arguments: str) -> "list[subprocess.Popen[str]]":
    """Start so many processes that find each other."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    if processes > 1:
        common["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(out), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(processes)
    ]


def run(out: Path, processes: int, kind: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Train in so many processes, and return the weights and the history that they leave."""
    started = start(SCRIPT, out, processes, kind)
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    history = json.loads((out / "history.json").read_text())
    return Embedder.from_pretrained(out, device="cpu").network.state_dict(), history


DISAGREEING = """
    import sys
    from pathlib import Path
    from tests.training.test_resume import *
    from vitembed.training import run
    from vitembed.training.distributed import rank
    validate = run.validate
    run.validate = lambda *given: {"recall@1": validate(*given)["recall@1"] + 0.001 * rank() * (-1) ** given[0].steps}
    Embedder.steps = property(lambda self: int(self.network.vit.norm.weight.sum() * 1e6))
    config = TrainConfig(**QUICK | {"epochs": 4}, patience=1)
    train(embedder(), stripes(), config=config, out=Path(sys.argv[1]))
"""


def test_processes_that_measure_differently_stop_together(tmp_path: Path) -> None:
    for process in start(DISAGREEING, tmp_path, 2):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize("kind", ["plain", "drawn"])
def test_two_processes_learn_what_one_does(kind: str, tmp_path: Path) -> None:
    alone, history = run(tmp_path / "one", 1, kind)
    together, shared = run(tmp_path / "two", 2, kind)
    if kind == "plain":  # what is drawn by chance differs, and batch norm is of a chunk where a batch comes in chunks
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=2e-5)
    for before, after in zip(history, shared, strict=True):
        tolerance = 1e-4 if kind == "plain" else 0.5
        assert after["loss"] == pytest.approx(before["loss"], rel=tolerance)
    assert len(list_checkpoints(tmp_path / "two")) == 1
    if kind == "plain":
        assert run(tmp_path / "two", 2, kind)[1] == shared  # it goes on together, too: nothing was left to do
