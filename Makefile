.PHONY: quickstart test format

quickstart:
	scripts/quickstart.sh

test:
	scripts/test.sh

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
