"""From the tables to pages: no torch."""
