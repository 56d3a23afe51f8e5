// Package admin serves a sidecar's administration: gRPC for paxosctl and plain
// HTTP for load balancers, probes and Prometheus, at one address.
//
//	GET /status   this region, as JSON
//	GET /healthz  200 while the process runs and can say how it is
//	GET /readyz   200 while the region is healthy and has caught up, else 503
//	GET /leader   200 only where writes are taken, else 503
//	GET /metrics  Prometheus
//
// It decides nothing: what it tells and does is its Backend's. It serves what
// can be known without the database or a quorum, since it is asked most when
// those are gone. There is no authentication yet: listen on a private address.
package admin
