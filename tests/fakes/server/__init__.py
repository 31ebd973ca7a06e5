"""The parts of the stand-in for llama-server. What it imitates is build b11434, seen through its interface."""
