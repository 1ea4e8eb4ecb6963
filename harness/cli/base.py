"""What all commands share: the group that reports errors, and options that mean the same."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import click

from harness.errors import UserError, extra_missing, output_error, reason_of
from spectra_db.errors import DatasetError, HubError
from spectra_db.words import PARTITIONS

STOPPED = 130  # what a shell reports after Ctrl-C
# Of options: any path, a file, a folder, and a folder that is there.
PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING = click.Path(file_okay=False, exists=True, path_type=Path)


class _Group(click.Group):
    """Turns errors into one line: exit code 2 for what the user can mend, 1 for failures."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command line and exit; HARNESS_TRACEBACK=1 raises what failed."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # a question mark for what a terminal lacks
                stream.reconfigure(errors="replace")
        try:
            sys.exit(super().main(*args, **(extra | {"standalone_mode": False})) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort as error:
            if isinstance(error.__cause__, EOFError):  # nobody's wish, though click takes it so
                _fail(f"a file or pipe ended early: {error.__cause__}", 1)
            why = ", or another process of the job was lost" if processes() > 1 else ""
            kept = "what was finished is kept, the same command continues."
            click.echo(f"Stopped{why}: {kept}", err=True)
            sys.exit(STOPPED)
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if os.environ.get("HARNESS_TRACEBACK"):
                raise
            if said := extra_missing(error, "this command"):
                _fail(said, 1)
            ours = isinstance(error, UserError | DatasetError)
            if stop := output_error(getattr(error, "filename", None) or "the output", error):
                error = stop
            elif isinstance(error, RuntimeError) and not isinstance(error, HubError):  # no memory
                _fail(reason_of(error).removeprefix("RuntimeError: "), 1)
            _fail(str(error) or type(error).__name__, 2 if ours else 1)


def processes() -> int:
    """Return how many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def choice(name: str, *choices: str) -> Callable[[Any], Any]:
    """Add an option that takes one of some words, the first by default."""
    return click.option(
        f"--{name}", type=click.Choice(choices), default=choices[0], show_default=True
    )


class LateChoice(click.Choice[str]):
    """One of some words that stand in a module that takes long to import: read when needed."""

    def __init__(self, read: Callable[[], Sequence[str]]) -> None:
        self._read, self.case_sensitive = read, True

    @property
    def choices(self) -> Sequence[str]:  # type: ignore[override]
        """The words."""
        return self._read()


def writable(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Return the folder; make sure, writing nothing yet, that it can be made and written to."""
    if value is None:
        return None
    existing = next(path for path in [value, *value.absolute().parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return value
    except OSError as error:
        raise UserError(f"--out {value} can't be written to: {error.strerror}") from error


def _needed(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Return the folder as `writable` does; without --dry-run there must be one."""
    if value is None and not ctx.params.get("dry_run"):
        raise click.MissingParameter(ctx=ctx, param=param)
    return writable(ctx, param, value)


def options(*names: str) -> Callable[[Any], Any]:
    """Add options that mean the same in every command."""
    known = {
        "registry": click.option(
            "--registry", type=FOLDER, help="Folder of further entry files; they are executed."
        ),
        "data_root": click.option(
            "--data-root",
            envvar="HARNESS_DATA_ROOT",
            type=FOLDER,
            help="Folder of data sets.  [env: HARNESS_DATA_ROOT]",
        ),
        "partition": click.option(
            "--partition",
            type=click.Choice(PARTITIONS),
            help="How the model is cut into blocks.  [default: the entry's]",
        ),
        "out": click.option(
            "--out",
            type=PATH,
            callback=_needed,
            help="Folder to write to.  [required]",
        ),
        "source": click.option(
            "--source", type=PATH, help="Folder of tables.  [default: the release]"
        ),
        "seed": click.option(
            "--seed",
            default=1,
            show_default=True,
            type=click.IntRange(0, 2**31),
            help="Seeds initialisation, training run and probes.",
        ),
        "device": click.option(
            "--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda where there is]"
        ),
        "log": click.option(
            "--log",
            type=FILE,
            help="File that JSON lines of what happens are appended to; /dev/stderr shows them.",
        ),
        "json": click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    }

    def add(function: Any) -> Any:
        for name in reversed(names):
            function = known[name](function)
        return function

    return add


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hessian-spectra")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Compute Hessian spectra of neural networks, and the dataset made of them."""
    if processes() > 1 and ctx.invoked_subcommand != "spectrum":
        raise UserError(
            f"`{ctx.invoked_subcommand}` runs in {processes()} processes of torchrun, which would "
            "all do the same: only `spectrum` shares its work among them"
        )
    # A stop asked for by the system is a stop asked for by the user.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def device_of(device: str | None) -> str:
    """Return the device asked for; CUDA where there is a GPU and none was named."""
    import torch

    from harness.estimator.device import choose_device

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    choose_device(torch.nn.Module(), device)
    return device
