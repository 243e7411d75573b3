"""Certificates of an authority of the tests' own, as files."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


class Authority:
    """Signs for `directory`.

    Attributes:
        ca: path of its own certificate.
    """

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._authority = trustme.CA()
        self.ca = str(directory / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, *names: str, file: str = "") -> tuple[str, str]:
        """Paths of a certificate for host names, addresses or an e-mail address, and of its key."""
        issued = self._authority.issue_cert(*names, common_name=names[0])
        base = self._directory / (file or names[0])
        cert, key = f"{base}.crt", f"{base}.key"
        Path(cert).unlink(missing_ok=True)
        for blob in issued.cert_chain_pems:
            blob.write_to_path(cert, append=True)
        issued.private_key_pem.write_to_path(key)
        return cert, key

    def connecting(self, cert: tuple[str, str] | None = None) -> ssl.SSLContext:
        """For a client that trusts nobody else."""
        context = ssl.create_default_context(cafile=self.ca)
        if cert is not None:
            context.load_cert_chain(*cert)
        return context
