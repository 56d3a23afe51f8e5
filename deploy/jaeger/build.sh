#!/usr/bin/env bash
# Builds Jaeger's all-in-one server, the reference viewer of Quorate's traces,
# from its released Go module: build.sh OUTPUT. About 2.5 minutes cold on two
# cores; nothing is done when OUTPUT is there.
#
# `go install module/cmd@version` refuses a module with a replace directive, and
# Jaeger has one. So it is built as a dependency of a module of its own, which
# copies that directive and takes every hash from Jaeger's own go.sum.
set -euo pipefail

version=v1.76.0
output=${1:?usage: build.sh OUTPUT}
[ -x "$output" ] && exit 0
command -v go >/dev/null || { echo "building Jaeger needs Go on the PATH" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export GOFLAGS=-mod=mod GOWORK=off

module=github.com/jaegertracing/jaeger
source=$(go mod download -json "$module@$version" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p')
[ -n "$source" ] || { echo "cannot download $module@$version" >&2; exit 1; }

# Jaeger's own requirements and replacements, under another module name.
sed "s|^module .*|module quorate.invalid/jaeger-build|" "$source/go.mod" >go.mod
cp "$source/go.sum" go.sum
chmod u+w go.mod go.sum
go mod edit -require="$module@$version"
cat >tools.go <<'GO'
//go:build tools

package tools

import _ "github.com/jaegertracing/jaeger/cmd/all-in-one"
GO
mkdir -p "$(dirname "$output")"
go build -trimpath -ldflags='-s -w' -o "$output.building.$$" "$module/cmd/all-in-one"
mv "$output.building.$$" "$output"
