"""A name becomes files on this machine: folders, files, torchvision's weights, models of the Hugging Face hub.

Nothing is guessed twice: "ink" is the model that ships with vitembed, wherever it is asked for; a path that exists is
that path; "torchvision:", "timm:" and "hf-hub:" say what follows; any other "owner/name" is a model of the hub, through
its cache, also without a network (HF_HUB_OFFLINE=1).
"""

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torch import Tensor

from vitembed.errors import CheckpointError, MissingExtraError, unknown_name
from vitembed.weights import configs, processing
from vitembed.weights.checkpoint import Described
from vitembed.weights.shipped import SHIPPED, shipped_folder, warn_of_namesake
from vitembed.weights.store import is_saved_model
from vitembed.weights.tensors import FILE_GROUPS, SUFFIXES

TORCHVISION_HEADS = {"vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 16, "vit_l_32": 16, "vit_h_14": 16}

_TORCHVISION, _TIMM, _HUB = "torchvision:", "timm:", "hf-hub:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's weights are.

    Attributes:
        name: what a user calls it.
        path: a folder or a file; None for torchvision's weights, which are one entry of an enumeration.
        weights: that entry.
        revision: the commit of a hub model.
    """

    name: str
    path: Path | None = None
    weights: Any = None
    revision: str | None = None


def resolve(name: str | os.PathLike[str]) -> Source:
    """Find what a name stands for, and fetch it if it lies on the hub.

    Args:
        name: "ink", which ships with vitembed; a folder or file; "torchvision:vit_b_16" or
            "torchvision:vit_b_16:IMAGENET1K_SWAG_E2E_V1"; "timm:vit_small_patch16_224.dino"; "owner/name" or
            "hf-hub:owner/name", with "@revision" if wanted. A model in a local folder `ink` is "./ink" or a `Path`;
            "ink" alone stays the one that ships, so that what an index records means the same everywhere, and warns.

    Raises:
        CheckpointError: if there is no such thing, or the hub cannot be reached and its cache does not have it.
    """
    text = os.fspath(name)
    if text.startswith(_TORCHVISION):
        return _torchvision(text)
    if text.startswith(_TIMM):
        return _hub(f"timm/{_with_tag(text.removeprefix(_TIMM))}", text)
    if text.startswith(_HUB):
        return _hub(text.removeprefix(_HUB), text)
    if isinstance(name, str) and name in SHIPPED:
        warn_of_namesake(name)
        return Source(text, shipped_folder(name))
    path = Path(text)
    if path.exists():
        return Source(text, path)
    if isinstance(name, str) and _HUB_ID.fullmatch(text) and path.suffix not in SUFFIXES:
        return _hub(text, text)
    what = "file" if path.suffix in SUFFIXES else "model folder"
    known = f"or name one that ships with vitembed: {', '.join(SHIPPED)}"
    raise CheckpointError(f"there is no {what} {text}; train one with: vitembed train DATA --out {text}; {known}")


def torchvision_state(source: Source) -> Mapping[str, Tensor]:
    """Fetch the weights of torchvision, checked against the hash in their name; they stay in torch's own cache.

    Raises:
        CheckpointError: if they are not in the cache and cannot be fetched.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub says there what it fetches, and ours is for results
            state: Mapping[str, Tensor] = source.weights.get_state_dict(
                progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
    except (URLError, OSError, RuntimeError) as error:  # the last for a hash that does not fit
        url = source.weights.url
        raise CheckpointError(
            f"cannot fetch {source.name} ({_first_line(error)}); download {url} elsewhere and put it into "
            "$TORCH_HOME/hub/checkpoints (by default ~/.cache/torch)"
        ) from error
    return state


def describe_torchvision(source: Source) -> Described:
    """Return what torchvision's table of weights says beside them."""
    meta = source.weights.meta
    return Described(
        image_size=(meta["min_size"][0], meta["min_size"][1]),
        heads=TORCHVISION_HEADS[source.name.split(":")[1]],
        norm_eps=1e-6,
        mlp="gelu",
        preprocess=processing.from_torchvision(source.weights.transforms()),
        licence=meta.get("license"),
    )


def _torchvision(text: str) -> Source:
    model, _, tag = text.removeprefix(_TORCHVISION).partition(":")
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise MissingExtraError("weights of torchvision", "torchvision") from error
    if model not in TORCHVISION_HEADS:
        raise CheckpointError(str(unknown_name("ViT of torchvision", model, TORCHVISION_HEADS)))
    entries = get_model_weights(model).__members__
    if tag and tag not in entries:
        raise CheckpointError(str(unknown_name(f"weights of {model}", tag, entries)))
    entry = entries[tag or "DEFAULT"]
    return Source(f"{_TORCHVISION}{model}:{entry.name}", weights=entry)


def _with_tag(name: str) -> str:
    """Return NAME.TAG, as hub models of timm are called; timm itself knows the tag that is left out.

    Raises:
        CheckpointError: if the tag is left out and timm is not installed, or does not know the name.
    """
    if "." in name:
        return name
    try:
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise CheckpointError(
            f"timm:{name} names no weights; say which, such as timm:{name}.augreg_in21k, or install timm"
        ) from error
    settings = get_pretrained_cfg(name, allow_unregistered=True)
    if settings is None or not settings.tag:
        raise CheckpointError(f"timm has no pre-trained weights for {name!r}; give their name, timm:NAME.TAG")
    return f"{name}.{settings.tag}"


def _hub(identifier: str, name: str) -> Source:
    """Fetch a hub model: its small configuration first, which may say that it is none for us, then its weights."""
    repository, _, revision = identifier.partition("@")
    folder = _fetch(repository, revision, list(configs.FILES), name)
    if not is_saved_model(folder):  # ours is described in the header of its weights
        configs.describe_folder(folder)
    for group in FILE_GROUPS:  # fetched only if those before it brought nothing
        shards = [f"{Path(file).stem}-*{Path(file).suffix}" for file in group[:1]]  # which an index names
        folder = _fetch(repository, revision, [*group, *shards], name)
        if any((folder / file).is_file() for file in group):
            return Source(name, folder, revision=folder.name)
    raise CheckpointError(f"the hub's {repository} holds no weights that are known; expected model.safetensors")


def _fetch(repository: str, revision: str, patterns: list[str], name: str) -> Path:
    """Bring files of a hub model into the hub's cache, and return the folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub's library hands on whatever its HTTP library raises
        nothing = f"there is no folder {name}, and the hub's {repository}" if name == repository else repository
        raise CheckpointError(
            f"{nothing} could not be had: {_reason(error)}; download it elsewhere and pass its folder, or set HF_HOME "
            "to a cache that has it"
        ) from error


def _reason(error: Exception) -> str:
    """Say in a few words why a model of the hub could not be had."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its authors give it only to those who ask (log in with: hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no public model of that name (for a private one log in with: hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "it is not in the local cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
