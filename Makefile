# Every target runs from a clean checkout; tools are pinned in go.mod (go tool).
.DEFAULT_GOAL := build
.PHONY: setup build demo demo-down bench bench-consensus test lint race sim explore mutants fuzz proto clean

setup:
	@deploy/setup.sh

build:
	go build -o bin/ ./cmd/...

# Five regions on this machine, with a live workload. JAEGER=1: with Jaeger too.
demo: setup build
	@deploy/demo.sh

demo-down:
	@bin/paxosctl dev down

# Everything, in steps: what starts whole clusters has the machine to itself.
CLUSTER := ./test/cluster/...
test: setup build
	go test -timeout 10m $$(go list ./... | grep -v '/test/cluster')
	cd $(CONSENSUS) && go test -timeout 5m ./...
	go test -timeout 20m -p 1 $(CLUSTER)

# What the README and docs/benchmarks.md claim, beside PostgreSQL's own; SHORT=1: in four minutes.
bench: setup build
	go run ./test/bench

# Our consensus beside etcd's raft and hashicorp's, of a module of their own; SHORT=1: in four minutes.
CONSENSUS := test/consensus
bench-consensus:
	cd $(CONSENSUS) && go build -o ../../bin/bench-consensus . && exec ../../bin/bench-consensus

lint:
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$unformatted" || { echo "gofmt -w $$unformatted" >&2; exit 1; }
	go vet ./...
	go tool staticcheck ./...
	go mod tidy -diff
	cd $(CONSENSUS) && go vet ./... && go mod tidy -diff

# The packages where goroutines meet.
race: setup
	go test -race -timeout 15m ./deploy/... ./paxosgroup/... ./replication/... ./sidecar/... ./snapshot/... ./tracing/...

# The simulator under seeds drawn anew; what fails prints the seed to replay.
SEEDS ?= 1000
sim:
	@go test -c -o bin/sim.test ./test/sim
	@bin/sim.test -test.run '^TestSafetyUnderFaults$$' -test.v -test.timeout 600m -sim.seeds=$(SEEDS) -sim.from=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')

# Every order of events of three replicas within small bounds; about five minutes.
explore:
	go test ./paxosgroup -count=1 -timeout 20m -run '^TestExplore' -v -explore.states=1700000

# Deliberate bugs, each of which the simulator must catch within 2000 seeds; records the seeds in
# test/sim/mutants/table_test.go and the table of docs/verification.md.
mutants:
	go test ./test/sim/mutants -count=1 -timeout 120m -v -mutants.all -mutants.record

# FUZZTIME for each fuzz test of the project.
FUZZTIME ?= 30s
fuzz:
	@set -e; for file in $$(git grep -l '^func Fuzz' -- '*_test.go'); do \
		for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$file); do \
			echo "fuzz $$name in $$(dirname $$file)"; \
			go test ./$$(dirname $$file) -run '^$$' -fuzz "^$$name$$" -fuzztime $(FUZZTIME); \
		done; \
	done

# Generated code lies beside its .proto; this writes it anew. Needs protoc.
proto:
	@command -v protoc >/dev/null || { echo "protoc is missing (Debian, Ubuntu: apt-get install protobuf-compiler)" >&2; exit 1; }
	@set -e; tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	go build -o "$$tools" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc; \
	for file in $$(git ls-files '*.proto'); do \
		dir=$$(dirname $$file); \
		(cd $$dir && PATH="$$tools:$$PATH" protoc --go_out=. --go_opt=paths=source_relative \
			--go-grpc_out=. --go-grpc_opt=paths=source_relative $$(basename $$file)); \
	done

clean:
	rm -rf bin
