"""A parser whose errors are one line, without the usage."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that ends with "PROG: error: REASON. See PROG --help"."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}. See {self.prog} --help\n")
