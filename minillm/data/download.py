"""One file over HTTPS, whole or not at all. The only place of the project that opens a connection."""

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from minillm.config import UserError

_BLOCK = 1 << 20
_SILENCE = 60.0  # seconds without a byte after which the server counts as gone
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def download(
    url: str,
    out: Path | str,
    *,
    sha256: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[int, str]:
    """Fetches `url` into the file `out`; returns (bytes, their SHA-256 in hex).

    Args:
        url: https://…; plain http only from this machine itself.
        sha256: what the file must hash to.
        limit: bytes after which to give up.
        progress: called with the bytes so far, and in all where the server says.

    Raises `UserError` for another kind of address, also of a redirection, an answer that is no success, a file that is
    too long, incomplete or another than `sha256` says, or where `out` exists. `out` is untouched then.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another file, or replace it with --overwrite")
    _check(url)
    proxies = urllib.request.ProxyHandler({}) if urlsplit(url).hostname in _LOOPBACK else urllib.request.ProxyHandler()
    opener = urllib.request.build_opener(_SafeRedirects, proxies)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file, opener.open(url, timeout=_SILENCE) as answer:
            total = answer.length  # None where the server does not say
            _check_room(url, out, total, limit)
            digest, size = hashlib.sha256(), 0
            while block := answer.read(_BLOCK):
                size += len(block)
                if limit is not None and size > limit:
                    raise UserError(f"{url} is longer than the limit of {limit:,} bytes; raise --limit")
                file.write(block)
                digest.update(block)
                if progress is not None:
                    progress(size, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and size != total:
            raise UserError(f"{url} ended after {size:,} of {total:,} bytes; try again")
        if sha256 is not None and digest.hexdigest() != sha256.lower():
            raise UserError(f"{url} has the SHA-256 {digest.hexdigest()}, not {sha256.lower()}: it is another file")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(out)
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{url} answers {error.code} {error.reason}; check the address") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"{url} cannot be reached: {getattr(error, 'reason', error)}; check address and network"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return size, digest.hexdigest()


def _check(url: str) -> None:
    parts = urlsplit(url)
    if not parts.hostname or (parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK)):
        raise UserError(f"{url} is no https:// address; plain http can be read and changed on the way")


def _check_room(url: str, out: Path, total: int | None, limit: int | None) -> None:
    if total is None:
        return
    if limit is not None and total > limit:
        raise UserError(f"{url} has {total:,} bytes, more than the limit of {limit:,}; raise --limit")
    free = shutil.disk_usage(out.parent).free
    if total > free:
        raise UserError(f"{url} has {total:,} bytes, and {out.parent} room for {free:,}; make room, or choose another")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
