#!/usr/bin/env bash
# Loss curves of ours and of PyTorch. The comparison's arithmetic on curves made up here; then dev/bench/loss_curves.sh on the CPU: that ours
# agrees, and that a wrong weight decay, a learning rate 5 % off and another GELU are noticed. That part skips where no python3 (PYTHON names
# one) has torch; all of it without python3.
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=dev/test/kit.sh
. dev/test/kit.sh
needs python3

# curve FILE SEED [STEPS [AWK-CONDITION AWK-EXPRESSION]]: a falling loss with noise of 0.001 by seed; where the condition holds, x is the expression.
curve() {
    awk -v seed="$2" -v n="${3:-400}" 'BEGIN { CONVFMT = "%.9g"; srand(seed); for (s = 1; s <= n; s++) {
        x = 4 + 6 * exp(-s / 50) + 0.001 * (rand() + rand() + rand() + rand() - 2) * sqrt(3); if ('"${4:-0}"') x = '"${5:-x}"'; print s "\t" x "\t" 1 } }' >"$work/$1"
}
compare() { local want=$1 ours=$2; shift 2; run "$want" python3 dev/bench/curve_compare.py --out "$work/compared" --title 'a < b & c' "$work/$ours" "$@"; }
figure() { sed -nE "s/^ *\"$1\": ([^,]*),?$/\1/p" "$work/compared/curves.json"; }
between() { awk -v x="$1" -v low="$2" -v high="$3" 'BEGIN {exit !(x != "" && x + 0 >= low && x + 0 <= high)}'; }
for k in 1 2 3; do curve "run$k" $k; done
runs=("$work/run1" "$work/run2" "$work/run3")

test_case equal_curves_agree
compare 0 run1 "$work/run1" "$work/run1"
expect "it says so" says '^curves: agree over 400 steps'
expect "at a ratio of 1" between "$(figure distance_ratio)" 1 1
done_case

test_case one_more_curve_of_the_kind_agrees
curve other 9
compare 0 other "${runs[@]}"
expect "at a ratio near 1" between "$(figure distance_ratio)" 0.9 1.1
expect "a drift near 1" between "$(figure drift_ratio)" 0.6 1.6
# Two curves with noise of deviation 0.001 lie 0.001 * 2 / sqrt(pi) apart.
expect "and the distance that follows from the noise" between "$(figure distance_ours)" 0.00107 0.00119
expect "all curves side by side, a line a step" test "$(awk -F'\t' 'NF == 9' "$work/compared/curves.tsv" | wc -l)" -eq 401
expect "a picture that is XML" python3 -c 'import sys, xml.dom.minidom; xml.dom.minidom.parse(sys.argv[1])' "$work/compared/curves.svg"
done_case

test_case a_distant_curve_differs
curve far 9 400 1 x+0.005
compare 1 far "${runs[@]}"
expect "it says so" says '^curves: DIFFER'
expect "by its distance" between "$(figure distance_ratio)" 3.5 6
done_case

# 1.8 times the noise of a step: the distance alone does not show it.
test_case a_small_lasting_difference_differs_by_its_drift
curve small 9 400 1 x+0.0018
compare 1 small "${runs[@]}"
expect "the distance is within its limit" between "$(figure distance_ratio)" 1 3
expect "the drift is not" between "$(figure drift_ratio)" 4 20
done_case

test_case a_difference_at_the_start_alone_differs
curve start 9 400 's<=160' 'x+0.1*(1-s/160)'
compare 1 start "${runs[@]}"
done_case

test_case last_places_of_float32_are_no_difference
for k in 0 1 2; do curve "place$k" 1 400 1 "7+$k*4e-7"; done
compare 0 place2 "$work/place0" "$work/place0" "$work/place1"
compare 0 place1 "$work/place0" "$work/place0"
done_case

test_case a_loss_that_is_no_number_differs
for value in null nan inf; do
    curve none 9 400 's==350' "\"$value\""
    compare 1 none "${runs[@]}"
    expect "it says so of ours" says 'DIFFER: a loss is NaN or infinite'
    compare 1 run1 "${runs[@]}" "$work/none"
    expect "it says so of a run" says 'DIFFER: a loss is NaN or infinite'
done
done_case

test_case the_steps_that_all_have_are_compared
curve short 9 100
curve wrong_later 9 400 's>100' 99
compare 0 wrong_later "$work/run1" "$work/short"
expect "100 of them" says 'over 100 steps'
done_case

test_case what_cannot_be_compared_is_refused
curve too_short 9 39
compare 2 too_short "${runs[@]}"
expect "too few steps" says 'has 39 steps, expected 40'
sed 57d "$work/run1" >"$work/gap"
compare 2 run1 "$work/run2" "$work/gap"
expect "a missing step" says 'gap: found step 58 after 56 steps, expected 57'
sed '57s/.*/57 here/' "$work/run1" >"$work/words"
compare 2 words "${runs[@]}"
expect "words" says "words: found '57 here'"
compare 2 run1 "$work/run2"
expect "a single run" says 'two of PyTorch or more'
compare 2 run1 "$work/run2" "$work/absent"
expect "no file" says absent
done_case

test_case the_script_refuses_what_it_does_not_know
run 2 dev/bench/loss_curves.sh --device cpu
expect "no folder" says '--out FOLDER is missing'
run 2 dev/bench/loss_curves.sh --out "$work/curves" --nonsense
run 2 dev/bench/loss_curves.sh --out "$work/curves" --device tpu
run 3 env PYTHON=/bin/false dev/bench/loss_curves.sh --out "$work/curves" --device cpu
expect "no PyTorch" says 'no PyTorch for cpu and fp32'
done_case

python=
for p in ${PYTHON:-python3 /usr/bin/python3}; do "$p" -c 'import torch' 2>/dev/null && { python=$p; break; }; done
if [ ! "$python" ]; then skip "the curves themselves: no torch in ${PYTHON:-python3}"; totals; exit; fi
write_text 4000 >"$work/text.txt"
# against CODE PYTHON [OPTIONS OF OURS]
against() {
    local want=$1 python=$2; shift 2
    run "$want" env BUILD="$build" PYTHON="$python" dev/bench/loss_curves.sh --device cpu --out "$work/curves" --text "$work/text.txt" --steps 100 --runs 2 --lr 2e-3 \
        --model "--layers 2 --channels 64 --heads 2" --seq-len 32 --vocab-size 300 -- "$@"
}
test_case ours_agrees_with_pytorch
against 0 "$python"
expect "over all steps" says '^curves: agree over 100 steps'
done_case

test_case errors_are_noticed
against 1 "$python" --weight-decay 0
expect "no weight decay" says '^curves: DIFFER'
against 1 "$python" --lr 2.1e-3
expect "a learning rate 5 % off" says '^curves: DIFFER'
against 1 "$python" --seed 1
expect "other batches" says '^curves: DIFFER'
mkdir "$work/erf"; cp dev/bench/*.py "$work/erf"; sed -i 's/, approximate="tanh"//' "$work/erf/peer_pytorch.py"
# shellcheck disable=SC2016
printf '#!/usr/bin/env bash\nexec "%s" "${@/#dev\\/bench/%s}"\n' "$python" "${work//\//\\/}/erf" >"$work/python"; chmod +x "$work/python"
against 1 "$work/python"
expect "another GELU" says '^curves: DIFFER'
done_case
totals
