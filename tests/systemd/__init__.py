"""A systemd for tests."""
