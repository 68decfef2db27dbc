#!/usr/bin/env bash
# The quick start over three seeds: with no rules for its routers, with a balancing loss, and with bias updates. Prints the
# validation loss of each run, and how evenly its model spreads a text that it was not trained on (lightning-ep routing).
#
#   benchmarks/balance.sh runs/balance                  # 3 minutes a run on 2 quiet cores
#   JOBS=9 benchmarks/balance.sh runs/balance --trainer.accelerator gpu --trainer.precision bf16-mixed
#
# One process with the batches of two: what is trained is the same on any layout.
set -euo pipefail
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)"
folder="$(realpath -m "$1")"
mkdir -p "$folder"
cd "$folder"
python -m lightning_ep prepare quickstart >prepared.txt 2>&1 # once, before several runs look for it
cat "$(python -c "import torch.nn.modules as modules; print(modules.__path__[0])")"/*.py | head -c 40000 >held_out.txt || true

one() { # one NAME SEED RULES OPTIONS...
    mkdir -p "$1-$2"
    cd "$1-$2"
    python -m lightning_ep fit --config quickstart --seed_everything "$2" --trainer.devices 1 --trainer.strategy.init_args.ep 1 \
        --data.batch_size 8 --model.router "$3" "${@:4}" >log.txt 2>&1
    python -m lightning_ep routing runs/quickstart/checkpoints/last.ckpt ../held_out.txt >routing.txt 2>&1
    awk -F, -v run="$1, seed $2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "val/loss") c = i; next } $c != "" { loss = $c }
        END { print run ": validation loss " loss }' runs/quickstart/version_0/metrics.csv
    grep "max violation, mean\|straggler\|without a token" routing.txt
}

for seed in ${SEEDS:-1 2 3}; do
    while read -r name rules; do
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n; done
        (one "$name" "$seed" "$rules" "${@:2}" >"$name-$seed.txt") &
    done <<'RULES'
none null
loss [{class_path: lightning_ep.routing.BalancingLoss, init_args: {coefficient: 0.01}}]
biases [{class_path: lightning_ep.routing.BiasUpdates, init_args: {rate: 0.01}}]
RULES
done
wait
cat ./*-*.txt
