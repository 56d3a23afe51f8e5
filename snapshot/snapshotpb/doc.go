// Package snapshotpb is the wire form of package snapshot.
package snapshotpb

//go:generate protoc -I ../.. --go_out=../.. --go_opt=module=quorate --go-grpc_out=../.. --go-grpc_opt=module=quorate snapshot/snapshotpb/snapshot.proto
