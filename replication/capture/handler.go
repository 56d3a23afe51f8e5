package capture

import (
	"context"
	"time"

	"quorate/replication/entry"
)

// OriginPrefix begins the name of every replication origin under which entries
// are replayed: a transaction with such an origin is not local.
const OriginPrefix = "quorate"

// Begin is what is known of a local transaction when its first change arrives.
// It has committed on this server.
type Begin struct {
	Xid        uint64    // extended by epoch
	CommitLSN  entry.LSN // where the commit record begins: below the end LSN of this commit, at or above that of every earlier one
	CommitTime time.Time // microseconds, UTC
}

// Disposition is what the Handler wants of a transaction.
type Disposition uint8

// The dispositions.
const (
	Propose Disposition = 1 // hand it over by Entry
	Digest  Disposition = 2 // only compute its header and hand that over by Digest
)

// Handler receives what is captured. All calls come from one goroutine, one
// after the other; the stream stands still while a call lasts, and the socket's
// buffers are the back-pressure towards PostgreSQL. It may call Stream.Confirm.
// An error ends the stream. The context ends with the stream.
type Handler interface {
	// Begin decides on a transaction. It is not called for one of which nothing
	// remains after filtering.
	Begin(b Begin) Disposition
	// Entry takes a TypeTransaction, or one TypeFragment after the other and a
	// TypeCommit. Bodies are the stream's again when it returns.
	Entry(ctx context.Context, p entry.Payload) error
	// Digest takes the header that the transaction's entry would have.
	Digest(ctx context.Context, h entry.Header) error
	// Position says that everything which ends at or below lsn was handed over
	// or is none of ours.
	Position(ctx context.Context, lsn entry.LSN) error
}
