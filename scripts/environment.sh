# Sourced by quickstart.sh and test.sh, in the checkout's root. Leaves `python`: the interpreter of the active virtual
# environment, else of .venv, with this package and its test extra installed. Everything that would land in the home
# folder or in /tmp goes to a scratch folder, which is removed at exit.

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/tmp"
export TMPDIR=$scratch/tmp XDG_CACHE_HOME=$scratch/cache HF_HOME=$scratch/huggingface MPLCONFIGDIR=$scratch/matplotlib
export TRITON_CACHE_DIR=$scratch/triton PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

find_python() {
  for candidate in python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$supported" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or 3.12 is needed and neither is on PATH" >&2
  return 1
}

# install PYTHON ARGUMENT...: pip install, skipped when the same arguments and setup.cfg were installed there before.
install() {
  local interpreter=$1 stamp key
  shift
  stamp=$("$interpreter" -c 'import sys; print(sys.prefix)')/.qwen3-vl-moe-veomni
  key=$(cat setup.cfg pyproject.toml <(echo "$PWD $*") | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then return; fi
  "$interpreter" -m pip install --quiet "$@"
  echo "$key" >"$stamp"
}

prefix=${VIRTUAL_ENV:-}
if [[ -z $prefix ]]; then
  prefix=$PWD/.venv
  if [[ ! -x $prefix/bin/python ]]; then
    base=$(find_python)
    echo "== making .venv with $("$base" --version), then installing: a few minutes, about 6 GB"
    "$base" -m venv "$prefix"
  fi
fi
python=$prefix/bin/python
if ! "$python" -c "$supported"; then
  echo "the virtual environment $prefix has $("$python" --version); Python 3.11 or 3.12 is needed" >&2
  exit 1
fi
install "$python" --editable '.[test]'
