"""The headers that tell browsers what not to do with an answer. They are built once, for every answer needs them."""

from __future__ import annotations

from aiohttp import hdrs
from multidict import CIMultiDict, istr

NOSNIFF = {"X-Content-Type-Options": "nosniff"}
"""No answer is taken for anything but what its type says: an answer of a model is never HTML or a script."""

SERVER = "session-broker"
"""In place of the names and versions of Python and the library, which help only those who look for old ones."""

# Opened by itself, or in a frame, an answer may load, run and send nothing, and no link of it tells where it was.
_BARE = CIMultiDict(
    {
        istr(hdrs.VARY): hdrs.ORIGIN,
        **{istr(name): value for name, value in NOSNIFF.items()},
        istr("Referrer-Policy"): "no-referrer",
        istr("Content-Security-Policy"): "default-src 'none'; frame-ancestors 'none'",
    }
)


def add_security_headers(headers: CIMultiDict[str]) -> None:
    """Add them, and ``Vary: Origin``. An answer that has a policy of its own, as the page has, keeps it."""
    headers[hdrs.SERVER] = SERVER
    if "Content-Security-Policy" in headers:
        headers.add(hdrs.VARY, hdrs.ORIGIN)
    else:
        headers.extend(_BARE)
