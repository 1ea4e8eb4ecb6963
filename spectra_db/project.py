"""Where the project is published: card, pages, README, `publish`, citations take it from here."""

from __future__ import annotations

# Placeholders until there is one: OWNER/NAME is no dataset.
DATASET = "OWNER/NAME"
IS_PLACEHOLDER = DATASET == "OWNER/NAME"

# Where the pages of `harness site` are served, such as https://host/path: links to them show their
# picture by this address. Empty until they are.
SITE = ""

NAME, TITLE = "hessian-spectra", "Hessian Spectra"
AUTHORS, YEAR = "The Hessian Spectra maintainers", 2026
PAPER = "arXiv:2402.16788"
