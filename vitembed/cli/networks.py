"""What the training commands share: the options of a network, and making one."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder

Stem = Literal["linear", "conv"]
Pooling = Literal["cls", "mean"]

NETWORK = "Network"  # the group of these options in --help

Ink = Annotated[
    bool,
    typer.Option("--ink", help="Dark ink on white: grey, inverted, padded; --augment ink.", rich_help_panel=NETWORK),
]
Scan = Annotated[
    bool,
    typer.Option(
        "--scan",
        help="Scans or photographs of ink: ground removed, cropped to the ink and centred; implies --ink.",
        rich_help_panel=NETWORK,
    ),
]
Binarize = Annotated[
    bool,
    typer.Option(
        "--binarize",
        help="With --scan: the ink that is found is made black, so that its darkness is not seen.",
        rich_help_panel=NETWORK,
    ),
]


def new_embedder(
    device: str | None,
    seed: int,
    *,
    arch: str = "S/16",
    stem: Stem | None = None,
    image_size: int = 224,
    pooling: Pooling = "cls",
    dim: int | None = None,
    ink: bool = False,
    scan: bool = False,
    binarize: bool = False,
) -> "Embedder":
    """Make an untrained model.

    Args:
        device: None for the first accelerator there is.
        seed: of the weights.
        arch: a size of ours, or "timm:NAME".
        stem: of a size of ours; None for "conv".
        image_size: side in pixels.
        pooling: see `Embedder.create`.
        dim: see `Embedder.create`.
        ink: whether the images are dark ink on white.
        scan: whether they are scans or photographs of ink, whose ground is removed; implies `ink`.
        binarize: whether their ink is made black; needs `scan`.

    Raises:
        ConfigError: if the options do not go together.
        MissingExtraError: for "timm:NAME" without timm.
    """
    from vitembed.embedder import Embedder
    from vitembed.preprocess import Preprocess

    if binarize and not scan:
        raise ConfigError("--binarize makes the ink black that --scan finds: add --scan")
    foreign = arch.startswith("timm:")
    if foreign and stem is not None:
        raise ConfigError(f"--stem is for a size such as S/16; {arch} has its own, so leave --stem out")
    size = (image_size, image_size)
    return Embedder.create(
        arch,
        preprocess=Preprocess.grey(size, scan=scan, binarize=binarize) if ink or scan else Preprocess(size),
        stem="linear" if foreign else stem or "conv",  # linear is what `create` takes for no word of it
        pooling=pooling,
        dim=dim,
        seed=seed,
        device=device,
    )
