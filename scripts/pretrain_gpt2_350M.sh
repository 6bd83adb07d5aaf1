#!/usr/bin/env bash
# gpt2 350M from nothing: on one GPU as it is, on eight with --gpus 8; further train_gpt2 options win over the recipe's (pretrain.sh).
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh" gpt2_350M "$@"
