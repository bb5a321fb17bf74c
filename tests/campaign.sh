#!/usr/bin/env bash
# All tiny stages in one run by minutes, three processes beside each other.  bash tests/campaign.sh OUT PHOTOS [--minutes 9] [--device cuda] [--dry]
#
# The same command goes on where it was stopped. A stage is given a share of the minutes: its first steps measure how many it can do, and its learning
# rate's schedule is made for those. OUT gets a folder for each stage, NAME.txt with what it said, stages.txt with seconds, steps and crops a second
# of each, and in results/ the example by the three last models, measured. The autoencoder is the embedded one, since all latents are its.
# On a GPU batches are large, as ../shared/specs/gpu.md plans; elsewhere they are the presets'. --dry: seconds instead of minutes, to see that all works.
set -u
out=${1:?name a folder for the results} data=${2:?name a folder of photos}; shift 2
minutes=9 device=cuda unit=60 first=30
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=$2; shift;;
        --device) device=$2; shift;;
        --dry) unit=1 first=2;;
        *) echo "unknown $1"; exit 2;;
    esac
    shift
done
mkdir -p "$out"; out=$(cd "$out" && pwd); data=$(cd "$data" && pwd); cd "$(dirname "$0")/.."
python=${PYTHON:-python}

train() {   # script, stage, steps, flags
    local script=$1 stage=$2 steps=$3; shift 3
    $python "train_$script.py" --preset tiny --stage "$stage" --data "$data" --out "$out/$stage" --device "$device" --steps "$steps" \
        --save-every 1000000 --log-every 10 "$@" >> "$out/$stage.txt" 2>&1
}

rate() {    # of steps a second, by the newest row of a stage's log
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i }
             NR > 2 { steps = $column["step"] - before; seconds = $column["seconds"] }
             { before = $column["step"] }
             END { print steps / seconds }' "$out/$1/log.csv"
}

stage() {   # share of 9 minutes, batch on a GPU, learning rate there, script, stage, flags
    local share=$1 batch=$2 lr=$3 script=$4 name=$5 start=$SECONDS steps large=""; shift 5
    [ -e "$out/$name/done" ] && return
    [ "$device" != cpu ] && large="--batch-size $batch --lr $lr --branches-per $((batch / 8))"
    if [ ! -e "$out/$name/steps" ]; then
        train "$script" "$name" $first $large "$@" || return
        # what is left of its time, less what such a start takes again
        steps=$(awk -v rate="$(rate "$name")" -v most="$(awk "BEGIN { print $share / 9 * $minutes * $unit }")" -v spent=$((SECONDS - start)) -v first=$first \
            'BEGIN { more = int((most - 2 * spent) * rate); print first + (more > 1 ? more : 1) }')
        echo "$steps" > "$out/$name/steps"
    fi
    steps=$(cat "$out/$name/steps")
    train "$script" "$name" "$steps" $large "$@" || return
    batch=$(grep -o 'batch [0-9]*' "$out/$name.txt" | tail -1 | cut -d' ' -f2)
    echo "$name: $((SECONDS - start)) s, $steps steps, $(awk "BEGIN { print $(rate "$name") * $batch }") crops a second" | tee -a "$out/stages.txt"
    touch "$out/$name/done"
}

vosr() {
    stage 5.6 256 1.5e-3 vosr flow --init vosr-tiny &&
    stage 0.6 128 2e-4 vosr distill --init "$out/flow" &&
    stage 1.6 256 2e-3 vosr decoder --init "$out/distill"
}

s3diff() {
    stage 2.4 512 1e-3 s3diff prior &&
    stage 0.8 64 1e-3 s3diff estimator --init "$out/prior" &&
    stage 4.6 256 2e-3 s3diff adapters --init "$out/estimator"
}

gramsr() {
    until [ -e "$out/prior/done" ]; do      # of the process beside this one
        kill -0 "$1" 2> /dev/null || return
        sleep 1
    done
    stage 3.8 256 2e-3 gramsr pixel --init "$out/prior" &&
    stage 0.9 256 1e-3 gramsr semantic --init "$out/pixel" &&
    stage 0.9 256 1e-3 gramsr texture --init "$out/semantic"
}

stop() {    # trainings save first
    for process in $prior $others; do pkill -TERM -P "$process"; done
}
trap stop INT TERM
s3diff & prior=$!
vosr & others=$!
gramsr $prior & others="$others $!"
failed=0
for process in $prior $others; do wait "$process" || failed=1; done
wait
for name in decoder adapters texture; do
    [ -e "$out/$name/done" ] || { failed=1; echo "$name: not done, see $out/*.txt"; continue; }
    $python sample.py assets/example.png --ref assets/example_hq.png --model "$out/$name" --device "$device" --out "$out/results/$name" \
        > "$out/results-$name.txt" 2>&1 || failed=1
    grep average "$out/results-$name.txt" | sed "s/^/$name: /" | tee -a "$out/stages.txt"
done
exit $failed
