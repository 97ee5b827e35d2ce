#!/usr/bin/env bash
# One machine of several: run this on each of them.
#
#   NODES=2 NODE=0 HEAD=10.0.0.1 deploy/torchrun/train.sh recipe.yaml    # on the first
#   NODES=2 NODE=1 HEAD=10.0.0.1 deploy/torchrun/train.sh recipe.yaml    # on the second
set -euo pipefail

NODES=${NODES:-1}                   # machines
NODE=${NODE:-0}                     # which of them this is, from 0
HEAD=${HEAD:-localhost}             # the first one's address, as the others see it
PORT=${PORT:-29500}                 # a free port there
PROCESSES=${PROCESSES:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}   # a machine
[ "$PROCESSES" -gt 0 ] || PROCESSES=1
RESTARTS=${RESTARTS:-3}             # how often all processes are started again when one dies
: "${FLEDGE_HOME:?set FLEDGE_HOME to a folder that all machines share}"
export FLEDGE_HOME
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # else processes that start again look for the addresses of dead ones

recipe=${1:?usage: train.sh RECIPE [fledge run flags]}
shift
exec torchrun \
  --nnodes "$NODES" --nproc-per-node "$PROCESSES" --node-rank "$NODE" \
  --rdzv-backend c10d --rdzv-id "fledge-$(basename "$recipe")" --rdzv-endpoint "$HEAD:$PORT" \
  --max-restarts "$RESTARTS" \
  -m fledge.cli.main run "$recipe" --processes "$((NODES * PROCESSES))" "$@"
