#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show, without hands: run it from the repository's root and keep its output.
# PYTHON names an interpreter that has torch with CUDA; the serving part needs onnxruntime-gpu and is skipped without it.
set -uo pipefail
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
STEP_LIMIT_S=${STEP_LIMIT_S:-14400} # the table of bit-classes opens 3,000 sessions; what it printed before is kept
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
exec > >(tee "$OUT/log.txt") 2>&1 # also where nobody kept the output
proved=() failed=() skipped=()
step() { # NAME COMMAND…: run it, show its output, note how it ended
    local name=$1; shift
    printf '\n== %s\n' "$name"
    if timeout --kill-after=60 "$STEP_LIMIT_S" "$@"; then proved+=("$name"); else failed+=("$name"); fi
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || { echo "no NVIDIA driver answers"; exit 1; }
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || exit 1

step "digits train on CUDA in bfloat16" "$PYTHON" -m foldserve train digits --set device=cuda --overwrite --out "$OUT/digits"
step "a run from CUDA exports, folds exactly and passes parity on the CPU" \
    "$PYTHON" -m foldserve export "$OUT/digits" --name digits --models "$OUT/models"
[ -n "${FOLDSERVE_DATA:-}" ] || skipped+=("MNIST and Fashion-MNIST on CUDA: FOLDSERVE_DATA names no folder")
step "training on CUDA: share of a bare loop, ResNet-50 too; MNIST and Fashion-MNIST over five seeds" \
    "$PYTHON" benchmarks/training.py --device cuda --seeds 5
if "$PYTHON" -c 'import onnxruntime, sys; sys.exit("CUDAExecutionProvider" not in onnxruntime.get_available_providers())'; then
    step "the committed model gives its golden answers on CUDA" "$PYTHON" - <<'PYTHON'
from pathlib import Path

from service.engine import choose_device, open_engine
from service.repository import Repository

model = Repository(Path("models"), open_engine).load("mnist", choose_device("cuda"))
print(f"{model.golden_images} golden images, largest difference {model.golden_difference:.2g}")
PYTHON
    step "the committed model, ResNet-18 and -50 certify on CUDA; what that costs" \
        "$PYTHON" -m benchmarks.independence --device cuda
    # The workspace is the service's own; TF32 stays open in the environment, for the table tries it on and off.
    step "bit-classes of batch sizes 1 to 64 on CUDA, by search, TF32 and layout" \
        env -u NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG=:16:8 "$PYTHON" -m benchmarks.independence --cuda-classes
    step "an exact model's float twin on CUDA: float32, TF32 and NHWC, under each algorithm search" \
        env -u NVIDIA_TF32_OVERRIDE "$PYTHON" -m benchmarks.exact --cuda --models "$OUT/models" --model digits
else
    skipped+=("serving, certifying, bit-classes and exact models on CUDA: this onnxruntime has no CUDA provider")
fi

printf '\nproved:\n'; printf '  %s\n' "${proved[@]:-nothing}"
printf 'skipped:\n'; printf '  %s\n' "${skipped[@]:-nothing}"
printf 'failed:\n'; printf '  %s\n' "${failed[@]:-nothing}"
exit "${#failed[@]}"
