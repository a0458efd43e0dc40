"""Parses the command line, runs one command and turns every outcome into a result and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from sartor import __version__
from sartor.cli.output import Result, Stdout, error_document, to_json
from sartor.errors import EXIT_INTERNAL, EXIT_USAGE, InternalError, SartorError, UsageError

COMMANDS = {
    "fit": "fit a model to a budget: the main job",
    "sensitivity": "the score that is left when one group or block goes: profile before you cut",
    "inspect": "operators, cost, channel groups and blocks of a model",
    "capture": "write the canonical ONNX model of a module or an ONNX file",
    "run": "run a pipeline of passes",
    "apply": "replay a plan, byte-identically",
    "recover": "train a pruned model with the original as its teacher",
    "lower": "write the artifact of a target",
    "layers": "what quantizing each layer costs, and which to keep in float",
    "profile": "build the profile of this machine for a target, or check one",
    "predict": "predict latency from a profile or a description, with its interval and what bounds it",
    "measure": "measure latency on a target, alone or interleaved with another model",
    "verify": "compare the outputs of two ONNX files",
    "targets": "list the targets, or describe one",
    "doctor": "what is installed, missing or broken here, and why",
    "conformance": "put a backend through the conformance kit",
    "bench": "benchmark models on targets, and each target's practical roofline",
    "compare": "reports of several fits side by side, and what must not be compared",
    "report": "write report.html again from report.json",
}
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

EPILOG = """\
exit codes:
  0 done, or budget met   2 the input cannot be used   3 budget missed   4 quality missed
  5 verification failed   70 internal error

example:
  sartor fit model.onnx --target onnxruntime --budget latency=0.5x --data data.npz --out out
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM, on the same way out as Ctrl-C: temporary folders are removed and subprocesses ended."""


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Raise `Terminated` at the first SIGTERM; further ones wait until what it started is cleaned up."""

    def terminate(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # only the main thread may; and whoever set or ignored it knows better
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as a `UsageError`, in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see '{self.prog} --help'.")


def build_parser(only: str | None = None) -> Parser:
    """The parser of all commands; with `only`, the options of the others are not loaded."""
    parser = Parser(
        prog="sartor",
        description="Cut to measure: a network and a budget in; a smaller, verified, measured network out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sartor {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"sartor.cli.{name}") if name == (only or name) else None
        command = commands.add_parser(
            name,
            help=text,
            description=(module.__doc__ or "").strip() if module else text,
            epilog=f"example:\n  {module.EXAMPLE}" if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if module is not None:
            module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="write exactly one JSON document to stdout")
        command.add_argument("--debug", action="store_true", help="print the traceback of any error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        parser = build_parser(next((a for a in arguments if a in COMMANDS), ""))
        options = parser.parse_args(arguments)
    except SystemExit as done:  # --help and --version print and leave
        return int(done.code or 0)
    except UsageError as error:
        with Stdout() as stdout:
            return _fail(stdout, as_json, debug, error, EXIT_USAGE)
    with Stdout() as stdout:
        try:
            with _sigterm_interrupts():
                result: Result = importlib.import_module(f"sartor.cli.{options.command}").run(options)
        except SartorError as error:
            return _fail(stdout, as_json, debug, error, error.exit_code)
        except Terminated as error:
            return _fail(stdout, as_json, debug, error, EXIT_TERMINATED)
        except KeyboardInterrupt as error:
            return _fail(stdout, as_json, debug, error, EXIT_INTERRUPTED)
        except SystemExit as error:  # not ours: no command leaves by it
            text = f"The code of the model or of the data called sys.exit({error.code!r}); remove the call."
            return _fail(stdout, as_json, debug, UsageError(text), EXIT_USAGE)
        except BrokenPipeError:
            return EXIT_INTERNAL
        except Exception as error:
            return _fail(stdout, as_json, debug, error, EXIT_INTERNAL)
        if result.silent:
            return result.exit_code
        try:
            stdout.write(to_json(result.document) if as_json else result.text.rstrip("\n") + "\n")
        except BrokenPipeError:  # the reader closed the pipe: it has seen enough
            return result.exit_code
        return result.exit_code


def _fail(stdout: Stdout, as_json: bool, debug: bool, error: BaseException, code: int) -> int:
    message = _sentence(error, code)
    if debug:
        traceback.print_exception(error)
    elif code == EXIT_INTERNAL:
        message += (
            " This is a bug in Sartor: please report it with the output of the same command plus --debug."
        )
    sys.stderr.write(f"sartor: error: {message}\n")
    notes = [] if isinstance(error, UsageError) else list(getattr(error, "__notes__", ()))
    if not debug:  # the traceback has shown them
        for note in notes:
            sys.stderr.write(f"{note}\n")
    if as_json:
        stdout.write(to_json(error_document(message, code) | ({"notes": notes} if notes else {})))
    return code


def _sentence(error: BaseException, code: int) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Terminated." if isinstance(error, Terminated) else "Interrupted."
    text = " ".join(str(error).split())
    if isinstance(error, SartorError) and not isinstance(error, InternalError):
        return text
    return f"{type(error).__name__}: {text.rstrip('.')}."
