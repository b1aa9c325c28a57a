"""The benchmarks run and print what they promise, at the smallest sizes; they measure nothing here."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import parity
from vitembed.architecture import ViTConfig
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.vit import ViT

FOLDER = Path(parity.__file__).parent
IN_PYTORCH = ["vitembed", "timm", "torchvision", "transformers"]

Script = Callable[..., list[list[str]]]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _beside_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # where a script finds timing.py


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a benchmark as its command line does, and return the words of each line that it prints."""

    def run(name: str, *arguments: object) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return run


def measured(lines: list[list[str]]) -> dict[str, float]:
    """Return how many times as fast ours is, by the name of the row."""
    return {" ".join(words[:-6]): float(words[-2]) for words in lines if words[-1:] == ["x"]}


def encode() -> dict[str, Callable[..., object]]:
    """Return the functions of the benchmark of `encode`."""
    return runpy.run_path(str(FOLDER / "encode.py"))


@pytest.mark.parametrize(
    ("dtype", "peers"), [("float32", [*IN_PYTORCH, "onnxruntime", "openvino"]), ("bfloat16", IN_PYTORCH)]
)
def test_encode_has_a_row_for_every_peer_that_can_run(script: Script, dtype: str, peers: list[str]) -> None:
    lines = script("encode.py", "--arch", "Ti/16", "--batch", 1, "--repeats", 1, "--dtype", dtype)
    table = measured(lines)
    assert list(table) == peers
    assert table["vitembed"] == 1.0
    assert min(table.values()) > 0


def test_attention_has_a_row_for_every_shape(script: Script) -> None:
    lines = script("attention.py", "--repeats", 1, "--shapes", 2, 1, 5, 8, "--shapes", 1, 2, 3, 4)
    assert [line[:4] for line in lines[2:]] == [["2", "1", "5", "8"], ["1", "2", "3", "4"]]
    assert all(float(line[-1].removesuffix("x")) > 0 for line in lines[2:])


def test_the_networks_of_encode_move_and_are_cast_whole() -> None:
    networks = encode()["in_pytorch"]("Ti/16")
    assert list(networks) == IN_PYTORCH
    for network in networks.values():
        network.to("meta", torch.bfloat16)  # stands for a GPU: what was left behind could not be computed with
        assert {(weight.device.type, weight.dtype) for weight in network.parameters()} == {("meta", torch.bfloat16)}
        assert network(torch.zeros(3, 3, 224, 224, device="meta", dtype=torch.bfloat16)).shape == (3, 192)


def test_the_operations_of_a_forward_pass_are_those_that_pytorch_counts() -> None:
    config = ViTConfig.named("Ti/16", image_size=64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ViT(config)(torch.zeros(1, 3, 64, 64), patches=True)  # with patches no row is left out
    assert encode()["forward_flops"](config) == counter.get_total_flops()


def test_shares_are_of_the_measured_peak(capsys: pytest.CaptureFixture[str]) -> None:
    functions = encode()
    assert functions["matrix_peak"]("cpu", torch.float32, side=32) > 0
    functions["print_shares"]({"vitembed": 0.5, "timm": 2.0}, flops=1e12, peak=4e12)
    *_, ours, timm = capsys.readouterr().out.splitlines()
    assert (ours.split(), timm.split()) == (["vitembed", "50.0%"], ["timm", "12.5%"])


def test_files_compares_reading_with_memory(script: Script) -> None:
    lines = script("files.py", "--arch", "Ti/16", "--images", 2, "--side", 40, "--batch", 2, "--repeats", 1)
    assert list(measured(lines)) == ["from files", "in memory"]
    assert lines[-1][-4:] == ["of", "the", "in-memory", "rate"]


def test_train_compares_a_step_with_the_bare_network_and_a_plain_loop(script: Script) -> None:
    tiny = ("--arch", "Ti/16", "--image-size", 32, "--batch", 4, "--repeats", 1)
    lines = script("train.py", *tiny, "--cache", "--cache-batch", 6, "--chunk", 4, "--files", 16, "--workers", 0)
    assert list(measured(lines)) == ["peer", "bare ViT", "vitembed"]
    bare, peer, step, memory, _, waiting = lines[-6:]
    assert float(bare[3]) > 0
    assert bare[-3:] == ["bar", "is", "1.05"]
    assert float(peer[4]) > 0
    assert step[:7] == ["one", "step", "of", "6", "images,", "4", "at"]
    assert 0.1 < float(memory[8]) <= float(memory[2]) < 4  # before the step, at its peak
    assert waiting[:3] == ["waits", "for", "data:"]
    assert 0 <= float(waiting[3].rstrip("%")) <= 100


def test_merging_has_a_row_for_every_number_of_merged_tokens(script: Script, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    model = Embedder.create("N/4", preprocess=Preprocess(size=(16, 16)), device="cpu")
    model.save_pretrained(tmp_path / "model")
    lines = script("merging.py", tmp_path / "model", tmp_path / "images", "--merge", 1, 2, "--batch", 3, "--repeats", 1)
    rows = lines[-3:]
    assert [words[0] for words in rows] == ["0", "1", "2"]
    assert rows[0][3:] == ["1.0000"] * 3  # cosines of the exact network with itself


def test_parity_has_two_rows_a_family(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [parity.CASES[0], parity.CASES[2]]
    monkeypatch.setattr(parity, "rows", lambda rows=parity.rows: rows(cases))
    parity.main()
    lines = capsys.readouterr().out.splitlines()
    for case in cases:
        assert [line.split()[-3] for line in lines if line.startswith(f"{case.family} ")] == list(map(str, case.sizes))


def test_the_index_benchmark_compares_every_kind_of_search(script: Script, tmp_path: Path) -> None:
    lines = script("index.py", "--rows", 1_500, "--dim", 16, "--kinds", "ivf", "--folder", tmp_path)
    text = [" ".join(words) for words in lines]
    assert any(line.startswith("the same ten ids as IndexFlatIP 200 of 200 singly, 200 in a batch") for line in text)
    assert sum("right 50 of 50" in line for line in text) == 3
    assert [line.split(",")[1] for line in text if line.startswith("ivf,")] == [
        " single",
        " single",
        " batch",
        " batch",
    ]
    assert text[-1].endswith("0 problems")


def test_the_benchmark_of_the_metrics_has_both_sections(script: Script) -> None:
    tiny = ("--rows", 300, "--dim", 8, "--images-per-class", 3, "--peer-rows", 200, "--repeats", 1)
    text = [" ".join(words) for words in script("evaluate.py", *tiny, "--scores", 2_000, "--peer-scores", 1_000)]
    rows = [line for line in text if " s " in line and " GB" in line]
    names = [line.split(" s ")[0].rsplit(" ", 1)[0].strip() for line in rows]
    ours = ["bare product", "recall@k and MAP@R"]
    scores = ["EER", "TAR@FAR"]
    more = ["+ precision@10", "+ vote of 10", "+ full mAP"]
    assert sorted(names) == sorted([*ours, *more, *ours, "peer", *scores, *scores, "peer"])
    assert all(float(line.split(" GB")[0].rsplit(" ", 1)[1]) > 0.01 for line in rows)


def test_what_was_predicted_for_unseen_identities_is_measured(script: Script, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in range(24):
        own = random.integers(0, 255, (8, 8))
        for number in range(8):
            path = tmp_path / "data" / f"{label:02}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = random.normal(0, 10, (8, 8))
            Image.fromarray(np.clip(own + noise, 0, 255).astype(np.uint8)).save(path)
    model = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8), invert=False), pooling="mean", device="cpu")
    model.save_pretrained(tmp_path / "model")
    lines = [" ".join(words) for words in script("unseen.py", tmp_path / "model", tmp_path / "data", "--far", 0.1)]
    assert lines[0].startswith("12 identities for the threshold, 12 others to test it")
    assert lines[3].startswith("| 10% against all | - | ")
    assert lines[3].count("inside") + lines[3].count("OUTSIDE") == 2
    assert lines[-1].startswith("EER by 6 references, rule ")
