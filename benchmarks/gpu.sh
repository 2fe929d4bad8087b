#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show, without hands: run it from the repository's root and keep its output.
#
#   benchmarks/gpu.sh                 every part, one after another
#   benchmarks/gpu.sh mnist fashion   some of them; each ends within PART_LIMIT_S
#   benchmarks/gpu.sh --list          the parts
#
# PYTHON names an interpreter that has torch with CUDA; serving needs onnxruntime-gpu and is skipped without it.
# FOLDSERVE_DATA names the folder of MNIST and Fashion-MNIST.
set -uo pipefail
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
PART_LIMIT_S=${PART_LIMIT_S:-540} # what a command printed before it was ended is kept
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
proved=() failed=() skipped=()

parts() {
    cat <<'TEXT'
train      digits train in bfloat16 and in float16; the run exports, folds exactly and passes parity on the CPU
exactness  a killed run goes on; deterministic = true; a compiled run beside one that is not
processes  torchrun: one process, and four or two (on a GPU each; two share it where there is one), as one process alone
share      images/s of small_cnn as a share of a bare loop, compiled and not
resnet     the same for ResNet-50 on synthetic 224² images
mnist      MNIST to 99.4 % in 5 s, five seeds
fashion    Fashion-MNIST to 94 % in 20 s, five seeds
eager      both again, not compiled
certify    golden answers on CUDA; the committed model, ResNet-18 and -50 certify
exact      an exact model's float twin: float32, TF32 and NHWC, under each algorithm search
classes    bit-classes of batch sizes 1 to 64, by search, TF32 and layout (3,000 sessions: set PART_LIMIT_S=14400)
TEXT
}

step() { # NAME COMMAND…: run it, show its output, note how it ended
    local name=$1 started=$SECONDS; shift
    printf '\n== %s\n' "$name"
    local left=$((PART_LIMIT_S - SECONDS + part_started))
    if timeout --kill-after=20 "$((left > 1 ? left : 1))" "$@"; then proved+=("$name"); else failed+=("$name"); fi
    printf -- '-- %d s\n' "$((SECONDS - started))"
}

has_data() { # NAME: or note that it is skipped
    [ -n "${FOLDSERVE_DATA:-}" ] && return
    skipped+=("$1: FOLDSERVE_DATA names no folder")
    return 1
}

has_provider() { # NAME: or note that it is skipped
    "$PYTHON" -c 'import onnxruntime, sys; sys.exit("CUDAExecutionProvider" not in onnxruntime.get_available_providers())' && return
    skipped+=("$1: this onnxruntime has no CUDA provider")
    return 1
}

digits() { # a run in bfloat16, and its artifact, which `exact` reads too
    step "digits train on CUDA in bfloat16" "$PYTHON" -m foldserve train digits --set device=cuda --overwrite --out "$OUT/digits"
    step "a run from CUDA exports, folds exactly and passes parity on the CPU" \
        "$PYTHON" -m foldserve export "$OUT/digits" --name digits --models "$OUT/models"
}

part_train() {
    digits
    step "digits train on CUDA in float16, with averaged weights, accumulated and clipped" \
        "$PYTHON" -m foldserve train digits --set device=cuda --set precision=float16 --set weight_ema=0.9 \
        --set accumulate=2 --set clip_norm=1 --overwrite --out "$OUT/float16"
}

part_exactness() {
    step "a run on CUDA killed with SIGKILL goes on" "$PYTHON" benchmarks/training_cuda.py resume --device cuda
    step "deterministic = true on CUDA: the same bits, or a refusal that names the operation" \
        "$PYTHON" benchmarks/training_cuda.py deterministic --device cuda
    step "a compiled run on CUDA is one that is not, within rounding" \
        "$PYTHON" benchmarks/training_cuda.py compiled --device cuda
}

part_processes() {
    step "SyncBatchNorm and DDP under torchrun: as one process alone" \
        "$PYTHON" benchmarks/training_cuda.py processes --device cuda
}

part_share() {
    step "small_cnn: share of a bare loop" \
        "$PYTHON" benchmarks/training.py --device cuda --only share --networks small_cnn
}

part_resnet() {
    step "ResNet-50: share of a bare loop" \
        "$PYTHON" benchmarks/training.py --device cuda --only share --networks resnet50 --rounds 21
}

learn() { # NAME ARGUMENTS…
    local name=$1; shift
    has_data "$name" && step "$name" "$PYTHON" benchmarks/training.py --device cuda --only learn --seeds 5 "$@"
}

part_mnist() { learn "MNIST to 99.4 %" --presets mnist-fast; }
part_fashion() { learn "Fashion-MNIST to 94 %" --presets fashion-mnist-fast; }
part_eager() { learn "both, not compiled" --presets mnist-fast fashion-mnist-fast --compile off; }

part_certify() {
    has_provider "serving and certifying on CUDA" || return 0
    step "the committed model gives its golden answers on CUDA" "$PYTHON" - <<'PYTHON'
from pathlib import Path

from service.engine import choose_device, open_engine
from service.repository import Repository

model = Repository(Path("models"), open_engine).load("mnist", choose_device("cuda"))
print(f"{model.golden_images} golden images, largest difference {model.golden_difference:.2g}")
PYTHON
    step "the committed model, ResNet-18 and -50 certify on CUDA; what that costs" \
        "$PYTHON" -m benchmarks.independence --device cuda
}

part_exact() {
    has_provider "an exact model on CUDA" || return 0
    [ -d "$OUT/models/digits" ] || digits
    step "an exact model's float twin on CUDA: float32, TF32 and NHWC, under each algorithm search" \
        env -u NVIDIA_TF32_OVERRIDE "$PYTHON" -m benchmarks.exact --cuda --models "$OUT/models" --model digits
}

part_classes() {
    has_provider "bit-classes on CUDA" || return 0
    # The workspace is the service's own; TF32 stays open in the environment, for the table tries it on and off.
    step "bit-classes of batch sizes 1 to 64 on CUDA, by search, TF32 and layout" \
        env -u NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG=:16:8 "$PYTHON" -m benchmarks.independence --cuda-classes
}

if [ "${1:-}" = "--list" ]; then parts; exit 0; fi
known=$(parts | cut -d ' ' -f 1)
wanted=${*:-$known}
for part in $wanted; do
    grep -qx -- "$part" <<<"$known" || { echo "$part is no part; there are" $known >&2; exit 2; }
done
mkdir -p "$OUT"
exec > >(tee -a "$OUT/log.txt") 2>&1 # also where nobody kept the output; parts that ran before stay in it
log=$!
trap 'exec >&- 2>&-; wait "$log"' EXIT # or the last lines are lost where the machine is given back at once

printf '\n#### %s: %s\n' "$(date -u +%FT%TZ)" "$(echo $wanted)"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || { echo "no NVIDIA driver answers"; exit 1; }
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPUs", torch.cuda.device_count())' || exit 1
for part in $wanted; do part_started=$SECONDS; "part_$part"; done

printf '\nproved:\n'; printf '  %s\n' "${proved[@]:-nothing}"
printf 'skipped:\n'; printf '  %s\n' "${skipped[@]:-nothing}"
printf 'failed:\n'; printf '  %s\n' "${failed[@]:-nothing}"
exit "${#failed[@]}"
