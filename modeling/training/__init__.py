"""Training from chat files to a checkpoint; `scripts/train.py` is its command line."""
