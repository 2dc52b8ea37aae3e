"""Which of two test processes runs which files: whole files, the longest first.

Each process has servers of its own. Files that look at one undisturbed run stay together, so that
it is trained once.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

ONE_RUN = ("test_elastic.py", "test_outages.py", "test_train_job.py", "test_security.py")
"""Files that use the fixture `whole_run`."""
LONGEST = (*ONE_RUN, "test_sweep.py", "test_chaos.py", "test_hosts.py", "test_encode_job.py")
"""Files that take minutes, in the order in which they begin."""


def sort_items(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The same tests, the files of `LONGEST` first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: ranks.get(item.path.name, len(ranks)))


class Scheduling(LoadFileScheduling):
    """Hands whole files to processes, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "one run" if Path(file).name in ONE_RUN else file
