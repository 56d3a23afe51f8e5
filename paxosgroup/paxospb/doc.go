// Package paxospb holds the protocol between sidecars as generated code. Its
// types stop at package peer, which encodes the messages themselves by hand so
// that payloads are not copied; a test there holds the two to the same bytes.
package paxospb
