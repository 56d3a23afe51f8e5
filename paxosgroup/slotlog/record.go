package slotlog

import (
	"encoding/binary"
	"errors"
	"fmt"

	"quorate/paxosgroup"
)

// The sizes of the format; see doc.go.
const (
	recordHeaderBytes = 16
	recordBodyMax     = 1 << 30
	ballotBytes       = 12
)

type recordType uint8

// Types below 16 are those of paxosgroup.RecordKind.
const (
	typePromise = recordType(paxosgroup.RecordPromise)
	typeAccept  = recordType(paxosgroup.RecordAccept)
	typeLearn   = recordType(paxosgroup.RecordLearn)
	typeChosen  = recordType(paxosgroup.RecordChosen)
	typeBase    = recordType(paxosgroup.RecordBase)
	typeState   = recordType(16)
	typeSeal    = recordType(17)
)

// state is what a group's records add up to, entries apart.
type state struct {
	promised paxosgroup.Ballot
	chosen   paxosgroup.Slot
	base     paxosgroup.Base
}

// promise raises the promise: an acceptance is one too.
func (s *state) promise(b paxosgroup.Ballot) {
	if s.promised.Less(b) {
		s.promised = b
	}
}

// restart moves the base up. Chosen entries above it stay valid.
func (s *state) restart(b paxosgroup.Base) {
	s.base = b
	s.chosen = max(s.chosen, b.Slot)
}

// appendRecord appends the record at offset of the segment and returns the
// extended buffer.
func appendRecord(dst []byte, sequence uint64, offset int64, t recordType, g paxosgroup.GroupID, body func([]byte) []byte) []byte {
	start := len(dst)
	dst = append(dst, 0, 0, 0, 0, 0, 0, 0, 0, byte(t), 0, 0, 0)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(g))
	if body != nil {
		dst = body(dst)
	}
	frame := dst[start:]
	binary.LittleEndian.PutUint32(frame[0:], uint32(len(frame)-recordHeaderBytes))
	binary.LittleEndian.PutUint32(frame[4:], checksum(sequence, offset, frame[:4], frame[8:]))
	return dst
}

// bodySizeMax bounds the encoded size of a record's body.
func bodySizeMax(r paxosgroup.Record) int {
	if r.Base != nil {
		return ballotBytes + len(paxosgroup.EncodeBase(*r.Base))
	}
	return 80 + len(r.Entry.Region) + len(r.Entry.Payload)
}

func appendBody(dst []byte, r paxosgroup.Record, promised paxosgroup.Ballot) []byte {
	switch r.Kind {
	case paxosgroup.RecordPromise:
		dst = appendBallot(dst, r.Ballot)
	case paxosgroup.RecordAccept, paxosgroup.RecordLearn:
		dst = binary.LittleEndian.AppendUint64(dst, uint64(r.Slot))
		dst = appendBallot(dst, r.Ballot)
		dst = appendEntry(dst, r.Entry)
	case paxosgroup.RecordChosen:
		dst = binary.LittleEndian.AppendUint64(dst, uint64(r.Slot))
	case paxosgroup.RecordBase:
		dst = appendBallot(dst, promised)
		dst = append(dst, paxosgroup.EncodeBase(*r.Base)...)
	}
	return dst
}

func stateSize(s state) int { return ballotBytes + 8 + len(paxosgroup.EncodeBase(s.base)) }

func appendState(dst []byte, s state) []byte {
	dst = appendBallot(dst, s.promised)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(s.chosen))
	return append(dst, paxosgroup.EncodeBase(s.base)...)
}

func appendBallot(dst []byte, b paxosgroup.Ballot) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, b.Counter)
	return binary.LittleEndian.AppendUint32(dst, uint32(b.Replica))
}

func appendString(dst []byte, s string) []byte {
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(s)))
	return append(dst, s...)
}

func appendEntry(dst []byte, e paxosgroup.Entry) []byte {
	dst = append(dst, byte(e.Kind))
	dst = appendBallot(dst, e.Term)
	dst = binary.LittleEndian.AppendUint64(dst, e.Number)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(e.Incarnation))
	dst = binary.AppendUvarint(dst, e.Session)
	dst = binary.AppendUvarint(dst, e.Sequence)
	dst = appendString(dst, e.Region)
	return append(dst, e.Payload...)
}

// checkRecord refuses what the format has no room for, before any of a batch of
// records is taken.
func checkRecord(r paxosgroup.Record) error {
	switch r.Kind {
	case paxosgroup.RecordPromise, paxosgroup.RecordChosen:
		return nil
	case paxosgroup.RecordAccept, paxosgroup.RecordLearn:
		if r.Slot == 0 || len(r.Entry.Region) > 0xffff || bodySizeMax(r) > recordBodyMax {
			return fmt.Errorf("entry of slot %d (%d bytes) does not fit the log", r.Slot, len(r.Entry.Payload))
		}
		return nil
	case paxosgroup.RecordBase:
		if r.Base == nil {
			return errors.New("base record without a base")
		}
		// What could not be read back must not be taken.
		if _, err := paxosgroup.DecodeBase(paxosgroup.EncodeBase(*r.Base)); err != nil {
			return fmt.Errorf("base record: %w", err)
		}
		return nil
	}
	return fmt.Errorf("record of unknown kind %d", r.Kind)
}

// record is one decoded frame. Its payload shares the bytes it was decoded from.
type record struct {
	kind  recordType
	group paxosgroup.GroupID
	size  int // bytes of the frame

	ballot paxosgroup.Ballot // promise, accept, learn; base and state: the promise
	slot   paxosgroup.Slot   // accept, learn, chosen; state: chosen
	entry  paxosgroup.Entry
	base   paxosgroup.Base
}

var errBadRecord = errors.New("record does not match its checksum")

// decodeRecord decodes the record at the start of b, which stands at offset of
// the segment.
func decodeRecord(b []byte, sequence uint64, offset int64) (record, error) {
	if len(b) < recordHeaderBytes {
		return record{}, errBadRecord
	}
	length := binary.LittleEndian.Uint32(b)
	if length > recordBodyMax || int(length) > len(b)-recordHeaderBytes {
		return record{}, errBadRecord
	}
	frame := b[:recordHeaderBytes+int(length)]
	if binary.LittleEndian.Uint32(frame[4:]) != checksum(sequence, offset, frame[:4], frame[8:]) {
		return record{}, errBadRecord
	}
	r := record{
		kind:  recordType(frame[8]),
		group: paxosgroup.GroupID(binary.LittleEndian.Uint32(frame[12:])),
		size:  len(frame),
	}
	d := decoder{b: frame[recordHeaderBytes:]}
	switch r.kind {
	case typePromise:
		r.ballot = d.ballot()
	case typeAccept, typeLearn:
		r.slot = paxosgroup.Slot(d.uint64())
		r.ballot = d.ballot()
		r.entry = d.entry()
	case typeChosen:
		r.slot = paxosgroup.Slot(d.uint64())
	case typeBase:
		r.ballot = d.ballot()
		r.base = d.base()
	case typeState:
		r.ballot = d.ballot()
		r.slot = paxosgroup.Slot(d.uint64())
		r.base = d.base()
	case typeSeal:
	default:
		return record{}, fmt.Errorf("record of unknown type %d", frame[8])
	}
	if d.bad || len(d.b) != 0 {
		return record{}, fmt.Errorf("record of type %d is malformed", frame[8])
	}
	return r, nil
}

// decoder reads fields off the front of b, and remembers when b was too short.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if n > len(d.b) {
		d.bad = true
		d.b = nil
		return make([]byte, min(n, 8))
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) uint16() uint16 { return binary.LittleEndian.Uint16(d.take(2)) }
func (d *decoder) uint32() uint32 { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *decoder) uint64() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }
func (d *decoder) uint8() uint8   { return d.take(1)[0] }

// uvarint takes only the shortest form, so that there is one.
func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || n > 1 && d.b[n-1] == 0 {
		d.bad = true
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) string() string {
	n := int(d.uint16())
	if n > len(d.b) {
		d.bad = true
		return ""
	}
	return string(d.take(n))
}

func (d *decoder) ballot() paxosgroup.Ballot {
	return paxosgroup.Ballot{Counter: d.uint64(), Replica: paxosgroup.ReplicaID(d.uint32())}
}

func (d *decoder) entry() paxosgroup.Entry {
	e := paxosgroup.Entry{Kind: paxosgroup.EntryKind(d.uint8())}
	e.Term = d.ballot()
	e.Number = d.uint64()
	e.Incarnation = paxosgroup.Incarnation(d.uint64())
	e.Session = d.uvarint()
	e.Sequence = d.uvarint()
	e.Region = d.string()
	if len(d.b) > 0 {
		e.Payload = d.take(len(d.b))
	}
	return e
}

// base reads the rest.
func (d *decoder) base() paxosgroup.Base {
	b, err := paxosgroup.DecodeBase(d.b)
	d.bad = d.bad || err != nil
	d.b = nil
	return b
}
