"""The members of a plain tar that may have been made to harm its reader.

Python's tarfile, before 3.11.10 and 3.11.14, seeks backwards for a negative size, which never
ends, and takes a time that grows with the square of an extended header's length.
"""

import tarfile
from collections.abc import Iterator
from tarfile import ReadError
from typing import Self

LARGEST_EXTENDED_HEADER_BYTES = 2**14
"""Of a pax header or a long name; real ones have some hundred bytes."""
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class Header(tarfile.TarInfo):
    """A header that is refused where it would harm; pass it to `tarfile.open` as `tarinfo`."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """As tarfile's own, with one kind of error.

        Raises:
            TarError: damaged.
        """
        try:
            return super().fromtarfile(tarfile)
        except IndexError as error:
            raise ReadError("the header of a sparse file is cut off") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """As tarfile's own.

        Raises:
            ReadError: a negative size, or an extended header of a size that no writer makes.
        """
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0:
            raise ReadError(f"a header says {found.size} bytes")
        if found.type in _EXTENDED and found.size > LARGEST_EXTENDED_HEADER_BYTES:
            raise ReadError(f"an extended header of {found.size} bytes")
        return found


def list_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in their order, each of which begins behind the one before.

    Args:
        tar: opened with `Header`.

    Raises:
        TarError: the tar is damaged, or made to harm.
    """
    for member in tar:
        if tar.offset <= member.offset:  # an extended header gave it a negative size
            raise ReadError(f"the member after {member.name!r} lies before it")
        yield member
