"""Members of a plain tar, by its headers; the tar may be malicious.

Only regular members are accepted, whose bytes follow their header. Every other kind, such as a link
or a sparse file, whose bytes lie elsewhere, is a fault: later checksums would match wrong bytes.

Older versions of Python's tarfile take quadratic time in the length of an extended header (fixed in
3.11.10), and seek backwards endlessly on a negative size (fixed in 3.11.14).
"""

import hashlib
import mmap
import re
import tarfile
import zlib
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import ReadError
from typing import Self

from data_pipelines.images.codec import is_image
from data_pipelines.shards.intake import LeftOut, find_litter

LARGEST_EXTENDED_HEADER_BYTES = 2**14
"""Largest pax header or long name; real ones have a few hundred bytes."""
LARGEST_MEMBER_BYTES = 2**30
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_FOLDERS = (tarfile.DIRTYPE, b"D")  # D: folder in an incremental GNU tar
_USTAR = b"ustar\0"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""Signatures of gzip, bzip2, xz, zstd and lz4."""
_NUMBER = re.compile(rb" *([0-7]*)[ \0]*")
_VOLUME_LABEL = b"V"
_OTHERS = {
    tarfile.LNKTYPE: ("hard link", "pack the tar again with --hard-dereference"),
    tarfile.SYMTYPE: ("symbolic link", "pack the tar again with --dereference"),
    tarfile.CHRTYPE: ("device", "pack the tar again without it"),
    tarfile.BLKTYPE: ("device", "pack the tar again without it"),
    tarfile.FIFOTYPE: ("named pipe", "pack the tar again without it"),
    b"M": ("part of a member", "it continues from another volume: join the volumes"),
}
_SPARSE = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")
_OF_ONE_MEMBER = {"path", "size"}
"""Keywords that are invalid in a global pax header: they would apply to all members."""
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


@dataclass(frozen=True)
class Fault:
    """The fault of a sample that cannot be used."""

    reason: str
    """Reason by which samples with this fault are counted when they are left out."""
    key: str
    text: str
    """Description in one sentence, with the tar's name."""
    skippable: bool = True
    """Whether the rest of the tar can be used without this sample."""


@dataclass
class TarContent:
    """Content of a tar by WebDataset's naming: key, first dot, extension."""

    bytes: int
    sha256: str
    rows: dict[str, dict[str, tuple[int, int, int]]]
    """Members as {key: {extension: (offset, size, crc32)}}, in the order of the tar."""
    faults: list[Fault] = field(default_factory=list[Fault])
    left_out: LeftOut = field(default_factory=LeftOut)


class Header(tarfile.TarInfo):
    """A tar header that rejects harmful values; pass it to `tarfile.open` as `tarinfo`."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """Read the next header like tarfile, with one type of error.

        Raises:
            TarError: The header is damaged.
        """
        try:
            return super().fromtarfile(tarfile)
        except IndexError as error:
            raise ReadError("the header of a sparse file is cut off") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header like tarfile.

        Raises:
            ReadError: The size is negative, or an extended header is too large to be real.
        """
        found = cls._read_regular(buf, encoding, errors) or super().frombuf(buf, encoding, errors)
        if found.size < 0:
            raise ReadError(f"a header has a size of {found.size} bytes")
        if found.type in _EXTENDED and found.size > LARGEST_EXTENDED_HEADER_BYTES:
            raise ReadError(f"an extended header of {found.size} bytes")
        return found

    @classmethod
    def _read_regular(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self | None:
        """Read name and size of a regular member, which suffice; None leaves it to tarfile.

        tarfile gets some names wrong: it takes other fields of a GNU header for the first part of a
        name, and a file for a folder if a long name is cut off at a slash.
        """
        size, checksum = _NUMBER.fullmatch(buf, 124, 136), _NUMBER.fullmatch(buf, 148, 156)
        if len(buf) != tarfile.BLOCKSIZE or buf[156:157] not in _REGULAR:
            return None
        if not size or not checksum:
            return None
        if sum(buf) - sum(buf[148:156]) + 8 * ord(" ") != int(checksum[1] or b"0", 8):
            return None
        parts = [buf[345:500], buf[:100]] if buf[345] and buf[257:263] == _USTAR else [buf[:100]]
        texts = [part.partition(b"\0")[0].decode(encoding, errors) for part in parts]
        found = cls("/".join(texts))
        found.type, found.size = bytes(buf[156:157]), int(size[1] or b"0", 8)
        return found


def list_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members in order; each must start after the previous one.

    Args:
        tar: Tar that was opened with `Header`.

    Raises:
        TarError: The tar is damaged or malicious.
    """
    for member in tar:
        if tar.offset <= member.offset:  # an extended header gave it a negative size
            raise ReadError(f"the member after {member.name!r} lies before it")
        if member.pax_headers:
            if "GNU.volume.offset" in tar.pax_headers:
                raise ReadError("it is a later volume of a multi-volume tar: join the volumes")
            if not _OF_ONE_MEMBER.isdisjoint(tar.pax_headers):
                raise ReadError("a global header gives all members one name or one size")
            if not member.pax_headers.get("size", "0").isdecimal():
                raise ReadError(f"the size of {member.name!r} is not a number")
        yield member


def read_members(path: Path, name: str, where: str, known: Container[str] | None) -> TarContent:
    """Read a whole tar, once for its hash and once for its members.

    Args:
        path: Local file to read.
        name: Name of the tar in its set, for the examples of members that are left out.
        where: Name or URI of the tar, for faults.
        known: Keys of an index, whose names are then not checked; None exempts all keys.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        return _give_up(TarContent(0, "", {}), f"{where} may not be read ({error.strerror})")
    content = TarContent(path.stat().st_size, sha256, {})
    if content.bytes == 0:
        return _give_up(content, f"{where} is empty")
    names: dict[tuple[str, str], str] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:
                for member in list_members(tar):
                    key, extension = split_name(member.name)
                    if member.type in _FOLDERS or (member.name.endswith("/") and not member.size):
                        continue
                    end = member.offset_data + member.size
                    if member.sparse is None and member.isreg() and end > content.bytes:
                        raise ReadError("unexpected end of data")
                    is_foreign = known is not None and key not in known
                    reason = _find_left_out(member, extension, is_foreign)
                    if reason is not None:
                        content.left_out.add(reason, f"{name}: {member.name}")
                        continue
                    fault = _find_fault(member, key, where) or (
                        _find_bad_name(member.name, key, extension, where) if is_foreign else None
                    )
                    first = names.setdefault((key, extension), member.name)
                    if fault is not None:
                        content.faults.append(fault)
                    elif extension in content.rows.setdefault(key, {}):
                        content.faults.append(_repeat(where, key, first, member.name))
                    else:
                        crc32 = zlib.crc32(data[member.offset_data : end])
                        content.rows[key][extension] = (member.offset_data, member.size, crc32)
                rest = data[tar.offset :]  # tarfile mistakes a damaged header for the end
        except tarfile.TarError as error:
            why = "it is compressed: unpack it" if data[:6].startswith(_COMPRESSED) else error
            return _give_up(content, f"{where} is not a plain, whole tar ({why})")
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        samples, after = len(content.rows), len(rest) - len(rest.lstrip(b"\0"))
        magic = after // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE + 257
        why = (
            f"holds another tar after {samples} samples: split them"
            if after >= tarfile.BLOCKSIZE and rest[magic : magic + 5] == b"ustar"
            else f"is damaged or cut off after {samples} samples"
        )
        return _give_up(content, f"{where} {why}")
    return content


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension in lower case) of a member; the first dot separates them."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def list_reasons(faults: Iterable[Fault]) -> dict[str, str]:
    """Return {key: reason of the sample's first fault}."""
    reasons: dict[str, str] = {}
    for fault in faults:
        reasons.setdefault(fault.key, fault.reason)
    return reasons


def _find_left_out(member: tarfile.TarInfo, extension: str, is_foreign: bool) -> str | None:
    """Return why the member is evidently not part of a sample; None if it may be."""
    if member.type == _VOLUME_LABEL:
        return "volume label"
    if not is_foreign:
        return None
    name = member.name
    if name.startswith("__") and name.endswith("__") and "/" not in name:
        return "WebDataset metadata"
    hidden = name.rpartition("/")[2].startswith(".") and not is_image(extension)
    return find_litter(name) or ("hidden file" if hidden else None)


def _find_fault(member: tarfile.TarInfo, key: str, where: str) -> Fault | None:
    """Return the fault of a member whose bytes cannot be used in place, or None."""
    if member.sparse is not None or any(map(_is_of_sparse_file, member.pax_headers)):
        reason, text = "sparse file", "is a sparse file: pack the tar again without --sparse"
    elif member.type in _OTHERS:
        reason, remedy = _OTHERS[member.type]
        target = f" to {member.linkname!r}" if member.linkname else ""
        text = f"is a {reason}{target}: {remedy}"
    elif member.type not in _REGULAR:
        reason = "member of unknown type"
        text = f"is of unknown type {member.type.decode('latin-1')!r}: pack the tar again"
    elif member.size > LARGEST_MEMBER_BYTES:
        gibibytes, most = member.size / 2**30, LARGEST_MEMBER_BYTES / 2**30
        reason = "member too large"
        text = f"has {gibibytes:.1f} GiB, more than {most:.0f} GiB: too large for an image"
    else:
        return None
    return Fault(reason, _as_text(key), f"{where}: member {member.name!r} {text}")


def _is_of_sparse_file(keyword: str) -> bool:
    return keyword.startswith(_SPARSE)


def _find_bad_name(name: str, key: str, extension: str, where: str) -> Fault | None:
    """Return the fault of a name that no member of a sample may have, or None."""
    if "\0" in name or _as_text(name) != name:
        reason, text = "name that is not UTF-8", "has a name that is not UTF-8"
    elif not key.rpartition("/")[2]:
        reason, text = "member without a name", "has no name before its first dot"
    elif not extension:
        reason, text = "member without an extension", "has no extension"
    else:
        return None
    return Fault(reason, _as_text(key), f"{where}: member {name!r} {text}: rename it")


def _as_text(name: str) -> str:
    """Escape bytes that tarfile could not decode, so that the name can be written."""
    return name.encode(errors="backslashreplace").decode()


def _repeat(where: str, key: str, first: str, second: str) -> Fault:
    text = (
        f"{where} holds {first!r} twice: pack the tar again"
        if first == second
        else f"{where}: {first!r} and {second!r} are the same member of a sample: rename one"
    )
    return Fault("member that occurs twice", key, text, skippable=False)


def _give_up(content: TarContent, text: str) -> TarContent:
    """Add the fault that ends the tar early; drop its last sample, which may be incomplete."""
    content.faults.append(Fault("damaged tar", "", text, skippable=False))
    if content.rows:
        content.rows.popitem()
    return content
