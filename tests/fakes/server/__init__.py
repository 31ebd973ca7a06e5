"""The parts of the stand-in for llama-server, which imitates build b11434 as it is seen from outside."""
