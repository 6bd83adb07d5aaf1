#!/usr/bin/env python3
"""Whether our loss curve differs from PyTorch's by more than PyTorch's differ among themselves in rounding alone.

    python3 dev/bench/curve_compare.py --out FOLDER --title TEXT OURS RUN RUN [RUN...]

Each file: a line a step, "step loss norm" between blanks. Writes FOLDER/curves.tsv (all of them side by side), curves.json and curves.svg,
prints a line "curves: ...". Exit: 0 it does not differ more, 1 it does, 2 usage or files that are no curves.

What is compared, over the steps that all have, which are cut into WINDOWS equal parts:
  distance  of two curves in a window: mean |difference of losses|. Ours: to each run, mean over runs. Theirs: of each pair, mean over pairs.
            The ratio of the two, its geometric mean over windows, is at most DISTANCE: late windows, where rounding has grown, and early
            ones count alike.
  drift     root of the mean over windows of (mean difference of losses)^2, ours and theirs likewise; their ratio is at most DRIFT. A
            small lasting difference, which the noise of single steps hides from the first, shows here.
Neither is below one unit in the last place of a float32 loss. If ours were one more run of PyTorch both ratios would be near 1, but not
at 1: they are quotients of two distances between few runs. A model trained at the edge of stability may part in two ways by rounding
alone: of a tiny one in bf16 whose learning rate was too high, 13 of 100 honest sets with two runs of PyTorch failed and 5 of 100 with
three; with a lower rate 1 and none, and both ratios of ours in bf16 were mostly 0.8 to 1.1. Norms stand in the files and decide nothing.
"""
import argparse
import itertools
import json
import math
import os
import sys

WINDOWS, DISTANCE, DRIFT, LEAST_STEPS = 20, 3.0, 4.0, 40
COLOURS = ("#b03030", "#9ec5e8", "#1f4e79", "#6f9fc8", "#2a6f4e", "#8a6d3b")


class NoCurve(Exception):
    """Why a comparison cannot be made: exit code 2. A curve that went wrong (NaN) is compared, and fails."""


def read_curve(path):
    """[(loss, norm)] of steps 1, 2, ... A NaN or infinite value may be "null", as JSON has none."""
    curve = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                step, loss, norm = (float("nan" if x == "null" else x) for x in line.split())
            except ValueError:
                raise NoCurve(f"{path}: found {line.strip()!r}, expected step, loss, norm") from None
            if step != len(curve) + 1:
                raise NoCurve(f"{path}: found step {step:g} after {len(curve)} steps, expected {len(curve) + 1}")
            curve.append((loss, norm))
    return curve


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def windows(n):
    return [range(i * n // WINDOWS, (i + 1) * n // WINDOWS) for i in range(WINDOWS)]


def compare(ours, runs):
    """What curves.json says, of lists of losses of one length."""
    n = len(ours)
    cut = windows(n)
    theirs = list(itertools.combinations(runs, 2))
    least = [2.0**-23 * max(1.0, mean(ours[s] for s in w)) for w in cut]  # of a window: one unit in the last place

    def distances(pairs):
        return [mean(mean(abs(a[s] - b[s]) for s in w) for a, b in pairs) for w in cut]

    def drift(pairs):
        return math.sqrt(mean(mean(mean(a[s] - b[s] for s in w) ** 2 for w in cut) for a, b in pairs))

    with_ours = [(ours, run) for run in runs]
    finite = all(math.isfinite(x) for curve in (ours, *runs) for x in curve)
    result = {"steps": n, "runs": len(runs), "finite": finite, "distance_limit": DISTANCE, "drift_limit": DRIFT, "agrees": False}
    if not finite:
        return result
    d_ours, d_theirs = distances(with_ours), distances(theirs)
    ratios = [max(a, u) / max(b, u) for a, b, u in zip(d_ours, d_theirs, least)]
    distance = math.exp(mean(math.log(r) for r in ratios))
    drift_ours, drift_theirs = drift(with_ours), drift(theirs)
    drift_ratio = max(drift_ours, mean(least)) / max(drift_theirs, mean(least))
    result.update({"distance_ratio": distance, "drift_ratio": drift_ratio, "agrees": distance <= DISTANCE and drift_ratio <= DRIFT,
                   "distance_ours": mean(d_ours), "distance_pytorch": mean(d_theirs), "drift_ours": drift_ours, "drift_pytorch": drift_theirs,
                   "window_last_step": [w[-1] + 1 for w in cut], "window_distance_ours": d_ours, "window_distance_pytorch": d_theirs,
                   "last_window_loss_ours": mean(ours[s] for s in cut[-1]), "last_window_loss_pytorch": [mean(r[s] for s in cut[-1]) for r in runs]})
    return result


def sentence(r):
    if not r["finite"]:
        return f"curves: DIFFER: a loss is NaN or infinite within {r['steps']} steps"
    return (f"curves: {'agree' if r['agrees'] else 'DIFFER'} over {r['steps']} steps: mean difference of ours from PyTorch {r['distance_ours']:.2g}, of PyTorch from itself "
            f"{r['distance_pytorch']:.2g} ({r['runs']} runs); ratio over windows {r['distance_ratio']:.2f} (limit {r['distance_limit']:g}), drift "
            f"{r['drift_ratio']:.2f} (limit {r['drift_limit']:g}); last loss {r['last_window_loss_ours']:.4f} and "
            + ", ".join(f"{x:.4f}" for x in r["last_window_loss_pytorch"]))


def path_of(points, colour, width):
    return f'<path fill="none" stroke="{colour}" stroke-width="{width}" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + '"/>'


def draw(curves, r, title):
    """SVG: the losses above each other; below them |difference| by window, as powers of ten."""
    n, left, width = r["steps"], 60, 620
    finite = [x for curve in curves for x in curve if math.isfinite(x)] or [1.0]
    low, high = min(finite), max(finite)
    span = high - low or 1.0
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 520" font-family="sans-serif">', '<rect width="700" height="520" fill="#ffffff"/>']

    def text(x, y, words, anchor="start", colour="#555555", size=12):
        out.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{words}</text>')

    text(8, 14, title.replace("&", "&amp;").replace("<", "&lt;"), size=9)
    for k in range(5):
        value = low + span * k / 4
        text(left - 8, 284 - 250 * k / 4, f"{value:.2f}", "end")
    for i, curve in reversed(list(enumerate(curves))):
        points = [(left + width * s / n, 280 - 250 * (x - low) / span) for s, x in enumerate(curve) if math.isfinite(x)]
        out.append(path_of(points, COLOURS[min(i, len(COLOURS) - 1)], 1.5 if i == 0 else 1))
        text(left + width, 40 + 14 * i, "ours" if i == 0 else f"PyTorch, run {i - 1}", "end", COLOURS[min(i, len(COLOURS) - 1)])
    if r["finite"]:
        kinds = (("window_distance_ours", "|ours - PyTorch|", COLOURS[0]), ("window_distance_pytorch", "|PyTorch - PyTorch|", COLOURS[2]))
        logs = {key: [math.log10(max(x, 2.0**-24)) for x in r[key]] for key, _, _ in kinds}
        bottom, top = math.floor(min(map(min, logs.values()))), math.ceil(max(map(max, logs.values())))
        for k in range(bottom, top + 1):
            text(left - 8, 484 - 160 * (k - bottom) / max(1, top - bottom), f"1e{k}", "end")
        for i, (key, name, colour) in enumerate(kinds):
            out.append(path_of([(left + width * s / n, 480 - 160 * (x - bottom) / max(1, top - bottom)) for s, x in zip(r["window_last_step"], logs[key])], colour, 1.5))
            text(left + width, 460 + 14 * i, name, "end", colour)
    for k in range(5):
        text(left + width * k / 4, 502, str(n * k // 4), "middle")
    text(left + width / 2, 516, "step; above: training loss, below: mean difference of it in a window", "middle")
    return "\n".join(out + ["</svg>\n"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--title", default="")
    parser.add_argument("curves", nargs="+")
    o = parser.parse_args()
    if len(o.curves) < 3:
        parser.error("expected our curve and two of PyTorch or more")
    curves = [read_curve(path) for path in o.curves]
    n = min(map(len, curves))
    if n < LEAST_STEPS:
        raise NoCurve(f"the shortest curve has {n} steps, expected {LEAST_STEPS} or more")
    losses = [[loss for loss, _ in curve[:n]] for curve in curves]
    r = compare(losses[0], losses[1:])
    r["title"] = o.title
    os.makedirs(o.out, exist_ok=True)
    names = ["ours"] + [f"pytorch{k}" for k in range(len(curves) - 1)]
    with open(os.path.join(o.out, "curves.tsv"), "w", encoding="utf-8") as f:
        print("step", *(f"{name}_{what}" for name in names for what in ("loss", "norm")), sep="\t", file=f)
        for s in range(max(map(len, curves))):
            print(s + 1, *(f"{x:.9g}" for curve in curves for x in (curve[s] if s < len(curve) else (math.nan, math.nan))), sep="\t", file=f)
    with open(os.path.join(o.out, "curves.json"), "w", encoding="utf-8") as f:
        json.dump(r, f, indent=1)
        f.write("\n")
    with open(os.path.join(o.out, "curves.svg"), "w", encoding="utf-8") as f:
        f.write(draw(losses, r, o.title))
    print(sentence(r))
    return 0 if r["agrees"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (NoCurve, OSError) as e:
        print(f"curve_compare: {e}", file=sys.stderr)
        sys.exit(2)
