"""Sentinels and a cluster that speak nothing but TLS, and that let a broker do only what it needs.

Everybody has to show a certificate of one authority. The broker is a user with the rights in `deploy/redis/rights`, and
those that `deploy/redis/README.md` adds. The servers are the system's Redis: the embedded Valkey has no TLS.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests import sentinels, valkey_cluster
from tests.system.harness import ValkeyProcess, free_port
from tests.system.proxy import program
from tests.web.test_redis_rights import RIGHTS, rights

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

ADMIN = "admin"
BROKER, WATCHER, REPLICA = "broker", "watcher", "replica"
ADMIN_PASSWORD, PASSWORD, SENTINEL_PASSWORD = "for-the-test", "for/servers+only", "for/sentinels+only"

OF_WATCHER = (
    "allchannels +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish +info +client|setname"
    " +client|kill +script|kill"
)
"""What sentinels need of a server: https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/."""

OF_REPLICA = "+psync +replconf +ping"
"""What a replica needs of its primary."""


def make_authority(folder: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> None:
    """Leave a certificate authority there, and what it has signed for a server and for a client."""

    def openssl(*words: str) -> None:
        subprocess.run([program("openssl"), *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *key, "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt"
    )
    (folder / "names").write_text(f"subjectAltName={names}\n")
    for name in ("server", "client"):
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.crt")


def added_rights(where: str) -> list[str]:
    """Return the rights that the README adds in some place, such as a cluster."""
    readme = " ".join((RIGHTS.parent / "README.md").read_text().split())
    found = re.search(rf"{where} [^.`]*`(\+[^`]*)`", readme)
    assert found is not None, where
    return found[1].split()


def tls_files(folder: Path) -> str:
    """Return what a URL says behind its question mark."""
    names = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "client.crt", "ssl_keyfile": "client.key"}
    return urlencode({name: folder / file for name, file in names.items()}, safe="/")


class SecuredProcess(ValkeyProcess):
    """A server with TLS, whose default user may do nothing.

    Attributes:
        certificates: the folder of `make_authority`.
        users: the users besides the administrator, each with name, password and rights.
    """

    certificates: Path
    users: Sequence[tuple[str, str, str]]
    is_sentinel = False

    def arguments(self) -> list[str]:
        """Return its command line behind the program."""
        file = self.directory / "server.conf"
        if not file.exists():  # sentinels and nodes write there what they have learned
            file.write_text("\n".join([*self._lines(), ""]), encoding="utf-8")
        return [str(file), *(["--sentinel"] if self.is_sentinel else []), *self.options]

    def _lines(self) -> list[str]:
        folder = self.certificates
        users = [(ADMIN, ADMIN_PASSWORD, "~* allchannels +@all"), *self.users]
        lines = [
            f"port 0\ntls-port {self.port}\nbind 127.0.0.1",
            f"tls-ca-cert-file {folder}/ca.crt",
            f"tls-cert-file {folder}/server.crt\ntls-key-file {folder}/server.key",
            "tls-auth-clients yes\ntls-replication yes\ntls-cluster yes",
            "user default off",
            *(f"user {name} on >{password} {granted}" for name, password, granted in users),
        ]
        if self.is_sentinel:
            return [*lines, f"sentinel sentinel-user {ADMIN}\nsentinel sentinel-pass {ADMIN_PASSWORD}"]
        return [*lines, 'save ""\nappendonly no', f"masteruser {REPLICA}\nmasterauth {PASSWORD}"]

    def client(self) -> Redis:
        """Return a client that may do everything."""
        folder = self.certificates
        return Redis(
            port=self.port,
            username=ADMIN,
            password=ADMIN_PASSWORD,
            ssl=True,
            ssl_check_hostname=False,
            ssl_ca_certs=str(folder / "ca.crt"),
            ssl_certfile=str(folder / "client.crt"),
            ssl_keyfile=str(folder / "client.key"),
        )

    async def refused(self) -> set[str]:
        """Return what users were refused: commands, keys, channels and names."""
        async with self.client() as client:
            entries: Any = await client.acl_log()
        return {str(entry["object"]) for entry in entries}

    async def _answers(self) -> bool:
        async with self.client() as client:
            try:
                return bool(await client.ping())
            except (RedisError, OSError):
                return False

    async def change_password(self, user: str, change: str) -> None:
        """Give a user of this server a password (``>password``) or take one (``<password``)."""
        async with self.client() as client:
            await client.execute_command("ACL", "SETUSER", user, change)  # type: ignore[no-untyped-call]

    async def disconnect(self, user: str) -> None:
        """Close all connections of a user."""
        async with self.client() as client:
            await client.client_kill_filter(user=user)

    async def is_used_by(self, user: str) -> bool:
        """Return True if a user has a connection."""
        async with self.client() as client:
            return user in {each["user"] for each in await client.client_list()}


class SecuredSentinel(SecuredProcess, sentinels.SentinelProcess):
    """A sentinel."""

    is_sentinel = True


class SecuredSentinels(sentinels.SentinelSet):
    """A primary, its replica and three sentinels."""

    watch = {**sentinels.WATCH, "auth-user": WATCHER, "auth-pass": PASSWORD}  # noqa: RUF012 - nobody changes it

    @property
    def processes(self) -> list[SecuredProcess]:
        """Return the servers and the sentinels that run."""
        every = [self.primary, self.replica, *self.sentinels]
        return [each for each in every if isinstance(each, SecuredProcess) and each.process is not None]


class SecuredCluster(valkey_cluster.ValkeyCluster):
    """Three primaries with a replica each, known by a name and not by an address."""

    @property
    def processes(self) -> list[SecuredProcess]:
        """Return the servers that run."""
        return [each for each in self.nodes if isinstance(each, SecuredProcess) and each.process is not None]


async def change_certificates(processes: Sequence[SecuredProcess]) -> None:
    """Replace the authority and all that it has signed. The files keep their names."""
    async with AsyncExitStack() as stack:
        servers = [each for each in processes if not each.is_sentinel]
        clients = [await stack.enter_async_context(each.client()) for each in servers]
        for client in clients:
            await client.ping()  # so that it is connected while the old ones are good
        make_authority(processes[0].certificates)
        for client in clients:
            told = await client.config_get("tls-*-file")
            words = [
                word
                for name, file in told.items()
                if file
                for word in (name, file.replace("/server.", "/./server.").replace("/ca.", "/./ca."))
            ]  # a name that has not changed is not read again
            await client.execute_command("CONFIG", "SET", *words)  # type: ignore[no-untyped-call]
    for each in processes:
        if each.is_sentinel:  # it reads them at its start only
            each.kill()
            await each.start()


Process = TypeVar("Process", bound=SecuredProcess)


@asynccontextmanager
async def secured_sentinels() -> AsyncIterator[SecuredSentinels]:
    """Run the servers during the block."""
    granted = " ".join(rights())
    users = [(BROKER, PASSWORD, granted), (WATCHER, PASSWORD, OF_WATCHER), (REPLICA, PASSWORD, OF_REPLICA)]
    watchers = [(WATCHER, SENTINEL_PASSWORD, " ".join(added_rights("in the URL, needs")))]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-")))
        make_authority(folder, "IP:127.0.0.1")
        at_once = ("--repl-diskless-sync-delay", "0")
        primary, replica = [await _started(stack, SecuredProcess, folder, users, *at_once) for _ in range(2)]
        watching = [await _started(stack, SecuredSentinel, folder, watchers) for _ in range(3)]
        servers = SecuredSentinels(primary, replica, [*watching])
        await servers.start()
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in watching)
        secret = urlencode({"sentinel_username": WATCHER, "sentinel_password": SENTINEL_PASSWORD})
        servers.url = (
            f"rediss+sentinel://{BROKER}:{quote(PASSWORD, safe='')}@{hosts}/{sentinels.SERVICE}/0"
            f"?{secret}&{tls_files(folder)}"
        )
        yield servers


@asynccontextmanager
async def secured_cluster() -> AsyncIterator[SecuredCluster]:
    """Run the servers during the block."""
    granted = " ".join([*rights(), *added_rights("In a cluster")])
    users = [(BROKER, PASSWORD, granted), (REPLICA, PASSWORD, OF_REPLICA)]
    named = ("--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname")
    timeout = ("--cluster-node-timeout", str(valkey_cluster.DOWN_AFTER_MS))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-")))
        make_authority(folder, "DNS:localhost")
        nodes = []
        for _ in range(2 * valkey_cluster.PRIMARIES):
            port = ("--cluster-port", str(free_port()))
            options = (*valkey_cluster.OPTIONS, *named, *timeout, *port)
            nodes.append(await _started(stack, SecuredProcess, folder, users, *options))
        cluster = SecuredCluster([*nodes])
        await cluster.found()
        hosts = ",".join(f"localhost:{each.port}" for each in nodes[: valkey_cluster.PRIMARIES])
        cluster.url = f"rediss+cluster://{BROKER}:{quote(PASSWORD, safe='')}@{hosts}?{tls_files(folder)}"
        yield cluster


async def _started(
    stack: AsyncExitStack,
    kind: type[Process],
    certificates: Path,
    users: Sequence[tuple[str, str, str]],
    *options: str,
) -> Process:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-")))
    process = kind(free_port(), folder, options=options)
    process.certificates, process.users = certificates, users
    stack.callback(process.kill)
    await process.start()
    return process
