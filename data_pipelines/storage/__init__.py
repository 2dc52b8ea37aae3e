"""The only package that opens a URI: local files, s3://, gs:// and http(s)://."""

from data_pipelines.storage.location import Location, LocationLike
from data_pipelines.storage.objects import (
    check_readable,
    check_writable,
    delete,
    download,
    download_folder,
    exists,
    list_files,
    list_tree,
    read_bytes,
    read_range,
    read_version,
    upload,
    upload_folder,
    write_bytes,
)

__all__ = [
    "Location",
    "LocationLike",
    "check_readable",
    "check_writable",
    "delete",
    "download",
    "download_folder",
    "exists",
    "list_files",
    "list_tree",
    "read_bytes",
    "read_range",
    "read_version",
    "upload",
    "upload_folder",
    "write_bytes",
]
