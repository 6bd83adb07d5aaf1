#!/usr/bin/env bash
# The recipes in scripts/: their numbers, and each run as a user runs it, with a tiny model, through its launcher: our own, mpirun where it is
# installed, torchrun's variables, a stand-in for Slurm, two machines made of network namespaces where this user may make some.
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=dev/test/kit.sh
. dev/test/kit.sh
needs pgrep
netns=()
clean() {
    [ $BASHPID = $$ ] || return
    pkill -KILL -f -- "--out $work/" # where a test has failed
    for n in ${netns[@]+"${netns[@]}"}; do ip netns del "$n" 2>/dev/null; done
    rm -rf "$work"
}
trap clean EXIT
export LLMC_TRAIN=$build/train_gpt2 MPIRUN_FLAGS="--oversubscribe"
same_losses() { test "$(losses "$1" | wc -l)" -eq 30 && cmp -s <(losses "$1") <(losses "$2"); }
await() { # FILE PATTERN: until a line of the file has it, thirty seconds at most. The file is to be new: who writes it may begin late
    local i; for ((i = 0; i < 600; i++)); do grep -qE -- "$2" "$1" 2>/dev/null && return 0; sleep 0.05; done; return 1
}
program() { printf '#!/usr/bin/env bash\n%s\n' "$2" >"$1"; chmod +x "$1"; }

prepare_tokens
tiny=(--data "$work/prepared/data/train.bin" --val "$work/prepared/data/val.bin" --tokenizer "$work/prepared/data/tokenizer" --layers 1 --channels 32 --heads 2 --seq-len 32
    --batch 2 --total-batch 768 --val-every 10 --val-batches 4 --save-every 10 --lr 3e-3 --steps 30 --warmup 5)
endless=(--steps 1000000 --val-every 0 --save-every 0)

# FORMATS' table. The recipe is told by a program that prints what it was given.
program "$work/print_cu" 'printf " %s" "$@"'
test_case the_numbers_of_each_recipe
while read -r recipe model batch total lr final steps rest; do
    for script in "pretrain_$recipe.sh" "pretrain.sh $recipe"; do
        # shellcheck disable=SC2086 # the script and its argument
        LLMC_TRAIN="$work/print_cu" run 0 scripts/$script --data x --grad-clip 2
        for word in "--model $model" "--batch $batch" "--total-batch $total" "--lr $lr" "--final-lr $final" "--steps $steps" "--warmup 700" "--lr-schedule cosine" "--weight-decay 0.1" \
            "--beta1 0.9 --beta2 0.95 --eps 1e-8" "--grad-clip 1" "--out runs/$recipe" "--val-batches $rest"; do
            expect "$script: $word" says "$word( |$)"
        done
        expect "$script: what is given comes last" says '--data x --grad-clip 2$'
    done
    run 0 "scripts/pretrain_$recipe.sh" --dry-run --processes 8 --batch 1
    expect "$recipe: the program takes it" says "^plan"
    expect "$recipe: total batch" says "batch  +$total tokens a step"
done <<'TABLE'
gpt2_124M gpt2 64 524288 6e-4 0 18865 160
gpt2_350M gpt2-medium 64 524288 3e-4 0 60000 160
gpt2_774M gpt2-large 32 524288 2.5e-4 0 286102 320
gpt2_1558M gpt2-xl 16 1048576 6e-4 0.1 32000 640
gpt3_125M gpt3-125m 32 524288 6e-4 0.1 572204 160
TABLE
done_case

test_case what_is_missing_is_said
if compgen -G 'dev/data/fineweb10B/*.bin' >/dev/null; then skip "no_shards: there are some here"
else
    run 3 scripts/pretrain_gpt2_124M.sh
    expect "which files" says 'no token shards: found no dev/data/fineweb10B/fineweb_train_\*\.bin'
    expect "where they are, and how to make some" says 'kjj0/fineweb10B-gpt2'
    expect "how to make some" says 'tokenize encode'
    expect "nothing was begun" test ! -e runs/gpt2_124M
    LOCAL_RANK=1 run 3 scripts/pretrain_gpt2_350M.sh
    expect "one rank speaks for a machine" test ! -s "$work/log"
fi
run 2 scripts/pretrain.sh gpt2_9M
expect "which models there are" says 'gpt2_9M.*expected one of: gpt2_124M gpt2_350M gpt2_774M gpt2_1558M gpt3_125M'
LLMC_TRAIN=$work/none run 2 scripts/pretrain_gpt2_124M.sh
expect "the program" says 'make train_gpt2cu'
run 2 scripts/pretrain_gpt2_124M.sh --batch big --data x
run 2 scripts/multi_node_mpirun.sh gpt2_124M
run 2 scripts/multi_node_torchrun.sh --nnodes 2 gpt2_124M
expect "the address" says 'master-addr is missing'
run 2 scripts/multi_node_torchrun.sh --nnodes 2 --node-rank 2 --master-addr x gpt2_124M
run 2 scripts/multi_node_torchrun.sh --steps 3
run 2 scripts/multi_node.sbatch
done_case

test_case each_recipe_trains_and_goes_on
for recipe in gpt2_350M gpt2_774M gpt2_1558M gpt3_125M; do run 0 "scripts/pretrain_$recipe.sh" "${tiny[@]}" --steps 2 --warmup 1 --out "$work/$recipe" --processes 2; done
for n in 2 4; do run 0 scripts/pretrain_gpt2_124M.sh "${tiny[@]}" --out "$work/by $n" --processes $n; done
LLMC_FAULT=term@step=7,rank=1 run 75 scripts/pretrain_gpt2_124M.sh "${tiny[@]}" --out "$work/stopped" --processes 2
run 0 scripts/pretrain_gpt2_124M.sh "${tiny[@]}" --out "$work/stopped" --processes 2
expect "it went on" says 'resuming from'
expect "same losses" same_losses "$work/by 2" "$work/stopped"
done_case

test_case keep_running
program "$work/twice" 'echo x >>"$0.runs"; [ "$(wc -l <"$0.runs")" -gt 2 ] || exit 75'
KEEP_RUNNING_PAUSE=0 run 0 scripts/keep_running.sh "$work/twice"
expect "75 twice, then done" test "$(wc -l <"$work/twice.runs")" -eq 3
for code in 2 3 4 5; do
    program "$work/never" "echo x >>\"\$0.runs\"; exit $code"
    rm -f "$work/never.runs"
    KEEP_RUNNING_PAUSE=0 run $code scripts/keep_running.sh "$work/never"
    expect "never after $code" test "$(wc -l <"$work/never.runs")" -eq 1
done
mkdir "$work/bin"
program "$work/bin/sleep" "echo \"\$1\" >>'$work/pauses'"
program "$work/crash" 'echo x >>"$0.runs"; kill -SEGV $$'
PATH="$work/bin:$PATH" KEEP_RUNNING_CRASHES=3 run 139 scripts/keep_running.sh "$work/crash"
expect "as often as it may" test "$(wc -l <"$work/crash.runs")" -eq 4
expect "pauses grow" test "$(paste -sd' ' "$work/pauses")" = "10 20 40"
program "$work/soon" 'exit 75'
PATH="$work/bin:$PATH" KEEP_RUNNING_CRASHES=2 run 75 scripts/keep_running.sh "$work/soon"
expect "a 75 at once is no way to go on for ever" says '3 times in a row'
program "$work/asked" 'echo x >>"$0.runs"; trap "exit 75" TERM; echo ready; while :; do read -t 0.1 <> <(:); done'
rm -f "$work/log"
scripts/keep_running.sh "$work/asked" >"$work/log" 2>&1 & pid=$!
expect "it is there" await "$work/log" ready
kill -TERM $pid; wait $pid; code=$?
expect "the exit code of the run that was stopped, found $code" test $code -eq 75
expect "no other began" test "$(wc -l <"$work/asked.runs")" -eq 1
program "$work/broken" '[ -e "$0.again" ] || { touch "$0.again"; export LLMC_FAULT=kill@step=17,rank=1; }; exec "$@"'
KEEP_RUNNING_PAUSE=0 run 0 scripts/keep_running.sh "$work/broken" scripts/pretrain.sh gpt2_124M "${tiny[@]}" --out "$work/kept" --processes 2
expect "a rank killed: same losses" same_losses "$work/by 2" "$work/kept"
done_case

if command -v mpirun >/dev/null; then
    test_case mpirun
    for n in 2 4; do
        run 0 scripts/multi_node_mpirun.sh "localhost:$n" gpt2_124M "${tiny[@]}" --out "$work/mpi $n"
        expect "$n: same losses" same_losses "$work/by $n" "$work/mpi $n"
    done
    rm -f "$work/log"
    scripts/multi_node_mpirun.sh localhost:2 gpt2_124M "${tiny[@]}" "${endless[@]}" --out "$work/mpi stop" >"$work/log" 2>&1 & pid=$!
    expect "it trains" await "$work/log" 'step +12/'
    kill -TERM $pid; wait $pid; code=$?
    expect "exit code 75, found $code" test $code -eq 75
    expect "saved" says 'saved; the same command continues'
    expect "no orphans" gone
    expect "saved" test -n "$(compgen -G "$work/mpi stop/step_*")"
    LLMC_FAULT=kill@step=5,rank=1 timeout 60 scripts/multi_node_mpirun.sh localhost:2 gpt2_124M "${tiny[@]}" --out "$work/mpi killed" >"$work/log" 2>&1; code=$?
    expect "the code of the killed rank, or of the one that lost it, found $code" test $code -eq 137 -o $code -eq 7
    expect "no orphans of a killed rank" gone
    done_case
else skip "mpirun: it is not installed"; fi

# Two machines by hand: node 0's output in log0, node 1's in log1; their exit codes in codes.
two_nodes() { # ADDRESS PREFIX0 PREFIX1 OPTION...: starts both; the prefixes are commands, of words without spaces
    local address=$1 k port; shift
    local prefix=("$1" "$2"); shift 2
    port=$(free_port)
    rm -f "$work/log0" "$work/log1"
    for k in 1 0; do
        # shellcheck disable=SC2086 # words
        timeout 60 ${prefix[k]} scripts/multi_node_torchrun.sh --nnodes 2 --node-rank $k --nproc-per-node=2 --master-addr "$address" --master-port "$port" gpt2_124M "${tiny[@]}" "$@" \
            >"$work/log$k" 2>&1 & nodes[k]=$!
    done
}
both_end() { # codes of both, in any order of a pattern
    local k; for k in 0 1; do wait "${nodes[k]}"; codes[k]=$?; done
    cat "$work/log0" "$work/log1" >"$work/log"
}
test_case torchruns_variables
two_nodes 127.0.0.1 "" "" --out "$work/torch"
both_end
expect "both end well, found ${codes[*]}" test "${codes[*]}" = "0 0"
expect "same losses" same_losses "$work/by 4" "$work/torch"
expect "node 1 is silent" test ! -s "$work/log1"
two_nodes 127.0.0.1 "" "" "${endless[@]}" --out "$work/torch stop"
expect "it trains" await "$work/log0" 'step +12/'
pkill -TERM -P "${nodes[1]}" -f multi_node_torchrun.sh
both_end
expect "stopped on node 1, both say 75, found ${codes[*]}" test "${codes[*]}" = "75 75"
expect "saved" says 'saved; the same command continues'
LLMC_FAULT=kill@step=5,rank=3 two_nodes 127.0.0.1 "" "" --out "$work/torch killed"
both_end
expect "a killed rank ends both, its own machine with its code, found ${codes[*]}" test "${codes[*]}" = "7 137"
expect "no orphans" gone
rm -f "$work/log"
scripts/multi_node_torchrun.sh --nproc-per-node 2 --master-port "$(free_port)" gpt2_124M "${tiny[@]}" "${endless[@]}" --out "$work/torch orphans" >"$work/log" 2>&1 & pid=$!
expect "it trains" await "$work/log" 'step +12/'
kill -KILL $pid; wait $pid 2>/dev/null
expect "no orphans of a killed script" gone
done_case

# Slurm's part: srun starts the ranks with its variables, hands SIGTERM on as --signal does, and says the highest exit code, which
# may be that of a rank that it killed.
program "$work/bin/srun" '
[ "$1" = --kill-on-bad-exit=1 ] || exit 2; shift
trap "kill -TERM \${pids[@]}" TERM
for r in 0 1 2; do
    SLURM_PROCID=$r SLURM_NTASKS=3 SLURM_LOCALID=$r SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_TASKS_PER_NODE=3 SLURM_NODEID=0 "$@" & pids[r]=$!
done
echo $$ >"$SRUN_PID"
most=0
for r in 0 1 2; do
    while :; do wait ${pids[r]}; code=$?; kill -0 ${pids[r]} 2>/dev/null || break; done
    [ $code -le $most ] || most=$code
    [ $code -eq 0 ] || { [ $code -gt 128 ] || echo "srun: error: node1: task $r: Exited with exit code $code" >&2; [ $code -eq 75 ] || kill ${pids[@]} 2>/dev/null; }
done
[ $most -eq 0 ] || [ $most -gt 128 ] || most=143
exit $most'
program "$work/bin/scontrol" 'echo "scontrol $*"'
rm "$work/bin/sleep"
slurm() { PATH="$work/bin:$PATH" SRUN_PID="$work/srun" SLURM_JOB_ID=$1 SLURM_SUBMIT_DIR=$PWD scripts/multi_node.sbatch gpt2_124M "${tiny[@]}" "${@:2}" >"$work/log" 2>&1; }
test_case slurm
run 0 scripts/pretrain_gpt2_124M.sh "${tiny[@]}" --out "$work/by 3" --processes 3
rm -f "$work/srun"
LLMC_FAULT=stop@step=9,rank=0 slurm 7 --out "$work/slurm" & pid=$! # rank 0 waits there until it is told to go on
ranks() { pgrep -d, -f -- "--out $work/slurm( |$)"; }
for _ in $(seq 600); do ps -o stat= -p "$(ranks)" 2>/dev/null | grep -q "^T" && break; sleep 0.05; done
kill -TERM "$(cat "$work/srun")"
pkill -CONT -f -- "--out $work/slurm( |$)"; wait $pid; code=$?
expect "stopped before the end, found exit code $code" test $code -eq 75
expect "queued again" says '^scontrol requeue 7$'
slurm 7 --out "$work/slurm"; code=$?
expect "it goes on to the end, found $code" test $code -eq 0
expect "same losses" same_losses "$work/by 3" "$work/slurm"
expect "not queued again" test -z "$(grep scontrol "$work/log")"
LLMC_FAULT=kill@step=5,rank=1 slurm 8 --out "$work/slurm killed"; code=$?
expect "a rank killed at once: exit code 137, found $code" test $code -eq 137
expect "is not queued again" says 'exit code 137 after [0-9]+ s: not queued again'
CRASH_AFTER=0 LLMC_FAULT=kill@step=5,rank=1 slurm 8 --out "$work/slurm killed"
expect "after a while it is" says '^scontrol requeue 8$'
slurm 9 --out "$work/slurm" --batch 5; code=$?
expect "a wrong option: 2, found $code" test $code -eq 2
for line in --signal=TERM@300 --requeue --open-mode=append; do expect "$line" grep -q "^#SBATCH $line$" scripts/multi_node.sbatch; done
expect "no orphans" gone
done_case

# Two machines, each with a network of its own, and a cable between them.
a=llmc-$$-a b=llmc-$$-b
if command -v ip >/dev/null && ip netns add $a 2>/dev/null && netns+=("$a") && ip netns add $b 2>/dev/null && netns+=("$b") &&
    ip link add v$$a netns $a type veth peer name v$$b netns $b 2>/dev/null && ip -n $a addr add 10.99.0.1/24 dev v$$a && ip -n $b addr add 10.99.0.2/24 dev v$$b &&
    ip -n $a link set lo up && ip -n $b link set lo up && ip -n $a link set v$$a up && ip -n $b link set v$$b up; then
    test_case two_machines
    two_nodes 10.99.0.1 "ip netns exec $a" "ip netns exec $b" --out "$work/hosts"
    both_end
    expect "both end well, found ${codes[*]}" test "${codes[*]}" = "0 0"
    expect "same losses as on one machine" same_losses "$work/by 4" "$work/hosts"
    done_case
    test_case the_cable_is_pulled
    two_nodes 10.99.0.1 "ip netns exec $a" "ip netns exec $b" "${endless[@]}" --timeout 2 --out "$work/cable"
    expect "it trains" await "$work/log0" 'step +12/'
    ip -n $b link set v$$b down
    begun=$SECONDS
    both_end
    expect "6 or 7 on both, found ${codes[*]}" grep -qE '^[67] [67]$' <<<"${codes[*]}"
    expect "in time: the limit of 2 s and not much more, found $((SECONDS - begun)) s" test $((SECONDS - begun)) -le 15
    expect "who waits, for whom, where" says 'no progress .* during training, step [0-9]+; I wait for rank [0-3]'
    expect "no orphans" gone
    done_case
else skip "two_machines, the_cable_is_pulled: network namespaces need a right, or iproute2, that is not here"; fi

totals
