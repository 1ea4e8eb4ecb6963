"""What a folder of results says of an entry, and which version of it that is."""
