"""The reverse proxies of deploy/, as they are shipped but for ports, certificate and folders."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http.client import HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
NAME = "llm.example.org"
"""What the examples call the server."""


class Proxy(ABC):
    """A context manager that runs one with a certificate of its own for `NAME`, and ends it.

    Args:
        folder: for its files.
        upstream: the port on this machine to which it leads.
    """

    program: str

    def __init__(self, folder: Path, upstream: int) -> None:
        if shutil.which(self.program) is None:
            pytest.skip(f"no {self.program} is installed here")
        self.folder = folder / self.program
        self.folder.mkdir()
        self.upstream = upstream
        self.port = free_port()
        self.plain_port = free_port()
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        self.certificate, self.key = _make_certificate(self.folder)
        self.trust = ssl.create_default_context(cafile=str(self.certificate))
        self.config = self._write_config()
        self._popen: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.port} -> {self.upstream}>"

    def __enter__(self) -> Self:
        with (self.folder / "log").open("wb") as log:
            argv = self._argv()
            self._popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env)
        try:
            eventually(self._is_up, what=f"a proxy that listens (see {self.folder}/log)")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def connect(self) -> HTTPSConnection:
        """A connection of a client that knows only `NAME`; close it."""
        connection = HTTPSConnection(NAME, self.port, timeout=PATIENCE_S, context=self.trust)
        # http.client's own hook for those who resolve names in their own way.
        connection._create_connection = lambda *_, **__: socket.create_connection(  # type: ignore[attr-defined]
            ("127.0.0.1", self.port), PATIENCE_S
        )
        return connection

    def check(self) -> subprocess.CompletedProcess[str]:
        """What the proxy itself says of its configuration."""
        return subprocess.run(self._check_argv(), capture_output=True, text=True, check=False, env=self.env)

    def _end(self) -> None:
        assert self._popen is not None
        self._popen.terminate()
        self._popen.wait(PATIENCE_S)

    def _is_up(self) -> bool:
        assert self._popen is not None
        assert self._popen.poll() is None, (self.folder / "log").read_text(encoding="utf-8")
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True

    @abstractmethod
    def _write_config(self) -> Path:
        """Write the shipped configuration, changed as little as can be; what it is run with."""

    @abstractmethod
    def _argv(self) -> list[str]:
        """Its command line in the foreground."""

    @abstractmethod
    def _check_argv(self) -> list[str]:
        """The command that checks its configuration."""


class Nginx(Proxy):
    """nginx with deploy/nginx/llamavisor.conf."""

    program = "nginx"

    def _write_config(self) -> Path:
        site = rewritten(
            DEPLOY / "nginx/llamavisor.conf",
            {
                "server 127.0.0.1:8080;": f"server 127.0.0.1:{self.upstream};",
                "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
                "    listen [::]:80;\n": "",
                "listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
                "    listen [::]:443 ssl;\n": "",
                f"/etc/letsencrypt/live/{NAME}/fullchain.pem": str(self.certificate),
                f"/etc/letsencrypt/live/{NAME}/privkey.pem": str(self.key),
            },
        )
        (self.folder / "llamavisor.conf").write_text(site, encoding="utf-8")
        config = self.folder / "nginx.conf"
        temporary = "".join(
            f"  {kind}_temp_path {self.folder}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config.write_text(
            f"{'user root;' if os.geteuid() == 0 else ''} daemon off; pid {self.folder}/pid; error_log stderr;\n"
            f"events {{}}\nhttp {{\n  access_log off;\n{temporary}  include {self.folder}/llamavisor.conf;\n}}\n",
            encoding="utf-8",
        )
        return config

    def _argv(self) -> list[str]:
        return ["nginx", "-e", "stderr", "-p", str(self.folder), "-c", str(self.config)]

    def _check_argv(self) -> list[str]:
        return [*self._argv(), "-t"]


class Caddy(Proxy):
    """Caddy with deploy/caddy/Caddyfile."""

    program = "caddy"

    def _write_config(self) -> Path:
        ours = f"\tbind 127.0.0.1\n\ttls {self.certificate} {self.key}"
        site = rewritten(
            DEPLOY / "caddy/Caddyfile",
            {
                f"\n{NAME} {{": f"\nhttps://{NAME}:{self.port} {{\n{ours}",
                "reverse_proxy 127.0.0.1:8080": f"reverse_proxy 127.0.0.1:{self.upstream}",
            },
        )
        config = self.folder / "Caddyfile"
        config.write_text(f"{{\n\tadmin off\n\thttp_port {self.plain_port}\n}}\n\n{site}", encoding="utf-8")
        return config

    def _argv(self) -> list[str]:
        return ["caddy", "run", "--adapter", "caddyfile", "--config", str(self.config)]

    def _check_argv(self) -> list[str]:
        # As it is shipped: a certificate of our own is warned about.
        return ["caddy", "validate", "--adapter", "caddyfile", "--config", str(DEPLOY / "caddy/Caddyfile")]


def rewritten(file: Path, changes: Mapping[str, str]) -> str:
    """The text of a file with these changes; each has to find what it is to change."""
    text = file.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{file} has no {old!r} any more"
        text = text.replace(old, new)
    return text


def _make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for `NAME` that only those trust who are told to, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    argv += ["-keyout", str(key), "-out", str(certificate)]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl is installed here")
    subprocess.run(argv, check=True, capture_output=True)
    return certificate, key
