#!/bin/sh
# sh experiments/rlvr/three.sh SEED ARM OUT: the start of a seed, then ARM, `together` or `alone` (three runs), from it.
# OUT gets start.jsonl and the metrics of each run. A core, 6 minutes.
set -eu
seed=$1 arm=$2 out=$3
work=$(mktemp -d)
orogen="${OROGEN:-orogen}"
python experiments/rlvr/corpus.py "$work/tasks.jsonl" experiments/rlvr/three.gin
$orogen train --gin_file gin_configs/posttrain/rl_toy_start.gin --run "$work/start" \
    --gin_bindings "DataConfig.corpus = '$work/tasks.jsonl'" --gin_bindings "TrainConfig.seed = $seed"

rl() { # NAME GIN_FILE [BINDING]...
    name=$1 file=$2; shift 2
    $orogen rl --gin_file "$file" --checkpoint "$work/start" --run "$work/$name" \
        --gin_bindings "TrainConfig.seed = $seed" "$@"
    cp "$work/$name/metrics.jsonl" "$out/$arm-$name-$seed.jsonl"
}

if [ "$arm" = together ]; then
    rl three experiments/rlvr/three.gin
else
    for one in largest counting addition; do
        # What nothing reads is refused: the other environments go.
        sed -E "/^(largest|counting|addition)\//{/^$one\//!d}" experiments/rlvr/three.gin > "$work/$one.gin"
        rl "$one" "$work/$one.gin" --gin_bindings "RLConfig.environments = (@$one/EnvironmentConfig(),)" \
            --gin_bindings 'RLConfig.prompts = 12' --gin_bindings 'TrainConfig.batch_size = 48'
    done
fi
rm -r "$work"
