"""What a GPU is asked in its first minutes: are the numbers right, how fast, and as many as fit."""
