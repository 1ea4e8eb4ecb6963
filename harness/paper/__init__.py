"""Zhang et al. 2024 (arXiv 2402.16788) claim by claim: its models, theory and figures."""
