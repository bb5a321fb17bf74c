#!/usr/bin/env bash
# All that the lecture trains, in its order: the plane, digits by all three systems and, if photos are given, the tiny systems on them.
#
#     bash tests/evening.sh OUT [PHOTOS] [--minutes 60] [--device cpu] [--dry]
#
# The same command goes on where it was stopped: a part that is done has a file OUT/NAME.done. OUT/evening.log has a line for each part with its
# seconds, OUT/NAME.txt what it said; tests/plane.py prints what we got in brackets. --minutes: for the photos, all stages beside each other
# (tests/campaign.sh). --dry: two steps of everything, in place of hours, to see that all works.
set -u
out=${1:?name a folder for the results}; shift
photos="" minutes=60 device=cpu dry=""
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=$2; shift;;
        --device) device=$2; shift;;
        --dry) dry=yes;;
        -*) echo "unknown $1" >&2; exit 2;;
        *) photos=$1;;
    esac
    shift
done
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
[ -z "$photos" ] || photos=$(cd "$photos" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
few=""
[ -z "$dry" ] || few="--steps 2"

part() {    # name, command: done once, its words to NAME.txt, its seconds to evening.log
    local name=$1 start=$SECONDS; shift
    [ -e "$out/$name.done" ] && return
    if ! "$@" >> "$out/$name.txt" 2>&1; then
        echo "$name: stopped, see $out/$name.txt" >&2
        tail -n 1 "$out/$name.txt" >&2
        exit 1
    fi
    echo "$name: $((SECONDS - start)) s" | tee -a "$out/evening.log"
    touch "$out/$name.done"
}

digits() {  # system, stage, flags
    local system=$1 stage=$2; shift 2
    part "digits-$stage" $python "train_$system.py" --preset letters --stage "$stage" --data digits --out "$out/$stage" --device "$device" $few "$@"
}

# ---- the plane, section 3
lessons=""
[ -z "$dry" ] || lessons=truth
part plane $python tests/plane.py $lessons

# ---- digits, section 4: VOSR, then S3Diff and GramSR around one prior
digits vosr flow
digits vosr distill --init "$out/flow"
digits s3diff prior
digits s3diff estimator --init "$out/prior"
digits s3diff adapters --init "$out/estimator"
digits gramsr pixel --init "$out/prior"
digits gramsr semantic --init "$out/pixel"
digits gramsr texture --init "$out/semantic"
part read $python tests/letters.py "$out/flow" "$out/distill"
part line $python -m models.support.glyphs 31415926 "$out/line.png"
part line-lq $python degrade.py "$out/line.png" "$out/pairs" --recipe letters
part line-sr $python sample.py "$out/pairs/lq" --ref "$out/pairs/hq" --model "$out/distill" --out "$out/line"

# ---- photos, section 8
if [ -n "$photos" ]; then
    part photos bash tests/campaign.sh "$out/photos" "$photos" --minutes "$minutes" --device "$device" ${dry:+--dry}
fi
echo "done: $out/evening.log"
