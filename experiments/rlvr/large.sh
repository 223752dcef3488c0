#!/bin/sh
# sh experiments/rlvr/large.sh SEED OUT [BINDING]...: a policy of 117 M parameters, a few demonstrations, and
# reinforcement learning on three environments together. OUT gets the metrics of each stage, and samples of the first
# and the last rollout. Each BINDING goes to every command. One GPU, five minutes.
set -eu
seed=$1 out=$2
shift 2
for one in "$@"; do
    set -- "$@" --gin_bindings "$one"
    shift
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
orogen="${OROGEN:-orogen}"
here=experiments/rlvr
mkdir -p "$out"
python $here/corpus.py "$work/tasks.jsonl" $here/large.gin
python $here/corpus.py "$work/right.jsonl" $here/large.gin 64,64,48
set -- "$@" --gin_bindings "TrainConfig.seed = $seed"

$orogen train --gin_file $here/large_start.gin --run "$work/start" "$@" \
    --gin_bindings "DataConfig.corpus = '$work/tasks.jsonl'"
$orogen train --gin_file $here/large_first.gin --checkpoint "$work/start" --run "$work/first" "$@" \
    --gin_bindings "DataConfig.corpus = '$work/right.jsonl'"
# The score compiles most of what the run then takes from the cache.
$orogen rl --gin_file $here/large_score.gin --checkpoint "$work/first" --run "$work/score" "$@"
$orogen rl --gin_file $here/large.gin --checkpoint "$work/first" --run "$work/rl" "$@"

for run in start first score rl; do
    cp "$work/$run/metrics.jsonl" "$out/large-$run-$seed.jsonl"
done
samples=$(ls "$work"/rl/rollouts/*.jsonl)
cat "$(echo "$samples" | head -n 1)" "$(echo "$samples" | tail -n 1)" > "$out/large-samples-$seed.jsonl"
