PYTHON ?= python
# Nothing here needs a network: weights and data come with the packages.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo lint check test test-gpu fix bench bench-communication bench-digits bench-digits-rounds bench-families bench-iteration bench-ocr bench-rewards bench-rollout bench-rounds bench-scaling docs clean

demo:  ## train the built-in digits model on the CPU
	unigrpo fit --config configs/digits.yaml

lint:  ## format, lint, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy -n 2

check: lint  ## what every commit passes: lint, fast tests, doctests, import direction
	$(PYTHON) -m pytest

test: lint  ## everything that runs on a CPU, slow tests included, in two processes
	$(PYTHON) -m pytest -m "not gpu" -n 2 --dist loadfile

test-gpu:  ## skips cleanly where there is none
	$(PYTHON) -m pytest -m gpu

fix:  ## format, and mend what ruff can mend
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: bench-digits bench-digits-rounds bench-families bench-iteration bench-ocr bench-rewards bench-rollout bench-rounds bench-communication bench-scaling

bench-communication:  ## bytes between ranks, counted over gloo on 2 and 4 processes
	$(PYTHON) -m benchmarks.communication --out benchmarks/results/communication.json

bench-digits:
	$(PYTHON) benchmarks/digits.py

bench-digits-rounds:  ## two rounds against one from the same base; half an hour of one core
	$(PYTHON) -m benchmarks.digits_rounds

bench-families:  ## tiny models of other families learn the digits; 15 minutes on two cores
	$(PYTHON) -m benchmarks.families

bench-iteration:
	$(PYTHON) benchmarks/iteration.py

bench-ocr:  ## a policy learns to write from an OCR engine alone; 8 minutes of one core
	$(PYTHON) -m benchmarks.ocr

bench-rewards:  ## rewards over the network: beside the rollout, and when the service fails; 3 minutes on two cores
	$(PYTHON) -m benchmarks.rewards --out benchmarks/results/rewards.json

bench-rollout:
	$(PYTHON) benchmarks/rollout.py

bench-rounds:  ## one, two and three rounds: caches extended or built anew, one packed pass or several; about 5 minutes of one core
	$(PYTHON) -m benchmarks.rounds --out benchmarks/results/rounds.json

bench-scaling:  ## bounds for large models, computed
	$(PYTHON) benchmarks/scaling.py --out benchmarks/results/scaling.json

docs:  ## run the examples in the pages and build the site, every link checked (build/site/index.html)
	$(PYTHON) -m pytest -m "not gpu" --doctest-glob="*.md" README.md $(wildcard docs) lightning_unigrpo tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
