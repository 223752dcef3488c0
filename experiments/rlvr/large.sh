#!/bin/sh
# sh experiments/rlvr/large.sh SEED OUT: a policy of 117 M parameters, demonstrations, and reinforcement learning on three
# environments together. OUT gets the metrics. One GPU, five minutes.
set -eu
seed=$1 out=$2
work=$(mktemp -d)
orogen="${OROGEN:-orogen}"
seeded="TrainConfig.seed = $seed"
python experiments/rlvr/corpus.py "$work/tasks.jsonl" experiments/rlvr/three.gin
python experiments/rlvr/corpus.py "$work/right.jsonl" experiments/rlvr/three.gin 48
$orogen train --gin_file experiments/rlvr/large_start.gin --run "$work/start" --gin_bindings "$seeded" \
    --gin_bindings "DataConfig.corpus = '$work/tasks.jsonl'"
$orogen train --gin_file experiments/rlvr/large_start.gin --checkpoint "$work/start" --run "$work/first" \
    --gin_bindings "DataConfig.corpus = '$work/right.jsonl'" --gin_bindings "$seeded" \
    --gin_bindings 'DataConfig.heldout_fraction = 0.1'
# One step that changes nothing scores the policy on all held-out tasks, as the run scores itself.
$orogen rl --gin_file experiments/rlvr/large.gin --checkpoint "$work/first" --run "$work/score" --gin_bindings "$seeded" \
    --gin_bindings 'OptimizerConfig.learning_rate = 1e-12' --gin_bindings 'TrainConfig.steps = 1'
$orogen rl --gin_file experiments/rlvr/large.gin --checkpoint "$work/first" --run "$work/rl" --gin_bindings "$seeded"
for run in first score rl; do
    cp "$work/$run/metrics.jsonl" "$out/large-$run-$seed.jsonl"
done
rm -r "$work"
