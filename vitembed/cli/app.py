"""The `vitembed` command: its subcommands, and what happens when one of them fails.

Contract, for every command: results go to standard output, with --json as one JSON document; progress and errors go to
standard error; an error is one line and exit status 2, whatever went wrong. Commands import what they need when they
run, so that `--help` answers at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vitembed import __version__
from vitembed.cli import (
    enrolling,
    evaluating,
    explaining,
    exporting,
    indexing,
    looking,
    pretraining,
    searching,
    syncing,
    training,
    transferring,
    verifying,
)
from vitembed.cli.demo import demo
from vitembed.cli.doctor import doctor
from vitembed.errors import VitembedError

# 128 + the signal, as shells report it.
INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143

app = typer.Typer(
    name="vitembed",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitembed {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train a Vision Transformer to embed images, search the embeddings, and decide whether two images match.

    Example: vitembed demo
    """


app.command()(demo)
app.command()(training.train)
app.command()(pretraining.pretrain)
app.command()(evaluating.evaluate)
app.command()(evaluating.embed)
app.command()(searching.search)
app.command()(looking.duplicates)
app.command()(looking.cluster)
app.command("map")(looking.map_entries)
app.command()(verifying.calibrate)
app.command()(verifying.verify)
app.command()(enrolling.enroll)
app.command()(enrolling.identify)
app.command()(explaining.explain)
app.command()(exporting.export)
app.command()(doctor)
indexing.index_app.command()(syncing.sync)
indexing.index_app.command()(syncing.migrate)
indexing.index_app.command("export")(transferring.export_index)
indexing.index_app.command("import")(transferring.import_index)
app.add_typer(indexing.index_app, name="index")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process.

    Args:
        arguments: what was typed after `vitembed`; None for the process's own.
    """
    # An exception and not a sudden death, so that temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 a "no" or a fault found, 2 an error, 3 unsure."""
    if "" in (sys.argv[1:] if arguments is None else arguments):  # it would stand for the current folder
        return _fail("an argument is empty; is a variable of your shell not set?")
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="vitembed", standalone_mode=False)
    except VitembedError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        message = error.format_message()
        return _fail(message) if message else 0  # without arguments a group shows its help, which is no error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except SystemExit as error:
        if isinstance(error.__context__, VitembedError):  # what was put in order when the signal came
            typer.echo(f"vitembed: {error.__context__}", err=True)
        return PIPE_CLOSED if error.code == 1 else TERMINATED  # typer's word for a reader that went away is 1
    except Exception as error:  # a bug, or something that no library has a name for: never a status with a meaning
        if os.environ.get("VITEMBED_TRACEBACK"):
            raise
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
            return _fail("out of memory; take smaller batches, images or a smaller network")
        return _fail(f"unexpected {type(error).__name__}: {error}; VITEMBED_TRACEBACK=1 shows where")
    if status == INTERRUPTED:
        typer.echo("vitembed: interrupted", err=True)
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    line = " ".join(message.split())
    typer.echo(f"vitembed: error: {line}", err=True)
    return 2
