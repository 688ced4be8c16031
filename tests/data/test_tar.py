"""The tar walk against Python's tarfile on good files, and against damage of every kind."""

import io
import random
import tarfile

import pytest

from clip_train.data.index.tar import read_samples, split_name, walk_tar
from clip_train.errors import IntegrityError, UserError


def _tar(path, members, *, tar_format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _members(count: int):
    rng = random.Random(count)
    for i in range(count):
        yield f"{i:04d}.jpg", rng.randbytes(rng.choice([0, 1, 511, 512, 513, 5000]))
        yield f"{i:04d}.txt", b"caption %d" % i


LONG = "folder/" * 40 + "picture-with-a-long-name.jpg"
MEMBERS = [("a.jpg", b"x" * 700), (LONG, b"y" * 10), ("übung/grün.JPG", b"z"), ("e.txt", b"")]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_of_tarfile(tmp_path, tar_format):
    path = _tar(tmp_path / "x.tar", MEMBERS, tar_format=tar_format)
    data = path.read_bytes()
    walked = [(m.name, data[m.offset : m.offset + m.size]) for m in walk_tar(path)]
    assert walked == MEMBERS


def test_ustar_prefixes_and_folders_are_understood(tmp_path):
    path = tmp_path / "x.tar"
    name = "p" * 90 + "/" + "q" * 90 + ".png"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("p")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo(name))
    assert [m.name for m in walk_tar(path)] == [name]


def _with_size_field(path, field: bytes):
    """Replace the size field of the first header and set the checksum right."""
    data = bytearray(path.read_bytes())
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)


def test_a_base_256_size_is_understood(tmp_path):
    path = _tar(tmp_path / "x.tar", [("a.jpg", b"12345")])
    _with_size_field(path, b"\x80" + (5).to_bytes(11, "big"))
    assert [m.size for m in walk_tar(path)] == [5]


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.b/c.d.JPG", "x/y.tar.gz", "./a.png", "noextension", "k/.hidden.txt", ".a"]
)
def test_keys_follow_the_rule_of_webdataset(name):
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    hidden = name.rsplit("/", 1)[-1].startswith(".")
    assert split_name(name) == (None if hidden or key is None else (key, extension.lower()))


def test_every_flipped_header_byte_is_found_with_its_offset(tmp_path):
    path = _tar(tmp_path / "x.tar", list(_members(6)))
    good = path.read_bytes()
    headers = [m.offset - 512 for m in walk_tar(path)]
    rng = random.Random(0)
    for _ in range(300):
        header = rng.choice(headers)
        # The two bytes that end the checksum field carry nothing.
        place = header + rng.choice([*range(154), *range(156, 512)])
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(IntegrityError, match=rf"x\.tar at byte {header}: "):
            list(walk_tar(path))


def test_every_truncation_is_found(tmp_path):
    path = _tar(tmp_path / "x.tar", list(_members(3)))
    good = path.read_bytes()
    end = max(m.offset + -(-m.size // 512) * 512 for m in walk_tar(path)) + 1024
    for size in [1, 100, *range(512, end, 256), end - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(IntegrityError, match=r"cut off"):
            list(walk_tar(path))


def test_a_zero_block_before_the_end_is_found(tmp_path):
    path = _tar(tmp_path / "x.tar", list(_members(3)))
    data = bytearray(path.read_bytes())
    second = list(walk_tar(path))[1].offset - 512
    data[second : second + 512] = bytes(512)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"at byte {second}: a zero block"):
        list(walk_tar(path))


def test_a_file_that_was_reserved_but_not_written_to_its_end_is_found(tmp_path):
    path = _tar(tmp_path / "x.tar", list(_members(3)))
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(500_000))
    assert len(list(walk_tar(path))) == 6
    path.write_bytes(whole + bytes(1 << 20))
    with pytest.raises(IntegrityError, match=r"only zeros follow, .* not written to its end"):
        list(walk_tar(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"\x1f\x8b" + bytes(600), "gzip"), (b"<!doctype html>" + b"x" * 600, "HTML")],
)
def test_what_is_not_a_tar_is_said_to_be_what_it_is(tmp_path, content, message):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        list(walk_tar(path))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"?"])
def test_links_devices_and_unknown_members_are_refused(tmp_path, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type = kind
        info.linkname = "b.jpg" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
        tar.addfile(info)
    with pytest.raises(IntegrityError, match=r"a\.jpg"):
        list(walk_tar(path))


def test_a_folder_named_like_a_shard_is_a_user_error(tmp_path):
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match=r"x\.tar"):
        list(walk_tar(tmp_path / "x.tar"))


def test_members_are_grouped_by_key_and_extensions_are_lower_case(tmp_path):
    path = _tar(
        tmp_path / "x.tar", [("a.JPG", b"1"), ("a.seg.PNG", b"2"), ("README", b"-"), (".b.jpg", b"-"), ("c.txt", b"3")]
    )
    assert [(s.key, sorted(s.members)) for s in read_samples(path)] == [("a", ["jpg", "seg.png"]), ("c", ["txt"])]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a.jpg", "b.jpg", "a.txt"], "not next to each other"), (["a.jpg", "a.JPG"], r"two members \.jpg")],
)
def test_scattered_and_repeated_members_are_refused(tmp_path, names, message):
    path = _tar(tmp_path / "x.tar", [(name, b"1") for name in names])
    with pytest.raises(IntegrityError, match=message):
        list(read_samples(path))


def test_a_cut_file_gives_the_members_before_the_cut_where_that_is_asked_for(tmp_path):
    path = _tar(tmp_path / "x.tar", list(_members(3)))
    good = path.read_bytes()
    members = list(walk_tar(path))
    ends = [m.offset + -(-m.size // 512) * 512 for m in members]
    for size in range(512, ends[-1] + 1024, 256):
        path.write_bytes(good[:size])
        messages: list[str] = []
        assert list(walk_tar(path, on_cut=messages.append)) == [
            m for m, e in zip(members, ends, strict=True) if e <= size
        ]
        assert len(messages) == 1 and "cut off" in messages[0]


def test_other_damage_is_an_error_also_where_a_cut_is_allowed(tmp_path):
    path = _tar(tmp_path / "x.tar", list(_members(3)))
    data = bytearray(path.read_bytes())
    data[list(walk_tar(path))[1].offset - 500] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="checksum"):
        list(walk_tar(path, on_cut=lambda message: None))
