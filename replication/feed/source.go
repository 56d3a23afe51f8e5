package feed

import (
	"context"
	"fmt"

	"quorate/replication/entry"
)

// Source reads the effective transactions of one group's log.
type Source interface {
	// Read returns what is chosen from slot from on. It waits until there is
	// something, at least a slot that is void. What it returns is valid until
	// the next Read. It returns a *CutError if slot from was cut from the log.
	Read(ctx context.Context, from uint64) (Batch, error)
}

// Batch is a stretch of the log.
type Batch struct {
	Items []Item // ascending slots, all below Next
	Next  uint64 // everything below was read; above the slot that was asked for
}

// Item is an effective transaction: a payload of entry.TypeTransaction, or of
// entry.TypeCommit with its Fragments. All else (void slots, openings,
// fragments, marks) is left out of a batch.
type Item struct {
	Slot        uint64
	Region      string
	Incarnation uint64
	Payload     entry.Payload

	// Fragments yields the bodies of a TypeCommit in order, one at a time. It
	// may be called more than once. It may return a *CutError.
	Fragments func(yield func(body []byte) error) error

	// Trace is the context for consumers to go on from. Zero: the client's, as
	// it stands in the payload.
	Trace entry.Trace
}

// CutError says that the log begins only after slot Base.
type CutError struct{ Base uint64 }

func (e *CutError) Error() string { return fmt.Sprintf("the log was cut up to slot %d", e.Base) }
