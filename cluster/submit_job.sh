#!/usr/bin/env bash
# Runs a script as a Ray job and streams what it prints: submit_job.sh ENV_FILE SCRIPT [ARGUMENT...]
# Ends with the job's status; Ctrl-C stops the job, not only the stream.
set -euo pipefail
env_file=$1
shift
# shellcheck source=/dev/null
source "$env_file"
ray=.venv/bin/ray
job="$(basename "$1" .py)-$(date +%Y%m%d-%H%M%S)-$$"
trap '"$ray" job stop "$job" >/dev/null 2>&1 || true; exit 130' INT TERM

# Ray warns about folders that it leaves out by itself; .rayignore and .gitignore name them.
export RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES=
# Without line buffers, so that progress is seen.
export PYTHONUNBUFFERED=1

# Left out: Ray's notices, and at the end its repetition of the job's last lines. What the job
# printed and other errors of Ray's stay. A job that was stopped counts as failed.
"$ray" job submit --log-style record --submission-id "$job" --working-dir . -- python "$@" 2>&1 |
    sed -u -E \
        -e "/WARN.* -- Job '$job' was stopped/{q 1}" \
        -e '/cli\.py:[0-9]+ -- Status message: Job entrypoint command failed/,$d' \
        -e '/cli\.py:[0-9]+ -- -+$/d' \
        -e '/cli\.py:[0-9]+ -- Status message/b' \
        -e '/^[-0-9]+ [:,0-9]+\t(INFO|SUCC) [a-z_]+\.py:[0-9]+ -- /d' \
        -e "/^Running entrypoint for job $job/d"
