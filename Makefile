# lazyrun: `make demo` shows it, `make test` tests it. Both install what is missing with apt on Debian and otherwise
# say exactly what to install. Both need root: they mount filesystems and make network namespaces.

CARGO ?= cargo
T ?= 600
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin

.PHONY: build release demo test test-containerd lint fmt deny deps install-deps fuzz bench bench-warm bench-cold bench-start bench-index bench-view bench-spans bench-union bench-page-cache bench-fault bench-containerd bench-micro soak soak-fills soak-takeover evil proto memory manpages deb test-deb

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

# The snapshotter with versions of containerd that this machine does not have: those of Debian's trixie (1.7) and sid (2.x).
CONTAINERDS ?= trixie sid
test-containerd:
	@tests/tools/deps.sh test
	for suite in $(CONTAINERDS); do \
	  bin=$$(tests/tools/containerd.sh $$suite) || exit 1; \
	  echo "== $$($$bin/containerd --version)"; \
	  case $$suite in trixie) expected=1.7;; *) expected=2.1;; esac; \
	  LAZYRUN_EXPECT_CONTAINERD=$$expected PATH="$$bin:$$PATH" $(CARGO) test --test integration -- --include-ignored --skip root_snapshotter_scale \
	    root_snapshotter root_diffs root_containerd root_cri || exit 1; done

lint:
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

fmt:
	$(CARGO) fmt --all

deny:
	tests/tools/cargo-deny.sh check --hide-inclusion-graph bans licenses sources

# Compiles containerd's protocol anew; `tests/tools/proto.sh check` only compares.
proto:
	tests/tools/proto.sh write

install-deps deps:
	tests/tools/deps.sh all

# Figures: medians of interleaved rounds, ratios against the reference in the same run. Each takes minutes and
# wants an otherwise idle machine.
bench: bench-micro bench-index bench-view bench-spans bench-union bench-page-cache bench-fault bench-warm bench-cold bench-start

bench-warm:
	@tests/tools/deps.sh all
	$(CARGO) bench --bench warm

bench-cold:
	@tests/tools/deps.sh test
	$(CARGO) bench --bench cold_start

bench-start:
	@tests/tools/deps.sh test
	$(CARGO) bench --bench start

# LAYOUT=DIR[:TAG] takes an image of an OCI layout instead of one of this machine's files.
bench-index:
	$(CARGO) bench --bench index -- --erofs "$$(tests/tools/erofs-utils.sh)" $(if $(LAYOUT),--layout $(LAYOUT))

bench-spans:
	$(CARGO) bench --bench spans -- $(if $(LAYOUT),--layout $(LAYOUT))

bench-union:
	@tests/tools/deps.sh all
	$(CARGO) bench --bench union

# What a container's root has in the page cache for each byte read, by how layer files use it.
bench-page-cache:
	@tests/tools/deps.sh test
	$(CARGO) bench --bench page_cache

# A single fault beside what network and decoder ask of it.
bench-fault:
	@tests/tools/deps.sh test
	$(CARGO) bench --bench fault

# The snapshotter with 128 layers, and with 100 containers that start at once.
bench-containerd:
	@tests/tools/deps.sh test
	$(CARGO) test --test integration root_snapshotter_scale -- --ignored --nocapture --test-threads 1

bench-view:
	@tests/tools/deps.sh test
	$(CARGO) bench --bench view -- $(if $(LAYOUT),--layout $(LAYOUT))

bench-micro:
	$(CARGO) bench --bench micro --bench index_open

# Random operations on the writable union against kernel overlayfs, SEEDS sequences of them: longer than a test may be.
SEEDS ?= 500
soak:
	UNION_SEEDS=$(SEEDS) $(CARGO) test -p lazyrun-fs --test integration root_union_model -- --ignored

# The daemon is killed KILLS times while it fills and evicts; every span that survives is verified each time.
KILLS ?= 200
soak-fills:
	FILL_ROUNDS=$(KILLS) $(CARGO) test --test integration -- --ignored soak_fills

# The daemon is killed KILLS times under eight containers that read and work; with resent requests and with the journal.
soak-takeover: KILLS = 100
soak-takeover:
	TAKEOVER_KILLS=$(KILLS) $(CARGO) test --profile $(PROFILE) --test integration -- --ignored --nocapture --test-threads 1 soak_takeover

# Mixes of misbehaviours of a registry, SEEDS of them.
evil:
	EVIL_SEEDS=$(SEEDS) $(CARGO) test -p lazyrun-fetcher --test evil -- --ignored
	EVIL_SEEDS=$(SEEDS) $(CARGO) test --test integration root_evil -- --ignored

# Peak memory of the daemon while it hydrates an image of 1 GiB; 64 MiB is the bound.
memory:
	@tests/tools/deps.sh test
	$(CARGO) test --test integration gigabyte -- --ignored --nocapture

# Manual pages and completions of shells, in target/package.
PROFILE ?= release
manpages:
	$(CARGO) run --quiet --profile $(PROFILE) --example manpages -- target/package

# A package for Debian and Ubuntu, in target/debian.
deb: manpages
	tests/tools/cargo-deb.sh --profile $(PROFILE)

# Builds the package, looks at what is in it, and installs, uses, removes and purges it in a fresh Debian.
test-deb: deb
	@tests/tools/deps.sh all
	tests/tools/deb.sh

# Every fuzz target for T seconds each, with bounded memory and time for each input. Needs cargo-fuzz; what fuzzing asks
# of a nightly compiler works on the stable one with RUSTC_BOOTSTRAP. See fuzz/README.md.
FUZZ ?= tar gzip zstd index estargz chunked soci oci
SANITIZER ?= address
fuzz: export RUSTC_BOOTSTRAP = 1
fuzz:
	cd fuzz && $(CARGO) run --quiet --example seeds && $(CARGO) fuzz build --sanitizer $(SANITIZER)
	cd fuzz && for target in $(FUZZ); do \
	  echo "== $$target"; \
	  $(CARGO) fuzz run --sanitizer $(SANITIZER) $$target corpus/$$target $$(ls -d regress/$$target 2>/dev/null) -- \
	    -dict=dict/$$target -max_total_time=$(T) -max_len=20000 -timeout=10 \
	    -rss_limit_mb=512 -malloc_limit_mb=256 -print_final_stats=1 || exit 1; done
