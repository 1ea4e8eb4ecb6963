"""Whole entries: what is left to do, what it costs, and doing it, resumably."""
