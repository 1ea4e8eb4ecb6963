"""Networks in plain torch, where no library has them at these sizes."""
