#!/usr/bin/env bash
# bash scripts/veomni_env.sh [PYTHON]
#
# Makes .venv-veomni: VeOmni 0.1.12 with the versions it pins, for tests/ecosystem/test_veomni.py:
#
#     .venv-veomni/bin/python -m pytest tests/ecosystem/test_veomni.py
#
# It sees the packages of PYTHON's environment (default: python), torch among them, and holds only what differs and what
# VeOmni imports on a CPU: 430 MB, half a minute. Exit 75: it could not be installed; 1: it does not import.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:-python}
venv=.venv-veomni
if [[ ! -x $venv/bin/python ]]; then "$python" -m venv "$venv"; fi
shared=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$shared')" >"$own/shared.pth"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" 'transformers==5.9.0' 'tokenizers==0.22.2' 'huggingface_hub>=1,<2' 'torchdata>=0.8,<1' \
  'datasets>=2.20,<=2.21' || exit 75
# Without its dependencies: it asks for trackers, kernels and media tools that nothing here imports.
"${pip[@]}" --no-deps 'veomni==0.1.12' || exit 75
"$venv/bin/python" -c 'import veomni.data, veomni.models' >"$venv/import.log" 2>&1 || {
  cat "$venv/import.log" >&2
  exit 1
}
