"""The command, its exit codes, and what becomes of errors."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any, Final, NoReturn

import click
import grpc

import skeyd
from skeyd.cli import interrupts
from skeyd.cli.digests import EXIT_DIFFERENT, compare, digest
from skeyd.cli.host import host
from skeyd.cli.key import key
from skeyd.cli.keys import keys
from skeyd.cli.summary import summary
from skeyd.cli.vm import vm
from skeyd.client import ClientError, OtherKeysError, SnapshotError, StreamError
from skeyd.errors import SkeydError
from skeyd.paths import default_target

EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_DAMAGED: Final = 4
EXIT_FILE: Final = 5
EXIT_INTERRUPTED: Final = 130

# What gRPC says where no daemon does: nobody listens, nobody answers, the target is none. A daemon's word has a reason.
_UNREACHABLE: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
)

_EPILOG: Final = f"""\b
Exit codes:
    0  done
  {EXIT_REFUSED:>3}  the daemon refused the call; the message says why
  {EXIT_USAGE:>3}  the command line is wrong
  {EXIT_UNREACHABLE:>3}  the daemon can't be reached
  {EXIT_DAMAGED:>3}  keys or a file don't match their checksums or their request ID, or are cut off
  {EXIT_FILE:>3}  a file can't be read or written
  {EXIT_DIFFERENT:>3}  `keys compare` found a difference
  {EXIT_INTERRUPTED:>3}  interrupted; 143 by SIGTERM, 129 by SIGHUP

\b
Examples:
  skeyctl vm create web --kind simulated --memory 256M
  skeyctl keys set web 0x0-0xff --acc 3 --fetch --allow-enable
  skeyctl keys get web
  skeyctl key get web 0x80
  skeyctl keys dump web web.skeys
  skeyctl keys compare web web.skeys
"""


_OUTCOMES: Final = {
    "UNCHANGED": "no key was changed",
    "ROLLED_BACK": "the old keys are set again and verified",
    "DIRTY": "the old keys could not be set again everywhere",
    "KEPT": "what was set stays; --resume goes on",
    "UNKNOWN": "nobody knows what was set; `skeyctl vm show` may",
}
"""What became of the keys, by the outcome in the metadata of a refused SetSkeys."""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Take a broken pipe before click does, whose exit code would say that the daemon refused."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # `skeyctl keys get … | head`: nobody reads on.
            _give_up_output()
            ctx.exit(EXIT_FILE)


@click.group(cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--target",
    envvar="SKEYD_TARGET",
    default=default_target,
    show_default="this machine's daemon",
    help="Daemon to talk to, as a gRPC target: unix:/path or host:port. Also SKEYD_TARGET.",
)
@click.version_option(skeyd.__version__, prog_name="skeyctl")
@click.pass_context
def skeyctl(context: click.Context, target: str) -> None:
    """Look at, set, save and restore the storage keys of the guests on a KVM host."""
    if not target:
        # `--target "$HOST"` with HOST unset must not mean this machine.
        raise click.BadParameter("it is empty", param_hint="--target")
    context.obj = target


skeyctl.add_command(host)
skeyctl.add_command(vm)
skeyctl.add_command(key)
skeyctl.add_command(keys)
keys.add_command(digest)
keys.add_command(compare)
keys.add_command(summary)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run skeyctl and exit with its code."""
    as_json = _wants_json(arguments)
    try:
        status = _invoke(arguments)
    except click.exceptions.Abort:
        say_interrupted(arguments)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        if as_json:
            _say("USAGE", error.format_message(), {}, as_json)
        else:
            error.show()
        sys.exit(error.exit_code)
    except ClientError as error:
        _say(error.reason or error.code.name, error.message, error.metadata, as_json)
        sys.exit(EXIT_REFUSED if error.reason or error.code not in _UNREACHABLE else EXIT_UNREACHABLE)
    except SkeydError as error:
        _say(error.reason.name, error.message, error.metadata, as_json)
        sys.exit(EXIT_USAGE)
    except OtherKeysError as error:
        _say("OTHER_KEYS", f"{error}; another --request-id sets these", {}, as_json)
        sys.exit(EXIT_DAMAGED)
    except (StreamError, SnapshotError) as error:
        _say("DAMAGED", str(error), {}, as_json)
        sys.exit(EXIT_DAMAGED)
    except UnicodeEncodeError as error:
        _say("USAGE", f"{error.object!r} is no UTF-8", {}, as_json)
        sys.exit(EXIT_USAGE)
    except OSError as error:
        _give_up_output()
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _say("FILE", what, {}, as_json)
        sys.exit(EXIT_FILE)
    sys.exit(status if isinstance(status, int) else 0)


def say_interrupted(arguments: list[str] | None = None) -> None:
    """Say that a command was interrupted, as these arguments want it said."""
    _say("INTERRUPTED", "interrupted", {}, _wants_json(arguments))


def _wants_json(arguments: list[str] | None) -> bool:
    return "--json" in (sys.argv[1:] if arguments is None else arguments)


def _invoke(arguments: list[str] | None) -> Any:
    try:
        return skeyctl.main(arguments, prog_name="skeyctl", standalone_mode=False)
    except Exception as error:
        if interrupts.happened():
            raise click.exceptions.Abort from error
        raise


def _give_up_output() -> None:
    # What can't be written and is still in the buffer must not raise once more at exit, which would be exit code 120.
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _say(reason: str, message: str, metadata: dict[str, str], as_json: bool) -> None:
    with suppress(OSError):  # nobody reads it; the exit code says what there is to say
        _write(reason, message, metadata, as_json)


def _write(reason: str, message: str, metadata: dict[str, str], as_json: bool) -> None:
    if as_json:
        error = {"reason": reason, "message": message, "metadata": metadata}
        click.echo(json.dumps({"error": error}), err=True)
        return
    click.echo(f"skeyctl: {message} [{reason}]", err=True)
    outcome = metadata.get("outcome", "")
    if outcome in _OUTCOMES:
        click.echo(f"  {_OUTCOMES[outcome]}", err=True)
    for name in ("dirty", "next_gfn", "keys_set", "uncertain"):
        if name in metadata:
            click.echo(f"  {name}: {metadata[name]}", err=True)
