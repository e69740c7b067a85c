# lazyrun: `make demo` shows it, `make test` tests it. Both install what is missing with apt on Debian and otherwise
# say exactly what to install. Both need root: they mount filesystems and make network namespaces.

CARGO ?= cargo
T ?= 600
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin

.PHONY: build release demo test lint fmt deny deps install-deps fuzz bench bench-warm bench-cold bench-start bench-micro

build:
	$(CARGO) build --workspace

release:
	$(CARGO) build --release

demo: ROUNDS ?= 1
demo:
	@tests/tools/deps.sh run
	$(CARGO) build --release
	@# Where the program was put is cargo's to say: CARGO_TARGET_DIR and its configuration may move it.
	$(CARGO) run --quiet --release -- demo --rounds $(ROUNDS)

test:
	@tests/tools/deps.sh test
	$(CARGO) test --workspace

lint:
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

fmt:
	$(CARGO) fmt --all

deny:
	tests/tools/cargo-deny.sh check --hide-inclusion-graph bans licenses sources

install-deps deps:
	tests/tools/deps.sh all

# Figures: medians of interleaved rounds, ratios against the reference in the same run. Each takes minutes and
# wants an otherwise idle machine.
bench: bench-micro bench-warm bench-cold bench-start

bench-warm:
	@tests/tools/deps.sh all
	$(CARGO) bench --bench warm

bench-cold:
	@tests/tools/deps.sh test
	$(CARGO) bench --bench cold_start

bench-start:
	@tests/tools/deps.sh test
	$(CARGO) bench --bench start

bench-micro:
	$(CARGO) bench --bench micro

# Every fuzz target for T seconds each; needs cargo-fuzz and a nightly toolchain (or RUSTC_BOOTSTRAP=1).
fuzz:
	cd fuzz && for target in $$($(CARGO) fuzz list); do \
	  $(CARGO) fuzz run --sanitizer none $$target -- -max_total_time=$(T) || exit 1; done
