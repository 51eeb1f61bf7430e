"""Authorities and certificates of a test's own."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.core.tls import SERVER_NAME, TlsFiles

_CURVE = ec.SECP256R1()


class Authority:
    """Issues certificates for the two ends of a connection alike, as the chart asks for."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(_CURVE)
        name = f"authority {secrets.token_hex(4)}"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key.public_key())
        self._certificate = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        ).sign(self._key, hashes.SHA256())

    def issue(
        self,
        folder: Path,
        *,
        names: Sequence[str] = (SERVER_NAME,),
        trusts: Authority | None = None,
        days: float = 1.0,
    ) -> TlsFiles:
        """Write a key, a certificate for `names` and the authority (of `trusts`, if given) that
        peers are checked against. Files that are there are replaced at once, as Kubernetes does;
        a negative number of `days` makes a certificate that has expired."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(_CURVE)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(subject, self._name, key.public_key(), days=days)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names]),
                critical=False,
            )
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = TlsFiles(
            cert_file=folder / "tls.crt", key_file=folder / "tls.key", ca_file=folder / "ca.crt"
        )
        pem = serialization.Encoding.PEM
        _replace(
            files.key_file,
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        )
        _replace(files.cert_file, certificate.public_bytes(pem))
        _replace(files.ca_file, (trusts or self)._certificate.public_bytes(pem))
        return files


def environment(files: TlsFiles) -> dict[str, str]:
    """The variables that make a process of ours use `files`."""
    return {
        "EXPERTFLEET_TLS_CERT_FILE": str(files.cert_file),
        "EXPERTFLEET_TLS_KEY_FILE": str(files.key_file),
        "EXPERTFLEET_TLS_CA_FILE": str(files.ca_file),
    }


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: float = 1.0
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - datetime.timedelta(days=1))
        .not_valid_after(end)
    )


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)
