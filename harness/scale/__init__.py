"""Past one process: a campaign over workers or a cluster, one spectrum over many devices."""
