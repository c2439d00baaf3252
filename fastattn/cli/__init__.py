"""The `fastattn` command. Each subcommand is a module with `register(app)` that imports what is heavy when run."""

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import typer

# Mistakes a person can mend: shown as one line. Anything else is a bug and keeps its traceback.
_EXPECTED = (ValueError, NotImplementedError, OSError, ModuleNotFoundError)


def build_app() -> typer.Typer:
    """The typer app with every subcommand of this package."""
    app = typer.Typer(
        name="fastattn",
        help="Train and run small models on fastattn's ops, tune its kernels, and see what a machine gets.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    app.callback()(_options)
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"{__name__}.{module}").register(app)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 0, 2 for a mistake in what was asked or given, 130 for Ctrl-C."""
    try:
        build_app()(args=argv, prog_name="fastattn")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except _EXPECTED as error:
        if os.environ.get("FASTATTN_LOG", "").lower() == "debug":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        import fastattn

        print(f"fastattn {fastattn.__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    pass
