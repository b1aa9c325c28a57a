"""What `vitembed doctor` looks at: versions, devices, threads, OpenMP runtimes, caches; and what to do about it."""

import os
import platform
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vitembed import __version__

# Distribution -> what it is for; the first group is always installed.
_REQUIRED = ("torch", "faiss-cpu", "numpy", "pillow", "accelerate", "safetensors", "scikit-learn", "matplotlib")
_EXTRAS = {
    "pytorch-metric-learning": "metric-learning",
    "pyarrow": "parquet",
    "torchvision": "torchvision",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what.
        ok: whether it is as it should be.
        found: what is there.
        advice: what to do; empty where nothing needs doing.
    """

    topic: str
    ok: bool
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything. Imports torch, FAISS and scikit-learn, as whoever uses vitembed does."""
    return [
        Finding("vitembed", True, f"{__version__} on Python {platform.python_version()}, {platform.platform()}"),
        *_versions(),
        _devices(),
        _threads(),
        _openmp(),
        *_caches(),
    ]


def _versions() -> list[Finding]:
    findings = []
    for name in _REQUIRED:
        version = _version(name)
        advice = "" if version else f"it is required: pip install {name}"
        findings.append(Finding(name, version is not None, version or "not installed", advice))
    for name, extra in _EXTRAS.items():
        version = _version(name)
        advice = "" if version else f"if you need it: pip install 'vitembed[{extra}]'"
        findings.append(Finding(name, True, version or "not installed (optional)", advice))
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("devices", True, ", ".join(f"cuda:{i} {name}" for i, name in enumerate(names)))
    if torch.backends.mps.is_available():
        return Finding("devices", True, "mps")
    if Path("/dev/nvidia0").exists():
        advice = f"torch {torch.__version__} does not reach the GPU: install a driver for CUDA {torch.version.cuda}"
        return Finding("devices", False, "an NVIDIA GPU that torch cannot use", advice)
    return Finding("devices", True, "cpu alone", "training large models needs a GPU; small ones train here")


def _threads() -> Finding:
    import torch

    from vitembed.decoding import available_cores

    cores = available_cores()
    threads = torch.get_num_threads()
    found = f"{threads} threads of torch on {cores} cores"
    if threads > cores:
        return Finding(
            "threads", False, found, f"more threads than cores slow each other down: OMP_NUM_THREADS={cores}"
        )
    if threads < cores:
        return Finding("threads", True, found, "cores lie idle on purpose? else unset OMP_NUM_THREADS")
    return Finding("threads", True, found)


def _openmp() -> Finding:
    """Count the OpenMP runtimes that one process loads: two of different makers can hang or slow each other down."""
    import faiss  # noqa: F401 - loaded to see what it brings
    import sklearn  # noqa: F401
    import torch  # noqa: F401
    from threadpoolctl import threadpool_info

    runtimes = [info for info in threadpool_info() if info["user_api"] == "openmp"]
    kinds = sorted({info["prefix"] for info in runtimes})
    found = ", ".join(Path(info["filepath"]).name for info in runtimes) or "none seen"
    if len(kinds) > 1:
        advice = (
            f"{' and '.join(kinds)} in one process can hang or crash: install torch and faiss from one source, "
            "or set OMP_NUM_THREADS=1"
        )
        return Finding("OpenMP", False, found, advice)
    if len(runtimes) > 1:
        advice = "copies of one runtime: harmless, but each has threads of its own; OMP_NUM_THREADS limits them all"
        return Finding("OpenMP", True, found, advice)
    return Finding("OpenMP", True, found)


def _caches() -> list[Finding]:
    home = Path.home()
    folders = {
        "temporary files": Path(tempfile.gettempdir()),
        "Hugging Face cache": Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface")),
        "torch cache": Path(os.environ.get("TORCH_HOME", home / ".cache" / "torch")),
        "matplotlib cache": Path(os.environ.get("MPLCONFIGDIR", home / ".cache" / "matplotlib")),
    }
    variables = {"temporary files": "TMPDIR", "Hugging Face cache": "HF_HOME", "torch cache": "TORCH_HOME"}
    findings = []
    for topic, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        ok = os.access(existing, os.W_OK)
        advice = "" if ok else f"make it writable, or set {variables.get(topic, 'MPLCONFIGDIR')} to a folder that is"
        findings.append(Finding(topic, ok, f"{folder}{'' if ok else ' cannot be written'}", advice))
    return findings
