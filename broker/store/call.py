"""What Redis is asked: a script or a command with its arguments, ready to be sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import hiredis


class Call(NamedTuple):
    """A script or command with its arguments, encoded in the protocol of Redis.

    Attributes:
        packed: the call.
        name: the name of the script.
        alone: it needs a connection of its own. Redis answers it much later or with megabytes, and would answer nothing
            else on its connection until then.
        key: one of its keys, which decides on the node of a cluster. A number is a slot.
        tells: its reply is a list of notifications to be sent, each a channel and a text, and then its real reply.
    """

    packed: bytes
    name: str = "command"
    alone: bool = False
    key: str | bytes | int = ""
    tells: bool = False


def command_call(*words: Any) -> Call:
    """Return a call of a plain command, to be run by `Store.run` together with scripts.

    The first word behind the command counts as its key. A command without one is run by any node of a cluster.
    """
    key = words[1] if len(words) > 1 and isinstance(words[1], str | bytes) else ""
    return Call(packed(words), alone=words[0] == "WAIT", key=key)


def packed(words: tuple[Any, ...]) -> bytes:
    """Return a command in the protocol of Redis: https://valkey.io/topics/protocol/.

    Raises:
        TypeError: a word is neither text nor bytes nor a number.
    """
    encoded: bytes = hiredis.pack_command(words)  # in Python it took four times as long
    return encoded
