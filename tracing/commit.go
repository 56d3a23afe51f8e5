package tracing

import (
	"crypto/sha256"
	"encoding/binary"

	"quorate/replication/entry"
)

// Commit says which commit a span belongs to. Incarnation and EndLSN identify
// it; Group, Slot and Ballot describe it, and zero leaves them out.
type Commit struct {
	Incarnation uint64
	EndLSN      entry.LSN
	Client      entry.Trace // the header's; zero if the client gave none

	Group         uint32
	Slot          uint64
	BallotCounter uint64
	BallotReplica uint32
}

// flagSampled is the sampled bit of W3C trace flags.
const flagSampled = 1

// identity is what every region computes alike about a commit.
type identity struct {
	traceID  [16]byte
	commitID [8]byte // span id of the commit span
}

// identify hashes what names the commit. Bytes 0-15 of the digest are the
// trace id, 16-23 the id of the commit span, which so differs for two commits
// of one client trace.
func identify(cluster [sha256.Size]byte, c Commit) identity {
	var b [sha256.Size + 16]byte
	copy(b[:], cluster[:])
	binary.BigEndian.PutUint64(b[sha256.Size:], c.Incarnation)
	binary.BigEndian.PutUint64(b[sha256.Size+8:], uint64(c.EndLSN))
	digest := sha256.Sum256(b[:])
	id := identity{traceID: [16]byte(digest[:16]), commitID: nonZero([8]byte(digest[16:24]))}
	if c.Client.TraceID != ([16]byte{}) {
		id.traceID = c.Client.TraceID
	}
	return id
}

// spanID is the id of a stage's span. Stages that happen in several regions
// have one span, so one id, for each.
func (id identity) spanID(s Stage, region string) [8]byte {
	if s == Committed {
		return id.commitID
	}
	var room [64]byte
	b := append(room[:0], id.traceID[:]...)
	b = append(b, id.commitID[:]...)
	b = append(b, byte(s))
	b = append(b, region...)
	digest := sha256.Sum256(b)
	return nonZero([8]byte(digest[:8]))
}

// nonZero keeps clear of the one span id that W3C calls invalid.
func nonZero(id [8]byte) [8]byte {
	if id == ([8]byte{}) {
		id[7] = 1
	}
	return id
}

// sampled decides from what all regions know alike. The client's word wins;
// else the low 63 bits of the trace id are compared with the ratio, which is
// what other OpenTelemetry samplers do too.
func (id identity) sampled(client entry.Trace, below uint64) bool {
	if client.TraceID != ([16]byte{}) {
		return client.Flags&flagSampled != 0
	}
	return binary.BigEndian.Uint64(id.traceID[8:])>>1 < below
}

// samplingBound is the exclusive bound of 63-bit numbers for a ratio.
func samplingBound(ratio float64) uint64 {
	if ratio >= 1 {
		return 1 << 63
	}
	return uint64(ratio * (1 << 63))
}
