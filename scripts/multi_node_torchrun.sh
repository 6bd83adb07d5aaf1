#!/usr/bin/env bash
# One run on several machines without MPI or Slurm: this script, started on each machine with torchrun's options, starts that machine's ranks with
# torchrun's variables. No Python is needed.
#   on node1: scripts/multi_node_torchrun.sh --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr node1 --master-port 29500 gpt2_124M [train_gpt2 options]
#   on node2: the same with --node-rank 1
# (torchrun itself does it too: torchrun --no-python --nnodes 2 ... scripts/pretrain.sh gpt2_124M.)
# The machines must share the run directory. The same command continues. SIGTERM or Ctrl-C on one machine: all ranks of all save, exit code 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { echo "multi_node_torchrun: $1" >&2; sed -n '4,5s/^# *//p' scripts/multi_node_torchrun.sh >&2; exit 2; }
nnodes=1 node_rank=0 nproc_per_node=1 master_addr='' master_port=29500
while [[ ${1:-} == --* ]]; do
    case $1 in
        --nnodes=* | --node-rank=* | --nproc-per-node=* | --master-addr=* | --master-port=*) name=${1%%=*} value=${1#*=} ;;
        --nnodes | --node-rank | --nproc-per-node | --master-addr | --master-port) [ $# -gt 1 ] || usage "$1 needs a value"; name=$1 value=$2; shift ;;
        *) usage "unknown option $1 (options of train_gpt2 come after MODEL)" ;;
    esac
    shift
    name=${name#--}
    [ "$name" = master-addr ] || [[ $value =~ ^(0|[1-9][0-9]{0,4})$ ]] || usage "--$name: found \"$value\", expected a number"
    printf -v "${name//-/_}" %s "$value"
done
[ $# -gt 0 ] || usage "no MODEL"
[ -n "$master_addr" ] || [ "$nnodes" -eq 1 ] || usage "--master-addr is missing: the host name or address of node 0"
[ "$node_rank" -lt "$nnodes" ] || usage "--node-rank: found $node_rank, expected less than --nnodes $nnodes"
[ "$nproc_per_node" -gt 0 ] || usage "--nproc-per-node: found 0"
export WORLD_SIZE=$((nnodes * nproc_per_node)) LOCAL_WORLD_SIZE=$nproc_per_node MASTER_ADDR=${master_addr:-127.0.0.1} MASTER_PORT=$master_port

# A rank dies with this script, where setpriv can see to that.
# shellcheck source-path=SCRIPTDIR source=children.sh
source scripts/children.sh
die_with_us=()
if command -v setpriv >/dev/null && setpriv --pdeathsig KILL true 2>/dev/null; then die_with_us=(setpriv --pdeathsig KILL); fi
pids=() code=0
tell() { local p; for p in ${pids[@]+"${pids[@]}"}; do kill -TERM "$p" 2>/dev/null || true; done; }
hand_on tell
first=$((node_rank * nproc_per_node))
for ((i = 0; i < nproc_per_node; i++)); do
    RANK=$((first + i)) LOCAL_RANK=$i ${die_with_us[@]+"${die_with_us[@]}"} scripts/pretrain.sh "$@" </dev/null &
    pids[i]=$!
done
[ -z "$asked" ] || tell

# The first that fails ends the others, and its exit code is ours; that of a rank that only lost another (7) where there is no other, and 75 (saved,
# run again) where all is well.
worst=0
ended() { # LOCAL_RANK CODE
    if [ "$2" -eq 0 ]; then return; fi
    case $worst in 0) worst=$2 ;; 7 | 75) [ "$2" -eq 75 ] || worst=$2 ;; esac
    if [ "$2" -ne 75 ]; then echo "multi_node_torchrun: rank $((first + $1)) ended with exit code $2" >&2; fi
    if [ "$2" -ne 75 ] && [ "$2" -ne 7 ]; then tell; fi
}
exec 3<> <(:) # nothing comes from it: reading it is a pause that starts no process
while [ ${#pids[@]} -gt 0 ]; do
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        wait_for "${pids[i]}"
        unset 'pids[i]'
        ended "$i" "$code"
    done
    read -r -t 0.2 -u 3 || true
done
exit "$worst"
