#!/usr/bin/env bash
# Create the environment with all pins; run it again to finish an interrupted set-up. An existing
# environment keeps its Python unless EFAE_PYTHON names another one.
set -euo pipefail
environment=$1

show_version() {
    "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null || true
}

if [ -n "${EFAE_PYTHON:-}" ]; then
    candidates=("$EFAE_PYTHON")
else
    candidates=("$environment/bin/python" python3.11 python3.12 python3.13 python3 python)
fi
python=
for candidate in "${candidates[@]}"; do
    version=$(show_version "$candidate")
    case $version in 3.11 | 3.12 | 3.13)
        python=$candidate
        break
        ;;
    esac
done
if [ -z "$python" ]; then
    if [ -n "${EFAE_PYTHON:-}" ]; then
        echo "error: EFAE_PYTHON=$EFAE_PYTHON is ${version:-no Python}: set it to the command or" \
            "path of Python 3.11, 3.12 or 3.13" >&2
    else
        echo "error: no Python 3.11, 3.12 or 3.13 on PATH: install one (for example with" \
            "'uv python install 3.11' or 'pyenv install 3.11'), or name one with EFAE_PYTHON" >&2
    fi
    exit 1
fi

echo "setting up $environment with Python $version (a few minutes)"
# Two Python versions cannot share an environment.
clear=
if [ "$(show_version "$environment/bin/python")" != "$version" ]; then
    clear=--clear
fi
"$python" -m venv $clear "$environment"
"$environment/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    --retries 10 --timeout 60 --constraint constraints.txt --editable '.[local,onnx,dev]'
