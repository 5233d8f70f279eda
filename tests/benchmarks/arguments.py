"""Kinds of arguments of the benchmarks' command lines, and what several of them show."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def count(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def setting(text: str) -> tuple[str, str]:
    """Return name and value of a setting of the broker."""
    name, found, value = text.partition("=")
    if not name or not found:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name, value


def progress_bar(console: Console) -> Progress:
    """Return a bar with a description, percents, and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
    )
