#!/usr/bin/env bash
# Runs a command as one run on several hosts, a process each, over ssh without a password:
#
#     launch/ssh.sh HOSTS .venv/bin/python -m jdmdr.pipeline --config configs/dmdr.py:me5-large --workdir /shared/runs/me5
#
# HOSTS is a file with a host a line. The project lies under the same path on all of them, and --workdir on a file system that
# all see. The first host is process 0; all reach it on PORT (8476). Output, signals and the exit code are as in local.sh.
set -um
quote() { printf " '%s'" "${1//\'/\'\\\'\'}"; } # for any POSIX shell over there
names() { grep -v '^[[:space:]]*\(#\|$\)' "$1"; }

if [ "${1:-}" = --on-host ]; then # what local.sh starts for each process
    hosts=$2
    shift 2
    host=$(names "$hosts" | sed -n "$((JAX_PROCESS_ID + 1))p")
    pid_file=/tmp/jdmdr.$JDMDR_RUN.$JAX_PROCESS_ID
    command="cd$(quote "$PWD") && echo \$\$ > $pid_file && exec env JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS"
    command+=" JAX_NUM_PROCESSES=$JAX_NUM_PROCESSES JAX_PROCESS_ID=$JAX_PROCESS_ID"
    for word; do command+=$(quote "$word"); done
    # The remote process does not hear of a signal to the local ssh: it is sent by a second one.
    trap 'ssh -o BatchMode=yes "$host" "kill -TERM \$(cat $pid_file)"' TERM
    trap 'ssh -o BatchMode=yes "$host" "kill -INT \$(cat $pid_file)"' INT
    ssh -o BatchMode=yes -o ServerAliveInterval=30 "$host" "$command" < /dev/null &
    while true; do
        wait "$!"
        code=$?
        kill -0 "$!" 2>/dev/null || break # else a signal interrupted the wait
    done
    exit "$code"
fi

if [ $# -lt 2 ] || [ ! -r "$1" ]; then
    echo "usage: launch/ssh.sh HOSTS COMMAND... runs the command on every host of the file HOSTS" >&2
    exit 2
fi
hosts=$1
shift
JAX_COORDINATOR_ADDRESS=$(names "$hosts" | head -n 1):${PORT:-8476}
export JAX_COORDINATOR_ADDRESS JDMDR_RUN=$$
exec "$(dirname "$0")/local.sh" "$(names "$hosts" | wc -l)" "$0" --on-host "$hosts" "$@"
