"""A mirror whose caches are out of step: the name under which a suite is whole is found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.emulated.archive import whole_suites

INDEX = "main/binary-s390x/Packages.xz"


class Mirror:
    """What a mirror has, by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put(self, name: str, codename: str, *, listed: int, size: int | None) -> None:
        """Have a suite whose InRelease lists an index of one size, and the index, of another size or not there."""
        release = f"Suite: x\nCodename: {codename}\nSHA256:\n {'0' * 64} {listed:8} {INDEX}\n"
        self.files[f"/debian/dists/{name}/InRelease"] = release.encode()
        if size is not None:
            self.files[f"/debian/dists/{name}/{INDEX}"] = bytes(size)


@pytest.fixture
def mirror() -> Iterator[tuple[Mirror, str]]:
    found = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = found.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET  # noqa: N815  http.server's name

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield found, f"http://127.0.0.1:{server.server_address[1]}/debian/"
        finally:
            server.shutdown()
            thread.join()


def test_a_suite_that_is_whole_goes_by_its_codename(mirror: tuple[Mirror, str]) -> None:
    mirror[0].put("trixie", "trixie", listed=10, size=10)
    assert whole_suites(mirror[1], "trixie", "s390x") == ["trixie"]


def test_where_packages_of_a_suite_are_missing_its_alias_is_the_next_to_be_tried(mirror: tuple[Mirror, str]) -> None:
    mirror[0].put("trixie", "trixie", listed=10, size=10)
    mirror[0].put("stable", "trixie", listed=9, size=9)
    mirror[0].put("testing", "forky", listed=9, size=9)
    assert whole_suites(mirror[1], "trixie", "s390x") == ["trixie", "stable"]


@pytest.mark.parametrize("size", [9, None])
def test_a_suite_out_of_step_goes_by_the_alias_that_is_whole(mirror: tuple[Mirror, str], size: int | None) -> None:
    mirror[0].put("trixie", "trixie", listed=10, size=size)
    mirror[0].put("oldstable", "bookworm", listed=7, size=7)
    mirror[0].put("stable", "trixie", listed=9, size=9)
    assert whole_suites(mirror[1], "trixie", "s390x") == ["stable"]


def test_another_release_is_never_taken_for_it(mirror: tuple[Mirror, str]) -> None:
    mirror[0].put("trixie", "trixie", listed=10, size=9)
    mirror[0].put("stable", "forky", listed=9, size=9)
    mirror[0].put("oldstable", "trixie", listed=8, size=9)
    assert whole_suites(mirror[1], "trixie", "s390x") == ["trixie"]


def test_a_mirror_that_does_not_answer_is_left_to_apt(mirror: tuple[Mirror, str]) -> None:
    assert whole_suites(mirror[1], "trixie", "s390x") == ["trixie"]
    assert whole_suites("http://127.0.0.1:1/debian/", "trixie", "s390x") == ["trixie"]
