"""The files of mTLS: all or none, and told by name what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.core.errors import ConfigurationError
from services.core.settings import load_settings
from services.core.tls import PeerTls, TlsFiles, peer_tls
from tests.support.certificates import Authority, environment


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return Authority().issue(tmp_path / "fleet")


def test_without_files_connections_are_plain() -> None:
    assert peer_tls(load_settings()) is None


def test_the_settings_reach_child_processes(
    files: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they have another working directory."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment(files).items():
        monkeypatch.setenv(name, str(Path(value).relative_to(tmp_path)))
    assert environment(files).items() <= load_settings().as_environment().items()
    assert peer_tls(load_settings()) is not None


@pytest.mark.parametrize("missing", ["tls_cert_file", "tls_key_file", "tls_ca_file"])
def test_two_of_three_are_refused_and_the_third_is_named(missing: str, files: TlsFiles) -> None:
    given = {
        name.removeprefix("EXPERTFLEET_").lower(): value
        for name, value in environment(files).items()
    }
    del given[missing]
    with pytest.raises(ConfigurationError, match=f"EXPERTFLEET_{missing.upper()} is missing"):
        load_settings(**given)


@pytest.mark.parametrize("gone", ["cert_file", "key_file", "ca_file"])
def test_a_file_that_is_not_there_is_named(gone: str, files: TlsFiles) -> None:
    path: Path = getattr(files, gone)
    path.unlink()
    with pytest.raises(ConfigurationError, match=rf"EXPERTFLEET_TLS_{gone.upper()}=.*cannot be"):
        PeerTls(files)


def test_a_key_of_another_certificate_is_refused(files: TlsFiles, tmp_path: Path) -> None:
    other = Authority().issue(tmp_path / "other")
    files.key_file.write_bytes(other.key_file.read_bytes())
    with pytest.raises(ConfigurationError, match="are not a certificate and its key"):
        PeerTls(files)


@pytest.mark.parametrize("name", ["cert_file", "ca_file"])
def test_what_is_no_certificate_is_refused(name: str, files: TlsFiles) -> None:
    path: Path = getattr(files, name)
    path.write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigurationError, match=f"EXPERTFLEET_TLS_{name.upper()}"):
        PeerTls(files)


def test_files_are_read_again_when_they_change_and_not_otherwise(
    files: TlsFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = PeerTls(files)
    first = tls.current()
    assert tls.current() is first
    Authority().issue(tmp_path / "fleet")
    second = tls.current()
    assert second != first
    assert second.certificate == files.cert_file.read_bytes()
    files.ca_file.unlink()
    assert tls.current() is second
    assert tls.current() is second
    said = [record.message for record in caplog.records if "going on with" in record.message]
    assert len(said) == 1
    assert "EXPERTFLEET_TLS_CA_FILE" in said[0]
    Authority().issue(tmp_path / "fleet")
    assert tls.current() not in (first, second)


def test_links_are_looked_through_as_kubernetes_makes_them(tmp_path: Path) -> None:
    """A mounted Secret is a folder of links into one that is swapped at once."""
    authority = Authority()
    authority.issue(tmp_path / "2026_1")
    (tmp_path / "..data").symlink_to(tmp_path / "2026_1")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).symlink_to(tmp_path / "..data" / name)
    tls = PeerTls(
        TlsFiles(
            cert_file=tmp_path / "tls.crt",
            key_file=tmp_path / "tls.key",
            ca_file=tmp_path / "ca.crt",
        )
    )
    first = tls.current()
    new = authority.issue(tmp_path / "2026_2")
    (tmp_path / "..data_tmp").symlink_to(tmp_path / "2026_2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    assert tls.current().certificate == new.cert_file.read_bytes() != first.certificate
