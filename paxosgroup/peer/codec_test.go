package peer

import (
	"bytes"
	"reflect"
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

func FuzzFrame(f *testing.F) {
	f.Add(marshal(&frame{messages: []GroupMessage{filled(f, 5)}}))
	f.Add(protowire.AppendTag(nil, 2, protowire.BytesType))
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
