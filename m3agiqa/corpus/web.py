"""Images from the web, on behalf of a manifest that somebody else may have written.

What a manifest names must not reach what only this machine can: an address is looked up once, refused unless it is
public, and connected to as it is, so that a second look-up cannot give another one; every redirect goes the same way.
The environment's proxies are not used, as they would do the look-up.
"""

import contextlib
import errno
import fnmatch
import functools
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

_PORTS = {"http": 80, "https": 443}
_MOST_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
# What is worth another try: the server is busy or broken. Other codes of 400 and more are about the URL.
_TRY_AGAIN = {408, 425, 429}
_CHUNK_BYTES = 1 << 16
_USER_AGENT = "m3agiqa"


class Refused(FileNotFoundError):
    """A file that the configuration does not let a corpus name; for a run it is as good as not there."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(errno.EACCES, reason, uri)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return f"{self.uri} {self.reason}"

    def __reduce__(self) -> tuple[type["Refused"], tuple[str, str]]:
        """Crosses process borders with both arguments."""
        return type(self), (self.uri, self.reason)


def fetch(url: str, *, hosts: Sequence[str], timeout_s: float, max_bytes: int) -> bytes:
    """Reads what an http(s) URL gives, redirects followed.

    Args:
        url: with no user or password in it.
        hosts: names that are allowed, `*` standing for anything; empty: every host with a public address. A name that
            is given in full may have a private address, but never a link-local one, where clouds keep credentials.
        timeout_s: for all of it.
        max_bytes: the longest answer.

    Raises:
        Refused: host, address, scheme, redirect or size are not allowed.
        FileNotFoundError: the server says that there is no such thing.
        OSError: no answer, or not in time: worth another try.
    """
    ends = time.monotonic() + timeout_s
    try:
        hosts = [_ascii(host) for host in hosts]
    except UnicodeError as error:
        raise Refused(url, f"is not looked for: access.http_hosts holds what is no host ({error})") from None
    for _ in range(_MOST_REDIRECTS + 1):
        parts = _checked(url, hosts)
        address = _address(url, parts, hosts)
        try:
            found = _get(url, parts, address, ends, max_bytes)
        except (urllib3.exceptions.HTTPError, TimeoutError) as error:
            raise OSError(errno.EIO, f"no answer ({type(error).__name__})", url) from error
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise Refused(url, f"is reached over more than {_MOST_REDIRECTS} redirects")


def _checked(url: str, hosts: Sequence[str]) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
        if not parts.netloc.isascii() and "@" not in parts.netloc:
            parts = parts._replace(netloc=_ascii(str(parts.hostname)) + port)
    except ValueError as error:  # a port that is no number, a host that is no name
        raise Refused(url, f"is no URL ({error})") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise Refused(url, "is no http or https URL with a host")
    if "@" in parts.netloc:
        raise Refused(url, "holds a user or a password")
    if hosts and not any(fnmatch.fnmatchcase(parts.hostname, host) for host in hosts):
        raise Refused(url, f"is of a host that access.http_hosts does not name ({', '.join(hosts)})")
    return parts


def _ascii(host: str) -> str:
    """A host's name, or a pattern of names, as it is looked up and sent: IDNA where it is not ASCII, lower case.

    Raises:
        UnicodeError: it cannot be a name.
    """
    return host.lower() if host.isascii() else host.encode("idna").decode().lower()


def _address(url: str, parts: SplitResult, hosts: Sequence[str]) -> str:
    """The address to connect to; all that the name stands for must be allowed, or a server could choose."""
    port = parts.port or _PORTS[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(errno.EIO, f"the host is not known ({error})", url) from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    named = parts.hostname in hosts
    for address in addresses:
        if not _may_connect(address, named):
            raise Refused(url, f"leads to {address}, which is not a public address")
    return addresses[0]


def _may_connect(address: str, named: bool) -> bool:
    ip = _meant(ipaddress.ip_address(address))
    # fd00:ec2::254 is where AWS answers over IPv6; it is private, not link-local.
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip in ipaddress.ip_network("fd00:ec2::/32"):
        return False
    return named or ip.is_global


def _meant(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


@contextlib.contextmanager
def _until(seconds: float, shut: Callable[[], object]) -> Iterator[None]:
    """Shuts a socket when the time is up, which ends what waits for it.

    A socket's own timeout is that of one read: a server that sends a byte now and then is never too slow for it.
    """

    def end() -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it is shut already, or was given back
            shut()

    alarm = threading.Timer(max(seconds, 0.0), end)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


class _HTTP(HTTPConnection):
    """A connection whose timeout is that of all headers."""

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        with _until(float(self.timeout or 0), functools.partial(self.sock.shutdown, socket.SHUT_RDWR)):
            return super().getresponse()


class _HTTPS(_HTTP, HTTPSConnection):
    """The same with a certificate."""


@functools.lru_cache(maxsize=256)
def _pool(scheme: str, address: str, port: int, host: str) -> urllib3.HTTPConnectionPool:
    """Connections to an address, which are kept open; a certificate must be that of the host's name."""
    if scheme == "http":
        plain = urllib3.HTTPConnectionPool(address, port, maxsize=16)
        plain.ConnectionCls = _HTTP
        return plain
    pool = urllib3.HTTPSConnectionPool(
        address, port, maxsize=16, server_hostname=host, assert_hostname=host, cert_reqs="CERT_REQUIRED"
    )
    pool.ConnectionCls = _HTTPS
    return pool


def _get(url: str, parts: SplitResult, address: str, ends: float, max_bytes: int) -> bytes | str:
    """One request: what it gives, or where it is redirected to."""
    pool = _pool(parts.scheme, address, parts.port or _PORTS[parts.scheme], str(parts.hostname))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    response = pool.request(
        "GET",
        target,
        headers={"Host": parts.netloc, "User-Agent": _USER_AGENT, "Accept-Encoding": "identity"},
        redirect=False,
        retries=False,
        timeout=urllib3.Timeout(total=max(ends - time.monotonic(), 0.001)),
        preload_content=False,
        decode_content=False,  # what is packed small could unpack to anything
    )
    whole = False
    try:
        if response.status in _REDIRECTS:
            return response.headers.get("Location", "")
        if response.status in _TRY_AGAIN or response.status >= 500:
            raise OSError(errno.EIO, f"the server answers {response.status}", url)
        if response.status != 200:
            raise FileNotFoundError(errno.ENOENT, f"the server answers {response.status}", url)
        with _until(ends - time.monotonic(), response.shutdown):
            data = _body(url, response, ends, max_bytes)
        whole = True
        return data
    finally:
        # A connection with an answer that nobody read must not be used again.
        if whole:
            response.release_conn()
        else:
            response.close()


def _body(url: str, response: urllib3.BaseHTTPResponse, ends: float, max_bytes: int) -> bytes:
    parts, size = [], 0
    for chunk in response.stream(_CHUNK_BYTES, decode_content=False):
        size += len(chunk)
        if size > max_bytes:
            raise Refused(url, f"is larger than {max_bytes / 2**20:g} MiB (access.http_max_mib)")
        parts.append(chunk)
        if time.monotonic() > ends:
            break
    if time.monotonic() > ends:  # what was cut off may look whole
        raise TimeoutError
    return b"".join(parts)
