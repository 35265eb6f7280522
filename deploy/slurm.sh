#!/usr/bin/env bash
# One run on nodes that Slurm allots: a Ray of these nodes, with a token of its own, and the controller on the first one.
#
#   sbatch deploy/slurm.sh run.dir=$HOME/runs recipe=sudoku rollout.actors=4
#   sbatch --nodes=4 --gres=gpu:8 --time=12:00:00 deploy/slurm.sh run.dir=/shared/runs recipe=llada_gsm8k
#
# Submit it from the repository's root, which `make setup` prepared, on a file system that all nodes see; run.dir too has
# to lie on one. What follows the script's name goes to `python -m learner.main`; options of sbatch come before it.
#
# Five minutes before the time limit, and before a preemption where the site has Slurm send the job's own warning
# (PreemptParameters=send_user_signal), SIGUSR1 comes: the run finishes its iteration, saves, and the job goes back into
# the queue, to go on from there. After a node failure Slurm itself puts it back. scancel ends it for good.
#SBATCH --job-name=unmask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=unmask-%j.out
set -euo pipefail
umask 077 # nothing of it is anybody else's

nodes_limit_s=300 # for all nodes to be part of the Ray
end_limit_s=30    # for Ray to end on all nodes
usr1_status=138   # of a run that SIGUSR1 asked to stop and that has saved

main() {
    [[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a batch script: submit it with sbatch deploy/slurm.sh SETTINGS"
    root=${SLURM_SUBMIT_DIR:-$PWD}
    [[ -f $root/deploy/slurm.sh ]] || fail "$root has no deploy/slurm.sh; submit it from the repository's root"
    [[ -x $root/.venv/bin/ray ]] || fail "$root/.venv has no ray; run 'make setup' in $root"
    export PATH=$root/.venv/bin:$PATH
    require_run_dir "$@"

    # A token of this job alone: in the environment of its own processes, on no disk and on no command line.
    RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
    export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
    unset RAY_ADDRESS RAY_AUTH_TOKEN_PATH # a cluster that this shell happens to know must not be joined

    run=
    warned=
    steps=()
    trap warn USR1
    trap end_nodes EXIT
    start_nodes

    # The job's own number is the run's name: a job that comes back finds its run. A name among the settings wins.
    python -m learner.main "run.name=slurm-$SLURM_JOB_ID" resume=auto "$@" &
    run=$!
    [[ -z $warned ]] || kill -USR1 "$run"
    local status=0
    while :; do # a signal ends `wait`, not the run
        wait "$run" && status=0 || status=$?
        kill -0 "$run" 2>/dev/null || break
    done
    if [[ -n $warned ]] && ((status == usr1_status)); then
        echo "the run has stopped before its time is up; job $SLURM_JOB_ID goes back into the queue"
        end_nodes
        scontrol requeue "$SLURM_JOB_ID"
        return 0
    fi
    return "$status"
}

require_run_dir() { # SETTINGS
    local setting
    for setting in "$@"; do
        [[ $setting != run.dir=/* ]] || return 0
    done
    fail "say where the run is kept, on a file system that all nodes see: run.dir=/ABSOLUTE/PATH"
}

warn() {
    warned=yes
    [[ -z $run ]] || kill -USR1 "$run" 2>/dev/null || true
}

start_nodes() {
    local head address
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # one a line; the script runs on the first
    address=$(python -c 'from ray.util import get_node_ip_address; print(get_node_ip_address())')
    address+=:$((20000 + SLURM_JOB_ID % 20000)) # another one for each job
    step --nodes=1 --ntasks=1 --nodelist="$head" "$root/deploy/slurm.sh" node --head --port="${address##*:}" \
        --include-dashboard=false
    if ((SLURM_JOB_NUM_NODES > 1)); then
        step --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
            "$root/deploy/slurm.sh" node --address="$address"
    fi
    export RAY_ADDRESS=$address
    python - "$SLURM_JOB_NUM_NODES" "$nodes_limit_s" <<'END'
import sys, time
import ray
wanted, limit_s = int(sys.argv[1]), float(sys.argv[2])
ends, problem = time.monotonic() + limit_s, None
while time.monotonic() < ends:
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="error")
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive >= wanted:
            sys.exit()
        problem = f"{alive} of {wanted} nodes are there"
    except (ConnectionError, RuntimeError, ValueError) as error:  # the head isn't up yet
        problem = error
    time.sleep(1)
sys.exit(f"error: Ray did not start on all nodes within {limit_s:.0f} s: {problem}")
END
}

step() { # options of srun, and the command; a node that fails ends neither its neighbours nor the job
    srun --overlap --no-kill --kill-on-bad-exit=0 --wait=0 --cpus-per-task="$SLURM_CPUS_ON_NODE" --input=none \
        "$@" &
    steps+=("$!")
}

# On each node: Ray's files in a folder that only we may enter, for Ray makes its own writable by everybody.
node() { # options of `ray start`
    local private ray status=0
    private=$(mktemp -d /tmp/um-XXXXXX)
    # Ports that the system chooses, for jobs may share a node.
    ray start "$@" --block --temp-dir="$private/ray" --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --disable-usage-stats \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 &
    ray=$!
    # Ray says goodbye to the head first, and would wait for one that is gone already; Slurm ends what it leaves.
    trap 'kill "$ray" 2>/dev/null; { sleep 10; kill -KILL "$ray" 2>/dev/null; } &' TERM INT
    while kill -0 "$ray" 2>/dev/null; do
        wait "$ray" && status=0 || status=$?
    done
    rm -rf "$private"
    return "$status"
}

end_nodes() {
    trap - EXIT
    ((${#steps[@]})) || return 0
    scancel --signal=TERM "$SLURM_JOB_ID" # to the steps; srun itself would have them killed
    for ((second = 0; second < end_limit_s; second++)); do
        kill -0 "${steps[@]}" 2>/dev/null || break
        sleep 1
    done
    kill -KILL "${steps[@]}" 2>/dev/null || true # Slurm ends what is left of them
    steps=()
}

fail() { # WHAT IS WRONG
    echo "error: $1" >&2
    exit 2
}

if [[ ${1:-} == node ]]; then
    shift
    node "$@"
else
    main "$@"
fi
