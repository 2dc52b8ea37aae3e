#!/usr/bin/env bash
# Run a script as a Ray job and stream its output: submit_job.sh ENV_FILE SCRIPT [ARGUMENT...]
# Exits with the job's status; Ctrl-C stops the job, not only the stream.
set -euo pipefail
env_file=$1
shift
# shellcheck source=/dev/null
source "$env_file"
ray=.venv/bin/ray
job="$(basename "$1" .py)-$(date +%Y%m%d-%H%M%S)-$$"
trap '"$ray" job stop "$job" >/dev/null 2>&1 || true; exit 130' INT TERM

# Ray warns about the folders that it excludes by default; .rayignore and .gitignore list them.
export RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES=
# Unbuffered output shows progress at once.
export PYTHONUNBUFFERED=1

# Drop Ray's notices, and its repetition of the job's last lines at the end. Keep the job's output
# and Ray's other errors. A stopped job counts as failed.
"$ray" job submit --log-style record --submission-id "$job" --working-dir . -- python "$@" 2>&1 |
    sed -u -E \
        -e "/WARN.* -- Job '$job' was stopped/{q 1}" \
        -e '/cli\.py:[0-9]+ -- Status message: Job entrypoint command failed/,$d' \
        -e '/cli\.py:[0-9]+ -- -+$/d' \
        -e '/cli\.py:[0-9]+ -- Status message/b' \
        -e '/^[-0-9]+ [:,0-9]+\t(INFO|SUCC) [a-z_]+\.py:[0-9]+ -- /d' \
        -e "/^Running entrypoint for job $job/d"
