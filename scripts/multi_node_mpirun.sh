#!/usr/bin/env bash
# One run on several machines by Open MPI: multi_node_mpirun.sh HOSTS MODEL [train_gpt2 options], such as
#   scripts/multi_node_mpirun.sh node1:8,node2:8 gpt2_124M
# HOSTS has, for each machine, how many ranks it gets (one a GPU). The machines must share this folder, at the same path, and mpirun must reach them
# (ssh without a password). The same command continues. SIGTERM or Ctrl-C: all ranks save, exit code 75. MPIRUN_FLAGS are further options of mpirun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ] || ! [[ $1 =~ ^[^,:]+:[1-9][0-9]*(,[^,:]+:[1-9][0-9]*)*$ ]]; then
    echo "multi_node_mpirun: found HOSTS \"${1:-}\", expected machines and ranks such as node1:8,node2:8" >&2
    sed -n '2,3s/^# *//p' scripts/multi_node_mpirun.sh >&2
    exit 2
fi
command -v mpirun >/dev/null || { echo "multi_node_mpirun: mpirun is not installed (openmpi-bin); multi_node_torchrun.sh needs none" >&2; exit 2; }
hosts=$1; shift

# Ranks are not tied to cores: a rank's threads feed its GPU. A rank that fails ends all.
mpi=(mpirun --host "$hosts" -np "$(tr , '\n' <<<"$hosts" | awk -F: '{n += $2} END {print n}')" --bind-to none)
[ "$(id -u)" -ne 0 ] || mpi+=(--allow-run-as-root)
for name in $(compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|MASTER_ADDR|MASTER_PORT|(LLMC|OMP|NCCL|CUDA|UCX)_.*)$'); do mpi+=(-x "$name"); done
read -ra flags <<<"${MPIRUN_FLAGS:-}"

# SIGTERM makes mpirun kill the ranks within seconds; SIGUSR1 it hands on to them, and one rank that knows is enough.
# shellcheck source-path=SCRIPTDIR source=children.sh
source scripts/children.sh
pid='' code=0
# shellcheck disable=SC2317 # hand_on calls it
tell() { [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null || true; }
hand_on tell
"${mpi[@]}" ${flags[@]+"${flags[@]}"} scripts/pretrain.sh "$@" </dev/null &
pid=$!
[ -z "$asked" ] || tell
wait_for "$pid"
exit "$code"
