"""The names and labels of all metrics that a running cluster exports, one a line.

    python -m cluster.dashboards.list_metrics /tmp/ray/prom_metrics_service_discovery.json

The file is the one that Ray's head writes for Prometheus. What is printed while a training run is
under way is kept in ``ray_metrics.txt``, which the dashboard's test compares with: print it again
with a new version of Ray.
"""

import json
import re
import sys
import urllib.request
from pathlib import Path

_SECONDS = 10.0
_SAMPLE = re.compile(r'^(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\})? ', re.MULTILINE)
_LABEL = re.compile(r'(\w+)="(?:[^"\\]|\\.)*"')


def read_targets(discovery: Path) -> list[str]:
    """The addresses HOST:PORT that Prometheus would scrape."""
    groups: list[dict[str, list[str]]] = json.loads(discovery.read_text())
    return [target for group in groups for target in group["targets"]]


def scrape(target: str) -> str:
    """What one process exports, in Prometheus' text format.

    Raises:
        OSError: it does not answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{target}/metrics", timeout=_SECONDS) as answer:
        return answer.read().decode()


def list_metrics(text: str) -> dict[str, set[str]]:
    """The labels of each metric in such a text, by its name as PromQL has it."""
    found: dict[str, set[str]] = {}
    for name, labels in _SAMPLE.findall(text):
        found.setdefault(name, set()).update(_LABEL.findall(labels))
    return found


def main() -> None:
    """Prints ``NAME LABEL ...``."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    texts = map(scrape, read_targets(Path(sys.argv[1])))
    for name, labels in sorted(list_metrics("".join(texts)).items()):
        print(name, *sorted(label for label in labels if not label.startswith("otel_")))


if __name__ == "__main__":
    main()
