package entry

import (
	"time"

	"github.com/jackc/pglogrepl"
)

// LSN is a position in a PostgreSQL server's WAL. Positions of commits are end
// LSNs everywhere: the end of the commit record, which is what a COMMIT waits for.
type LSN = pglogrepl.LSN

// Type says what a payload is. The numbers are on disk and on the wire.
type Type uint8

// The types of payloads.
const (
	TypeTransaction Type = 1 // a whole transaction
	TypeFragment    Type = 2 // a piece of a large transaction's body
	TypeCommit      Type = 3 // the end of a transaction whose body went before in fragments
	TypeMarks       Type = 4 // sequence marks
)

// Trace is a W3C trace context; the zero Trace is none.
type Trace struct {
	TraceID [16]byte
	SpanID  [8]byte
	Flags   byte
}

// Header identifies a transaction of one incarnation. Checksum is the CRC-32C
// of the body (for a transaction in fragments: of all of them in order), so a
// redelivered commit is recognised by content: see Same. A fragment's header
// has its Xid, and Checksum and BodyBytes of that fragment's own body.
type Header struct {
	Xid        uint64 // extended by epoch
	EndLSN     LSN
	CommitTime time.Time // microseconds, UTC
	Trace      Trace
	Checksum   uint32
	Changes    uint32 // inserts, updates, deletes, truncates and DDL in the body
	BodyBytes  uint64
}

// Same reports whether g is another delivery of the commit h: all but the trace
// and the position, which a publisher may set otherwise, must be equal.
func (h Header) Same(g Header) bool {
	return h.Xid == g.Xid && h.CommitTime.Equal(g.CommitTime) &&
		h.Checksum == g.Checksum && h.BodyBytes == g.BodyBytes && h.Changes == g.Changes
}

// Payload is a decoded data entry. Body is shared with the encoded bytes.
//
// The body is pgoutput messages in their wire form, each with a length before
// it, in order. A Relation message stands before the first change of each
// relation that the body uses, once a transaction unless it changes within it,
// so that whoever has all of a transaction's body can decode it alone.
type Payload struct {
	Type     Type
	Header   Header // Transaction and Commit; of Fragment Xid, Checksum and BodyBytes
	Attempt  uint64 // Fragment and Commit: which try at sending this transaction
	Fragment uint32 // Fragment: its number, 1, 2, 3, …; Commit: how many there are
	Body     []byte // Transaction and Fragment
	Marks    []Mark // Marks
}

// Mark says that no value of a sequence beyond Value (in the direction of its
// increment) was handed out at any position confirmed before the next mark.
type Mark struct {
	Schema, Name string
	Value        int64
}

// Op says what a change does.
type Op uint8

// The kinds of changes.
const (
	Insert Op = iota + 1
	Update
	Delete
	Truncate
	DDL     // a message with prefix DDLPrefix
	Message // any other transactional logical message
)

// DDLPrefix is the prefix of the logical messages by which DDL travels inside
// its transaction; the content is JSON, see catalog.DDL.
const DDLPrefix = "quorate.ddl"

// LocalPrefix begins the prefix of logical messages that are a region's own
// bookkeeping: capture drops them.
const LocalPrefix = "quorate.local"

// LocalSchema is the schema whose tables are a region's own bookkeeping: capture
// drops their changes.
const LocalSchema = "quorate"

// FenceSchema holds the functions that a region's triggers call. It has no tables.
const FenceSchema = "quorate_fence"

// TracePrefix is the prefix of the logical message that carries the client's
// W3C traceparent inside its transaction.
const TracePrefix = "traceparent"

// Relation describes a table as the publisher saw it at that point of its WAL.
type Relation struct {
	ID       uint32
	Schema   string
	Name     string
	Identity byte // 'd' default, 'n' nothing, 'f' full, 'i' index
	Columns  []Column
}

// Column is a column of a Relation.
type Column struct {
	Name    string
	TypeOID uint32 // the publisher's: means nothing elsewhere for types that are not built in
	TypeMod int32
	Key     bool // part of the replica identity
}

// ValueKind says how a value is given.
type ValueKind byte

// The kinds of values, as on the wire.
const (
	Null      ValueKind = 'n'
	Unchanged ValueKind = 'u' // an unchanged TOAST value, not sent
	Text      ValueKind = 't'
)

// Value is one column of a tuple. Data is shared with the body.
type Value struct {
	Kind ValueKind
	Data []byte
}

// Change is one decoded change of a body. Its slices are the reader's and valid
// until its next call; the data of values is valid until the body's bytes are
// reused.
type Change struct {
	Op       Op
	Relation *Relation   // Insert, Update, Delete
	OldKind  byte        // Update, Delete: 'K' key, 'O' whole old row, 0 none
	Old      []Value     // one for each column of Relation
	New      []Value     // Insert, Update
	Truncate []*Relation // Truncate
	Cascade  bool
	Restart  bool // RESTART IDENTITY
	Prefix   string
	Content  []byte // DDL, Message
}
