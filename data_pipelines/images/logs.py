"""Log messages of the image decoders."""

import logging


def ignore_metadata() -> None:
    """Keep libpng's warnings about metadata, such as an odd colour profile, out of the log.

    libpng repeats them for every image. The level of a logger applies to the whole process, so the
    entry point of a program calls this, and not the codec.
    """
    logging.getLogger("imagecodecs").setLevel(logging.ERROR)
