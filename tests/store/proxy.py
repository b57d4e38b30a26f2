"""An HTTP proxy before an S3 endpoint, that lacks features as other stores do."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import re
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NOT_IMPLEMENTED = (
    b'<?xml version="1.0"?><Error><Code>NotImplemented</Code><Message>'
    b"A header you provided implies functionality that is not implemented: x-amz-trailer"
    b"</Message></Error>"
)
HOP = {"connection", "transfer-encoding", "keep-alive"}

Change = Callable[[dict[str, str]], "bytes | tuple[int, bytes] | None"]
"""Given a request's headers, which it may change; returns the body of a 501, or another status and
its body, or None to pass on.
"""


def reject_trailers(headers: dict[str, str]) -> bytes | None:
    """As R2 and older MinIO and Ceph answer botocore's default checksums."""
    names = {name.lower() for name in headers}
    chunked = "aws-chunked" in headers.get("Content-Encoding", "")
    return NOT_IMPLEMENTED if chunked or "x-amz-trailer" in names else None


def drop_if_none_match(headers: dict[str, str]) -> bytes | None:
    """As stores that do not know conditional writes."""
    for name in [name for name in headers if name.lower() == "if-none-match"]:
        del headers[name]
    return None


class Conflicts:
    """Answers 409 to the first try of each creation, as S3 may to simultaneous creations."""

    def __init__(self) -> None:
        self.tries = 0

    def __call__(self, headers: dict[str, str]) -> tuple[int, bytes] | None:
        if not any(name.lower() == "if-none-match" for name in headers):
            return None
        self.tries += 1
        body = (
            b"<?xml version='1.0'?><Error><Code>ConditionalRequestConflict</Code><Message>A"
            b" conflicting conditional operation</Message></Error>"
        )
        return (409, body) if self.tries % 2 else None


def no_condition(body: bytes) -> bytes:
    """As stores that answer 412 without naming the condition that failed."""
    return re.sub(rb"<Condition>.*?</Condition>", b"", body)


class HttpProxy:
    """Serves on a free port until `close`. With `folder`, over TLS (`ca` is its certificate)."""

    def __init__(
        self,
        endpoint: str,
        change: Change,
        folder: Path | None = None,
        reword: Callable[[bytes], bytes] | None = None,
    ):
        server = urlsplit(endpoint)
        assert server.scheme == "http" and server.hostname, endpoint
        self._stopped = stopped = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                if stopped.is_set():
                    self.close_connection = True
                    return
                headers = dict(self.headers.items())
                rejected = change(headers)
                if rejected is not None:
                    self.close_connection = True  # its body is not read
                    status, body = (501, rejected) if isinstance(rejected, bytes) else rejected
                    self._answer(status, [("Content-Type", "application/xml")], body)
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                onward = http.client.HTTPConnection(server.hostname or "", server.port, timeout=60)
                try:
                    onward.request(self.command, self.path, body=body, headers=headers)
                    reply = onward.getresponse()
                    body = reply.read()
                    if reword is not None and reply.status >= 400:
                        body = reword(body)
                    self._answer(reply.status, reply.getheaders(), body)
                finally:
                    onward.close()

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                length = str(len(body))
                for name, value in headers:
                    if name.lower() == "content-length" and self.command == "HEAD":
                        length = value
                    elif name.lower() not in HOP | {"content-length"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.ca = ""
        if folder is not None:
            certificate, key = _certificate(folder)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.ca = str(certificate)
        scheme = "http" if folder is None else "https"
        self.endpoint = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Close the connections and refuse new ones."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "cert.pem").write_bytes(built.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, plain))
    return folder / "cert.pem", folder / "key.pem"
