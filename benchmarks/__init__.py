"""What is measured of the code: asv's suite, and beside it the tools with a command each."""
