from __future__ import annotations

import os
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.errors import (
    AccessError,
    ConfigError,
    FolderMissingError,
    ObjectMissingError,
    SourceChangedError,
    StorageError,
)
from hcodec_core.storage import (
    Storage,
    file_uri,
    join_uri,
    open_storage,
    probe_conditional_writes,
    sha256_of_file,
    split_uri,
)

ODD_NAMES = [
    "plain.wav",
    "with space.wav",
    "ünï-日本.wav",
    "e\u0301.wav",
    "100%.wav",
    "x%20y.wav",
    "plus+amp&q?x=1#h.wav",
    "quote'\"<>.wav",
    "back\\slash~^{}|`.wav",
    "control\x01.wav",
]
S3_ONLY_NAMES = ["a//double.wav", "a/./dot.wav", "a/../up.wav", "folder/", "/leading.wav"]


@pytest.fixture(params=["s3", "file"])
def place(
    request: pytest.FixtureRequest, s3_storage: Storage, tmp_path: Path
) -> tuple[Storage, str]:
    """Storage and the URI of an empty folder in it."""
    if request.param == "s3":
        return s3_storage, request.getfixturevalue("bucket_uri") + "/root"
    (tmp_path / "root").mkdir()
    return s3_storage, file_uri(tmp_path / "root")


def uri_for(folder_uri: str, name: str) -> str:
    """URI of a name: percent-encoded in file URIs only."""
    if folder_uri.startswith("file://"):
        return file_uri(split_uri(folder_uri)[2] + "/" + name)
    return f"{folder_uri}/{name}"


def test_objects_come_back_as_they_were_written(place: tuple[Storage, str], tmp_path: Path) -> None:
    storage, folder = place
    uri = folder + "/a/b.bin"
    assert storage.head(uri) is None
    storage.write(uri, b"one")
    storage.write(uri, b"three")
    assert storage.read(uri) == b"three"
    info = storage.head(uri)
    assert info is not None
    assert (info.uri, info.size) == (uri, 5)
    assert '"' not in info.etag
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    uploaded = storage.upload(source, folder + "/a/c.bin")
    assert uploaded.size == 100_000
    storage.download(uploaded.uri, tmp_path / "back", etag=uploaded.etag)
    assert sha256_of_file(tmp_path / "back") == sha256_of_file(source)
    assert [o.uri for o in storage.list_objects(folder + "/")] == [uri, folder + "/a/c.bin"]
    assert next(iter(storage.list_objects(folder + "/"))).etag == info.etag
    storage.delete([uri, uri, folder + "/never-there"])
    with pytest.raises(ObjectMissingError, match=r"b\.bin"):
        storage.read(uri)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_survive_every_call(
    place: tuple[Storage, str], tmp_path: Path, name: str
) -> None:
    storage, folder = place
    uri = uri_for(folder, name)
    content = name.encode()
    assert storage.create(uri, content)
    assert storage.read(uri) == content
    (listed,) = storage.list_objects(folder + "/")
    assert listed.uri == uri
    storage.download(listed.uri, tmp_path / "back", etag=listed.etag)
    assert (tmp_path / "back").read_bytes() == content
    storage.delete([listed.uri])
    assert list(storage.list_objects(folder + "/")) == []


@pytest.mark.parametrize("name", S3_ONLY_NAMES)
def test_keys_that_are_no_paths_stay_what_they_are(
    s3_storage: Storage, bucket_uri: str, tmp_path: Path, name: str
) -> None:
    twin = f"{bucket_uri}/{name.strip('/').replace('//', '/')}"
    uri = f"{bucket_uri}/{name}"
    s3_storage.write(twin, b"another object")
    s3_storage.write(uri, b"right")
    assert uri in {o.uri for o in s3_storage.list_objects(bucket_uri + "/")}
    assert {o.uri for o in s3_storage.list_objects(uri)} == {uri}
    info = s3_storage.head(uri)
    assert info is not None
    s3_storage.download(uri, tmp_path / "back", etag=info.etag)
    assert (tmp_path / "back").read_bytes() == b"right"
    with pytest.raises(SourceChangedError):
        s3_storage.download(uri, tmp_path / "back", etag="0" * 32)
    s3_storage.delete([uri])
    assert s3_storage.head(uri) is None


def test_a_file_name_that_is_no_utf8_can_be_read(tmp_path: Path, s3_storage: Storage) -> None:
    (tmp_path / os.fsdecode(b"\xff\xfe.wav")).write_bytes(b"x")
    (listed,) = s3_storage.list_objects(file_uri(tmp_path) + "/")
    listed.uri.encode("ascii")
    assert s3_storage.read(listed.uri) == b"x"


def test_a_prefix_may_end_inside_a_name(place: tuple[Storage, str]) -> None:
    storage, folder = place
    for name in ["ab/1", "abc/2", "ab", "b/ab"]:
        if not (folder.startswith("file") and name == "ab"):
            storage.write(f"{folder}/{name}", b"")
    found = [o.uri.removeprefix(folder + "/") for o in storage.list_objects(folder + "/ab")]
    assert [name for name in found if name != "ab"] == ["ab/1", "abc/2"]
    assert [o.uri for o in storage.list_objects(folder + "/ab/")] == [folder + "/ab/1"]


@pytest.mark.slow
def test_a_listing_goes_over_pages_in_order(s3_endpoint: str, bucket_uri: str) -> None:
    storage = open_storage(StorageConfig(endpoint_url=s3_endpoint))
    names = [f"{bucket_uri}/p/{i:05d}+ %.bin" for i in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.write(uri, b"x"), names))
    listed = list(storage.list_objects(f"{bucket_uri}/p/"))
    assert [o.uri for o in listed] == names
    assert {o.size for o in listed} == {1}
    assert listed[0].last_modified.tzinfo is not None
    storage.delete(names)
    assert list(storage.list_objects(f"{bucket_uri}/p/")) == []


@pytest.mark.parametrize("num_writers", [16])
def test_one_creator_wins(place: tuple[Storage, str], num_writers: int) -> None:
    storage, folder = place
    barrier = threading.Barrier(num_writers)

    def write(index: int) -> bool:
        barrier.wait()
        return storage.create(folder + "/lease", f"writer {index}".encode())

    with ThreadPoolExecutor(num_writers) as pool:
        won = list(pool.map(write, range(num_writers)))
    assert sum(won) == 1
    assert storage.read(folder + "/lease") == f"writer {won.index(True)}".encode()
    assert storage.create(folder + "/lease", f"writer {won.index(True)}".encode())
    assert [o.uri for o in storage.list_objects(folder + "/")] == [folder + "/lease"]


def test_a_lost_answer_of_a_create_is_a_win(
    fault_proxy, s3_storage: Storage, bucket_uri: str
) -> None:
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    lost: list[str] = []

    def lose_first_put(method: str, path: str, headers: dict[str, str]) -> str | None:
        if method == "PUT" and "if-none-match" in headers and not lost:
            lost.append(path)
            return "lose"
        return None

    fault_proxy.rule = lose_first_put
    assert storage.create(bucket_uri + "/lease", b"mine")
    assert lost
    assert not storage.create(bucket_uri + "/lease", b"other")
    assert s3_storage.read(bucket_uri + "/lease") == b"mine"


@pytest.mark.parametrize("status", [409, 500, 503])
def test_a_passing_conflict_or_fault_is_tried_again(
    fault_proxy, bucket_uri: str, status: int
) -> None:
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    refused: list[str] = []

    def refuse_once(method: str, path: str, headers: dict[str, str]) -> int | None:
        if method == "PUT" and not refused:
            refused.append(path)
            return status
        return None

    fault_proxy.rule = refuse_once
    assert storage.create(bucket_uri + "/lease", b"mine")
    assert refused


def test_an_endless_conflict_is_an_error_to_retry(fault_proxy, bucket_uri: str) -> None:
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    fault_proxy.rule = lambda method, *_: 409 if method == "PUT" else None
    with pytest.raises(StorageError, match="conflict"):
        storage.create(bucket_uri + "/lease", b"mine")


def test_a_name_deleted_during_a_create_is_free_again(fault_proxy, bucket_uri: str) -> None:
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    refused: list[str] = []

    def refuse_once(method: str, path: str, headers: dict[str, str]) -> int | None:
        if method == "PUT" and not refused:
            refused.append(path)
            return 412
        return None

    fault_proxy.rule = refuse_once
    assert storage.create(bucket_uri + "/lease", b"mine")


def test_a_broken_download_is_resumed_or_fails_but_never_short(
    fault_proxy, s3_storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    content = os.urandom(2_000_000)
    uri = bucket_uri + "/big.bin"
    s3_storage.write(uri, content)
    fault_proxy.rule = lambda method, path, _: "cut" if "big" in path and method == "GET" else None
    try:
        storage.download(uri, tmp_path / "back")
    except StorageError:
        pass
    else:
        assert (tmp_path / "back").read_bytes() == content


def test_missing_buckets_are_access_errors(s3_storage: Storage, tmp_path: Path) -> None:
    uri = f"s3://no-such-bucket-{uuid.uuid4().hex[:8]}/key"
    (tmp_path / "file").write_bytes(b"x")
    calls = [
        lambda: s3_storage.read(uri),
        lambda: s3_storage.write(uri, b""),
        lambda: s3_storage.create(uri, b""),
        lambda: s3_storage.head(uri),
        lambda: list(s3_storage.list_objects(uri)),
        lambda: s3_storage.delete([uri]),
        lambda: s3_storage.download(uri, tmp_path / "back"),
        lambda: s3_storage.upload(tmp_path / "file", uri),
    ]
    for call in calls:
        with pytest.raises(AccessError, match="bucket"):
            call()


def test_a_denied_request_is_an_access_error(fault_proxy, bucket_uri: str, tmp_path: Path) -> None:
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    (tmp_path / "file").write_bytes(b"x")
    fault_proxy.rule = lambda *_: 403
    uri = bucket_uri + "/key"
    for call in [
        lambda: storage.read(uri),
        lambda: storage.create(uri, b"x"),
        lambda: storage.head(uri),
        lambda: storage.download(uri, tmp_path / "back"),
        lambda: storage.upload(tmp_path / "file", uri),
        lambda: list(storage.list_objects(bucket_uri + "/")),
    ]:
        with pytest.raises(AccessError):
            call()


def test_no_credentials_is_said_so(
    s3_endpoint: str, bucket_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    storage = open_storage(StorageConfig(endpoint_url=s3_endpoint))
    for call in [
        lambda: storage.read(bucket_uri + "/x"),
        lambda: storage.download(bucket_uri + "/x", tmp_path / "back"),
    ]:
        with pytest.raises(AccessError, match="credentials"):
            call()


def test_an_endpoint_that_is_down_is_an_error_to_retry(s3_endpoint: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    storage = open_storage(StorageConfig(endpoint_url=url))
    with pytest.raises(StorageError) as caught:
        storage.head("s3://bucket/key")
    assert caught.value.retryable


def test_bad_names_are_refused(s3_storage: Storage) -> None:
    for uri in ["bucket/key", "s3://", "s3:///key", "file://relative", "http://host/key"]:
        with pytest.raises(ConfigError, match="storage URI"):
            s3_storage.read(uri)
    with pytest.raises(ConfigError):
        s3_storage.read("s3://Bad Bucket!/key")


def test_a_changed_source_is_noticed(place: tuple[Storage, str], tmp_path: Path) -> None:
    storage, folder = place
    uri = folder + "/source.wav"
    storage.write(uri, b"first")
    info = storage.head(uri)
    assert info is not None
    storage.write(uri, b"second!")
    with pytest.raises(SourceChangedError, match=r"source\.wav"):
        storage.download(uri, tmp_path / "back", etag=info.etag)
    storage.delete([uri])
    with pytest.raises(ObjectMissingError):
        storage.download(uri, tmp_path / "back", etag=info.etag)


def test_an_endpoint_that_ignores_if_match_is_caught(
    fault_proxy, s3_storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))

    def strip(method: str, path: str, headers: dict[str, str]) -> None:
        headers.pop("if-match", None)

    fault_proxy.rule = strip
    for key in ["plain.wav", "a//double.wav"]:
        s3_storage.write(f"{bucket_uri}/{key}", b"new content")
        with pytest.raises(SourceChangedError):
            storage.download(f"{bucket_uri}/{key}", tmp_path / "back", etag="0" * 32)


def test_local_disk_errors_are_not_missing_objects(
    place: tuple[Storage, str], tmp_path: Path
) -> None:
    storage, folder = place
    storage.write(folder + "/a.wav", b"x" * 10_000)
    with pytest.raises(StorageError, match="scratch disk"):
        storage.download(folder + "/a.wav", tmp_path / "no-such-folder" / "back")
    with pytest.raises(StorageError, match="No space left"):
        storage.download(folder + "/a.wav", Path("/dev/full"))


def test_a_missing_folder_is_not_an_empty_one(s3_storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FolderMissingError, match="does not exist"):
        list(s3_storage.list_objects(file_uri(tmp_path / "unmounted") + "/"))


def test_only_regular_files_are_listed(s3_storage: Storage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "real.wav").write_bytes(b"x")
    listed = [o.uri for o in s3_storage.list_objects(file_uri(tmp_path) + "/")]
    assert listed == [file_uri(tmp_path / "real.wav")]
    assert s3_storage.head(file_uri(tmp_path)) is None


def test_writers_leave_no_scratch_and_readable_files(tmp_path: Path, s3_storage: Storage) -> None:
    uri = file_uri(tmp_path / "out" / "a")
    s3_storage.write(uri, b"x")
    s3_storage.create(file_uri(tmp_path / "out" / "b"), b"x")
    (tmp_path / "out" / "folder").mkdir()
    with pytest.raises((ObjectMissingError, StorageError)):
        s3_storage.write(file_uri(tmp_path / "out" / "folder"), b"x")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "folder"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_storage_without_conditional_writes_is_refused(
    fault_proxy, place: tuple[Storage, str], bucket_uri: str
) -> None:
    storage, folder = place
    probe_conditional_writes(storage, folder)
    assert list(storage.list_objects(folder + "/")) == []

    def strip(method: str, path: str, headers: dict[str, str]) -> None:
        headers.pop("if-none-match", None)

    fault_proxy.rule = strip
    broken = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    with pytest.raises(ConfigError, match="If-None-Match"):
        probe_conditional_writes(broken, bucket_uri + "/work")


def test_join_uri() -> None:
    assert join_uri("s3://bucket", "a", "b") == "s3://bucket/a/b"
    assert join_uri("s3://bucket/x/", "/a/", "b") == "s3://bucket/x/a/b"
    assert join_uri("file:///", "a") == "file:///a"
