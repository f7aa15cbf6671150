"""What a corpus may name: no file outside of it, no address that only this machine reaches, nothing that is run."""

import ast
import contextlib
import io
import os
import pickle
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from m3agiqa.config import AccessConfig, ImageConfig, RunConfig, load_config
from m3agiqa.corpus import Access, Refused, open_corpus
from m3agiqa.corpus.web import _may_connect
from m3agiqa.decoding import decode_rows
from tests.corpora import encode, picture

PACKAGE = Path(__file__).parent.parent / "m3agiqa"
IMAGE = encode(picture())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A corpus's folder, and files beside it that it has no business with."""
    for folder in ("corpus/pictures", "corpus-2", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(IMAGE)
    corpus = tmp_path / "corpus"
    (corpus / "out").symlink_to(tmp_path / "elsewhere")
    (corpus / "out.png").symlink_to(tmp_path / "elsewhere/a.png")
    (corpus / "within.png").symlink_to(corpus / "pictures/a.png")
    os.mkfifo(corpus / "pipe.png")
    return corpus


def statuses(corpus: Path, *named: str, **options) -> list[tuple[str | None, str | None]]:
    """Status (None: decoded) and error of manifest rows that name these images."""
    (corpus / "m.csv").write_text("image\n" + "".join(f"{name}\n" for name in named))
    opened = open_corpus(str(corpus / "m.csv"), **options)
    tables = [table for shard in opened.shards for table in shard.read()]
    decoded = [rows for table in tables for rows in decode_rows(table, ImageConfig(), opened.access)]
    return [(row["_status"], row["_error"]) for rows in decoded for row in rows.to_pylist()]


def test_images_of_the_corpus_are_read(place):
    inside = ["pictures/a.png", "./pictures/../pictures/a.png", f"{place}/pictures/a.png", "within.png"]
    assert statuses(place, *inside) == [(None, None)] * 4


@pytest.mark.parametrize(
    "named",
    ["../elsewhere/a.png", "{}/../elsewhere/a.png", "{}-2/a.png", "out.png", "out/a.png", "/etc/passwd",
     "/proc/self/environ", "file:///etc/passwd", "FILE:///etc/passwd", "s3://bucket/a.png", "memory://a.png",
     "zip://a.png::file:///tmp/a.zip", "http://127.0.0.1/a.png", "https://example.org/a.png"],
)  # fmt: skip
def test_what_lies_elsewhere_is_a_rejected_row_with_the_reason(place, named):
    [(status, error)] = statuses(place, named.format(place))
    assert status == "rejected"
    assert "access." in error or "file:// address" in error or "chain of file systems" in error
    assert "root:" not in error


@pytest.mark.parametrize("named", ["pipe.png", "pictures", "nothing.png"])
def test_what_is_no_file_is_rejected_and_waited_for_by_nobody(place, named):
    [(status, error)] = statuses(place, named)
    assert status == "rejected"
    assert "no such file" in error


def test_roots_let_more_in(place):
    named = ["../elsewhere/a.png", "out.png", f"{place.parent}/elsewhere/a.png"]
    assert statuses(place, *named, access=AccessConfig(roots=(str(place.parent / "elsewhere"),))) == [(None, None)] * 3
    assert statuses(place, "a.png", images=str(place.parent / "elsewhere")) == [(None, None)]
    link = place.parent / "link"
    link.symlink_to(place.parent / "elsewhere")
    assert statuses(place, f"{place.parent}/elsewhere/a.png", f"{link}/a.png", images=str(link)) == [(None, None)] * 2


def test_a_prompt_beside_an_image_is_not_read_from_elsewhere(place):
    (place.parent / "elsewhere/secret.txt").write_text("secret")
    (place / "within.txt").symlink_to(place.parent / "elsewhere/secret.txt")
    (place / "pictures/a.txt").write_text("a fox")
    rows = {r["id"]: r["prompt"] for s in open_corpus(str(place)).shards for t in s.read() for r in t.to_pylist()}
    assert rows["pictures/a.png"] == "a fox"
    assert rows["within.png"] is None


def test_a_large_file_is_rejected(place):
    (place / "large.png").write_bytes(bytes(2**20 + 1))
    [(status, error)] = statuses(place, "large.png", access=AccessConfig(max_mib=1))
    assert status == "rejected"
    assert "access.max_mib" in error


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/set/../other/x.png", "s3://other/set/x.png", "s3://bucket/settings/x.png", "gs://bucket/set/x.png",
     "s3://key:secret@bucket/set/x.png", "s3://bucket/set/x.png?endpoint_override=http://127.0.0.1",
     "simplecache::s3://bucket/set/x.png", "s3://bucket/set/x.png::file:///etc/passwd"],
)  # fmt: skip
def test_a_store_is_read_below_the_root_only_and_as_the_root_says(uri):
    with pytest.raises(Refused):
        Access(("s3://bucket/set",)).fetch(uri)


def test_refusals_cross_processes():
    refused = pickle.loads(pickle.dumps(Refused("/etc/passwd", "leads outside")))
    assert str(refused) == "/etc/passwd leads outside"
    assert isinstance(refused, FileNotFoundError)


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        # Clients that hang up are what is tested. A traceback from this thread would be more than noise: Python 3.11
        # parses source to print one, which another thread that parses at that moment does not survive.
        with contextlib.suppress(ConnectionError):
            self._answer()

    def _answer(self) -> None:
        code = int(self.path[1:4]) if self.path[1:4].isdigit() else 200
        if self.path.startswith("/drop/"):
            whole = b"HTTP/1.0 200 OK\r\nContent-Length: 90\r\n\r\n" + bytes(90)
            for place in range(0 if self.path == "/drop/head" else whole.index(bytes(90)), len(whole)):
                time.sleep(0.2)
                self.wfile.write(whole[place : place + 1])
        self.send_response(code)
        if self.path.startswith("/302/"):
            self.send_header("Location", self.path.removeprefix("/302/").replace("~", ":"))
        self.end_headers()
        if self.path == "/slow.png":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif code == 200:
            self.wfile.write(bytes(3 * 2**20) if self.path == "/large.png" else IMAGE)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def web(**rules: object) -> Access:
    return Access((), AccessConfig(http=True, **{"http_hosts": ("127.0.0.1",), **rules}))


def test_an_image_from_the_web_where_it_is_allowed(server):
    assert web().fetch(f"{server}/a.png") == IMAGE
    assert web().fetch(f"{server}/302//a.png") == IMAGE
    assert web(http_hosts=("127.*", "127.0.0.1")).fetch(f"{server}/a.png?x=1") == IMAGE


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/302/http~//169.254.169.254/latest", "does not name"), ("/302/file~///etc/passwd", "no http or https"),
     ("/302//302//302//302//302//302/a", "redirects"), ("/large.png", "access.http_max_mib")],
)  # fmt: skip
def test_redirects_and_sizes_are_checked(server, path, reason):
    with pytest.raises(Refused, match=reason):
        web(http_max_mib=1).fetch(server + path)


def test_a_private_address_needs_to_be_named_in_full(server):
    for hosts in ((), ("127.*",)):
        with pytest.raises(Refused, match="not a public address"):
            web(http_hosts=hosts).fetch(f"{server}/a.png")
    with pytest.raises(Refused, match="user or a password"):
        web().fetch(server.replace("//", "//user:word@") + "/a.png")


def test_what_a_server_says_is_the_rows_fault_or_the_systems(server):
    with pytest.raises(FileNotFoundError, match="404"):
        web().fetch(f"{server}/404")
    for path in ("/500", "/429"):
        with pytest.raises(OSError, match=path[1:]) as caught:
            web().fetch(server + path)
        assert not isinstance(caught.value, FileNotFoundError)
    with pytest.raises(OSError, match="no answer") as caught:
        web(http_timeout_s=0.5).fetch(f"{server}/slow.png")
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("part", ["head", "body"])
def test_the_limit_of_time_is_for_all_of_an_answer(server, part):
    begun = time.monotonic()
    with pytest.raises(OSError, match="no answer"):
        web(http_timeout_s=1).fetch(f"{server}/drop/{part}")
    assert time.monotonic() - begun < 8  # all of it would take 18 s and more


@pytest.mark.parametrize("named", ["źdźbło.pl", "ŹDŹBŁO.pl", "xn--dbo-iwa1zb.pl"])
def test_a_host_of_other_letters_is_asked_by_its_other_name(server, monkeypatch, named):
    asked, look_up = [], socket.getaddrinfo

    def found(host, *args, **more):
        if host != "127.0.0.1":
            asked.append(host)
        return look_up("127.0.0.1", *args, **more)

    monkeypatch.setattr("m3agiqa.corpus.web.socket.getaddrinfo", found)
    port = server.rpartition(":")[2]
    assert web(http_hosts=(named,)).fetch(f"http://Źdźbło.pl:{port}/a.png") == IMAGE
    with pytest.raises(Refused, match="does not name"):
        web(http_hosts=("zdzblo.pl",)).fetch(f"http://źdźbło.pl:{port}/a.png")
    with pytest.raises(Refused, match="is no URL"):
        web().fetch("http://ź..pl/a.png")
    assert asked == ["xn--dbo-iwa1zb.pl"]


@pytest.mark.parametrize(
    ("address", "public", "named"),
    [("93.184.216.34", True, True), ("10.0.0.1", False, True), ("127.0.0.1", False, True), ("::1", False, True),
     ("169.254.169.254", False, False), ("::ffff:169.254.169.254", False, False), ("fe80::1", False, False),
     ("fd00:ec2::254", False, False), ("64:ff9b::a9fe:a9fe", False, False), ("0.0.0.0", False, False),
     ("2002:7f00:1::", False, True), ("100.64.0.1", False, True), ("2606:4700::1111", True, True)],
)  # fmt: skip
def test_addresses(address, public, named):
    assert _may_connect(address, named=False) is public
    assert _may_connect(address, named=True) is named


def test_a_tar_puts_nothing_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "t.tar", "w") as tar:
        for name in ("../../evil.png", f"{tmp_path}/evil.png", "good.png"):
            info = tarfile.TarInfo(name)
            info.size = len(IMAGE)
            tar.addfile(info, io.BytesIO(IMAGE))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    monkeypatch.chdir(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    rows = [r for s in open_corpus(str(tmp_path / "in/t.tar")).shards for t in s.read() for r in t.to_pylist()]
    assert sorted(tmp_path.rglob("*")) == before
    assert "t/good" in {row["id"] for row in rows}
    assert all(row["_bytes"] == IMAGE and row["_uri"] is None for row in rows)


def test_nothing_is_unpickled_or_run():
    """Weights are safetensors, or read as weights only; YAML is read as data."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in {"eval", "exec", "yaml.load", "os.system", "joblib.load"}, path
            assert not called.endswith(("pickle.load", "pickle.loads", ".extractall", ".extract")), path
            assert called != "torch.load" or keywords.get("weights_only") == "True", path
            assert keywords.get("allow_pickle", "False") == "False", path
            assert keywords.get("trust_remote_code", "") != "True", path


def test_code_of_a_checkpoint_is_run_only_if_it_is_said():
    assert RunConfig().model.trust_remote_code is False
    assert load_config(None, ["model.trust_remote_code=true"]).model.trust_remote_code is True


@pytest.mark.parametrize("prompt", ["{{ 7 * 7 }}", "{% for x in [1] %}x{% endfor %}", "{prompt} {0} %s ${HOME} $(id)"])
def test_a_prompt_is_text_and_no_template(prompt):
    from m3agiqa.aspects import Aspect
    from m3agiqa.conversation import questions
    from m3agiqa.engine.prompting import prompt_builder
    from m3agiqa.models import model_folder

    config = load_config().model
    builder = prompt_builder(model_folder(config), config)
    asked = questions(Aspect.CORRESPONDENCE, prompt)
    assert prompt in asked.first
    assert prompt in builder.tokenizer.decode(builder.first_round(asked), clean_up_tokenization_spaces=False)
