#!/usr/bin/env bash
# Runs a command as N processes of one run on this machine; they find each other on a free port.
#
#     launch/local.sh 2 python -m jdmdr.pipeline --config configs/quickstart.py --workdir runs/quickstart
#
# Process 0 prints as always, the others with their number in front, to stderr. Ctrl-C and SIGTERM reach all of them. When one
# fails, the others have GRACE seconds (20) to stop by themselves before they get SIGTERM, and as many again before SIGKILL.
# The exit code is that of the first that failed. With GPUS=1 process I sees GPU I alone; without it each sees all devices,
# which on a machine with GPUs is wrong for N > 1.
set -um # jobs: each process is a group of its own, which Ctrl-C reaches through us alone

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh N COMMAND... runs the command as N processes of one run" >&2
    exit 2
fi
count=$1 grace=${GRACE:-20}
shift

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
export JAX_NUM_PROCESSES=$count
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:$(free_port)}

pids=() printers=()
for ((i = 0; i < count; i++)); do
    export JAX_PROCESS_ID=$i
    [ -z "${GPUS:-}" ] || export JAX_LOCAL_DEVICE_IDS=$i
    if [ "$i" = 0 ]; then
        "$@" &
    else
        exec 3> >(exec sed -u "s/^/[$i] /" >&2)
        printers+=($!)
        "$@" >&3 2>&1 &
        exec 3>&-
    fi
    pids+=($!)
done

alive=("${pids[@]}")
send() { for pid in "${alive[@]}"; do kill "-$1" -- "$pid" 2>/dev/null; done; }
trap 'send INT' INT
trap 'send TERM' TERM

failed=0 waited=0
while [ ${#alive[@]} -gt 0 ]; do
    sleep 0.2
    still=()
    for pid in "${alive[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            still+=("$pid")
            continue
        fi
        wait "$pid"
        code=$?
        [ "$failed" != 0 ] || failed=$code
    done
    alive=("${still[@]+"${still[@]}"}")
    if [ "$failed" != 0 ]; then
        waited=$((waited + 1))
        [ "$waited" != $((grace * 5)) ] || send TERM
        if [ "$waited" = $((grace * 10)) ]; then
            for pid in "${alive[@]}"; do kill -KILL -- "-$pid" 2>/dev/null; done
        fi
    fi
done
[ ${#printers[@]} = 0 ] || wait "${printers[@]}" 2>/dev/null
exit "$failed"
