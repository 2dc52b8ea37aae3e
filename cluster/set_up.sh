#!/usr/bin/env bash
# Makes the environment with all pins; called again after an interruption, it goes on.
set -euo pipefail
environment=$1

python=
for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11 found as python3.11, python3 or python: install it (for example" \
        "with 'uv python install 3.11' or 'pyenv install 3.11') and put it on PATH" >&2
    exit 1
fi

echo "setting up $environment (a few minutes)"
"$python" -m venv "$environment"
"$environment/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    --retries 10 --timeout 60 --constraint constraints.txt --editable '.[local,dev]'
