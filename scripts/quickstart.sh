#!/usr/bin/env bash
# bash scripts/quickstart.sh
#
# Makes a small checkpoint in the published layout, converts it, loads it into this project's model, and shows that a photo
# and a video clip give what transformers gives. About two minutes once installed; writes to quickstart_out/ alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
"$python" scripts/quickstart.py quickstart_out
