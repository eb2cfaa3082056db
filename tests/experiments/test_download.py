"""Downloads against servers that cut, change, stall and lie: the file is the published one, or it is not there."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks import download as module
from experiments.tasks.download import Limits, Progress, download
from experiments.tasks.partial import locked
from tests.experiments.file_servers import Answer, serving
from theory.errors import MergeboundError

CONTENT = np.random.default_rng([0, 0xD0]).bytes(20_000)
OTHER = np.random.default_rng([1, 0xD0]).bytes(20_000)
QUICK = Limits(timeout=20.0, stalled=20.0, attempts=4, pause=0.0, longest_pause=0.0, lock=20.0)
MD5 = hashlib.md5(CONTENT).hexdigest()


def refused(call: Callable[[], object]) -> str:
    """The one line of the error."""
    with pytest.raises(MergeboundError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize("kind", ["md5", "sha256", "size", "none"])
def test_a_file_arrives_whole_and_alone(tmp_path: Path, kind: str) -> None:
    known = {
        "md5": {"md5": MD5.upper()},
        "sha256": {"sha256": hashlib.sha256(CONTENT).hexdigest()},
        "size": {"size": len(CONTENT)},
        "none": {},
    }[kind]
    with serving(Answer(CONTENT)) as server:
        target = download(server.url, tmp_path / "new" / "data.bin", limits=QUICK, **known)  # type: ignore[arg-type]
        again = download(server.url, target, limits=QUICK, **known)  # type: ignore[arg-type]
    assert target.read_bytes() == CONTENT
    assert again == target
    assert left(tmp_path / "new") == {"data.bin"}
    assert len(server.requests) == 1


@pytest.mark.parametrize("validator", [{"etag": '"a"'}, {"modified": "Wed, 21 Oct 2015 07:28:00 GMT"}])
def test_a_cut_download_asks_only_for_the_rest(tmp_path: Path, validator: dict[str, str]) -> None:
    cut, whole = Answer(CONTENT, cut=7_000, **validator), Answer(CONTENT, **validator)  # type: ignore[arg-type]
    with serving(cut, whole) as server:
        target = download(server.url, tmp_path / "data.bin", limits=QUICK)
    assert target.read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=7000-"
    assert server.requests[1]["If-Range"] in validator.values()
    assert server.sent == len(CONTENT)


def test_without_validators_a_checksum_allows_to_go_on_and_its_absence_does_not(tmp_path: Path) -> None:
    for sums, requests in (({"md5": MD5}, "bytes=7000-"), ({}, None)):
        with serving(Answer(CONTENT, cut=7_000), Answer(CONTENT)) as server:
            folder = tmp_path / str(len(sums))
            target = download(server.url, folder / "data.bin", limits=QUICK, **sums)  # type: ignore[arg-type]
        assert target.read_bytes() == CONTENT
        assert server.requests[1].get("Range") == requests


def test_a_server_that_ignores_ranges_sends_all_again(tmp_path: Path) -> None:
    with serving(Answer(CONTENT, ranges=False, cut=5, etag='"a"'), Answer(CONTENT, ranges=False, etag='"a"')) as server:
        target = download(server.url, tmp_path / "data.bin", limits=QUICK, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert server.sent == len(CONTENT) + 5


def test_pieces_of_two_versions_are_never_put_together(tmp_path: Path) -> None:
    with serving(Answer(OTHER, cut=9_000, etag='"a"'), Answer(CONTENT, etag='"b"')) as server:
        target = download(server.url, tmp_path / "data.bin", limits=QUICK)
    assert target.read_bytes() == CONTENT
    # a server that sends the rest of another version all the same
    with serving(Answer(OTHER, cut=9_000, etag='"a"'), Answer(CONTENT, etag='"b"', conditions=False)) as server:
        target = download(server.url, tmp_path / "rude.bin", limits=QUICK)
    assert target.read_bytes() == CONTENT
    # another address, whose validators mean nothing here
    with (
        serving(Answer(OTHER, cut=9_000, etag='"1"'), Answer(status=404)) as one,
        serving(Answer(CONTENT, etag='"1"')) as two,
    ):
        target = download([one.url, two.url], tmp_path / "mirror.bin", limits=QUICK)
    assert target.read_bytes() == CONTENT
    # no validator, same length: only the checksum tells, and the file is fetched anew
    with serving(Answer(OTHER, cut=9_000), Answer(CONTENT)) as server:
        target = download(server.url, tmp_path / "again.bin", limits=QUICK, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=9000-", None]


def test_another_part_than_asked_for_is_not_appended(tmp_path: Path) -> None:
    wrong = Answer(CONTENT, etag='"a"', shift=10)
    with serving(Answer(CONTENT, etag='"a"', cut=7_000), wrong, Answer(CONTENT, etag='"a"')) as server:
        assert download(server.url, tmp_path / "data.bin", limits=QUICK).read_bytes() == CONTENT
    with serving(Answer(CONTENT, etag='"a"', cut=7_000), wrong) as server:
        assert "wrong part" in refused(lambda: download(server.url, tmp_path / "never.bin", limits=QUICK))


def test_a_wrong_checksum_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    with serving(Answer(OTHER)) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK, md5=MD5))
    assert MD5 in line
    assert hashlib.md5(OTHER).hexdigest() in line
    assert "data.bin" in line
    assert "removed" in line
    assert left(tmp_path) == set()


def test_a_file_of_another_size_is_refused_before_it_comes(tmp_path: Path) -> None:
    with serving(Answer(CONTENT)) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK, size=5))
    assert "20000 bytes" in line
    assert left(tmp_path) == set()


def test_a_file_that_is_there_with_another_checksum_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    target.write_bytes(OTHER)
    line = refused(lambda: download("/nowhere", target, limits=QUICK, md5=MD5))
    assert str(target) in line
    assert target.read_bytes() == OTHER


def test_a_length_that_nobody_knows_is_not_trusted(tmp_path: Path) -> None:
    with serving(Answer(CONTENT, length=False, cut=100)) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK))
        assert "how long" in line
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK, size=len(CONTENT)))
        assert "100 of 20000" in line
    with serving(Answer(CONTENT, length=False)) as server:
        assert download(server.url, tmp_path / "a.bin", limits=QUICK, md5=MD5).read_bytes() == CONTENT
    with serving(Answer(CONTENT, chunked=True, cut=3_000), Answer(CONTENT, chunked=True)) as server:
        assert download(server.url, tmp_path / "b.bin", limits=QUICK).read_bytes() == CONTENT


def test_a_longer_file_than_its_known_size_is_not_cut_to_fit(tmp_path: Path) -> None:
    with serving(Answer(CONTENT, length=False)) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK, size=10_000))
    assert "10000" in line
    assert not (tmp_path / "data.bin").exists()


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 4), (429, 4), (500, 4)])
def test_lasting_errors_are_told_at_once_and_passing_ones_tried_again(
    tmp_path: Path, status: int, requests: int
) -> None:
    with serving(Answer(status=status, retry_after="0")) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK))
    assert str(status) in line
    assert server.url in line
    assert len(server.requests) == requests
    assert left(tmp_path) == set()


def test_the_next_mirror_is_asked_and_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    with serving(Answer(CONTENT, cut=6_000), Answer(status=404)) as first, serving(Answer(CONTENT)) as second:
        target = download([first.url, second.url], tmp_path / "data.bin", limits=QUICK, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert second.requests[0]["Range"] == "bytes=6000-"


def test_redirects_lead_to_http_only(tmp_path: Path) -> None:
    with serving(Answer(CONTENT)) as server:
        with serving(Answer(location=server.url)) as door:
            assert download(door.url, tmp_path / "a.bin", limits=QUICK).read_bytes() == CONTENT
        for place in ("file:///etc/hostname", "ftp://127.0.0.1/x"):
            with serving(Answer(location=place)) as door:
                line = refused(lambda url=door.url: download(url, tmp_path / "b.bin", limits=QUICK))  # type: ignore[misc]
            assert place in line
            assert "not" in line
    with serving(Answer(location="/data.bin")) as circle:
        assert "302" in refused(lambda: download(circle.url, tmp_path / "c.bin", limits=QUICK))


def test_a_silent_server_and_a_dripping_one_are_given_up(tmp_path: Path) -> None:
    began = time.monotonic()
    limits = Limits(timeout=0.1, attempts=2, pause=0.0)
    with serving(Answer(CONTENT, delay=0.5)) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=limits))
    assert "timed out" in line
    limits = Limits(timeout=1.0, stalled=0.1, slowest=1_000, attempts=2, pause=0.0)
    with serving(Answer(CONTENT, drip=0.02)) as server:
        line = refused(lambda: download(server.url, tmp_path / "drip.bin", limits=limits))
    assert "stalled" in line
    assert time.monotonic() - began < 20


def test_nobody_listening_is_an_error_of_one_line(tmp_path: Path) -> None:
    with serving(Answer(CONTENT)) as server:
        pass
    line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK))
    assert "no connection" in line
    line = refused(lambda: download("gopher://x/y", tmp_path / "data.bin", limits=QUICK))
    assert "gopher" in line


def test_local_paths_and_file_addresses_are_sources(tmp_path: Path) -> None:
    source = tmp_path / "a b.bin"
    source.write_bytes(CONTENT)
    for number, address in enumerate([str(source), source.as_uri()]):
        assert download(address, tmp_path / f"{number}.bin", md5=MD5).read_bytes() == CONTENT
    line = refused(lambda: download(str(tmp_path / "none"), tmp_path / "x.bin"))
    assert "none" in line


def test_too_little_room_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 1 << 60)
    with serving(Answer(CONTENT)) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK))
    assert "make room" in line
    assert left(tmp_path) == set()


def test_progress_ends_at_the_whole_and_counts_what_was_there(tmp_path: Path) -> None:
    told: list[Progress] = []
    with serving(Answer(CONTENT, cut=8_000, etag='"a"'), Answer(CONTENT, etag='"a"')) as server:
        download(server.url, tmp_path / "data.bin", limits=QUICK, progress=told.append)
    assert (told[-1].done, told[-1].total) == (len(CONTENT), len(CONTENT))
    assert all(a.done <= b.done for a, b in itertools.pairwise(told))
    assert told[-1].rate > 0


def test_a_lock_that_is_held_too_long_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    limits = Limits(lock=0.1)
    found: list[str] = []
    with locked(target, 1.0):
        thread = threading.Thread(target=lambda: found.append(refused(lambda: download("/x", target, limits=limits))))
        thread.start()
        thread.join(10)
    assert "data.bin" in found[0]
    assert "another process" in found[0]


def test_two_at_once_fetch_the_file_once(tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    with serving(Answer(CONTENT, delay=0.2)) as server:
        threads = [
            threading.Thread(target=lambda: download(server.url, target, limits=QUICK, md5=MD5)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1


CHILD = """
import sys
from pathlib import Path
from experiments.tasks.download import download
download(sys.argv[1], Path(sys.argv[2]), md5=sys.argv[3] or None)
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_process_killed_in_the_midst_is_continued_by_the_next(tmp_path: Path, by: signal.Signals) -> None:
    target, part = tmp_path / "data.bin", tmp_path / "data.bin.part"
    big = CONTENT * 100  # beyond what the sockets hold
    with serving(Answer(big, etag='"a"', cut=1_200_000), Answer(big, etag='"a"')) as server:
        # the first answer is cut, and the child killed as it reads or in its pause of one second
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, server.url, str(target), hashlib.md5(big).hexdigest()],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.DEVNULL,
        )
        try:
            limit = time.monotonic() + 20
            while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < limit:
                time.sleep(0.005)
            child.send_signal(by)
            assert child.wait(20) != 0
        finally:
            child.kill()
        have = part.stat().st_size
        assert 0 < have <= 1_200_000
        assert not target.exists()
        download(server.url, target, md5=hashlib.md5(big).hexdigest(), limits=QUICK)
    assert target.read_bytes() == big
    assert server.requests[-1]["Range"] == f"bytes={have}-"
    assert left(tmp_path) == {"data.bin"}


answers = st.builds(
    Answer,
    content=st.sampled_from([CONTENT, CONTENT, OTHER, CONTENT[:12_000]]),
    status=st.sampled_from([0, 0, 0, 0, 503]),
    ranges=st.booleans(),
    cut=st.sampled_from([None, 0, 1, 6_000, 13_000, 19_999]),
    etag=st.sampled_from(["", '"a"', 'W/"a"']),
    conditions=st.booleans(),
    shift=st.sampled_from([0, 0, 0, 5]),
    chunked=st.booleans(),
    length=st.sampled_from([True, True, False]),
)


@given(st.lists(answers, min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=40)
def test_whatever_fails_the_file_is_the_published_one_or_absent(sequence: list[Answer], calls: int) -> None:
    limits = Limits(timeout=2.0, attempts=2, pause=0.0, longest_pause=0.0)
    with tempfile.TemporaryDirectory() as folder, serving(*sequence) as server:
        target = Path(folder) / "data.bin"
        for _ in range(calls):
            try:
                download(server.url, target, md5=MD5, limits=limits)
            except MergeboundError:
                assert not target.exists()
            else:
                assert target.read_bytes() == CONTENT
                assert left(Path(folder)) == {"data.bin"}
                break


@given(st.lists(answers, min_size=1, max_size=6))
@settings(max_examples=25)
def test_without_a_checksum_the_file_is_one_of_the_versions_whole(sequence: list[Answer]) -> None:
    tagged = []
    for answer in sequence:  # a server that changes a file changes its ETag
        tag = {CONTENT: '"c"', OTHER: '"o"'}.get(answer.content, '"s"') if answer.etag else ""
        tagged.append(Answer(**{**answer.__dict__, "etag": tag}))
    limits = Limits(timeout=2.0, attempts=3, pause=0.0, longest_pause=0.0)
    with tempfile.TemporaryDirectory() as folder, serving(*tagged) as server:
        target = Path(folder) / "data.bin"
        try:
            download(server.url, target, limits=limits)
        except MergeboundError:
            assert not target.exists()
        else:
            assert target.read_bytes() in {answer.content for answer in tagged}


def test_the_disk_being_full_keeps_what_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "_receive", full)
    with serving(Answer(CONTENT)) as server:
        line = refused(lambda: download(server.url, tmp_path / "data.bin", limits=QUICK))
    assert "disk is full" in line
