# Sluice. `make run` starts the whole system on this machine, `make test` runs every test; both install what they need.
.DEFAULT_GOAL := all
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

GO ?= go
export CGO_ENABLED := 0
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
BINARIES := sluice edge orchestrator guestd

GOTESTSUM := gotest.tools/gotestsum@v1.13.0
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
FUZZTIME ?= 20s
RUN_FLAGS ?=
BENCH_FLAGS ?=

.PHONY: all run test test-vm build lint race fuzz bench generate setup clean help

all: build lint test ## build, lint and test

run: build ## start everything on this machine: edge, node and store in one process (RUN_FLAGS="-domain … -machine …")
	@exec bin/sluice dev $(RUN_FLAGS)

test: setup build ## install what the tests need and run all of them
	$(GO) run $(GOTESTSUM) --format pkgname-and-test-fails -- -timeout 60m -count=1 ./...

test-vm: setup build ## only the tests of virtual machines: the fake hypervisor, and the real one where it can be had
	$(GO) run $(GOTESTSUM) --format testname -- -timeout 60m -count=1 ./sandboxd/vmm/... ./sandboxd/image/... ./internal/lab/...
	$(GO) run $(GOTESTSUM) --format testname -- -timeout 60m -count=1 -run 'VM|Real|Machine|Doctor|Diagnose' ./sandboxd ./internal/daemon ./test/sdk

build: ## build the four programs into bin/
	@mkdir -p bin
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(addprefix ./cmd/,$(BINARIES))

lint: ## gofmt, go vet and golangci-lint
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'run gofmt -w on these'; exit 1; }
	$(GO) vet ./...
	$(GO) run $(GOLANGCI) run ./...

race: setup ## run the tests with the race detector (needs a C compiler)
	CGO_ENABLED=1 $(GO) test -race -timeout 40m -count=1 ./...

fuzz: ## run every fuzz test for FUZZTIME
	@for pkg in $$($(GO) list ./...); do \
	  for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "== $$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$pkg; \
	  done; done

bench: build ## load the edge and the backend behind it alike, and print both (BENCH_FLAGS="-rate … -duration …")
	bin/sluice bench $(BENCH_FLAGS)

generate: ## regenerate code from openapi.yaml and the .proto files (needs protoc)
	$(GO) generate ./...

setup: ## install what the tests need: Debian packages (as root), the SDKs, and a kernel
	@.ci/setup

clean: ## remove what building and testing left in the tree
	rm -rf bin .build test/sdk/js/node_modules

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
