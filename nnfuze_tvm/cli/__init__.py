"""``nnfuze``: arguments in, results printed. One file per verb; what the verbs do is in `jobs` and `deploy`.

A module of `verbs` is a verb: it has a function ``command``, whose docstring is its help, or a Typer application
``app``; ``EXAMPLES`` is printed below its help, and ``POSITION`` is its place in the list of verbs. A new verb is a new
file.
"""

from __future__ import annotations

import math
import pkgutil
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module, metadata
from types import ModuleType
from typing import Annotated, Any

import typer

from nnfuze_tvm.cli import crash, guard, verbs
from nnfuze_tvm.cli.console import interruption
from nnfuze_tvm.cli.options import spread
from nnfuze_tvm.devices import scratch
from nnfuze_tvm.errors import InputError, NNFuzeError, printable

# TVM takes seconds to import, so verbs import what they need when they run: `--help` answers at once.

# Typer carries its own copy of click; this is where its usage errors come from.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Entry point of the command ``nnfuze``."""
    arguments = sys.argv[1:]
    # Servers run what others send in processes of its own.
    code, message = (run(), "") if arguments[:1] == ["devices"] else guard.run(run, arguments)
    if message:
        _say(message)
    # Under `-m`, Python ends by SIGINT, whatever the code, where Ctrl-C came while text was being run, as happens in
    # imports that make data classes. To run another text is what makes it forget that.
    exec("")
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or an error's with one line on stderr that says why."""
    arguments = sys.argv[1:] if arguments is None else arguments
    interruption.came = False
    in_main = threading.current_thread() is threading.main_thread()
    ends = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    previous = {number: signal.signal(number, interruption.handle) for number in ends}
    # Boards' servers may become another user, and have folders of their own.
    temporary = scratch.everything() if in_main and arguments[:1] != ["devices"] else nullcontext()
    try:
        with temporary:
            code, message = _run(arguments)
    except KeyboardInterrupt:
        code, message = guard.interrupted(arguments)
    except Exception as error:
        code, message = 2, guard.OUT_OF_MEMORY
        # Where C++ finds no memory, TVM makes its own error of it.
        if "bad_alloc" not in str(error) and not interruption.came:
            message = crash.note(error, arguments)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        interruption.end()
    if not code:
        return 0
    if interruption.came:
        # It looks like something else by then: a linker that failed, an import that broke.
        code, message = guard.interrupted(arguments)
    if message:
        _say(message)
    return code


def _say(message: str) -> None:
    print(printable(f"error: {message}"), file=sys.stderr)


def find_verbs() -> dict[str, ModuleType]:
    """Return the verbs by name, in the order in which ``--help`` lists them."""
    found = [import_module(f"{verbs.__name__}.{info.name}") for info in pkgutil.iter_modules(verbs.__path__)]
    found.sort(key=lambda module: (getattr(module, "POSITION", math.inf), module.__name__))
    return {module.__name__.rpartition(".")[2].replace("_", "-"): module for module in found}


def _application(chosen: str | None) -> typer.Typer:
    """Return the command line of the chosen verb, or of all, then without the options that only TVM knows."""
    application = typer.Typer(
        name="nnfuze",
        help="Merge several trained networks into one, compress it, tune it on the device, and run it.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback()(_common)
    found = find_verbs()
    for name, verb in found.items():
        if chosen in found and name != chosen:
            continue
        if hasattr(verb, "app"):
            application.add_typer(verb.app, name=name)
        else:
            command = spread(verb.command, complete=name == chosen)
            application.command(name, epilog=getattr(verb, "EXAMPLES", None))(command)
    return application


def _version(asked: bool) -> None:
    if asked:
        print(f"nnfuze {metadata.version('nnfuze-tvm')}, TVM {metadata.version('apache-tvm')}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Take what goes before the verb."""


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """Run the command line; return the exit code and what to print ("" if there is nothing to say)."""
    try:
        _check_text(arguments)
        application = _application(arguments[0] if arguments else None)
        code = application(arguments, prog_name="nnfuze", standalone_mode=False)
        return (2 if isinstance(code, int) and code else 0), ""
    except NNFuzeError as error:
        return error.exit_code, str(error)
    except typer.Exit as error:
        return (2 if error.exit_code else 0), ""
    except typer.Abort:
        return guard.interrupted(arguments)
    except _USAGE_ERROR as error:
        return 2, _usage(error)
    except BrokenPipeError:
        sys.stderr.close()
        return 2, ""
    except MemoryError:
        return 2, guard.OUT_OF_MEMORY
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"{where}{error.strerror or error}"


def _check_text(arguments: Sequence[str]) -> None:
    """Check that arguments are what all that they go to can take: files' names, and strings of C++."""
    for text in arguments:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"argument {text!r:.60}: not UTF-8") from None
        if "\0" in text:
            raise InputError(f"argument {text!r:.60}: holds a NUL")


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return ""
    command = context.command_path if context is not None else "nnfuze"
    return f"{error.format_message().rstrip('.')}; see {command} --help"
