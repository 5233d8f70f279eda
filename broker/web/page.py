"""The chat page at ``/``, its files, and the browser client, read once and answered from memory.

These are only files: the page uses the same routes as any other page.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web

from broker.web.files import answering
from broker.web.security_headers import NOSNIFF

if TYPE_CHECKING:
    from collections.abc import Mapping

PATHS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page-chunk.js": ("page-chunk.js", "text/javascript; charset=utf-8"),
    "/page-stream.js": ("page-stream.js", "text/javascript; charset=utf-8"),
    "/page-text.js": ("page-text.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}

CLIENT_PATHS = {
    "/client.js": ("client.js", "text/javascript; charset=utf-8"),
    "/client.d.ts": ("client.d.ts", "application/typescript; charset=utf-8"),
}

# The page shows what models write. If any of it were taken for markup, it still could not run or fetch anything.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    **NOSNIFF,
}

CLIENT_HEADERS = {
    "Cache-Control": "no-cache",
    "X-TypeScript-Types": "./client.d.ts",  # for Deno, which loads modules by their address
}


def page_routes() -> list[web.RouteDef]:
    """Return the routes of the page, with its files read from the package now."""
    return _file_routes("page", PATHS, HEADERS)


def client_routes() -> list[web.RouteDef]:
    """Return the routes of the browser client, which pages of any allowed origin import."""
    return _file_routes("client", CLIENT_PATHS, CLIENT_HEADERS)


def _file_routes(
    folder: str, paths: Mapping[str, tuple[str, str]], headers: Mapping[str, str]
) -> list[web.RouteDef]:
    directory = files(__package__) / folder
    return [
        web.get(path, answering((directory / name).read_bytes(), {**headers, "Content-Type": content_type}))
        for path, (name, content_type) in paths.items()
    ]


async def to_page(request: web.Request) -> web.Response:
    """Redirect a browser from the bare prefix to the path with a slash, which the page's relative addresses need."""
    query = f"?{request.query_string}" if request.query_string else ""
    return web.Response(status=308, headers={"Location": f"{request.rel_url.raw_path}/{query}"})
