package peer

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

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
	entries  []*encodedEntries // of each message, nil where it is to be encoded alone; may be shorter
	track    *tracker          // of the connection that it is for; may be nil
}

// encodedEntries are the entries of Accepts that go to several peers: encoded
// once, by whoever comes first.
type encodedEntries struct {
	entries []paxosgroup.SlotEntry
	once    sync.Once
	size    int
	buffers mem.BufferSlice // never freed: the garbage collector's
}

func (n *encodedEntries) encode() {
	n.once.Do(func() {
		sizes := make([]int, len(n.entries))
		own := 0
		for i := range n.entries {
			entry := sizeEntry(&n.entries[i].Entry)
			sizes[i] = sizeUint(uint64(n.entries[i].Slot)) + sizeBytes(entry)
			n.size += sizeBytes(sizes[i])
			own += sizeBytes(sizes[i])
			if p := n.entries[i].Entry.Payload; len(p) >= sharedBytesMin {
				own -= len(p)
			}
		}
		e := encoder{b: make([]byte, 0, own), share: true}
		for i := range n.entries {
			e.slotEntry(&n.entries[i], sizes[i])
		}
		e.flush()
		n.buffers = e.done
	})
}

// tracker counts the frames of one connection that gRPC has not written yet. It
// hears of each when the frame's last buffer is given back, and until then no
// more than these can be in gRPC's own quota of unwritten bytes.
type tracker struct {
	unwritten atomic.Int64
}

// Get is for mem.BufferPool.
func (t *tracker) Get(size int) *[]byte {
	return mem.DefaultBufferPool().Get(max(size, trackedBytesMin))
}

// Put is for mem.BufferPool.
func (t *tracker) Put(b *[]byte) {
	t.unwritten.Add(-1)
	mem.DefaultBufferPool().Put(b)
}

// last returns a buffer whose end is told to the tracker.
func (t *tracker) last(b *[]byte) mem.Buffer {
	t.unwritten.Add(1)
	return mem.NewBuffer(b, t)
}

const (
	trackedBytesMin = 2 << 10  // smaller buffers gRPC does not give back
	copiedBytesMax  = 64 << 10 // a frame up to this size is one buffer; a larger one refers to large payloads
	tailBytes       = 64       // of a larger frame, copied so that its end is seen
)

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

func sizeMessage(g *GroupMessage, encoded *encodedEntries) int {
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
	if encoded != nil {
		return n + encoded.size
	}
	for i := range m.Entries {
		n += sizeBytes(sizeSlotEntry(&m.Entries[i]))
	}
	return n
}

// encoder gathers a frame: b is what is being built, done what stands before it.
type encoder struct {
	done  mem.BufferSlice
	b     []byte
	share bool // large payloads are referred to, not copied
}

func (f *frame) marshal() mem.BufferSlice {
	sizes := make([]int, 0, 16)
	total, shared := 0, 0
	for i := range f.messages {
		encoded := f.encoded(i)
		if encoded != nil {
			encoded.encode()
		}
		sizes = append(sizes, sizeMessage(&f.messages[i], encoded))
		total += sizeBytes(sizes[i])
		shared += sharedBytes(&f.messages[i].Message, encoded)
	}
	var hello []byte
	if f.hello != nil {
		// The hello's fields always encode.
		hello, _ = proto.Marshal(f.hello)
		total += sizeBytes(len(hello))
	}
	if total == 0 {
		return nil
	}
	var e encoder
	var pooled *[]byte
	if total <= copiedBytesMax && f.track != nil {
		pooled = f.track.Get(total)
		e.b = (*pooled)[:0]
	} else if total <= copiedBytesMax && shared == 0 {
		e.b = make([]byte, 0, total)
	} else {
		e.b, e.share = make([]byte, 0, total-shared), true
	}
	if f.hello != nil {
		e.b = protowire.AppendTag(e.b, frameHello, protowire.BytesType)
		e.b = protowire.AppendBytes(e.b, hello)
	}
	for i := range f.messages {
		e.length(frameMessages, sizes[i])
		e.message(&f.messages[i], f.encoded(i))
	}
	if pooled != nil {
		*pooled = e.b
		return mem.BufferSlice{f.track.last(pooled)}
	}
	e.flush()
	if f.track != nil && len(e.done) > 0 {
		k := len(e.done) - 1
		last := e.done[k].ReadOnlyData()
		cut := max(0, len(last)-tailBytes)
		tail := f.track.Get(len(last) - cut)
		*tail = append((*tail)[:0], last[cut:]...)
		e.done = append(e.done[:k], mem.SliceBuffer(last[:cut]), f.track.last(tail))
	}
	return e.done
}

func (f *frame) encoded(i int) *encodedEntries {
	if i < len(f.entries) {
		return f.entries[i]
	}
	return nil
}

// sharedBytes is how much of a message need not be copied.
func sharedBytes(m *paxosgroup.Message, encoded *encodedEntries) int {
	n := 0
	for i := range m.Accepted {
		if p := m.Accepted[i].Entry.Payload; len(p) >= sharedBytesMin {
			n += len(p)
		}
	}
	if encoded != nil {
		return n + encoded.size
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
		if !e.share || len(v.Payload) < sharedBytesMin {
			e.b = append(e.b, v.Payload...)
		} else {
			e.flush()
			e.done = append(e.done, mem.SliceBuffer(v.Payload))
		}
	}
	e.fixed(entrySession, v.Session)
	e.uint(entrySequence, v.Sequence)
}

func (e *encoder) slotEntry(s *paxosgroup.SlotEntry, size int) {
	e.length(messageEntries, size)
	e.uint(slotEntrySlot, uint64(s.Slot))
	e.entry(slotEntryEntry, &s.Entry)
}

func (e *encoder) message(g *GroupMessage, encoded *encodedEntries) {
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
	switch {
	case encoded == nil:
		for i := range m.Entries {
			e.slotEntry(&m.Entries[i], sizeSlotEntry(&m.Entries[i]))
		}
	case e.share:
		e.flush()
		e.done = append(e.done, encoded.buffers...)
	default:
		for _, b := range encoded.buffers {
			e.b = append(e.b, b.ReadOnlyData()...)
		}
	}
	e.uint(messageShared, protowire.EncodeBool(m.Shared))
	e.fixed(messageLife, m.Life)
	e.uint(messageGeneration, m.Generation)
	e.fixed(messageID, m.ID)
	e.uint(messageBytesMax, m.BytesMax)
}

var errMalformed = errors.New("malformed frame")

// decoder decodes one frame. left is how much memory it may still take beside
// the bytes themselves: messages of two bytes must not become hundreds each.
type decoder struct {
	left   int
	region string // the last one, since it repeats
}

const (
	decodedBytesFree   = 16 << 20
	decodedBytesFactor = 4 // of the frame's size, on top
)

// take allows for count values of size bytes.
func (d *decoder) take(count int, size uintptr) error {
	if d.left -= count * int(size); d.left < 0 {
		return fmt.Errorf("%w: it would take far more memory than its own size", errMalformed)
	}
	return nil
}

// next takes a field off b. For a scalar v is its value; for a field with a
// length, p is its content. Groups, which nobody sends, are refused.
func next(b []byte) (field protowire.Number, v uint64, p, rest []byte, err error) {
	var kind protowire.Type
	n := 1
	if len(b) > 0 && b[0] < 0x80 && b[0] >= 1<<3 {
		field, kind = protowire.Number(b[0]>>3), protowire.Type(b[0]&7)
	} else if field, kind, n = protowire.ConsumeTag(b); n < 0 {
		return 0, 0, nil, nil, errMalformed
	}
	b = b[n:]
	switch kind {
	case protowire.VarintType:
		if len(b) > 0 && b[0] < 0x80 {
			return field, uint64(b[0]), nil, b[1:], nil
		}
		v, n = protowire.ConsumeVarint(b)
	case protowire.BytesType:
		size := uint64(0)
		if len(b) > 0 && b[0] < 0x80 {
			size, n = uint64(b[0]), 1
		} else {
			size, n = protowire.ConsumeVarint(b)
		}
		if n < 0 || size > uint64(len(b)-n) {
			return 0, 0, nil, nil, errMalformed
		}
		end := n + int(size)
		return field, 0, b[n:end:end], b[end:], nil
	case protowire.Fixed64Type:
		v, n = protowire.ConsumeFixed64(b)
	case protowire.Fixed32Type:
		var w uint32
		w, n = protowire.ConsumeFixed32(b)
		v = uint64(w)
	default:
		n = -1
	}
	if n < 0 {
		return 0, 0, nil, nil, errMalformed
	}
	return field, v, nil, b[n:], nil
}

// count returns how many fields of b have one of two numbers.
func count(b []byte, first, second protowire.Number) (firsts, seconds int, err error) {
	for len(b) > 0 {
		var field protowire.Number
		if field, _, _, b, err = next(b); err != nil {
			return 0, 0, err
		}
		switch field {
		case first:
			firsts++
		case second:
			seconds++
		}
	}
	return firsts, seconds, nil
}

// unmarshal decodes b, which what is decoded refers to. It reuses f.messages.
func (f *frame) unmarshal(b []byte) error {
	messages := f.messages[:0]
	clear(f.messages)
	*f = frame{}
	d := decoder{left: decodedBytesFree + decodedBytesFactor*len(b)}
	n, _, err := count(b, frameMessages, 0)
	if err != nil {
		return err
	}
	if err := d.take(n, unsafe.Sizeof(GroupMessage{})); err != nil {
		return err
	}
	if cap(messages) < n || cap(messages) > reusedMessagesMax && n < reusedMessagesMax {
		messages = make([]GroupMessage, 0, n)
	}
	f.messages = messages[:n]
	n = 0
	for len(b) > 0 {
		var field protowire.Number
		var p []byte
		if field, _, p, b, err = next(b); err != nil {
			return err
		}
		switch field {
		case frameHello:
			f.hello = new(paxospb.Hello)
			if err := proto.Unmarshal(p, f.hello); err != nil {
				return err
			}
		case frameMessages:
			if err := d.message(p, &f.messages[n]); err != nil {
				return err
			}
			n++
		}
	}
	return nil
}

const reusedMessagesMax = 4096

func (d *decoder) ballot(b []byte, out *paxosgroup.Ballot) (err error) {
	for len(b) > 0 {
		var field protowire.Number
		var v uint64
		if field, v, _, b, err = next(b); err != nil {
			return err
		}
		switch field {
		case ballotCounter:
			out.Counter = v
		case ballotReplica:
			out.Replica = paxosgroup.ReplicaID(v)
		}
	}
	return nil
}

func (d *decoder) entry(b []byte, out *paxosgroup.Entry) (err error) {
	for len(b) > 0 {
		var field protowire.Number
		var v uint64
		var p []byte
		if field, v, p, b, err = next(b); err != nil {
			return err
		}
		switch field {
		case entryKind:
			out.Kind = paxosgroup.EntryKind(v)
		case entryTerm:
			if err := d.ballot(p, &out.Term); err != nil {
				return err
			}
		case entryNumber:
			out.Number = v
		case entryRegion:
			if d.region != string(p) {
				if err := d.take(len(p), 1); err != nil {
					return err
				}
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
			out.Payload = nil
			if len(p) > 0 {
				out.Payload = p
			}
		}
	}
	return nil
}

func (d *decoder) message(b []byte, g *GroupMessage) error {
	m := &g.Message
	entries, accepted, err := count(b, messageEntries, messageAccepted)
	if err != nil {
		return err
	}
	if entries > 0 {
		if err := d.take(entries, unsafe.Sizeof(paxosgroup.SlotEntry{})); err != nil {
			return err
		}
		m.Entries = make([]paxosgroup.SlotEntry, 0, entries)
	}
	if accepted > 0 {
		if err := d.take(accepted, unsafe.Sizeof(paxosgroup.AcceptedEntry{})); err != nil {
			return err
		}
		m.Accepted = make([]paxosgroup.AcceptedEntry, 0, accepted)
	}
	for len(b) > 0 {
		var field protowire.Number
		var v uint64
		var p []byte
		if field, v, p, b, err = next(b); err != nil {
			return err
		}
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
			err = d.ballot(p, &m.Ballot)
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
			err = d.ballot(p, &m.Released)
		case messageSlots:
			err = d.slots(p, &m.Slots)
		case messageAccepted:
			m.Accepted = append(m.Accepted, paxosgroup.AcceptedEntry{})
			err = d.accepted(p, &m.Accepted[len(m.Accepted)-1])
		case messageEntries:
			m.Entries = append(m.Entries, paxosgroup.SlotEntry{})
			err = d.slotEntry(p, &m.Entries[len(m.Entries)-1])
		case messageShared:
			m.Shared = v != 0
		case messageLife:
			m.Life = v
		case messageGeneration:
			m.Generation = v
		case messageID:
			m.ID = v
		case messageBytesMax:
			m.BytesMax = v
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// slots decodes packed numbers, of which there are as many as bytes without a
// continuation bit.
func (d *decoder) slots(b []byte, out *[]paxosgroup.Slot) error {
	n := 0
	for _, c := range b {
		if c < 0x80 {
			n++
		}
	}
	if n == 0 {
		if len(b) > 0 {
			return errMalformed
		}
		return nil
	}
	if err := d.take(n, unsafe.Sizeof(paxosgroup.Slot(0))); err != nil {
		return err
	}
	*out = slices.Grow(*out, n)
	for len(b) > 0 {
		s, n := protowire.ConsumeVarint(b)
		if n < 0 {
			return errMalformed
		}
		*out = append(*out, paxosgroup.Slot(s))
		b = b[n:]
	}
	return nil
}

func (d *decoder) accepted(b []byte, out *paxosgroup.AcceptedEntry) (err error) {
	for len(b) > 0 {
		var field protowire.Number
		var v uint64
		var p []byte
		if field, v, p, b, err = next(b); err != nil {
			return err
		}
		switch field {
		case acceptedSlot:
			out.Slot = paxosgroup.Slot(v)
		case acceptedBallot:
			err = d.ballot(p, &out.Ballot)
		case acceptedEntry:
			err = d.entry(p, &out.Entry)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *decoder) slotEntry(b []byte, out *paxosgroup.SlotEntry) (err error) {
	for len(b) > 0 {
		var field protowire.Number
		var v uint64
		var p []byte
		if field, v, p, b, err = next(b); err != nil {
			return err
		}
		switch field {
		case slotEntrySlot:
			out.Slot = paxosgroup.Slot(v)
		case slotEntryEntry:
			if err := d.entry(p, &out.Entry); err != nil {
				return err
			}
		}
	}
	return nil
}
