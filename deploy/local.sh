#!/usr/bin/env bash
# A Ray cluster of several nodes on one machine, to try out what runs on many. It listens on loopback alone.
#
#   deploy/local.sh start [NODES]   bring up a head and NODES - 1 workers (default 3), print how to use them
#   deploy/local.sh stop            end exactly the processes that `start` started
#
# Environment, the same for start and stop:
#   UNMASK_LOCAL_DIR   state, logs and Ray's sessions; keep it short, sockets live below it   (default /tmp/unmask-$UID)
#                      yours alone (mode 700), and so that nobody else can put another folder in its place
#   PORT               first port: PORT serves Ray, PORT+1 its dashboard, PORT+100 on the nodes    (default 21000)
#   CPUS_PER_NODE      logical CPUs of each node                                                  (default 4)
#   OBJECT_STORE_MB    object store of each node, MiB                                             (default 200)
#   RAY_AUTH_MODE      token, or disabled                                                         (default token)
set -euo pipefail
umask 077 # nothing of it is anybody else's

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=$(realpath -ms -- "${UNMASK_LOCAL_DIR:-/tmp/unmask-$UID}")
state_parent=$(realpath -m -- "${state%/*}/") # links on the way are followed here, once: what is checked is what is used
state=${state_parent%/}/${state##*/}
port=${PORT:-21000}
cpus=${CPUS_PER_NODE:-4}
store_bytes=$((${OBJECT_STORE_MB:-200} * 1024 * 1024))
ports_per_node=200
start_timeout_s=90
stop_timeout_s=15

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
unset RAY_ADDRESS # a cluster that this shell happens to know must not be joined

# Jobs run whatever `python` the nodes find on PATH: it has to be this environment's.
environment_bin=$here/../.venv/bin
[[ -x $environment_bin/ray ]] || environment_bin=$(dirname "$(command -v ray || echo /none/ray)")
[[ -x $environment_bin/ray ]] || { echo "error: there is no ray on PATH and none in .venv; run 'make setup'" >&2; exit 1; }
environment_bin=$(cd "$environment_bin" && pwd)
export PATH=$environment_bin:$PATH

main() {
    case ${1:-} in
        start) start "${2:-3}" ;;
        stop) stop ;;
        *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2 ;;
    esac
}

start() {
    local nodes=$1
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || { echo "error: NODES is '$nodes'; give a number from 1 to 99" >&2; exit 2; }
    require_safe_parents
    mkdir -p -- "$state_parent"
    mkdir -m 700 -- "$state" 2>/dev/null || true # the check that follows says what is wrong with it
    require_own_folder
    [[ ! -e $state/pids ]] || { echo "error: $state holds a cluster already; 'deploy/local.sh stop' ends it" >&2; exit 1; }
    mkdir -p "$state/logs"
    touch "$state/pids"
    trap 'stop >/dev/null' ERR EXIT
    make_token

    start_node 0 --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
        --ray-client-server-port=$((port + 2))
    for ((i = 1; i < nodes; i++)); do
        start_node "$i" --address="127.0.0.1:$port"
    done
    write_environment
    trap - ERR EXIT

    cat <<END
$nodes Ray nodes of $cpus logical CPUs are up; the address is 127.0.0.1:$port, the dashboard http://127.0.0.1:$((port + 1)).
In every shell that talks to them:   source $state/env
Then run directly:                   python -m learner.main recipe=sudoku
or as a job (paths absolute):        ray job submit --working-dir . -- python -m learner.main recipe=sudoku run.dir=\$PWD/runs
Logs are in $state/logs. To end them: deploy/local.sh stop
END
}

# Whoever can write in the state folder, or put another in its place, has what users `source` and which pids are killed.
require_own_folder() {
    local problem=
    if [[ -L $state ]]; then problem="is a symbolic link"
    elif [[ ! -d $state ]]; then problem="can't be made a folder"
    elif [[ ! -O $state ]]; then problem="belongs to user $(stat -c %u -- "$state")"
    elif ((8#$(stat -c %a -- "$state") & 8#077)); then problem="is open to others (mode $(stat -c %a -- "$state"))"
    fi
    [[ -z $problem ]] || refuse "$state $problem"
}

require_safe_parents() {
    local folder=$state_parent owner mode
    while :; do
        if [[ -e $folder ]]; then # else it will be ours
            owner=$(stat -c %u -- "$folder") mode=$(stat -c %a -- "$folder")
            # The owner of / has everything anyway; in a user namespace it needn't be 0.
            ((owner == EUID || owner == 0 || owner == $(stat -c %u /))) || refuse "$folder belongs to user $owner"
            # With the sticky bit, as in /tmp, others can't rename what is ours.
            ((8#$mode & 8#1000 || !(8#$mode & 8#022))) || refuse "others may write in $folder (mode $mode)"
        fi
        [[ $folder != / ]] || break
        folder=$(dirname -- "$folder")
    done
}

refuse() { # WHAT IS WRONG
    echo "error: $1; the state must lie in a folder of yours alone (mode 700), name one with UNMASK_LOCAL_DIR" >&2
    exit 1
}

make_token() {
    [[ $RAY_AUTH_MODE == token ]] || return 0
    HOME=$state ray get-auth-token --generate >/dev/null 2>&1
    export RAY_AUTH_TOKEN_PATH=$state/.ray/auth_token
    chmod 600 "$RAY_AUTH_TOKEN_PATH"
}

start_node() { # INDEX, options of `ray start`
    local index=$1 log=$state/logs/node-$1.log first=$((port + 100 + ports_per_node * $1))
    shift
    # A session folder for each: they would unpack a job's working directory into the same one, on top of each other.
    # --block keeps the node's processes below one process of its own session, by which they are found again.
    setsid "$environment_bin/python" "$here/loopback_ray.py" start "$@" --block --node-ip-address=127.0.0.1 --disable-usage-stats \
        --temp-dir="$state/ray/$index" --num-cpus="$cpus" --object-store-memory="$store_bytes" \
        --node-manager-port=$first --object-manager-port=$((first + 1)) --runtime-env-agent-port=$((first + 2)) \
        --dashboard-agent-listen-port=$((first + 3)) --dashboard-agent-grpc-port=$((first + 4)) \
        --metrics-export-port=$((first + 5)) \
        --min-worker-port=$((first + 10)) --max-worker-port=$((first + ports_per_node - 1)) \
        </dev/null >"$log" 2>&1 &
    local pid=$!
    local -A since=() parent=()
    read_processes
    echo "$pid ${since[$pid]:-gone}" >>"$state/pids"
    for ((tenths = 0; tenths < start_timeout_s * 10; tenths++)); do
        ! grep -q "Ray runtime started" "$log" || return 0
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    echo "error: node $index did not start within $start_timeout_s s; the end of $log:" >&2
    tail -n 15 "$log" >&2
    exit 1
}

write_environment() {
    {
        echo "export RAY_ADDRESS=127.0.0.1:$port RAY_API_SERVER_ADDRESS=http://127.0.0.1:$((port + 1))"
        echo "export RAY_AUTH_MODE=$RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-}"
        # Else Ray looks for it at the machine's network address, where it does not listen.
        echo "export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
        echo "export PATH=$environment_bin:\$PATH"
    } >"$state/env"
}

stop() {
    if [[ -e $state || -L $state ]]; then
        require_safe_parents
        require_own_folder
    fi
    [[ -e $state/pids ]] || { echo "nothing to stop: $state holds no cluster"; return 0; }
    local -A since=() parent=() ours=() # of every process; of the cluster's: pid -> start time, for pids are used again
    local -a alive=()
    local pid start begin=$SECONDS
    read_processes
    while read -r pid start; do
        [[ ${since[$pid]:-} != "$start" ]] || ours[$pid]=$start
    done <"$state/pids"
    add_descendants
    ! find_alive || kill -TERM "${alive[@]}" 2>/dev/null || true # once: a second one may mean "at once" to a run
    while add_descendants && find_alive && ((SECONDS - begin < stop_timeout_s)); do
        ((SECONDS - begin < stop_timeout_s / 2)) || kill -KILL "${alive[@]}" 2>/dev/null || true
        sleep 0.5
        read_processes
    done
    if ((${#alive[@]})); then
        echo "error: these processes of the cluster did not end: ${alive[*]}" >&2
        exit 1
    fi
    rm -rf "$state/pids" "$state/ray" "$state/.ray" "$state/env"
    echo "stopped ${#ours[@]} processes; the logs stay in $state/logs"
}

# Fills `since` (start, in clock ticks from boot) and `parent` with the processes of this machine, less the zombies.
read_processes() {
    local pid state_letter ppid start
    since=() parent=()
    while read -r pid state_letter ppid start; do
        [[ $state_letter == Z ]] || { since[$pid]=$start && parent[$pid]=$ppid; }
    done < <(
        # The command's name, in parentheses, may hold spaces; a process may be gone before it is read.
        { cat /proc/[0-9]*/stat 2>/dev/null || true; } | awk '{pid = $1; sub(/.*\) /, ""); print pid, $1, $2, $20}'
    )
}

# Adds to `ours` every process whose parent is in it.
add_descendants() {
    local pid found=1
    while ((found)); do
        found=0
        for pid in "${!parent[@]}"; do
            [[ -z ${ours[$pid]:-} && -n ${ours[${parent[$pid]}]:-} ]] || continue
            ours[$pid]=${since[$pid]}
            found=1
        done
    done
}

# Fills `alive` with the processes of `ours` that still run; fails when there are none.
find_alive() {
    local pid
    alive=()
    for pid in "${!ours[@]}"; do
        [[ ${since[$pid]:-} != "${ours[$pid]}" ]] || alive+=("$pid")
    done
    ((${#alive[@]}))
}

main "$@"
