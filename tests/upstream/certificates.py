"""An authority of the tests, and certificates of services that it has signed, or that it should not have."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DAY = timedelta(days=1)


class Authority:
    """Signs certificates.

    Args:
        folder: where their files are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("authority of a test")
        self._certificate = _sign(
            self._name, self._key, self._name, self._key, x509.BasicConstraints(ca=True, path_length=None)
        )

    @cached_property
    def trust(self) -> ssl.SSLContext:
        """What a client uses that trusts this authority."""
        pem = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)

    def service(
        self, host: str = "127.0.0.1", *, is_expired: bool = False, is_self_signed: bool = False
    ) -> ssl.SSLContext:
        """Return what a service of this host uses."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName]
        try:
            names = [x509.IPAddress(ipaddress.ip_address(host))]
        except ValueError:
            names = [x509.DNSName(host)]
        name = _name(host)
        issuer, signing = (name, key) if is_self_signed else (self._name, self._key)
        certificate = _sign(
            issuer, signing, name, key, x509.SubjectAlternativeName(names), is_expired=is_expired
        )
        path = self._folder / f"{host}-{is_expired}-{is_self_signed}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _sign(
    issuer: x509.Name,
    signing: ec.EllipticCurvePrivateKey,
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
    *,
    is_expired: bool = False,
) -> x509.Certificate:
    now = datetime.now(UTC)
    end = now - DAY if is_expired else now + DAY
    return (
        x509.CertificateBuilder(
            issuer, name, key.public_key(), x509.random_serial_number(), end - 3 * DAY, end
        )
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .sign(signing, hashes.SHA256())
    )
