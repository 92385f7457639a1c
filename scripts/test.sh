#!/usr/bin/env bash
# bash scripts/test.sh [pytest arguments]
#
# Lint and types; then, with transformers 5.9.0, the parity and conversion tests; then all tests with the newest
# transformers, first those that start several processes, then the others, two at a time; then VeOmni's own tests in its
# own environment. Arguments go to pytest; when they name tests, only those run, once with either version. Not zero when
# any part failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

old_transformers=5.9.0
old_venv=.venv-transformers-$old_transformers
# Their tests start processes of their own, up to eight, and notice a hang by the clock: one at a time.
several_processes=(tests/distributed tests/ecosystem tests/training)

failed=()
# part NAME COMMAND...: runs it to its end, and remembers a failure.
part() {
  local name=$1 status=0
  shift
  echo "== $name"
  "$@" || status=$?
  # pytest's 5: the arguments select no test of this part.
  if [[ $status == 5 && $selective == 1 ]]; then status=0; fi
  if [[ $status != 0 ]]; then failed+=("$name"); fi
}

# The second environment sees the first one's packages and holds only those that differ.
make_old_environment() {
  if [[ ! -x $old_venv/bin/python ]]; then "$python" -m venv "$old_venv"; fi
  local shared own
  shared=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  own=$("$old_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "import site; site.addsitedir('$shared')" >"$own/shared.pth"
  install "$old_venv/bin/python" "transformers==$old_transformers" 'tokenizers==0.22.2' 'huggingface_hub>=1,<2'
}

# Where no package index has VeOmni, this says so and fails nothing; an environment that is made and does not work fails.
test_veomni() {
  local status=0
  bash scripts/veomni_env.sh "$python" || status=$?
  if [[ $status == 75 ]]; then
    echo "NOT RUN: VeOmni could not be installed here" >&2
    return 0
  fi
  if [[ $status != 0 ]]; then return "$status"; fi
  .venv-veomni/bin/python -m pytest tests/ecosystem/test_veomni.py "$@"
}

named_tests=0
for argument in "$@"; do
  if [[ -e ${argument%%::*} ]]; then named_tests=1; fi
done
selective=$(($# > 0))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

part 'ruff check' "$python" -m ruff check .
part 'ruff format' "$python" -m ruff format --check --quiet .
part 'mypy' "$python" -m mypy
make_old_environment
if [[ $named_tests == 1 ]]; then
  part "transformers $old_transformers" "$old_venv/bin/python" -m pytest "$@"
  part 'newest transformers' "$python" -m pytest "$@"
else
  part "transformers $old_transformers" "$old_venv/bin/python" -m pytest -n 2 tests/parity tests/conversion "$@"
  part 'newest transformers, several processes' "$python" -m pytest "${several_processes[@]}" "$@"
  part 'newest transformers' "$python" -m pytest -n 2 "${several_processes[@]/#/--ignore=}" "$@"
  part 'VeOmni' test_veomni "$@"
fi

if [[ ${#failed[@]} != 0 ]]; then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
