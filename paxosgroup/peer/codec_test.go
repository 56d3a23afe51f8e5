package peer

import (
	"bytes"
	"errors"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"quorate/paxosgroup"
	"quorate/paxosgroup/paxospb"
)

// filled returns a message with every field set to something of its own, found
// by reflection so that a field added to the core cannot be forgotten here.
func filled(t testing.TB, payload int) GroupMessage {
	n := uint64(0)
	var fill func(v reflect.Value)
	fill = func(v reflect.Value) {
		n++
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				fill(v.Field(i))
			}
		case reflect.Bool:
			v.SetBool(true)
		case reflect.Uint8:
			v.SetUint(n%250 + 1)
		case reflect.Uint32, reflect.Uint64:
			v.SetUint(n * 1_000_003 % (1 << 31))
		case reflect.Int64:
			v.SetInt(int64(n) * 1_000_003)
		case reflect.String:
			v.SetString(strings.Repeat("r", int(n%7)+1))
		case reflect.Slice:
			if v.Type().Elem().Kind() == reflect.Uint8 {
				v.SetBytes(bytes.Repeat([]byte{byte(n)}, payload))
				return
			}
			v.Set(reflect.MakeSlice(v.Type(), 3, 3))
			for i := range 3 {
				fill(v.Index(i))
			}
		default:
			t.Fatalf("no way to fill a %v", v.Type())
		}
	}
	var m GroupMessage
	fill(reflect.ValueOf(&m).Elem())
	return m
}

func marshal(f *frame) []byte { return f.marshal().Materialize() }

func TestFrameRoundTripsEveryField(t *testing.T) {
	for _, payload := range []int{1, 100, sharedBytesMin, 100_000} {
		f := frame{
			hello:    &paxospb.Hello{ClusterId: "c", Sender: 1, Receiver: 2, Version: 3},
			messages: []GroupMessage{filled(t, payload), {}, filled(t, payload+1)},
		}
		var got frame
		if err := got.unmarshal(marshal(&f)); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got.hello, f.hello) || !reflect.DeepEqual(got.messages, f.messages) {
			t.Fatalf("payload %d: got %+v, want %+v", payload, got, f)
		}
	}
}

// TestFrameIsProtobuf holds the codec to the generated code: what it writes that
// reads and writes again as the same bytes, with nothing left over as unknown.
func TestFrameIsProtobuf(t *testing.T) {
	f := frame{messages: []GroupMessage{filled(t, 10), filled(t, 5000)}}
	b := marshal(&f)
	var pb paxospb.Frame
	if err := proto.Unmarshal(b, &pb); err != nil {
		t.Fatal(err)
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(&pb)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again, b) {
		t.Fatalf("generated code writes %x, the codec %x", again, b)
	}
	proto.Reset(&pb)
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &pb); err != nil {
		t.Fatal(err)
	}
	if known := proto.Size(&pb); known != len(b) {
		t.Fatalf("generated code knows %d of %d bytes", known, len(b))
	}
}

func TestLargePayloadIsNotCopied(t *testing.T) {
	payload := bytes.Repeat([]byte{7}, 1<<20)
	f := frame{messages: []GroupMessage{{Message: paxosgroup.Message{Entries: []paxosgroup.SlotEntry{{Slot: 1, Entry: paxosgroup.Entry{Payload: payload}}}}}}}
	for _, b := range f.marshal() {
		if data := b.ReadOnlyData(); len(data) == len(payload) && &data[0] == &payload[0] {
			return
		}
	}
	t.Fatal("no buffer of the encoded frame is the payload itself")
}

// TestTinyPartsDoNotBecomeMuchMemory: what is empty on the wire takes room in
// memory, so a frame full of it is refused before any is taken.
func TestTinyPartsDoNotBecomeMuchMemory(t *testing.T) {
	const count = 2 << 20
	empty := func(field protowire.Number) []byte {
		return bytes.Repeat(protowire.AppendVarint(protowire.AppendTag(nil, field, protowire.BytesType), 0), count)
	}
	inMessage := func(b []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, frameMessages, protowire.BytesType), b)
	}
	for name, b := range map[string][]byte{
		"messages": empty(frameMessages),
		"entries":  inMessage(empty(messageEntries)),
		"accepted": inMessage(empty(messageAccepted)),
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			var f frame
			if err := f.unmarshal(b); !errors.Is(err, errMalformed) {
				t.Fatalf("%d empty %s: error %v", count, name, err)
			}
			runtime.ReadMemStats(&after)
			if took := after.TotalAlloc - before.TotalAlloc; took > decodedBytesFree+8*uint64(len(b)) {
				t.Errorf("%d bytes taken to refuse a frame of %d", took, len(b))
			}
		})
	}
}

// TestEntriesEncodedOnceAreTheSame holds what several peers share to what one
// would be sent alone, in each way that a frame is laid out.
func TestEntriesEncodedOnceAreTheSame(t *testing.T) {
	for _, payload := range []int{10, sharedBytesMin, copiedBytesMax} {
		m := filled(t, payload)
		alone := marshal(&frame{messages: []GroupMessage{m, m}})
		shared := &encodedEntries{entries: m.Message.Entries}
		for _, track := range []*tracker{nil, {}} {
			f := frame{messages: []GroupMessage{m, m}, entries: []*encodedEntries{shared, shared}, track: track}
			buffers := f.marshal()
			if !bytes.Equal(buffers.Materialize(), alone) {
				t.Fatalf("payload %d: encoded otherwise", payload)
			}
			if track == nil {
				continue
			}
			if track.unwritten.Load() != 1 {
				t.Fatalf("%d frames unwritten", track.unwritten.Load())
			}
			if buffers.Free(); track.unwritten.Load() != 0 {
				t.Fatalf("payload %d: its end was not seen", payload)
			}
		}
	}
}

func FuzzFrame(f *testing.F) {
	f.Add(marshal(&frame{messages: []GroupMessage{filled(f, 5)}}))
	f.Add(protowire.AppendTag(nil, 2, protowire.BytesType))
	f.Add(marshal(&frame{messages: []GroupMessage{{Group: 1, Message: paxosgroup.Message{Kind: paxosgroup.MsgFetch, From: 1, To: 2, Slot: 3, BytesMax: 1 << 20}}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var first, second frame
		if first.unmarshal(b) != nil {
			return
		}
		if err := second.unmarshal(marshal(&first)); err != nil {
			t.Fatalf("what was decoded does not decode again: %v", err)
		}
		if !reflect.DeepEqual(first.messages, second.messages) {
			t.Fatalf("got %+v, want %+v", second.messages, first.messages)
		}
	})
}
