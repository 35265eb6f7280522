"""The command line of what takes a run's settings: ``[recipe=NAME] [key.sub=value ...] [options]``."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rewards.command import Parser

USAGE = "%(prog)s [recipe=NAME] [key.sub=value ...] [options]"


class SettingsParser(Parser):
    """What is no option is a setting, in ``settings``; options and settings come in any order.

    Args:
        keys: gives the recipes and keys that ``--help`` lists.
    """

    def __init__(self, prog: str, description: str, keys: Callable[[], str], *, usage: str = USAGE) -> None:
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, usage=usage, description=description, formatter_class=how)
        self.add_argument("settings", nargs="*", metavar="key.sub=value", help="one of the settings below")
        self._keys = keys

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; settings are written key.sub=value, without dashes"
        super().error(message)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options and ``settings``. Raises ConfigError."""
        return self.parse_intermixed_args(argv)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would swallow that its reader has gone

    def format_help(self) -> str:
        return f"{super().format_help()}\n{self._keys()}"
