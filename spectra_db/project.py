"""Where the project is published: card, README, `publish` and citations take it from here."""

from __future__ import annotations

# Placeholders until there is one: OWNER/NAME is no dataset.
DATASET = "OWNER/NAME"
IS_PLACEHOLDER = DATASET == "OWNER/NAME"

NAME, TITLE = "hessian-spectra", "Hessian Spectra"
AUTHORS, YEAR = "The Hessian Spectra maintainers", 2026
PAPER = "arXiv:2402.16788"
