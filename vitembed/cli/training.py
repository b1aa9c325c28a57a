"""`vitembed train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitembed.cli.models import open_model
from vitembed.cli.networks import NETWORK, Pooling, Stem, new_embedder
from vitembed.cli.output import Device, Json, Seed, Workers, print_figures, print_json, warn
from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder

Validation = Literal["classes", "images", "none"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Head = Literal["linear", "mlp"]

LOSS, SETTINGS = "Loss", "Training"  # groups of options in --help


def train(
    data: Annotated[Path, typer.Argument(help="A folder DATA/CLASS/IMAGE, or a .csv or .parquet: path,label[,split].")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    init: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Go on from this model, with its architecture: a folder, torchvision:vit_b_16, a hub id, a file.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="Size/patch: N Ti S B L H; S/16 by default, N/4 for small images. Or timm:NAME.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    stem: Annotated[
        Stem | None,
        typer.Option(help="linear, or conv (the default): learns faster from few images.", rich_help_panel=NETWORK),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side in pixels; 224, or that of --init, by default.", rich_help_panel=NETWORK),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(help="The CLS token (the default) or the mean of the patches.", rich_help_panel=NETWORK),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the embedding; that of the network by default.", rich_help_panel=NETWORK),
    ] = None,
    ink: Annotated[
        bool,
        typer.Option(
            "--ink", help="Dark ink on white: grey, inverted, padded; --augment ink.", rich_help_panel=NETWORK
        ),
    ] = False,
    loss: Annotated[
        str,
        typer.Option(
            help="triplet, contrastive, cross-entropy (to name the classes), or one of pytorch-metric-learning's: "
            "'MultiSimilarityLoss(beta=40)'.",
            rich_help_panel=LOSS,
        ),
    ] = "triplet",
    margin: Annotated[float | None, typer.Option(help="Of the triplet loss.", rich_help_panel=LOSS)] = None,
    mining: Annotated[str | None, typer.Option(help="all, hard or semihard.", rich_help_panel=LOSS)] = None,
    miner: Annotated[
        str | None, typer.Option(help="A miner of pytorch-metric-learning, for its losses.", rich_help_panel=LOSS)
    ] = None,
    head: Annotated[
        Head | None,
        typer.Option(help="Of cross-entropy: linear (the default), or mlp for a hidden layer.", rich_help_panel=LOSS),
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Of cross-entropy: share of the target spread evenly.", rich_help_panel=LOSS)
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.", rich_help_panel=SETTINGS)] = 20,
    classes_per_batch: Annotated[
        int, typer.Option(min=2, help="P: classes that meet in a batch.", rich_help_panel=SETTINGS)
    ] = 32,
    images_per_class: Annotated[int, typer.Option(min=2, help="K: images of each.", rich_help_panel=SETTINGS)] = 4,
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", "--lr", help="The highest; 1e-5 to 1e-4 for --init.", rich_help_panel=SETTINGS),
    ] = 1e-3,
    augment: Annotated[
        str | None,
        typer.Option(help="none, ink or photo; by default ink for grey images, else photo.", rich_help_panel=SETTINGS),
    ] = None,
    validation: Annotated[
        Validation | None,
        typer.Option(
            help="Hold out classes (never seen in training; the default), images (that of cross-entropy), or none.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    validation_share: Annotated[float, typer.Option(help="How much is held out.", rich_help_panel=SETTINGS)] = 0.2,
    patch_dropout: Annotated[
        float,
        typer.Option(help="Share of the patches left out of each training image: faster.", rich_help_panel=SETTINGS),
    ] = 0.0,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=SETTINGS),
    ] = False,
    compile_network: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: a slow start, then faster.", rich_help_panel=SETTINGS)
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of the arithmetic; auto is bf16 where CUDA has it.", rich_help_panel=SETTINGS)
    ] = "auto",
    device: Device = None,
    workers: Workers = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that --out holds.")] = False,
    json: Json = False,
) -> None:
    """Train an embedder on labelled images; the epoch that is best on what was held out is kept.

    Example: vitembed train photos/ --out runs/photos --epochs 30

    Example: vitembed train letters/ --out runs/letters --arch N/4 --image-size 28 --ink

    Example: vitembed train birds/ --out runs/birds --init torchvision:vit_b_16 --loss cross-entropy --lr 3e-5
    """
    from dataclasses import replace

    from vitembed.training import Augment, ImageDataset, TrainConfig, build_loss, build_miner
    from vitembed.training import train as train_model
    from vitembed.training.learner import needs_logits

    network = {"arch": arch, "stem": stem, "image_size": image_size, "pooling": pooling, "dim": dim, "ink": ink or None}
    chosen: dict[str, Any] = {name: value for name, value in network.items() if value is not None}
    settings = TrainConfig(
        epochs=epochs,
        classes_per_batch=classes_per_batch,
        images_per_class=images_per_class,
        learning_rate=learning_rate,
        head=head,
        validation=validation,
        validation_share=validation_share,
        patch_dropout=patch_dropout,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_network,
        precision=precision,
        workers=workers,
        seed=seed,
    )
    dataset = ImageDataset.load(data)
    model = _go_on(init, device, chosen) if init is not None else new_embedder(device, seed, **chosen)
    settings = replace(
        settings, augment=Augment.named(augment or ("photo" if model.preprocess.channels > 1 else "ink"))
    )
    given = {"margin": margin, "mining": mining, "label_smoothing": label_smoothing}
    loss_function = build_loss(
        loss,
        num_classes=len(dataset.classes),
        embedding_size=model.dim,
        **{name: value for name, value in given.items() if value is not None},
    )
    if init is not None and needs_logits(loss_function) and model.network.projection is not None:
        model = model.replace(projection=False)
        warn(f"the projection of {init} is left out: {loss} trains the CLS token, which it would hide")
    result = train_model(
        model,
        dataset,
        loss=loss_function,
        miner=build_miner(miner) if miner else None,
        config=settings,
        out=out,
        overwrite=overwrite,
        progress=True,
    )
    figures: dict[str, Any] = {
        "model": str(out),
        "best epoch": result.best_epoch,
        "validation recall@1": result.recall_at_1,
    }
    if "accuracy" in result.history[0]:
        figures["validation accuracy"] = result.accuracy
    if result.recall_at_1 is None:
        warn("nothing was held out, so nothing is known of how well the model does on new images")
    if json:
        print_json({**figures, "history": result.history, "fingerprint": model.fingerprint})
    else:
        print_figures(figures)
        held_out = " --held-out" if model.provenance["held-out classes"] else ""
        typer.echo(f"\nNext: vitembed evaluate {out} {data}{held_out}")


def _go_on(init: str, device: str | None, chosen: dict[str, Any]) -> "Embedder":
    """Load the model to go on from, which decides on the network by itself, but for the size of the images."""
    image_size = chosen.pop("image_size", None)
    if chosen:
        options = ", ".join("--" + name.replace("_", "-") for name in chosen)
        raise ConfigError(f"--init takes the network of {init} as it is; leave {options} out")
    model = open_model(init, device)
    return model if image_size is None else model.replace(image_size=image_size)
