"""Where units of work are executed: here, in worker processes, on a Ray cluster."""
