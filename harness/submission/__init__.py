"""What comes in from others, and whether it can be trusted."""
