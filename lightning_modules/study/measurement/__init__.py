"""How a truncation study measures: kernels and their truncations, evaluation, retraining, and the order of it all."""
