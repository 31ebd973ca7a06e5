"""The gateway: the one address that clients know, in front of all routers."""
