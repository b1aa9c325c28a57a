"""`vitembed train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitembed.cli.models import open_model
from vitembed.cli.networks import NETWORK, Binarize, Ink, Pooling, Scan, Stem, new_embedder
from vitembed.cli.output import Device, Json, Seed, Workers, warn
from vitembed.cli.settings_file import Config, settings_text
from vitembed.cli.training_reports import print_plan, print_rate, print_result
from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.training import ImageDataset

Validation = Literal["classes", "images", "none"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Head = Literal["linear", "mlp"]
Optimizer = Literal["adamw", "muon"]
OnCollapse = Literal["stop", "warn"]

LOSS, SETTINGS, THRIFT, SAFETY = "Loss", "Training", "Time and memory", "Safety"  # groups of options in --help


# Long because its signature is the list of the options; what it does are the last forty lines.
def train(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="A folder DATA/CLASS/IMAGE or WRITER/genuine, WRITER/forged; a .csv or .parquet: path,label[,split]; "
            "tar shards such as 'data-{000..099}.tar'; or hf:NAME."
        ),
    ],
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
    ink: Ink = False,
    scan: Scan = False,
    binarize: Binarize = False,
    loss: Annotated[
        str,
        typer.Option(
            help="triplet, contrastive, cross-entropy (to name the classes), distillation (of --teacher), or one of "
            "pytorch-metric-learning's: 'MultiSimilarityLoss(beta=40)'.",
            rich_help_panel=LOSS,
        ),
    ] = "triplet",
    margin: Annotated[float | None, typer.Option(help="Of the triplet loss.", rich_help_panel=LOSS)] = None,
    soft: Annotated[
        bool,
        typer.Option("--soft", help="Triplet loss with the soft margin, which has no number.", rich_help_panel=LOSS),
    ] = False,
    mining: Annotated[
        str | None,
        typer.Option(help="all, hard, semihard, batch-hard, easy-positive or distance-weighted.", rich_help_panel=LOSS),
    ] = None,
    miner: Annotated[
        str | None, typer.Option(help="A miner of pytorch-metric-learning, for its losses.", rich_help_panel=LOSS)
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(min=1, help="Compare with so many embeddings of earlier batches, too.", rich_help_panel=LOSS),
    ] = None,
    memory_warmup: Annotated[
        int, typer.Option(min=0, help="Steps in which that memory only fills.", rich_help_panel=LOSS)
    ] = 0,
    hard_negatives: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="EPOCHS",
            help="Every so many epochs, search all images for the nearest of other classes, and train on these.",
            rich_help_panel=LOSS,
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Of distillation: a model to learn from which images are alike; may be repeated.",
            rich_help_panel=LOSS,
        ),
    ] = None,
    loss_learning_rate: Annotated[
        float | None,
        typer.Option("--loss-lr", help="Of the loss's own parameters, such as proxies.", rich_help_panel=LOSS),
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
    categories_per_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw the classes of a batch from so many categories, the CATEGORY of classes named CATEGORY/CLASS.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    optimizer: Annotated[
        Optimizer,
        typer.Option(help="muon learns faster from nothing, at --lr 5e-3 or so.", rich_help_panel=SETTINGS),
    ] = "adamw",
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", "--lr", help="The highest; 1e-5 to 1e-4 for --init.", rich_help_panel=SETTINGS),
    ] = 1e-3,
    layer_decay: Annotated[
        float, typer.Option(help="Share of the rate of the block above; 0.75 for --init.", rich_help_panel=SETTINGS)
    ] = 1.0,
    frozen_epochs: Annotated[
        int, typer.Option(min=0, help="First epochs that train only what is new to --init.", rich_help_panel=SETTINGS)
    ] = 0,
    ema: Annotated[
        float | None,
        typer.Option(help="Keep a moving average of the weights, such as 0.999.", rich_help_panel=SETTINGS),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many epochs without a better figure.", rich_help_panel=SETTINGS),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="none, ink, ink-strong, photo, photo-strong or faces; by default ink for grey images, else photo.",
            rich_help_panel=SETTINGS,
        ),
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
        typer.Option(help="Share of the patches left out of each training image: faster.", rich_help_panel=THRIFT),
    ] = 0.0,
    gradient_cache: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="IMAGES",
            help="Embed so many at a time: large batches in little memory.",
            rich_help_panel=THRIFT,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=THRIFT),
    ] = False,
    compile_network: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: a slow start, then faster.", rich_help_panel=THRIFT)
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of the arithmetic; auto is bf16 where CUDA has it.", rich_help_panel=THRIFT)
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds of this training.", rich_help_panel=SAFETY)
    ] = False,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="What a crash may cost; an epoch ends with one, too.", rich_help_panel=SAFETY)
    ] = 10.0,
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="And a checkpoint after so many steps.", rich_help_panel=SAFETY)
    ] = None,
    checkpoints_kept: Annotated[int, typer.Option(min=1, help="The latest.", rich_help_panel=SAFETY)] = 2,
    on_collapse: Annotated[
        OnCollapse, typer.Option(help="What to do with a training past hope.", rich_help_panel=SAFETY)
    ] = "stop",
    max_unreadable: Annotated[
        float,
        typer.Option(
            help="Share of images that may be set aside as unreadable; 0.01 allows none below 100.",
            rich_help_panel=SAFETY,
        ),
    ] = 0.01,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be trained, its memory and time.", rich_help_panel=SAFETY),
    ] = False,
    find_rate: Annotated[
        bool,
        typer.Option("--find-lr", help="Print a learning rate that suits, and train nothing.", rich_help_panel=SAFETY),
    ] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help="Send figures to tensorboard, wandb or mlflow; may be repeated.", rich_help_panel=SAFETY),
    ] = None,
    device: Device = None,
    workers: Workers = None,
    seed: Seed = 0,
    config: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that --out holds.")] = False,
    json: Json = False,
) -> None:
    """Train an embedder on labelled images; the epoch that is best on what was held out is kept.

    Example: vitembed train photos/ --out runs/photos --epochs 30

    Example: vitembed train letters/ --out runs/letters --arch N/4 --image-size 28 --ink

    Example: vitembed train birds/ --out runs/birds --init torchvision:vit_b_16 --loss cross-entropy --lr 3e-5

    Example: vitembed train photos/ --out runs/student --loss distillation --teacher runs/a --teacher runs/b

    Example: vitembed train photos/ --out runs/photos --resume
    """
    from vitembed.training import Augment, FineTune, HardNegatives, Safeguards, TrainConfig, load_source
    from vitembed.training import train as train_model
    from vitembed.training.checkpoints import list_checkpoints
    from vitembed.training.distributed import on_main

    network = {"arch": arch, "stem": stem, "image_size": image_size, "pooling": pooling, "dim": dim}
    network |= {"ink": ink or None, "scan": scan or None, "binarize": binarize or None}
    chosen: dict[str, Any] = {name: value for name, value in network.items() if value is not None}
    dataset = load_source(data)
    model = _go_on(init, device, seed, chosen) if init is not None else new_embedder(device, seed, **chosen)
    settings = TrainConfig(
        epochs=epochs,
        classes_per_batch=classes_per_batch,
        images_per_class=images_per_class,
        categories_per_batch=categories_per_batch,
        optimizer=optimizer,
        learning_rate=learning_rate,
        loss_learning_rate=loss_learning_rate,
        fine_tune=FineTune(layer_decay, frozen_epochs),
        ema=ema,
        augment=Augment.named(augment or ("photo" if model.preprocess.channels > 1 else "ink")),
        head=head,
        validation=validation,
        validation_share=validation_share,
        patience=patience,
        hard_negatives=HardNegatives(every=hard_negatives) if hard_negatives else None,
        gradient_cache=gradient_cache,
        patch_dropout=patch_dropout,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_network,
        precision=precision,
        safeguards=Safeguards(checkpoint_steps, checkpoint_minutes, checkpoints_kept, on_collapse, max_unreadable),
        workers=workers,
        seed=seed,
    )
    given = {"margin": margin, "mining": mining, "soft": soft or None, "label_smoothing": label_smoothing}
    arguments = {name: value for name, value in given.items() if value is not None}
    model, loss_function, miner_function = _loss_for(
        model,
        dataset,
        loss,
        arguments,
        teachers=teacher or [],
        miner=miner,
        memory=memory,
        memory_warmup=memory_warmup,
        init=init,
    )
    task: dict[str, Any] = {"loss": loss_function, "miner": miner_function, "config": settings}
    if dry_run or find_rate:
        return print_plan(model, dataset, task, json) if dry_run else print_rate(model, dataset, task, json)
    if resume and not list_checkpoints(out) and on_main():
        warn(f"there is no training in {out} to go on with; it begins")
    result = train_model(
        model,
        dataset,
        **task,
        out=out,
        overwrite=overwrite,
        resume=resume,
        trackers=tracker or (),
        settings=settings_text(context, leave_out=("overwrite", "resume", "json", "dry-run", "find-lr")),
        progress=True,
    )
    if on_main():
        print_result(result, model, out, data, json)
    return None


def _loss_for(
    model: "Embedder",
    dataset: "ImageDataset",
    loss: str,
    arguments: dict[str, Any],
    *,
    teachers: list[str],
    miner: str | None,
    memory: int | None,
    memory_warmup: int,
    init: str | None,
) -> "tuple[Embedder, Any, Any]":
    """Return the model as the loss wants it, the loss, and the miner, which a memory takes over."""
    from vitembed.training import CrossBatchMemory, build_loss, build_miner
    from vitembed.training.learner import needs_logits
    from vitembed.training.losses.distillation import build_distillation

    if teachers:
        loaded = [open_model(name, str(model.device)) for name in teachers]
        function: Any = build_distillation(loss, loaded, **arguments)
    else:
        function = build_loss(loss, num_classes=len(dataset.classes), embedding_size=model.dim, **arguments)
    chooser: Any = build_miner(miner) if miner else None
    if memory is not None:
        function, chooser = CrossBatchMemory(function, size=memory, miner=chooser, warmup=memory_warmup), None
    elif memory_warmup:
        raise ConfigError("--memory-warmup is of a cross-batch memory; add --memory with a number of embeddings")
    if init is not None and needs_logits(function) and model.network.projection is not None:
        model = model.replace(projection=False)
        warn(f"the projection of {init} is left out: {loss} trains the CLS token, which it would hide")
    return model, function, chooser


def _go_on(init: str, device: str | None, seed: int, chosen: dict[str, Any]) -> "Embedder":
    """Load the model to go on from, which decides on its network but for the size of the images and a projection."""
    image_size, dim = chosen.pop("image_size", None), chosen.pop("dim", None)
    if chosen:
        options = ", ".join("--" + name.replace("_", "-") for name in chosen)
        raise ConfigError(f"--init takes the network of {init} as it is; leave {options} out")
    model = open_model(init, device)
    if image_size is None and dim is None:
        return model
    return model.replace(image_size=image_size, projection=dim, seed=seed)
