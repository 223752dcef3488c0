#!/bin/sh
# sh experiments/rlvr/three.sh SEED ARM OUT: the start of a seed, then ARM from it: `together`, `alone` (three runs),
# `ahead` (together, with rollouts a batch ahead), or `after`: a few demonstrations first, then more epochs of these or
# reinforcement learning. OUT gets the metrics of each run. A core or two, 6 minutes.
set -eu
seed=$1 arm=$2 out=$3
work=$(mktemp -d)
orogen="${OROGEN:-orogen}"
python experiments/rlvr/corpus.py "$work/tasks.jsonl" experiments/rlvr/three.gin
$orogen train --gin_file gin_configs/posttrain/rl_toy_start.gin --run "$work/start" \
    --gin_bindings "DataConfig.corpus = '$work/tasks.jsonl'" --gin_bindings "TrainConfig.seed = $seed"

rl() { # NAME GIN_FILE [BINDING]...
    name=$1 file=$2; shift 2
    $orogen rl --gin_file "$file" --checkpoint "$work/${from:-start}" --run "$work/$name" \
        --gin_bindings "TrainConfig.seed = $seed" "$@"
    cp "$work/$name/metrics.jsonl" "$out/$arm-$name-$seed.jsonl"
}

supervised() { # NAME FROM STEPS
    $orogen train --gin_file gin_configs/posttrain/rl_toy_start.gin --checkpoint "$work/$2" --run "$work/$1" \
        --gin_bindings "DataConfig.corpus = '$work/right.jsonl'" --gin_bindings "TrainConfig.seed = $seed" \
        --gin_bindings "TrainConfig.steps = $3" --gin_bindings "TrainConfig.batch_size = 64" \
        --gin_bindings "TrainConfig.evaluate_every = $3" --gin_bindings "TrainConfig.checkpoint_every = $3" \
        --gin_bindings "OptimizerConfig.learning_rate = 1e-3" \
        --gin_bindings "DataConfig.heldout_fraction = 0.1"
}

if [ "$arm" = after ]; then
    python experiments/rlvr/corpus.py "$work/right.jsonl" experiments/rlvr/three.gin 24
    supervised first start 100
    supervised more first 650
    # One step that changes nothing scores a model on all held-out tasks, as the runs score themselves.
    for one in first more; do
        $orogen rl --gin_file experiments/rlvr/three.gin --checkpoint "$work/$one" --run "$work/score-$one" \
            --gin_bindings "TrainConfig.seed = $seed" --gin_bindings 'TrainConfig.steps = 1' \
            --gin_bindings 'OptimizerConfig.learning_rate = 1e-12' --gin_bindings 'OptimizerConfig.warmup_steps = 0'
        cp "$work/score-$one/metrics.jsonl" "$out/$arm-$one-$seed.jsonl"
    done
    from=first rl three experiments/rlvr/three.gin
elif [ "$arm" = together ]; then
    rl three experiments/rlvr/three.gin
elif [ "$arm" = ahead ]; then
    rl three experiments/rlvr/three.gin --gin_bindings 'RLConfig.staleness = 1'
else
    for one in largest counting addition; do
        # What nothing reads is refused: the other environments go.
        sed -E "/^(largest|counting|addition)\//{/^$one\//!d}" experiments/rlvr/three.gin > "$work/$one.gin"
        rl "$one" "$work/$one.gin" --gin_bindings "RLConfig.environments = (@$one/EnvironmentConfig(),)" \
            --gin_bindings 'RLConfig.prompts = 12' --gin_bindings 'TrainConfig.batch_size = 48'
    done
fi
rm -r "$work"
