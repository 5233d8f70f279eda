"""`broker keys new`: a new key, and its table for the clients file."""

from __future__ import annotations

import hashlib
import secrets

from broker.cli.output import OutputError, write
from broker.cli.words import BAD_USE, complain, print_note
from broker.identity.clients_file import NAME as SETTING
from broker.setting_kinds import CLIENT_NAME, CLIENT_NAME_FORM

PREFIX = "sb_"
"""The beginning of every key, by which a scanner for leaked secrets can find one."""


def new(name: str) -> int:
    """Print a key, an empty line and the table of its client, and return the exit status.

    The key is stored nowhere.
    """
    if CLIENT_NAME.fullmatch(name) is None:
        return complain(f"a name has {CLIENT_NAME_FORM}", BAD_USE)
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        write(f"{key}\n\n{table(name, key)}")
    except OutputError as error:
        return complain(error)
    print_note(f"The key is shown only now. Add the table to the file of {SETTING}.")
    return 0


def table(name: str, key: str) -> str:
    """Return the table of a client with this key."""
    # A name with dots, for example, needs quotes; none of its characters has to be escaped between them.
    is_bare = all(char.isalnum() or char in "_-" for char in name)
    header = name if is_bare else f'"{name}"'
    return f'[{header}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
