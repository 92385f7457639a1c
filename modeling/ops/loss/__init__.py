"""Losses: the output head with its cross-entropy or log-probabilities in chunks, and the routers' load balancing."""

from modeling.ops.loss.cross_entropy import linear_cross_entropy, linear_log_probs
from modeling.ops.loss.load_balancing import load_balancing_loss_func

__all__ = ["linear_cross_entropy", "linear_log_probs", "load_balancing_loss_func"]
