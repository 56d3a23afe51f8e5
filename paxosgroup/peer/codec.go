package peer

import (
	"errors"
	"fmt"
	"math/bits"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"quorate/paxosgroup"
	"quorate/paxosgroup/paxospb"
)

// codecName is the content-subtype of streams in this codec: protobuf, but
// encoded from and into the core's own types without copying payloads.
const codecName = "quorate-proto"

func init() { encoding.RegisterCodecV2(codec{}) }

type codec struct{}

func (codec) Name() string { return codecName }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case *frame:
		return v.marshal(), nil
	case proto.Message:
		b, err := proto.Marshal(v)
		return mem.BufferSlice{mem.SliceBuffer(b)}, err
	}
	return nil, fmt.Errorf("codec %s: cannot encode %T", codecName, v)
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch v := v.(type) {
	case *frame:
		// gRPC takes its buffers back, so this is the one copy on the way in.
		return v.unmarshal(data.Materialize())
	case proto.Message:
		return proto.Unmarshal(data.Materialize(), v)
	}
	return fmt.Errorf("codec %s: cannot decode %T", codecName, v)
}

// frame is paxospb.Frame in the core's types.
type frame struct {
	hello    *paxospb.Hello
	messages []GroupMessage
}

// Field numbers of paxospb.
const (
	frameHello    = 1
	frameMessages = 2

	messageGroup    = 1
	messageKind     = 2
	messageFrom     = 3
	messageTo       = 4
	messageBallot   = 5
	messageSlot     = 6
	messageChosen   = 7
	messageApplied  = 8
	messageSentAt   = 9
	messageGranted  = 10
	messageTransfer = 11
	messageReleased = 12
	messageSlots    = 13
	messageAccepted = 14
	messageEntries  = 15

	messageShared     = 16
	messageLife       = 17
	messageGeneration = 18
	messageID         = 19
	messageBytesMax   = 20

	ballotCounter = 1
	ballotReplica = 2

	entryKind        = 1
	entryTerm        = 2
	entryNumber      = 3
	entryRegion      = 4
	entryIncarnation = 5
	entryPayload     = 6
	entrySession     = 7
	entrySequence    = 8

	slotEntrySlot  = 1
	slotEntryEntry = 2

	acceptedSlot   = 1
	acceptedBallot = 2
	acceptedEntry  = 3
)

// sharedBytesMin is the size from which a payload is handed to gRPC as it is
// instead of being copied beside its neighbours.
const sharedBytesMin = 1 << 10

func sizeVarint(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

// sizeUint is the size of a scalar field, which is left out if zero.
func sizeUint(v uint64) int {
	if v == 0 {
		return 0
	}
	return 1 + sizeVarint(v)
}

// sizeBytes is the size of a field with a length.
func sizeBytes(n int) int { return 1 + sizeVarint(uint64(n)) + n }

func sizeBallot(b paxosgroup.Ballot) int {
	return sizeUint(b.Counter) + sizeUint(uint64(b.Replica))
}

func sizeBallotField(b paxosgroup.Ballot) int {
	if b.IsZero() {
		return 0
	}
	return sizeBytes(sizeBallot(b))
}

func sizeEntry(e *paxosgroup.Entry) int {
	n := sizeUint(uint64(e.Kind)) + sizeBallotField(e.Term) + sizeUint(e.Number)
	if e.Region != "" {
		n += sizeBytes(len(e.Region))
	}
	if e.Incarnation != 0 {
		n += 1 + 8
	}
	if e.Session != 0 {
		n += 1 + 8
	}
	n += sizeUint(e.Sequence)
	if len(e.Payload) > 0 {
		n += sizeBytes(len(e.Payload))
	}
	return n
}

func sizeSlotEntry(e *paxosgroup.SlotEntry) int {
	return sizeUint(uint64(e.Slot)) + sizeBytes(sizeEntry(&e.Entry))
}

func sizeAccepted(a *paxosgroup.AcceptedEntry) int {
	return sizeUint(uint64(a.Slot)) + sizeBallotField(a.Ballot) + sizeBytes(sizeEntry(&a.Entry))
}

func sizeSlots(slots []paxosgroup.Slot) int {
	n := 0
	for _, s := range slots {
		n += sizeVarint(uint64(s))
	}
	return n
}

func sizeMessage(g *GroupMessage) int {
	m := &g.Message
	n := sizeUint(uint64(g.Group)) + sizeUint(uint64(m.Kind)) + sizeUint(uint64(m.From)) + sizeUint(uint64(m.To)) +
		sizeBallotField(m.Ballot) + sizeUint(uint64(m.Slot)) + sizeUint(uint64(m.Chosen)) + sizeUint(uint64(m.Applied)) +
		sizeUint(uint64(m.SentAt)) + sizeBallotField(m.Released)
	if m.Granted {
		n += 2
	}
	if m.Transfer {
		n += 2
	}
	// The tags of fields from 16 on take two bytes.
	if m.Shared {
		n += 3
	}
	if m.Life != 0 {
		n += 2 + 8
	}
	if m.Generation != 0 {
		n += 2 + sizeVarint(m.Generation)
	}
	if m.BytesMax != 0 {
		n += 2 + sizeVarint(m.BytesMax)
	}
	if m.ID != 0 {
		n += 2 + 8
	}
	if len(m.Slots) > 0 {
		n += sizeBytes(sizeSlots(m.Slots))
	}
	for i := range m.Accepted {
		n += sizeBytes(sizeAccepted(&m.Accepted[i]))
	}
	for i := range m.Entries {
		n += sizeBytes(sizeSlotEntry(&m.Entries[i]))
	}
	return n
}

// encoder gathers a frame: b is what is being built, done what stands before it.
type encoder struct {
	done mem.BufferSlice
	b    []byte
}

func (f *frame) marshal() mem.BufferSlice {
	sizes := make([]int, len(f.messages))
	total := 0
	shared := 0
	for i := range f.messages {
		sizes[i] = sizeMessage(&f.messages[i])
		total += sizeBytes(sizes[i])
		shared += sharedBytes(&f.messages[i].Message)
	}
	var hello []byte
	if f.hello != nil {
		// The hello's fields always encode.
		hello, _ = proto.Marshal(f.hello)
		total += sizeBytes(len(hello))
	}
	e := encoder{b: make([]byte, 0, total-shared)}
	if f.hello != nil {
		e.b = protowire.AppendTag(e.b, frameHello, protowire.BytesType)
		e.b = protowire.AppendBytes(e.b, hello)
	}
	for i := range f.messages {
		e.length(frameMessages, sizes[i])
		e.message(&f.messages[i])
	}
	e.flush()
	return e.done
}

// sharedBytes is how much of a message is not copied.
func sharedBytes(m *paxosgroup.Message) int {
	n := 0
	for i := range m.Accepted {
		if p := m.Accepted[i].Entry.Payload; len(p) >= sharedBytesMin {
			n += len(p)
		}
	}
	for i := range m.Entries {
		if p := m.Entries[i].Entry.Payload; len(p) >= sharedBytesMin {
			n += len(p)
		}
	}
	return n
}

func (e *encoder) flush() {
	if len(e.b) > 0 {
		e.done = append(e.done, mem.SliceBuffer(e.b[:len(e.b):len(e.b)]))
		e.b = e.b[len(e.b):]
	}
}

func (e *encoder) length(field protowire.Number, n int) {
	e.b = protowire.AppendTag(e.b, field, protowire.BytesType)
	e.b = protowire.AppendVarint(e.b, uint64(n))
}

func (e *encoder) uint(field protowire.Number, v uint64) {
	if v != 0 {
		e.b = protowire.AppendTag(e.b, field, protowire.VarintType)
		e.b = protowire.AppendVarint(e.b, v)
	}
}

func (e *encoder) fixed(field protowire.Number, v uint64) {
	if v != 0 {
		e.b = protowire.AppendTag(e.b, field, protowire.Fixed64Type)
		e.b = protowire.AppendFixed64(e.b, v)
	}
}

func (e *encoder) ballot(field protowire.Number, b paxosgroup.Ballot) {
	if !b.IsZero() {
		e.length(field, sizeBallot(b))
		e.uint(ballotCounter, b.Counter)
		e.uint(ballotReplica, uint64(b.Replica))
	}
}

func (e *encoder) entry(field protowire.Number, v *paxosgroup.Entry) {
	e.length(field, sizeEntry(v))
	e.uint(entryKind, uint64(v.Kind))
	e.ballot(entryTerm, v.Term)
	e.uint(entryNumber, v.Number)
	if v.Region != "" {
		e.length(entryRegion, len(v.Region))
		e.b = append(e.b, v.Region...)
	}
	if v.Incarnation != 0 {
		e.b = protowire.AppendTag(e.b, entryIncarnation, protowire.Fixed64Type)
		e.b = protowire.AppendFixed64(e.b, uint64(v.Incarnation))
	}
	if len(v.Payload) > 0 {
		e.length(entryPayload, len(v.Payload))
		if len(v.Payload) < sharedBytesMin {
			e.b = append(e.b, v.Payload...)
		} else {
			e.flush()
			e.done = append(e.done, mem.SliceBuffer(v.Payload))
		}
	}
	e.fixed(entrySession, v.Session)
	e.uint(entrySequence, v.Sequence)
}

func (e *encoder) message(g *GroupMessage) {
	m := &g.Message
	e.uint(messageGroup, uint64(g.Group))
	e.uint(messageKind, uint64(m.Kind))
	e.uint(messageFrom, uint64(m.From))
	e.uint(messageTo, uint64(m.To))
	e.ballot(messageBallot, m.Ballot)
	e.uint(messageSlot, uint64(m.Slot))
	e.uint(messageChosen, uint64(m.Chosen))
	e.uint(messageApplied, uint64(m.Applied))
	e.uint(messageSentAt, uint64(m.SentAt))
	e.uint(messageGranted, protowire.EncodeBool(m.Granted))
	e.uint(messageTransfer, protowire.EncodeBool(m.Transfer))
	e.ballot(messageReleased, m.Released)
	if len(m.Slots) > 0 {
		e.length(messageSlots, sizeSlots(m.Slots))
		for _, s := range m.Slots {
			e.b = protowire.AppendVarint(e.b, uint64(s))
		}
	}
	for i := range m.Accepted {
		a := &m.Accepted[i]
		e.length(messageAccepted, sizeAccepted(a))
		e.uint(acceptedSlot, uint64(a.Slot))
		e.ballot(acceptedBallot, a.Ballot)
		e.entry(acceptedEntry, &a.Entry)
	}
	for i := range m.Entries {
		s := &m.Entries[i]
		e.length(messageEntries, sizeSlotEntry(s))
		e.uint(slotEntrySlot, uint64(s.Slot))
		e.entry(slotEntryEntry, &s.Entry)
	}
	e.uint(messageShared, protowire.EncodeBool(m.Shared))
	e.fixed(messageLife, m.Life)
	e.uint(messageGeneration, m.Generation)
	e.fixed(messageID, m.ID)
	e.uint(messageBytesMax, m.BytesMax)
}

var errMalformed = errors.New("malformed frame")

// decoder decodes one frame. A region's name repeats, so it is kept.
type decoder struct {
	region string
}

// fields calls each for every field of b. For a scalar v is its value; for a
// field with a length, p is its content. Unknown fields are handed over too, and
// each may ignore them.
func fields(b []byte, each func(field protowire.Number, v uint64, p []byte) error) error {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		var v uint64
		var p []byte
		switch kind {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			v, n = protowire.ConsumeFixed64(b)
		case protowire.BytesType:
			p, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(field, kind, b)
			if n >= 0 {
				b = b[n:]
				continue
			}
		}
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		if err := each(field, v, p); err != nil {
			return err
		}
	}
	return nil
}

func (f *frame) unmarshal(b []byte) error {
	*f = frame{}
	var d decoder
	return fields(b, func(field protowire.Number, _ uint64, p []byte) error {
		switch field {
		case frameHello:
			f.hello = new(paxospb.Hello)
			return proto.Unmarshal(p, f.hello)
		case frameMessages:
			f.messages = append(f.messages, GroupMessage{})
			return d.message(p, &f.messages[len(f.messages)-1])
		}
		return nil
	})
}

func (d *decoder) ballot(b []byte, out *paxosgroup.Ballot) error {
	return fields(b, func(field protowire.Number, v uint64, _ []byte) error {
		switch field {
		case ballotCounter:
			out.Counter = v
		case ballotReplica:
			out.Replica = paxosgroup.ReplicaID(v)
		}
		return nil
	})
}

func (d *decoder) entry(b []byte, out *paxosgroup.Entry) error {
	return fields(b, func(field protowire.Number, v uint64, p []byte) error {
		switch field {
		case entryKind:
			out.Kind = paxosgroup.EntryKind(v)
		case entryTerm:
			return d.ballot(p, &out.Term)
		case entryNumber:
			out.Number = v
		case entryRegion:
			if d.region != string(p) {
				d.region = string(p)
			}
			out.Region = d.region
		case entryIncarnation:
			out.Incarnation = paxosgroup.Incarnation(v)
		case entrySession:
			out.Session = v
		case entrySequence:
			out.Sequence = v
		case entryPayload:
			out.Payload = p[:len(p):len(p)]
		}
		return nil
	})
}

func (d *decoder) message(b []byte, g *GroupMessage) error {
	m := &g.Message
	return fields(b, func(field protowire.Number, v uint64, p []byte) error {
		switch field {
		case messageGroup:
			g.Group = paxosgroup.GroupID(v)
		case messageKind:
			m.Kind = paxosgroup.MessageKind(v)
		case messageFrom:
			m.From = paxosgroup.ReplicaID(v)
		case messageTo:
			m.To = paxosgroup.ReplicaID(v)
		case messageBallot:
			return d.ballot(p, &m.Ballot)
		case messageSlot:
			m.Slot = paxosgroup.Slot(v)
		case messageChosen:
			m.Chosen = paxosgroup.Slot(v)
		case messageApplied:
			m.Applied = paxosgroup.Slot(v)
		case messageSentAt:
			m.SentAt = paxosgroup.Instant(v)
		case messageGranted:
			m.Granted = v != 0
		case messageTransfer:
			m.Transfer = v != 0
		case messageReleased:
			return d.ballot(p, &m.Released)
		case messageSlots:
			for len(p) > 0 {
				s, n := protowire.ConsumeVarint(p)
				if n < 0 {
					return errMalformed
				}
				m.Slots = append(m.Slots, paxosgroup.Slot(s))
				p = p[n:]
			}
		case messageAccepted:
			m.Accepted = append(m.Accepted, paxosgroup.AcceptedEntry{})
			return d.accepted(p, &m.Accepted[len(m.Accepted)-1])
		case messageEntries:
			m.Entries = append(m.Entries, paxosgroup.SlotEntry{})
			return d.slotEntry(p, &m.Entries[len(m.Entries)-1])
		case messageShared:
			m.Shared = v != 0
		case messageLife:
			m.Life = v
		case messageBytesMax:
			m.BytesMax = v
		case messageGeneration:
			m.Generation = v
		case messageID:
			m.ID = v
		}
		return nil
	})
}

func (d *decoder) accepted(b []byte, out *paxosgroup.AcceptedEntry) error {
	return fields(b, func(field protowire.Number, v uint64, p []byte) error {
		switch field {
		case acceptedSlot:
			out.Slot = paxosgroup.Slot(v)
		case acceptedBallot:
			return d.ballot(p, &out.Ballot)
		case acceptedEntry:
			return d.entry(p, &out.Entry)
		}
		return nil
	})
}

func (d *decoder) slotEntry(b []byte, out *paxosgroup.SlotEntry) error {
	return fields(b, func(field protowire.Number, v uint64, p []byte) error {
		switch field {
		case slotEntrySlot:
			out.Slot = paxosgroup.Slot(v)
		case slotEntryEntry:
			return d.entry(p, &out.Entry)
		}
		return nil
	})
}
