PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest/bin/python
OLD_READY := .venv-oldest/.ready

.PHONY: demo test test-slow test-oldest try-oldest lint gate campaign predictors bench bench-check bench-peers dashboard accuracy paper sweep leaderboard site clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable '.[test]'
	touch $@

# Trains the demo models, takes their spectra and shows them in build/demo/index.html.
demo: $(READY)
	$(BIN)/harness run --tier demo --out build/demo --jobs 2
	$(BIN)/harness site --source build/demo --out build/demo

# One thread per worker: the tests' models are too small to share. Each worker takes its tests in
# their order, so that a module's set-up is made once; who is done first takes over from the other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(READY)
	$(TESTS) -m 'not slow'

# Whole programs, killed and continued, in a browser, by several processes; intervals that cover.
test-slow: $(READY)
	$(TESTS) -m slow

# The lowest versions that pyproject allows; what tests/oldest.txt lacks, such as torch, is .venv's.
$(OLD_READY): tests/oldest.txt $(READY)
	$(BIN)/python -m venv --clear --without-pip .venv-oldest
	$(BIN)/python -m pip --python $(OLDEST) install --quiet --no-deps --no-compile -r tests/oldest.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(OLDEST) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	touch $@

# The suite's core on them: the store, the estimator, training, the command line.
test-oldest: $(OLD_READY)
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest --numprocesses 2 --dist worksteal tests/spectra_db tests/harness/estimator \
		tests/harness/tasks tests/harness/training tests/harness/cli/test_cli.py

# The command line alone on them.
try-oldest: $(OLD_READY)
	$(OLDEST) -m harness --help > /dev/null
	$(OLDEST) -m harness list > /dev/null

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A quick profile; `asv publish` makes the dashboard of what it keeps under .asv/results.
bench: $(READY)
	$(BIN)/asv machine --yes
	ASV_PYTHONPATH=$(CURDIR) $(BIN)/asv run --environment existing:$(BIN)/python --quick --show-stderr \
		--set-commit-hash $$(git rev-parse HEAD) --bench '^(accuracy|pieces|cost.(Step|Memory|Rebuilt))'

# Our products against the paper's algorithm and three libraries, by turns in one run.
bench-peers: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m benchmarks.peers

# What `make bench` kept of all commits, as pages: .asv/html/index.html.
dashboard: $(READY)
	$(BIN)/asv publish

# How far estimates are from the truth: docs/accuracy.md; about 40 minutes of one core.
accuracy: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m benchmarks.study

# The tables and figures of the paper from the release: docs/paper.md. One thread: what it computes
# is too small to share.
paper: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/harness paper

# The perceptrons of figure 5 with learning rates free downwards: docs/mlp-sweep.md. What is measured
# is not done again; from nothing about 15 minutes of one core.
sweep: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/harness paper sweep

# What the pages say of the release, and README of protocol 2.
leaderboard: $(READY)
	$(BIN)/harness leaderboard --docs docs/leaderboard.md
	$(VERDICT)

# The release as static pages; open build/site/index.html.
site: $(READY)
	$(BIN)/harness site --out build/site

# Fails if what the suite tracks deterministically got worse since BASE: operations, errors.
bench-check: $(READY)
	$(BIN)/asv machine --yes
	PYTHONPATH=. $(BIN)/python -m benchmarks.check $(BASE)

# Protocol 2's training runs and measures, on one core: about a day. What is there is not done again.
# Keeping freed memory takes a third off a step. Data: HARNESS_DATA_ROOT.
CAMPAIGN := spectra_db/campaign
VERDICT := $(BIN)/harness verdict --readme README.md --picture docs/verdict.png
ONE_CORE := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 OMP_NUM_THREADS=1
TRIALS := $(ONE_CORE) $(BIN)/harness run --only trial --device cpu --out $(CAMPAIGN)
GATE := softmax-balanced softmax-zipf cifar-resnet8 cifar-vit bpe-gpt

gate: $(READY)
	$(TRIALS) $(GATE)

campaign: gate
	$(TRIALS) --tier ranked
	$(TRIALS) --tier reference
	$(MAKE) predictors
	$(BIN)/harness verdict --source $(CAMPAIGN)

# Spectra of the ranked entries at initialisation, of three seeds and of the batch's halves, and
# what else may predict their speed-up; of the other entries of the gate a release asks for spectra.
predictors: $(READY)
	$(ONE_CORE) $(BIN)/harness run --only spectrum --device cpu --out $(CAMPAIGN) softmax-balanced softmax-zipf
	set -e; models=$$($(BIN)/python -c \
		"from harness.registry import entries; print(*(e.name for e in entries('ranked')))"); \
	for model in $$models; do \
		for seed in 1 2 3; do \
			$(ONE_CORE) $(BIN)/harness spectrum $$model --seed $$seed --batch-error --device cpu \
				--out $(CAMPAIGN); \
		done; \
		$(ONE_CORE) $(BIN)/harness predictors $$model --device cpu --out $(CAMPAIGN); \
	done

clean:
	rm -rf .venv .venv-oldest build
