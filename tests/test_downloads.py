"""Downloads from a server on this machine: checked, never half taken."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import run

from dsvlib._errors import DsvError, RequestError
from dsvlib.data import downloads
from dsvlib.data.downloads import Archive, fetch, folder_digest, state, verify

CONTENT = bytes(range(256)) * 2000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; after `breaks_after` bytes the line goes dead."""

    breaks_after: int | None = None
    content = CONTENT
    asked = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        with suppress(OSError):  # torchvision looks for redirections and hangs up
            self.wfile.write(self.server.content[: self.server.breaks_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def archive(server: Server) -> Archive:
    return Archive("sub/file.bin", (f"http://127.0.0.1:{server.server_port}/file.bin",), MD5)


def test_broken_download_leaves_nothing_and_is_brought_whole_later(
    server: Server, tmp_path: Path
) -> None:
    file, said = archive(server), []
    server.breaks_after = 100_000
    with pytest.raises(DsvError, match=r"no download .*; run it again"):
        fetch([file], tmp_path, echo=said.append)
    assert state(file, tmp_path) == "missing"
    assert list((tmp_path / "sub").iterdir()) == []
    server.breaks_after = None
    fetch([file], tmp_path, echo=said.append)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert state(file, tmp_path) == "whole"
    asked = server.asked
    fetch([file], tmp_path, echo=said.append)
    assert said[-1] == "sub/file.bin · already whole"
    assert server.asked == asked


def test_the_second_address_is_asked_where_the_first_fails(server: Server, tmp_path: Path) -> None:
    file = archive(server)
    fetch([replace(file, urls=("http://127.0.0.1:9/file.bin", *file.urls))], tmp_path)
    assert (tmp_path / file.path).read_bytes() == CONTENT


def test_wrong_content_is_not_kept_and_damage_is_repaired(server: Server, tmp_path: Path) -> None:
    file = archive(server)
    server.content = b"something else"
    with pytest.raises(DsvError, match=f"another MD5 than {MD5}"):
        fetch([file], tmp_path, echo=lambda _: None)
    assert state(file, tmp_path) == "missing"
    (tmp_path / file.path).write_bytes(b"damaged")
    assert state(file, tmp_path) == "damaged"
    server.content = CONTENT
    fetch([file], tmp_path, echo=lambda _: None)
    assert state(file, tmp_path) == "whole"


def test_offline_says_where_to_put_the_file(tmp_path: Path) -> None:
    file = Archive("file.bin", ("http://127.0.0.1:9/file.bin",), MD5)
    with pytest.raises(DsvError, match=r"offline copy the file to .*file\.bin"):
        fetch([file], tmp_path, echo=lambda _: None)


def test_full_disk_is_one_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", full)
    with pytest.raises(DsvError, match="No space left on device; free space"):
        fetch([archive(server)], tmp_path, echo=lambda _: None)


@pytest.mark.parametrize("name", downloads.CLASSES)
def test_every_set_has_addresses_and_checksums(name: str) -> None:
    for file in downloads.archives(name):
        assert file.urls
        assert all(url.startswith("http") for url in file.urls)
        assert len(file.md5) == 32


def test_folder_digest_sees_names_and_contents(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "1.png").write_bytes(b"x")
    count, first = folder_digest(tmp_path)
    assert count == 2
    assert verify(f"folder:{tmp_path}", tmp_path) == (
        True,
        f"2 files, sha256 of the listing {first}",
    )
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"y")
    changed = folder_digest(tmp_path)[1]
    (tmp_path / "train" / "a" / "1.png").rename(tmp_path / "train" / "a" / "2.png")
    assert len({first, changed, folder_digest(tmp_path)[1]}) == 3
    assert not verify("imagenette-64", tmp_path)[0]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tmp_path)]
    with pytest.raises(RequestError, match="did you mean 'cifar10'"):
        downloads.archives("cifar1O")
    assert run("data", "fetch", "cifar1O", *root) == 2
    assert run("data", "fetch", *root) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert run("data", "verify", "cifar10", *root) == 1
    printed = capsys.readouterr()
    assert "cifar-10-python.tar.gz is missing; run dsv data fetch cifar10" in printed.out
    assert printed.err == "dsv: cifar10: not whole; the lines above say what to do\n"
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half")
    assert run("data", "verify", *root) == 1
    assert "damaged" in capsys.readouterr().out
    assert run("data", "verify", "digits", *root) == 0
    assert run("data", "list", *root) == 0
    assert "cifar10        damaged; dsv data fetch cifar10" in capsys.readouterr().out
    (tmp_path / "cifar10").mkdir()
    assert run("data", "list", *root) == 0
    assert "cifar10        an empty folder; dsv data verify cifar10" in capsys.readouterr().out
    assert run("data", "verify", *root) == 1
    assert "NOT WHOLE · " in (printed := capsys.readouterr().out)
    assert f"{tmp_path}/cifar10/train: expected a folder of classes, found none" in printed
    assert run("data", "fetch", "cifar10", *root) == 0
    assert f"its folder {tmp_path}/cifar10 is used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "answers"), [(200, True), (404, False), (405, True), (None, False)]
)
def test_an_address_answers_or_does_not(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int | None, answers: bool
) -> None:
    def do_HEAD(handler: Handler) -> None:
        if status is not None:
            handler.send_response(status)
            handler.end_headers()

    monkeypatch.setattr(Handler, "do_HEAD", do_HEAD, raising=False)
    monkeypatch.setattr(downloads, "archives", lambda _: [archive(server)])
    assert downloads.reachable("cifar10") is answers
