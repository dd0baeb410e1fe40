"""Downloads images, with limits on size, time, redirects and, for servers, addresses."""

import ipaddress
import socket
import time
import urllib.parse
import urllib.request
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any

DOWNLOAD_BYTES = 2**28
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
DOWNLOAD_SECONDS = 300  # for all of a file
MAX_REDIRECTS = 5


def public_connection(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
    """
    Connect to a host outside private networks. Name and address are checked together, so that a host cannot answer with a
    public address first and a private one afterwards.
    """
    found = {info[4][0] for info in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)}
    if private := [ip for ip in found if not is_public(str(ip))]:
        raise PermissionError(f"{address[0]} is a private address ({private[0]})")
    return socket.create_connection((str(min(map(str, found))), address[1]), *args, **kwargs)


def is_public(ip: str) -> bool:
    """
    Whether an address belongs to the public internet.

    Example:

    ```python
    >>> [is_public(ip) for ip in ("8.8.8.8", "127.0.0.1", "10.1.2.3", "::1", "::ffff:127.0.0.1", "169.254.169.254")]
    [True, False, False, False, False, False]
    ```"""
    address = ipaddress.ip_address(ip.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_global and not address.is_multicast


class PublicHTTPHandler(urllib.request.HTTPHandler):
    """Opens `http` URLs of public addresses."""

    def http_open(self, request):
        return self.do_open(lambda *args, **kwargs: only_public(HTTPConnection(*args, **kwargs)), request)


class PublicHTTPSHandler(urllib.request.HTTPSHandler):
    """Opens `https` URLs of public addresses."""

    def https_open(self, request):
        return self.do_open(lambda *args, **kwargs: only_public(HTTPSConnection(*args, **kwargs)), request)


def only_public(connection: Any) -> Any:
    """Let a connection reach public addresses only."""
    connection._create_connection = public_connection  # what `http.client` calls to connect
    return connection


class LimitedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows few redirects, and to `http(s)` only."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(("http://", "https://")):
            raise ValueError(f"it redirects to {newurl[:80]!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str, max_bytes: int = DOWNLOAD_BYTES, timeout: float = DOWNLOAD_TIMEOUT, private: bool = True
) -> bytes:
    """
    The content of a URL, after at most 5 redirects and 5 minutes.

    Args:
        url: with `http`, `https` or `data` as its scheme.
        max_bytes: limit on the size.
        timeout: seconds without an answer.
        private: whether hosts in private networks, this computer among them, may be asked. A server that downloads what its
            clients name must pass `False`; no proxy is used then.

    Raises:
        ConnectionError: no answer, a larger file, too many redirects, or a refused address.
    """
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    handlers: list[Any] = [LimitedRedirects]
    if not private:
        handlers += [PublicHTTPHandler, PublicHTTPSHandler, urllib.request.ProxyHandler({})]
    parts: list[bytes] = []
    start, size = time.monotonic(), 0
    try:
        if not url.startswith(("http://", "https://", "data:")):
            raise ValueError("its scheme is not http, https or data")
        request = urllib.request.Request(quoted, headers={"User-Agent": "spar-hf"})
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as response:
            read = getattr(response, "read1", response.read)  # what has arrived, so that the clock is looked at
            while part := read(2**16):
                parts.append(part)
                size += len(part)
                if size > max_bytes:
                    raise ValueError(f"it is larger than {max_bytes} bytes")
                if time.monotonic() - start > DOWNLOAD_SECONDS:
                    raise ValueError(f"it takes longer than {DOWNLOAD_SECONDS} seconds")
            if getattr(response, "length", None):  # bytes that were announced and did not come
                raise ValueError(f"{response.length} bytes are missing")
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionError(f"Cannot download {url[:200]!r}: {error}. Check the address and the network.") from error
    return b"".join(parts)
