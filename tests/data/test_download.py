"""Downloads, from a server on this machine."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minillm.config import UserError
from minillm.data.download import download

BODY = bytes(range(256)) * 9000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://example.org/file")
            self.end_headers()
        elif self.path == "/no-http":
            self.wfile.write(b"hello\r\n\r\n")
        elif self.path == "/cut-chunk":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1000\r\nless than that")
        else:
            self.send_response(200)
            if self.path != "/unknown-length":
                self.send_header("Content-Length", str(len(BODY) + 5 * (self.path == "/cut")))
            self.end_headers()
            with suppress(ConnectionError):  # a client that has seen enough hangs up
                self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/file", "/unknown-length"])
def test_a_file_arrives_whole(server: str, tmp_path: Path, path: str) -> None:
    seen = []
    digest = hashlib.sha256(BODY).hexdigest()
    result = download(server + path, tmp_path / "sub" / "f", sha256=digest.upper(), progress=lambda *x: seen.append(x))
    assert result == (len(BODY), digest) and (tmp_path / "sub" / "f").read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY) if path == "/file" else None)
    with pytest.raises(UserError, match="exists"):
        download(server + path, tmp_path / "sub" / "f")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/missing", {}, "answers 404"),
        ("/cut", {}, "ended after 2,304,000 of 2,304,005 bytes"),
        ("/file", {"sha256": "00" * 32}, "has the SHA-256 .*, not 0000"),
        ("/file", {"limit": 1000}, "more than the limit of 1,000"),
        ("/unknown-length", {"limit": 1000}, "longer than the limit of 1,000"),
        ("/no-http", {}, "cannot be reached: hello"),
        ("/cut-chunk", {}, "cannot be reached: IncompleteRead"),
        ("/away", {}, "http://example.org/file is no https:// address"),
    ],
)
def test_refusals_leave_the_old_file(server: str, tmp_path: Path, path: str, options: dict, message: str) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(UserError, match=message):
        download(server + path, tmp_path / "f", overwrite=True, **options)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f", "old")]


@pytest.mark.parametrize("url", ["http://example.org/f", "file:///etc/passwd", "ftp://example.org/f", "f.txt", ""])
def test_only_https(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="is no https:// address"):
        download(url, tmp_path / "f")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        download("http://127.0.0.1:1/f", tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
