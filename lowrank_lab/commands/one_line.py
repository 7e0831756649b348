"""The command group that reports each failure in one line, with its exit status."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from signal import SIGINT, SIGTERM
from typing import Any, NoReturn

import click

from lowrank_lab import distributed
from lowrank_lab.commands import interrupts
from lowrank_lab.commands.flags import check_switches
from lowrank_lab.config import InputError, check_utf8

# For the line after an interrupt: what the command does when it is started again.
CONTINUES = {
    "train": "; started again, it goes on from the last checkpoint",
    "study": "; started again, it goes on from the last checkpoint",
    "data": "; started again, it goes on",
}


class _Ended(BaseException):
    """A signal ended the command: the line and the status. Not an error that click knows."""

    def __init__(self, line: str, status: int) -> None:
        self.line, self.status = line, status


class OneLine(click.Group):
    """A command group that reports each failure in one line, with its exit status."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> NoReturn:
        interrupts.let_readers_leave()
        with interrupts.handled():
            self._main(sys.argv[1:] if args is None else list(args), *rest, **kwargs)

    def _main(self, args: list[str], *rest: Any, **kwargs: Any) -> NoReturn:
        try:
            for word in args:
                check_utf8("command line", word)
            with _one_line_warnings():
                sys.exit(super().main(args, *rest, **{**kwargs, "standalone_mode": False}) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.ClickException as error:
            try:
                check_switches(args)
            except InputError as better:
                fail(str(better), 2)
            fail(" ".join(error.format_message().split()), 2)
        except InputError as error:
            fail(str(error), 2)
        except (KeyboardInterrupt, click.Abort):
            fail(interrupts.WORDS[SIGINT], 130)
        except interrupts.Stopped:
            fail(interrupts.WORDS[SIGTERM], 143)
        except _Ended as ended:
            fail(ended.line, ended.status)
        except (RuntimeError, OSError) as error:
            status: int = getattr(error, "exit_status", 1)
            fail(f"{'failed: ' if status == 1 else ''}{' '.join(str(error).split())}", status)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click would answer Ctrl-C with an empty line."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, interrupts.Stopped) as error:
            number = SIGINT if isinstance(error, KeyboardInterrupt) else SIGTERM
            words = interrupts.WORDS[number] + CONTINUES.get(ctx.invoked_subcommand or "", "")
            raise _Ended(words, 128 + number) from None


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show a FutureWarning (a renamed option) without its source location."""
    usual = warnings.formatwarning

    def short(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> str:
        future = issubclass(category, FutureWarning)
        return f"{message}\n" if future else usual(message, category, *args, **kwargs)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = usual


def fail(line: str, status: int) -> NoReturn:
    """Print one line and exit. For invalid input, only local rank 0 of each machine prints."""
    if status == 2 and distributed.local_rank():
        time.sleep(2)  # torchrun stops all processes when one exits: let local rank 0 print first
    else:
        click.echo(line, err=True)
    if status in (128 + SIGINT, 128 + SIGTERM):
        interrupts.leave(status)
    sys.exit(status)
