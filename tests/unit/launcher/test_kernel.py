import gzip
import io
import stat

from cloudfit_orchestrator.launcher.kernel import Archive, write_compressed


def read_newc(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """A reader of the kernel's format, from its documentation (early-userspace/buffer-format)."""
    stream, entries = io.BytesIO(data), {}
    while True:
        head = stream.read(110)
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        name = stream.read(fields[11])[:-1].decode()
        stream.read(-stream.tell() % 4)
        content = stream.read(fields[6])
        stream.read(-stream.tell() % 4)
        assert fields[2] == fields[3] == 0, "owned by root"
        if name == "TRAILER!!!":
            return entries
        entries[name] = (fields[1], content, (fields[9], fields[10]))


def sample(order: int) -> Archive:
    archive = Archive()
    steps = [
        lambda: archive.file("a/b/file", b"content"),
        lambda: archive.link("a/link", "b/file"),
        lambda: archive.device("dev/console", 5, 1),
        lambda: archive.file("init", b"#!", executable=True),
        lambda: archive.directory("proc"),
    ]
    for step in steps[::order]:
        step()
    return archive


def test_an_archive_holds_what_was_put_in_with_its_directories_first():
    entries = read_newc(b"".join(sample(1).chunks()))
    assert list(entries) == ["a", "a/b", "a/b/file", "a/link", "dev", "dev/console", "init", "proc"]
    assert entries["a/b/file"] == (stat.S_IFREG | 0o644, b"content", (0, 0))
    assert entries["a/link"] == (stat.S_IFLNK | 0o777, b"b/file", (0, 0))
    assert entries["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert stat.S_IMODE(entries["init"][0]) == 0o755


def test_the_order_of_insertion_and_the_time_leave_no_trace(tmp_path):
    for order in (1, -1):
        write_compressed(sample(order), tmp_path / str(order))
    first = (tmp_path / "1").read_bytes()
    assert first == (tmp_path / "-1").read_bytes()
    assert first[3:8] == bytes(5), "no name, no time"
    assert gzip.decompress(first) == b"".join(sample(1).chunks())
