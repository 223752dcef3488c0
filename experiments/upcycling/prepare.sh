#!/usr/bin/env bash
# Trains the dense model and makes the mixtures of experts that the arms of study.gin begin with.
set -e
here=experiments/upcycling
orogen train --gin_file $here/dense.gin --run runs/upcycling/dense --resume
make() { orogen upcycle --checkpoint runs/upcycling/dense --gin_file "gin_configs/upcycle/$2.gin" --out "runs/upcycling/$1" "${@:3}"; }
make e8g1t2 e8g1t2
make e8g1t2-unscaled e8g1t2 --gin_bindings "UpcycleConfig.scale = 'none'"
make e8g1t2-softmax_topk e8g1t2 --gin_bindings "UpcycleConfig.router_score = 'softmax_topk'"
make e8g8t8 e8g8t8
make e8g8t8-random e8g8t8 --gin_bindings "UpcycleConfig.virtual_groups = False"
python $here/start.py runs/upcycling/*/
