"""Entries that were submitted, one file each; `harness add-model` writes them."""
