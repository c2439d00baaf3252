"""The `fastattn` command. Each subcommand is a module with `register(app)` that imports what is heavy when run."""

import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence

import typer

HELP = {"help_option_names": ["-h", "--help"]}  # of every command

# Mistakes a person can mend: shown as one line. Anything else is a bug and keeps its traceback.
_EXPECTED = (ValueError, NotImplementedError, OSError, ModuleNotFoundError)


def build_app() -> typer.Typer:
    """The typer app with every subcommand of this package."""
    app = typer.Typer(
        name="fastattn",
        help="Train and run small models on fastattn's ops, tune its kernels, and see what a machine gets.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=HELP,
    )
    app.callback()(_options)
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"{__name__}.{module}").register(app)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 0, 2 for a mistake in what was asked or given, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes that are no UTF-8
    try:
        build_app()(args=argv, prog_name="fastattn")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except _EXPECTED as error:
        if os.environ.get("FASTATTN_LOG", "").lower() == "debug":
            raise
        print(f"error: {_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error) or os.environ.get("FASTATTN_LOG", "").lower() == "debug":
            raise
        print(f"error: out of memory: {_line(str(error))}", file=sys.stderr)
        sys.exit(2)


def _line(text: str) -> str:
    """One line, in which what would move a terminal's cursor is spelled out: files are named and quoted in errors."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def _is_memory(error: Exception) -> bool:
    """torch's allocator on the CPU raises RuntimeError, on a GPU one that is named for it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _show_version(wanted: bool) -> None:
    if wanted:
        import fastattn

        print(f"fastattn {fastattn.__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False,
        "--version",
        help="Show the version and exit.",
        is_eager=True,
        callback=_show_version,
        metavar="",
    ),
) -> None:
    pass
