#!/bin/sh
# Regenerates guest/gen from guest/proto. Needs protoc; the two plugins are built at the versions in go.mod, into a directory that is
# removed again, so that the result depends on nothing installed.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
rm -rf gen
mkdir gen
PATH=$bin:$PATH protoc -I proto \
	--go_out=gen --go_opt=module=github.com/sluice-edge/sluice/guest/gen \
	--connect-go_out=gen --connect-go_opt=module=github.com/sluice-edge/sluice/guest/gen \
	process/process.proto filesystem/filesystem.proto
