"""A pickle that tells whether somebody unpickled it."""

import os
import pickle
from pathlib import Path


class _Planted:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def make_pickle(trace: Path) -> bytes:
    """Makes the folder `trace` whenever it is unpickled; seen to work once."""
    data = pickle.dumps(_Planted(trace))
    pickle.loads(data)
    trace.rmdir()
    return data
