"""The asv suite: cost, memory and accuracy of the estimator. `make bench` runs it."""
