"""Past one machine: one spectrum over many devices, a campaign over a cluster."""
