"""The chat page at ``/``, its files, and the browser client, read once and answered from memory.

These are only files: the page uses the same routes as any other page.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from aiohttp import web

from broker.web.files import answering
from broker.web.security_headers import NOSNIFF

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from importlib.resources.abc import Traversable

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".ts": "application/typescript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
PRELOAD = b"  <!-- preload -->\n"
LATER = {"vendor/highlight.js"}  # loaded with the first block of code
ALIASES = {"/": "index.html", "/favicon.ico": "icon.svg"}

CLIENT_FILES = ("client.js", "client.d.ts")

# The page shows what models write. If any of it were taken for markup, it still could not run or fetch anything, and
# only DOMPurify may make elements of a text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
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
    folder = files(__package__) / "page"
    bodies = {name: (folder / name).read_bytes() for name in _names(folder)}
    modules = sorted(name for name in bodies if name.endswith(".js") and name not in LATER)
    # Without these links a browser would learn of each module only from the one that imports it.
    links = "".join(f'  <link rel="modulepreload" href="{name}">\n' for name in [*modules, "client.js"])
    bodies["index.html"] = bodies["index.html"].replace(PRELOAD, links.encode())
    paths = {f"/{name}": name for name in bodies if name != "index.html"} | ALIASES
    return [_file_route(path, bodies[name], name, HEADERS) for path, name in paths.items()]


def client_routes() -> list[web.RouteDef]:
    """Return the routes of the browser client, which pages of any allowed origin import."""
    folder = files(__package__) / "client"
    return [
        _file_route(f"/{name}", (folder / name).read_bytes(), name, CLIENT_HEADERS) for name in CLIENT_FILES
    ]


def _names(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _names(each, f"{prefix}{each.name}/")
        elif PurePosixPath(each.name).suffix in TYPES:
            yield prefix + each.name


def _file_route(path: str, body: bytes, name: str, headers: Mapping[str, str]) -> web.RouteDef:
    content_type = TYPES[PurePosixPath(name).suffix]
    return web.get(path, answering(body, {**headers, "Content-Type": content_type}))


async def to_page(request: web.Request) -> web.Response:
    """Redirect a browser from the bare prefix to the path with a slash, which the page's relative addresses need."""
    query = f"?{request.query_string}" if request.query_string else ""
    return web.Response(status=308, headers={"Location": f"{request.rel_url.raw_path}/{query}"})
