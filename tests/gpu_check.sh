#!/usr/bin/env bash
# The first ten minutes on a GPU: does all of it work, and how fast.  bash tests/gpu_check.sh RESULTS [--tiny] [--device cpu]
#
# Results go to the folder RESULTS: a .txt for each step, .json of the benches, steps.txt with the exit status and the seconds of each. A step that
# fails or takes too long is noted, and the next one's turn comes. Assumes torch 2.11 or later, requirements.txt, pytest and pytest-xdist; no network. The rows of the
# reference need diffusers, peft and transformers (pip install -r tests/requirements.txt, or their wheels from a folder); without them they are left out.
# --tiny --device cpu: a dry run anywhere.
set -u
out=${1:?name a folder for the results}; shift
tiny="" device=cuda
while [ $# -gt 0 ]; do case $1 in --tiny) tiny=--tiny;; --device) device=$2; shift;; *) echo "unknown $1"; exit 2;; esac; shift; done
mkdir -p "$out"; out=$(cd "$out" && pwd); cd "$(dirname "$0")/.."; : > "$out/steps.txt"
python=${PYTHON:-python}

step() {    # name, seconds at most, command
    local name=$1 most=$2 start=$SECONDS; shift 2
    [ $device = cpu ] && most=$((10 * most))
    timeout "$most" "$@" > "$out/$name.txt" 2>&1
    echo "$name: exit $?, $((SECONDS - start)) s" | tee -a "$out/steps.txt"
}
bench() { local name=$1 most=$2; shift 2; step "$name" "$most" $python tests/bench.py "$@" $tiny --device $device --json "$out/$name.json"; }
repeat=7 side="" large="--side 512" one=0.5b-1step many=0.5b half="float16 bfloat16"
[ $device = cpu ] && half=""        # CPUs take minutes for a picture in half
[ -n "$tiny" ] && repeat=1 side="--side 16" large="--side 32" one=tiny many=tiny

. "${STEPS:-tests/gpu_check_first.sh}"
