"""What deploy/ ships, in use."""
