# What the tests of whole programs have in common. To be sourced from the top folder; gives $train, the program, and $work, a folder with a space in
# its path, on purpose, that is removed at the end. A test is test_case NAME, commands, done_case; the last line of a file is `totals`.
# shellcheck shell=bash disable=SC2034
build=${LLMC_TEST_BUILD:-build/test}
case $build in /*) ;; *) build=$PWD/$build ;; esac
train=$build/train_gpt2
work=$(mktemp -d "${TMPDIR:-/tmp}/llmc test.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
passed=0 failed=0 skipped=0 name=
test_case() { name=$1; bad=0; }
expect() { # description, command...
    local what=$1; shift
    "$@" || { bad=1; echo "FAILED $name: $what"; }
}
done_case() { if [ "$bad" -eq 0 ]; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); tail -12 "$work/log" 2>/dev/null; fi; }
skip() { skipped=$((skipped + 1)); echo "skipped $1"; }
totals() { echo "$passed passed, $failed failed, $skipped skipped"; [ "$failed" -eq 0 ]; }
# Only where a tool is there that all of the file needs.
needs() { command -v "$1" >/dev/null || { skip "all: $1 is not installed"; totals; exit 0; }; }

# run_command CODE COMMAND...: its output in $work/log, what it says there, and the exit code it must have. A file may give `run` a narrower meaning.
run_command() {
    local want=$1 got; shift
    timeout 120 "$@" >"$work/log" 2>&1; got=$?
    [ "$got" -eq "$want" ] || { bad=1; echo "FAILED $name: exit code $got, expected $want, of: $*"; }
}
run() { run_command "$@"; }
says() { grep -qE -- "$1" "$work/log"; }

has_emulator() { "$train" --device emu --dry-run --model gpt2 >/dev/null 2>&1; }

# Of a run: "step loss norm" of each step, once; whether none of its processes is left, which may take two seconds.
losses() { sed -nE 's/.*"kind":"step".*"step":([0-9]+),"loss":([^,]*),.*"norm":([^,]*),.*/\1 \2 \3/p' "$1/metrics.jsonl" | sort -n -u; }
gone() { local i; for ((i = 0; i < 40; i++)); do pgrep -f -- "--out $work/" >/dev/null || return 0; sleep 0.05; done; return 1; }
# All tensors of a checkpoint (weights, moments) as one hash; the files' headers, which hold the run's id, left out.
tensor_hash() {
    local f n
    for f in "$1"/*.safetensors; do n=$(od -An -tu8 -N8 "$f") && tail -c +$((n + 9)) "$f"; done | sha256sum
}
# Below the ports that connections going out take.
free_port() { local p; for p in $(seq 20000 32000 | shuf -n 50); do (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null || { echo "$p"; return; }; done; }

# Text with some structure: N sentences of a few words, numbered documents.
write_text() {
    awk -v n_lines="$1" 'BEGIN { srand(7); n = split("the a cat dog bird king river stone sings sleeps finds loses old small bright", w, " ");
      for (i = 0; i < n_lines; i++) { s = ""; for (k = 0; k < 4 + int(rand() * 6); k++) s = s w[1 + int(rand() * n)] " "; print s i % 97 "." } }'
}
# $work/prepared/data: train.bin, val.bin and tokenizer of such a text, so that runs need not make them.
prepare_tokens() {
    write_text 3000 >"$work/text.txt"
    "$train" --data "$work/text.txt" --out "$work/prepared" --layers 1 --channels 32 --heads 2 --seq-len 32 --vocab-size 300 --steps 1 >"$work/log" 2>&1
}
