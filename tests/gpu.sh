#!/usr/bin/env bash
# Every check of the tests marked gpu, and one table to paste into an issue. No download; minutes on one GPU of 24 GB.
#   tests/gpu.sh              on the GPU          tests/gpu.sh cpu      the same code, at tiny size
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m pytest -q -m gpu --device "${1:-cuda}" tests/test_gpu.py
