.PHONY: quickstart test bench bench-quick format

quickstart:
	scripts/quickstart.sh

test:
	scripts/test.sh

bench:
	scripts/benchmark.sh

bench-quick:
	scripts/benchmark.sh --quick

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
